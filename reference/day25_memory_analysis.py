"""What decoding costs, in bytes and FLOPs, and which of the two decides how long it takes.

The roofline is that of Williams, Waterman and Patterson (Communications of the ACM 52, 2009): a kernel takes as long as
the slower of computing and moving. The numbers that attention keeps per token are those of Shazeer (arXiv 1911.02150),
Ainslie et al. (arXiv 2305.13245) and DeepSeek-V2 (arXiv 2405.04434, section 2.1.4 and table 1); its comparison with
DeepSeek-67B is section 3.2.3 of the same report. `Meter` counts what really runs.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from reference.day16_scaled_dot_product import attention_flops


@dataclass(frozen=True)
class Hardware:
    """An accelerator: FLOPs per second without tricks, bytes per second, bytes."""

    name: str
    flops: float
    bandwidth: float
    memory: float


class Roofline(NamedTuple):
    """What a piece of work is limited by."""

    intensity: float
    bound: str
    seconds: float
    utilisation: float


class Cost(NamedTuple):
    """What a piece of work takes."""

    flops: int
    bytes: int


@dataclass(frozen=True)
class Arch:
    """The attention of a model, as far as its cache and its cost depend on it."""

    name: str
    kind: str  # "mha", "gqa", "mqa" or "mla"
    layers: int
    heads: int
    # ordinary attention
    kv_heads: int | None = None  # "gqa" only
    head_dim: int | None = None
    # latent attention
    latent: int | None = None
    nope: int | None = None
    rope: int | None = None
    value: int | None = None


class KVRow(NamedTuple):
    """What a token leaves in the cache of a model."""

    name: str
    elements: int
    bytes: int
    kilobytes: float
    kibibytes: float
    ratio: float


class Claim(NamedTuple):
    """A published saving, and what has to be assumed to get it."""

    value: float
    baseline: str
    heads: int
    bits: int


_LATENT = {"latent": 512, "nope": 128, "rope": 64, "value": 128}
MODELS = (
    Arch("DeepSeek-V2-Lite", "mla", layers=27, heads=16, **_LATENT),
    Arch("DeepSeek-V2", "mla", layers=60, heads=128, **_LATENT),
    Arch("DeepSeek-V3", "mla", layers=61, heads=128, **_LATENT),
    Arch("MLA with 64 heads", "mla", layers=61, heads=64, **_LATENT),
    Arch("DeepSeek-67B", "gqa", layers=95, heads=64, kv_heads=8, head_dim=128),
    Arch("DeepSeekMath-7B", "mha", layers=30, heads=32, head_dim=128),
    Arch("Llama-3.1-405B", "gqa", layers=126, heads=128, kv_heads=8, head_dim=128),
    Arch("Qwen2.5-72B", "gqa", layers=80, heads=64, kv_heads=8, head_dim=128),
)

# the left operand of each matrix product, among the arguments of its ATen operation; the right one follows
_LEFT = {"mm": 0, "bmm": 0, "mv": 0, "dot": 0, "addmm": 1, "baddbmm": 1, "addmv": 1}


def from_datasheet(name: str, sparse_tflops: float, terabytes_per_second: float, gigabytes: float) -> Hardware:
    """Return the accelerator of a data sheet whose TFLOPS are those with sparsity: twice what dense matrices get."""
    return Hardware(name, sparse_tflops * 1e12 / 2, terabytes_per_second * 1e12, gigabytes * 1e9)


def ridge(hw: Hardware) -> float:
    """Return the FLOPs per byte at which computing and moving take equally long."""
    return hw.flops / hw.bandwidth


def roofline(flops: float, bytes: float, hw: Hardware) -> Roofline:
    """Return what limits a piece of work, and how long it takes at best: both happen at once, the slower one counts."""
    computing, moving = flops / hw.flops, bytes / hw.bandwidth
    seconds = max(computing, moving)
    return Roofline(flops / bytes, "memory" if moving > computing else "compute", seconds, computing / seconds)


def matmul_cost(m: int, k: int, n: int, dtype_bytes: int) -> Cost:
    """Return the cost of (m, k) times (k, n), each of the three matrices moved once."""
    return Cost(2 * m * k * n, (m * k + k * n + m * n) * dtype_bytes)


def linear_decode_cost(params: int, batch: int, dtype_bytes: int = 2) -> Cost:
    """Return the cost of one token per sequence through weight matrices that are read once for the whole batch."""
    return Cost(2 * params * batch, params * dtype_bytes)


def compute_bound_batch(hw: Hardware, dtype_bytes: int = 2) -> float:
    """Return the batch at which reading the weights takes as long as multiplying by them."""
    return ridge(hw) * dtype_bytes / 2


def kv_elements_per_token(arch: Arch) -> int:
    """Return how many numbers one token leaves in the caches of all layers."""
    return arch.layers * _kept(arch)


def kv_table() -> list[KVRow]:
    """Return a row for each of `MODELS`, with a cache of bfloat16."""
    rows = []
    for arch in MODELS:
        elements = kv_elements_per_token(arch)
        size = 2 * elements
        rows.append(KVRow(arch.name, elements, size, size / 1000, size / 1024, _mha_elements(arch) / elements))
    return rows


def reduction_claim() -> dict[str, Claim]:
    """Return the five savings that are quoted for latent attention, each derived from its own assumptions."""
    model = {arch.name: arch for arch in MODELS}
    claims = {}
    for key, name in (("7.11x", "DeepSeek-V2-Lite"), ("28.44x", "MLA with 64 heads"), ("56.89x", "DeepSeek-V3")):
        arch = model[name]
        claims[key] = Claim(_mha_elements(arch) / kv_elements_per_token(arch), "mha", arch.heads, 16)
    before = 16 * kv_elements_per_token(model["DeepSeek-67B"])
    for key, bits in (("82.2%", 16), ("93.3%", 6)):
        after = bits * kv_elements_per_token(model["DeepSeek-V2"])
        claims[key] = Claim(1 - after / before, "gqa", model["DeepSeek-67B"].kv_heads, bits)
    return claims


def attention_decode_cost(
    arch: Arch, batch: int, length: int, dtype_bytes: int, *, absorbed: bool = True, queries: int = 1
) -> Cost:
    """Return the cost of scores and mixture in one layer, bytes of the cache included, projections not."""
    core = partial(attention_flops, b=batch, h=arch.heads, tq=queries, tk=length)
    numbers = _kept(arch)  # read, per cached token
    if arch.kind != "mla":
        flops = core(d=arch.head_dim, dv=arch.head_dim)
    elif absorbed:
        flops = core(d=arch.latent + arch.rope, dv=arch.latent)
    else:
        expanded = arch.heads * (arch.nope + arch.value)  # the keys and values of one token
        flops = core(d=arch.nope + arch.rope, dv=arch.value) + 2 * batch * length * arch.latent * expanded
        numbers += 2 * expanded  # written, and read again
    return Cost(flops, batch * length * numbers * dtype_bytes)


def naive_vs_absorbed_crossover(arch: Arch) -> float:
    """Return the number of queries per block at which expanding the latents costs as many FLOPs as not to."""
    widths = arch.nope + arch.value
    saved = 2 * arch.latent - widths  # per query, key and head, in multiply-adds
    return arch.latent * widths / saved if saved > 0 else math.inf


def max_batch(hw: Hardware, weight_bytes: float, kv_bytes_per_token: float, context: int, reserve: float = 0.1) -> int:
    """Return how many sequences of `context` tokens fit beside the weights."""
    free = hw.memory * (1 - reserve) - weight_bytes
    return max(math.floor(free / (kv_bytes_per_token * context)), 0)


def decode_step_seconds(
    hw: Hardware,
    weight_bytes_active: float,
    kv_bytes_per_token: float,
    batch: int,
    context: int,
    flops_per_token: float,
) -> float:
    """Return how long one token for each sequence takes at best: the weights are read once, the caches all."""
    moved = weight_bytes_active + batch * context * kv_bytes_per_token
    return roofline(batch * flops_per_token, moved, hw).seconds


class Meter(TorchDispatchMode):
    """Counts what runs inside its `with` block: FLOPs of matrix products, ATen calls, bytes of new memory."""

    _should_skip_dynamo = bool  # called without arguments: False. True would import torch's compiler at the first call

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.calls = 0
        self.bytes_allocated = self.live_bytes = self.peak_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run one ATen operation and write it down."""
        kwargs = kwargs or {}
        known = set(_storages((args, kwargs)))
        result = func(*args, **kwargs)
        made = set(_storages(result))
        new = made - known
        if new or not made or func._schema.is_mutable:  # anything else is a view
            self.calls += 1
        self.flops += _contraction_flops(func.overloadpacket.__name__.rstrip("_"), args, result)
        for storage in new:
            self.bytes_allocated += storage.nbytes()
            self.live_bytes += storage.nbytes()
            weakref.finalize(storage, self._released, storage.nbytes())
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        return result

    def _released(self, size: int) -> None:
        self.live_bytes -= size


