"""Sessions of the async API: steps, rewinds, limits, and what a failed or cancelled step leaves behind."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
import torch

import swarm


@pytest.fixture(scope="module")
def connected(tiny_path, tiny_swarm):
    with swarm.connect(initial_peers=tiny_swarm.initial_peers, model=str(tiny_path)) as client:
        yield client


def hidden(tokens, seed=0, batch=1):
    return torch.randn(batch, tokens, 32, generator=torch.Generator().manual_seed(seed))


def fresh_output(connected, whole, last):
    """What the last tokens give in a session of their own."""
    session = connected.session(batch=whole.shape[0], max_length=64)
    output = connected.run(session.step(whole))[:, -last:]
    connected.run(session.aclose())
    return output


def test_a_cancelled_step_leaves_the_session_usable_and_nobody_blamed(connected):
    session = connected.session(max_length=64)
    first, second = hidden(5), hidden(3, seed=1)
    connected.run(session.step(first))

    async def cancelled():
        sent_before = session.hops[0].bytes_moved
        step = asyncio.create_task(session.step(second))
        while session.hops[0].bytes_moved == sent_before:
            await asyncio.sleep(0)  # until the step is under way; its answer needs a round trip
        step.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await step
        assert step.cancelled()

    connected.run(cancelled())
    assert session.position == 5
    output = connected.run(session.step(second))
    expected = fresh_output(connected, torch.cat([first, second], 1), 3)
    assert torch.allclose(output, expected, atol=1e-5 * float(expected.abs().max()))
    assert session.stats.num_reroutes == 0
    assert not any(peer.failures for peer in connected.client.router.health.peers.values())
    connected.run(session.aclose())


def test_rewind_and_reorder_ride_in_the_step(connected):
    session = connected.session(batch=2, max_length=64)
    start, more = hidden(6, batch=2), hidden(2, seed=2, batch=2)
    connected.run(session.step(start))
    output = connected.run(session.step(more, rewind_to=4, reorder=[1, 1]))
    expected = fresh_output(connected, torch.cat([start[[1, 1], :4], more], 1), 2)
    assert torch.allclose(output, expected, atol=1e-5 * float(expected.abs().max()))
    assert session.position == 6
    connected.run(session.aclose())


def test_senseless_steps_are_refused_here_and_change_nothing(connected):
    session = connected.session(max_length=8)
    connected.run(session.step(hidden(4)))
    for step, reason in [
        ({"hidden": hidden(1)[0]}, "hidden states must be"),
        ({"hidden": hidden(1, batch=2)}, "hidden states must be"),
        ({"hidden": hidden(1), "rewind_to": 5}, "cannot rewind to 5"),
        ({"hidden": hidden(1), "reorder": [1]}, "reorder must name 1 rows"),
        ({"hidden": hidden(2), "mask": torch.ones(1, 3, dtype=torch.bool)}, "the mask must be"),
    ]:
        with pytest.raises(swarm.BadRequest, match=reason):
            connected.run(session.step(**step))
    with pytest.raises(swarm.SessionFull, match="larger max_length"):
        connected.run(session.step(hidden(5)))
    assert session.position == 4
    connected.run(session.step(hidden(4)))
    connected.run(session.aclose())
    with pytest.raises(swarm.BadRequest, match="the session is closed"):
        connected.run(session.step(hidden(1)))


def test_two_sessions_of_one_client_do_not_see_each_other(connected):
    whole = [hidden(6, seed=seed) for seed in (3, 4)]
    sessions = [connected.session(max_length=16) for _ in whole]
    for position in range(6):
        outputs = [
            connected.run(session.step(part[:, position : position + 1]))
            for session, part in zip(sessions, whole, strict=True)
        ]
    for session, part, output in zip(sessions, whole, outputs, strict=True):
        expected = fresh_output(connected, part, 1)
        assert torch.allclose(output, expected, atol=1e-5 * float(expected.abs().max()))
        connected.run(session.aclose())
