"""The device's end of Flower's gRPC stream: wait for the server, serve it, come back.

One process, one stream. `serve` returns when the server ends the run.
"""

from __future__ import annotations

import json
import logging
import math
import queue
import random
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
import numpy as np

from federated.errors import FederationError, NotYet, Refused
from plumbing.addresses import UnknownHost, resolve
from plumbing.security.complaints import bounded
from plumbing.security.identity import NO_PROXY, Identity, connection_problem
from plumbing.stream import wire

logger = logging.getLogger(__name__)

JOIN = "/flwr.proto.FlowerService/Join"
HELLO = "/plumbing.Fleet/Hello"
PROGRESS = "/plumbing.Fleet/Progress"
ANNOUNCE = "/plumbing.Fleet/Announce"
MAX_PAUSE_SECONDS = 30.0
REPORT_SECONDS = 5.0  # then a report of progress that has not arrived is given up
HELLO_SECONDS = 10.0  # gRPC itself tries for 20 s to reach an address that swallows packets
MIN_PAUSE_SECONDS = 0.5
HOPELESS_SECONDS = 60.0  # with the same wrong program at the address
# A stock Flower server disconnects a client that probes more often than every 300 s.
STOCK_KEEPALIVE_SECONDS = 310.0

# What a server answers to a device that it will not take however often it asks.
REFUSALS = {
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
}


