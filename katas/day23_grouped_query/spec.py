"""Day 23: what the tasks promise."""

import itertools
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
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
    same_storage,
    task,
    unchanged,
)
from reference.day22_kv_cache import CachedAttention, KVCache

HALF = [torch.float16, torch.bfloat16]
GROUPS = [(6, 6), (6, 3), (6, 2), (6, 1), (8, 2)]


def head_by_head(q, k, v, mask=None, scale=None):
    """The definition in numpy and float64, one head at a time, as a CPU tensor."""
    q, k, v = (x.detach().double().cpu().numpy().copy() for x in (q, k, v))
    B, H, T, D = q.shape
    _, G, S, Dv = v.shape
    scale = 1 / math.sqrt(D) if scale is None else scale
    allowed = np.ones((), dtype=bool) if mask is None else mask.cpu().numpy()
    allowed = np.broadcast_to(allowed, (B, H, T, S))
    out = np.zeros((B, H, T, Dv))
    for b in range(B):
        for h in range(H):
            group = next(g for g in range(G) if g * H <= h * G < (g + 1) * H)
            scores = np.where(allowed[b, h], q[b, h] @ k[b, group].T * scale, -1e300)
            exponentials = np.exp(scores - scores.max(1, keepdims=True)) * allowed[b, h]
            total = exponentials.sum(1, keepdims=True)
            out[b, h] = exponentials / np.where(total == 0, 1.0, total) @ v[b, group]
    return torch.from_numpy(out)


def inputs(randn, H=6, G=2, B=2, T=5, S=7, D=4, Dv=3, **kwargs):
    """Random q, k and v."""
    return randn(B, H, T, D, **kwargs), randn(B, G, S, D, **kwargs), randn(B, G, S, Dv, **kwargs)


def same_layer(found, expected, because):
    """Compare two layers, both computed in float64 from weights in float32."""
    assert_close(found, expected, because=because, rtol=1e-8, atol=1e-8)


def some_mask(rand, *shape):
    """A random mask in which each query may attend to something, and not to everything."""
    mask = rand(*shape) < 0.5
    mask[..., 1] = True
    mask[..., 0] = False
    return mask


def close(found, expected, because, dtype=None, atol=5e-6):
    """Compare with an oracle in float64, after rounding it to `dtype`."""
    dtype = dtype or found.dtype
    loose = {"atol": atol} if dtype == torch.float32 else {}
    assert_close(found, expected.to(dtype), because=because, **loose)


# group_of


@task("group_of")
@pytest.mark.parametrize(("H", "G"), [(6, 2), (6, 3), (8, 2), (32, 8), (12, 4)])
def test_neighbors_share_a_head(solution, H, G):
    expected = torch.tensor([group for group in range(G) for _ in range(H // G)])
    found = solution.group_of(H, G)
    assert_equal(found, expected, because=f"{H} query heads, {G} key/value heads: {H // G} neighbors read the same one")


@task("group_of")
@pytest.mark.parametrize("H", [1, 4])
def test_with_as_many_groups_as_heads_each_reads_its_own(solution, H):
    assert_equal(solution.group_of(H, H), torch.tensor(list(range(H))), because="this is multi-head attention")


@task("group_of")
def test_with_one_group_all_heads_read_the_same(solution):
    assert_equal(solution.group_of(5, 1), torch.tensor([0] * 5), because="this is multi-query attention")


@task("group_of")
@pytest.mark.parametrize(("H", "G"), [(7, 2), (2, 4), (4, 0), (4, -2), (9, 6)])
def test_groups_must_be_equal(solution, H, G):
    assert_raises(ValueError, solution.group_of, H, G, mentions=[str(H), str(G)])


# repeat_kv


@task("repeat_kv")
@pytest.mark.parametrize(("G", "n_rep"), [(2, 3), (3, 2), (4, 2)])
def test_head_h_is_head_h_over_n_rep(solution, device, G, n_rep):
    x = torch.arange(G, dtype=torch.float32, device=device)[None, :, None, None].repeat(2, 1, 5, 3)
    heads = [[float(h // n_rep) for h in range(G * n_rep)]] * 2
    found = solution.repeat_kv(x, n_rep)
    assert_equal(tuple(found.shape), (2, G * n_rep, 5, 3), because="(B, G, T, Dh) becomes (B, G * n_rep, T, Dh)")
    assert_equal(
        found[:, :, 0, 0], torch.tensor(heads), because="head g of x was filled with g: which head stands where?"
    )


@task("repeat_kv")
@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (1, 2, 1, 3), (3, 1, 4, 2), (4, 4, 4, 4)])
@pytest.mark.parametrize("n_rep", [2, 4])
def test_it_is_torchs_repeat_interleave(solution, randn, dtype, shape, n_rep):
    x = randn(*shape, dtype=dtype)
    expected = x.cpu().repeat_interleave(n_rep, dim=1)
    assert_equal(solution.repeat_kv(x, n_rep), expected, because="each head stands n_rep times, side by side")


@task("repeat_kv")
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.int64, torch.bool])
def test_any_dtype_is_repeated(solution, randint, kind):
    x = randint(0, 2, (2, 2, 3, 4)).to(kind)
    expected = x.cpu().repeat_interleave(3, dim=1)
    assert_equal(solution.repeat_kv(x, 3), expected, because=f"{kind} stays {kind}")


@task("repeat_kv")
def test_any_strides_are_repeated(solution, randn):
    x = randn(2, 5, 3, 4)
    expected = x.transpose(1, 2).cpu().repeat_interleave(2, dim=1)
    assert_equal(solution.repeat_kv(x.transpose(1, 2), 2), expected, because="x is a view with other strides")
    expected = x.cpu().repeat_interleave(2, dim=1)
    assert_equal(solution.repeat_kv(noncontiguous(x), 2), expected, because="x is a view with gaps")


@task("repeat_kv")
@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 3, 0, 4), (2, 3, 4, 0)])
def test_an_empty_tensor_is_repeated(solution, randn, shape):
    B, G, T, D = shape
    assert_equal(solution.repeat_kv(randn(*shape), 2), torch.zeros(B, G * 2, T, D))


@task("repeat_kv")
def test_once_is_no_copy(solution, randn):
    x = randn(2, 3, 5, 4)
    expected = x.cpu().clone()
    found = assert_cost(solution.repeat_kv, x, 1, max_new_bytes=0, because="n_rep = 1 changes nothing: no new memory")
    assert_equal(found, expected, because="n_rep = 1 changes nothing")
    assert_that(same_storage(found, x), "n_rep = 1 gives x or a view of it")


@task("repeat_kv")
def test_once_of_a_slice_of_a_cache_is_no_copy(solution, randn):
    x = randn(2, 3, 9, 4)[:, :, :5]
    expected = x.cpu().clone()
    found = assert_cost(solution.repeat_kv, x, 1, max_new_bytes=0, because="n_rep = 1 changes nothing: no new memory")
    assert_equal(found, expected, because="n_rep = 1 changes nothing")


@task("repeat_kv")
def test_repeating_makes_the_result_and_little_else(solution, randn):
    x = randn(2, 3, 50, 8)
    size = x.numel() * 4
    assert_cost(
        solution.repeat_kv,
        x,
        4,
        no_larger_than=size,
        max_new_bytes=size * 4 + 4096,
        because="the result is four times x, and nothing else of that size is needed",
    )


@task("repeat_kv")
def test_the_gradients_of_all_copies_add_up(solution, randn):
    x = randn(2, 3, 4, 5, dtype=torch.float64)
    assert_gradients_close(
        lambda x: solution.repeat_kv(x, 3),
        lambda x: torch.repeat_interleave(x, 3, dim=1),
        [x],
        because="a head gets the gradients of all its copies",
    )


@cost_case("repeat_kv")
def repeat_kv_cost(module, randn):
    x = randn(1, 2, 128, 64)
    return lambda: module.repeat_kv(x, 8)


# grouped_attention


@task("grouped_attention")
@pytest.mark.parametrize(("H", "G"), GROUPS)
def test_attention_is_torchs_with_groups(solution, randn, dtype, H, G):
    q, k, v = inputs(randn, H, G, dtype=dtype)
    expected = F.scaled_dot_product_attention(*(x.double().cpu() for x in (q, k, v)), enable_gqa=True)
    close(solution.grouped_attention(q, k, v), expected, f"{H} query heads read {G} key/value heads", dtype)


