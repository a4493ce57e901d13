"""Day 18: what the tasks promise."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

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
    same_storage,
    task,
    unchanged,
    unmetered,
)
from reference.day18_multi_head import MultiHeadAttention as Module

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
LOOSE = {torch.float32: {"rtol": 1e-4, "atol": 1e-4}, torch.float64: {"rtol": 1e-9, "atol": 1e-11}}
WIDTHS = [(1, 4, 4), (2, 5, 3), (8, 3, 2), (3, 4, 4), (4, 1, 1), (3, 16, 2)]  # heads, width of q and k, width of v


def fill(module, randn, device, dtype=torch.float64):
    """The module with random parameters, which its constructor has no part in."""
    module = module.to(device=device, dtype=dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(randn(*parameter.shape, dtype=torch.float64) * 0.5)
    return module


def state_of(module):
    """Copies of the parameters by name, which nobody else can touch; no bias is None."""
    state = {f"{name}.bias": None for name in PROJECTIONS}
    return state | {name: value.detach().clone() for name, value in module.state_dict().items()}


def head_by_head(state, h, x, context=None, mask=None):
    """What each head adds to the output, (B, H, T, D): torch's attention of one head, in a loop; differentiable."""
    context = x if context is None else context
    B, T, S = x.shape[0], x.shape[1], context.shape[1]
    if mask is not None:
        mask = mask.expand(B, h, T, S)
    q, k, v = (
        F.linear(y, state[f"{name}.weight"], state[f"{name}.bias"]).chunk(h, -1)
        for name, y in (("q_proj", x), ("k_proj", context), ("v_proj", context))
    )
    parts = []
    for i, columns in enumerate(state["o_proj.weight"].chunk(h, 1)):
        width = q[i].shape[-1]
        scores = torch.einsum("bid,bjd->bij", q[i], k[i]) / width**0.5
        if mask is not None:
            scores = scores.masked_fill(~mask[:, i], -1e30)
        weights = scores.softmax(-1)
        if mask is not None:
            weights = weights * mask[:, i]
        parts.append(torch.einsum("bij,bjc,oc->bio", weights, v[i], columns))
    return torch.stack(parts, 1)


def whole(state, h, x, context=None, mask=None):
    """The output, from the same loop."""
    out = head_by_head(state, h, x, context, mask).sum(1)
    return out if state["o_proj.bias"] is None else out + state["o_proj.bias"]


def some_mask(rand, *shape):
    """A random mask in which each query may attend to something, and not to everything."""
    mask = rand(*shape) < 0.5
    mask[..., 1] = True
    mask[..., 0] = False
    return mask


def names_and_shapes(module):
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def assert_own_parameters(found, *sources):
    """Leaves that can be trained, without memory in common with the sources."""
    parameters = list(found.parameters())
    kinds = {(type(p) is nn.Parameter, p.is_leaf, p.requires_grad) for p in parameters}
    assert_equal(kinds, {(True, True, True)}, because="nn.Parameter, a leaf, trainable: what an optimizer can use")
    theirs = [p for source in sources for p in source.parameters()]
    shared = sum(same_storage(ours, other) for ours in parameters for other in theirs)
    assert_equal(shared, 0, because="how many parameters share memory with those that they were made of")


def assert_same_state(found, expected, because, **tolerances):
    assert_equal(names_and_shapes(found), {n: tuple(v.shape) for n, v in expected.items()}, because="the state dict")
    for name, value in expected.items():
        assert_close(found.state_dict()[name].detach(), value, because=f"{because} ({name})", **tolerances)


# head_widths


@task("head_widths")
@pytest.mark.parametrize(("d_model", "n_heads"), [(8, 1), (8, 2), (12, 3), (6, 6), (768, 12)])
def test_heads_share_the_width_of_the_model(solution, d_model, n_heads):
    expected = (d_model // n_heads, d_model // n_heads)
    assert_equal(solution.head_widths(d_model, n_heads), expected, because=f"{d_model} shared by {n_heads} heads")


@task("head_widths")
@pytest.mark.parametrize(("d_model", "n_heads"), [(10, 3), (4, 8), (7, 2)])
def test_a_width_that_does_not_divide_is_refused(solution, d_model, n_heads):
    assert_raises(
        ValueError,
        solution.head_widths,
        d_model,
        n_heads,
        mentions=[str(d_model), str(n_heads)],
        because=f"{d_model} / {n_heads} is no whole number",
    )
    assert_raises(ValueError, solution.head_widths, d_model, n_heads, None, 5, mentions=[str(d_model), str(n_heads)])


@task("head_widths")
@pytest.mark.parametrize(("d_model", "n_heads", "d_head"), [(8, 2, 3), (10, 3, 4), (5120, 128, 192), (4, 8, 1)])
def test_a_width_that_is_given_is_taken(solution, d_model, n_heads, d_head):
    expected = (d_head, d_head)
    assert_equal(solution.head_widths(d_model, n_heads, d_head), expected, because=f"d_head={d_head} was asked for")


@task("head_widths")
def test_values_may_be_of_another_width(solution):
    assert_equal(solution.head_widths(8, 2, d_v=3), (4, 3), because="d_v=3, and d_head from 8 / 2")
    assert_equal(solution.head_widths(8, 2, 5, 3), (5, 3), because="both were asked for")
    assert_equal(solution.head_widths(10, 3, 5, 7), (5, 7), because="both were asked for")


@task("head_widths")
def test_widths_are_ints(solution):
    kinds = [type(width).__name__ for width in solution.head_widths(12, 3)]
    assert_equal(kinds, ["int", "int"], because="a width is a count")


@task("head_widths")
@pytest.mark.parametrize("n_heads", [0, -2])
@pytest.mark.parametrize("d_head", [None, 4])
def test_at_least_one_head(solution, n_heads, d_head):
    assert_raises(ValueError, solution.head_widths, 8, n_heads, d_head, mentions=[str(n_heads)])


# mha_costs

SIZES = [(12, 3, 4, 4, 5), (12, 1, 12, 12, 7), (10, 4, 3, 6, 5), (8, 2, 5, 1, 1), (16, 8, 2, 2, 4), (6, 5, 6, 9, 3)]


@task("mha_costs")
def test_the_costs_are_two_ints(solution):
    found = solution.mha_costs(12, 3, 4, 5, 6, True)
    kinds = {name: type(value).__name__ for name, value in found.items()}
    assert_equal(kinds, {"params": "int", "flops": "int"}, because="the keys, and numbers without a fraction")


@task("mha_costs")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("d_model", "n_heads", "d_head", "d_v", "t"), SIZES)
def test_parameters_are_those_of_four_linear_layers(solution, d_model, n_heads, d_head, d_v, t, bias):
    out = [n_heads * d_head, n_heads * d_head, n_heads * d_v]
    layers = [nn.Linear(d_model, width, bias) for width in out] + [nn.Linear(n_heads * d_v, d_model, bias)]
    expected = sum(p.numel() for layer in layers for p in layer.parameters())
    found = solution.mha_costs(d_model, n_heads, d_head, d_v, t, bias)
    assert_equal(found["params"], expected, because=f"q, k, v and o, bias={bias}")


