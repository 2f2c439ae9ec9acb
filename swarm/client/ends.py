"""Ends: token embedding, final norm and head of a model, computed by the family's own code.

The whole causal LM is built with one block, and a relay is put in the place of its list of blocks. To embed, the relay catches what
the first block would receive; for logits, it hands in what the last block returned. Scales, learned positions, an embedding norm or
capped logits are thus whatever the family does. B batch rows, T tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from swarm.decoder import BlockSource, build_model, find_blocks, refuse_unfit, shrink_config
from swarm.errors import UserError
from swarm.span import Span
from swarm.terminal import quiet_libraries


class Ends:
    """What a client holds of a model."""

    def __init__(self, checkpoint: BlockSource, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        """Raises UserError for a model that cannot be cut, or whose ends are missing."""
        refuse_unfit(checkpoint.config, checkpoint.name)
        config = shrink_config(checkpoint.config, Span(0, 1))
        self.dtype = dtype
        self.module: Any = _build(config, checkpoint, dtype).to(device)
        base = self.module.base_model
        blocks_name, blocks = find_blocks(base, 1)
        parent = base.get_submodule(blocks_name.rpartition(".")[0])
        self._relay = _Relay(_extra_outputs(base, blocks[0]))
        setattr(parent, blocks_name.rpartition(".")[2], nn.ModuleList([self._relay]))
        self._base = base
        self._takes_positions = "position_ids" in inspect.signature(base.forward).parameters
        self.hidden_size = int(checkpoint.config.hidden_size)
        # The long way costs a model's worth of Python per token; where a short cut gives the very same bits it is taken.
        self._embeds_directly = self._may_embed_directly()
        self._norm = self._find_norm(parent)

    @property
    def input_embeddings(self) -> nn.Module:
        """The token embedding, as transformers' get_input_embeddings."""
        module: nn.Module = self.module.get_input_embeddings()
        return module

    @property
    def lm_head(self) -> nn.Module | None:
        """The output head, as transformers' get_output_embeddings."""
        module: nn.Module | None = self.module.get_output_embeddings()
        return module

    def embed(self, input_ids: Tensor | None, *, position: int = 0, mask: Tensor | None = None, inputs_embeds: Tensor | None = None) -> Tensor:
        """What the first block receives for T new tokens after `position` earlier ones: [B, T, H].

        input_ids: int64 [B, T], or inputs_embeds [B, T, H]. mask: bool [B, position + T] over all tokens; None if every one is real.
        """
        given = input_ids if input_ids is not None else inputs_embeds
        assert given is not None
        if self._embeds_directly:
            embedded: Tensor = inputs_embeds if inputs_embeds is not None else self.input_embeddings(input_ids)
            return embedded
        num_new = given.shape[1]
        options: dict[str, Any] = {}
        if self._takes_positions:
            if mask is None:
                options["position_ids"] = torch.arange(position, position + num_new, device=given.device)[None]
            else:
                options["position_ids"] = (mask.long().cumsum(1) - 1).clamp_min(0)[:, position:].to(given.device)
        self._relay.caught = None
        self._relay.catching = True
        try:
            self._base(input_ids=input_ids, inputs_embeds=inputs_embeds, use_cache=False, **options)
        except _Caught:
            pass
        finally:
            self._relay.catching = False
        caught, self._relay.caught = self._relay.caught, None
        if caught is None:
            raise UserError("this model does not run its blocks one after another; it cannot be served")
        return caught

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [B, T, V] for what the last block returned, [B, T, H]."""
        if self._norm is not None:
            direct: Tensor = self.lm_head(self._norm(hidden))  # type: ignore[misc]
            return direct
        self._relay.injected = hidden
        try:
            output: Tensor = self.module(inputs_embeds=hidden, use_cache=False).logits
        finally:
            self._relay.injected = None
        return output

    @torch.inference_mode()
    def _may_embed_directly(self) -> bool:
        """Whether the embedding is all that stands before the blocks: tried on random tokens, embeddings, positions and padding."""
        self._embeds_directly = False
        ids = torch.randint(0, self.input_embeddings.weight.shape[0], (2, 5), generator=torch.Generator().manual_seed(0))
        embeds = torch.randn(2, 5, self.hidden_size).to(self.dtype)
        mask = torch.ones(2, 8, dtype=torch.bool)
        mask[0, :4] = False
        return all(
            torch.equal(self.embed(ids, position=3, mask=m), self.input_embeddings(ids))
            and torch.equal(self.embed(None, position=3, mask=m, inputs_embeds=embeds), embeds)
            for m in (None, mask)
        )

    @torch.inference_mode()
    def _find_norm(self, parent: nn.Module) -> nn.Module | None:
        """The module that with the head after it gives the very logits of the long way, if there is one."""
        self._norm = None
        if self.lm_head is None:
            return None
        hidden = torch.randn(2, 3, self.hidden_size).to(self.dtype)
        expected = self.logits(hidden)
        for module in parent.children():
            parameters = list(module.parameters())
            if parameters and all(parameter.shape == (self.hidden_size,) for parameter in parameters):
                if torch.equal(self.lm_head(module(hidden)), expected):
                    return module
        return None


class _Caught(Exception):  # noqa: N818
    """Ends a forward once the relay has what the first block would receive."""


class _Relay(nn.Module):
    """Stands in the place of all blocks."""

    def __init__(self, extra_outputs: tuple[Any, ...] | None) -> None:
        super().__init__()
        self._extra_outputs = extra_outputs
        self.catching = False
        self.caught: Tensor | None = None
        self.injected: Tensor | None = None

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        if self.catching:
            self.caught = hidden_states
            raise _Caught
        assert self.injected is not None
        return self.injected if self._extra_outputs is None else (self.injected, *self._extra_outputs)


@torch.inference_mode()
def _extra_outputs(base: Any, block: nn.Module) -> tuple[Any, ...] | None:
    """What this family's block returns beside hidden states: None if it returns a plain tensor, else the rest of the tuple."""
    seen: list[Any] = []
    hook = block.register_forward_hook(lambda _, __, output: seen.append(output))
    try:
        with quiet_libraries():
            base(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=False)
    finally:
        hook.remove()
    return tuple(seen[0][1:]) if isinstance(seen[0], tuple) else None


def _build(config: Any, checkpoint: BlockSource, dtype: torch.dtype) -> Any:
    """The causal LM with one block (whose weights are never used) and the checkpoint's ends."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        meta = AutoModelForCausalLM.from_config(config)
    blocks_name, _ = find_blocks(meta.base_model, 1)
    in_blocks = f"{blocks_name.rpartition('.')[2]}."
    needed = [key for key, _ in meta.named_parameters() if in_blocks not in key]
    return build_model(config, checkpoint.load_ends(), dtype=dtype, needed=needed, name=checkpoint.name)
