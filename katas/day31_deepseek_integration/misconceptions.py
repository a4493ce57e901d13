"""Day 31: known mistakes."""

import json
import math
import re
import struct
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from checker.testing import misconception
from reference import day31_deepseek_integration as right
from reference.day14_custom_modules import load_renamed
from reference.day27_mla_components import LatentCache
from reference.day29_deepseek_architecture import DeepSeekConfig, layer_plan
from reference.day30_deepseek_components import MoE, SwiGLU

# compare_logits


def _check(actual, expected, shown):
    if actual.shape != expected.shape:
        raise ValueError(f"{tuple(actual.shape)} and {tuple(expected.shape)}")
    if shown is None:
        return torch.ones(expected.shape[:2], dtype=torch.bool, device=expected.device)
    if shown.shape != expected.shape[:2]:
        raise ValueError(f"{tuple(shown.shape)} and {tuple(expected.shape)}")
    return shown


@misconception(
    "compare_logits",
    "Only the last position of each row is looked at. It is one of many: a wrong mask or a shifted rotation can show "
    "everywhere but there.",
)
def compare_logits__last_position(actual, expected, shown=None, *, margin=1e-3):
    shown = _check(actual, expected, shown)
    return right.compare_logits(actual[:, -1:], expected[:, -1:], shown[:, -1:], margin=margin)


@misconception(
    "compare_logits",
    "Equal shapes are taken for equal models. With gate and up exchanged, every shape is still right and every logit wrong.",
)
def compare_logits__shapes_only(actual, expected, shown=None, *, margin=1e-3):
    _check(actual, expected, shown)
    return right.Parity(0.0, 0)


@misconception(
    "compare_logits",
    "The differences are averaged. One logit that is 3 off vanishes among thousands that are right; the largest one does not.",
)
def compare_logits__mean(actual, expected, shown=None, *, margin=1e-3):
    shown = _check(actual, expected, shown)
    found = right.compare_logits(actual, expected, shown, margin=margin)
    errors = (actual[shown].double() - expected[shown].double()).abs()
    return found._replace(max_error=errors.mean().item() if len(errors) else 0.0)


@misconception(
    "compare_logits",
    "The sign was kept: a logit that is too small counts as a negative error, and the largest number overlooks it.",
)
def compare_logits__signed(actual, expected, shown=None, *, margin=1e-3):
    shown = _check(actual, expected, shown)
    found = right.compare_logits(actual, expected, shown, margin=margin)
    errors = actual[shown].double() - expected[shown].double()
    return found._replace(max_error=errors.max().item() if len(errors) else 0.0)


@misconception(
    "compare_logits",
    "Doubt is measured in the wrong model: what counts is how clear the choice was in `expected`, not how sure `actual` "
    "is of another one.",
)
def compare_logits__margin_of_actual(actual, expected, shown=None, *, margin=1e-3):
    shown = _check(actual, expected, shown)
    found = right.compare_logits(actual, expected, shown, margin=margin)
    one, two = actual[shown].double(), expected[shown].double()
    if not len(one):
        return found
    best = one.topk(2).values
    return found._replace(changed=int(((one.argmax(-1) != two.argmax(-1)) & (best[:, 0] - best[:, 1] > margin)).sum()))


@misconception(
    "compare_logits",
    "The expected logits were rounded to the dtype of the others before the comparison, and what had been lost there was "
    "lost on both sides: an error of 0.5 at 256 became 0.",
)
def compare_logits__rounded_first(actual, expected, shown=None, *, margin=1e-3):
    return right.compare_logits(actual, expected.to(actual.dtype), shown, margin=margin)


@misconception(
    "compare_logits",
    "NaN is reported as a small number. A model that computes NaN is as far away as it can be.",
)
def compare_logits__nan_hidden(actual, expected, shown=None, *, margin=1e-3):
    shown = _check(actual, expected, shown)
    return right.compare_logits(
        torch.where(actual.isnan(), expected.to(actual.dtype), actual), expected, shown, margin=margin
    )


