"""Command line of runs: swarm run create | publish | show | restore | status | pause | resume | amend | end | eval | rollback."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from swarm.flags import RunIdType, configure_logging, initial_peers_option, log_level_option
from swarm.light_start import quick_imports


def run_options(*, peers_required: bool, timeout_s: float = 15.0) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """What every command about a run takes."""
    options = [
        initial_peers_option(required=peers_required),
        click.option(
            "--timeout",
            "timeout_s",
            type=click.FloatRange(min=0.1),
            default=timeout_s,
            show_default=True,
            metavar="SECONDS",
            help="Bound on joining the swarm, and on its answer.",
        ),
        click.option("--cache-dir", type=click.Path(path_type=Path), help="Where runs are kept."),
        log_level_option("warning"),
    ]

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return add


@click.group()
def run() -> None:
    """Training runs: make one, look at it, and steer it."""


@run.command("create")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@run_options(peers_required=True)
@click.option(
    "--identity",
    type=click.Path(path_type=Path),
    help="File with the key that signs the run; made if missing.  [default: owner.identity in the cache folder]",
)
@click.option(
    "--workers", type=click.IntRange(min=0), default=0, show_default=True, help="Processes that help to tokenise."
)
def run_create(
    file: Path,
    initial_peers: tuple[str, ...],
    timeout_s: float,
    cache_dir: Path | None,
    log_level: str,
    identity: Path | None,
    workers: int,
) -> None:
    """Make a run of the rules in FILE (a run.toml): sign them for ever, keep them here and publish them.

    Prints the run id. Everybody who takes part publishes the rules again.
    """
    configure_logging(log_level)
    from swarm.run_creation import create_run

    store = create_run(file, identity_path=identity, cache_dir=cache_dir, num_workers=workers)
    # First of all, so that it is not lost if the swarm cannot be reached.
    click.echo(store.run_id.hex())
    from swarm.client.runs import next_commands, publish_run

    publish_run(store, initial_peers, timeout_s)
    click.echo(next_commands(store, initial_peers[0]), err=True)


@run.command("publish")
@click.argument("run_id", type=RunIdType())
@run_options(peers_required=True)
def run_publish(
    run_id: bytes, initial_peers: tuple[str, ...], timeout_s: float, cache_dir: Path | None, log_level: str
) -> None:
    """Publish the rules of a run that is kept here again, for five minutes: those who take part do so by themselves."""
    configure_logging(log_level)
    from swarm.client.runs import next_commands, publish_run
    from swarm.run_store import RunStore

    store = RunStore.open(run_id, cache_dir)
    publish_run(store, initial_peers, timeout_s)
    click.echo(next_commands(store, initial_peers[0]), err=True)


@run.command("show")
@click.argument("run_id", type=RunIdType())
@run_options(peers_required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def run_show(
    run_id: bytes,
    initial_peers: tuple[str, ...],
    timeout_s: float,
    cache_dir: Path | None,
    log_level: str,
    as_json: bool,
) -> None:
    """The rules of a run, from this machine or from the swarm; they are kept."""
    configure_logging(log_level)
    from swarm.run_store import RunStore
    from swarm.run_text import run_as_json, run_as_text

    store = RunStore.find(run_id, cache_dir)
    if store is None:
        from swarm.client.runs import fetch_run

        store = fetch_run(run_id, initial_peers, timeout_s, cache_dir)
    click.echo(json.dumps(run_as_json(store)) if as_json else run_as_text(store))


@run.command("restore")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--stage",
    "stages",
    multiple=True,
    metavar="N",
    help="Only the state of this stage, or of the `ends`; may be given several times.  [default: all]",
)
@run_options(peers_required=False)
def run_restore(
    folder: Path,
    stages: tuple[str, ...],
    initial_peers: tuple[str, ...],
    timeout_s: float,
    cache_dir: Path | None,
    log_level: str,
) -> None:
    """Put a run that is gone back on this machine, from an export with --moments in FOLDER; members started here go on from it.

    Prints the run id. It is the same run, with the rules and the orders of its owner.
    """
    configure_logging(log_level)
    with quick_imports():
        from swarm.training.run_folder import restore_run

    restored = restore_run(folder, cache_dir, stages)
    store = restored.store
    click.echo(store.run_id.hex())
    from swarm.client.runs import commands_to_go_on, publish_run

    if initial_peers:
        publish_run(store, initial_peers, timeout_s)
    click.echo(commands_to_go_on(restored, initial_peers[0] if initial_peers else "MULTIADDR"), err=True)


def show_status(
    run_id: bytes, initial_peers: Sequence[str], timeout_s: float, cache_dir: Path | None, *, as_json: bool
) -> None:
    from swarm.client.run_status import fetch_run_status, status_as_json, status_as_table

    found = fetch_run_status(run_id, initial_peers, timeout_s, cache_dir)
    if as_json:
        click.echo(json.dumps(status_as_json(found, initial_peers[0], time.time())))
    else:
        status_as_table(found, initial_peers[0], sys.stdout)


@run.command("status")
@click.argument("run_id", type=RunIdType())
@run_options(peers_required=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def run_status(
    run_id: bytes,
    initial_peers: tuple[str, ...],
    timeout_s: float,
    cache_dir: Path | None,
    log_level: str,
    as_json: bool,
) -> None:
    """Who trains which stage, how far the run is, what it lacks and since when, and what its owner has said."""
    configure_logging(log_level)
    show_status(run_id, initial_peers, timeout_s, cache_dir, as_json=as_json)


def _owner_command(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A command of the run's owner, whose key signs what it says."""
    decorators = [
        run.command(name),
        click.argument("run_id", type=RunIdType()),
        run_options(peers_required=True, timeout_s=60.0),
        click.option(
            "--identity",
            type=click.Path(path_type=Path),
            help="File with the key that signed the run.  [default: owner.identity in the cache folder]",
        ),
    ]

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return add


