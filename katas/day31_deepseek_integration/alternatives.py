"""Day 31: right solutions, written differently."""

import hashlib
import itertools
import json
import math
import struct
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from checker.testing import alternative
from reference import day31_deepseek_integration as right
from reference.day08_linear_layers import Linear
from reference.day14_custom_modules import Embedding, Report, RMSNorm
from reference.day27_mla_components import LatentCache
from reference.day28_mla_module import MLA
from reference.day29_deepseek_architecture import DeepSeekConfig, rope_setup
from reference.day30_deepseek_components import MoE, SwiGLU


@alternative("compare_logits")
def compare_logits__row_by_row(actual, expected, shown=None, *, margin=1e-3):
    if tuple(actual.shape) != tuple(expected.shape):
        raise ValueError(f"{tuple(actual.shape)} / {tuple(expected.shape)}")
    if shown is not None and shown.shape != expected.shape[:-1]:
        raise ValueError(f"{tuple(shown.shape)} / {tuple(expected.shape)}")
    one, two = actual.double().cpu().numpy(), expected.double().cpu().numpy()
    keep = np.ones(one.shape[:2], dtype=bool) if shown is None else shown.cpu().numpy()
    worst, changed = 0.0, 0
    for place in zip(*np.nonzero(keep), strict=True):
        worst = float(np.maximum(worst, np.abs(one[place] - two[place]).max()))
        second, best = np.sort(two[place])[-2:]
        changed += int(best - second > margin and one[place].argmax() != two[place].argmax())
    return right.Parity(worst, changed)


@alternative("DecoderLayer")
class DecoderLayer__by_the_config(nn.Module):
    def __init__(self, cfg, index):
        super().__init__()
        if cfg.kv_lora_rank is None:
            raise ValueError("kv_lora_rank is None")
        inv_freq, on_tables, on_scores = rope_setup(cfg)
        sizes = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank", "q_lora_rank")
        self.self_attn = MLA(
            cfg.hidden_size,
            cfg.num_attention_heads,
            inv_freq=inv_freq,
            rope_scale=on_tables,
            softmax_scale=on_scores,
            **{name: getattr(cfg, name) for name in sizes},
        )
        if cfg.n_routed_experts is None or index < cfg.first_k_dense_replace:
            self.mlp = SwiGLU(cfg.hidden_size, cfg.intermediate_size)
        else:
            self.mlp = MoE(cfg)
        for name in ("post_attention_layernorm", "input_layernorm"):
            self.add_module(name, RMSNorm(cfg.hidden_size, eps=cfg.rms_norm_eps))

    def forward(self, x, **kwargs):
        said = self.self_attn(self.input_layernorm(x), **kwargs)
        stream = said + x
        return self.mlp(self.post_attention_layernorm(stream)) + stream


