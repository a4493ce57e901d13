import math

import torch
from torch import nn
from torch.optim import Optimizer

from checker.testing import misconception
from reference import day11_optimizers as right

# cosine_lr


def _fits(warmup, total):
    if not 0 <= warmup <= total:
        raise ValueError(f"warmup {warmup}, total {total}")


def _fall(progress, lr_max, lr_min):
    return lr_min + (lr_max - lr_min) * (1 + math.cos(math.pi * progress)) / 2


def _schedule(step, lr_max, lr_min, warmup, total, *, ramp=None, fall=None, end=None):
    """The right schedule, but for the pieces that are given."""
    _fits(warmup, total)
    if step >= total:
        return lr_min if end is None else end()
    if step < warmup:
        return lr_max * (step + 1) / (warmup + 1) if ramp is None else ramp()
    progress = (step - warmup) / (total - warmup)
    return _fall(progress, lr_max, lr_min) if fall is None else fall(progress)


@misconception(
    "cosine_lr",
    "Step 0 has a learning rate of 0 here: a forward and a backward pass are paid for, and nothing is learned from them. Steps count from 0, and the ramp should have left the ground by then.",
)
def cosine_lr__starts_at_zero(step, *, lr_max, lr_min, warmup, total):
    return _schedule(step, lr_max, lr_min, warmup, total, ramp=lambda: lr_max * step / warmup)


@misconception(
    "cosine_lr",
    "Your ramp is one step too steep: it is at the top at step warmup - 1 and stays there for two steps. It has warmup + 1 parts of equal size, the last of which ends at step warmup.",
)
def cosine_lr__at_the_top_too_early(step, *, lr_max, lr_min, warmup, total):
    return _schedule(step, lr_max, lr_min, warmup, total, ramp=lambda: lr_max * (step + 1) / warmup)


@misconception(
    "cosine_lr",
    "These are the rates of the following step. That happens when the schedule moves on before the optimizer has stepped: the rate of step t belongs to update t, and the first of all is never used.",
)
def cosine_lr__one_step_ahead(step, *, lr_max, lr_min, warmup, total):
    _fits(warmup, total)
    return right.cosine_lr(step + 1, lr_max=lr_max, lr_min=lr_min, warmup=warmup, total=total)


@misconception(
    "cosine_lr",
    "The ramp sets out from lr_min. lr_min is where the cosine ends; the ramp comes up from 0, whatever the end may be.",
)
def cosine_lr__ramp_from_the_lowest(step, *, lr_max, lr_min, warmup, total):
    ramp = lambda: lr_min + (lr_max - lr_min) * (step + 1) / (warmup + 1)  # noqa: E731
    return _schedule(step, lr_max, lr_min, warmup, total, ramp=ramp)


@misconception(
    "cosine_lr",
    "Behind total the rate climbs again: a cosine comes back. A run that goes on for a while longer should stay at lr_min.",
)
def cosine_lr__comes_back(step, *, lr_max, lr_min, warmup, total):
    def end():
        return _fall((step - warmup) / (total - warmup), lr_max, lr_min) if total > warmup else lr_min

    return _schedule(step, lr_max, lr_min, warmup, total, end=end)


@misconception(
    "cosine_lr",
    "Right behind the ramp the rate drops at once: the cosine was started at step 0, and a piece of it is over when the ramp ends. It has only the steps from warmup to total.",
)
def cosine_lr__starts_under_the_ramp(step, *, lr_max, lr_min, warmup, total):
    return _schedule(step, lr_max, lr_min, warmup, total, fall=lambda _: _fall(step / total, lr_max, lr_min))


@misconception(
    "cosine_lr",
    "This is a whole wave: down to lr_min in the middle, and up again. From the top to the bottom it is half a turn.",
)
def cosine_lr__whole_wave(step, *, lr_max, lr_min, warmup, total):
    return _schedule(step, lr_max, lr_min, warmup, total, fall=lambda part: _fall(2 * part, lr_max, lr_min))


@misconception(
    "cosine_lr",
    "This is a quarter of a wave: it falls ever faster and hits lr_min with its steepest part. Half a wave is flat at both ends.",
)
def cosine_lr__quarter_wave(step, *, lr_max, lr_min, warmup, total):
    fall = lambda part: lr_min + (lr_max - lr_min) * math.cos(math.pi / 2 * part)  # noqa: E731
    return _schedule(step, lr_max, lr_min, warmup, total, fall=fall)


@misconception(
    "cosine_lr",
    "The rate falls along a straight line. Both ends and the middle are right; in between a cosine is above the line at first and below it later.",
)
def cosine_lr__straight_line(step, *, lr_max, lr_min, warmup, total):
    fall = lambda part: lr_max + (lr_min - lr_max) * part  # noqa: E731
    return _schedule(step, lr_max, lr_min, warmup, total, fall=fall)


@misconception(
    "cosine_lr",
    "lr_min was put on top: the fall begins at lr_max + lr_min. What the cosine scales is the distance between the two.",
)
def cosine_lr__lowest_on_top(step, *, lr_max, lr_min, warmup, total):
    fall = lambda part: lr_min + lr_max * (1 + math.cos(math.pi * part)) / 2  # noqa: E731
    return _schedule(step, lr_max, lr_min, warmup, total, fall=fall)


@misconception(
    "cosine_lr",
    "The cosine falls to 0 and is cut off at lr_min, so the run sits at the bottom long before total. Let it swing between the two rates.",
)
def cosine_lr__cut_off(step, *, lr_max, lr_min, warmup, total):
    fall = lambda part: max(lr_min, lr_max * (1 + math.cos(math.pi * part)) / 2)  # noqa: E731
    return _schedule(step, lr_max, lr_min, warmup, total, fall=fall)


