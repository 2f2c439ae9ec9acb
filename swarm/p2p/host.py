"""Host: this process as a libp2p peer. Owns the p2pd child, opens and accepts framed streams.

hivemind's P2P does the talking to p2pd; its DHT process, unary calls for tensors and pickling are not used.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import errno
import fcntl
import logging
import os
import re
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hivemind.utils.logging as hivemind_logging
from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.control import P2PDaemonError
from hivemind.p2p.p2p_daemon_bindings.utils import ControlFailure
from hivemind.utils.multiaddr import Multiaddr

from swarm.errors import JoinFailed, PeerFailed, UserError
from swarm.identity import Identity
from swarm.p2p.framing import FramedStream
from swarm.p2p.runtime_dir import private_directory
from swarm.records import MAX_ADDRESSES

log = logging.getLogger(__name__)
hivemind_logging.use_hivemind_log_handler("nowhere")  # p2pd's and the DHT's own words go to our log only when asked for
logging.getLogger("hivemind").setLevel(os.environ.get("SHARDSWARM_HIVEMIND_LOG", "CRITICAL"))

_starting = threading.Lock()

StreamHandler = Callable[[FramedStream], Awaitable[None]]

# p2pd kills itself if we die before it hears from us, and as soon as our control connection closes.
_P2PD_IDLE_TIMEOUT_S = 5
_P2PD_START_TIMEOUT_S = 15
# Varint codes of multiaddr parts (https://github.com/multiformats/multicodec/blob/master/table.csv).
_P2P_CODE, _CIRCUIT_CODE = b"\xa5\x03", b"\xa2\x02"
_P2PD_STOP_TIMEOUT_S = 3
_RELAY_PROBE_TIMEOUT_S = 3


@dataclass(frozen=True, slots=True)
class HostConfig:
    """How this process appears on the network."""

    listen: tuple[str, ...] = ("/ip4/127.0.0.1/tcp/0",)
    """Multiaddrs to listen on; port 0 picks a free one."""
    announce: tuple[str, ...] = ()
    """Multiaddrs to tell others instead of those that are listened on (behind a port forwarding or a relay)."""
    identity_path: Path | None = None
    """File with the key; made if missing. None: a new identity for this process."""
    relays: tuple[str, ...] = ()
    """Peers that relay connections to us because nobody can reach us directly (behind NAT): multiaddrs ending in /p2p/<peer id>."""
    is_relay: bool = False
    """Whether everybody can reach us, so that we may relay for others."""
    max_streams_per_peer: int = 64
    """Streams that one peer may have open here; more are refused."""


class Host:
    """A running p2pd and the streams over it. Made by `async with running_host(config)`."""

    def __init__(self, p2p: P2P, identity: Identity, config: HostConfig, relays: Sequence[str]) -> None:
        self.p2p = p2p
        self._relays = relays
        self.identity = identity
        self._config = config
        self._streams_of: collections.Counter[str] = collections.Counter()
        self._serving: set[asyncio.Task[None]] = set()
        self._stopping = False

    @property
    def peer_id(self) -> str:
        return self.identity.peer_id

    async def addresses(self) -> list[str]:
        """Multiaddrs at which others can reach us, each ending in /p2p/<peer id>."""
        circuits = [f"{relay}/p2p-circuit/p2p/{self.peer_id}" for relay in self._relays]
        return circuits + [str(address) for address in await self.p2p.get_visible_maddrs(latest=True)]

    async def record_addresses(self) -> tuple[str, ...]:
        """The same as they are in records, which say the peer id elsewhere and take only so many."""
        return tuple(map(strip_peer_id, await self.addresses()))[:MAX_ADDRESSES]

    async def connect(self, peer_id: str, addresses: Iterable[str], timeout_s: float) -> None:
        """Make sure that there is a connection to a peer. Raises PeerFailed."""
        parsed = [_WireAddress(strip_peer_id(address)) for address in addresses]
        try:
            async with asyncio.timeout(timeout_s):
                await self.p2p._client.connect(PeerID.from_base58(peer_id), parsed)
        except TimeoutError:
            raise PeerFailed(f"peer {peer_id[-8:]} could not be reached within {timeout_s:.1f} s") from None
        except (ControlFailure, P2PDaemonError, OSError, ValueError, asyncio.IncompleteReadError) as error:
            raise PeerFailed(f"peer {peer_id[-8:]} could not be reached: {_short(error)}") from error

    async def open_stream(
        self, peer_id: str, protocol: str, timeout_s: float, addresses: Sequence[str] = ()
    ) -> FramedStream:
        """A new stream to a peer, which we then own. Raises PeerFailed."""
        if addresses:
            await self.connect(peer_id, addresses, timeout_s)
        try:
            async with asyncio.timeout(timeout_s):
                _, reader, writer = await self.p2p.call_binary_stream_handler(PeerID.from_base58(peer_id), protocol)
        except TimeoutError:
            raise PeerFailed(f"peer {peer_id[-8:]} did not open a stream within {timeout_s:.1f} s") from None
        except (ControlFailure, P2PDaemonError, OSError, ValueError, asyncio.IncompleteReadError) as error:
            raise PeerFailed(
                f"peer {peer_id[-8:]} cannot be reached or does not speak {protocol}: {_short(error)}"
            ) from error
        return await FramedStream.start(reader, writer, peer_id)

    async def serve(self, protocol: str, handler: StreamHandler) -> None:
        """Call handler for every stream of this protocol that a peer opens. The handler's errors end only its stream."""

        async def accept(stream_info: Any, reader: Any, writer: Any) -> None:
            peer_id = str(stream_info.peer_id)
            stream = await FramedStream.start(reader, writer, peer_id)
            if self._streams_of[peer_id] >= self._config.max_streams_per_peer:
                await stream.fail(f"more than {self._config.max_streams_per_peer} streams from one peer")
                return
            task = asyncio.current_task()
            assert task is not None
            self._streams_of[peer_id] += 1
            self._serving.add(task)
            try:
                await handler(stream)
            except PeerFailed as error:
                log.debug("stream lost peer=%s reason=%s", peer_id, error)
            except asyncio.CancelledError:
                if not self._stopping:
                    raise
            finally:
                self._serving.discard(task)
                self._streams_of[peer_id] -= 1
                if not self._streams_of[peer_id]:
                    del self._streams_of[peer_id]
                await stream.aclose()

        await self.p2p.add_binary_stream_handler(protocol, accept)

    async def wait_until_dead(self) -> None:
        """Return when p2pd has died; nothing works then."""
        assert self.p2p._child is not None
        await self.p2p._child.wait()

    async def _stop_serving(self) -> None:
        self._stopping = True
        for task in self._serving:
            task.cancel()
        if self._serving:
            await asyncio.wait(self._serving, timeout=5)


