"""The server's conversation with one connected device: jobs out, replies in.

Everything here runs in the fleet's event loop.
"""

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import grpc

from federated.errors import BadReply
from federated.rounds import Device, Job, Progress
from plumbing.stream import wire
from plumbing.stream.turns import (
    MIN_BYTES_PER_SECOND,
    OFFER_BYTES,
    STALL_SECONDS,
    Incoming,
    Memory,
    no_turn,
)

GOODBYE_SECONDS = 5.0

# A device that has offered its update has to send each chunk at this part of its own rate so far
# (see turns.py); else its connection is closed.
SLOWER = 10  # times than before


T = TypeVar("T")


class Work:
    """A job of one device, from the server's sending it to the reply."""

    def __init__(
        self, device: Device, job: Job, request: wire.WeightsRequest, resumed: bool = False
    ) -> None:
        self.device = device
        self.id = job.id
        self.kind = job.kind
        self.job: Job | None = job  # None once the schedule waits no longer
        self.request: wire.WeightsRequest | None = request
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
    # After an offer: parameters replies, and what was asked for.
    chunks: list[tuple[wire.Chunk, bytes]] = field(default_factory=list)
    seconds: float = 0.0  # from sending the job to the device's being done
    bytes_sent: int = 0
    bytes_received: int = 0
    end_turn: Callable[[], None] = no_turn
    seconds_sending: float = 0.0  # the first of `seconds`
    seconds_receiving: float = 0.0  # after `seconds`


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
        incoming: Incoming,
        offered: Callable[[Work], None],
        in_pieces: bool = False,
        address: str = "",
        key_hash: str = "",
    ) -> None:
        self.device = device
        self.cid = device.cid
        self.context = context
        self.memory = memory
        self.incoming = incoming
        self.offered = offered
        self.in_pieces = in_pieces
        self.address = address  # its IP address
        self.key_hash = key_hash  # of the key that it proved to have, at a secured server
        self.task = asyncio.current_task()
        self.progress: Progress | None = None  # as it reported last
        self.has_reported = False  # that waits in the fleet's queue
        self.report_due = 0.0  # a report that comes sooner is ignored
        self.cut_off = ""  # why, if the server ends the connection
        self.work: Work | None = None  # from `give` until the reply
        self._inbox: asyncio.Queue[Work | bytes] = asyncio.Queue()

    def give(self, work: Work) -> None:
        """Give the device a job."""
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
            except BadReply as error:  # which keeps what was read, until we leave this block
                self.cut_off = str(error)
            self.work = None
            if self.cut_off:
                yield Reply(work, None, self.cut_off)
                return
            del work  # it would keep the weights of its round until the next one
            yield reply
            del reply
        await self.context.write(work)
        with contextlib.suppress(TimeoutError, BadReply):
            await self.incoming.read_words(GOODBYE_SECONDS)

    async def _ask(self, work: Work) -> Reply:
        """Send a job and return the reply; weights are fetched when it is their turn."""
        start, sent = await self._send(work)
        sending = time.monotonic() - start
        if not sent:  # nobody waited for it any more when its turn came
            return Reply(work, None, "too late")
        announced = self.incoming.announces
        if announced:
            await self.incoming.announcement()
            self.offered(work)
        seconds = time.monotonic() - start
        end_turn = await self._turn_to_answer()
        try:
            answer = await self._read_answer()
            seconds = seconds if announced else time.monotonic() - start
            if self.in_pieces and len(answer) > OFFER_BYTES:
                raise BadReply(f"sent {len(answer):,} bytes where it had to offer its update")
            if work.kind == "evaluate" or not is_offer(answer, work.id):
                return Reply(work, answer, "", [], seconds, sent, len(answer), end_turn, sending)
            if not announced:
                end_turn()
                self.offered(work)
                end_turn = await self.incoming.receiving_turn()
            if not work.request:
                end_turn()
                return Reply(work, None, "too late")
            fetched = time.monotonic()
            chunks = await self._fetch(work.id, work.request.chunks)
        except BaseException:
            end_turn()
            raise
        received = len(answer) + sum(len(data) for _, data in chunks)
        receiving = time.monotonic() - fetched
        return Reply(
            work, answer, "", chunks, seconds, sent, received, end_turn, sending, receiving
        )

    async def _turn_to_answer(self) -> Callable[[], None]:
        """Wait until the device's answer to a job may be read; return what ends the turn."""
        if self.incoming.announces:
            return await self.incoming.receiving_turn()
        if self.in_pieces and not self.incoming.large:
            return no_turn  # it is not larger than a chunk
        return await self.memory.whole.take()  # it may come as soon as the device has trained

    async def _read_answer(self) -> bytes:
        if not self.incoming.announces:
            return await self._read()
        data, waited = await counting_seconds(self._read(), STALL_SECONDS)
        if data is None:
            raise BadReply(f"announced a reply, then sent nothing for {waited:.0f} s")
        return data

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
                await write_in_time(self.context, message)
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

    async def _fetch(
        self, job_id: str, chunks: Sequence[wire.Chunk]
    ) -> list[tuple[wire.Chunk, bytes]]:
        """Return a device's update, not decoded; whether it is complete is not known here.

        Raises:
            BadReply: it does not come, or not fast enough.
        """

        unasked = iter(chunks)
        replies: list[tuple[wire.Chunk, bytes]] = []

        async def next_reply() -> bytes:
            # One chunk ahead, so that no time is lost between two.
            for chunk in itertools.islice(unasked, 1 if replies else 2):
                config = {} if len(chunks) == 1 else chunk.config()
                request = wire.encode_get_parameters({wire.ROUND_ID: job_id, **config})
                await self.context.write(request)
            return await self._read()

        due, waited = 0, 0.0  # bytes, seconds
        for chunk in chunks:
            rate = max(MIN_BYTES_PER_SECOND, due / waited / SLOWER if waited else 0)
            silence = STALL_SECONDS + chunk.size / rate
            in_all = STALL_SECONDS + (due + chunk.size) / MIN_BYTES_PER_SECOND - waited
            data, seconds = await counting_seconds(next_reply(), min(silence, in_all))
            waited += seconds
            if data is None and silence <= in_all:
                raise BadReply(f"offered its update, then sent nothing for {seconds:.0f} s")
            if data is None:
                raise BadReply(f"offered its update, then sent {due:,} bytes in {waited:.0f} s")
            if len(data) > chunk.size + OFFER_BYTES:
                raise BadReply(f"sent {len(data):,} bytes, asked for {chunk.size:,} of its update")
            due += chunk.size
            replies.append((chunk, data))
        return replies

    async def _read(self) -> bytes:
        """Read a reply. Reading only when one is due makes HTTP/2 hold back whatever else comes."""
        data = await self.context.read()
        if data is grpc.aio.EOF:
            # If the connection broke, or the reply is too large, gRPC cancels us in this time.
            await asyncio.sleep(0.5)
            raise BadReply("closed the connection")
        return cast(bytes, data)


