"""What a check may use and what it gave: plain records between the worker and the verdict."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Limits:
    """What one check may use. Times in seconds, sizes in bytes; `memory` is address space above the worker's own, 0 for no limit."""

    total: float = 60.0
    import_: float = 20.0
    start: float = 180.0
    diagnosis: float = 6.0
    memory: int = 6 << 30
    output: int = 16 << 20
    file_bytes: int = 512 << 20
    processes: int = 100

    def to_json(self) -> dict[str, Any]:
        """The record that the worker receives."""
        data = asdict(self)
        data["import"] = data.pop("import_")
        return data


@dataclass
class Output:
    """What the learner's code printed: the first and the last bytes, and how much it was."""

    head: bytes = b""
    tail: bytes = b""
    total: int = 0
    keep: int = 8192

    def add(self, data: bytes) -> None:
        """Take more of it."""
        self.total += len(data)
        room = self.keep - len(self.head)
        if room > 0:
            self.head += data[:room]
            data = data[room:]
        self.tail = (self.tail + data)[-self.keep :]

    def text(self) -> str:
        """Both ends, with a note of what is left out between them."""
        left_out = self.total - len(self.head) - len(self.tail)
        middle = f"\n... {left_out:,} bytes left out ...\n".encode() if left_out > 0 else b""
        return (self.head + middle + self.tail).decode("utf-8", errors="replace")


@dataclass
class Run:
    """Everything that one check gave: sealed events in order, output, and its end.

    `ended` is 'done', or what ended it early: 'exit', 'signal', 'timeout', 'output', 'processes', 'cancelled', 'worker'.
    """

    events: list[dict[str, Any]] = field(default_factory=list)
    output: Output = field(default_factory=Output)
    ended: str = "done"
    status: int | None = None
    test: str | None = None  # the test that ran when it ended early
    phase: str = "starting"
    trace: str = ""
    forged: int = 0
    seconds: float = 0.0
    worker_log: str = ""

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The events of one kind."""
        return [event for event in self.events if event["event"] == kind]

    def first(self, kind: str) -> dict[str, Any] | None:
        """The first event of one kind, or None."""
        return next((event for event in self.events if event["event"] == kind), None)
