"""Day 22: what the tasks promise."""

import math

import pytest
import torch
from torch import nn
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
    unmetered,
)
from reference.day20_transformer_block import DecoderLM
from reference.day22_kv_cache import CachedDecoderLM as Refitted

NAMES = ["q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"]


class Shelf:
    """A cache that is obviously right: a buffer with room, and a log of what was put in."""

    def __init__(self, b, h, n, d, device=None, dtype=torch.float64):
        self.keys = torch.zeros(b, h, n, d, dtype=dtype, device=device)
        self.values = torch.zeros(b, h, n, d, dtype=dtype, device=device)
        self.length, self.log = 0, []

    def update(self, k, v):
        self.log.append((tuple(k.shape), tuple(v.shape)))
        end = self.length + k.shape[2]
        self.keys[:, :, self.length : end] = k
        self.values[:, :, self.length : end] = v
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


def partition(randint, n):
    """Sizes of chunks that sum up to n, ones and zeros among them."""
    sizes = []
    while sum(sizes) < n:
        size = int(randint(0, 5, ()))
        sizes.append(min(size, n - sum(sizes)))
    return sizes


def fixed_or_random(sizes, randint, n):
    return partition(randint, n) if sizes == "random" else sizes


def snapshot(cache, k, v):
    """All that a cache holds, by an update without positions."""
    keys, values = cache.update(k[:, :, :0], v[:, :, :0])
    return keys.clone(), values.clone()


# kv_cache_bytes


@task("kv_cache_bytes")
@pytest.mark.parametrize("seq, batch", [(1, 1), (7, 3), (0, 2), (5, 0)])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float64])
def test_bytes_of_real_tensors(solution, seq, batch, kind):
    expected = sum(torch.zeros(batch, 3, seq, 8, dtype=kind).nbytes for _ in range(2 * 5))
    found = solution.kv_cache_bytes(5, 3, 8, seq, batch, kind.itemsize)
    assert_equal(found, expected, because="5 layers, each with keys and values (batch, 3, seq, 8)")


@task("kv_cache_bytes")
def test_two_bytes_per_number_are_the_default(solution):
    assert_equal(solution.kv_cache_bytes(1, 1, 1, 1, 1), 4, because="one key of one number, one value of one number")


@task("kv_cache_bytes")
@pytest.mark.parametrize("width", [1, 5, 16])
def test_bytes_of_values_with_a_width_of_their_own(solution, width):
    expected = 2 * 3 * (torch.zeros(2, 4, 6, 8).nbytes + torch.zeros(2, 4, 6, width).nbytes) // 2
    found = solution.kv_cache_bytes(3, 4, 8, 6, 2, 4, v_head_dim=width)
    assert_equal(found, expected, because=f"keys of width 8, values of width {width}")


@task("kv_cache_bytes")
def test_bytes_of_keys_alone(solution):
    found = [solution.kv_cache_bytes(3, 4, 8, 6, 2, 2, v_head_dim=width) for width in (0, 5)]
    expected = [3 * 4 * 6 * 2 * 2 * (8 + width) for width in (0, 5)]
    assert_equal(found, expected, because="values of width 0: there are none, and 0 is not None; and values of width 5")


@task("kv_cache_bytes")
def test_a_token_of_deepseekmath_7b(solution):
    found = solution.kv_cache_bytes(30, 32, 128, 1, 1)
    assert_equal(found, 491_520, because="30 layers, 32 heads of 128, bfloat16: half a megabyte per token")


# left_pad_positions


def counted(mask):
    """Row by row: the first token is at 0."""
    rows = []
    for row in mask.tolist():
        seen, positions = 0, []
        for real in row:
            positions.append(max(seen, 0) if real else 0)
            seen += int(real)
        rows.append(positions)
    return torch.tensor(rows, dtype=torch.long).reshape(mask.shape)


def left_padded(lengths, t, device):
    return torch.tensor([[i >= t - n for i in range(t)] for n in lengths], dtype=torch.bool, device=device)


@task("left_pad_positions")
def test_two_rows_by_hand(solution, device):
    mask = left_padded([4, 2], 4, device)
    expected = torch.tensor([[0, 1, 2, 3], [0, 0, 0, 1]])
    assert_equal(solution.left_pad_positions(mask), expected, because="the second row begins at the third place")


@task("left_pad_positions")
@pytest.mark.parametrize("t", [1, 3, 9])
def test_rows_of_random_lengths(solution, randint, device, t):
    mask = left_padded(randint(1, t + 1, (5,)).tolist(), t, device)
    expected = counted(mask)
    assert_equal(solution.left_pad_positions(mask), expected, because="each row counts from its own first token")


@task("left_pad_positions")
def test_a_row_without_padding_counts_from_zero(solution, device):
    mask = left_padded([6, 6], 6, device)
    expected = torch.arange(6).expand(2, 6).contiguous()
    assert_equal(solution.left_pad_positions(mask), expected, because="no padding: 0, 1, 2, ...")


@task("left_pad_positions")
def test_padding_stands_at_zero(solution, device):
    mask = left_padded([1, 0], 5, device)
    expected = torch.zeros(2, 5, dtype=torch.long)
    assert_equal(solution.left_pad_positions(mask), expected, because="padding gets 0, never -1")


@task("left_pad_positions")
@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.uint8])
def test_a_mask_of_zeros_and_ones(solution, randint, device, kind):
    mask = left_padded(randint(1, 8, (4,)).tolist(), 7, device)
    expected = counted(mask)
    assert_equal(
        solution.left_pad_positions(mask.to(kind)), expected, because="0 is padding, 1 a token; int64 comes out"
    )


@task("left_pad_positions")
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 1)])
def test_masks_of_few(solution, device, shape):
    mask = torch.ones(shape, dtype=torch.bool, device=device)
    expected = torch.zeros(shape, dtype=torch.long)
    assert_equal(solution.left_pad_positions(mask), expected, because="nothing to count")


# KVCache


def chunk_pair(randn, t, b=3, h=2, d=4, dv=None, dtype=torch.float32):
    return randn(b, h, t, d, dtype=dtype), randn(b, h, t, dv or d, dtype=dtype)


def new_cache(solution, device, b=3, h=2, n=16, d=4, **kwargs):
    return solution.KVCache(b, h, n, d, device=device, **kwargs)


@task("KVCache")
def test_the_first_chunk_comes_back(solution, randn, device):
    k, v = chunk_pair(randn, 5)
    expected = k.clone(), v.clone()
    keys, values = new_cache(solution, device).update(k, v)
    assert_equal(keys, expected[0], because="K is what was stored")
    assert_equal(values, expected[1], because="V is what was stored")


@task("KVCache")
@pytest.mark.parametrize("sizes", [[1] * 9, [4, 1, 4], [0, 3, 0, 6], [9], "random"], ids=str)
def test_chunks_are_joined_in_order(solution, randn, randint, device, sizes):
    sizes = fixed_or_random(sizes, randint, 9)
    k, v = chunk_pair(randn, 9)
    cache, seen = new_cache(solution, device), 0
    for n in sizes:
        keys, values = cache.update(k[:, :, seen : seen + n], v[:, :, seen : seen + n])
        seen += n
        assert_equal(keys, torch.cat([k[:, :, :seen]], 2), because="all keys so far, the oldest first")
        assert_equal(values, torch.cat([v[:, :, :seen]], 2), because="all values so far, the oldest first")


@task("KVCache")
def test_length_counts_positions(solution, randn, device):
    cache, lengths = new_cache(solution, device), []
    lengths.append(cache.length)
    for n in (2, 0, 1, 5):
        cache.update(*chunk_pair(randn, n))
        lengths.append(cache.length)
    assert_equal(lengths, [0, 2, 2, 3, 8], because="length is the number of positions that are valid")


@task("KVCache")
def test_what_is_not_filled_is_not_returned(solution, randn, device):
    cache = new_cache(solution, device, n=12)
    shapes = [tuple(cache.update(*chunk_pair(randn, n))[0].shape) for n in (1, 3, 8)]
    assert_equal(shapes, [(3, 2, 1, 4), (3, 2, 4, 4), (3, 2, 12, 4)], because="L positions of max_len, and no others")


@task("KVCache")
def test_updates_allocate_nothing(solution, randn, device):
    cache = new_cache(solution, device, n=40)
    k, v = chunk_pair(randn, 40)

    def steps():
        for i in range(40):
            cache.update(k[:, :, i : i + 1], v[:, :, i : i + 1])

    assert_cost(steps, max_new_bytes=0, because="40 updates: what is there already stays where it is")


@task("KVCache")
def test_a_large_chunk_allocates_nothing(solution, randn, device):
    cache = new_cache(solution, device)
    assert_cost(cache.update, *chunk_pair(randn, 11), max_new_bytes=0, because="the chunk is written into the buffer")


@task("KVCache")
def test_results_are_views_of_one_buffer(solution, randn, device):
    cache = new_cache(solution, device)
    first, second = cache.update(*chunk_pair(randn, 2)), cache.update(*chunk_pair(randn, 3))
    assert_that(same_storage(first[0], second[0]), "the keys of both updates lie in the same memory", value="keys")
    assert_that(same_storage(first[1], second[1]), "the values of both updates lie in the same memory", value="values")


@task("KVCache")
def test_the_buffers_are_allocated_once_and_at_once(solution, device):
    cache, cost = measure(solution.KVCache, 3, 2, 50, 4, device=device)
    expected = 2 * 3 * 2 * 50 * 4 * 4
    assert_that(
        cost.new_bytes == expected, "the constructor allocates keys and values for max_len", value=cost.new_bytes
    )
    assert_equal(cache.nbytes, expected, because="nbytes is the size of both buffers")


@task("KVCache")
def test_nbytes_does_not_depend_on_what_is_stored(solution, randn, device):
    cache = new_cache(solution, device, n=10, dtype=torch.float64)
    found = [cache.nbytes]
    cache.update(*chunk_pair(randn, 7))
    found.append(cache.nbytes)
    cache.reset()
    found.append(cache.nbytes)
    assert_equal(found, [2 * 3 * 2 * 10 * 4 * 8] * 3, because="the buffers are always there, full or empty")


@task("KVCache")
def test_max_len_is_known(solution, device):
    assert_equal(new_cache(solution, device, n=13).max_len, 13, because="max_len of the constructor")


@task("KVCache")
def test_a_cache_can_be_filled_to_the_last_place(solution, randn, device):
    k, v = chunk_pair(randn, 6)
    cache = new_cache(solution, device, n=6)
    cache.update(k[:, :, :5], v[:, :, :5])
    keys, _ = cache.update(k[:, :, 5:], v[:, :, 5:])
    assert_equal(keys, k, because="six positions fit into max_len 6")


@task("KVCache")
@pytest.mark.parametrize("stored, more", [(6, 1), (4, 3), (0, 9)])
def test_too_many_positions_change_nothing(solution, randn, device, stored, more):
    k, v = chunk_pair(randn, stored)
    cache = new_cache(solution, device, n=6)
    cache.update(k, v)
    because = f"{more} positions after {stored} are more than 6"
    assert_raises(
        ValueError, cache.update, *chunk_pair(randn, more), mentions=[str(stored), str(more), "6"], because=because
    )
    assert_equal(cache.length, stored, because="a refused chunk leaves the length")
    keys, values = snapshot(cache, k, v)
    assert_equal(keys, k, because="a refused chunk leaves the keys")
    assert_equal(values, v, because="a refused chunk leaves the values")


@task("KVCache")
def test_an_update_without_positions(solution, randn, device):
    k, v = chunk_pair(randn, 3)
    cache = new_cache(solution, device)
    empty = cache.update(k[:, :, :0], v[:, :, :0])
    assert_equal([tuple(x.shape) for x in empty], [(3, 2, 0, 4)] * 2, because="nothing is stored yet")
    cache.update(k, v)
    assert_equal(cache.update(k[:, :, :0], v[:, :, :0])[0], k, because="T = 0 returns what is there")


