"""plumbing/addresses.py"""

import socket

import pytest

from federated.errors import FederationError
from plumbing.addresses import (
    UnknownHost,
    check_destination,
    join_address,
    listening_addresses,
    parse_address,
    reachable_address,
    resolve,
)


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("192.168.1.10:8080", ("192.168.1.10", 8080)),
        ("laptop.local:80", ("laptop.local", 80)),
        ("[::]:8080", ("::", 8080)),
        ("[fe80::1%eth0]:8080", ("fe80::1%eth0", 8080)),
        ("localhost:0", ("localhost", 0)),
    ],
)
def test_address_splits_and_joins(address, parts):
    assert parse_address(address) == parts
    assert join_address(*parts) == address


@pytest.mark.parametrize(
    "address",
    ["", ":", "8080", ":8080", "host:", "host:x", "host:-1", "host:65536", "::1:8080", "[::1]",
     "[::1:80", "[host]:80", "a b:80", "host:8 0", "host:²"],
)  # fmt: skip
def test_address_of_another_form_is_quoted_back(address):
    with pytest.raises(FederationError, match="is not HOST:PORT; examples:") as error:
        parse_address(address)
    assert f"'{address}'" in str(error.value)


def test_unknown_host_is_reported_with_the_way_out():
    with pytest.raises(UnknownHost, match="cannot find the host 'no'"):
        resolve("no:80")


def test_host_names_and_both_families_resolve():
    assert ("127.0.0.1", 5) in resolve("localhost:5")
    assert resolve("[::1]:5") == [("::1", 5)]


def test_all_addresses_are_shown_as_one_to_type():
    shown = reachable_address("0.0.0.0", 8080)
    assert shown.endswith(":8080")
    assert not shown.startswith("0.")
    assert reachable_address("10.1.2.3", 8080) == "10.1.2.3:8080"


def test_free_port_can_be_listened_at():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert listening_addresses(f"127.0.0.1:{port}") == [("127.0.0.1", port)]


def test_protocol_before_an_address_is_named():
    with pytest.raises(
        FederationError, match=r"'http://host:80/' begins .* leave it out: host:80$"
    ):
        parse_address("http://host:80/")


@pytest.mark.parametrize("address", ["0.0.0.0:8080", "[::]:8080"])
def test_address_for_listening_is_no_destination(address):
    with pytest.raises(FederationError, match=r"use the one that server\.py prints"):
        check_destination(address)
    with pytest.raises(FederationError, match="has no port to go to"):
        check_destination("127.0.0.1:0")
    check_destination("laptop.local:8080")
