"""Day 25: what the tasks promise."""

import math
import random
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from checker.testing import (
    assert_close,
    assert_cost,
    assert_equal,
    assert_raises,
    assert_that,
    cost_case,
    measure,
    task,
)

A100 = SimpleNamespace(name="A100", flops=312e12, bandwidth=2.039e12, memory=80e9)
H100 = SimpleNamespace(name="H100", flops=989e12, bandwidth=3.35e12, memory=80e9)
H200 = SimpleNamespace(name="H200", flops=989e12, bandwidth=4.8e12, memory=141e9)


def machine(flops, bandwidth, memory=0):
    return SimpleNamespace(name="a machine", flops=flops, bandwidth=bandwidth, memory=memory)


def some_machine(seed):
    rng = random.Random(seed)
    bandwidth = rng.uniform(1e11, 9e12)
    return machine(bandwidth * rng.uniform(90, 400), bandwidth, rng.uniform(2e10, 2e11))


def arch(kind, **sizes):
    """A record with the fields of an Arch, and nothing else."""
    fields = dict.fromkeys(("kv_heads", "head_dim", "latent", "nope", "rope", "value"))
    return SimpleNamespace(**{"name": "a model", "kind": kind, "layers": 1, **fields, **sizes})


def latent(heads=128, layers=61, **changes):
    return arch(
        "mla", **{"layers": layers, "heads": heads, "latent": 512, "nope": 128, "rope": 64, "value": 128} | changes
    )


V3, V2, V2_LITE = latent(), latent(layers=60), latent(16, 27)
MATH = arch("mha", layers=30, heads=32, head_dim=128)


def some_arch(kind, seed):
    """A random record; all sizes differ."""
    rng = random.Random(f"{kind} {seed}")
    layers, heads, share, a, b, c, d = rng.sample(range(2, 24), 7)
    if kind == "mla":
        widths = {"latent": 20 + a, "nope": b, "rope": 2 * c, "value": d}
        return arch(kind, layers=layers, heads=heads, **widths)
    kv_heads = heads if kind == "gqa" else None
    return arch(kind, layers=layers, heads=heads * share if kind == "gqa" else heads, kv_heads=kv_heads, head_dim=a)


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


# from_datasheet


@task("from_datasheet")
@pytest.mark.parametrize(
    ("sheet", "flops", "bandwidth", "memory"),
    [
        (("A100", 624, 2.039, 80), 312e12, 2.039e12, 80e9),
        (("H100", 1979, 3.35, 80), 989.5e12, 3.35e12, 80e9),
        (("H200", 1979, 4.8, 141), 989.5e12, 4.8e12, 141e9),
    ],
)
def test_known_sheets_give_dense_flops(solution, sheet, flops, bandwidth, memory):
    hw = solution.from_datasheet(*sheet)
    because = f"{sheet[0]}: {sheet[1]} TFLOPS with sparsity, {sheet[2]} TB/s, {sheet[3]} GB"
    assert_close(numbers(hw.flops, hw.bandwidth, hw.memory), numbers(flops, bandwidth, memory), because=because)


@task("from_datasheet")
def test_a_random_sheet(solution, seed):
    rng = random.Random(seed)
    tflops, tb, gb = rng.uniform(100, 5000), rng.uniform(0.2, 9), rng.uniform(8, 300)
    hw = solution.from_datasheet("x", tflops, tb, gb)
    expected = numbers(tflops * 0.5e12, tb * 1e12, gb * 1e9)
    because = f"{tflops:.1f} TFLOPS with sparsity, {tb:.2f} TB/s, {gb:.1f} GB"
    assert_close(numbers(hw.flops, hw.bandwidth, hw.memory), expected, because=because)


@task("from_datasheet")
def test_the_name_is_kept(solution):
    assert_equal(solution.from_datasheet("B9000", 1, 1, 1).name, "B9000", because="the name of the sheet")


# ridge


@task("ridge")
@pytest.mark.parametrize(("hw", "known"), [(A100, 153), (H100, 295), (H200, 206)])
def test_known_ridges(solution, hw, known):
    found = solution.ridge(hw)
    assert_that(abs(found - known) < 0.5, f"{hw.name}: about {known} FLOPs per byte", value=float(found))


@task("ridge")
def test_the_ridge_of_a_random_machine(solution, seed):
    hw = some_machine(seed)
    assert_close(solution.ridge(hw), hw.flops / hw.bandwidth, because="FLOPs per byte")


# roofline


def four(found):
    return numbers(found.intensity, found.seconds, found.utilisation)


@task("roofline")
def test_work_that_waits_for_memory(solution):
    found = solution.roofline(600, 100, machine(flops=24, bandwidth=2))  # 25 s of computing, 50 s of moving
    assert_close(four(found), numbers(6.0, 50.0, 0.5), because="600 FLOPs at 24 per second, 100 bytes at 2 per second")


@task("roofline")
def test_work_that_waits_for_arithmetic(solution):
    found = solution.roofline(600, 30, machine(flops=24, bandwidth=2))  # 25 s and 15 s
    assert_close(four(found), numbers(20.0, 25.0, 1.0), because="600 FLOPs at 24 per second, 30 bytes at 2 per second")


@task("roofline")
@pytest.mark.parametrize(("bytes_", "bound"), [(100, "memory"), (51, "memory"), (50, "compute"), (49, "compute")])
def test_the_bound_is_the_slower_of_the_two(solution, bytes_, bound):
    found = solution.roofline(600, bytes_, machine(flops=24, bandwidth=2))
    because = f"600 FLOPs at 24 per second take 25 s, {bytes_} bytes at 2 per second take {bytes_ / 2} s"
    assert_equal(found.bound, bound, because=because)


