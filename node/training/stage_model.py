"""The blocks of a stage as its run begins with them, and which of their weights bf16 will do for."""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from node.backend.span_model import SpanModel
from swarm.decoder import BlockSource
from swarm.run_spec import RunSpec
from swarm.training.initial import check_initial

_DROPOUT_KEY = re.compile(r"(.*_)?(dropout|pdrop|dropout_prob)")
_VIEWING_NODES = {"PermuteBackward0", "TBackward0", "TransposeBackward0", "UnsafeViewBackward0", "ViewBackward0"}


def load_stage_model(
    source: BlockSource, spec: RunSpec, stage: int, *, device: str, numeric_class: str | None = None
) -> SpanModel:
    """With the run's dropout, in float32 (or in a class, if no weight is ever to change). Raises UserError if the weights are not those that the spec names."""
    span = spec.stages[stage]
    tensors = source.load_blocks(span)
    check_initial(spec, stage, tensors)
    cut = _with_dropout(source, spec.dropout)
    return SpanModel(cut, span, device=device, state_dict=tensors, numeric_class=numeric_class)


def hold_casts(
    model: SpanModel, parameters: Sequence[Tensor], hold: Callable[[Sequence[int], torch.dtype], None]
) -> None:
    """Keep in bf16 what autocast would cast in every forward: every graph would hold bf16 copies of its own of all weights.

    parameters: those of the model's that require gradients. hold: lets it have those of these indices in a dtype.
    Only if the output is the very same: a few families look at the dtype of their weights.
    """
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(1, 16, model.hidden_size, generator=generator)
    with torch.enable_grad():
        expected = model.forward_whole(model.span, probe)
    if expected.grad_fn is None:
        return
    casts = _only_cast(expected, parameters)
    hold(casts, torch.bfloat16)
    with torch.no_grad():
        output = model.forward_whole(model.span, probe)
    if not torch.equal(output, expected.detach()):
        hold(casts, torch.float32)


def _only_cast(output: Tensor, parameters: Sequence[Tensor]) -> list[int]:
    """Indices of the parameters of which the graph of output uses nothing but casts."""
    users: defaultdict[Any, set[Any]] = defaultdict(set)
    seen: set[Any] = {output.grad_fn}
    waiting = [*seen]
    while waiting:
        node = waiting.pop()
        for source, _ in node.next_functions:
            users[source].add(node)
            if source is not None and source not in seen:
                seen.add(source)
                waiting.append(source)

    def is_cast(node: Any) -> bool:
        return node.name() == "ToCopyBackward0" or (
            node.name() in _VIEWING_NODES and all(is_cast(user) for user in users[node])
        )

    leaves = {id(node.variable): node for node in seen if hasattr(node, "variable")}
    found = [(index, leaves.get(id(parameter))) for index, parameter in enumerate(parameters)]
    return [index for index, leaf in found if leaf is not None and all(is_cast(user) for user in users[leaf])]


def _with_dropout(source: BlockSource, rate: float) -> BlockSource:
    """The source with another config: of this dropout, wherever its family has any."""
    twin: Any = copy.copy(source)
    twin.config = copy.deepcopy(source.config)
    for key, value in twin.config.to_dict().items():
        if _DROPOUT_KEY.fullmatch(key) and isinstance(value, int | float):
            setattr(twin.config, key, rate)
    return twin  # type: ignore[no-any-return]
