"""The embedded default's data: reproducible, held out for real, right where it says so."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from opd_titan.data.sources import QUESTION_FORMAT

REPOSITORY = Path(__file__).resolve().parent.parent
ASSETS = REPOSITORY / "assets" / "debug"
MODELS = ("teacher", "student")
STEP = re.compile(r"([\d+*-]+)=(\d+)")


def _load_generator() -> ModuleType:
    """scripts/ is no package: import the file itself."""
    path = REPOSITORY / "scripts" / "make_debug_data.py"
    spec = importlib.util.spec_from_file_location("make_debug_data", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


generator = _load_generator()


@pytest.fixture(scope="module")
def splits() -> dict:
    return generator.make_splits()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(ASSETS / "teacher")


def _final(answer: str) -> int:
    return int(answer.split("####")[1])


def _work_ends_in_its_number(answer: str) -> bool:
    """Every equation holds, and the number after #### is made of their last digits."""
    (ones_left, ones), (tens_left, tens) = STEP.findall(answer)
    holds = eval(ones_left) == int(ones) and eval(tens_left) == int(tens)
    return holds and _final(answer) == 10 * int(tens) + int(ones) % 10


def test_shipped_data_is_what_the_generator_makes(splits: dict, tmp_path: Path) -> None:
    for name in ("train", "test"):
        generator.write_rows(splits[name], tmp_path / f"{name}.jsonl")
        shipped = (ASSETS / "data" / f"{name}.jsonl").read_bytes()
        assert (tmp_path / f"{name}.jsonl").read_bytes() == shipped, name


@pytest.mark.parametrize("model", MODELS)
def test_shipped_tokenizer_is_what_the_generator_trains(splits: dict, model: str) -> None:
    texts = [generator.PROMPT.format(question=p.question) + p.answer for p in splits["train"]]
    # Parsed, since the file's layout belongs to the `tokenizers` version.
    trained = json.loads(generator.train_tokenizer(texts).to_str())
    shipped = json.loads((ASSETS / model / "tokenizer.json").read_text(encoding="utf-8"))
    for key in ("model", "added_tokens", "pre_tokenizer"):
        assert shipped[key] == trained[key], key


def test_no_held_out_operands_in_any_training_file(splits: dict) -> None:
    held_out = {p.operands.held_out_key for p in splits["test"]}
    assert len({key[0] for key in held_out}) == 3
    for name in ("train", "teacher_sft", "student_sft"):
        assert held_out.isdisjoint(p.operands.held_out_key for p in splits[name]), name


def test_every_held_out_fact_is_seen_elsewhere() -> None:
    seen, held_out = generator.split_operands(generator.SEED)
    known = {fact for operands in seen for fact in operands.facts}
    assert all(fact in known for operands in held_out for fact in operands.facts)


def test_train_and_test_answers_are_right(splits: dict) -> None:
    for problem in splits["train"] + splits["test"]:
        a, b = sorted((int(n) for n in re.findall(r"\d+", problem.question)), reverse=True)
        right = {"+": a + b, "-": a - b, "*": a * b}[problem.operands.op]
        assert _final(problem.answer) == problem.operands.result == right, problem
        assert _work_ends_in_its_number(problem.answer), problem
    assert len({p.question for p in splits["train"]}) == generator.TRAIN_ROWS


def test_wrong_answers_are_wrong_at_one_token_and_consistent_after(splits: dict) -> None:
    wrong = [p for p in splits["student_sft"] + splits["teacher_sft"] if p.misconceived]
    for problem in wrong:
        assert _final(problem.answer) != problem.operands.result, problem
        assert _work_ends_in_its_number(problem.answer), problem
        right = generator.work(problem.operands)
        first = len(os.path.commonprefix([right, problem.answer]))
        decision = right[:first] + "|" + problem.answer[first]
        pattern = r"\d\*?\|\+" if problem.operands.op == "*" else r".*, (carry|borrow) \|0"
        assert re.fullmatch(pattern, decision), problem
    assert all(
        _final(p.answer) == p.operands.result
        for p in splits["student_sft"] + splits["teacher_sft"]
        if not p.misconceived
    )


def test_misconception_shares(splits: dict) -> None:
    for name, share in (("student_sft", 0.7), ("teacher_sft", 0.03)):
        applicable = [p for p in splits[name] if p.operands.misconceivable]
        measured = sum(p.misconceived for p in applicable) / len(applicable)
        assert measured == pytest.approx(share, abs=0.01), name
        for op in "+-*":
            assert any(p.misconceived for p in applicable if p.operands.op == op)
    easy = sum(not p.operands.misconceivable for p in splits["test"]) / len(splits["test"])
    assert 0.2 <= easy <= 0.32  # where the student starts


def test_digits_are_single_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    digit_ids = {tokenizer.convert_tokens_to_ids(d) for d in "0123456789"}
    assert len(digit_ids) == 10
    text = "There were 4096 pens, 17 in each.\n#### 35"
    pieces = [tokenizer.decode([i]) for i in tokenizer(text, add_special_tokens=False).input_ids]
    assert all(len(piece) == 1 for piece in pieces if re.search(r"\d", piece))
    assert not [token for token in tokenizer.get_vocab() if re.search(r"\d.|.\d", token)]


@pytest.mark.parametrize("model", MODELS)
def test_config_fits_the_tokenizer(model: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / model)
    config = json.loads((ASSETS / model / "config.json").read_text())
    generation = json.loads((ASSETS / model / "generation_config.json").read_text())
    assert tokenizer.is_fast
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert config["eos_token_id"] == tokenizer.eos_token_id
    assert config["pad_token_id"] == generation["pad_token_id"] == tokenizer.pad_token_id
    assert generation["eos_token_id"] == [tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert len(tokenizer) <= config["vocab_size"] < len(tokenizer) + 64
    assert config["vocab_size"] % 64 == 0


def test_the_prompt_is_the_raw_templates() -> None:
    """The script keeps a copy, so that it runs without the package installed."""
    assert generator.PROMPT.format(question="Q?") == QUESTION_FORMAT.format("Q?")
