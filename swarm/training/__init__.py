"""Training runs: where samples come from."""
