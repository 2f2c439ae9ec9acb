"""FramedStream: messages over one long-lived duplex byte stream.

    frame    = payload length (4 bytes) | kind (1) | sequence number (4) | payload      all big-endian
    message  = any number of MORE frames, then one LAST frame

Flow control is by credit: a side may have at most `window` unread payload bytes under way; the reader returns credit for messages
that were taken, in lots of half a window (a frame for every message would wake both daemons and both processes once more per step).
So a slow reader holds at most its window in memory, whatever the peer does, and a message may be as large as half a window. PING is answered by the peer's event loop even
while its device is busy: silence on PING means that the process is stopped or unreachable, not that it computes.
"""

from __future__ import annotations

import asyncio
import collections
import enum
import logging
import struct
import time
from collections.abc import Sequence
from typing import Protocol

from swarm.errors import BadReply, PeerFailed
from swarm.wire_format import Buffer

log = logging.getLogger(__name__)

MAX_FRAME_BYTES = 256 * 1024
FIRST_WINDOW_BYTES = 512 * 1024
_DRAIN_FROM_BYTES = 64 * 1024
# Frames that wait here to be taken. An honest peer has a message or two under way; empty ones would cost it no credit.
_MAX_WAITING_FRAMES = 1024
# A peer that pings but never reads the answers is given up when so much waits for it.
_MAX_PONG_BACKLOG_BYTES = 1024 * 1024
_HEADER = struct.Struct("!IBI")
_CREDIT = struct.Struct("!I")


class FrameKind(enum.IntEnum):
    LAST = 1
    MORE = 2
    END = 3
    ERROR = 4
    CREDIT = 5
    PING = 6
    PONG = 7


class Reader(Protocol):
    async def readexactly(self, n: int) -> bytes: ...


class Writer(Protocol):
    @property
    def transport(self) -> asyncio.WriteTransport: ...
    def writelines(self, data: Sequence[Buffer], /) -> None: ...
    async def drain(self) -> None: ...
    def close(self) -> None: ...


