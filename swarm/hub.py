"""The Hugging Face hub as a source: one resolved commit of one repository, its files fetched one by one.

Downloads, the cache on disk, HF_TOKEN, HF_HUB_OFFLINE and HF_ENDPOINT are huggingface_hub's own. What is added here: every
call to an unreachable hub ends in bounded time, and every error is one line that says what to do.
"""

from __future__ import annotations

import errno
import importlib
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from swarm.errors import ModelNotFound, UserError
from swarm.terminal import bar_class, quiet_libraries

Answer = TypeVar("Answer")

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
CONTACT_LASTS_S = 5.0
# What config and tokenizer need; weights are fetched by name.
SMALL_FILES = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|chat_template)\.json"
    r"|merges\.txt|vocab\.txt|tokenizer\.model|spiece\.model|sentencepiece\.bpe\.model|tekken\.json"
    r"|chat_template\.jinja|additional_chat_templates/[\w.-]+\.jinja"
)


def is_hub_id(text: str) -> bool:
    return HUB_ID.fullmatch(text) is not None and ".." not in text and "--" not in text


@dataclass(slots=True)
class HubFiles:
    """Files of one repository at one commit. `listed` is empty when the hub could not be asked: then only the cache counts."""

    repo_id: str
    commit: str
    listed: frozenset[str]
    timeout_s: float
    progress: bool | None = None
    _contact: float = field(default=float("-inf"))

    @property
    def source(self) -> str:
        return f"hub:{self.repo_id}@{self.commit}"

    def names(self) -> frozenset[str]:
        return self.listed or frozenset(
            str(path.relative_to(self._snapshot())) for path in self._snapshot().rglob("*") if path.is_file()
        )

    def local(self, name: str) -> Path | None:
        path = self._snapshot() / name
        return path if path.is_file() else None

    def fetch(self, name: str) -> Path:
        path = self.local(name)
        if path is not None:
            return path
        from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

        if time.monotonic() - self._contact > CONTACT_LASTS_S:
            # hf_hub_download asks a silent hub six times for a minute each; one short question first bounds that.
            url = hf_hub_url(self.repo_id, name, revision=self.commit)
            _ask(self.repo_id, self.timeout_s, lambda: get_hf_file_metadata(url, timeout=self.timeout_s))
        with quiet_libraries():
            bar = bar_class(f"downloading {name}", wanted=self.progress)
            try:
                path = Path(
                    hf_hub_download(
                        self.repo_id, name, revision=self.commit, etag_timeout=self.timeout_s, tqdm_class=bar
                    )
                )
            except Exception as error:
                raise _translate(self.repo_id, error, f"{name} of {self.repo_id}") from error
        self._contact = time.monotonic()
        return path

    def folder(self) -> Path:
        for name in sorted(self.names()):
            if SMALL_FILES.fullmatch(name):
                self.fetch(name)
        return self._snapshot()

    def is_complete(self) -> bool:
        """Whether config, tokenizer and all weights are on this disk."""
        names = frozenset(
            str(path.relative_to(self._snapshot())) for path in self._snapshot().rglob("*") if path.is_file()
        )
        if "config.json" not in names or not names & {"tokenizer.json", "tokenizer.model", "vocab.json"}:
            return False
        if "model.safetensors" in names:
            return True
        try:
            index = json.loads((self._snapshot() / "model.safetensors.index.json").read_bytes())
            return set(index["weight_map"].values()) <= names
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            return False

    def _snapshot(self) -> Path:
        return _repo_folder(self.repo_id) / "snapshots" / self.commit


def open_hub(
    repo_id: str,
    *,
    timeout_s: float,
    progress: bool | None = None,
    commit: str | None = None,
    local_only: bool = False,
    from_peer: bool = False,
) -> HubFiles:
    """The repository at `commit`, or at what its main branch is now (or was when the hub was last reached).

    from_peer: a peer named the commit, so it must be in the history of main: anybody can have a commit of a
    proposed change stored in anybody's repository. Raises ModelNotFound within about timeout_s.
    """
    cached = commit if commit else _cached_main(repo_id)
    if cached is not None and not (_repo_folder(repo_id) / "snapshots" / cached / "config.json").is_file():
        cached = None
    if cached is not None and (local_only or commit):
        offline = HubFiles(repo_id, cached, frozenset(), timeout_s, progress)
        if local_only or offline.is_complete():
            return offline
    if local_only:
        raise ModelNotFound(f"{repo_id} is not in the hub's cache on this machine")
    try:
        found = _ask(repo_id, timeout_s, lambda: _model(repo_id, commit, timeout_s, from_peer))
    except _Unreachable:
        if cached is None:
            raise
        return HubFiles(repo_id, cached, frozenset(), timeout_s, progress)
    files = HubFiles(repo_id, found[0], found[1], timeout_s, progress, time.monotonic())
    if "config.json" not in files.listed:
        raise ModelNotFound(f"{repo_id} on the hub has no config.json: it is not a model that transformers can load")
    files.fetch("config.json")
    _remember_main(repo_id, found[0], commit)
    return files


