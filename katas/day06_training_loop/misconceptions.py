import copy
import math
import os
from collections import defaultdict
from contextlib import contextmanager

import torch

from checker.testing import misconception
from reference.day06_training_loop import History, clip_grad_norm_, evaluate, train_step, weighted_mean

# weighted_mean


@misconception(
    "weighted_mean",
    "A group of one counts here as much as a group of thirty: this is the mean of the means. Each thing should count once, so each mean has to weigh as many times as there are things behind it.",
)
def weighted_mean__mean_of_means(values, counts):
    if len(values) != len(counts):
        raise ValueError(f"{len(values)} values, {len(counts)} counts")
    if sum(counts) == 0:
        raise ValueError("nothing to average")
    kept = [value for value, count in zip(values, counts, strict=True) if count]
    return sum(kept) / len(kept)


@misconception(
    "weighted_mean",
    "The values are weighted, and then the sum is divided by the number of groups. What was added up are things, so their number belongs below the line.",
)
def weighted_mean__over_groups(values, counts):
    if len(values) != len(counts):
        raise ValueError(f"{len(values)} values, {len(counts)} counts")
    if sum(counts) == 0:
        raise ValueError("nothing to average")
    return sum(value * count for value, count in zip(values, counts, strict=True) if count) / len(values)


@misconception(
    "weighted_mean",
    "The result is NaN although the group that brought the NaN is empty: 0 * NaN is NaN. A weight of zero does not silence a value; such a group has to be left out.",
)
def weighted_mean__nan_times_zero(values, counts):
    if len(values) != len(counts):
        raise ValueError(f"{len(values)} values, {len(counts)} counts")
    if sum(counts) == 0:
        raise ValueError("nothing to average")
    return sum(value * count for value, count in zip(values, counts, strict=True)) / sum(counts)


# clip_grad_norm_


def _grads(params):
    return [p.grad for p in params if p.grad is not None]


def _norm(grads):
    if not grads:
        return torch.zeros(())
    wide = [g if g.dtype == torch.float64 else g.float() for g in grads]
    return torch.cat([g.reshape(-1) for g in wide]).norm()


@misconception(
    "clip_grad_norm_",
    "Each parameter is cut to the limit by its own norm. Long gradients shrink and short ones do not, so the step points somewhere else; the limit is for all of them as one vector, with one factor.",
)
def clip__each_parameter_alone(params, max_norm):
    grads = _grads(params)
    total = _norm(grads)
    for grad in grads:
        norm = _norm([grad])
        if norm > max_norm:
            grad.mul_(max_norm / norm)
    return total


@misconception(
    "clip_grad_norm_",
    "Every number is cut to the range from -max_norm to max_norm. That is clipping by value: it bends the direction, and the norm of what is left can still be far above the limit.",
)
def clip__by_value(params, max_norm):
    grads = _grads(params)
    total = _norm(grads)
    for grad in grads:
        grad.clamp_(-max_norm, max_norm)
    return total


@misconception(
    "clip_grad_norm_",
    "A gradient that was short enough has been stretched to the limit. The limit works in one direction only: below it nothing may change, and a gradient of zeros has no length to divide by.",
)
def clip__always_scaled(params, max_norm):
    grads = _grads(params)
    total = _norm(grads)
    for grad in grads:
        grad.mul_(max_norm / total)
    return total


@misconception(
    "clip_grad_norm_",
    "The number that came back is the norm after clipping, which is the limit itself and tells nothing. The one worth logging is the norm from before.",
)
def clip__norm_after(params, max_norm):
    grads = _grads(params)
    total = _norm(grads)
    if total > max_norm:
        for grad in grads:
            grad.mul_(max_norm / total)
    return _norm(grads)


@misconception(
    "clip_grad_norm_",
    "The norms of the single gradients are added up. Lengths at right angles do not add: the squares do, and the root comes last.",
)
def clip__norms_added(params, max_norm):
    grads = _grads(params)
    total = sum((_norm([g]) for g in grads), torch.zeros(()))
    if total > max_norm:
        for grad in grads:
            grad.mul_(max_norm / total)
    return total


@misconception(
    "clip_grad_norm_",
    "This is the sum of the squares: the root is missing. It looks right only where the norm happens to be one.",
)
def clip__squared(params, max_norm):
    grads = _grads(params)
    total = _norm(grads) ** 2
    if total > max_norm:
        for grad in grads:
            grad.mul_(max_norm / total)
    return total


@misconception(
    "clip_grad_norm_",
    "This is the largest number of all gradients and not their length: the maximum norm, where the Euclidean one was asked for.",
)
def clip__largest_number(params, max_norm):
    grads = _grads(params)
    total = torch.stack([g.abs().max() for g in grads]).max() if grads else torch.zeros(())
    if total > max_norm:
        for grad in grads:
            grad.mul_(max_norm / total)
    return total.float() if total.dtype == torch.float16 else total


