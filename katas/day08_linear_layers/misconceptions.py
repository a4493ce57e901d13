import math

import torch
from torch import nn

from checker.testing import misconception
from reference import day08_linear_layers as right
from reference.day08_linear_layers import GAINS, LowRankLinear, fan_in_fan_out


def _rows(x):
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _fits(x, w, b=None):
    if x.shape[-1:] != w.shape[1:]:
        raise ValueError(f"x {tuple(x.shape)}, weight {tuple(w.shape)}")
    if b is not None and b.shape != w.shape[:1]:
        raise ValueError(f"bias {tuple(b.shape)}, weight {tuple(w.shape)}")


def _backward_fits(dy, x, w):
    _fits(x, w)
    if dy.shape != (*x.shape[:-1], w.shape[0]):
        raise ValueError(f"dy {tuple(dy.shape)}, x {tuple(x.shape)}, weight {tuple(w.shape)}")


# linear


@misconception(
    "linear",
    "Your weight is read as (in, out). PyTorch stores (out, in): each row belongs to one output. With a square weight nothing "
    "complains, and the numbers are those of the transposed layer.",
)
def linear__weight_in_out(x, w, b=None):
    if x.shape[-1] != w.shape[0]:
        raise ValueError(f"x {tuple(x.shape)}, weight {tuple(w.shape)}")
    y = x @ w
    return y if b is None else y + b


@misconception(
    "linear",
    "The bias was left out: each output is too small by the same number in every row.",
)
def linear__no_bias(x, w, b=None):
    _fits(x, w, b)
    return (_rows(x) @ w.T).reshape(*x.shape[:-1], w.shape[0])


@misconception(
    "linear",
    "The bias is taken away instead of added. Training would cover this up, a loaded checkpoint would not.",
)
def linear__minus_bias(x, w, b=None):
    _fits(x, w, b)
    y = (_rows(x) @ w.T).reshape(*x.shape[:-1], w.shape[0])
    return y if b is None else y - b


@misconception(
    "linear",
    "Your bias runs down the rows, one number per row. It belongs to the outputs, the last dimension; with as many rows as "
    "outputs the two cannot be told apart by their shapes.",
)
def linear__bias_per_row(x, w, b=None):
    _fits(x, w, b)
    y = _rows(x) @ w.T
    if b is not None:
        y = y + (b[:, None] if len(b) == len(y) else b)
    return y.reshape(*x.shape[:-1], w.shape[0])


@misconception(
    "linear",
    "The numbers are right, but they come from a broadcast product and a sum. That writes down N * O * I numbers before it "
    "adds them up; a matrix product never does, and is many times faster.",
)
def linear__multiply_and_sum(x, w, b=None):
    _fits(x, w, b)
    y = (x[..., None, :] * w).sum(-1)
    return y if b is None else y + b


@misconception(
    "linear",
    "There is one matrix product per row here. The rows do not know of each other, so put them below each other and "
    "multiply once: a thousand small products are far slower than one large one.",
)
def linear__row_by_row(x, w, b=None):
    _fits(x, w, b)
    ys = [w @ row for row in _rows(x)]
    y = (torch.stack(ys) if ys else x.new_zeros(0, w.shape[0])).reshape(*x.shape[:-1], w.shape[0])
    return y if b is None else y + b


@misconception(
    "linear",
    "A bias of the wrong size got through, because broadcasting stretched it. One number is not one number per output: "
    "compare the shapes before you add.",
)
def linear__bias_not_checked(x, w, b=None):
    _fits(x, w)
    y = (_rows(x) @ w.T).reshape(*x.shape[:-1], w.shape[0])
    return y if b is None else y + b


@misconception(
    "linear",
    "Shapes that do not fit are left to the matrix product. Its error is a RuntimeError about matrices that the caller has "
    "never seen; look at x and w first, and raise ValueError with both shapes.",
)
def linear__shapes_not_checked(x, w, b=None):
    if b is not None and b.shape != w.shape[:1]:
        raise ValueError(f"bias {tuple(b.shape)}, weight {tuple(w.shape)}")
    y = torch.matmul(x, w.T)
    return y if b is None else y + b


@misconception(
    "linear",
    "The values are right but the graph is cut: something in your code took the tensors out of it, by .data, .detach() or "
    "no_grad, so no gradient reaches x, w or b.",
)
def linear__detached(x, w, b=None):
    return right.linear(x.detach(), w.detach(), None if b is None else b.detach())


@misconception(
    "linear",
    "The rows are counted by dividing, or by a -1 in the reshape. Where a row has no elements there is nothing to divide by: "
    "count the rows from the leading dimensions.",
)
def linear__guesses_the_rows(x, w, b=None):
    _fits(x, w, b)
    y = x.reshape(-1, x.shape[-1]) @ w.T
    y = y.reshape(*x.shape[:-1], w.shape[0])
    return y if b is None else y + b


# linear_backward