@task("grouped_attention")
@pytest.mark.parametrize(("H", "G"), [(6, 2), (6, 3), (8, 2), (8, 4)])
def test_each_query_head_reads_the_values_of_its_group(solution, randn, device, H, G):
    q, k = randn(1, H, 1, 4), randn(1, G, 3, 4)
    v = torch.arange(G, dtype=torch.float32, device=device)[None, :, None, None].expand(1, G, 3, 1)
    expected = torch.tensor([[float(h // (H // G)) for h in range(H)]])
    found = solution.grouped_attention(q, k, v)
    assert_equal(tuple(found.shape), (1, H, 1, 1), because="one row per query head")
    assert_close(found[:, :, 0, 0], expected, because="all values of head g are g: which head was read?")


@task("grouped_attention")
@pytest.mark.parametrize(("H", "G"), [(6, 2), (6, 3), (8, 2), (8, 4)])
def test_each_query_head_meets_the_keys_of_its_group(solution, randn, device, H, G):
    q = torch.ones(1, H, 1, 2, device=device)
    k = torch.zeros(1, G, G, 2, device=device)
    for g in range(G):
        k[0, g, g] = 200.0  # the keys of head g are such that place g wins
    v = torch.arange(G, dtype=torch.float32, device=device)[:, None].expand(1, G, G, 1)  # place j holds j
    expected = torch.tensor([[float(h // (H // G)) for h in range(H)]])
    found = solution.grouped_attention(q, k, v)
    assert_close(found[:, :, 0, 0], expected, because="the keys of head g point at place g: which keys were met?")


@task("grouped_attention")
@pytest.mark.parametrize(("D", "Dv"), [(12, 8), (3, 5), (4, 1), (4, 4)])
def test_values_may_have_another_width(solution, randn, dtype, D, Dv):
    q, k, v = inputs(randn, D=D, Dv=Dv, dtype=dtype)
    expected = head_by_head(q, k, v)
    close(solution.grouped_attention(q, k, v), expected, f"Dh = {D} makes the scores, Dv = {Dv} comes out", dtype)


@task("grouped_attention")
@pytest.mark.parametrize("scale", [0.3, 2.0])
def test_the_scale_can_be_chosen(solution, randn, scale):
    q, k, v = inputs(randn, dtype=torch.float64)
    expected = head_by_head(q, k, v, scale=scale)
    close(solution.grouped_attention(q, k, v, None, scale), expected, f"scale={scale} takes the place of Dh ** -0.5")


@task("grouped_attention")
def test_a_scale_of_zero_is_a_scale(solution, randn):
    q, k, v = inputs(randn, dtype=torch.float64)
    expected = head_by_head(q, k, v, scale=0.1)
    close(solution.grouped_attention(q, k, v, scale=0.1), expected, "scale=0.1 was asked for")
    q, k, v = inputs(randn, dtype=torch.float64)
    expected = head_by_head(q, k, v, scale=0.0)
    close(solution.grouped_attention(q, k, v, scale=0.0), expected, "scale=0 makes all scores 0: values are averaged")


@task("grouped_attention")
@pytest.mark.parametrize(
    "shape", [(2, 6, 5, 7), (5, 7), (7,), (5, 1), (2, 1, 1, 7), (6, 1, 7), (2, 1, 5, 7), (1, 6, 5, 1), ()]
)
def test_masks_broadcast_to_the_scores_of_all_query_heads(solution, randn, rand, dtype, shape):
    q, k, v = inputs(randn, dtype=dtype)
    mask = rand(*shape) < 0.6
    if shape and shape[-1] == 7:
        mask = some_mask(rand, *shape)
    expected = head_by_head(q, k, v, mask)
    close(solution.grouped_attention(q, k, v, mask), expected, f"a mask {shape} is stretched to (2, 6, 5, 7)", dtype)


@task("grouped_attention")
@pytest.mark.parametrize("G", [1, 2, 3])
def test_heads_of_one_group_have_masks_of_their_own(solution, randn, device, G):
    q, k = randn(1, 6, 2, 4), randn(1, G, 6, 4)
    v = torch.arange(6, dtype=torch.float32, device=device)[:, None].expand(1, G, 6, 1)  # place j holds j
    mask = torch.eye(6, dtype=torch.bool, device=device)[None, :, None]  # head h may look at place h only
    expected = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 5.0])[None, :, None, None].expand(1, 6, 2, 1)
    assert_close(
        solution.grouped_attention(q, k, v, mask), expected, because="query head h may attend to place h alone"
    )


@task("grouped_attention")
def test_each_query_keeps_its_own_row_of_the_mask(solution, randn, device):
    q, k = randn(1, 4, 5, 3), randn(1, 2, 5, 3)
    v = torch.arange(5, dtype=torch.float32, device=device)[:, None].expand(1, 2, 5, 1)
    mask = torch.eye(5, dtype=torch.bool, device=device)  # query i may look at place i only
    expected = torch.arange(5.0)[:, None].expand(1, 4, 5, 1)
    assert_close(
        solution.grouped_attention(q, k, v, mask), expected, because="in every head query i may attend to place i alone"
    )


@task("grouped_attention")
def test_equal_sizes_hide_no_axis(solution, randn, rand):
    q, k, v = inputs(randn, H=4, G=2, B=4, T=4, S=4, D=4, Dv=4, dtype=torch.float64)
    mask = some_mask(rand, 4, 4, 4, 4)
    expected = head_by_head(q, k, v, mask)
    close(solution.grouped_attention(q, k, v, mask), expected, "most sizes are 4, so no shape shows a mix-up")


@task("grouped_attention")
def test_a_query_with_nothing_allowed_gets_zeros(solution, randn, rand, dtype):
    q, k, v = inputs(randn, dtype=dtype)
    mask = some_mask(rand, 2, 6, 5, 7)
    mask[0, 1, 2] = mask[1, :, 0] = False
    expected = head_by_head(q, k, v, mask)
    close(solution.grouped_attention(q, k, v, mask), expected, "a query that may attend to no key gets zeros", dtype)


@task("grouped_attention")
def test_gradients_are_those_of_repeated_heads(solution, randn, rand):
    q, k, v = inputs(randn, dtype=torch.float64)
    mask = some_mask(rand, 6, 5, 7)

    def oracle(q, k, v):
        k, v = k.repeat_interleave(3, dim=1), v.repeat_interleave(3, dim=1)
        scores = (q @ k.transpose(-1, -2) / 2.0).masked_fill(~mask, -math.inf)
        return torch.softmax(scores, -1) @ v

    assert_gradients_close(
        lambda q, k, v: solution.grouped_attention(q, k, v, mask),
        oracle,
        [q, k, v],
        because="the gradient of a key/value head is the sum over its query heads",
    )


@task("grouped_attention")
def test_a_query_with_nothing_allowed_sends_back_zeros(solution, randn, rand):
    q, k, v = (x.requires_grad_() for x in inputs(randn))
    mask = some_mask(rand, 5, 7)
    mask[2] = False
    out = solution.grouped_attention(q, k, v, mask)
    assert_that(out.requires_grad, "out has a graph: gradients flow")
    grads = torch.autograd.grad(out.sum(), [q, k, v])
    finite = [bool(grad.isfinite().all()) for grad in grads]
    assert_equal(finite, [True] * 3, because="query 2 sees nothing: its gradient is 0, and nothing is NaN")
    assert_equal(grads[0][:, :, 2], torch.zeros(2, 6, 4), because="query 2 sees nothing: its gradient is 0")


@task("grouped_attention")
@pytest.mark.parametrize("axis", ["B", "T", "S"])
def test_a_size_may_be_zero(solution, randn, axis):
    sizes = {"B": 2, "T": 3, "S": 4, axis: 0}
    q, k, v = inputs(randn, **sizes)
    expected = torch.zeros(sizes["B"], 6, sizes["T"], 3)
    found = solution.grouped_attention(q, k, v)
    assert_equal(found, expected, because=f"{axis} = 0; without any key there is nothing to mix")


@task("grouped_attention")
def test_views_of_a_cache_are_read(solution, randn, dtype):
    q = randn(2, 5, 6, 4, dtype=dtype).transpose(1, 2)
    k, v = randn(2, 2, 9, 4, dtype=dtype)[:, :, :7], randn(2, 2, 9, 3, dtype=dtype)[:, :, :7]
    expected = head_by_head(q, k, v)
    close(solution.grouped_attention(q, k, v), expected, "k and v are the first 7 places of a cache of 9", dtype)
    k, v = randn(2, 7, 2, 4, dtype=dtype).transpose(1, 2), randn(2, 7, 2, 3, dtype=dtype).transpose(1, 2)
    expected = head_by_head(q, k, v)
    close(solution.grouped_attention(q, k, v), expected, "k and v are heads that were split off a wide row", dtype)
    expected = head_by_head(q, k, v)
    q, k, v = noncontiguous(q), noncontiguous(k), noncontiguous(v)
    close(solution.grouped_attention(q, k, v), expected, "q, k and v have gaps", dtype)


@task("grouped_attention")
@pytest.mark.parametrize("half", HALF)
def test_half_inputs_are_rounded_once(solution, randn, half):
    q, k, v = (x.to(half) for x in inputs(randn, T=16, S=64, D=32, Dv=16))
    expected = head_by_head(q, k, v).to(half)
    eps = torch.finfo(half).eps
    found = solution.grouped_attention(q, k, v)
    assert_close(found, expected, rtol=1.01 * eps, atol=1e-3 * eps, because="float32 inside, rounded once at the end")


@task("grouped_attention")
def test_scores_that_half_precision_cannot_tell_apart(solution, device):
    q = torch.full((1, 2, 1, 1), 16.0, dtype=torch.bfloat16, device=device)
    k = torch.tensor([16.0, 16.125], dtype=torch.bfloat16, device=device)[None, None, :, None]
    v = torch.tensor([0.0, 1.0], dtype=torch.bfloat16, device=device)[None, None, :, None]
    expected = torch.full((1, 2, 1, 1), 1 / (1 + math.exp(-2.0))).bfloat16()
    found = solution.grouped_attention(q, k, v, scale=1.0)
    assert_close(found, expected, rtol=5e-3, because="the scores are 256 and 258: the second key gets 0.88")
    q, k = q[..., :1] * 1.0625, k * 1.0  # 17 * 16.125 = 274.125 needs more than 8 bits
    expected = torch.full((1, 2, 1, 1), 1 / (1 + math.exp(-2.125))).bfloat16()
    found = solution.grouped_attention(q, k, v, scale=1.0)
    assert_close(found, expected, rtol=5e-3, because="the scores are 272 and 274.125: the second key gets 0.893")


@task("grouped_attention")
def test_huge_scores_do_not_overflow(solution, randn):
    q, k, v = inputs(randn, dtype=torch.float64)
    expected = head_by_head(q * 100, k * 100, v)
    close(solution.grouped_attention(q * 100, k * 100, v), expected, "scores of 10,000 are fine")


@task("grouped_attention")
def test_no_random_number_is_drawn(solution, randn):
    q, k, v = inputs(randn)
    with global_rng_untouched():
        solution.grouped_attention(q, k, v)


@task("grouped_attention")
@pytest.mark.parametrize(
    ("q", "k", "v", "named"),
    [
        ((2, 6, 3, 4), (2, 2, 5, 3), (2, 2, 5, 4), ((2, 6, 3, 4), (2, 2, 5, 3))),
        ((2, 6, 3, 4), (1, 2, 5, 4), (1, 2, 5, 4), ((2, 6, 3, 4), (1, 2, 5, 4))),
        ((1, 6, 3, 4), (2, 2, 5, 4), (2, 2, 5, 4), ((1, 6, 3, 4), (2, 2, 5, 4))),
        ((2, 6, 3, 4), (2, 2, 5, 4), (2, 2, 6, 4), ((2, 2, 5, 4), (2, 2, 6, 4))),
        ((2, 6, 3, 4), (2, 2, 5, 4), (2, 3, 5, 4), ((2, 2, 5, 4), (2, 3, 5, 4))),
        ((2, 6, 3, 4), (2, 2, 5, 4), (1, 2, 5, 4), ((2, 2, 5, 4), (1, 2, 5, 4))),
        ((2, 6, 3, 4), (2, 1, 5, 4), (2, 2, 5, 4), ((2, 1, 5, 4), (2, 2, 5, 4))),
        ((2, 6, 3, 4), (2, 4, 5, 4), (2, 4, 5, 4), ((2, 6, 3, 4), (2, 4, 5, 4))),
        ((2, 2, 3, 4), (2, 4, 5, 4), (2, 4, 5, 4), ((2, 2, 3, 4), (2, 4, 5, 4))),
        ((2, 6, 3, 4), (2, 0, 5, 4), (2, 0, 5, 4), ((2, 6, 3, 4), (2, 0, 5, 4))),
    ],
)
def test_shapes_that_do_not_fit_are_refused(solution, randn, q, k, v, named):
    tensors = randn(*q), randn(*k), randn(*v)
    assert_raises(ValueError, solution.grouped_attention, *tensors, mentions=[str(shape) for shape in named])


@task("grouped_attention")
@pytest.mark.parametrize("shape", [(2, 2, 5, 7), (5, 6), (3, 1, 5, 7)])
def test_a_mask_that_does_not_broadcast_is_refused(solution, randn, rand, shape):
    q, k, v = inputs(randn)
    mask = rand(*shape) < 0.5
    assert_raises(ValueError, solution.grouped_attention, q, k, v, mask, mentions=[str(shape), str((2, 6, 5, 7))])


@task("grouped_attention")
@pytest.mark.parametrize("G", [1, 2, 16])
def test_a_token_reads_the_cache_as_it_lies(solution, randn, rand, G):
    q = randn(2, 16, 1, 32)
    k, v = randn(2, G, 100, 32)[:, :, :90], randn(2, G, 100, 32)[:, :, :90]
    mask = some_mask(rand, 2, 1, 1, 90)
    scores, rest = 2 * 16 * 90, 2 * 16 * 32
    solution.grouped_attention(q, k, v)
    assert_cost(
        solution.grouped_attention,
        q,
        k,
        v,
        mask,
        no_larger_than=scores,
        max_new_bytes=4 * (8 * scores + 4 * 2 * rest),
        because=f"16 query heads read {G} key/value heads: no key may be copied, let alone repeated",
    )


@task("grouped_attention")
def test_a_token_needs_little_memory_at_one_time(solution, randn):
    q, k, v = randn(1, 16, 1, 64), randn(1, 2, 100, 64), randn(1, 2, 100, 64)
    most = 4 * (8 * 16 * 100 + 4 * 2 * 16 * 64)
    assert_cost(
        solution.grouped_attention,
        q,
        k,
        v,
        max_peak_bytes=most,
        because="16 query heads, 2 key/value heads of 100 places",
    )


@task("grouped_attention")
def test_many_queries_copy_no_key_either(solution, randn, rand):
    q, k, v = randn(2, 8, 3, 64), randn(2, 4, 40, 64), randn(2, 4, 40, 64)
    mask = some_mask(rand, 8, 3, 40)
    scores, rest = 2 * 8 * 3 * 40, 2 * 8 * 3 * 64
    assert_cost(
        solution.grouped_attention,
        q,
        k,
        v,
        mask,
        no_larger_than=rest,
        max_new_bytes=4 * (8 * scores + 4 * 2 * rest),
        because="k and v are contiguous: they need no copy",
    )


@task("grouped_attention")
def test_other_strides_may_be_copied_but_never_repeated(solution, randn):
    q = randn(2, 16, 1, 32)
    k, v = randn(2, 60, 2, 32).transpose(1, 2), randn(2, 60, 2, 32).transpose(1, 2)
    assert_cost(solution.grouped_attention, q, k, v, no_larger_than=k.numel(), because="k may be copied once, at most")
    q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
    assert_cost(solution.grouped_attention, q, k, v, no_larger_than=k.numel(), because="k in float32 is no larger")


@task("grouped_attention")
@pytest.mark.parametrize("G", [1, 2, 8])
def test_the_flops_do_not_know_the_number_of_groups(solution, randn, G):
    q, k, v = inputs(randn, H=8, G=G, D=4, Dv=6)
    assert_cost(
        solution.grouped_attention,
        q,
        k,
        v,
        matmuls=2,
        flops=2 * 2 * 8 * 5 * 7 * (4 + 6),
        because="every query meets every key, whoever shares it",
    )


@cost_case("grouped_attention")
def grouped_attention_cost(module, randn):
    q, cache = randn(1, 16, 1, 64), randn(2, 1, 2, 600, 64)
    k, v = cache[0][:, :, :512], cache[1][:, :, :512]
    return lambda: module.grouped_attention(q, k, v)


# GroupedQueryAttention


def a_state(randn, d_model, H, G, Dh, *, bias=False, dtype=torch.float32):
    """Random weights of a layer, large enough that attention is not flat."""
    rows = {"q_proj": H * Dh, "k_proj": G * Dh, "v_proj": G * Dh}
    state = {f"{name}.weight": randn(n, d_model, scale=1.5 * d_model**-0.5) for name, n in rows.items()}
    state["o_proj.weight"] = randn(d_model, H * Dh, scale=(H * Dh) ** -0.5)
    if bias:
        state |= {f"{name}.bias": randn(n) for name, n in rows.items()}
    return {name: tensor.to(dtype) for name, tensor in state.items()}


def a_layer(module, state, d_model, H, G, Dh, **options):
    """A GroupedQueryAttention of `module` with the given weights."""
    layer = module.GroupedQueryAttention(d_model, H, G, head_dim=Dh, **options)
    layer.load_state_dict(state)
    some = state["q_proj.weight"]
    return layer.to(some.device, some.dtype)


def turned(x, positions, base, layout):
    """x (B, H, T, Dh) in float64, rotated as complex numbers."""
    Dh = x.shape[-1]
    speed = torch.tensor([base ** (-2 * i / Dh) for i in range(Dh // 2)], dtype=torch.float64)
    angle = positions.reshape(-1, 1, x.shape[2], 1).double() * speed
    turn = torch.polar(torch.ones_like(angle), angle)
    if layout == "half":
        z = torch.complex(x[..., : Dh // 2], x[..., Dh // 2 :]) * turn
        return torch.cat((z.real, z.imag), -1)
    z = torch.complex(x[..., 0::2], x[..., 1::2]) * turn
    return torch.view_as_real(z).flatten(-2)


def whole(state, x, H, G, *, base=10000.0, layout="interleaved", positions=None, mask=None):
    """The layer on a whole text, in float64 on the CPU, with repeated heads and torch's attention: (out, k, v)."""
    state = {name: tensor.detach().double().cpu() for name, tensor in state.items()}
    x = x.detach().double().cpu()
    B, T, _ = x.shape
    q, k, v = (
        (x @ state[f"{name}_proj.weight"].T + state.get(f"{name}_proj.bias", 0)).reshape(B, T, n, -1).transpose(1, 2)
        for name, n in (("q", H), ("k", G), ("v", G))
    )
    positions = torch.arange(T) if positions is None else positions.cpu()
    q, k = turned(q, positions, base, layout), turned(k, positions, base, layout)
    allowed = torch.ones(T, T, dtype=torch.bool).tril()
    if mask is not None:
        allowed = allowed & mask.cpu()
    out = head_by_head(q, k, v, allowed)
    return out.transpose(1, 2).reshape(B, T, -1) @ state["o_proj.weight"].T, k, v


def assert_plain(layer, state, x, H, G):
    """Compare what comes out without a mask or a cache."""
    close(layer(x), whole(state, x, H, G)[0], "without a mask and without a cache", atol=1e-4)


class Spy:
    """A cache with torch.cat that remembers with what it was called."""

    def __init__(self):
        self.keys = self.values = None
        self.length, self.calls = 0, []

    def update(self, k, v):
        """Append, and return everything."""
        self.calls.append((tuple(k.shape), tuple(v.shape)))
        self.keys = k if self.keys is None else torch.cat((self.keys, k), 2)
        self.values = v if self.values is None else torch.cat((self.values, v), 2)
        self.length = self.keys.shape[2]
        return self.keys, self.values


def in_chunks(layer, x, sizes, cache, **options):
    """The outputs of chunks of the given sizes, joined."""
    outs, start = [], 0
    with torch.no_grad():
        for size in sizes:
            outs.append(layer(x[:, start : start + size], cache=cache, **options))
            start += size
    return torch.cat(outs, 1)


@task("GroupedQueryAttention")
@pytest.mark.parametrize(("d_model", "H", "G", "Dh"), [(24, 6, 2, None), (24, 6, 2, 8), (16, 4, 1, 2), (12, 2, 2, 10)])
def test_the_state_is_four_weights(solution, d_model, H, G, Dh):
    layer = solution.GroupedQueryAttention(d_model, H, G, head_dim=Dh)
    width = 4 if Dh is None else Dh
    found = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
    expected = {
        "q_proj.weight": (H * width, d_model),
        "k_proj.weight": (G * width, d_model),
        "v_proj.weight": (G * width, d_model),
        "o_proj.weight": (d_model, H * width),
    }
    assert_equal(found, expected, because=f"{H} query heads and {G} key/value heads of width {width}")


@task("GroupedQueryAttention")
def test_the_numbers_of_heads_are_kept(solution):
    layer = solution.GroupedQueryAttention(24, 6, 2)
    assert_equal((layer.n_heads, layer.n_kv_heads, layer.head_dim), (6, 2, 4))
    layer = solution.GroupedQueryAttention(24, 6, 3, head_dim=8)
    assert_equal((layer.n_heads, layer.n_kv_heads, layer.head_dim), (6, 3, 8))


@task("GroupedQueryAttention")
@pytest.mark.parametrize("layout", ["interleaved", "half"])
@pytest.mark.parametrize(("H", "G"), [(6, 2), (6, 3), (6, 1), (4, 4)])
def test_the_layer_is_repeated_heads_with_torchs_attention(solution, randn, layout, H, G):
    state, x = a_state(randn, 20, H, G, 8), randn(2, 5, 20)
    expected, _, _ = whole(state, x, H, G, layout=layout)
    layer = a_layer(solution, state, 20, H, G, 8, layout=layout)
    close(layer(x), expected, f"{H} query heads, {G} key/value heads, pairs {layout}", atol=1e-4)


@task("GroupedQueryAttention")
@pytest.mark.parametrize("which", ["plain", "given"])
def test_it_is_llamas_attention(solution, data_dir, device, which):
    data = {name: tensor.to(device) for name, tensor in load_file(data_dir / "golden.safetensors").items()}
    state = {name: tensor for name, tensor in data.items() if name.endswith("weight")}
    layer = a_layer(solution, state, 24, 6, 2, 8, layout="half")
    positions = None if which == "plain" else data["given.positions"]
    expected = data[f"{which}.out"].cpu().double()
    close(layer(data["x"], positions=positions), expected, "what Llama of transformers computes", atol=2e-5)


@task("GroupedQueryAttention")
def test_with_a_group_for_each_head_it_is_the_layer_of_day_22(solution, randn, device):
    old = CachedAttention(24, 4, 16).to(device)
    state, x = a_state(randn, 24, 4, 4, 6), randn(2, 7, 24)
    old.load_state_dict(state)
    expected = old(x).detach().cpu()
    found = a_layer(solution, state, 24, 4, 4, 6)(x)
    assert_close(found, expected, atol=1e-4, because="4 groups of one head: CachedAttention with the same weights")


@task("GroupedQueryAttention")
def test_interleaved_and_10000_are_the_defaults(solution, randn):
    state, x = a_state(randn, 20, 4, 2, 8), randn(1, 6, 20)
    positions = torch.tensor([0, 2, 3, 9, 20, 40])
    expected, _, _ = whole(state, x, 4, 2, positions=positions)
    found = a_layer(solution, state, 20, 4, 2, 8)(x, positions=positions.to(x.device))
    close(found, expected, "layout='interleaved' and base=10000", atol=1e-4)


@task("GroupedQueryAttention")
def test_the_base_can_be_chosen(solution, randn):
    state, x = a_state(randn, 20, 4, 2, 8), randn(1, 6, 20)
    expected, _, _ = whole(state, x, 4, 2, base=100.0)
    close(a_layer(solution, state, 20, 4, 2, 8, base=100.0)(x), expected, "base=100", atol=1e-4)


@task("GroupedQueryAttention")
@pytest.mark.parametrize("rows", [(), (2,)])
def test_given_positions_turn_queries_and_keys(solution, randn, rows):
    state, x = a_state(randn, 20, 4, 2, 8), randn(2, 5, 20)
    positions = torch.tensor([[0, 3, 4, 11, 12], [5, 6, 2, 1, 20]])[0 if not rows else slice(None)].to(x.device)
    expected, _, _ = whole(state, x, 4, 2, positions=positions)
    layer = a_layer(solution, state, 20, 4, 2, 8)
    with unchanged(positions):
        found = layer(x, positions=positions)
    close(found, expected, f"positions {tuple(positions.shape)} are where the tokens stand", atol=1e-4)


@task("GroupedQueryAttention")
@pytest.mark.parametrize("shape", [(2, 4, 5, 5), (4, 1, 5), (2, 1, 1, 5), (5, 5), (5,)])
def test_a_mask_forbids_more(solution, randn, rand, shape):
    state, x = a_state(randn, 20, 4, 2, 8), randn(2, 5, 20)
    mask = rand(*shape) < 0.6
    mask[..., 0] = True
    expected, _, _ = whole(state, x, 4, 2, mask=mask)
    layer = a_layer(solution, state, 20, 4, 2, 8)
    assert_plain(layer, state, x, 4, 2)
    with unchanged(mask, x):
        found = layer(x, mask=mask)
    close(found, expected, f"a mask {shape} hides some of the past", atol=1e-4)


@task("GroupedQueryAttention")
def test_a_mask_never_shows_the_future(solution, randn, device):
    state, x = a_state(randn, 20, 4, 2, 8), randn(2, 5, 20)
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool, device=device)
    expected, _, _ = whole(state, x, 4, 2)
    layer = a_layer(solution, state, 20, 4, 2, 8)
    assert_plain(layer, state, x, 4, 2)
    found = layer(x, mask=mask)
    close(found, expected, "the mask is True everywhere, and the future stays hidden", atol=1e-4)


@task("GroupedQueryAttention")
def test_the_future_does_not_reach_the_past(solution, randn):
    state, x = a_state(randn, 20, 4, 2, 8), randn(1, 6, 20)
    layer = a_layer(solution, state, 20, 4, 2, 8)
    before = layer(x)[:, :4].detach().cpu().clone()
    x[:, 4:] += 3.0
    after = layer(x)[:, :4].detach()
    assert_close(after, before, atol=1e-4, because="tokens 4 and 5 were changed; outputs 0 to 3 may not notice")


@task("GroupedQueryAttention")
@pytest.mark.parametrize("sizes", [(7,), (1,) * 7, (3, 4), (4, 1, 1, 1), (1, 5, 1)])
def test_any_chunks_give_what_the_whole_gives(solution, randn, sizes):
    state, x = a_state(randn, 20, 6, 2, 8), randn(2, 7, 20)
    expected, _, _ = whole(state, x, 6, 2)
    found = in_chunks(a_layer(solution, state, 20, 6, 2, 8), x, sizes, Spy())
    close(found, expected, f"chunks of {sizes} tokens with a cache", atol=1e-4)


@task("GroupedQueryAttention")
@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_random_chunks_give_what_the_whole_gives(solution, randn, randint, layout):
    state, x = a_state(randn, 20, 4, 2, 6), randn(1, 12, 20)
    sizes = []
    for size in randint(1, 5, (12,)).tolist():
        sizes.append(min(size, 12 - sum(sizes)))
    sizes = [size for size in sizes if size]
    expected, _, _ = whole(state, x, 4, 2, layout=layout)
    found = in_chunks(a_layer(solution, state, 20, 4, 2, 6, layout=layout), x, sizes, Spy())
    close(found, expected, f"chunks of {sizes} tokens with a cache", atol=1e-4)


@task("GroupedQueryAttention")
def test_the_cache_gets_the_heads_of_the_groups(solution, randn):
    state, x = a_state(randn, 20, 6, 2, 8), randn(3, 7, 20)
    spy = Spy()
    in_chunks(a_layer(solution, state, 20, 6, 2, 8), x, (4, 1, 2), spy)
    shapes = [((3, 2, n, 8), (3, 2, n, 8)) for n in (4, 1, 2)]
    assert_equal(spy.calls, shapes, because="2 key/value heads are stored, not 6, and each token once")


@task("GroupedQueryAttention")
def test_the_cache_gets_rotated_keys_and_raw_values(solution, randn):
    state, x = a_state(randn, 20, 6, 2, 8), randn(2, 5, 20)
    _, keys, values = whole(state, x, 6, 2)
    spy = Spy()
    in_chunks(a_layer(solution, state, 20, 6, 2, 8), x, (3, 2), spy)
    close(spy.keys, keys, "a key is turned once, before it is stored", atol=1e-4)
    close(spy.values, values, "values are never turned", atol=1e-4)


@task("GroupedQueryAttention")
def test_the_cache_of_day_22_serves(solution, randn, device):
    state, x = a_state(randn, 20, 6, 3, 4), randn(2, 7, 20)
    expected, _, _ = whole(state, x, 6, 3)
    cache = KVCache(2, 3, 10, 4, device=device)
    found = in_chunks(a_layer(solution, state, 20, 6, 3, 4), x, (2, 4, 1), cache)
    close(found, expected, "KVCache(2, 3, 10, 4): 2 rows, 3 heads, 10 places, width 4", atol=1e-4)
    cache.reset()
    found = in_chunks(a_layer(solution, state, 20, 6, 3, 4), x, (7,), cache)
    close(found, expected, "the same text again after reset", atol=1e-4)


@task("GroupedQueryAttention")
def test_given_positions_come_before_the_length_of_the_cache(solution, randn):
    state, x = a_state(randn, 20, 4, 2, 8), randn(1, 5, 20)
    positions = torch.tensor([2, 3, 7, 8, 15])
    expected, _, _ = whole(state, x, 4, 2, positions=positions)
    layer, spy, outs = a_layer(solution, state, 20, 4, 2, 8), Spy(), []
    with torch.no_grad():
        for part in (slice(0, 3), slice(3, 5)):
            outs.append(layer(x[:, part], cache=spy, positions=positions[part].to(x.device)))
    close(torch.cat(outs, 1), expected, "positions 2, 3, 7, then 8, 15", atol=1e-4)


@task("GroupedQueryAttention")
@pytest.mark.parametrize("cached", [False, True])
def test_rows_of_different_lengths_give_what_each_gives_alone(solution, randn, device, cached):
    lengths, T = [3, 6, 1], 6
    state = a_state(randn, 20, 4, 2, 8)
    rows = [randn(1, n, 20) for n in lengths]
    alone = [whole(state, row, 4, 2)[0] for row in rows]
    x, real = randn(3, T, 20), torch.zeros(3, T, dtype=torch.bool, device=device)
    for b, n in enumerate(lengths):
        x[b, T - n :], real[b, T - n :] = rows[b][0], True
    positions = torch.tensor([[max(0, t - (T - n)) for t in range(T)] for n in lengths], device=device)
    layer, mask = a_layer(solution, state, 20, 4, 2, 8), real[:, None, None]
    assert_plain(layer, state, x, 4, 2)
    if cached:
        spy = Spy()
        with torch.no_grad():
            first = layer(x[:, :4], cache=spy, mask=mask[..., :4], positions=positions[:, :4])
            rest = [layer(x[:, t : t + 1], cache=spy, mask=mask[..., : t + 1], positions=positions[:, t : t + 1])
                    for t in (4, 5)]  # fmt: skip
        out = torch.cat((first, *rest), 1)
    else:
        out = layer(x, mask=mask, positions=positions)
    for b, n in enumerate(lengths):
        close(out[b, T - n :], alone[b][0], f"row {b} has {n} tokens and {T - n} places of padding", atol=1e-4)
    assert_that(out.isfinite().all(), "places of padding see nothing; what comes out there is not NaN", value=out)


@task("GroupedQueryAttention")
def test_gradients_reach_the_input_and_all_weights(solution, randn):
    state, x = a_state(randn, 12, 4, 2, 4, dtype=torch.float64), randn(2, 3, 12, dtype=torch.float64)
    layer = a_layer(solution, state, 12, 4, 2, 4)
    weights = {name: tensor.clone().requires_grad_() for name, tensor in state.items()}
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    q, k, v = (
        (theirs @ weights[f"{name}_proj.weight"].T).unflatten(-1, (n, 4)).transpose(1, 2)
        for name, n in (("q", 4), ("k", 2), ("v", 2))
    )
    angle = torch.arange(3, device=x.device)[:, None].double() * torch.tensor([1.0, 0.01], device=x.device).double()
    turn = torch.polar(torch.ones_like(angle), angle)
    q, k = (torch.view_as_real(torch.view_as_complex(z.unflatten(-1, (2, 2)).contiguous()) * turn) for z in (q, k))
    q, k = q.flatten(-2), k.flatten(-2)
    scores = q @ k.repeat_interleave(2, 1).transpose(-1, -2) / 2.0
    future = torch.ones(3, 3, dtype=torch.bool, device=x.device).triu(1)
    mixed = torch.softmax(scores.masked_fill(future, -math.inf), -1) @ v.repeat_interleave(2, 1)
    out = mixed.transpose(1, 2).flatten(-2) @ weights["o_proj.weight"].T
    out.square().sum().backward()
    found = layer(ours)
    assert_that(found.requires_grad, "the output has a graph")
    found.square().sum().backward()
    got = {"x": ours.grad, **{name: weight.grad for name, weight in layer.named_parameters()}}
    want = {"x": theirs.grad, **{name: weight.grad for name, weight in weights.items()}}
    for name, grad in want.items():
        assert_close(got[name], grad.cpu(), rtol=1e-3, atol=1e-3, because=f"the gradient of {name}")


@task("GroupedQueryAttention")
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64])
def test_the_output_has_the_dtype_of_the_input(solution, randn, kind):
    state, x = a_state(randn, 20, 4, 2, 8, dtype=kind), randn(2, 5, 20, dtype=kind, scale=0.25)
    expected, _, _ = whole(state, x, 4, 2)
    layer = a_layer(solution, state, 20, 4, 2, 8)
    loose = {torch.bfloat16: 0.05, torch.float64: 2e-5}[kind]
    assert_close(layer(x), expected.to(kind), rtol=loose, atol=loose, because=f"a layer in {kind}")


@task("GroupedQueryAttention")
def test_a_view_as_input_is_left_alone(solution, randn):
    state, x = a_state(randn, 20, 4, 2, 8), noncontiguous(randn(2, 5, 20))
    expected, _, _ = whole(state, x, 4, 2)
    layer = a_layer(solution, state, 20, 4, 2, 8)
    with unchanged(x), global_rng_untouched():
        found = layer(x)
    close(found, expected, "x has gaps", atol=1e-4)


@task("GroupedQueryAttention")
@pytest.mark.parametrize(
    ("arguments", "options", "named"),
    [
        ((24, 6, 4), {}, ["6", "4"]),
        ((24, 6, 4), {"head_dim": 8}, ["6", "4"]),
        ((24, 2, 4), {"head_dim": 8}, ["2", "4"]),
        ((22, 4, 2), {}, ["22", "4"]),
        ((20, 4, 2), {"head_dim": 7}, ["7"]),
        ((12, 4, 2), {}, ["3"]),
        ((16, 4, 2), {"layout": "halves"}, ["halves"]),
        ((16, 4, 2), {"layout": "Half"}, ["Half"]),
    ],
)
def test_a_layer_that_cannot_be_is_refused(solution, arguments, options, named):
    assert_raises(ValueError, lambda: solution.GroupedQueryAttention(*arguments, **options), mentions=named)


@task("GroupedQueryAttention")
def test_a_width_that_does_not_divide_is_fine_with_a_head_dim(solution, randn):
    state, x = a_state(randn, 7, 4, 2, 6), randn(1, 3, 7)
    expected, _, _ = whole(state, x, 4, 2)
    close(a_layer(solution, state, 7, 4, 2, 6)(x), expected, "d_model 7, 4 heads of width 6", atol=1e-4)


@task("GroupedQueryAttention")
def test_one_token_costs_its_projections_and_two_products(solution, randn, device):
    d_model, H, G, Dh, S = 16, 8, 2, 16, 64
    layer = a_layer(solution, a_state(randn, d_model, H, G, Dh), d_model, H, G, Dh)
    cache, x = KVCache(1, G, 80, Dh, device=device), randn(1, S, d_model)
    assert_plain(layer, layer.state_dict(), x[:, :5], H, G)
    in_chunks(layer, x[:, :-2], (S - 2,), cache)
    with torch.no_grad():
        layer(x[:, -2:-1], cache=cache)
        assert_cost(
            layer,
            x[:, -1:],
            cache=cache,
            flops=2 * d_model * Dh * (2 * H + 2 * G) + 4 * H * S * Dh,
            no_larger_than=H * S,
            because="one token after 63 cached ones: 2 key/value heads are read, and 8 are never made of them",
        )


@cost_case("GroupedQueryAttention")
def layer_cost(module, randn, device):
    layer = module.GroupedQueryAttention(128, 16, 2).to(device)
    cache, x = KVCache(1, 2, 4096, 8, device=device), randn(1, 256, 128)
    with torch.no_grad():
        layer(x, cache=cache)

    def decode():
        with torch.no_grad():
            layer(x[:, :1], cache=cache)

    return decode


# gqa_costs

SHAPES = [(24, 6, 2, 8), (24, 6, 6, 4), (16, 4, 1, 6), (20, 8, 4, 2)]


@task("gqa_costs")
@pytest.mark.parametrize("shape", SHAPES)
def test_the_parameters_are_those_of_the_layer(solution, reference, shape):
    d_model, H, G, Dh = shape
    layer = reference.GroupedQueryAttention(d_model, H, G, head_dim=Dh)
    expected = sum(weight.numel() for weight in layer.parameters())
    found = solution.gqa_costs(d_model, H, G, Dh, 10, 4)
    assert_equal(found["params"], expected, because=f"four weights with d_model, H, G, Dh = {shape}")


@task("gqa_costs")
@pytest.mark.parametrize(("kind", "size"), [(torch.float32, 4), (torch.bfloat16, 2), (torch.float64, 8)])
def test_the_bytes_are_those_of_a_cache_with_one_place(solution, kind, size):
    for d_model, H, G, Dh in SHAPES:
        expected = KVCache(1, G, 1, Dh, dtype=kind).nbytes
        found = solution.gqa_costs(d_model, H, G, Dh, 10, size)
        assert_equal(
            found["cache_bytes_per_token"], expected, because=f"KVCache with {G} heads of width {Dh}, {size} bytes each"
        )


@task("gqa_costs")
@pytest.mark.parametrize("length", [0, 1, 9])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_flops_of_a_token_are_what_the_meter_finds(solution, reference, randn, device, shape, length):
    d_model, H, G, Dh = shape
    layer = reference.GroupedQueryAttention(d_model, H, G, head_dim=Dh).to(device)
    cache = KVCache(1, G, 20, Dh, device=device)
    with torch.no_grad():
        layer(randn(1, length, d_model), cache=cache)
        _, cost = measure(layer, randn(1, 1, d_model), cache=cache)
    found = solution.gqa_costs(d_model, H, G, Dh, length, 4)
    assert_equal(found["decode_flops"], cost.flops, because=f"metered: one token after {length} cached ones")


@task("gqa_costs")
@pytest.mark.parametrize("length", [0, 1, 9])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_score_flops_are_two_products_of_all_heads(solution, randn, shape, length):
    d_model, H, G, Dh = shape
    q, k, v = randn(1, H, 1, Dh), randn(1, H, length + 1, Dh), randn(1, H, length + 1, Dh)
    _, cost = measure(lambda: torch.softmax(q @ k.mT, -1) @ v)
    found = solution.gqa_costs(d_model, H, G, Dh, length, 4)
    assert_equal(found["score_flops"], cost.flops, because=f"metered: {H} queries meet {length + 1} keys")


@task("gqa_costs")
def test_fewer_groups_save_no_score_flops(solution):
    found = {G: solution.gqa_costs(512, 8, G, 64, 999, 2)["score_flops"] for G in (8, 4, 2, 1)}
    assert_equal(found, dict.fromkeys((8, 4, 2, 1), 2_048_000), because="every query still meets every key")


@task("gqa_costs")
def test_a_layer_of_llama_3(solution):
    found = solution.gqa_costs(4096, 32, 8, 128, 8191, 2)
    expected = {
        "params": 41_943_040,
        "cache_bytes_per_token": 4096,
        "decode_flops": 218_103_808,
        "score_flops": 134_217_728,
    }
    assert_equal(found, expected, because="Llama 3 8B: 32 query heads, 8 key/value heads of width 128, 2 bytes")


# gqa_equivalent_mha


@task("gqa_equivalent_mha")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("H", "G"), [(6, 2), (6, 3), (4, 1), (4, 4)])
def test_the_wide_layer_computes_the_same(solution, randn, H, G, bias):
    state, x = a_state(randn, 20, H, G, 8, bias=bias), randn(2, 5, 20)
    expected, _, _ = whole(state, x, H, G)
    wide = solution.gqa_equivalent_mha(state, H, G)
    assert_equal(sorted(wide), sorted(state), because="the names stay")
    shapes = {name: tuple(wide[name].shape) for name in ("k_proj.weight", "v_proj.weight")}
    assert_equal(shapes, {"k_proj.weight": (H * 8, 20), "v_proj.weight": (H * 8, 20)}, because=f"{H} heads of width 8")
    found, _, _ = whole(wide, x, H, H)
    same_layer(found, expected, f"{G} key/value heads written out as {H}")


@task("gqa_equivalent_mha")
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float64])
def test_each_head_gets_the_rows_of_its_group(solution, randn, kind):
    state = a_state(randn, 5, 6, 2, 3, bias=True, dtype=kind)
    expected = {name: tensor.cpu().clone() for name, tensor in state.items()}
    for name in ("k_proj.weight", "v_proj.weight", "k_proj.bias", "v_proj.bias"):
        first, second = expected[name][:3], expected[name][3:]
        expected[name] = torch.cat([first, first, first, second, second, second])
    with unchanged(*state.values()):
        found = solution.gqa_equivalent_mha(state, 6, 2)
    for name, tensor in expected.items():
        assert_equal(found[name], tensor, because=f"{name}: heads of 3 rows; the first three query heads share one")


@task("gqa_equivalent_mha")
def test_a_value_head_may_have_another_width(solution, randn):
    state = a_state(randn, 5, 4, 2, 4) | {"v_proj.weight": randn(6, 5), "o_proj.weight": randn(5, 12)}
    v = state["v_proj.weight"].cpu()
    expected = torch.cat([v[:3], v[:3], v[3:], v[3:]])
    found = solution.gqa_equivalent_mha(state, 4, 2)
    assert_equal(found["v_proj.weight"], expected, because="6 rows are 2 heads of width 3")


@task("gqa_equivalent_mha")
def test_the_given_state_stays_as_it_is(solution, randn):
    state = a_state(randn, 5, 4, 2, 4)
    before = dict(state)
    found = solution.gqa_equivalent_mha(state, 4, 2)
    same = all(state[name] is tensor for name, tensor in before.items()) and len(state) == len(before)
    assert_that(same and found is not state, "a new dict is returned, and the given one keeps its tensors")


@task("gqa_equivalent_mha")
@pytest.mark.parametrize(("H", "G"), [(6, 4), (2, 4)])
def test_unequal_groups_cannot_be_written_out(solution, randn, H, G):
    state = a_state(randn, 5, H, G, 4)
    assert_raises(ValueError, solution.gqa_equivalent_mha, state, H, G, mentions=[str(H), str(G)])


# shard

WORLDS = [(8, 4, 1), (8, 4, 2), (8, 4, 4), (8, 4, 8), (6, 2, 2), (6, 3, 3), (12, 2, 4), (4, 1, 4), (6, 6, 3)]


@task("shard")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("H", "G", "world"), WORLDS)
def test_the_ranks_add_up_to_the_layer(solution, randn, H, G, world, bias):
    state, x = a_state(randn, 20, H, G, 4, bias=bias), randn(2, 5, 20)
    expected, _, _ = whole(state, x, H, G)
    total = torch.zeros_like(expected)
    local = max(1, G // world)
    for rank in range(world):
        part = solution.shard(state, H, G, world, rank)
        shapes = {name: tuple(part[name].shape) for name in sorted(part) if name.endswith("weight")}
        wanted = {
            "k_proj.weight": (local * 4, 20),
            "o_proj.weight": (20, H // world * 4),
            "q_proj.weight": (H // world * 4, 20),
            "v_proj.weight": (local * 4, 20),
        }
        assert_equal(shapes, wanted, because=f"rank {rank} of {world}: {H // world} query and {local} key/value heads")
        out, _, _ = whole(part, x, H // world, local)
        total = total + out
    same_layer(total, expected, f"the sum over {world} ranks is the layer with {H} and {G} heads")


@task("shard")
@pytest.mark.parametrize(("H", "G", "world"), WORLDS)
def test_a_rank_holds_its_heads_and_those_that_they_read(solution, randn, H, G, world):
    state = a_state(randn, 5, H, G, 2, bias=True)
    plain = {name: tensor.cpu().clone() for name, tensor in state.items()}
    for rank in range(world):
        mine = [h for h in range(H) if h * world // H == rank]
        read = sorted({h * G // H for h in mine})
        with unchanged(*state.values()):
            found = solution.shard(state, H, G, world, rank)
        assert_equal(sorted(found), sorted(plain), because="the names stay")
        for name, tensor in plain.items():
            if name == "o_proj.weight":
                expected = torch.cat([tensor[:, 2 * h : 2 * h + 2] for h in mine], 1)
            else:
                heads = mine if name.startswith("q") else read
                expected = torch.cat([tensor[2 * h : 2 * h + 2] for h in heads])
            assert_equal(found[name], expected, because=f"{name} of rank {rank} of {world}, with query heads {mine}")


@task("shard")
def test_a_shard_loads_into_a_smaller_layer(solution, reference, randn):
    state = a_state(randn, 20, 8, 2, 4, dtype=torch.float64)
    for rank in range(4):
        part = solution.shard(state, 8, 2, 4, rank)
        dtypes = {tensor.dtype for tensor in part.values()}
        assert_equal(dtypes, {torch.float64}, because="dtypes stay")
        reference.GroupedQueryAttention(20, 2, 1, head_dim=4).load_state_dict(part)


@task("shard")
def test_a_rank_holds_less_until_there_is_one_head_left(solution, randn):
    state = a_state(randn, 3, 16, 4, 2)
    found = [
        solution.shard(state, 16, 4, world, world - 1)["k_proj.weight"].shape[0] // 2 for world in (1, 2, 4, 8, 16)
    ]
    assert_equal(found, [4, 2, 1, 1, 1], because="key/value heads per rank in a world of 1, 2, 4, 8 and 16")


@task("shard")
def test_the_whole_state_stays_as_it_is(solution, randn):
    state = a_state(randn, 5, 4, 2, 4)
    before = dict(state)
    found = solution.shard(state, 4, 2, 2, 1)
    same = all(state[name] is tensor for name, tensor in before.items()) and len(state) == len(before)
    assert_that(same and found is not state, "a new dict is returned, and the given one keeps its tensors")


@task("shard")
@pytest.mark.parametrize(
    ("H", "G", "world", "named"),
    [
        (6, 2, 4, ["6", "4"]),
        (6, 6, 4, ["6", "4"]),
        (12, 4, 6, ["4", "6"]),
        (12, 6, 4, ["6", "4"]),
        (6, 4, 2, ["6", "4"]),
    ],
)
def test_heads_that_do_not_spread_are_refused(solution, randn, H, G, world, named):
    state = a_state(randn, 5, H, G, 2)
    assert_raises(ValueError, solution.shard, state, H, G, world, 0, mentions=named)


@task("shard")
@pytest.mark.parametrize("rank", [-1, 2, 3])
def test_a_rank_outside_of_the_world_is_refused(solution, randn, rank):
    state = a_state(randn, 5, 4, 2, 2)
    assert_raises(ValueError, solution.shard, state, 4, 2, 2, rank, mentions=[str(rank), "2"])


# best_grouping


def planted(reference, randn, device, order, G, noise=0.0):
    """A layer in which the heads order[0], order[1], ... of a group are copies of each other, and an input."""
    H = len(order)
    state = a_state(randn, 12, H, H, 4)
    for name in ("k_proj.weight", "v_proj.weight"):
        heads, mothers = torch.empty_like(state[name]).unflatten(0, (H, 4)), randn(G, 4, 12)
        for place, head in enumerate(order):
            heads[head] = mothers[place // (H // G)] + noise * randn(4, 12)
        state[name] = heads.flatten(0, 1)
    return a_layer(reference, state, 12, H, H, 4), randn(2, 9, 12)


def canonical(order, G):
    """The groups with their heads ascending, and ascending by the first."""
    size = len(order) // G
    groups = sorted(sorted(order[i : i + size]) for i in range(0, len(order), size))
    return [head for group in groups for head in group]


def on_a_line(reference, randn, places, dtype=torch.float32):
    """A layer whose head h makes keys and values that lie at places[h] on a line, for every token, and an input."""
    H = len(places)
    state = a_state(randn, 12, H, H, 4)
    for name in ("k_proj.weight", "v_proj.weight"):
        common, direction = randn(4, 12), randn(4, 12)
        state[name] = torch.cat([common + place * direction for place in places])
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    return a_layer(reference, state, 12, H, H, 4), randn(2, 9, 12).to(dtype)


def on_a_plane(reference, randn, places):
    """A layer whose head h lies at places[h] on a plane through 0: one coordinate in its keys, one in its values."""
    H = len(places)
    state, direction = a_state(randn, 12, H, H, 4), randn(4, 12)
    state["k_proj.weight"] = torch.cat([x * direction for x, _ in places])
    state["v_proj.weight"] = torch.cat([y * direction for _, y in places])
    return a_layer(reference, state, 12, H, H, 4), randn(2, 9, 12)


def grouping_cost(module, x, order, G):
    """The cost of a grouping, in float64 with numpy."""
    H, x = len(order), x.detach().double().cpu().numpy()
    total = 0.0
    for layer in (module.k_proj, module.v_proj):
        w = layer.weight.detach().double().cpu().numpy()
        heads = (x @ w.T).reshape(*x.shape[:2], H, -1)
        for i in range(0, H, H // G):
            group = heads[:, :, list(order[i : i + H // G])]
            total += ((group - group.mean(2, keepdims=True)) ** 2).sum()
    return float(total)


def pooled(module, order, G):
    """The state of a layer with G heads: heads brought into the given order, then k and v averaged in groups."""
    state = {name: tensor.detach().cpu() for name, tensor in module.state_dict().items()}
    H = module.n_heads
    rows = {name: tensor.unflatten(0, (H, -1))[order] for name, tensor in state.items() if name != "o_proj.weight"}
    out = {name: tensor.unflatten(0, (G, -1)).mean(1).flatten(0, 1) for name, tensor in rows.items()}
    out["q_proj.weight"] = rows["q_proj.weight"].flatten(0, 1)
    out["o_proj.weight"] = state["o_proj.weight"].unflatten(1, (H, -1))[:, order].flatten(1)
    return out


@task("best_grouping")
@pytest.mark.parametrize(("H", "G"), [(4, 2), (6, 2), (6, 3), (8, 4), (8, 2)])
@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_planted_groups_are_found(solution, reference, randn, randperm, device, H, G, noise):
    order = randperm(H).tolist()
    module, x = planted(reference, randn, device, order, G, noise)
    found = solution.best_grouping(module, x, G)
    assert_equal(found, torch.tensor(canonical(order, G)), because=f"{G} groups of (nearly) equal heads were planted")


@task("best_grouping")
def test_planted_groups_can_be_pooled_without_any_loss(solution, reference, randn, device):
    H, G = 6, 3
    module, x = planted(reference, randn, device, [0, 3, 1, 4, 2, 5], G)
    expected, _, _ = whole(module.state_dict(), x, H, H)
    order = solution.best_grouping(module, x, G).cpu()
    found, _, _ = whole(pooled(module, order, G), x, H, G)
    assert_close(found, expected, rtol=1e-5, atol=1e-5, because="pooled in this order, no output changes")


@task("best_grouping")
@pytest.mark.parametrize(("H", "G"), [(4, 2), (6, 3), (6, 2), (8, 2)])
def test_no_grouping_costs_less(solution, reference, randn, H, G):
    state, x = a_state(randn, 12, H, H, 4), randn(2, 3, 12)
    module = a_layer(reference, state, 12, H, H, 4)
    orders = {tuple(canonical(order, G)) for order in itertools.permutations(range(H))} if H < 8 else None
    if orders is None:  # head 0 and three others, and the rest
        orders = {(0, *some, *(h for h in range(1, 8) if h not in some))
                  for some in itertools.combinations(range(1, 8), 3)}  # fmt: skip
    best = min(grouping_cost(module, x, order, G) for order in orders)
    found = solution.best_grouping(module, x, G).tolist()
    assert_equal(sorted(found), list(range(H)), because="each head has one place")
    cost = grouping_cost(module, x, found, G)
    assert_that(cost <= best * (1 + 1e-5), f"the best of {len(orders)} groupings costs less", value=tuple(found))


@task("best_grouping")
@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ([0.0, 2.2, -1.5, 1.0], [0, 2, 1, 3]),
        ([0.0, 2.0, 3.0, 5.0, 0.9, 4.2], [0, 4, 1, 2, 3, 5]),
        ([0.0, -9.0, 1.0, 2.5, 20.0, -8.0], [0, 2, 1, 5, 3, 4]),
    ],
)
def test_the_whole_grouping_counts_and_not_the_first_pair(solution, reference, randn, places, expected):
    module, x = on_a_line(reference, randn, places)
    found = solution.best_grouping(module, x, len(places) // 2)
    assert_equal(found, torch.tensor(expected), because=f"the heads lie on a line, at {places}")


@task("best_grouping")
def test_squares_are_summed(solution, reference, randn):
    module, x = on_a_line(reference, randn, [0.0, 2.2, -1.5, 1.0])
    found = solution.best_grouping(module, x, 2)
    assert_equal(found, torch.tensor([0, 2, 1, 3]), because="the heads lie on a line, at 0, 2.2, -1.5 and 1")
    module, x = on_a_plane(reference, randn, [(-0.071, -0.071), (1.742, 0.379), (0.071, 0.071), (-0.379, -1.742)])
    found = solution.best_grouping(module, x, 2)
    assert_equal(
        found, torch.tensor([0, 3, 1, 2]), because="two pairs at distance 1.7 cost less than two at 0.2 and 3, squared"
    )


@task("best_grouping")
def test_lengths_count(solution, reference, randn):
    module, x = on_a_plane(reference, randn, [(1.0, 2.0), (20.0, 10.5), (2.0, 1.0), (10.0, 20.5)])
    found = solution.best_grouping(module, x, 2)
    assert_equal(
        found, torch.tensor([0, 2, 1, 3]), because="heads 0 and 3 point the same way, and one is ten times as long"
    )


@task("best_grouping")
def test_a_half_layer_is_compared_in_float32(solution, reference, randn):
    module, x = on_a_line(reference, randn, [0.0, 40.0, -20.0, 25.0], torch.float16)
    found = solution.best_grouping(module, x, 2)
    assert_equal(found, torch.tensor([0, 2, 1, 3]), because="squared distances do not fit into float16")


@task("best_grouping")
def test_what_the_input_never_shows_does_not_count(solution, reference, randn, device):
    module, x = planted(reference, randn, device, [0, 2, 1, 3], 2)
    x[..., 6:] = 0.0  # half of the input is never there
    for layer in (module.k_proj, module.v_proj):
        heads = layer.weight.detach().unflatten(0, (4, 4))
        heads[:, :, 6:] = 50.0 * randn(4, 4, 6)
        heads[1, :, 6:], heads[3, :, 6:] = heads[0, :, 6:], heads[2, :, 6:]
    found = solution.best_grouping(module, x, 2)
    assert_equal(
        found,
        torch.tensor([0, 2, 1, 3]),
        because="weights that meet only zeros differ; the keys and values on x do not",
    )


@task("best_grouping")
@pytest.mark.parametrize("loud", ["k_proj", "v_proj"])
def test_keys_and_values_both_count(solution, reference, randn, device, loud):
    module, x = planted(reference, randn, device, [0, 3, 1, 2], 2)
    other, _ = planted(reference, randn, device, [0, 2, 1, 3], 2)
    quiet = "v_proj" if loud == "k_proj" else "k_proj"
    with torch.no_grad():
        getattr(module, quiet).weight.mul_(0.1)
        getattr(module, loud).weight.copy_(getattr(other, loud).weight)
    found = solution.best_grouping(module, x, 2)
    assert_equal(found, torch.tensor([0, 2, 1, 3]), because=f"{loud} differs far more than {quiet}, and decides")


@task("best_grouping")
@pytest.mark.parametrize("G", [1, 5])
def test_with_one_choice_the_order_stays(solution, reference, randn, G):
    module = a_layer(reference, a_state(randn, 12, 5, 5, 4), 12, 5, 5, 4)
    found = solution.best_grouping(module, randn(1, 3, 12), G)
    assert_equal(found, torch.tensor([0, 1, 2, 3, 4]), because=f"5 heads in {G} groups: there is one grouping")


@task("best_grouping")
def test_the_module_stays_as_it_is(solution, reference, randn):
    module, x = planted(reference, randn, None, [0, 2, 1, 3], 2)
    with unchanged(*module.parameters()), global_rng_untouched():
        solution.best_grouping(module, x, 2)


@task("best_grouping")
@pytest.mark.parametrize("G", [4, 0, 12])
def test_groups_of_unequal_size_are_refused(solution, reference, randn, G):
    module = a_layer(reference, a_state(randn, 12, 6, 6, 4), 12, 6, 6, 4)
    assert_raises(ValueError, solution.best_grouping, module, randn(1, 3, 12), G, mentions=["6", str(G)])
