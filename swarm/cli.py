"""Command line of the client: swarm generate | chat | status | train | run | cache."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from swarm.errors import SwarmError
from swarm.flags import (
    RunIdType,
    announce_option,
    configure_logging,
    initial_peers_option,
    listen_option,
    log_level_option,
)
from swarm.light_start import leave_out, quick_imports
from swarm.openmp import spin_shortly
from swarm.run_cli import run, run_options, show_status

if TYPE_CHECKING:
    from swarm.client.blocking import Swarm

MIB = 2**20


class _OneLineErrors(click.Group):
    """Errors that a user can act on become one line on stderr and exit code 1; Ctrl-C becomes 130."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SwarmError as error:
            click.echo(f"swarm: {error}", err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            click.echo("\nswarm: interrupted", err=True)
            ctx.exit(130)


@click.group(cls=_OneLineErrors, context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Use a language model that is spread over a shardswarm."""


def _client_options(command: Callable[..., Any]) -> Callable[..., Any]:
    options = [
        initial_peers_option(required=True),
        click.option(
            "--model",
            default="smollm2-135m",
            show_default=True,
            help="Alias, hub id, directory, GGUF file, or run:RUN_ID[@EPOCH].",
        ),
        click.option("--run", "run_id", type=RunIdType(), help="The newest weights of this training run."),
        click.option(
            "--timeout",
            "request_timeout_s",
            type=click.FloatRange(min=0.1),
            default=30.0,
            show_default=True,
            metavar="SECONDS",
            help="Bound on everything that is waited for.",
        ),
        click.option("--cache-dir", type=click.Path(path_type=Path), help="Where converted models are kept."),
        log_level_option("warning"),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _sampling_options(command: Callable[..., Any]) -> Callable[..., Any]:
    options = [
        click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True),
        click.option(
            "--temperature", type=click.FloatRange(min=0.0), default=0.0, show_default=True, help="0: greedy."
        ),
        click.option("--top-p", type=click.FloatRange(min=0.0, max=1.0), help="Sample from this probability mass."),
        click.option("--top-k", type=click.IntRange(min=1), help="Sample from this many tokens."),
        click.option("--seed", type=int, help="Makes sampling repeatable."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _connect(flags: dict[str, Any]) -> Swarm:
    """Connect as the common flags say; before transformers' models are imported, so that a swarm that cannot be reached is known early."""
    configure_logging(flags["log_level"])
    with quick_imports():
        from swarm.client.blocking import Swarm
    from swarm.client.config import ClientConfig

    timeout_s = flags["request_timeout_s"]
    config = ClientConfig(
        model=flags["model"] if flags["run_id"] is None else f"run:{flags['run_id'].hex()}",
        initial_peers=flags["initial_peers"],
        request_timeout_s=timeout_s,
        join_timeout_s=min(15.0, timeout_s),
        patience_s=min(6.0, timeout_s),
        cache_dir=flags["cache_dir"],
    )
    return Swarm(config)


@cli.command()
@click.argument("prompt")
@_client_options
@_sampling_options
@click.option("--chat", "as_chat", is_flag=True, help="Put the prompt into the model's chat template.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of streaming the text.")
def generate(prompt: str, as_chat: bool, as_json: bool, **flags: Any) -> None:
    """Continue PROMPT, and say through which nodes and how fast."""
    if not prompt:
        raise click.UsageError("the prompt is empty")
    with _connect(flags) as swarm:
        with quick_imports():
            from swarm.client.terminal_chat import generate_once

        generate_once(swarm, prompt, flags, as_chat=as_chat, as_json=as_json)


@cli.command()
@_client_options
@_sampling_options
@click.option(
    "--max-length",
    type=click.IntRange(min=8),
    default=2048,
    show_default=True,
    help="Tokens of the whole conversation.",
)
@click.option("--system", "system_prompt", help="System prompt.")
@click.option("--follow", is_flag=True, help="With a run: go on with its newest weights at each turn.")
def chat(max_length: int, system_prompt: str | None, follow: bool, **flags: Any) -> None:
    """Talk with the model; empty line or Ctrl-D ends it."""

    first = [_connect(flags)]  # before transformers is imported, as always
    with quick_imports():
        from swarm.client.terminal_chat import chat_loop

    chat_loop(
        lambda: first.pop() if first else _connect(flags),
        flags,
        max_length=max_length,
        system_prompt=system_prompt,
        follow=follow,
    )


@cli.command()
@initial_peers_option(required=True)
@click.option("--model", help="Only nodes that serve a model of this name.")
@click.option("--run", "run_id", type=RunIdType(), help="The members of this training run, and how far it is.")
@click.option(
    "--timeout", "timeout_s", type=click.FloatRange(min=0.1), default=15.0, show_default=True, metavar="SECONDS"
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@log_level_option("warning")
@click.option("--cache-dir", type=click.Path(path_type=Path), help="Where runs are kept.")
def status(
    initial_peers: tuple[str, ...],
    model: str | None,
    run_id: bytes | None,
    timeout_s: float,
    as_json: bool,
    log_level: str,
    cache_dir: Path | None,
) -> None:
    """Who serves which blocks, how fast, since when; with --run, who trains which stage."""
    if model and run_id:
        raise click.UsageError("--model and --run ask for different things: give one of them")
    configure_logging(log_level)
    if run_id is not None:
        show_status(run_id, initial_peers, timeout_s, cache_dir, as_json=as_json)
        return
    from swarm.client.status import fetch_records, records_as_json, records_as_table

    records = fetch_records(initial_peers, model, timeout_s)
    if as_json:
        click.echo(json.dumps(records_as_json(records, time.time())))
    else:
        records_as_table(records, time.time(), sys.stdout)


@cli.command()
@click.argument("run_id", type=RunIdType())
@initial_peers_option(required=True)
@click.option(
    "--data",
    type=click.Path(exists=True, path_type=Path),
    help="Folder with the run's files, if they are not where its rules say; in runs with private data your own text.",
)
@click.option("--held-out", type=click.Path(exists=True, path_type=Path), help="Folder with the run's held-out files.")
@click.option(
    "--in-flight",
    "max_in_flight",
    type=click.IntRange(1, 32),
    default=4,
    show_default=True,
    help="Microbatches under way at the same time.",
)
@click.option(
    "--workers",
    "num_workers",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Processes that tokenise.",
)
@click.option("--threads", type=click.IntRange(min=1), help="Threads for embedding and head.")
@click.option("--log-file", type=click.Path(path_type=Path), help="Append a line of JSON for every epoch to this file.")
@click.option("--tensorboard", type=click.Path(path_type=Path), help="Write TensorBoard events into this folder.")
@click.option("--json", "as_json", is_flag=True, help="Print a line of JSON for every epoch instead of the live view.")
@listen_option
@announce_option
@click.option("--identity", type=click.Path(path_type=Path), help="File with this trainer's key; made if missing.")
@click.option("--cache-dir", type=click.Path(path_type=Path), help="Where runs are kept.")
@log_level_option("warning")
def train(
    log_level: str, log_file: Path | None, tensorboard: Path | None, as_json: bool, num_workers: int, **flags: Any
) -> None:
    """Feed microbatches of a run's data through its stages, until its end or Ctrl-C."""
    configure_logging(log_level)
    spin_shortly()
    from swarm.client.trainer_config import TrainerConfig

    with quick_imports():
        from swarm.client.training_run import run_trainer

    config = TrainerConfig(**flags, num_workers=num_workers)
    sys.exit(run_trainer(config, log_file=log_file, tensorboard=tensorboard, as_json=as_json))


@cli.command()
@click.option("--run", "run_id", type=RunIdType(), required=True, help="The run's id.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder to write; it must not exist, or be empty, but with --every.",
)
@click.option("--epoch", type=click.IntRange(min=0), help="Of which checkpoint; the newest unless given.")
@click.option(
    "--precision", type=click.Choice(["fp32", "bf16", "fp16"]), default="fp32", show_default=True, help="Of the files."
)
@click.option(
    "--moments", "with_moments", is_flag=True, help="Keep beside the weights what `swarm run restore` needs to go on."
)
@click.option(
    "--every",
    type=click.IntRange(min=1),
    metavar="N",
    help="Go on, until Ctrl-C or the run's end: each checkpoint of a multiple of N epochs, and the last, with --moments, as OUT/epoch-000123.",
)
@click.option("--keep", type=click.IntRange(min=1), metavar="K", help="With --every: only the newest K.")
@run_options(peers_required=True, timeout_s=30.0)
def export(
    run_id: bytes,
    out: Path,
    epoch: int | None,
    precision: str,
    with_moments: bool,
    every: int | None,
    keep: int | None,
    log_level: str,
    **flags: Any,
) -> None:
    """Write the weights of a run, as its members have saved them: a Hugging Face checkpoint, or adapters as PEFT has them."""
    if every is not None and epoch is not None:
        raise click.UsageError("--every takes each checkpoint that comes, --epoch one: give one of them")
    if every is None and keep is not None:
        raise click.UsageError("--keep says how many of --every are kept: give both")
    configure_logging(log_level)
    with quick_imports():
        import torch

        from swarm.client.export import Exported, export_run
        from swarm.client.export_series import export_checkpoints

    def tell(exported: Exported) -> None:
        loss = "" if exported.loss is None else f", loss {exported.loss:.4f}"
        parameters = f"{exported.num_parameters:,} parameters in {precision}"
        click.echo(f"{exported.out}: epoch {exported.place.epoch}{loss}, {parameters}")

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    if every is None:
        tell(export_run(run_id, out=out, epoch=epoch, dtype=dtype, with_moments=with_moments, **flags))
    else:
        export_checkpoints(run_id, out=out, every=every, keep=keep, dtype=dtype, on_exported=tell, **flags)


cli.add_command(run)


@cli.group()
def cache() -> None:
    """Model files on this machine."""


@cache.command("list")
@click.option("--cache-dir", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True)
def cache_list(cache_dir: Path | None, as_json: bool) -> None:
    """What is kept, where, and how large it is."""
    from swarm.cache import list_cache

    entries = list_cache(cache_dir)
    if as_json:
        rows = [
            {"name": e.name, "source": e.source, "bytes": e.bytes, "last_used": e.last_used, "path": str(e.path)}
            for e in entries
        ]
        click.echo(json.dumps(rows))
        return
    for entry in entries:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.last_used))
        click.echo(
            f"{entry.name:24} {entry.bytes / MIB:9.1f} MiB  last used {used}  {entry.source}\n{'':24} {entry.path}"
        )
    if not entries:
        click.echo("nothing is kept")


@cache.command("prune")
@click.argument("names", nargs=-1)
@click.option("--unused-days", type=click.FloatRange(min=0.0), help="Only what was not used for so many days.")
@click.option("--all", "everything", is_flag=True, help="Everything.")
@click.option("--cache-dir", type=click.Path(path_type=Path))
def cache_prune(names: tuple[str, ...], unused_days: float | None, everything: bool, cache_dir: Path | None) -> None:
    """Remove model files that are not in use: those of NAMES, those unused for some days, or all."""
    from swarm.cache import prune_cache

    removed = prune_cache(cache_dir, names=names, unused_days=unused_days, everything=everything)
    click.echo(f"removed {len(removed)} model(s), {sum(entry.bytes for entry in removed) / MIB:.1f} MiB")


@cache.command("fetch")
@click.argument("model")
@click.option("--cache-dir", type=click.Path(path_type=Path))
def cache_fetch(model: str, cache_dir: Path | None) -> None:
    """Download and convert MODEL now, so that nodes and clients start at once."""
    from swarm.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(model, cache_dir=cache_dir)
    spec = checkpoint.spec
    click.echo(
        f"{checkpoint.name}: {spec.num_blocks} blocks, {spec.digest.hex()[:8]}, from {checkpoint.source}", err=True
    )


def main() -> None:
    leave_out()
    cli(prog_name="swarm")
