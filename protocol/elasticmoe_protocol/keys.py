"""Keys and token of a group, made on first use: one folder (mode 0700), files with mode 0600.

`coordinator.json` (its CURVE pair, and the public keys of clients) stays with the coordinator,
`sidecar.json` (the sidecars' pair and the coordinator's public key) goes to each sidecar, `token`
to whoever may change something over HTTP. A client key that is stolen can impersonate a rank.

Rotation overlaps: after `rotate` the old client key and token are taken as well, until `finish`.
`make`, `rotated` and `finished` do the same without a folder, for a Kubernetes Secret. The folder
where such a Secret is mounted is only read.
"""

from __future__ import annotations

import fcntl
import hmac
import os
import secrets
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import msgspec
import zmq
from zmq.utils import z85

COORDINATOR_FILE = "coordinator.json"
SIDECAR_FILE = "sidecar.json"
TOKEN_FILE = "token"

K = TypeVar("K")


class KeysError(OSError):
    """Keys that can't be used; one line that says what to do."""


class Pair(msgspec.Struct, frozen=True, kw_only=True):
    """A CURVE key pair, both Z85 (ZeroMQ RFC 32)."""

    public: str
    secret: str

    def __post_init__(self) -> None:
        """Raises ValueError for what are no keys."""
        _check(self.public, self.secret)


class CoordinatorKeys(msgspec.Struct, frozen=True, kw_only=True):
    """The coordinator's pair, the client keys that it takes, and older tokens still valid."""

    pair: Pair
    clients: tuple[str, ...]
    tokens: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises ValueError for what are no keys."""
        _check(*self.clients)


class SidecarKeys(msgspec.Struct, frozen=True, kw_only=True):
    """The sidecars' pair and the coordinator's public key."""

    pair: Pair
    server: str

    def __post_init__(self) -> None:
        """Raises ValueError for what are no keys."""
        _check(self.server)


def ensure_keys(folder: Path) -> None:
    """Make what is missing; safe when two processes do it at once. Raises KeysError.

    A folder that has all (a mounted secret) is not written to.
    """
    if (folder / COORDINATOR_FILE).exists() and (folder / TOKEN_FILE).exists():
        return
    with _changing(folder, make=True):
        fresh = make()
        # The coordinator's comes last: without it both are made anew.
        names = [] if (folder / COORDINATOR_FILE).exists() else [SIDECAR_FILE, COORDINATOR_FILE]
        names += [] if (folder / TOKEN_FILE).exists() else [TOKEN_FILE]
        for name in names:
            _write(folder, name, fresh[name])


def rotate(folder: Path) -> None:
    """New client keys and token; the old ones are taken too until `finish`. Raises KeysError."""
    with _changing(folder):
        changed = _rotation(load_coordinator(folder), load_token(folder))
        for name, text in changed.items():
            _write(folder, name, text)


def finish(folder: Path) -> None:
    """End a rotation: only the newest client key and token are taken. Raises KeysError."""
    with _changing(folder):
        changed = _end(load_coordinator(folder), load_sidecar(folder))
        for name, text in changed.items():
            _write(folder, name, text)


def make() -> dict[str, str]:
    """The files of a new group: name -> content."""
    client, server = _pair(), _pair()
    return {
        COORDINATOR_FILE: _text(CoordinatorKeys(pair=server, clients=(client.public,))),
        SIDECAR_FILE: _text(SidecarKeys(pair=client, server=server.public)),
        TOKEN_FILE: _new_token(),
    }


def rotated(files: Mapping[str, str]) -> dict[str, str]:
    """The files after `rotate`. Raises KeysError for what are no keys."""
    keys = _decoded(files, COORDINATOR_FILE, CoordinatorKeys)
    return {**files, **_rotation(keys, _token(_of(files, TOKEN_FILE), TOKEN_FILE))}


def finished(files: Mapping[str, str]) -> dict[str, str]:
    """The files after `finish`. Raises KeysError for what are no keys."""
    keys = _decoded(files, COORDINATOR_FILE, CoordinatorKeys)
    return {**files, **_end(keys, _decoded(files, SIDECAR_FILE, SidecarKeys))}


def _rotation(old: CoordinatorKeys, token: str) -> dict[str, str]:
    """What changes when a rotation begins, in the order in which it has to be written."""
    client = _pair()
    both = msgspec.structs.replace(
        old, clients=(client.public, *old.clients), tokens=(token, *old.tokens)
    )
    return {
        COORDINATOR_FILE: _text(both),
        SIDECAR_FILE: _text(SidecarKeys(pair=client, server=old.pair.public)),
        TOKEN_FILE: _new_token(),
    }


def _end(keys: CoordinatorKeys, client: SidecarKeys) -> dict[str, str]:
    """What changes when a rotation ends."""
    newest = msgspec.structs.replace(keys, clients=(client.pair.public,), tokens=())
    return {COORDINATOR_FILE: _text(newest)}


def load_coordinator(folder: Path) -> CoordinatorKeys:
    """The coordinator's keys. Raises KeysError."""
    return _read(folder, COORDINATOR_FILE, CoordinatorKeys)


