"""server.py --log_file"""

import re

import server
from tests.conftest import complaint


def test_log_file_has_each_line_with_its_time(start_server, start_client, tmp_path):
    log = tmp_path / "server.log"
    log.write_text("of an earlier run\n")
    server, address = start_server(
        rounds="1", min_num_clients="1", min_sample_size="1", log_file=str(log)
    )
    start_client(address, 0)
    assert server.finish() == 0
    first, *lines = log.read_text().splitlines()
    assert first == "of an earlier run"
    times = [re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00 ", line) for line in lines]
    assert all(times)
    assert [line[26:] for line in lines] == server.lines


def test_log_file_has_errors_and_no_secret(start_server, tmp_path):
    log, run_dir = tmp_path / "server.log", tmp_path / "run"
    server, _ = start_server(
        "--secure",
        "--page=on",
        keys=str(tmp_path / "keys"),
        log_file=str(log),
        run_dir=str(run_dir),
    )
    (token,) = re.findall(r"--join=(join1_[\w-]{20,})", server.output)
    (key,) = re.findall(r"/\?key=([\w-]{20,})", server.output)
    written = b"".join(path.read_bytes() for path in run_dir.iterdir())
    server.popen.terminate()
    server.finish()
    text = log.read_text()
    assert "--join=join1_…  " in text
    assert "/?key=…" in text
    assert "server.py: interrupted; devices wait." in text
    assert b"run_id" in written
    for secret in (token, key):
        assert secret not in text
        assert secret.encode() not in written


def test_log_file_that_cannot_be_written_is_named(tmp_path):
    line = complaint(server.main, f"--log_file={tmp_path}")
    assert line == f"server.py: cannot write --log_file '{tmp_path}' (Is a directory)"
