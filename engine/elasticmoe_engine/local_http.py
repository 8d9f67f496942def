"""A small HTTP/1.1 server with JSON bodies on a unix socket or TCP, and a client."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import socketserver
import stat
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

BODY_LIMIT = 1 << 20
"""Bytes; the largest body anybody has a reason to send is a few hundred."""
_IDLE_LIMIT_S = 10.0


@dataclass(frozen=True)
class Request:
    """One call. path: split at slashes, without empty parts. body: decoded JSON, None for none."""

    method: str
    path: tuple[str, ...]
    query: Mapping[str, str] = field(default_factory=dict)
    body: Any = None


@dataclass(frozen=True)
class Answer:
    """Status and body: text as it is, anything else as JSON."""

    status: int
    body: Any = None
    content_type: str = "text/plain; charset=utf-8"


class BadRequestError(ValueError):
    """The call cannot be understood; the text says what to send instead."""


Handle = Callable[[Request], Answer]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = _IDLE_LIMIT_S
    server: _Server

    def _serve(self) -> None:
        try:
            answer = self.server.handle(self._request())
        except BadRequestError as error:
            self.close_connection = True
            answer = Answer(400, {"error": str(error)})
        except Exception as error:
            answer = Answer(500, {"error": f"{type(error).__name__}: {error}"})
        if isinstance(answer.body, str):
            data, content_type = answer.body.encode(), answer.content_type
        else:
            data, content_type = json.dumps(answer.body).encode(), "application/json"
        self.send_response(answer.status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = _serve  # noqa: N815
    do_HEAD = _serve  # noqa: N815
    do_PUT = _serve  # noqa: N815
    do_POST = _serve  # noqa: N815
    do_DELETE = _serve  # noqa: N815

    def _request(self) -> Request:
        url = urlsplit(self.path)
        try:
            length = int(self.headers.get("Content-Length") or 0)
        except ValueError:
            raise BadRequestError("Content-Length is not a number") from None
        if not 0 <= length <= BODY_LIMIT or "Transfer-Encoding" in self.headers:
            raise BadRequestError(f"send a body of at most {BODY_LIMIT} bytes with its length")
        raw = self.rfile.read(length)
        try:
            body = json.loads(raw) if raw else None
        except ValueError:
            raise BadRequestError("the body is not JSON") from None
        path = tuple(part for part in url.path.split("/") if part)
        return Request(self.command, path, dict(parse_qsl(url.query)), body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the callers ask several times a second."""


class _Server(socketserver.ThreadingMixIn, socketserver.BaseServer):
    daemon_threads = True
    request_queue_size = 128
    handle: Handle

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A caller that hangs up is no news."""


class _UnixServer(_Server, socketserver.UnixStreamServer):
    pass


class _TcpServer(_Server, socketserver.TCPServer):
    allow_reuse_address = True


@dataclass(frozen=True)
class Serving:
    """A server that answers from daemon threads. port: 0 for a unix socket."""

    port: int
    close: Callable[[], None]
    """Begin to stop answering: within half a second nobody does."""


def _run(server: _Server, handle: Handle, name: str, port: int = 0) -> Serving:
    server.handle = handle
    threading.Thread(target=server.serve_forever, name=name, daemon=True).start()

    def stop() -> None:
        server.shutdown()
        server.server_close()

    return Serving(port, threading.Thread(target=stop, name=f"stop {name}", daemon=True).start)


def socket_mode(folder: Path) -> int:
    """Who may open a socket in `folder`: only this user, and the folder's group where its setgid
    bit says that it is shared. So Kubernetes marks an emptyDir of a pod that has an fsGroup.
    """
    return 0o660 if folder.stat().st_mode & stat.S_ISGID else 0o600


def serve_unix(path: Path, handle: Handle) -> Serving:
    """Answer on a unix socket, from daemon threads; `socket_mode` says who can open it.

    An old socket at `path` is replaced: its server is gone. Raises OSError.
    """
    # Bound under another name and renamed, so that nobody ever finds it open to all or not yet
    # listening.
    waiting = path.with_name(f".{path.name}.{os.getpid()}")
    waiting.unlink(missing_ok=True)
    server = _UnixServer(str(waiting), _Handler)
    waiting.chmod(socket_mode(path.parent))
    waiting.rename(path)
    return _run(server, handle, path.name)


def serve_tcp(host: str, port: int, handle: Handle) -> Serving:
    """Answer on TCP from daemon threads. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    kind = type("_Server", (_TcpServer,), {"address_family": family})
    server = kind((host, port), _Handler)
    return _run(server, handle, "probes", int(server.server_address[1]))


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def call_unix(
    path: Path, method: str, target: str, body: Any = None, timeout: float = 1.0
) -> tuple[int, Any]:
    """Status and decoded body of one call. Raises OSError when nobody answers in time."""
    data = None if body is None else json.dumps(body)
    with contextlib.closing(_UnixConnection(path, timeout)) as connection:
        try:
            connection.request(method, target, data, {"Content-Type": "application/json"})
            response = connection.getresponse()
            raw = response.read()
        except http.client.HTTPException as error:
            raise ConnectionError(f"{path}: {error!r}") from error
        is_json = (response.getheader("Content-Type") or "").startswith("application/json")
        return response.status, json.loads(raw) if is_json else raw.decode()
