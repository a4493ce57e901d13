"""Day 28: what the tasks promise."""

import random
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from checker.testing import (
    assert_close,
    assert_cost,
    assert_equal,
    assert_gradcheck,
    assert_gradients_close,
    assert_raises,
    assert_that,
    cost_case,
    global_rng_untouched,
    measure,
    noncontiguous,
    task,
    unchanged,
    unmetered,
)
from reference.day27_mla_components import LatentCache

F32, F64 = torch.float32, torch.float64
HALVES = [torch.bfloat16, torch.float16]
EXACT = {"rtol": 1e-10, "atol": 1e-11}
SINGLE = {"rtol": 1e-5, "atol": 1e-5}
HALF = {"rtol": 2e-2, "atol": 4e-2}


def tolerance(dtype):
    return EXACT if dtype == F64 else SINGLE


def rounded(number):
    """Two digits, so that a known mistake looks the same at every draw."""
    return float(f"{number:.2g}")


# Oracles: one head after the other, in float64, full keys and values


def softmax_where(scores, allowed):
    """The softmax over what is allowed; a row with nothing allowed is zeros."""
    some = allowed.any(-1, keepdim=True)
    weights = torch.softmax(torch.where(allowed | ~some, scores, -torch.inf), -1)
    return torch.where(allowed, weights, 0.0)


def attention_oracle(q_nope, q_rope, c, k_rope, w, mask=None, scale=None):
    q_nope, q_rope, c, k_rope, w = (x.double() for x in (q_nope, q_rope, c, k_rope, w))
    B, H, T, dn = q_nope.shape
    S, rows = c.shape[1], w.shape[0] // H
    scale = (dn + q_rope.shape[-1]) ** -0.5 if scale is None else scale
    allowed = torch.ones(B, H, T, S, dtype=torch.bool, device=c.device)
    if mask is not None:
        allowed = allowed & mask
    heads = []
    for h in range(H):
        mine = w[h * rows : (h + 1) * rows]
        keys = torch.cat([c @ mine[:dn].T, k_rope], -1)
        queries = torch.cat([q_nope[:, h], q_rope[:, h]], -1)
        weights = softmax_where(queries @ keys.mT * scale, allowed[:, h])
        heads.append(weights @ (c @ mine[dn:].T))
    return torch.stack(heads, 1)


def rotate(x, positions, *, base=10000.0, inv_freq=None, rope_scale=1.0, half=False):
    """Pairs as complex numbers, each turned by an angle; `half` pairs column i with column i + dr/2."""
    dr = x.shape[-1]
    if inv_freq is None:
        inv_freq = base ** (-torch.arange(0, dr, 2, dtype=F64, device=x.device) / dr)
    angles = positions[..., None].double() * inv_freq.double()
    turn = torch.polar(torch.full_like(angles, rope_scale), angles)
    if half:
        turned = torch.complex(x[..., : dr // 2], x[..., dr // 2 :]) * turn
        return torch.cat([turned.real, turned.imag], -1)
    return torch.view_as_real(
        torch.view_as_complex(x.unflatten(-1, (-1, 2)).clone(memory_format=torch.contiguous_format)) * turn
    ).flatten(-2)


def norm(x, gain, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gain


def stored_oracle(weights, x, sizes, *, positions=None, eps=1e-6, **rope):
    """What a cache holds of x: the normalized latent and the rotated key."""
    x, w, r = x.double(), {k: v.double() for k, v in weights.items()}, sizes["kv_lora_rank"]
    if positions is None:
        positions = torch.arange(x.shape[1], device=x.device)
    down = x @ w["kv_a_proj_with_mqa.weight"].T
    return norm(down[..., :r], w["kv_a_layernorm.weight"], eps), rotate(down[..., r:], positions, **rope)


def layer_oracle(weights, x, sizes, *, positions=None, visible=None, scale=None, eps=1e-6, **rope):
    """The whole layer on a whole sequence; `visible` (B, T, T) hides keys besides those of the future."""
    H, dn, dr = sizes["n_heads"], sizes["qk_nope_head_dim"], sizes["qk_rope_head_dim"]
    B, T, _ = x.shape
    x, w = x.double(), {k: v.double() for k, v in weights.items()}
    if positions is None:
        positions = torch.arange(T, device=x.device)
    if "q_proj.weight" in w:
        q = x @ w["q_proj.weight"].T
    else:
        q = norm(x @ w["q_a_proj.weight"].T, w["q_a_layernorm.weight"], eps) @ w["q_b_proj.weight"].T
    q = q.unflatten(-1, (H, dn + dr))
    q_rope = torch.stack([rotate(q[:, :, h, dn:], positions, **rope) for h in range(H)], 1)
    c, k_rope = stored_oracle(weights, x, sizes, positions=positions, eps=eps, **rope)
    allowed = torch.ones(T, T, dtype=torch.bool, device=x.device).tril()
    if visible is not None:
        allowed = (allowed & visible)[:, None]
    out = attention_oracle(q[..., :dn].transpose(1, 2), q_rope, c, k_rope, w["kv_b_proj.weight"], allowed, scale)
    return torch.cat(list(out.unbind(1)), -1) @ w["o_proj.weight"].T


# mla_cost and choose_mode

V3 = SimpleNamespace(
    d_model=7168,
    n_heads=128,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    kv_lora_rank=512,
    q_lora_rank=1536,
)
V2_LITE = SimpleNamespace(**{**vars(V3), "d_model": 2048, "n_heads": 16, "q_lora_rank": None})
ODD = SimpleNamespace(
    d_model=10, n_heads=3, qk_nope_head_dim=5, qk_rope_head_dim=4, v_head_dim=9, kv_lora_rank=7, q_lora_rank=None
)
ODD_Q = SimpleNamespace(**{**vars(ODD), "q_lora_rank": 8})


def products(cfg, t, s, mode):
    """The matrix products of one call, as (rows, inner, columns), written down one by one."""
    D, H, dn, dr = cfg.d_model, cfg.n_heads, cfg.qk_nope_head_dim, cfg.qk_rope_head_dim
    dv, r, rq = cfg.v_head_dim, cfg.kv_lora_rank, cfg.q_lora_rank
    todo = [(t, D, H * (dn + dr))] if rq is None else [(t, D, rq), (t, rq, H * (dn + dr))]
    todo += [(t, D, r + dr), (t, H * dv, D)]
    for _ in range(H):
        if mode == "naive":
            todo += [(s, r, dn + dv), (t, dn + dr, s), (t, s, dv)]
        else:
            todo += [(t, dn, r), (t, r + dr, s), (t, s, r), (t, r, dv)]
    return todo


def flops_of(cfg, t, s, mode):
    return sum(2 * m * k * n for m, k, n in products(cfg, t, s, mode))


COUNTED = [(ODD, 1, 1), (ODD, 4, 11), (ODD_Q, 1, 13), (ODD_Q, 6, 6), (V2_LITE, 2, 100), (V3, 1, 4096), (ODD, 0, 5)]


@task("mla_cost")
@pytest.mark.parametrize("mode", ["naive", "absorbed"])
@pytest.mark.parametrize(("cfg", "t", "s"), COUNTED)
def test_every_product_is_counted(solution, cfg, t, s, mode):
    found = solution.mla_cost(cfg, t, s, mode).flops
    assert_equal(found, flops_of(cfg, t, s, mode), because="two FLOPs per multiply-add of each matrix product")


@task("mla_cost")
@pytest.mark.parametrize("mode", ["naive", "absorbed"])
@pytest.mark.parametrize("cfg", [ODD, ODD_Q])
def test_the_count_is_what_the_meter_sees(solution, cfg, mode, device):
    def run():
        for m, k, n in products(cfg, 3, 8, mode):
            torch.ones(m, k, device=device) @ torch.ones(k, n, device=device)

    expected = measure(run)[1].flops
    assert_equal(solution.mla_cost(cfg, 3, 8, mode).flops, expected, because="products of these sizes were run")


@task("mla_cost")
def test_one_token_of_v3_after_4095(solution):
    absorbed, naive = (solution.mla_cost(V3, 1, 4096, mode) for mode in ("absorbed", "naive"))
    assert_equal(absorbed.flops, 1_515_061_248, because="374 million of them for projections and for absorbing")
    assert_equal(naive.flops, 138_115_153_920, because="all 4096 latents are expanded for one token")


@task("mla_cost")
@pytest.mark.parametrize("mode", ["naive", "absorbed"])
@pytest.mark.parametrize(
    ("cfg", "s", "size", "expected"), [(V3, 1, 2, 1152), (V2_LITE, 1000, 1, 576_000), (ODD, 6, 4, 264)]
)
def test_the_cache_holds_a_latent_and_a_rotary_key_per_token(solution, cfg, s, size, expected, mode):
    found = solution.mla_cost(cfg, 1, s, mode, dtype_bytes=size).cache_bytes
    assert_equal(found, expected, because="(r + dr) numbers for each of the s tokens, whatever the mode")


@task("mla_cost")
def test_numbers_of_the_cache_have_two_bytes_by_default(solution):
    assert_equal(
        solution.mla_cost(V3, 1, 10, "absorbed").cache_bytes, 11520, because="576 numbers of 2 bytes, 10 times"
    )


@task("mla_cost")
@pytest.mark.parametrize(("t", "s"), [(3, 2), (1, 0), (-1, 4)])
def test_tokens_that_are_not_among_the_keys_are_refused(solution, t, s):
    assert_raises(ValueError, solution.mla_cost, ODD, t, s, "naive", mentions=[str(t), str(s)])


@task("mla_cost")
@pytest.mark.parametrize("mode", ["auto", "Naive", ""])
def test_a_cost_of_an_unknown_mode_is_refused(solution, mode):
    assert_raises(ValueError, solution.mla_cost, ODD, 1, 2, mode, mentions=[mode])


@cost_case("mla_cost")
def mla_cost_cost(module, randn):
    return lambda: module.mla_cost(V3, 1, 100, "naive")


@task("choose_mode")
@pytest.mark.parametrize("cfg", [V3, V2_LITE], ids=["V3", "V2-Lite"])
def test_the_published_shapes_switch_where_the_costs_cross(solution, cfg):
    expected = {
        (1, 4096): "absorbed",
        (170, 10**9): "absorbed",
        (171, 10**9): "naive",
        (163, 4096): "absorbed",
        (164, 4096): "naive",
        (4096, 4096): "naive",
        (1, 1): "naive",
        (1, 2): "absorbed",
    }
    found = {sizes: solution.choose_mode(*sizes, cfg) for sizes in expected}
    assert_equal(found, expected, because="the mode with fewer FLOPs, by (t, s)")


@task("choose_mode")
@pytest.mark.parametrize(("dv", "r", "rq"), [(9, 6, None), (4, 20, 8), (9, 9, None)])
def test_the_cheaper_mode_for_every_small_size(solution, dv, r, rq):
    cfg = SimpleNamespace(**{**vars(ODD), "v_head_dim": dv, "kv_lora_rank": r, "q_lora_rank": rq})
    found, expected = {}, {}
    for s in (1, 2, 3, 5, 8, 40, 300):
        for t in (1, 2, 3, 4, 7, 8, 40, 300):
            naive, absorbed = (flops_of(cfg, t, s, mode) for mode in ("naive", "absorbed"))
            if t <= s and naive != absorbed:
                found[t, s], expected[t, s] = (
                    solution.choose_mode(t, s, cfg),
                    "naive" if naive < absorbed else "absorbed",
                )
    assert_equal(found, expected, because="brute force over (t, s)")


@task("choose_mode")
@pytest.mark.parametrize(("dn", "dv", "r", "t", "s"), [(5, 9, 7, 1, 1), (5, 9, 7, 20, 20), (1, 1, 2, 1, 2)])
def test_equal_costs_go_to_the_latents(solution, dn, dv, r, t, s):
    cfg = SimpleNamespace(**{**vars(ODD), "qk_nope_head_dim": dn, "v_head_dim": dv, "kv_lora_rank": r})
    assert flops_of(cfg, t, s, "naive") == flops_of(cfg, t, s, "absorbed")
    assert_equal(solution.choose_mode(t, s, cfg), "absorbed", because="equal FLOPs, fewer bytes")


@task("choose_mode")
def test_a_wide_latent_is_always_expanded_early(solution):
    cfg = SimpleNamespace(**{**vars(V3), "kv_lora_rank": 100_000})
    assert_equal(solution.choose_mode(200, 4096, cfg), "naive", because="a latent of 100,000 is dear to attend to")


@task("choose_mode")
def test_a_choice_among_too_few_keys_is_refused(solution):
    assert_raises(ValueError, solution.choose_mode, 3, 2, ODD, mentions=["3", "2"])


# naive_attention and absorbed_attention

BOTH = pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=task(n)) for n in ("naive_attention", "absorbed_attention")],
    ids=["naive", "absorbed"],
)
SHAPES = [  # B, H, T, S, dn, dr, dv, r
    (2, 3, 6, 8, 5, 4, 9, 7),
    (3, 2, 1, 9, 4, 6, 3, 10),
    (4, 4, 4, 4, 4, 4, 4, 4),
    (1, 1, 1, 1, 1, 2, 1, 1),
    (2, 3, 2, 5, 3, 4, 0, 6),
]


