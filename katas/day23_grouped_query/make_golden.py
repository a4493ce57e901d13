"""Make data/golden.safetensors: what the attention of Llama in transformers computes with tiny weights.

Run it by hand: `python katas/day23_grouped_query/make_golden.py`. The spec reads the file and never imports transformers.
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

BATCH, T, D_MODEL, HEADS, KV_HEADS, HEAD_DIM = 2, 6, 24, 6, 2, 8


@torch.no_grad()
def main() -> None:
    """Write the weights, an input, and the outputs for two choices of positions."""
    gen = torch.Generator().manual_seed(23)
    config = LlamaConfig(
        hidden_size=D_MODEL,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        attn_implementation="eager",
    )
    layer, rotary = LlamaAttention(config, 0).eval(), LlamaRotaryEmbedding(config)
    for weight in layer.parameters():
        weight.copy_(torch.randn(weight.shape, generator=gen) * 2 * weight.shape[1] ** -0.5)
    x = torch.randn(BATCH, T, D_MODEL, generator=gen)
    future = torch.full((T, T), -torch.inf).triu(1)[None, None]
    golden = {**layer.state_dict(), "x": x}
    choices = {
        "plain": torch.arange(T).expand(BATCH, T),
        "given": torch.tensor([[0, 1, 2, 3, 4, 5], [3, 4, 9, 10, 11, 40]]),
    }
    for name, positions in choices.items():
        golden[f"{name}.positions"] = positions
        golden[f"{name}.out"], _ = layer(x, position_embeddings=rotary(x, positions), attention_mask=future)

    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    path = Path(__file__).parent / "data" / "golden.safetensors"
    path.parent.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous().clone() for name, tensor in golden.items()}, path, metadata=versions)
    print(f"{path.name}: {path.stat().st_size:,} bytes, {versions}")


if __name__ == "__main__":
    main()
