"""Day 2: what a right solution does."""

import math
import random

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
    noncontiguous,
    task,
)

INF = float("inf")
NAN = float("nan")
HALF = [torch.float16, torch.bfloat16]


def on_cpu(x):
    """The values of x in float64, out of the solution's reach."""
    return x.detach().double().cpu().clone()


def rounded(expected, dtype):
    """A float64 result, rounded once."""
    return expected.to(dtype)


def one_rounding(dtype):
    """Relative tolerance for a result that was rounded once, with a little to spare."""
    return 1.2 * torch.finfo(dtype).eps


def gradient(fn, x, weights):
    """The gradient of sum(weights * fn(x)) with respect to x."""
    x = x.detach().clone().requires_grad_()
    result = fn(x)
    assert_that(result.requires_grad, "the result is cut off from x: no gradient can flow back")
    (result * weights).sum().backward()
    return x.grad


# broadcast_shape


@task("broadcast_shape")
@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
def test_equal_shapes_stay_as_they_are(solution, shape):
    assert_equal(solution.broadcast_shape(shape, shape), shape, because="equal shapes broadcast to themselves")


@task("broadcast_shape")
def test_a_size_of_one_takes_the_other_size(solution):
    assert_equal(
        solution.broadcast_shape((4, 1, 3), (1, 5, 3)),
        (4, 5, 3),
        because="each 1 is stretched to the size that stands across from it",
    )


@task("broadcast_shape")
@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((2, 1), (2,), (2, 2)),
        ((3,), (1, 3), (1, 3)),
        ((4, 1, 4), (4, 1), (4, 4, 4)),
        ((2, 3, 4), (1,), (2, 3, 4)),
        ((), (2, 3), (2, 3)),
    ],
)
def test_shapes_are_lined_up_at_their_last_axes(solution, a, b, expected):
    assert_equal(solution.broadcast_shape(a, b), expected, because=f"{a} and {b}, written flush right")


@task("broadcast_shape")
@pytest.mark.parametrize(("a", "b", "expected"), [((0,), (1,), (0,)), ((3, 1), (3, 0), (3, 0)), ((0, 4), (1,), (0, 4))])
def test_a_one_is_also_stretched_to_zero(solution, a, b, expected):
    assert_equal(solution.broadcast_shape(a, b), expected, because="a 1 takes the other size, even if that is 0")


@task("broadcast_shape")
@pytest.mark.parametrize(
    ("a", "b"), [((2, 3), (4, 3)), ((2, 3), (2,)), ((5, 2, 3), (4, 3)), ((0, 2), (3, 2)), ((2, 3), (2, 6))]
)
def test_sizes_that_do_not_fit_are_refused_with_both_shapes(solution, a, b):
    assert_raises(
        ValueError,
        solution.broadcast_shape,
        a,
        b,
        mentions=[str(a), str(b)],
        because=f"{a} and {b} do not broadcast",
    )


@task("broadcast_shape")
def test_random_shapes_agree_with_numpy(solution, seed):
    rng = random.Random(seed)
    for _ in range(60):
        size, rank = rng.choice([0, 2, 3, 7]), rng.randint(0, 5)
        a, b = (tuple(rng.choice([1, size]) for _ in range(rng.randint(0, rank))) for _ in range(2))
        expected = tuple(np.broadcast_shapes(a, b))
        assert_equal(solution.broadcast_shape(a, b), expected, because=f"numpy says this of {a} and {b}")


@task("broadcast_shape")
def test_the_shape_is_predicted_and_not_tried_out(solution):
    a, b = (10**9, 1), (1, 10**9)
    result = assert_cost(
        solution.broadcast_shape, a, b, max_calls=0, because="the answer needs no tensor, only the sizes"
    )
    assert_equal(result, (10**9, 10**9))


# column_mse


@task("column_mse")
def test_each_column_gets_the_mean_of_its_squared_differences(solution, randn, dtype):
    pred, target = randn(7, 3, dtype=dtype), randn(7, 3, dtype=dtype)
    p, t = on_cpu(pred), on_cpu(target)
    means = [sum((p[i, j] - t[i, j]).item() ** 2 for i in range(7)) / 7 for j in range(3)]
    assert_close(
        solution.column_mse(pred, target),
        torch.tensor(means, dtype=dtype),
        because="one number per column, the mean over the rows",
    )


@task("column_mse")
def test_a_square_table_is_still_averaged_down_its_columns(solution, device):
    pred = torch.tensor([[1.0, 0.0, 0.0], [2.0, 0.0, 0.0], [3.0, 0.0, 6.0]], device=device)
    target = torch.zeros(3, 3, device=device)
    expected = torch.tensor([14.0 / 3, 0.0, 12.0])
    assert_close(
        solution.column_mse(pred, target),
        expected,
        because="only the first and last columns hold anything; the rows are what the mean runs over",
    )


@task("column_mse")
def test_one_row_gives_its_squared_differences(solution, randn):
    pred, target = randn(1, 4), randn(1, 4)
    assert_close(solution.column_mse(pred, target), ((pred - target) ** 2)[0].cpu())


@task("column_mse")
@pytest.mark.parametrize(("p", "t"), [((5, 1), (5,)), ((4, 3), (1, 3)), ((4, 3), (3,)), ((4, 1), (4, 3))])
def test_shapes_that_only_broadcast_are_refused_with_both_shapes(solution, randn, p, t):
    assert_raises(
        ValueError,
        solution.column_mse,
        randn(*p),
        randn(*t),
        mentions=[str(p), str(t)],
        because=f"{p} and {t} are not equal, so there is no difference row by row",
    )


# standardize


@task("standardize")
@pytest.mark.parametrize("eps", [None, 0.5])
def test_rows_are_those_of_a_layer_norm_without_weights(solution, randn, dtype, eps):
    x = 3 * randn(4, 3, 7, dtype=dtype) + 2
    options = {} if eps is None else {"eps": eps}
    expected = F.layer_norm(on_cpu(x), (7,), eps=1e-5 if eps is None else eps)
    assert_close(
        solution.standardize(x, **options),
        expected.to(dtype),
        because="(x - mean) / sqrt(variance + eps) along the last axis, the variance divided by D",
    )


@task("standardize")
def test_a_square_table_is_standardized_along_its_rows(solution, randn):
    x = randn(5, 5) * 2 + torch.arange(5.0, device=randn(1).device)
    expected = F.layer_norm(on_cpu(x), (5,))
    assert_close(solution.standardize(x), expected.float(), because="the last axis is the one that is summed over")