@task("mha_costs")
@pytest.mark.parametrize("bias", [False, True])
def test_parameters_of_torchs_layer(solution, bias):
    theirs = nn.MultiheadAttention(24, 4, bias=bias)
    expected = sum(p.numel() for p in theirs.parameters())
    found = solution.mha_costs(24, 4, 6, 6, 10, bias)
    assert_equal(found["params"], expected, because=f"nn.MultiheadAttention(24, 4, bias={bias})")


@task("mha_costs")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("d_model", "n_heads", "d_head", "d_v", "t"), SIZES)
def test_flops_are_those_that_the_meter_counts(solution, d_model, n_heads, d_head, d_v, t, bias):
    x, q, v = torch.ones(t, d_model), torch.ones(n_heads * d_head, d_model), torch.ones(n_heads * d_v, d_model)
    queries, keys = torch.ones(n_heads, t, d_head), torch.ones(n_heads, d_head, t)
    values, weights = torch.ones(n_heads, t, d_v), torch.ones(n_heads, t, t)

    def products():
        return x @ q.T, x @ q.T, x @ v.T, queries @ keys, weights @ values, torch.ones(t, n_heads * d_v) @ v

    _, cost = measure(products)
    found = solution.mha_costs(d_model, n_heads, d_head, d_v, t, bias)
    assert_equal(found["flops"], cost.flops, because=f"four projections of {t} tokens, scores and mixtures")


@task("mha_costs")
def test_no_tokens_cost_nothing(solution):
    assert_equal(solution.mha_costs(12, 3, 4, 5, 0, True)["flops"], 0, because="no tokens")


# MultiHeadAttention


@task("MultiHeadAttention")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("d_context", [None, 7])
@pytest.mark.parametrize(("h", "d_head", "d_v"), WIDTHS)
def test_it_holds_four_projections(solution, h, d_head, d_v, bias, d_context):
    module = solution.MultiHeadAttention(10, h, d_head=d_head, d_v=d_v, bias=bias, d_context=d_context)
    wide = d_context or 10
    shapes = [(h * d_head, 10), (h * d_head, wide), (h * d_v, wide), (10, h * d_v)]
    expected = {f"{name}.weight": shape for name, shape in zip(PROJECTIONS, shapes, strict=True)}
    if bias:
        expected |= {f"{name}.bias": shape[:1] for name, shape in zip(PROJECTIONS, shapes, strict=True)}
    assert_equal(names_and_shapes(module), expected, because="the state dict")
    found = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert_equal(found, set(expected), because="all of it is trained")


@task("MultiHeadAttention")
def test_what_is_left_out_has_defaults(solution):
    module = solution.MultiHeadAttention(12, 3)
    expected = {f"{name}.weight": (12, 12) for name in PROJECTIONS}
    assert_equal(names_and_shapes(module), expected, because="12 / 3 = 4 wide heads, no biases")
    assert_equal((module.n_heads, module.d_head, module.d_v), (3, 4, 4), because="n_heads, d_head, d_v")
    module = solution.MultiHeadAttention(10, 3, d_head=5)
    assert_equal((module.n_heads, module.d_head, module.d_v), (3, 5, 5), because="values are as wide as queries")
    module = solution.MultiHeadAttention(12, 2, d_v=5)
    assert_equal((module.n_heads, module.d_head, module.d_v), (2, 6, 5), because="d_v=5 alone was asked for")


@task("MultiHeadAttention")
def test_heads_that_do_not_divide_the_model_are_refused(solution):
    assert_raises(ValueError, solution.MultiHeadAttention, 10, 3, mentions=["10", "3"], because="10 / 3")
    assert_raises(ValueError, solution.MultiHeadAttention, 10, 0, d_head=4, mentions=["0"], because="no heads")


def torchs_state(theirs):
    """The parameters of nn.MultiheadAttention by the names of this day."""
    state = dict(zip((f"{name}.weight" for name in PROJECTIONS[:3]), theirs.in_proj_weight.chunk(3), strict=True))
    state["o_proj.weight"] = theirs.out_proj.weight
    if theirs.in_proj_bias is not None:
        biases = [*theirs.in_proj_bias.chunk(3), theirs.out_proj.bias]
        state |= dict(zip((f"{name}.bias" for name in PROJECTIONS), biases, strict=True))
    return {name: value.detach().clone() for name, value in state.items()}


@task("MultiHeadAttention")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("h", [1, 2, 8])
def test_it_is_torchs_layer(solution, randn, device, dtype, h, bias):
    theirs = fill(nn.MultiheadAttention(16, h, bias=bias, batch_first=True), randn, device, dtype)
    x, state = randn(3, 5, 16, dtype=dtype), torchs_state(theirs)
    expected = theirs(x, x, x, need_weights=False)[0].detach()
    module = solution.MultiHeadAttention(16, h, bias=bias).to(device=device, dtype=dtype)
    module.load_state_dict(state)
    because = f"nn.MultiheadAttention(16, {h}, bias={bias}) with the same weights"
    assert_close(module(x).detach(), expected, because=because, **LOOSE[dtype])


@task("MultiHeadAttention")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("h", "d_head", "d_v"), WIDTHS)
def test_all_heads_at_once_are_each_head_alone(solution, randn, device, dtype, h, d_head, d_v, bias):
    module = solution.MultiHeadAttention(10, h, d_head=d_head, d_v=d_v, bias=bias)
    module = fill(module, randn, device, dtype)
    x = randn(2, 5, 10, dtype=dtype)
    expected = whole(state_of(module), h, x)
    because = f"{h} heads, queries {d_head} wide, values {d_v}, one after the other"
    assert_close(module(x).detach(), expected, because=because, **LOOSE[dtype])


