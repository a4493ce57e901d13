"""Day 26: what the tasks promise."""

from fractions import Fraction

import numpy as np
import pytest
import torch

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
    task,
    unmetered,
)

F64 = torch.float64
EXACT = {"rtol": 1e-10, "atol": 1e-11}


def tolerance(dtype):
    return EXACT if dtype == F64 else {"rtol": 1e-4, "atol": 1e-4}


def array(x):
    """A float64 copy in numpy that the solution cannot touch."""
    return x.detach().double().cpu().numpy().copy()


# cache_elements


@task("cache_elements")
@pytest.mark.parametrize(("heads", "width"), [(128, 128), (16, 64), (1, 3)])
def test_plain_attention_keeps_a_key_and_a_value_per_head(solution, heads, width):
    found = solution.cache_elements("mha", heads, width)
    assert_equal(found, sum(width + width for _ in range(heads)), because="each head keeps a key and a value")


@task("cache_elements")
@pytest.mark.parametrize(("heads", "width", "groups"), [(32, 128, 8), (6, 5, 1), (6, 5, 6)])
def test_grouped_attention_keeps_them_per_group(solution, heads, width, groups):
    found = solution.cache_elements("gqa", heads, width, n_kv_heads=groups)
    assert_equal(found, sum(width + width for _ in range(groups)), because="each group keeps a key and a value")


@task("cache_elements")
@pytest.mark.parametrize(("heads", "r", "dr", "expected"), [(128, 512, 64, 576), (16, 512, 64, 576), (4, 7, 0, 7)])
def test_a_latent_is_kept_once_for_all_heads(solution, heads, r, dr, expected):
    found = solution.cache_elements("mla", heads, 128, r=r, dr=dr)
    assert_equal(found, expected, because="one latent and one rotated key, whatever the number of heads")


@task("cache_elements")
def test_what_a_kind_does_not_need_is_ignored(solution):
    assert_equal(solution.cache_elements("mha", 4, 3, 2, 5, 1), 24, because="mha has no groups and no latent")
    assert_equal(solution.cache_elements("gqa", 4, 3, 2, 5, 1), 12, because="gqa has no latent")
    assert_equal(solution.cache_elements("mla", 4, 3, 2, 5, 1), 6, because="mla has no groups")


@task("cache_elements")
@pytest.mark.parametrize(
    ("kind", "more"), [("mqa", {}), ("gqa", {"r": 4, "dr": 2}), ("mla", {"r": 4, "n_kv_heads": 2}), ("mla", {"dr": 4})]
)
def test_an_unknown_kind_or_a_missing_number_is_refused(solution, kind, more):
    assert_raises(ValueError, solution.cache_elements, kind, 4, 3, **more)


@task("cache_elements")
@pytest.mark.parametrize(("r", "dr", "width"), [(512, 64, 128), (512, 0, 128), (100, 7, 3)])
def test_groups_that_fill_the_same_cache(solution, r, dr, width):
    found = solution.equivalent_gqa_groups(r, dr, width)
    assert_close(found, float(Fraction(r + dr, width + width)), rtol=1e-14, because="2 * groups * width = r + dr")


@task("cache_elements")
@pytest.mark.parametrize(("heads", "width", "r", "dr"), [(16, 128, 512, 64), (128, 128, 512, 64), (3, 5, 4, 0)])
def test_compression_against_the_same_heads(solution, heads, width, r, dr):
    found = solution.compression_vs_mha(heads, width, r, dr)
    expected = float(Fraction(heads * (width + width), r + dr))
    assert_close(found, expected, rtol=1e-14, because=f"{heads} heads of width {width} against {r} + {dr} numbers")


@task("cache_elements")
def test_the_published_ratios(solution):
    found = [round(solution.compression_vs_mha(heads, 128, 512, 64), 2) for heads in (16, 64, 128)]
    assert_equal(found, [7.11, 28.44, 56.89], because="V2-Lite, a model with 64 heads, V2 and V3")


# joint_low_rank


def squared_error(factors, w_k, w_v):
    down, up_k, up_v = factors
    return ((w_k - up_k @ down) ** 2).sum() + ((w_v - up_v @ down) ** 2).sum()


def tail(matrix, r):
    """The squared singular values after the first r, added."""
    return float((np.linalg.svd(matrix, compute_uv=False)[r:] ** 2).sum())


@task("joint_low_rank")
@pytest.mark.parametrize(("nk", "nv", "d", "r"), [(12, 8, 10, 4), (6, 9, 7, 7), (2, 3, 9, 5), (5, 4, 6, 1)])
def test_the_error_is_that_of_the_best_approximation(solution, randn, nk, nv, d, r):
    w_k, w_v = randn(nk, d, dtype=F64), randn(nv, d, dtype=F64)
    best = torch.tensor(tail(np.concatenate([array(w_k), array(w_v)]), r), dtype=F64)
    found = squared_error(solution.joint_low_rank(w_k, w_v, r), w_k, w_v)
    assert_close(found, best, rtol=1e-10, atol=1e-10, because="the squared singular values that are cut off, added")


