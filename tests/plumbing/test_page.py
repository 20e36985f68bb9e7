"""The page over real sockets: who gets in, what each answer carries, what a browser gets."""

import http.client
import json
import socket
import ssl
import time
from pathlib import Path

import pytest

from federated.errors import FederationError
from federated.rounds import (
    Began,
    Contribution,
    Device,
    Dropped,
    Joined,
    Left,
    Notice,
    Progress,
    Step,
)
from plumbing.page.app import App
from plumbing.page.server import DEFAULT_PORT, Page, is_wanted
from plumbing.page.state import RunState, parts_of, read_run
from plumbing.report import step_record
from plumbing.runs import RunDirectory
from plumbing.security.gate import Gate

CONFIG = {"model": "Net", "strategy": "FedAvg", "rounds": 3, "classes": ["a", "b"], "lr": 0.1}
HOSTILE = "<script>alert(1)</script>\x1b[31m\u202egnp.exe" + "x" * 10_000


def step(server_round: int = 1, device: Device | None = None, **more) -> Step:
    device = device or Device("0")
    metrics = {"loss": 1.0, "images_per_second": 50.0, "cpu_temperature": 61.0}
    contribution = Contribution(device, 10, 10, 1.0, metrics, 2.5, 100, 200, 0.5, 0.25)
    evaluation = {"loss": 1.5, "accuracy": 0.5, "class_accuracy": {"a": 0.25, "b": 0.75}}
    return Step(server_round, {}, evaluation, 1, [contribution], [], 3.0, 1.0, 0.125)


class Browser:
    """Asks one page, with its cookies."""

    def __init__(self, page: Page, context: ssl.SSLContext | None = None) -> None:
        self.page = page
        self.port = page.socket.getsockname()[1]
        self.context = context
        self.cookie = ""

    def ask(self, path: str, method: str = "GET", body: str = "", **headers: str):
        if self.context:
            connection = http.client.HTTPSConnection(
                "127.0.0.1", self.port, timeout=10, context=self.context
            )
        else:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        if self.cookie:
            headers.setdefault("Cookie", self.cookie)
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body or None, headers)
        return connection.getresponse()

    def json(self, path: str, *args: str, **headers: str):
        return json.loads(self.ask(path, *args, **headers).read())

    def take_key(self) -> None:
        answer = self.ask("/" + self.page.address.partition("/?")[2].join(["?", ""]))
        assert answer.status == 303
        assert answer.headers["Location"] == "/"
        self.cookie, *attributes = answer.headers["Set-Cookie"].split("; ")
        assert {"HttpOnly", "SameSite=strict", "Path=/"} <= set(attributes)

    def origin(self) -> str:
        return f"http{'s' if self.context else ''}://127.0.0.1:{self.port}"

    def news(self, last: str = "") -> dict:
        """Return the first event of the stream; with its id."""
        answer = self.ask("/api/live", **({"Last_Event_ID": last} if last else {}))
        name = ""
        while line := answer.fp.readline().decode():
            if line.startswith("id: "):
                name = line[4:].strip()
            if line.startswith("data: "):
                answer.close()
                return {**json.loads(line[6:]), "id": name}
        raise AssertionError("the stream ended")


@pytest.fixture
def open_page(tmp_path):
    pages = []

    def start(address: str = "127.0.0.1:0", gate: Gate | None = None, **options) -> Page:
        page = Page(address, App(tmp_path / "runs", gate=gate, **options), gate)
        pages.append(page)
        return page

    (tmp_path / "runs").mkdir()
    yield start
    for page in pages:
        page.close()


@pytest.fixture
def gate(tmp_path) -> Gate:
    return Gate(tmp_path / "keys", lambda: ["127.0.0.1"])


@pytest.fixture
def live() -> RunState:
    return RunState(CONFIG, "a-run", "127.0.0.1:8080")


# --- Who gets in ---


@pytest.mark.parametrize("path", ["/", "/page.js", "/api/runs", "/nowhere", "/api/owner"])
def test_every_answer_forbids_frames_foreign_scripts_and_guessing_of_types(open_page, path):
    headers = Browser(open_page()).ask(path).headers
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self'")
    assert headers["X-Frame-Options"] == "DENY"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert "Access-Control-Allow-Origin" not in headers


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", "127.0.0.1:1", "localhost.evil:{}"])
def test_host_that_is_none_of_this_server_is_refused(open_page, host):
    browser = Browser(open_page())
    assert browser.ask("/api/runs", Host=host.format(browser.port)).status == 421
    assert browser.ask("/api/runs", Host=f"LOCALHOST:{browser.port}").status == 200


def test_key_becomes_a_cookie_and_leaves_the_address(open_page, gate):
    browser = Browser(open_page(gate=gate))
    assert browser.ask("/api/owner").status == 401
    assert browser.ask("/?key=wrong").status == 401
    browser.take_key()
    assert browser.json("/api/owner") == {"devices": []}


