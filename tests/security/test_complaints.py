"""What the owner reads of strangers: short lines, and few."""

import re

import pytest

from plumbing.security import complaints
from plumbing.security.complaints import Refusals, bounded
from tests.security.conftest import wait_until


@pytest.fixture
def lines() -> list[str]:
    return []


def times(lines: list[str]) -> int:
    """Return how many refusals the lines speak of."""
    found = [re.search(r" ([0-9,]+) times", line) for line in lines]
    return sum(int(match[1].replace(",", "")) if match else 1 for match in found)


def test_first_refusals_are_reported_at_once_and_the_others_summed_up(lines):
    refusals = Refusals(lines.append)
    for _ in range(1508):
        refusals.add("192.168.1.7", "hung up")
    assert lines == ["refused 192.168.1.7: hung up"] * complaints.FIRST_LINES
    refusals.close()
    assert lines[3:] == ["refused 192.168.1.7 1,505 times more: hung up"]


def test_peers_are_counted_apart(lines):
    refusals = Refusals(lines.append)
    for _ in range(100):
        refusals.add("192.168.1.7", "hung up")
    refusals.add("192.168.1.8", "it has another model")
    assert lines[-1] == "refused 192.168.1.8: it has another model"


def test_many_peers_with_many_reasons_are_few_lines_and_little_memory(lines, monkeypatch):
    monkeypatch.setattr(complaints, "PERIOD_SECONDS", 0.3)
    refusals = Refusals(lines.append)
    for i in range(20_000):
        refusals.add(f"10.0.{i % 256}.{i // 256}", f"reason {i}")
    wait_until(lambda: times(lines) == 20_000)
    assert len(lines) < 200
    assert any(line.startswith("refused others ") for line in lines)


def test_sums_come_by_themselves_and_cease(lines, monkeypatch):
    monkeypatch.setattr(complaints, "PERIOD_SECONDS", 0.1)
    refusals = Refusals(lines.append)
    for _ in range(10):
        refusals.add("192.168.1.7", "hung up")
    wait_until(lambda: times(lines) == 10)
    refusals.add("192.168.1.7", "hung up")
    wait_until(lambda: times(lines) == 11)


def test_line_is_bounded_and_printable(lines):
    Refusals(lines.append).add("192.168.1.7", "\x1b[2J\n" + "x" * 3055)
    (line,) = lines
    assert len(line) == complaints.LINE_LENGTH and line.isprintable() and line.endswith("…")
    assert bounded("short") == "short"
