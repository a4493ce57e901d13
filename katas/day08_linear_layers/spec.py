import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from checker.testing import (
    assert_close,
    assert_cost,
    assert_equal,
    assert_gradients_close,
    assert_raises,
    assert_that,
    cost_case,
    global_rng_untouched,
    noncontiguous,
    same_storage,
    task,
    unchanged,
)
from reference.day05_nn_module_basics import MLP, Residual

LEADS = [(), (5,), (2, 3), (2, 1, 4), (0,), (3, 0)]
SUMS = {torch.float32: {"rtol": 1e-4, "atol": 1e-5}, torch.float64: {"rtol": 1e-10, "atol": 1e-12}}


def array(x):
    """The values of a tensor as numpy has them, in float64."""
    return x.detach().cpu().double().numpy()


def like(values, x):
    """Values from numpy as a tensor of the dtype of x."""
    return torch.as_tensor(np.ascontiguousarray(values)).to(x.dtype)


def rounded(number):
    """Two digits: what is random in a statistic is left out, so that a known mistake looks the same at every draw."""
    return float(f"{number:.2g}")


def seeded(seed, device="cpu"):
    return torch.Generator(device=device).manual_seed(seed)


def mean_square(values):
    return float(np.mean(np.square(array(values))))


# linear


@task("linear")
@pytest.mark.parametrize("lead", LEADS, ids=str)
def test_every_row_is_multiplied(solution, randn, dtype, lead):
    x, w, b = randn(*lead, 4, dtype=dtype), randn(3, 4, dtype=dtype), randn(3, dtype=dtype)
    expected = like(array(x) @ array(w).T + array(b), x)
    assert_close(solution.linear(x, w, b), expected, because="y = x W^T + b for each row of x", **SUMS[dtype])


@task("linear")
@pytest.mark.parametrize("lead", LEADS, ids=str)
def test_there_need_not_be_a_bias(solution, randn, dtype, lead):
    x, w = randn(*lead, 4, dtype=dtype), randn(3, 4, dtype=dtype)
    expected = like(array(x) @ array(w).T, x)
    assert_close(solution.linear(x, w), expected, because="without b it is x W^T", **SUMS[dtype])


@task("linear")
def test_a_square_weight_shows_which_side_is_which(solution, randn):
    x, w = randn(2, 3, dtype=torch.float64), randn(3, 3, dtype=torch.float64)
    expected = like(array(x) @ array(w).T, x)
    assert_close(solution.linear(x, w), expected, because="row o of W makes output o")


@task("linear")
def test_as_many_rows_as_outputs(solution, randn):
    x, w, b = (randn(*shape, dtype=torch.float64) for shape in [(3, 3), (3, 3), (3,)])
    expected = like(array(x) @ array(w).T + array(b), x)
    assert_close(solution.linear(x, w, b), expected, because="b[o] belongs to output o, the last dimension")


@task("linear")
def test_half_precision_stays_half_precision(solution, randn):
    x, w, b = (randn(*shape).bfloat16() for shape in [(5, 4), (3, 4), (3,)])
    expected = like(array(x) @ array(w).T + array(b), x)
    assert_close(solution.linear(x, w, b), expected, rtol=2e-2, atol=1e-1, because="bfloat16 in, bfloat16 out")


@task("linear")
def test_a_noncontiguous_weight_and_input(solution, randn, dtype):
    x, w = noncontiguous(randn(2, 5, 4, dtype=dtype)), randn(4, 3, dtype=dtype).T
    expected = like(array(x) @ array(w).T, x)
    assert_close(solution.linear(x, w), expected, because="strides do not matter", **SUMS[dtype])


@task("linear")
def test_an_input_with_its_dimensions_exchanged(solution, randn):
    x, w = randn(5, 2, 4, dtype=torch.float64).transpose(0, 1), randn(3, 4, dtype=torch.float64)
    expected = like(array(x) @ array(w).T, x)
    assert_close(solution.linear(x, w), expected, because="strides do not matter")


@task("linear")
@pytest.mark.parametrize("n_out, n_in", [(3, 0), (0, 4)])
def test_widths_of_zero(solution, randn, n_out, n_in):
    x, w, b = randn(2, 5, n_in), randn(n_out, n_in), randn(n_out)
    expected = like(array(x) @ array(w).T + array(b), x)
    assert_close(solution.linear(x, w, b), expected, because="a sum over nothing is 0, and b is added to it")


@task("linear")
@pytest.mark.parametrize("lead", [(), (6,), (2, 1, 4)], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["without bias", "with bias"])
def test_it_is_one_matrix_product(solution, randn, lead, bias):
    x, w, b = randn(*lead, 4), randn(3, 4), randn(3) if bias else None
    flops = 2 * math.prod(lead) * 3 * 4
    assert_cost(solution.linear, x, w, b, matmuls=1, because="all rows go through one matrix product")
    assert_cost(solution.linear, x, w, b, flops=flops, because="2 N I O FLOPs")


@task("linear")
@pytest.mark.parametrize("lead", [(), (2, 3)], ids=str)
def test_gradients_reach_all_three(solution, randn, lead):
    inputs = [randn(*lead, 4, dtype=torch.float64), randn(5, 4, dtype=torch.float64), randn(5, dtype=torch.float64)]
    assert_gradients_close(solution.linear, F.linear, inputs)


@task("linear")
@pytest.mark.parametrize("x, w", [((2, 3), (3, 4)), ((2, 4), (4, 2)), ((3,), (5, 4)), ((2, 1), (3, 4))], ids=str)
def test_a_weight_that_does_not_fit(solution, randn, x, w):
    because = f"x {x} and w {w}: the last dimensions must be equal"
    assert_raises(ValueError, solution.linear, randn(*x), randn(*w), mentions=[str(x), str(w)], because=because)


@task("linear")
@pytest.mark.parametrize("b", [(4,), (1,), (2, 3), ()], ids=str)
def test_a_bias_that_does_not_fit(solution, randn, b):
    because = f"b {b} with w (3, 4): one number per output is needed, and broadcasting would hide it"
    args = randn(2, 4), randn(3, 4), randn(*b)
    assert_raises(ValueError, solution.linear, *args, mentions=[str(b), "(3, 4)"], because=because)


@cost_case("linear")
def linear_cost(module, randn):
    x, w, b = randn(8, 16, 64), randn(32, 64), randn(32)
    return lambda: module.linear(x, w, b)


