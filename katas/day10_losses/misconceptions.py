import torch
import torch.nn.functional as F

from checker.testing import misconception
from reference import day10_losses as right
from reference.day10_losses import log_softmax

# mse_loss


def _reduced(losses, reduction):
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(reduction)
    return losses if reduction == "none" else getattr(losses, reduction)()


def _same(a, b):
    if a.shape != b.shape:
        raise ValueError(f"{tuple(a.shape)} and {tuple(b.shape)}")


@misconception(
    "mse_loss",
    "Shapes that differ are broadcast: (N, 1) against (N,) gives N * N pairs, nearly all of them wrong, and training goes on as if nothing were the matter. torch only warns; you should refuse.",
)
def mse__broadcast(pred, target, reduction="mean"):
    return right._reduce(
        (right._wide(pred) - right._wide(target)) ** 2, max(pred.numel(), target.numel()), reduction
    ).to(pred.dtype)


@misconception(
    "mse_loss",
    "All numbers are half of what they should be. The factor 1/2 of the textbooks makes the derivative pretty, but the mean of the squares has none.",
)
def mse__half(pred, target, reduction="mean"):
    return right.mse_loss(pred, target, reduction) / 2


@misconception("mse_loss", "These are the distances themselves: the squares are missing.")
def mse__absolute(pred, target, reduction="mean"):
    _same(pred, target)
    return _reduced((pred - target).abs(), reduction)


@misconception("mse_loss", "The root of the mean square came back. The loss is the mean square itself.")
def mse__root(pred, target, reduction="mean"):
    return right.mse_loss(pred, target, reduction).sqrt()


@misconception("mse_loss", "Whatever reduction is asked for, the mean comes back.")
def mse__always_mean(pred, target, reduction="mean"):
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(reduction)
    return right.mse_loss(pred, target)


@misconception(
    "mse_loss",
    "The squares are taken in half precision, where nothing above 65504 exists: one error of 300 makes the whole mean infinite.",
)
def mse__half_precision(pred, target, reduction="mean"):
    _same(pred, target)
    return _reduced((pred - target) ** 2, reduction)


# log_softmax


@misconception(
    "log_softmax",
    "This is the log of the softmax. The softmax underflows to 0 first, and the log of that is -inf: subtract the logsumexp from the logits, and no probability is ever formed.",
)
def log_softmax__log_of_softmax(x, dim=-1):
    return right.softmax(right._wide(x), dim).log().to(x.dtype)


@misconception(
    "log_softmax",
    "The exponentials of large logits overflow, and inf minus inf is NaN. The logsumexp has to take the largest logit out before it exponentiates.",
)
def log_softmax__naive(x, dim=-1):
    wide = right._wide(x)
    return (wide - wide.exp().sum(dim, keepdim=True).log()).to(x.dtype)


@misconception(
    "log_softmax",
    "A small number was added before the log. It stops the -inf, and with it the loss: below that number, all wrong answers look alike and get no gradient.",
)
def log_softmax__epsilon(x, dim=-1):
    return (right.softmax(right._wide(x), dim) + 1e-12).log().to(x.dtype)


@misconception("log_softmax", "The sum always goes along the last axis, whatever dim says.")
def log_softmax__last_axis(x, dim=-1):
    return right.log_softmax(x, -1)


@misconception(
    "log_softmax",
    "One maximum is taken out of the whole tensor. A row far below it underflows as a whole: each row needs its own.",
)
def log_softmax__one_maximum(x, dim=-1):
    wide = right._wide(x)
    wide = wide - wide.max()
    return (wide - wide.exp().sum(dim, keepdim=True).log()).to(x.dtype)


@misconception(
    "log_softmax",
    "The sum of the exponentials is treated as a constant. The values are right, but the gradient rows no longer sum to 0: raising every logit now seems to help.",
)
def log_softmax__detached(x, dim=-1):
    wide = right._wide(x)
    return (wide - right.logsumexp(wide, dim, keepdim=True).detach()).to(x.dtype)


# cross_entropy and cross_entropy_grad


