"""Day 27: what the tasks promise."""

import contextlib

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

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

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
TOLERANCE = {F32: {"rtol": 1e-4, "atol": 1e-4}, F64: {"rtol": 1e-10, "atol": 1e-11}}
GOLDEN = {"rtol": 1e-5, "atol": 1e-5}
CASES = {"v2": None, "v2.compressed": 16, "v3.compressed": 16}  # name: rq


def array(x):
    """A float64 copy in numpy that the solution cannot touch."""
    return x.detach().double().cpu().numpy().copy()


def tensor(x, dtype=F64):
    return torch.from_numpy(np.ascontiguousarray(x)).to(dtype)


def tables(rand, *shape, dtype=F32):
    """Cosines and sines (..., dr/2) of random angles."""
    angles = rand(*shape, dtype=F64) * 6 - 3
    return angles.cos().to(dtype), angles.sin().to(dtype)


def turned(x, cos, sin):
    """Neighboring pairs of x (..., T, dr) as complex numbers, turned; the tables are broadcast by the caller."""
    pairs = x[..., 0::2] + 1j * x[..., 1::2]
    pairs = pairs * (cos + 1j * sin)
    out = np.empty_like(x)
    out[..., 0::2], out[..., 1::2] = pairs.real, pairs.imag
    return out


def normed(x, gain, eps=1e-6):
    """The definition, row by row."""
    out = np.empty_like(x)
    for place in np.ndindex(*x.shape[:-1]):
        row = x[place]
        out[place] = gain * row / np.sqrt(sum(v * v for v in row) / len(row) + eps)
    return out


def torch_turned(x, cos, sin):
    """The same with gradients, as a matrix product per pair."""
    turn = torch.stack((torch.stack((cos, -sin), -1), torch.stack((sin, cos), -1)), -2)
    return (turn @ x.unflatten(-1, (-1, 2))[..., None])[..., 0].flatten(-2)


def torch_normed(x, gain, eps=1e-6):
    return gain * x / ((x**2).mean(-1, keepdim=True) + eps).sqrt()


def filled(module, **weights):
    """Copy weights, given by name with __ for a dot, into a module that must have these parameters and no others."""
    wanted = {name.replace("__", "."): weight for name, weight in weights.items()}
    found = {name: tuple(weight.shape) for name, weight in module.named_parameters()}
    assert_equal(
        found,
        {name: tuple(weight.shape) for name, weight in wanted.items()},
        because="parameters have the names and shapes of the checkpoint, and there are no others",
    )
    some = next(iter(wanted.values()))
    module = module.to(device=some.device, dtype=some.dtype)
    with torch.no_grad():
        for name, weight in wanted.items():
            module.get_parameter(name).copy_(weight)
    return module


def golden(data_dir, device, case):
    """Weights and intermediate tensors of one layer of transformers."""
    data = load_file(data_dir / "golden.safetensors")
    return {name.split("/")[1]: x.to(device) for name, x in data.items() if name.split("/")[0] == case}


def weights_in(data, *names):
    return {name.replace(".", "__"): data[name] for name in names}


def assert_module_gradients(module, oracle, inputs, fixed, because):
    """Same gradients of the inputs and of all parameters as `oracle(inputs, parameters)`."""
    mine = [x.clone().requires_grad_() for x in inputs]
    theirs = [x.clone().requires_grad_() for x in inputs]
    copies = {name: weight.detach().clone().requires_grad_() for name, weight in module.named_parameters()}
    found, wanted = module(*mine, *fixed), oracle(*theirs, copies)
    draws = torch.Generator().manual_seed(5)
    factors = [torch.randn(out.shape, generator=draws).to(out) for out in wanted]
    want = torch.autograd.grad(
        sum((f * out).sum() for f, out in zip(factors, wanted, strict=True)), [*theirs, *copies.values()]
    )
    assert_that(
        all(out.requires_grad for out in found), "gradients flow through both results", value="a result without a graph"
    )
    total = sum((f * out).sum() for f, out in zip(factors, found, strict=True))
    got = torch.autograd.grad(total, [*mine, *module.parameters()], allow_unused=True)
    for one, two in zip(got, want, strict=True):
        assert_that(
            one is not None,
            "every parameter and input has a share in the results",
            value="a parameter without a gradient",
        )
        assert_close(one, two, rtol=1e-8, atol=1e-9, because=because)


# mla_parameter_count


def counted(d, h, dn, dr, dv, r, rq):
    """Parameters of torch's own layers."""
    linear = lambda n_in, n_out: nn.Linear(n_in, n_out, bias=False, device="meta")  # noqa: E731
    if rq is None:
        parts = {"q_proj": linear(d, h * (dn + dr))}
    else:
        parts = {
            "q_a_proj": linear(d, rq),
            "q_a_layernorm": nn.RMSNorm(rq, device="meta"),
            "q_b_proj": linear(rq, h * (dn + dr)),
        }
    parts["kv_a_proj_with_mqa"] = linear(d, r + dr)
    parts["kv_a_layernorm"] = nn.RMSNorm(r, device="meta")
    parts["kv_b_proj"] = linear(r, h * (dn + dv))
    parts["o_proj"] = linear(h * dv, d)
    return {name: sum(weight.numel() for weight in part.parameters()) for name, part in parts.items()}


COUNTS = [(2048, 16, 128, 64, 128, 512), (60, 3, 10, 4, 6, 14), (7, 1, 2, 2, 1, 3), (16, 4, 6, 8, 10, 5)]


@task("mla_parameter_count")
@pytest.mark.parametrize("sizes", COUNTS, ids=str)
@pytest.mark.parametrize("rq", [None, 12, 1])
def test_every_part_is_counted(solution, sizes, rq):
    expected = counted(*sizes, rq)
    found = solution.mla_parameter_count(*sizes, rq)
    assert_equal(set(found), {*expected, "total"}, because="one entry per part of this form, and the total")
    assert_equal({name: found[name] for name in expected}, expected, because="outputs times inputs; gains of a norm")


@task("mla_parameter_count")
@pytest.mark.parametrize("rq", [None, 12])
def test_the_total_is_the_sum_of_the_parts(solution, rq):
    for sizes in COUNTS:
        found = solution.mla_parameter_count(*sizes, rq=rq)
        assert_equal(found["total"], sum(counted(*sizes, rq).values()), because="all parts together")


@task("mla_parameter_count")
def test_the_published_layers(solution):
    lite = solution.mla_parameter_count(2048, 16, 128, 64, 128, 512)
    assert_equal(lite["total"], 13763072, because="one attention layer of V2-Lite")
    v3 = solution.mla_parameter_count(7168, 128, 128, 64, 128, 512, 1536)
    assert_equal(v3["total"], 187107328, because="one attention layer of V3")


# KVDown

DOWN = [(2, 3, 12, 6, 4), (1, 4, 7, 5, 2), (3, 1, 10, 4, 8), (2, 6, 6, 6, 6)]  # B, T, D, r, dr


def kv_down(solution, randn, d, r, dr, dtype=F32, eps=None):
    """A module with known weights, and these."""
    w, gain = randn(r + dr, d, dtype=dtype), randn(r, dtype=dtype)
    module = solution.KVDown(d, r, dr) if eps is None else solution.KVDown(d, r, dr, eps)
    return filled(module, kv_a_proj_with_mqa__weight=w, kv_a_layernorm__weight=gain), w, gain


def expected_down(x, w, gain, cos, sin, eps=1e-6):
    """c and k_rope in numpy."""
    out, r = array(x) @ array(w).T, len(gain)
    return normed(out[..., :r], array(gain), eps), turned(out[..., r:], array(cos), array(sin))


