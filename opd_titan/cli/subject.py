"""Find and check the model that an evaluation grades, without loading its weights."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from opd_titan.checkpoint.steps import is_checkpoint
from opd_titan.config import RECIPE_FILE, JobConfig
from opd_titan.config.resolve import ModelSpec, teacher_specs
from opd_titan.data.tokenizer import compare_tokenizers
from opd_titan.errors import ConfigError
from opd_titan.training.sources import ModelSource, inspect_model


@dataclass(frozen=True)
class Subject:
    """The model to grade.

    Attributes:
        name: a short name, for messages and for the folder of the results.
        source: its files and sizes; of the run's student for a training checkpoint.
        tokenizer: the tokenizer of the prompts.
        checkpoint: a training checkpoint with the weights; None if the source has them.
    """

    name: str
    source: ModelSource
    tokenizer: Any
    checkpoint: Path | None = None

    @property
    def weights(self) -> str:
        """Where the weights come from: a folder, or "random"."""
        if self.checkpoint is not None:
            return str(self.checkpoint)
        return "random" if self.source.files is None else str(self.source.folder)


def find_subject(config: JobConfig) -> Subject:
    """Find and inspect the model that `evaluate.model` names.

    Raises:
        UserError: there is no such model, or it cannot be used.
    """
    model, tp = config.evaluate.model or "student", config.parallelism.tensor_parallel_degree
    c = config.student
    student = ModelSpec(
        "student", c.hf_path, "student.hf_path", c.random_init, config.training.seed
    )
    # The student's weights need not exist if only its tokenizer and sizes are needed.
    template = replace(student, random_init=True)
    teachers = {spec.role: spec for spec in teacher_specs(config)}
    checkpoint = None
    if model in teachers:
        source = inspect_model(teachers[model], tp)
        if not c.hf_path:
            return Subject(model, source, source.tokenizer)
        # As in training, the teacher gets the student's prompts.
        tokenizer = inspect_model(template, tp).tokenizer
        compare_tokenizers(tokenizer, source.tokenizer)
        return Subject(model, source, tokenizer)
    if model == "student":
        spec = replace(student, eos_token=c.eos_token)
    elif is_checkpoint(Path(model)):
        if not c.hf_path:
            raise ConfigError(
                f"evaluate.model: the checkpoint {model} has only weights; for the sizes and the "
                f"tokenizer give the recipe of its run (--job.config_file .../{RECIPE_FILE}) or "
                f"student.hf_path"
            )
        spec, checkpoint = replace(template, eos_token=c.eos_token), Path(model)
    else:
        _refuse_dump_folder(Path(model))
        spec = ModelSpec("student", model, "evaluate.model")  # an export already has the eos_token
    source = inspect_model(spec, tp)
    # Any role other than the student's is loaded frozen, in the compute dtype.
    source = replace(source, spec=replace(spec, role="model"))
    return Subject(short_name(model), source, source.tokenizer, checkpoint)


def _refuse_dump_folder(folder: Path) -> None:
    if (folder / RECIPE_FILE).is_file():
        models = sorted(folder.glob("hf/step-*")) + sorted(folder.glob("checkpoint/step-*"))
        choices = ", ".join(map(str, models)) or "it has no models yet"
        raise ConfigError(
            f"evaluate.model: {folder} is the dump folder of a run; expected one of its models: "
            f"{choices}"
        )


def short_name(model: str) -> str:
    """Return "hf-step-40" for "outputs/mine/hf/step-40", for other paths their last part."""
    parts = [part for part in Path(os.path.expanduser(model)).parts if part not in ("/", "..")]
    last = parts[-2:] if re.fullmatch(r"step-\d+", parts[-1] if parts else "") else parts[-1:]
    return re.sub(r"[^\w.-]+", "-", "-".join(last)) or "model"
