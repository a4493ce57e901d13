import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from checker.testing import (
    assert_close,
    assert_cost,
    assert_equal,
    assert_gradcheck,
    assert_raises,
    assert_that,
    cost_case,
    global_rng_untouched,
    noncontiguous,
    same_storage,
    task,
    unchanged,
)

HALVES = [torch.float16, torch.bfloat16]
HALF = {"rtol": 2e-2, "atol": 2e-2}
SUMS = {torch.float32: {"rtol": 1e-4, "atol": 1e-5}, torch.float64: {"rtol": 1e-10, "atol": 1e-12}}


def array(x):
    """The values of a tensor as numpy has them, in float64."""
    return x.detach().cpu().double().numpy()


def like(values, x):
    """Values from numpy as a tensor of the dtype of x."""
    return torch.as_tensor(np.ascontiguousarray(values)).to(x.dtype)


def rounded(number):
    """Two digits: what is random in a statistic is left out, so that a known mistake looks the same at every draw."""
    return float(f"{number:.2g}")


def seeded(seed, device="cpu"):
    return torch.Generator(device=device).manual_seed(seed)


def fill(module, **values):
    """Copy tensors into the parameters of a module, under their names with dots written as __."""
    with torch.no_grad():
        for name, value in values.items():
            module.get_parameter(name.replace("__", ".")).copy_(value)
    return module


def shapes(state):
    return {name: tuple(value.shape) for name, value in state.items()}


def gradient(tensor, because):
    assert_that(tensor.grad is not None, because)
    return tensor.grad


# Embedding

IDS = [(), (5,), (2, 3), (2, 1, 4), (0,), (3, 0)]


def table_of(solution, randn, device, num=7, dim=4, padding_idx=None):
    """An embedding whose rows are known, the padding row included."""
    layer = solution.Embedding(num, dim, padding_idx).to(device)
    values = randn(num, dim)
    return fill(layer, weight=values), values


@task("Embedding")
@pytest.mark.parametrize("lead", IDS, ids=str)
@pytest.mark.parametrize("padding_idx", [None, 2], ids=["no padding", "padding 2"])
def test_each_id_becomes_its_row(solution, randn, randint, device, lead, padding_idx):
    layer, values = table_of(solution, randn, device, padding_idx=padding_idx)
    ids = randint(0, 7, lead)
    expected = F.embedding(ids, values)
    assert_close(layer(ids).detach(), expected, because="row i of the table for id i", rtol=0, atol=0)


@task("Embedding")
@pytest.mark.parametrize("padding_idx", [None, 2], ids=["no padding", "padding 2"])
def test_a_square_table(solution, randn, device, padding_idx):
    layer, values = table_of(solution, randn, device, 4, 4, padding_idx)
    ids = torch.tensor([[3, 0, 2, 1], [2, 2, 0, 3]], device=device)
    expected = F.embedding(ids, values)
    assert_close(layer(ids).detach(), expected, because="as many rows as columns: row i for id i", rtol=0, atol=0)


@task("Embedding")
@pytest.mark.parametrize("padding_idx", [None, 2], ids=["no padding", "padding 2"])
def test_ids_of_int32_and_other_strides(solution, randn, randint, device, padding_idx):
    layer, values = table_of(solution, randn, device, padding_idx=padding_idx)
    ids = randint(0, 7, (3, 5))
    expected = F.embedding(ids, values)
    assert_close(layer(ids.int()).detach(), expected, because="int32 ids", rtol=0, atol=0)
    assert_close(layer(noncontiguous(ids)).detach(), expected, because="ids that lie apart", rtol=0, atol=0)
    assert_close(layer(ids.T).detach(), expected.transpose(0, 1), because="ids transposed", rtol=0, atol=0)


@task("Embedding")
def test_the_weight_is_all_there_is(solution):
    layer = solution.Embedding(7, 4, 2)
    assert_equal(shapes(layer.state_dict()), {"weight": (7, 4)}, because="the state dict of nn.Embedding(7, 4)")
    assert_equal([name for name, _ in layer.named_parameters()], ["weight"], because="the weight is trained")
    assert_equal((layer.num, layer.dim, layer.padding_idx), (7, 4, 2), because="num, dim, padding_idx")
    assert_equal(solution.Embedding(7, 4).padding_idx, None, because="there is no padding unless you say so")


@task("Embedding")
def test_the_table_starts_normal(solution, seed):
    torch.manual_seed(seed)
    values = solution.Embedding(300, 70).weight.detach().double()
    assert_that(abs(values.mean()) < 0.05, "the mean of 21,000 values is near 0", value=rounded(values.mean().item()))
    assert_that(abs(values.std() - 1) < 0.05, "their spread is near 1", value=rounded(values.std().item()))
    inside = (values.abs() < 1).double().mean().item()
    assert_that(abs(inside - 0.683) < 0.03, "the share within one spread, 0.68 for a normal", value=rounded(inside))


@task("Embedding")
def test_the_table_comes_from_the_global_random_state(solution, seed):
    torch.manual_seed(seed)
    first, second = solution.Embedding(5, 4).weight.detach(), solution.Embedding(5, 4).weight.detach()
    torch.manual_seed(seed)
    assert_equal(solution.Embedding(5, 4).weight.detach(), first, because="the same torch.manual_seed")
    assert_that(not torch.equal(first, second), "two layers start differently", value=second)


@task("Embedding")
@pytest.mark.parametrize("padding_idx", [0, 2, 4])
def test_the_padding_row_starts_as_zeros(solution, padding_idx):
    zero_rows = (solution.Embedding(5, 3, padding_idx).weight.detach() == 0).all(dim=1).nonzero().flatten().tolist()
    assert_equal(zero_rows, [padding_idx], because=f"rows of zeros with padding_idx={padding_idx}")


@task("Embedding")
@pytest.mark.parametrize("padding_idx", [None, 0, 2, 6])
def test_the_gradient_of_the_table(solution, randn, randint, device, padding_idx):
    layer, values = table_of(solution, randn, device, padding_idx=padding_idx)
    ids, weights = torch.cat([torch.arange(7, device=device), randint(0, 7, (14,))]).reshape(3, 7), randn(3, 7, 4)
    oracle = values.clone().requires_grad_()
    (F.embedding(ids, oracle, padding_idx) * weights).sum().backward()
    (layer(ids) * weights).sum().backward()
    found = gradient(layer.weight, "after backward weight.grad is there")
    assert_close(found, oracle.grad, because=f"a row gets what its ids got, summed; padding_idx={padding_idx}")


@task("Embedding")
def test_a_tied_head_still_reaches_the_padding_row(solution, randn, device):
    layer, values = table_of(solution, randn, device, padding_idx=2)
    ids, h = torch.tensor([1, 2, 2], device=device), randn(3, 4)
    oracle = values.clone().requires_grad_()
    (F.embedding(ids, oracle, 2).sum() + (h @ oracle.T).square().sum()).backward()
    (layer(ids).sum() + (h @ layer.weight.T).square().sum()).backward()
    found = gradient(layer.weight, "after backward weight.grad is there")
    assert_close(found, oracle.grad, because="the head uses the padding row as well", rtol=1e-4, atol=1e-5)


@task("Embedding")
@pytest.mark.parametrize("padding_idx", [None, 0, 6])
@pytest.mark.parametrize("bad", [-1, -7, 7, 100])
def test_an_id_that_is_not_a_row(solution, randn, padding_idx, bad):
    layer, _ = table_of(solution, randn, torch.device("cpu"), padding_idx=padding_idx)
    ids = torch.tensor([[0, 3], [bad, 6]])
    try:
        out = layer(ids).detach()
    except IndexError:
        return
    assert_that(False, f"a table of 7 rows has no row {bad}: IndexError was expected", value=out)


@task("Embedding")
@pytest.mark.parametrize("padding_idx", [-1, 7, 20])
def test_a_padding_row_that_is_not_there(solution, padding_idx):
    assert_raises(ValueError, solution.Embedding, 7, 4, padding_idx, mentions=[str(padding_idx)])


@task("Embedding")
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("padding_idx", [None, 2], ids=["no padding", "padding 2"])
def test_the_dtype_of_the_table_is_that_of_the_result(solution, randn, device, kind, padding_idx):
    layer, _ = table_of(solution, randn, device, padding_idx=padding_idx)
    layer = layer.to(kind)
    ids = torch.tensor([2, 0, 5], device=device)
    expected = layer.weight.detach()[[2, 0, 5]]
    assert_close(layer(ids).detach(), expected, because=f"a table of {kind}", rtol=0, atol=0)


@task("Embedding")
def test_it_runs_without_values(solution):
    layer = solution.Embedding(7, 4, 2).to("meta")
    out = layer(torch.zeros(2, 3, dtype=torch.long, device="meta"))
    assert_equal((tuple(out.shape), out.device.type), ((2, 3, 4), "meta"), because="weight and ids on meta")