@misconception(
    "clip_grad_norm_",
    "A list of parameters is clipped and a generator is not: it was used up when the norm was taken, and the second pass over it found nothing. model.parameters() is such a generator.",
)
def clip__generator_used_up(params, max_norm):
    total = _norm(_grads(params))
    if total > max_norm:
        for p in params:
            if p.grad is not None:
                p.grad.mul_(max_norm / total)
    return total


@misconception(
    "clip_grad_norm_",
    "The parameters got new gradient tensors, and the old ones still hold the long gradient. Whoever held on to a .grad (a flat buffer, a hook, another process) does not see the clipping: scale in place.",
)
def clip__new_tensors(params, max_norm):
    params = [p for p in params if p.grad is not None]
    total = _norm([p.grad for p in params])
    if total > max_norm:
        for p in params:
            p.grad = p.grad * (max_norm / total).to(p.grad.dtype)
    return total


@misconception(
    "clip_grad_norm_",
    "The norm of the half precision gradients is inf. Sixteen bits end at 65504: squares of ordinary gradients lie beyond that, so widen the numbers before you square them.",
)
def clip__half_overflow(params, max_norm):
    grads = _grads(params)
    if not grads:
        return torch.zeros(())
    total = sum((g * g).sum() for g in grads).sqrt()
    if total > max_norm:
        for grad in grads:
            grad.mul_(max_norm / total)
    return total.float() if total.dtype == torch.float16 else total


# train_step


def _loss(model, batch, loss_fn):
    *inputs, target = batch
    return loss_fn(model(*inputs), target)


@misconception(
    "train_step",
    "The step used the sum of this batch's gradient and of what lay in .grad from before. backward adds; somebody has to clear.",
)
def train_step__never_cleared(model, batch, loss_fn, optimizer, *, max_norm=None):
    model.train()
    loss = _loss(model, batch, loss_fn)
    loss.backward()
    if max_norm is not None:
        clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
    return loss.item()


@misconception(
    "train_step",
    "The weights have not moved: when the optimizer came to step, there was no gradient any more, or not yet. What backward computed has to survive until the step.",
)
def train_step__cleared_before_the_step(model, batch, loss_fn, optimizer, *, max_norm=None):
    model.train()
    loss = _loss(model, batch, loss_fn)
    loss.backward()
    if max_norm is not None:
        clip_grad_norm_(model.parameters(), max_norm)
    optimizer.zero_grad()
    optimizer.step()
    return loss.item()


@misconception(
    "train_step",
    "What comes back is the loss tensor with its graph: whoever collects these for a plot collects every activation of the run. Hand out the number.",
)
def train_step__returns_the_tensor(model, batch, loss_fn, optimizer, *, max_norm=None):
    model.train()
    optimizer.zero_grad()
    loss = _loss(model, batch, loss_fn)
    loss.backward()
    if max_norm is not None:
        clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
    return loss


@misconception(
    "train_step",
    "The update is as long as it would be without a limit: max_norm came too late. Once the optimizer has stepped, clipping changes only numbers that nobody reads.",
)
def train_step__clipped_after_the_step(model, batch, loss_fn, optimizer, *, max_norm=None):
    model.train()
    optimizer.zero_grad()
    loss = _loss(model, batch, loss_fn)
    loss.backward()
    optimizer.step()
    if max_norm is not None:
        clip_grad_norm_(model.parameters(), max_norm)
    return loss.item()


@misconception(
    "train_step",
    "A limit of 0 was read as no limit. In Python 0.0 is false: ask whether max_norm is None, not whether it is true.",
)
def train_step__zero_is_no_limit(model, batch, loss_fn, optimizer, *, max_norm=None):
    model.train()
    optimizer.zero_grad()
    loss = _loss(model, batch, loss_fn)
    loss.backward()
    if max_norm:
        clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
    return loss.item()


@misconception(
    "train_step",
    "The model was still in eval mode, where the last evaluation may have left it: dropout is off and batch statistics are frozen while it learns.",
)
def train_step__mode_as_found(model, batch, loss_fn, optimizer, *, max_norm=None):
    optimizer.zero_grad()
    loss = _loss(model, batch, loss_fn)
    loss.backward()
    if max_norm is not None:
        clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
    return loss.item()


@misconception(
    "train_step",
    "This is the loss after the update, from a second pass through the model. The step was made from the first loss; the second costs a forward pass and, with dropout, is another number altogether.",
)
def train_step__loss_after(model, batch, loss_fn, optimizer, *, max_norm=None):
    train_step(model, batch, loss_fn, optimizer, max_norm=max_norm)
    return _loss(model, batch, loss_fn).item()


