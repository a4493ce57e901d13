"""Day 16: what the tasks promise."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from checker.testing import (
    assert_close,
    assert_cost,
    assert_equal,
    assert_gradients_close,
    assert_raises,
    assert_that,
    cost_case,
    global_rng_untouched,
    measure,
    noncontiguous,
    task,
    unmetered,
)

HALF = [torch.float16, torch.bfloat16]


def row_by_row(q, k, v, mask=None, scale=None):
    """The definition, one query at a time, with the allowed keys picked out: (out, weights), differentiable."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    lead = np.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    q, k, v = (x.expand(*lead, *x.shape[-2:]) for x in (q, k, v))
    if mask is None:
        mask = torch.ones((), dtype=torch.bool, device=q.device)
    mask = mask.expand(*lead, q.shape[-2], k.shape[-2])
    out, weights = [], []
    for place in np.ndindex(*lead, q.shape[-2]):
        *head, _ = place
        allowed = mask[place].nonzero()[:, 0]
        keys, values = k[tuple(head)][allowed], v[tuple(head)][allowed]
        exponentials = ((keys * q[place]).sum(-1) * scale).double()
        exponentials = (exponentials - exponentials.max()).exp() if len(allowed) else exponentials
        share = (exponentials / exponentials.sum()).to(v.dtype)
        out.append((share[:, None] * values).sum(0))
        weights.append(torch.zeros_like(mask[place], dtype=v.dtype).index_put((allowed,), share))
    shape = (*lead, q.shape[-2])
    return torch.stack(out).reshape(*shape, v.shape[-1]), torch.stack(weights).reshape(*shape, k.shape[-2])


def definition(q, k, v, mask=None, scale=None):
    """The same in numpy and float64, of values that the solution cannot touch: (out, weights) as CPU tensors."""
    q, k, v = (x.detach().double().cpu().numpy().copy() for x in (q, k, v))
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    lead = np.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    q, k, v = (np.broadcast_to(x, (*lead, *x.shape[-2:])) for x in (q, k, v))
    allowed = np.ones((), dtype=bool) if mask is None else mask.cpu().numpy()
    allowed = np.broadcast_to(allowed, (*lead, q.shape[-2], k.shape[-2]))
    weights, out = np.zeros(allowed.shape), np.zeros((*q.shape[:-1], v.shape[-1]))
    for place in np.ndindex(*q.shape[:-1]):
        keep, head = allowed[place], place[:-1]
        if keep.any():
            scores = k[head][keep] @ q[place] * scale
            exponentials = np.exp(scores - scores.max())
            weights[place][keep] = exponentials / exponentials.sum()
            out[place] = weights[place][keep] @ v[head][keep]
    return torch.from_numpy(out), torch.from_numpy(weights)


def inputs(randn, tq=5, tk=7, d=4, dv=6, lead=(2, 3), **kwargs):
    """Random q, k and v."""
    return randn(*lead, tq, d, **kwargs), randn(*lead, tk, d, **kwargs), randn(*lead, tk, dv, **kwargs)


def some_mask(rand, *shape):
    """A random mask in which each query may attend to something, and not to everything."""
    mask = rand(*shape) < 0.5
    mask[..., 1] = True
    mask[..., 0] = False
    return mask


def assert_attention(found, expected, dtype, because, *, atol=5e-6):
    """Compare (out, weights) with what the definition gives."""
    for one, two, name in zip(found, expected, ("out", "weights"), strict=True):
        loose = {"atol": atol} if dtype == torch.float32 else {}
        assert_close(one, two.to(dtype), because=f"{because} ({name})", **loose)


# causal_mask


def triangle(tq, tk, offset):
    """The definition, place by place."""
    mask = torch.zeros(tq, tk, dtype=torch.bool)
    for i in range(tq):
        for j in range(tk):
            mask[i, j] = j <= i + offset
    return mask


@task("causal_mask")
@pytest.mark.parametrize("n", [1, 2, 5])
def test_as_many_queries_as_keys_give_the_lower_triangle(solution, n, device):
    assert_equal(
        solution.causal_mask(n, n, device=device),
        triangle(n, n, 0),
        because="True where j <= i: a place sees itself and what is before it",
    )


@task("causal_mask")
@pytest.mark.parametrize("tk", [1, 4, 9])
def test_a_single_query_sees_every_key(solution, tk, device):
    assert_equal(
        solution.causal_mask(1, tk, device=device),
        torch.ones(1, tk, dtype=torch.bool),
        because=f"one query and {tk} keys: the query is the newest place",
    )


@task("causal_mask")
@pytest.mark.parametrize(("tq", "tk"), [(3, 5), (2, 7), (4, 5)])
def test_by_default_the_last_query_is_the_newest_place(solution, tq, tk, device):
    assert_equal(
        solution.causal_mask(tq, tk, device=device),
        triangle(tq, tk, tk - tq),
        because=f"{tq} queries are the last of {tk} places, so query 0 already sees {tk - tq + 1} keys",
    )


@task("causal_mask")
@pytest.mark.parametrize(("tq", "tk"), [(5, 3), (4, 1)])
def test_queries_that_come_before_every_key_get_empty_rows(solution, tq, tk, device):
    assert_equal(
        solution.causal_mask(tq, tk, device=device),
        triangle(tq, tk, tk - tq),
        because=f"{tq} queries, {tk} keys: the first {tq - tk} rows are empty",
    )


@task("causal_mask")
@pytest.mark.parametrize(("tq", "tk"), [(3, 5), (5, 3), (1, 4)])
def test_an_offset_replaces_the_default_and_zero_is_one(solution, tq, tk, device):
    assert_equal(
        solution.causal_mask(tq, tk, offset=1, device=device),
        torch.from_numpy(np.tril(np.ones((tq, tk), dtype=bool), 1)),
        because="offset=1 was asked for: query 0 sees the keys 0 and 1, whatever the sizes are",
    )
    assert_equal(
        solution.causal_mask(tq, tk, offset=0, device=device),
        torch.from_numpy(np.tril(np.ones((tq, tk), dtype=bool))),
        because="offset=0 was asked for: query 0 sees key 0 alone, whatever the sizes are",
    )


@task("causal_mask")
@pytest.mark.parametrize("offset", [-9, -2, -1, 1, 3, 9])
def test_any_offset_moves_the_edge(solution, offset, device):
    assert_equal(
        solution.causal_mask(4, 6, offset=offset, device=device),
        triangle(4, 6, offset),
        because=f"query i sees the keys up to i + {offset}",
    )


@task("causal_mask")
@pytest.mark.parametrize(("tq", "tk"), [(0, 3), (3, 0), (0, 0)])
def test_a_causal_mask_may_be_empty(solution, tq, tk, device):
    assert_equal(solution.causal_mask(tq, tk, device=device), torch.zeros(tq, tk, dtype=torch.bool))


@task("causal_mask")
def test_the_causal_mask_is_made_where_it_was_asked_for(solution):
    mask = solution.causal_mask(2, 3, device="meta")
    assert_equal(
        (mask.device.type, mask.dtype, tuple(mask.shape)),
        ("meta", torch.bool, (2, 3)),
        because="device='meta' was asked for",
    )


# combine_masks


