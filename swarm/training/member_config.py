"""How a member of a run behaves. All times in seconds. Imports nothing heavy: command lines read it before they parse."""

from __future__ import annotations

from dataclasses import dataclass, field

RUN_PROTOCOL = "shardswarm/run"  # libp2p protocol id of the streams between members

LEAST_DONOR_MIB_PER_S = 1.0
"""Below this who asks for a saved state would give up before its pieces come."""


@dataclass(frozen=True, slots=True)
class LinkConfig:
    """How long a peer may be silent."""

    connect_timeout_s: float = 5.0
    ping_every_s: float = 1.0
    ping_timeout_s: float = 6.0


@dataclass(frozen=True, slots=True)
class MembershipConfig:
    """How a member behaves; all times in seconds."""

    tick_s: float = 1.0
    impatient_after_ticks: int = 4
    search_every_s: float = 3.0
    give_up_s: float = 600.0
    """A lost peer is looked for where it was, for so long."""
    record_lifetime_s: float = 30.0
    roll_back_after_s: float = 60.0
    """A run that stands still because nobody has a stage's newest state goes back to a checkpoint after so long."""
    round_timeout_s: float = 600.0
    download_timeout_s: float = 3600.0
    donor_mib_per_s: float = 32.0
    """What it gives of saved states to newcomers and exports, all together."""
    links: LinkConfig = field(default_factory=LinkConfig)
