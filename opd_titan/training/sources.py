"""Inspect the models of a job without reading weights: sizes, tokenizers, names of weight files."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from opd_titan.checkpoint.hf_folder import (
    CONFIG,
    GENERATION_CONFIG,
    HUB_FILES,
    eos_token_ids,
    read_hf_config,
    resolve_model_folder,
)
from opd_titan.checkpoint.hf_load import check_hf_weights
from opd_titan.checkpoint.slices import FileSlice
from opd_titan.config.resolve import ModelSpec, ResolvedJob
from opd_titan.data.tokenizer import check_tokenizer_fits, compare_tokenizers, load_tokenizer
from opd_titan.distributed.heartbeat import set_phase
from opd_titan.distributed.world import Axis
from opd_titan.errors import ModelError, first_line
from opd_titan.models import ModelFamily, get_family
from opd_titan.models.transforms import apply_compile

_MOST_LAYERS = 1000
_LARGEST_SIZE = 2**20


@dataclass(frozen=True)
class ModelShape:
    """The architecture of a model, from its `config.json`.

    Attributes:
        args: the model's sizes, in the dataclass of its family.
    """

    spec: ModelSpec
    folder: Path
    family: ModelFamily
    args: Any

    @property
    def role(self) -> str:
        return self.spec.role

    def build(self) -> nn.Module:
        """Return the module, without storage if under `torch.device("meta")`."""
        return self.family.build(self.args)

    def build_share(self, tp: Axis, compile: bool) -> nn.Module:
        """Return the module of one tensor-parallel rank, with its collectives, for rollouts."""
        model = self.family.build(self.family.rank_args(self.args, tp.size, str(self.folder)))
        if tp.size > 1:
            self.family.join_ranks(model, tp, sequence_parallel=False)
        if compile:
            apply_compile(model.get_submodule("layers").children())
        return model


@dataclass(frozen=True)
class ModelSource(ModelShape):
    """A model that has been checked, before its weights are read.

    Attributes:
        key_table: the native name of each Hugging Face tensor.
        files: where each tensor is stored; None for random weights.
        edits: by name of a JSON file, new values of some of its keys, for exports.
    """

    tokenizer: PreTrainedTokenizerBase
    eos_ids: set[int]
    key_table: dict[str, str]
    files: dict[str, FileSlice] | None
    edits: dict[str, dict[str, Any]] = field(default_factory=dict)


def inspect_shape(
    spec: ModelSpec, tensor_parallel: int, files: Sequence[str] = HUB_FILES
) -> ModelShape:
    """Read and check `config.json` alone.

    Args:
        files: patterns of the files to download if the path is a hub id.

    Raises:
        ModelError: the file is missing, unsound or unsupported.
    """
    folder = resolve_model_folder(spec.path, spec.key, files)
    where = str(folder / CONFIG)
    with _name_odd_values(where):
        config = read_hf_config(folder)
        family = get_family(config, where)
        args = family.args_from_hf_config(config, where)
        family.rank_args(args, tensor_parallel, where)
        _check_plausible(args, where)
    return ModelShape(spec, folder, family, args)


def _check_plausible(args: Any, where: str) -> None:
    """Raise if a size is implausible: the names of 1e9 layers alone would fill the memory."""
    for size in fields(args):
        value, most = getattr(args, size.name), float(_LARGEST_SIZE)
        if size.name == "n_layers":
            most = _MOST_LAYERS
        elif size.name == "max_seq_len" or size.type in ("float", float):
            most = sys.float_info.max  # any finite number
        if not value <= most:
            raise ModelError(f"{where}: {size.name} is {value}; wanted at most {most}")


@contextmanager
def _name_odd_values(where: str) -> Iterator[None]:
    """Raise ModelError for the errors of parsing code on unexpected JSON values.

    The body must only parse: the error blames the file for anything that fails inside.
    """
    try:
        yield
    except (AttributeError, LookupError, OverflowError, RecursionError, TypeError, ValueError) as e:
        raise ModelError(
            f"{where}: contains a value that no model has ({type(e).__name__}: {first_line(e)}); "
            "wanted the file that transformers saved"
        ) from e


def inspect_model(spec: ModelSpec, tensor_parallel: int) -> ModelSource:
    """Read and check everything about a model except its weights.

    Raises:
        ModelError: the model cannot be used.
    """
    set_phase(f"the check of {spec.key}")
    shape = inspect_shape(spec, tensor_parallel)
    folder, family, args = shape.folder, shape.family, shape.args
    tokenizer = load_tokenizer(folder, spec.key)
    check_tokenizer_fits(tokenizer, args.vocab_size, spec.key)
    key_table = family.hf_to_native(args.n_layers, args.tied)
    files = None
    if not spec.random_init:
        with torch.device("meta"):
            shapes = {n: tuple(p.shape) for n, p in family.build(args).named_parameters()}
        expected = {hf: shapes[native] for hf, native in key_table.items()}
        tied = family.tied_hf_keys if args.tied else {}
        files = check_hf_weights(folder, expected, tied)
    with _name_odd_values(str(folder / GENERATION_CONFIG)):
        eos_ids = eos_token_ids(folder, read_hf_config(folder), args.vocab_size)
    source = ModelSource(spec, folder, family, args, tokenizer, eos_ids, key_table, files)
    return _with_eos_token(source, spec.eos_token) if spec.eos_token else source


def inspect_models(job: ResolvedJob) -> dict[str, ModelSource]:
    """Return the job's models by role, the student first.

    Raises:
        ModelError: a model cannot be used, or cannot score what the student writes.
    """
    tp = job.layout.tensor
    sources = {role: inspect_model(spec, tp) for role, spec in job.models.items()}
    student = sources["student"]
    for source in sources.values():
        if source is not student:
            _check_can_score(source, student, tp)
    return sources


def _with_eos_token(student: ModelSource, token: str) -> ModelSource:
    """Return the student with one more token that ends responses, as its first."""
    ids = student.tokenizer.get_vocab()
    if token not in ids:
        raise ModelError(
            f"student.eos_token: {token!r} is not a token of {student.folder}; wanted one of its "
            f"tokens, such as {student.tokenizer.eos_token!r}"
        )
    student.tokenizer.eos_token = token
    ends = [ids[token], *sorted(student.eos_ids - {ids[token]})]
    edits: dict[str, dict[str, Any]] = {
        CONFIG: {"eos_token_id": ends},
        GENERATION_CONFIG: {"eos_token_id": ends},
        "tokenizer_config.json": {"eos_token": token},
        "special_tokens_map.json": {"eos_token": token},
    }
    return replace(student, eos_ids=set(ends), edits=edits)


def _check_can_score(other: ModelSource, student: ModelSource, tp: int) -> None:
    sizes = {source.role: source.args.vocab_size for source in (student, other)}
    if tp > 1 and len(set(sizes.values())) > 1:
        raise ModelError(
            f"{other.role}.hf_path: vocab_size is {sizes[other.role]}, the student's is "
            f"{sizes['student']}; with [parallelism] tensor_parallel_degree = {tp} a rank would "
            "hold different parts of them; wanted 1 there, or equal sizes"
        )
    compare_tokenizers(student.tokenizer, other.tokenizer, other.role)


def common_vocab_size(sources: Mapping[str, ModelShape]) -> int:
    """Return the number of token ids that every model has; 0 if all have the same number.

    Ids beyond it are padding of the larger embeddings.
    """
    sizes = {source.args.vocab_size for source in sources.values()}
    return min(sizes) if len(sizes) > 1 else 0


def check_lengths(
    sources: Iterable[ModelSource], longest: int, new_tokens: int, section: str
) -> None:
    """Raise ModelError if prompt and response exceed the positions of a model.

    Args:
        longest: tokens of the longest prompt.
        section: the config table whose max_new_tokens the error names.
    """
    for source in sources:
        if longest + new_tokens > source.args.max_seq_len:
            raise ModelError(
                f"{section}.max_new_tokens: the longest prompt ({longest} tokens) with "
                f"{new_tokens} new ones exceeds the {source.args.max_seq_len} positions of the "
                f"{source.role} ({source.folder}); shorten data.max_prompt_tokens or this"
            )
