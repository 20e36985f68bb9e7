"""Files that are replaced as a whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from plumbing import descriptors


def write_whole(path: Path, data: bytes, keep_as: Path | None = None) -> None:
    """Write a file so that a reader, or a power cut, sees the old one or the new one.

    Args:
        keep_as: the name under which the old file is kept.
    """
    descriptors.reserve.call(lambda: _write_whole(path, data, keep_as))


def _write_whole(path: Path, data: bytes, keep_as: Path | None) -> None:
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if keep_as and path.exists():
            _keep(path, keep_as)
        part.replace(path)
    except BaseException:  # Ctrl-C too
        part.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _keep(path: Path, name: Path) -> None:
    """Give a file another name, which it has from one instant to the next."""
    link = name.with_name(name.name + ".part")
    try:
        link.unlink(missing_ok=True)
        link.hardlink_to(path)  # `path` stays until it is replaced
        link.replace(name)
    except OSError:  # exFAT has no hard links; for an instant `name` is the only checkpoint
        path.replace(name)
    finally:
        link.unlink(missing_ok=True)  # replace() leaves it where both are the same file