@task("joint_low_rank")
@pytest.mark.parametrize("r", [1, 3, 5])
def test_products_are_those_of_the_largest_singular_values(solution, randn, r):
    u, _ = np.linalg.qr(array(randn(15, 6)))
    v, _ = np.linalg.qr(array(randn(8, 6)))
    s = 2.0 ** -np.arange(6)
    whole, kept = (u * s) @ v.T, (u[:, :r] * s[:r]) @ v[:, :r].T
    whole = torch.from_numpy(whole).to(randn(1).device)
    down, up_k, up_v = solution.joint_low_rank(whole[:9], whole[9:], r)
    assert_close(up_k @ down, torch.from_numpy(kept[:9]), **EXACT, because="the keys of the best approximation")
    assert_close(up_v @ down, torch.from_numpy(kept[9:]), **EXACT, because="the values of the best approximation")


@task("joint_low_rank")
@pytest.mark.parametrize("r", [3, 4])
def test_a_rank_that_suffices_is_exact(solution, randn, r):
    down, up_k, up_v = randn(3, 8, dtype=F64), randn(6, 3, dtype=F64), randn(4, 3, dtype=F64)
    w_k, w_v = up_k @ down, up_v @ down
    found = solution.joint_low_rank(w_k.clone(), w_v.clone(), r)
    assert_close(
        found[1] @ found[0], w_k, **EXACT, because="w_k and w_v read the same three directions: nothing is lost"
    )
    assert_close(
        found[2] @ found[0], w_v, **EXACT, because="w_k and w_v read the same three directions: nothing is lost"
    )


@task("joint_low_rank")
def test_one_latent_beats_two_of_half_the_width(solution, randn):
    shared = randn(8, 30, dtype=F64)
    w_k = randn(24, 8, dtype=F64) @ shared + 0.1 * randn(24, 30, dtype=F64)
    w_v = randn(20, 8, dtype=F64) @ shared + 0.1 * randn(20, 30, dtype=F64)
    apart = tail(array(w_k), 4) + tail(array(w_v), 4)
    found = float(squared_error(solution.joint_low_rank(w_k, w_v, 8), w_k, w_v))
    assert_that(
        found < 0.1 * apart,
        "keys and values share eight directions: one latent of 8 has them all",
        value=round(found, 6),
    )


@task("joint_low_rank")
def test_factors_have_the_promised_shapes(solution, randn, dtype):
    found = solution.joint_low_rank(randn(6, 7, dtype=dtype), randn(10, 7, dtype=dtype), 4)
    shapes = [tuple(x.shape) for x in found]
    assert_equal(shapes, [(4, 7), (6, 4), (10, 4)], because="w_down (r, D), w_uk (H*dn, r), w_uv (H*dv, r)")
    assert_equal([x.dtype for x in found], [dtype] * 3, because="in the dtype of the weights")


@task("joint_low_rank")
def test_weights_with_other_strides(solution, randn):
    w_k, w_v = noncontiguous(randn(7, 5, dtype=F64)), noncontiguous(randn(4, 5, dtype=F64))
    best = torch.tensor(tail(np.concatenate([array(w_k), array(w_v)]), 2), dtype=F64)
    found = squared_error(solution.joint_low_rank(w_k, w_v, 2), w_k, w_v)
    assert_close(found, best, rtol=1e-10, because="slices of larger tensors")


@task("joint_low_rank")
def test_a_rank_that_cannot_be_is_refused(solution, randn):
    for nk, nv, d, r in [(3, 2, 8, 6), (8, 3, 6, 7), (3, 2, 8, 0), (3, 2, 8, -1)]:
        assert_raises(ValueError, solution.joint_low_rank, randn(nk, d), randn(nv, d), r)


@task("joint_low_rank")
def test_inputs_of_two_widths_are_refused(solution, randn):
    assert_raises(ValueError, solution.joint_low_rank, randn(4, 6), randn(3, 5), 2, mentions=["(4, 6)", "(3, 5)"])


@task("joint_low_rank")
def test_no_square_of_the_outputs_is_made(solution, randn):
    with unmetered():
        w_k, w_v = randn(20, 6), randn(20, 6)
    assert_cost(
        solution.joint_low_rank, w_k, w_v, 3, no_larger_than=240, because="40 by 6 is the largest that is needed"
    )
    with unmetered():
        w_k, w_v = randn(4, 40), randn(2, 40)
    assert_cost(
        solution.joint_low_rank, w_k, w_v, 3, no_larger_than=240, because="6 by 40 is the largest that is needed"
    )


