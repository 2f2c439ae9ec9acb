"""Meta init: building a model without memory, without what torch imports to do so.

On torch's meta device some functions are written in Python, and import an algebra system (sympy: 0.3 s, 32 MB) for shapes that may be
symbols. Of these, models of most families call two when they are built: a random initialisation, which has nothing to initialise, and
torch.arange, whose result is nothing but a shape.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


@contextlib.contextmanager
def without_symbols() -> Iterator[None]:
    """Build a model on the meta device in this context. What its weights would begin with is left out."""
    from transformers.initialization import no_init_weights

    with no_init_weights(), _PlainRanges():
        yield


class _PlainRanges(TorchFunctionMode):
    def __torch_function__(
        self, function: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if function is torch.arange and options.keys() <= {"device", "dtype"} and all(type(arg) is int for arg in args):
            device = torch.device(options.get("device") or torch.get_default_device())
            if device.type == "meta":
                return torch.empty(len(range(*args)), dtype=options.get("dtype") or torch.int64, device=device)
        return function(*args, **options)
