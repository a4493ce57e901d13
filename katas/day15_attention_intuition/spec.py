"""Day 15: what the tasks promise."""

import math

import numpy as np
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
    noncontiguous,
    same_storage,
    task,
    unchanged,
)

HALF = [torch.float16, torch.bfloat16]


def array(x):
    """The values of a tensor in numpy and float64, out of the solution's reach."""
    return x.detach().double().cpu().numpy().copy()


def softmax_of(scores):
    """The weights of one row of numbers."""
    exponentials = np.exp(scores - scores.max())
    return exponentials / exponentials.sum()


def loose(dtype):
    return {"rtol": 1e-5, "atol": 5e-6} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-12}


def assert_pair(found, expected, dtype, because, names=("out", "weights"), **tolerances):
    """Compare two results with what the definition gives in float64."""
    for one, two, name in zip(found, expected, names, strict=True):
        assert_close(one, torch.as_tensor(two).to(dtype), because=f"{because} ({name})", **loose(dtype) | tolerances)


def memory(randn, q=5, n=7, d=4, v=6, **kwargs):
    """Random queries, keys and values."""
    return randn(q, d, **kwargs), randn(n, d, **kwargs), randn(n, v, **kwargs)


def clear_queries(randn, keys, n):
    """Queries that leave no doubt about the best key."""
    queries = randn(40 + 8 * n, keys.shape[1])
    best = (queries.double() @ keys.double().T).topk(2, dim=1).values
    return queries[best[:, 0] - best[:, 1] > 0.05][:n]


# hard_lookup


def best_value(q, keys, values):
    """The definition, key by key: the answers as a CPU tensor."""
    answers = []
    for query in array(q):
        winner, most = None, -math.inf
        for i, key in enumerate(array(keys)):
            score = float(np.dot(query, key))
            if score > most:
                winner, most = i, score
        answers.append(values[winner].detach().cpu().clone())
    return torch.stack(answers)


@task("hard_lookup")
@pytest.mark.parametrize(("n", "d", "v"), [(7, 4, 6), (3, 2, 3), (12, 5, 1), (8, 4, 4)])
def test_the_best_key_answers(solution, randn, n, d, v):
    keys, values = randn(n, d), randn(n, v)
    q = clear_queries(randn, keys, 20)
    expected = best_value(q, keys, values)
    assert_close(solution.hard_lookup(q, keys, values), expected, because="the value of the largest dot product")


@task("hard_lookup")
def test_a_long_key_beats_a_near_one(solution, device):
    keys = torch.tensor([[1.0, 0.0], [3.0, 1.0], [0.5, 0.0]], device=device)
    q, values = torch.tensor([[1.0, 0.0]], device=device), torch.tensor([[10.0], [20.0], [30.0]], device=device)
    expected = torch.tensor([[20.0]])
    assert_close(solution.hard_lookup(q, keys, values), expected, because="the dot products are 1, 3 and 0.5")


@task("hard_lookup")
def test_the_best_may_be_negative(solution, device):
    keys = torch.tensor([[4.0], [1.0], [2.0]], device=device)
    q, values = torch.tensor([[-1.0]], device=device), torch.tensor([[1.0, 9], [2.0, 8], [3.0, 7]], device=device)
    expected = torch.tensor([[2.0, 8]])
    assert_close(solution.hard_lookup(q, keys, values), expected, because="the dot products are -4, -1 and -2")


@task("hard_lookup")
@pytest.mark.parametrize("first", [0, 1, 4])
def test_of_equally_good_keys_the_first_answers(solution, randn, device, first):
    keys = torch.tensor([[0.0, 1.0]] * first + [[2.0, 0.0], [1.0, 5.0], [2.0, -3.0], [2.0, 0.0]], device=device)
    q, values = torch.tensor([[1.0, 0.0], [3.0, 0.0]], device=device), randn(len(keys), 3)
    expected = values[[first, first]].cpu().clone()
    found = solution.hard_lookup(q, keys, values)
    assert_close(found, expected, because=f"three keys tie, and entry {first} is the first of them")


@task("hard_lookup")
def test_a_single_entry_answers_everyone(solution, randn):
    q, values = randn(4, 3), randn(1, 2)
    expected = values.expand(4, 2).cpu().clone()
    assert_close(solution.hard_lookup(q, randn(1, 3), values), expected, because="there is one entry")


@task("hard_lookup")
def test_no_query_no_answer(solution, randn):
    found = solution.hard_lookup(randn(0, 3), randn(5, 3), randn(5, 2))
    assert_close(found, torch.zeros(0, 2), because="Q = 0 gives (0, V)")


@task("hard_lookup")
@pytest.mark.parametrize("dtype_of_values", [torch.int64, torch.bool, torch.float64])
def test_values_may_be_of_any_dtype(solution, randn, randint, dtype_of_values):
    keys = randn(6, 4)
    q = clear_queries(randn, keys, 5)
    values = randint(0, 2**50, (6, 3)).to(dtype_of_values)
    expected = best_value(q, keys, values)
    assert_equal(solution.hard_lookup(q, keys, values), expected, because="values are copied, not computed with")


@task("hard_lookup")
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_other_values_leave_no_trace(solution, device, bad):
    q, keys = torch.eye(3, device=device)[1:], torch.eye(3, device=device)
    values = torch.tensor([[bad, bad], [1.0, 2.0], [3.0, 4.0]], device=device)
    expected = values[1:].cpu().clone()
    assert_close(solution.hard_lookup(q, keys, values), expected, because=f"entry 0 holds {bad}, and nobody asked it")


@task("hard_lookup")
def test_the_answer_is_a_copy(solution, randn):
    for q in (1, 4):
        keys, values = randn(4, 3), randn(4, 2)
        queries = clear_queries(randn, keys, q)
        expected = best_value(queries, keys, values)
        found = solution.hard_lookup(queries, keys, values)
        assert_close(found, expected, because=f"{q} queries, 4 entries")
        assert_that(not same_storage(found, values), f"with Q = {q} the result has its own memory", value=q)


@task("hard_lookup")
@pytest.mark.parametrize("half", HALF)
def test_half_dot_products_of_256_and_257_stay_apart(solution, device, half):
    size = 16.0 if half == torch.bfloat16 else 64.0
    q = torch.tensor([[size, 1.0]], dtype=half, device=device)
    keys = torch.tensor([[size, 0.0], [size, 1.0], [0.0, 1.0]], dtype=half, device=device)
    values = torch.tensor([[1.0], [2.0], [3.0]], dtype=half, device=device)
    expected = torch.tensor([[2.0]], dtype=half)
    because = f"the scores are {size**2:g} and {size**2 + 1:g}, which {half} cannot tell apart"
    assert_close(solution.hard_lookup(q, keys, values), expected, because=because)


@task("hard_lookup")
def test_gradients_go_to_the_values_that_were_chosen(solution, randn, device):
    keys = torch.eye(4, dtype=torch.float64, device=device)
    q = keys[[2, 0, 2]]
    values, weighting = randn(4, 3, dtype=torch.float64), randn(3, 3, dtype=torch.float64)
    expected = torch.zeros(4, 3, dtype=torch.float64)
    for row, entry in enumerate([2, 0, 2]):
        expected[entry] += weighting[row].cpu()
    leaves = [x.clone().requires_grad_() for x in (q, keys, values)]
    out = solution.hard_lookup(*leaves)
    assert_that(out.requires_grad, "the answers depend on the values", value=out.requires_grad)
    for_q, for_keys, for_values = torch.autograd.grad((out * weighting).sum(), leaves, materialize_grads=True)
    assert_close(for_values, expected, because="entry 2 was chosen twice, entry 0 once, the others never")
    zeros = torch.zeros(3, 4, dtype=torch.float64), torch.zeros(4, 4, dtype=torch.float64)
    assert_close((for_q, for_keys), zeros, because="a choice has no slope: nothing arrives at q and keys")


@task("hard_lookup")
def test_strides_do_not_matter_for_a_choice(solution, randn):
    keys = noncontiguous(randn(6, 4))
    q, values = clear_queries(randn, keys, 4), randn(3, 6).T
    expected = best_value(q, keys, values)
    assert_close(solution.hard_lookup(q, keys, values), expected, because="keys are a slice, values are transposed")


WRONG_MEMORIES = [
    ((2, 3), (5, 4), (5, 6), ["(2, 3)", "(5, 4)"]),
    ((2, 3), (5, 1), (5, 6), ["(2, 3)", "(5, 1)"]),
    ((2, 1), (5, 3), (5, 6), ["(2, 1)", "(5, 3)"]),
    ((2, 3), (5, 3), (4, 6), ["(5, 3)", "(4, 6)"]),
    ((2, 3), (5, 3), (1, 6), ["(5, 3)", "(1, 6)"]),
    ((2, 3), (5, 3), (6, 6), ["(5, 3)", "(6, 6)"]),
    ((2, 3), (1, 3), (6, 6), ["(1, 3)", "(6, 6)"]),
    ((2, 3), (0, 3), (0, 6), ["(0, 3)"]),
]


@task("hard_lookup")
@pytest.mark.parametrize(("q", "keys", "values", "mentions"), WRONG_MEMORIES)
def test_what_cannot_be_looked_up_is_refused(solution, randn, q, keys, values, mentions):
    assert_raises(ValueError, solution.hard_lookup, randn(*q), randn(*keys), randn(*values), mentions=mentions)


