"""The transformer block: normalize, attend, add; normalize, transform, add. And a language model made of such blocks.

Layer normalization: Ba, Kiros and Hinton 2016 (arXiv:1607.06450), equations 3 and 4. The block: section 3 of Vaswani
et al. 2017 (arXiv:1706.03762); Xiong et al. 2020 (arXiv:2002.04745) compare its two places for the norm. The model is
GPT-2 (Radford et al. 2019, section 2.3) with learned positions or rotary ones, and with one matrix for reading and
writing tokens (Press and Wolf 2017, arXiv:1608.05859). Reversible layers: Gomez et al. 2017 (arXiv:1707.04585),
equation 8; Kitaev et al. 2020 (arXiv:2001.04451), section 3, for transformers.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from reference.day01_tensor_basics import merge_heads, split_heads
from reference.day06_training_loop import train_step
from reference.day08_linear_layers import Linear
from reference.day09_activations import gelu, relu, silu
from reference.day10_losses import cross_entropy
from reference.day14_custom_modules import Dropout, Embedding, load_renamed
from reference.day16_scaled_dot_product import attention, causal_mask, combine_masks
from reference.day18_multi_head import MultiHeadAttention, from_torch
from reference.day19_positions import apply_rope, rope_tables

ACTIVATIONS = {"relu": relu, "gelu": gelu, "silu": silu}
TORCH_NAMES = {F.relu: "relu", F.gelu: "gelu", F.silu: "silu"}
EMBEDDING_STD = 0.02


class LayerNorm(nn.Module):
    """Each vector by itself: minus its mean, over its standard deviation, times a weight, plus a bias."""

    def __init__(self, dim: int, eps: float = 1e-5, affine: bool = True, bias: bool = True):
        super().__init__()
        self.dim, self.eps = dim, eps
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if affine and bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x (..., dim): float32 inside at least, back to the dtype of x at the end."""
        if x.shape[-1:] != (self.dim,):
            raise ValueError(f"x {tuple(x.shape)} does not end in the width ({self.dim},)")
        wide = _at_least_float32(x)
        centered = wide - wide.mean(-1, keepdim=True)  # (..., dim)
        variance = centered.square().mean(-1, keepdim=True)  # (..., 1)
        y = centered * torch.rsqrt(variance + self.eps)  # (..., dim)
        if self.weight is not None:
            y = y * self.weight
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype)


class FeedForward(nn.Module):
    """Two linear maps, D to F and back, with an activation between them: the same for every token."""

    def __init__(self, d_model: int, d_ff: int, activation: str = "gelu", dropout: float = 0.0, bias: bool = True):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation {activation!r} is none of {', '.join(ACTIVATIONS)}")
        self.activation = activation
        self.up_proj = Linear(d_model, d_ff, bias)
        self.down_proj = Linear(d_ff, d_model, bias)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        hidden = ACTIVATIONS[self.activation](self.up_proj(x))  # (..., F)
        return self.down_proj(self.dropout(hidden))  # (..., D)


class TransformerBlock(nn.Module):
    """Two residual branches: attention moves between tokens, the feed-forward network works on each of them."""

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        d_ff: int,
        *,
        norm_first: bool = True,
        activation: str = "relu",
        dropout: float = 0.0,
        bias: bool = True,
    ):
        super().__init__()
        self.norm_first = norm_first
        self.norm1 = LayerNorm(d_model, bias=bias)
        self.attention = MultiHeadAttention(d_model, n_heads, bias=bias)
        self.norm2 = LayerNorm(d_model, bias=bias)
        self.feed_forward = FeedForward(d_model, d_ff, activation, dropout, bias)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None, **options) -> Tensor:
        """Map x (B, T, D) to (B, T, D); `mask`, if there is one, and `options` are for the attention."""
        if mask is not None:
            options["mask"] = mask
        if self.norm_first:
            x = x + self.dropout(self.attention(self.norm1(x), **options))  # (B, T, D)
            return x + self.dropout(self.feed_forward(self.norm2(x)))
        x = self.norm1(x + self.dropout(self.attention(x, **options)))  # (B, T, D)
        return self.norm2(x + self.dropout(self.feed_forward(x)))


