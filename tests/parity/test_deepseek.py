"""The references of days 28, 30 and 31 against transformers' DeepSeek-V2 and V3, on weights that show mistakes."""

import pytest
import tiny
import torch

from reference.day28_mla_module import MLA
from reference.day29_deepseek_architecture import DeepSeekConfig, count_parameters, rope_setup
from reference.day30_deepseek_components import MoE
from reference.day31_deepseek_integration import DeepSeekForCausalLM, load_pretrained

BATCH, LENGTH = 2, 70  # longer than the 64 tokens of the original context, so that YaRN counts
CASES = pytest.mark.parametrize(("style", "name"), tiny.CASES)


def published(style, state):
    """The tensors of transformers as published files have them: stacked experts as one tensor per matrix and expert."""
    found = {}
    for key, tensor in state.items():
        lead, _, kind = key.rpartition("mlp.experts.")
        if kind == "gate_up_proj":
            for number, both in enumerate(tensor):
                gate, up = both.chunk(2)
                found[f"{lead}mlp.experts.{number}.gate_proj.weight"] = gate
                found[f"{lead}mlp.experts.{number}.up_proj.weight"] = up
        elif kind == "down_proj":
            for number, down in enumerate(tensor):
                found[f"{lead}mlp.experts.{number}.down_proj.weight"] = down
        elif style == "v3" or not key.endswith(
            "e_score_correction_bias"
        ):  # V2's router registers one and never adds it
            found[key] = tensor
    return found


def pair(style, name):
    """A model of transformers, and the reference with its weights."""
    theirs = tiny.build(style, name)
    mine = DeepSeekForCausalLM(DeepSeekConfig.from_dict(theirs.config.to_dict()))
    load_pretrained(mine, published(style, theirs.state_dict()))
    return theirs, mine


def tokens():
    return torch.randint(tiny.WIDTHS["vocab_size"], (BATCH, LENGTH))


@CASES
@pytest.mark.parametrize("mode", ["naive", "absorbed", "auto"])
@torch.no_grad()
def test_logits(style, name, mode):
    theirs, mine = pair(style, name)
    ids = tokens()
    wanted = theirs(ids).logits
    assert wanted.std() > 0.5  # not a model in which mistakes are small
    got = mine(ids, mode=mode)
    assert (got - wanted).abs().max() <= 1e-4
    margin = wanted.topk(2).values.diff().abs().squeeze(-1) > 1e-3
    assert torch.equal(got.argmax(-1)[margin], wanted.argmax(-1)[margin])


@CASES
@torch.no_grad()
def test_decoding_on_the_latent_cache(style, name):
    theirs, mine = pair(style, name)
    ids = tokens()
    wanted = theirs(ids).logits
    for chunks, mode in (([30, 1, 19, 20], "auto"), ([1] * LENGTH, "absorbed"), ([40, 30], "naive")):
        caches, parts, start = mine.new_caches(BATCH, LENGTH), [], 0
        for size in chunks:
            parts.append(mine(ids[:, start : start + size], caches=caches, mode=mode))
            start += size
        assert (torch.cat(parts, 1) - wanted).abs().max() <= 1e-4, (chunks, mode)


@CASES
@torch.no_grad()
def test_a_padded_batch(style, name):
    theirs, mine = pair(style, name)
    ids = tokens()
    shown = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    shown[0, :13] = False
    positions = (shown.long().cumsum(1) - 1).clamp(min=0)
    wanted = theirs(ids, attention_mask=shown.long(), position_ids=positions).logits
    got = mine(ids, mask=shown[:, None, None], positions=positions)
    assert (got - wanted)[shown].abs().max() <= 1e-4
    alone = mine(ids[:1, 13:])
    assert (got[:1, 13:] - alone).abs().max() <= 1e-4


@CASES
@torch.no_grad()
def test_greedy_generation(style, name):
    theirs, mine = pair(style, name)
    prompt = tokens()[:, :9]
    wanted = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    caches, got = mine.new_caches(BATCH, 21), prompt
    step = prompt
    for _ in range(12):
        step = mine(step, caches=caches, last_only=True).argmax(-1)
        got = torch.cat((got, step), 1)
    assert torch.equal(got, wanted)


@CASES
@torch.no_grad()
def test_one_layers_attention_and_feed_forward(style, name):
    theirs, _ = pair(style, name)
    config = DeepSeekConfig.from_dict(theirs.config.to_dict())
    layer = theirs.model.layers[2]
    inv_freq, rope_scale, scale = rope_setup(config)
    mla = MLA(
        config.hidden_size,
        config.num_attention_heads,
        qk_nope_head_dim=config.qk_nope_head_dim,
        qk_rope_head_dim=config.qk_rope_head_dim,
        v_head_dim=config.v_head_dim,
        kv_lora_rank=config.kv_lora_rank,
        q_lora_rank=config.q_lora_rank,
        softmax_scale=scale,
        inv_freq=inv_freq,
        rope_scale=rope_scale,
    )
    mla.load_state_dict(layer.self_attn.state_dict())
    x = torch.randn(BATCH, LENGTH, config.hidden_size)
    angles = theirs.model.rotary_emb(x, torch.arange(LENGTH)[None])
    mask = torch.full((LENGTH, LENGTH), -torch.inf).triu(1)[None, None]
    wanted = layer.self_attn(x, attention_mask=mask, position_embeddings=angles)[0]
    assert (mla(x) - wanted).abs().max() <= 1e-5
    moe = MoE(config)
    tensors = published(style, layer.state_dict())
    moe.load_state_dict({key.removeprefix("mlp."): tensors[key] for key in tensors if key.startswith("mlp.")})
    assert (moe(x) - layer.mlp(x)).abs().max() <= 1e-4


@CASES
def test_parameters_are_counted_before_they_exist(style, name):
    theirs, mine = pair(style, name)
    counts = count_parameters(mine.cfg)
    assert counts["total"] == sum(tensor.numel() for tensor in theirs.parameters())
    assert counts["total"] == sum(tensor.numel() for tensor in mine.parameters())
    assert counts["buffers"] == sum(tensor.numel() for key, tensor in mine.state_dict().items() if "bias" in key)


@pytest.mark.parametrize("style", ["v2", "v3"])
@torch.no_grad()
def test_the_comparison_would_see_a_mistake(style):
    """The smallest of the usual mistakes moves the logits by far more than the tolerance."""
    name = {"v2": "groups, compressed queries, YaRN", "v3": "groups, YaRN"}[style]
    theirs, mine = pair(style, name)
    ids = tokens()
    wanted = theirs(ids).logits
    attention = [layer.self_attn for layer in mine.model.layers]

    def off():
        return (mine(ids) - wanted).abs().max()

    for module in attention:
        module.softmax_scale /= 1.1
    assert off() > 1e-2
    for module in attention:
        module.softmax_scale *= 1.1
    assert off() <= 1e-4
    positions = torch.arange(LENGTH)
    positions[40:] += 1
    assert (mine(ids, positions=positions) - wanted).abs().max() > 1e-2
    for layer in mine.model.layers[1:]:
        layer.mlp.options["scaling"] *= 1.05
    assert off() > 1e-2