@task("MultiHeadAttention")
def test_equal_sizes_hide_no_axis_of_the_heads(solution, randn, rand, device):
    module = fill(solution.MultiHeadAttention(4, 4, d_head=4, d_v=4), randn, device)
    x, context = randn(4, 4, 4, dtype=torch.float64), randn(4, 4, 4, dtype=torch.float64)
    mask = some_mask(rand, 4, 4, 4, 4)
    expected = whole(state_of(module), 4, x, context, mask)
    assert_close(module(x, context, mask).detach(), expected, because="all sizes are 4: no shape shows a mix-up")


@task("MultiHeadAttention")
@pytest.mark.parametrize("s", [1, 3, 5])
@pytest.mark.parametrize("d_context", [None, 7])
def test_keys_and_values_come_from_the_context(solution, randn, device, s, d_context):
    module = fill(solution.MultiHeadAttention(12, 3, bias=True, d_context=d_context), randn, device)
    x, context = randn(2, 5, 12, dtype=torch.float64), randn(2, s, d_context or 12, dtype=torch.float64)
    expected = whole(state_of(module), 3, x, context)
    assert_close(module(x, context).detach(), expected, because=f"5 queries from x, {s} keys and values from context")


MASKS = [(4, 5), (2, 3, 4, 5), (3, 4, 5), (3, 1, 5), (2, 1, 1, 5), (2, 1, 4, 5), (1, 3, 4, 5), (5,)]


@task("MultiHeadAttention")
@pytest.mark.parametrize("shape", MASKS, ids=str)
def test_a_mask_stretches_to_all_heads(solution, randn, rand, device, shape):
    module = fill(solution.MultiHeadAttention(12, 3), randn, device)
    x, context = randn(2, 4, 12, dtype=torch.float64), randn(2, 5, 12, dtype=torch.float64)
    mask = some_mask(rand, *shape)
    expected = whole(state_of(module), 3, x, context, mask)
    assert_close(module(x, context, mask).detach(), expected, because=f"a mask {shape} stretches to (2, 3, 4, 5)")


@task("MultiHeadAttention")
@pytest.mark.parametrize("shape", [(3, 3), (3, 3, 3)], ids=str)
def test_with_as_many_sequences_as_tokens_a_mask_keeps_its_axes(solution, randn, rand, device, shape):
    module = fill(solution.MultiHeadAttention(12, 3), randn, device)
    x = randn(3, 3, 12, dtype=torch.float64)
    mask = some_mask(rand, *shape)
    mask[..., 0, :] = torch.tensor([True, False, False])
    expected = whole(state_of(module), 3, x, None, mask)
    because = f"B = T = H = 3: a mask {shape} ends in (T, S), and what is before these is H"
    assert_close(module(x, mask=mask).detach(), expected, because=because)


@task("MultiHeadAttention")
def test_true_lets_a_query_attend(solution, randn, device):
    module = fill(solution.MultiHeadAttention(4, 1), randn, device)
    x = randn(1, 3, 4, dtype=torch.float64)
    state = state_of(module)
    only = torch.tensor([2, 0, 1], device=device)
    expected = x[:, only] @ state["v_proj.weight"].T @ state["o_proj.weight"].T
    mask = torch.arange(3, device=device) == only[:, None]
    assert_close(module(x, None, mask).detach(), expected, because="each query may attend to one token alone")


@task("MultiHeadAttention")
@pytest.mark.parametrize("bias", [False, True])
def test_a_head_that_sees_nothing_adds_zeros(solution, randn, rand, device, bias):
    module = fill(solution.MultiHeadAttention(12, 3, bias=bias), randn, device)
    x = randn(2, 4, 12, dtype=torch.float64)
    mask = some_mask(rand, 2, 3, 4, 4)
    mask[0, :, 1] = mask[1, 2] = False
    expected = whole(state_of(module), 3, x, None, mask)
    assert_close(module(x, None, mask).detach(), expected, because="nothing allowed: zeros before o_proj, not NaN")


@task("MultiHeadAttention")
def test_a_head_that_sees_nothing_sends_back_no_nan(solution, randn, rand, device):
    module = fill(solution.MultiHeadAttention(12, 3, bias=True), randn, device)
    x = randn(2, 4, 12, dtype=torch.float64).requires_grad_()
    mask = some_mask(rand, 2, 3, 4, 4)
    expected = whole(state_of(module), 3, x.detach(), None, mask)
    assert_close(module(x, None, mask).detach(), expected, because="each query sees something")
    mask[0, :, 1] = mask[1, 2] = False
    module(x, None, mask).sum().backward()
    bad = [name for name, p in [("x", x), *module.named_parameters()] if p.grad is None or not p.grad.isfinite().all()]
    assert_equal(bad, [], because="gradients that are missing, infinite or NaN")


@task("MultiHeadAttention")
@pytest.mark.parametrize(("b", "t", "s"), [(0, 3, 3), (2, 0, 3), (2, 3, 0), (1, 1, 1)])
def test_sizes_may_be_zero(solution, randn, device, b, t, s):
    module = fill(solution.MultiHeadAttention(12, 3, bias=True), randn, device)
    x, context = randn(b, t, 12, dtype=torch.float64), randn(b, s, 12, dtype=torch.float64)
    state = state_of(module)
    expected = state["o_proj.bias"].expand(b, t, 12) if s == 0 else whole(state, 3, x, context)
    assert_close(module(x, context).detach(), expected, because=f"x ({b}, {t}, 12), context ({b}, {s}, 12)")


@task("MultiHeadAttention")
@pytest.mark.parametrize("bias", [False, True])
def test_gradients_reach_inputs_and_parameters(solution, randn, rand, device, bias):
    module = fill(solution.MultiHeadAttention(6, 2, d_head=3, d_v=4, bias=bias, d_context=5), randn, device)
    x, context = randn(2, 3, 6, dtype=torch.float64), randn(2, 4, 5, dtype=torch.float64)
    mask = some_mask(rand, 2, 1, 3, 4)
    weighting = randn(2, 3, 6, dtype=torch.float64)
    leaves = {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}
    twins = {"x": x.clone().requires_grad_(), "context": context.clone().requires_grad_()}
    loss = (whole(state_of(module) | leaves, 2, *twins.values(), mask) * weighting).sum()
    wanted = torch.autograd.grad(loss, [*twins.values(), *leaves.values()])
    inputs = {"x": x.requires_grad_(), "context": context.requires_grad_()}
    loss = (module(x, context, mask) * weighting).sum()
    assert_that(loss.requires_grad, "the output is part of a graph", value=loss.requires_grad)
    parameters = dict(module.named_parameters())
    sources = [*inputs.values(), *(parameters[name] for name in leaves)]
    grads = torch.autograd.grad(loss, sources, materialize_grads=True)
    for name, grad, expected in zip([*inputs, *leaves], grads, wanted, strict=True):
        assert_close(grad, expected, because=f"the gradient at {name}", **LOOSE[torch.float64])


