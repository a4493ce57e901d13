import contextlib

import numpy as np
import pytest
import torch

from checker.testing import (
    assert_close,
    assert_cost,
    assert_equal,
    assert_raises,
    assert_that,
    cost_case,
    global_rng_untouched,
    measure,
    noncontiguous,
    task,
    unchanged,
)

SHAPES = [(), (5,), (2, 3), (2, 1, 4), (0,), (3, 0)]


def array(x):
    """The values of a tensor as numpy has them, in float64."""
    return x.detach().cpu().double().numpy()


def like(values, x):
    """Values from numpy as a tensor of the dtype of x."""
    return torch.as_tensor(np.asarray(values)).to(x.dtype)


def rounding(dtype):
    """Tolerances for sums whose terms may cancel."""
    return {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-11}


@contextlib.contextmanager
def backward_passes():
    """Count how often autograd walks a graph, by whichever function; the list that is given holds the count."""
    count, original = [0], torch.autograd._engine_run_backward

    def counted(*args, **kwargs):
        count[0] += 1
        return original(*args, **kwargs)

    torch.autograd._engine_run_backward = counted
    try:
        yield count
    finally:
        torch.autograd._engine_run_backward = original


def most_kept(fn, *args):
    """Run fn; return its result, and the most bytes and the most tensors that were kept for backward at one moment."""
    now, most = [0, 0], [0, 0]

    class Kept:
        def __init__(self, tensor):
            self.tensor, self.size = tensor, tensor.numel() * tensor.element_size()
            now[:] = now[0] + self.size, now[1] + 1
            most[:] = max(most[0], now[0]), max(most[1], now[1])

        def __del__(self):
            now[:] = now[0] - self.size, now[1] - 1

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        result = fn(*args)
    return result, tuple(most)


def growth(few, many):
    """By how much bytes and tensors grew from one of two calls of most_kept to the other."""
    return many[1][0] - few[1][0], many[1][1] - few[1][1]


class Interrupted(Exception):
    pass


# grad_of


@task("grad_of")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_gradient_of_a_cubic(solution, randn, dtype, shape):
    x, c = randn(*shape, dtype=dtype), randn(*shape, dtype=dtype)
    expected = like(3 * array(c) * array(x) ** 2, x)
    assert_close(
        solution.grad_of(lambda t: (c * t**3).sum(), x), expected, because="(c * x**3).sum() has the gradient 3 c x**2"
    )


@task("grad_of")
def test_elements_that_influence_each_other(solution, randn):
    x = randn(3, 4, dtype=torch.float64)
    weights = np.exp(array(x))
    expected = like(weights / weights.sum(), x)
    assert_close(
        solution.grad_of(lambda t: t.exp().sum().log(), x), expected, because="the log of a sum of exponentials"
    )


@task("grad_of")
def test_a_noncontiguous_x(solution, randn):
    x = noncontiguous(randn(3, 4, dtype=torch.float64))
    assert_close(solution.grad_of(lambda t: (t**2).sum(), x), like(2 * array(x), x))


@task("grad_of")
def test_an_x_that_asks_for_gradients(solution, randn):
    x = randn(4).requires_grad_()
    assert_close(solution.grad_of(lambda t: (t**2).sum(), x), like(2 * array(x), x))


@task("grad_of")
def test_an_x_in_the_middle_of_a_graph(solution, randn):
    start = randn(4).requires_grad_()
    x = start * 3
    expected = like(2 * array(x), x)
    assert_close(solution.grad_of(lambda t: (t**2).sum(), x), expected, because="x need not be a leaf")


@task("grad_of")
def test_the_graph_around_x_is_not_walked(solution, randn):
    start = randn(4).requires_grad_()
    x = start * 3
    solution.grad_of(lambda t: (t**2).sum(), x)
    assert_that(start.grad is None, "what x was computed from gets no .grad", value=start.grad)
    x.sum().backward()
    assert_close(start.grad, torch.full((4,), 3.0), because="the graph that x is part of still works afterwards")


@task("grad_of")
def test_the_result_does_not_add_to_an_older_grad(solution, randn):
    x = randn(4).requires_grad_()
    x.grad = randn(4)
    expected = like(2 * array(x), x)
    assert_close(solution.grad_of(lambda t: (t**2).sum(), x), expected, because="x.grad held something before the call")


@task("grad_of")
def test_an_older_grad_stays(solution, randn):
    x = randn(4).requires_grad_()
    x.grad = randn(4)
    before = x.grad.clone()
    solution.grad_of(lambda t: (t**2).sum(), x)
    assert_close(x.grad, before, because="x.grad is not this function's to change")


@task("grad_of")
def test_an_x_that_asks_for_nothing_stays_so(solution, randn):
    x = randn(4)
    version = x._version
    solution.grad_of(lambda t: (t**2).sum(), x)
    assert_equal((x.requires_grad, x.grad is None, x._version - version), (False, True, 0),
                 because="requires_grad, whether .grad is None, and writes into x")  # fmt: skip


@task("grad_of")
def test_a_leaf_without_grad_stays_without(solution, randn):
    x = randn(4).requires_grad_()
    solution.grad_of(lambda t: (t**2).sum(), x)
    assert_equal((x.requires_grad, x.grad is None), (True, True), because="requires_grad, and whether .grad is None")


@task("grad_of")
def test_x_is_as_it_was_when_f_is_refused(solution, randn):
    x = randn(4)
    assert_raises(ValueError, solution.grad_of, lambda t: t * 2, x, because="f(x) has shape (4,)")
    assert_equal((x.requires_grad, x.grad is None), (False, True), because="requires_grad, and whether .grad is None")


@task("grad_of")
def test_zeros_where_f_is_a_constant(solution, randn):
    x, c = randn(2, 3), randn(())
    assert_close(solution.grad_of(lambda t: c * 2, x), torch.zeros(2, 3), because="f does not look at its argument")


@task("grad_of")
def test_zeros_where_f_depends_on_something_else(solution, randn):
    x, w = randn(2, 3), randn(2).requires_grad_()
    assert_close(solution.grad_of(lambda t: (w * w).sum(), x), torch.zeros(2, 3), because="f looks at w, not at x")


@task("grad_of")
def test_other_tensors_get_no_grad(solution, randn):
    x, w = randn(3), randn(3).requires_grad_()
    solution.grad_of(lambda t: (w * t**2).sum(), x)
    assert_that(w.grad is None, "f uses a parameter w, and this call put something into w.grad", value=w.grad)


