"""What tests/docker/run checks: the images, run_pi.sh, and a real server on this machine.

One line a check; the arguments choose parts (images, walkthrough, …). Containers, volumes and
stand-in images carry NAME and are removed after their part; flower-embedded-base:cpu,
flower-embedded:cpu and fridgecam stay, to be built on next time.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from plumbing.security.keys import Token  # noqa: E402
from tests.conftest import Process  # noqa: E402
from tests.mirror import Mirror, tiny_cifar10  # noqa: E402

NAME = f"flower-test-{os.getpid()}"
BASE, CLIENT = "flower-embedded-base:cpu", "flower-embedded:cpu"
LIGHT = "fridgecam"
MAX_IMAGE_BYTES = 1_000_000_000
BUILD_OPTIONS = "--network host"
RUN_OPTIONS = "--network host --health-interval 3s"
os.environ |= {
    "DATA_VOLUME": NAME,
    "KEYS_VOLUME": f"{NAME}-keys",
    "DOCKER_BUILD_OPTIONS": BUILD_OPTIONS,
    "DOCKER_RUN_OPTIONS": RUN_OPTIONS,
}

failures: list[str] = []
processes: list[Process] = []


def check(fact: str, holds: bool, saw: object = "") -> None:
    """Print the line of one check; a failed one does not end the others."""
    print(f"{'ok' if holds else 'FAILED':<8}{fact}{f' ({saw})' if saw != '' else ''}", flush=True)
    if not holds:
        failures.append(fact)


def start(*command: str | Path, cwd: Path | None = None) -> Process:
    processes.append(Process(*command, cwd=cwd))
    return processes[-1]


def run(*command: str | Path, seconds: float = 900) -> tuple[int, str]:
    """Run a command to its end; return the exit code and what it printed."""
    process = start(*command)
    return process.finish(seconds), process.output


def docker(*words: str, seconds: float = 900) -> str:
    code, output = run("docker", *words, seconds=seconds)
    if code:
        raise RuntimeError(f"docker {' '.join(words)} gave {code}:\n{output}")
    return output


def inspect(container: str) -> dict:
    return json.loads(docker("container", "inspect", container))[0]


def wait_until(fact: str, seconds: float, true: Callable[[], object]) -> float:
    """Wait until `true()` holds; return how long it took."""
    began = time.monotonic()
    while not true():
        if time.monotonic() - began > seconds:
            raise AssertionError(f"after {seconds:g} s still not: {fact}")
        time.sleep(0.3)
    return time.monotonic() - began


def run_pi(cid: str, address: str, *arguments: str, tree: Path = ROOT) -> Process:
    common = [f"--server_address={address}", f"--cid={cid}", "--threads=1"]
    return start(tree / "run_pi.sh", *common, *arguments)


def start_server(folder: Path, *arguments: str) -> tuple[Process, str]:
    server = start(
        "env",
        f"PYTHONPATH={folder}",
        sys.executable,
        ROOT / "server.py",
        f"--run_dir={folder / 'run'}",
        *arguments,
    )
    return server, server.wait_for(r"waiting for \d+ devices? at (\S+) ", 120)[1]


def client_process(container: str) -> tuple[int, int]:
    """Return the user and the process number, on this machine, of the client in `container`."""
    for line in docker("top", container, "-eo", "uid,pid,args").splitlines()[1:]:
        uid, pid, args = line.split(maxsplit=2)
        if "client.py" in args and "docker-init" not in args:
            return int(uid), int(pid)
    raise AssertionError(f"no client.py runs in {container}")


def health(container: str) -> str:
    """Return what Docker last heard from the container's health check."""
    state = inspect(container)["State"]["Health"]
    said = state["Log"][-1]["Output"].strip() if state["Log"] else ""
    return f"{state['Status']}: {said}"


# --- The checks -----------------------------------------------------------------------


def images(folder: Path) -> None:
    cid = f"{NAME}-build"
    alone = ["--data_dir=synthetic:40", "--max_wait_seconds=1"]
    cached = docker("images", "--quiet", BASE) != ""
    began = time.monotonic()
    client = run_pi(cid, "127.0.0.1:9", *alone)
    code = client.finish(1800)
    how = "with what Docker had cached" if cached else "from nothing"
    check(
        "run_pi.sh builds both images and runs the client",
        "Net on cpu" in client.output,
        f"{time.monotonic() - began:.0f} s {how}",
    )
    check("run_pi.sh ends as the client does, without server", code == 1, client.lines[-1])
    began = time.monotonic()
    run_pi(cid, "127.0.0.1:9", *alone).finish(600)
    check(
        "a second launch builds nothing",
        time.monotonic() - began < 120,
        f"{time.monotonic() - began:.0f} s",
    )
    size = int(docker("image", "inspect", "--format", "{{.Size}}", CLIENT))
    check(
        "the client's image takes at most 1.0 GB", size <= MAX_IMAGE_BYTES, f"{size / 1e6:.0f} MB"
    )


