"""Tiny DeepSeek models of transformers whose weights are spread so widely that a mistake shows in the logits."""

import torch
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

WIDTHS = {
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
    "eos_token_id": None,
    "attn_implementation": "eager",
    "experts_implementation": "eager",
}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}


def yarn(mscale, mscale_all_dim):
    """DeepSeek's YaRN with an original context of 64 tokens, so that short inputs feel it."""
    return {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 40,
        "original_max_position_embeddings": 64,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": mscale,
        "mscale_all_dim": mscale_all_dim,
    }


V2 = {
    "greedy": {"topk_method": "greedy", "routed_scaling_factor": 1.0, "rope_parameters": PLAIN},
    "greedy, compressed queries, YaRN": {
        "topk_method": "greedy",
        "routed_scaling_factor": 1.0,
        "q_lora_rank": 24,
        "rope_parameters": yarn(0.707, 0.707),
    },
    "groups, compressed queries, YaRN": {
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 16.0,
        "q_lora_rank": 24,
        "rope_parameters": yarn(0.707, 0.707),
    },
    "groups": {
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 16.0,
        "rope_parameters": PLAIN,
    },
}
V3 = {
    "groups, YaRN": {"q_lora_rank": 24, "rope_parameters": yarn(1.0, 1.0)},
    "groups, YaRN of two scales": {"q_lora_rank": 24, "rope_parameters": yarn(1.0, 0.5)},
    "groups, plain queries": {"q_lora_rank": None, "rope_parameters": PLAIN},
}
CASES = [("v2", name) for name in V2] + [("v3", name) for name in V3]


def build(style, name):
    """A model of transformers in float32, re-initialized."""
    if style == "v2":
        config = DeepseekV2Config(
            **WIDTHS, **{"q_lora_rank": None, "n_shared_experts": 2, "norm_topk_prob": False} | V2[name]
        )
        model = DeepseekV2ForCausalLM(config)
    else:
        options = {
            "n_shared_experts": 1,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 2.5,
            "norm_topk_prob": True,
        }
        config = DeepseekV3Config(**WIDTHS, **options, num_nextn_predict_layers=0, **V3[name])
        model = DeepseekV3ForCausalLM(config)
    spread(model)
    return model.eval()


@torch.no_grad()
def spread(model):
    """Weights of variance 1/fan_in, embeddings of variance 1, gains around 1, router biases wide and often negative."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "embed_tokens" in name:
            tensor.normal_()
        elif name.endswith("e_score_correction_bias"):
            tensor.uniform_(-4.0, 0.5)
        elif "norm" in name:
            tensor.uniform_(0.5, 1.5)
        elif tensor.ndim >= 2:
            tensor.normal_(std=tensor.shape[-1] ** -0.5)