class NumPyClient(Protocol):
    """What answers a server's requests; Flower's class of that name does, too.

    Weights are NumPy arrays in the model's order. `config`, properties and metrics hold
    values of type bool, bytes, float, int and str.
    """

    def get_properties(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return what this device is."""

    def get_parameters(self, config: dict[str, Any]) -> list[np.ndarray]:
        """Return the weights that this device has."""

    def fit(
        self, parameters: list[np.ndarray], config: dict[str, Any]
    ) -> tuple[list[np.ndarray], int, dict[str, Any]]:
        """Train from `parameters`; return (weights, num_examples, metrics)."""

    def evaluate(
        self, parameters: list[np.ndarray], config: dict[str, Any]
    ) -> tuple[float, int, dict[str, Any]]:
        """Evaluate `parameters`; return (loss, num_examples, metrics)."""


def serve(
    server_address: str,
    client: NumPyClient,
    on_state: Callable[[str], None],
    max_wait_seconds: float | None = None,
    stay: bool = False,
    identity: Identity | None = None,
    reporter: Reporter | None = None,
) -> None:
    """Do what the server asks of `client` until the run is over.

    A server that is not up yet is waited for, and one that goes away is sought again,
    with exponential back-off and jitter, at most 30 s from one attempt to the next. An
    exception in the client's `fit` or `evaluate` is reported to the server, and survived.

    Args:
        on_state: called with "connected to …" when the first message has come on a new
            connection, with "waiting for …" whenever there is none.
        max_wait_seconds: give up after so long without a server; None is never.
        stay: when the run is over, wait for the next.
        identity: what both ends prove themselves by; without one the server must be open.
        reporter: sends the client's progress while it is connected.

    Raises:
        Refused: the server does not take this device.
        FederationError: no such host, no server for `max_wait_seconds`, or one that
            sends what makes no sense.
    """
    worker = _Worker(client, reporter or Reporter())

    def attempt(seconds: float) -> _Outcome:
        return _serve_once(server_address, worker, on_state, seconds, identity)

    _keep_trying(server_address, attempt, on_state, max_wait_seconds, stay)


def enrol(server_address: str, identity: Identity, max_wait_seconds: float | None = None) -> None:
    """Get a certificate for `identity`, waiting for the server like `serve`."""
    do_once(server_address, identity, lambda: None, max_wait_seconds)


def do_once(
    server_address: str,
    identity: Identity | None,
    action: Callable[[], object],
    max_wait_seconds: float | None = None,
) -> None:
    """Do what needs the server, waiting for it like `serve`."""

    def attempt(seconds: float) -> _Outcome:
        outcome = _Outcome()
        with _recorded(outcome, server_address, identity, seconds):
            if identity:
                identity.prepare(server_address, seconds)
            action()
            outcome.done = True
        return outcome

    _keep_trying(server_address, attempt, lambda state: None, max_wait_seconds, stay=False)


def _keep_trying(
    server_address: str,
    attempt: Callable[[float], _Outcome],
    on_state: Callable[[str], None],
    max_wait_seconds: float | None,
    stay: bool,
) -> None:
    failures = 0
    last_seen = wrong_since = time.monotonic()
    wrong = ""  # what has listened there since then
    while True:
        started = time.monotonic()
        left = math.inf if max_wait_seconds is None else last_seen + max_wait_seconds - started
        outcome = attempt(left)
        if outcome.done and not stay:
            return
        now = time.monotonic()
        if not outcome.wrong_server or outcome.reason != wrong:
            wrong, wrong_since = outcome.reason if outcome.wrong_server else "", now
        if outcome.connected:
            # A server that takes a device and drops it at once is not worth hurrying for.
            failures = 0 if now - started > MAX_PAUSE_SECONDS else failures
            last_seen = started = now
        failures += 1
        pause = min(MAX_PAUSE_SECONDS, 2.0 ** min(failures, 10)) * random.uniform(0.5, 1)
        pause = max(started + pause - now, outcome.pause_seconds, MIN_PAUSE_SECONDS)
        if max_wait_seconds is not None:
            left = last_seen + max_wait_seconds - now
            if left <= 0:
                raise FederationError(
                    f"no server at {server_address} for {max_wait_seconds:g} s, giving up "
                    f"({outcome.reason}); is server.py running there?"
                )
            pause = min(pause, left)
        on_state(f"waiting for {server_address} ({outcome.reason})")
        if outcome.done:
            logger.info(f"the run is over, waiting for the next at {server_address}")
        elif outcome.connected:
            logger.info(f"left {server_address} ({outcome.reason}), next try in {pause:.0f} s")
        else:
            hint = "is server.py running there?"
            if wrong and now - wrong_since >= HOPELESS_SECONDS:
                hint = "waiting will hardly help: check --server_address, and server.py there"
            logger.info(
                f"no server at {server_address} yet ({outcome.reason}), "
                f"next try in {pause:.0f} s ({hint})"
            )
        time.sleep(pause)


class Reporter:
    """Sends a device's progress beside the stream; a report that is lost does no harm."""

    def __init__(self) -> None:
        self.channel: grpc.Channel | None = None  # while a server is connected that takes reports

    def __call__(self, report: Mapping[str, Any]) -> None:
        """Send a report, and do not wait for the answer."""
        if channel := self.channel:
            with suppress(grpc.RpcError, ValueError):  # the channel is closed
                metadata = [(wire.PROGRESS_KEY, wire.encode_progress(report))]
                call = channel.unary_unary(PROGRESS).future(
                    b"", timeout=REPORT_SECONDS, metadata=metadata
                )
                call.add_done_callback(self._note)

    def _note(self, call: grpc.Future) -> None:
        """Send no more to a server that does not know the call."""
        if call.code() == grpc.StatusCode.UNIMPLEMENTED:
            self.channel = None


class _Worker:
    """Answers requests; keeps what it trained last until something new is trained."""

    def __init__(self, client: NumPyClient, reporter: Reporter) -> None:
        self.client = client
        self.reporter = reporter
        self.round_id = ""  # of the round that the rest belongs to
        self.offer = b""
        self.weights: list[np.ndarray] = []
        self.pieces: list[np.ndarray] = []  # of the weights in a request that is still coming in
        self.problem = ""  # with the last reply, to be reported with the next one
        self.misfit = ""  # why this device cannot work with the server that it is connected to
        self.traffic = {"total_bytes_received": 0, "total_bytes_sent": 0}

    def answer(self, data: bytes, request: wire.Request) -> bytes | None:
        """Return the reply to `request`, which came as `data`; None if more of it follows."""
        self.traffic["total_bytes_received"] += len(data)
        if request.config.get(wire.MORE):
            self.pieces += request.weights
            return None
        reply = self._answer(request)
        self.traffic["total_bytes_sent"] += len(reply)
        return reply

    def _answer(self, request: wire.Request) -> bytes:
        round_id = str(request.config.get(wire.ROUND_ID, ""))
        if request.kind == "get_properties":
            if note := request.config.get(wire.NOTE):
                logger.info(bounded(str(note)))
                return wire.encode_properties_reply({})
            properties = self.client.get_properties(request.config)
            held = {wire.ROUND_ID: self.round_id} if self.round_id else {}
            own: dict[str, Any] = {wire.PIECES: True, wire.VERSION: wire.PROTOCOL}
            if self.misfit:  # a server that does not compare versions shows this
                own["problem"] = self.misfit
            return wire.encode_properties_reply({**properties, **held, **own})
        if request.kind == "get_parameters":
            if round_id and round_id == self.round_id:
                first = int(request.config.get(wire.FIRST, 0))
                count = int(request.config.get(wire.COUNT, len(self.weights)))
                weights = self.weights[first : first + count]
                skip, take = int(request.config.get(wire.SKIP, 0)), request.config.get(wire.TAKE)
                return wire.encode_parameters_reply(weights, skip, take)
            return wire.encode_parameters_reply(self.client.get_parameters(request.config))
        try:
            if request.kind == "fit":
                return self._fit(request, round_id)
            sent, self.pieces = [*self.pieces, *request.weights], []
            return wire.encode_evaluate_reply(*self.client.evaluate(sent, request.config))
        except Exception as error:  # the user's own code may raise anything
            if not isinstance(error, FederationError):
                traceback.print_exc()
            reason = str(error) if isinstance(error, FederationError) else repr(error)
            logger.error(f"{request.kind} failed, reported to the server: {reason}")
            if request.kind == "fit":
                return wire.encode_fit_failure(reason)
            return wire.encode_evaluate_failure(reason)

    def _fit(self, request: wire.Request, round_id: str) -> bytes:
        sent, self.pieces = [*self.pieces, *request.weights], []
        if round_id and round_id == self.round_id:
            return self.offer  # the connection broke before it arrived, or the round is repeated
        self.round_id, self.weights = "", []
        if self.problem:
            problem, self.problem = self.problem, ""
            raise FederationError(problem)
        weights, num_examples, metrics = self.client.fit(sent, request.config)
        metrics = {**metrics, **self.traffic}
        if not round_id:
            return wire.encode_fit_reply(weights, num_examples, metrics)
        self.offer = wire.encode_fit_reply([], num_examples, {**metrics, wire.ROUND_ID: round_id})
        self.round_id = round_id
        self.weights = [np.asarray(array, order="C") for array in weights]  # it is read in ranges
        return self.offer


@dataclass
class _Outcome:
    """How one connection went."""

    connected: bool = False  # the server spoke
    done: bool = False  # the server ended the run
    reason: str = ""  # why the connection ended
    wrong_server: bool = False  # something else listens there
    pause_seconds: float = 0.0  # how long the server wants to be left alone


def _serve_once(
    server_address: str,
    worker: _Worker,
    on_state: Callable[[str], None],
    seconds: float,
    identity: Identity | None,
) -> _Outcome:
    """Connect, within `seconds`, and answer requests until the connection ends."""
    outcome = _Outcome()
    worker.pieces = []  # of a connection that is no more
    with _recorded(outcome, server_address, identity, seconds, worker):
        resolve(server_address)  # gRPC's own message on an unknown name is less clear
        timeout = max(MIN_PAUSE_SECONDS, min(HELLO_SECONDS, seconds))
        if identity:
            identity.prepare(server_address, timeout)
        server = _hello(server_address, timeout, identity)
        worker.misfit = server.misfit
        with _join(server_address, server, identity, worker.reporter) as conversation:
            messages, replies, announce = conversation
            for data in messages:
                if not outcome.connected:
                    outcome.connected = True
                    on_state(f"connected to {server_address}")
                if identity:
                    identity.renew_if_due(server_address)
                request = wire.decode_request(data)
                reply: bytes | None
                if worker.misfit and request.kind not in ("get_properties", "reconnect"):
                    raise Refused(worker.misfit)
                if request.kind == "reconnect":
                    outcome.done = request.reconnect_seconds <= 0
                    outcome.pause_seconds = request.reconnect_seconds
                    reply = wire.encode_done_reply(will_reconnect=not outcome.done)
                else:
                    reply = worker.answer(data, request)
                if reply:
                    replies.put(reply)
                if reply and request.kind != "get_parameters":
                    announce()
        outcome.reason = "the run is over" if outcome.done else "the server ended the conversation"
        if outcome.pause_seconds:
            outcome.reason = "the server was interrupted"
    return outcome


@contextmanager
def _recorded(
    outcome: _Outcome,
    server_address: str,
    identity: Identity | None,
    seconds: float,
    worker: _Worker | None = None,
) -> Iterator[None]:
    """Put into `outcome` why a connection failed; raise what further attempts would not change."""
    try:
        yield
    except UnknownHost as error:
        if not error.may_pass:
            raise
        outcome.reason = "its name cannot be looked up, no network?"
    except NotYet as error:
        outcome.reason = str(error)
    except grpc.RpcError as error:
        if error.code() in REFUSALS:
            raise Refused(f"the server refuses this device: {error.details()}") from None
        outcome.reason = plain_words(error)
        if error.code() == grpc.StatusCode.UNAVAILABLE and not outcome.connected:
            problem, outcome.wrong_server = connection_problem(server_address, identity, seconds)
            outcome.reason = problem or outcome.reason
        if error.code() == grpc.StatusCode.UNIMPLEMENTED:
            outcome.reason = "what listens there does not know Flower's messages"
            outcome.wrong_server = True
        if error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED and worker:
            # The server sees a broken connection. Without a reason it would ask for ever.
            worker.round_id, worker.weights, worker.problem = "", [], outcome.reason


def open_channel(
    server_address: str, options: list[tuple[str, int]], identity: Identity | None
) -> grpc.Channel:
    if identity:
        return identity.channel(server_address, options)
    return grpc.insecure_channel(server_address, options)


@dataclass(frozen=True)
class _Server:
    """What a server reports of itself."""

    keepalive_seconds: float  # how often the connection may be probed
    # Why this device cannot work with it. The server learns that when the device joins, so that
    # there is a line on its screen, too.
    misfit: str = ""
    wants_announcements: bool = False  # see wire.ANNOUNCE


def _hello(server_address: str, timeout: float, identity: Identity | None) -> _Server:
    """Ask whether the server is there at all, and what it is."""
    with open_channel(server_address, NO_PROXY, identity) as channel:
        try:
            answer = channel.unary_unary(HELLO)(b"", timeout=timeout)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNIMPLEMENTED:
                return _Server(STOCK_KEEPALIVE_SECONDS)
            raise
    try:
        reported = json.loads(answer)
        keepalive_seconds = max(1.0, float(reported["keepalive_seconds"]))
        problem = wire.version_problem(reported.get(wire.VERSION, 1), "the server")
    except (KeyError, TypeError, ValueError, AttributeError):
        raise FederationError(f"{server_address} is no server of this kind: {answer!r}") from None
    return _Server(keepalive_seconds, problem or "", reported.get(wire.ANNOUNCE) is True)


@contextmanager
def _join(
    server_address: str, server: _Server, identity: Identity | None, reporter: Reporter
) -> Iterator[tuple[Iterator[bytes], queue.SimpleQueue[bytes], Callable[[], None]]]:
    """Open the stream; yield the server's messages, a queue for answers, what announces one."""
    options = [
        *NO_PROXY,
        ("grpc.max_send_message_length", -1),
        ("grpc.max_receive_message_length", -1),
        # Find out a server that fell silent, or a link that died silently.
        ("grpc.keepalive_time_ms", int(server.keepalive_seconds * 1000)),
        ("grpc.keepalive_timeout_ms", int(server.keepalive_seconds * 500)),
        # As the server's: see plumbing/stream/fleet.py.
        ("grpc.http2.ping_timeout_ms", int(min(server.keepalive_seconds * 1.8, 60) * 1000)),
        ("grpc.http2.max_pings_without_data", 0),
    ]
    replies: queue.SimpleQueue = queue.SimpleQueue()
    with open_channel(server_address, options, identity) as channel:
        join = channel.stream_stream(JOIN)  # bytes in, bytes out
        metadata = [(wire.ANNOUNCE, "1")] if server.wants_announcements else None
        stream = join(iter(replies.get, None), metadata=metadata)
        reporter.channel = channel

        def announce() -> None:
            if not server.wants_announcements:
                return
            try:
                channel.unary_unary(ANNOUNCE)(b"", timeout=HELLO_SECONDS)
            except grpc.RpcError as error:
                # Unannounced, the reply would never be read: better to join again. Of all else
                # the stream ends too, and has the reason.
                if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
                    raise

        try:
            yield stream, replies, announce
        finally:
            reporter.channel = None
            replies.put(None)
            stream.cancel()


def plain_words(error: grpc.RpcError) -> str:
    """Return gRPC's reason without its addresses, file names and repetitions."""
    details = error.details() or ""
    for words in ("Connection refused", "Connection reset", "No route to host", "Socket closed"):
        if words.lower() in details.lower():
            return words.lower()
    if "cancelling all calls" in details.lower():
        return "the server stopped"
    if error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in details:
        return f"its reply is too large: {details.replace('SERVER: ', '', 1)}"
    if error.code() == grpc.StatusCode.ABORTED:  # our server's own words
        return details
    if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
        return "no answer"
    if "timed out" in details.lower() or "timeout" in details.lower():
        return "no answer"
    return f"{error.code().name}: {details}"