@task("KVCache")
@pytest.mark.parametrize("width", [1, 7, 0])
def test_values_of_another_width(solution, randn, device, width):
    k, v = randn(3, 2, 5, 4), randn(3, 2, 5, width)
    cache = new_cache(solution, device, v_head_dim=width)
    keys, values = cache.update(k, v)
    assert_equal(keys, k, because="keys are 4 wide")
    assert_equal(values, v, because=f"values are {width} wide")
    assert_equal(cache.nbytes, 3 * 2 * 16 * (4 + width) * 4, because="nbytes counts both widths")


@task("KVCache")
def test_values_are_as_wide_as_keys_by_default(solution, randn, device):
    k, v = chunk_pair(randn, 2, d=5)
    assert_equal(new_cache(solution, device, d=5).update(k, v)[1], v, because="v_head_dim=None means head_dim")


@task("KVCache")
@pytest.mark.parametrize("n", [0, 3, 5])
def test_truncated_positions_are_overwritten(solution, randn, device, n):
    (k, v), (k2, v2) = chunk_pair(randn, 5), chunk_pair(randn, 4)
    cache = new_cache(solution, device)
    cache.update(k, v)
    cache.truncate(n)
    assert_equal(cache.length, n, because=f"{n} positions are left")
    keys, values = cache.update(k2, v2)
    assert_equal(keys, torch.cat([k[:, :, :n], k2], 2), because=f"the first {n} keys, then the new ones")
    assert_equal(values, torch.cat([v[:, :, :n], v2], 2), because=f"the first {n} values, then the new ones")


@task("KVCache")
@pytest.mark.parametrize("n", [-1, 6])
def test_no_more_can_be_kept_than_is_there(solution, randn, device, n):
    cache = new_cache(solution, device)
    k, v = chunk_pair(randn, 5)
    cache.update(k, v)
    assert_raises(ValueError, cache.truncate, n, mentions=[str(n), "5"], because=f"truncate({n}) of 5 positions")
    assert_equal(cache.length, 5, because="a refused truncate changes nothing")


@task("KVCache")
def test_reset_forgets_everything(solution, randn, device):
    cache = new_cache(solution, device)
    cache.update(*chunk_pair(randn, 7))
    cache.reset()
    assert_equal(cache.length, 0, because="nothing is valid after reset")
    k, v = chunk_pair(randn, 3)
    keys, values = cache.update(k, v)
    assert_equal(keys, k, because="keys of the first prompt are gone")
    assert_equal(values, v, because="values of the first prompt are gone")


@task("KVCache")
def test_reset_and_truncate_allocate_nothing(solution, randn, device):
    cache = new_cache(solution, device)
    cache.update(*chunk_pair(randn, 7))
    assert_cost(cache.truncate, 3, max_new_bytes=0, because="forgetting is free")
    assert_cost(cache.reset, max_new_bytes=0, because="forgetting is free")


@task("KVCache")
def test_two_caches_share_nothing(solution, randn, device):
    one, two = new_cache(solution, device), new_cache(solution, device)
    k, v = chunk_pair(randn, 4)
    keys, _ = one.update(k, v)
    others = two.update(*chunk_pair(randn, 6))
    assert_equal(one.length, 4, because="the second cache does not move the first")
    assert_equal(keys, k, because="the second cache does not write into the first")
    assert_that(not same_storage(keys, others[0]), "each cache has memory of its own", value="shared memory")


@task("KVCache")
def test_the_chunk_is_copied(solution, randn, device):
    k, v = chunk_pair(randn, 16)
    expected = k.clone(), v.clone()
    keys, values = new_cache(solution, device).update(k, v)
    k.zero_()
    v.zero_()
    assert_equal(keys, expected[0], because="what happens to k later does not reach the cache")
    assert_equal(values, expected[1], because="what happens to v later does not reach the cache")


@task("KVCache")
def test_chunks_are_not_changed(solution, randn, device):
    cache = new_cache(solution, device)
    k, v = chunk_pair(randn, 4)
    with unchanged(k, v):
        cache.update(k, v)
        cache.update(*chunk_pair(randn, 3))
        cache.reset()
        cache.update(*chunk_pair(randn, 5))


@task("KVCache")
def test_strided_chunks(solution, randn, device):
    k, v = (noncontiguous(x) for x in chunk_pair(randn, 5))
    keys, values = new_cache(solution, device).update(k, v)
    assert_equal(keys, k.contiguous(), because="strides of k do not matter")
    assert_equal(values, v.contiguous(), because="strides of v do not matter")


@task("KVCache")
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64])
def test_numbers_are_kept_in_the_dtype_of_the_cache(solution, randn, device, kind):
    k, v = chunk_pair(randn, 5)
    keys, values = new_cache(solution, device, dtype=kind).update(k, v)
    assert_equal(keys, k.to(kind), because=f"a cache of {kind} converts what it stores")
    assert_equal(values, v.to(kind), because=f"a cache of {kind} converts what it stores")


@task("KVCache")
def test_float32_is_the_default(solution, randn, device):
    k, v = chunk_pair(randn, 5, dtype=torch.float64)
    keys, values = new_cache(solution, device).update(k, v)
    assert_equal(keys, k.float(), because="dtype defaults to float32")
    assert_equal(values, v.float(), because="dtype defaults to float32")


@task("KVCache")
def test_the_buffers_live_on_the_given_device(solution):
    cache = solution.KVCache(3, 2, 8, 4, device="meta")
    keys, values = cache.update(torch.empty(3, 2, 5, 4, device="meta"), torch.empty(3, 2, 5, 4, device="meta"))
    assert_equal([str(keys.device), str(values.device)], ["meta", "meta"], because="device='meta' was asked for")


@task("KVCache")
@pytest.mark.parametrize("which", ["k", "v"])
def test_a_graph_is_refused(solution, randn, device, which):
    k, v = chunk_pair(randn, 4)
    cache = new_cache(solution, device)
    cache.update(k, v)
    more = dict(zip("kv", chunk_pair(randn, 3), strict=True))
    more[which].requires_grad_()
    because = f"{which} needs a gradient and grad mode is on: a cache keeps no graph"
    assert_raises(RuntimeError, cache.update, more["k"], more["v"], because=because)
    assert_equal(cache.length, 4, because="a refused chunk leaves the length")
    keys, values = snapshot(cache, k, v)
    assert_equal(keys, k, because="a refused chunk leaves the keys")
    assert_equal(values, v, because="a refused chunk leaves the values")


@task("KVCache")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_grad_mode_everything_is_taken(solution, randn, device, mode):
    k, v = (x.requires_grad_() for x in chunk_pair(randn, 4))
    cache = new_cache(solution, device)
    with mode():
        keys, values = cache.update(k, v)
    assert_that(not keys.requires_grad and not values.requires_grad, "no graph hangs on the buffers", value="a graph")
    assert_equal(keys, k.detach(), because="parameters may be stored when no graph is made")
    with torch.no_grad():
        keys, _ = cache.update(k, v)
    assert_equal(keys, torch.cat([k, k], 2).detach(), because="and the cache goes on to work afterwards")


@task("KVCache")
def test_plain_numbers_may_be_stored_in_grad_mode(solution, randn, device):
    keys, values = new_cache(solution, device).update(*chunk_pair(randn, 4))
    assert_that(not keys.requires_grad and not values.requires_grad, "buffers need no gradient", value="a graph")


@task("KVCache")
@pytest.mark.parametrize("shape", [(1, 2, 1, 4), (3, 1, 1, 4), (3, 2, 1, 1), (2, 3, 5, 4), (3, 2, 5, 5), (3, 2, 4)])
@pytest.mark.parametrize("which", ["k", "v"])
def test_a_chunk_that_does_not_fit(solution, randn, device, which, shape):
    good = randn(3, 2, shape[-2], 4)
    pair = (randn(*shape), good) if which == "k" else (good, randn(*shape))
    cache = new_cache(solution, device)
    k, v = chunk_pair(randn, 2)
    cache.update(k, v)
    because = f"{which} is {shape}, the buffer (3, 2, 16, 4)"
    assert_raises(ValueError, cache.update, *pair, mentions=[str(shape), "(3, 2, 16, 4)"], because=because)
    assert_equal(cache.length, 2, because="a refused chunk leaves the length")
    keys, values = snapshot(cache, k, v)
    assert_equal(keys, k, because="a refused chunk leaves the keys")
    assert_equal(values, v, because="a refused chunk leaves the values")


@task("KVCache")
@pytest.mark.parametrize("tk, tv", [(3, 1), (1, 3), (2, 3), (0, 1)])
def test_a_value_for_each_key(solution, randn, device, tk, tv):
    cache = new_cache(solution, device)
    k, v = randn(3, 2, tk, 4), randn(3, 2, tv, 4)
    mentions = [str((3, 2, tk, 4)), str((3, 2, tv, 4))]
    assert_raises(ValueError, cache.update, k, v, mentions=mentions, because=f"{tk} keys and {tv} values")
    assert_equal(cache.length, 0, because="a refused chunk leaves the length")


@cost_case("KVCache")
def cache_cost(module, randn, device):
    with unmetered():
        k, v = randn(1, 4, 128, 16), randn(1, 4, 128, 16)

    def decode():
        cache = module.KVCache(1, 4, 128, 16, device=device)
        for i in range(128):
            cache.update(k[:, :, i : i + 1], v[:, :, i : i + 1])

    return decode


# CachedAttention


def rotated(x, base):
    """Pairs as complex numbers, turned by position * frequency; x (B, H, T, Dh), positions 0 to T - 1."""
    *_, t, d = x.shape
    frequency = base ** (-torch.arange(0, d, 2, dtype=torch.float64, device=x.device) / d)
    angle = torch.arange(t, dtype=torch.float64, device=x.device)[:, None] * frequency
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


def heads(x, h):
    return x.unflatten(-1, (h, -1)).transpose(1, 2)


def visible(t, window=None):
    """Query i sees j <= i, and with a window only the last `window` of these."""
    distance = torch.arange(t)[:, None] - torch.arange(t)
    return (distance >= 0) & (distance < (t + 1 if window is None else window))


def whole(weights, x, h, base=10000.0, window=None):
    """The layer in float64 by torch's own attention: (output, rotated keys, values)."""
    wq, wk, wv, wo = (weights[name].detach().double() for name in NAMES)
    x = x.double()
    q, k, v = rotated(heads(x @ wq.T, h), base), rotated(heads(x @ wk.T, h), base), heads(x @ wv.T, h)
    out = F.scaled_dot_product_attention(q, k, v, visible(x.shape[1], window).to(x.device))
    return out.transpose(1, 2).flatten(2) @ wo.T, k, v


def layer(solution, randn, device, d=12, h=3, max_len=32, dtype=torch.float64, **kwargs):
    """A CachedAttention with random weights that make mistakes visible."""
    module = solution.CachedAttention(d, h, max_len, **kwargs).to(device, dtype)
    with torch.no_grad():
        for name in NAMES:
            module.get_parameter(name).copy_(randn(d, d, dtype=torch.float64) * 2 / d**0.5)
    return module


@torch.no_grad()
def in_chunks(module, x, sizes, cache, **kwargs):
    """What the module returns for the chunks of x, one after the other, joined."""
    return torch.cat([module(part, cache=cache, **kwargs) for part in x.split(sizes, 1)], 1)


LOOSE = {"rtol": 1e-4, "atol": 1e-4}  # RoPE tables are float32
TIGHT = {"rtol": 1e-9, "atol": 1e-10}


@task("CachedAttention")
def test_the_parameters_are_four_square_weights(solution):
    module = solution.CachedAttention(12, 3, 32)
    found = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    assert_equal(found, {name: (12, 12) for name in NAMES}, because="four weights (D, D), no bias, and no other tensor")


@task("CachedAttention")
@pytest.mark.parametrize("b, t, d, h", [(2, 7, 12, 3), (1, 1, 4, 1), (3, 5, 16, 2)])
def test_without_a_cache_it_is_causal_rotary_attention(solution, randn, device, b, t, d, h):
    module, x = layer(solution, randn, device, d, h), randn(b, t, d, dtype=torch.float64)
    expected, _, _ = whole(module.state_dict(), x, h)
    assert_close(module(x), expected, because="rotate q and k, attend to what is not later", **LOOSE)


