"""The rules between keys: what is accepted, and what is refused with both keys named."""

from __future__ import annotations

import pytest
from test_config import MODELS, refusal

from opd_titan.config import load_config

SFT = ["--student.hf_path", "s", "--distill.objective", "sft", "--rollout.on_policy_fraction", "0"]
SFT += ["--rollout.group_size", "1"]


@pytest.mark.parametrize(
    "argv",
    [
        SFT,
        [*SFT, "--lr_scheduler.decay", "cosine", "--training.steps", "2"],
        # A recipe cut short for a trial may end within its warm-up.
        [*MODELS, "--lr_scheduler.decay=linear", "--lr_scheduler.warmup_steps=900"],
        [*MODELS, "--validation.samples_per_prompt", "4", "--validation.temperature", "0.6"],
        [*MODELS, "--distill.minibatches", "128"],
        [*MODELS, "--data.dataset", "prompts", "--data.path", "x.jsonl"],
        [*MODELS, "--checkpoint.load_step", "0", "--checkpoint.no_enable"],
        [*MODELS, "--validation.dataset", "prompts", "--validation.no_enable"],
        [*MODELS, "--validation.dataset", "prompts", "--validation.path", "x.jsonl"],
        [*MODELS, "--checkpoint.keep_latest_k", "1"],
        [*MODELS, "--reference.coef", "1", "--reference.hf_path", "r"],
    ],
)
def test_accepted_combinations(argv: list[str]) -> None:
    load_config(argv)


