import math

import torch

from checker.testing import misconception
from reference.day09_activations import _LeanGelu, sigmoid, silu_grad

# relu


@misconception(
    "relu",
    "The gradient at exactly 0 is 1 here: a clamp counts its bound as inside. At the kink the slope is to be 0, so that a "
    "unit that is silent does not learn as if it fired.",
)
def relu__clamp(x):
    return x.clamp(min=0)


@misconception(
    "relu",
    "The gradient at exactly 0 is 1/2: a maximum of two equal numbers divides its gradient between them. The kink needs a "
    "side.",
)
def relu__maximum(x):
    return torch.maximum(x, torch.zeros_like(x))


@misconception(
    "relu",
    "Multiplying by a mask is fine until x is -inf: 0 times infinity is NaN. Choose the zero, do not compute it.",
)
def relu__times_mask(x):
    return x * (x > 0)


@misconception(
    "relu",
    "A NaN came in and 0 came out. Every comparison with NaN is false, so it took your 'else' branch and vanished. Ask "
    "the question the other way round.",
)
def relu__hides_nan(x):
    return torch.where(x > 0, x, torch.zeros_like(x))


@misconception("relu", "You return |x|: the negative numbers were mirrored where they should have become 0.")
def relu__absolute(x):
    return x.abs()


# leaky_relu


@misconception(
    "leaky_relu",
    "The larger of x and slope * x is the leaky relu only for slopes between 0 and 1; above 1 the two branches change "
    "places, and at 0 the gradient is the mean of both slopes.",
)
def leaky_relu__maximum(x, slope=0.01):
    return torch.maximum(x, slope * x)


@misconception(
    "leaky_relu",
    "At exactly 0 the gradient is 1: zero was counted among the positive numbers. It belongs to the other branch.",
)
def leaky_relu__zero_is_positive(x, slope=0.01):
    return torch.where(x >= 0, x, slope * x)


@misconception(
    "leaky_relu",
    "The positive side has slope 1 + slope: the leak was added everywhere, though it belongs to the negative side only.",
)
def leaky_relu__leaks_everywhere(x, slope=0.01):
    return torch.where(x > 0, x, torch.zeros_like(x)) + slope * x


@misconception("leaky_relu", "Negative numbers come out positive: the leak keeps the sign of x.")
def leaky_relu__sign_lost(x, slope=0.01):
    return torch.where(x > 0, x, slope * x.abs())


@misconception("leaky_relu", "The slope is 0.2 when none is given; the default here is 0.01.")
def leaky_relu__other_default(x, slope=0.2):
    return torch.where(x > 0, x, slope * x)


# sigmoid


@misconception(
    "sigmoid",
    "The value survives far to the left, because 1 / inf is 0. The gradient does not: it multiplies an infinite "
    "derivative by that 0, and inf * 0 is NaN. No exponential may grow.",
)
def sigmoid__textbook(x):
    return 1 / (1 + torch.exp(-x))


@misconception(
    "sigmoid",
    "Each element takes the branch that is safe for it, but backward goes through both: the branch not taken contributes "
    "0 times infinity, which is NaN. Its argument must be harmless before exp sees it.",
)
def sigmoid__where_of_two_branches(x):
    return torch.where(x > 0, 1 / (1 + torch.exp(-x)), torch.exp(x) / (1 + torch.exp(x)))


class _Clamped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = 1 / (1 + torch.exp(-x.clamp(-20, 20)))
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return grad * y * (1 - y)


@misconception(
    "sigmoid",
    "Left of your clamp the output stops falling: at -40 you say 2e-9, and the truth is 4e-18. Do not limit x, choose a "
    "form whose exponential cannot overflow.",
)
def sigmoid__clamped(x):
    return _Clamped.apply(x)


@misconception(
    "sigmoid",
    "Backward complains that a tensor it needs was changed in place. What exp returned was kept for its derivative, and "
    "then you wrote over it.",
)
def sigmoid__in_place(x):
    y = torch.exp(-x)
    return y.add_(1).reciprocal_()


