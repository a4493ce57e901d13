"""Day 29: what the tasks promise."""

import copy
import dataclasses
import itertools
import json
import math
import random
from types import SimpleNamespace

import pytest
import torch

from checker.testing import (
    assert_close,
    assert_cost,
    assert_equal,
    assert_raises,
    assert_that,
    cost_case,
    measure,
    task,
)

DEFAULTS = {
    "vocab_size": None,
    "hidden_size": None,
    "intermediate_size": None,
    "num_hidden_layers": None,
    "num_attention_heads": None,
    "num_key_value_heads": None,
    "kv_lora_rank": None,
    "q_lora_rank": None,
    "qk_nope_head_dim": None,
    "qk_rope_head_dim": None,
    "v_head_dim": None,
    "n_routed_experts": None,
    "n_shared_experts": 0,
    "num_experts_per_tok": None,
    "moe_intermediate_size": None,
    "first_k_dense_replace": 0,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "num_nextn_predict_layers": 0,
    "rope_theta": 10000.0,
    "rope_type": "default",
    "factor": 1.0,
    "original_max_position_embeddings": None,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.0,
}
ROPE = list(DEFAULTS)[-8:]
REQUIRED = list(DEFAULTS)[:5]
LATENT = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
STRETCHED = {
    "rope_type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "max_position_embeddings": 163840,
}


def record(**fields):
    """A record with the fields of a config, as the docstring of the module promises, and nothing else."""
    full = DEFAULTS | fields
    if full["num_key_value_heads"] is None:
        full["num_key_value_heads"] = full["num_attention_heads"]
    if full["original_max_position_embeddings"] is None:
        full["original_max_position_embeddings"] = full["max_position_embeddings"]
    return SimpleNamespace(**full)


