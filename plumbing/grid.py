"""Flower's engine as a Fleet: its nodes are SuperNodes, or simulated.

A node is asked what it is first, as a device on the stream is. All runs in the thread of the
schedule: `wait` looks for nodes and replies until there is an event.
"""

import collections
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from federated.errors import BadReply, FederationError
from federated.rounds import (
    Device,
    Event,
    Fleet,
    Freed,
    Job,
    Joined,
    Left,
    Notice,
    Result,
    Resumed,
)
from federated.updates import Scalar, clean_metrics, make_score, make_update
from plumbing.addresses import check_cid
from plumbing.stream.wire import unpack_array, untrusted

REPLIES_SECONDS = 0.1  # from one look for replies to the next
NODES_SECONDS = 2.0  # the same for nodes that come and go
PROBLEM = "problem"  # the key under which a node reports why it cannot do what it is asked
NODE_UNAVAILABLE = 5  # Flower's number for a node that went away
NOT_THE_NODES_FAULT = (3, 4, NODE_UNAVAILABLE)  # messages that were lost


@dataclass(eq=False)
class Node:
    """A node that is online; the same one is another after a restart."""

    node_id: int
    device: Device | None = None  # once it has answered
    joined: bool = False


@dataclass(eq=False)
class Request:
    """A message that a node has not answered yet."""

    node: Node
    job: Job | None  # None asks what the node is
    sent: float
    bytes_sent: int = 0
    wanted: bool = True


class GridFleet(Fleet):
    """The nodes of a Grid.

    Args:
        greeting: the settings sent with the question what a node is.
        admit: looks at what a node reports of itself; returns why it must not take part.
    """

    address = "Flower's SuperLink"

    def __init__(
        self,
        grid: Grid,
        greeting: Mapping[str, Scalar],
        admit: Callable[[Mapping[str, Any]], str | None],
    ) -> None:
        super().__init__()
        self.grid = grid
        self.greeting = greeting
        self.admit = admit
        self._nodes: dict[tuple[int, str], Node] = {}  # by id and time of the last start
        self._names: dict[str, Node] = {}  # by cid, of those that joined
        self._requests: dict[str, Request] = {}  # by the message's id
        self._lost: dict[str, Job] = {}  # by cid, of nodes that went away
        self._inbox: collections.deque[Event | tuple[Request, Message]] = collections.deque()
        self._records: weakref.WeakKeyDictionary[Job, ArrayRecord] = weakref.WeakKeyDictionary()
        self._next_look = 0.0

    # --- What a schedule calls ---

    def _start(self, device: Device, job: Job) -> None:
        if job not in self._records:
            self._records[job] = ArrayRecord(
                {n: Array(np.asarray(a)) for n, a in job.model.items()}
            )
        record = self._records[job]
        content = RecordDict({"arrays": record, "config": ConfigRecord(dict(job.config))})
        request = Request(self._names[device.cid], job, time.monotonic(), record.count_bytes())
        if not self._send(request, job.kind, content):
            self._inbox.append(Result(device, job, None, "the SuperLink took no message for it"))

    def _abandon(self, device: Device, job: Job, patience: float | None) -> None:
        if self._lost.get(device.cid) is job:
            del self._lost[device.cid]
        for request in self._requests.values():
            if request.job is job and request.node.device is device:
                request.wanted = False

    def _next(self, timeout: float | None) -> Event | None:
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            while self._inbox:
                found = self._inbox.popleft()
                event = self._read(*found) if isinstance(found, tuple) else found
                if event:
                    return event
            self._look_for_nodes()
            for message in self.grid.pull_messages(list(self._requests)) if self._requests else ():
                if request := self._requests.pop(message.metadata.reply_to_message_id, None):
                    self._inbox.append((request, message))
            if not self._inbox:
                left = REPLIES_SECONDS if deadline is None else deadline - time.monotonic()
                if left <= 0:
                    return None
                time.sleep(min(REPLIES_SECONDS, left))

    # --- Nodes ---

    def _look_for_nodes(self) -> None:
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + NODES_SECONDS
        online = {(node.node_id, node.last_activated_at) for node in self.grid.get_nodes()}
        for key in [key for key in self._nodes if key not in online]:
            self._part(self._nodes.pop(key))
        for key in sorted(online - self._nodes.keys()):
            self._nodes[key] = Node(key[0])
            request = Request(self._nodes[key], None, time.monotonic())
            content = RecordDict({"config": ConfigRecord(dict(self.greeting))})
            if not self._send(request, "query", content):
                del self._nodes[key]  # asked again at the next look
        for node in self._nodes.values():
            self._join(node)

    def _send(self, request: Request, kind: str, content: RecordDict) -> bool:
        """Send a message; return whether it is under way."""
        message = Message(content, request.node.node_id, kind)
        message_id = next(iter(self.grid.push_messages([message])), None)
        if message_id:
            self._requests[message_id] = request
        return bool(message_id)

    def _part(self, node: Node) -> None:
        """Note that a node is gone; what it worked on is given to it again if it comes back."""
        for message_id, request in list(self._requests.items()):
            if request.node is node:
                del self._requests[message_id]
                if request.job and request.wanted and node.device:
                    self._lost[node.device.cid] = request.job
        if node.device and node.joined:
            del self._names[node.device.cid]
            self._inbox.append(Left(node.device))

    def _join(self, node: Node) -> None:
        """Let a node that has answered take part, unless another one has its name still."""
        device = node.device
        if not device or node.joined or device.cid in self._names:
            return
        node.joined = True
        self._names[device.cid] = node
        self._inbox.append(Joined(device))
        if job := self._lost.pop(device.cid, None):
            self._inbox.append(Resumed(device, job))
            self._start(device, job)

    # --- Replies ---

    def _read(self, request: Request, message: Message) -> Event | None:
        """Return what a reply means, None if nothing yet."""
        if not request.job:
            return self._read_properties(request.node, message)
        device = request.node.device
        assert device
        if message.has_error() and message.error.code == NODE_UNAVAILABLE:
            self._lost |= {device.cid: request.job} if request.wanted else {}
            return None  # the next look at the nodes shows that it is gone
        if not request.wanted:
            self._inbox.append(Freed(device))
            return Notice(f"{device.name} answered too late, which does not count")
        return read_result(device, request.job, request, message)

    def _read_properties(self, node: Node, message: Message) -> Event | None:
        name = f"node {node.node_id}"
        if message.has_error() and message.error.code in NOT_THE_NODES_FAULT:
            # It is asked again, if it is still there at the next look.
            self._nodes = {key: other for key, other in self._nodes.items() if other is not node}
            return None
        try:
            with untrusted():
                content = _content(message)
                device = Device(str(content.get("cid", "")), clean_metrics(content))
                check_cid(device.cid)
                name = device.name
            if objection := self.admit(device.properties):
                raise BadReply(objection)
        except FederationError as error:
            return Notice(f"refused {name}: {error}")
        node.device = device
        self._join(node)
        if not node.joined:
            return Notice(f"{name} is here twice; the new one waits until the old one is gone")
        return None


