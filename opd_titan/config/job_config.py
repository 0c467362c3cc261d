"""Every option of opd_titan: one dataclass per TOML table, the docstring under a field is its help.

Paths (`hf_path`, `path`, `dump_folder`) are used as written, relative to the working directory
and not to the TOML file. Ranges are in `checks.py`, the rules between keys in `consistency.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class Job:
    config_file: str = field(default="", compare=False)
    """The TOML file to read. Command line only; a TOML file names its parent with `base`."""
    dump_folder: str = "outputs"
    """Folder for everything the run writes: checkpoints, exports, rollouts, logs, TensorBoard."""
    description: str = ""
    """Free text, for people."""
    print_config: bool = False
    """Print the resolved config at start. It is written to the dump folder in any case."""


@dataclass
class Student:
    hf_path: str = ""
    """The model to train: a local Hugging Face folder or a hub id. Required."""
    random_init: bool = False
    """Take the sizes from config.json but random weights. Off: the weights must exist."""
    eos_token: str = ""
    """A token that ends responses beside the model's own ends, and the data set's own: the
    teacher's, such as <|im_end|>, for a base model. Exports carry it. Empty: the model's alone."""


@dataclass
class TeacherModel:
    """One [[teacher.models]], or [[teacher]] in a file that has no [teacher]."""

    name: str = ""
    """What [[data.sets]] call it by: letters, digits, `_`, `-` and dots. Required."""
    hf_path: str = ""
    """The model: a local folder or a hub id. Required."""


@dataclass
class Teacher:
    hf_path: str = ""
    """The model to learn from: a local folder or a hub id. Required unless the objective is sft, or
    [[teacher.models]] name several."""
    random_init: bool = False
    """Take the sizes from config.json but random weights. Off: the weights must exist."""
    cpu_offload: bool = False
    """Keep the weights on the host and stream them to the GPU layer by layer for scoring. To be
    validated the teacher is gathered on the GPU all the same: see validation.enable."""
    models: list[TeacherModel] = field(default_factory=list)
    """Several teachers, in the place of hf_path: each scores the responses to the [[data.sets]]
    that name it, one after the other. docs/several_teachers.md."""


@dataclass
class Reference:
    hf_path: str = ""
    """The model that coef holds the student to. Empty: the student as it was at step 0."""
    coef: float = 0.0
    """Weight c of the pull to the reference, > -1. 0: the reference is never loaded.
    The student's optimum is then proportional to (T * R^c)^(1/(1+c)), not to the teacher T:
    with c = 1 (what the seed did) it stops half-way, at the geometric mean of T and R.
    Negative ones go beyond the teacher; only where the objective is a KL from the student."""
    cpu_offload: bool = False
    """Keep the weights on the host and stream them to the GPU layer by layer."""


@dataclass
class DataSet:
    """One [[data.sets]], or [[data]] in a file that has no [data]. What it leaves out is as in
    [data]."""

    name: str = ""
    """What its figures are called: letters, digits, `_`, `-` and dots. Required."""
    dataset: Literal["", "gsm8k", "openthoughts3", "prompts"] = ""
    """What the rows look like. Empty: data.dataset."""
    path: str = ""
    """A local file, a save_to_disk folder or a hub id. Empty: data.path, or the hub id of this
    row's own dataset."""
    split: str = ""
    """The split to train on. Empty: data.split."""
    weight: float = 1.0
    """Its share of the prompts, relative to the other sets' weights; > 0."""
    teacher: str = ""
    """The name of the [[teacher.models]] that scores its responses. Required where there are
    several."""


@dataclass
class Data:
    dataset: Literal["gsm8k", "openthoughts3", "prompts"] = "gsm8k"
    """What the rows look like. `prompts` is any set with a `prompt` or a `messages` column."""
    path: str = ""
    """A local file, a save_to_disk folder or a hub id. Empty: the set's own hub id."""
    split: str = "train"
    """The split to train on."""
    template: Literal["raw", "chat"] = "chat"
    """How a question becomes a prompt. chat: the tokenizer's own chat template.
    raw: `Question: ...`, then `Answer: Let's solve this step by step.`, for base models."""
    enable_thinking: bool = False
    """Passed to the chat template: let the model think before it answers."""
    max_prompt_tokens: int = 512
    """Prompts with more tokens are dropped and counted."""
    shuffle: bool = True
    """Shuffle the prompts anew each epoch; the order depends only on training.seed."""
    sets: list[DataSet] = field(default_factory=list)
    """Several data sets, mixed in each step by their weights. Empty: the one that this table
    names."""


