"""`kata watch`: a check at every save in a warm process, on a screen of its own. Imported by this command only."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any, ClassVar

from textual.app import App as Screenful
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import VerticalScroll
from textual.events import Resize
from textual.message import Message
from textual.screen import ModalScreen
from textual.widgets import Static
from watchfiles import Change, awatch

from checker import markdown, render
from checker.app import App
from checker.commands import check as verb
from checker.commands.fetch import fetch, fetch_next, open_workspace, under_way
from checker.commands.read import next_hint
from checker.commands.solution import difference
from checker.commands.status import overview
from checker.errors import OurFault, UserError
from checker.run import Limits, Run
from checker.track import Kata, Track, day_of
from checker.verdict import CANCELLED, PASSED, Verdict
from checker.warm import Door, WarmChecks

HELP = """\
# kata watch

Write code in your editor and save; the verdict comes by itself.

- `n` next: fetch and show the next exercise
- `h` hint: one more rung for the first task that is not passed
- `l` lesson of the day
- `t` only the first failing task from now on; `a` all tasks again
- `s` status of the whole track
- `d` diff between your code and the reference, after passing
- `r` run the check again, with fresh values
- `q` quit

Any key closes this page.
"""


# No-break spaces: a key and its word stay on one line of a narrow terminal.
KEYS = "n\N{NO-BREAK SPACE}next  h\N{NO-BREAK SPACE}hint  l\N{NO-BREAK SPACE}lesson  t\N{NO-BREAK SPACE}task  a\N{NO-BREAK SPACE}all  "
KEYS += "s\N{NO-BREAK SPACE}status  d\N{NO-BREAK SPACE}diff  r\N{NO-BREAK SPACE}run  ?\N{NO-BREAK SPACE}help  q\N{NO-BREAK SPACE}quit"

_TOGETHER = 0.05  # seconds in which what happens is drawn once


class Reader(ModalScreen[None]):
    """A page over the verdict: lesson, hint, status, diff or help. Arrow keys scroll, any other key closes it."""

    def __init__(self, make: Callable[[int], render.Page]) -> None:
        super().__init__()
        self.make = make

    def compose(self) -> ComposeResult:
        """The page in a box that scrolls."""
        with VerticalScroll(id="reader"):
            yield Static(id="page")
            yield Static("any key closes this page", id="closing")

    def on_mount(self) -> None:
        """Draw, and take the arrow keys."""
        self.draw()
        self.query_one("#reader").focus()

    def on_resize(self, event: Resize) -> None:
        """Wrap for the new width."""
        self.draw()

    def draw(self) -> None:
        """Put the page's lines in place; border, padding and scroll bar take eight columns."""
        self.query_one("#page", Static).update(join(self.make(max(self.app.size.width - 8, 40))))

    def on_key(self, event: Any) -> None:
        """Close, unless the key scrolls."""
        if event.key not in ("up", "down", "pageup", "pagedown", "home", "end"):
            event.stop()
            self.dismiss()


def join(page: render.Page) -> Any:
    """The lines of a page as one text."""
    lines = page.lines or [""]
    text = lines[0].copy() if hasattr(lines[0], "copy") else lines[0]
    for line in lines[1:]:
        text.append("\n")
        text.append_text(line)
    return text


class Checks(threading.Thread):
    """Runs the newest wanted check, one at a time; a newer wish cancels the one that runs."""

    def __init__(self, app: App, warm: WarmChecks, tell: Callable[[str, Any], None]) -> None:
        super().__init__(name="kata-checks", daemon=True)
        self.app, self.warm, self.tell = app, warm, tell
        self.wish = threading.Condition()
        self.wanted: tuple[int, str, list[str] | None] | None = None
        self.number = 0
        self.ended = False

    def want(self, slug: str, only: list[str] | None) -> None:
        """Check this day next; what runs is cancelled."""
        with self.wish:
            self.number += 1
            self.wanted = self.number, slug, only
            self.wish.notify()

    def end(self) -> None:
        """Cancel and stop."""
        with self.wish:
            self.ended, self.number = True, self.number + 1
            self.wish.notify()

    def run(self) -> None:
        """The loop of the thread."""
        while True:
            with self.wish:
                while self.wanted is None and not self.ended:
                    self.wish.wait()
                if self.ended:
                    return
                (number, slug, only), self.wanted = self.wanted, None
            try:
                self._check(number, slug, only)
            except (UserError, OurFault, OSError) as error:
                self.tell("problem", str(error))
            except Exception as error:
                self.tell("problem", f"a fault of the program, not yours: {type(error).__name__}: {error}")

    def _check(self, number: int, slug: str, only: list[str] | None) -> None:
        self.app.track = Track.load(self.app.track.folder)  # kata.toml may have changed
        kata = self.app.track.kata(slug)
        if not self.app.workspace.root.is_dir():
            raise UserError(f"The workspace {self.app.workspace.root} is gone; put it back, or quit with q.")
        self.tell("begin", kata)

        def runner(asked: dict[str, Any], limits: Limits) -> Run:
            return self.warm.run(asked, limits, lambda event: self.tell("event", event), lambda: self.number != number)

        found, source, started = verb.run(self.app, kata, runner, only=only)
        if found.outcome == CANCELLED or self.number != number:
            return
        self.tell("verdict", found)
        self.tell("recorded", verb.record(self.app, kata, found, source, started, whole=only is None))