@task("grad_of")
def test_the_gradient_is_part_of_no_graph(solution, randn):
    x, w = randn(3), randn(3).requires_grad_()
    gradient = solution.grad_of(lambda t: (w * t**2).sum(), x)
    assert_close(gradient, like(2 * array(w) * array(x), x))
    assert_that(not gradient.requires_grad, "the result carries a graph with it", value=gradient.requires_grad)


@task("grad_of")
def test_zeros_are_part_of_no_graph_either(solution, randn):
    x = randn(3).requires_grad_()
    gradient = solution.grad_of(lambda t: torch.ones((), device=t.device), x)
    assert_that(not gradient.requires_grad, "the result asks for gradients", value=gradient.requires_grad)


@task("grad_of")
@pytest.mark.parametrize("shape", [(3,), (0,), (2, 3)], ids=str)
def test_what_is_no_scalar_is_refused(solution, randn, shape):
    x, values = randn(4), randn(*shape)
    because = f"f(x) has shape {shape}, which is no scalar"
    assert_raises(ValueError, solution.grad_of, lambda t: values * t.sum(), x, mentions=[str(shape)], because=because)


@task("grad_of")
def test_a_vector_of_one_element_is_no_scalar(solution, randn):
    x, one, two = randn(4), randn(1), randn(2)
    refused = "f(x) has shape (2,), which is no scalar"
    assert_raises(ValueError, solution.grad_of, lambda t: two * t.sum(), x, mentions=["(2,)"], because=refused)
    refused = "f(x) has shape (1,), which is no scalar"
    assert_raises(ValueError, solution.grad_of, lambda t: one * t.sum(), x, mentions=["(1,)"], because=refused)


@task("grad_of")
def test_it_works_inside_no_grad(solution, randn):
    x = randn(4)
    expected = like(2 * array(x), x)
    assert_close(solution.grad_of(lambda t: (t**2).sum(), x), expected)
    with torch.no_grad():
        gradient = solution.grad_of(lambda t: (t**2).sum(), x)
        switched_on = torch.is_grad_enabled()
    assert_close(gradient, expected, because="the caller had switched recording off")
    assert_that(not switched_on, "recording was off before the call and is on after it", value=switched_on)


# frozen_product


@task("frozen_product")
def test_the_values_are_those_of_the_product(solution, randn, dtype):
    x, y = randn(2, 1, 3, dtype=dtype), randn(4, 1, dtype=dtype)
    expected = like(array(x) * array(y), x)
    assert_close(solution.frozen_product(x, y), expected)


@task("frozen_product")
def test_x_gets_the_gradient_of_the_product(solution, randn, dtype):
    x, y, c = randn(3, 1, dtype=dtype).requires_grad_(), randn(1, 4, dtype=dtype), randn(3, 4, dtype=dtype)
    expected = like((array(c) * array(y)).sum(axis=1, keepdims=True), x)
    (c * solution.frozen_product(x, y)).sum().backward()
    assert_that(x.grad is not None, "no gradient arrived at x")
    assert_close(x.grad, expected, because="as for x * y: y, summed where x was broadcast", **rounding(dtype))


@task("frozen_product")
def test_the_gradient_flows_on_to_where_x_came_from(solution, randn):
    start, y = randn(4).requires_grad_(), randn(4)
    solution.frozen_product(start * 2, y).sum().backward()
    assert_close(start.grad, like(2 * array(y), y), because="x was 2 * start")


@task("frozen_product")
def test_y_gets_nothing(solution, randn):
    x, y = randn(4).requires_grad_(), randn(4).requires_grad_()
    solution.frozen_product(x, y).sum().backward()
    assert_that(y.grad is None, "a gradient arrived at y, which is frozen", value=y.grad)


@task("frozen_product")
def test_what_y_came_from_gets_nothing(solution, randn):
    x, start = randn(4).requires_grad_(), randn(4).requires_grad_()
    solution.frozen_product(x, start * 2).sum().backward()
    assert_that(start.grad is None, "y was 2 * start, and a gradient arrived at start", value=start.grad)


@task("frozen_product")
def test_a_tensor_times_itself_frozen(solution, randn):
    x = randn(4).requires_grad_()
    expected = like(array(x), x)
    solution.frozen_product(x, x).sum().backward()
    assert_close(x.grad, expected, because="of the two factors one is a constant: x, not 2 x")


@task("frozen_product")
def test_y_alone_makes_no_graph(solution, randn):
    x, y = randn(4), randn(4).requires_grad_()
    result = solution.frozen_product(x, y)
    assert_that(
        not result.requires_grad, "only y asks for gradients, and the result does, too", value=result.requires_grad
    )


@task("frozen_product")
def test_y_goes_on_asking_for_gradients(solution, randn):
    x, y = randn(4).requires_grad_(), randn(4).requires_grad_()
    solution.frozen_product(x, y)
    assert_equal((x.requires_grad, y.requires_grad), (True, True), because="requires_grad of x and of y after the call")


@task("frozen_product")
def test_a_later_write_into_y_is_not_used(solution, randn):
    x, y = randn(4).requires_grad_(), randn(4)
    expected = like(array(y), y)
    total = solution.frozen_product(x, y).sum()
    y.add_(1.0)
    with contextlib.suppress(RuntimeError):  # "modified by an inplace operation": this is the other good answer
        total.backward()
        assert_close(x.grad, expected, because="y was changed between the product and backward, and nobody noticed")


# straight_through_round


@task("straight_through_round")
def test_halves_go_to_the_even_neighbor(solution, device, dtype):
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5], device=device, dtype=dtype)
    assert_equal(solution.straight_through_round(x), like(np.rint(array(x)), x))


@task("straight_through_round")
@pytest.mark.parametrize("scale", [0.5, 10.0, 1e5])
def test_the_values_are_exactly_those_of_round(solution, randn, dtype, scale):
    x = randn(20, 50, dtype=dtype, scale=scale)
    expected = like(np.rint(array(x)), x)
    assert_equal(
        solution.straight_through_round(x), expected, because="whole numbers, without a rest of rounding errors"
    )


@task("straight_through_round")
def test_half_precision_stays_half(solution, randn):
    x = randn(200, dtype=torch.bfloat16, scale=20.0)
    assert_equal(solution.straight_through_round(x), like(np.rint(array(x)), x))


