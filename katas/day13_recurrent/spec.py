import math
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

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
    task,
    unchanged,
)

B, T, I, H = 3, 5, 4, 6  # noqa: E741 - the letters of the stub


def near(dtype):
    return {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}


def weights_of(gates, randn, dtype=torch.float64, width=I, hidden=H):
    """Random w_ih, w_hh, b_ih and b_hh of a cell."""
    rows = gates * hidden
    return [randn(*shape, dtype=dtype) for shape in [(rows, width), (rows, hidden), (rows,), (rows,)]]


def torch_cell(kind, weights):
    """PyTorch's own cell with these weights, as a function of x and state whose gradients reach the weights."""
    rows = {nn.RNNCell: 1, nn.LSTMCell: 4, nn.GRUCell: 3}[kind]
    w_ih = weights[0]
    cell = kind(w_ih.shape[1], w_ih.shape[0] // rows, device=w_ih.device, dtype=w_ih.dtype)
    names = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]
    return lambda x, state: torch.func.functional_call(cell, dict(zip(names, weights, strict=True)), (x, state))


def expected_step(kind, x, state, weights):
    with torch.no_grad():
        return torch_cell(kind, weights)(x, state)


def wrong_shapes(gates):
    """(which argument, its wrong shape, the shape it needs) for x (2, 3) and h (2, 4)."""
    rows = gates * 4
    return [
        ("h", (5, 4), (2, 4)),
        ("h", (1, 4), (2, 4)),
        ("w_ih", (rows, 2), (rows, 3)),
        ("w_ih", (rows + gates, 3), (rows, 3)),
        ("w_ih", (3, rows), (rows, 3)),
        ("w_hh", (rows, 5), (rows, 4)),
        ("w_hh", (1, 4), (rows, 4)),
        ("b_ih", (1,), (rows,)),
        ("b_ih", (rows, 1), (rows,)),
        ("b_hh", (1,), (rows,)),
        ("b_hh", (rows + 1,), (rows,)),
    ]


def wrong_arguments(gates, which, shape, randn):
    rows = gates * 4
    shapes = {"x": (2, 3), "h": (2, 4), "w_ih": (rows, 3), "w_hh": (rows, 4), "b_ih": (rows,), "b_hh": (rows,)}
    shapes[which] = shape
    return {name: randn(*size) for name, size in shapes.items()}


# rnn_step


@task("rnn_step")
def test_the_plain_cell_of_torch(solution, randn, dtype):
    x, h, weights = randn(B, I, dtype=dtype), randn(B, H, dtype=dtype), weights_of(1, randn, dtype)
    expected = expected_step(nn.RNNCell, x, h, weights)
    assert_close(solution.rnn_step(x, h, *weights), expected, because="this is nn.RNNCell", **near(dtype))


@task("rnn_step")
def test_a_plain_cell_where_all_sizes_are_equal(solution, randn):
    x, h, weights = randn(3, 3), randn(3, 3), weights_of(1, randn, torch.float32, 3, 3)
    expected = expected_step(nn.RNNCell, x, h, weights)
    found = solution.rnn_step(x, h, *weights)
    assert_close(found, expected, because="weights are (out, in), and the bias runs over outputs", **near(x.dtype))


@task("rnn_step")
def test_a_plain_cell_in_bfloat16(solution, randn):
    x, h = randn(B, I).bfloat16(), randn(B, H).bfloat16()
    weights = [w.bfloat16() for w in weights_of(1, randn, torch.float32)]
    expected = expected_step(nn.RNNCell, x.float(), h.float(), [w.float() for w in weights]).bfloat16()
    assert_close(solution.rnn_step(x, h, *weights), expected, because="bfloat16 in, bfloat16 out", rtol=5e-2, atol=5e-2)


@task("rnn_step")
def test_a_plain_cell_with_strides(solution, randn):
    x, h = noncontiguous(randn(B, I, dtype=torch.float64)), randn(H, B, dtype=torch.float64).T
    weights = weights_of(1, randn)
    weights[0] = noncontiguous(weights[0])
    expected = expected_step(nn.RNNCell, x, h, weights)
    assert_close(solution.rnn_step(x, h, *weights), expected, because="strides do not matter")


@task("rnn_step")
def test_a_plain_cell_without_rows(solution, randn):
    found = solution.rnn_step(randn(0, I), randn(0, H), *weights_of(1, randn, torch.float32))
    assert_close(found, torch.zeros(0, H), because="a batch of no rows")


@task("rnn_step")
def test_gradients_of_a_plain_cell(solution, randn):
    inputs = [randn(B, I, dtype=torch.float64), randn(B, H, dtype=torch.float64), *weights_of(1, randn)]
    assert_gradients_close(solution.rnn_step, lambda x, h, *w: torch_cell(nn.RNNCell, w)(x, h), inputs)


@task("rnn_step")
@pytest.mark.parametrize("which, shape, needed", wrong_shapes(1), ids=str)
def test_a_plain_cell_refuses_what_does_not_fit(solution, randn, which, shape, needed):
    arguments = wrong_arguments(1, which, shape, randn)
    because = f"{which} {shape} where {needed} is needed"
    assert_raises(
        ValueError, solution.rnn_step, *arguments.values(), mentions=[str(shape), str(needed)], because=because
    )


@cost_case("rnn_step")
def rnn_step_cost(module, randn):
    x, h, weights = randn(8, 16), randn(8, 32), weights_of(1, randn, torch.float32, 16, 32)
    return lambda: module.rnn_step(x, h, *weights)


# lstm_step


@task("lstm_step")
@pytest.mark.parametrize("part", [0, 1], ids=["h", "c"])
def test_the_lstm_cell_of_torch(solution, randn, dtype, part):
    x, state = randn(B, I, dtype=dtype), (randn(B, H, dtype=dtype), randn(B, H, dtype=dtype))
    weights = weights_of(4, randn, dtype)
    expected = expected_step(nn.LSTMCell, x, state, weights)[part]
    found = solution.lstm_step(x, state, *weights)
    assert_that(
        isinstance(found, tuple) and len(found) == 2, "the result is the tuple (h, c)", value=type(found).__name__
    )
    assert_close(found[part], expected, because="this is nn.LSTMCell", **near(dtype))


@task("lstm_step")
@pytest.mark.parametrize("gate", range(4), ids="ifgo")
def test_each_gate_by_itself(solution, randn, gate):
    x, h, c = randn(1, 2, dtype=torch.float64), randn(1, 2, dtype=torch.float64), randn(1, 2, dtype=torch.float64)
    w_ih, w_hh = x.new_zeros(8, 2), x.new_zeros(8, 2)
    b_ih, b_hh = x.new_full((8,), 0.25), x.new_zeros(8)
    b_ih[2 * gate : 2 * gate + 2] = 2.0
    values = [torch.tensor(2.0 if g == gate else 0.25, dtype=torch.float64) for g in range(4)]
    i, f, g, o = values[0].sigmoid(), values[1].sigmoid(), values[2].tanh(), values[3].sigmoid()
    expected_c = f * c + i * g
    found = solution.lstm_step(x, (h, c), w_ih, w_hh, b_ih, b_hh)
    assert_close(found[1], expected_c, because="c' = f * c + i * g; the gates in the rows are i, f, g, o")
    assert_close(found[0], o * expected_c.tanh(), because="h' = o * tanh(c')")


