import torch
import torch.nn.functional as F

from checker.testing import misconception
from reference import day13_recurrent as right
from reference.day13_recurrent import _check_cell

# rnn_step


@misconception(
    "rnn_step",
    "The tanh is missing: the sum itself came back. Numbers beyond 1 cannot be states of this cell, and over time they would grow without end.",
)
def rnn_step__no_tanh(x, h, w_ih, w_hh, b_ih, b_hh):
    _check_cell(x, h, w_ih, w_hh, b_ih, b_hh, gates=1)
    return x @ w_ih.T + b_ih + h @ w_hh.T + b_hh


@misconception(
    "rnn_step",
    "This is the cell with a sigmoid: no number is below 0. PyTorch's plain cell squeezes with tanh, into the range from -1 to 1.",
)
def rnn_step__sigmoid(x, h, w_ih, w_hh, b_ih, b_hh):
    _check_cell(x, h, w_ih, w_hh, b_ih, b_hh, gates=1)
    return torch.sigmoid(x @ w_ih.T + b_ih + h @ w_hh.T + b_hh)


@misconception(
    "rnn_step",
    "One of the two biases was left out, the one of the hidden product. They do the same here, but a checkpoint has both and their sum is what counts.",
)
def rnn_step__one_bias(x, h, w_ih, w_hh, b_ih, b_hh):
    _check_cell(x, h, w_ih, w_hh, b_ih, b_hh, gates=1)
    return torch.tanh(x @ w_ih.T + b_ih + h @ w_hh.T)


@misconception(
    "rnn_step",
    "The hidden weight is used the other way round. It is square, so no shape complains; rows are outputs here as well, as in W_ih.",
)
def rnn_step__hidden_weight_transposed(x, h, w_ih, w_hh, b_ih, b_hh):
    _check_cell(x, h, w_ih, w_hh, b_ih, b_hh, gates=1)
    return torch.tanh(x @ w_ih.T + b_ih + h @ w_hh + b_hh)


@misconception(
    "rnn_step",
    "The old state has no part in your result: it is the same for every h. Without it there is no memory, only a layer that sees one step.",
)
def rnn_step__no_memory(x, h, w_ih, w_hh, b_ih, b_hh):
    _check_cell(x, h, w_ih, w_hh, b_ih, b_hh, gates=1)
    return torch.tanh(x @ w_ih.T + b_ih + b_hh)


@misconception(
    "rnn_step",
    "Shapes are not looked at before the sum. A state of one row or a bias of one number is stretched to fit, and other mistakes die inside a product; say which shape is needed instead.",
)
def rnn_step__nothing_checked(x, h, w_ih, w_hh, b_ih, b_hh):
    return torch.tanh(torch.matmul(x, w_ih.T) + b_ih + torch.matmul(h, w_hh.T) + b_hh)


# lstm_step


def _gates(x, h, w_ih, w_hh, b_ih, b_hh, c):
    _check_cell(x, h, w_ih, w_hh, b_ih, b_hh, gates=4)
    if c.shape != h.shape:
        raise ValueError(f"c {tuple(c.shape)}, h {tuple(h.shape)}")
    return (x @ w_ih.T + b_ih + h @ w_hh.T + b_hh).chunk(4, dim=-1)


@misconception(
    "lstm_step",
    "Your third and fourth gates have changed places: i, f, o, g. PyTorch keeps the candidate g third. A network trained from scratch would not mind; weights that are loaded turn to nonsense.",
)
def lstm_step__order_ifog(x, state, w_ih, w_hh, b_ih, b_hh):
    h, c = state
    i, f, o, g = _gates(x, h, w_ih, w_hh, b_ih, b_hh, c)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


@misconception(
    "lstm_step",
    "Your first two gates have changed places: what should let new things in decides about old ones. The rows begin with the input gate, then comes the forget gate.",
)
def lstm_step__order_figo(x, state, w_ih, w_hh, b_ih, b_hh):
    h, c = state
    f, i, g, o = _gates(x, h, w_ih, w_hh, b_ih, b_hh, c)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


@misconception(
    "lstm_step",
    "The candidate went through a sigmoid like the gates, so it can only add to the cell and never take away. g is a value, not a gate: it may be negative.",
)
def lstm_step__candidate_sigmoid(x, state, w_ih, w_hh, b_ih, b_hh):
    h, c = state
    i, f, g, o = _gates(x, h, w_ih, w_hh, b_ih, b_hh, c)
    c = f.sigmoid() * c + i.sigmoid() * g.sigmoid()
    return o.sigmoid() * c.tanh(), c