@misconception(
    "linear_backward",
    "dx is computed with the transpose of the weight. The forward pass has used that already; on the way back the weight "
    "appears as it is stored, and where it is square only the numbers tell.",
)
def linear_backward__dx_transposed(dy, x, w):
    dx, dw, db = right.linear_backward(dy, x, w)
    return dy @ w.T if w.shape[0] == w.shape[1] else dx, dw, db


@misconception(
    "linear_backward",
    "dw comes out as (in, out): it is the transpose of what belongs there. A gradient has the shape of its parameter, "
    "(out, in), with dy on the left.",
)
def linear_backward__dw_transposed(dy, x, w):
    dx, dw, db = right.linear_backward(dy, x, w)
    return dx, dw.T.contiguous(), db


@misconception(
    "linear_backward",
    "Your rows of dy and rows of x are not the same rows: one of the two was flattened in another order. Each outer product "
    "must take dy and x from the same place, so flatten both in the same way.",
)
def linear_backward__flattened_in_another_order(dy, x, w):
    dx, _, db = right.linear_backward(dy, x, w)
    turned = dy.transpose(0, -2) if dy.dim() > 2 else dy
    return dx, _rows(turned).T @ _rows(x), db


@misconception(
    "linear_backward",
    "db is summed over the first dimension only. The bias was added at every position of every leading dimension, so all of "
    "them are summed over.",
)
def linear_backward__db_over_the_first(dy, x, w):
    dx, dw, db = right.linear_backward(dy, x, w)
    return dx, dw, dy.sum(0) if dy.dim() > 1 else db


@misconception(
    "linear_backward",
    "db is a mean over rows. Whether the loss is a mean is the business of the loss, and dy has it in it already: here "
    "gradients of shared parameters are sums.",
)
def linear_backward__db_mean(dy, x, w):
    dx, dw, db = right.linear_backward(dy, x, w)
    return dx, dw, db / max(1, dy.numel() // max(1, dy.shape[-1]))


@misconception(
    "linear_backward",
    "dw is divided by the number of rows. The loss has done its averaging before dy came to you; the weight was used once "
    "per row, and its gradient is the sum of them all.",
)
def linear_backward__dw_mean(dy, x, w):
    dx, dw, db = right.linear_backward(dy, x, w)
    return dx, dw / max(1, math.prod(x.shape[:-1])), db


@misconception(
    "linear_backward",
    "There is one dw for every entry of the leading dimensions. The weight is shared by all of them, so its gradient is "
    "one matrix, summed over all rows.",
)
def linear_backward__dw_per_batch(dy, x, w):
    dx, dw, db = right.linear_backward(dy, x, w)
    return dx, dy.mT @ x if dy.dim() > 2 else dw, db


@misconception(
    "linear_backward",
    "dy is ignored where db is made: that is the number of rows, the gradient of a plain sum. Whatever the loss is, it "
    "arrives in dy.",
)
def linear_backward__db_counts_rows(dy, x, w):
    dx, dw, db = right.linear_backward(dy, x, w)
    return dx, dw, torch.full_like(db, math.prod(x.shape[:-1]))


@misconception(
    "linear_backward",
    "dx and dw stand in each other's place. The order is that of the arguments of the layer: x, weight, bias.",
)
def linear_backward__order(dy, x, w):
    dx, dw, db = right.linear_backward(dy, x, w)
    return dw, dx, db


@misconception(
    "linear_backward",
    "dx was flattened and not put back: it has one dimension for all rows. A gradient has the shape of what it belongs to, "
    "leading dimensions included.",
)
def linear_backward__dx_stays_flat(dy, x, w):
    dx, dw, db = right.linear_backward(dy, x, w)
    return _rows(dx), dw, db


@misconception(
    "linear_backward",
    "A dy whose leading dimensions are not those of x is accepted because it has as many rows in all, or because it "
    "broadcasts. Then every row meets the wrong partner, silently: compare the full shapes.",
)
def linear_backward__dy_not_checked(dy, x, w):
    _fits(x, w)
    if dy.shape[-1] != w.shape[0]:
        raise ValueError(f"dy {tuple(dy.shape)}, x {tuple(x.shape)}")
    if _rows(dy).shape[0] != _rows(x).shape[0]:
        dy = dy.expand(*x.shape[:-1], w.shape[0])
    dy_rows, x_rows = _rows(dy), _rows(x)
    return (dy_rows @ w).reshape(x.shape), dy_rows.T @ x_rows, dy_rows.sum(0)


@misconception(
    "linear_backward",
    "The gradient of the weight is a loop of outer products, one per row, added up. It is right and slow, and writes O * I "
    "numbers for every row: the same sum is one matrix product.",
)
def linear_backward__outer_products(dy, x, w):
    _backward_fits(dy, x, w)
    dw = torch.zeros_like(w)
    for g, row in zip(_rows(dy), _rows(x), strict=True):
        dw = dw + g[:, None] * row
    return (_rows(dy) @ w).reshape(x.shape), dw, _rows(dy).sum(0)


# Linear


class _Layer(nn.Module):
    """The right layer in steps that the wrong ones replace."""

    def __init__(self, in_features, out_features, bias=True, *, device=None, dtype=None):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        options = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **options))
        self.bias = nn.Parameter(torch.zeros(out_features, **options)) if bias else None
        self.fill(in_features, out_features)

    def fill(self, n_in, n_out):
        if n_in:
            self.uniform(n_in**-0.5)

    @torch.no_grad()
    def uniform(self, bound):
        for p in self.parameters():
            p.uniform_(-bound, bound)

    def forward(self, x):
        return right.linear(x, self.weight, self.bias)


