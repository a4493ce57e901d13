"""`kata export` and `kata import`: progress between machines, as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from checker import render
from checker.app import App
from checker.errors import NOT_PASSED, UserError
from checker.workspace import write_whole
from progress import StoreError
from progress.transfer import export_json, import_json


def export(app: App, file: str) -> None:
    """Write everything that the store has."""
    with app.store() as store:
        text = json.dumps(export_json(store), indent=1, sort_keys=True) + "\n"
    if file == "-":
        click.echo(text, nl=False)
        return
    write_whole(Path(file).expanduser().absolute(), text)
    render.say(
        render.console(), f"Your progress is in {file}; `kata import {Path(file).name}` merges it on another machine."
    )


def import_(app: App, file: str) -> None:
    """Merge an export; importing twice changes nothing."""
    try:
        text = sys.stdin.read() if file == "-" else Path(file).expanduser().read_text(encoding="utf-8")
        data = json.loads(text)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from None
    except ValueError:
        raise UserError(f"{file} is not an export of `kata export`: it is not JSON.") from None
    with app.store() as store:
        try:
            report = import_json(store, data)
        except StoreError as error:
            raise UserError(f"{file} was not imported: {error}", exit_code=NOT_PASSED) from None
    render.say(
        render.console(),
        f"Merged {report.attempts} attempts, {report.snapshots} snapshots and {report.hints} hints; {report.skipped} were here already.",
    )
