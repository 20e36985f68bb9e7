"""Labelling 50 photographs in a real Chromium, by keys alone; see `run` beside this file."""

import re
import sys

import pytest
from playwright.sync_api import expect

from fridgecam.door import CERTIFICATE
from tests.browser.browser import SIZES, picture, serious_findings
from tests.conftest import ROOT
from tests.fridges import draw, make_home

CLASSES = ["Apple", "Cabbage", "Milk", "Oat drink", "Sour milk", "Tomato"]
COUNT = 50
# The likeliest class of a red, green and blue photograph. That of green, Cabbage, is excluded.
RIGHT = ("Apple", "Apple", "Milk")
pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def home(tmp_path):
    """A fridge with 50 photographs, red, green and blue in turns, and a broken one."""
    home = make_home(tmp_path / "fridge", CLASSES)
    home.inbox.joinpath("00-broken.jpg").write_bytes(b"no photograph")
    for i in range(COUNT):
        draw(home.inbox / f"{i:02}.jpg", i % 3, i)
    home.exclude.write_text("Cabbage\n")
    return home


@pytest.fixture
def start(launch, home):
    def run(*flags):
        command = [sys.executable, "-m", "fridgecam", "label", f"--home={home.folder}", "--port=0"]
        page = launch(*command, *flags, cwd=ROOT)
        return page, int(page.wait_for(r"label at https?://[^ ]+:(\d+)/")[1])

    return run


class Person:
    """Sits before the page and has a keyboard."""

    def __init__(self, tab):
        self.tab = tab
        self.shows(f"{COUNT} to label")

    def shows(self, text):
        expect(self.tab.get_by_role("status")).to_have_text(text)

    def now(self):
        return self.tab.locator("#file").inner_text()

    def press(self, *keys):
        """Press keys; wait until another photograph is there."""
        before = self.now()
        for key in keys:
            self.tab.keyboard.press(key)
        expect(self.tab.locator("#file")).not_to_have_text(before)
        return before

    def suggestions(self):
        return self.tab.locator("#suggestions button").all_inner_texts()


def label_all(person, home):
    """Label, search, exclude, skip and undo, by keys; return where each file should be."""
    places = {}
    for turn in range(COUNT):
        name = person.now()
        if turn == 10:  # kept out, taken back, and kept out for good
            person.press("x")
            person.press("u")
            assert person.now() == name
            person.press("x")
            places[name] = "inbox"
        elif turn == 20:
            person.press("n")
            places[name] = "inbox"
        elif turn == 30:  # the wrong class, taken back, then the right one by its letters
            person.press("2")
            person.press("u")
            assert person.now() == name
            person.press("m", "i", "l", "k", "Enter")  # Milk, before Sour milk
            places[name] = "photos/Milk"
        elif turn == 31:
            person.press("m", "i", "l", "k", "2")
            places[name] = "photos/Sour milk"
        elif turn == 32:  # / begins a search, too, for a class that begins with x, n or u
            person.press("/", "o", "a", "t", "Enter")
            places[name] = "photos/Oat drink"
        elif turn == 33:  # a search that is given up changes nothing
            for key in ("t", "o", "m", "Escape"):
                person.tab.keyboard.press(key)
            assert person.now() == name
            person.press("1")
            places[name] = f"photos/{RIGHT[int(name[:2]) % 3]}"
        else:
            assert not any("Cabbage" in text for text in person.suggestions())  # excluded
            person.press("1")
            places[name] = f"photos/{RIGHT[int(name[:2]) % 3]}"
        expect(person.tab.locator("#photo")).to_have_js_property("complete", True)
    return places


def where(home):
    found = [*home.inbox.iterdir(), *home.photos.rglob("*.jpg")]
    return {path.name: str(path.parent.relative_to(home.folder)) for path in found}


@pytest.mark.parametrize("size", SIZES)
def test_fifty_photographs_are_labelled_by_keys_alone(start, browse, home, size):
    contents = {path.name: path.read_bytes() for path in home.inbox.iterdir()}
    _, port = start()
    tab = browse(f"http://127.0.0.1:{port}/", size)
    person = Person(tab)
    assert not serious_findings(tab)
    assert tab.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    # The suggestions are on the screen without scrolling.
    box = tab.locator("#suggestions").bounding_box()
    assert box["y"] + box["height"] <= SIZES[size][1]
    picture(tab, f"label-{size}")
    places = label_all(person, home)
    person.shows("all photographs are labelled")
    places["00-broken.jpg"] = "inbox"
    assert where(home) == places
    assert home.exclude.read_text().splitlines() == ["Cabbage", sorted(places)[11]]
    moved = {path.name: path.read_bytes() for path in home.folder.rglob("*.jpg")}
    assert moved == contents


def test_phone_on_the_network_gets_in_by_the_code(start, browse, home):
    page, port = start("--lan")
    code = page.wait_for(r"code for one browser: (\d{4} \d{4})")[1]
    assert (home.keys / CERTIFICATE).exists()
    # ignore_https_errors: the owner has gone past the browser's warning.
    tab = browse(f"https://127.0.0.1:{port}/", "phone", ignore_https_errors=True)
    assert tab.url.endswith("/code")
    assert not serious_findings(tab)
    picture(tab, "label-code")
    tab.keyboard.type("00000000")
    tab.keyboard.press("Enter")
    expect(tab.get_by_role("alert")).to_have_text("wrong code")
    tab.keyboard.type(code)  # over the wrong one, which is selected
    tab.keyboard.press("Enter")
    person = Person(tab)
    expect(tab.locator("#photo")).to_have_js_property("naturalWidth", 64)
    assert person.press("1") == "00.jpg"
    assert (home.photos / "Apple" / "00.jpg").exists()
    assert tab.evaluate("document.cookie") == ""


def test_page_whose_program_has_ended_names_that(start, browse, home):
    page, port = start()
    tab = browse(f"http://127.0.0.1:{port}/")
    Person(tab)
    page.popen.kill()
    page.finish()
    tab.keyboard.press("1")
    expect(tab.get_by_role("alert")).to_have_text(re.compile("start it again"))
    assert (home.inbox / "00.jpg").exists()