@task("standardize")
def test_small_rows_are_divided_by_the_root_of_variance_plus_eps(solution, device):
    x = torch.tensor([[-1e-3, 1e-3]], dtype=torch.float64, device=device)
    expected = torch.tensor([[-1.0, 1.0]], dtype=torch.float64) * 1e-3 / math.sqrt(1e-6 + 1e-5)
    assert_close(solution.standardize(x), expected, because="eps stands beside the variance, inside the root")


@task("standardize")
def test_a_row_of_one_entry_gives_zero(solution, randn):
    x = randn(3, 1)
    assert_close(solution.standardize(x), torch.zeros(3, 1), because="one entry is its own mean, and its variance is 0")


@task("standardize")
def test_a_row_of_equal_entries_gives_zeros(solution, device):
    x = torch.full((2, 8), 7.5, device=device)
    assert_close(solution.standardize(x), torch.zeros(2, 8), because="nothing differs from the mean")


@task("standardize")
def test_a_large_offset_does_not_drown_the_variance(solution, randn):
    x = randn(6, 64) + 1e4
    expected = F.layer_norm(on_cpu(x), (64,))
    assert_close(
        solution.standardize(x),
        expected.float(),
        atol=5e-3,
        because="the spread is 1 around 10,000; squares of 10,000 leave float32 no digits for it",
    )


@task("standardize")
def test_half_precision_does_not_overflow_in_the_squares(solution, randn):
    x = (randn(3, 16) * 1000).half()
    expected = rounded(F.layer_norm(on_cpu(x), (16,)), torch.float16)
    assert_close(
        solution.standardize(x),
        expected,
        rtol=4e-3,
        because="1000 squared is beyond float16, whose largest number is 65,504",
    )


@task("standardize")
def test_bfloat16_statistics_are_not_rounded_to_bfloat16(solution, randn):
    x = (randn(4, 32) * 4 + 100).bfloat16()
    expected = rounded(F.layer_norm(on_cpu(x), (32,)), torch.bfloat16)
    assert_close(
        solution.standardize(x),
        expected,
        rtol=1e-2,
        atol=1e-3,
        because="mean and variance in float32, one rounding at the end",
    )


@task("standardize")
def test_gradients_flow_through_mean_and_variance(solution, randn):
    x = randn(3, 4, dtype=torch.float64)
    assert_gradients_close(
        solution.standardize,
        lambda x: F.layer_norm(x, (4,)),
        [x],
        because="the mean and the variance depend on x too",
    )


@task("standardize")
def test_no_rows_give_no_rows(solution, randn):
    assert_equal(tuple(solution.standardize(randn(0, 5)).shape), (0, 5))


@task("standardize")
def test_rows_with_other_strides_are_standardized_too(solution, randn):
    x = noncontiguous(randn(3, 6))
    assert_close(solution.standardize(x), F.layer_norm(on_cpu(x), (6,)).float())


@cost_case("standardize")
def standardize_cost(module, randn):
    x = randn(32, 64)
    return lambda: module.standardize(x)


# logsumexp


@task("logsumexp")
@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -3])
def test_the_named_axis_is_summed(solution, randn, dtype, dim):
    x = randn(2, 3, 4, dtype=dtype)
    expected = torch.logsumexp(on_cpu(x), dim).to(dtype)
    assert_close(solution.logsumexp(x, dim), expected, because=f"axis {dim} of (2, 3, 4) is summed and disappears")


@task("logsumexp")
@pytest.mark.parametrize("dim", [0, -1])
def test_keepdim_leaves_the_axis_with_size_one(solution, randn, dim):
    x = randn(3, 1, 5)
    expected = torch.logsumexp(on_cpu(x), dim, keepdim=True).float()
    assert_close(solution.logsumexp(x, dim, keepdim=True), expected, because="keepdim=True keeps the axis, with size 1")


@task("logsumexp")
def test_only_the_summed_axis_disappears(solution, randn):
    x = randn(1, 4, 1)
    assert_close(solution.logsumexp(x, 1), torch.logsumexp(on_cpu(x), 1).float(), because="(1, 4, 1) gives (1, 1)")


@task("logsumexp")
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_huge_entries_stay_finite(solution, randn, offset):
    x = randn(3, 6) + offset
    expected = torch.logsumexp(on_cpu(x), 1).float()
    assert_close(
        solution.logsumexp(x, 1),
        expected,
        rtol=1e-6,
        because="exp(10,000) is inf and exp(-10,000) is 0, but the result lies near the largest entry",
    )


@task("logsumexp")
def test_rows_do_not_look_at_each_other(solution, randn):
    x = randn(3, 5, dtype=torch.float64) + torch.tensor([[0.0], [1e3], [-1e3]], device=randn(1).device)
    expected = torch.logsumexp(on_cpu(x), 1)
    assert_close(solution.logsumexp(x, 1), expected, because="the rows lie 1000 apart, and each has its own maximum")


@task("logsumexp")
def test_a_row_of_minus_infinity_gives_minus_infinity(solution, randn):
    x = randn(3, 4)
    x[1] = -INF
    expected = torch.logsumexp(on_cpu(x), 1).float()
    assert_close(solution.logsumexp(x, 1), expected, because="the second row sums to exp(-inf) = 0, and log(0) is -inf")


@task("logsumexp")
def test_single_minus_infinities_add_nothing(solution, randn):
    x = randn(3, 4)
    expected = torch.logsumexp(on_cpu(x)[:, :3], 1).float()
    x[:, 3] = -INF
    assert_close(solution.logsumexp(x, 1), expected, because="exp(-inf) is 0: the other three entries remain")


@task("logsumexp")
def test_plus_infinity_gives_plus_infinity(solution, randn):
    x = randn(3, 4)
    x[0, 2] = INF
    x[1] = -INF
    expected = torch.logsumexp(on_cpu(x), 1).float()
    assert_close(solution.logsumexp(x, 1), expected, because="a sum with inf in it is inf, and so is its log")


@task("logsumexp")
@pytest.mark.parametrize("keepdim", [False, True])
def test_an_empty_axis_gives_minus_infinity(solution, randn, keepdim):
    x = randn(3, 0, 2)
    expected = torch.full((3, 1, 2) if keepdim else (3, 2), -INF)
    assert_close(solution.logsumexp(x, 1, keepdim=keepdim), expected, because="an empty sum is 0, and log(0) is -inf")


