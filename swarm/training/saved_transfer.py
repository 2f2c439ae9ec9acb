"""Saved states on their way from members' disks to whoever asks: in pieces, from several donors at once, each piece checked.

    asker: GetSaved                       donor: SavedState, then the file's head (header and table of pieces) in raw messages
    asker: GetPieces, again and again     donor: so many raw messages of one piece each

A donor that gives to as many as it can ends the stream with that reason; for the asker it is one that has failed.

Donors are believed in so far as they agree: the head that most of them have is taken, and every piece must fit its table.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from protos import training_pb2
from swarm.epoch.messages import Place
from swarm.errors import BadReply, BadRequest, Busy, PeerFailed, UserError
from swarm.member_record import MemberRecord
from swarm.p2p.framing import FramedStream
from swarm.p2p.host import Host
from swarm.training.pace import Pace
from swarm.training.parameters import StageState
from swarm.training.requests import Donor, open_request, receive_whole, received, send_whole
from swarm.training.saved_states import PIECE_BYTES, SavedHead, SavedStates
from swarm.training.wire import decode, place_from_wire, place_to_wire

log = logging.getLogger(__name__)

MAX_HEAD_BYTES = 64 * 2**20
MAX_PIECES_PER_REQUEST = 16
_PIECES_AT_ONCE = 4  # so that several donors share the work
_TIMEOUT_S = 30.0
_CONNECT_TIMEOUT_S = 10.0
_MAX_DONORS = 8


def donors_of(records: Iterable[MemberRecord], stage: int, place: Place) -> list[Donor]:
    """Who says that it has the state of a stage at a place."""
    return [Donor(r.peer_id, r.addresses) for r in records if place in r.places_of(stage)]


async def send_saved(stream: FramedStream, states: SavedStates, request: training_pb2.GetSaved, pace: Pace) -> None:
    """Answer GetSaved, and the requests for pieces that follow."""
    try:
        with pace.stream(stream.peer_id):
            await _send_pieces(stream, states, place_from_wire(request.place), pace)
    except (BadRequest, Busy) as error:
        await stream.fail(str(error))
    except UserError as error:
        log.warning("saved state not sent peer=%s reason=%s", stream.peer_id[-8:], error)
        await stream.fail(
            "that state cannot be read here any more"
        )  # what the reason says of this disk is nobody else's


async def _send_pieces(stream: FramedStream, states: SavedStates, place: Place, pace: Pace) -> None:
    """The head, and then what is asked for. Raises BadRequest if there is no such thing, UserError if it is damaged."""
    saved = next((one for one in await asyncio.to_thread(states.found) if one.place == place), None)
    if saved is None:
        raise BadRequest(f"the state of epoch {place.epoch} is not on this disk (any more)")
    with await asyncio.to_thread(states.open, saved) as opened:
        head = await asyncio.to_thread(opened.read_head)
        answer = training_pb2.MemberMessage(saved=training_pb2.SavedState(head_bytes=len(head)))
        async with asyncio.timeout(_TIMEOUT_S):
            await send_whole(stream, answer, head)
        while True:
            async with asyncio.timeout(_TIMEOUT_S):
                raw = await stream.receive()
            if raw is None:
                return
            wanted = decode(raw).get_pieces
            if not (0 < wanted.count <= MAX_PIECES_PER_REQUEST and wanted.first + wanted.count <= saved.num_pieces):
                raise BadRequest("there are no such pieces")
            for number in range(wanted.first, wanted.first + wanted.count):
                await pace.take(saved.piece_bytes(number), lambda: not stream.is_broken)
                piece = await asyncio.to_thread(opened.read_piece, number)
                async with asyncio.timeout(_TIMEOUT_S):
                    await stream.send([piece])


@dataclass
class Download:
    """The first vectors of a saved state, being fetched."""

    head: SavedHead
    vectors: Tensor
    """float32 [num_vectors, num_parameters], filled as pieces come."""
    missing: collections.deque[int] = field(default_factory=collections.deque)
    num_left: int = 0

    def __post_init__(self) -> None:
        num_pieces = -(-self.vectors.numel() * 4 // PIECE_BYTES)
        self.missing.extend(range(num_pieces))
        self.num_left = num_pieces

    def take(self) -> list[int]:
        """Pieces in a row that nobody fetches yet."""
        numbers: list[int] = []
        while self.missing and len(numbers) < _PIECES_AT_ONCE:
            if numbers and self.missing[0] != numbers[-1] + 1:
                break
            numbers.append(self.missing.popleft())
        return numbers

    def put(self, number: int, piece: bytes) -> None:
        """BadReply if it is not what the head says."""
        if not self.head.fits(number, piece):
            raise BadReply(f"piece {number} is not what was announced")
        memory = self.vectors.view(-1).numpy().data.cast("B")
        start = number * PIECE_BYTES
        room = min(len(piece), len(memory) - start)
        memory[start : start + room] = piece[:room]
        self.num_left -= 1


async def fetch_saved(
    host: Host,
    run_id: bytes,
    stage: int,
    place: Place,
    donors: Sequence[Donor],
    num_parameters: int,
    *,
    num_vectors: int = 1,
    on_bytes: Callable[[int], None] = lambda num_bytes: None,
) -> tuple[SavedHead, Tensor]:
    """The first num_vectors vectors (weights, moments) of a saved state: float32 [num_vectors, num_parameters].

    Raises PeerFailed if no donor is left before all is there.
    """
    async with contextlib.AsyncExitStack() as stack:
        streams: dict[bytes, list[tuple[FramedStream, SavedHead]]] = collections.defaultdict(list)
        opened = await asyncio.gather(
            *(_open(stack, host, run_id, stage, place, donor) for donor in donors[:_MAX_DONORS]), return_exceptions=True
        )
        reasons = []
        for result in opened:
            if isinstance(result, PeerFailed | TimeoutError):
                reasons.append(str(result) or "it did not answer in time")
            elif isinstance(result, BaseException):
                raise result
            else:
                streams[result[1].raw].append(result)
        if not streams:
            raise PeerFailed(f"nobody could give stage {stage} of epoch {place.epoch}: {'; '.join(reasons)[:300]}")
        agreed = max(streams.values(), key=lambda group: (len(group), group[0][1].raw))
        if len(streams) > 1:
            log.warning("donors differ stage=%d epoch=%d groups=%d", stage, place.epoch, len(streams))
        head = agreed[0][1]
        if num_vectors > head.saved.num_vectors or num_parameters != head.saved.num_parameters:
            raise BadReply(
                f"the state of stage {stage} has {head.saved.num_vectors} vectors of {head.saved.num_parameters} parameters, "
                f"not {num_vectors} of {num_parameters}"
            )
        download = Download(head, torch.empty(num_vectors, num_parameters))
        results = await asyncio.gather(
            *(_fetch_pieces(stream, download, on_bytes) for stream, _ in agreed), return_exceptions=True
        )
        for outcome in results:
            if isinstance(outcome, BaseException) and not isinstance(outcome, PeerFailed | TimeoutError):
                raise outcome
        if download.missing:  # of a donor that failed when the others had ended already
            alive = [stream for (stream, _), result in zip(agreed, results, strict=True) if result is None]
            for stream in alive:
                with contextlib.suppress(PeerFailed, TimeoutError):
                    await _fetch_pieces(stream, download, on_bytes)
        if download.num_left:
            raise PeerFailed(f"all donors of stage {stage} of epoch {place.epoch} were lost before it was all here")
        return head, download.vectors


async def fetch_state(
    host: Host,
    run_id: bytes,
    stage: int,
    place: Place,
    donors: Sequence[Donor],
    num_parameters: int,
    num_vectors: int,
    *,
    on_bytes: Callable[[int], None] = lambda num_bytes: None,
) -> tuple[SavedHead, StageState]:
    """A whole saved state. Raises as fetch_saved, and BadReply if it does not have the digest that its head names."""
    head, vectors = await fetch_saved(
        host, run_id, stage, place, donors, num_parameters, num_vectors=num_vectors, on_bytes=on_bytes
    )
    values, first, second, *previous = vectors.unbind()
    state = StageState(values, first, second, head.saved.num_steps, *previous)
    if await asyncio.to_thread(state.digest) != head.saved.digest:
        raise BadReply("the state does not have the digest that was announced")
    return head, state


async def _open(
    stack: contextlib.AsyncExitStack, host: Host, run_id: bytes, stage: int, place: Place, donor: Donor
) -> tuple[FramedStream, SavedHead]:
    request = training_pb2.MemberMessage(get_saved=training_pb2.GetSaved(place=place_to_wire(place)))
    stream = await stack.enter_async_context(
        open_request(
            host, donor, run_id, stage, request, connect_timeout_s=_CONNECT_TIMEOUT_S, introduction_timeout_s=_TIMEOUT_S
        )
    )
    async with asyncio.timeout(_TIMEOUT_S):
        num_bytes = decode(await received(stream)).saved.head_bytes
        raw = await receive_whole(stream, num_bytes, MAX_HEAD_BYTES)
    try:
        head = SavedHead.parse(raw, run_id, stage)
    except ValueError as error:
        raise BadReply(f"peer {donor.peer_id[-8:]} sent a saved state that makes no sense: {error}") from error
    if head.saved.place != place:
        raise BadReply(f"peer {donor.peer_id[-8:]} sent the state of another epoch")
    return stream, head


async def _fetch_pieces(stream: FramedStream, download: Download, on_bytes: Callable[[int], None]) -> None:
    """Until no piece is left that nobody fetches. What was not fetched in the end is left to others."""
    while numbers := download.take():
        try:
            request = training_pb2.GetPieces(first=numbers[0], count=len(numbers))
            async with asyncio.timeout(_TIMEOUT_S):
                await stream.send([training_pb2.MemberMessage(get_pieces=request).SerializeToString()])
            while numbers:
                async with asyncio.timeout(_TIMEOUT_S):
                    piece = await received(stream)
                download.put(numbers[0], piece)
                numbers.pop(0)
                on_bytes(len(piece))
        except BaseException as error:
            download.missing.extendleft(reversed(numbers))
            log.info("donor lost peer=%s reason=%s", stream.peer_id[-8:], error)
            raise
