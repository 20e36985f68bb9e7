"""The newest model comes to a device: in pieces, checked, and never an older one."""

import json
import time

import grpc
import pytest

from federated.errors import FederationError
from plumbing.publish import Publication
from plumbing.stream import session
from plumbing.stream.fetch import fetch_model, read_card

FILES = {"backbone.onnx": bytes(range(256)) * 4000, "head.safetensors": b"head" * 1000}
WANTED = tuple(FILES)


@pytest.fixture
def service(open_fleet, tmp_path):
    fleet = open_fleet()
    fleet.publication = Publication(tmp_path / "published")
    return fleet


def test_model_comes_whole_and_is_fetched_once(service, tmp_path):
    version = service.publication.publish({"classes": ["a"]}, FILES)
    card = fetch_model(service.address, None, tmp_path / "model", WANTED)
    assert card["version"] == version
    for name, data in FILES.items():
        assert (tmp_path / "model" / name).read_bytes() == data
    assert fetch_model(service.address, None, tmp_path / "model", WANTED) is None


def test_only_the_changed_file_travels_and_the_old_model_is_kept(service, tmp_path):
    service.publication.publish({}, FILES)
    fetch_model(service.address, None, tmp_path / "model", WANTED)
    before = (tmp_path / "model" / "backbone.onnx").stat().st_ino
    service.publication.publish({}, {**FILES, "head.safetensors": b"new"})
    fetch_model(service.address, None, tmp_path / "model", WANTED)
    assert (tmp_path / "model" / "head.safetensors").read_bytes() == b"new"
    assert (tmp_path / "model" / "backbone.onnx").stat().st_ino == before
    assert (tmp_path / "model" / "previous" / "head.safetensors").read_bytes() == b"head" * 1000


def test_transfer_goes_on_where_it_was_cut_off(service, tmp_path, caplog):
    caplog.set_level("INFO")
    service.publication.publish({}, FILES)
    card = json.loads((tmp_path / "published" / "card.json").read_bytes())
    folder = tmp_path / "model"
    folder.mkdir()
    digest = card["files"]["backbone.onnx"]["sha256"]
    (folder / f"{digest}.part").write_bytes(FILES["backbone.onnx"][:700_001])
    fetch_model(service.address, None, folder, WANTED)
    assert "700,001 of 1,024,000 bytes are here already" in caplog.text
    assert (folder / "backbone.onnx").read_bytes() == FILES["backbone.onnx"]
    assert not list(folder.glob("*.part"))


def test_damaged_transfer_is_removed_and_the_next_one_works(service, tmp_path):
    service.publication.publish({}, FILES)
    card = json.loads((tmp_path / "published" / "card.json").read_bytes())
    folder = tmp_path / "model"
    folder.mkdir()
    digest = card["files"]["backbone.onnx"]["sha256"]
    (folder / f"{digest}.part").write_bytes(b"wrong")
    with pytest.raises(FederationError, match=r"backbone\.onnx is not what the card names"):
        fetch_model(service.address, None, folder, WANTED)
    assert read_card(folder) is None
    fetch_model(service.address, None, folder, WANTED)
    assert (folder / "backbone.onnx").read_bytes() == FILES["backbone.onnx"]


def test_replayed_older_model_is_refused(service, tmp_path):
    service.publication.publish({}, FILES)
    old = service.publication.card
    service.publication.publish({}, {**FILES, "head.safetensors": b"new"})
    fetch_model(service.address, None, tmp_path / "model", WANTED)
    service.publication.card = old
    with pytest.raises(FederationError, match="older than"):
        fetch_model(service.address, None, tmp_path / "model", WANTED)
    assert (tmp_path / "model" / "head.safetensors").read_bytes() == b"new"


def test_version_grows_over_a_restart_and_with_a_clock_that_was_set_back(tmp_path, monkeypatch):
    first = Publication(tmp_path).publish({}, {})
    monkeypatch.setattr("time.time", lambda: 0.0)
    assert Publication(tmp_path).publish({}, {}) == first + 1


@pytest.mark.parametrize("name", ["../escape", "/etc/passwd", ".hidden", "a/b", ""])
def test_file_name_that_leaves_the_folder_is_refused(service, tmp_path, name):
    service.publication.publish({}, FILES)
    entry = {"sha256": "00" * 32, "bytes": 1}
    card = json.dumps({"version": 1, "files": {name: entry}})
    service.publication.card = json.dumps({"card": card, "signature": ""}).encode()
    with pytest.raises(FederationError, match="the model's card cannot be used"):
        fetch_model(service.address, None, tmp_path / "model", (name,))


@pytest.mark.parametrize(
    "request_",
    [
        b"",
        b"{}",
        b"\xff",
        b'{"file": "x", "offset": -1}',
        b"[1]",
        b'{"file": "x", "offset": 1%s}' % (b"0" * 30),
    ],
)
def test_request_that_makes_no_sense_is_refused(service, request_):
    service.publication.publish({}, FILES)
    with grpc.insecure_channel(service.address) as channel:
        call = channel.stream_stream("/plumbing.Fleet/Fetch")(iter([request_]), timeout=10)
        with pytest.raises(grpc.RpcError) as error:
            list(call)
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_caller_that_does_not_read_is_cut_off(service, monkeypatch):
    monkeypatch.setattr(session, "STALL_SECONDS", 0.5)
    monkeypatch.setattr(session, "MIN_BYTES_PER_SECOND", 1e9)
    service.publication.publish({}, {"backbone.onnx": bytes(64 << 20)})
    request = json.dumps({"file": next(iter(service.publication.files))}).encode()
    with grpc.insecure_channel(service.address) as channel:
        call = channel.stream_stream("/plumbing.Fleet/Fetch")(iter([request]), timeout=60)
        next(call)
        time.sleep(2)
        with pytest.raises(grpc.RpcError, match="did not take 262,144 bytes of the model"):
            list(call)
    assert call.code() == grpc.StatusCode.ABORTED


@pytest.mark.parametrize("publication", [None, "not published yet"])
def test_server_without_a_model_for_devices_reports_that(open_fleet, tmp_path, publication):
    fleet = open_fleet()
    fleet.publication = publication and Publication(tmp_path / "published")
    with pytest.raises(grpc.RpcError) as error:
        fetch_model(fleet.address, None, tmp_path, WANTED)
    assert error.value.details() == "this server hands out no model"
