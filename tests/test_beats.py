"""Every slow part of a run sends heartbeats, so that a healthy run is not ended."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tiny_world import make_world, train

from opd_titan.checkpoint import manifest
from opd_titan.checkpoint.hf_folder import resolve_model_folder
from opd_titan.distributed.heartbeat import Heartbeat, beat, set_phase
from opd_titan.grading.graders import GRADERS

TENSORS = 4  # fewer than any model here has


@pytest.fixture
def beats(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the heartbeats of runs in this process by phase."""
    found: Counter[str] = Counter()
    own = Heartbeat.beat

    def counted(self: Heartbeat) -> None:
        found[self.phase] += 1
        own(self)

    monkeypatch.setattr(Heartbeat, "beat", counted)
    return found


def test_every_part_of_a_run_says_that_it_goes_on(tmp_path: Path, beats: Counter[str]) -> None:
    world = make_world(tmp_path)
    argv = world.argv("run", "--training.steps", 1, "--export.interval", 1)
    assert train(argv) == 0
    folder = Path(argv[3]) / "checkpoint"
    assert min(beats["the loading of the student"], beats["the loading of the teacher"]) > TENSORS
    assert beats["the reading of data.path"] >= 2  # once as it begins, once each batch
    # Each tensor of the export and of the checkpoint (with its two moments), and their checksums.
    assert beats["phase checkpoint of step 1"] > 4 * TENSORS
    beats.clear()
    assert train([*argv, "--training.steps", "2"]) == 0
    assert beats[f"the check of {folder}"] > 2  # its files' checksums
    assert beats["the loading of the checkpoint of step 1"] > 3 * TENSORS


def test_each_buffer_of_a_checksum_is_a_beat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beats: Counter[str]
) -> None:
    monkeypatch.setattr(manifest, "_BUFFER_BYTES", 1000)
    (tmp_path / "file").write_bytes(bytes(10_000))
    heartbeat = Heartbeat(0, 100.0)
    try:
        set_phase("the test")
        manifest.describe(tmp_path, ["file"])
    finally:
        heartbeat.close()
    assert beats["the test"] == 1 + 10
    beat()  # the heartbeat is closed
    assert beats["the test"] == 1 + 10


@pytest.mark.parametrize("by_bytes", [True, False])
def test_a_download_beats_as_it_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beats: Counter[str], by_bytes: bool
) -> None:
    def download(name: str, *, tqdm_class: Any, **options: Any) -> str:
        if by_bytes:  # as huggingface_hub 2 calls it
            bar = tqdm_class(total=300, disable=True)
            for _ in range(3):
                bar.update(100)
        else:
            assert list(tqdm_class("abc", disable=True)) == list("abc")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    heartbeat = Heartbeat(0, 100.0)
    try:
        set_phase("the test")
        assert resolve_model_folder("org/name", "student.hf_path") == tmp_path
    finally:
        heartbeat.close()
    assert beats["the test"] == 1 + 3


def test_each_graded_response_is_a_beat(beats: Counter[str]) -> None:
    heartbeat = Heartbeat(0, 100.0)
    try:
        set_phase("the test")
        GRADERS["gsm8k"]("#### 4", "4")
    finally:
        heartbeat.close()
    assert beats["the test"] == 1 + 1