# linear_backward


def gradients(dy, x, w):
    """By a sum over rows, one outer product each, in numpy."""
    n_out, n_in = w.shape
    dx, dw, db = np.zeros(x.shape), np.zeros((n_out, n_in)), np.zeros(n_out)
    x, dy, w = array(x), array(dy), array(w)
    for index in np.ndindex(*x.shape[:-1]):
        dx[index] = dy[index] @ w
        dw += np.outer(dy[index], x[index])
        db += dy[index]
    return dx, dw, db


PARTS = [0, 1, 2]
NAMES = ["dx", "dw", "db"]


@task("linear_backward")
@pytest.mark.parametrize("part", PARTS, ids=NAMES)
@pytest.mark.parametrize("lead", LEADS, ids=str)
def test_the_gradient_by_rows(solution, randn, dtype, lead, part):
    dy, x, w = randn(*lead, 3, dtype=dtype), randn(*lead, 4, dtype=dtype), randn(3, 4, dtype=dtype)
    expected = like(gradients(dy, x, w)[part], x)
    found = solution.linear_backward(dy, x, w)
    assert_equal(len(found), 3, because="dx, dw and db")
    assert_close(found[part], expected, because=f"{NAMES[part]}, summed over rows", **SUMS[dtype])


@task("linear_backward")
@pytest.mark.parametrize("part", PARTS, ids=NAMES)
def test_the_gradient_where_all_sizes_are_equal(solution, randn, part):
    dy, x, w = (randn(*shape, dtype=torch.float64) for shape in [(3, 3, 3), (3, 3, 3), (3, 3)])
    expected = like(gradients(dy, x, w)[part], x)
    found = solution.linear_backward(dy, x, w)
    assert_close(found[part], expected, because=f"{NAMES[part]}, where a transposed result has the same shape")


@task("linear_backward")
@pytest.mark.parametrize("part", PARTS, ids=NAMES)
def test_the_gradient_that_autograd_finds(solution, randn, part):
    x, w, b = (randn(*shape, dtype=torch.float64).requires_grad_() for shape in [(2, 3, 4), (5, 4), (5,)])
    dy = randn(2, 3, 5, dtype=torch.float64)
    expected = torch.autograd.grad(F.linear(x, w, b), [x, w, b], dy)
    found = solution.linear_backward(dy, x.detach(), w.detach())
    assert_close(found[part], expected[part], because=f"{NAMES[part]}, compared with autograd")


@task("linear_backward")
@pytest.mark.parametrize("part", PARTS, ids=NAMES)
def test_strides_do_not_matter(solution, randn, part):
    dy = randn(5, 2, 3, dtype=torch.float64).transpose(0, 1)
    x, w = noncontiguous(randn(2, 5, 4, dtype=torch.float64)), randn(4, 3, dtype=torch.float64).T
    expected = like(gradients(dy, x, w)[part], x)
    found = solution.linear_backward(dy, x, w)
    assert_close(found[part], expected, because=f"{NAMES[part]}, where dy comes with its dimensions exchanged")


@task("linear_backward")
@pytest.mark.parametrize("part", PARTS, ids=NAMES)
def test_an_input_of_width_zero(solution, randn, part):
    dy, x, w = randn(2, 3), randn(2, 0), randn(3, 0)
    expected = like(gradients(dy, x, w)[part], x)
    assert_close(solution.linear_backward(dy, x, w)[part], expected, because=NAMES[part])


@task("linear_backward")
def test_two_matrix_products_and_no_more(solution, randn):
    dy, x, w = randn(2, 5, 3), randn(2, 5, 4), randn(3, 4)
    assert_cost(
        solution.linear_backward, dy, x, w, flops=2 * 2 * 10 * 3 * 4, because="2 N I O FLOPs for dx, and for dw"
    )
    assert_cost(solution.linear_backward, dy, x, w, max_matmuls=2, because="one product each for dx and dw")


@task("linear_backward")
@pytest.mark.parametrize("dy, x", [((2, 3, 4), (2, 3, 4)), ((3, 2, 5), (2, 3, 4)), ((6, 5), (2, 3, 4)), ((5,), (2, 4)),
                                   ((1, 5), (2, 4)), ((2, 5), (4,))], ids=str)  # fmt: skip
def test_a_gradient_that_does_not_fit(solution, randn, dy, x):
    because = f"dy {dy} is not the shape of a result for x {x} and w (5, 4)"
    args = randn(*dy), randn(*x), randn(5, 4)
    assert_raises(ValueError, solution.linear_backward, *args, mentions=[str(dy), str(x)], because=because)


@task("linear_backward")
def test_an_input_that_does_not_fit(solution, randn):
    args = randn(2, 5), randn(2, 3), randn(5, 4)
    assert_raises(
        ValueError, solution.linear_backward, *args, mentions=["(2, 3)", "(5, 4)"], because="x (2, 3), w (5, 4)"
    )


@cost_case("linear_backward")
def linear_backward_cost(module, randn):
    dy, x, w = randn(8, 16, 32), randn(8, 16, 64), randn(32, 64)
    return lambda: module.linear_backward(dy, x, w)


# Linear


@task("Linear")
@pytest.mark.parametrize("bias", [True, False], ids=["with bias", "without bias"])
def test_it_holds_what_the_layer_of_torch_holds(solution, bias):
    theirs = nn.Linear(4, 3, bias=bias).state_dict()
    layer = solution.Linear(4, 3, bias=bias)
    shapes = {name: tuple(value.shape) for name, value in layer.state_dict().items()}
    assert_equal(shapes, {name: tuple(value.shape) for name, value in theirs.items()}, because="the state dict")
    assert_equal([name for name, _ in layer.named_parameters()], list(theirs), because="all of it is trained")


@task("Linear")
def test_there_is_a_bias_unless_you_say_no(solution):
    assert_that(solution.Linear(4, 3).bias is not None, "bias=True is the default")
    layer = solution.Linear(4, 3, False)
    assert_that(layer.bias is None, "bias=False, given by position, means that layer.bias is None", value=layer.bias)


@task("Linear")
@pytest.mark.parametrize("bias", [True, False], ids=["with bias", "without bias"])
@pytest.mark.parametrize("lead", [(), (2, 3), (0,)], ids=str)
def test_it_computes_what_the_layer_of_torch_computes(solution, randn, device, bias, lead):
    theirs = nn.Linear(4, 3, bias=bias).to(device)
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(randn(*p.shape))
    x = randn(*lead, 4)
    expected = theirs(x).detach()
    layer = solution.Linear(4, 3, bias=bias).to(device)
    layer.load_state_dict(theirs.state_dict())
    assert_close(layer(x).detach(), expected, because="the same state gives the same numbers", **SUMS[torch.float32])


