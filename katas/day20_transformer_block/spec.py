"""Day 20: what the tasks promise."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from checker.testing import (
    assert_close,
    assert_cost,
    assert_equal,
    assert_gradcheck,
    assert_raises,
    assert_that,
    cost_case,
    global_rng_untouched,
    measure,
    noncontiguous,
    same_storage,
    task,
    unchanged,
)

DOUBLE = torch.float64
TOLERANCE = {torch.float32: {"rtol": 1e-4, "atol": 1e-5}, torch.float64: {"rtol": 1e-9, "atol": 1e-11}}
LOOSE = {"rtol": 1e-4, "atol": 1e-5}  # where tables of angles are float32
HALF = [torch.float16, torch.bfloat16]
LEADS = [(), (2, 3), (4, 4), (3, 0)]
ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}


def randomize_(module, seed, scale=0.4):
    """Give every parameter numbers that no initialization has, so that nothing is hidden behind ones and zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            values = torch.randn(parameter.shape, generator=generator, dtype=DOUBLE) * scale
            parameter.copy_(values + 0.1)
    return module


def gradients(module, inputs, weights):
    """The value of module(*inputs), and the gradients of its weighted sum at the float inputs and the parameters."""
    leaves = [x.detach().clone().requires_grad_() if x is not None and x.is_floating_point() else x for x in inputs]
    wanted = {f"input {i}": x for i, x in enumerate(leaves) if x is not None and x.requires_grad}
    wanted |= dict(module.named_parameters())
    out = module(*leaves)
    found = torch.autograd.grad((out * weights).sum(), list(wanted.values()), allow_unused=True)
    return out.detach(), dict(zip(wanted, found, strict=True))


def lower(t, device):
    """True where a token may look: at itself and what is before it."""
    return torch.ones(t, t, dtype=torch.bool, device=device).tril()


# LayerNorm


def normed(x, weight=None, bias=None, eps=1e-5):
    """By the definition, in float64, on the CPU."""
    x = x.detach().cpu().double()
    mean = x.sum(-1, keepdim=True) / x.shape[-1]
    variance = ((x - mean) ** 2).sum(-1, keepdim=True) / x.shape[-1]
    y = (x - mean) / (variance + eps) ** 0.5
    y = y if weight is None else y * weight.detach().cpu().double()
    return y if bias is None else y + bias.detach().cpu().double()


def norm_pair(solution, seed, device, dtype, dim, **options):
    """A LayerNorm with random parameters, and that of torch with the same."""
    theirs = nn.LayerNorm(dim, eps=options.get("eps", 1e-5), bias=options.get("bias", True))
    theirs = randomize_(theirs, seed).to(device, dtype)
    ours = solution.LayerNorm(dim, **options).to(device, dtype)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@task("LayerNorm")
@pytest.mark.parametrize("lead", LEADS, ids=str)
def test_each_vector_has_mean_0_and_variance_1(solution, device, dtype, randn, lead):
    x = randn(*lead, 6, dtype=dtype)
    expected = normed(x).to(dtype)
    found = solution.LayerNorm(6).to(device, dtype)(x)
    assert_close(found, expected, because="(x - mean) / sqrt(variance + eps), along the last axis", **TOLERANCE[dtype])


@task("LayerNorm")
@pytest.mark.parametrize("lead", [(), (2, 1, 3)], ids=str)
def test_weight_and_bias_come_last(solution, device, dtype, seed, randn, lead):
    ours, theirs = norm_pair(solution, seed, device, dtype, 6)
    x = randn(*lead, 6, dtype=dtype)
    expected = normed(x, theirs.weight, theirs.bias).to(dtype)
    assert_close(ours(x), expected, because="normalized, times the weight, plus the bias", **TOLERANCE[dtype])


@task("LayerNorm")
def test_one_number_that_differs(solution, device):
    x = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=DOUBLE, device=device)
    found = solution.LayerNorm(4).to(device, DOUBLE)(x)
    expected = torch.tensor([3.0, -1.0, -1.0, -1.0], dtype=DOUBLE) / math.sqrt(3 + 16e-5)
    assert_close(found, expected, because="[1, 0, 0, 0] has mean 1/4 and variance 3/16: 1.73, and not 1.50", rtol=1e-9)


@task("LayerNorm")
def test_without_a_bias(solution, device, seed, randn):
    ours, theirs = norm_pair(solution, seed, device, DOUBLE, 6, bias=False)
    x = randn(2, 6, dtype=DOUBLE)
    assert_close(ours(x), normed(x, theirs.weight), because="weight, but no bias", rtol=1e-9, atol=1e-11)


@task("LayerNorm")
@pytest.mark.parametrize("options", [{"affine": False}, {"affine": False, "bias": True}], ids=str)
def test_without_parameters(solution, device, randn, options):
    x = randn(2, 6, dtype=DOUBLE)
    module = solution.LayerNorm(6, **options)
    assert_equal([name for name, _ in module.named_parameters()], [], because="affine=False has no parameters")
    assert_equal((module.weight, module.bias), (None, None), because="affine=False: weight and bias are None")
    assert_close(module(x), normed(x), rtol=1e-9, atol=1e-11)


@task("LayerNorm")
def test_it_starts_with_ones_and_zeros(solution):
    module = solution.LayerNorm(3)
    expected = {"weight": torch.ones(3), "bias": torch.zeros(3)}
    assert_close({name: p.detach() for name, p in module.named_parameters()}, expected, because="both are trained")
    assert_equal((module.dim, module.eps), (3, 1e-5), because="dim and eps are attributes; eps is 1e-5 by default")


@task("LayerNorm")
def test_the_keys_are_those_of_torch(solution):
    assert_equal(sorted(solution.LayerNorm(3).state_dict()), ["bias", "weight"])
    module = solution.LayerNorm(3, bias=False)
    assert_equal(list(module.state_dict()), ["weight"], because="bias=False: no bias in the state dict")
    assert_that(module.bias is None, because="bias=False: the bias is None")


@task("LayerNorm")
@pytest.mark.parametrize("eps", [0.5, 1e-8])
def test_eps_is_inside_of_the_root(solution, device, randn, eps):
    x = randn(2, 3, 6, dtype=DOUBLE) * 0.1
    expected = normed(x, eps=eps)
    found = solution.LayerNorm(6, eps).to(device, DOUBLE)(x)
    assert_close(found, expected, because=f"sqrt(variance + {eps}) for numbers of size 0.1", rtol=1e-9, atol=1e-11)


@task("LayerNorm")
def test_small_numbers_meet_the_default_eps(solution, device, randn):
    x = randn(3, 6, dtype=DOUBLE) * 1e-3
    expected = normed(x)
    found = solution.LayerNorm(6).to(device, DOUBLE)(x)
    assert_close(found, expected, because="variance 1e-6 beside an eps of 1e-5", rtol=1e-9, atol=1e-11)


@task("LayerNorm")
def test_a_large_offset_in_float64(solution, device, randn):
    x = randn(3, 64, dtype=DOUBLE) + 1e6
    expected = normed(x)
    found = solution.LayerNorm(64).to(device, DOUBLE)(x)
    because = "numbers around a million: mean(x^2) - mean(x)^2 subtracts two numbers of 10^12"
    assert_close(found, expected, because=because, rtol=1e-7, atol=1e-7)


@task("LayerNorm")
def test_a_large_offset_in_float32(solution, device, randn):
    x = randn(3, 64) + 3000
    expected = normed(x).float()
    found = solution.LayerNorm(64).to(device)(x)
    assert_close(found, expected, because="numbers around 3000 in float32", rtol=1e-3, atol=2e-3)


@task("LayerNorm")
@pytest.mark.parametrize("value", [0.0, -1024.0])
def test_equal_numbers_become_the_bias(solution, device, dtype, seed, value):
    ours, theirs = norm_pair(solution, seed, device, dtype, 8)
    x = torch.full((2, 8), value, device=device, dtype=dtype)
    expected = theirs.bias.detach().expand(2, 8)
    assert_close(ours(x).detach(), expected, because="no distance from the mean: 0 / sqrt(eps), plus the bias")


@task("LayerNorm")
def test_equal_numbers_have_a_finite_gradient(solution, device, seed, randn):
    ours, theirs = norm_pair(solution, seed, device, DOUBLE, 8)
    x, weights = torch.full((2, 8), 2.0, device=device, dtype=DOUBLE), randn(2, 8, dtype=DOUBLE)
    _, expected = gradients(theirs, [x], weights)
    _, found = gradients(ours, [x], weights)
    assert_close(found["input 0"], expected["input 0"], because="eps keeps the slope finite", rtol=1e-7, atol=1e-7)


@task("LayerNorm")
def test_a_width_of_one(solution, device, seed, randn):
    ours, theirs = norm_pair(solution, seed, device, DOUBLE, 1)
    x = randn(3, 1, dtype=DOUBLE)
    assert_close(ours(x).detach(), theirs.bias.detach().expand(3, 1), because="one number is its own mean")


@task("LayerNorm")
@pytest.mark.parametrize("name", ["input 0", "weight", "bias"])
def test_its_gradients(solution, device, dtype, seed, randn, name):
    ours, theirs = norm_pair(solution, seed, device, dtype, 6)
    x, weights = randn(2, 3, 6, dtype=dtype), randn(2, 3, 6, dtype=dtype)
    _, expected = gradients(theirs, [x], weights)
    _, found = gradients(ours, [x], weights)
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-8, "atol": 1e-10}
    because = f"the gradient of {name}; mean and variance depend on x, too"
    assert_close(found[name], expected[name], because=because, **tolerance)


@task("LayerNorm")
def test_finite_differences(solution, device, randn):
    module = solution.LayerNorm(4).to(device, DOUBLE)
    assert_gradcheck(lambda x: module(x), [randn(2, 4, dtype=DOUBLE)], because="float64 stays float64 inside")


@task("LayerNorm")
@pytest.mark.parametrize("dtype_of_parameters", ["float32", "half"])
@pytest.mark.parametrize("half", HALF, ids=str)
def test_half_precision_is_rounded_once(solution, device, seed, randn, half, dtype_of_parameters):
    ours, theirs = norm_pair(solution, seed, device, half if dtype_of_parameters == "half" else torch.float32, 40)
    x = (randn(50, 40) * 3 + 1).to(half)
    expected = normed(x, theirs.weight, theirs.bias).to(half)
    step = torch.finfo(half).eps  # a single rounding is wrong by half of it at most
    because = "statistics, weight and bias in float32, one rounding at the end"
    assert_close(ours(x).detach(), expected, because=because, rtol=1.001 * step, atol=1e-6)
    exact = normed(x, theirs.weight, theirs.bias)
    excess = ((ours(x).detach().cpu().double() - exact).abs() - exact.abs() * 0.52 * step).max().item()
    assert_that(excess < 1e-5, because=because, value=excess < 1e-5)


@task("LayerNorm")
def test_squares_that_float16_cannot_hold(solution, device, randn):
    x = (randn(3, 16) * 400).half()
    expected = normed(x).half()
    found = solution.LayerNorm(16).to(device)(x)
    assert_close(found.detach(), expected, because="300^2 is more than float16 has", rtol=2e-3, atol=2e-3)


@task("LayerNorm")
def test_any_strides(solution, device, seed, randn):
    ours, theirs = norm_pair(solution, seed, device, DOUBLE, 6)
    for x in (noncontiguous(randn(2, 3, 6, dtype=DOUBLE)), randn(6, 3, 2, dtype=DOUBLE).transpose(0, 2)):
        expected = normed(x, theirs.weight, theirs.bias)
        assert_close(ours(x).detach(), expected, because="strides do not matter", rtol=1e-9, atol=1e-11)


