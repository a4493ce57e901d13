"""Day 29: known wrong solutions, each with the sentence for whoever wrote it."""

import dataclasses
import math
from types import SimpleNamespace

import torch

from checker.testing import misconception
from reference import day29_deepseek_architecture as right
from reference.day29_deepseek_architecture import DeepSeekConfig, LayerKind


def _with(cfg, **changes):
    """The record with other values in some fields."""
    return SimpleNamespace(**vars(cfg) | changes)


def _kind(cfg):
    return "mha" if cfg.kv_lora_rank is None else "mla"


def _dense(cfg):
    return cfg.num_hidden_layers if cfg.n_routed_experts is None else cfg.first_k_dense_replace


def _moe(cfg):
    return max(0, cfg.num_hidden_layers - _dense(cfg))


def _head(cfg):
    return cfg.hidden_size // cfg.num_attention_heads


# layer_plan


@misconception(
    "layer_plan",
    "Every layer got experts. The first few layers of these models are dense, with a wider MLP of their own.",
)
def layer_plan__experts_everywhere(cfg):
    mlp = "dense" if cfg.n_routed_experts is None else "moe"
    return [LayerKind(mlp, _kind(cfg)) for _ in range(cfg.num_hidden_layers)]


@misconception(
    "layer_plan",
    "There is one dense layer too many: layers are counted from 0, and with first_k_dense_replace = 1 only layer 0 is dense.",
)
def layer_plan__one_more_dense(cfg):
    return [LayerKind("dense" if i <= _dense(cfg) else "moe", _kind(cfg)) for i in range(cfg.num_hidden_layers)]


@misconception(
    "layer_plan",
    "The dense layers came out at the end. They are the first ones, next to the embedding.",
)
def layer_plan__dense_at_the_end(cfg):
    return right.layer_plan(cfg)[::-1]


@misconception(
    "layer_plan",
    "A model without experts got layers with experts. Where n_routed_experts is None, first_k_dense_replace says nothing.",
)
def layer_plan__experts_that_do_not_exist(cfg):
    n = cfg.first_k_dense_replace
    return [LayerKind("dense" if i < n else "moe", _kind(cfg)) for i in range(cfg.num_hidden_layers)]


@misconception(
    "layer_plan",
    "You tell the attention from the number of key heads. The released configs with a latent give as many key heads as heads; "
    "what tells the two apart is whether there is a latent.",
)
def layer_plan__by_key_heads(cfg):
    kind = "mha" if cfg.num_key_value_heads == cfg.num_attention_heads else "mla"
    return [LayerKind(layer.mlp, kind) for layer in right.layer_plan(cfg)]


@misconception(
    "layer_plan",
    "You took experts for a sign of latent attention. The two are independent: dense layers can have a latent, too.",
)
def layer_plan__latent_with_experts(cfg):
    kind = "mha" if cfg.n_routed_experts is None else "mla"
    return [LayerKind(layer.mlp, kind) for layer in right.layer_plan(cfg)]


@misconception(
    "layer_plan",
    "The two words of a layer stand in the wrong order: what replaces the MLP comes first, the attention second.",
)
def layer_plan__swapped(cfg):
    return [LayerKind(layer.attention, layer.mlp) for layer in right.layer_plan(cfg)]


@misconception(
    "layer_plan",
    "A latent of width 1 did not count as one. Ask whether kv_lora_rank is None, not how large it is.",
)
def layer_plan__small_latent(cfg):
    kind = "mla" if cfg.kv_lora_rank is not None and cfg.kv_lora_rank > 1 else "mha"
    return [LayerKind(layer.mlp, kind) for layer in right.layer_plan(cfg)]


# kv_cache_bytes


def _cache(cfg, batch, length, dtype_bytes, latent, ordinary=None):
    if cfg.kv_lora_rank is not None:
        per_token = latent(cfg)
    else:
        per_token = (ordinary or (lambda c: 2 * c.num_key_value_heads * _head(c)))(cfg)
    return batch * length * cfg.num_hidden_layers * per_token * dtype_bytes


@misconception(
    "kv_cache_bytes",
    "Your latent is there twice, as if one were for the keys and one for the values. Both are made from the same one.",
)
def kv_cache_bytes__two_latents(cfg, batch, length, dtype_bytes=2):
    return _cache(cfg, batch, length, dtype_bytes, lambda c: 2 * c.kv_lora_rank + c.qk_rope_head_dim)


@misconception(
    "kv_cache_bytes",
    "You doubled latent and rotated key together. Two tensors per token belong to ordinary attention; here it is one vector "
    "of 512 + 64.",
)
def kv_cache_bytes__twice(cfg, batch, length, dtype_bytes=2):
    return _cache(cfg, batch, length, dtype_bytes, lambda c: 2 * (c.kv_lora_rank + c.qk_rope_head_dim))


@misconception(
    "kv_cache_bytes",
    "The rotated key is missing. It cannot be made from the latent, because its rotation depends on the position, so it is "
    "kept beside it.",
)
def kv_cache_bytes__no_rotated_key(cfg, batch, length, dtype_bytes=2):
    return _cache(cfg, batch, length, dtype_bytes, lambda c: c.kv_lora_rank)


@misconception(
    "kv_cache_bytes",
    "Your cache has a rotated key for each head. There is a single one per token, and all heads look at it.",
)
def kv_cache_bytes__rotated_key_per_head(cfg, batch, length, dtype_bytes=2):
    return _cache(
        cfg, batch, length, dtype_bytes, lambda c: c.kv_lora_rank + c.num_attention_heads * c.qk_rope_head_dim
    )


@misconception(
    "kv_cache_bytes",
    "You keep the keys and values that are made from the latent. This is the cache that the latent was invented to avoid: 71 "
    "times as large with 128 heads.",
)
def kv_cache_bytes__expanded(cfg, batch, length, dtype_bytes=2):
    return _cache(
        cfg,
        batch,
        length,
        dtype_bytes,
        lambda c: c.num_attention_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim),
    )


@misconception(
    "kv_cache_bytes",
    "You took a key and a value as wide as the model, also where there is a latent. With this baseline the latent looks 28 "
    "times smaller in V3, and neither of the two numbers is in its cache.",
)
def kv_cache_bytes__model_width(cfg, batch, length, dtype_bytes=2):
    return _cache(cfg, batch, length, dtype_bytes, lambda c: 2 * c.hidden_size)


@misconception(
    "kv_cache_bytes",
    "One layer was counted. Each layer keeps a cache of its own.",
)
def kv_cache_bytes__one_layer(cfg, batch, length, dtype_bytes=2):
    return right.kv_cache_bytes(cfg, batch, length, dtype_bytes) // cfg.num_hidden_layers


@misconception(
    "kv_cache_bytes",
    "In ordinary attention you kept keys and values for every query head. Only num_key_value_heads of them exist.",
)
def kv_cache_bytes__all_heads(cfg, batch, length, dtype_bytes=2):
    return right.kv_cache_bytes(_with(cfg, num_key_value_heads=cfg.num_attention_heads), batch, length, dtype_bytes)


@misconception(
    "kv_cache_bytes",
    "Ordinary attention has half of its cache here: a key and a value are two tensors.",
)
def kv_cache_bytes__keys_only(cfg, batch, length, dtype_bytes=2):
    return _cache(
        cfg,
        batch,
        length,
        dtype_bytes,
        lambda c: c.kv_lora_rank + c.qk_rope_head_dim,
        lambda c: c.num_key_value_heads * _head(c),
    )


