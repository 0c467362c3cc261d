"""What each objective teaches, and the memory of its head. What they cost: `step.py objectives`.

    python benchmarks/objectives.py table --seeds 3 --threads 1
    python benchmarks/objectives.py memory

table: the debug recipe under every objective, and a control without a teacher.
memory: the peak of the head over 8,192 tokens at growing vocabularies, beside one tensor of logits.
"""

from __future__ import annotations

import os
import resource
import statistics
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

from harness import (
    NO_PAUSES,
    REPO,
    Record,
    emit,
    machine,
    open_trainer,
    parser,
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
# By the name in the table, the options beside those of the recipe.
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
WIDTH = 64  # of the head alone


# ---------------------------------------------------------------------- table


def measure_table(a: Any) -> None:
    """Train with every objective and seed, and measure the variance of the gradient."""
    rows = []
    for name in a.only or [*CASES, CONTROL]:
        runs = [_learn(name, seed, a) for seed in range(a.seeds)]
        gaps = [_gap_recovered(r) for r in runs]
        last_kl = [[*r["kl/student_teacher"].values()][-1] for r in runs if _has_teacher(r)]
        row: Record = {
            "objective": name,
            "gap recovered at the end": [gap[max(gap)] for gap in gaps],
            "first step at 80 %": [min((s for s in g if g[s] >= 0.8), default=None) for g in gaps],
            "KL at the end": last_kl,
            "s / step": [statistics.median(r["time/step(s)"].values()) for r in runs],
        }
        if name in CASES:
            row["variance"] = _variance(name, a)
        emit(row)
        rows.append(row)
    print(table(rows))


def _has_teacher(scalars: Mapping[str, Any]) -> bool:
    return "kl/student_teacher" in scalars


def _recipe(name: str, steps: int) -> Record:
    return {
        "job.config_file": REPO / "train_configs" / "debug.toml",
        "training.steps": steps,
        "checkpoint.enable": "false",
        **CASES.get(name, {}),
    }


def _learn(name: str, seed: int, a: Any) -> dict[str, dict[int, float]]:
    options = _recipe(name, a.steps) | {"training.seed": seed, "validation.interval": 5}
    program = {"program": (__file__, "_control")} if name == CONTROL else {}
    with tempfile.TemporaryDirectory() as out:
        return train(options | {"job.dump_folder": out}, a.threads, **program)


def _gap_recovered(scalars: Mapping[str, dict[int, float]]) -> dict[int, float]:
    """Return it by step. Without a teacher, that of the debug recipe counts: always right."""
    if "validation/gap_recovered" in scalars:
        return scalars["validation/gap_recovered"]
    accuracy = scalars["validation/accuracy"]
    return {s: (v - accuracy[0]) / (1.0 - accuracy[0]) for s, v in accuracy.items() if s}


def _variance(name: str, a: Any) -> float:
    with tempfile.TemporaryDirectory() as out:
        options = _recipe(name, a.batches) | NO_PAUSES
        options |= {"job.dump_folder": out, "training.max_grad_norm": 0}  # not clipped
        text = run([__file__, "_variance", *words(options)], a.threads)
    return float(text.strip().splitlines()[-1])


def print_variance(argv: list[str]) -> None:
    """Print the trace of the first gradient's covariance over batches / |mean gradient|^2."""
    import torch

    trainer = open_trainer(argv)
    gradients = []

    def take(optimizer: torch.optim.Optimizer, *_: object) -> None:
        """Keep the update's gradient, and remove it, so that the weights do not change."""
        with_grad = [p for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        gradients.append(torch.cat([p.grad.full_tensor().flatten() for p in with_grad]))
        for parameter in with_grad:
            parameter.grad = None

    trainer.models.optimizer.register_step_pre_hook(take)
    trainer.models.weights.sync()
    phases = trainer.phases
    for step in range(1, trainer.total_steps + 1):
        prompts, given_response = next(trainer.setup.loader), trainer.setup.given_response
        plan = phases.plan(phases.rollout(step, prompts, given_response))
        for role in trainer.models.frozen:
            phases.score(role, plan)
        phases.update(plan, rate=0.0)
    stacked = torch.stack(gradients)
    print((stacked.var(dim=0).sum() / stacked.mean(dim=0).square().sum()).item())


def train_control(argv: list[str]) -> None:
    """Train with an advantage of -1 for every token, to see what the teacher contributes."""
    import torch

    from opd_titan.distill import objectives
    from opd_titan.train import main as train

    @objectives.objective(whole=False)
    def without_teacher(rows: Any, settings: Any) -> objectives.TokenLoss:
        ratio_C = (rows.logprob_C - rows.logprob_C.detach()).exp()
        return objectives.TokenLoss(ratio_C, -torch.ones_like(rows.logprob_C.detach()))

    objectives.OBJECTIVES["policy_gradient"] = without_teacher
    sys.exit(train(argv))


# --------------------------------------------------------------------- memory


def measure_memory(a: Any) -> None:
    """Measure the head's peak for each vocabulary and objective, each in a new process."""
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


def print_peak(argv: list[str]) -> None:
    """Print the GiB that the forward and backward of the head add to this process."""
    import torch

    from opd_titan.distill.head import FrozenHeads, LossHead, LossRule
    from opd_titan.distill.objectives import OBJECTIVES, ObjectiveSettings
    from opd_titan.distill.vocabulary import TokenScores
    from opd_titan.models.logits import Distribution, VocabHead

    objective, (tokens, vocab) = OBJECTIVES[argv[0]], map(int, argv[1:])
    torch.manual_seed(0)
    hidden, teacher_hidden = torch.randn(2, tokens, WIDTH)
    weight, teacher_weight = 0.1 * torch.randn(2, vocab, WIDTH)
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    targets, zeros = torch.randint(vocab, (tokens,)), torch.zeros(tokens)
    settings = ObjectiveSettings()
    whole = objective.needs_vocabulary(settings)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    head = LossHead(
        LossRule(objective, settings, Distribution()),
        torch.arange(tokens),
        targets,
        TokenScores(zeros, zeros, None, teacher_hidden if whole else None),
        scale=1.0 / tokens,
        frozen=FrozenHeads(VocabHead(teacher_weight) if whole else None),
    )
    loss, _ = head(hidden, weight)
    loss.backward()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20)


def main() -> None:
    # What the functions above run in processes of their own.
    inner = {"_peak": print_peak, "_variance": print_variance, "_control": train_control}
    if sys.argv[1:2] and sys.argv[1] in inner:
        inner[sys.argv[1]](sys.argv[2:])
        return
    arguments = parser(__doc__)
    parts = {"table": measure_table, "memory": measure_memory}
    arguments.add_argument("part", choices=parts)
    arguments.add_argument("--threads", type=int, default=os.cpu_count())
    arguments.add_argument("--only", action="append", choices=[*CASES, CONTROL], help="table")
    arguments.add_argument("--seeds", type=int, default=3, help="table")
    arguments.add_argument("--steps", type=int, default=40, help="table")
    arguments.add_argument("--batches", type=int, default=8, help="table: of the variance")
    arguments.add_argument("--tokens", type=int, default=8192, help="memory")
    arguments.add_argument("--vocabularies", type=int, nargs="+", default=[38016, 75904, 151936])
    a = arguments.parse_args()
    emit(machine())
    parts[a.part](a)


if __name__ == "__main__":
    main()