@task("MultiHeadAttention")
def test_strides_of_the_input_do_not_matter(solution, randn, device):
    module = fill(solution.MultiHeadAttention(12, 3), randn, device)
    x = noncontiguous(randn(2, 4, 12, dtype=torch.float64))
    context = randn(5, 2, 12, dtype=torch.float64).transpose(0, 1)
    expected = whole(state_of(module), 3, x, context)
    assert_close(module(x, context).detach(), expected, because="x is a slice, context has two axes exchanged")


@task("MultiHeadAttention")
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_in_and_half_out(solution, randn, device, half):
    module = fill(solution.MultiHeadAttention(12, 3, bias=True), randn, device, half)
    x = (randn(2, 4, 12) * 0.25).to(half)
    expected = whole({name: v.double() for name, v in state_of(module).items()}, 3, x.double()).to(half)
    assert_close(module(x).detach(), expected, rtol=5e-2, atol=1e-1, because=f"{half} in, {half} out")


@task("MultiHeadAttention")
def test_scores_of_half_inputs_are_wide(solution, device):
    module = solution.MultiHeadAttention(4, 1).to(device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        for name in PROJECTIONS:
            getattr(module, name).weight.copy_(torch.eye(4))
        module.q_proj.weight.copy_(2 * torch.eye(4))  # takes back what the scale 1/2 does
    x = torch.tensor([[[32.0, 2.0, 0.0, 0.0]]], dtype=torch.bfloat16, device=device)
    context = torch.tensor([[[16.0, 0.0, 0.0, 0.0], [16.0, 1.0, 0.0, 0.0]]], dtype=torch.bfloat16, device=device)
    share = torch.tensor([0.0, 2.0]).softmax(0)[1]
    expected = torch.stack([torch.tensor(16.0), share, torch.tensor(0.0), torch.tensor(0.0)])[None, None]
    found = module(x, context).detach()
    assert_close(
        found, expected.bfloat16(), rtol=2e-2, because="scores of 512 and 514, which bfloat16 cannot tell apart"
    )


@task("MultiHeadAttention")
def test_nothing_that_comes_in_is_changed(solution, randn, rand, device):
    module = fill(solution.MultiHeadAttention(12, 3, bias=True), randn, device)
    x, context = randn(2, 4, 12, dtype=torch.float64), randn(2, 5, 12, dtype=torch.float64)
    mask = some_mask(rand, 2, 1, 4, 5)
    with unchanged(x, context, mask, *module.parameters()), global_rng_untouched():
        module(x, context, mask)


@task("MultiHeadAttention")
@pytest.mark.parametrize(
    ("x", "context", "mentions"),
    [
        ((2, 4, 10), None, ["(2, 4, 10)", "(12, 12)"]),
        ((2, 4, 10), (2, 5, 12), ["(2, 4, 10)", "(12, 12)"]),
        ((2, 4, 12), (2, 5, 10), ["(2, 5, 10)", "(12, 12)"]),
        ((2, 4, 12), (3, 5, 12), ["(2, 4, 12)", "(3, 5, 12)"]),
        ((2, 4, 12), (1, 5, 12), ["(2, 4, 12)", "(1, 5, 12)"]),
        ((1, 4, 12), (2, 5, 12), ["(1, 4, 12)", "(2, 5, 12)"]),
    ],
    ids=str,
)
def test_inputs_that_do_not_fit_are_refused(solution, randn, device, x, context, mentions):
    module = solution.MultiHeadAttention(12, 3).to(device)
    context = None if context is None else randn(*context)
    assert_raises(ValueError, module, randn(*x), context, mentions=mentions)


@task("MultiHeadAttention")
@pytest.mark.parametrize("shape", [(4, 4), (2, 5), (2, 4, 5), (2, 2, 4, 5), (2, 3, 5, 4), (1, 2, 3, 4, 5)], ids=str)
def test_a_mask_that_does_not_stretch_is_refused(solution, randn, device, shape):
    module = solution.MultiHeadAttention(12, 3).to(device)
    x, context = randn(2, 4, 12), randn(2, 5, 12)
    mask = torch.ones(shape, dtype=torch.bool, device=device)
    assert_raises(ValueError, module, x, context, mask, mentions=[str(shape), "(2, 3, 4, 5)"])


@task("MultiHeadAttention")
@pytest.mark.parametrize(("h", "d_head", "d_v"), [(1, 16, 16), (8, 2, 2), (3, 5, 4)])
def test_six_matrix_products_whatever_the_number_of_heads(solution, randn, device, h, d_head, d_v):
    module = solution.MultiHeadAttention(16, h, d_head=d_head, d_v=d_v, bias=True).to(device)
    x = randn(2, 5, 16)
    per_token = 2 * 16 * h * (2 * d_head + 2 * d_v)
    flops = 2 * 5 * per_token + 2 * 2 * h * 5 * 5 * (d_head + d_v)
    because = f"{h} heads: q, k, v, scores, mixtures, output"
    assert_cost(module, x, matmuls=6, because=because)
    assert_cost(module, x, flops=flops, because=f"FLOPs of {because}")


@cost_case("MultiHeadAttention")
def multi_head_cost(module, randn):
    with unmetered():
        layer, x = module.MultiHeadAttention(64, 8), randn(2, 32, 64)
    return lambda: layer(x)


# from_torch

VARIANTS = {
    "plain": {},
    "no bias": {"bias": False},
    "batch second": {"batch_first": False},
    "context": {"kdim": 7, "vdim": 7},
    "context, no bias": {"kdim": 7, "vdim": 7, "bias": False},
    "dropout": {"dropout": 0.9},
}


def torchs(randn, device, heads=3, dtype=torch.float64, width=12, **options):
    """A layer of torch with random weights, biases included, in eval mode."""
    return fill(nn.MultiheadAttention(width, heads, **({"batch_first": True} | options)), randn, device, dtype).eval()


def torchs_output(theirs, x, context, **masks):
    """Batch first, whatever the layer likes."""
    if not theirs.batch_first:
        x, context = x.transpose(0, 1), context.transpose(0, 1)
    out = theirs(x, context, context, need_weights=False, **masks)[0].detach()
    return out if theirs.batch_first else out.transpose(0, 1)


@task("from_torch")
@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_are_those_of_torchs_layer(solution, randn, device, variant):
    theirs = torchs(randn, device, **VARIANTS[variant])
    x, context = randn(2, 5, 12, dtype=torch.float64), randn(2, 4, theirs.kdim, dtype=torch.float64)
    expected = torchs_output(theirs, x, context)
    module = solution.from_torch(theirs)
    assert_close(module(x, context).detach(), expected, because=f"nn.MultiheadAttention, {variant}")


@task("from_torch")
@pytest.mark.parametrize("heads", [1, 2, 6])
def test_any_number_of_heads_of_torch(solution, randn, device, dtype, heads):
    theirs = torchs(randn, device, heads, dtype)
    x = randn(2, 5, 12, dtype=dtype)
    expected = torchs_output(theirs, x, x)
    module = solution.from_torch(theirs)
    because = f"nn.MultiheadAttention(12, {heads}) on x alone"
    assert_close(module(x).detach(), expected, because=because, **LOOSE[dtype])


@task("from_torch")
def test_their_true_is_your_false(solution, randn, rand, device):
    theirs = torchs(randn, device)
    x = randn(2, 5, 12, dtype=torch.float64)
    mask, known = some_mask(rand, 5, 5), torch.tensor([[True] * 5, [True] * 3 + [False] * 2], device=device)
    mask[:, 0] = True
    expected = torchs_output(theirs, x, x, attn_mask=~mask, key_padding_mask=~known)
    module = solution.from_torch(theirs)
    found = module(x, None, mask & known[:, None, None]).detach()
    assert_close(found, expected, because="attn_mask and key_padding_mask of torch are True where it is forbidden")


@task("from_torch")
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_weight_of_torch_finds_its_place(solution, randn, device, variant):
    theirs = torchs(randn, device, **VARIANTS[variant])
    if theirs.in_proj_weight is None:
        weights = [theirs.q_proj_weight, theirs.k_proj_weight, theirs.v_proj_weight, theirs.out_proj.weight]
        expected = {f"{n}.weight": w.detach().clone() for n, w in zip(PROJECTIONS, weights, strict=True)}
        if theirs.in_proj_bias is not None:
            biases = [*theirs.in_proj_bias.chunk(3), theirs.out_proj.bias]
            expected |= {f"{n}.bias": b.detach().clone() for n, b in zip(PROJECTIONS, biases, strict=True)}
    else:
        expected = torchs_state(theirs)
    module = solution.from_torch(theirs)
    assert_same_state(module, expected, f"{variant}, number by number", rtol=0, atol=0)
    assert_equal((module.n_heads, module.d_head, module.d_v), (3, 4, 4), because="n_heads, d_head, d_v")


@task("from_torch")
@pytest.mark.parametrize("variant", ["plain", "no bias", "context"])
def test_what_comes_from_torch_is_a_copy(solution, randn, device, variant):
    theirs = torchs(randn, device, **VARIANTS[variant])
    with unchanged(*theirs.parameters()):
        module = solution.from_torch(theirs)
    assert_own_parameters(module, theirs)
    with unchanged(*theirs.parameters()), torch.no_grad():
        for p in module.parameters():
            p.add_(1.0)


@task("from_torch")
@pytest.mark.parametrize("dtype_of_theirs", [torch.float32, torch.float64, torch.bfloat16])
def test_the_dtype_of_torchs_layer_stays(solution, randn, device, dtype_of_theirs):
    module = solution.from_torch(torchs(randn, device, dtype=dtype_of_theirs))
    found = {(str(p.dtype), p.device.type) for p in module.parameters()}
    assert_equal(found, {(str(dtype_of_theirs), device.type)}, because="dtype and device of the parameters")


@task("from_torch")
@pytest.mark.parametrize(
    ("options", "mentions"),
    [
        ({"kdim": 7, "vdim": 9}, ["7", "9"]),
        ({"kdim": 7}, ["7", "12"]),
        ({"vdim": 9}, ["12", "9"]),
        ({"add_bias_kv": True}, ["add_bias_kv"]),
        ({"add_zero_attn": True}, ["add_zero_attn"]),
    ],
    ids=str,
)
def test_what_cannot_be_expressed_is_refused(solution, randn, device, options, mentions):
    theirs = torchs(randn, device, **options)
    assert_raises(ValueError, solution.from_torch, theirs, mentions=mentions)


# head_contributions


def given(randn, device, h=3, d_head=4, d_v=5, bias=True, dtype=torch.float64, d_model=10, d_context=None):
    """A module that somebody else wrote, with random parameters."""
    module = Module(d_model, h, d_head=d_head, d_v=d_v, bias=bias, d_context=d_context)
    return fill(module, randn, device, dtype)


@task("head_contributions")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("h", "d_head", "d_v"), WIDTHS)
def test_the_heads_add_up_to_the_output(solution, randn, device, h, d_head, d_v, bias):
    module, x = given(randn, device, h, d_head, d_v, bias), randn(2, 5, 10, dtype=torch.float64)
    expected = whole(state_of(module), h, x)
    if bias:
        expected = expected - module.o_proj.bias.detach()
    found = solution.head_contributions(module, x).detach()
    assert_equal(tuple(found.shape), (2, h, 5, 10), because="(B, H, T, D)")
    assert_close(found.sum(1), expected, because="the sum over the heads is the output without the bias of o_proj")


