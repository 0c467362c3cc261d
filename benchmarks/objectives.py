"""What each objective costs and what it teaches.

    python benchmarks/objectives.py cost --data ../shared/data
    python benchmarks/objectives.py memory
    python benchmarks/objectives.py table --seeds 3 --threads 1

cost: scoring and update under each objective beside the sampled-token policy gradient's, in turns.
memory: the peak of the head over 8k tokens at growing vocabularies, beside one tensor of logits.
table: the debug recipe under every objective, and a control without a teacher. The same task with
TRL's trainer: objectives_trl.py.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path

from compare_trl import workload
from harness import (
    NO_PAUSES,
    REPO,
    Record,
    alternate,
    emit,
    machine,
    medians,
    ratio,
    run,
    table,
    train,
    words,
)

OFF_POLICY: Record = {
    "rollout.on_policy_fraction": 0.0,
    "rollout.group_size": 1,
    "rollout.prompts_per_step": 128,
}
# What differs from the recipe, by the name in the tables.
CASES: dict[str, Record] = {
    "policy_gradient": {},
    "policy_gradient, baseline kl": {"distill.baseline": "kl"},
    "policy_gradient, baseline top_k": {"distill.baseline": "top_k"},
    "policy_gradient, reward_power 1": {"distill.reward_power": 1.0, "distill.log_ratio_clamp": 0},
    "reverse_kl": {"distill.objective": "reverse_kl"},
    "forward_kl": {"distill.objective": "forward_kl"},
    "jsd, beta 0.5": {"distill.objective": "jsd"},
    "top_k_reverse_kl": {"distill.objective": "top_k_reverse_kl"},
    "top_k_forward_kl": {"distill.objective": "top_k_forward_kl"},
    "reverse_kl, reference -0.3": {"distill.objective": "reverse_kl", "reference.coef": -0.3},
    "reverse_kl, reference 1": {"distill.objective": "reverse_kl", "reference.coef": 1.0},
    "forward_kl, half off-policy": {
        "distill.objective": "forward_kl",
        "rollout.on_policy_fraction": 0.5,
    },
    "forward_kl, off-policy": {"distill.objective": "forward_kl", **OFF_POLICY},
    "sft": {"distill.objective": "sft", **OFF_POLICY},
}
CONTROL = "no teacher: advantage -1"
COMPARED = ("policy_gradient", "reverse_kl", "forward_kl", "jsd, beta 0.5", "top_k_reverse_kl")


# ----------------------------------------------------------------------- cost


def measure_cost(a: argparse.Namespace) -> None:
    names = a.only or COMPARED
    with tempfile.TemporaryDirectory() as folder:
        options = workload(Path(folder), a.data) | {
            "rollout.max_new_tokens": a.new_tokens,
            "rollout.ignore_eos": "true",
            "training.steps": a.steps,
            "metrics.sample_rollouts": 0,
        }
        cases = {name: partial(_phases, options | CASES[name], a.threads) for name in names}
        found = alternate(cases, a.rounds)
    base = found[names[0]]
    rows = []
    for name, results in found.items():
        both, bases = ([r["teacher"] + r["update"] for r in x] for x in (results, base))
        peaks, base_peaks = ([r["peak"] for r in x] for x in (results, base))
        row: Record = {key: [r[key] for r in results] for key in ("teacher", "update", "peak")}
        row |= {"seconds, ratio": ratio(both, bases), "peak, ratio": ratio(peaks, base_peaks)}
        rows.append({"objective": name, **row})
    print(table(rows))


def _phases(options: Record, threads: int) -> Record:
    """Return the median seconds of scoring and update, and the peak memory in GiB."""
    with tempfile.TemporaryDirectory() as out:
        scalars = train(options | {"job.dump_folder": out}, threads)
    peak = max(scalars["memory/max_active(GiB)"].values())
    return medians(scalars, "time/teacher(s)", "time/update(s)") | {"peak": peak}


# --------------------------------------------------------------------- memory


def measure_memory(a: argparse.Namespace) -> None:
    rows = []
    for vocab in a.vocabularies:
        for objective in ("policy_gradient", "reverse_kl", "jsd"):
            text = run([__file__, "_peak", objective, a.tokens, vocab], a.threads)
            row: Record = {"vocabulary": vocab, "objective": objective, "peak GiB": float(text)}
            row["head's gradient GiB"] = vocab * WIDTH * 4 / 2**30
            row["full logits GiB"] = a.tokens * vocab * 4 / 2**30
            emit(row)
            rows.append(row)
    print(table(rows))


WIDTH = 64


def peak_of_update(objective: str, tokens: int, vocab: int) -> None:
    """Print the GiB that the forward and backward of the head add to this process."""
    import torch

    from opd_titan.distill.head import FrozenHeads, LossHead, LossRule
    from opd_titan.distill.objectives import OBJECTIVES, ObjectiveSettings
    from opd_titan.distill.vocabulary import TokenScores
    from opd_titan.models.logits import Distribution, VocabHead

    torch.manual_seed(0)
    hidden, teacher_hidden = torch.randn(2, tokens, WIDTH)
    weight, teacher_weight = 0.1 * torch.randn(2, vocab, WIDTH)
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    targets, zeros = torch.randint(vocab, (tokens,)), torch.zeros(tokens)
    settings = ObjectiveSettings()
    whole = OBJECTIVES[objective].needs_vocabulary(settings)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    head = LossHead(
        LossRule(OBJECTIVES[objective], settings, Distribution()),
        torch.arange(tokens),
        targets,
        TokenScores(zeros, zeros, None, teacher_hidden if whole else None),
        scale=1.0 / tokens,
        frozen=FrozenHeads(VocabHead(teacher_weight) if whole else None),
    )
    loss, _ = head(hidden, weight)
    loss.backward()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20)


# ---------------------------------------------------------------------- table


def measure_table(a: argparse.Namespace) -> None:
    rows = []
    for name in a.only or [*CASES, CONTROL]:
        runs = [_learn(name, seed, a) for seed in range(a.seeds)]
        gaps = [_gap_recovered(r) for r in runs]
        row: Record = {
            "objective": name,
            "gap recovered at the end": [gap[max(gap)] for gap in gaps],
            "first step at 80 %": [min((s for s in g if g[s] >= 0.8), default=None) for g in gaps],
            "KL at the end": [list(r["kl/student_teacher"].values())[-1]
                              for r in runs if "kl/student_teacher" in r],
            "s / step": [statistics.median(r["time/step(s)"].values()) for r in runs],
        }  # fmt: skip
        if name in CASES:
            row["variance"] = _variance(name, a)
        emit(row)
        rows.append(row)
    print(table(rows))


def _learn(name: str, seed: int, a: argparse.Namespace) -> dict[str, dict[int, float]]:
    options = _recipe(name, a.steps) | {"training.seed": seed, "validation.interval": 5}
    program = {"program": (__file__, "_control")} if name == CONTROL else {}
    with tempfile.TemporaryDirectory() as out:
        return train(options | {"job.dump_folder": out}, a.threads, **program)


def _recipe(name: str, steps: int) -> Record:
    common: Record = {
        "job.config_file": REPO / "train_configs" / "debug.toml",
        "training.steps": steps,
        "checkpoint.enable": "false",
    }
    return common | CASES.get(name, {})


def _gap_recovered(scalars: dict[str, dict[int, float]]) -> dict[int, float]:
    """By step. Without a teacher, as if there were the debug recipe's, which is always right."""
    if "validation/gap_recovered" in scalars:
        return scalars["validation/gap_recovered"]
    accuracy = scalars["validation/accuracy"]
    return {s: (v - accuracy[0]) / (1.0 - accuracy[0]) for s, v in accuracy.items() if s}