@task("LayerNorm")
def test_the_input_of_the_norm_is_left_alone(solution, device, randn):
    x = randn(2, 6)
    with unchanged(x):
        solution.LayerNorm(6).to(device)(x)


@task("LayerNorm")
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(2, 3), (4, 1)], ids=str)
def test_a_width_that_does_not_fit_the_norm(solution, device, randn, shape, affine):
    module = solution.LayerNorm(4, affine=affine).to(device)
    because = f"x {shape} does not end in 4"
    assert_raises(ValueError, module, randn(*shape), mentions=[str(shape), "(4,)"], because=because)


@cost_case("LayerNorm")
def norm_cost(module, randn):
    x = randn(16, 64)
    norm = module.LayerNorm(64).to(x.device)
    return lambda: norm(x)


# FeedForward


def feed_forward(solution, seed, device, dtype, d_model=6, d_ff=10, **options):
    return randomize_(solution.FeedForward(d_model, d_ff, **options), seed).to(device, dtype)


def two_maps(module, x, act):
    up, down = module.up_proj, module.down_proj
    return F.linear(act(F.linear(x, up.weight, up.bias)), down.weight, down.bias)


@task("FeedForward")
@pytest.mark.parametrize("lead", LEADS, ids=str)
def test_up_gelu_down(solution, device, dtype, seed, randn, lead):
    module = feed_forward(solution, seed, device, dtype)
    x = randn(*lead, 6, dtype=dtype)
    expected = two_maps(module, x, F.gelu).detach()
    assert_close(module(x).detach(), expected, because="down_proj(gelu(up_proj(x)))", **TOLERANCE[dtype])


@task("FeedForward")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_every_activation(solution, device, seed, randn, activation, bias):
    module = feed_forward(solution, seed, device, DOUBLE, activation=activation, bias=bias)
    x = randn(2, 3, 6, dtype=DOUBLE)
    expected = two_maps(module, x, ACTIVATIONS[activation]).detach()
    assert_close(module(x).detach(), expected, because=f"down_proj({activation}(up_proj(x)))", rtol=1e-9, atol=1e-11)


@task("FeedForward")
def test_the_order_of_its_arguments(solution, device, seed, randn):
    module = randomize_(solution.FeedForward(6, 10, "relu", 0.0, False), seed).to(device, DOUBLE)
    x = randn(4, 6, dtype=DOUBLE)
    assert_close(module(x).detach(), two_maps(module, x, F.relu).detach(), rtol=1e-9, atol=1e-11)
    assert_equal(sorted(module.state_dict()), ["down_proj.weight", "up_proj.weight"], because="bias=False: two weights")


@task("FeedForward")
def test_its_parameters(solution):
    shapes = {name: tuple(p.shape) for name, p in solution.FeedForward(6, 10).named_parameters()}
    expected = {
        "up_proj.weight": (10, 6),
        "up_proj.bias": (10,),
        "down_proj.weight": (6, 10),
        "down_proj.bias": (6,),
    }
    assert_equal(dict(sorted(shapes.items())), dict(sorted(expected.items())), because="two Linear layers")


@task("FeedForward")
def test_gradients_of_the_feed_forward(solution, device, seed, randn):
    module = feed_forward(solution, seed, device, DOUBLE)
    x, weights = randn(2, 3, 6, dtype=DOUBLE), randn(2, 3, 6, dtype=DOUBLE)
    _, found = gradients(module, [x], weights)
    leaf = x.clone().requires_grad_()
    named = {"input 0": leaf, **dict(module.named_parameters())}
    expected = torch.autograd.grad((two_maps(module, leaf, F.gelu) * weights).sum(), list(named.values()))
    for name, grad in zip(named, expected, strict=True):
        assert_close(found[name], grad, because=f"the gradient of {name}", rtol=1e-8, atol=1e-10)


@task("FeedForward")
def test_a_branch_may_be_negative(solution, device, seed):
    module = feed_forward(solution, seed, device, DOUBLE, activation="relu")
    with torch.no_grad():
        module.down_proj.weight.zero_()
        module.down_proj.bias.fill_(-1.0)
    x = torch.ones(3, 6, device=device, dtype=DOUBLE)
    assert_close(module(x).detach(), -x, because="nothing comes after down_proj: what it says is the result")


def all_ones_inside(solution, device, p):
    """A network whose d_ff numbers are all 1 and go out unchanged: what comes out is what dropout did."""
    module = solution.FeedForward(8, 8, "relu", p).to(device)
    with torch.no_grad():
        module.up_proj.weight.zero_()
        module.up_proj.bias.fill_(1.0)
        module.down_proj.weight.copy_(torch.eye(8))
        module.down_proj.bias.zero_()
    return module


@task("FeedForward")
def test_dropout_falls_between_the_maps(solution, device, randn):
    module = all_ones_inside(solution, device, 1.0)
    with torch.no_grad():
        module.down_proj.bias.fill_(3.0)
    found = module(randn(4, 8)).detach()
    assert_close(
        found, torch.full((4, 8), 3.0), because="dropout 1 takes all d_ff numbers; the bias of down_proj stays"
    )


@task("FeedForward")
def test_what_dropout_leaves_is_scaled(solution, device, randn):
    found = all_ones_inside(solution, device, 0.75)(randn(50, 8)).detach()
    values = sorted(set(found.flatten().tolist()))
    assert_equal(values, [0.0, 4.0], because="with dropout 0.75 each of the d_ff numbers is 0 or four times as large")


@task("FeedForward")
def test_no_dropout_in_eval(solution, device, randn):
    module = all_ones_inside(solution, device, 1.0).eval()
    found = module(randn(4, 8)).detach()
    assert_close(found, torch.ones(4, 8), because="dropout is for training")


@task("FeedForward")
def test_no_dropout_by_default(solution, device, randn):
    module = solution.FeedForward(8, 8, "relu").to(device)
    module.load_state_dict(all_ones_inside(solution, device, 0.0).state_dict())
    assert_close(module(randn(100, 8)).detach(), torch.ones(100, 8), because="dropout is 0 by default")


@task("FeedForward")
@pytest.mark.parametrize("word", ["swish", "GELU", ""])
def test_an_unknown_activation(solution, word):
    assert_raises(ValueError, solution.FeedForward, 6, 10, word, mentions=[word])


@task("FeedForward")
def test_a_width_that_does_not_fit_the_network(solution, device, randn):
    module = solution.FeedForward(6, 10).to(device)
    assert_raises(ValueError, module, randn(2, 5), mentions=["(2, 5)", "(10, 6)"])


@task("FeedForward")
@pytest.mark.parametrize("half", HALF, ids=str)
def test_a_feed_forward_of_half_precision(solution, device, seed, randn, half):
    module = feed_forward(solution, seed, device, half)
    x = randn(2, 3, 6).to(half)
    expected = two_maps(module.to(DOUBLE), x.double(), F.gelu).detach().to(half)
    found = module.to(half)(x).detach()
    assert_close(found, expected, rtol=5e-2, atol=1e-1, because="half in, half out")


@task("FeedForward")
def test_the_input_of_the_feed_forward_is_left_alone(solution, device, randn):
    x = randn(2, 6)
    with unchanged(x):
        solution.FeedForward(6, 10, "relu").to(device)(x)


@task("FeedForward")
def test_the_price_of_a_token(solution, device, randn):
    module = solution.FeedForward(6, 10).to(device)
    assert_cost(module, randn(2, 3, 6), flops=2 * 3 * 4 * 6 * 10, because="4 * D * F FLOPs per token")


@cost_case("FeedForward")
def feed_forward_cost(module, randn):
    x = randn(16, 32)
    network = module.FeedForward(32, 128).to(x.device)
    return lambda: network(x)


# TransformerBlock


def torch_layer(seed, device, dtype, d_model=12, n_heads=3, d_ff=20, **options):
    """A layer of torch with random parameters, without dropout; in training mode it takes no shortcuts."""
    options = {"dropout": 0.0, "batch_first": True, **options}
    layer = nn.TransformerEncoderLayer(d_model, n_heads, d_ff, **options)
    return randomize_(layer, seed, 0.3).to(device, dtype)


def renamed(values):
    """The parameters (or gradients) of a layer of torch under the names that a TransformerBlock has for them."""
    found = {}
    for name, value in values.items():
        kind = name[-6:] if name.endswith("weight") else name[-4:]
        if "in_proj" in name:
            for part, third in zip("qkv", value.chunk(3), strict=True):
                found[f"attention.{part}_proj.{kind}"] = third
        else:
            name = name.replace("self_attn.out_proj", "attention.o_proj")
            name = name.replace("linear1", "feed_forward.up_proj").replace("linear2", "feed_forward.down_proj")
            found[name] = value
    return found


def block_pair(solution, seed, device, dtype, d_model=12, n_heads=3, d_ff=20, **options):
    """A TransformerBlock and a layer of torch with the same parameters."""
    in_torch = {"norm_first": True, "activation": "relu", **options}
    layer = torch_layer(seed, device, dtype, d_model, n_heads, d_ff, **in_torch)
    block = solution.TransformerBlock(d_model, n_heads, d_ff, **options).to(device, dtype)
    block.load_state_dict(renamed(layer.state_dict()))
    return block, layer


def by_torch(layer, n_heads=3):
    """The layer as a function of x and a mask in which True means: may attend."""

    def call(x, mask=None):
        if mask is None:
            return layer(x)
        B, T, _ = x.shape
        return layer(x, src_mask=~mask.expand(B, n_heads, T, T).reshape(B * n_heads, T, T))

    return call


@task("TransformerBlock")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm_first", [True, False], ids=["pre-norm", "post-norm"])
def test_it_computes_what_torch_does(solution, device, dtype, seed, randn, norm_first, activation):
    options = {"norm_first": norm_first, "activation": activation}
    in_torch = {**options, "activation": ACTIVATIONS[activation]}
    layer = torch_layer(seed, device, dtype, **in_torch)
    block = solution.TransformerBlock(12, 3, 20, **options).to(device, dtype)
    block.load_state_dict(renamed(layer.state_dict()))
    x = randn(2, 5, 12, dtype=dtype)
    expected = layer(x).detach()
    assert_close(block(x).detach(), expected, because="the numbers of nn.TransformerEncoderLayer", **TOLERANCE[dtype])


@task("TransformerBlock")
def test_the_defaults_are_pre_norm_and_relu(solution, device, seed, randn):
    block, layer = block_pair(solution, seed, device, DOUBLE)
    x = randn(2, 5, 12, dtype=DOUBLE)
    expected = layer(x).detach()
    assert_close(block(x).detach(), expected, because="norm_first=True, activation='relu'", rtol=1e-9, atol=1e-11)
    assert_equal(block.norm_first, True, because="norm_first is an attribute")


@task("TransformerBlock")
@pytest.mark.parametrize("norm_first", [True, False], ids=["pre-norm", "post-norm"])
def test_a_block_without_biases(solution, device, seed, randn, norm_first):
    block, layer = block_pair(solution, seed, device, DOUBLE, norm_first=norm_first, bias=False)
    x = randn(2, 5, 12, dtype=DOUBLE)
    expected = layer(x).detach()
    assert_close(block(x).detach(), expected, because="the same without biases", rtol=1e-9, atol=1e-11)


@task("TransformerBlock")
@pytest.mark.parametrize("bias, expected", [(True, 16), (False, 8)])
def test_it_has_two_norms_of_its_own(solution, bias, expected):
    block = solution.TransformerBlock(12, 3, 20, bias=bias)
    assert_equal(len(list(block.parameters())), expected, because="two norms, four projections, two maps")
    widths = 4 * 144 + 2 * 240 + 2 * 12
    biases = 4 * 12 + 20 + 12 + 2 * 12 if bias else 0
    total = sum(p.numel() for p in block.parameters())
    assert_equal(total, widths + biases, because="4 D^2 + 2 D F and the norms, and the biases")


