"""SwarmPreTrainedModel: what all transformers models have in common whose ends are here and whose blocks are in the swarm."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from swarm.client.autograd import through_blocks
from swarm.client.config import ClientConfig
from swarm.client.microbatch import MicrobatchStats, PassOptions
from swarm.errors import BadRequest

if TYPE_CHECKING:
    from swarm.client.blocking import Swarm


class SwarmConfig(PretrainedConfig):  # type: ignore[misc]
    """The config of the model behind, under a model_type of its own so that the Auto classes find SwarmModelForCausalLM."""

    model_type = "shardswarm"

    def __init__(self, base_config: dict[str, Any] | None = None, **kwargs: Any) -> None:
        base = dict(base_config or {})
        self.base_model_type = base.pop("model_type", None)
        for volatile in ("architectures", "auto_map", "transformers_version", "dtype", "torch_dtype"):
            base.pop(volatile, None)
        super().__init__(**{**base, **kwargs})

    @classmethod
    def of(cls, config: Any, **options: Any) -> SwarmConfig:
        """From the config of the model behind, with the standard names whatever the family calls them. options: further fields."""
        standard = {
            name: getattr(config, name)
            for name in (
                "vocab_size",
                "hidden_size",
                "num_hidden_layers",
                "num_attention_heads",
                "max_position_embeddings",
            )
            if hasattr(config, name)
        }
        return cls(base_config={**config.to_dict(), **standard, **options})


class SwarmPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """The ends are a module of this model, called `ends`; the blocks are reached through a connected Swarm."""

    config_class = SwarmConfig
    main_input_name = "input_ids"
    base_model_prefix = "ends"
    _supports_sdpa = True
    _supports_flash_attn = True
    _no_split_modules: Sequence[str] = ()

    def __init__(self, config: SwarmConfig, swarm: Swarm | None = None) -> None:
        super().__init__(config)
        if swarm is None:
            name = type(self).__name__
            raise BadRequest(
                f"make the model with {name}.from_pretrained(name, initial_peers=[...]) or from swarm.connect(...)"
            )
        self._swarm = swarm
        self._ends = swarm.client.ends
        self.ends = self._ends.module

    @classmethod
    def of(cls, swarm: Swarm, **options: Any) -> Self:
        """The model of a connected swarm. options: further fields of its config."""
        checkpoint = swarm.client.checkpoint
        model: Self = cls(SwarmConfig.of(checkpoint.config, **options), swarm)
        if model.can_generate():
            model.generation_config = checkpoint.generation_config() or GenerationConfig.from_model_config(
                checkpoint.config
            )
        model.name_or_path = swarm.client.config.model  # what from_pretrained would need again
        model.eval()
        return model

    @staticmethod
    def _connect(name: str, initial_peers: Sequence[str], options: dict[str, Any]) -> Swarm:
        from swarm.client.blocking import Swarm

        return Swarm(ClientConfig(model=str(name), initial_peers=tuple(initial_peers), **options))

    def close(self) -> None:
        """Leave the swarm."""
        self._swarm.close()

    @property
    def microbatch_stats(self) -> MicrobatchStats:
        """What forward and backward through the swarm have taken so far."""
        return self._swarm.client.blocks.stats

    def get_input_embeddings(self) -> nn.Module:
        return self._ends.input_embeddings

    def get_output_embeddings(self) -> nn.Module | None:
        return self._ends.lm_head

    def train(self, mode: bool = True) -> Self:
        """As torch's. The model's own dropout, here and in the swarm, is on only if the client was told so (ClientConfig.dropout)."""
        super().train(mode)
        if not self._has_dropout:
            self.ends.eval()
        return self

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **options: Any) -> None:
        """Save the config and the parameters that are trained here. The blocks are in the swarm; a frozen model has nothing to save."""
        trained = {name: parameter.detach() for name, parameter in self.named_parameters() if parameter.requires_grad}
        if not trained:
            raise BadRequest("nothing of this model is trained here, and its blocks are in the swarm: nothing to save")
        options["state_dict"] = trained
        super().save_pretrained(save_directory, *args, **options)

    @property
    def _has_dropout(self) -> bool:
        swarm = self.__dict__.get("_swarm")
        return swarm is not None and bool(swarm.client.config.dropout)

    def _whole(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        *,
        wants_boundaries: bool = False,
    ) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
        """Whole rows through embedding and blocks: (what the first block receives, what the last one returns, boundaries)."""
        given = input_ids if input_ids is not None else inputs_embeds
        if given is None or (input_ids is not None and inputs_embeds is not None):
            raise BadRequest("give either input_ids or inputs_embeds")
        mask = _checked_mask(given, attention_mask)
        self._check(given, position_ids)
        embedded = self._ends.embed_whole(given, mask=mask, position_ids=position_ids)
        seed = int(torch.randint(2**62, ())) if self.training and self._has_dropout else None
        positions = None if position_ids is None else position_ids.to("cpu", torch.long)
        options = PassOptions(mask, positions if self._ends.takes_positions else None, seed)
        output, boundaries = through_blocks(self._swarm, embedded.to("cpu"), options, wants_boundaries=wants_boundaries)
        return embedded, output, boundaries

    def _check(self, given: Tensor, position_ids: Tensor | None) -> None:
        vocab_size = self.config.vocab_size
        if given.is_floating_point():
            if given.ndim != 3 or given.shape[2] != self._ends.embedding_size or not given.numel():
                raise BadRequest(
                    f"inputs_embeds must be [rows, tokens, {self._ends.embedding_size}], got {list(given.shape)}"
                )
        elif given.ndim != 2 or not given.numel():
            raise BadRequest(f"input_ids must be [rows, tokens], at least one of each, got {list(given.shape)}")
        elif int(given.min()) < 0 or int(given.max()) >= vocab_size:
            raise BadRequest(
                f"input_ids must be 0 .. {vocab_size - 1}, got {int(given.min())} .. {int(given.max())}; is it this model's tokenizer?"
            )
        if position_ids is not None and (
            position_ids.ndim != 2
            or position_ids.shape[0] not in (1, given.shape[0])
            or position_ids.shape[1] != given.shape[1]
        ):
            raise BadRequest(
                f"position_ids must be [1 or {given.shape[0]}, {given.shape[1]}], got {list(position_ids.shape)}"
            )


def check_labels(labels: Tensor, shape: tuple[int, ...], num_classes: int) -> None:
    """BadRequest unless labels have this shape and are below num_classes, or -100 (ignored)."""
    if tuple(labels.shape) != shape:
        raise BadRequest(f"labels must have the shape {list(shape)}, got {list(labels.shape)}")
    wrong = labels[(labels != -100) & ((labels < 0) | (labels >= num_classes))]
    if len(wrong):
        raise BadRequest(f"labels must be 0 .. {num_classes - 1}, or -100 for none, got {int(wrong[0])}")


def _checked_mask(given: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    """bool [rows, tokens]; None if every token is real."""
    if attention_mask is None:
        return None
    if attention_mask.shape != given.shape[:2]:
        raise BadRequest(f"attention_mask must be {list(given.shape[:2])}, got {list(attention_mask.shape)}")
    mask = attention_mask.to("cpu", torch.bool)
    return None if bool(mask.all()) else mask
