"""Storage faults: full disks, damaged files, altered files."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_utils import run_distributed
from full_disk import largest_file
from safetensors.torch import load_file, save_file
from test_hf_io import export, load_plain, make_source
from tiny_student import one_process_group
from torch import Tensor, nn

from opd_titan.checkpoint import manifest
from opd_titan.checkpoint.checkpointer import Checkpointer, inspect_checkpoint, load_weights
from opd_titan.checkpoint.hf_folder import CHECKSUMS
from opd_titan.checkpoint.hf_load import INDEX, SINGLE, check_hf_weights
from opd_titan.checkpoint.publish import name_file_in_errors
from opd_titan.checkpoint.steps import MANIFEST, STATE, agree_on_step, open_folder, set_aside
from opd_titan.distributed.agreement import raise_on_all_ranks
from opd_titan.errors import CheckpointError, ConfigError, ModelError, StorageError

WEIGHTS = "rank-0.safetensors"


def make_pair(size: int = 40) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(size)
    model = nn.Linear(size, size)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, size)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def make_checkpointer(folder: Path, *, background: bool = False, keep: int = 0) -> Checkpointer:
    return Checkpointer(folder, *make_pair(), keep_latest_k=keep, background=background)


def save(checkpointer: Checkpointer, step: int, state: dict[str, Any] | None = None) -> None:
    checkpointer.save(step, state or {})
    checkpointer.finish()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints 2 and 4."""
    folder = tmp_path_factory.mktemp("saved")
    with one_process_group():
        for step in (2, 4):
            save(make_checkpointer(folder), step, {"step": step})
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """Return a copy of them."""
    return shutil.copytree(saved, tmp_path / "checkpoint")


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What the program logs from INFO on, as `LEVEL message`."""
    lines: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda r: lines.append(f"{r.levelname} {r.getMessage()}")  # type: ignore
    logger = logging.getLogger("opd_titan")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ----------------------------------------------------- damage done to a step


def flip(path: Path, at: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 4
    path.write_bytes(data)


def cut(path: Path, keep: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])


def become_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def become_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("")


# the damage, the file that the message must name, and what it must say
DAMAGE: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "weights_truncated": (lambda s: cut(s / WEIGHTS, 0.7), WEIGHTS, "bytes; "),
    "weights_longer": (lambda s: (s / WEIGHTS).open("ab").write(b"x"), WEIGHTS, "bytes; "),
    "weights_flipped": (lambda s: flip(s / WEIGHTS), WEIGHTS, "CRC-32"),
    "state_flipped": (lambda s: flip(s / STATE), STATE, "CRC-32"),
    "weights_gone": (lambda s: (s / WEIGHTS).unlink(), WEIGHTS, "is missing"),
    "state_gone": (lambda s: (s / STATE).unlink(), STATE, "is missing"),
    "weights_a_folder": (lambda s: become_folder(s / WEIGHTS), WEIGHTS, "bytes; "),
    "manifest_cut": (lambda s: cut(s / MANIFEST, 0.5), MANIFEST, "is damaged"),
    "manifest_a_list": (lambda s: (s / MANIFEST).write_text("[]"), MANIFEST, "is damaged"),
    "manifest_a_folder": (lambda s: become_folder(s / MANIFEST), MANIFEST, "cannot be read"),
    "manifest_gone": (lambda s: (s / MANIFEST).unlink(), MANIFEST, "is missing"),
    "a_file": (become_file, "step-4", "is not a folder"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_step_is_named_and_passed_over(folder: Path, said: list[str], name: str) -> None:
    damage, file, what = DAMAGE[name]
    step = folder / "step-4"
    with one_process_group():
        assert agree_on_step(folder, -1) == 4
        damage(step)
        before = {str(p) for p in folder.rglob("*")}
        assert agree_on_step(folder, -1) == 2
        (warning,) = said
        assert warning.startswith("WARNING ") and "going back to step 2" in warning
        assert file in warning and what in warning and "\n" not in warning
        with pytest.raises(CheckpointError) as asked_for:
            agree_on_step(folder, 4)
        shutil.rmtree(folder / "step-2")
        with pytest.raises(CheckpointError) as alone:
            agree_on_step(folder, -1)
        for error in (str(asked_for.value), str(alone.value)):
            assert file in error and what in error and "checkpoint.load_step" in error
        assert agree_on_step(folder, 0) is None
    # The checks have changed nothing.
    assert {str(p) for p in folder.rglob("*")} == {p for p in before if "step-2" not in p}


def test_what_is_damaged_is_kept_under_another_name(folder: Path) -> None:
    with one_process_group():
        for kept in (["step-4.damaged"], ["step-4.damaged", "step-4.damaged-2"]):
            flip(folder / "step-4" / WEIGHTS)
            assert agree_on_step(folder, -1) == 2
            set_aside(folder, 2, "damaged")
            assert names(folder) == ["step-2", *kept]
            # The step that is made again counts, the damaged ones do not.
            save(make_checkpointer(folder, keep=2), 4)
            assert agree_on_step(folder, -1) == 4
        save(make_checkpointer(folder, keep=1), 6)
        assert names(folder) == ["step-4.damaged", "step-4.damaged-2", "step-6"]


def test_newer_steps_of_another_run_do_not_push_out_the_good_ones(folder: Path) -> None:
    (folder / "step-4").rename(folder / "step-90")
    with one_process_group():
        save(make_checkpointer(folder, keep=2), 3)
    assert names(folder) == ["step-2", "step-3", "step-90"]


def test_a_step_without_its_state_is_not_one_of_those_kept(folder: Path) -> None:
    (folder / "step-4" / STATE).unlink()
    with one_process_group():
        save(make_checkpointer(folder, keep=2), 6)
    assert names(folder) == ["step-2", "step-4", "step-6"]


def test_a_kill_between_two_renames_loses_nothing(folder: Path) -> None:
    shutil.copytree(folder / "step-4", folder / "step-4.tmp")
    (folder / "step-4").rename(folder / "step-4.replaced")
    with one_process_group():
        assert agree_on_step(folder, -1) == 4
        open_folder(folder)
    assert names(folder) == ["step-2", "step-4"]


# ------------------------------------------------------- storage that is full


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("file", [WEIGHTS, STATE])
def test_a_save_that_fails_leaves_the_last_good_one(
    tmp_path: Path, said: list[str], background: bool, file: str
) -> None:
    state = {"text": "x" * 200_000} if file == STATE else {}
    with one_process_group():
        checkpointer = make_checkpointer(tmp_path, background=background, keep=1)
        save(checkpointer, 2)
        with largest_file(100_000 if file == STATE else 1000):
            checkpointer.save(4, state)
            assert checkpointer.secured() is None  # the caller is to try again
        assert names(tmp_path) == ["step-2"]
        (error,) = (line for line in said if line.startswith("ERROR"))
        assert error.startswith("ERROR Storage: checkpoint of step 4 not saved: ")
        assert f"step-4.tmp/{file}: File too large; step 2 is the newest that is safe" in error
        with pytest.raises(StorageError, match="step 4 not saved: .*File too large"):
            checkpointer.finish()
        # The next save succeeds and clears the fault.
        save(checkpointer, 6, state)
        assert names(tmp_path) == ["step-6"]
        checkpointer.load(6)
        found = inspect_checkpoint(tmp_path / "step-6", checkpointer.model)
        assert found.items() >= state.items()


def test_a_background_save_that_failed_does_not_keep_the_next_from_starting(
    tmp_path: Path, said: list[str]
) -> None:
    with one_process_group():
        checkpointer = make_checkpointer(tmp_path, background=True)
        with largest_file(1000):
            checkpointer.save(2, {})
            checkpointer._pending[-1].exception(60)
        save(checkpointer, 4)
    assert sum(line.startswith("ERROR") for line in said) == 1 and names(tmp_path) == ["step-4"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)]
    made = subprocess.run(mount, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"may not mount a small disk here: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.skipif(shutil.which("mount") is None, reason="has no mount command")
@pytest.mark.parametrize("background", [False, True])
def test_a_disk_that_is_full(small_disk: Path, tmp_path: Path, background: bool) -> None:
    source = make_source(tmp_path / "source")
    model = load_plain(source)
    with one_process_group():
        checkpointer = make_checkpointer(small_disk, background=background)
        save(checkpointer, 2)
        ballast = small_disk / "ballast"
        free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
        ballast.write_bytes(bytes(free - 16 * 1024))
        checkpointer.save(4, {})
        with pytest.raises(StorageError, match=f"{WEIGHTS}: No space left on device; step 2 is"):
            checkpointer.finish()
        with pytest.raises(StorageError, match="safetensors: No space left on device$"):
            export(model, source, small_disk / "hf")
        assert names(small_disk) == ["ballast", "step-2"]
        ballast.unlink()
        save(checkpointer, 6)
        with pytest.raises(CheckpointError, match="complete steps: 2, 6"):
            agree_on_step(small_disk, 4)


def with_one_rank_out_of_room(folder: Path, source: Path) -> dict[str, Any]:
    """Return what each rank gets when one of them cannot write."""
    rank, out = dist.get_rank(), {}
    manifest.PIECE_BYTES = 1000  # so that each rank checks a part of every file
    open_folder(folder)
    model = load_plain(source)
    for background in (False, True):
        checkpointer = make_checkpointer(folder, background=background)
        save(checkpointer, 2)
        for poor in (0, 1):
            with largest_file(1000 if rank == poor else 10**9):
                checkpointer.save(4, {})
                checkpointer.wait()
            with pytest.raises(StorageError) as caught:
                checkpointer.finish()
            out[f"save {background} {poor}"] = str(caught.value)
            dist.barrier()  # rank 0 has deleted what was left
            out[f"left {background} {poor}"] = names(folder)
            dist.barrier()  # before the next save writes
        save(checkpointer, 6, {"back": background})
        checkpointer.load(6)
        assert inspect_checkpoint(folder / "step-6", checkpointer.model)["back"] == background
    with largest_file(1000 if rank == 0 else 10**9), pytest.raises(StorageError) as caught:
        export(model, source, folder / "hf")
    out["export"] = str(caught.value)
    dist.barrier()
    if rank == 0:
        flip(folder / "step-6" / "rank-1.safetensors", 0.9)
    dist.barrier()
    out["chosen"] = agree_on_step(folder, -1)
    total = torch.ones(1)
    dist.all_reduce(total)  # the ranks still call the same collectives
    return {**out, "ranks": total.item()}


@pytest.mark.slow
def test_when_one_rank_cannot_write_all_know_and_go_on(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    first, second = run_distributed(with_one_rank_out_of_room, 2, tmp_path / "out", source)
    assert first == second
    assert first["ranks"] == 2 and first["chosen"] == 2
    assert f"hf.tmp/{SINGLE}: File too large" in first["export"]
    for background in (False, True):
        for poor in (0, 1):
            assert f"rank-{poor}.safetensors: File too large" in first[f"save {background} {poor}"]
            assert "step-4" not in " ".join(first[f"left {background} {poor}"])
    assert names(tmp_path / "out") == ["step-2", "step-6"]


def test_an_error_without_a_number_keeps_its_words() -> None:
    with one_process_group(), pytest.raises(StorageError, match="^a/b: the disk is on fire$"):
        with raise_on_all_ranks(), name_file_in_errors("a/b"):
            raise OSError("the disk is on fire")


def test_a_folder_that_cannot_be_written_is_the_users_mistake(tmp_path: Path) -> None:
    # A file in place of the folder fails for the superuser too.
    (tmp_path / "checkpoint").write_text("")
    with one_process_group():
        for folder in (tmp_path / "checkpoint", tmp_path / "checkpoint" / "below"):
            with pytest.raises(ConfigError, match=r"^\[job\] dump_folder: .*cannot be written"):
                open_folder(folder)
        with largest_file(100), pytest.raises(ConfigError, match="File too large"):
            open_folder(tmp_path / "small")
        assert names(tmp_path / "small") == []


# ----------------------------------------------------- altered and older checkpoints


def seal(folder: Path, name: str) -> None:
    """Write checksums that fit the files."""
    (folder / name).unlink(missing_ok=True)
    files = manifest.describe(folder, [n for n in names(folder) if n != "README.md"])
    (folder / name).write_text(manifest.manifest_text(files))


def tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], Any]:
    def alter(step: Path) -> None:
        content = load_file(step / WEIGHTS)
        change(content)
        save_file(content, step / WEIGHTS)

    return alter


BIAS = "model.bias@0"
ALTERED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no such tensor": (tensors(lambda t: t.pop(BIAS)), "another model: model.bias is absent there"),
    "one tensor more": (
        tensors(lambda t: t.update({"model.x@0": t[BIAS].clone()})),
        "absent in student",
    ),
    "another shape": (
        tensors(lambda t: t.update({BIAS: t[BIAS][1:].clone()})),
        r"\[39\] there and \[40\]",
    ),
    "a lost slice": (
        tensors(lambda t: t.update({"model.bias@1": t.pop(BIAS)})),
        "slices of model.bias are missing",
    ),
    "no offset": (tensors(lambda t: t.update({"bias": t.pop(BIAS)})), "cannot be read"),
    "no tensors": (lambda s: (s / WEIGHTS).write_text("{}"), "not a safetensors file"),
    "no state": (lambda s: (s / STATE).write_text("[]"), "contains a JSON list"),
    "of another version": (
        lambda s: (s / STATE).write_text('{"format": 2, "version": "0.1.0"}'),
        r"another version of opd_titan \(0.1.0, format 2; this one reads format ",
    ),
}


@pytest.mark.parametrize("name", ALTERED)
def test_a_checkpoint_that_does_not_fit_is_one_line(folder: Path, name: str) -> None:
    change, message = ALTERED[name]
    change(folder / "step-4")
    seal(folder / "step-4", MANIFEST)
    with one_process_group():
        checkpointer = make_checkpointer(folder)
        assert agree_on_step(folder, -1) == 4
        for look in (
            lambda: inspect_checkpoint(folder / "step-4", checkpointer.model),
            lambda: checkpointer.load(4),
            lambda: load_weights(folder / "step-4", checkpointer.model),
        ):
            with pytest.raises(CheckpointError, match=message) as caught:
                look()
            assert str(caught.value).startswith(f"{folder}/step-4")


def test_a_checkpoint_is_json_and_safetensors_only(saved: Path) -> None:
    """Neither can run code when it is read."""
    for path in (saved / "step-4").iterdir():
        if path.suffix == ".json":
            json.loads(path.read_text())
        else:
            assert load_file(path)


# ------------------------------------------------------- Hugging Face folders


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    source = make_source(folder / "source", tied=True)
    export(load_plain(source), source, folder / "hf", max_shard_bytes=20_000)
    return folder / "hf"


def some_shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[1]


def escape(folder: Path) -> None:
    """An index that points out of its folder, with a manifest that fits it."""
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {k: f"../hf/{v}" for k, v in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))
    seal(folder, CHECKSUMS)


EXPORT_DAMAGE: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "flipped": (lambda f: flip(some_shard(f), 0.9), ("model-00002-of", "CRC-32", CHECKSUMS)),
    "truncated": (lambda f: cut(some_shard(f), 0.9), ("model-00002-of", "bytes; ")),
    "gone": (lambda f: some_shard(f).unlink(), ("model-00002-of", "is missing")),
    "config": (lambda f: flip(f / "config.json"), ("config.json", "CRC-32", "on purpose")),
    "manifest": (lambda f: cut(f / CHECKSUMS, 0.3), (CHECKSUMS, "is damaged")),
    "elsewhere": (
        lambda f: (f / CHECKSUMS).write_text(
            '{"piece_bytes": 9, "files": {"../x": {"size": 0, "crc32": []}}}'
        ),
        ("../x", "not the name of a file"),
    ),
    "index_escapes": (escape, (INDEX, "../hf/", "the name of a file beside it")),
}


@pytest.mark.parametrize("name", EXPORT_DAMAGE)
def test_a_damaged_export_is_refused_before_its_weights_are_read(
    exported: Path, tmp_path: Path, name: str
) -> None:
    damage, parts = EXPORT_DAMAGE[name]
    folder = tmp_path / "hf"
    shutil.copytree(exported, folder)
    load_plain(folder)
    damage(folder)
    with pytest.raises(ModelError) as caught:
        check_hf_weights(folder, {}, {})
    for part in parts:
        assert part in str(caught.value)


def test_an_export_may_be_changed_on_purpose(exported: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(exported, folder)
    (folder / "README.md").write_text("# my own words\n")
    load_plain(folder)
    with (folder / "config.json").open("a") as file:
        file.write("\n")
    (folder / CHECKSUMS).unlink()
    load_plain(folder)
