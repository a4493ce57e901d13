"""Makes data/rms_norm.safetensors: inputs, weights and outputs of the RMSNorm of DeepSeek-V3 in transformers.

Run it from this folder. The inputs are chosen so that no normalized value lies close to the middle of two
neighbours of its dtype: whoever sums in another order still rounds to the same side.
"""

from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RMSNorm

MARGIN = 2**-7  # of the distance of two neighbours
BITS = {torch.bfloat16: 8, torch.float16: 11}


def far_from_ties(x: torch.Tensor, eps: float) -> bool:
    """Whether each normalized value, computed in float64, is far from where rounding changes sides."""
    wide = x.double()
    normed = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt()
    mantissa, _ = torch.frexp(normed)
    steps = mantissa.abs() * 2 ** BITS[x.dtype]
    return bool(((steps - steps.floor() - 0.5).abs() > MARGIN).all())


def main() -> None:
    """Search for suitable inputs, run the layer, and save all of it."""
    tensors = {}
    for dtype, name in [(torch.bfloat16, "bfloat16"), (torch.float16, "float16")]:
        for seed in range(10000):
            generator = torch.Generator().manual_seed(seed)
            scale = torch.tensor([3.0, 30.0, 300.0])[:, None]
            x = (torch.randn(3, 24, generator=generator) * scale).to(dtype)
            if far_from_ties(x, 1e-6):
                break
        layer = DeepseekV3RMSNorm(24).to(dtype)
        with torch.no_grad():
            layer.weight.copy_(1 + 0.3 * torch.randn(24, generator=generator))
            tensors[f"{name}.x"], tensors[f"{name}.out"] = x, layer(x)
        tensors[f"{name}.weight"] = layer.weight.detach()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    save_file(tensors, Path(__file__).parent / "data" / "rms_norm.safetensors", metadata=versions)


if __name__ == "__main__":
    main()
