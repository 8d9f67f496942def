"""Words of the wire protocol for tests: any, and ordinary ones."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
from elasticmoe_protocol.messages import (
    Facts,
    Goal,
    Hello,
    Introduce,
    Message,
    Record,
    Refused,
    Report,
    ToCoordinator,
    ToSidecar,
)
from hypothesis import strategies as st

FOR_COORDINATOR: tuple[type[Message], ...] = get_args(ToCoordinator)
FOR_SIDECAR: tuple[type[Message], ...] = get_args(ToSidecar)

_PLAIN: dict[object, st.SearchStrategy[Any]] = {
    str: st.text(max_size=20),
    int: st.integers(-(1 << 63), (1 << 63) - 1),
    float: st.floats(allow_nan=False),
    bool: st.booleans(),
    type(None): st.none(),
}


def anything(hint: Any) -> st.SearchStrategy[Any]:
    """Any value of a type that messages use."""
    if hint in _PLAIN:
        return _PLAIN[hint]
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    if get_origin(hint) in (Union, types.UnionType):
        return st.one_of([anything(one) for one in get_args(hint)])
    if get_origin(hint) is tuple:
        return st.lists(anything(get_args(hint)[0]), max_size=2).map(tuple)
    assert issubclass(hint, msgspec.Struct)
    fields = {name: anything(kind) for name, kind in get_type_hints(hint).items()}
    return st.builds(hint, **fields)


def structs(message: type[msgspec.Struct]) -> Iterator[type[msgspec.Struct]]:
    """The type itself and all that it holds."""
    yield message
    for hint in get_type_hints(message).values():
        for one in (hint, *get_args(hint)):
            if isinstance(one, type) and issubclass(one, msgspec.Struct):
                yield from structs(one)


def facts(**changes: Any) -> Facts:
    return msgspec.structs.replace(
        Facts(address="127.0.0.1", serving_port=1, probe_port=2, rpc_port=3), **changes
    )


def hello(instance: str = "i0", **changes: Any) -> Hello:
    base = Hello(deployment="d", instance=instance, incarnation="a", boot="b", facts=facts())
    return msgspec.structs.replace(base, **changes)


def report(instance: str = "i0", seq: int = 0, **changes: Any) -> Report:
    base = Report(deployment="d", instance=instance, boot="b", seq=seq)
    return msgspec.structs.replace(base, **changes)


def goal(instance: str = "i0", **changes: Any) -> Goal:
    record = Record(generation=1)
    base = Goal(deployment="d", instance=instance, term=1, seq=1, generation=1, record=record)
    return msgspec.structs.replace(base, **changes)


ORDINARY: tuple[Message, ...] = (
    hello(accepted=goal()),
    report(),
    goal(),
    Introduce(deployment="d"),
    Refused(deployment="d", reason="no", term=3),
)
"""One of each type."""