def pieces(randn, B=2, H=3, T=6, S=8, dn=5, dr=4, dv=9, r=7, dtype=F64):
    """q_nope, q_rope, c, k_rope and kv_b_weight."""
    q_nope, q_rope = randn(B, H, T, dn, dtype=dtype), randn(B, H, T, dr, dtype=dtype)
    c, k_rope = randn(B, S, r, dtype=dtype), randn(B, S, dr, dtype=dtype)
    return q_nope, q_rope, c, k_rope, randn(H * (dn + dv), r, dtype=dtype)


@BOTH
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mixtures_are_those_of_full_keys_and_values(solution, randn, name, shape):
    given = pieces(randn, *shape)
    expected = attention_oracle(*given)
    assert_close(
        getattr(solution, name)(*given), expected, **EXACT, because="keys and values written out, head by head"
    )


@BOTH
def test_the_result_has_the_dtype_of_the_queries(solution, randn, name, dtype):
    given = pieces(randn, dtype=dtype)
    expected = attention_oracle(*given).to(dtype)
    assert_close(getattr(solution, name)(*given), expected, **tolerance(dtype), because="(B, H, T, dv), same dtype")


@BOTH
@pytest.mark.parametrize("half", HALVES, ids=str)
def test_half_inputs_stay_near_the_exact_result(solution, randn, name, half):
    given = [x.to(half) for x in pieces(randn, S=40)]
    given[4] = given[4] * 0.4
    expected = attention_oracle(*given).to(half)
    assert_close(
        getattr(solution, name)(*given), expected, **HALF, because="the order of rounding is free, its size is not"
    )


@BOTH
@pytest.mark.parametrize("half", HALVES, ids=str)
def test_half_weights_are_not_summed_in_half(solution, randn, name, half, device):
    given = [x.to(half) for x in pieces(randn, B=1, H=1, T=1, S=1500)]
    given[2] = given[2][:, :1].expand(-1, 1500, -1).contiguous()
    given[3] = given[3][:, :1].expand(-1, 1500, -1).contiguous()
    expected = attention_oracle(*given).to(half)
    assert_close(getattr(solution, name)(*given), expected, **HALF, because="1500 equal keys: a mean of equal values")


@BOTH
@pytest.mark.parametrize("scale", [0.5, 0.0])
def test_a_given_scale_replaces_the_default(solution, randn, name, scale):
    given = pieces(randn)
    expected = attention_oracle(*given, scale=scale)
    assert_close(getattr(solution, name)(*given, scale=scale), expected, **EXACT, because=f"scores times {scale}")


@BOTH
@pytest.mark.parametrize("shape", [(8,), (2, 1, 1, 8), (2, 1, 6, 8), (1, 3, 6, 1)], ids=str)
def test_hidden_keys_get_no_weight(solution, randn, name, shape):
    given = pieces(randn)
    mask = randn(*shape) > -0.4
    expected = attention_oracle(*given, mask=mask)
    assert_close(getattr(solution, name)(*given, mask=mask), expected, **EXACT, because="True: may attend")


@BOTH
def test_a_query_that_sees_nothing_gives_zeros(solution, randn, name):
    given = pieces(randn)
    mask = randn(2, 1, 6, 8) > 0
    mask[1, 0, 2] = False
    expected = attention_oracle(*given, mask=mask)
    found = getattr(solution, name)(*given, mask=mask)
    assert_close(found[1, :, 2], torch.zeros_like(expected[1, :, 2]), because="nothing allowed: zeros, never NaN")
    assert_close(found, expected, **EXACT, because="and the other queries are as they were")


@BOTH
def test_gradients_are_those_of_full_keys_and_values(solution, randn, name):
    mask = randn(2, 1, 6, 8) > -0.5
    mask[0, 0, 3] = False
    attend = getattr(solution, name)
    assert_gradients_close(
        lambda *given: attend(*given, mask=mask),
        lambda *given: attention_oracle(*given, mask=mask),
        pieces(randn),
        rtol=1e-8,
        atol=1e-9,
    )


@BOTH
def test_a_row_that_sees_nothing_sends_nothing_back(solution, randn, name, device):
    given = [x.requires_grad_() for x in pieces(randn)]
    mask = torch.zeros(1, dtype=torch.bool, device=device)
    out = getattr(solution, name)(*given, mask=mask)
    found = torch.autograd.grad(out.sum(), given, allow_unused=True)
    found = torch.stack([torch.zeros(()) if g is None else g.abs().sum().cpu() for g in found])
    assert_close(found, torch.zeros(5), check_dtype=False, because="gradients of zeros, not NaN")


