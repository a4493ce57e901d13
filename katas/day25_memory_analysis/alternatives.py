"""Day 25: right solutions, written differently."""

import math
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from checker.testing import alternative
from reference import day25_memory_analysis as right
from reference.day25_memory_analysis import MODELS, Claim, Cost, Hardware, KVRow, Roofline


@alternative("from_datasheet")
def from_datasheet__keywords(name, sparse_tflops, terabytes_per_second, gigabytes):
    dense = 10**12 * (sparse_tflops / 2)
    return Hardware(name=name, memory=10**9 * gigabytes, bandwidth=10**12 * terabytes_per_second, flops=dense)


@alternative("ridge")
def ridge__by_times(hw):
    return (1 / hw.bandwidth) / (1 / hw.flops)


@alternative("roofline")
def roofline__by_the_ridge(flops, bytes, hw):
    intensity = flops / bytes
    reached = min(hw.flops, intensity * hw.bandwidth)  # FLOPs per second under the roof
    bound = "compute" if flops * hw.bandwidth >= bytes * hw.flops else "memory"
    return Roofline(intensity, bound, flops / reached, reached / hw.flops)


@alternative("matmul_cost")
def matmul_cost__of_shapes(m, k, n, dtype_bytes):
    moved = sum(math.prod(shape) * dtype_bytes for shape in [(m, k), (k, n), (m, n)])
    return Cost(bytes=moved, flops=m * n * (k + k))


@alternative("linear_decode_cost")
def linear_decode_cost__as_one_product(params, batch, dtype_bytes=2):
    return Cost(right.matmul_cost(batch, params, 1, dtype_bytes).flops, dtype_bytes * params)


@alternative("compute_bound_batch")
def compute_bound_batch__from_one_weight(hw, dtype_bytes=2):
    reading, multiplying = dtype_bytes / hw.bandwidth, 2 / hw.flops
    return reading / multiplying


@alternative("kv_elements_per_token")
def kv_elements_per_token__match(arch):
    if arch.kind == "mha":
        per_layer = 2 * arch.heads * arch.head_dim
    elif arch.kind == "gqa":
        per_layer = 2 * arch.kv_heads * arch.head_dim
    elif arch.kind == "mqa":
        per_layer = 2 * arch.head_dim
    elif arch.kind == "mla":
        per_layer = arch.rope + arch.latent
    else:
        raise ValueError(f"no such kind: {arch.kind!r}")
    return per_layer * arch.layers


@alternative("kv_table")
def kv_table__by_comprehension():
    def row(arch, elements):
        ratio = 256 * arch.heads / (elements / arch.layers)
        return KVRow(arch.name, elements, elements + elements, elements / 500, elements / 512, ratio)

    return [row(arch, right.kv_elements_per_token(arch)) for arch in MODELS]


@alternative("reduction_claim")
def reduction_claim__written_out():
    latent, old = 512 + 64, 95 * 2 * 8 * 128
    shares = {
        f"{ratio}x": Claim(2 * h * 128 / latent, "mha", h, 16)
        for ratio, h in (("7.11", 16), ("28.44", 64), ("56.89", 128))
    }
    plain = Claim((old - 60 * latent) / old, "gqa", 8, 16)
    packed = Claim(1.0 - (60 * latent * 6) / (old * 16), "gqa", 8, 6)
    return {"93.3%": packed, "82.2%": plain, **shares}


@alternative("attention_decode_cost")
def attention_decode_cost__of_products(arch, batch, length, dtype_bytes, *, absorbed=True, queries=1):
    t, L, H = queries, length, arch.heads
    if arch.kind in ("mha", "gqa", "mqa"):
        d = arch.head_dim
        heads = {"mha": H, "gqa": arch.kv_heads, "mqa": 1}[arch.kind]
        products, shapes = [(t, d, L), (t, L, d)], [(heads, L, d)] * 2
    elif arch.kind != "mla":
        raise ValueError(f"{arch.kind} is not known")
    else:
        r, dr, dn, dv = arch.latent, arch.rope, arch.nope, arch.value
        shapes = [(L, r), (L, dr)]
        if absorbed:
            products = [(t, r, L), (t, dr, L), (t, L, r)]
        else:
            products = [(L, r, dn), (L, r, dv), (t, dn, L), (t, dr, L), (t, L, dv)]
            shapes += [(H, L, dn), (H, L, dv)] * 2
    flops = sum(2 * batch * H * math.prod(sizes) for sizes in products)
    return Cost(flops, sum(batch * math.prod(shape) for shape in shapes) * dtype_bytes)