class FramedStream:
    """One side of a stream to a peer. Create with `await FramedStream.start(...)`, end with `await aclose()`.

    One task may send and one may receive at a time; ping may run beside them.
    """

    def __init__(self, reader: Reader, writer: Writer, peer_id: str) -> None:
        self.peer_id = peer_id
        self.bytes_sent = 0
        self.bytes_received = 0
        self._reader, self._writer = reader, writer
        self._send_sequence = 0
        self._window_bytes = FIRST_WINDOW_BYTES  # what the peer may have unread here
        self._unread_bytes = 0
        self._owed_bytes = 0  # taken here, but the credit for it not yet returned
        self._credit_bytes = FIRST_WINDOW_BYTES  # what we may still send
        self._messages: collections.deque[bytes] = collections.deque()
        self._failure: PeerFailed | None = None
        self._ended = False  # the peer said END
        self._closed = False
        self._was_refused = False
        self._changed = asyncio.Event()  # a message, credit, pong or the end came
        self._pongs = 0
        self._pump_task: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, reader: Reader, writer: Writer, peer_id: str) -> FramedStream:
        stream = cls(reader, writer, peer_id)
        stream._pump_task = asyncio.create_task(stream._pump())
        return stream

    @property
    def is_broken(self) -> bool:
        """Whether nothing can be sent any more."""
        return self._failure is not None or self._closed or self._ended or self._writer.transport.is_closing()

    def accept_messages_of(self, message_bytes: int) -> None:
        """Let the peer send messages of up to so many bytes."""
        window_bytes = 2 * message_bytes
        if window_bytes > self._window_bytes and not self.is_broken:
            self._write_frame(FrameKind.CREDIT, _CREDIT.pack(window_bytes - self._window_bytes))
            self._window_bytes = window_bytes

    def send_at_once(self, message: Sequence[Buffer]) -> bool:
        """Send one message, given as consecutive buffers, if that needs no waiting. Raises PeerFailed if the stream broke."""
        self._raise_if_broken()
        total = sum(map(len, message))
        is_free = self._writer.transport.get_write_buffer_size() < _DRAIN_FROM_BYTES
        if not is_free or total > min(MAX_FRAME_BYTES, self._credit_bytes):
            return False
        self._credit_bytes -= total
        self._write_frame(FrameKind.LAST, *message)
        return True

    async def send(self, message: Sequence[Buffer]) -> None:
        """Send one message, given as consecutive buffers. Waits for credit. Raises PeerFailed if the stream broke."""
        if not self.send_at_once(message):
            views = [memoryview(part).cast("B") for part in message if len(part)] or [memoryview(b"")]
            await self._send_in_pieces(views, sum(map(len, views)))

    async def _send_in_pieces(self, views: list[memoryview], total: int) -> None:
        sent = 0
        for view in views:
            offset = 0
            while offset < len(view) or total == 0:
                while self._credit_bytes <= 0:
                    await self._wait_for_change()
                    self._raise_if_broken()
                size = min(MAX_FRAME_BYTES, self._credit_bytes, len(view) - offset)
                self._credit_bytes -= size
                sent += size
                kind = FrameKind.LAST if sent == total else FrameKind.MORE
                self._write_frame(kind, view[offset : offset + size])
                await self._drain()
                offset += size
                if total == 0:
                    return

    async def receive(self) -> bytes | None:
        """The next message; None when the peer ended the stream properly. Raises PeerFailed when it broke instead."""
        while not self._messages:
            if self._ended:
                return None
            self._raise_if_over()  # not for a connection that only cannot be written any more: words may still be unread
            await self._wait_for_change()
        message = self._messages.popleft()
        self._unread_bytes -= len(message)
        self._owed_bytes += len(message)
        if 2 * self._owed_bytes >= self._window_bytes and not self.is_broken:
            self._write_frame(FrameKind.CREDIT, _CREDIT.pack(self._owed_bytes))
            self._owed_bytes = 0
        return message

    async def ping(self, timeout_s: float) -> float:
        """Round-trip time in seconds. Raises PeerFailed if the peer's event loop does not answer in time."""
        self._raise_if_broken()
        wanted, started = self._pongs + 1, time.monotonic()
        self._write_frame(FrameKind.PING)
        try:
            async with asyncio.timeout(timeout_s):
                while self._pongs < wanted:
                    self._raise_if_broken()
                    await self._wait_for_change()
        except TimeoutError:
            raise PeerFailed(f"peer {self.peer_id[-8:]} did not answer a ping within {timeout_s:.1f} s") from None
        return time.monotonic() - started

    async def fail(self, reason: str) -> None:
        """Tell the peer that this stream ends with an error, and close."""
        if not self.is_broken:
            self._write_frame(FrameKind.ERROR, reason.encode()[:500])
        await self.aclose()

    async def aclose(self) -> None:
        """End the stream properly (if it still works) and wait for its task. Safe to call twice."""
        if not self.is_broken:
            self._write_frame(FrameKind.END)
        self._closed = True
        self._writer.close()
        self._changed.set()
        if self._pump_task is not None:
            self._pump_task.cancel()
            await asyncio.wait([self._pump_task])

    def _raise_if_over(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._closed:
            raise PeerFailed(f"the stream to peer {self.peer_id[-8:]} is closed")

    def _raise_if_broken(self) -> None:
        self._raise_if_over()
        if self._ended:
            raise PeerFailed(f"peer {self.peer_id[-8:]} ended the stream")
        if self._writer.transport.is_closing():  # its task has not noticed yet
            raise PeerFailed(f"the connection to peer {self.peer_id[-8:]} was lost")

    async def _wait_for_change(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    def _write_frame(self, kind: FrameKind, *payload: Buffer) -> None:
        if self._writer.transport.is_closing():  # the connection is gone, and our reader has not been told yet
            self._break(PeerFailed(f"peer {self.peer_id[-8:]} went away (the stream broke off)"))
            return
        size = sum(map(len, payload))
        header = _HEADER.pack(size, kind, self._send_sequence & 0xFFFFFFFF)
        self._send_sequence += 1
        self.bytes_sent += _HEADER.size + size
        # One write: p2pd forwards each read of its socket as a packet of its own. Small frames are joined, large ones not copied.
        self._writer.writelines([b"".join([header, *payload])] if size < 65536 else [header, *payload])

    async def _drain(self) -> None:
        if self._writer.transport.get_write_buffer_size() < _DRAIN_FROM_BYTES:
            return
        try:
            await self._writer.drain()
        except (ConnectionError, OSError) as error:
            self._break(PeerFailed(f"the connection to peer {self.peer_id[-8:]} was lost while sending"))
            self._raise_if_broken()
            raise AssertionError("unreachable") from error

    def _break(self, failure: PeerFailed) -> None:
        if self._failure is None and not self._ended:
            self._failure = failure
        self._changed.set()

    async def _pump(self) -> None:
        """Read frames until the stream ends, and file them."""
        try:
            await self._read_frames()
        except asyncio.IncompleteReadError:
            self._break(PeerFailed(f"peer {self.peer_id[-8:]} went away (the stream broke off)"))
        except (ConnectionError, OSError) as error:
            self._break(PeerFailed(f"the connection to peer {self.peer_id[-8:]} was lost: {error}"))
        except BadReply as error:
            # Whoever uses the stream says what that means; a reason that the peer gives is nothing bad by itself.
            log.log(
                logging.INFO if self._was_refused else logging.WARNING,
                "stream broken by peer=%s reason=%s",
                self.peer_id,
                error,
            )
            self._break(error)
        finally:
            self._writer.close()

    async def _read_frames(self) -> None:
        sequence = 0
        pieces: list[bytes] = []
        while True:
            size, kind, number = _HEADER.unpack(await self._reader.readexactly(_HEADER.size))
            if size > MAX_FRAME_BYTES:
                raise BadReply(
                    f"peer {self.peer_id[-8:]} announced a frame of {size} bytes, at most {MAX_FRAME_BYTES} are allowed"
                )
            if number != sequence & 0xFFFFFFFF:
                raise BadReply(f"peer {self.peer_id[-8:]} sent frame {number} where {sequence} was due")
            sequence += 1
            if kind in (FrameKind.LAST, FrameKind.MORE):
                self._unread_bytes += size
                if self._unread_bytes + self._owed_bytes > self._window_bytes:
                    raise BadReply(
                        f"peer {self.peer_id[-8:]} sent more than the window of {self._window_bytes} bytes allows"
                    )
                if len(pieces) + len(self._messages) >= _MAX_WAITING_FRAMES:
                    raise BadReply(
                        f"peer {self.peer_id[-8:]} sent {_MAX_WAITING_FRAMES} frames that were not taken yet"
                    )
            payload = await self._reader.readexactly(size) if size else b""
            self.bytes_received += _HEADER.size + size
            if kind == FrameKind.MORE:
                pieces.append(payload)
            elif kind == FrameKind.LAST:
                self._messages.append(b"".join([*pieces, payload]) if pieces else payload)
                pieces = []
                self._changed.set()
            elif kind == FrameKind.END:
                self._ended = True
                self._changed.set()
                return
            elif kind == FrameKind.ERROR:
                reason = "".join(c for c in payload.decode(errors="replace")[:500] if c.isprintable())
                self._was_refused = True
                raise BadReply(f"peer {self.peer_id[-8:]} ended the stream: {reason}")
            elif kind == FrameKind.CREDIT and size == _CREDIT.size:
                self._credit_bytes += _CREDIT.unpack(payload)[0]
                self._changed.set()
            elif kind == FrameKind.PING:
                if self._writer.transport.get_write_buffer_size() > _MAX_PONG_BACKLOG_BYTES:
                    raise BadReply(f"peer {self.peer_id[-8:]} sends pings and does not read the answers")
                if not self.is_broken:
                    self._write_frame(FrameKind.PONG)
            elif kind == FrameKind.PONG:
                self._pongs += 1
                self._changed.set()
            else:
                raise BadReply(f"peer {self.peer_id[-8:]} sent a frame of unknown kind {kind}")