@task("straight_through_round")
def test_the_gradient_is_that_of_the_identity(solution, randn, dtype):
    x, c = randn(3, 4, dtype=dtype, scale=3.0).requires_grad_(), randn(3, 4, dtype=dtype)
    result = solution.straight_through_round(x)
    assert_that(result.requires_grad, "the result has no graph: nothing can flow back to x", value=result.detach())
    (c * result).sum().backward()
    assert_close(x.grad, c, because="the gradient of (c * result).sum() is c")


@task("straight_through_round")
def test_what_follows_sees_rounded_values(solution, randn):
    x = randn(3, 4, dtype=torch.float64, scale=3.0).requires_grad_()
    expected = like(2 * np.rint(array(x)), x)
    result = solution.straight_through_round(x)
    assert_that(result.requires_grad, "the result has no graph: nothing can flow back to x", value=result.detach())
    assert_equal(result.detach(), expected / 2, because="the rounded values")
    (result**2).sum().backward()
    assert_close(x.grad, expected, because="the gradient of (result**2).sum() is twice the rounded values")


@task("straight_through_round")
def test_the_gradient_flows_on_to_where_the_input_came_from(solution, randn):
    start = randn(4, dtype=torch.float64, scale=3.0).requires_grad_()
    rounded = like(np.rint(2 * array(start)), start)
    result = solution.straight_through_round(start * 2)
    assert_that(result.requires_grad, "the result has no graph: nothing can flow back to x", value=result.detach())
    result.sum().backward()
    assert_close(start.grad, torch.full((4,), 2.0, dtype=torch.float64), because="x was 2 * start")
    assert_equal(result.detach(), rounded, because="the rounded values")


# finite_difference


@task("finite_difference")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_agrees_with_calculus(solution, randn, shape):
    x, c = randn(*shape, dtype=torch.float64), randn(*shape, dtype=torch.float64)
    expected = like(array(c) * np.cos(array(x)), x)
    found = solution.finite_difference(lambda t: (c * t.sin()).sum(), x)
    assert_close(found, expected, rtol=1e-6, atol=1e-7, because="the slope of c * sin(x) is c * cos(x)")


@task("finite_difference")
def test_elements_that_depend_on_each_other(solution, randn):
    x = randn(2, 3, dtype=torch.float64)
    weights = np.exp(array(x))
    expected = like(weights / weights.sum(), x)
    found = solution.finite_difference(lambda t: t.exp().sum().log(), x)
    assert_close(found, expected, rtol=1e-6, atol=1e-7, because="the log of a sum of exponentials")


@task("finite_difference")
def test_the_other_elements_stay_where_they_are(solution, randn):
    x = randn(2, 3, dtype=torch.float64)
    expected = like(np.full((2, 3), 2 * array(x).sum()), x)
    found = solution.finite_difference(lambda t: t.sum() ** 2, x, eps=0.01)
    assert_close(
        found, expected, rtol=1e-8, atol=1e-8, because="the square of a sum; a central difference is exact on it"
    )


@task("finite_difference")
def test_the_difference_is_central(solution, randn):
    x = randn(5, dtype=torch.float64)
    expected = like(3 * array(x) ** 2 + 0.01**2, x)
    found = solution.finite_difference(lambda t: (t**3).sum(), x, eps=0.01)
    assert_close(
        found, expected, rtol=1e-8, atol=1e-8, because="on a cubic a central difference is too large by exactly eps**2"
    )


@task("finite_difference")
def test_half_the_step_leaves_a_quarter_of_the_error(solution, randn):
    x = randn(5, dtype=torch.float64)
    slope = like(3 * array(x) ** 2, x)
    errors = [solution.finite_difference(lambda t: (t**3).sum(), x, eps).cpu() - slope for eps in (0.02, 0.01)]
    assert_close(
        errors[0], 4 * errors[1], rtol=1e-5, atol=1e-9, because="four times the error at eps=0.01, seen at eps=0.02"
    )


@task("finite_difference")
def test_the_step_is_a_millionth_unless_told_otherwise(solution, randn):
    x = randn(4, dtype=torch.float64)
    expected = like(np.sin(0.1) * 1e6 * np.cos(1e5 * array(x)), x)
    found = solution.finite_difference(lambda t: (1e5 * t).sin().sum(), x)
    assert_close(found, expected, rtol=1e-4, atol=1.0, because="on a wave this short the default eps of 1e-6 shows")


@task("finite_difference")
def test_float32_inputs_are_differenced_in_float64(solution, randn):
    x, c = randn(2, 3), randn(2, 3, dtype=torch.float64)
    expected = like(array(c) * np.cos(array(x)), x)
    found = solution.finite_difference(lambda t: (c * t.sin()).sum(), x)
    assert_close(
        found, expected, because="a step of 1e-6 is lost in float32, so f and the quotient are taken in float64"
    )


@task("finite_difference")
def test_f_sees_float64_tensors_of_the_right_shape(solution, randn):
    x, seen = randn(2, 3), []

    def f(t):
        seen.append((str(t.dtype), tuple(t.shape)))
        return (t**2).sum()

    solution.finite_difference(f, x)
    assert_equal(sorted(set(seen)), [("torch.float64", (2, 3))], because="the kinds of tensor that f was called with")


@task("finite_difference")
@pytest.mark.parametrize("layout", ["transposed", "every other", "expanded"])
def test_any_strides(solution, randn, layout):
    base = randn(3, 4, dtype=torch.float64)
    x = {"transposed": base.T, "every other": noncontiguous(base), "expanded": base[:, :1].expand(3, 2)}[layout]
    expected = like(3 * array(x) ** 2, x)
    assert_close(solution.finite_difference(lambda t: (t**3).sum(), x), expected, rtol=1e-6, atol=1e-7)


@task("finite_difference")
def test_an_x_that_asks_for_gradients_is_no_obstacle(solution, randn):
    x = randn(4, dtype=torch.float64).requires_grad_()
    expected = like(2 * array(x), x)
    found = solution.finite_difference(lambda t: (t**2).sum(), x)
    assert_close(found, expected, rtol=1e-6, atol=1e-7)
    assert_equal((found.requires_grad, x.requires_grad), (False, True), because="requires_grad of the result and of x")


