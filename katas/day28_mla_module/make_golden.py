"""Makes data/golden.safetensors: attention layers of DeepSeek-V2 and V3 in transformers, with inputs and outputs.

Run it from anywhere. Weights have variance 1/fan_in and gains lie around 1, so that every mistake shows. The second
row of the batch stands beyond the original context of 64 tokens, where YaRN matters.
"""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from safetensors.torch import save_file
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention, DeepseekV2RotaryEmbedding
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

B, T, D = 2, 7, 24
SIZES = {
    "hidden_size": D,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "kv_lora_rank": 14,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 8,
    "v_head_dim": 6,
    "max_position_embeddings": 2560,
    "attn_implementation": "eager",
}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}


def yarn(mscale: float, mscale_all_dim: float) -> dict:
    """DeepSeek's YaRN for an original context of 64 tokens."""
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


CASES = {
    "v2_plain": ("v2", None, PLAIN),
    "v2_yarn": ("v2", 12, yarn(0.707, 0.707)),
    "v3_plain": ("v3", None, PLAIN),
    "v3_yarn": ("v3", 12, yarn(1.0, 1.0)),
    "v3_two_scales": ("v3", 12, yarn(1.0, 0.5)),
}


@torch.no_grad()
def main() -> None:
    """Run each layer on inputs of its own, and save all of it."""
    generator = torch.Generator().manual_seed(28)
    tensors = {}
    positions = torch.stack([torch.arange(T), torch.arange(90, 90 + T)])
    hidden = torch.full((T, T), torch.finfo(torch.float32).min).triu(1)[None, None]
    for case, (style, q_lora_rank, rope) in CASES.items():
        config_class = DeepseekV2Config if style == "v2" else DeepseekV3Config
        config = config_class(**SIZES, q_lora_rank=q_lora_rank, rope_parameters=dict(rope))
        layer = (DeepseekV2Attention if style == "v2" else DeepseekV3Attention)(config, 0).eval()
        rotary = (DeepseekV2RotaryEmbedding if style == "v2" else DeepseekV3RotaryEmbedding)(config)
        for name, weight in layer.named_parameters():
            if "norm" in name:
                weight.copy_(0.5 + torch.rand(weight.shape, generator=generator))
            else:
                weight.copy_(torch.randn(weight.shape, generator=generator) * weight.shape[1] ** -0.5)
            tensors[f"{case}.weights.{name}"] = weight.detach().clone()
        x = torch.randn(B, T, D, generator=generator)
        out, _ = layer(x, position_embeddings=rotary(x, positions), attention_mask=hidden)
        tensors |= {f"{case}.x": x, f"{case}.out": out, f"{case}.inv_freq": rotary.inv_freq.clone()}
        scales = [layer.scaling, rotary.attention_scaling]
        tensors[f"{case}.scales"] = torch.tensor(scales, dtype=torch.float64)  # of the softmax, of cos and sin
    tensors["positions"] = positions
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    save_file(tensors, Path(__file__).parent / "data" / "golden.safetensors", metadata=versions)


if __name__ == "__main__":
    main()