@contextlib.asynccontextmanager
async def running_host(config: HostConfig) -> AsyncIterator[Host]:
    """Start p2pd, and stop it and remove its sockets at the end.

    Raises UserError if the identity is in use or an address cannot be listened on.
    """
    with private_directory() as directory, _identity(config.identity_path, directory) as (identity, path):
        await _wait_for_free_ports(config.listen)
        relays = await _answering_relays(config.relays)
        try:
            async with _starting_alone():
                P2P._UNIX_SOCKET_PREFIX = f"/unix{directory}/"
                p2p = await _P2P.create(
                    host_maddrs=list(config.listen),
                    announce_maddrs=list(config.announce) or None,
                    identity_path=str(path),
                    idle_timeout=_P2PD_IDLE_TIMEOUT_S,
                    startup_timeout=_P2PD_START_TIMEOUT_S,
                    auto_nat=not config.announce,
                    use_auto_relay=bool(relays),
                    trusted_relays=relays or None,
                    force_reachability="private" if relays else "public" if config.is_relay else None,
                    nat_port_map=not all("/127.0.0.1/" in address for address in config.listen),
                )
        except (P2PDaemonError, ValueError) as error:
            raise UserError(f"cannot listen on {', '.join(config.listen)}: {_short(error)}") from error
        host = Host(p2p, identity, config, relays)
        try:
            yield host
        finally:
            await host._stop_serving()
            await _stop_p2pd(p2p)


async def _stop_p2pd(p2p: P2P) -> None:
    """End p2pd: SIGTERM, and SIGKILL if it is still busy closing connections after a moment."""
    try:
        async with asyncio.timeout(_P2PD_STOP_TIMEOUT_S):
            await p2p.shutdown()
    except TimeoutError:
        log.warning("p2pd did not stop in time and is killed pid=%s", p2p._child.pid)
        p2p._child.kill()
        await p2p._child.wait()


@contextlib.asynccontextmanager
async def _starting_alone() -> AsyncIterator[None]:
    """One p2pd of this process starts at a time: uvloop refuses to spawn from two loops at once, and the sockets' prefix is a class's."""
    while not _starting.acquire(blocking=False):  # noqa: ASYNC110  the other start is in another thread's loop
        await asyncio.sleep(0.02)
    try:
        yield
    finally:
        _starting.release()


async def _wait_for_free_ports(listen: Iterable[str]) -> None:
    """Raise UserError if another process listens where we are to: p2pd sets SO_REUSEPORT and would get every other connection.

    Waits a little first: the p2pd of a process that was killed just now takes a moment to end.
    """
    deadline = asyncio.get_running_loop().time() + _P2PD_IDLE_TIMEOUT_S + 1
    for address in listen:
        match = re.match(r"/ip([46])/([^/]+)/tcp/(\d+)", address)
        if match is None or match[3] == "0":
            continue
        while True:
            try:
                with socket.socket(socket.AF_INET if match[1] == "4" else socket.AF_INET6) as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind((match[2], int(match[3])))
                break
            except OSError as error:
                if error.errno == errno.EADDRINUSE and asyncio.get_running_loop().time() < deadline:
                    await asyncio.sleep(0.2)
                    continue
                raise UserError(
                    f"cannot listen on {address}: {(error.strerror or str(error)).lower()}; choose another --listen address or port"
                ) from error