@task("Linear")
def test_gradients_reach_weight_and_bias(solution, randn, device):
    theirs = nn.Linear(4, 3).to(device)
    x, weights = randn(5, 4), randn(5, 3)
    (theirs(x) * weights).sum().backward()
    layer = solution.Linear(4, 3).to(device)
    layer.load_state_dict(theirs.state_dict())
    (layer(x) * weights).sum().backward()
    found = [None if p is None else p.grad for p in (layer.weight, layer.bias)]
    assert_that(all(g is not None for g in found), "after backward weight.grad and bias.grad are there")
    assert_close(found[0], theirs.weight.grad, because="the gradient of the weight", **SUMS[torch.float32])
    assert_close(found[1], theirs.bias.grad, because="the gradient of the bias", **SUMS[torch.float32])


@task("Linear")
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_values_start_inside_the_bound(solution, seed, name):
    torch.manual_seed(seed)
    values = getattr(solution.Linear(100, 400), name).detach()
    largest = values.abs().max().item()
    assert_that(largest <= 0.1 * (1 + 1e-6), f"no {name} lies outside of 1 / sqrt(100) = 0.1", value=rounded(largest))


@task("Linear")
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_values_start_all_over_the_range(solution, seed, name):
    torch.manual_seed(seed)
    layer = solution.Linear(100, 2000)
    values = {"weight": layer.weight.detach(), "bias": layer.bias.detach()}
    spreads = {key: rounded(v.double().std().item() / (0.1 / math.sqrt(3))) for key, v in values.items()}
    ends = values[name].min().item(), values[name].max().item()
    assert_that(0.85 < spreads[name] < 1.15, f"the spread of {name} over that of U(-0.1, 0.1) is 1", value=spreads)
    near = ends[0] < -0.095 and ends[1] > 0.095
    assert_that(near, f"{name} comes near both ends of (-0.1, 0.1)", value=tuple(map(rounded, ends)))


@task("Linear")
def test_values_come_from_the_global_random_state(solution, seed):
    torch.manual_seed(seed)
    first, second = solution.Linear(4, 3), solution.Linear(4, 3)
    torch.manual_seed(seed)
    again = solution.Linear(4, 3)
    assert_equal(again.weight.detach(), first.weight.detach(), because="the same torch.manual_seed, the same weight")
    assert_equal(again.bias.detach(), first.bias.detach(), because="the same torch.manual_seed, the same bias")
    assert_that(
        not torch.equal(first.weight, second.weight),
        "two layers, one after the other, start differently",
        value=second.weight.detach(),
    )


@task("Linear")
def test_no_inputs_at_all(solution, randn, device):
    layer = solution.Linear(0, 3).to(device)
    assert_close(layer.weight.detach(), torch.zeros(3, 0), because="a weight without elements")
    assert_close(layer.bias.detach(), torch.zeros(3), because="the bias of a layer without inputs is zeros")
    assert_close(layer(randn(2, 0)).detach(), torch.zeros(2, 3), because="and so is its output")


@task("Linear")
def test_the_dtype_that_was_asked_for(solution):
    layer = solution.Linear(4, 3, dtype=torch.float64)
    assert_equal((layer.weight.dtype, layer.bias.dtype), (torch.float64, torch.float64), because="dtype=torch.float64")
    layer = solution.Linear(4, 3)
    assert_equal((layer.weight.dtype, layer.bias.dtype), (torch.float32, torch.float32), because="without a dtype")


@task("Linear")
def test_the_device_that_was_asked_for(solution):
    layer = solution.Linear(4, 3, device="meta")
    assert_equal((layer.weight.device.type, layer.bias.device.type), ("meta", "meta"), because='device="meta"')


@task("Linear")
def test_it_knows_its_widths(solution):
    layer = solution.Linear(4, 3)
    assert_equal((layer.in_features, layer.out_features), (4, 3), because="in_features, out_features")


@task("Linear")
def test_what_comes_in_stays_as_it_is(solution, randn, device):
    layer, x = solution.Linear(4, 3).to(device), randn(2, 4)
    with unchanged(x, layer.weight, layer.bias):
        assert_cost(layer, x, matmuls=1, because="one matrix product")


@task("Linear")
def test_an_input_that_does_not_fit_the_layer(solution, randn, device):
    layer = solution.Linear(4, 3).to(device)
    assert_raises(ValueError, layer, randn(2, 3), mentions=["(2, 3)", "(3, 4)"], because="x (2, 3), weight (3, 4)")


# fan_in_fan_out


@task("fan_in_fan_out")
@pytest.mark.parametrize("kernel", [(), (3,), (3, 5), (2, 3, 4), (1, 1)], ids=str)
def test_the_fans_of_a_shape(solution, kernel):
    shape = (7, 4, *kernel)
    expected = nn.init._calculate_fan_in_and_fan_out(torch.empty(shape))
    assert_equal(solution.fan_in_fan_out(shape), expected, because=f"(fan_in, fan_out) of {shape}")


@task("fan_in_fan_out")
def test_the_fans_of_random_shapes(solution, randint):
    shape = tuple(randint(2, 9, (4,)).tolist())
    kernel = shape[2] * shape[3]
    expected = (shape[1] * kernel, shape[0] * kernel)
    assert_equal(solution.fan_in_fan_out(torch.Size(shape)), expected, because=f"(fan_in, fan_out) of {shape}")
    assert_equal(solution.fan_in_fan_out(list(shape)), expected, because=f"(fan_in, fan_out) of {list(shape)}")


@task("fan_in_fan_out")
def test_how_many_inputs_reach_one_output(solution):
    # a convolution of ones over ones: each output away from the border counts what it sees
    w = torch.ones(5, 3, 2, 4)
    seen = F.conv2d(torch.ones(1, 3, 9, 9), w)[0, 0, 2, 2].item()
    fan_in = solution.fan_in_fan_out(w.shape)[0]
    assert_equal(fan_in, int(seen), because="fan_in of (5, 3, 2, 4), counted by a convolution of ones over ones")