@task("TransformerBlock")
@pytest.mark.parametrize("norm_first", [True, False], ids=["pre-norm", "post-norm"])
def test_all_its_gradients(solution, device, seed, randn, norm_first):
    block, layer = block_pair(solution, seed, device, DOUBLE, norm_first=norm_first)
    x, weights = randn(2, 5, 12, dtype=DOUBLE), randn(2, 5, 12, dtype=DOUBLE)
    _, expected = gradients(layer, [x], weights)
    _, found = gradients(block, [x], weights)
    for name, grad in renamed(expected).items():
        assert_close(found[name], grad, because=f"the gradient of {name}", rtol=1e-7, atol=1e-9)


MASKS = {
    "causal": lambda device: lower(5, device),
    "padding": lambda device: torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], device=device).bool()[:, None, None],
    "per row": lambda device: torch.stack([lower(5, device), lower(5, device).mT])[:, None],
    "per head": lambda device: torch.stack([lower(5, device), lower(5, device).mT, torch.eye(5, device=device) > 0]),
}


@task("TransformerBlock")
@pytest.mark.parametrize("norm_first", [True, False], ids=["pre-norm", "post-norm"])
@pytest.mark.parametrize("kind", MASKS)
def test_masks_of_every_kind(solution, device, seed, randn, kind, norm_first):
    block, layer = block_pair(solution, seed, device, DOUBLE, norm_first=norm_first)
    x, mask = randn(2, 5, 12, dtype=DOUBLE), MASKS[kind](device)
    expected = by_torch(layer)(x, mask).detach()
    found = block(x, mask).detach()
    assert_close(found, expected, because=f"a {kind} mask {tuple(mask.shape)}", rtol=1e-9, atol=1e-11)
    assert_close(block(x, mask=mask).detach(), expected, because="the same mask by its name", rtol=1e-9, atol=1e-11)


@task("TransformerBlock")
def test_as_many_rows_as_tokens_as_heads(solution, device, seed, randn):
    block, layer = block_pair(solution, seed, device, DOUBLE, d_model=6, n_heads=3)
    x, mask = randn(3, 3, 6, dtype=DOUBLE), lower(3, device)
    expected = by_torch(layer)(x, mask).detach()
    assert_close(block(x, mask).detach(), expected, because="B = T = H = 3", rtol=1e-9, atol=1e-11)


@task("TransformerBlock")
@pytest.mark.parametrize("norm_first", [True, False], ids=["pre-norm", "post-norm"])
def test_nothing_leaks_from_the_future(solution, device, seed, randn, norm_first):
    block, _ = block_pair(solution, seed, device, DOUBLE, norm_first=norm_first)
    x = randn(2, 5, 12, dtype=DOUBLE).requires_grad_()
    out = block(x, lower(5, device))
    (grad,) = torch.autograd.grad(out[:, 2].sum() + out[:, 2].square().sum(), x)
    leak = grad[:, 3:].abs().max().item()
    assert_that(leak == 0.0, because="with a causal mask token 2 does not depend on tokens 3 and 4", value=leak)
    reach = grad[:, :3].abs().amax((0, 2)).min().item()
    assert_that(reach > 0.0, because="and it does depend on tokens 0, 1 and 2", value=reach > 0.0)


@task("TransformerBlock")
@pytest.mark.parametrize("norm_first", [True, False], ids=["pre-norm", "post-norm"])
def test_padding_has_no_influence(solution, device, seed, randn, norm_first):
    block, _ = block_pair(solution, seed, device, DOUBLE, norm_first=norm_first)
    x = randn(1, 5, 12, dtype=DOUBLE)
    short = block(x[:, :3]).detach()
    x[:, 3:] = 100.0
    mask = torch.tensor([1, 1, 1, 0, 0], device=device).bool()
    found = block(x, mask).detach()[:, :3]
    assert_close(found, short, because="three tokens and two hidden ones", rtol=1e-9, atol=1e-11)