def load_sidecar(folder: Path) -> SidecarKeys:
    """The sidecars' keys. Raises KeysError."""
    return _read(folder, SIDECAR_FILE, SidecarKeys)


def load_token(folder: Path) -> str:
    """The bearer token. Raises KeysError."""
    return _token(_content(folder, TOKEN_FILE).decode("ascii", "replace"), folder / TOKEN_FILE)


def token_is_valid(folder: Path, given: str) -> bool:
    """Whether it is the token, or an older one during a rotation. Raises KeysError."""
    known = (load_token(folder), *load_coordinator(folder).tokens)
    return any(hmac.compare_digest(given.encode(), one.encode()) for one in known)


def _pair() -> Pair:
    public, secret = zmq.curve_keypair()
    return Pair(public=public.decode(), secret=secret.decode())


def _check(*given: str) -> None:
    """Raises ValueError when one is no CURVE key."""
    for key in given:
        try:
            size = len(z85.decode(key.encode("ascii")))
        except (ValueError, KeyError, struct.error):
            size = 0
        if size != 32:
            raise ValueError("not a CURVE key of 40 characters")


@contextmanager
def _changing(folder: Path, make: bool = False) -> Iterator[None]:
    """Alone with the folder. Raises KeysError."""
    try:
        if make:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600), "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
    except KeysError:
        raise
    except FileNotFoundError:
        raise KeysError(
            f"there are no keys in {folder}: make them first with `elasticmoe keys make`"
        ) from None
    except OSError as error:
        raise KeysError(
            f"{folder} can't be written ({error.strerror}): choose another folder, or put keys "
            "there that were made elsewhere"
        ) from None


def _text(content: CoordinatorKeys | SidecarKeys) -> str:
    return msgspec.json.encode(content).decode() + "\n"


def _new_token() -> str:
    return secrets.token_urlsafe(32) + "\n"


def _write(folder: Path, name: str, text: str) -> None:
    fresh = folder / f".{name}.new"
    with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, folder / name)


def _content(folder: Path, name: str) -> bytes:
    path = folder / name
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise KeysError(
            f"there is no {path}: copy it from where the coordinator made its keys"
        ) from None
    except OSError as error:
        raise KeysError(f"{path} can't be read ({error.strerror}): check its owner") from None


def _read(folder: Path, name: str, kind: type[K]) -> K:
    return _decode(_content(folder, name), folder / name, kind)


def _of(files: Mapping[str, str], name: str) -> str:
    if name not in files:
        raise KeysError(f"there is no {name} among the keys: make new ones, for all of the group")
    return files[name]


def _decoded(files: Mapping[str, str], name: str, kind: type[K]) -> K:
    return _decode(_of(files, name), name, kind)


def _decode(content: str | bytes, name: str | Path, kind: type[K]) -> K:
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise KeysError(
            f"{name} is not a key file ({error}): delete all of these files and make new ones, "
            "for all of the group"
        ) from None


def _token(text: str, name: str | Path) -> str:
    token = text.strip()
    if not token:
        raise KeysError(f"{name} is empty: delete it and start again")
    return token