@task("head_contributions")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("h", "d_head", "d_v"), WIDTHS)
def test_each_head_adds_what_it_adds_alone(solution, randn, device, dtype, h, d_head, d_v, bias):
    module, x = given(randn, device, h, d_head, d_v, bias, dtype), randn(2, 5, 10, dtype=dtype)
    expected = head_by_head(state_of(module), h, x)
    found = solution.head_contributions(module, x).detach()
    assert_close(found, expected, because="each head through its own columns of o_proj", **LOOSE[dtype])


@task("head_contributions")
def test_a_square_output_map_shows_its_columns(solution, randn, device):
    module, x = given(randn, device, 3, 3, 3, False, d_model=9), randn(3, 3, 9, dtype=torch.float64)
    expected = head_by_head(state_of(module), 3, x)
    found = solution.head_contributions(module, x).detach()
    assert_close(found, expected, because="heads own columns of o_proj.weight, and B = T = H = Dh = 3 hides nothing")


@task("head_contributions")
@pytest.mark.parametrize("shape", [(5, 5), (3, 5, 5), (2, 1, 1, 5), (2, 3, 5, 5)], ids=str)
def test_contributions_obey_the_mask(solution, randn, rand, device, shape):
    module, x = given(randn, device), randn(2, 5, 10, dtype=torch.float64)
    mask = some_mask(rand, *shape)
    expected = head_by_head(state_of(module), 3, x, None, mask)
    found = solution.head_contributions(module, x, mask).detach()
    assert_close(found, expected, because=f"a mask {shape}, as the module takes it")