def _ce(
    logits,
    target,
    ignore_index=-100,
    label_smoothing=0.0,
    weight=None,
    reduction="mean",
    *,
    logp=None,
    kept=None,
    divisor=None,
    spread=None,
    uniform_weight=True,
    nothing=0.0,
):
    """Cross-entropy with one part exchanged."""
    found, labels = right._labels(logits, target, ignore_index)
    kept = found if kept is None else kept
    logp = log_softmax(right._wide(logits)) if logp is None else logp
    V = logits.shape[-1]
    if weight is not None and weight.shape != (V,):
        raise ValueError(f"{tuple(weight.shape)} and {tuple(logits.shape)}")
    w = logp.new_ones(V) if weight is None else weight.to(logp.dtype)
    counts = w[labels] * kept
    losses = -counts * logp.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    if label_smoothing:
        if spread is not None:
            uniform = spread(logp, w, labels)
        else:
            uniform = -(logp * w).mean(-1) if uniform_weight else -logp.mean(-1)
        losses = (1 - label_smoothing) * losses + label_smoothing * uniform * kept
    total = counts.sum() if divisor is None else divisor(kept, counts)
    if reduction == "mean" and total == 0:
        return (losses.sum() * 0 + nothing).to(logits.dtype)
    return right._reduce(losses, total, reduction).to(logits.dtype)


@misconception(
    "cross_entropy",
    "What comes in are logits, and a softmax was put over them before the loss, which normalizes once more. The logits then lie between 0 and 1: with 10 classes such a loss can never fall below 1.46.",
)
def ce__softmax_first(logits, target, *, ignore_index=-100, label_smoothing=0.0, weight=None, reduction="mean"):
    return right.cross_entropy(
        right.softmax(logits),
        target,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        weight=weight,
        reduction=reduction,
    )


@misconception(
    "cross_entropy",
    "The log is taken of a softmax that has underflowed to 0, so a confident wrong answer costs inf. Work with log-probabilities from the logits.",
)
def ce__log_of_softmax(logits, target, *, ignore_index=-100, label_smoothing=0.0, weight=None, reduction="mean"):
    return _ce(
        logits, target, ignore_index, label_smoothing, weight, reduction, logp=right.softmax(right._wide(logits)).log()
    )


@misconception(
    "cross_entropy",
    "The sum is divided by the number of all targets, the ignored ones too. Such a loss shrinks with padding, and the gradient with it.",
)
def ce__over_all(logits, target, *, ignore_index=-100, label_smoothing=0.0, weight=None, reduction="mean"):
    def divisor(kept, counts):
        return counts.sum() + (~kept).sum()

    return _ce(logits, target, ignore_index, label_smoothing, weight, reduction, divisor=divisor)


@misconception(
    "cross_entropy",
    "With class weights the mean divides by the sum of the weights of the kept targets; here it divides by how many they are. Doubling all weights should change nothing.",
)
def ce__weights_over_count(logits, target, *, ignore_index=-100, label_smoothing=0.0, weight=None, reduction="mean"):
    return _ce(
        logits, target, ignore_index, label_smoothing, weight, reduction, divisor=lambda kept, counts: kept.sum()
    )


@misconception(
    "cross_entropy",
    "The smoothing is spread over the other V - 1 classes. In torch, and here, every class gets eps / V, the target included.",
)
def ce__smoothing_over_others(logits, target, *, ignore_index=-100, label_smoothing=0.0, weight=None, reduction="mean"):
    def spread(logp, w, labels):
        weighted = -logp * w
        own = weighted.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        return (weighted.sum(-1) - own) / (logp.shape[-1] - 1)

    return _ce(logits, target, ignore_index, label_smoothing, weight, reduction, spread=spread)


@misconception(
    "cross_entropy",
    "The smoothed part has forgotten the class weights: they multiply the term of every class, not only that of the target.",
)
def ce__smoothing_without_weights(
    logits, target, *, ignore_index=-100, label_smoothing=0.0, weight=None, reduction="mean"
):
    return _ce(logits, target, ignore_index, label_smoothing, weight, reduction, uniform_weight=False)


@misconception(
    "cross_entropy",
    "The smoothed part is added up over the classes instead of averaged: each class gets eps where it should get eps / V.",
)
def ce__smoothing_summed(logits, target, *, ignore_index=-100, label_smoothing=0.0, weight=None, reduction="mean"):
    return _ce(
        logits,
        target,
        ignore_index,
        label_smoothing,
        weight,
        reduction,
        spread=lambda logp, w, labels: -(logp * w).sum(-1),
    )


@misconception("cross_entropy", "label_smoothing has no effect here.")
def ce__no_smoothing(logits, target, *, ignore_index=-100, label_smoothing=0.0, weight=None, reduction="mean"):
    return _ce(logits, target, ignore_index, 0.0, weight, reduction)