@misconception(
    "cosine_lr",
    "Where the warmup takes all of the steps there is nothing left to fall in, and you divide by total - warmup = 0. Decide first whether the run is over.",
)
def cosine_lr__divides_by_nothing(step, *, lr_max, lr_min, warmup, total):
    _fits(warmup, total)
    if step < warmup:
        return lr_max * (step + 1) / (warmup + 1)
    return _fall(min(1.0, (step - warmup) / (total - warmup)), lr_max, lr_min)


@misconception(
    "cosine_lr",
    "A warmup that is longer than the run went through. Such a run would never reach its rate and nobody would be told: raise ValueError with both numbers.",
)
def cosine_lr__accepts_anything(step, *, lr_max, lr_min, warmup, total):
    if step >= total:
        return lr_min
    if step < warmup:
        return lr_max * (step + 1) / (warmup + 1)
    return _fall((step - warmup) / (total - warmup), lr_max, lr_min)


# run


@misconception(
    "run",
    "Each step is made with the sum of all gradients so far. backward adds to .grad, so somebody has to clear it before.",
)
def run__never_cleared(optimizer_factory, f, x0, steps):
    x = x0.detach().clone().requires_grad_()
    optimizer = optimizer_factory([x])
    points = [x0.detach()]
    for _ in range(steps):
        f(x).backward()
        optimizer.step()
        points.append(x.detach().clone())
    return torch.stack(points)


@misconception(
    "run",
    "All rows are the same: the last point. What you kept were views of one tensor that the optimizer went on writing into. detach shares memory, so make copies.",
)
def run__views(optimizer_factory, f, x0, steps):
    x = x0.detach().clone().requires_grad_()
    optimizer = optimizer_factory([x])
    points = [x.detach()]
    for _ in range(steps):
        optimizer.zero_grad()
        f(x).backward()
        optimizer.step()
        points.append(x.detach())
    return torch.stack(points)


@misconception(
    "run",
    "The point is written down before the step, so the start is there twice and the end is missing. Row k is where you are after k steps.",
)
def run__recorded_before(optimizer_factory, f, x0, steps):
    x = x0.detach().clone().requires_grad_()
    optimizer = optimizer_factory([x])
    points = [x0.detach()]
    for _ in range(steps):
        points.append(x.detach().clone())
        optimizer.zero_grad()
        f(x).backward()
        optimizer.step()
    return torch.stack(points)


@misconception(
    "run",
    "The start is missing: there is a row for each step, and one more was asked for. Four posts hold three pieces of fence.",
)
def run__without_the_start(optimizer_factory, f, x0, steps):
    return right.run(optimizer_factory, f, x0, steps)[1:]


@misconception(
    "run",
    "The end is missing: the loop writes down where each step begins, and nobody writes down where the last one ends.",
)
def run__without_the_end(optimizer_factory, f, x0, steps):
    return right.run(optimizer_factory, f, x0, steps)[:-1]


@misconception(
    "run",
    "A new optimizer at each step has forgotten everything: its momentum, its means, its age. Make it once, before the loop.",
)
def run__new_optimizer_each_time(optimizer_factory, f, x0, steps):
    x = x0.detach().clone().requires_grad_()
    points = [x0.detach()]
    for _ in range(steps):
        optimizer = optimizer_factory([x])
        optimizer.zero_grad()
        f(x).backward()
        optimizer.step()
        points.append(x.detach().clone())
    return torch.stack(points)


@misconception(
    "run",
    "The optimizer walked off with the caller's x0: after the call it lies at the end of the path. Let it have a copy.",
)
def run__moves_the_start(optimizer_factory, f, x0, steps):
    x = x0.detach().requires_grad_()
    optimizer = optimizer_factory([x])
    points = [x.detach().clone()]
    for _ in range(steps):
        optimizer.zero_grad()
        f(x).backward()
        optimizer.step()
        points.append(x.detach().clone())
    return torch.stack(points)


@misconception(
    "run",
    "The path still has a graph: each row is a clone that remembers where it came from. A record of positions needs values alone.",
)
def run__with_a_graph(optimizer_factory, f, x0, steps):
    x = x0.detach().clone().requires_grad_()
    optimizer = optimizer_factory([x])
    points = [x.clone()]
    for _ in range(steps):
        optimizer.zero_grad()
        f(x).backward()
        optimizer.step()
        points.append(x.clone())
    return torch.stack(points)


@misconception(
    "run",
    "f was asked once more than steps were made. Where f is a model and a batch, that is a pass for nothing.",
)
def run__one_evaluation_more(optimizer_factory, f, x0, steps):
    x = x0.detach().clone().requires_grad_()
    optimizer = optimizer_factory([x])
    points, loss = [x0.detach()], f(x)
    for _ in range(steps):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        points.append(x.detach().clone())
        loss = f(x)
    return torch.stack(points)


# The optimizers: right in all but what a subclass changes


class _Loop(Optimizer):
    @torch.no_grad()
    def step(self, closure=None):
        loss = self.loss(closure)
        self.before()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, p.grad, group)
        return loss

    def loss(self, closure):
        if closure is None:
            return None
        with torch.enable_grad():
            return closure()

    def before(self):
        pass


class _SGD(_Loop):
    def __init__(self, params, lr, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False):
        right._check_not_negative(lr=lr, momentum=momentum, weight_decay=weight_decay)
        if nesterov and (momentum == 0 or dampening != 0):
            raise ValueError("nesterov")
        settings = {"momentum": momentum, "dampening": dampening, "weight_decay": weight_decay, "nesterov": nesterov}
        super().__init__(params, {"lr": lr, **settings})

    def update(self, p, grad, group):
        g = self.decayed(p, grad, group)
        p.sub_(group["lr"] * self.direction(self.state[p], g, group))

    def decayed(self, p, grad, group):
        return grad + group["weight_decay"] * p

    def direction(self, state, g, group):
        if group["momentum"] == 0:
            return g
        if "b" in state:
            state["b"] = self.later(state["b"], g, group)
        else:
            state["b"] = self.first(g, group)
        return g + group["momentum"] * state["b"] if group["nesterov"] else state["b"]

    def first(self, g, group):
        return g.clone()

    def later(self, b, g, group):
        return group["momentum"] * b + (1 - group["dampening"]) * g


