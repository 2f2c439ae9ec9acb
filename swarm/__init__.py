"""shardswarm: one language model, run and trained by many machines.

    import swarm
    with swarm.connect(initial_peers=[...], model="smollm2-135m") as s:
        model, tok = s.model(), s.tokenizer()

Importing this package is cheap; torch, transformers and hivemind are loaded when a name that needs them is first used.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from swarm.errors import (
    BadReply,
    BadRequest,
    Busy,
    JoinFailed,
    ModelNotFound,
    PeerFailed,
    RouteBroken,
    SessionFull,
    SwarmError,
    UserError,
)
from swarm.span import Span

if TYPE_CHECKING:
    from swarm.client.blocking import Swarm
    from swarm.client.classify import SwarmModelForSequenceClassification
    from swarm.client.config import ClientConfig
    from swarm.client.connect import SwarmClient, open_swarm
    from swarm.client.model import SwarmModelForCausalLM
    from swarm.client.session import Session
    from swarm.client.trainer import Trainer, open_trainer
    from swarm.client.trainer_config import TrainerConfig

__all__ = [
    "BadReply",
    "BadRequest",
    "Busy",
    "ClientConfig",
    "JoinFailed",
    "ModelNotFound",
    "PeerFailed",
    "RouteBroken",
    "Session",
    "SessionFull",
    "Span",
    "Swarm",
    "SwarmClient",
    "SwarmError",
    "SwarmModelForCausalLM",
    "SwarmModelForSequenceClassification",
    "Trainer",
    "TrainerConfig",
    "UserError",
    "connect",
    "open_swarm",
    "open_trainer",
]

_HOME_OF = {
    "ClientConfig": "swarm.client.config",
    "Session": "swarm.client.session",
    "Swarm": "swarm.client.blocking",
    "SwarmClient": "swarm.client.connect",
    "SwarmModelForCausalLM": "swarm.client.model",
    "SwarmModelForSequenceClassification": "swarm.client.classify",
    "Trainer": "swarm.client.trainer",
    "TrainerConfig": "swarm.client.trainer_config",
    "open_swarm": "swarm.client.connect",
    "open_trainer": "swarm.client.trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def connect(*, initial_peers: Sequence[str], model: str, **options: Any) -> Swarm:
    """Join a swarm as a client of one model. Use the result as a context manager.

    initial_peers: multiaddrs as swarm-bootstrap prints them. model: alias, hub id, directory or GGUF file. options: further fields of
    ClientConfig, such as request_timeout_s. Raises JoinFailed or ModelNotFound, with what to do, within their timeouts.
    """
    from swarm.client.blocking import Swarm
    from swarm.client.config import ClientConfig

    return Swarm(ClientConfig(model=model, initial_peers=tuple(initial_peers), **options))
