"""Drive a headless Chromium through its DevTools protocol over a pipe.

This needs no driver, no package and no port.
https://chromedevtools.github.io/devtools-protocol/
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
TIMEOUT = 120.0
KEYS = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Escape": 27, "Tab": 9}


def find_browser() -> str:
    """Return the path of a Chromium; skip the test if there is none."""
    for name in NAMES:
        path = shutil.which(name)
        if path:
            return path
    pytest.skip(f"needs a Chromium on PATH, one of {', '.join(NAMES)}")


class Browser:
    """One browser with one page.

    Attributes:
        requests: URLs that the page requested, its own included.
        complaints: errors and warnings of its console, exceptions, policy violations.
        dialogs: messages of alert() and similar calls.
    """

    def __init__(self, path: str, width: int = 1400, height: int = 900) -> None:
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.dialogs: list[str] = []
        self._number = 0
        self._buffer = b""
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        command = [path, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += ["--no-first-run", "--disable-extensions", "--remote-debugging-pipe"]
        command += [f"--user-data-dir={self._profile.name}"]
        # The browser reads commands from its descriptor 3 and answers on 4.
        pipes = [*os.pipe(), *os.pipe()]
        theirs_in, self._out, self._in, theirs_out = (
            fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in pipes
        )
        for end in pipes:
            os.close(end)
        quiet = [(os.POSIX_SPAWN_OPEN, n, os.devnull, os.O_RDWR, 0) for n in (0, 1, 2)]
        ends = [(os.POSIX_SPAWN_DUP2, theirs_in, 3), (os.POSIX_SPAWN_DUP2, theirs_out, 4)]
        self._pid = os.posix_spawn(path, command, os.environ, file_actions=[*quiet, *ends])
        os.close(theirs_in)
        os.close(theirs_out)
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._in)
        os.close(self._out)
        self._profile.cleanup()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its answer; note the events that arrive before it."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], TIMEOUT)
            assert ready, "the browser does not answer"
            part = os.read(self._in, 1 << 20)
            assert part, "the browser has gone"
            self._buffer += part
        raw, self._buffer = self._buffer.split(b"\0", 1)
        message = json.loads(raw)
        self._note(message.get("method", ""), message.get("params", {}))
        return message

    def _note(self, method: str, about: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent":
            self.requests.append(about["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(about["exceptionDetails"])[:500])
        elif method == "Runtime.consoleAPICalled" and about["type"] in ("error", "warning"):
            self.complaints.append(json.dumps(about["args"])[:500])
        elif method == "Log.entryAdded" and about["entry"]["level"] in ("error", "warning"):
            self.complaints.append(about["entry"]["text"])
        elif method == "Page.javascriptDialogOpening":
            self.dialogs.append(about["message"])
            self._number += 1  # nothing waits for its answer
            close = {"id": self._number, "method": "Page.handleJavaScriptDialog"}
            close |= {"params": {"accept": True}, "sessionId": self._session}
            os.write(self._out, json.dumps(close).encode() + b"\0")

    # ------------------------------------------------------------------ user actions

    def open(self, page: Path, fragment: str = "") -> None:
        """Go to the page and wait until it shows its first rollout."""
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=page.resolve().as_uri() + fragment)
        self.wait("document.documentElement?.dataset.ready === 'true'")

    def run(self, expression: str) -> Any:
        """Return the value of an expression in the page; await promises."""
        found = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, condition: str) -> None:
        """Wait until the condition is true."""
        end = time.monotonic() + TIMEOUT
        while not self.run(condition):
            assert time.monotonic() < end, f"never: {condition}"
            time.sleep(0.02)

    def press(self, *keys: str) -> None:
        """Press keys; a single character also types itself."""
        for key in keys:
            text = {"text": key} if len(key) == 1 else {}
            code = KEYS.get(key, ord(key[0].upper()) if key.isalpha() else 0)
            stroke = {"key": key, "windowsVirtualKeyCode": code}
            self.call("Input.dispatchKeyEvent", type="keyDown", **stroke, **text)
            self.call("Input.dispatchKeyEvent", type="keyUp", **stroke)
        self.settle()

    def point(self, selector: str, number: int = 0, click: bool = False) -> None:
        """Move the mouse to the middle of an element; optionally click."""
        chosen = f"document.querySelectorAll({json.dumps(selector)})[{number}]"
        self.run(f"{chosen}.scrollIntoView({{block: 'nearest'}})")
        box = self.run(f"{chosen}.getBoundingClientRect().toJSON()")
        at = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
        self.call("Input.dispatchMouseEvent", type="mouseMoved", **at)
        if click:
            button = {"button": "left", "clickCount": 1}
            self.call("Input.dispatchMouseEvent", type="mousePressed", **at, **button)
            self.call("Input.dispatchMouseEvent", type="mouseReleased", **at, **button)
        self.settle()

    def select(self, selector: str, value: str) -> None:
        """Choose an option of a select box."""
        self.run(
            f"(() => {{ const box = document.querySelector({json.dumps(selector)}); "
            f"box.value = {json.dumps(value)}; "
            "box.dispatchEvent(new Event('change', {bubbles: true})); })()"
        )
        self.settle()

    def settle(self) -> None:
        """Wait until the page shows what was asked for."""
        self.run("new Promise((done) => setTimeout(done, 0))")
        self.wait("document.getElementById('rollout').getAttribute('aria-busy') === 'false'")

    def text(self, selector: str) -> str:
        return self.run(f"document.querySelector({json.dumps(selector)}).textContent")

    def texts(self, selector: str) -> list[str]:
        every = f"document.querySelectorAll({json.dumps(selector)})"
        return self.run(f"[...{every}].map((e) => e.textContent)")

    def screenshot(self, path: Path) -> None:
        data = self.call("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(data))
