"""What boards report, from trees of kernel files in their shape.

The trees are written after the kernel's documentation and device trees and after listings that
owners of such boards published. None was copied from a board of ours.
"""

import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from federated.updates import clean_metrics
from plumbing.board import THROTTLED_BITS, Telemetry, available_memory

OFF = object()  # a sensor without power: its file opens, reading it fails with EAGAIN
ROOT = Path(__file__).resolve().parents[2]

STATUS = {"proc/self/status": "Name:\tpython\nVmPeak:\t 2311296 kB\nVmHWM:\t  402344 kB\n"}
PI_FIRMWARE = "sys/devices/platform/soc/soc:firmware/get_throttled"
PI_5_FIRMWARE = "sys/devices/platform/soc@107c000000/soc@107c000000:firmware/get_throttled"


def zones(**temperatures):
    """Thermal zones by type; an underscore stands for a hyphen."""
    return {
        f"sys/class/thermal/thermal_zone{number}/{file}": content
        for number, (name, millidegrees) in enumerate(temperatures.items())
        for file, content in (("type", name.replace("_", "-")), ("temp", millidegrees))
    }


def chip(number, name, **files):
    return {
        f"sys/class/hwmon/hwmon{number}/{file}": content
        for file, content in {"name": name, **files}.items()
    }


def ina3221(hwmon, *rails):
    """Rails as (label, millivolts, milliamperes), and the chip's shunt voltages and sums."""
    files = {"in7_label": "Sum of shunt voltages", "in7_input": "760", "curr4_input": "9999"}
    for channel, (label, millivolts, milliamperes) in enumerate(rails, 1):
        files |= {
            f"in{channel}_label": label,
            f"in{channel}_input": millivolts,
            f"curr{channel}_input": milliamperes,
            f"in{channel + 3}_input": "80",
        }
    return chip(hwmon, "ina3221", **files)


def iio(device, **rails):
    """The power monitor as JetPack 4 shows it: rails by name, in mW."""
    return {
        f"sys/bus/iio/devices/iio:device{device}/{file}{number}{end}": content
        for number, (name, milliwatts) in enumerate(rails.items())
        for file, end, content in (("rail_name_", "", name), ("in_power", "_input", milliwatts))
    }