@dataclass
class Rollout:
    prompts_per_step: int = 32
    """Prompts per step, over all ranks together."""
    group_size: int = 4
    """Responses sampled for each prompt."""
    max_new_tokens: int = 512
    """A response without an end after this many tokens is cut and marked as truncated."""
    max_tokens_per_step: int = 0
    """A step's responses are cut at the greatest common length at which they have no more tokens
    than this together, so that a few long ones do not hold up the rest. 0: no limit."""
    temperature: float = 1.0
    """Sampling temperature, > 0. All log-probs (student, teacher, reference) are taken at it."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with at least this probability. 1: all of them."""
    top_k: int = 0
    """Sample from the k likeliest tokens. 0: all of them."""
    ignore_eos: bool = False
    """Sample on past the end of a response, to max_new_tokens. For benchmarks."""
    on_policy_fraction: float = 1.0
    """Probability, drawn for each prompt of a step, that the student samples its responses; else it
    has one, the data set's own. policy_gradient needs 1, sft 0; the others take any mixture."""
    max_concurrent: int = 0
    """Sequences decoded at once on each rank. 0: as many as fit into the free memory, where each
    has half of what it may need; when it runs out, the youngest wait."""


@dataclass
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
    """policy_gradient: clipped, with the per-token reverse KL to the teacher as negative reward.
    reverse_kl, forward_kl, jsd: exact, over the whole vocabulary, at each prefix of a response.
    top_k_*: the same over top_k tokens (the student's, or the teacher's for forward_kl) and one
    bucket for all others. sft: cross-entropy on the data set's own responses, without a teacher."""
    baseline: Literal["none", "kl", "top_k"] = "none"
    """What policy_gradient adds to the advantages: it leaves the mean gradient as it is and changes
    its variance, often but not always for the better. kl: the exact KL to the teacher at that
    prefix; top_k: the same over top_k tokens and the rest."""
    beta: float = 0.5
    """Of jsd: the teacher's weight in the mixture. 0: the forward KL; 1: the reverse KL."""
    top_k: int = 16
    """Tokens of the top_k objectives and of the top_k baseline."""
    reward_power: float = 0.0
    """a > 0: policy_gradient's reward is T^a - S^a, which is within +-1, not log T - log S.
    0: off."""
    clip_low: float = 0.2
    """The probability ratio is clipped below at 1 - clip_low. Acts when minibatches > 1."""
    clip_high: float = 0.2
    """The probability ratio is clipped above at 1 + clip_high. Acts when minibatches > 1."""
    minibatches: int = 1
    """Optimizer updates for each step's rollouts, each on its own share of them."""
    log_ratio_clamp: float = 0.0
    """policy_gradient clamps the per-token logT - logS, and logR - logS, to +- this many nats.
    Of the other objectives it changes only the advantages that are written down. 0: off."""


@dataclass
class Optimizer:
    name: Literal["adamw"] = "adamw"
    """The optimizer."""
    lr: float = 1e-6
    """Peak learning rate."""
    beta1: float = 0.9
    """Decay of the mean of gradients."""
    beta2: float = 0.999
    """Decay of the mean of squared gradients."""
    eps: float = 1e-8
    """Added to the denominator of the update."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    fused: bool = True
    """Use torch's fused implementation."""
    cpu_offload: bool = False
    """Keep master weights, gradients and moments on the host and update there.
    Frees 16 bytes of GPU memory for each parameter of a rank's shard; the weights are streamed."""


@dataclass
class LRScheduler:
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the learning rate from the end of the warm-up to the last step."""
    min_lr_factor: float = 0.0
    """Where the decay ends, as a fraction of optimizer.lr."""


@dataclass
class Training:
    steps: int = 100
    """Steps to train, one batch of rollouts each."""
    epochs: int = 0
    """Passes over the data set, in full batches of prompts; replaces steps. 0: use steps."""
    seed: int = 42
    """Seed of the data order, of sampling and of random weights."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype; master weights are float32. auto: bfloat16 on CUDA, float32 on CPU."""
    max_grad_norm: float = 1.0
    """Clip the total gradient norm to this. 0: no clipping."""
    max_tokens_per_microbatch: int = 8192
    """Token budget of a forward pass on each rank. Changes speed and memory, not results."""
    max_skipped_updates: int = 3
    """Updates in a row without a finite loss and gradient that are skipped; one more fails."""
    deterministic: bool = False
    """Only deterministic kernels; slower."""


@dataclass
class Parallelism:
    data_parallel_replicate_degree: int = 1
    """Copies of the sharded model (HSDP)."""
    data_parallel_shard_degree: int = -1
    """Ranks that one copy is sharded over (FSDP2). -1: all that the other two leave."""
    tensor_parallel_degree: int = 1
    """Neighbouring ranks that each layer is split over, with sequence parallelism; it must divide
    the models' attention heads, key/value heads, MLP width and vocabulary."""


@dataclass
class ActivationCheckpoint:
    mode: Literal["none", "selective", "full"] = "none"
    """What the student's forward keeps for its backward. selective: results of matrix products and
    of attention; full: only what enters each layer, which costs a second forward."""


@dataclass
class Compile:
    enable: Literal["auto", "on", "off"] = "auto"
    """Compile the layers of all models (torch.compile), except the attention kernel. Sizes of a
    batch are left open, so that a few graphs serve all. More than 32 of one function: an error.
    auto is off: on an H100 the fused kernels are faster, and need no compiling (benchmarks)."""


