"""The files that make a tokenizer, and the tokenizer that they make."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swarm.checkpoint import TOKENIZER_FILES
from swarm.errors import ModelNotFound, UserError
from swarm.terminal import quiet_libraries

# Beside those of TOKENIZER_FILES, which hold a vocabulary.
_COMPANIONS = frozenset(
    {
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "merges.txt",
        "chat_template.jinja",
        "chat_template.json",
    }
)


def find_tokenizer_files(folder: Path) -> dict[str, Path]:
    """The files in a folder that make its tokenizer, by name. Raises ModelNotFound if there is no vocabulary among them."""
    names = sorted(TOKENIZER_FILES | _COMPANIONS)
    files = {name: folder / name for name in names if (folder / name).is_file()}
    if not files.keys() & TOKENIZER_FILES:
        raise ModelNotFound(f"{folder} has no tokenizer.json: give the folder of a tokenizer or of a whole checkpoint")
    return files


def read_tokenizer_files(files: Mapping[str, Path]) -> dict[str, bytes]:
    """Their contents. Raises UserError."""
    try:
        return {name: path.read_bytes() for name, path in files.items()}
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error


def load_tokenizer(folder: Path) -> Any:
    """The transformers tokenizer of a folder. Code that comes with it is never run. Raises UserError."""
    from transformers import AutoTokenizer

    try:
        with quiet_libraries():
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(f"cannot use the tokenizer in {folder}: {reason}") from error
