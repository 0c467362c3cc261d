"""Write a native model as a Hugging Face folder that loads as it stands."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from opd_titan.checkpoint.hf_folder import (
    CONFIG,
    GENERATION_CONFIG,
    TOKENIZER_FILES,
    read_hf_config,
)
from opd_titan.checkpoint.hf_load import INDEX, native_tensors, stored_dtypes
from opd_titan.checkpoint.publish import fresh_tmp, publish

_DTYPE_KEYS = ("dtype", "torch_dtype")  # transformers 5, transformers 4


@torch.no_grad()
def export_hf(
    model: nn.Module,
    out: Path,
    *,
    source_folder: Path,
    key_table: dict[str, str],
    dtype: torch.dtype | None,
    card: str,
    max_shard_bytes: int = 4 * 1024**3,
) -> None:
    """Write weights, config, generation config, tokenizer and model card to `out`. Collective.

    Parameters are gathered one at a time and rank 0 keeps one file's worth of them. The folder
    is complete or absent; an older `out` is replaced.

    Args:
        source_folder: the folder the model came from; its JSON files are copied.
        key_table: native parameter of each Hugging Face tensor. A tied head is not in it.
        dtype: of the written tensors; None keeps that of each tensor in `source_folder`, or of
            its config where it has no weights.
        card: text of README.md.
        max_shard_bytes: a file holds no more than this, or else a single tensor.
    """
    config = read_hf_config(source_folder)
    native = native_tensors(model)
    tensors = {hf: native[name] for hf, name in key_table.items()}
    dtypes = dict.fromkeys(tensors, dtype) if dtype else _own_dtypes(tensors, source_folder, config)
    plan = split_state_dict_into_shards_factory(
        {name: tensor.numel() * dtypes[name].itemsize for name, tensor in tensors.items()},
        get_storage_size=int,  # they are sizes already
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    writes = not dist.is_initialized() or dist.get_rank() == 0
    tmp = fresh_tmp(out) if writes else out
    for file_name, names in plan.filename_to_tensors.items():
        content = {}
        for name in names:
            tensor = _gather(tensors[name], dtypes[name])
            if writes:
                content[name] = tensor
        if writes:
            save_file(content, tmp / file_name, metadata={"format": "pt"})
    if writes:
        if plan.is_sharded:
            index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
            _write_json(tmp / INDEX, index)
        _write_json(tmp / CONFIG, _with_dtype(config, tensors, dtypes))
        for name in (GENERATION_CONFIG, *TOKENIZER_FILES):
            if (source_folder / name).is_file():
                shutil.copyfile(source_folder / name, tmp / name)  # hub caches hold links
        (tmp / "README.md").write_text(card, encoding="utf-8")
        for file_name in plan.filename_to_tensors:  # safetensors lets only their owner read them
            shutil.copymode(tmp / CONFIG, tmp / file_name)
        publish(tmp, out)
    if dist.is_initialized():
        dist.barrier()


def _own_dtypes(
    tensors: dict[str, Tensor], source_folder: Path, config: dict[str, Any]
) -> dict[str, torch.dtype]:
    """Each tensor's dtype in the source, else the dtype in its config, else the model's."""
    stored = stored_dtypes(source_folder)
    name = next((str(config[k]) for k in _DTYPE_KEYS if config.get(k)), "")
    fallback = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(fallback, torch.dtype):
        fallback = next(iter(tensors.values())).dtype
    return {hf: stored.get(hf, fallback) for hf in tensors}


def _gather(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The whole tensor on the CPU, cast before it travels."""
    tensor = tensor.to(dtype)
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.cpu().contiguous()


def _with_dtype(
    config: dict[str, Any], tensors: dict[str, Tensor], dtypes: dict[str, torch.dtype]
) -> dict[str, Any]:
    """The config with its dtype set to that of most weights, under the key that it had."""
    counts: Counter[torch.dtype] = Counter()
    for name, tensor in tensors.items():
        counts[dtypes[name]] += tensor.numel()
    value = str(counts.most_common(1)[0][0]).removeprefix("torch.")
    # Both versions of transformers read the old key; neither key in the source is rare.
    keys = [k for k in _DTYPE_KEYS if k in config] or ["torch_dtype"]
    return {**config, **dict.fromkeys(keys, value)}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