@task("lstm_step")
def test_an_lstm_cell_where_all_sizes_are_equal(solution, randn):
    x, state = randn(4, 4), (randn(4, 4), randn(4, 4))
    weights = weights_of(4, randn, torch.float32, 4, 4)
    expected = expected_step(nn.LSTMCell, x, state, weights)
    assert_close(solution.lstm_step(x, state, *weights), expected, because="weights are (out, in)", **near(x.dtype))


@task("lstm_step")
def test_an_lstm_cell_in_bfloat16(solution, randn):
    x, state = randn(B, I).bfloat16(), (randn(B, H).bfloat16(), randn(B, H).bfloat16())
    weights = [w.bfloat16() for w in weights_of(4, randn, torch.float32)]
    expected = expected_step(nn.LSTMCell, x.float(), tuple(s.float() for s in state), [w.float() for w in weights])
    found = solution.lstm_step(x, state, *weights)
    because = "bfloat16 in, bfloat16 out"
    assert_close(found[0], expected[0].bfloat16(), because=because, rtol=5e-2, atol=1e-1)
    assert_close(found[1], expected[1].bfloat16(), because=because, rtol=5e-2, atol=1e-1)


@task("lstm_step")
def test_gates_that_are_far_from_zero(solution, randn):
    x, state, weights = randn(B, I, scale=100.0), (randn(B, H), randn(B, H)), weights_of(4, randn, torch.float32)
    expected = expected_step(nn.LSTMCell, x.double(), tuple(s.double() for s in state), [w.double() for w in weights])
    found = solution.lstm_step(x, state, *weights)
    assert_that(bool(torch.isfinite(found[0]).all()), "gates of 1000 and more do not make NaN")
    assert_close(found[1], expected[1].float(), because="saturated gates", rtol=1e-3, atol=1e-3)


@task("lstm_step")
def test_gradients_of_an_lstm_cell(solution, randn):
    x, h, c = (randn(B, n, dtype=torch.float64) for n in (I, H, H))
    inputs = [x, h, c, *weights_of(4, randn)]
    assert_gradients_close(
        lambda x, h, c, *w: torch.cat(solution.lstm_step(x, (h, c), *w)),
        lambda x, h, c, *w: torch.cat(torch_cell(nn.LSTMCell, w)(x, (h, c))),
        inputs,
    )


@task("lstm_step")
def test_an_lstm_step_changes_no_state(solution, randn):
    x, h, c, weights = randn(B, I), randn(B, H), randn(B, H), weights_of(4, randn, torch.float32)
    with unchanged(h, c):
        solution.lstm_step(x, (h, c), *weights)


@task("lstm_step")
@pytest.mark.parametrize("which, shape, needed", wrong_shapes(4), ids=str)
def test_an_lstm_cell_refuses_what_does_not_fit(solution, randn, which, shape, needed):
    x, h, *weights = wrong_arguments(4, which, shape, randn).values()
    c = randn(*h.shape)
    because = f"{which} {shape} where {needed} is needed"
    mentions = [str(shape), str(needed)]
    assert_raises(ValueError, solution.lstm_step, x, (h, c), *weights, mentions=mentions, because=because)


@task("lstm_step")
@pytest.mark.parametrize("shape", [(1, 4), (4,), (2, 1)], ids=str)
def test_a_cell_state_that_does_not_fit(solution, randn, shape):
    x, h, *weights = wrong_arguments(4, "h", (2, 4), randn).values()
    mentions = [str(shape), "(2, 4)"]
    assert_raises(
        ValueError,
        solution.lstm_step,
        x,
        (h, randn(*shape)),
        *weights,
        mentions=mentions,
        because="c has the shape of h",
    )


@cost_case("lstm_step")
def lstm_step_cost(module, randn):
    x, state, weights = randn(8, 16), (randn(8, 32), randn(8, 32)), weights_of(4, randn, torch.float32, 16, 32)
    return lambda: module.lstm_step(x, state, *weights)


# gru_step


@task("gru_step")
def test_the_gru_cell_of_torch(solution, randn, dtype):
    x, h, weights = randn(B, I, dtype=dtype), randn(B, H, dtype=dtype), weights_of(3, randn, dtype)
    expected = expected_step(nn.GRUCell, x, h, weights)
    assert_close(solution.gru_step(x, h, *weights), expected, because="this is nn.GRUCell", **near(dtype))


@task("gru_step")
def test_a_gru_cell_without_biases(solution, randn):
    x, h = randn(B, I, dtype=torch.float64), randn(B, H, dtype=torch.float64)
    w_ih, w_hh, b_ih, b_hh = weights_of(3, randn)
    weights = [w_ih, w_hh, b_ih * 0, b_hh * 0]
    expected = expected_step(nn.GRUCell, x, h, weights)
    assert_close(solution.gru_step(x, h, *weights), expected, because="all biases are 0 here")


@task("gru_step")
def test_the_update_gate_keeps_the_old_state(solution, randn):
    x, h = randn(B, I, dtype=torch.float64), randn(B, H, dtype=torch.float64)
    w_ih, w_hh, b_ih, b_hh = weights_of(3, randn)
    b_ih[H : 2 * H] = 1000.0
    found = solution.gru_step(x, h, w_ih, w_hh, b_ih, b_hh)
    assert_close(found, h.clone(), because="where z is 1 the state stays as it was")


@task("gru_step")
def test_a_closed_reset_gate_hides_the_hidden_bias_too(solution, randn):
    x, h = randn(B, I, dtype=torch.float64), randn(B, H, dtype=torch.float64)
    w_ih, w_hh, b_ih, b_hh = weights_of(3, randn)
    b_ih[:H], b_ih[H : 2 * H] = -1000.0, -1000.0
    expected = torch.tanh(x @ w_ih[2 * H :].T + b_ih[2 * H :])
    found = solution.gru_step(x, h, w_ih, w_hh, b_ih, b_hh)
    assert_close(found, expected, because="with r = 0 and z = 0 it is n = tanh(W_in x + b_in), without b_hn")


@task("gru_step")
def test_a_gru_cell_where_all_sizes_are_equal(solution, randn):
    x, h, weights = randn(3, 3), randn(3, 3), weights_of(3, randn, torch.float32, 3, 3)
    expected = expected_step(nn.GRUCell, x, h, weights)
    assert_close(solution.gru_step(x, h, *weights), expected, because="weights are (out, in)", **near(x.dtype))


@task("gru_step")
def test_a_gru_cell_in_bfloat16(solution, randn):
    x, h = randn(B, I).bfloat16(), randn(B, H).bfloat16()
    weights = [w.bfloat16() for w in weights_of(3, randn, torch.float32)]
    expected = expected_step(nn.GRUCell, x.float(), h.float(), [w.float() for w in weights]).bfloat16()
    assert_close(solution.gru_step(x, h, *weights), expected, because="bfloat16 in, bfloat16 out", rtol=5e-2, atol=1e-1)


@task("gru_step")
def test_gradients_of_a_gru_cell(solution, randn):
    inputs = [randn(B, I, dtype=torch.float64), randn(B, H, dtype=torch.float64), *weights_of(3, randn)]
    assert_gradients_close(solution.gru_step, lambda x, h, *w: torch_cell(nn.GRUCell, w)(x, h), inputs)


@task("gru_step")
@pytest.mark.parametrize("which, shape, needed", wrong_shapes(3), ids=str)
def test_a_gru_cell_refuses_what_does_not_fit(solution, randn, which, shape, needed):
    arguments = wrong_arguments(3, which, shape, randn)
    because = f"{which} {shape} where {needed} is needed"
    assert_raises(
        ValueError, solution.gru_step, *arguments.values(), mentions=[str(shape), str(needed)], because=because
    )


