import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from checker.testing import (
    assert_close,
    assert_cost,
    assert_equal,
    assert_gradients_close,
    assert_raises,
    assert_that,
    cost_case,
    measure,
    noncontiguous,
    task,
)

SHAPES = [(), (7,), (2, 3, 5), (0,), (3, 0)]
FAR = [-1e4, -1e3, -200.0, 200.0, 1e3, 1e4]
INF = float("inf")


def column(values, device, dtype=torch.float64):
    """A vector of these values."""
    return torch.tensor(values, dtype=dtype, device=device)


def away_from_zero(x):
    """x, pushed off the kink."""
    return x + torch.where(x > 0, 0.01, -0.01).to(x.dtype)


def slope_of(fn, x, create_graph=False):
    """The derivative of an elementwise function at each element of x."""
    leaf = x.detach().clone().requires_grad_()
    return torch.autograd.grad(fn(leaf).sum(), leaf, create_graph=create_graph)[0]


def curvature_of(fn, x, weights):
    """The derivative at each element of x of weights times the first derivative."""
    leaf = x.detach().clone().requires_grad_()
    weights = weights.detach().clone().requires_grad_()
    (slope,) = torch.autograd.grad(fn(leaf), leaf, weights, create_graph=True)
    return torch.autograd.grad(slope.sum(), (leaf, weights))


def logistic(x):
    """1 / (1 + exp(-x)) by numpy, for moderate x."""
    return 1.0 / (1.0 + np.exp(-x))


def array(x):
    return x.detach().cpu().double().numpy()


def like(values, x):
    return torch.as_tensor(np.asarray(values)).to(x.dtype)


# relu


@task("relu")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_negative_numbers_become_zero(solution, randn, dtype, shape):
    x = randn(*shape, dtype=dtype)
    expected = like(np.maximum(array(x), 0), x)
    assert_close(solution.relu(x), expected, because="x where it is positive, else 0")


@task("relu")
def test_relu_of_a_noncontiguous_x(solution, randn):
    x = noncontiguous(randn(3, 4))
    assert_close(solution.relu(x), like(np.maximum(array(x), 0), x))


@task("relu")
def test_relu_keeps_half_precision(solution, randn):
    x = randn(8, dtype=torch.bfloat16)
    assert_close(solution.relu(x), like(np.maximum(array(x), 0), x))


@task("relu")
def test_the_slope_of_relu_is_one_or_zero(solution, randn):
    x = away_from_zero(randn(3, 7, dtype=torch.float64))
    assert_gradients_close(solution.relu, F.relu, [x])


@task("relu")
def test_the_slope_of_relu_at_zero_is_zero(solution, device):
    x = torch.zeros(3, device=device)
    assert_close(slope_of(solution.relu, x), torch.zeros(3), because="the derivative at exactly 0 is 0 by convention")


@task("relu")
def test_relu_of_infinities(solution, device):
    x = column([-INF, INF], device)
    assert_close(solution.relu(x), column([0.0, INF], device), because="relu of -inf and inf")


@task("relu")
def test_relu_does_not_hide_nan(solution, device):
    x = column([float("nan"), -1.0], device)
    expected = column([float("nan"), 0.0], device)
    assert_close(solution.relu(x), expected, equal_nan=True, because="a NaN that disappears here is never found")


@cost_case("relu")
def relu_cost(module, randn):
    x = randn(64, 64).requires_grad_()
    return lambda: module.relu(x)


# leaky_relu


@task("leaky_relu")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_negative_numbers_are_scaled(solution, randn, dtype, shape):
    x = randn(*shape, dtype=dtype)
    expected = F.leaky_relu(x, 0.2)
    assert_close(solution.leaky_relu(x, 0.2), expected, because="x where it is positive, else 0.2 * x")


@task("leaky_relu")
def test_the_default_slope(solution, randn):
    x = -randn(6).abs() - 1
    assert_close(solution.leaky_relu(x), like(0.01 * array(x), x), because="slope is 0.01 unless it is given")


@task("leaky_relu")
@pytest.mark.parametrize("slope", [1.5, 0.0, -0.5])
def test_any_slope_will_do(solution, device, slope):
    x = column([-2.0, -0.5, 0.5, 2.0], device)
    expected = column([-2.0 * slope, -0.5 * slope, 0.5, 2.0], device)
    assert_close(solution.leaky_relu(x, slope=slope), expected, because=f"slope = {slope}")


@task("leaky_relu")
def test_the_two_slopes_of_leaky_relu(solution, randn):
    x = away_from_zero(randn(3, 7, dtype=torch.float64))
    assert_gradients_close(lambda t: solution.leaky_relu(t, 0.3), lambda t: F.leaky_relu(t, 0.3), [x])