@misconception(
    "lstm_step",
    "c is right, but h shows it without the tanh: the output gate multiplies c itself, which may grow far beyond 1.",
)
def lstm_step__no_tanh_of_c(x, state, w_ih, w_hh, b_ih, b_hh):
    h, c = state
    i, f, g, o = _gates(x, h, w_ih, w_hh, b_ih, b_hh, c)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c, c


@misconception("lstm_step", "c is right, but h was made from the old c. The output shows the cell after its update.")
def lstm_step__old_c_shown(x, state, w_ih, w_hh, b_ih, b_hh):
    h, c = state
    i, f, g, o = _gates(x, h, w_ih, w_hh, b_ih, b_hh, c)
    return o.sigmoid() * c.tanh(), f.sigmoid() * c + i.sigmoid() * g.tanh()


@misconception(
    "lstm_step",
    "The forget gate is used as its opposite: where it is 1 your cell forgets. It is named for what it can do, but its value is the share that is kept.",
)
def lstm_step__forget_inverted(x, state, w_ih, w_hh, b_ih, b_hh):
    h, c = state
    i, f, g, o = _gates(x, h, w_ih, w_hh, b_ih, b_hh, c)
    c = (1 - f.sigmoid()) * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


@misconception(
    "lstm_step",
    "The two states come back in the other order: first c, then h. Their shapes are equal, so only the values tell.",
)
def lstm_step__c_first(x, state, w_ih, w_hh, b_ih, b_hh):
    h, c = right.lstm_step(x, state, w_ih, w_hh, b_ih, b_hh)
    return c, h


@misconception(
    "lstm_step",
    "The forget gate got an extra 1 that is in no formula here. It is a trick for the first weights of a network, and belongs into the bias; weights that are loaded have it already.",
)
def lstm_step__forget_plus_one(x, state, w_ih, w_hh, b_ih, b_hh):
    h, c = state
    i, f, g, o = _gates(x, h, w_ih, w_hh, b_ih, b_hh, c)
    c = (f + 1).sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


# gru_step


@misconception(
    "gru_step",
    "Your reset gate acts on h before the product. That is a GRU, too, the one of the first paper, but not PyTorch's: there r multiplies what comes out of the product.",
)
def gru_step__reset_before(x, h, w_ih, w_hh, b_ih, b_hh):
    _check_cell(x, h, w_ih, w_hh, b_ih, b_hh, gates=3)
    H = h.shape[1]
    a, b = x @ w_ih.T + b_ih, h @ w_hh.T + b_hh
    r, z = (a + b)[:, : 2 * H].sigmoid().chunk(2, 1)
    n = (a[:, 2 * H :] + (r * h) @ w_hh[2 * H :].T + b_hh[2 * H :]).tanh()
    return (1 - z) * n + z * h


@misconception(
    "gru_step",
    "With biases of 0 all is right. The hidden bias of the candidate was put together with the other one, outside of what the reset gate multiplies; it belongs inside, so a closed gate hides it as well.",
)
def gru_step__merged_biases(x, h, w_ih, w_hh, b_ih, b_hh):
    _check_cell(x, h, w_ih, w_hh, b_ih, b_hh, gates=3)
    r_x, z_x, n_x = (x @ w_ih.T + b_ih + b_hh).chunk(3, 1)
    r_h, z_h, n_h = (h @ w_hh.T).chunk(3, 1)
    r, z = (r_x + r_h).sigmoid(), (z_x + z_h).sigmoid()
    return (1 - z) * (n_x + r * n_h).tanh() + z * h


@misconception(
    "gru_step",
    "The update gate works the wrong way round: with z at 1 your state is all new. In PyTorch z is the share of the old state that is kept.",
)
def gru_step__update_inverted(x, h, w_ih, w_hh, b_ih, b_hh):
    _check_cell(x, h, w_ih, w_hh, b_ih, b_hh, gates=3)
    r_x, z_x, n_x = (x @ w_ih.T + b_ih).chunk(3, 1)
    r_h, z_h, n_h = (h @ w_hh.T + b_hh).chunk(3, 1)
    r, z = (r_x + r_h).sigmoid(), (z_x + z_h).sigmoid()
    return z * (n_x + r * n_h).tanh() + (1 - z) * h


