"""How fast is the rollout viewer on a large run? Size of the page, time to make it, clicks.

    python benchmarks/view.py --rollouts 10000 --tokens 300

The rollouts are made up: words of a Zipf vocabulary, log-probs and ranks that go together as a
model's do, 40 steps. Needs a Chromium on PATH, which is driven through its DevTools protocol.
"""

from __future__ import annotations

import json
import math
import random
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

from harness import REPO, Record, emit, machine, parser, table

sys.path.append(str(REPO / "tests"))
from browser import Browser, find_browser  # noqa: E402

from opd_titan.view.page import write_page  # noqa: E402

STEPS = 40
MODELS = ("student", "teacher", "reference")


def make_row(index: int, tokens: int, vocabulary: list[str], dice: random.Random) -> Record:
    n = max(1, int(dice.gauss(tokens, tokens / 4)))

    def word() -> int:
        return min(int(dice.paretovariate(0.6)), len(vocabulary)) - 1

    ids = [word() for _ in range(n)]
    pieces = [vocabulary[i] for i in ids]
    logprobs = {
        name: [float(f"{math.log(1e-9 + dice.betavariate(3, 0.4)):.7g}") for _ in ids]
        for name in MODELS
    }
    question = " ".join(dice.choice(vocabulary).strip() for _ in range(50))
    differences = zip(logprobs["student"], logprobs["teacher"], strict=True)
    return {
        "step": 0,
        "prompt_index": index,
        "sample_index": 0,
        "prompt": f"Question: {question}?\nAnswer:",
        "response": "".join(pieces),
        "prompt_tokens": [1, 2],
        "response_tokens": ids,
        **{f"{name}_logprobs": values for name, values in logprobs.items()},
        "advantages": [t - s for s, t in differences],
        "finish_reason": dice.choice(["stop", "stop", "length"]),
        "answer": str(index),
        "correct": dice.random() < 0.5,
        "response_pieces": pieces,
        **{f"{name}_ranks": [1 + int(-2 * v) for v in logprobs[name]] for name in MODELS},
        "teacher_top": [
            [[vocabulary[word()], round(v - k * 2, 3)] for k in range(5)]
            for v in logprobs["teacher"]
        ],
    }


def make_run(dump: Path, rollouts: int, tokens: int) -> int:
    """Write rollout files and return their size in bytes."""
    dice = random.Random(0)
    words = [" " + "".join(dice.choices("etaoinshrdlu", k=2 + i % 7)) for i in range(5000)]
    (dump / "rollouts").mkdir()
    # The same ones at each step, because the page compresses each step by itself.
    lines = [json.dumps(make_row(i, tokens, words, dice)) for i in range(rollouts // STEPS)]
    size = 0
    for step in range(1, STEPS + 1):
        text = "".join(f"{line.replace('0', str(step), 1)}\n" for line in lines)
        size += (dump / "rollouts" / f"step-{step}.jsonl").write_text(text, encoding="ascii")
    return size


PAINT = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? 0"
# From the event to the frame that shows its effect.
TIMED = """(async (act) => {
  const begin = performance.now();
  act();
  const box = document.getElementById("rollout");
  do await new Promise((done) => setTimeout(done, 0));
  while (box.getAttribute("aria-busy") === "true");
  await new Promise((done) => requestAnimationFrame(() => setTimeout(done, 0)));
  return performance.now() - begin;
})"""
SET = """const box = document.getElementById('%s'); box.value = '%s';
  box.dispatchEvent(new Event('%s'))"""
PRESS = "document.body.dispatchEvent(new KeyboardEvent('keydown', {key: 'j', bubbles: true}))"


def measure(page: Path) -> Record:
    """Open the page in a browser and use it; all times are milliseconds."""
    with Browser(find_browser()) as browser:
        start = time.monotonic()
        browser.open(page)
        ready = time.monotonic() - start

        def timed(act: str) -> float:
            return browser.run(f"{TIMED}(() => {{ {act} }})")

        found: Record = {"first paint": browser.run(PAINT), "first rollout shown": 1e3 * ready}
        found["all steps, sorted"] = timed(SET % ("step", "all", "change"))
        browser.run("document.getElementById('sort').value = 'kl'")
        clicks = [timed(PRESS) for _ in range(60)]
        found |= {"next rollout": statistics.median(clicks), "the worst of 60": max(clicks)}
        found["first filter"] = timed(SET % ("filter", "the", "input"))
        found["filter"] = timed(SET % ("filter", "then", "input"))
        found["JavaScript heap, MB"] = browser.run("performance.memory.usedJSHeapSize") / 1e6
        assert not browser.complaints, browser.complaints
    return found


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rollouts", type=int, default=10_000)
    arguments.add_argument("--tokens", type=int, default=300)
    a = arguments.parse_args()
    emit(machine())
    with tempfile.TemporaryDirectory() as folder:
        dump, page = Path(folder), Path(folder) / "rollouts.html"
        size = make_run(dump, a.rollouts, a.tokens)
        start, used = time.monotonic(), time.process_time()
        packed = write_page(dump, page)
        figures: Record = {
            "rollouts": packed.count,
            "rollout files, MB": size / 1e6,
            "page, MB": page.stat().st_size / 1e6,
            "making the page, s": time.monotonic() - start,
            "of which computing, s": time.process_time() - used,
            "peak memory, MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            **measure(page),
        }
    print(table([{"figure": name, "value": value} for name, value in figures.items()]))


if __name__ == "__main__":
    main()
