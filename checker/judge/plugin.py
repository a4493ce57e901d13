"""The pytest plugin: fixtures for specs, the order of a check, and the events that the parent turns into a verdict."""

from __future__ import annotations

import ast
import contextlib
import faulthandler
import inspect
import os
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from checker.judge import describe, diagnose, failures, modules
from checker.judge.events import Channel
from checker.judge.failures import Failure, Forbidden, Mismatch, SpecFault, WrongSignature
from checker.judge.forbidden import Ban, Guard, forbidden_import, loop_line
from checker.judge.integrity import Globals, changed, snapshot
from checker.judge.meter import unmetered
from checker.judge.recorder import Solution

Request = dict[str, Any]
NO_BAN = Ban(())


class Judge:
    """One check of one kata. `run` of an item gives None (passed) or its Failure; everything else is built on that."""

    def __init__(self, request: Request, channel: Channel, sources: modules.Sources, trace_fd: int | None) -> None:
        kata = request["kata"]
        self.request, self.send, self.sources, self.trace_fd = request, channel.send, sources, trace_fd
        self.slug, self.folder = kata["slug"], Path(kata["folder"])
        self.spec = str(self.folder / "spec.py")
        self.tasks = {task["name"]: task for task in kata["tasks"]}
        self.path, self.source = sources.learner[self.slug]
        self.files = {path: Path(path).name for path, _ in sources.learner.values()}
        self.guard = Guard(self.files)
        self.bans = {name: Ban(task["forbidden"]) for name, task in self.tasks.items()}
        self.problems: dict[str, Exception | Forbidden] = {}  # task -> what every test of it must raise
        self.items: list[pytest.Item] = []
        self.canary: pytest.Item | None = None
        self.module: ModuleType | None = None
        self.solution: Solution | None = None
        self.reference: ModuleType | None = None
        self.results: dict[str, Failure | None] = {}
        self.faults: list[str] = []
        self.globals = Globals()
        self.concluded = False  # the outcomes are sealed: what pytest says afterwards does not matter
        self._failure: Failure | None = None
        self.seconds: dict[str, float] = {}

    # pytest's hooks

    @pytest.hookimpl(trylast=True)
    def pytest_configure(self, config: pytest.Config) -> None:
        """Declare the marker, and let pytest's own reporter talk to nobody."""
        config.addinivalue_line("markers", "task(name): the task of kata.toml that a test belongs to")
        reporter = config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            reporter._tw._file = open(os.devnull, "w")  # noqa: SIM115 - lives as long as the process

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run a test that asks for `dtype` once per dtype of kata.toml."""
        if "dtype" in metafunc.fixturenames:
            names = self.request["kata"]["dtypes"]
            metafunc.parametrize("dtype", [getattr(torch, name) for name in names], ids=names)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Drop what was not asked for, and give each test the time limit of its task."""
        for item in items:
            marker = item.get_closest_marker("task")
            if marker is None or marker.args[0] not in self.tasks:
                what = "no @task" if marker is None else f"the unknown task {marker.args[0]!r}"
                self.faults.append(f"{item.name} has {what}")
                continue
            item.kata_task = marker.args[0]
            item.add_marker(pytest.mark.timeout(self.tasks[item.kata_task]["time_limit"]))
        wanted = self.request.get("only")
        items[:] = [item for item in items if hasattr(item, "kata_task") and (not wanted or item.kata_task in wanted)]
        order = list(self.tasks)
        items.sort(key=lambda item: order.index(item.kata_task))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A spec that cannot be collected is our fault."""
        if report.failed:
            self.faults.append(str(report.longrepr))

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """The check: collect, import, run, seal; then name mistakes and meter costs."""
        sys.dont_write_bytecode = True
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
        self.load_reference()
        if self.request["mode"] == "mutants":
            from checker.judge import mutation

            mutation.run(self)
            return True
        before = snapshot()
        if not self.load_solution():
            return True
        for item in self.items:
            self.send("start", test=test_id(item))
            started = time.perf_counter()
            failure = self.results[test_id(item)] = self.run(item)
            record = None if failure is None else failure.record()
            self.send("finish", test=test_id(item), seconds=time.perf_counter() - started, failure=record)
        self.finish(before)
        diagnose.run(self)
        self.measure_costs(session)
        self.send("done")
        return True

    def pytest_internalerror(self, excrepr: object) -> bool:
        """An error of pytest or of this plugin is our fault; the last lines say what it was."""
        self.faults.append(str(excrepr))
        return True

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        """The body of a test, with the bans of its task and a record of module calls."""
        problem = self.problems.get(item.kata_task)
        if problem is not None:
            raise problem
        with self.module_calls(), self.guard.watch(self.bans.get(item.kata_task, NO_BAN), item.kata_task):
            result = yield
        if self.guard.seen is not None:
            raise self.guard.seen
        return result

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo) -> pytest.TestReport:
        """Keep the Failure of a test's first phase that did not pass; pytest's own report of it, which is slow, is not made."""
        if call.excinfo is not None and self._failure is None:
            self._failure = self.failure(call.excinfo)
        outcome = "passed" if call.excinfo is None else "failed"
        times = {"duration": call.duration, "start": call.start, "stop": call.stop}
        return pytest.TestReport(item.nodeid, item.location, {}, outcome, None, call.when, **times)

    # Running one test

    def run(self, item: pytest.Item) -> Failure | None:
        """Run one test on the current solution; None if it passed."""
        self._failure = None
        self.solution.calls.clear()
        self.solution.used.clear()
        if self.trace_fd is not None:
            limit = self.tasks[item.kata_task]["time_limit"] if item.kata_task else 10.0
            faulthandler.dump_traceback_later(limit + 0.3, file=self.trace_fd)
        try:
            item.config.hook.pytest_runtest_protocol(
                item=item, nextitem=self.canary if item is not self.canary else self.items[0]
            )
        finally:
            if self.trace_fd is not None:
                faulthandler.cancel_dump_traceback_later()
        different = self.globals.restore()
        if different and self._failure is None:
            self._failure = Failure(
                "globals", f"the code changed torch's {', '.join(different)} and did not put it back"
            )
        return self._failure

    def failure(self, info: pytest.ExceptionInfo) -> Failure:
        """The Failure for what a test raised, with the last call of the learner's code."""
        error = self.guard.seen if self.guard.seen is not None else info.value
        found = failures.from_exception(error, info.tb, spec=self.spec, learner=self.files, today=self.path)
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
        calls = self.solution.calls

        def note(module: torch.nn.Module, args: Any, output: Any) -> None:
            if type(module).__module__ == self.slug:
                with unmetered():
                    calls.append([describe.call(type(module).__name__, args, {}, []), describe.value(output)])

        handle = torch.nn.modules.module.register_module_forward_hook(note)
        try:
            yield
        finally:
            handle.remove()

    # Loading

    def load_reference(self) -> None:
        """Import the reference of the day; a failure of it is our fault."""
        import importlib

        self.reference = importlib.import_module(f"reference.{self.slug}")

    def load_solution(self) -> bool:
        """Import the learner's file; says so and returns False if it does not load."""
        self.send("importing")
        if self.trace_fd is not None:
            faulthandler.dump_traceback_later(self.request["limits"]["import"], file=self.trace_fd)
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
        finally:
            if self.trace_fd is not None:
                faulthandler.cancel_dump_traceback_later()
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
                    problem = _wrong_arguments(member, thing, wanted)
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

    def measure_costs(self, session: pytest.Session) -> None:
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
        offered = {"module": module, **values.fixtures(), "device": values.device, "data_dir": self.folder / "data"}
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

    # Fixtures

    @pytest.fixture(name="solution")
    def solution_fixture(self) -> Solution:
        """The learner's module."""
        return self.solution

    @pytest.fixture(name="reference")
    def reference_fixture(self) -> ModuleType:
        """The reference module of the day."""
        return self.reference

    @pytest.fixture
    def device(self) -> torch.device:
        """The device under test."""
        return torch.device(self.request["device"])

    @pytest.fixture
    def seed(self, request: pytest.FixtureRequest) -> int:
        """The seed of this test, from the seed of the check and the test's name."""
        return derive(self.request["seed"], request.node.name)

    @pytest.fixture
    def _values(self, seed: int, device: torch.device) -> Values:
        return Values(seed, device)

    @pytest.fixture
    def generator(self, _values: Values) -> torch.Generator:
        """A CPU generator for `generator=` arguments."""
        return torch.Generator().manual_seed(_values.generator.initial_seed() + 1)

    @pytest.fixture
    def randn(self, _values: Values) -> Callable[..., torch.Tensor]:
        """Standard normal values."""
        return _values.randn

    @pytest.fixture
    def rand(self, _values: Values) -> Callable[..., torch.Tensor]:
        """Uniform values in [0, 1)."""
        return _values.rand

    @pytest.fixture
    def randint(self, _values: Values) -> Callable[..., torch.Tensor]:
        """Integers, int64."""
        return _values.randint

    @pytest.fixture
    def randperm(self, _values: Values) -> Callable[..., torch.Tensor]:
        """A random permutation."""
        return _values.randperm

    @pytest.fixture
    def data_dir(self) -> Path:
        """The kata's folder of golden data."""
        return self.folder / "data"