@task("combine_masks")
def test_allowed_is_what_both_masks_allow(solution, rand):
    a, b = rand(4, 5) < 0.6, rand(4, 5) < 0.6
    a[0, :4] = torch.tensor([True, True, False, False])
    b[0, :4] = torch.tensor([True, False, True, False])
    expected = torch.from_numpy(np.logical_and(a.cpu().numpy(), b.cpu().numpy()))
    assert_equal(solution.combine_masks(a, b), expected, because="allowed means allowed by every mask")


@task("combine_masks")
def test_three_masks_all_have_a_say(solution, rand):
    masks = [rand(3, 4) < 0.8 for _ in range(3)]
    masks[0][0, 0], masks[1][1, 1], masks[2][2, 2] = False, False, False
    expected = torch.from_numpy(np.logical_and.reduce([mask.cpu().numpy() for mask in masks]))
    assert_equal(solution.combine_masks(*masks), expected, because="allowed means allowed by all three")


@task("combine_masks")
@pytest.mark.parametrize("where", ["AN", "NA", "NAN", "ANB", "NNANB"])
def test_none_has_no_say(solution, rand, where):
    masks = {"A": rand(3, 4) < 0.6, "B": rand(3, 4) < 0.6, "N": None}
    masks["A"][0, :2] = torch.tensor([True, False])
    expected = masks["A"].cpu().clone()
    if "B" in where:
        expected &= masks["B"].cpu()
    assert_equal(
        solution.combine_masks(*(masks[letter] for letter in where)),
        expected,
        because="None allows everything, so the other masks decide",
    )


@task("combine_masks")
@pytest.mark.parametrize("n", [0, 1, 3])
def test_none_alone_stays_none(solution, n):
    assert_equal(solution.combine_masks(*[None] * n), None, because="nothing is forbidden, and None says just that")


@task("combine_masks")
@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 1, 1, 5), (4, 5)),
        ((4, 5), (2, 1, 1, 5)),
        ((4, 1), (1, 5)),
        ((5,), (3, 1, 4, 1), (2, 1, 1, 1, 1)),
        ((), (3,)),
    ],
)
def test_masks_broadcast_together_in_any_order(solution, rand, shapes):
    masks = [rand(*shape) < 0.7 for shape in shapes]
    expected = np.ones((), dtype=bool)
    for mask in masks:
        expected = np.logical_and(expected, mask.cpu().numpy())
    assert_equal(
        solution.combine_masks(*masks),
        torch.from_numpy(np.asarray(expected)),
        because=f"shapes {', '.join(map(str, shapes))} give {expected.shape}",
    )


@task("combine_masks")
@pytest.mark.parametrize(("a", "b"), [((2, 3), (3, 2)), ((4, 5), (2, 1, 1, 4))])
def test_masks_that_do_not_broadcast_are_refused(solution, rand, a, b):
    masks = [rand(*a) < 0.5, None, rand(*b) < 0.5]
    assert_raises(ValueError, solution.combine_masks, *masks, mentions=[str(a), str(b)])


# attention


@task("attention")
@pytest.mark.parametrize(
    ("lead", "tq", "tk", "d", "dv"),
    [((), 3, 5, 4, 4), ((2, 3), 5, 7, 4, 4), ((2,), 4, 1, 3, 3), ((2, 2), 2, 2, 2, 2), ((1, 2, 3), 1, 6, 5, 5)],
)
def test_attention_is_torchs(solution, randn, dtype, lead, tq, tk, d, dv):
    q, k, v = inputs(randn, tq, tk, d, dv, lead, dtype=dtype)
    expected = F.scaled_dot_product_attention(*(x.double().cpu() for x in (q, k, v))).to(dtype)
    out, _ = solution.attention(q, k, v)
    loose = {"atol": 5e-6} if dtype == torch.float32 else {}
    assert_close(out, expected, because="out = softmax(q k^T / sqrt(D)) v", **loose)


@task("attention")
def test_the_weights_of_each_query_are_its_softmax(solution, randn, dtype):
    q, k, v = inputs(randn, dtype=dtype)
    expected = definition(q, k, v)
    assert_attention(solution.attention(q, k, v), expected, dtype, "each query spreads a weight of 1 over the keys")


@task("attention")
@pytest.mark.parametrize(("d", "dv"), [(12, 8), (3, 5), (4, 1)])
def test_values_may_have_another_width(solution, randn, dtype, d, dv):
    q, k, v = inputs(randn, d=d, dv=dv, dtype=dtype)
    expected = definition(q, k, v)
    assert_attention(
        solution.attention(q, k, v), expected, dtype, f"D = {d} makes the scores and their scale, Dv = {dv} comes out"
    )


@task("attention")
@pytest.mark.parametrize("scale", [0.3, 2.0, -1.0])
def test_the_scale_can_be_chosen(solution, randn, scale):
    q, k, v = inputs(randn, dtype=torch.float64)
    expected = definition(q, k, v, scale=scale)
    assert_attention(
        solution.attention(q, k, v, None, scale), expected, torch.float64, f"scale={scale} takes the place of D ** -0.5"
    )


@task("attention")
def test_a_scale_of_zero_is_a_scale(solution, randn):
    q, k, v = inputs(randn, dtype=torch.float64)
    expected = definition(q, k, v, scale=0.1)
    assert_attention(solution.attention(q, k, v, scale=0.1), expected, torch.float64, "scale=0.1 was given")
    q, k, v = inputs(randn, dtype=torch.float64)
    expected = definition(q, k, v, scale=0.0)
    assert_attention(
        solution.attention(q, k, v, scale=0.0), expected, torch.float64, "scale=0 makes all scores 0, so v is averaged"
    )


@task("attention")
def test_true_means_may_attend(solution, randn, device):
    q, k, v = inputs(randn, tq=2, tk=3, lead=())
    mask = torch.tensor([[False, True, False], [True, False, False]], device=device)
    expected = v[[1, 0]].cpu().clone()
    out, _ = solution.attention(q, k, v, mask)
    assert_close(out, expected, because="query 0 may attend to key 1 alone, query 1 to key 0 alone")


@task("attention")
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (5, 7), (2, 1, 1, 7), (3, 1, 7), (2, 1, 5, 7), (7,)])
def test_masks_broadcast_to_the_scores(solution, randn, rand, dtype, shape):
    q, k, v = inputs(randn, dtype=dtype)
    mask = some_mask(rand, *shape)
    expected = definition(q, k, v, mask)
    assert_attention(solution.attention(q, k, v, mask), expected, dtype, f"a mask {shape} is stretched to (2, 3, 5, 7)")


@task("attention")
def test_a_mask_may_have_one_column_for_all_keys(solution, randn, device):
    q, k, v = inputs(randn, dtype=torch.float64, lead=(2,))
    mask = torch.tensor([True, False, True, True, False], device=device)[:, None]
    expected = definition(q, k, v, mask)
    assert_attention(
        solution.attention(q, k, v, mask), expected, torch.float64, "a mask (5, 1) switches whole queries off"
    )


@task("attention")
def test_equal_sizes_hide_no_axis(solution, randn, rand):
    q, k, v = inputs(randn, 4, 4, 4, 4, (4, 4), dtype=torch.float64)
    mask = some_mask(rand, 4, 1, 4, 4)
    expected = definition(q, k, v, mask)
    assert_attention(
        solution.attention(q, k, v, mask), expected, torch.float64, "all sizes are 4, so no shape shows a mix-up"
    )