async def write_in_time(context: grpc.aio.ServicerContext, message: bytes) -> None:
    """Send a part of a model, or all of it.

    Raises:
        BadReply: the device does not take it, or not fast enough.
    """

    async def write() -> bool:
        await context.write(message)
        return True

    allowed = STALL_SECONDS + len(message) / MIN_BYTES_PER_SECOND
    taken, waited = await counting_seconds(write(), allowed)
    if not taken:
        raise BadReply(f"did not take {len(message):,} bytes of the model in {waited:.0f} s")


async def counting_seconds(
    coroutine: Coroutine[Any, Any, T], allowed: float
) -> tuple[T | None, float]:
    """Await something; return what it returns, None if it takes longer, and how long it took.

    Seconds are counted one by one: a standstill of this machine is not the device's.
    """
    task = asyncio.ensure_future(coroutine)
    waited = 0.0
    try:
        while waited < allowed:
            step, start = min(1.0, allowed - waited), time.monotonic()
            done, _ = await asyncio.wait([task], timeout=step)
            waited += min(step, time.monotonic() - start)
            if done:
                return task.result(), waited
        return None, waited
    finally:
        task.cancel()


def is_offer(data: bytes, job_id: str) -> bool:
    """Return whether a reply offers the weights of this job."""
    if not job_id or len(data) > OFFER_BYTES:
        return False
    try:
        weights, _, metrics = wire.decode_fit_reply(data)
    except BadReply:
        return False
    return not weights and metrics.get(wire.ROUND_ID) == job_id