@BOTH
def test_views_of_larger_tensors_are_taken(solution, randn, name):
    q_nope, q_rope, c, k_rope, w = pieces(randn)
    expected = attention_oracle(q_nope, q_rope, c, k_rope, w)
    cache = torch.cat([c, c], 1)[:, :8], torch.cat([k_rope, k_rope], 1)[:, :8]
    queries = torch.cat([q_nope, q_rope], -1).transpose(1, 2).contiguous().transpose(1, 2)
    found = getattr(solution, name)(queries[..., :5], queries[..., 5:], *cache, noncontiguous(w))
    assert_close(found, expected, **EXACT, because="slices of a cache and of a projection")


@BOTH
def test_large_scores_do_not_overflow(solution, randn, name):
    q_nope, q_rope, c, k_rope, w = pieces(randn, dtype=F32)
    given = q_nope * 1000, q_rope * 1000, c, k_rope, w
    expected = attention_oracle(*given).float()
    assert_close(getattr(solution, name)(*given), expected, rtol=1e-2, atol=1e-2, because="scores of some thousands")


@BOTH
def test_mixing_draws_no_random_numbers(solution, randn, name):
    given = pieces(randn)
    with global_rng_untouched():
        getattr(solution, name)(*given)


MISFITS = [  # which of the five is exchanged, its new shape, and what the message has to name
    (1, (2, 3, 5, 4), ["(2, 3, 5, 4)", "(2, 3, 6, 5)"]),
    (1, (2, 1, 6, 4), ["(2, 1, 6, 4)", "(2, 3, 6, 5)"]),
    (1, (1, 3, 6, 4), ["(1, 3, 6, 4)"]),
    (2, (2, 8, 6), ["(2, 8, 6)", "(42, 7)"]),
    (2, (2, 8, 1), ["(2, 8, 1)", "(42, 7)"]),
    (2, (1, 8, 7), ["(1, 8, 7)"]),
    (3, (2, 8, 6), ["(2, 8, 6)", "(2, 3, 6, 4)"]),
    (3, (2, 8, 1), ["(2, 8, 1)", "(2, 3, 6, 4)"]),
    (3, (2, 7, 4), ["(2, 7, 4)", "(2, 8, 7)"]),
    (3, (2, 1, 4), ["(2, 1, 4)", "(2, 8, 7)"]),
    (3, (1, 8, 4), ["(1, 8, 4)"]),
    (4, (43, 7), ["(43, 7)", "(2, 3, 6, 5)"]),
    (4, (12, 7), ["(12, 7)", "(2, 3, 6, 5)"]),
]


@BOTH
@pytest.mark.parametrize(("one", "shape", "mentions"), MISFITS, ids=str)
def test_pieces_that_do_not_fit_are_refused_with_both_shapes(solution, randn, name, one, shape, mentions):
    given = list(pieces(randn))
    given[one] = randn(*shape, dtype=F64)
    assert_raises(ValueError, getattr(solution, name), *given, mentions=mentions)


@BOTH
@pytest.mark.parametrize("one", [[0, 1], [2, 3]], ids=str)
def test_queries_and_keys_of_other_batches_are_refused(solution, randn, name, one):
    given = [x[:1] if i in one else x for i, x in enumerate(pieces(randn))]
    assert_raises(ValueError, getattr(solution, name), *given, because="a batch of 1 does not broadcast")


@BOTH
@pytest.mark.parametrize("shape", [(7,), (3, 1, 1, 8), (2, 2, 3, 6, 8)], ids=str)
def test_a_mask_that_does_not_broadcast_is_refused(solution, randn, name, shape):
    given = pieces(randn)
    mask = randn(*shape) > 0
    assert_raises(ValueError, getattr(solution, name), *given, mask=mask, mentions=[str(shape), "(2, 3, 6, 8)"])


def core_flops(mode, B, H, T, S, dn, dr, dv, r):
    if mode == "naive":
        return 2 * B * (S * r * H * (dn + dv) + H * T * S * (dn + dr + dv))
    return 2 * B * (H * T * r * (dn + dv) + H * T * S * (r + dr + r))


@BOTH
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_the_flops_are_those_of_the_formula(solution, randn, name, shape):
    with unmetered():
        given = pieces(randn, *shape)
    flops = core_flops(name.partition("_")[0], *shape)
    assert_cost(getattr(solution, name), *given, flops=flops, because=f"the products of {name}, and no others")


@task("naive_attention")
def test_a_single_key_gives_its_value(solution, randn):
    q_nope, q_rope, c, k_rope, w = pieces(randn, S=1)
    expected = torch.stack([c[:, 0] @ w[h * 14 + 5 : h * 14 + 14].T for h in range(3)], 1)
    found = solution.naive_attention(q_nope, q_rope, c, k_rope, w)
    assert_close(found, expected[:, :, None].expand(2, 3, 6, 9), **EXACT, because="one key has all the weight")


@task("absorbed_attention")
@pytest.mark.parametrize(("B", "T", "kind"), [(2, 1, F32), (1, 2, F32), (1, 1, torch.bfloat16)], ids=str)
def test_no_key_no_value_and_no_copy_is_made(solution, randn, B, T, kind):
    H, S, r = 3, 40, 32
    with unmetered():
        given = pieces(randn, B, H, T, S, dn=16, dr=4, dv=12, r=r, dtype=kind)
    most = B * H * T * (r + S)
    assert_cost(
        solution.absorbed_attention,
        *given,
        no_larger_than=most,
        because=f"{B * H * S * 28:,} numbers of keys and values, {B * S * r:,} of latents, {H * 28 * r:,} of weights: "
        "none of them is written anew",
    )


@cost_case("naive_attention")
def naive_attention_cost(module, randn):
    given = pieces(randn, 2, 8, 1, 200, dn=32, dr=16, dv=32, r=64, dtype=F32)
    return lambda: module.naive_attention(*given)


@cost_case("absorbed_attention")
def absorbed_attention_cost(module, randn):
    given = pieces(randn, 2, 8, 1, 200, dn=32, dr=16, dv=32, r=64, dtype=F32)
    return lambda: module.absorbed_attention(*given)


# MLA

SIZES = {"n_heads": 3, "qk_nope_head_dim": 5, "qk_rope_head_dim": 4, "v_head_dim": 9, "kv_lora_rank": 7}
D = 10
QUERIES = pytest.mark.parametrize("rq", [None, 8], ids=["plain", "compressed"])
MODES = pytest.mark.parametrize("mode", ["naive", "absorbed"])


def weight_shapes(rq, sizes=SIZES, d=D):
    H, dn, dr, dv, r = sizes.values()
    if rq is None:
        shapes = {"q_proj.weight": (H * (dn + dr), d)}
    else:
        shapes = {"q_a_proj.weight": (rq, d), "q_a_layernorm.weight": (rq,), "q_b_proj.weight": (H * (dn + dr), rq)}
    return shapes | {
        "kv_a_proj_with_mqa.weight": (r + dr, d),
        "kv_a_layernorm.weight": (r,),
        "kv_b_proj.weight": (H * (dn + dv), r),
        "o_proj.weight": (d, H * dv),
    }


def filled(layer, weights):
    """Copy weights into the parameters of these names."""
    parameters = dict(layer.named_parameters())
    with torch.no_grad():
        for name, value in weights.items():
            parameters[name].copy_(value)
    return layer


def build(solution, randn, device, rq=None, dtype=F64, sizes=SIZES, d=D, **options):
    """A layer of known weights, and these weights in float64 as the layer holds them."""
    weights = {}
    for name, shape in weight_shapes(rq, sizes, d).items():
        value = randn(*shape, dtype=F64)
        value = 1 + 0.3 * value.tanh() if len(shape) == 1 else value * shape[1] ** -0.5
        weights[name] = value.to(dtype).double()
    layer = solution.MLA(d, q_lora_rank=rq, **sizes, **options).to(device, dtype)
    return filled(layer, weights), weights


def cache_for(batch, max_len=16, sizes=SIZES, dtype=F64, device="cpu"):
    return LatentCache(batch, max_len, sizes["kv_lora_rank"], sizes["qk_rope_head_dim"], dtype=dtype, device=device)


def run(layer, *args, **kwargs):
    with torch.no_grad():
        return layer(*args, **kwargs)


@task("MLA")
@QUERIES
def test_parameters_have_the_names_of_the_checkpoints(solution, rq):
    layer = solution.MLA(D, q_lora_rank=rq, inv_freq=torch.ones(2), **SIZES)
    found = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert_equal(dict(sorted(found.items())), dict(sorted(weight_shapes(rq).items())), because="names and shapes")
    assert_equal(sorted(layer.state_dict()), sorted(weight_shapes(rq)), because="and the state dict has nothing else")
    sizes = {"d_model": D, "q_lora_rank": rq, **SIZES}
    assert_equal({name: getattr(layer, name, "missing") for name in sizes}, sizes, because="attributes of the layer")


@task("MLA")
@QUERIES
@MODES
@pytest.mark.parametrize(("B", "T"), [(2, 6), (1, 1)])
def test_the_layer_is_that_of_the_equations(solution, randn, device, rq, mode, B, T):
    layer, weights = build(solution, randn, device, rq)
    x = randn(B, T, D, dtype=F64)
    expected = layer_oracle(weights, x, SIZES)
    assert_close(run(layer, x, mode=mode), expected, **EXACT, because="full keys and values, head by head")