def test_owners_part_needs_the_key_on_loopback_too(open_page, gate):
    browser = Browser(open_page(gate=gate))
    for path in ("/api/owner", "/api/owner/token", "/api/owner/revoke"):
        for method in ("GET", "POST"):
            assert browser.ask(path, method, Origin=browser.origin()).status == 401
    assert browser.ask("/api/runs").status == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "", "http://127.0.0.1:1"])
def test_request_from_another_site_changes_nothing(open_page, gate, origin):
    browser = Browser(open_page(gate=gate))
    browser.take_key()
    headers = {"Origin": origin} if origin else {}
    answer = browser.ask("/api/owner/token", "POST", "{}", **headers)
    assert answer.status == 403
    assert not list((gate.authority.directory).glob("*token*"))


def test_owner_gets_a_token_as_a_ready_command_and_revokes(open_page, gate, live):
    browser = Browser(open_page(gate=gate, live=live))
    browser.take_key()
    made = browser.json("/api/owner/token", "POST", "{}", Origin=browser.origin())
    command = made["commands"]["Raspberry Pi"]
    assert command.startswith(
        "./run_pi.sh --server_address=127.0.0.1:8080 --cid=0 --model=Net --join=join1_"
    )
    gate.admissions.admit("7", "ab" * 32, b"")
    (device,) = browser.json("/api/owner")["devices"]
    assert (device["cid"], device["revoked"]) == ("7", None)
    body = json.dumps({"cid": "7"})
    assert browser.json("/api/owner/revoke", "POST", body, Origin=browser.origin()) == {
        "revoked": "7"
    }
    assert gate.admissions.all()[0].revoked
    for body, status in [("{}", 400), ("[" * 50_000, 413), ("\xff", 400), ('{"cid": "8"}', 409)]:
        answer = browser.ask("/api/owner/revoke", "POST", body, Origin=browser.origin())
        assert answer.status == status, body[:20]


def test_beyond_loopback_reading_needs_the_key_and_the_owners_part_tls(open_page, gate):
    browser = Browser(open_page("0.0.0.0:0"))
    for path in ("/", "/api/runs", "/api/live", "/page.js"):
        assert browser.ask(path).status == 401
    browser.take_key()
    assert browser.ask("/api/runs").status == 200
    assert browser.ask("/api/owner").status == 403

    context = ssl.create_default_context(cadata=gate.authority.pem.decode())
    secured = Browser(page := open_page("0.0.0.0:0", gate), context)
    assert page.address.startswith("https://")
    assert secured.ask("/api/runs").status == 401
    secured.take_key()
    assert secured.json("/api/owner") == {"devices": []}


def test_taken_address_is_an_error_and_without_one_the_next_port_is_taken(open_page):
    with pytest.raises(FederationError, match=r"cannot show the page at 127\.0\.0\.1:"):
        open_page(open_page().address.partition("//")[2].partition("/")[0])
    first, second = (open_page("").socket.getsockname()[1] for _ in range(2))
    assert open_page("on").socket.getsockname()[1] > second
    assert DEFAULT_PORT <= first < second


def test_page_is_off_without_a_terminal_and_where_it_is_not_wanted(capsys):
    assert not is_wanted("")
    assert not is_wanted("off")
    assert is_wanted("on")
    assert is_wanted("127.0.0.1:0")


# --- What a browser gets ---


def test_browser_gets_all_at_first_and_then_what_is_new(open_page, live):
    browser = Browser(open_page(live=live))
    live(Joined(device := Device("0", {"board": "Pi", "images": 10})))
    first = browser.news()
    assert first["config"]["model"] == "Net"
    assert [row["cid"] for row in first["devices"]] == ["0"]
    device.job = object()
    live(Began(1, [device]))
    live(Progress(device, 3, 8, 50.0, {"loss": 1.0, "cpu_temperature": 61.0, "throttled": "hot"}))
    second = browser.news(first["id"])
    assert "config" not in second
    (row,) = second["devices"]
    assert (row["state"], row["step"], row["steps"], row["rate"]) == ("training", 3, 8, 50.0)
    assert (row["cpu"], row["throttled"]) == (61.0, "hot")
    assert second["status"]["phase"] == "training"
    device.job = None
    live(step(1, device))
    third = browser.news(second["id"])
    assert [row["round"] for row in third["rounds"]] == [1]
    assert third["rounds"][0]["classes"] == {"a": 0.25, "b": 0.75}
    assert third["devices"][0]["state"] == "idle"


def test_browser_of_another_process_gets_all_again(open_page, live):
    live(step(1))
    assert Browser(open_page(live=live)).news("0123-1")["config"]["model"] == "Net"


def test_seconds_of_a_round_are_split_among_what_took_them():
    row = {"server_round": 1, **step_record(step(1))}
    assert parts_of(row) == [0.5, 2.0, 0.25, 0.125, 1.0, 0.125]
    assert sum(parts_of(row)) == row["seconds"]


