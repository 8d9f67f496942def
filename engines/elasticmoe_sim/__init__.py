"""A simulated engine that speaks vLLM 0.33's HTTP contract, for tests."""