@misconception(
    "kv_cache_bytes",
    "The size of a number plays no part in your result: it is two bytes whatever dtype_bytes says.",
)
def kv_cache_bytes__two_bytes_always(cfg, batch, length, dtype_bytes=2):
    return right.kv_cache_bytes(cfg, batch, length, 2)


@misconception(
    "kv_cache_bytes",
    "That is how many numbers there are. Asked for are bytes.",
)
def kv_cache_bytes__numbers(cfg, batch, length, dtype_bytes=2):
    return right.kv_cache_bytes(cfg, batch, length, 1)


@misconception(
    "kv_cache_bytes",
    "The batch does not matter to your count. Every sequence has a cache of its own.",
)
def kv_cache_bytes__one_sequence(cfg, batch, length, dtype_bytes=2):
    return right.kv_cache_bytes(cfg, 1, length, dtype_bytes)


# DeepSeekConfig


def _reader(name, sentence):
    """Make a misconception of a function from dict to dict."""

    def make(read):
        def from_dict(cls, d):
            return DeepSeekConfig.from_dict.__func__(cls, read(d))

        made = type(read.__name__, (DeepSeekConfig,), {"from_dict": classmethod(from_dict), "__module__": __name__})
        return misconception(name, sentence)(made)

    return make


@_reader(
    "DeepSeekConfig",
    "Only `rope_scaling` is read. In the files of newer versions the positions are in `rope_parameters`, and there your "
    "model has plain positions and the default base.",
)
def config__old_form_only(d):
    return {key: value for key, value in d.items() if key != "rope_parameters"}


@_reader(
    "DeepSeekConfig",
    "Only `rope_parameters` is read. The published files are older and say `rope_scaling`: V3 came out without any "
    "stretching.",
)
def config__new_form_only(d):
    return {key: value for key, value in d.items() if key != "rope_scaling"}


def _inner(d, change):
    d = dict(d)
    for key in ("rope_scaling", "rope_parameters"):
        if d.get(key):
            d[key] = change(dict(d[key]))
    return d


@_reader(
    "DeepSeekConfig",
    "You know the kind of positions under the name `rope_type` only. The published files call it `type`, and their YaRN was "
    "passed over.",
)
def config__no_type(d):
    return _inner(d, lambda rope: {key: value for key, value in rope.items() if key != "type"})


@_reader(
    "DeepSeekConfig",
    "You know the kind of positions under the name `type` only. Newer files call it `rope_type`.",
)
def config__no_rope_type(d):
    return _inner(d, lambda rope: {key: value for key, value in rope.items() if key != "rope_type"})


@_reader(
    "DeepSeekConfig",
    "Where both names are there, `type` won. The newer name, rope_type, counts first.",
)
def config__type_first(d):
    return _inner(d, lambda rope: {**rope, "rope_type": rope.get("type", rope.get("rope_type"))})


@_reader(
    "DeepSeekConfig",
    "rope_theta was looked for inside only. In the old form it stands outside, beside rope_scaling.",
)
def config__base_inside_only(d):
    return {key: value for key, value in d.items() if key != "rope_theta"}


@_reader(
    "DeepSeekConfig",
    "rope_theta was looked for outside only. In the new form it has moved into rope_parameters.",
)
def config__base_outside_only(d):
    return _inner(d, lambda rope: {key: value for key, value in rope.items() if key != "rope_theta"})


@_reader(
    "DeepSeekConfig",
    "A base outside of rope_parameters has overruled the one inside. The one inside counts first.",
)
def config__base_outside_first(d):
    if d.get("rope_theta") is None:
        return d
    return _inner(d, lambda rope: {**rope, "rope_theta": d["rope_theta"]})


@_reader(
    "DeepSeekConfig",
    "A V3 config that does not mention its router got V2's softmax. What transformers writes for V3 leaves the router out, "
    "because its class knows no other: model_type has to tell you.",
)
def config__model_type_ignored(d):
    return {key: value for key, value in d.items() if key != "model_type"}


@_reader(
    "DeepSeekConfig",
    "Your model_type overrules what is written. It gives defaults only: a file that names its router means it.",
)
def config__model_type_wins(d):
    return {**d, **right._V3_ROUTER} if d.get("model_type") == "deepseek_v3" else d


@_reader(
    "DeepSeekConfig",
    "You read head_dim as the width of the rotated part. What transformers writes there happens to be that for latent "
    "attention; it is no field of this config, and elsewhere it means the whole head.",
)
def config__head_dim(d):
    return {**d, "qk_rope_head_dim": d["head_dim"]} if "head_dim" in d else d


@_reader(
    "DeepSeekConfig",
    "mscale_all_dim became 1 where the file does not give it. Its default is 0: then the softmax is not scaled, and cosine "
    "and sine are.",
)
def config__all_dim_is_one(d):
    rope = d.get("rope_parameters") or d.get("rope_scaling") or {}
    return {**d, "rope_parameters": {**rope, "mscale_all_dim": rope.get("mscale_all_dim", 1.0)}}


@misconception(
    "DeepSeekConfig",
    "from_dict took things out of the dict that it was given. Whoever reads it next, the model's loader for example, misses "
    "them.",
)
class config__pops(DeepSeekConfig):
    @classmethod
    def from_dict(cls, d):
        read = DeepSeekConfig.from_dict.__func__(cls, d)
        d.pop("rope_scaling", None)
        d.pop("rope_theta", None)
        return read


@misconception(
    "DeepSeekConfig",
    "Every key of the dict went to the constructor. A config.json is full of keys that are none of the model's sizes "
    "(architectures, torch_dtype, auto_map): pass over what is no field.",
)
class config__every_key(DeepSeekConfig):
    @classmethod
    def from_dict(cls, d):
        names = {field.name for field in dataclasses.fields(cls)}
        others = [key for key in d if key not in names and key not in ("rope_scaling", "rope_parameters", "model_type")]
        if others:
            raise TypeError(f"unexpected keyword argument {others[0]!r}")
        return DeepSeekConfig.from_dict.__func__(cls, d)


@misconception(
    "DeepSeekConfig",
    "A missing size was a KeyError or a TypeError of Python's. A ValueError that names the key is asked for.",
)
class config__key_error(DeepSeekConfig):
    @classmethod
    def from_dict(cls, d):
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            d[name]
        return DeepSeekConfig.from_dict.__func__(cls, d)


@misconception(
    "DeepSeekConfig",
    "A null was taken as a value. In a config.json it says that nothing is said: the default counts.",
)
class config__null_is_a_value(DeepSeekConfig):
    @classmethod
    def from_dict(cls, d):
        cfg = DeepSeekConfig.from_dict.__func__(cls, d)
        for field in dataclasses.fields(cls):
            if field.name in d and d[field.name] is None and field.name not in right._ROPE_FIELDS:
                object.__setattr__(cfg, field.name, None)
        return cfg


class _Unchecked(DeepSeekConfig):
    """Runs the checks on a copy in which `mended` has made one thing harmless."""

    def __post_init__(self):
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(DeepSeekConfig)}
        checked = DeepSeekConfig(**fields | type(self).mended(fields))
        for name in ("num_key_value_heads", "original_max_position_embeddings"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(checked, name))


