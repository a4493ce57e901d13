"""Reads what an author wrote without running it: hints, lesson, stub, reference, decorators. Used by verify, hint and lesson."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass

from checker.errors import TrackError
from checker.track import Kata

MINIMUM_DOCSTRING = 40  # characters: a sentence with a shape in it


@dataclass(frozen=True)
class Hints:
    """The three rungs of each task."""

    rungs: dict[str, tuple[str, ...]]

    @classmethod
    def read(cls, kata: Kata) -> Hints:
        """Parse hints.md: a `## task` heading per task, and numbered items under it."""
        rungs: dict[str, list[str]] = {}
        task = None
        for line in kata.text("hints.md").splitlines():
            heading = re.match(r"##\s+`?([\w.]+)`?\s*$", line)
            item = re.match(r"\s*\d+[.)]\s+(.*)", line)
            if heading:
                task = heading[1]
                rungs[task] = []
            elif item and task is not None:
                rungs[task].append(item[1].strip())
            elif line.strip() and task is not None and rungs[task]:
                rungs[task][-1] += " " + line.strip()
        return cls({name: tuple(items) for name, items in rungs.items()})


def problems(kata: Kata) -> list[str]:
    """What is wrong with the files of a kata, seen without running them; each a sentence."""
    found: list[str] = []
    for part in (_hints, _lesson, _stub, _decorators, _spec):
        try:
            found += part(kata)
        except TrackError as error:
            found.append(str(error))
        except SyntaxError as error:
            found.append(f"{error.filename}, line {error.lineno}: {error.msg}")
    return found


def _hints(kata: Kata) -> list[str]:
    rungs = Hints.read(kata).rungs
    found = [f"hints.md has no heading `## {task.name}`" for task in kata.tasks if task.name not in rungs]
    found += [f"hints.md: {name} is no task" for name in rungs if name not in {task.name for task in kata.tasks}]
    found += [f"hints.md: {name} has {len(items)} rungs, not 3" for name, items in rungs.items() if len(items) != 3]
    if "```" in kata.text("hints.md"):
        found.append("hints.md has a code block: hints are words")
    return found


def examples(kata: Kata) -> list[str]:
    """The fenced python blocks of the lesson."""
    return re.findall(r"^```python\n(.*?)^```", kata.text("lesson.md"), re.S | re.M)


def _lesson(kata: Kata) -> list[str]:
    text = kata.text("lesson.md")
    found = [] if text.startswith("# ") else ["lesson.md does not begin with a `# Title`"]
    for task in kata.tasks:
        if not any(f"`{name}" in text for name in {task.name, *task.names}):
            found.append(f"lesson.md does not name the task `{task.name}`")
    blocks = examples(kata)
    if not any("assert" in block for block in blocks):
        found.append("lesson.md has no python block with an assert as its worked example")
    for block in blocks:
        try:
            compile(block, "lesson.md", "exec")
        except SyntaxError as error:
            found.append(f"lesson.md: a python block does not compile: {error.msg}")
    return found


def _tops(source: str, name: str) -> dict[str, ast.FunctionDef | ast.ClassDef]:
    return {
        node.name: node for node in ast.parse(source, name).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    }


def _stub(kata: Kata) -> list[str]:
    stub = _tops(kata.text("stub.py"), "stub.py")
    reference = _tops(_reference(kata), kata.reference_file.name)
    found = []
    for name in (name for task in kata.tasks for name in task.names):
        for where, tops in (("stub.py", stub), (f"reference/{kata.reference_file.name}", reference)):
            if name not in tops:
                found.append(f"{where} has no {name}")
            elif len(ast.get_docstring(tops[name]) or "") < (MINIMUM_DOCSTRING if where == "stub.py" else 1):
                found.append(f"{where}: {name} has no docstring that states its contract")
        if name in stub and name in reference:
            mine, theirs = _signature(stub[name]), _signature(reference[name])
            if mine != theirs:
                found.append(f"the signature of {name} is {mine} in stub.py and {theirs} in the reference")
            for method in _public_methods(stub[name]) - _public_methods(reference[name]):
                found.append(f"the reference's {name} has no method {method}")
    return found


def _reference(kata: Kata) -> str:
    try:
        return kata.reference_file.read_text(encoding="utf-8")
    except OSError:
        raise TrackError(f"{kata.reference_file} is missing.") from None


def _signature(node: ast.FunctionDef | ast.ClassDef) -> str:
    if isinstance(node, ast.ClassDef):
        inner = next(
            (part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"), None
        )
        return _signature(inner) if inner is not None else "()"
    args = node.args
    for arg in [*args.posonlyargs, *args.args, *args.kwonlyargs]:
        arg.annotation = None
    return f"({ast.unparse(args)})"


def _public_methods(node: ast.FunctionDef | ast.ClassDef) -> set[str]:
    if not isinstance(node, ast.ClassDef):
        return set()
    return {part.name for part in node.body if isinstance(part, ast.FunctionDef) and not part.name.startswith("_")}


def decorated(source: str, decorator: str) -> list[tuple[str, str]]:
    """(own name, name that it replaces) of everything decorated with `@decorator("name", ...)`."""
    found = []
    for node in ast.parse(source).body:
        for mark in getattr(node, "decorator_list", []):
            if (
                isinstance(mark, ast.Call)
                and isinstance(mark.func, ast.Name)
                and mark.func.id == decorator
                and mark.args
            ):
                found.append((node.name, ast.literal_eval(mark.args[0])))
    return found


def misconceptions(kata: Kata) -> list[tuple[str, str]]:
    """(id, name that it replaces) of each misconception."""
    return decorated(kata.text("misconceptions.py"), "misconception")


def alternative_rounds(kata: Kata) -> int:
    """How many rounds of alternatives there are."""
    names = [name for _, name in decorated(kata.text("alternatives.py"), "alternative")]
    return max((names.count(name) for name in names), default=0)


def _decorators(kata: Kata) -> list[str]:
    names = {name for task in kata.tasks for name in task.names}
    found = []
    wrong = misconceptions(kata)
    found += [
        f"misconceptions.py: {name} replaces {target}, which is no name of a task"
        for name, target in wrong
        if target not in names
    ]
    found += [
        f"misconceptions.py has two things called {name}"
        for name in {n for n, _ in wrong}
        if [n for n, _ in wrong].count(name) > 1
    ]
    if not wrong:
        found.append("misconceptions.py has no misconception")
    others = decorated(kata.text("alternatives.py"), "alternative")
    found += [
        f"alternatives.py: {name} replaces {target}, which is no name of a task"
        for name, target in others
        if target not in names
    ]
    if not others:
        found.append("alternatives.py has no alternative")
    return found


def _spec(kata: Kata) -> list[str]:
    tested = {name for _, name in decorated(kata.text("spec.py"), "task")}
    return [f"spec.py has no test of the task {task.name}" for task in kata.tasks if task.name not in tested]
