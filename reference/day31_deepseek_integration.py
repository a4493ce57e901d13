"""A DeepSeek model from the parts of earlier days, and the published checkpoints that fill it.

The layers are those of DeepSeek-V2 (arXiv:2405.04434, sections 2.1 and 2.2) and DeepSeek-V3 (arXiv:2412.19437, section
2.1): x + MLA(norm(x)), then x + FFN(norm(x)). Names and layouts are those of the files on the hub, in which each expert
has tensors of its own. The format of the files is safetensors: eight bytes with the length of a JSON header, the header,
then raw numbers.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from reference.day08_linear_layers import Linear
from reference.day14_custom_modules import Embedding, Report, RMSNorm, load_renamed
from reference.day27_mla_components import LatentCache
from reference.day28_mla_module import MLA
from reference.day29_deepseek_architecture import DeepSeekConfig, layer_plan, rope_setup
from reference.day30_deepseek_components import MoE, SwiGLU

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ROUTER_BIAS = "e_score_correction_bias"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Parity(NamedTuple):
    """How far two models are apart: the largest difference of a logit, and how many positions have another favorite."""

    max_error: float
    changed: int


def compare_logits(actual: Tensor, expected: Tensor, shown: Tensor | None = None, *, margin: float = 1e-3) -> Parity:
    """Compare logits (B, T, V) at all positions, or at those where shown (B, T) is True."""
    if actual.shape != expected.shape:
        raise ValueError(f"logits {tuple(actual.shape)} cannot be compared with {tuple(expected.shape)}")
    if shown is None:
        shown = torch.ones(expected.shape[:2], dtype=torch.bool, device=expected.device)
    if shown.shape != expected.shape[:2]:
        raise ValueError(f"shown {tuple(shown.shape)} does not fit logits {tuple(expected.shape)}")
    one, two = actual[shown], expected[shown].double()  # (N, V)
    if not len(one):
        return Parity(0.0, 0)
    best, second = two.topk(2).values.unbind(-1)  # (N,), (N,)
    changed = (one.argmax(-1) != two.argmax(-1)) & (best - second > margin)
    return Parity((one - two).abs().max().item(), int(changed.sum()))


class DecoderLayer(nn.Module):
    """One layer: attention on the latent, then a dense or a sparse feed-forward network, each added to the raw stream."""

    def __init__(self, cfg: DeepSeekConfig, index: int):
        super().__init__()
        kind = layer_plan(cfg)[index]
        if kind.attention != "mla":
            raise ValueError(f"layer {index} has ordinary attention: kv_lora_rank ({cfg.kv_lora_rank}) is missing")
        inv_freq, rope_scale, softmax_scale = rope_setup(cfg)
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = MLA(  # its own norms have eps 1e-6, whatever rms_norm_eps says
            cfg.hidden_size,
            cfg.num_attention_heads,
            qk_nope_head_dim=cfg.qk_nope_head_dim,
            qk_rope_head_dim=cfg.qk_rope_head_dim,
            v_head_dim=cfg.v_head_dim,
            kv_lora_rank=cfg.kv_lora_rank,
            q_lora_rank=cfg.q_lora_rank,
            softmax_scale=softmax_scale,
            inv_freq=inv_freq,
            rope_scale=rope_scale,
        )
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mlp = MoE(cfg) if kind.mlp == "moe" else SwiGLU(cfg.hidden_size, cfg.intermediate_size)

    def forward(
        self,
        x: Tensor,
        *,
        cache: LatentCache | None = None,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        mode: str = "auto",
    ) -> Tensor:
        """Map x (B, T, D) to (B, T, D)."""
        x = x + self.self_attn(self.input_layernorm(x), cache=cache, mask=mask, positions=positions, mode=mode)
        return x + self.mlp(self.post_attention_layernorm(x))


class DeepSeekModel(nn.Module):
    """Embedding, layers and the last norm: everything below the head."""

    def __init__(self, cfg: DeepSeekConfig):
        super().__init__()
        self.embed_tokens = Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(cfg, index) for index in range(cfg.num_hidden_layers))
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)


class DeepSeekForCausalLM(nn.Module):
    """A DeepSeek language model with the names of the published checkpoints; head and embedding are two tensors."""

    def __init__(self, cfg: DeepSeekConfig):
        super().__init__()
        if cfg.tie_word_embeddings:
            raise ValueError("tie_word_embeddings is not for DeepSeek: its head is a matrix of its own")
        self.cfg = cfg
        self.model = DeepSeekModel(cfg)
        self.lm_head = Linear(cfg.hidden_size, cfg.vocab_size, bias=False)

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        caches: list[LatentCache] | None = None,
        mode: str = "auto",
        last_only: bool = False,
    ) -> Tensor:
        """Map tokens (B, T) to logits (B, T, V) in float32, or to (B, 1, V) with last_only."""
        layers = self.model.layers
        if tokens.dim() != 2:
            raise ValueError(f"tokens {tuple(tokens.shape)} are not (B, T)")
        if caches is None:
            caches = [None] * len(layers)
        if len(caches) != len(layers):
            raise ValueError(f"{len(caches)} caches do not fit {len(layers)} layers")
        x = self.model.embed_tokens(tokens)  # (B, T, D)
        for index, layer in enumerate(layers):
            x = layer(x, cache=caches[index], mask=mask, positions=positions, mode=mode)
        if last_only:
            x = x[:, -1:]  # (B, 1, D)
        logits = self.lm_head(self.model.norm(x))  # (B, T, V)
        return logits if logits.dtype == torch.float64 else logits.float()

    def new_caches(
        self,
        batch: int,
        max_len: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> list[LatentCache]:
        """Return an empty latent cache for each layer, in the dtype and on the device of the model by default."""
        weight = self.lm_head.weight
        dtype = weight.dtype if dtype is None else dtype
        device = weight.device if device is None else device
        r, dr = self.cfg.kv_lora_rank, self.cfg.qk_rope_head_dim
        return [LatentCache(batch, max_len, r, dr, dtype=dtype, device=device) for _ in self.model.layers]

    def _apply(self, fn, recurse=True):
        """Move the biases of the routers with the model, but never cast them: they decide between close scores."""
        exact = [(part, part.e_score_correction_bias) for part in self.modules() if hasattr(part, ROUTER_BIAS)]
        super()._apply(fn, recurse)
        for router, bias in exact:
            router.e_score_correction_bias = bias.to(router.e_score_correction_bias.device)
        return self


class Skip(NamedTuple):
    """A tensor of a checkpoint that is left out on purpose, and why."""

    why: str


def map_keys(names: Iterable[str], cfg: DeepSeekConfig) -> dict[str, str | Skip]:
    """Return for each tensor of a published checkpoint the name that it feeds, or why it is skipped."""
    wanted = dict.fromkeys(_tensor_names(cfg))
    found: dict[str, str | Skip] = {}
    fed: dict[str, str] = {}  # name in the model -> name in the checkpoint
    for name in names:
        target = name if name.startswith(("model.", "lm_head.")) else f"model.{name}"
        layer = re.match(r"model\.layers\.(\d+)\.", target)
        if layer and int(layer[1]) >= cfg.num_hidden_layers:
            found[name] = Skip(f"layer {layer[1]} predicts further ahead")
        elif target.endswith(".rotary_emb.inv_freq"):
            found[name] = Skip("frequencies follow from the configuration")
        elif target not in wanted:
            raise ValueError(f"{name} feeds nothing in this model")
        elif target in fed:
            raise ValueError(f"{fed[target]} and {name} both feed {target}")
        else:
            found[name], fed[target] = target, name
    missing = [name for name in wanted if name not in fed]
    if missing:
        raise ValueError(f"missing: {', '.join(missing)}")
    return found


def read_checkpoint(directory: str | Path) -> dict[str, Tensor]:
    """Return all tensors of a folder: of model.safetensors, or of the files that model.safetensors.index.json names."""
    folder = Path(directory)
    if not (folder / INDEX).exists():
        if not (folder / SINGLE).exists():
            raise ValueError(f"{folder} has neither {SINGLE} nor {INDEX}")
        return _read_file(folder / SINGLE)
    said = json.loads((folder / INDEX).read_text())["weight_map"]  # tensor -> file
    tensors: dict[str, Tensor] = {}
    home: dict[str, str] = {}
    for file in sorted(set(said.values())):
        if not (folder / file).exists():
            raise ValueError(f"the shard {file} is missing in {folder}")
        for name, tensor in _read_file(folder / file).items():
            if name in home:
                raise ValueError(f"{name} is in {home[name]} and in {file}")
            tensors[name], home[name] = tensor, file
    for name in [*said, *home]:
        if said.get(name) != home.get(name):
            raise ValueError(f"{name} is in {home.get(name)}, and the index says {said.get(name)}")
    return tensors


def load_pretrained(model: DeepSeekForCausalLM, tensors: Mapping[str, Tensor]) -> Report:
    """Copy a published checkpoint into the model: everything that it needs, or nothing at all."""
    targets = map_keys(tensors, model.cfg)
    chosen = {target: tensors[name] for name, target in targets.items() if isinstance(target, str)}
    skipped = [name for name, target in targets.items() if isinstance(target, Skip)]
    return load_renamed(model, chosen, [])._replace(unexpected=skipped)


def from_pretrained(
    directory: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> DeepSeekForCausalLM:
    """Return the model of a folder: config.json says what it is, the checkpoint fills it."""
    folder = Path(directory)
    cfg = DeepSeekConfig.from_dict(json.loads((folder / "config.json").read_text()))
    with torch.random.fork_rng(devices=[]):  # the first weights are random, and overwritten
        model = DeepSeekForCausalLM(cfg)
    model.to(device=device, dtype=dtype)
    load_pretrained(model, read_checkpoint(folder))
    return model


@torch.no_grad()
def init_weights_(model: nn.Module, std: float, *, generator: torch.Generator) -> None:
    """Fill a model: N(0, std) for matrices, ones for norms, zeros for biases; in the order of the names."""
    for name, tensor in sorted(model.state_dict().items()):
        if name.endswith("bias"):
            tensor.zero_()
        elif tensor.dim() == 1:
            tensor.fill_(1.0)
        else:
            drawn = torch.empty(tensor.shape, device=generator.device).normal_(0.0, std, generator=generator)
            tensor.copy_(drawn)


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a file, read without the library: length of the header, header, numbers."""
    data = Path(path).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    if len(data) < start:
        raise ValueError(f"{path} ends within its header: {len(data)} bytes")
    header = json.loads(data[8:start], object_pairs_hook=_without_duplicates)
    header.pop("__metadata__", None)
    body = torch.frombuffer(bytearray(data), dtype=torch.uint8)[start:]
    tensors: dict[str, Tensor] = {}
    end = 0  # of the tensor before
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        shape, (first, last) = entry["shape"], entry["data_offsets"]
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{name} has the unknown dtype {entry['dtype']}")
        dtype = DTYPES[entry["dtype"]]
        if first != end:
            raise ValueError(f"{name} begins at byte {first}, and the tensor before it ends at {end}")
        if last - first != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name} has {last - first} bytes, which is not {entry['dtype']} of shape {shape}")
        if last > len(body):
            raise ValueError(f"{name} ends at byte {last}, and the file at {len(body)}")
        tensors[name] = body[first:last].clone().view(dtype).reshape(shape)  # a copy begins at an even address
        end = last
    if end != len(body):
        raise ValueError(f"{len(body) - end} bytes after the last tensor")
    return tensors


