"""Images from folders, CIFAR-10 fetched from a local server, the synthetic set."""

import hashlib
import json
import pickle
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import utils
from federated.errors import FederationError
from federated.settings import Settings
from tests.mirror import ARCHIVE, Mirror, tiny_cifar10
from utils import CIFAR10_FOLDER, CIFAR10_MD5, DownloadError, load_data

RED, BLUE = (255, 0, 0), (0, 0, 255)


def save(path, size=(8, 8), colour=RED, mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path, **options)


@pytest.fixture
def folders(tmp_path):
    """Red cats and blue dogs: two of each to train on, one of each to test on."""
    for split, count in (("train", 2), ("test", 1)):
        for i in range(count):
            save(tmp_path / split / "cat" / f"{i}.png", colour=RED)
            save(tmp_path / split / "dog" / f"{i}.png", colour=BLUE)
    return tmp_path


def run_main(monkeypatch, data_dir):
    """Run `python utils.py --data_dir DATA_DIR` in this process; return its exit code."""
    monkeypatch.setattr(sys, "argv", ["utils.py", "--data_dir", str(data_dir)])
    try:
        utils.main()
    except SystemExit as error:
        return error.code
    return 0


def mean_colour(data, i=0):
    return data.images[i].float().mean((1, 2)).tolist()


# --- Image folders --------------------------------------------------------------------


def test_folders_become_labelled_images(folders):
    data = load_data(folders, "train")
    assert data.images.shape == (4, 3, 32, 32) and data.images.dtype == torch.uint8
    assert data.labels.tolist() == [0, 0, 1, 1] and data.labels.dtype == torch.int64
    assert data.classes == ["cat", "dog"]
    assert data.source == f"images in {folders}"
    assert mean_colour(data, 0) == [255, 0, 0] and mean_colour(data, 3) == [0, 0, 255]
    assert len(load_data(str(folders), "test")) == 2


def test_images_get_the_size_that_the_model_wants(folders):
    save(folders / "train" / "dog" / "wide.png", size=(300, 20), colour=BLUE)
    assert load_data(folders, "train", image_size=64).images.shape == (5, 3, 64, 64)


@pytest.mark.parametrize(
    ("mode", "name", "expected"),
    [
        ("1", "a.png", (76, 76, 76)),  # black and white, dithered
        ("L", "a.png", (76, 76, 76)),
        ("LA", "a.png", (76, 76, 76)),
        ("P", "a.gif", (255, 0, 0)),
        ("RGBA", "a.png", (255, 0, 0)),
        ("CMYK", "a.tiff", (255, 0, 0)),
        ("YCbCr", "a.jpg", (254, 0, 0)),
    ],
)
def test_every_colour_mode_becomes_rgb(folders, mode, name, expected):
    save(folders / "train" / "ant" / name, size=(40, 30), mode=mode)
    save(folders / "test" / "ant" / "a.png")
    assert mean_colour(load_data(folders, "train")) == pytest.approx(expected, abs=4)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_16_bit_grey_keeps_its_brightness(folders, name):
    (folders / "train" / "ant").mkdir()
    (folders / "test" / "ant").mkdir()
    grey = Image.fromarray(np.full((40, 40), 25_700, np.uint16))
    grey.save(folders / "train" / "ant" / name)
    assert mean_colour(load_data(folders, "train")) == pytest.approx([100] * 3, abs=1)


def test_palette_with_transparency_is_read_without_a_warning(folders, recwarn):
    save(folders / "train" / "cat" / "0.png", mode="P", transparency=bytes(range(256)))
    assert len(load_data(folders, "train")) == 4
    assert not recwarn.list


def test_photo_keeps_its_content_when_it_shrinks(folders):
    photo = Image.new("RGB", (1600, 1200), RED)
    photo.paste(BLUE, (800, 0, 1600, 1200))
    photo.save(folders / "train" / "cat" / "0.jpg", quality=95)
    image = load_data(folders, "train").images[0].float()
    assert image[:, :, :14].mean((1, 2)).tolist() == pytest.approx(RED, abs=4)
    assert image[:, :, 18:].mean((1, 2)).tolist() == pytest.approx(BLUE, abs=4)