# soft_lookup


def mixture(q, keys, values, temperature=1.0):
    """The definition, query by query: (out, weights) in float64."""
    q, keys, values = array(q), array(keys), array(values)
    weights, out = np.zeros((len(q), len(keys))), np.zeros((len(q), values.shape[1]))
    for i, query in enumerate(q):
        weights[i] = softmax_of(np.array([np.dot(query, key) for key in keys]) / temperature)
        for j, value in enumerate(values):
            out[i] += weights[i, j] * value
    return out, weights


@task("soft_lookup")
def test_each_query_mixes_the_values(solution, randn, dtype):
    q, keys, values = memory(randn, dtype=dtype)
    expected = mixture(q, keys, values)
    assert_pair(solution.soft_lookup(q, keys, values), expected, dtype, "softmax of the dot products, times values")


@task("soft_lookup")
@pytest.mark.parametrize("temperature", [0.2, 0.5, 2, 10.0])
def test_the_temperature_divides_the_scores(solution, randn, dtype, temperature):
    q, keys, values = memory(randn, dtype=dtype)
    expected = mixture(q, keys, values, temperature)
    found = solution.soft_lookup(q, keys, values, temperature)
    assert_pair(found, expected, dtype, f"temperature {temperature}", rtol=1e-4 if dtype == torch.float32 else 1e-10)


@task("soft_lookup")
def test_the_weights_of_a_query_sum_to_one(solution, randn):
    _, weights = solution.soft_lookup(*memory(randn, q=3, n=8), 0.7)
    assert_close(weights.sum(1), torch.ones(3), because="each query has a weight of 1 to give away")
    assert_that(weights.min() >= 0, "no weight is negative", value=round(weights.min().item(), 4))


@task("soft_lookup")
def test_other_values_do_not_change_the_weights(solution, randn):
    q, keys, values = memory(randn, v=4, dtype=torch.float64)
    others = randn(7, 4, dtype=torch.float64)
    expected = mixture(q, keys, values)
    other_expected = mixture(q, keys, others)
    assert_pair(solution.soft_lookup(q, keys, values), expected, torch.float64, "V = D here")
    found = solution.soft_lookup(q, keys, others)
    assert_pair(
        found, other_expected, torch.float64, "q and keys are the same as before: the same weights, other values"
    )


@task("soft_lookup")
def test_answers_stay_between_the_values(solution, randn, dtype):
    q, keys, values = memory(randn, q=9, dtype=dtype)
    lowest, highest = values.min(0).values - 1e-5, values.max(0).values + 1e-5
    out, _ = solution.soft_lookup(q, keys, values, 0.6)
    inside = (out >= lowest) & (out <= highest)
    assert_that(inside, "a mixture lies between the smallest and the largest value of its column", value=inside)


@task("soft_lookup")
def test_the_order_of_the_entries_does_not_matter(solution, randn, randperm):
    q, keys, values = memory(randn, dtype=torch.float64)
    order = randperm(7)
    out, weights = mixture(q, keys, values)
    expected = (out, weights[:, order.cpu().numpy()])
    found = solution.soft_lookup(q, keys[order], values[order])
    assert_pair(found, expected, torch.float64, "keys and values were shuffled together")


@task("soft_lookup")
def test_shuffled_values_are_another_memory(solution, randn):
    q, keys, values = memory(randn, dtype=torch.float64)
    shuffled = values.roll(1, 0)
    expected = mixture(q, keys, shuffled)
    found = solution.soft_lookup(q, keys, shuffled)
    assert_pair(found, expected, torch.float64, "the values alone were shuffled: same weights, other answers")


@task("soft_lookup")
def test_larger_values_give_larger_answers(solution, randn):
    q, keys, values = memory(randn, dtype=torch.float64)
    values = values * 100 + 5
    expected = mixture(q, keys, values)
    assert_pair(solution.soft_lookup(q, keys, values), expected, torch.float64, "values are data, of any size")


@task("soft_lookup")
def test_equal_sizes_hide_no_axis_of_the_lookup(solution, randn):
    q, keys, values = memory(randn, 4, 4, 4, 4, dtype=torch.float64)
    expected = mixture(q, keys, values, 0.8)
    found = solution.soft_lookup(q, keys, values, 0.8)
    assert_pair(found, expected, torch.float64, "all sizes are 4: no shape shows a mix-up")


@task("soft_lookup")
@pytest.mark.parametrize("temperature", [1e-3, 1e-10, 1e-37])
def test_a_cold_lookup_is_a_hard_one(solution, randn, temperature):
    keys, values = randn(7, 4), randn(7, 3)
    q = clear_queries(randn, keys, 6)
    mixed = mixture(q, keys, values, 0.5)
    assert_pair(solution.soft_lookup(q, keys, values, 0.5), mixed, torch.float32, "temperature 0.5", rtol=1e-4)
    expected = best_value(q, keys, values)
    out, _ = solution.soft_lookup(q, keys, values, temperature)
    assert_close(out, expected, because=f"at temperature {temperature:g} only the best key is heard")


@task("soft_lookup")
def test_in_the_cold_scores_may_be_infinite(solution, device):
    q, keys = torch.tensor([[50.0], [-20.0]], device=device), torch.tensor([[3.0], [0.0], [4.0]], device=device)
    values = torch.tensor([[1.0], [2.0], [3.0]], device=device)
    expected = mixture(q / 50, keys, values)
    assert_pair(solution.soft_lookup(q / 50, keys, values), expected, torch.float32, "the plain case")
    expected = torch.tensor([[3.0], [2.0]]), torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    out, weights = solution.soft_lookup(q, keys, values, 1e-37)
    because = "150 / 1e-37 is infinite in float32, and still 200 is more"
    assert_pair((weights, out), expected[::-1], torch.float32, because, ("weights", "out"))


@task("soft_lookup")
def test_in_the_cold_equal_keys_share(solution, randn, device):
    keys = torch.tensor([[2.0, 0.0], [1.0, 1.0], [2.0, 1.0]], device=device)
    q, values = torch.tensor([[1.0, 0.0]], device=device), randn(3, 2)
    mixed = mixture(q, keys, values)
    assert_pair(solution.soft_lookup(q, keys, values), mixed, torch.float32, "the scores are 2, 1 and 2")
    expected = array(values)[[0, 2]].mean(0)[None], np.array([[0.5, 0.0, 0.5]])
    found = solution.soft_lookup(q, keys, values, 1e-3)
    assert_pair(found, expected, torch.float32, "the scores are 2, 1 and 2: two keys are the best")


@task("soft_lookup")
@pytest.mark.parametrize("temperature", [math.inf, 1e30])
def test_a_hot_lookup_is_the_mean(solution, randn, temperature):
    q, keys, values = memory(randn, dtype=torch.float64)
    mixed = mixture(q, keys, values, 2.0)
    assert_pair(solution.soft_lookup(q, keys, values, 2.0), mixed, torch.float64, "temperature 2")
    expected = np.broadcast_to(array(values).mean(0), (5, 6)).copy(), np.full((5, 7), 1 / 7)
    found = solution.soft_lookup(q, keys, values, temperature)
    assert_pair(found, expected, torch.float64, f"at temperature {temperature} all keys are equal")


@task("soft_lookup")
def test_dot_products_of_ten_thousand_are_fine(solution, randn):
    q, keys, values = memory(randn, dtype=torch.float64)
    q = q * 1e4
    expected = mixture(q, keys, values)
    found = solution.soft_lookup(q, keys, values)
    assert_pair(found, expected, torch.float64, "dot products of 10,000 and more", rtol=1e-8, atol=1e-8)


@task("soft_lookup")
@pytest.mark.parametrize("half", HALF)
def test_a_half_lookup_is_rounded_at_the_end(solution, randn, half):
    q, keys, values = (x.to(half) for x in memory(randn, q=6, n=9, d=16, v=5))
    q = q * 4
    expected = mixture(q, keys, values, 0.9)
    for one, two in zip(solution.soft_lookup(q, keys, values, 0.9), expected, strict=True):
        wanted = torch.from_numpy(two).to(half)
        near = {"rtol": 2e-3, "atol": 2e-4} if half == torch.float16 else {"rtol": 1e-2, "atol": 1e-3}
        assert_close(one, wanted, because=f"{half} in, {half} out, float32 between", **near)


@task("soft_lookup")
def test_values_of_a_half_lookup_are_mixed_in_float32(solution, device):
    q, keys = torch.zeros(1, 1, device=device).bfloat16(), torch.zeros(255, 1, device=device).bfloat16()
    values = torch.full((255, 1), 255.0, device=device).bfloat16()
    found, _ = solution.soft_lookup(q, keys, values)
    expected = torch.tensor([[255.0]], dtype=torch.bfloat16)
    assert_equal(
        found, expected, because="the mean of 255 times 255 is 255, unless the weights were rounded to bfloat16"
    )


@task("soft_lookup")
@pytest.mark.parametrize("temperature", [0, 0.0, -1.0, math.nan, -math.inf])
def test_a_temperature_is_above_zero(solution, randn, temperature):
    assert_raises(ValueError, solution.soft_lookup, *memory(randn), temperature, mentions=[str(temperature)])


