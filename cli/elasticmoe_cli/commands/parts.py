"""One part of a group each: coordinator, sidecar, instance."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from elasticmoe_coordinator.core.config import GroupConfig

from elasticmoe_cli.commands.common import DEFAULT_KEYS, Drain, KeysDir, Loss, Policy, plainly
from elasticmoe_cli.errors import CommandFailed


def _log_to_stderr() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    for name in ("httpx", "uvicorn.error"):
        logging.getLogger(name).setLevel(logging.WARNING)


def coordinator(
    deployment: Annotated[str, typer.Option(help="Name of the group.")] = "moe",
    keys: KeysDir = DEFAULT_KEYS,
    bind: Annotated[str, typer.Option(help="Where sidecars connect.")] = "tcp://127.0.0.1:7410",
    http_host: Annotated[str, typer.Option(help="Address of the HTTP API.")] = "127.0.0.1",
    http_port: Annotated[int, typer.Option(help="Port of the HTTP API.", min=0, max=65535)] = 7411,
    policy: Annotated[Policy, typer.Option(help="Who says how many.")] = Policy.declared,
    size: Annotated[int | None, typer.Option(help="First size of a declared group.")] = None,
    min_size: Annotated[
        int, typer.Option(help="Smallest DP size; it fixes the slots.")
    ] = GroupConfig.min_size,
    max_size: Annotated[int, typer.Option(help="Largest DP size.")] = GroupConfig.max_size,
    drain_policy: Annotated[Drain, typer.Option(help="Past the drain limit.")] = Drain.postpone,
    drain_timeout: Annotated[
        int, typer.Option(help="Seconds that requests may take to end.", min=0)
    ] = GroupConfig.drain_timeout,
    lame_duck: Annotated[
        float, typer.Option(help="Least seconds from not ready to closed: endpoints propagate.")
    ] = GroupConfig.lame_duck,
    preflight_limit: Annotated[
        float, typer.Option(help="Seconds for joiners to be checked and started.")
    ] = GroupConfig.preflight_limit,
    start_limit: Annotated[
        float, typer.Option(help="Seconds for all engines to be up.")
    ] = GroupConfig.start_limit,
    prepare_limit: Annotated[
        float, typer.Option(help="Seconds for a resize's prepare; vLLM's own limit is 300.")
    ] = GroupConfig.prepare_limit,
    commit_limit: Annotated[
        float, typer.Option(help="Seconds for a resize's commit.")
    ] = GroupConfig.commit_limit,
    loss_policy: Annotated[Loss, typer.Option(help="After an unplanned loss.")] = Loss.restart,
    stall: Annotated[
        float, typer.Option(help="Seconds without progress that are a loss.")
    ] = GroupConfig.stall,
    replacement: Annotated[
        float, typer.Option(help="Seconds to wait for missing instances, then start with fewer.")
    ] = GroupConfig.replacement,
    restart_limit: Annotated[
        int, typer.Option(help="So many recoveries in the window, then it gives up.", min=1)
    ] = GroupConfig.restart_limit,
    restart_window: Annotated[
        float, typer.Option(help="Seconds in which recoveries count.")
    ] = GroupConfig.restart_window,
    settle: Annotated[
        float, typer.Option(help="Seconds without change before a group that follows acts.")
    ] = GroupConfig.settle,
    term: Annotated[int, typer.Option(help="Lowest term to use.", min=1)] = 1,
    ready_file: Annotated[
        Path | None, typer.Option(help="Written once all ports are open.")
    ] = None,
    state_file: Annotated[
        Path | None, typer.Option(help="What the group is, kept for the next coordinator.")
    ] = None,
) -> None:
    """Run the coordinator of one group."""
    from elasticmoe_coordinator.core.config import GroupConfig
    from elasticmoe_coordinator.server import run
    from elasticmoe_coordinator.settings import CoordinatorSettings

    _log_to_stderr()
    with plainly():
        try:
            group = GroupConfig(
                deployment=deployment,
                policy=policy.value,
                size=size,
                min_size=min_size,
                max_size=max_size,
                drain_policy=drain_policy.value,
                drain_timeout=drain_timeout,
                lame_duck=lame_duck,
                preflight_limit=preflight_limit,
                start_limit=start_limit,
                prepare_limit=prepare_limit,
                commit_limit=commit_limit,
                loss_policy=loss_policy.value,
                stall=stall,
                replacement=replacement,
                restart_limit=restart_limit,
                restart_window=restart_window,
                settle=settle,
            )
        except ValueError as error:
            raise CommandFailed(str(error), 2) from None
        settings = CoordinatorSettings(
            group=group,
            keys_dir=keys,
            bind=bind,
            http_host=http_host,
            http_port=http_port,
            term=term,
            ready_file=ready_file,
            state_file=state_file,
        )
        raise typer.Exit(run(settings))


def sidecar(
    instance: Annotated[str, typer.Option(help="Name of this instance.")],
    run_dir: Annotated[Path, typer.Option(help="Folder shared with the launcher.")],
    address: Annotated[str, typer.Option(help="Where the other ranks reach this one.")],
    rpc_port: Annotated[int, typer.Option(help="Where rank 0 listens.", min=1, max=65535)],
    coordinator: Annotated[str, typer.Option(help="tcp://HOST:PORT of the coordinator.")],
    deployment: Annotated[str, typer.Option(help="Name of the group.")] = "moe",
    keys: KeysDir = DEFAULT_KEYS,
    host_ip: Annotated[str, typer.Option(help="VLLM_HOST_IP; the address if empty.")] = "",
    ordinal: Annotated[int | None, typer.Option(help="Place that the platform gave it.")] = None,
    incarnation: Annotated[str, typer.Option(help="The pod's UID.")] = "",
    policy: Annotated[Policy, typer.Option(help="As the coordinator's.")] = Policy.declared,
    http_host: Annotated[str, typer.Option(help="Address of /livez and /metrics.")] = "127.0.0.1",
    http_port: Annotated[int, typer.Option(help="Port of /livez and /metrics.", min=0)] = 0,
    leave_grace: Annotated[
        float, typer.Option(help="Longest wait in seconds for the release of a leaving one.", min=0)
    ] = 600.0,
) -> None:
    """Run the sidecar of one instance."""
    from elasticmoe_sidecar.agent import run
    from elasticmoe_sidecar.settings import Settings

    _log_to_stderr()
    with plainly():
        settings = Settings(
            deployment=deployment,
            instance=instance,
            coordinator=coordinator,
            run_dir=run_dir.absolute(),
            keys_dir=keys,
            address=address,
            rpc_port=rpc_port,
            host_ip=host_ip,
            ordinal=ordinal,
            incarnation=incarnation,
            policy=policy.value,
            http_host=http_host,
            http_port=http_port,
            leave_grace_s=leave_grace,
        )
        raise typer.Exit(run(settings))


def inject(
    folder: Annotated[Path, typer.Argument(help="Made if it is not there; for PYTHONPATH.")],
) -> None:
    """Copy launcher and gate into a folder, for an engine's container that has neither."""
    from elasticmoe_cli.inject import inject as copy

    with plainly():
        typer.echo(f"launcher and gate are in {copy(folder)}")