class _KeepsInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.exp(x.clamp(max=0)) / (1 + torch.exp(-x.abs()))

    @staticmethod
    def backward(ctx, grad):
        y = sigmoid(*ctx.saved_tensors)
        return grad * y * (1 - y)


@misconception(
    "sigmoid",
    "You keep the input. The next layer usually keeps your output anyway, and the derivative can be had from the output: "
    "one tensor would serve both.",
)
def sigmoid__keeps_input(x):
    return _KeepsInput.apply(x)


class _NoUpstream(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = torch.exp(x.clamp(max=0)) / (1 + torch.exp(-x.abs()))
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return y * (1 - y)


@misconception(
    "sigmoid",
    "Your backward returns the derivative and drops the gradient that came in. The chain rule multiplies the two.",
)
def sigmoid__no_upstream(x):
    return _NoUpstream.apply(x)


class _OnAttribute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.y = torch.exp(x.clamp(max=0)) / (1 + torch.exp(-x.abs()))
        return ctx.y.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.y * (1 - ctx.y)


@misconception(
    "sigmoid",
    "The first derivative is right, the second is 0: what you stored as an attribute is a plain number to autograd, with "
    "no way back to x. There is a method that saves a tensor properly.",
)
def sigmoid__kept_as_attribute(x):
    return _OnAttribute.apply(x)


@misconception(
    "sigmoid",
    "Everything went through float32, so a float64 input comes back with seven digits. Compute in the precision you are "
    "given.",
)
def sigmoid__in_float32(x):
    return sigmoid(x.float()).to(x.dtype)


class _StableButGreedy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = torch.exp(x.clamp(max=0)) / (1 + torch.exp(-x.abs()))
        ctx.save_for_backward(y, 1 - y)
        return y

    @staticmethod
    def backward(ctx, grad):
        y, rest = ctx.saved_tensors
        return grad * y * (1 - y) + 0 * rest


@misconception(
    "sigmoid",
    "You keep two tensors for backward. The second can be computed from the first when it is needed, so it costs memory "
    "for nothing.",
)
def sigmoid__keeps_two(x):
    return _StableButGreedy.apply(x)


# log_sigmoid


@misconception(
    "log_sigmoid",
    "Far to the left the sigmoid has become 0, and its logarithm is -inf where it should be about x. On the right 1 - tiny "
    "has rounded to 1. Take the logarithm on paper, before anything is rounded.",
)
def log_sigmoid__log_of_sigmoid(x):
    return torch.log(sigmoid(x))


@misconception(
    "log_sigmoid",
    "A small number inside the logarithm hides the -inf and makes every value wrong: far to the left you always return the "
    "logarithm of that small number.",
)
def log_sigmoid__epsilon(x):
    return torch.log(sigmoid(x) + 1e-8)


@misconception(
    "log_sigmoid",
    "exp(-x) overflows far to the left: the result is -inf there, and the gradient is NaN. The exponential needs an argument "
    "that is never positive.",
)
def log_sigmoid__overflows_on_the_left(x):
    return -torch.log1p(torch.exp(-x))


@misconception(
    "log_sigmoid",
    "exp(x) overflows far to the right, and inf - inf is NaN. This form serves one half of the line only.",
)
def log_sigmoid__overflows_on_the_right(x):
    return x - torch.log1p(torch.exp(x))


@misconception(
    "log_sigmoid",
    "All values are right, and so are all slopes but one: at exactly 0 your gradient is 1, not 1/2. Your clamp has slope 1 "
    "at its bound and |x| has slope 0 there.",
)
def log_sigmoid__clamp_at_zero(x):
    return x.clamp(max=0) - torch.log1p(torch.exp(-x.abs()))


@misconception(
    "log_sigmoid",
    "Your curve is mirrored: it is log(1 - sigmoid(x)), near 0 for negative x. A sign in front of x is missing.",
)
def log_sigmoid__mirrored(x):
    return -torch.logaddexp(torch.zeros_like(x), x)


# softplus


@misconception(
    "softplus",
    "Far to the left 1 + exp(x) rounds to 1, and its logarithm to 0: the tiny values are lost. There is a logarithm made "
    "for arguments close to 1.",
)
def softplus__log_of_one_plus(x, beta=1.0, threshold=20.0):
    z = beta * x
    return torch.where(z > threshold, x, torch.log(1 + torch.exp(z.clamp(max=threshold))) / beta)


@misconception(
    "softplus",
    "The curve was stretched by beta on the way in and never shrunk on the way out.",
)
def softplus__never_divided(x, beta=1.0, threshold=20.0):
    z = beta * x
    return torch.where(z > threshold, x, torch.log1p(torch.exp(z.clamp(max=threshold))))


@misconception(
    "softplus",
    "You compare x with the threshold. What overflows is exp(beta * x), so that is what the threshold is about.",
)
def softplus__threshold_on_x(x, beta=1.0, threshold=20.0):
    return torch.where(x > threshold, x, torch.log1p(torch.exp(beta * x.clamp(max=threshold))) / beta)


@misconception(
    "softplus",
    "Your values are smooth everywhere, and the threshold has no effect: beyond it the result is to be x itself.",
)
def softplus__never_linear(x, beta=1.0, threshold=20.0):
    return torch.logaddexp(beta * x, torch.zeros_like(x)) / beta


@misconception(
    "softplus",
    "The values are right and the gradient far to the right is NaN: the curve is not chosen there, but it was computed, "
    "overflowed, and backward multiplied its infinite derivative by 0.",
)
def softplus__unsafe_branch(x, beta=1.0, threshold=20.0):
    z = beta * x
    return torch.where(z > threshold, x, torch.log1p(torch.exp(z)) / beta)


@misconception(
    "softplus",
    "Where beta * x just equals the threshold you already return x; there the curve still holds.",
)
def softplus__linear_at_the_threshold(x, beta=1.0, threshold=20.0):
    z = beta * x
    return torch.where(z >= threshold, x, torch.log1p(torch.exp(z.clamp(max=threshold))) / beta)


@misconception(
    "softplus",
    "Beyond the threshold you return beta * x: the linear part has slope beta, and the curve jumps where they meet.",
)
def softplus__linear_in_z(x, beta=1.0, threshold=20.0):
    z = beta * x
    return torch.where(z > threshold, z, torch.log1p(torch.exp(z.clamp(max=threshold))) / beta)


# gelu


def _exact(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def _tanh(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _checked(mode):
    if mode not in ("none", "tanh"):
        raise ValueError(f"unknown mode {mode}")


@misconception(
    "gelu",
    "Both modes return the tanh form. It is up to 5e-4 off the exact one, and a checkpoint knows which of the two it was "
    "trained with.",
)
def gelu__always_tanh(x, approximate="none"):
    _checked(approximate)
    return _tanh(x)


@misconception(
    "gelu",
    'Both modes return the exact form: approximate="tanh" has no effect, and whoever asks for it needs those 5e-4.',
)
def gelu__always_exact(x, approximate="none"):
    _checked(approximate)
    return _exact(x)


@misconception(
    "gelu",
    "x * sigmoid(1.702 x) is a third function, off by up to 0.02. It is a fast stand-in for the exact form, not the exact "
    "form.",
)
def gelu__sigmoid(x, approximate="none"):
    _checked(approximate)
    return x * torch.sigmoid(1.702 * x) if approximate == "none" else _tanh(x)


@misconception(
    "gelu",
    "A mode that does not exist was taken for one of the two. A misspelled 'Tanh' must not quietly become another function.",
)
def gelu__unknown_is_tanh(x, approximate="none"):
    return _exact(x) if approximate == "none" else _tanh(x)


@misconception(
    "gelu",
    "In the tanh form the factor sqrt(2 / pi) multiplies x alone; the cubic term needs it as well.",
)
def gelu__cube_outside(x, approximate="none"):
    _checked(approximate)
    if approximate == "none":
        return _exact(x)
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * x + 0.044715 * x**3))


@misconception(
    "gelu",
    "Your curve is too steep: erf counts in other units than the normal distribution does. Its argument is missing a "
    "factor.",
)
def gelu__erf_of_x(x, approximate="none"):
    _checked(approximate)
    return x * 0.5 * (1 + torch.erf(x)) if approximate == "none" else _tanh(x)


@misconception("gelu", "When no mode is given you return the tanh form. The default is the exact one.")
def gelu__tanh_by_default(x, approximate="tanh"):
    _checked(approximate)
    return _exact(x) if approximate == "none" else _tanh(x)


# silu_grad


@misconception(
    "silu_grad",
    "That is the derivative of the sigmoid alone. SiLU is a product, and x is its other factor.",
)
def silu_grad__of_sigmoid(x):
    s = sigmoid(x)
    return s * (1 - s)


@misconception(
    "silu_grad",
    "One half of the product rule is missing: x times the slope of the sigmoid is there, the sigmoid itself is not.",
)
def silu_grad__second_half(x):
    s = sigmoid(x)
    return x * s * (1 - s)


@misconception(
    "silu_grad",
    "One half of the product rule is missing: you return the sigmoid, as if it were a constant factor of x.",
)
def silu_grad__first_half(x):
    return sigmoid(x)


# silu


@misconception(
    "silu",
    "The numbers are right, and twice the input is kept: a product keeps both of its factors for backward. The sigmoid could "
    "be computed once more when it is needed.",
)
def silu__product(x):
    return x * sigmoid(x)


class _SiLUOfGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * sigmoid(1.702 * x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (sigmoid(1.702 * x) + 1.702 * x * sigmoid(1.702 * x) * sigmoid(-1.702 * x))


@misconception("silu", "The factor 1.702 belongs to an approximation of GELU; SiLU has none.")
def silu__of_gelu(x):
    return _SiLUOfGelu.apply(x)


class _HalfRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * sigmoid(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * sigmoid(x)


@misconception(
    "silu",
    "Values are right, gradients are the sigmoid alone: your backward treats one factor as a constant. It depends on x, too.",
)
def silu__half_the_rule(x):
    return _HalfRule.apply(x)


class _NoSecond(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * sigmoid(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * silu_grad(x.detach())


@misconception(
    "silu",
    "The first derivative is right, but backward cannot be differentiated: x was detached there, so the second derivative "
    "finds no way to it.",
)
def silu__once_only(x):
    return _NoSecond.apply(x)


# gated_linear


def _fits(x, w_gate, w_up):
    if w_gate.shape != w_up.shape or x.shape[-1] != w_gate.shape[-1]:
        raise ValueError(f"{tuple(x.shape)}, {tuple(w_gate.shape)}, {tuple(w_up.shape)}")


@misconception(
    "gated_linear",
    "Gate and up have changed places: act belongs on the gate projection. With trained weights the two are not "
    "interchangeable.",
)
def gated_linear__swapped(x, w_gate, w_up, act):
    _fits(x, w_gate, w_up)
    return (x @ w_gate.T) * act(x @ w_up.T)


@misconception(
    "gated_linear",
    "act was applied to the product of both projections. Only the gate goes through it; the other projection stays linear.",
)
def gated_linear__act_outside(x, w_gate, w_up, act):
    _fits(x, w_gate, w_up)
    return act((x @ w_gate.T) * (x @ w_up.T))


@misconception("gated_linear", "Both projections went through act. The second one stays as it is.")
def gated_linear__act_on_both(x, w_gate, w_up, act):
    _fits(x, w_gate, w_up)
    return act(x @ w_gate.T) * act(x @ w_up.T)


@misconception("gated_linear", "The two projections were added. A gate multiplies: where it is 0, nothing passes.")
def gated_linear__sum(x, w_gate, w_up, act):
    _fits(x, w_gate, w_up)
    return act(x @ w_gate.T) + x @ w_up.T


@misconception(
    "gated_linear",
    "act was applied to x before the projection. It comes after it, on F numbers instead of D.",
)
def gated_linear__act_on_x(x, w_gate, w_up, act):
    _fits(x, w_gate, w_up)
    return (act(x) @ w_gate.T) * (x @ w_up.T)


@misconception(
    "gated_linear",
    "Weights that are square were not transposed. They are stored as (out, in), whatever their sizes are.",
)
def gated_linear__square_not_transposed(x, w_gate, w_up, act):
    _fits(x, w_gate, w_up)
    if w_gate.shape[0] == w_gate.shape[1]:
        return act(x @ w_gate) * (x @ w_up)
    return act(x @ w_gate.T) * (x @ w_up.T)


@misconception(
    "gated_linear",
    "Shapes were not compared. A w_up with one row broadcasts against the gate without a word, and the others die in matmul "
    "with a message that names nobody.",
)
def gated_linear__no_check(x, w_gate, w_up, act):
    return act(x @ w_gate.T) * (x @ w_up.T)


# dead_fraction


def _table(h):
    if h.dim() != 2:
        raise ValueError(f"{tuple(h.shape)}")


@misconception(
    "dead_fraction",
    "You counted along the wrong axis: a row is an example, a column is a unit, and it is units that die.",
)
def dead_fraction__of_rows(h, tol=0.0):
    _table(h)
    return 1.0 - (h > tol).any(dim=1).double().mean().item() if len(h) else 1.0


@misconception(
    "dead_fraction",
    "You return the share of single entries that are not above tol. A unit is dead only if that holds in every row.",
)
def dead_fraction__of_entries(h, tol=0.0):
    _table(h)
    return (h <= tol).double().mean().item() if len(h) else 1.0


@misconception("dead_fraction", "You return the share of units that are alive; the dead ones are the rest.")
def dead_fraction__alive(h, tol=0.0):
    _table(h)
    return (h > tol).any(dim=0).double().mean().item()


@misconception(
    "dead_fraction",
    "A unit that only just reaches tol counts as alive in yours; it has to be above it.",
)
def dead_fraction__reaching_counts(h, tol=0.0):
    _table(h)
    return (h < tol).all(dim=0).double().mean().item()


@misconception(
    "dead_fraction",
    "You look at the size of the entries and not at their sign: a unit that is always negative is dead as well.",
)
def dead_fraction__magnitude(h, tol=0.0):
    _table(h)
    return (h.abs() <= tol).all(dim=0).double().mean().item()


@misconception("dead_fraction", "tol has no effect in yours: units are compared with 0 whatever it is.")
def dead_fraction__ignores_tol(h, tol=0.0):
    _table(h)
    return (h <= 0).all(dim=0).double().mean().item()


@misconception("dead_fraction", "A unit that is silent in a single row was called dead; it may fire in another row.")
def dead_fraction__silent_once(h, tol=0.0):
    _table(h)
    return (h <= tol).any(dim=0).double().mean().item() if len(h) else 1.0


# lean_gelu


@misconception(
    "lean_gelu",
    "The function is right, and autograd keeps several tensors for it. Backward is yours to write: x alone is enough.",
)
def lean_gelu__autograd(x):
    return _exact(x)


class _OneFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return _exact(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        slope = 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
        return grad * slope


@misconception(
    "lean_gelu",
    "Forward is lean, but once your backward is recorded each of its operations keeps its own tensors. The pass from the "
    "incoming gradient to the outgoing one is a function, too, with a derivative that you can write down.",
)
def lean_gelu__fat_second_pass(x):
    return _OneFunction.apply(x)


class _Detached(_OneFunction):
    @staticmethod
    def backward(ctx, grad):
        x = ctx.saved_tensors[0].detach()
        slope = 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
        return grad * slope


@misconception(
    "lean_gelu",
    "The second derivative is lost: your backward works on a detached x, so it looks linear to whoever differentiates it.",
)
def lean_gelu__once_only(x):
    return _Detached.apply(x)


class _TanhForward(_LeanGelu):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return _tanh(x)


@misconception(
    "lean_gelu",
    "Your values are those of the tanh form, up to 5e-4 away from the exact one that was asked for.",
)
def lean_gelu__tanh(x):
    return _TanhForward.apply(x)