@task("Embedding")
@pytest.mark.parametrize("padding_idx", [None, 2], ids=["no padding", "padding 2"])
def test_only_the_rows_asked_for_are_read(solution, randint, device, padding_idx):
    layer, ids = solution.Embedding(1000, 6, padding_idx).to(device), randint(0, 1000, (4, 5))
    with unchanged(layer.weight, ids):
        assert_cost(layer, ids, matmuls=0, because="reading rows takes no matrix product")
        assert_cost(layer, ids, no_larger_than=4 * 5 * 6, because="nothing is larger than the result")


@cost_case("Embedding")
def embedding_cost(module, randint):
    ids = randint(0, 1000, (8, 16))
    layer = module.Embedding(1000, 64).to(ids.device)
    return lambda: layer(ids)


# Dropout

ZERO_SEED = 146  # with it, one of the first 65,536 values of torch.rand on the CPU is exactly 0


@task("Dropout")
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_in_eval_it_hands_back_the_very_same_tensor(solution, randn, generator, p):
    layer, x = solution.Dropout(p, generator).eval(), randn(4, 6)
    before = generator.get_state()
    with global_rng_untouched():
        out = layer(x)
    assert_that(out is x, "in eval the result is the object x", value=out)
    assert_equal(generator.get_state(), before, because="in eval nothing is drawn")


@task("Dropout")
def test_eval_is_free(solution, randn):
    layer, x = solution.Dropout(0.3).eval(), randn(4, 6)
    assert_cost(layer, x, max_calls=0, max_new_bytes=0, because="in eval nothing is computed")


@task("Dropout")
@pytest.mark.parametrize("p", [0.1, 0.5, 0.75])
def test_survivors_grow_by_exactly_what_is_lost(solution, randn, generator, p, dtype):
    x = randn(40, 50, dtype=dtype)
    out = solution.Dropout(p, generator)(x)
    expected = torch.where(out == 0, 0.0, x / (1 - p))
    assert_close(out, expected, because=f"p={p}: each number is 0 or x / (1 - p)")


@task("Dropout")
@pytest.mark.parametrize("p", [0.1, 0.3, 0.9])
def test_the_share_that_is_dropped(solution, device, generator, p):
    out = solution.Dropout(p, generator)(torch.ones(200, 200, device=device))
    share = (out == 0).double().mean().item()
    assert_that(abs(share - p) < 0.02, f"p={p}: the share of zeros among 40,000", value=rounded(share))


@task("Dropout")
@pytest.mark.parametrize("p", [0.1, 0.3, 0.5])
def test_the_mean_stays(solution, device, generator, p):
    layer, x = solution.Dropout(p, generator), torch.ones(200, 200, device=device)
    means = {"training": layer(x).double().mean().item(), "eval": layer.eval()(x).double().mean().item()}
    found = {mode: rounded(mean) for mode, mean in means.items()}
    assert_that(
        abs(means["training"] - 1) < 0.04, f"p={p}: the mean of what was 1 everywhere, in training", value=found
    )


@task("Dropout")
def test_every_number_has_its_own_luck(solution, device, generator):
    out = solution.Dropout(0.5, generator)(torch.ones(2, 60, 60, device=device)) != 0
    rows, columns = out.reshape(120, 60), out.transpose(1, 2).reshape(120, 60)
    found = len({tuple(row) for row in rows.tolist()}), len({tuple(column) for column in columns.tolist()})
    assert_equal(found, (120, 120), because="different patterns among 120 rows and among 120 columns")


@task("Dropout")
def test_the_number_of_zeros_is_luck_too(solution, device, generator):
    layer = solution.Dropout(0.5, generator)
    counts = {int((layer(torch.ones(64, device=device)) == 0).sum()) for _ in range(60)}
    assert_that(len(counts) > 1, "60 draws of 64 numbers: how many zeros there were", value=sorted(counts))


@task("Dropout")
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_shape_and_dtype_are_kept(solution, randn, generator, shape, kind):
    out = solution.Dropout(0.5, generator)(randn(*shape).to(kind))
    assert_equal((tuple(out.shape), out.dtype), (shape, kind), because="shape and dtype of the result")


@task("Dropout")
def test_nothing_is_dropped_with_p_0(solution, randn, generator):
    x = randn(40, 50)
    expected = x.clone()
    assert_equal(solution.Dropout(0.0, generator)(x), expected, because="p = 0 in training")


@task("Dropout")
def test_p_0_meets_a_draw_of_exactly_0(solution, device):
    x = torch.ones(256, 256, device=device)
    out = solution.Dropout(0.0, seeded(ZERO_SEED))(x)
    assert_close(out, torch.ones(256, 256), because="uniform numbers may be 0, and p = 0 drops nothing all the same")


@task("Dropout")
@pytest.mark.parametrize("p", [1.0, 1], ids=repr)
def test_all_is_dropped_with_p_1(solution, randn, generator, p):
    x = randn(4, 5).requires_grad_()
    out = solution.Dropout(p, generator)(x)
    assert_close(out.detach(), torch.zeros(4, 5), because="p = 1 gives zeros")
    out.sum().backward()
    assert_close(gradient(x, "p = 1 is still part of the graph"), torch.zeros(4, 5), because="a gradient of zeros")


@task("Dropout")
@pytest.mark.parametrize("p", [0.2, 0.5])
def test_the_gradient_goes_through_the_survivors(solution, randn, generator, p):
    x, weights = randn(20, 30).requires_grad_(), randn(20, 30)
    out = solution.Dropout(p, generator)(x)
    (out * weights).sum().backward()
    expected = torch.where(out.detach() == 0, 0.0, weights / (1 - p))
    assert_close(gradient(x, "x gets a gradient"), expected, because="0 where dropped, 1 / (1 - p) elsewhere")


@task("Dropout")
def test_equal_generators_give_equal_results(solution, randn, seed):
    x = randn(30, 40)
    one, two = (solution.Dropout(0.5, seeded(seed)) for _ in range(2))
    with global_rng_untouched():
        first, second, third = one(x), two(x), one(x)
    assert_equal(first, second, because="two layers whose generators have the same seed")
    assert_that(not torch.equal(first, third), "the second call draws anew", value=third)


@task("Dropout")
def test_the_seed_of_the_generator_counts(solution, randn, seed):
    x = randn(30, 40)
    one, two = (solution.Dropout(0.5, seeded(seed + number))(x) for number in range(2))
    assert_that(not torch.equal(one, two), "another seed, another result", value=two)


@task("Dropout")
def test_without_a_generator_the_global_state_decides(solution, randn, seed):
    x, layer = randn(30, 40), solution.Dropout(0.5)
    torch.manual_seed(seed)
    first, second = layer(x), layer(x)
    torch.manual_seed(seed)
    assert_equal(layer(x), first, because="the same torch.manual_seed, the same result")
    assert_that(not torch.equal(first, second), "the second call draws anew", value=second)


@task("Dropout")
def test_training_can_be_switched_on_again(solution, device, generator):
    layer, x = solution.Dropout(0.5, generator), torch.ones(30, 40, device=device)
    layer.eval()
    layer(x)
    layer.train()
    dropped = bool((layer(x) == 0).any())
    assert_that(dropped, "after eval() and train() numbers are dropped again", value=dropped)


@task("Dropout")
def test_what_comes_in_is_not_changed(solution, randn, generator):
    x = randn(30, 40)
    with unchanged(x):
        out = solution.Dropout(0.5, generator)(x)
    assert_that(not same_storage(out, x), "the result has memory of its own", value=out)


@task("Dropout")
def test_it_keeps_nothing_in_files(solution, generator):
    layer = solution.Dropout(0.3, generator)
    assert_equal(list(layer.state_dict()), [], because="the state dict of nn.Dropout is empty")
    assert_equal((layer.p, layer.generator is generator), (0.3, True), because="p, and the generator itself")
    assert_equal(solution.Dropout(0.3).generator, None, because="no generator unless you give one")


@task("Dropout")
@pytest.mark.parametrize("p", [-0.1, 1.1, 2])
def test_a_p_that_is_no_probability(solution, p):
    assert_raises(ValueError, solution.Dropout, p, mentions=[str(p)], because=f"p = {p}")


@task("Dropout")
def test_a_device_without_values(solution, generator):
    with global_rng_untouched():
        out = solution.Dropout(0.5)(torch.ones(3, 4, device="meta"))
    assert_equal(out.device.type, "meta", because="x on meta, no generator")
    out = solution.Dropout(0.5, generator)(torch.ones(3, 4, device="meta"))
    assert_equal(out.device.type, "meta", because="x on meta, a generator on the CPU")


@cost_case("Dropout")
def dropout_cost(module, randn):
    layer, x = module.Dropout(0.1), randn(64, 256)
    return lambda: layer(x)


# RMSNorm

LEADS = [(), (5,), (2, 3), (0,), (3, 0)]


def rms_of(x, weight, eps):
    """In numpy, in float64."""
    x, weight = array(x), array(weight)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def norm_of(solution, weight, **options):
    return fill(solution.RMSNorm(len(weight), **options).to(weight.device, weight.dtype), weight=weight)


