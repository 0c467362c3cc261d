from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tiny_world import World
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

# Tests run several processes on few cores; one thread each keeps them from fighting.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Nothing is left in the user's own cache. Removed at the end of this process.
_CACHE = tempfile.TemporaryDirectory(prefix="opd_titan_tests_", ignore_cleanup_errors=True)
os.environ["HF_DATASETS_CACHE"] = _CACHE.name

REPO = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that have slow tests, so that no core waits for one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def repo() -> Path:
    """The project's root folder."""
    return REPO


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real GSM8K and the real Qwen3 tokenizer, kept beside the checkout and not shipped with it."""
    folder = REPO.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs real data in {folder}, which this machine does not have")
    return folder


@pytest.fixture(scope="session")
def shared_slurm() -> Path:
    """Scripts that start a SLURM cluster on this machine, kept beside the checkout."""
    folder = REPO.parent / "shared" / "slurm"
    if not folder.is_dir():
        pytest.skip(f"needs the scripts in {folder}, which this machine does not have")
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Models, data and a recipe to train in, for the tests of one file."""
    from tiny_world import make_world  # imports torch, which few files of tests need

    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def tiny() -> PreTrainedTokenizerFast:
    """A tokenizer with one token a character and a chat template."""
    from tiny_tokenizer import tiny_tokenizer  # slow to import, and few tests need it

    return tiny_tokenizer()


@pytest.fixture(scope="session")
def qwen3(shared_data: Path) -> PreTrainedTokenizerBase:
    """The real Qwen3 tokenizer."""
    from opd_titan.data.tokenizer import load_tokenizer

    return load_tokenizer(shared_data / "qwen3_tokenizer", "student.hf_path")


@pytest.fixture(scope="session")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """The arguments of a recipe to plan: student and teacher of `tiny_plan.SIZES`, options."""
    from tiny_plan import recipe, write_configs

    folder = tmp_path_factory.mktemp("shapes")
    write_configs(folder)
    return partial(recipe, folder)


@pytest.fixture(scope="session")
def planned(arguments: Callable[..., list[str]]) -> Callable[..., Any]:
    """Job, simulation and estimate of a recipe; the same ones are made once."""
    from tiny_plan import H200, resolved

    from opd_titan.config import load_config
    from opd_titan.plan.estimate import estimate
    from opd_titan.plan.simulate import simulate

    @functools.cache
    def plan(student: str, teacher: str, *options: Any, cluster: Any = H200) -> tuple[Any, ...]:
        config = load_config(arguments(student, teacher, *options))
        lengths = config.data.max_prompt_tokens, config.rollout.max_new_tokens
        job = resolved(config, cluster)
        simulation = simulate(job, cluster, *lengths)
        return job, simulation, estimate(job, cluster, simulation)

    return plan