# DecoderLayer


class _Layer(right.DecoderLayer):
    def attend(self, x, kwargs):
        return self.self_attn(x, **{"cache": None, "mask": None, "positions": None, "mode": "auto", **kwargs})


@misconception(
    "DecoderLayer",
    "The additions go to the normalized numbers. The norm belongs to the branch; the stream itself runs through the whole "
    "model raw, as on day 20.",
)
class DecoderLayer__residual_from_the_norm(_Layer):
    def forward(self, x, **kwargs):
        x = self.input_layernorm(x)
        x = x + self.attend(x, kwargs)
        x = self.post_attention_layernorm(x)
        return x + self.mlp(x)


@misconception(
    "DecoderLayer",
    "One norm serves both branches. Each of them has a gain of its own in the file, two in a layer, and yours gives the "
    "network the gain that was trained for attention.",
)
class DecoderLayer__one_norm(_Layer):
    def forward(self, x, **kwargs):
        x = x + self.attend(self.input_layernorm(x), kwargs)
        return x + self.mlp(self.input_layernorm(x))


@misconception(
    "DecoderLayer",
    "Both branches read the same x. The feed-forward network has to see what attention has just added.",
)
class DecoderLayer__parallel(_Layer):
    def forward(self, x, **kwargs):
        return x + self.attend(self.input_layernorm(x), kwargs) + self.mlp(self.post_attention_layernorm(x))


@misconception(
    "DecoderLayer",
    "The norms come after the additions. That is how the first transformers did it; in this one they stand before each "
    "branch, and nothing ever rescales the stream.",
)
class DecoderLayer__norm_after(_Layer):
    def forward(self, x, **kwargs):
        x = self.input_layernorm(x + self.attend(x, kwargs))
        return self.post_attention_layernorm(x + self.mlp(x))


@misconception(
    "DecoderLayer",
    "The norms of the latents got rms_norm_eps. The released models use 1e-6 inside attention, whatever the configuration "
    "says about the stream; where inputs are small it shows.",
)
class DecoderLayer__eps_of_the_config(_Layer):
    def __init__(self, cfg, index):
        super().__init__(cfg, index)
        for name in ("q_a_layernorm", "kv_a_layernorm"):
            if hasattr(self.self_attn, name):
                getattr(self.self_attn, name).eps = cfg.rms_norm_eps


@misconception(
    "DecoderLayer",
    "The softmax has its usual scale. With YaRN it is multiplied by a square that `rope_setup` has worked out; without it "
    "attention is flatter than the weights were trained for.",
)
class DecoderLayer__plain_softmax_scale(_Layer):
    def __init__(self, cfg, index):
        super().__init__(cfg, index)
        self.self_attn.softmax_scale = (cfg.qk_nope_head_dim + cfg.qk_rope_head_dim) ** -0.5


@misconception(
    "DecoderLayer",
    "The rotation has the plain frequencies: those of YaRN, which `rope_setup` gives, were not handed on. Position 0 is "
    "perfect, and from there the numbers drift.",
)
class DecoderLayer__plain_frequencies(_Layer):
    def __init__(self, cfg, index):
        super().__init__(cfg, index)
        self.self_attn.inv_freq = None


@misconception(
    "DecoderLayer",
    "The factor on cos and sin is missing. It is 1 in all published models, which is why nobody notices; a configuration "
    "with two different scales does.",
)
class DecoderLayer__no_rope_scale(_Layer):
    def __init__(self, cfg, index):
        super().__init__(cfg, index)
        self.self_attn.rope_scale = 1.0


@misconception(
    "DecoderLayer",
    "One layer too many is dense. first_k_dense_replace counts them, and layers are numbered from 0.",
)
class DecoderLayer__one_dense_too_many(_Layer):
    def __init__(self, cfg, index):
        super().__init__(cfg, index)
        if index == cfg.first_k_dense_replace and layer_plan(cfg)[index].mlp == "moe":
            self.mlp = SwiGLU(cfg.hidden_size, cfg.intermediate_size)