@task("RMSNorm")
@pytest.mark.parametrize("lead", LEADS, ids=str)
def test_rows_over_their_root_mean_square(solution, randn, dtype, lead):
    x, weight = randn(*lead, 6, dtype=dtype), randn(6, dtype=dtype)
    expected = like(rms_of(x, weight, 1e-6), x)
    out = norm_of(solution, weight)(x).detach()
    assert_close(out, expected, because="x / sqrt(mean(x^2) + eps) * weight, along the last dimension", **SUMS[dtype])


@task("RMSNorm")
def test_a_cube_shows_which_dimension_is_the_last(solution, randn):
    x, weight = randn(4, 4, 4, dtype=torch.float64) + 0.5, randn(4, dtype=torch.float64)
    expected = like(rms_of(x, weight, 1e-6), x)
    assert_close(norm_of(solution, weight)(x).detach(), expected, because="the mean runs along the last dimension")


@task("RMSNorm")
@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_it_is_the_layer_of_torch(solution, randn, device, dtype, offset):
    theirs = nn.RMSNorm(6, eps=1e-5).to(device, dtype)
    fill(theirs, weight=randn(6, dtype=dtype))
    x, weights = randn(2, 3, 6, dtype=dtype) + offset, randn(2, 3, 6, dtype=dtype)
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = theirs(one)
    (expected * weights).sum().backward()
    layer = solution.RMSNorm(6, eps=1e-5).to(device, dtype)
    layer.load_state_dict(theirs.state_dict())
    out = layer(two)
    assert_close(out.detach(), expected.detach(), because="the values of nn.RMSNorm", **SUMS[dtype])
    (out * weights).sum().backward()
    assert_close(gradient(two, "x gets a gradient"), one.grad, because="the gradient of x", **SUMS[dtype])
    found = gradient(layer.weight, "the weight gets a gradient")
    assert_close(found, theirs.weight.grad, because="the gradient of the weight", **SUMS[dtype])


@task("RMSNorm")
def test_the_norm_starts_with_a_weight_of_ones(solution):
    layer = solution.RMSNorm(3)
    assert_equal(list(layer.state_dict()), ["weight"], because="the state dict of nn.RMSNorm(3)")
    assert_equal(layer.weight.detach(), torch.ones(3), because="weight (3,) of ones")
    assert_equal([name for name, _ in layer.named_parameters()], ["weight"], because="the weight is trained")


