"""Move what a learner did between machines, as JSON: a union, so that it can be repeated."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

from progress.errors import StoreError
from progress.records import Attempt, Fetch, Hint, Snapshot, SolutionSeen, source_sha
from progress.store import Store

FORMAT = "torch-katas progress"
VERSION = 1

_SECTIONS = {
    "attempts": Attempt,
    "snapshots": Snapshot,
    "hints": Hint,
    "solutions": SolutionSeen,
    "fetches": Fetch,
}


@dataclass(frozen=True)
class ImportReport:
    """How many records were new, and how many were in the store already (`skipped`)."""

    attempts: int
    snapshots: int
    hints: int
    skipped: int
    solutions: int = 0
    fetches: int = 0


def export_json(store: Store) -> dict[str, Any]:
    """Everything in the store, oldest first, as what `json.dump` takes; each source once, as text."""
    attempts = store.attempts()[::-1]  # before the snapshots, so that a check that ends meanwhile lacks none
    snapshots = store.snapshots()[::-1]
    return {
        "format": FORMAT,
        "version": VERSION,
        "sources": {shot.sha: shot.source for shot in snapshots},
        "attempts": [asdict(attempt) for attempt in attempts],
        "snapshots": [_without_source(shot) for shot in snapshots],
        "hints": [asdict(hint) for hint in store.hints()],
        "solutions": [asdict(fact) for fact in store.solution_history()],
        "fetches": [asdict(fact) for fact in store.fetches()],
    }


def import_json(store: Store, data: Any) -> ImportReport:
    """Merge what `export_json` gave: all of it or, where anything in it is wrong, nothing."""
    records = _read(data)
    with store.transaction():
        before = store.counts()
        for attempt in records["attempts"]:
            store.add_attempt(attempt)
        for shot in records["snapshots"]:
            store.add_snapshot(shot.kata, shot.source, shot.reason, taken=shot.taken)
        for hint in records["hints"]:
            store.take_hint(hint.kata, hint.task, hint.rung, taken=hint.taken)
        for fact in records["solutions"]:
            store.saw_solution(fact.kata, fact.gave_up, seen=fact.seen)
        for fact in records["fetches"]:
            store.mark_started(fact.kata, fetched=fact.fetched)
        after = store.counts()
    new = {section: after[section] - before[section] for section in _SECTIONS}
    return ImportReport(**new, skipped=sum(map(len, records.values())) - sum(new.values()))


def _read(data):
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise StoreError("This is not an export of torch-katas: choose a file that kata export wrote.")
    version = _get(data, "version", "the export")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise StoreError(f"The export has the version {version!r:.40}, which is none: export it again.")
    if version > VERSION:
        raise StoreError(
            f"The export has version {version}, this program knows up to {VERSION}: "
            "update it (pip install --upgrade torch-katas)."
        )
    sources = _sources(_get(data, "sources", "the export"))
    records = {}
    for section, kind in _SECTIONS.items():
        entries = _get(data, section, "the export")
        if not isinstance(entries, list):
            raise StoreError(f"The {section} of the export must be a list: export it again.")
        make: Callable = kind
        records[section] = [
            _record(make, entry, f"{section}[{number}]", sources) for number, entry in enumerate(entries)
        ]
    return records


def _sources(sources):
    if not isinstance(sources, dict):
        raise StoreError("The sources of the export must be a mapping: export it again.")
    for sha, source in sources.items():
        if not isinstance(source, str):
            raise StoreError(f"The source {sha!r:.40} of the export must be a text: export it again.")
        if source_sha(source) != sha:
            raise StoreError(f"The source {sha!r:.40} of the export is not the one that was exported: export it again.")
    return sources


def _record(kind, entry, where, sources):
    if not isinstance(entry, dict):
        raise StoreError(f"{where} of the export must be a mapping: export it again.")
    if kind is Snapshot:
        sha = _get(entry, "sha", where)
        if not isinstance(sha, str) or sha not in sources:
            raise StoreError(f"{where} of the export names the source {sha!r:.40}, which is missing: export it again.")
        entry = {**entry, "source": sources[sha]}
    values = {field.name: _get(entry, field.name, where) for field in fields(kind)}
    try:
        return kind(**values)
    except ValueError as error:
        raise StoreError(f"{where} of the export is wrong ({error}): export it again.") from error


def _get(mapping, key, where):
    if key not in mapping:
        raise StoreError(f"The key {key!r} is missing in {where}: export it again.")
    return mapping[key]


def _without_source(shot):
    return {"sha": shot.sha, "kata": shot.kata, "taken": shot.taken, "reason": shot.reason}