@task("fan_in_fan_out")
@pytest.mark.parametrize("shape", [(), (4,)], ids=str)
def test_a_shape_without_two_dimensions(solution, shape):
    assert_raises(ValueError, solution.fan_in_fan_out, shape, mentions=[str(shape)], because=f"{shape} has no two fans")


# scaled_init


def spread(w):
    """The root of the mean square: the standard deviation around zero."""
    return math.sqrt(mean_square(w))


def check_spread(w, std, because):
    found = spread(w) / std
    assert_that(
        0.94 < found < 1.06, f"{because}: the spread over the one that was asked for is 1", value=rounded(found)
    )


def check_centered(w, std, because):
    found = array(w).mean() / std * math.sqrt(w.numel())
    assert_that(abs(found) < 7, f"{because}: the mean, in units of its own standard deviation, is near 0", value=found)


SHAPES = [(100, 400), (400, 100), (50, 40, 4, 5)]
WORDS = [("relu", 2.0**0.5), ("linear", 1.0), ("tanh", 5 / 3)]


@task("scaled_init")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_xavier_has_the_variance_of_both_fans(solution, device, seed, shape):
    w = torch.ones(shape, device=device)
    std = math.sqrt(2 / sum(nn.init._calculate_fan_in_and_fan_out(w)))
    solution.xavier_uniform_(w, generator=seeded(seed, device))
    check_spread(w, std, f"xavier for {shape}")
    check_centered(w, std, f"xavier for {shape}")


@task("scaled_init")
def test_xavier_takes_a_gain(solution, device, seed):
    w = torch.ones(100, 400, device=device)
    solution.xavier_uniform_(w, 5.0, generator=seeded(seed, device))
    check_spread(w, 5 * math.sqrt(2 / 500), "xavier with gain 5")


@task("scaled_init")
def test_xavier_is_flat(solution, device, seed):
    w = torch.ones(200, 400, device=device)
    solution.xavier_uniform_(w, generator=seeded(seed, device))
    bound = math.sqrt(6 / 600)
    largest = np.abs(array(w)).max() / bound
    assert_that(0.99 < largest < 1.0001, "the largest value is at the bound of the uniform distribution", value=largest)
    inner = float((np.abs(array(w)) < bound / 2).mean())
    assert_that(0.48 < inner < 0.52, "half of the values lie in the inner half of the range", value=inner)


