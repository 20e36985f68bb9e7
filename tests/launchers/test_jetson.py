"""run_jetson.sh: the image of each release, the GPU, and boards that have none."""

import json
import shutil

import pytest

from tests.launchers.conftest import (
    ARGUMENTS,
    BOARDS,
    IGPU,
    L4T,
    L4T_OLD,
    SBSA,
    VOLUME,
    assert_refused,
    container,
    label_of,
)


def jetson_container(shm: str, model: str) -> list[str]:
    plain = container(model=model)
    place = plain.index("--env")
    return [
        *plain[:place], "--runtime", "nvidia", "--shm-size", shm,
        "--group-add", "44", "--group-add", "104", *plain[place:],
    ]  # fmt: skip


@pytest.mark.parametrize(
    "board, nvidia_image, shm, model",
    [
        (
            "jetson-r36.4",
            IGPU,
            "1905m",
            "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
        ),
        ("jetson-r32.7", L4T_OLD, "989m", "NVIDIA Jetson Nano Developer Kit"),
        ("jetson-r35.4", L4T, "1692m", "NVIDIA Jetson Xavier NX Developer Kit"),
        ("jetson-r38.2", SBSA, "8192m", "NVIDIA Jetson AGX Thor Developer Kit"),
        ("jetson-r39.2", SBSA, "8192m", "NVIDIA Jetson AGX Orin Developer Kit"),
    ],
)
def test_jetson_gets_the_image_of_its_release(device, board, nvidia_image, shm, model):
    run = device.jetson(*ARGUMENTS, board=board)
    assert run.code == 0
    assert run.err == ""
    label = run.base_build[4]
    assert run.base_build == [
        "build", "--tag", "flower-embedded-base:gpu", "--label", label,
        "--build-arg", f"BASE={nvidia_image}",
        "--file", f"{device.tree}/base_images/gpu/Dockerfile", f"{device.tree}/base_images",
    ]  # fmt: skip
    assert run.client_build == [
        "build", "--quiet", "--tag", "flower-embedded:gpu",
        "--build-arg", "BASE_IMAGE_TYPE=gpu",
        "--build-arg", "BASE_IMAGE=flower-embedded-base:gpu", str(device.tree),
    ]  # fmt: skip
    assert run.command == [
        "run", *jetson_container(shm, model), *VOLUME, "--rm", "flower-embedded:gpu", *ARGUMENTS,
    ]  # fmt: skip
    assert run.trial == [
        "run", "--rm", "--runtime", "nvidia", "--shm-size", shm, "--group-add", "44",
        "--group-add", "104", "--entrypoint", "python3", "flower-embedded:gpu",
        "-c", "import torch",
    ]  # fmt: skip
    assert f"building flower-embedded-base:gpu on {nvidia_image}, once" in run.out


def test_detached_jetson_comes_back(device):
    run = device.jetson(*ARGUMENTS, "--device=cuda", "--detach")
    assert run.command[-8:] == [
        "--detach", "--restart", "unless-stopped",
        "flower-embedded:gpu", *ARGUMENTS, "--device=cuda",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "board, model, parts",
    [
        ("jetson-r32.5", "NVIDIA Jetson Nano Developer Kit", ["R32.5", "JetPack 4.6"]),
        ("jetson-r36.3", "NVIDIA Jetson AGX Orin Developer Kit", ["R36.3", "JetPack 6.1 or later"]),
    ],
)
def test_older_jetpack_gives_the_reason_and_runs_the_cpu_image(device, board, model, parts):
    run = device.jetson("--detach", *ARGUMENTS, board=board)
    assert run.code == 0
    for part in [*parts, "training on the CPU"]:
        assert part in run.err
    assert run.err.count("\n") == 1
    assert run.command == [
        "run", *container(model=model), *VOLUME, "--detach", "--restart", "unless-stopped",
        "flower-embedded:cpu", *ARGUMENTS,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "problem, advice",
    [
        ("OSError: libcurand.so.10: cannot open shared object file", ""),
        ("docker: Error response from daemon: nvidia-container-cli: no driver", "\n\nRun 'docker'"),
    ],
)
def test_torch_that_does_not_load_gives_the_reason_and_runs_the_cpu_image(device, problem, advice):
    run = device.jetson(*ARGUMENTS, board="jetson-r32.7", TORCH_PROBLEM=problem + advice)
    assert run.code == 0
    assert run.err == (
        f"run_jetson.sh: PyTorch does not load in NVIDIA's image ({problem}); training on the CPU\n"
    )
    assert run.command[-4:] == ["flower-embedded:cpu", *ARGUMENTS]
    assert "--runtime" not in run.command