@task("logsumexp")
def test_no_rows_give_no_results(solution, randn):
    assert_equal(tuple(solution.logsumexp(randn(0, 3), 1).shape), (0,))


@task("logsumexp")
def test_float16_sums_beyond_its_largest_number(solution, device):
    x = torch.zeros(66_000, dtype=torch.float16, device=device)
    expected = torch.tensor(math.log(66_000)).half()
    assert_close(
        solution.logsumexp(x, 0),
        expected,
        because="the sum is 66,000, float16 ends at 65,504, but its log is 11.1: sum in float32",
    )


@task("logsumexp")
def test_bfloat16_results_are_rounded_once(solution, randn):
    x = (randn(50, 7) * 2).bfloat16()
    expected = rounded(torch.logsumexp(on_cpu(x), 1), torch.bfloat16)
    assert_close(
        solution.logsumexp(x, 1),
        expected,
        rtol=one_rounding(torch.bfloat16),
        atol=1e-3,
        because="everything in float32, one rounding at the end",
    )


@task("logsumexp")
def test_the_gradient_is_the_softmax(solution, randn):
    x = randn(4, 5, dtype=torch.float64)
    x[1] += 1e4
    x[2] -= 1e4
    x[3, 0] = -INF
    weights = randn(4, dtype=torch.float64)
    expected = torch.softmax(on_cpu(x), 1) * on_cpu(weights)[:, None]
    assert_close(
        gradient(lambda x: solution.logsumexp(x, 1), x, weights),
        expected,
        because="the derivative of log(sum(exp(x))) is exp(x) / sum(exp(x))",
    )


@cost_case("logsumexp")
def logsumexp_cost(module, randn):
    x = randn(32, 64)
    return lambda: module.logsumexp(x, 1)


# softmax


@task("softmax")
@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -3])
def test_weights_along_the_named_axis(solution, randn, dtype, dim):
    x = randn(2, 3, 4, dtype=dtype)
    expected = torch.softmax(on_cpu(x), dim).to(dtype)
    assert_close(solution.softmax(x, dim), expected, because=f"the sums along axis {dim} are 1")


@task("softmax")
def test_the_last_axis_is_the_default(solution, randn):
    x = randn(4, 4)
    assert_close(solution.softmax(x), torch.softmax(on_cpu(x), -1).float(), because="dim=-1 is the default")


@task("softmax")
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_huge_scores_give_finite_weights(solution, randn, offset):
    x = randn(3, 6, dtype=torch.float64) + offset
    expected = torch.softmax(on_cpu(x), 1)
    assert_close(solution.softmax(x, 1), expected, rtol=1e-9, because="a constant added to a row changes no weight")


@task("softmax")
def test_a_huge_row_does_not_starve_the_others(solution, randn):
    x = randn(3, 5) + torch.tensor([[0.0], [1e3], [-1e3]], device=randn(1).device)
    expected = torch.softmax(on_cpu(x), 1).float()
    assert_close(solution.softmax(x, 1), expected, because="the rows lie 1000 apart, and each sums to 1 on its own")


@task("softmax")
def test_a_shifted_row_keeps_its_digits(solution, randint):
    x = randint(-5, 6, (4, 7)).float()
    expected = torch.softmax(on_cpu(x), 1).float()
    assert_close(
        solution.softmax(x + 1e4, 1),
        expected,
        because="whole numbers plus 10,000 are exact in float32, so the weights are those without the 10,000",
    )


@task("softmax")
def test_scores_of_minus_infinity_get_exactly_nothing(solution, randn):
    x = randn(3, 5)
    x[0, 1] = x[1, 0] = x[1, 4] = -INF
    expected = torch.softmax(on_cpu(x), 1).float()
    result = solution.softmax(x, 1)
    assert_close(result, expected, because="exp(-inf) is 0")
    assert_equal(result[x == -INF], torch.zeros(3), because="exactly 0 where the score is -inf")


@task("softmax")
def test_a_tensor_without_axes_is_refused(solution, device):
    assert_raises(
        ValueError, solution.softmax, torch.tensor(2.0, device=device), because="there is no axis to sum over"
    )


@task("softmax")
@pytest.mark.parametrize("shape", [(3, 0), (0, 3)])
def test_empty_scores_give_empty_weights(solution, randn, shape):
    assert_equal(tuple(solution.softmax(randn(*shape), 1).shape), shape)


@task("softmax")
@pytest.mark.parametrize("half", HALF)
def test_half_precision_weights_are_rounded_once(solution, randn, half):
    x = (randn(20, 9) * 3).to(half)
    expected = torch.softmax(on_cpu(x), 1)
    result = solution.softmax(x, 1)
    assert_close(
        result,
        rounded(expected, half),
        rtol=one_rounding(half),
        atol=1e-6,
        because="differences, exponentials and sums in float32, one rounding at the end",
    )
    assert_close(result.double().sum(1), torch.ones(20, dtype=torch.float64), rtol=2e-2, because="the rows sum to 1")


@task("softmax")
def test_float16_sums_of_many_weights_do_not_overflow(solution, device):
    x = torch.zeros(66_000, dtype=torch.float16, device=device)
    expected = torch.full((66_000,), 1 / 66_000).half()
    assert_close(
        solution.softmax(x),
        expected,
        rtol=5e-3,
        atol=0.0,
        because="66,000 equal scores share 1 between them; the sum of 66,000 needs float32",
    )


@task("softmax")
def test_gradients_are_those_of_softmax(solution, randn):
    x = randn(3, 4, dtype=torch.float64)
    x[1] += 1e3
    x[2, 1] = -INF
    assert_gradients_close(
        lambda x: solution.softmax(x, 1),
        lambda x: torch.softmax(x, 1),
        [x],
        because="the gradient of softmax",
        rtol=1e-9,
    )


@cost_case("softmax")
def softmax_cost(module, randn):
    x = randn(32, 64)
    return lambda: module.softmax(x)


# masked_softmax


