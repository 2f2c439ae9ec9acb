"""Saved states come back to the bit, a crash or a full disk costs none that was there, and nothing in a file is believed unchecked."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import multiprocessing
import os
import resource
import signal
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.context import ForkProcess
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from protos import training_pb2
from swarm.epoch.messages import Commit, Place, Term
from swarm.errors import UserError
from swarm.identity import Identity
from swarm.run_spec import OptimizerSettings
from swarm.training.parameters import StageParameters, StageState
from swarm.training.saved_states import MAX_HEADER_BYTES, PIECE_BYTES, SavedAt, SavedStates
from swarm.training.wire import commit_to_wire, sign_commit

LEADER, OTHER = Identity.generate(), Identity.generate()
RUN, OTHER_RUN = b"r" * 32, b"o" * 32
STAGE = 3
START = Place(0, RUN)
FORK = multiprocessing.get_context("fork")
DEADLINE_S = 60.0

# The format, written down a second time: a file of today must be readable tomorrow.
FIXED = struct.Struct("<24s32sIII32s")


def commit_to(epoch: int, loss_sum: float = 2.5, run_id: bytes = RUN, leader: Identity = LEADER) -> Commit:
    """Signed, and leading to an epoch; to another place for another loss."""
    members = ((LEADER.peer_id, STAGE),)
    term = Term(1, leader.peer_id)
    commit = Commit(epoch - 1, b"p" * 32, term, 0, 100, 1.5, False, (b"d" * 32,), members, loss_sum)
    return sign_commit(commit, run_id, leader)


def parameters_of(width: int = 512, *, is_delayed: bool = False) -> StageParameters:
    """Three or four vectors of a little more than a piece, so that most pieces hold the end of one and the begin of another."""
    torch.manual_seed(0)
    return StageParameters(nn.Linear(width, width).named_parameters(), OptimizerSettings(), is_delayed=is_delayed)


def state_after(num_steps: int, parameters: StageParameters) -> StageState:
    generator = torch.Generator().manual_seed(num_steps)
    state = parameters.empty_state(num_steps)
    for tensor in state.tensors:
        tensor.normal_(generator=generator)
    state.second_moments.abs_()
    return state


@pytest.fixture(scope="module")
def parameters() -> StageParameters:
    return parameters_of()


@pytest.fixture
def states(tmp_path: Path) -> SavedStates:
    return SavedStates(tmp_path / "states", RUN, STAGE)


def save_at(states: SavedStates, epoch: int, parameters: StageParameters, loss_sum: float = 2.5) -> SavedAt:
    return saving(states, epoch, parameters, loss_sum)()


def saving(
    states: SavedStates, epoch: int, parameters: StageParameters, loss_sum: float = 2.5
) -> Callable[[], SavedAt]:
    """What a fork can call: torch's threads are not in it, so the state is made before."""
    commit, state = commit_to(epoch, loss_sum), state_after(epoch, parameters)
    return lambda: states.save(commit.after, commit, state)


def epochs_found(states: SavedStates) -> list[int]:
    return [saved.place.epoch for saved in states.found()]


def partial_files(folder: Path) -> list[Path]:
    return sorted(folder.glob(".*"))