@task("finite_difference")
def test_the_slope_is_part_of_no_graph(solution, randn):
    x, w = randn(4, dtype=torch.float64), randn(4, dtype=torch.float64).requires_grad_()
    found = solution.finite_difference(lambda t: (w * t).sum(), x)
    assert_close(found, like(array(w), x), rtol=1e-6, atol=1e-7)
    assert_that(
        not found.requires_grad, "f uses a parameter, and the result is tied to its graph", value=found.requires_grad
    )


@task("finite_difference")
def test_x_is_the_same_bit_for_bit_when_f_raises(solution, randn):
    x, calls = randn(4, dtype=torch.float64), []

    def f(t):
        calls.append(1)
        if len(calls) == 4:
            raise Interrupted
        return (t**2).sum()

    before = x.clone()
    with contextlib.suppress(Interrupted):
        solution.finite_difference(f, x)
    assert_equal(x, before, because="f raised in the middle, and x is not what it was")


@task("finite_difference")
@pytest.mark.parametrize("shape", [(4,), (1,)], ids=str)
def test_a_vector_valued_f_is_refused(solution, randn, shape):
    x, values = randn(4, dtype=torch.float64), randn(*shape, dtype=torch.float64)
    because = f"f returns shape {shape}, which is no scalar"
    assert_raises(
        ValueError, solution.finite_difference, lambda t: values * t.sum(), x, mentions=[str(shape)], because=because
    )


# per_example_grads


@pytest.fixture
def rows(randn):
    """A function that draws (w, X, y) and says what the gradients are."""

    def draw(n, d, dtype=torch.float64):
        w, X, y = randn(d, dtype=dtype), randn(n, d, dtype=dtype), randn(n, dtype=dtype)
        return w, X, y, like((array(X) @ array(w) - array(y))[:, None] * array(X), w)

    return draw


@task("per_example_grads")
@pytest.mark.parametrize("n, d", [(5, 3), (3, 5), (4, 4), (1, 2), (3, 1), (0, 3)])
def test_each_row_has_its_own_gradient(solution, rows, dtype, n, d):
    w, X, y, expected = rows(n, d, dtype)
    because = "row n is (X[n] . w - y[n]) * X[n]"
    assert_close(solution.per_example_grads(w, X, y), expected, because=because, **rounding(dtype))


@task("per_example_grads")
def test_noncontiguous_inputs(solution, rows):
    w, X, y, expected = rows(5, 3)
    assert_close(solution.per_example_grads(noncontiguous(w), noncontiguous(X), noncontiguous(y)), expected)


@task("per_example_grads")
def test_a_w_that_asks_for_gradients(solution, rows):
    w, X, y, expected = rows(5, 3)
    found = solution.per_example_grads(w.requires_grad_(), X, y)
    assert_close(found, expected)
    assert_that(not found.requires_grad, "the result is part of a graph", value=found.requires_grad)


@task("per_example_grads")
def test_a_w_in_the_middle_of_a_graph(solution, rows):
    w, X, y, expected = rows(5, 3)
    start = (w / 2).requires_grad_()
    assert_close(solution.per_example_grads(start * 2, X, y), expected, because="w is no leaf here")
    assert_that(start.grad is None, "w was 2 * start, and a gradient arrived at start", value=start.grad)


@task("per_example_grads")
def test_an_older_grad_of_w_is_not_mixed_in(solution, rows, randn):
    w, X, y, expected = rows(5, 3)
    w.requires_grad_().grad = randn(3, dtype=torch.float64)
    assert_close(solution.per_example_grads(w, X, y), expected, because="w.grad held something before the call")


@task("per_example_grads")
def test_w_keeps_the_grad_it_had(solution, rows, randn):
    w, X, y, _ = rows(5, 3)
    w.requires_grad_().grad = randn(3, dtype=torch.float64)
    before = w.grad.clone()
    solution.per_example_grads(w, X, y)
    assert_that(w.grad is not None, "w.grad was there before the call and is gone")
    assert_close(w.grad, before, because="w.grad is the caller's")


@task("per_example_grads")
@pytest.mark.parametrize("asks", [False, True])
def test_a_w_without_grad_has_none_afterwards(solution, rows, asks):
    w, X, y, _ = rows(5, 3)
    w.requires_grad_(asks)
    solution.per_example_grads(w, X, y)
    assert_equal(
        (w.requires_grad, w.grad is None), (asks, True), because="requires_grad of w, and whether w.grad is None"
    )


@task("per_example_grads")
def test_data_that_ask_for_gradients_get_none(solution, rows):
    w, X, y, expected = rows(5, 3)
    X.requires_grad_(), y.requires_grad_()
    found = solution.per_example_grads(w, X, y)
    assert_close(found, expected)
    assert_equal((X.grad is None, y.grad is None), (True, True), because="whether X.grad and y.grad are None")
    assert_that(not found.requires_grad, "the result is part of a graph", value=found.requires_grad)


@task("per_example_grads")
@pytest.mark.parametrize("n", [0, 1, 6])
def test_one_backward_pass_per_row(solution, randn, n):
    with backward_passes() as count:
        solution.per_example_grads(randn(3), randn(n, 3), randn(n))
    assert_equal(count[0], n, because=f"backward passes for {n} rows")


@task("per_example_grads")
def test_each_pass_goes_through_one_row(solution, randn):
    n, d = 24, 16
    because = "a pass for one row costs as much as a pass for all: the graph holds every row"
    w, X, y = randn(d), randn(n, d), randn(n)
    assert_cost(solution.per_example_grads, w, X, y, max_flops=8 * n * d, max_elementwise=16 * n * d, because=because)


@task("per_example_grads")
def test_graphs_do_not_pile_up(solution, randn):
    few, many = (most_kept(solution.per_example_grads, randn(4), randn(n, 4), randn(n)) for n in (3, 30))
    because = "what is kept for backward (bytes, tensors) with 30 rows, beyond that with 3"
    assert_equal(growth(few, many), (0, 0), because=because)


