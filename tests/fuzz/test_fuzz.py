"""No bytes of a device do more than get it refused: fuzzed for 6 s, with LONG=1 for 5 min.

atheris does it where it can be imported, from the inputs in corpus/ on. Everywhere hypothesis
changes the same inputs, for a while; where it is alone, for longer.
"""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import LONG, ROOT
from tests.fuzz import targets

HERE = Path(__file__).resolve().parent
CORPUS = {path.name: path.read_bytes() for path in sorted((HERE / "corpus").iterdir())}
SECONDS = 300 if LONG else 6

# In another process: atheris changes Python's import system.
HAS_ATHERIS = not subprocess.call(
    [sys.executable, "-c", "import atheris"], stderr=subprocess.DEVNULL
)


def fuzz(folder: Path, *program: str, seconds: int) -> subprocess.CompletedProcess[str]:
    new = folder / "new"
    new.mkdir()
    return subprocess.run(
        [sys.executable, *program, f"-max_total_time={seconds}", new, HERE / "corpus"],
        cwd=folder,  # an input that does harm is left here
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )


@pytest.mark.parametrize("name", CORPUS)
def test_each_input_of_the_corpus_is_for_a_target_and_does_no_harm(name):
    assert CORPUS[name][:1] in targets.TARGETS
    targets.check(CORPUS[name])


def test_each_target_has_an_input_that_it_takes():
    taken = set()
    for data in CORPUS.values():
        try:
            targets.TARGETS[data[:1]](data[1:])
        except targets.FederationError:
            continue
        taken.add(data[:1])
    assert taken == targets.TARGETS.keys() - {b"e"}  # all that goes there is refused


@pytest.mark.timeout(SECONDS + 100)
def test_bytes_found_by_coverage_do_no_harm(tmp_path):
    if not HAS_ATHERIS:
        warnings.warn("no atheris here: hypothesis alone changes the corpus", stacklevel=1)
        return
    done = fuzz(tmp_path, str(HERE / "fuzz.py"), seconds=SECONDS)
    harmful = [path.read_bytes() for path in tmp_path.glob("crash-*")]
    assert done.returncode == 0, f"{harmful}\n{done.stdout[-5000:]}"
    runs = int(re.search(r"Done (\d+) runs", done.stdout)[1])
    print(f"{runs:,} inputs in {SECONDS} s, {len([*(tmp_path / 'new').iterdir()])} of them new")
    assert runs > 100 * SECONDS
    assert not [*tmp_path.glob("*-*")]  # crash-…, slow-unit-…


@pytest.mark.skipif(not HAS_ATHERIS, reason="atheris cannot be imported")
@pytest.mark.parametrize(
    "fault, found",
    [
        ("raise TypeError('an integer is required')", "TypeError: an integer is required"),
        ("targets.MODEL['a'][0, 0] = 1", "the model was changed"),
    ],
)
def test_fuzzing_finds_a_fault_and_keeps_the_input(tmp_path, fault, found):
    program = (
        "from tests.fuzz import fuzz, targets\n"
        "read_reply = targets.read_reply\n"
        "def faulty(reply):\n"
        f"    {fault}\n"
        "    return read_reply(reply)\n"
        "targets.read_reply = faulty\n"
        "fuzz.main()\n"
    )
    done = fuzz(tmp_path, "-c", program, seconds=20)
    assert done.returncode != 0
    assert found in done.stdout
    assert [*tmp_path.glob("crash-*")]


@st.composite
def changed(draw: st.DrawFn) -> bytes:
    """Draw an input of the corpus with bytes changed, cut out and put in."""
    data = bytearray(draw(st.sampled_from([*CORPUS.values()])))
    for place, value in draw(
        st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), max_size=6)
    ):
        if place := place % len(data):  # the first chooses the target
            data[place] = value
    start, end = sorted(draw(st.integers(1, len(data))) for _ in range(2))
    if draw(st.booleans()):
        data[start:end] = draw(st.binary(max_size=30) | st.sampled_from([b"True", b"0x7", b"-"]))
    return bytes(data)


@settings(max_examples=500 if HAS_ATHERIS else 200 * SECONDS, deadline=None)
@given(changed())
def test_changed_inputs_of_the_corpus_do_no_harm(data):
    targets.check(data)