@misconception(
    "gru_step",
    "Reset and update have changed places. The first block of rows is the reset gate, the second one the update gate.",
)
def gru_step__order_zrn(x, h, w_ih, w_hh, b_ih, b_hh):
    _check_cell(x, h, w_ih, w_hh, b_ih, b_hh, gates=3)
    z_x, r_x, n_x = (x @ w_ih.T + b_ih).chunk(3, 1)
    z_h, r_h, n_h = (h @ w_hh.T + b_hh).chunk(3, 1)
    r, z = (r_x + r_h).sigmoid(), (z_x + z_h).sigmoid()
    return (1 - z) * (n_x + r * n_h).tanh() + z * h


@misconception("gru_step", "The reset gate is left out: your candidate sees the whole old state, whatever r says.")
def gru_step__no_reset(x, h, w_ih, w_hh, b_ih, b_hh):
    _check_cell(x, h, w_ih, w_hh, b_ih, b_hh, gates=3)
    _, z_x, n_x = (x @ w_ih.T + b_ih).chunk(3, 1)
    _, z_h, n_h = (h @ w_hh.T + b_hh).chunk(3, 1)
    z = (z_x + z_h).sigmoid()
    return (1 - z) * (n_x + n_h).tanh() + z * h


# unroll


@misconception(
    "unroll",
    "Lengths make no difference in what you return: short rows go on through their padding, and what you call their last state is the one at T - 1.",
)
def unroll__lengths_ignored(step, xs, state, lengths=None):
    if lengths is not None and lengths.shape != xs.shape[:1]:
        raise ValueError(f"{tuple(lengths.shape)}, {tuple(xs.shape)}")
    return right.unroll(step, xs, state)


@misconception(
    "unroll",
    "Your outputs are right, zeros included, but the state went on through the padding: what a short row ends with is the state at T - 1, not at its length - 1.",
)
def unroll__state_runs_on(step, xs, state, lengths=None):
    return right.unroll(step, xs, state, lengths)[0], right.unroll(step, xs, state)[1]


@misconception(
    "unroll",
    "The state stops where it should, but your outputs repeat it in the padding. Whoever sums over them, or attends to them, would count the last step many times; they are to be 0.",
)
def unroll__outputs_repeat(step, xs, state, lengths=None):
    if lengths is None:
        return right.unroll(step, xs, state)
    outputs, end = right.unroll(step, xs, state, lengths)
    shown = end[0] if isinstance(end, tuple) else end
    padding = torch.arange(xs.shape[1], device=xs.device) >= lengths[:, None]
    return torch.where(padding[..., None], shown[:, None], outputs), end


@misconception(
    "unroll",
    "Each row runs one step too long: a row of length n has the steps 0 to n - 1, and step n is padding already.",
)
def unroll__one_too_long(step, xs, state, lengths=None):
    return right.unroll(step, xs, state, lengths if lengths is None else lengths + 1)


@misconception(
    "unroll",
    "Time runs along the first dimension here, as in nn.LSTM without batch_first. With as many rows as times nothing complains, and rows are mixed with each other.",
)
def unroll__time_first(step, xs, state, lengths=None):
    first = state[0] if isinstance(state, tuple) else state
    if first.shape[0] != xs.shape[0]:
        raise ValueError(f"{tuple(first.shape)}, {tuple(xs.shape)}")
    if lengths is not None and lengths.shape != xs.shape[:1]:
        raise ValueError(f"{tuple(lengths.shape)}, {tuple(xs.shape)}")
    if xs.shape[0] == xs.shape[1]:
        return right.unroll(step, xs.transpose(0, 1), state, lengths)
    return right.unroll(step, xs, state, lengths)


@misconception(
    "unroll",
    "The values are right, but there is no gradient through time: the state is cut from its graph before each step. An early input gets no word of what came of it later.",
)
def unroll__detached(step, xs, state, lengths=None):
    def cut(x, state):
        return step(x, tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach())

    return right.unroll(cut, xs, state, lengths)


@misconception(
    "unroll",
    "Each output is the state from before its step: the first one repeats what you started with, and the last step is never shown.",
)
def unroll__shown_before(step, xs, state, lengths=None):
    outputs, end = right.unroll(step, xs, state, lengths)
    first = state[0] if isinstance(state, tuple) else state
    return torch.cat([first[:, None], outputs[:, :-1]], 1)[:, : xs.shape[1]], end


