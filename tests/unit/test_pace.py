"""Giving saved states at a rate: everybody who is let in has his turn, and nobody waits for those who have gone."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from pathlib import Path

import pytest
import torch

from protos import training_pb2
from swarm.epoch.messages import Place
from swarm.errors import Busy, PeerFailed
from swarm.p2p.framing import FramedStream
from swarm.training.pace import Pace
from swarm.training.parameters import StageState
from swarm.training.requests import received
from swarm.training.saved_states import SavedStates
from swarm.training.saved_transfer import send_saved
from swarm.training.wire import place_to_wire

MIB = 2**20
RUN = b"r" * 32


def test_so_many_are_let_in_that_a_piece_waits_for_ten_seconds_at_most() -> None:
    for rate_mib, num_streams in ((0.01, 1), (1, 10), (2, 20), (1000, 32)):
        pace = Pace(rate_mib * MIB)
        with contextlib.ExitStack() as stack:
            for number in range(num_streams):
                stack.enter_context(pace.stream(f"peer {number}"))
            with pytest.raises(Busy, match="try later"), pace.stream("one more"):
                pass
        with pace.stream("one more"):
            pass


def test_no_peer_takes_all_the_room() -> None:
    pace = Pace(32 * MIB)
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(pace.stream("greedy"))
        with pytest.raises(Busy), pace.stream("greedy"):
            pass
        with pace.stream("other"):
            pass


async def test_who_has_gone_takes_no_turn() -> None:
    pace = Pace(1000)
    async with asyncio.timeout(30):
        gone = [asyncio.create_task(pace.take(10**9, lambda: False)) for _ in range(20)]
        await asyncio.sleep(0)
        await pace.take(100)
        await asyncio.gather(*gone)


async def test_who_gives_up_while_waiting_leaves_the_turn_to_the_next() -> None:
    pace = Pace(1000)
    async with asyncio.timeout(30):
        gone = [asyncio.create_task(pace.take(10**9)) for _ in range(3)]
        await asyncio.sleep(0)
        for task in gone:
            task.cancel()
        await pace.take(100)


async def test_bytes_go_at_the_rate_and_first_come_first_served() -> None:
    pace, order = Pace(1000), []

    async def take(name: int) -> None:
        await pace.take(100)
        order.append(name)

    started = time.monotonic()
    await asyncio.gather(*map(take, range(4)))
    assert order == [0, 1, 2, 3] and time.monotonic() - started >= 0.29, "the first 0.1 s are free"


async def test_an_asker_is_told_that_a_donor_is_busy(tmp_path: Path) -> None:
    states, place = SavedStates(tmp_path, RUN, 0), Place(0, RUN)
    states.save(place, None, StageState(torch.ones(9), torch.zeros(9), torch.zeros(9), 0))
    left, right = socket.socketpair()
    asker, donor = [
        await FramedStream.start(*await asyncio.open_connection(sock=sock), peer_id="12D3KooWpeer")
        for sock in (left, right)
    ]
    pace = Pace(1)
    try:
        with pace.stream("another"):
            await send_saved(donor, states, training_pb2.GetSaved(place=place_to_wire(place)), pace)
            with pytest.raises(PeerFailed, match=r"busy.*try later"):
                await received(asker)
    finally:
        await asker.aclose()
        await donor.aclose()
