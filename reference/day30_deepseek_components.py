"""The feed-forward side of DeepSeek: experts, the two routers that choose among them, and what keeps all of them busy.

SwiGLU: Shazeer 2020 (arXiv:2002.05202), equation 6. Shared and routed experts, the softmax router and its groups:
DeepSeek-V2 (arXiv:2405.04434), equations 20 to 22 and section 2.2.2, with the balance loss of equations 23 to 25. The
sigmoid router, its bias and the loss per sequence: DeepSeek-V3 (arXiv:2412.19437), equations 12 to 20. Parameters have
the names of the published checkpoints.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from reference.day08_linear_layers import Linear, linear
from reference.day09_activations import sigmoid, silu

SCORING = ("softmax", "sigmoid")  # of DeepSeek-V2 and of DeepSeek-V3


class SwiGLU(nn.Module):
    """A feed-forward layer with a gate: down(silu(gate(x)) * up(x)), without biases."""

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.gate_proj = Linear(d_model, d_ff, bias=False)
        self.up_proj = Linear(d_model, d_ff, bias=False)
        self.down_proj = Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D) through F hidden numbers."""
        hidden = silu(self.gate_proj(x)) * self.up_proj(x)  # (..., F)
        return self.down_proj(hidden)


def softmax_gate(
    logits: Tensor,
    k: int,
    *,
    scaling: float = 1.0,
    normalize: bool = False,
    n_group: int | None = None,
    topk_group: int | None = None,
) -> tuple[Tensor, Tensor]:
    """DeepSeek-V2's router: the k most probable experts of logits (N, E), inside the groups with the best one."""
    probabilities = torch.softmax(_at_least_float32(logits), dim=-1)  # (N, E)
    indices = _choose(probabilities, k, n_group, topk_group, n_best=1)  # (N, K)
    weights = probabilities.gather(1, indices)  # (N, K)
    if normalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return (weights * scaling).to(logits.dtype), indices


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
    """DeepSeek-V3's router: sigmoid plus bias (E,) decides who is chosen, the sigmoid alone how much each one counts."""
    if bias.shape != logits.shape[1:]:
        raise ValueError(f"bias {tuple(bias.shape)} does not fit logits {tuple(logits.shape)}")
    scores = sigmoid(_at_least_float32(logits))  # (N, E)
    indices = _choose(scores + bias, k, n_group, topk_group, n_best=2)  # (N, K)
    weights = scores.gather(1, indices)  # (N, K)
    if normalize:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return (weights * scaling).to(logits.dtype), indices