@misconception(
    "train_step",
    "The model was not called: its forward was. Hooks hang on the call, so everything that watches or changes a module through them was passed by.",
)
def train_step__forward_by_name(model, batch, loss_fn, optimizer, *, max_norm=None):
    model.train()
    optimizer.zero_grad()
    *inputs, target = batch
    loss = loss_fn(model.forward(*inputs), target)
    loss.backward()
    if max_norm is not None:
        clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
    return loss.item()


_kept = []


@misconception(
    "train_step",
    "The loss is still alive after the call because something outside holds it, a list perhaps. A loss that is kept keeps its graph; keep loss.item() instead.",
)
def train_step__keeps_the_loss(model, batch, loss_fn, optimizer, *, max_norm=None):
    model.train()
    optimizer.zero_grad()
    loss = _loss(model, batch, loss_fn)
    loss.backward()
    if max_norm is not None:
        clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
    _kept.append(loss)
    return loss.item()


# evaluate


@contextmanager
def _measuring(model):
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _batch_means(model, loader, loss_fn):
    means, counts = defaultdict(list), []
    for *inputs, target in loader:
        found = loss_fn(model(*inputs), target)
        for name, mean in (found if isinstance(found, dict) else {"loss": found}).items():
            means[name].append(mean.item())
        counts.append(len(target))
    if not counts:
        raise ValueError("no batches")
    return means, counts


def _averages(model, loader, loss_fn):
    means, counts = _batch_means(model, loader, loss_fn)
    return {name: weighted_mean(values, counts) for name, values in means.items()}


@misconception(
    "evaluate",
    "The short last batch has as much say as a full one: this is the mean of the batch means. Weigh each batch by its examples.",
)
def evaluate__mean_of_batches(model, loader, loss_fn):
    with _measuring(model):
        means, counts = _batch_means(model, loader, loss_fn)
    return {name: sum(values) / len(values) for name, values in means.items()}


@misconception(
    "evaluate",
    "The losses of the batches are added up and not averaged: the number grows with the data, and two sets of different size cannot be compared.",
)
def evaluate__sum_of_batches(model, loader, loss_fn):
    with _measuring(model):
        means, counts = _batch_means(model, loader, loss_fn)
    return {name: sum(values) for name, values in means.items()}


@misconception(
    "evaluate",
    "This is the loss of the last batch alone: each batch wrote over the one before.",
)
def evaluate__last_batch(model, loader, loss_fn):
    with _measuring(model):
        means, counts = _batch_means(model, loader, loss_fn)
    return {name: values[-1] for name, values in means.items()}


@misconception(
    "evaluate",
    "The model was measured in train mode. Dropout throws dice into the result, and batch norm learns from the data that it is tested on; no_grad changes neither.",
)
def evaluate__in_train_mode(model, loader, loss_fn):
    with torch.no_grad():
        return _averages(model, loader, loss_fn)


@misconception(
    "evaluate",
    "A graph was recorded: memory fills with activations for a backward pass that never comes. eval() does not switch recording off; it changes what dropout and batch norm do, nothing else.",
)
def evaluate__with_a_graph(model, loader, loss_fn):
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        return _averages(model, loader, loss_fn)
    finally:
        for module, training in modes:
            module.training = training


@misconception(
    "evaluate",
    "The model is left in eval mode. If training goes on from here, it does so without dropout and with frozen statistics, and no error will tell.",
)
def evaluate__left_in_eval(model, loader, loss_fn):
    model.eval()
    with torch.no_grad():
        return _averages(model, loader, loss_fn)


@misconception(
    "evaluate",
    "Every module is in train mode now, also what was in eval mode before. A measurement does not know what the model is used for next: it puts back what it found.",
)
def evaluate__always_back_to_train(model, loader, loss_fn):
    model.eval()
    try:
        with torch.no_grad():
            return _averages(model, loader, loss_fn)
    finally:
        model.train()


@misconception(
    "evaluate",
    "The mode of the outermost module was remembered and given to all. A part that somebody had frozen in eval mode has lost its own: each submodule has a flag to itself.",
)
def evaluate__one_mode_for_all(model, loader, loss_fn):
    was = model.training
    model.eval()
    try:
        with torch.no_grad():
            return _averages(model, loader, loss_fn)
    finally:
        model.train(was)


