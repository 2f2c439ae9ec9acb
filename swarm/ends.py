"""Ends: token embedding, final norm and head of a model, computed by the family's own code.

The whole causal LM is built without its blocks: a relay stands in their place. To embed, the relay catches what the first block would
receive; for logits, it hands in what the last block returned. Scales, learned positions, an embedding norm or capped logits are thus
whatever the family does. B batch rows, T tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import inspect
import threading
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
from swarm.fast_head import FastHead
from swarm.terminal import quiet_libraries


class Ends:
    """What a client holds of a model."""

    def __init__(self, checkpoint: BlockSource, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        """Raises UserError for a model that cannot be cut, or whose ends are missing."""
        config = checkpoint.config
        refuse_unfit(config, checkpoint.name)
        self.dtype = dtype
        self.hidden_size, self.vocab_size = int(config.hidden_size), int(config.vocab_size)
        relays: list[_Relay] = []

        def cut(model: Any) -> None:
            _, blocks = find_blocks(model.base_model, checkpoint.num_blocks)
            relays.append(_Relay(blocks[0]))
            replace_blocks(model.base_model, checkpoint.num_blocks, [0], relays)

        self.module: Any = build_model(config, checkpoint.load_ends(), dtype=dtype, cut=cut, name=checkpoint.name)
        self.module.to(device)
        (self._relay,) = relays
        self._base = self.module.base_model
        self.takes_positions = "position_ids" in inspect.signature(self._base.forward).parameters
        # The long way costs a model's worth of Python per token; where a short cut gives the very same bits it is taken.
        self._embeds_directly = False
        self._norm: nn.Module | None = None
        with torch.inference_mode(), quiet_libraries():
            probe = torch.randn(2, 3, self.hidden_size, generator=torch.Generator().manual_seed(0)).to(dtype)
            probe = probe.to(self.device)
            try:
                misfit = self._find_misfit(probe)
            except LIBRARY_ERRORS as error:
                misfit = f"it does not run without its blocks ({(str(error).splitlines() or [type(error).__name__])[0][:160]})"
            if misfit is not None:
                raise UserError(
                    f"{checkpoint.name} ({config.model_type}) cannot be served: {misfit}; choose another model"
                )
            self._norm = self._find_norm(probe)
            self._embeds_directly = self._may_embed_directly()

    def quicken_head(self, numeric_class: str) -> None:
        """Let the head compute in "bf16" or "int8" where nothing is trained, at the cost of weights of its own for that; "fp32": no."""
        head = self.lm_head
        if numeric_class != "fp32" and type(head) is nn.Linear and self.dtype == torch.float32:
            self._fast_head = FastHead(head, numeric_class)

    @property
    def device(self) -> torch.device:
        """Where the ends are; they may be moved like any module."""
        weight: Tensor = self.module.get_input_embeddings().weight
        return weight.device

    @property
    def input_embeddings(self) -> nn.Module:
        """The token embedding, as transformers' get_input_embeddings."""
        module: nn.Module = self.module.get_input_embeddings()
        return module

    @property
    def embedding_size(self) -> int:
        """Length of one token's embedding: for a few families not hidden_size, as a projection follows."""
        weight: Tensor = self.module.get_input_embeddings().weight
        return weight.shape[1]

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
        if self.takes_positions and mask is None:
            options["position_ids"] = torch.arange(position, position + num_new, device=self.device)[None]
        elif self.takes_positions and mask is not None:
            options["position_ids"] = positions_of(mask, position).to(self.device)
        return self._catch(given, options)

    def embed_whole(
        self,
        given: Tensor,
        *,
        mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """What the first block receives for whole rows: [B, T, H].

        given: input_ids int64 [B, T] or inputs_embeds [B, T, H]; mask: bool [B, T], which tokens are real; position_ids: int64
        [1 or B, T]. Without them the model does what it does by default, which for some families is not what generate() does.
        """
        given = given.to(self.device)
        is_ids = not given.is_floating_point()
        if self._embeds_directly:
            embedded: Tensor = self.input_embeddings(given) if is_ids else given
            return embedded
        options: dict[str, Any] = {}
        if mask is not None:
            options["attention_mask"] = mask.long().to(self.device)
        if position_ids is not None and self.takes_positions:
            options["position_ids"] = position_ids.to(self.device)
        return self._catch(given, options)

    def _catch(self, given: Tensor, options: dict[str, Any]) -> Tensor:
        self._relay.injected = None
        # Some families change embeddings in place.
        tokens = {"input_ids": given} if given.dtype == torch.long else {"inputs_embeds": given.clone()}
        try:
            self._base(use_cache=False, **tokens, **options)
        except _Caught as caught:
            return caught.hidden
        raise UserError("this model does not run its blocks one after another; it cannot be served")

    def last_hidden_state(self, hidden: Tensor) -> Tensor:
        """What the base model returns, [B, T, H']: the output of the last block after the final norm, if the family has one."""
        hidden = hidden.to(self.device)
        if self._norm is not None:
            normed: Tensor = self._norm(hidden)
            return normed
        output: Tensor = self._inject(self._base, hidden)[0]
        return output

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [B, T, V] for what the last block returned, [B, T, H]."""
        hidden = hidden.to(self.device)
        if self._norm is not None:
            direct: Tensor = self.lm_head(self._norm(hidden))  # type: ignore[misc]
            return direct
        output: Tensor = self._inject(self.module, hidden).logits
        return output

    def _inject(self, module: Any, hidden: Tensor) -> Any:
        """What the whole model, or its base, returns when the last block returns `hidden`."""
        self._relay.injected = hidden
        placeholder = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        try:
            return module(input_ids=placeholder, use_cache=False)
        finally:
            self._relay.injected = None

    def _find_misfit(self, probe: Tensor) -> str | None:
        """Why this family's ends cannot be told from its blocks; None if they can."""
        padding = getattr(self.module.config, "pad_token_id", None)
        ids = torch.tensor([[i % self.vocab_size for i in range(6) if i != padding][:5]], device=self.device)
        embedded = self.embed(ids)
        if embedded.ndim != 3:
            return "what goes from block to block is not one hidden state for each token"
        if not self._find_shape_of_block_outputs(probe):
            return "its ends do not run without its blocks"
        if not self._may_embed_in_parts(ids, embedded):
            return "tokens cannot be embedded at a given position"
        if not torch.equal(self.embed_whole(ids), embedded):
            return "it does not count positions from 0, as generate() does"
        return None

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

    def _may_embed_in_parts(self, ids: Tensor, whole: Tensor) -> bool:
        """Whether five tokens get the same embedding alone as after others (but for rounding, if a projection follows)."""
        tail = self.embed(ids[:, 3:], position=3)
        if whole.shape != (1, 5, self.hidden_size):
            return False
        error = (whole[:, 3:] - tail).abs().max() / whole.abs().max()
        return float(error) < (1e-4 if self.dtype == torch.float32 else 1e-2)

    def _may_embed_directly(self) -> bool:
        """Whether the embedding is all that stands before the blocks: tried on random tokens, embeddings, positions and padding."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, self.vocab_size, (2, 5), generator=generator).to(self.device)
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
        head: Any = self.lm_head
        if head is None or head.weight.shape[1] != self.hidden_size:
            return None
        expected = self.logits(probe)
        found: list[nn.Module] = []
        for module in self._base.modules():
            parameters = list(module.parameters())
            is_norm = parameters and all(parameter.shape == (self.hidden_size,) for parameter in parameters)
            if is_norm and self._relay not in module.modules() and torch.equal(head(module(probe)), expected):
                found.append(module)
        return found[0] if len(found) == 1 else None  # of equal norms (bloom's, untrained) nobody can tell which it is


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
        self._in_thread = threading.local()  # several batches may be under way, each in a thread

    @property
    def injected(self) -> Tensor | None:
        hidden: Tensor | None = getattr(self._in_thread, "hidden", None)
        return hidden

    @injected.setter
    def injected(self, hidden: Tensor | None) -> None:
        self._in_thread.hidden = hidden

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
