"""What the plan can ask for. Each action may be asked for again: it is guarded where it happens, a
resize by its operation's id, a deletion by the pod's UID."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ApplyRanks:
    """Write the whole StatefulSet and the command, at the spec's newest revision.

    same_pods: with the images that the group runs: its pods go on.
    """

    replicas: int
    same_pods: bool = False


@dataclass(frozen=True, kw_only=True)
class ApplyCommand:
    """Write the engines' command of the spec's newest revision; launchers take it at a restart."""


@dataclass(frozen=True, kw_only=True)
class NudgePod:
    """Change a pod's annotation: its kubelet brings the volumes up to date at once."""

    name: str
    uid: str
    command: str


@dataclass(frozen=True, kw_only=True)
class RestartGroup:
    """Have the coordinator restart all engines, planned and warm."""

    operation_id: str


@dataclass(frozen=True, kw_only=True)
class ScaleRanks:
    """Change the StatefulSet's replicas and nothing else."""

    replicas: int


@dataclass(frozen=True, kw_only=True)
class SetTarget:
    """Have the coordinator resize the group."""

    operation_id: str
    size: int


@dataclass(frozen=True, kw_only=True)
class LabelPod:
    """Say whether a pod is an active rank."""

    name: str
    uid: str
    active: bool


@dataclass(frozen=True, kw_only=True)
class ForgetPod:
    """Remove the object of a pod whose node is gone, so that it is made again elsewhere."""

    name: str
    uid: str


@dataclass(frozen=True, kw_only=True)
class DeleteRanks:
    """Delete the StatefulSet; its pods leave the group in order."""


Action = (
    ApplyRanks
    | ApplyCommand
    | ScaleRanks
    | SetTarget
    | RestartGroup
    | LabelPod
    | NudgePod
    | ForgetPod
    | DeleteRanks
)