@misconception(
    "evaluate",
    "All is put back as long as nothing goes wrong. When the loss raised, the line that restores the modes was never reached, and the model stayed in eval mode.",
)
def evaluate__not_after_an_exception(model, loader, loss_fn):
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    with torch.no_grad():
        means, counts = defaultdict(list), []
        for *inputs, target in loader:
            found = loss_fn(model(*inputs), target)
            for name, mean in (found if isinstance(found, dict) else {"loss": found}).items():
                means[name].append(mean.item())
            counts.append(len(target))
    for module, training in modes:
        module.training = training
    if not counts:
        raise ValueError("no batches")
    return {name: weighted_mean(values, counts) for name, values in means.items()}


@misconception(
    "evaluate",
    "An empty loader got an answer. Whatever number stands for the mean of nothing, somebody will plot it; say that there was no data.",
)
def evaluate__empty_is_zero(model, loader, loss_fn):
    with _measuring(model):
        try:
            return _averages(model, loader, loss_fn)
        except ValueError:
            return {"loss": 0.0}


# train_step_accum


@misconception(
    "train_step_accum",
    "Each micro-batch weighs the same here, whatever is in it: its mean was divided by the number of micro-batches. (x1/n1 + x2/n2) / 2 is not (x1 + x2) / (n1 + n2). Well-known trainers shipped this.",
)
def accum__over_micro_batches(model, micro_batches, loss_fn, optimizer):
    total = sum(count for _, count in micro_batches)
    if total == 0:
        raise ValueError("nothing")
    kept = [batch for batch, count in micro_batches if count]
    model.train()
    optimizer.zero_grad()
    mean = 0.0
    for batch in kept:
        loss = _loss(model, batch, loss_fn) / len(kept)
        loss.backward()
        mean += loss.item()
    optimizer.step()
    return mean


@misconception(
    "train_step_accum",
    "The gradients of the means are added up and never divided: with k micro-batches the step is about k times too long, as if the learning rate had grown with them.",
)
def accum__sum_of_means(model, micro_batches, loss_fn, optimizer):
    if sum(count for _, count in micro_batches) == 0:
        raise ValueError("nothing")
    model.train()
    optimizer.zero_grad()
    mean = 0.0
    for batch, count in micro_batches:
        if count:
            loss = _loss(model, batch, loss_fn)
            loss.backward()
            mean += loss.item()
    optimizer.step()
    return mean


@misconception(
    "train_step_accum",
    "The loss is a mean already, and the means are divided by the whole count without having been turned back into sums: the step is far too short.",
)
def accum__divided_twice(model, micro_batches, loss_fn, optimizer):
    total = sum(count for _, count in micro_batches)
    if total == 0:
        raise ValueError("nothing")
    model.train()
    optimizer.zero_grad()
    mean = 0.0
    for batch, count in micro_batches:
        if count:
            loss = _loss(model, batch, loss_fn) / total
            loss.backward()
            mean += loss.item()
    optimizer.step()
    return mean


@misconception(
    "train_step_accum",
    "The micro-batches are weighted by their rows. The mean of this loss is over what the given count says, tokens that are not padding for instance: that count is the weight.",
)
def accum__rows_as_weights(model, micro_batches, loss_fn, optimizer):
    if sum(count for _, count in micro_batches) == 0:
        raise ValueError("nothing")
    kept = [batch for batch, count in micro_batches if count]
    total = sum(len(batch[-1]) for batch in kept)
    model.train()
    optimizer.zero_grad()
    mean = 0.0
    for batch in kept:
        loss = _loss(model, batch, loss_fn) * len(batch[-1]) / total
        loss.backward()
        mean += loss.item()
    optimizer.step()
    return mean


@misconception(
    "train_step_accum",
    "The optimizer stepped for every micro-batch: these are several small updates, each computed at other weights, and not one large one.",
)
def accum__steps_each_time(model, micro_batches, loss_fn, optimizer):
    total = sum(count for _, count in micro_batches)
    if total == 0:
        raise ValueError("nothing")
    model.train()
    mean = 0.0
    for batch, count in micro_batches:
        if count:
            optimizer.zero_grad()
            loss = _loss(model, batch, loss_fn) * count / total
            loss.backward()
            optimizer.step()
            mean += loss.item()
    return mean


@misconception(
    "train_step_accum",
    "Only the last micro-batch is in this step: the gradients of the others were cleared on the way. Adding up is what .grad does by itself, if it is left alone in the loop.",
)
def accum__cleared_in_the_loop(model, micro_batches, loss_fn, optimizer):
    total = sum(count for _, count in micro_batches)
    if total == 0:
        raise ValueError("nothing")
    model.train()
    mean = 0.0
    for batch, count in micro_batches:
        if count:
            optimizer.zero_grad()
            loss = _loss(model, batch, loss_fn) * count / total
            loss.backward()
            mean += loss.item()
    optimizer.step()
    return mean


