"""A headless Chromium driven over two pipes, by its DevTools protocol: no driver to install."""

from __future__ import annotations

import base64
import fcntl
import itertools
import json
import os
import select
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FOUND = next((path for path in map(shutil.which, NAMES) if path), None)
ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--hide-scrollbars", "--remote-debugging-pipe",
]  # fmt: skip
READ_AT, WRITE_AT = 3, 4  # where Chromium expects its ends of the pipes
KEYS = {"Tab": 9, "Enter": 13, "ArrowLeft": 37, "ArrowRight": 39, "Home": 36, " ": 32}


class Page:
    """One tab: what it ran into is in `errors`, what it asked the network for in `requests`."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = commands, answers
        self._numbers = itertools.count(1)
        self._buffer = b""
        self._session: str | None = None
        self._loaded: set[str] = set()
        self.errors: list[str] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log", "Accessibility"):
            self.call(f"{domain}.enable")
        self.call("Page.setLifecycleEventsEnabled", enabled=True)

    def call(self, method: str, **parameters: Any) -> Any:
        """One command of the protocol, and its result."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def _next(self, seconds: float = 60) -> dict[str, Any]:
        until = time.monotonic() + seconds
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._answers], [], [], max(0, until - time.monotonic()))
            got = os.read(self._answers, 1 << 20) if ready else b""
            if not got:
                raise RuntimeError(f"Chromium {'ended' if ready else 'does not answer'}")
            self._buffer += got
        text, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        self._note(message.get("method"), message.get("params", {}))
        return message

    def _note(self, method: str | None, told: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(told["exceptionDetails"])[:800])
        elif method == "Log.entryAdded" and told["entry"]["level"] == "error":
            self.errors.append(told["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])
        elif method == "Page.lifecycleEvent" and told["name"] == "load":
            self._loaded.add(told["loaderId"])

    def open(self, url: str) -> None:
        """Load the page anew, even where only the part after # differs."""
        for each in ("about:blank", url):
            loader = self.call("Page.navigate", url=each)["loaderId"]
            while loader not in self._loaded:
                self._next()

    def evaluate(self, expression: str) -> Any:
        """The value of JavaScript, as JSON would bring it here."""
        got = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in got:
            raise RuntimeError(json.dumps(got["exceptionDetails"])[:2000])
        return got["result"].get("value")

    def view(
        self, width: int, height: int = 900, *, dark: bool = False, still: bool = True
    ) -> None:
        """The size of the window, the theme, and whether the reader wants no motion."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip
        features = {
            "prefers-color-scheme": "dark" if dark else "light",
            "prefers-reduced-motion": "reduce" if still else "no-preference",
        }
        told = [{"name": name, "value": value} for name, value in features.items()]
        self.call("Emulation.setEmulatedMedia", features=told)

    def press(self, key: str) -> None:
        code = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
        text = {"Enter": "\r", " ": " "}.get(key)
        extra = {"text": text} if text else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **code, **extra)
        self.call("Input.dispatchKeyEvent", type="keyUp", **code)

    def screenshot(self, path: Path) -> None:
        got = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(got["data"]))

    def accessible(self) -> list[dict[str, Any]]:
        """What a screen reader is told: role, name and value of each node that is not ignored."""
        nodes = self.call("Accessibility.getFullAXTree")["nodes"]
        return [
            {key: node.get(key, {}).get("value") for key in ("role", "name", "value")}
            for node in nodes
            if not node["ignored"]
        ]


def opened(page: Page, address: str) -> Iterator[Page]:
    """The page at this address. Whatever is done with it, nothing goes wrong or outside."""
    page.errors.clear()
    page.requests.clear()
    page.view(1280)
    page.open(address)
    yield page
    assert page.errors == []
    outside = [url for url in page.requests if not url.startswith(("file:", "about:", "data:"))]
    assert outside == []


@contextmanager
def chromium(profile: Path) -> Iterator[Page]:
    """A browser of its own in an empty profile, ended with the block."""
    assert FOUND is not None
    ours, theirs = os.pipe(), os.pipe()  # answers to us, commands to them
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in (*ours, *theirs)]
    for fd in (*ours, *theirs):
        os.close(fd)
    answers, answers_in, commands_out, commands = high
    process = os.posix_spawn(
        FOUND,
        [FOUND, *ARGUMENTS, f"--user-data-dir={profile}"],
        os.environ,
        file_actions=[
            (os.POSIX_SPAWN_DUP2, commands_out, READ_AT),
            (os.POSIX_SPAWN_DUP2, answers_in, WRITE_AT),
            (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
        ],
        setpgroup=0,
    )
    os.close(commands_out)
    os.close(answers_in)
    try:
        yield Page(commands, answers)
    finally:
        os.close(commands)
        os.close(answers)
        os.killpg(process, signal.SIGKILL)
        os.waitpid(process, 0)
