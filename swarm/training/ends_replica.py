"""A replica of a run's ends, as it begins: the module, and its parameters as one vector."""

from __future__ import annotations

from torch import Tensor

from swarm.decoder import BlockSource
from swarm.ends import Ends
from swarm.run_spec import RunSpec
from swarm.training.initial import check_initial, open_initial_weights
from swarm.training.parameters import StageParameters


def load_ends(source: BlockSource, spec: RunSpec) -> tuple[Ends, StageParameters]:
    """The run's initial ends, and of what is trained the parameters: none, if only adapters are. Raises UserError if they are not
    those that the spec names."""
    check_initial(spec, spec.ends_stage, source.load_ends())
    ends = Ends(source)
    ends.module.requires_grad_(spec.lora is None)
    named = ends.module.named_parameters() if spec.lora is None else ()
    return ends, StageParameters(named, spec.optimizer, is_delayed=spec.delay > 0)


def load_initial_ends(spec: RunSpec) -> dict[str, Tensor]:
    """Their tensors, which adapter runs leave as they are. Raises as load_ends."""
    tensors = open_initial_weights(spec).load_ends()
    check_initial(spec, spec.ends_stage, tensors)
    return tensors


def load_ends_parameters(spec: RunSpec) -> StageParameters:
    """Of a replica that computes nothing. Raises as load_ends."""
    if spec.lora is not None:
        return StageParameters((), spec.optimizer, is_delayed=spec.delay > 0)
    return load_ends(open_initial_weights(spec), spec)[1]
