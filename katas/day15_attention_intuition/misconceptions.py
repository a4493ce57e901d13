"""Day 15: known wrong solutions, each with the sentence for whoever wrote it."""

import torch
from torch import nn
from torch.nn import functional as F

from checker.testing import misconception
from reference.day01_tensor_basics import sequence_mask
from reference.day02_tensor_operations import masked_softmax, softmax
from reference.day08_linear_layers import Linear
from reference.day15_attention_intuition import COLD, _check_memory
from reference.day15_attention_intuition import BahdanauAttention as Right
from reference.day15_attention_intuition import additive_scores as right_scores
from reference.day15_attention_intuition import attend as right_attend
from reference.day15_attention_intuition import induction_head as right_head
from reference.day15_attention_intuition import induction_lookup as right_induction
from reference.day15_attention_intuition import soft_lookup as right_lookup


def _wide(x):
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


# hard_lookup


def _products(q, keys, values):
    _check_memory(q, keys, values)
    return _wide(q) @ _wide(keys).T


@misconception(
    "hard_lookup",
    "Your queries find the nearest key. The task asks for the largest dot product, and there a long key can beat a near one.",
)
def hard_lookup__nearest(q, keys, values):
    _check_memory(q, keys, values)
    return values[(_wide(q)[:, None] - _wide(keys)).square().sum(-1).argmin(1)]


@misconception(
    "hard_lookup",
    "Your scores are cosines: the lengths of the keys were divided out. In a plain dot product a key that is twice as long "
    "speaks twice as loud.",
)
def hard_lookup__cosine(q, keys, values):
    _check_memory(q, keys, values)
    unit = F.normalize(_wide(keys), dim=1)
    return values[(_wide(q) @ unit.T).argmax(1)]


@misconception(
    "hard_lookup",
    "You take the score of the largest size, also when it is very negative. A score of -4 is worse than one of -1.",
)
def hard_lookup__largest_size(q, keys, values):
    return values[_products(q, keys, values).abs().argmax(1)]


@misconception(
    "hard_lookup",
    "The worst key answers: you looked for the smallest dot product.",
)
def hard_lookup__smallest(q, keys, values):
    return values[_products(q, keys, values).argmin(1)]


@misconception(
    "hard_lookup",
    "Of equally good keys the last one answers. The promise is the first.",
)
def hard_lookup__last_of_equals(q, keys, values):
    scores = _products(q, keys, values)
    return values[len(keys) - 1 - scores.flip(1).argmax(1)]


@misconception(
    "hard_lookup",
    "Equally good keys share the answer: that is a mean of values, and no entry of the memory holds it. Here the first one wins.",
)
def hard_lookup__equals_share(q, keys, values):
    scores = _products(q, keys, values)
    best = scores == scores.amax(1, keepdim=True)
    shared = torch.stack([values[row].double().mean(0) for row in best]) if len(q) else values[:0]
    single = values[scores.argmax(1)]
    return torch.where(best.sum(1, keepdim=True) > 1, shared.to(values.dtype), single)


@misconception(
    "hard_lookup",
    "A one-hot row times the values touches every value: 0 times inf is NaN, and integers do not survive the product. Pick the row "
    "instead of computing it.",
)
def hard_lookup__one_hot_product(q, keys, values):
    choice = F.one_hot(_products(q, keys, values).argmax(1), len(keys))
    kind = values.dtype if values.is_floating_point() else torch.float32
    return choice.to(kind) @ values.to(kind)


@misconception(
    "hard_lookup",
    "With one query, the result is a window onto `values`: whoever writes into the answer rewrites the memory.",
)
def hard_lookup__view(q, keys, values):
    best = _products(q, keys, values).argmax(1)
    if len(best) == 1:
        return values[int(best) : int(best) + 1]
    return values[best]


@misconception(
    "hard_lookup",
    "The dot products were computed in half precision, where 256 and 257 are the same number, so the wrong key can win. Compare "
    "in float32.",
)
def hard_lookup__half_scores(q, keys, values):
    _check_memory(q, keys, values)
    return values[(q @ keys.T).argmax(1)]


@misconception(
    "hard_lookup",
    "These are keys, not values. The key only says whether the entry fits; what the entry has to say is its value.",
)
def hard_lookup__returns_keys(q, keys, values):
    return keys[_products(q, keys, values).argmax(1)]


@misconception(
    "hard_lookup",
    "Queries were compared with the values. The values are what comes out; whether an entry is meant is written in its key.",
)
def hard_lookup__asks_the_values(q, keys, values):
    _check_memory(q, keys, values)
    asked = values if values.shape[1] == q.shape[1] and values.dtype == q.dtype else keys
    return values[(_wide(q) @ _wide(asked).T).argmax(1)]


@misconception(
    "hard_lookup",
    "You return which entry is best, not what it says.",
)
def hard_lookup__index(q, keys, values):
    return _products(q, keys, values).argmax(1)


@misconception(
    "hard_lookup",
    "The argmax runs over the queries: each key chose a query, and there are N answers. Each query has to choose a key.",
)
def hard_lookup__over_queries(q, keys, values):
    scores = _products(q, keys, values)
    if not len(q):
        return values[:0]
    best = scores.argmax(0)
    return values[best.clamp(max=len(values) - 1)]


@misconception(
    "hard_lookup",
    "An empty memory ends in some error of torch's. Say with a ValueError that there is nothing to look up.",
)
def hard_lookup__empty_memory(q, keys, values):
    if len(keys):
        _check_memory(q, keys, values)
    elif q.shape[1] != keys.shape[1] or len(values):
        raise ValueError(f"{tuple(q.shape)} {tuple(keys.shape)} {tuple(values.shape)}")
    return values[(_wide(q) @ _wide(keys).T).argmax(1)]


@misconception(
    "hard_lookup",
    "More values than keys passed without a word, and some of them can never be found. Compare the two numbers first.",
)
def hard_lookup__counts_unchecked(q, keys, values):
    _check_memory(q, keys, keys)
    return values[(_wide(q) @ _wide(keys).T).argmax(1)]


# soft_lookup


def _checked(q, keys, values, temperature):
    _check_memory(q, keys, values)
    if not temperature > 0:
        raise ValueError(f"{temperature}")


def _behind(q, keys):
    scores = _wide(q) @ _wide(keys).T
    return scores - scores.amax(1, keepdim=True)


def _mixed(q, weights, values):
    return (weights @ _wide(values)).to(q.dtype), weights.to(q.dtype)


