"""Student, teacher and reference: first what they are, from small files; then their weights."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from opd_titan.checkpoint.hf_folder import (
    CONFIG,
    GENERATION_CONFIG,
    eos_token_ids,
    read_hf_config,
    resolve_model_folder,
)
from opd_titan.checkpoint.hf_load import check_hf_weights, load_hf_weights, random_init_weights
from opd_titan.config import JobConfig
from opd_titan.config.sets import is_teacher, teacher_role, teachers
from opd_titan.data.tokenizer import check_tokenizer_fits, compare_tokenizers, load_tokenizer
from opd_titan.distributed.heartbeat import set_phase, track_memory
from opd_titan.distributed.sharding import device_bytes
from opd_titan.distributed.world import Axis, World
from opd_titan.errors import ModelError, first_line
from opd_titan.models import ModelFamily, get_family
from opd_titan.models.attention import why_padded
from opd_titan.models.kernels import why_unavailable
from opd_titan.models.transforms import apply_compile
from opd_titan.rollout.generator import Generator
from opd_titan.rollout.weights import GeneratorWeights

logger = logging.getLogger("opd_titan")

_MOST_LAYERS = 1000
_LARGEST_SIZE = 2**20


@dataclass(frozen=True)
class ModelShape:
    """What a model's `config.json` says.

    Attributes:
        role: "student", "teacher" or "reference"; of several teachers "teacher.<name>".
    """

    role: str
    folder: Path
    family: ModelFamily
    args: Any

    def build(self) -> nn.Module:
        """The architecture, without storage under `torch.device("meta")`."""
        return self.family.build(self.args)

    def build_share(self, tp: Axis, compile: bool) -> nn.Module:
        """The architecture of one rank's share, which sums with the other ranks': for rollouts."""
        model = self.family.build(self.family.rank_args(self.args, tp.size, str(self.folder)))
        if tp.size > 1:
            self.family.join_ranks(model, tp, sequence_parallel=False)
        if compile:
            apply_compile(model.get_submodule("layers").children())
        return model


@dataclass(frozen=True)
class ModelSource(ModelShape):
    """A model before its weights are read.

    Attributes:
        key_table: Hugging Face's names of the tensors and ours.
        files: which file holds which tensor; None for random weights.
        edits: by file name, the keys of its JSON files that an export has otherwise.
    """

    tokenizer: PreTrainedTokenizerBase
    eos_ids: set[int]
    key_table: dict[str, str]
    files: dict[str, Path] | None
    edits: dict[str, dict[str, Any]] = field(default_factory=dict)


def inspect_shape(role: str, hf_path: str, tensor_parallel: int, key: str = "") -> ModelShape:
    """Read and check `config.json` alone.

    Args:
        key: the config key that gave the path, if it is not `<role>.hf_path`.

    Raises:
        ModelError: in one line, what is wrong with it.
    """
    folder = resolve_model_folder(hf_path, key or f"{role}.hf_path")
    where = str(folder / "config.json")
    with _odd_values_named(where):
        config = read_hf_config(folder)
        family = get_family(config, where)
        args = family.args_from_hf_config(config, where)
        family.rank_args(args, tensor_parallel, where)
        _check_plausible(args, where)
    return ModelShape(role, folder, family, args)


def _check_plausible(args: Any, where: str) -> None:
    """Refuse sizes beyond any model: names of billions of layers alone would fill the memory."""
    for size in fields(args):
        value, most = getattr(args, size.name), float(_LARGEST_SIZE)
        if size.name == "n_layers":
            most = _MOST_LAYERS
        elif size.name == "max_seq_len" or size.type in ("float", float):  # only numbers
            most = sys.float_info.max
        if not value <= most:
            raise ModelError(f"{where}: {size.name} is {value}; wanted at most {most}")


@contextmanager
def _odd_values_named(where: str) -> Iterator[None]:
    """The checks name what a person may get wrong; a JSON file can hold anything at all.

    Only for what parses: whatever else fails inside would be blamed on the file.
    """
    try:
        yield
    except (AttributeError, LookupError, OverflowError, RecursionError, TypeError, ValueError) as e:
        raise ModelError(
            f"{where}: holds a value that no model has ({type(e).__name__}: {first_line(e)}); "
            "wanted the file that transformers saved"
        ) from e


def inspect_model(
    role: str, hf_path: str, random_init: bool, tensor_parallel: int, key: str = ""
) -> ModelSource:
    """Read and check everything about a model that does not need its weights.

    Args:
        key: the config key that gave the path, if it is not `<role>.hf_path`.

    Raises:
        ModelError: in one line, what is wrong with the folder.
    """
    key = key or f"{role}.hf_path"
    set_phase(f"the check of {key}")
    shape = inspect_shape(role, hf_path, tensor_parallel, key)
    folder, family, args = shape.folder, shape.family, shape.args
    tokenizer = load_tokenizer(folder, key)
    check_tokenizer_fits(tokenizer, args.vocab_size, key)
    key_table = family.hf_to_native(args.n_layers, args.tied)
    files = None
    if not random_init:
        with torch.device("meta"):
            shapes = {n: tuple(p.shape) for n, p in family.build(args).named_parameters()}
        expected = {hf: shapes[native] for hf, native in key_table.items()}
        tied = family.tied_hf_keys if args.tied else {}
        files = check_hf_weights(folder, expected, tied)
    with _odd_values_named(str(folder / GENERATION_CONFIG)):
        eos_ids = eos_token_ids(folder, read_hf_config(folder), args.vocab_size)
    return ModelSource(role, folder, family, args, tokenizer, eos_ids, key_table, files)


def roles(config: JobConfig) -> list[tuple[str, str, bool]]:
    """Role, path, and whether its weights are random, of each model that the job needs."""
    student, reference = config.student, config.reference
    needed = [("student", student.hf_path, student.random_init)]
    for teacher in teachers(config):
        needed.append((teacher_role(teacher.name), teacher.hf_path, config.teacher.random_init))
    if reference.coef != 0.0:
        itself = not reference.hf_path
        path = student.hf_path if itself else reference.hf_path
        needed.append(("reference", path, itself and student.random_init))
    return needed


def inspect_models(config: JobConfig) -> dict[str, ModelSource]:
    """The models that the job needs, by role, student first.

    Raises:
        ModelError: a model cannot be used, or cannot score what the student writes.
    """
    tp = config.parallelism.tensor_parallel_degree
    sources = [inspect_model(*role, tp) for role in roles(config)]
    if config.student.eos_token:
        sources[0] = ending_with(sources[0], config.student.eos_token)
    for other in sources[1:]:
        _check_can_score(other, sources[0], tp)
    return {s.role: s for s in sources}


def ending_with(student: ModelSource, token: str) -> ModelSource:
    """The student with one more token that ends a response; the first among them."""
    ids = student.tokenizer.get_vocab()
    if token not in ids:
        raise ModelError(
            f"student.eos_token: {token!r} is no token of {student.folder}; wanted one of its "
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
    """Token ids that every model knows; what comes after is padding to round sizes. 0: all do."""
    sizes = {source.args.vocab_size for source in sources.values()}
    return min(sizes) if len(sizes) > 1 else 0


def check_lengths(
    sources: Iterable[ModelSource], longest: int, new_tokens: int, section: str
) -> None:
    """Raise ModelError where prompt and response outgrow the positions a model was made for.

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


