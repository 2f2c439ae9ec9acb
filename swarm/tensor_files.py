"""Safetensors files and their index: headers, tensors by name, and the digest of tensors. Every byte may be hostile."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from swarm.errors import UserError
from swarm.model_spec import TensorBytes, tensors_digest

if TYPE_CHECKING:
    from torch import Tensor

MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """What the header of a safetensors file says of one tensor."""

    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


def digest_tensors(tensors: Mapping[str, Tensor]) -> bytes:
    """Digest of tensors under their full names in the checkpoint; reads each once, copies none that is contiguous."""
    return tensors_digest(_tensor_bytes(name, tensor) for name, tensor in tensors.items())


def read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError("weight_map is empty")
        for key, name in weight_map.items():
            if not isinstance(name, str) or PurePosixPath(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"{key} is said to be in {name!r}, which is no safetensors file beside the index")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot use {path}: {error}; copy or download it again") from error
    return weight_map


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Header of a safetensors file, checked against the file's size. Raises UserError for a damaged file."""
    try:
        file_bytes = path.stat().st_size
        with open(path, "rb") as file:
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            if header_bytes > min(MAX_HEADER_BYTES, file_bytes - 8):
                raise ValueError("the header is longer than the file")
            header = json.loads(file.read(header_bytes))
        header.pop("__metadata__", None)
        tensors = {
            key: StoredTensor(
                str(entry["dtype"]),
                tuple(map(int, entry["shape"])),
                entry["data_offsets"][1] - entry["data_offsets"][0],
            )
            for key, entry in header.items()
        }
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if 8 + header_bytes + end != file_bytes:
            raise ValueError(f"it has {file_bytes} bytes and should have {8 + header_bytes + end}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, struct.error) as error:
        raise UserError(f"{path} is damaged or incomplete ({error}): copy or download it again") from error
    return tensors


def read_tensors(path: Path, names: Sequence[str]) -> dict[str, Tensor]:
    """Those tensors of a safetensors file, memory-mapped, on the CPU. Raises UserError for a damaged file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot read {path}: {error}; copy or download it again") from error


def _tensor_bytes(name: str, tensor: Tensor) -> TensorBytes:
    import torch

    content: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return TensorBytes(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), memoryview(content))