@task("joint_low_rank")
def test_factorizing_draws_no_random_numbers(solution, randn):
    w_k, w_v = randn(4, 6), randn(3, 6)
    with global_rng_untouched():
        solution.joint_low_rank(w_k, w_v, 2)


# absorbed_scores and absorbed_values


def naive_scores(q, c, w_uk):
    return q @ torch.stack([c @ w.T for w in w_uk], dim=1).mT


def naive_values(p, c, w_uv):
    return p @ torch.stack([c @ w.T for w in w_uv], dim=1)


def loop_scores(q, c, w_uk):
    """Key by key: the definition."""
    q, c, w = array(q), array(c), array(w_uk)
    B, H, T, _ = q.shape
    out = np.zeros((B, H, T, c.shape[1]))
    for b, h, t, s in np.ndindex(*out.shape):
        out[b, h, t, s] = q[b, h, t] @ (w[h] @ c[b, s])
    return torch.from_numpy(out)


def loop_values(p, c, w_uv):
    """Value by value: the definition."""
    p, c, w = array(p), array(c), array(w_uv)
    B, H, T, S = p.shape
    out = np.zeros((B, H, T, w.shape[1]))
    for b, h, t, s in np.ndindex(B, H, T, S):
        out[b, h, t] += p[b, h, t, s] * (w[h] @ c[b, s])
    return torch.from_numpy(out)


SIZES = [(2, 3, 1, 5, 4, 6), (2, 3, 4, 5, 6, 7), (1, 1, 2, 3, 4, 2), (3, 2, 3, 1, 1, 1), (4, 4, 4, 4, 4, 4)]


@task("absorbed_scores")
@pytest.mark.parametrize(("b", "h", "t", "s", "n", "r"), SIZES)
def test_scores_are_those_of_the_keys(solution, randn, b, h, t, s, n, r):
    q, c, w = randn(b, h, t, n, dtype=F64), randn(b, s, r, dtype=F64), randn(h, n, r, dtype=F64)
    expected = loop_scores(q, c, w)
    assert_close(solution.absorbed_scores(q, c, w), expected, **EXACT, because="q . (w_uk c), without a scale")


@task("absorbed_scores")
def test_scores_keep_their_dtype(solution, randn, dtype):
    q, c, w = randn(2, 3, 2, 4, dtype=dtype), randn(2, 5, 6, dtype=dtype), randn(3, 4, 6, dtype=dtype)
    expected = loop_scores(q, c, w).to(dtype)
    assert_close(solution.absorbed_scores(q, c, w), expected, **tolerance(dtype), because="float64 all the way")


@task("absorbed_scores")
def test_scores_from_slices_of_larger_weights(solution, randn):
    both = randn(3, 4 + 2, 6, dtype=F64)
    w = both[:, :4]
    q, c = noncontiguous(randn(2, 3, 2, 4, dtype=F64)), noncontiguous(randn(2, 5, 6, dtype=F64))
    expected = loop_scores(q, c, w)
    assert_close(solution.absorbed_scores(q, c, w), expected, **EXACT, because="w_uk is cut out of keys and values")


@task("absorbed_scores")
@pytest.mark.parametrize(("t", "s"), [(0, 3), (2, 0)])
def test_scores_of_nothing(solution, randn, t, s):
    found = solution.absorbed_scores(randn(2, 3, t, 4), randn(2, s, 6), randn(3, 4, 6))
    assert_close(found, torch.zeros(2, 3, t, s), because="no queries or no keys: an empty table")


@task("absorbed_scores")
def test_scores_send_gradients_to_all_three(solution, randn):
    args = [randn(2, 3, 2, 4, dtype=F64), randn(2, 5, 6, dtype=F64), randn(3, 4, 6, dtype=F64)]
    assert_gradients_close(
        solution.absorbed_scores, naive_scores, args, **EXACT, because="the same function as with keys"
    )


@task("absorbed_scores")
@pytest.mark.parametrize(
    ("q", "c", "w", "mentions"),
    [
        ((2, 3, 2, 4), (2, 5, 6), (1, 4, 6), ["(2, 3, 2, 4)", "(1, 4, 6)"]),
        ((2, 3, 2, 1), (2, 5, 6), (3, 4, 6), ["(2, 3, 2, 1)", "(3, 4, 6)"]),
        ((2, 3, 2, 4), (2, 5, 1), (3, 4, 6), ["(2, 5, 1)", "(3, 4, 6)"]),
        ((2, 3, 2, 4), (1, 5, 6), (3, 4, 6), ["(2, 3, 2, 4)", "(1, 5, 6)"]),
    ],
)
def test_scores_refuse_what_does_not_fit(solution, randn, q, c, w, mentions):
    assert_raises(ValueError, solution.absorbed_scores, randn(*q), randn(*c), randn(*w), mentions=mentions)