@task("soft_lookup")
@pytest.mark.parametrize(("q", "keys", "values", "mentions"), WRONG_MEMORIES)
def test_what_cannot_be_mixed_is_refused(solution, randn, q, keys, values, mentions):
    assert_raises(ValueError, solution.soft_lookup, randn(*q), randn(*keys), randn(*values), mentions=mentions)


def differentiable_mixture(q, keys, values, temperature):
    """The definition in torch, with gradients."""
    scores = (q[:, None] * keys).sum(-1) / temperature
    weights = torch.stack([row.exp() / row.exp().sum() for row in scores])
    return weights, (weights[:, :, None] * values).sum(1)


@task("soft_lookup")
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_gradients_of_the_answers_reach_everything(solution, randn, temperature):
    assert_gradients_close(
        lambda *tensors: solution.soft_lookup(*tensors, temperature)[0],
        lambda *tensors: differentiable_mixture(*tensors, temperature)[1],
        memory(randn, dtype=torch.float64),
        because="a soft lookup has a slope everywhere: gradients of out at q, keys and values",
    )


@task("soft_lookup")
def test_gradients_of_the_weights_reach_queries_and_keys(solution, randn):
    q, keys, values = memory(randn, dtype=torch.float64)
    assert_gradients_close(
        lambda q, keys: solution.soft_lookup(q, keys, values)[1],
        lambda q, keys: differentiable_mixture(q, keys, values, 1.0)[0],
        [q, keys],
        because="gradients of the weights at q and keys",
    )


@task("soft_lookup")
@pytest.mark.parametrize(("q", "n"), [(0, 4), (3, 1)])
def test_a_lookup_may_be_small(solution, randn, q, n):
    queries, keys, values = memory(randn, q, n, dtype=torch.float64)
    expected = mixture(queries, keys, values)
    assert_pair(solution.soft_lookup(queries, keys, values), expected, torch.float64, f"{q} queries, {n} entries")


@task("soft_lookup")
def test_strides_do_not_matter_for_a_mixture(solution, randn):
    q, keys, values = memory(randn, dtype=torch.float64)
    q, keys, values = noncontiguous(q), keys.T.contiguous().T, noncontiguous(values)
    expected = mixture(q, keys, values)
    assert_pair(solution.soft_lookup(q, keys, values), expected, torch.float64, "slices of larger tensors")


@task("soft_lookup")
@pytest.mark.parametrize(("q", "n", "d", "v"), [(16, 24, 8, 12), (1, 30, 5, 2)])
def test_a_soft_lookup_is_two_products(solution, randn, q, n, d, v):
    assert_cost(
        solution.soft_lookup,
        *memory(randn, q, n, d, v),
        0.5,
        because="one product for the scores, one for the mixture",
        matmuls=2,
        flops=2 * q * n * (d + v),
    )


@cost_case("soft_lookup")
def soft_lookup_cost(module, randn):
    tensors = memory(randn, 64, 128, 32, 48)
    return lambda: module.soft_lookup(*tensors, 0.5)


# kernel_regression


def smoothed(xq, x, y, bandwidth):
    """The definition, query by query, in float64."""
    xq, x, y = array(xq), array(x), array(y)
    return np.array([softmax_of(-((place - x) ** 2) / (2 * bandwidth**2)) @ y for place in xq])


@task("kernel_regression")
@pytest.mark.parametrize("bandwidth", [1.0, 0.4, 3])
def test_it_is_the_formula_of_nadaraya_and_watson(solution, randn, dtype, bandwidth):
    xq, x, y = randn(6, dtype=dtype), randn(9, dtype=dtype), randn(9, dtype=dtype)
    expected = torch.from_numpy(smoothed(xq, x, y, bandwidth)).to(dtype)
    found = solution.kernel_regression(xq, x, y, bandwidth)
    near = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {}
    assert_close(found, expected, because=f"Gaussian weights with bandwidth {bandwidth}", **near)


@task("kernel_regression")
@pytest.mark.parametrize("bandwidth", [0.5, 1.0, 2.0])
def test_between_two_points_it_is_a_sigmoid(solution, rand, device, bandwidth):
    x = torch.tensor([0.0, 1.0], dtype=torch.float64, device=device)
    xq = rand(5, dtype=torch.float64) * 4 - 2
    expected = 1 / (1 + torch.exp((1 - 2 * xq.cpu()) / (2 * bandwidth**2)))
    found = solution.kernel_regression(xq, x, x.clone(), bandwidth)
    assert_close(found, expected, because="points (0, 0) and (1, 1): the odds are exp((2 xq - 1) / (2 h^2))")


@task("kernel_regression")
def test_as_many_queries_as_points_hide_no_axis(solution, randn):
    xq, x, y = randn(5, dtype=torch.float64), randn(5, dtype=torch.float64), randn(5, dtype=torch.float64)
    expected = torch.from_numpy(smoothed(xq, x, y, 0.7))
    assert_close(solution.kernel_regression(xq, x, y, 0.7), expected, because="Q = N = 5: no shape shows a mix-up")


@task("kernel_regression")
@pytest.mark.parametrize("c", [0.0, -3.5, 1e4])
def test_constant_values_come_back(solution, randn, dtype, c):
    expected = torch.full((6,), c, dtype=dtype)
    found = solution.kernel_regression(
        randn(6, dtype=dtype), randn(8, dtype=dtype), torch.full_like(randn(8, dtype=dtype), c), 0.3
    )
    assert_close(found, expected, rtol=1e-5, atol=1e-6, because=f"every y is {c:g}, so every mean is")


@task("kernel_regression")
@pytest.mark.parametrize("bandwidths", [40, 1e3, -1e3, 1e5])
def test_far_from_all_data_the_nearest_points_decide(solution, randn, bandwidths, dtype):
    x, y = randn(7, dtype=dtype), randn(7, dtype=dtype)
    near = x.mean()[None].clone()
    expected = torch.from_numpy(smoothed(near, x, y, 0.1)).to(dtype)
    found = solution.kernel_regression(near, x, y, 0.1)
    assert_close(found, expected, rtol=1e-3, atol=1e-3, because="first in the middle of the data")
    x = torch.linspace(-1, 1, 7, dtype=dtype, device=x.device)
    xq = torch.tensor([bandwidths * 0.1], dtype=dtype, device=x.device)
    expected = torch.from_numpy(smoothed(xq, x, y, 0.1)).to(dtype)
    found = solution.kernel_regression(xq, x, y, 0.1)
    assert_close(
        found, expected, rtol=1e-4, atol=1e-4, because=f"{bandwidths:g} bandwidths away from 0, where exp gives 0"
    )


@task("kernel_regression")
def test_a_narrow_kernel_finds_the_nearest_point(solution, randn, randperm, device):
    x, y = torch.arange(6.0, device=device)[randperm(6)], randn(6)
    expected = y.cpu()[[x.tolist().index(place) for place in (2.0, 5.0, 0.0)]]
    xq = torch.tensor([2.2, 5.4, -0.3], device=device)
    assert_close(solution.kernel_regression(xq, x, y, 0.05), expected, because="the points are 20 bandwidths apart")


@task("kernel_regression")
def test_a_wide_kernel_gives_the_mean(solution, randn):
    xq, x, y = randn(3), randn(6), randn(6)
    expected = y.double().mean().expand(3).float().cpu()
    assert_close(solution.kernel_regression(xq, x, y, 1e4), expected, because="seen from afar, all points are as near")


@task("kernel_regression")
def test_estimates_stay_between_the_values(solution, randn):
    y = randn(8)
    found = solution.kernel_regression(randn(20) * 3, randn(8), y, 0.3)
    inside = (found >= y.min() - 1e-5) & (found <= y.max() + 1e-5)
    assert_that(inside, "a mean lies between the smallest and the largest y", value=inside)


@task("kernel_regression")
@pytest.mark.parametrize(("q", "n"), [(0, 4), (3, 1), (1, 1)])
def test_few_points_or_queries(solution, randn, q, n):
    xq, x, y = randn(q, dtype=torch.float64), randn(n, dtype=torch.float64), randn(n, dtype=torch.float64)
    expected = torch.from_numpy(smoothed(xq, x, y, 0.5).reshape(q))
    assert_close(solution.kernel_regression(xq, x, y, 0.5), expected, because=f"{q} queries, {n} points")


@task("kernel_regression")
def test_gradients_reach_places_points_and_values(solution, randn):
    def oracle(xq, x, y):
        kernel = torch.exp(-((xq[:, None] - x[None, :]) ** 2) / (2 * 0.8**2))
        return (kernel * y).sum(1) / kernel.sum(1)

    inputs = [randn(4, dtype=torch.float64), randn(6, dtype=torch.float64), randn(6, dtype=torch.float64)]
    because = "gradients at xq, x and y"
    assert_gradients_close(lambda *t: solution.kernel_regression(*t, 0.8), oracle, inputs, because=because)


@task("kernel_regression")
@pytest.mark.parametrize("half", HALF)
def test_half_points_are_smoothed_in_float32(solution, randn, half):
    xq, x, y = (randn(6) * 3).to(half), (randn(9) * 3).to(half), randn(9).to(half)
    expected = torch.from_numpy(smoothed(xq, x, y, 0.2)).to(half)
    near = {"rtol": 2e-3, "atol": 1e-3} if half == torch.float16 else {"rtol": 1e-2, "atol": 2e-3}
    found = solution.kernel_regression(xq, x, y, 0.2)
    assert_close(found, expected, because=f"{half} in, {half} out, float32 between", **near)


