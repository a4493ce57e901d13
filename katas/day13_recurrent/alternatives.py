import torch
import torch.nn.functional as F
from torch import nn

from checker.testing import alternative


def _needs(name, tensor, shape):
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} is {tuple(tensor.shape)}, not {tuple(shape)}")


def _fits(gates, x, h, w_ih, w_hh, b_ih, b_hh):
    rows, width = gates * h.shape[-1], h.shape[-1]
    _needs("h", h, (x.shape[0], width))
    _needs("w_ih", w_ih, (rows, x.shape[1]))
    _needs("w_hh", w_hh, (rows, width))
    _needs("b_ih", b_ih, (rows,))
    _needs("b_hh", b_hh, (rows,))


@alternative("rnn_step")
def rnn_step__one_product(x, h, w_ih, w_hh, b_ih, b_hh):
    _fits(1, x, h, w_ih, w_hh, b_ih, b_hh)
    return (torch.cat([x, h], 1) @ torch.cat([w_ih, w_hh], 1).T + (b_ih + b_hh)).tanh()


@alternative("lstm_step")
def lstm_step__gates_by_einsum(x, state, w_ih, w_hh, b_ih, b_hh):
    h, c = state
    _fits(4, x, h, w_ih, w_hh, b_ih, b_hh)
    _needs("c", c, h.shape)
    gates = torch.einsum("bi,gi->bg", x, w_ih) + torch.einsum("bh,gh->bg", h, w_hh) + b_ih + b_hh
    width = h.shape[-1]
    i, f, o = (torch.sigmoid(gates[:, n * width : (n + 1) * width]) for n in (0, 1, 3))
    new = f * c + i * torch.tanh(gates[:, 2 * width : 3 * width])
    return o * torch.tanh(new), new


@alternative("gru_step")
def gru_step__by_lerp(x, h, w_ih, w_hh, b_ih, b_hh):
    _fits(3, x, h, w_ih, w_hh, b_ih, b_hh)
    width = h.shape[-1]
    ours, theirs = F.linear(x, w_ih, b_ih), F.linear(h, w_hh, b_hh)
    r, z = torch.sigmoid(ours[:, : 2 * width] + theirs[:, : 2 * width]).split(width, dim=1)
    n = torch.tanh(ours[:, 2 * width :] + r * theirs[:, 2 * width :])
    return n + z * (h - n)


@alternative("unroll")
def unroll__by_products(step, xs, state, lengths=None):
    first = state[0] if isinstance(state, tuple) else state
    if first.shape[0] != xs.shape[0]:
        raise ValueError(f"{tuple(first.shape)} and {tuple(xs.shape)}")
    if lengths is not None and tuple(lengths.shape) != (xs.shape[0],):
        raise ValueError(f"{tuple(lengths.shape)} and {tuple(xs.shape)}")
    outputs = [first.new_empty(xs.shape[0], 0, first.shape[1])]
    for t, x in enumerate(xs.unbind(1)):
        new = step(x, state)
        if lengths is None:
            state = new
            outputs.append((new[0] if isinstance(new, tuple) else new)[:, None])
            continue
        goes = (lengths > t).unsqueeze(1)
        if isinstance(new, tuple):
            state = tuple(torch.where(goes, a, b) for a, b in zip(new, state, strict=True))
            outputs.append((state[0] * goes)[:, None])
        else:
            state = torch.where(goes, new, state)
            outputs.append((state * goes)[:, None])
    return torch.cat(outputs, 1), state


@alternative("LSTM")
class LSTM__by_loop(nn.Module):
    def __init__(self, input_size, hidden_size, num_layers=1, *, device=None, dtype=None):
        super().__init__()
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        for layer in range(num_layers):
            n = input_size if layer == 0 else hidden_size
            for name, shape in [("weight_ih", (n,)), ("weight_hh", (hidden_size,)), ("bias_ih", ()), ("bias_hh", ())]:
                parameter = nn.Parameter(torch.empty(4 * hidden_size, *shape, device=device, dtype=dtype))
                nn.init.uniform_(parameter, -(hidden_size**-0.5), hidden_size**-0.5)
                setattr(self, f"{name}_l{layer}", parameter)

    def forward(self, xs, state=None):
        if xs.shape[2] != self.input_size:
            raise ValueError(f"{tuple(xs.shape)} and {tuple(self.weight_ih_l0.shape)}")
        needed = (self.num_layers, xs.shape[0], self.hidden_size)
        h0, c0 = (xs.new_zeros(needed), xs.new_zeros(needed)) if state is None else state
        _needs("h", h0, needed)
        _needs("c", c0, needed)
        last_h, last_c = [], []
        for layer in range(self.num_layers):
            own = {name: getattr(self, f"{name}_l{layer}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
            h, c = h0[layer], c0[layer]
            inputs = xs @ own["weight_ih"].T + (own["bias_ih"] + own["bias_hh"])
            outputs = []
            for gates in inputs.unbind(1):
                i, f, g, o = (gates + h @ own["weight_hh"].T).split(self.hidden_size, 1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
                outputs.append(h)
            xs = torch.stack(outputs, 1) if outputs else inputs.new_zeros(len(xs), 0, self.hidden_size)
            last_h.append(h)
            last_c.append(c)
        return xs, (torch.stack(last_h), torch.stack(last_c))


@alternative("tbptt")
def tbptt__by_split(model, xs, ys, k, loss_fn, optimizer):
    if k < 1:
        raise ValueError(f"k is {k}")
    if xs.shape[0] != ys.shape[0] or xs.shape[1] != ys.shape[1]:
        raise ValueError(f"{tuple(xs.shape)} and {tuple(ys.shape)}")
    losses, state = [], None
    if not xs.shape[1]:
        return losses
    for x, y in zip(xs.split(k, dim=1), ys.split(k, dim=1), strict=True):
        if state is not None:
            state = tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()
        out, state = model(x, state)
        loss = loss_fn(out, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses


@alternative("echo_batch")
def echo_batch__by_roll(n, length, delay, *, generator):
    bits = torch.randint(0, 2, (n, length, 1), generator=generator, device=generator.device)
    heard = bits.roll(delay, dims=1) if delay < length else torch.zeros_like(bits)
    heard[:, :delay] = 0
    return torch.where(bits == 1, 1.0, -1.0), heard.float()


@alternative("Echo")
class Echo__with_own_product(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.cell = cell
        self.readout = nn.Linear(cell.hidden_size, 1)

    def forward(self, xs, state=None):
        outputs, state = self.cell(xs, state)
        return outputs @ self.readout.weight.T + self.readout.bias, state


@alternative("scan")
def scan__by_halves(a, b):
    if a.shape != b.shape:
        raise ValueError(f"{tuple(a.shape)} and {tuple(b.shape)}")
    T = b.shape[1]
    if T < 2:
        return b.clone()
    even = T - T % 2
    later = scan__by_halves(a[:, 1:even:2] * a[:, 0:even:2], a[:, 1:even:2] * b[:, 0:even:2] + b[:, 1:even:2])
    before = torch.cat([torch.zeros_like(b[:, :1]), later], 1)[:, : (T + 1) // 2]
    firsts = a[:, 0::2] * before + b[:, 0::2]
    pairs = torch.stack([firsts[:, : even // 2], later], 2).flatten(1, 2)
    return torch.cat([pairs, firsts[:, even // 2 :]], 1)