@task("per_example_grads")
@pytest.mark.parametrize("w, X, y, mentions", [
    ((4,), (5, 3), (5,), ["(4,)", "(5, 3)"]),
    ((1,), (5, 3), (5,), ["(1,)", "(5, 3)"]),
    ((3, 1), (5, 3), (5,), ["(3, 1)", "(5, 3)"]),
    ((3,), (5, 3), (5, 1), ["(5, 1)", "(5, 3)"]),
    ((3,), (5, 3), (6,), ["(6,)", "(5, 3)"]),
    ((3,), (5, 3), (4,), ["(4,)", "(5, 3)"]),
    ((3,), (5, 3), (1,), ["(1,)", "(5, 3)"]),
    ((), (5,), (5,), ["(5,)"]),
    ((3,), (3,), (), ["(3,)"]),
    ((2, 3), (5, 2, 3), (5,), ["(5, 2, 3)"]),
], ids=str)  # fmt: skip
def test_rows_that_do_not_fit_are_refused(solution, randn, w, X, y, mentions):
    inputs = randn(*w), randn(*X), randn(*y)
    assert_raises(
        ValueError, solution.per_example_grads, *inputs, mentions=mentions, because=f"w {w}, X {X}, y {y} do not fit"
    )


@cost_case("per_example_grads")
def per_example_grads_cost(module, randn):
    w, X, y = randn(32), randn(64, 32), randn(64)
    return lambda: module.per_example_grads(w, X, y)


# linreg_gd


def descend(X, y, lr, steps):
    """Gradient descent in numpy: w, b and the losses before each step."""
    X, y = array(X), array(y)
    w, b, losses = np.zeros(X.shape[1]), 0.0, []
    for _ in range(steps):
        rest = X @ w + b - y
        losses.append(float((rest**2).mean()))
        w, b = w - lr * 2 * X.T @ rest / len(y), b - lr * 2 * rest.mean()
    return w, b, losses


@task("linreg_gd")
def test_the_first_step_is_the_analytic_one(solution, randn, dtype):
    X, y = randn(7, 3, dtype=dtype), randn(7, dtype=dtype)
    expected = like(0.1 * 2 * array(X).T @ array(y) / 7, X), like(0.1 * 2 * array(y).mean(), X)
    w, b, _ = solution.linreg_gd(X, y, 0.1, 1)
    assert_close(
        (w, b), expected, because="from zero, w moves to lr * 2/N * X^T y and b to lr * 2 * mean(y)", **rounding(dtype)
    )


@task("linreg_gd")
@pytest.mark.parametrize("steps", [2, 3, 9])
def test_each_later_step_is_right_too(solution, randn, steps):
    X, y = randn(7, 3, dtype=torch.float64), randn(7, dtype=torch.float64)
    w, b, _ = descend(X, y, 0.05, steps)
    found_w, found_b, _ = solution.linreg_gd(X, y, 0.05, steps)
    assert_close((found_w, found_b), (like(w, X), like(b, X)), because=f"w and b after {steps} steps")


@task("linreg_gd")
def test_the_losses_are_those_before_each_step(solution, randn):
    X, y = randn(6, 2, dtype=torch.float64), randn(6, dtype=torch.float64)
    _, _, expected = descend(X, y, 0.05, 4)
    _, _, losses = solution.linreg_gd(X, y, 0.05, 4)
    assert_close(
        [float(loss) for loss in losses], expected, because="the first is the mean of y**2, before anything moved"
    )


@task("linreg_gd")
def test_losses_are_python_floats(solution, randn):
    _, _, losses = solution.linreg_gd(randn(6, 2), randn(6), 0.05, 3)
    kinds = [type(loss).__name__ + " with a graph" * getattr(loss, "requires_grad", False) for loss in losses]
    assert_equal(kinds, ["float"] * 3, because="the types of what is in losses")


@task("linreg_gd")
def test_no_steps_no_move(solution, randn, dtype):
    w, b, losses = solution.linreg_gd(randn(6, 2, dtype=dtype), randn(6, dtype=dtype), 0.05, 0)
    assert_close((w, b), (torch.zeros(2, dtype=dtype), torch.zeros((), dtype=dtype)))
    assert_equal(losses, [])


@task("linreg_gd")
def test_many_steps_end_at_least_squares(solution, randn):
    n = 12
    columns = torch.cat([torch.ones(n, 1, dtype=torch.float64), randn(n, 2, dtype=torch.float64).cpu()], dim=1)
    basis = torch.linalg.qr(columns).Q[:, 1:] * n**0.5  # centered columns of variance one, uncorrelated
    X = (
        basis * torch.tensor([1.0, 0.7], dtype=torch.float64) + torch.tensor([0.4, -0.3], dtype=torch.float64)
    ).contiguous()
    y = randn(n, dtype=torch.float64)
    best = np.linalg.lstsq(np.column_stack([array(X), np.ones(n)]), array(y), rcond=None)[0]
    w, b, _ = solution.linreg_gd(X.to(y.device), y, 0.25, 150)
    assert_close(
        (w, b),
        (like(best[:2], X), like(best[2], X)),
        rtol=1e-6,
        atol=1e-7,
        because="after 150 steps nothing moves any more",
    )


@task("linreg_gd")
@pytest.mark.parametrize("steps", [0, 3])
def test_w_and_b_are_leaves(solution, randn, steps):
    w, b, _ = solution.linreg_gd(randn(6, 2), randn(6), 0.05, steps)
    assert_equal((w.is_leaf, b.is_leaf), (True, True), because="whether w and b are leaves")


@task("linreg_gd")
def test_the_data_stay_as_they_were(solution, randn):
    X, y = randn(6, 2).requires_grad_(), randn(6).requires_grad_()
    with unchanged(X, y):
        w, _, _ = solution.linreg_gd(X, y, 0.05, 3)
    assert_that(w.is_leaf, "X asks for gradients, and w hangs on its graph", value=w.is_leaf)


@task("linreg_gd")
def test_nothing_is_random(solution, randn):
    X, y = randn(6, 2), randn(6)
    with global_rng_untouched():
        solution.linreg_gd(X, y, 0.05, 2)


@task("linreg_gd")
@pytest.mark.parametrize("X, y", [((5, 3), (5, 1)), ((5, 3), (4,)), ((5, 3), (1,)), ((5, 3), ()), ((5, 3), (3,)), ((5,), (5,)), ((5, 3, 1), (5,))], ids=str)  # fmt: skip
def test_data_that_do_not_fit_are_refused(solution, randn, X, y):
    inputs = randn(*X), randn(*y)
    because = f"y of shape {y} is not one number per row of an X of shape {X}"
    assert_raises(ValueError, solution.linreg_gd, *inputs, 0.1, 2, mentions=[str(X), str(y)], because=because)