@misconception(
    "soft_lookup",
    "It is the columns of your weights that sum to 1: every key spreads itself over the queries. Each query has a weight of 1 to "
    "give away, along the last axis.",
)
def soft_lookup__over_queries(q, keys, values, temperature=1.0):
    _checked(q, keys, values, temperature)
    return _mixed(q, softmax(_wide(q) @ _wide(keys).T / temperature, 0), values)


@misconception(
    "soft_lookup",
    "Your weights change with the values. The query asks, the key advertises, the value answers: what an entry says has no part in "
    "whether it is chosen.",
)
def soft_lookup__asks_the_values(q, keys, values, temperature=1.0):
    _checked(q, keys, values, temperature)
    asked = values if values.shape[1] == q.shape[1] else keys
    return _mixed(q, softmax(_behind(q, asked) / temperature), values)


@misconception(
    "soft_lookup",
    "The keys are mixed, not the values: the answer repeats what the query asked for.",
)
def soft_lookup__mixes_keys(q, keys, values, temperature=1.0):
    _checked(q, keys, values, temperature)
    return _mixed(q, softmax(_behind(q, keys) / temperature), keys)


@misconception(
    "soft_lookup",
    "The scores themselves were divided by their sum. Scores can be negative, and then the weights are negative or huge: make "
    "them positive first, with an exponential.",
)
def soft_lookup__divides_by_the_sum(q, keys, values, temperature=1.0):
    _checked(q, keys, values, temperature)
    scores = _wide(q) @ _wide(keys).T / temperature
    return _mixed(q, scores / scores.sum(1, keepdim=True), values)


@misconception(
    "soft_lookup",
    "Your exponentials were not divided by their sum, so a query gives away more or less than 1.",
)
def soft_lookup__not_normalized(q, keys, values, temperature=1.0):
    _checked(q, keys, values, temperature)
    return _mixed(q, (_behind(q, keys) / temperature).exp(), values)


@misconception(
    "soft_lookup",
    "The values were normalized, too. Weights are shares and sum to 1; values are data, and come out in the size that they have.",
)
def soft_lookup__normalizes_values(q, keys, values, temperature=1.0):
    _checked(q, keys, values, temperature)
    return _mixed(q, softmax(_behind(q, keys) / temperature), F.normalize(_wide(values), dim=1))


@misconception(
    "soft_lookup",
    "Your scores are cosines: queries and keys were brought to length 1. These are plain dot products.",
)
def soft_lookup__cosine(q, keys, values, temperature=1.0):
    _checked(q, keys, values, temperature)
    behind = _behind(F.normalize(_wide(q), dim=1), F.normalize(_wide(keys), dim=1))
    return _mixed(q, softmax(behind / temperature), values)


@misconception(
    "soft_lookup",
    "The scores were divided by sqrt(D) as well. That is tomorrow's formula; today the temperature alone divides them.",
)
def soft_lookup__scaled(q, keys, values, temperature=1.0):
    _checked(q, keys, values, temperature)
    return _mixed(q, softmax(_behind(q, keys) * q.shape[1] ** -0.5 / temperature), values)


@misconception(
    "soft_lookup",
    "The temperature is not used: hot or cold, the weights are the same.",
)
def soft_lookup__ignores_temperature(q, keys, values, temperature=1.0):
    _checked(q, keys, values, temperature)
    return _mixed(q, softmax(_behind(q, keys)), values)


@misconception(
    "soft_lookup",
    "Your temperature multiplies. What is hot should be flat, so the scores are divided by it.",
)
def soft_lookup__multiplies(q, keys, values, temperature=1.0):
    _checked(q, keys, values, temperature)
    behind = _behind(q, keys)
    return _mixed(q, softmax(behind * temperature) if temperature < 1e20 else (behind == 0).to(behind), values)


@misconception(
    "soft_lookup",
    "The temperature came after the softmax: the weights no longer sum to 1, and they are as sharp as before.",
)
def soft_lookup__temperature_afterwards(q, keys, values, temperature=1.0):
    _checked(q, keys, values, temperature)
    return _mixed(q, softmax(_behind(q, keys)) / temperature, values)


@misconception(
    "soft_lookup",
    "In the cold your scores become infinite, and inf - inf is NaN. Subtract the largest score before you divide by the temperature: "
    "then the best is 0 and the others can only fall.",
)
def soft_lookup__divides_first(q, keys, values, temperature=1.0):
    _checked(q, keys, values, temperature)
    return _mixed(q, softmax(_wide(q) @ _wide(keys).T / temperature), values)


@misconception(
    "soft_lookup",
    "The exponential of a score of 10,000 is infinite, and inf / inf is NaN. Only differences of scores matter, so subtract the "
    "largest first.",
)
def soft_lookup__overflows(q, keys, values, temperature=1.0):
    _checked(q, keys, values, temperature)
    exponentials = (_wide(q) @ _wide(keys).T / temperature).exp()
    return _mixed(q, exponentials / exponentials.sum(1, keepdim=True), values)


@misconception(
    "soft_lookup",
    "Only the best key is heard. An argmax has no slope, so nothing would ever be learned through it: that is why the lookup is "
    "soft.",
)
def soft_lookup__hard(q, keys, values, temperature=1.0):
    _checked(q, keys, values, temperature)
    scores = _wide(q) @ _wide(keys).T
    return _mixed(q, F.one_hot(scores.argmax(1), len(keys)).to(scores), values)


@misconception(
    "soft_lookup",
    "The weights are cut off from q and keys, so no gradient tells them how to ask and to advertise better.",
)
def soft_lookup__detached(q, keys, values, temperature=1.0):
    _checked(q, keys, values, temperature)
    return _mixed(q, softmax(_behind(q, keys) / temperature).detach(), values)


@misconception(
    "soft_lookup",
    "The weights were rounded to half precision before they met the values. Round once, at the end.",
)
def soft_lookup__rounds_the_weights(q, keys, values, temperature=1.0):
    _checked(q, keys, values, temperature)
    weights = softmax(_behind(q, keys) / temperature).to(q.dtype)
    return (_wide(weights) @ _wide(values)).to(q.dtype), weights


@misconception(
    "soft_lookup",
    "float64 went through float32 on the way: half of its digits are gone.",
)
def soft_lookup__always_float(q, keys, values, temperature=1.0):
    out, weights = right_lookup(q.float(), keys.float(), values.float(), temperature)
    return out.to(q.dtype), weights.to(q.dtype)


@misconception(
    "soft_lookup",
    "A temperature of 0 or below was accepted. At 0 there is a division by zero, and below it the worst key wins.",
)
def soft_lookup__any_temperature(q, keys, values, temperature=1.0):
    _check_memory(q, keys, values)
    if temperature != temperature:
        raise ValueError(f"{temperature}")
    return _mixed(q, softmax(_behind(q, keys) / (temperature or 1.0)), values)


