"""What the author of a spec imports: assertions whose failures teach, the cost meter, and the decorators of a kata.

Every assertion raises `Mismatch` with the facts for the learner and with the value that was looked at,
so that a known wrong solution can be recognised by its numbers.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch.autograd.gradcheck import GradcheckError

from checker.judge import describe
from checker.judge.compare import compare, compare_tensors, fail, same_bits
from checker.judge.failures import Forbidden, Mismatch, SpecFault
from checker.judge.meter import Cost, unmetered
from checker.judge.meter import measure as measure

__all__ = [
    "Cost", "alternative", "assert_close", "assert_cost", "assert_equal", "assert_gradcheck", "assert_gradients_close",
    "assert_raises", "assert_that", "cost_case", "global_rng_untouched", "measure", "misconception", "noncontiguous",
    "same_storage", "task", "unchanged", "unmetered",
]  # fmt: skip

# Decorators of a kata


def task(name: str) -> pytest.MarkDecorator:
    """Say which task of kata.toml a test belongs to."""
    return pytest.mark.task(name)


def cost_case(name: str) -> Callable[[Callable], Callable]:
    """Mark `f(module, ...fixtures) -> thunk` as what is metered for the task's row in the cost table."""

    def mark(function: Callable) -> Callable:
        function.kata_cost_case = name
        return function

    return mark


def misconception(name: str, sentence: str) -> Callable[[Any], Any]:
    """Mark a known wrong function or class that replaces `name`, with the sentence for whoever wrote it."""

    def mark(thing: Any) -> Any:
        thing.kata_misconception = (name, sentence)
        return thing

    return mark


def alternative(name: str) -> Callable[[Any], Any]:
    """Mark a right function or class, written differently from the reference, that replaces `name`."""

    def mark(thing: Any) -> Any:
        thing.kata_alternative = name
        return thing

    return mark


# Assertions


def assert_close(
    actual: Any,
    expected: Any,
    *,
    because: str = "",
    rtol: float | None = None,
    atol: float | None = None,
    equal_nan: bool = False,
    check_dtype: bool = True,
    check_device: bool = True,
) -> None:
    """Raise Mismatch unless `actual` has the shape, dtype, device and (within tolerance) the values of `expected`.

    Takes tensors, numbers, and lists, tuples and dicts of them. NaN in `actual` is a difference unless `equal_nan`;
    NaN in `expected` without `equal_nan` is a fault of the spec. Tolerances default by the dtype of `expected`.
    """
    compare(actual, expected, "", because, rtol, atol, equal_nan, check_dtype, check_device)


def assert_equal(actual: Any, expected: Any, *, because: str = "") -> None:
    """Raise Mismatch unless the two are the same: Python values by `==` and type, tensors bit by bit (dtype included)."""
    if isinstance(expected, torch.Tensor):
        compare_tensors(actual, expected, "", because, 0.0, 0.0, True, True, True)
        return
    if isinstance(expected, torch.Size):
        expected = tuple(expected)
    if isinstance(actual, torch.Size):
        actual = tuple(actual)
    if isinstance(actual, torch.Tensor) or type(actual) is not type(expected) or actual != expected:
        shown = [("returned", describe.value(actual, 200)), ("expected", describe.value(expected, 200))]
        fail(because, shown, actual)


def assert_that(condition: Any, because: str, *, value: Any = None) -> None:
    """Raise Mismatch with the sentence `because` unless `condition` is true; `value` is what was looked at."""
    if isinstance(condition, torch.Tensor):
        condition = bool(condition.all())
    if not condition:
        fail(because, [] if value is None else [("found", describe.value(value, 120))], value)


