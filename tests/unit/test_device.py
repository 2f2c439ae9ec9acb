"""check_device: a node says at once when it cannot compute where it was told to."""

from __future__ import annotations

import pytest
import torch

from node.device import check_device
from swarm.errors import UserError


def test_the_cpu_is_always_there() -> None:
    check_device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_cuda_device_the_user_is_told_what_to_do() -> None:
    with pytest.raises(UserError, match=r"--device cuda: torch finds no CUDA device here .*or use --device cpu"):
        check_device("cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_device_that_is_not_there_is_counted_against_those_that_are() -> None:
    with pytest.raises(UserError, match="CUDA devices here, counted from 0"):
        check_device(f"cuda:{torch.cuda.device_count()}")
