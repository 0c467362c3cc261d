"""The page of rollouts in a real browser: its controls and its safety."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, find_browser
from test_view import NEW, make_row, write_step
from tiny_world import World, make_world, read_rollouts, train

from opd_titan.view.__main__ import main

pytestmark = pytest.mark.long

Rows = dict[int, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser(find_browser()) as started:
        yield started


@pytest.fixture(autouse=True)
def no_errors(browser: Browser) -> Iterator[None]:
    """In every test, the page requests nothing but itself and reports no error."""
    for heard in (browser.requests, browser.complaints, browser.dialogs):
        heard.clear()
    yield
    assert browser.complaints == [] and browser.dialogs == []
    assert all(url.startswith("file://") and url.endswith(".html") for url in browser.requests)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, browser: Browser) -> tuple[Path, Rows]:
    """The page of a real run in which prompts repeat, and its rows."""
    world: World = make_world(tmp_path_factory.mktemp("world"))
    options = ["--reference.coef", 0.5, "--training.steps", 8, "--export.interval", 0]
    assert train(world.argv("run", *options)) == 0
    assert main([str(world.folder / "run")]) == 0
    return world.folder / "run" / "rollouts.html", read_rollouts(world.folder / "run")


def open_dump(browser: Browser, dump: Path) -> None:
    assert main([str(dump)]) == 0
    browser.open(dump / "rollouts.html")


def shown(text: str) -> str:
    """Return a token's text as its card shows it."""
    return text.replace("\n", "\u21b5").replace(" ", "\u2423")


def number(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}f}".replace("-", "\u2212")


def chosen(browser: Browser) -> tuple[int, int, int]:
    """Return step, prompt and sample of the rollout that is shown."""
    facts = browser.texts("#facts .fact")[:3]
    return tuple(int("".join(filter(str.isdigit, fact))) for fact in facts)


def row_of(rows: Rows, key: tuple[int, int, int]) -> dict[str, Any]:
    step, prompt, sample = key
    found = [r for r in rows[step] if (r["prompt_index"], r["sample_index"]) == (prompt, sample)]
    return found[0]


def mean_gap(row: dict[str, Any]) -> float:
    pairs = list(zip(row["student_logprobs"], row["teacher_logprobs"], strict=True))
    return sum(s - t for s, t in pairs) / len(pairs)


# ---------------------------------------------------------------------- a page of a run


def test_a_step_and_a_rollout_are_picked(browser: Browser, run: tuple[Path, Rows]) -> None:
    page, rows = run
    browser.open(page)
    assert chosen(browser)[0] == 8  # the last step
    browser.select("#step", "2")
    assert browser.text("#count") == f"8 of {sum(map(len, rows.values()))} rollouts"
    browser.point("#list [role=option]", 3, click=True)
    row = row_of(rows, chosen(browser))
    assert row["step"] == 2
    assert browser.texts(".piece") == row["response_pieces"]
    assert browser.text("#prompt") == row["prompt"]
    facts = " ".join(browser.texts("#facts .fact"))
    assert f"KL{number(mean_gap(row))}" in facts and f"gold{row['answer']}" in facts
    assert ("right" if row["correct"] else "wrong") in facts
    assert ("truncated" if row["finish_reason"] == "length" else "stop") in facts


def card_of(row: dict[str, Any], t: int) -> str:
    """Return what the card of a token shows, in this order."""
    parts = []
    for role in ("student", "teacher", "reference"):
        parts += [role.capitalize(), number(row[f"{role}_logprobs"][t])]
        parts.append(f"#{row[f'{role}_ranks'][t]}")
    parts.append(number(row["advantages"][t]))
    return " .* ".join([*parts, *(shown(text) for text, _ in row["teacher_top"][t])])


def assert_card(browser: Browser, row: dict[str, Any], t: int) -> None:
    text, place = browser.text("#token"), 0
    for part in card_of(row, t).split(" .* "):
        assert part in text[place:], (part, text)
        place = text.index(part, place)
    assert browser.text("#token code") == shown(row["response_pieces"][t])


def test_pointing_at_a_token_says_what_each_model_thinks(
    browser: Browser, run: tuple[Path, Rows]
) -> None:
    page, rows = run
    browser.open(page)
    row = row_of(rows, chosen(browser))
    for t in (0, 4, len(row["response_tokens"]) - 1):
        browser.point(".piece", t)
        assert_card(browser, row, t)
    gaps = [a - b for a, b in zip(row["student_logprobs"], row["teacher_logprobs"], strict=True)]
    widest = max(range(len(gaps)), key=lambda t: abs(gaps[t]))
    browser.point("#facts")  # away: back to the chosen one, at first the widest gap
    assert_card(browser, row, widest)


