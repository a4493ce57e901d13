"""Day 24: what the tasks promise."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

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
    unchanged,
)
from reference.day22_kv_cache import KVCache
from reference.day23_grouped_query import GroupedQueryAttention

HALF = [torch.float16, torch.bfloat16]


def close(found, expected, because, dtype=None, atol=5e-6):
    """Compare with an oracle in float64, after rounding it to `dtype`."""
    dtype = dtype or found.dtype
    loose = {"atol": atol} if dtype == torch.float32 else {}
    assert_close(found, expected.to(dtype), because=because, **loose)


# mean_pool_heads


def pooled(w, H, G):
    """The mean of the heads of each group, in numpy and float64, one number at a time."""
    w = w.detach().double().cpu().numpy()
    Dh, size = len(w) // H, H // G
    rows = [np.mean([w[(g * size + i) * Dh + d] for i in range(size)], 0) for g in range(G) for d in range(Dh)]
    return torch.from_numpy(np.stack(rows))


@task("mean_pool_heads")
@pytest.mark.parametrize(("H", "G", "Dh", "D"), [(6, 2, 4, 5), (6, 3, 2, 7), (4, 1, 3, 4), (4, 2, 4, 4)])
def test_each_group_becomes_its_mean(solution, randn, dtype, H, G, Dh, D):
    w = randn(H * Dh, D, dtype=dtype)
    expected = pooled(w, H, G)
    close(solution.mean_pool_heads(w, H, G), expected, f"{H} heads of {Dh} rows, {G} groups", dtype)


@task("mean_pool_heads")
def test_a_bias_is_pooled_like_a_weight(solution, randn, dtype):
    w = randn(6 * 4, dtype=dtype)
    expected = pooled(w, 6, 2)
    close(solution.mean_pool_heads(w, 6, 2), expected, "a bias (24,) of 6 heads becomes (8,)", dtype)


@task("mean_pool_heads")
def test_neighbors_are_pooled(solution, device):
    w = torch.tensor([0.0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5], device=device)[:, None]
    expected = torch.tensor([1.0, 1, 4, 4])[:, None]
    found = solution.mean_pool_heads(w, 6, 2)
    assert_close(found, expected, because="head h was filled with h: heads 0, 1, 2 are a group, and 3, 4, 5")


@task("mean_pool_heads")
def test_rows_of_a_head_stay_apart(solution, device):
    w = torch.tensor([10.0, 20, 30, 10, 20, 30], device=device)[:, None]
    found = solution.mean_pool_heads(w, 2, 1)
    assert_close(found, torch.tensor([10.0, 20, 30])[:, None], because="both heads have the rows 10, 20, 30")


@task("mean_pool_heads")
@pytest.mark.parametrize("size", [1, 2, 4])
def test_equal_heads_are_pooled_exactly(solution, randn, size):
    heads = randn(3, 1, 5, 6)
    w = heads.expand(3, size, 5, 6).reshape(-1, 6)
    expected = heads.reshape(-1, 6).cpu().clone()
    assert_equal(solution.mean_pool_heads(w, 3 * size, 3), expected, because=f"{size} equal heads in each of 3 groups")


@task("mean_pool_heads")
def test_half_numbers_are_averaged_in_float32(solution, rand):
    w = (1 + rand(6 * 40, 5)).bfloat16()
    expected = pooled(w, 6, 2).bfloat16()
    found = solution.mean_pool_heads(w, 6, 2)
    assert_close(found, expected, rtol=5e-3, because="bfloat16 stays bfloat16, and is rounded once")
    w = (40000 + 20000 * rand(8 * 3, 2)).half()
    expected = pooled(w, 8, 2).half()
    found = solution.mean_pool_heads(w, 8, 2)
    assert_close(found, expected, rtol=1e-3, because="four numbers of 50,000 have no sum in float16, but a mean")


@task("mean_pool_heads")
def test_each_head_gets_its_share_of_the_gradient(solution, randn):
    w = noncontiguous(randn(12, 3, dtype=torch.float64))
    assert_gradients_close(
        lambda w: solution.mean_pool_heads(w, 6, 2),
        lambda w: torch.einsum("gsdi->gdi", w.reshape(2, 3, 2, 3)).flatten(0, 1) / 3,
        [w],
        because="a mean of three: a third each",
    )


@task("mean_pool_heads")
@pytest.mark.parametrize(
    ("rows", "H", "G", "named"),
    [(12, 6, 4, "6 4"), (12, 2, 4, "2 4"), (12, 6, 0, "6 0"), (12, 6, -2, "6 -2"), (14, 4, 2, "(14,_5) 4")],
)
def test_heads_that_do_not_divide_are_refused(solution, randn, rows, H, G, named):
    mentions = [word.replace("_", " ") for word in named.split()]
    assert_raises(ValueError, solution.mean_pool_heads, randn(rows, 5), H, G, mentions=mentions)


# multi_query_attention


def head_by_head(q, k, v, mask=None, scale=None):
    """The definition in numpy and float64, one head at a time, as a CPU tensor."""
    q, k, v = (x.detach().double().cpu().numpy().copy() for x in (q, k, v))
    B, H, T, D = q.shape
    scale = 1 / math.sqrt(D) if scale is None else scale
    allowed = np.ones((), dtype=bool) if mask is None else mask.cpu().numpy()
    allowed = np.broadcast_to(allowed, (B, H, T, k.shape[1]))
    out = np.zeros((B, H, T, v.shape[2]))
    for b in range(B):
        for h in range(H):
            scores = np.where(allowed[b, h], q[b, h] @ k[b].T * scale, -1e300)
            exponentials = np.exp(scores - scores.max(1, keepdims=True)) * allowed[b, h]
            total = exponentials.sum(1, keepdims=True)
            out[b, h] = exponentials / np.where(total == 0, 1.0, total) @ v[b]
    return torch.from_numpy(out)


def inputs(randn, H=6, B=2, T=5, S=7, D=4, Dv=3, **kwargs):
    """Random q, k and v."""
    return randn(B, H, T, D, **kwargs), randn(B, S, D, **kwargs), randn(B, S, Dv, **kwargs)


def some_mask(rand, *shape):
    """A random mask in which each query may attend to something, and not to everything."""
    mask = rand(*shape) < 0.5
    mask[..., 1] = True
    mask[..., 0] = False
    return mask


@task("multi_query_attention")
@pytest.mark.parametrize(("H", "T", "S"), [(6, 5, 7), (1, 3, 4), (4, 1, 6), (3, 4, 1)])
def test_it_is_attention_with_a_copy_of_the_keys_for_each_head(solution, randn, dtype, H, T, S):
    q, k, v = inputs(randn, H=H, T=T, S=S, dtype=dtype)
    k4, v4 = (x.double().cpu()[:, None].expand(-1, H, -1, -1) for x in (k, v))
    expected = F.scaled_dot_product_attention(q.double().cpu(), k4, v4)
    close(solution.multi_query_attention(q, k, v), expected, f"{H} heads of {T} queries, one head of {S} keys", dtype)


@task("multi_query_attention")
@pytest.mark.parametrize(("D", "Dv"), [(12, 8), (3, 5), (4, 1), (4, 4)])
def test_values_may_have_another_width(solution, randn, dtype, D, Dv):
    q, k, v = inputs(randn, D=D, Dv=Dv, dtype=dtype)
    expected = head_by_head(q, k, v)
    close(solution.multi_query_attention(q, k, v), expected, f"Dh = {D} makes the scores, Dv = {Dv} comes out", dtype)


@task("multi_query_attention")
@pytest.mark.parametrize("scale", [0.3, 0.0, 2.0])
def test_the_scale_can_be_chosen(solution, randn, scale):
    q, k, v = inputs(randn, dtype=torch.float64)
    expected = head_by_head(q, k, v, scale=scale)
    found = solution.multi_query_attention(q, k, v, None, scale)
    close(found, expected, f"scale={scale} takes the place of Dh ** -0.5")


@task("multi_query_attention")
@pytest.mark.parametrize("shape", [(2, 6, 5, 7), (5, 7), (7,), (2, 1, 1, 7), (6, 1, 7), (2, 6, 5, 1)])
def test_masks_broadcast_to_the_scores_of_all_heads(solution, randn, rand, dtype, shape):
    q, k, v = inputs(randn, dtype=dtype)
    mask = some_mask(rand, *shape) if shape[-1] == 7 else rand(*shape) < 0.6
    expected = head_by_head(q, k, v, mask)
    found = solution.multi_query_attention(q, k, v, mask)
    close(found, expected, f"a mask {shape} is stretched to (2, 6, 5, 7)", dtype)


@task("multi_query_attention")
def test_the_mask_of_a_head_stays_with_the_head(solution, randn, device):
    q, k = randn(1, 6, 2, 4), randn(1, 6, 4)
    v = torch.arange(6.0, device=device)[None, :, None]  # place j holds j
    mask = torch.eye(6, dtype=torch.bool, device=device)[None, :, None]  # head h may look at place h only
    expected = torch.arange(6.0)[None, :, None, None].expand(1, 6, 2, 1)
    found = solution.multi_query_attention(q, k, v, mask)
    assert_close(found, expected, because="head h may attend to place h alone, and place h holds h")


@task("multi_query_attention")
def test_the_mask_of_a_query_stays_with_the_query(solution, randn, device):
    q, k = randn(1, 4, 5, 3), randn(1, 5, 3)
    v = torch.arange(5.0, device=device)[None, :, None]
    mask = torch.eye(5, dtype=torch.bool, device=device)  # query i may look at place i only
    expected = torch.arange(5.0)[:, None].expand(1, 4, 5, 1)
    found = solution.multi_query_attention(q, k, v, mask)
    assert_close(found, expected, because="in every head query i may attend to place i alone, and place i holds i")


@task("multi_query_attention")
def test_equal_sizes_hide_no_axis(solution, randn, rand):
    q, k, v = inputs(randn, H=4, B=4, T=4, S=4, D=4, Dv=4, dtype=torch.float64)
    mask = some_mask(rand, 4, 4, 4, 4)
    expected = head_by_head(q, k, v, mask)
    close(solution.multi_query_attention(q, k, v, mask), expected, "all sizes are 4, so no shape shows a mix-up")


@task("multi_query_attention")
def test_a_query_with_nothing_allowed_gets_zeros(solution, randn, rand, dtype):
    q, k, v = inputs(randn, dtype=dtype)
    mask = some_mask(rand, 2, 6, 5, 7)
    mask[0, 1, 2] = mask[1, :, 0] = False
    expected = head_by_head(q, k, v, mask)
    close(solution.multi_query_attention(q, k, v, mask), expected, "a query that may attend to nothing gets 0", dtype)


@task("multi_query_attention")
def test_gradients_are_those_of_copied_keys(solution, randn, rand):
    q, k, v = inputs(randn, dtype=torch.float64)
    mask = some_mask(rand, 6, 5, 7)

    def oracle(q, k, v):
        scores = torch.einsum("bhtd,bsd->bhts", q, k) / 2.0
        return torch.einsum("bhts,bse->bhte", scores.masked_fill(~mask, -math.inf).softmax(-1), v)

    assert_gradients_close(
        lambda q, k, v: solution.multi_query_attention(q, k, v, mask),
        oracle,
        [q, k, v],
        because="the gradient of a key is the sum over all heads",
    )


@task("multi_query_attention")
def test_a_query_with_nothing_allowed_sends_back_zeros(solution, randn, rand):
    q, k, v = (x.requires_grad_() for x in inputs(randn))
    mask = some_mask(rand, 5, 7)
    mask[2] = False
    out = solution.multi_query_attention(q, k, v, mask)
    assert_that(out.requires_grad, "out has a graph: gradients flow")
    grads = torch.autograd.grad(out.sum(), [q, k, v])
    finite = [bool(grad.isfinite().all()) for grad in grads]
    assert_equal(finite, [True] * 3, because="query 2 sees nothing: nothing is NaN")
    assert_equal(grads[0][:, :, 2], torch.zeros(2, 6, 4), because="query 2 sees nothing: its gradient is 0")


@task("multi_query_attention")
@pytest.mark.parametrize("axis", ["B", "T", "S"])
def test_a_size_may_be_zero(solution, randn, axis):
    sizes = {"B": 2, "T": 3, "S": 4, axis: 0}
    q, k, v = inputs(randn, **sizes)
    found = solution.multi_query_attention(q, k, v)
    expected = torch.zeros(sizes["B"], 6, sizes["T"], 3)
    assert_equal(found, expected, because=f"{axis} = 0; without any key there is nothing to mix")


@task("multi_query_attention")
def test_any_strides_are_read(solution, randn, dtype):
    q = randn(2, 5, 6, 4, dtype=dtype).transpose(1, 2)
    k, v = randn(2, 9, 4, dtype=dtype)[:, :7], randn(2, 9, 3, dtype=dtype)[:, :7]
    expected = head_by_head(q, k, v)
    close(solution.multi_query_attention(q, k, v), expected, "q was split off, k and v are 7 of 9 places", dtype)
    q, k, v = noncontiguous(q), noncontiguous(k), noncontiguous(v)
    close(solution.multi_query_attention(q, k, v), expected, "q, k and v have gaps", dtype)


@task("multi_query_attention")
def test_values_may_be_a_part_of_the_keys(solution, randn, dtype):
    q, k = randn(2, 6, 3, 8, dtype=dtype), randn(2, 7, 8, dtype=dtype)
    expected = head_by_head(q, k, k[..., :5])
    close(solution.multi_query_attention(q, k, k[..., :5]), expected, "v is the first 5 of 8 numbers of k", dtype)


@task("multi_query_attention")
@pytest.mark.parametrize("half", HALF)
def test_half_inputs_are_rounded_once(solution, randn, half):
    q, k, v = (x.to(half) for x in inputs(randn, T=16, S=64, D=32, Dv=16))
    expected = head_by_head(q, k, v).to(half)
    eps = torch.finfo(half).eps
    found = solution.multi_query_attention(q, k, v)
    assert_close(found, expected, rtol=1.01 * eps, atol=1e-3 * eps, because="float32 inside, rounded once at the end")


@task("multi_query_attention")
def test_scores_that_half_precision_cannot_tell_apart(solution, device):
    q = torch.full((1, 2, 1, 1), 17.0, dtype=torch.bfloat16, device=device)
    k = torch.tensor([16.0, 16.125], dtype=torch.bfloat16, device=device)[None, :, None]
    v = torch.tensor([0.0, 1.0], dtype=torch.bfloat16, device=device)[None, :, None]
    expected = torch.full((1, 2, 1, 1), 1 / (1 + math.exp(-2.125))).bfloat16()
    found = solution.multi_query_attention(q, k, v, scale=1.0)
    assert_close(found, expected, rtol=5e-3, because="the scores are 272 and 274.125: the second key gets 0.893")


@task("multi_query_attention")
def test_huge_scores_do_not_overflow(solution, randn):
    q, k, v = inputs(randn, dtype=torch.float64)
    expected = head_by_head(q * 100, k * 100, v)
    close(solution.multi_query_attention(q * 100, k * 100, v), expected, "scores of 10,000 are fine")


@task("multi_query_attention")
@pytest.mark.parametrize(
    ("q", "k", "v", "named"),
    [
        ((2, 6, 3, 4), (2, 5, 3), (2, 5, 4), ((2, 6, 3, 4), (2, 5, 3))),
        ((2, 6, 3, 4), (1, 5, 4), (1, 5, 4), ((2, 6, 3, 4), (1, 5, 4))),
        ((1, 6, 3, 4), (2, 5, 4), (2, 5, 4), ((1, 6, 3, 4), (2, 5, 4))),
        ((2, 6, 3, 4), (2, 5, 4), (2, 6, 4), ((2, 5, 4), (2, 6, 4))),
        ((2, 6, 3, 4), (2, 5, 4), (1, 5, 4), ((2, 5, 4), (1, 5, 4))),
    ],
)
def test_shapes_that_do_not_fit_are_refused(solution, randn, q, k, v, named):
    tensors = randn(*q), randn(*k), randn(*v)
    assert_raises(ValueError, solution.multi_query_attention, *tensors, mentions=[str(shape) for shape in named])


@task("multi_query_attention")
@pytest.mark.parametrize("shape", [(30, 7), (5, 6)])
def test_a_mask_that_does_not_broadcast_is_refused(solution, randn, rand, shape):
    q, k, v = inputs(randn)
    mask = rand(*shape) < 0.5
    assert_raises(ValueError, solution.multi_query_attention, q, k, v, mask, mentions=[str(shape), str((2, 6, 5, 7))])


class Batches(TorchDispatchMode):
    """Remember the batch size of each matrix product."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Note products, and run everything."""
        if "mm" in func.__name__:
            tensors = [x for x in args if isinstance(x, torch.Tensor)]
            self.sizes.append(tensors[-1].shape[0] if tensors[-1].dim() == 3 else 1)
        return func(*args, **(kwargs or {}))