@misconception(
    "train_step_accum",
    "What lay in .grad before the call is part of this step. Accumulating within a step is the point; accumulating across steps is not.",
)
def accum__never_cleared(model, micro_batches, loss_fn, optimizer):
    total = sum(count for _, count in micro_batches)
    if total == 0:
        raise ValueError("nothing")
    model.train()
    mean = 0.0
    for batch, count in micro_batches:
        if count:
            loss = _loss(model, batch, loss_fn) * count / total
            loss.backward()
            mean += loss.item()
    optimizer.step()
    return mean


@misconception(
    "train_step_accum",
    "The update is right, and the memory is that of the big batch: all graphs were alive together until the one backward at the end. Accumulation saves memory only if each graph goes before the next comes.",
)
def accum__one_backward_at_the_end(model, micro_batches, loss_fn, optimizer):
    total = sum(count for _, count in micro_batches)
    if total == 0:
        raise ValueError("nothing")
    model.train()
    optimizer.zero_grad()
    loss = sum(_loss(model, batch, loss_fn) * count / total for batch, count in micro_batches if count)
    loss.backward()
    optimizer.step()
    return loss.item()


@misconception(
    "train_step_accum",
    "A micro-batch with nothing to learn from turned the weights into NaN: its mean is 0/0, and a weight of 0 does not help, since 0 * NaN is NaN.",
)
def accum__nan_times_zero(model, micro_batches, loss_fn, optimizer):
    total = sum(count for _, count in micro_batches)
    if total == 0:
        raise ValueError("nothing")
    model.train()
    optimizer.zero_grad()
    mean = 0.0
    for batch, count in micro_batches:
        loss = _loss(model, batch, loss_fn) * count / total
        loss.backward()
        mean += loss.item()
    optimizer.step()
    return mean


@misconception(
    "train_step_accum",
    "The model is in the mode in which it was found. Accumulated or not, a step is training: dropout and batch statistics have to be on.",
)
def accum__mode_as_found(model, micro_batches, loss_fn, optimizer):
    total = sum(count for _, count in micro_batches)
    if total == 0:
        raise ValueError("nothing")
    optimizer.zero_grad()
    mean = 0.0
    for batch, count in micro_batches:
        if count:
            loss = _loss(model, batch, loss_fn) * count / total
            loss.backward()
            mean += loss.item()
    optimizer.step()
    return mean


# fit


def _epoch(model, loader, loss_fn, optimizer):
    losses, counts = [], []
    for batch in loader:
        losses.append(train_step(model, batch, loss_fn, optimizer))
        counts.append(len(batch[-1]))
    return weighted_mean(losses, counts)


@misconception(
    "fit",
    "The model holds the weights of the last epoch. If you did keep a best state_dict: its tensors are the live ones, so what you kept was trained along with the model. Keep copies.",
)
def fit__alias(model, train_loader, val_loader, loss_fn, optimizer, *, epochs, scheduler=None, patience=None):
    history = History()
    best, state, start = math.inf, None, copy.deepcopy(model.state_dict())
    for epoch in range(epochs):
        history.train_loss.append(_epoch(model, train_loader, loss_fn, optimizer))
        if scheduler is not None:
            scheduler.step()
        history.val_loss.append(evaluate(model, val_loader, loss_fn)["loss"])
        if history.val_loss[-1] < best:
            best, state, history.best_epoch = history.val_loss[-1], model.state_dict(), epoch
        elif patience is not None and epoch - history.best_epoch >= patience:
            break
    model.load_state_dict(start if state is None else state)
    return history


@misconception(
    "fit",
    "The weights are those of the best epoch and the buffers are not: running statistics of one epoch under the weights of another. A state_dict has both, parameters() has not.",
)
def fit__parameters_only(model, train_loader, val_loader, loss_fn, optimizer, *, epochs, scheduler=None, patience=None):
    history = History()
    start = copy.deepcopy(model.state_dict())
    best, kept = math.inf, None
    for epoch in range(epochs):
        history.train_loss.append(_epoch(model, train_loader, loss_fn, optimizer))
        if scheduler is not None:
            scheduler.step()
        history.val_loss.append(evaluate(model, val_loader, loss_fn)["loss"])
        if history.val_loss[-1] < best:
            best, history.best_epoch = history.val_loss[-1], epoch
            kept = [p.detach().clone() for p in model.parameters()]
        elif patience is not None and epoch - history.best_epoch >= patience:
            break
    if kept is None:
        model.load_state_dict(start)
    else:
        with torch.no_grad():
            for p, value in zip(model.parameters(), kept, strict=True):
                p.copy_(value)
    return history