def flip(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


def header_bytes_of(raw: bytes) -> int:
    """Of StateHeader."""
    return int(FIXED.unpack_from(raw)[4])


def start_of_table(raw: bytes) -> int:
    return FIXED.size + header_bytes_of(raw) + 32


def with_header(
    raw: bytes,
    header: training_pb2.StateHeader | bytes,
    *,
    run_id: bytes = RUN,
    stage: int = STAGE,
    num_vectors: int = 3,
) -> bytes:
    """The file with another header, which has the digest that it should have."""
    encoded = header if isinstance(header, bytes) else header.SerializeToString()
    magic, *_, table_digest = FIXED.unpack_from(raw)
    content = FIXED.pack(magic, run_id, stage, num_vectors, len(encoded), table_digest) + encoded
    return content + hashlib.sha256(content).digest() + raw[start_of_table(raw) :]


def header_of(raw: bytes) -> training_pb2.StateHeader:
    return training_pb2.StateHeader.FromString(raw[FIXED.size : FIXED.size + header_bytes_of(raw)])


@pytest.mark.parametrize("is_delayed", [False, True])
def test_a_state_comes_back_to_the_bit(states: SavedStates, is_delayed: bool) -> None:
    parameters = parameters_of(is_delayed=is_delayed)
    state, commit = state_after(7, parameters), commit_to(9)
    state.values[:3] = torch.tensor([float("nan"), -0.0, float("inf")])  # bits are bits
    saved = states.save(commit.after, commit, state)
    assert states.found() == [saved]
    (found,) = states.found()
    assert found.place == commit.after and found.commit == commit and found.commit.signature == commit.signature
    assert (found.digest, found.num_steps, found.num_parameters) == (state.digest(), 7, parameters.size)
    assert found.num_bytes == found.path.stat().st_size
    back = states.load(found, parameters)
    assert back.digest() == state.digest() and back.num_steps == 7 and len(back.tensors) == 3 + is_delayed
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(back.tensors, parameters.state.tensors, strict=True))
    newest = states.newest_whole(parameters)
    assert newest is not None and newest[0] == found and newest[1].digest() == state.digest()
    assert partial_files(states.folder) == []


def test_the_start_of_a_run_needs_no_commit(states: SavedStates, parameters: StageParameters) -> None:
    saved = states.save(START, None, state_after(0, parameters))
    assert saved.commit is None and states.found() == [saved]
    with pytest.raises(ValueError, match="no signed commit"):
        states.save(Place(1, RUN), None, state_after(0, parameters))


def test_a_file_is_what_the_documentation_says(states: SavedStates, parameters: StageParameters) -> None:
    state, commit = state_after(5, parameters), commit_to(5)
    path = states.save(commit.after, commit, state).path
    raw = path.read_bytes()
    payload = b"".join(tensor.numpy().astype("<f4").tobytes() for tensor in state.tensors)
    pieces = [payload[start : start + PIECE_BYTES] for start in range(0, len(payload), PIECE_BYTES)]
    table = b"".join(hashlib.sha256(piece).digest() for piece in pieces)
    place = training_pb2.Place(epoch=5, lineage=commit.lineage)
    header = training_pb2.StateHeader(
        place=place,
        commit=commit_to_wire(commit),
        num_parameters=parameters.size,
        num_steps=5,
        digest=state.digest(),
    ).SerializeToString()
    fixed = FIXED.pack(b"shardswarm saved state 1", RUN, STAGE, 3, len(header), hashlib.sha256(table).digest())
    assert raw == fixed + header + hashlib.sha256(fixed + header).digest() + table + payload
    assert path.name == f"stage3-epoch5-{commit.lineage.hex()}.state"


def test_found_is_newest_first_and_of_equals_the_one_that_wins(
    states: SavedStates, parameters: StageParameters
) -> None:
    saved = [save_at(states, epoch, parameters) for epoch in (9, 10, 2)]
    rival = save_at(states, 10, parameters, loss_sum=3.0)
    first, second = states.found()[:2]
    assert {first, second} == {saved[1], rival} and second.place.is_behind(first.place)
    assert epochs_found(states) == [10, 10, 9, 2]


def test_what_is_saved_and_whole_is_not_written_again(states: SavedStates, parameters: StageParameters) -> None:
    saved = save_at(states, 4, parameters)
    before = saved.path.stat()
    assert save_at(states, 4, parameters) == saved
    after = saved.path.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    other = states.save(saved.place, saved.commit, state_after(5, parameters))  # a replica of another kind of CPU
    assert other != saved and states.found() == [other]
    with pytest.raises(UserError, match="another state has taken its place"):
        states.load(saved, parameters)


@pytest.mark.parametrize("where", ["payload", "table", "end"])
def test_what_is_damaged_is_written_again(states: SavedStates, parameters: StageParameters, where: str) -> None:
    saved = save_at(states, 4, parameters)
    raw = saved.path.read_bytes()
    if where == "end":
        os.truncate(saved.path, len(raw) - 1)
    else:
        flip(saved.path, start_of_table(raw) + (0 if where == "table" else 2_000_000))
    assert save_at(states, 4, parameters) == saved
    assert saved.path.read_bytes() == raw