@task("kernel_regression")
def test_half_points_far_away_stay_apart(solution, device):
    xq, x = (torch.tensor(values, device=device).half() for values in ([400.0, -400.0], [0.0, 0.25]))
    y = torch.tensor([1.0, 2.0], device=device).half()
    expected = torch.tensor([2.0, 1.0]).half()
    found = solution.kernel_regression(xq, x, y, 1.0)
    assert_close(found, expected, because="400 squared is beyond float16")


@task("kernel_regression")
def test_means_of_half_values_are_taken_in_float32(solution, device):
    x, y = torch.zeros(255, device=device).bfloat16(), torch.full((255,), 255.0, device=device).bfloat16()
    found = solution.kernel_regression(x[:1], x, y, 1.0)
    expected = torch.tensor([255.0], dtype=torch.bfloat16)
    assert_equal(
        found, expected, because="the mean of 255 times 255 is 255, unless the weights were rounded to bfloat16"
    )


@task("kernel_regression")
def test_strides_do_not_matter_for_points(solution, randn):
    xq, x, y = (noncontiguous(randn(n, dtype=torch.float64)) for n in (4, 6, 6))
    expected = torch.from_numpy(smoothed(xq, x, y, 0.5))
    assert_close(solution.kernel_regression(xq, x, y, 0.5), expected, because="slices of larger tensors")


@task("kernel_regression")
@pytest.mark.parametrize("bandwidth", [0, -0.5, math.nan])
def test_a_bandwidth_is_above_zero(solution, randn, bandwidth):
    tensors = randn(3), randn(5), randn(5)
    assert_raises(ValueError, solution.kernel_regression, *tensors, bandwidth, mentions=[str(bandwidth)])


@task("kernel_regression")
@pytest.mark.parametrize(("x", "y"), [((5,), (4,)), ((5,), (1,)), ((1,), (5,)), ((0,), (0,))])
def test_points_come_in_pairs(solution, randn, x, y):
    assert_raises(
        ValueError, solution.kernel_regression, randn(3), randn(*x), randn(*y), 1.0, mentions=[str(x), str(y)]
    )


# additive_scores


def pair_by_pair(q, k, w_q, w_k, v):
    """The definition, one pair at a time, in float64."""
    q, k, w_q, w_k, v = (array(x) for x in (q, k, w_q, w_k, v))
    lead = np.broadcast_shapes(q.shape[:-2], k.shape[:-2])
    q, k = (np.broadcast_to(x, (*lead, *x.shape[-2:])) for x in (q, k))
    scores = np.zeros((*lead, q.shape[-2], k.shape[-2]))
    for place in np.ndindex(*scores.shape):
        *head, i, j = place
        scores[place] = np.dot(v, np.tanh(w_q @ q[(*head, i)] + w_k @ k[(*head, j)]))
    return torch.from_numpy(scores)


def scorer(randn, lead_q=(), lead_k=(), q=3, n=5, dq=4, dk=6, a=7, **kwargs):
    """Random inputs of additive_scores."""
    tensors = randn(*lead_q, q, dq, **kwargs), randn(*lead_k, n, dk, **kwargs)
    return *tensors, randn(a, dq, **kwargs) / 2, randn(a, dk, **kwargs) / 2, randn(a, **kwargs)


@task("additive_scores")
@pytest.mark.parametrize(
    ("q", "n", "dq", "dk", "a"), [(3, 5, 4, 6, 7), (2, 3, 5, 1, 1), (1, 4, 2, 3, 6), (5, 1, 3, 3, 4)]
)
def test_each_query_meets_each_key(solution, randn, dtype, q, n, dq, dk, a):
    tensors = scorer(randn, q=q, n=n, dq=dq, dk=dk, a=a, dtype=dtype)
    expected = pair_by_pair(*tensors).to(dtype)
    assert_close(solution.additive_scores(*tensors), expected, because="v . tanh(w_q q + w_k k)", **loose(dtype))


@task("additive_scores")
def test_the_sum_goes_through_tanh_before_v(solution, device):
    def row(*values):
        return torch.tensor([values], dtype=torch.float64, device=device)

    tensors = row(1.0), row(2.0), row(3.0).T, row(-1.0).T, row(5.0)[0]
    expected = torch.tensor([[5 * math.tanh(3.0 - 2.0)]], dtype=torch.float64)
    assert_close(solution.additive_scores(*tensors), expected, because="q = 1, k = 2, weights 3 and -1: 5 tanh(3 - 2)")


@task("additive_scores")
def test_equal_sizes_hide_no_axis_of_the_scores(solution, randn):
    tensors = scorer(randn, (4,), (4,), 4, 4, 4, 4, 4, dtype=torch.float64)
    expected = pair_by_pair(*tensors)
    assert_close(solution.additive_scores(*tensors), expected, because="all sizes are 4: no shape shows a mix-up")


@task("additive_scores")
@pytest.mark.parametrize(
    ("lead_q", "lead_k"), [((2,), (2,)), ((2, 3), (2, 3)), ((2, 3), ()), ((), (3,)), ((2, 1), (1, 3)), ((3,), (2, 1))]
)
def test_leading_axes_of_queries_and_keys_broadcast(solution, randn, lead_q, lead_k):
    tensors = scorer(randn, lead_q, lead_k, dtype=torch.float64)
    expected = pair_by_pair(*tensors)
    assert_close(solution.additive_scores(*tensors), expected, because=f"{lead_q} and {lead_k} are stretched to fit")


@task("additive_scores")
@pytest.mark.parametrize(("lead", "q", "n"), [((), 0, 5), ((2,), 3, 0), ((0,), 3, 5)])
def test_scores_of_nothing(solution, randn, lead, q, n):
    tensors = scorer(randn, lead, lead, q, n)
    expected = torch.zeros(*lead, q, n)
    assert_close(solution.additive_scores(*tensors), expected, because=f"{q} queries, {n} keys, batch {lead}")


@task("additive_scores")
def test_gradients_reach_all_five(solution, randn):
    def oracle(q, k, w_q, w_k, v):
        rows = [[(v * torch.tanh(w_q @ a + w_k @ b)).sum() for b in k] for a in q]
        return torch.stack([torch.stack(row) for row in rows])

    because = "gradients at q, k, w_q, w_k and v"
    assert_gradients_close(solution.additive_scores, oracle, scorer(randn, dtype=torch.float64), because=because)


@task("additive_scores")
def test_large_sums_saturate(solution, randn):
    q, k, w_q, w_k, v = scorer(randn, dtype=torch.float64)
    tensors = q * 1e6, k, w_q, w_k, v
    expected = pair_by_pair(*tensors)
    found = solution.additive_scores(*tensors)
    assert_close(found, expected, rtol=1e-6, atol=1e-6, because="tanh of a million is 1")


@task("additive_scores")
@pytest.mark.parametrize("half", HALF)
def test_half_scores_stay_half(solution, randn, half):
    tensors = [x.to(half) for x in scorer(randn)]
    expected = pair_by_pair(*tensors).to(half)
    found = solution.additive_scores(*tensors)
    assert_close(found, expected, rtol=5e-2, atol=2e-1, because=f"{half} in, {half} out")


@task("additive_scores")
def test_strides_do_not_matter_for_scores(solution, randn):
    q, k, w_q, w_k, v = scorer(randn, (2,), (2,), dtype=torch.float64)
    tensors = noncontiguous(q), k.mT.contiguous().mT, w_q.T.contiguous().T, noncontiguous(w_k), noncontiguous(v)
    expected = pair_by_pair(*tensors)
    assert_close(solution.additive_scores(*tensors), expected, because="slices and transposed tensors")


@task("additive_scores")
@pytest.mark.parametrize(
    ("which", "shape", "mentions"),
    [
        (0, (3, 5), ["(3, 5)", "(7, 4)"]),
        (0, (3, 1), ["(3, 1)", "(7, 4)"]),
        (1, (5, 4), ["(5, 4)", "(7, 6)"]),
        (1, (5, 1), ["(5, 1)", "(7, 6)"]),
        (2, (1, 4), ["(1, 4)", "(7,)"]),
        (3, (1, 6), ["(1, 6)", "(7,)"]),
        (3, (8, 6), ["(8, 6)", "(7,)"]),
        (4, (6,), ["(6,)", "(7, 4)"]),
        (4, (1,), ["(1,)", "(7, 4)"]),
    ],
)
def test_weights_that_do_not_fit_are_refused(solution, randn, which, shape, mentions):
    tensors = list(scorer(randn))
    tensors[which] = randn(*shape)
    assert_raises(ValueError, solution.additive_scores, *tensors, mentions=mentions)


@task("additive_scores")
def test_both_weights_have_a_row_per_number_of_v(solution, randn):
    q, k, w_q, w_k, _ = scorer(randn)
    assert_raises(ValueError, solution.additive_scores, q, k, w_q[:1], w_k[:1], randn(7), mentions=["(7,)"])


@task("additive_scores")
@pytest.mark.parametrize("lead", [(), (3,)])
def test_queries_and_keys_are_projected_once(solution, randn, lead):
    q, n, dq, dk, a = 24, 30, 10, 12, 16
    tensors = scorer(randn, lead, lead, q, n, dq, dk, a)
    assert_cost(
        solution.additive_scores,
        *tensors,
        because="each query and each key goes through its matrix once, not once per pair",
        max_flops=2 * a * (q * dq + n * dk + q * n) * math.prod(lead),
    )


