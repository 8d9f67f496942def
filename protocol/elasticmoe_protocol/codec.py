"""Messages to frames and back: `[b"EMOE<version>", msgpack]`.

Version N talks with N-1. Fields that one side does not know are ignored, missing ones have a
default, so a version is new only when the meaning of something changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import msgspec

from elasticmoe_protocol.messages import Message, ToCoordinator, ToSidecar

VERSION = 1
MAX_BYTES = 1 << 20
"""Longest body; a goal with its record has a few kilobytes."""
_MAGIC = b"EMOE"
_SPOKEN = (VERSION, VERSION - 1)

T = TypeVar("T")


class FrameError(ValueError):
    """A frame that can't be read. kind: what to count it as."""

    kind = "malformed"


class Malformed(FrameError):
    """Not a message at all, or a field is wrong."""


class TooLarge(FrameError):
    """Longer than MAX_BYTES."""

    kind = "too_large"


class UnknownType(FrameError):
    """A message of a type that the receiver does not take."""

    kind = "unknown_type"


class WrongVersion(FrameError):
    """The other side speaks a version that is too far from ours."""

    kind = "wrong_version"


def encode(message: Message) -> list[bytes]:
    """Frames of a message. Raises FrameError, and nothing else whatever it holds."""
    try:
        body = msgspec.msgpack.encode(message)
    except (OverflowError, UnicodeEncodeError) as error:
        raise Malformed(f"a message can't be sent: {error}") from None
    if len(body) > MAX_BYTES:
        raise TooLarge(f"a message of {len(body)} bytes is over the limit of {MAX_BYTES}")
    return [b"%s%d" % (_MAGIC, VERSION), body]


_COORDINATOR: msgspec.msgpack.Decoder[ToCoordinator] = msgspec.msgpack.Decoder(ToCoordinator)
_SIDECAR: msgspec.msgpack.Decoder[ToSidecar] = msgspec.msgpack.Decoder(ToSidecar)


def decode_for_coordinator(frames: Sequence[bytes]) -> ToCoordinator:
    """What a sidecar said. Raises FrameError, and nothing else whatever the bytes."""
    return _decode(frames, _COORDINATOR)


def decode_for_sidecar(frames: Sequence[bytes]) -> ToSidecar:
    """What the coordinator said. Raises FrameError, and nothing else whatever the bytes."""
    return _decode(frames, _SIDECAR)


def _decode(frames: Sequence[bytes], decoder: msgspec.msgpack.Decoder[T]) -> T:
    if len(frames) != 2:
        raise Malformed(f"{len(frames)} frames instead of 2")
    head, body = frames
    _check_version(head)
    if len(body) > MAX_BYTES:
        raise TooLarge(f"a message of {len(body)} bytes is over the limit of {MAX_BYTES}")
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        unknown = "Invalid value" in str(error) and "$.type" in str(error)
        raise (UnknownType if unknown else Malformed)(str(error)) from None
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise Malformed(str(error)) from None


def _check_version(head: bytes) -> None:
    digits = head.removeprefix(_MAGIC)
    if not head.startswith(_MAGIC) or not digits.isdigit() or len(digits) > 6:
        raise Malformed("the first frame does not name the protocol")
    if int(digits) not in _SPOKEN:
        raise WrongVersion(
            f"the other side speaks protocol version {int(digits)}, this side {VERSION} (and "
            f"{VERSION - 1}): update the older one"
        )