@task("scaled_init")
@pytest.mark.parametrize("word, gain", WORDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kaiming_has_the_variance_of_fan_in(solution, device, seed, shape, word, gain):
    w = torch.ones(shape, device=device)
    std = gain / math.sqrt(nn.init._calculate_fan_in_and_fan_out(w)[0])
    solution.kaiming_normal_(w, word, generator=seeded(seed, device))
    check_spread(w, std, f"kaiming for {shape}, {word}")
    check_centered(w, std, f"kaiming for {shape}, {word}")


@task("scaled_init")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kaiming_can_take_fan_out(solution, device, seed, shape):
    found, generator = {}, seeded(seed, device)
    for mode, fan in zip(("fan_in", "fan_out"), nn.init._calculate_fan_in_and_fan_out(torch.ones(shape)), strict=True):
        w = torch.ones(shape, device=device)
        solution.kaiming_normal_(w, mode=mode, generator=generator)
        found[mode] = rounded(spread(w) / math.sqrt(2 / fan))
    because = f"kaiming for {shape}: the spread over sqrt(2 / fan) is 1 for both modes"
    assert_that(all(0.94 < ratio < 1.06 for ratio in found.values()), because, value=found)


@task("scaled_init")
def test_kaiming_means_relu_and_fan_in_unless_you_say_otherwise(solution, device, seed):
    w = torch.ones(100, 400, device=device)
    solution.kaiming_normal_(w, generator=seeded(seed, device))
    check_spread(w, math.sqrt(2 / 400), "kaiming without further words")


@task("scaled_init")
def test_kaiming_is_a_bell(solution, device, seed):
    w = torch.ones(200, 400, device=device)
    solution.kaiming_normal_(w, "linear", generator=seeded(seed, device))
    values = np.abs(array(w)) * math.sqrt(400)
    within = float((values < 1).mean())
    assert_that(0.66 < within < 0.705, "68.3 % of a normal lie within one standard deviation", value=within)
    assert_that(values.max() > 3.2, "a normal of 80,000 values has tails beyond 3.2", value=float(values.max()))


INITS = {
    "xavier": lambda solution: solution.xavier_uniform_,
    "kaiming": lambda solution: solution.kaiming_normal_,
}
BOTH = pytest.mark.parametrize("which", list(INITS))


def check_manners(init_, device, seed):
    """A generator decides, and nothing else."""
    with global_rng_untouched():
        w = torch.ones(6, 5, device=device)
        result = init_(w, generator=seeded(seed, device))
        again = torch.ones(6, 5, device=device)
        init_(again, generator=seeded(seed, device))
        other = torch.ones(6, 5, device=device)
        init_(other, generator=seeded(seed + 1, device))
    assert_that(result is w, "what is returned is the tensor that came in", value=result)
    assert_equal(again, w.clone(), because="the same seed, the same weights, whatever was there before")
    assert_that(not torch.equal(other, w), "another seed, other weights", value=other)


def check_no_graph(init_, device, seed):
    w = torch.zeros(6, 5, device=device).requires_grad_()
    try:
        init_(w, generator=seeded(seed, device))
    except NotImplementedError:
        raise
    except RuntimeError as error:
        assert_that(False, "a weight that asks for gradients can be filled", value=str(error)[:40])
    assert_equal((w.is_leaf, w.requires_grad, torch.is_grad_enabled()), (True, True, True),
                 because="w is still a leaf, still asks for gradients, and recording is on")  # fmt: skip


def check_seen_by_autograd(init_, device, seed):
    w = torch.ones(6, 5, device=device).requires_grad_()
    loss = (w * w).sum()  # backward needs w
    init_(w, generator=seeded(seed, device))
    try:
        loss.backward()
        silent = True
    except RuntimeError:
        silent = False
    assert_that(
        not silent, "backward needed the weights from before, and gave wrong numbers instead of an error", value=w.grad
    )


def check_dtype_and_strides(init_, device, seed, std):
    w = torch.zeros(400, 100, device=device, dtype=torch.float64).T
    init_(w, generator=seeded(seed, device))
    check_spread(w, std, "a transposed float64 weight (100, 400)")


@task("scaled_init")
@BOTH
def test_the_generator_alone_decides(solution, device, seed, which):
    check_manners(INITS[which](solution), device, seed)


@task("scaled_init")
@BOTH
def test_weights_that_ask_for_gradients(solution, device, seed, which):
    check_no_graph(INITS[which](solution), device, seed)


@task("scaled_init")
@BOTH
def test_autograd_knows_of_the_write(solution, device, seed, which):
    check_seen_by_autograd(INITS[which](solution), device, seed)


@task("scaled_init")
@BOTH
def test_a_transposed_weight_is_filled_in_place(solution, device, seed, which):
    std = math.sqrt(2 / 500) if which == "xavier" else math.sqrt(2 / 400)
    check_dtype_and_strides(INITS[which](solution), device, seed, std)


@task("scaled_init")
@BOTH
def test_without_a_generator_the_global_state_is_used(solution, seed, which):
    init_ = INITS[which](solution)
    torch.manual_seed(seed)
    first = init_(torch.ones(4, 3)).clone()
    second = init_(torch.ones(4, 3)).clone()
    torch.manual_seed(seed)
    assert_equal(init_(torch.ones(4, 3)), first, because="the same torch.manual_seed, the same weights")
    assert_that(not torch.equal(first, second), "two calls give different weights", value=second)


@task("scaled_init")
@pytest.mark.parametrize("options, word", [({"nonlinearity": "swish"}, "swish"), ({"mode": "fan_avg"}, "fan_avg")])
def test_kaiming_refuses_unknown_words(solution, device, options, word):
    w = torch.ones(4, 3, device=device)
    assert_raises(ValueError, solution.kaiming_normal_, w, mentions=[word], because=f"{options} is unknown", **options)
    assert_equal(w, torch.ones(4, 3), because="w stays as it was")


# forward_variance


def doubled(w, generator=None):
    """Twice the identity: no chance is involved."""
    with torch.no_grad():
        w.zero_()
        w.fill_diagonal_(2.0)


def zeros(w, generator=None):
    nn.init.zeros_(w)


def kept(z):
    return z


@task("forward_variance")
def test_a_layer_that_doubles_has_four_times_the_mean_square(solution, seed):
    found = solution.forward_variance(5, 64, doubled, kept, seed=seed)
    assert_close(found / found[0], torch.tensor([1.0, 4.0, 16.0, 64.0, 256.0]), because="entries over the first entry")


@task("forward_variance")
def test_the_first_entry_is_that_of_the_first_layer(solution, seed):
    found = solution.forward_variance(2, 64, doubled, kept, seed=seed)[0].item()
    assert_that(3.6 < found < 4.4, "N(0, 1) doubled has the mean square 4", value=found)


@task("forward_variance")
def test_act_is_part_of_the_layer(solution, seed):
    offset = torch.tensor([1.0, 5.0] * 8)
    found = solution.forward_variance(3, 16, zeros, lambda z: z + offset, seed=seed)
    because = "weights of zeros, then act adds 1 or 5: the mean square of what leaves each layer is (1 + 25) / 2"
    assert_close(found, torch.full((3,), 13.0), because=because)


@task("forward_variance")
def test_zeros_stay_zero(solution, seed):
    found = solution.forward_variance(4, 16, zeros, torch.relu, seed=seed)
    assert_close(found, torch.zeros(4), because="weights of zeros let nothing through")


@task("forward_variance")
def test_the_second_moment_is_not_the_variance(solution, seed):
    found = solution.forward_variance(2, 64, doubled, torch.abs, seed=seed)
    assert_that(
        14 < found[1].item() < 18, "abs keeps the squares: after two layers the mean square is 16", value=found[1]
    )


@task("forward_variance")
def test_relu_halves_where_the_gain_is_missing(solution, seed):
    init_ = partial(nn.init.kaiming_normal_, nonlinearity="linear")
    found = solution.forward_variance(12, 256, init_, torch.relu, seed=seed)
    last = found[-1].item() * 2**12
    assert_that(0.02 < last < 50, "N(0, 1/I) and relu: 2^-12 after 12 layers; the last entry over 2^-12", value=last)


@task("forward_variance")
def test_the_right_gain_keeps_thirty_layers_alive(solution, seed):
    init_ = partial(nn.init.kaiming_normal_, nonlinearity="relu")
    found = solution.forward_variance(30, 256, init_, torch.relu, seed=seed)
    because = "with gain sqrt(2) the signal neither dies nor explodes in 30 layers"
    assert_that(bool((found > 1e-4).all()) and bool((found < 1e4).all()), because, value=found)


@task("forward_variance")
def test_what_init_and_act_get(solution, seed):
    weights, generators, shapes = [], [], []

    def init_(w, generator=None):
        nn.init.normal_(w, generator=generator)
        weights.append(w.clone())
        generators.append(generator)

    def act(z):
        shapes.append(tuple(z.shape))
        return z

    solution.forward_variance(3, 8, init_, act, seed=seed)
    assert_equal([tuple(w.shape) for w in weights], [(8, 8)] * 3, because="one weight (width, width) per layer")
    assert_equal(shapes, [(256, 8)] * 3, because="256 rows leave each layer")
    assert_that(all(g is not None for g in generators), "init_ is called with generator=", value=generators)
    different = not torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])
    assert_that(different, "each layer has weights of its own", value=weights[1])


@task("forward_variance")
def test_rows_of_the_weight_are_outputs(solution, seed):
    def first_row(w, generator=None):  # output 0 is the sum of all inputs, all else is 0
        with torch.no_grad():
            w.zero_()
            w[0] = 1.0

    sums = []
    found = solution.forward_variance(2, 8, first_row, lambda z: sums.append(z.clone()) or z, seed=seed)
    others = sums[0][:, 1:].abs().max().item()
    assert_equal(others, 0.0, because="x W^T: a weight with only its first row filled reaches only output 0")
    assert_close(found[1], found[0], because="and a second such layer changes nothing")


@task("forward_variance")
def test_the_inputs_are_as_wide_as_the_layers_and_not_the_weights(solution, seed):
    found = []

    def init_(w, generator=None):
        nn.init.normal_(w, generator=generator)
        found.append(w.clone())

    outputs = []
    solution.forward_variance(1, 256, init_, lambda z: outputs.append(z.clone()) or z, seed=seed)
    # with independent inputs x w^T has entries of spread 16; with x == w its diagonal would be 256
    diagonal = outputs[0].diagonal().double().mean().item()
    assert_that(abs(diagonal) < 20, "inputs and weights are independent draws", value=diagonal)