@task("absorbed_scores")
def test_scores_cost_what_the_brackets_say(solution, randn):
    with unmetered():
        q, c, w = randn(2, 3, 2, 4), randn(2, 50, 8), randn(3, 4, 8)
    flops = 2 * 2 * 3 * 2 * (4 * 8 + 8 * 50)
    assert_cost(solution.absorbed_scores, q, c, w, flops=flops, because="2*B*H*T*(dn*r + r*S): the query goes over")


@task("absorbed_scores")
def test_no_key_is_made(solution, randn):
    with unmetered():
        q, c, w = randn(2, 8, 1, 4), randn(2, 64, 8), randn(8, 4, 8)
    assert_cost(
        solution.absorbed_scores,
        q,
        c,
        w,
        no_larger_than=2 * 64 * 8,
        because="keys would be 2*8*64*4 numbers, a latent per head 2*8*64*8: neither is needed",
    )


@cost_case("absorbed_scores")
def absorbed_scores_cost(module, randn):
    with unmetered():
        q, c, w = randn(1, 16, 1, 32), randn(1, 256, 64), randn(16, 32, 64)
    return lambda: module.absorbed_scores(q, c, w)


@task("absorbed_values")
@pytest.mark.parametrize(("b", "h", "t", "s", "n", "r"), SIZES)
def test_mixtures_are_those_of_the_values(solution, randn, b, h, t, s, n, r):
    p, c, w = randn(b, h, t, s, dtype=F64), randn(b, s, r, dtype=F64), randn(h, n, r, dtype=F64)
    expected = loop_values(p, c, w)
    assert_close(solution.absorbed_values(p, c, w), expected, **EXACT, because="the sum of p * (w_uv c) over the keys")


@task("absorbed_values")
def test_mixtures_keep_their_dtype(solution, randn, dtype):
    p, c, w = randn(2, 3, 2, 5, dtype=dtype), randn(2, 5, 6, dtype=dtype), randn(3, 4, 6, dtype=dtype)
    expected = loop_values(p, c, w).to(dtype)
    assert_close(solution.absorbed_values(p, c, w), expected, **tolerance(dtype), because="float64 all the way")


@task("absorbed_values")
def test_mixtures_from_slices_of_larger_weights(solution, randn):
    both = randn(3, 4 + 2, 6, dtype=F64)
    w = both[:, 2:]
    p, c = noncontiguous(randn(2, 3, 2, 5, dtype=F64)), noncontiguous(randn(2, 5, 6, dtype=F64))
    expected = loop_values(p, c, w)
    assert_close(solution.absorbed_values(p, c, w), expected, **EXACT, because="w_uv is cut out of keys and values")


@task("absorbed_values")
@pytest.mark.parametrize(("t", "s"), [(0, 3), (2, 0)])
def test_mixtures_of_nothing(solution, randn, t, s):
    found = solution.absorbed_values(randn(2, 3, t, s), randn(2, s, 6), randn(3, 4, 6))
    assert_close(found, torch.zeros(2, 3, t, 4), because="a mixture of nothing is zero")


@task("absorbed_values")
def test_mixtures_send_gradients_to_all_three(solution, randn):
    args = [randn(2, 3, 2, 5, dtype=F64), randn(2, 5, 6, dtype=F64), randn(3, 4, 6, dtype=F64)]
    assert_gradients_close(
        solution.absorbed_values, naive_values, args, **EXACT, because="the same function as with values"
    )


@task("absorbed_values")
@pytest.mark.parametrize(
    ("p", "c", "w", "mentions"),
    [
        ((2, 3, 2, 5), (2, 5, 6), (1, 4, 6), ["(2, 3, 2, 5)", "(1, 4, 6)"]),
        ((2, 3, 2, 5), (2, 1, 6), (3, 4, 6), ["(2, 3, 2, 5)", "(2, 1, 6)"]),
        ((2, 3, 2, 5), (2, 5, 1), (3, 4, 6), ["(2, 5, 1)", "(3, 4, 6)"]),
        ((2, 3, 2, 5), (1, 5, 6), (3, 4, 6), ["(2, 3, 2, 5)", "(1, 5, 6)"]),
    ],
)
def test_mixtures_refuse_what_does_not_fit(solution, randn, p, c, w, mentions):
    assert_raises(ValueError, solution.absorbed_values, randn(*p), randn(*c), randn(*w), mentions=mentions)


@task("absorbed_values")
def test_mixtures_cost_what_the_brackets_say(solution, randn):
    with unmetered():
        p, c, w = randn(2, 3, 2, 50), randn(2, 50, 8), randn(3, 4, 8)
    flops = 2 * 2 * 3 * 2 * (50 * 8 + 8 * 4)
    assert_cost(solution.absorbed_values, p, c, w, flops=flops, because="2*B*H*T*(S*r + r*dv): latents are mixed")


