"""Tokenizers: loading them, and comparing those of student, teacher and model."""

from __future__ import annotations

import json

import pytest
from tiny_tokenizer import CHAT, one_line, tiny_tokenizer

from opd_titan.data.tokenizer import (
    check_tokenizer_fits,
    compare_tokenizers,
    eos_warning,
    load_tokenizer,
)
from opd_titan.errors import ModelError


def test_tokenizer_is_whole_and_fits(qwen3) -> None:
    assert len(qwen3) == 151_669 and qwen3.is_fast
    check_tokenizer_fits(qwen3, 151_936, "student.hf_path")
    with pytest.raises(ModelError) as error:
        check_tokenizer_fits(qwen3, 151_668, "teacher.hf_path")
    one_line(error, "teacher.hf_path: .*151668, but the model's vocab_size is 151668")


def test_tokenizer_round_trips_through_a_folder(tiny, tmp_path) -> None:
    tiny.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path, "student.hf_path")
    compare_tokenizers(loaded, tiny)
    assert loaded.chat_template == CHAT


def test_bad_tokenizer_folders(tiny, tmp_path) -> None:
    def refuse(*says: str) -> None:
        with pytest.raises(ModelError) as error:
            load_tokenizer(tmp_path, "teacher.hf_path")
        one_line(error, "^teacher.hf_path", str(tmp_path), *says)

    # With only its config, transformers 5 would build an empty tokenizer and say nothing.
    tiny.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    whole = file.read_text()
    file.unlink()
    refuse("has no tokenizer.json")
    file.write_text(whole[: len(whole) // 2])
    refuse("cannot be read")
    file.write_text(whole)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["evil.Tokenizer", None]}
    config["tokenizer_class"] = "EvilTokenizer"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text("raise SystemExit('code from the folder ran')")
    refuse("cannot be read", "need no code of their own")


def test_tokenizers_that_differ_are_named(tiny) -> None:
    compare_tokenizers(tiny, tiny_tokenizer(chat=False))
    with pytest.raises(ModelError) as error:
        compare_tokenizers(tiny, tiny_tokenizer(("<think>",)))
    one_line(
        error, "student.hf_path and teacher.hf_path", "1 tokens are only in the teacher.*<think>"
    )
    moved = tiny_tokenizer()
    moved.add_special_tokens({"pad_token": "<pad>"})
    other = tiny_tokenizer()
    other.add_special_tokens({"pad_token": "<x>"})
    with pytest.raises(ModelError) as error:
        compare_tokenizers(moved, other)
    one_line(error, "only in the student.*<pad>.*only in the teacher.*<x>")
    a, b = tiny_tokenizer(("\u00e4", "\u00f6")), tiny_tokenizer(("\u00f6", "\u00e4"))
    with pytest.raises(ModelError) as error:
        compare_tokenizers(a, b)
    one_line(error, "2 tokens have different ids .*student 98, teacher 99")


def test_eos_warning_says_what_will_happen(qwen3) -> None:
    assert eos_warning({1, 2}, [2, 1], qwen3) is None
    text = eos_warning({151643}, {151645, 151643}, qwen3)
    assert text is not None and "\n" not in text
    assert text.startswith("student ends with 151643 ('<|endoftext|>'), teacher ends with 151643")
    assert "151645 ('<|im_end|>')" in text and "rollout.max_new_tokens" in text
