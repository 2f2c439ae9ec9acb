"""Adapters on disk: PEFT loads them over the base, to the bit, and computes what stages compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from swarm.errors import BadRequest, UserError
from swarm.run_store import RunStore
from swarm.training.adapters import AdapterLayout
from swarm.training.peft_checkpoint import base_of, write_peft_checkpoint
from tests.support.models import save_tiny
from tests.support.one_process_lora import plain_name
from tests.support.runs import make_spec
from tests.support.training_swarm import make_run

LINEAGE = b"l" * 32


def run_of(folder: Path, family: str) -> tuple[RunStore, Path]:
    base = save_tiny(family, folder / "base")
    rules: dict[str, Any] = {"trainable": "lora", "lora.rank": 2, "lora.alpha": 3, "model.weights": str(base)}
    return make_run(folder / "run", **rules), base


def random_values(store: RunStore) -> list[Tensor]:
    layout = AdapterLayout(store.spec)
    generator = torch.Generator().manual_seed(0)
    return [0.3 * torch.randn(layout.size(stage), generator=generator) for stage in range(store.spec.num_stages)]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_peft_loads_what_was_written_and_says_what_it_is(
    tmp_path: Path, family: str, recwarn: pytest.WarningsRecorder
) -> None:
    store, base = run_of(tmp_path, family)
    values = random_values(store)
    out = tmp_path / "out"
    write_peft_checkpoint(store, values, out, epoch=7, lineage=LINEAGE, loss=1.25)
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer.json"} <= {
        path.name for path in out.iterdir()
    }
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out)
    layout = AdapterLayout(store.spec)
    expected = {name: view for stage, vector in enumerate(values) for name, view in layout.views(stage, vector).items()}
    loaded = {plain_name(name): tensor for name, tensor in model.named_parameters() if ".lora_" in name}
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    assert not [warning for warning in recwarn if "fan_in_fan_out" in str(warning.message)]
    assert AutoTokenizer.from_pretrained(out)("Alice")["input_ids"] == store.tokenizer()("Alice")["input_ids"]
    ids = torch.arange(8)[None]
    with torch.no_grad():
        merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out).merge_and_unload()
        torch.testing.assert_close(model(input_ids=ids).logits, merged(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
        plain = AutoModelForCausalLM.from_pretrained(base)(input_ids=ids).logits
    assert not torch.allclose(model(input_ids=ids).logits, plain, atol=1e-2)

    card = (out / "README.md").read_text()
    assert "library_name: peft" in card and f"base, folder = {str(base)!r}" in card
    assert "LoRA of rank 2, alpha 3" in card and store.run_id.hex() in card and "1.2500 per token" in card
    assert "base_model:" not in card, "a folder of the owner's is nothing that the hub can look up"
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base) and config["r"] == 2 and config["lora_alpha"] == 3


def test_bad_values_and_filled_folders_are_refused_and_nothing_is_left(tmp_path: Path) -> None:
    store, _ = run_of(tmp_path, "llama")
    values = random_values(store)
    out = tmp_path / "out"
    with pytest.raises(BadRequest, match="float32 vectors of"):
        write_peft_checkpoint(store, values[:2], out, epoch=7, lineage=LINEAGE)
    values[1][3] = 1e6
    with pytest.raises(UserError, match=r"not finite as torch\.float16: choose float32"):
        write_peft_checkpoint(store, values, out, epoch=7, lineage=LINEAGE, dtype=torch.float16)
    assert not out.exists()
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(UserError, match="not an empty folder: choose another"):
        write_peft_checkpoint(store, values, out, epoch=7, lineage=LINEAGE)


def test_an_alias_is_named_as_the_hub_does() -> None:
    assert base_of(make_spec(weights="smollm2-135m")) == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert base_of(make_spec(weights="some/model")) == "some/model"
    assert base_of(make_spec()) is None