@task("roofline")
def test_random_work(solution, seed):
    rng = random.Random(seed)
    hw = some_machine(seed)
    for _ in range(20):
        flops, bytes_ = 10 ** rng.uniform(6, 15), 10 ** rng.uniform(6, 12)
        a, b = Fraction(flops) / Fraction(hw.flops), Fraction(bytes_) / Fraction(hw.bandwidth)
        found = solution.roofline(flops, bytes_, hw)
        expected = numbers(flops / bytes_, float(max(a, b)), float(a / max(a, b)))
        assert_close(four(found), expected, because=f"{flops:.3g} FLOPs, {bytes_:.3g} bytes")
        assert_equal(found.bound, "memory" if b > a else "compute", because=f"{flops:.3g} FLOPs, {bytes_:.3g} bytes")


@task("roofline")
def test_below_the_ridge_utilisation_is_intensity_over_ridge(solution):
    found = solution.roofline(10**9, 10**9, H100)
    assert_close(found.utilisation, 3.35 / 989, because="one FLOP per byte on an H100: a third of a percent")


# matmul_cost


def pair(cost):
    kinds = [type(count).__name__ for count in (cost.flops, cost.bytes)]
    assert_equal(kinds, ["int", "int"], because="FLOPs and bytes are counts, and counts are ints")
    return (cost.flops, cost.bytes)


@task("matmul_cost")
@pytest.mark.parametrize(("dtype_", "size"), [(torch.bfloat16, 2), (torch.float32, 4), (torch.float64, 8)])
def test_a_product_that_really_runs_costs_as_much(solution, seed, device, dtype_, size):
    m, k, n = random.Random(seed).sample(range(2, 60), 3)
    a, b = torch.ones(m, k, dtype=dtype_, device=device), torch.ones(k, n, dtype=dtype_, device=device)
    c, cost = measure(torch.mm, a, b)
    expected = (cost.flops, a.nbytes + b.nbytes + c.nbytes)
    found = pair(solution.matmul_cost(m, k, n, size))
    assert_equal(found, expected, because=f"({m}, {k}) times ({k}, {n}), {size} bytes per number")


@task("matmul_cost")
def test_one_row_times_a_matrix(solution):
    found = pair(solution.matmul_cost(1, 4096, 1000, 2))
    expected = (8_192_000, 2 * (4096 + 4_096_000 + 1000))
    assert_equal(found, expected, because="(1, 4096) times (4096, 1000) in bfloat16")


# linear_decode_cost


@task("linear_decode_cost")
@pytest.mark.parametrize("batch", [1, 7])
def test_a_layer_that_really_runs_costs_as_much(solution, randn, seed, batch):
    n, k = random.Random(seed).sample(range(8, 40), 2)
    weight, x = randn(n, k), randn(batch, k)
    _, cost = measure(F.linear, x, weight)
    found = pair(solution.linear_decode_cost(n * k, batch, 4))
    assert_equal(found, (cost.flops, weight.nbytes), because=f"{n * k} weights in float32, batch {batch}")


@task("linear_decode_cost")
@pytest.mark.parametrize("batch", [1, 3, 500])
def test_the_batch_shares_the_weights(solution, batch):
    found = pair(solution.linear_decode_cost(7_000_000_000, batch))
    expected = (14_000_000_000 * batch, 14_000_000_000)
    assert_equal(found, expected, because=f"7 billion weights in bfloat16, batch {batch}: read once")


# compute_bound_batch


@task("compute_bound_batch")
@pytest.mark.parametrize(("hw", "known"), [(A100, 153), (H100, 295), (H200, 206)])
def test_in_bfloat16_the_batch_is_the_ridge(solution, hw, known):
    found = solution.compute_bound_batch(hw)
    assert_that(abs(found - known) < 0.5, f"{hw.name}: about {known} sequences", value=float(found))


@task("compute_bound_batch")
@pytest.mark.parametrize("size", [1, 4])
def test_smaller_weights_need_fewer_sequences(solution, seed, size):
    hw = some_machine(seed)
    expected = (
        Fraction(hw.flops) / Fraction(hw.bandwidth) * size / 2
    )  # 2 * params * batch FLOPs over params * size bytes
    assert_close(solution.compute_bound_batch(hw, size), float(expected), because=f"{size} bytes per weight")


# kv_elements_per_token

KINDS = ["mha", "gqa", "mqa", "mla"]


def kept(cfg):
    """The tensors that one token leaves in one layer, by shape."""
    if cfg.kind == "mla":
        return [(cfg.latent,), (cfg.rope,)]
    heads = {"mha": cfg.heads, "gqa": cfg.kv_heads, "mqa": 1}[cfg.kind]
    return [(heads, cfg.head_dim), (heads, cfg.head_dim)]


@task("kv_elements_per_token")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_keeps_what_it_needs(solution, seed, kind):
    cfg = some_arch(kind, seed)
    expected = cfg.layers * sum(math.prod(shape) for shape in kept(cfg))
    because = f"{kind}, {cfg.layers} layers, {cfg.heads} heads; in each layer {' and '.join(map(str, kept(cfg)))}"
    assert_equal(solution.kv_elements_per_token(cfg), expected, because=because)