@task("additive_scores")
def test_pairs_take_two_tensors_at_most(solution, randn):
    q, n, a = 24, 30, 16
    with torch.no_grad():
        assert_cost(
            solution.additive_scores,
            *scorer(randn, (2,), (2,), q, n, 10, 12, a),
            because="of the size Q*N*A there are the sum and its tanh, and nothing else",
            max_new_bytes=4 * 2 * (2 * q * n * a + 4 * (q * n + q * a + n * a)),
        )


@cost_case("additive_scores")
def additive_cost(module, randn):
    tensors = scorer(randn, q=64, n=64, dq=32, dk=48, a=32)
    return lambda: module.additive_scores(*tensors)


# attend


def allowed_only(scores, values, mask=None):
    """The definition, one query at a time, with the allowed keys picked out: (out, weights) in float64."""
    scores, values = array(scores), array(values)
    lead = np.broadcast_shapes(scores.shape[:-2], values.shape[:-2])
    allowed = np.ones((), dtype=bool) if mask is None else mask.cpu().numpy()
    allowed = np.broadcast_to(allowed, scores.shape)
    weights = np.zeros(scores.shape)
    for place in np.ndindex(*scores.shape[:-1]):
        keep = allowed[place]
        if keep.any():
            weights[place][keep] = softmax_of(scores[place][keep])
    stretched = np.broadcast_to(weights, (*lead, *weights.shape[-2:]))
    values = np.broadcast_to(values, (*lead, *values.shape[-2:]))
    out = np.zeros((*lead, scores.shape[-2], values.shape[-1]))
    for place in np.ndindex(*out.shape[:-1]):
        for weight, value in zip(stretched[place], values[place[:-1]], strict=True):
            out[place] += weight * value
    return out, weights


def table(randn, lead=(2, 3), q=5, n=7, v=6, **kwargs):
    """Random scores and values."""
    return randn(*lead, q, n, **kwargs), randn(*lead, n, v, **kwargs)


def some_mask(rand, *shape):
    """A random mask in which each query may attend to something, and not to everything."""
    mask = rand(*shape) < 0.5
    mask[..., 1] = True
    mask[..., 0] = False
    return mask


@task("attend")
@pytest.mark.parametrize(("lead", "q", "n", "v"), [((), 3, 5, 4), ((2, 3), 5, 7, 6), ((2,), 4, 1, 3)])
def test_scores_become_weights_and_a_mixture(solution, randn, dtype, lead, q, n, v):
    scores, values = table(randn, lead, q, n, v, dtype=dtype)
    expected = allowed_only(scores, values)
    assert_pair(solution.attend(scores, values), expected, dtype, "softmax over the keys, times values")


@task("attend")
def test_equal_sizes_hide_no_axis_of_the_mixture(solution, randn, rand):
    scores, values = table(randn, (4, 4), 4, 4, 4, dtype=torch.float64)
    mask = some_mask(rand, 4, 1, 4, 4)
    expected = allowed_only(scores, values, mask)
    assert_pair(solution.attend(scores, values, mask), expected, torch.float64, "all sizes are 4")


@task("attend")
def test_true_means_may_attend(solution, randn, device):
    scores, values = table(randn, (), 2, 3)
    mask = torch.tensor([[False, True, False], [True, False, False]], device=device)
    expected = values[[1, 0]].cpu().clone()
    out, _ = solution.attend(scores, values, mask)
    assert_close(out, expected, because="query 0 may attend to key 1 alone, query 1 to key 0 alone")


@task("attend")
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (5, 7), (2, 1, 1, 7), (3, 1, 7), (2, 1, 5, 7), (7,), (1, 1, 1, 7)])
def test_masks_are_stretched_to_the_scores(solution, randn, rand, dtype, shape):
    scores, values = table(randn, dtype=dtype)
    mask = some_mask(rand, *shape)
    expected = allowed_only(scores, values, mask)
    assert_pair(solution.attend(scores, values, mask), expected, dtype, f"a mask {shape} is stretched to (2, 3, 5, 7)")


@task("attend")
def test_a_mask_with_one_column_switches_queries_off(solution, randn, device):
    scores, values = table(randn, (2,), dtype=torch.float64)
    mask = torch.tensor([True, False, True, True, False], device=device)[:, None]
    expected = allowed_only(scores, values, mask)
    assert_pair(solution.attend(scores, values, mask), expected, torch.float64, "a mask (5, 1)")


@task("attend")
def test_a_hidden_key_weighs_exactly_nothing(solution, randn, rand):
    scores, values = table(randn)
    mask = some_mask(rand, 2, 1, 5, 7)
    hidden = ~mask.expand(2, 3, 5, 7).cpu()
    _, weights = solution.attend(scores, values, mask)
    found = weights.detach().cpu()[hidden]
    assert_equal(found, torch.zeros_like(found), because="the weight of a hidden key is 0, not nearly 0")


@task("attend")
@pytest.mark.parametrize("size", [1e4, 1e18])
def test_what_hidden_entries_hold_changes_nothing(solution, randn, rand, size):
    scores, values = table(randn, (), dtype=torch.float64)
    mask = some_mask(rand, 7)
    expected = allowed_only(scores, values, mask)
    scores[:, ~mask], values[~mask] = size, -size
    found = solution.attend(scores, values, mask)
    assert_pair(found, expected, torch.float64, f"hidden scores and values hold {size:g}")


@task("attend")
def test_nothing_allowed_gives_zeros(solution, randn, rand, dtype):
    scores, values = table(randn, dtype=dtype)
    mask = some_mask(rand, 2, 3, 5, 7)
    full = allowed_only(scores, values, mask)
    assert_pair(solution.attend(scores, values, mask), full, dtype, "each query may attend to something")
    mask[0, 1, 2] = mask[1, :, 0] = False
    expected = allowed_only(scores, values, mask)
    found = solution.attend(scores, values, mask)
    assert_pair(found, expected, dtype, "a query that may attend to no key gets zeros, not NaN")


def differentiable_attend(scores, values, mask):
    """The definition in torch, with gradients: (out, weights)."""
    exponentials = scores.exp() * mask
    total = exponentials.sum(-1, keepdim=True)
    weights = exponentials / total.masked_fill(total == 0, 1.0)
    return (weights[..., None] * values[..., None, :, :]).sum(-2), weights


@task("attend")
def test_gradients_reach_scores_and_values(solution, randn, rand):
    mask = some_mask(rand, 5, 7)
    assert_gradients_close(
        lambda scores, values: solution.attend(scores, values, mask)[0],
        lambda scores, values: differentiable_attend(scores, values, mask)[0],
        table(randn, (2,), dtype=torch.float64),
        because="gradients of out at scores and values",
    )


@task("attend")
def test_gradients_of_the_weights_reach_the_scores(solution, randn):
    scores, values = table(randn, (2,), dtype=torch.float64)
    assert_gradients_close(
        lambda scores: solution.attend(scores, values)[1],
        lambda scores: differentiable_attend(scores, values, scores == scores)[1],
        [scores],
        because="gradients of the weights at the scores",
    )


@task("attend")
def test_nothing_allowed_sends_back_zeros(solution, randn, rand):
    scores, values = table(randn, (2,), dtype=torch.float64)
    mask = some_mask(rand, 2, 5, 7)
    mask[0, 2] = mask[1, 0] = False
    expected = torch.from_numpy(allowed_only(scores, values, mask)[0])
    assert_close(solution.attend(scores, values, mask)[0], expected, because="two queries may attend to nothing")
    assert_gradients_close(
        lambda scores, values: solution.attend(scores, values, mask)[0],
        lambda scores, values: differentiable_attend(scores, values, mask)[0],
        [scores, values],
        because="two queries may attend to nothing: they send back 0, and no NaN",
    )


@task("attend")
@pytest.mark.parametrize("masked", [False, True])
def test_scores_of_ten_thousand_become_weights(solution, randn, rand, masked):
    scores, values = table(randn, dtype=torch.float64)
    scores = scores * 1e4
    mask = some_mask(rand, 5, 7) if masked else None
    expected = allowed_only(scores, values, mask)
    assert_pair(solution.attend(scores, values, mask), expected, torch.float64, "scores of 10,000 and more")


@task("attend")
@pytest.mark.parametrize("low", [-1e9, -1e12])
def test_an_allowed_key_counts_however_low(solution, randn, device, low):
    scores = torch.tensor([[low, 5.0, low + 1]], dtype=torch.float64, device=device)
    values, mask = randn(3, 2, dtype=torch.float64), torch.tensor([True, False, True], device=device)
    expected = allowed_only(scores, values, mask)
    found = solution.attend(scores, values, mask)
    assert_pair(found, expected, torch.float64, f"the two allowed keys share the weight at {low:g}")


@task("attend")
def test_a_score_of_zero_is_a_score(solution, randn, device):
    scores = torch.tensor([[-3.0, -3.0, -3.0, 2.0]], dtype=torch.float64, device=device)
    values, mask = randn(4, 2, dtype=torch.float64), torch.tensor([True, True, True, False], device=device)
    expected = allowed_only(scores, values, mask)
    found = solution.attend(scores, values, mask)
    assert_pair(found, expected, torch.float64, "three keys at -3 share the weight, the fourth is hidden")