@misconception(
    "DecoderLayer",
    "Positions do not reach attention: it counts from the end of the cache, whatever it was told, and tokens that stand "
    "far apart are taken for neighbors.",
)
class DecoderLayer__no_positions(_Layer):
    def forward(self, x, *, positions=None, **kwargs):
        return super().forward(x, **kwargs)


@misconception("DecoderLayer", "The mask does not reach attention: tokens that are hidden are attended to.")
class DecoderLayer__no_mask(_Layer):
    def forward(self, x, *, mask=None, **kwargs):
        return super().forward(x, **kwargs)


# DeepSeekForCausalLM


class _Model(right.DeepSeekForCausalLM):
    def stream(self, tokens, caches=None, **kwargs):
        layers = self.model.layers
        if tokens.dim() != 2:
            raise ValueError(f"{tuple(tokens.shape)}")
        caches = [None] * len(layers) if caches is None else caches
        if len(caches) != len(layers):
            raise ValueError(f"{len(caches)} and {len(layers)}")
        x = self.embed(tokens)
        for layer, cache in zip(layers, caches, strict=True):
            x = layer(x, cache=cache, **kwargs)
        return x

    def embed(self, tokens):
        return self.model.embed_tokens(tokens)

    def finish(self, logits):
        return logits if logits.dtype == torch.float64 else logits.float()

    def forward(self, tokens, *, last_only=False, **kwargs):
        x = self.stream(tokens, **kwargs)
        return self.finish(self.lm_head(self.model.norm(x[:, -1:] if last_only else x)))


@misconception(
    "DeepSeekForCausalLM",
    "The last norm is not used: the head reads the raw stream, which has grown from layer to layer.",
)
class DeepSeekForCausalLM__no_last_norm(_Model):
    def forward(self, tokens, *, last_only=False, **kwargs):
        x = self.stream(tokens, **kwargs)
        return self.finish(self.lm_head(x[:, -1:] if last_only else x))


@misconception(
    "DeepSeekForCausalLM",
    "Head and embedding are one tensor. In these models each has weights of its own: whichever is loaded last overwrites "
    "the other.",
)
class DeepSeekForCausalLM__tied(_Model):
    def __init__(self, cfg):
        super().__init__(cfg)
        self.lm_head.weight = self.model.embed_tokens.weight


@misconception(
    "DeepSeekForCausalLM",
    "The biases of the routers are cast with everything else. Rounded to eight bits, close experts change places; they "
    "have to stay float32 in a model of any dtype.",
)
class DeepSeekForCausalLM__biases_cast(_Model):
    def _apply(self, fn, recurse=True):
        return nn.Module._apply(self, fn, recurse)


@misconception(
    "DeepSeekForCausalLM",
    "The biases of the routers are spared the cast and the move as well: the model goes to another device and they stay "
    "behind.",
)
class DeepSeekForCausalLM__biases_left_behind(_Model):
    def _apply(self, fn, recurse=True):
        routers = [layer.mlp.gate for layer in self.model.layers if isinstance(layer.mlp, MoE)]
        exact = [getattr(router, "e_score_correction_bias", None) for router in routers]
        nn.Module._apply(self, fn, recurse)
        for router, bias in zip(routers, exact, strict=True):
            if bias is not None:
                router.e_score_correction_bias = bias
        return self


@misconception(
    "DeepSeekForCausalLM",
    "All layers write into one cache. Each layer has latents of its own: a list that repeats one object has room for one.",
)
class DeepSeekForCausalLM__one_cache(_Model):
    def new_caches(self, batch, max_len, dtype=None, device=None):
        return super().new_caches(batch, max_len, dtype, device)[:1] * len(self.model.layers)