@task("head_contributions")
def test_a_head_that_sees_nothing_contributes_zeros(solution, randn, rand, device):
    module, x = given(randn, device), randn(2, 5, 10, dtype=torch.float64)
    mask = some_mask(rand, 2, 3, 5, 5)
    mask[0, 1, 2] = mask[1, 0] = False
    expected = head_by_head(state_of(module), 3, x, None, mask)
    found = solution.head_contributions(module, x, mask).detach()
    assert_close(found, expected, because="a query without keys gets zeros from this head")


@task("head_contributions")
def test_gradients_flow_through_contributions(solution, randn, device):
    module, x = given(randn, device), randn(2, 4, 10, dtype=torch.float64).requires_grad_()
    weighting = randn(2, 3, 4, 10, dtype=torch.float64)
    leaves = {name: value.requires_grad_() for name, value in state_of(module).items() if name != "o_proj.bias"}
    twin = x.detach().clone().requires_grad_()
    loss = (head_by_head({"o_proj.bias": None, **leaves}, 3, twin) * weighting).sum()
    expected = dict(zip(["x", *leaves], torch.autograd.grad(loss, [twin, *leaves.values()]), strict=True))
    found = solution.head_contributions(module, x)
    assert_that(found.requires_grad, "the contributions are part of a graph", value=found.requires_grad)
    inputs = {"x": x} | {name: p for name, p in module.named_parameters() if name in leaves}
    loss = (found * weighting).sum()
    grads = torch.autograd.grad(loss, list(inputs.values()), materialize_grads=True)
    for name, grad in zip(inputs, grads, strict=True):
        assert_close(grad, expected[name], because=f"the gradient at {name}", **LOOSE[torch.float64])


@task("head_contributions")
def test_contributions_of_half_inputs_stay_half(solution, randn, device):
    module, x = given(randn, device, dtype=torch.bfloat16), (randn(2, 5, 10) * 0.25).bfloat16()
    state = {name: value.double() for name, value in state_of(module).items()}
    expected = head_by_head(state, 3, x.double()).bfloat16()
    found = solution.head_contributions(module, x).detach()
    assert_close(found, expected, rtol=5e-2, atol=1e-1, because="bfloat16 in, bfloat16 out")


@task("head_contributions")
def test_contributions_cost_no_more_than_the_output(solution, randn, device):
    module, x = given(randn, device, 4, 3, 5), randn(2, 6, 10, dtype=torch.float64)
    flops = 2 * 2 * 6 * 10 * 4 * (2 * 3 + 2 * 5) + 2 * 2 * 4 * 6 * 6 * (3 + 5)
    assert_cost(
        solution.head_contributions, module, x, max_flops=flops, because="the FLOPs of one forward pass are enough"
    )


@task("head_contributions")
def test_the_module_that_is_looked_at_stays_as_it_is(solution, randn, device):
    module, x = given(randn, device), randn(2, 5, 10, dtype=torch.float64)
    with unchanged(*module.parameters()), global_rng_untouched():
        solution.head_contributions(module, x)


# prune_heads

KEPT = [[0], [3], [1, 2], [2, 0], (3, 1, 0), range(1, 4), range(4), [3, 2, 1, 0]]


def pruned_state(module, keep):
    """The state that is left: rows and columns of each head, one after the other."""
    state, h = module.state_dict(), module.n_heads
    left = {}
    for name in PROJECTIONS:
        dim = 1 if name == "o_proj" else 0
        parts = state[f"{name}.weight"].chunk(h, dim)
        left[f"{name}.weight"] = torch.cat([parts[i] for i in keep], dim)
        if f"{name}.bias" in state:
            bias = state[f"{name}.bias"]
            left[f"{name}.bias"] = bias.clone() if dim else torch.cat([bias.chunk(h)[i] for i in keep])
    return left


@task("prune_heads")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("keep", KEPT, ids=str)
def test_the_heads_that_are_left_do_what_they_did(solution, randn, device, keep, bias):
    module, x = given(randn, device, 4, 3, 5, bias), randn(2, 6, 10, dtype=torch.float64)
    state = state_of(module)
    columns = state["o_proj.weight"].unflatten(1, (4, 5))
    for head in set(range(4)) - set(keep):
        columns[:, head] = 0.0
    expected = whole(state, 4, x)
    found = solution.prune_heads(module, keep)
    assert_close(found(x).detach(), expected, because=f"the module with the columns of all heads but {keep} set to 0")


@task("prune_heads")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("keep", KEPT, ids=str)
def test_a_pruned_module_is_smaller(solution, randn, device, keep, bias):
    module = given(randn, device, 4, 3, 5, bias)
    expected = pruned_state(module, keep)
    found = solution.prune_heads(module, keep)
    assert_same_state(found, expected, f"the heads {list(keep)}, in this order", rtol=0, atol=0)
    sizes = found.n_heads, found.d_head, found.d_v
    assert_equal(sizes, (len(keep), 3, 5), because="n_heads, d_head, d_v: heads keep their widths")


@task("prune_heads")
def test_pruning_a_square_module(solution, randn, device):
    module, x = given(randn, device, 2, 4, 4, True, d_model=8), randn(2, 6, 8, dtype=torch.float64)
    expected = head_by_head(state_of(module), 2, x)[:, 1] + module.o_proj.bias.detach()
    found = solution.prune_heads(module, [1])
    assert_close(found(x).detach(), expected, because="head 1 of 2 alone; 8 = 2 * 4 hides no axis")


