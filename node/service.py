"""Service: answers the streams that peers open to this node. One stream carries one session, or the microbatches of one hop.

Whatever a peer sends, the answer is a reply or a refusal; the node's other sessions do not notice.
"""

from __future__ import annotations

import asyncio
import logging
import time

import torch
from torch import Tensor

from node.admission import MAX_STEP_TOKENS, admit_step, finish_step, open_session
from node.backend.step_engine import EngineStep
from node.kv_cache import SessionTable
from node.microbatches import Microbatches
from node.session import Session
from node.shard import Shard
from node.steps import COMPUTE_ERRORS, Steps
from protos import node_pb2
from swarm.errors import BadRequest
from swarm.messages import (
    MAX_HEADER_BYTES,
    PROTOCOL_MAJOR,
    Refused,
    decode_message,
    encode_message,
    own_version,
    refusal_of,
    versions_meet,
)
from swarm.p2p.framing import FramedStream
from swarm.span import Span
from swarm.tensors import Buffer

log = logging.getLogger(__name__)

MAX_STEP_BYTES = 16 * 2**20
OPEN_TIMEOUT_S = 10.0
MAX_REFUSALS_PER_STREAM = 32


class NodeService:
    """Handles streams of the protocol "shardswarm/node"."""

    def __init__(
        self, shard: Shard, model_name: str, steps: Steps, sessions: SessionTable, microbatches: Microbatches
    ) -> None:
        self._shard = shard
        self._model_name = model_name
        self._steps = steps
        self.sessions = sessions
        self.microbatches = microbatches
        self.num_steps = 0
        self.num_found_tokens = 0
        """That were not computed, because others had been sent the same before."""

    def dismiss(self, reason: str) -> None:
        """End all sessions, and admit no others."""
        self.sessions.leaving = self.microbatches.leaving = True
        for session in list(self.sessions.sessions.values()):
            self.sessions.close(session, reason)

    async def handle(self, stream: FramedStream, first: bytes | None = None) -> None:
        """Serve one stream until the peer ends it, it breaks, its session expires or the peer sends too much nonsense.

        first: a message that was received already.
        """
        session: Session | None = None
        hop: Span | None = None  # of a stream of microbatches
        refusals = 0
        try:
            while refusals < MAX_REFUSALS_PER_STREAM:
                message, first = first, None
                if message is None:
                    message = await self._next_message(stream, session, is_open=hop is not None)
                if message is None:
                    return
                try:
                    request, tensors = decode_message(message, node_pb2.Request)
                    kind = request.WhichOneof("kind")
                    if kind in ("open", "open_microbatches") and (session is not None or hop is not None):
                        raise BadRequest("this stream was opened already; open another stream")
                    if kind == "open":
                        session, answer = self._open(request.open, stream)
                    elif kind == "step":
                        if session is None:
                            raise Refused(node_pb2.THE_SESSION_IS_UNKNOWN, "no session was opened on this stream")
                        answer = await self._step(session, request.step, tensors)
                    elif kind == "open_microbatches":
                        wanted = self._checked_hop(request.open_microbatches)
                        answer = self.microbatches.open(stream)
                        hop = wanted
                    elif kind in ("forward", "backward"):
                        if hop is None:
                            raise BadRequest("this stream was not opened for microbatches")
                        answer = await self.microbatches.answer(stream.peer_id, hop, request, tensors)
                    elif kind == "status":
                        answer = encode_message(self._status())
                    else:
                        raise BadRequest("the request has no kind that this node knows")
                except (BadRequest, Refused) as error:
                    refusals += 1
                    log.info("request refused peer=%s reason=%s", stream.peer_id, error)
                    answer = encode_message(refusal_of(error))
                if not await self._sent(stream, answer):
                    return
            await stream.fail("too many refused requests on one stream")
        finally:
            if hop is not None:
                self.microbatches.close(stream)
            if session is not None:
                self.sessions.close(session)
                log.info("session closed peer=%s session=%s", stream.peer_id, session.session_id.hex()[:8])

    async def _sent(self, stream: FramedStream, answer: list[Buffer]) -> bool:
        """Send an answer. False when the peer took none of it for so long that its session has expired."""
        if stream.send_at_once(answer):
            return True
        try:
            async with asyncio.timeout(self.sessions.limits.idle_s):
                await stream.send(answer)
            return True
        except TimeoutError:
            log.info("stream not read peer=%s", stream.peer_id)
            return False

    async def _next_message(self, stream: FramedStream, session: Session | None, *, is_open: bool) -> bytes | None:
        """The peer's next message. None at the end of the stream, or when the peer was silent for too long."""
        timeout_s = self.sessions.limits.idle_s if is_open else OPEN_TIMEOUT_S
        if session is not None:
            timeout_s = self.sessions.idle_left_s(session, time.monotonic())
        try:
            async with asyncio.timeout(timeout_s):
                return await stream.receive()
        except TimeoutError:
            log.info("stream idle peer=%s", stream.peer_id)
            reason = "the session expired" if session else "no request came"
            silent_s = self.sessions.limits.idle_s if session or is_open else OPEN_TIMEOUT_S
            await stream.fail(f"{reason}: nothing was heard for {silent_s:.0f} s")
            return None

    def _open(self, request: node_pb2.OpenSession, stream: FramedStream) -> tuple[Session, list[Buffer]]:
        hop = self._checked_hop(request)
        self.sessions.admit(stream.peer_id, request.session_id, request.batch, request.max_length)
        row_bytes = request.batch * self._shard.hidden_size * 4
        max_tokens = min(MAX_STEP_TOKENS, MAX_STEP_BYTES // row_bytes)
        if max_tokens < 1:
            raise BadRequest(
                f"a batch of {request.batch} rows is too large: one step may have {MAX_STEP_BYTES // 2**20} MiB"
            )
        session = open_session(self.sessions, self._steps.engine, hop, stream.peer_id, request, time.monotonic())
        stream.accept_messages_of(max_tokens * (row_bytes + request.batch) + MAX_HEADER_BYTES)
        log.info(
            "session opened peer=%s session=%s hop=%s batch=%d max_length=%d",
            stream.peer_id,
            request.session_id.hex()[:8],
            hop,
            request.batch,
            request.max_length,
        )
        opened = node_pb2.SessionOpened(
            version=own_version(),
            numeric_class=self._shard.numeric_class,
            max_tokens_per_step=max_tokens,
            idle_timeout_s=round(self.sessions.limits.idle_s),
        )
        return session, encode_message(node_pb2.Reply(opened=opened))

    def _checked_hop(self, request: node_pb2.OpenSession | node_pb2.OpenMicrobatches) -> Span:
        """The hop that is asked for, if it is ours, its weights are the ones the client wants, and we understand each other."""
        if not versions_meet(request.version):
            raise Refused(
                node_pb2.THE_VERSIONS_DO_NOT_MEET,
                f"this node speaks protocol {PROTOCOL_MAJOR}, you speak {request.version.major}; upgrade the older of the two",
            )
        try:
            hop = Span(request.start, request.end)
        except ValueError as error:
            raise BadRequest(f"hop: {error}") from error
        if request.model_digest != self._shard.model_digest:
            raise Refused(
                node_pb2.THE_WEIGHTS_DIFFER,
                f"this node serves {self._model_name} ({self._shard.model_digest.hex()[:8]}), not {request.model_digest.hex()[:8]}",
            )
        if not self._shard.span.covers(hop):
            raise Refused(
                node_pb2.THE_BLOCKS_ARE_NOT_SERVED_HERE, f"this node serves blocks {self._shard.span}, not {hop}"
            )
        if tuple(request.block_digests) != self._shard.digests_of(hop):
            raise Refused(
                node_pb2.THE_WEIGHTS_DIFFER, f"the digests of blocks {hop} are not those of this node's weights"
            )
        return hop

    async def _step(self, session: Session, request: node_pb2.Step, tensors: list[Tensor]) -> list[Buffer]:
        session.note_arrival(time.monotonic())
        if request.session_id != session.session_id:
            raise Refused(node_pb2.THE_SESSION_IS_UNKNOWN, "the step is for another session than the stream")
        if not self.sessions.is_open(session):
            raise Refused(_code_of_end(session), session.ended_because)
        if session.answered == (request.session_version, request.position):
            return session.kept_reply
        self._steps.check_room()
        step = admit_step(self.sessions, session, request, tensors, self._shard.hidden_size, self._shard.model.dtype)
        submitted = time.monotonic()

        def encode(done: EngineStep) -> list[Buffer]:
            return _encode_reply(request, done, tensors[0].dtype, session.num_tokens, submitted)

        try:
            reply = await self._steps.run(step, session.peer_id, encode, lambda: len(self.sessions.sessions) == 1)
        except COMPUTE_ERRORS as error:
            log.exception("step failed peer=%s hop=%s", session.peer_id, session.hop)
            self.sessions.close(session, "this session ended when a step failed; open another")
            raise Refused(
                node_pb2.THE_COMPUTATION_FAILED,
                f"the step failed on this node ({type(error).__name__}); use another node",
            ) from error
        except BaseException:
            self.sessions.close(session, "this session ended when a step failed; open another")
            raise
        self.num_steps += 1
        self.num_found_tokens += sum(growth.found for growth in step.growths)
        session.kept_reply = reply
        session.answered = (request.session_version, request.position)
        finish_step(self.sessions, session, time.monotonic())
        return reply

    def _status(self) -> node_pb2.Reply:
        steps = self._steps
        status = node_pb2.NodeStatus(
            version=own_version(),
            model_name=self._model_name,
            model_digest=self._shard.model_digest,
            start=self._shard.span.start,
            end=self._shard.span.end,
            num_sessions=len(self.sessions.sessions),
            cache_bytes_used=self.sessions.used_bytes,
            cache_bytes_budget=self.sessions.limits.cache_bytes,
            num_steps=self.num_steps,
            num_batches=steps.num_batches,
            num_found_tokens=self.num_found_tokens,
            num_evicted_sessions=self.sessions.num_evicted,
            num_forwards=self.microbatches.num_forwards,
            num_backwards=self.microbatches.num_backwards,
            stash_bytes_used=self.microbatches.stash.used_bytes,
            stash_bytes_budget=self.microbatches.stash.budget_bytes,
        )
        return node_pb2.Reply(status=status)

    async def drain(self, timeout_s: float, hurry: asyncio.Event) -> None:
        """Admit no more work and wait until what runs has ended, at most timeout_s or until `hurry` is set.

        What runs: open sessions, and microbatches until their backward.
        """
        self.sessions.leaving = self.microbatches.leaving = True

        async def ended() -> None:
            await self.sessions.empty.wait()
            await self.microbatches.wait_until_idle()

        waiting = [asyncio.create_task(ended()), asyncio.create_task(hurry.wait())]
        await asyncio.wait(waiting, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)
        if self.sessions.sessions:
            log.warning("left with sessions open num_sessions=%d", len(self.sessions.sessions))


def _code_of_end(session: Session) -> node_pb2.RefusalCode:
    if session.made_room:
        return node_pb2.THIS_SESSION_MADE_ROOM
    return node_pb2.THE_SESSION_IS_UNKNOWN


def _encode_reply(
    request: node_pb2.Step, step: EngineStep, dtype: torch.dtype, position: int, submitted: float
) -> list[Buffer]:
    """On the device thread, while all is warm."""
    assert step.output is not None
    done = node_pb2.StepDone(
        session_version=request.session_version,
        position=position,
        compute_us=round(step.compute_s * 1e6),
        queue_us=max(0, round((time.monotonic() - submitted - step.compute_s) * 1e6)),
    )
    return encode_message(node_pb2.Reply(step=done), [] if request.no_reply_tensor else [step.output.to(dtype)])
