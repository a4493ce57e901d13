"""Day 3: leaves, graphs and accumulation. `kata lesson` explains, `kata check` tells you where you are.

N examples, D columns. A scalar is a tensor of shape (): a function f that returns anything else is refused.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def grad_of(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return the gradient at x of a function f that returns a scalar.

    x: floating point, any shape; a leaf or not, asking for gradients or not
    Returns a tensor with the shape and dtype of x, part of no graph; zeros where f ignores x.

    x stays as it was (values, `requires_grad`, `.grad`, version), and no other tensor that f uses gets a
    `.grad` by this. Works inside `torch.no_grad()`, too, and leaves that switch as it found it.
    Raises ValueError, with the shape of f(x) in the message, when that is not a scalar; (1,) is none.
    """
    raise NotImplementedError


def frozen_product(x: Tensor, y: Tensor) -> Tensor:
    """Return x * y (shapes broadcast) such that backward takes y for a constant.

    The gradient of x is what it is for x * y. Nothing flows to y nor to what y was computed from, not even
    when x and y are the same tensor; y keeps its `requires_grad`. Where only y asks for gradients, the
    result does not. If y is changed in place afterwards, backward never uses the new values: it raises, or
    it uses the old ones. Not to be written as a torch.autograd.Function.
    """
    raise NotImplementedError


def straight_through_round(x: Tensor) -> Tensor:
    """Return exactly what torch.round returns for finite x (halves go to the even neighbor), in x's dtype.

    Backward hands the gradient on as if nothing had been rounded: the gradient of (c * result).sum() is c,
    that of (result**2).sum() is 2 * result. Not to be written as a torch.autograd.Function.
    """
    raise NotImplementedError


def finite_difference(f: Callable[[Tensor], Tensor], x: Tensor, eps: float = 1e-6) -> Tensor:
    """Return the gradient at x of a function f that returns a scalar, by central differences.

    x: floating point, any shape, any strides, any number of elements (none, too)
    Each element is moved by eps to both sides while the others stay. f is only called with float64 tensors
    of x's shape, and the quotient is taken in float64; the result has x's shape and dtype and is part of no
    graph. Because the difference is central, half the eps leaves a quarter of the error.

    x is left bit for bit as it was, also when f raises. Autograd is not used.
    Raises ValueError, with the shape in the message, when f returns something that is not a scalar.
    """
    raise NotImplementedError


def per_example_grads(w: Tensor, X: Tensor, y: Tensor) -> Tensor:
    """Return for each row n the gradient of 0.5 * (X[n] . w - y[n])**2 with respect to w.

    w: (D,), a leaf or not, asking for gradients or not; X: (N, D); y: (N,). N may be 0.
    Returns (N, D) in w's dtype, part of no graph. The `.grad` of w, X and y is the same before and after.

    Cost: exactly one backward pass per row, each through that row alone, and graphs do not pile up: what is
    kept for backward at any moment does not grow with N.
    Raises ValueError with both shapes when w or y does not fit X; a y of shape (N, 1) does not.
    """
    raise NotImplementedError


def linreg_gd(X: Tensor, y: Tensor, lr: float, steps: int) -> tuple[Tensor, Tensor, list[float]]:
    """Fit y = X w + b by gradient descent with updates written by hand: no torch.optim, no torch.nn.

    X: (N, D), y: (N,), of one dtype
    w (D,) and b () start at zero. Each step takes the gradient of the mean over the rows of
    (X w + b - y)**2 with respect to both, at one point, and moves both by lr times their gradient.
    Returns (w, b, losses): w and b after `steps` steps, leaves in X's dtype; in losses the loss before each
    step, as Python floats. With steps = 0 that is zeros and an empty list.

    Cost: one backward pass per step. Nothing but the losses themselves grows with the number of steps: no graph
    outlives its step, and 200 steps need no more memory at any moment than 10 do.
    X and y stay as they were, `.grad` included. No random numbers are drawn.
    Raises ValueError with both shapes when X is not (N, D) or y is not (N,); (N, 1) is not.
    """
    raise NotImplementedError


def hvp(f: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> Tensor:
    """Return H v, with H the Hessian at x of a function f that returns a scalar.

    x: floating point, any shape; v: the shape and dtype of x
    Returns a tensor with the shape and dtype of x, part of no graph; zeros where f is linear or ignores x.

    As with `grad_of`, x and all that f uses stay as they were, and torch.no_grad() does not disturb it.
    Cost: at most two backward passes whatever the size of x, and never a tensor of more elements than x
    (for an f that makes none itself).
    Raises ValueError with both shapes when v has another shape than x, and when f(x) is not a scalar.
    """
    raise NotImplementedError


def newton_step(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return x minus slope over curvature, element by element: Newton's step where the Hessian is diagonal.

    f returns a scalar, and no element of x influences the slope at another one.
    An element whose second derivative is exactly 0 keeps its value. The sign of the curvature counts: from
    anywhere on a quadratic, open upward or downward, one step lands on its stationary point.
    Returns a new tensor with the shape and dtype of x, part of no graph; x stays as it was.

    Cost: at most three backward passes, and never a tensor of more elements than x.
    Raises ValueError when f(x) is not a scalar.
    """
    raise NotImplementedError


def fixed_point_grad(
    f: Callable[[Tensor, Tensor], Tensor], theta: Tensor, z0: Tensor, n_iter: int
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Iterate z = f(z, theta); return where that ends, and the gradients of the end point at theta.

    theta: any shape; z0: any shape, and f(z, theta) has the same; n_iter >= 1
    f is a contraction in z: it brings any two z closer together.
    Returns (z, pullback):
    z: f applied n_iter times to z0, part of no graph; it is taken for the fixed point z* itself
    pullback(u): the gradient of (u * z*).sum() with respect to theta, for u of z's shape; part of no graph.
        It may be called any number of times. n_iter rounds suffice for what has to be iterated in there.

    theta and z0 stay as they were, `.grad` included; where f ignores theta, pullback returns zeros.
    Cost: what is kept for backward at any moment is that of one or two applications of f, whatever n_iter is.
    Raises ValueError with both shapes when u has another shape than z.
    """
    raise NotImplementedError
