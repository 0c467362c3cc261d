"""What a user can get wrong: a name, how to make it, and what the one line must contain.

A mistake is a function of the world (see `tiny_world`) and an empty folder for new files; it
returns options. `test_bad_input` runs each through the program.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiny_world import World, make_model, write_rows

Options = list[Any]
Mistake = Callable[[World, Path], Options]
TABLE: dict[str, tuple[Mistake, list[str]]] = {}
# Python's own words, of which 3.10 has one less.
DIGITS = "(4300 digits)" if sys.version_info >= (3, 11) else "(4300)"


def given(*options: Any) -> Mistake:
    return lambda world, folder: [str(o).format(world=world.folder, new=folder) for o in options]


def data(name: str, content: str | bytes, *options: Any) -> Mistake:
    """A data file with this content."""

    def make(world: World, folder: Path) -> Options:
        raw = content if isinstance(content, bytes) else content.encode()
        (folder / name).write_bytes(raw)
        return ["--data.path", folder / name, "--rollout.prompts_per_step", 1, *options]

    return make


def recipe(content: str | bytes, *options: Any) -> Mistake:
    """A recipe of one's own in place of the world's; see `test_a_mistake_is_told_in_one_line`."""

    def make(world: World, folder: Path) -> Options:
        raw = content if isinstance(content, bytes) else content.encode()
        (folder / "own.toml").write_bytes(raw)
        return ["--job.config_file", folder / "own.toml", *options]

    return make


def model(change: Callable[[Path], Any], role: str = "student") -> Mistake:
    """The student's folder, changed."""

    def make(world: World, folder: Path) -> Options:
        shutil.copytree(world.student, folder / "model")
        change(folder / "model")
        return [f"--{role}.hf_path", folder / "model"]

    return make