def test_cuda_demanded_where_torch_does_not_load_is_refused(device):
    run = device.jetson(*ARGUMENTS, "--device=cuda", TORCH_PROBLEM="OSError: no libcurand")
    assert run.code == 1
    assert "--device cuda: PyTorch does not load in NVIDIA's image (OSError: no" in run.err
    assert run.calls[-1] == run.trial


@pytest.mark.parametrize("board", ["jetson-r32.5", "jetson-r36.3"])
def test_cuda_demanded_of_an_older_jetpack_is_refused_at_once(device, board):
    run = device.jetson(*ARGUMENTS, "--device", "cuda", board=board)
    assert_refused(run, "run_jetson.sh: --device cuda: L4T R3", calls=False)


@pytest.mark.parametrize(
    "version, image",
    [
        ("36.4.3-20250107174145", "gpu"),
        ("36.5.0-20260115194252", "gpu"),
        ("38.4.0-20251230160601", "gpu"),
        ("36.2.0-20231218214829", "cpu"),
        ("35.6.0-20240825164610", "gpu"),
        ("32.7.6-20241104234540", "gpu"),
        ("32.5.2-20210709090126", "cpu"),
    ],
)
def test_package_gives_the_release_where_the_file_is_missing(device, version, image):
    run = device.jetson(*ARGUMENTS, board="pi4", L4T_PACKAGE=version)
    assert f"flower-embedded:{image}" in run.command


def test_file_counts_before_the_package(device):
    run = device.jetson(*ARGUMENTS, board="jetson-r36.3", L4T_PACKAGE="36.4.3-20250107174145")
    assert "R36.3" in run.err


def test_unreadable_release_file_leaves_it_to_the_package(device, tmp_path):
    board = tmp_path / "odd"
    shutil.copytree(BOARDS / "jetson-r36.4", board)
    (board / "etc/nv_tegra_release").write_text("torn\n")
    run = device.jetson(*ARGUMENTS, BOARD_ROOT=str(board), L4T_PACKAGE="38.2.0-20250821174705")
    assert f"BASE={SBSA}" in run.base_build


@pytest.mark.parametrize("env", [{}, {"MACHINE": "x86_64"}])
def test_board_that_is_no_jetson_is_sent_to_run_pi(device, env):
    run = device.jetson(*ARGUMENTS, board="pi4", **env)
    assert_refused(run, "run_jetson.sh: this is no Jetson", "./run_pi.sh", calls=False)


def test_missing_nvidia_runtime_is_reported_with_the_commands_that_add_it(device):
    run = device.jetson(
        *ARGUMENTS, DOCKER_RUNTIMES=json.dumps({"runc": {"path": "/opt/nvidia/runc"}})
    )
    assert_refused(run, "NVIDIA's runtime", "nvidia-ctk runtime configure --runtime=docker")


def test_jetson_needs_25_gb_for_its_image(device):
    assert_refused(device.jetson(*ARGUMENTS, FREE_MB="24999"), "24999 MB are free", "25000 MB")


def test_gpu_base_image_follows_its_own_files(device):
    old = label_of(device.jetson(*ARGUMENTS))
    device.has_image("flower-embedded-base:gpu", old)
    (device.tree / "base_images/cpu/Dockerfile").write_text("FROM newer\n")
    assert len(device.jetson(*ARGUMENTS).of("build")) == 1
    (device.tree / "base_images/gpu/Dockerfile").write_text("FROM newer\n")
    assert label_of(device.jetson(*ARGUMENTS)) != old


def test_upgraded_jetpack_gets_a_new_base_image(device):
    old = label_of(device.jetson(*ARGUMENTS, board="jetson-r36.4"))
    device.has_image("flower-embedded-base:gpu", old)
    assert len(device.jetson(*ARGUMENTS, board="jetson-r36.4").of("build")) == 1
    assert label_of(device.jetson(*ARGUMENTS, board="jetson-r39.2")) != old


def test_jetson_without_the_groups_gets_none(device):
    (device.bin / "getent").write_text("#!/usr/bin/env bash\nexit 2\n")
    assert "--group-add" not in device.jetson(*ARGUMENTS).command


def test_self_test_needs_no_server_and_no_name(device):
    run = device.jetson("--self_test", "--device=cuda")
    assert run.code == 0
    assert run.err == ""
    assert run.command[-3:] == ["flower-embedded:gpu", "--self_test", "--device=cuda"]