def test_all_controls_have_a_key(browser: Browser, run: tuple[Path, Rows]) -> None:
    page, rows = run
    browser.open(page)
    first = chosen(browser)
    browser.press("j")
    second = chosen(browser)
    browser.press("j", "k", "k")
    assert chosen(browser) == first != second
    active = "document.getElementById('list').getAttribute('aria-activedescendant')"
    assert browser.run(active) == "row-0"
    assert browser.run("document.getElementById('row-0').getAttribute('aria-selected')") == "true"

    row = row_of(rows, first)
    browser.point(".piece", 2, click=True)
    browser.point("#facts")
    browser.press("ArrowRight")
    assert browser.run("document.activeElement.dataset.t") == "3"
    assert_card(browser, row, 3)
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert browser.run(outline) == "solid"
    browser.press("ArrowLeft", "ArrowLeft")
    assert_card(browser, row, 1)

    browser.press("/")
    assert browser.run("document.activeElement.id") == "filter"
    browser.press("j", "j")  # types
    assert browser.run("document.activeElement.value") == "jj" and "0 of" in browser.text("#count")
    browser.run("document.activeElement.select()")
    browser.press("Escape")
    assert browser.run("document.activeElement.id") != "filter"

    browser.press("?")
    assert browser.run("document.getElementById('help').open")
    browser.press("j", "Escape")
    assert not browser.run("document.getElementById('help').open")


def test_one_prompt_is_followed_across_steps(browser: Browser, run: tuple[Path, Rows]) -> None:
    page, rows = run
    browser.open(page)
    browser.select("#step", "1")
    key = chosen(browser)
    keys = [
        (step, r["prompt_index"], r["sample_index"])
        for step, found in rows.items()
        for r in found
        if r["prompt_index"] == key[1]
    ]
    assert len({step for step, *_ in keys}) > 1
    assert len(browser.texts("#same-list button")) == len(keys)
    while chosen(browser) != keys[-1]:
        before = chosen(browser)
        browser.press("]")
        assert chosen(browser) == keys[keys.index(before) + 1]
    browser.press("]")
    assert chosen(browser) == keys[-1]
    browser.press("[")
    assert chosen(browser) == keys[-2]


def test_sorting_and_filtering(browser: Browser, run: tuple[Path, Rows]) -> None:
    page, rows = run
    browser.open(page)
    browser.select("#step", "all")
    every = [row for found in rows.values() for row in found]

    def order(how: str) -> list[str]:
        browser.select("#sort", how)
        return browser.texts("#list [role=option]")

    kls = [
        float(text.split("KL ")[1].split(" ")[0][:5].replace("\u2212", "-")) for text in order("kl")
    ]
    assert kls == sorted(kls, reverse=True)
    assert kls[0] == pytest.approx(max(map(mean_gap, every)), abs=1e-2)
    lengths = [int(text.split(" tok")[0].split(".")[-1][3:]) for text in order("long")]
    assert lengths == sorted(lengths, reverse=True)
    cut = ["truncated" in text for text in order("cut")]
    assert cut == sorted(cut, reverse=True) and cut[0]
    wrong = ["\u2717" in text for text in order("wrong")]
    assert wrong == sorted(wrong, reverse=True) and wrong[0]

    question = every[0]["prompt"].split("What is ")[1][:4]
    browser.run("document.getElementById('filter').focus()")
    for character in question:
        browser.press(character)
    wanted = sum(question in r["prompt"] or question in r["response"] for r in every)
    browser.wait(f"document.getElementById('count').textContent.startsWith('{wanted} of')")
    assert 0 < wanted < len(every)


# ------------------------------------------------------------------------------- looks


def test_missing_values_are_shown_as_missing(browser: Browser, tmp_path: Path) -> None:
    """No teacher, no text, numbers that are not finite, and nothing to grade."""
    nothing = dict.fromkeys(["teacher_logprobs", "teacher_ranks", "teacher_top", "advantages"])
    rows = [
        make_row(1, 0, 0, ["4"], **nothing, answer=None, correct=None),
        make_row(1, 1, 0, []),
        make_row(1, 2, 0, ["4", "5"], student_logprobs=[None, -1.0], student_ranks=[None, 1]),
        make_row(1, 3, 0, ["", "\u20ac", "\n", "\x07"], correct=0.25),
    ]
    write_step(tmp_path, 1, rows)
    open_dump(browser, tmp_path)
    browser.select("#sort", "order")
    browser.point("#row-0", click=True)
    assert "not graded" in browser.text("#facts") and "gold" not in browser.text("#facts")
    browser.press("j")
    assert browser.texts(".piece") == []
    browser.press("ArrowRight", "n", "j")
    browser.point(".piece", 0)
    assert "a log-prob is missing" in browser.text("#token")
    browser.press("j")
    assert browser.texts(".piece") == ["\u00b7", "\u20ac", "\u21b5\n", "\u2407"]
    assert "score 0.25" in browser.text("#facts") and "0.25" in browser.text("#row-3 .partial")


# ------------------------------------------------------------------------------- safety

