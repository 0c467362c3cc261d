"""Hugging Face folders in and out: what is loaded, what is refused, what is written.

Spawned processes import this module, so what is slow to import (transformers) waits for its use.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_utils import run_distributed
from full_disk import largest_file
from safetensors.torch import load_file, save_file
from test_model import BASE, packed_logits, random_sequences
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
from opd_titan.checkpoint.hf_folder import (
    TOKENIZER_FILES,
    read_hf_config,
)
from opd_titan.checkpoint.hf_load import (
    INDEX,
    SINGLE,
    check_hf_weights,
    load_hf_weights,
    native_tensors,
    random_init_weights,
)
from opd_titan.distributed.world import build_world
from opd_titan.errors import ModelError, StorageError
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


def inspect(folder: Path) -> tuple[Any, Any, dict[str, str], dict[str, Path]]:
    """Family, args, key table and checked files of a folder."""
    config = read_hf_config(folder)
    family = get_family(config, str(folder))
    args = family.args_from_hf_config(config, str(folder))
    table = family.hf_to_native(args.n_layers, args.tied)
    with torch.device("meta"):
        model = family.build(args)
    expected = {hf: tuple(model.get_parameter(native).shape) for hf, native in table.items()}
    files = check_hf_weights(folder, expected, TIED if args.tied else {})
    return family, args, table, files


def load_plain(folder: Path) -> tuple[Qwen3Model, dict[str, str]]:
    family, args, table, files = inspect(folder)
    model = family.build(args)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(torch.nan)
    load_hf_weights(model, files, table)
    return model, table


def build_sharded(
    folder: Path, degrees: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> tuple[Qwen3Model, dict[str, str], dict[str, Path]]:
    """As the trainer does: meta, shard, materialise. Filled with NaN, not with luck."""
    family, args, table, files = inspect(folder)
    with torch.device("meta"):
        model = family.build(args)
    family.parallelize(model, build_world(torch.device("cpu"), *degrees), dtype)
    model.to_empty(device="cpu")
    for tensor in native_tensors(model).values():
        tensor.to_local().fill_(torch.nan)
    return model, table, files


def stored(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder; none may be in two files."""
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


@pytest.fixture
def world_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


SOURCES: dict[str, dict[str, Any]] = {
    "single": {},
    "single_bf16": dict(dtype=torch.bfloat16),
    "sharded": dict(sharded=True),
    "sharded_tied_bf16": dict(sharded=True, tied=True, dtype=torch.bfloat16),
    "tied": dict(tied=True),
    "tied_with_head": dict(tied=True, ship_head=True),
}


