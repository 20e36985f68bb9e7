"""Labelled photographs in folders, and what a frozen backbone sees in them, computed once.

    <folder>/<class>/*.jpg    labelled: all that is trained on
    exclude.txt               class names and globs that win over everything

No torch, no ONNX: what computes features is handed in.
"""

import contextlib
import fnmatch
import functools
import hashlib
import io
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from plumbing.files import write_whole

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
MIN_CROP = 0.5  # of a photograph's shorter side squared, the least that a view shows


@dataclass(frozen=True)
class Photo:
    """A photograph and its class."""

    path: Path
    label: int


class Excluded:
    """What an owner keeps out: lines with a class's name or a glob, such as party-*.jpg."""

    def __init__(self, file: Path | None = None) -> None:
        lines = file.read_text().splitlines() if file and file.exists() else []
        self.patterns = [line.strip() for line in lines if line.strip() and line[0] != "#"]

    def has(self, path: Path, class_name: str = "") -> bool:
        """Return whether a photograph, or all of its class, is kept out."""
        names = (class_name, path.name, f"{class_name}/{path.name}")
        return any(
            fnmatch.fnmatchcase(name, pattern) for pattern in self.patterns for name in names
        )


def labelled(folder: Path, classes: Sequence[str], excluded: Excluded | None = None) -> list[Photo]:
    """Return the photographs of known classes; a class without a folder has none."""
    excluded = excluded or Excluded()
    photos = []
    for label, name in enumerate(classes):
        if (folder / name).is_dir():
            paths = sorted((folder / name).rglob("*"))
            photos += [Photo(p, label) for p in paths if is_photo(p) and not excluded.has(p, name)]
    return photos


