import torch

from checker.testing import alternative


def _check_scalar(value):
    if tuple(value.shape) != ():
        raise ValueError(f"a scalar is needed, not {tuple(value.shape)}")
    return value


@alternative("grad_of")
def grad_of__by_backward(f, x):
    with torch.enable_grad():
        point = torch.empty_like(x).copy_(x.detach()).requires_grad_(True)
        value = _check_scalar(f(point))
        if value.grad_fn is not None or value is point:
            value.backward(inputs=[point])
    return torch.zeros_like(point, requires_grad=False) if point.grad is None else point.grad


@alternative("grad_of")
def grad_of__on_x_where_x_is_in_a_graph(f, x):
    with torch.set_grad_enabled(True):
        point = x if x.requires_grad else x.detach().requires_grad_()
        value = _check_scalar(f(point))
        if not value.requires_grad:
            return torch.zeros(x.shape, dtype=x.dtype, device=x.device)
        (found,) = torch.autograd.grad(value, point, allow_unused=True)
    return torch.zeros_like(x) if found is None else found


@alternative("frozen_product")
def frozen_product__of_a_copy(x, y):
    with torch.no_grad():
        constant = y.clone()
    return torch.mul(x, constant)


@alternative("straight_through_round")
def straight_through_round__takes_away_the_rest(x):
    return x - (x - torch.round(x)).detach()


@alternative("straight_through_round")
def straight_through_round__adds_zero(x):
    with torch.no_grad():
        rounded = x.round()
    return rounded + (x - x.detach())


@alternative("finite_difference")
def finite_difference__in_place_with_restore(f, x, eps=1e-6):
    with torch.no_grad():
        point = x.detach().to(torch.float64, copy=True).contiguous()
        values = point.view(-1)
        slopes = []
        for i, kept in enumerate(values.tolist()):
            ends = []
            for moved in (kept - eps, kept + eps):
                values[i] = moved
                ends.append(float(_check_scalar(f(point))))
            values[i] = kept
            slopes.append((ends[1] - ends[0]) / (2.0 * eps))
        return torch.tensor(slopes, dtype=torch.float64, device=x.device).reshape(x.shape).to(x.dtype)


@alternative("finite_difference")
def finite_difference__rows_of_the_identity(f, x, eps=1e-6):
    point = x.detach().double()
    steps = eps * torch.eye(x.numel(), dtype=torch.float64, device=x.device)
    pairs = [(f(point + step.view(x.shape)), f(point - step.view(x.shape))) for step in steps]
    slopes = [(_check_scalar(a) - _check_scalar(b)).detach() / eps * 0.5 for a, b in pairs]
    return torch.stack(slopes).view(x.shape).to(x) if slopes else torch.zeros_like(x)


def _check_rows(w, X, y):
    if X.ndim != 2 or w.shape != (X.size(1),) or y.shape != (X.size(0),):
        raise ValueError(f"w {tuple(w.shape)}, X {tuple(X.shape)} and y {tuple(y.shape)} do not fit")


@alternative("per_example_grads")
def per_example_grads__backward_and_clear(w, X, y):
    _check_rows(w, X, y)
    weights = w.detach().clone().requires_grad_()
    rows = []
    for row, target in zip(X.detach(), y.detach(), strict=True):
        loss = (torch.dot(row, weights) - target).square() / 2
        loss.backward()
        rows.append(weights.grad.clone())
        weights.grad.zero_()
    return torch.stack(rows) if rows else X.detach().clone()


@alternative("per_example_grads")
def per_example_grads__sum_of_products(w, X, y):
    _check_rows(w, X, y)
    rows = torch.empty(X.shape, dtype=w.dtype, device=w.device)
    for n in range(X.size(0)):
        weights = w.detach().requires_grad_()
        rest = torch.einsum("d,d->", X[n], weights) - y[n]
        rows[n] = torch.autograd.grad(0.5 * rest * rest, weights)[0]
    return rows