@task("RMSNorm")
@pytest.mark.parametrize("size", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("eps", [None, 1e-4], ids=["default", "1e-4"])
def test_epsilon_is_inside_the_root(solution, randn, size, eps):
    x = randn(3, 6, dtype=torch.float64) * size
    ones = torch.ones(6, dtype=torch.float64, device=x.device)
    expected = like(rms_of(x, ones, 1e-6 if eps is None else eps), x)
    layer = norm_of(solution, ones) if eps is None else norm_of(solution, ones, eps=eps)
    assert_close(layer(x).detach(), expected, because="in small rows eps (1e-6 unless told) shows")


@task("RMSNorm")
def test_the_size_of_a_row_does_not_matter(solution, randn):
    x, weight = randn(3, 6, dtype=torch.float64), randn(6, dtype=torch.float64)
    layer = norm_of(solution, weight, eps=0.0)
    small, large = layer(x).detach(), layer(1e6 * x).detach()
    assert_close(large, small, because="with eps = 0 a row times a million gives the same")


@task("RMSNorm")
def test_a_row_of_zeros(solution, device):
    x = torch.zeros(2, 6, device=device, requires_grad=True)
    out = solution.RMSNorm(6).to(device)(x)
    assert_close(out.detach(), torch.zeros(2, 6), because="zeros stay zeros")
    out.sum().backward()
    found = gradient(x, "x gets a gradient")
    assert_close(found, torch.full((2, 6), 1e3), because="the gradient is 1 / sqrt(eps), and finite", rtol=1e-4)


@task("RMSNorm")
@pytest.mark.parametrize("kind", HALVES, ids=str)
@pytest.mark.parametrize("size, eps", [(300.0, 1e-6), (3e4, 1e-6), (1e-4, 1e-12)])
def test_halves_neither_overflow_nor_vanish(solution, device, kind, size, eps):
    x = torch.tensor([[size, -size, size, size], [size, 0.0, 0.0, 0.0]], device=device).to(kind)
    expected = torch.tensor([[1.0, -1.0, 1.0, 1.0], [2.0, 0.0, 0.0, 0.0]]).to(kind)
    out = solution.RMSNorm(4, eps=eps).to(device, kind)(x).detach()
    assert_close(out, expected, because=f"rows of {size:g} in {kind}", **HALF)


@task("RMSNorm")
@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_half_precision_bit_by_bit(solution, device, data_dir, kind):
    golden = {name: value.to(device) for name, value in load_file(data_dir / "rms_norm.safetensors").items()}
    layer = norm_of(solution, golden[f"{kind}.weight"])
    out = layer(golden[f"{kind}.x"]).detach()
    assert_equal(out, golden[f"{kind}.out"].cpu(), because="the numbers of DeepSeek-V3's own layer, to the last bit")


@task("RMSNorm")
@pytest.mark.parametrize("kind, wide", [*[(half, torch.float32) for half in HALVES], (torch.float64, torch.float32),
                                        (torch.float32, torch.bfloat16)], ids=str)  # fmt: skip
def test_the_result_has_the_dtype_of_what_came_in(solution, randn, kind, wide):
    x, weight = randn(3, 6).to(kind), randn(6).to(wide)
    expected = like(rms_of(x, weight, 1e-6), x)
    out = norm_of(solution, weight)(x).detach()
    assert_close(out, expected, because=f"x of {kind} and a weight of {wide}", rtol=3e-2, atol=3e-2)


@task("RMSNorm")
def test_float64_is_exact_enough_for_finite_differences(solution, randn):
    layer = norm_of(solution, randn(4, dtype=torch.float64))
    assert_gradcheck(lambda x: layer(x), [randn(2, 4, dtype=torch.float64)], because="float64 stays float64")


@task("RMSNorm")
def test_strides_of_the_input_do_not_matter(solution, randn):
    x, weight = randn(5, 3, 6, dtype=torch.float64).transpose(0, 1), randn(6, dtype=torch.float64)
    expected = like(rms_of(x, weight, 1e-6), x)
    layer = norm_of(solution, weight)
    with unchanged(x, layer.weight):
        out = layer(x).detach()
    assert_close(out, expected, because="x with its dimensions exchanged")


@task("RMSNorm")
@pytest.mark.parametrize("x, dim", [((2, 3), 4), ((2, 1), 4), ((4, 2), 4), ((), 4), ((4, 3), 1)], ids=str)
def test_a_width_that_is_not_that_of_the_weight(solution, randn, device, x, dim):
    layer = solution.RMSNorm(dim).to(device)
    assert_raises(ValueError, layer, randn(*x), mentions=[str(x), str((dim,))], because=f"x {x}, weight ({dim},)")


@task("RMSNorm")
def test_little_is_saved_for_backward(solution, randn, device):
    layer, x = solution.RMSNorm(64).to(device), randn(8, 64).requires_grad_()
    limit = 4 * (2 * 8 * 64 + 64 + 8)
    assert_cost(layer, x, max_saved_bytes=limit, because="2 * x + weight + one number per row, 4 bytes each")


@cost_case("RMSNorm")
def rms_norm_cost(module, randn):
    x = randn(64, 256).requires_grad_()
    layer = module.RMSNorm(256).to(x.device)
    return lambda: layer(x)


# BatchNorm1d

BUFFERS = ["running_mean", "running_var", "num_batches_tracked"]


def pair_of_norms(solution, randn, device, dtype, width=3, **options):
    """nn.BatchNorm1d and the layer of the learner with the same state."""
    theirs = nn.BatchNorm1d(width, **options).to(device, dtype)
    fill(theirs, weight=randn(width, dtype=dtype), bias=randn(width, dtype=dtype))
    with torch.no_grad():
        theirs.running_mean.copy_(randn(width, dtype=dtype))
        theirs.running_var.copy_(randn(width, dtype=dtype).abs() + 0.5)
        theirs.num_batches_tracked.fill_(4)
    ours = solution.BatchNorm1d(width, **options).to(device, dtype)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def buffers(layer):
    return {name: layer.state_dict()[name].clone() for name in BUFFERS}


@task("BatchNorm1d")
@pytest.mark.parametrize("options", [{}, {"eps": 0.1, "momentum": 0.3}, {"momentum": 1.0}, {"momentum": 0.0}], ids=str)
@pytest.mark.parametrize("what", ["results", *BUFFERS])
def test_training_and_eval_in_turns(solution, randn, device, dtype, options, what):
    theirs, ours = pair_of_norms(solution, randn, device, dtype, **options)
    batches = [randn(5, 3, dtype=dtype) * 2 + 1, randn(2, 3, dtype=dtype), randn(4, 3, dtype=dtype) - 3]
    for step, (x, training) in enumerate(
        [(batches[0], True), (batches[1], False), (batches[1], True), (batches[2], True), (batches[0], False)]
    ):
        expected = theirs.train(training)(x).detach()
        out = ours.train(training)(x).detach()
        word = "training" if training else "eval"
        if what == "results":
            assert_close(out, expected, because=f"step {step + 1}, in {word}", rtol=1e-4, atol=1e-5)
        else:
            found = buffers(ours)[what]
            assert_close(
                found, theirs.state_dict()[what], because=f"{what} after step {step + 1}, in {word}", **SUMS[dtype]
            )


@task("BatchNorm1d")
def test_training_normalizes_with_the_variance_over_n(solution, randn, device):
    x = randn(3, 4, dtype=torch.float64)
    values = array(x)
    expected = like((values - values.mean(0)) / np.sqrt(values.var(0) + 1e-5), x)
    out = solution.BatchNorm1d(4).to(device, torch.float64)(x).detach()
    assert_close(out, expected, because="three rows: the variance over N = 3, eps = 1e-5 inside the root")


@task("BatchNorm1d")
@pytest.mark.parametrize("buffer", BUFFERS)
def test_one_step_from_the_start(solution, randn, device, buffer):
    x = randn(3, 4, dtype=torch.float64)
    values = array(x)
    wanted = {
        "running_mean": like(0.1 * values.mean(0), x),
        "running_var": like(0.9 + 0.1 * values.var(0, ddof=1), x),
        "num_batches_tracked": torch.tensor(1),
    }
    layer = solution.BatchNorm1d(4).to(device, torch.float64)
    layer(x)
    assert_close(buffers(layer)[buffer], wanted[buffer], because=f"{buffer} after one batch of three rows")


@task("BatchNorm1d")
def test_as_many_rows_as_columns(solution, randn, device):
    x = randn(4, 4, dtype=torch.float64)
    values = array(x)
    expected = like((values - values.mean(0)) / np.sqrt(values.var(0) + 1e-5), x)
    out = solution.BatchNorm1d(4).to(device, torch.float64)(x).detach()
    assert_close(out, expected, because="each column by itself, also where N = D")


@task("BatchNorm1d")
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("what", ["x", "weight", "bias"])
def test_gradients_are_those_of_torch(solution, randn, device, training, what):
    theirs, ours = pair_of_norms(solution, randn, device, torch.float64)
    x, weights = randn(5, 3, dtype=torch.float64), randn(5, 3, dtype=torch.float64)
    found = []
    for layer in (theirs, ours):
        leaf = x.clone().requires_grad_()
        (layer.train(training)(leaf) * weights).sum().backward()
        parts = {"x": leaf, "weight": layer.weight, "bias": layer.bias}
        found.append(gradient(parts[what], f"{what} gets a gradient"))
    assert_close(found[1], found[0], because=f"the gradient of {what}")


@task("BatchNorm1d")
def test_the_state_is_that_of_the_layer_of_torch(solution):
    layer = solution.BatchNorm1d(3)
    wanted = nn.BatchNorm1d(3).state_dict()
    assert_equal(list(layer.state_dict()), list(wanted), because="the names in the state dict, in order")
    assert_equal([name for name, _ in layer.named_parameters()], ["weight", "bias"], because="what is trained")
    for name, value in wanted.items():
        assert_equal(layer.state_dict()[name], value, because=f"{name} at the start")


@task("BatchNorm1d")
def test_the_state_moves_with_the_layer(solution):
    layer = solution.BatchNorm1d(3).double()
    kinds = [value.dtype for value in layer.state_dict().values()]
    assert_equal(kinds, [torch.float64] * 4 + [torch.int64], because="after double(): dtypes in the state dict")
    devices = {value.device.type for value in solution.BatchNorm1d(3).to("meta").state_dict().values()}
    assert_equal(devices, {"meta"}, because="after to('meta')")


@task("BatchNorm1d")
def test_the_state_survives_a_file(solution, randn, device, tmp_path):
    layer, x = solution.BatchNorm1d(3).to(device), randn(6, 3) + 2
    layer(x)
    torch.save(layer.state_dict(), tmp_path / "state.pt")
    other = solution.BatchNorm1d(3).to(device)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    expected = layer.eval()(x).detach()
    assert_close(other.eval()(x).detach(), expected, because="saved, loaded into a new layer, and run in eval")


@task("BatchNorm1d")
def test_buffers_are_not_part_of_a_graph(solution, randn, device):
    layer = solution.BatchNorm1d(3).to(device)
    for _ in range(2):
        layer(randn(4, 3).requires_grad_()).sum().backward()
    found = [name for name, value in layer.named_buffers() if value.requires_grad]
    assert_equal(found, [], because="buffers that ask for gradients after two training steps")


@task("BatchNorm1d")
@pytest.mark.parametrize("rows", [1, 0])
def test_too_few_rows_to_train_on(solution, randn, device, rows):
    layer = solution.BatchNorm1d(3).to(device)
    before = buffers(layer)
    assert_raises(ValueError, layer, randn(rows, 3), mentions=[str((rows, 3))], because=f"training with {rows} rows")
    assert_close(buffers(layer), before, because="the buffers after the refusal")


@task("BatchNorm1d")
@pytest.mark.parametrize("rows", [2, 1, 0])
def test_eval_takes_any_number_of_rows_and_changes_nothing(solution, randn, device, rows):
    theirs, ours = pair_of_norms(solution, randn, device, torch.float32)
    x = randn(rows, 3)
    expected, before = theirs.eval()(x).detach(), buffers(ours)
    assert_close(ours.eval()(x).detach(), expected, because=f"{rows} rows in eval", **SUMS[torch.float32])
    assert_close(buffers(ours), before, because="the buffers after eval", rtol=0, atol=0)


@task("BatchNorm1d")
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("shape", [(4, 2), (4, 1), (3,), (4, 3, 3), (3, 4)], ids=str)
def test_an_input_that_is_not_rows_of_that_width(solution, randn, device, shape, training):
    layer = solution.BatchNorm1d(3).to(device).train(training)
    before = buffers(layer)
    assert_raises(ValueError, layer, randn(*shape), mentions=[str(shape), "(3,)"], because=f"x {shape}, D = 3")
    assert_close(buffers(layer), before, because="the buffers after the refusal")


@task("BatchNorm1d")
def test_a_mean_far_from_zero(solution, randn, device):
    x = randn(50, 3) + 1e4
    values = array(x)
    expected = like((values - values.mean(0)) / np.sqrt(values.var(0) + 1e-5), x)
    out = solution.BatchNorm1d(3).to(device)(x).detach()
    assert_close(out, expected, because="mean 10,000, spread 1, float32", rtol=1e-2, atol=1e-2)


@task("BatchNorm1d")
@pytest.mark.parametrize("kind", HALVES, ids=str)
def test_statistics_of_halves_are_wide(solution, randn, device, kind):
    x = (randn(200, 3) + 40).to(kind)
    values = array(x)
    expected = like((values - values.mean(0)) / np.sqrt(values.var(0) + 1e-5), x)
    layer = solution.BatchNorm1d(3).to(device)
    assert_close(layer(x).detach(), expected, because=f"{kind} in, {kind} out, and float32 between", **HALF)
    mean = layer.running_mean
    assert_close(mean, like(0.1 * values.mean(0), mean), because="running_mean", rtol=1e-4)


@task("BatchNorm1d")
@pytest.mark.parametrize("kind", HALVES, ids=str)
def test_eval_keeps_halves(solution, randn, device, kind):
    theirs, ours = pair_of_norms(solution, randn, device, torch.float32)
    x = randn(4, 3).to(kind)
    expected = theirs.eval()(x.float()).detach().to(kind)
    assert_close(ours.eval()(x).detach(), expected, because=f"{kind} in eval, with a state in float32", **HALF)


@task("BatchNorm1d")
def test_an_input_stays_what_it_was(solution, randn, device):
    layer, x = solution.BatchNorm1d(3).to(device), noncontiguous(randn(5, 3))
    with unchanged(x, layer.weight, layer.bias), global_rng_untouched():
        layer(x)


@cost_case("BatchNorm1d")
def batch_norm_cost(module, randn):
    x = randn(64, 256).requires_grad_()
    layer = module.BatchNorm1d(256).to(x.device)
    return lambda: layer(x)


# load_renamed


def numbered(module):
    """The same start at every run: parameters that count in tenths."""
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.arange(p.numel()).reshape(p.shape) / 10)
    return module


class Block(nn.Module):
    def __init__(self, width=3):
        super().__init__()
        self.proj = nn.Linear(width, width + 1)
        self.norm = nn.BatchNorm1d(width)


class Model(nn.Module):
    """Two blocks, a table, a head that may be tied to it, and a buffer that is not saved."""

    def __init__(self, tied=False):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(3, 5, bias=False)
        self.register_buffer("positions", torch.arange(4.0), persistent=False)
        if tied:
            self.head.weight = self.embed.weight
        numbered(self)


RULES = [(r"^transformer\.", ""), (r"^h\.(\d+)\.", r"blocks.\1."), (r"\.dense\.", ".proj."), (r"^wte\.", "embed.")]


