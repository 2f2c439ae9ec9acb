"""What `swarm status` shows: who serves which blocks, how fast, since when."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

from swarm.client.runs import in_swarm
from swarm.p2p.directory import Directory
from swarm.p2p.host import Host
from swarm.records import ShardRecord, ShardState
from swarm.routing import missing_spans
from swarm.span import Span


def fetch_records(initial_peers: Sequence[str], model: str | None, timeout_s: float) -> list[ShardRecord]:
    """Records of the whole swarm, or of the nodes that serve a model of this name. Raises JoinFailed or RouteBroken in time."""

    async def fetch(_: Host, directory: Directory) -> list[ShardRecord]:
        return await (directory.find_name(model) if model else directory.find_all())

    return in_swarm(initial_peers, timeout_s, fetch)


def _by_model(records: Iterable[ShardRecord]) -> dict[tuple[str, bytes], list[ShardRecord]]:
    models: dict[tuple[str, bytes], list[ShardRecord]] = defaultdict(list)
    for record in sorted(records, key=lambda r: (r.model_name, r.model_digest, r.span, r.peer_id)):
        models[record.model_name, record.model_digest].append(record)
    return models


def _missing(records: Sequence[ShardRecord]) -> list[Span]:
    online = [record.span for record in records if record.state == ShardState.ONLINE]
    return missing_spans(online, Span(0, records[0].num_blocks))


def records_as_json(records: Iterable[ShardRecord], now: float) -> dict[str, Any]:
    """The same as the table, for scripts."""
    return {
        "models": [
            {
                "model": name,
                "digest": digest.hex(),
                "num_blocks": shards[0].num_blocks,
                "unserved_blocks": [str(span) for span in _missing(shards)],
                "nodes": [
                    {
                        "peer_id": record.peer_id,
                        "span": str(record.span),
                        "state": record.state.name,
                        "numeric_class": record.numeric_class,
                        "decode_ms_per_block": round(1000 * record.decode_s_per_block, 3),
                        "prefill_tokens_per_s": round(record.prefill_tokens_per_s, 1),
                        "online_s": round(now - record.started_at, 1),
                        "source": record.source,
                        "software": record.software,
                        "addresses": list(record.addresses),
                    }
                    for record in shards
                ],
            }
            for (name, digest), shards in _by_model(records).items()
        ]
    }


def records_as_table(records: Sequence[ShardRecord], now: float, out: TextIO) -> None:
    """A table for each model."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=out)
    if not records:
        console.print("No node serves anything in this swarm.")
    for (name, digest), shards in _by_model(records).items():
        missing = _missing(shards)
        health = "all blocks served" if not missing else f"NOT served: blocks {', '.join(map(str, missing))}"
        # What peers wrote goes in as Text, so that it is not taken for markup.
        title = Text(f"{name} ({digest.hex()[:8]}), {shards[0].num_blocks} blocks: {health}")
        table = Table(title=title, title_justify="left")
        for column in ("peer", "blocks", "state", "class", "ms/block", "prefill tok/s", "since", "weights from"):
            table.add_column(column, overflow="fold")
        for record in shards:
            table.add_row(
                Text(record.peer_id[-8:]),
                str(record.span),
                record.state.name,
                Text(record.numeric_class),
                f"{1000 * record.decode_s_per_block:.2f}" if record.decode_s_per_block else "-",
                f"{record.prefill_tokens_per_s:.0f}" if record.prefill_tokens_per_s else "-",
                _duration(now - record.started_at),
                Text(record.source),
            )
        console.print(table)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