# Two teachers, a data set and a validation set for each.
TWO = "--teacher.hf_path= --teacher.models [{name='a',hf_path='a'},{name='b',hf_path='b'}] "
TWO += "--data.sets [{name='x',teacher='a'},{name='y',teacher='b'}] "
TWO += "--validation.sets [{name='v',teacher='a'}]"
CONTRADICTIONS = [
    # models
    ("--student.hf_path= --student.random_init", "[student] hf_path: required", "a hub id"),
    ("--teacher.hf_path=", "[teacher] hf_path: required", "policy_gradient", "a hub id"),
    (
        "--teacher.hf_path= --teacher.random_init --distill.objective sft "
        "--rollout.on_policy_fraction 0",
        "[teacher] random_init: true needs the sizes in [teacher] hf_path",
    ),
    # data
    ("--data.dataset prompts", "[data] path: required", '"prompts"'),
    ("--validation.dataset prompts", "[validation] path: required", '"prompts"'),
    ("--data.enable_thinking --data.template raw", "[data] enable_thinking", 'template = "chat"'),
    ("--job.dump_folder s/../t/.", '[job] dump_folder: "s/../t/." is also [teacher] hf_path'),
    (
        "--validation.samples_per_prompt 4",
        "[validation] samples_per_prompt: 4 greedy samples",
        "temperature > 0",
    ),
    # several sets and teachers
    ("--validation.sets [{}]", 'validation.sets[0].name: "" is not a valid name'),
    ("--validation.sets [{name='a/b'}]", 'validation.sets[0].name: "a/b" is not a valid name'),
    (
        "--validation.sets [{name='a'},{name='b'},{name='a'}]",
        'validation.sets[2].name: "a" is already used',
    ),
    (
        "--validation.sets [{name='a',dataset='prompts'}]",
        'validation.sets[0].path: required with dataset = "prompts"',
    ),
    (
        "--validation.sets [{name='a',path='outputs'}]",
        '[job] dump_folder: "outputs" is also validation.sets[0].path',
    ),
    (
        "--teacher.models [{name='a',hf_path='x'}]",
        '[teacher] hf_path: "t" contradicts [[teacher.models]]; wanted only one of them',
    ),
    (
        "--teacher.hf_path= --teacher.models [{name='a'}]",
        "teacher.models[0].hf_path: required; give a local Hugging Face folder or a hub id",
    ),
    (
        TWO + " --data.sets [{name='x',teacher='a'}]",
        'teacher.models[1].name: no [[data.sets]] has teacher = "b"',
    ),
    (
        TWO + " --data.sets [{name='x',teacher='a'},{name='y'}]",
        "data.sets[1].teacher: required when there are several teachers",
        "wanted a or b",
    ),
    (
        TWO + " --data.sets [{name='x',teacher='a'},{name='y',teacher='c'}]",
        'data.sets[1].teacher: "c" is not the name of a teacher; wanted a or b',
    ),
    (
        "--data.sets [{name='x',teacher='a'}]",
        'data.sets[0].teacher: "a" is not the name of a teacher; wanted a name in [[',
    ),
    (TWO + " --validation.sets [{name='v'}]", "validation.sets[0].teacher: required when there"),
    (
        TWO + " --validation.sets [] --validation.path x",
        "validation.sets: required when there are several teachers",
    ),
    (TWO + " --training.epochs 1", "[training] epochs: 1 contradicts several [[data.sets]]"),
    # objectives
    (
        "--rollout.on_policy_fraction 0.5",
        "[rollout] on_policy_fraction: 0.5 contradicts",
        '"policy_gradient"',
        "the student's own samples; wanted 1.0",
    ),
    ("--distill.objective sft", "[rollout] on_policy_fraction: 1.0", '"sft"', "wanted 0.0"),
    (
        "--distill.objective jsd --rollout.on_policy_fraction 0",
        "[rollout] group_size: 4 contradicts on_policy_fraction = 0.0",
        "wanted 1",
    ),
    (
        "--distill.objective jsd --rollout.on_policy_fraction 0.5 --distill.minibatches 33",
        "[distill] minibatches: 33 is more than the 32 responses of a step",
        "prompts_per_step, if the student samples none",
        "at most 32",
    ),
    ("--distill.minibatches 129", "[distill] minibatches: 129", "group_size", "at most 128"),
    (
        "--rollout.max_tokens_per_step 127",
        "[rollout] max_tokens_per_step: 127 is less than one token for each of the 128 responses",
        "at least 128",
    ),
    (
        " ".join(SFT) + " --rollout.max_tokens_per_step 9",
        "[rollout] max_tokens_per_step: 9 contradicts on_policy_fraction = 0.0",
    ),
    (" ".join(SFT) + " --rollout.top_k 5", "[rollout] temperature: 1.0", "top_k 5", "wanted 1.0"),
    (" ".join(SFT) + " --reference.coef 1", "[reference] coef: 1.0 contradicts", '"sft"'),
    (
        "--distill.objective jsd --reference.coef -0.5",
        "[reference] coef: -0.5 contradicts",
        "wanted >= 0, or one of policy_gradient",
    ),
    (
        "--distill.objective reverse_kl --distill.baseline kl",
        '[distill] baseline: "kl" contradicts [distill] objective = "reverse_kl"',
        'wanted "none"',
    ),
    (
        "--distill.objective jsd --distill.reward_power 0.5",
        "[distill] reward_power: 0.5 contradicts",
        "wanted 0",
    ),
    (
        "--distill.reward_power 0.5 --distill.log_ratio_clamp 2",
        "[distill] log_ratio_clamp: 2.0 contradicts reward_power = 0.5",
    ),
    ("--distill.objective jsd --rollout.top_p 0.9", "[rollout] top_p: 0.9", '"jsd"', "wanted 1.0"),
    ("--distill.objective top_k_reverse_kl --rollout.top_k 9", "[rollout] top_k: 9", "wanted 0"),
    # checkpoints
    ("--checkpoint.load_step 5 --checkpoint.no_enable", "[checkpoint] load_step: 5", "enable"),
    ("--watchdog.action rollback --checkpoint.no_enable", "[watchdog] action: rollback needs"),
]


@pytest.mark.parametrize("case", CONTRADICTIONS, ids=lambda case: repr(case[0][-40:]))
def test_contradictions(case: tuple) -> None:
    line, *parts = case
    message = refusal([*MODELS, *line.split(" ")])
    assert all(part in message for part in parts), message