@task("absorbed_values")
def test_no_value_is_made(solution, randn):
    with unmetered():
        p, c, w = randn(2, 8, 1, 64), randn(2, 64, 8), randn(8, 4, 8)
    assert_cost(
        solution.absorbed_values,
        p,
        c,
        w,
        no_larger_than=2 * 64 * 8,
        because="values would be 2*8*64*4 numbers, a latent per head 2*8*64*8: neither is needed",
    )


@cost_case("absorbed_values")
def absorbed_values_cost(module, randn):
    with unmetered():
        p, c, w = randn(1, 16, 1, 256), randn(1, 256, 64), randn(16, 32, 64)
    return lambda: module.absorbed_values(p, c, w)


# merged_matrices


@task("merged_matrices")
@pytest.mark.parametrize(("h", "n", "d", "r"), [(3, 4, 7, 5), (1, 2, 3, 3), (4, 4, 4, 4)])
def test_merged_queries_give_the_scores(solution, randn, h, n, d, r):
    w_q, w_uk = randn(h, n, d, dtype=F64), randn(h, n, r, dtype=F64)
    expected = np.stack([u.T @ q for q, u in zip(array(w_q), array(w_uk), strict=True)])
    found = solution.merge_query(w_q, w_uk)
    assert_close(found, torch.from_numpy(expected), **EXACT, because="(merged x) . c = (w_q x) . (w_uk c)")


@task("merged_matrices")
@pytest.mark.parametrize(("h", "n", "d", "r"), [(3, 4, 7, 5), (1, 2, 3, 3), (4, 4, 4, 4)])
def test_merged_outputs_take_latents(solution, randn, h, n, d, r):
    w_o, w_uv = randn(d, h, n, dtype=F64), randn(h, n, r, dtype=F64)
    expected = np.stack([array(w_o)[:, i] @ array(w_uv)[i] for i in range(h)])
    found = solution.merge_output(w_o, w_uv)
    assert_close(found, torch.from_numpy(expected), **EXACT, because="merged[h] c = w_o[:, h] (w_uv[h] c)")


@task("merged_matrices")
def test_attention_with_merged_weights_is_the_same_attention(solution, randn):
    B, T, D, H, n, v, r = 2, 5, 9, 3, 4, 6, 7
    x, w_down = randn(B, T, D, dtype=F64), randn(r, D, dtype=F64)
    w_q, w_uk = randn(H, n, D, dtype=F64), randn(H, n, r, dtype=F64)
    w_o, w_uv = randn(D, H, v, dtype=F64), randn(H, v, r, dtype=F64)
    c = x @ w_down.T
    q = torch.einsum("btd,hnd->bhtn", x, w_q)
    p = (naive_scores(q, c, w_uk) * n**-0.5).softmax(-1)
    expected = torch.einsum("bhtv,dhv->btd", naive_values(p, c, w_uv), w_o)
    query, output = solution.merge_query(w_q, w_uk), solution.merge_output(w_o, w_uv)
    assert_equal([tuple(query.shape), tuple(output.shape)], [(H, r, D), (H, D, r)], because="(H, r, D) and (H, D, r)")
    weights = (torch.einsum("hrd,btd,bsr->bhts", query, x, c) * n**-0.5).softmax(-1)
    found = torch.einsum("hdr,bhts,bsr->btd", output, weights, c)
    assert_close(found, expected, rtol=1e-9, atol=1e-9, because="from x and c alone, with keys and values nowhere")


@task("merged_matrices")
def test_merging_keeps_the_dtype_and_takes_any_strides(solution, randn, dtype):
    w_q, w_uk = noncontiguous(randn(2, 3, 5, dtype=dtype)), noncontiguous(randn(2, 3, 4, dtype=dtype))
    expected = torch.einsum("hnd,hnr->hrd", w_q.double(), w_uk.double()).to(dtype)
    assert_close(solution.merge_query(w_q, w_uk), expected, **tolerance(dtype), because="the query side")
    w_o = noncontiguous(randn(5, 2, 3, dtype=dtype))
    expected = torch.einsum("dhv,hvr->hdr", w_o.double(), w_uk.double()).to(dtype)
    assert_close(solution.merge_output(w_o, w_uk), expected, **tolerance(dtype), because="the output side")


@task("merged_matrices")
@pytest.mark.parametrize(("one", "two"), [((3, 4, 7), (1, 4, 5)), ((1, 4, 7), (3, 4, 5)), ((3, 4, 7), (3, 2, 5))])
def test_query_weights_that_do_not_fit_are_refused(solution, randn, one, two):
    assert_raises(ValueError, solution.merge_query, randn(*one), randn(*two), mentions=[str(one), str(two)])