@pytest.mark.parametrize("name", SOURCES)
def test_load_and_export_give_back_the_checkpoint(name: str, tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", **SOURCES[name])
    assert (source / INDEX).is_file() == ("sharded" in name)
    model, table = load_plain(source)
    theirs = load_theirs(source, dtype=torch.float32)
    for hf, native in table.items():
        assert torch.equal(model.get_parameter(native), theirs.get_parameter(hf)), hf

    out = tmp_path / "out"
    limit = 20_000 if "sharded" in name else 4 * 1024**3
    export_hf(
        model,
        out,
        source_folder=source,
        key_table=table,
        dtype=None,
        card=CARD,
        max_shard_bytes=limit,
    )
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


@pytest.mark.parametrize("name", ["sharded", "tied_with_head", "sharded_tied_bf16"])
@torch.no_grad()
def test_transformers_loads_the_export_as_it_stands(name: str, tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", **SOURCES[name])
    model, table = load_plain(source)
    out = tmp_path / "out"
    options = dict(source_folder=source, key_table=table, dtype=None, card=CARD)
    export_hf(model, out, **options, max_shard_bytes=20_000)
    before = load_theirs(source)
    after, info = load_theirs(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert after.dtype == before.dtype
    tokens = random_sequences(37, [20])[0]
    assert torch.equal(before(tokens[None]).logits, after(tokens[None]).logits)
    text = "w5 w9 w2"
    assert load_tokenizer(out)(text).input_ids == [5, 9, 2]
    ours = packed_logits(model, [tokens])
    assert torch.allclose(ours, after.float()(tokens[None]).logits[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_config_says_the_dtype_that_is_written(key: str, tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    config = read_hf_config(source)
    config.pop("dtype", None)
    (source / "config.json").write_text(json.dumps({**config, key: "float32"}))
    model, table = load_plain(source)
    out = tmp_path / "out"
    export_hf(model, out, source_folder=source, key_table=table, dtype=torch.bfloat16, card=CARD)
    assert read_hf_config(out) == {**config, key: "bfloat16"}
    assert_same_tensors(stored(out), {n: t.bfloat16() for n, t in stored(source).items()})
    assert load_theirs(out).dtype == torch.bfloat16


def test_auto_dtype_is_the_sources_tensor_by_tensor_or_its_configs(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", dtype=torch.bfloat16)
    mixed = stored(source)
    mixed["model.norm.weight"] = mixed["model.norm.weight"].float()
    save_file(mixed, source / SINGLE, metadata={"format": "pt"})
    model, table = load_plain(source)
    options = dict(source_folder=source, key_table=table, dtype=None, card=CARD)
    export_hf(model, tmp_path / "a", **options)
    assert_same_tensors(stored(tmp_path / "a"), mixed)
    assert read_hf_config(tmp_path / "a")["dtype"] == "bfloat16"
    (source / SINGLE).unlink()  # as under random_init, where there may be no weights
    export_hf(model, tmp_path / "b", **options)
    assert {t.dtype for t in stored(tmp_path / "b").values()} == {torch.bfloat16}


def test_export_replaces_what_is_there_and_survives_a_full_disk(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    model, table = load_plain(source)
    out, tmp = tmp_path / "hf" / "step-1", tmp_path / "hf" / "step-1.tmp"
    for folder in (out, tmp):  # an older export, and what a killed run left
        folder.mkdir(parents=True)
        (folder / "stale.safetensors").write_text("")
    options = dict(source_folder=source, key_table=table, dtype=None, card=CARD)

    with largest_file(1000):
        with pytest.raises(StorageError, match="step-1.tmp/model.safetensors: File too large"):
            export_hf(model, out, **options)
    assert [p.name for p in out.parent.iterdir()] == ["step-1"]
    assert [p.name for p in out.iterdir()] == ["stale.safetensors"]
    export_hf(model, out, **options)
    assert_same_tensors(stored(out), stored(source))
    assert [p.name for p in out.parent.iterdir()] == ["step-1"]


def test_export_writes_the_master_weights_after_a_bf16_forward(
    world_of_one: None, tmp_path: Path
) -> None:
    """After a forward the root stays gathered, in the compute dtype: that must not be exported."""
    source = make_source(tmp_path / "source", tied=True)
    model, table, files = build_sharded(source, (1,), torch.bfloat16)
    load_hf_weights(model, files, table)
    with torch.no_grad():
        packed_logits(model, random_sequences(37, [5]))
    out = tmp_path / "out"
    export_hf(model, out, source_folder=source, key_table=table, dtype=None, card=CARD)
    assert_same_tensors(stored(out), stored(source))
    assert model.lm_head.weight is model.tok_embeddings.weight
    load_hf_weights(model, files, table)  # and a reload fills what the next forward uses
    after = packed_logits(model, random_sequences(37, [5]))
    assert torch.isfinite(after).all()


def test_real_qwen3_tokenizer_survives_export(shared_data: Path, tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    real, out = shared_data / "qwen3_tokenizer", tmp_path / "out"
    for path in real.iterdir():
        if path.name in TOKENIZER_FILES:
            shutil.copy(path, source)
    model, table = load_plain(source)
    export_hf(model, out, source_folder=source, key_table=table, dtype=None, card=CARD)
    a, b = load_tokenizer(real), load_tokenizer(out)
    messages = [{"role": "user", "content": "2 + 2 = 4, isn't it?"}]
    options = dict(tokenize=False, add_generation_prompt=True)
    assert a.apply_chat_template(messages, **options) == b.apply_chat_template(messages, **options)
    assert a.get_vocab() == b.get_vocab()


# Several processes


def _load_and_export(sources: list[Path], out: Path, degrees: tuple[int, ...]) -> int:
    """Load each folder into shards, check them against the files, export them again."""
    n_checked = 0
    for i, source in enumerate(sources):
        model, table, files = build_sharded(source, degrees)
        load_hf_weights(model, files, table)
        truth, tensors = stored(source), native_tensors(model)
        for hf, native in table.items():
            assert isinstance(tensors[native], DTensor)
            assert torch.equal(tensors[native].full_tensor(), truth[hf].float()), hf
            n_checked += 1
        assert model.lm_head.weight is model.tok_embeddings.weight or not model.args.tied
        options = dict(source_folder=source, key_table=table, dtype=None, card=CARD)
        export_hf(model, out / str(i), **options, max_shard_bytes=20_000)
        assert (out / str(i) / "config.json").is_file()  # on every rank, on return
    return n_checked


def _random_inits(sources: list[Path], degrees: tuple[int, ...]) -> list[dict[str, Tensor]]:
    return [_random_init(source, degrees) for source in sources]


def _random_init(source: Path, degrees: tuple[int, ...] | None) -> dict[str, Tensor]:
    if degrees is None:
        model, _ = load_plain(source)
    else:
        model, _, _ = build_sharded(source, degrees)
    random_init_weights(model, seed=3, std=0.02)
    tensors = native_tensors(model)
    full = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in tensors.items()}
    # Pickled, a Parameter would take its storage with it.
    return {n: t.detach().clone() for n, t in full.items()}


@pytest.mark.slow
def test_two_processes_load_and_export_uneven_shards(tmp_path: Path) -> None:
    names = ["sharded", "sharded_tied_bf16", "tied_with_head"]
    sources = [make_source(tmp_path / name, **SOURCES[name]) for name in names]
    counts = run_distributed(_load_and_export, 2, sources, tmp_path / "out", (1, 2))
    assert counts[0] == counts[1] > 60
    for i, source in enumerate(sources):
        truth = stored(source)
        if read_hf_config(source)["tie_word_embeddings"]:
            truth.pop("lm_head.weight", None)
        assert_same_tensors(stored(tmp_path / "out" / str(i)), truth)
        load_theirs(tmp_path / "out" / str(i))


def _world_of_four(source: Path, even: Path, out: Path, file: Path) -> None:
    _load_and_export([source], out / "shard", (1, 4))
    _load_and_export([source], out / "replicate_shard", (2, 2))
    # 19 rows of the vocabulary on each of two ranks, cut into 10 and 9 by FSDP.
    _load_and_export([even], out / "shard_tensor", (1, 2, 2))
    _load_and_export([even], out / "replicate_tensor", (2, 1, 2))
    # FSDP over tensor parallelism: the first placement is a strided shard.
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = nn.Sequential(nn.Linear(12, 20, bias=False), nn.Linear(20, 12, bias=False))
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    table = {"0.weight": "0.weight", "1.weight": "1.weight"}
    load_hf_weights(model, dict.fromkeys(table, file), table)
    for name, truth in load_file(file).items():
        assert torch.equal(native_tensors(model)[name].full_tensor(), truth), name


@pytest.mark.slow
def test_four_processes_with_empty_shards_replicas_and_tensor_parallel(tmp_path: Path) -> None:
    # Five rows on four ranks: 2, 2, 1 and none.
    source = make_source(tmp_path / "source", hidden_size=5, tied=True)
    file = tmp_path / SINGLE
    save_file({"0.weight": torch.randn(20, 12), "1.weight": torch.randn(12, 20)}, file)
    even = make_source(tmp_path / "even", vocab_size=38, tied=True, sharded=True)
    run_distributed(_world_of_four, 4, source, even, tmp_path, file)
    for mesh in ("shard", "replicate_shard"):
        assert_same_tensors(stored(tmp_path / mesh / "0"), stored(source))
    for mesh in ("shard_tensor", "replicate_tensor"):
        assert_same_tensors(stored(tmp_path / mesh / "0"), stored(even))


@pytest.mark.slow
def test_random_init_does_not_depend_on_the_world(tmp_path: Path) -> None:
    sources = [make_source(tmp_path / str(tied), tied=tied) for tied in (False, True)]
    plain = [_random_init(source, None) for source in sources]
    for rank in run_distributed(_random_inits, 2, sources, (1, 2)):
        for sharded, whole in zip(rank, plain, strict=True):
            assert_same_tensors(sharded, whole)
    assert torch.equal(plain[1]["lm_head.weight"], plain[1]["tok_embeddings.weight"])


def test_random_init_draws_each_matrix_from_seed_and_name(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    first = _random_init(source, None)
    other, _ = load_plain(source)
    random_init_weights(other, seed=4, std=0.02)
    for name, tensor in first.items():
        if tensor.dim() == 1:
            assert torch.equal(tensor, torch.ones_like(tensor)), name
        else:
            assert abs(tensor.std().item() / 0.02 - 1) < 0.1, name
            assert not torch.equal(tensor, native_tensors(other)[name]), name
    of_a_kind = [t for n, t in first.items() if n.endswith("w1.weight")]
    assert not torch.equal(*of_a_kind)


def test_a_childs_error_reaches_the_test() -> None:
    with pytest.raises(ModelError, match="config.json: is missing"):
        run_distributed(inspect, 1, Path("nowhere"))