@task("forward_variance")
def test_the_seed_decides_everything(solution, seed):
    with global_rng_untouched():
        first = solution.forward_variance(3, 16, nn.init.xavier_normal_, torch.tanh, seed=seed)
        again = solution.forward_variance(3, 16, nn.init.xavier_normal_, torch.tanh, seed=seed)
        other = solution.forward_variance(3, 16, nn.init.xavier_normal_, torch.tanh, seed=seed + 1)
        fixed = [solution.forward_variance(1, 16, doubled, kept, seed=seed + i) for i in range(2)]
    assert_equal(again, first.clone(), because="the same seed, the same result")
    assert_that(not torch.equal(other, first), "another seed, another result", value=other)
    assert_that(not torch.equal(*fixed), "another seed, other inputs", value=fixed[1])


@task("forward_variance")
def test_no_graph_is_recorded(solution, seed):
    slope = torch.tensor(0.5, requires_grad=True)
    found = solution.forward_variance(2, 8, doubled, lambda z: z * slope, seed=seed)
    assert_that(
        not found.requires_grad, "act uses a parameter, and the result carries a graph", value=found.requires_grad
    )


@task("forward_variance")
def test_no_layers_give_no_entries(solution, seed):
    assert_close(solution.forward_variance(0, 8, doubled, kept, seed=seed), torch.zeros(0), because="depth 0")


# trunc_normal_


def truncated_std(bound):
    """The standard deviation of N(0, 1) given that it lies within `bound`, by adding up a fine grid."""
    z = (np.arange(200_000) + 0.5) / 200_000 * bound
    density = np.exp(-(z**2) / 2)
    return math.sqrt((z**2 * density).sum() / density.sum())


CUTS = [(0.02, 2.0), (3.0, 2.0), (0.5, 1.0), (2.0, 0.3), (1.0, 3.0)]


@task("trunc_normal_")
@pytest.mark.parametrize("std, bound", CUTS)
def test_nothing_lies_beyond_the_bound(solution, device, seed, std, bound):
    w = torch.ones(200, 100, device=device)
    solution.trunc_normal_(w, std, bound, generator=seeded(seed, device))
    largest = np.abs(array(w)).max() / (std * bound)
    assert_that(largest <= 1 + 1e-6, "the largest value over bound * std", value=largest)
    assert_that(largest > 0.97 if bound < 3 else largest > 0.8, "values come near the bound", value=largest)


@task("trunc_normal_")
@pytest.mark.parametrize("std, bound", CUTS)
def test_the_spread_is_that_of_a_truncated_normal(solution, device, seed, std, bound):
    w = torch.ones(200, 200, device=device)
    solution.trunc_normal_(w, std, bound, generator=seeded(seed, device))
    expected = std * truncated_std(bound)
    found = spread(w) / expected
    assert_that(0.97 < found < 1.03, f"std {std}, bound {bound}: the spread over that of the distribution", value=found)
    check_centered(w, expected, f"std {std}, bound {bound}")


@task("trunc_normal_")
def test_the_cut_is_at_two_unless_you_say_otherwise(solution, device, seed):
    w = torch.ones(200, 200, device=device)
    solution.trunc_normal_(w, 1.0, generator=seeded(seed, device))
    largest = np.abs(array(w)).max()
    assert_that(1.97 < largest <= 2 + 1e-6, "the largest of 40,000 values", value=largest)


@task("trunc_normal_")
def test_nothing_piles_up_at_the_edges(solution, device, seed):
    w = torch.ones(200, 200, device=device)
    solution.trunc_normal_(w, 1.0, 1.0, generator=seeded(seed, device))
    share = float((np.abs(array(w)) > 0.999).mean())
    assert_that(share < 0.003, "the share of values at the very edge", value=share)


@task("trunc_normal_")
def test_inside_it_is_a_bell(solution, device, seed):
    w = torch.ones(200, 200, device=device)
    solution.trunc_normal_(w, 1.0, 2.0, generator=seeded(seed, device))
    within = float((np.abs(array(w)) < 1).mean())
    expected = math.erf(1 / math.sqrt(2)) / math.erf(2 / math.sqrt(2))
    assert_that(abs(within - expected) < 0.018, f"the share within one std, which is {expected:.3f}", value=within)


@task("trunc_normal_")
def test_a_wide_bound_gives_no_infinity(solution, device, seed):
    class AtTheEdge(torch.utils._python_dispatch.TorchDispatchMode):
        """Uniform numbers may be the lower end of their range; here the first one is."""

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.uniform_.default and len(args) > 1:
                args[0][0, 0] = args[1]
            return out

    w = torch.ones(20, 10, device=device)
    with AtTheEdge():
        solution.trunc_normal_(w, 0.5, 8.0, generator=seeded(seed, device))
    largest = np.abs(array(w)).max()
    assert_that(largest <= 4, "bound * std is 4, also for the smallest uniform number", value=f"{largest:.3g}")


@task("trunc_normal_")
@pytest.mark.parametrize("shape", [(), (7,), (0, 3)], ids=str)
def test_any_shape_and_float64(solution, device, seed, shape):
    w = torch.full(shape, 9.0, device=device, dtype=torch.float64)
    result = solution.trunc_normal_(w, 1.0, generator=seeded(seed, device))
    assert_that(result is w, "what is returned is the tensor that came in", value=result)
    assert_that(bool((w.abs() <= 2).all()), "all values lie within 2", value=w.clone())


@task("trunc_normal_")
def test_a_generator_decides_what_is_drawn(solution, device, seed):
    check_manners(partial(solution.trunc_normal_, std=0.5), device, seed)


@task("trunc_normal_")
def test_a_leaf_that_asks_for_gradients_stays_one(solution, device, seed):
    check_no_graph(partial(solution.trunc_normal_, std=0.5), device, seed)


@task("trunc_normal_")
def test_autograd_knows_that_the_values_changed(solution, device, seed):
    check_seen_by_autograd(partial(solution.trunc_normal_, std=0.5), device, seed)


@task("trunc_normal_")
def test_a_transposed_tensor_is_filled_in_place(solution, device, seed):
    check_dtype_and_strides(partial(solution.trunc_normal_, std=0.5), device, seed, 0.5 * truncated_std(2.0))


# low_rank