@misconception(
    "soft_lookup",
    "NaN as a temperature got through: it is neither above 0 nor not, so `temperature <= 0` does not notice it.",
)
def soft_lookup__nan_temperature(q, keys, values, temperature=1.0):
    _check_memory(q, keys, values)
    if temperature <= 0:
        raise ValueError(f"{temperature}")
    return _mixed(q, softmax(_behind(q, keys) / temperature), values)


@misconception(
    "soft_lookup",
    "Out and weights come in the wrong order.",
)
def soft_lookup__weights_first(q, keys, values, temperature=1.0):
    return right_lookup(q, keys, values, temperature)[::-1]


# kernel_regression


def _pairs(x, y, bandwidth):
    if x.shape != y.shape or not len(x):
        raise ValueError(f"{tuple(x.shape)} {tuple(y.shape)}")
    if not bandwidth > 0:
        raise ValueError(f"{bandwidth}")


def _smooth(xq, x, y, scores):
    return (softmax(scores(_wide(xq)[:, None] - _wide(x))) @ _wide(y)).to(xq.dtype)


@misconception(
    "kernel_regression",
    "The bandwidth does not enter: the kernel has the same width whatever was asked for. It belongs into the exponent, as "
    "1 / (2 h^2).",
)
def kernel_regression__no_bandwidth(xq, x, y, bandwidth):
    _pairs(x, y, bandwidth)
    return _smooth(xq, x, y, lambda d: -d.square() / 2)


@misconception(
    "kernel_regression",
    "The bandwidth is not squared. It is a length like xq - x, and the exponent must not depend on the unit of length.",
)
def kernel_regression__not_squared(xq, x, y, bandwidth):
    _pairs(x, y, bandwidth)
    return _smooth(xq, x, y, lambda d: -d.square() / (2 * bandwidth))


@misconception(
    "kernel_regression",
    "The 2 in the exponent is missing: your kernel is narrower than the one that was asked for, by sqrt(2).",
)
def kernel_regression__no_two(xq, x, y, bandwidth):
    _pairs(x, y, bandwidth)
    return _smooth(xq, x, y, lambda d: -(d / bandwidth).square())


@misconception(
    "kernel_regression",
    "Your exponent is multiplied by h^2 / 2. Division was meant: a larger bandwidth makes a flatter kernel.",
)
def kernel_regression__multiplies(xq, x, y, bandwidth):
    _pairs(x, y, bandwidth)
    return _smooth(xq, x, y, lambda d: -(d * bandwidth).square() / 2)


@misconception(
    "kernel_regression",
    "The distance is not squared: this is the kernel of Laplace, with a peak at each point. A Gaussian falls with the square.",
)
def kernel_regression__laplace(xq, x, y, bandwidth):
    _pairs(x, y, bandwidth)
    return _smooth(xq, x, y, lambda d: -(d / bandwidth).abs())


@misconception(
    "kernel_regression",
    "The minus is missing, so the farthest points weigh most.",
)
def kernel_regression__far_is_near(xq, x, y, bandwidth):
    _pairs(x, y, bandwidth)
    return _smooth(xq, x, y, lambda d: (d / bandwidth).square() / 2)


@misconception(
    "kernel_regression",
    "Similarity was taken as the product of xq and x. Here near is similar: with a product, the largest x always wins.",
)
def kernel_regression__product(xq, x, y, bandwidth):
    _pairs(x, y, bandwidth)
    scores = _wide(xq)[:, None] * _wide(x) / bandwidth**2
    return (softmax(scores) @ _wide(y)).to(xq.dtype)


@misconception(
    "kernel_regression",
    "Far from all data your exponentials are all 0, and 0 / 0 is NaN. Their ratios are still there: stay with the exponents until "
    "the largest has been subtracted.",
)
def kernel_regression__zero_by_zero(xq, x, y, bandwidth):
    _pairs(x, y, bandwidth)
    kernel = (-((_wide(xq)[:, None] - _wide(x)) / bandwidth).square() / 2).exp()
    return ((kernel @ _wide(y)) / kernel.sum(1)).to(xq.dtype)


@misconception(
    "kernel_regression",
    "A small number in the denominator hides 0 / 0, and far away the mean becomes 0, which no point has said. Subtract the largest "
    "exponent before you exponentiate.",
)
def kernel_regression__epsilon(xq, x, y, bandwidth):
    _pairs(x, y, bandwidth)
    kernel = (-((_wide(xq)[:, None] - _wide(x)) / bandwidth).square() / 2).exp()
    return ((kernel @ _wide(y)) / (kernel.sum(1) + 1e-12)).to(xq.dtype)


@misconception(
    "kernel_regression",
    "This is a sum over the kernel, not a mean: the weights of a query do not sum to 1, so even constant y do not come back.",
)
def kernel_regression__not_normalized(xq, x, y, bandwidth):
    _pairs(x, y, bandwidth)
    kernel = (-((_wide(xq)[:, None] - _wide(x)) / bandwidth).square() / 2).exp()
    return (kernel @ _wide(y)).to(xq.dtype)


@misconception(
    "kernel_regression",
    "You averaged with the density of the Gaussian, divided by the number of points. What makes it a mean is the sum of the weights.",
)
def kernel_regression__density(xq, x, y, bandwidth):
    _pairs(x, y, bandwidth)
    kernel = (-((_wide(xq)[:, None] - _wide(x)) / bandwidth).square() / 2).exp()
    return (kernel @ _wide(y) / (len(x) * bandwidth * (2 * torch.pi) ** 0.5)).to(xq.dtype)


@misconception(
    "kernel_regression",
    "The softmax runs over the queries: each point spreads itself over the places. Each place takes a mean over the points.",
)
def kernel_regression__over_queries(xq, x, y, bandwidth):
    _pairs(x, y, bandwidth)
    scores = -((_wide(xq)[:, None] - _wide(x)) / bandwidth).square() / 2
    return (softmax(scores, 0) @ _wide(y)).to(xq.dtype)


@misconception(
    "kernel_regression",
    "The nearest point alone decides. Near ones have a say, too, and how far it reaches is what the bandwidth says.",
)
def kernel_regression__nearest(xq, x, y, bandwidth):
    _pairs(x, y, bandwidth)
    return y[(_wide(xq)[:, None] - _wide(x)).abs().argmin(1)]


@misconception(
    "kernel_regression",
    "Distances were squared in half precision, where 400 squared is infinite and 1/3 has three digits. Compute in float32 and round "
    "once, at the end.",
)
def kernel_regression__half(xq, x, y, bandwidth):
    _pairs(x, y, bandwidth)
    return softmax(-((xq[:, None] - x) / bandwidth).square() / 2) @ y


