"""What a device can say of the board that it runs on."""

import os
import platform
from pathlib import Path


def describe_board() -> dict[str, str | int]:
    """Return `board` (the maker's name for it), `machine` (aarch64, …) and `cores`.

    In a container the maker's name comes in the variable DEVICE_MODEL, which the
    launcher sets; without it the kernel is asked.
    """
    return {
        "board": os.environ.get("DEVICE_MODEL") or _model_name() or platform.system(),
        "machine": platform.machine(),
        "cores": os.cpu_count() or 1,
    }


def _model_name() -> str | None:
    for path in ("/proc/device-tree/model", "/sys/class/dmi/id/product_name"):
        try:
            name = Path(path).read_text(errors="replace").strip("\0 \n")
        except OSError:
            continue
        if name:
            return name
    return None