def _tensor_names(cfg: DeepSeekConfig) -> Iterator[str]:
    """The names of the tensors of a model, without making one."""
    yield "model.embed_tokens.weight"
    for index, kind in enumerate(layer_plan(cfg)):
        layer = f"model.layers.{index}"
        queries = ["q_proj"] if cfg.q_lora_rank is None else ["q_a_proj", "q_a_layernorm", "q_b_proj"]
        for part in [*queries, "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"]:
            yield f"{layer}.self_attn.{part}.weight"
        yield f"{layer}.input_layernorm.weight"
        yield f"{layer}.post_attention_layernorm.weight"
        networks = ["mlp"]
        if kind.mlp == "moe":
            yield f"{layer}.mlp.gate.weight"
            if cfg.scoring_func == "sigmoid":
                yield f"{layer}.mlp.gate.{ROUTER_BIAS}"
            networks = [f"mlp.experts.{expert}" for expert in range(cfg.n_routed_experts)]
            networks += ["mlp.shared_experts"] if cfg.n_shared_experts else []
        for network in networks:
            for part in ("gate_proj", "up_proj", "down_proj"):
                yield f"{layer}.{network}.{part}.weight"
    yield "model.norm.weight"
    yield "lm_head.weight"


def _read_file(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file: {error}") from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dict, if its keys differ."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key} is in the header twice")
        found[key] = value
    return found
