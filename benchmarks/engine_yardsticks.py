"""What the machine can do: the rate at which memory is read, and the rate of torch's bf16 matrix products. Measured beside what is judged by them."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.engine_models import LlamaShape

_BUFFER_BYTES = 512 * 2**20


def seconds(function: Callable[[], object]) -> float:
    """Of one call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


class ReadRate:
    """Reads a buffer that no cache holds, with as many threads as torch has at the time."""

    def __init__(self, buffer_bytes: int = _BUFFER_BYTES) -> None:
        self._floats = torch.ones(buffer_bytes // 4)
        rows = self._floats.view(-1, 4096)
        integers = self._floats.view(torch.int32)
        # The three that read fastest of thirteen that were tried (dot, mv, norms, bf16 and packed products among the others):
        # all vectorised, with hardly any arithmetic, but cut for the threads in different ways.
        self._methods: tuple[Callable[[], Tensor], ...] = (
            self._floats.sum,
            lambda: rows.sum(1),
            integers.amax,
        )

    def bytes_per_s(self) -> float:
        """The best of one read with each method: whatever disturbs a read makes it slower, never faster."""
        best_s = min(map(seconds, self._methods))
        return self._floats.nbytes / best_s


class GemmRate:
    """torch's own bf16 products of the shapes of a block's linears, with so many rows of input."""

    def __init__(self, shape: LlamaShape, rows: int, *, trains: bool) -> None:
        """trains: also the two products of the backward, for the input's and the weight's gradient."""
        generator = torch.Generator().manual_seed(0)

        def random(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator).bfloat16()

        self._weights = [random(outputs, inputs) for outputs, inputs in shape.linears]
        self._inputs = [random(rows, inputs) for _, inputs in shape.linears]
        self._outputs = [random(rows, outputs) for outputs, _ in shape.linears]
        self._trains = trains
        self.flop_per_block = 2 * rows * shape.weights_per_block * (3 if trains else 1)

    def block_s(self) -> float:
        """Seconds of all products of one block."""
        with torch.inference_mode():
            return seconds(self._multiply)

    def _multiply(self) -> None:
        for weight, given, output in zip(self._weights, self._inputs, self._outputs, strict=True):
            torch.matmul(given, weight.t())
            if self._trains:
                torch.matmul(output, weight)
                torch.matmul(output.t(), given)
