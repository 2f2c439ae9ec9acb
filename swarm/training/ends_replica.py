"""A replica of a run's ends, as it begins: the module, and its parameters as one vector."""

from __future__ import annotations

from swarm.decoder import BlockSource
from swarm.ends import Ends
from swarm.run_spec import RunSpec
from swarm.training.initial import check_initial
from swarm.training.parameters import StageParameters


def load_ends(source: BlockSource, spec: RunSpec) -> tuple[Ends, StageParameters]:
    """The run's initial ends. Raises UserError if they are not those that the spec names."""
    check_initial(spec, spec.ends_stage, source.load_ends())
    ends = Ends(source)
    return ends, StageParameters(ends.module.named_parameters(), spec.optimizer, is_delayed=spec.delay > 0)