@cost_case("gru_step")
def gru_step_cost(module, randn):
    x, h, weights = randn(8, 16), randn(8, 32), weights_of(3, randn, torch.float32, 16, 32)
    return lambda: module.gru_step(x, h, *weights)


# unroll


def layer_of(kind, randn, dtype=torch.float64, layers=1, width=I, hidden=H):
    """PyTorch's recurrent layer with random weights on the device under test."""
    device = randn(1).device
    layer = kind(width, hidden, layers, batch_first=True, device=device, dtype=dtype)
    for parameter in layer.parameters():
        parameter.data = randn(*parameter.shape, dtype=dtype, scale=0.7)
    return layer


def steps_of(kind, layer):
    """One layer of PyTorch as a step function."""
    return torch_cell(kind, list(layer.parameters()))


def packed(layer, xs, lengths, state):
    """What PyTorch's layer makes of ragged rows: (outputs with zeros, state)."""
    rows = pack_padded_sequence(xs, lengths.cpu(), batch_first=True, enforce_sorted=False)
    outputs, state = layer(rows, state)
    return pad_packed_sequence(outputs, batch_first=True, total_length=xs.shape[1])[0], state


def summing(x, state):
    return state + x


def ragged(device):
    return torch.tensor([3, 5, 1, 4], device=device)


@task("unroll")
@pytest.mark.parametrize("part", [0, 1], ids=["outputs", "state"])
def test_a_sum_over_time(solution, randn, part):
    xs, start = randn(B, T, H, dtype=torch.float64), randn(B, H, dtype=torch.float64)
    sums = start[:, None] + xs.cumsum(1)
    expected = (sums, sums[:, -1])[part]
    found = solution.unroll(summing, xs, start)[part]
    assert_close(found, expected, because="with state + x as the step, the outputs are running sums")


@task("unroll")
def test_a_gru_over_time(solution, randn, dtype):
    layer, xs, h = layer_of(nn.GRU, randn, dtype), randn(B, T, I, dtype=dtype), randn(B, H, dtype=dtype)
    with torch.no_grad():
        outputs, end = layer(xs, h[None])
        found = solution.unroll(steps_of(nn.GRUCell, layer), xs, h)
    assert_close(found[0], outputs, because="the outputs of nn.GRU", **near(dtype))
    assert_close(found[1], end[0], because="the last state of nn.GRU", **near(dtype))


@task("unroll")
def test_an_lstm_over_time(solution, randn, dtype):
    layer, xs = layer_of(nn.LSTM, randn, dtype), randn(B, T, I, dtype=dtype)
    h, c = randn(B, H, dtype=dtype), randn(B, H, dtype=dtype)
    with torch.no_grad():
        outputs, (end_h, end_c) = layer(xs, (h[None], c[None]))
        found, state = solution.unroll(steps_of(nn.LSTMCell, layer), xs, (h, c))
    assert_that(isinstance(state, tuple), "a state that is a tuple stays one", value=type(state).__name__)
    assert_close(found, outputs, because="the outputs are the h of nn.LSTM", **near(dtype))
    assert_close(state, (end_h[0], end_c[0]), because="the last (h, c) of nn.LSTM", **near(dtype))


@task("unroll")
@pytest.mark.parametrize("part", [0, 1], ids=["outputs", "state"])
def test_as_many_rows_as_times(solution, randn, part):
    layer, xs, h = layer_of(nn.GRU, randn), randn(T, T, I, dtype=torch.float64), randn(T, H, dtype=torch.float64)
    with torch.no_grad():
        outputs, end = layer(xs, h[None])
        found = solution.unroll(steps_of(nn.GRUCell, layer), xs, h)[part]
    assert_close(found, (outputs, end[0])[part], because="xs is (B, T, I): time is the second dimension")


@task("unroll")
@pytest.mark.parametrize("part", [0, 1], ids=["outputs", "state"])
def test_ragged_rows_of_a_gru(solution, randn, device, part):
    layer, xs, h = layer_of(nn.GRU, randn), randn(4, T, I, dtype=torch.float64), randn(4, H, dtype=torch.float64)
    with torch.no_grad():
        outputs, end = packed(layer, xs, ragged(device), h[None])
        found = solution.unroll(steps_of(nn.GRUCell, layer), xs, h, ragged(device))[part]
    assert_close(found, (outputs, end[0])[part], because="packed nn.GRU; the lengths are 3, 5, 1, 4")


@task("unroll")
@pytest.mark.parametrize("part", [0, 1, 2], ids=["outputs", "h", "c"])
def test_ragged_rows_of_an_lstm(solution, randn, device, part):
    layer, xs = layer_of(nn.LSTM, randn), randn(4, T, I, dtype=torch.float64)
    h, c = randn(4, H, dtype=torch.float64), randn(4, H, dtype=torch.float64)
    with torch.no_grad():
        outputs, (end_h, end_c) = packed(layer, xs, ragged(device), (h[None], c[None]))
        found, state = solution.unroll(steps_of(nn.LSTMCell, layer), xs, (h, c), ragged(device))
    expected = (outputs, end_h[0], end_c[0])[part]
    assert_close((found, *state)[part], expected, because="packed nn.LSTM; the lengths are 3, 5, 1, 4")


@task("unroll")
def test_a_ragged_state_stays_a_tuple(solution, randn, device):
    h, c = randn(4, H), randn(4, H)
    _, state = solution.unroll(lambda x, s: (s[0] + x, s[1] * 2), randn(4, T, H), (h, c), ragged(device))
    assert_that(
        isinstance(state, tuple) and len(state) == 2, "a state that is a tuple stays one", value=type(state).__name__
    )


@task("unroll")
def test_outputs_of_padding_are_zeros(solution, randn, device):
    xs, start, lengths = randn(4, T, H), randn(4, H), ragged(device)
    padding = torch.arange(T, device=device) >= lengths[:, None]
    outputs, _ = solution.unroll(summing, xs, start, lengths)
    assert_close(outputs[padding], torch.zeros(7, H), because="beyond its length a row puts out 0")


@task("unroll")
def test_a_row_of_length_zero(solution, randn, device):
    xs, start = randn(3, T, H), randn(3, H)
    expected_outputs, expected_state = xs.new_zeros(3, T, H), start.clone()
    expected_outputs[1] = start[1] + xs[1].cumsum(0)
    expected_state[1] = expected_outputs[1, -1]
    outputs, state = solution.unroll(summing, xs, start, torch.tensor([0, T, 0], device=device))
    assert_close(state, expected_state, because="a row of length 0 keeps the state it had", **near(xs.dtype))
    assert_close(outputs, expected_outputs, because="and all of its outputs are 0", **near(xs.dtype))


@task("unroll")
def test_no_row_has_anything(solution, randn, device):
    xs, start = randn(2, T, H), randn(2, H)
    expected = start.clone()
    outputs, state = solution.unroll(summing, xs, start, torch.zeros(2, dtype=torch.long, device=device))
    assert_close(state, expected, because="all lengths are 0")
    assert_close(outputs, torch.zeros(2, T, H), because="all lengths are 0, T is not")


@task("unroll")
@pytest.mark.parametrize("ragged_too", [False, True], ids=["without lengths", "with lengths"])
def test_no_time_at_all(solution, randn, device, ragged_too):
    h, c = randn(B, H, dtype=torch.float64), randn(B, 2, dtype=torch.float64)
    expected = h.clone(), c.clone()
    lengths = torch.zeros(B, dtype=torch.long, device=device) if ragged_too else None
    outputs, state = solution.unroll(lambda x, s: s, randn(B, 0, I), (h, c), lengths)
    assert_close(
        outputs, torch.zeros(B, 0, H, dtype=torch.float64), because="no steps, no outputs; H is that of the state"
    )
    assert_close(state, expected, because="the state comes back as it was")


