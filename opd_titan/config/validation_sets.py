"""Which sets a job validates on, with everything that they leave to other keys filled in."""

from __future__ import annotations

from dataclasses import replace

from opd_titan.config.job_config import JobConfig, ValidationSet


def validation_sets(config: JobConfig) -> list[ValidationSet]:
    """[[validation.sets]], or where there are none the one set of [validation], without a name."""
    v, data = config.validation, config.data
    dataset = v.dataset or data.dataset
    found = []
    for row in v.sets or [ValidationSet()]:
        # Another kind of rows does not lie where [validation]'s do.
        elsewhere = row.dataset not in ("", dataset)
        found.append(
            replace(
                row,
                dataset=row.dataset or dataset,
                path=row.path or ("" if elsewhere else v.path or data.path),
                split=row.split or v.split,
                max_prompts=row.max_prompts or v.max_prompts,
                grader=row.grader or v.grader,
            )
        )
    return found