@task("leaky_relu")
def test_the_slope_of_leaky_relu_at_zero(solution, device):
    x = torch.zeros(3, device=device)
    found = slope_of(lambda t: solution.leaky_relu(t, 0.25), x)
    assert_close(found, torch.full((3,), 0.25), because="the derivative at exactly 0 is the slope")


@task("leaky_relu")
def test_leaky_relu_keeps_half_precision(solution, randn):
    x = randn(8, dtype=torch.bfloat16)
    assert_close(solution.leaky_relu(x, 0.5), like(np.where(array(x) > 0, array(x), 0.5 * array(x)), x))


@cost_case("leaky_relu")
def leaky_relu_cost(module, randn):
    x = randn(64, 64).requires_grad_()
    return lambda: module.leaky_relu(x)


# sigmoid


@task("sigmoid")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_values_of_sigmoid(solution, randn, dtype, shape):
    x = randn(*shape, dtype=dtype, scale=3.0)
    assert_close(solution.sigmoid(x), like(logistic(array(x)), x), because="1 / (1 + exp(-x))")


@task("sigmoid")
def test_the_slope_of_sigmoid(solution, randn):
    x = randn(3, 7, dtype=torch.float64, scale=3.0)
    assert_gradients_close(solution.sigmoid, torch.sigmoid, [x])


@task("sigmoid")
def test_the_slope_of_sigmoid_at_zero(solution, device):
    x = torch.zeros(2, device=device)
    assert_close(slope_of(solution.sigmoid, x), torch.full((2,), 0.25), because="the derivative at exactly 0 is 1/4")


@task("sigmoid")
def test_the_second_derivative_of_sigmoid(solution, randn):
    x, w = randn(5, dtype=torch.float64), randn(5, dtype=torch.float64)
    y = logistic(array(x))
    expected = [like(array(w) * y * (1 - y) * (1 - 2 * y), x), like(y * (1 - y), x)]
    found = curvature_of(solution.sigmoid, x, w)
    assert_close(list(found), expected, because="backward through backward, at x and at the gradient that came in")


@task("sigmoid")
def test_sigmoid_far_out(solution, device):
    x = column(FAR, device, torch.float32)
    assert_close(solution.sigmoid(x), torch.tensor([0.0, 0, 0, 1, 1, 1]), because=f"sigmoid at {FAR}")


@task("sigmoid")
def test_the_slope_of_sigmoid_far_out(solution, device):
    x = column(FAR, device, torch.float32)
    assert_close(slope_of(solution.sigmoid, x), torch.zeros(6), because=f"the gradient of sigmoid at {FAR}")


@task("sigmoid")
def test_sigmoid_of_infinities(solution, device):
    x = column([-INF, INF], device)
    assert_close(solution.sigmoid(x), column([0.0, 1.0], device), because="sigmoid of -inf and inf")


@task("sigmoid")
def test_the_slope_of_sigmoid_at_infinities(solution, device):
    x = column([-INF, INF], device)
    assert_close(slope_of(solution.sigmoid, x), column([0.0, 0.0], device), because="the gradient at -inf and inf")


@task("sigmoid")
def test_tiny_values_of_sigmoid_are_accurate(solution, rand):
    x = -30.0 - 30.0 * rand(6).double()
    expected = like(np.exp(array(x)) / (1 + np.exp(array(x))), x)
    assert_close(solution.sigmoid(x), expected, rtol=1e-9, atol=0.0, because="between -60 and -30")


@task("sigmoid")
def test_sigmoid_in_bfloat16(solution, randn):
    x = torch.cat([randn(8, dtype=torch.bfloat16, scale=3.0), randn(1, dtype=torch.bfloat16) * 0 - 1e4])
    expected = torch.sigmoid(x.double()).to(torch.bfloat16)
    assert_close(solution.sigmoid(x), expected, rtol=2e-2, atol=1e-3)


@task("sigmoid")
def test_the_slope_of_sigmoid_in_bfloat16(solution, device):
    x = column([-1e4, -1.0, 1.0, 1e4], device, torch.bfloat16)
    middle = float(logistic(1.0) * logistic(-1.0))
    expected = column([0.0, middle, middle, 0.0], device, torch.bfloat16)
    assert_close(slope_of(solution.sigmoid, x), expected, rtol=3e-2, atol=1e-3)


@task("sigmoid")
def test_sigmoid_of_a_noncontiguous_x(solution, randn):
    x = noncontiguous(randn(3, 4))
    assert_close(solution.sigmoid(x), like(logistic(array(x)), x))