@task("unroll")
def test_no_time_and_one_tensor(solution, randn):
    h = randn(B, H)
    expected = h.clone()
    outputs, state = solution.unroll(summing, randn(B, 0, H), h)
    assert_close(outputs, torch.zeros(B, 0, H), because="T = 0")
    assert_close(state, expected, because="T = 0")


@task("unroll")
def test_no_rows_at_all(solution, randn):
    outputs, state = solution.unroll(summing, randn(0, T, H), randn(0, H))
    assert_close(outputs, torch.zeros(0, T, H), because="B = 0")
    assert_close(state, torch.zeros(0, H), because="B = 0")


@task("unroll")
def test_full_lengths_are_no_lengths(solution, randn, device):
    xs, start = randn(B, T, H), randn(B, H)
    expected = start[:, None] + xs.cumsum(1)
    outputs, state = solution.unroll(summing, xs, start, torch.full((B,), T, device=device))
    assert_close(outputs, expected, because="every row is as long as T", **near(xs.dtype))
    assert_close(state, expected[:, -1], because="every row is as long as T", **near(xs.dtype))


@task("unroll")
def test_the_order_of_rows_does_not_matter(solution, randn, device):
    layer, xs, h = layer_of(nn.GRU, randn), randn(4, T, I, dtype=torch.float64), randn(4, H, dtype=torch.float64)
    order = torch.tensor([2, 0, 3, 1], device=device)
    step = steps_of(nn.GRUCell, layer)
    with torch.no_grad():
        outputs, state = solution.unroll(step, xs, h, ragged(device))
        again, state_again = solution.unroll(step, xs[order], h[order], ragged(device)[order])
    assert_close(again, outputs[order], because="rows in another order give outputs in another order")
    assert_close(state_again, state[order], because="rows in another order give states in another order")


@task("unroll")
def test_what_padding_holds_changes_nothing(solution, randn, device):
    layer, xs, h = layer_of(nn.GRU, randn), randn(4, T, I, dtype=torch.float64), randn(4, H, dtype=torch.float64)
    padding = torch.arange(T, device=device) >= ragged(device)[:, None]
    other = torch.where(padding[..., None], 1000.0, xs)
    step = steps_of(nn.GRUCell, layer)
    with torch.no_grad():
        expected = solution.unroll(step, xs, h, ragged(device))
        found = solution.unroll(step, other, h, ragged(device))
    assert_close(found[0], expected[0], because="1000 in the padding instead of small numbers")
    assert_close(found[1], expected[1], because="1000 in the padding instead of small numbers")


@task("unroll")
@pytest.mark.parametrize("ragged_too", [False, True], ids=["without lengths", "with lengths"])
def test_gradients_through_time(solution, randn, device, ragged_too):
    layer = layer_of(nn.GRU, randn)
    lengths = ragged(device) if ragged_too else None

    def oracle(xs, h):
        if ragged_too:
            outputs, end = packed(layer, xs, lengths, h[None])
        else:
            outputs, end = layer(xs, h[None])
        return torch.cat([outputs, end[0][:, None]], 1)

    def run(xs, h):
        outputs, end = solution.unroll(step, xs, h, lengths)
        return torch.cat([outputs, end[:, None]], 1)

    step = steps_of(nn.GRUCell, layer)
    inputs = [randn(4, T, I, dtype=torch.float64), randn(4, H, dtype=torch.float64)]
    assert_gradients_close(run, oracle, inputs, because="gradients of nn.GRU")


@task("unroll")
def test_the_step_is_called_once_for_each_time(solution, randn):
    xs, start, seen = randn(B, T, H), randn(B, H), []
    expected = xs.clone().transpose(0, 1)

    def step(x, state):
        seen.append(x.clone())
        return state + x

    solution.unroll(step, xs, start)
    assert_equal(len(seen), T, because="one call of the step for each time")
    assert_close(torch.stack(seen), expected, because="each call sees all rows of one time, in order")


@task("unroll")
def test_ragged_rows_cost_no_more_calls(solution, randn, device):
    seen = []

    def step(x, state):
        seen.append(tuple(x.shape))
        return state + x

    solution.unroll(step, randn(4, T, H), randn(4, H), ragged(device))
    assert_equal(seen, [(4, H)] * T, because="at most T calls, with all rows")


@task("unroll")
def test_the_dtype_is_that_of_the_state(solution, randn, device):
    xs, start = randn(4, T, H), randn(4, H, dtype=torch.float64)
    outputs, state = solution.unroll(lambda x, s: s + x.double(), xs, start, ragged(device))
    assert_equal(str(outputs.dtype), "torch.float64", because="outputs have the dtype of the state")
    assert_equal(str(state.dtype), "torch.float64", because="the state keeps its dtype")


@task("unroll")
@pytest.mark.parametrize("rows", [1, 4], ids=str)
def test_a_state_for_other_rows(solution, randn, rows):
    args = summing, randn(B, T, H), randn(rows, H)
    mentions = [str((rows, H)), str((B, T, H))]
    assert_raises(ValueError, solution.unroll, *args, mentions=mentions, because=f"state of {rows} rows, xs of {B}")


@task("unroll")
@pytest.mark.parametrize("shape", [(1,), (4,), (B, 1), (), (T,)], ids=str)
def test_lengths_that_do_not_fit(solution, randn, device, shape):
    lengths = torch.ones(shape, dtype=torch.long, device=device)
    args = summing, randn(B, T, H), randn(B, H), lengths
    mentions = [str(shape), str((B, T, H))]
    assert_raises(ValueError, solution.unroll, *args, mentions=mentions, because=f"lengths {shape} for {B} rows")


@cost_case("unroll")
def unroll_cost(module, randn):
    xs, h = randn(8, 16, 32), randn(8, 32)
    return lambda: module.unroll(summing, xs, h)


# LSTM