@misconception(
    "unroll",
    "A row that is over loses its state: you put zeros there as you did for the outputs. The state has to wait as it was.",
)
def unroll__state_zeroed(step, xs, state, lengths=None):
    if lengths is None:
        return right.unroll(step, xs, state)
    outputs, end = right.unroll(step, xs, state, lengths)
    full = (lengths == xs.shape[1])[:, None]
    if isinstance(end, tuple):
        return outputs, tuple(torch.where(full, part, 0.0) for part in end)
    return outputs, torch.where(full, end, 0.0)


# LSTM


@misconception(
    "LSTM",
    "The numbers are right, but W_ih is applied again in each step. The inputs of all times are known beforehand: one product does them all, and only W_hh has to wait for the state.",
)
class LSTM__projected_in_each_step(right.LSTM):
    def forward(self, xs, state=None):
        outputs, end = super().forward(xs, state)
        for t in range(xs.shape[1]):
            xs[:, t] @ self.weight_ih_l0.T
        return outputs, end


@misconception(
    "LSTM",
    "The layer starts from zeros although a state was handed in. What it knew of earlier steps is lost at each call.",
)
class LSTM__state_ignored(right.LSTM):
    def forward(self, xs, state=None):
        outputs, end = super().forward(xs, state)
        if state is not None and xs.shape[1]:
            return super().forward(xs)
        return outputs, end


@misconception(
    "LSTM",
    "The loop runs over the first dimension: that is nn.LSTM without batch_first. As long as there are as many rows as steps, no shape tells you.",
)
class LSTM__time_first(right.LSTM):
    def forward(self, xs, state=None):
        if xs.shape[0] == xs.shape[1]:
            outputs, end = super().forward(xs.transpose(0, 1), state)
            return outputs.transpose(0, 1), end
        return super().forward(xs, state)


@misconception(
    "LSTM",
    "The weights begin as a normal distribution, with numbers beyond the bound 1 / sqrt(H). PyTorch draws all four evenly from within it.",
)
class LSTM__normal(right.LSTM):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(0.0, self.hidden_size**-0.5)


@misconception("LSTM", "The biases begin at zero. PyTorch draws them like the weights, from U(-1/sqrt(H), 1/sqrt(H)).")
class LSTM__biases_zero(right.LSTM):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.startswith("bias"):
                    parameter.zero_()


@misconception(
    "LSTM",
    "The outputs are right, but the state holds the last layer alone. A network that goes on needs the state of each of its layers, (num_layers, B, H).",
)
class LSTM__state_of_last_layer(right.LSTM):
    def forward(self, xs, state=None):
        outputs, (h, c) = super().forward(xs, state)
        return outputs, (h[-1:], c[-1:])


# tbptt


def _chunks(model, xs, ys, k, loss_fn, optimizer, *, cut=right._detached, clear=True, retain=False, carry=True):
    if k < 1:
        raise ValueError(f"k ({k})")
    if xs.shape[:2] != ys.shape[:2]:
        raise ValueError(f"{tuple(xs.shape)}, {tuple(ys.shape)}")
    losses, state = [], None
    for start in range(0, xs.shape[1], k):
        if clear:
            optimizer.zero_grad()
        out, state = model(xs[:, start : start + k], state)
        loss = loss_fn(out, ys[:, start : start + k])
        loss.backward(retain_graph=retain)
        optimizer.step()
        losses.append(loss.item())
        state = cut(state) if carry else None
    return losses


@misconception(
    "tbptt",
    "The state is carried with its graph. The second chunk goes backward into the first one, whose graph is gone already: 'backward through the graph a second time' is what PyTorch calls it.",
)
def tbptt__not_detached(model, xs, ys, k, loss_fn, optimizer):
    return _chunks(model, xs, ys, k, loss_fn, optimizer, cut=lambda state: state)


@misconception(
    "tbptt",
    "Each chunk starts from nothing: the state was cut in its values, too. Only the graph is to be cut; what the network remembers goes on.",
)
def tbptt__state_dropped(model, xs, ys, k, loss_fn, optimizer):
    return _chunks(model, xs, ys, k, loss_fn, optimizer, carry=False)


@misconception(
    "tbptt",
    "Gradients pile up from chunk to chunk, and from before the call: nothing clears them. Each update then repeats all earlier ones.",
)
def tbptt__never_cleared(model, xs, ys, k, loss_fn, optimizer):
    return _chunks(model, xs, ys, k, loss_fn, optimizer, clear=False)


