"""A SuperNode of Flower's engine on a board."""

import pytest

from tests.launchers.conftest import ARGUMENTS, KEYS, VOLUME, assert_refused, container

SUPERLINK = ["--superlink=192.168.1.10:8000", "--cid=0"]


def supernode(*mounts: str) -> list[str]:
    """The options of a SuperNode's container: no key of the stream, and no client.py."""
    options = [option for option in container("flower-client-0") if option not in KEYS]
    return [*options, *VOLUME, *mounts, "--entrypoint", "flower-supernode", "--no-healthcheck"]


def test_superlink_runs_a_supernode_in_an_image_of_its_own(device):
    run = device.pi(*SUPERLINK, "--insecure", "--threads", "2", "--device=cpu")
    assert (run.code, run.err) == (0, "")
    client, engine = (call for call in run.of("build") if "--label" in call)
    assert client[1:3] == ["--tag", "flower-embedded-base:cpu"]
    assert engine == [
        "build", "--tag", "flower-embedded-base:engine", "--label", engine[4],
        "--build-arg", "BASE=flower-embedded-base:cpu",
        "--file", f"{device.tree}/base_images/engine/Dockerfile", f"{device.tree}/base_images",
    ]  # fmt: skip
    assert run.client_build == [
        "build", "--quiet", "--tag", "flower-embedded:engine",
        "--build-arg", "BASE_IMAGE_TYPE=engine",
        "--build-arg", "BASE_IMAGE=flower-embedded-base:engine", str(device.tree),
    ]  # fmt: skip
    assert run.command == [
        "run", *supernode(), "--rm", "flower-embedded:engine", "--superlink", "192.168.1.10:8000",
        "--node-config", "cid='0' threads=2 device='cpu' data-dir='/data' download=true",
        "--insecure",
    ]  # fmt: skip


def test_client_builds_nothing_of_the_engine(device):
    run = device.pi(*ARGUMENTS)
    assert not [word for call in run.of("build") for word in call if "engine" in word]


def test_changed_client_base_builds_the_engines_again(device):
    run = device.pi(*SUPERLINK)
    for call in run.of("build"):
        if "--label" in call:
            device.has_image(call[2], call[4].partition("=")[2])
    assert not [call for call in device.pi(*SUPERLINK).of("build") if "--label" in call]
    (device.tree / "base_images/cpu/Dockerfile").write_text("FROM changed\n")
    run = device.pi(*SUPERLINK)
    assert [call[2] for call in run.of("build") if "--label" in call] == [
        "flower-embedded-base:cpu", "flower-embedded-base:engine",
    ]  # fmt: skip


def test_supernode_gets_its_key_its_certificate_and_its_images(device):
    images = device.home / "my images"
    images.mkdir()
    files = {"ca.crt": "root-certificates", "key": "auth-supernode-private-key"}
    for name in files:
        (device.home / name).write_text(name)
        (device.home / name).chmod(0o644)
    flags = [f"--{flag}={name}" for name, flag in files.items()]
    run = device.pi(*SUPERLINK, *flags, "--data_dir", str(images), "--max-retries", "3")
    assert run.err == ""
    mounts = {images: images, device.home / "ca.crt": "/run/supernode/ca.crt",
              device.home / "key": "/run/supernode/key"}  # fmt: skip
    assert run.command == [
        "run",
        *supernode(*[
            word for source, target in mounts.items()
            for word in ("--mount", f'type=bind,"source={source}","target={target}",readonly')
        ]),
        "--rm", "flower-embedded:engine", "--superlink", "192.168.1.10:8000",
        "--node-config", f"cid='0' data-dir='{images}'",
        "--root-certificates", "/run/supernode/ca.crt",
        "--auth-supernode-private-key", "/run/supernode/key",
        "--max-retries", "3",
    ]  # fmt: skip


@pytest.mark.parametrize("board", ["pi3", "zero2w"])
def test_board_with_less_than_1500_mb_runs_no_supernode(device, board):
    run = device.pi(*SUPERLINK, board=board)
    assert_refused(run, "MB of RAM", "a SuperNode takes", "1,500 MB are wanted")
    with_swap = "has 909 MB" if board == "pi3" else "has 416 MB"
    assert with_swap in run.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--superlink", "--cid=0"], "--superlink lacks HOST:PORT"),
        (["--superlink=laptop", "--cid=0"], "server address 'laptop' is not HOST:PORT"),
        (["--superlink=laptop:8000"], "--cid is missing"),
        ([*SUPERLINK, "--server_address=laptop:8080"], "give one of them"),
        ([*SUPERLINK, "--model=PiNet"], "flwr run . --run-config \"model='PiNet'\""),
        ([*SUPERLINK, "--stay"], "--stay is for server.py"),
        ([*SUPERLINK, "--threads=two"], "--threads 'two' is not a whole number above 0"),
        ([*SUPERLINK, "--node-config=a=1"], "--node-config is made of --cid"),
        ([*SUPERLINK, "--root-certificates=ca"], "--root-certificates 'ca' is no file"),
    ],
)
def test_wrong_argument_for_a_supernode_is_named(device, arguments, message):
    assert_refused(device.pi(*arguments), "run_pi.sh: ", message, calls=False)


def test_key_that_the_container_cannot_read_is_named(device):
    (device.home / "key").write_text("key")
    (device.home / "key").chmod(0o600)
    device.shows_owner(0)
    run = device.pi(*SUPERLINK, "--auth-supernode-private-key=key")
    assert_refused(run, "sudo chown 1000 'key'", calls=False)


def test_jetson_has_no_supernode(device):
    assert_refused(device.jetson(*SUPERLINK), "--superlink", "use ./run_pi.sh", calls=False)