def assert_raises(
    error: type[BaseException] | tuple[type[BaseException], ...], fn: Callable, /, *args: Any,
    mentions: Sequence[str] = (), because: str = "", **kwargs: Any,
) -> BaseException:  # fmt: skip
    """Raise Mismatch unless `fn(*args, **kwargs)` raises `error` with every string of `mentions` in its message.

    Blanks do not count in the comparison, so '(2, 3)' finds '(2,3)' and 'torch.Size([2, 3])'. Returns the exception.
    """
    wanted = error.__name__ if isinstance(error, type) else " or ".join(kind.__name__ for kind in error)
    try:
        result = fn(*args, **kwargs)
    except (NotImplementedError, Mismatch, Forbidden, SpecFault):
        raise
    except error as raised:
        text = _squeeze(str(raised))
        missing = [word for word in mentions if _squeeze(word) not in text]
        if missing:
            lines = [
                ("raised", f"{type(raised).__name__}: {raised}"),
                ("missing", f"the message must contain {', '.join(missing)}"),
            ]
            raise Mismatch(because, lines, f"{type(raised).__name__} without {missing}") from raised
        return raised
    except Exception as raised:
        lines = [("raised", f"{type(raised).__name__}: {raised}"), ("expected", wanted)]
        raise Mismatch(because or f"{wanted} should be raised here", lines, type(raised).__name__) from raised
    lines = [("returned", describe.value(result)), ("expected", wanted)]
    raise Mismatch(because or f"{wanted} should be raised here", lines, "no error")


def _squeeze(text: str) -> str:
    text = text.replace("torch.Size([", "(").replace("])", ")").replace("[", "(").replace("]", ")")
    return "".join(text.split()).replace(",)", ")")


def assert_cost(
    fn: Callable, /, *args: Any, because: str = "", flops: int | None = None, max_flops: int | None = None,
    max_calls: int | None = None, matmuls: int | None = None, max_matmuls: int | None = None,
    max_new_bytes: int | None = None, max_peak_bytes: int | None = None, max_saved_bytes: int | None = None,
    max_elementwise: int | None = None, no_larger_than: int | None = None, **kwargs: Any,
) -> Any:  # fmt: skip
    """Run `fn(*args, **kwargs)` under the meter and raise Mismatch where a bound is broken; returns fn's result.

    FLOPs count two per multiply-add; bytes are those of new storages; `no_larger_than` bounds the elements of any tensor allocated.
    """
    result, cost = measure(fn, *args, **kwargs)
    exact = [("FLOPs", cost.flops, flops), ("matrix products", cost.matmuls, matmuls)]
    bounds = [
        ("FLOPs", cost.flops, max_flops),
        ("calls", cost.calls, max_calls),
        ("matrix products", cost.matmuls, max_matmuls),
        ("new bytes", cost.new_bytes, max_new_bytes),
        ("peak bytes", cost.peak_bytes, max_peak_bytes),
        ("bytes saved for backward", cost.saved_bytes, max_saved_bytes),
        ("elementwise results", cost.elementwise, max_elementwise),
        ("elements in the largest new tensor", cost.largest, no_larger_than),
    ]
    for name, found, wanted in exact:
        if wanted is not None and found != wanted:
            lines = [("cost", f"{found:,} {name}"), ("expected", f"exactly {wanted:,}"), ("calls", _ops(cost))]
            fail(because or f"this takes exactly {wanted:,} {name}", lines, found)
    for name, found, most in bounds:
        if most is not None and found > most:
            lines = [("cost", f"{found:,} {name}"), ("allowed", f"at most {most:,}"), ("calls", _ops(cost))]
            fail(because or f"this can be done with at most {most:,} {name}", lines, found)
    return result


def _ops(cost: Cost) -> str:
    return ", ".join(f"{name} {count}" if count > 1 else name for name, count in cost.ops[:8]) + (
        ", ..." if len(cost.ops) > 8 else ""
    )