def _variance(name: str, a: argparse.Namespace) -> float:
    """Of the gradient at the start, over batches: its trace over the squared norm of the mean."""
    with tempfile.TemporaryDirectory() as out:
        options = _recipe(name, a.batches) | NO_PAUSES
        options |= {"job.dump_folder": out, "training.max_grad_norm": 0}  # not clipped
        text = run([__file__, "_variance", *words(options)], a.threads)
    return float(text.strip().splitlines()[-1])


def variance_at_start(argv: list[str]) -> None:
    import torch

    from opd_titan.config import load_config
    from opd_titan.config.resolve import resolve
    from opd_titan.distributed.heartbeat import Heartbeat
    from opd_titan.distributed.stopping import StopRequest
    from opd_titan.training.trainer import Trainer

    job = resolve(load_config(argv), "cpu", 1)
    trainer = Trainer(job, StopRequest(), Heartbeat(0, 600))
    gradients = []

    def take(optimizer: torch.optim.Optimizer, *_: object) -> None:
        """Keep the update's gradient, and let the weights stay as they are."""
        with_grad = [p for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        gradients.append(torch.cat([p.grad.full_tensor().flatten() for p in with_grad]))
        for parameter in with_grad:
            parameter.grad = None

    trainer.models.optimizer.register_step_pre_hook(take)
    trainer.models.weights.sync()
    phases = trainer.phases
    for step in range(1, trainer.total_steps + 1):
        plan = phases.plan(phases.rollout(step, next(trainer.setup.loader)))
        for role in trainer.models.frozen:
            phases.score(role, plan)
        phases.update(plan, 1.0)
    stacked = torch.stack(gradients)
    print((stacked.var(dim=0).sum() / stacked.mean(dim=0).square().sum()).item())


def control(argv: list[str]) -> int:
    """Train with an advantage of -1 for every token, to see what the teacher contributes."""
    import torch

    from opd_titan.distill import objectives
    from opd_titan.train import main as train

    @objectives.objective(whole=False)
    def without_teacher(rows, settings):  # noqa: ANN001, ANN202
        ratio_C = (rows.logprob_C - rows.logprob_C.detach()).exp()
        return objectives.TokenLoss(ratio_C, -torch.ones_like(rows.logprob_C.detach()))

    objectives.OBJECTIVES["policy_gradient"] = without_teacher
    return train(argv)


def main() -> None:
    inner = {
        "_peak": lambda argv: peak_of_update(argv[0], int(argv[1]), int(argv[2])),
        "_variance": variance_at_start,
        "_control": lambda argv: sys.exit(control(argv)),
    }
    if sys.argv[1:] and sys.argv[1] in inner:
        inner[sys.argv[1]](sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = {"cost": measure_cost, "memory": measure_memory, "table": measure_table}
    parser.add_argument("part", choices=parts)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only", action="append", choices=[*CASES, CONTROL])
    parser.add_argument("--steps", type=int, help="default: 4 for cost, 40 for table")
    parser.add_argument("--data", type=Path, help="cost: has gsm8k/ and qwen3_tokenizer/")
    parser.add_argument("--new-tokens", type=int, default=64, help="cost")
    parser.add_argument("--rounds", type=int, default=2, help="cost")
    parser.add_argument("--tokens", type=int, default=8192, help="memory")
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[38016, 75904, 151936])
    parser.add_argument("--seeds", type=int, default=3, help="table")
    parser.add_argument("--batches", type=int, default=8, help="table: of the variance")
    a = parser.parse_args()
    a.steps = a.steps or (4 if a.part == "cost" else 40)
    emit(machine())
    parts[a.part](a)


if __name__ == "__main__":
    main()