@dataclass
class Checkpoint:
    enable: bool = True
    """Write checkpoints for exact resume, and resume from them."""
    interval: int = 100
    """Steps between checkpoints. 0: only at the end."""
    keep_latest_k: int = 2
    """Checkpoints to keep; older ones are deleted. 0: all."""
    async_mode: Literal["disabled", "async"] = "disabled"
    """async: write in the background while training goes on."""
    load_step: int = -1
    """The step to resume from. -1: the newest intact one, if any; 0: start afresh."""
    allow_changes: bool = False
    """Resume although models, data or objective are not the checkpoint's; says what differs."""


@dataclass
class Export:
    interval: int = 0
    """Steps between exports to a Hugging Face folder. 0: only at the end."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the exported weights. auto: that of the student's own checkpoint."""


@dataclass
class ValidationSet:
    """One [[validation.sets]]. What it leaves out is as in [validation]."""

    name: str = ""
    """What its figures are called: letters, digits, `_`, `-` and dots. Required."""
    dataset: Literal["", "gsm8k", "openthoughts3", "prompts"] = ""
    """What the rows look like. Empty: validation.dataset, else data.dataset."""
    path: str = ""
    """A local file, a save_to_disk folder or a hub id. Empty: the hub id of this row's own dataset,
    without one validation.path, else data.path."""
    split: str = ""
    """The split to take. Empty: validation.split."""
    max_prompts: int = 0
    """Use the first so many prompts. 0: validation.max_prompts."""
    grader: str = ""
    """What tells right from wrong. Empty: validation.grader."""
    teacher: str = ""
    """The name of the [[teacher.models]] that the student is measured against. Required where there
    are several."""


@dataclass
class Validation:
    enable: bool = True
    """Measure accuracy on held-out prompts, of the student at step 0 and of the teacher once."""
    interval: int = 50
    """Steps between validations. 0: only at the start and at the end."""
    dataset: Literal["", "gsm8k", "openthoughts3", "prompts"] = ""
    """What the rows look like. Empty: data.dataset."""
    path: str = ""
    """A local file, a save_to_disk folder or a hub id. Empty: data.path."""
    split: str = "test"
    """The split to validate on."""
    max_prompts: int = 0
    """Use the first so many prompts. 0: all."""
    grader: str = "auto"
    """What tells right from wrong, here and in written rollouts: auto, gsm8k, math, boxed, choice,
    exact, or your own `package.module:function` of response and answer. docs/evaluation.md."""
    samples_per_prompt: int = 1
    """Responses per prompt; accuracy is the mean over them. More than 1 needs a temperature."""
    temperature: float = 0.0
    """Sampling temperature. 0: greedy."""
    max_new_tokens: int = 0
    """Longest response. 0: rollout.max_new_tokens."""
    sets: list[ValidationSet] = field(default_factory=list)
    """Several sets at once, as [[validation.sets]] tables; accuracy is then their mean. A list
    replaces the parent recipe's as a whole. Empty: the one that this table names; where that names
    none either, the validation.split of each of [[data.sets]]."""


@dataclass
class Evaluate:
    """For `python -m opd_titan.evaluate` alone; what it measures on is in [validation]."""

    model: str = ""
    """The model to grade: student, teacher (of several, teacher.<name>), a local Hugging Face
    folder, a hub id, or a training checkpoint (`<dump_folder>/checkpoint/step-N`). Empty:
    student."""
    folder: str = ""
    """Where the results go. Empty: `<dump_folder>/evaluation/<model>`, with a number behind it
    where an earlier result is there."""


@dataclass
class Metrics:
    log_freq: int = 1
    """Steps between records (console line and TensorBoard)."""
    enable_tensorboard: bool = True
    """Write TensorBoard scalars to the dump folder."""
    sample_rollouts: int = 4
    """Rollouts written to the dump folder each step. 0: none; -1: all. Ranks and alternatives come
    from logits that are made anyway: where the vocabulary is most of the model, one response in 16
    costs 2 % of a step and all of them 14 % (docs/viewer.md)."""
    keep_rollouts: int = 1000
    """Steps whose rollouts stay in the dump folder, the newest ones. 0: all."""


@dataclass
class Watchdog:
    action: Literal["off", "warn", "stop", "rollback"] = "warn"
    """What to do about signs that the run goes wrong. warn: a line that names the sign, the likely
    cause and the option to change. stop: that, and exit code 1. rollback: back to the newest
    checkpoint from before the sign, and on with half the learning rate; at most three times."""


@dataclass
class Profiling:
    enable: bool = False
    """Write torch profiler traces to the dump folder."""
    interval: int = 10
    """Steps between traces."""


@dataclass
class Comm:
    init_timeout_seconds: int = 300
    """Timeout of collectives while models and data are loaded, or downloaded on some node."""
    train_timeout_seconds: int = 3600
    """Timeout of collectives from then on; longer than the slowest rank may lag in a rollout."""


@dataclass
class JobConfig:
    """Distil a teacher into a student on the student's own samples.

    Options come from the command line, else from the TOML file, else from the defaults below.
    Lists of tables, such as [[validation.sets]], are given as a whole: in the TOML file, or as one
    TOML array, --validation.sets '[{name = "a", path = "a.jsonl"}]'.
    """

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
