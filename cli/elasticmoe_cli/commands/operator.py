"""The Kubernetes operator's process, as its Deployment starts it."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from elasticmoe_cli.commands.common import plainly
from elasticmoe_cli.errors import CommandFailed


class LogFormat(StrEnum):
    """plain: for people. json: a line an object."""

    plain = "plain"
    json = "json"


class PullPolicy(StrEnum):
    """When a node pulls an image (Kubernetes' own words)."""

    if_not_present = "IfNotPresent"
    always = "Always"
    never = "Never"


class Level(StrEnum):
    """How much is logged."""

    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"


def operator(
    image: Annotated[
        str, typer.Option(help="Image of sidecars and coordinators.", envvar="ELASTICMOE_IMAGE")
    ],
    all_namespaces: Annotated[bool, typer.Option(help="Watch the whole cluster.")] = False,
    namespace: Annotated[
        list[str] | None, typer.Option(help="Watch this namespace; may be repeated.")
    ] = None,
    image_pull_policy: Annotated[
        PullPolicy, typer.Option(help="Pull policy of that image.")
    ] = PullPolicy.if_not_present,
    image_pull_secret: Annotated[
        list[str] | None, typer.Option(help="Secret to pull it with; may be repeated.")
    ] = None,
    network_policy: Annotated[
        bool, typer.Option(help="Make a NetworkPolicy for each group.")
    ] = True,
    log_format: Annotated[LogFormat, typer.Option(help="Of the log.")] = LogFormat.plain,
    log_level: Annotated[Level, typer.Option(help="Of the log.")] = Level.info,
    health_port: Annotated[int, typer.Option(help="Port of /healthz.", min=1, max=65535)] = 8080,
    metrics_port: Annotated[int, typer.Option(help="Port of /metrics.", min=1, max=65535)] = 8081,
    own_namespace: Annotated[
        str, typer.Option(help="Namespace that it runs in.", envvar="POD_NAMESPACE")
    ] = "",
) -> None:
    """Run the operator in a cluster: it looks after every ElasticMoEDeployment."""
    import logging

    from elasticmoe_operator.builders.common import Platform
    from elasticmoe_operator.clients.kubernetes import ApiError
    from elasticmoe_operator.run import run
    from elasticmoe_operator.settings import Settings

    with plainly():
        if all_namespaces == bool(namespace):
            raise CommandFailed("say --all-namespaces, or --namespace for each one to watch", 2)
        settings = Settings(
            platform=Platform(
                image=image,
                pull_policy=image_pull_policy.value,
                pull_secrets=tuple(image_pull_secret or ()),
                namespace=own_namespace,
                network_policy=network_policy,
            ),
            namespaces=tuple(namespace or ()),
            health_port=health_port,
            metrics_port=metrics_port,
        )
        level = getattr(logging, log_level.value.upper())
        try:
            run(settings, json_logs=log_format == LogFormat.json, level=level)
        except ApiError as error:
            raise CommandFailed(str(error), 2) from None
