"""Make data/golden.json with the classes of transformers: parameters, buffers, FLOPs, frequencies and scales.

Run from the root of the repository: `python katas/day29_deepseek_architecture/make_golden.py`. The FLOPs are what the
meter of `kata check` finds in a forward pass. transformers expands its cache in each step: its order is the naive one.
"""

import json
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, DeepseekV2Config, DeepseekV3Config, LlamaConfig

from checker.testing import measure

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "max_position_embeddings": 2560,
}
LLAMA = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 128,
}
V3 = {"n_shared_experts": 1, "n_group": 4, "topk_group": 2, "q_lora_rank": 24, "num_nextn_predict_layers": 0}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
GROUPS = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0}


def yarn(mscale, mscale_all_dim, original=64, theta=10000.0, factor=40):
    """The position fields of a model that was stretched."""
    return {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": mscale,
        "mscale_all_dim": mscale_all_dim,
    }


def v2(**changes):
    """A tiny model in the style of DeepSeek-V2."""
    return DeepseekV2Config(
        **(
            SIZES
            | {"q_lora_rank": None, "n_shared_experts": 2, "norm_topk_prob": False, "rope_parameters": PLAIN}
            | changes
        )
    )


def v3(**changes):
    """A tiny model in the style of DeepSeek-V3."""
    return DeepseekV3Config(**(SIZES | V3 | {"rope_parameters": PLAIN} | changes))


CONFIGS = {
    "v2, greedy": v2(topk_method="greedy"),
    "v2, groups, YaRN": v2(**GROUPS, rope_parameters=yarn(0.707, 0.707)),
    "v2, compressed queries": v2(**GROUPS, q_lora_rank=24, rope_parameters=yarn(0.707, 0.707)),
    "v2, experts in every layer": v2(first_k_dense_replace=0, num_attention_heads=2, num_key_value_heads=2),
    "v3, YaRN": v3(rope_parameters=yarn(1.0, 1.0)),
    "v3, YaRN of two scales": v3(rope_parameters=yarn(1.0, 0.5)),
    "v3, another base": v3(rope_parameters=yarn(1.0, 1.0, original=300, theta=500.0, factor=4), qk_rope_head_dim=32),
    "v3, plain queries": v3(q_lora_rank=None, first_k_dense_replace=2),
    "v3, tied": v3(tie_word_embeddings=True, n_group=1, topk_group=1),
    "llama": LlamaConfig(**LLAMA, num_key_value_heads=6),
    "llama, grouped and tied": LlamaConfig(**LLAMA, num_key_value_heads=2, tie_word_embeddings=True),
}
PARTS = {
    "embed_tokens": "embedding",
    "self_attn": "attention",
    "lm_head": "head",
    "mlp.experts": "routed_experts",
    "mlp.shared_experts": "shared_experts",
    "mlp.gate.": "router",
    "mlp": "dense_mlp",
    "norm": "norms",
}


def counts(model):
    """Parameters by part, a tied table once."""
    found = dict.fromkeys(PARTS.values(), 0)
    for name, parameter in model.named_parameters():
        found[next(part for key, part in PARTS.items() if key in name)] += parameter.numel()
    found["buffers"] = sum(b.numel() for name, b in model.named_buffers() if "bias" in name)
    found["total"] = sum(p.numel() for p in model.parameters())
    return found


def flops(model, t, context):
    """What the meter finds for t tokens after `context` others."""
    cache = None
    if context:
        cache = model(torch.zeros(1, context, dtype=torch.long), use_cache=True).past_key_values
    tokens = torch.arange(t)[None] % model.config.vocab_size
    _, cost = measure(model, tokens, past_key_values=cache, use_cache=True)
    return cost.flops


def main():
    """Write the file."""
    cases = {}
    for name, config in CONFIGS.items():
        config._attn_implementation = "eager"
        config._experts_implementation = "eager"
        torch.manual_seed(0)
        with torch.no_grad():
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
            rotary, attention = model.model.rotary_emb, model.model.layers[0].self_attn
            kept = {key: value for key, value in config.to_dict().items() if key not in ("id2label", "label2id")}
            cases[name] = {
                "config": json.loads(json.dumps(kept, default=str)),
                "counts": counts(model),
                "flops": [[t, context, flops(model, t, context)] for t, context in ((1, 0), (7, 0), (1, 9), (4, 5))],
                "inv_freq": rotary.inv_freq.tolist(),
                "cos_sin_scale": float(rotary.attention_scaling),
                "softmax_scale": float(attention.scaling),
            }
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    path = Path(__file__).parent / "data" / "golden.json"
    path.write_text(json.dumps({"made_with": versions, "cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    main()