# Runs SDOT, which came with Armv8.2 (a Pi 5 has it, a Pi 4 does not).
SDOT = """
import ctypes, mmap
code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
code.write(bytes.fromhex("0094804e" "c0035fd6"))  # sdot v0.4s, v0.16b, v0.16b; ret
ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(code)))()
"""

TRAIN = """
import torch, utils
from federated.settings import Settings
torch.set_num_threads(1)
data = utils.load_data("synthetic:4", "train")
for name in utils.MODELS:
    net = utils.build_model(name)
    utils.train(net, utils.TrainLoader(data, 4), Settings(lr=utils.LR, lr_end=0.0))
    assert all(p.isfinite().all() for p in net.parameters())
    print("trained", name)
"""


def processors(folder: Path) -> None:
    def python(core: str, program: str) -> tuple[int, str]:
        # --init: the emulator cannot kill a process number 1, and turns round for ever.
        return run(
            "docker",
            "run",
            "--rm",
            "--init",
            "--name",
            f"{NAME}-{core}",
            "--env",
            f"QEMU_CPU={core}",
            "--entrypoint",
            "python",
            CLIENT,
            "-c",
            program,
        )

    codes = [python(core, SDOT)[0] for core in ("cortex-a76", "cortex-a72", "cortex-a53")]
    check(
        "an instruction that the core lacks is found out",
        codes == [0, 132, 132],
        f"exit codes {codes} on Cortex-A76, A72, A53",
    )
    for core, board in {"cortex-a72": "Pi 4", "cortex-a53": "Pi 3, Zero 2 W"}.items():
        began = time.monotonic()
        code, output = python(core, TRAIN)
        check(
            f"every model trains on {core} ({board})",
            code == 0 and output.count("trained") == 3,
            f"{time.monotonic() - began:.0f} s" if code == 0 else output[-1000:],
        )


