"""What `swarm train` does: a trainer with its logs and its live view."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swarm.client.runs import fetch_run
from swarm.client.trainer import Trainer, open_trainer
from swarm.client.trainer_config import TrainerConfig
from swarm.epoch.messages import Commit
from swarm.errors import UserError
from swarm.run_store import RunStore
from swarm.signals import Signals
from swarm.training.tokenizer_pool import TokenizerPool

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EpochReport:
    """One line of the log."""

    epoch: int
    loss: float
    """Mean over the epoch's loss tokens, of all trainers; of the weights before its step."""
    validation_loss: float | None
    norm: float
    lr: float
    num_epochs: int
    """Of the run, as its owner has it."""
    num_loss_tokens: int
    seconds: float
    tokens_per_s: float
    replicas: tuple[int, ...]
    """Of each stage and, last, trainers."""
    bytes_averaged: int
    """That this trainer has sent in exchanges, in all."""
    is_skipped: bool

    def as_json(self) -> dict[str, Any]:
        plain = {name: getattr(self, name) for name in self.__slots__}
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in plain.items()}


class Reporter:
    """Turns commits into reports, for whoever listens."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._last = time.monotonic()
        self.reports: deque[EpochReport] = deque(maxlen=1000)

    def report(self, commit: Commit) -> EpochReport:
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        course = self._trainer.membership.course
        orders = course.orders_of(commit)
        spec = orders.spec_at(course.spec, commit.epoch)
        counts = Counter(stage for _, stage in commit.members)
        report = EpochReport(
            epoch=commit.epoch,
            loss=math.nan if commit.loss is None else commit.loss,
            validation_loss=commit.eval_loss,
            norm=commit.norm,
            lr=spec.optimizer.lr_at(commit.epoch, spec.num_epochs),
            num_loss_tokens=commit.num_loss_tokens,
            seconds=round(seconds, 3),
            tokens_per_s=round(commit.num_loss_tokens / max(seconds, 1e-6), 1),
            num_epochs=orders.planned_end(course.spec),
            replicas=tuple(counts[stage] for stage in range(spec.num_stages)),
            bytes_averaged=self._trainer.membership.counters.bytes_averaged,
            is_skipped=commit.is_skipped,
        )
        self.reports.append(report)
        return report


def run_trainer(
    config: TrainerConfig, *, log_file: Path | None = None, tensorboard: Path | None = None, as_json: bool = False
) -> int:
    """Train until the run's end, SIGTERM or SIGINT. The exit code."""
    import uvloop

    store = RunStore.find(config.run_id, config.cache_dir) or fetch_run(
        config.run_id, config.initial_peers, config.join_timeout_s, config.cache_dir
    )
    with contextlib.ExitStack() as stack:
        pool = None
        if config.num_workers and not store.missing():  # before p2pd, which a process that starts later would inherit
            pool = stack.enter_context(TokenizerPool(config.num_workers, store.tokenizer_folder()))
        writers = [stack.enter_context(_jsonl(log_file))] if log_file is not None else []
        if tensorboard is not None:
            writers.append(stack.enter_context(_tensorboard(tensorboard)))
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_train(config, pool, writers, as_json))
    return 0


async def _train(config: TrainerConfig, pool: TokenizerPool | None, writers: list[Any], as_json: bool) -> None:
    async with contextlib.AsyncExitStack() as stack:
        signals = Signals(stack)
        trainer = await stack.enter_async_context(open_trainer(config, pool))
        reporter = Reporter(trainer)
        show = _print_json if as_json else stack.enter_context(_live_view(trainer, reporter))

        def on_commit(commit: Commit) -> None:
            report = reporter.report(commit)
            for write in (*writers, show):
                write(report)

        trainer.membership.on_commit.append(on_commit)
        if as_json:
            ready = {"peer_id": trainer.membership.host.peer_id, "run": config.run_id.hex()}
            print("READY " + json.dumps(ready), flush=True)
        waiting = [asyncio.create_task(e.wait()) for e in (signals.stop, trainer.done)]
        died = asyncio.create_task(trainer.membership.host.wait_until_dead())
        try:
            await asyncio.wait([*waiting, died], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (*waiting, died):
                task.cancel()
            await asyncio.wait([*waiting, died])
        if trainer.failure is not None:
            raise trainer.failure
        if not (signals.stop.is_set() or trainer.done.is_set()):
            raise UserError("the network daemon (p2pd) of this trainer died; start it again")


def _print_json(report: EpochReport) -> None:
    print(json.dumps(report.as_json()), flush=True)


@contextlib.contextmanager
def _jsonl(path: Path) -> Iterator[Any]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; choose another --log-file") from error
    with file:

        def write(report: EpochReport) -> None:
            file.write(json.dumps(report.as_json()) + "\n")
            file.flush()

        yield write


@contextlib.contextmanager
def _tensorboard(folder: Path) -> Iterator[Any]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("--tensorboard needs the package tensorboard: pip install 'shardswarm[train]'") from error
    with SummaryWriter(str(folder)) as writer:

        def write(report: EpochReport) -> None:
            for name in ("loss", "validation_loss", "norm", "lr", "tokens_per_s"):
                if (value := getattr(report, name)) is not None:
                    writer.add_scalar(name, value, report.epoch)

        yield write


@contextlib.contextmanager
def _live_view(trainer: Trainer, reporter: Reporter) -> Iterator[Any]:
    """A table that is redrawn after every epoch; in a pipe, a line for each."""
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

    console = Console()
    spec = trainer.spec
    if not console.is_terminal:

        def line(report: EpochReport) -> None:
            console.print(" ".join(_cells(report)))

        yield line
        return

    def table() -> Table:
        grid = Table(title=f"{spec.name}  ({trainer.store.run_id.hex()[:8]})", title_justify="left")
        for title in ("epoch", "loss", "validation", "tokens/s", "replicas by stage + trainers", "averaged"):
            grid.add_column(title, justify="right")
        for report in list(reporter.reports)[-12:]:
            grid.add_row(*_cells(report))
        if not reporter.reports:
            grid.caption = "waiting for the first epoch to complete"
        return grid

    with Live(table(), console=console, auto_refresh=False) as live:
        yield lambda report: live.update(table(), refresh=True)


def _cells(report: EpochReport) -> list[str]:
    *stages, trainers = report.replicas
    return [
        f"{report.epoch + 1}/{report.num_epochs}",
        "skipped" if report.is_skipped else f"{report.loss:.4f}",
        "-" if report.validation_loss is None else f"{report.validation_loss:.4f}",
        f"{report.tokens_per_s:,.0f}",
        f"{'+'.join(map(str, stages))} + {trainers}",
        f"{report.bytes_averaged / 2**20:.1f} MiB",
    ]