async def _answering_relays(relays: Sequence[str]) -> list[str]:
    """One address that accepts connections for each relay; p2pd reserves nowhere once it is told of one that does not.

    Raises JoinFailed if none accepts.
    """
    chosen: dict[str, str] = {}
    for relay in relays:
        parts = relay.split("/")  # /ip4/ADDRESS/tcp/PORT/p2p/ID
        try:
            async with asyncio.timeout(_RELAY_PROBE_TIMEOUT_S):
                _, writer = await asyncio.open_connection(parts[2], int(parts[4]))
            writer.close()
        except (OSError, TimeoutError, ValueError, IndexError):
            continue
        chosen.setdefault(peer_id_of(relay), relay)
    if relays and not chosen:
        raise JoinFailed(
            f"none of {', '.join(relays)} accepts connections, so none can relay; check the addresses and that a bootstrap peer runs there"
        )
    return list(chosen.values())


@contextlib.contextmanager
def _identity(path: Path | None, directory: Path) -> Any:
    """(identity, its file). The file stays locked: two processes with one peer id would take each other's connections."""
    if path is None:
        path = directory / "identity"
    identity = Identity.load_or_create(path)
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"the identity {path} is in use by another process; give each its own --identity") from None
        yield identity, path


async def join(host: Host, initial_peers: Sequence[str], timeout_s: float) -> list[str]:
    """Connect to the initial peers and return the ids of those that answered. Tries again until one does.

    initial_peers: multiaddrs that end in /p2p/<peer id>. Raises JoinFailed, naming each address and its failure.
    """
    if not initial_peers:
        return []
    failures: dict[str, str] = {}

    async def dial(address: str) -> str | None:
        peer_id = peer_id_of(address)
        try:
            await host.connect(peer_id, [address], min(5.0, timeout_s))
        except PeerFailed as error:
            failures[address] = str(error)
            return None
        return peer_id

    deadline = asyncio.get_running_loop().time() + timeout_s
    pause_s = 0.25
    while True:
        answered = [peer for peer in await asyncio.gather(*map(dial, initial_peers)) if peer]
        if answered:
            return answered
        if asyncio.get_running_loop().time() + pause_s >= deadline:
            break
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, 2.0)
    reasons = "; ".join(f"{address}: {reason}" for address, reason in failures.items())
    raise JoinFailed(
        f"none of the {len(initial_peers)} initial peers answered within {timeout_s:.0f} s ({reasons}); check the address and that a bootstrap peer runs there"
    )


def peer_id_of(address: str) -> str:
    """The peer id at the end of a multiaddr. Raises JoinFailed if there is none or the address is malformed."""
    try:
        peer_id = str(Multiaddr(address)["p2p"])
        PeerID.from_base58(peer_id)
    except (ValueError, KeyError, LookupError) as error:
        raise JoinFailed(
            f"initial peer {address!r} is not a multiaddr such as /ip4/203.0.113.7/tcp/31337/p2p/12D3Koo..."
        ) from error
    return peer_id


def strip_peer_id(address: str) -> str:
    """The address without its own /p2p/<peer id> ending; that of a relay on the way stays."""
    return re.sub(r"/p2p/[^/]+$", "", address)


class _P2P(P2P):  # type: ignore[misc]
    """hivemind's P2P with a flag of p2pd that it does not know."""

    @staticmethod
    def _make_process_args(*args: Any, **kwargs: Any) -> list[str]:
        # With discovery on, p2pd waits for relays to be found and never reserves a slot at those that it was told of.
        return [*P2P._make_process_args(*args, **kwargs), "-relayDiscovery=0"]


class _WireAddress:
    """A multiaddr as hivemind's client sends it. hivemind's own Multiaddr encodes /p2p/<peer id> without its length."""

    def __init__(self, text: str) -> None:
        before, _, after = text.partition("/p2p/")
        self._raw: bytes = Multiaddr(before).to_bytes()
        if after:
            relay_id, _, rest = after.partition("/")
            if rest != "p2p-circuit":
                raise ValueError(f"expected .../p2p/<peer id>/p2p-circuit, got {text}")
            relay = PeerID.from_base58(relay_id).to_bytes()
            self._raw += _P2P_CODE + bytes([len(relay)]) + relay + _CIRCUIT_CODE

    def to_bytes(self) -> bytes:
        return self._raw


def _short(error: BaseException) -> str:
    """An error of p2pd's as one line, without its Go decoration."""
    lines = [line.strip(" *") for line in str(error).strip().splitlines() if line.strip()]
    return "; ".join(lines)[:400] or type(error).__name__