@misconception(
    "kernel_regression",
    "A single y was stretched over all x, or a single x over all y. They are pairs: x and y have the same shape.",
)
def kernel_regression__stretches(xq, x, y, bandwidth):
    if not len(x):
        raise ValueError(f"{tuple(x.shape)}")
    if x.shape != y.shape and 1 not in (len(x), len(y)):
        raise ValueError(f"{tuple(x.shape)} {tuple(y.shape)}")
    x, y = torch.broadcast_tensors(x, y)
    _pairs(x, y, bandwidth)
    return _smooth(xq, x, y, lambda d: -(d / bandwidth).square() / 2)


@misconception(
    "kernel_regression",
    "A bandwidth of 0 or below was accepted. Squared, a negative one looks fine, and nobody will find the mistake that made it.",
)
def kernel_regression__any_bandwidth(xq, x, y, bandwidth):
    _pairs(x, y, 1.0)
    return _smooth(xq, x, y, lambda d: -(d / bandwidth).square() / 2)


# additive_scores


def _fits_width(x, w):
    if x.shape[-1] != w.shape[1]:
        raise ValueError(f"{tuple(x.shape)} {tuple(w.shape)}")


def _fits(q, k, w_q, w_k, v):
    _fits_width(q, w_q)
    _fits_width(k, w_k)
    if w_q.shape[:1] != v.shape:
        raise ValueError(f"{tuple(w_q.shape)} {tuple(v.shape)}")
    if w_k.shape[:1] != v.shape:
        raise ValueError(f"{tuple(w_k.shape)} {tuple(v.shape)}")
    return (q @ w_q.T)[..., :, None, :], (k @ w_k.T)[..., None, :, :]


@misconception(
    "additive_scores",
    "Without a tanh the score is a number of the query plus a number of the key. A softmax does not see what is added to a whole row: "
    "every query would get the same weights.",
)
def additive_scores__no_tanh(q, k, w_q, w_k, v):
    a, b = _fits(q, k, w_q, w_k, v)
    return (a + b) @ v


@misconception(
    "additive_scores",
    "tanh was taken of query and key apart, and then added: again a number of the query plus a number of the key, which do not "
    "meet. It is the sum that goes through tanh.",
)
def additive_scores__tanh_apart(q, k, w_q, w_k, v):
    a, b = _fits(q, k, w_q, w_k, v)
    return (a.tanh() + b.tanh()) @ v


@misconception(
    "additive_scores",
    "Projected queries and keys were multiplied. That is a dot product score; this one adds.",
)
def additive_scores__product(q, k, w_q, w_k, v):
    a, b = _fits(q, k, w_q, w_k, v)
    return (a * b).tanh() @ v


@misconception(
    "additive_scores",
    "v weighs before the tanh. It weighs what comes out of it: between -1 and 1 there are A numbers, and v sums them up.",
)
def additive_scores__v_inside(q, k, w_q, w_k, v):
    a, b = _fits(q, k, w_q, w_k, v)
    return ((a + b) @ v).tanh()


@misconception(
    "additive_scores",
    "The A numbers are summed up without v.",
)
def additive_scores__ignores_v(q, k, w_q, w_k, v):
    a, b = _fits(q, k, w_q, w_k, v)
    return (a + b).tanh().sum(-1)


@misconception(
    "additive_scores",
    "This is relu, not tanh.",
)
def additive_scores__relu(q, k, w_q, w_k, v):
    a, b = _fits(q, k, w_q, w_k, v)
    return (a + b).relu() @ v


@misconception(
    "additive_scores",
    "Rows are keys and columns are queries. The scores of one query are a row: (..., Q, N).",
)
def additive_scores__transposed(q, k, w_q, w_k, v):
    a, b = _fits(q, k, w_q, w_k, v)
    return ((a + b).tanh() @ v).mT


@misconception(
    "additive_scores",
    "Query i met only key i. Each query has to meet each key: give the two an axis of their own.",
)
def additive_scores__in_pairs(q, k, w_q, w_k, v):
    a, b = _fits(q, k, w_q, w_k, v)
    Q, N = a.shape[-3], b.shape[-2]
    shorter = (a.squeeze(-2)[..., : min(Q, N), :] + b.squeeze(-3)[..., : min(Q, N), :]).tanh() @ v
    return shorter[..., None, :].expand(*shorter.shape[:-1], Q, shorter.shape[-1]).contiguous()


@misconception(
    "additive_scores",
    "The scores were already divided by their scale or turned into weights. Scores are any numbers; the softmax comes after them.",
)
def additive_scores__softmax(q, k, w_q, w_k, v):
    scores = right_scores(q, k, w_q, w_k, v)
    return softmax(scores) if scores.numel() else scores


@misconception(
    "additive_scores",
    "Each query was multiplied by its matrix again for every key, N times over. The sum inside the tanh has two parts: compute each of "
    "them once and let broadcasting pair them.",
)
def additive_scores__joined(q, k, w_q, w_k, v):
    _fits(q, k, w_q, w_k, v)
    lead = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2])
    Q, N = q.shape[-2], k.shape[-2]
    pairs = torch.cat(
        [q[..., :, None, :].expand(*lead, Q, N, q.shape[-1]), k[..., None, :, :].expand(*lead, Q, N, k.shape[-1])], -1
    )
    return (pairs @ torch.cat([w_q, w_k], 1).T).tanh() @ v


@misconception(
    "additive_scores",
    "Multiplying by v and summing up makes a third tensor of the size Q*N*A. A product with a vector does both at once.",
)
def additive_scores__third_tensor(q, k, w_q, w_k, v):
    a, b = _fits(q, k, w_q, w_k, v)
    return ((a + b).tanh() * v).sum(-1)


@misconception(
    "additive_scores",
    "A weight with a single row was stretched over all A numbers. Compare the rows of both weights with v before you add.",
)
def additive_scores__stretches_weights(q, k, w_q, w_k, v):
    _fits_width(q, w_q)
    _fits_width(k, w_k)
    if v.shape != w_q.shape[:1] and len(w_q) != 1:
        raise ValueError(f"{tuple(v.shape)} {tuple(w_q.shape)}")
    if v.shape != w_k.shape[:1] and len(w_k) != 1:
        raise ValueError(f"{tuple(v.shape)} {tuple(w_k.shape)}")
    hidden = (q @ w_q.T)[..., :, None, :] + (k @ w_k.T)[..., None, :, :]
    return (hidden.tanh() * v).sum(-1) if len(w_q) == 1 and len(w_k) == 1 else hidden.tanh() @ v