@task("merged_matrices")
@pytest.mark.parametrize(("one", "two"), [((7, 3, 4), (1, 4, 5)), ((7, 1, 4), (3, 4, 5)), ((7, 3, 4), (3, 2, 5))])
def test_output_weights_that_do_not_fit_are_refused(solution, randn, one, two):
    assert_raises(ValueError, solution.merge_output, randn(*one), randn(*two), mentions=[str(one), str(two)])


@task("merged_matrices")
@pytest.mark.parametrize(("d", "n", "r"), [(5120, 128, 512), (2048, 128, 512), (7, 3, 2)])
def test_how_much_more_a_merged_matrix_holds(solution, d, n, r):
    found = solution.merged_parameter_ratio(d, n, r)
    expected = float(Fraction(r * d, n * d + n * r))
    assert_close(found, expected, rtol=1e-14, because=f"{r} x {d} numbers against {n} x {d} and {n} x {r}")


# effective_matrices


def turned(x, position):
    """The rotation of one vector, pair by pair, as multiplication of complex numbers."""
    n = len(x)
    z = (x[0::2] + 1j * x[1::2]) * np.exp(1j * position * 10000.0 ** (-np.arange(0, n, 2) / n))
    out = np.empty(n)
    out[0::2], out[1::2] = z.real, z.imag
    return out


def direct(w_q, w_uk, positions, query_pos):
    """Entry by entry: the score of a unit vector x and a unit vector c."""
    q, k = array(w_q), array(w_uk)
    out = np.zeros((len(positions), q.shape[1], k.shape[1]))
    for i, s in enumerate(positions.tolist()):
        for d, j in np.ndindex(q.shape[1], k.shape[1]):
            out[i, d, j] = turned(q[:, d], query_pos) @ turned(k[:, j], s)
    return torch.from_numpy(out)


@task("effective_matrices")
@pytest.mark.parametrize(("n", "d", "r", "t"), [(4, 5, 3, 9), (2, 3, 3, 0), (6, 6, 6, 4), (8, 3, 5, -2)])
def test_scores_of_rotated_queries_and_keys(solution, randn, randint, n, d, r, t):
    w_q, w_uk, positions = randn(n, d, dtype=F64), randn(n, r, dtype=F64), randint(0, 40, (7,))
    expected = direct(w_q, w_uk, positions, t)
    found = solution.effective_matrices(w_q, w_uk, positions, t)
    assert_close(found, expected, rtol=1e-9, atol=1e-10, because="x^T M c is the dot product of the two after rotation")


@task("effective_matrices")
def test_at_the_place_of_the_query_nothing_turns(solution, randn, device):
    w_q, w_uk = randn(6, 5, dtype=F64), randn(6, 4, dtype=F64)
    found = solution.effective_matrices(w_q, w_uk, torch.tensor([13, 13], device=device), 13)
    expected = torch.from_numpy(array(w_q).T @ array(w_uk)).expand(2, 5, 4)
    assert_close(found, expected, **EXACT, because="s = t: only w_q^T w_uk is left, the same for every key")


@task("effective_matrices")
def test_only_the_distance_counts(solution, randn, device):
    w_q, w_uk = randn(6, 5, dtype=F64), randn(6, 4, dtype=F64)
    expected = direct(w_q, w_uk, torch.tensor([3]), 10)
    found = solution.effective_matrices(w_q, w_uk, torch.tensor([103], device=device), 110)
    assert_close(found, expected, rtol=1e-9, atol=1e-10, because="7 places back is 7 places back")


@task("effective_matrices")
def test_rotations_span_as_many_dimensions_as_the_key_has(solution, randn, device):
    w_q, w_uk = randn(8, 12, dtype=F64), randn(8, 10, dtype=F64)
    found = solution.effective_matrices(w_q, w_uk, torch.arange(32, device=device) * 50, 5)
    values = torch.linalg.svdvals(found.flatten(1))
    rank = int((values > 1e-10 * values[0]).sum())
    assert_equal(rank, 8, because="32 positions and 8 dimensions: no single matrix stands for them all")


@task("effective_matrices")
def test_far_positions_are_as_good_as_near_ones(solution, randn, device, dtype):
    w_q, w_uk = randn(4, 3, dtype=dtype), randn(4, 5, dtype=dtype)
    expected = direct(w_q, w_uk, torch.tensor([1_000_003, 2]), 7).to(dtype)
    found = solution.effective_matrices(w_q, w_uk, torch.tensor([1_000_003, 2], device=device), 7)
    near = {"rtol": 1e-7, "atol": 1e-7} if dtype == F64 else {"rtol": 1e-4, "atol": 1e-5}
    assert_close(found, expected, **near, because="angles in float64: a million radians are still exact to many digits")


