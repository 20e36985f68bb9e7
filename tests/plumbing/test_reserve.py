"""plumbing/descriptors.py in a process of its own, whose limit it sets."""

import subprocess
import sys
import textwrap

import pytest

from tests.conftest import ROOT


def run(code: str, soft: int, hard: int) -> list[str]:
    """Run Python with such limits on open files; return the lines it printed."""
    head = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))\n"
    done = subprocess.run(
        [sys.executable, "-c", head + textwrap.dedent(code)],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


LIMITS = """
    from plumbing import descriptors
    reserve = descriptors.reserve
    reserve.hold()
    outside = resource.getrlimit(resource.RLIMIT_NOFILE)
    with reserve.released():
        with reserve.released():
            pass
        inside = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert outside == resource.getrlimit(resource.RLIMIT_NOFILE)
    print(*outside, *inside)
"""


@pytest.mark.parametrize(
    ("soft", "hard", "expected"),
    [(256, 1024, "960 1024 1024 1024"), (1024, 1024, "960 1024 1024 1024")],
)
def test_soft_limit_is_raised_to_the_hard_one_and_64_are_held_back(soft, hard, expected):
    assert run(LIMITS, soft, hard) == [expected]


def test_limit_is_raised_no_further_than_memory_allows():
    assert run(LIMITS, 1024, 20_000) == ["16320 20000 16384 20000"]
    assert run(LIMITS, 19_000, 20_000) == ["18936 20000 19000 20000"]


def test_file_can_be_opened_when_connections_have_taken_all_others():
    code = """
        import errno, os
        from plumbing import descriptors
        descriptors.reserve.hold()
        taken = []
        try:
            while True:
                taken.append(os.dup(0))
        except OSError as error:
            print(errno.errorcode[error.errno])
        print(descriptors.shortage())
        print(descriptors.reserve.call(lambda: os.close(os.dup(0))))
        os.close(taken.pop())
        print(descriptors.shortage())
    """
    assert run(code, 200, 200) == [
        "EMFILE",
        "all 136 file descriptors that connections may take are in use; for more devices raise "
        "the limit to 400 (ulimit -n 400 as root), against strangers use a firewall: "
        "docs/security.md",
        "None",
        "None",
    ]


def test_call_is_repeated_while_strangers_hold_the_reserve_too():
    code = """
        import os, threading
        from plumbing import descriptors
        descriptors.reserve.hold()
        taken = []
        with descriptors.reserve.released():
            try:
                while True:
                    taken.append(os.dup(0))
            except OSError:
                pass
        def hang_up():
            for number in taken:
                os.close(number)
        threading.Timer(0.5, hang_up).start()
        print(descriptors.reserve.call(lambda: os.close(os.dup(0))))
    """
    assert run(code, 200, 200) == ["None"]


def test_without_a_held_reserve_nothing_changes():
    code = """
        from plumbing import descriptors
        with descriptors.reserve.released():
            print(*resource.getrlimit(resource.RLIMIT_NOFILE))
        descriptors.check(1_000_000)
    """
    assert run(code, 200, 300) == ["200 300"]
