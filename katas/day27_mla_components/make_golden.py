"""Makes data/golden.safetensors: weights, inputs and intermediate tensors of the attention of DeepSeek-V2 and V3.

Run it from any folder; it needs transformers, but no network. Three small layers, with weights of variance 1/fan_in and
gains around 1: "v2" with plain queries and plain RoPE, "v2.compressed" with YaRN whose tables stay pure rotations, and
"v3.compressed" with a YaRN of two scales, whose tables lengthen what they turn. The cached key of V3 comes out of
transformers with its halves apart; here it is put back into neighboring pairs.
"""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from safetensors.torch import save_file
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3

B, T, D = 2, 4, 24
WIDTHS = {
    "hidden_size": D,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 8,
    "v_head_dim": 6,
    "kv_lora_rank": 14,
    "max_position_embeddings": 2560,
    "attn_implementation": "eager",
}
POSITIONS = torch.stack((torch.arange(T), torch.arange(70, 70 + T)))


def rope(mscale=None, mscale_all_dim=None):
    """Plain frequencies, or DeepSeek's YaRN with an original context of 64 tokens."""
    if mscale is None:
        return {"rope_type": "default", "rope_theta": 10000.0}
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


class Recorder:
    """Stands where a cache stands, and keeps what a layer stores."""

    def update(self, latent, key, layer):
        """Remember both, (B, 1, T, r) and (B, 1, T, dr)."""
        self.latent, self.key = latent[:, 0], key[:, 0]
        return latent, key


@torch.no_grad()
def intermediates(library, attention, rotary, config):
    """Tensors of one layer, by name."""
    layer = attention(config, 0).eval()
    for name, weight in layer.named_parameters():
        if "norm" in name:
            weight.uniform_(0.5, 1.5)
        else:
            weight.normal_(std=weight.shape[-1] ** -0.5)
    x = torch.randn(B, T, D)
    tables = rotary(config)(x, POSITIONS)
    seen = {}

    def spy(module, query, key, value, mask, scaling, **options):
        seen.update(query=query, key=key, value=value, scale=torch.tensor(scaling))
        return torch.zeros(B, T, query.shape[1], value.shape[-1]), None

    library.eager_attention_forward, original = spy, library.eager_attention_forward
    recorder = Recorder()
    layer(x, position_embeddings=tables, attention_mask=None, past_key_values=recorder)
    library.eager_attention_forward = original
    dn, half = config.qk_nope_head_dim, config.qk_rope_head_dim // 2
    q_rope, k_rope = seen["query"][..., dn:], recorder.key
    if library is v2:
        cos, sin = tables.real, tables.imag
    else:
        cos, sin = (table[..., :half] for table in tables)
        q_rope, k_rope = (x.unflatten(-1, (2, half)).transpose(-2, -1).flatten(-2) for x in (q_rope, k_rope))
    kept = {name: weight for name, weight in layer.state_dict().items() if not name.startswith("o_proj")}
    kept |= {"x": x, "cos": cos, "sin": sin, "c": recorder.latent, "k_rope": k_rope}
    kept |= {"q_nope": seen["query"][..., :dn], "q_rope": q_rope, "scale": seen["scale"]}
    kept |= {"k_nope": seen["key"][..., :dn], "v": seen["value"]}
    kept["scores"] = seen["query"] @ seen["key"].mT * seen["scale"]
    return {name: tensor.detach().clone().contiguous() for name, tensor in kept.items()}


def main() -> None:
    """Run the three layers and save all of it."""
    torch.manual_seed(27)
    v2_parts = (v2, v2.DeepseekV2Attention, v2.DeepseekV2RotaryEmbedding)
    v3_parts = (v3, v3.DeepseekV3Attention, v3.DeepseekV3RotaryEmbedding)
    layers = {
        "v2": (*v2_parts, v2.DeepseekV2Config(**WIDTHS, q_lora_rank=None, rope_parameters=rope())),
        "v2.compressed": (*v2_parts, v2.DeepseekV2Config(**WIDTHS, q_lora_rank=16, rope_parameters=rope(0.707, 0.707))),
        "v3.compressed": (*v3_parts, v3.DeepseekV3Config(**WIDTHS, q_lora_rank=16, rope_parameters=rope(1.0, 0.5))),
    }
    tensors = {}
    for case, parts in layers.items():
        tensors |= {f"{case}/{name}": tensor for name, tensor in intermediates(*parts).items()}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    save_file(tensors, Path(__file__).parent / "data" / "golden.safetensors", metadata=versions)


if __name__ == "__main__":
    main()