@misconception(
    "cross_entropy",
    "With every target ignored this is 0 / 0, NaN, and one such batch is enough to make all weights NaN. The stub asks for 0 there.",
)
def ce__nan_for_nothing(logits, target, *, ignore_index=-100, label_smoothing=0.0, weight=None, reduction="mean"):
    return _ce(logits, target, ignore_index, label_smoothing, weight, reduction, nothing=float("nan"))


@misconception(
    "cross_entropy",
    "The softmax runs along axis 1. That is where F.cross_entropy has its classes, as (N, V, T); here they are the last axis of (N, T, V), and if T equals V no error tells the difference.",
)
def ce__classes_on_axis_one(logits, target, *, ignore_index=-100, label_smoothing=0.0, weight=None, reduction="mean"):
    logp = log_softmax(right._wide(logits), 1 if logits.dim() > 1 else 0)
    return _ce(logits, target, ignore_index, label_smoothing, weight, reduction, logp=logp)


@misconception(
    "cross_entropy",
    "Targets outside of the classes are pulled to the nearest one, or wrap around. A wrong label should be heard of: it is an IndexError.",
)
def ce__clamped(logits, target, *, ignore_index=-100, label_smoothing=0.0, weight=None, reduction="mean"):
    inside = target.clamp(0, logits.shape[-1] - 1)
    target = torch.where(target == ignore_index, target, inside) if inside.shape == target.shape else target
    return right.cross_entropy(
        logits, target, ignore_index=ignore_index, label_smoothing=label_smoothing, weight=weight, reduction=reduction
    )


@misconception(
    "cross_entropy",
    "Every negative target is skipped. Only ignore_index means ignore: -1 is a wrong label where -100 is the sign for padding, and ignore_index may be a class as well.",
)
def ce__negatives_ignored(logits, target, *, ignore_index=-100, label_smoothing=0.0, weight=None, reduction="mean"):
    target = target.masked_fill(target < 0, -100)
    return right.cross_entropy(logits, target, label_smoothing=label_smoothing, weight=weight, reduction=reduction)


@misconception("cross_entropy", "The sign is turned: this is the log-probability, which training would drive down.")
def ce__sign(logits, target, *, ignore_index=-100, label_smoothing=0.0, weight=None, reduction="mean"):
    return -right.cross_entropy(
        logits, target, ignore_index=ignore_index, label_smoothing=label_smoothing, weight=weight, reduction=reduction
    )


@misconception(
    "cross_entropy",
    "The ignored positions are gone from the result of reduction 'none'. It should have the shape of the targets, with zeros there, so that it can be put beside them.",
)
def ce__none_without_ignored(logits, target, *, ignore_index=-100, label_smoothing=0.0, weight=None, reduction="mean"):
    losses = right.cross_entropy(
        logits, target, ignore_index=ignore_index, label_smoothing=label_smoothing, weight=weight, reduction=reduction
    )
    return losses[target != ignore_index] if reduction == "none" else losses


@misconception(
    "cross_entropy_grad",
    "The sign is turned: y - p. A step against this gradient makes the target less likely.",
)
def grad__sign(logits, target, ignore_index=-100):
    return -right.cross_entropy_grad(logits, target, ignore_index)


@misconception(
    "cross_entropy_grad",
    "This is the gradient of the sum. The loss is a mean over the kept targets, so each row has to be divided by their number.",
)
def grad__of_the_sum(logits, target, ignore_index=-100):
    return right.cross_entropy_grad(logits, target, ignore_index) * (target != ignore_index).sum().to(logits.dtype)


@misconception(
    "cross_entropy_grad",
    "The rows are divided by how many there are, with the ignored ones. The loss divides by the kept ones alone, so padding makes this gradient too small.",
)
def grad__over_all(logits, target, ignore_index=-100):
    grad = right.cross_entropy_grad(logits, target, ignore_index)
    return grad * ((target != ignore_index).sum() / target.numel()).to(grad.dtype)


@misconception(
    "cross_entropy_grad",
    "The rows of ignored targets hold their softmax. Nothing was asked of these rows, so nothing may pull at them: they are 0.",
)
def grad__ignored_rows_pull(logits, target, ignore_index=-100):
    kept, _ = right._labels(logits, target, ignore_index)
    p = right.softmax(logits) / kept.sum().clamp(min=1).to(logits.dtype)
    return torch.where(kept.unsqueeze(-1), right.cross_entropy_grad(logits, target, ignore_index), p)


