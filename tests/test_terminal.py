"""One path as a real process in a terminal of its own (a pty), at two widths, with and without colour."""

import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
from fcntl import ioctl
from pathlib import Path

import pytest

TOY = Path(__file__).parent / "toy" / "katas"


def in_terminal(words, folder, columns, **environment):
    """(exit code, what the terminal received)."""
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    clean = {
        key: value for key, value in os.environ.items() if key not in ("COLUMNS", "NO_COLOR", "KATA_WORKSPACE", "CI")
    }
    clean.update(KATA_TRACK=str(TOY), TERM="xterm-256color", **environment)
    process = subprocess.Popen(
        [sys.executable, "-m", "checker", *words], stdin=theirs, stdout=theirs, stderr=theirs, cwd=folder, env=clean
    )
    os.close(theirs)
    data = b""
    while True:
        ready, _, _ = select.select([ours], [], [], 60)
        assert ready, "nothing came for a minute"
        try:
            chunk = os.read(ours, 65536)
        except OSError:
            break
        if not chunk:
            break
        data += chunk
    os.close(ours)
    return process.wait(), data.decode().replace("\r\n", "\n")


@pytest.mark.timeout(120)
@pytest.mark.parametrize("columns", [60, 80, 120])
def test_the_failing_screen_fits_the_terminal(tmp_path, learner, columns):
    code, text = in_terminal(["next"], tmp_path, columns)
    assert code == 0
    (tmp_path / "torch-katas" / "day01_scale.py").write_text(learner("fails"))
    code, text = in_terminal(["check"], tmp_path, columns)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert code == 1 and "\x1b[" in text
    assert max(len(line) for line in plain.split("\n")) <= columns
    assert "FAILED" in plain and "The factor was added" in plain
    code, text = in_terminal(["status"], tmp_path, columns)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert code == 0 and max(len(line) for line in plain.split("\n")) <= columns
    code, text = in_terminal(["status"], tmp_path, columns, NO_COLOR="1")
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", text)


def test_a_pipe_gets_plain_text(tmp_path):
    environment = {**os.environ, "KATA_TRACK": str(TOY)}
    environment.pop("KATA_WORKSPACE", None)
    done = subprocess.run(
        [sys.executable, "-m", "checker", "status"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        check=True,
    )
    assert "\x1b" not in done.stdout and "0 of 2 days" in done.stdout