def test_photo_taken_sideways_stands_upright(folders):
    photo = Image.new("RGB", (400, 300), RED)
    photo.paste(BLUE, (200, 0, 400, 300))
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation: turn clockwise to view
    photo.save(folders / "train" / "cat" / "0.jpg", quality=95, exif=exif)
    image = load_data(folders, "train").images[0].float()
    assert image[:, :14].mean((1, 2)).tolist() == pytest.approx(RED, abs=4)
    assert image[:, 18:].mean((1, 2)).tolist() == pytest.approx(BLUE, abs=4)


def test_broken_image_is_named_and_skipped(folders, capsys):
    bad = folders / "train" / "cat" / "00.png"
    bad.write_bytes(b"not a picture")
    whole = (folders / "train" / "cat" / "0.png").read_bytes()
    (folders / "train" / "cat" / "1.png").write_bytes(whole[: len(whole) // 2])
    data = load_data(folders, "train")
    assert data.labels.tolist() == [0, 1, 1]
    assert [mean_colour(data, i)[0] for i in range(3)] == [255, 0, 0]
    lines = capsys.readouterr().err.splitlines()
    assert f"broken image skipped: {bad}: not an image that Pillow can read" in lines
    assert lines[-1] == "2 of 5 images are broken and skipped"
    assert len(lines) == 3


def test_only_the_first_ten_broken_images_are_named(folders, capsys):
    for i in range(25):
        (folders / "train" / "cat" / f"bad{i:02}.jpg").touch()
    assert len(load_data(folders, "train")) == 4
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1].split("/")[-1] for line in lines[:-1]] == [
        f"bad{i:02}.jpg" for i in range(10)
    ]
    assert lines[-1] == "25 of 29 images are broken and skipped"


def test_all_images_broken_is_an_error(folders):
    for path in (folders / "train").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(FederationError, match=r"all 4 images in '.*train' are broken"):
        load_data(folders, "train")


def test_other_files_and_hidden_ones_are_no_images(folders, capsys):
    (folders / "train" / "cat" / "notes.txt").write_text("tabby")
    (folders / "train" / "cat" / "._0.png").write_bytes(b"left by a Mac")
    (folders / "train" / ".cache").mkdir()
    assert len(load_data(folders, "train")) == 4
    assert capsys.readouterr().err == ""


def test_class_without_images_keeps_its_label(folders):
    for split in ("train", "test"):
        (folders / split / "ant").mkdir()
    data = load_data(folders, "train")
    assert data.classes == ["ant", "cat", "dog"] and data.labels.tolist() == [1, 1, 2, 2]