@task("sigmoid")
def test_sigmoid_keeps_one_tensor(solution, randn):
    x = randn(1000).requires_grad_()
    assert_cost(solution.sigmoid, x, max_saved_bytes=4000, because="1000 floats go in: 4000 bytes are to be kept")


@task("sigmoid")
def test_what_sigmoid_keeps_is_its_output(solution, randn):
    x = randn(1000).requires_grad_()
    alone = measure(solution.sigmoid, x)[1].saved_bytes
    followed = measure(lambda: solution.sigmoid(x).square())[1].saved_bytes
    because = "square keeps the output of sigmoid anyway: sigmoid(x).square() needs no second tensor (bytes alone, with square)"
    assert_that(followed <= 4000, because, value=(alone, followed))


@cost_case("sigmoid")
def sigmoid_cost(module, randn):
    x = randn(64, 64).requires_grad_()
    return lambda: module.sigmoid(x)


# log_sigmoid


@task("log_sigmoid")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_values_of_log_sigmoid(solution, randn, dtype, shape):
    x = randn(*shape, dtype=dtype, scale=3.0)
    assert_close(solution.log_sigmoid(x), like(np.log(logistic(array(x))), x), because="log(1 / (1 + exp(-x)))")


@task("log_sigmoid")
def test_the_slope_of_log_sigmoid(solution, randn):
    x = away_from_zero(randn(3, 7, dtype=torch.float64, scale=3.0))
    assert_gradients_close(solution.log_sigmoid, F.logsigmoid, [x])


@task("log_sigmoid")
def test_the_slope_of_log_sigmoid_at_zero(solution, device):
    x = torch.zeros(2, device=device)
    assert_close(slope_of(solution.log_sigmoid, x), torch.full((2,), 0.5), because="the derivative at exactly 0 is 1/2")


@task("log_sigmoid")
def test_log_sigmoid_far_out(solution, device):
    x = column(FAR, device, torch.float32)
    expected = torch.tensor([-1e4, -1e3, -200.0, 0, 0, 0])
    assert_close(solution.log_sigmoid(x), expected, because=f"log_sigmoid at {FAR}")


@task("log_sigmoid")
def test_the_slope_of_log_sigmoid_far_out(solution, device):
    x = column(FAR, device, torch.float32)
    expected = torch.tensor([1.0, 1, 1, 0, 0, 0])
    assert_close(slope_of(solution.log_sigmoid, x), expected, because=f"the gradient of log_sigmoid at {FAR}")


@task("log_sigmoid")
def test_log_sigmoid_where_one_exponential_has_just_overflowed(solution, device):
    x = column([-715.0, 715.0], device)
    expected = column([-715.0, 0.0], device)
    assert_close(solution.log_sigmoid(x), expected, because="exp(715) is inf in float64, exp(-715) is not yet 0")


@task("log_sigmoid")
def test_log_sigmoid_of_infinities(solution, device):
    x = column([-INF, INF], device)
    assert_close(solution.log_sigmoid(x), column([-INF, 0.0], device), because="log_sigmoid of -inf and inf")


@task("log_sigmoid")
def test_the_slope_of_log_sigmoid_at_infinities(solution, device):
    x = column([-INF, INF], device)
    expected = column([1.0, 0.0], device)
    assert_close(slope_of(solution.log_sigmoid, x), expected, because="the gradient at -inf and inf")


@task("log_sigmoid")
def test_tiny_values_of_log_sigmoid_are_accurate(solution, rand):
    x = 30.0 + 30.0 * rand(6).double()
    expected = like(-np.log1p(np.exp(-array(x))), x)
    assert_close(solution.log_sigmoid(x), expected, rtol=1e-9, atol=0.0, because="between 30 and 60")


@task("log_sigmoid")
def test_log_sigmoid_in_bfloat16(solution, randn):
    x = torch.cat([randn(8, dtype=torch.bfloat16, scale=3.0), randn(1, dtype=torch.bfloat16) * 0 - 1e4])
    expected = F.logsigmoid(x.double()).to(torch.bfloat16)
    assert_close(solution.log_sigmoid(x), expected, rtol=2e-2, atol=1e-2)


@cost_case("log_sigmoid")
def log_sigmoid_cost(module, randn):
    x = randn(64, 64).requires_grad_()
    return lambda: module.log_sigmoid(x)


# softplus


@task("softplus")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_values_of_softplus(solution, randn, dtype, shape):
    x = randn(*shape, dtype=dtype, scale=3.0)
    assert_close(solution.softplus(x), like(np.log1p(np.exp(array(x))), x), because="log(1 + exp(x))")