@torch.no_grad()
def from_torch_layer(layer: nn.TransformerEncoderLayer) -> TransformerBlock:
    """Return the TransformerBlock that computes what torch's layer does."""
    if layer.activation not in TORCH_NAMES:
        raise ValueError(f"activation {layer.activation} is none of {', '.join(ACTIVATIONS)}")
    with torch.device("meta"):  # numbers that are replaced at once need not be drawn
        block = TransformerBlock(
            layer.self_attn.embed_dim,
            layer.self_attn.num_heads,
            layer.linear1.out_features,
            norm_first=layer.norm_first,
            activation=TORCH_NAMES[layer.activation],
            dropout=layer.dropout.p,
            bias=layer.linear1.bias is not None,
        )
    block.norm1.eps, block.norm2.eps = layer.norm1.eps, layer.norm2.eps
    tensors = {name: t for name, t in layer.state_dict().items() if not name.startswith("self_attn.")}
    tensors |= {f"attention.{name}": t for name, t in from_torch(layer.self_attn).state_dict().items()}
    weight = layer.linear1.weight
    block.to(weight.dtype).to_empty(device=weight.device)
    load_renamed(block, tensors, [("^linear1", "feed_forward.up_proj"), ("^linear2", "feed_forward.down_proj")])
    return block.train(layer.training)


class RotaryAttention(nn.Module):
    """Multi-head self-attention whose queries and keys are rotated by where they stand."""

    def __init__(self, d_model: int, n_heads: int, *, base: float = 10000.0, bias: bool = False):
        super().__init__()
        if d_model % (2 * n_heads):
            raise ValueError(f"d_model {d_model} does not divide into {n_heads} heads of an even width")
        self.n_heads, self.base = n_heads, base
        self.q_proj = Linear(d_model, d_model, bias)
        self.k_proj = Linear(d_model, d_model, bias)
        self.v_proj = Linear(d_model, d_model, bias)
        self.o_proj = Linear(d_model, d_model, bias)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, positions: Tensor | None = None) -> Tensor:
        """Map x (B, T, D) to (B, T, D); token t stands at positions[..., t]."""
        B, T, _ = x.shape
        if positions is None:
            positions = torch.arange(T, device=x.device)
        _check_positions(positions, B, T)
        q, k, v = (split_heads(layer(x), self.n_heads) for layer in (self.q_proj, self.k_proj, self.v_proj))
        tables = rope_tables(positions, q.shape[-1], self.base)  # (T, Dh/2) or (B, T, Dh/2), twice
        out, _ = attention(apply_rope(q, *tables), apply_rope(k, *tables), v, mask)  # (B, H, T, Dh)
        return self.o_proj(merge_heads(out))  # (B, T, D)


class DecoderLM(nn.Module):
    """A language model: tokens to vectors, causal blocks, a last norm, and a score for every next token."""

    def __init__(
        self,
        vocab: int,
        d_model: int,
        n_layers: int,
        n_heads: int,
        d_ff: int,
        max_len: int,
        *,
        positions: str = "learned",
        tie: bool = True,
        bias: bool = True,
    ):
        super().__init__()
        if positions not in ("learned", "rope"):
            raise ValueError(f"positions {positions!r} is neither 'learned' nor 'rope'")
        self.max_len = max_len
        self.embedding = Embedding(vocab, d_model)
        self.position_embedding = Embedding(max_len, d_model) if positions == "learned" else None
        self.blocks = nn.ModuleList(
            TransformerBlock(d_model, n_heads, d_ff, activation="gelu", bias=bias) for _ in range(n_layers)
        )
        if positions == "rope":
            for block in self.blocks:
                block.attention = RotaryAttention(d_model, n_heads, bias=bias)
        self.norm = LayerNorm(d_model, bias=bias)
        self.head = Linear(d_model, vocab, bias=False)
        for table in (self.embedding, self.position_embedding, self.head):
            if table is not None:
                nn.init.normal_(table.weight, std=EMBEDDING_STD)
        if tie:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, *, positions: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Map tokens (B, T) to logits (B, T, V): those at t score the token at t + 1."""
        B, T = tokens.shape
        if T > self.max_len:
            raise ValueError(f"{T} tokens are more than max_len {self.max_len}")
        if positions is None:
            positions = torch.arange(T, device=tokens.device)
        _check_positions(positions, B, T)
        x = self.embedding(tokens)  # (B, T, D)
        options = {}
        if self.position_embedding is None:
            options["positions"] = positions
        else:
            x = x + self.position_embedding(positions)  # (B, T, D)
        mask = combine_masks(causal_mask(T, T, device=tokens.device), mask)  # (T, T) or (B, 1, T, T)
        for block in self.blocks:
            x = block(x, mask, **options)
        return self.head(self.norm(x))  # (B, T, V)


@torch.no_grad()
def residual_norms(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the root mean square of the stream before the first block and after each, (n_layers + 1,)."""
    found = []

    def before(block: nn.Module, args: tuple) -> None:
        found.append(_root_mean_square(args[0]))

    def after(block: nn.Module, args: tuple, output: Tensor) -> None:
        found.append(_root_mean_square(output))

    modes = [(module, module.training) for module in model.modules()]
    handles = [block.register_forward_hook(after) for block in model.blocks]
    handles.append(model.blocks[0].register_forward_pre_hook(before))
    try:
        model.eval()
        model(tokens)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    return torch.stack(found)