def softmax_of_the_kept(x, mask):
    """Row by row over the last axis: softmax of the kept entries, zeros elsewhere."""
    rows = []
    for row, keep in zip(x.reshape(-1, x.shape[-1]), mask.expand(x.shape).reshape(-1, x.shape[-1]), strict=True):
        kept = [j for j in range(len(row)) if keep[j]]
        weights = dict(zip(kept, torch.softmax(row[kept], 0) if kept else [], strict=True))
        rows.append(
            torch.stack([weights.get(j, torch.zeros((), dtype=x.dtype, device=x.device)) for j in range(len(row))])
        )
    return torch.stack(rows).reshape(x.shape)


def some_mask(rand, *shape):
    """A random mask with at least one True and one False in each row."""
    mask = rand(*shape) < 0.5
    mask[..., 0] = True
    mask[..., -1] = False
    return mask


@task("masked_softmax")
def test_the_kept_entries_share_the_whole_weight(solution, randn, rand, dtype):
    x, mask = randn(4, 6, dtype=dtype), some_mask(rand, 4, 6)
    expected = softmax_of_the_kept(on_cpu(x), mask.cpu()).to(dtype)
    assert_close(
        solution.masked_softmax(x, mask),
        expected,
        because="each row is the softmax of its kept entries alone",
    )


@task("masked_softmax")
def test_masked_entries_get_exactly_zero(solution, randn, rand):
    x, mask = randn(4, 6), some_mask(rand, 4, 6)
    hidden = (~mask).cpu()
    result = solution.masked_softmax(x, mask)
    assert_equal(result.cpu()[hidden], torch.zeros(int(hidden.sum())), because="not nearly 0 but 0")


@task("masked_softmax")
def test_a_low_score_that_is_allowed_still_gets_the_weight(solution, device):
    x = torch.tensor([[-1e12, 0.0, 3.0], [-INF, 2.0, 1.0]], dtype=torch.float64, device=device)
    mask = torch.tensor([[True, False, False], [True, True, False]], device=device)
    expected = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    assert_close(
        solution.masked_softmax(x, mask),
        expected,
        because="the only allowed score takes all, however low it is",
    )


@task("masked_softmax")
def test_a_row_with_nothing_allowed_gives_zeros(solution, randn, rand):
    x, mask = randn(4, 5), some_mask(rand, 4, 5)
    mask[2] = False
    expected = softmax_of_the_kept(on_cpu(x), mask.cpu()).float()
    assert_close(
        solution.masked_softmax(x, mask),
        expected,
        because="the third row may look at nothing: its weights are 0",
    )


@task("masked_softmax")
def test_gradients_are_those_of_the_kept_entries(solution, randn, rand):
    x, mask = randn(4, 5, dtype=torch.float64), some_mask(rand, 4, 5)
    assert_gradients_close(
        lambda x: solution.masked_softmax(x, mask),
        lambda x: softmax_of_the_kept(x, mask),
        [x],
        because="only kept entries take part, so only they get a gradient",
    )


@task("masked_softmax")
def test_a_row_with_nothing_allowed_gets_a_zero_gradient(solution, randn, rand):
    x, mask = randn(4, 5, dtype=torch.float64), some_mask(rand, 4, 5)
    mask[1] = False
    weights = randn(4, 5, dtype=torch.float64)
    expected = gradient(lambda x: softmax_of_the_kept(x, mask), x, weights).cpu()
    assert_close(
        gradient(lambda x: solution.masked_softmax(x, mask), x, weights),
        expected,
        because="the second row may look at nothing: its gradient is 0, not NaN",
    )


@task("masked_softmax")
@pytest.mark.parametrize("junk", [1e4, INF, -INF, NAN])
def test_what_is_hidden_has_no_influence(solution, randn, rand, junk):
    x, mask = randn(3, 6), some_mask(rand, 3, 6)
    spoiled = x.clone()
    spoiled[0, ~mask[0]] = junk
    expected = softmax_of_the_kept(on_cpu(x), mask.cpu()).float()
    assert_close(
        solution.masked_softmax(spoiled, mask),
        expected,
        because=f"{junk} stands in the first row, only where the mask is False",
    )


@task("masked_softmax")
@pytest.mark.parametrize("junk", [1e4, INF, NAN])
def test_what_is_hidden_does_not_reach_the_gradient(solution, randn, rand, junk):
    x, mask = randn(3, 6, dtype=torch.float64), some_mask(rand, 3, 6)
    weights = randn(3, 6, dtype=torch.float64)
    spoiled = x.clone()
    spoiled[0, ~mask[0]] = junk
    expected = gradient(lambda x: softmax_of_the_kept(x, mask), x, weights).cpu()
    assert_close(
        gradient(lambda x: solution.masked_softmax(x, mask), spoiled, weights),
        expected,
        because=f"{junk} stands in the first row, only where the mask is False, and gets the gradient 0",
    )


@task("masked_softmax")
@pytest.mark.parametrize("junk", [INF, NAN])
def test_a_row_with_nothing_allowed_may_hold_anything(solution, randn, rand, junk):
    x, mask = randn(3, 4, dtype=torch.float64), some_mask(rand, 3, 4)
    mask[1] = False
    weights = randn(3, 4, dtype=torch.float64)
    expected = softmax_of_the_kept(on_cpu(x), mask.cpu())
    slope = gradient(lambda x: softmax_of_the_kept(x, mask), x, weights).cpu()
    spoiled = x.clone()
    spoiled[1] = junk
    because = f"the second row holds nothing but {junk}, all of it hidden"
    assert_close(solution.masked_softmax(spoiled, mask), expected, because=because)
    grad = gradient(lambda x: solution.masked_softmax(x, mask), spoiled, weights)
    assert_close(grad, slope, because=f"{because}; its gradient is 0")


@task("masked_softmax")
def test_huge_scores_in_some_rows_are_fine(solution, randn, rand):
    x = randn(3, 6, dtype=torch.float64) + torch.tensor([[0.0], [1e4], [-1e4]], device=randn(1).device)
    mask = some_mask(rand, 3, 6)
    expected = softmax_of_the_kept(on_cpu(x), mask.cpu())
    assert_close(solution.masked_softmax(x, mask), expected, rtol=1e-9, because="each row has its own maximum")


@task("masked_softmax")
@pytest.mark.parametrize("shape", [(4, 4), (2, 1, 1, 4), (1, 3, 4, 1), (4,), (4, 1), (1,), ()])
def test_the_mask_broadcasts_to_the_scores(solution, randn, rand, shape):
    x, mask = randn(2, 3, 4, 4), rand(*shape) < 0.6
    expected = softmax_of_the_kept(on_cpu(x), mask.cpu()).float()
    assert_close(solution.masked_softmax(x, mask), expected, because=f"a mask {shape} is stretched to (2, 3, 4, 4)")