@task("softplus")
@pytest.mark.parametrize("beta", [0.5, 3.0])
def test_beta_bends_the_curve(solution, randn, beta):
    x = randn(9, dtype=torch.float64)
    expected = like(np.log1p(np.exp(beta * array(x))) / beta, x)
    assert_close(solution.softplus(x, beta=beta), expected, because=f"log(1 + exp(beta * x)) / beta, beta = {beta}")


@task("softplus")
def test_the_slope_of_softplus_is_a_sigmoid(solution, randn):
    x = randn(9, dtype=torch.float64)
    expected = like(logistic(2.0 * array(x)), x)
    found = slope_of(lambda t: solution.softplus(t, 2.0), x)
    assert_close(found, expected, because="the derivative is sigmoid(beta * x)")


@task("softplus")
def test_the_slope_of_softplus_at_zero(solution, device):
    x = torch.zeros(2, device=device)
    assert_close(slope_of(solution.softplus, x), torch.full((2,), 0.5), because="the derivative at exactly 0 is 1/2")


@task("softplus")
def test_beyond_the_threshold_is_x_itself(solution, device):
    x = column([0.8, 1.1, 2.5, -3.0], device)
    expected = column([math.log1p(math.exp(1.6)) / 2, 1.1, 2.5, math.log1p(math.exp(-6.0)) / 2], device)
    found = solution.softplus(x, beta=2.0, threshold=2.0)
    assert_close(found, expected, because="beta = 2, threshold = 2: 1.1 and 2.5 have beta * x > 2")


@task("softplus")
def test_a_small_beta_moves_the_threshold_out(solution, device):
    x = column([1.5, 3.9, 4.1], device)
    expected = column([math.log1p(math.exp(0.75)) * 2, math.log1p(math.exp(1.95)) * 2, 4.1], device)
    found = solution.softplus(x, beta=0.5, threshold=2.0)
    assert_close(found, expected, because="beta = 1/2, threshold = 2: only 4.1 has beta * x > 2")


@task("softplus")
def test_at_the_threshold_the_curve_is_used(solution, device):
    x = column([1.0], device)
    expected = column([math.log1p(math.exp(1.0))], device)
    assert_close(solution.softplus(x, threshold=1.0), expected, because="beta * x equals the threshold here")


@task("softplus")
def test_the_default_threshold_is_twenty(solution, device):
    x = column([19.9, 20.1], device)
    expected = column([19.9 + math.log1p(math.exp(-19.9)), 20.1], device)
    assert_close(solution.softplus(x), expected, rtol=1e-13, atol=0.0, because="curved at 19.9, x itself at 20.1")


@task("softplus")
def test_the_slope_beyond_the_threshold_is_one(solution, device):
    x = column([0.5, 1.5], device)
    expected = column([1 / (1 + math.exp(-0.5)), 1.0], device)
    assert_close(slope_of(lambda t: solution.softplus(t, threshold=1.0), x), expected, because="threshold = 1")


@task("softplus")
def test_softplus_far_out(solution, device):
    x = column(FAR, device, torch.float32)
    assert_close(solution.softplus(x), torch.tensor([0.0, 0, 0, 200, 1e3, 1e4]), because=f"softplus at {FAR}")


@task("softplus")
def test_the_slope_of_softplus_far_out(solution, device):
    x = column(FAR, device, torch.float32)
    expected = torch.tensor([0.0, 0, 0, 1, 1, 1])
    assert_close(slope_of(solution.softplus, x), expected, because=f"the gradient of softplus at {FAR}")


@task("softplus")
def test_softplus_of_infinities(solution, device):
    x = column([-INF, INF], device)
    assert_close(solution.softplus(x), column([0.0, INF], device), because="softplus of -inf and inf")


@task("softplus")
def test_tiny_values_of_softplus_are_accurate(solution, rand):
    x = -30.0 - 30.0 * rand(6).double()
    expected = like(np.log1p(np.exp(array(x))), x)
    assert_close(solution.softplus(x), expected, rtol=1e-9, atol=0.0, because="between -60 and -30")


@task("softplus")
def test_softplus_in_bfloat16(solution, randn):
    x = torch.cat([randn(8, dtype=torch.bfloat16, scale=3.0), randn(1, dtype=torch.bfloat16) * 0 + 1e4])
    expected = F.softplus(x.double()).to(torch.bfloat16)
    assert_close(solution.softplus(x), expected, rtol=2e-2, atol=1e-2)


@cost_case("softplus")
def softplus_cost(module, randn):
    x = randn(64, 64).requires_grad_()
    return lambda: module.softplus(x)


# gelu


def exact_gelu(x):
    """GELU by Python's own erfc."""
    values = [0.5 * v * math.erfc(-v / math.sqrt(2)) for v in array(x).ravel()]
    return like(np.array(values, dtype=np.float64).reshape(tuple(x.shape)), x)


