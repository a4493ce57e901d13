"""Notices when the learner's code changed what the verdict relies on.

Before the learner's file is imported, the attributes of the modules and classes that tests use are remembered; afterwards they
must be the same objects. And one test that must fail runs through the whole machinery: if it passes, the machinery is not itself.
"""

from __future__ import annotations

import builtins
import importlib
import sys
from typing import Any

import numpy as np
import torch

MODULES = (
    "torch", "torch.nn.functional", "torch.testing", "torch.linalg", "torch.autograd", "torch.autograd.gradcheck", "torch.nn.init",
    "math", "operator", "functools", "itertools", "json", "os", "signal", "time", "hmac", "hashlib", "inspect", "traceback", "linecache",
    "_pytest.runner", "_pytest.fixtures", "_pytest.reports", "_pytest.python", "_pytest.outcomes", "_pytest.main", "_pytest.config", "pluggy._manager",
    "pluggy._hooks", "pluggy._callers", "pytest_timeout", "checker.testing", "checker.judge.failures",
    "checker.judge.compare", "checker.judge.plugin",
    "checker.judge.recorder", "checker.judge.forbidden", "checker.judge.meter", "checker.judge.integrity", "checker.judge.describe",
    "checker.judge.diagnose", "checker.judge.events", "checker.judge.given", "checker.judge.signatures", "checker.judge.timer",
)  # fmt: skip
CLASSES = (
    "torch.Tensor", "torch.nn.Module", "torch.nn.Parameter", "torch.Generator", "_pytest.runner.CallInfo", "_pytest.runner.SetupState", "_pytest.python.Function",
    "_pytest.python.Module", "_pytest.main.Session", "pluggy._manager.PluginManager", "pluggy._hooks.HookCaller",
    "checker.judge.failures.Mismatch", "checker.judge.plugin.Judge", "checker.judge.given.Given", "checker.judge.given.Values", "checker.judge.timer.Timer", "checker.judge.recorder.Solution", "checker.judge.events.Channel",
    "checker.judge.meter.Meter", "checker.judge.forbidden.Guard", "checker.judge.forbidden._Functions", "checker.judge.forbidden._Operations",
)  # fmt: skip
# torch wraps these itself when its compiler is first imported, which an optimizer's constructor does
_WRAPPED_LATE = {"torch.manual_seed", "torch.nn.Module.__init__", "torch.nn.Module.__setstate__"}


def snapshot() -> dict[str, dict[str, Any]]:
    """The attributes of everything that the verdict relies on, by name of the module or class."""
    taken = {
        "builtins": dict(vars(builtins)),
        "numpy": {name: vars(np)[name] for name in ("allclose", "array_equal", "asarray", "isnan")},
    }
    for name in MODULES:
        module = sys.modules.get(name)
        if module is not None:
            taken[name] = dict(vars(module))
    for name in CLASSES:
        home, _, attribute = name.rpartition(".")
        cls = getattr(importlib.import_module(home), attribute, None)
        if cls is not None:
            taken[name] = dict(vars(cls))
    return taken


def changed(before: dict[str, dict[str, Any]]) -> list[str]:
    """The names of functions and classes that are other objects now than in `before`."""
    found = []
    for name, old in before.items():
        now = _namespace(name)
        for key, value in old.items():
            relevant = callable(value) or isinstance(value, (classmethod, staticmethod, property))
            if not relevant or (key.startswith("__") and name in MODULES):
                continue
            if now.get(key) is not value and f"{name}.{key}" not in _WRAPPED_LATE:
                found.append(f"{name}.{key}")
    return found


def _namespace(name: str) -> Any:
    if name == "builtins":
        return vars(builtins)
    if name == "numpy":
        return vars(np)
    if name in sys.modules:
        return vars(sys.modules[name])
    home, _, attribute = name.rpartition(".")
    return vars(getattr(sys.modules[home], attribute))


class Globals:
    """torch's global settings, which no exercise may leave changed."""

    def __init__(self) -> None:
        self.baseline = self._read()

    @staticmethod
    def _read() -> dict[str, Any]:
        return {
            "default dtype": torch.get_default_dtype(),
            "grad mode": torch.is_grad_enabled(),
            "inference mode": torch.is_inference_mode_enabled(),
            "default device": torch.empty(0).device,
            "number of threads": torch.get_num_threads(),
            "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        }

    def restore(self) -> list[str]:
        """Put every setting back; returns the names of those that had changed."""
        now = self._read()
        different = [name for name, value in self.baseline.items() if now[name] != value]
        if different:
            torch.set_default_dtype(self.baseline["default dtype"])
            torch.set_grad_enabled(self.baseline["grad mode"])
            if "default device" in different:
                torch.set_default_device(self.baseline["default device"])
            torch.set_num_threads(self.baseline["number of threads"])
            torch.use_deterministic_algorithms(self.baseline["deterministic algorithms"])
        return different