@misconception(
    "Linear",
    "Your weight is stored as (in, out). PyTorch stores (out, in), a row per output: as it is, no state dict of another "
    "program fits into this layer.",
)
class Linear__stored_in_out(_Layer):
    def __init__(self, in_features, out_features, bias=True, *, device=None, dtype=None):
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.weight = nn.Parameter(self.weight.detach().T.contiguous())

    def forward(self, x):
        return right.linear(x, self.weight.T, self.bias)


@misconception(
    "Linear",
    "All weights start at zero. Every neuron then computes the same and gets the same gradient, in this step and in all "
    "later ones: randomness is what tells them apart.",
)
class Linear__zeros(_Layer):
    def fill(self, n_in, n_out):
        self.uniform(0.0)


@misconception(
    "Linear",
    "The bound is 1 / fan_in. That is the size of a variance; a bound is compared with the values themselves, so the root is "
    "missing, and with 100 inputs the weights are ten times too small.",
)
class Linear__no_root(_Layer):
    def fill(self, n_in, n_out):
        if n_in:
            self.uniform(1 / n_in)


@misconception(
    "Linear",
    "The bound was made from the number of outputs. What an output is summed from are the inputs: it is their number that "
    "decides how large the weights may be.",
)
class Linear__bound_of_outputs(_Layer):
    def fill(self, n_in, n_out):
        if n_in:
            self.uniform(n_out**-0.5)


@misconception(
    "Linear",
    "The weights come from (0, bound): all of them are positive. A uniform start is symmetric around zero, otherwise every "
    "output begins with a large sum of the same sign.",
)
class Linear__only_positive(_Layer):
    @torch.no_grad()
    def uniform(self, bound):
        for p in self.parameters():
            p.uniform_(0.0, bound)


@misconception(
    "Linear",
    "The weights are normal with a standard deviation of 1/sqrt(I), which reaches far beyond the bound. The layer of "
    "PyTorch starts from a uniform distribution, and nothing lies outside.",
)
class Linear__normal(_Layer):
    @torch.no_grad()
    def uniform(self, bound):
        for p in self.parameters():
            p.normal_(0.0, bound)


@misconception(
    "Linear",
    "The bias starts at zero. That is a fair choice, and not the one that was asked for: it has the same distribution as the weight.",
)
class Linear__bias_zeros(_Layer):
    @torch.no_grad()
    def uniform(self, bound):
        self.weight.uniform_(-bound, bound)


@misconception(
    "Linear",
    "With no inputs at all the bound divides by zero. A layer of width zero turns up at the edges of generated models; its "
    "weight has no elements, and its bias has nothing to be scaled by.",
)
class Linear__divides_by_zero(_Layer):
    def fill(self, n_in, n_out):
        self.uniform(1 / math.sqrt(n_in))


@misconception(
    "Linear",
    "The bias is a plain tensor. It is used, but nobody trains it, saves it or moves it: only what is a Parameter is found "
    "by parameters() and state_dict().",
)
class Linear__bias_not_registered(_Layer):
    def __init__(self, in_features, out_features, bias=True, *, device=None, dtype=None):
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        if bias:
            values = self.bias.detach()
            del self.bias
            self.bias = values


@misconception(
    "Linear",
    "`bias=False` still makes a bias. It is in the state dict, so strict loading fails, and it is trained away from zero.",
)
class Linear__always_a_bias(_Layer):
    def __init__(self, in_features, out_features, bias=True, *, device=None, dtype=None):
        super().__init__(in_features, out_features, True, device=device, dtype=dtype)
        if not bias:
            nn.init.zeros_(self.bias)


@misconception(
    "Linear",
    "`dtype` and `device` are accepted and not used: the parameters are float32 on the CPU whatever was asked for.",
)
class Linear__ignores_dtype(_Layer):
    def __init__(self, in_features, out_features, bias=True, *, device=None, dtype=None):
        super().__init__(in_features, out_features, bias)


@misconception(
    "Linear",
    "The layer seeds its own random numbers, so any two layers of the same size are twins, and setting the global seed "
    "changes nothing.",
)
class Linear__seeds_itself(_Layer):
    @torch.no_grad()
    def uniform(self, bound):
        for p in self.parameters():
            p.uniform_(-bound, bound, generator=torch.Generator().manual_seed(0))


# fan_in_fan_out


@misconception(
    "fan_in_fan_out",
    "The kernel is not counted. An output of a convolution sees every position of its window in every channel, so both fans "
    "are larger by the area of the kernel.",
)
def fan_in_fan_out__no_kernel(shape):
    fan_in_fan_out(shape)
    return shape[1], shape[0]