@misconception(
    "fit",
    "Training ran one epoch longer than patience allows: with patience p it ends when p epochs in a row have not improved, not when one more has.",
)
def fit__one_epoch_more(model, train_loader, val_loader, loss_fn, optimizer, *, epochs, scheduler=None, patience=None):
    return _fit(
        model,
        train_loader,
        val_loader,
        loss_fn,
        optimizer,
        epochs,
        scheduler,
        patience,
        waits=lambda h, p: p + 1,
    )


@misconception(
    "fit",
    "Training stopped too early: the epochs without improvement are counted over the whole run. A new best loss renews the patience, so the count starts again.",
)
def fit__patience_never_renewed(
    model, train_loader, val_loader, loss_fn, optimizer, *, epochs, scheduler=None, patience=None
):
    bad = [0]

    def worse(history, epoch):
        bad[0] += 1
        return patience is not None and bad[0] >= patience

    return _fit(model, train_loader, val_loader, loss_fn, optimizer, epochs, scheduler, patience, stops=worse)


@misconception(
    "fit",
    "Training did not stop, because each epoch was compared with the one before it: losses that creep down after a bad epoch look like progress. The one to beat is the best so far.",
)
def fit__compared_with_the_last(
    model, train_loader, val_loader, loss_fn, optimizer, *, epochs, scheduler=None, patience=None
):
    bad = [0]

    def worse(history, epoch):
        falls = len(history.val_loss) > 1 and history.val_loss[-1] < history.val_loss[-2]
        bad[0] = 0 if falls else bad[0] + 1
        return patience is not None and bad[0] >= patience

    def better(history, epoch):
        bad[0] = 0

    return _fit(
        model,
        train_loader,
        val_loader,
        loss_fn,
        optimizer,
        epochs,
        scheduler,
        patience,
        stops=worse,
        improved=better,
    )


@misconception(
    "fit",
    "An epoch that only equals the best was taken for an improvement: the best is the first of its kind, and a loss that stands still uses up patience.",
)
def fit__ties_improve(model, train_loader, val_loader, loss_fn, optimizer, *, epochs, scheduler=None, patience=None):
    return _fit(
        model, train_loader, val_loader, loss_fn, optimizer, epochs, scheduler, patience,
        beats=lambda loss, best: loss <= best and loss < math.inf,
    )  # fmt: skip


@misconception(
    "fit",
    "NaN was taken for an improvement: the test asks whether the loss is not above the best, and every comparison with NaN is false. Ask whether it is below.",
)
def fit__nan_improves(model, train_loader, val_loader, loss_fn, optimizer, *, epochs, scheduler=None, patience=None):
    return _fit(
        model, train_loader, val_loader, loss_fn, optimizer, epochs, scheduler, patience,
        beats=lambda loss, best: not loss >= best,
    )  # fmt: skip


@misconception(
    "fit",
    "The scheduler stepped before the optimizer did, so that the first epoch was trained with the second learning rate. The rate that you chose was never used.",
)
def fit__scheduler_first(model, train_loader, val_loader, loss_fn, optimizer, *, epochs, scheduler=None, patience=None):
    history = History()
    best, state = math.inf, copy.deepcopy(model.state_dict())
    for epoch in range(epochs):
        if scheduler is not None:
            scheduler.step()
        history.train_loss.append(_epoch(model, train_loader, loss_fn, optimizer))
        history.val_loss.append(evaluate(model, val_loader, loss_fn)["loss"])
        if history.val_loss[-1] < best:
            best, state, history.best_epoch = history.val_loss[-1], copy.deepcopy(model.state_dict()), epoch
        elif patience is not None and epoch - history.best_epoch >= patience:
            break
    model.load_state_dict(state)
    return history


@misconception(
    "fit",
    "The scheduler stepped after every batch: the learning rate has fallen within the epoch already. This one counts epochs.",
)
def fit__scheduler_per_batch(
    model, train_loader, val_loader, loss_fn, optimizer, *, epochs, scheduler=None, patience=None
):
    history = History()
    best, state = math.inf, copy.deepcopy(model.state_dict())
    for epoch in range(epochs):
        losses, counts = [], []
        for batch in train_loader:
            losses.append(train_step(model, batch, loss_fn, optimizer))
            counts.append(len(batch[-1]))
            if scheduler is not None:
                scheduler.step()
        history.train_loss.append(weighted_mean(losses, counts))
        history.val_loss.append(evaluate(model, val_loader, loss_fn)["loss"])
        if history.val_loss[-1] < best:
            best, state, history.best_epoch = history.val_loss[-1], copy.deepcopy(model.state_dict()), epoch
        elif patience is not None and epoch - history.best_epoch >= patience:
            break
    model.load_state_dict(state)
    return history