@misconception(
    "cross_entropy_grad", "The target is not in it: this is p alone, which pushes every class down, the right one too."
)
def grad__p_alone(logits, target, ignore_index=-100):
    kept, _ = right._labels(logits, target, ignore_index)
    return right.softmax(logits) * kept.unsqueeze(-1) / kept.sum().clamp(min=1).to(logits.dtype)


# bce_with_logits


@misconception(
    "bce_with_logits",
    "The logits went through sigmoid and a clamp. The clamp keeps the log finite and kills the gradient exactly where the answer is most wrong and needs it most: stay with the logits.",
)
def bce__clamped(logits, target, pos_weight=None):
    _same(logits, target)
    s = right._wide(logits).sigmoid().clamp(1e-7, 1 - 1e-7)
    w = 1 if pos_weight is None else pos_weight
    return -(w * target * s.log() + (1 - target) * (1 - s).log()).mean().to(logits.dtype)


@misconception(
    "bce_with_logits",
    "An exponential has overflowed, or a sigmoid has rounded to exactly 0 or 1; the log of that is infinite or, times a target of 0, NaN. Write both logs in terms of the logit.",
)
def bce__log_of_sigmoid(logits, target, pos_weight=None):
    _same(logits, target)
    s, y = right._wide(logits).sigmoid(), right._wide(target)
    w = 1 if pos_weight is None else pos_weight
    return -(w * y * s.log() + (1 - y) * (1 - s).log()).mean().to(logits.dtype)


@misconception(
    "bce_with_logits", "pos_weight multiplies both terms. It is there to make positives count more than negatives."
)
def bce__weight_on_both(logits, target, pos_weight=None):
    _same(logits, target)
    w = 1 if pos_weight is None else pos_weight
    x, y = right._wide(logits), right._wide(target)
    losses = w * (y * F.softplus(-x) + (1 - y) * F.softplus(x))
    return losses.mean().to(logits.dtype)


@misconception("bce_with_logits", "pos_weight multiplies the term of the negatives.")
def bce__weight_on_negatives(logits, target, pos_weight=None):
    _same(logits, target)
    return right.bce_with_logits(-logits, 1 - target, pos_weight)


@misconception(
    "bce_with_logits",
    "The targets are rounded to 0 or 1. A soft target of 0.7 should pull the probability to 0.7, not to 1.",
)
def bce__rounded_targets(logits, target, pos_weight=None):
    _same(logits, target)
    return right.bce_with_logits(logits, (target > 0.5).to(target.dtype), pos_weight)


@misconception(
    "bce_with_logits",
    "The values are right, but at a logit of exactly 0 the gradient is not (0.5 - y) / n: a maximum or an absolute value has a kink there, and autograd has to pick a side. A freshly started head with zero weights begins at that very point.",
)
def bce__kink_at_zero(logits, target, pos_weight=None):
    _same(logits, target)
    x, y = right._wide(logits), right._wide(target)
    w = 1 if pos_weight is None else pos_weight
    tail = torch.log1p((-x.abs()).exp())
    losses = w * y * ((-x).clamp(min=0) + tail) + (1 - y) * (x.clamp(min=0) + tail)
    return losses.mean().to(logits.dtype)


@misconception("bce_with_logits", "This is the sum of the losses, where their mean was asked for.")
def bce__sum(logits, target, pos_weight=None):
    return right.bce_with_logits(logits, target, pos_weight) * logits.numel()


# kl_divergence


@misconception(
    "kl_divergence",
    "The two have changed places: this is KL(q || p). KL(p || q) averages over p, which is the first argument. F.kl_div, with its order (log q, p), has led many people here.",
)
def kl__swapped(p_logits, q_logits, dim=-1):
    return right.kl_divergence(q_logits, p_logits, dim).to(p_logits.dtype)


@misconception(
    "kl_divergence",
    "This is the cross-entropy of q under p. The entropy of p is not taken off, so equal distributions do not have distance 0.",
)
def kl__cross_entropy(p_logits, q_logits, dim=-1):
    _same(p_logits, q_logits)
    p, log_q = right.softmax(right._wide(p_logits), dim), log_softmax(right._wide(q_logits), dim)
    return -(p * log_q).masked_fill(p == 0, 0).sum(dim).to(p_logits.dtype)


