"""What a device says while it cannot take part yet."""

import threading

import pytest

from federated.errors import Refused
from plumbing.stream import device
from tests.devices import Recorder


class Named:
    """A device that only says its name."""

    def __init__(self, cid):
        self.cid = cid

    def get_properties(self, config):
        return {"cid": self.cid}


def serve(fleet, cid):
    device.serve(fleet.address, Named(cid), lambda state: None, max_wait_seconds=20)


def test_second_device_of_a_name_hears_at_once_why_it_waits(open_fleet, caplog):
    fleet = open_fleet(keepalive_seconds=1.0)
    recorder = Recorder(fleet)
    threading.Thread(target=serve, args=(fleet, "0"), daemon=True).start()
    recorder.wait_for(1)
    with caplog.at_level("INFO"), pytest.raises(Refused, match="--cid=0 is connected already"):
        serve(fleet, "0")
    assert caplog.messages[0] == (
        "another connection has --cid=0; waiting up to 4 s for the server to give it up"
    )
    recorder.until(lambda: len(recorder.lines()) == 3)
    assert recorder.lines()[1] == (
        "device 0 waits up to 4 s to join: another connection has --cid=0"
    )
    assert recorder.lines()[2].startswith("refused device 0: a device with --cid=0")