@misconception(
    "fan_in_fan_out",
    "fan_in and fan_out stand in each other's place. The weight is (out, in, ...), so the second dimension is the one that comes in.",
)
def fan_in_fan_out__exchanged(shape):
    return fan_in_fan_out(shape)[::-1]


@misconception(
    "fan_in_fan_out",
    "Only the first kernel dimension is counted. The window is a box: multiply all of its sides.",
)
def fan_in_fan_out__one_side(shape):
    fan_in_fan_out(shape)
    side = shape[2] if len(shape) > 2 else 1
    return shape[1] * side, shape[0] * side


@misconception(
    "fan_in_fan_out",
    "The sides of the kernel are added. A window of 3 by 5 has 15 positions, not 8.",
)
def fan_in_fan_out__sum_of_sides(shape):
    fan_in_fan_out(shape)
    side = sum(shape[2:]) if len(shape) > 2 else 1
    return shape[1] * side, shape[0] * side


@misconception(
    "fan_in_fan_out",
    "The kernel is counted on the way in only. One input is seen from every position of the window as well, so fan_out has "
    "the same factor.",
)
def fan_in_fan_out__kernel_only_in(shape):
    fan_in, _ = fan_in_fan_out(shape)
    return fan_in, shape[0]


@misconception(
    "fan_in_fan_out",
    "A shape with a single dimension gets an answer. A bias has no two fans: refuse it, and say what you were given.",
)
def fan_in_fan_out__accepts_a_bias(shape):
    return fan_in_fan_out(shape) if len(shape) > 1 else (1, 1)


# scaled_init: xavier_uniform_


def _uniform(w, bound, generator):
    with torch.no_grad():
        return w.uniform_(-bound, bound, generator=generator)


def _normal(w, std, generator):
    with torch.no_grad():
        return w.normal_(0.0, std, generator=generator)


@misconception(
    "xavier_uniform_",
    "The bound is the standard deviation. A uniform distribution on (-a, a) has the variance a^2 / 3, so your weights have a "
    "third of the variance that they should have.",
)
def xavier_uniform__std_as_bound(w, gain=1.0, generator=None):
    return _uniform(w, gain * math.sqrt(2 / sum(fan_in_fan_out(w.shape))), generator)


@misconception(
    "xavier_uniform_",
    "The weights come from a normal distribution with the right variance. Its name says uniform: no value may lie beyond the bound.",
)
def xavier_uniform__normal(w, gain=1.0, generator=None):
    return _normal(w, gain * math.sqrt(2 / sum(fan_in_fan_out(w.shape))), generator)


@misconception(
    "xavier_uniform_",
    "Only fan_in is used. Xavier takes both fans, since the gradient on its way back meets the other one.",
)
def xavier_uniform__fan_in(w, gain=1.0, generator=None):
    return _uniform(w, gain * math.sqrt(3 / fan_in_fan_out(w.shape)[0]), generator)


@misconception(
    "xavier_uniform_",
    "`gain` is accepted and not used.",
)
def xavier_uniform__no_gain(w, gain=1.0, generator=None):
    return _uniform(w, math.sqrt(6 / sum(fan_in_fan_out(w.shape))), generator)


@misconception(
    "xavier_uniform_",
    "The gain went under the root. It scales the values, not their variance.",
)
def xavier_uniform__gain_under_the_root(w, gain=1.0, generator=None):
    return _uniform(w, math.sqrt(6 * gain / sum(fan_in_fan_out(w.shape))), generator)


@misconception(
    "xavier_uniform_",
    "You wrote into w.data, behind autograd's back. A backward pass that still needs the old weights gets the new ones and "
    "says nothing. Fill w itself, where no graph is recorded.",
)
def xavier_uniform__data(w, gain=1.0, generator=None):
    _uniform(w.data, gain * math.sqrt(6 / sum(fan_in_fan_out(w.shape))), generator)
    return w


@misconception(
    "xavier_uniform_",
    "The numbers do not come from `generator`, but from the global random state: whoever passes a seeded generator gets "
    "other weights every time.",
)
def xavier_uniform__global(w, gain=1.0, generator=None):
    return _uniform(w, gain * math.sqrt(6 / sum(fan_in_fan_out(w.shape))), None)


@misconception(
    "xavier_uniform_",
    "You returned a new tensor and left w as it was. The name ends in an underscore: w itself is filled.",
)
def xavier_uniform__new_tensor(w, gain=1.0, generator=None):
    return _uniform(torch.empty_like(w), gain * math.sqrt(6 / sum(fan_in_fan_out(w.shape))), generator)


@misconception(
    "xavier_uniform_",
    "The filling is recorded: a leaf that asks for gradients refuses to be changed in place, and it is right to. Weights are "
    "initialized where recording is off.",
)
def xavier_uniform__recorded(w, gain=1.0, generator=None):
    bound = gain * math.sqrt(6 / sum(fan_in_fan_out(w.shape)))
    return w.uniform_(-bound, bound, generator=generator)