@misconception(
    "fit",
    "train_loss is the mean of the batch means, in which a last batch of one example weighs as much as a full one.",
)
def fit__train_loss_of_batches(
    model, train_loader, val_loader, loss_fn, optimizer, *, epochs, scheduler=None, patience=None
):
    history = History()
    best, state = math.inf, copy.deepcopy(model.state_dict())
    for epoch in range(epochs):
        losses = [train_step(model, batch, loss_fn, optimizer) for batch in train_loader]
        history.train_loss.append(sum(losses) / len(losses))
        if scheduler is not None:
            scheduler.step()
        history.val_loss.append(evaluate(model, val_loader, loss_fn)["loss"])
        if history.val_loss[-1] < best:
            best, state, history.best_epoch = history.val_loss[-1], copy.deepcopy(model.state_dict()), epoch
        elif patience is not None and epoch - history.best_epoch >= patience:
            break
    model.load_state_dict(state)
    return history


def _fit(
    model, train_loader, val_loader, loss_fn, optimizer, epochs, scheduler, patience,
    waits=lambda history, patience: patience, stops=None, improved=lambda history, epoch: None,
    beats=lambda loss, best: loss < best,
):  # fmt: skip
    history = History()
    best, state = math.inf, copy.deepcopy(model.state_dict())
    for epoch in range(epochs):
        history.train_loss.append(_epoch(model, train_loader, loss_fn, optimizer))
        if scheduler is not None:
            scheduler.step()
        loss = evaluate(model, val_loader, loss_fn)["loss"]
        history.val_loss.append(loss)
        if beats(loss, best):
            best, state, history.best_epoch = loss, copy.deepcopy(model.state_dict()), epoch
            improved(history, epoch)
        elif stops is not None:
            if stops(history, epoch):
                break
        elif patience is not None and epoch - history.best_epoch >= waits(history, patience):
            break
    model.load_state_dict(state)
    return history


# EMA


class _EMA:
    """The reference in small, with places where the wrong ones differ."""

    def __init__(self, model, decay):
        if not 0 <= decay <= 1:
            raise ValueError("decay")
        self.model, self.decay = model, decay
        self.average = self.start(self.copied())

    def start(self, copied):
        return copied

    def tensors(self):
        return {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}

    def copied(self):
        return {name: tensor.detach().clone() for name, tensor in self.tensors().items()}

    def mixed(self, average, weight):
        return self.decay * average + (1 - self.decay) * weight

    def update(self):
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                self.average[name] = self.mixed(self.average[name], parameter)
            for name, buffer in self.model.named_buffers():
                self.average[name] = buffer.clone()

    def write(self, values):
        with torch.no_grad():
            for name, tensor in self.tensors().items():
                tensor.copy_(values[name])

    @contextmanager
    def swap(self):
        trained = self.copied()
        self.write(self.average)
        try:
            yield
        finally:
            self.write(trained)


@misconception(
    "EMA",
    "The average runs after the newest weights: decay is the share of the old average that stays, and here it is the share that the new weights get.",
)
class EMA__decay_swapped(_EMA):
    def mixed(self, average, weight):
        return (1 - self.decay) * average + self.decay * weight


@misconception(
    "EMA",
    "The average is the model itself: what was kept are its own tensors, which training moves. An average needs memory of its own.",
)
class EMA__alias(_EMA):
    def start(self, copied):
        return {name: tensor.detach() for name, tensor in self.tensors().items()}

    def update(self):
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                self.average[name].copy_(self.mixed(self.average[name], parameter))


@misconception(
    "EMA",
    "The average started from zeros, so that after a few updates it is a shrunken model. It should start as a copy of the weights.",
)
class EMA__from_zeros(_EMA):
    def start(self, copied):
        names = {name for name, _ in self.model.named_parameters()}
        return {name: torch.zeros_like(t) if name in names else t for name, t in copied.items()}


@misconception(
    "EMA",
    "Buffers were averaged like weights. They are statistics and counters of the model as it is: take them over as they are at the update.",
)
class EMA__buffers_averaged(_EMA):
    def update(self):
        with torch.no_grad():
            for name, tensor in self.tensors().items():
                self.average[name] = self.mixed(self.average[name], tensor).to(tensor.dtype)


@misconception(
    "EMA",
    "The buffers of the average are from the day when it was made: weights of now with statistics of the beginning. They have to follow at each update.",
)
class EMA__buffers_forgotten(_EMA):
    def update(self):
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                self.average[name] = self.mixed(self.average[name], parameter)


@misconception(
    "EMA",
    "After a block that raised, the model still holds the average: an exception leaves a generator at its yield, and lines below it run only if they are in a finally.",
)
class EMA__not_after_an_exception(_EMA):
    @contextmanager
    def swap(self):
        trained = self.copied()
        self.write(self.average)
        yield
        self.write(trained)