def layer_of(randn, n_in, n_out, bias=True, dtype=None):
    layer = nn.Linear(n_in, n_out, bias=bias, dtype=dtype).to(randn(1).device)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(randn(*p.shape))
    return layer


@task("low_rank")
@pytest.mark.parametrize("bias", [True, False], ids=["with bias", "without bias"])
def test_what_a_low_rank_layer_holds(solution, bias):
    layer = solution.LowRankLinear(6, 5, 2, bias=bias)
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    expected = {"down.weight": (2, 6), "up.weight": (5, 2)} | ({"up.bias": (5,)} if bias else {})
    assert_equal(dict(sorted(shapes.items())), dict(sorted(expected.items())), because="the parameters")
    assert_equal(layer.rank, 2, because="layer.rank")


@task("low_rank")
def test_a_low_rank_layer_has_a_bias_unless_you_say_no(solution):
    assert_that(solution.LowRankLinear(6, 5, 2).up.bias is not None, "bias=True is the default")


@task("low_rank")
@pytest.mark.parametrize("lead", [(), (7,), (2, 3)], ids=str)
def test_the_two_factors_one_after_the_other(solution, randn, device, lead):
    layer = solution.LowRankLinear(6, 5, 2, dtype=torch.float64, device=device)
    x = randn(*lead, 6, dtype=torch.float64)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(randn(*p.shape, dtype=torch.float64))
    down, up, bias = array(layer.down.weight), array(layer.up.weight), array(layer.up.bias)
    expected = like(array(x) @ (up @ down).T + bias, x)
    with unchanged(x):
        found = layer(x)
    assert_close(found.detach(), expected, because="x (up down)^T + bias")


@task("low_rank")
def test_the_thick_matrix_is_never_formed(solution, randn, device):
    layer, x = solution.LowRankLinear(40, 30, 2).to(device), randn(5, 40)
    flops = 2 * 5 * 2 * (40 + 30)
    assert_cost(layer, x, flops=flops, because="2 N r (I + O) FLOPs, here 1,400")


@task("low_rank")
def test_both_factors_start_like_any_layer(solution):
    layer = solution.LowRankLinear(100, 400, 25)
    found = {name: p.detach().abs().max().item() for name, p in layer.named_parameters()}
    wanted = {"down.weight": 0.1, "up.weight": 0.2, "up.bias": 0.2}
    for name, bound in wanted.items():
        share = found[name] / bound
        assert_that(0.9 < share < 1.00001, f"the largest of {name} over 1 / sqrt of its own fan_in", value=share)


@task("low_rank")
def test_dtype_and_device_of_the_factors(solution):
    layer = solution.LowRankLinear(6, 5, 2, device="meta", dtype=torch.float64)
    kinds = {(p.device.type, p.dtype) for p in layer.parameters()}
    assert_equal(kinds, {("meta", torch.float64)}, because='device="meta", dtype=torch.float64, for all parameters')


@task("low_rank")
@pytest.mark.parametrize("rank", [0, -3])
def test_a_rank_below_one_is_refused(solution, randn, device, rank):
    linear = layer_of(randn, 6, 5)
    assert_raises(ValueError, solution.LowRankLinear, 6, 5, rank, mentions=[str(rank)], because=f"rank {rank}")
    assert_raises(ValueError, solution.low_rank_from, linear, rank, because=f"low_rank_from with rank {rank}")


@task("low_rank")
def test_a_rank_of_one_is_fine(solution):
    assert_equal(tuple(solution.LowRankLinear(6, 5, 1).down.weight.shape), (1, 6), because="rank 1")


def product(layer):
    return array(layer.up.weight) @ array(layer.down.weight)


@task("low_rank")
@pytest.mark.parametrize("n_in, n_out", [(6, 9), (9, 6), (7, 7)])
@pytest.mark.parametrize("rank", [1, 3])
def test_what_is_lost_are_the_smallest_singular_values(solution, randn, n_in, n_out, rank):
    linear = layer_of(randn, n_in, n_out, dtype=torch.float64)
    weight = array(linear.weight)
    tail = np.sqrt((np.linalg.svd(weight, compute_uv=False)[rank:] ** 2).sum())
    low = solution.low_rank_from(linear, rank)
    lost = float(np.sqrt(((product(low) - weight) ** 2).sum()))
    assert_close(lost, float(tail), rtol=1e-8, atol=1e-9, because="the error is the root of the squared tail summed")
    assert_equal(low.rank, rank, because="the rank that was asked for")


@task("low_rank")
@pytest.mark.parametrize("n_in, n_out", [(4, 6), (6, 4), (5, 5)])
@pytest.mark.parametrize("rank", [4, 6, 50])
def test_a_full_rank_loses_nothing(solution, randn, n_in, n_out, rank):
    full = min(n_in, n_out)
    rank = max(rank, full)
    linear, x = layer_of(randn, n_in, n_out, dtype=torch.float64), randn(3, n_in, dtype=torch.float64)
    expected = like(array(x) @ array(linear.weight).T + array(linear.bias), x)
    low = solution.low_rank_from(linear, rank)
    assert_equal(low.rank, full, because=f"rank {rank} for a weight {(n_out, n_in)} is taken as {full}")
    assert_equal(tuple(low.down.weight.shape), (full, n_in), because="the shape of down.weight")
    assert_close(low(x).detach(), expected, rtol=1e-8, atol=1e-9, because="nothing is lost")


@task("low_rank")
@pytest.mark.parametrize("bias", [True, False], ids=["with bias", "without bias"])
def test_the_bias_is_kept(solution, randn, bias):
    linear = layer_of(randn, 6, 5, bias=bias)
    low = solution.low_rank_from(linear, 2)
    if bias:
        assert_that(low.up.bias is not None, "the layer has a bias, and the result has none")
        assert_equal(low.up.bias.detach(), linear.bias.detach(), because="the bias of the layer")
    else:
        assert_that(low.up.bias is None, "a layer without a bias gives one without", value=low.up.bias)


@task("low_rank")
def test_the_result_is_trainable_and_on_its_own(solution, randn, dtype):
    linear = layer_of(randn, 6, 5, dtype=dtype)
    with unchanged(linear.weight, linear.bias):
        low = solution.low_rank_from(linear, 3)
    for name, p in low.named_parameters():
        assert_that(
            p.is_leaf and p.requires_grad, f"{name} is a leaf that is trained", value=(p.is_leaf, p.requires_grad)
        )
        assert_equal(p.dtype, dtype, because=f"the dtype of {name}")
        shared = same_storage(p, linear.weight) or same_storage(p, linear.bias)
        assert_that(not shared, f"{name} has memory of its own", value=shared)


