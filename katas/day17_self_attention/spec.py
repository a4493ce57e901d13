"""Day 17: hidden tests of one learned head."""

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
    noncontiguous,
    same_storage,
    task,
    unchanged,
)

TIGHT = {torch.float32: {"rtol": 1e-4, "atol": 1e-5}, torch.float64: {"rtol": 1e-10, "atol": 1e-12}}
F64 = torch.float64


def table(rows, device):
    """A boolean mask from nested lists."""
    return torch.tensor(rows, dtype=torch.bool, device=device)


def filled(module, randn, dtype=torch.float32):
    """The module with random parameters of a dtype, also where it would begin with zeros."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.data = randn(*parameter.shape, dtype=dtype)
    return module


def apply(state, name, x):
    return F.linear(x, state[f"{name}_proj.weight"], state.get(f"{name}_proj.bias"))


def head(state, x, context, mask=None):
    """The layer by torch's own function, from the weights of a state dict."""
    q, k, v = apply(state, "q", x), apply(state, "k", context), apply(state, "v", context)
    return apply(state, "o", F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


def lower(t, device):
    return torch.ones(t, t, dtype=torch.bool, device=device).tril()


# segment_mask


@task("segment_mask")
@pytest.mark.parametrize(
    "rows", [[[0, 0, 1], [2, 2, 2]], [[5, 3, 5, 3, 0]], [[1], [2]], [[0, 1, 2], [1, 1, 0], [4, 0, 4]]]
)
def test_equal_numbers_see_each_other(solution, device, rows):
    expected = table([[[[a == b for b in row] for a in row]] for row in rows], device)
    got = solution.segment_mask(torch.tensor(rows, device=device))
    assert_close(got, expected, because="entry (i, j) is True if places i and j belong to one document")


@task("segment_mask")
@pytest.mark.parametrize("shape", [(2, 0), (0, 3)], ids=str)
def test_segments_of_nothing(solution, device, shape):
    got = solution.segment_mask(torch.zeros(shape, dtype=torch.long, device=device))
    expected = torch.zeros(shape[0], 1, shape[1], shape[1], dtype=torch.bool, device=device)
    assert_close(got, expected, because="(B, 1, T, T)")


@task("segment_mask")
def test_random_segments(solution, randint, device):
    segments = randint(0, 3, (3, 7))
    expected = table([[[[a == b for b in row] for a in row]] for row in segments.tolist()], device)
    assert_close(solution.segment_mask(segments), expected, because="equal numbers, whatever lies between them")


# padding_mask


@task("padding_mask")
@pytest.mark.parametrize("lengths", [[1, 3, 2], [4], [0, 2], [3, 3], [0, 0]], ids=str)
@pytest.mark.parametrize("tq", [1, 3])
def test_keys_below_the_length(solution, device, lengths, tq):
    T = max(lengths)
    rows = [[[[j < n for j in range(T)] for _ in range(tq)]] for n in lengths]
    expected = table(rows, device).reshape(len(lengths), 1, tq, T)
    got = solution.padding_mask(torch.tensor(lengths, device=device), tq)
    assert_close(got, expected, because="keys j < lengths[b], for every query")


@task("padding_mask")
@pytest.mark.parametrize("n, tq", [(0, 2), (0, 0)])
def test_an_empty_batch_of_lengths(solution, device, n, tq):
    got = solution.padding_mask(torch.zeros(n, dtype=torch.long, device=device), tq)
    expected = torch.zeros(n, 1, tq, 0, dtype=torch.bool, device=device)
    assert_close(got, expected, because="without rows there are no keys")


@task("padding_mask")
def test_no_queries(solution, device):
    got = solution.padding_mask(torch.tensor([2, 3], device=device), 0)
    assert_close(got, torch.zeros(2, 1, 0, 3, dtype=torch.bool, device=device), because="(B, 1, tq, S)")


# SelfAttention


def self_attention(solution, randn, *args, dtype=torch.float32, device=None, **kwargs):
    module = solution.SelfAttention(*args, **kwargs).to(device)
    return filled(module, randn, dtype)


@task("SelfAttention")
@pytest.mark.parametrize(
    "args, d_head, d_out",
    [((4,), 4, 4), ((4, 3), 3, 4), ((4, 3, 5), 3, 5), ((4, None, 5), 4, 5), ((4, 6, None), 6, 4)],
    ids=str,
)
@pytest.mark.parametrize("bias", [False, True], ids=["without bias", "with bias"])
def test_names_and_shapes_of_the_parameters(solution, args, d_head, d_out, bias):
    expected = {f"{n}_proj.weight": (d_head, 4) for n in "qkv"} | {"o_proj.weight": (d_out, d_head)}
    if bias:
        expected |= {f"{n}_proj.bias": (d_head,) for n in "qkv"} | {"o_proj.bias": (d_out,)}
    state = solution.SelfAttention(*args, bias=bias).state_dict()
    shapes = sorted((n, tuple(p.shape)) for n, p in state.items())
    assert_equal(shapes, sorted(expected.items()), because="four projections, (out, in)")


@task("SelfAttention")
def test_there_is_no_bias_by_default(solution):
    names = sorted(solution.SelfAttention(4, 3).state_dict())
    assert_equal(names, [f"{n}_proj.weight" for n in "koqv"], because="bias=False is the default")


@task("SelfAttention")
@pytest.mark.parametrize(
    "shape, causal, bias",
    [
        ((2, 5, 4), False, False),
        ((2, 5, 4), True, True),
        ((1, 6, 4), True, False),
        ((3, 3, 4), False, True),
        ((4, 4, 4), True, True),
    ],
    ids=["(2, 5, 4)", "causal, bias, (2, 5, 4)", "causal, (1, 6, 4)", "bias, (3, 3, 4)", "causal, bias, (4, 4, 4)"],
)
def test_it_is_the_formula_between_projections(solution, randn, device, dtype, shape, causal, bias):
    module = self_attention(solution, randn, 4, 3, 5, bias=bias, dtype=dtype, device=device)
    x = randn(*shape, dtype=dtype)
    expected = head(module.state_dict(), x, x, lower(shape[1], device) if causal else None)
    assert_close(
        module(x, causal=causal), expected, because="o_proj of the mixtures of attention(q, k, v)", **TIGHT[dtype]
    )


@task("SelfAttention")
def test_it_attends_to_everything_by_default(solution, randn, device):
    module = self_attention(solution, randn, 4, 3, dtype=F64, device=device)
    x = randn(2, 5, 4, dtype=F64)
    assert_close(module(x), head(module.state_dict(), x, x), because="causal=False is the default")


@task("SelfAttention")
def test_one_place_alone(solution, randn, device):
    module = self_attention(solution, randn, 4, 3, 5, bias=True, dtype=F64, device=device)
    x = randn(2, 1, 4, dtype=F64)
    state = module.state_dict()
    assert_close(module(x), apply(state, "o", apply(state, "v", x)), because="with T = 1 it is o_proj(v_proj(x))")


@task("SelfAttention")
def test_permuted_places_permute_the_outputs(solution, randn, device):
    module = self_attention(solution, randn, 4, 3, dtype=F64, device=device)
    x, order = randn(2, 6, 4, dtype=F64), torch.tensor([3, 0, 5, 1, 4, 2], device=device)
    expected = module(x).detach()[:, order]
    assert_close(module(x[:, order]), expected, because="without a mask, order carries no meaning")


@task("SelfAttention")
def test_causality_sees_the_order(solution, randn, device):
    module = self_attention(solution, randn, 4, 3, dtype=F64, device=device)
    x, order = randn(2, 6, 4, dtype=F64), torch.tensor([5, 4, 3, 2, 1, 0], device=device)
    gap = (module(x[:, order], causal=True) - module(x, causal=True)[:, order]).abs().max().item()
    assert_that(gap > 1e-6, "with causality, permuted places do more than permute the outputs", value=gap > 1e-6)


@task("SelfAttention")
@pytest.mark.parametrize(
    "form, causal",
    [
        ((5, 5), False),
        ((5, 5), True),
        ((3, 5, 5), True),
        ((3, 1, 5, 5), False),
        ((3, 1, 5, 5), True),
        ((3, 1, 1, 5), False),
        ((1, 5), True),
        ((1, 1, 5, 5), True),
    ],
    ids=str,
)
def test_masks_of_each_form(solution, randn, device, form, causal):
    module = self_attention(solution, randn, 4, 2, bias=True, dtype=F64, device=device)
    x, mask = randn(3, 5, 4, dtype=F64), randn(*form) > 0
    mask[..., 0] = True
    full = (mask[:, 0] if mask.dim() == 4 else mask).expand(3, 5, 5)
    expected = head(module.state_dict(), x, x, full & lower(5, device) if causal else full)
    with unchanged(x, mask):
        got = module(x, mask, causal=causal)
    assert_close(got, expected, because="a key is seen if mask and causality allow it")


@task("SelfAttention")
def test_places_that_see_nothing(solution, randn, device):
    module = self_attention(solution, randn, 4, 2, bias=True, dtype=F64, device=device)
    x = randn(3, 5, 4, dtype=F64).requires_grad_()
    out = module(x, torch.zeros(5, 5, dtype=torch.bool, device=device))
    expected = module.o_proj.bias.detach().expand(3, 5, 4)
    assert_close(out, expected, because="o_proj of zeros")
    out.sum().backward()
    assert_close(x.grad, torch.zeros(3, 5, 4, dtype=F64), because="nothing seen, nothing sent back")


@task("SelfAttention")
def test_gradients_of_the_layer(solution, randn, device):
    module = self_attention(solution, randn, 4, 3, 2, bias=True, dtype=F64, device=device)
    state = {n: p.detach() for n, p in module.state_dict().items()}
    x = randn(2, 5, 4, dtype=F64)
    assert_gradients_close(lambda x: module(x), lambda x: head(state, x, x), [x], because="gradients reach x")
    module(x).sum().backward()
    missing = [n for n, p in module.named_parameters() if p.grad is None]
    assert_equal(missing, [], because="gradients reach all parameters")


@task("SelfAttention")
def test_strides_and_half_precision(solution, randn, device):
    module = self_attention(solution, randn, 4, 3, dtype=F64, device=device)
    x = randn(2, 5, 4, dtype=F64)
    expected = head(module.state_dict(), x, x)
    assert_close(module(noncontiguous(x)), expected, because="strides do not matter")
    module = module.bfloat16()
    x = (x * 0.1).bfloat16()  # low scores, so that rounding decides nothing
    state = {n: p.double() for n, p in module.state_dict().items()}
    expected = head(state, x.double(), x.double()).bfloat16()
    assert_close(module(x), expected, rtol=1e-1, atol=0.1, because="bfloat16 in, bfloat16 out")


@task("SelfAttention")
def test_a_wrong_width(solution, randn, device):
    module = self_attention(solution, randn, 4, 3, device=device)
    assert_raises(ValueError, module, randn(2, 5, 3), mentions=["(2, 5, 3)", "(3, 4)"])


@task("SelfAttention")
def test_six_matrix_products(solution, randn, device):
    module = self_attention(solution, randn, 8, 4, 6, device=device)
    x = randn(2, 5, 8)
    assert_cost(module, x, matmuls=6, because="four projections, and two products of attention")


@cost_case("SelfAttention")
def self_attention_cost(module, randn):
    x = randn(2, 32, 16)
    layer = module.SelfAttention(16, 8).to(x.device)
    return lambda: layer(x, causal=True)


# CrossAttention


def cross(solution, randn, device, dtype=F64):
    return filled(solution.CrossAttention(4, 6, 3).to(device), randn, dtype)


@task("CrossAttention")
def test_cross_parameters(solution):
    shapes = sorted((n, tuple(p.shape)) for n, p in solution.CrossAttention(4, 6, 3).state_dict().items())
    expected = [
        ("k_proj.weight", (3, 6)),
        ("o_proj.weight", (4, 3)),
        ("q_proj.weight", (3, 4)),
        ("v_proj.weight", (3, 6)),
    ]
    assert_equal(shapes, expected, because="keys and values are read from the context")


@task("CrossAttention")
@pytest.mark.parametrize("sizes", [(2, 5, 7), (1, 3, 2), (3, 1, 4), (4, 2, 1)], ids=str)
def test_queries_from_x_and_answers_from_the_context(solution, randn, device, dtype, sizes):
    B, T, S = sizes
    module = cross(solution, randn, device, dtype)
    x, context = randn(B, T, 4, dtype=dtype), randn(B, S, 6, dtype=dtype)
    expected = head(module.state_dict(), x, context)
    with unchanged(x, context):
        got = module(x, context)
    assert_close(got, expected, because="queries from x, keys and values from the context", **TIGHT[dtype])


@task("CrossAttention")
@pytest.mark.parametrize("sizes", [(2, 5, 7), (4, 3, 4), (4, 4, 4), (3, 5, 5)], ids=str)
def test_hidden_context(solution, randn, device, sizes):
    B, T, S = sizes
    module = cross(solution, randn, device)
    x, context = randn(B, T, 4, dtype=F64), randn(B, S, 6, dtype=F64)
    lengths = torch.arange(B, device=device)[:, None] % S + 1
    mask = torch.arange(S, device=device) < lengths
    expected = head(module.state_dict(), x, context, mask[:, None, :])
    with unchanged(mask):
        got = module(x, context, mask)
    assert_close(got, expected, because="the mask (B, S) hides keys from all queries of its row")
    changed = torch.where(mask[..., None], context, randn(B, S, 6, dtype=F64))
    assert_close(module(x, changed, mask), expected, because="what hidden context holds changes nothing")


@task("CrossAttention")
def test_nothing_to_read(solution, randn, device):
    module = cross(solution, randn, device)
    got = module(
        randn(2, 5, 4, dtype=F64), randn(2, 3, 6, dtype=F64), torch.zeros(2, 3, dtype=torch.bool, device=device)
    )
    assert_close(got, torch.zeros(2, 5, 4, dtype=F64), because="zeros where nothing may be read")


@task("CrossAttention")
@pytest.mark.parametrize(
    "x, context", [((2, 5, 4), (3, 5, 6)), ((2, 5, 4), (1, 5, 6)), ((1, 5, 4), (2, 5, 6))], ids=str
)
def test_batches_that_differ(solution, randn, device, x, context):
    module = cross(solution, randn, device, torch.float32)
    assert_raises(ValueError, module, randn(*x), randn(*context), mentions=[str(x), str(context)])


@task("CrossAttention")
@pytest.mark.parametrize("form", [(2, 5), (2, 1), (1, 3), (3,), (2, 5, 3)], ids=str)
def test_a_context_mask_of_another_shape(solution, randn, device, form):
    module = cross(solution, randn, device, torch.float32)
    mask = torch.ones(form, dtype=torch.bool, device=device)
    assert_raises(ValueError, module, randn(2, 5, 4), randn(2, 3, 6), mask, mentions=[str(form), "(2, 3"])


@task("CrossAttention")
def test_six_matrix_products_across(solution, randn, device):
    module = cross(solution, randn, device, torch.float32)
    assert_cost(module, randn(2, 5, 4), randn(2, 7, 6), matmuls=6, because="four projections, and two of attention")


# future_leak


def mixing(matrix):
    """A layer that mixes places by a fixed matrix (T, T): its derivatives are the entries."""
    return lambda x: matrix @ x


@task("future_leak")
@pytest.mark.parametrize("t", [0, 1, 2, 3, 4])
def test_the_largest_entry_above_the_corner(solution, randn, t):
    matrix, x = randn(5, 5, dtype=F64), randn(2, 5, 3, dtype=F64)
    matrix = matrix.sign() * (matrix.abs() + 0.1)
    corner = matrix[: t + 1, t + 1 :].abs()
    expected = corner.max().item() if corner.numel() else 0.0
    got = solution.future_leak(mixing(matrix), x, t)
    assert_that(isinstance(got, float), "the leak is a float", value=type(got).__name__)
    assert_close(got, expected, because="the largest |d out / d x| of an output up to t and an input after t")


@task("future_leak")
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("t, i, j", [(2, 2, 3), (2, 0, 4), (2, 1, 3), (0, 0, 1), (3, 3, 4)])
def test_one_leak_is_found(solution, randn, device, t, i, j, sign):
    matrix = torch.eye(5, dtype=F64, device=device) * 9
    matrix[i, j] = sign * 0.25
    got = solution.future_leak(mixing(matrix), randn(2, 5, 3, dtype=F64), t)
    assert_close(got, 0.25, because=f"place {i} reads place {j}, with a factor of {sign * 0.25}")


@task("future_leak")
def test_the_larger_of_two_leaks(solution, randn, device):
    matrix = torch.eye(5, dtype=F64, device=device)
    matrix[2, 3], matrix[1, 4] = 0.5, 0.25
    got = solution.future_leak(mixing(matrix), randn(2, 5, 3, dtype=F64), 2)
    assert_close(got, 0.5, because="place 2 reads place 3 by 0.5, place 1 reads place 4 by 0.25")


@task("future_leak")
@pytest.mark.parametrize("t", [0, 2, 4])
def test_a_causal_layer_has_none(solution, randn, device, t):
    matrix = randn(5, 5).tril() * 1000
    assert_equal(solution.future_leak(mixing(matrix), randn(2, 5, 3), t), 0.0, because="exactly 0 for a causal layer")


@task("future_leak")
def test_leaks_of_opposite_signs_do_not_cancel(solution, randn, device):
    leak = torch.tensor([1.0, -1.0], device=device)
    got = solution.future_leak(lambda x: x.roll(-1, 1)[..., :1] * leak, randn(2, 5, 3), 1)
    assert_close(got, 1.0, because="two derivatives of +1 and -1 are a leak of 1, not of 0")


@task("future_leak")
def test_equal_leaks_are_not_added(solution, randn):
    got = solution.future_leak(lambda x: x.mean(1, keepdim=True).expand_as(x), randn(2, 4, 3), 2)
    assert_close(got, 0.25, because="each derivative of a mean over four places is 1/4")


@task("future_leak")
@pytest.mark.parametrize("rows", [0, 1], ids=["first row", "second row"])
def test_any_row_of_the_batch_may_leak(solution, randn, device, rows):
    factor = torch.zeros(2, 1, 1, device=device)
    factor[rows] = 0.5
    got = solution.future_leak(lambda x: x + factor * x.flip(1), randn(2, 4, 3), 0)
    assert_close(got, 0.5, because=f"row {rows} leaks")


@task("future_leak")
@pytest.mark.parametrize("kind", ["unmasked", "off by one", "mean over time"])
def test_three_planted_leaks(solution, randn, device, kind):
    w = randn(3, 3, dtype=F64)

    def layer(x):
        if kind == "mean over time":
            x = x - x.mean(1, keepdim=True)
        mask = lower(5, device) if kind == "mean over time" else torch.ones(5, 5, dtype=torch.bool, device=device)
        mask = mask.tril(1) if kind == "off by one" else mask
        return F.scaled_dot_product_attention(x @ w, x, x, attn_mask=mask)

    x = randn(2, 5, 3, dtype=F64)
    table = torch.autograd.functional.jacobian(layer, x)[:, :3, :, :, 3:]
    got = solution.future_leak(layer, x, 2)
    assert_close(got, table.abs().max().item(), because=f"a layer that is {kind} leaks")


@task("future_leak")
def test_nothing_else_is_touched(solution, randn, device):
    layer = filled(torch.nn.Linear(3, 3).to(device), randn)
    x = randn(2, 5, 3)
    with torch.no_grad():
        got = solution.future_leak(layer, x, 1)
    assert_equal(got, 0.0, because="a layer that works place by place leaks nothing, also inside no_grad")
    assert_that(layer.weight.grad is None, "the parameters have no grad afterwards", value=layer.weight.grad is None)
    assert_that(not x.requires_grad and x.grad is None, "x is left alone", value=x.requires_grad)


@task("future_leak")
def test_an_input_with_a_gradient_of_its_own(solution, randn, device):
    x = randn(2, 4, 3).requires_grad_()
    x.grad = randn(2, 4, 3)
    before = x.grad.clone()
    assert_close(solution.future_leak(lambda x: x.flip(1) * 0.5, x, 1), 0.5, because="place 0 reads the last one")
    assert_close(x.grad, before, because="the grad of x is left alone")


# masked_self_attention


def padded(module, x, lengths, causal):
    """Each row alone, without its padding; zeros elsewhere."""
    out = None
    for b, n in enumerate(lengths):
        row = x[b : b + 1, :n]
        alone = module(row, causal=causal)[0].detach()
        if out is None:
            out = alone.new_zeros(*x.shape[:2], alone.shape[-1])
        out[b, :n] = alone
    return out


@task("masked_self_attention")
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize(
    "lengths, T",
    [([2, 5, 1], 5), ([2, 5, 1], 8), ([5, 5, 5], 5), ([5, 5, 5], 8), ([1, 1, 1], 5), ([1, 1, 1], 8)],
    ids=str,
)
def test_each_row_as_if_alone(solution, reference, randn, device, lengths, causal, T):
    module = filled(reference.SelfAttention(4, 3, 2, bias=True).to(device), randn, F64)
    x = randn(3, T, 4, dtype=F64)
    expected = padded(module, x, lengths, causal)
    got = solution.masked_self_attention(module, x, torch.tensor(lengths, device=device), causal=causal)
    assert_close(got, expected, because="what a row gives alone, and zeros for padding")


@task("masked_self_attention")
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
def test_as_many_rows_as_places(solution, reference, randn, device, causal):
    module = filled(reference.SelfAttention(4, 3).to(device), randn, F64)
    x, lengths = randn(4, 4, 4, dtype=F64), [3, 1, 4, 2]
    expected = padded(module, x, lengths, causal)
    got = solution.masked_self_attention(module, x, torch.tensor(lengths, device=device), causal=causal)
    assert_close(got, expected, because="what a row gives alone, also when B = T")


@task("masked_self_attention")
@pytest.mark.parametrize("junk", [float("nan"), float("inf"), 1e30], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
def test_whatever_padding_holds(solution, reference, randn, device, junk, causal):
    module = filled(reference.SelfAttention(4, 3, bias=True).to(device), randn, F64)
    x, lengths = randn(2, 5, 4, dtype=F64), [3, 0]
    expected = padded(module, x, lengths, causal)
    x[0, 3:] = junk
    x[1] = junk
    got = solution.masked_self_attention(module, x, torch.tensor(lengths, device=device), causal=causal)
    assert_close(got, expected, because=f"padding of {junk} is not felt")


@task("masked_self_attention")
def test_no_gradient_reaches_padding(solution, reference, randn, device):
    module = filled(reference.SelfAttention(4, 3).to(device), randn, F64)
    x = randn(2, 5, 4, dtype=F64).requires_grad_()
    solution.masked_self_attention(
        module, x, torch.tensor([3, 4], device=device), causal=False
    ).square().sum().backward()
    assert_close(x.grad[0, 3:], torch.zeros(2, 4, dtype=F64), because="padding gets no gradient")
    assert_that(bool((x.grad[1, :4] != 0).all()), "valid places do", value=bool((x.grad[1, :4] != 0).all()))


@task("masked_self_attention")
@pytest.mark.parametrize("form", [(3,), (1,), (2, 1), ()], ids=str)
def test_lengths_that_do_not_fit(solution, reference, randn, device, form):
    module = reference.SelfAttention(4, 3).to(device)
    lengths = torch.ones(form, dtype=torch.long, device=device)
    call = solution.masked_self_attention
    assert_raises(ValueError, call, module, randn(2, 5, 4), lengths, causal=False, mentions=[str(form), "(2, 5, 4)"])


# window_mask and prefix_mask


@task("window_mask")
@pytest.mark.parametrize("window", [1, 3, 9])
@pytest.mark.parametrize("tq, tk", [(4, 4), (2, 5), (1, 6), (5, 3), (0, 3)])
@pytest.mark.parametrize("offset", [None, 0, -1])
def test_the_last_places(solution, device, tq, tk, window, offset):
    o = tk - tq if offset is None else offset
    rows = [[i + o - window < j <= i + o for j in range(tk)] for i in range(tq)]
    expected = table(rows, device).reshape(tq, tk)
    got = solution.window_mask(tq, tk, window, offset=offset, device=device)
    assert_close(got, expected, because="i + offset - window < j <= i + offset")


@task("window_mask")
def test_a_window_on_another_device(solution):
    got = solution.window_mask(2, 3, 2, device="meta").device.type
    assert_equal(got, "meta", because="the mask is made on `device`")


@task("prefix_mask")
@pytest.mark.parametrize("t", [0, 1, 4, 6])
@pytest.mark.parametrize("prefix", [0, 1, 2, 4, 9])
def test_everybody_sees_the_prefix(solution, device, t, prefix):
    rows = [[j <= i or j < prefix for j in range(t)] for i in range(t)]
    expected = table(rows, device).reshape(t, t)
    assert_close(solution.prefix_mask(t, prefix, device=device), expected, because="j <= i, or j < prefix")


@task("prefix_mask")
def test_a_prefix_on_another_device(solution):
    assert_equal(solution.prefix_mask(3, 1, device="meta").device.type, "meta", because="the mask is made on `device`")


# fuse_qkv and split_qkv


def separate(randn, bias, d_head=3, d_model=4):
    state = {f"{n}_proj.weight": randn(d_head, d_model) for n in "qkv"} | {"o_proj.weight": randn(d_model, d_head)}
    if bias:
        state |= {f"{n}_proj.bias": randn(d_head) for n in "qkv"} | {"o_proj.bias": randn(d_model)}
    return state


def fused(state):
    """The same state with the rows of q, k and v below each other."""
    kinds = ["weight", "bias"] if "q_proj.bias" in state else ["weight"]
    made = {f"qkv_proj.{kind}": torch.cat([state[f"{n}_proj.{kind}"] for n in "qkv"]) for kind in kinds}
    return made | {f"o_proj.{kind}": state[f"o_proj.{kind}"] for kind in kinds}


def in_order(state):
    return dict(sorted(state.items()))


@task("fuse_qkv")
@pytest.mark.parametrize("bias", [False, True], ids=["without bias", "with bias"])
@pytest.mark.parametrize("d_head", [3, 4])
def test_q_k_and_v_below_each_other(solution, randn, bias, d_head):
    state = separate(randn, bias, d_head)
    expected, names = fused(state), sorted(state)
    got = solution.fuse_qkv(state)
    assert_equal(sorted(got), sorted(expected), because="qkv_proj instead of three, and the rest as it was")
    assert_close(in_order(got), in_order(expected), rtol=0, atol=0, because="q first, then k, then v")
    assert_equal(sorted(state), names, because="the state that was given is not changed")


@task("fuse_qkv")
def test_one_product_gives_all_three(solution, randn):
    state, x = separate(randn, True), randn(2, 5, 4)
    expected = torch.cat([apply(state, n, x) for n in "qkv"], -1)
    got = solution.fuse_qkv(state)
    out = F.linear(x, got["qkv_proj.weight"], got["qkv_proj.bias"])
    assert_close(out, expected, rtol=1e-4, atol=1e-5, because="the outputs of q, k and v lie beside each other")


@task("split_qkv")
@pytest.mark.parametrize("bias", [False, True], ids=["without bias", "with bias"])
@pytest.mark.parametrize("d_head", [3, 4])
def test_the_three_come_back(solution, randn, bias, d_head):
    expected = separate(randn, bias, d_head)
    state = fused(expected)
    names = sorted(state)
    got = solution.split_qkv(state)
    assert_equal(sorted(got), sorted(expected), because="three projections, and the rest as it was")
    assert_close(in_order(got), in_order(expected), rtol=0, atol=0, because="the exact inverse of fuse_qkv")
    assert_equal(sorted(state), names, because="the state that was given is not changed")


@task("split_qkv")
def test_the_parts_stand_alone(solution, randn):
    state = fused(separate(randn, True))
    got = solution.split_qkv(state)
    shared = [f"{n}_proj.{k}" for n in "qkv" for k in ("weight", "bias")]
    shared = [n for n in shared if same_storage(got[n], state[f"qkv_proj.{n.split('.')[1]}"])]
    assert_equal(shared, [], because="the parts share no memory with the fused matrix")


# linear_attention


def slow_linear_attention(q, k, v):
    """One place after another, with sums over all keys up to it."""
    q, k = (torch.where(x > 0, x + 1, x.clamp(max=0).exp()) for x in (q, k))
    rows = []
    for i in range(q.shape[-2]):
        w = (q[..., i : i + 1, :] * k[..., : i + 1, :]).sum(-1)  # (..., i + 1)
        rows.append((w[..., None] * v[..., : i + 1, :]).sum(-2) / w.sum(-1, keepdim=True))
    return torch.stack(rows, -2)


@task("linear_attention")
@pytest.mark.parametrize("form", ["parallel", "recurrent"])
@pytest.mark.parametrize("lead", [(), (2,), (2, 3)], ids=str)
@pytest.mark.parametrize("T", [1, 2, 6])
def test_both_forms_of_linear_attention(solution, randn, dtype, form, lead, T):
    q, k, v = randn(*lead, T, 3, dtype=dtype), randn(*lead, T, 3, dtype=dtype), randn(*lead, T, 4, dtype=dtype)
    expected = slow_linear_attention(q, k, v)
    call = solution.parallel if form == "parallel" else solution.recurrent
    assert_close(
        call(q, k, v), expected, because="a mean of the values so far, weighted by f(q) . f(k)", **TIGHT[dtype]
    )


@task("linear_attention")
@pytest.mark.parametrize("form", ["parallel", "recurrent"])
def test_linear_attention_of_nothing(solution, randn, form):
    call = solution.parallel if form == "parallel" else solution.recurrent
    assert_close(call(randn(2, 0, 3), randn(2, 0, 3), randn(2, 0, 4)), torch.zeros(2, 0, 4), because="T may be 0")


@task("linear_attention")
@pytest.mark.parametrize("form", ["parallel", "recurrent"])
def test_gradients_of_linear_attention(solution, randn, form):
    call = solution.parallel if form == "parallel" else solution.recurrent
    inputs = [randn(2, 4, 3, dtype=F64), randn(2, 4, 3, dtype=F64), randn(2, 4, 5, dtype=F64)]
    assert_gradients_close(call, slow_linear_attention, inputs, because="gradients reach q, k and v")


@task("linear_attention")
def test_the_memory_does_not_grow(solution, randn):
    q, k, v = randn(64, 4), randn(64, 4), randn(64, 5)
    assert_cost(solution.recurrent, q, k, v, no_larger_than=64 * 9, because="no table of T * T, no state per place")