def dispatch(x: Tensor, weights: Tensor, indices: Tensor, experts: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
    """Send each row of x (N, D) to its K experts, each of which is called once, and add up what they say, weighted."""
    _check_assignments(x, weights, indices)
    N, K = indices.shape
    order = indices.flatten().argsort()  # (N K,): assignments, those of an expert side by side
    tokens = order // K  # (N K,)
    shares = _at_least_float32(weights).flatten()[order]  # (N K,)
    sizes = torch.bincount(indices.flatten(), minlength=len(experts)).tolist()
    out = torch.zeros_like(_at_least_float32(x))
    groups = zip(experts, tokens.split(sizes), shares.split(sizes), strict=True)
    for expert, rows, share in groups:
        if len(rows):
            out.index_add_(0, rows, (expert(x[rows]) * share[:, None]).to(out.dtype))
    return out.to(x.dtype)


class MoE(nn.Module):
    """Many experts of which each token sees a few, chosen by a router, and shared ones that every token sees."""

    def __init__(self, cfg):
        super().__init__()
        if cfg.scoring_func not in SCORING:
            raise ValueError(f"scoring_func {cfg.scoring_func!r} is none of {', '.join(SCORING)}")
        D, F, E = cfg.hidden_size, cfg.moe_intermediate_size, cfg.n_routed_experts
        self.k = cfg.num_experts_per_tok
        self.options = {
            "scaling": cfg.routed_scaling_factor,
            "normalize": cfg.norm_topk_prob,
            "n_group": cfg.n_group,
            "topk_group": cfg.topk_group,
        }
        self.gate = Linear(D, E, bias=False)
        if cfg.scoring_func == "sigmoid":
            self.gate.register_buffer("e_score_correction_bias", torch.zeros(E, dtype=torch.float32))
        self.experts = nn.ModuleList(SwiGLU(D, F) for _ in range(E))
        self.shared_experts = SwiGLU(D, F * cfg.n_shared_experts) if cfg.n_shared_experts else None

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        if x.shape[-1:] != self.gate.weight.shape[1:]:
            raise ValueError(f"x {tuple(x.shape)} does not fit the router {tuple(self.gate.weight.shape)}")
        rows = x.reshape(-1, x.shape[-1])  # (N, D)
        weights, indices = self._route(rows)
        out = dispatch(rows, weights, indices, self.experts).reshape(x.shape)
        return out if self.shared_experts is None else out + self.shared_experts(x)

    def _route(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The weights and the numbers (N, K) of the experts of each row, decided in float32 at least."""
        logits = linear(_at_least_float32(rows), _at_least_float32(self.gate.weight))  # (N, E)
        bias = getattr(self.gate, "e_score_correction_bias", None)
        if bias is None:
            return softmax_gate(logits, self.k, **self.options)
        return sigmoid_gate(logits, bias, self.k, **self.options)


def balance_loss(scores: Tensor, indices: Tensor, alpha: float, *, mask: Tensor | None = None) -> Tensor:
    """DeepSeek-V2's loss for all tokens together: alpha times the sum over experts of load times mean score (N, E)."""
    _check_scores(scores, indices, mask)
    wide = _at_least_float32(scores)
    mask = scores.new_ones(len(scores), dtype=torch.bool) if mask is None else mask
    return (alpha * _load_times_score(wide[None], indices[None], mask[None]).sum()).to(scores.dtype)


def sequence_balance_loss(scores: Tensor, indices: Tensor, alpha: float, *, mask: Tensor | None = None) -> Tensor:
    """DeepSeek-V3's loss: the same within each sequence of scores (B, T, E), which are normalized, then averaged."""
    _check_scores(scores, indices, mask)
    wide = _at_least_float32(scores)
    wide = wide / (wide.sum(dim=-1, keepdim=True) + 1e-20)  # (B, T, E)
    mask = scores.new_ones(scores.shape[:-1], dtype=torch.bool) if mask is None else mask
    total = _load_times_score(wide, indices, mask).sum()
    n_sequences = mask.any(dim=-1).sum().clamp(min=1)  # those that have tokens
    return (alpha * total / n_sequences).to(scores.dtype)


def update_bias(bias: Tensor, counts: Tensor, rate: float) -> Tensor:
    """One step of DeepSeek-V3's balancing: a bias (E,) rises by `rate` where counts (E,) are below their mean."""
    if bias.shape != counts.shape:
        raise ValueError(f"counts {tuple(counts.shape)} do not fit bias {tuple(bias.shape)}")
    below = (counts.sum() - len(counts) * counts).sign()  # (E,): the sign of mean - count, without a division
    return bias + rate * below.to(bias.dtype)


@torch.no_grad()
def simulate(gate_w: Tensor, data: Tensor, steps: int, *, k: int = 2, rate: float = 0.01) -> tuple[Tensor, Tensor]:
    """Balance a router gate_w (E, D) on data (N, D): the bias (E,) after `steps` updates, and violations (steps + 1,)."""
    logits = linear(data, gate_w)  # (N, E)
    bias = logits.new_zeros(len(gate_w))  # (E,)
    counts = _load(logits, bias, k)
    violations = [_violation(counts)]
    for _ in range(steps):
        bias = update_bias(bias, counts, rate)
        counts = _load(logits, bias, k)
        violations.append(_violation(counts))
    return bias, torch.stack(violations)


def devices_touched(indices: Tensor, n_devices: int, *, n_experts: int) -> Tensor:
    """How many devices each row of indices (N, K) has to reach, if they hold blocks of equally many experts."""
    if n_experts % n_devices:
        raise ValueError(f"{n_experts} experts cannot be spread evenly over {n_devices} devices")
    device = indices // (n_experts // n_devices)  # (N, K)
    touched = indices.new_zeros(len(indices), n_devices).scatter(1, device, 1)  # (N, n_devices)
    return touched.sum(dim=1)


def grouped_dispatch(
    x: Tensor, weights: Tensor, indices: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor
) -> Tensor:
    """`dispatch` to SwiGLU experts whose weights are stacked, (E, F, D) twice and (E, D, F), in three products.

    The tokens of each expert become a block of a padded (E, L, D), with L the largest number of tokens that one
    expert got.
    """
    _check_assignments(x, weights, indices)
    E, K, D = len(w_gate), indices.shape[1], x.shape[1]
    owner, order = indices.flatten().sort()  # (N K,) both: experts, and the assignments that they got
    tokens = order // K  # (N K,)
    sizes = torch.bincount(owner, minlength=E)  # (E,)
    first = sizes.cumsum(dim=0) - sizes  # (E,)
    place = torch.arange(len(owner), device=x.device) - first[owner]  # (N K,): within the block
    blocks = x.new_zeros(E, int(sizes.max()), D).index_put((owner, place), x[tokens])  # (E, L, D)
    hidden = silu(blocks @ w_gate.mT) * (blocks @ w_up.mT)  # (E, L, F)
    said = (hidden @ w_down.mT)[owner, place]  # (N K, D)
    share = _at_least_float32(weights).flatten()[order]  # (N K,)
    out = torch.zeros_like(_at_least_float32(x))
    return out.index_add(0, tokens, (said * share[:, None]).to(out.dtype)).to(x.dtype)


def _choose(choice: Tensor, k: int, n_group: int | None, topk_group: int | None, n_best: int) -> Tensor:
    """The k best (N, K) of choice (N, E) inside the topk_group groups whose n_best best have the largest sum."""
    if choice.dim() != 2:
        raise ValueError(f"logits {tuple(choice.shape)} are not (N, E)")
    if (n_group is None) != (topk_group is None):
        raise ValueError(f"n_group ({n_group}) and topk_group ({topk_group}) need each other")
    E = choice.shape[1]
    G, M = (1, 1) if n_group is None else (n_group, topk_group)
    if E % G:
        raise ValueError(f"{E} experts cannot be split into {G} groups")
    if not 1 <= M <= G:
        raise ValueError(f"topk_group ({M}) is not between 1 and n_group ({G})")
    size = E // G
    if not 1 <= k <= M * size:
        raise ValueError(f"k ({k}) is not between 1 and the {M * size} experts of {M} groups")

    groups = choice.unflatten(1, (G, size))  # (N, G, E / G)
    group_scores = groups.topk(min(n_best, size)).values.sum(dim=-1)  # (N, G)
    best = group_scores.topk(M).indices  # (N, M)
    closed = torch.ones_like(group_scores, dtype=torch.bool).scatter(1, best, False)  # (N, G)
    return groups.masked_fill(closed[..., None], -torch.inf).flatten(1).topk(k).indices


def _load_times_score(scores: Tensor, indices: Tensor, mask: Tensor) -> Tensor:
    """f_i P_i (B, E) for scores (B, T, E) and indices (B, T, K), of the tokens where mask (B, T) is True."""
    B, T, E = scores.shape
    K = indices.shape[-1]
    n_tokens = mask.sum(dim=1, keepdim=True).clamp(min=1)  # (B, 1)
    kept = mask[..., None].expand(B, T, K).flatten(1).to(scores.dtype)  # (B, T K)
    counts = scores.new_zeros(B, E).scatter_add(1, indices.flatten(1), kept)
    load = counts * E / (K * n_tokens)  # (B, E): 1 where all experts get the same
    mean = scores.masked_fill(~mask[..., None], 0.0).sum(dim=1) / n_tokens  # (B, E)
    return load * mean


def _load(logits: Tensor, bias: Tensor, k: int) -> Tensor:
    """How many tokens each expert gets, (E,)."""
    _, indices = sigmoid_gate(logits, bias, k, n_group=1, topk_group=1)
    return torch.bincount(indices.flatten(), minlength=len(bias)).to(logits.dtype)


def _violation(counts: Tensor) -> Tensor:
    """By how much the busiest expert exceeds the mean, in means."""
    return counts.max() * len(counts) / counts.sum() - 1


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _check_assignments(x: Tensor, weights: Tensor, indices: Tensor) -> None:
    if weights.shape != indices.shape or len(indices) != len(x):
        shapes = f"weights {tuple(weights.shape)} and indices {tuple(indices.shape)}"
        raise ValueError(f"{shapes} do not fit x {tuple(x.shape)}")


def _check_scores(scores: Tensor, indices: Tensor, mask: Tensor | None) -> None:
    tokens = scores.shape[:-1]
    if indices.shape[:-1] != tokens:
        raise ValueError(f"indices {tuple(indices.shape)} do not fit scores {tuple(scores.shape)}")
    if mask is not None and mask.shape != tokens:
        raise ValueError(f"mask {tuple(mask.shape)} does not fit scores {tuple(scores.shape)}")
