"""Day 31: what the tasks promise."""

import contextlib
import json
import math
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from checker.testing import (
    assert_close,
    assert_cost,
    assert_equal,
    assert_raises,
    assert_that,
    cost_case,
    global_rng_untouched,
    measure,
    same_storage,
    task,
    unchanged,
)
from reference import day31_deepseek_integration as ours
from reference.day27_mla_components import LatentCache
from reference.day28_mla_module import MLA
from reference.day29_deepseek_architecture import (
    DeepSeekConfig,
    count_parameters,
    forward_flops,
    kv_cache_bytes,
    yarn_inv_freq,
)
from reference.day30_deepseek_components import MoE

F64 = torch.float64
EXACT = {"rtol": 1e-9, "atol": 1e-9}
GOLDEN = {"rtol": 1e-4, "atol": 1e-4}
MODELS = ["v2_greedy", "v2_groups", "v3"]
SIZES = {
    "vocab_size": 13,
    "hidden_size": 12,
    "intermediate_size": 10,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "kv_lora_rank": 6,
    "qk_nope_head_dim": 5,
    "qk_rope_head_dim": 4,
    "v_head_dim": 3,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 7,
    "first_k_dense_replace": 1,
    "rms_norm_eps": 0.5,
}
V3_ROUTER = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True, "routed_scaling_factor": 2.5}
YARN = {"rope_type": "yarn", "factor": 40, "original_max_position_embeddings": 16, "mscale": 1.0, "mscale_all_dim": 0.5}


def small(**changes):
    """A tiny model with the router of V2 and an eps that cannot be overlooked."""
    return DeepSeekConfig(**{**SIZES, **changes})


def small_v3(**changes):
    """A tiny model with compressed queries, the router of V3 and YaRN with two scales."""
    return small(**{"q_lora_rank": 8, **V3_ROUTER, **YARN, **changes})


def rounded(number):
    """Two digits, so that a known mistake looks the same at every draw."""
    return float(f"{number:.2g}")


def shapes(state):
    return {name: tuple(tensor.shape) for name, tensor in sorted(state.items())}


def mlp_shapes(lead, width, hidden):
    return {
        f"{lead}.gate_proj.weight": (hidden, width),
        f"{lead}.up_proj.weight": (hidden, width),
        f"{lead}.down_proj.weight": (width, hidden),
    }


def layer_shapes(cfg, index, lead=""):
    """The names and shapes of one layer, as the checkpoints have them."""
    D, H, dn, dr = cfg.hidden_size, cfg.num_attention_heads, cfg.qk_nope_head_dim, cfg.qk_rope_head_dim
    dv, r, rq, F = cfg.v_head_dim, cfg.kv_lora_rank, cfg.q_lora_rank, cfg.moe_intermediate_size
    names = {"input_layernorm.weight": (D,), "post_attention_layernorm.weight": (D,)}
    if rq is None:
        names["self_attn.q_proj.weight"] = (H * (dn + dr), D)
    else:
        names["self_attn.q_a_proj.weight"] = (rq, D)
        names["self_attn.q_a_layernorm.weight"] = (rq,)
        names["self_attn.q_b_proj.weight"] = (H * (dn + dr), rq)
    names["self_attn.kv_a_proj_with_mqa.weight"] = (r + dr, D)
    names["self_attn.kv_a_layernorm.weight"] = (r,)
    names["self_attn.kv_b_proj.weight"] = (H * (dn + dv), r)
    names["self_attn.o_proj.weight"] = (D, H * dv)
    if cfg.n_routed_experts is None or index < cfg.first_k_dense_replace:
        names |= mlp_shapes("mlp", D, cfg.intermediate_size)
    else:
        names["mlp.gate.weight"] = (cfg.n_routed_experts, D)
        if cfg.scoring_func == "sigmoid":
            names["mlp.gate.e_score_correction_bias"] = (cfg.n_routed_experts,)
        for e in range(cfg.n_routed_experts):
            names |= mlp_shapes(f"mlp.experts.{e}", D, F)
        if cfg.n_shared_experts:
            names |= mlp_shapes("mlp.shared_experts", D, F * cfg.n_shared_experts)
    return {lead + name: shape for name, shape in names.items()}


def model_shapes(cfg):
    """The names and shapes of a whole published checkpoint."""
    names = {"model.embed_tokens.weight": (cfg.vocab_size, cfg.hidden_size)}
    for i in range(cfg.num_hidden_layers):
        names |= layer_shapes(cfg, i, f"model.layers.{i}.")
    names["model.norm.weight"] = (cfg.hidden_size,)
    names["lm_head.weight"] = (cfg.vocab_size, cfg.hidden_size)
    return names


def draw(wanted, randn, rand):
    """Random tensors with these names and shapes: matrices of variance 1/fan_in, gains around 1."""
    found = {}
    for name, shape in wanted.items():
        if name.endswith("bias"):
            found[name] = 0.5 - 2.0 * rand(*shape)
        elif len(shape) == 1:
            found[name] = 0.5 + rand(*shape)
        elif "embed_tokens" in name:
            found[name] = randn(*shape)
        else:
            found[name] = randn(*shape) * shape[-1] ** -0.5
    return found


@torch.no_grad()
def fill(module, tensors):
    """Copy tensors into a module whose state dict must have just these names."""
    state = module.state_dict()
    assert_equal(sorted(state), sorted(tensors), because="the names in the state dict are those of the checkpoints")
    for name, tensor in tensors.items():
        state[name].copy_(tensor)
    return module


def golden(data_dir, name, device):
    """The config, the weights, and what transformers makes of some tokens."""
    folder = data_dir / name
    cfg = DeepSeekConfig.from_dict(json.loads((folder / "config.json").read_text()))
    weights = load_file(folder / "model.safetensors")
    expected = {key: tensor.to(device) for key, tensor in load_file(folder / "expected.safetensors").items()}
    return cfg, weights, expected


def positions_of(shown):
    """The first token that is shown stands at 0."""
    return (shown.long().cumsum(1) - 1).clamp(min=0)


# compare_logits


@task("compare_logits")
@pytest.mark.parametrize("place", [(0, 0, 0), (1, 2, 3), (0, 4, 6), (1, 0, 5)], ids=str)
def test_the_largest_difference_is_found_wherever_it_is(solution, randn, place):
    expected = randn(2, 5, 7)
    actual = expected.clone()
    actual[place] -= 3.0
    actual[1, 3, 1] += 2.0
    actual[1, 4, 2] += 1.0
    found = solution.compare_logits(actual, expected)
    assert_close(
        found.max_error,
        3.0,
        because=f"one logit, at {place}, is 3 too small, and others are up to 2 too large",
        atol=1e-5,
        rtol=0.0,
    )


@task("compare_logits")
def test_logits_that_are_equal(solution, randn):
    logits = randn(2, 5, 7)
    found = solution.compare_logits(logits.clone(), logits)
    assert_equal(tuple(found), (0.0, 0), because="nothing differs")
    assert_equal([type(x).__name__ for x in found], ["float", "int"], because="a float and an int")
    assert_equal((found.max_error, found.changed), (0.0, 0), because="max_error and changed are the names")


def favorites(device, lead=1.0):
    """Logits (2, 4, 5) in which word t of position t leads by `lead`."""
    logits = torch.full((2, 4, 5), -2.0, device=device)
    for t in range(4):
        logits[:, t, t] += lead
    return logits


@task("compare_logits")
def test_positions_with_another_favorite_are_counted(solution, device):
    expected = favorites(device)
    actual = expected.clone()
    actual[0, 0, 4] = 5.0
    actual[1, 2, 3] = -0.5
    actual[1, 3, 0] = -1.5  # not enough
    found = solution.compare_logits(actual, expected)
    assert_equal(found.changed, 2, because="at two of eight positions another word wins")


@task("compare_logits")
@pytest.mark.parametrize(("margin", "changed"), [(0.5, 1), (0.25, 2), (0.2, 2), (0.0, 2), (1.0, 0)])
def test_a_favorite_in_doubt_does_not_count(solution, device, margin, changed):
    expected = favorites(device)
    expected[0, 1, 1] = -1.5
    actual = expected.clone()
    actual[0, 1, 0] = 9.0
    actual[1, 2, 4] = 9.0
    found = solution.compare_logits(actual, expected, margin=margin)
    assert_equal(found.changed, changed, because=f"leads of 0.5 and 1.0 were lost; only more than {margin} counts")