@task("multi_query_attention")
@pytest.mark.parametrize("T", [1, 3])
def test_the_products_are_batches_of_b_matrices(solution, randn, T):
    q, k, v = inputs(randn, B=3, H=4, T=T)
    solution.multi_query_attention(q, k, v)
    with Batches() as seen:
        solution.multi_query_attention(q, k, v)
    assert_equal(seen.sizes, [3, 3], because="B = 3 and H = 4: two products, of 3 matrices each")


@task("multi_query_attention")
def test_two_products_and_every_query_meets_every_key(solution, randn):
    q, k, v = inputs(randn, H=8, D=4, Dv=6)
    flops = 2 * 2 * 8 * 5 * 7 * (4 + 6)
    because = "2 B H T S (Dh + Dv) FLOPs in two products"
    assert_cost(solution.multi_query_attention, q, k, v, matmuls=2, flops=flops, because=because)


@task("multi_query_attention")
def test_a_token_reads_the_cache_as_it_lies(solution, randn, rand):
    q, mask = randn(2, 8, 1, 32), some_mask(rand, 2, 1, 1, 90)
    k, v = randn(2, 100, 32)[:, :90], randn(2, 100, 32)[:, :90]
    because = "8 heads read 90 places: no key may be copied"
    assert_cost(solution.multi_query_attention, q, k, v, mask, no_larger_than=2 * 8 * 90, because=because)