class Values:
    """Fresh random values on a device, drawn on the CPU so that every device gets the same ones."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.generator, self.device = torch.Generator().manual_seed(seed), device

    def randn(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> torch.Tensor:
        """Normal values with standard deviation `scale`."""
        dtype = dtype or torch.float32
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return (torch.randn(_shape(shape), generator=self.generator, dtype=wide) * scale).to(self.device, dtype)

    def rand(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Uniform values in [0, 1)."""
        dtype = dtype or torch.float32
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return torch.rand(_shape(shape), generator=self.generator, dtype=wide).to(self.device, dtype)

    def randint(
        self, low: int, high: int, shape: tuple[int, ...] | int = (), dtype: torch.dtype = torch.int64
    ) -> torch.Tensor:
        """Integers from `low` to `high - 1`."""
        sizes = (shape,) if isinstance(shape, int) else tuple(shape)
        return torch.randint(low, high, sizes, generator=self.generator).to(self.device, dtype)

    def randperm(self, n: int) -> torch.Tensor:
        """A permutation of 0 ... n-1."""
        return torch.randperm(n, generator=self.generator).to(self.device)

    def fixtures(self) -> dict[str, Any]:
        """The same under the names of the fixtures."""
        own = {"randn": self.randn, "rand": self.rand, "randint": self.randint, "randperm": self.randperm}
        return {
            **own,
            "generator": torch.Generator().manual_seed(self.generator.initial_seed() + 1),
            "seed": self.generator.initial_seed(),
        }


