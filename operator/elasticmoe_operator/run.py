"""The operator's process."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

import kopf
from prometheus_client import start_http_server

from elasticmoe_operator.clients.coordinator import Coordinators
from elasticmoe_operator.clients.kubernetes import Kubernetes
from elasticmoe_operator.handlers import Operator
from elasticmoe_operator.settings import Settings

Login = Callable[..., kopf.ConnectionInfo | None]
"""Tells kopf where the API server is."""


def run(
    settings: Settings,
    *,
    json_logs: bool = False,
    level: int = logging.INFO,
    kubernetes: Kubernetes | None = None,
    coordinators: Coordinators | None = None,
    login: Login = kopf.login_with_service_account,
) -> None:
    """Run until SIGTERM. Raises ApiError when no API server is known.

    kubernetes, coordinators, login: where they are, if this is not a pod.
    """
    kubernetes = kubernetes or Kubernetes.in_cluster()
    os.environ.setdefault("USER", "elasticmoe")  # kopf asks, and a container's user has no name
    kopf.configure(log_format=kopf.LogFormat.JSON if json_logs else kopf.LogFormat.FULL)
    logging.getLogger().setLevel(level)
    for name in ("aiohttp.access", "kopf.activities.probe", "kopf.objects"):
        logging.getLogger(name).setLevel(logging.WARNING)
    registry = kopf.OperatorRegistry()
    kopf.on.login(registry=registry)(login)
    Operator(settings, kubernetes, coordinators).register(registry)
    options = kopf.OperatorSettings()
    # Without rights in the whole cluster, nobody can be asked which namespaces and kinds there are.
    options.scanning.disabled = bool(settings.namespaces)
    start_http_server(settings.metrics_port)
    kopf.run(
        registry=registry,
        settings=options,
        standalone=True,
        clusterwide=not settings.namespaces,
        namespaces=settings.namespaces,
        liveness_endpoint=f"http://0.0.0.0:{settings.health_port}/healthz",
    )
