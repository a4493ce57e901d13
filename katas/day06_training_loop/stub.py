"""Day 06: the training loop. Four steps in one order, averages that weigh by size, and what to keep of a run.

A batch is a tuple or list (*inputs, target) of tensors: the model is called with the inputs, and
`loss_fn(output, target)` returns the mean loss of the batch as a scalar tensor. A batch has as many examples
as its target has rows.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from day05_nn_module_basics import trainable_groups
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

Batch = Sequence[Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


def weighted_mean(values: Sequence[float], counts: Sequence[int]) -> float:
    """The mean of all things, given the means of groups of them and how many are in each group.

    `values[i]` is the mean of group i and `counts[i]` its size, so [1.0, 4.0] with [3, 1] gives 1.75. A group
    of size 0 has no influence, whatever its value, NaN included. Returns a float.

    Lists of different lengths raise ValueError with both lengths in the message. Counts that sum up to 0, and
    empty lists, raise ValueError.
    """
    raise NotImplementedError


def clip_grad_norm_(params: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Limit the norm of the gradient of all parameters together; return what the norm was before.

    The norm is the Euclidean one of all gradients seen as a single long vector. Where it is larger than
    `max_norm`, every gradient is multiplied by the same factor max_norm / norm (to within a relative 1e-5),
    in place: the `.grad` tensors stay the same objects. Where it is smaller, no bit changes. A gradient that
    is all zeros stays so.

    `params` is any iterable, a generator too. Parameters whose `.grad` is None are left out, and stay at
    None. The parameters themselves do not change. The norm is returned as a 0-d tensor, 0 where there is no
    gradient at all. Gradients keep their dtype; the norm of half precision gradients is computed and returned
    in float32, so that it does not overflow.
    """
    raise NotImplementedError


def train_step(
    model: nn.Module, batch: Batch, loss_fn: Loss, optimizer: Optimizer, *, max_norm: float | None = None
) -> float:
    """Make one update of the model from one batch; return the loss that the batch had before the update.

    The model is put into train mode, all submodules included, and is called once, like a function. The
    optimizer steps once, with the gradient of this batch alone: what was in `.grad` before has no influence.
    If `max_norm` is a number (0 is one), the norm of the whole gradient is limited to it before the update.

    The loss is returned as a Python float; neither it nor the output of the model is kept alive.
    """
    raise NotImplementedError


def evaluate(
    model: nn.Module, loader: Iterable[Batch], loss_fn: Callable[[Tensor, Tensor], Tensor | dict[str, Tensor]]
) -> dict[str, float]:
    """Means over all examples of a loader, under the key "loss".

    Every example counts the same, also where batches have different sizes. `loss_fn` may return a dict of
    scalar tensors instead, each the mean of the batch: then the result has the same keys. All results are
    Python floats. The loader is gone through once, so that a generator will do; one without batches raises
    ValueError.

    The model is measured in eval mode, all submodules included, and without recording a graph: nothing is
    saved for a backward pass. Afterwards, also when the model or `loss_fn` raises (the exception is passed
    on), each submodule is in the mode in which it was before. Weights, buffers and `.grad` do not change.
    """
    raise NotImplementedError


def train_step_accum(
    model: nn.Module, micro_batches: Sequence[tuple[Batch, int]], loss_fn: Loss, optimizer: Optimizer
) -> float:
    """Make one update from several micro-batches, as if they had come as one big batch.

    `micro_batches` is a list of pairs (batch, count): `count` is how many things the mean of `loss_fn` is over
    in this batch. That need not be its number of rows: where padding is ignored it is the number of tokens
    that are left. The update and the returned float, the mean loss before the update, are those of one step
    on the concatenation, where the mean is over sum(count) things. A micro-batch with count 0 has no
    influence, although the mean of its loss is NaN.

    The model is in train mode, the optimizer steps once, and what was in `.grad` before has no influence.
    The graph of each micro-batch is gone before the next is computed: the peak of memory is at most that of
    forward and backward of the largest micro-batch, plus two more copies of the gradients and 4 kB. Counts
    that sum up to 0 raise ValueError, and then nothing has changed.
    """
    raise NotImplementedError


@dataclass
class History:
    """What a run of `fit` measured. Complete as it stands.

    One loss per epoch that was run, and the number (from 0) of the epoch whose weights were kept.
    """

    train_loss: list[float] = field(default_factory=list)
    val_loss: list[float] = field(default_factory=list)
    best_epoch: int = -1


def fit(
    model: nn.Module, train_loader: Iterable[Batch], val_loader: Iterable[Batch], loss_fn: Loss, optimizer: Optimizer,
    *, epochs: int, scheduler: LRScheduler | None = None, patience: int | None = None,
) -> History:  # fmt: skip
    """Train the model, epoch by epoch, and leave it with the weights of its best epoch.

    An epoch makes one train_step per batch of `train_loader`, in its order, then one evaluation on
    `val_loader`; each loader is gone through once per epoch. `train_loss` gets the mean over the epoch's
    examples of the losses that the steps returned, `val_loss` the validation loss.

    The best epoch is the first with the lowest validation loss: an equal loss is no improvement, nor is NaN.
    At the end, also at an early one, the model holds parameters and buffers exactly as they were after that
    epoch. If no epoch has a loss below infinity, the model holds what it came with, and `best_epoch` is -1.

    With `patience`, training stops after that many epochs in a row which did not improve on the best.
    `scheduler.step()` is called once per epoch, after the epoch's updates, also in the last epoch: the first
    epoch trains with the learning rate that the optimizer came with.
    """
    raise NotImplementedError


class EMA:
    """A moving average of a model's weights: average = decay * average + (1 - decay) * weight.

    The averages start as copies of the parameters that the model has when the EMA is made. Buffers are not
    averaged: the average holds them as they were at the last `update`. Tied parameters count as one. A decay
    below 0 or above 1 raises ValueError.
    """

    def __init__(self, model: nn.Module, decay: float):
        raise NotImplementedError

    def update(self) -> None:
        """Take one step of the average towards the weights of now.

        The model does not change, no graph is recorded, and later changes of the model do not reach the
        average before the next update.
        """
        raise NotImplementedError

    @contextmanager
    def swap(self) -> Iterator[None]:
        """`with ema.swap():` the model holds the averages inside the block, and its own weights after it.

        Its own weights and buffers are back bit by bit at the end of the block, also when the block raises
        (the exception is passed on). What the block writes into the model is dropped, and does not reach the
        average. The Parameter objects are the same inside and after, so that an optimizer goes on with them;
        gradients can be computed inside, and `.grad` is left alone.
        """
        raise NotImplementedError


def save_checkpoint(
    path: str | Path, model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler, step: int, generator: torch.Generator
) -> None:  # fmt: skip
    """Write to the file `path` all that the next training step depends on, for a model on the CPU.

    That is what model, optimizer and scheduler hold, the number `step`, the state of `generator` (which
    shuffles the data) and torch's global random state on the CPU (from which dropout draws). None of these
    changes. The file can be read by `torch.load` with `weights_only=True`. If something cannot be saved, the
    exception is passed on, and a checkpoint that was at `path` before is still there, whole.
    """
    raise NotImplementedError


def load_checkpoint(
    path: str | Path,
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    generator: torch.Generator,
) -> int:
    """Read what `save_checkpoint` wrote into fresh objects; return the number `step`.

    Afterwards training goes on bit for bit as if it had never stopped, with dropout and shuffling, also in
    another process. `model`, `optimizer`, `scheduler` and `generator` are changed in place, torch's global
    random state is set (this function exists to do so), and the file stays as it is.
    """
    raise NotImplementedError
