"""For tests of pages: a headless Chromium, driven over a pair of pipes by its own protocol, and no other package.

    with browser() as chromium:
        page = chromium.open(path, width=390, dark=True)
        page.press("ArrowRight")
        assert page.evaluate("document.title") == "..." and not page.errors

Where there is no Chromium (Debian's package is `chromium`; the variable CHROMIUM names another), the test is skipped.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE = 180  # seconds for one answer: a machine may be busy with other tests
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
         "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
         "--hide-scrollbars", "--remote-debugging-pipe")
KEYS = {"ArrowRight": 39, "ArrowLeft": 37, "Home": 36, "End": 35, "Tab": 9, "Enter": 13}


def find_chromium():
    """The browser's program, or None."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def browser():
    """A running Chromium with a profile of its own; the test is skipped where there is none."""
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium, or name one with CHROMIUM=")
    profile = tempfile.mkdtemp(prefix="minipeft-chromium-")
    commands_read, commands_write = os.pipe()
    answers_read, answers_write = os.pipe()

    def as_3_and_4():
        """Chromium reads commands from file 3 and answers into file 4."""
        read, write = os.dup(commands_read), os.dup(answers_write)
        os.dup2(read, 3)
        os.dup2(write, 4)

    process = subprocess.Popen([program, *FLAGS, f"--user-data-dir={profile}", "about:blank"], preexec_fn=as_3_and_4,
                               close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.close(commands_read)
    os.close(answers_write)
    try:
        yield Chromium(commands_write, answers_read)
    finally:
        process.kill()
        process.wait()
        os.close(commands_write)
        os.close(answers_read)
        shutil.rmtree(profile, ignore_errors=True)


class Chromium:
    """The protocol: commands out, answers and events in, each a JSON object with a zero byte behind it."""

    def __init__(self, commands, answers):
        self.commands, self.answers = commands, answers
        self.number, self.rest, self.pages = 0, b"", {}

    def call(self, method, session=None, **parameters):
        """One command and its answer; events that arrive before it go to their pages."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + PATIENCE
        while True:
            answer = self._read(end, method)
            if answer.get("id") == self.number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            if "method" in answer and answer.get("sessionId") in self.pages:
                self.pages[answer["sessionId"]].on_event(answer["method"], answer["params"])

    def _read(self, end, method):
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.answers], [], [], max(0, end - time.monotonic()))
            found = os.read(self.answers, 1 << 16) if ready else b""
            assert found, f"Chromium {'ended' if ready else 'gave no answer'} at {method}"
            self.rest += found
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def open(self, path, width=1100, height=900, dark=False):
        """A file in a page of so many CSS pixels, loaded to its end."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self.pages[session] = Page(self, session)
        for domain in ("Runtime", "Log", "Network", "Page"):
            page.call(f"{domain}.enable")
        page.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                  mobile=width < 600)
        page.call("Emulation.setEmulatedMedia",
                  features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        page.call("Page.navigate", url=Path(path).resolve().as_uri())
        end = time.monotonic() + PATIENCE
        while not page.loaded or page.evaluate("document.readyState") != "complete":
            assert time.monotonic() < end, "the page did not load"
            page.evaluate("new Promise(done => setTimeout(done, 20))")
        return page


class Page:
    """One page: what it said on the console, what it asked the network for, and how to use it.

    Attributes:
        errors: uncaught exceptions, console.error, and what the browser itself complained about.
        requests: addresses that it loaded or tried to, itself included.
    """

    def __init__(self, chromium, session):
        self.chromium, self.session = chromium, session
        self.errors, self.requests, self.loaded = [], [], False

    def call(self, method, **parameters):
        return self.chromium.call(method, self.session, **parameters)

    def on_event(self, method, event):
        if method == "Runtime.exceptionThrown":
            self.errors.append(event["exceptionDetails"].get("exception", {}).get("description", "exception"))
        elif method == "Runtime.consoleAPICalled" and event["type"] in ("error", "assert"):
            self.errors.append(str([argument.get("value") for argument in event["args"]]))
        elif method == "Log.entryAdded" and event["entry"]["level"] == "error":
            self.errors.append(event["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(event["request"]["url"])
        elif method == "Page.loadEventFired":
            self.loaded = True

    def evaluate(self, expression):
        """The value of a JavaScript expression, of a promise what it comes to."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def press(self, key, times=1):
        """A key of KEYS, as from the keyboard."""
        for _ in range(times):
            for kind in ("keyDown", "keyUp"):
                self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=KEYS[key],
                          **({"text": "\r"} if (key, kind) == ("Enter", "keyDown") else {}))

    def click(self, selector):
        """The middle of an element, as by a mouse."""
        x, y = self.evaluate(f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView();"
                             "const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2] })()")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def screenshot(self, path):
        """The visible part of the page, as a PNG."""
        Path(path).write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def overflows(self):
        """Whether the page is wider than its window, so that a reader has to move it sideways."""
        return self.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")