@task("attend")
@pytest.mark.parametrize("masked", [False, True])
def test_without_keys_there_is_nothing_to_mix(solution, randn, device, masked):
    scores, values = table(randn, n=0)
    mask = torch.ones(5, 0, dtype=torch.bool, device=device) if masked else None
    expected = torch.zeros(2, 3, 5, 6), torch.zeros(2, 3, 5, 0)
    assert_pair(solution.attend(scores, values, mask), expected, torch.float32, "N = 0: zeros")


@task("attend")
@pytest.mark.parametrize(("lead", "q"), [((2, 3), 0), ((0, 3), 5)])
def test_without_queries_nothing_comes_out(solution, randn, rand, lead, q):
    scores, values = table(randn, lead, q)
    expected = torch.zeros(*lead, q, 6), torch.zeros(*lead, q, 7)
    found = solution.attend(scores, values, some_mask(rand, 7))
    assert_pair(found, expected, torch.float32, f"{q} queries, batch {lead}")


@task("attend")
@pytest.mark.parametrize(("for_scores", "for_values"), [((2, 3), ()), ((2, 3), (2, 1)), ((3,), (2, 1)), ((), (2,))])
def test_leading_axes_of_scores_and_values_broadcast(solution, randn, for_scores, for_values):
    scores, values = randn(*for_scores, 5, 7, dtype=torch.float64), randn(*for_values, 7, 6, dtype=torch.float64)
    expected = allowed_only(scores, values)
    found = solution.attend(scores, values)
    assert_pair(found, expected, torch.float64, f"{for_scores} and {for_values} are stretched to fit")


@task("attend")
def test_strides_do_not_matter_for_attention(solution, randn, rand):
    scores, values = table(randn, dtype=torch.float64)
    scores, values = noncontiguous(scores), values.mT.contiguous().mT
    mask = noncontiguous(some_mask(rand, 5, 7))
    expected = allowed_only(scores, values, mask)
    assert_pair(solution.attend(scores, values, mask), expected, torch.float64, "slices of larger tensors")


@task("attend")
@pytest.mark.parametrize("half", HALF)
def test_half_attention_is_rounded_at_the_end(solution, randn, rand, half):
    scores, values = (x.to(half) for x in table(randn, (2,), 20, 30, 8))
    mask = some_mask(rand, 20, 30)
    mask[3] = False
    expected = allowed_only(scores, values, mask)
    near = {"rtol": 2e-3, "atol": 2e-4} if half == torch.float16 else {"rtol": 1e-2, "atol": 1e-3}
    for one, two in zip(solution.attend(scores, values, mask), expected, strict=True):
        assert_close(one, torch.from_numpy(two).to(half), because=f"{half} in, {half} out, float32 between", **near)


@task("attend")
def test_half_weights_are_not_rounded_before_they_mix(solution, device):
    scores, values = (
        torch.zeros(1, 255, device=device).bfloat16(),
        torch.full((255, 1), 255.0, device=device).bfloat16(),
    )
    found, _ = solution.attend(scores, values)
    expected = torch.tensor([[255.0]], dtype=torch.bfloat16)
    assert_equal(
        found, expected, because="the mean of 255 times 255 is 255, unless the weights were rounded to bfloat16"
    )


@task("attend")
@pytest.mark.parametrize(
    ("scores", "values", "mask", "mentions"),
    [
        ((2, 5, 7), (2, 6, 4), None, ["(2, 5, 7)", "(2, 6, 4)"]),
        ((2, 5, 7), (2, 1, 4), None, ["(2, 5, 7)", "(2, 1, 4)"]),
        ((2, 5, 1), (2, 7, 4), None, ["(2, 5, 1)", "(2, 7, 4)"]),
        ((2, 5, 7), (2, 7, 4), (5, 6), ["(5, 6)", "(2, 5, 7)"]),
        ((2, 5, 7), (2, 7, 4), (2, 7), ["(2, 7)", "(2, 5, 7)"]),
        ((5, 7), (7, 4), (2, 5, 7), ["(2, 5, 7)", "(5, 7)"]),
        ((1, 7), (7, 4), (5, 7), ["(5, 7)", "(1, 7)"]),
    ],
)
def test_what_does_not_fit_the_scores_is_refused(solution, randn, rand, scores, values, mask, mentions):
    mask = None if mask is None else rand(*mask) < 2
    assert_raises(ValueError, solution.attend, randn(*scores), randn(*values), mask, mentions=mentions)


@cost_case("attend")
def attend_cost(module, randn):
    tensors = table(randn, (4,), 32, 48, 16)
    return lambda: module.attend(*tensors)


# BahdanauAttention

SHAPES = {"q_proj.weight": (7, 3), "k_proj.weight": (7, 4), "score_proj.weight": (1, 7)}  # A = 7, Dq = 3, De = 4


def build(solution, randn, device, sizes=(3, 4, 7), dtype=torch.float64):
    """The module with random weights, and copies of them."""
    module = solution.BahdanauAttention(*sizes).to(device=device, dtype=dtype)
    d_query, d_enc, d_attn = sizes
    shapes = {"q_proj.weight": (d_attn, d_query), "k_proj.weight": (d_attn, d_enc), "score_proj.weight": (1, d_attn)}
    found = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    assert_equal(found, shapes, because=f"the state dict of BahdanauAttention{sizes}")
    state = {name: (randn(*shape) * 0.7).to(dtype) for name, shape in shapes.items()}
    module.load_state_dict(state)
    return module, {name: value.clone() for name, value in state.items()}


def looking_back(state, query, enc, lengths):
    """The definition, row by row, each with its real states alone: (context, weights), differentiable."""
    contexts, weights = [], []
    for row, length in enumerate(lengths.tolist()):
        states = enc[row, :length]
        hidden = torch.tanh(state["q_proj.weight"] @ query[row] + states @ state["k_proj.weight"].T)
        exponentials = (hidden @ state["score_proj.weight"][0]).exp()
        share = exponentials / exponentials.sum() if length else exponentials
        contexts.append((share[:, None] * states).sum(0))
        weights.append(F.pad(share, (0, enc.shape[1] - length)))
    return torch.stack(contexts), torch.stack(weights)


def sentence(randn, b=3, t=6, d_query=3, d_enc=4, dtype=torch.float64):
    """A random query and random states."""
    return randn(b, d_query, dtype=dtype), randn(b, t, d_enc, dtype=dtype)


def assert_context(found, expected, because, **tolerances):
    context, weights = found
    near = {"rtol": 1e-9, "atol": 1e-11} | tolerances
    assert_close(context.detach(), expected[0].detach(), because=f"{because} (context)", **near)
    assert_close(weights.detach(), expected[1].detach(), because=f"{because} (weights)", **near)


@task("BahdanauAttention")
def test_it_has_three_weights(solution, device):
    module = solution.BahdanauAttention(3, 4, 7)
    found = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    assert_equal(found, SHAPES, because="the state dict")
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert_equal(trained, set(SHAPES), because="what is trained")


@task("BahdanauAttention")
@pytest.mark.parametrize("sizes", [(3, 4, 7), (5, 2, 1), (4, 4, 4)])
def test_the_decoder_looks_back(solution, randn, device, dtype, sizes):
    module, state = build(solution, randn, device, sizes, dtype)
    query, enc = sentence(randn, 3, 6, *sizes[:2], dtype=dtype)
    lengths = torch.tensor([6, 6, 6], device=device)
    expected = looking_back(state, query, enc, lengths)
    assert_context(module(query, enc, lengths), expected, "all rows are full", **loose(dtype))


@task("BahdanauAttention")
@pytest.mark.parametrize("lengths", [[6, 2, 4], [1, 6, 3], [2, 3, 1]])
def test_padding_has_no_weight(solution, randn, device, dtype, lengths):
    module, state = build(solution, randn, device, dtype=dtype)
    query, enc = sentence(randn, dtype=dtype)
    lengths = torch.tensor(lengths, device=device)
    expected = looking_back(state, query, enc, lengths)
    assert_context(module(query, enc, lengths), expected, f"the lengths are {lengths.tolist()}", **loose(dtype))


@task("BahdanauAttention")
def test_as_many_places_as_rows_hide_no_axis(solution, randn, device):
    module, state = build(solution, randn, device, (4, 4, 4))
    query, enc = sentence(randn, 4, 4, 4, 4)
    lengths = torch.tensor([4, 1, 3, 2], device=device)
    expected = looking_back(state, query, enc, lengths)
    assert_context(module(query, enc, lengths), expected, "all sizes are 4: no shape shows a mix-up")


@task("BahdanauAttention")
def test_the_query_matters(solution, randn, device):
    module, state = build(solution, randn, device)
    query, enc = sentence(randn)
    lengths = torch.tensor([5, 6, 2], device=device)
    expected = looking_back(state, query, enc, lengths)
    other = query + 1
    other_expected = looking_back(state, other, enc, lengths)
    assert_context(module(query, enc, lengths), expected, "one query")
    assert_context(module(other, enc, lengths), other_expected, "another query, the same states: other weights")


@task("BahdanauAttention")
@pytest.mark.parametrize("size", [1e3, 1e9])
def test_the_content_of_padding_changes_nothing(solution, randn, device, size):
    module, state = build(solution, randn, device)
    query, enc = sentence(randn)
    lengths = torch.tensor([6, 2, 4], device=device)
    expected = looking_back(state, query, enc, lengths)
    enc[1, 2:], enc[2, 4:] = size, -size
    assert_context(module(query, enc, lengths), expected, f"padding holds {size:g} and {-size:g}")


