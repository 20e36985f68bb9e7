"""The server's end of Flower's gRPC stream: who is connected, and talking to them.

An asyncio gRPC server runs in a thread of its own, one coroutine a device, so that a
thousand devices cost no thousand threads. The round loop stays plain synchronous code:
`exchange` sends a request to each device at once and yields the replies as they come.
"""

import asyncio
import contextlib
import ctypes
import itertools
import json
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

from federated.errors import BadReply, FederationError
from federated.updates import clean_metrics
from plumbing import descriptors
from plumbing.addresses import check_cid, join_address, listening_addresses, reachable_address
from plumbing.security.gate import Door, Gate, Peer, peer_address
from plumbing.security.identity import ENROL
from plumbing.stream import wire

GREETING_SECONDS = 300.0  # to say what it is; a Pi may have to cut its partition first
GOODBYE_SECONDS = 5.0
PAUSE_SECONDS = 5  # then devices come back to a server that was interrupted
# For a connection to speak TLS and HTTP/2: that takes a Pi 3 some 20 ms of processor time, and
# 1,000 devices that come at once take a server 3.3 s.
HANDSHAKE_SECONDS = 5
IDLE_SECONDS = 10  # then a connection without a call is closed; a device's stream is one
MAX_FAILURES = 3  # bad replies in a row; then a device is left out

# How much of large models is in memory at a time; the devices take turns, those that send
# theirs until it has been dealt with.
SENDING_BYTES = 32 << 20
RECEIVING_BYTES = 96 << 20
TURN_SECONDS = 60.0  # then the next may begin too: one slow link must not hold up a fleet
WINDOW_BYTES = 1 << 19  # under way to us on a connection: 25 MB/s where a round trip takes 20 ms
OFFER_BYTES = 1 << 16  # more than a reply without weights takes

# glibc's number for it, and from what size on a block goes back to the system when freed. By
# itself glibc raises this, and gRPC's buffers leave holes: with 20 ResNet18 devices a server
# took 1.49 GB in its third round and still grew, with this 1.09 GB from the second on.
M_MMAP_THRESHOLD, MMAP_BYTES = -3, 1 << 16

WATCH_SECONDS = 1.0  # how often the owner's list is looked at for devices that were revoked
NOTE_EVERY = 30  # of these times it is told who is here
SHORTAGE_SECONDS = 60.0  # from one line on missing file descriptors to the next

LOST = "the connection broke"
REVOKED = "it was revoked"


@dataclass(eq=False)
class Device:
    """A connected device; the handle that strategies know as ClientProxy."""

    cid: str  # unique; "?1", "?2", … for clients that do not say who they are
    properties: Mapping[str, Any]  # what it said of itself, cleaned
    in_pieces: bool = False  # whether it takes weights so
    requests: "asyncio.Queue[_Request]" = field(default_factory=asyncio.Queue, repr=False)
    stream: asyncio.Task | None = field(default=None, repr=False)  # serves it
    exchange: "_Exchange | None" = field(default=None, repr=False)  # whose request it works on
    failures: int = 0  # bad replies in a row
    address: str = ""  # its IP address
    key_hash: str = ""  # of the key that it proved to have, at a secured server
    revoked: bool = False  # it is about to be cut off

    @property
    def name(self) -> str:
        """How people know it: "device 0", or "device ?" if it did not say."""
        return "device ?" if self.cid.startswith("?") else f"device {self.cid}"

    @property
    def busy(self) -> bool:
        """Whether it has yet to answer, perhaps in a round that is over."""
        return self.exchange is not None

    @property
    def left_out(self) -> bool:
        """Whether it has failed so often that it is not asked again before it joins anew."""
        return self.failures >= MAX_FAILURES


@dataclass(frozen=True)
class Reply:
    """What came back from a device, or why nothing did."""

    device: Device
    data: bytes | None  # a fit reply
    problem: str = ""
    pieces: list[bytes] = field(default_factory=list)  # parameters replies, after an offer
    seconds: float = 0.0  # from sending the request to its being done
    bytes_sent: int = 0
    bytes_received: int = 0
    end_turn: Callable[[], None] = field(default=lambda: None, repr=False)


