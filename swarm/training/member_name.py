"""The name of a member: which peer, and of which stage it holds a replica. One peer may be several members of a run."""

from __future__ import annotations


def member_name(peer_id: str, stage: int) -> str:
    return f"{peer_id}/{stage}"


def peer_of(name: str) -> str:
    """The peer id in a member's name; what is no name is returned as it is, and is nobody's."""
    return name.partition("/")[0]


def stage_of(name: str) -> int:
    """-1 for what is no name."""
    text = name.partition("/")[2]
    return int(text) if text.isascii() and text.isdigit() else -1
