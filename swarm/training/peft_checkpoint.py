"""A run's adapters as PEFT writes them: adapter_config.json and adapter_model.safetensors, for PeftModel.from_pretrained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from swarm.errors import UserError
from swarm.hub import is_hub_id
from swarm.run_file import RANDOM_WEIGHTS
from swarm.run_orders import NO_ORDERS, Orders
from swarm.run_spec import RunSpec
from swarm.run_store import RunStore
from swarm.sources import ALIASES
from swarm.training.adapters import AdapterLayout
from swarm.training.hf_checkpoint import CARD_FILE, copy_tokenizer, made_at_once, make_card, require_space

_PREFIX = "base_model.model."
_USE = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base, folder = {base!r}, "."  # the model that was adapted; where this file is
tokenizer = AutoTokenizer.from_pretrained(folder)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
prompt = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=50)[0]))
"""


def write_peft_checkpoint(
    store: RunStore,
    values: Sequence[Tensor],
    out: Path,
    *,
    epoch: int,
    lineage: bytes,
    dtype: torch.dtype = torch.float32,
    orders: Orders = NO_ORDERS,
    loss: float | None = None,
    eval_loss: float | None = None,
) -> None:
    """As write_hf_checkpoint, of a run of adapters: a folder for PeftModel.from_pretrained; all of it, or nothing."""
    layout = AdapterLayout(store.spec)
    layout.check(values)
    with made_at_once(out) as folder:
        require_space(folder, sum(vector.numel() for vector in values) * dtype.itemsize)
        config = folder / "adapter_config.json"
        config.write_text(json.dumps(_config(layout), indent=2) + "\n", encoding="utf-8")
        weights = folder / "adapter_model.safetensors"
        save_file(_tensors(layout, values, dtype), weights, metadata={"format": "pt"})
        shutil.copymode(config, weights)  # which that library writes for its owner alone
        copy_tokenizer(store, folder)
        card = make_card(
            store, epoch, lineage, dtype, orders, loss, eval_loss,
            library="peft", use=_USE.format(base=base_of(store.spec) or "..."), base=_hub_id(store.spec),
        )  # fmt: skip
        (folder / CARD_FILE).write_text(card, encoding="utf-8")


def base_of(spec: RunSpec) -> str | None:
    """What transformers loads the adapted model from; None for random weights, which are nowhere."""
    if spec.weights == RANDOM_WEIGHTS:
        return None
    return ALIASES[spec.weights].hub_id if spec.weights in ALIASES else spec.weights


def _hub_id(spec: RunSpec) -> str | None:
    base = base_of(spec)
    return base if base is not None and is_hub_id(base) else None


def _config(layout: AdapterLayout) -> dict[str, Any]:
    lora = layout.lora
    return {
        "base_model_name_or_path": base_of(layout.spec),
        "bias": "none",
        "fan_in_fan_out": layout.fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": lora.rank,
        "target_modules": list(lora.target_modules),
        "task_type": "CAUSAL_LM",
    }


def _tensors(layout: AdapterLayout, values: Sequence[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    tensors = {}
    for stage, vector in enumerate(values):
        for name, view in layout.views(stage, vector).items():
            tensors[_PREFIX + name] = view.to(dtype, copy=True)
            if not bool(torch.isfinite(tensors[_PREFIX + name]).all()):
                raise UserError(
                    f"{name} holds values that are not finite as {dtype}: choose float32 or bfloat16, or another epoch"
                )
    return tensors
