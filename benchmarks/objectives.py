"""What each objective costs and what it teaches.

    python benchmarks/objectives.py cost --shape small --data ../shared/data    # or --shape 0.6B
    python benchmarks/objectives.py memory
    python benchmarks/objectives.py table --seeds 3

cost: an update of each objective on the same batch beside the sampled-token policy gradient's, in
turns. memory: the peak of an update over 8k tokens at growing vocabularies, beside full logits.
table: the debug recipe under every objective, beside a control without a teacher; TRL's trainer on
the same task: objectives_trl.py.
A whole step beside TRL's: compare_trl.py.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO), str(REPO / "benchmarks")]

# What differs from the recipe, by the name in the tables.
CASES: dict[str, dict[str, object]] = {
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
    "forward_kl, off-policy": {
        "distill.objective": "forward_kl",
        "rollout.on_policy_fraction": 0.0,
        "rollout.group_size": 1,
        "rollout.prompts_per_step": 128,
    },
    "sft": {
        "distill.objective": "sft",
        "rollout.on_policy_fraction": 0.0,
        "rollout.group_size": 1,
        "rollout.prompts_per_step": 128,
    },
}
CONTROL = "no teacher: advantage -1"
SHAPES = {
    "small": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "head_dim": 16},
    "0.6B": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
}


def read_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tb"))
    events.Reload()
    names = events.Tags()["scalars"]
    return {n: [(e.step, e.value) for e in events.Scalars(n)] for n in names}


def run(options: dict[str, object], threads: int, *head: str) -> dict[str, list]:
    """One job in a process of its own; its scalars."""
    command = [sys.executable, *(head or ("-m", "opd_titan.train"))]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    env = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=REPO)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return read_scalars(Path(str(options["job.dump_folder"])))


# ----------------------------------------------------------------------- cost


def measure_cost(a: argparse.Namespace) -> None:
    from transformers import Qwen3Config

    names = a.only or ["policy_gradient", "reverse_kl", "forward_kl", "jsd, beta 0.5"]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        shape = {**heads, **SHAPES[a.shape]}
        Qwen3Config(
            vocab_size=151936, tie_word_embeddings=True, eos_token_id=151645, **shape
        ).save_pretrained(model)
        for path in (a.data / "qwen3_tokenizer").glob("*.json"):
            (model / path.name).write_bytes(path.read_bytes())
        for _ in range(a.rounds):
            for name in names:
                found[name].append(_phases(name, model, Path(folder) / "out", a))
    print(
        f"{platform.machine()}, {a.threads} threads, {a.shape}, {a.batch} x {a.new_tokens} tokens"
    )
    base = found["policy_gradient"]
    for name in names:
        rows = found[name]
        ratios = [
            (r["both"] / b["both"], r["peak"] / b["peak"]) for r, b in zip(rows, base, strict=True)
        ]
        print(
            f"{name}: teacher + update "
            + ", ".join(f"{r['teacher']:.2f} + {r['update']:.2f}" for r in rows)
            + f" s; ratio {statistics.median(r[0] for r in ratios):.2f}; peak "
            + ", ".join(f"{r['peak']:.2f}" for r in rows)
            + f" GiB, ratio {statistics.median(r[1] for r in ratios):.2f}",
            flush=True,
        )


def _phases(name: str, model: Path, out: Path, a: argparse.Namespace) -> dict[str, float]:
    """Median seconds of scoring and update after the first step, and the peak memory."""
    options = {
        "job.dump_folder": out,
        "student.hf_path": model,
        "student.random_init": "true",
        "teacher.hf_path": model,
        "teacher.random_init": "true",
        "data.path": a.data / "gsm8k",
        "rollout.prompts_per_step": a.batch,
        "rollout.group_size": 1,
        "rollout.max_new_tokens": a.new_tokens,
        "rollout.ignore_eos": "true",
        "training.steps": a.steps,
        "validation.enable": "false",
        "checkpoint.enable": "false",
        **CASES[name],
    }
    for path in out.glob("tb/*"):
        path.unlink()
    scalars = run(options, a.threads)
    values = {
        n: statistics.median(v for step, v in rows if step > 1) for n, rows in scalars.items()
    }
    teacher, update = values["time/teacher(s)"], values["time/update(s)"]
    peak = max(v for _, v in scalars["memory/max_active(GiB)"])
    return {"teacher": teacher, "update": update, "both": teacher + update, "peak": peak}


# --------------------------------------------------------------------- memory


def measure_memory(a: argparse.Namespace) -> None:
    tokens = 8192
    for vocab in (38016, 75904, 151936):
        full = tokens * vocab * 4 / 2**30
        for objective in ("policy_gradient", "reverse_kl", "jsd"):
            command = [sys.executable, __file__, "_peak", objective, str(tokens), str(vocab)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            peak, head = map(float, done.stdout.split())
            print(
                f"{objective}, vocabulary {vocab}, {tokens} tokens: {peak:.2f} GiB, of which the "
                f"head's gradients {head:.2f}; one tensor of full logits {full:.2f}",
                flush=True,
            )


def peak_of_update(objective: str, tokens: int, vocab: int) -> None:
    """Print the GiB that the head's forward and backward add, and the weight's gradients' share."""
    import torch

    from opd_titan.distill.head import FrozenHeads, loss_head
    from opd_titan.distill.objectives import OBJECTIVES, ObjectiveSettings
    from opd_titan.distill.vocabulary import TokenScores
    from opd_titan.models.logits import Distribution, VocabHead

    torch.manual_seed(0)
    width = 64
    hidden, teacher_hidden = torch.randn(2, tokens, width)
    weight, teacher_weight = 0.1 * torch.randn(2, vocab, width)
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    targets = torch.randint(vocab, (tokens,))
    zeros = torch.zeros(tokens)
    settings = ObjectiveSettings()
    whole = OBJECTIVES[objective].needs_vocabulary(settings)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loss, _ = loss_head(
        hidden,
        weight,
        predict_R=torch.arange(tokens),
        targets_R=targets,
        scores=TokenScores(zeros, zeros, None, teacher_hidden if whole else None),
        scale=1.0 / tokens,
        objective=OBJECTIVES[objective],
        settings=settings,
        dist=Distribution(),
        frozen=FrozenHeads(VocabHead(teacher_weight) if whole else None),
    )
    loss.backward()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print((after - before) / 2**20, weight.numel() * 4 / 2**30)