@task("attention")
def test_hidden_keys_weigh_exactly_nothing(solution, randn, rand):
    q, k, v = inputs(randn)
    mask = some_mask(rand, 2, 1, 5, 7)
    hidden = ~mask.expand(2, 3, 5, 7).cpu()
    _, weights = solution.attention(q, k, v, mask)
    found = weights.detach().cpu()[hidden]
    assert_equal(found, torch.zeros_like(found), because="the weight of a hidden key is 0, not nearly 0")


@task("attention")
@pytest.mark.parametrize("size", [1e4, 1e18])
def test_what_a_hidden_key_holds_changes_nothing(solution, randn, rand, size):
    q, k, v = inputs(randn, lead=(), dtype=torch.float64)
    mask = some_mask(rand, 7)
    expected = definition(q, k, v, mask)
    k[~mask], v[~mask] = size, -size
    assert_attention(
        solution.attention(q, k, v, mask),
        expected,
        torch.float64,
        f"the hidden keys hold {size:g}, and nobody may notice",
    )


@task("attention")
def test_a_query_with_nothing_allowed_gets_zeros(solution, randn, rand, dtype):
    q, k, v = inputs(randn, dtype=dtype)
    mask = some_mask(rand, 2, 3, 5, 7)
    mask[0, 1, 2] = mask[1, :, 0] = False
    expected = definition(q, k, v, mask)
    assert_attention(
        solution.attention(q, k, v, mask), expected, dtype, "a query that may attend to no key gets zeros, not NaN"
    )


