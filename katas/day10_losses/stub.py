"""Day 10: losses. Log-probabilities done properly.

All losses take logits: numbers of any size, before any softmax or sigmoid. Half-precision inputs are widened to
float32 while you compute, float64 stays float64, and the result has the dtype of the first argument.
Shapes that do not fit raise ValueError with both shapes in the message.
"""

import torch
from day02_tensor_operations import logsumexp, softmax
from torch import Tensor


def mse_loss(pred: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """The squared differences (pred - target)^2 of two tensors of the same shape.

    `reduction` is "mean" (over all elements) or "sum", which give a scalar, or "none", which gives the shape of
    `pred`; any other word raises ValueError. Shapes that differ raise ValueError with both shapes, even where
    broadcasting could make them fit.
    """
    raise NotImplementedError


def log_softmax(x: Tensor, dim: int = -1) -> Tensor:
    """log(softmax(x)) along `dim`: same shape and dtype, exact also for logits of +-1e4.

    The gradient is finite for such logits too, and sums to 0 along `dim`. A logit of -inf gives -inf and leaves
    the others right.
    """
    raise NotImplementedError


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """-log softmax(logits)[target], for logits (..., V) with the classes last and integer targets (...).

    - Targets equal to `ignore_index` (which may be any integer, a class included) have loss 0 and no gradient.
    - `label_smoothing` eps replaces the one-hot target by (1 - eps) * onehot + eps / V, over all V classes.
    - `weight` (V,) multiplies the term of each class, that of a smoothed target included.
    - `reduction` "none" gives the shape of `target`, "sum" the sum, and "mean" the sum divided by the number of
      kept targets, or with `weight` by the sum of weight[target] over the kept ones. Where that divisor is 0
      (everything ignored, or nothing there), the mean is 0 and its gradient 0; F.cross_entropy gives NaN there.
      Any other word raises ValueError.
    - A kept target below 0 or from V on raises IndexError. ValueError, with both shapes: target.shape must be
      logits.shape[:-1]; weight.shape must be (V,), with the shape of the logits as the other one.
    - Exact for logits of +-1e4, and for classes with logit -inf as long as nothing is smoothed.
    - Cost: for logits with N rows and no smoothing, at most 3 * N * V * itemsize bytes of new memory at any time.
    """
    raise NotImplementedError


def cross_entropy_grad(logits: Tensor, target: Tensor, ignore_index: int = -100) -> Tensor:
    """The gradient of the mean `cross_entropy` with respect to logits (N, V), by formula and without autograd.

    Row n is (softmax(logits[n]) - onehot(target[n])) / kept, with the number of kept targets below the line;
    a row whose target is `ignore_index` is 0. If all are ignored, everything is 0. Exact for logits of +-1e4.
    A kept target outside of 0..V-1 raises IndexError; target.shape other than (N,) raises ValueError with both.
    """
    raise NotImplementedError


def bce_with_logits(logits: Tensor, target: Tensor, pos_weight: Tensor | None = None) -> Tensor:
    """The mean over all elements of -(y log s + (1 - y) log(1 - s)), where s = sigmoid(logits) and y = target.

    Targets may be soft, anything from 0 to 1. `pos_weight`, broadcast over the logits, multiplies the first of
    the two terms. Value and gradient are exact for logits of +-1e4, and at 0, where the gradient is (s - y) / n.
    Shapes of logits and target that differ raise ValueError with both.
    """
    raise NotImplementedError


def kl_divergence(p_logits: Tensor, q_logits: Tensor, dim: int = -1) -> Tensor:
    """KL(p || q) = sum of p (log p - log q) along `dim`, which disappears from the shape. Natural logarithm.

    p and q are the softmax of their logits, so a constant added along `dim` changes nothing. Where p is exactly 0
    (logit -inf, or an exp that underflows), the term is 0, whatever q is there; where q is 0 and p is not, the
    result is inf. The gradient goes to both and is finite where p has zeros. Shapes that differ raise ValueError
    with both.
    """
    raise NotImplementedError


def lm_loss(logits: Tensor, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Mean cross-entropy of next-token prediction: logits[:, t] (B, T, V) predict tokens[:, t + 1] (B, T).

    The first token is never a target, and the last logits predict nothing. With `lengths` (B,), row b has
    lengths[b] real tokens, and what comes after them is never a target, whatever numbers stand there. The mean
    is over all targets of the batch together; without any target the loss is 0 with gradient 0.

    ValueError with both shapes: tokens.shape must be logits.shape[:2], and lengths.shape must be (B,), with the
    shape of the tokens as the other one. A target outside of 0..V-1 raises IndexError.
    """
    raise NotImplementedError


def linear_cross_entropy(h: Tensor, w: Tensor, target: Tensor, chunk: int) -> Tensor:
    """The mean cross-entropy of the logits h @ w.T, for h (N, D), w (V, D) and target (N,) with N >= 1.

    At most `chunk` rows of the logits exist at any time, in the forward and in the backward pass: no tensor that
    you allocate has more than max(chunk * V, N * D, V * D) elements, and the peak of both passes together stays
    below (5 * chunk * V + 3 * (N + V) * D + 8 * N) * itemsize bytes. Gradients of h and w are exact, also when N is
    no multiple of `chunk`, when `chunk` is above N, and when the loss is scaled before backward. float32 and float64.

    ValueError: h and w that differ in D, target.shape other than (N,) (both shapes each), chunk below 1.
    """
    raise NotImplementedError
