"""What the operator's process is told."""

from __future__ import annotations

from dataclasses import dataclass

from elasticmoe_operator.builders.common import Platform


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of `elasticmoe operator`. Times are seconds.

    namespaces: watched ones, none for all.
    busy: pause between two looks at a group that changes; calm: at one that doesn't.
    """

    platform: Platform
    namespaces: tuple[str, ...] = ()
    health_port: int = 8080
    metrics_port: int = 8081
    busy: float = 0.5
    calm: float = 15.0