def made(solution, theirs, layers=1):
    """The learner's LSTM with the weights of PyTorch's."""
    weight = theirs.weight_ih_l0
    mine = solution.LSTM(weight.shape[1], weight.shape[0] // 4, layers, device=weight.device, dtype=weight.dtype)
    mine.load_state_dict(theirs.state_dict())
    return mine


@task("LSTM")
@pytest.mark.parametrize("layers", [1, 3])
def test_it_holds_what_the_lstm_of_torch_holds(solution, layers):
    expected = {name: tuple(value.shape) for name, value in nn.LSTM(I, H, layers).state_dict().items()}
    layer = solution.LSTM(I, H, layers)
    found = {name: tuple(value.shape) for name, value in layer.state_dict().items()}
    assert_equal(found, expected, because="names and shapes of the state dict")
    assert_equal(len(list(layer.parameters())), 4 * layers, because="four parameters for each layer")


@task("LSTM")
def test_one_layer_is_the_default(solution):
    layer = solution.LSTM(I, H)
    found = layer.input_size, layer.hidden_size, layer.num_layers
    assert_equal(found, (I, H, 1), because="input_size, hidden_size, num_layers")


@task("LSTM")
def test_its_weights_go_back_to_torch(solution, randn):
    layer = solution.LSTM(I, H, 2, dtype=torch.float64)
    theirs = nn.LSTM(I, H, 2, batch_first=True, dtype=torch.float64)
    theirs.load_state_dict(layer.state_dict())
    xs = torch.randn(B, T, I, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(xs)[0]
        assert_close(layer(xs)[0], expected, because="its weights in nn.LSTM give the same outputs")


@task("LSTM")
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_outputs_of_the_lstm_of_torch(solution, randn, dtype, layers):
    theirs, xs = layer_of(nn.LSTM, randn, dtype, layers), randn(B, T, I, dtype=dtype)
    with torch.no_grad():
        expected = theirs(xs)[0]
        assert_close(made(solution, theirs, layers)(xs)[0], expected, because="nn.LSTM, batch_first", **near(dtype))


@task("LSTM")
@pytest.mark.parametrize("part", [0, 1], ids=["h", "c"])
@pytest.mark.parametrize("layers", [1, 2])
def test_last_states_of_the_lstm_of_torch(solution, randn, layers, part):
    theirs, xs = layer_of(nn.LSTM, randn, layers=layers), randn(B, T, I, dtype=torch.float64)
    with torch.no_grad():
        expected = theirs(xs)[1][part]
        outputs, state = made(solution, theirs, layers)(xs)
    assert_that(
        isinstance(state, tuple) and len(state) == 2, "the state is the tuple (h, c)", value=type(state).__name__
    )
    assert_close(state[part], expected, because="the last state of all layers, (num_layers, B, H)")


@task("LSTM")
@pytest.mark.parametrize("part", [0, 1, 2], ids=["outputs", "h", "c"])
def test_it_goes_on_from_a_state(solution, randn, part):
    theirs, xs = layer_of(nn.LSTM, randn, layers=2), randn(B, T, I, dtype=torch.float64)
    state = randn(2, B, H, dtype=torch.float64), randn(2, B, H, dtype=torch.float64)
    with torch.no_grad():
        outputs, (h, c) = theirs(xs, state)
        with unchanged(*state):
            found, end = made(solution, theirs, 2)(xs, state)
    assert_close((found, *end)[part], (outputs, h, c)[part], because="nn.LSTM that starts from (h, c)")


@task("LSTM")
def test_two_halves_are_the_whole(solution, randn):
    theirs, xs = layer_of(nn.LSTM, randn, layers=2), randn(B, T, I, dtype=torch.float64)
    with torch.no_grad():
        expected = theirs(xs)[0][:, 2:]
        layer = made(solution, theirs, 2)
        _, state = layer(xs[:, :2])
        found, _ = layer(xs[:, 2:], state)
    assert_close(found, expected, because="the state that comes out goes in again")


@task("LSTM")
def test_as_many_rows_as_steps(solution, randn):
    theirs, xs = layer_of(nn.LSTM, randn), randn(T, T, I, dtype=torch.float64)
    with torch.no_grad():
        expected = theirs(xs)[0]
        assert_close(made(solution, theirs)(xs)[0], expected, because="time is the second dimension")


@task("LSTM")
@pytest.mark.parametrize("layers", [1, 2])
def test_gradients_of_the_lstm_of_torch(solution, randn, layers):
    theirs = layer_of(nn.LSTM, randn, layers=layers)
    mine = made(solution, theirs, layers)
    xs = randn(B, T, I, dtype=torch.float64).requires_grad_()
    upstream = randn(B, T, H, dtype=torch.float64)
    names = ["xs", *dict(theirs.named_parameters())]
    expected = torch.autograd.grad((theirs(xs)[0] * upstream).sum(), [xs, *theirs.parameters()])
    parameters = dict(mine.named_parameters())
    outputs, _ = mine(xs)
    found = torch.autograd.grad((outputs * upstream).sum(), [xs, *(parameters[name] for name in names[1:])])
    for name, actual, wanted in zip(names, found, expected, strict=True):
        assert_close(actual, wanted, because=f"gradient of {name}", rtol=1e-9, atol=1e-10)


@task("LSTM")
def test_gradients_reach_the_first_state(solution, randn):
    theirs = layer_of(nn.LSTM, randn, layers=2)
    mine, xs = made(solution, theirs, 2), randn(B, T, I, dtype=torch.float64)
    inputs = [randn(2, B, H, dtype=torch.float64), randn(2, B, H, dtype=torch.float64)]

    def flat(layer):
        def run(h, c):
            outputs, (h, c) = layer(xs, (h, c))
            return torch.cat([outputs.flatten(), h.flatten(), c.flatten()])

        return run

    assert_gradients_close(flat(mine), flat(theirs), inputs, because="gradients of h and c")


@task("LSTM")
def test_no_time_leaves_the_state(solution, randn, device):
    layer = solution.LSTM(I, H, 2, device=device)
    state = randn(2, B, H), randn(2, B, H)
    expected = state[0].clone(), state[1].clone()
    with torch.no_grad():
        outputs, found = layer(randn(B, 0, I), state)
    assert_close(outputs, torch.zeros(B, 0, H), because="no steps, no outputs")
    assert_close(found, expected, because="the state comes back as it was")


@task("LSTM")
def test_it_starts_within_the_bound(solution, device):
    layer = solution.LSTM(20, 16, 2, device=device)
    beyond = [float(p.detach().abs().max()) > 0.25 for p in layer.parameters()]
    narrow = [float(p.detach().min()) > -0.12 or float(p.detach().max()) < 0.12 for p in layer.parameters()]
    assert_that(not any(beyond), "no parameter is beyond 1 / sqrt(16) = 0.25 at first", value=beyond)
    assert_that(not any(narrow), "each parameter fills the range from -0.25 to 0.25", value=narrow)


@task("LSTM")
def test_its_start_is_uniform(solution, device):
    layer = solution.LSTM(64, 64, device=device)
    spread = float(layer.weight_hh_l0.detach().square().mean().sqrt()) * 8 * math.sqrt(3)
    assert_that(abs(spread - 1) < 0.04, "the spread is that of a uniform distribution", value=round(spread, 1))


@task("LSTM")
def test_its_dtype_is_the_one_asked_for(solution, device):
    layer = solution.LSTM(I, H, 2, device=device, dtype=torch.float64)
    assert_equal(
        sorted({str(p.dtype) for p in layer.parameters()}), ["torch.float64"], because="dtype of the parameters"
    )
    assert_equal(sorted({p.device.type for p in layer.parameters()}), [device.type], because="device of the parameters")


@task("LSTM")
@pytest.mark.parametrize("layers, steps", [(1, 7), (2, 5), (1, 1)])
def test_the_input_is_projected_once(solution, randn, layers, steps):
    theirs, xs = layer_of(nn.LSTM, randn, torch.float32, layers), randn(B, steps, I)
    layer = made(solution, theirs, layers)
    because = f"{steps} products with W_hh, and one with W_ih for all times: {steps + 1} for each of {layers} layers"
    with torch.no_grad():
        assert_cost(layer, xs, max_matmuls=layers * (steps + 1), because=because)


@task("LSTM")
@pytest.mark.parametrize("width", [1, 5])
def test_an_input_of_another_width(solution, randn, device, width):
    layer = solution.LSTM(I, H, device=device)
    mentions = [str((B, T, width)), str((4 * H, I))]
    assert_raises(ValueError, layer, randn(B, T, width), mentions=mentions, because=f"xs of width {width}, not {I}")


@task("LSTM")
@pytest.mark.parametrize("which", [0, 1], ids=["h", "c"])
@pytest.mark.parametrize("shape", [(B, H), (1, B, H), (2, 1, H), (B, 2, H), (2, B, 1)], ids=str)
def test_a_state_that_does_not_fit(solution, randn, device, shape, which):
    layer = solution.LSTM(I, H, 2, device=device)
    state = [randn(2, B, H), randn(2, B, H)]
    state[which] = randn(*shape)
    mentions = [str(shape), str((2, B, H))]
    assert_raises(ValueError, layer, randn(B, T, I), tuple(state), mentions=mentions, because=f"a state of {shape}")


@cost_case("LSTM")
def lstm_cost(module, randn, device):
    layer, xs = module.LSTM(16, 32, device=device), randn(8, 10, 16)
    return lambda: layer(xs)


# tbptt


class Carrier(nn.Module):
    """A plain network whose output is read from its state; it remembers how it was called."""

    def __init__(self, randn, *, pair=False, watched=True):
        super().__init__()
        self.w_x, self.w_h, self.w_y = (
            nn.Parameter(randn(*shape, dtype=torch.float64, scale=0.6)) for shape in [(I, H), (H, H), (H, 2)]
        )
        self.watched = watched
        self.pair, self.states, self.lengths, self.ends = pair, [], [], []

    def forward(self, xs, state):
        if self.watched:
            self.states.append(state)
        self.lengths.append(xs.shape[1])
        xs = xs.clone()
        h = xs.new_zeros(xs.shape[0], H) if state is None else (state[0] if self.pair else state)
        c = xs.new_zeros(xs.shape[0], H) if state is None or not self.pair else state[1]
        outputs = []
        for t in range(xs.shape[1]):
            h = torch.tanh(xs[:, t] @ self.w_x + h @ self.w_h + (0.1 * c if self.pair else 0.0))
            c = 0.5 * c + h
            outputs.append(h @ self.w_y)
        state = (h, c) if self.pair else h
        if self.watched:
            self.ends.append(state)
        return torch.stack(outputs, 1), state


def vector(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).clone()


def twin(randn, model):
    other = Carrier(randn, pair=model.pair, watched=model.watched)
    other.load_state_dict(model.state_dict())
    return other


def cut(state):
    return tuple(part.detach() for part in state) if isinstance(state, tuple) else state.detach()


def trained_by_hand(model, xs, ys, k, rate):
    """Losses of chunks, with a plain gradient step after each, written out."""
    losses, state = [], None
    for start in range(0, xs.shape[1], k):
        outputs, state = model(xs[:, start : start + k], state)
        loss = F.mse_loss(outputs, ys[:, start : start + k])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= rate * gradient
        losses.append(loss.item())
        state = cut(state)
    return losses


def series(randn, steps):
    return randn(B, steps, I, dtype=torch.float64), randn(B, steps, 2, dtype=torch.float64)


def sgd(model, rate):
    return torch.optim.SGD(model.parameters(), lr=rate)


@contextmanager
def backward_works():
    """Say what a chunk needs where PyTorch says what went wrong."""
    try:
        yield
    except NotImplementedError:
        raise
    except RuntimeError as error:
        assert_that(False, "a chunk can go backward by itself", value=str(error)[:40])


@task("tbptt")
@pytest.mark.parametrize("pair", [False, True], ids=["one tensor", "two tensors"])
@pytest.mark.parametrize("k", [1, 3, 5, 11, 20])
def test_losses_and_weights_of_training_by_hand(solution, randn, k, pair):
    xs, ys = series(randn, 11)
    model = Carrier(randn, pair=pair)
    other = twin(randn, model)
    expected = trained_by_hand(other, xs, ys, k, 0.3)
    losses = solution.tbptt(model, xs, ys, k, F.mse_loss, sgd(model, 0.3))
    assert_equal(len(losses), math.ceil(11 / k), because=f"chunks of {k} in 11 steps, the last one shorter")
    assert_close(losses, expected, because="the loss of each chunk, from before its update", rtol=1e-9, atol=1e-12)
    assert_close(vector(model), vector(other), because="the weights after one step per chunk", rtol=1e-9, atol=1e-12)


@task("tbptt")
@pytest.mark.parametrize("pair", [False, True], ids=["one tensor", "two tensors"])
def test_forward_is_that_of_the_full_unroll(solution, randn, pair):
    xs, ys = series(randn, 11)
    model = Carrier(randn, pair=pair)
    with torch.no_grad():
        outputs, _ = twin(randn, model)(xs, None)
    expected = [F.mse_loss(outputs[:, s : s + 4], ys[:, s : s + 4]).item() for s in (0, 4, 8)]
    losses = solution.tbptt(model, xs, ys, 4, F.mse_loss, sgd(model, 0.0))
    assert_close(
        losses, expected, because="with a rate of 0 the chunks are pieces of one forward pass", rtol=1e-9, atol=1e-12
    )


@task("tbptt")
def test_losses_are_plain_floats(solution, randn):
    xs, ys = series(randn, 6)
    model = Carrier(randn)
    losses = solution.tbptt(model, xs, ys, 3, F.mse_loss, sgd(model, 0.1))
    assert_equal([type(loss).__name__ for loss in losses], ["float", "float"], because="a list of Python floats")


@task("tbptt")
def test_each_chunk_is_one_call_of_the_model(solution, randn):
    xs, ys = series(randn, 11)
    model = Carrier(randn)
    solution.tbptt(model, xs, ys, 4, F.mse_loss, sgd(model, 0.1))
    assert_equal(model.lengths, [4, 4, 3], because="11 steps in chunks of 4")


@task("tbptt")
@pytest.mark.parametrize("pair", [False, True], ids=["one tensor", "two tensors"])
def test_the_state_comes_without_its_graph(solution, randn, pair):
    xs, ys = series(randn, 6)
    model = Carrier(randn, pair=pair)
    with backward_works():
        solution.tbptt(model, xs, ys, 2, F.mse_loss, sgd(model, 0.1))
    assert_that(model.states[0] is None, "the first chunk gets None", value=type(model.states[0]).__name__)
    for given, end in zip(model.states[1:], model.ends[:-1], strict=True):
        assert_that(
            isinstance(given, tuple) == pair, "the state has the form the model gave it", value=type(given).__name__
        )
        parts, ends = (given, end) if pair else ([given], [end])
        assert_that(not any(part.requires_grad for part in parts), "the state is cut from its graph")
        for part, value in zip(parts, ends, strict=True):
            assert_close(part.detach(), value.detach(), because="the state keeps its values")


def reach(solution, randn, chunk, k=4, steps=12):
    """Which times have a gradient from the loss of one chunk alone, (steps,) as booleans."""
    xs, ys = series(randn, steps)
    leaf = xs.requires_grad_()
    model = Carrier(randn)
    calls = []

    def loss_fn(outputs, targets):
        calls.append(None)
        loss = F.mse_loss(outputs[:, -1], targets[:, -1])
        return loss if len(calls) == chunk + 1 else loss * 0.0

    solution.tbptt(model, leaf.clone(), ys, k, loss_fn, sgd(model, 0.0))
    grad = torch.zeros_like(xs) if leaf.grad is None else leaf.grad
    return (grad != 0).any(dim=2).any(dim=0).tolist()


@task("tbptt")
@pytest.mark.parametrize("chunk", [0, 1, 2])
def test_gradients_stay_inside_their_chunk(solution, randn, chunk):
    expected = [chunk * 4 <= t < chunk * 4 + 4 for t in range(12)]
    with backward_works():
        found = reach(solution, randn, chunk)
    assert_equal(
        found, expected, because=f"the times with a gradient from the last output of chunk {chunk}, of 4 steps"
    )


@task("tbptt")
def test_memory_does_not_grow_with_time(solution, randn):
    model = Carrier(randn, watched=False)
    xs, ys = series(randn, 4)
    _, one = measure(lambda: trained_by_hand(twin(randn, model), xs, ys, 4, 0.0))
    xs, ys = series(randn, 40)
    limit = 2 * one.saved_bytes
    optimizer = sgd(model, 0.0)
    with backward_works():
        because = "ten chunks need no more memory for backward than one"
        assert_cost(solution.tbptt, model, xs, ys, 4, F.mse_loss, optimizer, max_saved_bytes=limit, because=because)


@task("tbptt")
def test_gradients_from_before_do_not_count(solution, randn):
    xs, ys = series(randn, 6)
    model = Carrier(randn)
    other = twin(randn, model)
    trained_by_hand(other, xs, ys, 6, 0.3)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    solution.tbptt(model, xs, ys, 6, F.mse_loss, sgd(model, 0.3))
    assert_close(vector(model), vector(other), because="old gradients are cleared first", rtol=1e-9, atol=1e-12)


@task("tbptt")
def test_no_steps_no_update(solution, randn):
    xs, ys = series(randn, 0)
    model = Carrier(randn)
    before = vector(model)
    assert_equal(solution.tbptt(model, xs, ys, 3, F.mse_loss, sgd(model, 0.3)), [], because="T = 0")
    assert_equal(vector(model), before, because="T = 0: the weights stay")


@task("tbptt")
@pytest.mark.parametrize("k", [0, -2])
def test_chunks_without_steps_are_refused(solution, randn, k):
    model = Carrier(randn)
    args = model, *series(randn, 6), k, F.mse_loss, sgd(model, 0.1)
    error = assert_raises(ValueError, solution.tbptt, *args, mentions=[str(k)], because=f"k = {k}")
    assert_that("range()" not in str(error), "the message is about k", value=str(error)[:20])


@task("tbptt")
@pytest.mark.parametrize("shape", [(B, 5, 2), (B, 7, 2), (1, 6, 2), (6, B, 2)], ids=str)
def test_targets_that_do_not_fit(solution, randn, shape):
    model = Carrier(randn)
    args = (
        model,
        randn(B, 6, I, dtype=torch.float64),
        randn(*shape, dtype=torch.float64),
        2,
        F.mse_loss,
        sgd(model, 0.1),
    )
    mentions = [str(shape), str((B, 6, I))]
    assert_raises(ValueError, solution.tbptt, *args, mentions=mentions, because=f"ys {shape} for xs {(B, 6, I)}")


# echo


def on(device, seed):
    return torch.Generator(device=device).manual_seed(seed)


@task("echo")
@pytest.mark.parametrize("delay", [0, 1, 3, 7, 8, 12])
def test_an_echo_is_what_was_said(solution, device, seed, delay):
    bits = torch.randint(0, 2, (5, 8, 1), generator=on(device, seed), device=device)
    expected = torch.zeros(5, 8, 1)
    for t in range(delay, 8):
        expected[:, t] = bits[:, t - delay].float().cpu()
    xs, ys = solution.echo_batch(5, 8, delay, generator=on(device, seed))
    assert_close(xs, bits.float() * 2 - 1, because="1 becomes +1, 0 becomes -1")
    assert_close(ys, expected, because=f"1 where the sign of {delay} steps ago was +1, 0 before there was one")


@task("echo")
def test_an_echo_draws_from_its_generator(solution, device, seed):
    generator, other = on(device, seed), on(device, seed)
    torch.randint(0, 2, (5, 8, 1), generator=other, device=device)
    with global_rng_untouched():
        solution.echo_batch(5, 8, 3, generator=generator)
    assert_equal(generator.get_state(), other.get_state(), because="one draw of (5, 8, 1), and no other")


def small_cell(kind, randn, hidden=5):
    return layer_of(kind, randn, torch.float32, width=1, hidden=hidden)


def echo_of(solution, randn, kind, device):
    """The learner's Echo around a small cell, with random weights from the seed of the test."""
    model = solution.Echo(small_cell(kind, randn)).to(device)
    for parameter in model.readout.parameters():
        parameter.data = randn(*parameter.shape)
    return model


@task("echo")
@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM], ids=lambda kind: kind.__name__)
def test_logits_are_read_from_the_outputs(solution, randn, device, kind):
    model, xs = echo_of(solution, randn, kind, device), randn(B, T, 1)
    cell = model.cell
    with torch.no_grad():
        outputs, state = cell(xs)
        expected = outputs @ model.readout.weight.T + model.readout.bias
        again = cell(xs, state)[0] @ model.readout.weight.T + model.readout.bias
        logits, found = model(xs)
        goes_on, _ = model(xs, found)
    assert_close(logits, expected, because="readout of each output, (B, T, 1)", **near(xs.dtype))
    assert_close(found, state, because="the state of the cell", **near(xs.dtype))
    assert_close(goes_on, again, because="the state that is handed in reaches the cell", **near(xs.dtype))