def make_images(folder: Path) -> Path:
    """Write pictures of two classes, one rather red and one rather blue."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 10)):
        for channel, name in ((0, "red"), (2, "blue")):
            place = folder / "own images" / split / name
            place.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 128, (32, 32, 3), np.uint8)
                pixels[..., channel] += 100
                Image.fromarray(pixels).save(place / f"{i}.jpg")
    return folder / "own images"


def walkthrough(folder: Path) -> None:
    data = make_images(folder)
    server, address = start_server(
        folder,
        "--server_address=127.0.0.1:0",
        "--rounds=3",
        "--partition=none",
        "--batch_size=8",
        f"--data_dir={data}",
    )
    cids = [f"{NAME}-{letter}" for letter in "ab"]
    clients = [run_pi(cid, address, "--model=Net", f"--data_dir={data}") for cid in cids]
    server.wait_for("round 1/3 ", 600)
    for cid in cids:
        container = f"flower-client-{cid}"
        uid, _ = client_process(container)
        check(f"the process in {container} is not root", uid == 1000, f"uid {uid}")
        mounts = {m["Destination"]: m["RW"] for m in inspect(container)["Mounts"]}
        check(
            "the device's images are mounted read-only, at their own path; else its key alone is",
            mounts == {str(data): False, "/keys": True},
            mounts,
        )
    codes = [process.finish(600) for process in (server, *clients)]
    check("server and clients end with exit code 0", codes == [0, 0, 0], codes)
    rounds = [line for line in server.lines if line.startswith("round ") and "devices 2/2" in line]
    check(
        "three rounds with two devices", len(rounds) == 3, rounds[-1] if rounds else server.output
    )
    machines = [line for line in server.lines if "joined: " in line and "aarch64" in line]
    check(
        "both devices are aarch64", len(machines) == 2, machines[0] if machines else server.output
    )
    model = folder / "run" / "model.safetensors"
    weights = load_file(model) if model.exists() else {}
    check(
        "the run leaves a model",
        len(weights) == 10 and all(np.isfinite(array).all() for array in weights.values()),
        f"{len(weights)} arrays",
    )
    check(
        "the clients' containers are gone", docker("ps", "-aq", "--filter", f"name={cids[0]}") == ""
    )


def secure(folder: Path) -> None:
    """A device joins with a token, trains, is restarted without it, and revoked."""
    secret = folder / "token"

    def join(cid: str, address: str) -> Process:
        command = f'exec "$0" "$@" <"{secret}"'
        common = [f"--server_address={address}", f"--cid={cid}", "--threads=1"]
        flags = ["--data_dir=synthetic:40", "--join=-", "--detach"]
        return start("sh", "-c", command, ROOT / "run_pi.sh", *common, *flags)

    cid = f"{NAME}-nobody"
    secret.write_text(str(Token(bytes(16), 32 * "00")))
    launch = join(cid, "127.0.0.1:9")
    launch.wait_for("no server at 127.0.0.1:9 yet", 300)
    os.killpg(launch.popen.pid, signal.SIGINT)
    code = launch.finish(60)
    left = docker("ps", "--all", "--quiet", "--filter", f"name={cid}")
    check("Ctrl-C while a device joins ends all", code == 130 and left == "", f"exit code {code}")

    keys, cid = folder / "keys", f"{NAME}-s"
    server, address = start_server(
        folder,
        "--server_address=127.0.0.1:0",
        "--secure",
        f"--keys={keys}",
        "--rounds=100000",
        "--min_num_clients=1",
        "--min_sample_size=1",
        "--partition=none",
        "--batch_size=8",
        "--data_dir=synthetic:40",
    )
    token = re.findall("--join=(join1_[A-Za-z0-9_-]+)", server.output)[0]
    secret.write_text(token)
    container = f"flower-client-{cid}"
    began = time.monotonic()
    launch = join(cid, address)
    launch.wait_for(f"admitted by {address} as device {cid}", 600)
    check(
        "run_pi.sh --join=- gets the device a key",
        launch.finish(60) == 0,
        f"{time.monotonic() - began:.0f} s",
    )
    server.wait_for(f"device {cid} joined", 300)
    server.wait_for("round 1/", 300)
    check("the device trains, by TLS", True, f"{time.monotonic() - began:.0f} s")
    found = docker("exec", container, "sh", "-c", "stat -c '%U %a %n' /keys /keys/*").splitlines()
    check(
        "its key is for the client's user alone",
        found == ["client 700 /keys", f"client 600 /keys/device-{cid}.pem"],
        found,
    )
    key = docker("exec", container, "cat", f"/keys/device-{cid}.pem")
    shown = "".join(
        [
            docker("container", "inspect", container),
            docker("image", "inspect", CLIENT),
            docker("history", "--no-trunc", CLIENT),
            docker("logs", container),
            docker("exec", container, "sh", "-c", "cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline"),
            launch.output,
        ]
    )
    secrets = [token, *re.findall("^[A-Za-z0-9+/=]{40,}$", key.partition("CERTIFICATE")[0], re.M)]
    check(
        "neither container, processes, image, log nor launcher show the token or the key",
        len(secrets) >= 3
        and not any("--join" in word for word in inspect(container)["Args"])
        and not any(secret in shown for secret in secrets),
        f"{len(shown):,} characters looked through",
    )

    secret.unlink()
    began = time.monotonic()
    docker("restart", container)
    server.wait_for(f"device {cid} joined", 300)
    check(
        "restarted without the token it joins by its key",
        "was admitted" not in server.output.partition(f"device {cid} joined")[2],
        f"{time.monotonic() - began:.0f} s",
    )

    run(sys.executable, ROOT / "server.py", "devices", "revoke", cid, f"--keys={keys}")

    def told() -> list[str]:
        return [x for x in docker("logs", container).splitlines() if x.startswith("client.py: ")]

    seconds = wait_until("the client says why it ends", 120, told)
    check("revoked, it is cut off and says why", "was revoked" in told()[0], told()[0])
    check("at once", seconds < 60, f"{seconds:.0f} s")


def restart(folder: Path) -> None:
    """Two detached clients, one volume without CIFAR-10, and one process killed in a round."""
    archive, sums = tiny_cifar10()
    with Mirror(archive) as mirror:
        threading.Thread(target=mirror.serve_forever, daemon=True).start()
        # The same client, but its utils.py knows this archive: Python runs such a file at its
        # start. In the container the sources are in /app.
        (folder / "sitecustomize.py").write_text(
            "import sys\n"
            f"sys.path[:0] = ['/app', {str(ROOT)!r}]\n"
            "import utils\n"
            f"utils.CIFAR10_URL = {mirror.url!r}\n"
            f"utils.CIFAR10_MD5.update({sums!r})\n"
        )
        os.environ["DOCKER_RUN_OPTIONS"] = (
            f"{RUN_OPTIONS} --volume {folder}:/test:ro --env PYTHONPATH=/test"
        )
        try:
            _restart(folder, mirror)
        finally:
            os.environ["DOCKER_RUN_OPTIONS"] = RUN_OPTIONS
            mirror.shutdown()


def _restart(folder: Path, mirror: Mirror) -> None:
    with Mirror(b"") as spare:
        address = f"127.0.0.1:{spare.server_port}"  # free, once this is closed
    cids = [f"{NAME}-{letter}" for letter in "cd"]
    containers = [f"flower-client-{cid}" for cid in cids]
    launches = [run_pi(cid, address, "--detach") for cid in cids]
    codes = [launch.finish(300) for launch in launches]
    check(
        "run_pi.sh --detach returns and says how to see the log",
        codes == [0, 0] and f"docker logs --follow {containers[0]}" in launches[0].output,
        codes,
    )
    for container in containers:
        wait_until(f"{container} waits", 300, lambda c=container: "waiting for" in health(c))
        check(
            "the health check tells of a client that waits",
            health(container).startswith("healthy"),
            health(container),
        )
    check(
        "two clients share one download of CIFAR-10",
        mirror.downloads == 1,
        f"{mirror.downloads} download, volume {NAME}",
    )

    data = f"--data_dir={folder / 'data'}"
    main = "import utils; utils.main()"
    run("env", f"PYTHONPATH={folder}", sys.executable, "-c", main, data)
    server, _ = start_server(
        folder,
        f"--server_address={address}",
        "--rounds=3",
        "--partition=none",
        "--batch_size=2",
        "--epochs=100000",
        "--round_seconds=15",
        data,
    )

    def trains() -> bool:
        return "fit" in docker("logs", containers[0])

    server.wait_for(f"device {cids[0]} joined", 300)
    wait_until("round 1 has begun", 300, trains)
    wait_until("the health check knows", 60, lambda: "connected to" in health(containers[0]))
    check(
        "the health check tells of a connected client",
        health(containers[0]).startswith("healthy"),
        health(containers[0]),
    )
    _, pid = client_process(containers[0])
    began = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    server.wait_for(f"device {cids[0]} joined", 300)
    seconds = time.monotonic() - began
    restarts = [inspect(container)["RestartCount"] for container in containers]
    check(
        "a client that is killed in a round comes back by itself, and it alone",
        restarts == [1, 0] and not any("round 2/3" in line for line in server.lines),
        f"joins again {seconds:.0f} s after SIGKILL",
    )
    code = server.finish(600)
    dropped = f"round 1: dropped device {cids[0]}: "
    check("its round ends without it", dropped in server.output, dropped + "…")
    rounds = [line for line in server.lines if line.startswith("round ") and "devices " in line]
    check("and finishes the run", code == 0 and "devices 2/2" in rounds[-1], rounds[-1])


def sick(folder: Path) -> None:
    container = f"{NAME}-sick"
    docker(
        "run",
        "--detach",
        "--init",
        "--name",
        container,
        "--health-interval=1s",
        "--health-start-period=1ms",
        "--entrypoint",
        "sleep",
        CLIENT,
        "600",
    )
    wait_until("unhealthy", 120, lambda: "unhealthy" in health(container))
    check("a container whose client is not there is unhealthy", True, health(container))


def edit(folder: Path) -> None:
    tree = folder / "edited tree"
    tree.mkdir()
    sources = ("client.py", "resnet.py", "torch_trainer.py", "utils.py")
    for name in ("run_pi.sh", "Dockerfile", ".dockerignore", *sources):
        shutil.copy2(ROOT / name, tree)
    for name in ("base_images", "federated", "plumbing"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    utils = tree / "utils.py"
    utils.write_text(
        utils.read_text().replace('"PiNet": PiNet,', '"PiNet": PiNet,\n    "Mine": PiNet,')
    )
    keys = [tree / "device-0.pem", tree / "plumbing" / "device-0.pem", tree / "keys" / "key.pem"]
    for path in keys:
        path.parent.mkdir(exist_ok=True)
        path.write_text("a key")
    cid = f"{NAME}-edit"
    began = time.monotonic()
    client = run_pi(
        cid,
        "127.0.0.1:9",
        "--model=Mine",
        "--data_dir=synthetic:40",
        "--max_wait_seconds=1",
        tree=tree,
    )
    built = wait_until(
        "the container is there", 120, lambda: docker("ps", "-q", "--filter", f"name={cid}")
    )
    client.wait_for("Mine on cpu", 300)
    check(
        "an edit to utils.py is in the next launch's image",
        built < 30,
        f"{built:.1f} s from launch to container, {time.monotonic() - began:.0f} s to the client",
    )
    client.finish(300)
    held = docker("run", "--rm", "--entrypoint", "find", CLIENT, "/app", "/keys", "-type", "f")
    files = sorted(Path(line).name for line in held.splitlines() if line.startswith("/"))
    check(
        "keys beside the sources stay out of the image, which holds Python files alone",
        "client.py" in files and all(name.endswith((".py", ".pyc")) for name in files),
        f"{len(files)} files",
    )


# Stands in for NVIDIA's image: a torch of a version that no index has, another protobuf that
# pip is told to keep, the user that Ubuntu 24.04 has.
NVIDIA = f"""
FROM {BASE}
RUN pip uninstall --yes --requirement /opt/flower/requirements.txt \\
 && rm -r /opt/flower \\
 && pip install --no-deps --no-compile protobuf==4.24.4 typing_extensions==4.12.2 \\
 && cd "$(python -c 'import sysconfig; print(sysconfig.get_path("platlib"))')" \\
 && sed -i "s/^__version__ = .*/__version__ = '2.8.0a0+nv25.6'/; s/^cuda: .*/cuda = '12.9'/" \\
    torch/version.py \\
 && sed -i 's/^Version: .*/Version: 2.8.0a0+nv25.6/' torch-*.dist-info/METADATA \\
 && mkdir -p /etc/pip && echo protobuf==4.24.4 >/etc/pip/constraint.txt \\
 && useradd --uid 1000 ubuntu