def test_neither_saving_nor_loading_copies_the_state(states: SavedStates, parameters: StageParameters) -> None:
    state, commit = state_after(1, parameters), commit_to(1)
    tracemalloc.start()
    try:
        saved = states.save(commit.after, commit, state)
        states.load(saved, parameters)  # into torch's memory, which is not traced
        assert tracemalloc.get_traced_memory()[1] < 300_000 < saved.payload_bytes / 10
    finally:
        tracemalloc.stop()


def test_big_endian_machines_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "byteorder", "big")
    with pytest.raises(UserError, match="big-endian"):
        SavedStates(tmp_path, RUN, STAGE)


def test_a_member_that_starts_again_goes_on_as_if_it_had_not_ended(states: SavedStates) -> None:
    gradients = [torch.randn(parameters_of(8).size, generator=torch.Generator().manual_seed(n)) for n in range(4)]
    one, again = parameters_of(8), parameters_of(8)
    for gradient in gradients[:2]:
        one.step(gradient, 1e-2)
    commit = commit_to(2)
    states.save(commit.after, commit, one.state)
    for gradient in gradients[2:]:
        one.step(gradient, 1e-2)
    newest = SavedStates(states.folder, RUN, STAGE).newest_whole(again)
    assert newest is not None
    again.install(newest[1])
    for gradient in gradients[2:]:
        again.step(gradient, 1e-2)
    assert again.state.digest() == one.state.digest()


def test_pieces_are_read_in_any_order_and_survive_pruning(states: SavedStates, parameters: StageParameters) -> None:
    saved = save_at(states, 4, parameters)
    payload = b"".join(tensor.numpy().tobytes() for tensor in state_after(4, parameters).tensors)
    assert saved.payload_bytes == len(payload) and saved.num_pieces == 4
    with states.open(saved) as opened:
        states.prune(keep=[])
        assert states.found() == []
        assert hashlib.sha256(opened.table).digest() == saved.table_digest
        pieces = {number: opened.read_piece(number) for number in (3, 0, 2, 1)}
        for number in (-1, 4):
            with pytest.raises(IndexError):
                opened.read_piece(number)
    assert b"".join(pieces[number] for number in range(4)) == payload
    assert all(hashlib.sha256(pieces[n]).digest() == opened.table[32 * n : 32 * n + 32] for n in pieces)
    with pytest.raises(UserError, match="No such file"):
        states.open(saved)


# --- Crashes


def run_in_child(function: Callable[[], None]) -> int:
    """The exit code of a fork that ran it; minus the number of the signal that killed it."""
    child = FORK.Process(target=function)
    child.start()
    return exit_code(child)


def exit_code(child: ForkProcess) -> int:
    child.join(DEADLINE_S)
    is_stuck = child.exitcode is None
    child.kill()
    child.join()
    assert child.exitcode is not None and not is_stuck, "the child hangs"
    return child.exitcode


def die_before_call(number: int) -> None:
    """Kill this process before the so-manieth call that changes the disk."""
    num_calls = 0

    def counted(call: Callable[..., object]) -> Callable[..., object]:
        def run(*arguments: object) -> object:
            nonlocal num_calls
            num_calls += 1
            if num_calls == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments)

        return run

    for name in ("write", "fsync", "replace"):
        setattr(os, name, counted(getattr(os, name)))


# Header, table, three vectors of two writes each, fsync, replace, fsync of the folder.
NUM_CALLS = 11