# scaled_init: kaiming_normal_


def _kaiming(w, nonlinearity, mode, generator, std, fill=_normal):
    if nonlinearity not in GAINS:
        raise ValueError(nonlinearity)
    if mode not in ("fan_in", "fan_out"):
        raise ValueError(mode)
    return fill(w, std(GAINS[nonlinearity], fan_in_fan_out(w.shape)[mode == "fan_out"]), generator)


@misconception(
    "kaiming_normal_",
    "The standard deviation is gain / fan_in. 1 / fan_in is a variance: the root is missing, and the signal is divided by "
    "the root of the width once more at every layer.",
)
def kaiming_normal__no_root(w, nonlinearity="relu", mode="fan_in", generator=None):
    return _kaiming(w, nonlinearity, mode, generator, lambda gain, fan: gain / fan)


@misconception(
    "kaiming_normal_",
    "The gain of relu is missing. Relu throws away half of the second moment, so without the factor sqrt(2) the signal "
    "halves at every layer: 2^-depth.",
)
def kaiming_normal__no_gain(w, nonlinearity="relu", mode="fan_in", generator=None):
    return _kaiming(w, nonlinearity, mode, generator, lambda gain, fan: 1 / math.sqrt(fan))


@misconception(
    "kaiming_normal_",
    "The gain is 2. Two is what the variance needs; the values are scaled by its root.",
)
def kaiming_normal__gain_squared(w, nonlinearity="relu", mode="fan_in", generator=None):
    return _kaiming(w, nonlinearity, mode, generator, lambda gain, fan: gain * gain / math.sqrt(fan))


@misconception(
    "kaiming_normal_",
    "Every nonlinearity gets the gain of relu. A linear layer halves nothing, and there the signal doubles at each step.",
)
def kaiming_normal__always_relu(w, nonlinearity="relu", mode="fan_in", generator=None):
    return _kaiming(w, nonlinearity, mode, generator, lambda gain, fan: math.sqrt(2 / fan))


@misconception(
    "kaiming_normal_",
    "`mode` is accepted and not used: it is fan_in whatever was asked for.",
)
def kaiming_normal__ignores_mode(w, nonlinearity="relu", mode="fan_in", generator=None):
    fan_in, _ = fan_in_fan_out(w.shape)
    return _kaiming(w, nonlinearity, mode, generator, lambda gain, _: gain / math.sqrt(fan_in))


@misconception(
    "kaiming_normal_",
    "The two modes are exchanged. fan_in is the number of inputs of one output, and the weight is (out, in).",
)
def kaiming_normal__modes_exchanged(w, nonlinearity="relu", mode="fan_in", generator=None):
    if mode in ("fan_in", "fan_out"):
        mode = "fan_out" if mode == "fan_in" else "fan_in"
    return right.kaiming_normal_(w, nonlinearity, mode, generator)


@misconception(
    "kaiming_normal_",
    "The kernel of a convolution is not counted, so its weights are too large by the root of the kernel's area: each output "
    "sees C * kh * kw numbers.",
)
def kaiming_normal__no_kernel(w, nonlinearity="relu", mode="fan_in", generator=None):
    fan = w.shape[mode == "fan_in"]
    return _kaiming(w, nonlinearity, mode, generator, lambda gain, _: gain / math.sqrt(fan))


@misconception(
    "kaiming_normal_",
    "The values are uniform, with the right variance. The bell was asked for; the other one is kaiming_uniform.",
)
def kaiming_normal__uniform(w, nonlinearity="relu", mode="fan_in", generator=None):
    return _kaiming(w, nonlinearity, mode, generator, lambda gain, fan: gain * math.sqrt(3 / fan), _uniform)


@misconception(
    "kaiming_normal_",
    "w.data was filled, and autograd did not see it. A backward pass that had kept the old weights now computes with the new "
    "ones, without an error. Fill w itself, with recording off.",
)
def kaiming_normal__data(w, nonlinearity="relu", mode="fan_in", generator=None):
    right.kaiming_normal_(w.data, nonlinearity, mode, generator)
    return w


@misconception(
    "kaiming_normal_",
    "A word that you do not know is taken as something that you know. A typo in a configuration then trains with the wrong "
    "scale, and nobody notices.",
)
def kaiming_normal__accepts_anything(w, nonlinearity="relu", mode="fan_in", generator=None):
    mode = mode if mode == "fan_out" else "fan_in"
    return right.kaiming_normal_(w, nonlinearity if nonlinearity in GAINS else "linear", mode, generator)


@misconception(
    "kaiming_normal_",
    "`generator` is not handed on to the draw, so the numbers come from the global random state.",
)
def kaiming_normal__global(w, nonlinearity="relu", mode="fan_in", generator=None):
    return right.kaiming_normal_(w, nonlinearity, mode, None)


# forward_variance