def foreign(model, randn):
    """A checkpoint for the model under foreign names, on the CPU: what is in it, by the names of the model, too."""
    by_name, tensors = {}, {}
    for name, value in model.state_dict().items():
        values = randn(*value.shape).cpu() if value.is_floating_point() else torch.tensor(7)
        old = name.replace("blocks.", "h.").replace(".proj.", ".dense.").replace("embed.", "wte.")
        by_name[name] = tensors[f"transformer.{old}"] = values
    return tensors, by_name


def snapshot(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def small(device="cpu"):
    """A layer with names that are easy to write down."""
    return numbered(nn.Linear(4, 3)).to(device)


@task("load_renamed")
def test_names_that_fit_need_no_rules(solution, randn, device):
    layer = small(device)
    tensors = {"weight": randn(3, 4), "bias": randn(3)}
    report = solution.load_renamed(layer, tensors, [])
    assert_close(snapshot(layer), dict(tensors), because="no rules: the tensors go where their names say")
    assert_equal(list(report.loaded), ["weight", "bias"], because="what was loaded")
    assert_equal([report.missing, report.unexpected, report.mismatched], [[], [], []], because="nothing else to say")


@task("load_renamed")
def test_one_rule_renames(solution, randn, device):
    layer = small(device)
    tensors = {"kernel": randn(3, 4), "bias": randn(3)}
    solution.load_renamed(layer, tensors, [("kernel", "weight")])
    expected = {"weight": tensors["kernel"], "bias": tensors["bias"]}
    assert_close(snapshot(layer), expected, because="kernel becomes weight")


@task("load_renamed")
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
def test_a_whole_model_under_foreign_names(solution, randn, device, strict):
    model = Model().to(device)
    tensors, expected = foreign(model, randn)
    report = solution.load_renamed(model, tensors, RULES, strict=strict)
    assert_equal(list(report.loaded), list(expected), because="all of it, by the names of the model")
    assert_close(snapshot(model), expected, because="values", check_device=False)


@task("load_renamed")
def test_the_report_keeps_the_order_of_the_checkpoint(solution, randn):
    layer, tensors = small(), {"b": torch.zeros(3), "w": torch.ones(3, 4)}
    report = solution.load_renamed(layer, tensors, [("w", "weight"), ("^b$", "bias")])
    assert_equal(list(report.loaded), ["bias", "weight"], because="loaded: in the order of the checkpoint")


@task("load_renamed")
@pytest.mark.parametrize("rules, name", [
    ([("a", "b"), ("b", "weight")], "a"),
    ([("x", "y"), ("weight_v2", "weight")], "weight_v2"),
    ([("_v2", ""), ("^", "")], "weight_v2"),
    ([("o", "")], "oowoeoiogohot"),
    ([(r"(\w+)\.(\w+)", r"\2\1")], "ght.wei"),
    ([("w.+t", "weight")], "w___t"),
    ([("$", "ht"), ("lin.", "")], "lin.weig"),
], ids=["chain", "a rule without a match", "in the middle", "every match", "groups", "a pattern", "ends"])  # fmt: skip
def test_how_rules_are_applied(solution, randn, rules, name):
    layer, values = small(), randn(3, 4).cpu()
    report = solution.load_renamed(layer, {name: values}, rules, strict=False)
    found = list(report.loaded), list(report.unexpected)
    assert_equal(found, (["weight"], []), because=f"{name} becomes weight by the rules {rules}")
    assert_close(layer.weight.detach(), values, because="the values of the weight")


@task("load_renamed")
def test_two_names_can_change_places(solution, randn):
    pair = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    tensors = {"a.weight": randn(2, 2).cpu(), "b.weight": randn(2, 2).cpu()}
    solution.load_renamed(pair, tensors, [("^a", "c"), ("^b", "a"), ("^c", "b")])
    expected = {"a.weight": tensors["b.weight"], "b.weight": tensors["a.weight"]}
    assert_close(snapshot(pair), expected, because="a and b exchanged, by way of c")


def with_faults(randn):
    """A checkpoint for the model with one thing missing, two unexpected and one of another shape."""
    model = Model()
    tensors, by_name = foreign(model, randn)
    del tensors["transformer.h.1.norm.bias"]
    odd = {"transformer.h.0.rotary": torch.ones(2), **tensors, "extra": torch.ones(1)}
    odd["transformer.h.0.dense.weight"] = torch.ones(3, 4)
    return model, odd, by_name


@task("load_renamed")
@pytest.mark.parametrize("field, wanted", [
    ("missing", ["blocks.1.norm.bias"]),
    ("unexpected", ["transformer.h.0.rotary", "extra"]),
    ("mismatched", ["blocks.0.proj.weight"]),
])  # fmt: skip
def test_without_strict_faults_are_reported(solution, randn, field, wanted):
    model, tensors, _ = with_faults(randn)
    report = solution.load_renamed(model, tensors, RULES, strict=False)
    assert_equal(list(getattr(report, field)), wanted, because=f"what is {field}")


@task("load_renamed")
def test_without_strict_the_rest_is_loaded(solution, randn):
    model, tensors, by_name = with_faults(randn)
    expected = snapshot(model)
    faults = {"blocks.1.norm.bias", "blocks.0.proj.weight"}
    expected |= {name: value for name, value in by_name.items() if name not in faults}
    report = solution.load_renamed(model, tensors, RULES, strict=False)
    assert_equal(list(report.loaded), [n for n in by_name if n not in faults], because="what was loaded")
    assert_close(snapshot(model), expected, because="the rest was copied, and what was at fault was left as it was")


@task("load_renamed")
def test_strict_names_everything_that_is_wrong(solution, randn):
    model, tensors, _ = with_faults(randn)
    words = ["blocks.1.norm.bias", "transformer.h.0.rotary", "extra", "blocks.0.proj.weight", "(3, 4)", "(4, 3)"]
    assert_raises(
        ValueError, solution.load_renamed, model, tensors, RULES, mentions=words, because="all faults in one message"
    )


FAULTS = {
    "missing": lambda t: t.pop("transformer.head.weight"),
    "unexpected": lambda t: t.update(extra=torch.ones(2)),
    "another shape": lambda t: t.update({"transformer.head.weight": torch.ones(5, 4)}),
}


@task("load_renamed")
@pytest.mark.parametrize("fault", FAULTS)
def test_strict_is_all_or_nothing(solution, randn, fault):
    model = Model()
    tensors, _ = foreign(model, randn)
    FAULTS[fault](tensors)
    before = snapshot(model)
    assert_raises(ValueError, solution.load_renamed, model, tensors, RULES, because=f"one tensor is at fault: {fault}")
    assert_close(snapshot(model), before, because="after the error: nothing was copied", rtol=0, atol=0)


@task("load_renamed")
def test_strict_is_the_default(solution):
    assert_raises(ValueError, solution.load_renamed, small(), {}, [], mentions=["weight", "bias"])


@task("load_renamed")
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
@pytest.mark.parametrize("late, target", [("old.bias", "bias"), ("old.rotary", "rotary")])
def test_two_tensors_for_one_name(solution, randn, strict, late, target):
    layer = small()
    tensors = {"weight": randn(3, 4).cpu(), "bias": randn(3).cpu(), target: randn(3).cpu(), late: randn(3).cpu()}
    before = snapshot(layer)
    assert_raises(
        ValueError, solution.load_renamed, layer, tensors, [(r"^old\.", "")], strict=strict, mentions=[target, late],
        because=f"{target} and {late} become one name",
    )  # fmt: skip
    assert_close(snapshot(layer), before, because="after the error: nothing was copied", rtol=0, atol=0)


@task("load_renamed")
@pytest.mark.parametrize("wrong", [(4, 3), (12,), (1, 4), (3, 1), (), (1, 3, 4), (3, 4, 1), (2, 4)], ids=str)
def test_any_other_shape_is_a_mismatch(solution, randn, wrong):
    layer = small()
    before = snapshot(layer)
    tensors = {"bias": torch.ones(3), "weight": randn(*wrong).cpu()}
    report = solution.load_renamed(layer, tensors, [], strict=False)
    assert_equal(list(report.mismatched), ["weight"], because=f"a weight {wrong} for one of (3, 4)")
    assert_close(layer.weight.detach(), before["weight"], because="the weight stays", rtol=0, atol=0)
    assert_equal((list(report.loaded), list(report.missing)), (["bias"], []), because="loaded and missing")
    assert_raises(ValueError, solution.load_renamed, layer, tensors, [], mentions=["weight", str(wrong), "(3, 4)"])


@task("load_renamed")
@pytest.mark.parametrize("given, held", [
    (torch.float64, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float64),
], ids=str)  # fmt: skip
def test_values_are_cast_to_the_dtype_of_the_module(solution, randn, device, given, held):
    layer = small(device).to(held)
    tensors = {"weight": randn(3, 4).cpu().to(given), "bias": randn(3).cpu().to(given)}
    expected = {name: value.to(held) for name, value in tensors.items()}
    solution.load_renamed(layer, tensors, [])
    found = snapshot(layer)
    assert_close(found, expected, because=f"{given} into a module of {held}", rtol=0, atol=0, check_device=False)
    assert_equal(found["weight"].device.type, device.type, because="the device of the module is kept")


@task("load_renamed")
def test_parameters_stay_the_objects_that_they_were(solution, randn, device):
    model = Model().to(device)
    model.head.weight.requires_grad_(False)
    tensors, by_name = foreign(model, randn)
    before = [*model.named_parameters(), *model.named_buffers()]
    solution.load_renamed(model, tensors, RULES)
    after = [*model.named_parameters(), *model.named_buffers()]
    moved = [name for (name, one), (_, two) in zip(before, after, strict=True) if one is not two]
    assert_equal(moved, [], because="names whose tensor is another object now")
    assert_close(model.head.weight.detach(), by_name["head.weight"], because="frozen, and loaded", check_device=False)
    found = [name for name, p in model.named_parameters() if not (p.is_leaf and p.requires_grad)]
    assert_equal(found, ["head.weight"], because="parameters that are not trained: the one that was frozen")


@task("load_renamed")
def test_the_checkpoint_keeps_its_memory(solution, randn, device):
    layer, tensors = small(device), {"weight": randn(3, 4), "bias": randn(3)}
    expected = tensors["weight"].clone()
    solution.load_renamed(layer, tensors, [])
    tensors["weight"].zero_()
    assert_close(layer.weight.detach(), expected, because="the checkpoint was overwritten after loading")


@task("load_renamed")
def test_the_dict_is_not_changed(solution, randn):
    layer, values = small(), {"kernel": torch.ones(3, 4), "b": torch.ones(3), "extra": torch.ones(1)}
    tensors = dict(values)
    solution.load_renamed(layer, tensors, [("kernel", "weight"), ("^b$", "bias")], strict=False)
    assert_equal(list(tensors), ["kernel", "b", "extra"], because="the names in the dict of the caller")
    same = all(tensors[name] is values[name] for name in tensors)
    assert_that(same, "the tensors in the dict of the caller are the ones that were there", value=same)


@task("load_renamed")
def test_tensors_that_ask_for_gradients_or_lie_apart(solution, randn, device):
    layer = small(device)
    tensors = {"weight": noncontiguous(randn(3, 4)).requires_grad_(), "bias": randn(3).requires_grad_() * 2}
    expected = {name: value.detach().clone() for name, value in tensors.items()}
    solution.load_renamed(layer, tensors, [])
    assert_close(snapshot(layer), expected, because="values")
    assert_that(layer.bias.is_leaf, "the bias is a leaf, with no graph behind it", value=layer.bias.is_leaf)


@task("load_renamed")
def test_buffers_are_loaded(solution, device):
    norm = nn.BatchNorm1d(2).to(device)
    tensors = {f"old_{name}": torch.full(value.shape, 3).to(value.dtype) for name, value in norm.state_dict().items()}
    report = solution.load_renamed(norm, tensors, [("^old_", "")])
    assert_equal(list(report.loaded), list(norm.state_dict()), because="parameters and buffers")
    expected = {name: torch.full(value.shape, 3).to(value.dtype) for name, value in norm.state_dict().items()}
    assert_close(snapshot(norm), expected, because="everything is 3 now", check_device=False)


@task("load_renamed")
def test_a_missing_buffer_is_missing(solution):
    norm = nn.BatchNorm1d(2)
    report = solution.load_renamed(norm, {"bias": torch.ones(2)}, [], strict=False)
    wanted = ["weight", "running_mean", "running_var", "num_batches_tracked"]
    assert_equal(list(report.missing), wanted, because="missing, in the order of the state dict")


@task("load_renamed")
def test_a_buffer_that_is_not_saved_is_no_target(solution):
    model = Model()
    report = solution.load_renamed(model, {"positions": torch.zeros(4)}, [], strict=False)
    assert_equal(list(report.unexpected), ["positions"], because="positions is not in the state dict")
    assert_that("positions" not in report.missing, "and so it is not missing either", value=list(report.missing))
    assert_close(model.positions, torch.arange(4.0), because="it stays as it was")


@task("load_renamed")
@pytest.mark.parametrize("left_out", ["transformer.head.weight", "transformer.wte.weight"])
def test_one_name_of_a_tied_parameter_is_enough(solution, randn, left_out):
    model = Model(tied=True)
    tensors, _ = foreign(model, randn)
    values = tensors["transformer.wte.weight"] = tensors["transformer.head.weight"]
    del tensors[left_out]
    report = solution.load_renamed(model, tensors, RULES)
    assert_equal(list(report.missing), [], because=f"without {left_out} nothing is missing")
    assert_close(model.embed.weight.detach(), values, because="the values of the tied parameter")
    assert_that(model.head.weight is model.embed.weight, "the two are still one", value=model.head.weight.detach())


@task("load_renamed")
def test_without_any_of_its_names_a_tied_parameter_is_missing(solution):
    report = solution.load_renamed(Model(tied=True), {}, [], strict=False)
    found = [name for name in report.missing if not name.startswith("blocks.")]
    assert_equal(found, ["embed.weight", "head.weight"], because="both names are missing")


@task("load_renamed")
def test_a_tied_parameter_of_another_shape(solution):
    tensors = {"head.weight": torch.ones(5, 4), "embed.weight": torch.ones(5, 3)}
    model = Model(tied=True)
    report = solution.load_renamed(model, tensors, [], strict=False)
    found = list(report.loaded), list(report.mismatched)
    assert_equal(found, (["embed.weight"], ["head.weight"]), because="one name fits, the other does not")
    assert_close(model.head.weight.detach(), torch.ones(5, 3), because="loaded under the name that fits")


@task("load_renamed")
def test_both_names_with_equal_values(solution, randn):
    model = Model(tied=True).bfloat16()
    values = randn(5, 3).cpu()
    tensors = {"embed.weight": values, "head.weight": values.bfloat16()}
    report = solution.load_renamed(model, tensors, [], strict=False)
    assert_equal(list(report.loaded), ["embed.weight", "head.weight"], because="equal in the dtype of the module")
    assert_close(model.embed.weight.detach(), values.bfloat16(), because="the values", rtol=0, atol=0)


@task("load_renamed")
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
@pytest.mark.parametrize("last", [False, True], ids=["embed first", "head first"])
def test_both_names_with_different_values(solution, randn, strict, last):
    model = Model(tied=True)
    tensors, _ = foreign(model, randn)
    tensors["transformer.head.weight"] = tensors["transformer.wte.weight"] + torch.eye(5, 3)
    if last:
        tensors["transformer.wte.weight"] = tensors.pop("transformer.wte.weight")
    before = snapshot(model)
    assert_raises(
        ValueError, solution.load_renamed, model, tensors, RULES, strict=strict,
        mentions=["embed.weight", "head.weight"], because="one parameter cannot hold both",
    )  # fmt: skip
    assert_close(snapshot(model), before, because="after the error: nothing was copied", rtol=0, atol=0)


@task("load_renamed")
def test_any_values_can_be_loaded(solution):
    layer = nn.Linear(2, 1)
    tensors = {"weight": torch.tensor([[math.nan, math.inf]]), "bias": torch.tensor([-0.0])}
    solution.load_renamed(layer, tensors, [])
    assert_equal(layer.weight.detach(), torch.tensor([[math.nan, math.inf]]), because="a NaN is a value too")


@task("load_renamed")
def test_nothing_to_load(solution):
    layer = small()
    before = snapshot(layer)
    report = solution.load_renamed(layer, {}, [("a", "b")], strict=False)
    assert_equal(list(report.missing), ["weight", "bias"], because="an empty checkpoint")
    assert_equal([list(report.loaded), list(report.unexpected)], [[], []], because="loaded and unexpected")
    assert_close(snapshot(layer), before, because="nothing changed", rtol=0, atol=0)


@cost_case("load_renamed")
def load_renamed_cost(module, randn):
    layer = nn.Linear(64, 32).to(randn(1).device)
    tensors = {"old.weight": randn(32, 64), "old.bias": randn(32)}
    return lambda: module.load_renamed(layer, tensors, [("^old.", "")])


# LoRALinear


def lora_of(solution, randn, rank=2, alpha=3.0, bias=True, dtype=torch.float64, trained=True):
    """A layer whose base and update hold known numbers, and its weight and bias in numpy."""
    base = nn.Linear(5, 4, bias=bias).to(randn(1).device, dtype)
    fill(base, **{name: randn(*p.shape, dtype=dtype) for name, p in base.named_parameters()})
    weight, shift = array(base.weight), array(base.bias) if bias else 0.0
    torch.manual_seed(7)
    layer = solution.LoRALinear(base, rank, alpha)
    if trained:
        down, up = randn(rank, 5, dtype=dtype), randn(4, rank, dtype=dtype)
        fill(layer, update__down__weight=down, update__up__weight=up)
        weight = weight + alpha / rank * array(up) @ array(down)
    return layer, weight, shift


@task("LoRALinear")
@pytest.mark.parametrize("rank, alpha", [(1, 1.0), (2, 3.0), (2, 1), (3, 8), (6, 2)])
@pytest.mark.parametrize("bias", [True, False], ids=["with bias", "without bias"])
def test_base_plus_update(solution, randn, rank, alpha, bias):
    layer, weight, shift = lora_of(solution, randn, rank, alpha, bias)
    x = randn(2, 3, 5, dtype=torch.float64)
    expected = like(array(x) @ weight.T + shift, x)
    assert_close(layer(x).detach(), expected, because="x (W + alpha / rank * up down)^T + b")


@task("LoRALinear")
def test_it_starts_as_the_base(solution, randn, dtype):
    layer, weight, shift = lora_of(solution, randn, dtype=dtype, trained=False)
    x = randn(6, 5, dtype=dtype)
    expected = like(array(x) @ weight.T + shift, x)
    assert_close(layer(x).detach(), expected, because="before training the layer is its base", **SUMS[dtype])


@task("LoRALinear")
def test_only_one_factor_starts_at_zero(solution, seed):
    torch.manual_seed(seed)
    layer = solution.LoRALinear(nn.Linear(5, 4), 2, 3.0)
    zeros = int((layer.update.up.weight == 0).sum()), int((layer.update.down.weight == 0).sum())
    assert_equal(zeros, (8, 0), because="at the start: zeros in update.up.weight (4, 2) and update.down.weight (2, 5)")


@task("LoRALinear")
def test_the_lower_factor_starts_like_a_linear_layer(solution, seed):
    torch.manual_seed(seed)
    values = solution.LoRALinear(nn.Linear(100, 50), 40, 3.0).update.down.weight.detach()
    largest = values.abs().max().item()
    assert_that(0.095 < largest <= 0.1 + 1e-6, "from U(-0.1, 0.1) with 100 inputs: the largest", value=rounded(largest))


@task("LoRALinear")
def test_the_names_in_its_state_dict(solution):
    layer = solution.LoRALinear(nn.Linear(5, 4), 2, 3.0)
    wanted = {"base.weight": (4, 5), "base.bias": (4,), "update.down.weight": (2, 5), "update.up.weight": (4, 2)}
    assert_equal(shapes(layer.state_dict()), wanted, because="the state dict")
    assert_equal(layer.merged, False, because="merged, at the start")


@task("LoRALinear")
def test_the_base_is_frozen_and_is_the_one_given(solution, randn):
    base = nn.Linear(5, 4)
    parts = base.weight, base.bias
    layer = solution.LoRALinear(base, 2, 3.0)
    assert_that(layer.base is base, "layer.base is the module that was given", value=layer.base is base)
    same = base.weight is parts[0] and base.bias is parts[1]
    assert_that(same, "with the same Parameter objects", value=same)
    trained = [name for name, p in layer.named_parameters() if p.requires_grad]
    assert_equal(trained, ["update.down.weight", "update.up.weight"], because="what is trained")


@task("LoRALinear")
@pytest.mark.parametrize("part", ["down", "up"])
def test_the_gradients_of_the_update(solution, randn, part):
    layer, _, _ = lora_of(solution, randn)
    x, weights = randn(6, 5, dtype=torch.float64), randn(6, 4, dtype=torch.float64)
    down, up = (getattr(layer.update, name).weight.detach().clone().requires_grad_() for name in ("down", "up"))
    (1.5 * x @ down.T @ up.T * weights).sum().backward()
    (layer(x) * weights).sum().backward()
    expected = {"down": down, "up": up}[part].grad
    found = gradient(getattr(layer.update, part).weight, f"update.{part}.weight gets a gradient")
    assert_close(found, expected, because=f"the gradient of update.{part}.weight")
    assert_equal(layer.base.weight.grad, None, because="the base gets no gradient")


@task("LoRALinear")
def test_dtype_and_device_are_those_of_the_base(solution):
    layer = solution.LoRALinear(nn.Linear(5, 4, device="meta", dtype=torch.bfloat16), 2, 3.0)
    found = {(p.dtype, p.device.type) for p in layer.parameters()}
    assert_equal(found, {(torch.bfloat16, "meta")}, because="a base in bfloat16 on meta")


@task("LoRALinear")
@pytest.mark.parametrize("merged", [False, True], ids=["unmerged", "merged"])
def test_the_price_of_a_call(solution, randn, merged):
    layer, _, _ = lora_of(solution, randn)
    x = randn(6, 5, dtype=torch.float64)
    if merged:
        layer.merge()
    flops = 2 * 6 * 5 * 4 + (0 if merged else 2 * 6 * 2 * (5 + 4))
    assert_cost(layer, x, flops=flops, because="merged: the base alone" if merged else "the product is never formed")


@task("LoRALinear")
@pytest.mark.parametrize("bias", [True, False], ids=["with bias", "without bias"])
def test_merging_does_not_change_what_is_computed(solution, randn, dtype, bias):
    layer, weight, shift = lora_of(solution, randn, bias=bias, dtype=dtype)
    x = randn(6, 5, dtype=dtype)
    expected = like(array(x) @ weight.T + shift, x)
    before = layer(x).detach()
    layer.merge()
    both, wanted = torch.stack([before, layer(x).detach()]), torch.stack([expected, expected])
    assert_close(both, wanted, because="the result before (0) and after (1) merge()", **SUMS[dtype])
    assert_equal(layer.merged, True, because="merged, after merge()")
    assert_close(layer.base.weight.detach(), like(weight, x), because="the weight of the base", **SUMS[dtype])


@task("LoRALinear")
def test_unmerging_goes_back(solution, randn):
    layer, weight, shift = lora_of(solution, randn)
    x, before = randn(6, 5, dtype=torch.float64), layer.base.weight.detach().clone()
    expected = like(array(x) @ weight.T + shift, x)
    for turn in ("first", "second"):
        layer.merge()
        layer.unmerge()
        assert_equal(layer.merged, False, because=f"merged, after the {turn} unmerge()")
        assert_close(layer.base.weight.detach(), before, because=f"the base after the {turn} time")
        assert_close(layer(x).detach(), expected, because=f"the result after the {turn} time")


@task("LoRALinear")
def test_merging_twice_is_refused(solution, randn):
    layer, _, _ = lora_of(solution, randn)
    layer.merge()
    before = snapshot(layer)
    assert_raises(RuntimeError, layer.merge, because="the second merge() in a row")
    assert_close(snapshot(layer), before, because="the state after the refusal", rtol=0, atol=0)
    assert_equal(layer.merged, True, because="merged, after the refusal")


@task("LoRALinear")
def test_unmerging_what_is_not_merged_is_refused(solution, randn):
    layer, _, _ = lora_of(solution, randn)
    before = snapshot(layer)
    assert_raises(RuntimeError, layer.unmerge, because="unmerge() at the start")
    assert_close(snapshot(layer), before, because="the state after the refusal", rtol=0, atol=0)
    assert_equal(layer.merged, False, because="merged, after the refusal")


@task("LoRALinear")
def test_merging_is_in_place_and_leaves_the_update_alone(solution, randn):
    layer, _, _ = lora_of(solution, randn)
    weight, update = layer.base.weight, snapshot(layer.update)
    try:
        layer.merge()
        found = layer.base.weight is weight, weight.is_leaf, weight.requires_grad
        layer.unmerge()
    except NotImplementedError:
        raise
    except RuntimeError as error:
        assert_that(False, "merge() and unmerge() record no graph", value=str(error)[:40])
    assert_equal(found, (True, True, False), because="the same Parameter, a leaf, and frozen")
    assert_close(snapshot(layer.update), update, because="the update after merge()", rtol=0, atol=0)


@task("LoRALinear")
@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_below_one(solution, rank):
    assert_raises(ValueError, solution.LoRALinear, nn.Linear(5, 4), rank, 3.0, mentions=[str(rank)])


@cost_case("LoRALinear")
def lora_cost(module, randn):
    x = randn(32, 256)
    layer = module.LoRALinear(nn.Linear(256, 256).to(x.device), 8, 16.0)
    return lambda: layer(x)


# QKVProjection

NAMES = ["q_proj", "k_proj", "v_proj"]


def old_file(randn, prefix="", bias=True, width=4):
    """A fused layer as it was saved, without and with a prefix."""
    fused = {"weight": randn(3 * width, width)} | ({"bias": randn(3 * width)} if bias else {})
    return fused, {f"{prefix}qkv.{kind}": value for kind, value in fused.items()}


def three_parts(fused, x, width=4):
    """What the fused layer computes, cut into queries, keys and values."""
    out = F.linear(x, fused["weight"], fused.get("bias"))
    return [out[..., i * width : (i + 1) * width] for i in range(3)]


@task("QKVProjection")
@pytest.mark.parametrize("bias", [True, False], ids=["with bias", "without bias"])
@pytest.mark.parametrize("part", [0, 1, 2], ids=NAMES)
def test_three_projections(solution, randn, device, bias, part):
    layer = solution.QKVProjection(4, bias).to(device)
    x, state = randn(2, 5, 4), layer.state_dict()
    expected = F.linear(x, state[f"{NAMES[part]}.weight"], state.get(f"{NAMES[part]}.bias"))
    out = layer(x)
    assert_equal(len(out), 3, because="queries, keys and values")
    assert_close(out[part].detach(), expected, because=NAMES[part], **SUMS[torch.float32])


@task("QKVProjection")
@pytest.mark.parametrize("bias", [True, False], ids=["with bias", "without bias"])
def test_the_new_form_is_saved(solution, bias):
    kinds = ["weight", "bias"] if bias else ["weight"]
    wanted = {f"{name}.{kind}": (4, 4) if kind == "weight" else (4,) for name in NAMES for kind in kinds}
    layer = solution.QKVProjection(4, bias)
    assert_equal(shapes(layer.state_dict()), wanted, because="the state dict")
    assert_equal(sorted(dict(layer.named_parameters())), sorted(wanted), because="the parameters")
    assert_equal(layer.state_dict()._metadata[""].get("version"), 2, because="the version in _metadata")


@task("QKVProjection")
def test_biases_are_there_unless_you_say_no(solution):
    found = "q_proj.bias" in solution.QKVProjection(4).state_dict()
    assert_that(found, "bias=True is the default", value=found)


@task("QKVProjection")
@pytest.mark.parametrize("bias", [True, False], ids=["with bias", "without bias"])
@pytest.mark.parametrize("part", [0, 1, 2], ids=NAMES)
def test_an_old_file_is_read(solution, randn, device, bias, part):
    fused, old = old_file(randn, bias=bias)
    x = randn(2, 5, 4)
    expected = three_parts(fused, x)[part]
    layer = solution.QKVProjection(4, bias).to(device)
    keys = layer.load_state_dict(old)
    assert_equal((keys.missing_keys, keys.unexpected_keys), ([], []), because="nothing missing, nothing unexpected")
    assert_close(layer(x)[part].detach(), expected, because=f"{NAMES[part]} from the old file", **SUMS[torch.float32])


@task("QKVProjection")
def test_old_files_are_read_at_any_depth(solution, randn, device):
    model = nn.ModuleDict({"layers": nn.ModuleList([solution.QKVProjection(4) for _ in range(2)])}).to(device)
    first, old = old_file(randn, "layers.0.")
    second, more = old_file(randn, "layers.1.")
    keys = model.load_state_dict(old | more)
    assert_equal((keys.missing_keys, keys.unexpected_keys), ([], []), because="two layers inside of a model")
    x = randn(3, 4)
    expected = torch.stack(three_parts(first, x) + three_parts(second, x))
    found = torch.stack([part.detach() for layer in model["layers"] for part in layer(x)])
    assert_close(found, expected, because="q, k, v of layer 0, then of layer 1", **SUMS[torch.float32])


@task("QKVProjection")
def test_old_and_new_layers_in_one_file(solution, randn, device):
    source = numbered(solution.QKVProjection(4)).to(device)
    fused, old = old_file(randn, "0.")
    new = {f"1.{name}": value.clone() for name, value in source.state_dict().items()}
    model = nn.Sequential(solution.QKVProjection(4), solution.QKVProjection(4)).to(device)
    model.load_state_dict(old | new)
    x = randn(3, 4)
    expected = torch.stack([*three_parts(fused, x), *(part.detach() for part in source(x))])
    found = torch.stack([part.detach() for layer in model for part in layer(x)])
    assert_close(found, expected, because="layer 0 from the old form, layer 1 from the new", **SUMS[torch.float32])


@task("QKVProjection")
def test_what_it_saves_it_loads(solution, randn, device):
    one, two = solution.QKVProjection(4).to(device), solution.QKVProjection(4).to(device)
    keys = two.load_state_dict(one.state_dict())
    assert_equal((keys.missing_keys, keys.unexpected_keys), ([], []), because="the new form")
    assert_close(snapshot(two), snapshot(one), because="saved and loaded", rtol=0, atol=0)


@task("QKVProjection")
def test_the_dict_of_the_caller_does_not_change(solution, randn, device):
    _, old = old_file(randn)
    layer, before = solution.QKVProjection(4).to(device), dict(old)
    with unchanged(*old.values()):
        layer.load_state_dict(old)
        with torch.no_grad():
            for p in layer.parameters():
                p.zero_()
    assert_equal(list(old), list(before), because="the names in the dict")


@task("QKVProjection")
@pytest.mark.parametrize("lacking, wanted", [("bias", ["q_proj.bias", "k_proj.bias", "v_proj.bias"]),
                                             ("weight", ["q_proj.weight", "k_proj.weight", "v_proj.weight"])])  # fmt: skip
def test_what_an_old_file_lacks_is_missing(solution, randn, device, lacking, wanted):
    _, old = old_file(randn)
    del old[f"qkv.{lacking}"]
    layer = solution.QKVProjection(4).to(device)
    assert_raises(RuntimeError, layer.load_state_dict, old, mentions=wanted, because=f"an old file without {lacking}")
    keys = layer.load_state_dict(old, strict=False)
    found = sorted(keys.missing_keys), sorted(keys.unexpected_keys)
    assert_equal(found, (sorted(wanted), []), because="missing and unexpected, with strict=False")


@task("QKVProjection")
def test_other_names_are_unexpected(solution, randn, device):
    _, old = old_file(randn)
    layer = solution.QKVProjection(4).to(device)
    old["rotary"] = randn(2)
    assert_raises(RuntimeError, layer.load_state_dict, old, mentions=["rotary"], because="a name that nobody knows")
    keys = layer.load_state_dict(old, strict=False)
    assert_equal((keys.missing_keys, keys.unexpected_keys), ([], ["rotary"]), because="with strict=False")


@task("QKVProjection")
def test_a_fused_bias_where_there_are_none(solution, randn, device):
    _, old = old_file(randn)
    layer = solution.QKVProjection(4, bias=False).to(device)
    keys = layer.load_state_dict(old | {"rotary": randn(2)}, strict=False)
    found = keys.missing_keys, sorted(keys.unexpected_keys)
    assert_equal(found, ([], ["qkv.bias", "rotary"]), because="qkv.bias and rotary, with bias=False and strict=False")
    assert_raises(RuntimeError, layer.load_state_dict, old, mentions=["qkv.bias"], because="bias=False")


@task("QKVProjection")
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
@pytest.mark.parametrize("kind, wrong, right", [
    ("weight", (13, 4), (12, 4)), ("weight", (9, 4), (12, 4)), ("weight", (12, 5), (12, 4)), ("bias", (15,), (12,)),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("prefix", ["", "0."], ids=["alone", "nested"])
def test_a_fused_tensor_of_the_wrong_shape(solution, randn, device, strict, kind, wrong, right, prefix):
    _, old = old_file(randn, prefix)
    old[f"{prefix}qkv.{kind}"] = randn(*wrong)
    layer = solution.QKVProjection(4)
    model = (nn.Sequential(layer) if prefix else layer).to(device)
    words = [f"{prefix}qkv.{kind}", str(wrong), str(right)]
    because = f"qkv.{kind} {wrong} for a width of 4"
    assert_raises(RuntimeError, model.load_state_dict, old, strict=strict, mentions=words, because=because)


@task("QKVProjection")
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
def test_no_part_of_a_wrong_shape_is_loaded(solution, randn, device, strict):
    _, old = old_file(randn)
    layer = numbered(solution.QKVProjection(4)).to(device)
    expected = {name: layer.state_dict()[f"{name}.weight"].clone() for name in NAMES}
    old["qkv.weight"] = randn(10, 4)
    assert_raises(RuntimeError, layer.load_state_dict, old, strict=strict, mentions=["qkv.weight", "(10, 4)"])
    found = {name: layer.state_dict()[f"{name}.weight"] for name in NAMES}
    assert_close(found, expected, because="ten rows: enough for q and k, and still nothing is loaded")


@task("QKVProjection")
@pytest.mark.parametrize("name", NAMES)
def test_where_both_forms_are_there_the_new_one_counts(solution, randn, device, name):
    _, old = old_file(randn)
    layer = solution.QKVProjection(4).to(device)
    values = randn(4, 4)
    old[f"{name}.weight"] = values
    keys = layer.load_state_dict(old, strict=False)
    assert_close(layer.state_dict()[f"{name}.weight"], values, because=f"the values of {name}.weight")
    rest = sorted(f"{other}.weight" for other in NAMES if other != name)
    found = sorted(keys.missing_keys), keys.unexpected_keys
    assert_equal(found, (rest, ["qkv.weight"]), because=f"{name}.weight beside qkv.weight, with strict=False")
    assert_raises(RuntimeError, layer.load_state_dict, old, mentions=["qkv.weight"], because="both forms in one file")


@task("QKVProjection")
def test_a_copy_reads_old_files_too(solution, randn, device):
    layer = solution.QKVProjection(4).to(device)
    twin, before = copy.deepcopy(layer), snapshot(layer)
    fused, old = old_file(randn)
    twin.load_state_dict(old)
    x = randn(3, 4)
    expected = torch.stack(three_parts(fused, x))
    found = torch.stack([part.detach() for part in twin(x)])
    assert_close(found, expected, because="a deep copy that loads an old file", **SUMS[torch.float32])
    assert_close(snapshot(layer), before, because="the layer that was copied", rtol=0, atol=0)


@cost_case("QKVProjection")
def qkv_cost(module, randn):
    x = randn(16, 64)
    layer = module.QKVProjection(64).to(x.device)
    return lambda: layer(x)
