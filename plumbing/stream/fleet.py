"""The server's end of Flower's gRPC stream: a Fleet of the devices that are connected.

An asyncio gRPC server runs in a thread of its own, one coroutine a device, so that a
thousand devices cost no thousand threads. That thread puts events into a queue, and prints
nothing: `wait` takes them out in the thread of the schedule, which decodes there what came
in and keeps the devices' state.
"""

import asyncio
import contextlib
import ctypes
import itertools
import json
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import grpc

from federated.errors import BadReply, FederationError
from federated.rounds import (
    LOST,
    REVOKED,
    Device,
    Event,
    Fleet,
    Freed,
    Job,
    Joined,
    Left,
    Notice,
    Offered,
    Progress,
    Result,
    Resumed,
)
from federated.updates import Scalar, Update, clean_metrics, make_score, make_update
from plumbing import descriptors
from plumbing.addresses import check_cid, join_address, listening_addresses, reachable_address
from plumbing.publish import CARD
from plumbing.security.complaints import Refusals
from plumbing.security.gate import Door, Gate, Peer, peer_address
from plumbing.security.identity import ENROL
from plumbing.stream import wire
from plumbing.stream.device import ANNOUNCE
from plumbing.stream.fetch import MAX_FILE_BYTES
from plumbing.stream.session import GOODBYE_SECONDS, Reply, Session, Work, write_in_time
from plumbing.stream.turns import OFFER_BYTES, Incoming, Memory

GREETING_SECONDS = 300.0  # to report what it is; a Pi may have to cut its partition first
NAME_SECONDS = 0.5  # a broken connection is mostly noticed by then, and its name free
TOO_LARGE = "it sent a message that is too large"
PAUSE_SECONDS = 5  # then devices come back to a server that was interrupted
# For a connection to speak TLS and HTTP/2: that takes 8 ms of processor time on an emulated Pi 3,
# and 1,000 devices that come at once take a server 3.3 s.
HANDSHAKE_SECONDS = 5
IDLE_SECONDS = 10  # then a connection without a call is closed; a device's stream is one
FETCH_PIECE_BYTES = 1 << 18  # of the newest model, which devices fetch
LARGE_MESSAGE_BYTES = 2 << 20  # above, none is read before it is its turn
WINDOW_BYTES = 1 << 19  # under way to us on a connection: 25 MB/s where a round trip takes 20 ms

# glibc's numbers for two limits: from what size on a freed block goes back to the system, and how
# much free memory at a heap's end does. By itself glibc raises them, and gRPC's buffers leave
# holes: with 20 ResNet18 devices a server took 1.49 GB in its third round and still grew.
# A model that travels in one message leaves small holes. Its blocks are used again, without the
# page faults of fresh ones: a round of Net with two devices took 7.5 ms of the server's processor
# time with 64 kB, and takes 4.4 ms.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
TRIM_BYTES, MMAP_BYTES = 4 << 20, 1 << 20  # for such a model
MMAP_BYTES_OF_LARGE_MODELS = 1 << 16

WATCH_SECONDS = 1.0  # how often the owner's list is looked at for devices that were revoked
MAX_VERSION = 64  # characters that name the version of a device's data
REPORT_SECONDS = 1.0  # a device's reports of its progress that come sooner are ignored
NOTE_EVERY = 30  # of these times the list is updated with who is here
MAX_STEPS, MAX_RATE = 10**12, 1e9  # what a device reports beyond that makes no sense
SHORTAGE_SECONDS = 60.0  # from one line on missing file descriptors to the next

T = TypeVar("T")


