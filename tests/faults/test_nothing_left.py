"""Processes that end, well or badly: no p2pd outlives them, no directory stays, no session is held for them."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from swarm.records import ShardState
from tests.faults.conftest import (
    CommandLine,
    Observer,
    Victims,
    client_of,
    directories_of,
    is_alive,
)
from tests.support.fork_server import ForkServer
from tests.support.models import save_tiny
from tests.support.processes import LocalSwarm, wait_until

P2PD_GONE_S = 5.0
# A node that runs no session: saying LEAVING, closing p2pd, and the interpreter's own end.
LEAVE_S = 6.0
# From the signal to the last hop's hearing it, while three interpreters share the machine.
FREED_S = 10.0  # they expire after minutes
# From the signal to the exit: the interpreter's end is most of it.
INTERRUPT_S = 8.0


@pytest.fixture(scope="module")
def endless_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that never says that it has finished."""
    return save_tiny("llama", tmp_path_factory.mktemp("models") / "endless", seed=8, eos_token_id=None)


@pytest.fixture
def swarm_cli(
    nodes: LocalSwarm, endless_path: Path, fault_root: Path, fork_server: ForkServer
) -> Iterator[Callable[..., CommandLine]]:
    """Starts `swarm COMMAND ...` on the endless model; real_command: in an interpreter of its own."""
    started: list[CommandLine] = []

    def start(command: str, *arguments: str, real_command: bool = False) -> CommandLine:
        words = (command, "--initial-peers", nodes.initial_peers[0], "--model", str(endless_path), *arguments)
        started.append(CommandLine(fault_root, *words, fork_server=None if real_command else fork_server))
        return started[-1]

    yield start
    for program in started:
        program.close()


def sweep_with_next_start(nodes: LocalSwarm, pid: int, root: Path) -> None:
    """Any of our programs that starts removes what the dead one left."""
    assert len(directories_of(pid, root)) == 1, "a killed process cannot tidy up"
    sweeper = nodes.start_bootstrap(f"after-{pid}")
    sweeper.ready()
    assert directories_of(pid, root) == []
    assert sweeper.stop() == 0


def test_a_killed_node_leaves_no_p2pd_and_the_next_start_removes_its_sockets(
    victims: Victims, nodes: LocalSwarm, fault_root: Path
) -> None:
    (node,) = victims.start("0:2")
    (p2pd,) = node.p2pd_pids()
    node.send(signal.SIGKILL)
    assert node.wait(5) == -signal.SIGKILL
    wait_until(lambda: not is_alive(p2pd), P2PD_GONE_S, "the p2pd of a killed node has ended")
    sweep_with_next_start(nodes, node.pid, fault_root)


@pytest.mark.parametrize(("number", "real_command"), [(signal.SIGTERM, False), (signal.SIGINT, True)])
def test_a_node_that_is_told_to_leave_leaves_nothing_behind(
    number: signal.Signals, real_command: bool, victims: Victims, nodes: LocalSwarm, fault_root: Path, tiny_path: Path
) -> None:
    (node,) = victims.start("0:2", real_command=real_command, s_per_block=None)
    (p2pd,) = node.p2pd_pids()
    with client_of(nodes, tiny_path) as client:

        def states() -> list[ShardState]:
            digest = client.client.checkpoint.spec.digest
            records = client.run(client.client.directory.find_blocks(digest, range(2)))
            return [record.state for record in records if record.peer_id == node.peer_id]

        assert states() == [ShardState.ONLINE]
        started = time.monotonic()
        node.send(number)
        assert node.wait(LEAVE_S + 10) == 0, node.log
        assert time.monotonic() - started < LEAVE_S
        assert states() in ([], [ShardState.LEAVING])
    assert not is_alive(p2pd)
    assert directories_of(node.pid, fault_root) == []
    assert "leaving" in node.log and "Traceback" not in node.log and "Error" not in node.log, node.log


def test_signals_that_come_again_and_again_do_not_spoil_the_end(victims: Victims, fault_root: Path) -> None:
    (node,) = victims.start("0:2")
    (p2pd,) = node.p2pd_pids()

    def has_ended() -> bool:
        node.send(signal.SIGTERM)
        return not node.is_running()

    wait_until(has_ended, LEAVE_S, "the node has left")
    assert node.wait(1) == 0, node.log
    assert not is_alive(p2pd) and directories_of(node.pid, fault_root) == [] and "Traceback" not in node.log


def test_a_killed_client_leaves_no_p2pd_and_no_session(
    victims: Victims,
    nodes: LocalSwarm,
    observer: Observer,
    fault_root: Path,
    endless_path: Path,
    swarm_cli: Callable[..., CommandLine],
) -> None:
    slow, other = victims.start("0:2", "2:4", model=endless_path)
    nodes.plant(slow, "slow", 3, delay_s=0.2)
    client = swarm_cli("generate", "--max-new-tokens", "200", "The quick brown fox")
    wait_until(lambda: nodes.trace_of(slow), 40, "the client generates")
    (directory,) = directories_of(client.pid, fault_root)
    assert any(directory.iterdir())
    (p2pd,) = _children(client.pid)
    client.popen.send_signal(signal.SIGKILL)
    client.popen.wait(5)
    killed = time.monotonic()
    for node in (slow, other):
        observer.wait_for_sessions(node, 0, P2PD_GONE_S + 1)
    wait_until(lambda: not is_alive(p2pd), killed + P2PD_GONE_S - time.monotonic(), "the client's p2pd has ended")
    sweep_with_next_start(nodes, client.pid, fault_root)


def test_ctrl_c_frees_the_session_on_every_hop(
    victims: Victims,
    nodes: LocalSwarm,
    observer: Observer,
    endless_path: Path,
    fault_root: Path,
    swarm_cli: Callable[..., CommandLine],
) -> None:
    """In a generation, in the middle of a chat's answer, and while a chat waits for its user."""
    slow, other = victims.start("0:2", "2:4", model=endless_path)
    idle = swarm_cli("chat", "--max-new-tokens", "2", "--max-length", "200")
    idle.type("hello")
    observer.wait_for_sessions(slow, 1, 40)
    wait_until(lambda: observer.status(slow).num_steps >= 2, 20, "the first answer is given")
    fault_id = nodes.plant(slow, "slow", 1, delay_s=0.2)
    generating = swarm_cli("generate", "--max-new-tokens", "200", "The quick brown fox", real_command=True)
    answering = swarm_cli("chat", "--max-new-tokens", "150", "--max-length", "250")
    answering.type("hello")
    for node in (slow, other):
        observer.wait_for_sessions(node, 3, 40)
    steps = observer.status(slow).num_steps
    wait_until(lambda: observer.status(slow).num_steps > steps + 4, 20, "both generate")
    assert nodes.trace_of(slow)[-1]["id"] == fault_id

    programs = {"idle": idle, "generating": generating, "answering": answering}
    p2pds = [child for program in programs.values() for child in _children(program.pid)]
    for program in programs.values():
        program.popen.send_signal(signal.SIGINT)
    for node in (slow, other):
        observer.wait_for_sessions(node, 0, FREED_S)
    for name, program in programs.items():
        code, _, err = program.finish(INTERRUPT_S)
        assert code == 130, (name, err)
        said = [line for line in err.splitlines() if line and not line.startswith("[")]
        assert said == ["swarm: interrupted"], (name, err)
        assert directories_of(program.pid, fault_root) == []
    assert len(p2pds) == 3 and not any(map(is_alive, p2pds))


def _children(pid: int) -> list[int]:
    import psutil

    return [child.pid for child in psutil.Process(pid).children() if child.name() == "p2pd"]
