"""What the only replica of a stage writes down: read again, or not believed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from swarm.epoch.messages import Commit, Place, Term
from swarm.identity import Identity
from swarm.training.journal import Journal
from swarm.training.parameters import gradient_digest
from swarm.training.wire import sign_commit

RUN = b"r" * 32
SIZE = 1000
LEADER = Identity.generate()
TERM = Term(2, f"{LEADER.peer_id}/1")


def vector(seed: int) -> torch.Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(seed))


def commit_at(place: Place, total: torch.Tensor, **changes: object) -> Commit:
    commit = Commit(
        epoch=place.epoch, parent=place.lineage, term=TERM, attempt=0, num_loss_tokens=10, norm=1.0, is_skipped=False,
        digests=(gradient_digest(total), b"d" * 32), members=(), loss_sum=3.0, era=place.era,
    )  # fmt: skip
    return sign_commit(dataclasses.replace(commit, **changes), RUN, LEADER)


def write(folder: Path, num_steps: int, *, with_last: bool = True) -> list[Place]:
    """Sums of epochs 0, 1, ... and their outcomes, and one more sum. All places."""
    journal, places = Journal(folder, RUN, 0, SIZE), [Place(0, RUN)]
    for number in range(num_steps):
        journal.write_sum(places[-1], TERM, number, vector(number))
        commit = commit_at(places[-1], vector(number))
        assert journal.write_commit(commit)
        places.append(commit.after)
    if with_last:
        journal.write_sum(places[-1], TERM, 7, vector(num_steps))
    return places


def test_steps_and_the_sum_without_an_outcome_are_there_after_a_restart(tmp_path: Path) -> None:
    places = write(tmp_path, 3)
    journal = Journal(tmp_path, RUN, 0, SIZE)
    steps = list(journal.steps_after(places[0]))
    assert [commit.before for commit, _ in steps] == places[:3]
    assert all(kept is not None and torch.equal(kept.vector, vector(n)) for n, (_, kept) in enumerate(steps))
    held = journal.read_sum(places[3])
    assert held is not None and (held.term, held.attempt) == (TERM, 7) and held.digest == gradient_digest(vector(3))
    assert [c.before for c, _ in Journal(tmp_path, RUN, 0, SIZE).steps_after(places[2])] == places[2:3]
    assert not list(Journal(tmp_path, RUN, 1, SIZE).steps_after(places[0])), "another stage's"


def test_what_a_saved_state_holds_is_dropped_and_an_outcome_without_a_sum_is_not_written(tmp_path: Path) -> None:
    places = write(tmp_path, 3)
    journal = Journal(tmp_path, RUN, 0, SIZE)
    assert list(journal.steps_after(places[0])) and len(journal) == 3
    journal.drop_before(2)
    assert len(journal) == 1 and journal.read_sum(places[1]) is None and journal.read_sum(places[2]) is not None
    assert not journal.write_commit(commit_at(Place(9, b"x" * 32), vector(0)))
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(
    "damage", ["cut", "flipped", "empty", "another size", "another run's commit", "unsigned", "wrong sum"]
)
def test_what_is_damaged_ends_the_journal_there(tmp_path: Path, damage: str) -> None:
    places = write(tmp_path, 3, with_last=False)
    stem = f"stage0-epoch1-{places[1].lineage.hex()}"
    path = tmp_path / f"{stem}.sum"
    raw = path.read_bytes()
    size = SIZE
    if damage == "cut":
        path.write_bytes(raw[:-1])
    elif damage == "flipped":
        path.write_bytes(raw[:-5] + bytes([raw[-5] ^ 1]) + raw[-4:])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "another size":
        size = SIZE - 1
    elif damage == "wrong sum":
        Journal(tmp_path, RUN, 0, SIZE).write_sum(places[1], TERM, 0, vector(77))
    else:
        commit = commit_at(places[1], vector(1))
        signed = commit if damage == "unsigned" else sign_commit(commit, b"x" * 32, LEADER)
        signed = dataclasses.replace(signed, signature=b"") if damage == "unsigned" else signed
        journal = Journal(tmp_path, RUN, 0, SIZE)
        journal.write_sum(places[1], TERM, 0, vector(1))
        journal.write_commit(signed)
    steps = list(Journal(tmp_path, RUN, 0, size).steps_after(places[0]))
    assert len(steps) == (0 if damage == "another size" else 1)