def load_model(
    source: ModelSource,
    world: World,
    config: JobConfig,
    compute_dtype: torch.dtype,
) -> nn.Module:
    """Build a model on the meta device, shard it, and read each rank's own slices into it.

    The student is stored in fp32, the masters of what is trained; frozen models as they compute.
    """
    start = time.perf_counter()
    why = why_padded(compute_dtype, world.device)
    if why and world.device.type == "cuda" and source.role == "student":
        logger.warning("Attention of training and scoring: on padded sequences (slow: %s)", why)
    model = parallel_model(source, world, config, compute_dtype)
    allocate(model, torch.device("cpu") if cpu_offload(source.role, config) else world.device)
    if source.files is None:
        random_init_weights(model, random_seed(source.role, config), source.args.init_std)
    else:
        load_hf_weights(model, source.files, source.key_table)
    model.assert_tied()  # type: ignore[operator]  # of our own models
    stored = device_bytes(model.parameters())
    track_memory(f"{source.role} weights", model, lambda _: stored)
    logger.info(
        "%s: %s, %s parameters, %s, in %.1f s",
        source.role.capitalize(),
        source.folder,
        f"{sum(p.numel() for p in model.parameters()):,}",
        "RANDOM weights" if source.files is None else "weights loaded",
        time.perf_counter() - start,
    )
    return model


