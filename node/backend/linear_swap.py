"""The linears of a model's blocks, taken out while it is built and put back in the form in which a shard serves with them.

What the library loads then has no weights of linears any more: these go from the checkpoint's memory-mapped tensors into their last
form, one after another, so that memory holds one set of weights and a single linear's besides.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from node.backend.block_codes import BlockCodes
from node.backend.mapped_pages import MappedPages
from swarm.linears.choice import LinearChoice
from swarm.numeric_class import NUMERIC_CLASSES

log = logging.getLogger(__name__)

# Routers choose experts: they are tiny, and a rounding that changes a choice changes everything.
_ROUTERS = {"gate", "router", "shared_expert_gate"}
_FEWEST_OUTPUTS = 8


def activation_dtype(numeric_class: str) -> torch.dtype:
    """Of what goes in and out of blocks of this class."""
    return getattr(torch, NUMERIC_CLASSES[numeric_class].dtype_name)  # type: ignore[no-any-return]


class LinearSwap:
    """`take` at the end of the model's constructor, `put` when it is loaded."""

    def __init__(self, dtype: torch.dtype, device: torch.device, codes: BlockCodes | None) -> None:
        """dtype: of activations. codes: None for linears in that dtype, too."""
        self._dtype, self._device, self._codes = dtype, device, codes
        self._choice = LinearChoice(device)
        self._taken: dict[str, tuple[str, Tensor]] = {}  # by module: name in the state dict, weights as stored

    def take(self, model: Any, tensors: dict[str, Tensor]) -> None:
        """Leave only the biases of linears whose weights are in the state dict as they are in the model; take these out of it."""
        prefix = f"{model.base_model_prefix}."
        for name, module in list(_linears(model)):
            keys = [key for key in (name, name.removeprefix(prefix)) if f"{key}.weight" in tensors]
            if type(module) not in (nn.Linear, Conv1D) or not keys or not self._wants(name, module):
                continue
            weight = tensors[f"{keys[0]}.weight"]
            if weight.shape == module.weight.shape and weight.is_floating_point():
                self._taken[name] = keys[0], tensors.pop(f"{keys[0]}.weight")
                model.set_submodule(name, _Vacant(module))

    @torch.no_grad()
    def put(self, model: Any) -> None:
        """Linears in the place of those that were taken, and of others that were loaded as they are."""
        pages = MappedPages()
        for name, module in list(_linears(model)):
            if name in self._taken:
                key, weight = self._taken.pop(name)
            elif isinstance(module, _Vacant) or not self._wants(name, module) or not _is_plain(module):
                continue
            else:
                key, weight = name, module.weight.detach()
            is_transposed = isinstance(module, Conv1D) or (isinstance(module, _Vacant) and module.is_transposed)
            model.set_submodule(name, self._made(key, weight.t() if is_transposed else weight, module.bias))
            pages.drop([weight])
        if self._codes is not None:
            self._codes.close()
        for parameter in model.parameters():
            if pages.shows(parameter.data):  # a norm, say, which would keep all of the checkpoint's file in memory
                parameter.data = parameter.data.clone()
        self._report(model)

    def _wants(self, name: str, module: Any) -> bool:
        if self._codes is None:
            return self._device.type == "cpu"
        return name.rpartition(".")[2] not in _ROUTERS and min(module.weight.shape) >= _FEWEST_OUTPUTS

    def _made(self, key: str, weight_OI: Tensor, bias: Tensor | None) -> nn.Module:
        if self._codes is None:
            return self._choice.of_weight(weight_OI, bias, self._dtype)
        return self._choice.of_codes(self._codes.of(key, weight_OI), bias)

    def _report(self, model: Any) -> None:
        made = ", ".join(f"{count} {kind}" for kind, count in sorted(self._choice.made.items()))
        left = {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.ndim > 1}
        kinds = sorted({re.sub(r"(^|.*\.)\d+\.", "", name) for name in left})
        log.info(
            "linears %s; as they are: %d weights (%s)", made or "none", sum(left.values()), ", ".join(kinds) or "-"
        )


class _Vacant(nn.Module):
    """Stands where a linear was until its weights come, so that the library loads its bias."""

    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.bias = linear.bias
        # No parameter, and without memory: the library finds something to initialise, and leaves it alone.
        self.weight = linear.weight.data
        self.weight._is_hf_initialized = True
        self.is_transposed = isinstance(linear, Conv1D)


def _linears(model: Any) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D | _Vacant):
            yield name, module


def _is_plain(module: Any) -> bool:
    """Whether it computes what its type is named for: a family's own subclass may return something else."""
    if type(module) in (nn.Linear, Conv1D):
        return True
    given = torch.randn(1, 3, module.in_features, generator=torch.Generator().manual_seed(0)).to(module.weight)
    with torch.no_grad():
        output = module(given)
        expected = nn.functional.linear(given, module.weight, module.bias)
    return (
        isinstance(output, Tensor) and output.shape == expected.shape and torch.allclose(output, expected, 1e-2, 1e-2)
    )