def test_refused_and_lost_devices_are_rows_with_the_reason(live):
    live(Notice("refused device 3: its classes are others"))
    live(Joined(device := Device("1")))
    device.gone = "it did not answer"
    live(Left(device, "it did not answer"))
    live(Dropped(1, Device("1"), "no reply in 5 s"))
    rows = {row["cid"]: row for row in live.since(0)["devices"]}
    assert (rows["3"]["state"], rows["3"]["why"]) == ("refused", "its classes are others")
    assert rows["1"]["why"] == "no reply in 5 s"
    assert rows["1"]["dropped"] == 1


def test_what_a_device_says_reaches_the_browser_short_and_printable(live):
    live(Joined(device := Device("0", {"board": HOSTILE, "images": -5, "data": HOSTILE})))
    live(Progress(device, 1, 2, 5.0, {"throttled": HOSTILE, "cpu_temperature": 1e300}))
    live(Dropped(1, device, HOSTILE))
    live(Notice(f"refused {HOSTILE}: {HOSTILE}"))
    news = live.since(0)
    (row, *_) = [row for row in news["devices"] if row["cid"] == "0"]
    assert row["board"].startswith("<script>") and len(row["board"]) <= 80
    assert "cpu" not in row and row["images"] == 0
    for value in [*row.values(), *(event["text"] for event in news["events"])]:
        assert not isinstance(value, str) or (value.isprintable() and len(value) <= 310)


def test_browser_that_stops_reading_stalls_nothing(open_page, live):
    page = open_page(live=live)
    port = page.socket.getsockname()[1]
    deaf = socket.create_connection(("127.0.0.1", port))
    deaf.sendall(f"GET /api/live HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
    devices = [Device(str(cid)) for cid in range(500)]
    start = time.monotonic()
    for device in devices:
        live(Joined(device))
    for i in range(20):
        for device in devices:
            live(Progress(device, i, 20, 5.0, {}))
    assert time.monotonic() - start < 10
    assert len(Browser(page).news()["devices"]) == 500
    deaf.close()


# --- Runs on the disk ---


@pytest.fixture
def run(tmp_path, open_page) -> RunDirectory:
    run = RunDirectory(tmp_path / "runs" / "one", CONFIG)
    run.observe(Joined(Device("0", {"board": "Pi", "images": 10})))
    for server_round in (1, 2):
        done = step(server_round)
        row = {**done.evaluation, **step_record(done)}
        run.save(server_round, {}, None, row)
    return run


def test_past_run_is_shown_from_its_files(open_page, run):
    browser = Browser(open_page())
    (line,) = browser.json("/api/runs")["runs"]
    assert (line["name"], line["finished"], line["accuracy"]) == ("one", 2, [[1, 0.5], [2, 0.5]])
    shown = browser.json("/api/runs/one")
    assert [row["round"] for row in shown["rounds"]] == [1, 2]
    assert shown["devices"][0]["board"] == "Pi"
    assert shown["devices"][0]["sent"] == 200
    curves = browser.json("/api/runs/one/devices/0")["rounds"]
    assert [(point["round"], point["seconds"], point["cpu"]) for point in curves] == [
        (1, 2.5, 61.0), (2, 2.5, 61.0),
    ]  # fmt: skip
    assert browser.ask("/api/live").status == 404


def test_only_a_runs_own_files_can_be_fetched(open_page, run, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "runs" / "one" / "notes.txt").write_text("secret")
    browser = Browser(open_page())
    assert browser.ask("/runs/one/metrics.jsonl").status == 200
    for path in (
        "/runs/one/lock", "/runs/one/notes.txt", "/runs/../secret", "/runs/%2e%2e/secret",
        "/runs/one/..%2f..%2fsecret", "/runs/one%2f../metrics.jsonl", "/api/runs/..",
        "/api/runs/two",
    ):  # fmt: skip
        assert browser.ask(path).status == 404, path


def test_damaged_files_are_shown_as_far_as_they_can_be_read(tmp_path):
    path = tmp_path / "broken"
    path.mkdir()
    (path / "config.json").write_text("[" * 100_000)
    (path / "metrics.jsonl").write_bytes(
        b'{"server_round": 1, "accuracy": "x"}\n\xff\n{"server_round": 2, "accuracy": 0.5, '
        b'"class_accuracy": [1], "dropped": 5, "devices": [{"name": "device 0", "seconds": 1, '
        b'"metrics": 7, "bytes_sent": "x"}]}\n'
    )
    (path / "events.jsonl").write_text('[]\n{"event": [], "cid": {}, "time": 5}\n')
    assert [row["round"] for row in read_run(path).since(0)["rounds"]] == [2]


def test_static_files_name_no_other_host():
    for path in (Path(__file__).parents[2] / "plumbing/page/static").iterdir():
        urls = [word for word in path.read_text().split() if "://" in word]
        assert not [url for url in urls if "www.w3.org" not in url], path