@task("compare_logits")
def test_the_default_margin_is_a_thousandth(solution, device):
    expected = favorites(device)
    expected[0, 1, 1], expected[1, 0, 0] = -1.9991, -1.9989
    actual = expected.clone()
    actual[0, 1, 2] = actual[1, 0, 2] = -1.99
    found = solution.compare_logits(actual, expected)
    assert_equal(found.changed, 1, because="a lead of 0.0011 was lost, and one of 0.0009 that is in doubt")


@task("compare_logits")
def test_hidden_positions_have_no_say(solution, randn, device):
    expected = randn(2, 5, 7)
    shown = torch.ones(2, 5, dtype=torch.bool, device=device)
    actual = expected.clone()
    actual[1, 1, 2] += 0.125
    expected[1, 1, 0] = actual[1, 1, 0] = 9.0
    plain = solution.compare_logits(actual, expected, shown)
    assert_close(plain.max_error, 0.125, because="everything is shown", atol=1e-5, rtol=0.0)
    shown[0, :2] = False
    actual[0, 0] = torch.nan
    actual[0, 1] = -actual[0, 1] + 50.0
    found = solution.compare_logits(actual, expected, shown)
    assert_close(
        found.max_error, 0.125, because="two positions are hidden, one of them full of NaN", atol=1e-5, rtol=0.0
    )
    assert_equal(found.changed, 0, because="no position that is shown has another favorite")


@task("compare_logits")
def test_nan_is_never_a_small_difference(solution, randn):
    expected = randn(2, 5, 7)
    actual = expected.clone()
    actual[0, 1, 2] = torch.nan
    actual[0, 2, 2] += 2.0
    actual[0, 3, 3] -= 3.0
    found = solution.compare_logits(actual, expected)
    assert_that(math.isnan(found.max_error), "one logit is NaN, so the error is NaN", value=found.max_error)


@task("compare_logits")
def test_nothing_is_rounded_before_it_is_compared(solution, device):
    expected = favorites(device, lead=258.5)
    actual = favorites(device, lead=258.0).bfloat16()
    actual[0, 0, 4] -= 0.25
    found = solution.compare_logits(actual, expected)
    assert_close(found.max_error, 0.5, because="256 in bfloat16 and 256.5 in float32 differ by 0.5")
    both = favorites(device, lead=258.0).bfloat16()
    both[..., 4] = 0.984375
    found = solution.compare_logits(both.flip(-1), both, margin=255.0)
    assert_equal(found.changed, 6, because="256 leads 0.984375 by more than 255, which bfloat16 cannot tell")
    assert_close(found.max_error, 258.0, because="256 and -2, both in bfloat16")
    found = solution.compare_logits(expected.double() + 1e-12, expected.double())
    assert_close(found.max_error, 1e-12, because="float64 tells 1e-12 apart", rtol=0.1, atol=0.0)


@task("compare_logits")
def test_no_position_at_all(solution, randn, device):
    logits = randn(2, 5, 7)
    hidden = torch.zeros(2, 5, dtype=torch.bool, device=device)
    found = solution.compare_logits(logits + 1.0, logits, hidden)
    assert_equal(tuple(found), (0.0, 0), because="everything is hidden")
    assert_equal([type(x).__name__ for x in found], ["float", "int"], because="a float and an int")


@task("compare_logits")
def test_shapes_that_differ_are_refused(solution, randn, device):
    logits = randn(2, 5, 7)
    assert_raises(ValueError, solution.compare_logits, randn(2, 1, 7), logits, mentions=["(2, 1, 7)", "(2, 5, 7)"])
    shown = torch.ones(2, 4, dtype=torch.bool, device=device)
    assert_raises(ValueError, solution.compare_logits, logits, logits, shown, mentions=["(2, 4)", "(2, 5, 7)"])


# DecoderLayer


def layer_of(solution, cfg, index, randn, rand, device):
    """A float64 layer with random weights, and these weights."""
    weights = draw(layer_shapes(cfg, index), randn, rand)
    layer = solution.DecoderLayer(cfg, index).to(device).double()
    return fill(layer, weights), {name: tensor.double() for name, tensor in weights.items()}


def part(weights, lead):
    return {name.removeprefix(lead): tensor for name, tensor in weights.items() if name.startswith(lead)}


