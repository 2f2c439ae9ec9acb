"""Ends: token embedding, final norm and head of a model, computed by the family's own code.

The whole causal LM is built without its blocks: a relay stands in their place. To embed, the relay catches what the first block would
receive; for logits, it hands in what the last block returned. Scales, learned positions, an embedding norm or capped logits are thus
whatever the family does. B batch rows, T tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from swarm.decoder import (
    LIBRARY_ERRORS,
    BlockSource,
    build_model,
    find_blocks,
    positions_of,
    refuse_unfit,
    replace_blocks,
)
from swarm.errors import BadRequest, UserError
from swarm.span import Span
from swarm.terminal import quiet_libraries


class Ends:
    """What a client holds of a model."""

    def __init__(self, checkpoint: BlockSource, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        """Raises UserError for a model that cannot be cut, or whose ends are missing."""
        config = checkpoint.config
        refuse_unfit(config, checkpoint.name)
        self.dtype, self.device = dtype, torch.device(device)
        self.hidden_size, self._vocab_size = int(config.hidden_size), int(config.vocab_size)
        relays: list[_Relay] = []

        def cut(model: Any) -> None:
            _, blocks = find_blocks(model.base_model, checkpoint.num_blocks)
            relays.append(_Relay(blocks[0]))
            replace_blocks(model.base_model, checkpoint.num_blocks, Span(0, 1), relays)

        self.module: Any = build_model(config, checkpoint.load_ends(), dtype=dtype, cut=cut, name=checkpoint.name)
        self.module.to(self.device)
        (self._relay,) = relays
        self._base = self.module.base_model
        self._takes_positions = "position_ids" in inspect.signature(self._base.forward).parameters
        # The long way costs a model's worth of Python per token; where a short cut gives the very same bits it is taken.
        self._embeds_directly = False
        self._norm: nn.Module | None = None
        with torch.inference_mode(), quiet_libraries():
            probe = torch.randn(2, 3, self.hidden_size, generator=torch.Generator().manual_seed(0)).to(dtype)
            probe = probe.to(self.device)
            if not self._find_shape_of_block_outputs(probe):
                raise UserError(
                    f"{checkpoint.name} ({config.model_type}) cannot be served: its ends do not run without its blocks"
                )
            if not self._may_embed_in_parts():
                raise UserError(
                    f"{checkpoint.name} ({config.model_type}) cannot be served: tokens cannot be embedded at a given position"
                )
            self._norm = self._find_norm(probe)
            self._embeds_directly = self._may_embed_directly()

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

    def embed(
        self,
        input_ids: Tensor | None,
        *,
        position: int = 0,
        mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """What the first block receives for T new tokens after `position` earlier ones: [B, T, H].

        input_ids: int64 [B, T], or inputs_embeds [B, T, H]. mask: bool [B, position + T] over all tokens; None if every one is real.
        """
        given = input_ids if input_ids is not None else inputs_embeds
        if given is None:
            raise BadRequest("give either input_ids or inputs_embeds")
        given = given.to(self.device)
        if self._embeds_directly:
            embedded: Tensor = given if input_ids is None else self.input_embeddings(given)
            return embedded
        num_new = given.shape[1]
        options: dict[str, Any] = {}
        if self._takes_positions and mask is None:
            options["position_ids"] = torch.arange(position, position + num_new, device=self.device)[None]
        elif self._takes_positions and mask is not None:
            options["position_ids"] = positions_of(mask, position).to(self.device)
        options["inputs_embeds" if input_ids is None else "input_ids"] = given
        self._relay.injected = None
        try:
            self._base(use_cache=False, **options)
        except _Caught as caught:
            return caught.hidden
        raise UserError("this model does not run its blocks one after another; it cannot be served")

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [B, T, V] for what the last block returned, [B, T, H]."""
        hidden = hidden.to(self.device)
        if self._norm is not None:
            direct: Tensor = self.lm_head(self._norm(hidden))  # type: ignore[misc]
            return direct
        self._relay.injected = hidden
        placeholder = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        try:
            output: Tensor = self.module(input_ids=placeholder, use_cache=False).logits
        finally:
            self._relay.injected = None
        return output

    def _find_shape_of_block_outputs(self, probe: Tensor) -> bool:
        """Find out whether this family's blocks return a plain tensor or a tuple: with the wrong one, logits have a wrong shape."""
        for num_extra_outputs in (None, 0, 1, 2):
            self._relay.num_extra_outputs = num_extra_outputs
            try:
                logits = self.logits(probe)
            except LIBRARY_ERRORS:
                continue
            if logits.ndim == 3 and logits.shape[:2] == probe.shape[:2]:
                return True
        return False

    def _may_embed_in_parts(self) -> bool:
        """Whether tokens get the same embedding alone as after others (but for rounding, if a projection follows)."""
        ids = torch.arange(5, device=self.device)[None] % self._vocab_size
        whole, tail = self.embed(ids), self.embed(ids[:, 3:], position=3)
        if whole.shape != (1, 5, self.hidden_size):
            return False
        error = (whole[:, 3:] - tail).abs().max() / whole.abs().max()
        return float(error) < (1e-4 if self.dtype == torch.float32 else 1e-2)

    def _may_embed_directly(self) -> bool:
        """Whether the embedding is all that stands before the blocks: tried on random tokens, embeddings, positions and padding."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, self._vocab_size, (2, 5), generator=generator).to(self.device)
        embeds = torch.randn(2, 5, self.hidden_size, generator=generator).to(self.device, self.dtype)
        mask = torch.ones(2, 8, dtype=torch.bool)
        mask[0, :4] = False
        return all(
            torch.equal(self.embed(ids, position=3, mask=m), self.input_embeddings(ids))
            and torch.equal(self.embed(None, position=3, mask=m, inputs_embeds=embeds), embeds)
            for m in (None, mask)
        )

    def _find_norm(self, probe: Tensor) -> nn.Module | None:
        """The module that with the head after it gives the very logits of the long way, if there is one."""
        expected = self.logits(probe)
        module: nn.Module
        for module in self._base.modules():
            parameters = list(module.parameters())
            is_norm = parameters and all(parameter.shape == (self.hidden_size,) for parameter in parameters)
            if is_norm and self.lm_head is not None and torch.equal(self.lm_head(module(probe)), expected):
                return module
        return None


class _Caught(Exception):
    """Ends a forward once the relay has what the first block would receive."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class _Relay(nn.Module):
    """Stands in the place of all blocks; to code that only looks at it, it is the first of them."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self._block = (block,)  # in a tuple, so that its weights are none of the model's
        self.num_extra_outputs: int | None = None
        self.injected: Tensor | None = None

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        if self.injected is None:
            raise _Caught(hidden_states)
        if self.num_extra_outputs is None:
            return self.injected
        return (self.injected, *[None] * self.num_extra_outputs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"][0], name)
