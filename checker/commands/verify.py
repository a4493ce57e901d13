"""`kata verify`: the instructor's proof, kata by kata."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import click

from checker import proof
from checker.app import App
from checker.errors import NOT_PASSED, PASSED
from checker.track import Kata, load_kata
from checker.verify import Report, Step, verify
from checker.worker import Worker, can_fork


def run(app: App, names: tuple[str, ...], *, fresh: bool, stale: bool) -> int:
    """Prove the named katas, all by default; the exit code is 0 if every proof holds."""
    katas = [_find(app, name) for name in names] or list(app.track)
    if stale:
        old = [kata.slug for kata in katas if not proof.is_fresh(app.track, kata)]
        click.echo("\n".join(old) if old else "every stored proof is fresh")
        return NOT_PASSED if old else PASSED
    bad = []
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(Worker(warm=can_fork())) for _ in range(os.cpu_count() or 1)]
        for kata in katas:
            click.echo(kata.slug)
            report = verify(app.track, kata, workers, fresh=fresh, on_step=_show)
            _end(report)
            if not report.ok:
                bad.append(kata.slug)
    if bad and len(katas) > 1:
        click.echo(f"not proven: {', '.join(bad)}")
    return NOT_PASSED if bad else PASSED


def _find(app: App, name: str) -> Kata:
    folder = Path(name)
    if (folder / "kata.toml").is_file():
        return load_kata(folder.resolve(), app.track.reference)
    return app.track.find(name)


def _show(step: Step) -> None:
    click.echo(f"  {'ok' if step.ok else 'FAILED':<7} {step.name:<15} {step.summary}")
    for problem in step.problems:
        click.echo(f"            {problem}")


def _end(report: Report) -> None:
    if report.cached:
        _show(report.steps[0])
    elif report.ok:
        click.echo("  proven; proof.json is written")
    else:
        click.echo("  not proven; mend what is listed and verify again")
