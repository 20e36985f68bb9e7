"""The page in a real Chromium; see `run` beside this file."""

import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from playwright.sync_api import Error, expect

from federated.rounds import Began, Contribution, Device, Joined, Notice, Offered, Progress, Step
from plumbing.page.app import App
from plumbing.page.server import Page
from plumbing.page.state import RunState
from plumbing.report import step_record
from plumbing.runs import RunDirectory
from plumbing.security.gate import Gate
from tests.browser.browser import SIZES, picture, serious_findings
from tests.conftest import ROOT, free_port

DEVICE = Path(__file__).resolve().parent / "device.py"
CONFIG = {"model": "Net", "strategy": "FedAvg", "rounds": 3, "classes": ["a", "b"]}
pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def serve(tmp_path):
    """Serve a page in this process; return its address with the key."""
    pages = []

    def start(state=None, runs=tmp_path, gate=None):
        page = Page("127.0.0.1:0", App(runs, state, gate=gate), gate)
        pages.append(page)
        return page

    yield start
    for page in pages:
        page.close()


def throttled_board(root):
    """Write the files of a Raspberry Pi that is hot and has too little voltage, as recorded."""
    files = {
        "sys/class/thermal/thermal_zone0/type": "cpu-thermal",
        "sys/class/thermal/thermal_zone0/temp": "82277",
        "sys/devices/platform/soc/soc:firmware/get_throttled": "50005",
        "proc/self/status": "VmHWM:\t  402312 kB",
    }
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def row(tab, cid):
    return tab.locator("tbody tr", has=tab.get_by_role("link", name=cid, exact=True))


# --- A real run ---


def test_run_of_four_devices_is_shown_as_it_happens(launch, browse, tmp_path):
    """One is killed, one slow, one throttled, one refused; the server is killed, too."""
    server_port, page_port, run_dir = free_port(), free_port(), tmp_path / "runs" / "the-run"
    flags = [
        f"--server_address=127.0.0.1:{server_port}", "--data_dir=synthetic:2400",
    ]  # fmt: skip
    command = [
        sys.executable, ROOT / "server.py", *flags, "--rounds=8", "--min_num_clients=3",
        "--min_sample_size=2", f"--page=127.0.0.1:{page_port}",
    ]  # fmt: skip
    server = launch(*command, f"--run_dir={run_dir}")
    server.wait_for(rf"page:  http://127.0.0.1:{page_port}/\?key=")

    def client(cid, pause=0.05, root="", model="Net"):
        return launch(
            "env", f"PYTHONPATH={ROOT}", sys.executable, DEVICE, str(pause), str(root), *flags,
            f"--cid={cid}", f"--model={model}", "--threads=1",
        )  # fmt: skip

    tab = browse(f"http://127.0.0.1:{page_port}/")
    expect(tab.get_by_role("heading", name="Waiting for 3 devices")).to_be_visible()
    tab.evaluate("window.opened = true")
    killed = client(0)
    client(1, pause=0.6)
    client(2, root=throttled_board(tmp_path / "board"))
    client("kitchen", model="PiNet")

    expect(tab.get_by_role("heading", name=re.compile("Round 1 of 8"))).to_be_visible()
    tab.get_by_role("link", name="Devices").click()
    expect(row(tab, "0")).to_contain_text(re.compile(r"training \d+ %"))
    expect(row(tab, "2")).to_contain_text("82 °Cunder-voltage, throttled")
    expect(row(tab, "kitchen")).to_contain_text("refused")
    expect(row(tab, "kitchen")).to_contain_text("started with --model PiNet")
    killed.signal(signal.SIGKILL)
    expect(row(tab, "0")).to_contain_text("gone")
    picture(tab, "page-devices")
    client(0)
    expect(row(tab, "0")).to_contain_text(re.compile("training|trained|idle"))

    tab.get_by_role("link", name="Run", exact=True).click()
    chart = tab.get_by_role("img", name=re.compile("Test accuracy by round"))
    expect(chart).to_have_attribute("aria-label", re.compile("at round 3$"))
    picture(tab, "page-run")
    tab.emulate_media(color_scheme="dark")
    picture(tab, "page-dark")
    phone = browse(f"http://127.0.0.1:{page_port}/", "phone")
    expect(phone.get_by_role("heading", name=re.compile("Round"))).to_be_visible()
    picture(phone, "page-phone")

    server.signal(signal.SIGKILL)
    expect(tab.get_by_role("status").first).to_have_text("no connection; trying again")
    server = launch(*command, f"--resume={run_dir}")
    expect(tab.get_by_role("status").first).to_have_text("live")
    expect(tab.get_by_role("heading", name="Finished after 8 rounds")).to_be_visible()
    assert tab.evaluate("window.opened")  # all of it without a reload
    assert "at round 8" in chart.get_attribute("aria-label")
    assert server.finish(60) == 0
    assert server.output.rstrip().endswith("python server.py page")
    rounds = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
    assert [row["server_round"] for row in rounds] == list(range(1, 9))

    past = launch(
        sys.executable, ROOT / "server.py", "page", f"--runs={run_dir.parent}",
        f"--page=127.0.0.1:{page_port}",
    )  # fmt: skip
    past.wait_for("shows 1 runs")
    tab = browse(f"http://127.0.0.1:{page_port}/")
    tab.get_by_role("link", name="the-run").click()
    expect(tab.get_by_role("heading", name="Finished after 8 rounds")).to_be_visible()
    tab.get_by_role("link", name="Devices").click()
    row(tab, "2").get_by_role("link").click()
    expect(tab.get_by_role("img", name=re.compile("Training loss"))).to_be_visible()


