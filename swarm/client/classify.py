"""SwarmModelForSequenceClassification: a classification head, here, on the model in the swarm."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from swarm.client.pretrained import SwarmConfig, SwarmPreTrainedModel, check_labels
from swarm.errors import BadRequest, UserError

if TYPE_CHECKING:
    from swarm.client.blocking import Swarm


class SwarmModelForSequenceClassification(SwarmPreTrainedModel):
    """A linear head `score` on the hidden state of each row's last real token, as transformers' decoders do it.

    Only the head is trained; ends and blocks are frozen. save_pretrained saves the head.
    """

    def __init__(self, config: SwarmConfig, swarm: Swarm | None = None) -> None:
        super().__init__(config, swarm)
        self.num_labels = config.num_labels
        self.ends.requires_grad_(False)
        with torch.no_grad():
            width = self._ends.last_hidden_state(torch.zeros(1, 1, self._ends.hidden_size)).shape[-1]
        self.score = nn.Linear(width, self.num_labels, bias=False)
        nn.init.normal_(self.score.weight, std=0.02)
        # What a checkpoint does not hold because it is not trained; transformers asks for it when it loads one.
        self._keys_to_ignore_on_save = {name for name in self.state_dict() if not name.startswith("score.")}

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, *, initial_peers: Sequence[str], num_labels: int = 2, **options: Any
    ) -> SwarmModelForSequenceClassification:
        """Connect to a swarm and put a new head on its model. options: further fields of ClientConfig. Leave with close()."""
        return cls.of(cls._connect(pretrained_model_name_or_path, initial_peers, options), num_labels=num_labels)

    def load_head(self, folder: str | os.PathLike[str]) -> None:
        """Take the head that save_pretrained has written there. UserError if there is none, or for another number of labels."""
        path = Path(folder) / "model.safetensors"
        try:
            weight = load_file(path)["score.weight"]
        except (OSError, KeyError, SafetensorError) as error:
            raise UserError(
                f"{path} holds no classification head; give a folder that save_pretrained has made"
            ) from error
        if weight.shape != self.score.weight.shape:
            raise UserError(
                f"the head in {folder} is for {list(weight.shape)} (labels, hidden size), this model needs {list(self.score.weight.shape)}"
            )
        with torch.no_grad():
            self.score.weight.copy_(weight)

    def get_output_embeddings(self) -> None:
        return None

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast | tuple[Any, ...]:
        """Scores [rows, num_labels], and the loss when there are labels.

        input_ids: int64 [rows, tokens], or inputs_embeds: float [rows, tokens, hidden]. labels: int64 [rows]; with one label, or
        config.problem_type, whatever transformers' ForSequenceClassification takes. A row's last real token is found by
        config.pad_token_id, as transformers does it, and without one by attention_mask.
        """
        given = input_ids if input_ids is not None else inputs_embeds
        if labels is not None and given is not None and self.num_labels > 1 and not labels.is_floating_point():
            check_labels(labels, (given.shape[0],), self.num_labels)
        _, hidden, _ = self._whole(input_ids, inputs_embeds, attention_mask, position_ids)
        scores = self.score(self._ends.last_hidden_state(hidden))
        pooled = scores[torch.arange(scores.shape[0]), self._last_tokens(input_ids, attention_mask, scores.shape[:2])]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=scores, labels=labels, pooled_logits=pooled, config=self.config)
        output = SequenceClassifierOutputWithPast(loss=loss, logits=pooled)
        return output.to_tuple() if return_dict is False else output

    def _last_tokens(self, input_ids: Tensor | None, attention_mask: Tensor | None, shape: torch.Size) -> Tensor:
        """Index of the last real token of each row, int64 [rows]."""
        pad = self.config.pad_token_id
        if input_ids is not None and pad is not None:
            is_real = (input_ids != pad).to("cpu", torch.int64)
        elif attention_mask is not None:
            is_real = attention_mask.to("cpu", torch.int64)
        elif shape[0] == 1 or input_ids is None:
            is_real = torch.ones(shape, dtype=torch.int64)
        else:
            raise BadRequest("several rows without padding token or attention_mask: give attention_mask")
        last: Tensor = (is_real * torch.arange(shape[1])).argmax(-1)
        return last


AutoModelForSequenceClassification.register(SwarmConfig, SwarmModelForSequenceClassification)
