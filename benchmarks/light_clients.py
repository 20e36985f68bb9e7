"""Simulated devices, hundreds in one process: they speak the stream and train nothing.

    python benchmarks/light_clients.py --server_address 127.0.0.1:8080 --clients 50 --model ResNet18

Each has a connection of its own. It answers a fit with the model's first weights, the way
client.py does where the server asks for that (an offer, then the weights), else as a stock
Flower client. With --trouble 0.1 each is cut off, silent or sends rubbish in a round out of ten.
"""

import argparse
import asyncio
import json
import random
import sys
from pathlib import Path
from typing import Any

import grpc
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from anywhere

import utils
from plumbing.stream import wire
from plumbing.stream.device import ANNOUNCE, HELLO, JOIN, REFUSALS

PAUSE_SECONDS = 1.0  # before a device that was cut off comes back
OPTIONS = [
    ("grpc.use_local_subchannel_pool", 1),  # else channels to one server share a connection
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_http_proxy", 0),
]


class Fleet:
    """What the simulated devices have in common, above all the bytes of their weights."""

    def __init__(self, model: str, num_classes: int, trouble: float, seed: int = 0) -> None:
        weights = list(utils.get_weights(utils.build_model(model, num_classes)).values())
        self.trouble = trouble
        self.seed = seed
        self.model = model
        self.classes = json.dumps(utils.load_data("synthetic:100", "test", 32).classes)
        self.whole = wire.encode_fit_reply(weights, 100, {})
        self.weights = {
            "": weights,
            "nan": [np.full_like(weights[0], np.nan), *weights[1:]],
            "misshapen": [w.reshape(1, -1) for w in weights],
        }
        self.encoded: dict[Any, bytes] = {}

    def greeting(self, cid: str) -> bytes:
        return wire.encode_properties_reply(
            {
                "cid": cid,
                "model": self.model,
                "classes": self.classes,
                "board": "simulated",
                "images": 100,
                wire.PIECES: True,
                wire.VERSION: wire.PROTOCOL,
            }
        )

    def mishap(self, cid: str, server_round: int) -> str:
        """Return what goes wrong for a device in a round; mostly nothing."""
        draw = random.Random(f"{self.seed} {cid} {server_round}")
        return draw.choice(MISHAPS) if draw.random() < self.trouble else ""

    def answer(self, request: wire.Request, mishap: str) -> bytes:
        round_id = str(request.config.get(wire.ROUND_ID, ""))
        if request.kind == "get_parameters":
            if mishap == "garbage":
                return b"\xff" * 1000
            weights = self.weights.get(mishap, self.weights[""])
            first = request.config.get(wire.FIRST, 0)
            count = request.config.get(wire.COUNT, len(weights))
            skip, take = request.config.get(wire.SKIP, 0), request.config.get(wire.TAKE)
            key = (first, count, skip, take, mishap if mishap in self.weights else "")
            if key not in self.encoded:
                arrays = weights[first : first + count]
                self.encoded[key] = wire.encode_parameters_reply(arrays, skip, take)
            return self.encoded[key]
        if mishap == "no message":
            return b"\xff" * 1000
        if mishap == "failure":
            return wire.encode_fit_failure("simulated")
        if round_id:
            num_examples = 0 if mishap == "no examples" else 100
            return wire.encode_fit_reply([], num_examples, {wire.ROUND_ID: round_id, "loss": 1.0})
        return self.whole


MISHAPS = [
    "cut off", "cut off with the weights due", "silent", "nan", "misshapen", "garbage",
    "no message", "failure", "no examples",
]  # fmt: skip


async def live(address: str, cid: str, fleet: Fleet) -> None:
    """Be one device until the run is over."""
    while True:
        try:
            async with grpc.aio.insecure_channel(address, OPTIONS) as channel:
                if await converse(channel, cid, fleet):
                    return
        except grpc.RpcError as error:
            if error.code() in REFUSALS:
                sys.exit(f"light_clients.py: the server refuses device {cid}: {error.details()}")
        except asyncio.CancelledError:
            pass
        await asyncio.sleep(PAUSE_SECONDS)


async def converse(channel: grpc.aio.Channel, cid: str, fleet: Fleet) -> bool:
    """Answer what comes over one connection; return whether the run is over."""
    announces = await wants_announcements(channel)
    stream = channel.stream_stream(JOIN)(metadata=[(wire.ANNOUNCE, "1")] if announces else None)

    async def reply(data: bytes) -> None:
        await stream.write(data)
        if announces:
            await channel.unary_unary(ANNOUNCE)(b"")

    mishap = ""
    while (data := await stream.read()) is not grpc.aio.EOF:
        request = wire.decode_request(data)
        del data
        if request.kind == "get_properties":
            await reply(fleet.greeting(cid))
            continue
        if request.kind == "reconnect":
            await reply(wire.encode_done_reply(will_reconnect=False))
            return request.reconnect_seconds == 0
        if request.config.get(wire.MORE):
            continue
        if request.kind == "fit":
            mishap = fleet.mishap(cid, int(request.config.get("server_round", 0)))
        if mishap == "cut off" or (mishap.startswith("cut off") and request.kind != "fit"):
            return False
        if mishap == "silent":
            await stream.read()  # the server hangs up
            return False
        answer, is_words = fleet.answer(request, mishap), request.kind == "fit"
        del request
        await (reply(answer) if is_words else stream.write(answer))
    return False


async def wants_announcements(channel: grpc.aio.Channel) -> bool:
    """Ask the server whether replies are to be announced; a stock Flower server knows none."""
    try:
        return json.loads(await channel.unary_unary(HELLO)(b""))[wire.ANNOUNCE]
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.UNIMPLEMENTED:
            return False
        raise


async def run(address: str, cids: range, fleet: Fleet) -> None:
    await asyncio.gather(*(live(address, str(cid), fleet) for cid in cids))


def main() -> None:
    parser = argparse.ArgumentParser(description="simulate devices that train nothing")
    parser.add_argument("--server_address", required=True, metavar="HOST:PORT")
    parser.add_argument("--clients", type=int, required=True, metavar="N")
    parser.add_argument("--model", default="Net")
    parser.add_argument("--trouble", type=float, default=0.0, metavar="P", help="mishaps a round")
    parser.add_argument("--seed", type=int, default=0, help="of the mishaps")
    args = parser.parse_args()
    fleet = Fleet(args.model, 10, args.trouble, args.seed)
    asyncio.run(run(args.server_address, range(args.clients), fleet))


if __name__ == "__main__":
    main()