# --- For everybody ---


def step(server_round, device):
    metrics = {"loss": 1.0, "images_per_second": 50.0, "cpu_temperature": 61.0}
    contribution = Contribution(device, 10, 10, 1.0, metrics, 2.5, 100, 200, 0.5, 0.25)
    evaluation = {"loss": 1.5, "accuracy": 0.5, "class_accuracy": {"a": 0.25, "b": 0.75}}
    return Step(server_round, {}, evaluation, 1, [contribution], [], 3.0, 1.0, 0.125)


@pytest.fixture
def past_runs(tmp_path):
    """Two runs that differ in a setting, with devices and a drop."""
    for name, lr in (("one", 0.1), ("two", 0.2)):
        run = RunDirectory(tmp_path / "runs" / name, {**CONFIG, "lr": lr})
        run.observe(Joined(Device("0", {"board": "a board", "images": 10})))
        for server_round in range(1, 4):
            run.save(server_round, {}, None, round_row(step(server_round, Device("0"))))
    return tmp_path / "runs"


def round_row(step):
    return {**step.evaluation, **step_record(step)}


@pytest.fixture
def owned(tmp_path):
    gate = Gate(tmp_path / "keys", lambda: ["127.0.0.1"])
    gate.admissions.admit("7", "ab" * 32, b"")
    return gate


def busy_state(count=12):
    """Return the state of a run in its second round."""
    state = RunState({**CONFIG, "batch_size": 32}, "a-run", "192.168.1.10:8080")
    devices = [Device(str(cid), {"board": "a board", "images": 10}) for cid in range(count)]
    for device in devices:
        state(Joined(device))
    state(Notice("refused device 99: it was started with --model PiNet"))
    state(step(1, devices[0]))
    state(Began(2, devices))
    for i, device in enumerate(devices):
        device.job = object()
        metrics = {"cpu_temperature": 60.0 + i % 30, "loss": 1.0, "free_ram_mb": 900.0}
        state(Progress(device, i % 60, 60, 40.0, metrics))
    state(Offered(devices[-1], None))
    return state, devices


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_axe_finds_nothing_serious_on_any_view(serve, browse, past_runs, owned, size, scheme):
    page = serve(busy_state()[0], past_runs, owned)
    tab = browse(page.address, size, scheme)
    views = (
        "run",
        "devices",
        "device/0",
        "events",
        "runs",
        "compare/one/two",
        "owner",
        "past/one/run",
    )
    for view in views:
        tab.goto(page.address.partition("?")[0] + f"#/{view}")
        expect(tab.locator("main h1").first).to_be_visible()
        tab.wait_for_timeout(300)
        assert not serious_findings(tab), view
        wide = tab.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert wide <= 0, f"{view} is {wide} pixels too wide"


