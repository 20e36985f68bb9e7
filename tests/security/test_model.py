"""The newest model behind the door: only for admitted devices, and signed by the authority."""

import json

import grpc
import pytest

from federated.errors import FederationError
from plumbing.publish import Publication
from plumbing.security import keys
from plumbing.stream.fetch import fetch_model, read_card
from tests.security.conftest import admitted, rogue

FILES = {"head.safetensors": b"head" * 1000}
WANTED = tuple(FILES)


@pytest.fixture
def service(fleet, tmp_path):
    fleet.publication = Publication(tmp_path / "published", fleet.sign)
    fleet.publication.publish({}, FILES)
    return fleet


@pytest.fixture
def device(service, identity):
    gate = service.gate
    return identity("0", admitted(gate, "0"), keys.certificate_pem(gate.authority.certificate))


def test_admitted_device_fetches_a_signed_model(service, device, tmp_path):
    assert fetch_model(service.address, device, tmp_path / "model", WANTED)
    assert (tmp_path / "model" / "head.safetensors").read_bytes() == FILES["head.safetensors"]


def test_device_that_was_not_admitted_gets_no_model(service, identity, tmp_path):
    authority = service.gate.authority
    stranger = identity(
        "1", rogue("1", signer=authority), keys.certificate_pem(authority.certificate)
    )
    with pytest.raises((grpc.RpcError, FederationError)):
        fetch_model(service.address, stranger, tmp_path / "model", WANTED)
    assert read_card(tmp_path / "model") is None


@pytest.mark.parametrize("forgery", ["changed", "unsigned", "of another authority"])
def test_forged_card_is_refused(service, device, make_gate, tmp_path, forgery):
    publication = service.publication
    envelope = json.loads(publication.card)
    if forgery == "changed":
        envelope["card"] = envelope["card"].replace('"version": ', '"version": 1')
    elif forgery == "unsigned":
        envelope["signature"] = ""
    else:
        publication.sign = make_gate(owner="eve").authority.sign
        publication.publish({}, FILES)
        envelope = json.loads(publication.card)
    publication.card = json.dumps(envelope).encode()
    with pytest.raises(FederationError, match="is not signed by the server's authority"):
        fetch_model(service.address, device, tmp_path / "model", WANTED)
    assert read_card(tmp_path / "model") is None


def test_replayed_older_card_is_refused_although_it_is_signed(service, device, tmp_path):
    old = service.publication.card
    service.publication.publish({}, {"head.safetensors": b"new"})
    fetch_model(service.address, device, tmp_path / "model", WANTED)
    service.publication.card = old
    with pytest.raises(FederationError, match="older than"):
        fetch_model(service.address, device, tmp_path / "model", WANTED)
    assert (tmp_path / "model" / "head.safetensors").read_bytes() == b"new"
