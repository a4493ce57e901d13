"""`kata check`: one check, its verdict on the screen, then into the store."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import secrets
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from checker import render, request
from checker.app import App
from checker.authoring import Hints
from checker.errors import FAULT, NOT_PASSED, PASSED, UserError
from checker.run import Limits, Run
from checker.track import Kata
from checker.verdict import ERROR, Verdict, judge, to_junit
from checker.verdict import FAULT as OUR_FAULT
from checker.verdict import PASSED as PASS
from checker.worker import Worker, can_fork
from checker.workspace import write_whole
from progress import Attempt, StoreError, now, source_sha

Runner = Callable[[dict[str, Any], Limits], Run]


def check(
    app: App,
    day: str | None,
    *,
    everything: bool,
    task: str | None,
    device: str,
    seed: int | None,
    as_json: bool,
    junit: str | None,
) -> int:
    """Run the check and report it; returns the exit code."""
    if everything and (day or task):
        raise UserError("--all checks every day; leave the day and --task away.")
    if everything:
        katas = [kata for kata in app.track if app.workspace.fetched(kata)]
        if not katas:
            raise UserError("No exercise is fetched yet; `kata next` fetches the first one.")
    else:
        katas = [app.kata(day)]
        if not app.workspace.fetched(katas[0]):
            app.workspace.read(katas[0])  # says how to fetch it
    only = [katas[0].task(task).name] if task else None
    where, found = render.console(), []
    with _runner(app, len(katas)) as runner:
        for kata in katas:
            verdict, source, started = run(app, kata, runner, device=device, seed=seed, only=only)
            if not as_json and not everything:
                show(app, kata, verdict, where)
            saved = record(app, kata, verdict, source, started, whole=only is None)
            if saved:
                click.echo(f"kata: {saved}", err=True)
            found.append(verdict)
    if as_json:
        data = [item.to_json() for item in found]
        click.echo(json.dumps(data if everything else data[0], indent=2))
    elif everything:
        render.summary(found, where)
    if junit:
        write_whole(Path(junit).expanduser().absolute(), to_junit(found))
    return exit_code(found)


@contextlib.contextmanager
def _runner(app: App, count: int) -> Iterator[Runner]:
    """What runs a check: the worker of a running `kata watch` in this workspace, else one of our own."""
    folder = app.workspace.database.parent
    watched = (folder / "watch.sock").exists()
    with contextlib.ExitStack() as stack:
        own: list[Worker] = []

        def worker() -> Worker:
            if not own:
                own.append(stack.enter_context(Worker(warm=count > 2 and can_fork())))
            return own[0]

        def runner(asked: dict[str, Any], limits: Limits) -> Run:
            if watched:
                from checker.warm import through_watch

                run = through_watch(folder, asked, limits)
                if run is not None:
                    return run
            return worker().run(asked, limits)

        if not watched:
            worker()  # it loads torch while we read files and store
        yield runner


def exit_code(found: list[Verdict]) -> int:
    """0 if all passed, 3 if one could not be judged through our own fault, else 1."""
    if any(item.outcome == OUR_FAULT for item in found):
        return FAULT
    return PASSED if all(item.outcome == PASS for item in found) else NOT_PASSED


def run(
    app: App, kata: Kata, runner: Runner, *, device: str = "cpu", seed: int | None = None, only: list[str] | None = None
) -> tuple[Verdict, str, str]:
    """Check one kata: (verdict, the source that was checked, when it began)."""
    seed = secrets.randbelow(1_000_000) if seed is None else seed
    started, begun = now(), time.monotonic()
    try:
        source = app.workspace.read(kata)
    except UserError as error:
        failed = Verdict(
            kata.id, kata.slug, kata.title, ERROR, seed, device, time.monotonic() - begun, message=str(error)
        )
        return failed, "", started
    path = str(app.workspace.file(kata))
    before, lent = earlier(app, kata, source)
    sources = {kata.slug: (path, source), **before}
    asked = request.check(
        app.track,
        kata,
        sources,
        seed=seed,
        device=device,
        only=only,
        helpers=app.workspace.helpers(app.track),
        lent=lent,
    )
    ran = runner(asked, request.limits(kata, device=device))
    verdict = judge(kata, ran, seed=seed, device=device, only=only)
    with contextlib.suppress(UserError):
        if app.workspace.read(kata) != source:
            note = "your file was saved again while it was checked; this is about what it was before"
            verdict = dataclasses.replace(verdict, notes=(*verdict.notes, note))
    return verdict, source, started


def earlier(app: App, kata: Kata, source: str) -> tuple[dict[str, tuple[str, str]], dict[str, list[str]]]:
    """The learner's own files of passed days that `source` imports, and those that these import in turn.

    What is used is the code that passed: the newest passing snapshot. The second value names, per day, what was not passed with
    it (tasks beyond the core): the reference stands in for these.
    """
    slugs = set(app.track.slugs)
    found: dict[str, tuple[str, str]] = {}
    lent: dict[str, list[str]] = {}
    with contextlib.suppress(UserError), app.store() as store:
        todo = [source]
        while todo:
            for slug in sorted(set(re.findall(r"\bday\d+_\w+", todo.pop())) & slugs - {kata.slug} - set(found)):
                day = app.track.kata(slug)
                passed = store.last_passed_source(day.id)
                if passed is None:
                    continue
                found[slug] = (str(app.workspace.root / f"{slug}.py"), passed[1])
                todo.append(passed[1])
                states = next(
                    (item.tasks for item in store.attempts(day.id) if item.passed and item.snapshot == passed[0]), {}
                )
                names = [name for task in day.tasks if states.get(task.name) != "passed" for name in task.names]
                if names:
                    lent[slug] = names
    return found, lent


def record(app: App, kata: Kata, verdict: Verdict, source: str, started: str, *, whole: bool) -> str:
    """Save the attempt; returns a sentence if it could not be saved."""
    if verdict.outcome in (OUR_FAULT, "cancelled"):
        return ""
    attempt = Attempt(
        id=uuid.uuid4().hex,
        kata=kata.id,
        started=started,
        duration=verdict.seconds,
        outcome=verdict.outcome,
        tasks={task.name: task.state for task in verdict.tasks},
        passed=verdict.passed and whole,
        seed=verdict.seed,
        device=verdict.device,
        versions=verdict.versions,
        snapshot=source_sha(source),
        provenance={app.track.kata(slug).id: whose.partition(",")[0] for slug, whose in verdict.provenance.items()},
    )
    try:
        with app.store() as store:
            store.record(attempt, source)
    except (UserError, StoreError, OSError) as error:
        return f"this attempt was not saved: {error}"
    return ""


def show(app: App, kata: Kata, verdict: Verdict, where: object) -> None:
    """Print the verdict with the next step."""
    hints: dict[str, int] = {}
    with contextlib.suppress(UserError), app.store() as store:
        hints = store.hints_taken(kata.id)
    render.verdict(verdict, where, next_step=next_step(app, kata, verdict, hints))


def _after(app: App, kata: Kata) -> str:
    """What follows a passed day: what `kata next` fetches, and the day behind it where that is another one."""
    passed = {kata.id}
    with contextlib.suppress(UserError), app.store() as store:
        passed |= store.passed_katas()
    ahead = list(app.track.ahead(passed))
    if not ahead:
        return "all days are passed; `kata status` shows the whole track"
    first, behind = app.track.kata(ahead[0]), app.track.after(kata.slug)
    if behind in ahead[1:]:
        after = app.track.kata(behind)
        return (
            f"kata start {after.day}: {after.title}, {after.minutes} minutes; `kata next` goes back to day {first.day}"
        )
    return f"kata next: day {first.day}, {first.title}, {first.minutes} minutes"


def next_step(app: App, kata: Kata, verdict: Verdict, hints: dict[str, int]) -> str:
    """The one thing to do now."""
    if verdict.outcome == PASS:
        if any(task.level == "core" and task.state == "not run" for task in verdict.tasks) or len(verdict.tasks) < len(
            kata.tasks
        ):
            return "kata check: all tasks of the day"
        return _after(app, kata)
    if verdict.outcome == "failed":
        for task in sorted(verdict.tasks, key=lambda item: (item.level != "core", item.state == "open")):
            if task.state not in ("passed", "not run"):
                total = len(Hints.read(kata).rungs.get(task.name, ()))
                taken = hints.get(task.name, 0)
                if task.state == "open" and not any(item.failing for item in verdict.tasks):
                    return f"write {task.name} in {kata.file_name}; `kata hint {task.name}` helps"
                return (
                    f"kata hint {task.name} ({taken} of {total} taken)" if taken < total else f"kata lesson {kata.day}"
                )
    if verdict.outcome == OUR_FAULT:
        return "please report this; your code was not judged"
    if verdict.outcome == "not run":
        return f"kata check {kata.day} --device cpu"
    return f"mend {kata.file_name}, then kata check"
