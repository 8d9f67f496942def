"""The demo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from elasticmoe_cli.commands.common import Engine, Json, plainly
from elasticmoe_cli.errors import CommandFailed

_IN = "In a cluster: "


def demo(
    engine: Annotated[Engine, typer.Option(help="Engine to use.")] = Engine.vllm_cpu,
    out: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
    kill: Annotated[bool, typer.Option("--kill", help="End with the loss of an engine.")] = False,
    clients: Annotated[int, typer.Option(help="Users at once.", min=1, max=64)] = 4,
    as_json: Json = False,
    cluster: Annotated[
        bool, typer.Option("--cluster", help="In the Kubernetes cluster of kubectl, 2 → 3 → 2.")
    ] = False,
    context: Annotated[str, typer.Option(help=f"{_IN}of the kubeconfig.")] = "",
    image: Annotated[str, typer.Option(help=f"{_IN}the product's image.")] = "elasticmoe:dev",
    engine_image: Annotated[
        str, typer.Option(help=f"{_IN}the engines' image.")
    ] = "elasticmoe-engine-base:dev",
    on_nodes: Annotated[
        str, typer.Option(help=f"{_IN}where each node has real vLLM for CPU.")
    ] = "/var/lib/elasticmoe/vllm-cpu",
    keep: Annotated[bool, typer.Option("--keep", help=f"{_IN}leave the group running.")] = False,
    doomed: Annotated[bool, typer.Option("--doomed", hidden=True)] = False,
    prefix: Annotated[str, typer.Option(hidden=True)] = "",
    print_only: Annotated[
        bool, typer.Option("--print", help=f"{_IN}print what would be applied.")
    ] = False,
) -> None:
    """A group resizes 2 → 3 → 2 → 3 → 2 under load: on this host, or in a cluster."""
    from rich.console import Console

    from elasticmoe_cli import cluster_demo, profiles
    from elasticmoe_cli import demo as show

    with plainly():
        console = Console(stderr=as_json)
        if cluster and kill:
            raise CommandFailed("--kill is for the demo on this host", 2)
        if cluster or print_only:
            plan = cluster_demo.Plan(
                engine=engine.value,
                image=image,
                engine_image=engine_image,
                vllm_cpu=profiles.cache().absolute() / "vllm-cpu",
                on_nodes=on_nodes,
                context=context,
                clients=clients,
                keep=keep,
                doomed=doomed,
                prefix=prefix,
            )
            if print_only:
                typer.echo(cluster_demo.manifest(plan), nl=False)
                return
        else:
            profile = profiles.find(engine.value)
        if out is not None:
            show.write(out)  # not only after minutes
        report: show.Report
        if cluster:
            report = cluster_demo.run(plan, console)
        else:
            report = show.run(profile, show.Plan(kill=kill, clients=clients), console)
        if out is not None:
            show.write(out, report)
        if as_json:
            typer.echo(json.dumps(report.as_json()))
        if report.failed or report.output_mismatches:
            raise CommandFailed("the demo did not go as it should: see above")
