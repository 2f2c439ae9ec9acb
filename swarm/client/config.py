"""ClientConfig: everything a client can be told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from swarm.errors import UserError
from swarm.numeric_class import HEAD_CLASSES
from swarm.wire_format import WireFormat


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientConfig:
    """One client. Times are seconds."""

    model: str
    """Alias, hub id, directory or GGUF file."""
    initial_peers: tuple[str, ...]
    """Multiaddrs ending in /p2p/<peer id>; one that works is enough."""
    request_timeout_s: float = 30.0
    """Bound on everything that a user waits for: finding a route, opening a session, one step with all its retries."""
    join_timeout_s: float = 15.0
    patience_s: float = 6.0
    """How long to wait for somebody to serve blocks that nobody serves, or for room on full nodes, when opening a session."""
    stall_s: float = 1.0
    """After so long without a reply a hop is pinged; its event loop answers even while it computes."""
    ping_timeout_s: float = 2.0
    """A hop that does not answer a ping for so long is given up."""
    records_max_age_s: float = 10.0
    """Records older than this are fetched again before a route is planned."""
    wire: WireFormat | str = WireFormat.BF16
    """How hidden states and gradients of microbatches travel: fp32, bf16 or int8 (swarm/wire_format.py states each one's error).
    Sessions always send what they have."""
    microbatch_tokens: int = 512
    """A batch is split, by rows, into microbatches of at most so many tokens (at least one row)."""
    max_in_flight: int = 4
    """Microbatches under way at the same time; a node grants one client 8 streams."""
    microbatch_timeout_s: float = 120.0
    """Bound on one microbatch through all blocks, one way, with all its retries."""
    precision: str = "auto"
    """What the LM head computes in while nothing is trained: fp32, bf16, int8; auto: as fine as the finest nodes of the model."""
    dropout: bool = False
    """Whether the model's own dropout is on while it is in train mode; it follows from torch's random state."""
    listen: tuple[str, ...] = ("/ip4/127.0.0.1/tcp/0",)
    cache_dir: Path | None = None

    def __post_init__(self) -> None:
        if not self.initial_peers:
            raise UserError(
                "no initial peers: give the address that swarm-bootstrap printed (--initial-peers, or SHARDSWARM_INITIAL_PEERS)"
            )
        if self.wire not in list(WireFormat):
            raise UserError(f"wire must be one of {', '.join(WireFormat)}, got {self.wire!r}")
        if self.precision not in ("auto", *HEAD_CLASSES):
            raise UserError(f"precision must be one of auto, {', '.join(HEAD_CLASSES)}, got {self.precision!r}")
        if self.max_in_flight > 8:
            raise UserError(f"max_in_flight must be 1 to 8, got {self.max_in_flight}")
        counts = ("microbatch_tokens", "max_in_flight", "microbatch_timeout_s")
        for name in (*counts, "request_timeout_s", "join_timeout_s", "patience_s", "stall_s", "ping_timeout_s"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} must be positive, got {getattr(self, name)}")