@task("prune_heads")
def test_a_pruned_module_still_reads_its_context(solution, randn, rand, device):
    module = given(randn, device, 4, 3, 5, d_context=7)
    x, context = randn(2, 6, 10, dtype=torch.float64), randn(2, 4, 7, dtype=torch.float64)
    mask = some_mask(rand, 2, 1, 1, 4)
    expected = head_by_head(state_of(module), 4, x, context, mask)[:, [0, 2]].sum(1) + module.o_proj.bias.detach()
    found = solution.prune_heads(module, [0, 2])
    assert_close(found(x, context, mask).detach(), expected, because="a context 7 wide")


@task("prune_heads")
@pytest.mark.parametrize("keep", [range(2), range(4), [1]], ids=str)
def test_a_pruned_module_is_a_copy(solution, randn, device, keep):
    module = given(randn, device, 4, 3, 5)
    before = names_and_shapes(module)
    with unchanged(*module.parameters()):
        found = solution.prune_heads(module, keep)
    assert_equal((names_and_shapes(module), module.n_heads), (before, 4), because="the module that was given")
    assert_own_parameters(found, module)


@task("prune_heads")
def test_pruning_keeps_the_dtype(solution, randn, device):
    for dtype in (torch.float32, torch.bfloat16):
        found = solution.prune_heads(given(randn, device, dtype=dtype), [1])
        kinds = {(str(p.dtype), p.device.type) for p in found.parameters()}
        assert_equal(kinds, {(str(dtype), device.type)}, because="dtype and device of the parameters")


@task("prune_heads")
@pytest.mark.parametrize("keep", [[], [4], [-1], [1, 1], [0, 7, 2], [2, 0, 2], [-4, 1]], ids=str)
def test_heads_that_cannot_be_kept_are_refused(solution, randn, device, keep):
    module = given(randn, device, 4, 3, 5)
    assert_raises(ValueError, solution.prune_heads, module, keep, mentions=[str(keep)])
    assert_raises(ValueError, solution.prune_heads, module, tuple(keep), mentions=[str(keep)])


# stack_heads


class Head(nn.Module):
    """A single head with the projections of day 17's SelfAttention."""

    def __init__(self, d_model, d_head, d_out, bias):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(d_model, d_head, bias) for _ in range(3))
        self.o_proj = nn.Linear(d_head, d_out, bias)


def single_heads(randn, device, n, d_head=4, bias=False, dtype=torch.float64, d_model=10, d_out=None):
    """Heads with random parameters."""
    return [fill(Head(d_model, d_head, d_out or d_model, bias), randn, device, dtype) for _ in range(n)]


def sum_of_heads(heads, x, mask=None):
    """What single heads add up to, each from its own parameters, with torch's linear maps."""
    return sum(whole(state_of(head), 1, x, None, mask) for head in heads)


@task("stack_heads")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("n", "d_head"), [(1, 4), (2, 5), (3, 1), (5, 2)])
def test_stacked_heads_add_up(solution, randn, device, dtype, n, d_head, bias):
    heads, x = single_heads(randn, device, n, d_head, bias, dtype), randn(2, 6, 10, dtype=dtype)
    expected = sum_of_heads(heads, x)
    module = solution.stack_heads(heads)
    because = f"the sum of {n} heads, each with an output map of its own"
    assert_close(module(x).detach(), expected, because=because, **LOOSE[dtype])


@task("stack_heads")
def test_stacked_heads_obey_a_mask(solution, randn, rand, device):
    heads, x = single_heads(randn, device, 3, bias=True), randn(2, 6, 10, dtype=torch.float64)
    mask = some_mask(rand, 6, 6)
    expected = sum_of_heads(heads, x, mask)
    module = solution.stack_heads(heads)
    assert_close(module(x, None, mask).detach(), expected, because="one mask for all heads")


@task("stack_heads")
@pytest.mark.parametrize("bias", [False, True])
def test_head_h_of_the_stack_is_the_one_at_h(solution, randn, device, bias):
    heads = single_heads(randn, device, 3, bias=bias)
    states = [state_of(head) for head in heads]
    expected = {}
    for name in PROJECTIONS:
        expected[f"{name}.weight"] = torch.cat([s[f"{name}.weight"] for s in states], 1 if name == "o_proj" else 0)
    if bias:
        expected |= {f"{name}.bias": torch.cat([s[f"{name}.bias"] for s in states]) for name in PROJECTIONS[:3]}
        expected["o_proj.bias"] = torch.stack([s["o_proj.bias"] for s in states]).sum(0)
    module = solution.stack_heads(heads)
    assert_same_state(module, expected, "head by head", rtol=1e-12, atol=1e-12)
    assert_equal((module.n_heads, module.d_head, module.d_v), (3, 4, 4), because="n_heads, d_head, d_v")


@task("stack_heads")
def test_stacking_square_heads(solution, randn, device):
    heads, x = single_heads(randn, device, 2, 5, d_model=5), randn(2, 2, 5, dtype=torch.float64)
    expected = sum_of_heads(heads, x)
    module = solution.stack_heads(heads)
    assert_close(module(x).detach(), expected, because="heads as wide as the model: no shape shows a mix-up")


@task("stack_heads")
@pytest.mark.parametrize("n", [1, 3])
def test_a_stack_is_a_copy(solution, randn, device, n):
    heads = single_heads(randn, device, n, bias=True)
    with unchanged(*(p for head in heads for p in head.parameters())):
        module = solution.stack_heads(heads)
    assert_own_parameters(module, *heads)
    assert_equal(len(heads), n, because="the list that was given")


@task("stack_heads")
def test_stacking_keeps_the_dtype(solution, randn, device):
    for dtype in (torch.float32, torch.bfloat16):
        module = solution.stack_heads(single_heads(randn, device, 2, bias=True, dtype=dtype))
        kinds = {(str(p.dtype), p.device.type) for p in module.parameters()}
        assert_equal(kinds, {(str(dtype), device.type)}, because="dtype and device of the parameters")