@task("CachedAttention")
def test_in_float32(solution, randn, device):
    module, x = layer(solution, randn, device, dtype=torch.float32), randn(2, 7, 12)
    expected, _, _ = whole(module.state_dict(), x, 3)
    assert_close(module(x), expected.float(), because="float32 in, float32 out", rtol=1e-4, atol=1e-4)


@task("CachedAttention")
def test_in_bfloat16(solution, randn, device):
    module, x = layer(solution, randn, device, dtype=torch.bfloat16), (randn(2, 7, 12) * 0.3).bfloat16()
    expected, _, _ = whole(module.state_dict(), x, 3)
    assert_close(module(x), expected.bfloat16(), because="bfloat16 in, bfloat16 out", rtol=1e-1, atol=5e-2)


@task("CachedAttention")
@pytest.mark.parametrize("base", [100.0, 500000.0])
def test_the_base_of_the_rotation(solution, randn, device, base):
    module, x = layer(solution, randn, device, base=base), randn(2, 9, 12, dtype=torch.float64)
    expected, _, _ = whole(module.state_dict(), x, 3, base)
    assert_close(module(x), expected, because=f"frequencies {base:g} ** (-2i / Dh)", **LOOSE)


PARTS = [[9], [1] * 9, [4, 5], [5, 1, 1, 1, 1], [1, 8], [3, 3, 3], [0, 4, 0, 5], "random", "random "]


@task("CachedAttention")
@pytest.mark.parametrize("sizes", PARTS, ids=str)
def test_chunks_give_what_the_whole_gives(solution, randn, randint, device, sizes):
    sizes = partition(randint, 9) if isinstance(sizes, str) else sizes
    module, x = layer(solution, randn, device), randn(2, 9, 12, dtype=torch.float64)
    expected, _, _ = whole(module.state_dict(), x, 3)
    found = in_chunks(module, x, sizes, Shelf(2, 3, 9, 4, device))
    assert_close(found, expected, because="chunks and a cache change nothing", **LOOSE)


@task("CachedAttention")
def test_chunks_agree_with_the_whole_to_the_last_digits(solution, randn, device):
    module, x = layer(solution, randn, device), randn(2, 9, 12, dtype=torch.float64)
    expected = module(x).detach()
    found = in_chunks(module, x, [4, 1, 3, 1], Shelf(2, 3, 9, 4, device))
    assert_close(found, expected, because="the same numbers are computed, only earlier", **TIGHT)


@task("CachedAttention")
def test_a_first_chunk_is_causal(solution, randn, device):
    module, x = layer(solution, randn, device), randn(2, 5, 12, dtype=torch.float64)
    expected, _, _ = whole(module.state_dict(), x, 3)
    found = in_chunks(module, x, [5], Shelf(2, 3, 9, 4, device))
    assert_close(found, expected, because="a prompt on an empty cache", **LOOSE)


@task("CachedAttention")
def test_one_new_token_sees_all_old_ones(solution, randn, device):
    module, x = layer(solution, randn, device), randn(2, 6, 12, dtype=torch.float64)
    expected, _, _ = whole(module.state_dict(), x, 3)
    found = in_chunks(module, x, [5, 1], Shelf(2, 3, 9, 4, device))[:, 5:]
    assert_close(found, expected[:, 5:], because="the token at position 5 attends to 0 ... 5", **LOOSE)


@task("CachedAttention")
def test_several_new_tokens_on_a_warm_cache(solution, randn, device):
    module, x = layer(solution, randn, device), randn(2, 7, 12, dtype=torch.float64)
    expected, _, _ = whole(module.state_dict(), x, 3)
    found = in_chunks(module, x, [4, 3], Shelf(2, 3, 9, 4, device))[:, 4:]
    assert_close(found, expected[:, 4:], because="the tokens at positions 4, 5 and 6 see up to themselves", **LOOSE)


@task("CachedAttention")
def test_a_later_token_of_the_chunk_does_not_leak(solution, randn, device):
    module, x = layer(solution, randn, device), randn(2, 8, 12, dtype=torch.float64)
    other = x.clone()
    other[:, 7] = randn(2, 12, dtype=torch.float64)
    one, two = (in_chunks(module, y, [4, 4], Shelf(2, 3, 9, 4, device))[:, :7] for y in (x, other))
    assert_equal(one, two, because="another last token changes nothing before it, not even the last bit")


@task("CachedAttention")
def test_no_gradient_comes_from_the_future(solution, randn, device):
    module, x = layer(solution, randn, device), randn(2, 6, 12, dtype=torch.float64).requires_grad_()
    (grad,) = torch.autograd.grad(module(x)[:, 2].sum(), x)
    assert_equal(
        grad[:, 3:], torch.zeros(2, 3, 12, dtype=torch.float64), because="token 2 does not know tokens 3, 4, 5"
    )


@task("CachedAttention")
def test_keys_are_stored_rotated_and_values_as_they_are(solution, randn, device):
    module, x = layer(solution, randn, device), randn(2, 7, 12, dtype=torch.float64)
    _, k, v = whole(module.state_dict(), x, 3)
    shelf = Shelf(2, 3, 7, 4, device)
    in_chunks(module, x, [4, 3], shelf)
    assert_close(shelf.keys, k, because="the key of position p is rotated by p, once, and then stored", **LOOSE)
    assert_close(shelf.values, v, because="values have no position", **LOOSE)


@task("CachedAttention")
def test_the_cache_is_updated_once_with_the_new_tokens(solution, randn, device):
    module, x = layer(solution, randn, device), randn(2, 7, 12, dtype=torch.float64)
    shelf = Shelf(2, 3, 7, 4, device)
    in_chunks(module, x, [4, 1, 2], shelf)
    expected = [((2, 3, t, 4), (2, 3, t, 4)) for t in (4, 1, 2)]
    assert_equal(shelf.log, expected, because="one update per call, with k and v (B, H, T, Dh) of the chunk")


@task("CachedAttention")
@pytest.mark.parametrize("window", [1, 3, 7, 20])
def test_a_window(solution, randn, device, window):
    module, x = layer(solution, randn, device), randn(2, 7, 12, dtype=torch.float64)
    expected, _, _ = whole(module.state_dict(), x, 3, window=window)
    assert_close(module(x, window=window), expected, because=f"a token sees {window} tokens, itself included", **LOOSE)


@task("CachedAttention")
@pytest.mark.parametrize("window", [1, 2, 4])
@pytest.mark.parametrize("sizes", [[1] * 9, [4, 5], [2, 1, 6], "random"], ids=str)
def test_a_window_in_chunks(solution, randn, randint, device, sizes, window):
    sizes = fixed_or_random(sizes, randint, 9)
    module, x = layer(solution, randn, device), randn(2, 9, 12, dtype=torch.float64)
    expected, _, _ = whole(module.state_dict(), x, 3, window=window)
    found = in_chunks(module, x, sizes, Shelf(2, 3, 9, 4, device), window=window)
    assert_close(found, expected, because=f"window {window} reaches back over the border of a chunk", **LOOSE)


@task("CachedAttention")
def test_another_prompt_on_an_emptied_cache(solution, randn, device):
    module, x, y = layer(solution, randn, device), *(randn(2, 6, 12, dtype=torch.float64) for _ in range(2))
    expected, _, _ = whole(module.state_dict(), y, 3)
    shelf = Shelf(2, 3, 9, 4, device)
    in_chunks(module, x, [6], shelf)
    shelf.length = 0
    assert_close(
        in_chunks(module, y, [4, 2], shelf), expected, because="positions start at the length of the cache", **LOOSE
    )


@task("CachedAttention")
def test_the_module_remembers_nothing_itself(solution, randn, device):
    module, x = layer(solution, randn, device), randn(2, 6, 12, dtype=torch.float64)
    expected, _, _ = whole(module.state_dict(), x, 3)
    in_chunks(module, x, [3, 3], Shelf(2, 3, 9, 4, device))
    two = in_chunks(module, x, [3, 3], Shelf(2, 3, 9, 4, device))
    assert_close(two, expected, because="a new cache begins at position 0", **LOOSE)
    assert_close(module(x), expected, because="without a cache, positions begin at 0", **LOOSE)


@task("CachedAttention")
def test_a_chunk_without_tokens(solution, randn, device):
    module, x = layer(solution, randn, device), randn(2, 3, 12, dtype=torch.float64)
    shelf = Shelf(2, 3, 9, 4, device)
    found = in_chunks(module, x, [3, 0], shelf)
    assert_equal((tuple(found.shape), shelf.length), ((2, 3, 12), 3), because="no token, no output, nothing stored")


@task("CachedAttention")
def test_rows_of_the_batch_do_not_meet(solution, randn, device):
    module, x = layer(solution, randn, device), randn(3, 6, 12, dtype=torch.float64)
    expected, _, _ = whole(module.state_dict(), x[1:2], 3)
    found = in_chunks(module, x, [4, 2], Shelf(3, 3, 9, 4, device))[1:2]
    assert_close(found, expected, because="row 1 alone gives the same", **LOOSE)


@task("CachedAttention")
def test_x_is_not_changed(solution, randn, device):
    module, x = layer(solution, randn, device), randn(2, 6, 12, dtype=torch.float64)
    with unchanged(x):
        in_chunks(module, x, [4, 2], Shelf(2, 3, 9, 4, device))


@task("CachedAttention")
def test_a_strided_x(solution, randn, device):
    module, x = layer(solution, randn, device), noncontiguous(randn(2, 6, 12, dtype=torch.float64))
    expected, _, _ = whole(module.state_dict(), x, 3)
    found = in_chunks(module, x, [4, 2], Shelf(2, 3, 9, 4, device))
    assert_close(found, expected, because="strides do not matter", **LOOSE)


@task("CachedAttention")
def test_without_a_cache_it_can_be_trained(solution, randn, device):
    module = layer(solution, randn, device)
    state = module.state_dict()
    x = randn(2, 5, 12, dtype=torch.float64)
    assert_gradients_close(module, lambda x: whole(state, x, 3)[0], [x], because="gradients of x", rtol=1e-4, atol=1e-5)
    module(x).square().sum().backward()
    reached = [name for name in NAMES if module.get_parameter(name).grad is not None]
    assert_equal(reached, NAMES, because="a gradient for each of the four weights")


@task("CachedAttention")
@pytest.mark.parametrize("old, new", [(0, 9), (8, 1), (5, 4)])
def test_no_more_than_max_len_tokens(solution, randn, device, old, new):
    module, x = layer(solution, randn, device, max_len=8), randn(2, old + new, 12, dtype=torch.float64)
    shelf = Shelf(2, 3, 20, 4, device)
    in_chunks(module, x[:, :old], [old], shelf)
    because = f"{new} tokens after {old} are more than max_len 8"
    with torch.no_grad():
        assert_raises(ValueError, module, x[:, old:], cache=shelf, mentions=[str(old), str(new), "8"], because=because)
    assert_equal(shelf.length, old, because="nothing of a refused chunk is stored")


@task("CachedAttention")
def test_without_a_cache_max_len_holds_too(solution, randn, device):
    module = layer(solution, randn, device, max_len=8)
    because = "9 tokens are more than max_len 8"
    assert_raises(ValueError, module, randn(1, 9, 12, dtype=torch.float64), mentions=["9", "8"], because=because)


@task("CachedAttention")
@pytest.mark.parametrize("sizes", [[8], [5, 3], [7, 1]], ids=str)
def test_max_len_tokens_fit(solution, randn, device, sizes):
    module, x = layer(solution, randn, device, max_len=8), randn(2, 8, 12, dtype=torch.float64)
    expected, _, _ = whole(module.state_dict(), x, 3)
    found = in_chunks(module, x, sizes, Shelf(2, 3, 8, 4, device))
    assert_close(found, expected, because="8 tokens for max_len 8", **LOOSE)


@task("CachedAttention")
@pytest.mark.parametrize("d, h", [(12, 5), (12, 4), (6, 2)])
def test_heads_that_do_not_fit(solution, d, h):
    because = f"{h} heads of an even width do not make {d}"
    assert_raises(ValueError, solution.CachedAttention, d, h, 8, mentions=[str(d), str(h)], because=because)


