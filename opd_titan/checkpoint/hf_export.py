"""Write a native model as a Hugging Face folder that other programs load without changes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from opd_titan.checkpoint.hf_folder import (
    CHECKSUMS,
    CONFIG,
    GENERATION_CONFIG,
    TOKENIZER_FILES,
    read_hf_config,
    read_json,
)
from opd_titan.checkpoint.hf_load import DTYPES, INDEX, native_tensors
from opd_titan.checkpoint.publish import (
    MODEL_CARD,
    discard_tmp,
    fresh_tmp,
    publish,
    tmp_of,
    write_file,
)
from opd_titan.checkpoint.slices import FileSlice, write_tensors
from opd_titan.distributed.agreement import call_on_rank_0
from opd_titan.distributed.heartbeat import beat
from opd_titan.errors import ModelError, StorageError

_DTYPE_KEYS = ("dtype", "torch_dtype")  # transformers 5, transformers 4


@torch.no_grad()
def export_hf(
    model: nn.Module,
    out: Path,
    *,
    source_folder: Path,
    stored: Mapping[str, FileSlice] | None,
    key_table: dict[str, str],
    dtype: torch.dtype | None,
    card: str,
    edits: Mapping[str, dict[str, Any]] = MappingProxyType({}),
    max_shard_bytes: int = 4 * 1024**3,
) -> None:
    """Write weights, config, generation config, tokenizer and model card to `out`. All ranks call.

    Parameters are gathered one at a time, and rank 0 keeps one file's worth of them. The folder
    is complete or absent; an older `out` is replaced when the new one is complete. It contains
    the checksums of its files.

    Args:
        source_folder: the folder the model came from; its JSON files are copied.
        stored: the tensors that the model was loaded from; None if its weights were random.
        key_table: native parameter of each Hugging Face tensor, without a tied head.
        dtype: of the written tensors; None for the dtypes of `stored`, or the source config's.
        card: text of README.md.
        edits: by name of a JSON file, new values of some of its keys.
        max_shard_bytes: the largest size of a file with more than one tensor.

    Raises:
        StorageError: on all ranks; a file could not be written, or a source file not read.
            Nothing of this export remains.
    """
    native, tmp = native_tensors(model), tmp_of(out)
    tensors = {hf: native[name] for hf, name in key_table.items()}

    def begin() -> tuple[dict[str, Any], dict[str, torch.dtype]]:
        fresh_tmp(out)
        config = read_hf_config(source_folder)
        if dtype is None and stored is not None:
            dtypes = {hf: DTYPES[stored[hf].dtype] for hf in tensors}
        else:
            only = dtype or _config_dtype(config) or next(iter(tensors.values())).dtype
            dtypes = dict.fromkeys(tensors, only)
        sizes: Counter[torch.dtype] = Counter()
        for hf, tensor in tensors.items():
            sizes[dtypes[hf]] += tensor.numel()
        ((most_weights, _),) = sizes.most_common(1)
        # Both versions of transformers read the old key.
        keys = [k for k in _DTYPE_KEYS if k in config] or ["torch_dtype"]
        config |= dict.fromkeys(keys, str(most_weights).removeprefix("torch."))
        return config, dtypes

    def complete() -> None:
        write_file(tmp / MODEL_CARD, card)
        _write_json(tmp / CONFIG, {**config, **edits.get(CONFIG, {})})
        _copy_files(source_folder, tmp, edits)
        if plan.is_sharded:
            index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
            _write_json(tmp / INDEX, index)
        publish(out, CHECKSUMS)

    try:
        config, dtypes = call_on_rank_0(begin)
        plan = _write_weights(tmp, tensors, dtypes, max_shard_bytes)
        call_on_rank_0(complete)
    # A ModelError here is a fault too: the source was valid when the run began.
    except (StorageError, ModelError) as error:
        call_on_rank_0(lambda: discard_tmp(out))
        raise StorageError(f"export {out} not written: {error}") from error


def is_exported(out: Path) -> bool:
    """Return whether rank 0 sees an export at `out`. All ranks call."""
    return call_on_rank_0((out / CONFIG).is_file)


def _write_weights(
    folder: Path,
    tensors: dict[str, Tensor],
    dtypes: dict[str, torch.dtype],
    max_shard_bytes: int,
) -> StateDictSplit:
    """Gather and write the tensors, one file after another. All ranks call."""
    plan = split_state_dict_into_shards_factory(
        {name: tensor.numel() * dtypes[name].itemsize for name, tensor in tensors.items()},
        get_storage_size=int,  # the values are sizes
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    keeps = not dist.is_initialized() or dist.get_rank() == 0
    for file_name, names in plan.filename_to_tensors.items():
        content = {}
        for name in names:
            tensor = _gather(tensors[name], dtypes[name])
            beat()
            if keeps:
                content[name] = tensor
        # Checked after each file: after a fault the ranks need not gather the rest.
        call_on_rank_0(partial(write_tensors, folder / file_name, content))
        beat()
    return plan


def _copy_files(source: Path, target: Path, edits: Mapping[str, dict[str, Any]]) -> None:
    for name in (GENERATION_CONFIG, *TOKENIZER_FILES):
        if not (source / name).is_file():
            continue
        if name in edits:
            _write_json(target / name, {**read_json(source / name), **edits[name]})
        else:
            write_file(target / name, (source / name).read_bytes())  # the hub's cache has symlinks


def _config_dtype(config: dict[str, Any]) -> torch.dtype | None:
    name = next((str(config[k]) for k in _DTYPE_KEYS if config.get(k)), "")
    found = getattr(torch, name.removeprefix("torch."), None)
    return found if isinstance(found, torch.dtype) else None


def _gather(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the whole tensor on the CPU, cast before it is sent."""
    tensor = tensor.to(dtype)
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.cpu().contiguous()


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_file(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
