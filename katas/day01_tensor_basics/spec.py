"""Day 1: what the tasks promise.

Tests of an edge (empty, other device, shapes that do not fit) look at the plain cases first. So a solution with a
mistake in them fails there in all of these tests, and the mistake is named for what it is, whatever happens at the
edges; and one whose only flaw is an edge is not taken for one with a mistake.
"""

import contextlib
import random
import warnings

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
    noncontiguous,
    same_storage,
    task,
)


@contextlib.contextmanager
def fresh_memory_is_nan():
    """Within the block torch fills uninitialized memory with NaN, True or the largest integer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on CUDA some operations warn in this mode
        torch.set_deterministic_debug_mode("warn")
        try:
            yield
        finally:
            torch.set_deterministic_debug_mode("default")


@pytest.fixture(autouse=True)
def no_lucky_zeros():
    with fresh_memory_is_nan():
        yield


def facts(tensor):
    """Where a tensor lives, what it holds, and its shape."""
    return tensor.device.type, tensor.dtype, tuple(tensor.shape)


def device_follows(call, device):
    """Call `call(where)` with inputs on `where`; returns its facts, and the device on which they should be.

    First on the meta device, which has shapes but no data. Code that reads values of its inputs cannot run
    there; for such code meta becomes the default device instead, and the inputs stay where they are.
    """
    try:
        return call("meta"), "meta"
    except (NotImplementedError, RuntimeError):
        with torch.device("meta"):
            return call(device), device.type


# scalar


def one_number(tensor):
    """The tensor, after a look at its shape."""
    assert_equal(tuple(tensor.shape), (), because="one number has no axis: its shape is (), not (1,)")
    return tensor


@task("scalar")
def test_scalar_has_no_axes(solution, randint):
    one_number(solution.scalar(int(randint(2, 10, ()))))


@task("scalar")
def test_scalar_holds_the_number(solution, randint):
    number = int(randint(2, 10, ())) + 0.25
    expected = torch.full((), number, dtype=torch.float32)
    result = one_number(solution.scalar(number))
    assert_close(result, expected, because=f"scalar({number}) holds {number}")


@task("scalar")
def test_scalar_is_float32_even_from_an_int(solution, randint, device):
    number = int(randint(2, 10, ()))
    expected = torch.full((), number, dtype=torch.float32, device=device)
    result = one_number(solution.scalar(number, device=device))
    assert_close(result, expected, because="dtype is float32 unless the caller says otherwise")


@task("scalar")
@pytest.mark.parametrize("wanted", [torch.int64, torch.float16, torch.bool])
def test_scalar_has_the_dtype_that_was_asked_for(solution, wanted):
    expected = torch.full((), 3, dtype=wanted)
    result = one_number(solution.scalar(3, dtype=wanted))
    assert_close(result, expected, because=f"dtype={wanted} was asked for")


@task("scalar")
def test_scalar_lives_on_the_device_that_was_asked_for(solution, randint):
    number = int(randint(2, 10, ()))
    result = one_number(solution.scalar(number, dtype=torch.float16, device="meta"))
    assert_equal(facts(result), ("meta", torch.float16, ()), because="device and dtype come from the caller")


# counting_table


def plain_table(solution):
    expected = torch.tensor([[0, 1, 2], [3, 4, 5]])
    assert_equal(solution.counting_table(2, 3), expected, because="out[i, j] = i*w + j")


@task("counting_table")
@pytest.mark.parametrize("h, w", [(3, 5), (5, 3), (1, 4), (4, 1), (1, 1), (4, 4)])
def test_counting_table_counts_row_by_row(solution, device, h, w):
    expected = torch.from_numpy(np.arange(h * w, dtype=np.int64).reshape(h, w)).to(device)
    assert_equal(solution.counting_table(h, w, device=device), expected, because="out[i, j] = i*w + j")


@task("counting_table")
@pytest.mark.parametrize("h, w", [(3, 5), (1, 4)])
@pytest.mark.parametrize("sign", [1, -1])
def test_counting_table_begins_at_start(solution, randint, h, w, sign):
    start = sign * int(randint(2, 50, ()))
    expected = torch.tensor([[start + i * w + j for j in range(w)] for i in range(h)])
    assert_equal(solution.counting_table(h, w, start=start), expected, because=f"the table begins at start={start}")


@task("counting_table")
@pytest.mark.parametrize("h, w", [(0, 3), (3, 0), (0, 0)])
def test_counting_table_may_be_empty(solution, h, w):
    plain_table(solution)
    result = solution.counting_table(h, w, start=7)
    assert_equal(facts(result), ("cpu", torch.int64, (h, w)), because="an empty table still has its shape and dtype")


@task("counting_table")
def test_counting_table_lives_on_the_device_that_was_asked_for(solution):
    plain_table(solution)
    result = solution.counting_table(2, 3, start=1, device="meta")
    assert_equal(facts(result), ("meta", torch.int64, (2, 3)), because="device comes from the caller")


# zero_rows


def rows_zeroed(x, keep):
    out = torch.zeros(x.shape, dtype=x.dtype)
    for n, wanted in enumerate(keep.tolist()):
        if wanted:
            out[n] = x[n].cpu()
    return out


def some_rows(n, randperm):
    """A mask (n,) with both values in it, at random places."""
    keep = randperm(n) < (n + 1) // 2
    assert keep.any() and not keep.all()
    return keep


def plain_rows(solution, randn, randperm):
    x, keep = randn(4, 4), some_rows(4, randperm)
    x[~keep] = float("nan")
    expected = rows_zeroed(x, keep)
    assert_equal(solution.zero_rows(x, keep), expected, because="rows with keep == False are zero, the others as in x")


@task("zero_rows")
def test_zero_rows_keeps_some_rows_and_zeroes_the_others(solution, randn, randperm):
    x, keep = randn(5, 3), some_rows(5, randperm)
    expected = rows_zeroed(x, keep)
    assert_equal(solution.zero_rows(x, keep), expected, because="rows with keep == False are zero, the others as in x")


@task("zero_rows")
def test_zero_rows_means_rows_even_in_a_square(solution, randn, randperm):
    x, keep = randn(4, 4), some_rows(4, randperm)
    expected = rows_zeroed(x, keep)
    assert_equal(solution.zero_rows(x, keep), expected, because="keep belongs to axis 0, the rows, not to the columns")


@task("zero_rows")
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_zero_rows_wipes_nan_and_infinity(solution, randn, randperm, poison):
    x, keep = randn(5, 3), some_rows(5, randperm)
    x[~keep] = poison
    x[:, 1] = poison
    expected = rows_zeroed(x, keep)
    assert_equal(
        solution.zero_rows(x, keep),
        expected,
        because=f"a dropped row is exactly 0, whatever it held: {poison}",
    )


@task("zero_rows")
@pytest.mark.parametrize("kind", [torch.int64, torch.bfloat16])
def test_zero_rows_keeps_the_dtype(solution, randint, randperm, kind):
    x, keep = randint(1, 9, (5, 3)).to(kind), some_rows(5, randperm)
    expected = rows_zeroed(x, keep)
    assert_equal(solution.zero_rows(x, keep), expected, because="the result has the dtype of x")


@task("zero_rows")
def test_zero_rows_takes_what_is_not_contiguous(solution, randn, randperm):
    x, keep = noncontiguous(randn(5, 3)), some_rows(5, randperm)
    expected = rows_zeroed(x, keep)
    assert_equal(solution.zero_rows(x, keep), expected)


@task("zero_rows")
@pytest.mark.parametrize("n", [0, 1, 4])
def test_zero_rows_keeps_everything_or_nothing(solution, randn, n):
    x = randn(n, 3)
    nothing = torch.zeros(n, dtype=torch.bool, device=x.device)
    expected = x.clone()
    assert_equal(solution.zero_rows(x, nothing), torch.zeros(n, 3), because="nothing is kept")
    assert_equal(solution.zero_rows(x, ~nothing), expected, because="everything is kept")


@task("zero_rows")
def test_zero_rows_returns_memory_of_its_own(solution, randn, randperm):
    x, keep = randn(5, 3), some_rows(5, randperm)
    expected = rows_zeroed(x, keep)
    result = solution.zero_rows(x, keep)
    assert_equal(result, expected, because="rows with keep == False are zero, the others as in x")
    assert_that(not same_storage(result, x), "the result must not share memory with x", value="shared")
    result = solution.zero_rows(x, torch.ones_like(keep))
    assert_that(not same_storage(result, x), "the result is a copy also when all rows are kept", value="shared")


@task("zero_rows")
@pytest.mark.parametrize("length", [1, 3, 6])
def test_zero_rows_refuses_a_mask_of_another_length(solution, randn, randperm, length):
    plain_rows(solution, randn, randperm)
    keep = torch.ones(length, dtype=torch.bool)
    assert_raises(ValueError, solution.zero_rows, randn(5, 3), keep, mentions=["(5, 3)", f"({length},)"])


@task("zero_rows")
def test_zero_rows_refuses_a_mask_with_two_axes(solution, randn, randperm):
    plain_rows(solution, randn, randperm)
    x = randn(5, 3)
    keep = torch.ones(5, 1, dtype=torch.bool, device=x.device)
    assert_raises(ValueError, solution.zero_rows, x, keep, mentions=["(5, 3)", "(5, 1)"])


# weighted_sum


def eighths(randint, *shape):
    """Random multiples of 1/8 in float32: sums and products of a few of them are exact, in any order."""
    return randint(-40, 41, shape).float() / 8


def summed(weights, rows):
    total = np.zeros(rows.shape[1])
    for weight, row in zip(weights.cpu().double().numpy(), rows.cpu().double().numpy(), strict=True):
        total += weight * row
    return torch.from_numpy(total).to(rows.dtype)


def plain_sum(solution, randint):
    for weights, rows in (
        (eighths(randint, 4), eighths(randint, 4, 4)),
        (randint(1, 5, (4,)), eighths(randint, 4, 4)),
        (randint(1, 5, (4,)).float(), randint(1, 5, (4, 4)).half()),
    ):
        expected = summed(weights, rows)
        result = solution.weighted_sum(weights, rows)
        assert_close(result, expected, because="the sum over n of weights[n] * rows[n], in the dtype of rows")


@task("weighted_sum")
def test_weighted_sum_adds_the_weighted_rows(solution, randint):
    weights, rows = eighths(randint, 5), eighths(randint, 5, 3)
    expected = summed(weights, rows)
    assert_close(solution.weighted_sum(weights, rows), expected, because="the sum over n of weights[n] * rows[n]")


@task("weighted_sum")
def test_weighted_sum_runs_over_the_rows_even_in_a_square(solution, randint):
    weights, rows = eighths(randint, 4), eighths(randint, 4, 4)
    expected = summed(weights, rows)
    assert_close(solution.weighted_sum(weights, rows), expected, because="a weight belongs to a row, not to a column")


@task("weighted_sum")
def test_weighted_sum_takes_integer_weights(solution, randint):
    weights, rows = randint(-4, 5, (5,)), eighths(randint, 5, 3)
    expected = summed(weights, rows)
    assert_close(solution.weighted_sum(weights, rows), expected, because="int64 weights, float32 rows, float32 result")


@task("weighted_sum")
def test_weighted_sum_takes_boolean_weights(solution, randint, randperm):
    weights, rows = some_rows(5, randperm), eighths(randint, 5, 3)
    expected = summed(weights, rows)
    assert_close(solution.weighted_sum(weights, rows), expected, because="True counts as 1 and False as 0")


@task("weighted_sum")
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_weighted_sum_has_the_dtype_of_the_rows(solution, randint, device, kind):
    if device.type == "mps" and kind == torch.float64:
        pytest.skip("mps has no float64")
    weights, rows = randint(-4, 5, (5,)).float(), randint(-4, 5, (5, 3)).to(kind)
    expected = summed(weights, rows)
    assert_close(solution.weighted_sum(weights, rows), expected, because="the result has the dtype of rows")


@task("weighted_sum")
def test_weighted_sum_keeps_the_precision_of_the_rows(solution, randn, device):
    if device.type == "mps":
        pytest.skip("mps has no float64")
    weights, rows = randn(5, dtype=torch.float64), randn(5, 3, dtype=torch.float64)
    expected = summed(weights, rows)
    assert_close(solution.weighted_sum(weights, rows), expected, because="float64 stays float64 all the way")


@task("weighted_sum")
def test_weighted_sum_of_nothing_is_zero(solution, randint, randn):
    plain_sum(solution, randint)
    result = solution.weighted_sum(randn(0), randn(0, 3))
    assert_close(result, torch.zeros(3), because="N = 0 adds nothing")


@task("weighted_sum")
@pytest.mark.parametrize("shape", [(3,), (1,), (5, 1), (1, 5), (2, 5), ()])
def test_weighted_sum_refuses_weights_that_do_not_fit(solution, randint, randn, shape):
    plain_sum(solution, randint)
    mention = str(shape)
    assert_raises(ValueError, solution.weighted_sum, randn(*shape), randn(5, 3), mentions=["(5, 3)", mention])


# make_grid


def plain_grid(solution):
    expected = torch.tensor([[[0, 0], [0, 1], [0, 2]], [[1, 0], [1, 1], [1, 2]]], dtype=torch.float32)
    assert_equal(solution.make_grid(2, 3), expected, because="out[i, j] = (i, j), in float32")


@task("make_grid")
@pytest.mark.parametrize("h, w", [(3, 5), (5, 2), (1, 4), (4, 1), (3, 3)])
def test_make_grid_has_the_coordinates(solution, device, h, w):
    expected = torch.from_numpy(np.indices((h, w)).transpose(1, 2, 0).astype(np.float32)).to(device)
    assert_equal(solution.make_grid(h, w, device=device), expected, because="out[i, j] = (i, j), in float32")


@task("make_grid")
@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.bfloat16])
def test_make_grid_has_the_dtype_that_was_asked_for(solution, device, kind):
    plain_grid(solution)
    expected = torch.from_numpy(np.indices((4, 3)).transpose(1, 2, 0).copy()).to(device=device, dtype=kind)
    assert_equal(solution.make_grid(4, 3, dtype=kind, device=device), expected, because=f"dtype={kind} was asked for")


@task("make_grid")
@pytest.mark.parametrize("h, w", [(0, 3), (3, 0), (0, 0)])
def test_make_grid_may_be_empty(solution, h, w):
    plain_grid(solution)
    result = solution.make_grid(h, w)
    assert_equal(tuple(result.shape), (h, w, 2), because="an empty grid still has its shape")


@task("make_grid")
def test_make_grid_lives_on_the_device_that_was_asked_for(solution):
    plain_grid(solution)
    result = solution.make_grid(2, 3, dtype=torch.float16, device="meta")
    assert_equal(facts(result), ("meta", torch.float16, (2, 3, 2)), because="device and dtype come from the caller")


@task("make_grid")
def test_make_grid_allocates_at_most_twice_its_size(solution, device):
    plain_grid(solution)
    expected = torch.from_numpy(np.indices((30, 40)).transpose(1, 2, 0).astype(np.float32))
    result = assert_cost(
        solution.make_grid, 30, 40, device=device, max_new_bytes=2 * 30 * 40 * 2 * 4,
        because="the result, and at most as much again: broadcasting needs no full-size helpers",
    )  # fmt: skip
    assert_equal(result, expected)


@cost_case("make_grid")
def make_grid_cost(module, device):
    return lambda: module.make_grid(64, 48, device=device)


# sequence_mask


def looped_mask(lengths, max_len):
    rows = [[t < length for t in range(max_len)] for length in lengths]
    return torch.tensor(rows, dtype=torch.bool).reshape(len(lengths), max_len)


def plain_mask(solution, device):
    lengths = torch.tensor([2, 0, 3], device=device)
    expected = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1]], dtype=torch.bool)
    assert_equal(solution.sequence_mask(lengths), expected, because="True inside the sequence, False behind it")


@task("sequence_mask")
@pytest.mark.parametrize("kind", [torch.int64, torch.int32])
def test_sequence_mask_is_as_long_as_the_longest(solution, device, randperm, kind):
    lengths = (randperm(4) + 2).to(kind)
    expected = looped_mask(lengths.tolist(), 5).to(device)
    assert_equal(solution.sequence_mask(lengths), expected, because="True inside the sequence, False behind it")


@task("sequence_mask")
def test_sequence_mask_takes_length_zero(solution, device, randperm):
    lengths = randperm(4)
    expected = looped_mask(lengths.tolist(), 3).to(device)
    assert_equal(solution.sequence_mask(lengths), expected, because="a sequence of length 0 has no True")


def check_width(solution, lengths, max_len):
    expected = looped_mask(lengths.tolist(), max_len).to(lengths.device)
    result = solution.sequence_mask(lengths, max_len)
    assert_equal(result, expected, because=f"T is what was asked for: max_len={max_len}")


def all_widths(solution, device):
    plain_mask(solution, device)
    for max_len in (4, 1, 0):
        check_width(solution, torch.tensor([3, 2], device=device), max_len)


@task("sequence_mask")
@pytest.mark.parametrize("max_len", [6, 9])
def test_sequence_mask_can_be_wider_than_the_longest(solution, randperm, max_len):
    check_width(solution, randperm(6), max_len)


@task("sequence_mask")
@pytest.mark.parametrize("max_len", [5, 3, 1])
def test_sequence_mask_can_be_narrower_than_the_longest(solution, randperm, max_len):
    lengths = randperm(6) + 1
    expected = [looped_mask(lengths.tolist(), width).to(lengths.device) for width in (8, max_len)]
    assert_equal(solution.sequence_mask(lengths, 8), expected[0], because="T is what was asked for: max_len=8")
    assert_equal(solution.sequence_mask(lengths, max_len), expected[1], because=f"max_len={max_len} cuts rows off")


@task("sequence_mask")
def test_sequence_mask_can_have_width_zero(solution, device, randperm):
    plain_mask(solution, device)
    lengths = randperm(3) + 2
    check_width(solution, lengths, 1)
    result = solution.sequence_mask(lengths, max_len=0)
    assert_equal(facts(result)[1:], (torch.bool, (3, 0)), because="max_len=0 is a width like any other")


@task("sequence_mask")
def test_sequence_mask_of_empty_sequences_only(solution, device):
    plain_mask(solution, device)
    result = solution.sequence_mask(torch.zeros(3, dtype=torch.int64, device=device))
    assert_equal(tuple(result.shape), (3, 0), because="the longest sequence has length 0")


@task("sequence_mask")
def test_sequence_mask_of_an_empty_batch(solution, device):
    all_widths(solution, device)
    lengths = torch.zeros(0, dtype=torch.int64, device=device)
    result = solution.sequence_mask(lengths, 4)
    assert_equal((result.dtype, tuple(result.shape)), (torch.bool, (0, 4)), because="B = 0 with max_len=4")
    result = solution.sequence_mask(lengths)
    assert_equal((result.dtype, tuple(result.shape)), (torch.bool, (0, 0)), because="B = 0 without max_len")


@task("sequence_mask")
def test_sequence_mask_lives_where_the_lengths_live(solution, device):
    all_widths(solution, device)

    def call(where):
        return facts(solution.sequence_mask(torch.ones(3, dtype=torch.int64, device=where), 4))

    found, where = device_follows(call, device)
    assert_equal(found, (where, torch.bool, (3, 4)), because="the mask lives on the device of lengths")


# split_heads


def looped_split(x, n_heads):
    x = x.cpu().numpy()
    *lead, T, width = x.shape
    head_width = width // n_heads
    out = np.zeros((*lead, n_heads, T, head_width), dtype=x.dtype)
    for h in range(n_heads):
        for t in range(T):
            for d in range(head_width):
                out[..., h, t, d] = x[..., t, h * head_width + d]
    return torch.from_numpy(out)


FORMULA = "out[..., h, t, d] is x[..., t, h*Dh + d]"


def check_split(solution, x, n_heads):
    expected = looped_split(x, n_heads)
    result = solution.split_heads(x, n_heads)
    assert_equal(result, expected, because=FORMULA)
    return result


@task("split_heads")
@pytest.mark.parametrize("lead", [(2,), (), (2, 5)])
def test_split_heads_follows_the_formula(solution, randn, lead):
    for axes in ((3,), lead):
        check_split(solution, randn(*axes, 4, 3 * 6), 3)


@task("split_heads")
def test_split_heads_follows_the_formula_when_all_sizes_are_equal(solution, randn):
    check_split(solution, randn(3, 3, 9), 3)


@task("split_heads")
@pytest.mark.parametrize("n_heads", [1, 6])
def test_split_heads_takes_one_head_and_heads_of_width_one(solution, randn, n_heads):
    check_split(solution, randn(2, 4, 12), 3)
    check_split(solution, randn(2, 4, 6), n_heads)


@task("split_heads")
@pytest.mark.parametrize("shape", [(2, 4, 12), (4, 12), (2, 5, 4, 12)])
def test_split_heads_is_a_view(solution, randn, shape):
    check_split(solution, randn(3, 4, 12), 3)
    x = randn(*shape)
    shared = same_storage(solution.split_heads(x, 3), x)
    assert_that(shared, "the heads must lie in the memory of x", value="not the memory of x")


@task("split_heads")
def test_split_heads_is_a_view_even_of_strided_memory(solution, randn):
    contiguous, other_way_round = randn(2, 4, 12), randn(12, 4, 2).permute(2, 1, 0)
    for x in (contiguous, noncontiguous(contiguous), other_way_round, randn(2, 9, 12)[:, 3:7]):
        result = check_split(solution, x, 3)
        assert_that(same_storage(result, x), "the heads must lie in the memory of x", value="not the memory of x")


@task("split_heads")
def test_split_heads_copies_not_a_byte(solution, randn):
    x = randn(8, 16, 12)
    check_split(solution, x, 3)
    assert_cost(solution.split_heads, x, 3, max_new_bytes=0, because="splitting and swapping axes are free")


@task("split_heads")
@pytest.mark.parametrize("shape", [(0, 4, 12), (2, 0, 12), (2, 4, 0)])
def test_split_heads_of_an_empty_tensor(solution, randn, shape):
    check_split(solution, randn(3, 4, 12), 3)
    result = solution.split_heads(randn(*shape), 3)
    expected = (shape[0], 3, shape[1], shape[2] // 3)
    assert_equal(tuple(result.shape), expected, because="a size of 0 is a size like any other")


def plain_split(solution, randn):
    for shape in ((3, 4, 12), (2, 5, 4, 12)):
        x = randn(*shape)
        result = check_split(solution, x, 3)
        assert_that(same_storage(result, x), "the heads must lie in the memory of x", value="not the memory of x")


@task("split_heads")
@pytest.mark.parametrize("n_heads", [4, 12])
def test_split_heads_refuses_a_width_that_does_not_divide(solution, randn, n_heads):
    plain_split(solution, randn)
    x = randn(2, 4, 6)
    assert_raises(ValueError, solution.split_heads, x, n_heads, mentions=["(2, 4, 6)", str(n_heads)])


@task("split_heads")
@pytest.mark.parametrize("n_heads", [0, -1, -3])
def test_split_heads_refuses_less_than_one_head(solution, randn, n_heads):
    plain_split(solution, randn)
    x = randn(2, 4, 6)
    assert_raises(ValueError, solution.split_heads, x, n_heads, mentions=["(2, 4, 6)", str(n_heads)])


@cost_case("split_heads")
def split_heads_cost(module, randn):
    x = randn(8, 32, 64)
    return lambda: module.split_heads(x, 8)


# merge_heads


def looped_merge(x):
    x = x.cpu().numpy()
    *lead, n_heads, T, head_width = x.shape
    out = np.zeros((*lead, T, n_heads * head_width), dtype=x.dtype)
    for h in range(n_heads):
        for t in range(T):
            for d in range(head_width):
                out[..., t, h * head_width + d] = x[..., h, t, d]
    return torch.from_numpy(out)


JOINED = "out[..., t, h*Dh + d] is x[..., h, t, d]"


def check_merge(solution, x):
    expected = looped_merge(x)
    assert_equal(solution.merge_heads(x), expected, because=JOINED)


@task("merge_heads")
@pytest.mark.parametrize("lead", [(2,), (), (2, 5)])
def test_merge_heads_follows_the_formula(solution, randn, lead):
    for axes in ((7,), lead):
        check_merge(solution, randn(*axes, 3, 4, 6))


@task("merge_heads")
def test_merge_heads_follows_the_formula_when_all_sizes_are_equal(solution, randn):
    check_merge(solution, randn(3, 3, 3, 3))


@task("merge_heads")
def test_merge_heads_takes_any_strides(solution, randn):
    contiguous, other_way_round = randn(2, 3, 4, 6), randn(6, 4, 3, 2).permute(3, 2, 1, 0)
    for x in (contiguous, noncontiguous(contiguous), other_way_round, randn(2, 3, 1, 6).expand(2, 3, 4, 6)):
        check_merge(solution, x)


@task("merge_heads")
@pytest.mark.parametrize("lead", [(2,), (), (2, 5)])
def test_merge_heads_undoes_a_split(solution, randn, lead):
    for axes in ((7,), lead):
        x = randn(*axes, 4, 18)
        heads = x.reshape(*axes, 4, 3, 6).transpose(-3, -2)
        expected = x.clone()
        assert_equal(solution.merge_heads(heads), expected, because="what split_heads cut is put together as it was")


@task("merge_heads")
@pytest.mark.parametrize("shape", [(0, 3, 4, 6), (2, 3, 0, 6)])
def test_merge_heads_of_an_empty_tensor(solution, randn, shape):
    check_merge(solution, randn(2, 3, 4, 6))
    result = solution.merge_heads(randn(*shape))
    assert_equal(tuple(result.shape), (shape[0], shape[2], 18), because="a size of 0 is a size like any other")


@task("merge_heads")
def test_merge_heads_copies_at_most_once(solution, randn):
    x = randn(4, 3, 8, 6)
    check_merge(solution, x)
    once = 4 * x.numel()
    assert_cost(solution.merge_heads, x, max_new_bytes=once, because="at most one tensor of the size of x is needed")


@cost_case("merge_heads")
def merge_heads_cost(module, randn):
    x = randn(8, 4, 32, 16)
    return lambda: module.merge_heads(x)


# gather_last


def looped_last(x, lengths):
    return torch.stack([x[b, length - 1] for b, length in enumerate(lengths.tolist())]).cpu()


LAST = "out[b] is x[b, lengths[b] - 1]"


def plain_last(solution, randn, randperm):
    x, lengths = randn(4, 6, 3), randperm(4) + 2
    x[:, 0] = float("nan")
    expected = looped_last(x, lengths)
    result = solution.gather_last(x.requires_grad_(), lengths)
    assert_equal(result, expected.detach(), because=LAST)
    assert_that(result.requires_grad, "the gradient must find its way back to x", value="no gradient")


@task("gather_last")
def test_gather_last_takes_the_last_valid_row(solution, randn, randperm):
    x, lengths = randn(4, 6, 3), randperm(4) + 1
    expected = looped_last(x, lengths)
    assert_equal(solution.gather_last(x, lengths), expected, because=LAST)


@task("gather_last")
def test_gather_last_takes_full_sequences(solution, randn, randperm):
    x, lengths = randn(4, 4, 4), randperm(4) + 1
    expected = looped_last(x, lengths)
    assert_equal(solution.gather_last(x, lengths), expected, because=f"{LAST}, also where lengths[b] is T")


@task("gather_last")
def test_gather_last_takes_a_batch_of_one(solution, randn, randint):
    x, lengths = randn(1, 6, 3), randint(1, 6, (1,))
    expected = looped_last(x, lengths)
    assert_equal(solution.gather_last(x, lengths), expected, because=LAST)


@task("gather_last")
def test_gather_last_takes_any_strides(solution, randn, randperm):
    lengths = randperm(4) + 1
    for x in (noncontiguous(randn(4, 6, 3)), randn(3, 6, 4).permute(2, 1, 0), randn(4, 9, 3)[:, 2:8]):
        expected = looped_last(x, lengths)
        assert_equal(solution.gather_last(x, lengths), expected, because=LAST)


@task("gather_last")
@pytest.mark.parametrize("kind", [torch.int64, torch.bfloat16, torch.bool])
def test_gather_last_keeps_the_dtype(solution, randint, randperm, kind):
    x, lengths = randint(0, 9, (4, 6, 3)).to(kind), randperm(4) + 1
    expected = looped_last(x, lengths)
    assert_equal(solution.gather_last(x, lengths), expected, because="the result has the dtype of x")


@task("gather_last")
def test_gather_last_does_not_look_at_other_rows(solution, randn, randperm):
    x, lengths = randn(4, 6, 3), randperm(4) + 2
    expected = looped_last(x, lengths)
    x[:, 0] = float("nan")
    assert_equal(solution.gather_last(x, lengths), expected, because="NaN in the other rows must not leak")


@task("gather_last")
def test_gather_last_sends_the_gradient_to_one_row_each(solution, randn, randperm):
    x, lengths = randn(4, 6, 3), randperm(4) + 1
    assert_gradients_close(
        solution.gather_last,
        lambda x, lengths: torch.stack([x[b, length - 1] for b, length in enumerate(lengths.tolist())]),
        [x, lengths],
        because="only the chosen row of each sequence has a gradient",
    )


@task("gather_last")
def test_gather_last_returns_memory_of_its_own(solution, randn, randperm):
    x = randn(4, 6, 3)
    for lengths in (randperm(4) + 1, torch.full((4,), 6, device=x.device)):
        expected = looped_last(x, lengths)
        result = solution.gather_last(x, lengths)
        assert_equal(result, expected, because=LAST)
        assert_that(not same_storage(result, x), "writing into the result would change x", value="shared")


@task("gather_last")
def test_gather_last_of_an_empty_batch(solution, randn, randint):
    result = solution.gather_last(randn(0, 6, 3), randint(1, 6, (0,)))
    assert_equal(tuple(result.shape), (0, 3), because="no sequences, no rows")


@task("gather_last")
@pytest.mark.parametrize("shape", [(1,), (3,), (6,), (4, 1), (4, 6), ()])
def test_gather_last_refuses_lengths_that_do_not_fit(solution, randn, randint, randperm, shape):
    plain_last(solution, randn, randperm)
    lengths = randint(1, 3, shape)
    assert_raises(
        ValueError, solution.gather_last, randn(4, 6, 3), lengths, mentions=["(4, 6, 3)", str(shape)],
        because="lengths that do not fit would be broadcast by the indexing, or fail with a message about it",
    )  # fmt: skip


# pad_stack


def padded(seqs, value):
    stack = torch.nn.utils.rnn.pad_sequence([seq.cpu() for seq in seqs], batch_first=True, padding_value=value)
    return stack, torch.tensor([seq.shape[0] for seq in seqs])


def plain_stack(solution, randn):
    seqs = [randn(2, 3), randn(5, 3), randn(1, 3)]
    expected = padded(seqs, 0)
    assert_close(solution.pad_stack(seqs), expected, because="each sequence, then zeros; and how long each is")


def sound_stack(solution, randn, randint):
    plain_stack(solution, randn)
    seqs = [randint(0, 9, (length, 40)) for length in (2, 50, 1)]
    expected = padded(seqs, -1)
    assert_close(solution.pad_stack(seqs, -1), expected, because="filled up with -1, in the dtype of the sequences")
    once = 3 * 50 * 40 * 8 + 500
    assert_cost(solution.pad_stack, seqs, -1, max_new_bytes=once, because="one allocation of the stack's size")


@task("pad_stack")
@pytest.mark.parametrize("rest", [(3,), (), (3, 5)])
def test_pad_stack_fills_up_with_zeros(solution, randn, randperm, rest):
    seqs = [randn(length, *rest) for length in (randperm(4) + 1).tolist()]
    expected = padded(seqs, 0)
    assert_close(solution.pad_stack(seqs), expected, because="each sequence, then zeros; and how long each is")


@task("pad_stack")
@pytest.mark.parametrize("value", [-1, 0.5, float("-inf")])
def test_pad_stack_fills_up_with_the_value(solution, randn, randperm, value):
    seqs = [randn(length, 3) for length in (randperm(4) + 1).tolist()]
    expected = padded(seqs, value)
    assert_close(solution.pad_stack(seqs, value), expected, because=f"the filling is value={value}")


@task("pad_stack")
@pytest.mark.parametrize("kind", [torch.int64, torch.bfloat16, torch.bool])
def test_pad_stack_keeps_the_dtype(solution, randint, randperm, kind, randn):
    plain_stack(solution, randn)
    seqs = [randint(0, 9, (length, 3)).to(kind) for length in (randperm(4) + 1).tolist()]
    expected = padded(seqs, 1)
    assert_close(solution.pad_stack(seqs, 1), expected, because="the stack has the dtype of the sequences")


@task("pad_stack")
def test_pad_stack_takes_empty_sequences(solution, randn, randperm):
    plain_stack(solution, randn)
    seqs = [randn(length, 3) for length in randperm(4).tolist()]
    expected = padded(seqs, 0)
    assert_close(solution.pad_stack(seqs), expected, because="a sequence of length 0 is a row of filling")


@task("pad_stack")
def test_pad_stack_of_empty_sequences_only(solution, randn):
    plain_stack(solution, randn)
    stack, lengths = solution.pad_stack([randn(0, 3), randn(0, 3)])
    assert_equal((tuple(stack.shape), lengths.tolist()), ((2, 0, 3), [0, 0]), because="the longest has length 0")


@task("pad_stack")
def test_pad_stack_takes_strided_sequences(solution, randn, randperm):
    seqs = [noncontiguous(randn(length, 3)) for length in (randperm(4) + 1).tolist()] + [randn(1, 3).expand(6, 3)]
    expected = padded(seqs, 0)
    assert_close(solution.pad_stack(seqs), expected)


@task("pad_stack")
def test_pad_stack_returns_memory_of_its_own(solution, randn):
    plain_stack(solution, randn)
    seqs = [randn(4, 3)]
    expected = padded(seqs, 0)
    result = solution.pad_stack(seqs)
    assert_close(result, expected, because="a batch of one")
    assert_that(
        not same_storage(result[0], seqs[0]),
        "the stack must not share memory with a sequence",
        value="shared",
    )


@task("pad_stack")
def test_pad_stack_lives_where_the_sequences_live(solution, device, randn, randint):
    sound_stack(solution, randn, randint)

    def call(where):
        stack, lengths = solution.pad_stack([torch.ones(2, 3, device=where), torch.ones(4, 3, device=where)])
        return facts(stack), facts(lengths)

    found, where = device_follows(call, device)
    expected = (where, torch.float32, (2, 4, 3)), (where, torch.int64, (2,))
    assert_equal(found, expected, because="stack and lengths live on the device of the sequences")


@task("pad_stack")
def test_pad_stack_allocates_only_the_stack(solution, randn, randperm):
    plain_stack(solution, randn)
    seqs = [randn(length, 8) for length in (10 * (randperm(6) + 1)).tolist()]
    expected = padded(seqs, 0)
    result = assert_cost(
        solution.pad_stack, seqs, max_new_bytes=6 * 60 * 8 * 4 + 6 * 64 + 256,
        because="one allocation of the stack's size; the sequences are written into it",
    )  # fmt: skip
    assert_close(result, expected)


@task("pad_stack")
def test_pad_stack_refuses_an_empty_list(solution, randn, randint):
    sound_stack(solution, randn, randint)
    assert_raises(ValueError, solution.pad_stack, [], because="without a sequence there is no dtype and no shape")


@task("pad_stack")
@pytest.mark.parametrize("other", [(2, 4), (2, 1), (2,), (2, 3, 1)])
def test_pad_stack_refuses_trailing_axes_that_differ(solution, randn, other, randint):
    sound_stack(solution, randn, randint)
    seqs = [randn(5, 3), randn(1, 3), randn(*other)]
    assert_raises(ValueError, solution.pad_stack, seqs, mentions=["3)", str(other)])


@cost_case("pad_stack")
def pad_stack_cost(module, randn):
    seqs = [randn(length, 16) for length in (5, 20, 1, 12)]
    return lambda: module.pad_stack(seqs)


# sliding_windows


def windows(x, size, step=1):
    view = np.lib.stride_tricks.sliding_window_view(x.detach().cpu().numpy(), size, axis=1)  # (B, N, ..., size)
    return torch.from_numpy(np.moveaxis(view, -1, 2)[:, ::step].copy())


WINDOW = "out[:, n, i] is x[:, n*step + i]"


def plain_windows(solution, randn):
    """Windows over three layouts, as views."""
    for x in (randn(2, 9, 3), randn(9, 2, 3).transpose(0, 1), randn(3, 11, 3)[1:, 2:]):
        expected = windows(x, 4, 2)
        result = solution.sliding_windows(x, 4, 2)
        assert_equal(result, expected, because=WINDOW)
        assert_that(same_storage(result, x), "the windows must lie in the memory of x", value="not the memory of x")


@task("sliding_windows")
@pytest.mark.parametrize("rest", [(3,), (), (3, 5)])
def test_sliding_windows_move_by_one(solution, randn, rest):
    x = randn(2, 7, *rest)
    expected = windows(x, 4)
    assert_equal(solution.sliding_windows(x, 4), expected, because=WINDOW)


@task("sliding_windows")
@pytest.mark.parametrize("size, step", [(2, 2), (3, 2), (4, 3), (2, 5), (1, 3), (3, 3)])
def test_sliding_windows_move_by_step(solution, randn, size, step):
    x = randn(2, 10, 3)
    expected = windows(x, size, step)
    assert_equal(solution.sliding_windows(x, size, step), expected, because=WINDOW)


@task("sliding_windows")
@pytest.mark.parametrize("size, step", [(1, 1), (1, 7), (7, 1), (7, 3), (6, 1), (5, 2)])
def test_sliding_windows_at_the_edges(solution, randn, size, step):
    x = randn(2, 7)
    expected = windows(x, size, step)
    assert_equal(solution.sliding_windows(x, size, step), expected, because=f"{WINDOW}, and only whole windows count")


@task("sliding_windows")
@pytest.mark.parametrize("size, step", [(8, 1), (9, 1), (30, 2), (9, 3)])
def test_sliding_windows_longer_than_the_sequence(solution, randn, size, step):
    plain_windows(solution, randn)
    result = solution.sliding_windows(randn(2, 7, 3), size, step)
    assert_equal(tuple(result.shape), (2, 0, size, 3), because="no whole window fits: N = 0")


@task("sliding_windows")
def test_sliding_windows_of_an_empty_batch(solution, randn):
    plain_windows(solution, randn)
    result = solution.sliding_windows(randn(0, 7, 3), 4, 2)
    assert_equal(tuple(result.shape), (0, 2, 4, 3), because="B = 0 is a batch like any other")


@task("sliding_windows")
def test_sliding_windows_of_a_transposed_tensor(solution, randn):
    for x in (randn(7, 2, 3).transpose(0, 1), randn(3, 7, 2).permute(2, 1, 0), noncontiguous(randn(2, 7, 3))):
        expected = windows(x, 4, 2)
        assert_equal(
            solution.sliding_windows(x, 4, 2),
            expected,
            because="the strides are those of x, whatever its layout",
        )


@task("sliding_windows")
def test_sliding_windows_of_an_expanded_tensor(solution, randn):
    for x in (randn(1, 7, 3).expand(2, 7, 3), randn(2, 1, 3).expand(2, 7, 3)):
        expected = windows(x, 4)
        assert_equal(solution.sliding_windows(x, 4), expected, because="an expanded axis has stride 0")


@task("sliding_windows")
def test_sliding_windows_of_a_slice(solution, randn):
    x = randn(3, 9, 3)[1:, 2:]
    expected = windows(x, 4)
    assert_equal(solution.sliding_windows(x, 4), expected, because="a slice begins inside the storage of its parent")


@task("sliding_windows")
def test_sliding_windows_show_a_write_into_x(solution, randn):
    x = randn(2, 7, 3)
    result = solution.sliding_windows(x, 4)
    x[:, 3] = 100.0
    expected = windows(x, 4)
    assert_equal(result, expected, because="a view follows what is written into x")


@task("sliding_windows")
def test_sliding_windows_copy_not_a_byte(solution, randn):
    plain_windows(solution, randn)
    x = randn(2, 50, 3)
    expected = windows(x, 16)
    result = assert_cost(solution.sliding_windows, x, 16, max_new_bytes=0, because="windows share the memory of x")
    assert_equal(result, expected, because=WINDOW)


@task("sliding_windows")
def test_sliding_windows_let_gradients_through(solution, randn):
    assert_gradients_close(
        lambda x: solution.sliding_windows(x, 4, 2),
        lambda x: torch.stack([x[:, n : n + 4] for n in (0, 2, 4)], dim=1),
        [randn(2, 9, 3)],
        because="a place gets the sum of the gradients of all windows that hold it",
    )


@task("sliding_windows")
@pytest.mark.parametrize("size, step", [(0, 1), (-1, 1), (-4, 2), (4, 0), (4, -1)])
def test_sliding_windows_refuse_sizes_and_steps_below_one(solution, randn, size, step):
    plain_windows(solution, randn)
    result = solution.sliding_windows(randn(2, 3), 5)
    assert_equal(tuple(result.shape), (2, 0, 5), because="no whole window fits: N = 0")
    assert_raises(ValueError, solution.sliding_windows, randn(2, 7, 3), size, step)


@cost_case("sliding_windows")
def sliding_windows_cost(module, randn):
    x = randn(4, 256)
    return lambda: module.sliding_windows(x, 32, 4)


# can_view


def torch_view(shape, stride, new_shape):
    """What Tensor.view says, or None."""
    try:
        return tuple(torch.empty_strided(shape, stride, device="meta").view(new_shape).stride())
    except RuntimeError:
        return None


def factors(number, rng):
    """A random shape with `number` elements, with ones in it now and then."""
    sizes = []
    while number > 1:
        size = rng.choice([d for d in range(2, number + 1) if number % d == 0])
        sizes.append(size)
        number //= size
    for _ in range(rng.choice([0, 0, 1, 2])):
        sizes.insert(rng.randrange(len(sizes) + 1), 1)
    return tuple(sizes)


def contiguous(shape):
    stride = [1]
    for size in reversed(shape[1:]):
        stride.append(stride[-1] * size)
    return tuple(reversed(stride[: len(shape)]))


def random_layout(rng):
    """Shape and stride of a tensor as slicing, transposing and expanding leave it."""
    shape = factors(rng.choice([1, 2, 4, 6, 8, 12, 24]), rng)
    stride = list(contiguous(tuple(size + rng.choice([0, 0, 1]) for size in shape)))
    for axis, size in enumerate(shape):
        if size == 1:
            stride[axis] = rng.choice([stride[axis], 0, 5])
        elif rng.random() < 0.1:
            stride[axis] = 0
        elif rng.random() < 0.1:
            stride[axis] *= 2
    if len(shape) > 1 and rng.random() < 0.3:
        order = rng.sample(range(len(shape)), len(shape))
        shape, stride = tuple(shape[axis] for axis in order), [stride[axis] for axis in order]
    return shape, tuple(stride)


def matters(strides, new_shape):
    """The strides of the axes along which one can step at all."""
    return [step for step, size in zip(strides, new_shape, strict=True) if size != 1]


def compare_view(solution, shape, stride, new_shape, because=""):
    """Compare with torch; what was looked at is the case and the answer, so that no two cases look alike."""
    expected = torch_view(shape, stride, new_shape)
    result = solution.can_view(shape, stride, new_shape)
    seen = (shape, stride, new_shape, result)
    because = f"{because} shape {shape}, stride {stride} seen as {new_shape}:".strip()
    if expected is None:
        assert_that(result is None, f"{because} this needs a copy, the answer is None", value=seen)
        return
    assert_that(isinstance(result, tuple), f"{because} a view exists, the answer is a tuple of strides", value=seen)
    assert_that(len(result) == len(new_shape), f"{because} one stride per axis of the new shape", value=seen)
    if 0 not in shape:
        steps = ", ".join("any" if size == 1 else str(step) for step, size in zip(expected, new_shape, strict=True))
        equal = matters(result, new_shape) == matters(expected, new_shape)
        assert_that(equal, f"{because} the strides are ({steps})", value=seen)


@task("can_view")
@pytest.mark.parametrize("new_shape", [(24,), (6, 4), (2, 12), (4, 3, 2), (2, 2, 2, 3), (24, 1), (1, 8, 3)])
def test_can_view_of_a_contiguous_tensor(solution, new_shape):
    compare_view(solution, (2, 3, 4), (12, 4, 1), new_shape, "A contiguous tensor can take any shape.")


@task("can_view")
@pytest.mark.parametrize("new_shape", [(24,), (6, 4), (2, 3, 4), (2, 12), (2, 3, 2, 2), (3, 8), (2, 4, 3)])
def test_can_view_of_a_transposed_tensor(solution, new_shape):
    compare_view(solution, (2, 3, 4), (12, 1, 3), new_shape)


@task("can_view")
@pytest.mark.parametrize("new_shape", [(12,), (6, 2), (2, 3, 2), (2, 6), (3, 4)])
def test_can_view_of_a_slice(solution, new_shape):
    compare_view(solution, (2, 3, 2), (20, 4, 2), new_shape)


@task("can_view")
@pytest.mark.parametrize("new_shape", [(12,), (4, 3), (2, 2, 3), (6, 2), (3, 4)])
def test_can_view_of_an_expanded_tensor(solution, new_shape):
    compare_view(solution, (4, 3), (0, 1), new_shape, "An expanded axis has stride 0.")
    compare_view(solution, (4, 3), (0, 0), new_shape, "All axes have stride 0.")


@task("can_view")
@pytest.mark.parametrize("new_shape", [(6,), (2, 3), (3, 2), (1, 6, 1), (2, 1, 3)])
def test_can_view_ignores_the_strides_of_axes_of_size_one(solution, new_shape):
    compare_view(solution, (2, 3), (6, 2), new_shape)
    for shape, stride in [((2, 1, 3), (3, 77, 1)), ((1, 2, 3), (0, 3, 1)), ((2, 3, 1), (3, 1, 9))]:
        compare_view(solution, shape, stride, new_shape, "Nobody steps along an axis of size 1.")


@task("can_view")
@pytest.mark.parametrize("new_shape", [(0,), (3, 0), (0, 5, 2), (2, 0, 3), (1, 0)])
def test_can_view_of_an_empty_tensor(solution, new_shape):
    compare_view(solution, (2, 0, 3), (3, 3, 1), new_shape, "Without elements everything fits.")
    compare_view(solution, (2, 0, 3), (1, 7, 4), new_shape, "Without elements everything fits.")


@task("can_view")
@pytest.mark.parametrize("new_shape", [(), (1,), (1, 1, 1)])
def test_can_view_of_one_element(solution, new_shape):
    compare_view(solution, (), (), new_shape)
    compare_view(solution, (1, 1), (4, 9), new_shape)


@task("can_view")
def test_can_view_returns_a_tuple(solution):
    result = solution.can_view((2, 3), (3, 1), (6,))
    assert_equal(result, (1,), because="a tuple of strides, one per axis of new_shape")
    result = solution.can_view([2, 3], [3, 1], [3, 2])
    assert_equal(result, (2, 1), because="lists are sequences, too")


@task("can_view")
def test_can_view_agrees_with_torch_on_random_layouts(solution, seed):
    compare_view(solution, (2, 3), (6, 2), (6,))
    rng = random.Random(seed)
    for _ in range(1000):
        shape, stride = random_layout(rng)
        new_shape = factors(int(np.prod(shape)), rng)
        compare_view(solution, shape, stride, new_shape)


@task("can_view")
@pytest.mark.parametrize("new_shape", [(5,), (2, 4), (2, 3, 2), (0,), (), (3, 1)])
def test_can_view_refuses_another_number_of_elements(solution, new_shape):
    assert_raises(ValueError, solution.can_view, (2, 3), (3, 1), new_shape, mentions=["(2, 3)", str(new_shape)])
    assert_raises(ValueError, solution.can_view, (2, 0), (1, 1), (2, 3), mentions=["(2, 0)", "(2, 3)"])