@misconception(
    "SGD",
    "The first step of the momentum came out too short: the gradient was dampened although there was nothing yet to dampen it against. The buffer starts as the gradient itself.",
)
class SGD__first_step_dampened(_SGD):
    def first(self, g, group):
        return (1 - group["dampening"]) * g


@misconception(
    "SGD",
    "Dampening has no effect: new gradients enter the buffer at full size.",
)
class SGD__dampening_ignored(_SGD):
    def later(self, b, g, group):
        return group["momentum"] * b + g


@misconception(
    "SGD",
    "Your buffer is an average: the gradient is weighed by 1 - momentum. Here it is a sum, which for a steady gradient grows to 1 / (1 - momentum) of it; with momentum 0.9 your steps end up ten times too short.",
)
class SGD__average(_SGD):
    def later(self, b, g, group):
        return group["momentum"] * b + (1 - group["momentum"]) * (1 - group["dampening"]) * g


@misconception(
    "SGD",
    "The learning rate has gone into the buffer: once it is changed, old gradients still come with the old rate. Keep gradients in the buffer and multiply by lr at the very end.",
)
class SGD__rate_in_the_buffer(_SGD):
    def update(self, p, grad, group):
        p.sub_(self.direction(self.state[p], group["lr"] * self.decayed(p, grad, group), group))


@misconception(
    "SGD",
    "nesterov makes no difference here: you step along the buffer, or you look ahead with the buffer from before this gradient, which comes to the same. Update the buffer first, then look ahead with the new one.",
)
class SGD__nesterov_ignored(_SGD):
    def direction(self, state, g, group):
        return super().direction(state, g, {**group, "nesterov": False})


@misconception(
    "SGD",
    "The decay went past the momentum: it was added to the step and not to the gradient. Here it is an L2 penalty, a part of the gradient, so the buffer sees it, too.",
)
class SGD__decay_behind_the_momentum(_SGD):
    def update(self, p, grad, group):
        p.sub_(group["lr"] * (self.direction(self.state[p], grad, group) + group["weight_decay"] * p))


@misconception(
    "SGD",
    "weight_decay has no effect: with gradients of zero the weights stay where they are.",
)
class SGD__no_decay(_SGD):
    def decayed(self, p, grad, group):
        return grad.clone()


@misconception(
    "SGD",
    "The weights grow under weight_decay: its sign is wrong. What is subtracted in the end has to point to where the weight is, away from zero.",
)
class SGD__decay_makes_grow(_SGD):
    def decayed(self, p, grad, group):
        return grad - group["weight_decay"] * p


@misconception(
    "SGD",
    "This climbs: the step goes along the gradient, which points uphill.",
)
class SGD__uphill(_SGD):
    def update(self, p, grad, group):
        p.add_(group["lr"] * self.direction(self.state[p], self.decayed(p, grad, group), group))


@misconception(
    "SGD",
    "The decay was written into .grad. The gradient belongs to the caller, who may log it, clip it or step with it again: compute beside it.",
)
class SGD__writes_into_the_gradient(_SGD):
    def decayed(self, p, grad, group):
        return grad.add_(p, alpha=group["weight_decay"])


@misconception(
    "SGD",
    "Your buffer is the .grad tensor itself, not a copy. When the next backward fills that tensor, the momentum of the past is gone. A name is no copy.",
)
class SGD__buffer_is_the_gradient(_SGD):
    def decayed(self, p, grad, group):
        return grad + group["weight_decay"] * p if group["weight_decay"] else grad

    def first(self, g, group):
        return g


@misconception(
    "SGD",
    "Your buffer is the .grad tensor itself, and later steps write into it. The next backward fills the same tensor, and then the buffer is multiplied and added to itself: the past is gone, and the caller's gradient is changed as well. Begin the buffer with a copy.",
)
class SGD__buffer_is_the_gradient_and_is_written(SGD__buffer_is_the_gradient):
    def later(self, b, g, group):
        return b.mul_(group["momentum"]).add_(g, alpha=1 - group["dampening"])


@misconception(
    "SGD",
    "The parameters have not moved. p = p - ... computes a new tensor and gives it a local name; the model still holds the old one. Write into p.",
)
class SGD__rebinds_the_name(_SGD):
    def update(self, p, grad, group):
        p = p - group["lr"] * self.direction(self.state[p], self.decayed(p, grad, group), group)


@misconception(
    "SGD",
    "The parameter got new memory: p.data was replaced. Whatever shares the old memory, a view or a flat buffer, is left behind. Write into the memory that is there.",
)
class SGD__new_memory(_SGD):
    def update(self, p, grad, group):
        p.data = p.data - group["lr"] * self.direction(self.state[p], self.decayed(p, grad, group), group)


@misconception(
    "SGD",
    "The update itself was recorded by autograd, which refuses to have a leaf changed under its eyes. A step is bookkeeping and no part of the function: do it with gradients off.",
)
class SGD__recorded(_SGD):
    def step(self, closure=None):
        loss = self.loss(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, p.grad, group)
        return loss


