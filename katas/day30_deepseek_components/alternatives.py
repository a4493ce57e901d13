"""Day 30: right solutions, written differently."""

import torch
import torch.nn.functional as F
from torch import nn

from checker.testing import alternative
from reference import day30_deepseek_components as reference

# SwiGLU


@alternative("SwiGLU")
class SwiGLU__layers_of_torch(nn.Module):
    def __init__(self, d_model, d_ff):
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_ff, bias=False)
        self.up_proj = nn.Linear(d_model, d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x):
        return self.down_proj(self.up_proj(x).mul(F.silu(self.gate_proj(x))))


@alternative("SwiGLU")
class SwiGLU__one_matrix_for_two(nn.Module):
    def __init__(self, d_model, d_ff):
        super().__init__()
        for name, n_in, n_out in [
            ("gate_proj", d_model, d_ff),
            ("up_proj", d_model, d_ff),
            ("down_proj", d_ff, d_model),
        ]:
            layer = nn.Module()
            layer.weight = nn.Parameter((torch.rand(n_out, n_in) * 2 - 1) * n_in**-0.5)
            setattr(self, name, layer)

    def forward(self, x):
        both = torch.cat([self.gate_proj.weight, self.up_proj.weight])
        gate, up = torch.einsum("...d,fd->...f", x, both).chunk(2, dim=-1)
        return torch.einsum("...f,df->...d", gate * torch.sigmoid(gate) * up, self.down_proj.weight)


# softmax_gate


def _numbers(E, k, n_group, topk_group):
    """n_group and topk_group as integers."""
    if (n_group is None) != (topk_group is None):
        raise ValueError(f"n_group {n_group}, topk_group {topk_group}")
    G, M = n_group or 1, topk_group if topk_group is not None else 1
    if E % G != 0:
        raise ValueError(f"E {E}, n_group {G}")
    if M < 1 or M > G:
        raise ValueError(f"topk_group {M}, n_group {G}")
    if k < 1 or k > M * E // G:
        raise ValueError(f"k {k}, experts {M * E // G}")
    return G, M