class _Exchange:
    """The requests of a round and their replies. Touched in the fleet's thread alone."""

    def __init__(self, round_id: str, devices: Iterable[Device], timeout: float | None) -> None:
        self.round_id = round_id
        self.timeout = timeout
        self.slices = [slice(0)]  # of the weights, one to be fetched after the other
        self.piece_bytes = 0
        self.replies: queue.SimpleQueue[Reply | None] = queue.SimpleQueue()  # None is the end
        self.waiting = {device.cid: device for device in devices}
        self.lost: set[str] = set()  # those of `waiting` whose connection broke
        self.offered: set[str] = set()  # those of `waiting` that are done
        self.open = True

    def waits_for(self, device: Device) -> bool:
        return self.waiting.get(device.cid) is device

    def settle(self, reply: Reply) -> bool:
        """Take a reply; False if nobody waits for it any more."""
        if not self.waits_for(reply.device):
            return False
        del self.waiting[reply.device.cid]
        self.replies.put(reply)
        self.close_if_done()
        return True

    def lose(self, device: Device) -> None:
        if self.waits_for(device):
            self.lost.add(device.cid)
            self.close_if_done()

    def take_back(self, device: Device, round_id: Any) -> bool:
        """Wait again for a device that was lost, if it has this round's work to offer."""
        if not self.open or device.cid not in self.lost or round_id != self.round_id:
            return False
        self.lost.remove(device.cid)
        self.waiting[device.cid] = device
        return True

    def close_if_done(self) -> None:
        if self.open and self.waiting.keys() <= self.lost:
            self.open = False
            for device in self.waiting.values():
                self.replies.put(Reply(device, None, LOST))
            self.waiting = {}
            self.replies.put(None)

    def expire(self, also_offered: bool) -> list[Device]:
        """Give up the devices that are not done; return those that are connected."""
        late = [
            device
            for cid, device in self.waiting.items()
            if cid not in self.lost and (also_offered or cid not in self.offered)
        ]
        for device in late:
            self.settle(Reply(device, None, f"no reply in {self.timeout:g} s"))
        return late


@dataclass(frozen=True)
class _Request:
    """Bytes for a device; without an exchange they are the last it hears."""

    data: bytes | wire.FitRequest
    exchange: _Exchange | None = None