@misconception(
    "DeepSeekForCausalLM",
    "The caches are always float32. In a bfloat16 model they take twice the bytes and meet queries of another dtype.",
)
class DeepSeekForCausalLM__float32_caches(_Model):
    def new_caches(self, batch, max_len, dtype=torch.float32, device=None):
        device = self.lm_head.weight.device if device is None else device
        r, dr = self.cfg.kv_lora_rank, self.cfg.qk_rope_head_dim
        return [LatentCache(batch, max_len, r, dr, dtype=dtype, device=device) for _ in self.model.layers]


@misconception(
    "DeepSeekForCausalLM",
    "Positions are dropped on the way to the layers. Rotations only know distances, so a row that is shifted as a whole "
    "hides it; one with gaps does not.",
)
class DeepSeekForCausalLM__no_positions(_Model):
    def forward(self, tokens, *, positions=None, **kwargs):
        return super().forward(tokens, **kwargs)


@misconception(
    "DeepSeekForCausalLM",
    "The embeddings are multiplied by the root of the width, as in the first transformer. These weights were trained "
    "without it.",
)
class DeepSeekForCausalLM__scaled_embedding(_Model):
    def embed(self, tokens):
        return super().embed(tokens) * self.cfg.hidden_size**0.5


@misconception(
    "DeepSeekForCausalLM",
    "Logits come out in the dtype of the model. A softmax over 100,000 words wants float32.",
)
class DeepSeekForCausalLM__half_logits(_Model):
    def finish(self, logits):
        return logits


@misconception(
    "DeepSeekForCausalLM",
    "A float64 model gives float32 logits: the cast meant for half precision threw away what was there.",
)
class DeepSeekForCausalLM__always_float32(_Model):
    def finish(self, logits):
        return logits.float()


@misconception(
    "DeepSeekForCausalLM",
    "last_only is cut from the logits of all positions: the numbers are right, and the head did the whole work, which for "
    "a long prompt and 129,280 words is most of what it costs.",
)
class DeepSeekForCausalLM__head_on_everything(_Model):
    def forward(self, tokens, *, last_only=False, **kwargs):
        logits = super().forward(tokens, **kwargs)
        return logits[:, -1:] if last_only else logits


@misconception(
    "DeepSeekForCausalLM",
    "With last_only only the last token went through the layers. It has to attend to all the others; what can be left out "
    "is the head of those.",
)
class DeepSeekForCausalLM__last_token_only(_Model):
    def forward(self, tokens, *, last_only=False, **kwargs):
        return super().forward(tokens[:, -1:] if last_only else tokens, last_only=last_only, **kwargs)


# map_keys


def _map(
    names, cfg, *, unknown=None, beyond=None, missing=True, clash=True, prefix=True, frequencies=".rotary_emb.inv_freq"
):
    wanted = list(right._tensor_names(cfg))
    known, found, fed = set(wanted), {}, {}
    beyond = beyond or (lambda number: int(number) >= cfg.num_hidden_layers)
    for name in names:
        target = name
        if prefix and not name.startswith(("model.", "lm_head.")):
            target = "model." + name
        layer = re.match(r"model\.layers\.(\d+)\.", target)
        if layer and beyond(layer[1]):
            found[name] = right.Skip("further ahead")
        elif target.endswith(frequencies):
            found[name] = right.Skip("follows from cfg")
        elif target not in known:
            if unknown is None:
                raise ValueError(f"{name} feeds nothing")
            if unknown:
                found[name] = right.Skip(unknown)
        elif clash and target in fed:
            raise ValueError(f"{name} and {fed[target]}")
        else:
            found[name], fed[target] = target, name
    lost = [name for name in wanted if name not in fed]
    if lost and missing:
        raise ValueError(f"missing {lost if missing is True else lost[0]}")
    return found


@misconception(
    "map_keys",
    "A name that nobody knows is passed over in silence, as strict=False would. If it is a misspelled weight or the scale "
    "of an 8-bit one, the model computes nonsense and nothing says why.",
)
def map_keys__unknown_ignored(names, cfg):
    return _map(names, cfg, unknown="unknown")


