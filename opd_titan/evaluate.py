"""Grade one model on held-out prompts: `python -m opd_titan.evaluate --evaluate.model PATH`.

The model is a training checkpoint, a Hugging Face folder or hub id, or a recipe's student or
teacher. Prompts, sampling and graders are those of the recipe's [validation]. A model that lies in
the dump folder of a run needs no recipe: it takes that run's own.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd_titan.config import JobConfig, load_config
from opd_titan.config.consistency import check_evaluation
from opd_titan.config.job_config import TeacherModel
from opd_titan.config.manager import read_arguments
from opd_titan.config.sets import teacher_role
from opd_titan.train import exit_code, run_and_leave

if TYPE_CHECKING:
    from opd_titan.build import ModelSource
    from opd_titan.distributed.agreement import StopRequest
    from opd_titan.distributed.lifeline import Lifeline
    from opd_titan.distributed.world import World

RECIPE = "config.resolved.toml"


def main(argv: list[str]) -> int:
    """Evaluate one model. Returns the exit code, see `train.main`; 75: start again."""

    def job() -> int:
        found = argv if {"-h", "--help"} & set(argv) else with_own_recipe(argv)
        config = load_config(found, check_evaluation, "opd_titan.evaluate")
        from opd_titan.supervise import run

        return run(config, evaluate)

    return exit_code(job)


def with_own_recipe(argv: list[str]) -> list[str]:
    """The arguments, with the recipe of the run that the model comes from where none is given."""
    given = read_arguments(argv)
    model = given.get("evaluate.model", "")
    if "job.config_file" in given or not model:
        return argv
    # <dump_folder>/hf/step-N or <dump_folder>/checkpoint/step-N
    recipe = Path(model).parent.parent / RECIPE
    return ["--job.config_file", str(recipe), *argv] if recipe.is_file() else argv


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
    from opd_titan.build import ending_with, inspect_model
    from opd_titan.checkpoint.steps import is_checkpoint
    from opd_titan.data.tokenizer import compare_tokenizers
    from opd_titan.errors import ConfigError

    model, tp = config.evaluate.model or "student", config.parallelism.tensor_parallel_degree
    student, teacher = config.student, config.teacher
    # Where the student's weights are not needed they need not be there.
    template = partial(inspect_model, "student", student.hf_path, True, tp)
    one = TeacherModel(hf_path=teacher.hf_path)
    teachers = {teacher_role(t.name): t.hf_path for t in (one, *teacher.models)}
    if model in teachers:
        source = inspect_model(model, teachers[model], teacher.random_init, tp)
        if not student.hf_path:
            return Subject(model, source, source.tokenizer)
        # As during training: it is asked what the student is asked.
        tokenizer = template().tokenizer
        compare_tokenizers(tokenizer, source.tokenizer)
        return Subject(model, source, tokenizer)
    checkpoint = None
    if model == "student":
        source = inspect_model("student", student.hf_path, student.random_init, tp)
    elif is_checkpoint(Path(model)):
        if not student.hf_path:
            raise ConfigError(
                f"evaluate.model: the checkpoint {model} has weights only; give its run's recipe "
                f"(--job.config_file .../{RECIPE}) or student.hf_path for sizes and tokenizer"
            )
        source, checkpoint = template(), Path(model)
    else:
        _refuse_dump_folder(Path(model))
        source = inspect_model("student", model, False, tp, key="evaluate.model")
    if student.eos_token and (model == "student" or checkpoint is not None):
        source = ending_with(source, student.eos_token)  # an export says so itself
    # Not trained here: frozen, and in the dtype that it computes in.
    source = replace(source, role="model")
    return Subject(short_name(model), source, source.tokenizer, checkpoint)


def _refuse_dump_folder(folder: Path) -> None:
    from opd_titan.errors import ConfigError

    if (folder / RECIPE).is_file():
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


def evaluate(config: JobConfig, stop: StopRequest, lifeline: Lifeline) -> int:
    """The whole job on one rank; all ranks call."""
    import torch
    import torch.distributed as dist

    from opd_titan.build import build_generator, check_lengths, compute_dtype
    from opd_titan.checkpoint.faults import met_by_all
    from opd_titan.distributed.agreement import together
    from opd_titan.distributed.world import set_timeout
    from opd_titan.evaluation_results import claim_folder, table, write_results
    from opd_titan.prepare import join_world
    from opd_titan.validate import build_validator, prompt_options
    from opd_titan.watch import Watch

    world = join_world(config)
    with together():
        subject = find_subject(config)
        decode = partial(subject.tokenizer.decode, skip_special_tokens=True)
        options = prompt_options(config, subject.tokenizer)
        validator = build_validator(config, options, [], decode, world.dp, None)
        new_tokens = validator.params.max_new_tokens
        check_lengths([subject.source], validator.prompts, new_tokens, "validation")
    folder, watch = claim_folder(config, subject.name), Watch(stop, lifeline, world)
    torch.use_deterministic_algorithms(config.training.deterministic)
    watch.enter(f"the loading of {subject.name}")
    stop.check()
    dtype = compute_dtype(config, world.device)
    model = _load(subject, world, config, dtype)
    weights, generator = build_generator(subject.source, model, world, config, dtype)
    set_timeout(config.comm.train_timeout_seconds, world.device)
    lifeline.limit = config.comm.train_timeout_seconds
    watch.enter(f"the evaluation of {subject.name}")
    weights.sync()
    measured = validator.measure(generator, subject.name, watch.on_tokens)
    with met_by_all():
        if dist.get_rank() == 0:
            write_results(folder, config, subject, dtype, measured, decode)
            print(table(subject.name, measured), flush=True)
            print(f"Results and samples: {folder}", flush=True)
    dist.barrier()  # a rank that leaves early breaks the others' last collective
    return 0


def _load(subject: Subject, world: World, config: JobConfig, dtype: Any) -> Any:
    from opd_titan.build import load_model, parallel_model
    from opd_titan.checkpoint.checkpointer import load_weights

    if subject.checkpoint is None:
        return load_model(subject.source, world, config, dtype)
    model = parallel_model(subject.source, world, config, dtype)
    model.to_empty(device=world.device)
    load_weights(subject.checkpoint, model)
    model.assert_tied()  # type: ignore[operator]  # of our own models
    return model


if __name__ == "__main__":
    run_and_leave(main)
