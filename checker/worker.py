"""Starts the worker process, sends it checks, and gathers what comes back: events, output, and how the process ended.

The parent is the judge of limits: it knows which test is running since when, how much was printed and how many processes there are,
and it ends the whole process tree. It never imports torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checker
from checker.errors import OurFault
from checker.judge import processes
from checker.judge.events import ask, parse
from checker.run import Limits, Run

# What a worker keeps of the environment: no PYTHON*, no PYTEST*, no LD_PRELOAD.
_KEPT = (
    "PATH",
    "HOME",
    "USER",
    "LANG",
    "LANGUAGE",
    "TZ",
    "LD_LIBRARY_PATH",
    "DYLD_LIBRARY_PATH",
    "SYSTEMROOT",
    "TMPDIR",
    "XDG_CACHE_HOME",
)
_KEPT_PREFIXES = ("LC_", "CUDA_", "NVIDIA_", "OPENBLAS_", "PYTORCH_", "HSA_", "ROCR_")
# This program goes behind Python's own modules, but before what is installed: another checkout may be.
_START = (
    "import sys; installed = [n for n, path in enumerate(sys.path) if path.endswith('-packages')]; "
    "sys.path.insert(min(installed, default=len(sys.path)), sys.argv.pop(1)); "
    "import runpy; runpy.run_module('checker.judge', run_name='__main__', alter_sys=True)"
)
# While tests run, events are gathered for this long: a check whose every write wakes us pays 0.1 ms for each, two per test.
_GATHER = 0.02
_GRACE = 1.5  # seconds between a limit and the end of the process tree, so that the softer limit inside can speak first


def environment() -> dict[str, str]:
    """A clean environment for the worker: an allow list, and one thread for every library."""
    kept = {key: value for key, value in os.environ.items() if key in _KEPT or key.startswith(_KEPT_PREFIXES)}
    threads = (
        "OMP_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
        "MKL_NUM_THREADS",
        "NUMEXPR_NUM_THREADS",
        "VECLIB_MAXIMUM_THREADS",
    )
    return {**kept, **dict.fromkeys(threads, "1"), "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}


def can_fork() -> bool:
    """Whether a process that has imported torch can be forked safely on this system."""
    return hasattr(os, "fork") and processes.LINUX


class Worker:
    """A worker process; `with Worker() as worker: worker.run(request, limits)`. A warm one stays for many checks."""

    _alive: set[int] = set()

    def __init__(self, *, warm: bool = False) -> None:
        self.warm = warm
        self.process: subprocess.Popen[bytes] | None = None
        self.control: socket.socket | None = None
        self.ready: dict[str, Any] | None = None
        self._buffer = b""
        self._before: set[int] = set()
        self._log: Any = None

    def __enter__(self) -> Worker:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Start the process; returns at once, long before it is ready."""
        processes.adopt_orphans()
        self._before = set(processes.children(os.getpid()))
        ours, theirs = socket.socketpair()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        root = str(Path(checker.__file__).resolve().parent.parent)
        command = [sys.executable, "-I", "-c", _START, root, str(theirs.fileno())] + (["warm"] if self.warm else [])
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log, pass_fds=[theirs.fileno()],
            env=environment(), cwd="/", start_new_session=True,
        )  # fmt: skip
        Worker._alive.add(self.process.pid)
        theirs.close()
        self.control = ours

    def close(self) -> None:
        """End the process and everything below it."""
        if self.process is None:
            return
        if self.control is not None:
            self.control.close()
        with contextlib.suppress(OSError):
            processes.end_descendants(self.process.pid)
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        Worker._alive.discard(self.process.pid)
        processes.end_descendants(os.getpid(), but=self._before | Worker._alive)
        processes.reap_orphans(but=self._before | Worker._alive)
        self._log.close()
        self.process = self.control = None

    def log(self) -> str:
        """What the worker itself printed: tracebacks of our own faults."""
        self._log.seek(0)
        return self._log.read()[-8000:].decode(errors="replace")

    def run(
        self,
        request: dict[str, Any],
        limits: Limits,
        on_event: Callable[[dict[str, Any]], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Run:
        """Send one check and gather its Run. `on_event` sees each event as it comes; `cancelled` is asked ten times a second.

        Raises OurFault if the worker cannot be started or refuses.
        """
        if self.process is not None and self.process.poll() is not None:
            self.close()
        if self.process is None:
            self.start()
        nonce = secrets.token_hex(16)
        scratch = tempfile.mkdtemp(prefix="kata-")
        try:
            run = _Gathering(
                self,
                {**request, "nonce": nonce, "scratch": scratch, "limits": limits.to_json()},
                limits,
                on_event,
                cancelled,
            ).run()
            if run.ended == "worker":
                self.close()  # whatever is left of it, and what it left
            return run
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def messages(self) -> list[dict[str, Any]]:
        """What arrived on the control socket; raises EOFError when the worker is gone."""
        data = self.control.recv(1 << 16)
        if not data:
            raise EOFError
        self._buffer += data
        *lines, self._buffer = self._buffer.split(b"\n")
        found = [json.loads(line) for line in lines]
        for message in found:
            if "ready" in message:
                self.ready = message["ready"]
        return found


class _Gathering:
    """One check in flight: the select loop over control socket, event pipe and output pipe."""

    def __init__(
        self, worker: Worker, request: dict[str, Any], limits: Limits,
        on_event: Callable[[dict[str, Any]], None] | None, cancelled: Callable[[], bool] | None,
    ) -> None:  # fmt: skip
        self.worker, self.request, self.limits, self.on_event, self.cancelled = (
            worker,
            request,
            limits,
            on_event,
            cancelled,
        )
        self.result = Run()
        self.nonce = request["nonce"]
        self.test_limits = {task["name"]: task["time_limit"] for task in request["kata"]["tasks"]}
        self.tasks: dict[str, str] = {}
        self.pending = b""
        self.deadline = time.monotonic() + limits.start
        self.total: float | None = None
        self.killing: float | None = None
        self.ended: dict[str, Any] | None = None

    def run(self) -> Run:
        started = time.monotonic()
        events, their_events = os.pipe()
        output, their_output = os.pipe()
        trace = tempfile.TemporaryFile()  # noqa: SIM115 - closed below
        self.readers = {"events": events, "output": output}
        try:
            try:
                self.worker.control.setblocking(True)
                ask(self.worker.control, self.request, [their_events, their_output, trace.fileno()])
            except OSError:
                self.result.ended = "worker"
            finally:
                os.close(their_events)
                os.close(their_output)
            if self.result.ended != "worker":
                self._loop()
            trace.seek(0)
            self.result.trace = trace.read()[-20000:].decode(errors="replace")
        finally:
            os.close(events)
            os.close(output)
            trace.close()
        self.result.seconds = time.monotonic() - started
        if self.result.ended == "worker":
            self.result.worker_log = self.worker.log()
        return self.result

    def _loop(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self.worker.control, selectors.EVENT_READ, "control")
            for name, fd in self.readers.items():
                os.set_blocking(fd, False)
                selector.register(fd, selectors.EVENT_READ, name)
            while self.ended is None and self.result.ended != "worker":
                ready = [key for key, _ in selector.select(0.1)]
                for key in ready:
                    if key.data == "control":
                        self._control()
                    elif not self._read(key.data):
                        selector.unregister(key.fd)
                self._watch_limits()
                if self.result.phase == "testing" and [key.data for key in ready] == ["events"]:
                    select.select([self.worker.control], [], [], _GATHER)
            for name in ("output", "events"):
                while self._read(name):
                    pass
        self._conclude()

    def _control(self) -> None:
        try:
            for message in self.worker.messages():
                if "ended" in message:
                    self.ended = message["ended"]
                elif "refused" in message:
                    raise OurFault(message["refused"])
        except (EOFError, OSError):
            self.result.ended = "worker"

    def _read(self, name: str) -> bool:
        """Read what is there; False when there is nothing more, now or ever."""
        try:
            data = os.read(self.readers[name], 1 << 16)
        except (BlockingIOError, OSError):
            return False
        if not data:
            return False
        if name == "output":
            self.result.output.add(data)
            return True
        self._read_output_first()
        *lines, self.pending = (self.pending + data).split(b"\n")
        for line in lines:
            event = parse(line, self.nonce, len(self.result.events))
            if event is None:
                self.result.forged += 1
            else:
                self._event(event)
        return True

    def _read_output_first(self) -> None:
        while self._read("output"):
            if self.result.output.total > self.limits.output:
                break

    def _event(self, event: dict[str, Any]) -> None:
        now, kind, result = time.monotonic(), event["event"], self.result
        result.events.append(event)
        if kind == "ready":
            self.total = now + self.limits.total + _GRACE
            self.deadline, result.phase = now + self.limits.import_ + _GRACE, "collecting"
        elif kind == "collected":
            self.tasks = {test["id"]: test["task"] for test in event["tests"]}
        elif kind == "importing":
            self.deadline, result.phase = now + self.limits.import_ + _GRACE, "importing"
        elif kind == "start":
            limit = self.test_limits.get(self.tasks.get(event["test"], ""), 10.0)
            self.deadline, result.phase, result.test = now + limit + _GRACE, "testing", event["test"]
        elif kind in ("imported", "finish"):
            self.deadline, result.test = self.total, None
        elif kind in ("outcomes", "mutant"):
            extra = self.limits.diagnosis + 10 if kind == "outcomes" else self.limits.total
            self.deadline = self.total = now + extra
            result.phase, result.test = "after", None
        if self.on_event is not None:
            self.on_event(event)

    def _watch_limits(self) -> None:
        now = time.monotonic()
        if self.killing is not None:
            if now > self.killing:
                self.result.ended = "worker" if self.result.ended == "done" else self.result.ended
                self.ended = {"status": None}
                self.worker.close()
            return
        reason = ""
        if now > min(self.deadline, self.total or self.deadline):
            reason = "timeout"
        elif self.result.output.total > self.limits.output:
            reason = "output"
        elif self.cancelled is not None and self.cancelled():
            reason = "cancelled"
        elif processes.LINUX and len(processes.descendants(self.worker.process.pid)) > self.limits.processes:
            reason = "processes"
        if reason:
            self.kill(reason)

    def kill(self, reason: str) -> None:
        """Ask the worker to end the check; if it does not answer, everything is ended from here."""
        self.result.ended = reason
        self.killing = time.monotonic() + 2.0
        try:
            self.worker.control.sendall(json.dumps({"kill": reason}).encode() + b"\n")
        except OSError:
            self.killing = 0.0

    def _conclude(self) -> None:
        result = self.result
        if result.ended == "done" and self.ended is not None and not result.of("done"):
            status = self.ended.get("status")
            result.status = status
            if status is not None and os.WIFSIGNALED(status):
                result.ended, result.status = "signal", os.WTERMSIG(status)
            else:
                result.ended, result.status = "exit", os.waitstatus_to_exitcode(status) if status is not None else None