class Listener(nn.Module):
    """An attention that writes down how it was called."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, *args, **options):
        self.calls.append((args, options))
        return args[0] * 2


@task("TransformerBlock")
def test_the_attention_may_be_exchanged(solution, device, seed, randn):
    block = solution.TransformerBlock(12, 3, 20).to(device, DOUBLE)
    block.attention = listener = Listener()
    x, mask = randn(2, 5, 12, dtype=DOUBLE), lower(5, device)
    block(x)
    block(x, None, cache="a cache", window=3)
    block(x, mask, cache="a cache")
    args, options = zip(*listener.calls, strict=True)
    assert_equal([len(a) for a in args], [1, 1, 1], because="x is its one positional argument")
    assert_equal([sorted(o) for o in options], [[], ["cache", "window"], ["cache", "mask"]], because="mask if any")
    assert_equal((options[1]["cache"], options[1]["window"]), ("a cache", 3), because="options are handed on")
    assert_equal(options[2]["mask"], mask, because="the mask is handed on as it is")
    assert_close(args[0][0].detach(), normed(x), because="a new norm1 comes before it", rtol=1e-9, atol=1e-11)


def quiet(block):
    """All branches give what their last bias says, and that is 1."""
    with torch.no_grad():
        for parameter in (*block.attention.parameters(), *block.feed_forward.parameters()):
            parameter.zero_()
        block.attention.o_proj.bias.fill_(1.0)
        block.feed_forward.down_proj.bias.fill_(1.0)
    return block


@task("TransformerBlock")
def test_the_stream_is_never_dropped(solution, device, randn):
    block = quiet(solution.TransformerBlock(12, 3, 20, dropout=1.0).to(device, DOUBLE))
    x = randn(2, 5, 12, dtype=DOUBLE)
    assert_close(block(x).detach(), x, because="with dropout 1 the branches are gone, and the stream passes by")


@task("TransformerBlock")
def test_the_stream_is_never_dropped_before_a_norm(solution, device, randn):
    block = quiet(solution.TransformerBlock(12, 3, 20, dropout=1.0, norm_first=False).to(device, DOUBLE))
    x = randn(2, 5, 12, dtype=DOUBLE)
    expected = normed(normed(x))
    assert_close(block(x).detach(), expected, because="without branches: norm2(norm1(x))", rtol=1e-9, atol=1e-11)


@task("TransformerBlock")
@pytest.mark.parametrize("branch", ["attention", "feed_forward"])
def test_entries_of_a_branch_are_dropped(solution, device, branch):
    block = quiet(solution.TransformerBlock(12, 3, 20, dropout=0.5).to(device, DOUBLE))
    with torch.no_grad():
        silent = block.feed_forward.down_proj if branch == "attention" else block.attention.o_proj
        silent.bias.zero_()
    x = torch.zeros(20, 5, 12, device=device, dtype=DOUBLE)
    values = sorted(set(block(x).detach().flatten().tolist()))
    because = f"dropout 0.5: each entry of the {branch} branch is 0 or twice as large"
    assert_that(values == [0.0, 2.0], because=because, value=f"{min(len(values), 3)} different numbers or more")


@task("TransformerBlock")
@pytest.mark.parametrize("branch", ["attention", "feed_forward"])
def test_entries_of_a_branch_are_dropped_in_post_norm(solution, device, branch):
    block = quiet(solution.TransformerBlock(12, 3, 20, dropout=0.5, norm_first=False).to(device, DOUBLE))
    with torch.no_grad():
        silent = block.feed_forward.down_proj if branch == "attention" else block.attention.o_proj
        silent.bias.zero_()
    x = torch.zeros(20, 5, 12, device=device, dtype=DOUBLE)
    spread = block(x).detach().var(-1, correction=0).mean().item()
    because = f"dropout 0.5: the entries of the {branch} branch are not all equal"
    assert_that(spread > 0.5, because=because, value=spread > 0.5)


@task("TransformerBlock")
def test_the_feed_forward_gets_the_dropout_too(solution, device):
    block = quiet(solution.TransformerBlock(8, 2, 8, dropout=0.5).to(device, DOUBLE))
    with torch.no_grad():
        block.attention.o_proj.bias.zero_()
        block.feed_forward.up_proj.bias.fill_(1.0)
        block.feed_forward.down_proj.weight.copy_(torch.eye(8))
        block.feed_forward.down_proj.bias.zero_()
    x = torch.zeros(50, 5, 8, device=device, dtype=DOUBLE)
    values = sorted(set(block(x).detach().flatten().tolist()))
    because = "dropped between the maps and after them: 0, or twice doubled"
    assert_that(values == [0.0, 4.0], because=because, value=values == [0.0, 4.0])


@task("TransformerBlock")
def test_the_block_drops_nothing_in_eval(solution, device, seed, randn):
    block, layer = block_pair(solution, seed, device, DOUBLE)
    noisy = solution.TransformerBlock(12, 3, 20, dropout=0.5).to(device, DOUBLE).eval()
    noisy.load_state_dict(block.state_dict())
    x = randn(2, 5, 12, dtype=DOUBLE)
    expected = layer(x).detach()
    assert_close(noisy(x).detach(), expected, because="dropout is for training", rtol=1e-9, atol=1e-11)


@task("TransformerBlock")
@pytest.mark.parametrize("shape", [(0, 5, 12), (2, 0, 12), (2, 1, 12)], ids=str)
def test_empty_and_single(solution, device, seed, randn, shape):
    block, layer = block_pair(solution, seed, device, DOUBLE)
    x = randn(*shape, dtype=DOUBLE)
    expected = layer(x).detach() if x.numel() else x
    assert_close(block(x).detach(), expected, because=f"x {shape}", rtol=1e-9, atol=1e-11)


@task("TransformerBlock")
def test_a_block_in_bfloat16(solution, device, seed, randn):
    block, layer = block_pair(solution, seed, device, torch.bfloat16, norm_first=False)
    x = randn(2, 5, 12).bfloat16()
    expected = layer.double()(x.double()).detach().bfloat16()
    assert_close(block(x).detach(), expected, because="bfloat16 in, bfloat16 out", rtol=5e-2, atol=2e-1)


@task("TransformerBlock")
def test_the_input_of_the_block_is_left_alone(solution, device, randn):
    for norm_first in (True, False):
        x = randn(2, 5, 12)
        block = solution.TransformerBlock(12, 3, 20, norm_first=norm_first).to(device)
        with unchanged(x):
            block(x)


@task("TransformerBlock")
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
def test_the_price_of_a_block(solution, device, randn, causal):
    block = solution.TransformerBlock(12, 3, 20).to(device)
    per_token = 2 * (4 * 12**2 + 2 * 12 * 20) + 4 * 5 * 12
    because = "2 * (4 D^2 + 2 D F) + 4 T D FLOPs per token"
    assert_cost(block, randn(2, 5, 12), lower(5, device) if causal else None, flops=2 * 5 * per_token, because=because)


@cost_case("TransformerBlock")
def block_cost(module, randn):
    x = randn(2, 16, 32)
    block = module.TransformerBlock(32, 4, 128).to(x.device)
    return lambda: block(x)


# from_torch_layer


@task("from_torch_layer")
@pytest.mark.parametrize("activation", ["relu", "gelu", F.silu], ids=["relu", "gelu", "silu"])
@pytest.mark.parametrize("norm_first", [True, False], ids=["pre-norm", "post-norm"])
def test_the_block_computes_what_the_layer_does(solution, device, dtype, seed, randn, norm_first, activation):
    bias = activation != "gelu"
    options = {"norm_first": norm_first, "bias": bias, "activation": activation}
    layer = torch_layer(seed, device, dtype, **options)
    x = randn(2, 5, 12, dtype=dtype)
    expected = layer(x).detach()
    block = solution.from_torch_layer(layer)
    assert_close(block(x).detach(), expected, because=f"a layer with {options}", **TOLERANCE[dtype])


@task("from_torch_layer")
@pytest.mark.parametrize("kind", MASKS)
def test_the_block_understands_masks(solution, device, seed, randn, kind):
    layer = torch_layer(seed, device, DOUBLE)
    x, mask = randn(2, 5, 12, dtype=DOUBLE), MASKS[kind](device)
    expected = by_torch(layer)(x, mask).detach()
    found = solution.from_torch_layer(layer)(x, mask).detach()
    assert_close(found, expected, because=f"a {kind} mask", rtol=1e-9, atol=1e-11)


@task("from_torch_layer")
def test_parameter_by_parameter(solution, device, seed):
    layer = torch_layer(seed, device, DOUBLE)
    expected = renamed({name: p.clone() for name, p in layer.state_dict().items()})
    found = {name: p.detach() for name, p in solution.from_torch_layer(layer).named_parameters()}
    assert_equal(sorted(found), sorted(expected), because="the parameters of a TransformerBlock")
    for name, value in expected.items():
        assert_equal(found[name], value, because=f"{name} is copied bit by bit")


@task("from_torch_layer")
def test_each_norm_has_its_eps(solution, device, seed, randn):
    layer = torch_layer(seed, device, DOUBLE, layer_norm_eps=0.5)
    layer.norm2.eps = 0.01
    x = randn(2, 5, 12, dtype=DOUBLE)
    expected = layer(x).detach()
    found = solution.from_torch_layer(layer)(x).detach()
    assert_close(found, expected, because="eps is 0.5 in norm1 and 0.01 in norm2", rtol=1e-9, atol=1e-11)


@task("from_torch_layer")
def test_a_layer_whose_batch_comes_second(solution, device, seed, randn):
    layer = torch_layer(seed, device, DOUBLE, batch_first=False)
    x = randn(2, 5, 12, dtype=DOUBLE)
    expected = layer(x.transpose(0, 1)).transpose(0, 1).detach()
    found = solution.from_torch_layer(layer)(x).detach()
    assert_close(found, expected, because="the block takes (B, T, D)", rtol=1e-9, atol=1e-11)


@task("from_torch_layer")
@pytest.mark.parametrize("shape", [(8, 1, 5), (4, 2, 4)], ids=str)
def test_other_widths_and_heads(solution, device, seed, randn, shape):
    layer = torch_layer(seed, device, DOUBLE, *shape)
    x = randn(2, 3, shape[0], dtype=DOUBLE)
    expected = layer(x).detach()
    found = solution.from_torch_layer(layer)(x).detach()
    assert_close(found, expected, because=f"D, H, F = {shape}", rtol=1e-9, atol=1e-11)


@task("from_torch_layer")
@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_taken_over(solution, device, seed, training):
    layer = torch_layer(seed, device, DOUBLE).train(training)
    block = solution.from_torch_layer(layer)
    modes = sorted({module.training for module in block.modules()})
    assert_equal(modes, [training], because="a layer in eval mode makes a block in eval mode, down to its last part")


@task("from_torch_layer")
def test_dropout_is_taken_over(solution, device, seed):
    layer = torch_layer(seed, device, DOUBLE, dropout=0.75, norm_first=True)
    block = quiet(solution.from_torch_layer(layer))
    x = torch.zeros(20, 5, 12, device=device, dtype=DOUBLE)
    with torch.no_grad():
        block.feed_forward.down_proj.bias.zero_()
        values = sorted(set(block(x).flatten().tolist()))
    assert_equal(values, [0.0, 4.0], because="dropout 0.75: entries of a branch are 0 or four times as large")


@task("from_torch_layer")
def test_the_copy_is_independent(solution, device, seed):
    layer = torch_layer(seed, device, DOUBLE)
    block = solution.from_torch_layer(layer)
    shared = [
        name
        for name, ours in block.named_parameters()
        if any(same_storage(ours.detach(), theirs.detach()) for theirs in layer.parameters())
    ]
    assert_equal(shared, [], because="training the block must not train the layer")
    odd = [name for name, p in block.named_parameters() if not (p.is_leaf and p.requires_grad)]
    assert_equal(odd, [], because="the parameters are leaves and can be trained")


@task("from_torch_layer")
def test_the_layer_is_left_as_it_was(solution, device, seed):
    layer = torch_layer(seed, device, DOUBLE)
    keys = sorted(layer.state_dict())
    with unchanged(*layer.parameters()):
        solution.from_torch_layer(layer)
    assert_equal(sorted(layer.state_dict()), keys, because="the layer has the parameters that it had")


@task("from_torch_layer")
@pytest.mark.parametrize("half", HALF, ids=str)
def test_a_layer_of_half_precision(solution, device, seed, half):
    layer = torch_layer(seed, device, half)
    dtypes = sorted({str(p.dtype) for p in solution.from_torch_layer(layer).parameters()})
    assert_equal(dtypes, [str(half)], because="the dtype is that of the layer")


@task("from_torch_layer")
def test_no_random_numbers_are_drawn(solution, device, seed):
    layer = torch_layer(seed, device, DOUBLE)
    with global_rng_untouched():
        solution.from_torch_layer(layer)


@task("from_torch_layer")
def test_an_activation_that_we_do_not_have(solution, device, seed):
    layer = torch_layer(seed, device, DOUBLE, activation=torch.tanh)
    assert_raises(ValueError, solution.from_torch_layer, layer, because="tanh is not one of the block's activations")


@cost_case("from_torch_layer")
def from_torch_layer_cost(module, seed, device):
    layer = torch_layer(seed, device, torch.float32)
    return lambda: module.from_torch_layer(layer)


# RotaryAttention


def turned(x, positions, base):
    """Pairs (x0, x1), (x2, x3), ... of x (B, T, Dh) as complex numbers, times e^(i * position * frequency)."""
    B, T, Dh = x.shape
    frequencies = base ** (-torch.arange(Dh // 2, dtype=DOUBLE, device=x.device) * 2 / Dh)
    angles = positions.to(x.device, DOUBLE).expand(B, T)[..., None] * frequencies  # (B, T, Dh/2)
    pairs = torch.view_as_complex(x.double().reshape(B, T, Dh // 2, 2).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).reshape(B, T, Dh)


def by_heads(get, x, n_heads, mask=None, positions=None, base=10000.0):
    """Head by head, in float64: attention with the projections get("q_proj.weight"), ...; no positions, no rotation."""
    B, T, D = x.shape
    Dh = D // n_heads
    x = x.double()
    q, k, v = (F.linear(x, get(f"{part}_proj.weight"), get(f"{part}_proj.bias")) for part in "qkv")
    mask = torch.ones(1, 1, T, T, device=x.device) > 0 if mask is None else mask
    mask = mask.expand(B, n_heads, T, T)
    mixed = []
    for head in range(n_heads):
        columns = slice(head * Dh, (head + 1) * Dh)
        q_head, k_head = q[..., columns], k[..., columns]
        if positions is not None:
            q_head, k_head = turned(q_head, positions, base), turned(k_head, positions, base)
        scores = torch.einsum("btd,bsd->bts", q_head, k_head) / Dh**0.5
        weights = scores.masked_fill(~mask[:, head], -torch.inf).softmax(-1)
        mixed.append(weights @ v[..., columns])
    return F.linear(torch.cat(mixed, -1), get("o_proj.weight"), get("o_proj.bias"))


def getter(module, prefix=""):
    """How to read a parameter in float64; None where there is none."""
    parameters = dict(module.named_parameters(remove_duplicate=False))

    def get(name):
        found = parameters.get(prefix + name)
        return None if found is None else found.double()

    return get


def rotary(solution, seed, device, dtype, d_model=12, n_heads=3, **options):
    return randomize_(solution.RotaryAttention(d_model, n_heads, **options), seed).to(device, dtype)


@task("RotaryAttention")
@pytest.mark.parametrize("bias", [True, False], ids=["biases", "no biases"])
def test_head_by_head(solution, device, dtype, seed, randn, bias):
    module = rotary(solution, seed, device, dtype, bias=bias)
    x = randn(2, 5, 12, dtype=dtype)
    expected = by_heads(getter(module), x, 3, positions=torch.arange(5)).to(dtype).detach()
    found = module(x).detach()
    assert_close(found, expected, because="queries and keys are rotated by 0, 1, ..., T - 1", **LOOSE)


@task("RotaryAttention")
@pytest.mark.parametrize("shape", [(3, 3, 12, 3), (2, 7, 8, 1), (1, 2, 8, 4)], ids=str)
def test_rotary_shapes(solution, device, seed, randn, shape):
    B, T, D, H = shape
    module = rotary(solution, seed, device, DOUBLE, D, H)
    x = randn(B, T, D, dtype=DOUBLE)
    expected = by_heads(getter(module), x, H, positions=torch.arange(T)).detach()
    assert_close(module(x).detach(), expected, because=f"B, T, D, H = {shape}", **LOOSE)


@task("RotaryAttention")
def test_positions_that_all_rows_share(solution, device, seed, randn):
    module = rotary(solution, seed, device, DOUBLE)
    x, positions = randn(2, 5, 12, dtype=DOUBLE), torch.tensor([7, 3, 20, 4, 0], device=device)
    expected = by_heads(getter(module), x, 3, positions=positions).detach()
    assert_close(module(x, positions=positions).detach(), expected, because="positions (T,), in any order", **LOOSE)


@task("RotaryAttention")
@pytest.mark.parametrize("B, T", [(2, 5), (3, 3), (5, 2)])
def test_positions_for_each_row(solution, device, seed, randn, B, T):
    module = rotary(solution, seed, device, DOUBLE)
    x = randn(B, T, 12, dtype=DOUBLE)
    positions = torch.arange(B * T, device=device).reshape(B, T).square() % 23
    expected = by_heads(getter(module), x, 3, positions=positions).detach()
    assert_close(module(x, positions=positions).detach(), expected, because="positions (B, T)", **LOOSE)


@task("RotaryAttention")
@pytest.mark.parametrize("base", [10.0, 500.0])
def test_the_base(solution, device, seed, randn, base):
    module = rotary(solution, seed, device, DOUBLE, base=base)
    x = randn(2, 5, 12, dtype=DOUBLE)
    expected = by_heads(getter(module), x, 3, positions=torch.arange(5), base=base).detach()
    assert_close(module(x).detach(), expected, because=f"frequencies from the base {base}", **LOOSE)


@task("RotaryAttention")
@pytest.mark.parametrize("kind", MASKS)
def test_rotary_masks(solution, device, seed, randn, kind):
    module = rotary(solution, seed, device, DOUBLE)
    x, mask = randn(2, 5, 12, dtype=DOUBLE), MASKS[kind](device)
    expected = by_heads(getter(module), x, 3, mask=mask, positions=torch.arange(5)).detach()
    assert_close(module(x, mask).detach(), expected, because=f"a {kind} mask {tuple(mask.shape)}", **LOOSE)
    assert_close(module(x, mask=mask).detach(), expected, because="the same mask by its name", **LOOSE)


@task("RotaryAttention")
@pytest.mark.parametrize("shift", [50, -20])
def test_only_differences_of_positions_matter(solution, device, seed, randn, shift):
    module = rotary(solution, seed, device, DOUBLE)
    x = randn(2, 5, 12, dtype=DOUBLE)
    expected = by_heads(getter(module), x, 3, positions=torch.arange(5)).detach()
    found = module(x, positions=torch.arange(5, device=device) + shift).detach()
    assert_close(found, expected, because=f"all positions shifted by {shift}", rtol=1e-3, atol=1e-4)


@task("RotaryAttention")
def test_positions_beyond_the_reach_of_bfloat16(solution, device, seed, randn):
    module = rotary(solution, seed, device, torch.bfloat16, 8, 1)
    x = (randn(2, 6, 8) * 2).bfloat16()
    near = torch.tensor([0, 1, 3, 4, 6, 7], device=device)
    expected = by_heads(getter(module), x, 1, positions=near).bfloat16().detach()
    found = module(x, positions=near + 257).detach()
    because = "257 and 259 are no numbers of bfloat16: angles are computed in float32"
    assert_close(found, expected, because=because, rtol=5e-2, atol=1e-1)


@task("RotaryAttention")
def test_gradients_of_the_rotary_attention(solution, device, seed, randn):
    module = rotary(solution, seed, device, DOUBLE, bias=True)
    x, weights = randn(2, 5, 12, dtype=DOUBLE), randn(2, 5, 12, dtype=DOUBLE)
    _, found = gradients(module, [x], weights)
    leaf = x.clone().requires_grad_()
    named = {"input 0": leaf, **dict(module.named_parameters())}
    out = by_heads(getter(module), leaf, 3, positions=torch.arange(5))
    expected = torch.autograd.grad((out * weights).sum(), list(named.values()))
    for name, grad in zip(named, expected, strict=True):
        assert_close(found[name], grad, because=f"the gradient of {name}", rtol=1e-3, atol=1e-4)


@task("RotaryAttention")
@pytest.mark.parametrize("bias", [True, False])
def test_its_parameters_are_those_of_multi_head_attention(solution, bias):
    shapes = {name: tuple(p.shape) for name, p in solution.RotaryAttention(12, 3, bias=bias).named_parameters()}
    expected = {f"{part}_proj.weight": (12, 12) for part in "qkvo"}
    expected |= {f"{part}_proj.bias": (12,) for part in "qkvo"} if bias else {}
    assert_equal(dict(sorted(shapes.items())), dict(sorted(expected.items())), because="four projections")


@task("RotaryAttention")
def test_it_has_no_bias_by_default(solution):
    assert_equal(len(list(solution.RotaryAttention(12, 3).parameters())), 4, because="bias is False by default")


@task("RotaryAttention")
@pytest.mark.parametrize("d_model, n_heads", [(12, 5), (6, 2), (5, 1)])
def test_heads_of_no_even_width(solution, d_model, n_heads):
    mentions = [str(d_model), str(n_heads)]
    because = f"{d_model} does not divide into {n_heads} heads of an even width"
    assert_raises(ValueError, solution.RotaryAttention, d_model, n_heads, mentions=mentions, because=because)


@task("RotaryAttention")
@pytest.mark.parametrize("shape", [(1,), (2, 4), (3, 5), (1, 5)], ids=str)
def test_positions_that_do_not_fit(solution, device, randn, shape):
    module = solution.RotaryAttention(12, 3).to(device)
    positions = torch.zeros(shape, dtype=torch.long, device=device)
    mentions = [str(shape), "(5,)", "(2, 5)"]
    because = f"positions {shape} for x (2, 5, 12)"
    assert_raises(ValueError, module, randn(2, 5, 12), positions=positions, mentions=mentions, because=because)


@task("RotaryAttention")
@pytest.mark.parametrize("shape", [(0, 5, 12), (2, 0, 12)], ids=str)
def test_a_rotary_attention_over_nothing(solution, device, randn, shape):
    x = randn(*shape)
    assert_close(solution.RotaryAttention(12, 3).to(device)(x).detach(), x, because=f"x {shape}")


@task("RotaryAttention")
def test_the_input_of_the_rotary_attention_is_left_alone(solution, device, randn):
    x, positions = randn(2, 5, 12), torch.arange(5, device=device)
    module = solution.RotaryAttention(12, 3).to(device)
    with unchanged(x, positions):
        module(x, positions=positions)


@task("RotaryAttention")
def test_shapes_without_numbers(solution):
    with torch.device("meta"):
        module, x = solution.RotaryAttention(12, 3), torch.zeros(2, 5, 12)
    found = module(x)
    assert_equal((str(found.device), tuple(found.shape)), ("meta", (2, 5, 12)), because="positions are made where x is")


@task("RotaryAttention")
def test_the_price_of_rotary_attention(solution, device, randn):
    module = solution.RotaryAttention(12, 3).to(device)
    because = "8 D^2 + 4 T D FLOPs per token"
    assert_cost(module, randn(2, 5, 12), flops=2 * 5 * (8 * 12**2 + 4 * 5 * 12), because=because)


@cost_case("RotaryAttention")
def rotary_cost(module, randn):
    x = randn(2, 16, 32)
    layer = module.RotaryAttention(32, 4).to(x.device)
    return lambda: layer(x)


# DecoderLM


def model_of(solution, seed, device, dtype, *, n_layers=2, max_len=9, **options):
    model = solution.DecoderLM(11, 12, n_layers, 3, 20, max_len, **options)
    return randomize_(model, seed, 0.3).to(device, dtype)


def chain(model, tokens, positions=None, mask=None):
    """The model as a chain of torch's functions, in float64, from the parameters of `model`."""
    B, T = tokens.shape
    get = getter(model)
    rope = get("position_embedding.weight") is None
    positions = torch.arange(T) if positions is None else positions
    positions = positions.to(tokens.device)
    allowed = lower(T, tokens.device) if mask is None else lower(T, tokens.device) & mask
    x = F.embedding(tokens, get("embedding.weight"))
    if not rope:
        x = x + F.embedding(positions, get("position_embedding.weight"))
    for i in range(len(model.blocks)):
        at = getter(model, f"blocks.{i}.")
        y = F.layer_norm(x, (12,), at("norm1.weight"), at("norm1.bias"))
        x = x + by_heads(getter(model, f"blocks.{i}.attention."), y, 3, allowed, positions if rope else None)
        y = F.layer_norm(x, (12,), at("norm2.weight"), at("norm2.bias"))
        y = F.gelu(F.linear(y, at("feed_forward.up_proj.weight"), at("feed_forward.up_proj.bias")))
        x = x + F.linear(y, at("feed_forward.down_proj.weight"), at("feed_forward.down_proj.bias"))
    x = F.layer_norm(x, (12,), get("norm.weight"), get("norm.bias"))
    return F.linear(x, get("head.weight"))