@task("masked_softmax")
def test_another_axis_can_be_normalized(solution, randn, rand):
    x, mask = randn(2, 5, 3), some_mask(rand, 2, 3, 5).transpose(1, 2)
    expected = softmax_of_the_kept(on_cpu(x).transpose(1, 2), mask.cpu().transpose(1, 2)).transpose(1, 2).float()
    assert_close(solution.masked_softmax(x, mask, dim=1), expected, because="with dim=1 the columns share the weight")
    assert_close(solution.masked_softmax(x, mask, -2), expected, because="dim=-2 is the same axis as dim=1")


@task("masked_softmax")
def test_a_mask_with_fewer_axes_is_lined_up_before_the_reduction(solution, randn, device):
    x, mask = randn(4, 5), torch.tensor([True, False, True, False, True], device=device)
    expected = softmax_of_the_kept(on_cpu(x).T, mask.cpu()[:, None].expand(5, 4)).T.float()
    assert_close(
        solution.masked_softmax(x, mask, dim=0),
        expected,
        because="the mask (5,) allows or hides whole columns of x (4, 5); the softmax runs down each column",
    )


@task("masked_softmax")
def test_without_a_mask_everything_is_allowed(solution, randn):
    x = randn(3, 4)
    assert_close(
        solution.masked_softmax(x, None),
        torch.softmax(on_cpu(x), -1).float(),
        because="mask=None hides nothing",
    )
    assert_close(
        solution.masked_softmax(x, None, 0),
        torch.softmax(on_cpu(x), 0).float(),
        because="dim counts without a mask too",
    )


@task("masked_softmax")
@pytest.mark.parametrize(("x", "mask"), [((3, 4), (4, 3)), ((3, 4), (3,)), ((3, 4), (2, 3, 4)), ((1, 4), (3, 4))])
def test_masks_that_do_not_fit_the_scores_are_refused(solution, randn, rand, x, mask):
    assert_raises(
        ValueError,
        solution.masked_softmax,
        randn(*x),
        rand(*mask) < 2,
        mentions=[str(x), str(mask)],
        because=f"a mask {mask} does not broadcast to {x}",
    )


@task("masked_softmax")
@pytest.mark.parametrize("shape", [(3, 0), (0, 3)])
def test_empty_scores_stay_empty_under_a_mask(solution, randn, rand, shape):
    x, mask = randn(*shape), rand(*shape) < 0.5
    assert_equal(tuple(solution.masked_softmax(x, mask).shape), shape)


@task("masked_softmax")
@pytest.mark.parametrize("half", HALF)
def test_masked_half_precision_is_rounded_once(solution, randn, rand, half):
    x, mask = (randn(20, 9) * 3).to(half), some_mask(rand, 20, 9)
    mask[4] = False
    expected = rounded(softmax_of_the_kept(on_cpu(x), mask.cpu()), half)
    assert_close(
        solution.masked_softmax(x, mask),
        expected,
        rtol=one_rounding(half),
        atol=1e-6,
        because="computed in float32, one rounding at the end",
    )


@task("masked_softmax")
def test_few_tables_are_alive_at_one_time(solution, randn, rand):
    x, mask = randn(64, 128), some_mask(rand, 64, 128)
    size = x.numel() * x.element_size()
    assert_cost(
        solution.masked_softmax,
        x,
        mask,
        max_peak_bytes=4 * size + 3 * mask.numel() + 16 * 64 * x.element_size(),
        because="four tensors of the size of x are enough, with some masks and some numbers per row",
    )


@cost_case("masked_softmax")
def masked_softmax_cost(module, randn):
    x, mask = randn(32, 64), randn(32, 64) > 0
    return lambda: module.masked_softmax(x, mask)


# masked_mean


def mean_of_the_kept(x, mask, axes):
    """Over the axes given, with keepdim: a slow loop over the places of the result."""
    x, mask = np.asarray(x), np.broadcast_to(np.asarray(mask), x.shape)
    shape = tuple(1 if axis in axes else size for axis, size in enumerate(x.shape))
    result = np.zeros(shape)
    for place in np.ndindex(*shape):
        total, count = 0.0, 0
        for index in np.ndindex(*x.shape):
            if mask[index] and all(axis in axes or index[axis] == place[axis] for axis in range(x.ndim)):
                total, count = total + x[index], count + 1
        result[place] = total / count if count else 0.0
    return torch.from_numpy(result)


@task("masked_mean")
def test_the_mean_of_the_kept_entries(solution, randn, rand, dtype):
    x, mask = randn(4, 6, dtype=dtype), some_mask(rand, 4, 6)
    expected = mean_of_the_kept(on_cpu(x), mask.cpu(), (0, 1)).reshape(()).to(dtype)
    assert_close(
        solution.masked_mean(x, mask),
        expected,
        because="the sum of the kept entries divided by how many they are",
    )


@task("masked_mean")
@pytest.mark.parametrize(
    ("dim", "axes"),
    [(0, (0,)), (1, (1,)), (-1, (2,)), ((0, 2), (0, 2)), ((-1, -2), (1, 2)), (None, (0, 1, 2))],
)
@pytest.mark.parametrize("keepdim", [False, True])
def test_the_mean_runs_over_the_axes_asked_for(solution, randn, rand, dim, axes, keepdim):
    x, mask = randn(2, 3, 4), rand(2, 3, 4) < 0.6
    expected = mean_of_the_kept(on_cpu(x), mask.cpu(), axes).float()
    if not keepdim:
        expected = expected.reshape([size for axis, size in enumerate(x.shape) if axis not in axes])
    assert_close(
        solution.masked_mean(x, mask, dim, keepdim),
        expected,
        because=f"dim={dim}, keepdim={keepdim}: each mean has its own count",
    )


@task("masked_mean")
def test_nothing_kept_gives_zero(solution, randn, rand):
    x, mask = randn(3, 4), some_mask(rand, 3, 4)
    mask[1] = False
    expected = mean_of_the_kept(on_cpu(x), mask.cpu(), (1,)).reshape(3).float()
    assert_close(solution.masked_mean(x, mask, 1), expected, because="the second row keeps nothing: its mean is 0")
    assert_close(solution.masked_mean(x, mask & False), torch.tensor(0.0), because="nothing kept at all: the mean is 0")


