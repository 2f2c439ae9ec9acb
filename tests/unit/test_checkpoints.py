"""What a member finds again of what it saved, what it tells the others that it has, and when it writes in its journal."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from swarm.epoch.messages import Commit, Term
from swarm.identity import Identity
from swarm.run_spec import OptimizerSettings, certified_run_id, sign_spec
from swarm.run_store import RunStore
from swarm.training.checkpoints import Checkpoints, Saving
from swarm.training.parameters import StageParameters, gradient_digest
from swarm.training.saved_states import SavedAt
from swarm.training.wire import sign_commit
from tests.support.runs import make_spec

LEADER = Identity.generate()
RULES = sign_spec(make_spec(checkpoint_every=5, num_epochs=100), LEADER)
RUN = certified_run_id(RULES)
TERM = Term(1, LEADER.peer_id)


@pytest.fixture
def parameters() -> StageParameters:
    torch.manual_seed(0)
    return StageParameters(torch.nn.Linear(20, 20).named_parameters(), OptimizerSettings())


def checkpoints_in(folder: Path, parameters: StageParameters) -> Checkpoints:
    return Checkpoints(RunStore(folder, RUN, RULES), 0, parameters.size)


def commit_to(epoch: int) -> Commit:
    commit = Commit(epoch - 1, b"p" * 32, TERM, 0, 100, 1.5, False, (b"d" * 32,), ((LEADER.peer_id, 0),), 2.5)
    return sign_commit(commit, RUN, LEADER)


def save(checkpoints: Checkpoints, parameters: StageParameters, *epochs: int) -> list[SavedAt]:
    commits = map(commit_to, epochs)
    return [checkpoints.states.save(commit.after, commit, parameters.snapshot()) for commit in commits]


def zero_end(path: Path) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2] + bytes(len(raw) - len(raw) // 2))


async def test_a_damaged_state_is_named_once_and_nobody_is_told_that_it_is_here(
    tmp_path: Path, parameters: StageParameters, caplog: pytest.LogCaptureFixture
) -> None:
    parameters.step(torch.ones(parameters.size), 1e-3)
    _, second, third = save(checkpoints_in(tmp_path, parameters), parameters, 1, 2, 3)
    zero_end(third.path)
    checkpoints = checkpoints_in(tmp_path, parameters)
    resumed = checkpoints.resume(parameters)
    assert resumed is not None and resumed.place.epoch == 2
    assert [place.epoch for place in checkpoints.places] == [2, 1]
    (line,) = (record.message for record in caplog.records if record.levelno == logging.WARNING)
    assert str(third.path) in line and "digest" in line

    zero_end(second.path)  # while the member lives
    assert await checkpoints.load(second.place, parameters) is None
    assert [place.epoch for place in checkpoints.places] == [1]
    commit = commit_to(2)
    await checkpoints.save(commit.after, commit, parameters.snapshot())
    assert [place.epoch for place in checkpoints.places] == [2, 1]
    assert await checkpoints.load(second.place, parameters) is not None


async def test_a_state_to_which_the_run_went_back_is_that_of_the_checkpoint_and_a_step_from_there_is_taken_again(
    tmp_path: Path, parameters: StageParameters
) -> None:
    commit = commit_to(7)
    goal = commit.after.rolled_back(2)
    checkpoints = checkpoints_in(tmp_path, parameters)
    await checkpoints.save(goal, commit, parameters.snapshot())
    assert checkpoints.places == (commit.after,) and checkpoints.has_saved(goal), "from where one can go back again"
    loaded = await checkpoints.load(commit.after.rolled_back(3), parameters)
    assert loaded is not None and loaded[1] == commit

    async def state_here() -> Saving:
        raise AssertionError("it is here")

    assert await checkpoints.snapshot(goal, state_here) == commit.after
    vector = torch.full((parameters.size,), 0.25)
    await checkpoints.keep_sum(goal, TERM, 1, vector, state_here)
    resumed = checkpoints_in(tmp_path, parameters).resume(parameters)
    assert resumed is not None and resumed.place == goal and resumed.held is not None and resumed.held.attempt == 1
    step = sign_commit(
        replace(commit_to(8), parent=goal.lineage, era=goal.era, attempt=1, digests=(gradient_digest(vector),)),
        RUN,
        LEADER,
    )
    await checkpoints.keep_commit(step)
    assert step.before == goal
    resumed = checkpoints_in(tmp_path, parameters).resume(parameters)
    assert resumed is not None and resumed.place == step.after and resumed.commit == step


async def test_a_sum_is_kept_only_on_top_of_a_state_that_is_on_the_disk(
    tmp_path: Path, parameters: StageParameters, caplog: pytest.LogCaptureFixture
) -> None:
    commit = commit_to(7)

    async def state_here() -> Saving:
        return commit.after, commit, parameters.snapshot()

    async def keep_sum() -> None:
        await checkpoints.keep_sum(commit.after, TERM, 0, torch.ones(parameters.size), state_here)

    def kept() -> list[str]:
        return sorted(path.suffix for path in tmp_path.glob("*/*"))

    checkpoints = checkpoints_in(tmp_path, parameters)
    (tmp_path / "states").write_text("no folder")
    await keep_sum()
    assert kept() == []
    (line,) = (record.message for record in caplog.records if record.levelno == logging.ERROR)
    assert line.startswith("state not saved epoch=7 reason=")
    (tmp_path / "states").unlink()
    await keep_sum()
    assert kept() == [".state", ".sum"]