class Told(Message):
    """What a check or the watcher of the files has to say: a word for it, and what it is about."""

    def __init__(self, what: str, about: Any) -> None:
        super().__init__()
        self.what, self.about = what, about


class Watch(Screenful[None]):
    """The screen: a headline with bars, the tasks with their states, the verdict; keys at the bottom."""

    ENABLE_COMMAND_PALETTE = False
    CSS = """
    Static { width: 100%; }
    #headline { height: auto; padding: 0 1; background: $boost; }
    #tasks { height: auto; padding: 0 1; }
    #verdict { height: 1fr; padding: 0 1; }
    #keys { height: auto; padding: 0 1; text-wrap: wrap; background: $boost; color: $text-muted; }
    #notice { height: auto; padding: 0 1; color: $text-warning; }
    Reader { align: center middle; }
    #reader { width: 100%; height: 100%; padding: 1 2; background: $surface; border: solid $primary; }
    #closing { color: $text-muted; padding: 1 0 0 0; }
    """
    BINDINGS: ClassVar = [
        Binding("n", "next", "next"),
        Binding("h", "hint", "hint"),
        Binding("l", "lesson", "lesson"),
        Binding("t", "one_task", "task"),
        Binding("a", "all_tasks", "all"),
        Binding("s", "status", "status"),
        Binding("d", "diff", "diff"),
        Binding("r", "run", "run"),
        Binding("question_mark", "help", "help", key_display="?"),
        Binding("q", "quit", "quit"),
    ]

    def __init__(self, app: App, kata: Kata, *, polling: bool = False) -> None:
        super().__init__()
        self.kata_app, self.kata, self.polling = app, kata, polling
        self.warm = WarmChecks()
        self.door = Door(app.workspace.database.parent, self.warm)
        self.checks = Checks(app, self.warm, self.hear)
        # kept here, because a query looks at the screen on top, which may be a page that is being read
        self.parts = {name: Static(id=name) for name in ("headline", "tasks", "text", "notice")}
        self.only: list[str] | None = None
        self.found: Verdict | None = None
        self.states: dict[str, list[str]] = {}
        self.tests: dict[str, str] = {}
        self.running = ""
        self.notice = ""
        self.count = 0  # verdicts shown so far
        self.due = False  # whether the screen will be drawn in a moment anyway
        self.celebrated: set[str] = set()

    def compose(self) -> ComposeResult:
        """Headline, tasks, verdict, notice, keys."""
        for name, widget in self.parts.items():
            if name == "text":
                with VerticalScroll(id="verdict"):
                    yield widget
            else:
                yield widget
        yield Static(KEYS, id="keys")

    def on_mount(self) -> None:
        """Warm up, listen, look at the file once, and show the lesson meanwhile."""
        self.warm.start()
        self.checks.start()
        if not self.door.open():
            self.notice = "other terminals check cold (another watch is running here, or the folder takes no socket)"
        if self.warm.cold_because:
            self.notice = f"every check starts cold: {self.warm.cold_because}"
        self.run_worker(self.saves(), exclusive=True)
        with contextlib.suppress(UserError), self.kata_app.store() as store:
            track = self.kata_app.track
            self.celebrated = set(track.slugs) - set(track.ahead(store.passed_katas()))
        self.draw()
        self.checks.want(self.kata.slug, self.only)
        self.action_lesson()

    async def on_unmount(self) -> None:
        """Leave nothing behind."""
        self.checks.end()
        self.door.close()
        await asyncio.get_running_loop().run_in_executor(None, self.warm.close)

    async def saves(self) -> None:
        """Follow the files of the workspace; several saves at once make one check, of the newest."""
        root = self.kata_app.workspace.root
        while True:
            try:
                async for changes in awatch(
                    root,
                    watch_filter=_is_day,
                    debounce=150,
                    step=30,
                    recursive=False,
                    force_polling=self.polling or None,
                ):
                    slugs = {
                        path.rpartition("/")[2].removesuffix(".py")
                        for change, path in changes
                        if change != Change.deleted
                    }
                    known = [slug for slug in self.kata_app.track.slugs if slug in slugs]
                    if known:
                        self.saved(self.kata.slug if self.kata.slug in known else known[-1])
            except (OSError, RuntimeError) as error:
                self.hear("problem", f"the workspace cannot be watched ({error}); trying again")
            if not root.is_dir():
                self.hear("problem", f"the workspace {root} is gone; put it back, or quit with q")
            await asyncio.sleep(1.0)

    def saved(self, slug: str) -> None:
        """A day's file was saved: check it."""
        if slug != self.kata.slug:
            self.kata, self.only, self.states, self.found = self.kata_app.track.kata(slug), None, {}, None
        self.notice = ""
        self.checks.want(slug, self.only)

    # What the checks tell; from their thread

    def hear(self, what: str, about: Any) -> None:
        """Hand a message over to the screen's own thread, without waiting for it."""
        self.post_message(Told(what, about))

    def on_told(self, message: Told) -> None:
        """Take in one message; a hundred tests that finish at once are drawn together."""
        self.told(message.what, message.about)
        if message.what != "event":
            self.draw()
        elif not self.due:
            self.due = True
            self.set_timer(_TOGETHER, self.draw)

    def told(self, what: str, about: Any) -> None:
        """Change the state that is drawn."""
        if what == "begin":
            self.states, self.tests, self.running = {}, {}, "checking"
        elif what == "event":
            self.take(about)
        elif what == "verdict":
            self.found, self.running, self.count = about, "", self.count + 1
            self.passed(about)
        elif what == "recorded":
            self.notice = about or self.notice
        elif what == "problem":
            self.notice, self.running = about, ""

    def take(self, event: dict[str, Any]) -> None:
        """One event of the running check."""
        if event["event"] == "collected":
            self.tests = {test["id"]: test["task"] for test in event["tests"]}
        elif event["event"] == "finish":
            state = "passed" if event["failure"] is None else event["failure"]["kind"]
            self.states.setdefault(self.tests.get(event["test"], ""), []).append(state)

    def passed(self, found: Verdict) -> None:
        """Say once that a day is passed, and what was learned."""
        if found.outcome == PASSED and self.only is None and found.slug not in self.celebrated:
            self.celebrated.add(found.slug)
            kata = self.kata_app.track.kata(found.slug)
            self.notice = f"day {kata.day} is passed: {', '.join(kata.concepts)}. n fetches the next one."

    # Drawing

    def on_resize(self, event: Resize) -> None:
        """Wrap for the new width."""
        self.draw()

    def draw(self) -> None:
        """Everything, from the state."""
        self.due = False
        if not self.is_mounted:
            return
        width = max(self.size.width - 2, 40)
        with contextlib.suppress(UserError):
            self.parts["headline"].update(join(self.headline(width)))
        self.parts["tasks"].update(join(self.task_lines(width)))
        self.parts["text"].update(join(self.verdict_page(width - 2)))
        notice = self.parts["notice"]
        notice.update(self.notice)
        notice.display = bool(self.notice)

    def headline(self, width: int) -> render.Page:
        """The day, and the bars of its phase and of the track."""
        page = render.Page(width)
        title, _, rows, _ = overview(self.kata_app)
        phase = self.kata_app.track.phase_of(self.kata.slug)
        _, name, done, total, _ = rows[phase.number - 1]
        all_done, days = sum(row[2] for row in rows), sum(row[3] for row in rows)
        last = self.found
        state = self.running or ("" if last is None else f"seed {last.seed}   {last.device}   {last.seconds:.2f} s")
        page.add((f"day {self.kata.day}  {self.kata.title}", "bold"), f"   {state}")
        page.add(
            f"{name} {render.bar(done, total, 12)} {done}/{total}   {title} {render.bar(all_done, days, 12)} {all_done}/{days}"
        )
        return page

    def task_lines(self, width: int) -> render.Page:
        """Each task with its state, live while tests finish."""
        page = render.Page(width)
        if self.found is not None and not self.running:
            return page
        wide = max(len(task.name) for task in self.kata.tasks)
        for task in self.kata.tasks:
            if self.only and task.name not in self.only:
                continue
            states, expected = self.states.get(task.name, []), list(self.tests.values()).count(task.name)
            good = sum(state == "passed" for state in states)
            word = (
                "..."
                if len(states) < expected or not expected
                else "ok"
                if good == expected
                else "open"
                if "open" in states
                else "FAILED"
            )
            page.add(
                (f"{word:<8}", render.STYLES.get(word, "dim")), f"{task.name:<{wide}}  {good} of {expected or '?'}"
            )
        return page

    def verdict_page(self, width: int) -> render.Page:
        """The last verdict, which stays until the next one is there."""
        if self.found is None:
            page = render.Page(width)
            page.add(("the first verdict comes when torch is loaded; saving your file checks it", "dim"))
            return page
        hints: dict[str, int] = {}
        kata = self.kata_app.track.kata(self.found.slug)
        with contextlib.suppress(UserError), self.kata_app.store() as store:
            hints = store.hints_taken(kata.id)
        step = verb.next_step(self.kata_app, kata, self.found, hints)
        return render.verdict_page(self.found, width, next_step=_keys(step), title=False)

    # Keys

    def read(self, make: Callable[[int], render.Page]) -> None:
        """Show a page over the verdict."""
        self.push_screen(Reader(make), lambda _: self.draw())

    def attempt(self, action: Callable[[], Any]) -> Any:
        """Do something that may answer with one sentence."""
        try:
            return action()
        except UserError as error:
            self.notice = str(error)
            self.draw()
            return None

    def action_next(self) -> None:
        """Fetch the next exercise and turn to it."""
        kata = self.attempt(lambda: fetch_next(self.kata_app))
        if kata is None:
            return
        self.kata, self.only, self.found, self.states, self.notice = kata, None, None, {}, f"write in {kata.file_name}"
        self.checks.want(kata.slug, None)
        self.draw()
        self.action_lesson()

    def action_hint(self) -> None:
        """One more rung."""
        task = self.found and next((task.name for task in self.found.tasks if task.failing), None)
        text = self.attempt(lambda: next_hint(self.kata_app, self.kata, task))
        if text:
            self.read(lambda width: markdown.page(text, width))
            self.draw()

    def action_lesson(self) -> None:
        """The lesson."""
        text = self.attempt(lambda: self.kata.text("lesson.md"))
        if text:
            self.read(lambda width: markdown.page(text, width))

    def action_status(self) -> None:
        """The whole way."""
        facts = self.attempt(lambda: overview(self.kata_app))
        if facts:
            self.read(lambda width: render.status_page(*facts, width))

    def action_diff(self) -> None:
        """The learner's code beside the reference, after passing."""
        lines = self.attempt(lambda: difference(self.kata_app, self.kata))
        if lines:
            self.read(lambda width: render.diff_page(lines, width))

    def action_help(self) -> None:
        """The keys."""
        self.read(lambda width: markdown.page(HELP, width))

    def action_run(self) -> None:
        """Check again, with fresh values."""
        self.checks.want(self.kata.slug, self.only)

    def action_one_task(self) -> None:
        """Only the first failing task from now on."""
        failing = [task.name for task in self.found.tasks if task.state != "passed"] if self.found else []
        if failing:
            self.only, self.notice = [failing[0]], f"only {failing[0]}; a checks all tasks again"
            self.action_run()
        else:
            self.notice = "no task is failing"
        self.draw()

    def action_all_tasks(self) -> None:
        """All tasks again."""
        self.only, self.notice = None, ""
        self.action_run()


def _is_day(change: Change, path: str) -> bool:
    name = path.rpartition("/")[2]
    return name.endswith(".py") and day_of(name.removesuffix(".py")) is not None


def _keys(step: str) -> str:
    """A next step in the words of this screen."""
    for command, key in (
        ("kata hint", "press h: a hint for"),
        ("kata next:", "press n:"),
        ("kata lesson", "press l: the lesson of day"),
    ):
        if step.startswith(command):
            return f"{key}{step.removeprefix(command)}"
    return step


def watch(app: App, day: str | None, *, polling: bool) -> None:
    """Open the screen on a day: the one named, else the one under way, else the first that is not passed."""
    if day:
        open_workspace(app)
        kata = app.track.find(day)
        with app.store() as store:
            fetch(app, kata, store)
    else:
        kata = under_way(app)
    Watch(app, kata, polling=polling).run()