@task("masked_mean")
@pytest.mark.parametrize("junk", [INF, -INF, NAN])
def test_junk_under_the_mask_has_no_influence(solution, randn, rand, junk):
    x, mask = randn(4, 5, dtype=torch.float64), some_mask(rand, 4, 5)
    mask[3] = False
    weights = randn(4, dtype=torch.float64)
    spoiled = x.clone()
    spoiled[:3] = x[:3].masked_fill(~mask[:3], junk)
    expected = mean_of_the_kept(on_cpu(x), mask.cpu(), (1,)).reshape(4)
    slope = (weights[:, None] * mask / mask.sum(1, keepdim=True).clamp(min=1)).cpu()
    result = solution.masked_mean(spoiled, mask, dim=-1)
    because = f"{junk} stands only where the mask is False"
    assert_close(result[3:], expected[3:], because="the last row keeps nothing: its mean is 0")
    grad = gradient(lambda x: solution.masked_mean(x, mask, -1), spoiled, weights)
    assert_close(grad, slope, because=f"{because}, where the gradient is 0")
    assert_close(result, expected, because=because)


@task("masked_mean")
@pytest.mark.parametrize(("shape", "dim"), [((4,), None), ((3, 1), None), ((3, 1), 1), ((4,), 0), ((2, 1, 4), (0, 1))])
def test_a_broadcast_mask_counts_every_place(solution, randn, rand, shape, dim):
    x, mask = randn(2, 3, 4), some_mask(rand, *shape) if shape[-1] > 1 else rand(*shape) < 2
    if shape[-1] == 1:
        mask[1] = False
    axes = (0, 1, 2) if dim is None else dim if isinstance(dim, tuple) else (dim,)
    expected = mean_of_the_kept(on_cpu(x), mask.cpu(), axes).float()
    assert_close(
        solution.masked_mean(x, mask, dim, keepdim=True),
        expected,
        because=f"a mask {shape} keeps entries of (2, 3, 4): count these, not the entries of the mask",
    )


@task("masked_mean")
def test_nothing_but_junk_gives_zero(solution, device):
    x = torch.tensor([[INF, NAN], [NAN, -INF]], device=device)
    mask = torch.zeros(2, 2, dtype=torch.bool, device=device)
    assert_close(solution.masked_mean(x, mask), torch.tensor(0.0), because="inf and NaN are all hidden: the mean is 0")


@task("masked_mean")
def test_the_gradient_is_shared_by_the_kept_entries(solution, randn, rand):
    x, mask = randn(3, 5, dtype=torch.float64), some_mask(rand, 3, 5)
    weights = randn(3, dtype=torch.float64)
    expected = (weights[:, None] * mask / mask.sum(1, keepdim=True)).cpu()
    assert_close(
        gradient(lambda x: solution.masked_mean(x, mask, 1), x, weights),
        expected,
        because="1 / count for a kept entry, 0 for a hidden one",
    )


@task("masked_mean")
def test_nothing_kept_gets_a_zero_gradient(solution, randn, rand):
    x, mask = randn(3, 5, dtype=torch.float64), some_mask(rand, 3, 5)
    mask[2] = False
    weights = randn(3, dtype=torch.float64)
    expected = (weights[:, None] * mask / mask.sum(1, keepdim=True).clamp(min=1)).cpu()
    assert_close(
        gradient(lambda x: solution.masked_mean(x, mask, 1), x, weights),
        expected,
        because="the third row keeps nothing: its gradient is 0, not NaN",
    )


@task("masked_mean")
def test_without_a_mask_it_is_the_plain_mean(solution, randn):
    x = randn(3, 4)
    assert_close(solution.masked_mean(x, None), on_cpu(x).mean().float(), because="mask=None keeps everything")
    assert_close(
        solution.masked_mean(x, None, 0, keepdim=True),
        on_cpu(x).mean(0, keepdim=True).float(),
        because="dim and keepdim count without a mask too",
    )


@task("masked_mean")
@pytest.mark.parametrize(("x", "mask"), [((3, 4), (4, 3)), ((3, 4), (3,)), ((3, 4), (2, 3, 4)), ((1, 4), (3, 4))])
def test_masks_that_do_not_fit_are_refused(solution, randn, rand, x, mask):
    assert_raises(
        ValueError,
        solution.masked_mean,
        randn(*x),
        rand(*mask) < 2,
        mentions=[str(x), str(mask)],
        because=f"a mask {mask} does not broadcast to {x}",
    )


@task("masked_mean")
def test_float16_totals_beyond_its_largest_number(solution, device):
    x = torch.full((2, 3000), 100.0, dtype=torch.float16, device=device)
    mask = torch.ones(3000, dtype=torch.bool, device=device)
    mask[::3] = False
    expected = torch.full((2,), 100.0, dtype=torch.float16)
    assert_close(
        solution.masked_mean(x, mask, 1),
        expected,
        because="the total is 200,000, float16 ends at 65,504: sum in float32",
    )


@task("masked_mean")
def test_bfloat16_means_are_rounded_once(solution, randn, rand):
    x, mask = (randn(20, 9) + 3).bfloat16(), some_mask(rand, 20, 9)
    expected = rounded(mean_of_the_kept(on_cpu(x), mask.cpu(), (1,)).reshape(20), torch.bfloat16)
    assert_close(
        solution.masked_mean(x, mask, 1),
        expected,
        rtol=one_rounding(torch.bfloat16),
        because="one rounding at the end",
    )


@task("masked_mean")
def test_a_mean_over_no_entries_is_zero(solution, randn, rand):
    x, mask = randn(2, 0), rand(2, 0) < 0.5
    assert_close(solution.masked_mean(x, mask, 1), torch.zeros(2), because="no entries, nothing kept")


@cost_case("masked_mean")
def masked_mean_cost(module, randn):
    x, mask = randn(32, 64), randn(32, 64) > 0
    return lambda: module.masked_mean(x, mask, 1)


# pairwise_sq_dist


