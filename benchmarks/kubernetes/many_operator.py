"""The operator's process of `many.py`: the product's own, with simulated APIs to talk to.

    python benchmarks/kubernetes/many_operator.py '{"api": PORT, "coordinators": {NAME: PORT}, …}'

Coordinators are reached under their own names, each at its own port of this host. Beside it answers
a thread at `times`: seconds of each look since it was asked last.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import elasticmoe_cli.main  # noqa: F401  as in the product: its memory counts
import kopf
from aiohttp.abc import AbstractResolver, ResolveResult
from elasticmoe_operator import metrics
from elasticmoe_operator.builders.common import Platform
from elasticmoe_operator.clients.coordinator import Coordinators
from elasticmoe_operator.clients.kubernetes import Kubernetes
from elasticmoe_operator.run import run
from elasticmoe_operator.settings import Settings


class Hosts(AbstractResolver):
    """Names of Services to ports of this host."""

    def __init__(self, ports: Mapping[str, int]) -> None:
        self._ports = ports

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = ResolveResult(
            hostname=host,
            host="127.0.0.1",
            port=self._ports[host.partition("-coordinator.")[0]],
            family=socket.AF_INET,
            proto=0,
            flags=socket.AI_NUMERICHOST,
        )
        return [found]

    async def close(self) -> None:
        pass


class Times:
    """Of each look, kept in place of the histogram's buckets only."""

    def __init__(self) -> None:
        self.found: list[float] = []
        observe = metrics.RECONCILE.observe

        def record(amount: float, exemplar: dict[str, str] | None = None) -> None:
            self.found.append(amount)
            observe(amount, exemplar)

        setattr(metrics.RECONCILE, "observe", record)  # noqa: B010  mypy: a method

    def serve(self, port: int) -> None:
        times = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                found, times.found = times.found, []
                body = json.dumps(found).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()


def main() -> None:
    given = json.loads(sys.argv[1])
    url = f"http://127.0.0.1:{given['api']}"
    Times().serve(given["times"])
    run(
        Settings(
            platform=Platform(image="elasticmoe:bench", namespace="elasticmoe-system"),
            health_port=given["health"],
            metrics_port=given["metrics"],
        ),
        kubernetes=Kubernetes(url),
        coordinators=Coordinators(Hosts(given["coordinators"])),
        login=lambda **_: kopf.ConnectionInfo(server=url),
    )


if __name__ == "__main__":
    main()
