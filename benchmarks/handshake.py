"""Processor time of a TLS 1.3 handshake like a device's: P-256 keys and certificates on both ends.

    python benchmarks/handshake.py --make keys      # writes keys for it, and measures
    python benchmarks/handshake.py keys             # measures; needs Python's own modules alone

The second form runs in a container for another processor: with QEMU as a Raspberry Pi 3

    docker run --rm -e QEMU_CPU=cortex-a53 -v "$PWD:/kit:ro" -w /kit python:3.11-slim-bookworm \\
        python benchmarks/handshake.py keys

`openssl speed ecdsap256` there and on a real board gives the ratio of the two.
"""

import argparse
import platform
import ssl
import statistics
import sys
import time
from pathlib import Path

ENDS = ("client", "server")


def make(folder: Path) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from plumbing.security import keys

    authority = keys.Authority(folder / "authority")
    (folder / "authority.pem").write_bytes(authority.pem)
    key, certificate = authority.sign_server(["localhost"])
    (folder / "server.pem").write_bytes(key + certificate + authority.pem)
    device = keys.new_key()
    certificate = authority.sign_device("0", device.public_key())
    (folder / "client.pem").write_bytes(keys.key_pem(device) + certificate + authority.pem)


def context(folder: Path, end: str) -> ssl.SSLContext:
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT if end == "client" else ssl.PROTOCOL_TLS_SERVER)
    made.check_hostname, made.verify_mode = False, ssl.CERT_REQUIRED
    made.minimum_version = ssl.TLSVersion.TLSv1_3
    made.load_cert_chain(folder / f"{end}.pem")
    made.load_verify_locations(folder / "authority.pem")
    return made


def handshake(contexts: dict[str, ssl.SSLContext]) -> dict[str, float]:
    """Shake hands in memory; return the milliseconds that each end took."""
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    waiting = {
        "client": contexts["client"].wrap_bio(to_client, to_server),
        "server": contexts["server"].wrap_bio(to_server, to_client, server_side=True),
    }
    taken = dict.fromkeys(ENDS, 0.0)
    while waiting:
        for end in [*waiting]:
            start = time.process_time()
            try:
                waiting[end].do_handshake()
                del waiting[end]
            except ssl.SSLWantReadError:
                pass
            taken[end] += 1000 * (time.process_time() - start)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of the keys")
    parser.add_argument("--make", action="store_true", help="make them")
    parser.add_argument("--handshakes", type=int, default=100)
    args = parser.parse_args()
    if args.make:
        make(args.folder)
    contexts = {end: context(args.folder, end) for end in ENDS}
    runs = [handshake(contexts) for _ in range(args.handshakes + 3)][3:]
    print(f"{platform.machine()}, {ssl.OPENSSL_VERSION}, {len(runs)} handshakes")
    for end in ENDS:
        tenths = statistics.quantiles([run[end] for run in runs], n=10)
        print(
            f"{end}: median {tenths[4]:.2f} ms, 10 to 90 %: {tenths[0]:.2f} to {tenths[8]:.2f} ms"
        )


if __name__ == "__main__":
    main()