@task("pairwise_sq_dist")
def test_every_pair_gets_its_squared_distance(solution, randn, dtype):
    a, b = randn(4, 3, dtype=dtype), randn(5, 3, dtype=dtype)
    u, v = on_cpu(a), on_cpu(b)
    expected = torch.tensor(
        [[sum((u[i, k] - v[j, k]).item() ** 2 for k in range(3)) for j in range(5)] for i in range(4)],
        dtype=torch.float64,
    )
    assert_close(
        solution.pairwise_sq_dist(a, b),
        expected.to(dtype),
        rtol=1e-5,
        atol=1e-12 if dtype == torch.float64 else 1e-4,
        because="entry [i, j] is the sum of the squared differences of a[i] and b[j]",
    )


@task("pairwise_sq_dist")
def test_float64_distances_have_the_digits_of_float64(solution, randn):
    a, b = randn(3, 4, dtype=torch.float64), randn(3, 4, dtype=torch.float64)
    expected = torch.cdist(on_cpu(a), on_cpu(b), compute_mode="donot_use_mm_for_euclid_dist").square()
    assert_close(solution.pairwise_sq_dist(a, b), expected, atol=1e-12, because="float64 in, float64 all the way")


@task("pairwise_sq_dist")
def test_no_distance_is_negative(solution, randn):
    a = randn(40, 16) * 30
    result = solution.pairwise_sq_dist(a, a.clone())
    assert_that(
        (result >= 0).all(),
        "every row meets itself here; rounding may move a squared distance of 0, but not below 0",
        value=result.min(),
    )


@task("pairwise_sq_dist")
def test_a_row_is_close_to_itself(solution, randn):
    a = randn(6, 5, dtype=torch.float64)
    result = solution.pairwise_sq_dist(a, a.clone())
    assert_close(result.diagonal(), torch.zeros(6, dtype=torch.float64), atol=1e-12, because="a row lies 0 from itself")


@task("pairwise_sq_dist")
@pytest.mark.parametrize(("n", "m"), [(0, 3), (3, 0), (0, 0)])
def test_no_points_give_an_empty_table(solution, randn, n, m):
    assert_equal(tuple(solution.pairwise_sq_dist(randn(n, 4), randn(m, 4)).shape), (n, m))


@task("pairwise_sq_dist")
@pytest.mark.parametrize(("a", "b"), [((3, 4), (5, 2)), ((3, 4), (5, 1)), ((3, 4), (4, 3))])
def test_points_of_different_widths_are_refused(solution, randn, a, b):
    assert_raises(
        ValueError,
        solution.pairwise_sq_dist,
        randn(*a),
        randn(*b),
        mentions=[str(a), str(b)],
        because=f"rows of {a} and {b} have no distance",
    )


@task("pairwise_sq_dist")
@pytest.mark.parametrize("half", HALF)
def test_half_precision_points_far_out_are_fine(solution, randn, half):
    a, b = (randn(4, 8) * 8 + 200).to(half), (randn(3, 8) * 8 + 200).to(half)
    expected = (on_cpu(a)[:, None] - on_cpu(b)).square().sum(-1)
    assert_close(
        solution.pairwise_sq_dist(a, b),
        rounded(expected, half),
        rtol=one_rounding(half),
        atol=1.0,
        because="|a|^2 is about 320,000 here: float16 ends at 65,504 and bfloat16 has 8 bits; use float32",
    )


@task("pairwise_sq_dist")
def test_gradients_flow_to_both_sets_of_points(solution, randn):
    a, b = randn(3, 4, dtype=torch.float64), randn(2, 4, dtype=torch.float64)
    assert_gradients_close(
        solution.pairwise_sq_dist,
        lambda a, b: (a[:, None] - b).square().sum(-1),
        [a, b],
        rtol=1e-9,
        atol=1e-11,
        because="the gradient of |a - b|^2 is 2 (a - b)",
    )


@task("pairwise_sq_dist")
def test_points_with_other_strides_are_fine(solution, randn):
    a, b = noncontiguous(randn(3, 4)), noncontiguous(randn(5, 4))
    expected = (on_cpu(a)[:, None] - on_cpu(b)).square().sum(-1).float()
    assert_close(solution.pairwise_sq_dist(a, b), expected, rtol=1e-5, atol=1e-4)


@task("pairwise_sq_dist")
def test_there_is_no_table_of_all_differences(solution, randn):
    n, m, d = 64, 48, 24
    a, b = randn(n, d), randn(m, d)
    table, inputs = n * m * a.element_size(), (n + m) * d * a.element_size()
    assert_cost(
        solution.pairwise_sq_dist,
        a,
        b,
        max_peak_bytes=4 * table + 3 * inputs,
        because="a table (N, M, D) is D times as large as the answer",
    )


@cost_case("pairwise_sq_dist")
def pairwise_cost(module, randn):
    a, b = randn(32, 16), randn(24, 16)
    return lambda: module.pairwise_sq_dist(a, b)


# chunked_logsumexp


def cut(x, *sizes):
    """Pieces of the last axis, one after the other, from a generator."""
    for piece in x.split(sizes, dim=-1):
        yield piece.clone()


@task("chunked_logsumexp")
def test_chunks_give_what_one_long_row_gives(solution, randn, dtype):
    x = randn(2, 3, 11, dtype=dtype) * 3
    expected = torch.logsumexp(on_cpu(x), -1).to(dtype)
    assert_close(
        solution.chunked_logsumexp(cut(x, 4, 1, 6)),
        expected,
        because="the cuts do not change the sum that is taken",
    )


@task("chunked_logsumexp")
def test_one_chunk_is_a_plain_logsumexp(solution, randn):
    x = randn(3, 5)
    assert_close(solution.chunked_logsumexp([x]), torch.logsumexp(on_cpu(x), -1).float())


@task("chunked_logsumexp")
def test_chunks_of_one_axis_give_one_number(solution, randn):
    x = randn(7)
    assert_close(solution.chunked_logsumexp(cut(x, 3, 4)), torch.logsumexp(on_cpu(x), -1).float())


@task("chunked_logsumexp")
@pytest.mark.parametrize("offsets", [(0.0, 1e4, -1e4), (-1e4, 0.0, 1e4), (1e4, 0.0, -1e4), (0.0, 50.0, 100.0)])
def test_the_largest_entry_may_come_at_any_time(solution, randn, offsets):
    pieces = [randn(2, 4, dtype=torch.float64) + offset for offset in offsets]
    expected = torch.logsumexp(torch.cat([on_cpu(piece) for piece in pieces], -1), -1)
    assert_close(
        solution.chunked_logsumexp(iter(pieces)),
        expected,
        because="what was summed so far must be expressed relative to the new maximum",
    )


