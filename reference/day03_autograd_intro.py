"""Leaves, graphs and accumulation: gradients by reverse-mode automatic differentiation.

A tensor that asks for gradients is a leaf; what is computed from it is recorded; `backward` walks the record
from a scalar to the leaves and adds to their `.grad`, while `torch.autograd.grad` returns the same numbers and
touches nothing (Baydin et al., 2018, section 3.2). Differentiating a gradient once more gives Hessian-vector
products (Pearlmutter, 1994); differentiating a fixed point needs only the last iterate (Bai et al., 2019,
theorem 1).
"""

from collections.abc import Callable

import torch
from torch import Tensor


def grad_of(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return the gradient of the scalar function f at x; x and everything else that f uses stay as they were."""
    leaf = _leaf(x)
    return _derivative(_scalar_at(f, leaf), leaf)


def frozen_product(x: Tensor, y: Tensor) -> Tensor:
    """Return x * y, with y a constant in the eyes of backward."""
    return x * y.detach()


def straight_through_round(x: Tensor) -> Tensor:
    """Return x rounded, with the gradient of the identity (the straight-through estimator; Bengio et al., 2013)."""
    return x + (x.round() - x).detach()  # the difference is exact in floating point, so the sum is, too


def finite_difference(f: Callable[[Tensor], Tensor], x: Tensor, eps: float = 1e-6) -> Tensor:
    """Return the gradient of f at x by central differences in float64: two values of f per element."""
    flat = x.detach().to(torch.float64).reshape(-1)  # (n,)
    slopes = torch.zeros_like(flat)
    for i in range(flat.numel()):
        step = torch.zeros_like(flat)
        step[i] = eps
        above = _scalar_at(f, (flat + step).reshape(x.shape))
        below = _scalar_at(f, (flat - step).reshape(x.shape))
        slopes[i] = (above - below).item() / (2 * eps)
    return slopes.reshape(x.shape).to(x.dtype)


def per_example_grads(w: Tensor, X: Tensor, y: Tensor) -> Tensor:
    """Return the gradient of 0.5 * (x . w - y)^2 at w for each row x of X, by one backward pass per row."""
    if w.shape != X.shape[1:]:
        raise ValueError(f"w {tuple(w.shape)} must have one entry per column of X {tuple(X.shape)}")
    _check_targets(X, y)
    leaf = _leaf(w)
    grads = torch.zeros_like(X)  # (N, D)
    for n in range(len(X)):
        loss = 0.5 * (X[n] @ leaf - y[n]) ** 2
        grads[n] = _derivative(loss, leaf)
    return grads


def linreg_gd(X: Tensor, y: Tensor, lr: float, steps: int) -> tuple[Tensor, Tensor, list[float]]:
    """Fit y = X w + b by gradient descent on the mean squared error; return w, b and the loss before each step."""
    _check_targets(X, y)
    w = X.new_zeros(X.shape[1], requires_grad=True)  # (D,)
    b = X.new_zeros((), requires_grad=True)
    losses = []
    for _ in range(steps):
        loss = ((X @ w + b - y) ** 2).mean()
        grad_w, grad_b = torch.autograd.grad(loss, (w, b))
        with torch.no_grad():
            w -= lr * grad_w
            b -= lr * grad_b
        losses.append(loss.item())
    return w, b, losses


def hvp(f: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> Tensor:
    """Return H v, the Hessian of the scalar function f at x times v, without the Hessian."""
    if v.shape != x.shape:
        raise ValueError(f"v {tuple(v.shape)} must have the shape of x {tuple(x.shape)}")
    leaf = _leaf(x)
    gradient = _derivative(_scalar_at(f, leaf), leaf, create_graph=True)
    return _derivative(gradient, leaf, weights=v)


def newton_step(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return x - f'(x) / f''(x) for an f whose Hessian is diagonal; entries without curvature stay."""
    point = x.detach()
    slope = grad_of(f, point)
    curvature = hvp(f, point, torch.ones_like(point))  # a diagonal matrix times ones is its diagonal
    return torch.where(curvature == 0, point, point - slope / curvature)


def fixed_point_grad(
    f: Callable[[Tensor, Tensor], Tensor], theta: Tensor, z0: Tensor, n_iter: int
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return z* = f(z*, theta) and the function u -> u^T dz*/dtheta, remembering one application of f.

    With J = df/dz at z*, dz* = J dz* + df/dtheta dtheta. So u^T dz*/dtheta = a^T df/dtheta,
    where a = u + J^T a: a fixed point again, of a map that contracts as f does.
    """
    with torch.no_grad():
        fixed = _iterate(lambda z: f(z, theta), z0, n_iter)
    z_leaf, theta_leaf = _leaf(fixed), _leaf(theta)
    value = f(z_leaf, theta_leaf)

    def pulled_to(leaf: Tensor, weights: Tensor) -> Tensor:
        # one graph, walked many times: here keeping it is meant
        return torch.autograd.grad(value, leaf, weights, retain_graph=True, materialize_grads=True)[0]

    def pullback(u: Tensor) -> Tensor:
        if u.shape != fixed.shape:
            raise ValueError(f"u {tuple(u.shape)} must have the shape of z* {tuple(fixed.shape)}")
        adjoint = _iterate(lambda a: u + pulled_to(z_leaf, a), u, n_iter)
        return pulled_to(theta_leaf, adjoint)

    return fixed, pullback


def _leaf(x: Tensor) -> Tensor:
    """The values of x as the start of a graph of its own."""
    return x.detach().requires_grad_()


def _scalar_at(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """f(x), recorded even where the caller has switched recording off, and refused unless it is a scalar."""
    with torch.enable_grad():
        value = f(x)
    if value.shape != ():
        raise ValueError(f"f must return a scalar of shape (), not a tensor of shape {tuple(value.shape)}")
    return value


def _derivative(value: Tensor, leaf: Tensor, weights: Tensor | None = None, create_graph: bool = False) -> Tensor:
    """The gradient at leaf of value (or of the sum of weights * value); zeros where value does not depend on it."""
    if not value.requires_grad:
        return torch.zeros_like(leaf)
    (gradient,) = torch.autograd.grad(value, leaf, weights, create_graph=create_graph, materialize_grads=True)
    return gradient


def _check_targets(X: Tensor, y: Tensor) -> None:
    """Refuse targets that are not one number per row: (N, 1) less (N,) would be a table."""
    if X.dim() != 2 or y.shape != X.shape[:1]:
        raise ValueError(f"y {tuple(y.shape)} must have one number per row of X {tuple(X.shape)}")


def _iterate(step: Callable[[Tensor], Tensor], start: Tensor, n_iter: int) -> Tensor:
    """Apply step to start n_iter times."""
    for _ in range(n_iter):
        start = step(start)
    return start