def test_folders_without_images_are_an_error(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
    with pytest.raises(
        FederationError, match=r"no images in '.*train'; put some into train/<class>/"
    ):
        load_data(tmp_path, "train")


def test_one_class_is_an_error(tmp_path):
    save(tmp_path / "train" / "cat" / "0.png")
    with pytest.raises(FederationError, match=r"has 1 class folder\(s\) \(cat/\); at least 2"):
        load_data(tmp_path, "train")


def test_classes_that_differ_between_train_and_test_are_an_error(folders):
    save(folders / "test" / "cow" / "0.png")
    with pytest.raises(FederationError, match=r"differ between train/ and test/: cow in only one"):
        load_data(folders, "train")


def test_split_that_is_not_there_is_an_error(tmp_path):
    save(tmp_path / "train" / "cat" / "0.png")
    save(tmp_path / "train" / "dog" / "0.png")
    assert len(load_data(tmp_path, "train")) == 2
    with pytest.raises(FederationError, match="has no folder test/"):
        load_data(tmp_path, "test")


def test_directory_without_data_is_reported_with_what_is_wrong_and_what_to_do(tmp_path):
    todo = "put your images there, or fetch CIFAR-10 with: python utils.py --data_dir"
    with pytest.raises(FederationError, match=rf"nowhere' does not exist; {todo}"):
        load_data(tmp_path / "nowhere", "train")
    with pytest.raises(FederationError, match=rf"is empty; {todo}"):
        load_data(tmp_path, "train")
    (tmp_path / "file").touch()
    with pytest.raises(FederationError, match=rf"file' is not a directory; {todo}"):
        load_data(tmp_path / "file", "train")
    with pytest.raises(FederationError, match=r"needs train/<class>/\* and .*, and has file$"):
        load_data(tmp_path, "train")


def test_main_reports_image_folders(folders, monkeypatch, capsys):
    assert run_main(monkeypatch, folders) == 0
    out, err = capsys.readouterr()
    assert f"images in {folders}: 4 train images of 2 classes" in out
    assert f"images in {folders}: 2 test images of 2 classes" in out
    assert "Net: 61,326 numbers, 245,304 bytes" in out
    assert err == ""


def test_main_reports_a_device_that_has_training_images_alone(tmp_path, monkeypatch, capsys):
    save(tmp_path / "train" / "cat" / "0.png")
    save(tmp_path / "train" / "dog" / "0.png")
    assert run_main(monkeypatch, tmp_path) == 0
    assert "2 train images of 2 classes" in capsys.readouterr().out


def test_main_exits_with_1_and_one_line_for_folders_that_make_no_sense(
    tmp_path, monkeypatch, capsys
):
    save(tmp_path / "train" / "cat" / "0.png")
    assert run_main(monkeypatch, tmp_path) == 1
    err = capsys.readouterr().err
    assert err.startswith("utils.py: ") and err.count("\n") == 1


# --- CIFAR-10, from a server here -----------------------------------------------------


@pytest.fixture
def mirror(monkeypatch):
    archive, sums = tiny_cifar10()
    with Mirror(archive) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setattr(utils, "CIFAR10_URL", server.url)
        for name, value in sums.items():
            monkeypatch.setitem(CIFAR10_MD5, name, value)
        yield server
        server.shutdown()


def test_cifar10_is_fetched_and_read(mirror, tmp_path, capsys):
    train = load_data(tmp_path / "a" / "data", "train", download=True)
    assert train.images.shape == (10, 3, 32, 32)
    assert train.images.permute(0, 2, 3, 1).is_contiguous()
    assert train.images.dtype == torch.uint8 and train.labels.tolist() == [3, 5] * 5
    assert train.classes[3] == "class 3" and train.source == "CIFAR-10 images" and train.everywhere
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3072), np.uint8)
    assert train.images[1].flatten().tolist() == pixels[1].tolist()

    test = load_data(tmp_path / "a" / "data", "test")  # without download, it being there
    assert len(test) == 2 and mirror.downloads == 1
    assert capsys.readouterr() == ("", "")  # no progress bar off a terminal