@task("chunked_logsumexp")
def test_each_row_keeps_its_own_maximum(solution, randn):
    x = randn(3, 8, dtype=torch.float64)
    x[0, :3] += 1e3
    x[1, 3:] += 1e3
    x[2] -= 1e3
    expected = torch.logsumexp(on_cpu(x), -1)
    assert_close(solution.chunked_logsumexp(cut(x, 3, 5)), expected, because="the rows lie 1000 apart")


@task("chunked_logsumexp")
def test_the_order_and_the_cuts_do_not_matter(solution, randn, seed):
    x = randn(2, 12, dtype=torch.float64) * 5
    expected = torch.logsumexp(on_cpu(x), -1)
    for sizes in [(12,), (1,) * 12, (5, 7), (7, 5), (2, 2, 8)]:
        pieces = list(cut(x, *sizes))
        random.Random(seed).shuffle(pieces)
        assert_close(
            solution.chunked_logsumexp(pieces),
            expected,
            because=f"cut into {sizes} and shuffled, the sum is the same",
        )


@task("chunked_logsumexp")
@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("size", [0, 3])
def test_empty_chunks_and_chunks_of_minus_infinity_change_nothing(solution, randn, place, size):
    pieces = [randn(2, 4), randn(2, 5) - 200]
    expected = torch.logsumexp(torch.cat([on_cpu(piece) for piece in pieces], -1), -1).float()
    nothing = torch.full((2, size), -INF, device=pieces[0].device)
    pieces.insert(place, nothing)
    assert_close(
        solution.chunked_logsumexp(iter(pieces)),
        expected,
        because="nothing in this chunk adds to the sum" if size else "this chunk has no entries",
    )


@task("chunked_logsumexp")
@pytest.mark.parametrize("rows", [(), (2, 3)])
def test_empty_chunks_may_have_any_rows(solution, randn, rows):
    x = randn(*rows, 4)
    expected = torch.logsumexp(on_cpu(x), -1).float()
    assert_close(
        solution.chunked_logsumexp([x[..., :0], x, x[..., :0]]),
        expected,
        because="two of these chunks have no entries",
    )


@task("chunked_logsumexp")
def test_small_sums_survive_chunks_of_minus_infinity(solution, device):
    values = [(-1e4, -1e4), (-INF, -9999.0), (-1e4, -9998.0)]
    pieces = [torch.tensor([[a, a], [b, b]], device=device) for a, b in values]
    expected = torch.tensor([-1e4 + math.log(4), -1e4 + math.log(2 * (1 + math.e + math.e**2))])
    assert_close(
        solution.chunked_logsumexp(iter(pieces)),
        expected,
        because="-inf lies below -10,000: the maximum of nothing is not 0",
    )


@task("chunked_logsumexp")
@pytest.mark.parametrize("sizes", [(2, 3), (0,), (0, 2), (2, 0, 0)])
def test_nothing_but_minus_infinity_gives_minus_infinity(solution, device, sizes):
    pieces = [torch.full((2, size), -INF, device=device) for size in sizes]
    assert_close(
        solution.chunked_logsumexp(iter(pieces)),
        torch.full((2,), -INF),
        because="the sum is 0, and log(0) is -inf",
    )


@task("chunked_logsumexp")
@pytest.mark.parametrize("place", [0, 1, 2])
def test_plus_infinity_in_any_chunk_gives_plus_infinity(solution, randn, place):
    pieces = [randn(2, 3), torch.full((2, 2), -INF, device=randn(1).device), randn(2, 4)]
    pieces[place][1, 0] = INF
    expected = torch.logsumexp(torch.cat([on_cpu(piece) for piece in pieces], -1), -1).float()
    assert_close(solution.chunked_logsumexp(iter(pieces)), expected, because="a sum with inf in it is inf")


@task("chunked_logsumexp")
def test_rounding_does_not_pile_up_over_many_chunks(solution, device):
    pieces = (torch.full((1, 1), 1e5, device=device) for _ in range(400))
    assert_close(
        solution.chunked_logsumexp(pieces) - 1e5,
        torch.tensor([math.log(400)]),
        rtol=0.0,
        atol=0.02,
        because="400 chunks of the value 100,000 give 100,000 + log(400) = 100,005.99",
    )


@task("chunked_logsumexp")
@pytest.mark.parametrize(("half", "count", "size"), [(torch.float16, 70, 1000), (torch.bfloat16, 320, 1)])
def test_half_precision_chunks_are_summed_in_float32(solution, device, half, count, size):
    pieces = (torch.zeros(2, size, dtype=half, device=device) for _ in range(count))
    expected = torch.full((2,), math.log(count * size)).to(half)
    assert_close(
        solution.chunked_logsumexp(pieces),
        expected,
        rtol=one_rounding(half),
        atol=0.0,
        because="float16 ends at 65,504, and a sum in bfloat16 stops at 256 when ones are added to it",
    )


@task("chunked_logsumexp")
def test_chunks_of_other_rows_are_refused_with_both_shapes(solution, randn):
    assert_raises(
        ValueError,
        solution.chunked_logsumexp,
        [randn(3, 2, 4), randn(3, 1, 4)],
        mentions=["(3, 2)", "(3, 1)"],
        because="the second chunk has other rows than the first",
    )


@task("chunked_logsumexp")
def test_no_chunk_at_all_is_refused(solution):
    assert_raises(ValueError, solution.chunked_logsumexp, [], because="nothing says which shape the result has")
    assert_raises(ValueError, solution.chunked_logsumexp, iter(()), because="nothing says which shape the result has")


@task("chunked_logsumexp")
def test_memory_is_that_of_one_chunk(solution, randn):
    x = randn(4, 2048)

    def chunks():
        for _ in range(40):
            yield x + 1

    expected = (torch.logsumexp(on_cpu(x), -1) + 1 + math.log(40)).float()
    result = assert_cost(
        solution.chunked_logsumexp,
        chunks(),
        max_peak_bytes=8 * x.numel() * x.element_size(),
        because="40 chunks come, and none of them is needed again",
    )
    assert_close(result, expected, because="the sum over all 40 chunks")


@cost_case("chunked_logsumexp")
def chunked_cost(module, randn):
    chunks = [randn(8, 64) for _ in range(6)]
    return lambda: module.chunked_logsumexp(iter(chunks))