@task("gelu")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exact_gelu(solution, randn, dtype, shape):
    x = randn(*shape, dtype=dtype, scale=2.0)
    assert_close(solution.gelu(x, approximate="none"), exact_gelu(x), because='approximate="none"')


@task("gelu")
def test_without_a_mode_gelu_is_exact(solution, device):
    x = torch.linspace(-4, 4, 801, dtype=torch.float64, device=device)
    expected = exact_gelu(x)
    off = [(found - expected).abs().max().item() > 1e-6 for found in (solution.gelu(x, "none"), solution.gelu(x))]
    assert_equal(off, [False, False], because="whether gelu(x, 'none'), and gelu(x), is off the exact GELU somewhere")


@task("gelu")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tanh_gelu(solution, randn, dtype, shape):
    x = randn(*shape, dtype=dtype, scale=2.0)
    expected = F.gelu(x, approximate="tanh")
    assert_close(solution.gelu(x, approximate="tanh"), expected, because='approximate="tanh"')


@task("gelu")
@pytest.mark.parametrize("mode", ["none", "tanh"])
def test_the_slope_of_gelu(solution, randn, mode):
    x = randn(3, 7, dtype=torch.float64, scale=2.0)
    assert_gradients_close(lambda t: solution.gelu(t, mode), lambda t: F.gelu(t, approximate=mode), [x])


@task("gelu")
def test_the_two_gelus_differ_by_five_parts_in_ten_thousand(solution, device):
    x = torch.linspace(-4, 4, 801, dtype=torch.float64, device=device)
    gap = (solution.gelu(x, "none") - solution.gelu(x, "tanh")).abs().max().item()
    assert_that(4.6e-4 < gap < 4.8e-4, "the largest gap between the two modes is about 4.7e-4", value=gap)


@task("gelu")
@pytest.mark.parametrize("mode", ["none", "tanh"])
def test_gelu_far_out(solution, device, mode):
    x = column(FAR, device, torch.float32)
    expected = torch.tensor([0.0, 0, 0, 200, 1e3, 1e4])
    assert_close(solution.gelu(x, mode), expected, because=f"gelu at {FAR}")


@task("gelu")
@pytest.mark.parametrize("mode", ["none", "tanh"])
def test_the_slope_of_gelu_far_out(solution, device, mode):
    x = column(FAR, device, torch.float32)
    expected = torch.tensor([0.0, 0, 0, 1, 1, 1])
    found = slope_of(lambda t: solution.gelu(t, mode), x)
    assert_close(found, expected, because=f"the gradient of gelu at {FAR}")


@task("gelu")
@pytest.mark.parametrize("mode", ["none", "tanh"])
def test_gelu_in_bfloat16(solution, randn, mode):
    x = randn(8, dtype=torch.bfloat16)
    expected = F.gelu(x.double(), approximate=mode).to(torch.bfloat16)
    assert_close(solution.gelu(x, mode), expected, rtol=2e-2, atol=2e-2)


@task("gelu")
@pytest.mark.parametrize("mode", ["erf", "Tanh", ""])
def test_an_unknown_mode_is_refused(solution, randn, mode):
    because = f"approximate={mode!r} is neither 'none' nor 'tanh'"
    assert_raises(ValueError, solution.gelu, randn(3), mode, mentions=[mode], because=because)


@cost_case("gelu")
def gelu_cost(module, randn):
    x = randn(64, 64).requires_grad_()
    return lambda: module.gelu(x)


# silu_grad


@task("silu_grad")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_closed_form_agrees_with_autograd(solution, randn, dtype, shape):
    x = randn(*shape, dtype=dtype, scale=3.0)
    expected = slope_of(F.silu, x.double()).to(dtype)
    assert_close(solution.silu_grad(x), expected, because="the derivative of x / (1 + exp(-x))")


@task("silu_grad")
def test_the_slope_vanishes_at_the_minimum(solution, device):
    x = column([-1.2784645427610738], device)
    assert_close(solution.silu_grad(x), column([0.0], device), atol=1e-12, because="SiLU is lowest at -1.2785")


@task("silu_grad")
def test_silu_grad_far_out(solution, device):
    x = column(FAR, device, torch.float32)
    expected = torch.tensor([0.0, 0, 0, 1, 1, 1])
    assert_close(solution.silu_grad(x), expected, because=f"silu_grad at {FAR}")


@task("silu_grad")
def test_silu_grad_can_be_differentiated(solution, randn):
    x = randn(5, dtype=torch.float64)
    s = logistic(array(x))
    expected = like(s * (1 - s) * (2 + array(x) * (1 - 2 * s)), x)
    assert_close(slope_of(solution.silu_grad, x), expected, because="the second derivative of SiLU")


