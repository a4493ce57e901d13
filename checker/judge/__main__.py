"""The worker: imports what every check needs, then forks once per check. Cold and warm checks are this same process.

It is started as `python -I -m checker.judge FD [warm]`, with FD one end of a socket pair. A request is a line of JSON with three
descriptors (events, output, trace) in its wake; the answer is {"ended": ...} once the fork and everything below it are gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from checker.judge import compiled, processes

# Python specializes code that runs often and writes that into the code: what the worker has run, its forks need not write again
_TRIVIAL = """
import pytest

@pytest.fixture
def one():
    return 1

@pytest.fixture
def two(one):
    return 2

@pytest.mark.parametrize("three", range(30))
def test_parameters(two, three):
    assert two == 2

def test_plain(one):
    assert one == 1
"""


def preload() -> None:
    """Import what every check needs. Nothing here may start a thread or touch a device: each fork would inherit a broken one."""
    import numpy  # noqa: F401
    import pytest  # noqa: F401
    import torch

    import checker.judge.child
    import checker.judge.plugin
    import checker.testing  # noqa: F401

    torch.set_num_threads(1)


def warming() -> list[Callable[[], None]]:
    """What a warm worker does while nobody asks: it imports what torch loads late, step by step, so that no check pays for it.

    The first check does not wait for any of it, so a warm worker's first verdict comes when a cold one would have come.
    """

    def compiler() -> None:
        import torch._dynamo  # noqa: F401

    def libraries() -> None:
        import torch.nn.utils
        import torch.optim
        import torch.testing
        import torch.utils.data
        import torch.utils.flop_counter  # noqa: F401

        torch.testing.assert_close(torch.zeros(1), torch.zeros(1))
        torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)

    def session() -> None:
        import pytest
        import pytest_timeout

        from checker.judge.child import pytest_arguments

        os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        with (
            tempfile.TemporaryDirectory(prefix="kata-") as folder,
            open(os.devnull, "w") as null,
            contextlib.redirect_stdout(null),
            contextlib.redirect_stderr(null),
        ):
            Path(folder, "spec.py").write_text(_TRIVIAL, encoding="utf-8")
            pytest.main(pytest_arguments(folder), plugins=[pytest_timeout])
        sys.modules.pop("spec", None)

    def freeze() -> None:
        import gc

        gc.collect()
        gc.freeze()

    return [compiler, libraries, session, freeze]


class Server:
    """Answers requests one after the other until the other end of the socket is closed."""

    def __init__(self, control: socket.socket) -> None:
        self.control, self.buffer, self.fds = control, b"", []

    def serve(self, later: list[Callable[[], None]]) -> None:
        """The loop: receive, fork, wait, end the tree, answer; in idle moments do one thing of `later`."""
        warm = bool(later)
        while True:
            while later and not self.asked():
                later.pop(0)()
            message = self.receive()
            if message is None:
                processes.end_descendants(os.getpid())
                return
            if "request" in message:
                self.check(message["request"])
                if warm and not later:
                    later += compiled.steps(Path(message["request"]["reference"]))

    def asked(self) -> bool:
        """Whether a message waits."""
        return b"\n" in self.buffer or bool(select.select([self.control], [], [], 0)[0])

    def receive(self) -> dict[str, Any] | None:
        """The next message with its descriptors in self.fds; None at the end."""
        while b"\n" not in self.buffer:
            data, fds, _, _ = socket.recv_fds(self.control, 1 << 16, 3)
            self.fds += fds
            if not data:
                return None
            self.buffer += data
        line, _, self.buffer = self.buffer.partition(b"\n")
        return json.loads(line)

    def check(self, request: dict[str, Any]) -> None:
        """Fork for one check, and answer when it and all that it left behind are gone."""
        events, output, trace = self.fds
        self.fds = []
        threads = processes.threads()
        if threads != 1:
            self.answer({"refused": f"the worker has {threads} threads; a fork would hang"})
            for fd in (events, output, trace):
                os.close(fd)
            return
        if request.get("no_fork"):
            from checker.judge import child

            child.main(request, events, output, trace)
        pid = os.fork()
        if pid == 0:
            self.control.close()
            processes.die_with_parent()
            signal.signal(signal.SIGINT, signal.default_int_handler)
            from checker.judge import child

            child.main(request, events, output, trace)
        for fd in (events, output, trace):
            os.close(fd)
        status, why = self.wait(pid)
        rounds = processes.end_descendants(os.getpid())
        processes.reap()
        self.answer({"ended": {"status": status, "why": why, "left": rounds}})

    def wait(self, pid: int) -> tuple[int | None, str]:
        """Wait for the fork; kill it when the other end says so or goes away. Returns (wait status, why it was killed)."""
        why = ""
        finished = None
        with contextlib.suppress(AttributeError, OSError):  # before Linux 5.3, or not Linux
            finished = os.pidfd_open(pid)
        watched: list[Any] = [self.control] + ([finished] if finished is not None else [])
        while True:
            ready, _, _ = select.select(watched, [], [], 0.05 if finished is None else 1.0)
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                break
            if self.control in ready:
                message = self.receive()
                why = "the other end went away" if message is None else message.get("kill", "")
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
                _, status = os.waitpid(pid, 0)
                if message is None:
                    processes.end_descendants(os.getpid())
                    os._exit(0)
                break
        if finished is not None:
            os.close(finished)
        return status, why

    def answer(self, message: dict[str, Any]) -> None:
        """Send one line to the other end; if it is gone, so are we."""
        try:
            self.control.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            processes.end_descendants(os.getpid())
            os._exit(0)


def main() -> None:
    """Start up, say so, and serve."""
    warm = "warm" in sys.argv[2:]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.dont_write_bytecode = True
    processes.adopt_orphans()
    control = socket.socket(fileno=int(sys.argv[1]))
    server = Server(control)
    preload()
    server.answer({"ready": {"threads": processes.threads(), "pid": os.getpid()}})
    server.serve(warming() if warm else [])


main()
