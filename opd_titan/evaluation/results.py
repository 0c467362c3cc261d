"""What an evaluation leaves behind: results.json, samples.jsonl, the recipe, a table for people."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from opd_titan import __version__
from opd_titan.checkpoint.faults import name_file_in_errors
from opd_titan.config import RECIPE_FILE, JobConfig, to_toml
from opd_titan.distributed.agreement import raise_on_all_ranks
from opd_titan.errors import ConfigError
from opd_titan.evaluation.metrics import Measurement, SetResult, percent
from opd_titan.evaluation.statistics import CONFIDENCE
from opd_titan.observability.rollout_writer import json_line

RESULTS, SAMPLES = "results.json", "samples.jsonl"
_PACKAGES = ("torch", "transformers", "tokenizers", "math-verify")
METHODS = {
    "one": "Wilson score interval over prompts",
    "several": "Wilson score interval at the effective number of independent samples, by the "
    "clustered standard error over prompts",
    "sets": "of the mean of independent sets, from their intervals (MOVER)",
}


def claim_folder(config: JobConfig, name: str) -> Path:
    """The folder for the results, made and writable, without an earlier result. All ranks call.

    Raises:
        ConfigError: it cannot be written, or `evaluate.folder` has a result already.
    """
    found: list[Any] = [None]
    with raise_on_all_ranks():
        if dist.get_rank() == 0:
            found = [_claim(config, name)]
    dist.broadcast_object_list(found)
    return Path(found[0])


def _claim(config: JobConfig, name: str) -> str:
    asked = config.evaluate.folder
    key = "[evaluate] folder" if asked else "[job] dump_folder"
    first = Path(asked) if asked else Path(config.job.dump_folder) / "evaluation" / name
    folders = (first if n == 1 else first.with_name(f"{first.name}-{n}") for n in count(1))
    try:
        for folder in folders:
            if not (folder / RESULTS).exists():
                folder.mkdir(parents=True, exist_ok=True)
                probe = folder / ".writable"
                probe.touch()
                probe.unlink()
                return str(folder)
            if asked:
                raise ConfigError(f"{key}: {folder} holds an earlier result; choose another folder")
    except OSError as error:
        raise ConfigError(
            f"{key}: {first} cannot be written ({error.strerror}); choose a folder that can"
        ) from error
    raise AssertionError("there is always another number")


def write_results(
    folder: Path,
    config: JobConfig,
    model: dict[str, Any],
    dtype: torch.dtype,
    measured: Measurement,
    decode: Callable[[list[int]], str],
) -> None:
    """Write all files, results.json last: where it is, the others are whole. Rank 0 calls.

    Args:
        model: name, weights and size of what was graded, as results.json has them.

    Raises:
        StorageError: a file could not be written.
    """
    with name_file_in_errors(folder / RECIPE_FILE):
        (folder / RECIPE_FILE).write_text(to_toml(config), encoding="utf-8")
    with name_file_in_errors(folder / SAMPLES):
        with (folder / SAMPLES).open(
            "w", encoding="utf-8", errors="backslashreplace", newline="\n"
        ) as file:
            for result in measured.sets:
                file.writelines(_sample_lines(result, decode))
    content = json.dumps(summary(config, model, dtype, measured), indent=1, ensure_ascii=False)
    part = folder / f"{RESULTS}.tmp"
    with name_file_in_errors(folder / RESULTS):
        part.write_text(content + "\n", encoding="utf-8")
        part.replace(folder / RESULTS)


def _sample_lines(result: SetResult, decode: Callable[[list[int]], str]) -> Iterator[str]:
    for sample, grade in zip(result.samples, result.grades, strict=True):
        yield json_line(
            {
                "set": result.held_out.name,
                "prompt_index": sample.prompt.index,
                "sample_index": sample.sample_index,
                "prompt": sample.prompt.text,
                "response": decode(sample.response_ids),
                "answer": sample.prompt.answer,
                "extracted": grade.extracted,
                "correct": grade.score,
                "finish_reason": sample.finish_reason,
                "response_tokens": len(sample.response_ids),
            }
        )


def summary(
    config: JobConfig, model: dict[str, Any], dtype: torch.dtype, measured: Measurement
) -> dict[str, Any]:
    """results.json: figures, the conditions they were measured under, versions."""
    v, sampled = config.validation, measured.sets[0]
    several = len(sampled.samples) > len(sampled.held_out.prompts)
    method = METHODS["several" if several else "one"]
    return {
        "model": model,
        "accuracy": measured.accuracy,
        "interval": list(measured.interval),
        "confidence": CONFIDENCE,
        "interval_method": f"{method}; {METHODS['sets']}" if len(measured.sets) > 1 else method,
        "pass_at_k": measured.pass_at,
        "sets": [_set_summary(result) for result in measured.sets],
        "settings": {
            "samples_per_prompt": v.samples_per_prompt,
            "temperature": v.temperature,
            "max_new_tokens": v.max_new_tokens or config.rollout.max_new_tokens,
            "template": config.data.template,
            "enable_thinking": config.data.enable_thinking,
            "max_prompt_tokens": config.data.max_prompt_tokens,
            "seed": config.training.seed,
            "dtype": str(dtype).removeprefix("torch."),
            "processes": dist.get_world_size(),
        },
        "versions": versions(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _set_summary(result: SetResult) -> dict[str, Any]:
    return {
        "name": result.held_out.name,
        "source": result.held_out.source,
        "grader": result.held_out.grader.name,
        "prompts": len(result.held_out.prompts),
        "samples": len(result.samples),
        "accuracy": result.accuracy,
        "interval": list(result.interval),
        "pass_at_k": result.pass_at,
        "response_tokens_mean": result.response_tokens_mean,
        "truncated_fraction": result.truncated_fraction,
    }


def versions() -> dict[str, str]:
    found = {"opd_titan": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def table(name: str, measured: Measurement) -> str:
    """A row for each set and, where there are several, one for all together."""
    columns = ["set", "prompts", "samples", "accuracy", "95 % interval"]
    ks = [k for k in measured.pass_at if k > 1]
    columns += [*(f"pass@{k}" for k in ks), "tokens", "cut"]
    rows = [columns]
    for s in measured.sets:
        sizes = [str(len(s.held_out.prompts)), str(len(s.samples))]
        own = [f"{s.response_tokens_mean:.1f}", f"{s.truncated_fraction:.1%}"]
        label = s.held_out.name or Path(s.held_out.source).name
        rows.append([label, *sizes, *_figures(Measurement([s]), ks), *own])
    if len(measured.sets) > 1:
        rows.append(["mean", "", "", *_figures(measured, ks), "", ""])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([f"Evaluation of {name}", *lines])


def _figures(measured: Measurement, ks: list[int]) -> list[str]:
    shares = [f"{measured.pass_at[k]:.1%}" for k in ks]
    return [f"{measured.accuracy:.1%}", percent(measured.interval), *shares]