# attend


def _whole(scores, values, mask):
    if scores.shape[-1] != values.shape[-2]:
        raise ValueError(f"{tuple(scores.shape)} {tuple(values.shape)}")
    if mask is not None:
        masked_softmax(scores, mask)  # raises if the mask does not fit


def _finish(scores, weights, values):
    return (weights @ _wide(values)).to(scores.dtype), weights.to(scores.dtype)


@misconception(
    "attend",
    "Hidden scores were multiplied by 0. A score of 0 is an ordinary score, exp(0) = 1, and among low scores it even wins: hidden "
    "keys have to be left out.",
)
def attend__mask_times_scores(scores, values, mask=None):
    _whole(scores, values, mask)
    shown = _wide(scores) if mask is None else _wide(scores) * mask
    return _finish(scores, masked_softmax(shown, None), values)


@misconception(
    "attend",
    "The mask came after the softmax: the weights that are left do not sum to 1, because hidden keys had taken their share.",
)
def attend__mask_afterwards(scores, values, mask=None):
    _whole(scores, values, mask)
    weights = masked_softmax(_wide(scores), None)
    return _finish(scores, weights if mask is None else weights.masked_fill(~mask, 0.0), values)


@misconception(
    "attend",
    "Just the hidden keys are attended to. True means: may attend.",
)
def attend__true_hides(scores, values, mask=None):
    _whole(scores, values, mask)
    return _finish(scores, masked_softmax(_wide(scores), None if mask is None else ~mask), values)


@misconception(
    "attend",
    "The mask is not used: hidden keys have weights like all others.",
)
def attend__ignores_the_mask(scores, values, mask=None):
    _whole(scores, values, mask)
    return _finish(scores, masked_softmax(_wide(scores), None), values)


@misconception(
    "attend",
    "The mask was added to the scores as it is, so hidden keys only weigh e times less.",
)
def attend__mask_plus_scores(scores, values, mask=None):
    _whole(scores, values, mask)
    shown = _wide(scores) if mask is None else _wide(scores) + mask
    return _finish(scores, masked_softmax(shown, None), values)


@misconception(
    "attend",
    "A query that may attend to nothing gives NaN: all of its scores are -inf, and there is nothing to divide by. It should get zeros.",
)
def attend__nan_for_nothing(scores, values, mask=None):
    _whole(scores, values, mask)
    shown = _wide(scores) if mask is None else _wide(scores).masked_fill(~mask, -torch.inf)
    return _finish(scores, shown.softmax(-1), values)


@misconception(
    "attend",
    "Forward is repaired, backward is not: nan_to_num comes after the softmax, and the NaN of an empty row still travels back. The "
    "row must not become NaN in the first place.",
)
def attend__repaired_forward(scores, values, mask=None):
    _whole(scores, values, mask)
    shown = _wide(scores)
    if mask is not None:
        shown = shown + torch.zeros_like(shown).masked_fill(~mask, -torch.inf)
    return _finish(scores, shown.softmax(-1).nan_to_num(0.0), values)


@misconception(
    "attend",
    "-1e9 is only a low score. In an empty row all scores are equally low and the hidden keys share the weight, and an allowed key "
    "below it loses against hidden ones.",
)
def attend__minus_a_billion(scores, values, mask=None):
    _whole(scores, values, mask)
    shown = _wide(scores) if mask is None else _wide(scores).masked_fill(~mask, -1e9)
    return _finish(scores, masked_softmax(shown, None), values)


@misconception(
    "attend",
    "-1e9 is only a low score: an allowed key below it loses against the hidden ones, whose weight you then remove.",
)
def attend__minus_a_billion_repaired(scores, values, mask=None):
    _whole(scores, values, mask)
    if mask is None:
        return _finish(scores, masked_softmax(_wide(scores), None), values)
    weights = masked_softmax(_wide(scores).masked_fill(~mask, -1e9), None)
    return _finish(scores, weights.masked_fill(~mask, 0.0), values)


@misconception(
    "attend",
    "The weights sum to 1 over the queries. Each query distributes 1 over the keys: the last axis.",
)
def attend__over_queries(scores, values, mask=None):
    _whole(scores, values, mask)
    return _finish(scores, masked_softmax(_wide(scores), mask, -2), values)


@misconception(
    "attend",
    "The values are weighed, but not by the softmax: these are the scores themselves, divided by their sum. Negative scores make "
    "negative weights.",
)
def attend__divides_by_the_sum(scores, values, mask=None):
    _whole(scores, values, mask)
    shown = _wide(scores) if mask is None else _wide(scores).masked_fill(~mask, 0.0)
    total = shown.sum(-1, keepdim=True)
    return _finish(scores, shown / total.masked_fill(total == 0, 1.0), values)


@misconception(
    "attend",
    "The exponential of a large score is infinite, and inf / inf is NaN. Subtract the largest allowed score first.",
)
def attend__overflows(scores, values, mask=None):
    _whole(scores, values, mask)
    exponentials = _wide(scores).exp()
    if mask is not None:
        exponentials = exponentials.masked_fill(~mask, 0.0)
    total = exponentials.sum(-1, keepdim=True)
    return _finish(scores, exponentials / total.masked_fill(total == 0, 1.0), values)


@misconception(
    "attend",
    "Half weights were rounded before they met the values. Stay in float32 and round out and weights once, at the end.",
)
def attend__rounds_the_weights(scores, values, mask=None):
    _whole(scores, values, mask)
    weights = masked_softmax(scores, mask)
    return (_wide(weights) @ _wide(values)).to(scores.dtype), weights


@misconception(
    "attend",
    "The weights are cut off from the scores: no gradient tells a query what to look for.",
)
def attend__detached(scores, values, mask=None):
    _whole(scores, values, mask)
    return _finish(scores, masked_softmax(_wide(scores), mask).detach(), values)


@misconception(
    "attend",
    "A mask with more axes or longer ones made the scores larger than they are. A mask may be stretched, never the scores.",
)
def attend__stretches_the_scores(scores, values, mask=None):
    if mask is not None:
        try:
            scores = scores.expand(torch.broadcast_shapes(scores.shape, mask.shape))
        except RuntimeError as error:
            raise ValueError(f"{tuple(scores.shape)} {tuple(mask.shape)}") from error
    return right_attend(scores, values, mask)


@misconception(
    "attend",
    "A single value was shared by all keys, or a single weight by all values. Scores and values must have the same number of keys.",
)
def attend__stretches_the_keys(scores, values, mask=None):
    N = max(scores.shape[-1], values.shape[-2])
    if scores.shape[-1] == 1 or values.shape[-2] == 1:
        scores = scores.expand(*scores.shape[:-1], N)
        values = values.expand(*values.shape[:-2], N, values.shape[-1])
    return right_attend(scores, values, mask)


