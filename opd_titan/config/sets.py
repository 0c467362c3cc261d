"""Which teachers, data sets and validation sets a job has, with all that they leave to other keys
filled in. Where a recipe lists none, there is the one of its table, without a name."""

from __future__ import annotations

from dataclasses import replace

from opd_titan.config.job_config import DataSet, JobConfig, TeacherModel, ValidationSet


def teachers(config: JobConfig) -> list[TeacherModel]:
    """[[teacher.models]] or that of [teacher]; none where the objective is sft."""
    if config.distill.objective == "sft":
        return []
    return config.teacher.models or [TeacherModel(hf_path=config.teacher.hf_path)]


def teacher_role(name: str) -> str:
    """What a teacher is called among the job's models."""
    return f"teacher.{name}" if name else "teacher"


def is_teacher(role: str) -> bool:
    return role.partition(".")[0] == "teacher"


def data_sets(config: JobConfig) -> list[DataSet]:
    """[[data.sets]], or that of [data]."""
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
    """[[validation.sets]]; else that of [validation], or of each data set where it names none."""
    v, data = config.validation, config.data
    if data.sets and not (v.sets or v.dataset or v.path):
        return [
            ValidationSet(s.name, s.dataset, s.path, v.split, v.max_prompts, v.grader, s.teacher)
            for s in data_sets(config)
        ]
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
                teacher=_teacher_of(row, config),
            )
        )
    return found


def _teacher_of(row: DataSet | ValidationSet, config: JobConfig) -> str:
    names = [model.name for model in teachers(config)]
    if not names:  # sft
        return ""
    return row.teacher or (names[0] if len(names) == 1 else "")
