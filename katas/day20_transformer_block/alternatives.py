"""Right solutions of day 20, written differently from the reference."""

import torch
from torch import nn
from torch.nn import functional as F

from checker.testing import alternative
from reference import day20_transformer_block as right
from reference.day08_linear_layers import Linear
from reference.day10_losses import cross_entropy
from reference.day14_custom_modules import Dropout, Embedding
from reference.day18_multi_head import MultiHeadAttention


@alternative("LayerNorm")
class LayerNorm__by_var_mean(nn.Module):
    def __init__(self, dim, eps=1e-5, affine=True, bias=True):
        super().__init__()
        self.dim, self.eps = dim, eps
        self.register_parameter("weight", nn.Parameter(torch.ones(dim)) if affine else None)
        self.register_parameter("bias", nn.Parameter(torch.zeros(dim)) if affine and bias else None)

    def forward(self, x):
        if x.dim() == 0 or x.shape[-1] != self.dim:
            raise ValueError(f"x has shape {list(x.shape)}, but {[self.dim]} is needed at its end")
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        variance, mean = torch.var_mean(wide, dim=-1, correction=0, keepdim=True)
        y = (wide - mean) / torch.sqrt(variance + self.eps)
        if self.weight is not None:
            y = torch.mul(y, self.weight.to(y.dtype))
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.type(x.dtype)


@alternative("LayerNorm")
class LayerNorm__by_sums(right.LayerNorm):
    def forward(self, x):
        if tuple(x.shape[-1:]) != (self.dim,):
            raise ValueError(f"{tuple(x.shape)} does not end in {(self.dim,)}")
        wide = x if x.dtype == torch.float64 else x.to(torch.float32)
        wide = wide - wide.sum(-1, keepdim=True) / self.dim
        wide = wide * (wide.pow(2).sum(-1, keepdim=True) / self.dim + self.eps) ** -0.5
        weight = 1 if self.weight is None else self.weight
        bias = 0 if self.bias is None else self.bias
        return (wide * weight + bias).to(x.dtype)


@alternative("FeedForward")
class FeedForward__in_a_row(nn.Module):
    def __init__(self, d_model, d_ff, activation="gelu", dropout=0.0, bias=True):
        super().__init__()
        match activation:
            case "relu":
                self.act = F.relu
            case "gelu":
                self.act = F.gelu
            case "silu":
                self.act = F.silu
            case _:
                raise ValueError(f"no activation is called {activation}")
        self.up_proj, self.down_proj = Linear(d_model, d_ff, bias=bias), Linear(d_ff, d_model, bias=bias)
        self.dropout = Dropout(dropout)

    def forward(self, x):
        x = self.up_proj(x)
        x = self.act(x)
        x = self.dropout(x)
        return self.down_proj(x)


@alternative("TransformerBlock")
class TransformerBlock__by_a_helper(nn.Module):
    def __init__(self, d_model, n_heads, d_ff, *, norm_first=True, activation="relu", dropout=0.0, bias=True):
        super().__init__()
        self.attention = MultiHeadAttention(d_model, n_heads, bias=bias)
        self.feed_forward = right.FeedForward(d_model, d_ff, activation=activation, dropout=dropout, bias=bias)
        self.norm1, self.norm2 = right.LayerNorm(d_model, bias=bias), right.LayerNorm(d_model, bias=bias)
        self.drop1, self.drop2 = Dropout(dropout), Dropout(dropout)
        self.norm_first = norm_first

    def forward(self, x, mask=None, **options):
        options = options if mask is None else {**options, "mask": mask}
        x = self._branch(x, lambda y: self.drop1(self.attention(y, **options)), self.norm1)
        return self._branch(x, lambda y: self.drop2(self.feed_forward(y)), self.norm2)

    def _branch(self, x, branch, norm):
        return x + branch(norm(x)) if self.norm_first else norm(x + branch(x))