@misconception(
    "map_keys",
    "Tensors that the checkpoint lacks are not reported: they would keep their random numbers, and a model with one random "
    "expert of 256 still speaks.",
)
def map_keys__missing_ignored(names, cfg):
    return _map(names, cfg, missing=False)


@misconception(
    "map_keys",
    "Only the first tensor that is missing is named. Whoever downloads shards wants to know all of them at once.",
)
def map_keys__first_missing(names, cfg):
    return _map(names, cfg, missing="first")


@misconception(
    "map_keys",
    "The layer after the last is refused. In the files of V3 it is number 61 of a model with layers 0 to 60, the module "
    "that predicts one token further: leave it out, knowingly and by rule.",
)
def map_keys__extra_layer_refused(names, cfg):
    return _map(names, cfg, beyond=lambda number: False)


@misconception(
    "map_keys",
    "The extra layer is looked for one number too high. Layers count from 0, so the first one beyond has the number "
    "num_hidden_layers.",
)
def map_keys__off_by_one(names, cfg):
    return _map(names, cfg, beyond=lambda number: int(number) > cfg.num_hidden_layers)


@misconception(
    "map_keys",
    "Layer numbers are compared as text, where 10 comes before 3.",
)
def map_keys__numbers_as_text(names, cfg):
    return _map(names, cfg, beyond=lambda number: number >= str(cfg.num_hidden_layers))


@misconception(
    "map_keys",
    "When two names feed one tensor the later one wins. They may hold different numbers, and which one counts then depends "
    "on the order of a file.",
)
def map_keys__last_name_wins(names, cfg):
    return _map(names, cfg, clash=False)


@misconception(
    "map_keys",
    'A checkpoint of the bare model is not understood: its names are the same without "model." in front.',
)
def map_keys__no_prefix(names, cfg):
    return _map(names, cfg, prefix=False)


# read_checkpoint


def _folder(
    directory, *, single_first=False, skip_missing=False, clash=True, agree=True, shards=None, change=lambda x: x
):
    folder = Path(directory)
    index, single = folder / right.INDEX, folder / right.SINGLE
    if not index.exists() and not single.exists():
        raise ValueError(f"neither {right.SINGLE} nor {right.INDEX}")
    if not index.exists() or (single_first and single.exists()):
        return {name: change(tensor) for name, tensor in right._read_file(single).items()}
    said, found, home = json.loads(index.read_text())["weight_map"], {}, {}
    for file in sorted(set(said.values()))[:shards]:
        if not (folder / file).exists():
            if skip_missing:
                said = {name: other for name, other in said.items() if other != file}
                continue
            raise ValueError(f"{file} is missing")
        for name, tensor in right._read_file(folder / file).items():
            if clash and name in found:
                raise ValueError(f"{name} in {file} and {home[name]}")
            found[name], home[name] = change(tensor), file
    wrong = [name for name in {**said, **home} if said.get(name) != home.get(name)]
    if agree and wrong:
        raise ValueError(f"the index is wrong about {wrong}")
    return found


@misconception(
    "read_checkpoint",
    "Every safetensors file in the folder was read. Other files lie there, too: what belongs to the checkpoint is "
    "model.safetensors, or what the index names.",
)
def read_checkpoint__everything(directory):
    folder = Path(directory)
    if not (folder / right.INDEX).exists() and not (folder / right.SINGLE).exists():
        raise ValueError(f"neither {right.SINGLE} nor {right.INDEX}")
    found = right.read_checkpoint(directory)
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


@misconception(
    "read_checkpoint",
    "model.safetensors was read although there is an index. Where an index lies in the folder, it has the say.",
)
def read_checkpoint__single_first(directory):
    return _folder(directory, single_first=True)


@misconception(
    "read_checkpoint",
    "A shard that is not there was passed over. The tensors in it are missing from the result, and the caller cannot know.",
)
def read_checkpoint__missing_shard(directory):
    return _folder(directory, skip_missing=True)


