"""What an epoch's outcome does to the weights."""

from __future__ import annotations

from torch import Tensor

from swarm.epoch.messages import Commit
from swarm.run_store import RunStore
from swarm.training.parameters import StageParameters


def apply_commit(parameters: StageParameters, store: RunStore, commit: Commit, total: Tensor | None) -> None:
    """Step with the sum of gradients that the commit names, float32 [size], which is changed; None if the step is skipped."""
    if commit.is_skipped:
        return
    assert total is not None
    # The orders that it brings say of its own epoch what those before them say (Orders.may_follow).
    spec = store.open_orders(commit.orders).spec_at(store.spec, commit.epoch)
    settings = spec.optimizer
    factor = settings.clip_factor(commit.norm) / max(commit.num_loss_tokens, 1)
    parameters.step(total.mul_(factor), settings.lr_at(commit.epoch, spec.num_epochs))