def config(**values: Any) -> Mistake:
    """The student's folder with other values in its config.json."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return model(change)


def put(name: str, content: str | bytes) -> Callable[[Path], Any]:
    raw = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / name).write_bytes(raw)


def without(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).unlink()


def other_model(role: str = "teacher", **sizes: Any) -> Mistake:
    def make(world: World, folder: Path) -> Options:
        make_model(folder / "other", seed=3, **sizes)
        return [f"--{role}.hf_path", folder / "other"]

    return make


def file_at(name: str, *options: Any) -> Mistake:
    def make(world: World, folder: Path) -> Options:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
        return given(*options)(world, folder)

    return make


def rows(*values: Any) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


ROW = {"question": "What is 1+1?", "answer": "#### 2"}
LINE = rows(ROW)
DEEP = "[" * 100_000

TABLE |= {
    # ---- the command line
    "unknown option": (given("--optimizer.lrr", 1), ["--optimizer.lrr", "--optimizer.lr?"]),
    "unknown table": (given("--optimiser.lr", 1), ["--optimiser.lr", "--optimizer.lr?"]),
    "option of no table": (given("--lr", 1), ["--lr: unknown option", "--optimizer.lr?"]),
    "option in another table": (given("--training.lr", 1), ["--training.lr", "--optimizer.lr?"]),
    "nothing like it": (given("--zzz.zzz", 1), ["--zzz.zzz: unknown option", "--help"]),
    "option without a value": (given("--training.steps"), ["--training.steps: has no value", ">="]),
    "option before an option": (
        given("--training.steps", "--compile.enable"),
        ["--training.steps: has no value; wanted an integer >= 1"],
    ),
    "empty value": (given("--training.steps="), ["--training.steps: ", '""', "integer >= 1"]),
    "value without an option": (given("3"), ['"3": not an option', "--table.key value"]),
    "two values": (given("--training.steps", 3, 4), ['"4": not an option', "--table.key value"]),
    "short option": (given("-x"), ['"-x": not an option', "--table.key value"]),
    "one dash": (given("-training.steps", 3), ['"-training.steps": not an option']),
    "empty word": (given(""), ['"": not an option', "--table.key value"]),
    "two dashes": (given("--"), ["--: unknown option", "--help"]),
    "comma for a dot": (given("--training,steps=3"), ["--training,steps: unknown option"]),
    "no TOML file": (
        given("--job.config_file", "{new}/no.toml"),
        ["--job.config_file: ", "no.toml: no such file"],
    ),
    "the last value counts": (
        given("--training.steps", 3, "--training.steps", "x"),
        ['--training.steps: "x" is not an integer'],
    ),
    "control characters": (given("--a\x1b[31m\nb"), ["--a\\x1b[31m\\nb: unknown option"]),
    # ---- the recipe
    "not TOML": (recipe("[data]\n\npath =\n"), ["own.toml: not valid TOML", "line 3"]),
    "JSON for TOML": (recipe('{"data": {}}'), ["own.toml: not valid TOML", "line 1"]),
    "YAML for TOML": (recipe("data:\n  path: x\n"), ["own.toml: not valid TOML", "line 1"]),
    "unquoted text": (recipe("[data]\npath = x/y\n"), ["own.toml: not valid TOML", "line 2"]),
    "a table twice": (recipe("[data]\n[data]\n"), ["own.toml: not valid TOML", "line 2"]),
    "Latin-1": (recipe(b"[job]\ndescription = '\xe4'"), ["own.toml: not UTF-8", "line 2"]),
    "UTF-16": (recipe("[job]\n".encode("utf-16")), ["own.toml: not UTF-8", "line 1"]),
    "weights for TOML": (
        recipe(b"\0" * ((1 << 20) + 1)),
        ["--job.config_file: ", "own.toml is larger than 1 MiB; wanted a TOML file"],
    ),
    "endless key": (recipe("\n" + "a." * 9999), ["own.toml: line 2: a key of over 100 parts"]),
    "deep TOML": (recipe("x = " + DEEP), ["own.toml: not valid TOML"]),
    "folder for TOML": (given("--job.config_file", "{new}"), ["is a folder; wanted a TOML file"]),
    "a device without end": (
        given("--job.config_file", "/dev/zero"),
        ["--job.config_file: /dev/zero is larger than 1 MiB"],
    ),
    "missing parent": (recipe('base = "no.toml"'), ["own.toml: base: ", "no.toml: no such file"]),
    "parent of itself": (recipe('base = "own.toml"'), ["own.toml: base: goes in a circle"]),
    "parent that is a folder": (recipe('base = "."'), ["own.toml: base: ", "wanted a TOML file"]),
    "true for on": (
        recipe("[compile]\nenable = true"),
        ["own.toml: [compile] enable: true is not one of auto, on, off"],
    ),
    "unknown key": (recipe("[rollout]\ngroupsize = 2"), ["[rollout] groupsize", "group_size?"]),
    "key outside a table": (recipe("steps = 2"), ["steps: unknown key", "training.steps?"]),
    "empty recipe": (recipe(""), ["[student] hf_path: required", "folder or a hub id"]),
    # ---- keys that contradict each other
    "no student": (given("--student.hf_path="), ["[student] hf_path: required", "hub id"]),
    "no teacher": (given("--teacher.hf_path="), ["[teacher] hf_path: required", "hub id"]),
    "no data": (given("--data.dataset", "prompts", "--data.path="), ["[data] path: required"]),
    "sft on own samples": (
        given("--distill.objective", "sft"),
        ["[rollout] on_policy_fraction: 1.0 contradicts", '"sft"', "wanted 0.0"],
    ),
    "policy gradient on others' samples": (
        given("--rollout.on_policy_fraction", 0.5),
        ["[rollout] on_policy_fraction: 0.5 contradicts", "wanted 1.0"],
    ),
    "baseline without advantages": (
        given("--distill.objective", "jsd", "--distill.baseline", "kl"),
        ['[distill] baseline: "kl" contradicts', 'wanted "none"'],
    ),
    "cut distribution": (
        given("--distill.objective", "jsd", "--rollout.top_p", 0.9),
        ["[rollout] top_p: 0.9 contradicts", "wanted 1.0"],
    ),
    "too many minibatches": (
        given("--distill.minibatches", 9),
        ["[distill] minibatches: 9 is more than a step's 8 responses", "at most 8"],
    ),
    "budget of nothing": (
        given("--rollout.max_tokens_per_step", 7),
        ["[rollout] max_tokens_per_step: 7", "8 responses", "at least 8"],
    ),
    "thinking in a raw prompt": (
        given("--data.enable_thinking", "--data.template", "raw"),
        ["[data] enable_thinking: ", '[data] template = "chat"'],
    ),
    "greedy samples": (
        given("--validation.samples_per_prompt", 4),
        ["[validation] samples_per_prompt: 4 greedy samples", "temperature > 0"],
    ),
    "a step without checkpoints": (
        given("--checkpoint.load_step", 2, "--checkpoint.no_enable"),
        ["[checkpoint] load_step: 2 contradicts", "wanted true"],
    ),
    "a step that is not there": (
        given("--checkpoint.load_step", 2),
        ["checkpoint.load_step", "step-2", "complete steps: none"],
    ),
    # ---- the world
    "too many replicas": (
        given("--parallelism.data_parallel_replicate_degree", 2),
        ["data_parallel_replicate_degree 2", "not the world size 1", "1 x 1 x 1"],
    ),
    "too many shards": (
        given("--parallelism.data_parallel_shard_degree", 3),
        ["data_parallel_shard_degree 3", "not the world size 1", "1 x 1 x 1"],
    ),
    "heads that do not divide": (
        given("--parallelism.tensor_parallel_degree", 3),
        ["tensor_parallel_degree"],
    ),
    "a number too large for a tensor": (
        given("--reference.coef", 1e39),
        ["--reference.coef: 1e+39 does not fit in 32 bits; wanted a number > -1"],
    ),
    "more samples than any": (
        given("--rollout.group_size", 2**40),
        ["--rollout.group_size: 1099511627776 is out of range", "<= 1048576"],
    ),
    "timeout without end": (
        given("--comm.init_timeout_seconds", 2**62),
        ["--comm.init_timeout_seconds: ", "out of range", "<= 31536000"],
    ),
    # ---- the dump folder
    "dump folder is a file": (
        file_at("taken", "--job.dump_folder", "{new}/taken"),
        ["[job] dump_folder: ", "new/taken cannot be written", "choose a folder"],
    ),
    "dump folder under a file": (
        file_at("taken", "--job.dump_folder", "{new}/taken/run"),
        ["[job] dump_folder: ", "new/taken/run cannot be written", "choose a folder"],
    ),
    "dump folder is the student": (
        given("--job.dump_folder", "{world}/student"),
        ["[job] dump_folder: ", "is also [student] hf_path", "a folder of its own"],
    ),
    "dump folder is the data": (
        given("--job.dump_folder", "{world}/student/../data/."),
        ["[job] dump_folder: ", "is also [data] path", "a folder of its own"],
    ),
    "dump folder in a bucket": (
        given("--job.dump_folder", "s3://bucket/run"),
        ['--job.dump_folder: "s3://..." is a URL; wanted a local path'],
    ),
    "dump folder at home": (
        given("--job.dump_folder", "~/run"),
        ['--job.dump_folder: "~/run": ~ is not expanded here'],
    ),
    "dump folder without a name": (
        given("--job.dump_folder="),
        ["--job.dump_folder: must not be empty"],
    ),
    "dump folder of a long name": (
        given("--job.dump_folder", "x" * 300),
        ["--job.dump_folder: ", "(300 characters) is too long for a path"],
    ),
    "dump folder where nothing can be": (
        given("--job.dump_folder", "/proc/run"),
        ["[job] dump_folder: /proc/run cannot be written", "choose a folder"],
    ),
    # ---- data files
    "no data file": (given("--data.path", "{new}/no.jsonl"), ["data.path = ", "does not exist"]),
    "data at a URL": (
        given("--data.path", "https://example.org/train.jsonl?sig=x"),
        ['--data.path: "https://..." is a URL; wanted a local path or a hub id'],
    ),
    "data of a long name": (given("--data.path", "x" * 5000), ["--data.path: ", "too long"]),
    "data of nobody": (given("--data.path", "~nobody-here/x"), ["--data.path: ", "no such user"]),
    "data path over two lines": (given("--data.path", "a\nb"), ['data.path = "a\\nb" does not']),
    "empty data folder": (given("--data.path", "{new}"), ["data.path: ", "no data", ".jsonl"]),
    "data of another format": (
        data("a.csv", "question,answer\n1,2\n"),
        ["data.path: ", "a.csv must end in one of .jsonl"],
    ),
    "weights for data": (
        given("--data.path", "{world}/student/model.safetensors"),
        ["data.path: ", "must end in one of .jsonl"],
    ),
    "a folder called data file": (
        lambda world, new: ((new / "a.jsonl").mkdir(), ["--data.path", new / "a.jsonl"])[1],
        ["data.path: ", "a.jsonl", "holds no data"],
    ),
    "no such split": (given("--data.split", "dev"), ['split = "dev"', 'holds "test", "train"']),
    "no split at all": (given("--data.split", "train["), ['data.split = "train["', "train[:100]"]),
    "empty slice": (given("--data.split", "train[5:5]"), ["data.path: ", "no rows in split"]),
    "empty data file": (data("a.jsonl", ""), ["data.path: ", "a.jsonl is empty"]),
    "blank data file": (data("a.jsonl", "\n\n"), ["data.path: ", "a.jsonl holds no rows"]),
    "empty array": (data("a.json", "[]"), ["data.path: ", "a.json"]),
    "empty objects": (
        data("a.jsonl", "{}\n{}\n"),
        ["a.jsonl, line 1 has no column 'question'", "it has none"],
    ),
    "data not UTF-8": (
        data("a.jsonl", LINE.encode() + b'{"question": "\xe4", "answer": "#### 1"}\n'),
        ["data.path: ", "a.jsonl, line 2: not UTF-8"],
    ),
    "data in UTF-16": (data("a.jsonl", LINE.encode("utf-16")), ["a.jsonl, line 1: not UTF-8"]),
    "broken JSON": (data("a.jsonl", LINE * 2 + LINE[:20]), ["a.jsonl, line 3: broken JSON: "]),
    "an array for a row": (data("a.jsonl", LINE + "[1]\n"), ["a.jsonl, line 2: not a JSON object"]),
    "a field twice": (
        data("a.jsonl", LINE + '{"question": "a", "question": "b", "answer": "#### 1"}\n'),
        ["a.jsonl, line 2: field 'question' is given twice"],
    ),
    "half a character": (
        data("a.jsonl", LINE + '{"question": "\\ud800", "answer": "#### 1"}\n'),
        ["a.jsonl, line 2: half of a surrogate pair ('\\ud800')"],
    ),
    "a number of 5,000 digits": (
        data("a.jsonl", LINE + '{"question": 1' + "0" * 5000 + "}\n"),
        [f"a.jsonl, line 2: Exceeds the limit {DIGITS}"],
    ),
    "a number without bounds": (
        data("a.jsonl", LINE + '{"question": 1e999, "answer": "#### 1"}\n'),
        ["a.jsonl, line 2: field 'question' is a number, not text"],
    ),
    "deep data": (data("a.jsonl", DEEP), ["a.jsonl", "nested too deeply"]),
    "deep row": (
        data("a.jsonl", LINE + '{"question": "a", "answer": "#### 1", "x": ' + "[" * 30_000
             + "]" * 30_000 + "}\n"),
        ["a.jsonl, line 2: nested too deeply"],
    ),
    "no parquet": (data("a.parquet", "PAR1 not really"), ["a.parquet cannot be read: "]),
    "truncated parquet": (
        data("a.parquet", b"PAR1" + b"\0" * 100 + b"PAR1"),
        ["data.path: ", "a.parquet cannot be read: "],
    ),
    "missing column": (
        data("a.jsonl", rows({"q": "x", "answer": "#### 1"})),
        ["a.jsonl, line 1 has no column 'question'", "gsm8k needs", "it has 'q', 'answer'"],
    ),
    "column of another type": (
        data("a.jsonl", rows({**ROW, "question": 5})),
        ["a.jsonl, line 1: field 'question' is a number, not text"],
    ),
    "column of two types": (
        data("a.jsonl", rows(ROW, {**ROW, "question": {"a": 1}})),
        ["a.jsonl, line 2: field 'question' is an object, not text"],
    ),
    "no answer": (
        data("a.jsonl", rows(ROW, {"question": "x"})),
        ["a.jsonl, line 2: field 'answer' is missing or null"],
    ),
    "answer without a number": (
        data("a.jsonl", rows(ROW, {**ROW, "answer": "two"})),
        ["a.jsonl, line 2: field 'answer' has no final number after '####'"],
    ),
    "all prompts too long": (
        given("--data.max_prompt_tokens", 5),
        ["data.max_prompt_tokens = 5 drops every prompt", "shortest has 31 tokens"],
    ),
    "one prompt as long as a library": (
        data("a.jsonl", rows({**ROW, "question": "x" * 3_000_000})),
        ["data.max_prompt_tokens = 512 drops every prompt", "over 100000 letters"],
    ),
    "fewer prompts than a step": (
        given("--rollout.prompts_per_step", 23),
        ["rollout.prompts_per_step = 23", "22 prompts", "1 to 22"],
    ),
    "nothing to grade": (
        lambda world, folder: (
            write_rows(folder / "p.jsonl", [{"prompt": "Say hello."}]),
            ["--validation.dataset", "prompts", "--validation.path", folder / "p.jsonl"],
        )[1],
        ["validation", "without an answer to grade"],
    ),
    "validation file is missing": (
        given("--validation.path", "{new}/no.jsonl"),
        ["validation.path = ", "no.jsonl", "does not exist"],
    ),
    "a grader that cannot be imported": (
        given("--validation.grader", "no_such_module:grade"),
        ["validation.grader: 'no_such_module:grade' cannot be imported (ModuleNotFoundError"],
    ),
    "a grader that is not there": (
        given("--validation.grader", "math:grade"),
        ["validation.grader: 'math:grade' cannot be imported (AttributeError", "grade"],
    ),
    "a grader that is no function": (
        given("--validation.grader", "math:pi"),
        ["validation.grader: 'math:pi' is a float, not a function"],
    ),
    "a grader of one argument": (
        given("--validation.grader", "json:dumps"),
        ["validation.grader: 'json:dumps' cannot be called as function(response, answer)"],
    ),
    "answers that are no letters": (
        given("--validation.grader", "choice"),
        ["validation.path: ", "test.jsonl, line 1: the answer '", "grader choice", 'as "B"'],
    ),
    "responses outgrow the model": (
        given("--rollout.max_new_tokens", 300),
        ["rollout.max_new_tokens: ", "31 tokens", "256 positions of the student"],
    ),
    # ---- models
    "an end that is no token": (
        given("--student.eos_token", "<|end|>"),
        ["student.eos_token: '<|end|>' is no token of ", "such as '<eos>'"],
    ),
    "no model": (given("--student.hf_path", "{new}/no"), ["student.hf_path = ", "local folder"]),
    "a file for a model": (
        file_at("model", "--teacher.hf_path", "{new}/model"),
        ["teacher.hf_path = ", "neither a local folder nor a hub id"],
    ),
    "a model at a URL": (
        given("--teacher.hf_path", "https://huggingface.co/org/name"),
        ['--teacher.hf_path: "https://..." is a URL; wanted a local path or a hub id'],
    ),
    "a model of a long name": (given("--teacher.hf_path", "x" * 5000), ["--teacher.hf_path: "]),
    "a model of nobody": (given("--student.hf_path", "~nobody-here"), ["no such user's home"]),
    "no config.json": (model(without("config.json")), ["model/config.json", "missing"]),
    "config.json is an array": (model(put("config.json", "[]")), ["config.json", "an object"]),
    "config.json is deep": (model(put("config.json", '{"a":' * 10**5)), ["config.json: "]),
    "another family": (config(model_type="llama"), ["config.json: model_type is 'llama'", "qwen3"]),
    "a family of no name": (config(model_type=[]), ["config.json: "]),
    "YaRN": (
        config(rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}),
        ["config.json: rope_parameters is ", "'yarn'", "plain RoPE"],
    ),
    "sliding window": (
        config(use_sliding_window=True),
        ["config.json: use_sliding_window is True", "supports false"],
    ),
    "quantized": (
        config(quantization_config={"quant_method": "fp8"}),
        ["config.json: quantization_config is ", "no quantization"],
    ),
    "a size of the wrong type": (
        config(num_hidden_layers="2"),
        ["config.json: num_hidden_layers is '2'; expected a positive int"],
    ),
    "a size beyond any": (
        config(num_hidden_layers=10**12),
        ["config.json: n_layers is 1000000000000; wanted at most 1000"],
    ),
    "a width beyond any": (config(intermediate_size=2**62), ["ffn_dim is ", "at most 1048576"]),
    "an endless epsilon": (
        config(rms_norm_eps=float("inf")),
        ["config.json: rms_norm_eps is inf; expected a positive, finite float"],
    ),
    "an epsilon of nothing": (config(rms_norm_eps=0.0), ["config.json: rms_norm_eps is 0.0; exp"]),
    "a theta that is no number": (
        config(rope_theta=float("nan"), rope_parameters=None),
        ["config.json: rope_theta is nan; expected a positive, finite float"],
    ),
    "no weights": (model(without("model.safetensors")), ["model.safetensors", "has neither"]),
    "weights of a pickle": (
        model(lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin")),
        ["pytorch_model.bin, which is not read: convert it"],
    ),
    "truncated weights": (
        model(put("model.safetensors", b"\x10\0\0\0\0\0\0\0{}")),
        ["model/model.safetensors", "truncated"],
    ),
    "weights of other sizes": (config(vocab_size=99), ["model.safetensors", "[99, 32]"]),
    "no tokenizer": (model(without("tokenizer.json")), ["student.hf_path", "no tokenizer.json"]),
    "broken tokenizer": (
        model(put("tokenizer.json", "{}")),
        ["student.hf_path: the tokenizer in ", "cannot be read", "must be whole"],
    ),
    "no end token": (
        model(lambda f: (put("generation_config.json", "{}")(f))),
        ["neither generation_config.json nor config.json has an eos_token_id", "give the id"],
    ),
    "deep generation config": (
        model(put("generation_config.json", '{"a":' * 10**5)),
        ["generation_config.json: "],
    ),
    "another tokenizer": (
        other_model(extra=("\t",)),
        ["student.hf_path and teacher.hf_path", "vocabularies differ", "the same tokenizer"],
    ),
    "another reference": (
        lambda world, folder: [
            *other_model("reference", extra=("\t",))(world, folder),
            *("--reference.coef", 0.5),
        ],
        ["student.hf_path and reference.hf_path", "the same tokenizer"],
    ),
    "too small a vocabulary": (
        other_model(vocab_size=97),
        ["teacher.hf_path: ", "highest token id is 97", "vocab_size is 97"],
    ),
    "no chat template": (
        other_model("student", chat=False),
        ['data.template = "chat"', "no chat template", 'data.template = "raw"'],
    ),
    "broken chat template": (
        model(put("chat_template.jinja", "{% for %}")),
        ["model/chat_template.jinja: the chat template fails (TemplateSyntaxError", "or set"],
    ),
    "chat template that fails": (
        model(put("chat_template.jinja", "{{ 1 + messages[0].content }}")),
        ["model/chat_template.jinja: the chat template fails (TypeError", '"raw"'],
    ),
}  # fmt: skip
