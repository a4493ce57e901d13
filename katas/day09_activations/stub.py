"""Day 9: activations. `kata lesson` explains, `kata check` tells you where you are.

Unless its docstring says otherwise, a function takes a floating point tensor of any shape, returns one of the same shape
and dtype, and can be differentiated. N rows, D width, F gated width.
"""

from collections.abc import Callable

from torch import Tensor


def relu(x: Tensor) -> Tensor:
    """Return x where x > 0, else 0.

    The derivative is 1 where x > 0 and 0 elsewhere, at exactly 0 too. Infinities: inf stays, -inf gives 0. NaN stays
    NaN: an activation must not hide it.
    """
    raise NotImplementedError


def leaky_relu(x: Tensor, slope: float = 0.01) -> Tensor:
    """Return x where x > 0, else slope * x. The derivative at exactly 0 is `slope`.

    slope may be any number: above 1 and below 0 as well.
    """
    raise NotImplementedError


def sigmoid(x: Tensor) -> Tensor:
    """Return 1 / (1 + exp(-x)).

    Right for |x| up to 1e4 and for both infinities (0 and 1), also in bfloat16: tiny values on the left keep their
    relative accuracy, gradients are finite everywhere and 0 far out on both sides. float64 is computed in float64.
    It can be differentiated twice.

    Cost: the only tensor kept for backward is the output itself, so sigmoid(x).square() keeps no second one.
    """
    raise NotImplementedError


def log_sigmoid(x: Tensor) -> Tensor:
    """Return log(1 / (1 + exp(-x))).

    Right for |x| up to 1e4 and for both infinities (-inf gives -inf, inf gives 0), also in bfloat16; tiny values on
    the right keep their relative accuracy. The gradient is 1 / (1 + exp(x)): 1 far out on the left, 0 far out on the
    right (at the infinities, too), 1/2 at exactly 0.
    """
    raise NotImplementedError


def softplus(x: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    """Return log(1 + exp(beta * x)) / beta; where beta * x > threshold, x itself.

    beta > 0; threshold at most 80
    Right for |x| up to 1e4 and both infinities, also in bfloat16; tiny values on the left keep their relative
    accuracy. The gradient is 1 / (1 + exp(-beta * x)), and exactly 1 where the result is x.
    At beta * x == threshold the curve is still used.
    """
    raise NotImplementedError


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """Return the GELU of x.

    approximate="none": x * P(Z <= x) for a standard normal Z
    approximate="tanh": x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3)))
    The two are up to 5e-4 apart. Values and gradients are finite for |x| up to 1e4, also in bfloat16.
    Raises ValueError with the mode in the message for any other mode.
    """
    raise NotImplementedError


def silu_grad(x: Tensor) -> Tensor:
    """Return the derivative of x / (1 + exp(-x)) at x in closed form, without autograd.

    It is 0 at about -1.2785 and finite for |x| up to 1e4: 0 far out on the left, 1 far out on the right.
    """
    raise NotImplementedError


def silu(x: Tensor) -> Tensor:
    """Return x / (1 + exp(-x)).

    Values and gradients are finite for |x| up to 1e4, also in bfloat16. It can be differentiated twice.
    Its smallest value is about -0.2785, at about -1.2785.

    Cost: keeps no more bytes for backward than x has.
    """
    raise NotImplementedError


def gated_linear(x: Tensor, w_gate: Tensor, w_up: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    """Return act(x w_gate^T) * (x w_up^T).

    x: (..., D), also (D,); w_gate, w_up: (F, D)
    Returns (..., F). act is called once, on the gate projection of shape (..., F).

    Cost: at most two matrix products, 4 * D * F FLOPs per row of x.
    Raises ValueError with both shapes when w_gate and w_up differ in shape, or x and w_gate differ in D.
    """
    raise NotImplementedError


def dead_fraction(h: Tensor, tol: float = 0.0) -> float:
    """Return the share of the D units (columns) of h that are above tol in no row, as a Python float.

    h: (N, D), D at least 1. A unit that just reaches tol is not above it. With N = 0 all units are dead: 1.0.
    Raises ValueError with the shape in the message when h does not have two axes.
    """
    raise NotImplementedError


def lean_gelu(x: Tensor) -> Tensor:
    """Return the exact GELU, x * P(Z <= x) for a standard normal Z.

    First and second derivatives are right, and finite for |x| up to 1e4.

    Cost: the forward pass keeps no more bytes for backward than x has. When the backward pass is itself recorded
    (create_graph=True), forward and backward together keep no more than x and the gradient that came in.
    """
    raise NotImplementedError