class Fleet(ClientManager):
    """The devices that are connected, in Flower's terms a client manager.

    Args:
        server_address: HOST:PORT to listen at; port 0 takes a free one.
        greeting: the config sent to each device that joins (see Settings).
        admit: looks at the properties of a device that wants to join and returns why it
            must not, or None. Not called for clients that tell nothing of themselves.
        announce: called with a Device and "joined", "left" or "is late", from the fleet's thread.
        refuse: called with a device's name and why it was refused, from the same thread.
        model_bytes: size of the weights; messages far larger are refused before they are
            read. Without it there is no limit.
        keepalive_seconds: how often each end probes a silent connection; a dead one is
            noticed after 2.8 times this, one whose packets are lost after 1.5 times.
        gate: decides who may connect; without one everybody may, and nothing is encrypted.
        stock_address: HOST:PORT to listen at as well, with TLS, for stock Flower clients:
            whoever reaches it may connect. Only with a gate.
    """

    def __init__(
        self,
        server_address: str,
        greeting: Mapping[str, Any],
        admit: Callable[[Mapping[str, Any]], str | None],
        announce: Callable[[Device, str], None],
        refuse: Callable[[str, str], None],
        model_bytes: int = 0,
        keepalive_seconds: float = 10.0,
        gate: Gate | None = None,
        stock_address: str = "",
    ) -> None:
        self.greeting = wire.encode_get_properties(greeting)
        self.admit = admit
        self.announce = announce
        self.refuse = refuse
        self.max_reply_bytes = 2 * model_bytes + (1 << 20) if model_bytes else -1
        self.keepalive_seconds = keepalive_seconds
        self.gate = gate
        self.stock_address = stock_address
        self.random = random.Random()  # what `sample` draws from; seed it for repeatable rounds
        self.avoided: set[str] = set()  # cids that `sample` takes only where others lack
        self.devices: dict[str, Device] = {}
        self.changed = threading.Condition()
        self.closing = False
        self._numbers = itertools.count(1)
        self._streams: set[asyncio.Task] = set()
        self._exchange: _Exchange | None = None
        self._watch_task: asyncio.Task | None = None
        self._notes: set[asyncio.Task] = set()  # for the owner's list, that are being made
        piece_bytes = min(model_bytes, wire.PIECE_BYTES) or 1
        self._sending = asyncio.Semaphore(max(2, SENDING_BYTES // piece_bytes))
        self._sending_whole = asyncio.Semaphore(max(2, SENDING_BYTES // (model_bytes or 1)))
        self._receiving = asyncio.Semaphore(max(2, RECEIVING_BYTES // (model_bytes or 1)))

        with contextlib.suppress(AttributeError, OSError):  # no glibc, no holes or others
            ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MMAP_BYTES)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fleet", daemon=True)
        self._thread.start()
        try:
            self.address = self._call(self._listen(server_address))
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

    def idle(self) -> list[Device]:
        """Return the devices that can be asked, in an order that does not depend on chance."""
        with self.changed:
            able = [d for _, d in sorted(self.devices.items()) if not (d.busy or d.revoked)]
            return [d for d in able if not d.left_out]

    def sample(
        self,
        num_clients: int,
        min_num_clients: int | None = None,
        criterion: Criterion | None = None,
    ) -> list[Any]:
        """Draw idle devices without replacement; all of them if there are fewer.

        It does not wait for `min_num_clients`: the round loop has done so already.
        """
        able = [d for d in self.idle() if not criterion or criterion.select(cast(ClientProxy, d))]
        chosen: list[Any] = []
        for group in (
            [d for d in able if d.cid not in self.avoided],
            [d for d in able if d.cid in self.avoided],
        ):
            chosen += self.random.sample(group, min(num_clients - len(chosen), len(group)))
        return chosen

    # --- Talking to devices ---

    def exchange(
        self,
        requests: Iterable[tuple[Device, bytes | wire.FitRequest]],
        round_id: str = "",
        timeout: float | None = None,
    ) -> Iterator[Reply]:
        """Send each device its request, all at once; yield the replies as they arrive.

        A device whose connection breaks is not waited for, but if it is back with its work
        done before the others are, it still counts.

        Args:
            round_id: what the requests carry as wire.ROUND_ID.
            timeout: seconds, then the devices that are not done are given up, and what they
                send later is dropped. Those that are done get as long again to hand over
                their weights.
        """
        requests = list(requests)
        exchange = _Exchange(round_id, (device for device, _ in requests), timeout)
        self._loop.call_soon_threadsafe(self._open, exchange, requests)
        try:
            while reply := exchange.replies.get():
                end_turn = reply.end_turn
                yield reply
                del reply  # before the next one comes
                self._loop.call_soon_threadsafe(end_turn)
        finally:
            self._loop.call_soon_threadsafe(exchange.waiting.clear)  # should nobody listen any more

    def close(self, run_is_over: bool) -> None:
        """Stop listening. With `run_is_over` devices are told to end, else to come back."""
        self._call(self._stop(run_is_over))
        self._stop_loop()

    # --- In the fleet's thread ---

    async def _listen(self, server_address: str) -> str:
        self._server = grpc.aio.server(
            interceptors=[Door(self.gate, open_methods=[ENROL])],
            options=[
                ("grpc.so_reuseport", 0),  # else a second server would share the port unnoticed
                ("grpc.max_receive_message_length", self.max_reply_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.keepalive_time_ms", int(self.keepalive_seconds * 1000)),
                ("grpc.keepalive_timeout_ms", int(self.keepalive_seconds * 500)),
                # The answer to a probe, for which gRPC waits 60 s whatever the line above says. It
                # is queued behind a model: with 100 kB/s for 11 to 15 s.
                ("grpc.http2.ping_timeout_ms", int(self.keepalive_seconds * 1800)),
                ("grpc.http2.max_pings_without_data", 0),
                ("grpc.http2.max_ping_strikes", 0),  # devices probe the connection as often
                ("grpc.server_handshake_timeout_ms", int(HANDSHAKE_SECONDS * 1000)),
                ("grpc.max_connection_idle_ms", int(IDLE_SECONDS * 1000)),
                # What may come in unread on a connection. Left to gRPC it grows with the speed
                # of the link: 1.3 MB more a device, and with 100 of ResNet18 1.01 GB, not 0.92.
                ("grpc.http2.bdp_probe", 0),
                ("grpc.http2.lookahead_bytes", WINDOW_BYTES),
            ],
        )
        # All take a stream of bytes, since for others gRPC reads a message before we are asked.
        methods: dict[str, Any] = {"Hello": self._hello}
        if self.gate:
            methods |= {"Enrol": self.gate.enrol, "Renew": self.gate.renew}
        for service, its in (
            ("flwr.proto.FlowerService", {"Join": self._join}),
            ("plumbing.Fleet", methods),
        ):
            handlers = {n: grpc.stream_stream_rpc_method_handler(m) for n, m in its.items()}
            self._server.add_generic_rpc_handlers(
                (grpc.method_handlers_generic_handler(service, handlers),)
            )
        address = self._bind(server_address, self.gate and self.gate.credentials())
        if self.gate and self.stock_address:
            self.stock_address = self._bind(
                self.stock_address, self.gate.credentials(demand_key=False)
            )
        await self._server.start()
        self._shortage_task = asyncio.create_task(self._report_shortage())
        if self.gate:
            self._watch_task = asyncio.create_task(self._watch(self.gate))
        return address

    def _bind(self, server_address: str, credentials: grpc.ServerCredentials | None) -> str:
        """Listen at an address, secured if there are credentials; return what devices type."""
        addresses = listening_addresses(server_address)
        host, port = addresses[0]
        for host, _ in reversed(addresses):
            try:
                if credentials:
                    port = self._server.add_secure_port(join_address(host, port), credentials)
                else:
                    port = self._server.add_insecure_port(join_address(host, port))
            except RuntimeError as error:  # somebody took it since `listening_addresses` looked
                raise FederationError(f"cannot listen at {join_address(host, port)}") from error
        return reachable_address(host, port)

    async def _watch(self, gate: Gate) -> None:
        """Cut off devices that the owner revokes, also in the middle of a round."""
        for second in itertools.count(1):
            await asyncio.sleep(WATCH_SECONDS)
            connected = list(self.devices.values())
            if second % NOTE_EVERY == 0:
                self._note(gate, connected)
            for device in await asyncio.to_thread(gate.revoked, connected):
                if not device.revoked:
                    self.refuse(device.name, REVOKED)
                device.revoked = True
                if device.exchange:
                    device.exchange.settle(Reply(device, None, REVOKED))
                if device.stream:
                    device.stream.cancel()

    async def _report_shortage(self) -> None:
        """Report when no connection can be accepted because file descriptors are lacking."""
        while True:
            if problem := descriptors.shortage():
                self.refuse("further connections", problem)
            await asyncio.sleep(SHORTAGE_SECONDS if problem else WATCH_SECONDS)

    def _note(self, gate: Gate, devices: list[Device]) -> None:
        """Let the owner's list know who is here, without waiting for it."""
        note = asyncio.create_task(gate.note_seen(devices))
        self._notes.add(note)  # asyncio itself forgets tasks that nobody holds
        note.add_done_callback(self._notes.discard)

    async def _hello(self, _: Any, context: grpc.aio.ServicerContext, peer: Peer) -> None:
        """Tell a device what it must know before it opens the stream."""
        await context.write(json.dumps({"keepalive_seconds": self.keepalive_seconds}).encode())

    async def _join(self, _: Any, context: grpc.aio.ServicerContext, peer: Peer) -> None:
        """Serve one device for as long as it is connected."""
        stream = asyncio.current_task()
        assert stream
        self._streams.add(stream)
        try:
            device = await self._greet(context, peer)
            device.stream = stream
            if self.gate:
                self._note(self.gate, [device])
            if self.closing:  # it came while the run ended
                device.requests.put_nowait(_Request(wire.encode_goodbye()))
            try:
                while await self._serve_one(device, context):
                    pass
            except asyncio.CancelledError:
                # gRPC sends no status then: hung up on, the device would wait for ever.
                if device.revoked:
                    await context.abort(grpc.StatusCode.PERMISSION_DENIED, REVOKED)
                if not context.cancelled():
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "the server waited too long")
                raise
            finally:
                while not device.requests.empty():  # what it never got to see
                    if exchange := device.requests.get_nowait().exchange:
                        exchange.lose(device)
                self.unregister(device)
        finally:
            self._streams.discard(stream)

    async def _greet(self, context: grpc.aio.ServicerContext, peer: Peer) -> Device:
        """Ask the device what it is; return it, registered, or refuse it."""
        await context.write(self.greeting)
        try:
            data = await asyncio.wait_for(context.read(), GREETING_SECONDS)
            if data is grpc.aio.EOF:
                raise BadReply("hung up")
            properties = wire.decode_properties_reply(data)
        except (BadReply, TimeoutError) as error:
            reason = f"it did not say what it is ({error or 'no answer'})"
            self.refuse(peer_address(context), reason)
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, reason)
        claimed = str((properties or {}).get("cid", ""))
        if self.gate and claimed != peer.cid:
            reason = (
                f"its key is that of device {peer.cid}, it says that it is {claimed[:80]!a}"
                if peer.cid
                else "here only stock Flower clients join; take the server's other address"
            )
            self.refuse(peer_address(context), reason)
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, reason)
        if not properties or "cid" not in properties:
            device = Device(f"?{next(self._numbers)}", {})
            self.register(device)
            return device

        in_pieces = properties.pop(wire.PIECES, False) is True
        cid = str(properties["cid"])
        device = Device(cid, clean_metrics(properties), in_pieces)
        device.address, device.key_hash = peer_address(context), peer.key_hash
        try:
            check_cid(device.cid)
        except FederationError as error:
            self.refuse(peer_address(context), str(error))
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        if objection := self.admit(properties):
            # Its own words are in it: on one line, and short enough for gRPC's 16 kB.
            objection = "".join(c if c.isprintable() else "?" for c in objection[:500])
            self.refuse(device.name, objection)
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, objection)
        # A device that lost its power comes back before its dead connection is noticed:
        # give the old one the time in which a dead one is found out.
        deadline = time.monotonic() + self.keepalive_seconds * 2.8 + 1
        while not self.register(device):
            if time.monotonic() > deadline:
                reason = f"a device with --cid={device.cid} is connected already; give each its own"
                if self.gate:
                    reason += ". Both have the same key: is one a copy of the other's card?"
                self.refuse(device.name, reason)
                await context.abort(grpc.StatusCode.ALREADY_EXISTS, reason)
            await asyncio.sleep(0.1)
        # What it trained before its connection broke is not lost, if the round still goes on.
        round_id = properties.get(wire.ROUND_ID)
        if self._exchange and self._exchange.take_back(device, round_id):
            data = wire.encode_fit([], {wire.ROUND_ID: self._exchange.round_id})
            device.requests.put_nowait(_Request(data, self._exchange))
        return device

    def _open(
        self, exchange: _Exchange, requests: list[tuple[Device, bytes | wire.FitRequest]]
    ) -> None:
        self._exchange = exchange
        for device, data in requests:
            if isinstance(data, wire.FitRequest):
                exchange.slices, exchange.piece_bytes = data.slices, data.piece_bytes
            if self.devices.get(device.cid) is device:
                device.requests.put_nowait(_Request(data, exchange))
            else:
                exchange.lost.add(device.cid)
        exchange.close_if_done()
        if exchange.timeout:
            self._loop.call_later(exchange.timeout, self._expire, exchange, False)

    def _expire(self, exchange: _Exchange, also_offered: bool) -> None:
        """Close a round without those that are late."""
        assert exchange.timeout
        for device in exchange.expire(also_offered):
            self.announce(device, "is late")
            # Whoever is still busy after as long again hangs.
            self._loop.call_later(exchange.timeout, self._hang_up, device, exchange)
        if not also_offered:
            self._loop.call_later(exchange.timeout, self._expire, exchange, True)

    def _hang_up(self, device: Device, exchange: _Exchange) -> None:
        if device.exchange is exchange and device.stream:
            device.stream.cancel()

    async def _serve_one(self, device: Device, context: grpc.aio.ServicerContext) -> bool:
        """Hand one request to the device and its reply back; False when it was the last."""
        request = await device.requests.get()
        exchange = request.exchange
        if exchange is None:
            assert isinstance(request.data, bytes)
            await context.write(request.data)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(context.read(), GOODBYE_SECONDS)
            return False
        device.exchange = exchange
        reply = None
        try:
            start, sent = await self._send(device, request.data, context)
            del request  # a device that hangs would keep the weights of its round
            reply = await self._ask(device, exchange, start, sent, context)
        except BadReply as error:
            reply = Reply(device, None, str(error))
            return False
        finally:
            if reply is None:
                exchange.lose(device)
            elif not exchange.settle(reply):
                reply.end_turn()
                self.announce(device, "answered too late, which does not count")
            with self.changed:
                device.exchange = None
                self.changed.notify_all()
        return True

    async def _ask(
        self,
        device: Device,
        exchange: _Exchange,
        start: float,
        sent: int,
        context: grpc.aio.ServicerContext,
    ) -> Reply:
        """Return the reply to what was sent, the weights being fetched when it is their turn."""
        answer = await self._read(context)
        seconds = time.monotonic() - start
        if not _is_offer(answer, exchange.round_id):
            return Reply(device, answer, "", [], seconds, sent, len(answer))
        exchange.offered.add(device.cid)
        end_turn = await self._turn(self._receiving)
        try:
            if not exchange.waits_for(device):
                end_turn()
                return Reply(device, None, "too late")
            pieces = await self._fetch(exchange, context)
        except BaseException:
            end_turn()
            raise
        received = len(answer) + sum(map(len, pieces))
        return Reply(device, answer, "", pieces, seconds, sent, received, end_turn)

    async def _send(
        self, device: Device, data: bytes | wire.FitRequest, context: grpc.aio.ServicerContext
    ) -> tuple[float, int]:
        """Send a request, in pieces where the device takes them; return from when on, and bytes."""
        messages: Iterator[Any]
        turns, messages = self._sending_whole, iter([data])
        if isinstance(data, wire.FitRequest):
            turns = self._sending if device.in_pieces else turns
            messages = data.pieces() if device.in_pieces else iter([data.whole])
        start, sent = 0.0, 0
        while True:
            end_turn = await self._turn(turns)
            try:
                start = start or time.monotonic()
                if not (message := next(messages, b"")):  # made now, not while it waited
                    return start, sent
                sent += len(message)
                await context.write(message)
                del message  # it would be kept until the next turn, 10 MB a device
            finally:
                end_turn()

    async def _fetch(self, exchange: _Exchange, context: grpc.aio.ServicerContext) -> list[bytes]:
        """Return a device's weights, unread; whether they are all there is not known here."""
        pieces: list[bytes] = []
        for piece in exchange.slices:
            config: dict[str, Any] = {wire.ROUND_ID: exchange.round_id}
            if len(exchange.slices) > 1:
                config |= {wire.FIRST: piece.start, wire.COUNT: piece.stop - piece.start}
            await context.write(wire.encode_get_parameters(config))
            pieces.append(await self._read(context))
            if len(pieces[-1]) > 2 * exchange.piece_bytes:
                break  # not what was asked for: no more of this
        return pieces

    async def _read(self, context: grpc.aio.ServicerContext) -> bytes:
        """Read a reply. Reading only when one is due makes HTTP/2 hold back whatever else comes."""
        data = await context.read()
        if data is grpc.aio.EOF:
            # If the connection broke, or the reply is too large, gRPC cancels us in this time.
            await asyncio.sleep(0.5)
            raise BadReply("hung up")
        return cast(bytes, data)

    async def _turn(self, turns: asyncio.Semaphore) -> Callable[[], None]:
        """Wait for a turn; return what ends it. After TURN_SECONDS it ends by itself."""
        await turns.acquire()

        def end() -> None:
            if not timer.cancelled():
                timer.cancel()
                turns.release()

        timer = self._loop.call_later(TURN_SECONDS, end)
        return end

    async def _stop(self, run_is_over: bool) -> None:
        self.closing = True
        self._shortage_task.cancel()
        if self._watch_task:
            self._watch_task.cancel()
        told = [d for d in self.devices.values() if run_is_over or not d.busy]
        goodbye = wire.encode_goodbye(0 if run_is_over else PAUSE_SECONDS)
        for device in told:
            device.requests.put_nowait(_Request(goodbye))
        # Those that are just joining are told when they have, too.
        streams = self._streams if run_is_over else {d.stream for d in told if d.stream}
        deadline = self._loop.time() + GOODBYE_SECONDS
        if streams:
            # A hung device's stream ends by itself at the deadline.
            await asyncio.wait(streams, timeout=GOODBYE_SECONDS + 0.2 if run_is_over else 1)
        # It waits for connections: not for long if none is left but that of a hung device.
        await self._server.stop(max(0.0, deadline - self._loop.time()) if run_is_over else None)
        # Python complains of tasks that did not come to their end.
        if rest := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(rest, timeout=1)

    def _call(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def _is_offer(data: bytes, round_id: str) -> bool:
    """Return whether a reply says that the weights of this round can be had."""
    if not round_id or len(data) > OFFER_BYTES:
        return False
    try:
        weights, _, metrics = wire.decode_fit_reply(data)
    except BadReply:
        return False
    return not weights and metrics.get(wire.ROUND_ID) == round_id
