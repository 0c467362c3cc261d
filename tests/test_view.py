"""The page of rollouts: what is on it, and what is said of files that are none.

`test_view_browser` looks at it in a browser.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html.parser
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_world import REPO, World, make_world, read_rollouts, read_scalars, train

from opd_titan.view.__main__ import main
from opd_titan.view.curves import CURVES, read_curves

NEW = "response_pieces student_ranks teacher_ranks reference_ranks teacher_top".split()


def make_row(step: int, index: int, sample: int, pieces: list[str], **changes: Any) -> dict:
    """A row as the program writes it; the student gains on the teacher from token to token."""
    n = len(pieces)
    text = "".join(pieces)
    return {
        "step": step,
        "prompt_index": index,
        "sample_index": sample,
        "prompt": f"Question: number {index}?\nAnswer:",
        "response": text.removesuffix("<eos>"),
        "prompt_tokens": [1, 2],
        "response_tokens": list(range(n)),
        "student_logprobs": [-0.5] * n,
        "teacher_logprobs": [-0.5 - i for i in range(n)],
        "reference_logprobs": None,
        "advantages": [0.0 - i for i in range(n)],
        "finish_reason": "stop" if text.endswith("<eos>") else "length",
        "answer": "4",
        "correct": text == "4<eos>",
        "response_pieces": pieces,
        "student_ranks": [1] * n,
        "teacher_ranks": [1 + i for i in range(n)],
        "reference_ranks": None,
        "teacher_top": [[["4", -0.01], ["5", -4.6]]] * n,
        **changes,
    }


def write_step(dump: Path, step: int, rows: list[dict]) -> Path:
    path = dump / "rollouts" / f"step-{step}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class Blocks(html.parser.HTMLParser):
    """The page's elements, as a parser of HTML finds them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.content: dict[str, str] = {}
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._inside = dict(attrs).get("id") or tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.content[self._inside] = self.content.get(self._inside, "") + data

    def block(self, name: str) -> Any:
        return json.loads(gzip.decompress(base64.b64decode(self.content[name])))


