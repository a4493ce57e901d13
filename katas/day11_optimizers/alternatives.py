import math

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from checker.testing import alternative

# Round 1: the formulas as they stand in the papers


@alternative("cosine_lr")
def cosine_lr(step, *, lr_max, lr_min, warmup, total):
    if warmup < 0 or warmup > total:
        raise ValueError(f"{warmup=} {total=}")
    if step < min(warmup, total):
        return (step + 1) * (lr_max / (warmup + 1))
    if step >= total:
        return lr_min
    half = math.pi / 2 * (step - warmup) / (total - warmup)
    return lr_min * math.sin(half) ** 2 + lr_max * math.cos(half) ** 2


@alternative("run")
def run(optimizer_factory, f, x0, steps):
    x = nn.Parameter(x0.detach().clone())
    optimizer = optimizer_factory([x])
    path = torch.empty(steps + 1, *x0.shape, dtype=x0.dtype, device=x0.device)
    path[0] = x.detach()
    for k in range(1, steps + 1):
        (x.grad,) = torch.autograd.grad(f(x), [x])
        optimizer.step()
        path[k] = x.detach()
    return path


def _refuse(**numbers):
    for name, number in numbers.items():
        if number < 0:
            raise ValueError(f"{name} = {number}")


@alternative("SGD")
class SGD(Optimizer):
    def __init__(self, params, lr, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False):
        _refuse(lr=lr, momentum=momentum, weight_decay=weight_decay)
        if nesterov and (not momentum or dampening):
            raise ValueError("nesterov")
        settings = {"dampening": dampening, "weight_decay": weight_decay, "nesterov": nesterov}
        super().__init__(params, {"lr": lr, "momentum": momentum, **settings})

    def step(self, closure=None):
        loss = None if closure is None else closure()
        with torch.no_grad():
            for group in self.param_groups:
                mu, damp = group["momentum"], group["dampening"]
                for p in group["params"]:
                    if p.grad is None:
                        continue
                    g = p.grad.detach()
                    if group["weight_decay"]:
                        g = g + group["weight_decay"] * p
                    if mu:
                        state = self.state[p]
                        state["b"] = mu * state["b"] + (1 - damp) * g if "b" in state else g.clone()
                        g = g + mu * state["b"] if group["nesterov"] else state["b"]
                    p -= group["lr"] * g
        return loss


