"""Session: one generation through the swarm. Survives the loss of any hop that somebody else can replace."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from protos import node_pb2
from swarm.client.config import ClientConfig
from swarm.client.hop import RemoteHop, StepInput
from swarm.client.router import Router
from swarm.errors import BadReply, BadRequest, Busy, PeerFailed, RouteBroken, SessionFull, SwarmError
from swarm.messages import own_version
from swarm.p2p.host import Host
from swarm.routing import Hop, Route
from swarm.span import Span

log = logging.getLogger(__name__)


@dataclass(slots=True)
class SessionStats:
    """What happened to a session so far."""

    num_steps: int = 0
    num_reroutes: int = 0
    stall_s: float = 0.0
    """Time lost to failed hops: from the failing step's start to its replacement's being ready."""
    num_class_changes: int = 0
    """Reroutes that had to leave the numeric class of the lost hop; the text may differ from then on."""


class Session:
    """Caches for `batch` rows of up to `max_length` tokens on every hop of a route. Use as an async context manager."""

    def __init__(self, host: Host, router: Router, config: ClientConfig, *, batch: int, max_length: int) -> None:
        if batch < 1 or max_length < 1:
            raise BadRequest(
                f"a session needs at least one row and one token, got batch={batch}, max_length={max_length}"
            )
        self.batch, self.max_length = batch, max_length
        self.stats = SessionStats()
        self.hops: list[RemoteHop] = []
        self.last_route: Route = ()
        """The hops of the last step; still known when the session is closed."""
        self._host, self._router, self._config = host, router, config
        self._version = 0
        self._position = 0
        self._mask: Tensor | None = None  # bool [batch, position]; None while every token is real

    @property
    def position(self) -> int:
        """Tokens of each row that the caches hold."""
        return self._position

    @property
    def route(self) -> Route:
        return tuple(hop.hop for hop in self.hops)

    async def __aenter__(self) -> Session:
        deadline = time.monotonic() + self._config.request_timeout_s
        self.hops = await self._open_hops(self._router.all_blocks, deadline, patience_s=self._config.patience_s)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Free the caches on every hop."""
        hops, self.hops = self.hops, []
        await asyncio.gather(*(hop.aclose() for hop in hops))

    async def step(
        self,
        hidden: Tensor,
        *,
        mask: Tensor | None = None,
        rewind_to: int | None = None,
        reorder: Sequence[int] = (),
        timeout_s: float | None = None,
    ) -> Tensor:
        """Push new tokens through every hop of the route.

        hidden: float [batch, tokens, hidden]; the reply has its shape and dtype. mask: bool [batch, tokens], False for padding.
        rewind_to: first forget all tokens from this position on. reorder: then row r becomes what row reorder[r] was.
        timeout_s: one deadline for all hops and retries together; default: the client's request_timeout_s.
        Raises SessionFull (never retry) or RouteBroken (retry once nodes have joined).
        """
        deadline = time.monotonic() + (timeout_s or self._config.request_timeout_s)
        kept = self._position if rewind_to is None else rewind_to
        self._check(hidden, mask, kept, reorder)
        before = (list(self.hops), [list(hop.history) for hop in self.hops], self._mask, self._position)
        if rewind_to is not None or reorder:
            self._version += 1
            self._edit(kept, reorder)
        if mask is not None and bool(mask.all()):
            mask = None
        try:
            output = await self._through_all_hops(hidden, mask, kept, rewind_to, reorder, deadline)
        except BaseException:
            await self._undo(*before)
            raise
        self._append_mask(mask, kept, hidden.shape[1])
        self._position = kept + hidden.shape[1]
        self.stats.num_steps += 1
        self.last_route = self.route
        return output

    async def _through_all_hops(
        self,
        hidden: Tensor,
        mask: Tensor | None,
        kept: int,
        rewind_to: int | None,
        reorder: Sequence[int],
        deadline: float,
    ) -> Tensor:
        edited = dict.fromkeys(self.hops, StepInput(kept, self._version, mask, rewind_to, tuple(reorder)))
        index = 0
        while index < len(self.hops):
            hop = self.hops[index]
            if hop.is_closed:  # by ourselves, after a step that failed or was cancelled
                self.hops[index : index + 1] = await self._open_filled(hop, None, deadline)
                continue
            started = time.monotonic()
            try:
                # A hop that came by replay has been rewound and reordered already.
                step = edited.get(hop) or StepInput(kept, self._version, mask)
                hidden = await hop.step(hidden, step, deadline)
            except (PeerFailed, Busy) as error:
                await self._replace(index, error, started, deadline)
            else:
                index += 1
        return hidden

    async def _undo(
        self, hops: list[RemoteHop], histories: list[list[Tensor]], mask: Tensor | None, position: int
    ) -> None:
        """After a failed step: what we know of the caches is as before it. The hops are closed, as some have gone ahead; the next step replays."""
        await asyncio.gather(*(hop.aclose() for hop in {*hops, *self.hops}))
        for hop, history in zip(hops, histories, strict=True):
            hop.history = history
        self.hops, self._mask, self._position = hops, mask, position

    def _check(self, hidden: Tensor, mask: Tensor | None, kept: int, reorder: Sequence[int]) -> None:
        if not self.hops:
            raise BadRequest("the session is closed; open another")
        if hidden.ndim != 3 or hidden.shape[0] != self.batch or hidden.shape[1] == 0:
            raise BadRequest(f"hidden states must be [{self.batch}, tokens, hidden], got {list(hidden.shape)}")
        if not 0 <= kept <= self._position:
            raise BadRequest(f"cannot rewind to {kept}: the session holds {self._position} tokens")
        if mask is not None and mask.shape != hidden.shape[:2]:
            raise BadRequest(f"the mask must be {list(hidden.shape[:2])}, got {list(mask.shape)}")
        if reorder and (len(reorder) != self.batch or not all(0 <= row < self.batch for row in reorder)):
            raise BadRequest(f"reorder must name {self.batch} rows, got {list(reorder)[:16]}")
        if kept + hidden.shape[1] > self.max_length:
            raise SessionFull(
                f"the session's cache holds {self.max_length} tokens, {kept} are used and {hidden.shape[1]} more do not fit; "
                "open a session with a larger max_length"
            )

    def _edit(self, kept: int, reorder: Sequence[int]) -> None:
        """Make our copy of what the caches hold what it will be after a rewind and a reorder."""
        for hop in self.hops:
            hop.edit_history(kept, reorder)
        if self._mask is not None:
            self._mask = self._mask[:, :kept]
            if reorder:
                self._mask = self._mask[torch.tensor(list(reorder))]
        self._position = kept

    def _append_mask(self, mask: Tensor | None, kept: int, num_new: int) -> None:
        if mask is None and self._mask is None:
            return
        old = torch.ones(self.batch, kept, dtype=torch.bool) if self._mask is None else self._mask
        new = torch.ones(self.batch, num_new, dtype=torch.bool) if mask is None else mask.to(torch.bool)
        self._mask = torch.cat([old, new], dim=1)

    async def _replace(self, index: int, error: SwarmError, failed_since: float, deadline: float) -> None:
        """Put other hops in the place of self.hops[index] and replay what its cache held. Raises when nobody can until the deadline."""
        lost = self.hops[index]
        await self._give_up(lost, error)
        self.hops[index : index + 1] = hops = await self._open_filled(lost, error, deadline)
        stall_s = time.monotonic() - failed_since
        self.stats.num_reroutes += 1
        self.stats.stall_s += stall_s
        if any(hop.numeric_class != lost.numeric_class for hop in hops):
            self.stats.num_class_changes += 1
            log.warning(
                "numeric class left lost=%s now=%s", lost.numeric_class, ",".join(hop.numeric_class for hop in hops)
            )
        now = ", ".join(f"{hop.span} at {hop.peer_id[-8:]}" for hop in hops)
        log.warning("hop replaced span=%s lost=%s now=%s stall_s=%.2f", lost.span, lost.peer_id[-8:], now, stall_s)

    async def _open_filled(self, lost: RemoteHop, error: SwarmError | None, deadline: float) -> list[RemoteHop]:
        """Hops for the blocks of one that is closed, with what its cache held. error: why it was lost, if it was."""
        while True:
            hops = await self._open_replacement(lost, error, deadline)
            try:
                await self._replay(hops, lost.history, deadline)
                return hops
            except (PeerFailed, Busy) as next_error:
                error = next_error
                await asyncio.gather(*(hop.aclose() for hop in hops))
                if time.monotonic() > deadline:
                    raise

    async def _give_up(self, hop: RemoteHop, error: SwarmError) -> None:
        log.warning("hop lost peer=%s span=%s reason=%s", hop.peer_id[-8:], hop.span, error)
        if not isinstance(error, Busy):  # nothing is wrong with a peer that is full
            self._router.health.failed(hop.peer_id, now=time.monotonic(), blame=isinstance(error, BadReply))
        await hop.aclose()

    async def _open_replacement(self, lost: RemoteHop, error: SwarmError | None, deadline: float) -> list[RemoteHop]:
        """Hops for the lost one's blocks: of its numeric class if anybody has it, else of any.

        A peer that had no room is asked again when nobody else can be, as long as there is time: its older sessions will end.
        """
        full: dict[str, SwarmError] = {lost.peer_id: error} if isinstance(error, Busy) else {}
        try:
            return await self._open_hops(
                lost.span, deadline, patience_s=0.0, numeric_class=lost.numeric_class, full=full
            )
        except (RouteBroken, Busy, SessionFull):
            # Weights of a run go when newer ones come: nobody brings them back.
            patience_s = self._config.patience_s if self._router.is_fleeting else None
            try:
                return await self._open_hops(
                    lost.span,
                    deadline,
                    patience_s=deadline - time.monotonic() if full else patience_s,
                    full=full,
                )
            except RouteBroken as broken:
                raise broken if error is None else RouteBroken(f"{error}, and {broken}") from error

    async def _replay(self, hops: list[RemoteHop], history: list[Tensor], deadline: float) -> None:
        """Fill new caches with the lost hop's inputs; the output of each new hop is the input of the next."""
        self._version += 1
        if not history:
            return
        hidden = torch.cat(history, dim=1)
        for hop in hops:
            try:
                hidden = await hop.step(
                    hidden, StepInput(0, self._version, self._mask), deadline, wants_output=hop is not hops[-1]
                )
            except (PeerFailed, Busy) as error:
                await self._give_up(hop, error)
                raise

    async def _open_hops(
        self,
        wanted: Span,
        deadline: float,
        *,
        numeric_class: str | None = None,
        patience_s: float | None = None,
        full: dict[str, SwarmError] | None = None,
    ) -> list[RemoteHop]:
        """Sessions on every hop of the best route over wanted; other routes when peers fail or are full.

        full: peers that had no room a moment ago, and what they said.
        Raises RouteBroken, SessionFull (no peer's cache is large enough) or Busy (all stay full until the deadline).
        """
        started, pause_s = time.monotonic(), 0.3
        full = dict(full or {})
        while True:
            try:
                route = await self._router.plan(
                    wanted,
                    timeout_s=max(deadline - time.monotonic(), 0.1),
                    numeric_class=numeric_class,
                    avoid=full,
                    patience_s=0.0 if full else patience_s,
                )
            except RouteBroken:
                if not full:
                    raise
                waited_s = time.monotonic() - started
                too_small = [error for error in full.values() if "cache is too small" in str(error)]
                if len(too_small) == len(full):
                    raise SessionFull(f"{too_small[0]}; use a shorter prompt or fewer new tokens") from None
                if waited_s + pause_s >= min(
                    deadline - started, self._config.patience_s if patience_s is None else max(patience_s, pause_s)
                ):
                    raise next(iter(full.values())) from None
                await asyncio.sleep(pause_s * random.uniform(0.8, 1.2))
                pause_s = min(2 * pause_s, 2.0)
                full = {peer: error for peer, error in full.items() if error in too_small}
                continue
            opened = await asyncio.gather(*(self._open_hop(hop, deadline) for hop in route), return_exceptions=True)
            failures = [
                (hop, error) for hop, error in zip(route, opened, strict=True) if isinstance(error, BaseException)
            ]
            hops = [hop for hop in opened if isinstance(hop, RemoteHop)]
            if not failures:
                return hops
            await asyncio.gather(*(hop.aclose() for hop in hops))
            for hop, error in failures:
                if isinstance(error, Busy):
                    full[hop.peer_id] = error
                elif isinstance(error, PeerFailed):
                    log.warning("peer not usable peer=%s span=%s reason=%s", hop.peer_id[-8:], hop.span, error)
                    self._router.health.failed(hop.peer_id, now=time.monotonic(), blame=isinstance(error, BadReply))
                else:
                    raise error

    async def _open_hop(self, hop: Hop, deadline: float) -> RemoteHop:
        started = time.monotonic()
        request = node_pb2.OpenSession(
            version=own_version(),
            # Each hop its own: a peer may have two hops of a route, or not have noticed yet that one of ours has ended.
            session_id=os.urandom(16),
            model_digest=self._router.spec.digest,
            start=hop.span.start,
            end=hop.span.end,
            block_digests=[hop.record.digest_of(block) for block in hop.span],
            batch=self.batch,
            max_length=self.max_length,
        )
        opened = await RemoteHop.open(self._host, hop, request, self._config, deadline)
        self._router.health.succeeded(hop.peer_id)
        log.info("hop opened peer=%s span=%s after_s=%.3f", hop.peer_id[-8:], hop.span, time.monotonic() - started)
        return opened