@task("MLA")
@MODES
def test_all_sizes_equal_hide_no_mistake(solution, randn, device, mode):
    sizes = {"n_heads": 4, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4, "kv_lora_rank": 4}
    layer, weights = build(solution, randn, device, 4, sizes=sizes, d=4)
    x = randn(4, 4, 4, dtype=F64)
    expected = layer_oracle(weights, x, sizes)
    assert_close(run(layer, x, mode=mode), expected, **EXACT, because="every axis has length 4")


@task("MLA")
@MODES
def test_the_layer_keeps_the_dtype(solution, randn, device, mode, dtype):
    layer, weights = build(solution, randn, device, 8, dtype=dtype)
    x = randn(2, 6, D, dtype=dtype)
    expected = layer_oracle(weights, x, SIZES).to(dtype)
    assert_close(run(layer, x, mode=mode), expected, **tolerance(dtype), because="the dtype of x")


@task("MLA")
@MODES
@pytest.mark.parametrize("half", HALVES, ids=str)
def test_half_layers_stay_near_the_exact_result(solution, randn, device, mode, half):
    layer, weights = build(solution, randn, device, 8, dtype=half)
    x = randn(2, 6, D, dtype=half)
    expected = layer_oracle(weights, x, SIZES).to(half)
    assert_close(run(layer, x, mode=mode), expected, rtol=2e-2, atol=6e-2, because="the modes round in another order")


GOLDEN = ["v2_plain", "v2_yarn", "v3_plain", "v3_yarn", "v3_two_scales"]
GOLDEN_SIZES = {"n_heads": 3, "qk_nope_head_dim": 10, "qk_rope_head_dim": 8, "v_head_dim": 6, "kv_lora_rank": 14}


def golden(solution, data_dir, device, case):
    data = load_file(data_dir / "golden.safetensors")
    mine = {name.removeprefix(f"{case}."): value.to(device) for name, value in data.items() if name.startswith(case)}
    weights = {name.removeprefix("weights."): value for name, value in mine.items() if name.startswith("weights.")}
    softmax_scale, rope_scale = mine["scales"].tolist()
    options = {} if "plain" in case else {"softmax_scale": softmax_scale, "inv_freq": mine["inv_freq"]}
    if "two" in case:
        options["rope_scale"] = rope_scale
    layer = solution.MLA(24, q_lora_rank=None if "plain" in case else 12, **GOLDEN_SIZES, **options).to(device)
    return filled(layer, weights), mine["x"], data["positions"].to(device), mine["out"]


@task("MLA")
@MODES
@pytest.mark.parametrize("case", GOLDEN)
def test_outputs_are_those_of_the_published_layers(solution, data_dir, device, case, mode):
    layer, x, positions, out = golden(solution, data_dir, device, case)
    found = run(layer, x, positions=positions, mode=mode)
    assert_close(found, out, **SINGLE, because=f"{case}: DeepSeek's attention in transformers, with the same weights")


@task("MLA")
@pytest.mark.parametrize("case", GOLDEN)
def test_published_layers_can_be_decoded(solution, data_dir, device, case):
    layer, x, positions, out = golden(solution, data_dir, device, case)
    cache = cache_for(2, 7, GOLDEN_SIZES, F32, device)
    parts = [(0, 4, "naive"), (4, 5, "absorbed"), (5, 7, "absorbed")]
    found = [run(layer, x[:, a:b], cache=cache, positions=positions[:, a:b], mode=mode) for a, b, mode in parts]
    assert_close(torch.cat(found, 1), out, **SINGLE, because=f"{case}: four tokens, then one, then two")


@task("MLA")
@MODES
def test_the_scale_of_the_softmax_can_be_given(solution, randn, device, mode):
    layer, weights = build(solution, randn, device, softmax_scale=0.7)
    x = randn(2, 6, D, dtype=F64)
    expected = layer_oracle(weights, x, SIZES, scale=0.7)
    assert_close(run(layer, x, mode=mode), expected, **EXACT, because="YaRN's scale is passed in")


@task("MLA")
@QUERIES
def test_eps_goes_to_every_norm(solution, randn, device, rq):
    layer, weights = build(solution, randn, device, rq, eps=0.3)
    x = randn(2, 6, D, dtype=F64)
    expected = layer_oracle(weights, x, SIZES, eps=0.3)
    assert_close(run(layer, x, mode="naive"), expected, **EXACT, because="eps = 0.3 shows where it is used")


@task("MLA")
def test_eps_is_small_by_default(solution, randn, device):
    layer, weights = build(solution, randn, device, 8)
    x = randn(2, 6, D, dtype=F64) * 1e-3
    expected = layer_oracle(weights, x, SIZES)
    assert_close(run(layer, x), expected, rtol=1e-9, atol=1e-10, because="inputs of 0.001 feel an eps of 1e-6")


@task("MLA")
@MODES
def test_the_base_of_the_frequencies_counts(solution, randn, device, mode):
    layer, weights = build(solution, randn, device, base=50.0)
    x = randn(2, 6, D, dtype=F64)
    expected = layer_oracle(weights, x, SIZES, base=50.0)
    assert_close(run(layer, x, mode=mode), expected, **EXACT, because="frequencies 50^(-2i/dr)")


@task("MLA")
@MODES
def test_given_frequencies_replace_the_base(solution, randn, device, mode):
    inv_freq = torch.tensor([0.7, 0.11], dtype=F64, device=device)
    layer, weights = build(solution, randn, device, base=50.0, inv_freq=inv_freq)
    x = randn(2, 6, D, dtype=F64)
    expected = layer_oracle(weights, x, SIZES, inv_freq=inv_freq)
    assert_close(run(layer, x, mode=mode), expected, **EXACT, because="inv_freq as given")


@task("MLA")
@MODES
def test_cosines_and_sines_can_be_scaled(solution, randn, device, mode):
    layer, weights = build(solution, randn, device, rope_scale=1.3)
    x = randn(2, 6, D, dtype=F64)
    expected = layer_oracle(weights, x, SIZES, rope_scale=1.3)
    assert_close(run(layer, x, mode=mode), expected, **EXACT, because="both rotary parts are 1.3 times longer")


@task("MLA")
@pytest.mark.parametrize("rows", ["shared", "own"])
@MODES
def test_positions_are_taken_as_they_are(solution, randn, device, rows, mode):
    layer, weights = build(solution, randn, device)
    x = randn(2, 6, D, dtype=F64)
    positions = torch.tensor([[3, 4, 9, 10, 50, 51], [0, 7, 8, 9, 10, 99]], device=device)
    positions = positions[0] if rows == "shared" else positions
    expected = layer_oracle(weights, x, SIZES, positions=positions)
    found = run(layer, x, positions=positions, mode=mode)
    assert_close(found, expected, **EXACT, because="gaps are gaps, and a row may have positions of its own")


@task("MLA")
@MODES
def test_only_distances_count(solution, randn, device, mode):
    layer, weights = build(solution, randn, device, 8)
    x = randn(2, 6, D, dtype=F64)
    expected = layer_oracle(weights, x, SIZES)
    found = run(layer, x, positions=torch.arange(5000, 5006, device=device), mode=mode)
    assert_close(found, expected, rtol=1e-9, atol=1e-9, because="all positions 5000 later: the same outputs")


@task("MLA")
def test_angles_survive_a_cast_of_the_layer(solution, randn, device):
    inv_freq = torch.tensor([0.7123456789, 0.0123456789], dtype=F64, device=device)
    layer, weights = build(solution, randn, device, inv_freq=inv_freq)
    layer = filled(layer.bfloat16().double(), weights)
    x, positions = randn(2, 6, D, dtype=F64), torch.arange(900, 906, device=device)
    expected = layer_oracle(weights, x, SIZES, positions=positions, inv_freq=inv_freq)
    found = run(layer, x, positions=positions)
    assert_close(found, expected, rtol=1e-5, atol=1e-5, because="the weights went through bfloat16, inv_freq did not")


@task("MLA")
def test_angles_of_half_layers_are_exact(solution, randn, device):
    inv_freq = torch.tensor([0.7123456789, 0.0123456789], dtype=F64, device=device)
    layer, weights = build(solution, randn, device, dtype=torch.bfloat16, inv_freq=inv_freq)
    x, positions = randn(2, 6, D, dtype=torch.bfloat16), torch.tensor([1, 700, 1501, 2602, 3703, 4805], device=device)
    expected = layer_oracle(weights, x, SIZES, positions=positions, inv_freq=inv_freq).bfloat16()
    found = run(layer, x, positions=positions)
    assert_close(found, expected, rtol=2e-2, atol=6e-2, because="positions of thousands need angles in float32")


@task("MLA")
@MODES
def test_no_token_reads_the_future(solution, randn, device, mode):
    layer, _ = build(solution, randn, device)
    x = randn(2, 6, D, dtype=F64).requires_grad_()
    out = layer(x, mode=mode)
    (leak,) = torch.autograd.grad(out[:, :3].sum(), x)
    assert_equal(
        leak[:, 3:], torch.zeros_like(leak[:, 3:]), because="what comes later sends nothing back: exactly zero"
    )


