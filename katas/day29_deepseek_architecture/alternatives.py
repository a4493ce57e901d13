"""Day 29: right solutions, written differently."""

import dataclasses
import json
import math

import torch

from checker.testing import alternative
from reference import day29_deepseek_architecture as right
from reference.day29_deepseek_architecture import DeepSeekConfig, LayerKind


@alternative("layer_plan")
def layer_plan__two_lists(cfg):
    n = cfg.num_hidden_layers
    first = n if cfg.n_routed_experts is None else min(n, cfg.first_k_dense_replace)
    attention = "mla" if cfg.kv_lora_rank is not None else "mha"
    return [LayerKind("dense", attention)] * first + [LayerKind(mlp="moe", attention=attention)] * (n - first)


@alternative("kv_cache_bytes")
def kv_cache_bytes__of_meta_tensors(cfg, batch, length, dtype_bytes=2):
    rows = batch * length
    if cfg.kv_lora_rank is not None:
        shapes = [(rows, cfg.kv_lora_rank), (rows, cfg.qk_rope_head_dim)]
    else:
        shapes = [(rows, cfg.num_key_value_heads, cfg.hidden_size // cfg.num_attention_heads)] * 2
    return sum(math.prod(shape) for shape in shapes for _ in range(cfg.num_hidden_layers)) * dtype_bytes


@alternative("DeepSeekConfig")
class config__explicit(DeepSeekConfig):
    """Reads key by key, in another order, and makes its presets from dicts."""

    def __post_init__(self):
        def put(name, value):
            object.__setattr__(self, name, value)

        put("num_key_value_heads", self.num_key_value_heads or self.num_attention_heads)
        put("original_max_position_embeddings", self.original_max_position_embeddings or self.max_position_embeddings)
        problems = []
        if self.kv_lora_rank is not None:
            problems += [n for n in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim") if getattr(self, n) is None]
            if not problems and self.qk_rope_head_dim % 2 == 1:
                problems.append(f"qk_rope_head_dim={self.qk_rope_head_dim} is odd")
        else:
            heads, keys = self.num_attention_heads, self.num_key_value_heads
            if self.hidden_size % (2 * heads):
                problems.append(
                    f"hidden_size={self.hidden_size}, num_attention_heads={heads}: {self.hidden_size / heads}"
                )
            if heads % keys:
                problems.append(f"num_attention_heads={heads}, num_key_value_heads={keys}")
        if self.n_routed_experts is not None:
            absent = [n for n in ("num_experts_per_tok", "moe_intermediate_size") if getattr(self, n) is None]
            problems += absent
            names = ("n_routed_experts", "n_group", "topk_group", "num_experts_per_tok")
            text = ", ".join(f"{n}={getattr(self, n)}" for n in names)
            per_group, left = divmod(self.n_routed_experts, self.n_group)
            if left or self.topk_group > self.n_group:
                problems.append(text)
            elif not absent and self.num_experts_per_tok > per_group * self.topk_group:
                problems.append(text)
        allowed = {
            "scoring_func": {"softmax", "sigmoid"},
            "topk_method": {"greedy", "group_limited_greedy", "noaux_tc"},
            "rope_type": {"default", "yarn"},
        }
        problems += [f"{n}={getattr(self, n)}" for n, values in allowed.items() if getattr(self, n) not in values]
        if problems:
            raise ValueError("; ".join(problems))

    @classmethod
    def from_dict(cls, d):
        names = [field.name for field in dataclasses.fields(DeepSeekConfig)]
        positions = names[names.index("rope_theta") :]
        flat = {n: d[n] for n in names if n not in positions and d.get(n) is not None}
        inner = d.get("rope_parameters") or d.get("rope_scaling") or {}
        for n in positions:
            value = inner.get(n)
            if value is None and n == "rope_type":
                value = inner.get("type")
            if value is None and n == "rope_theta":
                value = d.get("rope_theta")
            if value is not None:
                flat[n] = value
        if d.get("model_type") == "deepseek_v3":
            for n, value in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc"), ("norm_topk_prob", True)):
                flat.setdefault(n, value)
        try:
            return cls(**flat)
        except TypeError as error:
            raise ValueError(str(error)) from error

    def to_dict(self):
        d = json.loads(json.dumps(dataclasses.asdict(self)))
        positions = list(d)[list(d).index("rope_theta") :]
        return {n: d[n] for n in d if n not in positions} | {"rope_parameters": {n: d[n] for n in positions}}


@alternative("count_parameters")
def count_parameters__in_closed_form(cfg):
    D, L, H = cfg.hidden_size, cfg.num_hidden_layers, cfg.num_attention_heads
    E, k = cfg.n_routed_experts or 0, cfg.first_k_dense_replace
    moe = L - min(L, k) if E else 0
    if cfg.kv_lora_rank is None:
        attention = D * D * 2 + D // H * cfg.num_key_value_heads * D * 2
    else:
        r, dn, dr, dv = cfg.kv_lora_rank, cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim
        attention = D * (r + dr + H * dv) + r * (1 + H * dn + H * dv)
        attention += H * (dn + dr) * D if cfg.q_lora_rank is None else cfg.q_lora_rank * (D + 1 + H * (dn + dr))
    expert = 3 * D * (cfg.moe_intermediate_size or 0)
    found = {
        "router": moe * E * D,
        "routed_experts": moe * E * expert,
        "shared_experts": moe * cfg.n_shared_experts * expert,
        "dense_mlp": (L - moe) * 3 * D * cfg.intermediate_size,
        "attention": L * attention,
        "norms": D + 2 * D * L,
        "embedding": D * cfg.vocab_size,
        "head": D * cfg.vocab_size * (not cfg.tie_word_embeddings),
    }
    found["total"] = sum(found.values())
    found["buffers"] = moe * E * (cfg.topk_method == "noaux_tc")
    return found


@alternative("count_active")
def count_active__added_up(cfg, *, input_embedding=False):
    counts = right.count_parameters(cfg)
    found = sum(counts[part] for part in ("attention", "dense_mlp", "shared_experts", "router", "norms"))
    if counts["routed_experts"]:
        found += counts["routed_experts"] * cfg.num_experts_per_tok // cfg.n_routed_experts
    found += cfg.vocab_size * cfg.hidden_size  # as the head
    if input_embedding and not cfg.tie_word_embeddings:
        found += cfg.vocab_size * cfg.hidden_size
    return found


@alternative("yarn_mscale")
def yarn_mscale__clamped(factor, m):
    return 1 + m * math.log(max(factor, 1)) / 10


@alternative("yarn_inv_freq")
def yarn_inv_freq__pair_by_pair(dim, base, factor, original_max, beta_fast=32, beta_slow=1):
    if dim % 2 != 0:
        raise ValueError(f"{dim} is odd")
    ends = [dim / 2 * math.log(original_max / n / math.tau, base) for n in (beta_fast, beta_slow)]
    low, high = max(0, min(dim - 1, math.floor(ends[0]))), max(0, min(dim - 1, math.ceil(ends[1])))
    values = []
    for i in range(dim // 2):
        keep = 1.0 if i <= low else 0.0 if i >= high else (high - i) / (high - low)
        values.append((keep + (1 - keep) / factor) / base ** (2 * i / dim))
    return torch.tensor(values, dtype=torch.float64)


@alternative("rope_setup")
def rope_setup__plain_first(cfg):
    latent = cfg.kv_lora_rank is not None
    dim = cfg.qk_rope_head_dim if latent else cfg.hidden_size // cfg.num_attention_heads
    scale = 1 / math.sqrt(dim + (cfg.qk_nope_head_dim if latent else 0))
    if cfg.rope_type == "default":
        return cfg.rope_theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim), 1.0, scale
    s = cfg.factor
    inv_freq = right.yarn_inv_freq(
        dim, cfg.rope_theta, s, cfg.original_max_position_embeddings, cfg.beta_fast, cfg.beta_slow
    )
    m, all_dim = right.yarn_mscale(s, cfg.mscale), right.yarn_mscale(s, cfg.mscale_all_dim)
    return inv_freq.float(), m / all_dim, scale * all_dim * all_dim


@alternative("forward_flops")
def forward_flops__per_token(cfg, t, context, mode):
    if mode == "auto":
        return min(forward_flops__per_token(cfg, t, context, m) for m in ("naive", "absorbed"))
    if mode != "naive" and mode != "absorbed":
        raise ValueError(f"unknown mode {mode!r}")
    D, H, L, s = cfg.hidden_size, cfg.num_attention_heads, cfg.num_hidden_layers, context + t
    counts = right.count_parameters(cfg)
    # every matrix of every projection, router, MLP and head is used once per new token ...
    used = right.count_active(cfg) - counts["norms"]
    if cfg.kv_lora_rank is None:
        return 2 * t * used + L * 4 * t * s * D
    # ... but those of the latent's keys and values, which are used once per key, or once per head and new token
    r, dn, dr, dv = cfg.kv_lora_rank, cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim
    expand = r * H * (dn + dv)
    used -= L * (r + (cfg.q_lora_rank or 0) + expand)
    rows, widths = (s, dn + dr + dv) if mode == "naive" else (t, r + dr + r)
    return 2 * t * used + L * (2 * rows * expand + 2 * H * t * s * widths)


@alternative("mtp_parameters")
def mtp_parameters__from_a_model_of_one_layer(cfg):
    D, E = cfg.hidden_size, cfg.n_routed_experts
    attention = right.count_parameters(cfg)["attention"] // cfg.num_hidden_layers
    layer = attention + D * (2 + E + 3 * (E + cfg.n_shared_experts) * cfg.moe_intermediate_size)
    return {"total": layer + D * (2 * D + 3), "norms": 3 * D, "projection": D * 2 * D, "layer": layer}


@alternative("design")
def design__widest_first(budget_total, budget_active, d_model, n_layers):
    base = dataclasses.replace(
        DeepSeekConfig.v2_lite(),
        hidden_size=d_model,
        intermediate_size=4 * d_model,
        num_hidden_layers=n_layers,
        num_attention_heads=d_model // 128,
        num_key_value_heads=d_model // 128,
    )
    layers = n_layers - 1
    for width in range(4 * d_model // 128 * 128, 127, -128):
        one = dataclasses.replace(base, moe_intermediate_size=width)
        expert = layers * 3 * d_model * width
        rest = right.count_parameters(one)["total"] - 64 * (expert + layers * d_model)
        lowest = max(2, math.ceil((budget_total * 0.99 - rest) / (expert + layers * d_model)))
        for n in range(lowest, 513):
            total = rest + n * (expert + layers * d_model)
            if total > budget_total * 1.01:
                break
            fixed = total - n * expert - 102400 * d_model
            k = round((budget_active - fixed) / expert)
            if 1 <= k < n and abs(fixed + k * expert - budget_active) <= budget_active / 100:
                return dataclasses.replace(one, n_routed_experts=n, num_experts_per_tok=k)
    raise ValueError(f"nothing for {budget_total} and {budget_active}")
