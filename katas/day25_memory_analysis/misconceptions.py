"""Day 25: known wrong solutions, each with the sentence for whoever wrote it."""

import math
import weakref

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from checker.testing import misconception
from reference import day25_memory_analysis as right
from reference.day25_memory_analysis import MODELS, Claim, Cost, Hardware, KVRow, Roofline

# from_datasheet, ridge


@misconception(
    "from_datasheet",
    "Your flops are twice what a dense product can get: the sheet counts with sparsity, where half of the weights are zeros "
    "that are skipped. Halve its number.",
)
def from_datasheet__with_sparsity(name, sparse_tflops, terabytes_per_second, gigabytes):
    return Hardware(name, sparse_tflops * 1e12, terabytes_per_second * 1e12, gigabytes * 1e9)


@misconception(
    "from_datasheet",
    "Your memory is 7 % too large. GB means 10**9 bytes; 2**30 of them are a GiB.",
)
def from_datasheet__gibibytes(name, sparse_tflops, terabytes_per_second, gigabytes):
    return Hardware(name, sparse_tflops * 5e11, terabytes_per_second * 1e12, gigabytes * 2**30)


@misconception(
    "ridge",
    "A ridge of 0.003 is bytes per FLOP, upside down. How many FLOPs can the machine do in the time that one byte takes?",
)
def ridge__upside_down(hw):
    return hw.bandwidth / hw.flops


# roofline


@misconception(
    "roofline",
    "You added the two times. While one block of numbers is computed with, the next one is on its way: they overlap, and the "
    "longer of the two remains.",
)
def roofline__one_after_the_other(flops, bytes, hw):
    known = right.roofline(flops, bytes, hw)
    seconds = flops / hw.flops + bytes / hw.bandwidth
    return known._replace(seconds=seconds, utilisation=flops / hw.flops / seconds)


@misconception(
    "roofline",
    "You took the faster of the two times. Work is done when both are done, so the slower one counts.",
)
def roofline__the_faster(flops, bytes, hw):
    known = right.roofline(flops, bytes, hw)
    seconds = min(flops / hw.flops, bytes / hw.bandwidth)
    return known._replace(seconds=seconds, utilisation=flops / hw.flops / seconds)


@misconception(
    "roofline",
    "The two words are exchanged. Few FLOPs per byte, fewer than the ridge: then it is memory that everything waits for.",
)
def roofline__bounds_exchanged(flops, bytes, hw):
    known = right.roofline(flops, bytes, hw)
    return known._replace(bound="compute" if known.bound == "memory" else "memory")


@misconception(
    "roofline",
    "Your utilisation grows above 1. Beyond the ridge more intensity helps no more: the machine computes all the time already.",
)
def roofline__more_than_everything(flops, bytes, hw):
    known = right.roofline(flops, bytes, hw)
    return known._replace(utilisation=known.intensity / (hw.flops / hw.bandwidth))


@misconception(
    "roofline",
    "You report the share of the bandwidth that is used. It is 1 where memory is the limit; asked for is the share of the FLOPs.",
)
def roofline__of_the_bandwidth(flops, bytes, hw):
    known = right.roofline(flops, bytes, hw)
    return Roofline(known.intensity, known.bound, known.seconds, bytes / hw.bandwidth / known.seconds)


# matmul_cost, linear_decode_cost, compute_bound_batch


@misconception(
    "matmul_cost",
    "Your FLOPs are half of what they should be: each step of a dot product is a multiplication and an addition, and both count.",
)
def matmul_cost__one_flop_per_step(m, k, n, dtype_bytes):
    return Cost(m * k * n, right.matmul_cost(m, k, n, dtype_bytes).bytes)


@misconception(
    "matmul_cost",
    "Your bytes stop short of the result. It has to be written, and that goes over the same wires.",
)
def matmul_cost__result_is_free(m, k, n, dtype_bytes):
    return Cost(2 * m * k * n, (m * k + k * n) * dtype_bytes)


@misconception(
    "matmul_cost",
    "You moved two numbers for every multiplication. Each number of an operand takes part in many of them, but it has to come "
    "in only once.",
)
def matmul_cost__nothing_is_reused(m, k, n, dtype_bytes):
    return Cost(2 * m * k * n, (2 * m * k * n + m * n) * dtype_bytes)