def test_page_is_used_by_keyboard_alone(serve, browse, past_runs, owned):
    tab = browse(serve(busy_state()[0], past_runs, owned).address)
    expect(tab.get_by_role("heading", name=re.compile("Round 2 of 3"))).to_be_visible()
    tab.keyboard.press("Tab")
    expect(tab.get_by_role("link", name="Skip to the content")).to_be_focused()
    for _ in range(3):
        tab.keyboard.press("Tab")
    expect(tab.get_by_role("link", name="Devices")).to_be_focused()
    tab.keyboard.press("Enter")
    heat = tab.get_by_role("button", name="Heat")
    heat.focus()
    tab.keyboard.press("Enter")
    tab.keyboard.press("Enter")
    expect(tab.get_by_role("columnheader", name="Heat")).to_have_attribute(
        "aria-sort", "descending"
    )
    expect(tab.locator("tbody tr").first).to_contain_text("71 °C")


def test_owner_revokes_after_a_confirmation_and_gets_a_token(serve, browse, tmp_path, owned):
    tab = browse(serve(busy_state()[0], tmp_path, owned).address)
    assert "key=" not in tab.url
    tab.get_by_role("link", name="Owner").click()
    tab.get_by_role("button", name="New join token").click()
    expect(tab.get_by_role("dialog")).to_contain_text("./run_pi.sh --server_address=192.168.1.10")
    picture(tab, "page-owner")
    tab.get_by_role("button", name="Close").click()
    tab.get_by_role("button", name="Revoke device 7").click()
    tab.get_by_role("button", name="Cancel").click()
    assert not owned.admissions.all()[0].revoked
    tab.get_by_role("button", name="Revoke device 7").click()
    tab.get_by_role("dialog").get_by_role("button", name="Revoke").click()
    expect(row(tab, "7").or_(tab.locator("tbody tr")).first).to_contain_text("revoked")
    assert owned.admissions.all()[0].revoked


def test_without_the_key_there_is_no_owners_part(serve, browse, tmp_path, owned):
    tab = browse(serve(busy_state()[0], tmp_path, owned).address.partition("?")[0] + "#/owner")
    expect(tab.locator("main")).to_contain_text("open the address with the key")


def test_runs_are_laid_over_each_other_with_differences_marked(serve, browse, past_runs):
    tab = browse(serve(None, past_runs).address)
    for name in ("one", "two"):
        tab.get_by_label(f"Compare {name}").check()
    tab.get_by_role("button", name="Compare 2 runs").click()
    expect(tab.get_by_role("img", name=re.compile("one.*two"))).to_have_count(2)
    expect(tab.locator("tr.differs")).to_have_count(1)
    expect(tab.locator("tr.differs")).to_contain_text("lr")