@task("BahdanauAttention")
def test_the_amount_of_padding_changes_nothing(solution, randn, device):
    module, state = build(solution, randn, device)
    query, enc = sentence(randn)
    lengths = torch.tensor([6, 2, 4], device=device)
    context, weights = looking_back(state, query, enc, lengths)
    longer = torch.cat([enc, randn(3, 5, 4, dtype=torch.float64)], dim=1)
    expected = context, F.pad(weights, (0, 5))
    assert_context(module(query, longer, lengths), expected, "five more places of padding")


@task("BahdanauAttention")
def test_the_weights_of_padding_are_exactly_zero(solution, randn, device):
    module, _ = build(solution, randn, device, dtype=torch.float32)
    query, enc = sentence(randn, dtype=torch.float32)
    _, weights = module(query, enc, torch.tensor([3, 1, 5], device=device))
    found = torch.cat([weights[0, 3:], weights[1, 1:], weights[2, 5:]]).detach().cpu()
    assert_equal(found, torch.zeros(9), because="padding weighs 0, not nearly 0")


@task("BahdanauAttention")
def test_an_empty_row_gets_zeros(solution, randn, device):
    module, state = build(solution, randn, device)
    query, enc = sentence(randn)
    full, some = torch.tensor([3, 6, 1], device=device), torch.tensor([3, 0, 1], device=device)
    expected = looking_back(state, query, enc, full)
    assert_context(module(query, enc, full), expected, "no row is empty")
    expected = looking_back(state, query, enc, some)
    assert_context(module(query, enc, some), expected, "row 1 has length 0: zeros, not NaN")


@task("BahdanauAttention")
@pytest.mark.parametrize("lengths", [[6, 2, 4], [3, 0, 6]])
def test_gradients_reach_query_states_and_weights(solution, randn, device, lengths):
    module, state = build(solution, randn, device)
    query, enc = sentence(randn)
    lengths = torch.tensor(lengths, device=device)
    weighting = randn(3, 4, dtype=torch.float64)
    twins = [x.clone().requires_grad_() for x in (query, enc, *state.values())]
    context, _ = looking_back(dict(zip(state, twins[2:], strict=True)), *twins[:2], lengths)
    expected = torch.autograd.grad((context * weighting).sum(), twins)
    leaves = [query.requires_grad_(), enc.requires_grad_()]
    loss = (module(query, enc, lengths)[0] * weighting).sum()
    assert_close(loss.item(), (context * weighting).sum().item(), because="a weighted sum of the contexts")
    parameters = dict(module.named_parameters())
    found = torch.autograd.grad(loss, [*leaves, *(parameters[name] for name in state)], materialize_grads=True)
    for name, one, two in zip(["query", "enc", *state], found, expected, strict=True):
        assert_close(one, two, rtol=1e-9, atol=1e-11, because=f"the gradient at {name}, lengths {lengths.tolist()}")


@task("BahdanauAttention")
def test_gradients_of_the_weights_arrive(solution, randn, device):
    module, state = build(solution, randn, device)
    query, enc = sentence(randn)
    lengths = torch.tensor([6, 2, 4], device=device)
    weighting = randn(3, 6, dtype=torch.float64)
    twin = query.clone().requires_grad_()
    _, weights = looking_back(state, twin, enc, lengths)
    (expected,) = torch.autograd.grad((weights * weighting).sum(), [twin])
    leaf = query.clone().requires_grad_()
    loss = (module(leaf, enc, lengths)[1] * weighting).sum()
    (found,) = torch.autograd.grad(loss, [leaf], materialize_grads=True)
    assert_close(found, expected, rtol=1e-9, atol=1e-11, because="the gradient of the weights at query")


@task("BahdanauAttention")
def test_states_of_a_recurrent_encoder_may_be_padded(solution, randn, device):
    module, state = build(solution, randn, device)
    encoder = nn.LSTM(2, 4, batch_first=True).to(device=device, dtype=torch.float64)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.copy_(randn(*parameter.shape, dtype=torch.float64) * 0.5)
    query, words = randn(3, 3, dtype=torch.float64), randn(3, 5, 2, dtype=torch.float64)
    with torch.no_grad():
        rows = [encoder(words[i : i + 1, :n])[0] for i, n in enumerate([5, 2, 4])]
        enc = encoder(words)[0]
    alone = [looking_back(state, query[i : i + 1], rows[i], torch.tensor([n])) for i, n in enumerate([5, 2, 4])]
    expected = (
        torch.cat([context for context, _ in alone]),
        torch.cat([F.pad(w, (0, 5 - w.shape[1])) for _, w in alone]),
    )
    found = module(query, enc, torch.tensor([5, 2, 4], device=device))
    assert_context(found, expected, "an LSTM read each sentence by itself, without padding")


@task("BahdanauAttention")
@pytest.mark.parametrize(("b", "t"), [(0, 5), (3, 0), (1, 1)])
def test_a_batch_may_be_small(solution, randn, device, b, t):
    module, state = build(solution, randn, device)
    query, enc = sentence(randn, b, t)
    lengths = torch.full((b,), t, dtype=torch.int64, device=device)
    expected = torch.zeros(b, 4, dtype=torch.float64), torch.zeros(b, t, dtype=torch.float64)
    if b and t:
        expected = looking_back(state, query, enc, lengths)
    assert_context(module(query, enc, lengths), expected, f"B = {b}, T = {t}")


@task("BahdanauAttention")
@pytest.mark.parametrize("half", HALF)
def test_half_states_give_half_contexts(solution, randn, device, half):
    module, state = build(solution, randn, device, dtype=half)
    query, enc = sentence(randn, dtype=half)
    lengths = torch.tensor([6, 2, 4], device=device)
    wide = {name: value.double() for name, value in state.items()}
    expected = tuple(x.to(half) for x in looking_back(wide, query.double(), enc.double(), lengths))
    assert_context(module(query, enc, lengths), expected, f"{half} in, {half} out", rtol=0.1, atol=0.1)


@task("BahdanauAttention")
def test_inputs_of_the_layer_stay_as_they_are(solution, randn, device):
    module, state = build(solution, randn, device)
    query, enc = (noncontiguous(x) for x in sentence(randn))
    lengths = torch.tensor([6, 2, 4], device=device)
    expected = looking_back(state, query, enc, lengths)
    with unchanged(query, enc, lengths, *module.parameters()):
        found = module(query, enc, lengths)
    assert_context(found, expected, "query and enc are slices of larger tensors")


