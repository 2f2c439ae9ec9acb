"""What this machine keeps of each run: the signed rules, and the files that they name by digest.

    ROOT/runs/RUN_ID/spec.bin               the signed rules, as they are in the DHT
    ROOT/runs/RUN_ID/manifest.json          of the training data
    ROOT/runs/RUN_ID/held_out_manifest.json
    ROOT/runs/RUN_ID/tokenizer/             its files, under their names
    ROOT/runs/RUN_ID/manifest-DIGEST.json   of training data that the owner has amended the rules with
    ROOT/runs/RUN_ID/orders.bin             the newest signed orders of its owner, if there are any

ROOT is the cache (swarm/cache.py). Files are written beside their place and moved there, and checked whenever they are read.
Whoever takes part gets the rules from the DHT and the files from other peers: `missing` says which, `put` keeps them.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import Any

from swarm.cache import cache_root, disk_error
from swarm.errors import UserError
from swarm.run_orders import Orders, open_orders
from swarm.run_spec import DataSpec, RunSpec, certified_run_id, open_spec
from swarm.tokenizer_files import load_tokenizer

SPEC_FILE = "spec.bin"
ORDERS_FILE = "orders.bin"
MANIFEST_FILE = "manifest.json"
HELD_OUT_MANIFEST_FILE = "held_out_manifest.json"
TOKENIZER_FOLDER = "tokenizer"
# Of a file from a peer. The largest vocabularies have some 35 MB; a manifest has less than 100 bytes for each chunk of data.
MAX_ARTIFACT_BYTES = 256 * 2**20


class RunStore:
    """One run on this disk. Made by `RunStore.save`, `RunStore.open` or `RunStore.find`; anywhere else by `RunStore.load`."""

    def __init__(self, folder: Path, run_id: bytes, raw: bytes) -> None:
        """ValueError if raw is not the signed rules of this run."""
        self.folder = folder
        self.run_id = run_id
        self.raw = raw
        """The signed rules, for publish_run."""
        self.spec: RunSpec
        self.owner: str
        self.spec, self.owner = open_spec(raw, run_id)
        self._names = _names_of(self.spec)
        self._learned: set[bytes] = set()
        self.is_taking_offer = False
        """Whether a peer is handing over a file just now: one at a time."""

    @classmethod
    def save(cls, raw: bytes, run_id: bytes, cache_dir: Path | None = None) -> RunStore:
        """Keep the signed rules of a run, from the DHT or just made. ValueError if they are not of this run."""
        store = cls(folder_of_run(run_id, cache_dir), run_id, raw)
        store._write(SPEC_FILE, raw)
        return store

    @classmethod
    def find(cls, run_id: bytes, cache_dir: Path | None = None) -> RunStore | None:
        """The run, if its rules are on this disk and whole."""
        folder = folder_of_run(run_id, cache_dir)
        try:
            return cls(folder, run_id, (folder / SPEC_FILE).read_bytes())
        except (OSError, ValueError):
            return None

    @classmethod
    def open(cls, run_id: bytes, cache_dir: Path | None = None) -> RunStore:
        """The run. Raises UserError if its rules are not on this disk, or damaged."""
        store = cls.find(run_id, cache_dir)
        if store is None:
            raise UserError(
                f"run {run_id.hex()} is not kept in {folder_of_run(run_id, cache_dir)}: fetch it with `swarm run show`"
            )
        return store

    @classmethod
    def load(cls, folder: Path) -> RunStore:
        """Whichever run is in a folder of this layout, not in the cache. Raises UserError."""
        try:
            raw = (folder / SPEC_FILE).read_bytes()
            return cls(folder, certified_run_id(raw), raw)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise UserError(f"{folder} holds no run: {SPEC_FILE} cannot be used ({reason})") from error

    def copy_to(self, folder: Path) -> RunStore:
        """The same rules and files in another folder. Raises UserError, also if a file is missing here."""
        copy = RunStore(folder, self.run_id, self.raw)
        copy._names = dict(self._names)
        for digest in self._names:
            copy.put(digest, self.read(digest))
        copy._write(SPEC_FILE, self.raw)
        return copy

    def artifacts(self) -> dict[bytes, Path]:
        """Where each file that the rules name by digest is, or belongs: SHA-256 of tokenizer files, 16 bytes of manifests."""
        return {digest: self.folder / names[0] for digest, names in self._names.items()}

    def missing(self, wanted: Collection[bytes] | None = None) -> list[bytes]:
        """Digests of the files that are not here, or not as the rules say. wanted: of these alone."""
        return [digest for digest in self._names if (wanted is None or digest in wanted) and self.is_missing(digest)]

    def is_missing(self, digest: bytes) -> bool:
        """Whether the run names such a file, and it is not here as it should be."""
        return any(self._read(name, digest) is None for name in self._names.get(digest, ()))

    def artifact(self, digest: bytes) -> Path:
        """Where the file of this digest is, checked. Raises UserError if it is missing or damaged, KeyError if the run has none."""
        self.read(digest)
        return self.folder / self._names[digest][0]

    def read(self, digest: bytes) -> bytes:
        """The content of the file of this digest, checked. Raises as `artifact`."""
        name = self._names[digest][0]
        content = self._read(name, digest)
        if content is None:
            raise UserError(
                f"{self.folder / name} is missing or damaged: it must be fetched again from a peer that takes part in the run"
            )
        return content

    def put(self, digest: bytes, content: bytes) -> Path:
        """Keep a file. ValueError if it is not what the rules say, KeyError if they name no such file."""
        names = self._names[digest]
        if len(content) > MAX_ARTIFACT_BYTES or artifact_digest(content)[: len(digest)] != digest:
            raise ValueError(f"these {len(content)} bytes are not the run's {names[0]}")
        for name in names:
            self._write(name, content)
        return self.folder / names[0]

    def learn(self, data: DataSpec) -> None:
        """The owner has amended the rules with this data: its manifest belongs to the run's files from now on."""
        if data.manifest_digest not in self._names:
            self._names[data.manifest_digest] = [f"manifest-{data.manifest_digest.hex()}.json"]
            self._learned.add(data.manifest_digest)

    def is_learned(self, digest: bytes) -> bool:
        """Whether it is the manifest of data that the owner has amended the rules with."""
        return digest in self._learned

    def manifest(self, data: DataSpec | None = None) -> bytes:
        """The manifest of data, or of the training data as first signed.

        Raises UserError if it is missing or damaged, KeyError if there is none.
        """
        return self.read((data or self.spec.data).manifest_digest)

    def tokenizer_folder(self) -> Path:
        """The folder of the tokenizer, its files checked. Raises UserError."""
        for digest in self.spec.tokenizer.values():
            self.artifact(digest)
        return self.folder / TOKENIZER_FOLDER

    def tokenizer(self) -> Any:
        """The run's transformers tokenizer. Raises UserError."""
        return load_tokenizer(self.tokenizer_folder())

    def read_orders(self) -> bytes:
        """The owner's signed orders, unchecked; b"" if there are none. Raises UserError."""
        try:
            return (self.folder / ORDERS_FILE).read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise disk_error(self.folder, error) from error

    def open_orders(self, raw: bytes) -> Orders:
        """Signed orders, from anywhere; of b"" NO_ORDERS. ValueError, naming the reason, if the run's owner did not sign them."""
        return open_orders(raw, self.run_id, self.owner)

    def keep_orders(self, raw: bytes) -> None:
        """In the place of those that were kept. Raises UserError."""
        self._write(ORDERS_FILE, raw)

    def _read(self, name: str, digest: bytes) -> bytes | None:
        try:
            content = (self.folder / name).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise disk_error(self.folder, error) from error
        return content if artifact_digest(content)[: len(digest)] == digest else None

    def _write(self, name: str, content: bytes) -> None:
        path = self.folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, partial = tempfile.mkstemp(dir=self.folder, prefix=".partial-")
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(content)
                Path(partial).replace(path)
            except BaseException:
                Path(partial).unlink(missing_ok=True)
                raise
        except OSError as error:
            raise disk_error(self.folder, error) from error


def folder_of_run(run_id: bytes, cache_dir: Path | None = None) -> Path:
    """Where this machine keeps a run, or would."""
    return cache_root(cache_dir) / "runs" / run_id.hex()


def artifact_digest(content: bytes) -> bytes:
    """SHA-256. Manifests are named by its first 16 bytes."""
    return hashlib.sha256(content).digest()


def _names_of(spec: RunSpec) -> dict[bytes, list[str]]:
    """The files of each digest: files of one content have one."""
    names: dict[bytes, list[str]] = defaultdict(list)
    for name, digest in spec.tokenizer.items():
        names[digest].append(f"{TOKENIZER_FOLDER}/{name}")
    if spec.data.manifest_digest:
        names[spec.data.manifest_digest].append(MANIFEST_FILE)
    if spec.held_out is not None:
        names[spec.held_out.manifest_digest].append(HELD_OUT_MANIFEST_FILE)
    return dict(names)
