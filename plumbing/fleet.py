"""The server's end of Flower's gRPC stream: who is connected, and talking to them.

An asyncio gRPC server runs in a thread of its own, one coroutine a device, so that a
thousand devices cost no thousand threads. The round loop stays plain synchronous code:
`exchange` sends a request to each device at once and yields the replies as they come.
"""

import asyncio
import contextlib
import itertools
import queue
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import grpc
from flwr.server.client_manager import ClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.criterion import Criterion

from plumbing import wire
from plumbing.addresses import check_cid, join_address, listening_addresses, reachable_address
from plumbing.errors import BadReply, FederationError
from plumbing.updates import clean_metrics

GREETING_SECONDS = 300.0  # to say what it is; a Pi may have to cut its partition first
GOODBYE_SECONDS = 5.0
LOST = "the connection broke"


@dataclass(eq=False)
class Device:
    """A connected device; the handle that strategies know as ClientProxy."""

    cid: str  # unique; "?1", "?2", … for clients that do not say who they are
    properties: Mapping[str, Any]  # what it said of itself, cleaned
    requests: asyncio.Queue = field(default_factory=asyncio.Queue, repr=False)

    @property
    def name(self) -> str:
        """How people know it: "device 0", or "device ?" if it did not say."""
        return "device ?" if self.cid.startswith("?") else f"device {self.cid}"


@dataclass(frozen=True)
class Reply:
    """What came back from a device: bytes, or why there are none."""

    device: Device
    data: bytes | None
    problem: str = ""
    seconds: float = 0.0  # from sending the request to having the whole reply
    bytes_sent: int = 0