@cost_case("multi_query_attention")
def multi_query_attention_cost(module, randn):
    q, k, v = randn(1, 16, 1, 64), randn(1, 600, 64)[:, :512], randn(1, 600, 64)[:, :512]
    return lambda: module.multi_query_attention(q, k, v)


# MultiQueryAttention


def a_state(randn, d_model, H, Dh, dtype=torch.float32):
    """Random weights of a layer, large enough that attention is not flat."""
    rows = {"q_proj": H * Dh, "k_proj": Dh, "v_proj": Dh}
    state = {f"{name}.weight": randn(n, d_model, scale=1.5 * d_model**-0.5) for name, n in rows.items()}
    state["o_proj.weight"] = randn(d_model, H * Dh, scale=(H * Dh) ** -0.5)
    return {name: tensor.to(dtype) for name, tensor in state.items()}


def a_layer(module, state, d_model, H, Dh, **options):
    """A MultiQueryAttention of `module` with the given weights."""
    layer = module.MultiQueryAttention(d_model, H, head_dim=Dh, **options)
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


def whole(state, x, H, *, base=10000.0, layout="interleaved", positions=None, mask=None):
    """The layer on a whole text, in float64 on the CPU: (out, k, v)."""
    state = {name: tensor.detach().double().cpu() for name, tensor in state.items()}
    x = x.detach().double().cpu()
    B, T, _ = x.shape
    q, k, v = (
        (x @ state[f"{name}_proj.weight"].T).reshape(B, T, n, -1).transpose(1, 2)
        for name, n in (("q", H), ("k", 1), ("v", 1))
    )
    positions = torch.arange(T) if positions is None else positions.cpu()
    q, k = turned(q, positions, base, layout), turned(k, positions, base, layout)
    allowed = torch.ones(T, T, dtype=torch.bool).tril()
    if mask is not None:
        allowed = allowed & mask.cpu()
    out = head_by_head(q, k[:, 0], v[:, 0], allowed)
    return out.transpose(1, 2).reshape(B, T, -1) @ state["o_proj.weight"].T, k, v


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


def in_chunks(layer, x, sizes, cache):
    """The outputs of chunks of the given sizes, joined."""
    outs, start = [], 0
    with torch.no_grad():
        for size in sizes:
            outs.append(layer(x[:, start : start + size], cache=cache))
            start += size
    return torch.cat(outs, 1)


@task("MultiQueryAttention")
@pytest.mark.parametrize(("d_model", "H", "Dh"), [(24, 6, None), (24, 6, 8), (7, 2, 10)])
def test_the_state_is_four_weights(solution, d_model, H, Dh):
    layer = solution.MultiQueryAttention(d_model, H, head_dim=Dh)
    width = 4 if Dh is None else Dh
    found = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
    expected = {
        "q_proj.weight": (H * width, d_model),
        "k_proj.weight": (width, d_model),
        "v_proj.weight": (width, d_model),
        "o_proj.weight": (d_model, H * width),
    }
    assert_equal(found, expected, because=f"{H} query heads and one key/value head of width {width}")
    assert_equal((layer.n_heads, layer.n_kv_heads, layer.head_dim), (H, 1, width))


@task("MultiQueryAttention")
@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_it_is_the_layer_of_day_23_with_one_group(solution, randn, device, layout):
    state, x = a_state(randn, 20, 6, 8), randn(2, 5, 20)
    old = GroupedQueryAttention(20, 6, 1, head_dim=8, layout=layout).to(device)
    old.load_state_dict(state)
    expected = old(x).detach().cpu()
    found = a_layer(solution, state, 20, 6, 8, layout=layout)(x)
    assert_close(found, expected, atol=1e-4, because=f"GroupedQueryAttention with n_kv_heads = 1, pairs {layout}")


@task("MultiQueryAttention")
def test_interleaved_and_10000_are_the_defaults(solution, randn):
    state, x = a_state(randn, 20, 4, 8), randn(1, 6, 20)
    positions = torch.tensor([0, 2, 3, 9, 20, 40])
    expected, _, _ = whole(state, x, 4, positions=positions)
    found = a_layer(solution, state, 20, 4, 8)(x, positions=positions.to(x.device))
    close(found, expected, "layout='interleaved' and base=10000", atol=1e-4)


