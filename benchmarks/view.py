"""The rollout viewer on a large run: page size, time to make it, first paint, time of a click.

    python benchmarks/view.py --rollouts 10000 --tokens 300

The rollouts are made up: words of a Zipf vocabulary, log-probs and ranks that go together as a
model's do, 40 steps. Needs a Chromium on PATH, which is driven through its DevTools protocol.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from browser import Browser, find_browser  # noqa: E402

from opd_titan.view.page import write_page  # noqa: E402

STEPS = 40


def make_row(step: int, index: int, tokens: int, words: list[str], dice: random.Random) -> dict:
    n = max(1, int(dice.gauss(tokens, tokens / 4)))
    ids = [min(int(dice.paretovariate(0.6)), len(words)) - 1 for _ in range(n)]

    def logprobs() -> list[float]:
        return [float(f"{math.log(1e-9 + dice.betavariate(3, 0.4)):.7g}") for _ in ids]

    student, teacher, reference = logprobs(), logprobs(), logprobs()
    pieces = [words[i] for i in ids]
    top = [
        [[words[min(int(dice.paretovariate(0.6)), len(words)) - 1], round(v - k * 2, 3)]
         for k in range(5)]
        for v in teacher
    ]  # fmt: skip
    ranks = [[1 + int(-2 * v) for v in values] for values in (student, teacher, reference)]
    question = " ".join(dice.choice(words).strip() for _ in range(50))
    return {
        "step": step,
        "prompt_index": index,
        "sample_index": 0,
        "prompt": f"Question: {question}?\nAnswer:",
        "response": "".join(pieces),
        "prompt_tokens": [1, 2],
        "response_tokens": ids,
        "student_logprobs": student,
        "teacher_logprobs": teacher,
        "reference_logprobs": reference,
        "advantages": [t - s for s, t in zip(student, teacher, strict=True)],
        "finish_reason": dice.choice(["stop", "stop", "length"]),
        "answer": str(index),
        "correct": dice.random() < 0.5,
        "response_pieces": pieces,
        "student_ranks": ranks[0],
        "teacher_ranks": ranks[1],
        "reference_ranks": ranks[2],
        "teacher_top": top,
    }


def make_run(dump: Path, rollouts: int, tokens: int) -> float:
    """Rollout files; their size in bytes."""
    dice = random.Random(0)
    letters = "etaoinshrdlu"
    words = [" " + "".join(dice.choices(letters, k=2 + i % 7)) for i in range(5000)]
    (dump / "rollouts").mkdir()
    count = rollouts // STEPS
    # The same ones at each step, as the page compresses no step together with another.
    rows = [make_row(0, i, tokens, words, dice) for i in range(count)]
    lines = [json.dumps(row) for row in rows]
    size = 0
    for step in range(1, STEPS + 1):
        path = dump / "rollouts" / f"step-{step}.jsonl"
        path.write_text(
            "".join(f"{line.replace('0', str(step), 1)}\n" for line in lines), encoding="ascii"
        )
        size += path.stat().st_size
    return size


PAINT = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? 0"
# From the event to the frame that shows what came of it.
TIMED = """(async (act) => {
  const begin = performance.now();
  act();
  const box = document.getElementById("rollout");
  do await new Promise((done) => setTimeout(done, 0));
  while (box.getAttribute("aria-busy") === "true");
  await new Promise((done) => requestAnimationFrame(() => setTimeout(done, 0)));
  return performance.now() - begin;
})"""


def measure(page: Path) -> dict[str, Any]:
    with Browser(find_browser()) as browser:
        start = time.monotonic()
        browser.open(page)
        ready = time.monotonic() - start
        paint = browser.run(PAINT)

        def timed(act: str) -> float:
            return browser.run(f"{TIMED}(() => {{ {act} }})")

        step = "const box = document.getElementById('step'); box.value = {}; "
        fire = "box.dispatchEvent(new Event('change'))"
        everything = timed(step.format("'all'") + fire)
        press = "document.dispatchEvent(new KeyboardEvent('keydown', {key: 'j', bubbles: true}))"
        press = press.replace("document.d", "document.body.d")
        browser.run("document.getElementById('sort').value = 'kl'")
        clicks = [timed(press) for _ in range(60)]
        find = "const box = document.getElementById('filter'); box.value = 'WORD'; "
        find += "box.dispatchEvent(new Event('input'))"
        first = timed(find.replace("WORD", "the"))
        second = timed(find.replace("WORD", "then"))
        heap = browser.run("performance.memory.usedJSHeapSize") / 1e6
        complaints = browser.complaints
    assert not complaints, complaints
    return {
        "first paint": f"{paint:.0f} ms",
        "first rollout shown": f"{1000 * ready:.0f} ms",
        "all steps, sorted": f"{everything:.0f} ms",
        "next rollout": f"median {statistics.median(clicks):.0f} ms, worst {max(clicks):.0f} ms",
        "first filter": f"{first:.0f} ms",
        "filter": f"{second:.0f} ms",
        "JavaScript heap": f"{heap:.0f} MB",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rollouts", type=int, default=10_000)
    parser.add_argument("--tokens", type=int, default=300)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        dump, page = Path(folder), Path(folder) / "rollouts.html"
        size = make_run(dump, options.rollouts, options.tokens)
        start, used = time.monotonic(), time.process_time()
        packed = write_page(dump, page)
        made, used = time.monotonic() - start, time.process_time() - used
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        figures = {
            "rollouts": f"{packed.count:,} of about {options.tokens} tokens",
            "rollout files": f"{size / 1e6:.0f} MB",
            "page": f"{page.stat().st_size / 1e6:.1f} MB",
            "making the page": f"{made:.1f} s, {used:.1f} of them computing; {peak:.0f} MB",
            **measure(page),
        }
    print(f"Python {platform.python_version()}, {platform.machine()}")
    for name, value in figures.items():
        print(f"{name:20} {value}")


if __name__ == "__main__":
    main()
