"""Draws verdicts, lessons and tables; the only module that imports rich. Every state has a word beside its colour."""

from __future__ import annotations

import os
import re
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from checker.outcomes import CRASH, ERROR, FAILED, FAULT, LIMIT, NOT_RUN, PASSED, TAMPERED, TIMEOUT

if TYPE_CHECKING:
    from checker.verdict import TaskResult, Verdict

STYLES = {
    "ok": "green", "open": "yellow", "FAILED": "bold red", "refused": "bold red", "TIME-OUT": "bold red", "LIMIT": "bold red", "not run": "dim",
}  # fmt: skip
WORDS = {
    "passed": "ok",
    "failed": "FAILED",
    "open": "open",
    "refused": "refused",
    "timeout": "TIME-OUT",
    "memory": "LIMIT",
    "not run": "not run",
}
HEADINGS = {
    PASSED: "passed", FAILED: "not passed yet", ERROR: "does not load", TIMEOUT: "time-out", CRASH: "crashed", LIMIT: "limit reached",
    TAMPERED: "tampered with", NOT_RUN: "not run", FAULT: "our fault, not yours",
}  # fmt: skip
_CONTROL = re.compile(r"\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b\[[0-?]*[ -/]*[@-~]|\x1b.|[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def console(*, stderr: bool = False) -> Console:
    """The terminal; plain text where it is none, and without colour under NO_COLOR."""
    width = None if (sys.stderr if stderr else sys.stdout).isatty() or os.environ.get("COLUMNS") else 100
    return Console(stderr=stderr, highlight=False, emoji=False, markup=False, soft_wrap=False, width=width)


def clean(text: str) -> str:
    """Text of the learner's program without anything that steers a terminal."""
    return _CONTROL.sub("", text.replace("\r\n", "\n"))


class Page:
    """Lines in the making; `show` prints them."""

    def __init__(self, width: int) -> None:
        self.width, self.lines = min(width, 100), []

    def add(self, *parts: str | tuple[str, str], indent: int = 0) -> None:
        """One line of plain strings and (text, style) pairs."""
        line = Text(" " * indent)
        for part in parts:
            line.append(*((part,) if isinstance(part, str) else part))
        self.lines.append(line)

    def blank(self) -> None:
        """An empty line, never two of them."""
        if self.lines and self.lines[-1].plain:
            self.lines.append(Text())

    def wrap(self, text: str, style: str = "", indent: int = 4, first: str = "") -> None:
        """A paragraph, wrapped; `first` stands before it and the rest is indented by as much."""
        room = max(self.width - indent - len(first), 24)
        for number, line in enumerate(
            textwrap.wrap(clean(text), room, break_long_words=False, break_on_hyphens=False) or [""]
        ):
            self.add((first if not number else " " * len(first), "dim"), (line, style), indent=indent)

    def show(self, where: Console) -> None:
        """Print everything, in one go: each call of rich's `print` costs a tenth of a millisecond."""
        if self.lines:
            where.print(Text("\n").join(self.lines), no_wrap=True, overflow="ignore", crop=False)


def verdict(found: Verdict, where: Console, *, next_step: str) -> None:
    """Print the screen of one check."""
    verdict_page(found, where.width, next_step=next_step).show(where)


def verdict_page(found: Verdict, width: int, *, next_step: str, title: bool = True) -> Page:
    """The screen of one check: the named mistake before the numbers, the numbers before a traceback, one next step."""
    page = Page(width)
    _header(page, found, title)
    if found.outcome == PASSED:
        _passed(page, found)
    elif found.outcome == FAILED:
        _failed(page, found)
    else:
        _other(page, found)
    _printed(page, found)
    for note in found.notes:
        page.blank()
        page.wrap(note, "dim", 2, "note  ")
    page.blank()
    page.wrap(next_step, "", 2, "next  ")
    return page


def _header(page: Page, found: Verdict, title: bool) -> None:
    day = re.match(r"day(\d+)", found.slug)
    name = f"day {int(day[1])}" if day else found.slug
    facts = f"seed {found.seed}   {found.device}   {found.seconds:.2f} s"
    heading = f"{name}  {found.title}"
    gap = page.width - len(heading) - len(facts)
    if title and gap >= 3:
        page.add((heading, "bold"), " " * gap, (facts, "dim"))
    elif title:
        page.add((heading, "bold"))
        page.add((facts, "dim"), indent=len(name) + 2)
    style = (
        "bold green" if found.outcome == PASSED else "bold yellow" if found.outcome in (FAILED, NOT_RUN) else "bold red"
    )
    page.add((HEADINGS.get(found.outcome, found.outcome), style), indent=len(name) + 2)
    page.blank()


def _task_lines(page: Page, tasks: Sequence[TaskResult]) -> None:
    wide = max((len(task.name) for task in tasks), default=0)
    for task in tasks:
        word = WORDS[task.state]
        count = f"{len(task.tests)} test{'s' if len(task.tests) != 1 else ''}"
        if task.state in ("failed", "refused", "timeout", "memory"):
            count = f"{len(task.failing)} of {count}"
        elif task.state == "open":
            count = "not written yet"
        level = "" if task.level == "core" else f"  ({task.level})"
        page.add((f"{word:<9}", STYLES[word]), f"{task.name:<{wide}}  ", (f"{count}{level}", "dim"), indent=2)


def _failed(page: Page, found: Verdict) -> None:
    _task_lines(page, found.tasks)
    failing = [task for task in found.tasks if task.failing]
    shown = [task for task in failing if task.level == "core"] or failing
    for task in shown[:2]:
        _failing_task(page, task)
    if len(shown) > 2:
        page.blank()
        page.wrap(
            f"and {', '.join(task.name for task in shown[2:])}: check one alone with `kata check --task NAME`", "dim", 2
        )


def _failing_task(page: Page, task: TaskResult) -> None:
    test = task.failing[0]
    failure = test.failure or {}
    page.blank()
    page.add((f"{task.name}: ", "bold"), (clean(test.title), "bold"), indent=2)
    for item in task.named:
        page.wrap(item["sentence"], "bold yellow" if len(task.named) == 1 else "yellow", 4)
    if len(task.named) > 1:
        page.wrap("(these fit equally well)", "dim", 4)
    if task.named:
        count = task.named[0]["tests"]
        page.wrap(f"(recognized by its numbers in {count} of {len(task.failing)} failing tests)", "dim", 4)
        page.blank()
    _failure(page, failure, test.state)


def _failure(page: Page, failure: dict[str, Any], state: str) -> None:
    message, line = failure.get("message", ""), failure.get("line")
    at = f" (your file, line {line})" if line else ""
    if state == "forbidden":
        page.wrap(
            _shortcut(message, line),
            "",
            4,
        )
        return
    if state == "timeout":
        page.wrap(f"It {message or 'did not come back in time'}{at}.", "", 4)
    elif state == "memory":
        page.wrap(f"The code {message}{at}; a check may use a few GB.", "", 4)
    elif state == "error":
        page.wrap(f"{failure.get('error', 'Error')}: {message}{at}", "", 4)
    elif message:
        page.wrap(message + ("" if message.endswith((".", "?")) else "."), "", 4)
    rows = [(label, text) for label, text in failure.get("lines", [])]
    wide = max((len(label) for label, _ in rows), default=0)
    for label, text in rows:
        page.wrap(text, "", 4, f"{label:<{wide}}  ")
    if state in ("error", "assert", "memory") and failure.get("trace"):
        page.blank()
        _trace(page, failure["trace"])


def _shortcut(message: str, line: int | None) -> str:
    name = message.rpartition(" calls ")[2] or message
    if name.startswith(("a loop", "a comprehension")):
        return f"Line {line} has {name}; this task asks you to do without."
    return f"This task asks you to write it yourself: line {line} uses {name}."


def _trace(page: Page, trace: Iterable[dict[str, Any]]) -> None:
    for frame in trace:
        where = f" in {frame['in']}" if frame.get("in") and frame["in"] != "<module>" else ""
        page.add((f"{frame['file']}, line {frame['line']}{where}", "dim"), indent=4)
        page.add(clean(frame["text"]), indent=8)


def _other(page: Page, found: Verdict) -> None:
    page.wrap(found.message, "", 2)
    if found.advice and found.outcome != FAULT:
        page.wrap(found.advice[0].upper() + found.advice[1:] + ".", "dim", 2)
    if found.trace:
        page.blank()
        _trace(page, found.trace)
    done = [task for task in found.tasks if task.tests]
    if done:
        page.blank()
        _task_lines(page, done)


def _printed(page: Page, found: Verdict) -> None:
    text = clean(found.output).strip("\n")
    if not text.strip() or found.outcome == FAULT:
        return
    lines = text.split("\n")
    page.blank()
    page.add(("your code printed", "dim"), indent=2)
    most = 12
    shown = (
        lines
        if len(lines) <= most
        else [*lines[: most // 2], f"... {len(lines) - most} more lines ...", *lines[-most // 2 :]]
    )
    for line in shown:
        page.add((line[: page.width - 4], ""), indent=4)


def _passed(page: Page, found: Verdict) -> None:
    counts = found.counts()
    words = []
    for level in ("core", "more", "stretch"):
        if level in counts:
            done, total = counts[level]
            words.append(f"{level} open" if done == 0 and level == "stretch" else f"{done} of {total} {level}")
    page.add(", ".join(words), indent=2)
    rest = [task for task in found.tasks if task.state != "passed"]
    if rest:
        page.blank()
        _task_lines(page, rest)
        for task in [task for task in rest if task.failing][:1]:
            _failing_task(page, task)
    costs(page, found.costs)
    if found.provenance:
        page.blank()
        page.wrap(provenance(found.provenance), "", 2, "built on   ")


def provenance(used: dict[str, str]) -> str:
    """Whose code the earlier days were."""
    if all(whose == "yours" for whose in used.values()) and len(used) > 1:
        return f"{', '.join(_short(slug) for slug in sorted(used))}: all pieces are yours"
    words = {"reference": "the reference: not passed yet"}
    return ", ".join(f"{_short(slug)} ({words.get(whose, whose)})" for slug, whose in sorted(used.items()))


def _short(slug: str) -> str:
    match = re.match(r"day(\d+)", slug)
    return f"day {int(match[1])}" if match else slug


def costs(page: Page, table: dict[str, dict[str, dict[str, int]]]) -> None:
    """The learner's cost beside the reference's, per task."""
    names = {
        "flops": "FLOPs",
        "new_bytes": "new bytes",
        "peak_bytes": "peak bytes",
        "saved_bytes": "saved bytes",
        "calls": "calls",
    }
    rows = []
    for task, pair in table.items():
        for key, label in names.items():
            mine, theirs = pair["yours"][key], pair["reference"][key]
            if mine or theirs:
                rows.append((task, label, f"{mine:,}", f"{theirs:,}", _ratio(mine, theirs)))
                task = ""
    if not rows:
        return
    wide = max(len(row[0]) for row in rows)
    page.blank()
    page.add((f"{'cost':<{wide}}  {'':<11}  {'yours':>14}  {'reference':>14}", "dim"), indent=2)
    for task, label, mine, theirs, ratio in rows:
        style = "green" if ratio == "equal" else ""
        page.add(
            f"{task:<{wide}}  ", (f"{label:<11}", "dim"), f"  {mine:>14}  {theirs:>14}    ", (ratio, style), indent=2
        )


def _ratio(mine: int, theirs: int) -> str:
    if mine == theirs:
        return "equal"
    return "" if not theirs or not mine else f"{mine / theirs:.2g}x"


def summary(found: Sequence[Verdict], where: Console) -> None:
    """One line per day, for `kata check --all`."""
    page = Page(where.width)
    for item in found:
        word = "ok" if item.outcome == PASSED else HEADINGS.get(item.outcome, item.outcome)
        style = "green" if item.outcome == PASSED else "dim" if item.outcome == NOT_RUN else "red"
        counts = ", ".join(f"{done} of {total} {level}" for level, (done, total) in item.counts().items() if total)
        page.add((f"{word:<15}", style), f"{item.slug:<32}  ", (f"{counts}   {item.seconds:.1f} s", "dim"), indent=2)
    page.blank()
    done = sum(item.outcome == PASSED for item in found)
    page.add(f"{done} of {len(found)} days passed", indent=2)
    page.show(where)


def bar(done: int, total: int, width: int = 24) -> str:
    """'######------' for a share of a phase."""
    filled = width if total and done >= total else (done * width) // total if total else 0
    return "#" * filled + "-" * (width - filled)


def status(
    title: str, facts: str, rows: Sequence[tuple[int, str, int, int, str]], next_step: str, where: Console
) -> None:
    """Print the learner's way."""
    status_page(title, facts, rows, next_step, where.width).show(where)


def status_page(
    title: str, facts: str, rows: Sequence[tuple[int, str, int, int, str]], next_step: str, width: int
) -> Page:
    """The learner's way: a line per phase (number, title, passed days, days, what is under way)."""
    page = Page(width)
    page.add((title, "bold"), " " * max(page.width - len(title) - len(facts), 3), (facts, "dim"))
    wide = max((len(row[1]) for row in rows), default=0)
    room = max(min(24, page.width - wide - 40), 8)
    for number, name, done, total, now in rows:
        style = "green" if done == total and total else "yellow" if done else "dim"
        line: list[str | tuple[str, str]] = [
            f"{number:>2} {name:<{wide}}  ",
            (bar(done, total, room), style),
            f"  {done:>2}/{total}" if total else "  to come",
        ]
        if now and wide + room + len(now) + 16 <= page.width:
            page.add(*line, (f"   {now}", ""), indent=1)
        else:
            page.add(*line, indent=1)
            if now:
                page.add((now, ""), indent=wide + 6)
    page.blank()
    page.add(("next  ", "bold"), next_step, indent=2)
    return page


def table(head: Sequence[str], rows: Iterable[Sequence[str]], where: Console) -> None:
    """A plain table with aligned columns."""
    rows = [[clean(str(cell)) for cell in row] for row in rows]
    widths = [max(len(head[i]), *(len(row[i]) for row in rows)) if rows else len(head[i]) for i in range(len(head))]
    page = Page(where.width)
    page.add(
        ("  ".join(f"{cell:<{width}}" for cell, width in zip(head, widths, strict=True)).rstrip(), "dim"), indent=2
    )
    for row in rows:
        page.add("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip(), indent=2)
    page.show(where)


def say(where: Console, *paragraphs: str) -> None:
    """Sentences, wrapped."""
    page = Page(where.width)
    for text in paragraphs:
        page.wrap(text, "", 0) if text else page.blank()
    page.show(where)


def diff(lines: Iterable[str], where: Console) -> None:
    """Print a unified diff."""
    diff_page(lines, where.width).show(where)


def diff_page(lines: Iterable[str], width: int) -> Page:
    """A unified diff: signs say what colour repeats."""
    page = Page(width)
    for line in lines:
        text = clean(line.rstrip("\n"))
        style = "bold" if text.startswith(("---", "+++")) else {"+": "green", "-": "red", "@": "cyan"}.get(text[:1], "")
        page.add((text, style))
    return page