@task("MultiQueryAttention")
def test_the_base_can_be_chosen(solution, randn):
    state, x = a_state(randn, 20, 4, 8), randn(1, 6, 20)
    expected, _, _ = whole(state, x, 4, base=100.0)
    close(a_layer(solution, state, 20, 4, 8, base=100.0)(x), expected, "base=100", atol=1e-4)


@task("MultiQueryAttention")
@pytest.mark.parametrize("rows", [False, True])
def test_given_positions_turn_queries_and_keys(solution, randn, rows):
    state, x = a_state(randn, 20, 4, 8), randn(2, 5, 20)
    positions = torch.tensor([[0, 3, 4, 11, 12], [5, 6, 2, 1, 20]])[slice(None) if rows else 0].to(x.device)
    expected, _, _ = whole(state, x, 4, positions=positions)
    layer = a_layer(solution, state, 20, 4, 8)
    with unchanged(positions, x):
        found = layer(x, positions=positions)
    close(found, expected, f"positions {tuple(positions.shape)} are where the tokens stand", atol=1e-4)


@task("MultiQueryAttention")
@pytest.mark.parametrize("shape", [(2, 4, 5, 5), (4, 1, 5), (2, 1, 1, 5)])
def test_a_mask_forbids_more(solution, randn, rand, shape):
    state, x = a_state(randn, 20, 4, 8), randn(2, 5, 20)
    mask = rand(*shape) < 0.6
    mask[..., 0] = True
    plain, expected = whole(state, x, 4)[0], whole(state, x, 4, mask=mask)[0]
    layer = a_layer(solution, state, 20, 4, 8)
    close(layer(x), plain, "without a mask and without a cache", atol=1e-4)
    with unchanged(mask):
        found = layer(x, mask=mask)
    close(found, expected, f"a mask {shape} hides some of the past", atol=1e-4)


@task("MultiQueryAttention")
def test_a_mask_never_shows_the_future(solution, randn, device):
    state, x = a_state(randn, 20, 4, 8), randn(2, 5, 20)
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool, device=device)
    expected, _, _ = whole(state, x, 4)
    layer = a_layer(solution, state, 20, 4, 8)
    close(layer(x), expected, "without a mask and without a cache", atol=1e-4)
    close(layer(x, mask=mask), expected, "the mask is True everywhere, and the future stays hidden", atol=1e-4)


@task("MultiQueryAttention")
@pytest.mark.parametrize("sizes", [(7,), (1,) * 7, (3, 4), (4, 1, 2)])
def test_any_chunks_give_what_the_whole_gives(solution, randn, sizes):
    state, x = a_state(randn, 20, 6, 8), randn(2, 7, 20)
    expected, _, _ = whole(state, x, 6)
    found = in_chunks(a_layer(solution, state, 20, 6, 8), x, sizes, Spy())
    close(found, expected, f"chunks of {sizes} tokens with a cache", atol=1e-4)


@task("MultiQueryAttention")
def test_the_cache_gets_one_head(solution, randn):
    state, x = a_state(randn, 20, 6, 8), randn(3, 7, 20)
    spy = Spy()
    in_chunks(a_layer(solution, state, 20, 6, 8), x, (4, 1, 2), spy)
    shapes = [((3, 1, n, 8), (3, 1, n, 8)) for n in (4, 1, 2)]
    assert_equal(spy.calls, shapes, because="one key/value head is stored, not 6, and each token once")


@task("MultiQueryAttention")
def test_the_cache_gets_rotated_keys_and_raw_values(solution, randn):
    state, x = a_state(randn, 20, 6, 8), randn(2, 5, 20)
    _, keys, values = whole(state, x, 6)
    spy = Spy()
    in_chunks(a_layer(solution, state, 20, 6, 8), x, (3, 2), spy)
    close(spy.keys, keys, "a key is turned once, before it is stored", atol=1e-4)
    close(spy.values, values, "values are never turned", atol=1e-4)


@task("MultiQueryAttention")
def test_the_cache_of_day_22_serves(solution, randn, device):
    state, x = a_state(randn, 20, 6, 4), randn(2, 7, 20)
    expected, _, _ = whole(state, x, 6)
    cache = KVCache(2, 1, 10, 4, device=device)
    found = in_chunks(a_layer(solution, state, 20, 6, 4), x, (2, 4, 1), cache)
    close(found, expected, "KVCache(2, 1, 10, 4): 2 rows, 1 head, 10 places, width 4", atol=1e-4)


@task("MultiQueryAttention")
def test_a_padded_row_gives_what_it_gives_alone(solution, randn, device):
    state = a_state(randn, 20, 4, 8)
    short, x = randn(1, 3, 20), randn(2, 5, 20)
    x[0, 2:] = short[0]
    alone, other = whole(state, short, 4)[0], whole(state, x[1:], 4)[0]
    positions = torch.tensor([[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]], device=device)
    real = torch.tensor([[False] * 2 + [True] * 3, [True] * 5], device=device)
    out = a_layer(solution, state, 20, 4, 8)(x, mask=real[:, None, None], positions=positions)
    close(out[1:], other, "row 1 has no padding", atol=1e-4)
    close(out[:1, 2:], alone, "row 0 has two places of padding and three tokens", atol=1e-4)
    assert_that(out.isfinite().all(), "what comes out at places of padding is not NaN")


@task("MultiQueryAttention")
def test_gradients_reach_the_input_and_all_weights(solution, randn):
    state, x = a_state(randn, 12, 4, 4, torch.float64), randn(2, 3, 12, dtype=torch.float64)
    layer = a_layer(solution, state, 12, 4, 4)
    old = GroupedQueryAttention(12, 4, 1, head_dim=4).to(x.device, torch.float64)
    old.load_state_dict(state)
    grads = []
    for module in (old, layer):
        ours = x.clone().requires_grad_()
        out = module(ours)
        assert_that(out.requires_grad, "the output has a graph")
        out.square().sum().backward()
        grads.append({"x": ours.grad} | {name: weight.grad for name, weight in module.named_parameters()})
    want, found = grads
    for name, grad in want.items():
        assert_that(found[name] is not None, f"a gradient reaches {name}")
        assert_close(found[name], grad.cpu(), rtol=1e-5, atol=1e-5, because=f"the gradient of {name}")


@task("MultiQueryAttention")
def test_the_output_has_the_dtype_of_the_input(solution, randn):
    state, x = a_state(randn, 20, 4, 8, torch.bfloat16), randn(2, 5, 20, dtype=torch.bfloat16)
    expected, _, _ = whole(state, x, 4)
    found = a_layer(solution, state, 20, 4, 8)(x)
    assert_close(found, expected.bfloat16(), rtol=0.12, atol=0.12, because="a layer in bfloat16")


@task("MultiQueryAttention")
@pytest.mark.parametrize(
    ("arguments", "options", "named"),
    [
        ((22, 4), {}, ["22", "4"]),
        ((20, 4), {"head_dim": 7}, ["7"]),
        ((12, 4), {}, ["3"]),
        ((16, 4), {"layout": "halves"}, ["halves"]),
    ],
)
def test_a_layer_that_cannot_be_is_refused(solution, arguments, options, named):
    assert_raises(ValueError, lambda: solution.MultiQueryAttention(*arguments, **options), mentions=named)