def regime_borders(
    hw: Hardware,
    arch: Arch,
    weight_bytes: float,
    weight_flops: float,
    context: int,
    queries: int = 1,
    dtype_bytes: int = 2,
) -> tuple[int, int | None]:
    """Return the smallest batches at which caches outweigh the weights, and at which computing outlasts moving."""
    cache = context * kv_elements_per_token(arch) * dtype_bytes  # bytes of one sequence
    core = arch.layers * attention_decode_cost(arch, 1, context, dtype_bytes, queries=queries).flops
    computing = (queries * weight_flops + core) / hw.flops  # seconds of one sequence
    gained = computing - cache / hw.bandwidth  # by which computing gains on moving, with each sequence
    compute_from = math.ceil(weight_bytes / hw.bandwidth / gained) if gained > 0 else None
    return math.ceil(weight_bytes / cache), compute_from


def _kept(arch: Arch) -> int:
    """Return how many numbers one token leaves in one layer."""
    if arch.kind == "mla":
        return arch.latent + arch.rope
    kv_heads = {"mha": arch.heads, "gqa": arch.kv_heads, "mqa": 1}
    if arch.kind not in kv_heads:
        raise ValueError(f"kind ({arch.kind}) is none of mha, gqa, mqa, mla")
    return 2 * kv_heads[arch.kind] * arch.head_dim


def _mha_elements(arch: Arch) -> int:
    """Return what a token would leave if every head, 128 wide, kept its own keys and values."""
    return arch.layers * 2 * arch.heads * 128


def _storages(tree: Any) -> list[UntypedStorage]:
    """Return the memory of all tensors in nested lists, tuples and dicts."""
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _contraction_flops(name: str, args: tuple, result: Any) -> int:
    """Return two FLOPs for each multiply-add of a matrix product or a convolution, and 0 for anything else."""
    if name == "convolution":
        return 2 * result.numel() * math.prod(args[1].shape[1:])  # each result meets one filter
    if name not in _LEFT:
        return 0
    left, right = args[_LEFT[name]], args[_LEFT[name] + 1]
    return 2 * left.numel() * (right.shape[-1] if right.dim() > 1 else 1)
