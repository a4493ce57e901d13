"""The `solution` that a spec sees: the learner's module, with each call of a function remembered and checked.

Around a call of a function whose name does not end in `_`, tensor arguments must keep their values.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

from checker.judge import describe
from checker.judge.compare import same_bits
from checker.judge.failures import Mismatch, MissingName
from checker.judge.meter import unmetered

_SMALL = 1 << 20  # elements: larger inputs are not copied for comparison


class Solution:
    """Attribute access gives the learner's functions (recorded) and classes (as they are).

    `calls` are (call, result) in words, newest last; `used` are the names that the spec asked for.
    """

    def __init__(self, module: ModuleType, names: tuple[str, ...]) -> None:
        self.__dict__.update(_module=module, _names=names, _wrapped={}, calls=[], used=set(), line=None)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        thing = getattr(self._module, name, None)
        if thing is None:
            raise MissingName(
                f"{self._module.__name__}.py has no {name}: it was renamed or removed; put it back as in the stub"
            )
        self.used.add(name)
        if isinstance(thing, type) or not callable(thing):
            return thing
        if name not in self._wrapped:
            self._wrapped[name] = self._recorded(name, thing)
        return self._wrapped[name]

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError("a spec does not change the solution")

    def _recorded(self, name: str, function: Any) -> Any:
        try:
            parameters = list(inspect.signature(function).parameters)
        except (TypeError, ValueError):
            parameters = []

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with unmetered():
                entry = [describe.call(name, args, kwargs, parameters), ""]
                self.calls.append(entry)
                before = (
                    []
                    if name.endswith("_")
                    else [(t, t.detach().clone()) for t in _tensors((args, kwargs)) if t.numel() <= _SMALL]
                )
            result = function(*args, **kwargs)
            with unmetered():
                entry[1] = describe.value(result)
                for tensor, values in before:
                    if not same_bits(tensor, values):
                        raise Mismatch(
                            f"{name} changed one of its inputs in place; the caller still needs it",
                            [("changed", f"{describe.tensor(tensor)} in {entry[0]}")],
                            tensor,
                        )
            return result

        return call


def _tensors(item: Any, depth: int = 0) -> Iterator[torch.Tensor]:
    if isinstance(item, torch.Tensor):
        plain = type(item) in (torch.Tensor, torch.nn.Parameter) and item.layout == torch.strided
        if plain and describe.readable(item):
            yield item
    elif depth < 3 and isinstance(item, (list, tuple)):
        for part in item:
            yield from _tensors(part, depth + 1)
    elif depth < 3 and isinstance(item, dict):
        for part in item.values():
            yield from _tensors(part, depth + 1)