@pytest.mark.parametrize("call", range(1, NUM_CALLS + 2))
def test_a_kill_at_any_moment_leaves_the_former_states_whole(
    states: SavedStates, parameters: StageParameters, call: int
) -> None:
    save_at(states, 1, parameters)
    save_at(states, 2, parameters)

    save = saving(states, 3, parameters)

    def save_and_die() -> None:
        die_before_call(call)
        save()

    code = run_in_child(save_and_die)
    assert code == (-signal.SIGKILL if call <= NUM_CALLS else 0)
    is_replaced = call >= NUM_CALLS  # the folder is synced after that
    assert epochs_found(states) == ([3, 2, 1] if is_replaced else [2, 1])
    for saved in states.found():
        assert states.load(saved, parameters).digest() == state_after(saved.place.epoch, parameters).digest()
    assert len(partial_files(states.folder)) == (not is_replaced)
    states.prune(keep=[commit_to(epoch).after for epoch in (1, 2, 3)])
    assert partial_files(states.folder) == []
    assert epochs_found(states) == ([3, 2, 1] if is_replaced else [2, 1])


def test_the_next_save_removes_what_a_dead_one_left(states: SavedStates, parameters: StageParameters) -> None:
    save = saving(states, 3, parameters)

    def save_and_die() -> None:
        die_before_call(5)
        save()

    assert run_in_child(save_and_die) == -signal.SIGKILL
    assert len(partial_files(states.folder)) == 1
    save_at(states, 3, parameters)
    assert partial_files(states.folder) == [] and epochs_found(states) == [3]


def save_when_told(save: Callable[[], SavedAt], has_begun: Event, may_end: Event) -> None:
    write = os.write

    def wait_and_write(descriptor: int, content: Any) -> int:
        has_begun.set()
        assert may_end.wait(DEADLINE_S)
        return write(descriptor, content)

    os.write = wait_and_write
    save()


def test_what_a_living_process_is_writing_is_not_pruned(states: SavedStates, parameters: StageParameters) -> None:
    has_begun, may_end = FORK.Event(), FORK.Event()
    child = FORK.Process(target=save_when_told, args=(saving(states, 3, parameters), has_begun, may_end))
    child.start()
    assert has_begun.wait(DEADLINE_S)
    states.prune(keep=[])
    assert len(partial_files(states.folder)) == 1 and states.found() == []
    may_end.set()
    assert exit_code(child) == 0 and epochs_found(states) == [3] and partial_files(states.folder) == []


