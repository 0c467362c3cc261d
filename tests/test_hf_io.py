"""Hugging Face folders in and out: what is loaded and what is written.

Spawned processes import this module, so what is slow to import (transformers) waits for its use.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_utils import run_distributed
from full_disk import largest_file
from safetensors.torch import load_file, save_file
from test_model import BASE, packed_logits, random_sequences
from tiny_student import one_process_group
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from opd_titan.checkpoint.hf_export import export_hf
from opd_titan.checkpoint.hf_folder import TOKENIZER_FILES, read_hf_config
from opd_titan.checkpoint.hf_load import (
    INDEX,
    SINGLE,
    check_hf_weights,
    load_hf_weights,
    native_tensors,
    random_init_weights,
)
from opd_titan.checkpoint.slices import FileSlice, read_header
from opd_titan.distributed.world import build_world
from opd_titan.errors import StorageError
from opd_titan.models import get_family
from opd_titan.models.qwen3.model import Qwen3Model

# An odd vocabulary, so that shards are uneven on two ranks.
TINY = {**BASE, "vocab_size": 37, "hidden_size": 32, "intermediate_size": 48, "eos_token_id": 2}
TIED = {"lm_head.weight": "model.embed_tokens.weight"}
CARD = "# A student\n"


def make_source(
    folder: Path,
    *,
    tied: bool = False,
    ship_head: bool = False,
    dtype: torch.dtype = torch.float32,
    sharded: bool = False,
    **sizes: Any,
) -> Path:
    """A folder as transformers itself writes it, with a tokenizer of `vocab_size` words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(**{**TINY, "tie_word_embeddings": tied, **sizes})
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config).to(dtype)
    model.save_pretrained(folder, max_shard_size="20KB" if sharded else "1GB")
    if ship_head:
        path = folder / SINGLE
        tensors = load_file(path)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, path, metadata={"format": "pt"})
    words = {f"w{i}": i for i in range(config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w2").save_pretrained(folder)
    return folder


def load_theirs(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **options)


def load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def inspect(folder: Path) -> tuple[Any, Any, dict[str, str], dict[str, FileSlice]]:
    """Return family, args, key table and checked tensors of a folder."""
    config = read_hf_config(folder)
    family = get_family(config, str(folder))
    args = family.args_from_hf_config(config, str(folder))
    table = family.hf_to_native(args.n_layers, args.tied)
    with torch.device("meta"):
        model = family.build(args)
    expected = {hf: tuple(model.get_parameter(native).shape) for hf, native in table.items()}
    return family, args, table, check_hf_weights(folder, expected, TIED if args.tied else {})


def load_plain(folder: Path) -> Qwen3Model:
    family, args, table, found = inspect(folder)
    model = family.build(args)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(torch.nan)
    load_hf_weights(model, found, table)
    return model


def build_sharded(
    folder: Path, degrees: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> Qwen3Model:
    """Build the model as the trainer does (meta, shard, materialise), filled with NaN."""
    family, args, _, _ = inspect(folder)
    with torch.device("meta"):
        model = family.build(args)
    family.parallelize(model, build_world(torch.device("cpu"), *degrees), dtype)
    model.to_empty(device="cpu")
    for tensor in native_tensors(model).values():
        tensor.to_local().fill_(torch.nan)
    return model


def export(model: nn.Module, source: Path, out: Path, **options: Any) -> None:
    """Export a model that was loaded from `source`."""
    _, _, table, found = inspect(source)
    defaults = {"stored": found, "key_table": table, "dtype": None, "card": CARD}
    export_hf(model, out, source_folder=source, **{**defaults, **options})


def stored(folder: Path) -> dict[str, Tensor]:
    """Return every tensor of a folder. None may be in two files."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        part = load_file(path)
        assert not tensors.keys() & part.keys()
        tensors.update(part)
    return tensors


def assert_same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


SOURCES: dict[str, dict[str, Any]] = {
    "single": {},
    "single_bf16": dict(dtype=torch.bfloat16),
    "sharded": dict(sharded=True),
    "sharded_tied_bf16": dict(sharded=True, tied=True, dtype=torch.bfloat16),
    "tied": dict(tied=True),
    "tied_with_head": dict(tied=True, ship_head=True),
}


@pytest.mark.parametrize("name", SOURCES)
@torch.no_grad()
def test_an_export_is_the_checkpoint_and_transformers_loads_it(name: str, tmp_path: Path) -> None:
    source, out = make_source(tmp_path / "source", **SOURCES[name]), tmp_path / "out"
    assert (source / INDEX).is_file() == ("sharded" in name)
    model, before = load_plain(source), load_theirs(source)
    limit = {"max_shard_bytes": 20_000} if "sharded" in name else {}
    export(model, source, out, **limit)
    truth = stored(source)
    if SOURCES[name].get("ship_head"):
        del truth["lm_head.weight"]
    assert_same_tensors(stored(out), truth)
    assert (out / INDEX).is_file() == ("sharded" in name)
    assert {p.name for p in tmp_path.iterdir()} == {"source", "out"}
    assert (out / "README.md").read_text() == CARD
    modes = {p.stat().st_mode for p in out.iterdir()}
    assert len(modes) == 1, "weights must be as readable as the config"
    assert read_hf_config(out) == read_hf_config(source)
    for copied in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (out / copied).read_bytes() == (source / copied).read_bytes()

    after, info = load_theirs(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert after.dtype == before.dtype
    tokens = random_sequences(37, [20])[0]
    assert torch.equal(before(tokens[None]).logits, after(tokens[None]).logits)
    assert load_tokenizer(out)("w5 w9 w2").input_ids == [5, 9, 2]
    ours = packed_logits(model, [tokens])
    assert torch.allclose(ours, after.float()(tokens[None]).logits[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_config_says_the_dtype_that_is_written(key: str, tmp_path: Path) -> None:
    source, out = make_source(tmp_path / "source"), tmp_path / "out"
    config = read_hf_config(source)
    config.pop("dtype", None)
    (source / "config.json").write_text(json.dumps({**config, key: "float32"}))
    export(load_plain(source), source, out, dtype=torch.bfloat16)
    assert read_hf_config(out) == {**config, key: "bfloat16"}
    assert_same_tensors(stored(out), {n: t.bfloat16() for n, t in stored(source).items()})
    assert load_theirs(out).dtype == torch.bfloat16


def test_auto_dtype_is_the_sources_tensor_by_tensor_or_its_configs(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", dtype=torch.bfloat16)
    mixed = stored(source)
    mixed["model.norm.weight"] = mixed["model.norm.weight"].float()
    save_file(mixed, source / SINGLE, metadata={"format": "pt"})
    model = load_plain(source)
    config = read_hf_config(source)
    # A config.json that is wrong or silent about it must not make a loader convert the weights.
    (source / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    export(model, source, tmp_path / "a")
    (source / "config.json").write_text(json.dumps(config))
    assert_same_tensors(stored(tmp_path / "a"), mixed)
    export(model, source, tmp_path / "b", stored=None)  # random weights
    assert {t.dtype for t in stored(tmp_path / "b").values()} == {torch.bfloat16}
    for out in ("a", "b"):
        assert read_hf_config(tmp_path / out)["dtype"] == "bfloat16"


def test_export_replaces_what_is_there_and_survives_a_full_disk(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    model = load_plain(source)
    out, tmp = tmp_path / "hf" / "step-1", tmp_path / "hf" / "step-1.tmp"
    for folder in (out, tmp):  # an older export, and what a killed run left
        folder.mkdir(parents=True)
        (folder / "stale.safetensors").write_text("")
    with largest_file(1000):
        with pytest.raises(StorageError, match="step-1.tmp/model.safetensors: File too large"):
            export(model, source, out)
    assert [p.name for p in out.parent.iterdir()] == ["step-1"]
    assert [p.name for p in out.iterdir()] == ["stale.safetensors"]
    export(model, source, out)
    assert_same_tensors(stored(out), stored(source))
    assert [p.name for p in out.parent.iterdir()] == ["step-1"]


def test_a_source_that_has_gone_is_a_storage_fault(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    model = load_plain(source)
    _, _, table, found = inspect(source)
    shutil.rmtree(source)
    with pytest.raises(StorageError, match="out not written: .*config.json: is missing"):
        export_hf(
            model,
            tmp_path / "out",
            source_folder=source,
            stored=found,
            key_table=table,
            dtype=None,
            card=CARD,
        )
    assert list(tmp_path.iterdir()) == []


def test_export_writes_the_master_weights_after_a_bf16_forward(tmp_path: Path) -> None:
    """After a forward the root stays gathered, in the compute dtype: that must not be exported."""
    source, out = make_source(tmp_path / "source", tied=True), tmp_path / "out"
    _, _, table, found = inspect(source)
    with one_process_group():
        model = build_sharded(source, (1,), torch.bfloat16)
        load_hf_weights(model, found, table)
        with torch.no_grad():
            packed_logits(model, random_sequences(37, [5]))
        export(model, source, out)
        assert_same_tensors(stored(out), stored(source))
        assert model.lm_head.weight is model.tok_embeddings.weight
        load_hf_weights(model, found, table)  # and a reload fills what the next forward uses
        after = packed_logits(model, random_sequences(37, [5]))
        assert torch.isfinite(after).all()


def test_real_qwen3_tokenizer_survives_export(shared_data: Path, tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    real, out = shared_data / "qwen3_tokenizer", tmp_path / "out"
    for path in real.iterdir():
        if path.name in TOKENIZER_FILES:
            shutil.copy(path, source)
    export(load_plain(source), source, out)
    a, b = load_tokenizer(real), load_tokenizer(out)
    messages = [{"role": "user", "content": "2 + 2 = 4, isn't it?"}]
    options = dict(tokenize=False, add_generation_prompt=True)
    assert a.apply_chat_template(messages, **options) == b.apply_chat_template(messages, **options)
    assert a.get_vocab() == b.get_vocab()


# ----------------------------------------------------------------- several processes


def gathered(model: nn.Module) -> dict[str, Tensor]:
    tensors = native_tensors(model)
    full = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in tensors.items()}
    # Pickled, a Parameter would take its storage with it.
    return {n: t.detach().clone() for n, t in full.items()}


def load_and_export(source: Path, out: Path, degrees: tuple[int, ...]) -> None:
    """Load a folder into shards, compare them with the files, export them again."""
    model = build_sharded(source, degrees)
    _, _, table, found = inspect(source)
    load_hf_weights(model, found, table)
    truth, loaded = stored(source), gathered(model)
    for hf, native in table.items():
        assert isinstance(native_tensors(model)[native], DTensor)
        assert torch.equal(loaded[native], truth[hf].float()), hf
    assert model.lm_head.weight is model.tok_embeddings.weight or not model.args.tied
    export(model, source, out, max_shard_bytes=20_000)
    assert (out / "config.json").is_file()  # on every rank, on return


# Kind of source, and degrees of replicas, shards and tensor parallelism.
LAYOUTS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "uneven": (dict(sharded=True), (1, 4)),
    # Five rows on four ranks: 2, 2, 1 and none.
    "empty": (dict(hidden_size=5, tied=True), (1, 4)),
    "replicas": (dict(sharded=True, tied=True, dtype=torch.bfloat16), (2, 2)),
    # 19 rows of the vocabulary on each of two ranks, cut into 10 and 9 by FSDP.
    "shard_tensor": (dict(vocab_size=38, tied=True, sharded=True), (1, 2, 2)),
    "replicate_tensor": (dict(vocab_size=38, tied=True, ship_head=True), (2, 1, 2)),
}


def world_of_four(folder: Path) -> list[dict[str, Tensor]]:
    for name, (_, degrees) in LAYOUTS.items():
        load_and_export(folder / name, folder / "out" / name, degrees)
    # FSDP over tensor parallelism: the first placement is a strided shard.
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = nn.Sequential(nn.Linear(12, 20, bias=False), nn.Linear(20, 12, bias=False))
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    header = read_header(folder / SINGLE)
    load_hf_weights(model, header, {name: name for name in header})
    for name, truth in load_file(folder / SINGLE).items():
        assert torch.equal(native_tensors(model)[name].full_tensor(), truth), name
    return [random_init(build_sharded(folder / name, LAYOUTS[name][1])) for name in LAYOUTS]


def random_init(model: nn.Module, seed: int = 3) -> dict[str, Tensor]:
    random_init_weights(model, seed=seed, std=0.02)
    return gathered(model)


@pytest.mark.slow
def test_four_processes_load_export_and_draw_what_one_does(tmp_path: Path) -> None:
    for name, (kind, _) in LAYOUTS.items():
        make_source(tmp_path / name, **kind)
    file = {"0.weight": torch.randn(20, 12), "1.weight": torch.randn(12, 20)}
    save_file(file, tmp_path / SINGLE)
    ranks = run_distributed(world_of_four, 4, tmp_path)
    for number, name in enumerate(LAYOUTS):
        truth, plain = stored(tmp_path / name), load_plain(tmp_path / name)
        if plain.args.tied:
            truth.pop("lm_head.weight", None)
        assert_same_tensors(stored(tmp_path / "out" / name), truth)
        drawn = random_init(plain)
        assert torch.equal(drawn["lm_head.weight"], drawn["tok_embeddings.weight"]) == (
            plain.args.tied
        )
        for rank in ranks:
            assert_same_tensors(rank[number], drawn)


def test_random_init_draws_each_matrix_from_seed_and_name(tmp_path: Path) -> None:
    model = load_plain(make_source(tmp_path / "source"))
    first, other = random_init(model), random_init(model, seed=4)
    for name, tensor in first.items():
        if tensor.dim() == 1:
            assert torch.equal(tensor, torch.ones_like(tensor)), name
        else:
            assert abs(tensor.std().item() / 0.02 - 1) < 0.1, name
            assert not torch.equal(tensor, other[name]), name
    of_a_kind = [t for n, t in first.items() if n.endswith("w1.weight")]
    assert not torch.equal(*of_a_kind)