@misconception(
    "kl_divergence",
    "Where p is 0 you multiply 0 by minus infinity, which is NaN. The limit of p log p is 0, and floating point does not know it: such terms have to be taken out before the product.",
)
def kl__zero_times_infinity(p_logits, q_logits, dim=-1):
    _same(p_logits, q_logits)
    log_p, log_q = log_softmax(right._wide(p_logits), dim), log_softmax(right._wide(q_logits), dim)
    return (log_p.exp() * (log_p - log_q)).sum(dim).to(p_logits.dtype)


@misconception(
    "kl_divergence",
    "The terms with p = 0 are removed after the product. The value is right, but the gradient still goes through 0 times infinity and is NaN.",
)
def kl__masked_too_late(p_logits, q_logits, dim=-1):
    _same(p_logits, q_logits)
    log_p, log_q = log_softmax(right._wide(p_logits), dim), log_softmax(right._wide(q_logits), dim)
    p = log_p.exp()
    return (p * (log_p - log_q)).masked_fill(p == 0, 0).sum(dim).to(p_logits.dtype)


@misconception(
    "kl_divergence",
    "No gradient reaches p: it is treated as a constant. That is what one does with a teacher, but here both sides may be the one that learns.",
)
def kl__p_detached(p_logits, q_logits, dim=-1):
    return right.kl_divergence(p_logits.detach(), q_logits, dim) + 0 * p_logits.masked_fill(p_logits.isinf(), 0).sum()


@misconception("kl_divergence", "One number for everything: the divergence should be summed along dim only.")
def kl__mean_of_all(p_logits, q_logits, dim=-1):
    return right.kl_divergence(p_logits, q_logits, dim).mean()


@misconception(
    "kl_divergence",
    "The terms are averaged along dim. A divergence is an expected value: p is the weight, and it sums to 1.",
)
def kl__mean_over_classes(p_logits, q_logits, dim=-1):
    return right.kl_divergence(p_logits, q_logits, dim) / p_logits.shape[dim]


@misconception(
    "kl_divergence",
    "The logits are used as if they were log-probabilities: without a normalization, a constant added to a row changes the result.",
)
def kl__unnormalized(p_logits, q_logits, dim=-1):
    _same(p_logits, q_logits)
    p = right.softmax(right._wide(p_logits), dim)
    return (p * (right._wide(p_logits) - right._wide(q_logits)).masked_fill(p == 0, 0)).sum(dim).to(p_logits.dtype)


# lm_loss


@misconception(
    "lm_loss",
    "Position t is asked for token t, which it has already read. Nothing is shifted: a model learns to copy its input, and its loss falls to 0 in a hurry.",
)
def lm__no_shift(logits, tokens, lengths=None):
    _lm_shapes(logits, tokens, lengths)
    return right.cross_entropy(logits, _lm_targets(tokens, lengths, 0))


@misconception(
    "lm_loss",
    "The shift goes the wrong way: position t is asked for the token before it.",
)
def lm__shifted_back(logits, tokens, lengths=None):
    _lm_shapes(logits, tokens, lengths)
    return right.cross_entropy(logits[:, 1:], _lm_targets(tokens, lengths, 0)[:, :-1])


@misconception(
    "lm_loss",
    "The tokens were rolled around: the last position is asked for the first token, which nothing predicts.",
)
def lm__rolled(logits, tokens, lengths=None):
    _lm_shapes(logits, tokens, lengths)
    return right.cross_entropy(logits, _lm_targets(tokens, lengths, 0).roll(-1, 1))


@misconception(
    "lm_loss",
    "One padding token per row has become a target. The length counts tokens, and the target of position t is token t + 1: it is that one which has to lie inside.",
)
def lm__one_too_many(logits, tokens, lengths=None):
    return right.lm_loss(logits, tokens, None if lengths is None else lengths + 1)


@misconception("lm_loss", "The last target of each row is missing.")
def lm__one_too_few(logits, tokens, lengths=None):
    return right.lm_loss(logits, tokens, None if lengths is None else lengths - 1)


@misconception("lm_loss", "lengths has no effect: padding is learned like text, and more padding gives another loss.")
def lm__padding_learned(logits, tokens, lengths=None):
    _lm_shapes(logits, tokens, lengths)
    return right.lm_loss(logits, tokens)


