"""Command-line types and options that all our programs share. Imports nothing heavy: --help must be instant."""

from __future__ import annotations

import ipaddress
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from swarm.log_label import LabelFilter
from swarm.run_id import parse_run_id
from swarm.span import Span

Command = TypeVar("Command", bound=Callable[..., Any])

_MULTIADDR = re.compile(r"/(ip4|ip6|dns|dns4|dns6)/([^/\s]+)/(tcp|udp)/(\d{1,5})(/\S+)?")


class BlocksType(click.ParamType[Span]):
    """start:end"""

    name = "START:END"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Span:
        if isinstance(value, Span):
            return value
        try:
            return Span.parse(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class RunIdType(click.ParamType[bytes]):
    """A run id, in hexadecimal."""

    name = "RUN_ID"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> bytes:
        if isinstance(value, bytes):
            return value
        try:
            return parse_run_id(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class MultiaddrType(click.ParamType[str]):
    """A multiaddr; with peer=True it must end in /p2p/<peer id>."""

    name = "MULTIADDR"

    def __init__(self, *, peer: bool) -> None:
        self._peer = peer

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value).strip()
        example = "/ip4/203.0.113.7/tcp/31337" + ("/p2p/12D3KooW..." if self._peer else "")
        if not _is_multiaddr(text) or (self._peer and not re.search(r"/p2p/[1-9A-HJ-NP-Za-km-z]{32,}$", text)):
            self.fail(f"{text!r} is not a multiaddr such as {example}", param, ctx)
        return text


def _is_multiaddr(text: str) -> bool:
    match = _MULTIADDR.fullmatch(text)
    if match is None or int(match[4]) > 65535:
        return False
    if match[1] not in ("ip4", "ip6"):
        return True
    try:
        return f"ip{ipaddress.ip_address(match[2]).version}" == match[1]
    except ValueError:
        return False


def split_commas(_: click.Context, __: click.Parameter, values: Sequence[str]) -> tuple[str, ...]:
    """Several values may be given as several flags or separated by commas."""
    return tuple(part.strip() for value in values for part in str(value).split(",") if part.strip())


def peers(ctx: click.Context, param: click.Parameter, values: Sequence[str]) -> tuple[str, ...]:
    """Multiaddrs of peers, split at commas and checked."""
    kind = MultiaddrType(peer=True)
    return tuple(kind.convert(value, param, ctx) for value in split_commas(ctx, param, values))


def addresses(ctx: click.Context, param: click.Parameter, values: Sequence[str]) -> tuple[str, ...]:
    """Multiaddrs to listen on or announce, split at commas and checked."""
    kind = MultiaddrType(peer=False)
    return tuple(kind.convert(value, param, ctx) for value in split_commas(ctx, param, values))


def initial_peers_option(*, required: bool) -> Callable[[Command], Command]:
    """--initial-peers, also from SHARDSWARM_INITIAL_PEERS."""
    return click.option(
        "--initial-peers",
        multiple=True,
        callback=peers,
        required=required,
        envvar="SHARDSWARM_INITIAL_PEERS",
        metavar="MULTIADDR[,...]",
        help="Peers of the swarm to join, as printed by swarm-bootstrap. May be given several times.",
    )


listen_option = click.option(
    "--listen",
    multiple=True,
    callback=addresses,
    default=["/ip4/127.0.0.1/tcp/0"],
    show_default=True,
    metavar="MULTIADDR",
    help="Where to listen. Use /ip4/0.0.0.0/tcp/PORT to be reachable from other machines.",
)
announce_option = click.option(
    "--announce",
    multiple=True,
    callback=addresses,
    metavar="MULTIADDR",
    help="Address to tell others instead of the one listened on (port forwarding).",
)


def log_level_option(default: str) -> Callable[[Command], Command]:
    """--log-level, for configure_logging."""
    return click.option(
        "--log-level",
        type=click.Choice(["debug", "info", "warning", "error"]),
        default=default,
        show_default=True,
        help="Log to stderr from this level up.",
    )


def configure_logging(level: str) -> None:
    handler = logging.StreamHandler()
    handler.addFilter(LabelFilter())
    format = "%(asctime)s %(levelname).1s %(name)s %(label)s%(message)s"
    logging.basicConfig(level=level.upper(), format=format, handlers=[handler])
    for noisy in ("asyncio", "urllib3", "filelock", "httpx", "httpcore", "huggingface_hub", "transformers"):
        logging.getLogger(noisy).setLevel("WARNING")


def load_config_file(ctx: click.Context, _: click.Parameter, path: Path | None) -> None:
    """Values of a TOML file become the defaults of the command's flags; an unknown key is an error."""
    if path is None:
        return
    import tomllib

    try:
        values = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise click.BadParameter(f"cannot read {path}: {error}") from error
    # A key is a flag without its dashes; click wants the name of the parameter behind it.
    parameters = [parameter for parameter in ctx.command.params if parameter.name not in ("config", "help")]
    names = {
        option.lstrip("-").replace("-", "_"): parameter.name for parameter in parameters for option in parameter.opts
    }
    flags = {key.replace("-", "_"): value for key, value in values.items()}
    unknown = sorted(flags.keys() - names.keys())
    if unknown:
        raise click.BadParameter(f"{path}: unknown key {', '.join(unknown)}; known are {', '.join(sorted(names))}")
    for parameter in parameters:  # one value of a flag that may be given several times need not be a list
        if isinstance(parameter, click.Option) and parameter.multiple:
            flags.update(
                {
                    key: [value]
                    for key, value in flags.items()
                    if names[key] == parameter.name and isinstance(value, str)
                }
            )
    ctx.default_map = {**{str(names[key]): value for key, value in flags.items()}, **(ctx.default_map or {})}


config_option = click.option(
    "--config",
    type=click.Path(path_type=Path),
    is_eager=True,
    expose_value=False,
    callback=load_config_file,
    help="TOML file whose keys are these flags; flags and environment win over it.",
)
