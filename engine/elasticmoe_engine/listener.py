"""The serving socket: bound and listening before any engine is there."""

from __future__ import annotations

import errno
import os
import socket

BACKLOG = 4096
"""Connections that wait in the kernel while nobody accepts (at most net.core.somaxconn)."""


class ListenError(Exception):
    """The serving address can't be had; the text says what to do."""


class Listener:
    """Listens and never accepts. Raises ListenError when made."""

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port
        self._sock: socket.socket | None = None
        self.open()

    def open(self) -> socket.socket:
        """The listening socket, made again where it was closed. Raises ListenError.

        It listens again in any case: the last engine may have made the backlog smaller.
        """
        if self._sock is None:
            self._sock = self._listen()
        else:
            self._sock.listen(BACKLOG)
        return self._sock

    def close(self) -> None:
        """Leave the address to somebody else."""
        if self._sock is not None:
            self._sock.close()
        self._sock = None

    def _listen(self) -> socket.socket:
        sock = socket.socket(socket.AF_INET6 if ":" in self.host else socket.AF_INET)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # Inherited by each connection: asyncio sets it only where it made the socket itself,
            # and an answer sent in two parts would wait 40 ms for the client's acknowledgement.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.bind((self.host, self.port))
            sock.listen(BACKLOG)
        except OSError as error:
            sock.close()
            where = f"{self.host or '*'}:{self.port}"
            if error.errno == errno.EADDRINUSE:
                raise ListenError(
                    f"{where} is in use: stop what listens there or give another --port"
                ) from None
            raise ListenError(
                f"can't listen on {where} ({os.strerror(error.errno or 0)}): give another --host"
            ) from None
        return sock
