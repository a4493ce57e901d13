"""The worker: imports what every check needs, then forks once per check. Cold and warm checks are this same process.

It is started as `python -I -m checker.judge FD [warm]`, with FD one end of a socket pair. A request is a line of JSON with three
descriptors (events, output, trace) in its wake; the answer is {"ended": ...} once the fork and everything below it are gone.
A warm worker forks for the next check while nobody asks; that spare gets its check in the same form, over a socket of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from checker.judge import compiled, processes, warming
from checker.judge.events import ask

_TRACE = 0.1  # seconds in which a check that is to be ended may write where it is
_IDLE = 0.05  # seconds without a request before a warm worker forks for the next one: checks in a row need no spare


class Server:
    """Answers requests one after the other until the other end of the socket is closed."""

    def __init__(self, control: socket.socket) -> None:
        self.control, self.buffer, self.fds = control, b"", []
        # the fork that waits for its check, and our end of its socket
        self.spare: tuple[int, socket.socket] | None = None

    def serve(self, later: list[Callable[[], None]]) -> None:
        """The loop: receive, fork, wait, end the tree, answer; in idle moments do one thing of `later`, at last make a spare fork."""
        warm = bool(later)
        while True:
            while later and not self.asked():
                later.pop(0)()
            if warm and not self.asked(_IDLE):
                self.prepare()
            message = self.receive()
            if message is None:
                processes.end_descendants(os.getpid())
                return
            if "request" in message:
                self.check(message["request"])
                if warm and not later:
                    later += compiled.steps(Path(message["request"]["reference"]))

    def asked(self, within: float = 0.0) -> bool:
        """Whether a message waits, or comes within some seconds."""
        return b"\n" in self.buffer or bool(select.select([self.control], [], [], within)[0])

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
        pid = self.hand_over(request, [events, output, trace])
        if pid is None:
            pid = os.fork()
            if pid == 0:
                self.run(request, [events, output, trace])
        for fd in (events, output, trace):
            os.close(fd)
        status, why = self.wait(pid)
        rounds = processes.end_descendants(os.getpid())
        processes.reap()
        self.answer({"ended": {"status": status, "why": why, "left": rounds}})

    def run(self, request: dict[str, Any], fds: list[int]) -> NoReturn:
        """Be the fork of one check."""
        self.control.close()
        processes.die_with_parent()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        from checker.judge import child

        child.main(request, *fds)

    def prepare(self) -> None:
        """Fork for the next check already now: the fork rehearses, says that it is ready, and waits for its check.

        It holds nothing of a kata: what it rehearses with is trivial. If it fails, the next check gets a fork of its own.
        """
        if self.spare is not None or processes.threads() != 1:
            return
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid:
            theirs.close()
            self.spare = pid, ours
            return
        try:
            self.control.close()
            ours.close()
            processes.die_with_parent()
            warming.rehearse()
            theirs.sendall(b".")
            fork = Server(theirs)
            message = fork.receive()
            if message is not None:
                fork.run(message["request"], fork.fds)
        finally:
            os._exit(70)

    def hand_over(self, request: dict[str, Any], fds: list[int]) -> int | None:
        """Give a check to the fork that waits for one; its process, or None if none is ready."""
        if self.spare is None:
            return None
        (pid, spare), self.spare = self.spare, None
        with spare, contextlib.suppress(OSError):
            spare.setblocking(False)
            if spare.recv(1):  # else it is gone; a BlockingIOError says that it is still at its rehearsal
                spare.settimeout(1.0)
                ask(spare, request, fds)
                return pid
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        return None

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
                if message is not None and why != "cancelled" and processes.WHERE is not None:
                    with contextlib.suppress(OSError):
                        os.kill(pid, processes.WHERE)
                    time.sleep(_TRACE)
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
    warming.preload()
    server.answer({"ready": {"threads": processes.threads(), "pid": os.getpid(), "program": __file__}})
    server.serve(warming.steps() if warm else [])


main()
