"""SwarmModelForCausalLM: a transformers model whose blocks are in the swarm. generate(), pipelines and streamers work unchanged.

The ends (embedding, final norm, head) are computed here, by the family's own code. With a cache, one call of the blocks is one
session step; without, whole rows go through them in microbatches, differentiably.
The hooks of transformers that this relies on are held by tests/contract/test_transformers_hooks.py.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, Cache, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from swarm.client.pretrained import SwarmConfig, SwarmPreTrainedModel, check_labels
from swarm.client.session import Session, SessionStats
from swarm.decoder import positions_of
from swarm.errors import BadRequest

if TYPE_CHECKING:
    from swarm.client.blocking import Swarm

# Caches that the generate() under way has opened, to be closed when it returns.
_opened_caches: contextvars.ContextVar[list[RemoteCache] | None] = contextvars.ContextVar("opened_caches", default=None)


class RemoteCache(Cache):  # type: ignore[misc]
    """The KV caches of a session, as transformers sees them. Opens the session at its first step.

    Rewinding (crop) and reordering (beams) are remembered and ride in the next step.
    """

    is_compileable = False

    def __init__(self, swarm: Swarm, max_length: int) -> None:
        super().__init__(layers=[])
        self._swarm, self._max_length = swarm, max_length
        self._session: Session | None = None
        self._length = 0
        self._reorder: Tensor | None = None
        self._token_ids: Tensor | None = None  # [batch, length]: what the caches hold; None if unknown (inputs_embeds)
        self._mask: Tensor | None = None  # bool [batch, length]
        self._closed = False

    @property
    def session(self) -> Session | None:
        """The session behind, once its first step was taken."""
        return self._session

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._length

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return self._max_length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens: -n forgets n, as in transformers 5 (which refuses positive numbers)."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give a negative number, of tokens to remove from the end")
        self._length = max(0, self._length + tokens_to_remove)
        self._token_ids = None if self._token_ids is None else self._token_ids[:, : self._length]
        self._mask = None if self._mask is None else self._mask[:, : self._length]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        beam_idx = beam_idx.cpu()
        self._reorder = beam_idx if self._reorder is None else self._reorder[beam_idx]
        self._token_ids = None if self._token_ids is None else self._token_ids[beam_idx]
        self._mask = None if self._mask is None else self._mask[beam_idx]

    def activate_past_recording(self) -> None:
        """Every cache here can be rewound; there is nothing to switch on."""

    def align(self, input_ids: Tensor) -> None:
        """Keep what the caches share with input_ids [batch, tokens] and forget the rest, so that only what is new will be sent."""
        if self._session is None:
            return
        if input_ids.shape[0] != self._session.batch:
            raise BadRequest(
                f"this session has {self._session.batch} rows, the prompt has {input_ids.shape[0]}; open another session"
            )
        known, shared = self._token_ids, 0
        if known is not None:
            limit = min(known.shape[1], input_ids.shape[1] - 1)  # at least one token must be computed
            differs = (known[:, :limit] != input_ids[:, :limit].cpu()).any(dim=0)
            shared = int(differs.int().argmax()) if bool(differs.any()) else limit
        if shared < self._length:
            self.crop(shared - self._length)

    def step(self, hidden: Tensor, new_mask: Tensor | None, token_ids: Tensor | None) -> Tensor:
        """Send hidden [batch, tokens, hidden] through the blocks."""
        if self._closed:
            raise BadRequest(
                "this cache was freed when generate() returned; use `with model.session(max_length=...)` to keep one"
            )
        if self._session is None:
            self._session = self._swarm.session(batch=hidden.shape[0], max_length=self._max_length)
        session = self._session
        output = self._swarm.run(
            session.step(
                hidden,
                mask=new_mask,
                rewind_to=self._length if self._length < session.position else None,
                reorder=() if self._reorder is None else self._reorder.tolist(),
            )
        )
        self._reorder = None
        self._remember(hidden, new_mask, token_ids)
        return output

    def full_mask(self, new_mask: Tensor | None, batch: int, num_new: int) -> Tensor | None:
        """bool [batch, length + num_new] over all tokens; None if every one is real."""
        if self._mask is None and new_mask is None:
            return None
        old = torch.ones(batch, self._length, dtype=torch.bool) if self._mask is None else self._mask
        new = torch.ones(batch, num_new, dtype=torch.bool) if new_mask is None else new_mask
        return torch.cat([old, new], dim=1)

    def _remember(self, hidden: Tensor, new_mask: Tensor | None, token_ids: Tensor | None) -> None:
        self._mask = self.full_mask(new_mask, hidden.shape[0], hidden.shape[1])
        if token_ids is None or (self._token_ids is None and self._length > 0):
            self._token_ids = None
        elif self._token_ids is None:
            self._token_ids = token_ids.cpu()
        else:
            self._token_ids = torch.cat([self._token_ids, token_ids.cpu()], dim=1)
        self._length += hidden.shape[1]

    def close(self) -> None:
        """Free the caches on every hop."""
        self._closed = True
        if self._session is not None:
            self._swarm.run(self._session.aclose())


@dataclass
class SwarmCausalLMOutput(CausalLMOutputWithPast):  # type: ignore[misc]
    """As transformers', and where the hidden states are from."""

    hidden_state_blocks: tuple[int, ...] | None = None
    """hidden_states[i] is what block hidden_state_blocks[i] received; the last one, after the final norm, is num_blocks."""