KINDS = ["learned", "rope"]


def some_tokens(randint, *shape):
    return randint(0, 11, shape)


@task("DecoderLM")
def test_gpt2_small_has_124_439_808_parameters(solution):
    with torch.device("meta"):
        model = solution.DecoderLM(50257, 768, 12, 12, 3072, 1024)
    total = sum(p.numel() for p in model.parameters())
    assert_equal(total, 124_439_808, because="the sizes of GPT-2 small, its tied matrix counted once")


@task("DecoderLM")
@pytest.mark.parametrize("bias", [True, False], ids=["biases", "no biases"])
@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("positions", KINDS)
def test_how_many_parameters(solution, positions, tie, bias):
    model = solution.DecoderLM(11, 12, 3, 2, 20, 9, positions=positions, tie=tie, bias=bias)
    block = 4 * 144 + 2 * 240 + 2 * 12 + (4 * 12 + 20 + 12 + 2 * 12 if bias else 0)
    tables = 11 * 12 * (1 if tie else 2) + (9 * 12 if positions == "learned" else 0)
    expected = tables + 3 * block + (2 * 12 if bias else 12)
    total = sum(p.numel() for p in model.parameters())
    assert_equal(total, expected, because="tables, three blocks and the last norm")


@task("DecoderLM")
@pytest.mark.parametrize("T", [1, 9])
@pytest.mark.parametrize("positions", KINDS)
def test_the_logits(solution, device, dtype, seed, randint, positions, T):
    model = model_of(solution, seed, device, dtype, positions=positions)
    tokens = some_tokens(randint, 2, T)
    expected = chain(model, tokens).to(dtype).detach()
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if dtype == torch.float32 or positions == "rope" else TOLERANCE[dtype]
    assert_close(model(tokens).detach(), expected, because="embedding, blocks, norm, head", **tolerance)


@task("DecoderLM")
def test_learned_positions_by_default(solution, device, seed, randint):
    model = model_of(solution, seed, device, DOUBLE)
    tokens = some_tokens(randint, 2, 6)
    assert_equal(tuple(model.position_embedding.weight.shape), (9, 12), because="a row for each of max_len places")
    assert_close(model(tokens).detach(), chain(model, tokens).detach(), rtol=1e-8, atol=1e-10)


@task("DecoderLM")
@pytest.mark.parametrize("positions", KINDS)
def test_no_layers_and_one(solution, device, seed, randint, positions):
    tokens = some_tokens(randint, 2, 6)
    for n_layers in (0, 1):
        model = model_of(solution, seed, device, DOUBLE, positions=positions, n_layers=n_layers)
        assert_close(model(tokens).detach(), chain(model, tokens).detach(), because=f"{n_layers} layers", **LOOSE)


@task("DecoderLM")
@pytest.mark.parametrize("positions", KINDS)
def test_without_biases_and_untied(solution, device, seed, randint, positions):
    model = model_of(solution, seed, device, DOUBLE, positions=positions, tie=False, bias=False)
    tokens = some_tokens(randint, 2, 6)
    assert_close(model(tokens).detach(), chain(model, tokens).detach(), because="tie=False, bias=False", **LOOSE)


@task("DecoderLM")
@pytest.mark.parametrize("positions", KINDS)
def test_the_future_has_no_influence(solution, device, seed, randint, positions):
    model = model_of(solution, seed, device, DOUBLE, positions=positions)
    tokens = some_tokens(randint, 2, 6)
    other = tokens.clone()
    other[:, 4:] = (tokens[:, 4:] + 1) % 11
    one, two = model(tokens).detach(), model(other).detach()
    leak = (one - two)[:, :4].abs().max().item()
    assert_that(leak < 1e-12, because="other tokens at 4 and 5 leave the logits at 0 to 3 alone", value=leak)
    change = (one - two)[:, 4].abs().max().item()
    assert_that(change > 1e-6, because="the logits at 4 do see token 4", value=change > 1e-6)


@task("DecoderLM")
@pytest.mark.parametrize("positions", KINDS)
def test_given_positions(solution, device, seed, randint, positions):
    model = model_of(solution, seed, device, DOUBLE, positions=positions)
    tokens = some_tokens(randint, 2, 4)
    for places in ([5, 6, 7, 8], [3, 0, 8, 1], [[0, 1, 2, 3], [4, 6, 7, 5]]):
        places = torch.tensor(places, device=device)
        expected = chain(model, tokens, places).detach()
        because = f"positions {places.tolist()}"
        assert_close(model(tokens, positions=places).detach(), expected, because=because, **LOOSE)


@task("DecoderLM")
def test_a_shift_of_rotary_positions_changes_nothing(solution, device, seed, randint):
    model = model_of(solution, seed, device, DOUBLE, positions="rope")
    tokens = some_tokens(randint, 2, 6)
    expected = chain(model, tokens).detach()
    for shift in (3, 100):
        found = model(tokens, positions=torch.arange(6, device=device) + shift).detach()
        assert_close(found, expected, because=f"all positions shifted by {shift}", rtol=1e-3, atol=1e-3)


@task("DecoderLM")
@pytest.mark.parametrize("positions", KINDS)
def test_a_mask_comes_on_top_of_the_causal_one(solution, device, seed, randint, positions):
    model = model_of(solution, seed, device, DOUBLE, positions=positions)
    tokens = some_tokens(randint, 2, 5)
    for kind in ("causal", "padding", "per head"):
        mask = MASKS[kind](device)
        if kind == "per head":
            mask = mask | torch.eye(5, device=device).bool()
        expected = chain(model, tokens, mask=mask).detach()
        assert_close(model(tokens, mask=mask).detach(), expected, because=f"a {kind} mask", **LOOSE)


