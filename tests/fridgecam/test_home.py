"""What a fridge does at home: labels, holds out, judges new models, looks with its own head."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file
from starlette.testclient import TestClient

from federated.errors import FederationError
from fridgecam import door
from fridgecam.device import OwnersClient, go_back
from fridgecam.home import Home, Seen
from fridgecam.label import Labels, make_page
from fridgecam.watch import has_photos, is_accepted
from head_trainer import Card
from plumbing.photos import hold_out, labelled

CLASSES = ["Cabbage", "Milk", "Tomato"]
CARD = Card("Tiny", CLASSES, 32, 4, "00", {"head.weight": [3, 4], "head.bias": [3]}, version=7)


@pytest.fixture
def home(tmp_path):
    home = Home(tmp_path / "fridge")
    home.make()
    return home


def photo(path: Path, value: int = 0, taken: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if taken:
        exif.get_ifd(0x8769)[36867] = taken
    Image.new("RGB", (40, 30), (value % 256, value // 256, 9)).save(path, exif=exif)
    return path


class FakeLooker:
    """Sees the three classes in the order of the card."""

    card = CARD

    def look(self, path):
        if not path.read_bytes().startswith(b"\xff\xd8"):
            raise FederationError(f"cannot read '{path}'")
        return [Seen(name, 0.5) for name in CLASSES]


@pytest.fixture
def page(home):
    for i in range(4):
        photo(home.inbox / f"{i}.jpg", i)
    app = make_page(Labels(home, FakeLooker()), 8082, list(door.LOCAL))
    client = TestClient(app, base_url="http://127.0.0.1:8082")
    client.headers.update({"X-FridgeCam": "1", "Origin": "http://127.0.0.1:8082"})
    return client


def step(page, what, **more):
    answer = page.post("/do", json={"what": what, **more})
    return answer.json()


def test_page_moves_photographs_and_takes_each_step_back(page, home):
    first = page.get("/state").json()
    assert (first["name"], first["left"]) == ("0.jpg", 4)
    assert step(page, "label", name="0.jpg", **{"class": "Milk"})["name"] == "1.jpg"
    assert (home.photos / "Milk" / "0.jpg").exists()
    assert step(page, "exclude", name="1.jpg")["name"] == "2.jpg"
    assert home.exclude.read_text() == "1.jpg\n"
    assert step(page, "skip", name="2.jpg")["name"] == "3.jpg"
    for name in ("2.jpg", "1.jpg", "0.jpg"):
        assert step(page, "undo")["name"] == name
    assert home.exclude.read_text() == ""
    assert len(list(home.inbox.iterdir())) == 4
    assert not list((home.photos / "Milk").iterdir())


def test_photograph_of_a_name_that_is_taken_replaces_none(page, home):
    photo(home.photos / "Milk" / "0.jpg", 99)
    step(page, "label", name="0.jpg", **{"class": "Milk"})
    assert len(list((home.photos / "Milk").iterdir())) == 2


@pytest.mark.parametrize("name", ["../config.json", "/etc/passwd", "x.txt", "gone.jpg", ""])
def test_page_touches_only_photographs_in_the_inbox(page, home, name):
    home.change(share=False)
    assert "problem" in step(page, "label", name=name, **{"class": "Milk"})
    assert "problem" in step(page, "label", name="0.jpg", **{"class": "../.."})
    assert len(list(home.inbox.iterdir())) == 4


def test_photograph_that_came_under_the_name_meanwhile_survives_an_undo(page, home):
    step(page, "label", name="0.jpg", **{"class": "Milk"})
    photo(home.inbox / "0.jpg", 99)
    step(page, "undo")
    assert len(list(home.inbox.iterdir())) == 5


def test_step_that_the_owner_has_taken_further_by_hand_is_named(page, home):
    step(page, "label", name="0.jpg", **{"class": "Milk"})
    (home.photos / "Milk" / "0.jpg").rename(home.folder / "elsewhere.jpg")
    assert "was moved by hand" in step(page, "undo")["problem"]


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"what": ["undo"]}', b'{"what": "no"}'])
def test_request_that_is_no_step_is_refused(page, body):
    answer = page.post("/do", content=body)
    assert (answer.status_code, answer.json()) == (400, {"problem": "no such step"})


def test_page_refuses_other_sites(page, home):
    assert page.get("/state", headers={"Host": "evil.example"}).status_code == 421
    for header in ("X-FridgeCam", "Origin"):
        kept = page.headers.pop(header)
        answer = page.post("/do", json={"what": "skip", "name": "0.jpg"})
        assert answer.status_code == 403
        page.headers[header] = kept
    evil = {"Origin": "http://evil.example"}
    assert page.post("/do", json={"what": "undo"}, headers=evil).status_code == 403
    assert page.get("/state").json()["name"] == "0.jpg"


def test_excluded_class_is_not_offered_and_a_broken_photograph_is_passed_over(page, home):
    home.exclude.write_text("Tomato\n")
    (home.inbox / "0.jpg").write_bytes(b"no photograph")
    found = page.get("/state").json()
    assert found["name"] == "1.jpg"
    assert found["classes"] == ["Cabbage", "Milk"]


def test_one_in_five_is_held_out_and_stays_so_when_others_come(home):
    for i in range(60):
        photo(home.photos / CLASSES[i % 3] / f"{i}.jpg", 7 * i + 1)
    before = labelled(home.photos, CLASSES)
    train, held = hold_out(before)
    assert 5 <= len(held) <= 20
    assert len(train) + len(held) == 60
    for i in range(60, 80):
        photo(home.photos / CLASSES[i % 3] / f"{i}.jpg", 7 * i + 1)
    _, later = hold_out(labelled(home.photos, CLASSES))
    assert {p.path for p in held} <= {p.path for p in later}


@pytest.mark.parametrize(
    ("count", "least", "most"), [(0, 0, 0), (7, 0, 0), (8, 3, 6), (400, 40, 50)]
)
def test_number_that_is_held_out(home, count, least, most):
    for i in range(count):
        photo(home.photos / "Milk" / f"{i}.jpg", i)
    assert least <= len(hold_out(labelled(home.photos, CLASSES))[1]) <= most


def test_burst_stays_together(home):
    for burst in range(12):
        for i in range(3):
            taken = f"2026:01:01 12:{burst:02}:0{i}"
            photo(home.photos / "Milk" / f"{burst}-{i}.jpg", 50 * burst + i, taken)
    train, held = hold_out(labelled(home.photos, CLASSES))
    groups = [{p.path.name.split("-")[0] for p in part} for part in (train, held)]
    assert held
    assert not groups[0] & groups[1]


@pytest.mark.parametrize(
    ("held_out", "right", "wrong", "accepted"),
    [(4, 0, 4, True), (5, 0, 1, True), (5, 0, 2, False), (50, 3, 7, True), (50, 3, 8, False)],
)
def test_model_that_is_clearly_worse_at_home_is_not_installed(held_out, right, wrong, accepted):
    assert is_accepted(held_out, right, wrong) is accepted


def write_model(folder: Path, card: dict, value: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "card.json").write_text(json.dumps(card))
    head = {"head.weight": np.full((3, 4), value, np.float32), "head.bias": np.zeros(3, np.float32)}
    save_file(head, folder / "head.safetensors")
    (folder / "backbone.onnx").write_bytes(b"onnx")


def test_going_back_keeps_both_models_and_does_not_fetch_the_newer_one_again(home):
    card = {**CARD.__dict__, "files": {}}
    write_model(home.model / "previous", {**card, "version": 6}, 6)
    write_model(home.model, card, 7)
    go_back(home)
    assert home.card().version == 6
    assert home.head()["head.weight"][0, 0] == 6
    assert (home.model / "refused").read_text() == "7"
    go_back(home)
    assert home.card().version == 7


def test_personal_head_is_used_for_its_own_model_alone(home):
    write_model(home.model, {**CARD.__dict__, "files": {}}, 1)
    own = {
        "head.weight": np.full((3, 4), 9, np.float32),
        "head.bias": np.zeros(3, np.float32),
        "version": np.array([7]),
    }
    save_file(own, home.model / "personal.safetensors")
    assert home.head()["head.weight"][0, 0] == 9
    assert home.head(personal=False)["head.weight"][0, 0] == 1
    save_file({**own, "version": np.array([6])}, home.model / "personal.safetensors")
    assert home.head()["head.weight"][0, 0] == 1


def test_fridge_of_which_all_is_kept_out_has_nothing_to_train_on(home):
    write_model(home.model, {**CARD.__dict__, "files": {}}, 1)
    photo(home.photos / "Milk" / "0.jpg")
    photo(home.photos / "Cheese" / "0.jpg")  # a class that the model does not have
    assert has_photos(home)
    home.exclude.write_text("Milk\n")
    assert not has_photos(home)


def test_server_is_told_no_path_of_a_fridge_without_photographs(home):
    class Empty:
        model, classes, source, device, lr = "Tiny", CLASSES, "", "cpu", 0.1

        def get_weights(self):
            return {}

        def prepare(self, settings):
            raise FederationError(f"no photographs in '{home.photos}/<class>/' to train on")

    found = OwnersClient("kitchen", Empty(), home).get_properties({})
    assert found["problem"] == "this fridge has no photographs to train on now"
    assert str(home.folder) not in str(found)


def test_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FederationError, match=r"cannot make '.*/file/fridge/inbox' \(Not a dir"):
        Home(tmp_path / "file" / "fridge").make()


@pytest.mark.parametrize("value", ["true", 1, None, "on"])
def test_only_a_plain_true_shares(home, value):
    home.change(share=value)
    assert not home.shares
    home.change(share=True)
    assert home.shares
