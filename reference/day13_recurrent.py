"""Day 13: recurrent networks. A state is carried through time, and now and then the graph behind it is cut.

The three cells are PyTorch's: the plain one of Elman 1990, the LSTM of Hochreiter and Schmidhuber 1997 with the
forget gate of Gers et al. 2000, and the GRU of Cho et al. 2014 (arXiv:1406.1078) in the form in which the reset gate
comes after the hidden product. Truncated backpropagation is that of Williams and Peng 1990. The scan doubles its
reach at each step, as Hillis and Steele 1986 do; why a linear recurrence allows it is in section 1.4.1 of Blelloch 1990.

A state is a tensor (B, H), or a tuple of them whose first one is what the cell shows: (h, c) for the LSTM.
A step maps (x (B, I), state) to the next state.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from reference.day08_linear_layers import Linear

State = Tensor | tuple[Tensor, ...]


def rnn_step(x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> Tensor:
    """The next h (B, H) of a plain cell: tanh(W_ih x + b_ih + W_hh h + b_hh)."""
    _check_cell(x, h, w_ih, w_hh, b_ih, b_hh, gates=1)
    return torch.tanh(torch.addmm(b_ih, x, w_ih.T) + torch.addmm(b_hh, h, w_hh.T))


def lstm_step(
    x: Tensor, state: tuple[Tensor, Tensor], w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor
) -> tuple[Tensor, Tensor]:
    """The next (h, c) of an LSTM cell; the rows of the weights are the gates i, f, g, o."""
    h, c = state
    _check_cell(x, h, w_ih, w_hh, b_ih, b_hh, gates=4)
    if c.shape != h.shape:
        raise ValueError(f"c {tuple(c.shape)} does not fit h {tuple(h.shape)}")
    return _lstm_update(torch.addmm(b_ih, x, w_ih.T) + torch.addmm(b_hh, h, w_hh.T), c)


def gru_step(x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> Tensor:
    """The next h (B, H) of a GRU cell; the rows of the weights are r, z, n, and r acts on the hidden product."""
    _check_cell(x, h, w_ih, w_hh, b_ih, b_hh, gates=3)
    r_x, z_x, n_x = torch.addmm(b_ih, x, w_ih.T).chunk(3, dim=-1)  # (B, H) each
    r_h, z_h, n_h = torch.addmm(b_hh, h, w_hh.T).chunk(3, dim=-1)
    r, z = torch.sigmoid(r_x + r_h), torch.sigmoid(z_x + z_h)
    n = torch.tanh(n_x + r * n_h)
    return (1 - z) * n + z * h


def unroll(
    step: Callable[[Tensor, State], State], xs: Tensor, state: State, lengths: Tensor | None = None
) -> tuple[Tensor, State]:
    """Run a step over xs (B, T, I); the outputs (B, T, H) and the state in which each row ended."""
    B, T, _ = xs.shape
    first = _shown(state)
    if first.shape[0] != B:
        raise ValueError(f"state {tuple(first.shape)} does not fit xs {tuple(xs.shape)}")
    if lengths is not None and lengths.shape != (B,):
        raise ValueError(f"lengths {tuple(lengths.shape)} does not fit xs {tuple(xs.shape)}")
    outputs = []
    for t in range(T):
        new = step(xs[:, t], state)
        shown = _shown(new)
        if lengths is not None:
            running = (t < lengths)[:, None]  # (B, 1)
            shown = torch.where(running, shown, 0.0)
            new = _where(running, new, state)
        state = new
        outputs.append(shown)
    if not outputs:
        return first.new_zeros(B, 0, first.shape[1]), state
    return torch.stack(outputs, dim=1), state  # (B, T, H)


class LSTM(nn.Module):
    """Layers of LSTM cells above each other, with the parameters of nn.LSTM(I, H, num_layers, batch_first=True)."""

    def __init__(self, input_size: int, hidden_size: int, num_layers: int = 1, *, device=None, dtype=None):
        super().__init__()
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        rows, bound = 4 * hidden_size, hidden_size**-0.5
        for layer in range(num_layers):
            width = hidden_size if layer else input_size
            shapes = {
                "weight_ih": (rows, width),
                "weight_hh": (rows, hidden_size),
                "bias_ih": (rows,),
                "bias_hh": (rows,),
            }
            for name, shape in shapes.items():
                values = torch.empty(shape, device=device, dtype=dtype).uniform_(-bound, bound)
                self.register_parameter(f"{name}_l{layer}", nn.Parameter(values))

    def forward(self, xs: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Map xs (B, T, I) and (h, c), each (num_layers, B, H), to the outputs (B, T, H) and the next (h, c)."""
        B, _, I = xs.shape  # noqa: E741
        needed = (self.num_layers, B, self.hidden_size)
        if I != self.input_size:
            raise ValueError(f"xs {tuple(xs.shape)} does not fit weight_ih_l0 {tuple(self.weight_ih_l0.shape)}")
        if state is None:
            state = xs.new_zeros(needed), xs.new_zeros(needed)
        for part in state:
            if part.shape != needed:
                raise ValueError(f"state {tuple(part.shape)} does not fit: xs {tuple(xs.shape)} needs {needed}")
        ends = []
        for layer in range(self.num_layers):
            w_ih, w_hh, b_ih, b_hh = (
                getattr(self, f"{name}_l{layer}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )

            def step(gates: Tensor, state: State, w_hh: Tensor = w_hh, b_hh: Tensor = b_hh) -> State:
                h, c = state
                return _lstm_update(gates + torch.addmm(b_hh, h, w_hh.T), c)

            gates = F.linear(xs, w_ih, b_ih)  # (B, T, 4H): the inputs of all times in one product
            xs, end = unroll(step, gates, (state[0][layer], state[1][layer]))
            ends.append(end)
        h, c = torch.stack([h for h, _ in ends]), torch.stack([c for _, c in ends])  # (num_layers, B, H)
        return xs, (h, c)


def tbptt(
    model: nn.Module,
    xs: Tensor,
    ys: Tensor,
    k: int,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    optimizer: Optimizer,
) -> list[float]:
    """One update per k steps of time; the state goes on from chunk to chunk, the graph does not."""
    if k < 1:
        raise ValueError(f"k ({k}) must be at least 1")
    if xs.shape[:2] != ys.shape[:2]:
        raise ValueError(f"ys {tuple(ys.shape)} does not fit xs {tuple(xs.shape)}")
    losses, state = [], None
    for start in range(0, xs.shape[1], k):
        optimizer.zero_grad()
        out, state = model(xs[:, start : start + k], state)
        loss = loss_fn(out, ys[:, start : start + k])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        state = _detached(state)
    return losses


def echo_batch(n: int, length: int, delay: int, *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random signs xs (n, length, 1), and ys like it: 1 where the sign of `delay` steps ago was +1, else 0."""
    bits = torch.randint(0, 2, (n, length, 1), generator=generator, device=generator.device).float()
    ys = torch.cat([bits.new_zeros(n, delay, 1), bits], dim=1)[:, :length]  # (n, length, 1)
    return 2 * bits - 1, ys


class Echo(nn.Module):
    """A recurrent network and one logit per step, read from its output."""

    def __init__(self, cell: nn.Module):
        super().__init__()
        self.cell = cell
        self.readout = Linear(cell.hidden_size, 1)

    def forward(self, xs: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Map xs (B, T, I) and the state of the cell to logits (B, T, 1) and the next state."""
        outputs, state = self.cell(xs, state)
        return self.readout(outputs), state


def train_echo(model: nn.Module, k: int, *, updates: int = 600, generator: torch.Generator) -> float:
    """Train with chunks of k steps until `updates` updates are made; the accuracy on fresh bits, from step 8 on."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    done = 0
    while done < updates:
        xs, ys = echo_batch(32, 24, 8, generator=generator)
        done += len(tbptt(model, xs, ys, k, F.binary_cross_entropy_with_logits, optimizer))
    xs, ys = echo_batch(256, 24, 8, generator=generator)
    with torch.no_grad():
        logits, _ = model(xs)
    return ((logits > 0) == ys)[:, 8:].double().mean().item()


def scan(a: Tensor, b: Tensor) -> Tensor:
    """All h_t = a_t h_{t-1} + b_t of (B, T, D), with h = 0 before the first, by doubling: O(log T) operations."""
    if a.shape != b.shape:
        raise ValueError(f"a {tuple(a.shape)} does not fit b {tuple(b.shape)}")
    reach = 1  # b_t sums up the last `reach` steps, a_t is their product
    while reach < b.shape[1]:
        late = a[:, reach:]
        b = torch.cat([b[:, :reach], late * b[:, :-reach] + b[:, reach:]], dim=1)
        a = torch.cat([a[:, :reach], late * a[:, :-reach]], dim=1)
        reach *= 2
    return b


def _check_cell(x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor, *, gates: int) -> None:
    B, I = x.shape  # noqa: E741
    H = h.shape[1]
    rows = gates * H
    needed = {
        "h": (h, (B, H)),
        "w_ih": (w_ih, (rows, I)),
        "w_hh": (w_hh, (rows, H)),
        "b_ih": (b_ih, (rows,)),
        "b_hh": (b_hh, (rows,)),
    }
    for name, (tensor, shape) in needed.items():
        if tensor.shape != shape:
            raise ValueError(
                f"{name} {tuple(tensor.shape)} does not fit: x {tuple(x.shape)} and h {tuple(h.shape)} need {shape}"
            )


def _lstm_update(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    i, f, g, o = gates.chunk(4, dim=-1)  # (B, H) each
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _shown(state: State) -> Tensor:
    return state if isinstance(state, Tensor) else state[0]


def _where(running: Tensor, new: State, old: State) -> State:
    if isinstance(new, Tensor):
        return torch.where(running, new, old)
    return tuple(torch.where(running, part, old[i]) for i, part in enumerate(new))


def _detached(state: State) -> State:
    return state.detach() if isinstance(state, Tensor) else tuple(part.detach() for part in state)
