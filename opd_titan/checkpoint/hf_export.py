"""Write a native model as a Hugging Face folder that loads as it stands."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from opd_titan.checkpoint.hf_folder import (
    CONFIG,
    GENERATION_CONFIG,
    TOKENIZER_FILES,
    read_hf_config,
)
from opd_titan.checkpoint.hf_load import INDEX, SINGLE, native_tensors, stored_dtypes

_DTYPE_KEYS = ("dtype", "torch_dtype")  # transformers 5, transformers 4


@torch.no_grad()
def export_hf(
    model: nn.Module,
    out: Path,
    *,
    source_folder: Path,
    key_table: dict[str, str],
    dtype: torch.dtype | None,
    tokenizer_folder: Path | None = None,
    card: str,
    max_shard_bytes: int = 4 * 1024**3,
) -> None:
    """Write weights, config, generation config, tokenizer and model card to `out`. Collective.

    Parameters are gathered one at a time and rank 0 keeps one file's worth of them. The folder
    is complete or absent: it is written as `<out>.tmp` and renamed; an older `out` is replaced.

    Args:
        source_folder: the folder the model came from; its JSON files are copied.
        key_table: native parameter of each Hugging Face tensor. A tied head is not in it.
        dtype: of the written tensors; None keeps that of each tensor in `source_folder`, or of
            its config where it has no weights.
        tokenizer_folder: where the tokenizer's files are; None is `source_folder`.
        card: text of README.md.
        max_shard_bytes: a file holds no more than this, or else a single tensor.
    """
    config = read_hf_config(source_folder)
    tensors = native_tensors(model)
    dtypes = _plan_dtypes(tensors, key_table, dtype, source_folder, config)
    shards = _plan_shards(tensors, key_table, dtypes, max_shard_bytes)
    writes = not dist.is_initialized() or dist.get_rank() == 0
    tmp = out.with_name(out.name + ".tmp")
    if writes:
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(parents=True)
    for file_name, names in shards.items():
        content = {}
        for name in names:
            tensor = _gather(tensors[key_table[name]], dtypes[name])
            if writes:
                content[name] = tensor
        if writes:
            save_file(content, tmp / file_name, metadata={"format": "pt"})
    if writes:
        _write_index(tmp, shards, tensors, key_table, dtypes)
        _write_json(tmp / CONFIG, _with_dtype(config, tensors, key_table, dtypes))
        _copy_files(source_folder, tmp, (GENERATION_CONFIG,))
        _copy_files(tokenizer_folder or source_folder, tmp, TOKENIZER_FILES)
        (tmp / "README.md").write_text(card, encoding="utf-8")
        for file_name in shards:  # safetensors creates its files for their owner alone
            shutil.copymode(tmp / CONFIG, tmp / file_name)
        _publish(tmp, out)
    if dist.is_initialized():
        dist.barrier()


def _plan_dtypes(
    tensors: dict[str, Tensor],
    key_table: dict[str, str],
    dtype: torch.dtype | None,
    source_folder: Path,
    config: dict[str, Any],
) -> dict[str, torch.dtype]:
    if dtype is not None:
        return dict.fromkeys(key_table, dtype)
    stored = stored_dtypes(source_folder)
    name = next((str(config[k]) for k in _DTYPE_KEYS if config.get(k)), "")
    fallback = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(fallback, torch.dtype):
        fallback = next(iter(tensors.values())).dtype
    return {hf: stored.get(hf, fallback) for hf in key_table}


def _plan_shards(
    tensors: dict[str, Tensor],
    key_table: dict[str, str],
    dtypes: dict[str, torch.dtype],
    max_shard_bytes: int,
) -> dict[str, list[str]]:
    """Tensor names of each file, filled in the table's order."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, native in key_table.items():
        n_bytes = tensors[native].numel() * dtypes[name].itemsize
        if groups[-1] and size + n_bytes > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += n_bytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    n = len(groups)
    return {f"model-{i:05d}-of-{n:05d}.safetensors": g for i, g in enumerate(groups, start=1)}


def _gather(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The whole tensor on the CPU, cast before it travels."""
    tensor = tensor.to(dtype)
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.cpu().contiguous()


def _write_index(
    folder: Path,
    shards: dict[str, list[str]],
    tensors: dict[str, Tensor],
    key_table: dict[str, str],
    dtypes: dict[str, torch.dtype],
) -> None:
    if len(shards) == 1:
        return
    sizes = [tensors[native].numel() * dtypes[hf].itemsize for hf, native in key_table.items()]
    weight_map = {name: file for file, names in shards.items() for name in names}
    _write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map})


def _with_dtype(
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    key_table: dict[str, str],
    dtypes: dict[str, torch.dtype],
) -> dict[str, Any]:
    """The config with its dtype set to that of most weights, under the key that it had."""
    counts: Counter[torch.dtype] = Counter()
    for name, native in key_table.items():
        counts[dtypes[name]] += tensors[native].numel()
    value = str(counts.most_common(1)[0][0]).removeprefix("torch.")
    # Both versions of transformers read the old key; neither key in the source is rare.
    keys = [k for k in _DTYPE_KEYS if k in config] or ["torch_dtype"]
    return {**config, **dict.fromkeys(keys, value)}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _copy_files(source: Path, target: Path, names: tuple[str, ...]) -> None:
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)  # the content: hub caches hold links


def _publish(tmp: Path, out: Path) -> None:
    """Put `tmp` in the place of `out`, after its bytes are on the disk."""
    for path in [*tmp.iterdir(), tmp]:
        _fsync(path)
    old = out.with_name(out.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    tmp.rename(out)
    _fsync(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
