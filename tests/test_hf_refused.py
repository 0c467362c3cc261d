"""Hugging Face folders that are refused, and how; which of their files are read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_hf_io import TIED, inspect, load_plain, load_theirs, make_source
from torch import Tensor

from opd_titan.checkpoint.hf_folder import eos_token_ids, resolve_model_folder
from opd_titan.checkpoint.hf_load import INDEX, SINGLE
from opd_titan.errors import ModelError

WQ = "model.layers.1.self_attn.q_proj.weight"
(EMBEDDING,) = TIED.values()
SHARD = "model-00002-of-"  # start of the second shard's name


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_bytes(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def second_shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[1]


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", lambda c: c.update(changes))


def tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder, change)


def weight_map(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / INDEX, lambda i: change(i["weight_map"]))


def text(name: str, content: str) -> Callable[[Path], int]:
    return lambda folder: (folder / name).write_text(content)


def only_bin(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "pytorch_model.bin")


# kind of source, what breaks it, what the message must name
BROKEN: dict[str, tuple[dict[str, Any], Callable[[Path], Any], tuple[str, ...]]] = {
    "no_config": ({}, lambda f: (f / "config.json").unlink(), ("config.json", "missing")),
    "config_not_json": ({}, text("config.json", "{"), ("config.json", "JSON")),
    "config_not_an_object": ({}, text("config.json", "[1]"), ("config.json", "list")),
    "no_weights": ({}, lambda f: (f / SINGLE).unlink(), (SINGLE, INDEX)),
    "only_pytorch_bin": ({}, only_bin, (SINGLE, "pytorch_model.bin")),
    "missing_tensor": ({}, tensors(lambda t: t.pop(WQ)), (SINGLE, WQ)),
    "extra_layer": ({}, config(num_hidden_layers=1), (SINGLE, "layers.1.", "and 10 more")),
    "extra_bias": (
        {},
        tensors(lambda t: t.update({WQ[:-6] + "bias": torch.zeros(128)})),
        (SINGLE, "q_proj.bias"),
    ),
    "misshapen": ({}, tensors(lambda t: t.update({WQ: t[WQ].T.contiguous()})), (SINGLE, WQ)),
    "fp8": ({}, tensors(lambda t: t.update({WQ: t[WQ].to(torch.float8_e4m3fn)})), (WQ, "F8_E4M3")),
    "untied_without_head": (
        dict(tied=True),
        config(tie_word_embeddings=False),
        ("lm_head.weight",),
    ),
    "tied_with_another_head": (
        dict(tied=True, ship_head=True),
        tensors(lambda t: t["lm_head.weight"].neg_()),
        (SINGLE, "lm_head.weight", "tie_word_embeddings"),
    ),
    "tied_with_misshapen_head": (
        dict(tied=True, ship_head=True),
        tensors(lambda t: t.update({"lm_head.weight": torch.zeros(36, 32)})),
        (SINGLE, "lm_head.weight", "[36, 32]"),
    ),
    "truncated": ({}, lambda f: edit_bytes(f / SINGLE, lambda b: b[:-100]), (SINGLE, "truncated")),
    "lfs_pointer": ({}, text(SINGLE, "version https://git-lfs.github.com/spec/v1\n"), (SINGLE,)),
    "no_shard": (dict(sharded=True), lambda f: second_shard(f).unlink(), (SHARD, INDEX)),
    "index_escapes": (
        dict(sharded=True),
        weight_map(lambda m: m.update({WQ: "../other.safetensors"})),
        (INDEX, WQ, "../other.safetensors"),
    ),
    "index_without_map": (
        dict(sharded=True),
        lambda f: edit_json(f / INDEX, lambda i: i.pop("weight_map")),
        (INDEX, "weight_map"),
    ),
    "index_lacks_a_tensor": (dict(sharded=True), weight_map(lambda m: m.pop(WQ)), (WQ, INDEX)),
    "index_names_a_ghost": (
        dict(sharded=True),
        weight_map(lambda m: m.update({"ghost.weight": m[WQ]})),
        (INDEX, "ghost.weight"),
    ),
    "index_swaps_files": (
        dict(sharded=True),
        weight_map(lambda m: m.update({WQ: m["model.norm.weight"], "model.norm.weight": m[WQ]})),
        (INDEX,),
    ),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that makes a folder of each kind once."""
    made = tmp_path_factory.mktemp("sources")

    def source(**kind: Any) -> Path:
        folder = made / "-".join(["plain", *kind])
        return folder if folder.exists() else make_source(folder, **kind)

    return source


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folders_are_refused_in_one_line(
    sources: Callable[..., Path], name: str, tmp_path: Path
) -> None:
    kind, damage, named = BROKEN[name]
    folder = shutil.copytree(sources(**kind), tmp_path / "source")
    inspect(folder)
    damage(folder)
    with pytest.raises(ModelError) as caught:
        inspect(folder)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    for part in (str(folder), *named):
        assert part in message


def test_old_rope_tables_in_a_checkpoint_are_ignored(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    edit_tensors(source, lambda tensors: tensors.update(table))
    load_plain(source)


def test_a_single_file_comes_before_an_index_as_in_transformers(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    other = make_source(tmp_path / "other", sharded=True, initializer_range=0.7)
    for path in other.glob("model*"):
        shutil.copy(path, source)
    model = load_plain(source)
    theirs = load_theirs(source)
    assert torch.equal(model.tok_embeddings.weight, theirs.model.embed_tokens.weight)


@pytest.mark.parametrize("path", ["", "missing", "./a/b", "/no/such/folder", "a/b/c", "org/none"])
def test_a_model_that_is_not_there_names_the_key(path: str) -> None:
    with pytest.raises(ModelError) as caught:
        resolve_model_folder(path, "teacher.hf_path")
    message = str(caught.value)
    assert message.startswith(f"teacher.hf_path = {path!r}") and "\n" not in message


def test_a_local_folder_is_returned_as_given(tmp_path: Path) -> None:
    assert resolve_model_folder(str(tmp_path), "student.hf_path") == tmp_path


@pytest.mark.parametrize(
    ("generation", "config_eos", "expected"),
    [
        ({"eos_token_id": [5, 7]}, 5, {5, 7}),
        ({"eos_token_id": 6}, 5, {6}),
        ({"eos_token_id": None}, 5, {5}),
        ({}, [5, 8], {5, 8}),
        (None, 5, {5}),
        (None, 0, {0}),
        (None, None, "neither"),
        ({}, [], "neither"),
        ({"eos_token_id": "</s>"}, 5, "generation_config.json: eos_token_id"),
        ({"eos_token_id": [5, 99]}, 5, "generation_config.json: eos_token_id"),
        (None, -1, "config.json: eos_token_id"),
        (None, True, "config.json: eos_token_id"),
        ([], 5, "generation_config.json: contains a JSON list"),
    ],
    ids=str,
)
def test_eos_ids(generation: Any, config_eos: Any, expected: Any, tmp_path: Path) -> None:
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    config = {"eos_token_id": config_eos}
    if isinstance(expected, set):
        assert eos_token_ids(tmp_path, config, 37) == expected
        return
    with pytest.raises(ModelError, match=expected):
        eos_token_ids(tmp_path, config, 37)