ENV PIP_CONSTRAINT=/etc/pip/constraint.txt PYTHONPATH=/opt/theirs
"""
TOO_OLD = f"""
FROM {BASE}
RUN echo 'import sys; sys.version_info = (3, 5, 2, "final", 0)' \\
    >>"$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')/sitecustomize.py"
"""
REPLACED = f"""
FROM {NAME}:gpu
RUN mkdir /opt/flower/packages/torch && touch /opt/flower/packages/torch/__init__.py \\
 && printf '__version__ = "2.9.1"\\ncuda = None\\n' >/opt/flower/packages/torch/version.py \\
 && python3 /opt/flower/keep_torch.py verify
"""

ASK = """
import json, grpc, google.protobuf as protobuf, torch
print(json.dumps([torch.__version__, torch.version.cuda, grpc.__file__, protobuf.__version__]))
"""


def gpu(folder: Path) -> None:
    # The builder from before BuildKit, which is all that some boards have.
    def build(tag: str, *words: str | Path) -> tuple[int, str]:
        return run(
            "env",
            "DOCKER_BUILDKIT=0",
            "docker",
            "build",
            "--force-rm",
            *BUILD_OPTIONS.split(),
            "--tag",
            f"{NAME}:{tag}",
            *words,
        )

    def build_from(tag: str, dockerfile: str) -> tuple[int, str]:
        place = folder / tag
        place.mkdir()
        (place / "Dockerfile").write_text(dockerfile)
        return build(tag, place)

    def build_gpu(tag: str, base: str) -> tuple[int, str]:
        file = ROOT / "base_images" / "gpu" / "Dockerfile"
        return build(
            tag, "--file", file, "--build-arg", f"BASE={NAME}:{base}", ROOT / "base_images"
        )

    code, output = build_from("nvidia", NVIDIA)
    check("a stand-in for NVIDIA's image is made", code == 0, "" if code == 0 else output[-2000:])
    began = time.monotonic()
    code, output = build_gpu("gpu", "nvidia")
    check(
        "the GPU base builds on it, and says that torch is kept",
        code == 0 and "torch is kept, and loads" in output,
        f"{time.monotonic() - began:.0f} s" if code == 0 else output[-2000:],
    )
    found = json.loads(
        docker("run", "--rm", "--init", f"{NAME}:gpu", "python", "-c", ASK).splitlines()[-1]
    )
    check(
        "torch is the base image's, gRPC and protobuf are ours",
        found == ["2.8.0a0+nv25.6", "12.9", "/opt/flower/packages/grpc/__init__.py", "6.33.6"],
        found,
    )
    code, output = run(
        "docker",
        "run",
        "--rm",
        "--init",
        "--network",
        "host",
        f"{NAME}:gpu",
        "pip",
        "install",
        "torch==2.9.1",
        "--no-deps",
        "--dry-run",
    )
    check(
        "pip refuses to put another torch into it",
        code != 0 and "conflict" in output.lower(),
        output.splitlines()[-1],
    )
    code, output = build_from("replaced", REPLACED)
    check("a torch that was replaced fails the build", code != 0 and "torch was replaced" in output)
    code, output = build_from("old", TOO_OLD)
    code, output = build_gpu("never", "old")
    said = re.findall("this base image has Python 3.5, .*", output)
    check("a base image with Python 3.5 fails the build", code != 0 and len(said) == 1, *said[:1])
    code, output = build("client", "--build-arg", f"BASE_IMAGE={NAME}:gpu", ROOT)
    check(
        "the client's image builds on the GPU base", code == 0, "" if code == 0 else output[-2000:]
    )
    said = docker("run", "--rm", "--init", "--entrypoint", "id", f"{NAME}:client")
    check(
        "where Ubuntu has a user 1000, too, the client may use the GPU's devices",
        "uid=1000" in said and "(video)" in said,
        said,
    )
    code, output = run(
        "docker",
        "run",
        "--rm",
        "--init",
        f"{NAME}:client",
        "--cid=0",
        "--server_address=127.0.0.1:9",
        "--data_dir=synthetic:40",
        "--max_wait_seconds=1",
    )
    check("the client runs in it", "Net on cpu" in output, output.splitlines()[-1])


def engine(folder: Path) -> None:
    """A SuperNode of Flower's engine trains on 64 images, by TLS and with a registered key."""
    began = time.monotonic()
    keys, cid = folder / "keys", f"{NAME}-n"
    run("env", "-C", folder, ROOT / "deploy/keys.sh", "127.0.0.1", "board")
    for path in (keys, *keys.iterdir()):
        os.chown(path, 1000, 1000)
    with Mirror(b"") as spare:
        port = spare.server_port  # free, once this is closed
    flower = [
        "env", f"FLWR_HOME={folder / 'home'}", "FLWR_TELEMETRY_ENABLED=0",
        "FLWR_DISABLE_UPDATE_CHECK=1", f"PATH={Path(sys.executable).parent}:{os.environ['PATH']}",
    ]  # fmt: skip
    (folder / "home").mkdir()
    (folder / "home" / "config.toml").write_text(
        f'[superlink.test]\naddress = "127.0.0.1:{port}"\nroot-certificates = "{keys}/ca.crt"\n'
    )
    superlink = start(
        *flower, "flower-superlink", f"--port={port}", f"--database={folder / 'state.db'}",
        f"--ssl-ca-certfile={keys}/ca.crt", f"--ssl-certfile={keys}/server.crt",
        f"--ssl-keyfile={keys}/server.key", "--enable-supernode-auth",
        "--disable-runtime-dependency-installation",
    )  # fmt: skip
    wait_until(
        "the SuperLink knows the board's key", 120,
        lambda: run(*flower, "flwr", "supernode", "register", keys / "board.pub", "test")[0] == 0,
    )  # fmt: skip
    os.environ["DOCKER_RUN_OPTIONS"] = "--network host"  # a SuperNode has no health check
    try:
        launch = start(
            ROOT / "run_pi.sh", f"--superlink=127.0.0.1:{port}", f"--cid={cid}", "--threads=1",
            "--data_dir=synthetic:64", f"--root-certificates={keys}/ca.crt",
            f"--auth-supernode-private-key={keys}/board",
        )  # fmt: skip
        launch.wait_for("SuperNode ID", 1800)
    finally:
        os.environ["DOCKER_RUN_OPTIONS"] = RUN_OPTIONS
    check("a registered SuperNode joins by TLS", True, f"{time.monotonic() - began:.0f} s")
    uid = docker("top", f"flower-client-{cid}", "-eo", "uid,pid").splitlines()[-1].split()[0]
    check("it is not root", uid == "1000", f"uid {uid}")
    began, run_dir = time.monotonic(), folder / "run"
    code, output = run(
        *flower, "flwr", "run", ROOT, "test", "--stream", "--run-config",
        "rounds=1 min_num_clients=1 batch_size=16 partition='none' data_dir='synthetic:64' "
        f"run_dir='{run_dir}'",
        seconds=1200,
    )  # fmt: skip
    rows = (run_dir / "metrics.jsonl").read_text() if run_dir.exists() else output
    check(
        "one training message on 64 images gives a model",
        code == 0 and (run_dir / "model.safetensors").exists() and '"num_examples": 64,' in rows,
        f"{time.monotonic() - began:.0f} s" if "num_examples" in rows else output[-2000:],
    )
    events = (run_dir / "events.jsonl").read_text()
    check("trained by the board", '"machine": "aarch64"' in events)
    sizes = docker("image", "inspect", "--format", "{{.Size}}", CLIENT, "flower-embedded:engine")
    client, more = (int(size) for size in sizes.split())
    check(
        "the engine adds at most 120 MB", more - client <= 120e6, f"{(more - client) / 1e6:.0f} MB"
    )
    check("the SuperLink runs on", superlink.popen.poll() is None)