@task("DecoderLM")
@pytest.mark.parametrize("positions", KINDS)
def test_padding_on_the_left(solution, device, seed, randint, positions):
    model = model_of(solution, seed, device, DOUBLE, positions=positions)
    tokens = some_tokens(randint, 1, 5)
    expected = chain(model, tokens[:, 2:]).detach()
    places = torch.tensor([[0, 0, 0, 1, 2]], device=device)
    mask = torch.tensor([0, 0, 1, 1, 1], device=device).bool()
    found = model(tokens, positions=places, mask=mask).detach()[:, 2:]
    assert_close(found, expected, because="two hidden tokens, and positions from 0 after them", **LOOSE)


@task("DecoderLM")
def test_the_last_norm(solution, device, seed, randint):
    model = model_of(solution, seed, device, DOUBLE, tie=False)
    tokens = some_tokens(randint, 2, 6)
    with torch.no_grad():
        model.norm.weight.fill_(1.0)
        model.norm.bias.zero_()
        model.head.weight.fill_(1.0)
    found = model(tokens).detach()
    because = "after a norm the twelve numbers of a token sum to 0, and a head of ones adds them up"
    assert_close(found, torch.zeros_like(found), because=because, atol=1e-9, rtol=0)


@task("DecoderLM")
@pytest.mark.parametrize("positions", KINDS)
def test_gradients_reach_every_parameter(solution, device, seed, randint, positions):
    model = model_of(solution, seed, device, DOUBLE, positions=positions)
    tokens = some_tokens(randint, 2, 9)
    names = [name for name, _ in model.named_parameters()]
    loss = chain(model, tokens).square().sum()
    expected = torch.autograd.grad(loss, list(model.parameters()))
    found = torch.autograd.grad(model(tokens).square().sum(), list(model.parameters()))
    for name, one, two in zip(names, found, expected, strict=True):
        size = two.abs().max().item()
        assert_close(one, two, because=f"the gradient of {name}", rtol=1e-3, atol=1e-4 * max(size, 1.0))


@task("DecoderLM")
def test_tied_weights_are_one_tensor(solution):
    model = solution.DecoderLM(11, 12, 1, 3, 20, 9)
    assert_that(model.head.weight is model.embedding.weight, because="by default one matrix reads and writes tokens")
    model = solution.DecoderLM(11, 12, 1, 3, 20, 9, tie=False)
    shared = same_storage(model.head.weight.detach(), model.embedding.weight.detach())
    assert_that(not shared, because="tie=False: two matrices", value=shared)
    assert_that((model.head.weight != model.embedding.weight).any(), because="with numbers of their own")


@task("DecoderLM")
@pytest.mark.parametrize("positions", KINDS)
def test_the_names_of_its_parts(solution, positions):
    model = solution.DecoderLM(11, 12, 2, 3, 20, 9, positions=positions, bias=False)
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    expected = {"embedding.weight", "head.weight", "norm.weight"}
    expected |= {"position_embedding.weight"} if positions == "learned" else set()
    parts = [f"attention.{part}_proj" for part in "qkvo"] + ["feed_forward.up_proj", "feed_forward.down_proj"]
    for part in [*parts, "norm1", "norm2"]:
        expected |= {f"blocks.{i}.{part}.weight" for i in range(2)}
    assert_equal(sorted(names), sorted(expected), because="the parts of the docstring")
    if positions == "rope":
        assert_that(model.position_embedding is None, because="rope has no table of positions")


@task("DecoderLM")
@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_how_the_tables_start(solution, tie):
    model = solution.DecoderLM(300, 64, 1, 2, 8, 200, tie=tie)
    for name in ("embedding", "position_embedding", "head"):
        weight = getattr(model, name).weight.detach()
        mean, std = weight.mean().item(), weight.std().item()
        assert_that(0.018 < std < 0.022, because=f"{name}: N(0, 0.02^2)", value=float(f"{std:.1g}"))
        assert_that(abs(mean) < 0.002, because=f"{name}: N(0, 0.02^2)", value=float(f"{mean:.1g}"))


@task("DecoderLM")
@pytest.mark.parametrize("positions", KINDS)
def test_the_first_loss(solution, device, randint, positions):
    model = solution.DecoderLM(200, 64, 2, 2, 128, 20, positions=positions).to(device)
    tokens = randint(0, 200, (8, 21))
    logits = model(tokens[:, :-1]).detach()
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()
    because = "a new model knows nothing: log(200) = 5.3"
    assert_that(abs(loss - math.log(200)) < 0.3, because=because, value=abs(loss - math.log(200)) < 0.3)


@task("DecoderLM")
@pytest.mark.parametrize("positions", KINDS)
def test_how_the_attention_is_called(solution, device, randint, positions):
    model = solution.DecoderLM(11, 12, 2, 3, 20, 9, positions=positions).to(device)
    listener = Listener()
    for block in model.blocks:
        block.attention = listener
    places = torch.tensor([2, 3, 4, 5, 6], device=device)
    model(some_tokens(randint, 2, 5), positions=places)
    expected = ["mask"] if positions == "learned" else ["mask", "positions"]
    assert_equal([sorted(o) for _, o in listener.calls], [expected] * 2, because="block(x, mask), with rope: positions")
    for _, options in listener.calls:
        assert_equal(options["mask"].expand(5, 5), lower(5, device), because="the causal mask")
        if positions == "rope":
            assert_equal(options["positions"], places, because="the positions that were given")


@task("DecoderLM")
@pytest.mark.parametrize("positions", KINDS)
def test_too_many_tokens(solution, device, randint, positions):
    model = solution.DecoderLM(11, 12, 1, 3, 20, 9, positions=positions).to(device)
    tokens = some_tokens(randint, 2, 10)
    assert_raises(ValueError, model, tokens, mentions=["10", "9"], because="10 tokens, max_len 9")
    places = torch.zeros(10, dtype=torch.long, device=device)
    assert_raises(ValueError, model, tokens, positions=places, mentions=["10", "9"], because="10 tokens, max_len 9")


@task("DecoderLM")
@pytest.mark.parametrize("positions", KINDS)
@pytest.mark.parametrize("shape", [(1,), (2, 4), (3, 5), (1, 5)], ids=str)
def test_positions_that_do_not_fit_the_tokens(solution, device, randint, shape, positions):
    model = solution.DecoderLM(11, 12, 0, 3, 20, 9, positions=positions).to(device)
    places = torch.zeros(shape, dtype=torch.long, device=device)
    mentions = [str(shape), "(5,)", "(2, 5)"]
    because = f"positions {shape} for tokens (2, 5)"
    assert_raises(ValueError, model, some_tokens(randint, 2, 5), positions=places, mentions=mentions, because=because)


@task("DecoderLM")
@pytest.mark.parametrize("place", [9, -1])
def test_a_position_outside_of_the_table(solution, device, randint, place):
    if device.type != "cpu":
        pytest.skip("on a GPU an index out of range ends the process")
    model = solution.DecoderLM(11, 12, 1, 3, 20, 9)
    places = torch.tensor([0, 1, place])
    because = f"learned positions are 0 to 8, there is no {place}"
    assert_raises(IndexError, model, some_tokens(randint, 2, 3), positions=places, because=because)


@task("DecoderLM")
@pytest.mark.parametrize("word", ["sinusoidal", "Rope", ""])
def test_unknown_positions(solution, word):
    assert_raises(ValueError, solution.DecoderLM, 11, 12, 1, 3, 20, 9, positions=word, mentions=[word])


@task("DecoderLM")
@pytest.mark.parametrize("positions", KINDS)
def test_no_tokens(solution, device, positions):
    model = solution.DecoderLM(11, 12, 1, 3, 20, 9, positions=positions).to(device)
    found = model(torch.zeros(2, 0, dtype=torch.long, device=device)).detach()
    assert_equal(tuple(found.shape), (2, 0, 11), because="T = 0")


@task("DecoderLM")
def test_training_changes_nothing_but_the_weights(solution, device, seed, randint):
    model = model_of(solution, seed, device, DOUBLE)
    tokens = some_tokens(randint, 2, 6)
    expected = chain(model, tokens).detach()
    because = "there is no dropout in it: training and eval agree"
    assert_close(model.train()(tokens).detach(), expected, because=because, rtol=1e-8, atol=1e-10)
    assert_close(model.eval()(tokens).detach(), expected, because=because, rtol=1e-8, atol=1e-10)


@task("DecoderLM")
@pytest.mark.parametrize("positions", KINDS)
def test_a_model_in_bfloat16(solution, device, seed, randint, positions):
    model = model_of(solution, seed, device, torch.bfloat16, positions=positions, n_layers=1)
    tokens = some_tokens(randint, 2, 6)
    expected = chain(model, tokens).bfloat16().detach()
    assert_close(model(tokens).detach(), expected, because="logits in bfloat16", rtol=1e-1, atol=3e-1)


@task("DecoderLM")
@pytest.mark.parametrize("positions", KINDS)
def test_a_model_without_numbers(solution, positions):
    with torch.device("meta"):
        model = solution.DecoderLM(11, 12, 1, 3, 20, 9, positions=positions)
        tokens = torch.zeros(2, 5, dtype=torch.long)
    found = model(tokens)
    because = "positions and masks are made where the tokens are"
    assert_equal((str(found.device), tuple(found.shape)), ("meta", (2, 5, 11)), because=because)


@task("DecoderLM")
def test_the_tokens_are_left_alone(solution, device, randint):
    model = solution.DecoderLM(11, 12, 1, 3, 20, 9).to(device)
    tokens, places, mask = some_tokens(randint, 2, 5), torch.arange(5, device=device), lower(5, device)
    with unchanged(tokens, places, mask):
        model(tokens, positions=places, mask=mask)


@task("DecoderLM")
@pytest.mark.parametrize("positions", KINDS)
def test_the_price_of_the_model(solution, device, randint, positions):
    model = solution.DecoderLM(11, 12, 3, 3, 20, 9, positions=positions).to(device)
    per_token = 3 * (2 * (4 * 12**2 + 2 * 12 * 20) + 4 * 5 * 12) + 2 * 12 * 11
    because = "three blocks, and a head of 2 D V FLOPs per token"
    assert_cost(model, some_tokens(randint, 2, 5), flops=2 * 5 * per_token, because=because)


@cost_case("DecoderLM")
def model_cost(module, randint, device):
    model = module.DecoderLM(50, 32, 2, 4, 128, 16).to(device)
    tokens = randint(0, 50, (2, 16))
    return lambda: model(tokens)


# residual_norms


class Times(nn.Module):
    """A block that multiplies the stream, and drops it in training."""

    def __init__(self, factor):
        super().__init__()
        self.factor, self.dropout = factor, nn.Dropout(1.0)

    def forward(self, x, mask=None, **options):
        return self.dropout(x * self.factor)


class Toy(nn.Module):
    """Any model with blocks: it writes down how it was run, and its logits are not its stream."""

    def __init__(self, factors, dtype=torch.float32, error=None):
        super().__init__()
        self.embedding = nn.Embedding(7, 4, dtype=dtype)
        self.blocks = nn.ModuleList(Times(factor) for factor in factors)
        self.norm, self.error, self.runs = nn.Identity(), error, []

    def forward(self, tokens):
        self.runs.append((self.training, torch.is_grad_enabled()))
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, None, answer=42)
        if self.error:
            raise self.error
        return self.norm(x) * 100


def toy(seed, device, factors=(2.0, -0.5, 3.0), **options):
    model = randomize_(Toy(factors, **options), seed).to(device)
    with torch.no_grad():
        model.embedding.weight *= torch.arange(1, 8, device=device)[:, None]  # rows of different sizes
    return model