@task("linreg_gd")
@pytest.mark.parametrize("steps", [1, 5])
def test_one_backward_pass_per_step(solution, randn, steps):
    X, y = randn(6, 2, dtype=torch.float64), randn(6, dtype=torch.float64)
    w, b, _ = descend(X, y, 0.05, steps)
    with backward_passes() as count:
        found_w, found_b, _ = solution.linreg_gd(X, y, 0.05, steps)
    assert_close((found_w, found_b), (like(w, X), like(b, X)))
    assert_equal(count[0], steps, because=f"backward passes for {steps} steps")


@task("linreg_gd")
def test_the_graph_of_a_step_does_not_outlive_it(solution, randn):
    X, y = randn(6, 2), randn(6)
    few, many = (most_kept(solution.linreg_gd, X, y, 0.01, steps) for steps in (10, 200))
    because = "what is kept for backward (bytes, tensors) in 200 steps, beyond that in 10"
    assert_equal(growth(few, many), (0, 0), because=because)


@task("linreg_gd")
def test_memory_does_not_grow_with_the_steps(solution, randn):
    X, y = randn(12, 40), randn(12)
    peaks = [measure(solution.linreg_gd, X, y, 0.001, steps)[1].peak_bytes for steps in (10, 200)]
    more = peaks[1] - peaks[0]
    assert_that(more <= 190 * 16, f"at their peak 200 steps hold {more} bytes more than 10 do", value=more)


@cost_case("linreg_gd")
def linreg_gd_cost(module, randn):
    X, y = randn(64, 8), randn(64)
    return lambda: module.linreg_gd(X, y, 0.1, 20)


# hvp


@task("hvp")
def test_a_quadratic_has_its_matrix_for_hessian(solution, randn, dtype):
    m, x, v = randn(4, 4, dtype=dtype), randn(4, dtype=dtype), randn(4, dtype=dtype)
    expected = like((array(m) + array(m).T) / 2 @ array(v), x)
    found = solution.hvp(lambda t: 0.5 * (t @ m @ t), x, v)
    assert_close(found, expected, because="the Hessian of t M t / 2 is the symmetric part of M", **rounding(dtype))


@task("hvp")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_shape(solution, randn, shape):
    x, v, c = (randn(*shape, dtype=torch.float64) for _ in range(3))
    expected = like(6 * array(c) * array(x) * array(v), x)
    assert_close(
        solution.hvp(lambda t: (c * t**3).sum(), x, v), expected, because="the second derivative of c x**3 is 6 c x"
    )


@task("hvp")
def test_curvature_between_elements_of_different_rows(solution, randn):
    x, v = randn(2, 3, dtype=torch.float64), randn(2, 3, dtype=torch.float64)
    s, c, u = np.sin(array(x)), np.cos(array(x)), array(v)
    expected = like(2 * c * (c * u).sum() - 2 * s.sum() * s * u, x)
    assert_close(solution.hvp(lambda t: t.sin().sum() ** 2, x, v), expected, because="the square of a sum of sines")


@task("hvp")
def test_it_is_the_slope_of_the_gradient(solution, randn):
    x, v = randn(5, dtype=torch.float64), randn(5, dtype=torch.float64)
    a, b = array(x) + 1e-5 * array(v), array(x) - 1e-5 * array(v)
    expected = like((np.exp(a) / np.exp(a).sum() - np.exp(b) / np.exp(b).sum()) / 2e-5, x)
    found = solution.hvp(lambda t: t.exp().sum().log(), x, v)
    assert_close(
        found, expected, rtol=1e-6, atol=1e-8, because="the gradient a little ahead less the one a little behind"
    )


@task("hvp")
def test_a_linear_f_gives_zeros(solution, randn):
    x, v, c = randn(3), randn(3), randn(3)
    assert_close(solution.hvp(lambda t: (c * t).sum(), x, v), torch.zeros(3), because="a plane has no curvature")


@task("hvp")
def test_a_linear_f_with_a_parameter_gives_zeros(solution, randn):
    x, v, w = randn(3), randn(3), randn(3).requires_grad_()
    found = solution.hvp(lambda t: (w * t).sum(), x, v)
    assert_close(found, torch.zeros(3), because="the gradient is w, and does not depend on x")


@task("hvp")
def test_a_constant_f_gives_zeros(solution, randn):
    x, v, c = randn(3), randn(3), randn(())
    assert_close(solution.hvp(lambda t: c, x, v), torch.zeros(3))


@task("hvp")
def test_the_product_is_part_of_no_graph(solution, randn):
    x, v, w = randn(3).requires_grad_(), randn(3).requires_grad_(), randn(3).requires_grad_()
    found = solution.hvp(lambda t: (w * t**3).sum(), x, v)
    assert_close(found, like(6 * array(w) * array(x) * array(v), x))
    assert_that(not found.requires_grad, "the result carries a graph with it", value=found.requires_grad)


@task("hvp")
def test_no_grad_is_filled(solution, randn):
    x, v, w = randn(3).requires_grad_(), randn(3).requires_grad_(), randn(3).requires_grad_()
    x.grad = randn(3)
    with unchanged(x, v, w):
        solution.hvp(lambda t: (w * t**3).sum(), x, v)


@task("hvp")
def test_an_x_and_v_that_ask_for_nothing_stay_so(solution, randn):
    x, v = randn(3), randn(3)
    with unchanged(x, v):
        solution.hvp(lambda t: (t**3).sum(), x, v)


@task("hvp")
def test_an_x_that_is_no_leaf(solution, randn):
    start, v = randn(3).requires_grad_(), randn(3)
    x = start * 2
    assert_close(solution.hvp(lambda t: (t**3).sum(), x, v), like(6 * array(x) * array(v), v))


@task("hvp")
def test_second_derivatives_inside_no_grad(solution, randn):
    x, v = randn(3), randn(3)
    expected = like(6 * array(x) * array(v), x)
    with torch.no_grad():
        found = solution.hvp(lambda t: (t**3).sum(), x, v)
    assert_close(found, expected, because="the caller had switched recording off")


@task("hvp")
@pytest.mark.parametrize("x, v", [((3,), (1,)), ((3,), ()), ((3,), (4,)), ((2, 3), (3,)), ((2, 3), (3, 2))], ids=str)
def test_a_direction_of_another_shape_is_refused(solution, randn, x, v):
    because = f"v of shape {v} is no direction for an x of shape {x}"
    assert_raises(
        ValueError,
        solution.hvp,
        lambda t: (t**3).sum(),
        randn(*x),
        randn(*v),
        mentions=[str(x), str(v)],
        because=because,
    )


