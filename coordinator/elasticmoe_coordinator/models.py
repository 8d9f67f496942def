"""The words of the HTTP API: camelCase JSON, described in /openapi.json."""

from __future__ import annotations

import types
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, create_model
from pydantic.alias_generators import to_camel

from elasticmoe_coordinator.core import status


class Model(BaseModel):
    """Base: camelCase outside, snake_case inside; a field that is not known is an error."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, from_attributes=True, extra="forbid"
    )


class Phase(Model):
    """Seconds that one phase took."""

    phase: str
    seconds: float


class Operation(Model):
    """One operation; times are Unix seconds."""

    id: str
    kind: str
    from_size: int
    to_size: int
    phase: str
    state: str
    started: float
    ended: float | None
    attempt: int
    reason: str
    error: str
    phases: list[Phase]


def _like(source: type, name: str, **nested: Any) -> Any:
    """A model with the fields of a status dataclass; `nested` are those that are models too."""
    plain = status.plain_fields(source)
    fields: dict[str, Any] = {key: (hint, ...) for key, hint in (plain | nested).items()}
    return create_model(name, __base__=Model, __doc__=source.__doc__, **fields)


Instance = _like(status.InstanceStatus, "Instance")
_Instances = types.GenericAlias(list, (Instance,))
Group = _like(
    status.GroupStatus,
    "Group",
    operation=Operation | None,
    history=list[Operation],
    instances=_Instances,
)


class Target(Model):
    """A size, absolute: said again with the same operation id it is the same operation."""

    operation_id: str = Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9._:-]+$")
    size: int = Field(strict=True)
    drain_timeout_seconds: int | None = Field(default=None, ge=0, le=86400)


class Restart(Model):
    """A planned warm restart; size 0 keeps the size."""

    operation_id: str = Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9._:-]+$")
    size: int = Field(default=0, strict=True)
    drain_timeout_seconds: int | None = Field(default=None, ge=0, le=86400)


class Accepted(Model):
    """operation: what brings the group there, null when nothing has to be done."""

    operation: Operation | None


class Problem(Model):
    """code: a word for programs. message: one line that says what to do."""

    code: str
    message: str
    operation: str | None = None


class Failure(Model):
    """Every error looks like this."""

    error: Problem
