"""RunModel: the weights of a run at one place in its history, for generation: what Checkpoint is to a folder.

Nodes make it of their stage's vector, clients of that of the ends; nobody has all. Its identity follows from run and lineage, so
sessions stay with the weights that they began with.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from swarm.checkpoint import digest_tensors
from swarm.epoch.messages import Place
from swarm.model_spec import DIGEST_BYTES, ModelSpec, config_digest
from swarm.run_spec import RunSpec
from swarm.run_store import RunStore
from swarm.span import Span
from swarm.training.ends_replica import load_initial_ends
from swarm.training.layout import Layout

_NAME = re.compile(r"run:([0-9a-fA-F]{64})(?:@([0-9]{1,15}))?")


def parse_run_model(name: str) -> tuple[bytes, int | None] | None:
    """Run id and epoch (None: the newest) of a model that is called run:RUN_ID or run:RUN_ID@EPOCH; None for other names."""
    match = _NAME.fullmatch(name)
    return None if match is None else (bytes.fromhex(match[1]), int(match[2]) if match[2] else None)


def run_model_digest(run_id: bytes, spec: RunSpec, place: Place) -> bytes:
    """ModelSpec.digest of the run's weights at a place."""
    return _model_spec(run_id, spec, place, 1).digest


def _model_spec(run_id: bytes, spec: RunSpec, place: Place, hidden_size: int) -> ModelSpec:
    digest = hashlib.sha256(b"shardswarm run model 1" + run_id + place.lineage).digest()
    return ModelSpec(
        name=f"run:{run_id.hex()}@{place.epoch}",
        source=f"run:{run_id.hex()}",
        num_blocks=spec.num_blocks,
        hidden_size=hidden_size,
        config_digest=config_digest(spec.config),
        ends_digest=digest[:DIGEST_BYTES],
    )


class RunModel:
    """As much of the weights as is here. Offers what nodes and clients ask of a Checkpoint."""

    def __init__(self, store: RunStore, place: Place, values: Mapping[int, Tensor], layout: Layout) -> None:
        """values: the vectors, float32 [size], of those stages (the number of stages: the ends) that are here."""
        self.place = place
        self.store, self._values, self._layout = store, values, layout
        self.config = layout.config
        self.spec = _model_spec(store.run_id, store.spec, place, int(self.config.hidden_size))
        self.name, self.source = self.spec.name, self.spec.source
        self.num_blocks = store.spec.num_blocks

    def load_blocks(self, span: Span) -> dict[str, Tensor]:
        """Tensors of the blocks of a stage, by their names in the whole model; of an adapter run those of the adapters."""
        stage = self.store.spec.stages.index(span)
        return self._layout.views(stage, self._values[stage])

    def load_ends(self) -> dict[str, Tensor]:
        if self.store.spec.lora is not None:
            return load_initial_ends(self.store.spec)
        return self._layout.views(self.store.spec.ends_stage, self._values[self.store.spec.ends_stage])

    def digest_blocks(self, span: Span, tensors: Mapping[str, Tensor]) -> list[bytes]:
        """Digest of each block."""
        return [
            digest_tensors({key: tensor for key, tensor in tensors.items() if self._layout.block_of(key) == block})
            for block in span
        ]

    def tokenizer(self) -> Any:
        """The run's transformers tokenizer. Raises UserError."""
        return self.store.tokenizer()

    def generation_config(self) -> None:
        return