# BahdanauAttention


def _refuse(module, query, enc, lengths):
    if query.shape[-1] != module.q_proj.weight.shape[1]:
        raise ValueError(f"{tuple(query.shape)} {tuple(module.q_proj.weight.shape)}")
    if enc.shape[-1] != module.k_proj.weight.shape[1]:
        raise ValueError(f"{tuple(enc.shape)} {tuple(module.k_proj.weight.shape)}")
    if len(query) != len(enc):
        raise ValueError(f"{tuple(query.shape)} {tuple(enc.shape)}")
    if lengths.shape != enc.shape[:1]:
        raise ValueError(f"{tuple(lengths.shape)} {tuple(enc.shape)}")


def _scores_of(module, query, enc):
    return module.score_proj((module.q_proj(query)[:, None] + module.k_proj(enc)).tanh())[..., 0]


def _contexts(weights, enc):
    return (weights[..., None] * enc).sum(1), weights


@misconception(
    "BahdanauAttention",
    "Padding takes part: its states have weights. `lengths` says how many places of a row are real.",
)
class BahdanauAttention__no_mask(Right):
    def forward(self, query, enc, lengths):
        _refuse(self, query, enc, lengths)
        return _contexts(masked_softmax(_scores_of(self, query, enc), None), enc)


@misconception(
    "BahdanauAttention",
    "The scores of padding are 0, and 0 is an ordinary score: padding still takes its share of the weight.",
)
class BahdanauAttention__padding_scores_zero(Right):
    def forward(self, query, enc, lengths):
        _refuse(self, query, enc, lengths)
        scores = _scores_of(self, query, enc) * sequence_mask(lengths, enc.shape[1])
        return _contexts(masked_softmax(scores, None), enc)


@misconception(
    "BahdanauAttention",
    "The states of padding were set to 0, but a state of zeros has a score like any other, and takes weight away from the real ones.",
)
class BahdanauAttention__padding_states_zero(Right):
    def forward(self, query, enc, lengths):
        _refuse(self, query, enc, lengths)
        enc = enc * sequence_mask(lengths, enc.shape[1])[..., None]
        return _contexts(masked_softmax(_scores_of(self, query, enc), None), enc)


@misconception(
    "BahdanauAttention",
    "Padding was removed after the softmax: the weights of the real places no longer sum to 1.",
)
class BahdanauAttention__mask_afterwards(Right):
    def forward(self, query, enc, lengths):
        _refuse(self, query, enc, lengths)
        weights = masked_softmax(_scores_of(self, query, enc), None)
        return _contexts(weights * sequence_mask(lengths, enc.shape[1]), enc)


@misconception(
    "BahdanauAttention",
    "One place of padding takes part in each row: the last real place is lengths - 1.",
)
class BahdanauAttention__one_too_many(Right):
    def forward(self, query, enc, lengths):
        _refuse(self, query, enc, lengths)
        mask = sequence_mask(lengths + 1, enc.shape[1])
        return _contexts(masked_softmax(_scores_of(self, query, enc), mask), enc)


@misconception(
    "BahdanauAttention",
    "A row of length 0 gives NaN: a softmax over nothing has nothing to divide by. It gets zeros.",
)
class BahdanauAttention__nan_for_nothing(Right):
    def forward(self, query, enc, lengths):
        _refuse(self, query, enc, lengths)
        scores = _scores_of(self, query, enc).masked_fill(~sequence_mask(lengths, enc.shape[1]), -torch.inf)
        return _contexts(scores.softmax(-1), enc)


@misconception(
    "BahdanauAttention",
    "An empty row shares its weight among the padding: -1e9 everywhere is the same as 0 everywhere.",
)
class BahdanauAttention__minus_a_billion(Right):
    def forward(self, query, enc, lengths):
        _refuse(self, query, enc, lengths)
        scores = _scores_of(self, query, enc).float() if query.dtype.itemsize < 4 else _scores_of(self, query, enc)
        scores = scores.masked_fill(~sequence_mask(lengths, enc.shape[1]), -1e9)
        return _contexts(masked_softmax(scores, None).to(query.dtype), enc)


@misconception(
    "BahdanauAttention",
    "The weights sum to 1 over the batch. Each row of the batch is a sentence of its own: the softmax runs over its places.",
)
class BahdanauAttention__over_the_batch(Right):
    def forward(self, query, enc, lengths):
        _refuse(self, query, enc, lengths)
        mask = sequence_mask(lengths, enc.shape[1])
        return _contexts(masked_softmax(_scores_of(self, query, enc), mask, 0), enc)


@misconception(
    "BahdanauAttention",
    "There is no tanh between the projections and the score, so the query adds the same number to all places of a row, and the softmax "
    "takes it out again: it is not heard at all.",
)
class BahdanauAttention__no_tanh(Right):
    def forward(self, query, enc, lengths):
        _refuse(self, query, enc, lengths)
        scores = self.score_proj(self.q_proj(query)[:, None] + self.k_proj(enc))[..., 0]
        return _contexts(masked_softmax(scores, sequence_mask(lengths, enc.shape[1])), enc)


@misconception(
    "BahdanauAttention",
    "The query has no part in the scores: whatever the decoder is about to say, it looks at the same places.",
)
class BahdanauAttention__query_unused(Right):
    def forward(self, query, enc, lengths):
        _refuse(self, query, enc, lengths)
        scores = self.score_proj(self.k_proj(enc).tanh())[..., 0] + 0 * query.sum()
        return _contexts(masked_softmax(scores, sequence_mask(lengths, enc.shape[1])), enc)


@misconception(
    "BahdanauAttention",
    "The projections were mixed, not the states: the context has the width of the scorer. The projection only serves the score.",
)
class BahdanauAttention__mixes_projections(Right):
    def forward(self, query, enc, lengths):
        _refuse(self, query, enc, lengths)
        weights = masked_softmax(_scores_of(self, query, enc), sequence_mask(lengths, enc.shape[1]))
        return _contexts(weights, self.k_proj(enc))[0], weights


@misconception(
    "BahdanauAttention",
    "The axis of the single query is still there: context is (B, De) and weights are (B, T).",
)
class BahdanauAttention__extra_axis(Right):
    def forward(self, query, enc, lengths):
        context, weights = super().forward(query, enc, lengths)
        return context[:, None], weights[:, None]


@misconception(
    "BahdanauAttention",
    "The context comes first, then the weights.",
)
class BahdanauAttention__weights_first(Right):
    def forward(self, query, enc, lengths):
        return super().forward(query, enc, lengths)[::-1]


