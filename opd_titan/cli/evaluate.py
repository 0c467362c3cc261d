"""Grade one model on held-out prompts: `python -m opd_titan.evaluate --evaluate.model PATH`.

The model is a training checkpoint, a Hugging Face folder or hub id, or the student or a teacher of
the recipe. The recipe's [validation] sets the prompts, the sampling and the graders. Without a
recipe, a model in a run's dump folder is evaluated with the recipe of that run.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd_titan.cli.exits import exit_code
from opd_titan.config import RECIPE_FILE, JobConfig, load_config
from opd_titan.config.consistency import check_evaluation
from opd_titan.config.resolve import ResolvedJob

if TYPE_CHECKING:
    from opd_titan.cli.subject import Subject
    from opd_titan.distributed.heartbeat import Heartbeat
    from opd_titan.distributed.stopping import StopRequest
    from opd_titan.distributed.world import World

PROGRAM = "opd_titan.evaluate"


def main(argv: list[str]) -> int:
    """Evaluate one model. Return the exit code, see `train.main`."""

    def job() -> int:
        config = load_evaluation(argv)
        from opd_titan.cli.run import run

        return run(config, evaluate)

    return exit_code(job)


def load_evaluation(argv: list[str]) -> JobConfig:
    """Return the checked configuration of an evaluation; see `load_config`."""
    config = load_config(add_own_recipe(argv), check_evaluation, PROGRAM)
    config.validation.enable = True  # a training recipe may disable it
    return config


def add_own_recipe(argv: list[str]) -> list[str]:
    """Return the arguments, with the recipe of the model's own run if they name none."""
    given = load_config(argv, lambda config: None, PROGRAM)
    model = given.evaluate.model
    if given.job.config_file or not model:
        return argv
    # The model is in <dump_folder>/hf/step-N or <dump_folder>/checkpoint/step-N.
    recipe = Path(model).parent.parent / RECIPE_FILE
    return ["--job.config_file", str(recipe), *argv] if recipe.is_file() else argv


def evaluate(job: ResolvedJob, stop: StopRequest, heartbeat: Heartbeat) -> int:
    """Evaluate the model on all ranks, and write its results. Return 0. All ranks call."""
    import torch
    import torch.distributed as dist

    from opd_titan.cli.subject import find_subject
    from opd_titan.distributed.agreement import raise_on_all_ranks
    from opd_titan.distributed.heartbeat import set_phase
    from opd_titan.distributed.monitor import Monitor
    from opd_titan.distributed.world import set_timeout
    from opd_titan.evaluation.results import claim_folder, table, write_results
    from opd_titan.evaluation.validator import build_validator, prompt_options
    from opd_titan.rollout.memory import StepMemory
    from opd_titan.training.models import build_generator
    from opd_titan.training.setup import join_world
    from opd_titan.training.sources import check_lengths

    config, world = job.config, join_world(job)
    with raise_on_all_ranks(wait=True):
        subject = find_subject(config)
        decode = partial(subject.tokenizer.decode, skip_special_tokens=True)
        options = prompt_options(config.data, subject.tokenizer)
        validator = build_validator(job, options, [], decode, world.dp, None)
        new_tokens = validator.params.max_new_tokens
        check_lengths([subject.source], validator.longest, new_tokens, "validation")
    with raise_on_all_ranks():
        folder = claim_folder(job, subject.name) if dist.get_rank() == 0 else None
    monitor = Monitor(stop, heartbeat, world)
    torch.use_deterministic_algorithms(config.training.deterministic)
    set_phase(f"the loading of {subject.name}")
    stop.check()
    model = _load(job, subject, world)
    source, memory = subject.source, StepMemory(world.device)
    weights, generator = build_generator(job, source, model, source.eos_ids, world, memory)
    set_timeout(config.comm.train_timeout_seconds, world.device)
    heartbeat.limit = config.comm.train_timeout_seconds
    set_phase(f"the evaluation of {subject.name}")
    weights.sync()
    measured = validator.measure(generator, subject.name, monitor.on_tokens)
    with raise_on_all_ranks():
        if folder is not None:
            model_summary = {
                "name": subject.name,
                "given": config.evaluate.model or "student",
                "weights": subject.weights,
                "parameters": sum(p.numel() for p in model.parameters()),
            }
            write_results(folder, job, model_summary, measured, decode)
            print(table(subject.name, measured), flush=True)
            print(f"Results and samples: {folder}", flush=True)
    dist.barrier()  # a rank that exits early would break the last collective of the others
    return 0


def _load(job: ResolvedJob, subject: Subject, world: World) -> Any:
    from opd_titan.checkpoint.checkpointer import load_weights
    from opd_titan.training.models import allocated_model, load_model

    if subject.checkpoint is None:
        return load_model(job, subject.source, world)
    model = allocated_model(job, subject.source, world)
    load_weights(subject.checkpoint, model)
    model.assert_tied()  # type: ignore[operator]  # our models have it
    return model