# Two cores of a Pi Zero 2 W. QEMU shows programs the /proc/cpuinfo of the x86 machine around it,
# of which ONNX Runtime cannot make sense: it crashes.
CPUINFO = "".join(
    f"processor\t: {i}\nFeatures\t: fp asimd evtstrm crc32 cpuid\nCPU implementer\t: 0x41\n"
    "CPU architecture: 8\nCPU variant\t: 0x0\nCPU part\t: 0xd03\nCPU revision\t: 4\n\n"
    for i in range(2)
)
LOOK = """
import resource, sys, time
began = time.monotonic()
from fridgecam.__main__ import main
main()
used = resource.getrusage(resource.RUSAGE_SELF)
wall, busy = time.monotonic() - began, used.ru_utime + used.ru_stime
print(f"{wall:.1f} {busy:.1f} {used.ru_maxrss} {'torch' in sys.modules}")
"""


def build_light() -> None:
    began = time.monotonic()
    file = ROOT / "base_images" / "light" / "Dockerfile"
    build = ["docker", "build", *BUILD_OPTIONS.split(), "--file", file, "--tag", LIGHT, ROOT]
    code, output = run(*build, seconds=1800)
    seconds = f"{time.monotonic() - began:.0f} s"
    check("the light image builds", code == 0, seconds if code == 0 else output[-2000:])
    size = int(docker("image", "inspect", "--format", "{{.Size}}", LIGHT))
    check("it takes at most 350 MB", size <= 350e6, f"{size / 1e6:.0f} MB")
    found = docker("run", "--rm", "--entrypoint", "pip", LIGHT, "list")
    check("there is no torch in it", not re.search(r"(?im)^(torch|flwr)\b", found))


