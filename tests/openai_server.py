"""A real chat-completions server on loopback with scripted answers and faults."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

Messages = list[dict[str, str]]
SOON = {"retry-after-ms": "10"}


@dataclass(frozen=True)
class Reply:
    """A response to send instead of a completion; ``cut`` closes the connection in the middle of the body."""

    status: int = 200
    body: str = "{}"
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    cut: bool = False


def completion(text: str | None, finish: str = "stop", **extra: Any) -> str:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    return json.dumps(
        {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": "m",
            "choices": [choice],
            "usage": usage,
        }
        | extra
    )


def failure(status: int, message: str = "no", **error: str) -> Reply:
    """Return an error in OpenAI's wording that permits an early retry."""
    return Reply(status, json.dumps({"error": {"message": message, "type": "error", **error}}), SOON)


RATE_LIMITED = Reply(429, headers={"Retry-After": "0.01"})
BROKEN = failure(500)
CUT = Reply(body=completion("never whole"), cut=True)
MALFORMED = Reply(body='{"choices": [{')
EMPTY = Reply(body=completion("", choices=[]))
NULL = Reply(body=completion(None))
SLOW = Reply(body=completion("too late"), delay=1.5)


@dataclass(frozen=True)
class Request:
    headers: Message
    body: dict[str, Any]


class OpenAiServer:
    """Serves POST /v1/chat/completions while its context lasts.

    Requests take ``faults`` in the order in which they arrive; None means no fault. ``answer`` then makes a
    text, or a Reply, from the messages.
    """

    def __init__(
        self, answer: Callable[[Messages], str | Reply], faults: Iterable[Reply | None] = ()
    ) -> None:
        self.requests: list[Request] = []
        self.most_at_once = 0
        self._answer, self._faults = answer, iter(faults)
        self._at_once = 0
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def reply(self, request: Request) -> Reply:
        with self._lock:
            self.requests.append(request)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            fault = next(self._faults, None)
        try:
            answer = fault or self._answer(request.body["messages"])
            reply = answer if isinstance(answer, Reply) else Reply(body=completion(answer))
            time.sleep(reply.delay)
            return reply
        finally:
            with self._lock:
                self._at_once -= 1


class _Server(ThreadingHTTPServer):
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that hang up."""


def _handler(server: OpenAiServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path != "/v1/chat/completions":
                return self.send_error(404)
            reply = server.reply(Request(self.headers, json.loads(body)))
            sent = reply.body.encode()
            self.send_response(reply.status)
            for name, value in {
                "Content-Type": "application/json",
                "Content-Length": str(len(sent)),
                **reply.headers,
            }.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(sent[: len(sent) // 2] if reply.cut else sent)
            self.close_connection = reply.cut

        def log_message(self, format: str, *args: Any) -> None:
            """Print nothing."""

    return Handler
