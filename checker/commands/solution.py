"""`kata solution` and `kata diff`: the reference beside the learner's code, after passing."""

from __future__ import annotations

import difflib

import click

from checker import render
from checker.app import App
from checker.errors import NOT_PASSED, UserError
from checker.track import Kata


def solution(app: App, day: str | None, give_up: bool) -> None:
    """Print the reference; before passing only with `give_up`, which is recorded."""
    kata = app.kata(day)
    with app.store() as store:
        passed = store.is_passed(kata.id)
        if not passed and not give_up:
            raise UserError(
                f"Day {kata.day} is not passed yet; `kata hint` helps, and `kata solution {kata.day} --give-up` shows it all the same.",
                exit_code=NOT_PASSED,
            )
        store.saw_solution(kata.id, gave_up=not passed)
    click.echo(kata.reference_file.read_text(encoding="utf-8"), nl=False)


def diff(app: App, day: str | None) -> None:
    """Print what differs from the reference; raises UserError before passing."""
    lines, where = difference(app, app.kata(day)), render.console()
    if lines:
        render.diff(lines, where)
    else:
        render.say(where, "Your code is the reference, line for line.")


def difference(app: App, kata: Kata) -> list[str]:
    """A unified diff from the learner's file to the reference; raises UserError before passing."""
    with app.store() as store:
        if not store.is_passed(kata.id) and kata.id not in store.solutions_seen():
            raise UserError(
                f"Day {kata.day} is not passed yet; `kata diff` shows the reference, so pass it first.",
                exit_code=NOT_PASSED,
            )
    mine = app.workspace.read(kata).splitlines()
    theirs = kata.reference_file.read_text(encoding="utf-8").splitlines()
    return list(difflib.unified_diff(mine, theirs, "yours", "reference", lineterm=""))