@task("kv_elements_per_token")
@pytest.mark.parametrize(
    ("cfg", "known"),
    [
        (V3, 35_136),
        (V2_LITE, 15_552),
        (MATH, 245_760),
        (arch("gqa", layers=95, heads=64, kv_heads=8, head_dim=128), 194_560),
        (arch("mqa", layers=32, heads=71, head_dim=64), 4096),
    ],
    ids=["V3", "V2-Lite", "DeepSeekMath-7B", "DeepSeek-67B", "Falcon-7B"],
)
def test_known_models_keep_what_is_known(solution, cfg, known):
    assert_equal(solution.kv_elements_per_token(cfg), known, because=f"{cfg.kind}, {cfg.layers} layers")


@task("kv_elements_per_token")
@pytest.mark.parametrize("kind", ["", "MHA", "latent"])
def test_an_unknown_kind_is_refused(solution, kind):
    cfg = arch(kind, heads=4, kv_heads=2, head_dim=8, latent=5, rope=2)
    assert_raises(ValueError, solution.kv_elements_per_token, cfg, mentions=[kind])


# kv_table

ROWS = {
    "DeepSeek-V2-Lite": (15_552, 31_104, 31.104, 30.375, 64 / 9),
    "DeepSeek-V2": (34_560, 69_120, 69.12, 67.5, 512 / 9),
    "DeepSeek-V3": (35_136, 70_272, 70.272, 68.625, 512 / 9),
    "MLA with 64 heads": (35_136, 70_272, 70.272, 68.625, 256 / 9),
    "DeepSeek-67B": (194_560, 389_120, 389.12, 380.0, 8.0),
    "DeepSeekMath-7B": (245_760, 491_520, 491.52, 480.0, 1.0),
    "Llama-3.1-405B": (258_048, 516_096, 516.096, 504.0, 16.0),
    "Qwen2.5-72B": (163_840, 327_680, 327.68, 320.0, 8.0),
}


@task("kv_table")
def test_the_rows_are_the_models(solution):
    found = [row.name for row in solution.kv_table()]
    assert_equal(found, list(ROWS), because="one row for each of MODELS, in their order")


@task("kv_table")
@pytest.mark.parametrize("number", range(8), ids=list(ROWS))
def test_a_row_has_the_known_numbers(solution, number):
    row = solution.kv_table()[number]
    found = numbers(row.elements, row.bytes, row.kilobytes, row.kibibytes, row.ratio)
    because = f"{list(ROWS)[number]}: elements, bytes, kB, KiB, ratio"
    assert_close(found, numbers(*list(ROWS.values())[number]), because=because)


@task("kv_table")
def test_elements_and_bytes_are_ints(solution):
    row = solution.kv_table()[0]
    found = [type(row.elements).__name__, type(row.bytes).__name__]
    assert_equal(found, ["int", "int"], because="elements and bytes are counts")


# reduction_claim

CLAIMS = {
    "7.11x": (Fraction(2 * 16 * 128, 512 + 64), ("mha", 16, 16)),
    "28.44x": (Fraction(2 * 64 * 128, 512 + 64), ("mha", 64, 16)),
    "56.89x": (Fraction(2 * 128 * 128, 512 + 64), ("mha", 128, 16)),
    "82.2%": (1 - Fraction(60 * 576, 95 * 2048), ("gqa", 8, 16)),
    "93.3%": (1 - Fraction(60 * 576 * 6, 95 * 2048 * 16), ("gqa", 8, 6)),
}


@task("reduction_claim")
@pytest.mark.parametrize("claim", list(CLAIMS))
def test_the_number_is_the_quoted_one(solution, claim):
    found = solution.reduction_claim()[claim].value
    assert_close(found, float(CLAIMS[claim][0]), because=f"{claim}, not rounded")


@task("reduction_claim")
@pytest.mark.parametrize("claim", list(CLAIMS))
def test_the_assumption_belongs_to_it(solution, claim):
    found = solution.reduction_claim()[claim]
    because = f"{claim}: what the cache is compared with, how many heads keep keys and values there, bits after"
    assert_equal((found.baseline, found.heads, found.bits), CLAIMS[claim][1], because=because)


@task("reduction_claim")
def test_there_are_five_claims(solution):
    assert_equal(sorted(solution.reduction_claim()), sorted(CLAIMS), because="the five keys")


# attention_decode_cost