@task("KVDown")
@pytest.mark.parametrize(("b", "t", "d", "r", "dr"), DOWN)
def test_down_is_the_normed_latent_and_the_turned_key(solution, randn, rand, dtype, b, t, d, r, dr):
    module, w, gain = kv_down(solution, randn, d, r, dr, dtype)
    x, (cos, sin) = randn(b, t, d, dtype=dtype), tables(rand, t, dr // 2, dtype=dtype)
    c, k_rope = expected_down(x, w, gain, cos, sin)
    found = module(x, cos, sin)
    assert_equal([tuple(y.shape) for y in found], [(b, t, r), (b, t, dr)], because="c (B, T, r) and k_rope (B, T, dr)")
    assert_close(found[1].detach(), tensor(k_rope, dtype), **TOLERANCE[dtype], because="the last dr outputs, rotated")
    assert_close(found[0].detach(), tensor(c, dtype), **TOLERANCE[dtype], because="the first r outputs, normalized")


@task("KVDown")
@pytest.mark.parametrize("case", CASES)
def test_down_has_the_numbers_of_deepseeks_layer(solution, data_dir, device, case):
    data = golden(data_dir, device, case)
    names = ("kv_a_proj_with_mqa.weight", "kv_a_layernorm.weight")
    module = filled(solution.KVDown(24, 14, 8), **weights_in(data, *names))
    c, k_rope = module(data["x"], data["cos"], data["sin"])
    assert_close(c.detach(), data["c"].cpu(), **GOLDEN, because="the latent that the layer of transformers caches")
    assert_close(
        k_rope.detach(), data["k_rope"].cpu(), **GOLDEN, because="the key that it caches, in neighboring pairs"
    )


@task("KVDown")
def test_rows_may_stand_at_positions_of_their_own(solution, randn, rand):
    module, w, gain = kv_down(solution, randn, 10, 6, 4)
    x, (cos, sin) = randn(3, 5, 10), tables(rand, 3, 5, 2)
    _, k_rope = expected_down(x, w, gain, cos, sin)
    assert_close(module(x, cos, sin)[1].detach(), tensor(k_rope, F32), **TOLERANCE[F32], because="tables (B, T, dr/2)")


@task("KVDown")
def test_the_latent_forgets_the_length_of_x_and_the_key_does_not(solution, randn, rand):
    module, _, _ = kv_down(solution, randn, 10, 6, 4, F64)
    x, (cos, sin) = randn(2, 3, 10, dtype=F64), tables(rand, 3, 2, dtype=F64)
    (c, k_rope), (c10, k_rope10) = module(x, cos, sin), module(10 * x, cos, sin)
    assert_close(c10, c, rtol=1e-3, atol=1e-3, because="normalized: ten times x gives the same latent")
    assert_close(k_rope10, 10 * k_rope, rtol=1e-10, because="not normalized: ten times x gives ten times the key")


@task("KVDown")
def test_positions_turn_the_key_only(solution, randn, rand):
    module, w, _ = kv_down(solution, randn, 10, 6, 4, F64)
    x, here, there = randn(2, 3, 10, dtype=F64), tables(rand, 3, 2, dtype=F64), tables(rand, 3, 2, dtype=F64)
    lengths = np.linalg.norm((array(x) @ array(w).T)[..., 6:].reshape(2, 3, 2, 2), axis=-1)
    (c, k_rope), (c_there, k_there) = module(x, *here), module(x, *there)
    assert_equal(c_there.detach(), c.detach(), because="the latent does not know where it stands")
    for key in (k_rope, k_there):
        pairs = key.detach().unflatten(-1, (2, 2)).norm(dim=-1)
        assert_close(pairs, tensor(lengths), rtol=1e-10, because="a rotation keeps the length of each pair")


@task("KVDown")
@pytest.mark.parametrize("eps", [None, 1e-2, 3.0])
def test_down_adds_eps_under_the_root(solution, randn, rand, eps):
    module, w, gain = kv_down(solution, randn, 8, 5, 2, F64, eps)
    x, (cos, sin) = 1e-3 * randn(2, 3, 8, dtype=F64), tables(rand, 3, 1, dtype=F64)
    c, _ = expected_down(x, w, gain, cos, sin, 1e-6 if eps is None else eps)
    assert_close(
        module(x, cos, sin)[0].detach(),
        tensor(c),
        **TOLERANCE[F64],
        because="root of the mean square plus eps; 1e-6 if not said",
    )


@task("KVDown")
@pytest.mark.parametrize("kind", [F16, BF16], ids=str)
def test_a_half_precision_latent_has_statistics_in_float32(solution, rand, kind):
    r, dr = 16, 8
    x = ((300 + 100 * rand(2, 3, r + dr)) * (rand(2, 3, r + dr) - 0.5).sign()).to(kind)
    w, gain = torch.eye(r + dr, dtype=kind, device=x.device), (1 + rand(r)).to(kind)
    cos, sin = tables(rand, 3, dr // 2)
    c, k_rope = expected_down(x, w, gain, cos, sin)
    module = filled(solution.KVDown(r + dr, r, dr), kv_a_proj_with_mqa__weight=w, kv_a_layernorm__weight=gain)
    found = module(x, cos, sin)
    assert_close(
        found[0].detach(),
        tensor(c, kind),
        rtol=2e-2,
        atol=2e-2,
        because="squares of 300 and more do not fit into float16",
    )
    assert_close(found[1].detach(), tensor(k_rope, kind), rtol=2e-2, atol=8.0, because="in the dtype of x")


@task("KVDown")
def test_down_begins_with_gains_of_one(solution, device):
    module = solution.KVDown(9, 6, 4).to(device)
    found = {name: tuple(weight.shape) for name, weight in module.named_parameters()}
    expected = {"kv_a_proj_with_mqa.weight": (10, 9), "kv_a_layernorm.weight": (6,)}
    assert_equal(found, expected, because="the parameters of the checkpoint")
    assert_equal(module.get_parameter("kv_a_layernorm.weight").detach(), torch.ones(6), because="gains begin as ones")


@task("KVDown")
def test_down_takes_any_strides_and_changes_nothing(solution, randn, rand):
    module, w, gain = kv_down(solution, randn, 10, 6, 4)
    x, (cos, sin) = noncontiguous(randn(2, 5, 10)), (noncontiguous(y) for y in tables(rand, 5, 2))
    c, k_rope = expected_down(x, w, gain, cos, sin)
    with unchanged(x, cos, sin, *module.parameters()), global_rng_untouched():
        found = module(x, cos, sin)
    assert_close(found[0].detach(), tensor(c, F32), **TOLERANCE[F32], because="slices of larger tensors")
    assert_close(found[1].detach(), tensor(k_rope, F32), **TOLERANCE[F32], because="slices of larger tensors")


@task("KVDown")
def test_down_sends_gradients_everywhere(solution, randn, rand):
    module, _, _ = kv_down(solution, randn, 8, 5, 4, F64)
    cos, sin = tables(rand, 3, 2, dtype=F64)

    def oracle(x, p):
        latent, key = (x @ p["kv_a_proj_with_mqa.weight"].T).tensor_split([5], -1)
        return torch_normed(latent, p["kv_a_layernorm.weight"]), torch_turned(key, cos, sin)

    assert_module_gradients(
        module, oracle, [randn(2, 3, 8, dtype=F64)], (cos, sin), "as through a projection, a norm and a rotation"
    )


@task("KVDown")
def test_down_refuses_what_does_not_fit(solution, randn, rand):
    module, _, _ = kv_down(solution, randn, 10, 6, 4)
    cos, sin = tables(rand, 5, 2)
    assert_raises(ValueError, module, randn(2, 5, 7), cos, sin, mentions=["(2, 5, 7)", "(10, 10)"])
    for wrong in [(4, 2), (5, 3), (5, 1), (3, 5, 2)]:
        assert_raises(ValueError, module, randn(2, 5, 10), *tables(rand, *wrong), mentions=[str(wrong)])


@task("KVDown")
def test_down_is_one_product(solution, randn, rand):
    with unmetered():
        module, _, _ = kv_down(solution, randn, 32, 12, 4)
        x, (cos, sin) = randn(2, 5, 32), tables(rand, 5, 2)
    flops = 2 * 2 * 5 * 32 * (12 + 4)
    assert_cost(module, x, cos, sin, flops=flops, matmuls=1, because="latent and key leave the same matrix")


@cost_case("KVDown")
def down_cost(module, randn):
    with unmetered():
        down, x, table = module.KVDown(128, 48, 16).to(randn(1).device), randn(2, 16, 128), randn(16, 8)
    return lambda: down(x, table, table)


# kv_b

UP = [(2, 5, 6, 3, 4, 2), (1, 3, 4, 2, 3, 3), (3, 1, 5, 4, 2, 7), (4, 4, 4, 4, 4, 4)]  # B, S, r, H, dn, dv


def row_by_row(weight, h, dn, dv):
    """Which row belongs where, counted off."""
    rows = iter(array(weight))
    keys, values = [], []
    for _ in range(h):
        keys.append([next(rows) for _ in range(dn)])
        values.append([next(rows) for _ in range(dv)])
    return np.array(keys), np.array(values)


@task("kv_b")
@pytest.mark.parametrize(("b", "s", "r", "h", "dn", "dv"), UP)
def test_rows_come_head_by_head(solution, randn, dtype, b, s, r, h, dn, dv):
    weight = randn(h * (dn + dv), r, dtype=dtype)
    keys, values = row_by_row(weight, h, dn, dv)
    w_uk, w_uv = solution.split_kv_b(weight, h, dn, dv)
    assert_equal(w_uk, tensor(keys, dtype), because="for each head the first dn of its dn + dv rows")
    assert_equal(w_uv, tensor(values, dtype), because="for each head the last dv of its dn + dv rows")


@task("kv_b")
def test_both_parts_are_views_of_the_weight(solution, randn):
    for weight in (randn(3 * (4 + 2), 6), randn(6, 18).T, noncontiguous(randn(18, 6))):
        w_uk, w_uv = solution.split_kv_b(weight, 3, 4, 2)
        assert_that(
            same_storage(w_uk, weight) and same_storage(w_uv, weight),
            "w_uk and w_uv share memory with the weight, whatever its strides",
            value=(same_storage(w_uk, weight), same_storage(w_uv, weight), weight.is_contiguous()),
        )
        weight.mul_(-3.0)
        keys, values = row_by_row(weight, 3, 4, 2)
        assert_equal(w_uk, tensor(keys, F32), because="a step of training moves the keys' part with the weight")
        assert_equal(w_uv, tensor(values, F32), because="a step of training moves the values' part with the weight")


@task("kv_b")
def test_gradients_flow_through_the_views(solution, randn):
    weight = randn(3 * (4 + 2), 5, dtype=F64).requires_grad_()
    factor_k, factor_v = randn(3, 4, 5, dtype=F64), randn(3, 2, 5, dtype=F64)
    expected = torch.cat([torch.cat([factor_k[h], factor_v[h]]) for h in range(3)])
    w_uk, w_uv = solution.split_kv_b(weight, 3, 4, 2)
    total = (w_uk * factor_k).sum() + (w_uv * factor_v).sum()
    assert_that(total.requires_grad, "the views belong to the graph of the weight", value="no graph")
    total.backward()
    assert_close(weight.grad, expected, rtol=1e-12, because="each row gets the gradient of its place")


@task("kv_b")
@pytest.mark.parametrize(
    ("rows", "h", "dn", "dv"), [(17, 3, 4, 2), (12, 3, 4, 2), (24, 3, 4, 2), (18, 2, 4, 2), (18, 3, 2, 2)]
)
def test_another_number_of_rows_is_refused(solution, randn, rows, h, dn, dv):
    wanted = h * (dn + dv)
    assert_raises(ValueError, solution.split_kv_b, randn(rows, 5), h, dn, dv, mentions=[f"({rows}, 5)", str(wanted)])


@task("kv_b")
def test_splitting_costs_nothing(solution, randn):
    with unmetered():
        weight = randn(18, 6)
    assert_cost(
        solution.split_kv_b, weight, 3, 4, 2, max_new_bytes=0, max_calls=0, because="two views: nothing is computed"
    )


@task("kv_b")
@pytest.mark.parametrize(("b", "s", "r", "h", "dn", "dv"), UP)
def test_up_gives_keys_and_values_of_each_head(solution, randn, dtype, b, s, r, h, dn, dv):
    weight, c = randn(h * (dn + dv), r, dtype=dtype), randn(b, s, r, dtype=dtype)
    keys, values = row_by_row(weight, h, dn, dv)
    expected_k = np.stack([array(c) @ keys[i].T for i in range(h)], 1)
    expected_v = np.stack([array(c) @ values[i].T for i in range(h)], 1)
    k_nope, v = filled(solution.KVUp(r, h, dn, dv), kv_b_proj__weight=weight)(c)
    found = [tuple(k_nope.shape), tuple(v.shape)]
    assert_equal(found, [(b, h, s, dn), (b, h, s, dv)], because="k_nope (B, H, S, dn) and v (B, H, S, dv)")
    assert_close(k_nope.detach(), tensor(expected_k, dtype), **TOLERANCE[dtype], because="w_uk c for each head")
    assert_close(v.detach(), tensor(expected_v, dtype), **TOLERANCE[dtype], because="w_uv c for each head")


@task("kv_b")
@pytest.mark.parametrize("case", CASES)
def test_up_has_the_numbers_of_deepseeks_layer(solution, data_dir, device, case):
    data = golden(data_dir, device, case)
    module = filled(solution.KVUp(14, 3, 10, 6), **weights_in(data, "kv_b_proj.weight"))
    k_nope, v = module(data["c"])
    assert_close(k_nope.detach(), data["k_nope"].cpu(), **GOLDEN, because="the keys in the layer of transformers")
    assert_close(v.detach(), data["v"].cpu(), **GOLDEN, because="the values in the layer of transformers")


@task("kv_b")
def test_up_is_linear_in_the_latent(solution, randn):
    module = filled(solution.KVUp(6, 3, 4, 2), kv_b_proj__weight=randn(18, 6, dtype=F64))
    c = randn(2, 5, 6, dtype=F64)
    (k, v), (k5, v5) = module(c), module(5 * c)
    assert_close(
        k5.detach(), 5 * k.detach(), rtol=1e-10, because="the norm came before: five times c, five times the key"
    )
    assert_close(
        v5.detach(), 5 * v.detach(), rtol=1e-10, because="the norm came before: five times c, five times the value"
    )


@task("kv_b")
@pytest.mark.parametrize("kind", [F16, BF16], ids=str)
def test_up_keeps_half_precision(solution, randn, kind):
    weight, c = randn(10, 6).to(kind), randn(2, 3, 6).to(kind)
    expected = array(c) @ array(weight).T
    k, v = filled(solution.KVUp(6, 2, 3, 2), kv_b_proj__weight=weight)(c)
    assert_close(k.detach()[:, 1], tensor(expected[..., 5:8], kind), rtol=2e-2, atol=5e-2, because="in the dtype of c")
    assert_close(v.detach()[:, 0], tensor(expected[..., 3:5], kind), rtol=2e-2, atol=5e-2, because="in the dtype of c")


@task("kv_b")
def test_up_takes_any_strides_and_changes_nothing(solution, randn):
    weight, c = randn(18, 6), randn(2, 6, 9)[:, :, 2:7].mT
    expected = array(c) @ array(weight).T
    module = filled(solution.KVUp(6, 3, 4, 2), kv_b_proj__weight=weight)
    with unchanged(c, *module.parameters()), global_rng_untouched():
        k, v = module(c)
    assert_close(
        k.detach()[:, 2], tensor(expected[..., 12:16], F32), **TOLERANCE[F32], because="a slice of a larger tensor"
    )
    assert_close(
        v.detach()[:, 1], tensor(expected[..., 10:12], F32), **TOLERANCE[F32], because="a slice of a larger tensor"
    )


@task("kv_b")
def test_up_sends_gradients_everywhere(solution, randn):
    module = filled(solution.KVUp(5, 3, 4, 2), kv_b_proj__weight=randn(18, 5, dtype=F64))

    def oracle(c, p):
        heads = [c @ w.T for w in p["kv_b_proj.weight"].split(6)]
        return torch.stack([y[..., :4] for y in heads], 1), torch.stack([y[..., 4:] for y in heads], 1)

    assert_module_gradients(module, oracle, [randn(2, 3, 5, dtype=F64)], (), "as through one projection per head")


@task("kv_b")
def test_up_refuses_another_latent(solution, randn):
    module = filled(solution.KVUp(6, 3, 4, 2), kv_b_proj__weight=randn(18, 6))
    assert_raises(ValueError, module, randn(2, 3, 5), mentions=["(2, 3, 5)", "(18, 6)"])


@task("kv_b")
def test_up_is_one_product(solution, randn):
    with unmetered():
        module, c = filled(solution.KVUp(8, 3, 4, 2), kv_b_proj__weight=randn(18, 8)), randn(2, 5, 8)
    flops = 2 * 2 * 5 * 8 * 18
    assert_cost(module, c, flops=flops, matmuls=1, because="keys and values of all heads leave the same matrix")


@cost_case("kv_b")
def up_cost(module, randn):
    with unmetered():
        up, c = module.KVUp(32, 4, 16, 12).to(randn(1).device), randn(2, 16, 32)
    return lambda: up(c)


# QueryPath

QUERY = [(2, 3, 10, 3, 5, 4), (1, 4, 7, 2, 2, 6), (3, 1, 9, 1, 6, 2), (4, 4, 4, 4, 4, 4)]  # B, T, D, H, dn, dr


def query_path(solution, randn, d, h, dn, dr, rq=None, dtype=F32, eps=None):
    """A module with known weights."""
    more = () if eps is None else (eps,)
    module = solution.QueryPath(d, h, dn, dr, rq, *more)
    if rq is None:
        return filled(module, q_proj__weight=randn(h * (dn + dr), d, dtype=dtype))
    weights = {"q_a_proj__weight": (rq, d), "q_a_layernorm__weight": (rq,), "q_b_proj__weight": (h * (dn + dr), rq)}
    return filled(module, **{name: randn(*shape, dtype=dtype) for name, shape in weights.items()})


def expected_queries(module, x, cos, sin, h, dn, dr, eps=1e-6):
    """q_nope and q_rope in numpy, head by head; tables (T, dr/2) or (B, T, dr/2)."""
    p = {name: array(weight) for name, weight in module.named_parameters()}
    x = array(x)
    if "q_proj.weight" in p:
        q = x @ p["q_proj.weight"].T
    else:
        q = normed(x @ p["q_a_proj.weight"].T, p["q_a_layernorm.weight"], eps) @ p["q_b_proj.weight"].T
    heads = [q[..., i * (dn + dr) : (i + 1) * (dn + dr)] for i in range(h)]
    nope = np.stack([y[..., :dn] for y in heads], 1)
    return nope, np.stack([turned(y[..., dn:], array(cos), array(sin)) for y in heads], 1)


@task("QueryPath")
@pytest.mark.parametrize("rq", [None, 6])
@pytest.mark.parametrize(("b", "t", "d", "h", "dn", "dr"), QUERY)
def test_queries_have_two_parts_per_head(solution, randn, rand, dtype, b, t, d, h, dn, dr, rq):
    module = query_path(solution, randn, d, h, dn, dr, rq, dtype)
    x, (cos, sin) = randn(b, t, d, dtype=dtype), tables(rand, t, dr // 2, dtype=dtype)
    nope, turn = expected_queries(module, x, cos, sin, h, dn, dr)
    q_nope, q_rope = module(x, cos, sin)
    found = [tuple(q_nope.shape), tuple(q_rope.shape)]
    assert_equal(found, [(b, h, t, dn), (b, h, t, dr)], because="q_nope (B, H, T, dn) and q_rope (B, H, T, dr)")
    assert_close(q_nope.detach(), tensor(nope, dtype), **TOLERANCE[dtype], because="the first dn numbers of each head")
    assert_close(q_rope.detach(), tensor(turn, dtype), **TOLERANCE[dtype], because="the last dr of each head, rotated")


@task("QueryPath")
@pytest.mark.parametrize("case", CASES)
def test_queries_have_the_numbers_of_deepseeks_layer(solution, data_dir, device, case):
    data, rq = golden(data_dir, device, case), CASES[case]
    names = ["q_proj.weight"] if rq is None else ["q_a_proj.weight", "q_a_layernorm.weight", "q_b_proj.weight"]
    module = filled(solution.QueryPath(24, 3, 10, 8, rq), **weights_in(data, *names))
    q_nope, q_rope = module(data["x"], data["cos"], data["sin"])
    assert_close(q_nope.detach(), data["q_nope"].cpu(), **GOLDEN, because="as in the layer of transformers")
    assert_close(
        q_rope.detach(), data["q_rope"].cpu(), **GOLDEN, because="as in the layer of transformers, in neighboring pairs"
    )


@task("QueryPath")
@pytest.mark.parametrize("rq", [None, 6])
def test_queries_may_stand_at_positions_of_their_own(solution, randn, rand, rq):
    module = query_path(solution, randn, 10, 3, 5, 4, rq)
    x, (cos, sin) = randn(3, 4, 10), tables(rand, 3, 4, 2)
    _, turn = expected_queries(module, x, cos, sin, 3, 5, 4)
    assert_close(module(x, cos, sin)[1].detach(), tensor(turn, F32), **TOLERANCE[F32], because="tables (B, T, dr/2)")


@task("QueryPath")
def test_both_parts_come_from_the_normalized_latent(solution, randn, rand):
    module = query_path(solution, randn, 10, 3, 5, 4, 6, F64)
    x, (cos, sin) = randn(2, 3, 10, dtype=F64), tables(rand, 3, 2, dtype=F64)
    (nope, turn), (nope10, turn10) = module(x, cos, sin), module(10 * x, cos, sin)
    assert_close(nope10.detach(), nope.detach(), rtol=1e-3, atol=1e-3, because="ten times x is the same latent c_q")
    assert_close(
        turn10.detach(),
        turn.detach(),
        rtol=1e-3,
        atol=1e-3,
        because="the rotary part comes from the same latent: it stays, too",
    )


@task("QueryPath")
def test_straight_queries_grow_with_x(solution, randn, rand):
    module = query_path(solution, randn, 10, 3, 5, 4, None, F64)
    x, (cos, sin) = randn(2, 3, 10, dtype=F64), tables(rand, 3, 2, dtype=F64)
    (nope, turn), (nope10, turn10) = module(x, cos, sin), module(10 * x, cos, sin)
    assert_close(nope10.detach(), 10 * nope.detach(), rtol=1e-10, because="no norm on this path")
    assert_close(turn10.detach(), 10 * turn.detach(), rtol=1e-10, because="no norm on this path")


@task("QueryPath")
@pytest.mark.parametrize("rq", [None, 6])
def test_positions_turn_the_rotary_part_only(solution, randn, rand, rq):
    module = query_path(solution, randn, 10, 3, 6, 4, rq, F64)
    x = randn(2, 3, 10, dtype=F64)
    (nope, turn), (there, turn_there) = (module(x, *tables(rand, 3, 2, dtype=F64)) for _ in range(2))
    assert_equal(there.detach(), nope.detach(), because="q_nope does not know where it stands")
    lengths = [y.detach().unflatten(-1, (2, 2)).norm(dim=-1) for y in (turn, turn_there)]
    assert_close(lengths[1], lengths[0], rtol=1e-10, because="a rotation keeps the length of each pair")


@task("QueryPath")
@pytest.mark.parametrize("eps", [None, 1e-2, 3.0])
def test_queries_add_eps_under_the_root(solution, randn, rand, eps):
    module = query_path(solution, randn, 8, 2, 3, 2, 5, F64, eps)
    x, (cos, sin) = 1e-3 * randn(2, 3, 8, dtype=F64), tables(rand, 3, 1, dtype=F64)
    nope, _ = expected_queries(module, x, cos, sin, 2, 3, 2, 1e-6 if eps is None else eps)
    assert_close(
        module(x, cos, sin)[0].detach(),
        tensor(nope),
        **TOLERANCE[F64],
        because="root of the mean square plus eps; 1e-6 if not said",
    )


@task("QueryPath")
@pytest.mark.parametrize("kind", [F16, BF16], ids=str)
def test_half_precision_queries_have_statistics_in_float32(solution, rand, kind):
    rq, h, dn, dr = 16, 2, 4, 4
    x = ((300 + 100 * rand(2, 3, rq)) * (rand(2, 3, rq) - 0.5).sign()).to(kind)
    eye = torch.eye(rq, dtype=kind, device=x.device)
    gain = (1 + rand(rq)).to(kind)
    module = filled(
        solution.QueryPath(rq, h, dn, dr, rq),
        q_a_proj__weight=eye,
        q_a_layernorm__weight=gain,
        q_b_proj__weight=eye.clone(),
    )
    cos, sin = tables(rand, 3, dr // 2)
    nope, turn = expected_queries(module, x, cos, sin, h, dn, dr)
    found = module(x, cos, sin)
    assert_close(
        found[0].detach(),
        tensor(nope, kind),
        rtol=2e-2,
        atol=2e-2,
        because="squares of 300 and more do not fit into float16",
    )
    assert_close(found[1].detach(), tensor(turn, kind), rtol=2e-2, atol=4e-2, because="in the dtype of x")


@task("QueryPath")
def test_a_query_path_has_the_projections_of_its_form(solution, device):
    forms = {
        None: {"q_proj.weight": (27, 10)},
        6: {"q_a_proj.weight": (6, 10), "q_a_layernorm.weight": (6,), "q_b_proj.weight": (27, 6)},
    }
    for rq, expected in forms.items():
        module = solution.QueryPath(10, 3, 5, 4, rq).to(device)
        found = {name: tuple(weight.shape) for name, weight in module.named_parameters()}
        assert_equal(found, expected, because="the parameters of this form, and no others")
        for name, weight in module.named_parameters():
            if "norm" in name:
                assert_equal(weight.detach(), torch.ones(6), because="gains begin as ones")


@task("QueryPath")
@pytest.mark.parametrize("rq", [None, 6])
def test_queries_take_any_strides_and_change_nothing(solution, randn, rand, rq):
    module = query_path(solution, randn, 10, 3, 5, 4, rq)
    x, (cos, sin) = noncontiguous(randn(2, 4, 10)), [noncontiguous(y) for y in tables(rand, 4, 2)]
    nope, turn = expected_queries(module, x, cos, sin, 3, 5, 4)
    with unchanged(x, cos, sin, *module.parameters()), global_rng_untouched():
        found = module(x, cos, sin)
    assert_close(found[0].detach(), tensor(nope, F32), **TOLERANCE[F32], because="slices of larger tensors")
    assert_close(found[1].detach(), tensor(turn, F32), **TOLERANCE[F32], because="slices of larger tensors")


@task("QueryPath")
@pytest.mark.parametrize("rq", [None, 6])
def test_queries_send_gradients_everywhere(solution, randn, rand, rq):
    module = query_path(solution, randn, 8, 3, 5, 4, rq, F64)
    cos, sin = tables(rand, 3, 2, dtype=F64)

    def oracle(x, p):
        if rq is None:
            q = x @ p["q_proj.weight"].T
        else:
            q = torch_normed(x @ p["q_a_proj.weight"].T, p["q_a_layernorm.weight"]) @ p["q_b_proj.weight"].T
        heads = torch.stack(q.split(9, -1), 1)
        return heads[..., :5], torch_turned(heads[..., 5:], cos, sin)

    assert_module_gradients(
        module, oracle, [randn(2, 3, 8, dtype=F64)], (cos, sin), "as through projections and a rotation"
    )


@task("QueryPath")
@pytest.mark.parametrize("rq", [None, 6])
def test_queries_refuse_what_does_not_fit(solution, randn, rand, rq):
    module = query_path(solution, randn, 10, 3, 5, 4, rq)
    first = "(27, 10)" if rq is None else "(6, 10)"
    assert_raises(ValueError, module, randn(2, 5, 7), *tables(rand, 5, 2), mentions=["(2, 5, 7)", first])
    for wrong in [(4, 2), (5, 3), (5, 1), (3, 5, 2)]:
        assert_raises(ValueError, module, randn(2, 5, 10), *tables(rand, *wrong), mentions=[str(wrong)])


@task("QueryPath")
@pytest.mark.parametrize("rq", [None, 6])
def test_queries_cost_their_products(solution, randn, rand, rq):
    with unmetered():
        module = query_path(solution, randn, 32, 3, 5, 4, rq)
        x, (cos, sin) = randn(2, 5, 32), tables(rand, 5, 2)
    flops = 2 * 2 * 5 * 32 * 27 if rq is None else 2 * 2 * 5 * 6 * (32 + 27)
    assert_cost(
        module, x, cos, sin, flops=flops, matmuls=1 if rq is None else 2, because="one product, or two narrow ones"
    )


@cost_case("QueryPath")
def query_cost(module, randn):
    with unmetered():
        path, x, table = module.QueryPath(128, 4, 16, 8, 48).to(randn(1).device), randn(2, 16, 128), randn(16, 4)
    return lambda: path(x, table, table)


# decoupled_scores

SCORES = [(2, 3, 4, 5, 6, 4), (1, 2, 1, 7, 3, 2), (3, 1, 5, 2, 2, 6), (4, 4, 4, 4, 4, 4)]  # B, H, T, S, dn, dr


def parts_of(randn, b, h, t, s, dn, dr, dtype=F32):
    shapes = [(b, h, t, dn), (b, h, t, dr), (b, h, s, dn), (b, s, dr)]
    return [randn(*shape, dtype=dtype) for shape in shapes]


def joined_scores(q_nope, q_rope, k_nope, k_rope, scale):
    """Whole queries times whole keys, number by number."""
    q = np.concatenate([array(q_nope), array(q_rope)], -1)
    shared = np.stack([array(k_rope)] * q.shape[1], 1)
    k = np.concatenate([array(k_nope), shared], -1)
    out = np.zeros((*q.shape[:3], k.shape[2]))
    for b, h, t, s in np.ndindex(*out.shape):
        out[b, h, t, s] = (q[b, h, t] * k[b, h, s]).sum() * scale
    return out


@task("decoupled_scores")
@pytest.mark.parametrize("sizes", SCORES, ids=str)
def test_scores_are_those_of_the_joined_queries_and_keys(solution, randn, dtype, sizes):
    parts = parts_of(randn, *sizes, dtype=dtype)
    *_, dn, dr = sizes
    expected = joined_scores(*parts, (dn + dr) ** -0.5)
    because = "[q_nope, q_rope] . [k_nope, k_rope] * (dn + dr)**-0.5"
    assert_close(solution.decoupled_scores(*parts), tensor(expected, dtype), **TOLERANCE[dtype], because=because)


@task("decoupled_scores")
def test_a_given_scale_is_used_as_it_is(solution, randn, dtype):
    for scale in (0.3, 2.0, -1.5, 0.0):
        parts = parts_of(randn, 2, 3, 4, 5, 6, 4, dtype=dtype)
        expected = joined_scores(*parts, scale)
        found = solution.decoupled_scores(*parts, scale)
        assert_close(found, tensor(expected, dtype), **TOLERANCE[dtype], because=f"times the given {scale}")
    found = solution.decoupled_scores(*parts, scale=None)
    assert_close(
        found, tensor(joined_scores(*parts, 10**-0.5), dtype), **TOLERANCE[dtype], because="None is the default"
    )


@task("decoupled_scores")
@pytest.mark.parametrize("case", CASES)
def test_scores_are_those_of_deepseeks_layer(solution, data_dir, device, case):
    data = golden(data_dir, device, case)
    parts = [data[name] for name in ("q_nope", "q_rope", "k_nope", "k_rope")]
    found = solution.decoupled_scores(*parts, float(data["scale"]))
    assert_close(
        found, data["scores"].cpu(), **GOLDEN, because="as in the layer of transformers, YaRN's scale included"
    )
    if case == "v2":
        found = solution.decoupled_scores(*parts)
        assert_close(found, data["scores"].cpu(), **GOLDEN, because="without YaRN this is the default scale")


@task("decoupled_scores")
@pytest.mark.parametrize(("t", "s"), [(0, 3), (2, 0)])
def test_scores_of_nothing_are_an_empty_table(solution, randn, t, s):
    found = solution.decoupled_scores(*parts_of(randn, 2, 3, t, s, 4, 2))
    assert_equal(tuple(found.shape), (2, 3, t, s), because="no queries or no keys")


@task("decoupled_scores")
@pytest.mark.parametrize("shift", [1, 40])
def test_only_the_distance_counts(solution, randn, rand, shift):
    q_nope, q_rope, k_nope, k_rope = parts_of(randn, 2, 3, 4, 5, 3, 4, F64)
    frequency = rand(2, dtype=F64) + 0.1

    def at(start):
        angles = [torch.arange(start, start + n, device=frequency.device)[:, None] * frequency for n in (4, 5)]
        q, k = (torch_turned(x, a.cos(), a.sin()) for x, a in zip((q_rope, k_rope), angles, strict=True))
        return solution.decoupled_scores(q_nope, q, k_nope, k)

    assert_close(at(shift), at(0), rtol=1e-9, atol=1e-9, because="queries and keys moved together: no score changes")


@task("decoupled_scores")
def test_the_two_parts_are_added(solution, randn):
    q_nope, q_rope, k_nope, k_rope = parts_of(randn, 2, 3, 4, 5, 6, 4, F64)
    content = joined_scores(q_nope, 0 * q_rope, k_nope, k_rope, 1.0)
    position = joined_scores(0 * q_nope, q_rope, k_nope, k_rope, 1.0)
    found = solution.decoupled_scores(q_nope, torch.zeros_like(q_rope), k_nope, k_rope, 1.0)
    assert_close(found, tensor(content), **TOLERANCE[F64], because="without a rotary query the content is left")
    found = solution.decoupled_scores(torch.zeros_like(q_nope), q_rope, k_nope, k_rope, 1.0)
    assert_close(found, tensor(position), **TOLERANCE[F64], because="without a content query the position is left")


@task("decoupled_scores")
@pytest.mark.parametrize("half", [F16, BF16], ids=str)
def test_scores_keep_half_precision(solution, randn, half):
    parts = [x.to(half) for x in parts_of(randn, 2, 3, 4, 5, 6, 4)]
    expected = joined_scores(*parts, 10**-0.5)
    found = solution.decoupled_scores(*parts)
    assert_close(found, tensor(expected, half), rtol=2e-2, atol=6e-2, because="in the dtype of the inputs")


@task("decoupled_scores")
def test_scores_from_slices_of_larger_tensors(solution, randn):
    q, kv = randn(2, 4, 3, 6 + 4).transpose(1, 2), randn(2, 5, 3, 6 + 2).transpose(1, 2)
    q_nope, q_rope, k_nope, k_rope = q[..., :6], q[..., 6:], kv[..., :6], randn(2, 9, 4)[:, :5]
    expected = joined_scores(q_nope, q_rope, k_nope, k_rope, 10**-0.5)
    found = solution.decoupled_scores(q_nope, q_rope, k_nope, k_rope)
    assert_close(found, tensor(expected, F32), **TOLERANCE[F32], because="strides of a projection and of a cache")


@task("decoupled_scores")
def test_scores_send_gradients_to_all_four(solution, randn):
    def oracle(q_nope, q_rope, k_nope, k_rope):
        k = torch.cat([k_nope, torch.stack([k_rope] * 3, 1)], -1)
        return torch.cat([q_nope, q_rope], -1) @ k.mT / 10**0.5

    assert_gradients_close(
        solution.decoupled_scores,
        oracle,
        parts_of(randn, 2, 3, 4, 5, 6, 4, F64),
        **TOLERANCE[F64],
        because="the shared key collects the gradients of all heads",
    )


@task("decoupled_scores")
@pytest.mark.parametrize(
    ("which", "shape", "mentions"),
    [
        (0, (1, 3, 4, 6), ["(1, 3, 4, 6)"]),
        (0, (2, 1, 4, 6), ["(2, 1, 4, 6)"]),
        (0, (2, 3, 1, 6), ["(2, 3, 1, 6)", "(2, 3, 4, 4)"]),
        (0, (2, 3, 4, 1), ["(2, 3, 4, 1)", "(2, 3, 5, 6)"]),
        (1, (1, 3, 4, 4), ["(1, 3, 4, 4)"]),
        (1, (2, 1, 4, 4), ["(2, 1, 4, 4)", "(2, 3, 4, 6)"]),
        (1, (2, 3, 1, 4), ["(2, 3, 1, 4)", "(2, 3, 4, 6)"]),
        (1, (2, 3, 4, 1), ["(2, 3, 4, 1)", "(2, 5, 4)"]),
        (2, (1, 3, 5, 6), ["(1, 3, 5, 6)"]),
        (2, (2, 1, 5, 6), ["(2, 1, 5, 6)", "(2, 3, 4, 6)"]),
        (2, (2, 3, 1, 6), ["(2, 3, 1, 6)", "(2, 5, 4)"]),
        (2, (2, 3, 5, 1), ["(2, 3, 5, 1)", "(2, 3, 4, 6)"]),
        (3, (1, 5, 4), ["(1, 5, 4)"]),
        (3, (2, 1, 4), ["(2, 1, 4)", "(2, 3, 5, 6)"]),
        (3, (2, 5, 1), ["(2, 5, 1)", "(2, 3, 4, 4)"]),
    ],
)
def test_scores_broadcast_nothing_else(solution, randn, which, shape, mentions):
    parts = parts_of(randn, 2, 3, 4, 5, 6, 4)
    parts[which] = randn(*shape)
    assert_raises(ValueError, solution.decoupled_scores, *parts, mentions=mentions)


@task("decoupled_scores")
@pytest.mark.parametrize("heads", [1, 3])
def test_a_rotary_key_has_no_head_axis(solution, randn, heads):
    parts = parts_of(randn, 2, 3, 4, 5, 6, 4)
    parts[3] = randn(2, heads, 5, 4)
    assert_raises(
        ValueError,
        solution.decoupled_scores,
        *parts,
        mentions=[f"(2, {heads}, 5, 4)"],
        because="all heads share k_rope",
    )


@task("decoupled_scores")
def test_scores_cost_two_products(solution, randn):
    with unmetered():
        parts = parts_of(randn, 2, 3, 4, 50, 6, 4)
    flops = 2 * 2 * 3 * 4 * 50 * (6 + 4)
    assert_cost(
        solution.decoupled_scores, *parts, flops=flops, because="each score is dn + dr multiplications and additions"
    )


@task("decoupled_scores")
@pytest.mark.parametrize("t", [1, 6])
def test_scores_take_the_memory_of_two_tables(solution, randn, t):
    with unmetered():
        parts = parts_of(randn, 2, 8, t, 64, 6, 4)
        parts[3] = randn(2, 80, 4)[:, :64]
    table, queries = 2 * 8 * t * 64, 2 * 8 * t * 10
    assert_cost(
        solution.decoupled_scores,
        *parts,
        max_new_bytes=4 * (2 * table + queries),
        because="two tables of scores; a rotary key for each head, or whole keys, would be more",
    )


@cost_case("decoupled_scores")
def scores_cost(module, randn):
    with unmetered():
        parts = parts_of(randn, 1, 16, 1, 256, 32, 16)
    return lambda: module.decoupled_scores(*parts)


# LatentCache


def chunks(randn, sizes, b=2, r=6, dr=4, dtype=F32):
    """Latents and keys for a cache, in pieces, and joined by numpy."""
    pieces = [(randn(b, t, r, dtype=dtype), randn(b, t, dr, dtype=dtype)) for t in sizes]
    joined = [np.concatenate([array(piece[i]) for piece in pieces], 1) for i in (0, 1)]
    return pieces, joined


@task("LatentCache")
@pytest.mark.parametrize("sizes", [(5,), (1, 1, 1, 1), (3, 1, 4), (1, 5, 2), (0, 2, 0, 3)], ids=str)
def test_a_cache_returns_all_that_came(solution, randn, device, dtype, sizes):
    pieces, joined = chunks(randn, sizes, dtype=dtype)
    cache = solution.LatentCache(2, 9, 6, 4, dtype=dtype, device=device)
    assert_equal(cache.length, 0, because="nothing has come yet")
    total = 0
    for (c, k_rope), t in zip(pieces, sizes, strict=True):
        found = cache.update(c, k_rope)
        total += t
        assert_equal(cache.length, total, because="length counts the valid positions")
        assert_equal(
            found[0], tensor(joined[0][:, :total], dtype), because="all latents so far, oldest first, as they came"
        )
        assert_equal(
            found[1], tensor(joined[1][:, :total], dtype), because="all keys so far, as they came: turned before"
        )


@task("LatentCache")
def test_a_cache_may_be_filled_to_the_brim(solution, randn, device):
    pieces, joined = chunks(randn, (4, 3))
    cache = solution.LatentCache(2, 7, 6, 4, device=device)
    cache.update(*pieces[0])
    c, k_rope = cache.update(*pieces[1])
    assert_equal(cache.max_len, 7, because="the limit that was given")
    assert_equal(c, tensor(joined[0], F32), because="max_len positions fit")
    assert_equal(k_rope, tensor(joined[1], F32), because="max_len positions fit")


@task("LatentCache")
@pytest.mark.parametrize(("b", "n", "r", "dr"), [(2, 9, 6, 4), (3, 5, 8, 2), (1, 1, 1, 2)])
@pytest.mark.parametrize("kind", [F32, F64, BF16], ids=str)
def test_bytes_are_those_of_a_latent_and_a_key(solution, randn, device, b, n, r, dr, kind):
    cache = solution.LatentCache(b, n, r, dr, dtype=kind, device=device)
    expected = b * n * (r + dr) * kind.itemsize
    assert_equal(cache.nbytes, expected, because="batch * max_len * (r + dr) numbers, before anything has come")
    found = cache.update(randn(b, 1, r).to(kind), randn(b, 1, dr).to(kind))
    assert_equal(cache.nbytes, expected, because="the memory is allocated once: it does not grow")
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in found}
    assert_equal(sum(storages.values()), expected, because="what update returns is a view of that memory")


@task("LatentCache")
def test_a_float32_cache_is_the_default(solution, randn, device):
    cache = solution.LatentCache(2, 9, 6, 4, device=device)
    c, k_rope = cache.update(randn(2, 3, 6), randn(2, 3, 4))
    assert_equal([c.dtype, k_rope.dtype], [F32, F32], because="dtype is float32 unless said otherwise")


@task("LatentCache")
def test_a_cache_keeps_its_own_dtype(solution, randn, device):
    c, k_rope = randn(2, 3, 6), randn(2, 3, 4)
    expected = [c.cpu().to(BF16), k_rope.cpu().to(BF16)]
    cache = solution.LatentCache(2, 9, 6, 4, dtype=BF16, device=device)
    assert_equal(
        list(map(str, (x.dtype for x in cache.update(c, k_rope)))), ["torch.bfloat16"] * 2, because="stored in bfloat16"
    )
    cache.reset()
    found = cache.update(c, k_rope)
    assert_equal(found[0], expected[0], because="rounded on the way in")
    assert_equal(found[1], expected[1], because="rounded on the way in")


@task("LatentCache")
def test_an_update_allocates_nothing(solution, randn, device):
    with unmetered():
        cache = solution.LatentCache(2, 40, 6, 4, device=device)
        cache.update(randn(2, 20, 6), randn(2, 20, 4))
        c, k_rope = randn(2, 1, 6), randn(2, 1, 4)
    assert_cost(
        cache.update, c, k_rope, max_new_bytes=0, because="the new position is written into memory that is there"
    )


@task("LatentCache")
def test_what_is_returned_stays_a_view(solution, randn, device):
    cache = solution.LatentCache(2, 9, 6, 4, device=device)
    first = cache.update(randn(2, 3, 6), randn(2, 3, 4))
    second = cache.update(randn(2, 2, 6), randn(2, 2, 4))
    for one, two in zip(first, second, strict=True):
        assert_that(same_storage(one, two), "each update returns views of the same memory", value="other memory")


@task("LatentCache")
def test_the_numbers_are_copied_and_nothing_else_is_touched(solution, randn, device):
    cache = solution.LatentCache(2, 9, 6, 4, device=device)
    c, k_rope = randn(2, 3, 6), randn(2, 3, 4)
    expected = [c.cpu().clone(), k_rope.cpu().clone()]
    with unchanged(c, k_rope), global_rng_untouched():
        found = cache.update(c, k_rope)
    c.zero_(), k_rope.zero_()
    assert_equal(found[0], expected[0], because="who changes c later does not change the cache")
    assert_equal(found[1], expected[1], because="who changes k_rope later does not change the cache")


@task("LatentCache")
def test_chunks_may_be_slices(solution, randn, device):
    cache = solution.LatentCache(2, 9, 6, 4, device=device)
    both = randn(2, 10, 3).mT
    c, k_rope = both[..., :6], both[..., 6:]
    expected = [tensor(array(c), F32), tensor(array(k_rope), F32)]
    found = cache.update(c, k_rope)
    assert_equal(found[0], expected[0], because="any strides")
    assert_equal(found[1], expected[1], because="any strides")


@task("LatentCache")
def test_two_caches_share_nothing(solution, randn, device):
    one, two = (solution.LatentCache(2, 9, 6, 4, device=device) for _ in range(2))
    c, k_rope = one.update(randn(2, 3, 6), randn(2, 3, 4))
    before = [c.clone(), k_rope.clone()]
    assert_equal(two.length, 0, because="another cache has a length of its own")
    two.update(randn(2, 3, 6), randn(2, 3, 4))
    assert_equal(c, before[0].cpu(), because="another cache has memory of its own")
    assert_equal(k_rope, before[1].cpu(), because="another cache has memory of its own")


@task("LatentCache")
@pytest.mark.parametrize("kept", [0, 2, 5])
def test_truncating_forgets_the_newest(solution, randn, device, kept):
    pieces, joined = chunks(randn, (5, 2))
    cache = solution.LatentCache(2, 9, 6, 4, device=device)
    cache.update(*pieces[0])
    cache.truncate(kept)
    assert_equal(cache.length, kept, because="the first n positions are kept")
    found = cache.update(*pieces[1])
    for i in (0, 1):
        expected = np.concatenate([joined[i][:, :kept], joined[i][:, 5:]], 1)
        assert_equal(found[i], tensor(expected, F32), because="what comes next follows the n positions that were kept")


@task("LatentCache")
@pytest.mark.parametrize("n", [-1, 4, 9])
def test_what_is_not_there_cannot_be_kept(solution, randn, device, n):
    cache = solution.LatentCache(2, 9, 6, 4, device=device)
    cache.update(randn(2, 3, 6), randn(2, 3, 4))
    with contextlib.suppress(ValueError):
        cache.truncate(n)
    assert_equal(cache.length, 3, because="a truncation that is refused, or should be, leaves the length")
    assert_raises(ValueError, cache.truncate, n, because="0 <= n <= length")


@task("LatentCache")
def test_a_reset_cache_is_as_new(solution, randn, device):
    pieces, _ = chunks(randn, (5, 9))
    cache = solution.LatentCache(2, 9, 6, 4, device=device)
    cache.update(*pieces[0])
    cache.reset()
    assert_equal(cache.length, 0, because="everything is forgotten")
    expected = [x.cpu().clone() for x in pieces[1]]
    found = cache.update(*pieces[1])
    assert_equal(found[0], expected[0], because="all max_len positions are free again")
    assert_equal(found[1], expected[1], because="all max_len positions are free again")


def assert_untouched(cache, randn, before):
    """After a refused update: three positions as they were, and a fourth that follows them."""
    assert_equal(cache.length, 3, because="a refused update leaves the length")
    c, k_rope = randn(2, 1, 6), randn(2, 1, 4)
    found = cache.update(c, k_rope)
    for old, new, got in zip(before, (c, k_rope), found, strict=True):
        assert_equal(got, torch.cat([old, new], 1).cpu(), because="a refused update leaves the content")


@task("LatentCache")
@pytest.mark.parametrize("t", [5, 8])
def test_more_than_there_is_room_for_is_refused(solution, randn, device, t):
    cache = solution.LatentCache(2, 7, 6, 4, device=device)
    cache.update(randn(2, 2, 6), randn(2, 2, 4))
    before = [x.clone() for x in cache.update(randn(2, 1, 6), randn(2, 1, 4))]
    assert_equal((cache.length, tuple(before[0].shape)), (3, (2, 3, 6)), because="two positions and one are three")
    c, k_rope = randn(2, t, 6), randn(2, t, 4)
    with contextlib.suppress(ValueError):
        kept = cache.update(c, k_rope)[0]
        first = torch.equal(kept[:, :1], before[0][:, :1])
        assert_that(False, "max_len is 7: this has to be refused", value=(cache.length, tuple(kept.shape), first))
    assert_raises(ValueError, cache.update, c, k_rope, mentions=[str(t), "3", "7"], because="max_len is 7")
    assert_untouched(cache, randn, before)


@task("LatentCache")
@pytest.mark.parametrize(
    ("c", "k_rope", "mentions"),
    [
        ((1, 2, 6), (2, 2, 4), ["(1, 2, 6)"]),
        ((2, 2, 1), (2, 2, 4), ["(2, 2, 1)"]),
        ((2, 2, 6), (1, 2, 4), ["(1, 2, 4)"]),
        ((2, 2, 6), (2, 2, 1), ["(2, 2, 1)"]),
        ((1, 2, 6), (1, 2, 4), ["(1, 2, "]),
        ((2, 2, 6), (2, 1, 4), ["(2, 2, 6)", "(2, 1, 4)"]),
        ((2, 1, 6), (2, 2, 4), ["(2, 1, 6)", "(2, 2, 4)"]),
        ((2, 3, 2, 6), (2, 2, 4), ["(2, 3, 2, 6)"]),
        ((2, 2, 6), (2, 3, 2, 4), ["(2, 3, 2, 4)"]),
    ],
    ids=str,
)
def test_chunks_that_do_not_fit_are_refused(solution, randn, device, c, k_rope, mentions):
    cache = solution.LatentCache(2, 9, 6, 4, device=device)
    before = [x.clone() for x in cache.update(randn(2, 3, 6), randn(2, 3, 4))]
    assert_raises(ValueError, cache.update, randn(*c), randn(*k_rope), mentions=mentions)
    assert_untouched(cache, randn, before)


@task("LatentCache")
def test_a_graph_is_refused(solution, randn, device):
    cache = solution.LatentCache(2, 9, 6, 4, device=device)
    before = [x.clone() for x in cache.update(randn(2, 3, 6), randn(2, 3, 4))]
    c, k_rope = randn(2, 2, 6), randn(2, 2, 4)
    assert_raises(
        RuntimeError, cache.update, c.clone().requires_grad_(), k_rope, because="c has a graph, a cache keeps none"
    )
    assert_raises(
        RuntimeError, cache.update, c, k_rope.requires_grad_(), because="k_rope has a graph, a cache keeps none"
    )
    assert_untouched(cache, randn, before)


@task("LatentCache")
def test_the_memory_lies_where_it_was_asked_for(solution, randn, device):
    with torch.device("meta"):
        cache = solution.LatentCache(2, 9, 6, 4, device=device)
    c, k_rope = randn(2, 3, 6), randn(2, 3, 4)
    found = cache.update(c, k_rope)
    assert_equal(found[0], c.cpu().clone(), because="on the given device, whatever torch's default is")
    assert_equal(found[1], k_rope.cpu().clone(), because="on the given device, whatever torch's default is")


@task("LatentCache")
def test_without_gradients_anything_may_come(solution, randn, device):
    cache = solution.LatentCache(2, 9, 6, 4, device=device)
    c, k_rope = randn(2, 3, 6).requires_grad_(), randn(2, 3, 4).requires_grad_()
    with torch.no_grad():
        found = cache.update(c, k_rope)
    assert_equal([x.requires_grad for x in found], [False, False], because="under no_grad nothing keeps a graph")
    assert_equal(found[0], c.detach().cpu(), because="the numbers are stored all the same")


@cost_case("LatentCache")
def cache_cost(module, randn):
    with unmetered():
        c, k_rope = randn(2, 1, 64), randn(2, 1, 16)
        cache = module.LatentCache(2, 128, 64, 16, device=c.device)
        cache.update(randn(2, 64, 64), randn(2, 64, 16))
    return lambda: cache.update(c, k_rope)


# fold_norm


@task("fold_norm")
@pytest.mark.parametrize(("o", "r"), [(10, 6), (3, 7), (5, 5), (1, 1)])
def test_the_folded_weight_needs_no_gain(solution, randn, dtype, o, r):
    gain, weight, c = randn(r, dtype=dtype), randn(o, r, dtype=dtype), randn(4, r, dtype=dtype)
    ones = normed(array(c), np.ones(r))
    expected = normed(array(c), array(gain)) @ array(weight).T
    folded = solution.fold_norm(gain, weight)
    assert_equal(tuple(folded.shape), (o, r), because="as large as the weight")
    found = tensor(ones, dtype).to(folded.device) @ folded.T
    assert_close(
        found, tensor(expected, dtype), **TOLERANCE[dtype], because="the same outputs from a norm without gains"
    )


@task("fold_norm")
def test_a_gain_may_be_zero_or_negative(solution, device):
    gain, weight = (
        torch.tensor([0.0, -2.0, 1.0], device=device),
        torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], device=device),
    )
    expected = torch.tensor([[0.0, -4.0, 3.0], [0.0, -10.0, 6.0]])
    assert_equal(
        solution.fold_norm(gain, weight), expected, because="each number of the latent has its gain in its column"
    )


@task("fold_norm")
def test_folding_takes_any_strides_and_gives_gradients(solution, randn):
    gain, weight = noncontiguous(randn(4)), randn(4, 6).T
    expected = tensor(array(weight) @ np.diag(array(gain)), F32)
    assert_close(solution.fold_norm(gain, weight), expected, **TOLERANCE[F32], because="slices of larger tensors")
    assert_gradients_close(
        solution.fold_norm,
        lambda g, w: w @ torch.diag(g),
        [randn(4, dtype=F64), randn(6, 4, dtype=F64)],
        because="gradients flow to gain and weight",
    )


@task("fold_norm")
@pytest.mark.parametrize(("gain", "weight"), [((6,), (6, 5)), ((1,), (6, 5)), ((4,), (6, 5)), ((5, 1), (5, 5))])
def test_a_gain_that_does_not_fit_is_refused(solution, randn, gain, weight):
    assert_raises(ValueError, solution.fold_norm, randn(*gain), randn(*weight), mentions=[str(gain), str(weight)])


def miss(c, other):
    """How far the best matrix stays from both normalized latents, relative to their length; for the message also what
    part of `other` lies along c, and whether there is another part."""
    latents = np.stack([array(c), array(other)])
    if not np.isfinite(latents).all():
        return "not finite", 0.0, False
    sizes = np.sqrt((latents**2).mean(-1, keepdims=True))
    goals = np.divide(latents, sizes, out=np.zeros_like(latents), where=sizes > 0)
    scaled = latents / sizes.max()
    best = np.linalg.lstsq(scaled, goals, rcond=1e-6)[0]
    along = latents[1] @ latents[0] / (latents[0] @ latents[0])
    rest = np.abs(latents[1] - along * latents[0]).max() > 1e-4 * sizes.max()
    found = float(np.linalg.norm(scaled @ best - goals) / np.linalg.norm(goals))
    return round(found, 2) + 0.0, round(float(along), 2) + 0.0, bool(rest)


def away_from_zero(randn, rand, r, dtype=F32):
    """Latents whose numbers are all 0.1 or larger, of either sign."""
    sizes = rand(r, dtype=dtype) + 0.1
    return torch.where(randn(r) > 0, sizes, -sizes)


@task("fold_norm")
@pytest.mark.parametrize("r", [1, 2, 5, 64])
def test_no_matrix_normalizes_both(solution, randn, rand, dtype, r):
    c = away_from_zero(randn, rand, r, dtype)
    other = solution.norm_counterexample(c)
    found = [tuple(other.shape), other.dtype]
    assert_equal(found, [(r,), dtype], because="a latent like c")
    found = miss(c, other)
    because = "the best matrix must miss by 0.1 or more; it misses by the first number that was found"
    assert_that(found[0] != "not finite" and found[0] >= 0.1, because, value=found)


@task("fold_norm")
@pytest.mark.parametrize("size", [1e-3, 1e3])
def test_small_and_large_latents_have_a_counterexample(solution, randn, rand, size):
    c = size * away_from_zero(randn, rand, 6)
    found = miss(c, solution.norm_counterexample(c))
    assert_that(found[0] != "not finite" and found[0] >= 0.1, "whatever the length of c", value=found)


# QuantizedLatentCache


@task("QuantizedLatentCache")
@pytest.mark.parametrize(
    ("lead", "r", "group"), [((2, 3), 12, 4), ((5,), 8, 8), ((), 6, 2), ((2, 1, 2), 5, 1), ((0, 3), 4, 2)]
)
def test_codes_are_the_nearest_steps(solution, randn, dtype, lead, r, group):
    c = randn(*lead, r, dtype=dtype)
    groups = array(c).reshape(*lead, r // group, group)
    scales = np.abs(groups).max(-1) / 127
    codes, found = solution.quantize_latent(c, group)
    shapes = [tuple(codes.shape), codes.dtype, tuple(found.shape), found.dtype]
    assert_equal(
        shapes, [(*lead, r), torch.int8, (*lead, r // group), F32], because="int8 codes, a float32 scale per group"
    )
    assert_close(found, tensor(scales, F32), rtol=1e-6, because="a 127th of the largest magnitude in the group")
    back = array(codes).reshape(groups.shape) * scales[..., None]
    off = np.abs(back - groups) / np.maximum(scales[..., None], 1e-30)
    assert_that(
        bool((off <= 0.5 + 1e-4).all()),
        "no number is off by more than half a scale",
        value=None if off.size == 0 else round(float(off.max()), 1),
    )


@task("QuantizedLatentCache")
def test_the_largest_magnitude_has_the_last_code(solution, device):
    c = torch.tensor([[3.0, -1.5, 0.75, -6.0, 2.0, 12.7], [-12.7, 12.7, 0.04, 0.06, 6.35, -0.1]], device=device)
    codes, scales = solution.quantize_latent(c, 3)
    assert_close(scales, torch.tensor([[3.0, 12.7], [12.7, 6.35]]) / 127, rtol=1e-6, because="each group has its own")
    expected = torch.tensor([[127, -64, 32, -60, 20, 127], [-127, 127, 0, 1, 127, -2]], dtype=torch.int8)
    assert_that(
        (codes.cpu()[:, [0, 3, 4, 5]] == expected[:, [0, 3, 4, 5]]).all() and (codes.cpu()[1] == expected[1]).all(),
        "3 is the largest of its group, so 127; 6 of 12.7 is 60 steps",
        value=codes.cpu()[:, [0, 3, 4, 5]],
    )


@task("QuantizedLatentCache")
@pytest.mark.parametrize("half", [F16, BF16], ids=str)
def test_half_precision_latents_are_quantized_in_float32(solution, randn, half):
    c = (1000 * randn(3, 8)).to(half)
    scales = np.abs(array(c).reshape(3, 2, 4)).max(-1) / 127
    codes, found = solution.quantize_latent(c, 4)
    assert_close(
        found, tensor(scales, F32), rtol=1e-6, because="scales are float32 numbers, not rounded to half precision"
    )
    off = np.abs(array(codes).reshape(3, 2, 4) - array(c).reshape(3, 2, 4) / scales[..., None]).max()
    assert_that(off <= 0.5 + 1e-4, "the nearest code, by division in float32", value=round(float(off), 2))


@task("QuantizedLatentCache")
def test_zeros_have_the_code_zero(solution, randn):
    c = randn(2, 3, 8)
    c[:, 1, :4] = 0.0
    codes, scales = solution.quantize_latent(c, 4)
    assert_equal(codes[:, 1, :4], torch.zeros(2, 4, dtype=torch.int8), because="a group of zeros has the codes 0")
    assert_equal(scales[:, 1, 0], torch.zeros(2), because="and the scale 0: nothing is divided by it")


@task("QuantizedLatentCache")
def test_a_group_is_128_unless_said(solution, randn, device):
    codes, scales = solution.quantize_latent(randn(3, 256))
    assert_equal(tuple(scales.shape), (3, 2), because="r / 128 scales")
    cache = solution.QuantizedLatentCache(2, 5, 256, 4, device=device)
    assert_equal(tuple(cache.update(randn(2, 3, 256), randn(2, 3, 4))[1].shape), (2, 3, 2), because="r / 128 scales")


@task("QuantizedLatentCache")
def test_a_latent_without_whole_groups_is_refused(solution, randn, device):
    assert_raises(ValueError, solution.quantize_latent, randn(2, 9), 4, mentions=["(2, 9)"])
    assert_raises(ValueError, solution.quantize_latent, randn(2, 8), 16, mentions=["(2, 8)"])
    assert_raises(ValueError, solution.QuantizedLatentCache, 2, 5, 9, 4, group=4, device=device)


@task("QuantizedLatentCache")
@pytest.mark.parametrize(("b", "n", "r", "dr", "group"), [(2, 7, 12, 4, 4), (1, 3, 8, 2, 8), (3, 5, 6, 6, 2)])
def test_a_quantized_token_takes_few_bytes(solution, randn, device, b, n, r, dr, group):
    cache = solution.QuantizedLatentCache(b, n, r, dr, group=group, device=device)
    each = r + 4 * (r // group) + 2 * dr
    assert_equal(cache.bytes_per_token, each, because="a byte a code, four a scale, two a number of the key")
    assert_equal(cache.nbytes, b * n * each, because="for every position of every row")
    assert_equal((cache.length, cache.max_len), (0, n), because="nothing has come yet")
    views = cache.update(randn(b, 1, r), randn(b, 1, dr))
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in views}
    assert_equal(sum(storages.values()), b * n * each, because="what update returns are views of that memory")


@task("QuantizedLatentCache")
def test_deepseeks_record_has_656_bytes(solution, device):
    cache = solution.QuantizedLatentCache(1, 2, 512, 64, device=device)
    assert_equal(cache.bytes_per_token, 656, because="512 codes, 4 scales, 64 numbers in bfloat16")


@task("QuantizedLatentCache")
@pytest.mark.parametrize("sizes", [(5,), (1, 1, 1), (3, 0, 4), (2, 5)], ids=str)
def test_a_quantized_cache_returns_all_that_came(solution, randn, device, sizes):
    pieces, joined = chunks(randn, sizes, r=8)
    cache = solution.QuantizedLatentCache(2, 9, 8, 4, group=4, device=device)
    total = 0
    for (c, k_rope), t in zip(pieces, sizes, strict=True):
        with unchanged(c, k_rope), global_rng_untouched():
            codes, scales, keys = cache.update(c, k_rope)
        total += t
        assert_equal(cache.length, total, because="length counts the valid positions")
        found = [tuple(x.shape) for x in (codes, scales, keys)] + [codes.dtype, scales.dtype, keys.dtype]
        wanted = [(2, total, 8), (2, total, 2), (2, total, 4), torch.int8, F32, BF16]
        assert_equal(found, wanted, because="codes, scales and keys of all positions so far")
        assert_equal(
            keys, tensor(joined[1][:, :total], F32).to(BF16), because="keys are rounded to bfloat16, not quantized"
        )
        steps = np.abs(joined[0][:, :total].reshape(2, total, 2, 4)).max(-1) / 127
        back = array(codes).reshape(2, total, 2, 4) * array(scales)[..., None]
        off = np.abs(back - joined[0][:, :total].reshape(2, total, 2, 4)) - 0.5001 * steps[..., None]
        assert_that(
            bool((off <= 1e-7).all()), "codes * scales are the latents, up to half a scale", value=round(off.max(), 2)
        )


@task("QuantizedLatentCache")
def test_a_quantized_cache_can_be_cut_and_emptied(solution, randn, device):
    pieces, _ = chunks(randn, (5, 2, 9), r=8)
    cache, fresh = (solution.QuantizedLatentCache(2, 9, 8, 4, group=4, device=device) for _ in range(2))
    cache.update(*pieces[0])
    cache.truncate(2)
    assert_equal((cache.length, fresh.length), (2, 0), because="the first n positions are kept, in this cache")
    found = cache.update(*pieces[1])
    fresh.update(*[x[:, :2] for x in pieces[0]])
    for one, two in zip(found, fresh.update(*pieces[1]), strict=True):
        assert_equal(one, two.cpu().clone(), because="as if the forgotten positions had never come")
    for n in (-1, 5):
        assert_raises(ValueError, cache.truncate, n, because="0 <= n <= length")
    cache.reset()
    assert_equal(cache.length, 0, because="everything is forgotten")
    assert_equal(tuple(cache.update(*pieces[2])[0].shape), (2, 9, 8), because="all positions are free again")


@task("QuantizedLatentCache")
@pytest.mark.parametrize(
    ("c", "k_rope"),
    [
        ((2, 7, 8), (2, 7, 4)),
        ((1, 2, 8), (2, 2, 4)),
        ((2, 2, 4), (2, 2, 4)),
        ((2, 2, 8), (2, 2, 1)),
        ((2, 2, 8), (2, 1, 4)),
    ],
    ids=str,
)
def test_a_quantized_cache_refuses_what_does_not_fit(solution, randn, device, c, k_rope):
    cache = solution.QuantizedLatentCache(2, 9, 8, 4, group=4, device=device)
    before = [x.clone() for x in cache.update(randn(2, 3, 8), randn(2, 3, 4))]
    assert_raises(ValueError, cache.update, randn(*c), randn(*k_rope))
    assert_equal(cache.length, 3, because="a refused update leaves the length")
    after = cache.update(randn(2, 1, 8), randn(2, 1, 4))
    for one, two in zip(after, before, strict=True):
        assert_equal(one[:, :3], two.cpu(), because="a refused update leaves the content")
    with_graph = randn(2, 1, 8).requires_grad_(), randn(2, 1, 4)
    assert_raises(RuntimeError, cache.update, *with_graph, because="a cache keeps no graph")


@task("QuantizedLatentCache")
def test_a_quantized_cache_has_its_own_dtypes_and_device(solution, randn, device):
    before = torch.get_default_dtype()
    torch.set_default_dtype(F64)
    try:
        with torch.device("meta"):
            cache = solution.QuantizedLatentCache(2, 9, 8, 4, group=4, device=device)
    finally:
        torch.set_default_dtype(before)
    found = cache.update(randn(2, 3, 8), randn(2, 3, 4))
    kinds = [(x.dtype, x.device.type) for x in found]
    expected = [(kind, device.type) for kind in (torch.int8, F32, BF16)]
    assert_equal(
        kinds, expected, because="int8, float32 and bfloat16 on the given device, whatever torch's defaults are"
    )


@task("QuantizedLatentCache")
def test_a_quantized_update_does_not_touch_the_past(solution, randn, device):
    costs = []
    for length in (4, 60):
        with unmetered():
            cache = solution.QuantizedLatentCache(2, 64, 8, 4, group=4, device=device)
            cache.update(randn(2, length, 8), randn(2, length, 4))
            c, k_rope = randn(2, 1, 8), randn(2, 1, 4)
        costs.append(measure(cache.update, c, k_rope)[1].new_bytes)
    assert_that(costs[0] == costs[1], "an update needs as much memory after 60 positions as after 4", value=costs)


def quantized(randn, b, s, r, group, scale=1.0):
    """Codes and scales that nobody computed, with all codes allowed."""
    codes = (randn(b, s, r) * 50).clamp(-127, 127).round().to(torch.int8)
    return codes, randn(b, s, r // group).abs() * scale


def loop_scores(q, codes, scales):
    """Position by position."""
    q, codes, scales = array(q), array(codes), array(scales)
    latents = codes * np.repeat(scales, codes.shape[-1] // scales.shape[-1], -1)
    return np.stack([[q[b, h] @ latents[b].T for h in range(q.shape[1])] for b in range(q.shape[0])])


@task("QuantizedLatentCache")
@pytest.mark.parametrize(
    ("s", "block", "group"), [(10, 4, 4), (8, 4, 8), (3, 64, 2), (70, None, 4), (5, 1, 8), (0, 4, 4)]
)
def test_quantized_scores_are_those_of_the_latents(solution, randn, dtype, s, block, group):
    q, (codes, scales) = randn(2, 3, 2, 8, dtype=dtype), quantized(randn, 2, s, 8, group, 0.02)
    expected = loop_scores(q, codes, scales)
    found = solution.quantized_scores(q, codes, scales, *([] if block is None else [block]))
    assert_close(found, tensor(expected, dtype), **TOLERANCE[dtype], because="q . (codes * scales), whatever the block")


@task("QuantizedLatentCache")
@pytest.mark.parametrize("half", [F16, BF16], ids=str)
def test_quantized_scores_are_added_up_in_float32(solution, device, half):
    q = torch.tensor([1.0, -1.0], device=device).to(half).expand(1, 2, 3, 2)
    codes = torch.full((1, 5, 2), 64, dtype=torch.int8, device=device)
    scales = torch.tensor([1 + 2**-12, 1.0], device=device).expand(1, 5, 2)
    expected = torch.full((1, 2, 3, 5), 2.0**-6, dtype=half)
    found = solution.quantized_scores(q, codes, scales)
    assert_close(found, expected, rtol=1e-2, because="64 * (1 + 2**-12) - 64: half precision loses the difference")


@task("QuantizedLatentCache")
def test_quantized_scores_send_gradients_to_the_query(solution, randn):
    codes, scales = quantized(randn, 2, 5, 8, 4, 0.02)
    latents = codes.double() * scales.double().repeat_interleave(4, -1)
    assert_gradients_close(
        lambda q: solution.quantized_scores(q, codes, scales, 2),
        lambda q: torch.einsum("bhtr,bsr->bhts", q, latents),
        [randn(2, 3, 2, 8, dtype=F64)],
        **TOLERANCE[F64],
        because="as through the latents",
    )


@task("QuantizedLatentCache")
@pytest.mark.parametrize("block", [4, 16, None])
def test_only_a_block_is_turned_back(solution, randn, block):
    with unmetered():
        q, (codes, scales) = randn(2, 3, 1, 32), quantized(randn, 2, 200, 32, 8)
    assert_cost(
        solution.quantized_scores,
        q,
        codes,
        scales,
        *([] if block is None else [block]),
        no_larger_than=max(2 * (block or 64) * 32, 2 * 3 * 200),
        flops=2 * 2 * 3 * 200 * 32,
        because="all latents in floating point would be 2*200*32 numbers: four bytes for each that was stored in one",
    )


@task("QuantizedLatentCache")
@pytest.mark.parametrize(
    ("q", "codes", "scales", "mentions"),
    [
        ((1, 3, 2, 8), (2, 5, 8), (2, 5, 2), ["(1, 3, 2, 8)", "(2, 5, 8)"]),
        ((2, 3, 2, 1), (2, 5, 8), (2, 5, 2), ["(2, 3, 2, 1)", "(2, 5, 8)"]),
        ((2, 3, 2, 8), (2, 5, 8), (1, 5, 2), ["(2, 5, 8)", "(1, 5, 2)"]),
        ((2, 3, 2, 8), (2, 5, 8), (2, 1, 2), ["(2, 5, 8)", "(2, 1, 2)"]),
    ],
    ids=str,
)
def test_quantized_scores_refuse_what_does_not_fit(solution, randn, q, codes, scales, mentions):
    codes = torch.ones(codes, dtype=torch.int8, device=randn(1).device)
    assert_raises(ValueError, solution.quantized_scores, randn(*q), codes, randn(*scales), mentions=mentions)


@task("QuantizedLatentCache")
@pytest.mark.parametrize(("s", "r", "groups"), [(5, 8, 2), (3, 6, 1), (2, 4, 4)])
def test_the_bound_is_half_a_scale_in_the_direction_that_hurts(solution, randn, dtype, s, r, groups):
    q, scales = randn(2, 3, 2, r, dtype=dtype), randn(2, s, groups).abs()
    worst = np.repeat(array(scales), r // groups, -1) / 2
    expected = np.zeros((2, 3, 2, s))
    for b, h, t, n in np.ndindex(*expected.shape):
        row = array(q)[b, h, t]
        expected[b, h, t, n] = row @ (np.sign(row) * worst[b, n])
    found = solution.score_error_bound(q, scales)
    assert_close(
        found, tensor(expected, dtype), **TOLERANCE[dtype], because="reached when every number is off by half its scale"
    )


@task("QuantizedLatentCache")
def test_no_score_is_off_by_more_than_the_bound(solution, randn):
    q, c = randn(2, 3, 4, 16), randn(2, 30, 16)
    scales = (c.unflatten(-1, (4, 4)).abs().amax(-1) / 127).contiguous()
    back = (c.unflatten(-1, (4, 4)) / scales[..., None]).round() * scales[..., None]
    off = torch.einsum("bhtr,bsr->bhts", q.double(), (back.flatten(-2) - c).double()).abs()
    bound = solution.score_error_bound(q, scales).double()
    assert_that((off <= bound * 1.001 + 1e-6).all(), "rounding to the nearest step stays below the bound")


@task("QuantizedLatentCache")
def test_a_bound_for_half_precision_is_in_float32(solution, randn):
    q, scales = randn(2, 3, 2, 8).to(BF16), randn(2, 5, 2).abs()
    weights = np.abs(array(q)).reshape(2, 3, 2, 2, 4).sum(-1)
    expected = np.einsum("bhtg,bsg->bhts", weights, array(scales)) / 2
    found = solution.score_error_bound(q, scales)
    assert_close(found, tensor(expected, F32), rtol=1e-5, because="float32 at least: a bound must not be rounded down")


@task("QuantizedLatentCache")
@pytest.mark.parametrize(("q", "scales"), [((1, 3, 2, 8), (2, 5, 2)), ((2, 3, 2, 8), (2, 5, 3))], ids=str)
def test_a_bound_refuses_what_does_not_fit(solution, randn, q, scales):
    assert_raises(ValueError, solution.score_error_bound, randn(*q), randn(*scales), mentions=[str(q), str(scales)])


@cost_case("QuantizedLatentCache")
def quantized_cost(module, randn):
    with unmetered():
        q, (codes, scales) = randn(1, 8, 1, 64), quantized(randn, 1, 256, 64, 32)
    return lambda: module.quantized_scores(q, codes, scales)