@task("CachedAttention")
@pytest.mark.parametrize("old, t", [(0, 5), (6, 1), (20, 1), (6, 3)])
def test_what_a_call_costs(solution, randn, device, old, t):
    module, x = layer(solution, randn, device), randn(2, old + t, 12, dtype=torch.float64)
    shelf = Shelf(2, 3, 32, 4, device)
    in_chunks(module, x[:, :old], [old], shelf)
    flops = 2 * t * (8 * 12 * 12 + 4 * 12 * (old + t))
    with torch.no_grad():
        because = f"{t} tokens are projected, and look at {old + t} keys"
        assert_cost(module, x[:, old:], cache=shelf, flops=flops, because=because)


@task("CachedAttention")
def test_a_step_only_reads_the_old_keys(solution, randn, device):
    module, x = layer(solution, randn, device, 64, 2, 128), randn(1, 101, 64, dtype=torch.float64)
    shelf = Shelf(1, 2, 128, 32, device)
    in_chunks(module, x[:, :100], [100], shelf)
    keys = 2 * 101 * 32 * 8
    with torch.no_grad():
        because = "the cached keys are rotated already: a step needs less than three copies of them"
        assert_cost(module, x[:, 100:], cache=shelf, max_new_bytes=3 * keys, because=because)


@cost_case("CachedAttention")
def attention_cost(module, randn, device):
    with unmetered(), torch.no_grad():
        attention = module.CachedAttention(64, 4, 128).to(device)
        shelf = Shelf(1, 4, 128, 16, device, torch.float32)
        attention(randn(1, 100, 64), cache=shelf)
        x = randn(1, 1, 64)

    def step():
        with torch.no_grad():
            attention(x, cache=shelf)

    return step


# CachedDecoderLM

SAME = {"rtol": 1e-4, "atol": 1e-4}  # RoPE tables are float32