@task("echo")
def test_an_echo_has_a_cell_and_a_readout(solution, randn):
    cell = small_cell(nn.RNN, randn)
    model = solution.Echo(cell)
    expected = [f"cell.{name}" for name in cell.state_dict()] + ["readout.weight", "readout.bias"]
    assert_equal(sorted(model.state_dict()), sorted(expected), because="what the state dict holds")
    assert_that(model.cell is cell, "the cell is the one that was handed in")
    assert_equal(tuple(model.readout.weight.shape), (1, 5), because="one logit from hidden_size numbers")


@task("echo")
def test_the_state_keeps_its_graph(solution, randn, device):
    model = echo_of(solution, randn, nn.RNN, device)
    xs = randn(B, T, 1).requires_grad_()
    _, state = model(xs)
    state.sum().backward()
    assert_that(bool((xs.grad != 0).all()), "gradients go through the state to all of xs", value=xs.grad is not None)


class Known(nn.Module):
    """Says the echo of 8 steps ago, but something wrong before step 8 and at some other steps."""

    def __init__(self, device, wrong):
        super().__init__()
        self.size = nn.Parameter(torch.tensor(0.5, device=device))
        self.wrong, self.shapes, self.graphs = wrong, [], []

    def forward(self, xs, state=None):
        self.shapes.append(tuple(xs.shape))
        self.graphs.append(torch.is_grad_enabled())
        heard = torch.cat([xs.new_ones(xs.shape[0], 8, 1), xs[:, :-8]], dim=1)
        heard[:, self.wrong] *= -1
        return heard * self.size, state


