"""`elasticmoe load`: users as a command."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from support.local import elasticmoe

LOG_PROBABILITIES = [-1.0, -2.5]


class Service(BaseHTTPRequestHandler):
    """Streams tokens; refuses what comes after the first `refuse_after`."""

    protocol_version = "HTTP/1.1"
    refuse_after = 1 << 30
    seen = 0

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).seen += 1
        if self.seen > self.refuse_after:
            self.answer(503, b"{}")
        elif not body.get("stream"):
            choice = {"logprobs": {"token_logprobs": LOG_PROBABILITIES}}
            self.answer(200, json.dumps({"choices": [choice]}).encode())
        else:
            self.send_response(200)
            self.send_header("Connection", "close")
            self.end_headers()
            for number in range(body["max_tokens"]):
                reason = "length" if number == body["max_tokens"] - 1 else None
                event = {"choices": [{"text": "a", "finish_reason": reason}]}
                self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
                time.sleep(0.02)
            self.wfile.write(b"data: [DONE]\n\n")
            self.close_connection = True

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def service() -> Iterator[str]:
    Service.seen, Service.refuse_after = 0, 1 << 30
    with ThreadingHTTPServer(("127.0.0.1", 0), Service) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def command(url: str, *more: str) -> list[str]:
    words = ["load", "--url", url, "--model", "m", "--max-tokens", "4", *more]
    return [sys.executable, "-m", "elasticmoe_cli.main", *words]


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_it_ends_in_order_when_it_is_told(service: str) -> None:
    with subprocess.Popen(command(service), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        first = json.loads(process.stdout.readline())
        process.send_signal(signal.SIGTERM)
        rest = lines(process.stdout.read())
        assert process.wait(20) == 0
    assert not first["ended"]
    last = rest[-1]
    assert last["ended"]
    assert last["failed"] == 0
    assert last["requests"] > 4
    # What ran was waited for: every answer is whole.
    assert last["chunks"] == 5 * last["requests"] == 5 * Service.seen


def test_what_fails_is_counted_and_not_sent_again(service: str) -> None:
    Service.refuse_after = 3
    done = subprocess.run(
        command(service, "--clients", "1", "--seconds", "1.5"),
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    last = lines(done.stdout)[-1]
    assert last["requests"] == Service.seen
    assert last["failed"] == Service.seen - 3 > 0
    assert list(last["errors"]) == [f"{service}: status 503 {{}}"]


def test_log_probabilities_of_each(service: str) -> None:
    done = elasticmoe("load", "--log-probabilities", "--model", "m", "--url", service)
    assert json.loads(done.stdout) == {service: LOG_PROBABILITIES}
    Service.refuse_after = 0
    done = elasticmoe("load", "--log-probabilities", "--model", "m", "--url", service)
    assert done.returncode == 1
    assert done.stderr == f"elasticmoe: {service}: status 503\n"