def language_model(randn, device, layers=2, h=2, d=8, vocab=11, max_len=24, dtype=torch.float64, **kwargs):
    """Day 20's model with rotary positions and weights large enough to make mistakes visible."""
    model = DecoderLM(vocab, d, layers, h, 16, max_len, positions="rope", **kwargs).to(device, dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(randn(*parameter.shape, dtype=dtype) * 0.4 + (parameter.dim() == 1))
    return model


@task("CachedDecoderLM")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tie", [True, False])
def test_the_logits_are_those_of_the_model(solution, randn, randint, device, bias, tie):
    model, tokens = language_model(randn, device, bias=bias, tie=tie), randint(0, 11, (3, 7))
    expected = model(tokens).detach()
    found = solution.CachedDecoderLM(model)(tokens)
    assert_close(found, expected, because="without caches it is the model that was given", **SAME)


@task("CachedDecoderLM")
@pytest.mark.parametrize("sizes", [[7], [1] * 7, [4, 3], [2, 1, 4], "random"], ids=str)
def test_tokens_in_chunks(solution, randn, randint, device, sizes):
    sizes = fixed_or_random(sizes, randint, 7)
    model, tokens = language_model(randn, device), randint(0, 11, (3, 7))
    expected = model(tokens).detach()
    refitted = solution.CachedDecoderLM(model)
    caches = [Shelf(3, 2, 7, 4, device) for _ in range(2)]
    with torch.no_grad():
        found = torch.cat([refitted(part, caches=caches) for part in tokens.split(sizes, 1)], 1)
    assert_close(found, expected, because="each chunk goes on where the caches end", **SAME)


@task("CachedDecoderLM")
def test_tokens_on_its_own_caches(solution, randn, randint, device):
    model, tokens = language_model(randn, device), randint(0, 11, (3, 7))
    expected = model(tokens).detach()
    refitted = solution.CachedDecoderLM(model)
    caches = refitted.new_caches(3)
    with torch.no_grad():
        found = torch.cat([refitted(part, caches=caches) for part in tokens.split([4, 1, 2], 1)], 1)
    assert_close(found, expected, because="new_caches gives what forward takes", **SAME)
    assert_equal([cache.length for cache in caches], [7, 7], because="each block has filled a cache of its own")


@task("CachedDecoderLM")
def test_chunks_agree_with_the_whole_in_all_digits(solution, randn, randint, device):
    refitted, tokens = solution.CachedDecoderLM(language_model(randn, device)), randint(0, 11, (3, 7))
    expected, caches = refitted(tokens).detach(), refitted.new_caches(3)
    with torch.no_grad():
        found = torch.cat([refitted(part, caches=caches) for part in tokens.split([4, 1, 2], 1)], 1)
    assert_close(found, expected, because="a float64 model is cached in float64", **TIGHT)


@task("CachedDecoderLM")
def test_the_parameters_are_copies_under_the_same_names(solution, randn, device):
    model = language_model(randn, device)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    refitted = solution.CachedDecoderLM(model)
    found = refitted.state_dict()
    assert_equal(sorted(found), sorted(state), because="the names of DecoderLM")
    for name, value in state.items():
        assert_equal(found[name], value, because=f"{name} is copied")
    with torch.no_grad():
        for parameter in refitted.parameters():
            parameter.zero_()
    for name, value in state.items():
        assert_equal(model.state_dict()[name], value, because=f"{name} of the given model is not shared")


@task("CachedDecoderLM")
def test_the_given_model_works_as_before(solution, randn, randint, device):
    model, tokens = language_model(randn, device), randint(0, 11, (3, 7))
    expected, kinds = model(tokens).detach(), [type(block.attention).__name__ for block in model.blocks]
    solution.CachedDecoderLM(model)
    assert_equal([type(block.attention).__name__ for block in model.blocks], kinds, because="its layers are its own")
    positions = torch.arange(7, device=device)
    assert_close(model(tokens, positions=positions).detach(), expected, because="the given model is left alone", **SAME)


@task("CachedDecoderLM")
@pytest.mark.parametrize("tie", [True, False])
def test_what_was_tied_stays_tied(solution, randn, device, tie):
    refitted = solution.CachedDecoderLM(language_model(randn, device, tie=tie))
    because = "embedding and head are one matrix exactly if they were"
    assert_equal(refitted.head.weight is refitted.embedding.weight, tie, because=because)


@task("CachedDecoderLM")
def test_each_block_keeps_its_base(solution, randn, randint, device):
    model, tokens = language_model(randn, device), randint(0, 11, (3, 7))
    for i, block in enumerate(model.blocks):
        block.attention.base = 100.0 * (i + 1)
    expected = model(tokens).detach()
    assert_close(
        solution.CachedDecoderLM(model)(tokens), expected, because="base 100 in one block, 200 in the other", **SAME
    )


@task("CachedDecoderLM")
def test_no_random_number_is_drawn(solution, randn, device):
    model = language_model(randn, device)
    with global_rng_untouched():
        solution.CachedDecoderLM(model)


@task("CachedDecoderLM")
@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_that_of_the_model(solution, randn, device, training):
    refitted = solution.CachedDecoderLM(language_model(randn, device).train(training))
    modes = {module.training for module in refitted.modules()}
    assert_equal(modes, {training}, because="training or evaluation, as the given model was")


@task("CachedDecoderLM")
def test_learned_positions_are_refused(solution):
    model = DecoderLM(11, 8, 1, 2, 16, 24, positions="learned")
    because = "a table of learned positions is added below the blocks: nothing to rotate"
    assert_raises(ValueError, solution.CachedDecoderLM, model, mentions=["learned"], because=because)


@task("CachedDecoderLM")
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("max_len", [None, 10])
def test_new_caches_have_the_size_of_the_model(solution, randn, device, kind, max_len):
    model = language_model(randn, device, layers=3, dtype=kind)
    caches = solution.CachedDecoderLM(model).new_caches(5, max_len)
    room = 24 if max_len is None else max_len
    expected = [2 * 5 * room * 8 * kind.itemsize] * 3
    assert_equal([cache.nbytes for cache in caches], expected, because=f"one per block, {room} tokens, in {kind}")
    assert_equal([cache.length for cache in caches], [0, 0, 0], because="and empty")


@task("CachedDecoderLM")
def test_new_caches_are_new(solution, randn, randint, device):
    model, tokens = language_model(randn, device), randint(0, 11, (2, 6))
    refitted = solution.CachedDecoderLM(model)
    expected = model(tokens).detach()
    with torch.no_grad():
        refitted(randint(0, 11, (2, 5)), caches=refitted.new_caches(2))
        found = refitted(tokens, caches=refitted.new_caches(2))
    assert_close(found, expected, because="the second prompt does not see the first", **SAME)


@task("CachedDecoderLM")
def test_max_len_is_that_of_the_model(solution, randn, randint, device):
    refitted = solution.CachedDecoderLM(language_model(randn, device, max_len=6))
    assert_equal(refitted.max_len, 6, because="max_len of the given model")
    caches = [Shelf(2, 2, 20, 4, device) for _ in range(2)]
    with torch.no_grad():
        refitted(randint(0, 11, (2, 4)), caches=caches)
        tokens = randint(0, 11, (2, 3))
        assert_raises(ValueError, refitted, tokens, caches=caches, mentions=["3", "4", "6"], because="7 tokens of 6")
    assert_equal([cache.length for cache in caches], [4, 4], because="no cache has moved")


@task("CachedDecoderLM")
def test_a_step_of_the_model_costs_one_token(solution, randn, randint, device):
    refitted = solution.CachedDecoderLM(language_model(randn, device))
    caches = [Shelf(3, 2, 24, 4, device) for _ in range(2)]
    with torch.no_grad():
        refitted(randint(0, 11, (3, 9)), caches=caches)
        block = 8 * 8 * 8 + 4 * 8 * 10 + 4 * 8 * 16
        flops = 3 * (2 * block + 2 * 8 * 11)
        because = "two blocks and the head, for one token that looks at 10 keys"
        assert_cost(refitted, randint(0, 11, (3, 1)), caches=caches, flops=flops, because=because)


@task("CachedDecoderLM")
def test_the_refitted_model_can_be_trained(solution, randn, randint, device):
    model, tokens = language_model(randn, device), randint(0, 11, (3, 7))
    model(tokens).square().sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    refitted = solution.CachedDecoderLM(model)
    refitted(tokens).square().sum().backward()
    for name, parameter in refitted.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert_close(grad, expected[name], because=f"the gradient of {name}", rtol=1e-4, atol=1e-4)


# generate_greedy


class Automaton(nn.Module):
    """A model whose next token is a function of all tokens and their places; it writes down how it is called."""

    VOCAB = 13

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.calls, self.asked, self.grad, self.caches = [], [], [], []

    def new_caches(self, batch, max_len=None):
        self.asked.append((batch, max_len))
        self.caches.append([{"tokens": None, "room": max_len}])
        return self.caches[-1]

    def forward(self, tokens, *, caches=None):
        self.calls.append(tuple(tokens.shape))
        self.grad.append(torch.is_grad_enabled())
        history = tokens
        if caches is not None:
            (cache,) = caches
            if cache["tokens"] is not None:
                history = torch.cat([cache["tokens"], tokens], 1)
            if cache["room"] is not None and history.shape[1] > cache["room"]:
                raise ValueError(f"{history.shape[1]} tokens in a cache with room for {cache['room']}")
            cache["tokens"] = history.clone()
        place = torch.arange(1, history.shape[1] + 1, device=tokens.device)
        following = (history * place**2 + place).cumsum(1) % self.VOCAB  # (B, L)
        logits = F.one_hot(following, self.VOCAB).float() * self.weight
        return logits[:, -tokens.shape[1] :] if tokens.shape[1] else logits[:, :0]


def continued(prompts, n_new):
    """Greedy generation from the whole history, with Python's integers."""
    rows = []
    for row in prompts.tolist():
        for _ in range(n_new):
            row = [*row, sum(x * (i + 1) ** 2 + i + 1 for i, x in enumerate(row)) % Automaton.VOCAB]
        rows.append(row)
    return torch.tensor(rows, dtype=torch.long).reshape(len(prompts), prompts.shape[1] + n_new)


@task("generate_greedy")
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("b, t, n_new", [(2, 4, 6), (1, 1, 1), (3, 5, 2), (4, 1, 9)])
def test_the_most_likely_token_follows(solution, randint, use_cache, b, t, n_new):
    prompts = randint(0, 13, (b, t))
    expected = continued(prompts, n_new)
    found = solution.generate_greedy(Automaton(), prompts, n_new, use_cache=use_cache)
    assert_equal(found, expected, because="the prompt, and then each time the token with the largest logit")


@task("generate_greedy")
def test_a_cache_is_used_by_default(solution, randint):
    model = Automaton()
    solution.generate_greedy(model, randint(0, 13, (2, 4)), 3)
    assert_equal(len(model.asked), 1, because="use_cache=True: caches are asked for once")


@task("generate_greedy")
@pytest.mark.parametrize("n_new", [1, 2, 5])
def test_after_the_prompt_one_token_at_a_time(solution, randint, n_new):
    model = Automaton()
    solution.generate_greedy(model, randint(0, 13, (3, 4)), n_new)
    expected = [(3, 4)] + [(3, 1)] * (n_new - 1)
    assert_equal(model.calls, expected, because="the prompt once, then each new token; the last one is not fed")


@task("generate_greedy")
@pytest.mark.parametrize("n_new", [1, 4])
def test_without_a_cache_everything_is_fed_again(solution, randint, n_new):
    model = Automaton()
    solution.generate_greedy(model, randint(0, 13, (3, 4)), n_new, use_cache=False)
    assert_equal(model.calls, [(3, 4 + i) for i in range(n_new)], because="n_new calls, each one token longer")


@task("generate_greedy")
@pytest.mark.parametrize("use_cache", [True, False])
def test_no_new_tokens(solution, randint, use_cache):
    model, prompts = Automaton(), randint(0, 13, (3, 4))
    found = solution.generate_greedy(model, prompts, 0, use_cache=use_cache)
    assert_equal(found, prompts.clone(), because="nothing was to be added")
    assert_equal(model.calls, [], because="and so the model is not needed")
    assert_that(not same_storage(found, prompts), "the result is a tensor of its own", value="the prompts themselves")


@task("generate_greedy")
def test_the_caches_have_room(solution, randint):
    model = Automaton()
    solution.generate_greedy(model, randint(0, 13, (3, 4)), 6)
    (batch, room) = model.asked[0]
    assert_equal(batch, 3, because="new_caches(batch, ...): three rows")
    assert_that(room is None or room >= 9, "4 + 6 - 1 tokens are fed", value=room)


@task("generate_greedy")
def test_the_caches_are_no_larger_than_the_text(solution, randint):
    model = Automaton()
    solution.generate_greedy(model, randint(0, 13, (3, 4)), 6)
    (_, room) = model.asked[0]
    assert_that(room is not None and room <= 10, "the text has 4 + 6 tokens: more room is wasted", value=room)


@task("generate_greedy")
def test_two_prompts_in_a_row(solution, randint):
    model = Automaton()
    solution.generate_greedy(model, randint(0, 13, (2, 3)), 4)
    prompts = randint(0, 13, (2, 4))
    expected = continued(prompts, 3)
    found = solution.generate_greedy(model, prompts, 3)
    assert_equal(found, expected, because="the second prompt knows nothing of the first")


@task("generate_greedy")
def test_two_batches_in_a_row(solution, randint):
    model = Automaton()
    solution.generate_greedy(model, randint(0, 13, (2, 3)), 4)
    solution.generate_greedy(model, randint(0, 13, (5, 4)), 3)
    assert_equal([batch for batch, _ in model.asked], [2, 5], because="each generation has new caches of its own size")


@task("generate_greedy")
@pytest.mark.parametrize("use_cache", [True, False])
def test_no_graph_is_made(solution, randint, use_cache):
    model = Automaton()
    solution.generate_greedy(model, randint(0, 13, (2, 3)), 3, use_cache=use_cache)
    assert_equal(model.grad, [False] * 3, because="grad mode is off whenever the model runs")


@task("generate_greedy")
def test_grad_mode_is_as_before_afterwards(solution, randint):
    solution.generate_greedy(Automaton(), randint(0, 13, (2, 3)), 3)
    assert_that(torch.is_grad_enabled(), "grad mode is on again", value=torch.is_grad_enabled())


@task("generate_greedy")
def test_without_a_cache_any_model_will_do(solution, randn, randint, device):
    model, prompts = language_model(randn, device), randint(0, 11, (2, 4))
    with torch.no_grad():
        tokens = prompts
        for _ in range(3):
            tokens = torch.cat([tokens, model(tokens)[:, -1].argmax(-1, keepdim=True)], 1)
    found = solution.generate_greedy(model, prompts, 3, use_cache=False)
    assert_equal(found, tokens, because="day 20's DecoderLM is called with tokens alone")


@task("generate_greedy")
def test_a_refitted_model(solution, randn, randint, device):
    model, prompts = language_model(randn, device), randint(0, 11, (3, 4))
    with torch.no_grad():
        tokens = prompts
        for _ in range(7):
            logits = model(tokens)[:, -1]
            top = logits.topk(2).values
            if (top[:, 0] - top[:, 1]).min() < 1e-6:  # too close to call: compare up to here
                break
            tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
    n = tokens.shape[1] - 4
    found = solution.generate_greedy(Refitted(model), prompts, n)
    assert_equal(found, tokens, because="with caches as without, token for token")


def generated_bytes(solution, model, prompts, n_new, use_cache):
    _, cost = measure(solution.generate_greedy, model, prompts, n_new, use_cache=use_cache)
    return cost.new_bytes


@task("generate_greedy")
def test_memory_grows_with_the_text_and_not_with_its_square(solution, randn, randint, device):
    model = Refitted(language_model(randn, device, layers=1, d=32, max_len=80))
    prompts = randint(0, 11, (1, 2))
    short, long = (generated_bytes(solution, model, prompts, n, True) for n in (16, 64))
    because = "64 tokens allocate about 5 times what 16 do: 8 is enough, and 18 would be feeding everything again"
    assert_that(long < 8 * short, because, value=round(long / short, 2))


@cost_case("generate_greedy")
def generate_cost(module, randn, randint, device):
    with unmetered():
        model = Refitted(language_model(randn, device, d=32, max_len=40, dtype=torch.float32))
        prompts = randint(0, 11, (1, 8))
    return lambda: module.generate_greedy(model, prompts, 24)


# decode_flops


def metered(d_model, n_heads, head_dim, old, t):
    """Run the products of the layer for t tokens after `old` cached ones, and count."""
    width = n_heads * head_dim

    def run():
        x, k, v = (
            torch.zeros(t, d_model),
            torch.zeros(n_heads, old + t, head_dim),
            torch.zeros(n_heads, old + t, head_dim),
        )
        for _ in range(3):
            x @ torch.zeros(d_model, width)
        scores = torch.zeros(n_heads, t, head_dim) @ k.mT
        out = scores @ v
        return out.transpose(0, 1).reshape(t, width) @ torch.zeros(width, d_model)

    return measure(run)[1].flops


SIZES = [(12, 3, 4), (16, 2, 12), (8, 1, 2)]


@task("decode_flops")
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("length", [0, 1, 7, 40])
def test_one_token_under_the_meter(solution, size, length):
    expected = metered(*size, length, 1)
    found = solution.decode_flops(*size, length)
    assert_equal(found, expected, because=f"four projections, and {length} + 1 keys")


@task("decode_flops")
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("prompt, n_new", [(1, 1), (5, 1), (4, 6), (1, 12)])
def test_a_generation_with_a_cache(solution, size, prompt, n_new):
    expected = metered(*size, 0, prompt) + sum(metered(*size, prompt + i, 1) for i in range(n_new - 1))
    found = solution.generation_flops(*size, prompt, n_new, True)
    assert_equal(found, expected, because="the prompt once, then n_new - 1 single tokens")


@task("decode_flops")
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("prompt, n_new", [(1, 1), (5, 1), (4, 6), (1, 12)])
def test_a_generation_without_a_cache(solution, size, prompt, n_new):
    expected = sum(metered(*size, 0, prompt + i) for i in range(n_new))
    found = solution.generation_flops(*size, prompt, n_new, False)
    assert_equal(found, expected, because="n_new calls, each with the whole text")


@task("decode_flops")
@pytest.mark.parametrize("cached", [True, False])
def test_no_token_costs_nothing(solution, cached):
    assert_equal(solution.generation_flops(12, 3, 4, 5, 0, cached), 0, because="n_new = 0: nothing runs")


# RollingKVCache


def ring(solution, device, window, b=2, h=3, d=4, **kwargs):
    return solution.RollingKVCache(b, h, window, d, device=device, **kwargs)


def in_order(keys, values, positions):
    """Keys and values sorted by position: a ring may return them in any order."""
    order = positions.argsort()
    return keys[:, :, order], values[:, :, order], positions[order]


RINGS = [[1] * 13, [13], [5, 8], [3, 1, 4, 1, 4], [2, 0, 11], [4, 4, 5], "random", "random "]


@task("RollingKVCache")
@pytest.mark.parametrize("window", [1, 3, 4])
@pytest.mark.parametrize("sizes", RINGS, ids=str)
def test_positions_that_the_new_queries_need(solution, randn, randint, device, sizes, window):
    sizes = partition(randint, 13) if isinstance(sizes, str) else sizes
    cache, seen = ring(solution, device, window), 0
    for n in sizes:
        *_, positions = cache.update(randn(2, 3, n, 4), randn(2, 3, n, 4))
        expected = torch.arange(max(0, seen - window + 1), seen + n)
        seen += n
        because = f"{n} new positions and at most {window} - 1 old ones"
        assert_equal(positions.sort().values, expected, because=because)


@task("RollingKVCache")
@pytest.mark.parametrize("window", [1, 3, 4])
@pytest.mark.parametrize("sizes", RINGS, ids=str)
def test_keys_and_values_belong_to_the_positions(solution, randn, randint, device, sizes, window):
    sizes = partition(randint, 13) if isinstance(sizes, str) else sizes
    k, v = randn(2, 3, 13, 4), randn(2, 3, 13, 4)
    cache, seen = ring(solution, device, window), 0
    for n in sizes:
        found = cache.update(k[:, :, seen : seen + n], v[:, :, seen : seen + n])
        keys, values, positions = in_order(*found)
        assert_equal(keys, k[:, :, positions], because="each key stands beside its own position")
        assert_equal(values, v[:, :, positions], because="each value stands beside its own position")
        seen += n


def attend_by_position(q, keys, values, q_positions, k_positions, window):
    distance = q_positions[:, None] - k_positions
    return F.scaled_dot_product_attention(q, keys, values, (distance >= 0) & (distance < window))


@task("RollingKVCache")
@pytest.mark.parametrize("window", [1, 3, 4])
@pytest.mark.parametrize("sizes", [[1] * 13, [13], [5, 8], [3, 1, 4, 5], "random"], ids=str)
def test_it_is_attention_with_a_window(solution, randn, randint, device, sizes, window):
    sizes = fixed_or_random(sizes, randint, 13)
    q, k, v = (randn(2, 3, 13, 4, dtype=torch.float64) for _ in range(3))
    expected = F.scaled_dot_product_attention(q, k, v, visible(13, window).to(device))
    cache, seen, out = ring(solution, device, window, dtype=torch.float64), 0, []
    for n in sizes:
        places = torch.arange(seen, seen + n, device=device)
        found = cache.update(k[:, :, places], v[:, :, places])
        out.append(attend_by_position(q[:, :, places], *found[:2], places, found[2], window))
        seen += n
    assert_close(torch.cat(out, 2), expected, because=f"the full attention with a window of {window}")


@task("RollingKVCache")
@pytest.mark.parametrize("more", [3, 4, 9])
def test_a_long_chunk_on_a_full_ring(solution, randn, device, more):
    k, v = randn(2, 3, 5 + more, 4), randn(2, 3, 5 + more, 4)
    cache = ring(solution, device, 3)
    cache.update(k[:, :, :5], v[:, :, :5])
    keys, values, positions = in_order(*cache.update(k[:, :, 5:], v[:, :, 5:]))
    assert_equal(positions, torch.arange(3, 5 + more), because="the first new query still needs positions 3 and 4")
    assert_equal(keys, k[:, :, 3:], because="old keys are read before they are overwritten")
    assert_equal(values, v[:, :, 3:], because="old values are read before they are overwritten")


@task("RollingKVCache")
def test_length_counts_all_positions(solution, randn, device):
    cache, lengths = ring(solution, device, 3), []
    for n in (2, 0, 5, 1):
        cache.update(randn(2, 3, n, 4), randn(2, 3, n, 4))
        lengths.append(cache.length)
    assert_equal(lengths, [2, 2, 7, 8], because="length is what was seen, not what is kept")


@task("RollingKVCache")
def test_an_empty_ring(solution, randn, device):
    cache = ring(solution, device, 3)
    assert_equal(cache.length, 0, because="nothing was seen")
    keys, values, positions = cache.update(randn(2, 3, 0, 4), randn(2, 3, 0, 4))
    shapes = tuple(keys.shape), tuple(values.shape), tuple(positions.shape)
    assert_equal(shapes, ((2, 3, 0, 4), (2, 3, 0, 4), (0,)), because="and nothing comes back")


@task("RollingKVCache")
def test_nbytes_is_that_of_window_slots(solution, randn, device):
    cache, cost = measure(ring, solution, device, 5, v_head_dim=6)
    expected = 2 * 3 * 5 * (4 + 6) * 4
    assert_that(cost.new_bytes == expected, "5 slots for keys and values, and no more", value=cost.new_bytes)
    found = [cache.nbytes]
    for n in (4, 50, 1):
        cache.update(randn(2, 3, n, 4), randn(2, 3, n, 6))
        found.append(cache.nbytes)
    assert_equal(found, [expected] * 4, because="ten wraps later the ring is as large as before")


@task("RollingKVCache")
def test_a_step_costs_the_same_forever(solution, randn, device):
    cache, costs = ring(solution, device, 8), []
    for i in range(100):
        k, v = randn(2, 3, 1, 4), randn(2, 3, 1, 4)
        cost = measure(cache.update, k, v)[1]
        if i in (10, 99):
            costs.append(cost.new_bytes)
    assert_equal(costs[1], costs[0], because="new bytes of step 99 and of step 10")


@task("RollingKVCache")
def test_a_step_allocates_no_more_than_the_ring(solution, randn, device):
    cache = ring(solution, device, 8)
    cache.update(randn(2, 3, 30, 4), randn(2, 3, 30, 4))
    k, v = randn(2, 3, 1, 4), randn(2, 3, 1, 4)
    assert_cost(cache.update, k, v, no_larger_than=2 * 3 * 8 * 4, because="8 keys are needed and returned")


@task("RollingKVCache")
def test_the_ring_starts_anew_after_reset(solution, randn, device):
    cache = ring(solution, device, 3)
    cache.update(randn(2, 3, 7, 4), randn(2, 3, 7, 4))
    cache.reset()
    k, v = randn(2, 3, 2, 4), randn(2, 3, 2, 4)
    keys, _, positions = in_order(*cache.update(k, v))
    assert_equal(positions, torch.arange(2), because="the first token of a new prompt stands at 0")
    assert_equal(keys, k, because="keys of the first prompt are gone")
    assert_equal(cache.length, 2, because="two positions were seen since reset")


@task("RollingKVCache")
def test_values_of_another_width_in_the_ring(solution, randn, device):
    k, v = randn(2, 3, 6, 4), randn(2, 3, 6, 7)
    cache = ring(solution, device, 4, v_head_dim=7)
    cache.update(k[:, :, :5], v[:, :, :5])
    keys, values, _ = in_order(*cache.update(k[:, :, 5:], v[:, :, 5:]))
    assert_equal(keys, k[:, :, 2:], because="keys are 4 wide")
    assert_equal(values, v[:, :, 2:], because="values are 7 wide")


@task("RollingKVCache")
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64])
def test_the_ring_converts_what_it_takes(solution, randn, device, kind):
    k, v = randn(2, 3, 6, 4), randn(2, 3, 6, 4)
    cache = ring(solution, device, 4, dtype=kind)
    cache.update(k[:, :, :5], v[:, :, :5])
    keys, values, _ = in_order(*cache.update(k[:, :, 5:], v[:, :, 5:]))
    assert_equal(keys, k[:, :, 2:].to(kind), because=f"old keys and new ones in {kind}")
    assert_equal(values, v[:, :, 2:].to(kind), because=f"old values and new ones in {kind}")