@misconception(
    "read_checkpoint",
    "A tensor that is in two files was taken from the later one. Two downloads may have been mixed up; say so.",
)
def read_checkpoint__later_file_wins(directory):
    return _folder(directory, clash=False)


@misconception(
    "read_checkpoint",
    "Nobody compared the files with the index: a tensor that is not where the index says, or that it does not know, "
    "went unnoticed.",
)
def read_checkpoint__index_not_checked(directory):
    return _folder(directory, agree=False)


@misconception(
    "read_checkpoint",
    "The 16 bits of bfloat16 were read as float16, perhaps on the way through numpy, which has no bfloat16. Both are two "
    "bytes wide, with other exponents: 1.0 becomes 1.875.",
)
def read_checkpoint__bfloat16_as_float16(directory):
    return _folder(directory, change=lambda x: x.view(torch.float16) if x.dtype == torch.bfloat16 else x)


@misconception(
    "read_checkpoint",
    "Everything became float32. That doubles the memory of a bfloat16 checkpoint, and integers are integers no more; "
    "a reader hands over what is in the file.",
)
def read_checkpoint__float32(directory):
    return _folder(directory, change=lambda x: x.float())


# load_pretrained


def _chosen(model, tensors):
    targets = right.map_keys(tensors, model.cfg)
    skipped = [name for name, target in targets.items() if isinstance(target, right.Skip)]
    return {target: tensors[name] for name, target in targets.items() if isinstance(target, str)}, skipped


@misconception(
    "load_pretrained",
    "Wrong tensors were left out and the rest was loaded. What nobody filled keeps its random numbers; strict=False is a "
    "decision to make with the report in hand, not before.",
)
def load_pretrained__not_strict(model, tensors):
    found = load_renamed(
        model,
        {k if k.startswith(("model.", "lm_head")) else f"model.{k}": v for k, v in tensors.items()},
        [],
        strict=False,
    )
    return found


@misconception(
    "load_pretrained",
    "load_state_dict copies whatever fits and complains afterwards: when it raises, half of the model is new and half is "
    "old. Look at everything first.",
)
def load_pretrained__half_loaded(model, tensors):
    chosen, skipped = _chosen(model, tensors)
    try:
        model.load_state_dict(chosen)
    except RuntimeError as error:
        raise ValueError(str(error).replace("torch.Size([", "(").replace("])", ")")) from error
    return right.Report(list(chosen), [], skipped, [])


@misconception(
    "load_pretrained",
    "Everything was cast to the dtype of the model before it was copied. The biases of the routers are float32 in the file "
    "and in the model, and came through bfloat16: three digits are left.",
)
def load_pretrained__cast_first(model, tensors):
    dtype = model.lm_head.weight.dtype
    chosen, skipped = _chosen(model, tensors)
    report = load_renamed(model, {name: tensor.to(dtype) for name, tensor in chosen.items()}, [])
    return report._replace(unexpected=skipped)


@misconception(
    "load_pretrained",
    "gate_proj and up_proj changed places. All shapes are right, nothing is missing, and every network computes "
    "silu(up) * gate.",
)
def load_pretrained__gate_and_up(model, tensors):
    chosen, skipped = _chosen(model, tensors)
    swap = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
    chosen = {re.sub("gate_proj|up_proj", lambda found: swap[found[0]], name): x for name, x in chosen.items()}
    return load_renamed(model, chosen, [])._replace(unexpected=skipped)


@misconception(
    "load_pretrained",
    "The parameters were replaced by the tensors of the checkpoint instead of being filled. An optimizer that was made "
    "before still holds the old ones, and whoever writes to the checkpoint writes to the model.",
)
def load_pretrained__assigned(model, tensors):
    chosen, skipped = _chosen(model, tensors)
    state = model.state_dict()
    for name, tensor in chosen.items():
        if tensor.shape != state[name].shape:
            raise ValueError(f"{name} {tuple(tensor.shape)} {tuple(state[name].shape)}")
    model.load_state_dict({name: x.to(state[name]) for name, x in chosen.items()}, assign=True)
    return right.Report(list(chosen), [], skipped, [])


