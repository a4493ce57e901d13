"""`kata history`, `kata restore`, `kata reset`: nothing that was written is lost."""

from __future__ import annotations

import datetime

from checker import render
from checker.app import App
from checker.errors import UserError
from checker.track import Kata
from progress import Store


def history(app: App, day: str | None, limit: int) -> None:
    """List attempts, newest first, then snapshots that belong to no attempt."""
    kata, where = app.kata(day), render.console()
    with app.store() as store:
        attempts = store.attempts(kata.id, limit)
        others = [item for item in store.snapshots(kata.id) if item.reason not in ("check", "fetch")][:limit]
    if not attempts and not others:
        render.say(where, f"Day {kata.day} was not checked yet; `kata check {kata.day}` makes the first entry.")
        return
    rows = []
    for item in attempts:
        done = sum(state == "passed" for state in item.tasks.values())
        rows.append(
            (
                _time(item.started),
                item.outcome,
                f"{done} of {len(item.tasks)}",
                item.device,
                str(item.seed),
                (item.snapshot or "")[:8],
            )
        )
    rows += [(_time(item.taken), f"before {item.reason}", "", "", "", item.sha[:8]) for item in others]
    rows.sort(key=lambda row: row[0], reverse=True)
    render.table(("when", "outcome", "tasks", "device", "seed", "snapshot"), rows, where)
    render.say(where, "", f"  `kata restore SNAPSHOT --day {kata.day}` puts one back.")


def restore(app: App, prefix: str, day: str | None) -> None:
    """Put a snapshot back; what is there now is kept first."""
    kata = app.kata(day)
    with app.store() as store:
        found = {item.sha: item for item in store.find_snapshots(kata.id, prefix.lower())}
        if len(found) != 1:
            why = "is not unique" if found else f"is none of day {kata.day}"
            raise UserError(f"The snapshot {prefix!r} {why}; `kata history {kata.day}` lists them.")
        source = next(iter(found.values())).source
        kept = _keep(app, kata, store, "restore")
        app.workspace.write(kata, source)
    render.say(render.console(), f"{kata.file_name} is again as in {next(iter(found))[:8]}.{kept}")


def reset(app: App, day: str | None) -> None:
    """Put the stub back; what is there now is kept first."""
    kata = app.kata(day)
    with app.store() as store:
        kept = _keep(app, kata, store, "reset")
        app.workspace.write(kata, kata.text("stub.py"))
    render.say(render.console(), f"{kata.file_name} is the stub again.{kept}")


def _keep(app: App, kata: Kata, store: Store, reason: str) -> str:
    """Snapshot the learner's file, if there is one; raises before anything is lost."""
    if not app.workspace.fetched(kata):
        return ""
    sha = store.add_snapshot(kata.id, app.workspace.read(kata), reason)
    return f" What was there is kept: `kata restore {sha[:8]} --day {kata.day}`."


def _time(text: str) -> str:
    return datetime.datetime.fromisoformat(text.replace("Z", "+00:00")).astimezone().strftime("%Y-%m-%d %H:%M:%S")