@task("effective_matrices")
def test_rotations_of_weights_with_other_strides(solution, randn, device):
    w_q, w_uk = noncontiguous(randn(4, 3, dtype=F64)), noncontiguous(randn(4, 5, dtype=F64))
    expected = direct(w_q, w_uk, torch.tensor([6]), 2)
    found = solution.effective_matrices(w_q, w_uk, torch.tensor([6], device=device), 2)
    assert_close(found, expected, rtol=1e-9, atol=1e-10, because="slices of larger tensors, and a single position")


@task("effective_matrices")
def test_rotations_refuse_what_does_not_fit(solution, randn, device):
    p = torch.arange(3, device=device)
    assert_raises(
        ValueError, solution.effective_matrices, randn(4, 3), randn(2, 5), p, 0, mentions=["(4, 3)", "(2, 5)"]
    )
    assert_raises(ValueError, solution.effective_matrices, randn(3, 4), randn(3, 5), p, 0, because="3 are no pairs")
    assert_raises(ValueError, solution.effective_matrices, randn(1, 4), randn(1, 5), p, 0, because="1 is no pair")


# latent_gauge


def weights(randn, r=4, d=7, nk=6, nv=9, dtype=F64):
    return randn(r, d, dtype=dtype), randn(nk, r, dtype=dtype), randn(nv, r, dtype=dtype)


def mixing(randn, r, dtype=F64):
    """An invertible matrix that is neither symmetric nor orthogonal, with a condition below 100."""
    q, _ = torch.linalg.qr(randn(r, r, dtype=F64))
    p, _ = torch.linalg.qr(randn(r, r, dtype=F64))
    return (q * torch.linspace(0.5, 3.0, r, dtype=F64, device=q.device) @ p).to(dtype)


@task("latent_gauge")
@pytest.mark.parametrize(("r", "d"), [(4, 7), (5, 5), (1, 3), (6, 4)])
def test_another_latent_gives_the_same_keys_and_values(solution, randn, r, d):
    down, up_k, up_v = weights(randn, r, d)
    a = mixing(randn, r)
    latent, keys, values = a @ down, up_k @ down, up_v @ down
    new_down, new_k, new_v = solution.latent_gauge(down, up_k, up_v, a)
    assert_close(new_down, latent, **EXACT, because="the latent is a c now")
    assert_close(new_k @ latent, keys, rtol=1e-9, atol=1e-10, because="the keys are what they were")
    assert_close(new_v @ latent, values, rtol=1e-9, atol=1e-10, because="the values are what they were")


@task("latent_gauge")
def test_a_gauge_keeps_the_dtype_and_takes_any_strides(solution, randn, dtype):
    down, up_k, up_v = (noncontiguous(x) for x in weights(randn, dtype=dtype))
    a = noncontiguous(mixing(randn, 4, dtype))
    expected = [(a.double() @ down.double()).to(dtype)]
    expected += [(up.double() @ torch.linalg.inv(a.double())).to(dtype) for up in (up_k, up_v)]
    found = solution.latent_gauge(down, up_k, up_v, a)
    assert_close(list(found), expected, **tolerance(dtype), because="w_down, w_uk and w_uv, in that order")


@task("latent_gauge")
@pytest.mark.parametrize("shape", [(3, 3), (4, 3), (3, 4), (7, 7)])
def test_a_gauge_of_another_size_is_refused(solution, randn, shape):
    down, up_k, up_v = weights(randn)
    assert_raises(ValueError, solution.latent_gauge, down, up_k, up_v, randn(*shape), mentions=[str(shape), "(4, 7)"])


@task("latent_gauge")
@pytest.mark.parametrize(("r", "d"), [(4, 7), (5, 5), (1, 3)])
def test_normalised_rows_are_orthonormal(solution, randn, r, d):
    down, up_k, up_v = weights(randn, r, d)
    rows = solution.normalise_gauge(down, up_k, up_v)[0]
    assert_equal(tuple(rows.shape), (r, d), because="w_down keeps its shape")
    assert_close(rows @ rows.T, torch.eye(r, dtype=F64), **EXACT, because="length 1 each, and at right angles")


@task("latent_gauge")
@pytest.mark.parametrize(("r", "d"), [(4, 7), (5, 5), (1, 3)])
def test_normalising_changes_no_key_and_no_value(solution, randn, r, d):
    down, up_k, up_v = weights(randn, r, d)
    keys, values = up_k @ down, up_v @ down
    new_down, new_k, new_v = solution.normalise_gauge(down, up_k, up_v)
    assert_close(new_k @ new_down, keys, rtol=1e-9, atol=1e-10, because="the keys are what they were")
    assert_close(new_v @ new_down, values, rtol=1e-9, atol=1e-10, because="the values are what they were")