def train_tiny_lm(
    model: nn.Module,
    tokens: Tensor,
    optimizer: Optimizer,
    *,
    steps: int,
    batch: int = 16,
    context: int = 32,
    generator: torch.Generator,
) -> list[float]:
    """Train on random windows of one text, tokens (N,); the loss of each step."""
    if len(tokens) <= context:
        raise ValueError(f"{len(tokens)} tokens have no window of {context} and a token after it")
    losses = []
    for _ in range(steps):
        starts = torch.randint(len(tokens) - context, (batch,), generator=generator)
        windows = tokens[starts[:, None] + torch.arange(context + 1)]  # (batch, context + 1)
        inputs, targets = windows[:, :-1], windows[:, 1:]  # (batch, context)
        losses.append(train_step(model, (inputs, targets), cross_entropy, optimizer, max_norm=1.0))
    return losses


class ReversibleStack(nn.Module):
    """Layers y1 = x1 + f(x2), y2 = x2 + g(y1), whose inputs are computed again from their outputs in backward."""

    def __init__(self, layers: Iterable[tuple[nn.Module, nn.Module]]):
        super().__init__()
        fs, gs = zip(*layers, strict=True)
        self.f, self.g = nn.ModuleList(fs), nn.ModuleList(gs)

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        """Send both streams through all layers; nothing but the result is kept."""
        if x1.shape != x2.shape:
            raise ValueError(f"x1 {tuple(x1.shape)} and x2 {tuple(x2.shape)} must have one shape")
        return _Reversible.apply(self, x1, x2, *self.parameters())

    @torch.no_grad()
    def inverse(self, y1: Tensor, y2: Tensor) -> tuple[Tensor, Tensor]:
        """Return the streams (x1, x2) that `forward` maps to (y1, y2)."""
        for f, g in reversed(_layers(self)):
            y2 = y2 - g(y1)
            y1 = y1 - f(y2)
        return y1, y2


class _Reversible(torch.autograd.Function):
    """All layers of a ReversibleStack as one operation that keeps its two results."""

    @staticmethod
    def forward(ctx, stack, x1, x2, *parameters):
        """Run without a graph; the parameters are arguments only so that they get gradients."""
        for f, g in _layers(stack):
            x1 = x1 + f(x2)
            x2 = x2 + g(x1)
        ctx.stack, ctx.parameters = stack, parameters
        ctx.save_for_backward(x1, x2)
        return x1, x2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d1, d2):
        """Undo one branch after the other, with a graph that lives as long as the branch is looked at."""
        y1, y2 = ctx.saved_tensors
        grads = {id(p): torch.zeros_like(p) for p in ctx.parameters}
        for f, g in reversed(_layers(ctx.stack)):
            y2, d1 = _undo(g, y1, y2, d1, d2, grads)
            y1, d2 = _undo(f, y2, y1, d2, d1, grads)
        return None, d1, d2, *grads.values()


def _layers(stack: ReversibleStack) -> list[tuple[nn.Module, nn.Module]]:
    return list(zip(stack.f, stack.g, strict=True))


def _undo(branch, source, target, d_source, d_target, grads):
    """For target = before + branch(source): return (before, gradient at source), and add to the parameters' grads."""
    trained = [p for p in branch.parameters() if p.requires_grad]
    with torch.enable_grad():
        source = source.detach().requires_grad_()
        update = branch(source)
    d_update, *d_trained = torch.autograd.grad(update, [source, *trained], d_target)
    for parameter, grad in zip(trained, d_trained, strict=True):
        grads[id(parameter)] += grad
    return target - update, d_source + d_update


def _check_positions(positions: Tensor, B: int, T: int) -> None:
    """Raise ValueError unless there is a position for each token, or for each place that all rows share."""
    if positions.shape not in ((T,), (B, T)):
        raise ValueError(f"positions {tuple(positions.shape)} are neither {(T,)} nor {(B, T)}")


def _root_mean_square(x: Tensor) -> Tensor:
    return _at_least_float32(x).square().mean().sqrt()


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
