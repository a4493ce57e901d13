"""`kata next`, `kata start`, `kata init`: bring exercises into the workspace."""

from __future__ import annotations

from pathlib import Path

from checker import markdown, render
from checker.app import App
from checker.errors import UserError
from checker.track import Kata
from checker.workspace import Workspace
from progress import Store

ALL_PASSED = "All days are passed. `kata status` shows them; `kata start DAY` goes back to one."


def next_(app: App) -> None:
    """Fetch the first day that is not passed yet; show its lesson and where to write."""
    made = open_workspace(app)
    with app.store() as store:
        kata = _following(app, store)
        new = kata is not None and fetch(app, kata, store)
    if kata is None:
        render.say(render.console(), ALL_PASSED)
    else:
        _show(app, kata, made, new)


def start(app: App, day: str) -> None:
    """Fetch a day by name; show its lesson and where to write."""
    kata = app.track.find(day)
    made = open_workspace(app)
    with app.store() as store:
        new = fetch(app, kata, store)
    _show(app, kata, made, new)


def init(app: App, folder: str) -> None:
    """Make `folder` a workspace."""
    workspace = Workspace.create(Path(folder))
    app.__dict__["workspace"] = workspace
    with app.store():
        pass
    render.say(render.console(), f"{workspace.root} is a workspace now; go there and say `kata next`.")


def open_workspace(app: App) -> bool:
    """Use the workspace there is, or make one; True if it is new."""
    found = Workspace.find()
    app.__dict__["workspace"] = found or Workspace.create(Workspace.default())
    return found is None


def fetch(app: App, kata: Kata, store: Store) -> bool:
    """Put the stub into the workspace, unless the day's file is there; True if it was not."""
    workspace = app.workspace
    new = not workspace.fetched(kata)
    if new:
        stub = kata.text("stub.py")
        workspace.write(kata, stub)
    else:
        workspace.read(kata)
    with store.transaction():
        if new:
            store.add_snapshot(kata.id, stub, "fetch")
        store.mark_started(kata.id)
    return new


def fetch_next(app: App) -> Kata:
    """Fetch the first day that is not passed; raises UserError if there is none."""
    with app.store() as store:
        kata = _following(app, store)
        if kata is None:
            raise UserError(ALL_PASSED)
        fetch(app, kata, store)
    return kata


def under_way(app: App) -> Kata:
    """The day whose file was saved last; where there is no workspace or no file yet, the next day, fetched."""
    open_workspace(app)
    slug = app.workspace.last_edited(app.track)
    return app.track.kata(slug) if slug else fetch_next(app)


def _following(app: App, store: Store) -> Kata | None:
    if not app.track.slugs:
        raise UserError(f"The track {app.track.folder} has no katas yet; add one with `kata new`.")
    slug = next(app.track.ahead(store.passed_katas()), None)
    return app.track.kata(slug) if slug else None


def _show(app: App, kata: Kata, made: bool, new: bool) -> None:
    where = render.console()
    markdown.show(kata.text("lesson.md"), where)
    lines = [""]
    if made:
        lines.append(f"{app.workspace.root} is your workspace now.")
    file = _relative(app.workspace.file(kata))
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