@task("MultiQueryAttention")
def test_one_token_costs_its_projections_and_two_products(solution, randn, device):
    d_model, H, Dh, S = 16, 8, 16, 64
    state = a_state(randn, d_model, H, Dh)
    layer, x = a_layer(solution, state, d_model, H, Dh), randn(1, S, d_model)
    expected, _, _ = whole(state, x[:, :5], H)
    close(layer(x[:, :5]), expected, "without a mask and without a cache", atol=1e-4)
    cache = KVCache(1, 1, 80, Dh, device=device)
    in_chunks(layer, x[:, :-2], (S - 2,), cache)
    with torch.no_grad():
        layer(x[:, -2:-1], cache=cache)
        assert_cost(
            layer,
            x[:, -1:],
            cache=cache,
            flops=2 * d_model * Dh * (2 * H + 2) + 4 * H * S * Dh,
            no_larger_than=H * S,
            because="one token after 63 cached ones: one key/value head is read, and 8 are never made of it",
        )


# convert_checkpoint

METHODS = ["mean", "first", "random"]


def many_heads(randn, H, Dh, D, *, bias=True, dtype=torch.float32, prefix=""):
    """Random weights of a layer with as many key/value heads as query heads, and different sizes of numbers."""
    sizes = {"q_proj": 1.0, "k_proj": 2.0, "v_proj": 0.5}
    state = {f"{name}.weight": randn(H * Dh, D, scale=size) for name, size in sizes.items()}
    if bias:
        state |= {f"{name}.bias": randn(H * Dh, scale=size) for name, size in sizes.items()}
    state["o_proj.weight"] = randn(D, H * Dh)
    return {prefix + name: tensor.to(dtype) for name, tensor in state.items()}


