"""The scripts' own environment: what is missing is said at once where it cannot be fetched."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts, and in `bin` a `python3` that has no packages."""
    root = tmp_path_factory.mktemp("checkout")
    shutil.copytree(REPO / "scripts", root / "scripts")
    for name in ("constraints.txt", "pyproject.toml"):
        shutil.copy(REPO / name, root)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", root / "empty"], check=True)
    return root


@pytest.fixture
def nowhere() -> str:
    """An index at a port where nobody listens."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return f"http://localhost:{s.getsockname()[1]}/simple"


def settings(checkout: Path, **pip: str) -> dict[str, str]:
    """An environment in which pip has these settings and no others."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "PYTHON"))}
    path = f"{checkout / 'empty' / 'bin'}{os.pathsep}{kept['PATH']}"
    return {**kept, "PATH": path, "PIP_CONFIG_FILE": os.devnull, **pip}


def test_without_a_network_it_is_one_line_what_is_missing_and_how_to_bring_it(
    checkout: Path, nowhere: str
) -> None:
    environment = settings(checkout, PIP_INDEX_URL=nowhere)
    # Another Python of that name would have the packages.
    shadow = checkout / "empty" / "bin" / "python"
    assert shadow.exists()
    done = subprocess.run(
        [checkout / "scripts" / "run_train.sh"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    first, line = done.stderr.splitlines()
    assert done.returncode == 2 and "making one" in first
    names = "torch torchdata transformers datasets safetensors tyro tensorboard tqdm jinja2"
    assert line.startswith(f"opd_titan: python3 lacks {names}, and pip gets nothing")
    assert f"pip download --dest wheels --constraint constraints.txt {names}; then here:" in line
    assert line.endswith(f"python3 -m pip install --no-index --find-links wheels {names}")


# -------------------------------------------------------------------- where there is a mirror


def wheel(folder: Path) -> Path:
    """A package of that name with nothing in it."""
    info, path = "tqdm-9.9.dist-info", folder / "tqdm-9.9-py3-none-any.whl"
    files = {
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: tqdm\nVersion: 9.9\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\n"
        "Tag: py3-none-any\n",
    }
    record = ""
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
            digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest())
            record += f"{name},sha256={digest.decode().rstrip('=')},{len(text)}\n"
        archive.writestr(f"{info}/RECORD", f"{record}{info}/RECORD,,\n")
    return path


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[str]:
    """An index of one package on this machine."""
    page = tmp_path / "simple" / "tqdm"
    page.mkdir(parents=True)
    file = wheel(page)
    (page / "index.html").write_text(f'<a href="{file.name}">{file.name}</a>')
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    server = ThreadingHTTPServer(("localhost", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://localhost:{server.server_port}/simple"
    server.shutdown()


def can_download(checkout: Path, **pip: str) -> bool:
    script = f'source "{checkout}/scripts/environment.sh"; can_download "{sys.executable}"'
    return subprocess.run(["bash", "-c", script], env=settings(checkout, **pip)).returncode == 0


def test_a_mirror_or_a_folder_of_wheels_is_as_good_as_a_network(
    checkout: Path, mirror: str, nowhere: str, tmp_path: Path
) -> None:
    assert can_download(checkout, PIP_INDEX_URL=mirror)
    assert not can_download(checkout, PIP_INDEX_URL=nowhere)
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    wheel(wheels)
    assert can_download(checkout, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(wheels))
    config = tmp_path / "pip.conf"
    config.write_text(f"[global]\nindex-url = {mirror}\n")
    assert can_download(checkout, PIP_CONFIG_FILE=str(config))
