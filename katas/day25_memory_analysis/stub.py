"""Day 25: what decoding costs, and what it waits for. `kata lesson` explains, `kata check` tells you where you are.

Only `Meter` has to do with tensors; everything else counts, and makes none. FLOPs and bytes are exact ints unless a
docstring says otherwise, and a multiply-add is two FLOPs.

Where a function takes `hw` or `arch`, it reads the fields of `Hardware` or `Arch` by their names and uses nothing else:
the checks hand in records of their own. Fields that a kind of attention has no use for are None.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from day16_scaled_dot_product import attention_flops  # noqa: F401 - yours, if you passed day 16
from torch.utils._python_dispatch import TorchDispatchMode

# Records and models. Nothing to do here.


@dataclass(frozen=True)
class Hardware:
    """An accelerator."""

    name: str
    flops: float  # per second, for dense bfloat16 matrices
    bandwidth: float  # bytes per second between memory and cores
    memory: float  # bytes


class Roofline(NamedTuple):
    """What a piece of work is limited by; see `roofline`."""

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
    # ordinary attention: "mha", "gqa", "mqa"
    kv_heads: int | None = None  # heads of keys and values; given for "gqa" only
    head_dim: int | None = None  # width of a head, for queries, keys and values
    # latent attention: "mla"
    latent: int | None = None  # width of the latent; all heads share it
    nope: int | None = None  # width of a head's key that is made from the latent
    rope: int | None = None  # width of the rotated key; all heads share it
    value: int | None = None  # width of a head's value, made from the latent


class KVRow(NamedTuple):
    """What a token leaves in the cache of a model; see `kv_table`."""

    name: str
    elements: int
    bytes: int
    kilobytes: float
    kibibytes: float
    ratio: float


class Claim(NamedTuple):
    """A published saving, and what has to be assumed to get it; see `reduction_claim`."""

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

# From here on it is yours.


def from_datasheet(name: str, sparse_tflops: float, terabytes_per_second: float, gigabytes: float) -> Hardware:
    """Return the accelerator of a data sheet.

    The sheet prints its TFLOPS "with sparsity": twice what dense matrices get, and dense is what `Hardware.flops` wants.
    Prefixes are decimal: tera is 10**12, giga is 10**9. The fields may be floats.
    """
    raise NotImplementedError


def ridge(hw: Hardware) -> float:
    """Return the FLOPs per byte at which computing and moving take equally long on this machine."""
    raise NotImplementedError


def roofline(flops: float, bytes: float, hw: Hardware) -> Roofline:
    """Return what limits a piece of work that needs `flops` FLOPs and moves `bytes` bytes, both above 0.

    intensity: FLOPs per byte
    bound: "memory" if moving takes longer than computing, else "compute" (also if both take equally long)
    seconds: the time it takes at best. Computing and moving go on at the same time.
    utilisation: the share of hw.flops that is reached in that time, 1 where computing is the limit
    """
    raise NotImplementedError


def matmul_cost(m: int, k: int, n: int, dtype_bytes: int) -> Cost:
    """Return the cost of a product of (m, k) and (k, n).

    Each multiply-add is two FLOPs. The two operands are read once, the result is written once; each number takes
    dtype_bytes.
    """
    raise NotImplementedError


def linear_decode_cost(params: int, batch: int, dtype_bytes: int = 2) -> Cost:
    """Return the cost of one decode step in weight matrices that have `params` numbers together.

    One token of each of the `batch` sequences meets every weight once. The weights are read once for all of them;
    the few numbers that go in and come out are not counted.
    """
    raise NotImplementedError


def compute_bound_batch(hw: Hardware, dtype_bytes: int = 2) -> float:
    """Return the batch, as a float, at which the step of `linear_decode_cost` has exactly the intensity `ridge(hw)`."""
    raise NotImplementedError


def kv_elements_per_token(arch: Arch) -> int:
    """Return how many numbers one token of one sequence leaves in the caches of all layers.

    Ordinary attention keeps a key and a value of head_dim per head of keys and values: `heads` of them for "mha",
    kv_heads for "gqa", one for "mqa". "mla" keeps the latent and the rotated key, whatever the number of heads.
    Any other kind raises ValueError with the kind in the message.
    """
    raise NotImplementedError


def kv_table() -> list[KVRow]:
    """Return one row for each of `MODELS`, in their order.

    name: as in MODELS
    elements: numbers per token, of all layers
    bytes: the same in bfloat16, two bytes each (int)
    kilobytes, kibibytes: the bytes in units of 1000 (kB) and of 1024 (KiB), as floats
    ratio: how many times as much a model with as many layers and heads would keep, each head with its own key and value
        of width 128
    """
    raise NotImplementedError


def reduction_claim() -> dict[str, Claim]:
    """Return five savings that are quoted for latent attention, derived from `MODELS`, with what each one assumes.

    The keys are "7.11x", "28.44x", "56.89x", "82.2%" and "93.3%". A Claim has
      value: the number, not rounded. For an "x" the cache before divided by the cache after, for a "%" the share (0 to 1)
          of the cache that is saved.
      baseline: "mha" if it is compared with a model of as many layers and heads in which every head has its own key
          and value of width 128, "gqa" if it is compared with DeepSeek-67B
      heads: heads of keys and values in the baseline
      bits: bits of a number in the cache after; in that before it has 16
    The three "x" belong to three of the MODELS, the two "%" to DeepSeek-V2: one in bfloat16, one with the 6 bits per
    number to which its authors compress the cache.
    """
    raise NotImplementedError


def attention_decode_cost(
    arch: Arch, batch: int, length: int, dtype_bytes: int, *, absorbed: bool = True, queries: int = 1
) -> Cost:
    """Return the cost of attention itself in one layer: scores and mixture over caches of `length` tokens.

    Each of the `batch` sequences has a cache of its own, and asks `queries` queries per head; none is masked. Every
    query head meets all `length` tokens, however many heads share a key. FLOPs are those of the matrix products.
    Bytes: the cache is read once per step, whatever the number of queries; queries, scores and outputs are
    not counted, nor are the projections to queries, keys, values and outputs, in either measure.
    "mla" with absorbed=True: scores are products of width latent + rope, the mixture has width latent, and the cache is
        all that is read.
    "mla" with absorbed=False: the keys (nope) and values (value) of all heads are first made from the latents of all tokens,
        by a matrix product that counts. Scores then have width nope + rope, the mixture has width value. The
        cache is read once, the keys and values that were made are written once and read once.
    For the other kinds `absorbed` plays no part. An unknown kind raises ValueError with the kind in the message.
    """
    raise NotImplementedError


def naive_vs_absorbed_crossover(arch: Arch) -> float:
    """Return how many queries per sequence make both orders of latent attention equally dear, in FLOPs.

    FLOPs as `attention_decode_cost` counts them: with more queries than this absorbed=False has fewer FLOPs. In
    general the result is no whole number. math.inf where absorbed=True has fewer FLOPs for any number of queries.
    """
    raise NotImplementedError


def max_batch(hw: Hardware, weight_bytes: float, kv_bytes_per_token: float, context: int, reserve: float = 0.1) -> int:
    """Return how many sequences of `context` tokens fit into the memory at most, beside the weights.

    The share `reserve` of the whole memory stays free for other things. 0 where not one fits, or not even the weights.
    """
    raise NotImplementedError


def decode_step_seconds(
    hw: Hardware,
    weight_bytes_active: float,
    kv_bytes_per_token: float,
    batch: int,
    context: int,
    flops_per_token: float,
) -> float:
    """Return the seconds that one decode step takes at best: one new token for each of `batch` sequences.

    The active weights are read once, and of each sequence the caches of `context` tokens. Each new token takes
    flops_per_token. Computing and moving go on at the same time.
    """
    raise NotImplementedError


class Meter(TorchDispatchMode):
    """Counts every ATen operation that runs inside `with Meter() as meter:`. All counts are ints and start at 0.

    flops: two per multiply-add of the matrix products (mm, bmm, mv, dot; addmm, baddbmm, addmv, whose added term is
        free), their in-place forms, and of convolution (in groups or not, not transposed). Anything else has none.
    calls: operations that do something. A view does not count: it writes nothing, and all tensors that it returns lie
        in the memory of its arguments. Whatever writes, returns new memory or returns no tensor counts.
    bytes_allocated: bytes of all memory that came into being, each storage as a whole and once; what an operation writes
        into memory that it was given adds none.
    live_bytes: the part of it that is still in use. Memory is in use as long as any tensor lies in it.
    peak_bytes: the highest value that live_bytes has had.

    The operations give the results that they give without the meter, and the meter runs none of its own. Meters nest:
    what runs in the inner one counts for both. A meter that is entered again goes on counting. Backward passes count,
    too. Two runs of the same code give the same counts.
    """

    _should_skip_dynamo = bool  # called without arguments: False. True would import torch's compiler at the first call

    def __init__(self) -> None:
        raise NotImplementedError

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """PyTorch calls this in place of each ATen operation `func`; what it returns is the operation's result."""
        raise NotImplementedError


def regime_borders(
    hw: Hardware,
    arch: Arch,
    weight_bytes: float,
    weight_flops: float,
    context: int,
    queries: int = 1,
    dtype_bytes: int = 2,
) -> tuple[int, int | None]:
    """Return (cache_from, compute_from): the smallest batches from which a decode step waits for something else.

    A step reads weight_bytes once and the caches of all sequences, `context` tokens each, in all layers. It computes, for
    each of the `queries` new tokens of each sequence, weight_flops, and for each sequence the attention of all
    layers, as `attention_decode_cost` with absorbed=True counts it.
    cache_from: from this batch on the caches have at least as many bytes as the weights
    compute_from: from this batch on computing takes at least as long as moving all the bytes; None where no batch does
    The second may be smaller than the first. Both are at least 1.
    """
    raise NotImplementedError