@misconception(
    "DeepSeekConfig",
    "num_experts_per_tok was compared with all experts. A token may choose from topk_group groups only, so fewer are within "
    "reach.",
)
class config__out_of_all_experts(_Unchecked):
    @staticmethod
    def mended(f):
        few = f["n_routed_experts"] is not None and f["num_experts_per_tok"] is not None
        fits = few and f["num_experts_per_tok"] <= f["n_routed_experts"] and f["topk_group"] <= f["n_group"]
        return {"topk_group": f["n_group"]} if fits else {}


@misconception(
    "DeepSeekConfig",
    "10 experts in 4 groups were accepted. Groups have equal sizes, or there is no table of scores per group.",
)
class config__unequal_groups(_Unchecked):
    @staticmethod
    def mended(f):
        if f["n_routed_experts"] is None:
            return {}
        return {"n_routed_experts": -(-f["n_routed_experts"] // f["n_group"]) * f["n_group"]}


@misconception(
    "DeepSeekConfig",
    "More groups were to be chosen than there are, and nothing was said.",
)
class config__more_groups_than_there_are(_Unchecked):
    @staticmethod
    def mended(f):
        return {"topk_group": min(f["topk_group"], f["n_group"])}


@misconception(
    "DeepSeekConfig",
    "An odd rotated width was accepted. Rotation turns pairs: one number would be left over.",
)
class config__odd_rotation(_Unchecked):
    @staticmethod
    def mended(f):
        return {"qk_rope_head_dim": f["qk_rope_head_dim"] * 2} if f["qk_rope_head_dim"] is not None else {}


@misconception(
    "DeepSeekConfig",
    "Heads of latent attention were held to hidden_size / num_attention_heads. They have widths of their own: 7168 / 128 is "
    "56, and V3's query heads are 192 wide.",
)
class config__heads_share_the_width(DeepSeekConfig):
    def __post_init__(self):
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size ({self.hidden_size}) / num_attention_heads ({self.num_attention_heads})")
        DeepSeekConfig.__post_init__(self)


@misconception(
    "DeepSeekConfig",
    "A kind of positions that you cannot compute was accepted. A model with `linear` positions read as plain ones gives wrong "
    "numbers without a word.",
)
class config__any_rope_type(_Unchecked):
    @staticmethod
    def mended(f):
        return {"rope_type": "default"}


@misconception(
    "DeepSeekConfig",
    "A scoring function that does not exist was accepted.",
)
class config__any_scoring(_Unchecked):
    @staticmethod
    def mended(f):
        return {"scoring_func": "softmax"}


@misconception(
    "DeepSeekConfig",
    "num_key_value_heads stayed None where the file does not give it. Then there is one key head per head.",
)
class config__no_key_heads(DeepSeekConfig):
    def __post_init__(self):
        given = self.num_key_value_heads
        DeepSeekConfig.__post_init__(self)
        object.__setattr__(self, "num_key_value_heads", given)


@misconception(
    "DeepSeekConfig",
    "to_dict left the positions outside. from_dict looks for them in rope_parameters, so what you write is read back without "
    "YaRN.",
)
class config__flat_dict(DeepSeekConfig):
    def to_dict(self):
        return dataclasses.asdict(self)


@misconception(
    "DeepSeekConfig",
    "DeepSeekMath-7B came out with latent attention and experts. It is a dense model with ordinary attention, from February "
    "2024; the latent came with V2 in May. What later models took from it is GRPO, a way to train.",
)
class config__math_is_v2(DeepSeekConfig):
    @classmethod
    def deepseek_math_7b(cls):
        return dataclasses.replace(cls.v2_lite(), hidden_size=4096, num_hidden_layers=30, num_attention_heads=32)


@misconception(
    "DeepSeekConfig",
    "Your V2 has an mscale of 1. That is V2.5; V2 and V2-Lite have 0.707, and with the other number every score of a long "
    "context is off.",
)
class config__v2_5(DeepSeekConfig):
    @classmethod
    def v2(cls):
        return dataclasses.replace(super().v2(), mscale=1.0, mscale_all_dim=1.0)

    @classmethod
    def v2_lite(cls):
        return dataclasses.replace(super().v2_lite(), mscale=1.0, mscale_all_dim=1.0)


@misconception(
    "DeepSeekConfig",
    "Your V3 has 62 layers. The file holds one more than the model has: it is the module that predicts a second token.",
)
class config__v3_with_mtp(DeepSeekConfig):
    @classmethod
    def v3(cls):
        return dataclasses.replace(super().v3(), num_hidden_layers=62)


@misconception(
    "DeepSeekConfig",
    "max_position_embeddings was left at the original context. It is the stretched one: 40 times 4096.",
)
class config__context_not_stretched(DeepSeekConfig):
    @classmethod
    def v2_lite(cls):
        return dataclasses.replace(super().v2_lite(), max_position_embeddings=4096)

    @classmethod
    def v2(cls):
        return dataclasses.replace(super().v2(), max_position_embeddings=4096)

    @classmethod
    def v3(cls):
        return dataclasses.replace(super().v3(), max_position_embeddings=4096)


# count_parameters


def _changed(counts, **changes):
    """The counts with other parts, and the total that goes with them."""
    parts = {key: value for key, value in counts.items() if key not in ("buffers", "total")}
    return {**counts, **changes, "total": sum((parts | changes).values())}


@misconception(
    "count_parameters",
    "The shared experts are missing. They are small beside 256 others, but every token goes through them.",
)
def count_parameters__no_shared(cfg):
    return _changed(right.count_parameters(cfg), shared_experts=0)


@misconception(
    "count_parameters",
    "You counted one shared expert, whatever n_shared_experts is. Together they form one MLP that is n_shared_experts times "
    "as wide as an expert.",
)
def count_parameters__one_shared(cfg):
    counts = right.count_parameters(cfg)
    return _changed(counts, shared_experts=counts["shared_experts"] // max(1, cfg.n_shared_experts))


@misconception(
    "count_parameters",
    "Your shared experts have the width of a dense layer. They are as wide as the routed ones.",
)
def count_parameters__wide_shared(cfg):
    shared = _moe(cfg) * cfg.n_shared_experts * 3 * cfg.hidden_size * cfg.intermediate_size
    return _changed(right.count_parameters(cfg), shared_experts=shared)


@misconception(
    "count_parameters",
    "Every layer has experts in your count. The first layers are dense, with a width of their own.",
)
def count_parameters__experts_everywhere(cfg):
    return right.count_parameters(cfg if cfg.n_routed_experts is None else _with(cfg, first_k_dense_replace=0))


@misconception(
    "count_parameters",
    "Your dense layers are as narrow as an expert. Their width is intermediate_size; moe_intermediate_size is that of one "
    "expert.",
)
def count_parameters__narrow_dense(cfg):
    if cfg.n_routed_experts is None:
        return right.count_parameters(cfg)
    return right.count_parameters(_with(cfg, intermediate_size=cfg.moe_intermediate_size))


@misconception(
    "count_parameters",
    "Your experts are as wide as a dense layer: intermediate_size instead of moe_intermediate_size. The result is several times "
    "the model.",
)
def count_parameters__wide_experts(cfg):
    return right.count_parameters(_with(cfg, moe_intermediate_size=cfg.intermediate_size))


@misconception(
    "count_parameters",
    "Your MLPs have two matrices. These models have three: gate, up and down.",
)
def count_parameters__two_matrices(cfg):
    counts = right.count_parameters(cfg)
    parts = ("dense_mlp", "routed_experts", "shared_experts")
    return _changed(counts, **{part: counts[part] * 2 // 3 for part in parts})


@misconception(
    "count_parameters",
    "The router was left out: one row per routed expert, in every layer that has them.",
)
def count_parameters__no_router(cfg):
    return _changed(right.count_parameters(cfg), router=0)


@misconception(
    "count_parameters",
    "Your router has a row for the shared experts, too. Nobody chooses those, so nobody scores them.",
)
def count_parameters__router_of_all(cfg):
    router = _moe(cfg) * ((cfg.n_routed_experts or 0) + cfg.n_shared_experts) * cfg.hidden_size
    return _changed(right.count_parameters(cfg), router=router)


@misconception(
    "count_parameters",
    "The correction of the router is in your total. It is set by a rule and not by gradients: a buffer. Those 14,848 are the "
    "difference to 671,026,404,352.",
)
def count_parameters__buffers_in_total(cfg):
    counts = right.count_parameters(cfg)
    return {**counts, "total": counts["total"] + counts["buffers"]}


@misconception(
    "count_parameters",
    "You gave a correction to every router. Only the method noaux_tc has one; the softmax routers of V2 have none.",
)
def count_parameters__buffers_always(cfg):
    return {**right.count_parameters(cfg), "buffers": _moe(cfg) * (cfg.n_routed_experts or 0)}


@misconception(
    "count_parameters",
    "You counted the table of a tied head twice. It is one tensor under two names.",
)
def count_parameters__tied_twice(cfg):
    return right.count_parameters(_with(cfg, tie_word_embeddings=False))


@misconception(
    "count_parameters",
    "The head is missing. It is as large as the embedding, and in these models a table of its own.",
)
def count_parameters__no_head(cfg):
    return _changed(right.count_parameters(cfg), head=0)


@misconception(
    "count_parameters",
    "The norm after the last layer is missing: your count is short by one row of hidden_size.",
)
def count_parameters__no_last_norm(cfg):
    return _changed(right.count_parameters(cfg), norms=2 * cfg.num_hidden_layers * cfg.hidden_size)


@misconception(
    "count_parameters",
    "Each layer has one norm in your count. There are two, one before attention and one before the MLP.",
)
def count_parameters__one_norm(cfg):
    return _changed(right.count_parameters(cfg), norms=(cfg.num_hidden_layers + 1) * cfg.hidden_size)


@misconception(
    "count_parameters",
    "The norms of the latents are missing. What is compressed is normalized before it is expanded: one weight per number of "
    "the latent, of the queries as well.",
)
def count_parameters__no_latent_norms(cfg):
    counts = right.count_parameters(cfg)
    inner = 0 if cfg.kv_lora_rank is None else cfg.num_hidden_layers * (cfg.kv_lora_rank + (cfg.q_lora_rank or 0))
    return _changed(counts, attention=counts["attention"] - inner)


@misconception(
    "count_parameters",
    "Your norm of the latent covers the rotated key as well. Only the latent is normalized.",
)
def count_parameters__norm_of_the_key(cfg):
    counts = right.count_parameters(cfg)
    more = 0 if cfg.kv_lora_rank is None else cfg.num_hidden_layers * cfg.qk_rope_head_dim
    return _changed(counts, attention=counts["attention"] + more)


@misconception(
    "count_parameters",
    "The rotated key has no parameters in your count. It is made from the input, beside the latent.",
)
def count_parameters__no_rotated_key(cfg):
    counts = right.count_parameters(cfg)
    less = 0 if cfg.kv_lora_rank is None else cfg.num_hidden_layers * cfg.hidden_size * cfg.qk_rope_head_dim
    return _changed(counts, attention=counts["attention"] - less)


@misconception(
    "count_parameters",
    "Every head has a rotated key of its own in your count. There is one for all of them.",
)
def count_parameters__rotated_key_per_head(cfg):
    counts, more = right.count_parameters(cfg), 0
    if cfg.kv_lora_rank is not None:
        more = cfg.num_hidden_layers * cfg.hidden_size * cfg.qk_rope_head_dim * (cfg.num_attention_heads - 1)
    return _changed(counts, attention=counts["attention"] + more)


@misconception(
    "count_parameters",
    "Your heads are hidden_size / num_attention_heads wide. With latent attention the config says how wide they are: V3 has "
    "7168 / 128 = 56 by your rule, and 192 for queries and 128 for values in truth.",
)
def count_parameters__heads_share_the_width(cfg):
    if cfg.kv_lora_rank is None:
        return right.count_parameters(cfg)
    head = _head(cfg)
    return right.count_parameters(_with(cfg, qk_nope_head_dim=head - cfg.qk_rope_head_dim, v_head_dim=head))


@misconception(
    "count_parameters",
    "Your values are as wide as the queries. They have a width of their own, v_head_dim, and no rotated part.",
)
def count_parameters__values_like_queries(cfg):
    if cfg.kv_lora_rank is None:
        return right.count_parameters(cfg)
    return right.count_parameters(_with(cfg, v_head_dim=cfg.qk_nope_head_dim + cfg.qk_rope_head_dim))


@misconception(
    "count_parameters",
    "Queries went straight from hidden_size to the heads. Where q_lora_rank is a number they are compressed first, which "
    "saves most of that matrix.",
)
def count_parameters__plain_queries(cfg):
    return right.count_parameters(_with(cfg, q_lora_rank=None))


@misconception(
    "count_parameters",
    "In ordinary attention you gave keys and values as many heads as queries have.",
)
def count_parameters__all_key_heads(cfg):
    return right.count_parameters(_with(cfg, num_key_value_heads=cfg.num_attention_heads))


@misconception(
    "count_parameters",
    "The module that predicts a second token is in your total. The hub shows 685B because the file has it, and the scales of "
    "its float8 numbers; the model has 671B.",
)
def count_parameters__with_mtp(cfg):
    counts = right.count_parameters(cfg)
    if not cfg.num_nextn_predict_layers or cfg.n_routed_experts is None:
        return counts
    more = cfg.num_nextn_predict_layers * right.mtp_parameters(cfg)["total"]
    return {**counts, "total": counts["total"] + more}


# count_active


def _active(cfg, input_embedding, routed):
    """All parts, with `routed(counts)` in place of the routed experts."""
    counts = right.count_parameters(cfg)
    table = 0 if input_embedding or cfg.tie_word_embeddings else counts["embedding"]
    return counts["total"] - counts["routed_experts"] - table + routed(counts)


def _chosen(cfg):
    return lambda counts: counts["routed_experts"] * (cfg.num_experts_per_tok or 0) // (cfg.n_routed_experts or 1)


@misconception(
    "count_active",
    "You scaled the whole model by k / E. Only the routed experts are chosen from; attention, shared experts, dense layers, "
    "router and head work on every token.",
)
def count_active__everything_scaled(cfg, *, input_embedding=False):
    total = right.count_parameters(cfg)["total"]
    if cfg.n_routed_experts is None:
        return right.count_active(cfg, input_embedding=input_embedding)
    return total * cfg.num_experts_per_tok // cfg.n_routed_experts


@misconception(
    "count_active",
    "All experts work in your count. A token goes through num_experts_per_tok of them in each layer.",
)
def count_active__all_experts(cfg, *, input_embedding=False):
    return _active(cfg, input_embedding, lambda counts: counts["routed_experts"])


@misconception(
    "count_active",
    "You counted one routed expert per layer. Each token has num_experts_per_tok.",
)
def count_active__one_expert(cfg, *, input_embedding=False):
    return _active(cfg, input_embedding, lambda counts: counts["routed_experts"] // (cfg.n_routed_experts or 1))


@misconception(
    "count_active",
    "The shared experts were taken for some of the num_experts_per_tok. They come on top of them.",
)
def count_active__shared_among_the_chosen(cfg, *, input_embedding=False):
    if cfg.n_routed_experts is None:
        return right.count_active(cfg, input_embedding=input_embedding)
    shared = right.count_parameters(cfg)["shared_experts"]
    return right.count_active(cfg, input_embedding=input_embedding) - shared


@misconception(
    "count_active",
    "Only the rows of the chosen experts are in your router. To choose, every row has to be multiplied.",
)
def count_active__router_of_the_chosen(cfg, *, input_embedding=False):
    found = right.count_active(cfg, input_embedding=input_embedding)
    if cfg.n_routed_experts is None:
        return found
    return found - _moe(cfg) * (cfg.n_routed_experts - cfg.num_experts_per_tok) * cfg.hidden_size


@misconception(
    "count_active",
    "The table of input embeddings is in your count without being asked for. One row of it is copied per token; nothing is "
    "multiplied with it.",
)
def count_active__always_with_the_table(cfg, *, input_embedding=False):
    return _active(cfg, True, _chosen(cfg))


@misconception(
    "count_active",
    "input_embedding=True changes nothing in your count. It adds the whole table.",
)
def count_active__never_with_the_table(cfg, *, input_embedding=False):
    return _active(cfg, False, _chosen(cfg))


@misconception(
    "count_active",
    "Your head does not work. Every token is multiplied with the whole of it.",
)
def count_active__no_head(cfg, *, input_embedding=False):
    head = right.count_parameters(cfg)["head"]
    return _active(cfg, input_embedding, _chosen(cfg)) - head


@misconception(
    "count_active",
    "With a tied table the head has vanished from your count. The table is looked up at the bottom, and multiplied with at the "
    "top: it works.",
)
def count_active__tied_table_lost(cfg, *, input_embedding=False):
    found = _active(cfg, input_embedding, _chosen(cfg))
    lost = cfg.tie_word_embeddings and not input_embedding
    return found - right.count_parameters(cfg)["embedding"] if lost else found


@misconception(
    "count_active",
    "A tied table was counted twice, as the embedding and as the head. It is one set of parameters.",
)
def count_active__tied_table_twice(cfg, *, input_embedding=False):
    found = _active(cfg, input_embedding, _chosen(cfg))
    twice = cfg.tie_word_embeddings and input_embedding
    return found + right.count_parameters(cfg)["embedding"] if twice else found


@misconception(
    "count_active",
    "The buffers of the router are among your parameters.",
)
def count_active__with_buffers(cfg, *, input_embedding=False):
    return _active(cfg, input_embedding, _chosen(cfg)) + right.count_parameters(cfg)["buffers"]


# yarn_mscale


@misconception(
    "yarn_mscale",
    "This is the logarithm to base 10. The natural one is meant: ln(40) is 3.69, not 1.6.",
)
def yarn_mscale__log10(factor, m):
    return 0.1 * m * math.log10(factor) + 1.0 if factor > 1 else 1.0


@misconception(
    "yarn_mscale",
    "A factor below 1 gave less than 1. Where the context does not grow, nothing is to be made up for.",
)
def yarn_mscale__below_one(factor, m):
    return 0.1 * m * math.log(factor) + 1.0


@misconception(
    "yarn_mscale",
    "m does nothing in your formula.",
)
def yarn_mscale__without_m(factor, m):
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


@misconception(
    "yarn_mscale",
    "m multiplies the 1 as well. Only the logarithm is scaled by it, so that m = 0 gives 1.",
)
def yarn_mscale__m_outside(factor, m):
    return m * (0.1 * math.log(factor) + 1.0) if factor > 1 else 1.0


@misconception(
    "yarn_mscale",
    "This is the square. Squaring belongs to the place where it is used on the scores.",
)
def yarn_mscale__squared(factor, m):
    return right.yarn_mscale(factor, m) ** 2


@misconception(
    "yarn_mscale",
    "The 0.1 is missing: it is the slope that was found to fit, 0.1 per unit of the logarithm.",
)
def yarn_mscale__no_tenth(factor, m):
    return m * math.log(factor) + 1.0 if factor > 1 else 1.0


# yarn_inv_freq


def _yarn(
    dim,
    base,
    factor,
    original_max,
    beta_fast=32,
    beta_slow=1,
    *,
    floor=math.floor,
    ceil=math.ceil,
    pairs=2,
    clamp=True,
    end=0,
    blend=None,
    invert=False,
):
    if dim % 2:
        raise ValueError(f"dim {dim} is odd")

    def pair_with(turns):
        return dim * math.log(original_max / (turns * 2 * math.pi)) / (pairs * math.log(base))

    low, high = floor(pair_with(beta_fast)), ceil(pair_with(beta_slow))
    if clamp:
        low, high = (min(max(x, 0), dim - 1) for x in (low, high))
    index = torch.arange(dim // 2, dtype=torch.float64)
    ramp = ((index * (end or 1) - low) / max(high - low, 0.001)).clamp(0, 1)
    if invert:
        ramp = 1 - ramp
    freq = base ** (-2 * index / dim)
    return blend(freq, ramp, factor) if blend else freq * (1 - ramp) + freq / factor * ramp


@misconception(
    "yarn_inv_freq",
    "Every frequency was divided by the factor. That is interpolation: neighbors become hard to tell apart, because the fast "
    "pairs, which see them, were slowed down as well.",
)
def yarn_inv_freq__interpolated(dim, base, factor, original_max, beta_fast=32, beta_slow=1):
    right.yarn_inv_freq(dim, base, factor, original_max)
    return right.yarn_inv_freq(dim, base, 1.0, original_max) / factor


@misconception(
    "yarn_inv_freq",
    "Nothing was stretched: these are the plain frequencies.",
)
def yarn_inv_freq__plain(dim, base, factor, original_max, beta_fast=32, beta_slow=1):
    return right.yarn_inv_freq(dim, base, 1.0, original_max)


@misconception(
    "yarn_inv_freq",
    "You raised the base instead. This bends all frequencies a little; here the fast ones stay exactly as they are.",
)
def yarn_inv_freq__larger_base(dim, base, factor, original_max, beta_fast=32, beta_slow=1):
    right.yarn_inv_freq(dim, base, factor, original_max)
    return right.yarn_inv_freq(dim, base * factor ** (dim / max(dim - 2, 1)), 1.0, original_max)


@misconception(
    "yarn_inv_freq",
    "The ramp runs over the columns 0 to dim, two for each pair. It runs over the indices of the pairs.",
)
def yarn_inv_freq__ramp_over_columns(dim, base, factor, original_max, beta_fast=32, beta_slow=1):
    return _yarn(dim, base, factor, original_max, beta_fast, beta_slow, end=2)


@misconception(
    "yarn_inv_freq",
    "Rounding goes the wrong way on both ends: low is rounded down, high is rounded up, so that the ramp becomes longer, not "
    "shorter.",
)
def yarn_inv_freq__rounded_inward(dim, base, factor, original_max, beta_fast=32, beta_slow=1):
    return _yarn(dim, base, factor, original_max, beta_fast, beta_slow, floor=math.ceil, ceil=math.floor)


@misconception(
    "yarn_inv_freq",
    "The ends of your ramp are not whole numbers. The trained models round them: low down, high up.",
)
def yarn_inv_freq__not_rounded(dim, base, factor, original_max, beta_fast=32, beta_slow=1):
    return _yarn(dim, base, factor, original_max, beta_fast, beta_slow, floor=float, ceil=float)


@misconception(
    "yarn_inv_freq",
    "Fast and slow have changed places: you slow down the pairs that turn often. What must be stretched are those that do not "
    "get around once within the original context.",
)
def yarn_inv_freq__inverted(dim, base, factor, original_max, beta_fast=32, beta_slow=1):
    return _yarn(dim, base, factor, original_max, beta_fast, beta_slow, invert=True)


@misconception(
    "yarn_inv_freq",
    "Your indices are twice as large as they should be: the exponent of pair i is 2i / dim, and the 2 got lost when you solved "
    "for i.",
)
def yarn_inv_freq__two_lost(dim, base, factor, original_max, beta_fast=32, beta_slow=1):
    return _yarn(dim, base, factor, original_max, beta_fast, beta_slow, pairs=1)


@misconception(
    "yarn_inv_freq",
    "You mixed wavelengths. At the ends of the ramp this is the same, in between it is not: the frequencies are mixed.",
)
def yarn_inv_freq__wavelengths(dim, base, factor, original_max, beta_fast=32, beta_slow=1):
    return _yarn(
        dim, base, factor, original_max, beta_fast, beta_slow, blend=lambda f, r, s: 1 / ((1 - r) / f + r * s / f)
    )


@misconception(
    "yarn_inv_freq",
    "The two frequencies were mixed in proportion to their logarithms. The mixture is a plain weighted sum.",
)
def yarn_inv_freq__geometric(dim, base, factor, original_max, beta_fast=32, beta_slow=1):
    return _yarn(dim, base, factor, original_max, beta_fast, beta_slow, blend=lambda f, r, s: f * s**-r)


@misconception(
    "yarn_inv_freq",
    "There is no ramp: the pairs jump from one kind to the other.",
)
def yarn_inv_freq__step(dim, base, factor, original_max, beta_fast=32, beta_slow=1):
    return _yarn(
        dim,
        base,
        factor,
        original_max,
        beta_fast,
        beta_slow,
        blend=lambda f, r, s: torch.where(r < 0.5, f, f / s),
    )


@misconception(
    "yarn_inv_freq",
    "Turns were counted without the 2 pi: a pair has turned once when its angle is 2 pi, not 1.",
)
def yarn_inv_freq__radians(dim, base, factor, original_max, beta_fast=32, beta_slow=1):
    return _yarn(dim, base, factor, original_max * 2 * math.pi, beta_fast, beta_slow)


@misconception(
    "yarn_inv_freq",
    "Turns were counted within the stretched context. The betas are about the context in which the model was trained.",
)
def yarn_inv_freq__stretched_turns(dim, base, factor, original_max, beta_fast=32, beta_slow=1):
    return _yarn(dim, base, factor, original_max * factor, beta_fast, beta_slow)


@misconception(
    "yarn_inv_freq",
    "low fell below 0, or high rose above dim - 1. Both are kept within these before the ramp is drawn, or it has another "
    "slope.",
)
def yarn_inv_freq__not_kept(dim, base, factor, original_max, beta_fast=32, beta_slow=1):
    return _yarn(dim, base, factor, original_max, beta_fast, beta_slow, clamp=False)


@misconception(
    "yarn_inv_freq",
    "beta_fast and beta_slow changed places: the pair that turns 32 times is where the ramp begins, the pair that turns once is "
    "where it ends.",
)
def yarn_inv_freq__betas_swapped(dim, base, factor, original_max, beta_fast=32, beta_slow=1):
    return _yarn(dim, base, factor, original_max, beta_slow, beta_fast)


@misconception(
    "yarn_inv_freq",
    "The betas are always 32 and 1 in your code, whatever is handed in.",
)
def yarn_inv_freq__betas_ignored(dim, base, factor, original_max, beta_fast=32, beta_slow=1):
    return _yarn(dim, base, factor, original_max)


@misconception(
    "yarn_inv_freq",
    "The frequencies are float32. At position 163,840 the rounding of a fast one moves the angle by a hundredth: float64 was "
    "asked for.",
)
def yarn_inv_freq__float32(dim, base, factor, original_max, beta_fast=32, beta_slow=1):
    return right.yarn_inv_freq(dim, base, factor, original_max, beta_fast, beta_slow).float()


@misconception(
    "yarn_inv_freq",
    "Where low and high are the same you divided by zero: a NaN in a table of angles becomes a NaN everywhere.",
)
def yarn_inv_freq__empty_ramp(dim, base, factor, original_max, beta_fast=32, beta_slow=1):
    found = _yarn(dim, base, factor, original_max, beta_fast, beta_slow)
    low, high = (
        min(max(x, 0), dim - 1)
        for x in (
            math.floor(dim * math.log(original_max / (beta_fast * 2 * math.pi)) / (2 * math.log(base))),
            math.ceil(dim * math.log(original_max / (beta_slow * 2 * math.pi)) / (2 * math.log(base))),
        )
    )
    return found if low != high else found * torch.nan


# rope_setup


def _setup(cfg, *, rotary=None, width=None, cos_sin=None, softmax=None, factor=None):
    """The right answer with one part replaced."""
    if cfg.kv_lora_rank is None:
        full = dim = _head(cfg)
    else:
        full, dim = cfg.qk_nope_head_dim + cfg.qk_rope_head_dim, cfg.qk_rope_head_dim
    s = factor if factor is not None else cfg.factor if cfg.rope_type == "yarn" else 1.0
    one, all_dim = right.yarn_mscale(s, cfg.mscale), right.yarn_mscale(s, cfg.mscale_all_dim)
    return (
        right.yarn_inv_freq(
            rotary or dim, cfg.rope_theta, s, cfg.original_max_position_embeddings, cfg.beta_fast, cfg.beta_slow
        ),
        cos_sin(one, all_dim) if cos_sin else one / all_dim,
        (width or full) ** -0.5 * (softmax(one, all_dim) if softmax else all_dim**2),
    )


@misconception(
    "rope_setup",
    "Cosine and sine got the whole mscale, and the softmax got it, too: it acts twice. Cosine and sine get the ratio of the "
    "two, which is 1 in every released model.",
)
def rope_setup__both_places(cfg):
    return _setup(cfg, cos_sin=lambda one, all_dim: one)


@misconception(
    "rope_setup",
    "The factor is in the softmax once. It stands for a scale of queries and of keys, so their product has its square.",
)
def rope_setup__once(cfg):
    return _setup(cfg, softmax=lambda one, all_dim: all_dim)


@misconception(
    "rope_setup",
    "The softmax has no factor of YaRN at all. With a factor of 40 the scores then are 0.53 of what V3 was trained with.",
)
def rope_setup__plain_softmax(cfg):
    return _setup(cfg, softmax=lambda one, all_dim: 1.0)


@misconception(
    "rope_setup",
    "The softmax was scaled with mscale. Its factor is that of mscale_all_dim; the two are equal in released models, which hides "
    "the mistake there.",
)
def rope_setup__wrong_mscale(cfg):
    return _setup(cfg, softmax=lambda one, all_dim: one**2)


@misconception(
    "rope_setup",
    "Cosine and sine are never scaled in your answer. This is right only where mscale and mscale_all_dim are equal.",
)
def rope_setup__plain_tables(cfg):
    return _setup(cfg, cos_sin=lambda one, all_dim: 1.0)


@misconception(
    "rope_setup",
    "The ratio is upside down: mscale is divided by mscale_all_dim.",
)
def rope_setup__ratio_inverted(cfg):
    return _setup(cfg, cos_sin=lambda one, all_dim: all_dim / one)


@misconception(
    "rope_setup",
    "The ratio of mscale and mscale_all_dim themselves was taken. Each goes through yarn_mscale first.",
)
def rope_setup__ratio_of_ms(cfg):
    setup = _setup(cfg)
    return setup[0], cfg.mscale / cfg.mscale_all_dim if cfg.mscale_all_dim else setup[1], setup[2]


@misconception(
    "rope_setup",
    "The scale comes from the width of the values. The dot product runs over the width of queries and keys: 128 + 64.",
)
def rope_setup__value_width(cfg):
    return _setup(cfg, width=cfg.v_head_dim)


@misconception(
    "rope_setup",
    "The rotated part is missing from the width. A query head has both parts, and both are in the dot product.",
)
def rope_setup__nope_width(cfg):
    return _setup(cfg, width=cfg.qk_nope_head_dim)


@misconception(
    "rope_setup",
    "The scale comes from the width of the latent. Products in the latent space give the scores of the heads, to the digit, so "
    "their scale is that of the heads.",
)
def rope_setup__latent_width(cfg):
    return _setup(cfg, width=None if cfg.kv_lora_rank is None else cfg.kv_lora_rank + cfg.qk_rope_head_dim)


@misconception(
    "rope_setup",
    "The width is hidden_size / num_attention_heads. With latent attention this is no width of anything: 56 in V3.",
)
def rope_setup__hidden_by_heads(cfg):
    return _setup(cfg, width=_head(cfg))


@misconception(
    "rope_setup",
    "There are frequencies for the whole head. With latent attention only qk_rope_head_dim of it is rotated.",
)
def rope_setup__whole_head(cfg):
    return _setup(cfg, rotary=None if cfg.kv_lora_rank is None else cfg.qk_nope_head_dim + cfg.qk_rope_head_dim)


@misconception(
    "rope_setup",
    "A model with rope_type default was stretched. The other fields have no say then.",
)
def rope_setup__always_yarn(cfg):
    return _setup(cfg, factor=cfg.factor)


@misconception(
    "rope_setup",
    "The factor was taken from max_position_embeddings / original_max_position_embeddings. It is a field of its own.",
)
def rope_setup__factor_from_lengths(cfg):
    if cfg.rope_type != "yarn":
        return _setup(cfg)
    return _setup(cfg, factor=cfg.max_position_embeddings / cfg.original_max_position_embeddings)


@misconception(
    "rope_setup",
    "The frequencies were computed for max_position_embeddings. The betas count turns within the original context.",
)
def rope_setup__stretched_context(cfg):
    return _setup(_with(cfg, original_max_position_embeddings=cfg.max_position_embeddings))


# forward_flops


def _modes(cfg, mode):
    if mode not in ("naive", "absorbed", "auto"):
        raise ValueError(f"unknown mode {mode}")
    return ("naive", "absorbed") if mode == "auto" else (mode,)


def _price(cfg, t, context, mode, attention):
    """All but attention as it should be, with another price for the attention of a layer."""
    correct = min(right._attention_flops(cfg, t, context + t, m) for m in _modes(cfg, mode))
    rest = right.forward_flops(cfg, t, context, mode) - cfg.num_hidden_layers * correct
    return rest + cfg.num_hidden_layers * min(attention(m) for m in _modes(cfg, mode))


@misconception(
    "forward_flops",
    "Your count is half: a multiplication and the addition that follows it are two operations.",
)
def forward_flops__multiplications(cfg, t, context, mode):
    return right.forward_flops(cfg, t, context, mode) // 2


@misconception(
    "forward_flops",
    "All experts run in your count. Each token pays for those that it chose.",
)
def forward_flops__all_experts(cfg, t, context, mode):
    return right.forward_flops(
        cfg if cfg.n_routed_experts is None else _with(cfg, num_experts_per_tok=cfg.n_routed_experts), t, context, mode
    )


@misconception(
    "forward_flops",
    "The shared experts cost nothing in your count.",
)
def forward_flops__no_shared(cfg, t, context, mode):
    return right.forward_flops(_with(cfg, n_shared_experts=0), t, context, mode)


@misconception(
    "forward_flops",
    "The router costs nothing in your count. It scores every expert for every new token.",
)
def forward_flops__no_router(cfg, t, context, mode):
    router = _moe(cfg) * 2 * t * cfg.hidden_size * (cfg.n_routed_experts or 0)
    return right.forward_flops(cfg, t, context, mode) - router


@misconception(
    "forward_flops",
    "The head was counted for one token only. Every new token goes through it here.",
)
def forward_flops__last_only(cfg, t, context, mode):
    return right.forward_flops(cfg, t, context, mode) - 2 * (t - 1) * cfg.hidden_size * cfg.vocab_size


@misconception(
    "forward_flops",
    "The head is missing from your count.",
)
def forward_flops__no_head(cfg, t, context, mode):
    return right.forward_flops(cfg, t, context, mode) - 2 * t * cfg.hidden_size * cfg.vocab_size


@misconception(
    "forward_flops",
    "The look-up of the embedding was counted as a matrix product with one-hot rows. Nothing is multiplied there.",
)
def forward_flops__one_hot(cfg, t, context, mode):
    return right.forward_flops(cfg, t, context, mode) + 2 * t * cfg.hidden_size * cfg.vocab_size


@misconception(
    "forward_flops",
    "You took the context for all keys. The new tokens are keys as well: there are context + t of them.",
)
def forward_flops__context_only(cfg, t, context, mode):
    return _price(cfg, t, context, mode, lambda m: right._attention_flops(cfg, t, context, m))


@misconception(
    "forward_flops",
    "The naive order expands only the new tokens in your count. Nothing expanded is kept: what is in the cache has to be "
    "expanded again in every step.",
)
def forward_flops__expanded_once(cfg, t, context, mode):
    def attention(m):
        found = right._attention_flops(cfg, t, context + t, m)
        if cfg.kv_lora_rank is None or m == "absorbed":
            return found
        return found - 2 * context * cfg.kv_lora_rank * cfg.num_attention_heads * (
            cfg.qk_nope_head_dim + cfg.v_head_dim
        )

    return _price(cfg, t, context, mode, attention)


@misconception(
    "forward_flops",
    "In the absorbed order the queries enter the latent space, and the mixture leaves it, for free. Both are products, for each "
    "head and new token.",
)
def forward_flops__free_absorption(cfg, t, context, mode):
    def attention(m):
        found = right._attention_flops(cfg, t, context + t, m)
        if cfg.kv_lora_rank is None or m == "naive":
            return found
        return found - 2 * t * cfg.num_attention_heads * cfg.kv_lora_rank * (cfg.qk_nope_head_dim + cfg.v_head_dim)

    return _price(cfg, t, context, mode, attention)


@misconception(
    "forward_flops",
    "The rotated part is missing from the absorbed scores. Besides the latent each key has its 64 rotated numbers.",
)
def forward_flops__no_rotated_scores(cfg, t, context, mode):
    def attention(m):
        found = right._attention_flops(cfg, t, context + t, m)
        if cfg.kv_lora_rank is None or m == "naive":
            return found
        return found - 2 * t * (context + t) * cfg.num_attention_heads * cfg.qk_rope_head_dim

    return _price(cfg, t, context, mode, attention)


@misconception(
    "forward_flops",
    "Absorption changes nothing in your count: the scores still have the width of the heads. In the latent space they are 576 "
    "wide and the mixture is 512 wide.",
)
def forward_flops__absorbed_at_head_width(cfg, t, context, mode):
    def attention(m):
        found = right._attention_flops(cfg, t, context + t, m)
        if cfg.kv_lora_rank is None or m == "naive":
            return found
        wide = 2 * cfg.kv_lora_rank - cfg.qk_nope_head_dim - cfg.v_head_dim
        return found - 2 * t * (context + t) * cfg.num_attention_heads * wide

    return _price(cfg, t, context, mode, attention)


@misconception(
    "forward_flops",
    "You took half of the scores, because the mask hides the future. What a mask hides is computed all the same.",
)
def forward_flops__masked_for_free(cfg, t, context, mode):
    def attention(m):
        found = right._attention_flops(cfg, t, context + t, m)
        width = 2 * _head(cfg) if cfg.kv_lora_rank is None else 2 * cfg.kv_lora_rank + cfg.qk_rope_head_dim
        if cfg.kv_lora_rank is not None and m == "naive":
            width = cfg.qk_nope_head_dim + cfg.qk_rope_head_dim + cfg.v_head_dim
        return found - cfg.num_attention_heads * t * (t - 1) * width

    return _price(cfg, t, context, mode, attention)


@misconception(
    "forward_flops",
    "Your auto is always absorbed. For long blocks of new tokens the naive order is cheaper, in V3 from 171 on.",
)
def forward_flops__auto_is_absorbed(cfg, t, context, mode):
    return right.forward_flops(cfg, t, context, "absorbed" if mode == "auto" else mode)


@misconception(
    "forward_flops",
    "Your auto takes absorbed for one new token and naive for more. The orders cross at 170.67 new tokens in V3, not at one.",
)
def forward_flops__auto_by_one(cfg, t, context, mode):
    chosen = ("absorbed" if t == 1 else "naive") if mode == "auto" else mode
    return right.forward_flops(cfg, t, context, chosen)


@misconception(
    "forward_flops",
    "In ordinary attention keys and values have as many heads as queries in your count.",
)
def forward_flops__all_key_heads(cfg, t, context, mode):
    return right.forward_flops(_with(cfg, num_key_value_heads=cfg.num_attention_heads), t, context, mode)


@misconception(
    "forward_flops",
    "Twice the active parameters per token: a good rule of thumb, but scores and mixtures have no parameters, and their price "
    "grows with the context.",
)
def forward_flops__two_per_parameter(cfg, t, context, mode):
    _modes(cfg, mode)
    return 2 * t * right.count_active(cfg)


# mtp_parameters


def _mtp(cfg, **changes):
    return _mtp_total({**right.mtp_parameters(cfg), **changes})


def _mtp_total(counts):
    return {**counts, "total": counts["layer"] + counts["projection"] + counts["norms"]}


@misconception(
    "mtp_parameters",
    "Your projection is square. Two rows are put side by side before it, so it has twice as many columns as rows.",
)
def mtp_parameters__square(cfg):
    return _mtp(cfg, projection=cfg.hidden_size**2)


@misconception(
    "mtp_parameters",
    "Your layer has the two norms of a layer missing: they are in it, besides the three of the module.",
)
def mtp_parameters__layer_without_norms(cfg):
    return _mtp(cfg, layer=right.mtp_parameters(cfg)["layer"] - 2 * cfg.hidden_size)


@misconception(
    "mtp_parameters",
    "There are two norms in your module: one for the hidden row, one for the embedding. A third one stands before the head.",
)
def mtp_parameters__two_norms(cfg):
    return _mtp(cfg, norms=2 * cfg.hidden_size)


@misconception(
    "mtp_parameters",
    "Your layer is a dense one. The module comes after the last layer of the model, and has experts as that has.",
)
def mtp_parameters__dense(cfg):
    moe = (cfg.n_routed_experts + cfg.n_shared_experts) * 3 * cfg.hidden_size * cfg.moe_intermediate_size
    moe += cfg.n_routed_experts * cfg.hidden_size
    layer = right.mtp_parameters(cfg)["layer"] - moe + 3 * cfg.hidden_size * cfg.intermediate_size
    return _mtp(cfg, layer=layer)


@misconception(
    "mtp_parameters",
    "Embedding and head are in your total. The module uses those of the model; in the file they are written a second time, "
    "which is one reason why it is so large.",
)
def mtp_parameters__with_tables(cfg):
    counts = right.mtp_parameters(cfg)
    return {**counts, "total": counts["total"] + 2 * cfg.vocab_size * cfg.hidden_size}


@misconception(
    "mtp_parameters",
    "Without further predictions in the config you counted nothing. One module was asked for, whatever the config has.",
)
def mtp_parameters__as_many_as_there_are(cfg):
    return {key: value * cfg.num_nextn_predict_layers for key, value in right.mtp_parameters(cfg).items()}


@misconception(
    "mtp_parameters",
    "The shared expert is missing from your layer.",
)
def mtp_parameters__no_shared(cfg):
    shared = cfg.n_shared_experts * 3 * cfg.hidden_size * cfg.moe_intermediate_size
    return _mtp(cfg, layer=right.mtp_parameters(cfg)["layer"] - shared)


@misconception(
    "mtp_parameters",
    "The router is missing from your layer.",
)
def mtp_parameters__no_router(cfg):
    return _mtp(cfg, layer=right.mtp_parameters(cfg)["layer"] - cfg.n_routed_experts * cfg.hidden_size)


# design


@misconception(
    "design",
    "The total is met, the active parameters are not. How many experts there are and how many work are two choices.",
)
def design__total_only(budget_total, budget_active, d_model, n_layers):
    cfg = right.design(budget_total, budget_active, d_model, n_layers)
    return dataclasses.replace(cfg, num_experts_per_tok=max(1, cfg.n_routed_experts // 2))


@misconception(
    "design",
    "The width of your experts is no multiple of 128.",
)
def design__any_width(budget_total, budget_active, d_model, n_layers):
    cfg = right.design(budget_total, budget_active, d_model, n_layers)
    return dataclasses.replace(cfg, moe_intermediate_size=cfg.moe_intermediate_size + 1)


@misconception(
    "design",
    "You returned the nearest model there is, and it misses a budget by more than 1 %. Where nothing fits, that is an error.",
)
def design__nearest(budget_total, budget_active, d_model, n_layers):
    try:
        return right.design(budget_total, budget_active, d_model, n_layers)
    except ValueError:
        return DeepSeekConfig.v2_lite()