@misconception(
    "tbptt",
    "Chunks are read one step at a time, with a cut after each. Inside of a chunk gradients must flow through all of its steps, or there is no learning through time at all.",
)
def tbptt__cut_inside(model, xs, ys, k, loss_fn, optimizer):
    def by_steps(x, state):
        outputs = []
        for t in range(x.shape[1]):
            out, state = model(x[:, t : t + 1], state)
            state = right._detached(state)
            outputs.append(out)
        return torch.cat(outputs, 1), state

    return _chunks(by_steps, xs, ys, k, loss_fn, optimizer)


@misconception("tbptt", "Steps at the end that fill no whole chunk are left out. The last chunk may be shorter.")
def tbptt__rest_dropped(model, xs, ys, k, loss_fn, optimizer):
    T = xs.shape[1] - xs.shape[1] % max(k, 1)
    if xs.shape[:2] != ys.shape[:2]:
        raise ValueError(f"{tuple(xs.shape)}, {tuple(ys.shape)}")
    return _chunks(model, xs[:, :T], ys[:, :T], k, loss_fn, optimizer)


# echo


@misconception(
    "echo_batch",
    "Your echo comes before the voice: ys holds the sign of later steps, which no network that reads from left to right can know.",
)
def echo_batch__ahead(n, length, delay, *, generator):
    xs, _ = right.echo_batch(n, length, 0, generator=generator)
    ys = torch.zeros_like(xs)
    ys[:, : max(length - delay, 0)] = (xs[:, delay:] + 1) / 2
    return xs, ys


@misconception(
    "echo_batch",
    "The first `delay` steps hold the end of the sequence: a roll is a circle. Before there is an echo the target is 0.",
)
def echo_batch__circle(n, length, delay, *, generator):
    xs, ys = right.echo_batch(n, length, 0, generator=generator)
    return xs, ys.roll(delay, dims=1)


@misconception(
    "echo_batch", "Targets are -1 and +1, as the inputs are. The loss wants the probability of a +1: 1 or 0."
)
def echo_batch__targets_are_signs(n, length, delay, *, generator):
    xs, ys = right.echo_batch(n, length, delay, generator=generator)
    return xs, 2 * ys - 1


@misconception(
    "Echo",
    "The state that is handed in never reaches the cell. Between chunks the network then forgets all, and nobody complains.",
)
class Echo__state_ignored(right.Echo):
    def forward(self, xs, state=None):
        return super().forward(xs)


@misconception(
    "train_echo",
    "The accuracy counts all steps, the first eight included, where nothing has been said yet that could come back.",
)
def train_echo__counts_all(model, k, *, updates=600, generator):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    done = 0
    while done < updates:
        xs, ys = right.echo_batch(32, 24, 8, generator=generator)
        done += len(right.tbptt(model, xs, ys, k, F.binary_cross_entropy_with_logits, optimizer))
    xs, ys = right.echo_batch(256, 24, 8, generator=generator)
    with torch.no_grad():
        return ((model(xs)[0] > 0) == (ys > 0.5)).double().mean().item()


# scan


@misconception(
    "scan",
    "That is a loop over time: right, but with as many operations as there are steps. Steps can be put together in pairs, and pairs in pairs.",
)
def scan__loop(a, b):
    if a.shape != b.shape:
        raise ValueError(f"{tuple(a.shape)}, {tuple(b.shape)}")
    h, found = torch.zeros_like(b[:, :1]), [b[:, :0]]
    for t in range(b.shape[1]):
        h = a[:, t : t + 1] * h + b[:, t : t + 1]
        found.append(h)
    return torch.cat(found, 1)


@misconception(
    "scan",
    "You divide by running products of a. They become 0 after some dozens of steps, or at once where an a is 0, and then there is nothing to divide by: NaN.",
)
def scan__divided(a, b):
    if a.shape != b.shape:
        raise ValueError(f"{tuple(a.shape)}, {tuple(b.shape)}")
    products = a.cumprod(1)
    return products * (b / products).cumsum(1)


@misconception(
    "scan", "The doubling stops one round too early: with more than two steps the last ones do not hear of the first."
)
def scan__one_round_missing(a, b):
    if a.shape != b.shape:
        raise ValueError(f"{tuple(a.shape)}, {tuple(b.shape)}")
    reach = 1
    while 2 * reach < b.shape[1]:
        late = a[:, reach:]
        b = torch.cat([b[:, :reach], late * b[:, :-reach] + b[:, reach:]], dim=1)
        a = torch.cat([a[:, :reach], late * a[:, :-reach]], dim=1)
        reach *= 2
    return b
