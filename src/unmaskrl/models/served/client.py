"""JSON over HTTP with a bound on every wait: standard library, no proxy, one connection a call."""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any, NamedTuple
from urllib.parse import urlsplit

_LOOK = 0.1  # seconds between two looks at signals while an answer is awaited


class Unreachable(ConnectionError):
    """No usable answer, which another try may give: refused, reset, too late, or a 5xx."""


class Failed(Unreachable):
    """A 5xx."""


class Answer(NamedTuple):
    """A reply below 500: its status and its JSON (the text, where it is none)."""

    status: int
    data: Any

    def text(self) -> str:
        """What a server says of a request that it refuses, in one line."""
        data = self.data
        if isinstance(data, dict):
            data = data.get("message") or data.get("error") or data
        if isinstance(data, dict):
            data = data.get("message") or data
        return one_line(data)


class Client:
    """Calls to one server. ``check`` is called while an answer is awaited, and may leave."""

    def __init__(self, url: str) -> None:
        try:
            parts = urlsplit(url if isinstance(url, str) else "")
            port = parts.port
        except ValueError:
            raise ValueError(f"url: expected http://host:port, got {url!r}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url: expected http://host:port, got {url!r}")
        self.url = url.rstrip("/")
        self.host = parts.hostname
        self.port = port
        self.path = parts.path.rstrip("/")
        self.kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        self.check: Callable[[], None] = lambda: None

    def get(self, path: str, timeout: float) -> Answer:
        """GET. Unreachable if there is no usable answer within ``timeout`` seconds."""
        return self._call("GET", path, None, timeout)

    def post(self, path: str, body: dict[str, Any], timeout: float) -> Answer:
        """POST of JSON. Unreachable likewise."""
        return self._call("POST", path, body, timeout)

    def pause(self, seconds: float) -> None:
        """Sleep, with an eye on signals."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.check()
            time.sleep(min(_LOOK, left))

    def _call(self, method: str, path: str, body: dict[str, Any] | None, timeout: float) -> Answer:
        connection = self.kind(self.host, self.port, timeout=timeout)
        try:
            status, raw = self._exchange(connection, method, path, body, timeout)
        finally:
            connection.close()
        try:
            data = json.loads(raw)
        except (ValueError, RecursionError):
            data = raw.decode(errors="replace")
        answer = Answer(status, data)
        if status >= 500:
            raise Failed(f"{path} answered {status} ({answer.text()})")
        return answer

    def _exchange(
        self,
        connection: HTTPConnection,
        method: str,
        path: str,
        body: dict[str, Any] | None,
        timeout: float,
    ) -> tuple[int, bytes]:
        """In a thread: a blocked read would hear no signal for as long as a batch is decoded."""
        done: queue.SimpleQueue[tuple[int, bytes] | Exception] = queue.SimpleQueue()

        def work() -> None:
            try:
                text = None if body is None else json.dumps(body, allow_nan=False)
                headers = {} if body is None else {"Content-Type": "application/json"}
                connection.request(method, self.path + path, text, headers)
                response = connection.getresponse()
                done.put((response.status, response.read()))
            except Exception as error:  # also of a connection that was closed on it
                done.put(error)

        threading.Thread(target=work, daemon=True).start()
        end = time.monotonic() + timeout
        while True:
            try:
                result = done.get(timeout=_LOOK)
                break
            except queue.Empty:
                self.check()
                if time.monotonic() > end:
                    raise Unreachable(f"{path}: no answer within {timeout:g} s") from None
        if isinstance(result, TimeoutError):
            raise Unreachable(f"{path}: no answer within {timeout:g} s") from None
        if isinstance(result, OSError | HTTPException):
            raise Unreachable(f"{path}: {one_line(result) or type(result).__name__}") from None
        if isinstance(result, Exception):
            raise result
        return result


def one_line(data: Any, longest: int = 200) -> str:
    """Any value as the short text of an error's line."""
    text = " ".join(str(data).split())
    return text if len(text) <= longest else f"{text[: longest - 3]}..."
