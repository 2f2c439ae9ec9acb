"""FrozenBlocks: the blocks that adapter runs compute with, in memory once for all runs of this process that have the same."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from node.backend.adapter import attach
from node.backend.span_model import SpanModel
from node.shard import Shard, checked_shard
from node.training.stage_model import hold_casts, load_stage_model
from swarm.decoder import BlockSource
from swarm.model_spec import config_digest
from swarm.run_spec import Precision, RunSpec
from swarm.training.adapters import AdapterLayout
from swarm.training.initial import open_initial_weights
from swarm.training.run_model import RunModel

log = logging.getLogger(__name__)


class FrozenBlocks:
    """Used by the device thread alone. What is computed in another dtype is a copy of its own."""

    def __init__(self) -> None:
        self._models: dict[tuple[object, ...], SpanModel] = {}

    def for_training(self, spec: RunSpec, stage: int, device: str, source: BlockSource) -> SpanModel:
        """A model of the stage's blocks over weights that others may have, too: for adapters of its own.

        source: where to load from what is not here yet. Raises UserError if that is not what the spec names.
        """
        is_autocast = spec.precision is Precision.BF16
        frozen = None if spec.lora is None else spec.lora.frozen_precision
        return self._shared(spec, stage, device, None if frozen is None else frozen.value, True, is_autocast, source)

    def for_sessions(self, spec: RunSpec, stage: int, device: str, numeric_class: str) -> SpanModel:
        """The same, computing in one class throughout. In fp32 with the very weights that training in fp32 has; in int8 and int4 with
        the very linears of training over such blocks."""
        is_plain = numeric_class == "fp32"
        return self._shared(spec, stage, device, None if is_plain else numeric_class, is_plain, False, None)

    def adapted_shard(self, model: RunModel, layout: AdapterLayout, stage: int, precision: str, device: str) -> Shard:
        """The blocks of a stage with the adapters of a place, which nobody changes any more."""
        blocks = self.for_sessions(layout.spec, stage, device, precision)
        tensors = model.load_blocks(blocks.span)
        attach(blocks, layout, stage, tensors)
        return checked_shard(model, blocks, tuple(model.digest_blocks(blocks.span, tensors)))

    def stages_here(self, spec: RunSpec) -> set[int]:
        """The stages of an adapter run whose blocks are here already."""
        if spec.lora is None:
            return set()
        loaded = {(key[0], key[2]) for key in self._models}
        return {stage for stage, span in enumerate(spec.stages) if (spec.initial_digests[stage], span) in loaded}

    def _shared(
        self,
        spec: RunSpec,
        stage: int,
        device: str,
        numeric_class: str | None,
        is_float32: bool,
        is_autocast: bool,
        source: BlockSource | None,
    ) -> SpanModel:
        """numeric_class: of the linears; None for plain modules. is_float32: hidden states are, and what is no frozen linear."""
        digest, span = spec.initial_digests[stage], spec.stages[stage]
        # The digest names the weights, the config what is computed with them.
        weights = (digest, config_digest(spec.config), span, spec.dropout, device, numeric_class)
        key = (*weights, is_float32, is_autocast)
        model = self._models.get(key)
        if model is not None:
            log.info("frozen blocks shared span=%s digest=%s", span, digest.hex()[:8])
            return model.twin()
        if numeric_class is not None and is_float32:
            model = self._shared(spec, stage, device, numeric_class, False, False, source).float32_twin()
        else:
            source = source or open_initial_weights(spec)
            model = load_stage_model(source, spec, stage, device=device, numeric_class=numeric_class)
        if is_autocast:
            _hold_casts(model)
        self._models[key] = model
        return model.twin()


def _hold_casts(model: SpanModel) -> None:
    """As hold_casts, of weights that do not change."""
    parameters = [parameter for _, parameter in model.named_parameters()]
    masters = [parameter.data for parameter in parameters]

    def hold(indices: Sequence[int], dtype: torch.dtype) -> None:
        for index in indices:
            parameters[index].data = masters[index].to(dtype)

    model.autocast_dtype = torch.bfloat16
    for parameter in parameters:
        parameter.requires_grad_(True)
    hold_casts(model, parameters, hold)
    for parameter in parameters:
        parameter.requires_grad_(False)
    model.note_weights()