def sizes_of_the_stream(model, tokens, factors=(2.0, -0.5, 3.0)):
    x = model.embedding.weight.detach().double()[tokens]
    sizes = [x.square().mean().sqrt()]
    for factor in factors:
        sizes.append(sizes[-1] * abs(factor))
    return torch.stack(sizes)


@task("residual_norms")
@pytest.mark.parametrize("factors", [(2.0, -0.5, 3.0), (5.0,), (1.0, 2.0, 3.0, 4.0, 5.0)], ids=str)
def test_before_the_first_block_and_after_each(solution, device, seed, randint, factors):
    model, tokens = toy(seed, device, factors), randint(0, 7, (2, 5))
    expected = sizes_of_the_stream(model, tokens, factors).float()
    found = solution.residual_norms(model, tokens)
    assert_close(found, expected, because=f"blocks that multiply by {factors}", rtol=1e-5)


@task("residual_norms")
def test_it_is_one_mean_over_all_squares(solution, device, seed):
    model, tokens = toy(seed, device), torch.tensor([[0, 6], [6, 6]], device=device)
    with torch.no_grad():
        model.embedding.weight[0] = torch.tensor([0.0, 0.0, 0.0, 4.0])
        model.embedding.weight[6] = 0.0
    expected = torch.tensor([1.0, 2.0, 1.0, 3.0])
    found = solution.residual_norms(model, tokens)
    assert_close(found, expected, because="one 4 among 16 numbers: sqrt(16 / 16)", rtol=1e-5)


@task("residual_norms")
def test_post_norm_pins_the_stream(solution, reference, device, randint):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = reference.DecoderLM(30, 32, 6, 2, 64, 16)
        for i in range(6):
            model.blocks[i] = reference.TransformerBlock(32, 2, 64, norm_first=False)
    model.to(device)
    found = solution.residual_norms(model, randint(0, 30, (4, 16)))
    assert_close(found[1:], torch.ones(6), because="each block ends in a norm", rtol=0, atol=5e-3)
    assert_that(found[0] < 0.1, because="what comes in are embeddings of size 0.03", value=float(f"{found[0]:.1g}"))


@task("residual_norms")
def test_pre_norm_lets_the_stream_grow(solution, reference, device, randint):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = reference.DecoderLM(30, 32, 32, 2, 64, 8).to(device)
    found = solution.residual_norms(model, randint(0, 30, (2, 8)))
    assert_equal(tuple(found.shape), (33,), because="32 layers")
    ratio = (found[32] / found[8]).item()
    because = "four times as many layers, about twice the size: branches add up like independent numbers"
    assert_that(1.4 < ratio < 3.0, because=because, value=float(f"{ratio:.1g}"))


@task("residual_norms")
def test_it_runs_once_in_eval_mode_without_a_graph(solution, device, seed, randint):
    model = toy(seed, device).train()
    found = solution.residual_norms(model, randint(0, 7, (2, 5)))
    assert_equal(model.runs, [(False, False)], because="one run, not in training, no gradients")
    assert_that(not found.requires_grad, because="the result has no graph")


@task("residual_norms")
def test_every_module_is_in_its_mode_again(solution, device, seed, randint):
    model = toy(seed, device).train()
    model.blocks[1].eval()
    model.norm.eval()
    expected = [module.training for module in model.modules()]
    solution.residual_norms(model, randint(0, 7, (2, 5)))
    found = [module.training for module in model.modules()]
    assert_equal(found, expected, because="some were in training mode and some were not")


@task("residual_norms")
def test_modes_of_a_model_that_raises(solution, device, seed, randint):
    model = toy(seed, device, error=KeyError("out of luck")).train()
    model.blocks[1].eval()
    expected = [module.training for module in model.modules()]
    assert_raises(KeyError, solution.residual_norms, model, randint(0, 7, (2, 5)), because="its error comes through")
    found = [module.training for module in model.modules()]
    assert_equal(found, expected, because="modes are restored after an error, too")


def hooks_on(model):
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return sum(len(getattr(module, table)) for module in model.modules() for table in tables)


@task("residual_norms")
@pytest.mark.parametrize("error", [None, KeyError("out of luck")], ids=["runs", "raises"])
def test_no_hook_is_left(solution, device, seed, randint, error):
    model, tokens = toy(seed, device, error=error), randint(0, 7, (2, 5))
    if error is None:
        solution.residual_norms(model, tokens)
    else:
        assert_raises(KeyError, solution.residual_norms, model, tokens)
    assert_equal(hooks_on(model), 0, because="what was attached is taken off again")


@task("residual_norms")
def test_the_numbers_are_those_of_one_run(solution, device, seed, randint):
    model, tokens = toy(seed, device), randint(0, 7, (2, 5))
    expected = sizes_of_the_stream(model, tokens).float()
    solution.residual_norms(model, tokens)
    assert_close(solution.residual_norms(model, tokens), expected, because="a second call", rtol=1e-5)


@task("residual_norms")
@pytest.mark.parametrize(
    "given, wanted", [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (DOUBLE, DOUBLE)]
)
def test_the_precision_of_the_norms(solution, device, seed, randint, given, wanted):
    model, tokens = toy(seed, device).to(given), randint(0, 7, (2, 5))
    with torch.no_grad():
        model.embedding.weight.mul_(300)
    expected = sizes_of_the_stream(model, tokens).to(wanted)
    found = solution.residual_norms(model, tokens)
    tolerance = {"rtol": 1e-9} if given == DOUBLE else {"rtol": 2e-2}
    assert_close(found, expected, because=f"a {given} stream of numbers around 300", **tolerance)


@task("residual_norms")
def test_the_model_is_not_changed(solution, device, seed, randint):
    model, tokens = toy(seed, device), randint(0, 7, (2, 5))
    with unchanged(tokens, *model.parameters()):
        solution.residual_norms(model, tokens)


@cost_case("residual_norms")
def norms_cost(module, seed, device, randint):
    model, tokens = toy(seed, device), randint(0, 7, (2, 5))
    return lambda: module.residual_norms(model, tokens)


# train_tiny_lm


class Bigram(nn.Module):
    """Scores for the next token from this token alone; it writes down what it is called with."""

    def __init__(self, vocab, factor):
        super().__init__()
        self.table, self.factor, self.seen = nn.Parameter(torch.zeros(vocab, vocab)), factor, []

    def forward(self, tokens):
        self.seen.append((tokens.detach().clone(), self.training))
        return self.table[tokens] * self.factor


class Plain:
    """An optimizer that goes down the gradient."""

    def __init__(self, model, lr):
        self.parameters, self.lr = list(model.parameters()), lr

    def zero_grad(self, *args, **kwargs):
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self, *args, **kwargs):
        for parameter in self.parameters:
            parameter -= self.lr * parameter.grad


class Adaptive(Plain):
    """Adam, written out."""

    def __init__(self, model, lr):
        super().__init__(model, lr)
        self.t, self.m = 0, [torch.zeros_like(p) for p in self.parameters]
        self.v = [torch.zeros_like(p) for p in self.parameters]

    @torch.no_grad()
    def step(self, *args, **kwargs):
        self.t += 1
        for p, m, v in zip(self.parameters, self.m, self.v, strict=True):
            m.lerp_(p.grad, 0.1)
            v.lerp_(p.grad.square(), 0.01)
            p -= self.lr * (m / (1 - 0.9**self.t)) / ((v / (1 - 0.99**self.t)).sqrt() + 1e-8)


def bigram_losses(tokens, vocab, factor, lr, steps, batch, context, generator):
    """The same training, with the gradient of the table by hand; (losses, table)."""
    table, losses = torch.zeros(vocab, vocab, dtype=DOUBLE), []
    tokens = tokens.cpu()
    for _ in range(steps):
        starts = torch.randint(len(tokens) - context, (batch,), generator=generator).tolist()
        pairs = [(int(tokens[s + i]), int(tokens[s + i + 1])) for s in starts for i in range(context)]
        grad, loss = torch.zeros_like(table), 0.0
        for one, two in pairs:
            probabilities = torch.softmax(table[one] * factor, -1)
            loss -= math.log(probabilities[two]) / len(pairs)
            probabilities[two] -= 1
            grad[one] += probabilities * factor / len(pairs)
        norm = grad.norm().item()
        table -= lr * grad * (1 / norm if norm > 1 else 1.0)
        losses.append(loss)
    return losses, table


def start(seed, device, randint, n=40, vocab=5, factor=1.0):
    model = Bigram(vocab, factor).to(device)
    return model, randint(0, vocab, (n,)), torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)


@task("train_tiny_lm")
@pytest.mark.parametrize("factor", [1.0, 50.0], ids=["small gradients", "clipped gradients"])
def test_the_loss_of_each_step(solution, device, seed, randint, factor):
    model, tokens, mine, theirs = start(seed, device, randint, factor=factor)
    lr = 2.0 if factor == 1 else 0.01
    expected, table = bigram_losses(tokens, 5, factor, lr, 6, 3, 4, mine)
    optimizer = Plain(model, lr)
    found = solution.train_tiny_lm(model, tokens, optimizer, steps=6, batch=3, context=4, generator=theirs)
    assert_equal([type(loss) for loss in found], [float] * 6, because="six steps, six floats")
    wanted = torch.tensor(expected)
    because = "windows, targets, mean, clipping, update: step by step"
    assert_close(torch.tensor(found), wanted, because=because, rtol=1e-3, atol=1e-4)
    assert_close(model.table.detach(), table.float(), because="the weights at the end", rtol=1e-3, atol=1e-4)


@task("train_tiny_lm")
def test_the_defaults(solution, device, seed, randint):
    model, tokens, mine, theirs = start(seed, device, randint, n=60)
    solution.train_tiny_lm(model, tokens, Plain(model, 1.0), steps=2, generator=theirs)
    assert_equal([tuple(x.shape) for x, _ in model.seen], [(16, 32)] * 2, because="16 windows of 32 tokens")
    starts = torch.randint(28, (16,), generator=mine)
    expected = torch.stack([tokens[s : s + 32] for s in starts.tolist()])
    assert_equal(model.seen[0][0], expected, because="neighboring tokens, from where the generator says")


@task("train_tiny_lm")
def test_the_only_window(solution, device, seed, randint):
    model, tokens, _, generator = start(seed, device, randint, n=5)
    solution.train_tiny_lm(model, tokens, Plain(model, 1.0), steps=1, batch=2, context=4, generator=generator)
    because = "five tokens have one window of four and a token after it"
    assert_equal(model.seen[0][0], tokens[:4].expand(2, 4), because=because)


@task("train_tiny_lm")
@pytest.mark.parametrize("n", [4, 3, 0])
def test_a_text_without_a_window(solution, device, seed, randint, n):
    model, tokens, _, generator = start(seed, device, randint, n=n)
    error = assert_raises(
        ValueError,
        lambda: solution.train_tiny_lm(
            model, tokens, Plain(model, 1.0), steps=1, batch=2, context=4, generator=generator
        ),
        because=f"{n} tokens, context 4",
    )
    assert_that(str(n) in str(error) and "4" in str(error), because="both numbers are in the message", value=str(error))


@task("train_tiny_lm")
def test_the_model_is_in_training_mode(solution, device, seed, randint):
    model, tokens, _, generator = start(seed, device, randint)
    model.eval()
    solution.train_tiny_lm(model, tokens, Plain(model, 1.0), steps=2, batch=2, context=4, generator=generator)
    assert_equal([training for _, training in model.seen], [True, True], because="steps are made in training mode")


@task("train_tiny_lm")
def test_no_steps(solution, device, seed, randint):
    model, tokens, _, generator = start(seed, device, randint)
    found = solution.train_tiny_lm(model, tokens, Plain(model, 1.0), steps=0, batch=2, context=4, generator=generator)
    assert_equal(found, [], because="no steps, no losses")


