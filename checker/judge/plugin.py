"""The pytest plugin: the order of a check, how one test is run, and the events that the parent turns into a verdict."""

from __future__ import annotations

import contextlib
import gc
import importlib
import inspect
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import _pytest.assertion
import pytest
import torch

from checker.judge import describe, diagnose, failures, modules
from checker.judge.events import Channel
from checker.judge.failures import Failure, Forbidden, WrongSignature
from checker.judge.forbidden import Ban, Guard, forbidden_import, loop_line
from checker.judge.given import Given, Values, derive
from checker.judge.integrity import Globals, changed, snapshot
from checker.judge.meter import unmetered
from checker.judge.recorder import Solution
from checker.judge.signatures import signatures, wrong_arguments
from checker.judge.timer import Timer

Request = dict[str, Any]
FREE = contextlib.nullcontext()


class Judge:
    """One check of one kata. `run` of an item gives None (passed) or its Failure; everything else is built on that."""

    def __init__(self, request: Request, channel: Channel, sources: modules.Sources) -> None:
        kata = request["kata"]
        self.request, self.send, self.sources = request, channel.send, sources
        self.slug, self.folder = kata["slug"], Path(kata["folder"])
        self.spec = str(self.folder / "spec.py")
        self.tasks = {task["name"]: task for task in kata["tasks"]}
        self.path, self.source = sources.learner[self.slug]
        self.files = {path: Path(path).name for path, _ in sources.learner.values()}
        self.guard = Guard(self.files)
        self.bans = {name: Ban(task["forbidden"]) for name, task in self.tasks.items()}
        self.given = Given(request["seed"], request["device"], self.folder,
                           {"solution": lambda: self.solution, "reference": lambda: self.reference})  # fmt: skip
        self.limits = {name: task["time_limit"] for name, task in self.tasks.items()}
        self.limits[""] = 10.0  # of the test that must fail
        self.timer = Timer()
        self.problems: dict[str, Exception | Forbidden] = {}  # task -> what every test of it must raise
        self.items: list[pytest.Item] = []
        self.canary: pytest.Item | None = None
        self.module: ModuleType | None = None
        self.solution: Solution | None = None
        self.reference: ModuleType | None = None
        self.results: dict[str, Failure | None] = {}
        self.faults: list[str] = []
        self.globals = Globals()
        self.called = 0.0  # seconds in the present test's function alone
        self.concluded = False  # the outcomes are sealed: what pytest says afterwards does not matter

    # pytest's hooks

    def pytest_configure(self, config: pytest.Config) -> None:
        """Declare the marker, and bring the fixtures along."""
        config.addinivalue_line("markers", "task(name): the task of kata.toml that a test belongs to")
        config.pluginmanager.register(self.given)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run a test that asks for `dtype` once per dtype of kata.toml."""
        if "dtype" in metafunc.fixturenames:
            names = self.request["kata"]["dtypes"]
            metafunc.parametrize("dtype", [getattr(torch, name) for name in names], ids=names)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Put the tests in the order of the tasks, and drop what was not asked for."""
        for item in items:
            marker = next((mark for mark in item.own_markers if mark.name == "task"), None)
            if marker is None or marker.args[0] not in self.tasks:
                what = "no @task" if marker is None else f"the unknown task {marker.args[0]!r}"
                self.faults.append(f"{item.name} has {what}")
                continue
            item.kata_task = marker.args[0]
        wanted = self.request.get("only")
        items[:] = [item for item in items if hasattr(item, "kata_task") and (not wanted or item.kata_task in wanted)]
        place = {name: number for number, name in enumerate(self.tasks)}
        items.sort(key=lambda item: place[item.kata_task])

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A spec that cannot be collected is our fault."""
        if report.failed:
            self.faults.append(str(report.longrepr))

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """The check, in place of pytest's loop over the tests."""
        sys.dont_write_bytecode = True
        gc.freeze()  # what pytest made lives as long as the process
        gc.enable()
        self.items = list(session.items)
        tests = [{"id": test_id(item), "task": item.kata_task, "title": title(item)} for item in self.items]
        self.send("collected", tests=tests)
        if self.faults:
            self.send("fault", message="\n".join(self.faults)[:4000])
            return True
        if not self.items:
            self.send("fault", message="the spec has no test for this")
            return True
        self.canary = self.make_canary()
        self.reference = importlib.import_module(f"reference.{self.slug}")
        # pytest sets this up around each test: how it explains a plain assert
        with contextlib.contextmanager(_pytest.assertion.pytest_runtest_protocol)(self.items[0]), self.module_calls():
            complete = self.check()
        if complete:
            self.measure_costs()
            self.send("done")
        return True

    def check(self) -> bool:
        """Import, run, seal, name mistakes; True if there is something to meter after it."""
        if self.request["mode"] == "mutants":
            from checker.judge import mutation

            mutation.run(self)
            return False
        before = snapshot()
        if not self.load_solution():
            return False
        for item in self.items:
            name = test_id(item)
            self.send("start", test=name)
            started, self.called = time.perf_counter(), 0.0
            failure = self.results[name] = self.run(item)
            record = None if failure is None else failure.record()
            took = time.perf_counter() - started
            self.send("finish", test=name, seconds=took, called=self.called, failure=record)
        self.finish(before)
        diagnose.run(self)
        return True

    def pytest_internalerror(self, excrepr: object) -> bool:
        """An error of pytest or of this plugin is our fault; the last lines say what it was."""
        self.faults.append(str(excrepr))
        return True

    # Running one test

    def run(self, item: pytest.Function) -> Failure | None:
        """Run one test on the current solution; None if it passed.

        The steps are pytest's own (set up, call, tear down), without its hooks and reports, which take longer than a short test.
        """
        self.solution.calls.clear()
        self.solution.used.clear()
        self.guard.seen = None
        self.given.begin(item.name)
        failure, after = self.attempt(self.body, item), None
        state = item.session._setupstate
        if item in state.stack:
            following = self.items[0] if item is self.canary else self.canary
            after = self.attempt(state.teardown_exact, following)
        item.funcargs, item._request = None, False
        different = self.globals.restore()
        if different and after is None:
            after = Failure("globals", f"the code changed torch's {', '.join(different)} and did not put it back")
        return failure or after

    def body(self, item: pytest.Function) -> None:
        """The fixtures of a test and its call, with the time limit and the bans of its task."""
        values, complete = self.given.values(item)
        if not complete:
            item._initrequest()
            item.funcargs.update(values)
            item.session._setupstate.setup(item)
            values = item.funcargs
        problem = self.problems.get(item.kata_task)
        if problem is not None:
            raise problem
        arguments = {name: values[name] for name in item._fixtureinfo.argnames}
        ban = self.bans.get(item.kata_task)
        # fixtures are not timed: the limit is about the learner's code
        self.timer.begin(item, self.limits[item.kata_task])
        try:
            with self.guard.watch(ban, item.kata_task) if ban else FREE:
                started = time.perf_counter()
                try:
                    item.obj(**arguments)
                finally:
                    self.called = time.perf_counter() - started
        finally:
            self.timer.end()
        if self.guard.seen is not None:
            raise self.guard.seen

    def attempt(self, step: Callable[..., object], *arguments: Any) -> Failure | None:
        """The Failure for what a step of a test raises; what is to end the whole session, as `pytest.exit()`, goes on."""
        try:
            step(*arguments)
        except (pytest.exit.Exception, KeyboardInterrupt):
            raise
        except BaseException as error:
            return self.failure(error)
        return None

    def failure(self, error: BaseException) -> Failure:
        """The Failure for what a test raised, with the last call of the learner's code."""
        trace = error.__traceback__
        error = self.guard.seen if self.guard.seen is not None else error
        found = failures.from_exception(error, trace, spec=self.spec, learner=self.files, today=self.path)
        if found.kind in ("mismatch", "assert", "error", "timeout", "memory") and self.solution.calls:
            called, result = self.solution.calls[-1]
            lines = [("called", called)]
            if result and not any(label.startswith("returned") for label, _ in found.lines):
                lines.append(("returned", result))
            found.lines = lines + found.lines
        return found

    @contextlib.contextmanager
    def module_calls(self) -> Iterator[None]:
        """Remember calls of the learner's own nn.Modules, too."""

        def note(module: torch.nn.Module, args: Any, output: Any) -> None:
            if type(module).__module__ == self.slug and self.solution is not None:
                with unmetered():
                    called = describe.call(type(module).__name__, args, {}, [])
                    self.solution.calls.append([called, describe.value(output)])

        handle = torch.nn.modules.module.register_module_forward_hook(note)
        try:
            yield
        finally:
            handle.remove()

    # Loading

    def load_solution(self) -> bool:
        """Import the learner's file; says so and returns False if it does not load."""
        self.send("importing")
        self.sources.used.clear()
        found = None if self.request.get("trusted") else forbidden_import(self.source)
        if found:
            message = f"it imports {found[1]}, which belongs to the program: write the code yourself"
            self.send("not_loaded", message=message, error="ImportError", line=found[0], trace=[])
            return False
        try:
            self.module = modules.fresh(self.slug, self.source, self.path, self.variant())
        except BaseException as error:
            found = self.import_failure(error)
            self.send("not_loaded", **found)
            return False
        sys.modules[self.slug] = self.module
        self.use(self.module)
        self.check_names()
        different = self.globals.restore()
        self.send("imported", provenance=dict(self.sources.used), globals=different)
        return True

    def import_failure(self, error: BaseException) -> dict[str, Any]:
        """What is told about a file that does not import: message, line, and the lines of the learner's that led there."""
        found = failures.from_exception(error, error.__traceback__, spec=self.spec, learner=self.files, today=self.path)
        record = found.record()
        record["message"], record["error"] = str(error)[:2000], type(error).__name__
        if isinstance(error, SyntaxError):
            record["line"] = error.lineno
            record["message"] = f"{error.msg}"
            text = (error.text or "").rstrip("\n")
            record["trace"] = [
                {"file": Path(error.filename or self.path).name, "line": error.lineno, "in": "", "text": text.strip()}
            ]
        return record

    def variant(self) -> dict[str, Any]:
        """What `kata verify` asks to be replaced in the module: a misconception or a round of alternatives."""
        wanted = self.request.get("variant")
        if not wanted:
            return {}
        if "misconception" in wanted:
            known = diagnose.load(self.folder)
            return {item.name: item.thing for item in known if item.id == wanted["misconception"]}
        return diagnose.alternatives(self.folder, wanted["alternatives"])

    def use(self, module: ModuleType) -> None:
        """Make `module` the solution that tests see."""
        names = tuple(name for task in self.tasks.values() for name in task["names"])
        self.solution = Solution(module, names)

    def check_names(self) -> None:
        """Find names that are gone, signatures that changed and loops where none are allowed."""
        stub = signatures((self.folder / "stub.py").read_text(encoding="utf-8"))
        for name, task in self.tasks.items():
            for member in task["names"]:
                thing = getattr(self.module, member, None)
                wanted = stub.get(member)
                if thing is not None and wanted is not None:
                    problem = wrong_arguments(member, thing, wanted)
                    if problem:
                        self.problems[name] = WrongSignature(problem)
            if self.bans[name].loops and not self.request.get("variant"):
                found = loop_line(self.source, task["names"])
                if found:
                    self.problems[name] = Forbidden(found[1], found[0], self.files[self.path], name)

    # The end

    def finish(self, before: dict[str, dict[str, Any]]) -> None:
        """Run the test that must fail, compare what the verdict relies on, and send the sealed outcomes."""
        canary = self.canary_state()
        touched = changed(before)
        outcomes = {name: "passed" if failure is None else failure.kind for name, failure in self.results.items()}
        others = [
            thread.name
            for thread in threading.enumerate()
            if thread is not threading.main_thread() and thread.is_alive()
        ]
        self.concluded = True
        self.send(
            "outcomes", pid=os.getpid(), outcomes=outcomes, canary=canary, touched=touched[:5], threads=others[:5]
        )

    def make_canary(self) -> pytest.Item:
        """A test that must fail, and that goes through the same machinery as the others."""

        def must_fail() -> None:
            from checker.testing import assert_close

            assert_close(torch.ones(2), torch.zeros(2))

        item = pytest.Function.from_parent(self.items[0].parent, name="canary", callobj=must_fail)
        item.kata_task = ""
        return item

    def canary_state(self) -> str:
        """'failed' if the test that must fail does fail, as it should; else the machinery was changed."""
        failure = self.run(self.canary)
        return "failed" if failure is not None and failure.kind == "mismatch" else "passed"

    def measure_costs(self) -> None:
        """Meter the cost cases of the tasks that passed, on the learner's module and on the reference's."""
        if not self.request.get("cost"):
            return
        failed = {item.kata_task for item in self.items if self.results.get(test_id(item)) is not None}
        passed = {item.kata_task for item in self.items} - failed
        spec = self.items[0].getparent(pytest.Module).obj
        for case in list(vars(spec).values()):
            task = getattr(case, "kata_cost_case", None)
            if task in passed:
                try:
                    mine, theirs = (self.cost_of(case, module) for module in (self.module, self.reference))
                except Exception as error:
                    self.send("no_cost", task=task, message=f"{type(error).__name__}: {error}"[:300])
                else:
                    self.send("cost", task=task, yours=mine, reference=theirs)

    def cost_of(self, case: Callable, module: ModuleType) -> dict[str, int]:
        """FLOPs, bytes and calls of one cost case on one module."""
        from checker.judge.meter import measure

        values = Values(derive(self.request["seed"], case.__name__), torch.device(self.request["device"]))
        offered = {
            "module": module, "device": values.device, "data_dir": self.folder / "data", "seed": values.seed, "generator": values.other(),
            "randn": values.randn, "rand": values.rand, "randint": values.randint, "randperm": values.randperm,
        }  # fmt: skip
        wanted = inspect.signature(case).parameters
        thunk = case(**{name: offered[name] for name in wanted})
        _, cost = measure(thunk)
        return {
            "flops": cost.flops,
            "new_bytes": cost.new_bytes,
            "peak_bytes": cost.peak_bytes,
            "saved_bytes": cost.saved_bytes,
            "calls": cost.calls,
        }


def test_id(item: pytest.Item) -> str:
    """The test's name with its parameters."""
    return item.nodeid.partition("::")[2]


test_id.__test__ = False


def title(item: pytest.Item) -> str:
    """The claim that a test makes: its docstring's first line, or its name read aloud."""
    text = (item.obj.__doc__ or "").strip().split("\n")[0]
    if text:
        return text
    name = item.originalname if isinstance(item, pytest.Function) else item.name
    words = name.removeprefix("test_").replace("_", " ")
    return f"{words} [{item.callspec.id}]" if hasattr(item, "callspec") else words