class StreamFleet(Fleet):
    """The devices that are connected by Flower's stream.

    Args:
        server_address: HOST:PORT to listen at; port 0 takes a free one.
        greeting: the settings sent to each device that joins (see Settings).
        admit: looks at the properties of a device that wants to join and returns why it
            must not, or None. Not called for clients that report nothing of themselves.
        model_bytes: size of the weights; messages far larger are refused before they are
            read. Without it there is no limit.
        keepalive_seconds: how often each end probes a silent connection; a dead one is
            noticed after 2.8 times this, one whose packets are lost after 1.5 times.
        gate: decides who may connect; without one everybody may, and nothing is encrypted.
        stock_address: HOST:PORT to listen at as well, with TLS, for stock Flower clients:
            any device that reaches it may connect. Only with a gate.

    Raises:
        FederationError: it cannot listen there.
    """

    def __init__(
        self,
        server_address: str,
        greeting: Mapping[str, Any],
        admit: Callable[[Mapping[str, Any]], str | None],
        model_bytes: int = 0,
        keepalive_seconds: float = 10.0,
        gate: Gate | None = None,
        stock_address: str = "",
    ) -> None:
        super().__init__()
        self.greeting = wire.encode_get_properties(greeting)
        self.admit = admit
        # A stock client sends its whole update at once; what surrounds the weights takes less.
        self.max_reply_bytes = model_bytes + model_bytes // 8 + (1 << 20) if model_bytes else -1
        small = 0 < model_bytes <= wire.ONE_CHUNK_BYTES
        self.max_chunk_bytes = OFFER_BYTES + (wire.ONE_CHUNK_BYTES if small else wire.CHUNK_BYTES)
        self.keepalive_seconds = keepalive_seconds
        self.gate = gate
        self.stock_address = stock_address
        self.closing = False
        self._events: queue.SimpleQueue[Event | Reply | Session] = queue.SimpleQueue()
        self._end_turn: Callable[[], None] | None = None  # of the Result that was returned last
        self._requests: weakref.WeakKeyDictionary[Job, wire.WeightsRequest] = (
            weakref.WeakKeyDictionary()
        )
        # All that follows belongs to the event loop's thread.
        self._sessions: dict[str, Session] = {}
        # No sessions: they refer to their devices, which then would never be forgotten.
        self._keys: weakref.WeakKeyDictionary[Device, Peer] = weakref.WeakKeyDictionary()
        self._lost: dict[str, Work] = {}  # by cid, of devices whose connection broke
        self._servers: list[grpc.aio.Server] = []
        self._numbers = itertools.count(1)
        self._incoming: dict[str, Incoming] = {}  # by gRPC's name for the other end
        self._streams: set[asyncio.Task] = set()
        self._background: set[asyncio.Task] = set()
        self._memory = Memory(model_bytes)
        if gate:
            self.sign = gate.authority.sign
            gate.report = self._notice
            self.refusals = gate.refusals
        else:
            self.refusals = Refusals(self._notice)

        with contextlib.suppress(AttributeError, OSError):  # no glibc, no holes or others
            glibc = ctypes.CDLL(None)
            if small:
                glibc.mallopt(M_MMAP_THRESHOLD, MMAP_BYTES)
                glibc.mallopt(M_TRIM_THRESHOLD, TRIM_BYTES)
            else:
                glibc.mallopt(M_MMAP_THRESHOLD, MMAP_BYTES_OF_LARGE_MODELS)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fleet", daemon=True)
        self._thread.start()
        try:
            self.address = self._call(self._listen(server_address))
        except BaseException:
            self._stop_loop()
            raise

    # --- What a schedule calls, in its own thread ---

    def _start(self, device: Device, job: Job) -> None:
        if job not in self._requests:
            weights = list(job.model.values())
            if job.kind == "train":
                config = {**job.config, wire.ROUND_ID: job.id}
                self._requests[job] = wire.WeightsRequest(weights, config)
            else:
                encode = wire.encode_evaluate
                self._requests[job] = wire.WeightsRequest(weights, job.config, encode)
        self._loop.call_soon_threadsafe(self._give, Work(device, job, self._requests[job]))

    def _abandon(self, device: Device, job: Job, patience: float | None) -> None:
        self._loop.call_soon_threadsafe(self._forget, device, job, patience)

    def _next(self, timeout: float | None) -> Event | None:
        if self._end_turn:
            self._loop.call_soon_threadsafe(self._end_turn)
            self._end_turn = None
        try:
            event = self._events.get(timeout=timeout)
        except queue.Empty:
            return None
        if isinstance(event, Session):
            event.has_reported = False  # before its report is taken: the next one is queued again
            return event.progress
        if not isinstance(event, Reply):
            return event
        self._end_turn = event.end_turn
        return read_reply(event)

    def revoked(self, devices: Sequence[Device]) -> list[Device]:
        if not self.gate:
            return []
        peers = {device: self._keys[device] for device in devices}
        revoked = self.gate.revoked(peers.values())
        found = [device for device, peer in peers.items() if peer in revoked]
        for device in found:
            self._loop.call_soon_threadsafe(self._cut, device)
        return found

    def close(self, run_is_over: bool) -> None:
        """Dismiss the devices and stop listening.

        Args:
            run_is_over: devices end, or with --stay wait for the next run; else they come
                back to this one after a pause, and those that train continue meanwhile.
        """
        try:
            self._call(self._stop(run_is_over))
        finally:
            self._stop_loop()
            self.refusals.close()

    # --- The event loop's thread: listening ---

    async def _listen(self, server_address: str) -> str:
        # Where keys are demanded only this project's devices join, whose largest message is a
        # chunk. gRPC has one limit for all that a server listens at.
        server = self._make_server(self.max_chunk_bytes if self.gate else self.max_reply_bytes)
        address = self._bind(server, server_address, self.gate and self.gate.credentials())
        if self.gate and self.stock_address:
            server = self._make_server(self.max_reply_bytes)
            credentials = self.gate.credentials(demand_key=False)
            self.stock_address = self._bind(server, self.stock_address, credentials)
        for server in self._servers:
            await server.start()
        self._in_background(self._report_shortage())
        if self.gate:
            self._in_background(self._watch(self.gate))
        return address

    def _make_server(self, max_message_bytes: int) -> grpc.aio.Server:
        # All take a stream of bytes, since for others gRPC reads a message before we are asked.
        large = max_message_bytes > LARGE_MESSAGE_BYTES
        methods: dict[str, Any] = {
            "Hello": partial(self._hello, large),
            "Announce": self._announce,
            "Progress": self._progress,
            "Fetch": partial(self._fetch, large),
        }
        if self.gate:
            methods |= {"Enrol": self.gate.enrol, "Renew": self.gate.renew}
        join = {"Join": partial(self._join, large)}
        services = {"flwr.proto.FlowerService": join, "plumbing.Fleet": methods}
        server = grpc.aio.server(
            interceptors=[Door(self.gate, open_methods=[ENROL, ANNOUNCE])],
            options=server_options(max_message_bytes, self.keepalive_seconds),
        )
        for service, methods in services.items():
            handlers = {n: grpc.stream_stream_rpc_method_handler(m) for n, m in methods.items()}
            server.add_generic_rpc_handlers(
                (grpc.method_handlers_generic_handler(service, handlers),)
            )
        self._servers.append(server)
        return server

    def _bind(
        self,
        server: grpc.aio.Server,
        server_address: str,
        credentials: grpc.ServerCredentials | None,
    ) -> str:
        """Listen at an address, secured if there are credentials; return what devices type."""
        addresses = listening_addresses(server_address)
        host, port = addresses[0]
        for host, _ in reversed(addresses):
            try:
                if credentials:
                    port = server.add_secure_port(join_address(host, port), credentials)
                else:
                    port = server.add_insecure_port(join_address(host, port))
            except RuntimeError as error:  # somebody took it since `listening_addresses` looked
                raise FederationError(f"cannot listen at {join_address(host, port)}") from error
        return reachable_address(host, port)

    async def _report_shortage(self) -> None:
        """Report when no connection can be accepted because file descriptors are lacking."""
        while True:
            if problem := descriptors.shortage():
                self.refusals.add("further connections", problem)
            await asyncio.sleep(SHORTAGE_SECONDS if problem else WATCH_SECONDS)

    async def _watch(self, gate: Gate) -> None:
        """Cut off devices that the owner revokes, also in the middle of a round."""
        for second in itertools.count(1):
            await asyncio.sleep(WATCH_SECONDS)
            connected = list(self._sessions.values())
            if second % NOTE_EVERY == 0:
                self._in_background(gate.note_seen(connected))
            for session in await asyncio.to_thread(gate.revoked, connected):
                self._cut(session.device)

    def _cut(self, device: Device) -> None:
        session = self._sessions.get(device.cid)
        if session and session.device is device and not session.cut_off:
            self.refusals.add(device.name, REVOKED)
            session.cut(REVOKED)

    # --- The event loop's thread: joining ---

    async def _hello(
        self, large: bool, _: Any, context: grpc.aio.ServicerContext, peer: Peer
    ) -> None:
        """Answer what a device must know before it opens the stream."""
        answer = {
            "keepalive_seconds": self.keepalive_seconds,
            wire.VERSION: wire.PROTOCOL,
            wire.ANNOUNCE: large,
        }
        await context.write(json.dumps(answer).encode())

    async def _progress(self, _: Any, context: grpc.aio.ServicerContext, peer: Peer) -> None:
        """Take a device's report of its progress, from the connection that it joined by.

        What cannot be read is ignored, and of many reports that wait the newest is kept.
        """
        with contextlib.suppress(BadReply):
            metadata = dict(context.invocation_metadata() or ())
            report = wire.decode_progress(bytes(metadata.get(wire.PROGRESS_KEY, b"")))
            session = self._sessions.get(str(report.pop("cid", "")))
            due = session and time.monotonic() >= session.report_due
            if session and due and session.context.peer() == context.peer():
                session.progress = read_progress(session.device, report)
                session.report_due = time.monotonic() + REPORT_SECONDS
                if not session.has_reported:
                    session.has_reported = True
                    self._events.put(session)
        await context.write(b"")

    async def _fetch(
        self, large: bool, _: Any, context: grpc.aio.ServicerContext, peer: Peer
    ) -> None:
        """Hand out the newest model's card, or one of its files from some byte on."""
        incoming = Incoming(context, self._memory, large, announces=False)
        try:
            request = json.loads(await incoming.read_words(HANDSHAKE_SECONDS))
            wanted, offset = str(request["file"]), int(request.get("offset", 0))
            if not 0 <= offset <= MAX_FILE_BYTES:
                raise ValueError
        except Exception:  # of bytes from anyone: nearly anything
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "this asks for no file")
        if not (self.publication and self.publication.card):
            await context.abort(grpc.StatusCode.NOT_FOUND, "this server hands out no model")
        if wanted == CARD and "counts" in request:
            with contextlib.suppress(Exception):  # of bytes from anyone
                held_out, right, wrong = (int(count) for count in request["counts"])
                who = peer.cid or peer_address(context)
                self.publication.judge(who, int(request["version"]), (held_out, right, wrong))
        if wanted == CARD:
            await context.write(self.publication.card)
            return
        end_turn = await self._memory.fetching.take()
        try:
            while piece := await asyncio.to_thread(
                self.publication.read, wanted, offset, FETCH_PIECE_BYTES
            ):
                offset += len(piece)
                await write_in_time(context, piece)
        except BadReply as error:
            await context.abort(grpc.StatusCode.ABORTED, str(error))
        finally:
            end_turn()

    async def _announce(self, _: Any, context: grpc.aio.ServicerContext, peer: Peer) -> None:
        """Note that a reply is on its way on the connection by which the device has joined.

        The gate has let that connection in. It is not asked again: its list may be away for a
        while, and a device whose announcement were refused would be waited for in vain.
        """
        if incoming := self._incoming.get(context.peer()):
            incoming.announce()
        await context.write(b"")

    async def _join(
        self, large: bool, _: Any, context: grpc.aio.ServicerContext, peer: Peer
    ) -> None:
        """Serve one device for as long as it is connected."""
        stream = asyncio.current_task()
        assert stream
        self._streams.add(stream)
        session: Session | None = None
        connection = context.peer()
        announces = wire.ANNOUNCE in dict(context.invocation_metadata() or ())
        incoming = self._incoming[connection] = Incoming(context, self._memory, large, announces)
        try:
            session = await self._greet(context, incoming, peer)
            if self.closing:  # it came while the run ended
                session.dismiss(wire.encode_goodbye())
            replies = session.replies()
            async with contextlib.aclosing(replies):
                async for reply in replies:
                    self._pass_on(reply)
                    del reply
        except asyncio.CancelledError:
            # For a message over its limit gRPC cancels us as for a connection that broke. Only
            # then it no longer knows whose the call was [grpcio 1.85.1; 40 calls of each kind].
            if session and not session.cut_off and not context.peer():
                session.cut_off = TOO_LARGE
            # gRPC sends no status by itself then, and the device would wait for ever.
            if session and session.cut_off == REVOKED:
                await context.abort(grpc.StatusCode.PERMISSION_DENIED, REVOKED)
            if session and not context.cancelled():
                await context.abort(grpc.StatusCode.UNAVAILABLE, "the server waited too long")
            raise
        finally:
            self._streams.discard(stream)
            if self._incoming.get(connection) is incoming:
                del self._incoming[connection]
            if session:
                self._part(session)

    def _part(self, session: Session) -> None:
        """Note that a connection has ended; its work may be finished on the next one."""
        if self._sessions.get(session.cid) is not session:
            return
        del self._sessions[session.cid]
        work = session.work
        if work and work.job and session.cut_off in (REVOKED, TOO_LARGE):
            self._events.put(Reply(work, None, session.cut_off))
        elif work and work.job:
            self._lost[session.cid] = work
        self._events.put(Left(session.device, session.cut_off or LOST))

    async def _greet(
        self, context: grpc.aio.ServicerContext, incoming: Incoming, peer: Peer
    ) -> Session:
        """Ask the device what it is; return its session, or refuse it."""
        address = peer_address(context)
        await context.write(self.greeting)
        try:
            data = await incoming.read_words(GREETING_SECONDS)
            properties = wire.decode_properties_reply(data) or {}
        except BadReply as error:
            reason = f"it did not report what it is ({error})"
            await self._refuse(context, grpc.StatusCode.INVALID_ARGUMENT, address, reason)
        except TimeoutError:  # others may have held it up: it can try again
            reason = "it did not report what it is in time"
            await self._refuse(context, grpc.StatusCode.ABORTED, address, reason)
        claimed = str(properties.get("cid", ""))
        if self.gate and claimed != peer.cid:
            reason = (
                f"its key is that of device {peer.cid}, it claims to be {claimed[:80]!a}"
                if peer.cid
                else "here only stock Flower clients join; take the server's other address"
            )
            await self._refuse(context, grpc.StatusCode.PERMISSION_DENIED, address, reason)
        if "cid" not in properties:
            device = Device(f"?{next(self._numbers)}")
            return self._admit(Session(device, context, self._memory, incoming, self._offer))
        in_pieces = properties.pop(wire.PIECES, False) is True
        device = Device(claimed, clean_metrics(properties))
        try:
            check_cid(claimed)
        except FederationError as error:
            await self._refuse(context, grpc.StatusCode.INVALID_ARGUMENT, address, str(error))
        if objection := wire.version_problem(properties.get(wire.VERSION, 1)) or self.admit(
            properties
        ):
            await self._refuse(context, grpc.StatusCode.FAILED_PRECONDITION, device.name, objection)
        await self._wait_for_name(context, incoming, device)
        session = Session(
            device,
            context,
            self._memory,
            incoming,
            self._offer,
            in_pieces,
            address,
            peer.key_hash,
        )
        self._admit(session)
        if self.gate:
            self._in_background(self.gate.note_seen([session]))
        self._take_back(session, properties.get(wire.ROUND_ID))
        return session

    async def _refuse(
        self, context: grpc.aio.ServicerContext, code: grpc.StatusCode, who: str, reason: str
    ) -> None:
        """End the call, with a line on both screens."""
        # The device's own words are in it: on one line, and short enough for gRPC's 16 kB.
        reason = "".join(c if c.isprintable() else "?" for c in reason[:500])
        self.refusals.add(who, reason)
        await context.abort(code, reason)

    async def _wait_for_name(
        self, context: grpc.aio.ServicerContext, incoming: Incoming, device: Device
    ) -> None:
        """Wait until no other connection has the device's name, or refuse it.

        A device that lost its power comes back before its dead connection is noticed: the old
        one has the time in which a dead one is found out.
        """
        patience = self.keepalive_seconds * 2.8 + 1
        started = time.monotonic()
        deadline, noted = started + patience, False
        while device.cid in self._sessions:
            if not noted and time.monotonic() - started > NAME_SECONDS:
                noted = True
                other = f"another connection has --cid={device.cid}"
                self._notice(f"{device.name} waits up to {patience:.0f} s to join: {other}")
                note = f"{other}; waiting up to {patience:.0f} s for the server to give it up"
                await context.write(wire.encode_get_properties({wire.NOTE: note}))
                try:
                    await incoming.read_words(patience)
                except (TimeoutError, BadReply):
                    reason = "it did not answer while it waited for its name"
                    await self._refuse(context, grpc.StatusCode.ABORTED, device.name, reason)
            if time.monotonic() > deadline:
                reason = f"a device with --cid={device.cid} is connected already; give each its own"
                if self.gate:
                    reason += ". Both have the same key: is one a copy of the other's card?"
                await self._refuse(context, grpc.StatusCode.ALREADY_EXISTS, device.name, reason)
            await asyncio.sleep(0.1)

    def _admit(self, session: Session) -> Session:
        self._sessions[session.cid] = session
        self._keys[session.device] = Peer(session.cid, session.key_hash)
        self._events.put(Joined(session.device))
        return session

    def _take_back(self, session: Session, job_id: Any) -> None:
        """Ask again for what a device trained before its connection broke, if it is wanted."""
        work = self._lost.get(session.cid)
        if not (work and work.job and work.request) or work.id != job_id:
            return
        del self._lost[session.cid]
        session.give(Work(session.device, work.job, work.request, resumed=True))
        self._events.put(Resumed(session.device, work.job))

    # --- The event loop's thread: work ---

    def _give(self, work: Work) -> None:
        session = self._sessions.get(work.device.cid)
        if session and session.device is work.device:
            session.give(work)
        else:  # the schedule is about to hear that it left
            self._lost[work.device.cid] = work

    def _forget(self, device: Device, job: Job, patience: float | None) -> None:
        """Let a device's work count no longer."""
        if (lost := self._lost.get(device.cid)) and lost.job is job:
            del self._lost[device.cid]
        session = self._sessions.get(device.cid)
        if not session or not session.work or session.work.job is not job:
            return
        work = session.work
        work.forget()
        if patience is not None:
            self._loop.call_later(patience, self._hang_up, session, work)

    def _hang_up(self, session: Session, work: Work) -> None:
        if session.work is work:
            session.cut("it did not answer")

    def _offer(self, work: Work) -> None:
        if work.job:
            self._events.put(Offered(work.device, work.job))

    def _pass_on(self, reply: Reply) -> None:
        """Hand a reply to the schedule, unless it waits no longer."""
        if reply.work.job:
            self._events.put(reply)
            return
        reply.end_turn()
        self._notice(f"{reply.work.device.name} answered too late, which does not count")
        self._events.put(Freed(reply.work.device))

    def _notice(self, text: str) -> None:
        self._events.put(Notice(text))

    # --- The end ---

    async def _stop(self, run_is_over: bool) -> None:
        self.closing = True
        for task in self._background:
            task.cancel()
        parting = [s for s in self._sessions.values() if run_is_over or not s.work]
        goodbye = wire.encode_goodbye(0 if run_is_over else PAUSE_SECONDS)
        for session in parting:
            session.dismiss(goodbye)
        # Those that are just joining get it when they have, too.
        streams = self._streams if run_is_over else {s.task for s in parting if s.task}
        deadline = self._loop.time() + GOODBYE_SECONDS
        if streams:
            # A hung device's stream ends by itself at the deadline.
            await asyncio.wait(streams, timeout=GOODBYE_SECONDS + 0.2 if run_is_over else 1)
        # It waits for connections: not for long if none is left but that of a hung device.
        grace = max(0.0, deadline - self._loop.time()) if run_is_over else None
        await asyncio.gather(*(server.stop(grace) for server in self._servers))
        # Python complains of tasks that did not come to their end.
        if rest := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(rest, timeout=1)

    def _in_background(self, coroutine: Any) -> None:
        """Run a coroutine beside the devices' streams."""
        task = self._loop.create_task(coroutine)
        self._background.add(task)  # asyncio itself forgets tasks that nobody holds
        task.add_done_callback(self._background.discard)

    def _call(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def read_reply(reply: Reply) -> Result:
    """Decode a reply and compare it with the model that was sent: the only place for both.

    Whatever the bytes raise is the device's bad reply.
    """
    device, job = reply.work.device, reply.work.job
    assert job  # else it would not have been passed on
    if reply.data is None:
        return Result(device, job, None, reply.problem)
    update = score = None
    try:
        with wire.untrusted():
            if job.kind == "evaluate":
                score = make_score(*wire.decode_evaluate_reply(reply.data))
            else:
                update = _read_update(reply, job)
    except BadReply as error:
        return Result(device, job, None, str(error), at_fault=True)
    return Result(
        device,
        job,
        update,
        seconds=reply.seconds,
        bytes_sent=reply.bytes_sent,
        bytes_received=reply.bytes_received,
        seconds_sending=reply.seconds_sending,
        seconds_receiving=reply.seconds_receiving,
        score=score,
    )


def _read_update(reply: Reply, job: Job) -> Update:
    assert reply.data is not None
    arrays, num_examples, metrics = wire.decode_fit_reply(reply.data)
    metrics.pop(wire.ROUND_ID, None)
    received = itertools.chain(arrays, wire.join_chunks(_taken_from(reply.chunks)))
    return make_update(received, job.model, num_examples, metrics)


@wire.untrusted()
def read_progress(device: Device, report: Mapping[str, Any]) -> Progress:
    """Check a device's report of its progress.

    Raises:
        BadReply: numbers are missing, or make no sense.
    """
    metrics: dict[str, Scalar] = clean_metrics(report)
    step, steps, rate = (metrics.pop(name) for name in ("step", "steps", "images_per_second"))
    if type(step) is not int or type(steps) is not int or not 0 <= step <= steps <= MAX_STEPS:
        raise BadReply(f"step {step!r} of {steps!r}")
    if type(rate) is not float or not 0 <= rate <= MAX_RATE:
        raise BadReply(f"{rate!r} images a second")
    version = metrics.pop("data_version", "")
    if not isinstance(version, str) or len(version) > MAX_VERSION:
        raise BadReply("its data_version is no short text")
    return Progress(device, step, steps, rate, metrics, version)


def _taken_from(chunks: list[T]) -> Iterator[T]:
    """Yield what is in a list, which each leaves: it is freed before the next one is decoded."""
    chunks.reverse()
    while chunks:
        yield chunks.pop()


def server_options(max_message_bytes: int, keepalive_seconds: float) -> list[tuple[str, int]]:
    """Return gRPC's options for the server."""
    return [
        ("grpc.so_reuseport", 0),  # else a second server would share the port unnoticed
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.keepalive_time_ms", int(keepalive_seconds * 1000)),
        ("grpc.keepalive_timeout_ms", int(keepalive_seconds * 500)),
        # The answer to a probe, for which gRPC waits 60 s despite the line above. It
        # is queued behind a model: with 100 kB/s for 11 to 15 s.
        ("grpc.http2.ping_timeout_ms", int(keepalive_seconds * 1800)),
        ("grpc.http2.max_pings_without_data", 0),
        # Devices probe the connection half as often as this allows. Who sends far more pings is
        # hung up on, else 200,000 of them are answered in a second.
        ("grpc.http2.min_ping_interval_without_data_ms", int(keepalive_seconds * 500)),
        ("grpc.http2.max_ping_strikes", 10),
        # Calls at a time on a connection: a device has 2. Without a limit 40,000 that are opened
        # and reset took 57 MB, with it 6.
        ("grpc.max_concurrent_streams", 100),
        ("grpc.server_handshake_timeout_ms", int(HANDSHAKE_SECONDS * 1000)),
        ("grpc.max_connection_idle_ms", int(IDLE_SECONDS * 1000)),
        # What may come in unread on a connection. Left to gRPC it grows with the speed of the
        # link: 1.3 MB more a device, and with 100 of ResNet18 1.01 GB, not 0.92.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", WINDOW_BYTES),
    ]
