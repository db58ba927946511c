"""What stands before the routes: who is let in, how much he may send, and one line of log for each request."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import secrets
import sys
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TextIO

from diptych.serving.errors import APIError
from diptych.serving.metrics import Metrics
from diptych.serving.settings import Settings

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

access = logging.getLogger("diptych.serving.access")
logger = logging.getLogger(__name__)
OPEN_PATHS = ("/", "/health")  # without a key
GRACE_SECONDS = 30.0  # to read an answer in, once the time for writing it is over


class Guard:
    """An ASGI application around another. Whatever happens inside, the client is told in OpenAI's form."""

    def __init__(self, app: App, settings: Settings, metrics: Metrics, known_paths: frozenset[str]) -> None:
        """`known_paths`: counted by name; others together, so that nobody fills the memory with names of his own."""
        self.app, self.settings, self.metrics, self.known = app, settings, metrics, known_paths
        self.keys = [key.encode() for key in settings.keys]

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status, note = time.monotonic(), 0, {"id": secrets.token_hex(8)}
        scope["state"] = {**scope.get("state", {}), "note": note}

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", note["id"].encode())]
            await send(message)

        try:
            try:
                self._let_in(scope)
                body = await self._body(scope, receive)
                async with asyncio.timeout(self.settings.timeout_seconds + GRACE_SECONDS):  # also for who does not read his answer
                    await self.app(scope, _replay(body, receive), sending)
            except APIError as error:
                await _refuse(error, sending)
            except OSError:
                raise
            except Exception:
                logger.exception("request %s failed", note["id"])
                if not status:
                    await _refuse(APIError(500, "something went wrong in the server; its log says more"), sending)
        except OSError:  # the client is gone, or its time is over
            note.setdefault("end", "gone")
        finally:
            seconds = time.monotonic() - began
            path = scope["path"] if scope["path"] in self.known else "other"
            self.metrics.requests.labels(path, str(status or "none")).inc()
            self.metrics.seconds.labels(path).observe(seconds)
            client = (scope.get("client") or ("?",))[0]
            extra = "".join(f" {name}={value if isinstance(value, int | float) else json.dumps(value)}" for name, value in note.items())
            access.info(
                "%s %s %s %s %.3fs%s", client, json.dumps(scope["method"]).strip('"'), json.dumps(scope["path"][:200]), status or "none",
                seconds, extra,
            )  # fmt: skip

    def _let_in(self, scope: MutableMapping[str, Any]) -> None:
        """Raises APIError for a foreign host, and without a key."""
        headers = dict(scope["headers"])
        if self.settings.hosts is not None:
            host = headers.get(b"host", b"").decode("latin-1").lower()
            name = host[: host.rindex("]") + 1] if "]" in host else host.partition(":")[0]
            if name not in self.settings.hosts:
                raise APIError(403, f"the server answers to {', '.join(sorted(self.settings.hosts))} only", code="wrong_host")
        if not self.keys or scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS":
            return
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        matches = [hmac.compare_digest(given.strip(), key) for key in self.keys]  # all of them: time tells nothing
        if scheme.lower() != b"bearer" or not any(matches):
            raise APIError(401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key")

    async def _body(self, scope: MutableMapping[str, Any], receive: Receive) -> bytes:
        """Raises APIError where it is too large (413), or comes too slowly (408)."""
        most = self.settings.max_body
        too_large = APIError(413, f"the request has more than {most} bytes, the most that is read", code="request_too_large")
        announced = dict(scope["headers"]).get(b"content-length", b"")
        if announced.isdigit() and int(announced[:20]) > most:
            raise too_large
        pieces, size = [], 0
        try:
            async with asyncio.timeout(self.settings.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ConnectionResetError
                    pieces.append(message.get("body", b""))
                    size += len(pieces[-1])
                    if size > most:
                        raise too_large
                    if not message.get("more_body"):
                        return b"".join(pieces)
        except TimeoutError:
            raise APIError(408, f"the request did not come within {self.settings.body_seconds:g} s", code="request_timeout") from None


def _replay(body: bytes, receive: Receive) -> Receive:
    """Gives the body once, then what the server says: that the client left."""
    first = True

    async def again() -> Message:
        nonlocal first
        if first:
            first = False
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return again


async def _refuse(error: APIError, send: Send) -> None:
    body = json.dumps(error.body()).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close", **error.headers}
    sent = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": sent})
    await send({"type": "http.response.body", "body": body})


class QuietHandler(logging.StreamHandler[TextIO]):
    """A log that cannot be written (a full disk, a closed pipe) stops nothing; lost lines are counted."""

    def __init__(self, metrics: Metrics, stream: TextIO | None = None) -> None:
        super().__init__(stream or sys.stderr)
        self.metrics = metrics

    def handleError(self, record: logging.LogRecord) -> None:
        self.metrics.lost_lines.inc()
