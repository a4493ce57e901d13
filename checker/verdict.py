"""The verdict of a check as plain records, made from what the worker gave; terminal, JSON and JUnit are functions of it.

A pass needs one complete, sealed message that covers every expected test. Exit codes and what was printed are never evidence.
"""

from __future__ import annotations

import re
import signal
from dataclasses import asdict, dataclass, field
from typing import Any

from checker.outcomes import CANCELLED, CRASH, ERROR, FAILED, FAULT, LIMIT, NOT_RUN, PASSED, TAMPERED, TIMEOUT
from checker.run import Run
from checker.track import Kata, Task


@dataclass(frozen=True)
class TestResult:
    """One test: `state` is 'passed', the kind of its failure, or 'not run'. Seconds of wall time."""

    __test__ = False

    id: str
    title: str
    state: str
    seconds: float = 0.0
    failure: dict[str, Any] | None = None


@dataclass(frozen=True)
class TaskResult:
    """One task. `state` is one of passed, open, failed, refused (a forbidden shortcut), timeout, memory, not run."""

    name: str
    level: str
    summary: str
    state: str
    tests: tuple[TestResult, ...]
    named: tuple[dict[str, Any], ...] = ()

    @property
    def failing(self) -> list[TestResult]:
        """The tests that did not pass and are not merely open."""
        return [test for test in self.tests if test.state not in ("passed", "open", "not run")]