def read_result(device: Device, job: Job, request: Request, message: Message) -> Result:
    """Decode a reply and compare it with the model that was sent.

    Whatever the bytes raise is the node's bad reply.
    """
    if message.has_error() and message.error.code in NOT_THE_NODES_FAULT:
        return Result(device, job, None, "its reply was lost")
    try:
        with untrusted():
            metrics = _content(message)
            num_examples: Any = metrics.pop("num-examples", None)
            seconds, sent = time.monotonic() - request.sent, request.bytes_sent
            if job.kind == "evaluate":
                score = make_score(metrics.pop("loss", None), num_examples, metrics)
                return Result(device, job, None, seconds=seconds, bytes_sent=sent, score=score)
            records = list(message.content.array_records.values())
            if len(records) != 1:
                raise BadReply(f"its reply holds {len(records)} models")
            [record] = records
            if list(record) != list(job.model):
                raise BadReply(f"{len(record)} arrays with other names than the model's")
            arrays = (unpack_array(record[name].data) for name in job.model)
            update = make_update(arrays, job.model, num_examples, metrics)
            size = record.count_bytes()
    except BadReply as error:
        return Result(device, job, None, str(error), at_fault=True)
    return Result(device, job, update, "", False, seconds, sent, size)


def _content(message: Message) -> dict[str, Any]:
    """Return the metrics and settings in a reply.

    Raises:
        BadReply: it is an error.
    """
    if message.has_error():
        lines = (message.error.reason or "no reason").strip().splitlines()
        raise BadReply(f"its ClientApp failed ({lines[-1]})")
    records: Any = message.content
    found: dict[str, Any] = {}
    for record in (*records.config_records.values(), *records.metric_records.values()):
        found |= dict(record)
    if PROBLEM in found and "cid" not in found:
        raise BadReply(str(found[PROBLEM]))
    return found
