import copy
import math
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

from checker.testing import alternative
from reference.day06_training_loop import History

# Round 1: the same steps in other words


@alternative("weighted_mean")
def weighted_mean(values, counts):
    if len(values) != len(counts):
        raise ValueError(f"len(values) = {len(values)}, len(counts) = {len(counts)}")
    kept = [(v, n) for v, n in zip(values, counts, strict=True) if n > 0]
    if not kept:
        raise ValueError("empty")
    return float(np.average([v for v, _ in kept], weights=[n for _, n in kept]))


@alternative("clip_grad_norm_")
def clip_grad_norm_(params, max_norm):
    params = [p for p in params if p.grad is not None]
    squares = [p.grad.detach().to(torch.promote_types(p.grad.dtype, torch.float32)).square().sum() for p in params]
    norm = torch.as_tensor(sum(squares)).sqrt()
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    for p in params:
        p.grad.mul_(factor.to(p.grad.device))
    return norm


@alternative("train_step")
def train_step(model, batch, loss_fn, optimizer, *, max_norm=None):
    for p in model.parameters():
        p.grad = None
    model.train(True)
    loss = loss_fn(model(*batch[:-1]), batch[-1])
    value = float(loss.detach())
    loss.backward()
    if max_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
    optimizer.zero_grad()
    return value


@alternative("evaluate")
@torch.no_grad()
def evaluate(model, loader, loss_fn):
    training = {module: module.training for module in model.modules()}
    for module in training:
        module.eval()
    totals, n = {}, 0
    try:
        for batch in loader:
            losses = loss_fn(model(*batch[:-1]), batch[-1])
            if isinstance(losses, torch.Tensor):
                losses = {"loss": losses}
            rows = batch[-1].shape[0]
            for key, loss in losses.items():
                totals[key] = totals.get(key, 0.0) + float(loss) * rows
            n += rows
    finally:
        for module, mode in training.items():
            module.train(mode)  # parents come before their children
    if n == 0:
        raise ValueError("evaluate needs at least one batch")
    return {key: total / n for key, total in totals.items()}


@alternative("train_step_accum")
def train_step_accum(model, micro_batches, loss_fn, optimizer):
    micro_batches = [(batch, count) for batch, count in micro_batches if count]
    if not micro_batches:
        raise ValueError("no counts")
    optimizer.zero_grad()
    model.train()
    total, mean = 0, 0.0
    for batch, count in micro_batches:
        loss = loss_fn(model(*batch[:-1]), batch[-1])
        (loss * count).backward()
        mean += loss.item() * count
        total += count
    for p in model.parameters():
        if p.grad is not None:
            p.grad.div_(total)
    optimizer.step()
    return mean / total


@alternative("fit")
def fit(model, train_loader, val_loader, loss_fn, optimizer, *, epochs, scheduler=None, patience=None):
    history, wait = History(), 0
    best_loss = float("inf")
    best = {k: v.clone() for k, v in model.state_dict().items()}
    for epoch in range(epochs):
        total, rows = 0.0, 0
        for batch in train_loader:
            total += train_step(model, batch, loss_fn, optimizer) * len(batch[-1])
            rows += len(batch[-1])
        history.train_loss.append(total / rows)
        val = evaluate(model, val_loader, loss_fn)["loss"]
        history.val_loss.append(val)
        if scheduler is not None:
            scheduler.step()
        if val < best_loss:
            best_loss, wait = val, 0
            best = {k: v.clone() for k, v in model.state_dict().items()}
            history.best_epoch = epoch
        else:
            wait += 1
        if patience is not None and wait >= patience:
            break
    model.load_state_dict(best)
    return history


