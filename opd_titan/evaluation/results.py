"""Write the files of an evaluation (results.json, samples.jsonl, its recipe) and print a table."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch.distributed as dist

from opd_titan import __version__
from opd_titan.checkpoint.publish import name_file_in_errors
from opd_titan.config import RECIPE_FILE, to_toml
from opd_titan.config.resolve import ResolvedJob
from opd_titan.errors import ConfigError, reason
from opd_titan.evaluation.metrics import Measurement, SetResult, percent
from opd_titan.evaluation.statistics import CONFIDENCE
from opd_titan.observability.rollout_writer import json_line

RESULTS, SAMPLES = "results.json", "samples.jsonl"
_PACKAGES = ("torch", "transformers", "tokenizers", "math-verify")
WILSON = "Wilson score interval over prompts"
BOOTSTRAP = "percentile bootstrap over the prompts of each set"


def claim_folder(job: ResolvedJob, name: str) -> Path:
    """Make the folder for the results and return it. Rank 0 calls.

    It is `evaluate.folder`, else the first free one of `<dump_folder>/evaluation/<name>`, `-2`
    appended, `-3` appended, ...

    Raises:
        ConfigError: it cannot be written, or `evaluate.folder` contains a result already.
    """
    given = job.config.evaluate.folder
    key = "[evaluate] folder" if given else "[job] dump_folder"
    first = folder = Path(given or job.folder / "evaluation" / name)
    try:
        for number in count(2):
            if not (folder / RESULTS).exists():
                break
            if given:
                raise ConfigError(f"{key}: {folder} has an earlier result; choose another folder")
            folder = first.with_name(f"{first.name}-{number}")
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError(
            f"{key}: {folder} cannot be written ({reason(error)}); choose another folder"
        ) from error
    return folder


def write_results(
    folder: Path,
    job: ResolvedJob,
    model: dict[str, Any],
    measured: Measurement,
    decode: Callable[[list[int]], str],
) -> None:
    """Write all files. Rank 0 calls.

    results.json is written last, so that a folder that has it is complete.

    Args:
        model: the entry "model" of results.json: name, weights and size.
        decode: returns the text of token ids.

    Raises:
        OSError: a file could not be written; it names the file.
    """
    with name_file_in_errors(folder / RECIPE_FILE):
        (folder / RECIPE_FILE).write_text(to_toml(job.config), encoding="utf-8")
    with name_file_in_errors(folder / SAMPLES):
        with (folder / SAMPLES).open(
            "w", encoding="utf-8", errors="backslashreplace", newline="\n"
        ) as file:
            for result in measured.sets:
                file.writelines(_sample_lines(result, decode))
    content = json.dumps(summary(job, model, measured), indent=1, ensure_ascii=False)
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


def summary(job: ResolvedJob, model: dict[str, Any], measured: Measurement) -> dict[str, Any]:
    """Return the content of results.json: figures, their conditions, versions."""
    config, v = job.config, job.config.validation
    one_each = len(measured.sets) == 1 and v.samples_per_prompt == 1
    return {
        "model": model,
        "accuracy": measured.accuracy,
        "interval": list(measured.interval),
        "confidence": CONFIDENCE,
        "interval_method": WILSON if one_each else BOOTSTRAP,
        "pass_at_k": measured.pass_at,
        "sets": [_set_summary(alone) for alone in measured.each],
        "settings": {
            "samples_per_prompt": v.samples_per_prompt,
            "temperature": v.temperature,
            "max_new_tokens": v.max_new_tokens or config.rollout.max_new_tokens,
            "template": config.data.template,
            "enable_thinking": config.data.enable_thinking,
            "max_prompt_tokens": config.data.max_prompt_tokens,
            "seed": config.training.seed,
            "dtype": job.dtype,
            "processes": dist.get_world_size(),
        },
        "versions": versions(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _set_summary(measured: Measurement) -> dict[str, Any]:
    (result,) = measured.sets
    return {
        "name": result.held_out.name,
        "source": result.held_out.source,
        "grader": result.held_out.grader.name,
        "prompts": len(result.held_out.prompts),
        "samples": len(result.samples),
        "accuracy": result.accuracy,
        "interval": list(measured.interval),
        "pass_at_k": result.pass_at,
        "response_tokens_mean": result.response_tokens_mean,
        "truncated_fraction": result.truncated_fraction,
    }


def versions() -> dict[str, str]:
    """Return the versions of this program, Python and the packages that results depend on."""
    found = {"opd_titan": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def table(name: str, measured: Measurement) -> str:
    """Return a table with a row for each set and, if there are several, one for their mean."""
    ks = [k for k in measured.pass_at if k > 1]
    figures = ["accuracy", "95 % interval", *(f"pass@{k}" for k in ks)]
    rows = [["set", "prompts", "samples", *figures, "tokens", "cut"]]
    for alone in measured.each:
        (s,) = alone.sets
        label = s.held_out.name or Path(s.held_out.source).name
        sizes = [str(len(s.held_out.prompts)), str(len(s.samples))]
        lengths = [f"{s.response_tokens_mean:.1f}", f"{s.truncated_fraction:.1%}"]
        rows.append([label, *sizes, *_figures(alone, ks), *lengths])
    if len(measured.sets) > 1:
        rows.append(["mean", "", "", *_figures(measured, ks), "", ""])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"Evaluation of {name}"]
    for label, *cells in rows:
        right = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        lines.append("  ".join([label.ljust(widths[0]), *right]).rstrip())
    return "\n".join(lines)


def _figures(measured: Measurement, ks: list[int]) -> list[str]:
    shares = [f"{measured.pass_at[k]:.1%}" for k in ks]
    return [f"{measured.accuracy:.1%}", percent(measured.interval), *shares]
