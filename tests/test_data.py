from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any, get_args

import datasets
import pytest
from tiny_tokenizer import one_line, tiny_tokenizer

from opd_titan.config.options import OPTIONS
from opd_titan.data.loading import load_rows
from opd_titan.data.prompts import PromptSet, build_prompts, response_token_ids
from opd_titan.data.sources import DATASETS, Record, dataset
from opd_titan.data.types import Prompt
from opd_titan.errors import DataError, ModelError


def build(tokenizer: Any, dataset: str, path: Path | str, **kwargs: Any) -> PromptSet:
    settings = dict(split="train", template="raw", enable_thinking=False, max_prompt_tokens=10**6)
    settings |= dict(dataset=dataset, path=str(path), tokenizer=tokenizer, keep_responses=False)
    return build_prompts(**{**settings, **kwargs})


def records(dataset: str, path: Path | str, split: str = "train") -> list[Record]:
    return [record for *_, record in load_rows(dataset, str(path), split).records()]


def write_lines(file: Path, rows: list[Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def question(i: int) -> dict[str, str]:
    return {"question": f"What is {i} + 1?", "answer": f"{i} + 1 = {i + 1}\n#### {i + 1}"}


QUESTIONS = [question(i) for i in range(10)]


# ---------------------------------------------------------------- sources, on real data


def test_gsm8k_reads_the_same_from_every_kind_of_path(shared_data, tiny, tmp_path) -> None:
    rows = {}
    for split, count in (("train", 7473), ("test", 1319)):
        file = shared_data / "gsm8k" / f"{split}.jsonl"
        rows[split] = [json.loads(line) for line in file.read_text().splitlines()]
        assert len(rows[split]) == count
    saved = datasets.DatasetDict({s: datasets.Dataset.from_list(r) for s, r in rows.items()})
    saved.save_to_disk(tmp_path / "dict")
    saved["test"].save_to_disk(tmp_path / "one")
    (tmp_path / "hub" / "main").mkdir(parents=True)
    for split in rows:
        saved[split].to_parquet(tmp_path / "hub" / "main" / f"{split}-00000-of-00001.parquet")
    (tmp_path / "array.json").write_text(json.dumps(rows["test"], indent=1))
    for split in rows:
        paths = [shared_data / "gsm8k", tmp_path / "dict", tmp_path / "hub"]
        paths.append(shared_data / "gsm8k" / f"{split}.jsonl")
        if split == "test":
            paths += [tmp_path / "one", tmp_path / "array.json"]
        for path in paths:
            for record, row in zip(records("gsm8k", path, split), rows[split], strict=True):
                assert record.messages == [{"role": "user", "content": row["question"]}]
                assert record.response == row["answer"]
                assert record.answer == row["answer"].split("####")[1].strip().replace(",", "")

    found = build(tiny, "gsm8k", tmp_path / "one", split="test")
    assert (found.num_rows, found.num_duplicates, found.num_too_long) == (1319, 0, 0)
    for prompt, row in zip(found.prompts, rows["test"], strict=True):
        assert prompt.text == (
            f"Question: {row['question']}\nAnswer: Let's solve this step by step.\n"
        )
        assert row["answer"] not in prompt.text


def test_indices_of_a_slice_do_not_reach_into_the_next_set(tiny, tmp_path) -> None:
    rows = [{"prompt": f"Q{i}", "answer": "1"} for i in range(10)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    first = build(tiny, "prompts", tmp_path / "a.jsonl", split="train[4:7]")
    second = build(tiny, "prompts", tmp_path / "a.jsonl", first_index=first.end)
    assert [p.index for p in first.prompts] == [4, 5, 6]
    assert first.num_rows == 3 and second.prompts[0].index == 7


def test_openthoughts3_gives_each_human_turn_once_and_no_trace(shared_data, qwen3) -> None:
    file = shared_data / "openthoughts3_fixture.jsonl"
    rows = [json.loads(line)["conversations"] for line in file.read_text().splitlines()]
    for template in ("raw", "chat"):
        found = build(qwen3, "openthoughts3", file, template=template, keep_responses=True)
        humans = [" ".join(turns[0]["value"].split()) for turns in rows]
        assert found.num_rows == len(rows) == 11
        assert len(found.prompts) == len(set(humans))
        assert found.num_duplicates == len(rows) - len(set(humans)) > 0
        assert [p.index for p in found.prompts] == [humans.index(h) for h in dict.fromkeys(humans)]
        for prompt in found.prompts:
            assert prompt.answer is None
            assert rows[prompt.index][0]["value"] in prompt.text
            assert prompt.response == rows[prompt.index][1]["value"]
            for turns in rows:
                assert turns[1]["value"] not in prompt.text
                for boxed in re.findall(r"\\boxed\{.*\}", turns[1]["value"]):
                    assert boxed not in prompt.text
    assert all(p.response is None for p in build(qwen3, "openthoughts3", file).prompts)


def test_openthoughts3_role_names_system_turns_and_whitespace(tiny, tmp_path) -> None:
    def row(*turns: tuple[str, str]) -> dict:
        return {"conversations": [{"from": role, "value": value} for role, value in turns]}

    file = write_lines(
        tmp_path / "train.jsonl",
        [
            row(("system", "Be kind."), ("human", "Add 1 and 2."), ("gpt", "3")),
            row(("user", " Add  1\nand 2. "), ("assistant", "three")),
            row(("user", "Add 2 and 2."), ("assistant", "4"), ("user", "Sure?")),
            row(("user", "Add 3 and 2.")),
        ],
    )
    found = build(tiny, "openthoughts3", file)
    assert [(p.index, p.text) for p in found.prompts] == [
        (0, "Add 1 and 2."),
        (2, "Add 2 and 2."),
        (3, "Add 3 and 2."),
    ]
    assert found.num_duplicates == 1
    assert [r.response for r in records("openthoughts3", file)] == ["3", "three", "4", None]


def test_prompts_reads_prompt_and_messages_columns(tiny, tmp_path) -> None:
    user, system = {"role": "user", "content": "Hi"}, {"role": "system", "content": "Be kind."}
    reply = {"role": "assistant", "content": "Hello"}
    plain = write_lines(
        tmp_path / "plain.jsonl",
        [
            {"prompt": "Add.", "response": "3", "answer": 3, "other": [1]},
            {"prompt": "Add.", "response": None, "answer": " 1/2 "},
            {"prompt": "Say.", "answer": ""},
        ],
    )
    found = build(tiny, "prompts", plain).prompts
    assert [(p.text, p.answer) for p in found] == [("Add.", "3"), ("Add.", "1/2"), ("Say.", None)]
    assert [r.response for r in records("prompts", plain)] == ["3", None, None]
    chats = write_lines(
        tmp_path / "chats.jsonl",
        [
            {"messages": [system, user, reply]},
            {"messages": [user, reply, user]},
            {"messages": [user, reply], "response": "own"},
        ],
    )
    found = build(tiny, "prompts", chats, template="chat", enable_thinking=True).prompts
    assert [p.text for p in found] == [
        "<system>Be kind.<user>Hi<assistant>",
        "<user>Hi<assistant>Hello<user>Hi<assistant>",
        "<user>Hi<assistant>",
    ]
    assert [r.response for r in records("prompts", chats)] == ["Hello", None, "own"]
    turns = write_lines(tmp_path / "turns.jsonl", [{"prompt": [system, user]}])
    assert build(tiny, "prompts", turns, template="chat").prompts[0].text.endswith("()")


def test_a_new_data_set_is_one_small_function(tiny, tmp_path) -> None:
    try:

        @dataset("riddles", columns=("riddle",))
        def riddles(row) -> Record:
            return Record([{"role": "user", "content": row["riddle"]}])

        file = write_lines(tmp_path / "r.jsonl", [{"riddle": "What has keys?"}])
        assert build(tiny, "riddles", file).prompts[0].text == "What has keys?"
    finally:
        del DATASETS["riddles"]


def test_the_config_offers_exactly_the_data_sets_there_are() -> None:
    assert get_args(OPTIONS["data.dataset"].annotation) == tuple(DATASETS)
    assert get_args(OPTIONS["validation.dataset"].annotation) == ("", *DATASETS)


# ---------------------------------------------------------------- values as they are written


def test_values_of_json_files_are_those_in_the_file(tmp_path) -> None:
    """Arrow would take one type for a column: from its first block, or from the first file."""
    written = ["0.7", "1.10", "1e-11", "1e400", "12345678901234567.0", "9007199254740993", "-0.0"]
    texts = ["null", "1.10", "007", "1e400", "NaN", "[0, 1]", "2024-01-05", "2024-01-05T10:30:00Z"]
    golds = [*written, *(json.dumps(text) for text in texts)]
    prompts = [f"Q{i}" for i in range(len(golds))]
    prompts[0], prompts[1] = '"To be"', "2024-02-29"
    rows = [f'{{"prompt": {json.dumps(p)}, "answer": {g}}}' for p, g in zip(prompts, golds)]  # noqa: B905
    turns = '{"messages": [{"role": "user", "content": "Q"}], "type": "x", "message": {"a": 1}}'
    rows.append(turns)
    (tmp_path / "one.jsonl").write_text("\n".join(rows))
    (tmp_path / "one.json").write_text("[" + ",\n".join(rows) + "]")
    for i, row in enumerate(rows):
        (tmp_path / f"train-{i:05}.jsonl").write_text(row)
    for path in (tmp_path / "one.jsonl", tmp_path / "one.json", tmp_path):
        found = records("prompts", path)
        assert [r.answer for r in found] == [*written, *texts, None]
        assert [r.messages[0]["content"] for r in found] == [*prompts, "Q"]


def test_nan_is_no_answer(tmp_path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "Q", "answer": NaN}\n')
    datasets.Dataset.from_dict({"prompt": ["Q"], "answer": [float("nan")]}).to_parquet(
        tmp_path / "b.parquet"
    )
    for name in ("a.jsonl", "b.parquet"):
        assert records("prompts", tmp_path / name)[0].answer is None


# ---------------------------------------------------------------- files and splits


def test_splits_choose_files_and_rows(tmp_path) -> None:
    folder = tmp_path / "odd [name] *"
    write_lines(folder / "train-00000-of-00002.jsonl", QUESTIONS[:4])
    write_lines(folder / "train-00001-of-00002.jsonl", QUESTIONS[4:])
    write_lines(folder / "data" / "test.jsonl", QUESTIONS[:3])
    (folder / "LICENSE").write_text("text")

    def numbers(split: str) -> list[int]:
        found = list(load_rows("gsm8k", str(folder), split).records())
        assert all(record.answer == str(number + 1) for number, _, record in found)
        return [number for number, *_ in found]

    assert numbers("train") == list(range(10))
    assert numbers("test") == [0, 1, 2]
    assert numbers("train[7:]") == [7, 8, 9]
    assert numbers("train[-2:]") == [8, 9]
    assert numbers("train[:50%]") == [0, 1, 2, 3, 4]
    assert numbers("train[33%:-45%]") == [3, 4, 5]
    assert numbers("train[8:99]") == [8, 9]
    assert load_rows("gsm8k", str(folder), "train").place(5).endswith("-00002.jsonl, line 2")


def test_a_lone_file_is_train_and_a_named_file_is_any_split(tiny, tmp_path) -> None:
    file = write_lines(tmp_path / "questions.jsonl", QUESTIONS)
    assert len(build(tiny, "gsm8k", tmp_path).prompts) == 10
    assert len(build(tiny, "gsm8k", file, split="test[:4]").prompts) == 4
    with pytest.raises(DataError, match='data.split = "test" .* it has "questions"'):
        build(tiny, "gsm8k", tmp_path, split="test")


def test_blank_lines_byte_order_mark_and_line_ends(tiny, tmp_path) -> None:
    lines = [json.dumps(row) for row in QUESTIONS]
    file = tmp_path / "train.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(lines).encode())
    assert len(build(tiny, "gsm8k", file).prompts) == 10
    lines[4] = json.dumps({"question": "Q?", "answer": "none"})
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(lines).encode())
    with pytest.raises(DataError, match="train.jsonl, line 9: field 'answer' has no final number"):
        build(tiny, "gsm8k", file)


# ---------------------------------------------------------------- templates and tokens


def test_templates_with_the_real_tokenizer(shared_data, qwen3) -> None:
    path = shared_data / "gsm8k"
    ends = {True: "<|im_start|>assistant\n", False: "assistant\n<think>\n\n</think>\n\n"}
    for thinking, end in ends.items():
        found = build(qwen3, "gsm8k", path, split="test[:50]", template="chat",
                      enable_thinking=thinking)  # fmt: skip
        for prompt in found.prompts:
            assert prompt.text.startswith("<|im_start|>user\n")
            assert prompt.text.endswith(end)
            assert qwen3.decode(prompt.token_ids) == prompt.text
            messages = [{"role": "user", "content": prompt.text[17:].split("<|im_end|>")[0]}]
            direct = qwen3.apply_chat_template(
                messages, add_generation_prompt=True, enable_thinking=thinking, return_dict=False
            )
            assert list(prompt.token_ids) == direct
    assert found.prompts[0].token_ids[-4:] == (151667, 271, 151668, 271)


def test_raw_prompts_of_the_real_training_set_are_quick(shared_data, qwen3) -> None:
    start = time.process_time()
    found = build(qwen3, "gsm8k", shared_data / "gsm8k", max_prompt_tokens=100, keep_responses=True)
    assert time.process_time() - start < 20
    assert found.num_rows == 7473 == len(found.prompts) + found.num_too_long
    assert 0 < found.num_too_long < 1000
    assert max(len(p.token_ids) for p in found.prompts) == 100
    for prompt in found.prompts[:50]:
        assert qwen3.decode(prompt.token_ids) == prompt.text
        ids = response_token_ids(prompt, qwen3, 151645)
        assert ids[-1] == 151645
        assert qwen3.decode(ids[:-1]) == prompt.response


def test_max_prompts_stops_early_and_keeps_row_numbers(tiny, tmp_path) -> None:
    rows = [question(10**i) for i in range(8)]
    rows[1]["question"] = "x" * 500
    file = write_lines(tmp_path / "train.jsonl", rows)
    found = build(tiny, "gsm8k", file, max_prompts=3, max_prompt_tokens=200)
    assert [p.index for p in found.prompts] == [0, 2, 3]
    assert found.num_too_long == 1
    assert all(len(p.token_ids) == len(p.text) for p in found.prompts)


def test_response_ends_once(tiny) -> None:
    prompt = Prompt(6, "a", (1,), response="ab")
    ids = tuple(tiny.convert_tokens_to_ids(["a", "b"]))
    assert response_token_ids(prompt, tiny, 1) == (*ids, 1)
    assert response_token_ids(prompt, tiny, ids[1]) == ids


def test_a_prompt_without_the_response_to_learn_from_is_refused(tiny, tmp_path) -> None:
    rows = [{"prompt": "a", "response": "b"}, {"prompt": "too long"}, {"prompt": "c"}]
    file = write_lines(tmp_path / "train.jsonl", rows)
    settings = dict(max_prompt_tokens=5)
    assert len(build(tiny, "prompts", file, **settings).prompts) == 2
    with pytest.raises(DataError) as error:
        build(tiny, "prompts", file, **settings, keep_responses=True)
    one_line(error, r"^data\.path: .*train.jsonl, line 3: no response", "on_policy_fraction < 1")
    assert build(tiny, "prompts", file, max_prompts=1, keep_responses=True).prompts[0].response


# ---------------------------------------------------------------- bad input


def jsonl(*rows: Any) -> bytes:
    return b"".join(
        (row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows
    )


GOOD = QUESTIONS[0]
HUMAN = {"from": "human", "value": "Q"}
# name of the file, its content, data set, what the error must say
BAD_FILES: list[tuple[str, bytes, str, str]] = [
    ("a.jsonl", jsonl(GOOD, b'{"question": "x'), "gsm8k", "a.jsonl, line 2: broken JSON: "),
    ("a.jsonl", jsonl(GOOD, b"", b'{"question": }'), "gsm8k", "a.jsonl, line 3: broken JSON"),
    ("a.jsonl", jsonl(GOOD)[:-9], "gsm8k", "a.jsonl, line 1: broken JSON"),
    ("a.jsonl", jsonl(GOOD, [1, 2]), "gsm8k", "a.jsonl, line 2: not a JSON object"),
    ("a.jsonl", jsonl(GOOD, "text"), "gsm8k", "a.jsonl, line 2: not a JSON object"),
    ("a.jsonl", jsonl(None, GOOD), "gsm8k", "a.jsonl, line 1: not a JSON object"),
    ("a.jsonl", b'{\n"question": 1\n}\n', "gsm8k", "a.jsonl, line 1: broken JSON"),
    ("a.json", b'[{"question": "Q",\n"answer": }]', "gsm8k", "a.json, line 2: broken JSON"),
    ("a.json", json.dumps([GOOD, None]).encode(), "gsm8k", "a.json, row 2: not a JSON object"),
    ("a.json", json.dumps([GOOD, {}]).encode(), "gsm8k", "a.json, row 2: field 'question' is miss"),
    ("a.json", json.dumps({"data": [GOOD]}).encode(), "gsm8k", "no column 'question'.*has 'data'"),
    ("a.json", b"[]", "gsm8k", "a.json"),
    ("a.jsonl", b"", "gsm8k", "a.jsonl is empty"),
    ("a.jsonl", b"\n \n\n", "gsm8k", "a.jsonl has no rows"),
    ("a.jsonl", jsonl(GOOD, b'{"question": "caf\xe9", "answer": "#### 1"}'), "gsm8k",
     "line 2: not UTF-8"),
    ("a.jsonl", jsonl(GOOD, "\xff".encode("latin1")), "gsm8k", "line 2: not UTF-8"),
    ("a.parquet", b"PAR1 but not really", "gsm8k", "a.parquet cannot be read: "),
    ("a.csv", b"question,answer\n1,2\n", "gsm8k", "a.csv must end in one of .jsonl, .json"),
    ("a.jsonl", jsonl(GOOD).decode().encode("utf-16"), "gsm8k", "line 1: not UTF-8"),
    ("a.jsonl", jsonl(GOOD, b'{"question": "a", "question": "b", "answer": "#### 1"}'), "gsm8k",
     "line 2: field 'question' is given twice"),
    ("a.jsonl", jsonl(GOOD, b'{"question": "\\ud800", "answer": "#### 1"}'), "gsm8k",
     "line 2: half of a surrogate pair"),
    ("a.jsonl", jsonl(GOOD, b'{"question": 1' + b"0" * 5000 + b"}"), "gsm8k",
     "line 2: Exceeds the limit"),
    ("a.jsonl", jsonl(GOOD, b'{"question": 1e999, "answer": "#### 1"}'), "gsm8k",
     "line 2: field 'question' is a number, not text"),
    ("a.jsonl", b"[" * 100_000, "gsm8k", "nested too deeply"),
    ("a.jsonl", jsonl({}, {}), "gsm8k", "line 1 has no column 'question', .* it has none"),
    ("a.jsonl", jsonl({"q": "x", "answer": "y"}), "gsm8k",
     "a.jsonl, line 1 has no column 'question', .* it has 'q', 'answer'"),
    ("a.jsonl", jsonl(GOOD, {"question": "Q"}), "gsm8k", "line 2: field 'answer' is missing or nu"),
    ("a.jsonl", jsonl(GOOD, {**GOOD, "question": None}), "gsm8k", "line 2: field 'question' is mi"),
    ("a.jsonl", jsonl(GOOD, {**GOOD, "question": ["Q"]}), "gsm8k",
     "line 2: field 'question' is a list, not text"),
    ("a.jsonl", jsonl(GOOD, {**GOOD, "question": "  "}), "gsm8k", "line 2: field 'question' is em"),
    ("a.jsonl", jsonl(GOOD, {**GOOD, "answer": "5"}), "gsm8k", "line 2: field 'answer' has no fin"),
    ("a.jsonl", jsonl(GOOD, {**GOOD, "answer": "#### x"}), "gsm8k", "line 2: field 'answer' has n"),
    ("a.jsonl", jsonl({**GOOD, "answer": 5}), "gsm8k", "line 1: field 'answer' is a number, not t"),
    ("a.jsonl", jsonl({"conversations": "Q"}), "openthoughts3", "line 1: .* is text, not a list"),
    ("a.jsonl", jsonl({"conversations": []}), "openthoughts3", "no turn from 'human' or 'user'"),
    ("a.jsonl", jsonl({"conversations": [HUMAN]}, {"conversations": [{**HUMAN, "from": "gpt"}]}),
     "openthoughts3", "line 2: field 'conversations' has no turn from 'human'"),
    ("a.jsonl", jsonl({"conversations": [HUMAN]}, {"conversations": [{"from": "human"}]}),
     "openthoughts3", r"line 2: field 'conversations\[\].value' is missing or null"),
    ("a.jsonl", jsonl({"conversations": [HUMAN, "x"]}), "openthoughts3", "line 1.* contains text"),
    ("a.jsonl", jsonl({"text": "x"}), "prompts", "no column 'prompt' or 'messages'.*it has 'text'"),
    ("a.jsonl", jsonl({"prompt": "x"}, {"prompt": None}), "prompts", "line 2: field 'prompt' is"),
    ("a.jsonl", jsonl({"prompt": 5}), "prompts", "line 1: field 'prompt' is a number, not text"),
    ("a.jsonl", jsonl({"prompt": 0.5}), "prompts", "line 1: field 'prompt' is a number, not text"),
    ("a.jsonl", jsonl({"prompt": "x", "answer": [1]}), "prompts", "field 'answer' is a list"),
    ("a.jsonl", jsonl({"prompt": "x", "answer": True}), "prompts", "field 'answer' is a boolean"),
    ("a.jsonl", jsonl({"messages": [{"role": "assistant", "content": "x"}]}), "prompts",
     "line 1: field 'messages' has no turn with role 'user'"),
    ("a.jsonl", jsonl({"messages": [{"role": "user", "content": None}]}), "prompts",
     r"line 1: field 'messages\[\].content' is missing or null"),
    ("a.jsonl", jsonl({"messages": [{"role": "user", "content": "x"}] * 2}), "prompts",
     'line 1: the prompt has 2 turns, .* use template = "chat"'),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "dataset", "says"), BAD_FILES, ids=[case[3] for case in BAD_FILES]
)
def test_bad_files_name_the_place(tiny, tmp_path, capfd, name, content, dataset, says) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        build(tiny, dataset, tmp_path / name)
    one_line(error, r"^data\.path: ", re.escape(name), says)
    assert capfd.readouterr().err == ""


def test_bad_rows_of_parquet_and_saved_sets_name_the_row(tiny, tmp_path) -> None:
    table = datasets.Dataset.from_list([*QUESTIONS, {"question": "Q", "answer": None}])
    table.to_parquet(tmp_path / "train.parquet")
    table.save_to_disk(tmp_path / "saved")
    for path, says in (
        ("train.parquet", "train.parquet, row 11"),
        ("saved", "saved, split t.*row 11"),
    ):
        with pytest.raises(DataError) as error:
            build(tiny, "gsm8k", tmp_path / path, split="train[5:]")
        one_line(error, says, "field 'answer' is missing or null")


BAD_CALLS: list[tuple[dict[str, Any], str]] = [
    ({"path": "./nowhere"}, r'data.path = "./nowhere" does not exist; give a folder'),
    ({"path": "nowhere"}, r'data.path = "nowhere" does not exist'),
    ({"path": "a\nb"}, r'data.path = "a\\nb" does not exist'),
    ({"path": "a/b/c"}, r'data.path = "a/b/c" does not exist'),
    ({"path": "some-org/some-set"}, r'data.path: "some-org/some-set" is not a local path, .* hub'),
    ({"path": ""}, r'data.path: "openai/gsm8k" is not a local path, .* of a downloaded copy'),
    ({"path": "", "dataset": "prompts"}, 'data.path = "" does not exist; give a folder'),
    ({"split": "validation"}, 'data.split = "validation" is not in .* has "test", "train"'),
    ({"split": "train[5:3]"}, 'has no rows in split "train.5:3."'),
    ({"split": "train["}, r'data.split = "train\[" is not a split'),
    ({"split": ""}, 'data.split = "" is not a split'),
    ({"split": "train+test"}, r'data.split = "train\+test" is not a split; write "train", "train'),
    ({"split": "train[1]"}, r'data.split = "train\[1\]" is not a split'),
    ({"max_prompt_tokens": 5}, "data.max_prompt_tokens = 5 drops every .* shortest has 64 tokens"),
    ({"section": "validation", "split": "dev"}, 'validation.split = "dev"'),
]  # fmt: skip


@pytest.mark.parametrize(("change", "says"), BAD_CALLS)
def test_bad_settings_name_the_key(tiny, tmp_path, monkeypatch, change, says) -> None:
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "set" / "train.jsonl", QUESTIONS)
    write_lines(tmp_path / "set" / "test.jsonl", QUESTIONS)
    with pytest.raises(DataError) as error:
        build(tiny, **{"dataset": "gsm8k", "path": "set", **change})
    one_line(error, says)


def test_bad_folders(tiny, tmp_path) -> None:
    with pytest.raises(DataError) as error:
        build(tiny, "gsm8k", tmp_path)
    one_line(error, "contains no data")
    (tmp_path / "folder" / "a.jsonl").mkdir(parents=True)
    with pytest.raises(DataError) as error:
        build(tiny, "gsm8k", tmp_path / "folder" / "a.jsonl")
    one_line(error, "a.jsonl.* contains no data")
    write_lines(tmp_path / "train.jsonl", QUESTIONS)
    write_lines(tmp_path / "data" / "train.jsonl", QUESTIONS)
    with pytest.raises(DataError) as error:
        build(tiny, "gsm8k", tmp_path)
    one_line(error, 'has split "train" more than once')
    saved = tmp_path / "saved"
    datasets.DatasetDict({"a": datasets.Dataset.from_list(QUESTIONS)}).save_to_disk(saved)
    with pytest.raises(DataError) as error:
        build(tiny, "gsm8k", saved)
    one_line(error, 'data.split = "train" is not in .* it has "a"')
    next((saved / "a").glob("*.arrow")).write_bytes(b"broken")
    with pytest.raises(DataError) as error:
        build(tiny, "gsm8k", saved, split="a")
    one_line(error, "save_to_disk folder .* cannot be read")


def test_prompts_that_cannot_be_shown(tmp_path) -> None:
    file = write_lines(tmp_path / "a.jsonl", [{"prompt": "x"}])
    with pytest.raises(ModelError) as error:
        build(tiny_tokenizer(chat=False), "prompts", file, template="chat")
    one_line(error, 'data.template = "chat".*no chat template; set data.template = "raw"')
    silent = tiny_tokenizer()
    silent.chat_template = "{{ '' }}"
    with pytest.raises(DataError) as error:
        build(silent, "prompts", file, template="chat")
    one_line(error, "a.jsonl, line 1: the prompt has no tokens")
    turns = [{"role": "tool", "content": "5"}, {"role": "user", "content": "x"}]
    file = write_lines(tmp_path / "b.jsonl", [{"messages": turns}])
    with pytest.raises(DataError) as error:
        build(tiny_tokenizer(), "prompts", file, template="chat")
    one_line(error, "b.jsonl, line 1: the chat template refuses this prompt: no tools")