@misconception(
    "SGD",
    "A parameter without a gradient made your step fall over. Frozen or unused parameters have .grad None, and they are to be left out.",
)
class SGD__expects_gradients(_SGD):
    @torch.no_grad()
    def step(self, closure=None):
        loss = self.loss(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.update(p, p.grad, group)
        return loss


@misconception(
    "SGD",
    "A parameter without a gradient was treated as one with a gradient of zero: it decays, and rolls on with its momentum. No gradient means that it takes no part.",
)
class SGD__none_is_zero(_SGD):
    @torch.no_grad()
    def step(self, closure=None):
        loss = self.loss(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.update(p, torch.zeros_like(p) if p.grad is None else p.grad, group)
        return loss


@misconception(
    "SGD",
    "Only the first group was updated. param_groups is a list, and each entry has parameters and settings of its own.",
)
class SGD__first_group_only(_SGD):
    @torch.no_grad()
    def step(self, closure=None):
        loss = self.loss(closure)
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                self.update(p, p.grad, self.param_groups[0])
        return loss


@misconception(
    "SGD",
    "The settings are those from the constructor, for every group and for ever. A schedule changes the entries of param_groups: read them at each step.",
)
class SGD__settings_of_the_start(_SGD):
    def update(self, p, grad, group):
        super().update(p, grad, self.defaults)


@misconception(
    "SGD",
    "The momentum is not in state_dict: it lives in an attribute of your own. A run that is resumed begins with an empty buffer. self.state is the place that is saved.",
)
class SGD__state_of_its_own(_SGD):
    def update(self, p, grad, group):
        mine = self.__dict__.setdefault("buffers", {}).setdefault(id(p), {})
        p.sub_(group["lr"] * self.direction(mine, self.decayed(p, grad, group), group))


@misconception(
    "SGD",
    "A buffer is kept although there is no momentum to keep: memory for another copy of the model, and nobody reads it.",
)
class SGD__buffer_for_nothing(_SGD):
    def direction(self, state, g, group):
        state["b"] = self.later(state["b"], g, group) if "b" in state else g.clone()
        if group["momentum"] == 0:
            return g
        return g + group["momentum"] * state["b"] if group["nesterov"] else state["b"]


@misconception(
    "SGD",
    "The closure was never called. An optimizer that gets one is meant to compute the loss by it before it steps.",
)
class SGD__closure_ignored(_SGD):
    def loss(self, closure):
        return None


@misconception(
    "SGD",
    "The closure ran with gradients off, since the whole step does. It has a backward in it: switch recording on for as long as it runs.",
)
class SGD__closure_without_gradients(_SGD):
    def loss(self, closure):
        return None if closure is None else closure()


@misconception(
    "SGD",
    "The closure was called and its result thrown away. The caller waits for the loss.",
)
class SGD__loss_not_returned(_SGD):
    def step(self, closure=None):
        super().step(closure)


# Adam


class _Moments(_Loop):
    """Adam's recurrence; `coupled` says whether the decay is a part of the gradient."""

    coupled = True

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        super().__init__(params, right._adam_defaults(lr, betas, eps, weight_decay))

    def update(self, p, grad, group):
        self.decay(p, group)
        if self.coupled:
            grad = grad.add(p, alpha=group["weight_decay"])
        state = self.memory(p)
        t = self.age(state, group)
        self.means(state, grad, *group["betas"])
        self.move(p, state, group, t)

    def decay(self, p, group):
        if not self.coupled:
            p.mul_(1 - group["lr"] * group["weight_decay"])

    def memory(self, p):
        state = self.state[p]
        if "m" not in state:
            state.update(m=torch.zeros_like(p), v=torch.zeros_like(p), t=0)
        return state

    def age(self, state, group):
        state["t"] += 1
        return state["t"]

    def means(self, state, g, beta1, beta2):
        state["m"].mul_(beta1).add_(g, alpha=1 - beta1)
        state["v"].mul_(beta2).addcmul_(g, g, value=1 - beta2)

    def move(self, p, state, group, t):
        beta1, beta2 = group["betas"]
        root = self.root(state["v"], 1 - beta2**t, group["eps"])
        p.addcdiv_(state["m"], root, value=-group["lr"] / (1 - beta1**t))

    def root(self, v, correction, eps):
        return (v / correction).sqrt_().add_(eps)


@misconception(
    "Adam",
    "Both means start at 0 and are used as they are: the mean of the gradients begins 10 times too small, the mean of their squares 1000 times. Under the root that makes the first step about 3.16 times too long. Correct both for their start.",
)
class Adam__no_correction(_Moments):
    def move(self, p, state, group, t):
        p.addcdiv_(state["m"], self.root(state["v"], 1.0, group["eps"]), value=-group["lr"])


@misconception(
    "Adam",
    "The mean of the squares is used without its correction. It starts at 0 as well, and far slower: the first steps are more than thirty times too long.",
)
class Adam__squares_not_corrected(_Moments):
    def root(self, v, correction, eps):
        return super().root(v, 1.0, eps)


@misconception(
    "Adam",
    "The mean of the gradients is used without its correction. It starts at 0, so the first step comes out at a tenth of its size.",
)
class Adam__mean_not_corrected(_Moments):
    def move(self, p, state, group, t):
        _, beta2 = group["betas"]
        p.addcdiv_(state["m"], self.root(state["v"], 1 - beta2**t, group["eps"]), value=-group["lr"])


@misconception(
    "Adam",
    "eps went under the root. There 1e-8 acts like 1e-4, and small gradients no longer get their step of lr. Take the root first, then add.",
)
class Adam__eps_under_the_root(_Moments):
    def root(self, v, correction, eps):
        return (v / correction + eps).sqrt_()


@misconception(
    "Adam",
    "eps was added before the correction and got divided along with the root, so in the first steps it is some thirty times as large as it should be. Correct, take the root, add eps, in this order.",
)
class Adam__eps_before_the_correction(_Moments):
    def root(self, v, correction, eps):
        return (v.sqrt() + eps) / math.sqrt(correction)


@misconception(
    "Adam",
    "There is no root: you divide by the mean square. Gradients of 0.001 then take steps a million times as long as gradients of 1000, where both should take the same.",
)
class Adam__no_root(_Moments):
    def root(self, v, correction, eps):
        return v / correction + eps


@misconception(
    "Adam",
    "The second mean is that of the absolute values. It is squares that are averaged, and the root comes at the end.",
)
class Adam__absolute_values(_Moments):
    def means(self, state, g, beta1, beta2):
        state["m"].mul_(beta1).add_(g, alpha=1 - beta1)
        state["v"].mul_(beta2).add_(g.abs(), alpha=1 - beta2)

    def root(self, v, correction, eps):
        return v / correction + eps


@misconception(
    "Adam",
    "The second mean squares the running mean and not the gradient. Where gradients change sign, the mean is near zero and its square says nothing about their size.",
)
class Adam__squares_the_mean(_Moments):
    def means(self, state, g, beta1, beta2):
        state["m"].mul_(beta1).add_(g, alpha=1 - beta1)
        state["v"].mul_(beta2).addcmul_(state["m"], state["m"], value=1 - beta2)


@misconception(
    "Adam",
    "The two betas have changed places: the gradients are averaged over a thousand steps and their squares over ten.",
)
class Adam__betas_swapped(_Moments):
    def update(self, p, grad, group):
        super().update(p, grad, {**group, "betas": group["betas"][::-1]})


@misconception(
    "Adam",
    "The means weigh new gradients fully, as momentum in SGD does. After the correction the first is ten times too large and the root of the second more than thirty times, so the steps are too short. An average keeps beta of the old and takes 1 - beta of the new.",
)
class Adam__sums(_Moments):
    def means(self, state, g, beta1, beta2):
        state["m"].mul_(beta1).add_(g)
        state["v"].mul_(beta2).addcmul_(g, g)


@misconception(
    "Adam",
    "The correction takes beta times t where beta to the power of t belongs. In the first step the two are the same; from the second on they part.",
)
class Adam__times_instead_of_power(_Moments):
    def move(self, p, state, group, t):
        beta1, beta2 = group["betas"]
        c1, c2 = 1 - beta1 * t or 1.0, 1 - beta2 * t or 1.0
        p.addcdiv_(state["m"], self.root(state["v"], c2, group["eps"]), value=-group["lr"] / c1)


@misconception(
    "Adam",
    "The corrections are made for ever as in the first step. They fade as the means fill up, with the power of the step.",
)
class Adam__first_correction_for_ever(_Moments):
    def move(self, p, state, group, t):
        super().move(p, state, group, 1)


@misconception(
    "Adam",
    "The steps are counted from 1 and then counted on before they are used, so the corrections of the second step are made in the first.",
)
class Adam__one_step_old(_Moments):
    def age(self, state, group):
        return super().age(state, group) + 1


@misconception(
    "Adam",
    "One counter serves all parameters of a group. A parameter that gets its first gradient late is corrected as if its means were old, and its first step is far off. A parameter without gradient must not age.",
)
class Adam__one_counter_for_all(_Moments):
    def before(self):
        for group in self.param_groups:
            group["steps"] = group.get("steps", 0) + 1

    def age(self, state, group):
        return group["steps"]


@misconception(
    "Adam",
    "One counter serves the whole optimizer: it counts calls of step, not updates. A parameter that gets its first gradient late is corrected as if its means were old, and its first step is far off. Each parameter needs a count of its own, in its state, where state_dict finds it.",
)
class Adam__one_counter_on_the_instance(_Moments):
    t = 0

    def before(self):
        self.t += 1

    def age(self, state, group):
        return self.t


@misconception(
    "Adam",
    "The counter goes up once for every parameter, not once per step: with four parameters in a group it runs four times as fast. Each parameter needs its own.",
)
class Adam__counts_parameters(_Moments):
    def age(self, state, group):
        group["steps"] = group.get("steps", 0) + 1
        return group["steps"]


@misconception(
    "Adam",
    "The optimizer has one counter, and it goes up in the loop over the parameters: each of them is corrected with another number, and with four parameters it runs four times as fast. Each needs a count of its own, in its state, where state_dict finds it.",
)
class Adam__counts_parameters_on_the_instance(_Moments):
    t = 0

    def age(self, state, group):
        self.t += 1
        return self.t


@misconception(
    "Adam",
    "The counter is a tensor in the dtype of the parameter. In bfloat16 256 + 1 is 256 again, so it stands still from then on and the corrections never fade. Count with an int.",
)
class Adam__counter_rounds(_Moments):
    def memory(self, p):
        state = self.state[p]
        if "m" not in state:
            state.update(m=torch.zeros_like(p), v=torch.zeros_like(p), t=torch.zeros((), dtype=p.dtype))
        return state

    def age(self, state, group):
        state["t"] += 1
        return state["t"].item()


@misconception(
    "Adam",
    "The number of updates is not in state_dict: it is an attribute of your own. The resumed run has old means and a new counter, so the old means are blown up once more.",
)
class Adam__forgets_its_age(_Moments):
    def age(self, state, group):
        ages = self.__dict__.setdefault("ages", {})
        ages[id(state["m"])] = ages.get(id(state["m"]), 0) + 1
        return ages[id(state["m"])]


@misconception(
    "Adam",
    "The weights decay by lr * weight_decay of themselves, past the gradient. That is AdamW. In Adam the decay is a part of the gradient and goes through both means.",
)
class Adam__decoupled(_Moments):
    coupled = False


@misconception(
    "Adam",
    "weight_decay has no effect: where all gradients are zero the weights do not move.",
)
class Adam__no_decay(_Moments):
    def update(self, p, grad, group):
        super().update(p, grad, {**group, "weight_decay": 0.0})


@misconception(
    "Adam",
    "The decay was written into .grad, which belongs to the caller. Compute beside it.",
)
class Adam__writes_into_the_gradient(_Moments):
    def update(self, p, grad, group):
        super().update(p, grad.add_(p, alpha=group["weight_decay"]), {**group, "weight_decay": 0.0})


@misconception(
    "Adam",
    "A parameter without a gradient was treated as one with a gradient of zero: its means fade, it ages, decays and still moves. No gradient means that it takes no part.",
)
class Adam__none_is_zero(_Moments):
    @torch.no_grad()
    def step(self, closure=None):
        loss = self.loss(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.update(p, torch.zeros_like(p) if p.grad is None else p.grad, group)
        return loss


@misconception(
    "Adam",
    "The settings are those from the constructor, for every group and for ever. Read param_groups at each step.",
)
class Adam__settings_of_the_start(_Moments):
    def update(self, p, grad, group):
        super().update(p, grad, self.defaults)


@misconception(
    "Adam",
    "The numbers are right, but too many tensors as large as the parameter are alive at once. Names keep tensors alive: work in place on the one that you no longer need, and let the functions take the factors.",
)
class Adam__many_copies(_Moments):
    def move(self, p, state, group, t):
        beta1, beta2 = group["betas"]
        mean, square = state["m"] / (1 - beta1**t), state["v"] / (1 - beta2**t)
        root = square.sqrt()
        p.sub_(group["lr"] * mean / (root + group["eps"]))


@misconception(
    "Adam",
    "A beta of 1 was accepted. Such a mean never moves away from 0, and its correction divides by 0: refuse what does not lie in [0, 1).",
)
class Adam__any_beta(_Moments):
    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        right._check_not_negative(lr=lr, eps=eps, weight_decay=weight_decay)
        Optimizer.__init__(self, params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})


# AdamW


class _Decoupled(_Moments):
    coupled = False

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
        super().__init__(params, lr, betas, eps, weight_decay)


@misconception(
    "AdamW",
    "This is Adam with an L2 penalty: the decay is in the gradient, and so it is divided by the root like everything else. A weight with large gradients hardly decays at all. Take the decay out of the gradient and let it act on the weight itself.",
)
class AdamW__l2(_Decoupled):
    coupled = True


@misconception(
    "AdamW",
    "Each step takes weight_decay of a weight away, whatever the learning rate: 0.01 leaves nothing after a few hundred steps. The factor contains lr, so that the decay fades with the schedule.",
)
class AdamW__decay_without_the_rate(_Decoupled):
    def decay(self, p, group):
        p.mul_(1 - group["weight_decay"])


@misconception(
    "AdamW",
    "A weight loses lr of itself at each step, whatever weight_decay is: the setting is not in the factor. With an lr of 0.1 and gradients of zero, 0.9 of it is left after one step, also where weight_decay is 0.",
)
class AdamW__decay_without_weight_decay(_Decoupled):
    def decay(self, p, group):
        p.mul_(1 - group["lr"])


@misconception(
    "AdamW",
    "The decay comes after the step and takes a part of the step with it: a weight that was 0 has already lost some of its first move. Decay first.",
)
class AdamW__decay_after_the_step(_Decoupled):
    def decay(self, p, group):
        pass

    def move(self, p, state, group, t):
        super().move(p, state, group, t)
        p.mul_(1 - group["lr"] * group["weight_decay"])


@misconception(
    "AdamW",
    "There is no decay: gradients of zero leave the weights as they are.",
)
class AdamW__no_decay(_Decoupled):
    def decay(self, p, group):
        pass


@misconception(
    "AdamW",
    "If nothing is said about it, nothing decays here. AdamW has a default of 0.01; without one it would be Adam.",
)
class AdamW__no_default(_Decoupled):
    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        super().__init__(params, lr, betas, eps, weight_decay)


@misconception(
    "AdamW",
    "The decay uses the learning rate from the constructor. When the schedule has brought lr down, the weights go on decaying at the old pace.",
)
class AdamW__decay_with_the_first_rate(_Decoupled):
    def decay(self, p, group):
        p.mul_(1 - self.defaults["lr"] * group["weight_decay"])


@misconception(
    "AdamW",
    "Weights without a gradient decay, too: the loop over the decay does not ask. A layer that takes no part in a step, an expert that nobody chose, would fade away.",
)
class AdamW__decays_without_a_gradient(_Decoupled):
    def before(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    p.mul_(1 - group["lr"] * group["weight_decay"])


@misconception(
    "AdamW",
    "A weight decays by half of lr * weight_decay: that is the gradient of a penalty with a half too many in it. The factor is 1 - lr * weight_decay.",
)
class AdamW__half_the_decay(_Decoupled):
    def decay(self, p, group):
        p.mul_(1 - 0.5 * group["lr"] * group["weight_decay"])


@misconception(
    "AdamW",
    "The weights grow: the factor is above 1.",
)
class AdamW__decay_makes_grow(_Decoupled):
    def decay(self, p, group):
        p.mul_(1 + group["lr"] * group["weight_decay"])


@misconception(
    "AdamW",
    "One counter serves all parameters, those without a gradient as well. Whoever comes late gets a first step that is far off: count the updates of each parameter by itself.",
)
class AdamW__one_counter_for_all(_Decoupled):
    before = Adam__one_counter_for_all.before
    age = Adam__one_counter_for_all.age


@misconception(
    "AdamW",
    "One counter serves the whole optimizer: it counts calls of step, not updates. Whoever comes late gets a first step that is far off. Count the updates of each parameter, in its state, where state_dict finds the number.",
)
class AdamW__one_counter_on_the_instance(_Decoupled):
    t = 0
    before = Adam__one_counter_on_the_instance.before
    age = Adam__one_counter_on_the_instance.age


@misconception(
    "AdamW",
    "The optimizer has one counter, and it goes up in the loop over the parameters, so that each of them is corrected with another number. Each needs a count of its own, in its state, where state_dict finds it.",
)
class AdamW__counts_parameters_on_the_instance(_Decoupled):
    t = 0
    age = Adam__counts_parameters_on_the_instance.age


@misconception(
    "AdamW",
    "The counter is a tensor in the dtype of the parameter. In bfloat16 it stops at 256, and with it the corrections. Count with an int.",
)
class AdamW__counter_rounds(_Decoupled):
    memory = Adam__counter_rounds.memory
    age = Adam__counter_rounds.age


@misconception(
    "AdamW",
    "The means are used as they are, without the correction for their start at 0. With the default betas the first step is 3.16 times too long.",
)
class AdamW__no_correction(_Decoupled):
    move = Adam__no_correction.move


@misconception(
    "AdamW",
    "eps went under the root, where it is as large as its own square root. It is added to the root.",
)
class AdamW__eps_under_the_root(_Decoupled):
    root = Adam__eps_under_the_root.root


@misconception(
    "AdamW",
    "The numbers are right, but more tensors as large as the parameter are alive at once than are needed. Work in place on what nobody needs any more.",
)
class AdamW__many_copies(_Decoupled):
    move = Adam__many_copies.move


# param_groups


def _embedded(model):
    found = set()
    for module in model.modules():
        if any("Embedding" in kind.__name__ for kind in type(module).__mro__):
            found.update(id(p) for p in module.parameters(recurse=False))
    return found


def _split(params, decays, weight_decay):
    decayed, kept = [], []
    for p in params:
        (decayed if decays(p) else kept).append(p)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def _trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


@misconception(
    "param_groups",
    "Everything decays, norms and biases too. Pulling a scale of a norm towards 0 switches a layer off; it holds nothing that could overfit.",
)
def param_groups__all_decay(model, weight_decay):
    embedded = _embedded(model)
    return _split(_trainable(model), lambda p: id(p) not in embedded, weight_decay)


@misconception(
    "param_groups",
    "The tables of embeddings decay. A row is touched only when its token comes, but it would decay at every step: rare words would fade.",
)
def param_groups__embeddings_decay(model, weight_decay):
    return _split(_trainable(model), lambda p: p.ndim >= 2, weight_decay)


@misconception(
    "param_groups",
    "The two groups have changed places: vectors decay, and matrices do not.",
)
def param_groups__swapped(model, weight_decay):
    embedded = _embedded(model)
    return _split(_trainable(model), lambda p: p.ndim < 2 or id(p) in embedded, weight_decay)


@misconception(
    "param_groups",
    "The second group has the same weight_decay as the first. Two groups with the same settings are one.",
)
def param_groups__decay_in_both(model, weight_decay):
    return [{**group, "weight_decay": weight_decay} for group in right.param_groups(model, weight_decay)]


@misconception(
    "param_groups",
    "Frozen parameters were handed to the optimizer. As long as they have no gradient nothing happens to them; once they get one by accident, they move.",
)
def param_groups__frozen_too(model, weight_decay):
    embedded = _embedded(model)
    return _split(model.parameters(), lambda p: p.ndim >= 2 and id(p) not in embedded, weight_decay)


@misconception(
    "param_groups",
    "A parameter that two modules share is in the list twice, since you went from module to module. It would be updated twice in each step.",
)
def param_groups__shared_twice(model, weight_decay):
    embedded = _embedded(model)
    params = [p for _, p in model.named_parameters(remove_duplicate=False) if p.requires_grad]
    return _split(params, lambda p: p.ndim >= 2 and id(p) not in embedded, weight_decay)


@misconception(
    "param_groups",
    "Only parameters whose name ends in bias are spared. The scale of a norm is called weight, and it decays here. Look at what a parameter is, not at what it is called.",
)
def param_groups__by_the_name_bias(model, weight_decay):
    embedded = _embedded(model)
    spared = {id(p) for name, p in model.named_parameters() if name.endswith("bias")}
    return _split(_trainable(model), lambda p: id(p) not in spared and id(p) not in embedded, weight_decay)


@misconception(
    "param_groups",
    "An embedding is recognized by the name of its attribute. What the attribute is called says nothing: a Linear can be called embedding, and an embedding can be called table. Ask for the class of the module.",
)
def param_groups__by_the_name_of_the_attribute(model, weight_decay):
    named = {id(p) for name, p in model.named_parameters() if "emb" in name}
    return _split(_trainable(model), lambda p: p.ndim >= 2 and id(p) not in named, weight_decay)


@misconception(
    "param_groups",
    "Only nn.Embedding counts as an embedding here. EmbeddingBag and tables of your own are embeddings as well.",
)
def param_groups__torchs_embedding_only(model, weight_decay):
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return _split(_trainable(model), lambda p: p.ndim >= 2 and id(p) not in embedded, weight_decay)


@misconception(
    "param_groups",
    "Embeddings are found by the name of their own class alone, so a subclass with another name is missed. What a class inherits from counts, too.",
)
def param_groups__own_class_name_only(model, weight_decay):
    embedded = {id(p) for m in model.modules() if "Embedding" in type(m).__name__ for p in m.parameters(recurse=False)}
    return _split(_trainable(model), lambda p: p.ndim >= 2 and id(p) not in embedded, weight_decay)


@misconception(
    "param_groups",
    "All that lies anywhere below an embedding is spared, a linear layer inside it as well. parameters() goes down the whole tree; only what the module holds itself belongs to it.",
)
def param_groups__all_below_an_embedding(model, weight_decay):
    embedded = set()
    for module in model.modules():
        if any("Embedding" in kind.__name__ for kind in type(module).__mro__):
            embedded.update(id(p) for p in module.parameters())
    return _split(_trainable(model), lambda p: p.ndim >= 2 and id(p) not in embedded, weight_decay)


@misconception(
    "param_groups",
    "A matrix that a head shares with an embedding was judged by whoever came first in the model. It is an embedding in either order: find all embeddings first, then sort.",
)
def param_groups__first_owner_decides(model, weight_decay):
    owners = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            owners.setdefault(id(p), module)

    def decays(p):
        return p.ndim >= 2 and not any("Embedding" in kind.__name__ for kind in type(owners[id(p)]).__mro__)

    return _split(_trainable(model), decays, weight_decay)


@misconception(
    "param_groups",
    "A matrix that a head shares with an embedding decays, since the head is a linear layer and linear layers decay. What it is as an embedding comes first.",
)
def param_groups__any_layer_decides(model, weight_decay):
    layers = {
        id(p)
        for m in model.modules()
        if not any("Embedding" in kind.__name__ for kind in type(m).__mro__)
        for p in m.parameters(recurse=False)
    }
    return _split(_trainable(model), lambda p: p.ndim >= 2 and id(p) in layers, weight_decay)


@misconception(
    "param_groups",
    "Only parameters with exactly two dimensions decay. The filters of a convolution have three or four and are weights like any other.",
)
def param_groups__two_dimensions_only(model, weight_decay):
    embedded = _embedded(model)
    return _split(_trainable(model), lambda p: p.ndim == 2 and id(p) not in embedded, weight_decay)


@misconception(
    "param_groups",
    "The parameters that do not decay are in no group at all, so no optimizer ever moves them. Not to decay is a setting, not an absence.",
)
def param_groups__only_the_decayed(model, weight_decay):
    return right.param_groups(model, weight_decay)[:1]


@misconception(
    "param_groups",
    "Only linear layers and convolutions are asked for their weights. A matrix that hangs directly in a module of your own decays as well; ask the parameters and not the layers.",
)
def param_groups__known_layers_only(model, weight_decay):
    known = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d))} - _embedded(
        model
    )
    return _split(_trainable(model), lambda p: id(p) in known, weight_decay)