def fridges(folder: Path) -> None:
    """Ten fridges at a --secure server, two of them in arm64 containers with the light image.

    c is killed in a round, d's owner switches sharing off in it; the others train on.
    """
    build_light()
    data = make_images(folder)
    server, address = start_server(
        folder, "--server_address=127.0.0.1:0", "--secure", f"--keys={folder / 'keys'}",
        "--model=fridgecam.model:EffLite0Small", f"--data_dir={data}", "--rounds=3", "--lr=0.1",
        "--partition=none", "--min_num_clients=8",
    )  # fmt: skip
    token = re.findall("--join=(join1_[A-Za-z0-9_-]+)", server.output)[0]
    cpuinfo = folder / "cpuinfo"
    cpuinfo.write_text(CPUINFO)
    emulated = [] if os.uname().machine == "aarch64" else ["-v", f"{cpuinfo}:/proc/cpuinfo:ro"]

    def fridge(cid: str, *words: str, entrypoint: Sequence[str] = ()) -> list[str | Path]:
        home = folder / cid
        if cid not in "ab":
            own = ["env", f"PYTHONPATH={ROOT}", sys.executable, "-m", "fridgecam", words[0]]
            return [*own, f"--home={home}", *words[1:]]
        return [
            "docker", "run", "--rm", "--init", "--network=host", f"--name={NAME}-{cid}",
            "--env=QEMU_CPU=cortex-a53", "--volume", f"{home}:/fridge", *emulated,
            *entrypoint[:1], LIGHT, *entrypoint[1:], *words,
        ]  # fmt: skip

    def train(cid: str) -> Process:
        for colour in ("red", "blue")["ab".find(cid) == 1 :]:
            target = folder / cid / "photos" / colour
            target.mkdir(parents=True)
            for i in range(3):  # the emulator takes seconds for each
                shutil.copy(data / "train" / colour / f"{i}.jpg", target)
        (folder / cid / "inbox").mkdir()
        shutil.copy(data / "test" / "red" / "0.jpg", folder / cid / "inbox")
        for path in (folder / cid, *(folder / cid).rglob("*")):
            os.chown(path, *((1000, 1000) if cid in "ab" else (-1, -1)))  # the image's user
        install = [f"--server_address={address}", f"--cid={cid}", f"--join={token}"]
        code, output = run(*fridge(cid, "install", *install))
        if code or run(*fridge(cid, "share", "on"))[0]:
            check(f"fridge {cid} joins and has a model", False, output)
        return start(*fridge(cid, "train"))

    trains = {}
    for cid in "cd":
        trains[cid] = train(cid)
        server.wait_for(f"device {cid} joined", 120)
        os.kill(trains[cid].popen.pid, signal.SIGSTOP)
    trains |= {cid: train(cid) for cid in "efghijab"}
    for cid in "ab":  # round 1 waits for c and d
        trains[cid].wait_for("connected to", 600)
    trains["c"].signal(signal.SIGKILL)
    run(*fridge("d", "share", "off"))
    trains["d"].signal(signal.SIGCONT)
    code = server.finish(900)
    codes = {cid: process.finish(120) for cid, process in trains.items()}
    wanted = {cid: -signal.SIGKILL if cid == "c" else 0 for cid in trains}
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").open()]
    found = [{d["name"].removeprefix("device ") for d in row["devices"]} for row in rows]
    check(
        "ten fridges: a killed one and one that opted out do not count, eight train on",
        (code, codes, found) == (0, wanted, [{*"efghij"}, {*"efghijab"}, {*"efghijab"}]),
        (code, codes, found),
    )
    said = trains["d"].lines[-1]
    check("who opts out in a round ends at once", said.startswith("sharing is off"), said)
    machines = [line for line in server.lines if "joined: " in line and "aarch64" in line]
    check("two are aarch64", len(machines) == 2 or not emulated, machines)
    peaks = {d["name"]: d["metrics"]["peak_ram_mb"] for row in rows for d in row["devices"]}
    native = {name: peak for name, peak in peaks.items() if not emulated or name[-1] not in "ab"}
    check("training takes at most 160 MB, without the emulator", max(native.values()) <= 160, peaks)
    look = fridge("a", "look", "/fridge/inbox", entrypoint=["--entrypoint=python", "-c", LOOK])
    code, output = run(*look)
    wall, busy, peak, torch = output.split()[-4:]
    check(
        "look names a photograph without torch",
        code == 0 and "0.jpg: " in output and torch == "False",
        f"{wall} s, of the processor {busy} s, {int(peak) / 1000:.0f} MB",
    )