BOARDS = {
    "Raspberry Pi 3 Model B": (
        zones(cpu_thermal="48312")
        | {PI_FIRMWARE: "0"}
        | chip(0, "cpu_thermal", temp1_input="48312")
        | chip(1, "rpi_volt", in0_lcrit_alarm="0"),
        {"cpu_temperature": 48.3, "throttled": ""},
    ),
    "Raspberry Pi 4 Model B on a weak supply": (
        zones(cpu_thermal="61835") | {PI_FIRMWARE: "50005"},
        {
            "cpu_temperature": 61.8,
            "throttled": "under-voltage, throttled",
            "throttled_since_boot": "under-voltage, throttled",
        },
    ),
    "Raspberry Pi Zero 2 W without a heat sink": (
        zones(cpu_thermal="80608") | {PI_FIRMWARE: "20002"},
        {
            "cpu_temperature": 80.6,
            "throttled": "frequency capped",
            "throttled_since_boot": "frequency capped",
        },
    ),
    "Raspberry Pi 3 Model B+ after a hot spell": (
        zones(cpu_thermal="59100") | {PI_FIRMWARE: "80000"},
        {
            "cpu_temperature": 59.1,
            "throttled": "",
            "throttled_since_boot": "soft temperature limit",
        },
    ),
    "Raspberry Pi 5": (
        zones(cpu_thermal="55550")
        | {PI_5_FIRMWARE: "0"}
        | chip(2, "rp1_adc", in1_input="1432")
        | chip(3, "rpi_volt", in0_lcrit_alarm="0"),
        {"cpu_temperature": 55.5, "throttled": ""},
    ),
    "Raspberry Pi 5 on a kernel without get_throttled and a weak supply": (
        zones(cpu_thermal="55550") | chip(3, "rpi_volt", in0_lcrit_alarm="1"),
        {"cpu_temperature": 55.5, "throttled": "under-voltage"},
    ),
    "Raspberry Pi 5 on a kernel without get_throttled": (
        zones(cpu_thermal="55550") | chip(3, "rpi_volt", in0_lcrit_alarm="0"),
        {"cpu_temperature": 55.5},
    ),
    "Jetson Orin Nano": (  # Orin NX is the same; the cv zones belong to engines that it lacks
        zones(
            cpu_thermal="49031",
            gpu_thermal="48593",
            cv0_thermal=OFF,
            cv1_thermal=OFF,
            cv2_thermal=OFF,
            soc0_thermal="47843",
            soc1_thermal="49062",
            soc2_thermal="48468",
            tj_thermal="49062",
        )
        | chip(0, "pwmfan", pwm1="67")
        | ina3221(
            1,
            ("VDD_IN", "5080", "1192"),
            ("VDD_CPU_GPU_CV", "5072", "296"),
            ("VDD_SOC", "5072", "320"),
        ),
        {"cpu_temperature": 49.0, "gpu_temperature": 48.6, "power_watts": 6.06},
    ),
    "Jetson AGX Orin on JetPack 6, GPU asleep": (
        zones(cpu_thermal="77281", gpu_thermal=OFF, tj_thermal="77281")
        | ina3221(
            3,
            ("VDD_GPU_SOC", "19208", "164"),
            ("VDD_CPU_CV", "19208", "745"),
            ("VIN_SYS_5V0", "4968", "1000"),
        )
        | ina3221(4, ("NC", "0", "0"), ("VDDQ_VDD2_1V8AO", "4968", "220"), ("NC", "0", "0")),
        {"cpu_temperature": 77.3, "power_watts": 22.43},
    ),
    "Jetson AGX Thor, GPU asleep": (
        zones(
            cpu_thermal="53700",
            gpu_thermal=OFF,
            soc012_thermal="55100",
            soc345_thermal="53700",
            tj_thermal="55100",
        )
        | ina3221(
            3,
            ("VDD_GPU", "20000", "-20"),
            ("VDD_CPU_SOC_MSS", "20000", "326"),
            ("VIN_SYS_5V0", "5000", "1304"),
        )
        | chip(4, "ina238", label="VIN", in1_input="20000", curr1_input="1150"),
        {"cpu_temperature": 53.7, "power_watts": 23.0},
    ),
    "Jetson Thor on a carrier board without VIN": (
        zones(cpu_thermal="53700", gpu_thermal="52000")
        | ina3221(
            3,
            ("VDD_GPU", "20000", "-20"),
            ("VDD_CPU_SOC_MSS", "20000", "326"),
            ("VIN_SYS_5V0", "5000", "1304"),
        ),
        {"cpu_temperature": 53.7, "gpu_temperature": 52.0, "power_watts": 12.64},
    ),
    "Jetson AGX Xavier on JetPack 4": (
        zones(
            CPU_therm="31500",
            GPU_therm="30500",
            AUX_therm="30500",
            AO_therm="30000",
            PMIC_Die="100000",
            thermal_fan_est="30800",
        )
        | iio(0, GPU="463", CPU="618", SOC="2936")
        | iio(1, CV="0", VDDRQ="309", SYS5V="3306"),
        {"cpu_temperature": 31.5, "gpu_temperature": 30.5, "power_watts": 7.63},
    ),
    "Jetson TX2 on JetPack 4": (
        zones(BCPU_therm="38000", MCPU_therm="39500", GPU_therm="37000", PLL_therm="38000")
        | iio(0, VDD_SYS_GPU="152", VDD_SYS_SOC="457", VDD_4V0_WIFI="19")
        | iio(1, VDD_IN="2976", VDD_SYS_CPU="305", VDD_SYS_DDR="586")
        | iio(2, VDD_MUX="5900", VDD_5V0_IO_SYS="2500", VDD_3V3_SYS="700"),
        {"cpu_temperature": 39.5, "gpu_temperature": 37.0, "power_watts": 2.98},
    ),
    "Jetson Nano on JetPack 4": (
        zones(AO_therm="44500", CPU_therm="36500", GPU_therm="35000", PMIC_Die="100000")
        | iio(0, POM_5V_IN="2540", POM_5V_GPU="40", POM_5V_CPU="480"),
        {"cpu_temperature": 36.5, "gpu_temperature": 35.0, "power_watts": 2.54},
    ),
    "laptop": (
        zones(acpitz="27800", x86_pkg_temp="52000", iwlwifi_1="41000")
        | {"sys/class/thermal/thermal_zone1/type": "x86_pkg_temp"}
        | chip(0, "nct6775", in1_label="VIN", in1_input="12000", curr1_input="500"),
        {"cpu_temperature": 52.0},
    ),
    "virtual machine": ({}, {}),
}


