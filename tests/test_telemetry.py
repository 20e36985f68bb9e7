"""What boards report, from trees of kernel files in their shape.

The trees are written after the kernel's documentation and device trees and after listings that
owners of such boards published. None was copied from a board of ours.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from federated.updates import clean_metrics
from plumbing.telemetry import THROTTLED_BITS, Telemetry, detail

OFF = object()  # a sensor without power: its file opens, reading it fails with EAGAIN
ROOT = Path(__file__).resolve().parent.parent

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
from plumbing.telemetry import Telemetry
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
    code = "import sys, plumbing.telemetry; print(*sys.modules)"
    run = [sys.executable, "-c", code]
    modules = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not {"torch", "grpc", "flwr", "numpy"} & set(modules.split())


DEVICE = {
    "name": "device 0",
    "num_examples": 24992,
    "seconds": 38.213,
    "bytes_sent": 248_500,
    "bytes_received": 248_600,
    "metrics": {
        "loss": 1.2,
        "seconds": 37.9,
        "images_per_second": 654.3,
        "peak_ram_mb": 412.0,
        "cpu_temperature": 61.8,
        "throttled": "under-voltage, throttled",
        "throttled_since_boot": "under-voltage, throttled",
    },
}


def test_a_detail_line_shows_what_a_pi_reports():
    assert detail(DEVICE) == (
        "  device 0     24,992 images    38.2 s     654 images/s    412 MB RAM   62 °C"
        "    0.25 MB down    0.25 MB up  under-voltage, throttled"
    )


def test_a_detail_line_shows_what_a_jetson_reports():
    metrics = {
        "images_per_second": 8123,
        "peak_ram_mb": 1930.5,
        "cpu_temperature": 49.0,
        "gpu_temperature": 48.6,
        "power_watts": 14.27,
    }
    assert detail({**DEVICE, "name": "device 1", "metrics": metrics}) == (
        "  device 1     24,992 images    38.2 s   8,123 images/s  1,930 MB RAM   49 °C"
        "  GPU  49 °C   14.3 W    0.25 MB down    0.25 MB up"
    )


def test_a_detail_line_tells_earlier_throttling_from_throttling_now():
    metrics = {"throttled": "", "throttled_since_boot": "frequency capped"}
    assert detail({"name": "device 2", "metrics": metrics}).endswith("  earlier: frequency capped")
    assert detail({"name": "device 2", "metrics": {"throttled": ""}}).strip() == "device 2"


def test_a_detail_line_stays_a_line_whatever_a_device_calls_its_state():
    line = detail({"name": "device 2", "metrics": {"throttled": "very " * 200}})
    assert line.endswith("very very ") and len(line) < 80


@pytest.mark.parametrize("metrics", [None, {}, 5, "x", [], {"loss": 1.0}])
def test_a_detail_line_without_telemetry_has_what_the_server_saw(metrics):
    line = detail({**DEVICE, "metrics": metrics})
    assert " ".join(line.split()) == "device 0 24,992 images 38.2 s 0.25 MB down 0.25 MB up"


TEXT = st.text("under-voltage, é", max_size=1000)
ANY = st.one_of(st.none(), st.booleans(), st.integers(-(10**400), 10**400), st.floats(), TEXT)
LINE = re.compile(
    r"  device 0  "
    r"(  +-?[0-9,]+(\.[0-9]+)? (images|s|images/s|MB RAM|°C|W|MB down|MB up)|  GPU +-?[0-9]+ °C)*"
    r"(  (earlier: )?[-, a-zé]{1,60})?"
)


@given(
    st.fixed_dictionaries({}, optional={name: ANY for name in DEVICE if name != "name"}),
    st.fixed_dictionaries({}, optional=dict.fromkeys([*KINDS, "images_per_second"], ANY)),
)
def test_no_word_of_a_device_breaks_its_detail_line(entry, metrics):
    line = detail({**entry, "name": "device 0", "metrics": metrics})
    assert LINE.fullmatch(line)
    assert len(line) < 300