def test_words_of_hostile_devices_are_shown_as_text(serve, browse, tmp_path):
    state, _ = busy_state(2)
    words = (
        "<img src=x onerror=alert(1)><script>alert(2)</script>\x1b[31m\u202egnp.exe" + "x" * 10_000
    )
    state(Joined(Device("3", {"board": words, "machine": words, "data": words})))
    state(Notice(f"refused device 4: {words}"))
    tab = browse(serve(state, tmp_path).address)
    for view in ("devices", "device/3", "events", "run"):
        tab.goto(tab.url.partition("#")[0] + f"#/{view}")
        expect(tab.locator("main")).to_contain_text("<img src=x onerror=alert(1)>")
        assert tab.locator("main img, main script").count() == 0
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_another_sites_page_can_neither_frame_nor_read_nor_change(serve, browse, tmp_path, owned):
    address = serve(busy_state()[0], tmp_path, owned).address
    tab = browse(address)
    inside = address.partition("?")[0]
    evil = serve(None, tmp_path).address.partition("?")[0].replace("127.0.0.1", "localhost")
    tab.goto(evil)
    for attack in (
        f"fetch('{inside}api/runs').then(a => a.text())",
        f"fetch('{inside}api/owner/token', {{method: 'POST', credentials: 'include'}})"
        ".then(a => a.text())",
    ):
        with pytest.raises(Error):
            tab.evaluate(attack)
    tab.evaluate(
        "url => new Promise(done => { const frame = document.createElement('iframe');"
        "frame.src = url; frame.onload = done; document.body.append(frame);"
        "setTimeout(done, 2000); })",
        inside,
    )
    assert not [f for f in tab.frames if f.url.startswith(inside) and f.locator("h1").count()]


# --- A thousand devices (simulated) ---


def test_thousand_devices_leave_the_page_usable_and_the_server_idle(serve, browse, tmp_path):
    state, devices = busy_state(1000)
    page = serve(state, tmp_path)
    tab = browse(page.address)
    tab.get_by_role("link", name="Devices").click()
    expect(tab.locator("main")).to_contain_text("1000 devices")
    expect(tab.locator("tbody tr")).to_have_count(100)
    session = tab.context.new_cdp_session(tab)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})
    stop, spent = threading.Event(), []

    def report():  # each device every 12 s, as client.py does
        for turn in range(10**6):
            if stop.wait(12 / len(devices)):
                return
            device = devices[turn % len(devices)]
            began = time.thread_time()
            metrics = {"cpu_temperature": 60.0 + turn % 30, "loss": 1.0, "free_ram_mb": 900.0}
            state(Progress(device, turn // 1000 % 60, 60, 40.0, metrics))
            spent.append(time.thread_time() - began)

    reporter = threading.Thread(target=report)
    reporter.start()
    try:
        tab.wait_for_timeout(2000)
        seconds, before = 20, thread_seconds(page.thread)
        delays, worked = [], []
        start = time.monotonic()
        while time.monotonic() - start < seconds:
            for text in ("training", "7", "77", ""):
                before_input = busy_ms(session)
                delays.append(tab.evaluate(REACTION, text))
                worked.append(busy_ms(session) - before_input)
            tab.wait_for_timeout(250)
        wall = time.monotonic() - start
        used = thread_seconds(page.thread) - before
        observer = sum(spent) / wall
    finally:
        stop.set()
        reporter.join()
    delays.sort()
    worked.sort()
    share = used / wall + observer
    print(
        f"\n1,000 simulated devices: input reacts in {delays[len(delays) // 2]:.0f} ms (median), "
        f"{delays[int(0.95 * len(delays))]:.0f} ms (95 % of {len(delays)}), of which the page "
        f"works {worked[int(0.95 * len(worked))]:.0f} ms; load {os.getloadavg()[0]:.0f}; "
        f"the server spends {100 * share:.2f} % of a core"
    )
    picture(tab, "page-thousand")
    assert worked[int(0.95 * len(worked))] < 200
    if os.getloadavg()[0] < os.cpu_count():  # else it mostly waits for a processor
        assert delays[int(0.95 * len(delays))] < 200
    assert share < 0.03


# From the input's event until the next picture is drawn.
REACTION = """text => new Promise(done => {
    const box = document.querySelector('input[type=search]'), start = performance.now();
    box.value = text;
    box.dispatchEvent(new Event('input'));
    requestAnimationFrame(() => setTimeout(() => done(performance.now() - start)));
})"""


def busy_ms(session):
    """Return the processor time that the page's main thread has spent so far."""
    metrics = session.send("Performance.getMetrics")["metrics"]
    return 1000 * next(m["value"] for m in metrics if m["name"] == "TaskDuration")


def thread_seconds(thread):
    """Return the processor time of a thread of this process."""
    fields = Path(f"/proc/self/task/{thread.native_id}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
