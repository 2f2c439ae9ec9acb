"""The oracle of adapter runs: PEFT's LoRA on the whole model in one process."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, get_peft_model

from swarm.run_spec import RunSpec
from swarm.training.adapters import AdapterLayout

PREFIX = "base_model.model."


def peft_model(spec: RunSpec, model: Any) -> Any:
    """The model with PEFT's adapters, which begin as the run's do. Only they require gradients."""
    assert spec.lora is not None
    config = LoraConfig(
        r=spec.lora.rank,
        lora_alpha=spec.lora.alpha,  # type: ignore[arg-type]
        target_modules=list(spec.lora.target_modules),
        task_type="CAUSAL_LM",
    )
    wrapped = get_peft_model(model, config)
    layout = AdapterLayout(spec)
    initial = {name: tensor for stage, _ in enumerate(spec.stages) for name, tensor in layout.initial(stage).items()}
    trained = {plain_name(name): parameter for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    assert trained.keys() == initial.keys()
    for name, parameter in trained.items():
        assert parameter.shape == initial[name].shape
        parameter.data.copy_(initial[name])
    return wrapped


def plain_name(name: str) -> str:
    """A parameter's name in the run."""
    return name.removeprefix(PREFIX).replace(".default.", ".")