@misconception(
    "matmul_cost",
    "You counted numbers, not bytes.",
)
def matmul_cost__numbers(m, k, n, dtype_bytes):
    return Cost(2 * m * k * n, m * k + k * n + m * n)


@misconception(
    "linear_decode_cost",
    "Your bytes grow with the batch. The weights are the same for all sequences: one reading serves them all.",
)
def linear_decode_cost__weights_for_each(params, batch, dtype_bytes=2):
    return Cost(2 * params * batch, params * batch * dtype_bytes)


@misconception(
    "linear_decode_cost",
    "Your FLOPs do not grow with the batch. Reading is shared, multiplying is not: every token meets every weight.",
)
def linear_decode_cost__flops_shared(params, batch, dtype_bytes=2):
    return Cost(2 * params, params * dtype_bytes)


@misconception(
    "linear_decode_cost",
    "Your FLOPs are half of what they should be: one weight takes one multiplication and one addition per token.",
)
def linear_decode_cost__one_flop_per_weight(params, batch, dtype_bytes=2):
    return Cost(params * batch, params * dtype_bytes)


@misconception(
    "compute_bound_batch",
    "Your batch is twice as large as needed: each weight brings two FLOPs per sequence, not one.",
)
def compute_bound_batch__one_flop_per_weight(hw, dtype_bytes=2):
    return hw.flops / hw.bandwidth * dtype_bytes


@misconception(
    "compute_bound_batch",
    "You answer with the ridge for every width of a weight. It is right for two bytes only: a byte less to read is "
    "time less to hide.",
)
def compute_bound_batch__always_the_ridge(hw, dtype_bytes=2):
    return hw.flops / hw.bandwidth


# kv_elements_per_token, kv_table


def _ordinary(arch):
    return {"mha": arch.heads, "gqa": arch.kv_heads, "mqa": 1}[arch.kind]


def _kept(arch, ordinary, latent):
    right.kv_elements_per_token(arch)  # complains about kinds that do not exist
    return latent(arch) if arch.kind == "mla" else ordinary(arch)


@misconception(
    "kv_elements_per_token",
    "You kept keys or values, not both. The scores need the one, the mixture the other.",
)
def kv_elements_per_token__keys_only(arch):
    return arch.layers * _kept(arch, lambda a: _ordinary(a) * a.head_dim, lambda a: a.latent + a.rope)


@misconception(
    "kv_elements_per_token",
    "You kept the queries too. A query is asked once, by its own token, and nobody needs it afterwards: keys and values are stored.",
)
def kv_elements_per_token__queries_too(arch):
    def ordinary(a):
        return (2 * _ordinary(a) + a.heads) * a.head_dim

    return arch.layers * _kept(arch, ordinary, lambda a: a.latent + a.rope)


@misconception(
    "kv_elements_per_token",
    "This is what one layer keeps. Every layer has a cache of its own.",
)
def kv_elements_per_token__one_layer(arch):
    return _kept(arch, lambda a: 2 * _ordinary(a) * a.head_dim, lambda a: a.latent + a.rope)


@misconception(
    "kv_elements_per_token",
    "Your latent is there twice. Keys and values are both made from the same one, so it is kept once.",
)
def kv_elements_per_token__two_latents(arch):
    return arch.layers * _kept(arch, lambda a: 2 * _ordinary(a) * a.head_dim, lambda a: 2 * a.latent + a.rope)


@misconception(
    "kv_elements_per_token",
    "The rotated key is missing. It depends on the position and cannot be made from the latent, so it is kept beside it.",
)
def kv_elements_per_token__no_rotated_key(arch):
    return arch.layers * _kept(arch, lambda a: 2 * _ordinary(a) * a.head_dim, lambda a: a.latent)


@misconception(
    "kv_elements_per_token",
    "Your cache has a key and a value for each query head, whatever the kind. In a group, and in a model with one shared key, heads "
    "read the same ones.",
)
def kv_elements_per_token__all_heads(arch):
    return arch.layers * _kept(arch, lambda a: 2 * a.heads * a.head_dim, lambda a: a.latent + a.rope)


