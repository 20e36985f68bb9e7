"""The labelling page as a program, over real sockets: this machine alone, or the network."""

import http.client
import json
import re
import socket
import ssl
import sys

import pytest
from cryptography import x509

from fridgecam.door import CERTIFICATE, DIGITS, WRONG_CODES, lan_names, own_certificate
from plumbing.security import keys
from tests.conftest import ROOT
from tests.fridges import draw, make_home


@pytest.fixture
def home(tmp_path):
    """A fridge with a model and three photographs."""
    home = make_home(tmp_path / "fridge", ["Cabbage", "Milk", "Tomato"])
    for i in range(3):
        draw(home.inbox / f"{i}.jpg", i)
    return home


@pytest.fixture
def label(launch, home):
    """Start the page; return the process, with its port."""

    def start(*flags):
        command = [sys.executable, "-m", "fridgecam", "label", f"--home={home.folder}", "--port=0"]
        page = launch(*command, *flags, cwd=ROOT)
        page.port = int(page.wait_for(r"label at https?://[^ ]+:(\d+)/")[1])
        return page

    return start


class Browser:
    """Asks a page, with its cookie."""

    def __init__(self, port, certificate=None):
        self.port, self.cookie = port, ""
        self.context = ssl.create_default_context(cafile=certificate) if certificate else None
        self.origin = f"http{'s' if certificate else ''}://127.0.0.1:{port}"

    def ask(self, path, body=None, **headers):
        if self.context:
            connection = http.client.HTTPSConnection(
                "127.0.0.1", self.port, timeout=20, context=self.context
            )
        else:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        if body is not None:
            headers = {"Origin": self.origin, "X-FridgeCam": "1", **headers}
        if self.cookie:
            headers["Cookie"] = self.cookie
        connection.request("GET" if body is None else "POST", path, json.dumps(body), headers)
        answer = connection.getresponse()
        answer.text = answer.read().decode("latin-1")
        if cookie := answer.getheader("Set-Cookie"):
            self.cookie = cookie.partition(";")[0]
        connection.close()
        return answer


def code_of(page):
    return page.wait_for(r"code for one browser: (\d{4} \d{4})")[1]


def test_page_is_on_this_machine_alone_unless_it_is_asked_for(label):
    page = label()
    assert json.loads(Browser(page.port).ask("/state").text)["name"] == "0.jpg"
    own = [name for name in lan_names() if re.fullmatch(r"[\d.]+", name) and name[:4] != "127."]
    for address in own:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((address, page.port), timeout=5)


def test_code_lets_one_browser_in(label, home):
    page = label("--lan")
    fingerprint = page.wait_for("([0-9A-F]{2}:){31}[0-9A-F]{2}")[0]
    code = code_of(page)
    certificate = home.keys / CERTIFICATE
    browser = Browser(page.port, certificate)
    for path in ("/state", "/photo/0.jpg", "/do", "/?key=x", "/code/../state"):
        assert browser.ask(path).status == 401, path
    assert browser.ask("/do", {"what": "exclude", "name": "0.jpg"}).status == 401
    assert (browser.ask("/").status, browser.ask("/").getheader("Location")) == (303, "/code")
    assert "autocomplete" in browser.ask("/code").text

    assert browser.ask("/code", {"code": code}, Origin="https://evil.example").status == 403
    assert browser.ask("/code", {"code": code}, Host="evil.example").status == 421
    answer = browser.ask("/code", {"code": code})
    assert answer.status == 200
    attributes = {part.strip().lower() for part in answer.getheader("Set-Cookie").split(";")[1:]}
    assert {"httponly", "samesite=strict", "secure"} <= attributes
    assert json.loads(browser.ask("/state").text)["name"] == "0.jpg"
    evil = browser.ask("/do", {"what": "skip", "name": "0.jpg"}, Origin="https://evil.example")
    assert evil.status == 403
    done = browser.ask("/do", {"what": "label", "name": "0.jpg", "class": "Milk"})
    assert json.loads(done.text)["name"] == "1.jpg"
    assert (home.photos / "Milk" / "0.jpg").exists()

    other = Browser(page.port, certificate)
    assert other.ask("/code", {"code": code}).status == 403  # it is spent
    assert other.ask("/code", {"code": code_of(page)}).status == 200
    with socket.create_connection(("127.0.0.1", page.port)) as plain:
        seen = browser.context.wrap_socket(plain, server_hostname="127.0.0.1").getpeercert(True)
    assert keys.fingerprint(x509.load_der_x509_certificate(seen)) == fingerprint


def test_wrong_codes_close_the_entrance_for_those_outside_alone(label, home):
    page = label("--lan")
    inside, outside = (Browser(page.port, home.keys / CERTIFICATE) for _ in range(2))
    assert inside.ask("/code", {"code": code_of(page)}).status == 200
    right = code_of(page)
    wrong = f"{(int(right.replace(' ', '')) + 1) % 10**DIGITS:0{DIGITS}}"
    for turn in range(WRONG_CODES):
        answer = outside.ask("/code", {"code": wrong if turn else {"a": ["0" * 9000]}})
        assert answer.status == 403
    page.wait_for("wrong codes: none is taken any more")
    answer = outside.ask("/code", {"code": right})
    assert (answer.status, outside.cookie) == (403, "")
    assert "too many" in json.loads(answer.text)["problem"]
    assert outside.ask("/state").status == 401
    assert inside.ask("/state").status == 200


def test_without_tls_nothing_is_answered_on_the_network(label):
    page = label("--lan")
    with pytest.raises((http.client.HTTPException, ConnectionError)):
        Browser(page.port).ask("/code")


def test_certificate_stays_until_the_address_changes(tmp_path):
    _, first = own_certificate(tmp_path / "keys", ["127.0.0.1", "kitchen.local"])
    _, again = own_certificate(tmp_path / "keys", ["127.0.0.1"])
    _, moved = own_certificate(tmp_path / "keys", ["127.0.0.1", "192.168.1.7"])
    assert first == again != moved
    assert (tmp_path / "keys" / CERTIFICATE).stat().st_mode & 0o777 == 0o600


def test_port_in_use_is_one_line(launch, home):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        command = [sys.executable, "-m", "fridgecam", "label", f"--home={home.folder}"]
        page = launch(*command, f"--port={port}", cwd=ROOT)
        assert page.finish() == 1
    assert page.lines == [
        f"fridgecam label: cannot listen at port {port} (Address already in use); "
        "choose another --port"
    ]
