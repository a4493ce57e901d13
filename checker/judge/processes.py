"""Process trees: who descends from a process, how all of them are ended, and what the kernel can do for us. No torch here."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterable

LINUX = sys.platform.startswith("linux")
WHERE = getattr(signal, "SIGUSR1", None)  # at this signal a check writes where its threads are
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def _prctl(option: int, value: int) -> bool:
    if not LINUX:
        return False
    try:
        return ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) == 0
    except (OSError, AttributeError):
        return False


def adopt_orphans() -> bool:
    """Become the parent of every descendant whose own parent ends; True if the system can do it."""
    return _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent() -> bool:
    """Be killed when the parent process ends; True if the system can do it."""
    return _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def children(pid: int) -> list[int]:
    """The direct children of a process (all its threads)."""
    found: list[int] = []
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{thread}/children") as file:
                found += [int(word) for word in file.read().split()]
    except OSError:
        pass
    return found


def descendants(pid: int, but: Iterable[int] = ()) -> list[int]:
    """All processes below `pid`, without those of `but` and what is below them."""
    skipped, found, todo = set(but), [], [pid]
    while todo:
        for child in children(todo.pop()):
            if child not in skipped:
                found.append(child)
                todo.append(child)
    return found


def reap() -> None:
    """Collect ended children, so that no zombie is left."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def end_descendants(pid: int, but: Iterable[int] = (), patience: float = 5.0) -> int:
    """Stop, then kill everything below `pid` until nothing is left; returns how many rounds it took.

    Ends at once where /proc is not there (the caller kills the process group as well).
    """
    deadline, rounds, skipped = time.monotonic() + patience, 0, set(but)
    while time.monotonic() < deadline:
        below = [child for child in descendants(pid, skipped) if not _is_zombie(child)]
        if not below:
            return rounds
        rounds += 1
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for child in below:
                with contextlib.suppress(OSError):
                    os.kill(child, number)
        time.sleep(0.002)
        if pid == os.getpid():
            _reap_only(below)
    return rounds


def reap_orphans(but: Iterable[int]) -> None:
    """Collect ended children that came to this process because their own parent ended; `but` are left to their owners."""
    for pid in [pid for pid in children(os.getpid()) if pid not in set(but) and _is_zombie(pid)]:
        deadline = time.monotonic() + 2.0
        # a process looks like a zombie when its first thread has ended, but can be collected only when all have
        while time.monotonic() < deadline:
            try:
                if os.waitpid(pid, os.WNOHANG)[0]:
                    break
            except ChildProcessError:
                break
            time.sleep(0.002)


def _reap_only(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(OSError):
            os.waitpid(pid, os.WNOHANG)


def _is_zombie(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] in ("Z", "X")
    except (OSError, IndexError):
        return True


def threads(pid: int | None = None) -> int:
    """How many threads a process has (this one by default); 1 where that cannot be seen."""
    try:
        return len(os.listdir(f"/proc/{pid or 'self'}/task"))
    except OSError:
        return 1
