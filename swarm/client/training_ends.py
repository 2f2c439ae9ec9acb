"""TrainableEnds: embedding, final norm and head with weights that change, as a trainer holds them. B rows, T tokens, H hidden, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from swarm.decoder import BlockSource
from swarm.run_spec import Precision, RunSpec
from swarm.training.ends_replica import load_ends

_LOGITS_BYTES = 64 * 2**20
# Of tokens whose logits are in memory together: with fewer, a large head's gradient costs more to add up than to compute.
_MIN_PIECE = 512
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
        self.ends, self.parameters = load_ends(source, spec)
        self._is_bf16 = spec.precision is Precision.BF16

    def embed(self, input_ids_BT: Tensor) -> Tensor:
        """What the first block receives, float32 [B, T, H], with its graph."""
        with torch.enable_grad(), self._autocast():
            return self.ends.embed_whole(input_ids_BT).float()

    def loss(self, hidden_BTH: Tensor, labels_BT: Tensor) -> HeadResult:
        """Cross entropy of each token's label, which is the next token (or IGNORED), in pieces of bounded memory.

        Tokens without a label take no part: neither time nor memory is spent on their logits.
        """
        hidden_NH, labels_N, places_N = _labelled(hidden_BTH, labels_BT)
        parameters = self.parameters.parameters
        totals: list[Tensor | None] = [None] * len(parameters)
        of_hidden_NH = torch.zeros_like(hidden_NH)
        loss_sum = 0.0
        with self._autocast():  # around all pieces, so that the head is cast once
            for piece in self._pieces(len(hidden_NH)):
                given = hidden_NH[piece][None].detach().requires_grad_()
                with torch.enable_grad():
                    loss = _summed_loss(self.ends.logits(given), labels_N[piece])
                with torch.autocast("cpu", enabled=False):
                    found = torch.autograd.grad(loss, [given, *parameters], allow_unused=True)
                loss_sum += float(loss.detach())
                of_hidden_NH[piece] = found[0][0]
                totals = sum_gradients(totals, found[1:])
        of_hidden = hidden_BTH.new_zeros(hidden_BTH.shape, dtype=torch.float32)
        of_hidden.view(-1, hidden_BTH.shape[2])[places_N] = of_hidden_NH
        return HeadResult(loss_sum, len(labels_N), of_hidden, totals)

    def embed_backward(self, embedded_BTH: Tensor, gradient_BTH: Tensor) -> list[Tensor | None]:
        """Gradients w.r.t. the parameters, given that of what embed returned."""
        parameters = self.parameters.parameters
        if not parameters:
            return []
        return list(torch.autograd.grad(embedded_BTH, parameters, gradient_BTH.float(), allow_unused=True))

    def evaluate(self, hidden_BTH: Tensor, labels_BT: Tensor) -> tuple[float, int]:
        """Cross entropy summed over the labels, and their number."""
        hidden_NH, labels_N, _ = _labelled(hidden_BTH, labels_BT)
        loss_sum = 0.0
        with torch.no_grad(), self._autocast():
            for piece in self._pieces(len(hidden_NH)):
                loss_sum += float(_summed_loss(self.ends.logits(hidden_NH[piece][None]), labels_N[piece]))
        return loss_sum, len(labels_N)

    def _pieces(self, num_tokens: int) -> list[slice]:
        size = max(_MIN_PIECE, _LOGITS_BYTES // (4 * self.ends.vocab_size))
        return [slice(start, start + size) for start in range(0, num_tokens, size)]

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self._is_bf16)


def sum_gradients(one: Sequence[Tensor | None], other: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Element by element; None is zero."""
    return [b if a is None else a if b is None else a + b for a, b in zip(one, other, strict=True)]


def _labelled(hidden_BTH: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [N, H] float32 of the tokens that have a label, the labels [N], and their places in the flat batch [N]."""
    labels = labels_BT.reshape(-1)
    places = (labels != IGNORED).nonzero()[:, 0]
    return hidden_BTH.reshape(-1, hidden_BTH.shape[2])[places].float(), labels[places], places


def _summed_loss(logits_1NV: Tensor, labels_N: Tensor) -> Tensor:
    return F.cross_entropy(logits_1NV[0].float(), labels_N, reduction="sum")
