"""CodeStore: codes of blocks on this disk, so that a node that is started again need not quantise again. One file for each block."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path

import psutil
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from swarm import cache
from swarm.errors import UserError
from swarm.linears.quantize import FORMAT_VERSION, Codes
from swarm.tensor_files import digest_tensors

log = logging.getLogger(__name__)

_DIGEST = "digest"


class CodeStore:
    """Codes of one model in one numeric class. Never an error: a store that cannot be read or written is only slower.

    In the folder of converted models (swarm/cache.py), where `swarm cache` lists and removes it. A file is called by the digest of its
    block's weights, and says the digest of what it holds.
    """

    def __init__(self, cache_dir: Path | None, name: str, source: str, numeric_class: str) -> None:
        """Held until `close`: nobody removes it meanwhile."""
        root = cache.cache_root(cache_dir)
        subject = hashlib.sha256(source.encode()).hexdigest()[:32]
        self._folder: Path | None = None
        try:
            made_of = f"{numeric_class} of {source}"
            key = f"codes-{numeric_class}-{subject}-v{FORMAT_VERSION}"
            self._folder, self._lease = cache.obtain(root, key, lambda _: (name, made_of))
            _remove_leftovers(self._folder)
        except (UserError, OSError) as error:
            self._give_up(error)

    def read(self, digest: bytes) -> dict[str, dict[str, Tensor]]:
        """Codes' tensors of each linear of a block with these weights, memory-mapped. Empty: there are none, or they are damaged."""
        path = self._path_of(digest)
        if path is None or not path.exists():
            return {}
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                said = (file.metadata() or {}).get(_DIGEST)
            if digest_tensors(tensors).hex() != said:
                raise ValueError("its content is not what was written")
            return _by_linear(tensors)
        except (SafetensorError, OSError, ValueError) as error:
            log.warning("codes are made again, a file is damaged: file=%s reason=%s", path, error)
            return {}

    def write(self, digest: bytes, codes: Mapping[str, Codes]) -> None:
        """Keep the codes of a block."""
        path = self._path_of(digest)
        if path is None:
            return
        tensors = {f"{name}.{part}": tensor for name, one in codes.items() for part, tensor in one.tensors.items()}
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        partial = path.with_suffix(f".{os.getpid()}.partial")
        try:
            partial.write_bytes(save(tensors, {_DIGEST: digest_tensors(tensors).hex()}))
            partial.replace(path)
        except (SafetensorError, OSError) as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            self._give_up(error)

    def close(self) -> None:
        """What was read stays valid."""
        if self._folder is not None:
            self._lease.release()
            self._folder = None

    def _path_of(self, digest: bytes) -> Path | None:
        return None if self._folder is None else self._folder / f"{digest.hex()}.safetensors"

    def _give_up(self, error: Exception) -> None:
        log.warning("codes are not kept on this disk, each start makes them again: %s", error)
        self.close()


def _by_linear(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        linear, _, part = name.rpartition(".")
        found.setdefault(linear, {})[part] = tensor
    return found


def _remove_leftovers(folder: Path) -> None:
    """Of processes that died while they wrote."""
    for partial in folder.glob("*.partial"):
        pid = partial.suffixes[-2].removeprefix(".")
        if not pid.isdigit() or not psutil.pid_exists(int(pid)):
            partial.unlink(missing_ok=True)