@misconception(
    "BahdanauAttention",
    "The layers have biases. The task asks for three weights and nothing else.",
)
class BahdanauAttention__biases(Right):
    def __init__(self, d_query, d_enc, d_attn):
        super().__init__(d_query, d_enc, d_attn)
        self.q_proj, self.k_proj = Linear(d_query, d_attn), Linear(d_enc, d_attn)


@misconception(
    "BahdanauAttention",
    "Queries and states have the wrong layer each: q_proj reads what is d_query wide, k_proj what is d_enc wide.",
)
class BahdanauAttention__layers_swapped(Right):
    def __init__(self, d_query, d_enc, d_attn):
        super().__init__(d_enc, d_query, d_attn)

    def forward(self, query, enc, lengths):
        self.q_proj, self.k_proj = self.k_proj, self.q_proj
        try:
            return super().forward(query, enc, lengths)
        finally:
            self.q_proj, self.k_proj = self.k_proj, self.q_proj


@misconception(
    "BahdanauAttention",
    "The scorer is not a parameter: a vector that is kept as a plain attribute is neither trained, nor saved, nor moved to another "
    "device.",
)
class BahdanauAttention__plain_vector(nn.Module):
    def __init__(self, d_query, d_enc, d_attn):
        super().__init__()
        self.q_proj, self.k_proj = Linear(d_query, d_attn, bias=False), Linear(d_enc, d_attn, bias=False)
        self.v = torch.ones(d_attn)

    def forward(self, query, enc, lengths):
        _refuse(self, query, enc, lengths)
        scores = (self.q_proj(query)[:, None] + self.k_proj(enc)).tanh() @ self.v.to(enc)
        return _contexts(masked_softmax(scores, sequence_mask(lengths, enc.shape[1])), enc)


@misconception(
    "BahdanauAttention",
    "A single query was stretched over the whole batch, or a single sentence over all queries. Rows belong together: refuse "
    "batches that differ.",
)
class BahdanauAttention__stretches_the_batch(Right):
    def forward(self, query, enc, lengths):
        if lengths.shape != enc.shape[:1]:
            raise ValueError(f"{tuple(lengths.shape)} {tuple(enc.shape)}")
        if len(query) != len(enc) and 1 not in (len(query), len(enc)):
            raise ValueError(f"{tuple(query.shape)} {tuple(enc.shape)}")
        B = max(len(query), len(enc)) if len(enc) else 0
        query, enc = query.expand(B, -1), enc.expand(B, -1, -1)
        return super().forward(query, enc, lengths.expand(B))


# induction_lookup


def _induced(tokens, n_vocab, matches, answers=None):
    """Mix `answers` (T, V) over the places that match, zeros if none does."""
    answers = F.one_hot(tokens, n_vocab).float() if answers is None else answers
    count = matches.sum(1, keepdim=True)
    return matches.float() @ answers / count.clamp(min=1)


def _matches(tokens):
    """Whether place j comes after an occurrence of the token at place t, and not after place t: (T, T)."""
    T = len(tokens)
    same = tokens[:, None] == tokens
    after = torch.zeros_like(same)
    after[:, 1:] = same[:, :-1]
    return after & torch.ones(T, T, dtype=torch.bool, device=tokens.device).tril()


@misconception(
    "induction_lookup",
    "Places after t take part in row t. What comes next must not be looked up in the future.",
)
def induction_lookup__sees_the_future(tokens, n_vocab):
    same = tokens[:, None] == tokens
    after = torch.zeros_like(same)
    after[:, 1:] = same[:, :-1]
    return _induced(tokens, n_vocab, after)


@misconception(
    "induction_lookup",
    "Row t repeats the token at t: you found the earlier occurrences and answered with them. Asked for is what came after them.",
)
def induction_lookup__repeats(tokens, n_vocab):
    T = len(tokens)
    earlier = (tokens[:, None] == tokens) & torch.ones(T, T, dtype=torch.bool, device=tokens.device).tril(-1)
    return _induced(tokens, n_vocab, earlier)


@misconception(
    "induction_lookup",
    "You answer with what came before the earlier occurrences, not with what came after.",
)
def induction_lookup__backwards(tokens, n_vocab):
    T = len(tokens)
    earlier = (tokens[:, None] == tokens) & torch.ones(T, T, dtype=torch.bool, device=tokens.device).tril(-1)
    earlier[:, :1] = False
    code = F.one_hot(tokens, n_vocab).float()
    return _induced(tokens, n_vocab, earlier, torch.cat([code[:1] * 0, code[:-1]]))


@misconception(
    "induction_lookup",
    "Where nothing was repeated you give an average of all that was seen: a softmax has to put its weight somewhere. Offer it an "
    "entry that holds nothing and wins only then.",
)
def induction_lookup__average_for_nothing(tokens, n_vocab):
    matches = _matches(tokens)
    T = len(tokens)
    seen = torch.ones(T, T, dtype=torch.bool, device=tokens.device).tril()
    return _induced(tokens, n_vocab, torch.where(matches.any(1, keepdim=True), matches, seen))


@misconception(
    "induction_lookup",
    "The first place has a token before it: the last one. A list that is rolled around puts the end in front of the beginning.",
)
def induction_lookup__rolled(tokens, n_vocab):
    T = len(tokens)
    after = tokens[:, None] == tokens.roll(1)
    return _induced(tokens, n_vocab, after & torch.ones(T, T, dtype=torch.bool, device=tokens.device).tril())


@misconception(
    "induction_lookup",
    "A token right after itself is missing: in 'A A' the second A is what followed the first, and place t itself may answer.",
)
def induction_lookup__not_itself(tokens, n_vocab):
    T = len(tokens)
    return _induced(
        tokens, n_vocab, _matches(tokens) & torch.ones(T, T, dtype=torch.bool, device=tokens.device).tril(-1)
    )


@misconception(
    "induction_lookup",
    "Only the latest occurrence answers. All earlier ones share the weight.",
)
def induction_lookup__latest(tokens, n_vocab):
    matches = _matches(tokens).long()
    later = matches.flip(1).cumsum(1).flip(1)
    return _induced(tokens, n_vocab, (matches * (later == 1)).bool())


@misconception(
    "induction_lookup",
    "Only the first occurrence answers. All earlier ones share the weight.",
)
def induction_lookup__first(tokens, n_vocab):
    matches = _matches(tokens).long()
    return _induced(tokens, n_vocab, (matches * (matches.cumsum(1) == 1)).bool())


