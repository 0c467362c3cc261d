"""Which model an evaluation grades: found, inspected and named, its weights not yet loaded."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from opd_titan.checkpoint.steps import is_checkpoint
from opd_titan.config import RECIPE_FILE, JobConfig
from opd_titan.config.job_config import TeacherModel
from opd_titan.config.resolve import ModelSpec, teacher_role
from opd_titan.data.tokenizer import compare_tokenizers
from opd_titan.errors import ConfigError
from opd_titan.training.sources import ModelSource, inspect_model


@dataclass(frozen=True)
class Subject:
    """The model that is graded.

    Attributes:
        name: for people, and of the results' folder.
        source: what it is; of a checkpoint, the student that it was of.
        tokenizer: whose template and tokens the prompts have.
        checkpoint: where the weights are, if not in the source's folder.
    """

    name: str
    source: ModelSource
    tokenizer: Any
    checkpoint: Path | None = None

    @property
    def weights(self) -> str:
        if self.checkpoint is not None:
            return str(self.checkpoint)
        return "random" if self.source.files is None else str(self.source.folder)


def find_subject(config: JobConfig) -> Subject:
    """The model that `evaluate.model` names, without its weights.

    Raises:
        UserError: there is no such model.
    """
    model, tp = config.evaluate.model or "student", config.parallelism.tensor_parallel_degree
    c, teacher = config.student, config.teacher
    student = ModelSpec(
        "student", c.hf_path, "student.hf_path", c.random_init, config.training.seed
    )
    # Where the weights of the student are not needed, they need not exist.
    template = replace(student, random_init=True)
    one = TeacherModel(hf_path=teacher.hf_path)
    teachers = {teacher_role(t.name): t.hf_path for t in (one, *teacher.models)}
    if model in teachers:
        spec = ModelSpec(
            model,
            teachers[model],
            f"{model}.hf_path",
            teacher.random_init,
            config.training.seed,
            teacher.cpu_offload,
        )
        source = inspect_model(spec, tp)
        if not c.hf_path:
            return Subject(model, source, source.tokenizer)
        # As during training, the teacher gets the prompts of the student.
        tokenizer = inspect_model(template, tp).tokenizer
        compare_tokenizers(tokenizer, source.tokenizer)
        return Subject(model, source, tokenizer)
    checkpoint = None
    if model == "student":
        source = inspect_model(replace(student, eos_token=c.eos_token), tp)
    elif is_checkpoint(Path(model)):
        if not c.hf_path:
            raise ConfigError(
                f"evaluate.model: the checkpoint {model} has weights only; give its run's recipe "
                f"(--job.config_file .../{RECIPE_FILE}) or student.hf_path for sizes and tokenizer"
            )
        source, checkpoint = (
            inspect_model(replace(template, eos_token=c.eos_token), tp),
            Path(model),
        )
    else:
        _refuse_dump_folder(Path(model))
        # An export has student.eos_token in its own files.
        source = inspect_model(ModelSpec("student", model, "evaluate.model"), tp)
    # It is not trained here: frozen, and in the compute dtype.
    source = replace(source, spec=replace(source.spec, role="model", cpu_offload=False))
    return Subject(short_name(model), source, source.tokenizer, checkpoint)


def _refuse_dump_folder(folder: Path) -> None:
    if (folder / RECIPE_FILE).is_file():
        models = sorted(folder.glob("hf/step-*")) + sorted(folder.glob("checkpoint/step-*"))
        named = ", ".join(str(path) for path in models) or "there is none yet"
        raise ConfigError(
            f"evaluate.model: {folder} is a run's dump folder; wanted one of its models: {named}"
        )


def short_name(model: str) -> str:
    """`outputs/mine/hf/step-40` -> `hf-step-40`; of others the last part."""
    parts = [part for part in Path(os.path.expanduser(model)).parts if part not in ("/", "..")]
    last = parts[-2:] if re.fullmatch(r"step-\d+", parts[-1] if parts else "") else parts[-1:]
    return re.sub(r"[^\w.-]+", "-", "-".join(last)) or "model"