def plant(root, tree):
    """Write the files under `root`; return what has to stay open for `OFF`."""
    open_files = []
    for name, content in tree.items():
        path = Path(root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is OFF:  # a pipe that somebody holds open and never writes to
            os.mkfifo(path)
            open_files.append(os.open(path, os.O_RDWR))
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content + "\n")
    return open_files


@pytest.fixture
def measure(tmp_path):
    open_files = []

    def measure(tree):
        open_files.extend(plant(tmp_path, tree))
        return Telemetry(tmp_path).measure()

    yield measure
    for file in open_files:
        os.close(file)


@pytest.mark.parametrize("board", BOARDS)
def test_a_board_reports_what_it_offers_and_nothing_else(board, measure):
    tree, expected = BOARDS[board]
    measured = measure(STATUS | tree)
    assert measured == {"peak_ram_mb": 412.0, **expected}
    assert clean_metrics(measured) == measured


def test_nothing_comes_from_an_empty_tree(measure):
    assert measure({}) == {}


def test_an_unknown_set_of_rails_gives_no_power(measure):
    assert measure(ina3221(0, ("VDD_FUTURE", "5000", "2000"), ("VDD_CPU", "900", "900"))) == {}


@pytest.mark.parametrize("milliamperes", [OFF, "-1000", "90000000", "nan", ""])
def test_one_bad_rail_gives_no_power_rather_than_a_part(milliamperes, measure):
    tree = dict(BOARDS["Jetson AGX Orin on JetPack 6, GPU asleep"][0])
    tree["sys/class/hwmon/hwmon3/curr1_input"] = milliamperes
    assert measure(tree) == {"cpu_temperature": 77.3}


@pytest.mark.parametrize(
    "temperature", ["0", "-273150", "-256000", "150001", "nan", "inf", "", "warm", "1e400", OFF]
)
def test_a_dead_sensor_is_absent(temperature, measure):
    assert measure(zones(cpu_thermal=temperature)) == {}


def test_a_dead_zone_leaves_the_others(measure):
    tree = zones(cpu0_thermal="61000", cpu1_thermal="-256000", cpu2_thermal="63000")
    assert measure(tree) == {"cpu_temperature": 63.0}


@pytest.mark.parametrize("word", ["", "throttled=0x0", "-5", "500050005", "0x50005", OFF])
def test_a_throttle_word_that_is_none_is_absent(word, measure):
    assert measure({PI_FIRMWARE: word}) == {}


def test_directories_and_dangling_links_in_place_of_files_are_absent(tmp_path, measure):
    zone = tmp_path / "sys/class/thermal/thermal_zone0"
    (zone / "temp").mkdir(parents=True)
    (zone / "type").symlink_to("type")
    (tmp_path / "sys/class/hwmon/hwmon0").mkdir(parents=True)
    (tmp_path / "sys/class/hwmon/hwmon0/name").symlink_to("/nowhere/at/all")
    (tmp_path / "proc").write_text("a file")
    telemetry = Telemetry(tmp_path)
    telemetry.start()
    assert telemetry.measure() == {}


NUMBERS = st.one_of(st.integers(), st.floats(), st.integers(-(10**400), 10**400)).map(str)
GARBAGE = st.one_of(st.binary(max_size=60), NUMBERS.map(str.encode))
KINDS = {
    "peak_ram_mb": float,
    "cpu_temperature": float,
    "gpu_temperature": float,
    "power_watts": float,
    "throttled": str,
    "throttled_since_boot": str,
}


