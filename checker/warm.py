"""Checks on a warm worker that lives as long as `kata watch`, and the socket through which other terminals use it.

The worker is the same program as a cold one; it only stays. It is replaced when the program or the installed torch changed,
and where forking is not safe every check starts cold.
"""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import json
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checker
from checker.errors import OurFault
from checker.run import Limits, Output, Run
from checker.worker import Worker, can_fork

SOCKET = "watch.sock"
_BUSY = 3.0  # seconds that a check from another terminal waits for the worker before it starts cold


def program_key() -> tuple[tuple[str, int, int], ...]:
    """What a warm worker has loaded, as (path, time, size): the program, torch, pytest and numpy."""
    files = sorted(Path(checker.__file__).parent.rglob("*.py"))
    for name in ("torch", "pytest", "numpy"):
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin:
            home = Path(spec.origin).parent
            files += [file for file in (Path(spec.origin), home / "version.py") if file.is_file()]
    key = []
    for file in files:
        with contextlib.suppress(OSError):
            facts = file.stat()
            key.append((str(file), facts.st_mtime_ns, facts.st_size))
    return tuple(key)


class WarmChecks:
    """Runs checks one at a time; `cold_because` says why they are not warm, if they are not."""

    def __init__(self) -> None:
        self.cold_because = "" if can_fork() else "forking a process that has loaded torch is not safe on this system"
        self._worker: Worker | None = None
        self._key: tuple[tuple[str, int, int], ...] = ()
        self._lock = threading.Lock()
        self.restarts = 0

    def start(self) -> None:
        """Begin to load torch in the background; returns at once."""
        if not self.cold_because and self._worker is None:
            self._key = program_key()
            self._worker = Worker(warm=True)
            self._worker.start()

    def close(self) -> None:
        """End the worker and everything below it."""
        with self._lock:
            if self._worker is not None:
                self._worker.close()
                self._worker = None

    def run(
        self,
        request: dict[str, Any],
        limits: Limits,
        on_event: Callable[[dict[str, Any]], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Run:
        """One check, warm where possible, else cold."""
        with self._lock:
            if not self.cold_because:
                if self._worker is None or program_key() != self._key:
                    self._replace()
                try:
                    return self._worker.run(request, limits, on_event, cancelled)
                except OurFault as error:
                    self.cold_because = str(error)
                    self._worker.close()
                    self._worker = None
            with Worker() as cold:
                return cold.run(request, limits, on_event, cancelled)

    def _replace(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None
            self.restarts += 1
        self.start()

    def try_run(self, request: dict[str, Any], limits: Limits) -> Run | None:
        """For another terminal: None if the worker is busy for longer than a moment, or if checks are cold here, too."""
        if self.cold_because or not self._lock.acquire(timeout=_BUSY):
            return None
        self._lock.release()
        return self.run(request, limits)


# The socket


class Door:
    """Listens on `.kata/watch.sock` while `kata watch` runs; readable by the user alone."""

    def __init__(self, folder: Path, checks: WarmChecks) -> None:
        self.path, self.checks = folder / SOCKET, checks
        self._socket: socket.socket | None = None

    def open(self) -> bool:
        """Begin to listen; False if another watch listens already or the folder does not take a socket."""
        guest = connect(self.path.parent)
        if guest is not None:
            guest.close()
            return False
        try:
            with contextlib.suppress(FileNotFoundError):
                self.path.unlink()
            listening = socket.socket(socket.AF_UNIX)
            mask = os.umask(0o177)
            try:
                listening.bind(_short(self.path))
            finally:
                os.umask(mask)
            listening.listen(4)
        except (OSError, AttributeError):
            return False
        self._socket = listening
        threading.Thread(target=self._listen, name="kata-door", daemon=True).start()
        return True

    def close(self) -> None:
        """Stop listening and remove the socket."""
        listening, self._socket = self._socket, None
        if listening is not None:
            with contextlib.suppress(OSError):
                listening.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits in accept
            listening.close()
            with contextlib.suppress(OSError):
                self.path.unlink()

    def _listen(self) -> None:
        while self._socket is not None:
            try:
                guest, _ = self._socket.accept()
            except (OSError, AttributeError):  # closed meanwhile
                return
            threading.Thread(target=self._serve, args=(guest,), daemon=True).start()

    def _serve(self, guest: socket.socket) -> None:
        with guest, contextlib.suppress(OSError, ValueError, TypeError, KeyError, OurFault):
            guest.settimeout(10)
            with guest.makefile("rwb") as stream:
                asked = json.loads(stream.readline())
                if "check" not in asked:
                    stream.write(b"{}\n")
                    return
                run = self.checks.try_run(asked["check"], Limits(**asked["limits"]))
                guest.settimeout(None)
                stream.write(json.dumps({"run": None if run is None else pack(run)}).encode() + b"\n")


def _short(path: Path) -> str:
    """A path that fits into a socket's address (about 100 bytes), relative to the current folder if that is shorter."""
    return min((str(path), os.path.relpath(path)), key=len)


def connect(folder: Path) -> socket.socket | None:
    """A connection to the watch of this workspace, or None."""
    if not hasattr(socket, "AF_UNIX"):
        return None
    guest = socket.socket(socket.AF_UNIX)
    try:
        guest.settimeout(2)
        guest.connect(_short(folder / SOCKET))
    except OSError:
        guest.close()
        return None
    return guest


def through_watch(folder: Path, request: dict[str, Any], limits: Limits) -> Run | None:
    """Run a check on the worker of a running watch; None, without a word, if there is none or it cannot."""
    guest = connect(folder)
    if guest is None:
        return None
    try:
        with guest, guest.makefile("rwb") as stream:
            guest.settimeout(limits.total + limits.start)
            stream.write(json.dumps({"check": request, "limits": vars(limits)}).encode() + b"\n")
            stream.flush()
            answer = json.loads(stream.readline() or b"{}").get("run")
        return None if answer is None else unpack(answer)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def pack(run: Run) -> dict[str, Any]:
    """A Run as plain data."""
    data = dict(vars(run))
    data["output"] = {
        "head": base64.b64encode(run.output.head).decode(),
        "tail": base64.b64encode(run.output.tail).decode(),
        "total": run.output.total,
    }
    return data


def unpack(data: dict[str, Any]) -> Run:
    """The Run that `pack` made this of."""
    printed = data.pop("output")
    output = Output(base64.b64decode(printed["head"]), base64.b64decode(printed["tail"]), printed["total"])
    return Run(**data, output=output)