def allocate(model: nn.Module, device: torch.device) -> None:
    """Give the parameters storage without values; `to_empty` alone unties plain ones."""
    model.to_empty(device=device)
    model.tie_weights()  # type: ignore[operator]  # of our own models


def parallel_model(
    source: ModelShape, world: World, config: JobConfig, compute_dtype: torch.dtype
) -> nn.Module:
    """The model as the recipe spreads it over the world, without storage."""
    trained = source.role == "student"
    with torch.device("meta"):
        model = source.build().to(torch.float32 if trained else compute_dtype)
    if not trained:
        model.requires_grad_(False).eval()
    source.family.parallelize(
        model,
        world,
        compute_dtype,
        activation_checkpoint=config.activation_checkpoint.mode if trained else "none",
        compile=compiles(config),
        cpu_offload=cpu_offload(source.role, config),
    )
    return model


def build_generator(
    source: ModelSource, model: nn.Module, world: World, config: JobConfig, dtype: torch.dtype
) -> tuple[GeneratorWeights, Generator]:
    """What samples from a loaded model; its weights have to be synced before."""
    compiled = compiles_rollouts(config, world.device)
    build = partial(source.build_share, world.tp, compiled)
    weights = GeneratorWeights(model, build, dtype, world.device, pack=not compiled)
    generator = Generator(
        weights.model,
        source.eos_ids,
        config.rollout.max_concurrent,
        config.training.max_tokens_per_microbatch,
        world.tp,
        room=lambda: weights.cache_room,
    )
    track_memory(f"rollout's copy of the {source.role}", weights, lambda w: w.bytes_now)
    track_memory(f"KV cache of the {source.role}", generator, lambda g: g.num_bytes)
    log = logger.warning if generator.path.why else logger.info
    log("Rollouts of the %s: %s", source.role, generator.path)
    return weights, generator


def random_seed(role: str, config: JobConfig) -> int:
    """What the random weights of a model are drawn with.

    Teachers draw other weights than a student of the same shapes, and than each other; the default
    reference draws the student's.
    """
    names = ["", *(teacher_role(t.name) for t in teachers(config))]
    return config.training.seed + (names.index(role) if role in names else 0)


def compiles(config: JobConfig) -> bool:
    """Whether the recipe wants layers compiled."""
    return config.compile.enable == "on"


def compiles_rollouts(config: JobConfig, device: torch.device) -> bool:
    """Whether the layers that sample are compiled: fused kernels do what the compiler would."""
    return compiles(config) and bool(why_unavailable(device))


def cpu_offload(role: str, config: JobConfig) -> bool:
    """Whether the recipe wants a model's sharded weights on the host."""
    if is_teacher(role):
        return config.teacher.cpu_offload
    offloaded = {"student": config.optimizer.cpu_offload, "reference": config.reference.cpu_offload}
    return offloaded.get(role, False)


def compute_dtype(config: JobConfig, device: torch.device) -> torch.dtype:
    """training.dtype, with auto resolved for this device."""
    name = config.training.dtype
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return getattr(torch, name)