@task("RollingKVCache")
def test_the_ring_lives_on_the_given_device(solution):
    cache = solution.RollingKVCache(2, 3, 4, 4, device="meta")
    k = torch.empty(2, 3, 6, 4, device="meta")
    devices = [str(x.device) for x in cache.update(k, k)]
    assert_equal(devices, ["meta"] * 3, because="device='meta' was asked for")


@task("RollingKVCache")
def test_the_ring_copies_and_changes_no_chunk(solution, randn, device):
    k, v = randn(2, 3, 4, 4), randn(2, 3, 4, 4)
    before = k.clone(), v.clone()
    cache = ring(solution, device, 4)
    with unchanged(k, v):
        cache.update(k, v)
        cache.update(randn(2, 3, 0, 4), randn(2, 3, 0, 4))
    k.zero_()
    v.zero_()
    keys, values, _ = in_order(*cache.update(randn(2, 3, 1, 4), randn(2, 3, 1, 4)))
    assert_equal(keys[:, :, :3], before[0][:, :, 1:], because="what happens to k later does not reach the ring")
    assert_equal(values[:, :, :3], before[1][:, :, 1:], because="what happens to v later does not reach the ring")


def assert_graph_is_refused(update, chunks, position, because):
    chunks = list(chunks)
    chunks[position] = chunks[position].clone().requires_grad_()
    assert_raises(RuntimeError, update, *chunks, because=because)
    with torch.no_grad():
        update(*chunks)


@task("RollingKVCache")
@pytest.mark.parametrize("position", [0, 1])
def test_the_ring_keeps_no_graph(solution, randn, device, position):
    cache = ring(solution, device, 4)
    chunks = randn(2, 3, 2, 4), randn(2, 3, 2, 4)
    assert_graph_is_refused(cache.update, chunks, position, "grad mode is on: refused as KVCache does")
    assert_equal(cache.length, 2, because="only the update without grad mode counts")


@task("RollingKVCache")
@pytest.mark.parametrize("shape", [(1, 3, 2, 4), (2, 1, 2, 4), (2, 3, 2, 1), (2, 3, 4)])
@pytest.mark.parametrize("which", ["k", "v"])
def test_chunks_that_do_not_fit_the_ring(solution, randn, device, which, shape):
    good = randn(2, 3, shape[-2], 4)
    pair = (randn(*shape), good) if which == "k" else (good, randn(*shape))
    cache = ring(solution, device, 5)
    because = f"{which} is {shape}, the ring (2, 3, 5, 4)"
    assert_raises(ValueError, cache.update, *pair, mentions=[str(shape), "(2, 3, 5, 4)"], because=because)
    assert_equal(cache.length, 0, because="a refused chunk leaves the length")


@task("RollingKVCache")
def test_a_value_for_each_key_of_the_ring(solution, randn, device):
    cache = ring(solution, device, 5)
    mentions = ["(2, 3, 2, 4)", "(2, 3, 1, 4)"]
    assert_raises(
        ValueError, cache.update, randn(2, 3, 2, 4), randn(2, 3, 1, 4), mentions=mentions, because="2 keys, 1 value"
    )


# RaggedKVCache


def ragged(solution, device, b=3, h=2, n=16, d=4, **kwargs):
    return solution.RaggedKVCache(b, h, n, d, device=device, **kwargs)


COUNTS = [
    [[3, 1, 4]],
    [[3, 1, 4], [1, 1, 1]],
    [[2, 4, 0], [0, 3, 1], [4, 0, 2]],
    [[0, 0, 0], [1, 2, 3]],
    [[4, 4, 4], [1, 0, 1]],
]


class Rows:
    """What a ragged cache should hold: a list of tensors for each row."""

    def __init__(self, randn, b=3, h=2, d=4, dv=4, poison=0.0, dtype=torch.float32):
        self.randn, self.sizes, self.poison, self.dtype = randn, (b, h, d, dv), poison, dtype
        self.keys, self.values = [[] for _ in range(b)], [[] for _ in range(b)]

    def chunk(self, counts, t=None):
        """A padded chunk with counts[b] real places in row b, which are written down."""
        b, h, d, dv = self.sizes
        t = max(counts) if t is None else t
        k, v = self.randn(b, h, t, d, dtype=self.dtype), self.randn(b, h, t, dv, dtype=self.dtype)
        for i, n in enumerate(counts):
            self.keys[i] += k[i, :, :n].clone().unbind(1)
            self.values[i] += v[i, :, :n].clone().unbind(1)
            if self.poison:
                k[i, :, n:], v[i, :, n:] = self.poison, self.poison
        return k, v, torch.tensor(counts, device=k.device)

    def lengths(self):
        return [len(row) for row in self.keys]

    def row(self, i):
        return torch.stack(self.keys[i], 1), torch.stack(self.values[i], 1)


def assert_rows(rows, keys, values, because):
    b, h, d, dv = rows.sizes
    longest = max(rows.lengths())
    shapes = tuple(keys.shape), tuple(values.shape)
    assert_equal(shapes, ((b, h, longest, d), (b, h, longest, dv)), because="as long as the longest row")
    for i, n in enumerate(rows.lengths()):
        if n:
            k, v = rows.row(i)
            assert_equal(keys[i, :, :n], k, because=f"keys of row {i}: {because}")
            assert_equal(values[i, :, :n], v, because=f"values of row {i}: {because}")


@task("RaggedKVCache")
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_each_row_gets_its_own_places(solution, randn, device, counts):
    cache, rows = ragged(solution, device), Rows(randn)
    for count in counts:
        keys, values, *_ = cache.update(*rows.chunk(count))
        assert_rows(rows, keys, values, f"{count} new places")


@task("RaggedKVCache")
def test_rows_of_random_counts(solution, randn, randint, device):
    cache, rows = ragged(solution, device, n=40), Rows(randn)
    for _ in range(7):
        keys, values, *_ = cache.update(*rows.chunk(randint(0, 5, (3,)).tolist(), t=5))
        if max(rows.lengths()):
            assert_rows(rows, keys, values, "chunks with padding")


@task("RaggedKVCache")
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_positions_go_on_in_each_row(solution, randn, device, counts):
    cache, rows = ragged(solution, device), Rows(randn)
    for count in counts:
        before = rows.lengths()
        k, v, n_new = rows.chunk(count, t=max(count) + 1)
        *_, positions = cache.update(k, v, n_new)
        expected = torch.tensor([[n + i for i in range(k.shape[2])] for n in before])
        assert_equal(
            positions, expected.reshape(positions.shape).long(), because="place t of row b stands at lengths[b] + t"
        )


@task("RaggedKVCache")
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_who_may_look_at_whom(solution, randn, device, counts):
    cache, rows = ragged(solution, device), Rows(randn)
    for count in counts:
        before = rows.lengths()
        k, v, n_new = rows.chunk(count)
        _, _, mask, _ = cache.update(k, v, n_new)
        table = torch.zeros(3, 1, k.shape[2], max(rows.lengths()), dtype=torch.bool)
        for b, n in enumerate(count):
            for t in range(n):
                table[b, 0, t, : before[b] + t + 1] = True
        assert_equal(mask, table, because="what is not later in the same row; padding sees nothing")


@task("RaggedKVCache")
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_each_row_is_as_if_it_were_alone(solution, randn, device, counts):
    cache, rows = ragged(solution, device, dtype=torch.float64), Rows(randn, dtype=torch.float64)
    for count in counts:
        before = rows.lengths()
        chunk = rows.chunk(count)
        keys, values, mask, _ = cache.update(*chunk)
        q = randn(3, 2, chunk[0].shape[2], 4, dtype=torch.float64)
        out = F.scaled_dot_product_attention(q, keys, values, mask)
        for b, n in enumerate(count):
            if n:
                allowed = visible(before[b] + n)[before[b] :].to(device)
                alone = F.scaled_dot_product_attention(q[b, :, :n], *rows.row(b), allowed)
                assert_close(out[b, :, :n], alone, because=f"row {b} alone gives the same")


