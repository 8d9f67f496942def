"""An ASGI middleware inside the engine's API server: `--middleware elasticmoe_engine.gate.Gate`.

It holds requests while the engine commits a new layout, fences a rank that is about to leave, runs
each resize once, and keeps everybody but the sidecar away from the engine's admin paths.
"""

from elasticmoe_engine.gate.middleware import Gate

__all__ = ["Gate"]
