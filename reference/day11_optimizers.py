"""Day 11: optimizers. Recurrences from SGD to AdamW, a schedule for the learning rate, and who is decayed at all.

SGD with momentum keeps the raw sum of gradients, without the learning rate in it, as Sutskever et al. 2013 (ICML) and
PyTorch's own documentation compare. Adam: Kingma and Ba 2015 (arXiv:1412.6980), algorithm 1, with the bias correction
of section 3. Decoupled decay and the cosine: Loshchilov and Hutter 2019 (arXiv:1711.05101), algorithm 2, and 2017
(arXiv:1608.03983), equation 5.

State lives in `self.state[p]` and settings in `self.param_groups`, which is all that `state_dict` looks at.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from reference.day05_nn_module_basics import trainable_groups

Params = Iterable[Tensor] | Iterable[dict[str, Any]]
Closure = Callable[[], Any]


def cosine_lr(step: int, *, lr_max: float, lr_min: float, warmup: int, total: int) -> float:
    """The learning rate of update `step` (from 0): up to lr_max in `warmup` steps, down a half cosine to lr_min."""
    if not 0 <= warmup <= total:
        raise ValueError(f"warmup ({warmup}) must lie between 0 and total ({total})")
    if step >= total:
        return lr_min
    if step < warmup:
        return lr_max * (step + 1) / (warmup + 1)
    progress = (step - warmup) / (total - warmup)
    return lr_min + (lr_max - lr_min) * (1 + math.cos(math.pi * progress)) / 2


def run(
    optimizer_factory: Callable[[list[Tensor]], Optimizer], f: Callable[[Tensor], Tensor], x0: Tensor, steps: int
) -> Tensor:
    """Where an optimizer goes on f from x0 (D,): all points, the start included (steps + 1, D)."""
    x = x0.detach().clone().requires_grad_()
    optimizer = optimizer_factory([x])
    points = [x0.detach()]
    for _ in range(steps):
        optimizer.zero_grad()
        f(x).backward()
        optimizer.step()
        points.append(x.detach().clone())
    return torch.stack(points)  # (steps + 1, D)


class SGD(Optimizer):
    """Gradient descent: p <- p - lr * g, where g may be smoothed by momentum, and may contain decay."""

    def __init__(
        self, params: Params, lr: float, momentum: float = 0.0, dampening: float = 0.0, weight_decay: float = 0.0,
        nesterov: bool = False,
    ):  # fmt: skip
        _check_not_negative(lr=lr, momentum=momentum, weight_decay=weight_decay)
        if nesterov and (momentum == 0 or dampening != 0):
            raise ValueError(f"nesterov needs a momentum ({momentum}) and no dampening ({dampening})")
        defaults = {
            "lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay, "nesterov": nesterov,
        }  # fmt: skip
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """Update every parameter that has a gradient; the loss of the closure, if there is one."""
        loss = _loss(closure)
        for p, group in _with_gradient(self):
            self._update(p, group)
        return loss

    def _update(self, p: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        direction = p.grad.add(p, alpha=group["weight_decay"])
        if group["momentum"] != 0:
            if "momentum_buffer" in state:
                buffer = state["momentum_buffer"].mul_(group["momentum"]).add_(direction, alpha=1 - group["dampening"])
            else:
                buffer = state["momentum_buffer"] = direction
            direction = direction.add(buffer, alpha=group["momentum"]) if group["nesterov"] else buffer
        p.add_(direction, alpha=-group["lr"])


class Adam(Optimizer):
    """Steps of about lr in each coordinate: the mean of the gradients over the root of the mean of their squares."""

    def __init__(
        self, params: Params, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):  # fmt: skip
        super().__init__(params, _adam_defaults(lr, betas, eps, weight_decay))

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """Update every parameter that has a gradient, decay counted as a part of it."""
        loss = _loss(closure)
        for p, group in _with_gradient(self):
            _adam_update_(p, p.grad.add(p, alpha=group["weight_decay"]), self.state[p], group)
        return loss


class AdamW(Optimizer):
    """Adam whose weights decay by themselves: p <- (1 - lr * weight_decay) * p, and then Adam's step."""

    def __init__(
        self, params: Params, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.01,
    ):  # fmt: skip
        super().__init__(params, _adam_defaults(lr, betas, eps, weight_decay))

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """Decay and update every parameter that has a gradient."""
        loss = _loss(closure)
        for p, group in _with_gradient(self):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            _adam_update_(p, p.grad, self.state[p], group)
        return loss


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for an optimizer: matrices, which decay, and all the rest, which does not."""
    embedded = {
        id(p)
        for module in model.modules()
        if any("Embedding" in kind.__name__ for kind in type(module).__mro__)
        for p in module.parameters(recurse=False)
    }
    decayed, kept = [], []
    for p in trainable_groups(model):
        (kept if p.ndim < 2 or id(p) in embedded else decayed).append(p)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


class ForeachAdamW(Optimizer):
    """AdamW in as many operations for a thousand tensors as for one."""

    def __init__(
        self, params: Params, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.01,
    ):  # fmt: skip
        super().__init__(params, _adam_defaults(lr, betas, eps, weight_decay))

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """Decay and update the parameters of a group all at once."""
        loss = _loss(closure)
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(params, group)
        return loss

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        lr, (beta1, beta2) = group["lr"], group["betas"]
        grads = [p.grad for p in params]
        states = [_aged(self.state[p], p) for p in params]
        means, squares = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_lerp_(means, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
        roots = torch._foreach_div(squares, [1 - beta2 ** s["step"] for s in states])
        torch._foreach_sqrt_(roots)
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_addcdiv_(params, means, roots, [-lr / (1 - beta1 ** s["step"]) for s in states])


def _adam_update_(p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """Take `grad` into both means, and move p by their corrected ratio."""
    (beta1, beta2), step = group["betas"], _aged(state, p)["step"]
    mean, square = state["exp_avg"], state["exp_avg_sq"]
    mean.lerp_(grad, 1 - beta1)
    square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    root = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
    p.addcdiv_(mean, root, value=-group["lr"] / (1 - beta1**step))


def _aged(state: dict[str, Any], p: Tensor) -> dict[str, Any]:
    """The state of p, one update older; both means start at 0."""
    if not state:
        state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
    state["step"] += 1
    return state


def _with_gradient(optimizer: Optimizer) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Each parameter that has a gradient, with its group."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                yield p, group


def _loss(closure: Closure | None) -> Any:
    """What the closure returns; it runs with gradients on."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _adam_defaults(lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> dict[str, Any]:
    _check_not_negative(lr=lr, eps=eps, weight_decay=weight_decay)
    for beta in betas:
        if not 0 <= beta < 1:
            raise ValueError(f"each beta must lie in [0, 1), unlike {beta}")
    return {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}


def _check_not_negative(**numbers: float) -> None:
    for name, number in numbers.items():
        if number < 0:
            raise ValueError(f"{name} ({number}) must not be negative")
