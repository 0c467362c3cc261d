"""Load the weights of a Hugging Face folder, or random ones, into a model, sharded or not.

No rank holds a full copy of the model: each copies its own slices from the files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from opd_titan.checkpoint.hf_folder import check_unchanged, read_json
from opd_titan.checkpoint.slices import (
    FileSlice,
    local_slice,
    open_safetensors,
    part_of,
    read_header,
    read_slices,
)
from opd_titan.data.files import is_plain_name
from opd_titan.distributed.heartbeat import beat
from opd_titan.errors import ModelError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Dtypes of plain numbers, by safetensors' names. Others (int8, fp8) need scales.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
# Old versions of transformers saved these tables; they follow from the config.
_IGNORED_SUFFIX = "rotary_emb.inv_freq"
_ROWS_PER_COMPARE = 8192


def native_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's parameters by name, detached but sharing their storage.

    Under FSDP these are the shards in their own dtype, never a gathered copy (`state_dict` reshards
    first). A tied parameter appears under each of its names.
    """
    return dict(model.state_dict())


def check_hf_weights(
    folder: Path, expected: dict[str, tuple[int, ...]], tied: dict[str, str]
) -> dict[str, FileSlice]:
    """Check that the folder's safetensors contain exactly the model's tensors.

    Only headers are read, except in an export of this program: its checksums cover all bytes.

    Args:
        expected: shape of each tensor by its Hugging Face name.
        tied: optional tensors, and the expected tensor that each is tied to. If a file has one,
            the two must be equal (only this check reads weights): if they differ, transformers 5
            unties them and transformers 4 does not.

    Returns:
        Where each expected tensor is stored.

    Raises:
        ModelError: a tensor is missing, unknown, misshapen or of a dtype that needs scales; or a
            file is missing, truncated or corrupt. The message names the tensor and the file.
    """
    check_unchanged(folder)
    stored = _find_tensors(folder)
    source = folder / (SINGLE if (folder / SINGLE).is_file() else INDEX)
    missing = [name for name in expected if name not in stored]
    if missing:
        raise ModelError(f"{source}: has no tensor {_and_more(missing)}, which config.json implies")
    wanted = {**expected, **{name: expected[other] for name, other in tied.items()}}
    extra = [n for n in stored if n not in wanted and not n.endswith(_IGNORED_SUFFIX)]
    if extra:
        raise ModelError(
            f"{stored[extra[0]].path}: has a tensor {_and_more(extra)}, which the model that "
            "config.json describes does not have"
        )
    for name in (n for n in wanted if n in stored):
        part = stored[name]
        if part.shape != wanted[name]:
            raise ModelError(
                f"{part.path}: {name} has shape {list(part.shape)}; config.json implies "
                f"{list(wanted[name])}"
            )
        if part.dtype not in DTYPES:
            raise ModelError(
                f"{part.path}: {name} is stored as {part.dtype}; expected one of "
                f"{', '.join(DTYPES)} (quantized weights are not supported)"
            )
    for name, other in tied.items():
        if name in stored:
            _check_equal(stored[name], stored[other])
    return {name: stored[name] for name in expected}


def load_hf_weights(
    model: nn.Module, stored: Mapping[str, FileSlice], key_table: dict[str, str]
) -> None:
    """Copy each tensor, or this rank's slice of it, into the model's parameters, in their dtype.

    Args:
        model: allocated (not on meta), its parameters plain tensors or DTensors.
        stored: from `check_hf_weights`.
        key_table: native parameter of each Hugging Face tensor.
    """
    native = native_tensors(model)
    tensors = {hf: native[name] for hf, name in key_table.items() if hf in stored}
    read_slices(tensors, {hf: [stored[hf]] for hf in tensors})


@torch.no_grad()
def random_init_weights(model: nn.Module, seed: int, std: float) -> None:
    """Draw matrices from normal(0, std) and set vectors (norm weights) to one.

    Each parameter is drawn whole on the CPU from its own generator, keyed by the seed and the
    parameter's name, and then sliced. So the values are the same at any world size and sharding.
    (Random ops on a CPU DTensor draw the same values on every rank.)
    """
    done: set[int] = set()
    for name, tensor in native_tensors(model).items():
        target, box = local_slice(tensor)
        if target.numel() == 0 or target.data_ptr() in done:
            continue  # no part of it is here, or it is tied and was drawn under its first name
        done.add(target.data_ptr())
        if tensor.dim() == 1:
            target.fill_(1.0)
            continue
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        full = torch.empty(tensor.shape).normal_(0.0, std, generator=generator)
        target.copy_(part_of(full, box))
        beat()


def _find_tensors(folder: Path) -> dict[str, FileSlice]:
    """Return where each tensor of the folder is stored.

    Raises:
        ModelError: a file is missing or corrupt, or the index does not match the files.
    """
    if (folder / SINGLE).is_file():  # first, as transformers does
        return read_header(folder / SINGLE)
    if not (folder / INDEX).is_file():
        others = [p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern)]
        found = f" (it has {others[0]}, which is not read: convert it)" if others else ""
        raise ModelError(f"{folder}: has neither {SINGLE} nor {INDEX}{found}")
    indexed = _read_index(folder / INDEX)
    stored: dict[str, FileSlice] = {}
    for path in [folder / name for name in sorted(set(indexed.values()))]:
        if not path.is_file():
            raise ModelError(f"{path}: is missing, but {INDEX} names it")
        header = read_header(path)
        for name in header:
            if indexed.get(name) != path.name:
                place = repr(indexed[name]) if name in indexed else "nowhere"
                raise ModelError(f"{path}: contains {name}, which {INDEX} places {place}")
        stored |= header
    for name, shard in indexed.items():
        if name not in stored:
            raise ModelError(f"{folder / shard}: has no tensor {name}, but {INDEX} places it there")
    return stored


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{path}: weight_map is missing or empty; expected tensor -> file")
    for name, shard in weight_map.items():
        if not is_plain_name(shard):
            raise ModelError(
                f"{path}: {name} is placed in {shard!r}; expected the name of a file beside it"
            )
    return weight_map


def _check_equal(tied: FileSlice, other: FileSlice) -> None:
    with open_safetensors(tied.path) as file_a, open_safetensors(other.path) as file_b:
        a, b = file_a.get_slice(tied.key), file_b.get_slice(other.key)
        for start in range(0, tied.shape[0], _ROWS_PER_COMPARE):
            beat()
            rows = slice(start, start + _ROWS_PER_COMPARE)
            if not torch.equal(a[rows].float(), b[rows].float()):
                raise ModelError(
                    f"{tied.path}: {tied.key} differs from {other.key}, though config.json has "
                    "tie_word_embeddings true; set it to false, or remove the tensor"
                )


def _and_more(names: list[str]) -> str:
    return names[0] + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")
