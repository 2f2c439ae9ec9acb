"""TrainableEnds: embedding, final norm and head with weights that change, as a trainer holds them. B rows, T tokens, H hidden, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from swarm.client.ends import Ends
from swarm.decoder import BlockSource
from swarm.run_spec import Precision, RunSpec
from swarm.training.initial import check_initial
from swarm.training.parameters import StageParameters

_LOGITS_BYTES = 64 * 2**20
IGNORED = -100
"""Label of tokens that are not learned."""


@dataclass(frozen=True, slots=True)
class HeadResult:
    """What the head says of a microbatch."""

    loss_sum: float
    """Cross entropy, summed over num_tokens labels."""
    num_tokens: int
    hidden_gradient: Tensor
    """Of loss_sum w.r.t. the last block's output, float32 [B, T, H]."""
    gradients: list[Tensor | None]
    """Of loss_sum w.r.t. the parameters, in their order."""


class TrainableEnds:
    """float32 master weights; computes in the run's precision."""

    def __init__(self, source: BlockSource, spec: RunSpec) -> None:
        """Loads the run's initial weights. Raises UserError if they are not those that the spec names."""
        tensors = source.load_ends()
        check_initial(spec, spec.ends_stage, tensors)
        self.ends = Ends(source)
        self.parameters = StageParameters(self.ends.module.named_parameters(), spec.optimizer)
        self._is_bf16 = spec.precision is Precision.BF16

    def embed(self, input_ids_BT: Tensor) -> Tensor:
        """What the first block receives, float32 [B, T, H], with its graph."""
        with torch.enable_grad(), self._autocast():
            return self.ends.embed_whole(input_ids_BT).float()

    def loss(self, hidden_BTH: Tensor, labels_BT: Tensor) -> HeadResult:
        """Cross entropy of each token's label, which is the next token (or IGNORED), in pieces of bounded memory."""
        flat, labels = hidden_BTH.float().reshape(-1, hidden_BTH.shape[2]), labels_BT.reshape(-1)
        parameters = self.parameters.parameters
        totals: list[Tensor | None] = [None] * len(parameters)
        of_hidden = torch.zeros_like(flat)
        loss_sum = 0.0
        for piece in self._pieces(len(flat)):
            given = flat[piece][None].detach().requires_grad_()
            with torch.enable_grad(), self._autocast():
                loss = _summed_loss(self.ends.logits(given), labels[piece])
            found: Sequence[Tensor | None] = torch.autograd.grad(loss, [given, *parameters], allow_unused=True)
            loss_sum += float(loss)
            if found[0] is not None:
                of_hidden[piece] = found[0][0]
            totals = sum_gradients(totals, found[1:])
        return HeadResult(loss_sum, int((labels != IGNORED).sum()), of_hidden.view_as(hidden_BTH), totals)

    def embed_backward(self, embedded_BTH: Tensor, gradient_BTH: Tensor) -> list[Tensor | None]:
        """Gradients w.r.t. the parameters, given that of what embed returned."""
        parameters = self.parameters.parameters
        return list(torch.autograd.grad(embedded_BTH, parameters, gradient_BTH.float(), allow_unused=True))

    def evaluate(self, hidden_BTH: Tensor, labels_BT: Tensor) -> tuple[float, int]:
        """Cross entropy summed over the labels, and their number."""
        flat, labels = hidden_BTH.float().reshape(-1, hidden_BTH.shape[2]), labels_BT.reshape(-1)
        loss_sum = 0.0
        with torch.no_grad(), self._autocast():
            for piece in self._pieces(len(flat)):
                loss_sum += float(_summed_loss(self.ends.logits(flat[piece][None]), labels[piece]))
        return loss_sum, int((labels != IGNORED).sum())

    def _pieces(self, num_tokens: int) -> list[slice]:
        size = max(1, _LOGITS_BYTES // (4 * self.ends.vocab_size))
        return [slice(start, start + size) for start in range(0, num_tokens, size)]

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self._is_bf16)


def sum_gradients(one: Sequence[Tensor | None], other: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Element by element; None is zero."""
    return [b if a is None else a if b is None else a + b for a, b in zip(one, other, strict=True)]


def _summed_loss(logits_1NV: Tensor, labels_N: Tensor) -> Tensor:
    return F.cross_entropy(logits_1NV[0].float(), labels_N, ignore_index=IGNORED, reduction="sum")
