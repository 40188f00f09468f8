"""A real headless Chromium, spoken to through ChromeDriver (W3C WebDriver) by the standard library
alone.
"""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
# no service of its own may ask the network
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update --hide-scrollbars"
).split()
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


def installed() -> tuple[str, str] | None:
    """Paths of a browser and of its driver, if both are there."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    driver = shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


class Browser:
    """One window; ``with Browser(...) as browser``."""

    def __init__(self, browser: str, driver: str) -> None:
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.process = subprocess.Popen(
            [driver, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.base = f"http://127.0.0.1:{self._port()}"
        options = {
            "binary": browser,
            "args": [*FLAGS, f"--user-data-dir={self.profile.name}"],
            "perfLoggingPrefs": {"enableNetwork": True},
        }
        wanted = {
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        session = self._call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self.base += f"/session/{session['sessionId']}"

    def _port(self) -> int:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if "was started successfully on port" in line:
                return int(line.strip().rstrip(".").rsplit(" ", 1)[1])
        raise OSError("chromedriver did not start")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._call("DELETE", "", None)
        finally:
            self.process.terminate()
            self.process.wait(10)
            assert self.process.stdout is not None
            self.process.stdout.close()
            self.profile.cleanup()

    def _call(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, data, method=method)
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise OSError(json.load(error)["value"]["message"].splitlines()[0]) from None

    def open(self, page: Path | str, *, width: int, dark: bool = False) -> None:
        """Show a file or an address in a window of this width (CSS pixels), light or dark."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        theme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.chrome("Emulation.setDeviceMetricsOverride", **size)
        self.chrome("Emulation.setEmulatedMedia", features=theme)
        self._call(
            "POST", "/url", {"url": page if isinstance(page, str) else page.resolve().as_uri()}
        )

    def chrome(self, command: str, **params: Any) -> Any:
        """A command of Chrome's own protocol."""
        return self._call("POST", "/goog/cdp/execute", {"cmd": command, "params": params})

    def run(self, script: str, *arguments: Any) -> Any:
        """The value that a script returns."""
        return self._call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def find(self, selector: str) -> list[str]:
        """Elements of the page."""
        found = self._call("POST", "/elements", {"using": "css selector", "value": selector})
        return [element[_ELEMENT] for element in found]

    def type(self, element: str, keys: str) -> None:
        """Keys, as a person would press them."""
        self._call("POST", f"/element/{element}/value", {"text": keys})

    def errors(self) -> list[str]:
        """What the console said since the last call."""
        return [entry["message"] for entry in self._log("browser")]

    def requests(self) -> list[str]:
        """Addresses that were asked for since the last call."""
        time.sleep(0.3)
        events = (json.loads(entry["message"])["message"] for entry in self._log("performance"))
        return [
            event["params"]["request"]["url"]
            for event in events
            if event["method"] == "Network.requestWillBeSent"
        ]

    def _log(self, kind: str) -> list[dict[str, Any]]:
        return self._call("POST", "/se/log", {"type": kind})

    def picture(self, path: Path, box: Sequence[float] | None = None) -> None:
        """The whole page as a PNG, or the ``box`` (x, y, width, height in CSS pixels) of it, at
        twice its size.
        """
        chosen = {}
        if box is not None:
            chosen["clip"] = dict(zip(("x", "y", "width", "height"), box, strict=True), scale=2)
        shot = self.chrome("Page.captureScreenshot", captureBeyondViewport=True, **chosen)
        path.write_bytes(base64.b64decode(shot["data"]))