def test_a_file_that_is_pruned_before_it_is_locked_is_made_again(
    states: SavedStates, parameters: StageParameters, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, num_pruned = fcntl.flock, 0

    def prune_first(file: int, operation: int) -> None:
        nonlocal num_pruned
        monkeypatch.setattr(fcntl, "flock", lock)
        num_pruned += len(partial_files(states.folder))
        states.prune(keep=[])
        assert partial_files(states.folder) == []
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", prune_first)
    saved = save_at(states, 3, parameters)
    assert num_pruned == 1 and states.found() == [saved] and partial_files(states.folder) == []


# --- Disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB: room for two states of 3 MiB, not for three."""
    folder = tmp_path / "disk"
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", "size=8m", "tmpfs"]
    try:
        mounted = subprocess.run(["mount", *options, str(folder)], capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount here")
    if mounted.returncode:
        pytest.skip("mounting is not permitted")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_without_room_is_told_before_anything_is_written(
    small_disk: Path, parameters: StageParameters, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = SavedStates(small_disk / "states", RUN, STAGE)
    saved = [save_at(states, epoch, parameters) for epoch in (1, 2)]
    free_bytes = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    monkeypatch.setattr(os, "write", None)
    message = (
        rf"epoch 3 needs {saved[1].num_bytes:,} bytes in {states.folder} and {free_bytes:,} are free.*SHARDSWARM_CACHE"
    )
    with pytest.raises(UserError, match=message):
        save_at(states, 3, parameters)
    assert states.found() == saved[::-1] and partial_files(states.folder) == []


def test_a_disk_that_fills_up_meanwhile_costs_nothing_that_was_there(
    small_disk: Path, parameters: StageParameters, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = SavedStates(small_disk / "states", RUN, STAGE)
    saved = save_at(states, 1, parameters)
    write, num_written, ballast = os.write, 0, small_disk / "ballast"

    def write_and_fill(descriptor: int, content: memoryview) -> int:
        nonlocal num_written
        num_written += 1
        if num_written == 4:
            with pytest.raises(OSError, match="No space"):
                ballast.write_bytes(bytes(8 * 2**20))
        return write(descriptor, content)

    monkeypatch.setattr(os, "write", write_and_fill)
    with pytest.raises(UserError, match=r"epoch 2 needs .* bytes .*No space left on device.*free some space"):
        save_at(states, 2, parameters)
    assert num_written >= 4 and partial_files(states.folder) == [] and states.found() == [saved]
    assert states.load(saved, parameters).digest() == saved.digest
    ballast.unlink()
    save_at(states, 2, parameters)
    assert epochs_found(states) == [2, 1]


def test_a_limit_on_files_is_told_and_costs_nothing_that_was_there(
    states: SavedStates, parameters: StageParameters
) -> None:
    saved = save_at(states, 1, parameters)

    save = saving(states, 2, parameters)

    def save_within_a_limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))
        with pytest.raises(UserError, match=f"epoch 2 needs .* bytes .*{os.strerror(errno.EFBIG)}.*limits"):
            save()

    assert run_in_child(save_within_a_limit) == 0
    assert states.found() == [saved] and partial_files(states.folder) == []
    assert states.load(saved, parameters).digest() == saved.digest


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path, parameters: StageParameters) -> None:
    (tmp_path / "file").write_text("not a folder")
    states = SavedStates(tmp_path / "file" / "states", RUN, STAGE)
    for call in (lambda: save_at(states, 1, parameters), states.found, lambda: states.prune([])):
        with pytest.raises(UserError, match="Not a directory"):
            call()


def test_a_folder_that_is_not_there_holds_nothing(states: SavedStates, parameters: StageParameters) -> None:
    assert states.found() == [] and states.newest_whole(parameters) is None
    states.prune(keep=[])
    assert not states.folder.exists()


# --- Files that are not what they should be


def assert_only_older_is_found(
    states: SavedStates, caplog: pytest.LogCaptureFixture, bad: Path, reason: str, parameters: StageParameters
) -> None:
    """Epoch 1 is whole, and the bad file costs one line in the log."""
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert epochs_found(states) == [1]
        assert epochs_found(states) == [1]  # whoever looks again is not told again
    (line,) = caplog.messages
    assert str(bad) in line and reason in line
    newest = states.newest_whole(parameters)
    assert newest is not None and newest[0].place.epoch == 1
    assert newest[1].digest() == state_after(1, parameters).digest()


def test_a_file_cut_anywhere_is_skipped(
    states: SavedStates, parameters: StageParameters, caplog: pytest.LogCaptureFixture
) -> None:
    save_at(states, 1, parameters)
    saved = save_at(states, 2, parameters)
    raw = saved.path.read_bytes()
    table = start_of_table(raw)
    payload = table + 32 * saved.num_pieces
    edges = [0, 24, FIXED.size, table - 32, table, table + 32, payload, payload + PIECE_BYTES, len(raw)]
    lengths = sorted({edge + shift for edge in edges for shift in (-1, 0, 1)} & set(range(len(raw))))
    assert len(lengths) == 24
    for length in [*lengths, len(raw) + 1]:
        saved.path.write_bytes((raw + b"\0")[:length])
        reason = "it ends too early" if length < table else f"it has {length} bytes and should have {len(raw)}"
        assert_only_older_is_found(states, caplog, saved.path, reason, parameters)
        with pytest.raises(UserError, match="remove it"):
            states.load(saved, parameters)
        with pytest.raises(UserError, match="remove it"):
            states.open(saved)


def test_every_byte_of_the_header_counts(
    states: SavedStates, parameters: StageParameters, caplog: pytest.LogCaptureFixture
) -> None:
    saved = save_at(states, 2, parameters)
    caplog.set_level(logging.WARNING)
    end = start_of_table(saved.path.read_bytes())
    for offset in range(end):
        flip(saved.path, offset)
        caplog.clear()
        assert SavedStates(states.folder, RUN, STAGE).found() == [], offset
        assert len(caplog.messages) == 1
        flip(saved.path, offset)
    assert states.found() == [saved]


@pytest.mark.parametrize("offset", [0, PIECE_BYTES - 1, PIECE_BYTES, 3_000_000, -1])
def test_every_byte_of_the_vectors_counts(
    states: SavedStates, parameters: StageParameters, caplog: pytest.LogCaptureFixture, offset: int
) -> None:
    older, saved = save_at(states, 1, parameters), save_at(states, 2, parameters)
    offset %= saved.payload_bytes
    flip(saved.path, saved.num_bytes - saved.payload_bytes + offset)
    assert states.found() == [saved, older]  # the headers are right
    with pytest.raises(UserError, match=rf"{saved.path} cannot be used .*another replica's is used instead"):
        states.load(saved, parameters)
    assert states.found() == [older]
    newest = SavedStates(states.folder, RUN, STAGE).newest_whole(parameters)
    assert newest is not None and newest[0] == older and newest[1].digest() == older.digest
    assert [str(saved.path) in line and "digest" in line for line in caplog.messages] == [True]
    with states.open(saved) as opened:
        for number in range(saved.num_pieces):
            if number == offset // PIECE_BYTES:
                with pytest.raises(UserError, match=f"piece {number}"):
                    opened.read_piece(number)
            else:
                opened.read_piece(number)


def test_a_damaged_table_is_not_handed_out(states: SavedStates, parameters: StageParameters) -> None:
    saved = save_at(states, 2, parameters)
    flip(saved.path, saved.num_bytes - saved.payload_bytes - 1)
    with pytest.raises(UserError, match="table of pieces"):
        states.open(saved)
    assert states.load(saved, parameters).digest() == saved.digest  # the vectors are whole


def test_a_file_that_is_cut_while_it_is_read_is_damaged(states: SavedStates, parameters: StageParameters) -> None:
    saved = save_at(states, 2, parameters)
    with states.open(saved) as opened:
        os.truncate(saved.path, saved.num_bytes - 1)
        opened.read_piece(0)
        with pytest.raises(UserError, match="ends too early"):
            opened.read_piece(3)


def test_a_state_of_another_kind_of_stage_is_not_loaded(states: SavedStates, parameters: StageParameters) -> None:
    saved = save_at(states, 2, parameters)
    for other in (parameters_of(8), parameters_of(is_delayed=True)):
        with pytest.raises(UserError, match=f"{saved.path} has 3 vectors of {parameters.size} parameters"):
            states.load(saved, other)
        assert states.newest_whole(other) is None


HOSTILE: list[tuple[str, Callable[[bytes], bytes], str]] = [
    ("another run", lambda raw: with_header(raw, header_of(raw), run_id=OTHER_RUN), "of run 6f6f"),
    ("another stage", lambda raw: with_header(raw, header_of(raw), stage=4), "of stage 4"),
    ("another version", lambda raw: b"shardswarm saved state 2" + raw[24:], "another version"),
    ("unsigned", lambda raw: with_commit(raw, replace(commit_to(2), signature=b"")), "no signed commit"),
    ("signed by another", lambda raw: with_commit(raw, forged()), "no signed commit"),
    ("signed for another run", lambda raw: with_commit(raw, commit_to(2, run_id=OTHER_RUN)), "no signed commit"),
    ("leading elsewhere", lambda raw: with_commit(raw, commit_to(2, loss_sum=9.0)), "no signed commit"),
    ("without commit", lambda raw: with_commit(raw, None), "no signed commit"),
    ("senseless commit", lambda raw: with_commit(raw, replace(commit_to(2), parent=b"p" * 65)), "makes no sense"),
    ("too few bytes", lambda raw: with_sizes(raw, num_parameters=2**62), "and should have"),
    ("no parameters", lambda raw: with_sizes(raw, num_parameters=0), "and should have"),
    ("many vectors", lambda raw: with_header(raw, header_of(raw), num_vectors=2**32 - 1), "makes no sense"),
    ("no digest", lambda raw: with_sizes(raw, digest=b""), "makes no sense"),
    ("no protobuf", lambda raw: with_header(raw, b"\xff" * 50), "makes no sense"),
    ("nothing", lambda raw: b"", "ends too early"),
    ("something else", lambda raw: b"PK\3\4" + raw[4:], "no saved state"),
]


def with_commit(raw: bytes, commit: Commit | None) -> bytes:
    header = header_of(raw)
    header.ClearField("commit")
    if commit is not None:
        header.commit.CopyFrom(commit_to_wire(commit))
    return with_header(raw, header)


def with_sizes(raw: bytes, **changes: int | bytes) -> bytes:
    header = header_of(raw)
    for name, value in changes.items():
        setattr(header, name, value)
    return with_header(raw, header)


def forged() -> Commit:
    """The right commit in the leader's name, with the signature of somebody else."""
    signed = sign_commit(commit_to(2), RUN, OTHER)
    assert signed.term.peer == LEADER.peer_id
    return signed


@pytest.mark.parametrize(("spoil", "reason"), [case[1:] for case in HOSTILE], ids=[case[0] for case in HOSTILE])
def test_a_file_that_lies_is_skipped(
    states: SavedStates,
    parameters: StageParameters,
    caplog: pytest.LogCaptureFixture,
    spoil: Callable[[bytes], bytes],
    reason: str,
) -> None:
    save_at(states, 1, parameters)
    saved = save_at(states, 2, parameters)
    raw = saved.path.read_bytes()
    assert with_header(raw, header_of(raw)) == raw
    saved.path.write_bytes(spoil(raw))
    assert_only_older_is_found(states, caplog, saved.path, reason, parameters)


@pytest.mark.parametrize(
    ("place", "commit"),
    [
        (commit_to(2).after, commit_to(2, run_id=OTHER_RUN)),
        (commit_to(2).after, replace(commit_to(2), signature=b"")),
        (commit_to(2).after, commit_to(2, loss_sum=9.0)),
        (commit_to(2).after, None),
        (Place(0, OTHER_RUN), None),
        (Place(0, RUN), commit_to(1)),
    ],
)
def test_a_place_that_nothing_proves_is_not_saved(
    states: SavedStates, parameters: StageParameters, place: Place, commit: Commit | None
) -> None:
    with pytest.raises(ValueError, match="no signed commit"):
        states.save(place, commit, state_after(2, parameters))
    assert not states.folder.exists()


def test_vectors_that_make_no_state_are_not_saved(states: SavedStates, parameters: StageParameters) -> None:
    state, commit = state_after(2, parameters), commit_to(2)
    for wrong in (state.values.double(), state.values[:-1]):
        with pytest.raises(ValueError, match="float32 and equally long"):
            states.save(commit.after, commit, replace(state, second_moments=wrong))
    with pytest.raises(ValueError, match="32 bytes"):
        SavedStates(states.folder, b"short", STAGE)
    assert not states.folder.exists()


def test_a_huge_header_costs_no_memory(
    states: SavedStates, parameters: StageParameters, caplog: pytest.LogCaptureFixture
) -> None:
    save_at(states, 1, parameters)
    saved = save_at(states, 2, parameters)
    raw = saved.path.read_bytes()
    for header_bytes in (MAX_HEADER_BYTES + 1, 2**32 - 1):
        saved.path.write_bytes(raw[:64] + struct.pack("<I", header_bytes) + raw[68:])
        os.truncate(saved.path, 2**33)  # sparse
        tracemalloc.start()
        try:
            SavedStates(states.folder, RUN, STAGE).found()
            assert tracemalloc.get_traced_memory()[1] < 200_000
        finally:
            tracemalloc.stop()
        assert_only_older_is_found(states, caplog, saved.path, f"header has {header_bytes} bytes", parameters)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path, whole: path.symlink_to(whole), "symbolic link"),
        (lambda path, _: path.symlink_to(path), "symbolic link"),
        (lambda path, _: path.mkdir(), "directory"),
        (lambda path, _: os.mkfifo(path), "no plain file"),
        (lambda path, whole: path.write_bytes(whole.read_bytes()), "should be called"),
    ],
    ids=["link", "link to itself", "folder", "pipe", "wrong name"],
)
def test_what_is_no_file_of_ours_is_skipped(
    states: SavedStates,
    parameters: StageParameters,
    caplog: pytest.LogCaptureFixture,
    make: Callable[[Path, Path], object],
    reason: str,
) -> None:
    whole = save_at(states, 1, parameters).path
    bad = states.folder / f"stage{STAGE}-epoch2-{commit_to(2).lineage.hex()}.state"
    make(bad, whole)
    assert_only_older_is_found(states, caplog, bad, reason, parameters)
    if not bad.is_dir():
        save_at(states, 2, parameters)  # in its place; a link's target stays as it is
        assert epochs_found(states) == [2, 1]


