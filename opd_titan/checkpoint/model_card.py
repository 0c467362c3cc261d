"""The README.md of an exported folder: the origin of the weights, and validation results."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from importlib.metadata import version

from huggingface_hub import EvalResult, ModelCardData

from opd_titan import __version__
from opd_titan.config import to_toml
from opd_titan.config.resolve import ResolvedJob
from opd_titan.data.hub import looks_like_hub_id
from opd_titan.data.sources import DATASETS

_CARD = """\
---
{front_matter}
---

# {title}

The student of an on-policy distillation by opd_titan {version}, after {step} steps.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("<this folder>")
tokenizer = AutoTokenizer.from_pretrained("<this folder>")
```

| | |
|---|---|
{table}

<details><summary>The recipe</summary>

```toml
{recipe}
```

</details>
"""


def model_card(job: ResolvedJob, step: int, scalars: Mapping[str, float]) -> str:
    """Return the card: Markdown with the hub's front matter.

    Args:
        scalars: the last values by TensorBoard name; the card omits absent values.
    """
    config, r = job.config, job.config.rollout
    teachers = ((role.partition(".")[2], job.models[role].path) for role in job.teachers)
    rows: list[tuple[str, object]] = [
        ("student", config.student.hf_path),
        ("teacher", _listed(teachers) or "none"),
        ("objective", config.distill.objective),
        ("reference coefficient", config.reference.coef),
        ("on-policy fraction", r.on_policy_fraction),
        ("data", _listed((s.name, f"{s.dataset} {s.path} {s.split}") for s in job.data_sets)),
        ("template", config.data.template),
        ("steps", step),
        ("prompts x responses per step", f"{r.prompts_per_step} x {r.group_size}"),
        ("temperature, top-p, top-k", f"{r.temperature}, {r.top_p}, {r.top_k}"),
        ("peak learning rate", config.optimizer.lr),
        ("seed", config.training.seed),
    ]
    names = [name for name in sorted(scalars) if name.startswith("validation/")]
    names += ["kl/student_teacher"] if "kl/student_teacher" in scalars else []
    rows += [(name, f"{scalars[name]:.4f}") for name in names]
    rows += [(name, version(name)) for name in ("torch", "transformers")]
    title = " ".join(config.job.description.split()) or "A distilled model"
    return _CARD.format(
        front_matter=_front_matter(job, title, scalars).to_yaml(),
        title=title,
        version=__version__,
        step=step,
        table="\n".join(f"| {name} | {_cell(value)} |" for name, value in rows),
        recipe=to_toml(config).strip(),
    )


def _front_matter(job: ResolvedJob, title: str, scalars: Mapping[str, float]) -> ModelCardData:
    """Return the metadata for the hub. It has only hub ids; local paths are in the table alone."""
    sets, results = job.validation_sets, []
    for row in sets:
        name = "validation/accuracy" if len(sets) == 1 else f"validation/{row.name}/accuracy"
        if name in scalars:
            result = EvalResult(
                task_type="text-generation",
                dataset_type=_data_id(row.dataset, row.path) or row.dataset,
                dataset_name=row.name or row.dataset,
                dataset_split=row.split,
                metric_type="accuracy",
                metric_value=round(scalars[name], 4),
            )
            results.append(result)
    trained_on = list(filter(None, (_data_id(s.dataset, s.path) for s in job.data_sets)))
    return ModelCardData(
        model_name=title if results else None,
        base_model=_hub_id(job.models["student"].path),
        datasets=trained_on or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["on-policy-distillation", "opd_titan"],
        eval_results=results or None,
    )


def _listed(rows: Iterable[tuple[str, str]]) -> str:
    """Return `name: text` of each row, or its text alone if it has no name."""
    return ", ".join(f"{name}: {what}" if name else what for name, what in rows)


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _hub_id(path: str) -> str | None:
    return path if looks_like_hub_id(path) and not os.path.exists(path) else None


def _data_id(dataset: str, path: str) -> str | None:
    return _hub_id(path) if path else DATASETS[dataset].hub_id or None
