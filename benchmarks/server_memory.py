"""Peak memory of a server whose devices hold a large model, beside stock Flower.

    python benchmarks/server_memory.py
    python benchmarks/server_memory.py --clients 2 10 50 100 --stock_clients 2 10 50

    ours    server.py, as a person starts it
    stock   flwr.server.start_server with FedAvg, in a process that imports the same

The devices are simulated (benchmarks/light_clients.py): real connections, weights of the
model's size, no training. Both servers test the model on 500 synthetic images after each of
three rounds. The figure is VmHWM: the most that was resident at any moment, Python, PyTorch
and the model included; what the process held before the first device came stands beside it.
"""

import argparse
import re
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run from anywhere

PATIENCE_SECONDS = 1800
IMAGES = "synthetic:2500"  # of which 500 to test on


def main() -> None:
    parser = argparse.ArgumentParser(description="peak memory of the server, ours and stock")
    parser.add_argument("--model", default="ResNet18")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    numbers = parser.add_argument
    numbers("--clients", type=int, nargs="+", default=[2, 10, 50, 100], help="with ours")
    numbers("--stock_clients", type=int, nargs="*", default=[2, 10], help="default: 2 10")
    parser.add_argument("--short", action="store_true", help="Net, 2 clients, 2 rounds")
    parser.add_argument("--stock_server", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stock_server:
        address, model, rounds, clients = args.stock_server
        serve_stock(address, model, int(rounds), int(clients))
        return
    if args.short:
        args.model, args.rounds, args.clients, args.stock_clients = "Net", 2, [2], [2]
    print(f"{args.model}, {args.rounds} rounds: peak of the server in MB (before any device came)")
    for clients in sorted({*args.clients, *args.stock_clients}):
        shown, peaks = "", {}
        for side, chosen in (("ours", args.clients), ("stock", args.stock_clients)):
            if clients in chosen:
                at_first, peaks[side] = measure(side, args.model, args.rounds, clients)
                shown += f"  {side} {peaks[side]:6.0f} ({at_first:.0f})"
        ratio = f"  ratio {peaks['ours'] / peaks['stock']:.2f}" if len(peaks) == 2 else ""
        print(f"{clients:4} clients{shown}{ratio}", flush=True)


def measure(side: str, model: str, rounds: int, clients: int) -> tuple[float, float]:
    """Return the megabytes that a server held before its devices came, and at most."""
    address = f"127.0.0.1:{free_port()}"
    with tempfile.TemporaryDirectory() as run_dir:
        command: list[str | Path] = [sys.executable]
        if side == "ours":
            command += [ROOT / "server.py", f"--server_address={address}", f"--model={model}"]
            command += [f"--rounds={rounds}", f"--data_dir={IMAGES}", f"--run_dir={run_dir}"]
            command += [f"--min_num_clients={clients}", f"--min_sample_size={clients}"]
        else:
            command += [__file__, "--stock_server", address, model, str(rounds), str(clients)]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        devices = None
        try:
            wait_until_listening(address, server)
            at_first = peak = peak_megabytes(server.pid)
            command = [sys.executable, ROOT / "benchmarks/light_clients.py", f"--model={model}"]
            command += [f"--server_address={address}", f"--clients={clients}"]
            devices = subprocess.Popen(command)
            deadline = time.monotonic() + PATIENCE_SECONDS
            while server.poll() is None and time.monotonic() < deadline:
                peak = max(peak, peak_megabytes(server.pid))
                time.sleep(0.05)
            if server.poll() != 0:
                sys.exit(f"server_memory.py: the {side} server ended with {server.poll()}")
        finally:
            for process in (server, devices):
                if process:
                    process.kill()
                    process.wait()
    return at_first, peak


def peak_megabytes(pid: int) -> float:
    """Return VmHWM; 0 for a process that has ended."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) * 1024 / 1e6 if found else 0.0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def wait_until_listening(address: str, server: subprocess.Popen) -> None:
    host, port = address.split(":")
    while server.poll() is None:
        try:
            socket.create_connection((host, int(port))).close()
            return
        except OSError:
            time.sleep(0.1)
    sys.exit(f"server_memory.py: the server ended with {server.poll()} before it listened")


def serve_stock(address: str, model: str, rounds: int, clients: int) -> None:
    """Run FedAvg on Flower's own server, with our model and test set."""
    from flwr.common import ndarrays_to_parameters
    from flwr.server import ServerConfig, start_server
    from flwr.server.strategy import FedAvg

    import utils

    testset = utils.load_data(IMAGES, "test", utils.image_size(model))
    net = utils.build_model(model, len(testset.classes))

    def evaluate(server_round: int, weights: list, config: dict) -> tuple[float, dict]:
        utils.set_weights(net, dict(zip(net.state_dict(), weights, strict=True)))
        return utils.test(net, testset).loss, {}

    start_server(
        server_address=address,
        config=ServerConfig(num_rounds=rounds),
        strategy=FedAvg(
            fraction_evaluate=0.0,
            min_fit_clients=clients,
            min_evaluate_clients=clients,
            min_available_clients=clients,
            evaluate_fn=evaluate,
            initial_parameters=ndarrays_to_parameters(list(utils.get_weights(net).values())),
        ),
    )


if __name__ == "__main__":
    main()