def test_any_header_is_right_or_skipped(states: SavedStates) -> None:
    parameters = parameters_of(4)
    saved = save_at(states, 2, parameters)
    raw = saved.path.read_bytes()
    plain = header_of(raw).SerializeToString()

    def write_and_find(content: bytes) -> list[SavedAt]:
        saved.path.write_bytes(content)
        return states.found()

    @settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.binary(max_size=300), st.booleans())
    def any_bytes(content: bytes, has_magic: bool) -> None:
        assert write_and_find(raw[:24] + content if has_magic else content) == []

    @settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.binary(max_size=300))
    def any_state_header(header: bytes) -> None:
        assert write_and_find(with_header(raw, header)) == []

    @settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, len(plain) - 1), st.integers(1, 255), st.integers(0, 4), st.integers(0, 5))
    def changed_state_header(offset: int, change: int, num_removed: int, num_vectors: int) -> None:
        header = plain[:offset] + bytes([plain[offset] ^ change]) + plain[offset + 1 + num_removed :]
        for found in write_and_find(with_header(raw, header, num_vectors=num_vectors)):
            # Only what nothing but the digest vouches for can have changed.
            assert found.place == saved.place and found.commit is not None and found.commit.after == found.place
            assert found.payload_bytes == saved.payload_bytes
            if (found.digest, found.num_steps) != (saved.digest, saved.num_steps):
                with pytest.raises(UserError):
                    states.load(found, parameters)

    any_bytes()
    any_state_header()
    changed_state_header()
    assert write_and_find(raw) == [saved]


