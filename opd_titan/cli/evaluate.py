"""Grade one model on held-out prompts: `python -m opd_titan.evaluate --evaluate.model PATH`.

The model is a training checkpoint, a Hugging Face folder or hub id, or a recipe's student or
teacher. Prompts, sampling and graders are those of the recipe's [validation]. A model that lies in
the dump folder of a run needs no recipe: it takes that run's own.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd_titan.cli.exits import exit_code
from opd_titan.config import RECIPE_FILE, JobConfig, load_config
from opd_titan.config.consistency import check_evaluation
from opd_titan.config.manager import read_arguments

if TYPE_CHECKING:
    from opd_titan.cli.subject import Subject
    from opd_titan.distributed.heartbeat import Heartbeat
    from opd_titan.distributed.stopping import StopRequest
    from opd_titan.distributed.world import World


def main(argv: list[str]) -> int:
    """Evaluate one model. Returns the exit code, see `train.main`; 75: start again."""

    def job() -> int:
        found = argv if {"-h", "--help"} & set(argv) else with_own_recipe(argv)
        config = load_config(found, check_evaluation, "opd_titan.evaluate")
        from opd_titan.cli.run import run

        return run(config, evaluate)

    return exit_code(job)


def with_own_recipe(argv: list[str]) -> list[str]:
    """The arguments, with the recipe of the run that the model comes from where none is given."""
    given = read_arguments(argv)
    model = given.get("evaluate.model", "")
    if "job.config_file" in given or not model:
        return argv
    # <dump_folder>/hf/step-N or <dump_folder>/checkpoint/step-N
    recipe = Path(model).parent.parent / RECIPE_FILE
    return ["--job.config_file", str(recipe), *argv] if recipe.is_file() else argv


def evaluate(config: JobConfig, stop: StopRequest, heartbeat: Heartbeat) -> int:
    """The whole job on one rank; all ranks call."""
    import torch
    import torch.distributed as dist

    from opd_titan.cli.subject import find_subject
    from opd_titan.distributed.agreement import raise_on_all_ranks
    from opd_titan.distributed.monitor import Monitor
    from opd_titan.distributed.world import set_timeout
    from opd_titan.evaluation.results import claim_folder, table, write_results
    from opd_titan.evaluation.validator import build_validator, prompt_options
    from opd_titan.training.models import build_generator, check_lengths, compute_dtype
    from opd_titan.training.setup import join_world

    world = join_world(config)
    with raise_on_all_ranks():
        subject = find_subject(config)
        decode = partial(subject.tokenizer.decode, skip_special_tokens=True)
        options = prompt_options(config, subject.tokenizer)
        validator = build_validator(config, options, [], decode, world.dp, None)
        new_tokens = validator.params.max_new_tokens
        check_lengths([subject.source], validator.longest, new_tokens, "validation")
    folder, monitor = claim_folder(config, subject.name), Monitor(stop, heartbeat, world)
    torch.use_deterministic_algorithms(config.training.deterministic)
    monitor.set_phase(f"the loading of {subject.name}")
    stop.check()
    dtype = compute_dtype(config, world.device)
    model = _load(subject, world, config, dtype)
    weights, generator = build_generator(subject.source, model, world, config, dtype)
    set_timeout(config.comm.train_timeout_seconds, world.device)
    heartbeat.limit = config.comm.train_timeout_seconds
    monitor.set_phase(f"the evaluation of {subject.name}")
    weights.sync()
    measured = validator.measure(generator, subject.name, monitor.on_tokens)
    with raise_on_all_ranks():
        if dist.get_rank() == 0:
            graded = {
                "name": subject.name,
                "given": config.evaluate.model or "student",
                "weights": subject.weights,
                "parameters": sum(p.numel() for p in model.parameters()),
            }
            write_results(folder, config, graded, dtype, measured, decode)
            print(table(subject.name, measured), flush=True)
            print(f"Results and samples: {folder}", flush=True)
    dist.barrier()  # a rank that leaves early breaks the others' last collective
    return 0


def _load(subject: Subject, world: World, config: JobConfig, dtype: Any) -> Any:
    from opd_titan.checkpoint.checkpointer import load_weights
    from opd_titan.training.models import allocate, load_model, parallel_model

    if subject.checkpoint is None:
        return load_model(subject.source, world, config, dtype)
    model = parallel_model(subject.source, world, config, dtype)
    allocate(model, world.device)
    load_weights(subject.checkpoint, model)
    model.assert_tied()  # type: ignore[operator]  # of our own models
    return model