class _Unreachable(ModelNotFound):
    """The hub did not answer, or may not be asked."""


def _model(repo_id: str, commit: str | None, timeout_s: float, from_peer: bool) -> tuple[str, frozenset[str]]:
    """Commit and file names of a repository."""
    from huggingface_hub import HfApi

    api = HfApi()
    model = api.model_info(repo_id, revision=commit, timeout=timeout_s)
    if model.sha is None or re.fullmatch(r"[0-9a-f]{40}", model.sha) is None or commit not in (None, model.sha):
        raise ModelNotFound(f"the hub gave no usable commit of {repo_id}: check HF_ENDPOINT")
    if from_peer and not any(entry.commit_id == model.sha for entry in api.list_repo_commits(repo_id)):
        raise ModelNotFound(f"{model.sha} is not a commit of the main branch of {repo_id}: do not trust who serves it")
    return model.sha, frozenset(file.rfilename for file in model.siblings or ())


def _ask(repo_id: str, timeout_s: float, question: Callable[[], Answer]) -> Answer:
    """Ask the hub, for timeout_s at most.

    In a thread that is left behind when it overstays: no time limit of an HTTP client reaches into a name look-up.
    """
    answers: list[Answer] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            answers.append(question())
        except BaseException as error:  # noqa: BLE001  (raised again in the caller's thread)
            errors.append(error)

    with quiet_libraries():
        thread = threading.Thread(target=run, name="hub", daemon=True)
        thread.start()
        thread.join(timeout_s)
    if errors:
        raise _translate(repo_id, errors[0], repo_id) from errors[0]
    if not answers:
        raise _unreachable(repo_id, f"no answer in {timeout_s:g} s")
    return answers[0]


def _translate(repo_id: str, error: BaseException, what: str) -> BaseException:
    """Foreign errors as ours; what nobody expected stays as it is."""
    hub: Any = importlib.import_module("huggingface_hub.errors")

    causes = [error, error.__cause__, error.__context__]
    log_in = "log in with `hf auth login` or set HF_TOKEN"
    if any(isinstance(cause, hub.OfflineModeIsEnabled) for cause in causes):
        return _Unreachable(f"{what} is not in the hub's cache and HF_HUB_OFFLINE is set: unset it, or give a folder")
    if isinstance(error, hub.GatedRepoError):
        return ModelNotFound(f"{repo_id} is gated: accept its terms at {_endpoint()}/{repo_id}, then {log_in}")
    if isinstance(error, hub.RepositoryNotFoundError):
        return ModelNotFound(f"the hub has no model {repo_id!r}, or it is private: check the name, or {log_in}")
    if isinstance(error, hub.RevisionNotFoundError | hub.RemoteEntryNotFoundError):
        return ModelNotFound(f"the hub has no such version of {what}: it was removed; choose another model")
    if isinstance(error, hub.HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            return ModelNotFound(f"the hub refused access to {repo_id} ({status}): check your token, or {log_in}")
        if status == 404:
            return ModelNotFound(f"the hub has no {what}: check the name and HF_ENDPOINT")
        kind = _Unreachable if status in (408, 429) or status >= 500 else ModelNotFound
        return kind(f"the hub answered {status} for {what}: try again later")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError("the disk of the hub's cache is full: free some space, or set HF_HOME to another folder")
    if isinstance(error, hub.HFValidationError):
        return ModelNotFound(f"{repo_id!r} is not a hub id: give ORG/NAME")
    if isinstance(error, hub.HTTPError | OSError):  # the client's own errors, time limits, LocalEntryNotFoundError
        reason = next((cause for cause in reversed(causes) if cause is not None), error)
        return _unreachable(repo_id, (str(reason).strip().splitlines() or [type(reason).__name__])[0][:120])
    return error


def _unreachable(repo_id: str, reason: str) -> _Unreachable:
    return _Unreachable(
        f"cannot reach the hub {_endpoint()} for {repo_id} ({reason}): check the network, or give a checkpoint folder"
    )


def _endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def _repo_folder(repo_id: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / ("models--" + repo_id.replace("/", "--"))


def _cached_main(repo_id: str) -> str | None:
    try:
        commit = (_repo_folder(repo_id) / "refs" / "main").read_text().strip()
    except (OSError, ValueError):
        return None
    return commit if re.fullmatch(r"[0-9a-f]{40}", commit) else None


def _remember_main(repo_id: str, sha: str, asked: str | None) -> None:
    """Downloads by commit leave no reference; without one the cache is not found when the hub is away."""
    reference = _repo_folder(repo_id) / "refs" / "main"
    try:
        if asked is None or not reference.exists():
            reference.parent.mkdir(parents=True, exist_ok=True)
            reference.write_text(sha)
    except OSError:
        return
