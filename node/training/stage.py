"""TrainableStage: the blocks of a stage with weights that change. B rows, T tokens, H hidden size. One thread at a time may use it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from node.backend.span_model import SpanModel
from node.stash import StashEntry
from swarm.decoder import BlockSource
from swarm.run_spec import Precision, RunSpec
from swarm.training.initial import check_initial
from swarm.training.parameters import StageParameters

_DROPOUTS = (
    "attention_dropout",
    "attn_pdrop",
    "resid_pdrop",
    "hidden_dropout",
    "residual_dropout",
    "dropout",
    "activation_dropout",
)


class TrainableStage:
    """float32 master weights; computes in the run's precision."""

    def __init__(self, source: BlockSource, spec: RunSpec, stage: int, device: str = "cpu") -> None:
        """Loads the run's initial weights. Raises UserError if they are not those that the spec names."""
        self.span = spec.stages[stage]
        tensors = source.load_blocks(self.span)
        check_initial(spec, stage, tensors)
        for key in _DROPOUTS:
            if isinstance(getattr(source.config, key, None), float):
                setattr(source.config, key, spec.dropout)
        self.model = SpanModel(source, self.span, dtype=torch.float32, device=device, state_dict=tensors)
        self.parameters = StageParameters(self.model.named_parameters(), spec.optimizer)
        self.model.note_weights()
        self._spec = spec

    @property
    def hidden_size(self) -> int:
        return self.model.hidden_size

    def forward(self, hidden_BTH: Tensor) -> Tensor:
        """Without gradients and dropout: [B, T, H] float32."""
        with torch.no_grad(), self._autocast():
            return self.model.forward_whole(self.span, hidden_BTH.float()).float()

    def differentiable(self, hidden_BTH: Tensor, samples: range) -> StashEntry:
        """The forward with its graph, which ends with the weights' next step. samples: index of each row, for dropout."""
        # A sample's dropout must not depend on the rows beside it.
        seeds = [_seed(self._spec.seed, sample) for sample in samples] if self._spec.dropout else []
        with self._autocast():
            given, output, num_bytes = self.model.differentiable(self.span, hidden_BTH.float(), row_seeds=seeds)
        return StashEntry(self.span, given, output, num_bytes)

    def backward(self, entry: StashEntry, gradient_BTH: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """Gradients w.r.t. the input [B, T, H], and w.r.t. the parameters in their order (None: takes no part)."""
        found: Sequence[Tensor | None] = torch.autograd.grad(
            entry.output,
            [entry.given, *self.parameters.parameters],
            gradient_BTH.to(entry.output.dtype),
            allow_unused=True,
        )
        of_input, *of_parameters = found
        assert of_input is not None
        return of_input, of_parameters

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self._spec.precision is Precision.BF16)


def _seed(seed: int, sample: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{sample}".encode()).digest()[:6], "big")