def first_heads(w, H, G):
    """The first head of each group."""
    return torch.cat([head for h, head in enumerate(w.cpu().chunk(H)) if h % (H // G) == 0])


def by_hand(state, H, G, method, generator):
    """A state, converted without anybody's code."""
    converted = {}
    for name, w in state.items():
        if name[0] in "qo":
            converted[name] = w
        elif method == "mean":
            converted[name] = pooled(w, H, G).to(w)
        else:
            first = first_heads(w, H, G).to(w)
            noise = torch.randn(first.shape, generator=generator).to(w)
            converted[name] = first if method == "first" else noise * w.std()
    return converted


@task("convert_checkpoint")
@pytest.mark.parametrize(("H", "G"), [(6, 2), (6, 3), (4, 1), (8, 2)])
def test_means_of_groups_take_the_place_of_keys_and_values(solution, randn, dtype, H, G):
    state = many_heads(randn, H, 4, 10, dtype=dtype)
    found = solution.convert_checkpoint(state, H, G, "mean")
    for name in ("k_proj.weight", "v_proj.weight", "k_proj.bias", "v_proj.bias"):
        close(found[name], pooled(state[name], H, G), f"{name}: {H} heads become {G}", dtype)


@task("convert_checkpoint")
def test_the_mean_is_the_default(solution, randn):
    state = many_heads(randn, 6, 4, 10)
    found = solution.convert_checkpoint(state, 6, 2)
    close(found["k_proj.weight"], pooled(state["k_proj.weight"], 6, 2), "method='mean' when nothing is said")


@task("convert_checkpoint")
@pytest.mark.parametrize(("H", "G"), [(6, 2), (6, 3), (4, 1)])
def test_first_heads_of_groups_are_copied(solution, randn, H, G):
    state = many_heads(randn, H, 4, 10)
    found = solution.convert_checkpoint(state, H, G, method="first")
    for name in ("k_proj.weight", "v_proj.weight", "k_proj.bias", "v_proj.bias"):
        assert_equal(
            found[name], first_heads(state[name], H, G), because=f"{name}: the first head of each of {G} groups"
        )


@task("convert_checkpoint")
@pytest.mark.parametrize("method", METHODS)
def test_everything_else_stays(solution, randn, generator, method):
    state = many_heads(randn, 6, 4, 10)
    state |= {"k_proj_norm.weight": randn(24), "mask.v_proj": randn(24, 2), "ok_proj.weight": randn(24, 3)}
    expected = {name: w.cpu().clone() for name, w in state.items() if not name.startswith(("k_proj.", "v_proj."))}
    names, tensors = list(state), list(state.values())
    found = solution.convert_checkpoint(state, 6, 2, method, generator)
    assert_equal(list(found), names, because="the same names in the same order")
    for name, w in expected.items():
        assert_equal(found[name], w, because=f"{name} is neither of k_proj nor of v_proj")
    same = [a is b for a, b in zip(state.values(), tensors, strict=True)]
    assert_equal(same, [True] * len(tensors), because="the given dict is not changed")
    assert_equal(tuple(found["v_proj.weight"].shape), (8, 10), because="two heads of 4 rows are left of six")


@task("convert_checkpoint")
@pytest.mark.parametrize("method", METHODS)
def test_a_whole_model_is_converted(solution, randn, generator, method):
    layers = [many_heads(randn, 4, 2, 6, prefix=f"model.layers.{i}.self_attn.") for i in range(2)]
    state = {"embed.weight": randn(11, 6), **layers[0], **layers[1], "lm_head.weight": randn(11, 6)}
    expected = {name: tuple(w.shape) for name, w in state.items()}
    for i in range(2):
        for letter in "kv":
            expected[f"model.layers.{i}.self_attn.{letter}_proj.weight"] = (4, 6)
            expected[f"model.layers.{i}.self_attn.{letter}_proj.bias"] = (4,)
    found = solution.convert_checkpoint(state, 4, 2, method, generator)
    assert_equal({name: tuple(w.shape) for name, w in found.items()}, expected, because="two layers, 4 heads become 2")


@task("convert_checkpoint")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64])
def test_dtypes_stay(solution, randn, generator, method, kind):
    state = many_heads(randn, 4, 2, 6, dtype=kind) | {"norm.weight": randn(6)}
    expected = {name: w.dtype for name, w in state.items()}
    found = solution.convert_checkpoint(state, 4, 2, method, generator)
    assert_equal({name: w.dtype for name, w in found.items()}, expected, because=f"a layer in {kind}")


@task("convert_checkpoint")
@pytest.mark.parametrize("method", ["mean", "first"])
def test_heads_that_agree_lose_nothing(solution, randn, device, method):
    state = many_heads(randn, 4, 4, 10, bias=False, dtype=torch.float64)
    for name in ("k_proj.weight", "v_proj.weight"):
        heads = state[name].view(2, 2, 4, 10)
        heads[:, 1] = heads[:, 0]
    x = randn(2, 5, 10, dtype=torch.float64)
    old, new = GroupedQueryAttention(10, 4, 4, head_dim=4), GroupedQueryAttention(10, 4, 2, head_dim=4)
    old.load_state_dict(state)
    expected = old.to(device, torch.float64)(x).detach().cpu()
    new.load_state_dict(solution.convert_checkpoint(state, 4, 2, method))
    assert_close(
        new.to(device, torch.float64)(x),
        expected,
        atol=1e-6,
        rtol=1e-6,
        because="the heads of a group are equal: same outputs",
    )


@task("convert_checkpoint")
@pytest.mark.parametrize("method", ["mean", "first"])
def test_with_a_group_for_each_head_nothing_changes(solution, randn, method):
    state = many_heads(randn, 4, 2, 6)
    expected = state["v_proj.weight"].cpu().clone()
    assert_equal(
        solution.convert_checkpoint(state, 4, 4, method)["v_proj.weight"], expected, because="4 heads become 4"
    )


@task("convert_checkpoint")
def test_random_numbers_come_from_the_generator(solution, randn, seed):
    state = many_heads(randn, 4, 4, 6)
    runs = []
    for start in (seed, seed, seed + 1):
        generator = torch.Generator().manual_seed(start)
        with global_rng_untouched():
            runs.append(solution.convert_checkpoint(state, 4, 2, "random", generator))
    same = [torch.equal(runs[0][name], runs[1][name]) for name in ("k_proj.weight", "v_proj.bias")]
    assert_equal(same, [True, True], because="whether the same seed gives the same numbers, twice")
    differ = not torch.equal(runs[0]["k_proj.weight"], runs[2]["k_proj.weight"])
    assert_that(differ, "another seed gives other numbers")


@task("convert_checkpoint")
def test_random_numbers_are_as_large_as_the_old_ones(solution, randn, generator):
    state = {"k_proj.weight": randn(1600, 60, scale=3.0), "v_proj.weight": randn(1600, 60, scale=0.2) + 1.0}
    found = solution.convert_checkpoint(state, 4, 2, "random", generator)
    k, v = found["k_proj.weight"].double(), found["v_proj.weight"].double()
    sizes = [round(k.std().item() / 3.0, 1), round(v.std().item() / 0.2, 1)]
    assert_equal(sizes, [1.0, 1.0], because="standard deviations, as multiples of those of the old tensors")
    means = [round(k.mean().item() / 3.0, 1) + 0.0, round(v.mean().item() / 0.2, 1) + 0.0]
    assert_equal(means, [0.0, 0.0], because="means, as multiples of those standard deviations")
    alike = round((k / 3.0 * v / 0.2).mean().item(), 1) + 0.0
    assert_equal(alike, 0.0, because="the correlation of the new keys with the new values")
    heads = round((k[:400] * k[400:]).mean().item() / 9.0, 1) + 0.0
    assert_equal(heads, 0.0, because="the correlation of the first new head with the second")
    known = [round((k[:400] * w).mean().item() / 9.0, 1) + 0.0 for w in state["k_proj.weight"].double().chunk(4)]
    assert_equal(known, [0.0] * 4, because="the correlation of a new head with the old ones")


@task("convert_checkpoint")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("G", [4, 0])
def test_groups_of_unequal_size_are_refused(solution, randn, generator, method, G):
    state = many_heads(randn, 6, 4, 10)
    mentions = ["6", str(G)]
    assert_raises(ValueError, solution.convert_checkpoint, state, 6, G, method, generator, mentions=mentions)


@task("convert_checkpoint")
def test_unknown_methods_are_refused(solution, randn):
    state = many_heads(randn, 6, 4, 10)
    assert_raises(ValueError, solution.convert_checkpoint, state, 6, 2, "median", mentions=["median"])


@task("convert_checkpoint")
def test_random_without_a_generator_is_refused(solution, randn):
    state = many_heads(randn, 6, 4, 10)
    with global_rng_untouched():
        assert_raises(ValueError, solution.convert_checkpoint, state, 6, 2, "random", mentions=["generator"])


# conversion_error


class Times(nn.Module):
    """A module that multiplies by a parameter."""

    def __init__(self, factor):
        super().__init__()
        self.factor = nn.Parameter(factor)

    def forward(self, x):
        """Map x to x * factor."""
        return x * self.factor


def times(factor, device, dtype=torch.float64):
    """A module that multiplies by a number, or by one for each column."""
    return Times(torch.tensor(factor, device=device, dtype=dtype))


@task("conversion_error")
@pytest.mark.parametrize(
    ("old", "new", "error"), [(2.0, 2.0, 0.0), (1.0, 3.0, 2.0), (3.0, 1.0, 2 / 3), (4.0, 0.0, 1.0)]
)
def test_errors_are_relative_to_the_old_outputs(solution, randn, device, old, new, error):
    x = randn(2, 3, 4, dtype=torch.float64)
    found = solution.conversion_error(times(old, device), times(new, device), x)
    assert_that(type(found) is float, "the error is a Python float", value=type(found).__name__)
    assert_close(found, error, because=f"outputs {old} x become {new} x")


@task("conversion_error")
def test_one_norm_is_taken_over_all_numbers(solution, device):
    x = torch.tensor([[[1.0, 3.0], [2.0, 4.0]]], device=device)
    old, new = times([10.0, 1.0], device), times([11.0, 3.0], device)
    expected = math.sqrt((1 + 36 + 4 + 64) / (100 + 9 + 400 + 16))
    found = solution.conversion_error(old, new, x)
    assert_close(found, expected, because="differences 1, 6, 2, 8; outputs 10, 3, 20, 4")


@task("conversion_error")
@pytest.mark.parametrize("size", [3e-6, 300.0])
def test_squares_of_half_outputs_do_not_get_lost(solution, rand, size):
    x = (size + size * rand(2, 60, 60)).half()
    device = x.device
    outputs = ((x * 4).double().cpu(), (x * 5).double().cpu())
    expected = ((outputs[1] - outputs[0]).norm() / outputs[0].norm()).item()
    found = solution.conversion_error(times(4.0, device, torch.float16), times(5.0, device, torch.float16), x)
    assert_close(found, expected, rtol=1e-5, because=f"outputs from {4 * size:g} on in float16")


@task("conversion_error")
def test_no_graph_is_built_and_nothing_changes(solution, randn, device):
    old, new, x = times(2.0, device), times(2.5, device), randn(2, 3, dtype=torch.float64).requires_grad_()
    modes = []
    old.register_forward_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    new.register_forward_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    with unchanged(old.factor, new.factor, x), global_rng_untouched():
        solution.conversion_error(old, new, x)
    assert_that(torch.is_grad_enabled(), "gradients are on again afterwards")
    assert_equal(modes, [False, False], because="whether a graph was built, for either module")


def planted(generator, D, H, Dh, noise):
    """Weights whose key/value heads are a shared part plus noise of their own."""
    state = {}
    for letter in "kv":
        shared = torch.randn(1, Dh, D, generator=generator)
        own = torch.randn(H, Dh, D, generator=generator)
        state[f"{letter}_proj.weight"] = ((shared + noise * own) / D**0.5).flatten(0, 1)
    state["q_proj.weight"] = torch.randn(H * Dh, D, generator=generator) / D**0.5
    state["o_proj.weight"] = torch.randn(D, H * Dh, generator=generator) / (H * Dh) ** 0.5
    return state


def grouped(state, D, H, G, Dh, device):
    """A GroupedQueryAttention with these weights."""
    layer = GroupedQueryAttention(D, H, G, head_dim=Dh)
    layer.load_state_dict(state)
    return layer.to(device)


@task("conversion_error")
def test_means_are_better_than_first_heads_and_these_than_random_ones(solution, device, seed):
    D, H, Dh = 48, 8, 12
    errors = []
    for noise in (0.1, 0.3):
        generator = torch.Generator().manual_seed(seed)
        state = planted(generator, D, H, Dh, noise)
        x = torch.randn(4, 12, D, generator=generator).to(device)
        old = grouped(state, D, H, H, Dh, device)
        for method in METHODS:
            new = grouped(by_hand(state, H, 1, method, generator), D, H, 1, Dh, device)
            errors.append(solution.conversion_error(old, new, x))
    mean, first, random, mean3, first3, random3 = errors
    assert_that(0 < mean < first < random, "10 % noise: mean, first, random in this order")
    assert_that(mean3 < first3 < random3, "30 % noise: mean, first, random in this order")
    assert_that(mean < mean3, "more noise, more error")


# uptrain


class Toy(nn.Module):
    """Four layers with the names of attention, one of them deeper inside, and two that only sound like them."""

    def __init__(self, randn):
        super().__init__()
        self.q_proj, self.o_proj, self.inner = nn.Linear(3, 4), nn.Linear(4, 2), nn.Module()
        self.k_proj, self.k_proj_norm, self.inner.v_proj = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(3, 4, bias=False)
        self.to(torch.float64)
        with torch.no_grad():
            for p in self.parameters():
                p.data = randn(*p.shape, dtype=torch.float64)

    def forward(self, x):
        """Map x (..., 3) to (..., 2)."""
        return self.o_proj(torch.tanh(self.q_proj(x) * self.k_proj_norm(self.k_proj(x))) + self.inner.v_proj(x))


KV = ["k_proj.weight", "k_proj.bias", "inner.v_proj.weight"]


def adams_way(student, teacher, batches, steps, lr, names):
    """What Adam makes of the student, by its formulas: (losses, state)."""
    student = copy.deepcopy(student)
    params = {name: p for name, p in student.named_parameters() if name in names}
    means = {name: torch.zeros_like(p) for name, p in params.items()}
    squares = {name: torch.zeros_like(p) for name, p in params.items()}
    losses = []
    for step in range(1, steps + 1):
        x = batches[(step - 1) % len(batches)]
        loss = (student(x) - teacher(x).detach()).pow(2).mean()
        losses.append(loss.item())
        grads = torch.autograd.grad(loss, list(params.values()))
        with torch.no_grad():
            for (name, p), grad in zip(params.items(), grads, strict=True):
                means[name] = 0.9 * means[name] + 0.1 * grad
                squares[name] = 0.999 * squares[name] + 0.001 * grad**2
                root = (squares[name] / (1 - 0.999**step)).sqrt() + 1e-8
                p -= lr * means[name] / (1 - 0.9**step) / root
    return losses, {name: p.detach().cpu().clone() for name, p in student.named_parameters()}


def pair(randn):
    """A student, a teacher and three batches."""
    return Toy(randn), Toy(randn), [randn(2, n, 3, dtype=torch.float64) for n in (4, 5, 4)]


@task("uptrain")
@pytest.mark.parametrize(("steps", "lr"), [(1, 0.1), (3, 0.05), (7, 0.02)])
def test_the_losses_are_those_of_adam(solution, randn, steps, lr):
    student, teacher, batches = pair(randn)
    losses, _ = adams_way(student, teacher, batches, steps, lr, dict(student.named_parameters()))
    found = solution.uptrain(student, teacher, batches, steps, lr)
    assert_equal([type(loss).__name__ for loss in found], ["float"] * steps, because=f"{steps} losses, Python floats")
    expected = torch.tensor(losses, dtype=torch.float64)
    found = torch.tensor(found, dtype=torch.float64)
    assert_close(found, expected, rtol=1e-6, because="the loss before each step; three batches, in turn")


@task("uptrain")
@pytest.mark.parametrize("train", ["all", "kv"])
def test_the_weights_are_those_of_adam(solution, randn, train):
    student, teacher, batches = pair(randn)
    names = KV if train == "kv" else dict(student.named_parameters())
    before = {name: p.detach().cpu().clone() for name, p in student.named_parameters()}
    _, expected = adams_way(student, teacher, batches, 5, 0.05, names)
    solution.uptrain(student, teacher, batches, 5, 0.05, train=train)
    for name, p in student.named_parameters():
        if name not in names:
            assert_equal(p.detach(), before[name], because=f"{name} is neither of k_proj nor of v_proj: bit for bit")
        else:
            assert_close(p.detach(), expected[name], rtol=1e-6, atol=1e-7, because=f"{name} after five steps of Adam")


@task("uptrain")
def test_old_gradients_have_no_influence(solution, randn):
    student, teacher, batches = pair(randn)
    _, expected = adams_way(student, teacher, batches, 2, 0.05, dict(student.named_parameters()))
    for p in student.parameters():
        p.grad = 100.0 * torch.ones_like(p)
    solution.uptrain(student, teacher, batches, 2, 0.05)
    found = student.k_proj.weight.detach()
    because = "gradients from before the training were lying in the student"
    assert_close(found, expected["k_proj.weight"], rtol=1e-6, atol=1e-7, because=because)


@task("uptrain")
@pytest.mark.parametrize("train", ["all", "kv"])
def test_the_teacher_is_only_asked(solution, randn, train):
    student, teacher, batches = pair(randn)
    with unchanged(*teacher.parameters(), *batches), global_rng_untouched():
        solution.uptrain(student, teacher, batches, 3, 0.05, train=train)
    assert_that(all(p.requires_grad for p in student.parameters()), "requires_grad is what it was, in the student")


@task("uptrain")
def test_no_step_changes_nothing(solution, randn):
    student, teacher, batches = pair(randn)
    expected = student.k_proj.weight.detach().cpu().clone()
    assert_equal(solution.uptrain(student, teacher, batches, 0, 0.05), [], because="no step, no loss")
    assert_equal(student.k_proj.weight.detach(), expected, because="no step")


@task("uptrain")
def test_a_student_that_is_perfect_stays(solution, randn):
    teacher = Toy(randn)
    student = copy.deepcopy(teacher)
    expected = teacher.k_proj.weight.detach().cpu().clone()
    found = solution.uptrain(student, teacher, [randn(2, 3, dtype=torch.float64)], 2, 0.1)
    assert_equal(found, [0.0, 0.0], because="the student is a copy of the teacher")
    assert_equal(student.k_proj.weight.detach(), expected, because="there was nothing to learn")


@task("uptrain")
@pytest.mark.parametrize("train", ["k", "ALL"])
def test_other_things_to_train_are_refused(solution, randn, train):
    student, teacher, batches = pair(randn)
    assert_raises(
        ValueError, lambda: solution.uptrain(student, teacher, batches, 1, 0.1, train=train), mentions=[train]
    )


@task("uptrain")
def test_without_a_batch_there_is_nothing_to_learn(solution, randn):
    student, teacher, _ = pair(randn)
    assert_raises(ValueError, solution.uptrain, student, teacher, [], 1, 0.1)


@task("uptrain")
def test_what_was_lost_comes_back_where_the_inputs_are(solution, device):
    D, H, Dh = 24, 4, 8
    generator = torch.Generator().manual_seed(0)
    state = planted(generator, D, H, Dh, 0.6)
    directions = torch.randn(3, D, generator=generator) / 3**0.5
    batches = [
        (torch.randn(8, 8, 3, generator=generator) @ directions + 0.05 * torch.randn(8, 8, D, generator=generator)).to(
            device
        )
        for _ in range(9)
    ]
    teacher = grouped(state, D, H, H, Dh, device)
    student = grouped(by_hand(state, H, 1, "mean", generator), D, H, 1, Dh, device)
    new = batches.pop()

    def error():
        with torch.no_grad():
            return ((student(new) - teacher(new)).norm() / teacher(new).norm()).item()

    before = error()
    solution.uptrain(student, teacher, batches, 100, 0.02)
    assert_that(error() < 0.4 * before, "100 steps on inputs of three directions repair most of it, on new inputs too")


# tp_cache_bytes


@task("tp_cache_bytes")
@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("mha", [16384, 8192, 4096, 2048, 1024, 512]),
        ("gqa", [4096, 2048, 1024, 512, 512, 512]),
        ("mqa", [512] * 6),
        ("mla", [1152] * 6),
    ],
)
def test_each_rank_keeps_what_its_heads_read(solution, kind, expected):
    found = [solution.tp_cache_bytes(kind, 32, 8, 128, 576, world) for world in (1, 2, 4, 8, 16, 32)]
    assert_equal(found, expected, because=f"{kind} with 32 heads of width 128, 8 groups, latent 576, on 1 to 32 ranks")
    assert_equal([type(n).__name__ for n in found], ["int"] * 6, because="bytes are whole")