# ForeachAdamW


class _Foreach(right.ForeachAdamW):
    pass


@misconception(
    "ForeachAdamW",
    "The numbers are right, but this is the loop: a hundred tensors cost a hundred times the operations of one. There are functions that take a whole list of tensors.",
)
class ForeachAdamW__loop(right.AdamW):
    pass


def _moments(state, p):
    if not state:
        state.update(step=0, m=torch.zeros_like(p), v=torch.zeros_like(p))
    state["step"] += 1
    return state


class _Together(_Foreach):
    """The update of a whole list, but for what subclasses change."""

    def _update(self, params, group):
        lr, (beta1, beta2) = group["lr"], group["betas"]
        grads = [p.grad for p in params]
        states = [_moments(self.state[p], p) for p in params]
        ms, vs = [s["m"] for s in states], [s["v"] for s in states]
        ages = self.ages(states)
        self.decay(params, grads, group)
        torch._foreach_lerp_(ms, grads, 1 - beta1)
        torch._foreach_mul_(vs, beta2)
        torch._foreach_addcmul_(vs, grads, grads, 1 - beta2)
        roots = torch._foreach_div(vs, [1 - beta2**t for t in ages])
        torch._foreach_sqrt_(roots)
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_addcdiv_(params, ms, roots, [-lr / (1 - beta1**t) for t in ages])

    def ages(self, states):
        return [s["step"] for s in states]

    def decay(self, params, grads, group):
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])


