"""Resolve a configuration, once, into the models, data sets and device mesh of a job.

A `ResolvedJob` says which models, data sets and validation sets a job has, which teacher scores
which responses, in which dtype, and how the ranks are laid out. All other options are read from
its `config`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from opd_titan.config.job_config import DataSet, JobConfig, TeacherModel, ValidationSet
from opd_titan.errors import ConfigError


@dataclass(frozen=True)
class ModelSpec:
    """One model of a job.

    Attributes:
        role: "student", "teacher", "reference", or "teacher.<name>" of several teachers.
        path: a local Hugging Face folder or a hub id.
        key: the option that gives the path, for error messages.
        random_init: whether the weights are drawn with `seed`; otherwise they are read.
        cpu_offload: whether the weights stay on the host.
        eos_token: a token that ends responses in addition to the model's own; "" for none.
    """

    role: str
    path: str
    key: str
    random_init: bool = False
    seed: int = 0
    cpu_offload: bool = False
    eos_token: str = ""

    @property
    def is_trained(self) -> bool:
        return self.role == "student"


@dataclass(frozen=True)
class Layout:
    """Degrees of the device mesh; their product is the world size."""

    replicate: int
    shard: int
    tensor: int


@dataclass(frozen=True)
class ResolvedJob:
    """A configuration with the values that depend on it, the device type and the number of ranks.

    Attributes:
        device_type: "cpu" or "cuda".
        dtype: the compute dtype, "float32" or "bfloat16".
        models: by role, the student first.
        data_sets: rows with all defaults filled in; `teacher` is the role that scores them.
        validation_sets: the same; empty if validation is off.
    """

    config: JobConfig
    device_type: str
    layout: Layout
    dtype: str
    models: dict[str, ModelSpec]
    data_sets: tuple[DataSet, ...]
    validation_sets: tuple[ValidationSet, ...]

    @property
    def folder(self) -> Path:
        """The dump folder."""
        return Path(self.config.job.dump_folder)

    @property
    def teachers(self) -> list[str]:
        """Roles of the teachers."""
        return [role for role in self.models if is_teacher(role)]

    @property
    def compiled(self) -> bool:
        """Whether layers are compiled."""
        return self.config.compile.enable == "on"

    @property
    def on_policy(self) -> bool:
        """Whether the student samples any response."""
        return self.config.rollout.on_policy_fraction > 0.0

    @property
    def longest(self) -> int:
        """The most tokens of a prompt and its response."""
        return self.config.data.max_prompt_tokens + self.config.rollout.max_new_tokens


def resolve(config: JobConfig, device_type: str, world_size: int) -> ResolvedJob:
    """Resolve a checked configuration.

    Args:
        device_type: "cpu" or "cuda".
        world_size: the number of ranks.

    Raises:
        ConfigError: the options do not suit the device or the number of ranks.
    """
    if config.training.deterministic and device_type == "cuda":
        # The sampler's prefix sums have no deterministic kernel there.
        raise ConfigError("[training] deterministic: true is supported on the CPU only")
    dtype = config.training.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device_type == "cuda" else "float32"
    validation = validation_sets(config) if config.validation.enable else []
    return ResolvedJob(
        config=config,
        device_type=device_type,
        layout=_layout(config, world_size),
        dtype=dtype,
        models={spec.role: spec for spec in _models(config)},
        data_sets=tuple(replace(s, teacher=teacher_role(s.teacher)) for s in data_sets(config)),
        validation_sets=tuple(replace(s, teacher=teacher_role(s.teacher)) for s in validation),
    )


def _models(config: JobConfig) -> Iterator[ModelSpec]:
    student, reference = config.student, config.reference
    seed = config.training.seed
    yield ModelSpec(
        "student",
        student.hf_path,
        "student.hf_path",
        student.random_init,
        seed,
        config.optimizer.cpu_offload,
        student.eos_token,
    )
    if config.distill.objective != "sft":
        yield from teacher_specs(config)
    if reference.coef != 0.0:
        # The default reference is the initial student.
        path, random_init = reference.hf_path, False
        if not path:
            path, random_init = student.hf_path, student.random_init
        key = "reference.hf_path"
        yield ModelSpec("reference", path, key, random_init, seed, reference.cpu_offload)


def teacher_specs(config: JobConfig) -> Iterator[ModelSpec]:
    """Yield the teachers of the configuration, whether or not the objective needs them."""
    teacher = config.teacher
    for number, row in enumerate(_listed_teachers(config), 1):
        role = teacher_role(row.name)
        # Random teachers differ from the student and from each other, also at equal shapes.
        seed = config.training.seed + number
        key, offload = f"{role}.hf_path", teacher.cpu_offload
        yield ModelSpec(role, row.hf_path, key, teacher.random_init, seed, offload)


def _layout(config: JobConfig, world_size: int) -> Layout:
    p = config.parallelism
    replicate, tensor = p.data_parallel_replicate_degree, p.tensor_parallel_degree
    shard = p.data_parallel_shard_degree
    if shard == -1:
        shard = max(1, world_size // (replicate * tensor))
    if replicate * shard * tensor != world_size:
        fits = ", ".join(" x ".join(map(str, f)) for f in _fitting(world_size, replicate, tensor))
        raise ConfigError(
            f"[parallelism] data_parallel_replicate_degree {replicate} x "
            f"data_parallel_shard_degree {p.data_parallel_shard_degree} x tensor_parallel_degree "
            f"{tensor} is not the world size {world_size}; what fits: {fits}"
        )
    return Layout(replicate, shard, tensor)


def _fitting(world_size: int, replicate: int, tensor: int) -> list[tuple[int, int, int]]:
    """Return degrees with the world size as product; the ones that keep a given degree first."""
    divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
    found = [
        (r, world_size // r // t, t)
        for t in divisors
        for r in divisors
        if world_size % (r * t) == 0
    ]
    found.sort(key=lambda f: (-(f[0] == replicate) - (f[2] == tensor), f[2], f[0]))
    return found[:6]


def teachers(config: JobConfig) -> list[TeacherModel]:
    """Return [[teacher.models]], or the model of [teacher]; none if the objective is sft."""
    return [] if config.distill.objective == "sft" else _listed_teachers(config)


def _listed_teachers(config: JobConfig) -> list[TeacherModel]:
    return config.teacher.models or [TeacherModel(hf_path=config.teacher.hf_path)]


def teacher_role(name: str) -> str:
    """Return the role of the teacher with this name."""
    return f"teacher.{name}" if name else "teacher"


def is_teacher(role: str) -> bool:
    return role.partition(".")[0] == "teacher"


def data_sets(config: JobConfig) -> list[DataSet]:
    """Return [[data.sets]], or the set of [data], with all defaults filled in."""
    data = config.data
    return [
        replace(
            row,
            dataset=row.dataset or data.dataset,
            path=row.path or ("" if row.dataset not in ("", data.dataset) else data.path),
            split=row.split or data.split,
            teacher=_teacher_of(row, config),
        )
        for row in data.sets or [DataSet()]
    ]


def validation_sets(config: JobConfig) -> list[ValidationSet]:
    """Return [[validation.sets]], or the set of [validation], or one for each data set."""
    v, data = config.validation, config.data
    if data.sets and not (v.sets or v.dataset or v.path):
        return [
            ValidationSet(s.name, s.dataset, s.path, v.split, v.max_prompts, v.grader, s.teacher)
            for s in data_sets(config)
        ]
    dataset = v.dataset or data.dataset
    found = []
    for row in v.sets or [ValidationSet()]:
        # A row with another dataset cannot use the path of [validation].
        elsewhere = row.dataset not in ("", dataset)
        found.append(
            replace(
                row,
                dataset=row.dataset or dataset,
                path=row.path or ("" if elsewhere else v.path or data.path),
                split=row.split or v.split,
                max_prompts=row.max_prompts or v.max_prompts,
                grader=row.grader or v.grader,
                teacher=_teacher_of(row, config),
            )
        )
    return found


def _teacher_of(row: DataSet | ValidationSet, config: JobConfig) -> str:
    names = [model.name for model in teachers(config)]
    if not names:  # sft
        return ""
    return row.teacher or (names[0] if len(names) == 1 else "")
