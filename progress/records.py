"""Plain records of what a learner did; a record that exists is well formed."""

import hashlib
import math
import re
from dataclasses import dataclass, field
from datetime import datetime, timezone

REASONS = frozenset({"check", "reset", "restore", "fetch", "solution", "import"})
"""Why a snapshot may have been taken."""

_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]+)?Z")
_SHA = re.compile(r"[0-9a-f]{64}")


def now() -> str:
    """The time as every record writes it: ISO 8601, UTC, microseconds, Z."""
    return datetime.now(timezone.utc).isoformat(timespec="microseconds").replace("+00:00", "Z")


def encode(source: str) -> bytes:
    """The bytes of a source; characters of a file that was no UTF-8 (surrogates) are kept too."""
    return source.encode("utf-8", "surrogatepass")


def decode(data: bytes) -> str:
    """The source that `encode` made these bytes of."""
    return data.decode("utf-8", "surrogatepass")


def source_sha(source: str) -> str:
    """The sha256 by which a source is known, in hex; for a UTF-8 file that of its bytes."""
    return hashlib.sha256(encode(source)).hexdigest()


def did_run(state: str) -> bool:
    """True where a task's state tells something about the code; "not run" (no such device) does not."""
    return state.replace("_", " ").replace("-", " ") != "not run"


@dataclass(frozen=True)
class Attempt:
    """One check of one kata.

    `id` is a uuid4 in hex, `tasks` the state of each task that this check looked at, `passed` whether the
    day is passed (all core tasks), `snapshot` the sha of the source, `provenance` whose code ("yours" or
    "reference") was used of each other kata.
    """

    id: str
    kata: str
    started: str
    duration: float
    outcome: str
    tasks: dict[str, str]
    passed: bool
    seed: int
    device: str
    versions: dict[str, str] = field(default_factory=dict)
    snapshot: str | None = None
    provenance: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("id", "kata", "outcome", "device"):
            _check(self, name, "a text that is not empty", _is_text)
        for name in ("tasks", "versions", "provenance"):
            _check(self, name, "a mapping of texts to texts", _is_mapping)
        _check(self, "started", "a UTC time such as 2025-10-03T08:00:00Z", _is_time)
        _check(self, "duration", "a number of seconds", _is_seconds)
        _check(self, "passed", "true or false", _is_bool)
        _check(self, "seed", "a whole number of at most 64 bits", _is_seed)
        if self.snapshot is not None:
            _check(self, "snapshot", "a sha256 in hex or nothing", _is_sha)


@dataclass(frozen=True)
class Snapshot:
    """The source of a day at the time when it was taken, and why it was."""

    sha: str
    kata: str
    taken: str
    reason: str
    source: str = field(repr=False)

    def __post_init__(self) -> None:
        _check(self, "source", "a text", lambda value: isinstance(value, str))
        _check(self, "sha", "the sha256 of the source in hex", _is_sha)
        _check(self, "kata", "a text that is not empty", _is_text)
        _check(self, "taken", "a UTC time such as 2025-10-03T08:00:00Z", _is_time)
        _check(self, "reason", "one of " + ", ".join(sorted(REASONS)), _is_reason)


@dataclass(frozen=True)
class Hint:
    """A hint that was taken, rung 1 being the first."""

    kata: str
    task: str
    rung: int
    taken: str

    def __post_init__(self) -> None:
        for name in ("kata", "task"):
            _check(self, name, "a text that is not empty", _is_text)
        _check(self, "rung", "a whole number from 1", _is_rung)
        _check(self, "taken", "a UTC time such as 2025-10-03T08:00:00Z", _is_time)


@dataclass(frozen=True)
class SolutionSeen:
    """The solution was looked at; `gave_up` where that was before the day was passed."""

    kata: str
    seen: str
    gave_up: bool

    def __post_init__(self) -> None:
        _check(self, "kata", "a text that is not empty", _is_text)
        _check(self, "seen", "a UTC time such as 2025-10-03T08:00:00Z", _is_time)
        _check(self, "gave_up", "true or false", _is_bool)


@dataclass(frozen=True)
class Fetch:
    """A kata was fetched into the workspace."""

    kata: str
    fetched: str

    def __post_init__(self) -> None:
        _check(self, "kata", "a text that is not empty", _is_text)
        _check(self, "fetched", "a UTC time such as 2025-10-03T08:00:00Z", _is_time)


@dataclass(frozen=True)
class KataProgress:
    """Where a learner stands with one kata.

    `passed_at` is the first pass, `tasks` the state of each task in the newest attempt that ran it,
    `ever_passed` the tasks that passed in any attempt, `seconds` the duration of all checks, `last` the
    start of the newest attempt.
    """

    kata: str
    passed_at: str | None
    attempts: int
    tasks: dict[str, str]
    ever_passed: frozenset[str]
    seconds: float
    last: str | None


def _check(record, name, wanted, is_right):
    value = getattr(record, name)
    if not is_right(value):
        raise ValueError(f"{type(record).__name__}.{name} must be {wanted}, not {value!r:.60}")


def _is_string(value):
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_text(value):
    return _is_string(value) and value != ""


def _is_mapping(value):
    return isinstance(value, dict) and all(_is_string(k) and _is_string(v) for k, v in value.items())


def _is_time(value):
    if not isinstance(value, str) or not _TIME.fullmatch(value):
        return False
    try:
        datetime.fromisoformat(value[:19])
    except ValueError:
        return False
    return True


def _is_seconds(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf


def _is_bool(value):
    return isinstance(value, bool)


def _is_seed(value):
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**64


def _is_sha(value):
    return isinstance(value, str) and _SHA.fullmatch(value) is not None


def _is_reason(value):
    return isinstance(value, str) and value in REASONS


def _is_rung(value):
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31
