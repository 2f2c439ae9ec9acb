"""TrainableStage: the blocks of a stage with weights that change. B rows, T tokens, H hidden size. One thread at a time may use it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from node.backend.adapter import attach
from node.stash import StashEntry
from node.training.frozen_blocks import FrozenBlocks
from node.training.stage_model import hold_casts, load_stage_model
from swarm.allocator import keep_freed_memory, return_freed_memory
from swarm.decoder import BlockSource
from swarm.errors import BadRequest
from swarm.run_spec import Precision, RunSpec
from swarm.training.adapters import AdapterLayout
from swarm.training.parameters import StageParameters


@dataclass(frozen=True, slots=True)
class TrainingEntry(StashEntry):
    """A microbatch after its forward, whose graph leads to the weights, too."""

    weights_version: int
    """Of the weights that it was computed with."""


class TrainableStage:
    """float32 master weights; computes in the run's precision. What changes are all weights, or adapters on them."""

    def __init__(
        self,
        source: BlockSource,
        spec: RunSpec,
        stage: int,
        device: str = "cpu",
        frozen: FrozenBlocks | None = None,
    ) -> None:
        """Loads the run's initial weights. Raises UserError if they are not those that the spec names.

        frozen: where other adapter runs of this process have theirs, and this one gets its.
        """
        self.span = spec.stages[stage]
        if spec.lora is None:
            self.model = load_stage_model(source, spec, stage, device=device)
            named = dict(self.model.named_parameters())
        else:
            self.model = (frozen or FrozenBlocks()).for_training(spec, stage, device, source)
            layout = AdapterLayout(spec)
            named = attach(self.model, layout, stage, layout.initial(stage))
        self.parameters = StageParameters(named.items(), spec.optimizer, is_delayed=spec.delay > 0)
        self._spec = spec
        if spec.precision is Precision.BF16:
            self.model.autocast_dtype = torch.bfloat16
            hold_casts(self.model, self.parameters.parameters, self.parameters.hold)
        self.model.note_weights()
        return_freed_memory()
        if spec.lora is None:  # gradients as large as the blocks
            keep_freed_memory()

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


def _seed(seed: int, sample: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{sample}".encode()).digest()[:6], "big")
