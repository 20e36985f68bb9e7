"""The server's conversation with one connected device: jobs out, replies in.

Everything here runs in the fleet's event loop. How much of large models is in memory at a
time is bounded by Turns, which the devices take one after the other.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import grpc

from federated.errors import BadReply
from federated.rounds import Device, Job
from plumbing.stream import wire

GOODBYE_SECONDS = 5.0
OFFER_BYTES = 1 << 16  # more than a reply without weights takes

# How much of large models is in memory at a time; the devices take turns, those that send
# theirs until it has been dealt with.
SENDING_BYTES = 32 << 20
RECEIVING_BYTES = 96 << 20
TURN_SECONDS = 60.0  # then the next may begin too: one slow link must not hold up a fleet


class Turns:
    """At most `count` do something at a time; a turn ends by itself after TURN_SECONDS."""

    def __init__(self, count: int) -> None:
        self._free = asyncio.Semaphore(count)

    async def take(self) -> Callable[[], None]:
        """Wait for a turn; return what ends it."""
        await self._free.acquire()

        def end() -> None:
            if not timer.cancelled():
                timer.cancel()
                self._free.release()

        timer = asyncio.get_running_loop().call_later(TURN_SECONDS, end)
        return end


class Memory:
    """The turns of all devices, for a model of `model_bytes`."""

    def __init__(self, model_bytes: int) -> None:
        piece_bytes = min(model_bytes, wire.PIECE_BYTES) or 1
        self.sending = Turns(max(2, SENDING_BYTES // piece_bytes))
        self.sending_whole = Turns(max(2, SENDING_BYTES // (model_bytes or 1)))
        self.receiving = Turns(max(2, RECEIVING_BYTES // (model_bytes or 1)))


class Work:
    """A job of one device, from the server's sending it to the reply."""

    def __init__(
        self, device: Device, job: Job, request: wire.FitRequest, resumed: bool = False
    ) -> None:
        self.device = device
        self.id = job.id
        self.job: Job | None = job  # None once the schedule waits no longer
        self.request: wire.FitRequest | None = request
        self.resumed = resumed  # the device has trained, on a connection that broke

    def forget(self) -> None:
        """Wait no longer: a device that hangs must not keep the weights of its round here."""
        self.job = self.request = None


@dataclass(frozen=True)
class Reply:
    """What came back for some work, not decoded yet, or why nothing did."""

    work: Work
    data: bytes | None  # a fit reply
    problem: str = ""
    pieces: list[bytes] = field(default_factory=list)  # parameters replies, after an offer
    seconds: float = 0.0  # from sending the job to the device's being done
    bytes_sent: int = 0
    bytes_received: int = 0
    end_turn: Callable[[], None] = lambda: None


class Session:
    """One connected device.

    Args:
        in_pieces: whether it takes weights so.
        offered: called with the work that a device has finished, before it hands it over.
    """

    def __init__(
        self,
        device: Device,
        context: grpc.aio.ServicerContext,
        memory: Memory,
        offered: Callable[[Work], None],
        in_pieces: bool = False,
        address: str = "",
        key_hash: str = "",
    ) -> None:
        self.device = device
        self.cid = device.cid
        self.context = context
        self.memory = memory
        self.offered = offered
        self.in_pieces = in_pieces
        self.address = address  # its IP address
        self.key_hash = key_hash  # of the key that it proved to have, at a secured server
        self.task = asyncio.current_task()
        self.cut_off = ""  # why, if the server ends the connection
        self.work: Work | None = None  # from `give` until the reply
        self._inbox: asyncio.Queue[Work | bytes] = asyncio.Queue()

    def give(self, work: Work) -> None:
        """Let the device do some work."""
        self.work = work
        self._inbox.put_nowait(work)

    def dismiss(self, goodbye: bytes) -> None:
        """Send the last message that the device gets."""
        self._inbox.put_nowait(goodbye)

    def cut(self, reason: str) -> None:
        """End the connection now."""
        self.cut_off = reason
        if self.task:
            self.task.cancel()

    async def replies(self) -> AsyncGenerator[Reply, None]:
        """Yield a Reply for each work that is given, until the device is dismissed or fails.

        When the connection breaks, `work` is what it was in the middle of.
        """
        while isinstance(work := await self._inbox.get(), Work):
            try:
                reply = await self._ask(work)
            except BadReply as error:
                self.work = None
                yield Reply(work, None, str(error))
                return
            self.work = None
            del work  # it would keep the weights of its round until the next one
            yield reply
            del reply
        await self.context.write(work)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.context.read(), GOODBYE_SECONDS)

    async def _ask(self, work: Work) -> Reply:
        """Send a job and return the reply; weights are fetched when it is their turn."""
        start, sent = await self._send(work)
        answer = await self._read()
        seconds = time.monotonic() - start
        if not is_offer(answer, work.id):
            return Reply(work, answer, "", [], seconds, sent, len(answer))
        self.offered(work)
        end_turn = await self.memory.receiving.take()
        try:
            if not work.request:
                end_turn()
                return Reply(work, None, "too late")
            slices, piece_bytes = work.request.slices, work.request.piece_bytes
            pieces = await self._fetch(work.id, slices, piece_bytes)
        except BaseException:
            end_turn()
            raise
        received = len(answer) + sum(map(len, pieces))
        return Reply(work, answer, "", pieces, seconds, sent, received, end_turn)

    async def _send(self, work: Work) -> tuple[float, int]:
        """Send a request, in pieces where the device takes them; return from when on, and bytes."""
        turns, messages = self.memory.sending, self._messages(work)
        if not self.in_pieces:
            turns = self.memory.sending_whole
        start, sent = 0.0, 0
        while True:
            end_turn = await turns.take()
            try:
                start = start or time.monotonic()
                if not (message := next(messages, b"")):  # made now, not while it waited
                    return start, sent
                sent += len(message)
                await self.context.write(message)
                del message  # it would be kept until the next turn, 10 MB a device
            finally:
                end_turn()

    def _messages(self, work: Work) -> Iterator[bytes]:
        if work.resumed:
            yield wire.encode_fit([], {wire.ROUND_ID: work.id})
        elif work.request and self.in_pieces:
            yield from work.request.pieces()
        elif work.request:
            yield work.request.whole

    async def _fetch(self, job_id: str, slices: list[slice], piece_bytes: int) -> list[bytes]:
        """Return a device's weights, not decoded; whether they are complete is not known here."""
        pieces: list[bytes] = []
        for piece in slices:
            config: dict[str, Any] = {wire.ROUND_ID: job_id}
            if len(slices) > 1:
                config |= {wire.FIRST: piece.start, wire.COUNT: piece.stop - piece.start}
            await self.context.write(wire.encode_get_parameters(config))
            pieces.append(await self._read())
            if len(pieces[-1]) > 2 * piece_bytes:
                break  # not what was asked for: no more of this
        return pieces

    async def _read(self) -> bytes:
        """Read a reply. Reading only when one is due makes HTTP/2 hold back whatever else comes."""
        data = await self.context.read()
        if data is grpc.aio.EOF:
            # If the connection broke, or the reply is too large, gRPC cancels us in this time.
            await asyncio.sleep(0.5)
            raise BadReply("hung up")
        return cast(bytes, data)


def is_offer(data: bytes, job_id: str) -> bool:
    """Return whether a reply offers the weights of this job."""
    if not job_id or len(data) > OFFER_BYTES:
        return False
    try:
        weights, _, metrics = wire.decode_fit_reply(data)
    except BadReply:
        return False
    return not weights and metrics.get(wire.ROUND_ID) == job_id