@task("RaggedKVCache")
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_padding_never_reaches_the_cache(solution, randn, device, poison):
    cache, rows = ragged(solution, device), Rows(randn, poison=poison)
    for count in ([1, 4, 2], [3, 0, 1], [0, 1, 2]):
        keys, values, mask, _ = cache.update(*rows.chunk(count))
        assert_that(
            keys.isfinite(), f"keys are finite everywhere, also where a row ends: padding is {poison}", value=keys
        )
        assert_that(values.isfinite(), f"values are finite everywhere: 0 * {poison} is NaN", value=values)


@task("RaggedKVCache")
def test_padding_does_not_overwrite(solution, randn, device):
    cache, rows = ragged(solution, device, n=6), Rows(randn)
    cache.update(*rows.chunk([5, 1, 3]))
    keys, values, *_ = cache.update(*rows.chunk([1, 2, 0], t=4))
    assert_rows(rows, keys, values, "padding may reach past max_len, and is dropped")


@task("RaggedKVCache")
def test_lengths_of_the_rows(solution, randn, device):
    cache, rows = ragged(solution, device), Rows(randn)
    assert_equal(cache.lengths, torch.zeros(3, dtype=torch.long), because="all rows are empty")
    assert_equal(cache.length, 0, because="the longest row is empty")
    for count in ([1, 3, 2], [2, 0, 2]):
        cache.update(*rows.chunk(count))
        assert_equal(cache.lengths, torch.tensor(rows.lengths()), because="lengths (B,), int64")
        assert_equal(cache.length, max(rows.lengths()), because="length is that of the longest row")


@task("RaggedKVCache")
def test_rows_without_places(solution, randn, device):
    cache, rows = ragged(solution, device), Rows(randn)
    cache.update(*rows.chunk([2, 0, 3]))
    keys, values, mask, positions = cache.update(*rows.chunk([0, 0, 0]))
    assert_rows(rows, keys, values, "T = 0 returns what is there")
    assert_equal((tuple(mask.shape), tuple(positions.shape)), ((3, 1, 0, 3), (3, 0)), because="no queries")


@task("RaggedKVCache")
@pytest.mark.parametrize("n", [0, 2, 9])
def test_all_rows_are_cut_to_one_length(solution, randn, device, n):
    cache, rows = ragged(solution, device), Rows(randn)
    cache.update(*rows.chunk([5, 1, 3]))
    cache.truncate(n)
    rows.keys, rows.values = [x[:n] for x in rows.keys], [x[:n] for x in rows.values]
    assert_equal(cache.lengths, torch.tensor(rows.lengths()), because=f"at most {n} positions, shorter rows stay")
    keys, values, *_ = cache.update(*rows.chunk([1, 2, 3]))
    assert_rows(rows, keys, values, "new places follow what was kept")


@task("RaggedKVCache")
def test_each_row_is_cut_to_a_length_of_its_own(solution, randn, device):
    cache, rows = ragged(solution, device), Rows(randn)
    cache.update(*rows.chunk([5, 1, 3]))
    kept = torch.tensor([2, 4, 0], device=device)
    with unchanged(kept):
        cache.truncate(kept)
        rows.keys = [x[:n] for x, n in zip(rows.keys, (2, 4, 0), strict=True)]
        rows.values = [x[:n] for x, n in zip(rows.values, (2, 4, 0), strict=True)]
        assert_equal(cache.lengths, torch.tensor([2, 1, 0]), because="at most n[b] positions of row b")
        keys, values, *_ = cache.update(*rows.chunk([2, 2, 1]))
    assert_rows(rows, keys, values, "new places follow what was kept")


@task("RaggedKVCache")
def test_all_rows_are_empty_after_reset(solution, randn, device):
    cache, rows = ragged(solution, device), Rows(randn)
    cache.update(*rows.chunk([5, 1, 3]))
    cache.reset()
    assert_equal(cache.lengths, torch.zeros(3, dtype=torch.long), because="reset forgets all rows")
    rows = Rows(randn)
    keys, values, *_ = cache.update(*rows.chunk([1, 2, 1]))
    assert_rows(rows, keys, values, "a new prompt")


@task("RaggedKVCache")
def test_rows_are_views_of_one_buffer(solution, randn, device):
    cache, rows = ragged(solution, device), Rows(randn)
    first, second = cache.update(*rows.chunk([2, 1, 3])), cache.update(*rows.chunk([1, 1, 1]))
    assert_that(same_storage(first[0], second[0]), "the keys of both updates lie in the same memory", value="keys")
    assert_that(same_storage(first[1], second[1]), "the values of both updates lie in the same memory", value="values")


@task("RaggedKVCache")
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_bytes_of_a_ragged_cache(solution, randn, device, kind):
    cache = ragged(solution, device, v_head_dim=6, dtype=kind)
    assert_equal(cache.nbytes, 3 * 2 * 16 * (4 + 6) * kind.itemsize, because="both buffers, for max_len positions")
    rows = Rows(randn, dv=6)
    keys, values, *_ = cache.update(*rows.chunk([2, 1, 3]))
    assert_equal(keys[2], rows.row(2)[0].to(kind), because=f"a cache of {kind} converts what it stores")
    assert_equal(values[2], rows.row(2)[1].to(kind), because=f"a cache of {kind} converts what it stores")


@task("RaggedKVCache")
def test_chunks_with_padding_are_not_changed(solution, randn, device):
    cache, rows = ragged(solution, device), Rows(randn)
    k, v, n_new = rows.chunk([2, 1, 3])
    with unchanged(k, v, n_new):
        cache.update(k, v, n_new)
        cache.update(*rows.chunk([1, 1, 1]))


@task("RaggedKVCache")
@pytest.mark.parametrize("counts", [[4, 1, 2], [0, -1, 2]])
def test_no_more_new_places_than_the_chunk_has(solution, randn, device, counts):
    cache, rows = ragged(solution, device), Rows(randn)
    cache.update(*rows.chunk([1, 2, 3]))
    n_new = torch.tensor(counts, device=device)
    k = randn(3, 2, 3, 4)
    assert_raises(ValueError, cache.update, k, k, n_new, mentions=["3"], because=f"n_new {counts} of 3 places")
    assert_equal(cache.lengths, torch.tensor([1, 2, 3]), because="a refused chunk changes nothing")


@task("RaggedKVCache")
def test_a_row_that_would_overflow(solution, randn, device):
    cache, rows = ragged(solution, device, n=6), Rows(randn)
    cache.update(*rows.chunk([3, 5, 2]))
    k, n_new = randn(3, 2, 2, 4), torch.tensor([2, 2, 2], device=device)
    assert_raises(ValueError, cache.update, k, k, n_new, mentions=["6"], because="row 1 would have 7 positions of 6")
    assert_equal(cache.lengths, torch.tensor([3, 5, 2]), because="a refused chunk moves no row")
    keys, values, *_ = cache.update(*rows.chunk([3, 1, 0]))
    assert_rows(rows, keys, values, "nothing of the refused chunk was stored")


@task("RaggedKVCache")
@pytest.mark.parametrize("shape", [(2,), (1,), (3, 1), ()])
def test_one_number_for_each_row(solution, randn, device, shape):
    cache, k = ragged(solution, device), randn(3, 2, 3, 4)
    n_new = torch.ones(shape, dtype=torch.long, device=device)
    because = f"n_new {shape} for three rows"
    assert_raises(ValueError, cache.update, k, k, n_new, mentions=[str(shape), "(3, 2, 3, 4)"], because=because)


@task("RaggedKVCache")
@pytest.mark.parametrize("shape", [(1, 2, 3, 4), (3, 1, 3, 4), (3, 2, 3, 1)])
@pytest.mark.parametrize("which", ["k", "v"])
def test_padded_chunks_that_do_not_fit(solution, randn, device, which, shape):
    good, n_new = randn(3, 2, 3, 4), torch.tensor([1, 2, 3], device=device)
    pair = (randn(*shape), good) if which == "k" else (good, randn(*shape))
    cache = ragged(solution, device)
    because = f"{which} is {shape}, the buffer (3, 2, 16, 4)"
    assert_raises(ValueError, cache.update, *pair, n_new, mentions=[str(shape), "(3, 2, 16, 4)"], because=because)
    assert_equal(cache.length, 0, because="a refused chunk changes nothing")


@task("RaggedKVCache")
def test_a_value_for_each_padded_key(solution, randn, device):
    cache, n_new = ragged(solution, device), torch.tensor([1, 2, 2], device=device)
    mentions = ["(3, 2, 2, 4)", "(3, 2, 3, 4)"]
    k, v = randn(3, 2, 2, 4), randn(3, 2, 3, 4)
    assert_raises(ValueError, cache.update, k, v, n_new, mentions=mentions, because="2 keys, 3 values")


@task("RaggedKVCache")
@pytest.mark.parametrize("position", [0, 1])
def test_a_ragged_cache_keeps_no_graph(solution, randn, device, position):
    cache, rows = ragged(solution, device), Rows(randn)
    chunk = rows.chunk([1, 3, 2])
    assert_graph_is_refused(cache.update, chunk, position, "grad mode is on: refused as KVCache does")
    assert_equal(cache.lengths, torch.tensor([1, 3, 2]), because="only the update without grad mode counts")


# PagedKVCache


def pages(solution, device, n_blocks=12, block=4, h=2, d=3, **kwargs):
    return solution.PagedKVCache(n_blocks, block, h, d, device=device, **kwargs)


class Texts:
    """What a paged cache should hold: the keys and values of each sequence."""

    def __init__(self, cache, randn, h=2, d=3, dv=3):
        self.cache, self.randn, self.sizes, self.content = cache, randn, (h, d, dv), {}

    def add(self):
        h, d, dv = self.sizes
        seq = self.cache.add()
        self.content[seq] = self.randn(h, 0, d), self.randn(h, 0, dv)
        return seq

    def fork(self, seq):
        new = self.cache.fork(seq)
        self.content[new] = self.content[seq]
        return new

    def write(self, seq, n):
        h, d, dv = self.sizes
        k, v = self.randn(h, n, d), self.randn(h, n, dv)
        found = self.cache.update(seq, k, v)
        old = self.content[seq]
        self.content[seq] = torch.cat([old[0], k], 1), torch.cat([old[1], v], 1)
        return found

    def check(self, seq, because):
        h, d, dv = self.sizes
        keys, values = self.cache.update(seq, self.randn(h, 0, d), self.randn(h, 0, dv))
        assert_equal(keys.contiguous(), self.content[seq][0], because=f"keys: {because}")
        assert_equal(values.contiguous(), self.content[seq][1], because=f"values: {because}")

    def check_all(self, because):
        for seq in self.content:
            self.check(seq, because)


def blocks(n, block=4):
    return math.ceil(n / block)


@task("PagedKVCache")
@pytest.mark.parametrize("block", [1, 3, 4, 20])
@pytest.mark.parametrize("sizes", [[1] * 9, [9], [4, 5], [3, 0, 6], "random"], ids=str)
def test_one_sequence_in_pages(solution, randn, randint, device, sizes, block):
    sizes = fixed_or_random(sizes, randint, 9)
    texts = Texts(pages(solution, device, block=block), randn)
    seq = texts.add()
    for n in sizes:
        keys, values = texts.write(seq, n)
        assert_equal(keys.contiguous(), texts.content[seq][0], because="all keys of the sequence, the oldest first")
        assert_equal(values.contiguous(), texts.content[seq][1], because="all values of the sequence, the oldest first")


@task("PagedKVCache")
def test_sequences_take_turns(solution, randn, device):
    texts = Texts(pages(solution, device), randn)
    seqs = [texts.add() for _ in range(3)]
    for step in ([3, 1, 5], [2, 4, 0], [1, 1, 1]):
        for seq, n in zip(seqs, step, strict=True):
            texts.write(seq, n)
    texts.check_all("pages of different sequences lie between each other")
    assert_equal([texts.cache.length(seq) for seq in seqs], [6, 6, 6], because="length(seq) counts positions")