@misconception(
    "EMA",
    "The model's own weights are gone after the block: the average was copied over them, and nobody had kept them.",
)
class EMA__never_back(_EMA):
    @contextmanager
    def swap(self):
        self.write(self.average)
        yield


@misconception(
    "EMA",
    "Weights and average were exchanged, and at the end exchanged again, so that all that the block wrote into the model is now in the average.",
)
class EMA__exchanged(_EMA):
    def exchange(self):
        trained = self.copied()
        self.write(self.average)
        self.average = trained

    @contextmanager
    def swap(self):
        self.exchange()
        try:
            yield
        finally:
            self.exchange()


@misconception(
    "EMA",
    "The block got new Parameter objects. An optimizer holds the old ones, and goes on training tensors that the model has forgotten: write into the parameters that are there.",
)
class EMA__new_parameters(_EMA):
    def write(self, values):
        for name, tensor in self.tensors().items():
            home, _, last = name.rpartition(".")
            module = self.model.get_submodule(home)
            if isinstance(tensor, torch.nn.Parameter):
                new = torch.nn.Parameter(values[name].clone())
                new.grad = tensor.grad
                for other in self.model.modules():
                    for key, value in list(other._parameters.items()):
                        if value is tensor:
                            setattr(other, key, new)
            else:
                setattr(module, last, values[name].clone())


# checkpoint


def _save(path, state):
    unfinished = f"{path}.unfinished"
    torch.save(state, unfinished)
    os.replace(unfinished, path)


def _state(model, optimizer, scheduler, step, generator):
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "step": step,
        "generator": generator.get_state(),
        "global_rng": torch.get_rng_state(),
    }


@misconception(
    "save_checkpoint",
    "Data and learning rates go on as before, and the losses do not: dropout draws other masks. It takes its numbers from torch's global random state, which belongs into the file as well.",
)
def save__without_the_global_state(path, model, optimizer, scheduler, step, generator):
    nothing = torch.Generator().get_state()
    _save(path, {**_state(model, optimizer, scheduler, step, generator), "global_rng": nothing})


@misconception(
    "save_checkpoint",
    "The data come in another order after loading: the generator that shuffles has a state of its own, which belongs into the file.",
)
def save__without_the_generator(path, model, optimizer, scheduler, step, generator):
    nothing = torch.Generator().get_state()
    _save(path, {**_state(model, optimizer, scheduler, step, generator), "generator": nothing})


@misconception(
    "save_checkpoint",
    "The weights, the data and the learning rates are right, and the steps are not: the optimizer starts with empty moments, like a fresh one. A model alone is not a training run.",
)
def save__without_the_moments(path, model, optimizer, scheduler, step, generator):
    state = {**optimizer.state_dict(), "state": {}}
    _save(path, {**_state(model, optimizer, scheduler, step, generator), "optimizer": state})


@misconception(
    "save_checkpoint",
    "The scheduler counts from zero again after loading: the next change of the learning rate comes at the wrong step.",
)
def save__without_the_scheduler(path, model, optimizer, scheduler, step, generator):
    state = {**scheduler.state_dict(), "last_epoch": 0, "_step_count": 1}
    _save(path, {**_state(model, optimizer, scheduler, step, generator), "scheduler": state})


@misconception(
    "save_checkpoint",
    "The file has the parameters and not the buffers: the running statistics of the batch norm are those of a fresh model. A state_dict holds both.",
)
def save__without_the_buffers(path, model, optimizer, scheduler, step, generator):
    state = {**model.state_dict(), **{name: torch.zeros_like(b) for name, b in model.named_buffers()}}
    _save(path, {**_state(model, optimizer, scheduler, step, generator), "model": state})


@misconception(
    "save_checkpoint",
    "The save that failed took the earlier checkpoint with it: writing began at the place where the good file was. Write elsewhere, and put it in place when it is whole.",
)
def save__in_place(path, model, optimizer, scheduler, step, generator):
    torch.save(_state(model, optimizer, scheduler, step, generator), path)


@misconception(
    "save_checkpoint",
    "The file holds whole objects: to read it is to run what somebody put into it, and it breaks with the next change of a class. Save states, which are tensors and plain numbers.",
)
def save__whole_objects(path, model, optimizer, scheduler, step, generator):
    state = _state(model, optimizer, scheduler, step, generator)
    _save(path, {**state, "whole_model": model})


@misconception(
    "save_checkpoint",
    "The generators were drawn from or seeded anew while saving: the run that was saved no longer is the run that goes on. Looking at a state must not change it.",
)
def save__draws_a_seed(path, model, optimizer, scheduler, step, generator):
    torch.manual_seed(step)
    generator.manual_seed(step)
    _save(path, _state(model, optimizer, scheduler, step, generator))