ATTACKS = [
    "<script>hacked = 1; alert(1)</script>",
    "</script><script>hacked = 1; alert(1)</script>",
    "<img src=x onerror='hacked = 1; alert(1)'>",
    "<svg onload=alert(1)><a href='javascript:alert(1)'>x</a></svg>",
    "<!-- <script> ",
    "--> ]]> </style></title></textarea>",
    "line\u2028separator\u2029and \u202e reversed \x00 nul",
    "${alert(1)} `\"'\\u003cscript>",
    "<iframe srcdoc='<script>parent.hacked = 1</script>'></iframe>",
    "&lt;b&gt; &amp; \ufeff\ud83d",
]


def test_text_of_a_run_is_never_markup(browser: Browser, tmp_path: Path) -> None:
    dump = tmp_path / "<img src=x onerror=alert(1)>"
    rows = []
    for i, attack in enumerate(ATTACKS):
        texts = dict(prompt=attack, answer=attack, finish_reason=attack)
        top = [[[attack, -0.1], ["<b>", -2.0]]] * 2
        rows.append(make_row(1, i, 0, [attack, "\n"], **texts, teacher_top=top))
    old = {k: v for k, v in rows[1].items() if k not in NEW}
    write_step(dump, 1, [*rows, {**old, "prompt_index": 99}])
    about = json.dumps(ATTACKS[1])
    paths = "".join(f"[{role}]\nhf_path = {about}\n" for role in ("student", "teacher"))
    recipe = f'[job]\ndescription = {about}\n{paths}[distill]\nobjective = "jsd"\n'
    (dump / "config.resolved.toml").write_text(recipe)
    open_dump(browser, dump)
    browser.select("#sort", "order")
    browser.point("#row-0", click=True)
    made = "document.querySelectorAll('#rollout :is(script, img, svg, iframe, a, b, style)').length"
    for attack in ATTACKS:
        for t in (0, 1):
            browser.point(".piece", t)
        seen = attack.replace("\x00", "\u2400").replace("\ud83d", "\ufffd")
        for hidden in "\u2028\u2029\u202e\ufeff":
            seen = seen.replace(hidden, f"\u27e8U+{ord(hidden):04X}\u27e9")
        assert browser.text("#prompt").replace("\ud83d", "\ufffd") == seen
        assert browser.texts(".piece")[0].replace("\ud83d", "\ufffd") == seen
        assert browser.run(made) == 0
        listed = browser.texts("#list [aria-selected=true]")[0] + browser.text("#facts")
        assert not set(listed) & set("\u2028\u202e\ufeff\x00"), listed
        browser.press("j")
    assert ATTACKS[1] in browser.text("#run-about") and browser.text("#run-name") == dump.name
    assert browser.run("typeof hacked") == "undefined"


def test_the_policy_stops_what_would_get_through(browser: Browser, tmp_path: Path) -> None:
    """The second defence; it also shows that the test above would notice a breach."""
    write_step(tmp_path, 1, [make_row(1, 0, 0, ["4"])])
    open_dump(browser, tmp_path)
    markup = "<img src=https://example.invalid/x.png onerror='hacked = 1'><p onclick='x'></p>"
    browser.run(f"document.body.insertAdjacentHTML('beforeend', {json.dumps(markup)})")
    browser.run(
        "(() => { const s = document.createElement('script'); s.textContent = 'hacked = 1'; "
        "document.body.append(s); })()"
    )
    browser.run("fetch('https://example.invalid/').catch(() => 0)")
    assert browser.run("typeof hacked") == "undefined"
    assert len(browser.complaints) >= 3, browser.complaints
    browser.complaints.clear()
    browser.requests.clear()  # those that the policy refused


# -------------------------------------------------------------------------------- size

MANY = 10_000


def test_ten_thousand_rollouts_stay_fluid(browser: Browser, tmp_path: Path) -> None:
    numbers = random.Random(0)
    for step in range(1, 11):
        rows = []
        for i in range(MANY // 10):
            pieces = [f"w{numbers.randrange(50)} " for _ in range(numbers.randrange(4, 12))]
            teacher = [-numbers.random() for _ in pieces]
            rows.append(make_row(step, i, 0, pieces, teacher_logprobs=teacher))
        write_step(tmp_path, step, rows)
    open_dump(browser, tmp_path)
    browser.select("#step", "all")
    assert browser.text("#count") == "10,000 of 10,000 rollouts"
    assert len(browser.texts("#list [role=option]")) < 60  # those in sight

    start = time.monotonic()
    for _ in range(20):
        browser.press("j")
    # Generous: it takes a few hundredths on an idle machine (docs/viewer.md).
    assert (time.monotonic() - start) / 20 < 1.0
    browser.run("document.getElementById('list').scrollTop = 1e9")
    browser.wait("document.getElementById('row-9999') !== null")
    browser.point("#row-9999", click=True)
    assert browser.run("document.getElementById('row-9999').ariaSelected") == "true"
    assert len(browser.texts("#list [role=option]")) < 60
    browser.run("document.getElementById('filter').focus()")
    for character in "number 777?":
        browser.press(character)
    browser.wait("document.getElementById('count').textContent.startsWith('10 of')")
