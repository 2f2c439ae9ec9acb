"""TrainableStage: the blocks of a stage with weights that change. B rows, T tokens, H hidden size. One thread at a time may use it."""

from __future__ import annotations

import copy
import hashlib
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from node.backend.span_model import SpanModel
from node.stash import StashEntry
from swarm.decoder import BlockSource
from swarm.errors import BadRequest
from swarm.run_spec import Precision, RunSpec
from swarm.training.initial import check_initial
from swarm.training.parameters import StageParameters

_DROPOUT_KEY = re.compile(r"(.*_)?(dropout|pdrop|dropout_prob)")
_VIEWING_NODES = {"PermuteBackward0", "TBackward0", "TransposeBackward0", "UnsafeViewBackward0", "ViewBackward0"}


@dataclass(frozen=True, slots=True)
class TrainingEntry(StashEntry):
    """A microbatch after its forward, whose graph leads to the weights, too."""

    weights_version: int
    """Of the weights that it was computed with."""


class TrainableStage:
    """float32 master weights; computes in the run's precision."""

    def __init__(self, source: BlockSource, spec: RunSpec, stage: int, device: str = "cpu") -> None:
        """Loads the run's initial weights. Raises UserError if they are not those that the spec names."""
        self.span = spec.stages[stage]
        tensors = source.load_blocks(self.span)
        check_initial(spec, stage, tensors)
        source = _with_dropout(source, spec.dropout)
        self.model = SpanModel(source, self.span, dtype=torch.float32, device=device, state_dict=tensors)
        self.parameters = StageParameters(self.model.named_parameters(), spec.optimizer, is_delayed=spec.delay > 0)
        self._spec = spec
        if spec.precision is Precision.BF16:
            self.model.autocast_dtype = torch.bfloat16
            self._hold_casts()
        self.model.note_weights()

    @property
    def hidden_size(self) -> int:
        return self.model.hidden_size

    def forward(self, hidden_BTH: Tensor) -> Tensor:
        """Without gradients and dropout: [B, T, H] float32."""
        with torch.no_grad():
            return self.model.forward_whole(self.span, hidden_BTH.float()).float()

    def differentiable(self, hidden_BTH: Tensor, samples: range) -> TrainingEntry:
        """The forward with its graph, which ends with the weights' next step. samples: index of each row, for dropout."""
        # A sample's dropout must not depend on the rows beside it.
        seeds = [_seed(self._spec.seed, sample) for sample in samples] if self._spec.dropout else []
        given, output, num_bytes = self.model.differentiable(self.span, hidden_BTH.float(), row_seeds=seeds)
        return TrainingEntry(self.span, given, output, num_bytes, self.parameters.version)

    def backward(self, entry: StashEntry, gradient_BTH: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """Gradients w.r.t. the input [B, T, H], and w.r.t. the parameters in their order (None: takes no part). Once per entry.

        The latter are float32, or bf16 where autocast computes them so. BadRequest if the weights have changed since the forward.
        """
        if isinstance(entry, TrainingEntry) and entry.weights_version != self.parameters.version:
            raise BadRequest("the weights have changed since this microbatch's forward: run it again")
        found: Sequence[Tensor | None] = torch.autograd.grad(
            entry.output,
            [entry.given, *self.parameters.parameters],
            gradient_BTH.to(entry.output.dtype),
            allow_unused=True,
        )
        of_input, *of_parameters = found
        assert of_input is not None
        return of_input, of_parameters

    def _hold_casts(self) -> None:
        """Keep in bf16 what autocast would cast in every forward: every graph would hold bf16 copies of its own of all weights.

        Only if the output is the very same: a few families look at the dtype of their weights.
        """
        generator = torch.Generator().manual_seed(0)
        probe = torch.randn(1, 16, self.hidden_size, generator=generator)
        with torch.enable_grad():
            expected = self.model.forward_whole(self.span, probe)
        casts = _only_cast(expected, self.parameters.parameters)
        self.parameters.hold(casts, torch.bfloat16)
        if not torch.equal(self.forward(probe), expected.detach().float()):
            self.parameters.hold(casts, torch.float32)


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


def _seed(seed: int, sample: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{sample}".encode()).digest()[:6], "big")