@pytest.mark.parametrize("name", ["CIFAR-10", "synthetic:2100"])
def test_part_that_is_loaded_is_that_of_the_whole_set(mirror, tmp_path, name):
    data_dir = tmp_path if name == "CIFAR-10" else name
    whole = load_data(data_dir, "train", download=True)
    some = np.random.default_rng(1).permutation(len(whole))[: len(whole) // 3]
    part = load_data(data_dir, "train", part=lambda labels: some[labels[some] >= 0])
    assert part.images.equal(whole.images[some]) and part.labels.equal(whole.labels[some])
    nothing = load_data(data_dir, "train", part=lambda labels: some[:0])
    assert len(nothing) == len(nothing.images) == 0 and nothing.classes == whole.classes


def test_cifar10_that_is_there_is_not_fetched_again(mirror, tmp_path):
    load_data(tmp_path, "train", download=True)
    mirror.status = 404
    assert len(load_data(tmp_path, "train", download=True)) == 10
    assert mirror.downloads == 1


def test_model_that_wants_larger_images_than_cifar10_has_is_refused(mirror, tmp_path):
    with pytest.raises(FederationError, match="has 32x32 images, the model wants 64x64"):
        load_data(tmp_path, "train", image_size=64, download=True)


def test_interrupted_download_is_begun_again(mirror, tmp_path):
    (tmp_path / ARCHIVE).write_bytes(mirror.archive[:100])
    assert len(load_data(tmp_path, "train", download=True)) == 10


def test_interrupted_unpacking_is_begun_again(mirror, tmp_path):
    (tmp_path / ARCHIVE).write_bytes(mirror.archive)
    (tmp_path / CIFAR10_FOLDER).mkdir()
    (tmp_path / CIFAR10_FOLDER / "data_batch_1").touch()
    assert len(load_data(tmp_path, "train", download=True)) == 10
    assert mirror.downloads == 0  # the archive was whole


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
def test_damaged_file_is_noticed_and_fetched_again(mirror, tmp_path, name):
    load_data(tmp_path, "train", download=True)
    damaged = tmp_path / CIFAR10_FOLDER / name
    damaged.write_bytes(damaged.read_bytes()[:-10])
    split, count = ("test", 2) if name == "test_batch" else ("train", 10)
    with pytest.raises(
        FederationError, match=r"damaged or incomplete; fetch it again with: python util"
    ):
        load_data(tmp_path, split)
    assert len(load_data(tmp_path, split, download=True)) == count
    assert len(load_data(tmp_path, split)) == count


def test_pickle_that_would_run_a_program_is_refused(mirror, tmp_path, monkeypatch):
    load_data(tmp_path, "train", download=True)

    class Program:
        def __reduce__(self):
            return print, ("running",)

    data = pickle.dumps(Program())
    (tmp_path / CIFAR10_FOLDER / "test_batch").write_bytes(data)
    monkeypatch.setitem(CIFAR10_MD5, "test_batch", hashlib.md5(data).hexdigest())
    with pytest.raises(pickle.UnpicklingError, match=r"builtins\.print is not in CIFAR-10's files"):
        load_data(tmp_path, "test")


def test_full_disk_is_an_error_but_no_download_error_and_leaves_nothing(mirror, tmp_path):
    (tmp_path / ARCHIVE).symlink_to("/dev/full")
    with pytest.raises(
        FederationError, match=r"No space left on device; .* takes 350 MB"
    ) as caught:
        load_data(tmp_path, "train", download=True)
    assert not isinstance(caught.value, DownloadError)
    assert not any(tmp_path.iterdir())


def test_archive_with_a_wrong_checksum_is_refused_and_removed(mirror, tmp_path):
    mirror.body = mirror.archive[:-1] + b"!"
    with pytest.raises(DownloadError, match=r"incomplete or altered \(wrong MD5 sum\)"):
        load_data(tmp_path, "train", download=True)
    assert not any(tmp_path.iterdir())


def test_connection_cut_half_way_leaves_nothing(mirror, tmp_path):
    mirror.body = mirror.archive[: len(mirror.archive) // 2]
    with pytest.raises(DownloadError, match="cannot download CIFAR-10 from http://127"):
        load_data(tmp_path / "data", "train", download=True)
    assert not any(tmp_path.iterdir())


def test_server_without_the_archive_is_a_download_error(mirror, tmp_path):
    mirror.status = 404
    with pytest.raises(DownloadError, match=r"tar.gz into '.*': .*Not Found; check the Internet"):
        load_data(tmp_path, "train", download=True)
    assert tmp_path.exists()  # it was there before


def test_offline_is_one_line_exit_code_3_and_no_rubbish(tmp_path, monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setattr(utils, "CIFAR10_URL", f"http://127.0.0.1:{port}/cifar-10-python.tar.gz")
    assert run_main(monkeypatch, tmp_path / "a" / "data") == 3
    out, err = capsys.readouterr()
    assert err.startswith("utils.py: cannot download CIFAR-10 from http://127.0.0.1:")
    assert "Connection refused" in err and err.count("\n") == 1
    assert out == "" and not any(tmp_path.iterdir())


def test_directory_that_cannot_be_made_is_an_error_but_no_download_error(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "file").touch()
    assert run_main(monkeypatch, tmp_path / "file" / "data") == 1
    assert "Not a directory; choose another --data_dir" in capsys.readouterr().err


def test_archive_that_cannot_be_unpacked_is_an_error_but_no_download_error(mirror, tmp_path):
    (tmp_path / CIFAR10_FOLDER).touch()  # in the way
    with pytest.raises(FederationError, match=r"cannot unpack .*python.tar.gz'") as caught:
        load_data(tmp_path, "train", download=True)
    assert not isinstance(caught.value, DownloadError)


def test_two_processes_at_once_fetch_once(mirror, tmp_path):
    script = (
        "import json, sys, utils\n"
        "utils.CIFAR10_URL, utils.CIFAR10_MD5 = json.loads(sys.argv[1])\n"
        "print('ready', flush=True)\n"
        "print(len(utils.load_data(sys.argv[2], 'train', download=True)))"
    )
    mirror.open.clear()
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                script,
                json.dumps([mirror.url, CIFAR10_MD5]),
                tmp_path / "data",
            ],
            cwd=Path(utils.__file__).parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(2)
    ]
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * 2
    time.sleep(0.5)  # by now one of them asks the server and the other waits for the first
    mirror.open.set()
    assert [process.communicate(timeout=60)[0] for process in processes] == ["10\n"] * 2
    assert mirror.downloads == 1


# --- Synthetic ------------------------------------------------------------------------


def test_synthetic_set_has_the_shape_of_cifar10():
    train, test = load_data("synthetic", "train"), load_data("synthetic", "test")
    assert train.images.shape == (50_000, 3, 32, 32) and test.images.shape == (10_000, 3, 32, 32)
    assert len(train.classes) == 10 and train.source == "synthetic images"


def test_synthetic_set_is_the_same_on_every_machine():
    data = load_data("synthetic:2000", "train")
    assert hashlib.sha256(data.images.numpy().tobytes()).hexdigest() == (
        "e0157b03cb98119d5684bcb5b2d5703f0d0b427fdb2d4bb8797cb67a269f8614"
    )
    assert torch.bincount(data.labels).tolist() == [
        182,
        199,
        191,
        188,
        197,
        219,
        198,
        207,
        215,
        204,
    ]


def test_synthetic_test_images_are_others():
    train, test = load_data("synthetic:2000", "train"), load_data("synthetic:2000", "test")
    assert len(test) == 400
    assert not (train.images[:400] == test.images).flatten(1).all(1).any()


def test_synthetic_images_get_the_size_that_the_model_wants():
    assert load_data("synthetic:5", "test", image_size=48).images.shape == (1, 3, 48, 48)


@pytest.mark.parametrize("name", ["synthetic:", "synthetic:0", "synthetic:-5", "synthetic:many"])
def test_synthetic_set_of_no_size_is_refused(name):
    with pytest.raises(
        FederationError, match=f"no data set '{name}'; choose synthetic or synthetic:2000"
    ):
        load_data(name, "train")


def test_synthetic_set_is_learned_step_by_step_and_never_in_full():
    train, test = load_data("synthetic:4000", "train"), load_data("synthetic:4000", "test")
    net = utils.build_model("Net")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more of them only wait for one another on a busy machine
    accuracies = []
    for epoch in range(4):
        loader = utils.TrainLoader(train, 32, epoch)
        utils.train(net, loader, Settings(0.02, 0.02), log=lambda line: None)
        accuracies.append(utils.test(net, test).accuracy)
    torch.set_num_threads(threads)
    assert accuracies[0] < 0.35 < accuracies[1] < accuracies[3] < 0.8


# --- Folders of another layout ---


@pytest.mark.parametrize(
    ("images", "problem"),
    [
        (["0.png", "1.png"], r"needs train/<class>/\* and test/<class>/\*, and has 0.png, 1.png$"),
        (["cat/0.png", "dog/0.png"], r"needs train/<class>/\* and .*, and has cat/, dog/$"),
        ([f"{i}.png" for i in range(9)], r"and has 0.png, 1.png, 2.png, …$"),
        (["mine/train/cat/0.png"], r"and has mine/; is it --data_dir /.*/mine\?$"),
        (
            ["train/0.png", "train/1.png"],
            r"has 0 class folder\(s\) \(0.png, 1.png\); .* needed, as train/<class>/\*$",
        ),
    ],
)
def test_folder_of_another_layout_is_shown_beside_the_one_that_is_needed(tmp_path, images, problem):
    for image in images:
        save(tmp_path / image)
    with pytest.raises(FederationError, match=problem) as error:
        load_data(tmp_path, "train")
    assert "CIFAR-10" not in str(error.value)
