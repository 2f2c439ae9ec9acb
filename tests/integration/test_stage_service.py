"""A node's stage and those who send it gradients: what belongs in is added once, everything else is refused by name and harms nobody."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from node.executor import Executor
from node.microbatches import MicrobatchLimits
from node.training.device_work import DeviceWork
from node.training.service import StageService
from node.training.stage import TrainableStage
from protos import node_pb2
from swarm.client.config import ClientConfig
from swarm.client.peer_stream import PeerStream
from swarm.client.stage_hop import StageHops, StageTask, _Replica
from swarm.epoch.messages import Owner, Place, Term
from swarm.errors import BadRequest, MicrobatchGone, Outdated, PeerFailed, SwarmError
from swarm.messages import NODE_PROTOCOL, encode_message, own_version
from swarm.p2p.host import Host, HostConfig, running_host
from swarm.tensors import WireFormat
from swarm.training.initial import open_initial_weights
from swarm.training.membership import Membership
from swarm.training.run_host import RunHost
from tests.support.training_swarm import make_run

TERM = Term(1, "leader")
HIDDEN = 32


@dataclass
class Stage:
    """A served stage, and a peer that talks to it."""

    membership: Membership
    service: StageService
    stage: TrainableStage
    node: Host
    client: Host
    addresses: tuple[str, ...]
    hops: StageHops

    def task(self, unit: int = 0, **changes: Any) -> StageTask:
        place = self.membership.weights_at[0]
        owner = Owner(self.node.peer_id, self.membership.ledger.ledger_id)
        return replace(StageTask(place, TERM, unit, 0, owner, first_sample=unit), **changes)

    async def forward(self, task: StageTask, hidden: torch.Tensor) -> torch.Tensor:
        return await self.hops.forward(task, self.addresses, hidden, wants_gradients=True)

    async def backward(self, task: StageTask, gradient: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        result, is_finite = await self.hops.backward(task, self.addresses, gradient, given)
        assert is_finite
        return result

    async def ask(
        self, request: node_pb2.Request, *tensors: torch.Tensor, answer: str = "stage_backward", timeout_s: float = 3.0
    ) -> Any:
        """One raw request on a stream that was opened properly."""
        opening = node_pb2.OpenStage(version=own_version(), run_id=self.membership.run_id, stage=0)
        config = ClientConfig(model="run", initial_peers=("none",))
        stream = await PeerStream.open(
            self.client, _Replica(self.node.peer_id, self.addresses), node_pb2.Request(open_stage=opening),
            "stage_opened", config, time.monotonic() + 10,
        )  # fmt: skip
        try:
            return await stream.ask(encode_message(request, tensors), answer, time.monotonic() + timeout_s)
        finally:
            await stream.aclose()


@contextlib.asynccontextmanager
async def served(folder: Path, stash_bytes: int = 2**26, **rules: Any) -> AsyncIterator[Stage]:
    torch.set_num_threads(1)
    store = make_run(folder, **rules)
    async with running_host(HostConfig()) as node, running_host(HostConfig()) as client:
        executor = Executor(16)
        stage = TrainableStage(open_initial_weights(store.spec), store.spec, 0)
        membership = Membership(RunHost(node, None), store, 0, stage.parameters, DeviceWork(executor))  # type: ignore[arg-type]
        membership.ledger.obey(TERM)
        service = StageService(stage, membership, executor, MicrobatchLimits(stash_bytes, 60, 64, 60))
        await node.serve(NODE_PROTOCOL, service.handle)
        hops = StageHops(
            client,
            store.run_id,
            ClientConfig(model="run", initial_peers=("none",), microbatch_timeout_s=10),
            WireFormat.FP32,
        )
        try:
            yield Stage(membership, service, stage, node, client, tuple(await node.addresses()), hops)
        finally:
            await hops.aclose()
            executor.close()


def some(seed: int = 0, rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, 8, HIDDEN, generator=torch.Generator().manual_seed(seed))


async def test_a_gradient_is_added_once_and_is_that_of_autograd(tmp_path: Path) -> None:
    async with served(tmp_path) as peer:
        task, hidden, gradient = peer.task(), some(1), some(2)
        output = await peer.forward(task, hidden)
        entry = peer.stage.differentiable(hidden, range(2))
        assert torch.equal(output, entry.output)
        of_input, of_weights = peer.stage.backward(entry, gradient)
        assert torch.equal(await peer.backward(task, gradient, hidden), of_input)
        expected = torch.cat([g.flatten() for g in of_weights if g is not None])
        assert torch.equal(peer.membership.gradient.vector, expected)
        assert peer.membership.ledger.units == {0}
        # The same again, forwarded or not: computed and answered, not added.
        assert torch.equal(await peer.backward(task, gradient, hidden), of_input)
        await peer.forward(task, hidden)
        assert torch.equal(await peer.backward(task, gradient, hidden), of_input)
        assert torch.equal(peer.membership.gradient.vector, expected) and peer.service.num_added == 1
        await peer.forward(peer.task(unit=1), some(3))
        await peer.backward(peer.task(unit=1), gradient, some(3))
        assert peer.membership.ledger.units == {0, 1} and peer.service.num_added == 2


async def test_what_is_not_kept_is_computed_again_from_the_input(tmp_path: Path) -> None:
    async with served(tmp_path, stash_bytes=0) as peer:
        task, hidden, gradient = peer.task(), some(1), some(2)
        await peer.forward(task, hidden)
        expected, _ = peer.stage.backward(peer.stage.differentiable(hidden, range(2)), gradient)
        assert torch.equal(await peer.backward(task, gradient, hidden), expected)
        assert peer.membership.ledger.units == {0}


def bad_tasks(peer: Stage) -> dict[str, tuple[StageTask, type[SwarmError], str]]:
    place = peer.membership.weights_at[0]
    return {
        "epoch": (peer.task(place=Place(place.epoch + 1, place.lineage)), Outdated, "the weights here are at epoch 0"),
        "lineage": (peer.task(place=Place(place.epoch, b"x" * 32)), Outdated, "of another history"),
        "term": (peer.task(term=Term(2, "usurper")), Outdated, "obeys another leader"),
        "ledger": (peer.task(owner=Owner(peer.node.peer_id, 7)), Outdated, "another ledger"),
    }


@pytest.mark.parametrize("wrong", ["epoch", "lineage", "term", "ledger"])
async def test_a_gradient_of_another_epoch_history_term_or_ledger_is_refused(tmp_path: Path, wrong: str) -> None:
    async with served(tmp_path) as peer:
        task, error, words = bad_tasks(peer)[wrong]
        hidden = some(1)
        if wrong in ("epoch", "lineage"):
            with pytest.raises(error, match=words):
                await peer.forward(task, hidden)
        with pytest.raises(error, match=words):
            await peer.hops.backward(task, peer.addresses, some(2), hidden)
        with pytest.raises((error, MicrobatchGone), match=f"{words}|nothing is kept"):
            await peer.hops.backward(task, peer.addresses, some(2), hidden)
        await check_unharmed(peer)


async def test_gradients_that_are_nan_or_of_another_size_are_refused(tmp_path: Path) -> None:
    async with served(tmp_path) as peer:
        hidden = some(1)
        nan = some(2)
        nan[0, 0, 0] = float("nan")
        for gradient, words in (
            (nan, "gradient: holds NaN"),
            (some(2)[:, :4], "gradient: shape"),
            (some(2, rows=1), "gradient: shape"),
        ):
            await peer.forward(peer.task(), hidden)
            with pytest.raises(BadRequest, match=words):
                await peer.hops.backward(peer.task(), peer.addresses, gradient, hidden)
        for bad, words in ((nan, "hidden states: holds NaN"), (some(1)[..., :5], "hidden states: shape")):
            with pytest.raises(BadRequest, match=words):
                await peer.forward(peer.task(), bad)
        with pytest.raises(BadRequest, match="takes 1 to 64 tokens"):
            await peer.forward(peer.task(), some(1, rows=9))
        with pytest.raises(BadRequest, match="needs a gradient"):
            await peer.ask(node_pb2.Request(stage_backward=node_pb2.StageBackward(lineage=peer.membership.run_id)))
        with pytest.raises(PeerFailed, match="took no data"):
            await peer.ask(node_pb2.Request(stage_forward=node_pb2.StageForward(lineage=peer.membership.run_id)), torch.zeros(40, 10, 4096), answer="stage_forward")  # fmt: skip
        await check_unharmed(peer)


async def test_who_asks_for_another_run_or_stage_is_told(tmp_path: Path) -> None:
    async with served(tmp_path) as peer:
        for hops, stage in ((StageHops(peer.client, b"y" * 32, peer.hops._config, WireFormat.FP32), 0), (peer.hops, 1)):
            with pytest.raises(PeerFailed, match="the run is another"):
                await hops.forward(peer.task(stage=stage), peer.addresses, some(1), wants_gradients=True)
            await hops.aclose()
        await check_unharmed(peer)


async def check_unharmed(peer: Stage) -> None:
    """Nothing was added, and an honest gradient still is."""
    assert peer.service.num_added == 0 and not peer.membership.gradient.vector.any()
    await peer.forward(peer.task(unit=5), some(1))
    await peer.backward(peer.task(unit=5), some(2), some(1))
    assert peer.membership.ledger.units == {5}
