"""How much of large models is in memory at a time: devices take turns, to be sent and to send.

gRPC reads a message as a whole, and knows one limit for all that a server listens at. Where the
limit is small, each connection can be read at any time. At an open server it is the size of a stock
client's whole update, at a secured one that of a chunk. Where that is large no message is read
before it is the connection's turn; until then HTTP/2 holds it back, but for its window.
"""

import asyncio
from collections.abc import Callable
from typing import cast

import grpc

from federated.errors import BadReply
from plumbing.stream import wire

OFFER_BYTES = 1 << 16  # more than a reply without weights takes
MAX_WORDS_BYTES = 1 << 20  # of a greeting, with the names of many classes

SENDING_BYTES = 32 << 20
RECEIVING_BYTES = 96 << 20  # updates that are sent, until they have been dealt with
SLOW_BYTES = 192 << 20  # of these, and of those whose turn has passed on
WHOLE_BYTES = 384 << 20  # 8 of ResNet18: this many stock clients may be training
FETCHES = 64  # of the newest model, half a MB each
GREETING_BYTES = 96 << 20  # if all that greet are hostile; an honest greeting has some kB

# Within this time, and then at this rate, a device has to send what it has announced.
STALL_SECONDS = 4.0
MIN_BYTES_PER_SECOND = 100_000
# At this rate a turn passes on while a slow link still carries what is left.
TURN_BYTES_PER_SECOND = 1_000_000


def no_turn() -> None:
    """End the turn of a connection that needs none."""


class Turns:
    """At most `count` do something at a time.

    Args:
        seconds: then a turn passes on: one slow link must not hold up a fleet. None is never.
    """

    def __init__(self, count: int, seconds: float | None = None) -> None:
        self._free = asyncio.Semaphore(count)
        self._seconds = seconds

    async def take(self) -> Callable[[], None]:
        """Wait for a turn; return what ends it."""
        await self._free.acquire()
        ended = False

        def end() -> None:
            nonlocal ended
            if not ended:
                ended = True
                self._free.release()
            if timer:
                timer.cancel()

        timer = None
        if self._seconds is not None:
            timer = asyncio.get_running_loop().call_later(self._seconds, end)
        return end


class Memory:
    """The turns of all devices, for a model of `model_bytes`."""

    def __init__(self, model_bytes: int) -> None:
        model_bytes = model_bytes or 1
        piece_bytes = min(model_bytes, wire.PIECE_BYTES)
        whole_seconds = STALL_SECONDS + model_bytes / TURN_BYTES_PER_SECOND
        self.sending = Turns(
            max(2, SENDING_BYTES // piece_bytes),
            STALL_SECONDS + piece_bytes / TURN_BYTES_PER_SECOND,
        )
        self.sending_whole = Turns(max(2, SENDING_BYTES // model_bytes), whole_seconds)
        self.receiving = Turns(max(2, RECEIVING_BYTES // model_bytes), whole_seconds)
        # Only where messages are large:
        self.slow = Turns(max(2, SLOW_BYTES // model_bytes))
        self.whole = Turns(max(2, WHOLE_BYTES // model_bytes))
        # Apart: who announces nothing can hold up only the others that do not.
        self.greeting = Turns(max(2, GREETING_BYTES // model_bytes))
        self.greeting_unannounced = Turns(max(2, GREETING_BYTES // model_bytes))
        self.fetching = Turns(FETCHES)


class Incoming:
    """What a device sends on one connection.

    Args:
        large: whether one message can be as large as a whole update.
        announces: whether the device announces its replies to greetings and jobs, by a call of
            its own. A stock client does not.
    """

    def __init__(
        self, context: grpc.aio.ServicerContext, memory: Memory, large: bool, announces: bool
    ) -> None:
        self.context = context
        self.memory = memory
        self.large = large
        self.announces = large and announces
        self._announced = asyncio.Semaphore(0)

    def announce(self) -> None:
        """Note that a reply is on its way."""
        self._announced.release()

    async def announcement(self) -> None:
        """Wait until a reply is on its way."""
        await self._announced.acquire()

    async def receiving_turn(self) -> Callable[[], None]:
        """Wait until an update may be read; return what ends the turn."""
        end_place = await self.memory.slow.take() if self.large else no_turn
        try:
            end_turn = await self.memory.receiving.take()
        except BaseException:
            end_place()
            raise

        def end() -> None:
            end_turn()
            end_place()

        return end

    async def read_words(self, seconds: float) -> bytes:
        """Read a reply that has no weights, such as a greeting.

        Raises:
            TimeoutError: there is none after the time allowed, or soon after its announcement.
            BadReply: the device hung up, or sent more than words.
        """
        end_turn = no_turn
        try:
            async with asyncio.timeout(seconds):
                if self.announces:
                    await self.announcement()
                    end_turn = await self.memory.greeting.take()
                elif self.large:
                    end_turn = await self.memory.greeting_unannounced.take()
                async with asyncio.timeout(STALL_SECONDS if self.large else None):
                    data = await self.context.read()
        finally:
            end_turn()
        if data is grpc.aio.EOF:
            raise BadReply("hung up")
        if (size := len(cast(bytes, data))) > MAX_WORDS_BYTES:
            del data  # the exception keeps what is here
            raise BadReply(f"sent {size:,} bytes")
        return cast(bytes, data)