def _rows(change):
    return [row._replace(**change(arch, row)) for arch, row in zip(MODELS, right.kv_table(), strict=True)]


@misconception(
    "kv_table",
    "kB and KiB are exchanged. A KiB is the larger one, so there are fewer of them: 70.272 kB are 68.625 KiB.",
)
def kv_table__units_exchanged():
    return _rows(lambda arch, row: {"kilobytes": row.kibibytes, "kibibytes": row.kilobytes})


@misconception(
    "kv_table",
    "Both of your units are 1024 bytes. kB is decimal, like km: 70.272 kB are 68.625 KiB.",
)
def kv_table__both_binary():
    return _rows(lambda arch, row: {"kilobytes": row.kibibytes})


@misconception(
    "kv_table",
    "Your ratio is upside down: it says what part remains, not how many times as much would be kept.",
)
def kv_table__ratio_upside_down():
    return _rows(lambda arch, row: {"ratio": 1 / row.ratio})


@misconception(
    "kv_table",
    "Your ratio compares with the latent alone, 512 wide. The rotated key of 64 is in the cache as well.",
)
def kv_table__ratio_to_the_latent():
    return _rows(lambda arch, row: {"ratio": arch.heads * 256 / arch.latent} if arch.latent else {})


@misconception(
    "kv_table",
    "You found 28.4 for every model with a latent. That is the figure of 64 heads: twice the heads, twice the ratio.",
)
def kv_table__always_28():
    return [
        KVRow(*row[:5], 256 / 9 if arch.latent else row.ratio)
        for arch, row in zip(MODELS, right.kv_table(), strict=True)
    ]


# reduction_claim


@misconception(
    "reduction_claim",
    "Your 93.3 % compares numbers of 16 bits on both sides, and that gives 82.2 % only. The rest comes from the cache of 6 bits.",
)
def reduction_claim__without_quantisation():
    claims = right.reduction_claim()
    return claims | {"93.3%": claims["82.2%"]}


@misconception(
    "reduction_claim",
    "You compared DeepSeek-V2 with a model of 64 full heads. DeepSeek-67B, the model behind both percentages, shares its keys: 8 heads of them.",
)
def reduction_claim__67b_as_mha():
    claims = right.reduction_claim()
    before = 95 * 2 * 64 * 128 * 16
    for key, bits in (("82.2%", 16), ("93.3%", 6)):
        claims[key] = Claim(1 - 60 * 576 * bits / before, "mha", 64, bits)
    return claims


@misconception(
    "reduction_claim",
    "Your percentages leave out the layers. DeepSeek-67B has 95 of them, V2 has 60, and a token is kept in each.",
)
def reduction_claim__without_layers():
    claims = right.reduction_claim()
    for key, bits in (("82.2%", 16), ("93.3%", 6)):
        claims[key] = Claim(1 - 576 * bits / (2048 * 16), "gqa", 8, bits)
    return claims


@misconception(
    "reduction_claim",
    "Your ratios count the keys of the baseline and not its values: all three are half as large as quoted.",
)
def reduction_claim__keys_only():
    claims = right.reduction_claim()
    return {key: c._replace(value=c.value / 2) if key.endswith("x") else c for key, c in claims.items()}


@misconception(
    "reduction_claim",
    "Your percentages say what remains. The claim is about what is saved.",
)
def reduction_claim__what_remains():
    claims = right.reduction_claim()
    return {key: c._replace(value=1 - c.value) if key.endswith("%") else c for key, c in claims.items()}


# attention_decode_cost


