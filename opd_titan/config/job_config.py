"""All options of opd_titan: one dataclass per TOML table. The docstring under a field is its help.

The type of a field defines the allowed values; `consistency.py` has the rules between keys.
Paths (`hf_path`, `path`, `dump_folder`) are relative to the working directory, not to the TOML
file.
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from opd_titan.config.value_types import (
    Count,
    Folder,
    Fraction,
    FractionBelowOne,
    Grader,
    Integer,
    NonEmptyText,
    NonNegative,
    Number,
    Positive,
    PositiveCount,
    Source,
    Switch,
    Text,
)

_TABLE = ConfigDict(extra="forbid", use_attribute_docstrings=True)

DatasetName = Literal["gsm8k", "openthoughts3", "prompts"]
DtypeName = Literal["auto", "float32", "bfloat16"]
SamplesPerPrompt = Annotated[Integer, Field(ge=1, le=1 << 20)]
# At most a year, because a timeout of several centuries overflows.
Seconds = Annotated[Integer, Field(ge=1, le=365 * 24 * 3600)]


def _check_shard_degree(value: int) -> int:
    if value == 0:
        raise ValueError("0 is not a number of ranks; wanted -1, or an integer >= 1")
    return value


@dataclass(config=_TABLE)
class Job:
    config_file: Text = field(default="", compare=False)
    """The TOML file to read. Command line only; a TOML file names its parent with `base`."""
    dump_folder: Annotated[Folder, Field(min_length=1)] = "outputs"
    """Folder for everything the run writes: checkpoints, exports, rollouts, logs, TensorBoard."""
    description: Text = ""
    """Free text. The run does not use it."""


@dataclass(config=_TABLE)
class Student:
    hf_path: Source = ""
    """The model to train: a local Hugging Face folder or a hub id. Required."""
    random_init: Switch = False
    """Read only config.json, and start from random weights. Off: the weights must exist."""
    eos_token: Text = ""
    """An additional token that ends a response, for example the teacher's <|im_end|> for a base
    model. Exports include it. Empty: only the end tokens of the model and of the data set."""


@dataclass(config=_TABLE)
class TeacherModel:
    """One row of [[teacher.models]], or of [[teacher]] in a file without a [teacher] table."""

    name: Text = ""
    """The name that [[data.sets]] refer to: letters, digits, `_`, `-` and dots. Required."""
    hf_path: Source = ""
    """The model: a local Hugging Face folder or a hub id. Required."""


@dataclass(config=_TABLE)
class Teacher:
    hf_path: Source = ""
    """The model to learn from: a local Hugging Face folder or a hub id. Required unless the
    objective is sft or [[teacher.models]] are given."""
    random_init: Switch = False
    """Read only config.json, and use random weights. Off: the weights must exist."""
    cpu_offload: Switch = False
    """Keep the weights in host memory and stream them to the GPU layer by layer for scoring.
    Validating the teacher still needs all of its weights on the GPU; see validation.enable."""
    models: list[TeacherModel] = field(default_factory=list)
    """Several teachers instead of hf_path. Each scores the responses to the [[data.sets]] that name
    it. See docs/several_teachers.md."""


@dataclass(config=_TABLE)
class Reference:
    hf_path: Source = ""
    """The reference model. Empty: the student at step 0."""
    coef: Annotated[Number, Field(gt=-1)] = 0.0
    """Weight c of the KL to the reference. 0: no reference is loaded. The optimum is proportional
    to (T * R^c)^(1/(1+c)) for teacher T and reference R. With c = 1 (the prototype's value) the
    student stops half-way, at the normalized geometric mean of T and R. Negative values move it
    beyond the teacher, and need an objective that is a KL from the student."""
    cpu_offload: Switch = False
    """Keep the weights in host memory and stream them to the GPU layer by layer."""


@dataclass(config=_TABLE)
class DataSet:
    """One row of [[data.sets]], or of [[data]] in a file without a [data] table. Keys that are
    empty or missing take their value from [data]."""

    name: Text = ""
    """The name of the set in metrics: letters, digits, `_`, `-` and dots. Required."""
    dataset: Literal["", DatasetName] = ""
    """The format of the rows. Empty: data.dataset."""
    path: Source = ""
    """A local file, a save_to_disk folder or a hub id. Empty: data.path, or the default hub id if
    this row has a dataset of its own."""
    split: Text = ""
    """The split to train on. Empty: data.split."""
    weight: Positive = 1.0
    """The share of the prompts, relative to the weights of the other sets."""
    teacher: Text = ""
    """The name of the [[teacher.models]] row that scores the responses. Required when there are
    several teachers."""


@dataclass(config=_TABLE)
class Data:
    dataset: DatasetName = "gsm8k"
    """The format of the rows. `prompts` accepts any set with a `prompt` or a `messages` column."""
    path: Source = ""
    """A local file, a save_to_disk folder or a hub id. Empty: the default hub id of the dataset."""
    split: NonEmptyText = "train"
    """The split to train on."""
    template: Literal["raw", "chat"] = "chat"
    """How a question becomes a prompt. chat: the tokenizer's own chat template. raw: `Question:
    ...`, then `Answer: Let's solve this step by step.`, for base models."""
    enable_thinking: Switch = False
    """Passed to the chat template: let the model think before it answers."""
    max_prompt_tokens: PositiveCount = 512
    """Prompts with more tokens are dropped and counted."""
    shuffle: Switch = True
    """Shuffle the prompts in each epoch. The order depends only on training.seed."""
    sets: list[DataSet] = field(default_factory=list)
    """Several data sets, mixed in each step by their weights. Empty: the one set of this table."""


@dataclass(config=_TABLE)
class Rollout:
    prompts_per_step: PositiveCount = 32
    """Prompts per step, over all ranks."""
    group_size: SamplesPerPrompt = 4
    """Responses sampled for each prompt."""
    max_new_tokens: PositiveCount = 512
    """Responses that do not end within this many tokens are cut and marked as truncated."""
    max_tokens_per_step: Count = 0
    """Limit on the total response tokens of a step, so that a few long responses do not delay all
    others. All responses are cut at the same length, the largest within the limit. 0: no limit."""
    temperature: Positive = 1.0
    """Sampling temperature. All log-probs (student, teacher, reference) use it too."""
    top_p: Annotated[Number, Field(gt=0, le=1)] = 1.0
    """Sample from the smallest set of tokens with at least this total probability. 1: all."""
    top_k: Count = 0
    """Sample from the k most likely tokens. 0: all."""
    ignore_eos: Switch = False
    """Continue to max_new_tokens after an end token. For benchmarks."""
    on_policy_fraction: Fraction = 1.0
    """Probability that the student samples the responses to a prompt; otherwise the step uses the
    data set's own response. policy_gradient needs 1, sft needs 0; the others allow any value."""
    max_concurrent: Count = 0
    """Sequences decoded at once on each rank. 0: as many as fit into the free memory at half of the
    maximum length. When memory runs out, the newest sequences wait."""


@dataclass(config=_TABLE)
class Distill:
    objective: Literal[
        "policy_gradient",
        "reverse_kl",
        "forward_kl",
        "jsd",
        "top_k_reverse_kl",
        "top_k_forward_kl",
        "sft",
    ] = "policy_gradient"
    """policy_gradient: clipped policy gradient; the reward of a token is minus its reverse KL to
    the teacher. reverse_kl, forward_kl, jsd: exact, over the whole vocabulary, at each position.
    top_k_*: the same over top_k tokens (the student's for reverse KL, the teacher's for forward KL)
    and one bucket for the rest. sft: cross-entropy on the data set's own responses, no teacher."""
    baseline: Literal["none", "kl", "top_k"] = "none"
    """policy_gradient only: a baseline added to the advantages. It does not change the expected
    gradient, only its variance, and usually but not always lowers it. kl: the exact KL to the
    teacher at that position; top_k: the same over top_k tokens and the rest."""
    beta: Fraction = 0.5
    """jsd only: the teacher's weight in the mixture. 0: the forward KL; 1: the reverse KL."""
    top_k: PositiveCount = 16
    """Number of tokens of the top_k objectives and of the top_k baseline."""
    reward_power: NonNegative = 0.0
    """policy_gradient only: if a > 0, the reward is T^a - S^a, which is bounded by 1, instead of
    log T - log S. 0: off."""
    clip_low: FractionBelowOne = 0.2
    """The probability ratio is clipped below at 1 - clip_low. Needs minibatches > 1."""
    clip_high: NonNegative = 0.2
    """The probability ratio is clipped above at 1 + clip_high. Needs minibatches > 1."""
    minibatches: PositiveCount = 1
    """Optimizer updates per step. The rollouts of a step are divided among them."""
    log_ratio_clamp: NonNegative = 0.0
    """policy_gradient: clamp log T - log S and log R - log S of each token to +- this many nats.
    Other objectives clamp only the advantages that are written with rollouts. 0: off."""


@dataclass(config=_TABLE)
class Optimizer:
    lr: NonNegative = 1e-6
    """Peak learning rate of AdamW."""
    beta1: FractionBelowOne = 0.9
    """Decay of the running mean of the gradients."""
    beta2: FractionBelowOne = 0.999
    """Decay of the running mean of the squared gradients."""
    eps: Positive = 1e-8
    """Added to the denominator of the update."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay."""
    fused: Switch = True
    """Use torch's fused implementation."""
    cpu_offload: Switch = False
    """Keep master weights, gradients and moments in host memory and update there. Frees 16 bytes of
    GPU memory for each parameter of a rank's shard. The weights are streamed to the GPU."""


@dataclass(config=_TABLE)
class LRScheduler:
    warmup_steps: Count = 0
    """Steps over which the learning rate rises linearly from 0."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the learning rate from the end of the warm-up to the last step."""
    min_lr_factor: Fraction = 0.0
    """Final learning rate of the decay, as a fraction of optimizer.lr."""


@dataclass(config=_TABLE)
class Training:
    steps: PositiveCount = 100
    """Steps to train. Each has one batch of rollouts."""
    epochs: Count = 0
    """Passes over the data set, in full batches of prompts; replaces steps. 0: use steps."""
    seed: Count = 42
    """Seed of the data order, of sampling and of random weights."""
    dtype: DtypeName = "auto"
    """Compute dtype; master weights are float32. auto: bfloat16 on CUDA, float32 on CPU."""
    max_grad_norm: NonNegative = 1.0
    """Clip the gradients to this total norm. 0: no clipping."""
    max_tokens_per_microbatch: PositiveCount = 8192
    """Token budget of a forward pass on each rank. Changes speed and memory, not results."""
    max_skipped_updates: Count = 3
    """An update with a non-finite loss or gradient is skipped. The run ends with an error if more
    than this many updates in a row are skipped."""
    deterministic: Switch = False
    """Use only deterministic kernels; slower."""


@dataclass(config=_TABLE)
class Parallelism:
    data_parallel_replicate_degree: PositiveCount = 1
    """Number of copies of the sharded model (HSDP)."""
    data_parallel_shard_degree: Annotated[
        Integer, Field(ge=-1), AfterValidator(_check_shard_degree)
    ] = -1
    """Number of ranks that share one copy (FSDP2). -1: the number of ranks, divided by the other
    two degrees."""
    tensor_parallel_degree: PositiveCount = 1
    """Number of neighbouring ranks that split each layer, with sequence parallelism. It must divide
    the models' attention heads, key/value heads, MLP width and vocabulary size."""


@dataclass(config=_TABLE)
class ActivationCheckpoint:
    mode: Literal["none", "selective", "full"] = "none"
    """What the student's forward pass keeps for the backward pass. none: everything; selective:
    results of matrix products and of attention; full: only the input of each layer, which costs a
    second forward pass."""


@dataclass(config=_TABLE)
class Compile:
    enable: Literal["auto", "on", "off"] = "auto"
    """Compile the layers of all models with torch.compile, except the attention kernel. Batch sizes
    are dynamic, so that few graphs are compiled; more than 32 graphs of one function are an error.
    auto: off, because the fused kernels are faster on an H100 and need no compilation."""


@dataclass(config=_TABLE)
class Checkpoint:
    enable: Switch = True
    """Write checkpoints for exact resume, and resume from them."""
    interval: Count = 100
    """Steps between checkpoints. 0: only at the end."""
    keep_latest_k: Count = 2
    """Number of checkpoints to keep; older ones are deleted. 0: all."""
    async_mode: Literal["disabled", "async"] = "disabled"
    """async: write in the background while training continues."""
    load_step: Annotated[Integer, Field(ge=-1)] = -1
    """The step to resume from. -1: the newest intact checkpoint, if any; 0: start a new run."""
    allow_changes: Switch = False
    """Resume even if models, data or objective differ from the checkpoint's, with a warning that
    lists the differences."""


@dataclass(config=_TABLE)
class Export:
    interval: Count = 0
    """Steps between exports to a Hugging Face folder. 0: only at the end."""
    dtype: DtypeName = "auto"
    """Dtype of the exported weights. auto: the dtype of the student's original weights."""


@dataclass(config=_TABLE)
class ValidationSet:
    """One row of [[validation.sets]]. Keys that are empty or missing take their value from
    [validation]."""

    name: Text = ""
    """The name of the set in metrics: letters, digits, `_`, `-` and dots. Required."""
    dataset: Literal["", DatasetName] = ""
    """The format of the rows. Empty: validation.dataset, else data.dataset."""
    path: Source = ""
    """A local file, a save_to_disk folder or a hub id. Empty: validation.path, else data.path; the
    default hub id if this row has a dataset of its own."""
    split: Text = ""
    """The split to validate on. Empty: validation.split."""
    max_prompts: Count = 0
    """Use the first N prompts. 0: validation.max_prompts."""
    grader: Grader = ""
    """How answers are graded. Empty: validation.grader."""
    teacher: Text = ""
    """The name of the [[teacher.models]] row to compare the student with. Required when there are
    several teachers."""


@dataclass(config=_TABLE)
class Validation:
    enable: Switch = True
    """Measure accuracy on held-out prompts: of the student from step 0 on, of the teacher once."""
    interval: Count = 50
    """Steps between validations. 0: only at the start and at the end."""
    dataset: Literal["", DatasetName] = ""
    """The format of the rows. Empty: data.dataset."""
    path: Source = ""
    """A local file, a save_to_disk folder or a hub id. Empty: data.path."""
    split: NonEmptyText = "test"
    """The split to validate on."""
    max_prompts: Count = 0
    """Use the first N prompts. 0: all."""
    grader: Annotated[Grader, Field(min_length=1)] = "auto"
    """How answers are graded, here and in written rollouts: auto, gsm8k, math, boxed, choice,
    exact, or your own `package.module:function`, called with response and answer. See
    docs/evaluation.md."""
    samples_per_prompt: SamplesPerPrompt = 1
    """Responses per prompt; accuracy is their mean. More than 1 needs a temperature above 0."""
    temperature: NonNegative = 0.0
    """Sampling temperature. 0: greedy."""
    max_new_tokens: Count = 0
    """Longest response in tokens. 0: rollout.max_new_tokens."""
    sets: list[ValidationSet] = field(default_factory=list)
    """Several validation sets; accuracy is the mean over them. The list replaces the list of a
    parent recipe. Empty: the one set of this table or, if the table names none, validation.split of
    each of the [[data.sets]]."""


@dataclass(config=_TABLE)
class Evaluate:
    """Only for `python -m opd_titan.evaluate`. [validation] defines the prompts."""

    model: Source = ""
    """The model to grade: student, teacher (teacher.<name> if there are several), a local Hugging
    Face folder, a hub id, or a training checkpoint (`<dump_folder>/checkpoint/step-N`). Empty:
    student."""
    folder: Folder = ""
    """Folder for the results. Empty: `<dump_folder>/evaluation/<model>`, with a number appended if
    it contains an earlier result."""


@dataclass(config=_TABLE)
class Metrics:
    log_freq: PositiveCount = 1
    """Steps between log records (console line and TensorBoard)."""
    enable_tensorboard: Switch = True
    """Write TensorBoard scalars to the dump folder."""
    sample_rollouts: Annotated[Integer, Field(ge=-1)] = 4
    """Rollouts written to the dump folder in each step. 0: none; -1: all. Each token has its rank
    and its most likely alternatives, from logits that are computed anyway: with a small model and
    a large vocabulary, one response in 16 costs 2 % of a step, and all of them 14 %. See
    docs/viewer.md."""
    keep_rollouts: Count = 1000
    """Keep the rollouts of the last N steps in the dump folder. 0: of all steps."""


@dataclass(config=_TABLE)
class Watchdog:
    action: Literal["off", "warn", "stop", "rollback"] = "warn"
    """What to do when there are signs that training fails. warn: log a line with the sign, its
    likely cause and the option to change. stop: warn, then exit with code 1. rollback: return to
    the newest checkpoint before the sign and continue with half the learning rate, at most three
    times."""


@dataclass(config=_TABLE)
class Profiling:
    enable: Switch = False
    """Write torch profiler traces to the dump folder."""
    interval: PositiveCount = 10
    """Steps between traces."""


@dataclass(config=_TABLE)
class Comm:
    init_timeout_seconds: Seconds = 300
    """Timeout of collectives while models and data are downloaded and loaded."""
    train_timeout_seconds: Seconds = 3600
    """Timeout of collectives after that. It must exceed the longest time that a rank waits for the
    slowest one, for example in a rollout."""


@dataclass(config=_TABLE)
class JobConfig:
    """Distil a teacher into a student on the student's own samples."""

    job: Job = field(default_factory=Job)
    student: Student = field(default_factory=Student)
    teacher: Teacher = field(default_factory=Teacher)
    reference: Reference = field(default_factory=Reference)
    data: Data = field(default_factory=Data)
    rollout: Rollout = field(default_factory=Rollout)
    distill: Distill = field(default_factory=Distill)
    optimizer: Optimizer = field(default_factory=Optimizer)
    lr_scheduler: LRScheduler = field(default_factory=LRScheduler)
    training: Training = field(default_factory=Training)
    parallelism: Parallelism = field(default_factory=Parallelism)
    activation_checkpoint: ActivationCheckpoint = field(default_factory=ActivationCheckpoint)
    compile: Compile = field(default_factory=Compile)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    export: Export = field(default_factory=Export)
    validation: Validation = field(default_factory=Validation)
    evaluate: Evaluate = field(default_factory=Evaluate)
    metrics: Metrics = field(default_factory=Metrics)
    watchdog: Watchdog = field(default_factory=Watchdog)
    profiling: Profiling = field(default_factory=Profiling)
    comm: Comm = field(default_factory=Comm)