@misconception(
    "induction_lookup",
    "These are counts: a follower that came twice has 2. The weights of a row sum to 1.",
)
def induction_lookup__counts(tokens, n_vocab):
    return _matches(tokens).float() @ F.one_hot(tokens, n_vocab).float()


@misconception(
    "induction_lookup",
    "Your lookup is lukewarm: entries that do not match still have weights, and the more of them there are, the more they have. "
    "Lower the temperature until they weigh nothing.",
)
def induction_lookup__lukewarm(tokens, n_vocab):
    T = len(tokens)
    if not T:
        return torch.zeros(0, n_vocab, device=tokens.device)
    matches = _matches(tokens)
    scores = torch.cat([torch.full((T, 1), 0.5, device=tokens.device), matches.float()], 1) * 10
    seen = F.pad(torch.ones(T, T, dtype=torch.bool, device=tokens.device).tril(), (1, 0), value=True)
    weights = masked_softmax(scores, seen)
    return weights[:, 1:] @ F.one_hot(tokens, n_vocab).float()


@misconception(
    "induction_lookup",
    "One follower per row, the one that came most often. Rows are shares: half B and half C is an answer.",
)
def induction_lookup__most_frequent(tokens, n_vocab):
    shares = right_induction(tokens, n_vocab)
    best = F.one_hot(shares.argmax(1), n_vocab).float()
    return torch.where(shares.sum(1, keepdim=True) > 0.5, best, shares)


@misconception(
    "induction_lookup",
    "Row t knows only the token at t, and asks what followed it anywhere before. You compare the token before t, so your answers come "
    "one place late.",
)
def induction_lookup__one_late(tokens, n_vocab):
    found = right_induction(tokens, n_vocab)
    return torch.cat([found[:1] * 0, found[:-1]])


@misconception(
    "induction_lookup",
    "This copies the token before each place: the first of the two lookups. The second has to ask who comes after my token.",
)
def induction_lookup__first_lookup_alone(tokens, n_vocab):
    T = len(tokens)
    entry = torch.eye(T + 1, device=tokens.device)
    memory = torch.cat([entry.new_zeros(1, n_vocab), F.one_hot(tokens, n_vocab).float()])
    return right_lookup(entry[:-1], entry, memory, COLD)[0]


# induction_head


def _changed(n_vocab, max_len, change):
    layers = right_head(n_vocab, max_len)
    token, place, before, guess = (
        list(part) for part in torch.arange(3 * n_vocab + max_len).split([n_vocab, max_len, n_vocab, n_vocab])
    )
    change(layers, *(torch.tensor([int(i) for i in part]) for part in (token, place, before, guess)))
    return layers


@misconception(
    "induction_head",
    "In your first layer each place asks for itself, so `before` holds the token that stands there anyway.",
)
def induction_head__copies_itself(n_vocab, max_len):
    def change(layers, token, place, before, guess):
        layers[0]["q_proj.weight"] = layers[0]["k_proj.weight"].clone()

    return _changed(n_vocab, max_len, change)


@misconception(
    "induction_head",
    "In your first layer each place asks for the next one, which it is not allowed to see.",
)
def induction_head__asks_for_the_next(n_vocab, max_len):
    def change(layers, token, place, before, guess):
        layers[0]["q_proj.weight"][:, place] = layers[0]["k_proj.weight"][:, place].roll(-1, 1)

    return _changed(n_vocab, max_len, change)


@misconception(
    "induction_head",
    "Place 0 sees only itself, so its `before` holds its own token, and later it answers as if it came after itself. Take it out "
    "of the second layer's game.",
)
def induction_head__first_place_counts(n_vocab, max_len):
    def change(layers, token, place, before, guess):
        layers[1]["k_proj.weight"][:, place] = 0

    return _changed(n_vocab, max_len, change)


@misconception(
    "induction_head",
    "Your weights are too small: a softmax over scores that differ little is nearly an average, and `before` becomes a blend of all tokens so "
    "far.",
)
def induction_head__lukewarm(n_vocab, max_len):
    def change(layers, token, place, before, guess):
        for layer in layers:
            layer["q_proj.weight"] /= 50
            layer["k_proj.weight"] /= 50

    return _changed(n_vocab, max_len, change)


@misconception(
    "induction_head",
    "Your weights are beyond 50. The scores need not be that large: 50 times 50 is plenty.",
)
def induction_head__too_large(n_vocab, max_len):
    def change(layers, token, place, before, guess):
        for layer in layers:
            layer["q_proj.weight"] *= 4

    return _changed(n_vocab, max_len, change)


@misconception(
    "induction_head",
    "The second layer asks with `before` and is answered by tokens: it finds the places whose token stood before this one. It should "
    "ask with the token, and the keys are what stood before.",
)
def induction_head__asks_backwards(n_vocab, max_len):
    def change(layers, token, place, before, guess):
        layers[1]["q_proj.weight"], layers[1]["k_proj.weight"] = layers[1]["k_proj.weight"], layers[1]["q_proj.weight"]

    return _changed(n_vocab, max_len, change)


@misconception(
    "induction_head",
    "The place was found, and then you hand over `before`, which is the token that was asked with. What followed is the token at that "
    "place.",
)
def induction_head__hands_over_before(n_vocab, max_len):
    def change(layers, token, place, before, guess):
        value = layers[1]["v_proj.weight"]
        layers[1]["v_proj.weight"] = torch.zeros_like(value).index_copy(1, before, value[:, token])

    return _changed(n_vocab, max_len, change)


@misconception(
    "induction_head",
    "The first layer writes into the block of the token and blends it with the token before. `before` stays empty.",
)
def induction_head__overwrites_the_token(n_vocab, max_len):
    def change(layers, token, place, before, guess):
        out = layers[0]["o_proj.weight"]
        layers[0]["o_proj.weight"] = torch.zeros_like(out).index_copy(0, token, out[before])

    return _changed(n_vocab, max_len, change)


@misconception(
    "induction_head",
    "The second layer writes into `before`, and `guess` stays empty.",
)
def induction_head__guess_stays_empty(n_vocab, max_len):
    def change(layers, token, place, before, guess):
        out = layers[1]["o_proj.weight"]
        layers[1]["o_proj.weight"] = torch.zeros_like(out).index_copy(0, before, out[guess])

    return _changed(n_vocab, max_len, change)


@misconception(
    "induction_head",
    "The output map is transposed: weights are (out, in), so o_proj is (D, Dh).",
)
def induction_head__transposed_output(n_vocab, max_len):
    def change(layers, token, place, before, guess):
        for layer in layers:
            layer["o_proj.weight"] = layer["o_proj.weight"].T.clone()

    return _changed(n_vocab, max_len, change)