@misconception(
    "load_pretrained",
    "A matrix that stands on its side was turned until it fitted. Who wrote it so may have meant other things as well; "
    "and a square one would have gone in unturned.",
)
def load_pretrained__turned_to_fit(model, tensors):
    chosen, skipped = _chosen(model, tensors)
    state = model.state_dict()
    fits = {n: x.T if x.dim() == 2 and x.T.shape == state[n].shape != x.shape else x for n, x in chosen.items()}
    return load_renamed(model, fits, [])._replace(unexpected=skipped)


@misconception(
    "load_pretrained",
    "What was skipped is not in the report. Leaving tensors out is fine as long as somebody can read that it happened.",
)
def load_pretrained__skipped_in_silence(model, tensors):
    return load_renamed(model, _chosen(model, tensors)[0], [])


# init_weights_


@torch.no_grad()
def _init(items, std, generator, *, draw=None, bias=0.0, gain=1.0):
    draw = draw or (lambda shape: torch.empty(shape).normal_(0.0, std, generator=generator))
    for name, tensor in items:
        if name.endswith("bias"):
            tensor.fill_(bias)
        elif tensor.dim() == 1:
            tensor.fill_(gain)
        else:
            tensor.copy_(draw(tensor.shape))


def _items(model):
    return sorted(model.state_dict().items())


@misconception(
    "init_weights_",
    "The numbers are uniform. Their spread is right, and their tails are not: none lies beyond two spreads.",
)
def init_weights___uniform(model, std, *, generator):
    edge = math.sqrt(3.0) * std
    _init(
        _items(model), std, generator, draw=lambda shape: torch.empty(shape).uniform_(-edge, edge, generator=generator)
    )


@misconception(
    "init_weights_",
    "std was taken for the variance: the spread you got is its root.",
)
def init_weights___variance(model, std, *, generator):
    _init(_items(model), math.sqrt(std), generator)


@misconception(
    "init_weights_",
    "The tensors are drawn in the order in which the modules were registered. Two models with the same names then differ "
    "because somebody moved a line.",
)
def init_weights___in_order_of_registration(model, std, *, generator):
    _init(model.state_dict().items(), std, generator)


@misconception(
    "init_weights_",
    "The buffers were left as they were. The bias of a router is not a parameter, and an old one goes on choosing experts.",
)
def init_weights___no_buffers(model, std, *, generator):
    _init(sorted(model.named_parameters()), std, generator)


@misconception(
    "init_weights_",
    "The gains of the norms are zero, so that every branch is silent and most gradients are, too. They start at one.",
)
def init_weights___norms_zero(model, std, *, generator):
    _init(_items(model), std, generator, gain=0.0)


@misconception(
    "init_weights_",
    "The generator is set back for each tensor: matrices of one shape come out equal, and all experts are the same expert.",
)
def init_weights___same_numbers(model, std, *, generator):
    start = generator.get_state()

    def draw(shape):
        generator.set_state(start)
        return torch.empty(shape).normal_(0.0, std, generator=generator)

    _init(_items(model), std, generator, draw=draw)


@misconception(
    "init_weights_",
    "The numbers come from torch's global random state; the generator that was handed in is not used.",
)
def init_weights___global(model, std, *, generator):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _init(_items(model), std, generator, draw=lambda shape: torch.empty(shape).normal_(0.0, std))


# from_pretrained


def _pretrained(directory, dtype, device, *, cfg=lambda cfg: cfg, load=True):
    config = json.loads((Path(directory) / "config.json").read_text())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = right.DeepSeekForCausalLM(cfg(DeepSeekConfig.from_dict(config)))
    model.to(device=device, dtype=dtype)
    tensors = right.read_checkpoint(directory)
    if load:
        right.load_pretrained(model, tensors)
    else:
        right.map_keys(tensors, model.cfg)
    return model