@task("BahdanauAttention")
@pytest.mark.parametrize(
    ("query", "enc", "lengths", "mentions"),
    [
        ((2, 3), (3, 6, 4), 3, ["(2, 3)", "(3, 6, 4)"]),
        ((1, 3), (3, 6, 4), 3, ["(1, 3)", "(3, 6, 4)"]),
        ((3, 3), (1, 6, 4), 1, ["(3, 3)", "(1, 6, 4)"]),
        ((3, 3), (3, 6, 4), 2, ["(2,)", "(3, 6, 4)"]),
        ((3, 3), (3, 6, 4), 1, ["(1,)", "(3, 6, 4)"]),
        ((3, 4), (3, 6, 4), 3, ["(7, 3)"]),
        ((3, 3), (3, 6, 3), 3, ["(7, 4)"]),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(solution, randn, device, query, enc, lengths, mentions):
    module = solution.BahdanauAttention(3, 4, 7).to(device)
    lengths = torch.ones(lengths, dtype=torch.int64, device=device)
    assert_raises(ValueError, module, randn(*query), randn(*enc), lengths, mentions=mentions)


@task("BahdanauAttention")
def test_lengths_have_one_axis(solution, randn, device):
    module = solution.BahdanauAttention(3, 4, 7).to(device)
    lengths = torch.ones(3, 1, dtype=torch.int64, device=device)
    mentions = ["(3, 1)", "(3, 6, 4)"]
    assert_raises(ValueError, module, randn(3, 3), randn(3, 6, 4), lengths, mentions=mentions)


# induction_lookup


def what_followed(tokens, n_vocab):
    """The definition, place by place: the share of each follower."""
    tokens = tokens.tolist()
    table = torch.zeros(len(tokens), n_vocab, dtype=torch.float64)
    for t in range(len(tokens)):
        followers = [tokens[s + 1] for s in range(t) if tokens[s] == tokens[t]]
        for follower in followers:
            table[t, follower] += 1 / len(followers)
    return table.float()


def twice(randperm, n):
    """Each of n tokens once, and then each once more, in another order."""
    return torch.cat([randperm(n), randperm(n)])


SOFT = {"rtol": 1e-5, "atol": 1e-6}


@task("induction_lookup")
def test_after_a_b_and_a_comes_b(solution, device):
    tokens = torch.tensor([3, 0, 2, 3], device=device)
    expected = torch.zeros(4, 5)
    expected[3, 0] = 1
    assert_close(solution.induction_lookup(tokens, 5), expected, because="3 was followed by 0", **SOFT)


@task("induction_lookup")
@pytest.mark.parametrize("n", [2, 5, 20])
def test_one_earlier_occurrence_decides(solution, randperm, n):
    tokens = twice(randperm, n)
    expected = what_followed(tokens, n)
    found = solution.induction_lookup(tokens, n)
    assert_close(found, expected, because="in the second half, each token occurred once before", **SOFT)


@task("induction_lookup")
def test_what_never_occurred_predicts_nothing(solution, randperm):
    tokens = randperm(8)
    found = solution.induction_lookup(tokens, 8)
    assert_close(found, torch.zeros(8, 8), because="no token occurs twice", **SOFT)


@task("induction_lookup")
def test_several_followers_share(solution, device):
    tokens = torch.tensor([0, 1, 0, 2, 0, 1, 0], device=device)
    expected = torch.zeros(7, 4)
    expected[2] = torch.tensor([0, 1, 0, 0.0])
    expected[4] = torch.tensor([0, 1, 1, 0.0]) / 2
    expected[5] = torch.tensor([1, 0, 0, 0.0])
    expected[6] = torch.tensor([0, 2, 1, 0.0]) / 3
    assert_close(
        solution.induction_lookup(tokens, 4), expected, because="0 1 0 2 0 1 0: the last 0 had 1, 2, 1", **SOFT
    )


@task("induction_lookup")
def test_a_token_may_follow_itself(solution, device):
    tokens = torch.tensor([1, 1, 1, 0], device=device)
    expected = torch.tensor([[0, 0], [0, 1], [0, 1], [0, 0.0]])
    assert_close(
        solution.induction_lookup(tokens, 2), expected, because="1 1 1: each 1 followed the one before", **SOFT
    )


@task("induction_lookup")
def test_the_first_token_follows_nobody(solution, device):
    tokens = torch.tensor([2, 0, 1, 2, 0], device=device)
    expected = torch.zeros(5, 3)
    expected[3, 0] = expected[4, 1] = 1
    found = solution.induction_lookup(tokens, 3)
    assert_close(found, expected, because="place 0 has no token before it, not even the last one", **SOFT)


@task("induction_lookup")
@pytest.mark.parametrize(("length", "n_vocab"), [(30, 4), (40, 9), (12, 3), (9, 30), (7, 1)])
def test_any_sequence(solution, randint, length, n_vocab):
    tokens = randint(0, n_vocab, (length,))
    expected = what_followed(tokens, n_vocab)
    assert_close(solution.induction_lookup(tokens, n_vocab), expected, because="the shares of the followers", **SOFT)


@task("induction_lookup")
def test_the_future_has_no_influence(solution, randint):
    tokens = randint(0, 4, (20,))
    expected = what_followed(tokens, 4)
    assert_close(solution.induction_lookup(tokens, 4), expected, because="20 tokens", **SOFT)
    tokens = torch.cat([tokens[:12], 3 - tokens[12:]])
    found = solution.induction_lookup(tokens, 4)
    assert_close(found[:12], expected[:12], because="tokens from place 12 on were changed, rows before stay", **SOFT)


@task("induction_lookup")
def test_a_long_memory_does_not_leak(solution, randint, randperm):
    tokens = torch.cat([randperm(400), randint(0, 400, (1,))])
    expected = what_followed(tokens, 400)
    found = solution.induction_lookup(tokens, 400)
    assert_close(found, expected, because="one entry of 401 answers, the others keep silent", **SOFT)


@task("induction_lookup")
@pytest.mark.parametrize("length", [0, 1])
def test_too_little_to_predict(solution, randint, length):
    tokens = randint(0, 5, (length,))
    expected = torch.zeros(length, 5)
    assert_close(
        solution.induction_lookup(tokens, 5), expected, because=f"{length} tokens: nothing was repeated", **SOFT
    )


@task("induction_lookup")
def test_strides_do_not_matter_for_tokens(solution, randint):
    tokens = noncontiguous(randint(0, 3, (15,)))
    expected = what_followed(tokens, 3)
    assert_close(solution.induction_lookup(tokens, 3), expected, because="every other one of 30 numbers", **SOFT)


# induction_head


def assert_layers(layers, n_vocab, max_len):
    """Two dicts of matrices that fit the stream."""
    width = 3 * n_vocab + max_len
    names = ["q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"]
    assert_equal([sorted(layer) for layer in layers], [sorted(names)] * 2, because="two dicts of four weights")
    for number, layer in enumerate(layers):
        inner = layer["q_proj.weight"].shape[0]
        expected = dict.fromkeys(names[:3], (inner, width)) | {"o_proj.weight": (width, inner)}
        found = {name: tuple(layer[name].shape) for name in names}
        assert_equal(found, expected, because=f"shapes of layer {number + 1}, D = {width}")


def stream(layers, tokens, n_vocab, max_len):
    """The blocks of the stream after each of the two layers."""
    T = len(tokens)
    x = torch.cat([F.one_hot(tokens, n_vocab), torch.eye(max_len)[:T], torch.zeros(T, 2 * n_vocab)], 1).float()
    seen = torch.ones(T, T).tril() > 0
    blocks = []
    for layer in layers:
        q, k, v = (F.linear(x, layer[f"{name}_proj.weight"].cpu()) for name in "qkv")
        scores = q @ k.T / math.sqrt(q.shape[1])
        weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
        x = x + F.linear(weights @ v, layer["o_proj.weight"].cpu())
        blocks.append(x.split([n_vocab, max_len, n_vocab, n_vocab], dim=1))
    return blocks


def assert_completes(layers, tokens, n_vocab, max_len, because):
    """Wherever the token occurred before, a follower stands out in `guess`."""
    tokens = tokens.cpu()
    followed = what_followed(tokens, n_vocab) > 0
    asked = followed.any(1) & ~followed.all(1)
    guess = stream(layers, tokens, n_vocab, max_len)[1][3]
    right = guess.masked_fill(~followed, -math.inf).amax(1)
    wrong = guess.masked_fill(followed, -math.inf).amax(1)
    good = (right - wrong >= 1e-3) | ~asked
    value = guess.detach().round(decimals=2)
    assert_that(good, f"{because}: the guess is a follower, ahead of all others by 1e-3", value=value)


SIZES = [(5, 12), (24, 64), (64, 64), (30, 7), (3, 64)]


@task("induction_head")
@pytest.mark.parametrize(("n_vocab", "max_len"), [*SIZES, (1, 4), (4, 1), (1, 1)])
def test_there_are_two_layers(solution, n_vocab, max_len):
    assert_layers(solution.induction_head(n_vocab, max_len), n_vocab, max_len)


@task("induction_head")
@pytest.mark.parametrize(("n_vocab", "max_len"), SIZES)
def test_weights_are_float32_and_bounded(solution, n_vocab, max_len):
    layers = solution.induction_head(n_vocab, max_len)
    weights = [weight for layer in layers for weight in layer.values()]
    assert_equal({(weight.dtype, weight.device.type) for weight in weights}, {(torch.float32, "cpu")})
    largest = max(weight.abs().max().item() for weight in weights)
    assert_that(largest <= 50, "no weight is beyond 50", value=round(largest, 3))


@task("induction_head")
@pytest.mark.parametrize(("n_vocab", "max_len"), SIZES)
def test_the_first_layer_copies_the_token_before(solution, randint, n_vocab, max_len):
    layers = solution.induction_head(n_vocab, max_len)
    assert_layers(layers, n_vocab, max_len)
    tokens = randint(0, n_vocab, (max_len,)).cpu()
    expected = F.one_hot(tokens[:-1], n_vocab).float()
    before = stream(layers, tokens, n_vocab, max_len)[0][2]
    assert_close(before[1:].detach(), expected, atol=1e-3, rtol=0, because="the block `before` from place 1 on")


@task("induction_head")
def test_it_completes_a_b_a(solution):
    layers = solution.induction_head(5, 12)
    assert_layers(layers, 5, 12)
    assert_completes(layers, torch.tensor([4, 3, 1, 4, 3]), 5, 12, "4 3 1 4 3")


@task("induction_head")
@pytest.mark.parametrize(("n_vocab", "max_len"), SIZES)
def test_it_completes_random_sequences(solution, randint, n_vocab, max_len):
    layers = solution.induction_head(n_vocab, max_len)
    assert_layers(layers, n_vocab, max_len)
    for length in (max_len, max_len - 2):
        for _ in range(3):
            assert_completes(layers, randint(0, n_vocab, (length,)), n_vocab, max_len, f"{length} random tokens")


@task("induction_head")
@pytest.mark.parametrize("n", [8, 32])
def test_it_completes_what_occurred_once(solution, randperm, n):
    layers = solution.induction_head(n, 2 * n)
    assert_layers(layers, n, 2 * n)
    for _ in range(4):
        assert_completes(layers, twice(randperm, n), n, 2 * n, "each token occurs twice")


@task("induction_head")
def test_the_first_place_follows_nobody(solution):
    layers = solution.induction_head(6, 10)
    assert_layers(layers, 6, 10)
    for first in range(6):
        tokens = torch.tensor([first, (first + 1) % 6, (first + 2) % 6, first, (first + 1) % 6, first])
        assert_completes(layers, tokens, 6, 10, f"{tokens.tolist()}, where place 0 sees only itself")


@task("induction_head")
def test_one_rare_follower_among_many(solution):
    layers = solution.induction_head(64, 64)
    assert_layers(layers, 64, 64)
    tokens = torch.cat([torch.zeros(1, dtype=torch.int64), torch.arange(1, 63), torch.zeros(1, dtype=torch.int64)])
    assert_completes(layers, tokens, 64, 64, "0 was followed by 1, and 61 other tokens came since")
