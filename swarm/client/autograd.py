"""The blocks in the swarm as one differentiable function. B rows, T tokens, H hidden size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from swarm.client.microbatch import Microbatch, PassOptions

if TYPE_CHECKING:
    from swarm.client.blocking import Swarm


def through_blocks(
    swarm: Swarm, hidden: Tensor, options: PassOptions, *, wants_boundaries: bool = False
) -> tuple[Tensor, dict[int, Tensor]]:
    """Hidden states [B, T, H] after the last block, and on request those before block b wherever all microbatches changed hops.

    Differentiable w.r.t. hidden, if it requires gradients; the output then holds the inputs of all hops until its graph is freed.
    Raises RouteBroken or another SwarmError, in forward and in backward.
    """
    if torch.is_grad_enabled() and hidden.requires_grad:
        blocks: list[int] = []
        output, *states = _ThroughBlocks.apply(  # type: ignore[no-untyped-call]
            hidden, swarm, options, wants_boundaries, blocks
        )
        return output, dict(zip(blocks, states, strict=True))
    plain = hidden.detach()
    output, microbatches = swarm.run(
        swarm.client.blocks.forward(plain, options, wants_gradients=False, keeps_inputs=wants_boundaries)
    )
    return output, _boundaries(microbatches) if wants_boundaries else {}


class _ThroughBlocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, swarm: Swarm, options: PassOptions, wants_boundaries: bool, blocks: list[int]
    ) -> tuple[Tensor, ...]:
        """blocks: filled with the block before which each of the further outputs is."""
        output, microbatches = swarm.run(swarm.client.blocks.forward(hidden, options, wants_gradients=True))
        boundaries = _boundaries(microbatches) if wants_boundaries else {}
        blocks.extend(boundaries)
        ctx.swarm, ctx.microbatches, ctx.boundary_blocks = swarm, microbatches, tuple(boundaries)
        ctx.dtype, ctx.device = hidden.dtype, hidden.device
        ctx.set_materialize_grads(False)
        return (output, *boundaries.values())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        last, *others = [None if gradient is None else gradient.to("cpu") for gradient in gradients]
        at_boundaries = {
            block: gradient for block, gradient in zip(ctx.boundary_blocks, others, strict=True) if gradient is not None
        }
        if last is None and not at_boundaries:
            return None, None, None, None, None
        result: Tensor = ctx.swarm.run(ctx.swarm.client.blocks.backward(ctx.microbatches, last, at_boundaries))
        return result.to(ctx.device, ctx.dtype), None, None, None, None


def _boundaries(microbatches: list[Microbatch]) -> dict[int, Tensor]:
    """Hidden states [B, T, H] before each block at which every microbatch came to another hop, in order."""
    states = [microbatch.boundaries for microbatch in microbatches]
    shared = sorted(set.intersection(*map(set, states)))
    return {block: torch.cat([state[block] for state in states]) for block in shared}
