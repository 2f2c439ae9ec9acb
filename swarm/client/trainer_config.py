"""TrainerConfig: everything a trainer can be told."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from swarm.errors import UserError
from swarm.training.member_config import MembershipConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerConfig:
    """One trainer. Times are seconds."""

    run_id: bytes
    initial_peers: tuple[str, ...]
    """Multiaddrs ending in /p2p/<peer id>; one that works is enough."""
    data: Path | None = None
    """Where the run's files are, if not where its spec says; or this trainer's own text, in runs that ask for it."""
    held_out: Path | None = None
    max_in_flight: int = 4
    """Microbatches under way at the same time."""
    microbatch_timeout_s: float = 120.0
    """Bound on one stage's forward or backward."""
    linger_s: float = 3.0
    """At the end of the run, how long to wait until others know of it."""
    num_workers: int = 0
    """Processes that tokenise."""
    threads: int | None = None
    """Threads for embedding and head. None: torch's default."""
    listen: tuple[str, ...] = ("/ip4/127.0.0.1/tcp/0",)
    announce: tuple[str, ...] = ()
    identity: Path | None = None
    join_timeout_s: float = 15.0
    cache_dir: Path | None = None
    membership: MembershipConfig = field(default_factory=MembershipConfig)

    def __post_init__(self) -> None:
        if not self.initial_peers:
            raise UserError("no initial peers: give the address that swarm-bootstrap printed (--initial-peers)")
        if not 1 <= self.max_in_flight <= 32:
            raise UserError(f"--in-flight must be 1 to 32, got {self.max_in_flight}")
