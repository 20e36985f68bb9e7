"""Devices that keep no promise, many in one process: for tests alone, towards this machine.

    python tests/faults/hostile.py 127.0.0.1:8080 3 stall
    python tests/faults/hostile.py 127.0.0.1:8080 12 whole 88 DIR

Their names are stall-0, stall-1, … and so on.

    stall      offer an update, and send nothing of it
    trickle    send the first chunk of it, and then nothing
    whole      do not announce replies, and send so many MB where an offer is due
    announced  announce replies, and send so many MB where an offer is due
    silent     promise to announce replies, and send so many MB without
    chunk      offer an update, and send so many MB where a chunk is due
    greeting   send so many MB where a greeting is due
    greeted    the same, and announce it
    deaf       join, and read nothing of the model
    stock      send so many MB as a stock client would

At a server with --secure their key files, as `devices admit` makes them, are in a further DIR.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import asyncio
import contextlib
import json

import grpc
import numpy as np

from plumbing.security import keys
from plumbing.stream import wire
from plumbing.stream.device import ANNOUNCE, JOIN

OPTIONS = [
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
]
SILENCE_SECONDS = 300


def greeting(cid: str, behaviour: str) -> bytes:
    if behaviour == "stock":
        return wire.encode_properties_reply({})
    return wire.encode_properties_reply(
        {
            "cid": cid,
            "model": "ResNet18",
            "classes": json.dumps([f"pattern {i}" for i in range(10)]),
            wire.PIECES: True,
            wire.VERSION: wire.PROTOCOL,
        }
    )


def large_reply(megabytes: int) -> bytes:
    return wire.encode_fit_reply([np.zeros(megabytes * 250_000, np.float32)], 10, {})


async def converse(
    channel: grpc.aio.Channel, cid: str, behaviour: str, large: bytes, together: asyncio.Barrier
) -> None:
    announces = behaviour not in ("whole", "greeting", "stock")
    stream = channel.stream_stream(JOIN)(metadata=[(wire.ANNOUNCE, "1")] if announces else None)

    async def reply(data: bytes, announced: bool = announces) -> None:
        if announced:
            await channel.unary_unary(ANNOUNCE)(b"")
        await stream.write(data)

    weights: list[np.ndarray] = []
    served = 0
    while (data := await stream.read()) is not grpc.aio.EOF:
        request = wire.decode_request(data)
        del data
        if request.kind == "get_properties" and behaviour.startswith("greet"):
            await together.wait()
            await reply(large)
        elif request.kind == "get_properties":
            await reply(greeting(cid, behaviour))
            if behaviour == "deaf":
                await asyncio.sleep(SILENCE_SECONDS)
        elif request.kind == "reconnect":
            await reply(wire.encode_done_reply(will_reconnect=False))
            return
        elif request.kind == "fit":
            weights += request.weights
            if request.config.get(wire.MORE):
                continue
            if large and behaviour != "chunk":
                weights.clear()
                await together.wait()
                await reply(large, announces and behaviour != "silent")
                continue
            round_id = str(request.config[wire.ROUND_ID])
            await reply(wire.encode_fit_reply([], 10, {wire.ROUND_ID: round_id}))
        elif behaviour == "chunk":
            await stream.write(large)
        elif behaviour == "trickle" and not served:
            served = 1
            first, config = int(request.config[wire.FIRST]), request.config
            arrays = weights[first : first + int(config[wire.COUNT])]
            skip, take = config.get(wire.SKIP, 0), config.get(wire.TAKE)
            await stream.write(wire.encode_parameters_reply(arrays, skip, take))


def connect(address: str, cid: str, directory: str) -> grpc.aio.Channel:
    if not directory:
        return grpc.aio.insecure_channel(address, OPTIONS)
    key, certificate, authority = keys.read_key_file(Path(directory) / f"device-{cid}.pem")
    credentials = grpc.ssl_channel_credentials(
        keys.certificate_pem(authority), keys.key_pem(key), keys.certificate_pem(certificate)
    )
    return grpc.aio.secure_channel(address, credentials, OPTIONS)


async def live(
    address: str,
    cid: str,
    behaviour: str,
    large: bytes,
    together: asyncio.Barrier,
    directory: str,
) -> None:
    while True:
        with contextlib.suppress(grpc.RpcError, asyncio.CancelledError):
            async with connect(address, cid, directory) as channel:
                await converse(channel, cid, behaviour, large, together)
        await asyncio.sleep(1)


async def main(
    address: str, count: int, behaviour: str, megabytes: str = "0", directory: str = ""
) -> None:
    assert address.startswith("127.0.0.1:")
    large = large_reply(int(megabytes)) if int(megabytes) else b""
    together = asyncio.Barrier(count)
    tasks = [
        live(address, f"{behaviour}-{i}", behaviour, large, together, directory)
        for i in range(count)
    ]
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(asyncio.gather(*tasks), SILENCE_SECONDS)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:]))
