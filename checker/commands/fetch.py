"""`kata next`, `kata start`, `kata init`: bring exercises into the workspace."""

from __future__ import annotations

from pathlib import Path

from checker import render
from checker.app import App
from checker.errors import UserError
from checker.track import Kata
from checker.workspace import Workspace


def next_(app: App) -> None:
    """Fetch the first day that is not passed yet; show its lesson and where to write."""
    made = _workspace(app)
    if not app.track.slugs:
        raise UserError(f"The track {app.track.folder} has no katas yet; add one with `kata new`.")
    with app.store() as store:
        passed = store.passed_katas()
    for kata in app.track:
        if kata.id not in passed:
            _fetch(app, kata, made)
            return
    where = render.console()
    render.say(
        where,
        f"All {len(app.track.slugs)} days are passed. `kata status` shows them; `kata start DAY` goes back to one.",
    )


def start(app: App, day: str) -> None:
    """Fetch a day by name."""
    kata = app.track.find(day)
    _fetch(app, kata, _workspace(app))


def init(app: App, folder: str) -> None:
    """Make `folder` a workspace."""
    workspace = Workspace.create(Path(folder))
    app.__dict__["workspace"] = workspace
    with app.store():
        pass
    render.say(render.console(), f"{workspace.root} is a workspace now; go there and say `kata next`.")


def _workspace(app: App) -> bool:
    """Use the workspace there is, or make one; True if it is new."""
    found = Workspace.find()
    app.__dict__["workspace"] = found or Workspace.create(Workspace.default())
    return found is None


def _fetch(app: App, kata: Kata, made: bool) -> None:
    workspace, where = app.workspace, render.console()
    new = not workspace.fetched(kata)
    if new:
        stub = kata.text("stub.py")
        workspace.write(kata, stub)
        with app.store() as store:
            store.add_snapshot(kata.id, stub, "fetch")
            store.mark_started(kata.id)
    else:
        workspace.read(kata)
        with app.store() as store:
            store.mark_started(kata.id)
    render.markdown(kata.text("lesson.md"), where)
    lines = [""]
    if made:
        lines.append(f"{workspace.root} is your workspace now.")
    file = _relative(workspace.file(kata))
    if new:
        lines.append(f"Day {kata.day} is fetched: write your code in {file}, then say `kata check`.")
    else:
        lines.append(
            f"Day {kata.day} was fetched before and is as you left it: {file}; `kata check` says where you stand."
        )
    lines.append(f"It takes about {kata.minutes} minutes; `kata hint` helps, `kata lesson` shows this again.")
    render.say(where, *lines)


def _relative(file: Path) -> str:
    try:
        return str(file.relative_to(Path.cwd()))
    except ValueError:
        return str(file)