def page_of(dump: Path) -> Blocks:
    assert main([str(dump)]) == 0
    return Blocks((dump / "rollouts.html").read_text("ascii"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(tmp_path_factory.mktemp("world"))
    options = ["--reference.coef", 0.5, "--training.steps", 3]
    assert train(world.argv("run", *options)) == 0
    return world


# ------------------------------------------------------------------------ what is there


def test_the_page_holds_what_the_files_do(world: World) -> None:
    page = page_of(world.folder / "run")
    rows = [row for rows in read_rollouts(world.folder / "run").values() for row in rows]
    index = page.block("index")["rollouts"]
    assert len(index["step"]) == len(rows) > 10
    for i, row in enumerate(rows):
        chunk = page.block(f"chunk-{index['chunk'][i]}")
        words, found = chunk["words"], chunk["rows"][index["place"][i]]
        assert words[found["prompt"]] == row["prompt"]
        assert [words[w] for w in found["pieces"]] == row["response_pieces"]
        for role in ("student", "teacher", "reference"):
            logprobs = [v / 1000 for v in found[role]]
            assert logprobs == pytest.approx(row[f"{role}_logprobs"], abs=5.1e-4)
            assert found[f"{role}_ranks"] == row[f"{role}_ranks"]
        assert found["top_sizes"] == [5] * len(found["pieces"])
        pairs = [pair for top in row["teacher_top"] for pair in top]
        assert [words[w] for w in found["top"]] == [text for text, _ in pairs]
        assert found["top_logprobs"] == [round(1000 * value) for _, value in pairs]
        n = len(row["response_tokens"])
        gaps = zip(row["student_logprobs"], row["teacher_logprobs"], strict=True)
        assert index["kl"][i] == pytest.approx(sum(s - t for s, t in gaps) / n, rel=1e-3)
        assert index["cut"][i] == (row["finish_reason"] == "length")
        assert index["correct"][i] == (None if row["correct"] is None else int(row["correct"]))
    assert page.block("texts")["responses"] == [row["response"] for row in rows]


def test_curves_are_tensorboards(world: World, tmp_path: Path) -> None:
    curves, scalars = read_curves(world.folder / "run"), read_scalars(world.folder / "run")
    assert {CURVES[name] for name in scalars if name in CURVES} == set(curves) > {"kl", "accuracy"}
    for tag, name in CURVES.items():
        if name in curves:
            steps, values = zip(*curves[name], strict=True)
            assert list(steps) == sorted(scalars[tag])
            assert list(values) == pytest.approx([scalars[tag][s] for s in steps], rel=1e-5)


def test_curves_of_a_run_that_was_resumed_have_each_step_once(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    for second, (first, purge) in enumerate([(1, 0), (3, 3)]):
        writer = SummaryWriter(str(tmp_path / "tb"), purge_step=purge, filename_suffix=f"{second}")
        for step in range(first, first + 4):
            writer.add_scalar("kl/student_teacher", step + 10 * second, step)
            writer.add_scalar("lr", 1.0, step)
        writer.close()
        if not second:
            time.sleep(1.1)  # files are read in the order of the seconds in their names
    truth = read_scalars(tmp_path)["kl/student_teacher"]
    assert read_curves(tmp_path) == {"kl": sorted(truth.items())}
    [*_, newest] = sorted((tmp_path / "tb").iterdir())
    newest.write_bytes(newest.read_bytes()[:-7])  # being written
    assert dict(read_curves(tmp_path)["kl"])[5] == 15.0
    assert read_curves(tmp_path / "none") == {}


def test_files_of_earlier_versions_are_shown(tmp_path: Path) -> None:
    row = make_row(1, 0, 0, ["4", "<eos>"])
    write_step(tmp_path, 1, [{k: v for k, v in row.items() if k not in NEW}])
    chunk = page_of(tmp_path).block("chunk-0")
    (found,) = chunk["rows"]
    assert chunk["words"][found["response"]] == "4" and found["ids"] == [0, 1]


def test_a_graders_scores_are_shown(tmp_path: Path) -> None:
    """Of a user's own grader: `validation.grader`."""
    scores = [0.25, 1.0, 0.0, True, None]
    rows = [make_row(1, i, 0, ["4"], correct=score) for i, score in enumerate(scores)]
    write_step(tmp_path, 1, rows)
    assert page_of(tmp_path).block("index")["rollouts"]["correct"] == [0.25, 1, 0, 1, None]


def test_what_all_prompts_start_with_is_left_out_of_the_list(tmp_path: Path) -> None:
    write_step(tmp_path, 1, [make_row(1, i, 0, ["4"]) for i in (10, 11)])
    questions = page_of(tmp_path).block("index")["rollouts"]["questions"]
    assert questions == ["10? Answer:", "11? Answer:"]


def test_the_same_files_give_the_same_page(tmp_path: Path) -> None:
    write_step(tmp_path, 1, [make_row(1, 0, 0, ["4"])])
    first, second = tmp_path / "1.html", tmp_path / "2.html"
    for out in (first, second):
        assert main([str(tmp_path), "--out", str(out)]) == 0
    assert first.read_bytes() == second.read_bytes()
    assert not list(tmp_path.glob("*.tmp"))


# ------------------------------------------------------------------------------- safety


def test_only_the_pages_own_script_may_run_and_nothing_is_loaded(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><!--<script>"
    write_step(tmp_path, 1, [make_row(1, 0, 0, [evil], prompt=evil, answer=evil)])
    page = page_of(tmp_path)
    text = (tmp_path / "rollouts.html").read_text()
    assert "alert(1)" not in text
    scripts = [attributes for tag, attributes in page.tags if tag == "script"]
    assert {a.get("type") for a in scripts} == {None, "application/octet-stream"}
    assert sum("type" not in a for a in scripts) == 1
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "img", "object", "embed", "base"), tag
        for name in attributes:
            assert name not in ("src", "href", "style") and not name.startswith("on"), (tag, name)
    (policy,) = (a["content"] for _, a in page.tags if "http-equiv" in a)
    for kind in ("script", "style"):
        digest = hashlib.sha256(page.content[kind].encode()).digest()
        assert f"{kind}-src 'sha256-{base64.b64encode(digest).decode()}'" in policy
    assert "default-src 'none'" in policy and "unsafe" not in policy


def test_the_script_never_makes_markup_of_text() -> None:
    for path in sorted((REPO / "opd_titan" / "view" / "static").glob("*.js")):
        source = path.read_text("ascii")
        for name in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
            assert name not in source, f"{path.name}: {name}"
        assert not re.search(r"\b(fetch|XMLHttpRequest|WebSocket|import)\b\s*\(", source), path.name


# ------------------------------------------------------------------------ what is wrong

GOOD = make_row(3, 0, 0, ["4", "<eos>"])
WRONG: dict[str, tuple[str | bytes, str]] = {
    "cut off": (json.dumps(GOOD)[:-20], "line 1: is not JSON"),
    "no JSON": ("hello\n", "line 1: is not JSON"),
    "second line": (json.dumps(GOOD) + "\n{}\n", "line 2: has no `response_tokens`"),
    "a list": ("[1]\n", "line 1: is no JSON object"),
    "not UTF-8": (json.dumps(GOOD).encode() + b'\n{"step": "\xff"}\n', "line 2: is not UTF-8"),
    "nothing": ("", "files are empty"),
    "NaN": (json.dumps({**GOOD, "advantages": [float("nan"), 0.0]}), "NaN is no number"),
    "huge": (
        json.dumps(GOOD).replace("-0.5,", "1e999,", 1),
        "`student_logprobs` holds a number beyond",
    ),
    "huge integer": (
        json.dumps(GOOD).replace('"teacher_ranks": [1,', f'"teacher_ranks": [{10**400},'),
        "`teacher_ranks` holds a number beyond",
    ),
    "deep": ("[" * 100_000, "line 1: is not JSON"),
    "no prompt": (json.dumps({k: v for k, v in GOOD.items() if k != "prompt"}), "no `prompt`"),
    "number for text": (json.dumps({**GOOD, "response": 4}), "`response` is 4; wanted a string"),
    "true for a step": (json.dumps({**GOOD, "step": True}), "`step` is true; wanted an integer"),
    "odd grade": (json.dumps({**GOOD, "correct": 2}), "`correct` is 2; wanted true, false"),
    "other step": (json.dumps({**GOOD, "step": 4}), "`step` is 4 in the file of step 3"),
    "too few": (json.dumps({**GOOD, "teacher_ranks": [1]}), "`teacher_ranks` has 1 entries for 2"),
    "no list": (json.dumps({**GOOD, "advantages": "x"}), "`advantages` has no list for 2 tokens"),
    "odd piece": (json.dumps({**GOOD, "response_pieces": ["4", 5]}), "`response_pieces` holds 5"),
    "odd top": (json.dumps({**GOOD, "teacher_top": [[], [["4"]]]}), "`teacher_top` holds"),
    "odd id": (json.dumps({**GOOD, "response_tokens": [1, "2"]}), "`response_tokens` holds"),
}


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("opd_titan: ") and len(captured.err) < 700
    return captured.err


@pytest.mark.parametrize("name", WRONG)
def test_a_damaged_file_is_named_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    content, why = WRONG[name]
    path = write_step(tmp_path, 3, [])
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    line = refused([str(tmp_path)], capsys)
    assert str(path if content else path.parent) in line and why in line
    assert not (tmp_path / "rollouts.html").exists()


def no_folder(dump: Path) -> list[str]:
    return [str(dump / "nowhere")]


def no_rollouts(dump: Path) -> list[str]:
    (dump / "rollouts").mkdir()
    (dump / "rollouts" / "notes.txt").write_text("mine")
    (dump / "rollouts" / "step-1.jsonl.tmp").write_text("half")
    return [str(dump)]


def a_file(dump: Path) -> list[str]:
    (dump / "file").write_text("")
    return [str(dump / "file")]


def out_is_a_folder(dump: Path) -> list[str]:
    write_step(dump, 3, [GOOD])
    return [str(dump), "--out", str(dump / "rollouts")]


def out_has_no_name(dump: Path) -> list[str]:
    write_step(dump, 3, [GOOD])
    return [str(dump), "--out", "."]


def out_is_nowhere(dump: Path) -> list[str]:
    write_step(dump, 3, [GOOD])
    return [str(dump), "--out", str(dump / "no" / "page.html")]


MISTAKES: list[tuple[Callable[[Path], list[str]], str]] = [
    (no_folder, "nowhere: has no folder rollouts"),
    (a_file, "file: has no folder rollouts"),
    (no_rollouts, "holds no step-N.jsonl"),
    (out_is_a_folder, "--out: .*rollouts cannot be written"),
    (out_has_no_name, "--out: . cannot be written"),
    (out_is_nowhere, "--out: .*page.html cannot be written"),
    (lambda dump: [], "arguments are required: dump_folder"),
    (lambda dump: [str(dump), "--output", "x"], "unrecognized arguments: --output"),
]


@pytest.mark.parametrize(("make", "why"), MISTAKES)
def test_a_mistake_is_said_in_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    make: Callable[[Path], list[str]],
    why: str,
) -> None:
    assert re.search(why, refused(make(tmp_path), capsys))
    assert not list(tmp_path.rglob("*.html*")) and not list(tmp_path.glob("*.tmp"))


# ------------------------------------------------------------------------ the program


def test_it_starts_without_torch(tmp_path: Path) -> None:
    write_step(tmp_path, 3, [GOOD])
    code = (
        "import sys; from opd_titan.view.__main__ import main; "
        f"assert main([{str(tmp_path)!r}]) == 0; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPO)