@task("MLA")
@QUERIES
@MODES
def test_every_parameter_has_the_right_gradient(solution, randn, device, rq, mode):
    layer, weights = build(solution, randn, device, rq)
    x, pull = randn(2, 6, D, dtype=F64), randn(2, 6, D, dtype=F64)
    leaves = {name: value.clone().requires_grad_() for name, value in weights.items()}
    want = torch.autograd.grad((layer_oracle(leaves, x, SIZES) * pull).sum(), list(leaves.values()))
    out = layer(x, mode=mode)
    parameters = dict(layer.named_parameters())
    got = torch.autograd.grad((out * pull).sum(), [parameters[name] for name in leaves], allow_unused=True)
    for name, one, two in zip(leaves, got, want, strict=True):
        one = torch.zeros_like(two) if one is None else one
        assert_close(one, two, rtol=1e-9, atol=1e-9, because=f"the gradient of {name}, the same in both modes")


@task("MLA")
@MODES
def test_the_gradient_at_x_agrees_with_finite_differences(solution, randn, device, mode):
    sizes = {"n_heads": 2, "qk_nope_head_dim": 2, "qk_rope_head_dim": 2, "v_head_dim": 1, "kv_lora_rank": 3}
    layer, _ = build(solution, randn, device, sizes=sizes, d=4)
    assert_gradcheck(lambda x: layer(x, mode=mode), [randn(1, 3, 4, dtype=F64)])


def decode(layer, x, parts, modes, cache, **kwargs):
    """Feed x in parts of these lengths; keyword arguments give positions (B, T) or (T,)."""
    out, start = [], 0
    for part, mode in zip(parts, modes, strict=True):
        chosen = {k: v[..., start : start + part] for k, v in kwargs.items()}
        out.append(run(layer, x[:, start : start + part], cache=cache, mode=mode, **chosen))
        start += part
    return torch.cat(out, 1)


PARTS = [(1,) * 8, (5, 3), (1, 4, 1, 2)]


@task("MLA")
@MODES
@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_every_partition_gives_what_one_call_gives(solution, randn, device, parts, mode):
    layer, weights = build(solution, randn, device)
    x = randn(2, 8, D, dtype=F64)
    expected = layer_oracle(weights, x, SIZES)
    found = decode(layer, x, parts, [mode] * len(parts), cache_for(2, device=device))
    assert_close(found, expected, **EXACT, because=f"8 tokens in parts of {parts}, all {mode}")


@task("MLA")
@pytest.mark.parametrize("number", range(2))
def test_modes_can_be_mixed_at_will(solution, randn, device, seed, number):
    rng = random.Random(seed + number)
    layer, weights = build(solution, randn, device, 8)
    x = randn(2, 8, D, dtype=F64)
    expected = layer_oracle(weights, x, SIZES)
    parts = []
    while sum(parts) < 8:
        parts.append(rng.randint(1, 8 - sum(parts)))
    modes = [rng.choice(["naive", "absorbed", "auto"]) for _ in parts]
    found = decode(layer, x, parts, modes, cache_for(2, device=device))
    assert_close(found, expected, **EXACT, because="both modes read and write the same cache")


@task("MLA")
def test_a_half_layer_can_be_decoded(solution, randn, device):
    layer, weights = build(solution, randn, device, dtype=torch.bfloat16)
    x = randn(2, 8, D, dtype=torch.bfloat16)
    expected = layer_oracle(weights, x, SIZES).bfloat16()
    cache = cache_for(2, dtype=torch.bfloat16, device=device)
    found = decode(layer, x, (4, 1, 3), ("naive", "absorbed", "auto"), cache)
    assert_close(found, expected, rtol=2e-2, atol=6e-2, because="a bfloat16 cache, and both modes")


@task("MLA")
@MODES
def test_positions_go_on_where_the_caller_says(solution, randn, device, mode):
    layer, weights = build(solution, randn, device)
    x = randn(2, 8, D, dtype=F64)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7], [20, 21, 30, 31, 32, 90, 91, 92]], device=device)
    expected = layer_oracle(weights, x, SIZES, positions=positions)
    found = decode(layer, x, (3, 4, 1), [mode] * 3, cache_for(2, device=device), positions=positions)
    assert_close(found, expected, **EXACT, because="keys keep the position at which they were stored")


class Noted(LatentCache):
    """A cache that remembers what it was given."""

    def update(self, c, k_rope):
        self.given = [*getattr(self, "given", []), (c.detach().clone(), k_rope.detach().clone())]
        return super().update(c, k_rope)


@task("MLA")
@MODES
def test_what_is_stored_is_the_normalized_latent_and_the_rotated_key(solution, randn, device, mode):
    layer, weights = build(solution, randn, device, rope_scale=1.3)
    x = randn(2, 5, D, dtype=F64)
    latents, keys = stored_oracle(weights, x, SIZES, rope_scale=1.3)
    cache = Noted(2, 9, 7, 4, dtype=F64, device=device)
    decode(layer, x, (3, 1, 1), [mode] * 3, cache)
    found = [(tuple(c.shape), tuple(k.shape)) for c, k in cache.given]
    assert_equal(
        found,
        [((2, 3, 7), (2, 3, 4)), ((2, 1, 7), (2, 1, 4)), ((2, 1, 7), (2, 1, 4))],
        because="one update per call with the new tokens alone: (B, T, r) and (B, T, dr)",
    )
    assert_close(torch.cat([c for c, _ in cache.given], 1), latents, **EXACT, because="the latent behind its norm")
    assert_close(torch.cat([k for _, k in cache.given], 1), keys, **EXACT, because="one key, rotated at its position")


@task("MLA")
@MODES
def test_a_truncated_cache_takes_other_tokens(solution, randn, device, mode):
    layer, weights = build(solution, randn, device)
    x, guess = randn(2, 8, D, dtype=F64), randn(2, 3, D, dtype=F64)
    expected = layer_oracle(weights, x, SIZES)
    cache = cache_for(2, device=device)
    first = run(layer, x[:, :4], cache=cache, mode=mode)
    run(layer, guess, cache=cache, mode=mode)
    cache.truncate(4)
    rest = decode(layer, x[:, 4:], (1, 3), [mode] * 2, cache)
    assert_close(torch.cat([first, rest], 1), expected, **EXACT, because="three guesses were wrong, and are forgotten")


@task("MLA")
def test_a_second_sequence_knows_nothing_of_the_first(solution, randn, device):
    layer, weights = build(solution, randn, device)
    x = randn(2, 4, D, dtype=F64)
    expected = layer_oracle(weights, x, SIZES)
    cache = cache_for(2, device=device)
    run(layer, randn(2, 6, D, dtype=F64), cache=cache)
    cache.reset()
    assert_close(run(layer, x, cache=cache), expected, **EXACT, because="the cache was reset")


@task("MLA")
def test_a_call_without_a_cache_remembers_nothing(solution, randn, device):
    layer, weights = build(solution, randn, device)
    x = randn(2, 4, D, dtype=F64)
    expected = layer_oracle(weights, x, SIZES)
    cache = cache_for(2, device=device)
    run(layer, randn(2, 6, D, dtype=F64), cache=cache)
    assert_close(run(layer, x), expected, **EXACT, because="what another call stored is in its cache, not in the layer")


@task("MLA")
@MODES
@pytest.mark.parametrize("shape", [(6,), (6, 6), (2, 1, 1, 6), (2, 1, 6, 6)], ids=str)
def test_a_mask_hides_keys_besides_the_future(solution, randn, device, shape, mode):
    layer, weights = build(solution, randn, device)
    x = randn(2, 6, D, dtype=F64)
    mask = randn(*shape) > -0.6
    visible = mask.reshape(*[1] * (4 - len(shape)), *shape)[:, 0].expand(2, 6, 6)
    expected = layer_oracle(weights, x, SIZES, visible=visible)
    assert_close(run(layer, x, mask=mask, mode=mode), expected, **EXACT, because="hidden by the mask, or in the future")