# --- Around them ----------------------------------------------------------------------


def clean_up() -> None:
    """End what a part started, and remove what it left."""
    handlers = {
        number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)
    }
    for process in processes:
        if process.popen.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.popen.pid, signal.SIGKILL)
            process.popen.wait()
    processes.clear()

    def found(*words: str) -> list[str]:
        lines = subprocess.run(["docker", *words], capture_output=True, text=True).stdout.split()
        return list(dict.fromkeys(lines))

    def remove(kind: str, names: list[str]) -> None:
        if names:
            subprocess.run(["docker", kind, "rm", "--force", *names], capture_output=True)

    remove("container", found("ps", "--all", "--quiet", "--filter", f"name={NAME}"))
    remove("volume", found("volume", "ls", "--quiet", "--filter", f"name={NAME}"))
    images = found("images", "--quiet", "--no-trunc", NAME)  # the newest first
    # A build that failed leaves its steps, without a name, on top of a stand-in.
    nameless = found("images", "--quiet", "--no-trunc", "--filter", "dangling=true")
    remove("image", [i for i in nameless if {*images} & {*found("history", "-q", "--no-trunc", i)}])
    remove("image", images)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    began = time.monotonic()
    chosen = sys.argv[1:]
    parts = (images, processors, walkthrough, secure, restart, sick, edit, gpu, engine, fridges)
    for part in parts:
        if chosen and part.__name__ not in chosen:
            continue
        part_began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix=NAME) as folder:
            Path(folder).chmod(0o755)  # the client in its container is another user
            try:
                part(Path(folder))
            except Exception:
                check(f"{part.__name__} runs to its end", False, traceback.format_exc())
            finally:
                clean_up()
        print(f"        {part.__name__}: {time.monotonic() - part_began:.0f} s", flush=True)
    if failures:
        sys.exit(f"{len(failures)} checks failed")
    print(f"all passed in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
