"""Makes data/moe.safetensors: weights, inputs, routes and outputs of the MoE layers of DeepSeek-V2 and -V3 in transformers.

Run it from this folder. Weights are widely spread and most router biases negative, so that a mistake shows. Tokens
whose experts change when the router's logits move by a thousandth are left out.
"""

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

WIDTHS = {
    "hidden_size": 16,
    "moe_intermediate_size": 6,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "experts_implementation": "eager",
}
GROUPS = {"n_group": 4, "topk_group": 2}
CASES = {
    "v2_greedy": (2, {"n_shared_experts": 2, "topk_method": "greedy", "routed_scaling_factor": 1.0, "norm_topk_prob": False}),
    "v2_groups": (2, {"n_shared_experts": 2, "topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0,
                      "norm_topk_prob": False} | GROUPS),
    "v3_groups": (3, {"n_shared_experts": 1, "routed_scaling_factor": 2.5, "norm_topk_prob": True} | GROUPS),
    "v3_raw": (3, {"n_shared_experts": 1, "routed_scaling_factor": 2.5, "norm_topk_prob": False, "n_group": 2, "topk_group": 1}),
}  # fmt: skip
READ = ("hidden_size", "moe_intermediate_size", "n_routed_experts", "n_shared_experts", "num_experts_per_tok")
READ += ("norm_topk_prob", "routed_scaling_factor")


@torch.no_grad()
def make(version: int, options: dict) -> tuple[dict[str, torch.Tensor], dict]:
    """The tensors of one case, and the configuration of the kata that belongs to it."""
    if version == 2:
        layer = DeepseekV2Moe(DeepseekV2Config(**WIDTHS, **options))
    else:
        layer = DeepseekV3MoE(DeepseekV3Config(**WIDTHS, **options))
    for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
        if name.endswith("e_score_correction_bias"):
            tensor.uniform_(-3.0, 0.3)
        else:
            tensor.normal_(std=tensor.shape[-1] ** -0.5)
    x = torch.randn(200, 16)
    logits, weights, indices = layer.gate(x)
    firm = torch.ones(len(x), dtype=torch.bool)
    for _ in range(20):
        layer.gate.weight.add_(noise := torch.randn_like(layer.gate.weight) * 3e-4)
        firm &= (layer.gate(x)[2].sort().values == indices.sort().values).all(dim=1)
        layer.gate.weight.sub_(noise)
    keep = firm.nonzero().flatten()[:24]
    tensors = {"x": x[keep], "out": layer(x[keep])}
    tensors["logits"], tensors["weights"], tensors["indices"] = layer.gate(x[keep])
    for name, tensor in layer.state_dict().items():
        if name == "experts.gate_up_proj":
            for number, both in enumerate(tensor):
                gate, up = both.chunk(2)
                tensors[f"layer.experts.{number}.gate_proj.weight"] = gate
                tensors[f"layer.experts.{number}.up_proj.weight"] = up
        elif name == "experts.down_proj":
            for number, down in enumerate(tensor):
                tensors[f"layer.experts.{number}.down_proj.weight"] = down
        else:
            tensors[f"layer.{name}"] = tensor
    config = {name: (WIDTHS | options)[name] for name in READ}
    config |= {name: options.get(name) for name in GROUPS}
    config["scoring_func"] = {2: "softmax", 3: "sigmoid"}[version]
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}, config


def main() -> None:
    """Make all cases and save them."""
    torch.manual_seed(30)
    tensors, configs = {}, {}
    for case, (version, options) in CASES.items():
        made, configs[case] = make(version, options)
        tensors |= {f"{case}.{name}": tensor for name, tensor in made.items()}
    metadata = {"torch": torch.__version__, "transformers": transformers.__version__, "configs": json.dumps(configs)}
    folder = Path(__file__).parent / "data"
    save_file(tensors, folder / "moe.safetensors", metadata=metadata)


if __name__ == "__main__":
    main()
