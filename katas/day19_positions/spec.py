"""Day 19: what the tasks promise."""

import contextlib
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

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
    unchanged,
)


def frequencies(dim, base=10000.0):
    """One per pair, in float64."""
    return np.array([base ** (-2 * i / dim) for i in range(dim // 2)])


def angles_of(positions, w):
    """The table of angles (..., dim/2) in float64 numpy."""
    return np.asarray(positions, dtype=np.float64)[..., None] * w


def waves(positions, dim, base=10000.0):
    """The sinusoids in numpy."""
    angles = angles_of(positions, frequencies(dim, base))
    table = np.zeros((*angles.shape[:-1], dim))
    table[..., 0::2], table[..., 1::2] = np.sin(angles), np.cos(angles)
    return torch.from_numpy(table)


def numbers(x):
    """The values as float64 numpy, in memory of their own."""
    return x.detach().cpu().double().numpy().copy()


@contextlib.contextmanager
def default_dtype(dtype):
    """Another default dtype, for a while."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# sinusoidal


@task("sinusoidal")
def test_position_zero_is_zeros_and_ones(solution, device):
    found = solution.sinusoidal(torch.zeros(1, dtype=torch.long, device=device), 6)
    assert_close(found, torch.tensor([[0.0, 1.0, 0.0, 1.0, 0.0, 1.0]]), because="sin(0) is 0 and cos(0) is 1")


@task("sinusoidal")
@pytest.mark.parametrize("dim", [2, 4, 6, 16])
def test_sines_and_cosines_take_turns(solution, device, dim):
    expected = waves(range(7), dim).float()
    found = solution.sinusoidal(torch.arange(7, device=device), dim)
    assert_close(
        found, expected, because="column 2i is sin(p * w_i), column 2i + 1 is cos(p * w_i), w_i = base ** (-2i/dim)"
    )


@task("sinusoidal")
@pytest.mark.parametrize("base", [100.0, 500000.0])
def test_the_base_of_the_sinusoids_can_be_chosen(solution, device, base):
    expected = waves(range(9), 8, base).float()
    found = solution.sinusoidal(torch.arange(9, device=device), 8, base)
    assert_close(found, expected, because=f"base={base:g} was given")


@task("sinusoidal")
@pytest.mark.parametrize("shape", [(), (3, 4), (2, 1, 3), (0,)])
def test_positions_of_the_sinusoids_have_any_shape(solution, randint, shape):
    positions = randint(0, 50, shape)
    expected = waves(positions.cpu().numpy(), 6).float()
    assert_close(solution.sinusoidal(positions, 6), expected, because=f"positions {shape} give {(*shape, 6)}")


@task("sinusoidal")
def test_position_100000_is_as_exact_as_position_1(solution, device):
    places = [1, 1000, 99_999, 100_000]
    found = solution.sinusoidal(torch.tensor(places, device=device), 64)
    expected = waves(places, 64).float()
    assert_close(
        found, expected, rtol=0, atol=1e-6, because="the angles of far positions need float64 before sin and cos"
    )


@task("sinusoidal")
def test_positions_in_float64_give_float64(solution, rand):
    positions = rand(5).double() * 1e5
    expected = waves(positions.cpu().numpy(), 16)
    found = solution.sinusoidal(positions, 16)
    assert_close(found, expected, rtol=1e-9, atol=1e-9, because="float64 positions give a float64 table")


@task("sinusoidal")
def test_positions_need_not_be_whole(solution, device):
    places = [0.5, 1.25, 7.75]
    found = solution.sinusoidal(torch.tensor(places, device=device), 6)
    assert_close(found, waves(places, 6).float(), because="position 0.5 lies between 0 and 1")


@task("sinusoidal")
@pytest.mark.parametrize("kind", [torch.int32, torch.float16, torch.bfloat16])
def test_narrow_positions_give_a_float32_table(solution, device, kind):
    found = solution.sinusoidal(torch.tensor([0, 3, 100], device=device).to(kind), 6)
    assert_close(found, waves([0, 3, 100], 6).float(), because=f"the table is float32 for {kind} positions, too")


@task("sinusoidal")
def test_the_default_dtype_has_no_part_in_the_sinusoids(solution, device):
    positions = torch.arange(300, device=device)
    expected = waves(range(300), 16).float()
    with default_dtype(torch.bfloat16):
        found = solution.sinusoidal(positions, 16)
    assert_close(found, expected, rtol=0, atol=1e-6, because="torch's default dtype was bfloat16")


@task("sinusoidal")
def test_a_shift_is_one_rotation_for_all_positions(solution, rand):
    positions, k, w = rand(6).double() * 50, 3.25, frequencies(8)
    turn = np.zeros((8, 8))
    for i in range(4):
        c, s = math.cos(k * w[i]), math.sin(k * w[i])
        turn[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = [[c, s], [-s, c]]
    here = solution.sinusoidal(positions, 8)
    assert_equal(tuple(here.shape), (6, 8))
    expected = torch.from_numpy(numbers(here) @ turn.T)
    there = solution.sinusoidal(positions + k, 8)
    assert_close(
        there, expected, rtol=1e-10, atol=1e-10, because="PE(p + k) = R(k) PE(p), with the same matrix for all p"
    )


@task("sinusoidal")
@pytest.mark.parametrize("dim", [1, 7])
def test_an_odd_width_of_sinusoids_is_refused(solution, device, dim):
    assert_raises(ValueError, solution.sinusoidal, torch.arange(3, device=device), dim, mentions=[str(dim)])


@cost_case("sinusoidal")
def sinusoidal_cost(module, device):
    positions = torch.arange(128, device=device)
    return lambda: module.sinusoidal(positions, 64)


# learned_positions


def learned(solution, device, max_len, dim, randn):
    """A module with known random rows, and these rows."""
    module = solution.LearnedPositions(max_len, dim).to(device)
    rows = randn(max_len, dim)
    with torch.no_grad():
        module.weight.copy_(rows)
    return module, rows.cpu().clone()


@task("learned_positions")
def test_each_place_gets_its_row(solution, randn, device):
    module, rows = learned(solution, device, 9, 4, randn)
    x = randn(2, 5, 4)
    expected = x.cpu() + rows[:5]
    assert_close(module(x), expected, because="row p is added at position p")


@task("learned_positions")
@pytest.mark.parametrize("offset", [1, 3, 4])
def test_an_offset_moves_all_places(solution, randn, device, offset):
    module, rows = learned(solution, device, 9, 4, randn)
    x = randn(2, 5, 4)
    expected = x.cpu() + rows[offset : offset + 5]
    assert_close(module(x, offset=offset), expected, because=f"the first token stands at position {offset}")


@task("learned_positions")
def test_the_rows_are_a_parameter(solution):
    module = solution.LearnedPositions(7, 3)
    shapes = {name: tuple(value.shape) for name, value in module.named_parameters()}
    assert_equal(shapes, {"weight": (7, 3)}, because="there is one parameter, weight (max_len, dim)")
    assert_equal(sorted(module.state_dict()), ["weight"], because="the state dict holds the rows alone")
    assert_equal(module.weight.dtype, torch.float32)


@task("learned_positions")
def test_the_rows_start_small_and_random(solution):
    rows = solution.LearnedPositions(400, 100).weight.detach()
    std, mean = round(rows.std().item(), 2), round(rows.mean().item(), 2)
    assert_that(abs(rows.std().item() - 0.02) < 0.002, "the standard deviation is 0.02", value=std)
    assert_that(abs(rows.mean().item()) < 0.002, "the mean is 0", value=mean)
    widest = rows.abs().max().item() > 0.05
    assert_that(widest, "of 40,000 normal numbers some are beyond 2.5 standard deviations", value=widest)


@task("learned_positions")
def test_the_rows_come_from_the_global_random_state(solution, seed):
    torch.manual_seed(seed)
    first = solution.LearnedPositions(6, 4).weight.detach().clone()
    second = solution.LearnedPositions(6, 4).weight.detach().clone()
    torch.manual_seed(seed)
    again = solution.LearnedPositions(6, 4).weight.detach().clone()
    assert_that(not torch.equal(first, second), "two tables start differently", value=bool(torch.equal(first, second)))
    assert_that(torch.equal(first, again), "the same random state gives the same table", value="other numbers")


@task("learned_positions")
def test_the_last_row_can_be_used_and_no_more(solution, randn, device):
    module, rows = learned(solution, device, 8, 3, randn)
    x = randn(2, 3)
    expected = x.cpu() + rows[6:]
    assert_close(module(x, offset=6), expected, because="positions 6 and 7 are the last of 8")
    assert_raises(IndexError, module, x, offset=7, because="position 8 of 8 rows does not exist")


@task("learned_positions")
def test_a_text_that_is_too_long_is_refused(solution, randn, device):
    module, rows = learned(solution, device, 4, 3, randn)
    x = randn(1, 4, 3)
    expected = x.cpu() + rows
    assert_close(module(x), expected, because="four places, four rows")
    assert_raises(IndexError, module, randn(1, 5, 3), because="position 4 of 4 rows does not exist")


@task("learned_positions")
@pytest.mark.parametrize(("n", "offset"), [(1, 4), (1, 9), (2, 5)])
def test_positions_past_the_end_are_refused(solution, randn, device, n, offset):
    module, _ = learned(solution, device, 4, 3, randn)
    assert_raises(IndexError, module, randn(2, n, 3), offset=offset, because=f"position {offset} of 4 rows")


@task("learned_positions")
@pytest.mark.parametrize("offset", [-1, -2, -4])
def test_positions_below_zero_are_refused(solution, randn, device, offset):
    module, _ = learned(solution, device, 4, 3, randn)
    assert_raises(IndexError, module, randn(2, 1, 3), offset=offset, because="no token stands before position 0")


@task("learned_positions")
@pytest.mark.parametrize("width", [1, 4])
def test_another_width_is_refused(solution, randn, device, width):
    module, _ = learned(solution, device, 5, 3, randn)
    assert_raises(ValueError, module, randn(2, 2, width), mentions=[str((2, 2, width)), "(5, 3)"])


@task("learned_positions")
def test_a_table_of_width_one_does_not_stretch(solution, randn, device):
    module, _ = learned(solution, device, 5, 1, randn)
    assert_raises(ValueError, module, randn(2, 2, 4), mentions=["(2, 2, 4)", "(5, 1)"])


@task("learned_positions")
@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 5, 4), (0, 3, 4)])
def test_leading_axes_are_free(solution, randn, device, shape):
    module, rows = learned(solution, device, 6, 4, randn)
    x = randn(*shape)
    expected = x.cpu() + rows[1 : 1 + shape[-2]]
    assert_close(module(x, offset=1), expected, because=f"the places of {shape} are on its last axis but one")


@task("learned_positions")
@pytest.mark.parametrize("offset", [0, 2, 6])
def test_no_token_stands_anywhere(solution, randn, device, offset):
    module, _ = learned(solution, device, 6, 4, randn)
    assert_equal(module(randn(2, 0, 4), offset=offset), torch.zeros(2, 0, 4), because="T = 0")


@task("learned_positions")
def test_equal_batch_and_length_hide_no_axis(solution, randn, device):
    module, rows = learned(solution, device, 4, 4, randn)
    x = randn(4, 4, 4)
    expected = x.cpu() + rows
    assert_close(module(x), expected, because="B = T = D = max_len, so no shape shows a mix-up")


@task("learned_positions")
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_inputs_come_back_half(solution, randn, device, kind):
    module, rows = learned(solution, device, 64, 16, randn)
    x = randn(2, 64, 16, dtype=kind)
    expected = (x.cpu().float() + rows).to(kind)
    assert_equal(module(x), expected, because="the sum is made in float32 and rounded once")


@task("learned_positions")
def test_x_is_not_changed(solution, randn, device):
    module, rows = learned(solution, device, 5, 4, randn)
    x = randn(2, 3, 4)
    expected = x.cpu() + rows[:3]
    with unchanged(x, module.weight):
        assert_close(module(x), expected)


@task("learned_positions")
def test_only_the_rows_in_use_learn(solution, randn, device):
    module, _ = learned(solution, device, 6, 4, randn)
    x = randn(3, 2, 4).requires_grad_()
    weighting = randn(3, 2, 4)
    expected = torch.zeros(6, 4)
    expected[2:4] = weighting.cpu().sum(0)
    (module(x, offset=2) * weighting).sum().backward()
    assert_close(module.weight.grad, expected, because="each row collects from the batch what its place sent back")
    assert_close(x.grad, weighting.cpu(), because="x passes through unscaled")


@cost_case("learned_positions")
def learned_positions_cost(module, randn, device):
    table, x = module.LearnedPositions(64, 32).to(device), randn(4, 48, 32)
    return lambda: table(x)


# rope_tables


def assert_tables(found, angles, dtype, because, *, reach=0.0):
    """Compare (cos, sin) with the angles; float32 angles are off by what float32 can do at position `reach`."""
    tolerance = {"rtol": 0, "atol": 1e-6 + 3e-7 * reach} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
    cos, sin = found
    assert_close(cos, torch.from_numpy(np.cos(angles)).to(dtype), because=f"{because} (cos)", **tolerance)
    assert_close(sin, torch.from_numpy(np.sin(angles)).to(dtype), because=f"{because} (sin)", **tolerance)


@task("rope_tables")
def test_position_zero_turns_nothing(solution, device):
    cos, sin = solution.rope_tables(torch.zeros(1, dtype=torch.long, device=device), 6)
    assert_close(cos, torch.ones(1, 3), because="the cosine of 0, one column per pair")
    assert_close(sin, torch.zeros(1, 3), because="the sine of 0, one column per pair")


@task("rope_tables")
@pytest.mark.parametrize("dim", [2, 4, 8, 64])
def test_one_angle_for_each_pair(solution, device, dim):
    found = solution.rope_tables(torch.arange(9, device=device), dim)
    angles = angles_of(range(9), frequencies(dim))
    assert_tables(found, angles, torch.float32, "the angle of pair i is p * base ** (-2i / dim)", reach=9)


@task("rope_tables")
@pytest.mark.parametrize("base", [100.0, 500000.0])
def test_the_base_can_be_chosen(solution, device, base):
    found = solution.rope_tables(torch.arange(9, device=device), 8, base)
    assert_tables(found, angles_of(range(9), frequencies(8, base)), torch.float32, f"base={base:g} was given", reach=9)


@task("rope_tables")
@pytest.mark.parametrize("shape", [(), (2, 5), (2, 1, 3), (0,)])
def test_positions_have_any_shape(solution, randint, shape):
    positions = randint(0, 50, shape)
    angles = angles_of(positions.cpu().numpy(), frequencies(6))
    found = solution.rope_tables(positions, 6)
    assert_tables(found, angles, torch.float32, f"positions {shape} give two tables {(*shape, 3)}", reach=50)


@task("rope_tables")
def test_neighbors_stay_apart_at_position_4000(solution, device):
    places = [256, 257, 258, 259, 3999, 4000, 4001]
    found = solution.rope_tables(torch.tensor(places, device=device), 32)
    angles = angles_of(places, frequencies(32))
    assert_tables(found, angles, torch.float32, "positions and angles need at least float32", reach=4000)


@task("rope_tables")
def test_a_model_in_bfloat16_has_tables_in_float32(solution, device):
    positions = torch.arange(300, device=device)
    angles = angles_of(range(300), frequencies(16))
    with default_dtype(torch.bfloat16):
        found = solution.rope_tables(positions, 16)
    assert_tables(found, angles, torch.float32, "torch's default dtype was bfloat16", reach=300)


@task("rope_tables")
def test_positions_in_float64_give_tables_in_float64(solution, rand):
    positions = rand(2, 5).double() * 1000
    angles = angles_of(positions.cpu().numpy(), frequencies(8))
    found = solution.rope_tables(positions, 8)
    assert_tables(found, angles, torch.float64, "float64 positions give float64 tables")


@task("rope_tables")
@pytest.mark.parametrize("kind", [torch.int32, torch.float16, torch.bfloat16, torch.float32])
def test_narrow_positions_give_float32_tables(solution, device, kind):
    places = [0, 3, 100]
    found = solution.rope_tables(torch.tensor(places, device=device).to(kind), 8)
    angles = angles_of(places, frequencies(8))
    assert_tables(found, angles, torch.float32, f"the tables are float32 for {kind} positions", reach=100)


@task("rope_tables")
def test_positions_between_two_tokens_are_fine(solution, device):
    places = [0.25, 1.5, 10.75]
    found = solution.rope_tables(torch.tensor(places, device=device), 6)
    assert_tables(found, angles_of(places, frequencies(6)), torch.float32, "positions may be fractions", reach=11)


@task("rope_tables")
@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16])
def test_given_frequencies_replace_the_base(solution, rand, device, kind):
    inv_freq = rand(4).to(kind)
    angles = angles_of(range(7), numbers(inv_freq))
    found = solution.rope_tables(torch.arange(7, device=device), 8, 10000.0, inv_freq=inv_freq)
    assert_tables(found, angles, torch.float32, "inv_freq holds the frequency of each pair", reach=7)


@task("rope_tables")
def test_given_frequencies_keep_float64_positions_exact(solution, rand):
    inv_freq, positions = rand(3).double(), rand(5).double() * 1000
    angles = angles_of(positions.cpu().numpy(), numbers(inv_freq))
    found = solution.rope_tables(positions, 6, inv_freq=inv_freq)
    assert_tables(found, angles, torch.float64, "positions and inv_freq are float64")


@task("rope_tables")
def test_given_frequencies_of_zero_turn_nothing(solution, device):
    inv_freq = torch.tensor([0.5, 0.25], device=device)
    found = solution.rope_tables(torch.arange(4, device=device), 4, inv_freq=inv_freq)
    assert_tables(found, angles_of(range(4), [0.5, 0.25]), torch.float32, "inv_freq was [0.5, 0.25]", reach=4)
    found = solution.rope_tables(torch.arange(4, device=device), 4, inv_freq=torch.zeros(2, device=device))
    assert_tables(found, np.zeros((4, 2)), torch.float32, "frequencies of 0 are frequencies, too")


@task("rope_tables")
@pytest.mark.parametrize("dim", [1, 5, 7])
def test_an_odd_width_is_refused(solution, device, dim):
    assert_raises(ValueError, solution.rope_tables, torch.arange(3, device=device), dim, mentions=[str(dim)])


@task("rope_tables")
@pytest.mark.parametrize(("shape", "dim"), [((3,), 8), ((8,), 8), ((1,), 8), ((4, 1), 8), ((1, 4), 8)])
def test_frequencies_that_do_not_fit_are_refused(solution, rand, device, shape, dim):
    positions, inv_freq = torch.arange(4, device=device), rand(*shape)
    assert_raises(ValueError, solution.rope_tables, positions, dim, inv_freq=inv_freq, mentions=[str(shape), str(dim)])


@task("rope_tables")
@pytest.mark.parametrize("n", [3, 4])
def test_an_odd_width_is_refused_with_frequencies_too(solution, rand, device, n):
    positions, inv_freq = torch.arange(4, device=device), rand(n)
    assert_raises(ValueError, solution.rope_tables, positions, 7, inv_freq=inv_freq, mentions=["7"])


@task("rope_tables")
def test_tables_know_nothing_of_heads(solution, device):
    assert_cost(
        solution.rope_tables,
        torch.arange(128, device=device),
        16,
        no_larger_than=128 * 16,
        because="128 positions and 8 pairs make tables of 1,024 numbers, and one pair of tables serves all heads",
    )


@cost_case("rope_tables")
def rope_tables_cost(module, device):
    positions = torch.arange(128, device=device)
    return lambda: module.rope_tables(positions, 64)


# apply_rope

LAYOUTS = {"apply_rope": "interleaved", "apply_rope_half": "half"}


def columns(layout, width):
    """Which columns are the first and the second of the pairs."""
    if layout == "half":
        return np.arange(width // 2), np.arange(width // 2, width)
    return np.arange(0, width, 2), np.arange(1, width, 2)


def turned(x, angles, layout="interleaved"):
    """Complex multiplication in complex128; `angles` broadcast to the pairs of x."""
    x, angles = numbers(x), np.asarray(angles, dtype=np.float64)
    first, second = columns(layout, x.shape[-1])
    z = (x[..., first] + 1j * x[..., second]) * np.exp(1j * angles)
    out = np.zeros_like(x)
    out[..., first], out[..., second] = z.real, z.imag
    return torch.from_numpy(out)


def turned_by_matrices(x, cos, sin, layout="interleaved"):
    """A block-diagonal matrix per position, differentiable; x (..., T, D), tables (T, D/2)."""
    T, D = x.shape[-2:]
    first, second = (torch.from_numpy(c).to(x.device) for c in columns(layout, D))
    matrix = torch.zeros(T, D, D, dtype=x.dtype, device=x.device)
    place = torch.arange(T, device=x.device)[:, None]
    matrix = matrix.index_put((place, first, first), cos).index_put((place, second, second), cos)
    matrix = matrix.index_put((place, first, second), -sin).index_put((place, second, first), sin)
    return torch.einsum("tij,...tj->...ti", matrix, x)


def random_tables(rand, *shape, dtype=torch.float32):
    """Angles in float64 numpy, and their tables."""
    angles = rand(*shape).double() * 6
    return numbers(angles), angles.cos().to(dtype), angles.sin().to(dtype)


TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 5e-6}, torch.float64: {"rtol": 1e-10, "atol": 1e-10}}


@task("apply_rope")
def test_a_quarter_turn(solution, device):
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]], device=device)
    cos, sin = torch.tensor([[0.0, 1.0]], device=device), torch.tensor([[1.0, 0.0]], device=device)
    expected = torch.tensor([[-2.0, 1.0, 3.0, 4.0]])
    found = solution.apply_rope(x, cos, sin)
    assert_close(found, expected, because="a quarter turn makes (1, 2) into (-2, 1), and the second pair stays")


@task("apply_rope")
def test_an_angle_of_zero_changes_nothing(solution, randn, device):
    x = randn(2, 3, 5, 8)
    expected = x.cpu().clone()
    cos, sin = torch.ones(5, 4, device=device), torch.zeros(5, 4, device=device)
    assert_equal(solution.apply_rope(x, cos, sin), expected, because="cos = 1 and sin = 0 turn nothing")


@task("apply_rope")
@pytest.mark.parametrize("lead", [(), (2,), (2, 3), (2, 3, 4)])
@pytest.mark.parametrize("width", [2, 6, 8])
def test_pairs_turn_like_complex_numbers(solution, randn, rand, dtype, lead, width):
    x = randn(*lead, 5, width, dtype=dtype)
    angles, cos, sin = random_tables(rand, 5, width // 2, dtype=dtype)
    expected = turned(x, angles).to(dtype)
    found = solution.apply_rope(x, cos, sin)
    assert_close(found, expected, because="neighbors are a pair: z becomes z * exp(i * angle)", **TOLERANCE[dtype])


@task("apply_rope")
def test_as_many_heads_as_positions(solution, randn, rand, dtype):
    x = randn(2, 4, 4, 6, dtype=dtype)
    angles, cos, sin = random_tables(rand, 4, 3, dtype=dtype)
    expected = turned(x, angles).to(dtype)
    found = solution.apply_rope(x, cos, sin)
    assert_close(found, expected, because="H = T = 4: the tables belong to positions, not to heads", **TOLERANCE[dtype])


@task("apply_rope")
@pytest.mark.parametrize("shape", [(2, 3, 5, 6), (2, 5, 6), (2, 3, 4, 5, 6), (3, 3, 5, 6), (3, 3, 3, 6), (4, 4, 4, 8)])
def test_each_row_of_the_batch_has_its_own_positions(solution, randn, rand, dtype, shape):
    x = randn(*shape, dtype=dtype)
    *lead, length, width = shape
    angles, cos, sin = random_tables(rand, shape[0], length, width // 2, dtype=dtype)
    spread = angles.reshape(shape[0], *[1] * (len(lead) - 1), length, width // 2)
    expected = turned(x, spread).to(dtype)
    found = solution.apply_rope(x, cos, sin)
    because = f"tables {tuple(cos.shape)} for x {shape}: row b of the batch has table b, in all heads"
    assert_close(found, expected, because=because, **TOLERANCE[dtype])


@task("apply_rope")
@pytest.mark.parametrize("rows", [(1,), (2, 1), (2, 3), (1, 3), (1, 1)])
def test_axes_in_front_of_the_tables_are_the_first_of_x(solution, randn, rand, rows):
    x = randn(2, 3, 5, 6)
    angles, cos, sin = random_tables(rand, *rows, 5, 3)
    expected = turned(x, angles.reshape(*rows, *[1] * (2 - len(rows)), 5, 3)).float()
    found = solution.apply_rope(x, cos, sin)
    because = f"tables {tuple(cos.shape)} for x (2, 3, 5, 6)"
    assert_close(found, expected, because=because, **TOLERANCE[torch.float32])


@task("apply_rope")
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_inputs_are_turned_in_float32(solution, randn, rand, kind):
    x = randn(2, 3, 16, 32, dtype=kind)
    _, cos, sin = random_tables(rand, 16, 16)
    even, odd, c, s = numbers(x)[..., 0::2], numbers(x)[..., 1::2], numbers(cos), numbers(sin)
    expected = torch.from_numpy(np.stack((even * c - odd * s, even * s + odd * c), -1)).flatten(-2).to(kind)
    found = solution.apply_rope(x, cos, sin)
    one_bit = {torch.float16: 2**-10, torch.bfloat16: 2**-7}[kind]
    assert_close(
        found, expected, rtol=one_bit, atol=2e-6, because="products and sums in float32, rounded once at the end"
    )


@task("apply_rope")
def test_float64_is_not_narrowed(solution, randn, rand):
    x = randn(2, 5, 6, dtype=torch.float64)
    _, cos, sin = random_tables(rand, 5, 3)
    even, odd, c, s = numbers(x)[..., 0::2], numbers(x)[..., 1::2], numbers(cos), numbers(sin)
    expected = torch.from_numpy(np.stack((even * c - odd * s, even * s + odd * c), -1)).flatten(-2)
    found = solution.apply_rope(x, cos, sin)
    assert_close(found, expected, rtol=1e-10, atol=1e-10, because="float64 x and float32 tables: computed in float64")


@task("apply_rope")
def test_float32_stays_float32_with_wider_tables(solution, randn, rand):
    x = randn(2, 5, 6)
    angles, cos, sin = random_tables(rand, 5, 3, dtype=torch.float64)
    expected = turned(x, angles).float()
    found = solution.apply_rope(x, cos, sin)
    assert_close(found, expected, because="the result has the dtype of x", **TOLERANCE[torch.float32])


@task("apply_rope")
def test_lengths_stay(solution, randn, rand):
    x = randn(2, 3, 5, 8, dtype=torch.float64)
    _, cos, sin = random_tables(rand, 5, 4, dtype=torch.float64)
    expected = torch.from_numpy(np.linalg.norm(numbers(x).reshape(2, 3, 5, 4, 2), axis=-1))
    found = solution.apply_rope(x, cos, sin).unflatten(-1, (4, 2)).norm(dim=-1)
    assert_close(found, expected, rtol=1e-10, atol=1e-10, because="a rotation keeps the length of each pair")


@task("apply_rope")
def test_turning_back_undoes_it(solution, randn, rand):
    x = randn(2, 3, 5, 8, dtype=torch.float64)
    expected = x.cpu().clone()
    _, cos, sin = random_tables(rand, 5, 4, dtype=torch.float64)
    there = solution.apply_rope(x, cos, sin)
    back = solution.apply_rope(there, cos, -sin)
    assert_close(
        back, expected, rtol=1e-10, atol=1e-10, because="the inverse of a rotation is the one by minus the angle"
    )


@task("apply_rope")
def test_scores_depend_on_differences_alone(solution, randn, randint, device):
    q, k = randn(2, 3, 5, 8, dtype=torch.float64), randn(2, 3, 5, 8, dtype=torch.float64)
    places = randint(0, 100, (5,)).cpu().numpy()

    def scores(shift):
        angles = torch.from_numpy(angles_of(places + shift, frequencies(8))).to(device)
        a, b = (solution.apply_rope(x, angles.cos(), angles.sin()) for x in (q, k))
        return torch.from_numpy(numbers(a) @ numbers(b).swapaxes(-1, -2))

    assert_close(
        scores(1000), scores(0), rtol=1e-9, atol=1e-9, because="all positions moved by 1000: the scores may not"
    )
    angle = angles_of(places, frequencies(8))
    expected = torch.from_numpy(numbers(turned(q, angle)) @ numbers(turned(k, angle)).swapaxes(-1, -2))
    assert_close(scores(0), expected, rtol=1e-9, atol=1e-9, because="the scores of turned queries and keys")


@task("apply_rope")
def test_strides_do_not_matter(solution, randn, rand):
    x = randn(2, 5, 3, 8)
    angles, cos, sin = random_tables(rand, 5, 4)
    expected = turned(x.transpose(1, 2), angles).float()
    found = solution.apply_rope(x.transpose(1, 2), noncontiguous(cos), noncontiguous(sin))
    assert_close(found, expected, because="x is a transposed view", **TOLERANCE[torch.float32])
    found = solution.apply_rope(noncontiguous(x.transpose(1, 2)), cos, sin)
    assert_close(found, expected, because="the last axis of x has gaps", **TOLERANCE[torch.float32])


@task("apply_rope")
def test_a_part_of_a_head_can_be_turned(solution, randn, rand):
    wide = randn(2, 5, 11)
    angles, cos, sin = random_tables(rand, 5, 3)
    expected = turned(wide[..., 5:], angles).float()
    found = solution.apply_rope(wide[..., 5:], cos, sin)
    assert_close(found, expected, because="x is the last six columns of something wider", **TOLERANCE[torch.float32])


@task("apply_rope")
@pytest.mark.parametrize(
    ("shape", "rows"), [((2, 3, 0, 6), ()), ((0, 3, 5, 6), ()), ((0, 3, 5, 6), (0,)), ((2, 0, 5, 6), (2,))]
)
def test_nothing_can_be_turned(solution, randn, rand, shape, rows):
    _, cos, sin = random_tables(rand, *rows, shape[-2], 3)
    assert_equal(
        solution.apply_rope(randn(*shape), cos, sin), torch.zeros(shape), because=f"x {shape} holds no numbers"
    )


@task("apply_rope")
def test_gradients_flow_to_x_and_tables(solution, randn, rand):
    x = randn(2, 3, 5, 6, dtype=torch.float64)
    _, cos, sin = random_tables(rand, 5, 3, dtype=torch.float64)
    assert_gradients_close(
        solution.apply_rope, turned_by_matrices, [x, cos, sin], because="as a matrix per position does"
    )


MISFITS = [
    ((2, 3, 5, 6), (4, 3)),
    ((2, 3, 5, 6), (1, 3)),
    ((2, 3, 1, 6), (5, 3)),
    ((2, 3, 5, 6), (5, 6)),
    ((2, 3, 5, 6), (5, 1)),
    ((2, 3, 5, 6), (5, 2)),
    ((2, 3, 5, 7), (5, 3)),
    ((2, 3, 5, 6), (3, 5, 3)),
    ((1, 3, 5, 6), (2, 5, 3)),
    ((2, 3, 5, 6), (2, 2, 5, 3)),
    ((5, 6), (2, 5, 3)),
    ((5, 6), (1, 5, 3)),
    ((2, 5, 6), (2, 1, 5, 3)),
]


@task("apply_rope")
@pytest.mark.parametrize(("shape", "table"), MISFITS)
def test_tables_that_do_not_fit_are_refused(solution, randn, rand, shape, table):
    _, cos, sin = random_tables(rand, *table)
    because = f"tables {table} do not belong to x {shape}"
    assert_raises(
        ValueError, solution.apply_rope, randn(*shape), cos, sin, mentions=[str(shape), str(table)], because=because
    )


@task("apply_rope")
@pytest.mark.parametrize("table", [(5, 1), (1, 3), (2, 5, 3), (1, 5, 3)])
def test_a_sine_that_is_not_the_cosines_is_refused(solution, randn, rand, table):
    _, cos, _ = random_tables(rand, 5, 3)
    _, _, sin = random_tables(rand, *table)
    assert_raises(ValueError, solution.apply_rope, randn(2, 3, 5, 6), cos, sin, mentions=["(5, 3)", str(table)])


@task("apply_rope")
@pytest.mark.parametrize("rows", [(), (2,)])
def test_turning_takes_eight_calls(solution, randn, rand, rows):
    x = randn(2, 4, 16, 8)
    _, cos, sin = random_tables(rand, *rows, 16, 4)
    assert_cost(
        solution.apply_rope, x, cos, sin, max_calls=8, no_larger_than=x.numel(), because="all pairs turn at one time"
    )


@cost_case("apply_rope")
def apply_rope_cost(module, randn, rand):
    x = randn(2, 8, 64, 32)
    _, cos, sin = random_tables(rand, 64, 16)
    return lambda: module.apply_rope(x, cos, sin)


# rotary_attention


def rotary_by_hand(q, k, v, query_positions, key_positions, base=10000.0):
    """In numpy, one query at a time: turn, score, softmax over the keys that are not in the future, mix."""
    B, H, T, D = q.shape
    qp, kp = (np.broadcast_to(p.cpu().numpy(), (B, p.shape[-1])) for p in (query_positions, key_positions))
    w = frequencies(D, base)
    q = numbers(turned(q, angles_of(qp, w)[:, None]))
    k = numbers(turned(k, angles_of(kp, w)[:, None]))
    v, out = numbers(v), np.zeros((B, H, T, v.shape[-1]))
    for b, h, t in np.ndindex(B, H, T):
        allowed = kp[b] <= qp[b, t]
        if allowed.any():
            scores = k[b, h][allowed] @ q[b, h, t] / math.sqrt(D)
            weights = np.exp(scores - scores.max())
            out[b, h, t] = weights / weights.sum() @ v[b, h][allowed]
    return torch.from_numpy(out)


def heads(randn, t=5, s=5, d=8, dv=6, b=2, h=3, dtype=torch.float64):
    """Random q, k and v."""
    return randn(b, h, t, d, dtype=dtype), randn(b, h, s, d, dtype=dtype), randn(b, h, s, dv, dtype=dtype)


EXACT = {"rtol": 1e-9, "atol": 1e-9}  # positions in float64
NEAR = {"rtol": 0, "atol": 5e-5}  # tables in float32


@task("rotary_attention")
def test_a_text_attends_to_its_past(solution, randn, device):
    q, k, v = heads(randn)
    places = torch.arange(5, device=device)
    expected = rotary_by_hand(q, k, v, places, places)
    found = solution.rotary_attention(q, k, v, places, places)
    assert_close(found, expected, because="q and k are turned, v is not; keys up to the query are seen", **NEAR)


@task("rotary_attention")
def test_it_is_exact_with_positions_in_float64(solution, randn, device):
    q, k, v = heads(randn)
    places = torch.arange(5, device=device).double()
    expected = rotary_by_hand(q, k, v, places, places)
    found = solution.rotary_attention(q, k, v, places, places)
    assert_close(found, expected, because="float64 positions, queries, keys and values", **EXACT)


@task("rotary_attention")
def test_values_do_not_know_where_they_stand(solution, randn, device):
    q, k, v = heads(randn, t=4, s=1, dv=8)
    expected = v.cpu().expand(2, 3, 4, 8).clone()
    found = solution.rotary_attention(q, k, v, torch.arange(7, 11, device=device), torch.tensor([7], device=device))
    assert_close(found, expected, because="there is one key, so each query gets its value as it is", **EXACT)


@task("rotary_attention")
@pytest.mark.parametrize("new", [1, 2, 4])
def test_the_last_queries_alone_get_what_the_whole_text_gives(solution, randn, device, new):
    q, k, v = heads(randn, 9, 9)
    places = torch.arange(50, 59, device=device).double()
    expected = rotary_by_hand(q, k, v, places, places)[:, :, -new:]
    found = solution.rotary_attention(q[:, :, -new:], k, v, places[-new:], places)
    assert_close(found, expected, because=f"decoding: the last {new} of nine queries with all nine keys", **EXACT)


@task("rotary_attention")
@pytest.mark.parametrize("shift", [1, 1000])
def test_all_positions_may_be_shifted_together(solution, randn, device, shift):
    q, k, v = heads(randn, 4, 6)
    queries, keys = (torch.arange(a, b, device=device).double() for a, b in ((2, 6), (0, 6)))
    expected = rotary_by_hand(q, k, v, queries, keys)
    found = solution.rotary_attention(q, k, v, queries + shift, keys + shift)
    assert_close(found, expected, because=f"positions moved by {shift}, differences did not", **EXACT)


@task("rotary_attention")
def test_rows_may_stand_at_different_places(solution, randn, device):
    q, k, v = heads(randn, 5, 7)
    queries = torch.tensor([[2, 3, 4, 5, 6], [10, 11, 12, 40, 41]], device=device).double()
    keys = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [9, 10, 11, 12, 39, 40, 41]], device=device).double()
    expected = rotary_by_hand(q, k, v, queries, keys)
    found = solution.rotary_attention(q, k, v, queries, keys)
    assert_close(found, expected, because="positions (B, T) and (B, S): each row has its own", **EXACT)


@task("rotary_attention")
@pytest.mark.parametrize("which", ["queries", "keys"])
def test_rows_may_differ_on_one_side(solution, randn, device, which):
    q, k, v = heads(randn, 3, 5)
    queries, keys = torch.tensor([4.0, 5, 6], device=device).double(), torch.arange(5, device=device).double()
    if which == "queries":
        queries = torch.stack((queries, queries - 2))
    else:
        keys = torch.stack((keys, keys + 2))
    expected = rotary_by_hand(q, k, v, queries, keys)
    found = solution.rotary_attention(q, k, v, queries, keys)
    assert_close(found, expected, because=f"only the {which} have positions for each row", **EXACT)


@task("rotary_attention")
@pytest.mark.parametrize("per_row", [False, True])
def test_equal_sizes_hide_no_mix_up(solution, randn, randint, per_row):
    q, k, v = heads(randn, 4, 4, 4, 4, 4, 4)
    queries, keys = (randint(0, 9, (4, 4) if per_row else (4,)).double() for _ in range(2))
    expected = rotary_by_hand(q, k, v, queries, keys)
    found = solution.rotary_attention(q, k, v, queries, keys)
    assert_close(found, expected, because="B = H = T = S = D = 4, so no shape shows a mix-up", **EXACT)


@task("rotary_attention")
def test_where_a_key_is_stored_does_not_matter(solution, randn, randperm, device):
    q, k, v = heads(randn, 6, 6)
    places, order = torch.arange(6, device=device).double(), randperm(6)
    expected = rotary_by_hand(q, k, v, places, places)
    found = solution.rotary_attention(q, k[:, :, order], v[:, :, order], places, places[order])
    assert_close(
        found, expected, because="keys and their positions were shuffled together, as in a ring buffer", **EXACT
    )


@task("rotary_attention")
def test_a_query_before_every_key_gets_zeros(solution, randn, device):
    q, k, v = heads(randn, 4, 3)
    queries, keys = torch.tensor([1, 5, 2, 9], device=device).double(), torch.tensor([3, 4, 5], device=device).double()
    expected = rotary_by_hand(q, k, v, queries, keys)
    found = solution.rotary_attention(q, k, v, queries, keys)
    assert_close(found, expected, because="the queries at 1 and 2 stand before the first key", **EXACT)


@task("rotary_attention")
def test_the_base_reaches_the_tables(solution, randn, device):
    q, k, v = heads(randn)
    places = torch.arange(5, device=device).double()
    expected = rotary_by_hand(q, k, v, places, places, 50.0)
    found = solution.rotary_attention(q, k, v, places, places, 50.0)
    assert_close(found, expected, because="base=50 was given", **EXACT)


@task("rotary_attention")
def test_half_queries_give_half_results(solution, randn, device):
    q, k, v = heads(randn, 6, 6, dtype=torch.bfloat16)
    places = torch.arange(6, device=device)
    expected = rotary_by_hand(q, k, v, places, places).bfloat16()
    found = solution.rotary_attention(q, k, v, places, places)
    assert_close(found, expected, rtol=5e-2, atol=5e-2, because="bfloat16 in, bfloat16 out")


@task("rotary_attention")
def test_rotary_attention_sends_gradients_back(solution, randn, device):
    q, k, v = heads(randn, 4, 4)
    places = torch.arange(4, device=device).double()
    angles = torch.from_numpy(angles_of(range(4), frequencies(8))).to(device)
    future = torch.ones(4, 4, dtype=torch.bool, device=device).triu(1)

    def by_hand(q, k, v):
        q, k = (turned_by_matrices(x, angles.cos(), angles.sin()) for x in (q, k))
        scores = torch.einsum("bhtd,bhsd->bhts", q, k) / math.sqrt(8)
        return torch.softmax(scores.masked_fill(future, -torch.inf), -1) @ v

    assert_gradients_close(
        lambda q, k, v: solution.rotary_attention(q, k, v, places, places), by_hand, [q, k, v], rtol=1e-8, atol=1e-9
    )


@task("rotary_attention")
@pytest.mark.parametrize(
    ("queries", "keys", "shape"), [(4, 6, "(2, 3, 5, 8)"), (1, 6, "(2, 3, 5, 8)"), (5, 5, "(2, 3, 6, 8)")]
)
def test_a_position_for_each_query_and_key(solution, randn, device, queries, keys, shape):
    q, k, v = heads(randn, 5, 6)
    places = (torch.arange(n, device=device) for n in (queries, keys))
    assert_raises(ValueError, solution.rotary_attention, q, k, v, *places, mentions=[shape])


@cost_case("rotary_attention")
def rotary_attention_cost(module, randn, device):
    q, k, v = heads(randn, 32, 32, 16, 16, 2, 4, torch.float32)
    places = torch.arange(32, device=device)
    return lambda: module.rotary_attention(q, k, v, places, places)


# half_layout


def golden(data_dir, device, *names):
    """Tensors of the golden file."""
    data = load_file(data_dir / "golden.safetensors")
    return tuple(data[name].to(device) for name in names)


@task("half_layout")
def test_a_quarter_turn_of_the_other_pairs(solution, device):
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]], device=device)
    cos, sin = torch.tensor([[0.0, 1.0]], device=device), torch.tensor([[1.0, 0.0]], device=device)
    expected = torch.tensor([[-3.0, 2.0, 1.0, 4.0]])
    found = solution.apply_rope_half(x, cos, sin)
    assert_close(found, expected, because="the first pair is (1, 3): a quarter turn makes it (-3, 1)")


@task("half_layout")
def test_it_is_llamas_rotation(solution, data_dir, device):
    q, k, cos, sin = golden(data_dir, device, "llama.q", "llama.k", "llama.cos", "llama.sin")
    expected_q, expected_k = golden(data_dir, "cpu", "llama.rotated_q", "llama.rotated_k")
    half = q.shape[-1] // 2
    cos, sin = cos[..., :half].contiguous(), sin[..., :half].contiguous()
    assert_close(solution.apply_rope_half(q, cos, sin), expected_q, because="q as the Llama of transformers turns it")
    assert_close(solution.apply_rope_half(k, cos, sin), expected_k, because="k as the Llama of transformers turns it")


@task("half_layout")
@pytest.mark.parametrize("lead", [(), (2,), (2, 3), (2, 3, 4)])
@pytest.mark.parametrize("width", [2, 6, 8])
def test_halves_turn_like_complex_numbers(solution, randn, rand, dtype, lead, width):
    x = randn(*lead, 5, width, dtype=dtype)
    angles, cos, sin = random_tables(rand, 5, width // 2, dtype=dtype)
    expected = turned(x, angles, "half").to(dtype)
    found = solution.apply_rope_half(x, cos, sin)
    assert_close(found, expected, because="x_i and x_{i + D/2} are a pair", **TOLERANCE[dtype])


@task("half_layout")
@pytest.mark.parametrize("shape", [(2, 3, 5, 6), (2, 5, 6), (3, 3, 5, 6), (4, 4, 4, 8)])
def test_each_row_turns_its_halves(solution, randn, rand, shape):
    x = randn(*shape)
    *lead, length, width = shape
    angles, cos, sin = random_tables(rand, shape[0], length, width // 2)
    spread = angles.reshape(shape[0], *[1] * (len(lead) - 1), length, width // 2)
    expected = turned(x, spread, "half").float()
    found = solution.apply_rope_half(x, cos, sin)
    because = f"tables {tuple(cos.shape)} for x {shape}: row b of the batch has table b, in all heads"
    assert_close(found, expected, because=because, **TOLERANCE[torch.float32])


@task("half_layout")
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_halves_of_half_precision_come_back_so(solution, randn, rand, kind):
    x = randn(2, 3, 16, 32, dtype=kind)
    _, cos, sin = random_tables(rand, 16, 16)
    a, b, c, s = numbers(x)[..., :16], numbers(x)[..., 16:], numbers(cos), numbers(sin)
    expected = torch.from_numpy(np.concatenate((a * c - b * s, a * s + b * c), -1)).to(kind)
    found = solution.apply_rope_half(x, cos, sin)
    one_bit = {torch.float16: 2**-10, torch.bfloat16: 2**-7}[kind]
    assert_close(
        found, expected, rtol=one_bit, atol=2e-6, because="products and sums in float32, rounded once at the end"
    )


@task("half_layout")
def test_the_halves_send_gradients_back(solution, randn, rand):
    x = randn(2, 3, 5, 6, dtype=torch.float64)
    _, cos, sin = random_tables(rand, 5, 3, dtype=torch.float64)
    assert_gradients_close(
        solution.apply_rope_half,
        lambda x, cos, sin: turned_by_matrices(x, cos, sin, "half"),
        [x, cos, sin],
        because="as a matrix per position does",
    )


@task("half_layout")
@pytest.mark.parametrize(("shape", "table"), MISFITS)
def test_tables_that_do_not_fit_the_halves_are_refused(solution, randn, rand, shape, table):
    _, cos, sin = random_tables(rand, *table)
    because = f"tables {table} do not belong to x {shape}"
    assert_raises(
        ValueError,
        solution.apply_rope_half,
        randn(*shape),
        cos,
        sin,
        mentions=[str(shape), str(table)],
        because=because,
    )


@task("half_layout")
def test_a_sine_of_another_shape_is_refused_here_too(solution, randn, rand):
    _, cos, _ = random_tables(rand, 5, 3)
    _, _, sin = random_tables(rand, 1, 3)
    assert_raises(ValueError, solution.apply_rope_half, randn(2, 5, 6), cos, sin, mentions=["(5, 3)", "(1, 3)"])


@task("half_layout")
@pytest.mark.parametrize("n_heads", [1, 3])
def test_rows_of_each_head_are_reordered(solution, device, n_heads):
    rows = torch.arange(n_heads * 6, device=device)[:, None].expand(-1, 4).contiguous()
    expected = torch.tensor([h * 6 + i for h in range(n_heads) for i in (0, 2, 4, 1, 3, 5)])[:, None].expand(-1, 4)
    found = solution.interleaved_to_half(rows, n_heads)
    assert_equal(found, expected, because="in each head of width 6: the even rows first, then the odd ones")


@task("half_layout")
@pytest.mark.parametrize("shape", [(12, 5), (12,), (12, 12), (12, 0)])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16])
def test_weights_and_biases_keep_shape_and_dtype(solution, randn, shape, kind):
    w = randn(*shape, dtype=kind)
    order = [h * 4 + i for h in range(3) for i in (0, 2, 1, 3)]
    expected = w.cpu()[order].clone()
    assert_equal(solution.interleaved_to_half(w, 3), expected, because="3 heads of width 4: rows 0, 2, 1, 3 of each")


@task("half_layout")
def test_a_strided_weight_is_reordered_as_well(solution, randn):
    w = randn(5, 12).T
    order = [h * 6 + i for h in range(2) for i in (0, 2, 4, 1, 3, 5)]
    expected = w.cpu()[order].clone()
    assert_equal(solution.interleaved_to_half(w, 2), expected, because="w is a transposed view, 2 heads of width 6")


@task("half_layout")
def test_scores_survive_the_conversion(solution, randn, rand):
    x, n, width = randn(2, 5, 7, dtype=torch.float64), 3, 8
    wq, wk = randn(n * width, 7, dtype=torch.float64), randn(n * width, 7, dtype=torch.float64)
    angles, cos, sin = random_tables(rand, 5, 4, dtype=torch.float64)

    def project(w):
        return (x @ w.T).unflatten(-1, (n, width)).transpose(1, 2)

    q, k = (numbers(turned(project(w), angles)) for w in (wq, wk))
    expected = torch.from_numpy(q @ k.swapaxes(-1, -2))
    q, k = (solution.apply_rope_half(project(solution.interleaved_to_half(w, n)), cos, sin) for w in (wq, wk))
    because = "new rows with the half layout, old rows with the interleaved one: the same scores"
    assert_close(q @ k.mT, expected, rtol=1e-9, atol=1e-9, because=because)


@task("half_layout")
@pytest.mark.parametrize(("shape", "n_heads"), [((12, 5), 5), ((12, 5), 4), ((15, 2), 3), ((7,), 2), ((6, 12), 4)])
def test_rows_without_whole_pairs_are_refused(solution, randn, shape, n_heads):
    assert_raises(ValueError, solution.interleaved_to_half, randn(*shape), n_heads, mentions=[str(shape), str(n_heads)])


@cost_case("half_layout")
def half_layout_cost(module, randn, rand):
    x = randn(2, 8, 64, 32)
    _, cos, sin = random_tables(rand, 64, 16)
    return lambda: module.apply_rope_half(x, cos, sin)


# alibi_bias


def slope_table(n_heads):
    """Slopes of a power of two."""
    return [2.0 ** (-8 * (h + 1) / n_heads) for h in range(n_heads)]


def distances(tq, tk, offset):
    """The distance of each query and key, one by one."""
    return torch.tensor([[abs(i + offset - j) for j in range(tk)] for i in range(tq)]).reshape(tq, tk)


@task("alibi_bias")
def test_eight_heads_have_the_slopes_of_the_paper(solution, device):
    slopes = torch.tensor([1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256])
    found = solution.alibi_bias(8, 1, 2, device=device)
    assert_close(found[:, 0, 0], -slopes, because="one step back costs the slope: 1/2, 1/4, ..., 1/256")


@task("alibi_bias")
@pytest.mark.parametrize("n_heads", [1, 2, 4, 8, 16])
def test_the_bias_is_minus_slope_times_distance(solution, device, n_heads):
    expected = -torch.tensor(slope_table(n_heads))[:, None, None] * distances(5, 5, 0)
    found = solution.alibi_bias(n_heads, 5, 5, device=device)
    assert_close(found, expected, because=f"the slopes of {n_heads} heads are powers of 2 ** (-8 / {n_heads})")


@task("alibi_bias")
@pytest.mark.parametrize("n_heads", [6, 12, 20])
def test_heads_between_two_powers_fill_the_gaps(solution, data_dir, device, n_heads):
    (slopes,) = golden(data_dir, "cpu", f"bloom.slopes.{n_heads}")
    expected = -slopes[:, None, None] * distances(3, 4, 1)
    found = solution.alibi_bias(n_heads, 3, 4, device=device)
    assert_close(found, expected, because=f"the slopes that Bloom uses for {n_heads} heads")


@task("alibi_bias")
@pytest.mark.parametrize(("n_heads", "extra"), [(3, [2**-2]), (5, [2**-1]), (7, [2**-1, 2**-3, 2**-5])])
def test_small_numbers_of_heads_fill_the_gaps_too(solution, device, n_heads, extra):
    whole = n_heads - len(extra)
    extra = [2 ** (-8 * (2 * h + 1) / (2 * whole)) for h in range(len(extra))]
    expected = -torch.tensor(slope_table(whole) + extra)
    found = solution.alibi_bias(n_heads, 1, 2, device=device)
    assert_close(found[:, 0, 0], expected, because=f"{whole} slopes and the first, third, ... of {2 * whole}")


@task("alibi_bias")
@pytest.mark.parametrize(("tq", "tk"), [(3, 5), (1, 6), (4, 2)])
def test_the_last_query_stands_at_the_last_key(solution, device, tq, tk):
    expected = -torch.tensor(slope_table(4))[:, None, None] * distances(tq, tk, tk - tq)
    found = solution.alibi_bias(4, tq, tk, device=device)
    assert_close(found, expected, because=f"{tq} queries and {tk} keys: the first query stands at {tk - tq}")


@task("alibi_bias")
@pytest.mark.parametrize("offset", [-3, 1, 2, 9])
def test_an_offset_moves_the_queries(solution, device, offset):
    expected = -torch.tensor(slope_table(2))[:, None, None] * distances(3, 5, offset)
    found = solution.alibi_bias(2, 3, 5, offset=offset, device=device)
    assert_close(found, expected, because=f"query i stands at i + {offset}")


@task("alibi_bias")
def test_an_offset_of_zero_is_an_offset(solution, device):
    expected = -torch.tensor(slope_table(2))[:, None, None] * distances(3, 5, 1)
    assert_close(solution.alibi_bias(2, 3, 5, offset=1, device=device), expected, because="query 0 stands at 1")
    expected = -torch.tensor(slope_table(2))[:, None, None] * distances(3, 5, 0)
    assert_close(solution.alibi_bias(2, 3, 5, offset=0, device=device), expected, because="query 0 stands at 0")


@task("alibi_bias")
@pytest.mark.parametrize(("tq", "tk"), [(0, 3), (3, 0), (0, 0)])
def test_a_bias_may_be_empty(solution, device, tq, tk):
    assert_equal(solution.alibi_bias(3, tq, tk, device=device), torch.zeros(3, tq, tk))


@task("alibi_bias")
def test_the_bias_is_made_where_it_was_asked_for(solution):
    bias = solution.alibi_bias(3, 2, 4, device="meta")
    found = (bias.device.type, bias.dtype, tuple(bias.shape))
    assert_equal(found, ("meta", torch.float32, (3, 2, 4)), because="device='meta' was asked for")


@task("alibi_bias")
def test_the_bias_is_float32_in_a_bfloat16_model(solution, device):
    expected = -torch.tensor(slope_table(4))[:, None, None] * distances(1, 300, 299)
    with default_dtype(torch.bfloat16):
        found = solution.alibi_bias(4, 1, 300, device=device)
    assert_close(found, expected, because="torch's default dtype was bfloat16")


@cost_case("alibi_bias")
def alibi_bias_cost(module, device):
    return lambda: module.alibi_bias(8, 64, 64, device=device)


# relative_bucket


def bucket_by_counting(rel, buckets=32, distance=128, bidirectional=True):
    """(bucket, certain): with whole numbers only; certain is False where rounding of a logarithm may decide."""
    first = 0
    if bidirectional:
        buckets //= 2
        first, d = (buckets if rel > 0 else 0), abs(rel)
    else:
        d = max(-rel, 0)
    exact = buckets // 2
    if d < exact:
        return first + d, True
    wide = buckets - exact
    reached = [d**wide * exact**step - exact**wide * distance**step for step in range(wide)]
    certain = all(abs(gap) > 1e-4 * d**wide * exact**step for step, gap in enumerate(reached) if step)
    return first + exact + max(step for step, gap in enumerate(reached) if gap >= 0), certain


def bucket_of(rel, *how):
    """The bucket alone."""
    return bucket_by_counting(rel, *how)[0]


@task("relative_bucket")
def test_near_keys_have_buckets_of_their_own(solution, device):
    rel = torch.tensor([0, -1, -2, -7], device=device)
    expected = torch.tensor([0, 1, 2, 7])
    found = solution.relative_bucket(rel)
    assert_equal(found, expected, because="a key up to seven places back has the bucket of its distance")


@task("relative_bucket")
@pytest.mark.parametrize("direction", ["both", "past"])
@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (16, 64)])
def test_the_buckets_are_those_of_t5(solution, data_dir, device, direction, buckets, distance):
    rel, expected = golden(data_dir, device, "t5.rel", f"t5.{direction}.{buckets}.{distance}")
    expected = expected.cpu()
    found = solution.relative_bucket(rel, buckets, distance, direction == "both")
    assert_equal(found, expected, because="rel from -300 to 300, bucket by bucket")


@task("relative_bucket")
def test_the_defaults_are_32_buckets_up_to_128_both_ways(solution, data_dir, device):
    rel, expected = golden(data_dir, device, "t5.rel", "t5.both.32.128")
    expected = expected.cpu()
    assert_equal(solution.relative_bucket(rel), expected, because="32 buckets, max_distance 128, both directions")


@task("relative_bucket")
@pytest.mark.parametrize(
    "how", [(20, 100, True), (10, 40, False), (8, 1000, True), (12, 30, False), (4, 9, True), (7, 50, False)]
)
def test_other_numbers_of_buckets(solution, device, how):
    counted = [(rel, *bucket_by_counting(rel, *how)) for rel in range(-150, 151)]
    rel = torch.tensor([one for one, _, certain in counted if certain], device=device)
    expected = torch.tensor([bucket for _, bucket, certain in counted if certain])
    found = solution.relative_bucket(rel, *how)
    because = f"{how[0]} buckets, max_distance {how[1]}, {'both ways' if how[2] else 'the past only'}"
    assert_equal(found, expected, because=because)


@task("relative_bucket")
@pytest.mark.parametrize("bidirectional", [True, False])
def test_what_is_far_away_is_in_the_last_bucket(solution, device, bidirectional):
    rel = torch.tensor([-129, -1000, -1_000_000, 129, 1000, 1_000_000], device=device)
    expected = torch.tensor([15, 15, 15, 31, 31, 31] if bidirectional else [31, 31, 31, 0, 0, 0])
    found = solution.relative_bucket(rel, bidirectional=bidirectional)
    assert_equal(found, expected, because="beyond max_distance nothing is told apart")


@task("relative_bucket")
@pytest.mark.parametrize("shape", [(), (0,), (2, 3, 4)])
def test_rel_has_any_shape(solution, randint, shape):
    rel = randint(-7, 8, shape)
    expected = torch.tensor([bucket_of(int(one)) for one in rel.flatten()], dtype=torch.long).reshape(shape)
    assert_equal(solution.relative_bucket(rel), expected, because=f"rel {shape} gives buckets {shape}")


@task("relative_bucket")
@pytest.mark.parametrize("direction", ["both", "past"])
def test_the_default_dtype_has_no_part_in_the_buckets(solution, data_dir, device, direction):
    rel, expected = golden(data_dir, device, "t5.rel", f"t5.{direction}.32.128")
    expected = expected.cpu()
    with default_dtype(torch.bfloat16):
        found = solution.relative_bucket(rel, bidirectional=direction == "both")
    assert_equal(found, expected, because="torch's default dtype was bfloat16")


# relative_bias


def bias_module(solution, device, randn, n_heads, *how):
    """A module with known random weights, and these."""
    module = solution.RelativeBias(n_heads, *how).to(device)
    weight = randn(how[0] if how else 32, n_heads)
    with torch.no_grad():
        module.weight.copy_(weight)
    return module, weight.cpu().clone()


def bias_by_loops(weight, queries, keys, *how):
    """(H, T, S), one place at a time; queries and keys are lists."""
    rows = [[weight[bucket_of(j - i, *how)] for j in keys] for i in queries]
    return torch.stack([torch.stack(row) for row in rows]).permute(2, 0, 1)


@task("relative_bias")
def test_a_new_bias_is_zero(solution):
    module = solution.RelativeBias(3, 16)
    shapes = {name: tuple(value.shape) for name, value in module.named_parameters()}
    assert_equal(shapes, {"weight": (16, 3)}, because="one parameter, weight (num_buckets, n_heads)")
    assert_equal(sorted(module.state_dict()), ["weight"], because="the state dict holds the weight alone")
    assert_equal(module.weight.detach(), torch.zeros(16, 3), because="it starts without a bias")
    assert_equal(tuple(solution.RelativeBias(5).weight.shape), (32, 5), because="32 buckets are the default")


@task("relative_bias")
def test_each_head_reads_its_column(solution, device, randn):
    module, weight = bias_module(solution, device, randn, 3)
    expected = bias_by_loops(weight, range(4), range(6))
    found = module(torch.arange(4, device=device), torch.arange(6, device=device))
    assert_close(found, expected, because="out[h, i, j] = weight[bucket of key j - query i, h]")


@task("relative_bias")
@pytest.mark.parametrize("how", [(16, 64, False), (8, 20, True), (16, 30)])
def test_the_module_passes_on_how_to_count(solution, device, randn, how):
    module, weight = bias_module(solution, device, randn, 2, *how)
    queries, keys = [40, 41, 90], [0, 3, 11, 26, 41, 77, 100]
    expected = bias_by_loops(weight, queries, keys, *how)
    found = module(torch.tensor(queries, device=device), torch.tensor(keys, device=device))
    assert_close(found, expected, because=f"RelativeBias(n_heads, {', '.join(map(str, how))})")


@task("relative_bias")
def test_the_defaults_reach_128_both_ways(solution, device, randn):
    module, weight = bias_module(solution, device, randn, 2)
    queries, keys = [100], [0, 12, 25, 36, 60, 68, 84, 100, 116, 117, 132, 150, 164, 180, 300]
    expected = bias_by_loops(weight, queries, keys)
    found = module(torch.tensor(queries, device=device), torch.tensor(keys, device=device))
    assert_close(found, expected, because="32 buckets, max_distance 128, both directions")


@task("relative_bias")
def test_rows_of_a_batch_have_their_own_bias(solution, device, randn):
    module, weight = bias_module(solution, device, randn, 3)
    queries, keys = [[3, 4], [10, 11]], [[0, 1, 2, 3, 4], [5, 8, 9, 10, 11]]
    expected = torch.stack([bias_by_loops(weight, q, k) for q, k in zip(queries, keys, strict=True)])
    found = module(torch.tensor(queries, device=device), torch.tensor(keys, device=device))
    assert_close(found, expected, because="positions (B, T) and (B, S) give (B, H, T, S)")


@task("relative_bias")
def test_equal_sizes_do_not_swap_axes(solution, device, randn):
    module, weight = bias_module(solution, device, randn, 4)
    expected = bias_by_loops(weight, range(4), range(4))
    found = module(torch.arange(4, device=device), torch.arange(4, device=device))
    assert_close(found, expected, because="H = T = S = 4, so no shape shows a mix-up")


@task("relative_bias")
@pytest.mark.parametrize(("t", "s"), [(0, 3), (3, 0)])
def test_a_relative_bias_may_be_empty(solution, device, randn, t, s):
    module, _ = bias_module(solution, device, randn, 2)
    found = module(torch.arange(t, device=device), torch.arange(s, device=device))
    assert_equal(tuple(found.shape), (2, t, s), because="no queries or no keys")


@task("relative_bias")
def test_each_bucket_learns_from_all_its_places(solution, device, randn):
    module, _ = bias_module(solution, device, randn, 2)
    weighting = randn(2, 5, 5)
    expected = torch.zeros(32, 2)
    for i in range(5):
        for j in range(5):
            expected[bucket_of(j - i)] += weighting.cpu()[:, i, j]
    places = torch.arange(5, device=device)
    (module(places, places) * weighting).sum().backward()
    assert_close(module.weight.grad, expected, because="a bucket is shared by all pairs of the same distance")


@cost_case("relative_bucket")
def relative_bucket_cost(module, device):
    places = torch.arange(64, device=device)
    return lambda: module.relative_bucket(places - places[:, None])


@cost_case("relative_bias")
def relative_bias_cost(module, device):
    bias, places = module.RelativeBias(4).to(device), torch.arange(64, device=device)
    return lambda: bias(places, places)


# ntk_base


@task("ntk_base")
@pytest.mark.parametrize("dim", [4, 8, 64, 128])
@pytest.mark.parametrize("factor", [2.0, 8.0, 0.5])
def test_the_slowest_pair_is_slowed_down_by_the_factor(solution, dim, factor):
    slow = frequencies(dim)[-1]
    base = solution.ntk_base(10000.0, dim, factor)
    assert_that(isinstance(base, float), "the new base is a float", value=type(base).__name__)
    found = float(slow / frequencies(dim, base)[-1])
    assert_close(found, factor, because="old over new frequency of the last pair", rtol=1e-9)


@task("ntk_base")
@pytest.mark.parametrize(("base", "dim", "factor"), [(10000.0, 64, 8.0), (500.0, 4, 3.0), (500000.0, 128, 4.0)])
def test_any_base_can_be_stretched(solution, base, dim, factor):
    expected = math.exp(math.log(base) + math.log(factor) * dim / (dim - 2))
    found = solution.ntk_base(base, dim, factor)
    assert_close(found, expected, because="the new base, from the condition on the last pair", rtol=1e-9)


@task("ntk_base")
def test_a_factor_of_one_changes_nothing(solution):
    assert_close(solution.ntk_base(10000.0, 64, 1.0), 10000.0, because="nothing is stretched", rtol=1e-9)


@task("ntk_base")
def test_whole_numbers_are_taken_as_well(solution):
    expected = 10000 * 4.0 ** (8 / 6)
    found = solution.ntk_base(10000, 8, 4)
    assert_that(isinstance(found, float), "the new base is a float", value=type(found).__name__)
    assert_close(found, expected, because="base 10000, factor 4", rtol=1e-9)


@task("ntk_base")
def test_each_pair_is_slowed_down_more_than_the_one_before(solution):
    base = solution.ntk_base(10000.0, 16, 8.0)
    stretch = frequencies(16) / frequencies(16, base)
    expected = torch.from_numpy(8.0 ** (np.arange(8) / 7))
    assert_close(torch.from_numpy(stretch), expected, because="from 1 for the first pair to 8 for the last", rtol=1e-9)


@task("ntk_base")
@pytest.mark.parametrize("dim", [2, 3, 5, 7, 0])
def test_there_must_be_a_first_and_a_last_pair(solution, dim):
    assert_raises(ValueError, solution.ntk_base, 10000.0, dim, 4.0, mentions=[str(dim)])


def mean_chord(dim, base, interpolation=1.0):
    """Distance of neighbors on each unit circle, in complex numbers."""
    here, there = np.exp(1j * 7 * frequencies(dim, base)), np.exp(1j * (7 + 1 / interpolation) * frequencies(dim, base))
    return float(np.abs(there - here).mean())


@task("ntk_base")
@pytest.mark.parametrize(("dim", "base"), [(2, 10000.0), (4, 100.0), (64, 10000.0), (128, 500000.0), (6, 3.0)])
def test_resolution_is_how_far_a_step_goes(solution, dim, base):
    found = solution.local_resolution(dim, base)
    assert_that(isinstance(found, float), "the resolution is a float", value=type(found).__name__)
    assert_close(found, mean_chord(dim, base), because="|exp(i(p+1)w) - exp(ipw)|, averaged over the pairs", atol=1e-6)


@task("ntk_base")
@pytest.mark.parametrize("interpolation", [2.0, 8.0, 0.1])
def test_interpolation_squeezes_the_positions(solution, interpolation):
    expected = mean_chord(64, 10000.0, interpolation)
    found = solution.local_resolution(64, interpolation=interpolation)
    assert_close(found, expected, because=f"positions are divided by {interpolation:g}", atol=1e-6)


@task("ntk_base")
def test_a_chord_has_no_sign(solution):
    expected = mean_chord(2, 10000.0, 0.125)
    found = solution.local_resolution(2, interpolation=0.125)
    assert_close(
        found, expected, because="a turn of eight radians ends on the other side: a length is positive", atol=1e-6
    )


@task("ntk_base")
def test_a_new_base_keeps_what_interpolation_destroys(solution):
    before = mean_chord(64, 10000.0)
    stretched = solution.local_resolution(64, solution.ntk_base(10000.0, 64, 8.0))
    squeezed = solution.local_resolution(64, interpolation=8.0)
    assert_that(stretched > 0.8 * before, "a new base keeps most of the resolution", value=round(stretched, 6))
    assert_that(squeezed < 0.15 * before, "interpolation by 8 leaves an eighth", value=round(squeezed, 6))
