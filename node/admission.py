"""Admission: how sessions begin, what a step must be like, and what it does to its session before and after the device computes it.

Pure bookkeeping.

B batch rows, T new tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from node.backend.step_engine import EngineStep, StepEngine
from node.kv_cache import SessionTable
from node.session import Session
from node.session_pages import SessionPages
from protos import node_pb2
from swarm.errors import BadRequest
from swarm.span import Span
from swarm.tensors import FLOATING, TensorLimits

MAX_STEP_TOKENS = 512


def open_session(
    sessions: SessionTable, engine: StepEngine, hop: Span, peer_id: str, request: node_pb2.OpenSession, now: float
) -> Session:
    """One that SessionTable.admit let in."""
    session = Session(
        session_id=request.session_id,
        peer_id=peer_id,
        hop=hop,
        batch=request.batch,
        max_length=request.max_length,
        last_used=now,
        # On another hop the same inputs give other keys and values.
        pages=SessionPages(sessions.pool, request.batch, f"{hop}".encode() if engine.computes_together else None),
        cache=engine.new_cache(hop),
    )
    sessions.add(session)
    return session


def admit_step(
    sessions: SessionTable,
    session: Session,
    request: node_pb2.Step,
    tensors: Sequence[Tensor],
    hidden_size: int,
    dtype: torch.dtype,
) -> EngineStep:
    """Check everything, then take the pages that the new tokens need. dtype: what the blocks compute in.

    The session is busy until `finish_step`, or until it is closed. Raises BadRequest or Refused, with the session as it was.
    """
    hidden, mask = _checked_tensors(session, tensors, hidden_size)
    num_new = hidden.shape[1]
    kept = _checked_position(session, request, num_new)
    rows = _checked_rows(session, request)
    sessions.make_room(session, session.num_missing(kept, rows, session.num_new(num_new, mask)))
    session.rewind(kept)
    if rows:
        session.reorder(rows)
    session.is_busy = True
    converted = hidden.to(dtype)
    return EngineStep(
        hop=session.hop,
        hidden=converted,
        mask=mask,
        growths=session.append(converted, mask),
        tables=[session.pages.table(row) for row in range(session.batch)],
        copies=session.pages.copies,
        cache=session.cache,
        rewind_to=kept if request.HasField("rewind_to") else None,
        reorder=torch.tensor(rows) if rows else None,
    )


def finish_step(sessions: SessionTable, session: Session, now: float) -> None:
    """A step was computed, and its reply can be sent."""
    session.is_busy = False
    session.last_used = session.replied_at = now
    if sessions.is_open(session):
        session.pages.computed()
        if session.must_make_room:
            sessions.evict(session)


def _checked_tensors(session: Session, tensors: Sequence[Tensor], hidden_size: int) -> tuple[Tensor, Tensor | None]:
    """Hidden states [B, T, H], and which tokens are real, bool [B, T] (None: all)."""
    if not 1 <= len(tensors) <= 2:
        raise BadRequest(f"a step has one or two tensors (hidden states, mask), got {len(tensors)}")
    hidden = TensorLimits(FLOATING, (session.batch, None, hidden_size), "hidden states").check(tensors[0])
    if hidden.shape[1] == 0:
        raise BadRequest("a step needs at least one token")
    if hidden.shape[1] > MAX_STEP_TOKENS:
        raise BadRequest(f"a step has at most {MAX_STEP_TOKENS} tokens, got {hidden.shape[1]}")
    if len(tensors) == 1:
        return hidden, None
    return hidden, TensorLimits((torch.bool,), (session.batch, hidden.shape[1]), "mask").check(tensors[1])


def _checked_position(session: Session, request: node_pb2.Step, num_new: int) -> int:
    """Tokens of each row that stay before the new ones."""
    kept = session.num_tokens
    if request.HasField("rewind_to"):
        if request.rewind_to > kept:
            raise BadRequest(f"cannot rewind to {request.rewind_to}: the cache holds {kept} tokens")
        kept = request.rewind_to
    if request.position != kept:
        raise BadRequest(f"position {request.position} is out of range: the cache holds {kept} tokens")
    if kept + num_new > session.max_length:
        raise BadRequest(f"position {kept} + {num_new} new tokens exceed the session's {session.max_length}")
    return kept


def _checked_rows(session: Session, request: node_pb2.Step) -> list[int]:
    rows = list(request.reorder)
    if rows and (len(rows) != session.batch or max(rows) >= session.batch):
        raise BadRequest(f"reorder must name {session.batch} rows below {session.batch}, got {rows[:16]}")
    return rows