def norm(x, gain, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gain


def attention_of(cfg, weights, device):
    """The attention of a layer, its three numbers for positions written out."""
    dn, dr = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim
    stretch = math.log(cfg.factor) if cfg.rope_type == "yarn" else 0.0
    all_dim = 0.1 * cfg.mscale_all_dim * stretch + 1.0
    factor = cfg.factor if cfg.rope_type == "yarn" else 1.0
    mla = MLA(
        cfg.hidden_size,
        cfg.num_attention_heads,
        qk_nope_head_dim=dn,
        qk_rope_head_dim=dr,
        v_head_dim=cfg.v_head_dim,
        kv_lora_rank=cfg.kv_lora_rank,
        q_lora_rank=cfg.q_lora_rank,
        softmax_scale=all_dim**2 / math.sqrt(dn + dr),
        inv_freq=yarn_inv_freq(dr, cfg.rope_theta, factor, cfg.original_max_position_embeddings),
        eps=1e-6,
        rope_scale=(0.1 * cfg.mscale * stretch + 1.0) / all_dim,
    )
    return fill(mla.to(device).double(), part(weights, "self_attn."))


def network_of(cfg, weights, device):
    """The feed-forward network of a layer, as a function."""
    mine = part(weights, "mlp.")
    if "gate.weight" in mine:
        return fill(MoE(cfg).to(device).double(), mine)
    gate, up, down = (mine[f"{name}_proj.weight"] for name in ("gate", "up", "down"))
    return lambda x: (nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


@torch.no_grad()
def layer_oracle(cfg, weights, x, device, **kwargs):
    attention, network = attention_of(cfg, weights, device), network_of(cfg, weights, device)
    eps = cfg.rms_norm_eps
    h = x + attention(norm(x, weights["input_layernorm.weight"], eps), **kwargs)
    return h + network(norm(h, weights["post_attention_layernorm.weight"], eps))


@task("DecoderLayer")
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_layer_does_what_it_does_in_transformers(solution, data_dir, device, name, index):
    cfg, weights, expected = golden(data_dir, name, device)
    layer = fill(solution.DecoderLayer(cfg, index).to(device), part(weights, f"model.layers.{index}."))
    out = layer(expected[f"layer{index}.in"])
    kind = "dense" if index == 0 else "sparse"
    assert_close(out, expected[f"layer{index}.out"], because=f"a {kind} layer of transformers, same weights", **GOLDEN)


@task("DecoderLayer")
@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("style", ["v2", "v3"])
def test_names_and_shapes_of_a_layer(solution, style, index):
    cfg = small(n_shared_experts=2) if style == "v2" else small_v3(first_k_dense_replace=2)
    found = shapes(solution.DecoderLayer(cfg, index).state_dict())
    because = f"layer {index} of a model whose first {cfg.first_k_dense_replace} layers are dense"
    assert_equal(found, dict(sorted(layer_shapes(cfg, index).items())), because=because)


@task("DecoderLayer")
def test_without_experts_every_layer_is_dense(solution):
    cfg = small(n_routed_experts=None, num_experts_per_tok=None, moe_intermediate_size=None)
    names = sorted(solution.DecoderLayer(cfg, 2).state_dict())
    assert_equal(names, sorted(layer_shapes(cfg, 2)), because="n_routed_experts is None")


@task("DecoderLayer")
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("style", ["v2", "v3"])
@torch.no_grad()
def test_two_additions_to_the_raw_stream(solution, randn, rand, device, style, index):
    cfg = small() if style == "v2" else small_v3()
    layer, weights = layer_of(solution, cfg, index, randn, rand, device)
    x = randn(2, 5, 12, dtype=F64)
    expected = layer_oracle(cfg, weights, x, device)
    with unchanged(x):
        out = layer(x)
    assert_close(out, expected, because="h = x + attention(norm(x)), then h + ffn(norm(h)), all in float64", **EXACT)


@task("DecoderLayer")
@pytest.mark.parametrize("index", [0, 1])
@torch.no_grad()
def test_the_eps_of_the_latents_is_not_that_of_the_stream(solution, randn, rand, device, index):
    cfg = small(q_lora_rank=8)
    layer, weights = layer_of(solution, cfg, index, randn, rand, device)
    x = 0.01 * randn(2, 5, 12, dtype=F64)
    expected = layer_oracle(cfg, weights, x, device)
    assert_close(layer(x), expected, because="small numbers: rms_norm_eps is 0.5 in the stream, 1e-6 inside", **EXACT)


@task("DecoderLayer")
@pytest.mark.parametrize(("chunks", "mode"), [([4, 1, 2], "auto"), ([3, 4], "naive"), ([1] * 7, "absorbed")])
@torch.no_grad()
def test_a_layer_goes_on_where_its_cache_ends(solution, randn, rand, device, chunks, mode):
    cfg = small_v3()
    layer, weights = layer_of(solution, cfg, 1, randn, rand, device)
    x = randn(2, 7, 12, dtype=F64)
    expected = layer_oracle(cfg, weights, x, device)
    cache = LatentCache(2, 9, 6, 4, dtype=F64, device=device)
    out = torch.cat([layer(piece, cache=cache, mode=mode) for piece in x.split(chunks, 1)], 1)
    assert_equal(cache.length, 7, because="seven positions are in the cache")
    assert_close(out, expected, because=f"chunks of {chunks} and the whole sequence", **EXACT)


@task("DecoderLayer")
@pytest.mark.parametrize("given", ["mask", "positions", "mask and positions"])
@torch.no_grad()
def test_mask_and_positions_reach_the_attention(solution, randn, rand, device, given):
    cfg = small_v3()
    layer, weights = layer_of(solution, cfg, 0, randn, rand, device)
    x = randn(2, 5, 12, dtype=F64)
    positions = torch.tensor([[0, 7, 30, 31, 80], [3, 4, 9, 10, 50]], device=device)
    mask = torch.ones(2, 1, 1, 5, dtype=torch.bool, device=device)
    mask[0, ..., 1] = False
    kwargs = {name: value for name, value in (("mask", mask), ("positions", positions)) if name in given}
    expected = layer_oracle(cfg, weights, x, device, **kwargs)
    assert_close(layer(x, **kwargs), expected, because=f"with {given}", **EXACT)


@task("DecoderLayer")
@torch.no_grad()
def test_the_mode_reaches_the_attention(solution, randn, rand, device):
    cfg = small()
    layer, _ = layer_of(solution, cfg, 0, randn, rand, device)
    x = randn(1, 5, 12, dtype=F64)
    dense = 6 * 5 * 12 * 10
    for mode in ("naive", "absorbed"):
        one = small(num_hidden_layers=1, vocab_size=2)
        flops = forward_flops(one, 5, 0, mode) - 2 * 5 * 12 * 2
        assert flops > dense
        assert_cost(layer, x, mode=mode, flops=flops, because=f"the FLOPs of a dense layer, {mode}")
    assert_raises(ValueError, layer, x, mode="quick", mentions=["quick"], because="the attention knows no such mode")


@task("DecoderLayer")
def test_a_layer_without_a_latent_is_refused(solution):
    solution.DecoderLayer(small(), 0)
    cfg = small(kv_lora_rank=None, num_attention_heads=2)
    assert_raises(ValueError, solution.DecoderLayer, cfg, 0, mentions=["kv_lora_rank"])


@task("DecoderLayer")
@torch.no_grad()
def test_a_layer_in_bfloat16_stays_there(solution, randn, rand, device):
    cfg = small()
    layer = fill(solution.DecoderLayer(cfg, 1).to(device), draw(layer_shapes(cfg, 1), randn, rand)).bfloat16()
    assert_equal(str(layer(randn(2, 3, 12).bfloat16()).dtype), "torch.bfloat16", because="the dtype of x")


# DeepSeekForCausalLM


def model_of(solution, cfg, randn, rand, device):
    """A float64 model with random weights."""
    model = solution.DeepSeekForCausalLM(cfg).to(device).double()
    return fill(model, draw(model_shapes(cfg), randn, rand))


@task("DeepSeekForCausalLM")
@pytest.mark.parametrize("style", ["v2", "v3", "dense"])
def test_a_model_has_the_tensors_of_its_checkpoint(solution, style):
    cfg = {"v2": small(n_shared_experts=2), "v3": small_v3(), "dense": small(first_k_dense_replace=3)}[style]
    model = solution.DeepSeekForCausalLM(cfg)
    assert_equal(
        shapes(model.state_dict()),
        dict(sorted(model_shapes(cfg).items())),
        because="the names and shapes of the checkpoints",
    )
    counts = count_parameters(cfg)
    total = sum(tensor.numel() for tensor in model.parameters())
    assert_equal(total, counts["total"], because="as many parameters as day 29 counts")
    buffers = sum(tensor.numel() for tensor in model.state_dict().values()) - total
    assert_equal(buffers, counts["buffers"], because="and the biases of the routers")
    assert_that(model.cfg is cfg, "the configuration is kept as cfg")


@task("DeepSeekForCausalLM")
@pytest.mark.parametrize("mode", ["naive", "absorbed", "auto"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits_are_those_of_transformers(solution, data_dir, device, name, mode):
    cfg, weights, expected = golden(data_dir, name, device)
    model = fill(solution.DeepSeekForCausalLM(cfg).to(device), weights)
    logits = model(expected["tokens"], mode=mode)
    assert_close(logits, expected["logits"], because=f"transformers with the same weights, mode {mode}", **GOLDEN)
    assert_equal(logits.argmax(-1), expected["logits"].argmax(-1), because="the same favorites everywhere")


@task("DeepSeekForCausalLM")
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_padded_batch(solution, data_dir, device, name):
    cfg, weights, expected = golden(data_dir, name, device)
    model = fill(solution.DeepSeekForCausalLM(cfg).to(device), weights)
    shown = expected["shown"]
    logits = model(expected["tokens"], mask=shown[:, None, None], positions=positions_of(shown))
    because = "row 0 is padded on the left: hidden keys, and positions that begin behind the padding"
    assert_close(logits[shown], expected["padded"][shown], because=because, **GOLDEN)


@task("DeepSeekForCausalLM")
@pytest.mark.parametrize(("chunks", "mode"), [([5, 1, 6], "auto"), ([1] * 12, "absorbed"), ([4, 8], "naive")])
@torch.no_grad()
def test_decoding_with_caches(solution, data_dir, device, chunks, mode):
    cfg, weights, expected = golden(data_dir, "v3", device)
    model = fill(solution.DeepSeekForCausalLM(cfg).to(device), weights)
    caches = model.new_caches(2, 12)
    logits = [model(piece, caches=caches, mode=mode) for piece in expected["tokens"].split(chunks, 1)]
    assert_equal([cache.length for cache in caches], [12, 12], because="each layer has a cache with all positions")
    assert_close(torch.cat(logits, 1), expected["logits"], because=f"chunks of {chunks}, mode {mode}", **GOLDEN)


@task("DeepSeekForCausalLM")
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_greedy_tokens_are_those_of_transformers(solution, data_dir, device, name):
    cfg, weights, expected = golden(data_dir, name, device)
    model = fill(solution.DeepSeekForCausalLM(cfg).to(device), weights)
    tokens, caches = expected["greedy"][:, :6], model.new_caches(2, 12)
    found = tokens
    for _ in range(6):
        tokens = model(tokens, caches=caches, last_only=True).argmax(-1)
        found = torch.cat((found, tokens), 1)
    assert_equal(found, expected["greedy"], because="six tokens, the most likely one each time")


@task("DeepSeekForCausalLM")
@pytest.mark.parametrize("apart", [False, True], ids=["in a row", "far apart"])
@torch.no_grad()
def test_layer_after_layer(solution, randn, rand, randint, device, apart):
    cfg = small_v3()
    positions = torch.tensor([[0, 7, 30, 31, 80], [3, 4, 9, 10, 50]], device=device) if apart else None
    model = model_of(solution, cfg, randn, rand, device)
    tokens = randint(0, 13, (2, 5))
    state = model.state_dict()
    x = state["model.embed_tokens.weight"][tokens]
    for i in range(3):
        weights = part(state, f"model.layers.{i}.")
        x = layer_oracle(cfg, weights, x, device, positions=positions)
    expected = norm(x, state["model.norm.weight"], 0.5) @ state["lm_head.weight"].T
    because = f"embedding, three layers, norm with eps 0.5, head; tokens {'far apart' if apart else 'in a row'}"
    assert_close(model(tokens, positions=positions), expected, because=because, **EXACT)


@task("DeepSeekForCausalLM")
def test_nothing_comes_from_the_future(solution, randn, rand, randperm, device):
    model = model_of(solution, small_v3(), randn, rand, device)
    tokens = randperm(13)[None, :6]
    model(tokens)[:, 3].square().sum().backward()
    sizes = model.model.embed_tokens.weight.grad[tokens[0]].abs().sum(-1)
    assert_equal(
        (sizes > 0).tolist(), [True] * 4 + [False] * 2, because="which tokens the logits at position 3 depend on"
    )


@task("DeepSeekForCausalLM")
@pytest.mark.parametrize("T", [1, 5])
@torch.no_grad()
def test_last_only_is_the_last_position(solution, randn, rand, randint, device, T):
    model = model_of(solution, small_v3(), randn, rand, device)
    tokens = randint(0, 13, (2, T))
    expected, full = measure(model, tokens)
    saved = 2 * 2 * 12 * 13 * (T - 1)
    out = assert_cost(
        model, tokens, last_only=True, flops=full.flops - saved, because="the head works on one position of each row"
    )
    assert_close(out, expected[:, -1:], because="the last position of all", **EXACT)


@task("DeepSeekForCausalLM")
@pytest.mark.parametrize(("t", "context"), [(6, 0), (1, 6), (2, 3)])
@pytest.mark.parametrize("mode", ["naive", "absorbed", "auto"])
@torch.no_grad()
def test_the_flops_are_those_predicted(solution, randn, rand, randint, device, t, context, mode):
    cfg = small_v3()
    model = model_of(solution, cfg, randn, rand, device)
    tokens = randint(0, 13, (2, context + t))
    caches = None
    if context:
        caches = model.new_caches(2, context + t)
        model(tokens[:, :context], caches=caches)
    _, cost = measure(model, tokens[:, context:], caches=caches, mode=mode)
    least = 2 * forward_flops(cfg, t, context, mode)
    most = least + 2 * (2 * t) * 2 * 2 * 12  # two sparse layers, 2t tokens, two experts each, width 12
    because = f"{t} tokens after {context}, {mode}: day 29 predicts {least} FLOPs"
    assert_that(least <= cost.flops <= most, because, value=cost.flops)


@task("DeepSeekForCausalLM")
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, F64], ids=str)
def test_new_caches_fit_the_model(solution, device, kind):
    cfg = small_v3()
    model = solution.DeepSeekForCausalLM(cfg).to(device).to(kind)
    caches = model.new_caches(4, 9)
    assert_equal(len(caches), 3, because="one for each of three layers")
    found = [tuple(cache.latents.shape) + tuple(cache.keys.shape) for cache in caches]
    assert_equal(found, [(4, 9, 6, 4, 9, 4)] * 3, because="latents (4, 9, 6) and keys (4, 9, 4)")
    total = sum(cache.nbytes for cache in caches)
    assert_equal(total, kv_cache_bytes(cfg, 4, 9, kind.itemsize), because=f"the bytes of day 29, in {kind}")
    assert_that(caches[0].latents.device.type == device.type, "where the model is")
    assert_that(not same_storage(caches[0].latents, caches[1].latents), "no two caches share memory")


@task("DeepSeekForCausalLM")
def test_new_caches_of_another_dtype_and_device(solution):
    model = solution.DeepSeekForCausalLM(small())
    cache = model.new_caches(1, 3, torch.float16)[2]
    assert_equal(str(cache.latents.dtype), "torch.float16", because="float16 was asked for, in a float32 model")
    cache = model.new_caches(1, 3, device="meta")[0]
    assert_equal(cache.keys.device.type, "meta", because="the device was given")


@task("DeepSeekForCausalLM")
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_bfloat16_is_close_and_the_logits_are_float32(solution, data_dir, device, name):
    cfg, weights, expected = golden(data_dir, name, device)
    model = fill(solution.DeepSeekForCausalLM(cfg).to(device).bfloat16(), weights)
    logits = model(expected["tokens"])
    assert_equal(str(logits.dtype), "torch.float32", because="logits of a bfloat16 model")
    error = ((logits - expected["logits"]).norm() / expected["logits"].norm()).item()
    assert_that(error <= 3e-2, "root mean square of the difference, relative to the logits", value=rounded(error))


@task("DeepSeekForCausalLM")
@torch.no_grad()
def test_logits_of_a_float64_model_are_float64(solution, randn, rand, randint, device):
    logits = model_of(solution, small(), randn, rand, device)(randint(0, 13, (2, 3)))
    assert_equal(str(logits.dtype), "torch.float64", because="a float64 model")


@task("DeepSeekForCausalLM")
@pytest.mark.parametrize("cast", ["bfloat16", "half", "double", "to"])
@torch.no_grad()
def test_router_biases_are_never_cast(solution, rand, device, cast):
    model = solution.DeepSeekForCausalLM(small_v3()).to(device)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    bias = rand(4) + 1.0
    model.state_dict()[name].copy_(bias)
    result = model.to(torch.bfloat16) if cast == "to" else getattr(model, cast)()
    assert_that(result is model, "the model itself comes back")
    assert_equal(model.state_dict()[name], bias, because=f"after {cast} the bias has all its bits")
    wanted = {"double": "torch.float64", "half": "torch.float16"}.get(cast, "torch.bfloat16")
    found = [str(model.state_dict()[other].dtype) for other in ("lm_head.weight", "model.layers.1.mlp.gate.weight")]
    assert_equal(found, [wanted] * 2, because="everything else is cast")


@task("DeepSeekForCausalLM")
def test_router_biases_move_with_the_model(solution):
    model = solution.DeepSeekForCausalLM(small_v3()).to("meta")
    devices = {tensor.device.type for tensor in model.state_dict().values()}
    assert_equal(devices, {"meta"}, because="the whole model was moved")


@task("DeepSeekForCausalLM")
def test_head_and_embedding_are_two_tensors(solution):
    model = solution.DeepSeekForCausalLM(small())
    state = model.state_dict()
    one, two = state["model.embed_tokens.weight"], state["lm_head.weight"]
    assert_that(not same_storage(one, two), "the head is a matrix of its own")
    tied = small(tie_word_embeddings=True)
    assert_raises(ValueError, solution.DeepSeekForCausalLM, tied, mentions=["tie_word_embeddings"])


@task("DeepSeekForCausalLM")
@torch.no_grad()
def test_tokens_and_caches_that_do_not_fit(solution, randint):
    model = solution.DeepSeekForCausalLM(small())
    tokens = randint(0, 13, (2, 5)).cpu()
    model(tokens)
    assert_raises(ValueError, model, tokens[0], mentions=["(5,)"])
    assert_raises(ValueError, model, tokens[None], mentions=["(1, 2, 5)"])
    caches = model.new_caches(2, 5)
    assert_raises(ValueError, model, tokens, caches=caches[:2], mentions=["2", "3"])
    assert_raises(ValueError, model, tokens, caches=[], mentions=["0", "3"])
    assert_raises(ValueError, model, tokens, mode="quick", mentions=["quick"])


@cost_case("DeepSeekForCausalLM")
def model_cost(module, randn, randint):
    cfg = small_v3(vocab_size=101)
    model = module.DeepSeekForCausalLM(cfg)
    tokens = randint(0, 101, (2, 16)).cpu()

    def decode():
        with torch.no_grad():
            caches = model.new_caches(2, 16)
            model(tokens[:, :15], caches=caches, last_only=True)
            model(tokens[:, 15:], caches=caches, last_only=True)

    return decode


# map_keys


def is_skip(found):
    """Whether this is a Skip that says why."""
    return not isinstance(found, str) and len(getattr(found, "why", "")) > 0


def first_difference(found, expected):
    """Where two dicts differ first, or None."""
    for key in expected:
        if key not in found or found[key] != expected[key]:
            return key, str(found.get(key))
    return next(((key, "not expected") for key in found if key not in expected), None)


@task("map_keys")
@pytest.mark.parametrize("style", ["v2", "v3"])
def test_the_names_of_a_checkpoint_feed_themselves(solution, style):
    cfg = small(n_shared_experts=2) if style == "v2" else small_v3()
    names = list(model_shapes(cfg))
    found = solution.map_keys(names, cfg)
    assert_equal(found, {name: name for name in names}, because="model and checkpoint agree about names")


@task("map_keys")
@pytest.mark.parametrize("which", ["v2_lite", "v2", "v3"])
def test_the_published_models(solution, which):
    cfg = getattr(DeepSeekConfig, which)()
    names = list(model_shapes(cfg))
    counts = {"v2_lite": 5_291, "v2": 29_102, "v3": 45_395}
    assert len(names) == counts[which], len(names)
    names.append(f"model.layers.{cfg.num_hidden_layers}.eh_proj.weight")
    found = solution.map_keys(iter(names), cfg)
    extra = found.pop(names.pop(), None)
    assert_that(is_skip(extra), "the layer after the last is skipped", value=str(extra))
    wrong = first_difference(found, {name: name for name in names})
    assert_that(wrong is None, f"all {len(names)} tensors feed themselves", value=wrong)


@task("map_keys")
def test_layers_that_predict_further_ahead_are_skipped(solution):
    cfg = small_v3()
    extra = [f"model.layers.3.{name}" for name in ("enorm.weight", "eh_proj.weight", "shared_head.head.weight")]
    extra += [
        "model.layers.3.mlp.experts.0.up_proj.weight",
        "model.layers.10.embed_tokens.weight",
        "layers.20.hnorm.weight",
    ]
    names = list(model_shapes(cfg))
    found = solution.map_keys([extra[4], *extra[:3], *names, extra[3], extra[5]], cfg)
    for name in extra:
        assert_that(
            is_skip(found.get(name)), f"{name}: there are 3 layers; a Skip says why", value=str(found.get(name))
        )
    assert_equal([found[name] for name in names], names, because="all others feed themselves")
    assert_equal(len(found), len(names) + len(extra), because="each name has an entry")


@task("map_keys")
def test_layer_ten_is_beyond_layer_three(solution):
    cfg = small()
    extra = ["model.layers.3.hnorm.weight", "model.layers.10.embed_tokens.weight", "layers.20.hnorm.weight"]
    found = solution.map_keys([*extra, *model_shapes(cfg)], cfg)
    for name in extra:
        assert_that(is_skip(found.get(name)), f"{name}: there are 3 layers", value=str(found.get(name)))


@task("map_keys")
def test_old_frequencies_are_skipped(solution):
    cfg = small()
    extra = [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.inv_freq",
        "layers.2.self_attn.rotary_emb.inv_freq",
    ]
    names = list(model_shapes(cfg))
    found = solution.map_keys([*names, *extra], cfg)
    for name in extra:
        assert_that(is_skip(found.get(name)), f"{name} follows from cfg; a Skip says why", value=str(found.get(name)))
    other = "model.layers.0.self_attn.inv_freq.weight"
    assert_raises(ValueError, solution.map_keys, [*names, other], cfg, mentions=[other])


@task("map_keys")
def test_a_checkpoint_of_the_bare_model(solution):
    cfg = small_v3()
    names = {name.removeprefix("model."): name for name in model_shapes(cfg)}
    found = solution.map_keys(names, cfg)
    assert_equal(found, names, because='"model." is put in front of all but the head')


@task("map_keys")
@pytest.mark.parametrize(
    ("style", "name"),
    [
        ("v2", "model.layers.1.mlp.experts.4.up_proj.weight"),
        ("v2", "model.layers.1.mlp.experts.gate_up_proj"),
        ("v2", "model.layers.1.mlp.gate.e_score_correction_bias"),
        ("v2", "model.layers.0.mlp.gate.weight"),
        ("v2", "model.layers.0.self_attn.q_a_proj.weight"),
        ("v2", "lm_head.bias"),
        ("v3", "model.layers.0.self_attn.q_proj.weight"),
        ("v3", "model.layers.0.mlp.gate_proj.weight_scale_inv"),
        ("v3", "model.layers.2.mlp.up_proj.weight"),
        ("v3", "model.layers.2.self_attn.k_proj.weight"),
        ("none", "model.layers.2.mlp.shared_experts.up_proj.weight"),
        ("v3", "transformer.wte.weight"),
    ],
)
def test_a_name_that_feeds_nothing_is_refused(solution, style, name):
    cfg = {"v2": small(), "v3": small_v3(), "none": small(n_shared_experts=0)}[style]
    names = list(model_shapes(cfg))
    solution.map_keys(names, cfg)
    assert_raises(ValueError, solution.map_keys, [*names, name], cfg, mentions=[name])


@task("map_keys")
@pytest.mark.parametrize("style", ["v2", "v3"])
def test_every_tensor_that_is_missing_is_named(solution, style):
    cfg = small() if style == "v2" else small_v3()
    names = list(model_shapes(cfg))
    for name in names:
        others = [other for other in names if other != name]
        assert_raises(ValueError, solution.map_keys, others, cfg, mentions=[name], because=f"without {name}")
    gone = [
        "model.layers.2.mlp.experts.3.down_proj.weight",
        "model.norm.weight",
        "model.layers.1.self_attn.o_proj.weight",
    ]
    others = [name for name in names if name not in gone]
    assert_raises(ValueError, solution.map_keys, others, cfg, mentions=gone, because="three are missing")


@task("map_keys")
def test_two_names_for_one_tensor_are_refused(solution):
    cfg = small()
    names = list(model_shapes(cfg))
    for twin in ("layers.1.mlp.experts.0.up_proj.weight", "norm.weight"):
        both = [twin, f"model.{twin}"]
        assert_raises(ValueError, solution.map_keys, [*names, twin], cfg, mentions=both)


@task("map_keys")
def test_no_tensor_is_made(solution):
    cfg = small_v3()
    names = list(model_shapes(cfg))
    assert_cost(solution.map_keys, names, cfg, max_calls=0, because="names follow from the configuration by rule")


# read_checkpoint


def some_tensors(randn, rand):
    """Three tensors in three dtypes, on the CPU."""
    return {
        "a.weight": randn(3, 4).cpu().bfloat16(),
        "b.bias": rand(5).cpu(),
        "c.ids": (rand(2, 2).cpu() * 100).to(torch.int64),
    }


def save_shards(folder, *shards, index=None):
    """Write files of tensors, and an index that says where they are."""
    weight_map = {}
    for number, tensors in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map | (index or {})}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def assert_same_tensors(found, expected, because):
    assert_equal(sorted(found), sorted(expected), because=f"{because}: the names")
    for name, tensor in expected.items():
        assert_equal(found[name], tensor, because=f"{because}: {name}")


@task("read_checkpoint")
@pytest.mark.parametrize("kind", [str, lambda path: path], ids=["str", "Path"])
def test_a_single_file(solution, randn, rand, tmp_path, kind):
    tensors = some_tensors(randn, rand)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    save_file({"other": torch.ones(2)}, tmp_path / "expected.safetensors")
    assert_same_tensors(solution.read_checkpoint(kind(tmp_path)), tensors, "model.safetensors alone")


@task("read_checkpoint")
def test_shards_and_an_index(solution, randn, rand, tmp_path):
    first, second = some_tensors(randn, rand), {"d": rand(2).cpu(), "e": rand(3).cpu()}
    save_shards(tmp_path, first, second)
    assert_same_tensors(solution.read_checkpoint(tmp_path), first | second, "two files")
    save_file({"a.weight": torch.ones(1)}, tmp_path / "model.safetensors")
    save_file({"f": torch.ones(1)}, tmp_path / "model-00003-of-00003.safetensors")
    assert_same_tensors(solution.read_checkpoint(tmp_path), first | second, "two files, and two that nobody named")


@task("read_checkpoint")
def test_a_folder_without_a_checkpoint(solution, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    wanted = ["model.safetensors", "model.safetensors.index.json"]
    assert_raises(ValueError, solution.read_checkpoint, tmp_path, mentions=wanted)


@task("read_checkpoint")
def test_a_shard_that_is_missing(solution, randn, rand, tmp_path):
    save_shards(tmp_path, some_tensors(randn, rand), {"d": rand(2).cpu()})
    solution.read_checkpoint(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    assert_raises(ValueError, solution.read_checkpoint, tmp_path, mentions=["model-00002-of-00002.safetensors"])


@task("read_checkpoint")
def test_a_tensor_in_two_shards(solution, randn, rand, tmp_path):
    tensors = some_tensors(randn, rand)
    save_shards(tmp_path, tensors, {"b.bias": tensors["b.bias"].clone(), "d": rand(2).cpu()})
    wanted = ["b.bias", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert_raises(ValueError, solution.read_checkpoint, tmp_path, mentions=wanted)


@task("read_checkpoint")
def test_an_index_that_promises_too_much(solution, randn, rand, tmp_path):
    file = "model-00001-of-00002.safetensors"
    save_shards(tmp_path, some_tensors(randn, rand), {"d": rand(2).cpu()}, index={"lost.weight": file})
    assert_raises(ValueError, solution.read_checkpoint, tmp_path, mentions=["lost.weight"])
    second = {"moved.weight": rand(2).cpu(), "e": rand(2).cpu()}
    save_shards(tmp_path, some_tensors(randn, rand), second, index={"moved.weight": file})
    because = "the index names the first file, and the tensor is in the second"
    assert_raises(ValueError, solution.read_checkpoint, tmp_path, mentions=["moved.weight"], because=because)


@task("read_checkpoint")
def test_an_index_that_knows_too_little(solution, randn, rand, tmp_path):
    save_shards(tmp_path, some_tensors(randn, rand))
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["b.bias"]
    path.write_text(json.dumps(index))
    assert_raises(ValueError, solution.read_checkpoint, tmp_path, mentions=["b.bias"])


@task("read_checkpoint")
def test_a_file_that_is_cut_off(solution, randn, rand, tmp_path):
    save_file(some_tensors(randn, rand), tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    for size in (len(whole) - 1, 20, 3, 0):
        (tmp_path / "model.safetensors").write_bytes(whole[:size])
        because = f"{size} of {len(whole)} bytes"
        assert_raises(ValueError, solution.read_checkpoint, tmp_path, mentions=["model.safetensors"], because=because)


# load_pretrained


def checkpoint_of(cfg, randn, rand):
    """Random tensors on the CPU, laid out as in published files: bfloat16, and float32 for biases."""
    tensors = draw(model_shapes(cfg), randn, rand)
    return {name: (x if name.endswith("bias") else x.bfloat16()).cpu() for name, x in tensors.items()}


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_untouched(model, before, because):
    for name, tensor in model.state_dict().items():
        assert_equal(tensor, before[name], because=f"{because}: {name} must be as it was")


@task("load_pretrained")
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
def test_every_tensor_arrives(solution, randn, rand, device, kind):
    cfg = small_v3()
    model = ours.DeepSeekForCausalLM(cfg).to(device).to(kind)
    tensors = checkpoint_of(cfg, randn, rand)
    report = solution.load_pretrained(model, tensors)
    for name, tensor in model.state_dict().items():
        assert_equal(tensor, tensors[name].to(tensor), because=f"{name}, in a model of {kind}")
    assert_equal(sorted(report.loaded), sorted(tensors), because="loaded")
    left = (report.missing, report.unexpected, report.mismatched)
    assert_equal(left, ([], [], []), because="missing, unexpected, mismatched")


@task("load_pretrained")
def test_biases_of_routers_keep_all_their_bits(solution, randn, rand, device):
    cfg = small_v3()
    model = ours.DeepSeekForCausalLM(cfg).to(device).bfloat16()
    tensors = checkpoint_of(cfg, randn, rand)
    solution.load_pretrained(model, tensors)
    name = "model.layers.2.mlp.gate.e_score_correction_bias"
    assert_equal(model.state_dict()[name], tensors[name], because="float32 in the file, float32 in the bfloat16 model")


@task("load_pretrained")
def test_float32_weights_are_rounded_once(solution, randn, rand, device):
    cfg = small()
    model = ours.DeepSeekForCausalLM(cfg).to(device).bfloat16()
    tensors = {name: tensor.cpu() for name, tensor in draw(model_shapes(cfg), randn, rand).items()}
    solution.load_pretrained(model, tensors)
    weight = model.lm_head.weight.detach()
    assert_equal(weight, tensors["lm_head.weight"].bfloat16(), because="a float32 file in a bfloat16 model")


@task("load_pretrained")
def test_what_is_skipped_is_reported(solution, randn, rand, device):
    cfg = small_v3()
    tensors = checkpoint_of(cfg, randn, rand)
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    extra = {
        "layers.3.enorm.weight": rand(12).cpu(),
        "model.layers.3.mlp.gate.weight": rand(4, 12).cpu(),
        "layers.0.self_attn.rotary_emb.inv_freq": rand(2).cpu(),
    }
    model = ours.DeepSeekForCausalLM(cfg).to(device)
    report = solution.load_pretrained(model, bare | extra)
    assert_equal(sorted(report.unexpected), sorted(extra), because="unexpected names what was left out")
    assert_equal(sorted(report.loaded), sorted(tensors), because="loaded has the names of the model")
    for name, tensor in model.state_dict().items():
        assert_equal(tensor, tensors[name].float(), because=f"{name} of a checkpoint without model. in front")


@task("load_pretrained")
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.experts.2.gate_proj.weight",
        "model.layers.0.self_attn.kv_b_proj.weight",
        "lm_head.weight",
        "model.layers.2.mlp.gate.weight",
    ],
)
def test_a_transposed_tensor_stops_everything(solution, randn, rand, name):
    cfg = small_v3()
    model = ours.DeepSeekForCausalLM(cfg)
    tensors = checkpoint_of(cfg, randn, rand)
    tensors[name] = tensors[name].T.contiguous()
    before = snapshot(model)
    wanted = [name, str(tuple(tensors[name].shape)), str(tuple(tensors[name].T.shape))]
    with contextlib.suppress(ValueError):
        solution.load_pretrained(model, tensors)
    same = torch.equal(model.state_dict()[name], before[name])
    assert_that(same, f"{name} lies on its side in the checkpoint, and was loaded", value=same)
    assert_raises(ValueError, solution.load_pretrained, model, tensors, mentions=wanted)
    assert_untouched(model, before, f"{name} was refused")


@task("load_pretrained")
@pytest.mark.parametrize("change", ["missing", "unknown", "twice"])
def test_a_wrong_set_of_names_stops_everything(solution, randn, rand, change):
    cfg = small()
    model = ours.DeepSeekForCausalLM(cfg)
    tensors = checkpoint_of(cfg, randn, rand)
    if change == "missing":
        name = "model.layers.2.mlp.experts.3.down_proj.weight"
        del tensors[name]
    else:
        number = "layers.1.mlp.experts.3" if change == "twice" else "model.layers.1.mlp.experts.4"
        name = f"{number}.up_proj.weight"
        tensors[name] = rand(7, 12).cpu()
    before = snapshot(model)
    assert_raises(ValueError, solution.load_pretrained, model, tensors, mentions=[name])
    assert_untouched(model, before, f"{name} is {change}")


@task("load_pretrained")
def test_parameters_stay_the_same_objects(solution, randn, rand, device):
    cfg = small_v3()
    model = ours.DeepSeekForCausalLM(cfg).to(device)
    model.lm_head.weight.requires_grad_(False)
    tensors = {name: tensor.to(device).float() for name, tensor in checkpoint_of(cfg, randn, rand).items()}
    before = {name: (tensor, tensor.data_ptr()) for name, tensor in model.named_parameters()}
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    solution.load_pretrained(model, tensors)
    for name, tensor in model.named_parameters():
        same = tensor is before[name][0] and tensor.data_ptr() == before[name][1]
        assert_that(same, f"{name} must be filled in place: an optimizer may hold it")
        assert_equal(tensor.requires_grad, name != "lm_head.weight", because=f"{name} needs a gradient as before")
        assert_that(tensor.is_leaf, f"{name} must not have a history")
    for name, tensor in model.state_dict().items():
        assert_that(not same_storage(tensor, tensors[name]), f"{name} must not share memory with the checkpoint")
        assert_equal(tensors[name], copies[name], because="the checkpoint is not changed")


@task("load_pretrained")
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
def test_loading_needs_hardly_any_memory(solution, randn, rand, device, kind):
    cfg = small_v3()
    model = ours.DeepSeekForCausalLM(cfg).to(device).to(kind)
    tensors = checkpoint_of(cfg, randn, rand)
    largest = max(tensor.nbytes for tensor in model.state_dict().values())
    because = f"the largest tensor of the model takes {largest} bytes"
    assert_cost(solution.load_pretrained, model, tensors, max_peak_bytes=largest, because=because)


@cost_case("load_pretrained")
def load_cost(module, randn, rand):
    cfg = small_v3()
    model, tensors = ours.DeepSeekForCausalLM(cfg), checkpoint_of(cfg, randn, rand)
    return lambda: module.load_pretrained(model, tensors)


# init_weights_


class Some(nn.Module):
    """A module of a few layers, registered in the order of `names`."""

    def __init__(self, names=("out", "gate", "norm", "table", "side")):
        super().__init__()
        for name in names:
            if name == "norm":
                self.norm = nn.Module()
                self.norm.weight = nn.Parameter(torch.randn(9))
            elif name == "table":
                self.table = nn.Embedding(300, 90)
            elif name == "gate":
                self.gate = nn.Linear(200, 150, bias=False)
                self.gate.register_buffer("e_score_correction_bias", torch.ones(5))
            else:
                setattr(self, name, nn.Linear(200, 150))
        self.register_buffer("inv_freq", torch.full((3,), 7.0), persistent=False)


MATRICES = ["gate.weight", "out.weight", "side.weight", "table.weight"]


@task("init_weights_")
@pytest.mark.parametrize("std", [0.02, 0.5])
@pytest.mark.parametrize("name", MATRICES)
def test_matrices_are_normal_with_the_spread_asked_for(solution, generator, device, name, std):
    model = Some().to(device)
    solution.init_weights_(model, std, generator=generator)
    x = model.state_dict()[name] / std
    spread = x.std().item()
    assert_that(abs(spread - 1.0) < 0.04, f"the spread of {name}, in units of {std}", value=rounded(spread))
    mean = x.mean().item()
    assert_that(abs(mean) < 0.05, f"the mean of {name}, in units of {std}", value=rounded(mean))
    tail = (x.abs() > 2.0).float().mean().item()
    because = f"4.6 percent of a normal {name} lie beyond two spreads"
    assert_that(abs(tail - 0.0455) < 0.013, because, value=rounded(tail))


@task("init_weights_")
@pytest.mark.parametrize("name", ["norm.weight", "out.bias", "gate.e_score_correction_bias"])
def test_norms_become_ones_and_biases_zeros(solution, generator, device, name):
    model = Some().to(device)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(3.0)
    solution.init_weights_(model, 0.1, generator=generator)
    found = model.state_dict()[name]
    expected = torch.ones_like(found) if name == "norm.weight" else torch.zeros_like(found)
    assert_equal(found, expected, because=f"{name} had other numbers before")


@task("init_weights_")
@torch.no_grad()
def test_a_whole_deepseek_model(solution, generator, device):
    model = ours.DeepSeekForCausalLM(small_v3()).to(device)
    for tensor in model.state_dict().values():
        tensor.fill_(3.0)
    frequencies = model.model.layers[0].self_attn.inv_freq.clone()
    assert_equal(solution.init_weights_(model, 0.02, generator=generator), None, because="it fills in place")
    for name, tensor in model.state_dict().items():
        if tensor.dim() == 1:
            wanted = 0.0 if name.endswith("bias") else 1.0
            assert_equal(tensor, torch.full_like(tensor, wanted), because=name)
        else:
            assert_that(0.0 < tensor.abs().max().item() < 0.2, f"{name} is random and small", value=tensor.abs().max())
    assert_equal(model.model.layers[0].self_attn.inv_freq, frequencies, because="frequencies are not in the state dict")


@task("init_weights_")
def test_the_seed_decides(solution, device, seed):
    states = []
    for number in (seed, seed, seed + 1):
        model = Some().to(device)
        solution.init_weights_(model, 0.1, generator=torch.Generator().manual_seed(number))
        states.append(model.state_dict())
    for name in MATRICES:
        assert_equal(states[0][name], states[1][name], because=f"{name}: the same seed twice")
        same = torch.equal(states[0][name], states[2][name])
        assert_that(not same, f"{name}: another seed, other numbers")
    for one, two in (("out", "side"), ("out", "gate")):
        a, b = (states[0][f"{key}.weight"].flatten() for key in (one, two))
        together = (a @ b / (a.norm() * b.norm())).item()
        because = f"{one} and {two} are of one shape, and independent"
        assert_that(abs(together) < 0.05, because, value=rounded(together))


@task("init_weights_")
def test_the_order_of_registration_does_not_matter(solution, device, seed):
    states = []
    for names in (("out", "gate", "norm", "table", "side"), ("table", "side", "out", "norm", "gate")):
        model = Some(names).to(device)
        solution.init_weights_(model, 0.1, generator=torch.Generator().manual_seed(seed))
        states.append(model.state_dict())
    for name in MATRICES:
        assert_equal(states[1][name], states[0][name], because=f"{name}: registered in another order")


@task("init_weights_")
def test_parameters_are_filled_in_place_by_the_generator_alone(solution, generator, device):
    model = Some().to(device)
    model.side.weight.requires_grad_(False)
    before = dict(model.named_parameters())
    with global_rng_untouched():
        solution.init_weights_(model, 0.1, generator=generator)
    for name, tensor in model.named_parameters():
        assert_that(tensor is before[name] and tensor.is_leaf, f"{name} must stay the same parameter")
        assert_equal(tensor.requires_grad, name != "side.weight", because=f"{name} needs a gradient as before")
    assert_equal(model.inv_freq, torch.full((3,), 7.0), because="inv_freq is not in the state dict")


@task("init_weights_")
def test_a_bfloat16_model(solution, generator, device):
    model = Some().to(device).bfloat16()
    solution.init_weights_(model, 0.1, generator=generator)
    weight = model.out.weight.detach()
    assert_equal(str(weight.dtype), "torch.bfloat16", because="the dtype stays")
    spread = weight.float().std().item()
    assert_that(abs(spread - 0.1) < 0.004, "the spread of out.weight", value=rounded(spread))


# from_pretrained


@task("from_pretrained")
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_folder_becomes_the_model_of_transformers(solution, data_dir, device, name):
    expected = golden(data_dir, name, device)[2]
    model = solution.from_pretrained(data_dir / name, device=device)
    assert_close(model(expected["tokens"]), expected["logits"], because="the logits of transformers", **GOLDEN)
    caches = model.new_caches(2, 12)
    parts = [model(piece, caches=caches) for piece in expected["tokens"].split([7, 1, 4], 1)]
    assert_close(torch.cat(parts, 1), expected["logits"], because="in chunks of 7, 1 and 4", **GOLDEN)
    shown = expected["shown"]
    padded = model(expected["tokens"], mask=shown[:, None, None], positions=positions_of(shown))
    assert_close(padded[shown], expected["padded"][shown], because="a batch with padding on the left", **GOLDEN)


@task("from_pretrained")
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_same_in_bfloat16(solution, data_dir, device, name):
    _, weights, expected = golden(data_dir, name, device)
    model = solution.from_pretrained(str(data_dir / name), dtype=torch.bfloat16, device=device)
    for key, tensor in model.state_dict().items():
        assert_equal(tensor, weights[key], because=f"{key}: the bits of the file")
    logits = model(expected["tokens"])
    error = ((logits - expected["logits"]).norm() / expected["logits"].norm()).item()
    assert_that(error <= 3e-2, "root mean square of the difference, relative to the logits", value=rounded(error))


@task("from_pretrained")
@torch.no_grad()
def test_a_sharded_folder_with_more_than_is_needed(solution, data_dir, tmp_path, device, rand):
    _, weights, expected = golden(data_dir, "v3", device)
    names = sorted(weights)
    extra = {
        "model.layers.2.enorm.weight": rand(32).cpu(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": rand(4).cpu(),
    }
    save_shards(tmp_path, {n: weights[n] for n in names[:30]}, {n: weights[n] for n in names[30:]} | extra)
    shutil.copy(data_dir / "v3" / "config.json", tmp_path)
    with global_rng_untouched():
        model = solution.from_pretrained(tmp_path, device=device)
    assert_close(model(expected["tokens"]), expected["logits"], because="two shards", **GOLDEN)


@task("from_pretrained")
def test_dtype_and_device_are_those_asked_for(solution, data_dir, device):
    model = solution.from_pretrained(data_dir / "v3")
    assert_equal({str(p.dtype) for p in model.parameters()}, {"torch.float32"}, because="float32 by default")
    model = solution.from_pretrained(data_dir / "v3", dtype=F64, device=device)
    assert_equal({str(p.dtype) for p in model.parameters()}, {"torch.float64"}, because="float64 was asked for")
    assert_equal({p.device.type for p in model.parameters()}, {device.type}, because="the device was given")
    other = solution.from_pretrained(data_dir / "v3", device="meta")
    assert_equal({p.device.type for p in other.parameters()}, {"meta"}, because="and here another one")
    bias = model.state_dict()["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert_equal(str(bias.dtype), "torch.float32", because="router biases stay float32")


@task("from_pretrained")
def test_a_checkpoint_that_does_not_fit_its_config(solution, data_dir, tmp_path):
    weights = load_file(data_dir / "v3" / "model.safetensors")
    shutil.copy(data_dir / "v3" / "config.json", tmp_path)
    gone = "model.layers.1.mlp.experts.7.up_proj.weight"
    del weights[gone]
    save_file(weights, tmp_path / "model.safetensors")
    assert_raises(ValueError, solution.from_pretrained, tmp_path, mentions=[gone])


# read_safetensors


def write(path, entries, body, *, metadata=None, blanks=0, twice=None):
    """A file with these entries (name, dtype, shape, first, last) in its header, right or wrong."""
    parts = [f'"__metadata__": {json.dumps(metadata)}'] if metadata else []
    for name, dtype, shape, first, last in entries:
        entry = {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}
        parts.append(f"{json.dumps(name)}: {json.dumps(entry)}")
    header = ("{" + ", ".join(parts) + "}").encode() + b" " * blanks
    path.write_bytes(struct.pack("<Q", len(header)) + header + body)
    return path


@task("read_safetensors")
def test_a_file_written_by_hand(solution, tmp_path):
    body = struct.pack("<3f", 1.0, -2.5, 1e-3) + struct.pack("<2q", 7, -1) + b"\x80\x3f"
    entries = [("x", "F32", [3], 0, 12), ("n", "I64", [1, 2], 12, 28), ("one", "BF16", [], 28, 30)]
    path = write(tmp_path / "a.safetensors", entries, body)
    expected = {
        "x": torch.tensor([1.0, -2.5, 1e-3]),
        "n": torch.tensor([[7, -1]]),
        "one": torch.tensor(1.0, dtype=torch.bfloat16),
    }
    assert_same_tensors(solution.read_safetensors(path), expected, "three tensors")
    assert_same_tensors(solution.read_safetensors(str(path)), expected, "the path as a string")


@task("read_safetensors")
@pytest.mark.parametrize(
    "kind",
    ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"],
)
def test_every_dtype(solution, randint, tmp_path, kind):
    dtype = getattr(torch, kind)
    bits = randint(0, 2 if dtype == torch.bool else 120, (2 * 3 * 5 * dtype.itemsize,)).cpu().to(torch.uint8)
    tensors = {"b": torch.ones(3, dtype=torch.uint8), "x": bits.view(dtype).reshape(2, 3, 5)}
    save_file(tensors, tmp_path / "a.safetensors")
    assert_same_tensors(solution.read_safetensors(tmp_path / "a.safetensors"), tensors, f"a file with {dtype}")


@task("read_safetensors")
def test_metadata_blanks_and_any_order(solution, tmp_path):
    body = struct.pack("<4f", 1.0, 2.0, 3.0, 4.0)
    plain = write(tmp_path / "p.safetensors", [("a", "F32", [1], 0, 4), ("b", "F32", [3], 4, 16)], body)
    expected = {"a": torch.tensor([1.0]), "b": torch.tensor([2.0, 3.0, 4.0])}
    assert_same_tensors(solution.read_safetensors(plain), expected, "plain")
    entries = [("b", "F32", [3], 4, 16), ("none", "F32", [0, 5], 16, 16), ("a", "F32", [1], 0, 4)]
    path = write(tmp_path / "a.safetensors", entries, body, metadata={"format": "pt", "dtype": "x"}, blanks=7)
    expected["none"] = torch.empty(0, 5)
    assert_same_tensors(solution.read_safetensors(path), expected, "with metadata, blanks and an empty tensor")


@task("read_safetensors")
def test_a_file_without_tensors(solution, tmp_path):
    found = solution.read_safetensors(write(tmp_path / "a.safetensors", [], b"", metadata={"format": "pt"}))
    assert_equal(found, {}, because="only metadata")


@task("read_safetensors")
def test_tensors_may_be_written_to(solution, tmp_path):
    body = struct.pack("<4f", 1.0, 2.0, 3.0, 4.0)
    path = write(tmp_path / "a.safetensors", [("a", "F32", [2], 0, 8), ("b", "F32", [2], 8, 16)], body)
    found = solution.read_safetensors(path)
    assert_that(not same_storage(found["a"], found["b"]), "each tensor has memory of its own")
    found["a"].fill_(9.0)
    assert_equal(found["b"], torch.tensor([3.0, 4.0]), because="the other tensor is as it was")
    assert_equal(solution.read_safetensors(path)["a"], torch.tensor([1.0, 2.0]), because="and so is the file")


@task("read_safetensors")
@pytest.mark.parametrize("size", [0, 7, 8, 30])
def test_a_file_that_ends_in_its_header(solution, tmp_path, size):
    path = write(tmp_path / "a.safetensors", [("a", "F32", [2], 0, 8)], struct.pack("<2f", 1.0, 2.0))
    solution.read_safetensors(path)
    path.write_bytes(path.read_bytes()[:size])
    assert_raises(ValueError, solution.read_safetensors, path, because=f"{size} bytes are left")


@task("read_safetensors")
def test_a_file_that_ends_in_the_blanks_of_its_header(solution, tmp_path):
    path = write(tmp_path / "a.safetensors", [], b"", blanks=7)
    assert_equal(solution.read_safetensors(path), {}, because="an empty header with blanks")
    path.write_bytes(path.read_bytes()[:-3])
    assert_raises(ValueError, solution.read_safetensors, path, because="three bytes of the header are missing")


WRONG = {
    "cut off": [("a", "F32", [1], 0, 4), ("bad", "F32", [4], 4, 20)],
    "overlap": [("a", "F32", [3], 0, 12), ("bad", "F32", [2], 8, 16)],
    "the same bytes": [("a", "F32", [4], 0, 16), ("bad", "F32", [4], 0, 16)],
    "gap": [("a", "F32", [1], 0, 4), ("bad", "F32", [2], 8, 16)],
    "late start": [("bad", "F32", [3], 4, 16)],
    "too many bytes": [("bad", "F32", [3], 0, 16)],
    "too few bytes": [("bad", "F32", [2, 2], 0, 12), ("c", "F32", [1], 12, 16)],
    "another dtype": [("bad", "BF16", [4], 0, 16)],
    "unknown dtype": [("a", "F32", [2], 0, 8), ("bad", "F8_E5M2", [8], 8, 16)],
    "twice": [("bad", "F32", [2], 0, 8), ("bad", "F32", [2], 8, 16)],
    "twice, alike": [("a", "F32", [2], 0, 8), ("bad", "F32", [2], 8, 16), ("bad", "F32", [2], 8, 16)],
}


@task("read_safetensors")
@pytest.mark.parametrize("case", WRONG)
def test_a_header_that_lies_is_refused(solution, tmp_path, case):
    body = struct.pack("<4f", 1.0, 2.0, 3.0, 4.0)
    good = write(tmp_path / "g.safetensors", [("good", "F32", [4], 0, 16)], body)
    solution.read_safetensors(good)
    path = write(tmp_path / "a.safetensors", WRONG[case], body)
    found = assert_raises(ValueError, solution.read_safetensors, path, because=case)
    assert_that("bad" in str(found), f"{case}: the message names the tensor bad", value=str(found)[:60])


@task("read_safetensors")
def test_bytes_after_the_last_tensor(solution, tmp_path):
    body = struct.pack("<4f", 1.0, 2.0, 3.0, 4.0)
    path = write(tmp_path / "a.safetensors", [("a", "F32", [3], 0, 12)], body)
    assert_raises(ValueError, solution.read_safetensors, path, because="four bytes belong to nobody")


@task("read_safetensors")
def test_a_published_checkpoint(solution, data_dir):
    path = data_dir / "v3" / "model.safetensors"
    assert_same_tensors(solution.read_safetensors(path), load_file(path), "a whole model")
