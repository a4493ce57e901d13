"""A DeepSeek model as a frozen record, and everything that can be said about it before a weight exists.

The layers are those of DeepSeek-V2 (arXiv 2405.04434, sections 2.1 and 2.2, appendix C) and DeepSeek-V3 (arXiv
2412.19437, section 2.1); their sizes are in the config.json files that came with the weights, and the fields of
`DeepSeekConfig` have the names used there. YaRN is section 3 of Peng et al. (arXiv 2309.00071). DeepSeekMath-7B
(arXiv 2402.03300) is counted by the same functions: it is dense, with ordinary attention.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reference.day16_scaled_dot_product import attention_flops

_ROPE_FIELDS = (
    "rope_type",
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
)
_V3_ROUTER = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True}


@dataclass(frozen=True)
class DeepSeekConfig:
    """The sizes and switches of a model, under the names of config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    # latent attention, where kv_lora_rank is a number
    kv_lora_rank: int | None = None
    q_lora_rank: int | None = None
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    v_head_dim: int | None = None
    # experts, where n_routed_experts is a number
    n_routed_experts: int | None = None
    n_shared_experts: int = 0
    num_experts_per_tok: int | None = None
    moe_intermediate_size: int | None = None
    first_k_dense_replace: int = 0
    n_group: int = 1
    topk_group: int = 1
    topk_method: str = "greedy"
    scoring_func: str = "softmax"
    norm_topk_prob: bool = False
    routed_scaling_factor: float = 1.0
    # the rest
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    num_nextn_predict_layers: int = 0
    # positions
    rope_theta: float = 10000.0
    rope_type: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    def __post_init__(self):
        """Fill what follows from other fields, and refuse what cannot be built."""
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.original_max_position_embeddings is None:
            object.__setattr__(self, "original_max_position_embeddings", self.max_position_embeddings)
        if self.kv_lora_rank is None:
            if self.hidden_size % (2 * self.num_attention_heads):
                raise ValueError(
                    f"hidden_size ({self.hidden_size}) gives no even width to each of num_attention_heads "
                    f"({self.num_attention_heads})"
                )
            self._multiple(
                "num_attention_heads", self.num_attention_heads, "num_key_value_heads", self.num_key_value_heads
            )
        else:
            self._present("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
            self._multiple("qk_rope_head_dim", self.qk_rope_head_dim, "a pair", 2)
        if self.n_routed_experts is not None:
            self._present("num_experts_per_tok", "moe_intermediate_size")
            self._multiple("n_routed_experts", self.n_routed_experts, "n_group", self.n_group)
            if self.topk_group > self.n_group:
                raise ValueError(f"topk_group ({self.topk_group}) is more than n_group ({self.n_group})")
            if self.num_experts_per_tok * self.n_group > self.n_routed_experts * self.topk_group:
                raise ValueError(
                    f"num_experts_per_tok ({self.num_experts_per_tok}) is more than the experts of topk_group "
                    f"({self.topk_group}) of {self.n_group} groups of {self.n_routed_experts} experts"
                )
        self._one_of("scoring_func", ("softmax", "sigmoid"))
        self._one_of("topk_method", ("greedy", "group_limited_greedy", "noaux_tc"))
        self._one_of("rope_type", ("default", "yarn"))

    def _present(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) is None:
                raise ValueError(f"{name} is missing")

    def _one_of(self, name: str, known: tuple[str, ...]) -> None:
        if getattr(self, name) not in known:
            raise ValueError(f"{name} ({getattr(self, name)}) is none of {', '.join(known)}")

    @staticmethod
    def _multiple(name: str, value: int, of: str, unit: int) -> None:
        if value % unit:
            raise ValueError(f"{name} ({value}) is not a multiple of {of} ({unit})")

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> DeepSeekConfig:
        """Read the dict of a config.json, old or new; what is null there counts as missing."""
        rope = {**(d.get("rope_scaling") or {}), **(d.get("rope_parameters") or {})}
        rope = {"rope_type": rope.get("type"), "rope_theta": d.get("rope_theta"), **rope}
        given = dict(_V3_ROUTER) if d.get("model_type") == "deepseek_v3" else {}
        for field in dataclasses.fields(cls):
            value = rope.get(field.name) if field.name in _ROPE_FIELDS else d.get(field.name)
            if value is not None:
                given[field.name] = value
            elif field.default is dataclasses.MISSING:
                raise ValueError(f"{field.name} is missing")
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """Return a dict that `from_dict` reads, in the new form: what belongs to positions is in `rope_parameters`."""
        d = dataclasses.asdict(self)
        d["rope_parameters"] = {name: d.pop(name) for name in _ROPE_FIELDS}
        return d

    @classmethod
    def v2_lite(cls) -> DeepSeekConfig:
        """Return DeepSeek-V2-Lite."""
        return cls(
            vocab_size=102400,
            hidden_size=2048,
            intermediate_size=10944,
            num_hidden_layers=27,
            num_attention_heads=16,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            n_routed_experts=64,
            n_shared_experts=2,
            num_experts_per_tok=6,
            moe_intermediate_size=1408,
            first_k_dense_replace=1,
            **_yarn(4096, 0.707),
        )

    @classmethod
    def v2(cls) -> DeepSeekConfig:
        """Return DeepSeek-V2."""
        return cls(
            vocab_size=102400,
            hidden_size=5120,
            intermediate_size=12288,
            num_hidden_layers=60,
            num_attention_heads=128,
            kv_lora_rank=512,
            q_lora_rank=1536,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            n_routed_experts=160,
            n_shared_experts=2,
            num_experts_per_tok=6,
            moe_intermediate_size=1536,
            first_k_dense_replace=1,
            n_group=8,
            topk_group=3,
            topk_method="group_limited_greedy",
            routed_scaling_factor=16.0,
            **_yarn(4096, 0.707),
        )

    @classmethod
    def v3(cls) -> DeepSeekConfig:
        """Return DeepSeek-V3."""
        return cls(
            vocab_size=129280,
            hidden_size=7168,
            intermediate_size=18432,
            num_hidden_layers=61,
            num_attention_heads=128,
            kv_lora_rank=512,
            q_lora_rank=1536,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            n_routed_experts=256,
            n_shared_experts=1,
            num_experts_per_tok=8,
            moe_intermediate_size=2048,
            first_k_dense_replace=3,
            n_group=8,
            topk_group=4,
            routed_scaling_factor=2.5,
            num_nextn_predict_layers=1,
            **_V3_ROUTER,
            **_yarn(4096, 1.0),
        )

    @classmethod
    def deepseek_math_7b(cls) -> DeepSeekConfig:
        """Return DeepSeekMath-7B: dense layers, ordinary attention, 4,096 positions."""
        return cls(
            vocab_size=102400,
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=30,
            num_attention_heads=32,
        )

    @classmethod
    def tiny(cls, style: str) -> DeepSeekConfig:
        """Return a model of three layers for experiments, in the style "v2" or "v3"."""
        sizes = {
            "vocab_size": 97,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 12,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
            "n_group": 4,
            "topk_group": 2,
        }
        if style == "v2":
            router = {"n_shared_experts": 2, "topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0}
            return cls(**sizes, **router, **_yarn(64, 0.707))
        if style == "v3":
            router = {"n_shared_experts": 1, "routed_scaling_factor": 2.5, **_V3_ROUTER}
            return cls(**sizes, q_lora_rank=24, **router, **_yarn(64, 1.0))
        raise ValueError(f"style ({style}) is neither v2 nor v3")


class LayerKind(NamedTuple):
    """What a layer is made of: "dense" or "moe", and "mla" or "mha"."""

    mlp: str
    attention: str


def layer_plan(cfg: DeepSeekConfig) -> list[LayerKind]:
    """Return the kind of each layer, from the first to the last."""
    attention = "mha" if cfg.kv_lora_rank is None else "mla"
    dense = cfg.num_hidden_layers if cfg.n_routed_experts is None else cfg.first_k_dense_replace
    return [LayerKind("dense" if i < dense else "moe", attention) for i in range(cfg.num_hidden_layers)]


def count_parameters(cfg: DeepSeekConfig) -> dict[str, int]:
    """Return how many numbers the parts of the model have; `buffers` are not in the total."""
    D, E = cfg.hidden_size, cfg.n_routed_experts
    counts = {
        "embedding": cfg.vocab_size * D,
        "attention": cfg.num_hidden_layers * _attention_parameters(cfg),
        "dense_mlp": 0,
        "routed_experts": 0,
        "shared_experts": 0,
        "router": 0,
        "norms": (2 * cfg.num_hidden_layers + 1) * D,
        "head": 0 if cfg.tie_word_embeddings else cfg.vocab_size * D,
    }
    buffers = 0
    for kind in layer_plan(cfg):
        if kind.mlp == "dense":
            counts["dense_mlp"] += 3 * D * cfg.intermediate_size
        else:
            counts["routed_experts"] += E * _expert_parameters(cfg)
            counts["shared_experts"] += cfg.n_shared_experts * _expert_parameters(cfg)
            counts["router"] += E * D
            buffers += E if cfg.topk_method == "noaux_tc" else 0
    return {**counts, "buffers": buffers, "total": sum(counts.values())}


def count_active(cfg: DeepSeekConfig, *, input_embedding: bool = False) -> int:
    """Return how many parameters work on one token: all but the experts that were not chosen."""
    counts = count_parameters(cfg)
    active = counts["total"]
    if cfg.n_routed_experts is not None:
        idle = cfg.n_routed_experts - cfg.num_experts_per_tok
        active -= counts["routed_experts"] // cfg.n_routed_experts * idle
    if not input_embedding and not cfg.tie_word_embeddings:  # a tied table works as the head
        active -= counts["embedding"]
    return active


def yarn_inv_freq(
    dim: int, base: float, factor: float, original_max: int, beta_fast: float = 32, beta_slow: float = 1
) -> Tensor:
    """Return (dim/2,) frequencies: fast pairs as they are, slow ones divided by factor, a ramp in between."""
    if dim % 2:
        raise ValueError(f"dim {dim} is odd: a pair has two columns")

    def pair_with(turns: float) -> float:  # the index whose pair turns so often within the original context
        return dim * math.log(original_max / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair_with(beta_fast)), 0)
    high = min(math.ceil(pair_with(beta_slow)), dim - 1)
    index = torch.arange(0, dim, 2, dtype=torch.float64) / 2  # (dim/2,)
    ramp = ((index - low) / max(high - low, 1)).clamp(0, 1)  # a step where there is no room for a ramp
    freq = base ** (-2 * index / dim)
    return freq * (1 - ramp) + freq / factor * ramp


def yarn_mscale(factor: float, m: float) -> float:
    """Return 0.1 * m * ln(factor) + 1, or 1 where the context is not stretched."""
    return 0.1 * m * math.log(max(factor, 1.0)) + 1.0


def rope_setup(cfg: DeepSeekConfig) -> tuple[Tensor, float, float]:
    """Return (inv_freq, cos_sin_scale, softmax_scale): all that attention must know about positions."""
    if cfg.kv_lora_rank is None:
        width = rotary = _head_width(cfg)
    else:
        width, rotary = cfg.qk_nope_head_dim + cfg.qk_rope_head_dim, cfg.qk_rope_head_dim
    factor = cfg.factor if cfg.rope_type == "yarn" else 1.0
    inv_freq = yarn_inv_freq(
        rotary, cfg.rope_theta, factor, cfg.original_max_position_embeddings, cfg.beta_fast, cfg.beta_slow
    )
    softmax_factor = yarn_mscale(factor, cfg.mscale_all_dim)
    return inv_freq, yarn_mscale(factor, cfg.mscale) / softmax_factor, width**-0.5 * softmax_factor**2


def forward_flops(cfg: DeepSeekConfig, t: int, context: int, mode: str) -> int:
    """Return the FLOPs of t new tokens of one sequence, after `context` tokens that are in the cache."""
    if mode not in ("naive", "absorbed", "auto"):
        raise ValueError(f"mode ({mode}) is none of naive, absorbed, auto")
    D, E = cfg.hidden_size, cfg.n_routed_experts
    modes = ("naive", "absorbed") if mode == "auto" else (mode,)
    flops = cfg.num_hidden_layers * min(_attention_flops(cfg, t, context + t, m) for m in modes)
    for kind in layer_plan(cfg):
        if kind.mlp == "dense":
            flops += 6 * t * D * cfg.intermediate_size
        else:
            experts = cfg.num_experts_per_tok + cfg.n_shared_experts
            flops += 2 * t * D * E + 6 * t * D * cfg.moe_intermediate_size * experts
    return flops + 2 * t * D * cfg.vocab_size


def kv_cache_bytes(cfg: DeepSeekConfig, batch: int, length: int, dtype_bytes: int = 2) -> int:
    """Return the bytes of the cache of all layers."""
    if cfg.kv_lora_rank is None:
        per_token = 2 * cfg.num_key_value_heads * _head_width(cfg)
    else:
        per_token = cfg.kv_lora_rank + cfg.qk_rope_head_dim
    return batch * length * cfg.num_hidden_layers * per_token * dtype_bytes


def mtp_parameters(cfg: DeepSeekConfig) -> dict[str, int]:
    """Return the parameters of one module that predicts a token further ahead, without the shared tables."""
    D = cfg.hidden_size
    experts = cfg.n_routed_experts + cfg.n_shared_experts
    layer = _attention_parameters(cfg) + 2 * D + cfg.n_routed_experts * D + experts * _expert_parameters(cfg)
    counts = {"layer": layer, "projection": 2 * D * D, "norms": 3 * D}
    return {**counts, "total": sum(counts.values())}


def design(budget_total: int, budget_active: int, d_model: int, n_layers: int) -> DeepSeekConfig:
    """Return a relative of V2-Lite that meets both budgets within 1 %, with the narrowest experts that do."""
    layers = n_layers - 1  # those with experts
    row = layers * d_model  # of the routers, for one expert; it works on every token
    for i in range(1, 4 * d_model // 128 + 1):
        width = 128 * i
        smallest = _relative(d_model, n_layers, width, 2, 1)
        expert = layers * _expert_parameters(smallest)
        more = round((budget_total - count_parameters(smallest)["total"]) / (expert + row))
        chosen = 1 + round((budget_active - count_active(smallest) - more * row) / expert)
        if 1 <= chosen < 2 + more <= 512:
            cfg = _relative(d_model, n_layers, width, 2 + more, chosen)
            total, active = count_parameters(cfg)["total"], count_active(cfg)
            if abs(total - budget_total) <= 0.01 * budget_total and abs(active - budget_active) <= 0.01 * budget_active:
                return cfg
    raise ValueError(
        f"no {n_layers} layers of width {d_model} have {budget_total} parameters of which {budget_active} are active"
    )


def _relative(d_model: int, n_layers: int, width: int, n_experts: int, chosen: int) -> DeepSeekConfig:
    """Return V2-Lite with other sizes: heads and the dense layer grow with the model."""
    return dataclasses.replace(
        DeepSeekConfig.v2_lite(),
        hidden_size=d_model,
        intermediate_size=4 * d_model,
        num_hidden_layers=n_layers,
        num_attention_heads=d_model // 128,
        num_key_value_heads=d_model // 128,
        n_routed_experts=n_experts,
        num_experts_per_tok=chosen,
        moe_intermediate_size=width,
    )


def _yarn(original: int, mscale: float) -> dict[str, Any]:
    """Return the position fields of the released models: 40 times the original context."""
    return {
        "max_position_embeddings": 40 * original,
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": original,
        "mscale": mscale,
        "mscale_all_dim": mscale,
    }


def _head_width(cfg: DeepSeekConfig) -> int:
    """Return the width of a head of ordinary attention."""
    return cfg.hidden_size // cfg.num_attention_heads


def _expert_parameters(cfg: DeepSeekConfig) -> int:
    """Return the parameters of one expert: gate, up and down."""
    return 3 * cfg.hidden_size * cfg.moe_intermediate_size


def _attention_parameters(cfg: DeepSeekConfig) -> int:
    """Return the parameters of the attention of one layer, the norms of its latents included."""
    D, H = cfg.hidden_size, cfg.num_attention_heads
    if cfg.kv_lora_rank is None:
        head = _head_width(cfg)
        return 2 * D * H * head + 2 * D * cfg.num_key_value_heads * head
    r, rq, dv = cfg.kv_lora_rank, cfg.q_lora_rank, cfg.v_head_dim
    width = H * (cfg.qk_nope_head_dim + cfg.qk_rope_head_dim)
    query = D * width if rq is None else D * rq + rq + rq * width
    down = D * (r + cfg.qk_rope_head_dim) + r
    return query + down + r * H * (cfg.qk_nope_head_dim + dv) + H * dv * D


def _attention_flops(cfg: DeepSeekConfig, t: int, s: int, mode: str) -> int:
    """Return the FLOPs of one layer's attention: t queries, s keys of which t are new."""
    D, H = cfg.hidden_size, cfg.num_attention_heads
    if cfg.kv_lora_rank is None:
        head = _head_width(cfg)
        return 4 * t * D * head * (H + cfg.num_key_value_heads) + attention_flops(1, H, t, s, head, head)
    r, rq = cfg.kv_lora_rank, cfg.q_lora_rank
    dn, dr, dv = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim
    query = D * H * (dn + dr) if rq is None else D * rq + rq * H * (dn + dr)
    projections = 2 * t * (query + D * (r + dr) + H * dv * D)
    if mode == "naive":
        return projections + 2 * s * r * H * (dn + dv) + attention_flops(1, H, t, s, dn + dr, dv)
    return projections + 2 * t * H * r * (dn + dv) + attention_flops(1, H, t, s, r + dr, r)
