"""What is injected into the engine's container: the launcher and, inside the engine, the gate.

Standard library only, so that it runs in any image with vLLM 0.33 or newer.
"""