@alternative("from_torch_layer")
def from_torch_layer__by_hand(layer):
    names = {F.relu: "relu", F.gelu: "gelu", F.silu: "silu"}
    activation = names.get(layer.activation)
    if activation is None:
        raise ValueError(f"unknown activation {layer.activation!r}")
    F_, D = layer.linear1.weight.shape
    options = {"norm_first": layer.norm_first, "activation": activation, "dropout": layer.dropout1.p}
    with torch.random.fork_rng(devices=[]):
        block = right.TransformerBlock(D, layer.self_attn.num_heads, F_, bias=layer.linear1.bias is not None, **options)
    block.to(device=layer.linear1.weight.device, dtype=layer.linear1.weight.dtype)
    ours, theirs = dict(block.named_parameters()), dict(layer.named_parameters())
    with torch.no_grad():
        for kind in ("weight", "bias"):
            if kind == "bias" and layer.linear1.bias is None:
                continue
            fused = theirs[f"self_attn.in_proj_{kind}"]
            for i, part in enumerate("qkv"):
                ours[f"attention.{part}_proj.{kind}"].copy_(fused[i * D : (i + 1) * D])
            ours[f"attention.o_proj.{kind}"].copy_(theirs[f"self_attn.out_proj.{kind}"])
            ours[f"feed_forward.up_proj.{kind}"].copy_(theirs[f"linear1.{kind}"])
            ours[f"feed_forward.down_proj.{kind}"].copy_(theirs[f"linear2.{kind}"])
            for norm in ("norm1", "norm2"):
                ours[f"{norm}.{kind}"].copy_(theirs[f"{norm}.{kind}"])
    block.norm1.eps, block.norm2.eps = layer.norm1.eps, layer.norm2.eps
    return block.train(layer.training)


@alternative("RotaryAttention")
class RotaryAttention__by_einsum(nn.Module):
    def __init__(self, d_model, n_heads, *, base=10000.0, bias=False):
        super().__init__()
        if d_model % n_heads or (d_model // n_heads) % 2:
            raise ValueError(f"{n_heads} heads of an even width do not make {d_model}")
        self.n_heads, self.width, self.base = n_heads, d_model // n_heads, base
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, Linear(d_model, d_model, bias=bias))

    def forward(self, x, mask=None, *, positions=None):
        B, T, D = x.shape
        positions = torch.arange(T, device=x.device) if positions is None else positions
        if tuple(positions.shape) != (T,) and tuple(positions.shape) != (B, T):
            raise ValueError(f"positions have shape {tuple(positions.shape)}, not {(T,)} or {(B, T)}")
        heads = (B, T, self.n_heads, self.width)
        q, k, v = (layer(x).view(heads) for layer in (self.q_proj, self.k_proj, self.v_proj))
        frequencies = self.base ** (-torch.arange(0, self.width, 2, device=x.device) / self.width)
        angles = (positions.float()[..., None] * frequencies)[..., None, :]  # (T or B T, 1, Dh/2)
        wide = torch.promote_types(x.dtype, torch.float32)
        q, k = self._turn(q.to(wide), angles), self._turn(k.to(wide), angles)
        scores = torch.einsum("bthd,bshd->bhts", q, k) * self.width**-0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        weights = scores.softmax(-1)
        out = torch.einsum("bhts,bshd->bthd", weights, v.to(wide))
        return self.o_proj(out.reshape(B, T, D).to(x.dtype))

    @staticmethod
    def _turn(x, angles):
        cos, sin = angles.cos(), angles.sin()
        turned = torch.empty_like(x)
        turned[..., 0::2] = x[..., 0::2] * cos - x[..., 1::2] * sin
        turned[..., 1::2] = x[..., 0::2] * sin + x[..., 1::2] * cos
        return turned


@alternative("DecoderLM")
class DecoderLM__with_a_triangle(nn.Module):
    def __init__(self, vocab, d_model, n_layers, n_heads, d_ff, max_len, *, positions="learned", tie=True, bias=True):
        super().__init__()
        if positions == "learned":
            self.position_embedding = Embedding(max_len, d_model)
            self.position_embedding.weight.data.normal_(0, 0.02)
        elif positions == "rope":
            self.position_embedding = None
        else:
            raise ValueError(f"what are {positions} positions?")
        self.rope, self.max_len = positions == "rope", max_len
        self.embedding = Embedding(vocab, d_model)
        self.embedding.weight.data.normal_(0, 0.02)
        self.head = Linear(d_model, vocab, bias=False)
        if tie:
            self.head.weight = self.embedding.weight
        else:
            self.head.weight.data.normal_(0, 0.02)
        self.blocks = nn.ModuleList()
        for _ in range(n_layers):
            block = right.TransformerBlock(d_model, n_heads, d_ff, activation="gelu", bias=bias)
            if self.rope:
                block.attention = right.RotaryAttention(d_model, n_heads, bias=bias)
            self.blocks.append(block)
        self.norm = right.LayerNorm(d_model, bias=bias)

    def forward(self, tokens, *, positions=None, mask=None):
        B, T = tokens.shape
        if T > self.max_len:
            raise ValueError(f"{T} > {self.max_len}")
        if positions is None:
            positions = torch.arange(T, device=tokens.device)
        if list(positions.shape) not in ([T], [B, T]):
            raise ValueError(f"positions {list(positions.shape)}, wanted {[T]} or {[B, T]}")
        allowed = torch.ones(T, T, dtype=torch.bool, device=tokens.device).tril()
        allowed = allowed if mask is None else allowed & mask
        x = self.embedding(tokens)
        if not self.rope:
            x = self.position_embedding(positions) + x
        for block in self.blocks:
            x = block(x, allowed, positions=positions) if self.rope else block(x, mask=allowed)
        return self.norm(x) @ self.head.weight.T