@task("tp_cache_bytes")
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("gqa", 24, 6, 10, 99, 3), 80),
        (("gqa", 24, 6, 10, 99, 12), 40),
        (("gqa", 12, 1, 10, 99, 4), 40),
        (("gqa", 6, 6, 10, 99, 2), 120),
        (("mha", 6, 4, 10, 99, 3), 80),
        (("mqa", 6, 4, 10, 99, 3), 40),
        (("mla", 6, 4, 10, 99, 3), 198),
    ],
)
def test_other_shapes_are_counted_too(solution, arguments, expected):
    assert_equal(solution.tp_cache_bytes(*arguments), expected, because=f"arguments {arguments}")


@task("tp_cache_bytes")
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("mha", 6, 6, 8, 0, 4), ["6", "4"]),
        (("mqa", 6, 1, 8, 0, 4), ["6", "4"]),
        (("mla", 6, 1, 8, 9, 4), ["6", "4"]),
        (("gqa", 24, 6, 8, 0, 4), ["6", "4"]),
        (("gqa", 24, 4, 8, 0, 6), ["4", "6"]),
        (("mla2", 6, 1, 8, 9, 2), ["mla2"]),
        (("MHA", 6, 1, 8, 9, 2), ["MHA"]),
    ],
)
def test_what_cannot_be_spread_is_refused(solution, arguments, named):
    assert_raises(ValueError, solution.tp_cache_bytes, *arguments, mentions=named)