@alternative("EMA")
class EMA:
    def __init__(self, model, decay):
        if decay < 0 or decay > 1:
            raise ValueError("decay must be in [0, 1]")
        self.live, self.decay = model, decay
        self.shadow = copy.deepcopy(model)

    @torch.no_grad()
    def update(self):
        for mine, theirs in zip(self.shadow.parameters(), self.live.parameters(), strict=True):
            mine.mul_(self.decay).add_(theirs, alpha=1 - self.decay)
        for mine, theirs in zip(self.shadow.buffers(), self.live.buffers(), strict=True):
            mine.copy_(theirs)

    def swap(self):
        return _Swap(self.live, self.shadow)


class _Swap:
    def __init__(self, model, shadow):
        self.model, self.shadow = model, shadow

    def __enter__(self):
        self.kept = copy.deepcopy(self.model.state_dict())
        self.model.load_state_dict(self.shadow.state_dict())

    def __exit__(self, *_):
        self.model.load_state_dict(self.kept)


@alternative("save_checkpoint")
def save_checkpoint(path, model, optimizer, scheduler, step, generator):
    path = Path(path)
    states = [thing.state_dict() for thing in (model, optimizer, scheduler)]
    fd, name = tempfile.mkstemp(dir=path.parent)
    os.close(fd)
    try:
        torch.save((states, int(step), generator.get_state(), torch.random.get_rng_state()), name)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@alternative("load_checkpoint")
def load_checkpoint(path, model, optimizer, scheduler, generator):
    states, step, shuffling, everything = torch.load(path, map_location="cpu", weights_only=True)
    for thing, state in zip((model, optimizer, scheduler), states, strict=True):
        thing.load_state_dict(state)
    generator.set_state(shuffling)
    torch.random.set_rng_state(everything)
    return step


# Round 2: other orders of operation


@alternative("clip_grad_norm_")
def clip_by_flat_vector(params, max_norm):
    grads = [p.grad for p in list(params) if p.grad is not None]
    flat = torch.cat(
        [g.reshape(-1).float() if g.element_size() == 2 else g.reshape(-1) for g in grads] or [torch.zeros(0)]
    )
    norm = flat.norm()
    if norm > max_norm:
        torch._foreach_mul_(grads, float(max_norm / norm))
    return norm


@alternative("train_step_accum")
def accum_with_sums_known_first(model, micro_batches, loss_fn, optimizer):
    counts = [count for _, count in micro_batches]
    if not any(counts):
        raise ValueError("nothing to learn from")
    model.train()
    sums = [torch.zeros_like(p) for p in model.parameters()]
    means = []
    for (*inputs, target), count in micro_batches:
        if not count:
            means.append(0.0)
            continue
        loss = loss_fn(model(*inputs), target)
        for total, grad in zip(sums, torch.autograd.grad(loss, list(model.parameters())), strict=True):
            total.add_(grad, alpha=count / sum(counts))
        means.append(loss.item())
    for p, total in zip(model.parameters(), sums, strict=True):
        p.grad = total
    optimizer.step()
    return math.fsum(m * c for m, c in zip(means, counts, strict=True)) / sum(counts)


@alternative("EMA")
class EMAByData:
    def __init__(self, model, decay):
        if not 0.0 <= decay <= 1.0:
            raise ValueError(decay)
        self.model, self.decay = model, decay
        self.params = [p.detach().clone() for p in model.parameters()]
        self.buffers = [b.detach().clone() for b in model.buffers()]

    def update(self):
        for average, p in zip(self.params, self.model.parameters(), strict=True):
            average.copy_(self.decay * average + (1 - self.decay) * p.detach())
        for copied, b in zip(self.buffers, self.model.buffers(), strict=True):
            copied.copy_(b)

    def swap(self):
        import contextlib

        @contextlib.contextmanager
        def swapped():
            tensors = [*self.model.parameters(), *self.model.buffers()]
            own = [t.data for t in tensors]
            for t, value in zip(tensors, [*self.params, *self.buffers], strict=True):
                t.data = value.clone()
            try:
                yield self.model
            finally:
                for t, value in zip(tensors, own, strict=True):
                    t.data = value

        return swapped()
