"""Hold many TCP connections to a server and send nothing; open each again when it is closed.

    python tests/faults/flood.py 127.0.0.1:8080 700 60      so many connections, so many seconds

Only towards this machine, and ends by itself.
"""

import contextlib
import select
import socket
import sys
import time

MOST = 100_000  # connections altogether


def flood(address: tuple[str, int], held: int, seconds: float) -> int:
    """Return how many connections were opened."""
    assert address[0] == "127.0.0.1"
    poll = select.poll()
    peers: dict[int, socket.socket] = {}
    opened = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end and opened < MOST:
        while len(peers) < held:
            peer = socket.socket()
            peer.setblocking(False)
            if peer.connect_ex(address) not in (0, 115):  # EINPROGRESS
                peer.close()
                break  # the server is gone
            peers[peer.fileno()] = peer
            poll.register(peer, select.POLLIN)
            opened += 1
        for number, _ in poll.poll(50):
            with contextlib.suppress(OSError):
                if peers[number].recv(1000):
                    continue
            poll.unregister(number)
            peers.pop(number).close()
    return opened


if __name__ == "__main__":
    host, _, port = sys.argv[1].rpartition(":")
    print(flood((host, int(port)), int(sys.argv[2]), float(sys.argv[3])), flush=True)
