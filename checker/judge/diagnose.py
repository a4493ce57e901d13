"""Names a mistake by its numbers: the failing tests run again with each known wrong solution in the learner's place.

A known wrong solution is named only if it explains every failing test of the task that it can be tried on: the same test fails
at the same assertion with the same value. What fits equally is all named.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from checker.judge import modules
from checker.judge.failures import Failure

if TYPE_CHECKING:
    from checker.judge.plugin import Judge

# A failure of these kinds has a value or an error to compare; the others explain themselves.
COMPARABLE = ("mismatch", "assert", "error", "globals")


@dataclass(frozen=True)
class Misconception:
    """A known wrong `thing` (function or class) that replaces `name`, and the sentence for whoever wrote it."""

    id: str
    name: str
    sentence: str
    thing: Any


def load(folder: Path) -> list[Misconception]:
    """The misconceptions of a kata, in the order of the file."""
    module = modules.load_file("kata_misconceptions", folder / "misconceptions.py")
    found = []
    for key, thing in vars(module).items():
        marked = getattr(thing, "__dict__", {}).get("kata_misconception")
        if marked is not None:
            found.append(Misconception(key, *marked, thing))
    return found


def alternatives(folder: Path, round_number: int) -> dict[str, Any]:
    """The alternatives of one round by the name that they replace; empty when there is no such round."""
    module = modules.load_file("kata_alternatives", folder / "alternatives.py")
    rounds: dict[str, list[Any]] = {}
    for thing in vars(module).values():
        name = getattr(thing, "__dict__", {}).get("kata_alternative")
        if name is not None:
            rounds.setdefault(name, []).append(thing)
    return {name: things[round_number] for name, things in rounds.items() if round_number < len(things)}


def run(judge: Judge) -> None:
    """Send a 'diagnosis' for each task whose failures a known wrong solution explains.

    Each task has an equal share of the time that the request allows; what could not be tried in time is not named.
    """
    failing: dict[str, list[pytest.Item]] = {}
    for item in judge.items:
        failure = judge.results[item.nodeid.partition("::")[2]]
        if failure is not None and failure.kind in COMPARABLE:
            failing.setdefault(item.kata_task, []).append(item)
    allowed = judge.request["limits"]["diagnosis"]
    if not failing or not allowed:
        return
    try:
        known = load(judge.folder)
    except Exception as error:
        judge.send("no_diagnosis", message=f"misconceptions.py: {type(error).__name__}: {error}"[:300])
        return
    share = allowed / len(failing)
    for task, items in failing.items():
        deadline = time.monotonic() + share
        names = judge.tasks[task]["names"]
        blamed = {name: items if len(names) == 1 else _blamed(judge, name, items) for name in names}
        candidates = [item for item in known if item.name in names]
        named = [found for item in candidates for found in _explaining(judge, [item], blamed[item.name], deadline)]
        if named:
            judge.send("diagnosis", task=task, named=named)
    judge.use(judge.module)


def _blamed(judge: Judge, name: str, items: list[pytest.Item]) -> list[pytest.Item]:
    """The failing tests that fail otherwise, or not at all, with the reference's `name` in place: those are about `name`.

    Needed where a task has several names, since a test may fail because of another one of them.
    """
    found = []
    for item in items:
        original = judge.results[item.nodeid.partition("::")[2]]
        right = getattr(judge.reference, name, None)
        module = modules.fresh(judge.slug, judge.source, judge.path, {**judge.variant(), name: right})
        judge.use(module)
        failure = judge.run(item)
        if failure is None or not failure.same_as(original):
            found.append(item)
    return found


def _explaining(
    judge: Judge, candidates: list[Misconception], items: list[pytest.Item], deadline: float
) -> Iterator[dict[str, Any]]:
    originals: dict[str, Failure] = {test: failure for test, failure in judge.results.items() if failure is not None}
    for candidate in candidates:
        tried = matched = 0
        for item in items:
            if time.monotonic() > deadline:
                tried = -1
                break
            state = _try(judge, candidate, item, originals[item.nodeid.partition("::")[2]])
            if state is None:
                continue
            tried += 1
            matched += state
            if not state:
                break
        if tried > 0 and tried == matched:
            yield {"id": candidate.id, "sentence": candidate.sentence, "tests": matched, "of": len(items)}


def _try(judge: Judge, candidate: Misconception, item: pytest.Item, original: Failure) -> bool | None:
    """Whether the test fails in the same way with the candidate; None if the candidate cannot be tried on it."""
    try:
        module = modules.fresh(
            judge.slug, judge.source, judge.path, {**judge.variant(), candidate.name: candidate.thing}
        )
    except BaseException:
        return None
    judge.use(module)
    failure = judge.run(item)
    if candidate.name not in judge.solution.used:
        return None
    if failure is None:
        return False
    if failure.kind in ("forbidden", "timeout", "open", "memory"):
        return None
    return failure.same_as(original)