class SwarmModelForCausalLM(SwarmPreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A causal language model whose ends are here and whose blocks are in the swarm."""

    def __init__(self, config: SwarmConfig, swarm: Swarm | None = None) -> None:
        super().__init__(config, swarm)
        self.last_stats: SessionStats | None = None
        self.last_session: Session | None = None
        self._kept: RemoteCache | None = None

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, *, initial_peers: Sequence[str], **options: Any
    ) -> SwarmModelForCausalLM:
        """Connect to a swarm and return its model. options: further fields of ClientConfig. Leave with close()."""
        return cls._connect(pretrained_model_name_or_path, initial_peers, options).model()

    @property
    def current_session(self) -> Session | None:
        """The session of the generate() under way (in this thread), or of the open session(); for whoever watches timings."""
        caches = _opened_caches.get()
        cache = caches[-1] if caches else self._kept
        return None if cache is None else cache.session

    @contextlib.contextmanager
    def session(self, max_length: int) -> Iterator[RemoteCache]:
        """Keep the KV caches between calls of generate(): each call sends only what its prompt does not share with the last.

        max_length: tokens of prompt and answers together. Caches are freed at the end of the context.
        """
        if self._kept is not None:
            raise BadRequest("a session of this model is open already; close it first")
        self._kept = cache = RemoteCache(self._swarm, max_length)
        try:
            yield cache
        finally:
            self._kept = None
            cache.close()

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As transformers' generate; caches that it opens on the hops are freed when it returns, fails or is interrupted."""
        if self._kept is not None and kwargs.get("past_key_values") is None:
            prompt = kwargs.get("input_ids") if inputs is None else inputs
            if prompt is not None:
                self._kept.align(prompt)
            kwargs["past_key_values"] = self._kept
        caches: list[RemoteCache] = []
        token = _opened_caches.set(caches)
        try:
            return super().generate(inputs, *args, **kwargs)
        finally:
            _opened_caches.reset(token)
            for cache in caches:
                cache.close()
            used = caches[-1] if caches else self._kept
            if used is not None and used.session is not None:
                self.last_session, self.last_stats = used.session, used.session.stats

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """transformers' hook: give generate() our cache instead of a DynamicCache."""
        if model_kwargs.get("past_key_values") is not None or generation_config.use_cache is False:
            return
        # Speculation puts up to this many candidates behind the last token, and rewinds.
        speculated = max(generation_config.prompt_lookup_num_tokens or 0, generation_config.num_assistant_tokens or 0)
        cache = RemoteCache(self._swarm, max_cache_length + 1 + speculated)
        caches = _opened_caches.get()
        if caches is not None:
            caches.append(cache)
        model_kwargs["past_key_values"] = cache

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: RemoteCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SwarmCausalLMOutput | tuple[Any, ...]:
        """Logits, and the loss when there are labels, as transformers' models; differentiable unless a cache is used.

        input_ids: int64 [batch, tokens], or inputs_embeds: float [batch, tokens, hidden]. attention_mask: [batch, past + tokens].
        labels: int64 [batch, tokens], -100 where there is none. Hidden states: those at the hops' boundaries.
        With past_key_values (of this model), one step of a session; else the whole rows, in microbatches.
        """
        self._refuse_unsupported(kwargs)
        if past_key_values is not None or _opened_caches.get() is not None:  # in generate(), also without a cache
            if labels is not None or output_hidden_states:
                raise BadRequest(
                    "labels and output_hidden_states need whole rows: call the model without past_key_values"
                )
            output = self._step(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, logits_to_keep)
        else:
            output = self._whole_rows(
                input_ids,
                attention_mask,
                position_ids,
                inputs_embeds,
                labels,
                bool(output_hidden_states),
                logits_to_keep,
                kwargs,
            )
        return output.to_tuple() if return_dict is False else output

    def _whole_rows(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        labels: Tensor | None,
        wants_states: bool,
        logits_to_keep: int,
        loss_options: dict[str, Any],
    ) -> SwarmCausalLMOutput:
        given = input_ids if input_ids is not None else inputs_embeds
        if labels is not None and given is not None:
            check_labels(labels, tuple(given.shape[:2]), self.config.vocab_size)
        embedded, hidden, boundaries = self._whole(
            input_ids, inputs_embeds, attention_mask, position_ids, wants_boundaries=wants_states
        )
        logits = self._ends.logits(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **loss_options)
        output = SwarmCausalLMOutput(loss=loss, logits=logits)
        if wants_states:
            output.hidden_states = (embedded, *boundaries.values(), self._ends.last_hidden_state(hidden))
            output.hidden_state_blocks = (0, *boundaries, self._swarm.client.router.spec.num_blocks)
        return output

    def _step(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: RemoteCache | None,
        inputs_embeds: Tensor | None,
        logits_to_keep: int,
    ) -> SwarmCausalLMOutput:
        """New tokens after those in the cache; without one, in a session for this call alone."""
        given = input_ids if input_ids is not None else inputs_embeds
        if given is None:
            raise BadRequest("give either input_ids or inputs_embeds")
        batch, num_new = given.shape[:2]
        cache = past_key_values if past_key_values is not None else RemoteCache(self._swarm, num_new)
        if not isinstance(cache, RemoteCache):
            raise BadRequest(f"past_key_values must come from this model, got {type(cache).__name__}")
        new_mask = _new_mask(attention_mask, num_new)
        mask = cache.full_mask(new_mask, batch, num_new)
        _check_positions(position_ids, mask, cache.get_seq_length(), num_new)
        try:
            with torch.no_grad():
                hidden = self._ends.embed(
                    input_ids, position=cache.get_seq_length(), mask=mask, inputs_embeds=inputs_embeds
                )
                hidden = cache.step(hidden, new_mask, input_ids)
                logits = self._ends.logits(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        finally:
            if past_key_values is None:
                cache.close()
        return SwarmCausalLMOutput(logits=logits, past_key_values=past_key_values)

    @staticmethod
    def _refuse_unsupported(kwargs: dict[str, Any]) -> None:
        for name in ("output_attentions", "cache_position"):
            if kwargs.pop(name, None) not in (None, False):
                raise BadRequest(f"{name} is not supported: the blocks are in the swarm")


def _new_mask(attention_mask: Tensor | None, num_new: int) -> Tensor | None:
    """The part of an attention mask that concerns the new tokens, bool [batch, num_new]; None if they are all real."""
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2 or attention_mask.shape[1] < num_new:
        raise BadRequest(f"attention_mask must be [batch, tokens], got {list(attention_mask.shape)}")
    new = attention_mask[:, -num_new:].to("cpu", torch.bool)
    return None if bool(new.all()) else new


def _check_positions(position_ids: Tensor | None, mask: Tensor | None, past: int, num_new: int) -> None:
    """Positions are counted by the hops from the mask; others than those cannot be asked for."""
    if position_ids is None:
        return
    if mask is None:
        usual = torch.arange(past, past + num_new)[None]
        real = torch.ones_like(usual, dtype=torch.bool)
    else:
        usual = positions_of(mask, past)
        real = mask[:, past:]
    if bool(((position_ids.cpu() != usual) & real).any()):
        raise BadRequest("position_ids other than those that follow from attention_mask are not supported")


AutoConfig.register(SwarmConfig.model_type, SwarmConfig)
AutoModelForCausalLM.register(SwarmConfig, SwarmModelForCausalLM)
