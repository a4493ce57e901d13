"""One decoding step of attention on a filled cache, for every way to keep keys and values.

The caches and the attention are the track's references: `KVCache` of day 22, `grouped_attention` of day 23,
`multi_query_attention` of day 24, `LatentCache` of day 27, and the two orders of multiplication of day 28.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from checker.bench.device import Device, Timing
from reference.day16_scaled_dot_product import attention_flops
from reference.day22_kv_cache import KVCache
from reference.day23_grouped_query import grouped_attention
from reference.day24_multi_query import multi_query_attention
from reference.day27_mla_components import LatentCache
from reference.day28_mla_module import absorbed_attention, naive_attention


@dataclass(frozen=True)
class Shape:
    """One layer: H query heads of width `head_dim`; `groups` key heads for GQA; a latent of `latent` + `rope` numbers for MLA.

    The default is 64 heads of 128 beside DeepSeek's latent: the shape for which MLA's cache is 28.44 times smaller.
    """

    batch: int
    length: int
    heads: int = 64
    head_dim: int = 128
    groups: int = 8
    latent: int = 512
    rope: int = 64

    def elements(self, variant: str) -> int:
        """Numbers in the cache per token: 2 H d for MHA, 2 G d for GQA, 2 d for MQA, r + dr for MLA."""
        kinds = {
            "mha": 2 * self.heads * self.head_dim,
            "gqa": 2 * self.groups * self.head_dim,
            "mqa": 2 * self.head_dim,
        }
        return kinds.get(variant, self.latent + self.rope)

    def flops(self, variant: str) -> int:
        """FLOPs of scores and values for one query per row on the whole cache, with the products that MLA adds."""
        keys = values = self.head_dim
        readings = 0  # of a latent as a key and a value of one head, or of a query and a mixture the other way
        if variant == "mla naive":
            keys, readings = self.head_dim + self.rope, self.length
        elif variant == "mla absorbed":
            keys, values, readings = self.latent + self.rope, self.latent, 1
        around = 2 * self.batch * self.heads * readings * self.latent * 2 * self.head_dim
        return around + attention_flops(self.batch, self.heads, 1, self.length, keys, values)


@dataclass(frozen=True)
class Row:
    """One measured variant; bytes_read is what the step must read of the cache, once."""

    variant: str
    shape: Shape
    cache_bytes: int
    bytes_read: int
    flops: int
    timing: Timing

    @property
    def bandwidth(self) -> float:
        """Bytes of the cache per second."""
        return self.bytes_read / self.timing.median

    @property
    def intensity(self) -> float:
        """FLOPs per byte of the cache."""
        return self.flops / self.bytes_read


def shape_for(device: Device) -> Shape:
    """A shape whose MHA cache fits the device's budget; few rows, long context."""
    batch = 1 if device.device.type == "cpu" else 8
    per_token = batch * Shape(1, 1).elements("mha") * device.dtype.itemsize
    length = max(128, device.budget() // per_token // 128 * 128)
    return Shape(batch, length)


@torch.no_grad()
def measure(device: Device, shape: Shape, variant: str) -> Row:
    """Fill a cache to length - 1, then time: append one token, attend with one query per row."""
    step, cache = _MAKERS[variant](device, shape)
    timing = device.time(step)
    read = shape.batch * shape.length * shape.elements(variant) * device.dtype.itemsize
    return Row(variant, shape, cache.nbytes, read, shape.flops(variant), timing)


def _random(device: Device, *size: int) -> Tensor:
    return torch.randn(size, dtype=device.dtype, device=device.device)


def _keys_and_values(
    heads: Callable[[Shape], int], attend: Callable[..., Tensor]
) -> Callable[..., tuple[Callable, object]]:
    """A maker for the variants that cache keys and values of some heads."""

    def make(device: Device, shape: Shape) -> tuple[Callable[[], Tensor], KVCache]:
        count = heads(shape)
        cache = KVCache(shape.batch, count, shape.length, shape.head_dim, dtype=device.dtype, device=device.device)
        _fill(cache, device, shape, (shape.batch, count), (shape.head_dim, shape.head_dim))
        k, v = (_random(device, shape.batch, count, 1, shape.head_dim) for _ in range(2))
        q = _random(device, shape.batch, shape.heads, 1, shape.head_dim)

        def step() -> Tensor:
            cache.truncate(shape.length - 1)
            return attend(q, *cache.update(k, v))

        return step, cache

    return make


def _latent(attend: Callable[..., Tensor]) -> Callable[..., tuple[Callable, object]]:
    """A maker for MLA: the latent is read as it is, or expanded to keys and values of all heads at every step."""

    def make(device: Device, shape: Shape) -> tuple[Callable[[], Tensor], LatentCache]:
        b, h, d, r, dr = shape.batch, shape.heads, shape.head_dim, shape.latent, shape.rope
        cache = LatentCache(b, shape.length, r, dr, dtype=device.dtype, device=device.device)
        _fill(cache, device, shape, (b,), (r, dr))
        c, k_rope = _random(device, b, 1, r), _random(device, b, 1, dr)
        q_nope, q_rope = _random(device, b, h, 1, d), _random(device, b, h, 1, dr)
        kv_b = _random(device, h * 2 * d, r) * r**-0.5

        def step() -> Tensor:
            cache.truncate(shape.length - 1)
            return attend(q_nope, q_rope, *cache.update(c, k_rope), kv_b)

        return step, cache

    return make


def _fill(
    cache: KVCache | LatentCache, device: Device, shape: Shape, lead: tuple[int, ...], widths: tuple[int, int]
) -> None:
    """Put length - 1 random tokens into a cache, piece by piece."""
    left = shape.length - 1
    while left:
        size = min(left, 1024)
        cache.update(*(_random(device, *lead, size, width) for width in widths))
        left -= size


_MAKERS: dict[str, Callable[..., tuple[Callable, object]]] = {
    "mha": _keys_and_values(lambda shape: shape.heads, grouped_attention),
    "gqa": _keys_and_values(lambda shape: shape.groups, grouped_attention),
    "mqa": _keys_and_values(lambda shape: 1, lambda q, k, v: multi_query_attention(q, k[:, 0], v[:, 0])),
    "mla naive": _latent(naive_attention),
    "mla absorbed": _latent(absorbed_attention),
}
VARIANTS = tuple(_MAKERS)