@task("echo")
@pytest.mark.parametrize(
    "wrong, accuracy", [([], 1.0), ([8], 15 / 16), ([23, 22, 10], 13 / 16), ([*range(24)], 0.0)], ids=str
)
def test_accuracy_counts_from_step_eight(solution, device, seed, wrong, accuracy):
    model = Known(device, wrong)
    found = solution.train_echo(model, 24, updates=0, generator=on(device, seed))
    assert_close(found, accuracy, because=f"a model that is wrong before step 8 and at {wrong}", rtol=0, atol=1e-6)
    assert_equal(model.shapes, [(256, 24, 1)], because="no update was asked for, so there is one batch to count on")
    assert_equal(model.graphs, [False], because="accuracy needs no graph")


class Silent(nn.Module):
    """Its logits are all 0."""

    def __init__(self, device):
        super().__init__()
        self.size = nn.Parameter(torch.tensor(0.0, device=device))

    def forward(self, xs, state=None):
        return xs * self.size, state


@task("echo")
def test_a_logit_of_zero_says_no(solution, device, seed):
    bits = torch.randint(0, 2, (256, 24, 1), generator=on(device, seed), device=device)
    expected = float((bits[:, :-8] == 0).double().mean())
    found = solution.train_echo(Silent(device), 24, updates=0, generator=on(device, seed))
    assert_close(found, expected, because="the share of zeros among the targets", rtol=0, atol=1e-6)