def _forward(depth, width, init_, act, seed, *, measure=None, before_act=False, same=False, transposed=False, out=None):
    generator = torch.Generator().manual_seed(seed)
    found = torch.zeros(depth)
    measure = measure or (lambda x: x.square().mean())
    with torch.no_grad():
        x = torch.randn(256, width, generator=generator)
        w = torch.empty(width, width)
        for layer in range(depth):
            if not same or layer == 0:
                w = torch.empty(width, width)
                init_(w, generator=generator)
            z = x @ (w if transposed else w.T)
            x = act(z)
            found[layer] = measure(z if before_act else x)
    return found


@misconception(
    "forward_variance",
    "You took the variance, that is, the mean was removed before squaring. What relu passes on has a mean, and the next layer "
    "is driven by it as well: it is the second moment about zero that multiplies from layer to layer.",
)
def forward_variance__centered(depth, width, init_, act, *, seed):
    return _forward(depth, width, init_, act, seed, measure=lambda x: x.var(unbiased=False))


@misconception(
    "forward_variance",
    "You measured before act. The layer ends with it, and what leaves the layer is what the next one gets.",
)
def forward_variance__before_act(depth, width, init_, act, *, seed):
    return _forward(depth, width, init_, act, seed, before_act=True)


@misconception(
    "forward_variance",
    "These are roots: standard deviations instead of mean squares.",
)
def forward_variance__root(depth, width, init_, act, *, seed):
    return _forward(depth, width, init_, act, seed, measure=lambda x: x.square().mean().sqrt())


@misconception(
    "forward_variance",
    "All layers share one weight. Powers of a single matrix do not behave like a product of independent ones: each layer "
    "has to be filled on its own.",
)
def forward_variance__one_weight(depth, width, init_, act, *, seed):
    return _forward(depth, width, init_, act, seed, same=True)


@misconception(
    "forward_variance",
    "The generator is seeded anew for every layer, so every layer gets the same numbers, and they are the numbers of the "
    "inputs, too. Seed once, and let the generator run on.",
)
def forward_variance__seeded_per_layer(depth, width, init_, act, *, seed):
    def init(w, generator):
        init_(w, generator=generator.manual_seed(seed))

    return _forward(depth, width, init, act, seed)


@misconception(
    "forward_variance",
    "The weight is multiplied from the wrong side, x W. Its rows are outputs here, too: x W^T.",
)
def forward_variance__x_w(depth, width, init_, act, *, seed):
    return _forward(depth, width, init_, act, seed, transposed=True)


@misconception(
    "forward_variance",
    "You seeded torch's global random state. Your result is reproducible, and everybody else's random numbers now start over: "
    "make a generator of your own.",
)
def forward_variance__global_seed(depth, width, init_, act, *, seed):
    torch.manual_seed(seed)
    return _forward(depth, width, init_, act, seed)


@misconception(
    "forward_variance",
    "The first entry is that of the inputs, and the last layer is missing: everything is one place late.",
)
def forward_variance__inputs_first(depth, width, init_, act, *, seed):
    outputs = [1.0, *_forward(depth, width, init_, act, seed).tolist()]
    return torch.tensor(outputs[:depth])


# trunc_normal_


@misconception(
    "trunc_normal_",
    "Everything beyond the bound was moved onto the bound. A truncated normal has nothing special at its edges; with a cut at "
    "one standard deviation nearly a third of your values sit there.",
)
@torch.no_grad()
def trunc_normal__clamped(w, std, bound=2.0, generator=None):
    return w.normal_(0.0, std, generator=generator).clamp_(-bound * std, bound * std)


@misconception(
    "trunc_normal_",
    "The cut is at `bound` itself. It counts in standard deviations: with std 0.02 nothing is ever cut at 2, and with std 3 "
    "far too much.",
)
@torch.no_grad()
def trunc_normal__absolute_bound(w, std, bound=2.0, generator=None):
    edge = math.erf(bound / std / math.sqrt(2))
    w.uniform_(-edge, edge, generator=generator).erfinv_().mul_(std * math.sqrt(2))
    return w.clamp_(-bound, bound)


@misconception(
    "trunc_normal_",
    "The values were stretched so that what is left has the spread `std`. `std` is the one of the normal before the cut; "
    "your values now go beyond the bound.",
)
@torch.no_grad()
def trunc_normal__stretched(w, std, bound=2.0, generator=None):
    density = math.exp(-bound * bound / 2) / math.sqrt(2 * math.pi)
    rest = math.sqrt(1 - 2 * bound * density / math.erf(bound / math.sqrt(2)))
    return right.trunc_normal_(w, std / rest, bound, generator)


@misconception(
    "trunc_normal_",
    "Nothing is cut off: there are values beyond the bound.",
)
@torch.no_grad()
def trunc_normal__not_truncated(w, std, bound=2.0, generator=None):
    return w.normal_(0.0, std, generator=generator)


@misconception(
    "trunc_normal_",
    "Inside the bound your values are spread evenly. It is a bell that was cut, not a box.",
)
@torch.no_grad()
def trunc_normal__flat(w, std, bound=2.0, generator=None):
    return w.uniform_(-bound * std, bound * std, generator=generator)


