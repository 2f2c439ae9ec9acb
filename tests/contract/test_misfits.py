"""Made-up families, each with a flaw for which its blocks cannot be served apart: every span of them is refused, with the reason.

Whatever transformers adds one day is not in docs/models.md yet; a node that loads a part of it must notice by itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from node.backend.span_model import SpanModel
from swarm.checkpoint import open_checkpoint
from swarm.errors import UserError
from swarm.span import Span
from tests.support.families import Cut, Whole, check_everything
from tests.support.models import TINY, save_random

FLAWS = {
    "reads embeddings": "read more of what is before them",
    "hands on a state": "read more of what is before them",
    "shares a dictionary": "read more of what is before them",
    "scales between": "something between its blocks",
    "scales each output": "something after its blocks",
    "uses the first block's keys": "do not keep keys and values of their own",
    "looks ahead": "depend on later ones",
    "ignores the cache": "given tokens in steps",
    "ignores padding": "beside padding",
}


class MadeUpConfig(LlamaConfig):
    model_type = "made_up"
    flaw: str = ""


class MadeUpBlock(LlamaDecoderLayer):
    def __init__(self, config: MadeUpConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.flaw, self.index = config.flaw, layer_idx

    def forward(self, hidden_states: Tensor, extra: Any = None, **options: Any) -> Any:
        if isinstance(extra, dict):
            extra, shared = extra.get("last"), extra
            shared["last"] = hidden_states
        if isinstance(extra, Tensor):
            hidden_states = hidden_states + 0.1 * extra
        if self.flaw == "uses the first block's keys" and self.index > 0:
            options["past_key_values"] = None
        if self.flaw == "ignores the cache" and (cache := options.pop("past_key_values")) is not None:
            kept = torch.zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            cache.update(kept, kept, self.index)
            mask = options["attention_mask"]
            options["attention_mask"] = None if mask is None else mask[..., -hidden_states.shape[1] :]
        output = super().forward(hidden_states, **options)
        return (output, output * 0.5) if self.flaw == "hands on a state" else output


class MadeUpModel(LlamaModel):
    config_class = MadeUpConfig

    def __init__(self, config: MadeUpConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList([MadeUpBlock(config, index) for index in range(config.num_hidden_layers)])
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        flaw = self.config.flaw
        hidden = embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(past, past + hidden.shape[1])[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=None if flaw == "ignores padding" else attention_mask,
            past_key_values=None if flaw == "ignores the cache" else past_key_values,
            position_ids=position_ids,
        )
        if flaw == "looks ahead":
            mask = torch.zeros(1, 1, hidden.shape[1], position_ids.max() + 1)
        options = {
            "attention_mask": mask,
            "position_embeddings": self.rotary_emb(hidden, position_ids),
            "position_ids": position_ids,
            "past_key_values": past_key_values,
        }
        extra: Any = {"reads embeddings": embeds, "shares a dictionary": {}}.get(flaw)
        for block in self.layers[: self.config.num_hidden_layers]:
            if flaw == "scales between":
                hidden = hidden * 1.1
            hidden = block(hidden, extra, **options)
            if flaw == "hands on a state":
                hidden, extra = hidden
            if flaw == "scales each output":
                hidden = hidden * 1.1
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), past_key_values=past_key_values)


class MadeUpForCausalLM(LlamaForCausalLM):
    config_class = MadeUpConfig

    def __init__(self, config: MadeUpConfig) -> None:
        super().__init__(config)
        self.model = MadeUpModel(config)
        self.post_init()


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONFIG_MAPPING._extra_content, "made_up", MadeUpConfig)
    monkeypatch.setitem(AutoModelForCausalLM._model_mapping._extra_content, MadeUpConfig, MadeUpForCausalLM)


def save(path: Path, flaw: str) -> Path:
    save_random(MadeUpConfig(**TINY["llama"], flaw=flaw), path)
    return path


def test_without_a_flaw_it_is_served(tmp_path: Path) -> None:
    path = save(tmp_path, "")
    check_everything(Whole(path), Cut(path, {Span(0, 1): [Span(0, 1)], Span(1, 4): [Span(1, 3), Span(3, 4)]}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("flaw", FLAWS)
def test_every_span_of_a_flawed_family_is_refused(tmp_path: Path, flaw: str, dtype: torch.dtype) -> None:
    checkpoint = open_checkpoint(str(save(tmp_path, flaw)), progress=False)
    spans = [Span(0, 1), Span(2, 3), Span(1, 3), Span(0, 4)]
    for span in spans if flaw != "uses the first block's keys" else spans[1:]:  # the first block alone is as any other
        with pytest.raises(UserError, match=rf"made_up\) cannot be served in spans: .*{FLAWS[flaw]}"):
            SpanModel(checkpoint, span, dtype=dtype)
