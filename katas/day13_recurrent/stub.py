"""Day 13: recurrent networks. A state is carried through time, and now and then the graph behind it is cut.

Letters: `B` rows of a batch, `T` steps of time, `I` the width of the input, `H` the width of the state.
A state is a tensor (B, H), or a tuple of such tensors whose first one is what the cell shows: (h, c) for the LSTM.
"""

from collections.abc import Callable

import torch
from day08_linear_layers import Linear  # noqa: F401 - yours, if you passed day 8
from torch import Tensor, nn
from torch.optim import Optimizer

State = Tensor | tuple[Tensor, ...]


def rnn_step(x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> Tensor:
    """Return the next state (B, H) of the plain cell: tanh of W_ih x + b_ih + W_hh h + b_hh, as nn.RNNCell has it.

    x: (B, I), h: (B, H), w_ih: (H, I), w_hh: (H, H), b_ih and b_hh: (H,)
    The result has the dtype of x. B may be 0, strides do not matter, and gradients flow to all six.

    x and the width of h tell all other shapes. A tensor that has another one raises ValueError, with the shape
    that it has and the one that it needs in the message; nothing is broadcast.
    """
    raise NotImplementedError


def lstm_step(
    x: Tensor, state: tuple[Tensor, Tensor], w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the next (h, c), a tuple, of an LSTM cell, as nn.LSTMCell has it.

    x: (B, I), state: (h, c), each (B, H); w_ih: (4H, I), w_hh: (4H, H), b_ih and b_hh: (4H,)
    The 4H rows are four blocks of H: input gate i, forget gate f, candidate g and output gate o, in this order.
    i, f and o are sigmoids, g is a tanh, each of its block of W_ih x + b_ih + W_hh h + b_hh. Then
    c' = f * c + i * g, and h' = o * tanh(c').

    All else is as in `rnn_step`; c needs the shape of h.
    """
    raise NotImplementedError


def gru_step(x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> Tensor:
    """Return the next state (B, H) of a GRU cell, as nn.GRUCell has it.

    x: (B, I), h: (B, H), w_ih: (3H, I), w_hh: (3H, H), b_ih and b_hh: (3H,)
    The 3H rows are three blocks of H: reset gate r, update gate z and candidate n, in this order.
    r and z are sigmoids of their blocks of W_ih x + b_ih + W_hh h + b_hh. For the candidate r multiplies what the
    state contributes, after the product and with its bias: n = tanh(W_in x + b_in + r * (W_hn h + b_hn)).
    Then h' = (1 - z) * n + z * h.

    All else is as in `rnn_step`.
    """
    raise NotImplementedError


def unroll(
    step: Callable[[Tensor, State], State], xs: Tensor, state: State, lengths: Tensor | None = None
) -> tuple[Tensor, State]:
    """Run a step over time. Return (outputs (B, T, H), the state in which each row ended).

    step: maps (x (B, I), state) to the next state, of the same kind: a tensor (B, H), or a tuple of them. It is
        called at most T times, with all rows, from the first time to the last.
    xs: (B, T, I); T may be 0, and so may B
    state: the state before the first step
    lengths: LongTensor (B,) of numbers from 0 to T, in any order; None means that every row has length T
    outputs[:, t] is the state after step t (of a tuple: its first tensor), in the dtype that the state has.
    With T = 0 they have shape (B, 0, H), and the state comes back as it was.

    From time lengths[b] on, row b is padding: its outputs are 0, its state (all tensors of it) stays as it was
    after its last real step, and what (finite) numbers xs holds there changes nothing and gets zero gradients.
    A row of length 0 keeps the state it had. Rows know nothing of each other. Gradients flow through time.

    Raises ValueError with both shapes when the state has another number of rows than xs, and when lengths is not
    (B,).
    """
    raise NotImplementedError


class LSTM(nn.Module):
    """Layers of LSTM cells above each other: nn.LSTM(input_size, hidden_size, num_layers, batch_first=True).

    State dicts of that one load into this one and the other way round: for each layer l from 0 on there are
    `weight_ih_l{l}`, `weight_hh_l{l}`, `bias_ih_l{l}` and `bias_hh_l{l}`, with rows in the order of `lstm_step`.
    The first layer sees the input, each later one the outputs of the one before. All parameters are created on
    `device` in `dtype`, with values from U(-1/sqrt(H), 1/sqrt(H)) from torch's global random state.
    `input_size`, `hidden_size` and `num_layers` are kept as attributes.
    """

    def __init__(self, input_size: int, hidden_size: int, num_layers: int = 1, *, device=None, dtype=None):
        raise NotImplementedError

    def forward(self, xs: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the outputs (B, T, H) of the last layer, and a tuple of the last h and c of all layers.

        xs: (B, T, I); T may be 0, and then the state comes back as it was
        state: (h, c), each (num_layers, B, H); None means zeros. It is not changed. The one that is returned
            has the same shapes.
        Values and gradients are those of nn.LSTM.
        Raises ValueError when xs has another width than input_size, with its shape and that of weight_ih_l0, and
        when h or c has another shape than the one above, with that shape and the one that is needed.
        Cost: at most T + 1 matrix products for each layer.
        """
        raise NotImplementedError


def tbptt(
    model: nn.Module,
    xs: Tensor,
    ys: Tensor,
    k: int,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    optimizer: Optimizer,
) -> list[float]:
    """Train on long sequences in chunks of k steps. Return the loss of each chunk, from before its update.

    model: maps (xs (B, t, I), state) to (output (B, t, ...), next state); a state is a tensor, a tuple of tensors,
        or None for the beginning
    xs: (B, T, I), ys: (B, T, ...). The last chunk is shorter where k does not divide T; k may be larger than T.

    Chunks come in the order of time. Each calls the model once, with the state that the chunk before it ended
    with (None at first), and is one update: clear the gradients (also those from before the call), compute
    loss_fn(output, the chunk of ys), go backward, step. The losses are Python floats; with T = 0 there is no
    update, and the list is empty.
    The state keeps its values from chunk to chunk but not its graph: the loss of a chunk has no gradient with
    respect to earlier chunks, while inside a chunk gradients flow through all of its steps.
    k below 1 raises ValueError with k in the message; xs and ys that differ in B or T one with both shapes.
    Cost: what is saved for backward is at no time more than what one chunk needs, however large T is.
    """
    raise NotImplementedError


def echo_batch(n: int, length: int, delay: int, *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return random signs and what an echo makes of them: (xs, ys), both (n, length, 1), float32.

    xs holds -1 and +1, independent and equally likely, all from one call of torch.randint(0, 2, (n, length, 1))
    with `generator`, on whose device everything lives: 1 means +1. ys[:, t] is 1 where xs[:, t - delay] is +1, and
    0 where it is -1 or where t < delay. delay may be 0, and it may exceed length.
    """
    raise NotImplementedError


class Echo(nn.Module):
    """A recurrent network `cell`, and `readout`, day 8's Linear(H, 1), on each of its outputs.

    cell: a module with an attribute hidden_size (H) that maps (xs (B, T, I), state or None) to (outputs (B, T, H),
    state), as `LSTM` does, and nn.RNN, nn.GRU and nn.LSTM with batch_first=True.
    """

    def __init__(self, cell: nn.Module):
        raise NotImplementedError

    def forward(self, xs: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Return the logits (B, T, 1) and the state that the cell returns, its graph included."""
        raise NotImplementedError


def train_echo(model: nn.Module, k: int, *, updates: int = 600, generator: torch.Generator) -> float:
    """Train an Echo with `tbptt` in chunks of k steps; return its accuracy afterwards, a float from 0 to 1.

    A batch is echo_batch(32, 24, 8); all of it goes through tbptt with chunks of k, F.binary_cross_entropy_with_logits
    and one torch.optim.Adam with a learning rate of 0.003 for the whole run. As long as there were fewer than `updates`
    updates, another batch is drawn.
    Then echo_batch(256, 24, 8) is drawn, and goes through the model at once, without a graph. A logit above 0 says 1,
    all others say 0; the accuracy is the share of right answers from step 8 on (from 0), where there is an echo.
    All batches come from `generator`, and no other random numbers are drawn.
    """
    raise NotImplementedError


def scan(a: Tensor, b: Tensor) -> Tensor:
    """Return all h_t = a_t * h_(t-1) + b_t for t from 0 on, with zeros before the first: (B, T, D).

    a and b: (B, T, D), with |a| at most 1; any size may be 0. Other shapes than equal ones raise ValueError with both.
    The result has the dtype of the inputs and is as accurate as a loop over t, also where products of many a
    underflow to 0, and where single a are 0. Gradients flow to a and b.
    Cost: at most 24 ATen calls for each doubling of T, and 24 more.
    """
    raise NotImplementedError