def _say(method: str, flags: dict[str, Any], *arguments: object, **options: object) -> None:
    configure_logging(flags.pop("log_level"))
    with quick_imports():
        from swarm.client import owner

    run_id, initial_peers = flags.pop("run_id"), flags.pop("initial_peers")
    hand = owner.Owner(run_id, initial_peers, **flags)
    click.echo(getattr(hand, method)(*arguments, **options))


_at_option = click.option("--at", "epoch", type=click.IntRange(min=1), help="Epoch; the soonest possible unless given.")


@_owner_command("pause")
def run_pause(**flags: Any) -> None:
    """Let no epoch begin; one that has begun is finished. Everybody keeps what there is."""
    _say("pause", flags)


@_owner_command("resume")
def run_resume(**flags: Any) -> None:
    """Let a paused run go on."""
    _say("resume", flags)


@_owner_command("amend")
@click.option("--lr", type=click.FloatRange(min=0.0, min_open=True), help="Peak learning rate.")
@click.option("--batch", "target_batch", type=click.IntRange(min=1), help="Sequences per epoch.")
@click.option("--epochs", "num_epochs", type=click.IntRange(min=1), help="Where the run ends.")
@click.option(
    "--data",
    type=click.Path(exists=True, path_type=Path),
    help="File or folder of other training data, of the run's kind; every trainer needs it in its --data folder.",
)
@_at_option
def run_amend(
    lr: float | None,
    target_batch: int | None,
    num_epochs: int | None,
    data: Path | None,
    epoch: int | None,
    **flags: Any,
) -> None:
    """Change rules from an epoch on, for all members at once."""
    changes = {"lr": lr, "target_batch": target_batch, "num_epochs": num_epochs}
    if data is None and not any(changes.values()):
        raise click.UsageError("nothing to amend: give --lr, --batch, --epochs or --data")
    _say("amend", flags, changes, epoch, data=data)


@_owner_command("end")
@_at_option
def run_end(epoch: int | None, **flags: Any) -> None:
    """End the run before its time; all save their state there."""
    _say("end", flags, epoch)


@_owner_command("eval")
@_at_option
def run_eval(epoch: int | None, **flags: Any) -> None:
    """Evaluate on the held-out data in the next epoch, and print the loss."""
    _say("evaluate", flags, epoch)


@_owner_command("rollback")
@click.argument("epoch", type=click.IntRange(min=0))
def run_rollback(epoch: int, **flags: Any) -> None:
    """Go back to the checkpoint of EPOCH, which all stages must have on some disk; newer states are dropped."""
    _say("roll_back", flags, epoch)