def ran(cfg, batch, length, queries, absorbed, device):
    """FLOPs of attention that really runs, and the bytes of the tensors that it has to move."""

    def new(*shape):
        return torch.ones(shape, device=device)

    H, B, L, t = cfg.heads, batch, length, queries
    if cfg.kind != "mla":
        heads = {"mha": H, "gqa": cfg.kv_heads, "mqa": 1}[cfg.kind]
        cache = k, v = new(B, heads, L, cfg.head_dim), new(B, heads, L, cfg.head_dim)
        rows = new(B, heads, H // heads * t, cfg.head_dim)
        return measure(lambda: rows @ k.mT @ v)[1].flops, sum(x.nbytes for x in cache)
    cache = c, rotated = new(B, L, cfg.latent), new(B, L, cfg.rope)
    moved = sum(x.nbytes for x in cache)
    if absorbed:
        q_latent, q_rotated = new(B, H * t, cfg.latent), new(B, H * t, cfg.rope)
        return measure(lambda: (q_latent @ c.mT + q_rotated @ rotated.mT) @ c)[1].flops, moved
    q, up = new(B, H, t, cfg.nope + cfg.rope), new(H, cfg.latent, cfg.nope + cfg.value)

    def naive():
        made = c[:, None] @ up  # (B, H, L, nope + value)
        k = torch.cat([made[..., : cfg.nope], rotated[:, None].expand(B, H, L, cfg.rope)], -1)
        q @ k.mT @ made[..., cfg.nope :]
        return made.nbytes

    made, cost = measure(naive)
    return cost.flops, moved + 2 * made


def said(solution, cfg, *args, **kwargs):
    return pair(solution.attention_decode_cost(cfg, *args, **kwargs))


@task("attention_decode_cost")
@pytest.mark.parametrize("kind", KINDS)
def test_attention_that_really_runs_costs_as_much(solution, seed, device, kind):
    cfg = some_arch(kind, seed)
    expected = ran(cfg, 3, 11, 1, True, device)
    assert_equal(said(solution, cfg, 3, 11, 4), expected, because=f"{kind} in float32, batch 3, cache of 11 tokens")


@task("attention_decode_cost")
def test_expanding_the_latents_costs_what_it_costs(solution, seed, device):
    cfg = some_arch("mla", seed)
    expected = ran(cfg, 2, 13, 1, False, device)
    found = said(solution, cfg, 2, 13, 4, absorbed=False)
    assert_equal(found, expected, because="mla in float32, batch 2, 13 latents, keys and values made first")


@task("attention_decode_cost")
@pytest.mark.parametrize("absorbed", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_more_queries_read_the_cache_once(solution, seed, device, kind, absorbed):
    cfg = some_arch(kind, seed)
    expected = ran(cfg, 2, 9, 5, absorbed, device)
    found = said(solution, cfg, 2, 9, 4, absorbed=absorbed, queries=5)
    assert_equal(found, expected, because=f"{kind}, 5 queries, 9 cached tokens, absorbed={absorbed}")


@task("attention_decode_cost")
@pytest.mark.parametrize("size", [1, 2, 8])
def test_each_number_of_the_cache_takes_its_bytes(solution, size):
    found = said(solution, V3, 4, 100, size)
    assert_equal(found, (4 * 100 * 128 * 2176, 4 * 100 * 576 * size), because=f"V3, batch 4, length 100, {size} bytes")


@task("attention_decode_cost")
def test_the_cost_is_that_of_one_layer(solution):
    found = [said(solution, latent(layers=n), 1, 10, 2) for n in (1, 61)]
    assert_equal(found, [(2_785_280, 11_520)] * 2, because="models of 1 and of 61 layers")


@task("attention_decode_cost")
@pytest.mark.parametrize(
    ("cfg", "known"),
    [
        (arch("mha", heads=32, head_dim=128), 1),
        (arch("gqa", heads=64, kv_heads=8, head_dim=128), 8),
        (arch("mqa", heads=71, head_dim=64), 71),
        (V2_LITE, 2 * 16 * 1088 / 1152),
        (V3, 2 * 128 * 1088 / 1152),
    ],
    ids=["mha", "gqa", "mqa", "mla, 16 heads", "mla, 128 heads"],
)
@pytest.mark.parametrize("batch", [1, 64])
def test_the_batch_does_not_move_the_intensity(solution, cfg, known, batch):
    cost = solution.attention_decode_cost(cfg, batch, 4096, 2)
    because = f"{cfg.kind}, {cfg.heads} heads, batch {batch}: FLOPs per byte in bfloat16"
    assert_close(cost.flops / cost.bytes, known, because=because)


@task("attention_decode_cost")
def test_absorbed_attention_computes_more_than_expanded_caches_and_less_than_expanding(solution):
    absorbed = solution.attention_decode_cost(V3, 1, 500, 2).flops
    each = solution.attention_decode_cost(V3, 1, 500, 2, absorbed=False).flops
    expanded = 500 * 128 * 2 * (128 + 64 + 128)  # keys and values of all heads at hand
    found = numbers(absorbed / expanded, (each - expanded) / absorbed)
    because = (
        "V3: 3.40 times the FLOPs of attention over ready keys and values, expanding them alone takes 120 times as many"
    )
    assert_close(found, numbers(1088 / 320, 262144 / 2176), because=because)


@task("attention_decode_cost")
@pytest.mark.parametrize("absorbed", [True, False])
def test_no_attention_of_an_unknown_kind(solution, absorbed):
    cfg = arch("swa", heads=4, kv_heads=2, head_dim=8, latent=5, rope=2, nope=3, value=4)
    assert_raises(ValueError, solution.attention_decode_cost, cfg, 1, 1, 2, absorbed=absorbed, mentions=["swa"])


@task("attention_decode_cost")
def test_counting_makes_no_tensor(solution):
    assert_cost(solution.attention_decode_cost, V3, 64, 10**6, 2, max_calls=0, max_new_bytes=0)


# naive_vs_absorbed_crossover


def flops_of(cfg, queries, absorbed):
    """FLOPs per cached token, as the products run."""
    if absorbed:
        return 2 * cfg.heads * queries * (cfg.latent + cfg.rope + cfg.latent)
    made = 2 * cfg.heads * cfg.latent * (cfg.nope + cfg.value)
    return made + 2 * cfg.heads * queries * (cfg.nope + cfg.rope + cfg.value)


@task("naive_vs_absorbed_crossover")
def test_the_released_models_meet_at_171(solution):
    found = solution.naive_vs_absorbed_crossover(V3)
    assert_close(found, 512 / 3, because="V2 and V3: 512 * 256 / 768 = 170.67")


@task("naive_vs_absorbed_crossover")
def test_heads_and_the_rotated_key_play_no_part(solution):
    found = solution.naive_vs_absorbed_crossover(latent(heads=2, rope=1000))
    assert_close(found, 512 / 3, because="2 heads and a rotated key of 1000: both orders have them alike")


@task("naive_vs_absorbed_crossover")
@pytest.mark.parametrize("number", range(3))
def test_the_first_cheaper_block_is_just_above(solution, seed, number):
    rng = random.Random(seed + number)
    cfg = latent(3, latent=rng.randrange(40, 90), nope=rng.randrange(8, 40), rope=8, value=rng.randrange(8, 39))
    found = solution.naive_vs_absorbed_crossover(cfg)
    first = next(t for t in range(1, 10**5) if flops_of(cfg, t, False) < flops_of(cfg, t, True))
    ok = math.floor(found + 1e-9) + 1 == first
    sizes = f"latent {cfg.latent}, nope {cfg.nope}, value {cfg.value}"
    assert_that(ok, f"{sizes}: naive gets cheaper at {first} queries", value=float(found))


@task("naive_vs_absorbed_crossover")
def test_a_gain_of_one_is_a_gain(solution):
    found = solution.naive_vs_absorbed_crossover(latent(4, latent=10, nope=12, value=7))
    assert_close(found, 190.0, because="latent 10, nope 12, value 7: absorbed is dearer by one multiply-add per query")


@task("naive_vs_absorbed_crossover")
@pytest.mark.parametrize(("rank", "nope", "value"), [(10, 12, 9), (10, 12, 8), (4, 50, 70)])
def test_narrow_latents_are_never_worth_expanding(solution, rank, nope, value):
    found = solution.naive_vs_absorbed_crossover(latent(4, latent=rank, nope=nope, value=value))
    assert_equal(found, math.inf, because=f"latent {rank}, nope {nope}, value {value}: absorbed always wins")


# max_batch


@task("max_batch")
@pytest.mark.parametrize(
    ("kept_", "known"), [(491_520, 56), (122_880, 224), (34_560, 798)], ids=["MHA", "GQA of 8", "MLA"]
)
def test_a_7b_model_on_one_h200(solution, kept_, known):
    found = solution.max_batch(H200, 13_820_731_392, kept_, 4096)
    assert_equal(found, known, because=f"141 GB, a tenth of it reserved, {kept_:,} bytes per token, 4096 tokens")


@task("max_batch")
def test_random_models_fill_the_memory(solution, seed):
    rng = random.Random(seed)
    for _ in range(10):
        hw = machine(1.0, 1.0, 1000.0 * rng.randrange(10**7, 10**8))
        weights, size = rng.randrange(10**6, 5 * 10**9), rng.randrange(10**5, 10**6)
        context = rng.randrange(1000, 9000)
        reserve = rng.uniform(0.05, 0.4)
        room = Fraction(hw.memory) * (1 - Fraction(reserve)) - weights
        found = solution.max_batch(hw, weights, size, context, reserve)
        because = f"{hw.memory:,.0f} bytes, reserve {reserve:.3f}, weights {weights:,}, {size} * {context} per sequence"
        assert_equal(found, math.floor(room / (size * context)), because=because)


@task("max_batch")
def test_the_last_byte_may_be_used(solution):
    found = solution.max_batch(machine(1, 1, 1000), 100, 10, 8, reserve=0.5)
    assert_equal(found, 5, because="1000 bytes, half of them reserved, weights of 100, 80 per sequence")


@task("max_batch")
@pytest.mark.parametrize(("weights", "context"), [(900, 1), (2000, 1), (100, 90)])
def test_what_does_not_fit_gives_zero(solution, weights, context):
    found = solution.max_batch(machine(1, 1, 1000), weights, 10, context, reserve=0.125)
    assert_equal(found, 0, because=f"875 bytes, weights of {weights}, {10 * context} per sequence")


# decode_step_seconds


@task("decode_step_seconds")
def test_a_step_that_waits_for_memory(solution):
    found = solution.decode_step_seconds(machine(1000, 10), 300, 2, 4, 25, 20)
    assert_close(found, 50.0, because="300 bytes of weights and 4 * 25 * 2 of caches, at 10 per second")


@task("decode_step_seconds")
def test_a_step_that_waits_for_arithmetic(solution):
    found = solution.decode_step_seconds(machine(16, 10), 300, 2, 4, 25, 800)
    assert_close(found, 200.0, because="4 tokens of 800 FLOPs at 16 per second; moving takes 50 s")


@task("decode_step_seconds")
def test_random_steps(solution, seed):
    rng = random.Random(seed)
    hw = some_machine(seed)
    for _ in range(20):
        weights, size, batch = rng.uniform(1e9, 1e11), rng.uniform(1e4, 1e6), rng.randrange(1, 600)
        context, flops = rng.randrange(100, 30000), rng.uniform(1e9, 2e12)
        moving = (weights + batch * (context * size)) / hw.bandwidth
        found = solution.decode_step_seconds(hw, weights, size, batch, context, flops)
        because = f"batch {batch}, context {context}"
        assert_close(found, max(moving, batch * flops / hw.flops), because=because)


@task("decode_step_seconds")
def test_a_batch_shares_the_weights_and_never_the_caches(solution):
    each = [solution.decode_step_seconds(H200, 14e9, 491_520, b, 4096, 14e9) / b for b in (1, 10, 10**9)]
    caches = 491_520 * 4096 / 4.8e12
    expected = numbers(14e9 / 4.8e12 + caches, 14e8 / 4.8e12 + caches, caches)
    because = "seconds per token, batch 1, 10 and a billion: what is left in the end is the cache"
    assert_close(numbers(*each), expected, because=because, rtol=1e-6)


# Meter


def counts(meter):
    names = ("flops", "calls", "bytes_allocated", "live_bytes", "peak_bytes")
    return {name: getattr(meter, name) for name in names}


def metered(solution, fn, *args, **kwargs):
    """Run under a new meter; return it, and keep the result alive until the counts are taken."""
    with solution.Meter() as meter:
        result = fn(*args, **kwargs)
        found = counts(meter)
    return result, found


PRODUCTS = {
    "mm": (lambda r: (r(3, 4), r(4, 5)), torch.mm, 2 * 3 * 4 * 5),
    "bmm": (lambda r: (r(2, 3, 4), r(2, 4, 5)), torch.bmm, 2 * 2 * 3 * 4 * 5),
    "mv": (lambda r: (r(3, 4), r(4)), torch.mv, 2 * 3 * 4),
    "dot": (lambda r: (r(7), r(7)), torch.dot, 2 * 7),
    "addmm": (lambda r: (r(5), r(3, 4), r(4, 5)), torch.addmm, 2 * 3 * 4 * 5),
    "baddbmm": (lambda r: (r(2, 3, 5), r(2, 3, 4), r(2, 4, 5)), torch.baddbmm, 2 * 2 * 3 * 4 * 5),
    "addmv": (lambda r: (r(3), r(3, 4), r(4)), torch.addmv, 2 * 3 * 4),
    "in place": (lambda r: (r(3, 5), r(3, 4), r(4, 5)), torch.Tensor.addmm_, 2 * 3 * 4 * 5),
    "with a beta": (
        lambda r: (r(3, 5), r(3, 4), r(4, 5)),
        lambda a, b, c: torch.addmm(a, b, c, beta=0.5),
        2 * 3 * 4 * 5,
    ),
    "linear": (lambda r: (r(2, 3, 4), r(5, 4), r(5)), F.linear, 2 * 2 * 3 * 4 * 5),
    "heads": (lambda r: (r(2, 3, 4, 5), r(2, 3, 5, 6)), torch.matmul, 2 * 2 * 3 * 4 * 5 * 6),
    "einsum": (lambda r: (r(2, 3, 4), r(3, 5, 4)), lambda a, b: torch.einsum("bhd,hed->bhe", a, b), 2 * 2 * 3 * 5 * 4),
    "conv1d": (lambda r: (r(2, 3, 9), r(5, 3, 4)), F.conv1d, 2 * 2 * 5 * 6 * 3 * 4),
    "conv2d": (
        lambda r: (r(2, 3, 9, 8), r(5, 3, 3, 2)),
        lambda x, w: F.conv2d(x, w, stride=2, padding=1),
        2 * 2 * 5 * 5 * 5 * 3 * 3 * 2,
    ),
    "conv of groups": (
        lambda r: (r(2, 6, 9), r(4, 3, 2)),
        lambda x, w: F.conv1d(x, w, groups=2),
        2 * 2 * 4 * 8 * 3 * 2,
    ),
}


@task("Meter")
@pytest.mark.parametrize("name", list(PRODUCTS))
def test_products_have_two_flops_per_multiply_add(solution, randn, name):
    make, fn, expected = PRODUCTS[name]
    _, found = metered(solution, fn, *make(randn))
    assert_equal(found["flops"], expected, because=name)


@task("Meter")
def test_torchs_own_counter_agrees_on_what_it_knows(solution, randn):
    x, w, image, filters = randn(4, 6), randn(6, 5), randn(2, 3, 7, 7), randn(4, 3, 3, 3)

    def program():
        return torch.addmm(x @ w, x, w), torch.bmm(x[None], w[None]), F.conv2d(image, filters)

    with FlopCounterMode(display=False) as counter:
        program()
    _, found = metered(solution, program)
    assert_equal(found["flops"], counter.get_total_flops(), because="mm, addmm, bmm and a convolution")


@task("Meter")
def test_other_operations_have_no_flops(solution, randn):
    x = randn(4, 6)
    _, found = metered(
        solution, lambda: ((x * x).sum(), x.softmax(-1), x + 1, x.relu_(), x.mT, torch.outer(x[0], x[1]))
    )
    assert_equal(found["flops"], 0, because="no matrix product, no convolution")


@task("Meter")
def test_a_new_meter_has_counted_nothing(solution):
    expected = {"flops": 0, "calls": 0, "bytes_allocated": 0, "live_bytes": 0, "peak_bytes": 0}
    assert_equal(counts(solution.Meter()), expected, because="nothing has run")


VIEWS = {
    "transpose": lambda x: x.mT,
    "reshape to a view": lambda x: x.reshape(6, 4),
    "slice": lambda x: x[1:, :, ::2],
    "expand": lambda x: x[:, None].expand(2, 7, 3, 4),
    "split": lambda x: x.split(1, dim=1),
    "unbind": lambda x: x.unbind(0),
    "detach": lambda x: x.detach(),
}


@task("Meter")
@pytest.mark.parametrize("name", list(VIEWS))
def test_views_are_free(solution, randn, name):
    x = randn(2, 3, 4)
    _, found = metered(solution, VIEWS[name], x)
    assert_equal(found, dict.fromkeys(found, 0), because=f"{name}: nothing is written, nothing is new")


CALLS = {
    "one that makes a tensor": (lambda x: x + 1, 1, 96),
    "a chain of two": (lambda x: (x + 1) * 2, 2, 192),
    "a product with three axes": (lambda x: x @ x[0].mT, 1, 72),
    "a copy": (lambda x: x.mT.contiguous(), 1, 96),
    "another dtype": (lambda x: x.to(torch.float64), 1, 192),
    "a mask": (lambda x: x > 0, 1, 24),
    "keyword arguments": (lambda x: x.sum(dtype=torch.float64), 1, 8),
    "a list of arguments": (lambda x: torch.cat([x, x]), 1, 192),
    "two results": (lambda x: x.max(dim=0), 1, 12 * 4 + 12 * 8),
    "from nothing": (lambda x: torch.zeros(5, device=x.device), 1, 20),
    "in place": (lambda x: x.add_(1), 1, 0),
    "into a slice": (lambda x: x[0].zero_(), 1, 0),
    "in place on something new": (lambda x: (x + 1).relu_(), 2, 96),
    "copy_": (lambda x: x[0].copy_(x[1]), 1, 0),
    "a view of something new": (lambda x: (x + 1).mT[0], 1, 96),
    "a number read out": (lambda x: x.sum().item(), 2, 4),
    "a question": (lambda x: torch.equal(x, x.mT.mT), 1, 0),
}


@task("Meter")
@pytest.mark.parametrize("name", list(CALLS))
def test_what_does_something_is_a_call_and_new_memory_has_bytes(solution, randn, name):
    fn, calls, new = CALLS[name]
    _, found = metered(solution, fn, randn(2, 3, 4))
    assert_equal((found["calls"], found["bytes_allocated"]), (calls, new), because=f"{name}: calls, bytes allocated")


@task("Meter")
def test_memory_that_was_given_is_not_new(solution, randn):
    x, y = randn(5), randn(5)
    _, found = metered(solution, torch.add, x, x, out=y)
    expected = {"flops": 0, "calls": 1, "bytes_allocated": 0, "live_bytes": 0, "peak_bytes": 0}
    assert_equal(found, expected, because="add(x, x, out=y)")


def three(found):
    return (found["bytes_allocated"], found["live_bytes"], found["peak_bytes"])


@task("Meter")
def test_a_temporary_that_is_freed_lowers_the_live_count(solution, randn):
    x = randn(10)
    with solution.Meter() as meter:
        a = x + 1
        first = three(counts(meter))
        del a
        found = [first, three(counts(meter))]
    assert_equal(found, [(40, 40, 40), (40, 0, 40)], because="40 bytes made and freed: (allocated, live, peak) twice")


@task("Meter")
def test_the_peak_is_the_most_that_lived_at_once(solution, randn):
    x = randn(10)

    def program():
        big = torch.cat([x, x, x])  # 120
        small = big[:5] * 2  # 20 more
        del big
        last = small + 1  # 20 more, after 120 fewer
        return last

    kept_, found = metered(solution, program)
    assert_equal(three(found), (160, 20, 140), because="(allocated, live, peak) of 120, 20 and 20 bytes")
    assert kept_.shape == (5,)


@task("Meter")
def test_one_after_the_other_is_not_at_once(solution, randn):
    x = randn(10)

    def program():
        for _ in range(6):
            y = x * 2
            del y

    _, found = metered(solution, program)
    assert_equal(three(found), (240, 0, 40), because="six times 40 bytes, each freed before the next")


@task("Meter")
def test_a_small_view_keeps_all_of_its_memory(solution, randn):
    x = randn(10)
    kept_, found = metered(solution, lambda: (x + 1)[:2])
    assert_equal(three(found), (40, 40, 40), because="two numbers of a new tensor of ten are kept")
    assert kept_.shape == (2,)


@task("Meter")
def test_memory_outlives_the_tensor_that_was_returned_first(solution, randn):
    x = randn(10)
    kept_, found = metered(solution, lambda: (x + 1).detach())
    assert_equal(
        three(found), (40, 40, 40), because="x + 1 is gone, but what detach made of it lies in the same memory"
    )
    assert kept_.shape == (10,)


@task("Meter")
def test_meters_nest(solution, randn):
    x = randn(4, 4)
    with solution.Meter() as outer:
        a = x @ x
        with solution.Meter() as inner:
            b = a @ x + a
        c = b * 2
    assert_equal(
        [(m.flops, m.calls, m.bytes_allocated) for m in (outer, inner)],
        [(256, 4, 256), (128, 2, 128)],
        because="(FLOPs, calls, bytes) outside and inside: what runs inside counts for both",
    )
    assert c.shape == (4, 4)


@task("Meter")
def test_entered_again_it_goes_on_counting(solution, randn):
    x = randn(4, 4)
    meter = solution.Meter()
    with meter:
        a = x @ x
    b = a @ x
    with meter:
        c = b @ x
    assert_equal((meter.flops, meter.calls), (256, 2), because="two of three products ran inside")
    assert c.shape == (4, 4)


@task("Meter")
def test_results_are_the_same_with_a_meter(solution, randn):
    x, w = randn(3, 4), randn(5, 4)
    expected = F.linear(x, w).softmax(-1)
    with solution.Meter():
        found = F.linear(x, w).softmax(-1)
    assert_equal(found, expected, because="softmax of a linear layer, bit by bit")


def training_step(x, layers, head):
    for weight in layers:
        x = torch.tanh(x @ weight) + x
    weights = (x @ x.mT / x.shape[-1] ** 0.5).softmax(-1)
    loss = F.cross_entropy((weights @ x) @ head, torch.zeros(len(x), dtype=torch.long, device=x.device))
    loss.backward()
    return loss.detach()


def parts(randn):
    return randn(5, 6), [randn(6, 6).requires_grad_() for _ in range(3)], randn(6, 4).requires_grad_()


@task("Meter")
def test_backward_passes_count(solution, randn):
    x, w = randn(3, 4).requires_grad_(), randn(4, 5).requires_grad_()
    _, found = metered(solution, lambda: (x @ w).sum().backward())
    assert_equal(found["flops"], 3 * 2 * 3 * 4 * 5, because="one product forward, two backward")


@task("Meter")
def test_a_training_step_has_the_counts_of_another_meter(solution, randn):
    inputs = parts(randn)
    _, cost = measure(training_step, *inputs)
    for w in (*inputs[1], inputs[2]):
        w.grad = None
    _, found = metered(solution, training_step, *inputs)
    expected = {"flops": cost.flops, "calls": cost.calls, "bytes_allocated": cost.new_bytes}
    found = {name: found[name] for name in expected}
    assert_equal(found, expected, because="three layers, attention, cross-entropy, and back")


@task("Meter")
def test_two_runs_count_the_same(solution, randn):
    inputs = parts(randn)
    found = []
    for _ in range(2):
        for w in (*inputs[1], inputs[2]):
            w.grad = None
        found.append(metered(solution, training_step, *inputs)[1])
    assert_equal(found[1], found[0], because="the same training step, twice")


@task("Meter")
def test_the_meter_runs_nothing_of_its_own(solution, randn):
    x, filters = randn(2, 3, 9), randn(4, 3, 2)

    def program():
        y = F.conv1d(x, filters)
        return (y @ y.mT).add_(1).sum(), torch.addmm(y[0, :, :4], y[0, :, :4], y[1, :, 4:].mT), y[0] @ y[0, 0]

    _, without = measure(program)
    _, cost = measure(metered, solution, program)
    assert_equal(cost.ops, without.ops, because="what another meter sees, with yours and without")


@cost_case("Meter")
def training_under_a_meter(module, randn):
    inputs = parts(randn)

    def run():
        with module.Meter():
            training_step(*inputs)

    return run


# regime_borders


def waits(hw, cfg, weight_bytes, weight_flops, context, queries, size, batch):
    """(caches outweigh weights, computing outlasts moving), in exact arithmetic."""
    per_token = cfg.layers * sum(math.prod(shape) for shape in kept(cfg))
    caches = batch * context * per_token * size
    if cfg.kind == "mla":
        widths = cfg.latent + cfg.rope + cfg.latent
    else:
        widths = 2 * cfg.head_dim
    flops = batch * queries * (Fraction(weight_flops) + 2 * cfg.layers * cfg.heads * widths * context)
    moving = (Fraction(weight_bytes) + caches) / Fraction(hw.bandwidth)
    return caches >= weight_bytes, flops / Fraction(hw.flops) >= moving


def borders(*args):
    """The first batches of up to 20,000 for which each of the two holds, by bisection."""
    found = []
    for which in (0, 1):
        low, high = 0, 20_000
        while low + 1 < high:
            middle = (low + high) // 2
            if waits(*args, middle)[which]:
                high = middle
            else:
                low = middle
        found.append(high if high < 20_000 else None)
    return tuple(found)


@task("regime_borders")
@pytest.mark.parametrize("queries", [1, 2])
@pytest.mark.parametrize("context", [1000, 4096, 32768, 131072])
def test_v3_on_an_h200(solution, context, queries):
    expected = borders(H200, V3, 37e9, 74e9, context, queries, 2)
    found = solution.regime_borders(H200, V3, 37e9, 74e9, context, queries)
    because = f"V3, 37 GB of active weights, caches of {context} tokens in bfloat16, {queries} new tokens at a time"
    assert_equal(found, expected, because=because)


@task("regime_borders")
@pytest.mark.parametrize(("context", "known"), [(4096, (129, 91)), (32768, (17, 49))])
def test_known_borders_of_v3(solution, context, known):
    found = solution.regime_borders(H200, V3, 37e9, 74e9, context)
    assert_equal(found, known, because=f"V3, 37 GB of active weights, caches of {context} tokens, one new token")


@task("regime_borders")
@pytest.mark.parametrize(
    "cfg", [MATH, arch("gqa", layers=30, heads=32, kv_heads=8, head_dim=128), V2_LITE], ids=["mha", "gqa", "16 heads"]
)
@pytest.mark.parametrize("size", [1, 4])
def test_few_heads_per_key_never_wait_for_arithmetic(solution, cfg, size):
    expected = borders(H200, cfg, 14e9, 14e9, 16384, 1, size)
    found = solution.regime_borders(H200, cfg, 14e9, 14e9, 16384, dtype_bytes=size)
    because = f"{cfg.kind}, {cfg.heads} heads, caches of 16384 tokens, {size} bytes per number"
    assert_equal(found, expected, because=because)


TINY = arch("mha", layers=1, heads=1, head_dim=1)  # 4 tokens: 16 bytes in bfloat16, 16 FLOPs


@task("regime_borders")
@pytest.mark.parametrize(
    ("weight_bytes", "weight_flops", "expected"),
    [(64, 48, (4, 4)), (65, 48, (5, 5)), (64, 16, (4, None)), (64, 15, (4, None)), (3, 48, (1, 1))],
)
def test_borders_that_can_be_done_by_hand(solution, weight_bytes, weight_flops, expected):
    found = solution.regime_borders(machine(64, 32), TINY, weight_bytes, weight_flops, 4)
    because = f"64 FLOPs and 32 bytes per second, {weight_bytes} bytes and {weight_flops} FLOPs of weights, caches of 16 bytes"
    assert_equal(found, expected, because=because)