@task("low_rank")
def test_the_device_is_kept(solution):
    low = solution.low_rank_from(nn.Linear(4, 3, device="meta"), 2)
    assert_equal({p.device.type for p in low.parameters()}, {"meta"}, because="a layer on the device meta")


@cost_case("low_rank")
def low_rank_cost(module, randn):
    layer, x = module.LowRankLinear(256, 256, 8).to(randn(1).device), randn(32, 256)
    return lambda: layer(x)


# init_residual_


def tower(randn, depth, hidden=(24,), width=64):
    """Residual blocks whose parameters hold anything."""
    device = randn(1).device
    blocks = [Residual(MLP([width, *hidden, width]), scale=3.0).to(device) for _ in range(depth)]
    for block in blocks:
        for layer in block.inner.layers:
            nn.init.constant_(layer.weight, 0.7)
            nn.init.constant_(layer.bias, 0.3)
    return blocks


def through(blocks, x):
    for block in blocks:
        x = block(x)
    return x


def growth_and_share(blocks, x):
    """Mean squares of the output, and of what was added, over that of the input."""
    with torch.no_grad():
        out = through(blocks, x)
        return mean_square(out) / mean_square(x), mean_square(out - x) / mean_square(x)


@task("init_residual_")
@pytest.mark.parametrize("depth", [10, 100])
@pytest.mark.parametrize("hidden", [(24,), (96,), (24, 64)], ids=str)
def test_the_signal_keeps_its_size(solution, randn, device, seed, depth, hidden):
    blocks, x = tower(randn, depth, hidden), randn(256, 64)
    solution.init_residual_(blocks, depth, generator=seeded(seed, device))
    growth, _ = growth_and_share(blocks, x)
    assert_that(0.9 < growth < 1.1, f"{depth} blocks: mean square of the output over that of the input", value=growth)


@task("init_residual_")
@pytest.mark.parametrize("depth", [10, 100])
@pytest.mark.parametrize("hidden", [(24,), (24, 64)], ids=str)
def test_the_blocks_do_something(solution, randn, device, seed, depth, hidden):
    blocks, x = tower(randn, depth, hidden), randn(256, 64)
    solution.init_residual_(blocks, depth, generator=seeded(seed, device))
    _, share = growth_and_share(blocks, x)
    assert_that(share >= 0.01, f"{depth} blocks: mean square of what was added over that of the input", value=share)


@task("init_residual_")
def test_first_and_last_block_learn_alike(solution, randn, device, seed):
    blocks, x, weights = tower(randn, 100), randn(256, 64), randn(256, 64)
    solution.init_residual_(blocks, 100, generator=seeded(seed, device))
    (through(blocks, x) * weights).mean().backward()
    for number in range(2):
        first, last = (array(block.inner.layers[number].weight.grad) for block in (blocks[0], blocks[-1]))
        norms = float(np.linalg.norm(first)), float(np.linalg.norm(last))
        assert_that(min(norms) > 0, f"the gradient of layers.{number}.weight is not zeros", value=norms)
        ratio = norms[0] / norms[1]
        assert_that(0.5 < ratio < 2, f"layers.{number}.weight: norm in the first block over the last", value=ratio)


@task("init_residual_")
def test_depth_is_that_of_the_whole_network(solution, randn, device, seed):
    blocks, x = tower(randn, 60), randn(256, 64)
    generator = seeded(seed, device)
    for block in blocks:
        solution.init_residual_([block], 60, generator=generator)
    growth, share = growth_and_share(blocks, x)
    assert_that(0.9 < growth < 1.1, "60 blocks of a network of 60, one at a time: growth", value=growth)
    assert_that(share >= 0.01, "60 blocks of a network of 60, one at a time: share", value=share)


@task("init_residual_")
def test_the_start_does_not_depend_on_what_was_there(solution, randn, device, seed):
    x = randn(8, 64)
    one, two = tower(randn, 3, (24, 16)), [Residual(MLP([64, 24, 16, 64])).to(device) for _ in range(3)]
    with global_rng_untouched():
        solution.init_residual_(one, 3, generator=seeded(seed, device))
        solution.init_residual_(iter(two), 3, generator=seeded(seed, device))
    with torch.no_grad():
        expected, found = through(two, x), through(one, x)
    assert_close(found, expected, because="the same seed: one network held constants, the other had just been made")


@task("init_residual_")
def test_biases_start_at_zero(solution, randn, device, seed):
    blocks = tower(randn, 2, (24, 16))
    solution.init_residual_(blocks, 2, generator=seeded(seed, device))
    biases = torch.cat([layer.bias.detach() for block in blocks for layer in block.inner.layers])
    assert_close(biases, torch.zeros_like(biases), because="all biases, one after the other")


@task("init_residual_")
def test_blocks_differ_and_seeds_count(solution, randn, device, seed):
    blocks, other = tower(randn, 2), tower(randn, 2)
    solution.init_residual_(blocks, 2, generator=seeded(seed, device))
    solution.init_residual_(other, 2, generator=seeded(seed + 1, device))
    for number in range(2):
        first, second = (block.inner.layers[number].weight.detach() for block in blocks)
        assert_that(not torch.equal(first, second), f"layers.{number}.weight differs from block to block", value=second)
        another = other[0].inner.layers[number].weight.detach()
        assert_that(not torch.equal(first, another), f"layers.{number}.weight with another seed", value=another)


@task("init_residual_")
def test_parameters_are_filled_in_place(solution, randn, device, seed):
    blocks = tower(randn, 2)
    before = [p for block in blocks for p in block.parameters()]
    try:
        solution.init_residual_(blocks, 2, generator=seeded(seed, device))
    except NotImplementedError:
        raise
    except RuntimeError as error:
        assert_that(False, "weights that ask for gradients can be filled", value=str(error)[:40])
    after = [p for block in blocks for p in block.parameters()]
    same = all(one is two and one.is_leaf and one.requires_grad for one, two in zip(before, after, strict=True))
    assert_that(same, "the same Parameter objects, leaves that are trained", value=same)


@cost_case("init_residual_")
def init_residual_cost(module, randn):
    blocks, generator = tower(randn, 10), seeded(1, randn(1).device)
    return lambda: module.init_residual_(blocks, 10, generator=generator)
