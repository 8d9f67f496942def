"""The connection to the coordinator over ZeroMQ."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from elasticmoe_protocol.transport import SidecarSocket

from elasticmoe_sidecar.settings import Settings


@contextlib.asynccontextmanager
async def connect(settings: Settings) -> AsyncIterator[SidecarSocket]:
    """A link that comes back by itself. Raises OSError for a wrong address or bad keys."""
    async with SidecarSocket(settings.coordinator, settings.keys_dir) as socket:
        yield socket
