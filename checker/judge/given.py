"""What a test is given by name: the modules, the device, and fresh random values. A plugin of fixtures for pytest."""

from __future__ import annotations

import inspect
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from _pytest.python import get_direct_param_fixture_func


class Values:
    """Fresh random values on a device, drawn on the CPU so that every device gets the same ones."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.seed, self.generator, self.device = seed, torch.Generator().manual_seed(seed), device

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

    def other(self) -> torch.Generator:
        """A CPU generator for `generator=` arguments, which draws other values than the methods here."""
        return torch.Generator().manual_seed(self.seed + 1)


def _shape(shape: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape


def derive(seed: int, name: str) -> int:
    """The seed of one test: different tests of one check draw different values."""
    return zlib.crc32(f"{seed}:{name}".encode())


class Given:
    """The program's fixtures: `makers` says how each is made, `begin` starts the next test.

    A value is made when it is first asked for, and once per test: a test and a fixture of the spec draw from one generator.
    `solution` and `reference` are looked up anew for each test, because diagnosis and mutants exchange the solution.
    """

    def __init__(self, seed: int, device: str, folder: Path, modules: dict[str, Callable[[], Any]]) -> None:
        self._seed, self._device, self._name = seed, torch.device(device), ""
        self._made: dict[str, Any] = {}
        self._plans: dict[
            int, Any
        ] = {}  # for all tests of one function, which share what pytest knows about their fixtures
        self._makers: dict[str, Callable[[], Any]] = {
            **modules,
            "device": lambda: self._device,
            "seed": lambda: derive(self._seed, self._name),
            "data_dir": lambda: folder / "data",
            "tmp_path": lambda: Path(tempfile.mkdtemp()),
            "generator": lambda: self._random().other(),
            "randn": lambda: self._random().randn,
            "rand": lambda: self._random().rand,
            "randint": lambda: self._random().randint,
            "randperm": lambda: self._random().randperm,
            "random": lambda: Values(self("seed"), self._device),
        }

    def begin(self, name: str) -> None:
        """Start the test `name` (with its parameters): nothing is made yet."""
        self._name = name
        self._made = {}

    def __call__(self, name: str) -> Any:
        """The value of the fixture `name` for the present test."""
        made = self._made
        if name not in made:
            made[name] = self._makers[name]()
        return made[name]

    def _random(self) -> Values:
        return self("random")

    def values(self, item: pytest.Function) -> tuple[dict[str, Any], bool]:
        """What a test is given: its parameters, the program's values, those of plain fixtures; and whether that is all.

        What the spec defines itself, also under a name of the program's, is left to pytest, unless all of it is plain.
        """
        info = item._fixtureinfo
        if id(info) not in self._plans:
            self._plans[id(info)] = self._plan(info)
        plan, complete = self._plans[id(info)]
        values: dict[str, Any] = {}

        def value(name: str) -> Any:
            if name not in values:
                function, wanted = plan[name]
                if function is get_direct_param_fixture_func:
                    values[name] = item.callspec.params[name]
                elif function is None:
                    values[name] = self(name)
                else:
                    values[name] = function(**{other: value(other) for other in wanted})
            return values[name]

        for name in plan:
            value(name)
        return values, complete

    def _plan(self, info: Any) -> tuple[dict[str, tuple[Any, tuple[str, ...]]], bool]:
        """How the values of a test are made, by name: (function, its arguments), None as function for the program's own."""
        last = {name: definitions[-1] for name, definitions in info.name2fixturedefs.items()}
        plan, rest = {}, {}
        for name in info.names_closure:
            function = last[name].func if name in last else None
            if function is get_direct_param_fixture_func:
                plan[name] = function, ()
            elif getattr(function, "__self__", None) is self:
                plan[name] = None, ()
            else:
                rest[name] = last.get(name)
        complete = all(_plain(name, definition, last) for name, definition in rest.items())
        if complete:
            # in the order in which pytest would make them
            plan = {name: plan.get(name) or (rest[name].func, rest[name].argnames) for name in info.names_closure}
        return plan, complete


def _plain(name: str, definition: Any, known: dict[str, Any]) -> bool:
    """Whether a fixture of the spec is nothing but a function of other fixtures, called once per test, with nothing to do afterwards."""
    if (
        definition is None
        or definition.scope != "function"
        or definition.params
        or not inspect.isfunction(definition.func)
    ):
        return False
    if inspect.isgeneratorfunction(definition.func) or inspect.iscoroutinefunction(definition.func):
        return False
    return all(wanted in known and wanted != name for wanted in definition.argnames)


def _fixture(name: str, text: str) -> Any:
    def given(self: Given) -> Any:
        return self(name)

    given.__doc__ = text
    return pytest.fixture(name=name)(given)


# pytest finds the fixtures of a plugin among its attributes
for _name, _text in {
    "solution": "The learner's module.",
    "reference": "The reference module of the day.",
    "device": "The device under test.",
    "seed": "The seed of this test, from the seed of the check and the test's name.",
    "data_dir": "The kata's folder of golden data.",
    "tmp_path": "A fresh folder.",
    "generator": "A CPU generator for `generator=` arguments.",
    "randn": "Standard normal values.",
    "rand": "Uniform values in [0, 1).",
    "randint": "Integers, int64.",
    "randperm": "A random permutation.",
}.items():
    setattr(Given, f"fixture_{_name}", _fixture(_name, _text))
