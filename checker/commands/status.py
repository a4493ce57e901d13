"""`kata status`: the way so far, phase by phase."""

from __future__ import annotations

import datetime

from checker import render
from checker.app import App
from checker.errors import UserError
from checker.track import Kata
from checker.workspace import Workspace
from progress import KataProgress


def status(app: App) -> None:
    """Show phases with bars, what is under way, and what is next."""
    where = render.console()
    render.status(*overview(app), where)


def overview(app: App) -> tuple[str, str, list[tuple[int, str, int, int, str]], str]:
    """(title, facts, a row per phase, next step)."""
    track = app.track
    progress: dict[str, KataProgress] = {}
    since, seconds, passed, seen = None, 0.0, set(), {}
    if Workspace.find() is not None:
        with app.store() as store:
            progress, passed, since, seconds = (
                store.progress(),
                store.passed_katas(),
                store.first_day(),
                store.total_seconds(),
            )
            seen = store.solutions_seen()
    rows, following = [], None
    for phase in track.phases:
        ids = {slug: track.id_of(slug) for slug in phase.slugs}
        ahead = [slug for slug, key in ids.items() if key not in passed]
        tried = next((slug for slug in ahead if _tried(progress.get(ids[slug]))), None)
        if following is None and ahead:
            following = track.kata(ahead[0])
        now = _under_way(track.kata(tried), progress[ids[tried]]) if tried else ""
        rows.append((phase.number, phase.title, len(ids) - len(ahead), len(ids), now))
    done = sum(row[2] for row in rows)
    facts = [f"{done} of {len(track.slugs)} days"]
    if seconds >= 60:
        facts.append(_hours(seconds))
    if since:
        facts.append(f"since {_date(since)}")
    if any(item.gave_up for item in seen.values()):
        facts.append(f"{sum(item.gave_up for item in seen.values())} given up")
    if not track.slugs:
        raise UserError(f"The track {track.folder} has no katas yet; add one with `kata new`.")
    if following is None:
        step = "all days are passed"
    else:
        verb = "kata check" if _tried(progress.get(following.id)) else "kata next"
        step = f"{verb}: day {following.day}, {following.title}, about {following.minutes} minutes"
    return track.title, "   ".join(facts), rows, step


def _tried(state: KataProgress | None) -> bool:
    return state is not None and state.attempts > 0


def _under_way(kata: Kata, state: KataProgress) -> str:
    core = [task.name for task in kata.core]
    done = sum(state.tasks.get(name) == "passed" for name in core)
    return f"day {kata.day}: {done} of {len(core)} core tasks"


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h of checks" if seconds >= 3600 else f"{seconds / 60:.0f} min of checks"


def _date(text: str) -> str:
    day = datetime.datetime.fromisoformat(text.replace("Z", "+00:00")).astimezone()
    return f"{day.day} {day:%b %Y}"
