"""A node's part in a training run: its stage."""