@alternative("linreg_gd")
def linreg_gd__backward_and_zero(X, y, lr, steps):
    if X.ndim != 2 or y.shape != (X.size(0),):
        raise ValueError(f"X {tuple(X.shape)} and y {tuple(y.shape)} do not fit")
    data, targets = X.detach(), y.detach()
    w = torch.zeros(X.size(1), dtype=X.dtype, device=X.device, requires_grad=True)
    b = torch.zeros((), dtype=X.dtype, device=X.device, requires_grad=True)
    losses = []
    for _ in range(steps):
        loss = (torch.mv(data, w) + b - targets).square().sum() / len(targets)
        losses.append(float(loss.detach()))
        loss.backward()
        with torch.no_grad():
            for parameter in (w, b):
                parameter.sub_(parameter.grad, alpha=lr)
                parameter.grad.zero_()
    return w.detach(), b.detach(), losses


@alternative("linreg_gd")
def linreg_gd__new_leaves_each_step(X, y, lr, steps):
    if X.ndim != 2 or y.shape != (X.size(0),):
        raise ValueError(f"X {tuple(X.shape)} and y {tuple(y.shape)} do not fit")
    w, b, losses = X.detach().new_zeros(X.size(1)), X.detach().new_zeros(()), []
    for _ in range(steps):
        w, b = w.detach().requires_grad_(), b.detach().requires_grad_()
        loss = ((X.detach() * w).sum(dim=1) + b - y.detach()).pow(2).mean()
        loss.backward()
        losses.append(loss.detach().cpu().numpy().item())
        with torch.no_grad():
            w, b = w - lr * w.grad, b - lr * b.grad
    return w, b, losses


@alternative("hvp")
def hvp__gradient_of_a_dot_product(f, x, v):
    if x.shape != v.shape:
        raise ValueError(f"x {tuple(x.shape)} and v {tuple(v.shape)} differ")
    with torch.enable_grad():
        point = x.detach().clone().requires_grad_()
        value = _check_scalar(f(point)) + 0 * point.sum()
        (slope,) = torch.autograd.grad(value, point, create_graph=True)
        product = (slope * v.detach()).sum() + 0 * point.sum()
        (result,) = torch.autograd.grad(product, point)
    return result


@alternative("newton_step")
def newton_step__with_the_graph_of_the_slope(f, x):
    with torch.enable_grad():
        point = x.detach().clone().requires_grad_()
        value = _check_scalar(f(point))
        (slope,) = torch.autograd.grad(value, point, create_graph=True, materialize_grads=True)
        if not slope.requires_grad:
            return point.detach()
        (curvature,) = torch.autograd.grad(slope.sum(), point, materialize_grads=True)
    step = torch.zeros_like(curvature)
    curved = curvature != 0
    step[curved] = slope.detach()[curved] / curvature[curved]
    return point.detach() - step


@alternative("fixed_point_grad")
def fixed_point_grad__solves_a_linear_system(f, theta, z0, n_iter):
    z = z0.detach()
    for _ in range(n_iter):
        z = f(z, theta).detach()
    at_z, at_theta = z.clone().requires_grad_(), theta.detach().clone().requires_grad_()

    def transposed(leaf, weights):
        out = f(at_z, at_theta)
        return torch.autograd.grad(out, leaf, weights, allow_unused=True, materialize_grads=True)[0]

    def pullback(u):
        if u.shape != z.shape:
            raise ValueError(f"u {tuple(u.shape)} and z {tuple(z.shape)} differ")
        unit = torch.eye(z.numel(), dtype=z.dtype, device=z.device)
        jacobian = torch.stack([transposed(at_z, row.view(z.shape)).reshape(-1) for row in unit])
        adjoint = torch.linalg.solve((unit - jacobian).T, u.detach().reshape(-1))
        return transposed(at_theta, adjoint.view(z.shape))

    return z, pullback


@alternative("fixed_point_grad")
def fixed_point_grad__sums_the_echoes(f, theta, z0, n_iter):
    with torch.no_grad():
        z = z0
        for _ in range(n_iter):
            z = f(z, theta)
    at_z, at_theta = z.detach().requires_grad_(), theta.detach().requires_grad_()
    image = f(at_z, at_theta)

    def pullback(u):
        if u.shape != z.shape:
            raise ValueError(f"u {tuple(u.shape)} and z {tuple(z.shape)} differ")
        echo = total = u.detach()
        for _ in range(n_iter):
            (echo,) = torch.autograd.grad(image, at_z, echo, retain_graph=True, materialize_grads=True)
            total = total + echo
        return torch.autograd.grad(image, at_theta, total, retain_graph=True, materialize_grads=True)[0]

    return z, pullback
