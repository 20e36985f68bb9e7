"""Which images are built, pulled and used, and when."""

import shutil

import pytest

from tests.launchers.conftest import ARGUMENTS, label_of


def test_base_image_is_built_again_when_its_files_have_changed(device):
    label = label_of(device.pi(*ARGUMENTS))
    device.has_image("flower-embedded-base:cpu", label)
    again = device.pi(*ARGUMENTS)
    assert len(again.of("build")) == 1  # the client's, from its cache where nothing changed
    assert again.client_build

    (device.tree / "base_images/README.md").write_text("words\n")
    (device.tree / "base_images/cpu/README.md").write_text("words\n")
    (device.tree / "base_images/gpu/Dockerfile").write_text("FROM other\n")
    assert len(device.pi(*ARGUMENTS).of("build")) == 1

    (device.tree / "base_images/requirements.txt").write_text("grpcio==1.85.2\n")
    second = label_of(device.pi(*ARGUMENTS))
    (device.tree / "base_images/cpu/Dockerfile").write_text("FROM newer\n")
    third = label_of(device.pi(*ARGUMENTS))
    assert len({label, second, third}) == 3


def test_checkout_without_base_images_ends_it(device):
    shutil.rmtree(device.tree / "base_images/cpu")
    run = device.pi(*ARGUMENTS)
    assert run.code != 0
    assert run.of("build") == []
    assert run.of("run") == []


def test_base_image_of_another_origin_is_built_again(device):
    device.has_image("flower-embedded-base:cpu", "")
    assert device.pi(*ARGUMENTS).base_build


def test_base_image_is_pulled_once_where_one_is_named(device):
    name = "registry.example:5000/me/base:cpu"
    run = device.pi(*ARGUMENTS, BASE_IMAGE=name)
    assert run.of("pull") == [["pull", name]]
    assert f"BASE_IMAGE={name}" in run.client_build
    assert len(run.of("build")) == 1
    assert run.command[-4] == "flower-embedded:cpu"
    device.has_image(name)
    assert device.pi(*ARGUMENTS, BASE_IMAGE=name).of("pull") == []


def test_failed_pull_ends_it(device):
    run = device.pi(*ARGUMENTS, BASE_IMAGE="me/base:cpu", PULL_FAILS="1")
    assert run.code == 1
    assert "cannot pull BASE_IMAGE 'me/base:cpu'" in run.err
    assert run.calls[-1] == ["pull", "me/base:cpu"]


@pytest.mark.parametrize("here", [True, False])
def test_ready_image_is_used_and_none_is_built(device, here):
    if here:
        device.has_image("fleet/client:7", "")
    run = device.pi(*ARGUMENTS, "--image=fleet/client:7")
    assert run.code == 0, run.err
    assert not run.of("build")
    assert [call[-1] for call in run.of("pull")] == ([] if here else ["fleet/client:7"])
    assert "fleet/client:7" in run.command
    assert not any(word.startswith("--image") for word in run.command)


def test_ready_image_that_is_nowhere_ends_it(device):
    run = device.pi(*ARGUMENTS, "--image=fleet/client:7", PULL_FAILS="1")
    assert run.code == 1
    assert "no image 'fleet/client:7' here, and it cannot be pulled" in run.err
    assert not run.of("run")


@pytest.mark.parametrize("image", ["flower-embedded-base:cpu", "flower-embedded:cpu"])
def test_failed_build_ends_it_and_no_old_image_runs(device, image):
    device.has_image("flower-embedded-base:cpu", "old")
    run = device.pi(*ARGUMENTS, BUILD_FAILS=f"--tag {image} ", OLD_CONTAINER="running")
    assert run.code == 1
    assert "ERROR: no space left on device" in run.err
    assert f"run_pi.sh: building {image} failed" in run.err
    assert run.of("run") == []
    assert run.of("rm") == []


@pytest.mark.parametrize(
    "version, no_buildx, buildkit",
    [("20.10.24+dfsg1", "1", "1"), ("26.1.5", "1", "0"), ("26.1.5", "", "1"), ("29.0.0", "", "1")],
)
def test_buildkit_is_used_where_docker_has_it(device, version, no_buildx, buildkit):
    run = device.pi(*ARGUMENTS, DOCKER_VERSION=f"arm64 {version} {version}", NO_BUILDX=no_buildx)
    assert run.code == 0
    assert run.buildkit == f"BUILDKIT={buildkit}"
