"""Compares what a solution returned with what a spec expects, and says in words where they differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from checker.judge import describe
from checker.judge.failures import Mismatch, SpecFault

# (relative, absolute) by dtype of the expected values
TOLERANCES = {
    torch.float64: (1e-10, 1e-12),
    torch.complex128: (1e-10, 1e-12),
    torch.float32: (1e-5, 1e-6),
    torch.complex64: (1e-5, 1e-6),
    torch.bfloat16: (2e-2, 1e-2),
    torch.float16: (2e-3, 1e-3),
}


def compare(
    actual: Any, expected: Any, path: str, because: str, rtol: float | None, atol: float | None,
    equal_nan: bool, check_dtype: bool, check_device: bool,
) -> None:  # fmt: skip
    """Raise Mismatch where `actual` is not `expected`; walks lists, tuples and dicts, and names the place by `path`."""
    rest = (because, rtol, atol, equal_nan, check_dtype, check_device)
    if isinstance(expected, Mapping):
        if not isinstance(actual, Mapping) or actual.keys() != expected.keys():
            got = sorted(map(str, actual)) if isinstance(actual, Mapping) else describe.value(actual)
            fail(because, [(_label(path), f"{got}"), ("expected", f"the keys {sorted(map(str, expected))}")], str(got))
        for key in expected:
            compare(actual[key], expected[key], f"{path}[{key!r}]", *rest)
        return
    if isinstance(expected, (list, tuple)):
        if not isinstance(actual, (list, tuple)) or len(actual) != len(expected):
            got = describe.value(actual)
            fail(because, [(_label(path), got), ("expected", f"{len(expected)} values")], got)
        for index, (one, two) in enumerate(zip(actual, expected, strict=True)):
            compare(one, two, f"{path}[{index}]", *rest)
        return
    if isinstance(expected, torch.Tensor):
        compare_tensors(actual, expected, path, *rest)
        return
    if isinstance(actual, torch.Tensor) or not isinstance(actual, (int, float, complex)):
        fail(
            because,
            [(_label(path), describe.value(actual)), ("expected", f"the number {describe.number(expected)}")],
            actual,
        )
    if expected != expected and not equal_nan:
        raise SpecFault("the expected number is NaN")
    relative = 1e-9 if rtol is None else rtol
    if actual == expected or (equal_nan and actual != actual and expected != expected):
        return
    if not abs(actual - expected) <= (1e-12 if atol is None else atol) + relative * abs(expected):
        fail(because, [(_label(path), describe.number(actual)), ("expected", describe.number(expected))], float(actual))


def compare_tensors(
    actual: Any, expected: torch.Tensor, path: str, because: str, rtol: float | None, atol: float | None,
    equal_nan: bool, check_dtype: bool, check_device: bool,
) -> None:  # fmt: skip
    """Raise Mismatch where two tensors differ: kind, shape, dtype and device before values."""
    label = _label(path)
    if type(actual) not in (torch.Tensor, torch.nn.Parameter):
        fail(
            because,
            [(label, describe.value(actual)), ("expected", f"a tensor {describe.tensor(expected)}")],
            describe.value(actual),
        )
    if actual.shape != expected.shape:
        fail(
            because,
            [(label, f"shape {describe.shape(actual)}"), ("expected", f"shape {describe.shape(expected)}")],
            actual,
        )
    if check_dtype and actual.dtype != expected.dtype:
        fail(because, [(label, _dtype(actual)), ("expected", _dtype(expected))], actual)
    if check_device and expected.device.type != "cpu" and actual.device != expected.device:
        fail(because, [(label, f"on {actual.device}"), ("expected", f"on {expected.device}")], str(actual.device))
    got, want = actual.detach().cpu(), expected.detach().cpu()
    if want.is_floating_point() or want.is_complex():
        default = TOLERANCES.get(want.dtype, (1e-5, 1e-6))
        relative, absolute = default[0] if rtol is None else rtol, default[1] if atol is None else atol
        if not equal_nan and bool(torch.isnan(want).any()):
            raise SpecFault("the expected values have NaN in them")
        wide = torch.complex128 if (want.is_complex() or got.is_complex()) else torch.float64
        a, b = got.to(wide), want.to(wide)
        close = torch.isclose(a, b, rtol=relative, atol=absolute, equal_nan=equal_nan)
    else:
        a, b = got, want
        close = got == want
    if bool(close.all()):
        return
    wrong = (~close).nonzero()
    first = tuple(wrong[0].tolist())
    lines = [(label, f"{describe.tensor(actual)}, {_how_many(len(wrong), close.numel(), a, b, close)}")]
    if actual.dim():
        lines.append(("first", f"[{','.join(map(str, first))}]: {_at(a, first)} where {_at(b, first)} was expected"))
    else:
        lines.append(("expected", _at(b, ())))
    fail(because, lines, actual)


def _how_many(wrong: int, total: int, a: torch.Tensor, b: torch.Tensor, close: torch.Tensor) -> str:
    text = f"{wrong} of {total} values differ"
    if a.dtype == torch.bool:
        return text
    bad = a[~close]
    if bad.is_floating_point() and bool(torch.isnan(bad).any()):
        return f"{text}, {int(torch.isnan(bad).sum())} of them NaN"
    gap = (bad.to(torch.float64) - b[~close].to(torch.float64)).abs().max().item() if not bad.is_complex() else 0.0
    return f"{text}, by up to {describe.number(gap)}"


def _at(values: torch.Tensor, index: tuple[int, ...]) -> str:
    item = values[index].item()
    return str(item) if isinstance(item, (bool, int)) else describe.number(item)


def _dtype(value: torch.Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _label(path: str) -> str:
    return f"returned {path}".strip()


def fail(because: str, lines: list[tuple[str, str]], actual: Any) -> None:
    """Raise Mismatch."""
    raise Mismatch(because, lines, actual)


def same_bits(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Whether two tensors have the same shape and values, NaN equal to NaN."""
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    one, two = one.detach(), two.detach()
    if one.is_floating_point() or one.is_complex():
        return bool(((one == two) | ((one != one) & (two != two))).all())
    return bool(torch.equal(one, two))