# optimal_shared_key


def score_error(w_q, w_k, x, shared):
    """The squared change of all scores, in float64, for one number per group."""
    w_q, w_k, x, shared = (t.double().cpu() for t in (w_q, w_k, x, shared))
    G = len(shared)
    queries, delta = x @ w_q.mT, x @ (w_k - shared.repeat_interleave(len(w_k) // G, 0)).mT
    return (queries @ delta.mT).square().reshape(G, -1).sum(1)


def heads(randn, H, Dh, D, N, **kwargs):
    """Queries of very different sizes, keys, and tokens that do not lie around zero."""
    w_q = randn(H, Dh, D, **kwargs) * (1.0 + 3.0 * torch.arange(H, device=randn(1).device)[:, None, None])
    return w_q, randn(H, Dh, D, **kwargs), randn(N, D, **kwargs) + 0.5


@task("optimal_shared_key")
@pytest.mark.parametrize(("H", "G"), [(4, 2), (3, 1), (2, 2)])
def test_it_is_the_solution_of_the_least_squares_problem(solution, randn, H, G):
    Dh, D, N = 2, 3, 5
    w_q, w_k, x = heads(randn, H, Dh, D, N, dtype=torch.float64)
    q, k, tokens = w_q.cpu().numpy(), w_k.cpu().numpy(), x.cpu().numpy()
    expected = []
    for group in np.split(np.arange(H), G):
        rows, wanted = [], []
        for h in group:
            for s in range(N):
                for t in range(N):
                    rows.append(np.outer(q[h] @ tokens[s], tokens[t]).ravel())
                    wanted.append(q[h] @ tokens[s] @ k[h] @ tokens[t])
        expected.append(np.linalg.lstsq(np.array(rows), np.array(wanted), rcond=None)[0].reshape(Dh, D))
    found = solution.optimal_shared_key(w_q, w_k, x, G)
    expected = torch.from_numpy(np.stack(expected))
    assert_close(found, expected, rtol=1e-5, atol=1e-6, because=f"every score is one equation; {H} heads, {G} groups")


@task("optimal_shared_key")
def test_no_other_key_is_better(solution, randn):
    w_q, w_k, x = heads(randn, 6, 4, 8, 20)
    found = solution.optimal_shared_key(w_q, w_k, x, 2)
    assert_equal(tuple(found.shape), (2, 4, 8), because="(G, Dh, D)")
    best = score_error(w_q, w_k, x, found)
    mean = score_error(w_q, w_k, x, w_k.view(2, 3, 4, 8).mean(1))
    assert_that((best < mean).all(), "the error of both groups is smaller than that of the mean")
    for size in (1e-2, 1.0):
        other = score_error(w_q, w_k, x, found + size * randn(2, 4, 8))
        assert_that((best < other).all(), "a random change makes it larger")


@task("optimal_shared_key")
def test_heads_with_equal_queries_want_the_mean(solution, randn):
    w_k, x = randn(4, 3, 6, dtype=torch.float64), randn(9, 6, dtype=torch.float64)
    w_q = randn(1, 3, 6, dtype=torch.float64).expand(4, 3, 6)
    expected = w_k.view(2, 2, 3, 6).mean(1).cpu()
    found = solution.optimal_shared_key(w_q, w_k, x, 2)
    assert_close(found, expected, rtol=1e-6, atol=1e-8, because="all heads ask alike, so all count alike")


@task("optimal_shared_key")
def test_equal_keys_are_kept(solution, randn):
    w_q, w_k, x = heads(randn, 4, 3, 6, 9, dtype=torch.float64)
    w_k = w_k[:1].expand(4, 3, 6)
    found = solution.optimal_shared_key(w_q, w_k, x, 1)
    assert_close(found, w_k[:1].cpu(), rtol=1e-6, atol=1e-8, because="all heads have the same key: no error at all")


@task("optimal_shared_key")
def test_a_few_tokens_are_enough_for_finite_numbers(solution, randn):
    w_q, w_k = randn(2, 6, 8), randn(2, 6, 8)
    x = randn(2, 8)
    found = solution.optimal_shared_key(w_q, w_k, x, 1)
    assert_that(found.isfinite().all(), "two tokens leave most of a 6 x 6 matrix of moments empty")
    best, mean = score_error(w_q, w_k, x, found), score_error(w_q, w_k, x, w_k.mean(0, keepdim=True))
    assert_that((best <= mean * 1.0001 + 1e-6).all(), "the mean is not better")


@task("optimal_shared_key")
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_the_keys_keep_their_dtype(solution, randn, kind):
    w_q, w_k, x = (t.to(kind) for t in heads(randn, 4, 3, 6, 12))
    expected = solution.optimal_shared_key(w_q.double(), w_k.double(), x.double(), 2)
    loose = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[kind]
    found = solution.optimal_shared_key(w_q, w_k, x, 2)
    assert_close(found, expected.cpu().to(kind), rtol=loose, atol=loose, because=f"float64 inside, {kind} outside")


@task("optimal_shared_key")
@pytest.mark.parametrize(
    ("q", "k", "x", "G", "named"),
    [
        ((4, 3, 6), (2, 3, 6), (5, 6), 2, ["(4, 3, 6)", "(2, 3, 6)"]),
        ((4, 3, 6), (4, 3, 6), (5, 7), 2, ["(4, 3, 6)", "(5, 7)"]),
        ((4, 3, 6), (4, 3, 6), (5, 6), 3, ["4", "3"]),
        ((4, 3, 6), (4, 3, 6), (5, 6), 0, ["4", "0"]),
    ],
)
def test_what_does_not_fit_is_refused(solution, randn, q, k, x, G, named):
    tensors = randn(*q), randn(*k), randn(*x)
    assert_raises(ValueError, solution.optimal_shared_key, *tensors, G, mentions=named)