def set_apart(photos: Sequence[Photo]) -> tuple[list[Photo], list[Photo]]:
    """Return photographs to train on, and a fixed quarter of each class to test with.

    The hash of a photograph decides, so that every program sets apart the same ones.
    """
    rest, apart = [], []
    for label in sorted({photo.label for photo in photos}):
        own = [photo for photo in photos if photo.label == label]
        own.sort(key=lambda photo: hash_of(photo.path))
        apart += own[: len(own) // 4]
        rest += own[len(own) // 4 :]
    return rest, apart


LEAST_HELD_OUT, MOST_HELD_OUT = 3, 50
BURST_SECONDS = 10.0
EXIF_TIME = 36867  # DateTimeOriginal
MOST_REMEMBERED = 20_000  # files of which the hash and the time are kept


def hold_out(photos: Sequence[Photo]) -> tuple[list[Photo], list[Photo]]:
    """Return photographs to train on, and one in five to judge new models by.

    A burst stays together: photographs of one class within 10 s show the same thing. A burst's
    hash decides, so that a photograph does not change sides when others come. Of fewer than 8
    photographs none is held out.
    """
    bursts = sorted(_bursts(photos), key=lambda burst: hash_of(burst[0].path))
    fifth = [burst for burst in bursts if int(hash_of(burst[0].path)[:2] or "1", 16) % 5 == 0]
    chosen, rest = fifth, [burst for burst in bursts if burst not in fifth]
    while len(photos) >= 8 and rest and sum(map(len, chosen)) < LEAST_HELD_OUT:
        chosen.append(rest.pop(0))
    if len(photos) < 8:
        chosen = []
    held = [photo for burst in chosen for photo in burst][:MOST_HELD_OUT]
    return [photo for photo in photos if photo not in held], held


def _bursts(photos: Sequence[Photo]) -> list[list[Photo]]:
    bursts: list[list[Photo]] = []
    last: tuple[int, float] | None = None
    taken = [(photo.label, _time_taken(photo.path), photo.path, photo) for photo in photos]
    for label, seconds, _, photo in sorted(taken, key=lambda entry: entry[:3]):
        if seconds and last and last[0] == label and seconds - last[1] <= BURST_SECONDS:
            bursts[-1].append(photo)
        else:
            bursts.append([photo])
        last = label, seconds
    return bursts


def _time_taken(path: Path) -> float:
    """Return when a photograph was taken, as its camera notes it; 0 where it does not."""
    with contextlib.suppress(OSError):
        return _read_time(path, *_state(path))
    return 0.0


@functools.lru_cache(MOST_REMEMBERED)
def _read_time(path: Path, modified: int, size: int) -> float:
    import datetime

    from PIL import Image

    try:
        with Image.open(path) as image:
            text = str(image.getexif().get_ifd(0x8769).get(EXIF_TIME, ""))
        return datetime.datetime.strptime(text.strip("\0 "), "%Y:%m:%d %H:%M:%S").timestamp()
    except (OSError, ValueError, SyntaxError):
        return 0.0


def hash_of(path: Path) -> str:
    """Return a file's SHA-256, "" if it cannot be read; what has not changed is read once."""
    with contextlib.suppress(OSError):
        return _read_hash(path, *_state(path))
    return ""


@functools.lru_cache(MOST_REMEMBERED)
def _read_hash(path: Path, modified: int, size: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _state(path: Path) -> tuple[int, int]:
    """Return what differs when a file has changed."""
    state = path.stat()
    return state.st_mtime_ns, state.st_size


def is_photo(path: Path) -> bool:
    """Return whether a file is named like a photograph that can be read."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def unknown_classes(folder: Path, classes: Iterable[str]) -> list[str]:
    """Return the names of class folders that the model does not have."""
    if not folder.is_dir():
        return []
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name not in {*classes})


def views(path: Path, size: int, count: int, seed: bytes = b"") -> np.ndarray:
    """Return views of a photograph, uint8 (count, 3, size, size): as it is, then parts of it.

    The first is the whole, the second the whole mirrored, further ones are square parts of at
    least half the area, each second one mirrored. The same `seed`, the same views.
    """
    from PIL import Image, ImageOps

    with Image.open(path) as opened:
        opened.draft("RGB", (2 * size, 2 * size))
        image = ImageOps.exif_transpose(opened).convert("RGB")
    rng = np.random.default_rng(np.frombuffer(hashlib.sha256(seed).digest(), np.uint32))
    found = []
    for index in range(count):
        view = image
        if index > 1:
            side = round(min(image.size) * rng.uniform(MIN_CROP, 1) ** 0.5)
            left, top = (int(rng.integers(0, length - side + 1)) for length in image.size)
            view = image.crop((left, top, left + side, top + side))
        view = view.resize((size, size), Image.Resampling.BILINEAR, reducing_gap=2.0)
        if index % 2:
            view = ImageOps.mirror(view)
        found.append(np.asarray(view).transpose(2, 0, 1))
    return np.stack(found)


class FeatureCache:
    """What a backbone sees in photographs, on the disk, by their hashes.

    Args:
        compute: uint8 pixels (N, 3, size, size) to float32 features (N, D).
        backbone: the hash of what computes; another one has other features.
        limit_bytes: the files that were used longest ago are removed beyond this.
    """

    def __init__(
        self,
        folder: Path,
        compute: Callable[[np.ndarray], np.ndarray],
        backbone: str,
        size: int,
        count: int,
        limit_bytes: int = 64 << 20,
    ) -> None:
        self.folder = folder / f"{backbone[:16]}-{size}-{count}"
        self.compute = compute
        self.size, self.count = size, count
        self.limit_bytes = limit_bytes
        self.broken: set[Path] = set()

    def features(self, photos: Sequence[Photo]) -> tuple[np.ndarray, np.ndarray]:
        """Return (N, count, D) features and (N,) labels of the photographs that can be read."""
        found, labels = [], []
        for photo in photos:
            try:
                found.append(self.features_of(photo.path))
                labels.append(photo.label)
            except (OSError, ValueError, SyntaxError) as error:  # Pillow raises all of these
                if photo.path not in self.broken:
                    print(f"broken photograph skipped: {photo.path}: {error}", file=sys.stderr)
                self.broken.add(photo.path)
        if not found:
            return np.empty((0, self.count, 0), np.float32), np.empty(0, np.int64)
        return np.stack(found), np.array(labels, np.int64)

    def features_of(self, path: Path) -> np.ndarray:
        """Return the (count, D) features of a photograph; computed where they are new."""
        digest = hash_of(path)
        if not digest:
            raise OSError("it cannot be read")
        cached = self.folder / f"{digest}.npy"
        try:
            with cached.open("rb") as file:
                array = np.load(file, allow_pickle=False)
            if array.shape[0] == self.count and array.dtype == np.float32:
                return array
        except (OSError, ValueError, EOFError):  # not there, or cut off
            pass
        array = self.compute(views(path, self.size, self.count, digest.encode()))
        array = np.ascontiguousarray(array, np.float32)
        with contextlib.suppress(OSError):  # a full disk: then it is computed each time
            self._write(cached, array)
        return array

    def _write(self, path: Path, array: np.ndarray) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        np.save(buffer, array)
        write_whole(path, buffer.getvalue())
        files = [(f.stat().st_mtime, f.stat().st_size, f) for f in self.folder.glob("*.npy")]
        excess = sum(size for _, size, _ in files) - self.limit_bytes
        for _, size, file in sorted(files):
            if excess <= 0:
                break
            file.unlink()
            excess -= size


def batches(
    count: int, batch_size: int, epochs: int, seed: int, balance: np.ndarray | None = None
) -> list[list[np.ndarray]]:
    """Return for each epoch the indices of its batches; the last one may be smaller.

    Every Trainer takes its order from here, so that all of them compute the same numbers.

    Args:
        balance: the labels (count,); examples are drawn so that each class comes as often.
    """
    rng = np.random.default_rng(seed)
    steps = range(batch_size, count, batch_size)
    if balance is None:
        return [np.split(rng.permutation(count), steps) for _ in range(epochs)]
    share = 1 / np.bincount(balance)[balance]
    share /= share.sum()
    return [np.split(rng.choice(count, count, p=share), steps) for _ in range(epochs)]
