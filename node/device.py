"""Which device a node computes on."""

from __future__ import annotations

import torch

from swarm.errors import UserError


def check_device(name: str) -> None:
    """UserError if torch cannot compute on this device here."""
    if name == "cpu":
        return
    if not torch.cuda.is_available():
        raise UserError(
            f"--device {name}: torch finds no CUDA device here (built for CUDA {torch.version.cuda}); "
            "install a torch build for CUDA and the driver, or use --device cpu"
        )
    index = torch.device(name).index or 0
    if index >= torch.cuda.device_count():
        raise UserError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices here, counted from 0")
