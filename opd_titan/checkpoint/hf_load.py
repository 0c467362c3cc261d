"""Weights of a Hugging Face folder, or random ones, into a native model, sharded or not.

No rank holds a full copy of the model: each copies its own slices from the files.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn

from opd_titan.checkpoint.hf_folder import check_unchanged, read_json
from opd_titan.checkpoint.slices import FileSlice, local_slice, open_safetensors, read_slices
from opd_titan.data.files import is_plain_name
from opd_titan.distributed.heartbeat import beat
from opd_titan.errors import ModelError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# By safetensors' names: the dtypes of plain numbers. Others (int8, fp8) need scales.
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

    Under FSDP these are the sharded ones in their own dtype, never a gathered copy (`state_dict`
    reshards first). A tied parameter appears under each of its names.
    """
    return dict(model.state_dict())


def check_hf_weights(
    folder: Path, expected: dict[str, tuple[int, ...]], tied: dict[str, str]
) -> dict[str, Path]:
    """Check that the folder's safetensors hold exactly the model.

    Only headers are read, except that an export of this program is checked against its checksums.

    Args:
        expected: shape of each tensor by its Hugging Face name.
        tied: names that a file may or may not have too, and the expected tensor that each is tied
            to. If a file has it, the two must be equal (this alone reads weights): if they differ,
            transformers 5 unties them and transformers 4 does not.

    Returns:
        The file of each expected tensor.

    Raises:
        ModelError: a tensor is missing, unknown, misshapen or of a dtype that needs scales; or a
            file is missing, truncated or corrupt. The message names the tensor and the file.
    """
    check_unchanged(folder)
    files, headers = _find_tensors(folder)
    source = folder / (SINGLE if (folder / SINGLE).is_file() else INDEX)
    missing = [name for name in expected if name not in files]
    if missing:
        raise ModelError(f"{source}: has no tensor {_and_more(missing)}, which config.json implies")
    wanted = {**expected, **{name: expected[other] for name, other in tied.items()}}
    extra = [n for n in files if n not in wanted and not n.endswith(_IGNORED_SUFFIX)]
    if extra:
        raise ModelError(
            f"{files[extra[0]]}: has a tensor {_and_more(extra)}, which the model that config.json "
            "describes does not have"
        )
    for name in (n for n in wanted if n in files):
        shape, dtype = headers[name]
        if shape != wanted[name]:
            raise ModelError(
                f"{files[name]}: {name} has shape {list(shape)}; config.json implies "
                f"{list(wanted[name])}"
            )
        if dtype not in DTYPES:
            raise ModelError(
                f"{files[name]}: {name} is stored as {dtype}; expected one of "
                f"{', '.join(DTYPES)} (quantized weights are not supported)"
            )
    for name, other in tied.items():
        if name in files:
            _check_equal(files, name, other)
    return {name: files[name] for name in expected}


def stored_dtypes(folder: Path) -> dict[str, torch.dtype]:
    """Return the dtype of each tensor in the folder's safetensors; empty if it has none."""
    if not any((folder / name).is_file() for name in (SINGLE, INDEX)):
        return {}
    return {name: DTYPES[d] for name, (_, d) in _find_tensors(folder)[1].items() if d in DTYPES}


def load_hf_weights(model: nn.Module, files: dict[str, Path], key_table: dict[str, str]) -> None:
    """Copy each tensor, or this rank's slice of it, into the model's parameters, cast to theirs.

    Args:
        model: allocated (not on meta), its parameters plain tensors or DTensors.
        files: the file of each tensor, from `check_hf_weights`.
        key_table: native parameter of each Hugging Face tensor.
    """
    native = native_tensors(model)
    tensors = {hf: native[name] for hf, name in key_table.items() if hf in files}
    stored = {
        hf: [FileSlice(files[hf], (0,) * tensor.dim(), tuple(tensor.shape))]
        for hf, tensor in tensors.items()
    }
    read_slices(tensors, stored)


@torch.no_grad()
def random_init_weights(model: nn.Module, seed: int, std: float) -> None:
    """Draw matrices from normal(0, std) and set vectors (norm weights) to one.

    Each parameter is drawn whole on the CPU from its own generator, keyed by the seed and the
    parameter's name, and then sliced: the same values at any world size and sharding. (Random ops
    on a CPU DTensor draw the same values on every rank.)
    """
    done: set[int] = set()
    for name, tensor in native_tensors(model).items():
        target, offset = local_slice(tensor)
        if target.numel() == 0 or target.data_ptr() in done:
            continue  # no part of it is here, or it is tied and was drawn under its first name
        done.add(target.data_ptr())
        if tensor.dim() == 1:
            target.fill_(1.0)
            continue
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        full = torch.empty(tensor.shape).normal_(0.0, std, generator=generator)
        for dim, (start, size) in enumerate(zip(offset, target.shape, strict=True)):
            full = full.narrow(dim, start, size)
        target.copy_(full)
        beat()


def _find_tensors(
    folder: Path,
) -> tuple[dict[str, Path], dict[str, tuple[tuple[int, ...], str]]]:
    """Return the file, and (shape, dtype name), of each tensor in the folder's safetensors."""
    if (folder / SINGLE).is_file():  # first, as transformers does
        shards, indexed = [folder / SINGLE], None
    elif (folder / INDEX).is_file():
        indexed = _read_index(folder / INDEX)
        shards = [folder / name for name in sorted(set(indexed.values()))]
    else:
        others = [p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern)]
        found = f" (it has {others[0]}, which is not read: convert it)" if others else ""
        raise ModelError(f"{folder}: has neither {SINGLE} nor {INDEX}{found}")
    files: dict[str, Path] = {}
    headers = {}
    for path in shards:
        if not path.is_file():
            raise ModelError(f"{path}: is missing, but {INDEX} names it")
        with open_safetensors(path) as file:
            for name in file.keys():
                if indexed is not None and indexed.get(name) != path.name:
                    place = repr(indexed[name]) if name in indexed else "nowhere"
                    raise ModelError(f"{path}: holds {name}, which {INDEX} places {place}")
                piece = file.get_slice(name)
                files[name] = path
                headers[name] = (tuple(piece.get_shape()), piece.get_dtype())
    for name, shard in (indexed or {}).items():
        if name not in files:
            raise ModelError(f"{folder / shard}: has no tensor {name}, but {INDEX} places it there")
    return files, headers


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


def _check_equal(files: dict[str, Path], name: str, other: str) -> None:
    with open_safetensors(files[name]) as file_a, open_safetensors(files[other]) as file_b:
        a, b = file_a.get_slice(name), file_b.get_slice(other)
        for start in range(0, a.get_shape()[0], _ROWS_PER_COMPARE):
            beat()
            rows = slice(start, start + _ROWS_PER_COMPARE)
            if not torch.equal(a[rows].float(), b[rows].float()):
                raise ModelError(
                    f"{files[name]}: {name} differs from {other}, though config.json has "
                    "tie_word_embeddings true; set it to false, or remove the tensor"
                )


def _and_more(names: list[str]) -> str:
    return names[0] + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")
