"""Where `import day01_tensor_basics` leads inside a check, and how copies of the learner's module are made.

Sources arrive from the parent as text, taken once: nothing is read again from the workspace, and no bytecode is written.
A name of the track resolves to the learner's own file where the parent sent one (that day is passed), else to the reference.
`reference.dayNN_slug` always is the reference of the track that is checked.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import linecache
import sys
from collections.abc import Mapping
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any


class Sources(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds and loads the modules of a track; `used` says for each day that was imported whose code it is.

    `learner` maps folder names to (path, source) of the learner's files, `days` are the folder names of the track.
    `lent` names, per day, what the learner has not passed there (tasks beyond the core): the reference stands in for these.
    """

    def __init__(
        self,
        learner: Mapping[str, tuple[str, str]],
        reference: Path,
        days: list[str],
        lent: Mapping[str, list[str]] | None = None,
    ) -> None:
        self.learner, self.reference, self.days = dict(learner), reference, set(days)
        self.lent = dict(lent or {})
        self.used: dict[str, str] = {}

    def install(self) -> None:
        """Go first on the import path. Nothing of a track was imported before, so there is nothing to forget.

        A look at each of the thousands of modules that torch brings would copy them into the fork.
        """
        sys.meta_path.insert(0, self)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """The import protocol: a spec for the names that belong to the track, None for all others."""
        if name == "reference":
            spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
            spec.submodule_search_locations = [str(self.reference)]
            return spec
        if name.startswith("reference.") and name.count(".") == 1:
            file = self.reference / f"{name.partition('.')[2]}.py"
            return self._spec(name, str(file)) if file.is_file() else None
        if name not in self.days:
            return None
        if name in self.learner:
            self.used[name] = "yours"
            return self._spec(name, self.learner[name][0])
        file = self.reference / f"{name}.py"
        if not file.is_file():
            return None
        self.used[name] = "reference"
        return self._spec(name, str(file))

    def _spec(self, name: str, path: str) -> importlib.machinery.ModuleSpec:
        spec = importlib.machinery.ModuleSpec(name, self, origin=path)
        spec.has_location = True
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        """The default module object."""
        return

    def exec_module(self, module: ModuleType) -> None:
        """Run the module's source, which arrived from the parent or is the reference."""
        name, path = module.__name__, module.__spec__.origin
        source = self.learner[name][1] if name in self.learner else Path(path).read_text(encoding="utf-8")
        execute(module, source, path)
        if name in self.learner and self.lent.get(name):
            reference = importlib.import_module(f"reference.{name}")
            for lent in self.lent[name]:
                setattr(module, lent, getattr(reference, lent))
            self.used[name] = f"yours, but {', '.join(self.lent[name])} of the reference"


def execute(module: ModuleType, source: str, path: str, code: CodeType | None = None) -> None:
    """Run `source` (or `code`, if it was compiled before) in `module` under the name of `path`, so that tracebacks show its lines."""
    linecache.cache[path] = (len(source), None, source.splitlines(keepends=True), path)
    exec(code or compile(source, path, "exec", dont_inherit=True), module.__dict__)


def fresh(name: str, source: str, path: str, replaced: Mapping[str, Any] | None = None) -> ModuleType:
    """A new module object from `source`, with some of its names replaced; sys.modules holds it while it is made.

    Code of the module that uses a replaced name sees the replacement.
    """
    spec = importlib.machinery.ModuleSpec(name, None, origin=path)
    module = importlib.util.module_from_spec(spec)
    module.__file__ = path
    before = sys.modules.get(name)
    sys.modules[name] = module
    try:
        execute(module, source, path)
    finally:
        if before is not None:
            sys.modules[name] = before
    for key, thing in (replaced or {}).items():
        setattr(module, key, thing)
    return module


def load_file(name: str, file: Path) -> ModuleType:
    """A module from a file of the kata (misconceptions.py, alternatives.py)."""
    return fresh(name, file.read_text(encoding="utf-8"), str(file))