@task("PagedKVCache")
def test_every_sequence_has_a_number_of_its_own(solution, device):
    cache = pages(solution, device)
    one, two = cache.add(), cache.add()
    three = cache.fork(one)
    assert_equal(len({one, two, three}), 3, because="add, add and fork give three numbers")
    assert_equal([cache.length(seq) for seq in (one, two, three)], [0, 0, 0], because="all are empty")


@task("PagedKVCache")
@pytest.mark.parametrize("n", [0, 1, 4, 5, 8, 11])
def test_blocks_are_taken_when_they_are_needed(solution, randn, device, n):
    texts = Texts(pages(solution, device), randn)
    texts.write(texts.add(), n)
    assert_equal(texts.cache.blocks_in_use, blocks(n), because=f"{n} positions in blocks of 4")
    texts.write(texts.add(), 2)
    assert_equal(texts.cache.blocks_in_use, blocks(n) + 1, because="another sequence begins a block of its own")


@task("PagedKVCache")
@pytest.mark.parametrize("n", [0, 3, 4, 6])
def test_a_fork_copies_nothing(solution, randn, device, n):
    texts = Texts(pages(solution, device), randn)
    seq = texts.add()
    texts.write(seq, n)
    assert_cost(texts.fork, seq, max_new_bytes=0, because="a fork is a table, not a copy")
    assert_equal(texts.cache.blocks_in_use, blocks(n), because="both hold the same blocks")
    texts.check_all("a fork has the content of its parent")


@task("PagedKVCache")
@pytest.mark.parametrize("n", [3, 4, 6])
@pytest.mark.parametrize("writer", ["parent", "child"])
def test_a_fork_does_not_see_what_others_write(solution, randn, device, n, writer):
    texts = Texts(pages(solution, device), randn)
    parent = texts.add()
    texts.write(parent, n)
    child = texts.fork(parent)
    texts.write(parent if writer == "parent" else child, 3)
    texts.check_all(f"the {writer} has written 3 positions, the other one none")
    texts.write(child if writer == "parent" else parent, 2)
    texts.check_all("now both have written")


@task("PagedKVCache")
@pytest.mark.parametrize("prompt", [4, 6, 8, 1])
@pytest.mark.parametrize("steps", [1, 3, 5])
def test_samples_share_the_full_blocks_of_their_prompt(solution, randn, device, prompt, steps):
    texts = Texts(pages(solution, device, n_blocks=20), randn)
    seqs = [texts.add()]
    texts.write(seqs[0], prompt)
    seqs += [texts.fork(seqs[0]) for _ in range(3)]
    for _ in range(steps):
        for seq in seqs:
            texts.write(seq, 1)
    full = prompt // 4
    expected = full + 4 * (blocks(prompt + steps) - full)
    because = f"{full} full blocks of the prompt are shared by four samples, what follows is not"
    assert_equal(texts.cache.blocks_in_use, expected, because=because)
    texts.check_all("four samples of one prompt")


@task("PagedKVCache")
def test_a_fork_of_a_fork(solution, randn, device):
    texts = Texts(pages(solution, device), randn)
    one = texts.add()
    texts.write(one, 5)
    two = texts.fork(one)
    three = texts.fork(two)
    for seq in (two, three, one):
        texts.write(seq, 2)
        texts.check_all("three sequences share the first block")
    assert_equal(texts.cache.blocks_in_use, 4, because="one full block, and three times the one that follows")


@task("PagedKVCache")
def test_freed_blocks_come_back(solution, randn, device):
    texts = Texts(pages(solution, device, n_blocks=3), randn)
    seq, other = texts.add(), texts.add()
    texts.write(seq, 7)
    texts.write(other, 2)
    texts.cache.free(seq)
    del texts.content[seq]
    assert_equal(texts.cache.blocks_in_use, 1, because="two blocks were given back")
    texts.write(other, 10)
    texts.check_all("the blocks are used again")


@task("PagedKVCache")
@pytest.mark.parametrize("freed", ["parent", "child"])
def test_shared_blocks_stay_until_the_last_one_leaves(solution, randn, device, freed):
    texts = Texts(pages(solution, device), randn)
    parent = texts.add()
    texts.write(parent, 6)
    child = texts.fork(parent)
    gone, left = (parent, child) if freed == "parent" else (child, parent)
    texts.cache.free(gone)
    del texts.content[gone]
    texts.check_all("the other one still holds its blocks")
    texts.write(left, 1)
    assert_equal(texts.cache.blocks_in_use, 2, because="nobody else reads the block: it is written in place")
    texts.write(texts.add(), 9)
    texts.check_all("a new sequence gets other blocks")
    texts.cache.free(left)
    assert_equal(texts.cache.blocks_in_use, 3, because="only the new sequence is left")


@task("PagedKVCache")
def test_a_freed_sequence_is_unknown(solution, randn, device):
    cache = pages(solution, device)
    seq = cache.add()
    cache.free(seq)
    k = randn(2, 1, 3)
    assert_raises(KeyError, cache.update, seq, k, k, because="update of a freed sequence")
    assert_raises(KeyError, cache.fork, seq, because="fork of a freed sequence")
    assert_raises(KeyError, cache.free, seq, because="a sequence can be freed once")
    assert_raises(KeyError, cache.length, seq, because="length of a freed sequence")


@task("PagedKVCache")
def test_a_pool_can_be_filled(solution, randn, device):
    texts = Texts(pages(solution, device, n_blocks=3), randn)
    one, two = texts.add(), texts.add()
    texts.write(one, 6)
    texts.write(two, 4)
    texts.write(one, 2)
    texts.check_all("12 positions in 3 blocks of 4")
    assert_equal(texts.cache.blocks_in_use, 3, because="all blocks are in use")


@task("PagedKVCache")
@pytest.mark.parametrize("more", [5, 9])
def test_too_few_blocks_change_nothing(solution, randn, device, more):
    texts = Texts(pages(solution, device, n_blocks=4), randn)
    one, two = texts.add(), texts.add()
    texts.write(one, 6)
    texts.write(two, 4)
    k = randn(2, more + 2, 3)
    assert_raises(
        ValueError, texts.cache.update, one, k, k, mentions=["1"], because=f"1 block is free: {more} too many"
    )
    assert_equal(texts.cache.length(one), 6, because="a refused chunk leaves the length")
    assert_equal(texts.cache.blocks_in_use, 3, because="a refused chunk takes no block")
    texts.check_all("a refused chunk leaves the content")
    texts.write(one, 6)
    texts.check_all("and what fits is taken afterwards")


@task("PagedKVCache")
def test_a_copy_on_write_needs_a_block_too(solution, randn, device):
    texts = Texts(pages(solution, device, n_blocks=2), randn)
    one = texts.add()
    texts.write(one, 6)
    two = texts.fork(one)
    k = randn(2, 1, 3)
    assert_raises(
        ValueError, texts.cache.update, two, k, k, because="the shared block has to be copied, and none is free"
    )
    texts.check_all("a refused chunk leaves both")
    assert_equal(texts.cache.blocks_in_use, 2, because="a refused chunk takes no block")
    texts.cache.free(one)
    del texts.content[one]
    texts.write(two, 2)
    texts.check_all("alone it may write in place")


@task("PagedKVCache")
def test_a_batch_is_gathered_by_its_tables(solution, randn, device):
    texts = Texts(pages(solution, device), randn)
    seqs = [texts.add() for _ in range(3)]
    for seq, n in zip(seqs, (5, 2, 9), strict=True):
        texts.write(seq, n)
    chosen = [seqs[2], seqs[0], seqs[1]]
    keys, values, mask = texts.cache.read(chosen)
    assert_equal(
        (tuple(keys.shape), tuple(values.shape)), ((3, 2, 9, 3),) * 2, because="(N, Hkv, L, D) in the given order"
    )
    for i, (seq, n) in enumerate(zip(chosen, (9, 5, 2), strict=True)):
        assert_equal(keys[i, :, :n], texts.content[seq][0], because="the keys of each sequence, from place 0 on")
        assert_equal(values[i, :, :n], texts.content[seq][1], because="the values of each sequence, from place 0 on")
    assert_that(keys.isfinite() & values.isfinite(), "what pads is finite", value=keys)
    expected = torch.tensor([[True] * n + [False] * (9 - n) for n in (9, 5, 2)])[:, None, None]
    assert_equal(mask, expected, because="(N, 1, 1, L): True where a sequence has a position")


@task("PagedKVCache")
def test_attention_over_pages(solution, randn, device):
    texts = Texts(pages(solution, device, block=3), randn)
    one = texts.add()
    texts.write(one, 7)
    two = texts.fork(one)
    texts.write(two, 3)
    q = randn(2, 2, 1, 3)
    expected = [F.scaled_dot_product_attention(q[i], *texts.content[seq]) for i, seq in enumerate((one, two))]
    keys, values, mask = texts.cache.read([one, two])
    out = F.scaled_dot_product_attention(q, keys, values, mask)
    assert_close(out, torch.stack(expected), because="one query per sequence, as if each were alone")


@task("PagedKVCache")
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_bytes_of_the_pool(solution, randn, device, kind):
    cache, cost = measure(pages, solution, device, v_head_dim=5, dtype=kind)
    expected = 12 * 4 * 2 * (3 + 5) * kind.itemsize
    assert_that(cost.new_bytes == expected, "n_blocks * block_size positions, and no more", value=cost.new_bytes)
    seq, k, v = cache.add(), randn(2, 6, 3), randn(2, 6, 5)
    keys, values = cache.update(seq, k, v)
    assert_equal(keys.contiguous(), k.to(kind), because=f"a pool of {kind} converts what it stores")
    assert_equal(values.contiguous(), v.to(kind), because="values are 5 wide")
    assert_equal(cache.nbytes, expected, because="nbytes is the size of the pool, full or empty")
    keys, values, _ = cache.read([seq])
    assert_equal((keys.dtype, values.dtype), (kind, kind), because="a batch has the dtype of the pool")


@task("PagedKVCache")
@pytest.mark.parametrize("position", [0, 1])
def test_a_pool_keeps_no_graph(solution, randn, device, position):
    cache = pages(solution, device)
    seq = cache.add()
    chunks = [randn(2, 3, 3), randn(2, 3, 3)]
    update = lambda *chunks: cache.update(seq, *chunks)  # noqa: E731
    assert_graph_is_refused(update, chunks, position, "grad mode is on: refused as KVCache does")
    assert_equal(cache.length(seq), 3, because="only the update without grad mode counts")


@task("PagedKVCache")
@pytest.mark.parametrize(
    "k, v", [((1, 2, 3), (2, 2, 3)), ((2, 2, 1), (2, 2, 3)), ((2, 2, 3), (1, 2, 3)), ((2, 2, 3), (2, 2, 4))]
)
def test_chunks_that_do_not_fit_the_pool(solution, randn, device, k, v):
    cache = pages(solution, device)
    seq = cache.add()
    wrong = k if k != (2, 2, 3) else v
    mentions = [str(wrong), "(2, 4, 3)"]
    assert_raises(
        ValueError,
        cache.update,
        seq,
        randn(*k),
        randn(*v),
        mentions=mentions,
        because=f"blocks are (2, 4, 3), not {wrong}",
    )
    assert_equal((cache.length(seq), cache.blocks_in_use), (0, 0), because="a refused chunk changes nothing")


@task("PagedKVCache")
def test_a_value_for_each_key_in_pages(solution, randn, device):
    cache = pages(solution, device)
    seq = cache.add()
    mentions = ["(2, 3, 3)", "(2, 1, 3)"]
    assert_raises(
        ValueError, cache.update, seq, randn(2, 3, 3), randn(2, 1, 3), mentions=mentions, because="3 keys, 1 value"
    )


@task("PagedKVCache")
def test_a_pool_of_one_block(solution, randn, device):
    texts = Texts(pages(solution, device, n_blocks=1), randn)
    seq = texts.add()
    texts.write(seq, 3)
    texts.write(seq, 1)
    texts.check_all("four positions in one block of four")