class Fleet(ClientManager):
    """The devices that are connected, in Flower's terms a client manager.

    Args:
        server_address: HOST:PORT to listen at; port 0 takes a free one.
        greeting: the config sent to each device that joins (see Settings).
        admit: looks at the properties of a device that wants to join and returns why it
            must not, or None. Not called for clients that tell nothing of themselves.
        announce: called with a Device and "joined" or "left", from the fleet's thread.
        refuse: called with a device's name and why it was refused, from the same thread.
        max_reply_bytes: larger messages are refused before they are read.
        keepalive_seconds: how often a silent connection is probed; a dead one is
            noticed after this and a half more.
    """

    def __init__(
        self,
        server_address: str,
        greeting: Mapping[str, Any],
        admit: Callable[[Mapping[str, Any]], str | None],
        announce: Callable[[Device, str], None],
        refuse: Callable[[str, str], None],
        max_reply_bytes: int = -1,
        keepalive_seconds: float = 10.0,
    ) -> None:
        self.greeting = wire.encode_get_properties(greeting)
        self.admit = admit
        self.announce = announce
        self.refuse = refuse
        self.max_reply_bytes = max_reply_bytes
        self.keepalive_seconds = keepalive_seconds
        self.random = random.Random()  # what `sample` draws from; seed it for repeatable rounds
        self.avoided: set[str] = set()  # cids that `sample` takes only where others lack
        self.devices: dict[str, Device] = {}
        self.changed = threading.Condition()
        self.closing = False
        self._numbers = itertools.count(1)
        self._joins: set[asyncio.Task] = set()

        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fleet", daemon=True)
        self._thread.start()
        try:
            self.address = self._call(self._listen(listening_addresses(server_address)))
        except BaseException:
            self._stop_loop()
            raise

    # --- Flower's ClientManager ---

    def num_available(self) -> int:
        return len(self.devices)

    def all(self) -> dict[str, Any]:
        return dict(self.devices)

    def register(self, client: Any) -> bool:
        with self.changed:
            if client.cid in self.devices:
                return False
            if not self.closing:
                self.announce(client, "joined")
            self.devices[client.cid] = client
            self.changed.notify_all()
        return True

    def unregister(self, client: Any) -> None:
        with self.changed:
            if client in self.devices.values():
                del self.devices[client.cid]
                if not self.closing:
                    self.announce(client, "left")
                self.changed.notify_all()

    def wait_for(self, num_clients: int, timeout: float | None = None) -> bool:
        """Wait until so many devices are connected; False when `timeout` seconds are over."""
        with self.changed:
            return self.changed.wait_for(lambda: len(self.devices) >= num_clients, timeout)

    def sample(
        self,
        num_clients: int,
        min_num_clients: int | None = None,
        criterion: Criterion | None = None,
    ) -> list[Any]:
        """Draw devices without replacement; all of them if there are fewer."""
        self.wait_for(min_num_clients or num_clients)
        with self.changed:
            # Sorted, so that the draw does not depend on who joined first.
            able = [
                d
                for _, d in sorted(self.devices.items())
                if not criterion or criterion.select(cast(ClientProxy, d))
            ]
        chosen: list[Any] = []
        for group in (
            [d for d in able if d.cid not in self.avoided],
            [d for d in able if d.cid in self.avoided],
        ):
            chosen += self.random.sample(group, min(num_clients - len(chosen), len(group)))
        return chosen

    # --- Talking to devices ---

    def exchange(self, requests: Iterable[tuple[Device, bytes]]) -> Iterator[Reply]:
        """Send each device its request, all at once; yield the replies as they arrive."""
        replies: queue.SimpleQueue[Reply] = queue.SimpleQueue()
        count = 0
        for device, data in requests:
            self._loop.call_soon_threadsafe(self._ask, device, data, replies)
            count += 1
        for _ in range(count):
            yield replies.get()

    def close(self, run_is_over: bool) -> None:
        """Stop listening. With `run_is_over` devices are told to end, else they come back."""
        self._call(self._stop(GOODBYE_SECONDS if run_is_over else 0))
        self._stop_loop()

    # --- In the fleet's thread ---

    async def _listen(self, addresses: list[tuple[str, int]]) -> str:
        self._server = grpc.aio.server(
            options=[
                ("grpc.so_reuseport", 0),  # else a second server would share the port unnoticed
                ("grpc.max_receive_message_length", self.max_reply_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.keepalive_time_ms", int(self.keepalive_seconds * 1000)),
                ("grpc.keepalive_timeout_ms", int(self.keepalive_seconds * 500)),
                ("grpc.http2.max_pings_without_data", 0),
            ]
        )
        join = grpc.stream_stream_rpc_method_handler(self._join)  # bytes in, bytes out
        handlers = grpc.method_handlers_generic_handler("flwr.proto.FlowerService", {"Join": join})
        self._server.add_generic_rpc_handlers((handlers,))
        host, port = addresses[0]
        for host, _ in reversed(addresses):
            try:
                port = self._server.add_insecure_port(join_address(host, port))
            except RuntimeError as error:  # somebody took it since `listening_addresses` looked
                raise FederationError(f"cannot listen at {join_address(host, port)}") from error
        await self._server.start()
        return reachable_address(host, port)

    async def _join(self, _: Any, context: grpc.aio.ServicerContext) -> None:
        """Serve one device for as long as it is connected."""
        task = asyncio.current_task()
        assert task
        self._joins.add(task)
        try:
            device = await self._greet(context)
            if self.closing:  # it came while the run ended
                device.requests.put_nowait((None, None))
            try:
                while await self._serve_one(device, context):
                    pass
            finally:
                self._answer_for_the_lost(device)
                self.unregister(device)
        finally:
            self._joins.discard(task)

    async def _greet(self, context: grpc.aio.ServicerContext) -> Device:
        """Ask the device what it is; return it, registered, or refuse it."""
        await context.write(self.greeting)
        try:
            data = await asyncio.wait_for(context.read(), GREETING_SECONDS)
            if data is grpc.aio.EOF:
                raise BadReply("hung up")
            properties = wire.decode_properties_reply(data)
        except (BadReply, TimeoutError) as error:
            reason = f"it did not say what it is ({error or 'no answer'})"
            self.refuse(f"client at {context.peer()}", reason)
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, reason)
        if not properties or "cid" not in properties:
            device = Device(f"?{next(self._numbers)}", {})
            self.register(device)
            return device

        device = Device(str(properties["cid"]), clean_metrics(properties))
        try:
            check_cid(device.cid)
        except FederationError as error:
            self.refuse(f"client at {context.peer()}", str(error))
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        if objection := self.admit(properties):
            # Its own words are in it: on one line, and short enough for gRPC's 16 kB.
            objection = "".join(c if c.isprintable() else "?" for c in objection[:500])
            self.refuse(device.name, objection)
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, objection)
        # A device that lost its power comes back before its dead connection is noticed:
        # give the old one the time in which a dead one is found out.
        deadline = time.monotonic() + self.keepalive_seconds * 1.5 + 1
        while not self.register(device):
            if time.monotonic() > deadline:
                reason = f"a device with --cid={device.cid} is connected already; give each its own"
                self.refuse(device.name, reason)
                await context.abort(grpc.StatusCode.ALREADY_EXISTS, reason)
            await asyncio.sleep(0.1)
        return device

    def _ask(self, device: Device, data: bytes, replies: "queue.SimpleQueue[Reply]") -> None:
        if self.devices.get(device.cid) is device:
            device.requests.put_nowait((data, replies))
        else:
            replies.put(Reply(device, None, LOST))

    async def _serve_one(self, device: Device, context: grpc.aio.ServicerContext) -> bool:
        """Hand one request to the device and its reply back; False when it was the last."""
        data, replies = await device.requests.get()
        if data is None:  # the run is over
            await context.write(wire.encode_done())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(context.read(), GOODBYE_SECONDS)
            return False
        start = time.monotonic()
        reply = Reply(device, None, LOST)
        try:
            await context.write(data)
            # Reading only when a reply is due lets HTTP/2 hold back whatever else is sent.
            answer = await context.read()
            if answer is not grpc.aio.EOF:
                seconds = time.monotonic() - start
                reply = Reply(device, answer, "", seconds, len(data))
        finally:
            replies.put(reply)
        return reply.data is not None

    def _answer_for_the_lost(self, device: Device) -> None:
        """Give an answer to requests that a device that has gone never got to see."""
        while not device.requests.empty():
            _, replies = device.requests.get_nowait()
            if replies:
                replies.put(Reply(device, None, LOST))

    async def _stop(self, goodbye_seconds: float) -> None:
        self.closing = True
        if goodbye_seconds and self._joins:
            for device in list(self.devices.values()):
                device.requests.put_nowait((None, None))
            await asyncio.wait(self._joins, timeout=goodbye_seconds)
        await self._server.stop(goodbye_seconds or None)  # without calls it does not wait

    def _call(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