@task("hvp")
@pytest.mark.parametrize("shape", [(3,), (1,)], ids=str)
def test_curvature_needs_a_scalar_f(solution, randn, shape):
    values = randn(*shape)
    assert_raises(ValueError, solution.hvp, lambda t: values * (t**3).sum(), randn(3), randn(3), mentions=[str(shape)])


@task("hvp")
def test_two_backward_passes_suffice(solution, randn):
    x, v = randn(12), randn(12)
    with backward_passes() as count:
        solution.hvp(lambda t: (t**4).sum() + t.sum() ** 2, x, v)
    assert_that(
        count[0] <= 2, f"{count[0]} backward passes for 12 elements; two suffice for any number", value=count[0]
    )


@task("hvp")
def test_the_hessian_is_never_made(solution, randn):
    x, v = randn(50), randn(50)
    because = "50 elements need no table of 50 * 50"
    assert_cost(solution.hvp, lambda t: (t**4).sum() + t.sum() ** 2, x, v, no_larger_than=50, because=because)


@cost_case("hvp")
def hvp_cost(module, randn):
    m, x, v = randn(64, 64), randn(64), randn(64)
    return lambda: module.hvp(lambda t: t @ m @ t, x, v)


# newton_step


@task("newton_step")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_step_solves_a_quadratic(solution, randn, rand, shape):
    x, goal = randn(*shape, dtype=torch.float64), randn(*shape, dtype=torch.float64)
    h = rand(*shape, dtype=torch.float64) + 0.5
    found = solution.newton_step(lambda t: (h * (t - goal) ** 2).sum(), x)
    assert_close(
        found, goal.clone(), rtol=1e-9, atol=1e-9, because="from anywhere on a bowl one step reaches the bottom"
    )


@task("newton_step")
def test_one_step_solves_a_saddle(solution, randn, rand):
    x, goal = randn(4, dtype=torch.float64), randn(4, dtype=torch.float64)
    h = (rand(4, dtype=torch.float64) + 0.5) * torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64).to(x.device)
    found = solution.newton_step(lambda t: (h * (t - goal) ** 2).sum(), x)
    because = "open upward in two directions, downward in two: one step reaches the stationary point of each"
    assert_close(found, goal.clone(), rtol=1e-9, atol=1e-9, because=because)


@task("newton_step")
def test_a_quartic_shrinks_by_a_third(solution, randn, dtype):
    x = randn(5, dtype=dtype)
    expected = like(array(x) * 2 / 3, x)
    assert_close(solution.newton_step(lambda t: (t**4).sum(), x), expected, because="4 x**3 / (12 x**2) is x / 3")


@task("newton_step")
def test_an_exponential_moves_by_one(solution, randn):
    x = randn(5, dtype=torch.float64)
    expected = like(array(x) - 1, x)
    assert_close(
        solution.newton_step(lambda t: t.exp().sum(), x), expected, because="slope and curvature of exp are equal"
    )


@task("newton_step")
def test_elements_without_curvature_stay(solution, randn):
    x, h = randn(4, dtype=torch.float64), torch.tensor([1.0, 0.0, 2.0, 0.0], dtype=torch.float64)
    slope = torch.tensor([0.0, 0.0, 0.0, 3.0], dtype=torch.float64).to(x.device)
    expected = like(np.where(array(h) == 0, array(x), 0.0), x)
    curved = h.to(x.device)
    found = solution.newton_step(lambda t: (curved * t**2 + slope * t).sum(), x)
    assert_close(found, expected, because="the second element has no slope either, the fourth has one")


@task("newton_step")
def test_a_straight_line_moves_nothing(solution, randn):
    x, c = randn(4), randn(4)
    expected = x.clone()
    assert_close(solution.newton_step(lambda t: (c * t).sum(), x), expected)


@task("newton_step")
def test_x_stays_and_the_result_has_no_graph(solution, randn):
    x, w = randn(4).requires_grad_(), (randn(4) ** 2 + 1).requires_grad_()
    x.grad = randn(4)
    with unchanged(x, w):
        found = solution.newton_step(lambda t: (w * t**2).sum(), x)
    assert_that(not found.requires_grad, "the result carries a graph with it", value=found.requires_grad)


@task("newton_step")
@pytest.mark.parametrize("shape", [(4,), (1,)], ids=str)
def test_newton_needs_a_scalar_f(solution, randn, shape):
    values = randn(*shape)
    assert_raises(ValueError, solution.newton_step, lambda t: values * (t**2).sum(), randn(4), mentions=[str(shape)])


@task("newton_step")
def test_three_backward_passes_suffice(solution, randn):
    x = randn(12)
    with backward_passes() as count:
        solution.newton_step(lambda t: (t**4).sum(), x)
    assert_that(
        count[0] <= 3, f"{count[0]} backward passes for 12 elements; three suffice for any number", value=count[0]
    )


@task("newton_step")
def test_no_table_of_second_derivatives(solution, randn):
    assert_cost(
        solution.newton_step, lambda t: (t**4).sum(), randn(50), no_larger_than=50, because="no 50 * 50 table is needed"
    )


# fixed_point_grad


def rotation(randn, n):
    """A random matrix that shrinks every vector to half its length."""
    return torch.linalg.qr(randn(n, n, dtype=torch.float64)).Q.contiguous() * 0.5


@task("fixed_point_grad")
@pytest.mark.parametrize("n_iter", [1, 2, 5])
def test_f_is_applied_as_often_as_asked(solution, randn, n_iter):
    theta, z0 = randn(3, dtype=torch.float64), randn(3, dtype=torch.float64)
    expected = array(z0)
    for _ in range(n_iter):
        expected = 0.5 * np.sin(expected) + array(theta)
    z, _ = solution.fixed_point_grad(lambda z, t: 0.5 * z.sin() + t, theta, z0, n_iter)
    assert_close(z, like(expected, z0), because=f"{n_iter} applications of f to z0")


