"""The store of what the learner did."""

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
from progress.transfer import ImportReport, export_json, import_json

__all__ = [
    "REASONS",
    "Attempt",
    "Fetch",
    "Hint",
    "ImportReport",
    "KataProgress",
    "Snapshot",
    "SolutionSeen",
    "Store",
    "StoreError",
    "export_json",
    "import_json",
    "now",
    "source_sha",
]