@misconception(
    "ForeachAdamW",
    "All tensors are corrected with the age of one of them. The lists may be worked on together, but every parameter has its own number of updates: the factors are a list, too.",
)
class ForeachAdamW__age_of_the_first(_Together):
    def ages(self, states):
        return [states[0]["step"]] * len(states)


@misconception(
    "ForeachAdamW",
    "One counter serves the whole optimizer: it counts calls of step, not updates, and whoever comes late gets a first step that is far off. The factors are a list with the number of updates of each parameter, which lies in its state.",
)
class ForeachAdamW__one_counter_on_the_instance(_Together):
    t = 0

    @torch.no_grad()
    def step(self, closure=None):
        self.t += 1
        return super().step(closure)

    def ages(self, states):
        return [self.t] * len(states)


@misconception(
    "ForeachAdamW",
    "The decay has gone into the gradients, as in Adam with an L2 penalty, and is divided by the root with them. It acts on the weights themselves.",
)
class ForeachAdamW__l2(_Together):
    def decay(self, params, grads, group):
        grads[:] = torch._foreach_add(grads, params, alpha=group["weight_decay"])


@misconception(
    "ForeachAdamW",
    "The decay is applied to the whole group, also to those that have no gradient in this step. Choose first who takes part, then do everything with this list.",
)
class ForeachAdamW__decays_everybody(_Together):
    def decay(self, params, grads, group):
        torch._foreach_mul_(group["params"], 1 - group["lr"] * group["weight_decay"])


@misconception(
    "ForeachAdamW",
    "A group in which nobody has a gradient makes the step fall over: the functions on lists refuse an empty one.",
)
class ForeachAdamW__empty_list(_Together):
    @torch.no_grad()
    def step(self, closure=None):
        loss = right._loss(closure)
        for group in self.param_groups:
            self._update([p for p in group["params"] if p.grad is not None], group)
        return loss


@misconception(
    "ForeachAdamW",
    "The decay comes after the step, and so it takes a part of the step away again. Decay first.",
)
class ForeachAdamW__decay_after_the_step(_Together):
    def _update(self, params, group):
        super()._update(params, {**group, "weight_decay": 0.0})
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