@alternative("naive_vs_absorbed_crossover")
def naive_vs_absorbed_crossover__per_query(arch):
    per_query = (arch.latent + arch.rope + arch.latent) - (arch.nope + arch.rope + arch.value)
    return float("inf") if per_query <= 0 else (arch.nope * arch.latent + arch.value * arch.latent) / per_query


@alternative("max_batch")
def max_batch__floor_division(hw, weight_bytes, kv_bytes_per_token, context, reserve=0.1):
    free = hw.memory - reserve * hw.memory - weight_bytes
    return int(free // (kv_bytes_per_token * context)) if free > 0 else 0


@alternative("decode_step_seconds")
def decode_step_seconds__two_times(hw, weight_bytes_active, kv_bytes_per_token, batch, context, flops_per_token):
    reading = weight_bytes_active / hw.bandwidth + batch * (context * kv_bytes_per_token / hw.bandwidth)
    computing = flops_per_token / hw.flops * batch
    return computing if computing > reading else reading


@alternative("Meter")
class meter__book_of_storages(TorchDispatchMode):
    """Keeps a book of weak references and adds it up."""

    _should_skip_dynamo = bool

    def __init__(self):
        super().__init__()
        self.flops = self.calls = self.bytes_allocated = self.peak_bytes = 0
        self.book = {}

    @property
    def live_bytes(self):
        return sum(size for ref, size in self.book.values() if ref() is not None)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = self.storages([*args, *kwargs.values()])
        out = func(*args, **kwargs)
        outputs = self.storages([out])
        fresh = {key: s for key, s in outputs.items() if key not in inputs}
        self.calls += 0 if outputs and not fresh and not func._schema.is_mutable else 1
        for key, s in fresh.items():
            self.bytes_allocated += s.nbytes()
            self.book[key] = (weakref.ref(s), s.nbytes())
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        packet = func.overloadpacket
        aten = torch.ops.aten
        if packet in (aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten.addmm_, aten.baddbmm_):
            a = args[0] if packet in (aten.mm, aten.bmm) else args[1]
            self.flops += 2 * out.numel() * a.shape[-1]
        elif packet in (aten.mv, aten.dot, aten.addmv, aten.addmv_):
            self.flops += 2 * args[0 if packet in (aten.mv, aten.dot) else 1].numel()
        elif packet is aten.convolution:
            x, w = args[0], args[1]
            self.flops += 2 * out.numel() * (x.shape[1] // args[8]) * math.prod(w.shape[2:])
        return out

    def storages(self, things):
        found = {}
        for thing in things:
            if isinstance(thing, torch.Tensor):
                s = thing.untyped_storage()
                found[s._cdata] = s
            elif isinstance(thing, (list, tuple)):
                found |= self.storages(thing)
        return found


@alternative("regime_borders")
def regime_borders__by_trying(hw, arch, weight_bytes, weight_flops, context, queries=1, dtype_bytes=2):
    cache = right.kv_elements_per_token(arch) * dtype_bytes * context
    flops = (
        queries * weight_flops
        + right.attention_decode_cost(arch, 1, context, dtype_bytes, queries=queries).flops * arch.layers
    )
    cache_from = next(b for b in range(1, 10**6) if b * cache >= weight_bytes)
    if flops / hw.flops <= cache / hw.bandwidth:
        return cache_from, None
    b = 1
    while b * flops * hw.bandwidth < (weight_bytes + b * cache) * hw.flops:
        b += 1
    return cache_from, b
