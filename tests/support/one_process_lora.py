"""The oracle of adapter runs: PEFT's LoRA on the whole model in one process."""

from __future__ import annotations

from typing import Any

import torch.distributed.tensor  # noqa: F401  PEFT takes it for granted, and what our programs import leaves it out
from peft import LoraConfig, get_peft_model
from torch import Tensor

from swarm.linears.quantize import quantize_int4, quantize_int8
from swarm.run_spec import FrozenPrecision, RunSpec
from swarm.training.adapters import AdapterLayout

PREFIX = "base_model.model."


def peft_model(spec: RunSpec, model: Any) -> Any:
    """The model with PEFT's adapters, which begin as the run's do. Only they require gradients.

    Over blocks of 8 or 4 bits: plain linears in float32, with the weights that the codes stand for.
    """
    assert spec.lora is not None
    if spec.lora.frozen_precision is not None:
        for name, parameter in model.named_parameters():
            if ".layers." in name:
                parameter.data = frozen_weight(parameter.data, spec.lora.frozen_precision, model.config.hidden_size)
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


def frozen_weight(weight: Tensor, precision: FrozenPrecision, hidden_size: int) -> Tensor:
    """A weight of a block (of a family of few linears, without routers) as nodes have it, in float32."""
    if weight.ndim != 2:
        return weight.bfloat16().float()
    is_narrow = weight.shape[1] == hidden_size and 2 * weight.shape[0] <= hidden_size  # keys and values of shared heads
    quantize = quantize_int8 if precision is FrozenPrecision.INT8 or is_narrow else quantize_int4
    return quantize(weight).dense()


def plain_name(name: str) -> str:
    """A parameter's name in the run."""
    return name.removeprefix(PREFIX).replace(".default.", ".")