def assert_gradients_close(
    fn: Callable,
    oracle: Callable,
    inputs: Sequence[Any],
    *,
    because: str = "",
    rtol: float | None = None,
    atol: float | None = None,
) -> None:
    """Raise Mismatch unless `fn(*inputs)` has the values of `oracle(*inputs)` and the same gradients of all float inputs.

    The output (a tensor) is weighted by fixed random numbers before its backward pass.
    """
    ours, theirs = [_leaf(item) for item in inputs], [_leaf(item) for item in inputs]
    expected = oracle(*theirs)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(7)).to(expected)
    leaves = [item for item in theirs if isinstance(item, torch.Tensor) and item.requires_grad]
    want = torch.autograd.grad((expected * weights).sum(), leaves, allow_unused=True)
    actual = fn(*ours)
    assert_close(actual, expected.detach(), because=because, rtol=rtol, atol=atol)
    if not actual.requires_grad:
        fail(
            because,
            [("returned", "a result that is cut off from its inputs"), ("expected", "a result with gradients")],
            "no graph",
        )
    mine = [item for item in ours if isinstance(item, torch.Tensor) and item.requires_grad]
    got = torch.autograd.grad((actual * weights).sum(), mine, allow_unused=True)
    for index, (one, two, leaf) in enumerate(zip(got, want, leaves, strict=True)):
        two = torch.zeros_like(leaf) if two is None else two
        one = torch.zeros_like(leaf) if one is None else one
        assert_close(one, two, because=because or f"the gradient of input {index + 1}", rtol=rtol, atol=atol)


def _leaf(item: Any) -> Any:
    if isinstance(item, torch.Tensor) and (item.is_floating_point() or item.is_complex()):
        return item.detach().clone().requires_grad_()
    return item


def assert_gradcheck(fn: Callable, inputs: Sequence[Any], *, because: str = "", **kwargs: Any) -> None:
    """Raise Mismatch unless torch.autograd.gradcheck accepts `fn` at `inputs` (floating inputs in float64)."""
    leaves = [
        item.detach().double().requires_grad_() if isinstance(item, torch.Tensor) and item.is_floating_point() else item
        for item in inputs
    ]
    try:
        torch.autograd.gradcheck(fn, tuple(leaves), **kwargs)
    except GradcheckError as error:
        text = str(error).strip().split("\n")[0]
        raise Mismatch(
            because or "the gradient agrees with finite differences", [("gradcheck", text)], "gradcheck"
        ) from error


@contextlib.contextmanager
def unchanged(*tensors: torch.Tensor) -> Iterator[None]:
    """Raise Mismatch if values, shape, requires_grad or grad of a tensor are different afterwards."""
    with unmetered():
        before = [(t, t.detach().clone(), t.requires_grad, None if t.grad is None else t.grad.clone()) for t in tensors]
    yield
    with unmetered():
        for tensor, values, requires_grad, grad in before:
            if not same_bits(tensor, values):
                fail("an input was changed in place", [("changed", describe.tensor(tensor))], tensor)
            if tensor.requires_grad != requires_grad:
                fail(
                    "requires_grad of an input was changed",
                    [("changed", describe.tensor(tensor))],
                    tensor.requires_grad,
                )
            if (tensor.grad is None) != (grad is None) or (grad is not None and not same_bits(tensor.grad, grad)):
                fail("the .grad of an input was changed", [("changed", describe.tensor(tensor))], tensor.grad)


@contextlib.contextmanager
def global_rng_untouched() -> Iterator[None]:
    """Raise Mismatch if torch's, numpy's or Python's global random state is another one afterwards."""
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    yield
    after = torch.get_rng_state(), np.random.get_state(), random.getstate()
    names = ("torch", "numpy", "random")
    same = (
        torch.equal(before[0], after[0]),
        str(before[1]) == str(after[1]) and bool((before[1][1] == after[1][1]).all()),
        before[2] == after[2],
    )
    touched = [name for name, equal in zip(names, same, strict=True) if not equal]
    if touched:
        fail(f"the global random state of {', '.join(touched)} was used: draw from `generator` instead", [], touched)


def noncontiguous(x: torch.Tensor) -> torch.Tensor:
    """A tensor with the values of `x` whose strides are not those of a contiguous one (detached, same dtype and device)."""
    if x.dim() == 0:
        return x.detach().clone()
    wide = torch.full((*x.shape, 2), 7, dtype=x.dtype, device=x.device)
    wide[..., 0] = x.detach()
    return wide[..., 0]


def same_storage(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors share memory."""
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() and a.untyped_storage().nbytes() > 0
