"""What a device is: its board, its memory, heat and power.

Read from the kernel's files with the standard library alone; the telemetry twice in a fit:

    telemetry.start()
    ...
    metrics |= telemetry.measure()

What a board does not offer, or offers and cannot read right now, is absent.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import re
import sys
from pathlib import Path

TEMPERATURES = (-40.0, 150.0)  # °C; beyond is a dead sensor, Tegra's give -256
WATTS = (0.05, 1000.0)
MEGABYTES = (0.1, 10_000_000.0)

CPU_ZONE = re.compile(r"cpu|x86[-_]pkg|^soc[-_]thermal$", re.IGNORECASE)
GPU_ZONE = re.compile(r"gpu", re.IGNORECASE)

THROTTLED_BITS = {
    0: "under-voltage",
    1: "frequency capped",
    2: "throttled",
    3: "soft temperature limit",
}

# The rails whose sum is the power of a board, the first row of which all can be read. Rails
# nest, so what is not listed here is not added: on AGX Orin, VIN_SYS_5V0 has VDDQ_VDD2_1V8AO in it.
POWER_RAILS = (
    ("VIN",),  # Thor developer kit, whole
    ("VDD_IN",),  # Orin Nano and NX, Xavier NX, TX2: the module
    ("POM_5V_IN",),  # Nano
    ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),  # AGX Orin
    ("VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0"),  # Thor's module
    ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"),  # AGX Xavier
)


def describe_board() -> dict[str, str | int]:
    """Return `board` (the maker's name for it), `machine` (aarch64, …), `cores` and `software`.

    In a container the maker's name comes in the variable DEVICE_MODEL, which the
    launcher sets; without it the kernel is asked.
    """
    return {
        "board": os.environ.get("DEVICE_MODEL") or _model_name() or platform.system(),
        "machine": platform.machine(),
        "cores": os.cpu_count() or 1,
        "software": ", ".join([f"Python {platform.python_version()}", *_libraries()]),
    }


def _libraries() -> list[str]:
    """Return name and version of what trains here."""
    names = [name for name in ("torch", "onnxruntime") if name in sys.modules]
    return [f"{name} {getattr(sys.modules[name], '__version__', '')}" for name in names]


def _model_name() -> str | None:
    for path in ("/proc/device-tree/model", "/sys/class/dmi/id/product_name"):
        try:
            name = Path(path).read_text(errors="replace").strip("\0 \n")
        except OSError:
            continue
        if name:
            return name
    return None


def available_memory(root: str | Path = "/") -> tuple[float, float]:
    """Return the bytes of RAM and of swap that this process can still get, inf if unknown.

    A container's limit counts like the board's memory. `docker run --memory` sets it in the
    root of the cgroups that a container sees, systemd in one of those above a service.
    """
    root = Path(root)
    meminfo = dict(re.findall(r"^(\w+):\s*([0-9]{1,15}) kB", _read(root / "proc/meminfo"), re.M))
    ram = float(meminfo.get("MemAvailable", "inf")) * 1024
    swap = float(meminfo.get("SwapFree", "inf")) * 1024
    mount = root / "sys/fs/cgroup"
    own = re.search(r"^0::/(.*)$", _read(root / "proc/self/cgroup"), re.M)
    folder = mount / (own[1] if own else "")
    for group in [folder, *folder.parents]:
        ram = min(ram, _below(group, "memory.max", "memory.current", "inactive_file"))
        swap = min(swap, _below(group, "memory.swap.max", "memory.swap.current"))
        if group == mount:
            break
    limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"  # v1: JetPack 5 and older
    ram = min(ram, _below(mount / "memory", limit, usage, "total_inactive_file"))
    return max(0.0, ram), max(0.0, swap)


def _below(group: Path, limit: str, usage: str, cache: str = "") -> float:
    """Return how far a cgroup's usage is below its limit, inf without one.

    Args:
        cache: the name, in memory.stat, of cached files, which the kernel drops when it needs room.
    """
    cached = re.search(rf"^{cache} ([0-9]{{1,18}})$", _read(group / "memory.stat"), re.M)
    free = _number(group / limit) - _number(group / usage) + (float(cached[1]) if cached else 0)
    return math.inf if math.isnan(free) else free


class Telemetry:
    """Reads the files of the kernel under `root`; raises nothing."""

    def __init__(self, root: str | Path = "/") -> None:
        self.root = Path(root)

    def start(self) -> None:
        """Begin to measure the peak of RAM, where the kernel allows it.

        Elsewhere the peak is that of the whole life of the process.
        """
        with contextlib.suppress(OSError):
            # proc_pid_clear_refs(5): 5 resets the peak resident set size, and nothing else.
            (self.root / "proc/self/clear_refs").write_text("5")

    def measure(self) -> dict[str, float | str]:
        """Return what this board offers of:

        peak_ram_mb: of this process since `start`; on a Jetson without what CUDA took.
        cpu_temperature, gpu_temperature: °C, the hottest zone of each.
        throttled: names of what a Raspberry Pi's firmware does now, "" for nothing.
        throttled_since_boot: names of what it is known to have done before. Absence proves
            nothing: the driver raspberrypi-hwmon clears these bits every 2 s.
        power_watts: of the board where it measures that, else of the module.
        """
        measured = {
            "peak_ram_mb": self._peak_ram(),
            "cpu_temperature": self._temperature(CPU_ZONE),
            "gpu_temperature": self._temperature(GPU_ZONE),
            **self._throttled(),
            "power_watts": self._power(),
        }
        return {name: value for name, value in measured.items() if value is not None}

    def _peak_ram(self) -> float | None:
        found = re.search(
            r"^VmHWM:\s*([0-9]{1,15}) kB", _read(self.root / "proc/self/status"), re.M
        )
        return _within(float(found[1]) * 1024 / 1e6, MEGABYTES, 1) if found else None

    def _temperature(self, wanted: re.Pattern[str]) -> float | None:
        found = [
            _within(_number(zone / "temp") / 1000, TEMPERATURES, 1)
            for zone in self._glob("sys/class/thermal/thermal_zone*")
            if wanted.search(_read(zone / "type"))
        ]
        return max((celsius for celsius in found if celsius), default=None)  # 0 is a dead sensor's

    def _throttled(self) -> dict[str, str]:
        # soc/soc:firmware up to the Pi 4, soc@107c000000/soc@107c000000:firmware on the Pi 5
        for path in self._glob("sys/devices/platform/soc*/soc*:firmware/get_throttled"):
            if re.fullmatch(r"[0-9a-f]{1,8}", text := _read(path)):
                now, before = _names(int(text, 16)), _names(int(text, 16) >> 16)
                since_boot = {"throttled_since_boot": before} if before else {}
                return {"throttled": now, **since_boot}
        # Kernels without Raspberry Pi's own patches have no such file, but this alarm.
        for chip in self._glob("sys/class/hwmon/hwmon*"):
            if _read(chip / "name") == "rpi_volt" and _read(chip / "in0_lcrit_alarm") == "1":
                return {"throttled": THROTTLED_BITS[0]}
        return {}

    def _power(self) -> float | None:
        watts = self._rails()
        for names in POWER_RAILS:
            if all(name in watts for name in names):
                return _within(sum(watts[name] for name in names), WATTS, 2)
        return None

    def _rails(self) -> dict[str, float]:
        """Return the watts of each rail that has a power monitor and can be read."""
        rails = {}
        for chip in self._glob("sys/class/hwmon/hwmon*"):
            if _read(chip / "name").startswith("ina"):  # ina3221, on Thor an ina238 too
                labels = {number: _read(chip / f"in{number}_label") for number in (1, 2, 3)}
                labels[1] = labels[1] or _read(chip / "label")  # the ina238 has one channel
                for number, label in labels.items():
                    millivolts = _number(chip / f"in{number}_input")
                    rails[label] = millivolts * _number(chip / f"curr{number}_input") / 1e6
        for chip in self._glob("sys/bus/iio/devices/iio:device*"):  # JetPack 4
            for number in (0, 1, 2):
                label = _read(chip / f"rail_name_{number}")
                rails[label] = _number(chip / f"in_power{number}_input") / 1000
        # A rail that is switched off may read a little below zero.
        return {label: watts for label, watts in rails.items() if -10 < watts <= WATTS[1]}

    def _glob(self, pattern: str) -> list[Path]:
        try:
            return sorted(self.root.glob(pattern))
        except OSError:
            return []


def _read(path: Path) -> str:
    """Return the file's text, "" if it cannot be read.

    Unbuffered: a Tegra sensor that is switched off answers EAGAIN, on which Python's buffered
    files raise TypeError.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return ""
    try:
        return os.read(file, 4096).decode(errors="replace").strip()
    except OSError:
        return ""
    finally:
        os.close(file)


def _number(path: Path) -> float:
    try:
        return float(_read(path))
    except ValueError:
        return float("nan")


def _within(value: float, limits: tuple[float, float], digits: int) -> float | None:
    return round(value, digits) if limits[0] <= value <= limits[1] else None


def _names(bits: int) -> str:
    return ", ".join(name for bit, name in THROTTLED_BITS.items() if bits >> bit & 1)