def gradients(fn, tensors, weighting):
    """The gradients of sum(weighting * fn(*tensors)); zeros where there is no path."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = fn(*leaves)
    if not out.requires_grad:
        return [torch.zeros_like(x) for x in leaves]
    return torch.autograd.grad((out * weighting).sum(), leaves, materialize_grads=True)


@task("attention")
def test_a_query_with_nothing_allowed_sends_back_zeros(solution, randn, rand):
    q, k, v = inputs(randn, lead=(2,), dtype=torch.float64)
    mask = some_mask(rand, 2, 5, 7)
    mask[0, 2] = mask[1, 0] = False
    weighting = randn(2, 5, 6, dtype=torch.float64)
    expected = [x.cpu() for x in gradients(lambda *qkv: row_by_row(*qkv, mask)[0], (q, k, v), weighting)]
    out = row_by_row(q, k, v, mask)[0].cpu()
    assert_close(solution.attention(q, k, v, mask)[0], out, because="two queries may attend to nothing")
    found = gradients(lambda *qkv: solution.attention(*qkv, mask)[0], (q, k, v), weighting)
    assert_close(
        list(found), expected, because="two queries may attend to nothing: they send 0 to q, k and v, and no NaN"
    )


@task("attention")
def test_gradients_flow_to_queries_keys_and_values(solution, randn, rand):
    q, k, v = inputs(randn, lead=(2,), dtype=torch.float64)
    mask = some_mask(rand, 5, 7)
    assert_gradients_close(
        lambda q, k, v: solution.attention(q, k, v, mask, 0.7)[0],
        lambda q, k, v: row_by_row(q, k, v, mask, 0.7)[0],
        [q, k, v],
        because="the gradients of out at q, k and v",
    )


@task("attention")
def test_gradients_flow_through_the_weights(solution, randn):
    q, k, v = inputs(randn, lead=(2,), dtype=torch.float64)
    assert_gradients_close(
        lambda q, k: solution.attention(q, k, v)[1],
        lambda q, k: row_by_row(q, k, v)[1],
        [q, k],
        because="the gradients of the weights at q and k",
    )


@task("attention")
@pytest.mark.parametrize("masked", [False, True])
def test_scores_of_ten_thousand_are_fine(solution, randn, rand, masked):
    q, k, v = inputs(randn, dtype=torch.float64)
    q = q * 1e4
    mask = some_mask(rand, 5, 7) if masked else None
    expected = definition(q, k, v, mask)
    for one, two in zip(solution.attention(q, k, v, mask), expected, strict=True):
        assert_close(one, two, rtol=1e-8, atol=1e-9, because="scores of 10,000 and more, and still weights")


@task("attention")
def test_scores_of_ten_thousand_are_fine_in_float32(solution, device, randn):
    q, k = torch.full((1, 1), 100.0, device=device), torch.tensor([[100.0], [100.0], [-100.0]], device=device)
    v = randn(3, 4)
    expected = definition(q, k, v)
    assert_attention(solution.attention(q, k, v), expected, torch.float32, "the scores are 10,000, 10,000 and -10,000")


@task("attention")
def test_an_allowed_key_counts_however_low_its_score(solution, randn, device):
    q = torch.ones(1, 1, dtype=torch.float64, device=device)
    k = torch.tensor([[-1e12], [5.0], [-1e12]], dtype=torch.float64, device=device)
    v = randn(3, 2, dtype=torch.float64)
    mask = torch.tensor([True, False, True], device=device)
    expected = definition(q, k, v, mask)
    assert_attention(
        solution.attention(q, k, v, mask), expected, torch.float64, "the two allowed keys share the weight at -1e12"
    )


@task("attention")
@pytest.mark.parametrize("masked", [False, True])
def test_without_keys_there_is_nothing_to_mix(solution, randn, device, masked):
    q, k, v = inputs(randn, tk=0)
    mask = torch.ones(5, 0, dtype=torch.bool, device=device) if masked else None
    out, weights = solution.attention(q, k, v, mask)
    assert_close(out, torch.zeros(2, 3, 5, 6), because="Tk = 0: each query may attend to no key and gets zeros")
    assert_equal(tuple(weights.shape), (2, 3, 5, 0), because="one weight per query and key, and there are no keys")


@task("attention")
@pytest.mark.parametrize(("lead", "tq"), [((2, 3), 0), ((0, 3), 5)])
def test_without_queries_nothing_comes_out(solution, randn, device, lead, tq):
    q, k, v = inputs(randn, tq=tq, lead=lead)
    mask = torch.ones(tq, 7, dtype=torch.bool, device=device)
    out, weights = solution.attention(q, k, v, mask)
    assert_equal((tuple(out.shape), tuple(weights.shape)), ((*lead, tq, 6), (*lead, tq, 7)))


@task("attention")
@pytest.mark.parametrize(
    ("for_q", "for_k", "for_v"),
    [
        ((2, 3), (2, 1), (2, 1)),
        ((2, 3), (), ()),
        ((3,), (2, 1), (2, 1)),
        ((), (2,), (2,)),
        ((3,), (3,), (2, 1)),
        ((2, 3), (2, 1), (3,)),
    ],
)
def test_leading_axes_broadcast(solution, randn, dtype, for_q, for_k, for_v):
    q, k, v = randn(*for_q, 5, 4, dtype=dtype), randn(*for_k, 7, 4, dtype=dtype), randn(*for_v, 7, 6, dtype=dtype)
    expected, _ = definition(q, k, v)
    out, _ = solution.attention(q, k, v)
    loose = {"atol": 5e-6} if dtype == torch.float32 else {}
    assert_close(out, expected.to(dtype), because=f"{for_q}, {for_k} and {for_v} are stretched to fit", **loose)


@task("attention")
def test_strides_do_not_matter(solution, randn, rand):
    q, k, v = (noncontiguous(x) for x in inputs(randn, dtype=torch.float64))
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) if x is k else x for x in (q, k, v))
    mask = some_mask(rand, 7, 5).T.clone()
    mask[:, 2] = True
    mask = noncontiguous(mask)
    expected = definition(q, k, v, mask)
    assert_attention(
        solution.attention(q, k, v, mask), expected, torch.float64, "q, k, v and the mask are slices of larger tensors"
    )


@task("attention")
@pytest.mark.parametrize("half", HALF)
def test_half_precision_is_rounded_at_the_end(solution, randn, rand, half):
    q, k, v = (x.to(half) for x in inputs(randn, tq=20, tk=30, d=16, dv=8, lead=(2,)))
    mask = some_mask(rand, 20, 30)
    mask[3] = False
    expected = definition(q, k, v, mask)
    for one, two in zip(solution.attention(q, k, v, mask), expected, strict=True):
        assert_close(one, two.to(half), because=f"{half} in, {half} out, float32 between")


@task("attention")
def test_bfloat16_scores_of_256_and_257_stay_apart(solution, randn, device):
    q = torch.tensor([[16.0, 1.0]], dtype=torch.bfloat16, device=device)
    k = torch.tensor([[16.0, 0.0], [16.0, 1.0]], dtype=torch.bfloat16, device=device)
    v = torch.tensor([[0.0, 4.0], [4.0, 0.0]], dtype=torch.bfloat16, device=device)
    expected, _ = definition(q, k, v, scale=1.0)
    out, _ = solution.attention(q, k, v, scale=1.0)
    assert_close(
        out, expected.to(torch.bfloat16), because="bfloat16 has 8 bits and no 257: the scores have to be float32"
    )


@task("attention")
def test_float16_scores_of_a_hundred_thousand_do_not_overflow(solution, device):
    q = torch.full((1, 2), 250.0, dtype=torch.float16, device=device)
    k = torch.tensor([[250.0, 250.0], [250.0, 250.0], [-250.0, 1.0]], dtype=torch.float16, device=device)
    v = torch.tensor([[1.0], [3.0], [50.0]], dtype=torch.float16, device=device)
    expected, _ = definition(q, k, v, scale=1.0)
    out, _ = solution.attention(q, k, v, scale=1.0)
    assert_close(out, expected.half(), because="float16 ends at 65,504: a score of 125,000 has to be float32")


@task("attention")
def test_dropped_weights_are_zero_and_the_others_grow(solution, randn, generator):
    q, k, v = inputs(randn, tq=64, tk=64, lead=(2, 3))
    # the learner's own weights are the measure: what is wrong with those is found elsewhere, and named more surely there
    whole = solution.attention(q, k, v)[1].detach().cpu()
    _, weights = solution.attention(q, k, v, dropout_p=0.2, generator=generator)
    found = weights.detach().cpu()
    expected = torch.where(found == 0, 0.0, whole / 0.8)
    assert_close(weights, expected, atol=5e-6, because="each weight is either 0 or divided by 1 - 0.2")
    dropped = (found == 0).double().mean().item()
    assert_that(0.16 < dropped < 0.24, "with dropout_p=0.2 about one weight in five is 0", value=dropped)
    per_row = (found == 0).sum(-1)
    assert_that(
        bool((per_row.max() < 40) & ((found[0, 0] == 0) != (found[0, 1] == 0)).any()),
        "each weight is dropped by itself, not with its row nor with the other heads",
        value=per_row,
    )


@task("attention")
def test_with_dropout_out_is_still_weights_times_values(solution, randn, generator):
    q, k, v = inputs(randn, tq=9, lead=(2,), dtype=torch.float64)
    out, weights = solution.attention(q, k, v, dropout_p=0.4, generator=generator)
    expected = torch.from_numpy(np.matmul(weights.detach().cpu().numpy(), v.cpu().numpy()))
    assert_close(out, expected, because="the weights returned are those that met v; nothing else was dropped")


@task("attention")
def test_dropout_of_one_leaves_zeros(solution, randn, generator):
    q, k, v = inputs(randn, lead=(2,))
    found = solution.attention(q, k, v, dropout_p=1.0, generator=generator)
    expected = (torch.zeros(2, 5, 6), torch.zeros(2, 5, 7))
    assert_attention(found, expected, torch.float32, "dropout_p=1 drops everything, without a NaN")


@task("attention")
def test_gradients_pass_the_weights_that_were_kept(solution, randn, generator):
    q, k, v = inputs(randn, lead=(), dtype=torch.float64)
    state = generator.get_state()
    with global_rng_untouched():
        _, weights = solution.attention(q, k, v, dropout_p=0.5, generator=generator)
    factors = torch.where(weights.detach() == 0, 0.0, 2.0)

    def ours(q, k, v):
        generator.set_state(state)
        return solution.attention(q, k, v, dropout_p=0.5, generator=generator)[0]

    assert_gradients_close(
        ours,
        lambda q, k, v: (solution.attention(q, k, v)[1] * factors) @ v,
        [q, k, v],
        because="the gradients of out at q, k and v where some weights were dropped",
    )


@task("attention")
def test_the_generator_decides_what_is_dropped(solution, randn, generator):
    q, k, v = inputs(randn, tq=20)
    state = generator.get_state()
    with global_rng_untouched():
        first = solution.attention(q, k, v, dropout_p=0.5, generator=generator)[1]
        second = solution.attention(q, k, v, dropout_p=0.5, generator=generator)[1]
    generator.set_state(state)
    again = solution.attention(q, k, v, dropout_p=0.5, generator=generator)[1]
    assert_equal(again, first.detach().cpu().clone(), because="the same state of the generator, the same weights")
    assert_that(bool((first != second).any()), "a second draw from the same generator drops others", value=second)


@task("attention")
def test_without_a_generator_torchs_own_is_used(solution, randn):
    q, k, v = inputs(randn, tq=20)
    v = torch.eye(7, device=q.device)
    with torch.random.fork_rng():
        out, weights = solution.attention(q, k, v, dropout_p=0.5)
    same = bool(torch.isclose(out, weights).all())
    assert_that(same, "v is the identity here, so out is the weights", value=same)
    dropped = (weights == 0).double().mean().item()
    assert_that(0.2 < dropped < 0.8, "dropout_p=0.5 drops without a generator, too", value=dropped)


@task("attention")
def test_without_dropout_no_random_numbers_are_drawn(solution, randn, generator):
    q, k, v = inputs(randn)
    before = generator.get_state()
    with global_rng_untouched():
        solution.attention(q, k, v, generator=generator)
    assert_equal(generator.get_state(), before, because="dropout_p=0 draws nothing from the generator")


@task("attention")
@pytest.mark.parametrize(
    ("q", "k", "v"),
    [((2, 5, 4), (2, 7, 3), (2, 7, 6)), ((5, 1), (7, 4), (7, 6)), ((5, 4), (7, 1), (7, 4))],
)
def test_queries_and_keys_of_different_width_are_refused(solution, randn, q, k, v):
    assert_raises(ValueError, solution.attention, randn(*q), randn(*k), randn(*v), mentions=[str(q), str(k)])


@task("attention")
@pytest.mark.parametrize(
    ("q", "k", "v"),
    [((2, 5, 4), (2, 7, 4), (2, 6, 4)), ((5, 4), (7, 4), (1, 4)), ((5, 4), (1, 4), (7, 4)), ((7, 4), (5, 4), (7, 4))],
)
def test_keys_without_values_are_refused(solution, randn, q, k, v):
    assert_raises(ValueError, solution.attention, randn(*q), randn(*k), randn(*v), mentions=[str(k), str(v)])


@task("attention")
@pytest.mark.parametrize("shape", [(2, 3, 7, 5), (5,), (2, 5, 7), (4, 2, 3, 5, 7)])
def test_masks_that_do_not_fit_the_scores_are_refused(solution, randn, device, shape):
    q, k, v = inputs(randn)
    mask = torch.ones(shape, dtype=torch.bool, device=device)
    assert_raises(ValueError, solution.attention, q, k, v, mask, mentions=[str(shape), str((2, 3, 5, 7))])


@task("attention")
def test_attention_takes_two_matrix_products(solution, randn, rand):
    q, k, v = inputs(randn, tq=16, tk=24, d=8, dv=12)
    mask = some_mask(rand, 16, 24)
    assert_cost(
        solution.attention,
        q,
        k,
        v,
        mask,
        matmuls=2,
        flops=2 * 2 * 3 * 16 * 24 * (8 + 12),
        because="two batched matrix products, one for the scores and one for the mixture",
    )


@task("attention")
def test_few_tables_of_scores_are_alive_at_one_time(solution, randn):
    q, k, v = inputs(randn, tq=64, tk=80, d=4, dv=4)
    scores, rest = 2 * 3 * 64 * 80 * 4, 2 * 3 * (2 * 64 + 2 * 80) * 4 * 4
    assert_cost(
        solution.attention,
        q,
        k,
        v,
        max_peak_bytes=4 * scores + 2 * rest,
        because="four tensors of the size of the scores are enough",
    )


@cost_case("attention")
def attention_cost(module, randn):
    q, k, v = randn(2, 4, 32, 16), randn(2, 4, 48, 16), randn(2, 4, 48, 24)
    return lambda: module.attention(q, k, v)


# attention_grads


def jacobian_grads(dout, q, k, v, weights, scale):
    """In numpy, one query at a time, with the whole Jacobian of its softmax."""
    dout, q, k, v, weights = (x.detach().double().cpu().numpy() for x in (dout, q, k, v, weights))
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for place in np.ndindex(*q.shape[:-1]):
        head, p = place[:-1], weights[place]
        jacobian = np.diag(p) - np.outer(p, p)
        dscore = jacobian @ (v[head] @ dout[place]) * scale
        dq[place] = dscore @ k[head]
        dk[head] += np.outer(dscore, q[place])
        dv[head] += np.outer(p, dout[place])
    return [torch.from_numpy(x) for x in (dq, dk, dv)]


@task("attention_grads")
@pytest.mark.parametrize(
    ("lead", "tq", "tk", "d", "dv"),
    [((2, 3), 5, 7, 4, 6), ((), 3, 5, 4, 2), ((2,), 3, 3, 3, 3), ((2,), 1, 4, 3, 5), ((1,), 4, 1, 2, 3)],
)
def test_the_gradients_are_those_of_autograd(solution, randn, lead, tq, tk, d, dv):
    q, k, v = inputs(randn, tq, tk, d, dv, lead, dtype=torch.float64)
    dout = randn(*lead, tq, dv, dtype=torch.float64)
    expected = [x.cpu() for x in gradients(lambda *qkv: row_by_row(*qkv, None, 0.6)[0], (q, k, v), dout)]
    weights = row_by_row(q, k, v, None, 0.6)[1]
    found = solution.attention_grads(dout, q, k, v, weights, 0.6)
    for one, two, name in zip(found, expected, ("dq", "dk", "dv"), strict=True):
        assert_close(one, two, because=f"{name} is what autograd finds")


@task("attention_grads")
@pytest.mark.parametrize("width", [4, 9])
def test_without_a_scale_the_gradients_use_that_of_the_width(solution, randn, width):
    q, k, v = inputs(randn, d=width, lead=(2,), dtype=torch.float64)
    dout, weights = randn(2, 5, 6, dtype=torch.float64), row_by_row(q, k, v)[1]
    expected = jacobian_grads(dout, q, k, v, weights, 1 / math.sqrt(width))
    found = solution.attention_grads(dout, q, k, v, weights, None)
    assert_close(list(found), expected, because="scale=None means D ** -0.5")


@task("attention_grads")
def test_a_scale_of_zero_stops_queries_and_keys(solution, randn):
    q, k, v = inputs(randn, lead=(2,), dtype=torch.float64)
    dout, weights = randn(2, 5, 6, dtype=torch.float64), row_by_row(q, k, v, None, 0.0)[1]
    expected = jacobian_grads(dout, q, k, v, weights, 0.0)
    found = solution.attention_grads(dout, q, k, v, weights, 0.0)
    assert_close(list(found), expected, because="with scale=0 neither q nor k matters; v does")


@task("attention_grads")
def test_masks_and_empty_rows_are_in_the_weights(solution, randn, rand):
    q, k, v = inputs(randn, lead=(2,), dtype=torch.float64)
    mask = some_mask(rand, 2, 5, 7)
    mask[0, 2] = mask[1, 0] = False
    dout, weights = randn(2, 5, 6, dtype=torch.float64), row_by_row(q, k, v, mask)[1]
    expected = [x.cpu() for x in gradients(lambda *qkv: row_by_row(*qkv, mask)[0], (q, k, v), dout)]
    found = solution.attention_grads(dout, q, k, v, weights, None)
    assert_close(list(found), expected, because="a weight of 0 lets nothing through, in either direction")


@task("attention_grads")
def test_gradients_in_float32(solution, randn):
    q, k, v = inputs(randn)
    dout, weights = randn(2, 3, 5, 6), definition(q, k, v)[1].float().to(q.device)
    expected = [x.float() for x in jacobian_grads(dout, q, k, v, weights, 0.5)]
    found = solution.attention_grads(dout, q, k, v, weights, 0.5)
    assert_close(list(found), expected, rtol=1e-4, atol=1e-5, because="float32 in, float32 out")


@task("attention_grads")
@pytest.mark.parametrize("half", HALF)
def test_half_gradients_are_computed_in_float32(solution, randn, half):
    q, k, v = inputs(randn, tq=6, tk=9, d=8, dv=8, lead=(2,))
    dout = randn(2, 6, 8)
    v = v + 100.0  # the same in all values: it cancels, if it is not rounded first
    dout[..., 0] = 8.0
    weights = definition(q, k, v)[1].to(q.device)
    weights[..., -1] = 1 - weights[..., :-1].to(half).double().sum(-1)
    dout, q, k, v, weights = (x.to(half) for x in (dout, q, k, v, weights))
    expected = [x.to(half) for x in jacobian_grads(dout, q, k, v, weights, 1.0)]
    size = max(x.abs().max().item() for x in expected[:2])
    found = solution.attention_grads(dout, q, k, v, weights, 1.0)
    assert_close(
        list(found), expected, rtol=2e-2, atol=0.01 * size, because="computed in float32, rounded once at the end"
    )


@task("attention_grads")
@pytest.mark.parametrize(("lead", "tq", "tk"), [((2,), 0, 3), ((2,), 3, 0), ((0, 2), 3, 4)])
def test_gradients_of_nothing_are_zeros(solution, randn, lead, tq, tk):
    q, k, v = inputs(randn, tq=tq, tk=tk, lead=lead)
    found = solution.attention_grads(randn(*lead, tq, 6), q, k, v, randn(*lead, tq, tk), None)
    assert_close(list(found), [torch.zeros(x.shape) for x in (q, k, v)], because="there is nothing to send back")


@task("attention_grads")
def test_gradients_do_not_care_for_strides(solution, randn):
    q, k, v = inputs(randn, lead=(2,), dtype=torch.float64)
    dout, weights = randn(2, 5, 6, dtype=torch.float64), row_by_row(q, k, v)[1]
    expected = jacobian_grads(dout, q, k, v, weights, 0.5)
    found = solution.attention_grads(*(noncontiguous(x) for x in (dout, q, k, v, weights)), 0.5)
    assert_close(list(found), expected, because="all inputs are slices of larger tensors")


@task("attention_grads")
@pytest.mark.parametrize("shape", [(5, 6), (2, 5, 1), (2, 1, 6), (2, 5, 4), (6,)])
def test_a_dout_of_another_shape_is_refused(solution, randn, shape):
    q, k, v = inputs(randn, lead=(2,))
    assert_raises(
        ValueError,
        solution.attention_grads,
        randn(*shape),
        q,
        k,
        v,
        randn(2, 5, 7),
        None,
        mentions=[str(shape), str((2, 5, 6))],
    )


@task("attention_grads")
@pytest.mark.parametrize("shape", [(5, 7), (2, 7, 5), (2, 5, 1), (1, 5, 7)])
def test_weights_of_another_shape_are_refused(solution, randn, shape):
    q, k, v = inputs(randn, lead=(2,))
    assert_raises(
        ValueError,
        solution.attention_grads,
        randn(2, 5, 6),
        q,
        k,
        v,
        randn(*shape),
        None,
        mentions=[str(shape), str((2, 5, 7))],
    )


@task("attention_grads")
def test_backward_takes_four_matrix_products(solution, randn):
    q, k, v = inputs(randn, tq=16, tk=24, d=8, dv=12)
    dout, weights = randn(2, 3, 16, 12), randn(2, 3, 16, 24)
    assert_cost(
        solution.attention_grads,
        dout,
        q,
        k,
        v,
        weights,
        None,
        matmuls=4,
        flops=2 * (2 * 2 * 3 * 16 * 24 * (8 + 12)),
        because="four batched matrix products: twice what forward takes",
    )


@cost_case("attention_grads")
def attention_grads_cost(module, randn):
    q, k, v = randn(2, 4, 32, 16), randn(2, 4, 48, 16), randn(2, 4, 48, 24)
    dout, weights = randn(2, 4, 32, 24), randn(2, 4, 32, 48)
    return lambda: module.attention_grads(dout, q, k, v, weights, None)


# attention_flops


@task("attention_flops")
@pytest.mark.parametrize("sizes", [(2, 3, 5, 7, 4, 6), (1, 4, 8, 2, 3, 3), (3, 1, 1, 9, 2, 5)])
def test_it_is_the_number_that_the_meter_finds(solution, randn, sizes):
    b, h, tq, tk, d, dv = sizes
    q, k, v = randn(b, h, tq, d), randn(b, h, tk, d), randn(b, h, tk, dv)
    _, cost = measure(lambda: torch.softmax(q @ k.mT, -1) @ v)
    assert_equal(solution.attention_flops(*sizes), cost.flops, because=f"the meter counted {cost.flops:,}")


@task("attention_flops")
def test_one_query_and_one_key_take_two_multiplications_and_two_additions(solution):
    assert_equal(solution.attention_flops(1, 1, 1, 1, 1, 1), 4, because="a multiplication and an addition, twice")


@task("attention_flops")
def test_large_counts_are_exact(solution):
    expected = sum(2 * 128 * 131_073 * 131_071 for _ in range(192)) + sum(
        2 * 128 * 131_073 * 131_071 for _ in range(128)
    )
    assert_equal(
        solution.attention_flops(1, 128, 131_073, 131_071, 192, 128), expected, because="integers, to the last digit"
    )


# logit_spread


def same_numbers(generator):
    """Another generator in the same state."""
    twin = torch.Generator()
    twin.set_state(generator.get_state())
    return twin


def spread(d, n, scale, generator):
    """In numpy and float64, from the same random numbers."""
    twin = same_numbers(generator)
    q = torch.randn(n, d, generator=twin).double().numpy()
    k = torch.randn(n, d, generator=twin).double().numpy()
    scores = np.einsum("id,jd->ij", q, k) * scale
    entropies = []
    for row in scores:
        p = np.exp(row - row.max())
        p = p[p > 0] / p.sum()
        entropies.append(-(p * np.log(p)).sum())
    std = math.sqrt(((scores - scores.mean()) ** 2).mean())
    return torch.tensor([std, sum(entropies) / n], dtype=torch.float64)


def measured(solution, d, n, scale, generator):
    """(std, entropy) as one tensor; the solution may draw from the generator only."""
    with global_rng_untouched():
        std, entropy = solution.logit_spread(d, n, scale, generator=generator)
    return torch.tensor([std, entropy], dtype=torch.float64)


@task("logit_spread")
def test_both_are_plain_floats(solution, generator):
    std, entropy = solution.logit_spread(3, 5, None, generator=generator)
    kinds = type(std).__name__, type(entropy).__name__
    assert_equal(kinds, ("float", "float"), because="two Python floats, not tensors of one element")


@task("logit_spread")
@pytest.mark.parametrize(
    ("d", "n", "scale"), [(16, 24, 1.0), (16, 24, 0.25), (64, 10, 1 / 64), (1, 5, 2.0), (9, 2, -0.5)]
)
def test_spread_and_entropy_of_the_random_scores(solution, generator, d, n, scale):
    expected = spread(d, n, scale, generator)
    found = measured(solution, d, n, scale, generator)
    assert_close(found, expected, rtol=1e-4, atol=1e-4, because=f"std and entropy of {n} * {n} scores at width {d}")


@task("logit_spread")
@pytest.mark.parametrize("d", [16, 49])
def test_without_a_scale_the_spread_is_taken_at_the_root_of_the_width(solution, generator, d):
    expected = spread(d, 12, 1 / math.sqrt(d), generator)
    found = measured(solution, d, 12, None, generator)
    assert_close(found, expected, rtol=1e-4, atol=1e-4, because="scale=None means d ** -0.5")


@task("logit_spread")
def test_a_scale_of_zero_makes_all_scores_equal(solution, generator):
    found = measured(solution, 8, 6, 0.0, generator)
    expected = torch.tensor([0.0, math.log(6)], dtype=torch.float64)
    assert_close(found, expected, rtol=1e-5, atol=1e-6, because="all scores are 0: weights of 1/6")


@task("logit_spread")
def test_huge_scores_leave_one_key_and_no_nan(solution, generator):
    expected = spread(1024, 16, 10.0, generator)
    found = measured(solution, 1024, 16, 10.0, generator)
    assert_close(found, expected, rtol=1e-3, atol=1e-2, because="weights of 0 add nothing to the entropy")


@task("logit_spread")
def test_a_single_score_has_no_spread(solution, generator):
    found = measured(solution, 4, 1, None, generator)
    assert_close(
        found, torch.zeros(2, dtype=torch.float64), atol=1e-6, because="one query, one key: no deviation, no choice"
    )


@task("logit_spread")
def test_the_root_of_the_width_is_the_scale_that_keeps_the_spread(solution, generator):
    wide, _ = measured(solution, 256, 128, 1.0, generator).tolist()
    assert_that(14 < wide < 18, "without a scale the scores of width 256 spread by about sqrt(256) = 16", value=wide)
    scaled, _ = measured(solution, 256, 128, None, generator).tolist()
    assert_that(0.88 < scaled < 1.12, "with d ** -0.5 they spread by about 1", value=scaled)


@task("logit_spread")
def test_too_small_a_scale_is_an_average_and_none_is_an_argmax(solution, generator):
    _, flat = measured(solution, 256, 128, 1 / 256, generator).tolist()
    assert_that(0.999 < flat / math.log(128) <= 1.0001, "1/d spreads the weights evenly over all keys", value=flat)
    _, peaked = measured(solution, 256, 128, 1.0, generator).tolist()
    assert_that(0 <= peaked < 1.0, "without a scale one key takes nearly everything", value=peaked)


@task("logit_spread")
def test_only_the_generator_is_asked_for_random_numbers(solution, generator):
    twin = same_numbers(generator)
    torch.randn(7, 3, generator=twin)
    torch.randn(7, 3, generator=twin)
    measured(solution, 3, 7, None, generator)
    assert_equal(generator.get_state(), twin.get_state(), because="two draws of (n, d) numbers, and no more")


# flash_attention


def causal_or_not(causal, tq, tk):
    return triangle(tq, tk, tk - tq) if causal else None


FLASH_SIZES = [(10, 13, 3, 4), (13, 10, 4, 3), (8, 8, 4, 4), (1, 9, 2, 2), (5, 5, 1, 1), (5, 6, 64, 64), (6, 11, 6, 2)]


@task("flash_attention")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("tq", "tk", "block_q", "block_k"), FLASH_SIZES)
def test_blocks_change_nothing(solution, randn, causal, tq, tk, block_q, block_k):
    q, k, v = inputs(randn, tq, tk, 4, 3, (2,), dtype=torch.float64)
    expected, _ = definition(q, k, v, causal_or_not(causal, tq, tk))
    out = solution.flash_attention(q, k, v, causal=causal, block_q=block_q, block_k=block_k)
    assert_close(out, expected, because=f"blocks of {block_q} queries and {block_k} keys")


@task("flash_attention")
def test_blocks_in_float32(solution, randn):
    q, k, v = inputs(randn, 10, 13, 4, 3, (2,))
    expected = definition(q, k, v, triangle(10, 13, 3))[0].float()
    out = solution.flash_attention(q, k, v, causal=True, block_q=3, block_k=4)
    assert_close(out, expected, atol=5e-6, because="float32 in, float32 out")


@task("flash_attention")
@pytest.mark.parametrize("lead", [(), (2, 3)])
def test_any_number_of_leading_axes_and_any_width_of_values(solution, randn, lead):
    q, k, v = inputs(randn, 5, 7, 9, 2, lead, dtype=torch.float64)
    expected, _ = definition(q, k, v)
    out = solution.flash_attention(q, k, v, block_q=2, block_k=3)
    assert_close(out, expected, because="all leading axes at once")


@task("flash_attention")
def test_blocks_of_64_and_no_causality_are_the_default(solution, randn):
    q, k, v = inputs(randn, 65, 65, 4, 4, (), dtype=torch.float64)
    expected, _ = definition(q, k, v)
    out, cost = measure(solution.flash_attention, q, k, v)
    assert_close(out, expected, because="causal=False")
    assert_that(cost.matmuls == 8, "two products for each of 2 * 2 blocks of at most 64 by 64", value=cost.matmuls)
    q, k, v = inputs(randn, 64, 64, 4, 4, ())
    _, cost = measure(solution.flash_attention, q, k, v)
    assert_that(cost.matmuls == 2, "two products for one block of 64 by 64", value=cost.matmuls)


@task("flash_attention")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("tq", "tk", "block_q", "block_k"), [(6, 8, 2, 3), (8, 5, 3, 2), (5, 5, 2, 2)])
def test_blocks_send_back_the_same_gradients(solution, randn, causal, tq, tk, block_q, block_k):
    mask = causal_or_not(causal, tq, tk)
    mask = None if mask is None else mask.to(randn(1).device)
    assert_gradients_close(
        lambda q, k, v: solution.flash_attention(q, k, v, causal=causal, block_q=block_q, block_k=block_k),
        lambda q, k, v: row_by_row(q, k, v, mask)[0],
        inputs(randn, tq, tk, 4, 3, (2,), dtype=torch.float64),
        because=f"blocks of {block_q} queries and {block_k} keys, the gradients of attention",
    )


@task("flash_attention")
def test_a_maximum_that_moves_from_block_to_block(solution, randn, device):
    q = torch.full((1, 1), 100.0, dtype=torch.float64, device=device)
    k = torch.linspace(199.0, -199.0, 9, dtype=torch.float64, device=device)[:, None]
    k[4] = k.max() - 1 / 128
    v = randn(9, 2, dtype=torch.float64)
    expected, _ = definition(q, k, v)
    out = solution.flash_attention(q, k, v, block_q=1, block_k=2)
    assert_close(out, expected, rtol=1e-9, because="scores fall from 20,000 to -20,000, block by block")
    expected, _ = definition(q, k.flip(0), v)
    out = solution.flash_attention(q, k.flip(0), v, block_q=1, block_k=2)
    assert_close(out, expected, rtol=1e-9, because="scores climb from -20,000 to 20,000, block by block")


@task("flash_attention")
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_gradients_at_huge_scores(solution, randn, device, size):
    q = torch.full((2, 1), 1.0, dtype=torch.float64, device=device)
    k = size + randn(5, 1, dtype=torch.float64)
    assert_gradients_close(
        lambda q, k, v: solution.flash_attention(q, k, v, block_q=1, block_k=2),
        lambda q, k, v: row_by_row(q, k, v)[0],
        [q, k, randn(5, 3, dtype=torch.float64)],
        rtol=1e-6,
        atol=1e-7,
        because=f"all scores are near {size:g}: only their differences count",
    )


@task("flash_attention")
@pytest.mark.parametrize("half", HALF)
def test_half_blocks_are_computed_in_float32(solution, randn, half):
    q, k, v = (x.to(half) for x in inputs(randn, 9, 30, 4, 3, (2,)))
    q, k = q * 4, k * 4
    expected = definition(q, k, v, triangle(9, 30, 21))[0].to(half)
    out = solution.flash_attention(q, k, v, causal=True, block_q=4, block_k=3)
    assert_close(out, expected, because="scores and sums in float32, one rounding at the end")


@task("flash_attention")
def test_bfloat16_scores_of_256_and_257_stay_apart_in_blocks(solution, device):
    assert_close_scores_stay_apart(solution, device)


def assert_close_scores_stay_apart(solution, device):
    q = torch.tensor([[32.0, 2.0, 0.0, 0.0]], dtype=torch.bfloat16, device=device)
    k = torch.tensor([[16.0, 0.0, 0.0, 0.0], [16.0, 1.0, 0.0, 0.0]], dtype=torch.bfloat16, device=device)
    v = torch.tensor([[0.0, 4.0], [4.0, 0.0]], dtype=torch.bfloat16, device=device)
    expected, _ = definition(q, k, v)
    out = solution.flash_attention(q, k, v, block_q=1, block_k=1)
    assert_close(out, expected.to(torch.bfloat16), because="bfloat16 has no 257: the scores have to be float32")


@task("flash_attention")
@pytest.mark.parametrize("half", HALF)
def test_half_gradients_of_blocks(solution, randn, half):
    q, k, v = (x.to(half) for x in inputs(randn, 5, 16, 4, 3, ()))
    dout = randn(5, 3).to(half)
    wide = [x.detach().double() for x in (q, k, v)]
    expected = [x.to(half).cpu() for x in gradients(lambda *qkv: row_by_row(*qkv)[0], wide, dout.double())]
    found = gradients(lambda *qkv: solution.flash_attention(*qkv, block_q=4, block_k=3), (q, k, v), dout)
    assert_close(list(found), expected, rtol=2e-2, atol=1e-2, because="in the dtype of the inputs, summed in float32")


@task("flash_attention")
def test_many_small_gradients_are_not_lost_beside_a_large_one(solution, device):
    assert_close_scores_stay_apart(solution, device)
    q, k = (torch.ones(n, 2, dtype=torch.bfloat16, device=device) for n in (21, 1))
    dout = torch.ones(21, 1, dtype=torch.bfloat16, device=device)
    dout[0] = 256.0
    v = torch.ones(1, 1, dtype=torch.bfloat16, device=device)
    *_, dv = gradients(lambda *qkv: solution.flash_attention(*qkv, block_q=1), (q, k, v), dout)
    expected = torch.tensor([[276.0]], dtype=torch.bfloat16)
    assert_close(dv, expected, because="256 + 20 * 1, each from a block of its own: bfloat16 sums would stay at 256")


@task("flash_attention")
def test_blocks_do_not_care_for_strides(solution, randn):
    q, k, v = (noncontiguous(x) for x in inputs(randn, dtype=torch.float64))
    expected, _ = definition(q, k, v)
    out = solution.flash_attention(q, k, v, block_q=2, block_k=3)
    assert_close(out, expected, because="q, k and v are slices of larger tensors")


@task("flash_attention")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("lead", "tq", "tk"), [((2,), 0, 3), ((2,), 3, 0), ((0,), 3, 3)])
def test_blocks_of_nothing(solution, randn, causal, lead, tq, tk):
    q, k, v = inputs(randn, tq=tq, tk=tk, lead=lead)
    weighting = torch.ones(*lead, tq, 6, device=q.device)
    out = solution.flash_attention(q, k, v, causal=causal)
    assert_close(out, torch.zeros(*lead, tq, 6), because="nothing to attend to gives zeros")
    found = gradients(lambda *qkv: solution.flash_attention(*qkv, causal=causal), (q, k, v), weighting)
    assert_close(list(found), [torch.zeros(x.shape) for x in (q, k, v)], because="nothing is sent back")


@task("flash_attention")
@pytest.mark.parametrize(
    ("q", "k", "v"),
    [((2, 5, 4), (2, 7, 3), (2, 7, 6)), ((5, 4), (7, 1), (7, 6)), ((5, 4), (7, 4), (6, 4)), ((5, 4), (7, 4), (1, 4))],
)
def test_blocks_that_do_not_fit_are_refused(solution, randn, q, k, v):
    wrong = (q, k) if q[-1] != k[-1] else (k, v)
    assert_raises(
        ValueError, solution.flash_attention, randn(*q), randn(*k), randn(*v), mentions=[str(x) for x in wrong]
    )


def flash_bytes(lead, t, width, block):
    """What may be alive at one time: blocks, a few tensors of the size of the inputs, some numbers per query."""
    return 4 * lead * (8 * block * block + 2 * 4 * t * width + 16 * t)


@task("flash_attention")
@pytest.mark.parametrize("causal", [False, True])
def test_forward_never_holds_the_table(solution, randn, causal):
    q, k, v = (x.requires_grad_() for x in inputs(randn, 256, 256, 4, 4, (2,)))
    assert_cost(
        solution.flash_attention,
        q,
        k,
        v,
        causal=causal,
        block_q=32,
        block_k=32,
        no_larger_than=2 * 256 * 32,
        max_peak_bytes=flash_bytes(2, 256, 4, 32),
        because="256 queries meet 256 keys, 32 by 32: eight such blocks at one time are enough",
    )


@task("flash_attention")
def test_backward_never_holds_the_table(solution, randn):
    q, k, v = (x.requires_grad_() for x in inputs(randn, 96, 96, 4, 4, (2,)))
    dout = randn(2, 96, 4)

    def both():
        out = solution.flash_attention(q, k, v, block_q=16, block_k=16)
        return torch.autograd.grad(out, (q, k, v), dout)

    assert_cost(
        both,
        no_larger_than=2 * 96 * 16,
        max_peak_bytes=flash_bytes(2, 96, 4, 16),
        because="96 queries meet 96 keys, 16 by 16, and backward makes the blocks again one by one",
    )


@task("flash_attention")
@pytest.mark.parametrize("causal", [False, True])
def test_little_is_saved_for_backward(solution, randn, causal):
    q, k, v = (x.requires_grad_() for x in inputs(randn, 64, 64, 8, 8, (2,)))
    assert_cost(
        solution.flash_attention,
        q,
        k,
        v,
        causal=causal,
        block_q=16,
        block_k=16,
        max_saved_bytes=4 * 2 * 64 * (4 * 8 + 1),
        because="q, k, v, out and one number per query are enough to make every weight again",
    )


@task("flash_attention")
def test_blocks_that_lie_in_the_future_cost_nothing(solution, randn):
    q, k, v = (x.requires_grad_() for x in inputs(randn, 32, 48, 8, 4, (2,)))
    dout = randn(2, 32, 4)
    blocks = sum(1 for i in range(0, 32, 8) for j in range(0, 48, 8) if j <= i + 7 + 16)
    one = 2 * 2 * 8 * 8
    expected = definition(q, k, v, triangle(32, 48, 16))[0].float()
    out = assert_cost(
        solution.flash_attention,
        q,
        k,
        v,
        causal=True,
        block_q=8,
        block_k=8,
        no_larger_than=2 * 48 * 8,
        because="block by block, and no table",
    )
    assert_close(out, expected, atol=5e-6, because="the past alone")
    out = assert_cost(
        solution.flash_attention,
        q,
        k,
        v,
        causal=True,
        block_q=8,
        block_k=8,
        max_flops=blocks * one * (8 + 4),
        because=f"only {blocks} of 24 blocks have a place that is not in the future",
    )
    assert_cost(
        lambda: torch.autograd.grad(out, (q, k, v), dout),
        max_flops=blocks * one * 7 * 8,
        because=f"backward has to go through {blocks} of 24 blocks",
    )


@cost_case("flash_attention")
def flash_attention_cost(module, randn):
    with unmetered():
        q, k, v = (randn(2, 128, 16).requires_grad_() for _ in range(3))
    return lambda: module.flash_attention(q, k, v, causal=True, block_q=32, block_k=32)