V2_LITE = {
    "vocab_size": 102400,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 1408,
    "first_k_dense_replace": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    **LATENT,
    **STRETCHED,
}
V2 = V2_LITE | {
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "num_hidden_layers": 60,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "n_routed_experts": 160,
    "moe_intermediate_size": 1536,
    "n_group": 8,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
    "routed_scaling_factor": 16.0,
}
V3 = V2 | {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "num_hidden_layers": 61,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "first_k_dense_replace": 3,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
MATH = {
    "vocab_size": 102400,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 30,
    "num_attention_heads": 32,
}
MODELS = {"v2_lite": V2_LITE, "v2": V2, "v3": V3, "deepseek_math_7b": MATH}
SMALL = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "max_position_embeddings": 2560,
    "rope_type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 64,
}
TINY = {
    "v2": SMALL
    | {
        "n_shared_experts": 2,
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 16.0,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    },
    "v3": SMALL
    | {
        "q_lora_rank": 24,
        "n_shared_experts": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
}
GOLDEN = [
    "v2, greedy",
    "v2, groups, YaRN",
    "v2, compressed queries",
    "v2, experts in every layer",
    "v3, YaRN",
    "v3, YaRN of two scales",
    "v3, another base",
    "v3, plain queries",
    "v3, tied",
    "llama",
    "llama, grouped and tied",
]


def golden(data_dir, name):
    """What transformers found for one of its tiny models."""
    return json.loads((data_dir / "golden.json").read_text())["cases"][name]


def golden_record(case):
    """The record of a golden config; its keys are those of transformers 5."""
    d = case["config"]
    fields = {name: d[name] for name in DEFAULTS if d.get(name) is not None}
    fields |= {name: value for name, value in d["rope_parameters"].items() if name in ROPE}
    if d["model_type"] == "deepseek_v3":
        fields |= {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
    if d["model_type"] == "llama":
        fields["kv_lora_rank"] = None
    return record(**fields)


def some_latent(seed, **changes):
    """A random record with latent attention and experts; all sizes differ."""
    rng = random.Random(seed)
    n = [int(x) for x in rng.sample(range(5, 60), 14)]
    layers, groups = rng.randrange(4, 8), rng.randrange(2, 5)
    fields = {
        "vocab_size": 100 + n[0],
        "hidden_size": 8 * n[1],
        "intermediate_size": 150 + n[2],
        "num_hidden_layers": layers,
        "num_attention_heads": 2 + n[3],
        "kv_lora_rank": 3 * n[4],
        "q_lora_rank": rng.choice([None, 2 * n[5] + 1]),
        "qk_nope_head_dim": n[6],
        "qk_rope_head_dim": 2 * n[7],
        "v_head_dim": n[8],
        "n_routed_experts": groups * n[9],
        "n_shared_experts": rng.randrange(2, 5),
        "num_experts_per_tok": rng.randrange(2, 6),
        "moe_intermediate_size": n[10],
        "first_k_dense_replace": rng.randrange(1, layers - 1),
        "n_group": groups,
        "topk_group": rng.randrange(1, groups),
    }
    return record(**fields | changes)


def some_ordinary(seed, **changes):
    """A random dense record with ordinary attention, and fewer heads for keys than for queries."""
    rng = random.Random(seed)
    groups, share, half = rng.randrange(2, 4), rng.randrange(2, 4), rng.randrange(3, 9)
    fields = {
        "vocab_size": rng.randrange(50, 200),
        "hidden_size": groups * share * 2 * half,
        "intermediate_size": rng.randrange(20, 90),
        "num_hidden_layers": rng.randrange(2, 6),
        "num_attention_heads": groups * share,
        "num_key_value_heads": groups,
    }
    return record(**fields | changes)


# layer_plan


def kinds(plan):
    return [(kind.mlp, kind.attention) for kind in plan]


@task("layer_plan")
def test_the_first_layers_are_dense_and_the_others_have_experts(solution):
    cfg = record(**V2_LITE | {"num_hidden_layers": 5, "first_k_dense_replace": 2})
    expected = [("dense", "mla")] * 2 + [("moe", "mla")] * 3
    assert_equal(kinds(solution.layer_plan(cfg)), expected, because="5 layers, first_k_dense_replace is 2")


@task("layer_plan")
def test_v3_has_3_dense_layers_and_58_with_experts(solution):
    plan = [kind.mlp for kind in solution.layer_plan(record(**V3))]
    assert_equal((plan.count("dense"), plan.count("moe")), (3, 58), because="V3: 61 layers, the first 3 dense")


@task("layer_plan")
def test_without_leading_dense_layers_all_have_experts(solution):
    cfg = record(**V2_LITE | {"num_hidden_layers": 3, "first_k_dense_replace": 0})
    assert_equal([k.mlp for k in solution.layer_plan(cfg)], ["moe"] * 3, because="first_k_dense_replace is 0")


@task("layer_plan")
def test_more_leading_dense_layers_than_layers_make_a_dense_model(solution):
    cfg = record(**V2_LITE | {"num_hidden_layers": 3, "first_k_dense_replace": 5})
    assert_equal([k.mlp for k in solution.layer_plan(cfg)], ["dense"] * 3, because="5 dense layers asked for, 3 there")


@task("layer_plan")
def test_without_experts_every_layer_is_dense(solution):
    plan = solution.layer_plan(record(**MATH))
    assert_equal(kinds(plan), [("dense", "mha")] * 30, because="DeepSeekMath-7B: no experts, no latent")


@task("layer_plan")
@pytest.mark.parametrize("key_heads", [16, 4])
@pytest.mark.parametrize("rank", [None, 1, 32])
def test_a_latent_decides_the_attention(solution, rank, key_heads):
    cfg = record(**V2_LITE | {"num_hidden_layers": 2, "kv_lora_rank": rank, "num_key_value_heads": key_heads})
    expected = ["mha" if rank is None else "mla"] * 2
    assert_equal(
        [k.attention for k in solution.layer_plan(cfg)],
        expected,
        because=f"kv_lora_rank is {rank}, {key_heads} key heads",
    )


@task("layer_plan")
def test_dense_layers_can_have_latent_attention(solution):
    cfg = record(**MATH | LATENT | {"num_hidden_layers": 2})
    assert_equal(kinds(solution.layer_plan(cfg)), [("dense", "mla")] * 2, because="a latent, and no experts")


@task("layer_plan")
def test_the_plan_is_a_list_of_layer_kinds(solution):
    plan = solution.layer_plan(record(**MATH | {"num_hidden_layers": 2}))
    assert_that(
        isinstance(plan, list) and all(isinstance(kind, tuple) for kind in plan),
        "layer_plan returns a list of LayerKind",
        value=type(plan).__name__,
    )


# kv_cache_bytes


@task("kv_cache_bytes")
@pytest.mark.parametrize(
    ("name", "bytes_"), [("v2_lite", 31104), ("v2", 69120), ("v3", 70272), ("deepseek_math_7b", 491520)]
)
def test_bytes_per_token_are_the_known_ones(solution, name, bytes_):
    found = solution.kv_cache_bytes(record(**MODELS[name]), 1, 1)
    assert_equal(found, bytes_, because=f"{name}: {bytes_:,} bytes per token in bfloat16")


@task("kv_cache_bytes")
def test_latent_attention_keeps_a_latent_and_one_rotated_key(solution, seed):
    cfg = some_latent(seed)
    tensors = [(3, 11, cfg.kv_lora_rank), (3, 11, cfg.qk_rope_head_dim)]  # of each layer
    expected = cfg.num_hidden_layers * sum(math.prod(shape) for shape in tensors) * 4
    found = solution.kv_cache_bytes(cfg, 3, 11, 4)
    assert_equal(found, expected, because=f"batch 3, length 11, float32; of each layer {tensors[0]} and {tensors[1]}")


@task("kv_cache_bytes")
def test_ordinary_attention_keeps_a_key_and_a_value_per_key_head(solution, seed):
    cfg = some_ordinary(seed)
    shape = (2, cfg.num_key_value_heads, 7, cfg.hidden_size // cfg.num_attention_heads)
    expected = cfg.num_hidden_layers * 2 * math.prod(shape) * 4
    found = solution.kv_cache_bytes(cfg, 2, 7, 4)
    assert_equal(found, expected, because=f"batch 2, length 7: two tensors {shape} of float32 in each layer")


@task("kv_cache_bytes")
def test_heads_do_not_matter_to_a_latent_cache(solution):
    found = [solution.kv_cache_bytes(record(**V3 | {"num_attention_heads": h}), 1, 9) for h in (16, 128)]
    assert_equal(found, [9 * 70272] * 2, because="V3 with 16 and with 128 heads, 9 tokens")


@task("kv_cache_bytes")
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_each_number_takes_dtype_bytes(solution, size):
    found = solution.kv_cache_bytes(record(**V2_LITE), 1, 1, dtype_bytes=size)
    assert_equal(found, 15552 * size, because=f"27 layers of 576 numbers, {size} bytes each")


@task("kv_cache_bytes")
def test_an_empty_cache_has_no_bytes(solution):
    assert_equal(solution.kv_cache_bytes(record(**V3), 4, 0), 0, because="no token has been seen")


@task("kv_cache_bytes")
def test_counting_the_cache_makes_no_tensor(solution):
    assert_cost(solution.kv_cache_bytes, record(**V3), 8, 131072, max_calls=0, max_new_bytes=0)


# DeepSeekConfig


def published(data_dir, name):
    return json.loads((data_dir / "published.json").read_text())[name]


def fields_of(cfg):
    return {name: getattr(cfg, name) for name in DEFAULTS}


def full(fields):
    return vars(record(**fields))


def sizes(**changes):
    """A small config.json with everything that must be there, and a latent, and experts."""
    d = {name: SMALL[name] for name in SMALL if name not in ROPE}
    return d | changes


def without(d, *names):
    return {name: value for name, value in d.items() if name not in names}


@task("DeepSeekConfig")
@pytest.mark.parametrize("name", list(MODELS))
def test_a_published_file_is_read(solution, data_dir, name):
    d = published(data_dir, name)
    found = fields_of(solution.DeepSeekConfig.from_dict(d))
    assert_equal(found, full(MODELS[name]), because=f"from_dict of the config.json of {name}")


@task("DeepSeekConfig")
@pytest.mark.parametrize("name", list(MODELS))
def test_a_preset_is_the_published_model(solution, name):
    found = fields_of(getattr(solution.DeepSeekConfig, name)())
    assert_equal(found, full(MODELS[name]), because=f"{name}(), as in the lesson's table")


@task("DeepSeekConfig")
@pytest.mark.parametrize("style", ["v2", "v3"])
def test_the_tiny_models_have_their_sizes(solution, style):
    assert_equal(fields_of(solution.DeepSeekConfig.tiny(style)), full(TINY[style]), because=f"tiny({style!r})")


@task("DeepSeekConfig")
def test_an_unknown_style_is_refused(solution):
    assert_raises(ValueError, solution.DeepSeekConfig.tiny, "v1", mentions=["v1"])


@task("DeepSeekConfig")
@pytest.mark.parametrize("name", GOLDEN)
def test_a_config_of_transformers_is_read(solution, data_dir, name):
    case = golden(data_dir, name)
    expected = full(vars(golden_record(case)))
    if name.startswith("v2"):
        expected["norm_topk_prob"] = False
    found = fields_of(solution.DeepSeekConfig.from_dict(case["config"]))
    assert_equal(found, expected, because=f"{name}: written by transformers 5, positions in rope_parameters")


@task("DeepSeekConfig")
def test_little_is_enough(solution):
    d = {name: MATH[name] for name in REQUIRED}
    found = fields_of(solution.DeepSeekConfig.from_dict(d))
    assert_equal(found, full(MATH), because="the five sizes that have no default, everything else by default")


@task("DeepSeekConfig")
def test_made_directly_it_has_the_same_defaults(solution):
    found = fields_of(solution.DeepSeekConfig(64, 48, 96, 2, 4, max_position_embeddings=77))
    expected = full(dict(zip(REQUIRED, (64, 48, 96, 2, 4), strict=True)) | {"max_position_embeddings": 77})
    assert_equal(found, expected, because="DeepSeekConfig(64, 48, 96, 2, 4, max_position_embeddings=77)")


@task("DeepSeekConfig")
def test_what_is_given_is_not_filled(solution):
    cfg = solution.DeepSeekConfig(64, 48, 96, 2, 4, num_key_value_heads=2, original_max_position_embeddings=55)
    found = (cfg.num_key_value_heads, cfg.original_max_position_embeddings)
    assert_equal(found, (2, 55), because="2 key heads of 4, an original context of 55 out of 4096")


@task("DeepSeekConfig")
@pytest.mark.parametrize("name", REQUIRED)
def test_a_missing_size_is_named(solution, name):
    because = f"{name} is not in the dict, and has no default"
    assert_raises(
        ValueError, solution.DeepSeekConfig.from_dict, without(sizes(), name), mentions=[name], because=because
    )


@task("DeepSeekConfig")
@pytest.mark.parametrize("name", REQUIRED)
def test_null_is_as_good_as_missing(solution, name):
    assert_raises(ValueError, solution.DeepSeekConfig.from_dict, sizes(**{name: None}), mentions=[name])


@task("DeepSeekConfig")
@pytest.mark.parametrize(
    "name",
    ["qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "num_experts_per_tok", "moe_intermediate_size"],
)
def test_latents_and_experts_need_their_sizes(solution, name):
    because = f"kv_lora_rank and n_routed_experts are there, {name} is not"
    assert_raises(
        ValueError, solution.DeepSeekConfig.from_dict, without(sizes(), name), mentions=[name], because=because
    )


@task("DeepSeekConfig")
def test_null_gives_the_default(solution):
    names = without(DEFAULTS, *REQUIRED)
    found = fields_of(solution.DeepSeekConfig.from_dict(MATH | dict.fromkeys(names)))
    assert_equal(found, full(MATH), because="every key but the five sizes is there, and null")


@task("DeepSeekConfig")
def test_unknown_keys_are_ignored(solution):
    extra = {"auto_map": {"AutoConfig": "x"}, "architectures": ["X"], "head_dim": 5, "no_such_key": 1, "from_dict": 2}
    found = fields_of(solution.DeepSeekConfig.from_dict(MATH | extra))
    assert_equal(found, full(MATH), because=f"{', '.join(extra)} are no fields")


@task("DeepSeekConfig")
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("called", ["type", "rope_type"])
def test_both_forms_and_both_names_are_read(solution, key, called):
    inner = {called: "yarn", "factor": 8, "original_max_position_embeddings": 100, "beta_fast": 16, "beta_slow": 2}
    inner |= {"mscale": 0.5, "mscale_all_dim": 0.25}
    found = fields_of(solution.DeepSeekConfig.from_dict(MATH | {key: inner, "rope_theta": 500.0}))
    expected = full(MATH | without(inner, called) | {"rope_type": "yarn", "rope_theta": 500.0})
    assert_equal(found, expected, because=f"{key} with {called!r} inside, rope_theta outside")


@task("DeepSeekConfig")
def test_a_base_inside_counts_before_one_outside(solution):
    inner = {"rope_type": "default", "rope_theta": 77.0}
    cfg = solution.DeepSeekConfig.from_dict(MATH | {"rope_parameters": inner, "rope_theta": 500.0})
    assert_equal(cfg.rope_theta, 77.0, because="rope_theta is 77 inside of rope_parameters and 500 outside")


@task("DeepSeekConfig")
def test_a_base_inside_is_enough(solution):
    cfg = solution.DeepSeekConfig.from_dict(MATH | {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}})
    assert_equal(cfg.rope_theta, 77.0, because="rope_theta stands inside of rope_parameters only")


@task("DeepSeekConfig")
def test_rope_type_counts_before_type(solution):
    inner = {"rope_type": "yarn", "type": "default", "factor": 4}
    cfg = solution.DeepSeekConfig.from_dict(MATH | {"rope_scaling": inner})
    assert_equal(cfg.rope_type, "yarn", because="rope_type says yarn, type says default")


@task("DeepSeekConfig")
def test_the_model_type_decides_the_router_that_is_not_written(solution):
    found = []
    for kind in ("deepseek_v3", "deepseek_v2"):
        cfg = solution.DeepSeekConfig.from_dict(sizes(model_type=kind))
        found.append((cfg.scoring_func, cfg.topk_method, cfg.norm_topk_prob))
    expected = [("sigmoid", "noaux_tc", True), ("softmax", "greedy", False)]
    assert_equal(found, expected, because="no word about the router in the dict: deepseek_v3, then deepseek_v2")


@task("DeepSeekConfig")
def test_a_router_that_is_written_counts_before_the_model_type(solution):
    d = sizes(model_type="deepseek_v3", scoring_func="softmax", topk_method="greedy", norm_topk_prob=False)
    cfg = solution.DeepSeekConfig.from_dict(d)
    found = (cfg.scoring_func, cfg.topk_method, cfg.norm_topk_prob)
    assert_equal(found, ("softmax", "greedy", False), because="a deepseek_v3 that says softmax, greedy, false")


@task("DeepSeekConfig")
@pytest.mark.parametrize("name", ["v2_lite", "v3", "deepseek_math_7b"])
def test_reading_leaves_the_dict_alone(solution, data_dir, name):
    d = published(data_dir, name)
    before = copy.deepcopy(d)
    solution.DeepSeekConfig.from_dict(d)
    assert_equal(d, before, because="from_dict reads d and changes nothing in it")


@task("DeepSeekConfig")
@pytest.mark.parametrize("name", ["v2_lite", "v2", "v3", "deepseek_math_7b"])
def test_a_round_trip_gives_an_equal_config(solution, data_dir, name):
    cls = solution.DeepSeekConfig
    cfg = cls.from_dict(published(data_dir, name))
    again = cls.from_dict(json.loads(json.dumps(cfg.to_dict())))
    assert_equal(fields_of(again), full(MODELS[name]), because="from_dict(to_dict()), by way of json")
    assert_that(again == cfg, "a config that was written and read is equal to the first")


@task("DeepSeekConfig")
def test_what_is_written_has_the_new_form(solution):
    d = solution.DeepSeekConfig.from_dict(sizes(rope_scaling={"type": "yarn", "factor": 3}, rope_theta=9.0)).to_dict()
    expected = full(sizes(rope_type="yarn", factor=3, rope_theta=9.0))
    expected["rope_parameters"] = {name: expected.pop(name) for name in ROPE}
    assert_equal(d, expected, because="to_dict: each field by its name, the eight of positions in rope_parameters")


@task("DeepSeekConfig")
def test_what_is_written_is_a_dict_of_its_own(solution):
    cfg = solution.DeepSeekConfig.from_dict(sizes())
    first = cfg.to_dict()
    first["hidden_size"] = 0
    first["rope_parameters"]["factor"] = 0
    assert_equal(
        fields_of(cfg), full(sizes()), because="changing the dict that to_dict gave does not change the config"
    )
    assert_equal(cfg.to_dict()["rope_parameters"]["factor"], 1.0, because="the next to_dict is a new dict")


@task("DeepSeekConfig")
def test_a_config_is_frozen_and_can_be_a_key(solution):
    cfg = solution.DeepSeekConfig.from_dict(sizes())
    assert_raises(dataclasses.FrozenInstanceError, setattr, cfg, "hidden_size", 1)
    same = solution.DeepSeekConfig.from_dict(sizes())
    assert_equal(len({cfg, same}), 1, because="equal configs have equal hashes")


@task("DeepSeekConfig")
@pytest.mark.parametrize(
    ("changes", "mentions"),
    [
        ({"qk_rope_head_dim": 7}, ["qk_rope_head_dim", "7"]),
        ({"n_routed_experts": 10}, ["n_routed_experts", "10", "n_group", "4"]),
        ({"topk_group": 5}, ["topk_group", "5", "n_group", "4"]),
        ({"num_experts_per_tok": 5}, ["num_experts_per_tok", "5", "topk_group", "2"]),
        ({"num_experts_per_tok": 3, "topk_group": 1}, ["num_experts_per_tok", "3", "topk_group", "1"]),
        ({"num_experts_per_tok": 9, "n_group": 1, "topk_group": 1}, ["num_experts_per_tok", "9"]),
        ({"scoring_func": "relu"}, ["scoring_func", "relu"]),
        ({"topk_method": "best"}, ["topk_method", "best"]),
        ({"rope_parameters": {"rope_type": "linear"}}, ["rope_type", "linear"]),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["rope_type", "dynamic"]),
    ],
)
def test_what_cannot_be_built_is_refused(solution, changes, mentions):
    d = sizes(**changes)
    because = ", ".join(f"{name} = {value}" for name, value in changes.items())
    assert_raises(ValueError, solution.DeepSeekConfig.from_dict, d, mentions=mentions, because=because)


@task("DeepSeekConfig")
@pytest.mark.parametrize(
    ("changes", "mentions"),
    [
        ({"num_attention_heads": 24}, ["hidden_size", "4096", "num_attention_heads", "24"]),
        ({"num_key_value_heads": 12}, ["num_attention_heads", "32", "num_key_value_heads", "12"]),
        ({"hidden_size": 32 * 7}, ["hidden_size", "224", "num_attention_heads", "32"]),
    ],
)
def test_ordinary_attention_that_cannot_be_built_is_refused(solution, changes, mentions):
    because = ", ".join(f"{name} = {value}" for name, value in changes.items())
    assert_raises(ValueError, solution.DeepSeekConfig.from_dict, MATH | changes, mentions=mentions, because=because)


@task("DeepSeekConfig")
@pytest.mark.parametrize(
    "changes",
    [
        {"num_experts_per_tok": 4},  # all experts of the two groups
        {"topk_group": 4, "num_experts_per_tok": 8},
        {"n_group": 8, "topk_group": 8},
        {"hidden_size": 63, "num_attention_heads": 5},  # heads of latent attention have widths of their own
        {"num_key_value_heads": 3},
        {"qk_nope_head_dim": 7, "v_head_dim": 9},
        {"first_k_dense_replace": 9},
        {"num_experts_per_tok": 1, "n_routed_experts": 4},
    ],
)
def test_what_can_be_built_is_accepted(solution, changes):
    found = fields_of(solution.DeepSeekConfig.from_dict(sizes(**changes)))
    because = ", ".join(f"{name} = {value}" for name, value in changes.items())
    assert_equal(found, full(sizes(**changes)), because=f"nothing is wrong with {because}")


@task("DeepSeekConfig")
def test_sizes_of_experts_are_not_looked_at_without_experts(solution):
    changes = {"n_group": 3, "topk_group": 4, "num_experts_per_tok": 9, "qk_rope_head_dim": 5}
    found = fields_of(solution.DeepSeekConfig.from_dict(MATH | changes))
    assert_equal(found, full(MATH | changes), because="no experts and no latent: their other sizes do not matter")


@task("DeepSeekConfig")
def test_a_direct_config_is_checked_as_well(solution):
    fields = without(sizes(), "n_routed_experts")
    assert_raises(ValueError, solution.DeepSeekConfig, **fields, n_routed_experts=6, mentions=["n_routed_experts", "6"])


# count_parameters


def attention_shapes(cfg):
    """The matrices and norms of one attention, as shapes."""
    D, H = cfg.hidden_size, cfg.num_attention_heads
    if cfg.kv_lora_rank is None:
        head = D // H
        return [(H * head, D), *[(cfg.num_key_value_heads * head, D)] * 2, (D, H * head)]
    r, dn, dr, dv = cfg.kv_lora_rank, cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim
    rq = cfg.q_lora_rank
    query = [(H, dn + dr, D)] if rq is None else [(rq, D), (rq,), (H, dn + dr, rq)]
    return [*query, (r, D), (dr, D), (r,), (H, dn, r), (H, dv, r), (D, H, dv)]


def mlp_shapes(cfg, width):
    return [(width, cfg.hidden_size), (width, cfg.hidden_size), (cfg.hidden_size, width)]


def shapes(cfg):
    """Every parameter of the model as (part, shape), walked layer by layer."""
    D = cfg.hidden_size
    yield "embedding", (cfg.vocab_size, D)
    for i in range(cfg.num_hidden_layers):
        yield from (("attention", shape) for shape in attention_shapes(cfg))
        yield from (("norms", (D,)) for _ in range(2))
        if cfg.n_routed_experts is None or i < cfg.first_k_dense_replace:
            yield from (("dense_mlp", shape) for shape in mlp_shapes(cfg, cfg.intermediate_size))
            continue
        for part, number in (("routed_experts", cfg.n_routed_experts), ("shared_experts", cfg.n_shared_experts)):
            yield from ((part, (number, *shape)) for shape in mlp_shapes(cfg, cfg.moe_intermediate_size))
        yield "router", (cfg.n_routed_experts, D)
        if cfg.topk_method == "noaux_tc":
            yield "buffers", (cfg.n_routed_experts,)
    yield "norms", (D,)
    if not cfg.tie_word_embeddings:
        yield "head", (cfg.vocab_size, D)


PARTS = "embedding attention dense_mlp routed_experts shared_experts router norms head buffers".split()  # and the total


def summed(cfg):
    counts = dict.fromkeys(PARTS, 0)
    for part, shape in shapes(cfg):
        counts[part] += math.prod(shape)
    return counts | {"total": sum(counts.values()) - counts["buffers"]}


def in_order(counts):
    """The counts in the order of the parts, whatever the order of the dict is; what is missing is None."""
    return {part: counts.get(part) for part in [*PARTS, "total", *counts]}


@task("count_parameters")
@pytest.mark.parametrize(
    ("name", "total", "buffers"),
    [
        ("v2_lite", 15_706_484_224, 0),
        ("v2", 235_741_434_880, 0),
        ("v3", 671_026_404_352, 14_848),
        ("deepseek_math_7b", 6_910_365_696, 0),
    ],
)
def test_totals_are_the_known_ones(solution, name, total, buffers):
    counts = solution.count_parameters(record(**MODELS[name]))
    assert_equal((counts["total"], counts["buffers"]), (total, buffers), because=f"{name}: total and buffers")


@task("count_parameters")
def test_one_attention_of_v3_has_187_million(solution):
    counts = solution.count_parameters(record(**V3))
    assert_equal(counts["attention"], 61 * 187_107_328, because="V3: 61 attentions of 187,107,328 parameters")


@task("count_parameters")
@pytest.mark.parametrize("name", GOLDEN)
def test_the_parts_of_a_real_model_are_counted(solution, data_dir, name):
    case = golden(data_dir, name)
    expected = in_order(case["counts"])
    found = in_order(solution.count_parameters(golden_record(case)))
    assert_equal(found, expected, because=f"{name}: the parameters that transformers makes, by part")


@task("count_parameters")
@pytest.mark.parametrize("compressed", [False, True])
def test_every_part_of_a_latent_model_is_counted(solution, seed, compressed):
    cfg = some_latent(seed, q_lora_rank=33 if compressed else None)
    expected = in_order(summed(cfg))
    queries = "down to 33 and up again" if compressed else "straight to the heads"
    because = f"a random model with latent attention, queries {queries}: its shapes, added up"
    assert_equal(in_order(solution.count_parameters(cfg)), expected, because=because)


@task("count_parameters")
@pytest.mark.parametrize("part", PARTS)
def test_each_part_is_right_by_itself(solution, seed, part):
    cfg = some_latent(seed, topk_method="noaux_tc", q_lora_rank=21)
    expected = summed(cfg)[part]
    assert_equal(solution.count_parameters(cfg)[part], expected, because=f"{part}, of a random model")


@task("count_parameters")
def test_every_part_of_an_ordinary_model_is_counted(solution, seed):
    cfg = some_ordinary(seed)
    expected = in_order(summed(cfg))
    because = "a random dense model with ordinary attention and fewer key heads"
    assert_equal(in_order(solution.count_parameters(cfg)), expected, because=because)


@task("count_parameters")
def test_experts_and_ordinary_attention_go_together(solution, seed):
    experts = {"n_routed_experts": 6, "n_shared_experts": 0, "num_experts_per_tok": 2, "moe_intermediate_size": 10}
    cfg = some_ordinary(seed, **experts, first_k_dense_replace=1)
    expected = in_order(summed(cfg))
    because = "ordinary attention, six routed experts, no shared one"
    assert_equal(in_order(solution.count_parameters(cfg)), expected, because=because)


@task("count_parameters")
@pytest.mark.parametrize("method", ["greedy", "group_limited_greedy", "noaux_tc"])
def test_only_one_method_keeps_buffers(solution, method):
    counts = solution.count_parameters(record(**TINY["v2"] | {"topk_method": method}))
    expected = 16 if method == "noaux_tc" else 0
    assert_equal(counts["buffers"], expected, because=f"two layers with 8 experts, topk_method {method}")


@task("count_parameters")
def test_buffers_are_not_in_the_total(solution):
    totals = [
        solution.count_parameters(record(**V3 | {"topk_method": method}))["total"] for method in ("noaux_tc", "greedy")
    ]
    assert_equal(totals, [671_026_404_352] * 2, because="V3 with and without the correction of its router")


@task("count_parameters")
def test_a_tied_head_has_no_parameters_of_its_own(solution):
    counts = solution.count_parameters(record(**MATH | {"tie_word_embeddings": True}))
    found = (counts["embedding"], counts["head"], counts["total"])
    expected = (419_430_400, 0, 6_910_365_696 - 419_430_400)
    assert_equal(found, expected, because="tie_word_embeddings: embedding, head and total")


@task("count_parameters")
def test_a_dense_model_has_no_parts_of_experts(solution):
    counts = solution.count_parameters(record(**MATH | {"topk_method": "noaux_tc"}))
    found = [counts[part] for part in ("routed_experts", "shared_experts", "router", "buffers")]
    assert_equal(found, [0, 0, 0, 0], because="n_routed_experts is None")


@task("count_parameters")
def test_further_predictions_are_not_part_of_the_model(solution):
    totals = [solution.count_parameters(record(**V3 | {"num_nextn_predict_layers": n}))["total"] for n in (0, 1)]
    assert_equal(totals, [671_026_404_352] * 2, because="V3 with num_nextn_predict_layers 0 and 1")


@task("count_parameters")
def test_the_parts_are_ints_and_have_these_names(solution):
    counts = solution.count_parameters(record(**V2))
    assert_equal(sorted(counts), sorted([*PARTS, "total"]), because="the keys of the dict")
    wrong = sorted(part for part, number in counts.items() if type(number) is not int)
    assert_equal(wrong, [], because="each count is an int: these are not")


@task("count_parameters")
@pytest.mark.parametrize("name", list(MODELS))
def test_counting_makes_no_tensor(solution, name):
    cfg = record(**MODELS[name])
    assert_cost(solution.count_parameters, cfg, max_calls=0, max_new_bytes=0, because="0 bytes for any model")


@cost_case("count_parameters")
def count_v3(module, randn):
    return lambda: module.count_parameters(record(**V3))


# count_active


def active(cfg, input_embedding=False):
    """The shapes once more, with the chosen experts only."""
    total = 0
    for part, shape in shapes(cfg):
        if part == "routed_experts":
            shape = (cfg.num_experts_per_tok, *shape[1:])
        if part == "buffers" or (part == "embedding" and not (input_embedding or cfg.tie_word_embeddings)):
            continue
        total += math.prod(shape)
    return total


@task("count_active")
@pytest.mark.parametrize(
    ("name", "expected"),
    [("v2_lite", 2_451_435_008), ("v2", 20_851_512_320), ("v3", 36_625_603_584), ("deepseek_math_7b", 6_490_935_296)],
)
def test_active_parameters_are_the_known_ones(solution, name, expected):
    found = solution.count_active(record(**MODELS[name]))
    assert_equal(found, expected, because=f"{name}: parameters that work on one token")


@task("count_active")
@pytest.mark.parametrize(("name", "billions"), [("v2_lite", 2.4), ("v2", 21), ("v3", 37)])
def test_they_agree_with_what_was_published(solution, name, billions):
    found = solution.count_active(record(**MODELS[name])) / 1e9
    near = abs(found - billions) < 0.06 if name == "v2_lite" else round(found) == billions
    assert_that(near, f"{name} was announced with {billions}B active parameters", value=round(found, 3))


@task("count_active")
@pytest.mark.parametrize(("name", "expected"), [("v2_lite", 2_661_150_208), ("v3", 37_552_282_624)])
def test_the_input_embedding_counts_on_request(solution, name, expected):
    found = solution.count_active(record(**MODELS[name]), input_embedding=True)
    assert_equal(found, expected, because=f"{name} with input_embedding=True: one more table")


@task("count_active")
def test_the_table_is_all_that_is_added(solution, seed):
    cfg = some_latent(seed)
    found = solution.count_active(cfg, input_embedding=True) - solution.count_active(cfg, input_embedding=False)
    assert_equal(found, cfg.vocab_size * cfg.hidden_size, because="with the input embedding less without it: the table")


@task("count_active")
@pytest.mark.parametrize("input_embedding", [False, True])
def test_active_parameters_of_a_random_model(solution, seed, input_embedding):
    cfg = some_latent(seed)
    expected = active(cfg, input_embedding)
    found = solution.count_active(cfg, input_embedding=input_embedding)
    assert_equal(found, expected, because=f"a random model, input_embedding={input_embedding}")


@task("count_active")
def test_one_more_chosen_expert_adds_one_expert_per_layer(solution, seed):
    cfg = some_latent(seed)
    changed = SimpleNamespace(**vars(cfg) | {"num_experts_per_tok": cfg.num_experts_per_tok + 1})
    layers = cfg.num_hidden_layers - cfg.first_k_dense_replace
    found = solution.count_active(changed) - solution.count_active(cfg)
    expected = layers * 3 * cfg.hidden_size * cfg.moe_intermediate_size
    assert_equal(found, expected, because=f"one more expert per token in each of {layers} layers")


@task("count_active")
def test_more_experts_to_choose_from_add_rows_of_the_router_only(solution):
    found = solution.count_active(record(**V3 | {"n_routed_experts": 264})) - solution.count_active(record(**V3))
    assert_equal(
        found, 58 * 8 * 7168, because="V3 with 8 experts more, still 8 per token: every row of the router works"
    )


@task("count_active")
@pytest.mark.parametrize("shared", [0, 1, 3])
def test_shared_experts_work_on_every_token(solution, shared):
    found = solution.count_active(record(**TINY["v2"] | {"n_shared_experts": shared}))
    expected = active(record(**TINY["v2"] | {"n_shared_experts": shared}))
    assert_equal(found, expected, because=f"{shared} shared experts, 3 of 8 routed ones")


@task("count_active")
@pytest.mark.parametrize("input_embedding", [False, True])
def test_a_tied_table_counts_once(solution, input_embedding):
    found = solution.count_active(record(**TINY["v3"] | {"tie_word_embeddings": True}), input_embedding=input_embedding)
    expected = active(record(**TINY["v3"]))
    assert_equal(found, expected, because=f"a tied table works as the head (input_embedding={input_embedding})")


@task("count_active")
@pytest.mark.parametrize("input_embedding", [False, True])
def test_a_dense_model_works_as_a_whole(solution, seed, input_embedding):
    cfg = some_ordinary(seed)
    expected = summed(cfg)["total"] - (0 if input_embedding else cfg.vocab_size * cfg.hidden_size)
    found = solution.count_active(cfg, input_embedding=input_embedding)
    assert_equal(found, expected, because=f"no experts, input_embedding={input_embedding}")


@task("count_active")
def test_with_all_experts_chosen_everything_works(solution):
    cfg = record(**TINY["v3"] | {"num_experts_per_tok": 8})
    found = solution.count_active(cfg, input_embedding=True)
    assert_equal(found, summed(cfg)["total"], because="8 of 8 experts and the embedding: the total")


@task("count_active")
def test_active_parameters_are_an_int_and_cost_nothing(solution):
    found = assert_cost(solution.count_active, record(**V3), max_calls=0, max_new_bytes=0)
    assert_equal(type(found).__name__, "int", because="a count is an int")


# yarn_mscale


@task("yarn_mscale")
@pytest.mark.parametrize(
    ("factor", "m", "expected"),
    [
        (40, 1.0, 1.3688879454),
        (40, 0.707, 1.2608037774),
        (40, 0.5, 1.1844439727),
        (math.e, 1.0, 1.1),
        (16, 2.0, 1.5545177444),
        (1.5, 1.0, 1.0405465108),
    ],
)
def test_the_factor_of_longer_contexts(solution, factor, m, expected):
    found = solution.yarn_mscale(factor, m)
    assert_close(found, expected, rtol=1e-9, atol=0, because=f"0.1 * {m} * ln({factor}) + 1")


@task("yarn_mscale")
@pytest.mark.parametrize("factor", [1, 1.0, 0.5, 0.01])
def test_a_context_that_is_not_longer_changes_nothing(solution, factor):
    assert_equal(float(solution.yarn_mscale(factor, 0.9)), 1.0, because=f"factor {factor} is not above 1")


@task("yarn_mscale")
def test_m_zero_gives_one(solution):
    assert_equal(float(solution.yarn_mscale(40, 0.0)), 1.0, because="0.1 * 0 * ln(40) + 1")


@task("yarn_mscale")
def test_it_is_a_float(solution):
    assert_equal(type(solution.yarn_mscale(40, 1.0)).__name__, "float", because="a Python float")


# yarn_inv_freq


def plain(dim, base):
    return torch.tensor([1 / base ** (2 * i / dim) for i in range(dim // 2)], dtype=torch.float64)


def blended(dim, base, factor, original, fast=32.0, slow=1.0):
    """Pair by pair, in Python's numbers: the indices by bisection on the turns, not by a formula."""

    def turns(index):
        return original * base ** (-2 * index / dim) / (2 * math.pi)

    def index_of(n):
        low, high = -10.0 * dim, 10.0 * dim
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if turns(middle) > n else (low, middle)
        return low

    low = min(max(math.floor(index_of(fast)), 0), dim - 1)
    high = min(max(math.ceil(index_of(slow)), 0), dim - 1)
    values = []
    for i in range(dim // 2):
        f = base ** (-2 * i / dim)
        share = 0.0 if i <= low else 1.0 if i >= high else (i - low) / (high - low)
        values.append((1 - share) * f + share * f / factor)
    return torch.tensor(values, dtype=torch.float64)


@task("yarn_inv_freq")
@pytest.mark.parametrize(("dim", "base"), [(64, 10000.0), (8, 500.0), (2, 10000.0), (128, 1e6)])
def test_factor_one_changes_nothing(solution, dim, base):
    expected = plain(dim, base)
    found = solution.yarn_inv_freq(dim, base, 1.0, 4096)
    assert_close(
        found, expected, rtol=1e-12, atol=0, because=f"dim {dim}, base {base:g}, factor 1: base ** (-2i / dim)"
    )


@task("yarn_inv_freq")
def test_eleven_frequencies_of_v3_stay_as_they_are(solution):
    found = solution.yarn_inv_freq(64, 10000.0, 40, 4096)
    same = (found / plain(64, 10000.0) - 1).abs() < 1e-12
    assert_equal(
        same.tolist(), [i <= 10 for i in range(32)], because="dim 64, factor 40: pairs 0 to 10 keep their speed"
    )


@task("yarn_inv_freq")
def test_nine_frequencies_of_v3_are_divided_by_40(solution):
    found = solution.yarn_inv_freq(64, 10000.0, 40, 4096)
    slow = (found * 40 / plain(64, 10000.0) - 1).abs() < 1e-12
    assert_equal(
        slow.tolist(), [i >= 23 for i in range(32)], because="dim 64, factor 40: pairs 23 to 31 are 40 times slower"
    )


@task("yarn_inv_freq")
def test_between_them_the_share_grows_in_equal_steps(solution):
    ratio = solution.yarn_inv_freq(64, 10000.0, 40, 4096) / plain(64, 10000.0)
    share = (1 - ratio) / (1 - 1 / 40)
    expected = torch.tensor([(i - 10) / 13 for i in range(10, 24)], dtype=torch.float64)
    assert_close(
        share[10:24], expected, rtol=1e-9, atol=1e-12, because="the share of f / 40 in the pairs 10 to 23: i/13"
    )


@task("yarn_inv_freq")
def test_the_middle_of_the_ramp_is_known(solution):
    found = solution.yarn_inv_freq(64, 10000.0, 40, 4096)[16:18]
    f = [0.01, 10000.0 ** (-34 / 64)]
    expected = torch.tensor([f[0] * (7 / 13 + 6 / 13 / 40), f[1] * (6 / 13 + 7 / 13 / 40)], dtype=torch.float64)
    assert_close(
        found, expected, rtol=1e-12, atol=0, because="pairs 16 and 17 have shares 6/13 and 7/13 of the slow one"
    )


@task("yarn_inv_freq")
@pytest.mark.parametrize("name", [name for name in GOLDEN if "YaRN" in name or "base" in name])
def test_the_frequencies_of_a_real_model(solution, data_dir, name):
    case = golden(data_dir, name)
    rope, dim = case["config"]["rope_parameters"], case["config"]["qk_rope_head_dim"]
    expected = torch.tensor(case["inv_freq"], dtype=torch.float64)
    original = rope["original_max_position_embeddings"]
    found = solution.yarn_inv_freq(dim, rope["rope_theta"], rope["factor"], original)
    because = f"transformers: dim {dim}, base {rope['rope_theta']:g}, factor {rope['factor']}, original {original}"
    assert_close(found, expected, rtol=3e-7, atol=0, because=because)


@task("yarn_inv_freq")
@pytest.mark.parametrize(
    ("dim", "base", "factor", "original", "fast", "slow"),
    [
        (64, 10000.0, 40, 4096, 32, 1),
        (32, 500000.0, 8, 8192, 32, 1),
        (128, 10000.0, 2.5, 2048, 24, 2),
        (24, 100.0, 4, 1000, 10, 3),
        (6, 10000.0, 16, 512, 32, 1),
        (8, 10000.0, 40, 64, 32, 1),
        (16, 10.0, 4, 60, 32, 1),  # the slow end lies beyond the last pair
        (10, 4.0, 3, 300, 32, 1),  # and beyond dim
        (48, 10000.0, 40, 180, 32, 1),  # the fast end lies before the first pair
    ],
)
def test_pair_by_pair_it_is_the_definition(solution, dim, base, factor, original, fast, slow):
    expected = blended(dim, base, factor, original, fast, slow)
    found = solution.yarn_inv_freq(dim, base, factor, original, fast, slow)
    because = f"dim {dim}, base {base:g}, factor {factor}, original {original}, betas {fast} and {slow}"
    assert_close(found, expected, rtol=1e-10, atol=0, because=because)


@task("yarn_inv_freq")
def test_a_random_setting_is_the_definition(solution, seed):
    rng = random.Random(seed)
    dim, base, factor = 2 * rng.randrange(8, 40), rng.uniform(1000, 1e6), rng.uniform(2, 50)
    original = rng.randrange(500, 9000)
    expected = blended(dim, base, factor, original)
    found = solution.yarn_inv_freq(dim, base, factor, original)
    because = f"dim {dim}, base {base:.1f}, factor {factor:.2f}, original {original}"
    assert_close(found, expected, rtol=1e-9, atol=0, because=because)


@task("yarn_inv_freq")
def test_the_betas_have_defaults(solution):
    expected = blended(64, 10000.0, 40, 4096, 32, 1)
    found = solution.yarn_inv_freq(64, 10000.0, factor=40, original_max=4096)
    assert_close(found, expected, rtol=1e-10, atol=0, because="beta_fast 32 and beta_slow 1 if nothing is said")
    expected = blended(64, 10000.0, 40, 4096, 8, 4)
    found = solution.yarn_inv_freq(64, 10000.0, 40, 4096, beta_slow=4, beta_fast=8)
    assert_close(found, expected, rtol=1e-10, atol=0, because="beta_fast 8 and beta_slow 4")


@task("yarn_inv_freq")
def test_a_ramp_of_no_length_is_a_step(solution):
    found = solution.yarn_inv_freq(10, 2.0, 7, 10_000_000)  # every pair turns far more than 32 times
    assert_close(
        found, plain(10, 2.0), rtol=1e-12, atol=0, because="dim 10, base 2, original 10 million: low = high = 9"
    )


@task("yarn_inv_freq")
def test_a_step_between_two_pairs(solution):
    dim, base, original = 16, 10000.0, 4096
    turns = original * base ** (-2 * 5 / dim) / (2 * math.pi)  # of pair 5
    found = solution.yarn_inv_freq(dim, base, 6, original, turns * (1 - 1e-9), turns * (1 + 1e-9))
    shares = [0.0] * 6 + [1.0] * 2
    expected = torch.tensor([f * (1 - s) + f / 6 * s for f, s in zip(plain(dim, base).tolist(), shares, strict=True)])
    assert_close(
        found, expected.double(), rtol=1e-6, atol=0, because="low = high = 5: pairs 0 to 5 stay, 6 and 7 slow down"
    )


@task("yarn_inv_freq")
def test_frequencies_fall_from_pair_to_pair(solution):
    found = solution.yarn_inv_freq(64, 10000.0, 40, 4096)
    assert_that((found[1:] < found[:-1]).all(), "each pair is slower than the one before it", value=found)


@task("yarn_inv_freq")
def test_more_stretch_is_never_faster(solution):
    found = [solution.yarn_inv_freq(64, 10000.0, factor, 4096) for factor in (1, 2, 8, 40)]
    for slow, fast in itertools.pairwise(reversed(found)):
        assert_that((slow <= fast * (1 + 1e-12)).all(), "a larger factor makes no pair faster", value=slow)


@task("yarn_inv_freq")
def test_the_frequencies_are_float64(solution):
    found = solution.yarn_inv_freq(12, 10000.0, 4, 100)
    assert_equal((tuple(found.shape), str(found.dtype)), ((6,), "torch.float64"), because="dim 12: shape and dtype")


@task("yarn_inv_freq")
@pytest.mark.parametrize("dim", [7, 1])
def test_an_odd_width_is_refused(solution, dim):
    assert_raises(ValueError, solution.yarn_inv_freq, dim, 10000.0, 4, 100, mentions=[str(dim)])


# rope_setup


def checked(found, inv_freq, cos_sin, softmax, because):
    """Compare the three."""
    assert_that(isinstance(found, tuple) and len(found) == 3, "rope_setup returns three things")
    assert_close(found[0].double(), inv_freq, rtol=3e-7, atol=0, because=f"{because} (inv_freq)")
    assert_close(float(found[1]), cos_sin, rtol=1e-9, atol=0, because=f"{because} (cos_sin_scale)")
    assert_close(float(found[2]), softmax, rtol=1e-9, atol=0, because=f"{because} (softmax_scale)")


@task("rope_setup")
@pytest.mark.parametrize(
    ("name", "softmax"), [("v2_lite", 0.114721386793), ("v2", 0.114721386793), ("v3", 0.135233778861)]
)
def test_the_scales_of_released_models(solution, name, softmax):
    cfg = record(**MODELS[name])
    expected = blended(64, 10000.0, 40, 4096)
    checked(solution.rope_setup(cfg), expected, 1.0, softmax, because=name)


@task("rope_setup")
def test_two_mscales_that_differ_have_two_places(solution):
    cfg = record(**V3 | {"mscale": 1.0, "mscale_all_dim": 0.5})
    expected = blended(64, 10000.0, 40, 4096)
    checked(
        solution.rope_setup(cfg),
        expected,
        1.1557219902,
        0.10124612958,
        because="V3 with mscale 1.0 and mscale_all_dim 0.5",
    )


@task("rope_setup")
def test_without_mscale_all_dim_only_cosine_and_sine_are_scaled(solution):
    cfg = record(**V3 | {"mscale": 1.0, "mscale_all_dim": 0.0})
    expected = blended(64, 10000.0, 40, 4096)
    checked(solution.rope_setup(cfg), expected, 1.3688879454, 192**-0.5, because="mscale 1.0, mscale_all_dim 0.0")


@task("rope_setup")
def test_without_mscale_only_the_softmax_is_scaled(solution):
    cfg = record(**V3 | {"mscale": 0.0, "mscale_all_dim": 1.0})
    expected = blended(64, 10000.0, 40, 4096)
    because = "mscale 0.0, mscale_all_dim 1.0"
    checked(solution.rope_setup(cfg), expected, 1 / 1.36888794541, 0.135233778861, because=because)


@task("rope_setup")
@pytest.mark.parametrize("changes", [{}, {"factor": 40, "mscale": 0.7, "mscale_all_dim": 0.6}])
def test_default_positions_are_not_stretched(solution, changes):
    cfg = record(**V3 | {"rope_type": "default", "factor": 1.0} | changes)
    checked(solution.rope_setup(cfg), plain(64, 10000.0), 1.0, 192**-0.5, because=f"rope_type default, {changes}")


@task("rope_setup")
def test_ordinary_attention_rotates_whole_heads(solution):
    found = solution.rope_setup(record(**MATH | {"rope_theta": 777.0}))
    checked(found, plain(128, 777.0), 1.0, 128**-0.5, because="DeepSeekMath-7B with base 777: heads of 128")


@task("rope_setup")
def test_ordinary_attention_can_be_stretched(solution):
    cfg = record(**MATH | STRETCHED | {"factor": 4, "mscale_all_dim": 0.8, "mscale": 0.8})
    m = 0.1 * 0.8 * math.log(4) + 1
    checked(
        solution.rope_setup(cfg),
        blended(128, 10000.0, 4, 4096),
        1.0,
        128**-0.5 * m * m,
        because="heads of 128, factor 4",
    )


@task("rope_setup")
def test_every_field_of_positions_is_used(solution):
    changes = {
        "rope_theta": 500.0,
        "factor": 6.0,
        "original_max_position_embeddings": 300,
        "beta_fast": 20,
        "beta_slow": 3,
    }
    cfg = record(**V3 | changes | {"qk_rope_head_dim": 32, "qk_nope_head_dim": 50})
    m = 0.1 * math.log(6) + 1
    expected = blended(32, 500.0, 6, 300, 20, 3)
    checked(solution.rope_setup(cfg), expected, 1.0, 82**-0.5 * m * m, because=", ".join(map(str, changes.items())))


@task("rope_setup")
@pytest.mark.parametrize("name", GOLDEN)
def test_the_scales_of_real_models(solution, data_dir, name):
    case = golden(data_dir, name)
    expected = torch.tensor(case["inv_freq"], dtype=torch.float64)
    found = solution.rope_setup(golden_record(case))
    checked(found, expected, case["cos_sin_scale"], case["softmax_scale"], because=f"transformers: {name}")


# forward_flops


def attention_products(cfg, t, s, mode):
    """The matrix products of one attention, as (m, k, n)."""
    D, H = cfg.hidden_size, cfg.num_attention_heads
    if cfg.kv_lora_rank is None:
        head = D // H
        keys = cfg.num_key_value_heads * head
        yield from [(t, D, H * head), (t, D, keys), (t, D, keys), (t, H * head, D)]
        yield from [(t, head, s), (t, s, head)] * H
        return
    r, rq = cfg.kv_lora_rank, cfg.q_lora_rank
    dn, dr, dv = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim
    yield from [(t, D, H * (dn + dr))] if rq is None else [(t, D, rq), (t, rq, H * (dn + dr))]
    yield from [(t, D, r + dr), (t, H * dv, D)]
    for _ in range(H):
        if mode == "naive":
            yield from [(s, r, dn), (s, r, dv), (t, dn + dr, s), (t, s, dv)]
        else:
            yield from [(t, dn, r), (t, r, s), (t, dr, s), (t, s, r), (t, r, dv)]


def products(cfg, t, s, mode):
    """All matrix products of a forward pass."""
    D = cfg.hidden_size
    for i in range(cfg.num_hidden_layers):
        yield from attention_products(cfg, t, s, mode)
        widths = [cfg.intermediate_size]
        if cfg.n_routed_experts is not None and i >= cfg.first_k_dense_replace:
            yield t, D, cfg.n_routed_experts
            widths = [cfg.moe_intermediate_size] * (cfg.num_experts_per_tok + cfg.n_shared_experts)
        for width in widths:
            yield from [(t, D, width), (t, D, width), (t, width, D)]
    yield t, D, cfg.vocab_size


def flops(cfg, t, s, mode):
    return sum(2 * m * k * n for m, k, n in products(cfg, t, s, mode))


@task("forward_flops")
@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("case_number", [0, 1, 2, 3])
def test_the_meter_found_the_same_in_a_real_model(solution, data_dir, name, case_number):
    case = golden(data_dir, name)
    t, context, expected = case["flops"][case_number]
    found = solution.forward_flops(golden_record(case), t, context, "naive")
    because = f"{name}: {t} new tokens after {context}, as metered in transformers"
    assert_equal(found, expected, because=because)


@task("forward_flops")
@pytest.mark.parametrize("mode", ["naive", "absorbed"])
@pytest.mark.parametrize(("t", "context"), [(1, 0), (5, 0), (1, 30), (3, 8)])
def test_every_product_is_counted(solution, seed, mode, t, context):
    cfg = some_latent(seed)
    expected = flops(cfg, t, context + t, mode)
    found = solution.forward_flops(cfg, t, context, mode)
    assert_equal(found, expected, because=f"a random model, {t} new tokens after {context}, {mode}")


@task("forward_flops")
@pytest.mark.parametrize("compressed", [None, 19])
def test_queries_are_compressed_or_not(solution, seed, compressed):
    cfg = some_latent(seed, q_lora_rank=compressed)
    expected = [flops(cfg, 4, 6, mode) for mode in ("naive", "absorbed")]
    found = [solution.forward_flops(cfg, 4, 2, mode) for mode in ("naive", "absorbed")]
    assert_equal(found, expected, because=f"q_lora_rank is {compressed}")


@task("forward_flops")
@pytest.mark.parametrize(
    ("name", "mode", "expected"),
    [
        ("v2_lite", "absorbed", 8_752_988_160),
        ("v3", "absorbed", 142_841_085_952),
        ("v3", "naive", 8_475_446_738_944),
    ],
)
def test_one_token_after_4095_others(solution, name, mode, expected):
    found = solution.forward_flops(record(**MODELS[name]), 1, 4095, mode)
    assert_equal(found, expected, because=f"{name}: one new token, 4096 keys, {mode}")


@task("forward_flops")
def test_absorbed_attention_that_really_runs_costs_as_much(solution, randn, seed):
    cfg = some_latent(seed, num_hidden_layers=1, first_k_dense_replace=1, q_lora_rank=None)
    D, H, r = cfg.hidden_size, cfg.num_attention_heads, cfg.kv_lora_rank
    dn, dr, dv, t, s = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim, 2, 9
    x, latent, rotated = randn(t, D), randn(s, r), randn(s, dr)
    w_q, w_kv, w_uk, w_uv, w_o = (
        randn(D, H * (dn + dr)),
        randn(D, r + dr),
        randn(H, dn, r),
        randn(H, r, dv),
        randn(H * dv, D),
    )
    gate, up, down = randn(D, cfg.intermediate_size), randn(D, cfg.intermediate_size), randn(cfg.intermediate_size, D)
    head = randn(D, cfg.vocab_size)

    def forward():
        q = (x @ w_q).view(t, H, dn + dr).transpose(0, 1)  # (H, t, dn + dr)
        x @ w_kv
        scores = q[..., :dn] @ w_uk @ latent.T + q[..., dn:] @ rotated.T  # (H, t, s)
        mixture = scores @ latent @ w_uv  # (H, t, dv)
        y = mixture.transpose(0, 1).reshape(t, H * dv) @ w_o
        return ((y @ gate) * (y @ up)) @ down @ head

    _, cost = measure(forward)
    found = solution.forward_flops(cfg, t, s - t, "absorbed")
    assert_equal(found, cost.flops, because=f"one dense layer, {t} new tokens, {s} keys, absorbed: metered")


@task("forward_flops")
@pytest.mark.parametrize(("t", "cheaper"), [(1, "absorbed"), (170, "absorbed"), (171, "naive"), (4096, "naive")])
def test_auto_takes_the_cheaper_order(solution, t, cheaper):
    cfg = record(**V3)
    expected = flops(SimpleNamespace(**vars(cfg) | {"num_hidden_layers": 4}), t, 10**7 + t, cheaper)
    found = solution.forward_flops(SimpleNamespace(**vars(cfg) | {"num_hidden_layers": 4}), t, 10**7, "auto")
    assert_equal(found, expected, because=f"four layers of V3, {t} new tokens after ten million: {cheaper} is cheaper")


@task("forward_flops")
@pytest.mark.parametrize("mode", ["naive", "absorbed", "auto"])
def test_ordinary_attention_has_one_order_only(solution, seed, mode):
    cfg = some_ordinary(seed)
    expected = flops(cfg, 3, 11, "naive")
    found = solution.forward_flops(cfg, 3, 8, mode)
    assert_equal(found, expected, because=f"ordinary attention, fewer key heads, mode {mode}")


@task("forward_flops")
@pytest.mark.parametrize("cfg", [V3, MATH], ids=["latent", "ordinary"])
@pytest.mark.parametrize("mode", ["fast", "", "Naive"])
def test_an_unknown_mode_is_refused(solution, cfg, mode):
    assert_raises(ValueError, solution.forward_flops, record(**cfg), 1, 0, mode, mentions=[mode])


@task("forward_flops")
def test_flops_are_an_int_and_cost_nothing(solution):
    found = assert_cost(solution.forward_flops, record(**V3), 4096, 131072, "auto", max_calls=0, max_new_bytes=0)
    assert_equal(type(found).__name__, "int", because="a count is an int")


# mtp_parameters


@task("mtp_parameters")
def test_the_module_of_v3_is_the_known_one(solution):
    expected = {"layer": 11_507_286_016, "projection": 102_760_448, "norms": 21_504, "total": 11_610_067_968}
    found = solution.mtp_parameters(record(**V3))
    assert_equal(dict(sorted(found.items())), dict(sorted(expected.items())), because="V3: one module")


@task("mtp_parameters")
@pytest.mark.parametrize("part", ["layer", "projection", "norms", "total"])
def test_the_module_of_a_random_model(solution, seed, part):
    cfg = some_latent(seed)
    one = SimpleNamespace(**vars(cfg) | {"num_hidden_layers": 1, "first_k_dense_replace": 0, "vocab_size": 0})
    layer, D = summed(one)["total"] - cfg.hidden_size, cfg.hidden_size
    expected = {"layer": layer, "projection": D * 2 * D, "norms": 3 * D, "total": layer + 2 * D * D + 3 * D}[part]
    assert_equal(solution.mtp_parameters(cfg)[part], expected, because=f"{part}, of a random model")


@task("mtp_parameters")
def test_the_router_has_no_bias_in_it(solution):
    found = [
        solution.mtp_parameters(record(**TINY["v3"] | {"topk_method": method}))["total"]
        for method in ("noaux_tc", "greedy")
    ]
    assert_equal(found[0] - found[1], 0, because="buffers are not parameters, whatever the method is")


@task("mtp_parameters")
@pytest.mark.parametrize("n", [0, 1, 3])
def test_it_is_one_module_however_many_there_are(solution, n):
    found = solution.mtp_parameters(record(**V3 | {"num_nextn_predict_layers": n}))["total"]
    assert_equal(found, 11_610_067_968, because=f"num_nextn_predict_layers is {n}, one module is counted")


# design


def fixed(d_model, n_layers):
    """The fields that design may not choose."""
    sizes = {"hidden_size": d_model, "intermediate_size": 4 * d_model, "num_hidden_layers": n_layers}
    heads = {"num_attention_heads": d_model // 128, "num_key_value_heads": d_model // 128}
    return without(full(V2_LITE | sizes | heads), "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size")


def designed(solution, total, active_, d_model, n_layers):
    """Call design and check everything that it promises."""
    cfg = solution.design(total, active_, d_model, n_layers)
    kept = {name: getattr(cfg, name) for name in fixed(d_model, n_layers)}
    assert_equal(kept, fixed(d_model, n_layers), because="the fields that are fixed")
    whole = [name for name, value in V2_LITE.items() if type(value) is int and name not in ROPE]
    floats = [name for name in [*whole, "num_key_value_heads"] if type(getattr(cfg, name)) is not int]
    assert_equal(floats, [], because="sizes are ints: these are not")
    E, k, width = cfg.n_routed_experts, cfg.num_experts_per_tok, cfg.moe_intermediate_size
    assert_that(1 <= k < E <= 512, "1 <= num_experts_per_tok < n_routed_experts <= 512", value=(k, E))
    assert_that(width % 128 == 0 and 128 <= width <= 4 * d_model, "a multiple of 128 up to 4 * d_model", value=width)
    found = (summed(cfg)["total"], active(cfg))
    off = [round(100 * (a / b - 1), 2) for a, b in zip(found, (total, active_), strict=True)]
    because = f"{found[0]:,} parameters and {found[1]:,} active ones are {off[0]} % and {off[1]} % off the budgets"
    assert_that(max(map(abs, off)) <= 1.0, because, value=off)


@task("design")
@pytest.mark.parametrize(
    ("total", "active_", "d_model", "n_layers"),
    [
        (15_706_484_224, 2_451_435_008, 2048, 27),
        (236 * 10**9, 21 * 10**9, 5120, 60),
        (671 * 10**9, 37 * 10**9, 7168, 61),
        (10**12, 32 * 10**9, 7168, 61),
        (3 * 10**9, 8 * 10**8, 1024, 24),
        (100 * 10**9, 5 * 10**9, 4096, 36),
    ],
)
def test_budgets_of_known_size_are_met(solution, total, active_, d_model, n_layers):
    designed(solution, total, active_, d_model, n_layers)


def relative(d_model, n_layers, E, k, width):
    choice = {"n_routed_experts": E, "num_experts_per_tok": k, "moe_intermediate_size": width}
    return SimpleNamespace(**fixed(d_model, n_layers), **choice)


@task("design")
def test_random_budgets_that_can_be_met_are_met(solution, seed):
    rng = random.Random(seed)
    d_model, n_layers = 128 * rng.randrange(8, 40), rng.randrange(8, 60)
    E = rng.randrange(16, 400)
    cfg = relative(d_model, n_layers, E, rng.randrange(1, E // 3), 128 * rng.randrange(2, 16))
    designed(solution, summed(cfg)["total"], active(cfg), d_model, n_layers)


@task("design")
@pytest.mark.parametrize(
    ("d_model", "n_layers", "E", "k", "width"),
    [
        (1024, 12, 512, 3, 4096),  # only the widest and most experts have so many parameters
        (1024, 12, 2, 1, 128),  # and only the narrowest and fewest so few
        (2048, 12, 512, 511, 128),
        (256, 2, 300, 20, 1024),
        (1024, 2, 511, 64, 2048),
        (4096, 30, 512, 1, 128),
        (1024, 20, 513, 100, 1024),  # 513 are too many: wider ones have to do
    ],
)
def test_budgets_at_the_ends_are_met(solution, d_model, n_layers, E, k, width):
    cfg = relative(d_model, n_layers, E, k, width)
    designed(solution, summed(cfg)["total"], active(cfg), d_model, n_layers)


@task("design")
@pytest.mark.parametrize(
    ("total", "active_", "d_model", "n_layers"),
    [
        (10**10, 10**10, 2048, 24),  # the input embedding does not work
        (10**10, 10**8, 2048, 24),  # attention and head alone are more
        (10**9, 2 * 10**9, 1024, 12),  # more at work than there are
        (10**8, 9 * 10**7, 2048, 24),
        (10**15, 10**10, 2048, 24),
        (5 * 10**13, 3 * 10**9, 2048, 24),
    ],
)
def test_budgets_that_cannot_be_met_are_refused(solution, total, active_, d_model, n_layers):
    mentions = [str(total), str(active_)]
    assert_raises(ValueError, solution.design, total, active_, d_model, n_layers, mentions=mentions)


@task("design")
@pytest.mark.parametrize(
    ("d_model", "n_layers", "E", "k", "width", "more"),
    [
        (1024, 12, 512, 3, 4096 + 128, 0),  # wider than 4 * d_model
        (1024, 12, 512, 3, 5120, 0),
        (256, 60, 2, 2, 128, 0),  # all experts at work
        (256, 60, 2, 0, 128, 0),  # none at work
        (256, 60, 2, 1, 128, 0.015),  # one expert more is 5 % more, and none is 1.5 % less
    ],
)
def test_what_is_not_permitted_is_no_way_out(solution, d_model, n_layers, E, k, width, more):
    cfg = relative(d_model, n_layers, E, k, width)
    total, active_ = round(summed(cfg)["total"] * (1 + more)), active(cfg)
    because = f"only {E} experts of width {width}, {k} per token, would do: no permitted model"
    mentions = [str(total), str(active_)]
    assert_raises(ValueError, solution.design, total, active_, d_model, n_layers, mentions=mentions, because=because)
