"""The README.md of an exported folder: where the weights come from and what was measured."""

from __future__ import annotations

from collections.abc import Mapping

from opd_titan import __version__
from opd_titan.config import JobConfig


def model_card(config: JobConfig, step: int, scalars: Mapping[str, float]) -> str:
    """Markdown with the hub's front matter.

    Args:
        scalars: the last values by TensorBoard name; absent ones are left out.
    """
    rows = [
        ("student", config.student.hf_path),
        ("teacher", config.teacher.hf_path or "none"),
        ("objective", config.distill.objective),
        ("reference coefficient", config.reference.coef),
        ("data", f"{config.data.dataset} {config.data.path} {config.data.split}"),
        ("template", config.data.template),
        ("steps", step),
        ("prompts x responses per step", _batch(config)),
        ("temperature, top-p, top-k", _sampling(config)),
        ("peak learning rate", config.optimizer.lr),
        ("seed", config.training.seed),
    ]
    names = ("validation/accuracy", "validation/teacher_accuracy", "validation/gap_recovered")
    rows += [(n, f"{scalars[n]:.4f}") for n in (*names, "kl/student_teacher") if n in scalars]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n"
        "tags: [on-policy-distillation, opd_titan]\n---\n\n"
        f"# {config.job.description or 'A distilled model'}\n\n"
        f"Made by opd_titan {__version__}.\n\n| | |\n|---|---|\n{table}\n"
    )


def _batch(config: JobConfig) -> str:
    return f"{config.rollout.prompts_per_step} x {config.rollout.group_size}"


def _sampling(config: JobConfig) -> str:
    r = config.rollout
    return f"{r.temperature}, {r.top_p}, {r.top_k}"