@dataclass(frozen=True)
class Verdict:
    """What a check found. `message` is one sentence for outcomes that are not about single tests, `advice` what to do."""

    kata: str
    slug: str
    title: str
    outcome: str
    seed: int
    device: str
    seconds: float
    tasks: tuple[TaskResult, ...] = ()
    message: str = ""
    advice: str = ""
    line: int | None = None
    trace: tuple[dict[str, Any], ...] = ()
    output: str = ""
    costs: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    provenance: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether the tasks that were asked for all passed."""
        return self.outcome == PASSED

    def counts(self) -> dict[str, tuple[int, int]]:
        """Passed and all tasks by level."""
        found: dict[str, tuple[int, int]] = {}
        for task in self.tasks:
            done, total = found.get(task.level, (0, 0))
            found[task.level] = (done + (task.state == "passed"), total + 1)
        return found

    def to_json(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {"version": 1, **asdict(self), "passed": self.passed}


def to_junit(verdicts: list[Verdict]) -> str:
    """JUnit XML: a test suite per kata, a test case per test."""
    from xml.etree import ElementTree

    root = ElementTree.Element("testsuites", name="torch-katas")
    for verdict in verdicts:
        tests = [(task, test) for task in verdict.tasks for test in task.tests]
        bad = sum(test.state not in ("passed", "not run") for _, test in tests)
        suite = ElementTree.SubElement(
            root, "testsuite", name=verdict.slug, tests=str(max(len(tests), 1)), failures=str(bad),
            errors=str(int(verdict.outcome not in (PASSED, FAILED, NOT_RUN))), time=f"{verdict.seconds:.3f}",
        )  # fmt: skip
        for task, test in tests:
            case = ElementTree.SubElement(
                suite, "testcase", classname=f"{verdict.slug}.{task.name}", name=test.id, time=f"{test.seconds:.3f}"
            )
            if test.state == "not run":
                ElementTree.SubElement(case, "skipped", message="not run")
            elif test.state != "passed":
                message = _clean((test.failure or {}).get("message", test.state))
                ElementTree.SubElement(case, "failure", message=message, type=test.state)
        if verdict.outcome not in (PASSED, FAILED):
            case = ElementTree.SubElement(suite, "testcase", classname=verdict.slug, name="check")
            kind = "skipped" if verdict.outcome == NOT_RUN else "error"
            ElementTree.SubElement(case, kind, message=_clean(verdict.message or verdict.outcome))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _clean(text: str) -> str:
    """Without the control characters that XML cannot hold."""
    return re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd]", "?", text)


def judge(kata: Kata, run: Run, *, seed: int, device: str, only: list[str] | None = None) -> Verdict:
    """The verdict on one run."""
    tasks = tuple(_task(task, run) for task in kata.tasks if not only or task.name in only)
    outcome, message, advice, line, trace = _outcome(kata, run, tasks, only)
    if outcome in (FAULT, NOT_RUN, ERROR):
        tasks = tuple(_not_run(task) for task in tasks)
    ready, imported, sealed = run.first("ready") or {}, run.first("imported") or {}, run.first("outcomes") or {}
    notes = []
    if sealed.get("threads"):
        notes.append(f"your code left a thread running ({', '.join(sealed['threads'])}); it was ended with the check")
    if imported.get("globals"):
        notes.append(f"your file changes torch's {', '.join(imported['globals'])} at import; that was put back")
    costs = {event["task"]: {"yours": event["yours"], "reference": event["reference"]} for event in run.of("cost")}
    return Verdict(
        kata=kata.id, slug=kata.slug, title=kata.title, outcome=outcome, seed=seed, device=device, seconds=run.seconds,
        tasks=tasks, message=message, advice=advice, line=line, trace=tuple(trace), output=run.output.text(), costs=costs,
        provenance=imported.get("provenance", {}), notes=tuple(notes),
        versions={key: str(ready[key]) for key in ("python", "torch") if key in ready},
    )  # fmt: skip


def _task(task: Task, run: Run) -> TaskResult:
    collected = (run.first("collected") or {"tests": []})["tests"]
    finished = {event["test"]: event for event in run.of("finish")}
    tests = []
    for test in collected:
        if test["task"] != task.name:
            continue
        event = finished.get(test["id"])
        if event is None:
            state = "timeout" if run.ended == "timeout" and run.test == test["id"] else "not run"
            tests.append(TestResult(test["id"], test["title"], state))
        else:
            failure = event["failure"]
            state = "passed" if failure is None else failure["kind"]
            tests.append(TestResult(test["id"], test["title"], state, event["seconds"], failure))
    named = tuple(item for event in run.of("diagnosis") if event["task"] == task.name for item in event["named"])
    return TaskResult(task.name, task.level, task.summary, _state([test.state for test in tests]), tuple(tests), named)


def _state(states: list[str]) -> str:
    if not states:
        return "not run"
    if all(state == "passed" for state in states):
        return "passed"
    for state, word in (("forbidden", "refused"), ("timeout", "timeout"), ("memory", "memory")):
        if state in states:
            return word
    if all(state in ("passed", "open", "not run") for state in states):
        return "open" if "open" in states else "not run"
    return "failed"


def _not_run(task: TaskResult) -> TaskResult:
    return TaskResult(task.name, task.level, task.summary, "not run", (), ())


def _outcome(
    kata: Kata, run: Run, tasks: tuple[TaskResult, ...], only: list[str] | None
) -> tuple[str, str, str, int | None, list[dict[str, Any]]]:
    """(outcome, message, advice, line of the learner's file, trace)."""
    name, nothing = kata.file_name, (None, [])
    if run.ended == "cancelled":
        return CANCELLED, "The check was cancelled.", "", *nothing
    not_run = run.first("not_run")
    if not_run:
        return (
            NOT_RUN,
            f"Not run: {not_run['reason']}.",
            "run it on a machine that has one, or with --device cpu",
            *nothing,
        )
    if run.ended == "worker" and run.phase in ("importing", "testing", "after"):
        return (
            CRASH,
            f"The code ended the process that checks it, {_where(run, tasks)}.",
            "remove what kills processes",
            *nothing,
        )
    fault = run.first("fault")
    if fault:
        return FAULT, f"The spec of {kata.slug} is broken: {_last_line(fault['message'])}", "", *nothing
    if run.ended == "worker" or (run.first("ready") is None and run.ended in ("exit", "signal", "timeout")):
        return (
            FAULT,
            f"The worker process did not run: {_last_line(run.worker_log) or run.ended}",
            "kata doctor",
            *nothing,
        )
    broken = [test for task in tasks for test in task.tests if test.state == "fault"]
    not_loaded = run.first("not_loaded")
    if not_loaded:
        return (
            ERROR,
            _load_message(name, not_loaded),
            "mend the file, then check again",
            not_loaded["line"],
            not_loaded["trace"],
        )
    sealed = run.first("outcomes")
    if sealed is None:
        return _ended_early(name, run, tasks)
    expected = {test["id"] for test in (run.first("collected") or {"tests": []})["tests"]}
    if sealed["touched"] or sealed["canary"] != "failed" or set(sealed["outcomes"]) != expected or run.forged:
        what = ", ".join(sealed["touched"]) or "the messages of the check"
        return (
            TAMPERED,
            f"Your code changed {what}, which the verdict relies on.",
            "remove that line; checks must not be touched",
            *nothing,
        )
    if broken:
        failure = broken[0].failure or {}
        return FAULT, f"The spec of {kata.slug} broke in {broken[0].id}: {failure.get('message', '')}", "", *nothing
    wanted = [task for task in tasks if task.level == "core" or only]
    good = bool(wanted) and all(task.state == "passed" and task.tests for task in wanted)
    return (PASSED if good else FAILED), "", "", *nothing


def _ended_early(
    name: str, run: Run, tasks: tuple[TaskResult, ...]
) -> tuple[str, str, str, int | None, list[dict[str, Any]]]:
    where = _where(run, tasks)
    line = _trace_line(run.trace, name)
    at = f", line {line}" if line else ""
    if run.ended == "timeout":
        advice = "look for a loop that does not end; DataLoader workers that wait also look like this"
        return TIMEOUT, f"The code did not come back {where}{at}.", advice, line, []
    if run.ended == "output":
        return (
            LIMIT,
            f"The code printed more than {run.output.total // (1 << 20)} MB {where}.",
            "remove the print from the loop",
            line,
            [],
        )
    if run.ended == "processes":
        return (
            LIMIT,
            f"The code started more processes than a check may have {where}.",
            "start none, or end them",
            line,
            [],
        )
    if run.ended == "signal":
        number = run.status or 0
        label = signal.Signals(number).name if number in signal.Signals._value2member_map_ else f"signal {number}"
        if number == signal.SIGXFSZ:
            return LIMIT, f"The code wrote a larger file than a check may {where}.", "write less", line, []
        return (
            CRASH,
            f"The process was ended by {label} {where}{at}.",
            "look at what runs last; print before it",
            line,
            [],
        )
    return (
        CRASH,
        f"The process ended by itself before the tests finished, {where}.",
        "remove exit(), os._exit() and exec",
        line,
        [],
    )


def _where(run: Run, tasks: tuple[TaskResult, ...]) -> str:
    if run.phase == "importing":
        return "while the file was imported"
    if run.test:
        title = next((test.title for task in tasks for test in task.tests if test.id == run.test), run.test)
        return f"in the test that {title}" if not title.startswith("it ") else f"in the test: {title}"
    return "between two tests"


def _trace_line(trace: str, name: str) -> int | None:
    """The innermost line of the learner's file in a stack dump."""
    match = re.search(rf'File "[^"]*{re.escape(name)}", line (\d+)', trace)
    return int(match[1]) if match else None


def _load_message(name: str, event: dict[str, Any]) -> str:
    at = f", line {event['line']}" if event.get("line") else ""
    kind, message = event["error"], event["message"]
    if kind == "SystemExit":
        return f"{name}{at} exits while it is imported; the tests never start."
    if kind == "NotImplementedError":
        return f"{name}{at} raises NotImplementedError while it is imported."
    return f"{name} does not load{at}: {kind}: {message}"


def _last_line(text: str) -> str:
    lines = [line for line in text.strip().split("\n") if line.strip()]
    return lines[-1].strip()[:300] if lines else ""
