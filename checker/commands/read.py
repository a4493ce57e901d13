"""`kata lesson` and `kata hint`."""

from __future__ import annotations

from checker import markdown, render
from checker.app import App
from checker.authoring import Hints
from checker.errors import UserError
from checker.track import Kata, Task
from progress import Store


def lesson(app: App, day: str | None) -> None:
    """Show a day's lesson; a day that is named needs no workspace."""
    markdown.show(app.kata(day).text("lesson.md"), render.console())


def hint(app: App, name: str | None, day: str | None) -> None:
    """Show the rungs taken so far and one more."""
    markdown.show(next_hint(app, app.kata(day), name), render.console())


def next_hint(app: App, kata: Kata, name: str | None) -> str:
    """Take one more rung of a task (default: the first that is not passed), and give all taken rungs as Markdown."""
    with app.store() as store:
        task = kata.task(name) if name else _stuck(kata, store)
        rungs = Hints.read(kata).rungs.get(task.name, ())
        if not rungs:
            raise UserError(f"{kata.slug} has no hints for {task.name}.")
        before = store.hints_taken(kata.id).get(task.name, 0)
        taken = min(before + 1, len(rungs))
        if taken > before:
            store.take_hint(kata.id, task.name, taken)
    lines = [f"## {task.name}: hint {taken} of {len(rungs)}", ""]
    lines += [f"{number}. {text}" for number, text in enumerate(rungs[:taken], 1)]
    if taken == len(rungs):
        words = "That was the last one" if before < taken else "There are no more"
        lines += ["", f"{words}; `kata lesson {kata.day}` has the idea behind them."]
    return "\n".join(lines)


def _stuck(kata: Kata, store: Store) -> Task:
    """The first task, core ones before others, that is not passed yet; raises UserError if all are."""
    states = store.progress().get(kata.id)
    passed = {name for name, state in states.tasks.items() if state == "passed"} if states else set()
    for task in [*kata.core, *kata.tasks]:
        if task.name not in passed:
            return task
    raise UserError(
        f"Every task of day {kata.day} is passed; name one for its hints: {', '.join(t.name for t in kata.tasks)}."
    )