@misconception(
    "lm_loss",
    "Each row is averaged first, and then the rows. A row with one target then weighs as much as a row with a hundred: the mean is over all targets together.",
)
def lm__mean_of_rows(logits, tokens, lengths=None):
    _lm_shapes(logits, tokens, lengths)
    target = _lm_targets(tokens, lengths, 0)[:, 1:]
    losses = right.cross_entropy(logits[:, :-1], target, reduction="none")
    kept = (target != -100).sum(-1)
    rows = losses.sum(-1) / kept.clamp(min=1)
    return rows.sum() / (kept > 0).sum().clamp(min=1)


@misconception(
    "lm_loss",
    "The sum is divided by B * (T - 1), padding included, so a batch with much padding has a small loss.",
)
def lm__over_all_positions(logits, tokens, lengths=None):
    _lm_shapes(logits, tokens, lengths)
    target = _lm_targets(tokens, lengths, 0)[:, 1:]
    return right.cross_entropy(logits[:, :-1], target, reduction="sum") / max(target.numel(), 1)


def _lm_shapes(logits, tokens, lengths):
    if logits.shape[:-1] != tokens.shape:
        raise ValueError(f"{tuple(logits.shape)} and {tuple(tokens.shape)}")
    if lengths is not None and lengths.shape != tokens.shape[:1]:
        raise ValueError(f"{tuple(lengths.shape)} and {tuple(tokens.shape)}")


def _lm_targets(tokens, lengths, shift):
    if lengths is None:
        return tokens
    position = torch.arange(tokens.shape[1], device=tokens.device) + shift
    return tokens.masked_fill(position >= lengths.unsqueeze(-1), -100)


# linear_cross_entropy


@misconception(
    "linear_cross_entropy",
    "All logits exist at once: (N, V) of them. For 128k classes that tensor is larger than the model, and the chunks are there to avoid it.",
)
def linear__all_at_once(h, w, target, chunk):
    _linear_shapes(h, w, target, chunk)
    return right.cross_entropy(h @ w.T, target)


@misconception(
    "linear_cross_entropy",
    "The forward pass goes chunk by chunk, but autograd keeps what each chunk saved until backward: together the chunks are the large tensor again.",
)
def linear__chunks_kept(h, w, target, chunk):
    _linear_shapes(h, w, target, chunk)
    pieces = zip(h.split(chunk), target.split(chunk), strict=True)
    return sum(right.cross_entropy(a @ w.T, t, reduction="sum") for a, t in pieces) / h.shape[0]


@misconception(
    "linear_cross_entropy",
    "This is the mean of the means of the chunks. Where the last chunk is shorter than the others, its rows count too much.",
)
def linear__mean_of_means(h, w, target, chunk):
    _linear_shapes(h, w, target, chunk)
    pieces = list(zip(h.split(chunk), target.split(chunk), strict=True))
    return sum(right.linear_cross_entropy(a, w, t, chunk) for a, t in pieces) / len(pieces)


class _Deaf(right._LinearCrossEntropy):
    @staticmethod
    def backward(ctx, grad):
        return right._LinearCrossEntropy.backward(ctx, torch.ones_like(grad))


@misconception(
    "linear_cross_entropy",
    "The gradient that comes in is ignored: backward gives the same whatever the loss was multiplied with afterwards.",
)
def linear__incoming_gradient_ignored(h, w, target, chunk):
    _linear_shapes(h, w, target, chunk)
    return _Deaf.apply(h, w, target, chunk)


class _LastChunk(right._LinearCrossEntropy):
    @staticmethod
    def backward(ctx, grad):
        h, w, target = ctx.saved_tensors
        grad_h = right._LinearCrossEntropy.backward(ctx, grad)[0]
        start = (h.shape[0] - 1) // ctx.chunk * ctx.chunk
        g = right.cross_entropy_grad(h[start:] @ w.T, target[start:]) * (grad * (h.shape[0] - start) / h.shape[0])
        return grad_h, g.T @ h[start:], None, None


@misconception(
    "linear_cross_entropy",
    "The gradient of w is that of the last chunk alone: each chunk has written over the one before. All rows use the same w, so its gradients add up.",
)
def linear__last_chunk_only(h, w, target, chunk):
    _linear_shapes(h, w, target, chunk)
    return _LastChunk.apply(h, w, target, chunk)


def _linear_shapes(h, w, target, chunk):
    if h.shape[-1] != w.shape[-1] or h.shape[:-1] != target.shape or chunk < 1:
        raise ValueError(f"{tuple(h.shape)}, {tuple(w.shape)}, {tuple(target.shape)}, {chunk}")
