"""A page in a real browser: Chromium without a window, told what to do by the DevTools protocol over a pair of pipes.

with browser.page(file) as page:
    page.click("#next")
    assert page.value("document.title") == "2"
    page.screenshot(picture)
"""

import base64
import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = "chromium", "chromium-headless-shell", "chromium-browser", "google-chrome"
PATIENCE = 60.0  # seconds; a busy machine starts a browser slowly


def find() -> str | None:
    """The browser: FASTBERT_CHROMIUM, or the first of the usual names on the path."""
    return os.environ.get("FASTBERT_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """A page that is loaded.

    Attributes:
        requests: addresses that the page asked for, its own first.
        errors: what its script raised or logged as an error.
    """

    def __init__(self, commands: int, answers: int):
        self._commands, self._answers = commands, answers
        self._pending, self._number, self._session = b"", 0, None
        self.requests: list[str] = []
        self.errors: list[str] = []

    def open(self, address: str, width: int, height: int) -> None:
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network"):
            self.send(f"{domain}.enable")
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.send("Page.navigate", url=address)
        self._until("Page.loadEventFired")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol; AssertionError where the browser refuses it."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        return self._until(self._number)

    def value(self, script: str) -> Any:
        """What an expression in JavaScript gives, a promise's result too."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def dom(self) -> str:
        return self.value("document.documentElement.outerHTML")

    def place(self, selector: str) -> tuple[float, float]:
        """The middle of the first element that the selector finds, in the window, scrolled to where it is not seen."""
        script = """(() => {
            const element = document.querySelector(%s);
            if (!element) return null;
            element.scrollIntoView({block: "nearest"});
            const box = element.getBoundingClientRect();
            return [box.x + box.width / 2, box.y + box.height / 2];
        })()"""
        place = self.value(script % json.dumps(selector))
        assert place, f"the page has no {selector}"
        return place[0], place[1]

    def move(self, x: float, y: float) -> None:
        """Moves the mouse there."""
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, selector: str) -> None:
        """Clicks the middle of an element, with the mouse: what lies above it gets the click."""
        x, y = self.place(selector)
        self.move(x, y)
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str) -> None:
        """Presses a key, by its name in JavaScript, such as "ArrowRight"."""
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def screenshot(self, file: Path) -> None:
        """Writes the window's content as a PNG."""
        file.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))

    def _until(self, wanted: int | str) -> dict[str, Any]:
        """The answer to a command, or the event of that name; what comes before it is noted."""
        while True:
            message = self._message()
            if message.get("id") == wanted:
                assert "error" not in message, message["error"]
                return message["result"]
            method, parameters = message.get("method"), message.get("params", {})
            if method == "Network.requestWillBeSent":
                self.requests.append(parameters["request"]["url"])
            elif method == "Runtime.exceptionThrown":
                details = parameters["exceptionDetails"]
                self.errors.append(details.get("exception", {}).get("description", details["text"]))
            elif method == "Runtime.consoleAPICalled" and parameters["type"] == "error":
                self.errors.append(str(parameters["args"]))
            if method == wanted:
                return parameters

    def _message(self) -> dict[str, Any]:
        end = time.monotonic() + PATIENCE
        while b"\0" not in self._pending:
            ready, _, _ = select.select([self._answers], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"the browser said nothing for {PATIENCE:.0f} seconds"
            read = os.read(self._answers, 1 << 20)
            assert read, "the browser ended"
            self._pending += read
        message, _, self._pending = self._pending.partition(b"\0")
        return json.loads(message)


@contextlib.contextmanager
def page(file: Path, width: int = 1280, height: int = 900) -> Iterator[Page]:
    """The page in `file`, loaded; the test is skipped where there is no browser."""
    program = find()
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed, and FASTBERT_CHROMIUM names none")
    commands_read, commands = os.pipe()
    answers, answers_written = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # It reads commands from descriptor 3 and answers on 4. No sandbox: it refuses to have one where root runs it.
        options = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --remote-debugging-pipe"
        shell = f'exec 3<&{commands_read} 4>&{answers_written}; exec "$0" "$@"'
        process = subprocess.Popen(
            ["bash", "-c", shell, program, *options.split(), f"--user-data-dir={profile}"],
            pass_fds=(commands_read, answers_written), start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(commands_read)
        os.close(answers_written)
        try:
            loaded = Page(commands, answers)
            loaded.open(file.resolve().as_uri(), width, height)
            yield loaded
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            os.close(commands)
            os.close(answers)
