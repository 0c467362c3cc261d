"""Files of a model, a data set or a recipe run no code and open no file outside their folder.

Nothing that the program writes contains a secret of the environment.
"""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from mistakes import model
from test_bad_input import (  # noqa: F401
    WeightsLoaded,
    listing,
    no_weights,
    one_line,
    refused,
    started,
)
from tiny_world import REPO, World, make_sums, make_world, train

import opd_titan.training.models
from opd_titan.errors import Fault, OneLineError, StorageError, UserError

SECRET = "MARKER-7f3a"
load_model = opd_titan.training.models.load_model  # before `no_weights` takes its place


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


class Touch:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable, tuple]:
        return os.mkdir, (str(self.marker),)


def script_that_touches(marker: Path) -> str:
    return f"import os\nos.mkdir({str(marker)!r})\n"


# ------------------------------------------------------------------------ the source


def calls() -> list[tuple[Path, ast.Call]]:
    files = [*(REPO / "opd_titan").rglob("*.py"), *(REPO / "scripts").glob("*.py")]
    return [
        (file, node)
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call)
    ]


def test_no_call_trusts_code_from_elsewhere() -> None:
    trusted = []
    for file, call in calls():
        for word in call.keywords:
            if word.arg == "trust_remote_code" and not (
                isinstance(word.value, ast.Constant) and word.value.value is False
            ):
                trusted.append(f"{file}:{call.lineno}")
    assert trusted == []


def test_no_call_unpickles_or_evaluates() -> None:
    """torch.load and pickle can run what they read; eval, exec and a shell what they are given."""
    wrong = []
    for file, call in calls():
        name = ast.unparse(call.func)
        keywords = {word.arg: ast.unparse(word.value) for word in call.keywords}
        if name in ("eval", "exec", "os.system", "pickle.load", "pickle.loads", "yaml.load"):
            wrong.append(f"{file}:{call.lineno}: {name}")
        if name in ("torch.load", "np.load", "numpy.load"):
            safe = keywords.get("weights_only") == "True" or keywords.get("allow_pickle") == "False"
            wrong += [] if safe else [f"{file}:{call.lineno}: {name}"]
        if keywords.get("shell") == "True":
            wrong.append(f"{file}:{call.lineno}: shell=True")
    assert wrong == []


# ----------------------------------------------------------------------- model folders


def run_until_weights(world: World, name: str, *options: Any) -> None:
    """Run the program until it would load weights, which `no_weights` prevents."""
    with pytest.raises(WeightsLoaded):
        train(world.argv(name, *options))


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("config.json", {"auto_map": {"AutoConfig": "evil.C", "AutoModel": "evil.C"}}),
        ("config.json", {"auto_map": {"AutoTokenizer": ["evil.C", "evil.C"]}}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.C", "evil.C"]}}),
        (
            "tokenizer_config.json",
            {"auto_map": {"AutoTokenizer": ["evil.CTokenizer", None]}, "tokenizer_class": "CX"},
        ),
    ],
    ids=["model", "tokenizer in config.json", "tokenizer", "tokenizer of its own class"],
)
def test_code_beside_a_model_never_runs(
    world: World, tmp_path: Path, file: str, values: dict[str, Any]
) -> None:
    """The model's other files decide what it is, or it is refused."""
    marker = tmp_path / "marker"

    def change(folder: Path) -> None:
        code = script_that_touches(marker) + "class C: pass\nclass CTokenizer: pass\n"
        (folder / "evil.py").write_text(code)
        path = folder / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    argv = [str(word) for word in world.argv("auto-map", *model(change)(world, tmp_path))]
    try:
        assert train(argv) == 2
    except WeightsLoaded:
        pass
    assert not marker.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "model.pt"])