@alternative("softmax_gate")
def softmax_gate__chooses_by_logits(logits, k, *, scaling=1.0, normalize=False, n_group=None, topk_group=None):
    if logits.ndim != 2:
        raise ValueError(f"logits {tuple(logits.shape)}")
    N, E = logits.shape
    G, M = _numbers(E, k, n_group, topk_group)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    best = wide.reshape(N, G, E // G).amax(dim=2).argsort(dim=1, descending=True)[:, :M]
    group = torch.arange(E, device=logits.device) // (E // G)
    opened = (group == best[:, :, None]).any(dim=1)
    ranked = torch.where(opened, wide, float("-inf"))
    indices = ranked.argsort(dim=1, descending=True)[:, :k]
    weights = (torch.gather(wide, 1, indices) - wide.logsumexp(dim=1, keepdim=True)).exp()
    if normalize:
        weights = torch.softmax(torch.gather(wide, 1, indices), dim=1)
    return (weights * scaling).type_as(logits), indices


@alternative("softmax_gate")
def softmax_gate__repeats_a_mask(logits, k, *, scaling=1.0, normalize=False, n_group=None, topk_group=None):
    if len(logits.shape) != 2:
        raise ValueError(f"logits {tuple(logits.shape)}")
    N, E = logits.shape
    G, M = _numbers(E, k, n_group, topk_group)
    p = logits.float().softmax(-1) if logits.dtype.itemsize == 2 else logits.softmax(-1)
    groups = torch.stack(p.chunk(G, dim=1), dim=1).max(dim=-1).values
    mask = torch.full_like(groups, -1.0).scatter(1, groups.topk(M, sorted=False).indices, 0.0)
    choice = p + mask.repeat_interleave(E // G, dim=1) * 2
    indices = choice.topk(k, sorted=False).indices
    weights = p.take_along_dim(indices, dim=1)
    total = weights.sum(1, keepdim=True) if normalize else 1
    return (scaling * weights / total).to(logits.dtype), indices


# sigmoid_gate


@alternative("sigmoid_gate")
def sigmoid_gate__sorts(logits, bias, k, *, n_group, topk_group, scaling=2.5, normalize=True):
    if logits.ndim != 2 or bias.shape != (logits.shape[-1],):
        raise ValueError(f"logits {tuple(logits.shape)}, bias {tuple(bias.shape)}")
    N, E = logits.shape
    G, M = _numbers(E, k, n_group, topk_group)
    s = torch.sigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32)))
    with torch.no_grad():
        choice = s.detach() + bias.detach()
        strength = choice.reshape(N, G, E // G).sort(dim=2, descending=True).values[:, :, :2].sum(dim=2)
        best = strength.sort(dim=1, descending=True).indices[:, :M]
        group = torch.arange(E, device=logits.device) // (E // G)
        opened = (group == best[:, :, None]).any(dim=1)
        choice[~opened] = -torch.inf
        indices = choice.sort(dim=1, descending=True).indices[:, :k]
    weights = s.gather(1, indices)
    if normalize:
        weights = weights / weights.sum(dim=1, keepdim=True).add(1e-20)
    return weights.mul(scaling).to(logits.dtype), indices


@alternative("sigmoid_gate")
def sigmoid_gate__lifts_the_open_groups(logits, bias, k, *, n_group, topk_group, scaling=2.5, normalize=True):
    if logits.ndim != 2:
        raise ValueError(f"logits {tuple(logits.shape)}")
    if bias.ndim != 1 or len(bias) != logits.shape[1]:
        raise ValueError(f"bias {list(bias.shape)} for logits {list(logits.shape)}")
    N, E = logits.shape
    G, M = _numbers(E, k, n_group, topk_group)
    s = 1 / (1 + (-logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)).exp())
    choice = (s + bias[None, :]).view(N, G, -1) if N else torch.zeros(0, G, E // G, device=s.device)
    first = choice.max(dim=2, keepdim=True)
    strength = first.values[..., 0]
    if E // G > 1:
        rest = choice.scatter(2, first.indices, -torch.inf)
        strength = strength + rest.max(dim=2).values
    places = strength.topk(M, sorted=False).indices
    closed = torch.ones(N, G, dtype=torch.bool, device=s.device)
    closed[torch.arange(N, device=s.device)[:, None], places] = False
    flat = choice.masked_fill(closed[:, :, None], -torch.inf).reshape(N, E)
    indices = flat.topk(k, sorted=False).indices
    weights = torch.take_along_dim(s, indices, 1)
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return (weights * scaling).to(logits.dtype), indices


# dispatch


def _fits(x, weights, indices):
    if weights.shape != indices.shape or len(weights) != len(x):
        raise ValueError(f"x {tuple(x.shape)}, weights {tuple(weights.shape)}, indices {tuple(indices.shape)}")


@alternative("dispatch")
def dispatch__asks_for_each_expert(x, weights, indices, experts):
    _fits(x, weights, indices)
    wide = torch.promote_types(x.dtype, torch.float32)
    out = torch.zeros(x.shape, dtype=wide, device=x.device)
    for number, expert in enumerate(experts):
        rows, slots = (indices == number).nonzero(as_tuple=True)
        if rows.numel() == 0:
            continue
        out = out.index_add(0, rows, expert(x[rows]).to(wide) * weights[rows, slots].to(wide).unsqueeze(1))
    return out.to(x.dtype)


@alternative("dispatch")
def dispatch__a_place_for_each_answer(x, weights, indices, experts):
    _fits(x, weights, indices)
    N, K = indices.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    said = torch.zeros(N * K, x.shape[1], dtype=wide, device=x.device)
    flat = indices.reshape(-1)
    for e in flat.unique().tolist():
        places = torch.nonzero(flat == e).squeeze(1)
        answer = experts[e](x.index_select(0, places.div(K, rounding_mode="floor")))
        said = said.index_copy(0, places, answer.to(wide))
    return torch.einsum("nk,nkd->nd", weights.to(wide), said.view(N, K, -1) if N else said.view(0, K, x.shape[1])).to(
        x.dtype
    )


# MoE


@alternative("MoE")
class MoE__a_router_of_its_own(nn.Module):
    class Router(nn.Module):
        def __init__(self, cfg):
            super().__init__()
            self.cfg = cfg
            bound = cfg.hidden_size**-0.5
            self.weight = nn.Parameter(torch.empty(cfg.n_routed_experts, cfg.hidden_size).uniform_(-bound, bound))
            if cfg.scoring_func == "sigmoid":
                self.e_score_correction_bias = nn.Buffer(torch.zeros(cfg.n_routed_experts, dtype=torch.float32))

        def forward(self, rows):
            cfg = self.cfg
            wide = torch.promote_types(rows.dtype, torch.float32)
            logits = torch.einsum("nd,ed->ne", rows.to(wide), self.weight.to(wide))
            options = {"n_group": cfg.n_group, "topk_group": cfg.topk_group}
            options |= {"scaling": cfg.routed_scaling_factor, "normalize": cfg.norm_topk_prob}
            if cfg.scoring_func == "sigmoid":
                return reference.sigmoid_gate(logits, self.e_score_correction_bias, cfg.num_experts_per_tok, **options)
            return reference.softmax_gate(logits, cfg.num_experts_per_tok, **options)

    def __init__(self, cfg):
        super().__init__()
        if cfg.scoring_func != "softmax" and cfg.scoring_func != "sigmoid":
            raise ValueError(f"{cfg.scoring_func} is not known")
        self.gate = self.Router(cfg)
        width = cfg.moe_intermediate_size
        self.experts = nn.ModuleList([reference.SwiGLU(cfg.hidden_size, width) for _ in range(cfg.n_routed_experts)])
        self.shared_experts = None
        if cfg.n_shared_experts:
            self.shared_experts = reference.SwiGLU(cfg.hidden_size, width * cfg.n_shared_experts)

    def forward(self, x):
        D = self.gate.weight.shape[1]
        if x.shape[-1] != D:
            raise ValueError(f"x {list(x.shape)}, gate.weight {list(self.gate.weight.shape)}")
        rows = x.flatten(0, -2) if x.dim() > 1 else x[None]
        out = reference.dispatch(rows, *self.gate(rows), self.experts)
        if self.shared_experts is not None:
            out = out + self.shared_experts(rows)
        return out.view(x.shape)


# update_bias


@alternative("update_bias")
def update_bias__compares(bias, counts, rate):
    if counts.shape != bias.shape:
        raise ValueError(f"bias {list(bias.shape)}, counts {list(counts.shape)}")
    counts = counts.double()
    return torch.add(bias, torch.sign(counts.mean() - counts).to(bias.dtype), alpha=rate)


@alternative("update_bias")
def update_bias__where(bias, counts, rate):
    if counts.shape != bias.shape:
        raise ValueError(f"bias {list(bias.shape)}, counts {list(counts.shape)}")
    mean = counts.float().mean()
    return torch.where(counts < mean, bias + rate, torch.where(counts > mean, bias - rate, bias))


# balance_loss


def _suits(scores, indices, mask):
    if indices.shape[:-1] != scores.shape[:-1]:
        raise ValueError(f"scores {list(scores.shape)}, indices {list(indices.shape)}")
    if mask is not None and mask.shape != scores.shape[:-1]:
        raise ValueError(f"scores {list(scores.shape)}, mask {list(mask.shape)}")


@alternative("balance_loss")
def balance_loss__drops_the_padding(scores, indices, alpha, *, mask=None):
    _suits(scores, indices, mask)
    if mask is not None:
        scores, indices = scores[mask], indices[mask]
    N, E = scores.shape
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if N == 0:
        return scores.sum() * 0
    f = torch.bincount(indices.reshape(-1), minlength=E).to(wide.dtype) * (E / (N * indices.shape[1]))
    return (torch.dot(f, wide.mean(dim=0)) * alpha).to(scores.dtype)


@alternative("balance_loss")
def balance_loss__one_hot(scores, indices, alpha, *, mask=None):
    _suits(scores, indices, mask)
    E, K = scores.shape[1], indices.shape[1]
    wide = scores.double()
    keep = torch.ones(len(scores), device=scores.device).double() if mask is None else mask.double()
    n = keep.sum() + (keep.sum() == 0)
    counts = (F.one_hot(indices, E).sum(dim=1) * keep[:, None]).sum(dim=0)
    return (alpha * E / K * (counts * (wide * keep[:, None]).sum(dim=0)).sum() / n**2).to(scores.dtype)


@alternative("sequence_balance_loss")
def sequence_balance_loss__one_hot(scores, indices, alpha, *, mask=None):
    _suits(scores, indices, mask)
    (B, T, E), K = scores.shape, indices.shape[-1]
    wide = scores.double()
    keep = torch.ones(B, T, device=scores.device).double() if mask is None else mask.double()
    n = keep.sum(dim=1)
    shares = wide / (wide.sum(dim=-1, keepdim=True) + 1e-20)
    f = torch.einsum("btke,bt->be", F.one_hot(indices, E).double(), keep) * E / K
    p = torch.einsum("bte,bt->be", shares, keep)
    losses = (f * p).sum(dim=-1) / n.clamp(min=1) ** 2
    return (alpha * losses.sum() / (n > 0).sum().clamp(min=1)).to(scores.dtype)


# simulate


@alternative("simulate")
def simulate__one_step_more(gate_w, data, steps, *, k=2, rate=0.01):
    gate_w, data = gate_w.detach(), data.detach()
    s = torch.sigmoid(data @ gate_w.T)
    N, E = s.shape
    biases, violations = [torch.zeros(E, dtype=s.dtype, device=s.device)], []
    while len(violations) <= steps:
        chosen = (s + biases[-1]).argsort(dim=1, descending=True)[:, :k]
        counts = F.one_hot(chosen, E).sum(dim=(0, 1))
        violations.append(counts.max().to(s.dtype) / (N * k / E) - 1)
        biases.append(reference.update_bias(biases[-1], counts, rate))
    return biases[steps], torch.stack(violations)


# devices_touched


@alternative("devices_touched")
def devices_touched__one_hot(indices, n_devices, *, n_experts):
    if n_experts % n_devices != 0:
        raise ValueError(f"{n_experts} and {n_devices}")
    device = torch.div(indices, n_experts // n_devices, rounding_mode="trunc")
    return (device[:, :, None] == torch.arange(n_devices, device=indices.device)).any(dim=1).sum(dim=1)


@alternative("devices_touched")
def devices_touched__counts_steps(indices, n_devices, *, n_experts):
    if n_experts % n_devices != 0:
        raise ValueError(f"{n_experts} and {n_devices}")
    device = (indices // (n_experts // n_devices)).sort(dim=1).values
    return 1 + (device.diff(dim=1) != 0).sum(dim=1)


# grouped_dispatch


@alternative("grouped_dispatch")
def grouped_dispatch__places_by_counting(x, weights, indices, w_gate, w_up, w_down):
    _fits(x, weights, indices)
    (N, K), E, (_, D) = indices.shape, len(w_gate), x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    flat = indices.reshape(-1)
    taken = F.one_hot(flat, E).cumsum(dim=0)  # how many assignments each expert has after each one
    place = taken.gather(1, flat[:, None])[:, 0] - 1
    L = int(taken.amax()) if N else 0
    slot = flat * L + place
    blocks = x.new_zeros(E * L, D).index_copy(0, slot, x.repeat_interleave(K, dim=0)).view(E, L, D)
    gate, up = torch.bmm(blocks, torch.cat([w_gate, w_up], dim=1).transpose(1, 2)).chunk(2, dim=2)
    said = torch.bmm(F.silu(gate) * up, w_down.transpose(1, 2)).view(E * L, D)[slot]
    return (said.to(wide) * weights.reshape(-1, 1).to(wide)).view(N, K, D).sum(dim=1).to(x.dtype)