@alternative("DeepSeekForCausalLM")
class DeepSeekForCausalLM__in_dicts(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        if cfg.tie_word_embeddings:
            raise ValueError("tie_word_embeddings")
        self.cfg = cfg
        self.lm_head = Linear(cfg.hidden_size, cfg.vocab_size, False)
        self.model = nn.ModuleDict()
        self.model["norm"] = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.model["layers"] = nn.ModuleList([right.DecoderLayer(cfg, i) for i in range(cfg.num_hidden_layers)])
        self.model["embed_tokens"] = Embedding(cfg.vocab_size, cfg.hidden_size)

    def forward(self, tokens, *, positions=None, mask=None, caches=None, mode="auto", last_only=False):
        if tokens.ndim != 2:
            raise ValueError(f"{tuple(tokens.shape)}")
        n = self.cfg.num_hidden_layers
        if caches is not None and len(caches) != n:
            raise ValueError(f"{len(caches)} / {n}")
        x = self.model["embed_tokens"](tokens)
        for i in range(n):
            cache = None if caches is None else caches[i]
            x = self.model["layers"][i](x, positions=positions, mask=mask, cache=cache, mode=mode)
        x = self.model["norm"](x)
        logits = self.lm_head(x[:, [-1]] if last_only else x)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def new_caches(self, batch, max_len, dtype=None, device=None):
        like = next(self.parameters())
        sizes = (batch, max_len, self.cfg.kv_lora_rank, self.cfg.qk_rope_head_dim)
        kwargs = {"dtype": dtype or like.dtype, "device": device or like.device}
        return [LatentCache(*sizes, **kwargs) for _ in range(self.cfg.num_hidden_layers)]

    def _apply(self, fn, recurse=True):
        kept = {name: tensor for name, tensor in self.named_buffers() if name.endswith("e_score_correction_bias")}
        super()._apply(fn, recurse)
        for name, tensor in kept.items():
            gate = self.get_submodule(name.rpartition(".")[0])
            gate.register_buffer("e_score_correction_bias", tensor.to(self.lm_head.weight.device))
        return self


def _pieces(cfg):
    """Which endings a layer has, as nested products."""
    queries = ("q_a_proj", "q_a_layernorm", "q_b_proj") if cfg.q_lora_rank else ("q_proj",)
    attention = [f"self_attn.{x}" for x in (*queries, "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj")]
    common = [*attention, "input_layernorm", "post_attention_layernorm"]
    three = ("gate_proj", "up_proj", "down_proj")
    dense = [f"mlp.{x}" for x in three]
    sparse = ["mlp.gate"]
    sparse += [f"mlp.experts.{e}.{x}" for e, x in itertools.product(range(cfg.n_routed_experts or 0), three)]
    sparse += [f"mlp.shared_experts.{x}" for x in three if cfg.n_shared_experts]
    return common + dense, common + sparse


@alternative("map_keys")
def map_keys__by_crossing_off(names, cfg):
    dense, sparse = _pieces(cfg)
    open_names = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for i in range(cfg.num_hidden_layers):
        is_dense = cfg.n_routed_experts is None or i < cfg.first_k_dense_replace
        open_names |= {f"model.layers.{i}.{piece}.weight" for piece in (dense if is_dense else sparse)}
        if not is_dense and cfg.scoring_func == "sigmoid":
            open_names.add(f"model.layers.{i}.mlp.gate.e_score_correction_bias")
    result, source = {}, {}
    for name in names:
        words = name.split(".")
        full = name if words[0] in ("model", "lm_head") else "model." + name
        number = full.split(".")[2] if full.startswith("model.layers.") else ""
        if number.isdigit() and int(number) > cfg.num_hidden_layers - 1:
            result[name] = right.Skip("not one of our layers")
        elif words[-2:] == ["rotary_emb", "inv_freq"]:
            result[name] = right.Skip("computed")
        elif full in open_names:
            open_names.remove(full)
            result[name] = full
            source[full] = name
        elif full in source:
            raise ValueError(f"both {source[full]} and {name}")
        else:
            raise ValueError(f"unknown: {name}")
    if open_names:
        raise ValueError(f"not there: {sorted(open_names)}")
    return result


@alternative("read_checkpoint")
def read_checkpoint__with_load_file(directory):
    directory = Path(directory)
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        with index.open() as opened:
            said = json.load(opened)["weight_map"]
    elif (directory / "model.safetensors").is_file():
        said = None
    else:
        raise ValueError("no model.safetensors and no model.safetensors.index.json")
    files = {}
    for file in ["model.safetensors"] if said is None else set(said.values()):
        if not (directory / file).is_file():
            raise ValueError(f"no {file}")
        try:
            files[file] = load_file(str(directory / file))
        except SafetensorError as error:
            raise ValueError(f"{file}: {error}") from error
    result = {}
    for file, tensors in files.items():
        for name, tensor in tensors.items():
            twice = [other for other in files if name in files[other]]
            if len(twice) > 1:
                raise ValueError(f"{name} in {twice}")
            if said is not None and said.get(name) != file:
                raise ValueError(f"{name} in {file}, index: {said.get(name)}")
            result[name] = tensor
    for name in said or ():
        if name not in result:
            raise ValueError(f"{name} is nowhere")
    return result


@alternative("load_pretrained")
def load_pretrained__checked_then_copied(model, tensors):
    targets = right.map_keys(list(tensors), model.cfg)
    slots = dict(model.named_parameters()) | {k: v for k, v in model.named_buffers() if k.endswith("_bias")}
    for source, target in targets.items():
        if not isinstance(target, right.Skip) and tensors[source].shape != slots[target].shape:
            raise ValueError(f"{source} {tuple(tensors[source].shape)}, model: {tuple(slots[target].shape)}")
    report = Report([], [], [], [])
    for source, target in targets.items():
        if isinstance(target, right.Skip):
            report.unexpected.append(source)
        else:
            slots[target].data.copy_(tensors[source])
            report.loaded.append(target)
    return report


@alternative("init_weights_")
def init_weights___seed_per_name(model, std, *, generator):
    base = int(torch.randint(2**40, (1,), generator=generator, device=generator.device))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.split(".")[-1].endswith("bias"):
                tensor.fill_(0)
            elif tensor.ndim < 2:
                tensor.fill_(1)
            else:
                digest = hashlib.sha256(f"{base} {name}".encode()).digest()
                own = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
                tensor.copy_(torch.randn(tensor.shape, generator=own) * std)


@alternative("from_pretrained")
def from_pretrained__step_by_step(directory, *, dtype=torch.float32, device=None):
    with open(f"{directory}/config.json") as opened:
        cfg = DeepSeekConfig.from_dict(json.load(opened))
    before = torch.get_rng_state()
    model = right.DeepSeekForCausalLM(cfg)
    torch.set_rng_state(before)
    right.load_pretrained(model, right.read_checkpoint(directory))
    model = model.to(dtype)
    return model if device is None else model.to(device)


@alternative("read_safetensors")
def read_safetensors__with_numpy(path):
    kinds = {
        "F64": "<f8",
        "F32": "<f4",
        "F16": "<f2",
        "BF16": "<i2",
        "I64": "<i8",
        "I32": "<i4",
        "I16": "<i2",
        "I8": "i1",
        "U8": "u1",
        "BOOL": "?",
    }

    def once(pairs):
        for i, (key, _) in enumerate(pairs):
            if key in [other for other, _ in pairs[:i]]:
                raise ValueError(f"two of {key}")
        return dict(pairs)

    with open(path, "rb") as opened:
        first = opened.read(8)
        if len(first) != 8:
            raise ValueError("shorter than eight bytes")
        (size,) = struct.unpack("<Q", first)
        text = opened.read(size)
        if len(text) != size:
            raise ValueError(f"header cut off at {len(text)}")
        body = opened.read()
    entries = json.loads(text.decode(), object_pairs_hook=once)
    entries = {name: entry for name, entry in entries.items() if name != "__metadata__"}
    place, found = 0, {}
    for name in sorted(entries, key=lambda key: tuple(entries[key]["data_offsets"])):
        kind, shape, (start, stop) = (entries[name][key] for key in ("dtype", "shape", "data_offsets"))
        if kind not in kinds:
            raise ValueError(f"{name}: {kind}")
        wanted = math.prod(shape) * np.dtype(kinds[kind]).itemsize
        if start != place or stop != start + wanted or stop > len(body):
            raise ValueError(f"{name}: {start}, {stop}")
        array = np.frombuffer(body, kinds[kind], math.prod(shape), start if wanted else 0).reshape(shape)
        tensor = torch.from_numpy(array.copy())
        found[name] = tensor.view(torch.bfloat16) if kind == "BF16" else tensor
        place = stop
    if place < len(body):
        raise ValueError("the file goes on")
    return found