@misconception(
    "trunc_normal_",
    "What lies outside is drawn a second time, once. Now and then the second draw lies outside, too: go on until none does.",
)
@torch.no_grad()
def trunc_normal__draws_twice(w, std, bound=2.0, generator=None):
    w.normal_(0.0, std, generator=generator)
    again = torch.randn(w.shape, dtype=w.dtype, device=w.device, generator=generator) * std
    return w.copy_(torch.where(w.abs() > bound * std, again, w))


@misconception(
    "trunc_normal_",
    "A wide bound lets an infinity through: the share of the bell that is kept rounds to 1, and the inverse of the error "
    "function at 1 is infinite. It happens once in millions of numbers, and once is enough.",
)
@torch.no_grad()
def trunc_normal__infinite(w, std, bound=2.0, generator=None):
    edge = math.erf(bound / math.sqrt(2))
    return w.uniform_(-edge, edge, generator=generator).erfinv_().mul_(std * math.sqrt(2))


@misconception(
    "trunc_normal_",
    "The inverse of the error function has its own scale: the normal's argument is divided by sqrt(2) on the way in, and "
    "must be multiplied by it on the way out.",
)
@torch.no_grad()
def trunc_normal__scale_of_erf(w, std, bound=2.0, generator=None):
    edge = math.erf(bound / math.sqrt(2))
    return w.uniform_(-edge, edge, generator=generator).erfinv_().mul_(std).clamp_(-bound * std, bound * std)


@misconception(
    "trunc_normal_",
    "It was w.data that you filled. Autograd did not see it, and a backward pass that needs the old values uses the new ones.",
)
def trunc_normal__data(w, std, bound=2.0, generator=None):
    right.trunc_normal_(w.data, std, bound, generator)
    return w


# low_rank


@misconception(
    "LowRankLinear",
    "The two factors are multiplied with each other first. That forms the thick matrix at every call, and costs more than the "
    "layer that you wanted to make cheaper: let x pass through the narrow place.",
)
class LowRankLinear__product_first(LowRankLinear):
    def forward(self, x):
        return right.linear(x, self.up.weight @ self.down.weight, self.up.bias)


@misconception(
    "LowRankLinear",
    "There is a bias in the narrow place as well. A product of two matrices has none there, and the state dict has one entry too many.",
)
class LowRankLinear__two_biases(LowRankLinear):
    def __init__(self, in_features, out_features, rank, bias=True, *, device=None, dtype=None):
        super().__init__(in_features, out_features, rank, bias, device=device, dtype=dtype)
        self.down = right.Linear(in_features, rank, device=device, dtype=dtype)


@misconception(
    "LowRankLinear",
    "There is a nonlinearity between the two factors. Then it is no matrix of low rank any more, but a small network.",
)
class LowRankLinear__with_relu(LowRankLinear):
    def forward(self, x):
        return self.up(torch.relu(self.down(x)))


@misconception(
    "LowRankLinear",
    "One factor starts at zero, as in LoRA. There the layer is added to another one; by itself it puts out only its bias.",
)
class LowRankLinear__starts_at_zero(LowRankLinear):
    def __init__(self, in_features, out_features, rank, bias=True, *, device=None, dtype=None):
        super().__init__(in_features, out_features, rank, bias, device=device, dtype=dtype)
        nn.init.zeros_(self.up.weight)


def _factors(linear, rank):
    n_out, n_in = linear.weight.shape
    rank = min(rank, n_in, n_out)
    options = {"device": linear.weight.device, "dtype": linear.weight.dtype}
    low = LowRankLinear(n_in, n_out, rank, linear.bias is not None, **options)
    with torch.no_grad():
        if linear.bias is not None:
            low.up.bias.copy_(linear.bias)
        return low, rank, torch.linalg.svd(linear.weight, full_matrices=False)


@misconception(
    "low_rank_from",
    "The singular values are missing. U and Vh are only directions; how much of each there is stands in S.",
)
@torch.no_grad()
def low_rank_from__no_singular_values(linear, rank):
    low, rank, (u, _, vh) = _factors(linear, rank)
    low.up.weight.copy_(u[:, :rank])
    low.down.weight.copy_(vh[:rank])
    return low


@misconception(
    "low_rank_from",
    "The singular values went into both factors, so the product has their squares.",
)
@torch.no_grad()
def low_rank_from__singular_values_twice(linear, rank):
    low, rank, (u, s, vh) = _factors(linear, rank)
    low.up.weight.copy_(u[:, :rank] * s[:rank])
    low.down.weight.copy_(s[:rank, None] * vh[:rank])
    return low


@misconception(
    "low_rank_from",
    "You kept the smallest singular values. They come in descending order, and the first ones carry most of the matrix.",
)
@torch.no_grad()
def low_rank_from__the_smallest(linear, rank):
    low, rank, (u, s, vh) = _factors(linear, rank)
    low.up.weight.copy_(u[:, -rank:] * s[-rank:])
    low.down.weight.copy_(vh[-rank:])
    return low