def _shape(shape: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape


def derive(seed: int, name: str) -> int:
    """The seed of one test: different tests of one check draw different values."""
    return zlib.crc32(f"{seed}:{name}".encode())


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


def signatures(source: str) -> dict[str, list[tuple[str, bool]]]:
    """For each top-level function or class (its __init__): the parameters as (name, has a default), without self."""
    found = {}
    for node in ast.parse(source).body:
        target = node
        if isinstance(node, ast.ClassDef):
            target = next(
                (part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"), None
            )
        if isinstance(target, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found[node.name] = _parameters(target, skip_self=isinstance(node, ast.ClassDef))
    return found


def _parameters(function: ast.FunctionDef | ast.AsyncFunctionDef, *, skip_self: bool) -> list[tuple[str, bool]]:
    args = function.args
    positional = [*args.posonlyargs, *args.args]
    defaults = [False] * (len(positional) - len(args.defaults)) + [True] * len(args.defaults)
    both = list(zip((arg.arg for arg in positional), defaults, strict=True))[1 if skip_self else 0 :]
    return both + [
        (arg.arg, default is not None) for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True)
    ]


def _wrong_arguments(name: str, thing: Any, wanted: list[tuple[str, bool]]) -> str:
    """A sentence if `thing` cannot be called like the stub's version, else ''."""
    try:
        parameters = inspect.signature(thing).parameters.values()
    except (TypeError, ValueError):
        return ""
    if any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters):
        return ""
    have = {p.name: p.default is not p.empty for p in parameters}
    names = [p for p, _ in wanted]
    same_order = [p for p in have if p in names] == names
    extra_needed = [p for p, default in have.items() if p not in names and not default]
    lost_default = [p for p, default in wanted if default and not have.get(p, True)]
    if same_order and not extra_needed and not lost_default:
        return ""
    mine = ", ".join(f"{p}=..." if default else p for p, default in have.items())
    theirs = ", ".join(f"{p}=..." if default else p for p, default in wanted)
    return f"{name} takes ({theirs}) in the stub, but yours takes ({mine}): put the arguments back"


__all__ = ["Judge", "Mismatch", "SpecFault", "Values", "derive", "signatures", "test_id", "title"]