# --- Several in one folder


def test_members_of_several_stages_share_a_folder_in_peace(
    states: SavedStates, parameters: StageParameters, caplog: pytest.LogCaptureFixture
) -> None:
    other = SavedStates(states.folder, RUN, 30)
    mine, theirs = save_at(states, 2, parameters), save_at(other, 2, parameters)
    assert states.found() == [mine] and other.found() == [theirs] and caplog.messages == []
    states.prune(keep=[])
    assert states.found() == [] and other.found() == [theirs]


def test_prune_keeps_exactly_what_it_should(
    states: SavedStates, parameters: StageParameters, caplog: pytest.LogCaptureFixture
) -> None:
    saved = {epoch: save_at(states, epoch, parameters) for epoch in (1, 2, 3, 4)}
    rival = save_at(states, 3, parameters, loss_sum=9.0)
    os.truncate(saved[1].path, 10)
    os.truncate(saved[4].path, 10)
    foreign = [states.folder / name for name in ("notes.txt", "stage03-epoch1.state", ".partial", ".stage3.partial")]
    leftovers = [states.folder / f".stage{stage}-abcd_123.partial" for stage in (STAGE, 7)]
    link = states.folder / f"stage{STAGE}-epoch7-{'0' * 64}.state"
    link.symlink_to(foreign[0])
    stuck = states.folder / f"stage{STAGE}-epoch8-{'0' * 64}.state"
    stuck.mkdir()
    for path in (*foreign, *leftovers):
        path.write_bytes(b"content")
    states.prune(keep=[saved[2].place, saved[3].place, saved[4].place, Place(99, b"x" * 32)])
    kept = [saved[2].path, saved[3].path, saved[4].path]
    assert set(states.folder.iterdir()) == {*kept, *foreign, stuck}
    assert not rival.path.exists() and states.found() == [saved[3], saved[2]]
    assert any("not removed" in line and str(stuck) in line for line in caplog.messages)