@cost_case("silu_grad")
def silu_grad_cost(module, randn):
    x = randn(64, 64)
    return lambda: module.silu_grad(x)


# silu


@task("silu")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_values_of_silu(solution, randn, dtype, shape):
    x = randn(*shape, dtype=dtype, scale=3.0)
    assert_close(solution.silu(x), like(array(x) * logistic(array(x)), x), because="x / (1 + exp(-x))")


@task("silu")
def test_the_slope_of_silu(solution, randn):
    x = randn(3, 7, dtype=torch.float64, scale=3.0)
    assert_gradients_close(solution.silu, F.silu, [x])


@task("silu")
def test_the_second_derivative_of_silu(solution, randn):
    x, w = randn(5, dtype=torch.float64), randn(5, dtype=torch.float64)
    s = logistic(array(x))
    first = like(s * (1 + array(x) * (1 - s)), x)
    expected = [like(array(w) * s * (1 - s) * (2 + array(x) * (1 - 2 * s)), x), first]
    found = curvature_of(solution.silu, x, w)
    assert_close(list(found), expected, because="backward through backward, at x and at the gradient that came in")


@task("silu")
def test_the_minimum_of_silu(solution, device):
    x = column([-1.2784645427610738], device)
    expected = column([-0.2784645427610738], device)
    assert_close(solution.silu(x), expected, because="the minimum lies exactly 1 above its own place")


@task("silu")
def test_silu_far_out(solution, device):
    x = column(FAR, device, torch.float32)
    assert_close(solution.silu(x), torch.tensor([0.0, 0, 0, 200, 1e3, 1e4]), because=f"silu at {FAR}")


@task("silu")
def test_the_slope_of_silu_far_out(solution, device):
    x = column(FAR, device, torch.float32)
    expected = torch.tensor([0.0, 0, 0, 1, 1, 1])
    assert_close(slope_of(solution.silu, x), expected, because=f"the gradient of silu at {FAR}")


@task("silu")
def test_silu_in_bfloat16(solution, randn):
    x = randn(8, dtype=torch.bfloat16, scale=3.0)
    expected = F.silu(x.double()).to(torch.bfloat16)
    assert_close(solution.silu(x), expected, rtol=2e-2, atol=1e-2)


@task("silu")
def test_silu_of_a_noncontiguous_x(solution, randn):
    x = noncontiguous(randn(3, 4))
    assert_close(solution.silu(x), like(array(x) * logistic(array(x)), x))


@task("silu")
def test_silu_keeps_no_more_than_its_input(solution, randn):
    x = randn(1000).requires_grad_()
    assert_cost(solution.silu, x, max_saved_bytes=4000, because="1000 floats go in: 4000 bytes may be kept")


@cost_case("silu")
def silu_cost(module, randn):
    x = randn(64, 64).requires_grad_()
    return lambda: module.silu(x)


# gated_linear


def gated(x, w_gate, w_up, act):
    """The same unit by numpy."""
    return like(act(array(x) @ array(w_gate).T) * (array(x) @ array(w_up).T), x)


LOOSE = {"rtol": 1e-4, "atol": 1e-4}


@task("gated_linear")
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4), (0, 4), (2, 5, 3, 4)], ids=str)
def test_the_gate_opens_the_other_projection(solution, randn, shape):
    x, w_gate, w_up = randn(*shape), randn(6, 4), randn(6, 4)
    expected = gated(x, w_gate, w_up, np.tanh)
    found = solution.gated_linear(x, w_gate, w_up, torch.tanh)
    assert_close(found, expected, **LOOSE, because="act(x w_gate^T) * (x w_up^T)")


@task("gated_linear")
def test_square_weights_are_transposed_too(solution, randn):
    x, w_gate, w_up = randn(5, 4), randn(4, 4), randn(4, 4)
    expected = gated(x, w_gate, w_up, np.sin)
    found = solution.gated_linear(x, w_gate, w_up, torch.sin)
    assert_close(found, expected, **LOOSE, because="weights are (F, D), also where F = D")


@task("gated_linear")
def test_an_act_that_is_not_zero_at_zero(solution, randn):
    x, w_gate, w_up = randn(3, 4), randn(2, 4), randn(2, 4)
    expected = gated(x, w_gate, w_up, np.cos)
    assert_close(solution.gated_linear(x, w_gate, w_up, torch.cos), expected, **LOOSE, because="act = cos")


@task("gated_linear")
def test_the_identity_gives_a_product_of_projections(solution, randn):
    x, w_gate, w_up = (randn(3, 4, dtype=torch.float64), *randn(2, 6, 4, dtype=torch.float64))
    expected = gated(x, w_gate, w_up, lambda z: z)
    assert_close(solution.gated_linear(x, w_gate, w_up, lambda z: z), expected, because="act is the identity")


