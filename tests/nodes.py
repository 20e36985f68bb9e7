"""Nodes of Flower's engine in memory, for tests of what is sent to them."""

import collections
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.serverapp import Grid

Answer = Callable[[Message], "RecordDict | Error | None"]


@dataclass(frozen=True)
class Info:
    node_id: int
    last_activated_at: str = ""


def properties(cid: str) -> RecordDict:
    return RecordDict({"properties": ConfigRecord({"cid": cid, "images": 10})})


def trained(message: Message, add: float = 1.0, **metrics: Any) -> RecordDict:
    """Answer as a node that adds a number to each weight."""
    arrays = {
        name: Array(np.asarray(array.numpy() + array.numpy().dtype.type(add)))
        for name, array in message.content.array_records["arrays"].items()
    }
    return RecordDict(
        {
            "arrays": ArrayRecord(arrays),
            "metrics": ConfigRecord({"num-examples": 10, **metrics}),
        }
    )


class MemoryGrid(Grid):
    """Nodes in a dict: each answers a message when it is pulled."""

    def __init__(self) -> None:
        self.nodes: dict[Info, Answer] = {}
        self.sent: dict[str, Message] = {}
        self.asked: collections.Counter[tuple[int, str]] = collections.Counter()

    def add(
        self,
        node_id: int,
        train: Answer = trained,
        cid: str = "",
        since: str = "",
        query: Answer | None = None,
    ) -> Info:
        def answer(message: Message) -> RecordDict | Error | None:
            if message.metadata.message_type == "query":
                return query(message) if query else properties(cid or str(node_id))
            return train(message)

        info = Info(node_id, since)
        self.nodes[info] = answer
        return info

    def get_node_ids(self) -> Iterable[int]:
        return [info.node_id for info in self.nodes]

    def get_nodes(self) -> Any:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            ids.append(str(uuid.uuid4()))
            self.sent[ids[-1]] = message
            self.asked[message.metadata.dst_node_id, message.metadata.message_type] += 1
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = []
        for message_id in message_ids:
            message = self.sent[message_id]
            answers = [
                a for i, a in self.nodes.items() if i.node_id == message.metadata.dst_node_id
            ]
            content = answers[0](message) if answers else None
            if content is not None:
                message.metadata.__dict__["_message_id"] = message_id
                replies.append(Message(content, reply_to=message))
        return replies

    def _unused(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError

    set_run = create_message = send_and_receive = _unused
    run = property(_unused)