def join(
    coordinator: Annotated[str, typer.Option(help="tcp://HOST:PORT of the coordinator.")],
    command: Annotated[
        list[str] | None, typer.Argument(help="vllm serve MODEL and its flags.")
    ] = None,
    command_file: Annotated[
        Path | None, typer.Option(help="JSON with the command instead, which may change.")
    ] = None,
    name: Annotated[str, typer.Option(help="Name of this instance; made if empty.")] = "",
    deployment: Annotated[str, typer.Option(help="Name of the group.")] = "moe",
    keys: KeysDir = DEFAULT_KEYS,
    run_dir: Annotated[Path | None, typer.Option(help="Folder for sockets and journal.")] = None,
    python: Annotated[str, typer.Option(help="Python that has vLLM.")] = sys.executable,
    address: Annotated[str, typer.Option(help="Where other ranks reach this one.")] = "127.0.0.1",
    rpc_port: Annotated[int, typer.Option(help="Where rank 0 listens; 0: any.", min=0)] = 0,
    probe_port: Annotated[int, typer.Option(help="Port of the probes; 0: any.", min=0)] = 0,
    policy: Annotated[Policy, typer.Option(help="As the coordinator's.")] = Policy.follow,
    ordinal: Annotated[
        int | None, typer.Option(help="Place in the group.", envvar="SLURM_PROCID")
    ] = None,
    launcher: Annotated[list[str] | None, typer.Option(help="Option for the launcher.")] = None,
) -> None:
    """Run one instance on this host: launcher and sidecar. Put `--` before `vllm serve`."""
    import socket
    import tempfile

    from elasticmoe_cli.join import Instance, run
    from elasticmoe_cli.local import free_port

    with plainly():
        if bool(command) == (command_file is not None):
            raise CommandFailed("give a command after `--`, or --command-file", 2)
        host = socket.gethostname().partition(".")[0]
        name = name or f"{host}-{os.getpid() if ordinal is None else ordinal}"
        folder = run_dir or Path(tempfile.gettempdir()) / f"elasticmoe-{name}"
        instance = Instance(
            name=name,
            deployment=deployment,
            coordinator=coordinator,
            keys_dir=keys,
            run_dir=folder.absolute(),
            command=command or [],
            command_file=command_file,
            python=python,
            address=address,
            rpc_port=rpc_port or free_port(),
            probe_port=probe_port,
            policy=policy.value,
            ordinal=ordinal,
            launcher_options=launcher or [],
        )
        raise typer.Exit(run(instance))