# ---------------------------------------------------------------------- table


def measure_table(a: argparse.Namespace) -> None:
    names = a.only or [*CASES, CONTROL]
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            runs = [_learn(name, seed, Path(folder) / f"{seed}", a) for seed in range(a.seeds)]
            variance = _variance(name, a) if name in CASES else None
            print(json.dumps({"case": name, **_summary(runs), "variance": variance}), flush=True)


def _learn(name: str, seed: int, out: Path, a: argparse.Namespace) -> dict[str, list]:
    options = {
        "job.config_file": REPO / "train_configs" / "debug.toml",
        "job.dump_folder": out / name.replace(" ", "_"),
        "training.seed": seed,
        "validation.interval": 5,
        "checkpoint.enable": "false",
        **CASES.get(name, {}),
    }
    head = (__file__, "_control") if name == CONTROL else ()
    return run(options, a.threads, *head)


def _summary(runs: list[dict[str, list]]) -> dict[str, object]:
    """Gap recovered at the end, the first step at 80 % of the gap, seconds of a step."""
    gaps = [_gap_recovered(r) for r in runs]
    reached = [min((s for s, gap in g.items() if gap >= 0.8), default=None) for g in gaps]
    seconds = [statistics.median(v for _, v in r["time/step(s)"]) for r in runs]
    kls = [r["kl/student_teacher"][-1][1] for r in runs if "kl/student_teacher" in r]
    return {
        "gap_recovered": [round(g[max(g)], 3) for g in gaps],
        "steps_to_80": reached,
        "kl_at_end": [round(v, 4) for v in kls],
        "step_s": [round(v, 3) for v in seconds],
    }


def _gap_recovered(scalars: dict[str, list]) -> dict[int, float]:
    """By step. Without a teacher, as if there were the debug recipe's, which is always right."""
    if "validation/gap_recovered" in scalars:
        return dict(scalars["validation/gap_recovered"])
    (_, start), *later = scalars["validation/accuracy"]
    return {step: (value - start) / (1.0 - start) for step, value in later}


def _variance(name: str, a: argparse.Namespace, batches: int = 8) -> float:
    """Of the gradient at the start, over batches: its trace, over the squared norm of the mean."""
    options = {
        "job.config_file": REPO / "train_configs" / "debug.toml",
        "training.steps": batches,
        "validation.enable": "false",
        "checkpoint.enable": "false",
        **CASES[name],
    }
    command = [sys.executable, __file__, "_variance"]
    with tempfile.TemporaryDirectory() as out:
        for key, value in {**options, "job.dump_folder": out}.items():
            command += [f"--{key}", str(value)]
        env = {**os.environ, "OMP_NUM_THREADS": str(a.threads)}
        done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=REPO)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return float(done.stdout.strip().splitlines()[-1])


def variance_at_start(argv: list[str]) -> None:
    import torch

    from opd_titan.config.manager import load_config
    from opd_titan.distill.scoring import gathered_heads
    from opd_titan.distill.update import forward_backward
    from opd_titan.distributed.heartbeat import Heartbeat
    from opd_titan.distributed.stopping import StopRequest
    from opd_titan.training.trainer import Trainer

    trainer = Trainer(load_config(argv), StopRequest(), Heartbeat(0, 600))
    trainer.weights.sync()
    gradients = []
    frozen = trainer.scored if trainer.rule.needs_vocabulary else {}
    for _ in range(trainer.total_steps):
        trainer.step += 1
        plan = trainer.plan(trainer.rollout(next(trainer.job.loader)))
        for role in ("teacher", "reference"):
            trainer.score(role, plan)
        with gathered_heads(frozen) as heads:
            for part in plan:
                for samples in part.microbatches:
                    tokens = part.response_tokens
                    rule, world = trainer.rule, trainer.world
                    forward_backward(trainer.student, samples, tokens, rule, world, heads)
        parameters = [p for p in trainer.student.parameters() if p.grad is not None]
        gradients.append(torch.cat([p.grad.full_tensor().flatten() for p in parameters]))
        trainer.optimizer.zero_grad()
    stacked = torch.stack(gradients)
    print((stacked.var(dim=0).sum() / stacked.mean(dim=0).square().sum()).item())


def control(argv: list[str]) -> int:
    """The policy gradient with the advantage -1 for every token: is the teacher worth anything?"""
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
    hidden = {
        "_peak": lambda argv: peak_of_update(argv[0], int(argv[1]), int(argv[2])),
        "_variance": variance_at_start,
        "_control": lambda argv: sys.exit(control(argv)),
    }
    if sys.argv[1:] and sys.argv[1] in hidden:
        hidden[sys.argv[1]](sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["cost", "memory", "table"])
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--data", type=Path, help="has gsm8k/ and qwen3_tokenizer/; for cost")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only", action="append", choices=[*CASES, CONTROL])
    a = parser.parse_args()
    {"cost": measure_cost, "memory": measure_memory, "table": measure_table}[a.part](a)


if __name__ == "__main__":
    main()