@given(board=st.sampled_from(sorted(BOARDS)), data=st.data())
def test_garbage_in_any_file_gives_no_exception_and_no_absurd_value(board, data):
    tree = STATUS | BOARDS[board][0]
    for name in data.draw(st.lists(st.sampled_from(sorted(tree)), max_size=8)):
        tree[name] = data.draw(GARBAGE)
    with tempfile.TemporaryDirectory() as root:
        open_files = plant(root, tree)
        try:
            measured = Telemetry(root).measure()
        finally:
            for file in open_files:
                os.close(file)
    assert all(type(value) is KINDS[name] for name, value in measured.items())
    assert 0 < measured.get("peak_ram_mb", 1) <= 1e7
    for name in ("cpu_temperature", "gpu_temperature"):
        assert -40 <= measured.get(name, 1) <= 150 and measured.get(name) != 0
    assert 0.05 <= measured.get("power_watts", 1) <= 1000
    for name in ("throttled", "throttled_since_boot"):
        assert set(measured.get(name, "").split(", ")) <= {*THROTTLED_BITS.values(), ""}


def test_start_forgets_an_earlier_peak_of_memory():
    """In a process of its own, so that the tests' memory does not count."""
    code = """
from plumbing.board import Telemetry
def peak(): return Telemetry().measure()["peak_ram_mb"]
quiet = peak()
block = bytearray(b"x" * 200_000_000); del block
high = peak()
try:
    open("/proc/self/clear_refs", "w").close()
except OSError:
    print(quiet, high, quiet)  # start() can do nothing here
else:
    Telemetry().start()
    print(quiet, high, peak())
"""
    run = [sys.executable, "-c", code]
    output = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    quiet, high, after = map(float, output.split())
    assert high - quiet > 150
    assert abs(after - quiet) < 50


def test_importing_it_costs_neither_torch_nor_grpc():
    code = "import sys, plumbing.board; print(*sys.modules)"
    run = [sys.executable, "-c", code]
    modules = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not {"torch", "grpc", "flwr", "numpy"} & set(modules.split())


# Free memory: what the kernel reports of the board, and the limits of containers and services.

MEMINFO = "MemTotal: 931768 kB\nMemFree: 1024 kB\nMemAvailable: 500000 kB\nSwapFree: 102396 kB\n"
BOARD = (500_000 * 1024, 102_396 * 1024)
LIMIT = {
    "memory.max": "314572800",
    "memory.current": "104857600",
    "memory.stat": "anon 94371840\nactive_file 1\ninactive_file 4194304",
}


def cgroup(folder, **files):
    return {
        f"sys/fs/cgroup/{folder}/{name}": content for name, content in {**LIMIT, **files}.items()
    }


def swap(limit, usage):
    return {"memory.swap.max": limit, "memory.swap.current": usage}


@pytest.mark.parametrize(
    "tree, expected",
    [
        ({}, BOARD),
        (cgroup("", **{"memory.max": "max"}), BOARD),
        (cgroup(""), (209_715_200 + 4_194_304, BOARD[1])),
        (cgroup("", **swap("0", "0")), (213_909_504, 0)),
        (cgroup("", **swap("max", "5")), (213_909_504, BOARD[1])),
        (cgroup("", **{"memory.current": "914572800"}), (0, BOARD[1])),
        (
            {"proc/self/cgroup": "0::/system.slice/x.service", **cgroup("system.slice")},
            (213_909_504, BOARD[1]),
        ),
        ({"proc/self/cgroup": "0::/other", **cgroup("system.slice")}, BOARD),
        (
            {
                "proc/self/cgroup": "4:memory:/docker/1f\n1:name=systemd:/docker/1f",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "314572800",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "104857600",
                "sys/fs/cgroup/memory/memory.stat": "inactive_file 1\ntotal_inactive_file 4194304",
            },
            (213_909_504, BOARD[1]),
        ),
        (cgroup("", **{"memory.max": "-", "memory.stat": "inactive_file x"}), BOARD),
    ],
)
def test_free_memory_is_the_least_of_the_board_and_its_limits(tmp_path, tree, expected):
    plant(tmp_path, {"proc/meminfo": MEMINFO, **tree})
    assert available_memory(tmp_path) == expected


def test_free_memory_is_unknown_without_the_kernels_files(tmp_path):
    assert available_memory(tmp_path) == (math.inf, math.inf)


def test_free_memory_of_this_machine_is_a_number():
    ram, swap = available_memory()
    assert 1e6 < ram < 1e15
    assert 0 <= swap < 1e15
