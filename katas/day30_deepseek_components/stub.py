"""Day 30: experts, routers and balance. The feed-forward side of DeepSeek-V2 and DeepSeek-V3.

Letters: N tokens of width D, E experts of hidden width F, K chosen experts a token; k is K as an argument.
"""

from collections.abc import Callable, Sequence

import torch
from day08_linear_layers import Linear, linear
from day09_activations import sigmoid, silu
from torch import Tensor, nn


class SwiGLU(nn.Module):
    """The feed-forward layer down(silu(gate(x)) * up(x)), whose products all go without a bias.

    Three layers with the names of the checkpoints and nothing else: `gate_proj` and `up_proj` from d_model to
    d_ff, `down_proj` from d_ff to d_model, each with a parameter `weight` (out, in) that starts like that of
    day 8's `Linear`.
    """

    def __init__(self, d_model: int, d_ff: int):
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D) in the dtype of x, with 6 * N * D * F FLOPs for N rows."""
        raise NotImplementedError


def softmax_gate(
    logits: Tensor,
    k: int,
    *,
    scaling: float = 1.0,
    normalize: bool = False,
    n_group: int | None = None,
    topk_group: int | None = None,
) -> tuple[Tensor, Tensor]:
    """DeepSeek-V2's router: choose k of E experts for each row of logits (N, E). Returns (weights, indices), both (N, k).

    - The probabilities are a softmax over all E logits. The k experts of largest probability are chosen.
    - With groups, the experts stand in n_group blocks of equal size: the first E / n_group are group 0, and so on.
      The score of a group is its largest probability, only the topk_group groups of largest score are open, and
      experts in the others cannot be chosen, whatever is left in the open ones. None for both means one group.
    - A weight is the probability of that expert among all E. If `normalize`, a row's weights are divided by their
      sum. Then, in either case, they are multiplied by `scaling`.

    The order within a row is free; weights[n, i] belongs to indices[n, i], and no expert appears twice in a row.
    Indices are int64 and weights have the dtype of the logits; half precision logits are decided in float32. N may
    be 0. Gradients reach the logits through the weights. Between equal scores either choice is right. No loops.

    ValueError for logits that are not (N, E), with their shape; for E that n_group does not divide; for only one
    of n_group and topk_group; for topk_group outside of 1 ... n_group; for k below 1 or above the number of experts
    in topk_group groups. The numbers that clash are in the message.
    """
    raise NotImplementedError


def sigmoid_gate(
    logits: Tensor,
    bias: Tensor,
    k: int,
    *,
    n_group: int | None,
    topk_group: int | None,
    scaling: float = 2.5,
    normalize: bool = True,
) -> tuple[Tensor, Tensor]:
    """DeepSeek-V3's router: choose k of E experts for each row of logits (N, E). Returns (weights, indices), both (N, k).

    - s is the sigmoid of the logits. Everything about *who* is decided by s + bias, with a bias (E,) of any size and
      sign; *how much* is decided by s alone.
    - The score of a group is the sum of its two largest s + bias (of its only one, if it has no more). Groups are
      the blocks of `softmax_gate`: only the topk_group best are open, and experts in the others cannot be chosen.
      None for both means one group. Of the open experts, the k of largest s + bias are chosen.
    - A weight is s of that expert. If `normalize`, a row's weights are divided by their sum plus 1e-20. Then, in
      either case, they are multiplied by `scaling`.

    Weights are as exact where s is 1e-8 as where it is 1/2. Gradients reach the logits through the weights, and the
    bias gets none. All else, errors included, is as in `softmax_gate`; a bias that is not (E,) raises ValueError with
    both shapes.
    """
    raise NotImplementedError


def dispatch(x: Tensor, weights: Tensor, indices: Tensor, experts: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
    """Return, for each row n of x (N, D), the sum over i of weights[n, i] * experts[indices[n, i]](x[n]); a tensor (N, D).

    weights and indices are (N, K). Each expert is a function (or a module) from (n, D) to (n, D), for any n above 0,
    and treats its rows one by one.

    An expert is called once, with exactly the rows of x that name it; one that no row names is not called at all.
    If a row names an expert twice, both weights count. N may be 0. How experts are numbered makes no difference:
    numbering them anew, in `experts` and in `indices`, changes the result by rounding at most.

    The result has the dtype of x. For half precision x, what the experts return is weighted and added in float32 and
    rounded once, at the end. Gradients reach x, the weights and whatever the experts hold. With SwiGLU experts the
    work is N * K * 6 * D * F FLOPs, with 2 * N * K * D more for the weighted sum where that is a product, and no
    tensor of N * E * D numbers is made.

    If weights and indices have different shapes, or not as many rows as x, ValueError with all three shapes.
    """
    raise NotImplementedError


class MoE(nn.Module):
    """A feed-forward layer of experts: routed ones, of which each token sees k, and shared ones that all tokens see.

    cfg is any object with the attributes hidden_size (D), moe_intermediate_size (F), n_routed_experts (E),
    n_shared_experts, num_experts_per_tok (k), n_group, topk_group, norm_topk_prob, routed_scaling_factor and
    scoring_func; nothing else of it is read. The names in the state dict are those of the checkpoints:

    - `gate.weight` (E, D): the router's logits are x gate.weight^T. It starts like the weight of a Linear(D, E).
    - `experts.{i}.gate_proj.weight` and so on: E SwiGLU of hidden width F.
    - `shared_experts.gate_proj.weight` and so on: one SwiGLU of hidden width n_shared_experts * F. With
      n_shared_experts 0 or None there is no such layer, and `shared_experts` is None.
    - `gate.e_score_correction_bias` (E,): the bias of `sigmoid_gate`, only if scoring_func is "sigmoid". It is a
      buffer, not a parameter, of zeros at first, and created in float32 whatever the default dtype is.

    scoring_func "softmax" routes with `softmax_gate`, "sigmoid" with `sigmoid_gate`; any other raises ValueError
    with the word in the message.
    """

    def __init__(self, cfg):
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D): the routed experts' weighted sum plus the shared experts, which nothing scales.

        The result has the dtype of x. Also in half precision the router works in float32, from its product on.
        Any leading dimensions, none and empty ones included. The work is 2 N D E FLOPs for the router,
        6 N k D F for the routed and 6 N D F n_shared_experts for the shared experts, and at most 2 N k D for the
        weighted sum. x is not changed.

        An x of another width raises ValueError with its shape and that of gate.weight.
        """
        raise NotImplementedError


