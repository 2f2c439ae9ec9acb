"""Merged linears: those of a block that are given the very same input (queries, keys and values; gate and up) are computed as one.

oneDNN's small products take as long to begin as to compute: one instead of three saves a tenth of a step of a small model. (It gains
nothing for int8 and int4: docs/log.md.) Which linears belong together is seen by watching a forward, so no family is known here.

R rows, I inputs, O outputs.
"""

from __future__ import annotations

import itertools
import logging
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from node.backend.span_model import SpanModel
from swarm.linears.choice import ROWS_TRIED, relative_error
from swarm.linears.frozen import FrozenLinear, PrepackedLinear, join

log = logging.getLogger(__name__)

_TOLERANCE = {torch.bfloat16: 0.02, torch.float32: 1e-5}
"""Of the largest output. The same products may be added in another order."""


def merge_linears(model: SpanModel) -> None:
    """Merge what can be. The blocks compute what they did, but for rounding."""
    modules = {name: module for name, module in model.named_modules() if isinstance(module, PrepackedLinear)}
    num_merged = 0
    for names in _given_the_same(model, modules):
        linears = [modules[name] for name in names]
        with torch.inference_mode(False), torch.no_grad():
            whole = join(linears)
        if not _computes_the_same(whole, linears):
            continue
        turn = _Turn()
        offsets = itertools.accumulate((linear.out_features for linear in linears), initial=0)
        for name, linear, offset in zip(names, linears, offsets, strict=False):
            model.replace_module(name, _Part(whole, turn, offset, linear.out_features))
            modules.pop(name)
        num_merged += len(names)
    if num_merged:
        log.info("linears merged num_linears=%d", num_merged)
    model.note_weights()


def _given_the_same(model: SpanModel, modules: dict[str, PrepackedLinear]) -> list[list[str]]:
    """Names of linears of one parent that had the same input and are of one kind, in the order of their calls."""
    calls: list[tuple[str, Tensor]] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, given, name=name: calls.append((name, given[0])))
        for name, module in modules.items()
    ]
    try:
        model.forward(torch.zeros(1, 2, model.hidden_size, dtype=model.dtype), model.new_cache(model.span))
    finally:
        for hook in hooks:
            hook.remove()
    names = [name for name, _ in calls]
    groups: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for name, given in calls:
        if names.count(name) == 1:
            linear = modules[name]
            kind = linear.dtype, linear.in_features, linear.bias is None
            groups[(id(given), name.rpartition(".")[0], *kind)].append(name)
    return [group for group in groups.values() if len(group) > 1]


def _computes_the_same(whole: FrozenLinear, linears: Sequence[FrozenLinear]) -> bool:
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for rows in ROWS_TRIED:
            given = torch.randn(rows, whole.in_features, generator=generator).to(whole.dtype)
            expected = torch.cat([linear(given) for linear in linears], dim=1).float()
            error = relative_error(whole(given), expected)
            if not error <= _TOLERANCE[whole.dtype]:
                log.warning("linears not merged: off by %.1e, outputs=%d", error, whole.out_features)
                return False
    return True


class _Turn:
    """What was computed for the parts that have not been asked yet. They are asked one after another."""

    def __init__(self) -> None:
        self._given: Tensor | None = None
        self._output: Tensor | None = None
        self._taken: set[int] = set()

    def output(self, whole: FrozenLinear, given: Tensor, part: _Part) -> Tensor:
        if given is not self._given or self._output is None or part.offset in self._taken:
            self._given, self._output, self._taken = given, whole(given), set()
        self._taken.add(part.offset)
        output = self._output.narrow(-1, part.offset, part.out_features).contiguous()
        if part.offset + part.out_features == whole.out_features:  # the last one
            self._given = self._output = None
        return output


class _Part(FrozenLinear):
    """Some outputs of a linear that computes those of others, too."""

    def __init__(self, whole: FrozenLinear, turn: _Turn, offset: int, num_outputs: int) -> None:
        super().__init__(whole.in_features, num_outputs, whole.dtype, None)
        self.offset = offset
        self.whole = whole
        self._turn = turn

    def forward(self, given: Tensor) -> Tensor:
        if given.dtype != self.dtype:
            return super().forward(given)
        return self._turn.output(self.whole, given, self)

    def dense(self) -> Tensor:
        return self.whole.dense()[self.offset : self.offset + self.out_features]

    def outputs(self, given_RI: Tensor) -> Tensor:
        return self.whole.outputs(given_RI).narrow(1, self.offset, self.out_features).contiguous()

    def input_gradient(self, gradient_RO: Tensor) -> Tensor:
        missing = self.whole.out_features - self.offset - self.out_features
        return self.whole.input_gradient(nn.functional.pad(gradient_RO, (self.offset, missing)))