@task("stack_heads")
def test_heads_that_cannot_be_stacked_are_refused(solution, randn, device):
    assert_raises(ValueError, solution.stack_heads, [], because="there is no head")
    to_six = single_heads(randn, device, 2, d_out=6)
    assert_raises(ValueError, solution.stack_heads, to_six, mentions=["10", "6"], because="d_model 10, d_out 6")
    to_six = single_heads(randn, device, 1, d_out=6)
    assert_raises(ValueError, solution.stack_heads, to_six, mentions=["10", "6"], because="d_model 10, d_out 6")


@task("stack_heads")
@pytest.mark.parametrize("place", [0, 1, 2])
def test_heads_that_differ_are_refused(solution, randn, device, place):
    (odd,) = single_heads(randn, device, 1, d_head=3)
    heads = single_heads(randn, device, 2)
    heads.insert(place, odd)
    assert_raises(ValueError, solution.stack_heads, heads, mentions=["(4, 10)", "(3, 10)"], because="4 and 3 wide")
    (odd,) = single_heads(randn, device, 1, d_model=8)
    heads[place] = odd
    assert_raises(ValueError, solution.stack_heads, heads, mentions=["(4, 10)", "(4, 8)"], because="other models")
    (odd,) = single_heads(randn, device, 1, bias=True)
    heads[place] = odd
    assert_raises(ValueError, solution.stack_heads, heads, because="one head has biases, the others have not")


# canonicalize


def invertible(randn, h, n):
    """One matrix (n, n) for each head that stretches by 1/2 to 2 only."""
    left, right = (torch.linalg.qr(randn(h, n, n, dtype=torch.float64)).Q for _ in range(2))
    return left * torch.linspace(0.5, 2.0, n, dtype=torch.float64, device=left.device) @ right


def relative(module, randn, randperm, steps):
    """Another member of the family: the module after the steps of the docstring."""
    h, state = module.n_heads, {n: v.detach().clone() for n, v in module.state_dict().items()}
    a, c = invertible(randn, h, module.d_head), invertible(randn, h, module.d_v)
    maps = {"q_proj": a, "k_proj": torch.linalg.inv(a).mT, "v_proj": c}
    if "queries" not in steps:
        del maps["q_proj"], maps["k_proj"]
    if "values" not in steps:
        del maps["v_proj"]
    else:
        columns = state["o_proj.weight"].unflatten(1, (h, -1)).transpose(0, 1) @ torch.linalg.inv(c)
        state["o_proj.weight"] = columns.transpose(0, 1).flatten(1)
    for name, change in maps.items():
        state[f"{name}.weight"] = (change @ state[f"{name}.weight"].unflatten(0, (h, -1))).flatten(0, 1)
        if f"{name}.bias" in state:
            state[f"{name}.bias"] = (change @ state[f"{name}.bias"].unflatten(0, (h, -1, 1))).flatten()
    twin = Module(
        state["q_proj.weight"].shape[1],
        h,
        d_head=module.d_head,
        d_v=module.d_v,
        bias="o_proj.bias" in state,
        d_context=state["k_proj.weight"].shape[1],
    ).to(state["q_proj.weight"])
    twin.load_state_dict(state)
    if "order" in steps:
        order = torch.roll(torch.arange(h), 1 + int(randperm(h - 1)[0]))
        twin.load_state_dict(pruned_state(twin, order.tolist()))
    return twin


FAMILY = {"queries": {"queries"}, "values": {"values"}, "order": {"order"}, "all": {"queries", "values", "order"}}
SHAPES = {
    "narrow heads": {"h": 3, "d_head": 4, "d_v": 5},
    "square": {"h": 2, "d_head": 5, "d_v": 5},
    "as wide as the model": {"h": 3, "d_head": 10, "d_v": 2},
    "values as wide": {"h": 4, "d_head": 2, "d_v": 10},
    "one wide": {"h": 5, "d_head": 1, "d_v": 1},
    "context": {"h": 3, "d_head": 4, "d_v": 5, "d_context": 7},
}


@task("canonicalize")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("steps", FAMILY)
def test_a_family_has_one_canonical_member(solution, randn, randperm, device, shape, bias, steps):
    module = given(randn, device, bias=bias, **SHAPES[shape])
    twin = relative(module, randn, randperm, FAMILY[steps])
    expected = {name: value.detach() for name, value in solution.canonicalize(module).state_dict().items()}
    found = solution.canonicalize(twin)
    assert_same_state(found, expected, f"two members of a family ({steps})", rtol=1e-5, atol=1e-6)


@task("canonicalize")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_canonical_module_computes_the_same(solution, randn, rand, device, shape, bias):
    module = given(randn, device, bias=bias, **SHAPES[shape])
    x = randn(2, 6, 10, dtype=torch.float64)
    context = randn(2, 4, module.k_proj.weight.shape[1], dtype=torch.float64)
    mask = some_mask(rand, 2, 1, 6, 4)
    mask[0, :, 3] = False
    expected = whole(state_of(module), module.n_heads, x, context, mask)
    found = solution.canonicalize(module)
    assert_close(found(x, context, mask).detach(), expected, rtol=1e-7, atol=1e-9, because="an equal module")
    assert_equal(names_and_shapes(found), names_and_shapes(module), because="the state dict")


@task("canonicalize")
def test_the_canonical_module_of_single_precision(solution, randn, device):
    module, x = given(randn, device, dtype=torch.float32), randn(2, 6, 10)
    expected = whole(state_of(module), 3, x)
    found = solution.canonicalize(module)
    assert_close(found(x).detach(), expected, rtol=1e-3, atol=1e-3, because="float32 in, float32 out")


@task("canonicalize")
def test_a_canonical_module_is_a_copy(solution, randn, device):
    module = given(randn, device)
    with unchanged(*module.parameters()):
        found = solution.canonicalize(module)
    assert_own_parameters(found, module)


@task("canonicalize")
@pytest.mark.parametrize(
    ("sizes", "mentions"),
    [
        ({"d_head": 11, "d_v": 3}, ["11", "10"]),
        ({"d_head": 3, "d_v": 11}, ["11", "10"]),
        ({"d_head": 8, "d_v": 3, "d_context": 7}, ["8", "7"]),
        ({"d_head": 3, "d_v": 8, "d_context": 7}, ["8", "7"]),
        ({"d_head": 11, "d_v": 3, "d_context": 12}, ["11", "10"]),
    ],
    ids=str,
)
def test_heads_wider_than_what_they_read_are_refused(solution, randn, device, sizes, mentions):
    module = given(randn, device, **sizes)
    assert_raises(ValueError, solution.canonicalize, module, mentions=mentions)
