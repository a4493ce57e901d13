"""Refuses forbidden shortcuts while a task's tests run, with the line of the learner's file.

Three nets, because each has holes: TorchFunctionMode sees torch's Python functions, TorchDispatchMode sees ATen operations,
and a profile function sees calls of plain Python functions and classes (an optimizer, a DataLoader, a recurrent layer).
A call counts only if the nearest frame outside torch belongs to one of the learner's files: spec and reference may call anything.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import os
import sys
from collections.abc import Iterable, Iterator
from types import CodeType, FrameType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from checker.judge.failures import Forbidden, SpecFault
from checker.judge.families import FAMILIES

_SKIPPED = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(__file__) + os.sep, "<")


class Ban:
    """What one task refuses, resolved to objects, code and operation names."""

    def __init__(self, words: Iterable[str]) -> None:
        self.loops = False
        self.functions: dict[int, str] = {}  # id of a function -> its name
        self.codes: dict[CodeType, str] = {}
        self.builtins: dict[int, str] = {}
        self.operations: dict[str, str] = {}
        self.prefixes: list[tuple[str, str]] = []
        self._alive: list[Any] = []
        for word in words:
            if word == "loops":
                self.loops = True
            for name in FAMILIES.get(word, () if word == "loops" else (word,)):
                self._add(name, strict=word not in FAMILIES)

    def _add(self, name: str, *, strict: bool) -> None:
        if name.startswith("aten::"):
            operation = name.removeprefix("aten::")
            if "*" in operation:
                self.prefixes.append((operation.rstrip("*"), operation.rstrip("*")))
            else:
                self.operations[operation] = operation
            return
        thing = _resolve(name)
        if thing is None:
            if strict:
                raise SpecFault(f"kata.toml forbids {name!r}, which this torch does not have")
            return
        self._alive.append(thing)
        self.functions[id(thing)] = name
        if isinstance(thing, type):
            code = getattr(thing.__init__, "__code__", None)
        else:
            code = getattr(thing, "__code__", None)
        if code is not None:
            # all functions made by contextlib.contextmanager share one code object: only their identity tells them apart
            if code.co_filename != contextlib.__file__:
                self.codes[code] = name
        else:
            self.builtins[id(thing)] = name

    def __bool__(self) -> bool:
        return bool(self.functions or self.operations or self.prefixes)

    def operation(self, name: str) -> str | None:
        """The name under which an ATen operation is refused, or None."""
        if name in self.operations:
            return f"torch.ops.aten.{name}"
        for prefix, shown in self.prefixes:
            if name.startswith(prefix):
                return f"{shown.lstrip('_')} (the operation {name})"
        return None


def _resolve(name: str) -> Any:
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            thing = importlib.import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        for part in parts[cut:]:
            thing = getattr(thing, part, None)
            if thing is None:
                return None
        return thing
    return None


@functools.lru_cache(maxsize=1)
def _parsed(source: str) -> ast.Module | None:
    """The syntax tree of a learner's file, parsed once for all tasks; None if it has an error."""
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError):
        return None


def forbidden_import(source: str) -> tuple[int, str] | None:
    """The first import of the program's own packages in a learner's file: (line, name), or None."""
    tree = _parsed(source)
    for node in ast.walk(tree) if tree else ():
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        for name in names:
            if name.partition(".")[0] in ("reference", "checker", "katas", "progress"):
                return node.lineno, name
    return None


class Guard:
    """Watches the learner's files (`files`: path -> name) while tests run; `seen` keeps what was caught, even if it was swallowed."""

    def __init__(self, files: dict[str, str]) -> None:
        self.files = files
        self.seen: Forbidden | None = None
        self._task = ""

    def _caller(self, frame: FrameType | None) -> FrameType | None:
        """The learner's frame that is nearest, if no frame of spec or reference is nearer."""
        while frame is not None:
            file = frame.f_code.co_filename
            if file in self.files:
                return frame
            if not file.startswith(_SKIPPED) and "/contextlib.py" not in file:
                return None
            frame = frame.f_back
        return None

    def caught(self, name: str, frame: FrameType | None) -> None:
        """Raise Forbidden if the call comes from the learner's files."""
        mine = self._caller(frame)
        if mine is not None:
            self.seen = Forbidden(name, mine.f_lineno, self.files[mine.f_code.co_filename], self._task)
            raise self.seen

    @contextlib.contextmanager
    def watch(self, ban: Ban, task: str) -> Iterator[None]:
        """Refuse what `ban` says inside the block."""
        self.seen, self._task = None, task
        if not ban:
            yield
            return
        profile = _profile(self, ban) if (ban.codes or ban.builtins) else None
        with _Functions(self, ban), _Operations(self, ban):
            previous = sys.getprofile()
            if profile is not None:
                sys.setprofile(profile)
            try:
                yield
            finally:
                removed = profile is not None and self.seen is None and sys.getprofile() is not profile
                sys.setprofile(previous)
            if removed:
                self.seen = Forbidden("sys.setprofile", None, "your file", task)


def _profile(guard: Guard, ban: Ban) -> Any:
    codes, builtins = ban.codes, ban.builtins
    # methods of torch.Tensor arrive as bound builtins: compare their names
    methods = {name.rsplit(".", 1)[1]: name for name in ban.builtins.values() if name.startswith("torch.Tensor.")}

    def profile(frame: FrameType, event: str, arg: Any) -> None:
        if event == "call":
            name = codes.get(frame.f_code)
            if name is not None:
                guard.caught(name, frame.f_back)
        elif event == "c_call":
            name = builtins.get(id(arg))
            if name is None and methods and isinstance(getattr(arg, "__self__", None), torch.Tensor):
                name = methods.get(getattr(arg, "__name__", ""))
            if name is not None:
                guard.caught(name, frame)

    return profile


class _Functions(TorchFunctionMode):
    def __init__(self, guard: Guard, ban: Ban) -> None:
        super().__init__()
        self.guard, self.ban = guard, ban

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = self.ban.functions.get(id(func))
        if name is not None:
            self.guard.caught(name, sys._getframe(1))
        return func(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch would import its compiler, which takes a second, to keep it out of this class."""
        return False

    def __init__(self, guard: Guard, ban: Ban) -> None:
        super().__init__()
        self.guard, self.ban = guard, ban
        self._known: dict[Any, str | None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in self._known:
            self._known[func] = self.ban.operation(func._schema.name.partition("::")[2])
        name = self._known[func]
        if name is not None:
            self.guard.caught(name, sys._getframe(1))
        return func(*args, **(kwargs or {}))


def loop_line(source: str, names: Iterable[str]) -> tuple[int, str] | None:
    """The first loop in the code of `names` or of helpers in the same file that they call: (line, what it is), or None."""
    tree = _parsed(source)
    if tree is None:
        return None
    tops = {
        node.name: node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
    }
    todo, reached, found = [name for name in names if name in tops], set(), []
    while todo:
        name = todo.pop()
        if name in reached:
            continue
        reached.add(name)
        for node in ast.walk(tops[name]):
            if isinstance(node, (ast.For, ast.AsyncFor, ast.While)):
                found.append((node.lineno, "a loop"))
            elif isinstance(node, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
                found.append((node.lineno, "a comprehension"))
            elif isinstance(node, ast.Name) and node.id in ("map", "vmap"):
                found.append((node.lineno, f"{node.id}, which is a loop"))
            elif isinstance(node, ast.Attribute) and node.attr in ("vmap", "vectorize"):
                found.append((node.lineno, f"{node.attr}, which is a loop"))
            if isinstance(node, ast.Name) and node.id in tops:
                todo.append(node.id)
    return min(found) if found else None