@task("fixed_point_grad")
def test_the_square_root_as_a_fixed_point(solution, rand, randn):
    theta, u = rand(4, dtype=torch.float64) + 0.5, randn(4, dtype=torch.float64)
    expected = like(np.sqrt(array(theta)), theta), like(array(u) / (2 * np.sqrt(array(theta))), theta)
    z, pullback = solution.fixed_point_grad(lambda z, t: (z + t / z) / 2, theta, torch.ones_like(theta), 30)
    assert_close(
        (z, pullback(u)), expected, because="Heron's rule ends at sqrt(theta), whose slope is 1 / (2 sqrt(theta))"
    )


@task("fixed_point_grad")
def test_a_linear_map_gives_a_linear_system(solution, randn):
    a, theta, u = rotation(randn, 4), randn(4, dtype=torch.float64), randn(4, dtype=torch.float64)
    inverse = np.linalg.inv(np.eye(4) - array(a))
    expected = like(inverse.T @ array(u), u)
    _, pullback = solution.fixed_point_grad(lambda z, t: a @ z + t, theta, torch.zeros_like(theta), 60)
    assert_close(pullback(u), expected, because="z* = (I - A)^-1 theta, so u^T dz*/dtheta = (I - A)^-T u")


@task("fixed_point_grad")
def test_it_equals_the_gradient_through_all_iterations(solution, randn):
    a, theta, z0 = rotation(randn, 3), randn(2, 3, dtype=torch.float64), randn(3, dtype=torch.float64)
    inputs, u = randn(2, dtype=torch.float64), randn(3, dtype=torch.float64)

    def f(z, t):
        return torch.tanh(a @ z + inputs @ t)

    leaf, z = theta.clone().requires_grad_(), z0.clone()
    for _ in range(80):
        z = f(z, leaf)
    (expected,) = torch.autograd.grad((u * z).sum(), leaf)
    _, pullback = solution.fixed_point_grad(f, theta, z0, 80)
    assert_close(pullback(u), expected, because="80 iterations, differentiated one by one, give this")


@task("fixed_point_grad")
def test_pullback_can_be_called_again(solution, randn):
    a, theta, u = rotation(randn, 3), randn(3, dtype=torch.float64), randn(2, 3, dtype=torch.float64)
    inverse = np.linalg.inv(np.eye(3) - array(a))
    expected = like((inverse.T @ array(u).T).T, u)
    _, pullback = solution.fixed_point_grad(lambda z, t: a @ z + t * 1.0, theta, torch.zeros_like(theta), 60)
    assert_close([pullback(u[0]), pullback(u[1]), pullback(u[0])], [expected[0], expected[1], expected[0]])


@task("fixed_point_grad")
def test_zeros_where_f_ignores_theta(solution, randn):
    a, theta, u = rotation(randn, 3), randn(2, dtype=torch.float64), randn(3, dtype=torch.float64)
    _, pullback = solution.fixed_point_grad(lambda z, t: (a @ z).sin(), theta, torch.zeros_like(u), 40)
    assert_close(pullback(u), torch.zeros(2, dtype=torch.float64))


@task("fixed_point_grad")
def test_an_f_that_ignores_z(solution, randn):
    theta, u = randn(3, dtype=torch.float64), randn(3, dtype=torch.float64)
    _, pullback = solution.fixed_point_grad(lambda z, t: t**2, theta, torch.zeros_like(u), 5)
    assert_close(pullback(u), like(2 * array(theta) * array(u), u), because="z* is theta**2, whatever z was")


@task("fixed_point_grad")
def test_nothing_returned_is_part_of_a_graph(solution, randn):
    theta, z0 = randn(3).requires_grad_(), randn(3).requires_grad_()
    z, pullback = solution.fixed_point_grad(lambda z, t: 0.5 * z.sin() + t, theta, z0, 20)
    assert_equal(
        (z.requires_grad, pullback(torch.ones_like(z)).requires_grad),
        (False, False),
        because="requires_grad of z and of the gradient",
    )


@task("fixed_point_grad")
def test_the_grad_of_nothing_is_filled(solution, randn):
    theta, z0 = randn(3).requires_grad_(), randn(3).requires_grad_()
    theta.grad = randn(3)
    with unchanged(theta, z0):
        z, pullback = solution.fixed_point_grad(lambda z, t: 0.5 * z.sin() + t, theta, z0, 20)
        pullback(torch.ones_like(z))


@task("fixed_point_grad")
def test_inputs_that_ask_for_nothing_stay_so(solution, randn):
    theta, z0 = randn(3), randn(3)
    with unchanged(theta, z0):
        z, pullback = solution.fixed_point_grad(lambda z, t: 0.5 * z.sin() + t, theta, z0, 20)
        pullback(torch.ones_like(z))


@task("fixed_point_grad")
@pytest.mark.parametrize("shape", [(1,), (), (4,), (2, 3)], ids=str)
def test_weights_of_another_shape_are_refused(solution, randn, shape):
    _, pullback = solution.fixed_point_grad(lambda z, t: 0.5 * z.sin() + t, randn(3), randn(3), 5)
    assert_raises(
        ValueError,
        pullback,
        randn(*shape),
        mentions=[str(shape), "(3,)"],
        because=f"u of shape {shape} for a z of shape (3,)",
    )


@task("fixed_point_grad")
def test_what_is_kept_does_not_depend_on_the_iterations(solution, randn):
    theta, z0, u = randn(3).requires_grad_(), randn(3), randn(3)

    def both(n_iter):
        return solution.fixed_point_grad(lambda z, t: 0.5 * z.sin() + t, theta, z0, n_iter)[1](u)

    because = "what is kept for backward (bytes, tensors) with 100 iterations, beyond that with 10"
    assert_equal(growth(most_kept(both, 10), most_kept(both, 100)), (0, 0), because=because)


@task("fixed_point_grad")
def test_no_more_than_two_applications_are_kept(solution, randn):
    theta, z0, u = randn(64), randn(64), randn(64)
    _, (kept, _) = most_kept(lambda: solution.fixed_point_grad(lambda z, t: 0.5 * z.sin() + t, theta, z0, 20)[1](u))
    because = f"{kept} bytes are kept for backward; one application of this f keeps {64 * 4}"
    assert_that(kept <= 2 * 64 * 4, because, value=kept)


@cost_case("fixed_point_grad")
def fixed_point_grad_cost(module, randn):
    theta, z0, u = randn(64), randn(64), randn(64)
    return lambda: module.fixed_point_grad(lambda z, t: 0.5 * z.sin() + t, theta, z0, 30)[1](u)