def update_bias(bias: Tensor, counts: Tensor, rate: float) -> Tensor:
    """Return the bias (E,) after one step of balancing, for experts that got counts (E,) tokens.

    It is `rate` larger where a count is below the mean of all counts, `rate` smaller where it is above, and the
    same where it is equal, however far the counts are apart. The result is a new tensor in the dtype of the bias;
    counts may be integers or floats. If the shapes differ, ValueError with both. No loops.
    """
    raise NotImplementedError


def balance_loss(scores: Tensor, indices: Tensor, alpha: float, *, mask: Tensor | None = None) -> Tensor:
    """DeepSeek-V2's balance loss of all tokens together: alpha times the sum over experts of f_e * P_e, a scalar.

    scores (N, E) are the router's probabilities, indices (N, K) who was chosen. f_e is the number of times that
    expert e was chosen, times E / (K N); it is 1 where all experts get the same. P_e is the mean of e's scores.

    mask (N,), if there is one, is True for the tokens that count; the others are as if they were not there, and N is
    the number of those that are. Without any the loss is 0. Gradients reach the scores through P alone. The result
    has the dtype of the scores; half precision scores are added in float32. No loops.

    ValueError with both shapes if indices or mask do not fit scores.
    """
    raise NotImplementedError


def sequence_balance_loss(scores: Tensor, indices: Tensor, alpha: float, *, mask: Tensor | None = None) -> Tensor:
    """DeepSeek-V3's balance loss: computed for each sequence by itself, then averaged over the sequences; a scalar.

    scores (B, T, E) are the router's sigmoids, without the bias; indices (B, T, K) who was chosen. First each token's
    scores are divided by their sum plus 1e-20. Then each sequence's loss is that of `balance_loss`, with N = T.

    mask (B, T), if there is one, is True for the tokens that count. A sequence without any is left out of the
    average, and if all are, the loss is 0. All else is as in `balance_loss`; gradients flow through the division.
    """
    raise NotImplementedError


def simulate(gate_w: Tensor, data: Tensor, steps: int, *, k: int = 2, rate: float = 0.01) -> tuple[Tensor, Tensor]:
    """Balance a router gate_w (E, D) on the tokens data (N, D). Returns (bias, violations).

    The logits are data gate_w^T. The bias starts at zeros; in each of the `steps` steps all tokens choose k experts
    with `sigmoid_gate`, without groups, and `update_bias` with `rate` follows. bias (E,) is what it is in the end.
    violations (steps + 1,) holds, for the bias after 0, 1, ..., `steps` updates, the largest count of tokens that an
    expert gets, divided by the mean count, minus 1. Both have the dtype of data. No graph is recorded.
    """
    raise NotImplementedError


def devices_touched(indices: Tensor, n_devices: int, *, n_experts: int) -> Tensor:
    """How many different devices hold the experts of each row of indices (N, K); integers (N,), int64.

    The n_experts experts are spread over n_devices devices in blocks: the first n_experts / n_devices on device 0,
    and so on. N may be 0. If they cannot be spread evenly, ValueError with both numbers. No loops.
    """
    raise NotImplementedError


def grouped_dispatch(
    x: Tensor, weights: Tensor, indices: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor
) -> Tensor:
    """`dispatch` to E SwiGLU experts whose weights are stacked: w_gate and w_up (E, F, D), w_down (E, D, F).

    Expert e is x -> (silu(x w_gate[e]^T) * (x w_up[e]^T)) w_down[e]^T. Results, gradients (to the stacked weights
    too), errors and dtypes are those of `dispatch`, and so are N = 0, experts without tokens and rows that name an
    expert twice.

    There is no loop: at most three matrix products do the work for all experts, and the number of ATen calls does not
    depend on E. Padding is allowed up to the longest group: with L the largest number of tokens that one expert gets,
    the work is at most E * L * 6 * D * F FLOPs and 2 * N * K * D for the weighted sum. The experts' weights are not copied for each token: no tensor of
    N * K * F * D numbers is made.
    """
    raise NotImplementedError