@task("train_tiny_lm")
def test_only_the_generator_is_used(solution, device, seed, randint):
    model, tokens, _, generator = start(seed, device, randint)
    with global_rng_untouched(), unchanged(tokens):
        solution.train_tiny_lm(model, tokens, Plain(model, 1.0), steps=2, batch=2, context=4, generator=generator)


@task("train_tiny_lm")
def test_two_thousand_letters(solution, reference, device, seed, data_dir):
    text = (data_dir / "text.txt").read_text(encoding="utf-8")
    letters = sorted(set(text))
    tokens = torch.tensor([letters.index(letter) for letter in text], device=device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = reference.DecoderLM(len(letters), 32, 1, 2, 64, 16, positions="rope").to(device)
    optimizer, generator = Adaptive(model, 1e-2), torch.Generator().manual_seed(seed)
    found = solution.train_tiny_lm(model, tokens, optimizer, steps=60, batch=16, context=16, generator=generator)
    first, last = found[0], sum(found[-10:]) / 10
    assert_that(first > 3.0, because="it begins with log of the number of letters, 3.6", value=float(f"{first:.1g}"))
    because = "after 60 steps it knows which letters follow which: below 2.6, and letter frequencies alone give 2.88"
    assert_that(last < 2.6, because=because, value=float(f"{last:.1g}"))
    assert_that(last > 1.0, because="this little training cannot know the text by heart", value=float(f"{last:.1g}"))


# ReversibleStack


class Branch(nn.Module):
    """A small network that counts its calls."""

    def __init__(self, dim):
        super().__init__()
        self.one, self.two, self.calls = nn.Linear(dim, 5), nn.Linear(5, dim), 0

    def forward(self, x):
        self.calls += 1
        return self.two(torch.tanh(self.one(x)))


class Wave(nn.Module):
    """A branch without parameters."""

    def forward(self, x):
        return (3 * x).sin() * x.cos()


def pairs(seed, device, dtype=DOUBLE, depth=3, dim=4):
    layers = nn.ModuleList(Branch(dim) for _ in range(2 * depth))
    randomize_(layers, seed).to(device, dtype)
    return [(layers[2 * i], layers[2 * i + 1]) for i in range(depth)]


def one_by_one(layers, x1, x2):
    for f, g in layers:
        x1 = x1 + f(x2)
        x2 = x2 + g(x1)
    return x1, x2


def streams(randn, *shape, dtype=DOUBLE):
    return randn(*shape, dtype=dtype), randn(*shape, dtype=dtype)


@task("ReversibleStack")
@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("lead", [(2,), (2, 3), ()], ids=str)
def test_the_layers_one_by_one(solution, device, seed, randn, lead, depth):
    layers = pairs(seed, device, depth=depth)
    x1, x2 = streams(randn, *lead, 4)
    expected = [y.detach() for y in one_by_one(layers, x1, x2)]
    found = solution.ReversibleStack(layers)(x1, x2)
    assert_equal(len(found), 2, because="two streams come out")
    for name, y, wanted in zip(("y1", "y2"), found, expected, strict=True):
        assert_close(y.detach(), wanted, because=f"{name}: y1 = x1 + f(x2), y2 = x2 + g(y1)", rtol=1e-9, atol=1e-11)


@task("ReversibleStack")
@pytest.mark.parametrize("depth", [1, 3])
def test_its_inverse(solution, device, seed, randn, depth):
    layers = pairs(seed, device, depth=depth)
    x1, x2 = streams(randn, 2, 4)
    y1, y2 = (y.detach() for y in one_by_one(layers, x1, x2))
    found = solution.ReversibleStack(layers).inverse(y1, y2)
    for name, x, wanted in zip(("x1", "x2"), found, (x1, x2), strict=True):
        assert_close(x, wanted, because=f"{name} from the outputs", rtol=1e-8, atol=1e-10)
        assert_that(not x.requires_grad, because="the inverse has no graph")


def gradients_of_streams(call, x1, x2, parameters, weights):
    x1, x2 = x1.clone().requires_grad_(), x2.clone().requires_grad_()
    y1, y2 = call(x1, x2)
    loss = sum((y * w).sum() for y, w in zip((y1, y2), weights, strict=True) if w is not None)
    return torch.autograd.grad(loss, [x1, x2, *parameters], allow_unused=True)


@task("ReversibleStack")
@pytest.mark.parametrize("used", ["both", "y1", "y2"])
@pytest.mark.parametrize("depth", [1, 3])
def test_gradients_are_those_of_the_plain_loop(solution, device, seed, randn, depth, used):
    layers = pairs(seed, device, depth=depth)
    x1, x2 = streams(randn, 2, 3, 4)
    parameters = [p for f, g in layers for p in (*f.parameters(), *g.parameters())]
    weights = [randn(2, 3, 4, dtype=DOUBLE) if used in ("both", name) else None for name in ("y1", "y2")]
    expected = gradients_of_streams(lambda a, b: one_by_one(layers, a, b), x1, x2, parameters, weights)
    stack = solution.ReversibleStack(layers)
    found = gradients_of_streams(stack, x1, x2, parameters, weights)
    for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        theirs = torch.zeros_like(parameters[i - 2]) if theirs is None else theirs
        ours = torch.zeros_like(theirs) if ours is None else ours
        name = f"x{i + 1}" if i < 2 else f"parameter {i - 2}"
        assert_close(ours, theirs, because=f"the gradient of {name}", rtol=1e-7, atol=1e-9)


@task("ReversibleStack")
def test_layers_that_share_a_module(solution, device, seed, randn):
    (f, g), (h, _) = pairs(seed, device, depth=2)
    layers = [(f, g), (f, h), (h, f)]
    x1, x2 = streams(randn, 2, 4)
    parameters = [*f.parameters(), *g.parameters(), *h.parameters()]
    weights = streams(randn, 2, 4)
    expected = gradients_of_streams(lambda a, b: one_by_one(layers, a, b), x1, x2, parameters, weights)
    found = gradients_of_streams(solution.ReversibleStack(layers), x1, x2, parameters, weights)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, because="a module in several places adds up its gradients", rtol=1e-7, atol=1e-9)


@task("ReversibleStack")
def test_frozen_parameters_get_none(solution, device, seed, randn):
    layers = pairs(seed, device, depth=2)
    layers[0][0].one.weight.requires_grad_(False)
    layers[1][1].requires_grad_(False)
    x1, x2 = streams(randn, 2, 4)
    parameters = [p for f, g in layers for p in (*f.parameters(), *g.parameters()) if p.requires_grad]
    weights = streams(randn, 2, 4)
    expected = gradients_of_streams(lambda a, b: one_by_one(layers, a, b), x1, x2, parameters, weights)
    stack = solution.ReversibleStack(layers)
    found = gradients_of_streams(stack, x1, x2, parameters, weights)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, because="the others get theirs as before", rtol=1e-7, atol=1e-9)
    sum(y.sum() for y in stack(x1, x2)).backward()
    frozen = [p.grad is None for p in stack.parameters() if not p.requires_grad]
    assert_equal(frozen, [True] * 5, because="frozen parameters have no gradient")


@task("ReversibleStack")
def test_inputs_that_need_no_gradient(solution, device, seed, randn):
    layers = pairs(seed, device)
    x1, x2 = streams(randn, 2, 4)
    parameters = [p for f, g in layers for p in (*f.parameters(), *g.parameters())]
    loss = sum(y.square().sum() for y in one_by_one(layers, x1, x2))
    expected = torch.autograd.grad(loss, parameters)
    y1, y2 = solution.ReversibleStack(layers)(x1, x2)
    found = torch.autograd.grad(y1.square().sum() + y2.square().sum(), parameters)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, because="parameters alone are trained", rtol=1e-7, atol=1e-9)


@task("ReversibleStack")
def test_each_branch_runs_once_each_way(solution, device, seed, randn):
    layers = pairs(seed, device)
    stack = solution.ReversibleStack(layers)
    x1, x2 = streams(randn, 2, 4)
    y1, y2 = stack(x1.requires_grad_(), x2)
    assert_equal([b.calls for pair in layers for b in pair], [1] * 6, because="forward calls each branch once")
    (y1 * y2).sum().backward()
    assert_equal([b.calls for pair in layers for b in pair], [2] * 6, because="and backward once more")


@task("ReversibleStack")
def test_memory_does_not_grow_with_depth(solution, device, randn):
    saved = []
    for depth in (2, 12):
        stack = solution.ReversibleStack([(Wave(), Wave()) for _ in range(depth)])
        x1, x2 = (x.requires_grad_() for x in streams(randn, 10, 8))

        def run(stack=stack, x1=x1, x2=x2):
            y1, y2 = stack(x1, x2)
            (y1.sum() + y2.sum()).backward()

        saved.append(measure(run)[1].saved_bytes)
    because = "what is saved at one time, backward included, is the same for 2 layers and for 12"
    assert_that(saved[1] <= saved[0], because=because, value=saved)


@task("ReversibleStack")
def test_after_forward_only_the_result_is_kept(solution, device, randn):
    stack = solution.ReversibleStack([(Wave(), Wave()) for _ in range(4)])
    x1, x2 = (x.requires_grad_() for x in streams(randn, 10, 8))
    assert_cost(stack, x1, x2, max_saved_bytes=2 * 10 * 8 * 8, because="y1 and y2, and nothing else")


@task("ReversibleStack")
def test_layers_from_a_generator(solution, device, seed, randn):
    layers = pairs(seed, device)
    x1, x2 = streams(randn, 2, 4)
    expected = [y.detach() for y in one_by_one(layers, x1, x2)]
    stack = solution.ReversibleStack(pair for pair in layers)
    assert_equal((len(stack.f), len(stack.g)), (3, 3), because="f and g are lists of modules")
    shapes = sorted(name for name, _ in stack.named_parameters())[:2]
    assert_equal(shapes, ["f.0.one.bias", "f.0.one.weight"], because="their parameters are found")
    found = [y.detach() for y in stack(x1, x2)]
    assert_close(found[0], expected[0], because="y1", rtol=1e-9, atol=1e-11)


@task("ReversibleStack")
def test_streams_are_left_alone(solution, device, seed, randn):
    stack = solution.ReversibleStack(pairs(seed, device))
    x1, x2 = streams(randn, 2, 4)
    with unchanged(x1, x2):
        y1, y2 = stack(x1, x2)
        stack.inverse(y1.detach(), y2.detach())


@task("ReversibleStack")
def test_the_result_may_be_used_without_a_graph(solution, device, seed, randn):
    layers = pairs(seed, device)
    x1, x2 = streams(randn, 2, 4)
    with torch.no_grad():
        expected = one_by_one(layers, x1, x2)
        found = solution.ReversibleStack(layers)(x1, x2)
    assert_close(found[1], expected[1], because="y2 under no_grad", rtol=1e-9, atol=1e-11)
    assert_that(not found[1].requires_grad, because="no graph was asked for")


@task("ReversibleStack")
@pytest.mark.parametrize("one, two", [((2, 4), (3, 4)), ((2, 4), (1, 4)), ((4,), (2, 4))], ids=str)
def test_streams_of_different_shapes(solution, device, seed, randn, one, two):
    stack = solution.ReversibleStack(pairs(seed, device))
    x1, x2 = randn(*one, dtype=DOUBLE), randn(*two, dtype=DOUBLE)
    assert_raises(ValueError, stack, x1, x2, mentions=[str(one), str(two)], because="the streams have one shape")


@cost_case("ReversibleStack")
def reversible_cost(module, seed, device, randn):
    stack = module.ReversibleStack(pairs(seed, device, depth=8))
    x1, x2 = (x.requires_grad_() for x in streams(randn, 10, 4))

    def run():
        y1, y2 = stack(x1, x2)
        (y1 * y2).sum().backward()

    return run