class _Textbook(Optimizer):
    decoupled = False

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        _refuse(lr=lr, eps=eps, weight_decay=weight_decay)
        for beta in betas:
            if beta < 0 or beta >= 1:
                raise ValueError(f"betas = {betas}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, p.grad, self.state[p], group)
        return loss

    def update(self, p, g, state, group):
        b1, b2 = group["betas"]
        if self.decoupled:
            p -= group["lr"] * group["weight_decay"] * p
        elif group["weight_decay"]:
            g = g + group["weight_decay"] * p
        if "step" not in state:
            state["step"] = torch.zeros(())
            state["m"], state["v"] = torch.zeros_like(p), torch.zeros_like(p)
        state["step"] += 1
        t = state["step"].item()
        state["m"].mul_(b1).add_(g, alpha=1 - b1)
        state["v"].mul_(b2).addcmul_(g, g, value=1 - b2)
        root = state["v"].sqrt()
        root /= math.sqrt(1 - b2**t)
        root += group["eps"]
        p -= (state["m"] / root).mul_(group["lr"] / (1 - b1**t))


@alternative("Adam")
class Adam(_Textbook):
    pass


@alternative("AdamW")
class AdamW(_Textbook):
    decoupled = True

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
        super().__init__(params, lr, betas, eps, weight_decay)


@alternative("param_groups")
def param_groups(model, weight_decay):
    spared = set()
    for module in model.modules():
        names = [kind.__name__ for kind in type(module).mro()]
        table = any(name.find("Embedding") >= 0 for name in names)
        for p in module._parameters.values():
            if p is not None and (table or p.dim() <= 1):
                spared.add(p)
    trainable = [p for _, p in model.named_parameters() if p.requires_grad]
    return [
        dict(params=[p for p in trainable if p not in spared], weight_decay=weight_decay),
        dict(params=[p for p in trainable if p in spared], weight_decay=0.0),
    ]


@alternative("ForeachAdamW")
class ForeachAdamW(AdamW):
    """All tensors of a group laid side by side in one long vector."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            found = {}
            for p in group["params"]:
                if p.grad is not None:
                    found.setdefault(p.dtype, []).append(p)
            for params in found.values():
                self.update_all(params, group)
        return loss

    def update_all(self, params, group):
        b1, b2 = group["betas"]
        states = [self.state[p] for p in params]
        for p, state in zip(params, states, strict=True):
            if not state:
                state.update(m=torch.zeros_like(p), v=torch.zeros_like(p), n=0)
            state["n"] += 1
        ms, vs, grads = [s["m"] for s in states], [s["v"] for s in states], [p.grad for p in params]
        torch._foreach_add_(params, params, alpha=-group["lr"] * group["weight_decay"])
        torch._foreach_mul_(ms, b1)
        torch._foreach_add_(ms, grads, alpha=1 - b1)
        torch._foreach_mul_(vs, b2)
        torch._foreach_addcmul_(vs, grads, grads, 1 - b2)
        roots = torch._foreach_sqrt(vs)
        torch._foreach_div_(roots, [math.sqrt(1 - b2 ** s["n"]) for s in states])
        torch._foreach_add_(roots, group["eps"])
        steps = torch._foreach_div(ms, roots)
        torch._foreach_mul_(steps, [-group["lr"] / (1 - b1 ** s["n"]) for s in states])
        torch._foreach_add_(params, steps)


# Round 2: other orders of operation


@alternative("cosine_lr")
def cosine_from_pieces(step, *, lr_max, lr_min, warmup, total):
    if not warmup in range(total + 1):  # noqa: E713
        raise ValueError(f"warmup {warmup}, total {total}")
    if step < warmup:
        return float(np.linspace(0.0, lr_max, warmup + 2)[step + 1])
    progress = 1.0 if step >= total else (step - warmup) / (total - warmup)
    return lr_min + 0.5 * (lr_max - lr_min) * (1.0 + math.cos(math.pi * progress))


@alternative("SGD")
class SGDWithBufferFromZero(SGD):
    """The buffer is made at 0 and remembers whether it was ever filled."""

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            for p in filter(lambda p: p.grad is not None, group["params"]):
                g = p.grad.clone().add_(p, alpha=group["weight_decay"])
                if group["momentum"] > 0:
                    new = "b" not in self.state[p]
                    b = self.state[p].setdefault("b", torch.zeros_like(p))
                    b.mul_(group["momentum"]).add_(g, alpha=1.0 if new else 1 - group["dampening"])
                    g = g.add_(b, alpha=group["momentum"]) if group["nesterov"] else b
                p.sub_(g, alpha=group["lr"])
        return loss


@alternative("Adam")
class AdamWithFoldedCorrection(Adam):
    """Both corrections are folded into the rate, and eps with them, as in the end of section 2 of the paper."""

    def update(self, p, g, state, group):
        b1, b2 = group["betas"]
        g = g.add(p, alpha=group["weight_decay"])
        if not state:
            state.update(t=0, m=torch.zeros_like(p), v=torch.zeros_like(p))
        state["t"] += 1
        state["m"].lerp_(g, 1 - b1)
        state["v"].lerp_(g.square_(), 1 - b2)
        root = math.sqrt(1 - b2 ** state["t"])
        rate = group["lr"] * root / (1 - b1 ** state["t"])
        p.addcdiv_(state["m"], state["v"].sqrt().add_(group["eps"] * root), value=-rate)