@task("gated_linear")
def test_act_is_called_once_on_the_gate_projection(solution, randn):
    x, w_gate, w_up = randn(2, 3, 4), randn(6, 4), randn(6, 4)
    seen = []

    def act(z):
        seen.append(tuple(z.shape))
        return z.sin()

    solution.gated_linear(x, w_gate, w_up, act)
    assert_equal(seen, [(2, 3, 6)], because="the shapes that act was called with")


@task("gated_linear")
def test_the_gradients_of_the_gated_unit(solution, randn):
    inputs = [randn(3, 4, dtype=torch.float64), randn(6, 4, dtype=torch.float64), randn(6, 4, dtype=torch.float64)]
    assert_gradients_close(
        lambda x, g, u: solution.gated_linear(x, g, u, F.silu), lambda x, g, u: F.silu(x @ g.T) * (x @ u.T), inputs
    )


@task("gated_linear")
def test_the_gated_unit_in_bfloat16(solution, randn):
    x, w_gate, w_up = randn(3, 4), randn(6, 4), randn(6, 4)
    x, w_gate, w_up = x.bfloat16(), w_gate.bfloat16(), w_up.bfloat16()
    expected = gated(x, w_gate, w_up, np.tanh)
    found = solution.gated_linear(x, w_gate, w_up, torch.tanh)
    assert_close(found, expected, rtol=5e-2, atol=1e-1)


@task("gated_linear")
@pytest.mark.parametrize("up", [(1, 4), (6, 5), (4, 6), (6,)], ids=str)
def test_weights_that_do_not_match_are_refused(solution, randn, up):
    assert_raises(
        ValueError, solution.gated_linear, randn(3, 4), randn(6, 4), randn(*up), torch.tanh,
        mentions=["(6, 4)", str(up)], because=f"w_gate is (6, 4), w_up is {up}",
    )  # fmt: skip


@task("gated_linear")
@pytest.mark.parametrize("shape", [(3, 6), (4, 3), (1,), (2, 4, 5)], ids=str)
def test_an_x_of_another_width_is_refused(solution, randn, shape):
    assert_raises(
        ValueError, solution.gated_linear, randn(*shape), randn(6, 4), randn(6, 4), torch.tanh,
        mentions=[str(shape), "(6, 4)"], because=f"x is {shape}, the weights are (6, 4)",
    )  # fmt: skip


@task("gated_linear")
def test_two_matrix_products_are_enough(solution, randn):
    x, w_gate, w_up = randn(5, 16), randn(24, 16), randn(24, 16)
    assert_cost(solution.gated_linear, x, w_gate, w_up, torch.tanh, max_matmuls=2, max_flops=4 * 5 * 16 * 24)


@cost_case("gated_linear")
def gated_linear_cost(module, randn):
    x, w_gate, w_up = randn(32, 16), randn(24, 16), randn(24, 16)
    return lambda: module.gated_linear(x, w_gate, w_up, torch.tanh)


# dead_fraction


def dead_share(h, tol):
    rows, columns = h.shape
    values = h.tolist()
    dead = sum(all(values[n][d] <= tol for n in range(rows)) for d in range(columns))
    return dead / columns


@task("dead_fraction")
@pytest.mark.parametrize("tol", [0.0, 0.5, -0.5])
def test_the_share_of_dead_units(solution, randn, tol):
    h = randn(3, 40)
    expected = dead_share(h, tol)
    found = solution.dead_fraction(h, tol)
    assert_close(found, expected, rtol=1e-6, because=f"columns that are above {tol} in no row, of 40")


@task("dead_fraction")
def test_units_that_are_always_negative_are_dead(solution, randn):
    h = -randn(4, 5).abs() - 0.1
    h[2, 3] = 1.0
    assert_close(solution.dead_fraction(h), 0.8, rtol=1e-6, because="of 5 units, one is positive in one row")


@task("dead_fraction")
def test_the_default_tolerance_is_zero(solution, device):
    h = torch.tensor([[0.0, 1e-6, -1.0], [0.0, 0.0, 0.0]], device=device)
    assert_close(solution.dead_fraction(h), 2 / 3, rtol=1e-6, because="1e-6 is above 0, and 0 is not")


@task("dead_fraction")
def test_just_reaching_the_tolerance_is_not_enough(solution, device):
    h = torch.tensor([[0.5, 0.25, 0.75, 0.0]], device=device)
    assert_close(solution.dead_fraction(h, tol=0.5), 0.75, rtol=1e-6, because="only 0.75 is above 0.5")