@task("MLA")
@MODES
def test_a_mask_of_one_head_leaves_the_others(solution, randn, device, mode):
    layer, weights = build(solution, randn, device)
    x = randn(2, 6, D, dtype=F64)
    mask = torch.ones(1, 3, 1, 6, dtype=torch.bool, device=device)
    mask[0, 1, 0, 2] = False
    plain, hidden = (
        layer_oracle(weights | {"o_proj.weight": o}, x, SIZES, visible=v)
        for o, v in [
            (weights["o_proj.weight"] * (torch.arange(27, device=device) // 9 != 1), None),
            (weights["o_proj.weight"] * (torch.arange(27, device=device) // 9 == 1), mask[:, 1].expand(2, 6, 6)),
        ]
    )
    found = run(layer, x, mask=mask, mode=mode)
    assert_close(found, plain + hidden, **EXACT, because="(1, H, 1, S) hides a key from one head")


@task("MLA")
@MODES
def test_a_mask_cannot_open_the_future(solution, randn, device, mode):
    layer, weights = build(solution, randn, device)
    x = randn(2, 6, D, dtype=F64)
    expected = layer_oracle(weights, x, SIZES)
    mask = torch.ones(6, 6, dtype=torch.bool, device=device)
    assert_close(run(layer, x, mask=mask, mode=mode), expected, **EXACT, because="all True is the same as None")


@task("MLA")
@MODES
def test_masks_span_the_cache(solution, randn, device, mode):
    layer, weights = build(solution, randn, device)
    x = randn(2, 8, D, dtype=F64)
    keys = randn(2, 8) > -0.6
    expected = layer_oracle(weights, x, SIZES, visible=keys[:, None].expand(2, 8, 8))
    cache, found = cache_for(2, device=device), []
    for a, b in [(0, 3), (3, 7), (7, 8)]:
        found.append(run(layer, x[:, a:b], cache=cache, mask=keys[:, None, None, :b], mode=mode))
    assert_close(torch.cat(found, 1), expected, **EXACT, because="S counts the cached keys, too")


@task("MLA")
@MODES
def test_a_token_that_sees_nothing_gives_zeros(solution, randn, device, mode):
    layer, _ = build(solution, randn, device)
    x = randn(2, 6, D, dtype=F64).requires_grad_()
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool, device=device)
    mask[1, :, 4] = False
    out = layer(x, mask=mask, mode=mode)
    assert_close(out[1, 4], torch.zeros_like(out[1, 4]), because="nothing allowed: zeros, never NaN")
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert_that(grad.isfinite().all(), "and finite gradients", value=grad)


@task("MLA")
@MODES
def test_rows_padded_on_the_right_go_on_by_themselves(solution, randn, device, mode):
    layer, weights = build(solution, randn, device)
    lengths, rows = [3, 5], [randn(1, n + 2, D, dtype=F64) for n in (3, 5)]
    expected = [layer_oracle(weights, row, SIZES)[0] for row in rows]
    cache = cache_for(2, device=device)
    prompt = randn(2, 5, D, dtype=F64)  # padding is anything
    for b, n in enumerate(lengths):
        prompt[b, :n] = rows[b][0, :n]
    n = torch.tensor(lengths, device=device)[:, None]
    real = torch.arange(5, device=device) < n
    first = run(
        layer, prompt, cache=cache, mask=real[:, None, None], positions=torch.arange(5, device=device), mode=mode
    )
    found = [[first[b, : lengths[b]]] for b in range(2)]
    for step in range(2):
        real = torch.cat([real, torch.ones(2, 1, dtype=torch.bool, device=device)], 1)
        x = torch.stack([rows[b][0, lengths[b] + step] for b in range(2)])[:, None]
        out = run(layer, x, cache=cache, mask=real[:, None, None], positions=n + step, mode=mode)
        for b in range(2):
            found[b].append(out[b])
    for b in range(2):
        assert_close(torch.cat(found[b]), expected[b], **EXACT, because=f"row {b} as if it were alone")


@task("MLA")
@MODES
def test_rows_padded_on_the_left_begin_at_zero(solution, randn, device, mode):
    layer, weights = build(solution, randn, device)
    rows = [randn(1, 5, D, dtype=F64), randn(1, 7, D, dtype=F64)]
    expected = [layer_oracle(weights, row, SIZES)[0] for row in rows]
    x = randn(2, 7, D, dtype=F64)
    x[0, 2:], x[1] = rows[0][0], rows[1][0]
    real = torch.ones(2, 7, dtype=torch.bool, device=device)
    real[0, :2] = False
    positions = (real.long().cumsum(-1) - 1).clamp(min=0)
    cache, out = cache_for(2, device=device), []
    for a, b in [(0, 5), (5, 6), (6, 7)]:
        mask = real[:, None, None, :b]
        out.append(run(layer, x[:, a:b], cache=cache, mask=mask, positions=positions[:, a:b], mode=mode))
    out = torch.cat(out, 1)
    assert_close(out[0, 2:], expected[0], **EXACT, because="the padded row as if it were alone")
    assert_close(out[1], expected[1], **EXACT, because="and the full row")


@task("MLA")
@MODES
def test_rows_of_a_batch_do_not_meet(solution, randn, device, mode):
    layer, weights = build(solution, randn, device)
    x = randn(3, 6, D, dtype=F64)
    expected = torch.cat([layer_oracle(weights, x[b : b + 1], SIZES) for b in range(3)])
    found = decode(layer, x, (4, 2), [mode] * 2, cache_for(3, device=device))
    assert_close(found, expected, **EXACT, because="each row alone")


@task("MLA")
def test_a_call_changes_nothing_but_the_cache(solution, randn, device):
    layer, _ = build(solution, randn, device, inv_freq=torch.tensor([0.7, 0.11], dtype=F64, device=device))
    x, positions = randn(2, 3, D, dtype=F64), torch.arange(3, device=device)
    mask = randn(2, 1, 1, 3) > 0
    for mode in ("naive", "absorbed"):
        with unchanged(x, positions, mask, *layer.parameters()), global_rng_untouched():
            run(layer, x, positions=positions, mask=mask, cache=cache_for(2, device=device), mode=mode)


@task("MLA")
def test_inputs_with_other_strides(solution, randn, device):
    layer, weights = build(solution, randn, device)
    x = randn(2, 6, D, dtype=F64)
    expected = layer_oracle(weights, x, SIZES)
    for mode in ("naive", "absorbed"):
        found = run(layer, noncontiguous(x), positions=noncontiguous(torch.arange(6, device=device)), mode=mode)
        assert_close(found, expected, **EXACT, because="every second column of a larger tensor")


def refused(layer, cache, x, mentions, **kwargs):
    """A refusal that leaves the cache as it was."""
    before = cache.length
    with torch.no_grad():
        assert_raises(ValueError, layer, x, cache=cache, mentions=mentions, **kwargs)
    assert_equal(cache.length, before, because="nothing was stored before the call was refused")


@task("MLA")
@pytest.mark.parametrize("mode", ["Naive", "flash"])
def test_an_unknown_mode_is_refused(solution, randn, device, mode):
    layer, _ = build(solution, randn, device)
    refused(layer, cache_for(2, device=device), randn(2, 3, D, dtype=F64), [mode], mode=mode)


@task("MLA")
def test_an_input_of_another_width_is_refused(solution, randn, device):
    layer, _ = build(solution, randn, device)
    refused(layer, cache_for(2, device=device), randn(2, 3, 11, dtype=F64), ["(2, 3, 11)"])


@task("MLA")
@pytest.mark.parametrize("shape", [(4,), (1,), (3, 3), ()], ids=str)
def test_positions_of_another_shape_are_refused(solution, randn, device, shape):
    layer, _ = build(solution, randn, device)
    positions = torch.zeros(shape, dtype=torch.long, device=device)
    refused(
        layer, cache_for(2, device=device), randn(2, 3, D, dtype=F64), [str(shape), "(2, 3, 10)"], positions=positions
    )


@task("MLA")
@pytest.mark.parametrize("shape", [(3,), (4, 5), (1, 2, 3, 5), (2, 2, 3, 3, 5)], ids=str)
def test_a_mask_of_another_shape_is_refused(solution, randn, device, shape):
    layer, _ = build(solution, randn, device)
    cache = cache_for(2, device=device)
    run(layer, randn(2, 2, D, dtype=F64), cache=cache)
    mask = torch.ones(shape, dtype=torch.bool, device=device)
    refused(layer, cache, randn(2, 3, D, dtype=F64), [str(shape), "(2, 3, 3, 5)"], mask=mask)


@task("MLA")
def test_a_mask_wider_than_a_single_key_is_refused(solution, randn, device):
    layer, _ = build(solution, randn, device)
    mask = torch.ones(5, dtype=torch.bool, device=device)
    refused(layer, cache_for(2, device=device), randn(2, 1, D, dtype=F64), ["(5)", "(2, 3, 1, 1)"], mask=mask)


@task("MLA")
def test_a_batch_that_is_not_that_of_the_cache_is_refused(solution, randn, device):
    layer, _ = build(solution, randn, device)
    refused(layer, cache_for(2, device=device), randn(1, 3, D, dtype=F64), [])


WIDE = {"n_heads": 3, "qk_nope_head_dim": 24, "qk_rope_head_dim": 4, "v_head_dim": 20, "kv_lora_rank": 32}


def namespace(rq, sizes, d):
    return SimpleNamespace(d_model=d, q_lora_rank=rq, **sizes)


@task("MLA")
@QUERIES
@MODES
@pytest.mark.parametrize(("B", "s", "t"), [(1, 9, 1), (2, 5, 4)])
def test_a_call_costs_exactly_what_the_formulas_say(solution, randn, device, rq, mode, B, s, t):
    with unmetered(), torch.no_grad():
        layer, _ = build(solution, randn, device, rq, F32)
        cache, x = cache_for(B, dtype=F32, device=device), randn(B, t, D)
        if s:
            layer(randn(B, s, D), cache=cache)
    with torch.no_grad():
        flops = B * flops_of(namespace(rq, SIZES, D), t, s + t, mode)
        assert_cost(layer, x, cache=cache, mode=mode, flops=flops, because=f"{mode}, {t} tokens after {s}")


@task("MLA")
@pytest.mark.parametrize(
    ("s", "t", "cheaper"), [(0, 6, "naive"), (200, 1, "absorbed"), (180, 20, "absorbed"), (130, 70, "naive")]
)
def test_auto_takes_the_cheaper_mode(solution, randn, device, s, t, cheaper):
    with unmetered(), torch.no_grad():
        layer, _ = build(solution, randn, device, dtype=F32, sizes=WIDE)
        cache, x = cache_for(1, 300, WIDE, F32, device), randn(1, t, D)
        if s:
            layer(randn(1, s, D), cache=cache)
        costs = {mode: flops_of(namespace(None, WIDE, D), t, s + t, mode) for mode in ("naive", "absorbed")}
    assert min(costs, key=costs.get) == cheaper
    with torch.no_grad():
        assert_cost(layer, x, cache=cache, flops=costs[cheaper], because=f"{t} tokens after {s}: {costs} FLOPs")


@task("MLA")
@pytest.mark.parametrize(("B", "S"), [(3, 40), (1, 200)])
def test_a_decoding_step_writes_little(solution, randn, device, B, S):
    with unmetered(), torch.no_grad():
        layer, _ = build(solution, randn, device, dtype=F32, sizes=WIDE)
        cache, x = cache_for(B, S, WIDE, F32, device), randn(B, 1, D)
        layer(randn(B, S - 1, D), cache=cache)
    numbers = B * 3 * (32 + S)
    with torch.no_grad():
        assert_cost(
            layer,
            x,
            cache=cache,
            max_new_bytes=12 * numbers * 4,
            no_larger_than=numbers,
            because=f"B*H*(r + S) = {numbers} numbers, a dozen times; the latents alone are {B * S * 32}, all keys and "
            f"values {B * 3 * S * 44}, kv_b_proj {3 * 44 * 32}",
        )


@task("MLA")
@MODES
def test_nothing_waits_for_a_number(solution, randn, device, mode):
    layer, _ = build(solution, randn, device)
    layer.to("meta")  # tensors without numbers: who asks for one gets an error
    cache = cache_for(2, device="meta")
    for t in (3, 1):
        mask = torch.ones(2, 1, 1, cache.length + t, dtype=torch.bool, device="meta")
        out = run(layer, torch.empty(2, t, D, dtype=F64, device="meta"), cache=cache, mask=mask, mode=mode)
        assert_equal(
            (tuple(out.shape), out.device.type), ((2, t, D), "meta"), because="shapes are all that is known here"
        )
        cache.truncate(cache.length - t)
        run(layer, torch.empty(2, t, D, dtype=F64, device="meta"), cache=cache, mode=mode)


@cost_case("MLA")
def mla_cost_case(module, randn):
    layer = module.MLA(D, **WIDE)
    cache = cache_for(2, 101, WIDE, F32)
    with torch.no_grad():
        layer(torch.zeros(2, 100, D), cache=cache)
    x = torch.zeros(2, 1, D)

    def step():
        with torch.no_grad():
            cache.truncate(100)
            return layer(x, cache=cache)

    return step


# deinterleave_rope


def halved_rows(n_heads, fixed, dr):
    """Old row numbers in their new order, head by head."""
    order = []
    for h in range(n_heads):
        first = h * (fixed + dr)
        order += range(first, first + fixed)
        order += range(first + fixed, first + fixed + dr, 2)
        order += range(first + fixed + 1, first + fixed + dr, 2)
    return order


def a_state(randn, rq=8, dtype=F64, prefix=""):
    sizes = SIZES | {"qk_rope_head_dim": 6}
    return sizes, {prefix + name: randn(*shape, dtype=dtype) for name, shape in weight_shapes(rq, sizes).items()}


@task("deinterleave_rope")
@QUERIES
@pytest.mark.parametrize("prefix", ["", "model.layers.7.self_attn."])
def test_rotary_rows_are_sorted_and_others_stay(solution, randn, rq, prefix):
    _, state = a_state(randn, rq, prefix=prefix)
    expected = dict(state)
    q = prefix + ("q_proj.weight" if rq is None else "q_b_proj.weight")
    kv = prefix + "kv_a_proj_with_mqa.weight"
    expected[q] = state[q][halved_rows(3, 5, 6)]
    expected[kv] = state[kv][halved_rows(1, 7, 6)]
    assert_close(solution.deinterleave_rope(state, 3, 5, 6, 7), expected, **EXACT, because="0, 2, 4, then 1, 3, 5")


@task("deinterleave_rope")
@QUERIES
def test_the_other_rotation_gives_the_same_outputs(solution, randn, device, rq):
    sizes, state = a_state(randn, rq)
    x, positions = randn(2, 5, D, dtype=F64), torch.tensor([0, 3, 4, 17, 30], device=device)
    expected = layer_oracle(state, x, sizes, positions=positions)
    found = layer_oracle(solution.deinterleave_rope(state, 3, 5, 6, 7), x, sizes, positions=positions, half=True)
    assert_close(found, expected, **EXACT, because="a kernel that pairs columns i and i + dr/2 reads the new weights")


@task("deinterleave_rope")
def test_tensors_without_rotary_rows_are_handed_on(solution, randn):
    _, state = a_state(randn)
    state["extra.kv_b_proj.weight"] = randn(3, 4)
    state["q_proj.bias"] = randn(3)
    state["xq_proj.weight"] = randn(33, 4)
    found = solution.deinterleave_rope(state, 3, 5, 6, 7)
    assert_equal(sorted(found), sorted(state), because="every name of the state is there")
    touched = ("q_b_proj.weight", "kv_a_proj_with_mqa.weight")
    same = {name: found.get(name) is tensor for name, tensor in state.items() if name not in touched}
    assert_equal(same, dict.fromkeys(same, True), because="the very same tensors, nothing is copied")


@task("deinterleave_rope")
def test_the_given_state_stays_as_it_was(solution, randn):
    _, state = a_state(randn)
    before = {name: (tensor, tensor.clone()) for name, tensor in state.items()}
    found = solution.deinterleave_rope(state, 3, 5, 6, 7)
    assert_equal(list(state), list(before), because="the same names in the same order")
    assert_equal(list(found), list(before), because="and so in the result")
    assert_equal([state[k] is t for k, (t, _) in before.items()], [True] * len(before), because="the same tensors")
    assert_close({k: v.clone() for k, v in state.items()}, {k: v for k, (_, v) in before.items()}, rtol=0, atol=0)


@task("deinterleave_rope")
@pytest.mark.parametrize("dtype_", [F32, torch.bfloat16, torch.int8], ids=str)
def test_rows_of_any_dtype_move(solution, randint, dtype_):
    weight = randint(-100, 100, (33, 4)).to(dtype_)
    expected = weight[halved_rows(3, 5, 6)]
    found = solution.deinterleave_rope({"q_proj.weight": weight}, 3, 5, 6, 7)
    assert_equal(found["q_proj.weight"], expected, because="rows move, numbers do not change")


@task("deinterleave_rope")
def test_both_kinds_of_queries_and_several_layers_at_once(solution, randn):
    state = {f"layers.{i}.{name}.weight": randn(33, 4) for i in range(2) for name in ("q_proj", "q_b_proj")}
    expected = {name: tensor[halved_rows(3, 5, 6)] for name, tensor in state.items()}
    assert_close(solution.deinterleave_rope(state, 3, 5, 6, 7), expected, because="every layer of a model")


@task("deinterleave_rope")
def test_one_head_without_content_rows(solution, randn):
    state = {"q_proj.weight": randn(8, 4), "kv_a_proj_with_mqa.weight": randn(8, 4)}
    expected = {name: tensor[[0, 2, 4, 6, 1, 3, 5, 7]] for name, tensor in state.items()}
    assert_close(solution.deinterleave_rope(state, 1, 0, 8, 0), expected, because="all rows are rotary ones")


@task("deinterleave_rope")
@pytest.mark.parametrize(
    ("name", "rows"), [("q_proj.weight", 32), ("q_b_proj.weight", 34), ("a.kv_a_proj_with_mqa.weight", 12)]
)
def test_a_weight_with_other_rows_is_refused(solution, randn, name, rows):
    wanted = 13 if "kv" in name else 33
    state = {name: randn(rows, 4)}
    assert_raises(
        ValueError, solution.deinterleave_rope, state, 3, 5, 6, 7, mentions=[name, f"({rows}, 4)", str(wanted)]
    )


@task("deinterleave_rope")
def test_an_odd_rotary_width_is_refused(solution, randn):
    assert_raises(ValueError, solution.deinterleave_rope, {"q_proj.weight": randn(24, 4)}, 3, 5, 3, 7)


# latent_flash_decode


def filled_cache(randn, device, B=2, S=11, r=7, dr=4, dtype=F64, room=3):
    cache = LatentCache(B, S + room, r, dr, dtype=dtype, device=device)
    c, k = randn(B, S, r, dtype=dtype), randn(B, S, dr, dtype=dtype)
    cache.update(c, k)
    return cache, c, k


def flash_oracle(q_latent, q_rope, c, k, scale, lengths=None):
    """Row by row, the newest token last."""
    B, _, T, _ = q_latent.shape
    out = torch.zeros_like(q_latent, dtype=F64)
    for b in range(B):
        n = c.shape[1] if lengths is None else int(lengths[b])
        for t in range(T):
            seen = max(0, n - T + t + 1)
            if seen:
                keys = torch.cat([c[b, :seen], k[b, :seen]], -1).double()
                query = torch.cat([q_latent[b, :, t], q_rope[b, :, t]], -1).double()
                out[b, :, t] = torch.softmax(query @ keys.T * scale, -1) @ c[b, :seen].double()
    return out


@task("latent_flash_decode")
@pytest.mark.parametrize("splits", [1, 3, 5, 30])
@pytest.mark.parametrize("T", [1, 3])
def test_pieces_merge_to_the_whole(solution, randn, device, splits, T):
    cache, c, k = filled_cache(randn, device)
    q, q_rope = randn(2, 3, T, 7, dtype=F64), randn(2, 3, T, 4, dtype=F64)
    expected = flash_oracle(q, q_rope, c, k, 0.4)
    found = solution.latent_flash_decode(q, q_rope, cache, splits, scale=0.4)
    assert_close(found, expected, **EXACT, because=f"11 keys in {splits} pieces; the last of {T} queries is the newest")


@task("latent_flash_decode")
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("T", [1, 2])
def test_rows_have_lengths_of_their_own(solution, randn, device, splits, T):
    cache, c, k = filled_cache(randn, device, B=4)
    q, q_rope = randn(4, 3, T, 7, dtype=F64), randn(4, 3, T, 4, dtype=F64)
    lengths = torch.tensor([11, 3, 7, 2], device=device)
    expected = flash_oracle(q, q_rope, c, k, 0.4, lengths)
    found = solution.latent_flash_decode(q, q_rope, cache, splits, scale=0.4, lengths=lengths)
    assert_close(found, expected, **EXACT, because="what lies behind the length of a row is not read")


@task("latent_flash_decode")
@pytest.mark.parametrize("splits", [1, 4])
def test_a_row_without_keys_gives_zeros(solution, randn, device, splits):
    cache, c, k = filled_cache(randn, device)
    q, q_rope = randn(2, 3, 2, 7, dtype=F64), randn(2, 3, 2, 4, dtype=F64)
    lengths = torch.tensor([1, 0], device=device)
    expected = flash_oracle(q, q_rope, c, k, 0.4, lengths)
    found = solution.latent_flash_decode(q, q_rope, cache, splits, scale=0.4, lengths=lengths)
    assert_close(found, expected, **EXACT, because="a query with no key before it gives zeros, never NaN")


@task("latent_flash_decode")
def test_an_empty_cache_gives_zeros(solution, randn, device):
    cache = LatentCache(2, 5, 7, 4, dtype=F64, device=device)
    q, q_rope = randn(2, 3, 1, 7, dtype=F64), randn(2, 3, 1, 4, dtype=F64)
    found = solution.latent_flash_decode(q, q_rope, cache, 2, scale=0.4)
    assert_close(found, torch.zeros(2, 3, 1, 7, dtype=F64), because="nothing to read")


@task("latent_flash_decode")
@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_pieces_of_every_size_of_scores(solution, randn, device, scale):
    cache, c, k = filled_cache(randn, device, dtype=F32)
    ramp = torch.linspace(1, 400, 11, device=device)[:, None]
    cache.reset()
    c, k = c * ramp, k * ramp
    cache.update(c, k)
    q, q_rope = randn(2, 3, 1, 7), randn(2, 3, 1, 4)
    expected = flash_oracle(q, q_rope, c, k, scale).float()
    found = solution.latent_flash_decode(q, q_rope, cache, 5, scale=scale)
    assert_close(found, expected, rtol=1e-3, atol=1e-2, because="scores of thousands, in either direction")


@task("latent_flash_decode")
def test_pieces_keep_the_dtype(solution, randn, device, dtype):
    cache, c, k = filled_cache(randn, device, dtype=dtype)
    q, q_rope = randn(2, 3, 1, 7, dtype=dtype), randn(2, 3, 1, 4, dtype=dtype)
    expected = flash_oracle(q, q_rope, c, k, 0.4).to(dtype)
    found = solution.latent_flash_decode(q, q_rope, cache, 3, scale=0.4)
    assert_close(found, expected, **tolerance(dtype), because="the dtype of the queries")


@task("latent_flash_decode")
@pytest.mark.parametrize("half", HALVES, ids=str)
def test_half_pieces_are_added_in_float32(solution, randn, device, half):
    cache, c, k = filled_cache(randn, device, S=1500, dtype=half)
    cache.reset()
    c, k = (c + 3).to(half), (k * 0.1).to(half)
    cache.update(c, k)
    q, q_rope = (randn(2, 3, 1, 7) * 0.1).to(half), randn(2, 3, 1, 4).to(half)
    expected = flash_oracle(q, q_rope, c, k, 0.4).to(half)
    found = solution.latent_flash_decode(q, q_rope, cache, 50, scale=0.4)
    assert_close(found, expected, rtol=1e-2, atol=1e-2, because="50 pieces of 30 keys: sums in half would stand still")


@task("latent_flash_decode")
def test_the_cache_is_only_read(solution, randn, device):
    cache, c, k = filled_cache(randn, device)
    q, q_rope = randn(2, 3, 1, 7, dtype=F64), randn(2, 3, 1, 4, dtype=F64)
    with unchanged(cache.latents, cache.keys), global_rng_untouched():
        solution.latent_flash_decode(q, q_rope, cache, 3, scale=0.4)
    assert_equal(cache.length, 11, because="its length stays, too")


def flash_case(randn, device, S):
    with unmetered():
        cache, _, _ = filled_cache(randn, device, B=2, S=S, r=16, dr=4, dtype=F32, room=0)
        return randn(2, 3, 1, 16), randn(2, 3, 1, 4), cache


@task("latent_flash_decode")
@pytest.mark.parametrize(("S", "splits"), [(48, 3), (480, 30), (61, 4)])
def test_every_key_is_read_once(solution, randn, device, S, splits):
    q, q_rope, cache = flash_case(randn, device, S)
    flops = 2 * 2 * 3 * S * (16 + 4 + 16)
    assert_cost(
        solution.latent_flash_decode,
        q,
        q_rope,
        cache,
        splits,
        scale=0.4,
        flops=flops,
        because="a score and a share of the mixture for each key",
    )


@task("latent_flash_decode")
@pytest.mark.parametrize("splits", [3, 30])
def test_memory_is_that_of_one_piece(solution, randn, device, splits):
    q, q_rope, cache = flash_case(randn, device, 16 * splits)
    numbers = 2 * 3 * (16 + 16)
    assert_cost(
        solution.latent_flash_decode,
        q,
        q_rope,
        cache,
        splits,
        scale=0.4,
        max_peak_bytes=12 * numbers * 4,
        no_larger_than=numbers,
        because=f"pieces of 16 keys: B*H*T*(r + 16) = {numbers} numbers, however many pieces there are",
    )


@task("latent_flash_decode")
@pytest.mark.parametrize("splits", [0, -2])
def test_no_pieces_are_refused(solution, randn, device, splits):
    cache, _, _ = filled_cache(randn, device)
    q, q_rope = randn(2, 3, 1, 7, dtype=F64), randn(2, 3, 1, 4, dtype=F64)
    assert_raises(ValueError, solution.latent_flash_decode, q, q_rope, cache, splits, scale=0.4, mentions=[str(splits)])


@task("latent_flash_decode")
def test_pieces_wait_for_no_number(solution):
    cache = LatentCache(2, 8, 7, 4, device="meta")
    cache.update(torch.empty(2, 8, 7, device="meta"), torch.empty(2, 8, 4, device="meta"))
    q, q_rope = torch.empty(2, 3, 1, 7, device="meta"), torch.empty(2, 3, 1, 4, device="meta")
    for lengths in (None, torch.empty(2, dtype=torch.long, device="meta")):
        found = solution.latent_flash_decode(q, q_rope, cache, 3, scale=0.4, lengths=lengths)
        assert_equal(
            (tuple(found.shape), found.device.type), ((2, 3, 1, 7), "meta"), because="the lengths are not looked at"
        )


@cost_case("latent_flash_decode")
def latent_flash_decode_cost(module, randn):
    cache, _, _ = filled_cache(randn, "cpu", B=2, S=256, r=16, dr=4, dtype=F32)
    q, q_rope = randn(2, 8, 1, 16).cpu(), randn(2, 8, 1, 4).cpu()
    return lambda: module.latent_flash_decode(q, q_rope, cache, 8, scale=0.4)
