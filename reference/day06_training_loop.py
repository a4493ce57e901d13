"""Day 06: the training loop. Four steps in one order, averages that weigh by size, and what to keep of a run.

Clipping is the scaling of the whole gradient of Pascanu et al. 2013 (arXiv:1211.5063), section 3.2, algorithm 1.
Accumulation divides by the size of the whole batch, as remark 3 in section 3 of Goyal et al. 2017
(arXiv:1706.02677) asks of workers. The moving average of weights is the one of Tarvainen and Valpola 2017
(arXiv:1703.01780), equation 1.

A batch is a tuple or list (*inputs, target): the model is called with the inputs, and `loss_fn(output, target)`
returns the mean loss of the batch.
"""

import copy
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from reference.day05_nn_module_basics import trainable_groups

Batch = Sequence[Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


def weighted_mean(values: Sequence[float], counts: Sequence[int]) -> float:
    """Mean of all things whose groups have the means `values` and the sizes `counts`; empty groups do not matter."""
    if len(values) != len(counts):
        raise ValueError(f"there are {len(values)} values for {len(counts)} counts")
    total = sum(counts)
    if total == 0:
        raise ValueError("there is nothing to average: the counts sum up to 0")
    return sum(values[i] * count for i, count in enumerate(counts) if count) / total


def clip_grad_norm_(params: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients by one factor so that their joint norm is at most `max_norm`; the norm from before."""
    grads = [p.grad for p in params if p.grad is not None]
    if not grads:
        return torch.zeros(())
    norms = [torch.linalg.vector_norm(g if g.dtype == torch.float64 else g.float()) for g in grads]
    total = torch.linalg.vector_norm(torch.stack(norms))
    if total > max_norm:
        for grad in grads:
            grad.mul_(max_norm / total)
    return total


def train_step(
    model: nn.Module, batch: Batch, loss_fn: Loss, optimizer: Optimizer, *, max_norm: float | None = None
) -> float:
    """Clear, forward, backward, step: one update of the model from one batch; the loss from before it."""
    model.train()
    optimizer.zero_grad()
    *inputs, target = batch
    loss = loss_fn(model(*inputs), target)
    loss.backward()
    if max_norm is not None:
        clip_grad_norm_(trainable_groups(model), max_norm)
    optimizer.step()
    return loss.item()


def evaluate(
    model: nn.Module, loader: Iterable[Batch], loss_fn: Callable[[Tensor, Tensor], Tensor | dict[str, Tensor]]
) -> dict[str, float]:
    """Means over all examples of the loader, measured in eval mode and without a graph."""
    modes = [(module, module.training) for module in model.modules()]
    means, counts = defaultdict(list), []
    model.eval()
    try:
        with torch.no_grad():
            for *inputs, target in loader:
                found = loss_fn(model(*inputs), target)
                for name, mean in (found if isinstance(found, dict) else {"loss": found}).items():
                    means[name].append(mean.item())
                counts.append(len(target))
    finally:
        for module, training in modes:
            module.training = training
    if not counts:
        raise ValueError("the loader has no batch")
    return {name: weighted_mean(values, counts) for name, values in means.items()}


def train_step_accum(
    model: nn.Module, micro_batches: Sequence[tuple[Batch, int]], loss_fn: Loss, optimizer: Optimizer
) -> float:
    """One update from several micro-batches, one after the other: the update of their concatenation."""
    total = sum(count for _, count in micro_batches)
    if total == 0:
        raise ValueError("there is nothing to learn from: the counts sum up to 0")
    model.train()
    optimizer.zero_grad()
    mean = 0.0
    for (*inputs, target), count in micro_batches:
        if count == 0:
            continue  # the mean of nothing is NaN
        loss = loss_fn(model(*inputs), target) * (count / total)
        loss.backward()
        mean += loss.item()
    optimizer.step()
    return mean


@dataclass
class History:
    """What a run of `fit` measured: one entry per epoch, and the epoch (from 0) whose weights were kept."""

    train_loss: list[float] = field(default_factory=list)
    val_loss: list[float] = field(default_factory=list)
    best_epoch: int = -1


def fit(
    model: nn.Module, train_loader: Iterable[Batch], val_loader: Iterable[Batch], loss_fn: Loss, optimizer: Optimizer,
    *, epochs: int, scheduler: LRScheduler | None = None, patience: int | None = None,
) -> History:  # fmt: skip
    """Train for some epochs, validate after each, stop when it no longer helps, and keep the best weights."""
    history = History()
    best, best_state = math.inf, copy.deepcopy(model.state_dict())
    for epoch in range(epochs):
        losses, counts = [], []
        for batch in train_loader:
            losses.append(train_step(model, batch, loss_fn, optimizer))
            counts.append(len(batch[-1]))
        if scheduler is not None:
            scheduler.step()
        val_loss = evaluate(model, val_loader, loss_fn)["loss"]
        history.train_loss.append(weighted_mean(losses, counts))
        history.val_loss.append(val_loss)
        if val_loss < best:
            best, best_state = val_loss, copy.deepcopy(model.state_dict())
            history.best_epoch = epoch
        elif patience is not None and epoch - history.best_epoch >= patience:
            break
    model.load_state_dict(best_state)
    return history


class EMA:
    """A moving average of a model's weights: average = decay * average + (1 - decay) * weight at each update."""

    def __init__(self, model: nn.Module, decay: float):
        if not 0 <= decay <= 1:
            raise ValueError(f"decay ({decay}) must lie between 0 and 1")
        self.model, self.decay = model, decay
        self.average = self._copied()

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the weights of now; buffers are taken over as they are."""
        for name, parameter in self.model.named_parameters():
            self.average[name].lerp_(parameter, 1 - self.decay)
        for name, buffer in self.model.named_buffers():
            self.average[name].copy_(buffer)

    @contextmanager
    def swap(self) -> Iterator[None]:
        """Put the averages into the model for the length of a `with` block."""
        trained = self._copied()
        self._write(self.average)
        try:
            yield
        finally:
            self._write(trained)

    def _tensors(self) -> dict[str, Tensor]:
        return {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}

    @torch.no_grad()
    def _copied(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self._tensors().items()}

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        for name, tensor in self._tensors().items():
            tensor.copy_(values[name])


def save_checkpoint(
    path: str | Path, model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler, step: int, generator: torch.Generator
) -> None:  # fmt: skip
    """Write everything that the next step depends on to a file, beside it first and then into its place."""
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "step": step,
        "generator": generator.get_state(),
        "global_rng": torch.get_rng_state(),
    }
    unfinished = f"{path}.unfinished"
    torch.save(state, unfinished)
    os.replace(unfinished, path)


def load_checkpoint(
    path: str | Path,
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    generator: torch.Generator,
) -> int:
    """Bring fresh objects, and torch's global random state, to where `save_checkpoint` was called; the step."""
    state: dict[str, Any] = torch.load(path)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    generator.set_state(state["generator"])
    torch.set_rng_state(state["global_rng"])
    return state["step"]
