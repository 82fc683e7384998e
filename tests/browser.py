"""A real headless Chromium for the tests, by the DevTools protocol and the standard library.

    with Browser(folder) as browser:
        tab = browser.open("http://127.0.0.1:8000/")
        tab.run("document.title")

The protocol uses two pipes (--remote-debugging-pipe): the browser reads from its descriptor 3 and
writes to 4. Each message is one JSON value, followed by a NUL byte.
"""

import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ALT, CTRL = 1, 2                                  # modifiers of `press`, as bits
SECONDS = 20.0                                    # the longest wait for anything


def find() -> str | None:
    """Returns the path of the browser, or None. The environment variable CHROMIUM comes first."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One browser process, with its profile in `folder`."""

    def __init__(self, folder: Path):
        (theirs_in, self._out), (self._in, theirs_out) = os.pipe(), os.pipe()
        # Descriptors above 3 and 4, to which the shell then moves them.
        passed = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (theirs_in, theirs_out)]
        command = [find(), "--headless=new", "--remote-debugging-pipe", "--no-first-run",
                   "--disable-gpu", "--disable-dev-shm-usage", "--disable-extensions",
                   "--disable-background-networking", "--disable-component-update",
                   "--disable-sync", "--lang=en", f"--user-data-dir={folder}",
                   "--no-sandbox",                # root and many containers cannot use it
                   "--host-resolver-rules=MAP *.test 127.0.0.1"]           # the attacker's DNS
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{passed[0]} 4>&{passed[1]}', "bash", *command],
            pass_fds=passed, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True)
        for end in (theirs_in, theirs_out, *passed):
            os.close(end)
        self._buffer, self._number = b"", 0
        self.call("Browser.getVersion")

    def call(self, method: str, session: str | None = None, **parameters) -> dict:
        """Sends one command and returns its result. Raises AssertionError if it is refused."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        os.write(self._out, json.dumps(message | ({"sessionId": session} if session else {}))
                 .encode() + b"\0")
        end = time.monotonic() + SECONDS
        while True:
            answer = self._read(end)
            if answer.get("id") == self._number:
                if "navigated" in answer.get("error", {}).get("message", ""):
                    raise Navigated(answer["error"]["message"])
                assert "error" not in answer, (method, answer)
                return answer["result"]

    def _read(self, end: float) -> dict:
        while b"\0" not in self._buffer:
            assert select.select([self._in], [], [], max(0, end - time.monotonic()))[0], "no answer"
            part = os.read(self._in, 1 << 20)
            assert part, "the browser has died"
            self._buffer += part
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)

    def open(self, url: str) -> "Tab":
        """Opens a tab in a window of its own, because timers of hidden tabs are slow."""
        target = self.call("Target.createTarget", url="about:blank", newWindow=True)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = Tab(self, target, session)
        tab.call("Emulation.setFocusEmulationEnabled", enabled=True)
        tab.go(url)
        return tab

    def kill(self) -> None:
        """Kills the whole browser with SIGKILL."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_) -> None:
        self.kill()
        os.close(self._in)
        os.close(self._out)


class Navigated(Exception):
    """The page was replaced by the next one before it answered."""


class Tab:
    """One page."""

    def __init__(self, browser: Browser, target: str, session: str):
        self.browser, self.target, self.session = browser, target, session

    def call(self, method: str, **parameters) -> dict:
        return self.browser.call(method, self.session, **parameters)

    def go(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def run(self, script: str):
        """Returns the JSON value of a JavaScript expression, or of the promise that it gives."""
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True,
                           returnByValue=True, userGesture=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, script: str, seconds: float = SECONDS):
        """Returns the value of an expression as soon as it is true, on this page or the next."""
        end = time.monotonic() + seconds
        while True:
            with contextlib.suppress(Navigated):
                if value := self.run(script):
                    return value
            assert time.monotonic() < end, (script, self.run("document.body.innerText"))
            time.sleep(0.02)

    def press(self, key: str, modifiers: int = 0) -> None:
        code = {"Enter": 13, "Escape": 27, "Tab": 9}.get(key) or ord(key.upper())
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        key = {"key": key, "code": key if len(key) > 1 else f"Key{key.upper()}",
               "windowsVirtualKeyCode": code, "modifiers": modifiers}
        self.call("Input.dispatchKeyEvent", type="keyDown" if text and not modifiers
                  else "rawKeyDown", **key, **({} if modifiers else {"text": text}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **key)

    def type(self, text: str) -> None:
        """Inserts text into the element that has the focus, as an input method does."""
        self.call("Input.insertText", text=text)

    def reload(self) -> None:
        self.run("window.stale = true")
        self.call("Page.reload")
        self.wait("!window.stale && document.readyState === 'complete'")

    def close(self) -> None:
        self.browser.call("Target.closeTarget", targetId=self.target)

    def tree(self) -> list[tuple[str, str]]:
        """Returns (role, name) of everything that a screen reader gets, in its order."""
        nodes = self.call("Accessibility.getFullAXTree")["nodes"]
        return [(node["role"]["value"], node.get("name", {}).get("value", ""))
                for node in nodes if not node.get("ignored") and "role" in node]