@misconception(
    "low_rank_from",
    "The bias of the layer got lost: the result still has the random one that it was made with.",
)
def low_rank_from__bias_not_copied(linear, rank):
    low = right.low_rank_from(linear, rank)
    if low.up.bias is not None:
        nn.init.constant_(low.up.bias, 0.01)
    return low


@misconception(
    "low_rank_from",
    "The rank is not limited. Where it is larger than both sides of the matrix there are not that many singular values, and "
    "the factors do not fit.",
)
@torch.no_grad()
def low_rank_from__rank_not_limited(linear, rank):
    n_out, n_in = linear.weight.shape
    low = LowRankLinear(
        n_in, n_out, rank, linear.bias is not None, device=linear.weight.device, dtype=linear.weight.dtype
    )
    u, s, vh = torch.linalg.svd(linear.weight, full_matrices=False)
    low.up.weight.copy_(u[:, :rank] * s[:rank])
    low.down.weight.copy_(vh[:rank])
    if linear.bias is not None:
        low.up.bias.copy_(linear.bias)
    return low


@misconception(
    "low_rank_from",
    "The result shares the bias with the layer that it was made from. Train one of them, and the other one moves.",
)
def low_rank_from__shares_the_bias(linear, rank):
    low = right.low_rank_from(linear, rank)
    low.up.bias = linear.bias
    return low


@misconception(
    "low_rank_from",
    "The first rows and columns of the weight were taken. They are not the important ones: the best directions lie across all of them.",
)
@torch.no_grad()
def low_rank_from__first_rows(linear, rank):
    low, rank, _ = _factors(linear, rank)
    low.down.weight.copy_(linear.weight[:rank])
    low.up.weight.copy_(linear.weight @ torch.linalg.pinv(linear.weight[:rank]))
    return low


# init_residual_


def _blocks(blocks, generator, last_std, *, scale=1.0, bias=0.0):
    with torch.no_grad():
        for block in blocks:
            *hidden, last = block.inner.layers
            for layer in hidden:
                layer.weight.normal_(0.0, math.sqrt(2 / layer.weight.shape[1]), generator=generator)
            last.weight.normal_(0.0, 1 / math.sqrt(last.weight.shape[1]), generator=generator).mul_(last_std)
            if scale is not None:
                block.scale.fill_(scale)
            if bias is not None:
                for layer in block.inner.layers:
                    layer.bias.fill_(bias)


@misconception(
    "init_residual_",
    "Every block adds as much as comes in, so the signal doubles at each of them: 2^100 at the end. Kaiming keeps a chain of "
    "layers steady; in a sum the depth has to enter.",
)
def init_residual__no_depth(blocks, depth, generator=None):
    _blocks(blocks, generator, 1.0)


@misconception(
    "init_residual_",
    "Your branches are scaled by 1 / depth. Independent parts add up by their squares, so that together they add 1 / depth of "
    "the signal's size: the blocks do next to nothing. There is a root missing.",
)
def init_residual__no_root(blocks, depth, generator=None):
    _blocks(blocks, generator, 1 / depth)


@misconception(
    "init_residual_",
    "The last layers start at zero. The signal passes perfectly, but nothing comes back through a layer of zeros: the layers "
    "before it get no gradient.",
)
def init_residual__zeros(blocks, depth, generator=None):
    _blocks(blocks, generator, 0.0)


@misconception(
    "init_residual_",
    "1 / sqrt(2 L) is for a network with 2 L branches. Here it makes the L branches add half of the input's mean square, "
    "and growing on what has grown: 1.65 at the end. A tenth was allowed.",
)
def init_residual__gpt2(blocks, depth, generator=None):
    _blocks(blocks, generator, 1 / math.sqrt(2 * depth))


@misconception(
    "init_residual_",
    "`scale` still is what it was before. It multiplies the whole branch, so it is part of the start.",
)
def init_residual__scale_left(blocks, depth, generator=None):
    _blocks(blocks, generator, math.sqrt(0.04 / depth), scale=None)


@misconception(
    "init_residual_",
    "The biases keep what they held. At the start they only add an offset of their own to every block.",
)
def init_residual__bias_left(blocks, depth, generator=None):
    _blocks(blocks, generator, math.sqrt(0.04 / depth), bias=None)


@misconception(
    "init_residual_",
    "You scaled by the number of blocks that you were given. They can be a part of the network: it is `depth` that counts.",
)
def init_residual__length_of_the_list(blocks, depth, generator=None):
    blocks = list(blocks)
    _blocks(blocks, generator, math.sqrt(0.04 / len(blocks)))


@misconception(
    "init_residual_",
    "Each block is scaled by its own number. Then the first ones are loud and the last ones nearly silent, and they do not "
    "learn alike: all blocks have the same scale.",
)
def init_residual__by_number(blocks, depth, generator=None):
    for number, block in enumerate(blocks):
        _blocks([block], generator, math.sqrt(0.03 / depth) * 3 * 0.96**number)
