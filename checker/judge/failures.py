"""What a failing test raises, and the plain record that the parent receives of it.

A failure also has a *signature*: the place in the spec and the value that was looked at there.
Two runs with equal signatures failed in the same way, which is how a known wrong solution is recognised.
"""

from __future__ import annotations

import math
import re
import traceback
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch

from checker.judge import describe


class Mismatch(AssertionError):
    """A value that is not what the spec expects.

    `lines` are (label, text) pairs for the learner, in order; `actual` is the value that was looked at.
    """

    def __init__(self, because: str, lines: list[tuple[str, str]], actual: Any = None) -> None:
        super().__init__(because or "; ".join(f"{label} {text}" for label, text in lines))
        self.because, self.lines, self.actual = because, lines, freeze(actual)


class Forbidden(BaseException):
    """A shortcut that the task refuses. Not an Exception, so that the learner's `except` does not swallow it."""

    def __init__(self, name: str, line: int | None, file: str, task: str = "") -> None:
        super().__init__(f"{file}, line {line} calls {name}")
        self.name, self.line, self.file, self.task = name, line, file, task


class MissingName(Exception):
    """The learner's file does not have a name that the stub had."""


class WrongSignature(Exception):
    """A function or class takes other arguments than its stub."""


class SpecFault(Exception):
    """The spec or the reference broke: never the learner's fault."""


def freeze(value: Any) -> Any:
    """A copy of a value that later changes of the original cannot touch."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: freeze(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [freeze(item) for item in value]
    return value


@dataclass
class Failure:
    """Why a test did not pass, as plain data (`record`) and as a signature for comparing runs."""

    kind: str  # mismatch, assert, error, open, forbidden, missing, signature, timeout, memory, skipped, fault
    message: str
    lines: list[tuple[str, str]] = field(default_factory=list)
    line: int | None = None  # in the learner's file
    trace: list[dict[str, Any]] = field(default_factory=list)
    place: int | None = None  # line of the spec
    actual: Any = None
    error: str = ""

    def record(self) -> dict[str, Any]:
        """What the parent gets."""
        return {
            "kind": self.kind,
            "message": self.message[:4000],
            "lines": [[label, text[:2000]] for label, text in self.lines],
            "line": self.line,
            "trace": self.trace,
            "error": self.error,
        }

    def same_as(self, other: Failure) -> bool:
        """Whether the two failed at the same assertion with the same value."""
        if (self.kind, self.place, self.error) != (other.kind, other.place, other.error):
            return False
        if self.kind == "mismatch":
            return same_value(self.actual, other.actual)
        return plain(self.message) == plain(other.message)


def plain(message: str) -> str:
    """A message without addresses and without what differs between two runs of the same mistake."""
    return re.sub(r"0x[0-9a-f]+", "0x", message)


def same_value(one: Any, two: Any) -> bool:
    """Whether two frozen values agree up to rounding, NaN equal to NaN, shapes and dtypes included."""
    if isinstance(one, torch.Tensor) or isinstance(two, torch.Tensor):
        if not (isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor)):
            return False
        if one.shape != two.shape or one.dtype != two.dtype:
            return False
        if not (one.is_floating_point() or one.is_complex()):
            return bool(torch.equal(one, two))
        if one.numel() == 0:
            return True
        a, b = one.to(torch.float64), two.to(torch.float64)
        finite = torch.isfinite(b)
        scale = b[finite].abs().max().item() if bool(finite.any()) else 0.0
        loose = {torch.float64: 1e-8, torch.float32: 1e-4}.get(one.dtype, 2e-2)
        return bool(torch.allclose(a, b, rtol=loose, atol=loose * scale * 0.1, equal_nan=True))
    if isinstance(one, dict) and isinstance(two, dict):
        return one.keys() == two.keys() and all(same_value(one[key], two[key]) for key in one)
    if isinstance(one, list) and isinstance(two, list):
        return len(one) == len(two) and all(same_value(a, b) for a, b in zip(one, two, strict=True))
    if isinstance(one, float) and isinstance(two, float):
        return (one != one and two != two) or math.isclose(one, two, rel_tol=1e-6)
    if type(one) is not type(two):
        return False
    try:
        return bool(one == two) or plain(repr(one)) == plain(repr(two))
    except Exception:
        return False


def from_exception(
    error: BaseException, trace: TracebackType | None, *, spec: str, learner: dict[str, str], today: str
) -> Failure:
    """The Failure for what a test raised.

    `spec` is the spec's path, `learner` maps the paths of the learner's files to their names, `today` is the path of the day's own.
    """
    frames = traceback.extract_tb(trace)
    place = next((frame.lineno for frame in reversed(frames) if frame.filename == spec), None)
    mine = [frame for frame in frames if frame.filename in learner]
    line = next((frame.lineno for frame in reversed(mine) if frame.filename == today), None)
    shown = [
        {"file": learner[frame.filename], "line": frame.lineno, "in": frame.name, "text": (frame.line or "").strip()}
        for frame in mine[-4:]
    ]
    kind, message, lines, actual = "error", str(error), [], None
    name = type(error).__name__
    if isinstance(error, Forbidden):
        kind, line = "forbidden", error.line
    elif isinstance(error, Mismatch):
        kind, message, lines, actual = "mismatch", error.because, error.lines, error.actual
    elif isinstance(error, NotImplementedError) and _raised_by(frames, learner):
        kind, message = "open", f"{mine[-1].name} is not written yet"
    elif isinstance(error, (MissingName, WrongSignature)):
        kind = "missing" if isinstance(error, MissingName) else "signature"
    elif isinstance(error, SpecFault):
        kind = "fault"
    elif name == "Skipped":
        kind = "skipped"
    elif name == "Failed" and "Timeout" in message:
        kind, message = (
            "timeout",
            re.sub(r"Timeout \(?>?\s*([\d.]+)\s*s\)?.*", r"took longer than \1 s", message, flags=re.S),
        )
    elif isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "can't allocate memory" in message):
        kind, message = "memory", _memory(message)
    elif name in ("BdbQuit", "EOFError"):
        left = "breakpoint()" if name == "BdbQuit" else "input()"
        message = f"{left} is left in: a check has no keyboard, so remove it"
    elif isinstance(error, AssertionError):
        kind = "assert" if not mine else "error"
        message = message.split("\n")[0]
    elif not mine and not _from_call(frames, spec):
        kind = "fault"
    return Failure(kind, message, lines, line, shown, place, actual, "" if kind == "mismatch" else name)


def _raised_by(frames: traceback.StackSummary, learner: dict[str, str]) -> bool:
    """Whether the error comes from a `raise` in the learner's file, and not from an operation that torch does not have."""
    return bool(frames) and frames[-1].filename in learner and (frames[-1].line or "").strip().startswith("raise")


def _from_call(frames: traceback.StackSummary, spec: str) -> bool:
    """Whether an error came up while the spec called or looked at the learner's things (and not in pytest itself)."""
    return any(frame.filename == spec for frame in frames)


def _memory(message: str) -> str:
    asked = re.search(r"allocate (\d+) bytes", message)
    return f"asked for {int(asked[1]) / 1e9:.1f} GB at once" if asked else "ran out of the memory that a check may use"


def summarize(value: Any) -> str:
    """A returned value in a few words."""
    return describe.value(value)