def test_a_pickle_in_a_model_folder_is_never_loaded(
    world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    marker = tmp_path / "marker"

    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        torch.save({"weight": Touch(marker)}, folder / name)

    line = refused(world.argv("pickle", *model(change)(world, tmp_path)), capfd, world.folder)
    assert str(tmp_path / "model") in line and "model.safetensors" in line
    assert not marker.exists()
    with pytest.raises(FileNotFoundError):  # it would have worked
        marker.rmdir()
    shutil.move(tmp_path / "model" / name, tmp_path / "model.pt")
    torch.load(tmp_path / "model.pt", weights_only=False)
    assert marker.exists()


# ---------------------------------------------------------------------- chat templates

ATTACKS = {
    "classes": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
    "globals": ("{{ cycler.__init__.__globals__.os.mkdir('MARKER') }}", "SecurityError"),
    "lipsum": ("{{ lipsum.__globals__['os'].mkdir('MARKER') }}", "SecurityError"),
    "attr": ("{{ (''|attr('__class__')).__mro__ }}", "SecurityError"),
    "change": ("{{ messages.append(messages[0]) }}", "SecurityError"),
    "include": ("{% include '/etc/passwd' %}", "TypeError"),
    "import": ("{% import 'os' as os %}{{ os.mkdir('MARKER') }}", "TypeError"),
    "endless": ("{% for i in range(10**9) %}x{% endfor %}", "OverflowError"),
    "itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
}


PLACES = ["chat_template.jinja", "tokenizer_config.json"]


@pytest.mark.parametrize(
    ("name", "place"), [*((name, PLACES[0]) for name in ATTACKS), ("globals", PLACES[1])]
)
def test_a_chat_template_stays_in_its_sandbox(
    world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, place: str
) -> None:
    template, error = ATTACKS[name]
    marker = tmp_path / "marker"
    template = template.replace("MARKER", str(marker))

    def change(folder: Path) -> None:
        if place == "chat_template.jinja":
            (folder / place).write_text(template)
            return
        (folder / "chat_template.jinja").unlink()
        path = folder / place
        config = {**json.loads(path.read_text()), "chat_template": template}
        path.write_text(json.dumps(config))

    argv = world.argv("template", *model(change)(world, tmp_path))
    line = refused(argv, capfd, world.folder)
    assert f"model/{place}: the chat template fails ({error}" in line and '"raw"' in line
    assert not marker.exists()


# ------------------------------------------------------------------------ data folders


def test_code_and_pickles_in_a_data_folder_are_not_data(
    world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    marker = tmp_path / "marker"
    folder = tmp_path / "set"
    folder.mkdir()
    for name in ("set.py", "dataset.py", "train.py", "__init__.py"):
        (folder / name).write_text(script_that_touches(marker))
    for name in ("train.pkl", "train.pt", "data.bin", "train.arrow"):
        (folder / name).write_bytes(pickle.dumps(Touch(marker)))
    line = refused(world.argv("set", "--data.path", folder), capfd, world.folder, tmp_path)
    assert "contains no data" in line
    for file in folder.iterdir():
        line = refused(world.argv("set", "--data.path", file), capfd, world.folder, tmp_path)
        assert "must end in one of .jsonl, .json, .parquet" in line
    for name in ("train.jsonl", "train.parquet"):
        (folder / name).write_bytes(pickle.dumps(Touch(marker)))
        line = refused(
            world.argv("set", "--data.path", folder / name), capfd, world.folder, tmp_path
        )
        assert name in line
        (folder / name).unlink()
    # Beside sound data they are ignored.
    make_sums(folder / "train.jsonl", 22, seed=1)
    run_until_weights(world, "set", "--data.path", folder, "--validation.enable=False")
    assert not marker.exists()


def save(folder: Path, rows: list[dict[str, Any]], **features: Any) -> Path:
    datasets.Dataset.from_list(rows, **features).save_to_disk(folder)
    return folder


SUMS = [{"question": f"What is {n}+1?", "answer": f"#### {n + 1}"} for n in range(8)]


@pytest.mark.parametrize("name", ["../../outside.arrow", "/etc/passwd", "..", "a/b.arrow", 3])
def test_a_saved_set_stays_in_its_folder(
    world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: Any
) -> None:
    folder = save(tmp_path / "a" / "saved", SUMS)
    shutil.copy(next(folder.glob("*.arrow")), tmp_path / "outside.arrow")
    state = json.loads((folder / "state.json").read_text())
    state["_data_files"] = [{"filename": name}]
    (folder / "state.json").write_text(json.dumps(state))
    line = refused(world.argv("saved", "--data.path", folder), capfd, world.folder, tmp_path)
    assert f"state.json names {name!r}; expected the name of a file beside it" in line


def test_the_splits_of_a_saved_set_stay_in_its_folder(
    world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "outside", SUMS)
    save(tmp_path / "saved" / "train", SUMS)
    listed = tmp_path / "saved" / "dataset_dict.json"
    listed.write_text(json.dumps({"splits": ["../outside", "train"]}))
    options = ["--data.path", tmp_path / "saved", "--validation.enable=False"]
    run_until_weights(world, "splits", *options, "--rollout.prompts_per_step", 1)
    argv = world.argv("refused", *options, "--data.split", "../outside")
    assert 'data.split = "../outside" is not a split' in refused(argv, capfd, world.folder)


@pytest.mark.parametrize("kind", ["parquet", "saved"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_column_that_names_files_is_refused(
    world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str, nested: bool
) -> None:
    """`datasets` opens the path in an Image column, which may be any file or address."""
    image = {"bytes": b"image", "path": "/etc/passwd"}
    feature: Any = datasets.Image()
    if nested:
        image, feature = [{"a": image}], datasets.List({"a": datasets.Image()})
    features = datasets.Features({"prompt": feature, "answer": datasets.Value("string")})
    table = datasets.Dataset.from_list([{"prompt": image, "answer": "1"}] * 8, features=features)
    path = tmp_path / ("a.parquet" if kind == "parquet" else "saved")
    table.to_parquet(path) if kind == "parquet" else table.save_to_disk(path)
    argv = world.argv("image", "--data.dataset", "prompts", "--data.path", path)
    line = refused(argv, capfd, world.folder, tmp_path)
    assert "column 'prompt' contains Image, which names files to open; wanted text" in line


def test_names_in_the_data_are_only_text(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opd_titan.training.models, "load_model", load_model)
    rows = [
        {
            "prompt": f"../../{n} $(mkdir x) {{0.__class__}} %s",
            "answer": "/../../evil",
            "path": "../../evil",
            "id": "/evil",
            "file_name": "../evil",
        }
        for n in range(4)
    ]
    file = tmp_path / "data" / "train.jsonl"
    file.parent.mkdir()
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--data.dataset", "prompts", "--data.path", file, "--training.steps", 1]
    options += ["--job.dump_folder", tmp_path / "out", "--validation.path", file]
    monkeypatch.chdir(file.parent)
    before = listing(world.folder)
    assert train(world.argv("unused", *options, "--validation.split", "train")) == 0
    assert listing(world.folder) == before
    names = {path.name for path in tmp_path.rglob("*") if "evil" in path.name}
    assert names == set() and {p.name for p in tmp_path.iterdir()} == {"data", "out"}


# ----------------------------------------------------------------------------- recipes


def test_a_parent_that_is_no_recipe_is_not_shown(
    world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """`base` may name any file. Its content must not reach the terminal."""
    private = {
        "passwd": f"root:{SECRET}:0:0::/root:/bin/sh\n",
        "netrc": f"machine host login me password {SECRET}\n",
        "credentials": f"[default]\naws_secret_access_key = {SECRET}\n",
        "quoted": f'[default]\naws_secret_access_key = "{SECRET}"\n',
        "env": f'HF_TOKEN = "{SECRET}"\n',
        "shell": f"export HF_TOKEN={SECRET}\n",
        "key": f"-----BEGIN PRIVATE KEY-----\n{SECRET}\n",
        "binary": b"\x7fELF\xff" + SECRET.encode(),
    }
    for name, content in private.items():
        raw = content if isinstance(content, bytes) else content.encode()
        (tmp_path / name).write_bytes(raw)
        (tmp_path / "own.toml").write_text(f'base = "x/../{name}"\n')
        (tmp_path / "x").mkdir(exist_ok=True)
        argv = ["--job.config_file", str(tmp_path / "own.toml")]
        line = refused(argv, capfd, world.folder, tmp_path)
        assert SECRET not in line and name in line


# ----------------------------------------------------------------------------- secrets

ENVIRONMENT = {
    name: f"hf_{SECRET}"
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY")
}


def assert_no_secret(*texts: str) -> None:
    assert all(SECRET not in text for text in texts)


def assert_no_secret_in(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 5
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []


@pytest.mark.parametrize("user", ["me:{}", "{}", "{}:", "oauth2:{}" + "x" * 80])
def test_a_password_in_a_url_is_not_repeated(
    world: World, capfd: pytest.CaptureFixture[str], user: str
) -> None:
    url = f"https://{user.format(SECRET)}@host/org/name"
    names = ("student.hf_path", "data.path", "job.dump_folder", "training.steps", "job.config_file")
    wrong = [[f"--job.description=see {url}"], [f"--data.paths={url}"], [url]]
    for options in [*([f"--{name}", url] for name in names), *wrong]:
        assert_no_secret(refused(world.argv("url", *options), capfd, world.folder))


@pytest.mark.parametrize("kind", [UserError, Fault, StorageError])
def test_what_is_told_is_one_line_that_fits(kind: type[OneLineError]) -> None:
    text = str(kind(f"https://me:{SECRET}@host/x\n\x1b[31m cannot be read: {'y' * 5000}"))
    assert_no_secret(text)
    assert text.isprintable() and len(text) <= 1000 and "https://***@host/x" in text


def test_no_secret_in_what_a_run_writes(
    world: World,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(opd_titan.training.models, "load_model", load_model)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    options = ["--training.steps", 1, "--profiling.enable"]
    assert train(world.argv("written", *options, "--profiling.interval", 1)) == 0
    assert_no_secret(*capfd.readouterr(), caplog.text)
    assert_no_secret_in(world.folder / "written")


FAULT = """
import sys
import opd_titan.training.phases
from opd_titan.train import main

def update(*args, **kwargs):
    raise RuntimeError("a fault")

opd_titan.training.phases.update = update
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_no_secret_where_a_run_fails(world: World, tmp_path: Path) -> None:
    argv = world.argv("fault", "--validation.enable=False", "--training.steps", 1)
    done = subprocess.run(
        [sys.executable, "-c", FAULT, *argv],
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 1 and "RuntimeError: a fault" in done.stderr
    assert_no_secret(done.stdout, done.stderr)
    files = [path for path in (world.folder / "fault").rglob("*") if path.is_file()]
    assert files and all(SECRET.encode() not in path.read_bytes() for path in files)
    hub = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    argv = world.argv("hub", "--student.hf_path", "org/name")
    code, out, err = started(argv, **ENVIRONMENT, **hub)
    assert (code, out) == (2, "")
    assert_no_secret(one_line(err))
