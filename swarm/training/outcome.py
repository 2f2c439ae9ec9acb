"""What an epoch's outcome does to the weights."""

from __future__ import annotations

from torch import Tensor

from swarm.epoch.messages import Commit
from swarm.run_spec import RunSpec
from swarm.training.parameters import StageParameters


def apply_commit(parameters: StageParameters, spec: RunSpec, commit: Commit, total: Tensor | None) -> None:
    """Step with the sum of gradients that the commit names, float32 [size], which is changed; None if the step is skipped."""
    if commit.is_skipped:
        return
    assert total is not None
    settings = spec.optimizer
    factor = settings.clip_factor(commit.norm) / max(commit.num_loss_tokens, 1)
    parameters.step(total.mul_(factor), settings.lr_at(commit.epoch, spec.num_epochs))