@task("echo")
@pytest.mark.parametrize("k, updates, batches", [(24, 3, 3), (8, 3, 1), (8, 4, 2), (4, 1, 1)])
def test_training_is_the_one_described(solution, randn, device, seed, k, updates, batches):
    model, other = echo_of(solution, randn, nn.RNN, device), echo_of(solution, randn, nn.RNN, device)
    other.load_state_dict(model.state_dict())
    generator, again = on(device, seed), on(device, seed)
    optimizer = torch.optim.Adam(other.parameters(), lr=0.003)
    for _ in range(batches):
        bits = torch.randint(0, 2, (32, 24, 1), generator=again, device=device).float()
        state = None
        for start in range(0, 24, k):
            outputs, state = other.cell(bits[:, start : start + k] * 2 - 1, state)
            logits = outputs @ other.readout.weight.T + other.readout.bias
            targets = torch.cat([torch.zeros_like(bits[:, :8]), bits[:, :-8]], 1)[:, start : start + k]
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(logits, targets).backward()
            optimizer.step()
            state = state.detach()
    expected = vector(other)
    torch.randint(0, 2, (256, 24, 1), generator=again, device=device)
    with global_rng_untouched():
        solution.train_echo(model, k, updates=updates, generator=generator)
    because = f"{batches} batches of {24 // k} chunks"
    assert_equal(generator.get_state(), again.get_state(), because=f"{because}, and one to count on")
    assert_close(vector(model), expected, because=f"the weights after {because}", rtol=1e-4, atol=1e-4)


class Counting(nn.Module):
    """Counts how often it was called with a graph."""

    def __init__(self, device):
        super().__init__()
        self.size, self.count = nn.Parameter(torch.tensor(0.0, device=device)), 0

    def forward(self, xs, state=None):
        self.count += torch.is_grad_enabled()
        return xs * self.size, xs[:, 0]


@task("echo")
def test_six_hundred_updates_are_the_default(solution, device, seed):
    model = Counting(device)
    solution.train_echo(model, 4, generator=on(device, seed))
    assert_equal(model.count, 600, because="600 updates")


def echo_after_training(solution, device, k, updates):
    """The accuracy after training from a start that is the same in every run: rotations forget nothing."""
    start = torch.Generator().manual_seed(1)
    model = solution.Echo(nn.RNN(1, 32, batch_first=True))
    for parameter in model.parameters():
        parameter.data = torch.empty(parameter.shape).uniform_(-(32**-0.5), 32**-0.5, generator=start)
    model.cell.weight_hh_l0.data = torch.linalg.qr(torch.randn(32, 32, generator=start))[0]
    return solution.train_echo(model.to(device), k, updates=updates, generator=on(device, 2))


@task("echo")
def test_an_echo_is_learned_only_if_gradients_reach_back(solution, device):
    short = echo_after_training(solution, device, 4, 600)
    because = "in chunks of 4 no gradient reaches 8 steps back: it stays near a half"
    assert_that(short < 0.65, because, value=round(short, 1))
    long = echo_after_training(solution, device, 24, 300)
    assert_that(long >= 0.99, "in chunks of 24 the echo is learned", value=round(long, 1))


# scan


def loop(a, b):
    h, found = torch.zeros_like(b[:, 0]), []
    for t in range(b.shape[1]):
        h = a[:, t] * h + b[:, t]
        found.append(h)
    return torch.stack(found, 1)


@task("scan")
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33])
def test_a_scan_is_a_loop(solution, randn, rand, dtype, steps):
    a, b = 2 * rand(2, steps, 3).to(dtype) - 1, randn(2, steps, 3, dtype=dtype)
    expected = loop(a, b)
    assert_close(solution.scan(a, b), expected, because=f"h_t = a_t h_(t-1) + b_t over {steps} steps", **near(dtype))


@task("scan")
def test_a_scan_of_ones_is_a_running_sum(solution, randn):
    b = randn(2, 50, 3, dtype=torch.float64)
    expected = b.cumsum(1)
    assert_close(solution.scan(torch.ones_like(b), b), expected, because="with a = 1 it is a running sum")


@task("scan")
def test_products_that_underflow(solution, rand):
    a, b = 0.1 * rand(2, 300, 3), 0.5 + rand(2, 300, 3)
    expected = loop(a.double(), b.double()).float()
    found = solution.scan(a, b)
    because = "the product of 300 factors below 0.1 is 0 in float32, and that is no harm"
    assert_close(found, expected, because=because, rtol=1e-5, atol=1e-6)


@task("scan")
def test_single_factors_of_zero(solution, randn, rand):
    a, b = rand(2, 20, 3).double(), randn(2, 20, 3, dtype=torch.float64)
    a[:, 7], a[0, 11] = 0.0, 0.0
    expected = loop(a, b)
    assert_close(solution.scan(a, b), expected, because="a = 0 forgets all that was before")


@task("scan")
@pytest.mark.parametrize("shape", [(2, 0, 3), (0, 5, 3), (2, 5, 0)], ids=str)
def test_a_scan_over_nothing(solution, randn, shape):
    assert_close(solution.scan(randn(*shape), randn(*shape)), torch.zeros(shape), because=f"shape {shape}")


@task("scan")
def test_as_many_rows_as_times_in_a_scan(solution, randn, rand):
    a, b = rand(6, 6, 6).double(), randn(6, 6, 6, dtype=torch.float64)
    expected = loop(a, b)
    assert_close(solution.scan(a, b), expected, because="time is the second dimension")


@task("scan")
@pytest.mark.parametrize("steps", [1, 6, 8])
def test_gradients_of_a_scan(solution, randn, rand, steps):
    inputs = [rand(2, steps, 3).double(), randn(2, steps, 3, dtype=torch.float64)]
    assert_gradients_close(solution.scan, loop, inputs, because="gradients of the loop")


@task("scan")
def test_gradients_where_a_factor_is_zero(solution, randn, rand):
    a = rand(2, 9, 3).double()
    a[:, 4] = 0.0
    assert_gradients_close(solution.scan, loop, [a, randn(2, 9, 3, dtype=torch.float64)], because="a_4 is 0")


@task("scan")
@pytest.mark.parametrize("steps", [16, 256, 1024])
def test_a_scan_needs_few_operations(solution, rand, steps):
    a, b = rand(1, steps, 2), rand(1, steps, 2)
    limit = 24 * (steps.bit_length() - 1) + 24
    assert_cost(solution.scan, a, b, max_calls=limit, because=f"{steps} times, 24 calls per doubling and 24 more")


@task("scan")
@pytest.mark.parametrize("shape", [(2, 1, 3), (2, 5, 1), (1, 5, 3), (5, 3)], ids=str)
def test_factors_that_do_not_fit(solution, randn, shape):
    args = randn(*shape), randn(2, 5, 3)
    because = f"a {shape}, b (2, 5, 3): nothing is broadcast"
    assert_raises(ValueError, solution.scan, *args, mentions=[str(shape), "(2, 5, 3)"], because=because)


@cost_case("scan")
def scan_cost(module, randn):
    a, b = randn(2, 128, 8).sigmoid(), randn(2, 128, 8)
    return lambda: module.scan(a, b)