@misconception(
    "from_pretrained",
    "The model has the right shapes and random weights: the checkpoint was read, and never copied into it.",
)
def from_pretrained__never_loaded(directory, *, dtype=torch.float32, device=None):
    return _pretrained(directory, dtype, device, load=False)


@misconception(
    "from_pretrained",
    "dtype has no effect: the model is float32 whatever was asked for.",
)
def from_pretrained__no_dtype(directory, *, dtype=torch.float32, device=None):
    return _pretrained(directory, torch.float32, device)


@misconception(
    "from_pretrained",
    "What config.json says about rotary scaling got lost. All weights fit, the first position is right, and the rest "
    "drifts away.",
)
def from_pretrained__no_rope_scaling(directory, *, dtype=torch.float32, device=None):
    def plain(cfg):
        return DeepSeekConfig.from_dict({**cfg.to_dict(), "rope_parameters": {"rope_theta": cfg.rope_theta}})

    return _pretrained(directory, dtype, device, cfg=plain)


@misconception(
    "from_pretrained",
    "The random numbers of the first weights, which are overwritten at once, came from torch's global state: loading a "
    "model changes every draw that follows.",
)
def from_pretrained__global_state(directory, *, dtype=torch.float32, device=None):
    torch.rand(1)
    return _pretrained(directory, dtype, device)


# read_safetensors


def _read(path, *, order="<Q", base=None, unique=True, chain=True, dtypes=right.DTYPES, copy=True, rest=True):
    data = Path(path).read_bytes()
    if len(data) < 8:
        raise ValueError(f"{len(data)} bytes")
    start = 8 + struct.unpack(order, data[:8])[0]
    if start > len(data):
        raise ValueError("it ends in its header")
    header = json.loads(data[8:start], object_pairs_hook=right._without_duplicates if unique else dict)
    header.pop("__metadata__", None)
    body = torch.frombuffer(bytearray(data), dtype=torch.uint8)[start if base is None else base :]
    size = len(data) - start
    found, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = entry["data_offsets"]
        if entry["dtype"] not in dtypes:
            raise ValueError(f"{name}: {entry['dtype']}")
        dtype = dtypes[entry["dtype"]]
        if (first != end and chain) or last - first != math.prod(entry["shape"]) * dtype.itemsize or last > size:
            raise ValueError(f"{name}: {entry}")
        piece = body[first:last]
        found[name] = (piece.clone() if copy or first % 8 else piece).view(dtype).reshape(entry["shape"])
        end = last
    if rest and end != size:
        raise ValueError("bytes are left")
    return found


@misconception(
    "read_safetensors",
    "The length of the header was read with its most significant byte first. It is little-endian, so yours became a number "
    "with eighteen digits.",
)
def read_safetensors__big_endian(path):
    return _read(path, order=">Q")


@misconception(
    "read_safetensors",
    "Offsets were counted from the end of the length, not from the end of the header: your first tensor holds JSON.",
)
def read_safetensors__offsets_from_the_header(path):
    return _read(path, base=8)


@misconception(
    "read_safetensors",
    "BF16 was read as float16. Two bytes both, with another exponent: a one becomes 1.875.",
)
def read_safetensors__bfloat16_as_float16(path):
    return _read(path, dtypes={**right.DTYPES, "BF16": torch.float16})


@misconception(
    "read_safetensors",
    "A name that is in the header twice went through: json keeps the last of two equal keys and says nothing.",
)
def read_safetensors__last_key_wins(path):
    return _read(path, unique=False)


@misconception(
    "read_safetensors",
    "Tensors may overlap or leave gaps: each was only compared with the end of the file. Whoever changes a file by hand "
    "can then show two readers two different models.",
)
def read_safetensors__no_chain(path):
    return _read(path, chain=False)


@misconception(
    "read_safetensors",
    "Bytes after the last tensor went unnoticed. They belong to something, and the header does not say what.",
)
def read_safetensors__rest_ignored(path):
    return _read(path, rest=False)