@task("latent_gauge")
def test_normalising_keeps_the_dtype(solution, randn, dtype):
    down, up_k, up_v = (noncontiguous(x) for x in weights(randn, dtype=dtype))
    keys = up_k @ down
    found = solution.normalise_gauge(down, up_k, up_v)
    assert_equal([x.dtype for x in found], [dtype] * 3, because="in the dtype of the weights")
    assert_close(found[1] @ found[0], keys, **tolerance(dtype), because="the keys are what they were")


@task("latent_gauge")
def test_more_rows_than_the_space_has_are_refused(solution, randn):
    assert_raises(ValueError, solution.normalise_gauge, *weights(randn, 5, 4), mentions=["(5, 4)"])


# calibrated_low_rank


def output_error(factors, w, x):
    down, up = factors
    return ((x @ (w - up @ down).T) ** 2).sum()


@task("calibrated_low_rank")
@pytest.mark.parametrize(
    ("o", "d", "n", "r"), [(6, 8, 30, 3), (9, 5, 20, 2), (7, 9, 4, 2), (7, 9, 2, 5), (4, 4, 4, 1), (3, 6, 10, 3)]
)
def test_outputs_change_as_little_as_can_be(solution, randn, o, d, n, r):
    w = randn(o, d, dtype=F64)
    x = randn(n, d, dtype=F64) * 0.5 ** torch.arange(d, device=w.device) + 0.3
    best = torch.tensor(tail(array(x) @ array(w).T, r), dtype=F64)
    found = output_error(solution.calibrated_low_rank(w, x, r), w, x)
    assert_close(
        found, best, rtol=1e-8, atol=1e-10, because="the squared singular values of the outputs that are cut off"
    )


@task("calibrated_low_rank")
def test_calibration_beats_plain_truncation(solution, randn):
    w, x = (
        randn(10, 8, dtype=F64),
        randn(40, 8, dtype=F64) @ torch.diag(10.0 ** -torch.arange(8.0).double()).to(randn(1).device),
    )
    u, s, vh = np.linalg.svd(array(w), full_matrices=False)
    plain = float(((array(x) @ (array(w) - (u[:, :3] * s[:3]) @ vh[:3]).T) ** 2).sum())
    found = float(output_error(solution.calibrated_low_rank(w, x, 3), w, x))
    assert_that(found < 0.1 * plain, "inputs lie along a few directions: those have to be kept", value=round(found, 5))


@task("calibrated_low_rank")
def test_white_inputs_leave_plain_truncation(solution, randn):
    u, v = (torch.linalg.qr(randn(n, 6, dtype=F64))[0] for n in (9, 7))
    s = 2.0 ** -torch.arange(6, dtype=F64, device=u.device)
    w, kept = (u * s) @ v.T, (u[:, :2] * s[:2]) @ v[:, :2].T
    x = torch.linalg.qr(randn(20, 7, dtype=F64))[0]
    down, up = solution.calibrated_low_rank(w, x, 2)
    assert_close(up @ down, kept, rtol=1e-8, atol=1e-10, because="no direction of the inputs is stronger than another")


@task("calibrated_low_rank")
def test_inputs_in_a_plane_are_kept_exactly(solution, randn):
    w, x = randn(6, 8, dtype=F64), randn(30, 2, dtype=F64) @ randn(2, 8, dtype=F64)
    expected = x @ w.T
    down, up = solution.calibrated_low_rank(w, x, 2)
    assert_close(
        x @ (up @ down).T, expected, rtol=1e-8, atol=1e-9, because="two directions come in, and rank 2 has both"
    )


@task("calibrated_low_rank")
def test_calibrated_factors_have_the_promised_shapes(solution, randn, dtype):
    for n, r in [(20, 4), (2, 4), (3, 6)]:
        down, up = solution.calibrated_low_rank(randn(6, 7, dtype=dtype), noncontiguous(randn(n, 7, dtype=dtype)), r)
        found = [tuple(down.shape), tuple(up.shape), down.dtype, up.dtype]
        assert_equal(found, [(r, 7), (6, r), dtype, dtype], because="down (r, D), up (O, r), in the dtype of w")


@task("calibrated_low_rank")
def test_calibration_refuses_what_does_not_fit(solution, randn):
    assert_raises(ValueError, solution.calibrated_low_rank, randn(4, 6), randn(9, 5), 2, mentions=["(4, 6)", "(9, 5)"])
    for o, d, r in [(4, 6, 5), (6, 4, 5), (4, 6, 0), (4, 6, -1)]:
        assert_raises(ValueError, solution.calibrated_low_rank, randn(o, d), randn(9, d), r)


@task("calibrated_low_rank")
def test_many_inputs_make_no_square(solution, randn):
    with unmetered():
        w, x = randn(4, 5), randn(100, 5)
    assert_cost(solution.calibrated_low_rank, w, x, 2, no_larger_than=1000, because="100 by 100 numbers are not needed")