@misconception(
    "attention_decode_cost",
    "Your bytes do not grow with the batch. Weights are shared by the batch, caches are not: a larger batch reads more of them, and the "
    "intensity of attention stays where it is.",
)
def attention_decode_cost__cache_shared_by_the_batch(arch, batch, length, dtype_bytes, *, absorbed=True, queries=1):
    known = right.attention_decode_cost(arch, batch, length, dtype_bytes, absorbed=absorbed, queries=queries)
    return Cost(known.flops, known.bytes // batch)


@misconception(
    "attention_decode_cost",
    "Your FLOPs are half of what they should be: scores and mixture are made of multiply-adds, two FLOPs each.",
)
def attention_decode_cost__one_flop_per_step(arch, batch, length, dtype_bytes, *, absorbed=True, queries=1):
    known = right.attention_decode_cost(arch, batch, length, dtype_bytes, absorbed=absorbed, queries=queries)
    return Cost(known.flops // 2, known.bytes)


@misconception(
    "attention_decode_cost",
    "Your FLOPs go down with the heads that keep keys. What is shared is read once, but every query head still meets every key.",
)
def attention_decode_cost__shared_heads_compute_less(arch, batch, length, dtype_bytes, *, absorbed=True, queries=1):
    known = right.attention_decode_cost(arch, batch, length, dtype_bytes, absorbed=absorbed, queries=queries)
    if arch.kind == "mla":
        return known
    return Cost(known.flops * _ordinary(arch) // arch.heads, known.bytes)


@misconception(
    "attention_decode_cost",
    "Your cache has a key and a value per query head. That is what the groups, and the one shared key, are there to avoid.",
)
def attention_decode_cost__reads_all_heads(arch, batch, length, dtype_bytes, *, absorbed=True, queries=1):
    known = right.attention_decode_cost(arch, batch, length, dtype_bytes, absorbed=absorbed, queries=queries)
    if arch.kind == "mla":
        return known
    return Cost(known.flops, batch * length * 2 * arch.heads * arch.head_dim * dtype_bytes)


@misconception(
    "attention_decode_cost",
    "You let the latents be read 28 or 57 times faster in either order. The saving is there only if attention runs on the latents "
    "themselves. Whoever expands them first writes all keys and values, and reads them again.",
)
def attention_decode_cost__expanding_moves_nothing(arch, batch, length, dtype_bytes, *, absorbed=True, queries=1):
    known = right.attention_decode_cost(arch, batch, length, dtype_bytes, absorbed=absorbed, queries=queries)
    return Cost(known.flops, right.attention_decode_cost(arch, batch, length, dtype_bytes).bytes)


@misconception(
    "attention_decode_cost",
    "Your naive order gets its keys and values for nothing. Making them from the latents, at every step, is 120 times the "
    "arithmetic of absorbed attention.",
)
def attention_decode_cost__expanding_is_free(arch, batch, length, dtype_bytes, *, absorbed=True, queries=1):
    known = right.attention_decode_cost(arch, batch, length, dtype_bytes, absorbed=absorbed, queries=queries)
    if arch.kind == "mla" and not absorbed:
        flops = 2 * batch * arch.heads * queries * length * (arch.nope + arch.rope + arch.value)
        return Cost(flops, known.bytes)
    return known


@misconception(
    "attention_decode_cost",
    "Your absorbed attention has the FLOPs of ordinary heads. In the latent space a score runs over latent and rotated key and the mixture over the "
    "latent: 3.4 times as much in V3. It wins because bytes, not FLOPs, were the limit.",
)
def attention_decode_cost__absorbed_for_nothing(arch, batch, length, dtype_bytes, *, absorbed=True, queries=1):
    known = right.attention_decode_cost(arch, batch, length, dtype_bytes, absorbed=absorbed, queries=queries)
    if arch.kind == "mla" and absorbed:
        flops = 2 * batch * arch.heads * queries * length * (arch.nope + arch.rope + arch.value)
        return Cost(flops, known.bytes)
    return known


@misconception(
    "attention_decode_cost",
    "Your mixture in the latent space is as wide as the score. The rotated key takes part in the scores only; what is mixed is the latent.",
)
def attention_decode_cost__mixes_the_rotated_key(arch, batch, length, dtype_bytes, *, absorbed=True, queries=1):
    known = right.attention_decode_cost(arch, batch, length, dtype_bytes, absorbed=absorbed, queries=queries)
    if arch.kind == "mla" and absorbed:
        flops = 2 * batch * arch.heads * queries * length * 2 * (arch.latent + arch.rope)
        return Cost(flops, known.bytes)
    return known


@misconception(
    "attention_decode_cost",
    "Your bytes grow with the number of queries. Each cached number is read once and meets all of them: that is why several "
    "queries at a time have a higher intensity.",
)
def attention_decode_cost__reads_per_query(arch, batch, length, dtype_bytes, *, absorbed=True, queries=1):
    known = right.attention_decode_cost(arch, batch, length, dtype_bytes, absorbed=absorbed, queries=queries)
    return Cost(known.flops, known.bytes * queries)


@misconception(
    "attention_decode_cost",
    "This is the cost of all layers. The docstring asks for one.",
)
def attention_decode_cost__all_layers(arch, batch, length, dtype_bytes, *, absorbed=True, queries=1):
    known = right.attention_decode_cost(arch, batch, length, dtype_bytes, absorbed=absorbed, queries=queries)
    return Cost(known.flops * arch.layers, known.bytes * arch.layers)


# naive_vs_absorbed_crossover


@misconception(
    "naive_vs_absorbed_crossover",
    "Your result depends on the rotated key. Both orders score it in the same way, so it drops out.",
)
def naive_vs_absorbed_crossover__with_the_rotated_key(arch):
    saved = 2 * arch.latent + arch.rope - arch.nope - arch.value
    return arch.latent * (arch.nope + arch.value) / saved if saved > 0 else math.inf


@misconception(
    "naive_vs_absorbed_crossover",
    "Your absorbed order meets the latent once per query. It does so twice: for the score, and for the mixture.",
)
def naive_vs_absorbed_crossover__latent_once(arch):
    saved = arch.latent - arch.nope - arch.value
    return arch.latent * (arch.nope + arch.value) / saved if saved > 0 else math.inf


@misconception(
    "naive_vs_absorbed_crossover",
    "You got a number where the two never meet. If a query costs no more in the latent space, nothing pays for the expansion.",
)
def naive_vs_absorbed_crossover__always_a_number(arch):
    widths = arch.nope + arch.value
    return arch.latent * widths / ((2 * arch.latent - widths) or 1)


# max_batch, decode_step_seconds


@misconception(
    "max_batch",
    "You gave the whole memory to the caches. The weights lie in it already.",
)
def max_batch__without_weights(hw, weight_bytes, kv_bytes_per_token, context, reserve=0.1):
    return max(math.floor(hw.memory * (1 - reserve) / (kv_bytes_per_token * context)), 0)


@misconception(
    "max_batch",
    "You reserve a share of what the weights leave free. It is a share of the whole memory.",
)
def max_batch__reserve_of_the_rest(hw, weight_bytes, kv_bytes_per_token, context, reserve=0.1):
    return max(math.floor((hw.memory - weight_bytes) * (1 - reserve) / (kv_bytes_per_token * context)), 0)


@misconception(
    "max_batch",
    "This is how many tokens fit. A sequence has `context` of them.",
)
def max_batch__tokens(hw, weight_bytes, kv_bytes_per_token, context, reserve=0.1):
    return max(math.floor((hw.memory * (1 - reserve) - weight_bytes) / kv_bytes_per_token), 0)


@misconception(
    "max_batch",
    "Your batch can be negative. Where the weights alone do not fit, no sequence does: that is 0.",
)
def max_batch__negative(hw, weight_bytes, kv_bytes_per_token, context, reserve=0.1):
    return math.floor((hw.memory * (1 - reserve) - weight_bytes) / (kv_bytes_per_token * context))


@misconception(
    "max_batch",
    "You rounded to the nearest number. Of the last sequence a part has no room.",
)
def max_batch__rounded(hw, weight_bytes, kv_bytes_per_token, context, reserve=0.1):
    return max(round((hw.memory * (1 - reserve) - weight_bytes) / (kv_bytes_per_token * context)), 0)


def _step(hw, moved, flops):
    return max(moved / hw.bandwidth, flops / hw.flops)


@misconception(
    "decode_step_seconds",
    "You added the time for computing to the time for moving. They overlap: the longer one remains.",
)
def decode_step_seconds__sum(hw, weight_bytes_active, kv_bytes_per_token, batch, context, flops_per_token):
    moved = weight_bytes_active + batch * context * kv_bytes_per_token
    return moved / hw.bandwidth + batch * flops_per_token / hw.flops


@misconception(
    "decode_step_seconds",
    "Your caches are read once for the whole batch. Only weights can be shared: each sequence has a past of its own.",
)
def decode_step_seconds__caches_shared(hw, weight_bytes_active, kv_bytes_per_token, batch, context, flops_per_token):
    return _step(hw, weight_bytes_active + context * kv_bytes_per_token, batch * flops_per_token)


@misconception(
    "decode_step_seconds",
    "Your weights are read again for each sequence. Once per step is enough, and that is the reason to decode in batches.",
)
def decode_step_seconds__weights_for_each(hw, weight_bytes_active, kv_bytes_per_token, batch, context, flops_per_token):
    return _step(hw, batch * (weight_bytes_active + context * kv_bytes_per_token), batch * flops_per_token)


@misconception(
    "decode_step_seconds",
    "You compute one token per step. There is one for each sequence of the batch.",
)
def decode_step_seconds__one_token(hw, weight_bytes_active, kv_bytes_per_token, batch, context, flops_per_token):
    return _step(hw, weight_bytes_active + batch * context * kv_bytes_per_token, flops_per_token)


# Meter


class _Counting(TorchDispatchMode):
    """A meter in pieces, each of which a mistake replaces."""

    _should_skip_dynamo = bool

    def __init__(self):
        super().__init__()
        self.flops = self.calls = self.bytes_allocated = self.live_bytes = self.peak_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        known = {storage.data_ptr() for storage in right._storages((args, kwargs))}
        result = func(*args, **kwargs)
        made = right._storages(result)
        new = {storage.data_ptr(): storage for storage in made if storage.data_ptr() not in known}
        self.calls += self.is_call(func, new, made)
        self.flops += self.flops_of(func.overloadpacket.__name__, args, result)
        for size, storage in self.new_memory(new, result):
            self.bytes_allocated += size
            self.live_bytes += size
            self.watch(storage, size)
        self.peak_bytes = self.peak()
        return result

    def is_call(self, func, new, made):
        return bool(new or not made or func._schema.is_mutable)

    def flops_of(self, name, args, result):
        return right._contraction_flops(name.rstrip("_"), args, result)

    def new_memory(self, new, result):
        return [(storage.nbytes(), storage) for storage in new.values()]

    def watch(self, storage, size):
        weakref.finalize(storage, self.free, size)

    def free(self, size):
        self.live_bytes -= size

    def peak(self):
        return max(self.peak_bytes, self.live_bytes)


@misconception(
    "Meter",
    "You count one FLOP for a multiplication with its addition. They are two.",
)
class meter__one_flop_per_step(_Counting):
    def flops_of(self, name, args, result):
        return super().flops_of(name, args, result) // 2


@misconception(
    "Meter",
    "Products with a vector cost you nothing. mv, addmv and dot are operations of their own, and a row at a time they do what mm does.",
)
class meter__matrices_only(_Counting):
    def flops_of(self, name, args, result):
        return 0 if name in ("mv", "addmv", "dot") else super().flops_of(name, args, result)


@misconception(
    "Meter",
    "Products that add something (addmm and its relatives) are not counted. A linear layer with a bias is one of them.",
)
class meter__no_added_terms(_Counting):
    def flops_of(self, name, args, result):
        return 0 if name.startswith(("addm", "badd")) else super().flops_of(name, args, result)


@misconception(
    "Meter",
    "For products that add something you read the shapes of the first two arguments. The first one is what is added.",
)
class meter__added_term_as_operand(_Counting):
    def flops_of(self, name, args, result):
        if name.startswith(("addm", "badd")):
            return 2 * args[0].numel() * args[1].shape[-1 if args[1].dim() > 1 else 0]
        return super().flops_of(name, args, result)


@misconception(
    "Meter",
    "Your convolution lets every filter meet all channels. In groups it meets those of its own group, and the shape of the weight "
    "says how many.",
)
class meter__groups_ignored(_Counting):
    def flops_of(self, name, args, result):
        flops = super().flops_of(name, args, result)
        return flops * args[8] if name == "convolution" else flops


@misconception(
    "Meter",
    "You count the elements of everything as FLOPs. Asked for are products and convolutions alone: the rest is limited by memory anyway.",
)
class meter__elementwise_flops(_Counting):
    def flops_of(self, name, args, result):
        flops = super().flops_of(name, args, result)
        return flops or sum(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor))


@misconception(
    "Meter",
    "Views are calls with you. A view writes nothing; it is a note about memory that was there before.",
)
class meter__views_are_calls(_Counting):
    def is_call(self, func, new, made):
        return True


@misconception(
    "Meter",
    "Operations in place are missing from your calls. They make no memory, but they write, and that is work.",
)
class meter__in_place_is_free(_Counting):
    def is_call(self, func, new, made):
        return bool(new or not made)


@misconception(
    "Meter",
    "You add up the sizes of all results. A view, and what is written in place, lie in memory that was counted before.",
)
class meter__results_are_memory(_Counting):
    def new_memory(self, new, result):
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        return [(leaf.nbytes, leaf.untyped_storage()) for leaf in tensors]


@misconception(
    "Meter",
    "Four bytes are not the size of every number. float64 and int64 have eight, bool has one.",
)
class meter__four_bytes_each(_Counting):
    def new_memory(self, new, result):
        sizes = {leaf.untyped_storage().data_ptr(): leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)}
        return [(storage.nbytes() // sizes[key].element_size() * 4, storage) for key, storage in new.items()]


@misconception(
    "Meter",
    "Nothing is ever freed in your books: live_bytes only grows. Memory that no tensor lies in any more has to be taken off.",
)
class meter__never_freed(_Counting):
    def watch(self, storage, size):
        pass


@misconception(
    "Meter",
    "You watch the tensor that an operation returns. Memory lives as long as any tensor lies in it, and a view of it may outlive the first.",
)
class meter__watches_tensors(_Counting):
    def new_memory(self, new, result):
        tensors = {leaf.untyped_storage().data_ptr(): leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)}
        return [(storage.nbytes(), tensors[key]) for key, storage in new.items()]


@misconception(
    "Meter",
    "Your peak is what lives now. A peak does not come down when memory is freed.",
)
class meter__peak_of_now(_Counting):
    def peak(self):
        return self.live_bytes


@misconception(
    "Meter",
    "Your peak is all that was ever allocated. Memory that was freed before does not count together with what came later.",
)
class meter__peak_of_all(_Counting):
    def peak(self):
        return self.bytes_allocated


@misconception(
    "Meter",
    "Your counts begin anew when the meter is entered again.",
)
class meter__starts_over(_Counting):
    def __enter__(self):
        self.flops = self.calls = self.bytes_allocated = self.live_bytes = self.peak_bytes = 0
        return super().__enter__()


# regime_borders


@misconception(
    "regime_borders",
    "Your attention computes for one query, however many tokens are predicted at a time. The cache is read once, but each query meets all "
    "of it.",
)
def regime_borders__one_query(hw, arch, weight_bytes, weight_flops, context, queries=1, dtype_bytes=2):
    core = arch.layers * right.attention_decode_cost(arch, 1, context, dtype_bytes).flops
    extra = core * (1 - queries) / queries  # takes the other queries away again
    return right.regime_borders(hw, arch, weight_bytes, weight_flops + extra, context, queries, dtype_bytes)


@misconception(
    "regime_borders",
    "Your compute border compares with the time for the weights alone. The caches of all those sequences have to be moved, too.",
)
def regime_borders__weights_alone(hw, arch, weight_bytes, weight_flops, context, queries=1, dtype_bytes=2):
    cache_from, _ = right.regime_borders(hw, arch, weight_bytes, weight_flops, context, queries, dtype_bytes)
    core = arch.layers * right.attention_decode_cost(arch, 1, context, dtype_bytes, queries=queries).flops
    computing = (queries * weight_flops + core) / hw.flops
    return cache_from, math.ceil(weight_bytes / hw.bandwidth / computing)


@misconception(
    "regime_borders",
    "You left attention out of the arithmetic. In the latent space it is most of it, once the context is long.",
)
def regime_borders__without_attention(hw, arch, weight_bytes, weight_flops, context, queries=1, dtype_bytes=2):
    core = arch.layers * right.attention_decode_cost(arch, 1, context, dtype_bytes).flops
    return right.regime_borders(hw, arch, weight_bytes, weight_flops - core, context, queries, dtype_bytes)
