"""The device's end of Flower's gRPC stream: wait for the server, serve it, come back.

One process, one channel. `serve` returns when the server says that the run is over.
"""

import logging
import queue
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import grpc
from flwr.client import NumPyClient

from plumbing import wire
from plumbing.addresses import UnknownHost, resolve
from plumbing.errors import FederationError, Refused

logger = logging.getLogger(__name__)

JOIN = "/flwr.proto.FlowerService/Join"
MAX_PAUSE_SECONDS = 30.0

# What a server answers to a device that it will not take however often it asks.
REFUSALS = {
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
}


def serve(
    server_address: str,
    client: NumPyClient,
    on_connected: Callable[[], None],
    max_wait_seconds: float | None = None,
) -> None:
    """Do what the server asks of `client` until the run is over.

    A server that is not up yet is waited for, and one that goes away is sought again,
    with exponential back-off and jitter, pauses of 30 s at most.

    Args:
        on_connected: called each time that the server has spoken on a new connection.
        max_wait_seconds: give up after so long without a server; None is never.

    Raises:
        Refused: the server does not take this device.
        FederationError: no such host, no server for `max_wait_seconds`, or one that
            sends what makes no sense.
    """
    failures = 0
    last_seen = time.monotonic()
    while True:
        outcome = _serve_once(server_address, client, on_connected)
        if outcome.done:
            return
        if outcome.connected:
            failures, last_seen = 0, time.monotonic()
        failures += 1
        pause = min(MAX_PAUSE_SECONDS, 2.0 ** min(failures, 10)) * random.uniform(0.5, 1)
        pause = max(pause, outcome.pause_seconds)
        if max_wait_seconds is not None:
            left = last_seen + max_wait_seconds - time.monotonic()
            if left <= 0:
                raise FederationError(
                    f"no server at {server_address} for {max_wait_seconds:g} s, giving up "
                    f"({outcome.reason}); is server.py running there?"
                )
            pause = min(pause, left)
        if outcome.connected:
            logger.info(f"left {server_address} ({outcome.reason}), next try in {pause:.0f} s")
        else:
            logger.info(
                f"no server at {server_address} yet ({outcome.reason}), "
                f"next try in {pause:.0f} s (is server.py running there?)"
            )
        time.sleep(pause)


@dataclass
class _Outcome:
    """How one connection went."""

    connected: bool = False  # the server spoke
    done: bool = False  # it said that the run is over
    reason: str = ""  # why the connection ended
    pause_seconds: float = 0.0  # how long the server wants to be left alone


def _serve_once(
    server_address: str, client: NumPyClient, on_connected: Callable[[], None]
) -> _Outcome:
    """Connect and answer requests until the connection ends, one way or another."""
    outcome = _Outcome()
    try:
        resolve(server_address)  # gRPC tells less well that a name is not known
        with _join(server_address) as (messages, replies):
            for data in messages:
                if not outcome.connected:
                    outcome.connected = True
                    on_connected()
                request = wire.decode_request(data)
                if request.kind == "reconnect":
                    outcome.done = request.reconnect_seconds <= 0
                    outcome.pause_seconds = request.reconnect_seconds
                    replies.put(wire.encode_done_reply(will_reconnect=not outcome.done))
                else:
                    replies.put(_answer(client, request))
        outcome.reason = "the server ended the conversation"
    except UnknownHost as error:
        if not error.may_pass:
            raise
        outcome.reason = "its name cannot be looked up, no network?"
    except grpc.RpcError as error:
        if error.code() in REFUSALS:
            raise Refused(f"the server refuses this device: {error.details()}") from None
        outcome.reason = _plain_words(error)
    return outcome


@contextmanager
def _join(server_address: str) -> Iterator[tuple[Iterator[bytes], "queue.SimpleQueue[bytes]"]]:
    """Open the stream; yield the server's messages and a queue for the answers."""
    options = [
        ("grpc.max_send_message_length", -1),
        ("grpc.max_receive_message_length", -1),
        # Find out a server that fell silent. A stock Flower server hangs up on a client that
        # asks more often than every 300 s.
        ("grpc.keepalive_time_ms", 310_000),
        ("grpc.enable_http_proxy", 0),  # a server on the local network is not behind one
    ]
    replies: queue.SimpleQueue = queue.SimpleQueue()
    with grpc.insecure_channel(server_address, options) as channel:
        join = channel.stream_stream(JOIN)  # bytes in, bytes out
        stream = join(iter(replies.get, None))
        try:
            yield stream, replies
        finally:
            replies.put(None)
            stream.cancel()


def _answer(client: NumPyClient, request: wire.Request) -> bytes:
    weights = list(request.weights)
    if request.kind == "get_properties":
        return wire.encode_properties_reply(client.get_properties(request.config))
    if request.kind == "get_parameters":
        return wire.encode_parameters_reply(client.get_parameters(request.config))
    if request.kind == "fit":
        return wire.encode_fit_reply(*client.fit(weights, request.config))
    return wire.encode_evaluate_reply(*client.evaluate(weights, request.config))


def _plain_words(error: grpc.RpcError) -> str:
    """Return gRPC's reason without its addresses, file names and repetitions."""
    details = error.details() or ""
    for words in ("Connection refused", "Connection reset", "No route to host", "Socket closed"):
        if words.lower() in details.lower():
            return words.lower()
    if "cancelling all calls" in details.lower():
        return "the server stopped"
    if "timed out" in details.lower() or "timeout" in details.lower():
        return "no answer"
    return f"{error.code().name}: {details}"
