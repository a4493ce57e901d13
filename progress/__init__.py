"""The store of what the learner did; `progress.transfer`, which few commands need, writes and reads exports."""

from progress.errors import StoreError
from progress.records import (
    REASONS,
    Attempt,
    Fetch,
    Hint,
    KataProgress,
    Snapshot,
    SolutionSeen,
    now,
    source_sha,
)
from progress.store import Store

__all__ = [
    "REASONS",
    "Attempt",
    "Fetch",
    "Hint",
    "KataProgress",
    "Snapshot",
    "SolutionSeen",
    "Store",
    "StoreError",
    "now",
    "source_sha",
]