@task("dead_fraction")
def test_rows_and_columns_are_not_confused(solution, device):
    h = torch.zeros(4, 2, device=device)
    h[0, 0] = 3.0
    assert_close(solution.dead_fraction(h), 0.5, rtol=1e-6, because="one of two columns fires, once in four rows")


@task("dead_fraction")
def test_without_rows_all_units_are_dead(solution, device):
    assert_close(solution.dead_fraction(torch.zeros(0, 3, device=device)), 1.0, because="h is (0, 3)")


@task("dead_fraction")
def test_the_share_is_a_python_float(solution, randn):
    kind = type(solution.dead_fraction(randn(3, 4).requires_grad_())).__name__
    assert_equal(kind, "float", because="the type of the result")


@task("dead_fraction")
@pytest.mark.parametrize("shape", [(3,), (2, 3, 4), ()], ids=str)
def test_anything_but_two_axes_is_refused(solution, randn, shape):
    because = f"h has shape {shape}, not (N, D)"
    assert_raises(ValueError, solution.dead_fraction, randn(*shape), mentions=[str(shape)], because=because)


@cost_case("dead_fraction")
def dead_fraction_cost(module, randn):
    h = randn(64, 64)
    return lambda: module.dead_fraction(h)


# lean_gelu


@task("lean_gelu")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lean_gelu_is_exact(solution, randn, dtype, shape):
    x = randn(*shape, dtype=dtype, scale=2.0)
    assert_close(solution.lean_gelu(x), exact_gelu(x), because="x * P(Z <= x)")


@task("lean_gelu")
def test_the_slope_of_lean_gelu(solution, randn):
    x = randn(3, 7, dtype=torch.float64, scale=2.0)
    assert_gradients_close(solution.lean_gelu, F.gelu, [x])


@task("lean_gelu")
def test_the_second_derivative_of_lean_gelu(solution, randn):
    x, w = randn(9, dtype=torch.float64), randn(9, dtype=torch.float64)
    density = np.exp(-(array(x) ** 2) / 2) / math.sqrt(2 * math.pi)
    expected = [like(array(w) * density * (2 - array(x) ** 2), x), slope_of(F.gelu, x)]
    found = curvature_of(solution.lean_gelu, x, w)
    assert_close(list(found), expected, because="backward through backward, at x and at the gradient that came in")


@task("lean_gelu")
def test_the_second_derivative_keeps_what_comes_in(solution, randn):
    x, w, v = (randn(9, dtype=torch.float64) for _ in range(3))

    def product(fn):
        leaf, weights = x.clone().requires_grad_(), w.clone().requires_grad_()
        (slope,) = torch.autograd.grad(fn(leaf), leaf, weights, create_graph=True)
        return list(torch.autograd.grad(slope, (leaf, weights), v))

    expected = product(F.gelu)
    assert_close(product(solution.lean_gelu), expected, because="the second backward pass has weights of its own")


@task("lean_gelu")
def test_lean_gelu_far_out(solution, device):
    x = column(FAR, device, torch.float32)
    found = [solution.lean_gelu(x), slope_of(solution.lean_gelu, x)]
    expected = [torch.tensor([0.0, 0, 0, 200, 1e3, 1e4]), torch.tensor([0.0, 0, 0, 1, 1, 1])]
    assert_close(found, expected, because=f"values and first derivatives at {FAR}")


@task("lean_gelu")
def test_the_second_derivative_far_out(solution, device):
    x = column(FAR, device, torch.float32)
    found = curvature_of(solution.lean_gelu, x, torch.ones_like(x))[0]
    assert_close(found, torch.zeros(6), because=f"second derivatives at {FAR}")


@task("lean_gelu")
def test_forward_keeps_no_more_than_its_input(solution, randn):
    x = randn(1000).requires_grad_()
    assert_cost(solution.lean_gelu, x, max_saved_bytes=4000, because="1000 floats go in: 4000 bytes may be kept")


@task("lean_gelu")
def test_a_recorded_backward_keeps_two_tensors(solution, randn):
    x, w = randn(1000).requires_grad_(), randn(1000).requires_grad_()

    def both():
        return torch.autograd.grad(solution.lean_gelu(x), x, w, create_graph=True)[0]

    because = "with create_graph=True: x and the gradient that came in, 4000 bytes each"
    assert_cost(both, max_saved_bytes=8000, because=because)


@cost_case("lean_gelu")
def lean_gelu_cost(module, randn):
    x, w = randn(64, 64).requires_grad_(), randn(64, 64).requires_grad_()
    return lambda: torch.autograd.grad(module.lean_gelu(x), x, w, create_graph=True)[0]
