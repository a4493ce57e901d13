"""Decoding with a whole DeepSeek model of random weights, beside the roofline of its bytes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from checker.bench.device import Device, Machine, Timing
from reference.day29_deepseek_architecture import DeepSeekConfig, count_active, count_parameters, kv_cache_bytes
from reference.day31_deepseek_integration import DeepSeekForCausalLM, init_weights_

_CONTEXT = 256  # tokens in the cache before the measured one


@dataclass(frozen=True)
class ModelRow:
    """One measured model: `bytes_read` are the active weights and the cache, once each."""

    name: str
    parameters: int
    active: int
    cache_bytes: int
    bytes_read: int
    timing: Timing

    def roofline(self, machine: Machine) -> float:
        """Tokens per second if the step took no longer than reading its bytes at the measured copy bandwidth."""
        return machine.copy_bandwidth / self.bytes_read


def config_for(device: Device) -> tuple[str, DeepSeekConfig]:
    """DeepSeek-V2-Lite where the device holds it; else its shape with fewer layers, narrower experts and a smaller vocabulary."""
    full = DeepSeekConfig.v2_lite()
    room = 0.7 * device.free()
    if device.device.type != "cpu" and count_parameters(full)["total"] * device.dtype.itemsize < room:
        return "V2-Lite", full
    small = replace(
        full,
        num_hidden_layers=4,
        n_routed_experts=16,
        vocab_size=8192,
        intermediate_size=2048,
        moe_intermediate_size=512,
    )
    return "V2-Lite, cut", small


@torch.no_grad()
def measure(device: Device) -> ModelRow:
    """Fill a latent cache with a prompt, then time single tokens on it."""
    name, config = config_for(device)
    before = torch.get_default_dtype()
    torch.set_default_dtype(device.dtype)
    try:
        with device.device:
            model = DeepSeekForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    generator = torch.Generator(device.device).manual_seed(1)
    init_weights_(model, 0.02, generator=generator)
    caches = model.new_caches(1, _CONTEXT + 1, device.dtype)
    prompt = torch.randint(config.vocab_size, (1, _CONTEXT), generator=generator, device=device.device)
    model(prompt, caches=caches, last_only=True)
    token = prompt[:, :1]

    def step() -> torch.Tensor:
        for cache in caches:
            cache.truncate(_CONTEXT)
        return model(token, caches=caches)

    timing = device.time(step)
    active = count_active(config)
    cache_bytes = kv_cache_bytes(config, 1, _CONTEXT + 1, device.dtype.itemsize)
    read = active * device.dtype.itemsize + cache_bytes
    return ModelRow(name, count_parameters(config)["total"], active, cache_bytes, read, timing)
