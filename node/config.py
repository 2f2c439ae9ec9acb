"""NodeConfig: everything a node can be told, checked once at start."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from swarm.errors import UserError
from swarm.numeric_class import AUTO, NUMERIC_CLASSES
from swarm.span import Span
from swarm.training.member_config import LEAST_DONOR_MIB_PER_S, MembershipConfig

PRECISIONS = (*NUMERIC_CLASSES, AUTO)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeConfig:
    """One node process. Made by node.cli from flags, environment, file and defaults, in this order of precedence."""

    model: str = ""
    """Alias, hub id, directory or GGUF file; empty when it is a run's."""
    run_ids: tuple[bytes, ...] = ()
    """Train a stage of each of these runs, instead of serving blocks of a model."""
    membership: MembershipConfig = field(default_factory=MembershipConfig)
    initial_peers: tuple[str, ...] = ()
    """Multiaddrs ending in /p2p/<peer id>; empty: a new swarm."""
    blocks: Span | None = None
    """What to host. None: the span that is served worst, as large as memory allows."""
    num_blocks: int | None = None
    """How many blocks to host when `blocks` is None. None: as many as fit max_memory_bytes."""
    listen: tuple[str, ...] = ("/ip4/127.0.0.1/tcp/0",)
    announce: tuple[str, ...] = ()
    use_relay: bool = False
    """Nobody can reach this node directly; the initial peers relay connections to it."""
    identity: Path | None = None
    precision: str = AUTO
    """Numeric class of what is served (swarm/numeric_class.py), or "auto": which one is the fastest. A run computes in what its rules say."""
    max_perplexity_change: float = 0.1
    """Percent that the class may change the model's perplexity by, when it is chosen here."""
    device: str = "cpu"
    """"cpu", "cuda" or "cuda:NUMBER"."""
    threads: int | None = None
    """Threads of the device. None: measured at start."""
    cache_bytes: int = 512 * 2**20
    """Budget for the KV caches of all sessions together."""
    max_memory_bytes: int | None = None
    """Weights and caches together, when the node chooses its span. None: 60 % of the memory that is free at start."""
    max_sessions: int = 64
    max_sessions_per_peer: int = 16
    max_waiting_jobs: int = 128
    """Of peers' steps, forwards and backwards that may wait for the device, for sessions and for training each; more are refused."""
    stash_bytes: int = 1024 * 2**20
    """Budget for the autograd graphs of microbatches between forward and backward; 0: always compute again."""
    stash_expiry_s: int = 120
    """A microbatch without its backward for so long is dropped from the stash."""
    max_microbatch_tokens: int = 4096
    """Rows x tokens of one microbatch; more are refused."""
    session_idle_s: int = 300
    """A session without a step for so long is closed and its cache freed."""
    join_timeout_s: float = 15.0
    drain_timeout_s: float = 10.0
    """After SIGTERM running sessions get this long to finish."""
    record_lifetime_s: float = 60.0
    """How long others believe in us after our last word; renewed every third of it."""
    cache_dir: Path | None = None
    copies: bool = True
    """Whether a node that trains keeps copies of other stages' checkpoints that too few disks have."""
    serves_sessions: bool = True
    """Whether a node that trains also serves sessions, with copies of its stage's weights."""
    serving_share: float = 0.5
    """Of a node that trains: the part of the device's time that is its sessions' as long as work of both waits."""

    def __post_init__(self) -> None:
        if bool(self.model) == bool(self.run_ids):
            raise UserError("say what to host: either --model, or --run for a stage of a training run")
        if len(set(self.run_ids)) < len(self.run_ids):
            raise UserError(
                "--run names a run twice: a node holds one stage of it; start another node for another stage"
            )
        if self.precision not in PRECISIONS:
            raise UserError(f"--precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise UserError(f"--device must be cpu, cuda or cuda:NUMBER, got {self.device!r}")
        positive = {
            "--cache-mib": self.cache_bytes,
            "--max-sessions": self.max_sessions,
            "--max-sessions-per-peer": self.max_sessions_per_peer,
            "--session-idle": self.session_idle_s,
            "--stash-expiry": self.stash_expiry_s,
            "--max-microbatch-tokens": self.max_microbatch_tokens,
            "--join-timeout": self.join_timeout_s,
            "--threads": 1 if self.threads is None else self.threads,
            "--num-blocks": 1 if self.num_blocks is None else self.num_blocks,
        }
        for flag, value in positive.items():
            if value <= 0:
                raise UserError(f"{flag} must be positive, got {value}")
        if not self.membership.donor_mib_per_s >= LEAST_DONOR_MIB_PER_S:
            raise UserError(
                f"--donor-mib must be {LEAST_DONOR_MIB_PER_S:g} or more, got {self.membership.donor_mib_per_s:g}: with less "
                "nobody gets a state before giving up"
            )
        if self.stash_bytes < 0:
            raise UserError(f"--stash-mib must not be negative, got {self.stash_bytes / 2**20:.0f}")
        if not self.max_perplexity_change >= 0:
            raise UserError(f"--max-perplexity-change must be 0 percent or more, got {self.max_perplexity_change}")
        if not 3 <= self.record_lifetime_s <= 300:
            raise UserError(f"--record-lifetime must be 3 to 300 seconds, got {self.record_lifetime_s}")
        if not 0 < self.serving_share < 1:
            raise UserError(f"--serving-share must be more than 0 and less than 1, got {self.serving_share}")
        if self.use_relay and not self.initial_peers:
            raise UserError("--relay needs --initial-peers, which do the relaying")
        if self.blocks is not None and self.num_blocks is not None and len(self.blocks) != self.num_blocks:
            raise UserError(
                f"--blocks {self.blocks} and --num-blocks {self.num_blocks} contradict each other; give one of them"
            )