@alternative("residual_norms")
def residual_norms__by_one_kind_of_hook(model, tokens):
    sizes = {}

    def look(index):
        def hook(block, args, output):
            for place, x in ((index, args[0]), (index + 1, output)):
                x = x if x.dtype == torch.float64 else x.float()
                sizes[place] = torch.linalg.vector_norm(x.detach()) / x.numel() ** 0.5

        return hook

    before = {module: module.training for module in model.modules()}
    handles = [block.register_forward_hook(look(i)) for i, block in enumerate(model.blocks)]
    try:
        with torch.no_grad():
            model.eval()
            model(tokens)
    finally:
        [handle.remove() for handle in handles]
        for module, training in before.items():
            module.training = training
    return torch.stack([sizes[i] for i in range(len(sizes))])


@alternative("train_tiny_lm")
def train_tiny_lm__by_slices(model, tokens, optimizer, *, steps, batch=16, context=32, generator):
    n = tokens.shape[0]
    if n < context + 1:
        raise ValueError(f"a text of {n} is too short for {context}")
    model.train()
    losses = []
    for _ in range(steps):
        starts = torch.randint(n - context, (batch,), generator=generator).tolist()
        inputs = torch.stack([tokens[s : s + context] for s in starts])
        targets = torch.stack([tokens[s + 1 : s + context + 1] for s in starts])
        optimizer.zero_grad()
        loss = cross_entropy(model(inputs), targets)
        loss.backward()
        norm = sum(p.grad.square().sum() for p in model.parameters()) ** 0.5
        if norm > 1:
            for parameter in model.parameters():
                parameter.grad /= norm
        optimizer.step()
        losses.append(float(loss))
    return losses


class _Step(torch.autograd.Function):
    """All layers, with gradients by .backward() into leaves of their own."""

    @staticmethod
    def forward(ctx, layers, x1, x2, *parameters):
        for f, g in layers:
            x1 = x1 + f(x2)
            x2 = x2 + g(x1)
        ctx.layers, ctx.parameters = layers, parameters
        ctx.save_for_backward(x1, x2)
        return x1, x2

    @staticmethod
    def backward(ctx, d1, d2):
        y1, y2 = ctx.saved_tensors
        totals = [None] * len(ctx.parameters)
        for f, g in ctx.layers[::-1]:
            for branch in (g, f):
                used = [i for i, p in enumerate(ctx.parameters) if any(p is q for q in branch.parameters())]
                with torch.enable_grad():
                    leaf = y1.detach().requires_grad_()
                    said = branch(leaf)
                dx, *grads = torch.autograd.grad(said, [leaf, *(ctx.parameters[i] for i in used)], d2)
                for i, grad in zip(used, grads, strict=True):
                    totals[i] = grad if totals[i] is None else totals[i] + grad
                # the streams change roles: next is f, which read what has just been restored
                y1, y2, d1, d2 = y2 - said.detach(), y1, d2, d1 + dx
        return None, d1, d2, *totals


@alternative("ReversibleStack")
class ReversibleStack__streams_that_change_roles(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.f, self.g = nn.ModuleList(), nn.ModuleList()
        for f, g in layers:
            self.f.append(f)
            self.g.append(g)

    def forward(self, x1, x2):
        if tuple(x1.shape) != tuple(x2.shape):
            raise ValueError(f"{tuple(x1.shape)} and {tuple(x2.shape)}")
        layers = list(zip(self.f, self.g, strict=True))
        return _Step.apply(layers, x1, x2, *(p for p in self.parameters() if p.requires_grad))

    def inverse(self, y1, y2):
        with torch.no_grad():
            for i in range(len(self.f) - 1, -1, -1):
                y2 = y2 - self.g[i](y1)
                y1 = y1 - self.f[i](y2)
        return y1, y2
