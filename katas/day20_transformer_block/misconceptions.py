"""Known wrong solutions of day 20, each with what its numbers say."""

import torch
from torch import nn
from torch.nn import functional as F

from checker.testing import misconception
from reference import day20_transformer_block as right
from reference.day01_tensor_basics import merge_heads, split_heads
from reference.day06_training_loop import clip_grad_norm_
from reference.day10_losses import cross_entropy
from reference.day16_scaled_dot_product import attention, causal_mask, combine_masks
from reference.day19_positions import apply_rope, apply_rope_half, rope_tables


def _wide(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


# LayerNorm


class _Norm(right.LayerNorm):
    """What all of these share: the check, float32 inside, the affine end. `normed` is what they get wrong."""

    def forward(self, x):
        if x.shape[-1:] != (self.dim,):
            raise ValueError(f"x {tuple(x.shape)}, width ({self.dim},)")
        y = self.normed(_wide(x))
        y = y if self.weight is None else y * self.weight
        y = y if self.bias is None else y + self.bias
        return y.to(x.dtype)

    def normed(self, x):
        centered = x - x.mean(-1, keepdim=True)
        return centered / (centered.square().mean(-1, keepdim=True) + self.eps).sqrt()


@misconception(
    "LayerNorm",
    "Your variance divides by dim - 1. That is the estimate for a sample, and `var` and `std` of torch do it unless told "
    "otherwise; a layer norm wants the plain mean of the squares. For [1, 0, 0, 0] the difference is 1.50 against 1.73.",
)
class LayerNorm__sample_variance(_Norm):
    def normed(self, x):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + self.eps).sqrt()


@misconception(
    "LayerNorm",
    "eps was added to the standard deviation, after the root. Inside of the root 1e-5 counts like a spread of 0.003, outside "
    "like one of 0.00001; where the numbers are small the two layers have little in common.",
)
class LayerNorm__eps_after_the_root(_Norm):
    def normed(self, x):
        centered = x - x.mean(-1, keepdim=True)
        return centered / (centered.square().mean(-1, keepdim=True).sqrt() + self.eps)


@misconception(
    "LayerNorm",
    "Two things at once: the standard deviation is that of a sample, over dim - 1, and eps is added to it after the root. This "
    "version is in a well-known tutorial, and it is not the layer that everybody else trains.",
)
class LayerNorm__as_in_a_tutorial(_Norm):
    def normed(self, x):
        return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + self.eps)


@misconception(
    "LayerNorm",
    "Mean and variance run over the first axis here. That mixes the sequences of a batch: what a token becomes would depend on "
    "who else is in the batch.",
)
class LayerNorm__over_the_batch(_Norm):
    def normed(self, x):
        centered = x - x.mean(0, keepdim=True)
        return centered / (centered.square().mean(0, keepdim=True) + self.eps).sqrt()


@misconception(
    "LayerNorm",
    "You normalize tokens and features together, over the last two axes. Each token stands by itself: its numbers must not "
    "change because its neighbors do, and in a language model this would let the future look in.",
)
class LayerNorm__over_tokens_too(_Norm):
    def normed(self, x):
        axes = (-2, -1) if x.dim() > 1 else (-1,)
        centered = x - x.mean(axes, keepdim=True)
        return centered / (centered.square().mean(axes, keepdim=True) + self.eps).sqrt()


@misconception(
    "LayerNorm",
    "The variance is the mean of the squares minus the square of the mean. On paper that is the same; around a million both are "
    "10^12, and the digits in which they differ are gone. Square the distances from the mean instead.",
)
class LayerNorm__mean_of_squares_minus_square(_Norm):
    def normed(self, x):
        mean = x.mean(-1, keepdim=True)
        return (x - mean) / (x.square().mean(-1, keepdim=True) - mean.square() + self.eps).sqrt()


@misconception(
    "LayerNorm",
    "The mean is never subtracted: this is day 14's RMSNorm. A vector of equal numbers comes out as ones instead of zeros.",
)
class LayerNorm__no_mean(_Norm):
    def normed(self, x):
        return x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt()


@misconception(
    "LayerNorm",
    "In half precision you count in half precision. Squares of 300 do not fit into float16, and bfloat16 rounds the mean to three "
    "digits: widen first, and round once at the end.",
)
class LayerNorm__half_stays_half(right.LayerNorm):
    def forward(self, x):
        if x.shape[-1:] != (self.dim,):
            raise ValueError(f"x {tuple(x.shape)}, width ({self.dim},)")
        centered = x - x.mean(-1, keepdim=True)
        y = centered / (centered.square().mean(-1, keepdim=True) + self.eps).sqrt()
        y = y if self.weight is None else y * self.weight
        return (y if self.bias is None else y + self.bias).to(x.dtype)


@misconception(
    "LayerNorm",
    "Everything goes through float32, float64 as well. Half of the digits of a double are lost there, and finite differences "
    "see it. Widen what is narrow, and leave what is wide.",
)
class LayerNorm__always_float32(_Norm):
    def normed(self, x):
        return super().normed(x.float())


@misconception(
    "LayerNorm",
    "The values are right, the gradient of x is not: mean and variance were cut out of the graph. Each number of a vector moves "
    "them, and so moves all others.",
)
class LayerNorm__statistics_detached(_Norm):
    def normed(self, x):
        mean = x.mean(-1, keepdim=True).detach()
        variance = (x - mean).square().mean(-1, keepdim=True).detach()
        return (x - mean) / (variance + self.eps).sqrt()


@misconception(
    "LayerNorm",
    "A vector of another width gets through: with a width of 1 it is stretched over the weight, and without weights nobody ever "
    "asks. Compare the last axis with dim before anything else.",
)
class LayerNorm__width_not_checked(_Norm):
    def forward(self, x):
        y = self.normed(_wide(x))
        y = y if self.weight is None else y * self.weight
        return (y if self.bias is None else y + self.bias).to(x.dtype)


# FeedForward


@misconception(
    "FeedForward",
    "The activation comes after the second map. Then the network could only add what an activation lets through, almost nothing "
    "below zero, and the two maps before it would be a single one.",
)
class FeedForward__activation_last(right.FeedForward):
    def forward(self, x):
        return right.ACTIVATIONS[self.activation](self.down_proj(self.dropout(self.up_proj(x))))


@misconception(
    "FeedForward",
    "After the second map there is one more activation. A branch must be able to add anything to the stream, negative numbers "
    "too.",
)
class FeedForward__activation_twice(right.FeedForward):
    def forward(self, x):
        return right.ACTIVATIONS[self.activation](super().forward(x))


@misconception(
    "FeedForward",
    "Nothing bends between the two maps. Two linear maps in a row are one linear map, whatever d_ff is.",
)
class FeedForward__no_activation(right.FeedForward):
    def forward(self, x):
        return self.down_proj(self.dropout(self.up_proj(x)))


@misconception(
    "FeedForward",
    "This is the gelu with the tanh. It is off by a few 1e-4, which is enough to miss a checkpoint of the exact one. GPT-2 was "
    "trained with this one, torch's 'gelu' is the other.",
)
class FeedForward__gelu_by_tanh(right.FeedForward):
    def forward(self, x):
        if self.activation != "gelu":
            return super().forward(x)
        return self.down_proj(self.dropout(F.gelu(self.up_proj(x), approximate="tanh")))


@misconception(
    "FeedForward",
    "Dropout falls on the result of down_proj, on D numbers instead of F. There its bias is dropped as well, and the block "
    "around it will drop these numbers once more.",
)
class FeedForward__dropout_at_the_end(right.FeedForward):
    def forward(self, x):
        return self.dropout(self.down_proj(right.ACTIVATIONS[self.activation](self.up_proj(x))))


@misconception(
    "FeedForward",
    "Your dropout does not know about eval mode: numbers are still dropped when the model is supposed to answer. As a function "
    "it has to be told, as a module it listens to train() and eval().",
)
class FeedForward__drops_in_eval(right.FeedForward):
    def forward(self, x):
        hidden = right.ACTIVATIONS[self.activation](self.up_proj(x))
        return self.down_proj(F.dropout(hidden, self.dropout.p, training=True))


@misconception(
    "FeedForward",
    "A word that names no activation is taken for gelu. A typo in a config would train another model than it says, without a "
    "sound.",
)
class FeedForward__unknown_is_gelu(right.FeedForward):
    def __init__(self, d_model, d_ff, activation="gelu", dropout=0.0, bias=True):
        super().__init__(d_model, d_ff, activation if activation in right.ACTIVATIONS else "gelu", dropout, bias)


# TransformerBlock


class _Block(right.TransformerBlock):
    """Hands the mask on as it should be. `run` is what they get wrong."""

    def forward(self, x, mask=None, **options):
        if mask is not None:
            options["mask"] = mask
        return self.run(x, lambda y: self.attention(y, **options))

    def run(self, x, attend):
        drop, feed = self.dropout, self.feed_forward
        if self.norm_first:
            x = x + drop(attend(self.norm1(x)))
            return x + drop(feed(self.norm2(x)))
        x = self.norm1(x + drop(attend(x)))
        return self.norm2(x + drop(feed(x)))


@misconception(
    "TransformerBlock",
    "You add the branch to the *normalized* x, so the stream itself goes through every norm. Pre-norm gives a normalized copy to "
    "the branch and leaves the stream alone. Torch's own layer had this mistake in one release.",
)
class TransformerBlock__residual_from_the_norm(_Block):
    def run(self, x, attend):
        if not self.norm_first:
            return super().run(x, attend)
        x = self.norm1(x)
        x = x + self.dropout(attend(x))
        x = self.norm2(x)
        return x + self.dropout(self.feed_forward(x))


@misconception(
    "TransformerBlock",
    "norm_first is ignored: the norm comes before the branch in both cases.",
)
class TransformerBlock__always_pre_norm(_Block):
    def run(self, x, attend):
        x = x + self.dropout(attend(self.norm1(x)))
        return x + self.dropout(self.feed_forward(self.norm2(x)))


@misconception(
    "TransformerBlock",
    "norm_first is ignored: the norm comes after the sum in both cases, as in the paper of 2017.",
)
class TransformerBlock__always_post_norm(_Block):
    def run(self, x, attend):
        x = self.norm1(x + self.dropout(attend(x)))
        return self.norm2(x + self.dropout(self.feed_forward(x)))


@misconception(
    "TransformerBlock",
    "In post-norm you normalize the branch and then add it. The norm stands after the sum: only so is what leaves the block "
    "of size 1.",
)
class TransformerBlock__norm_of_the_branch(_Block):
    def run(self, x, attend):
        if self.norm_first:
            return super().run(x, attend)
        x = x + self.norm1(self.dropout(attend(x)))
        return x + self.norm2(self.dropout(self.feed_forward(x)))


@misconception(
    "TransformerBlock",
    "One LayerNorm serves both branches. It is one set of weights under two names, so loading the second overwrites the first, "
    "and training pulls it in two directions.",
)
class TransformerBlock__one_norm(_Block):
    def __init__(self, d_model, n_heads, d_ff, **options):
        super().__init__(d_model, n_heads, d_ff, **options)
        self.norm2 = self.norm1


@misconception(
    "TransformerBlock",
    "There is no sum with x: what a branch does not say is lost, and the gradient has no way around it.",
)
class TransformerBlock__no_residual(_Block):
    def run(self, x, attend):
        drop, feed = self.dropout, self.feed_forward
        if self.norm_first:
            return drop(feed(self.norm2(drop(attend(self.norm1(x))))))
        return self.norm2(drop(feed(self.norm1(drop(attend(x))))))


@misconception(
    "TransformerBlock",
    "Both branches read the same x and are added together. Such parallel blocks exist, but here the feed-forward network sees "
    "what attention has just written.",
)
class TransformerBlock__in_parallel(_Block):
    def run(self, x, attend):
        if not self.norm_first:
            return super().run(x, attend)
        return x + self.dropout(attend(self.norm1(x))) + self.dropout(self.feed_forward(self.norm2(x)))


@misconception(
    "TransformerBlock",
    "Dropout falls on the sum, and so on the stream itself. What is dropped there is gone for all layers above. Drop the "
    "branch, and then add.",
)
class TransformerBlock__drops_the_stream(_Block):
    def run(self, x, attend):
        drop, feed = self.dropout, self.feed_forward
        if self.norm_first:
            x = drop(x + attend(self.norm1(x)))
            return drop(x + feed(self.norm2(x)))
        x = self.norm1(drop(x + attend(x)))
        return self.norm2(drop(x + feed(x)))


@misconception(
    "TransformerBlock",
    "The mask ends at your door: it never gets to the attention, and every token sees every other.",
)
class TransformerBlock__mask_lost(_Block):
    def forward(self, x, mask=None, **options):
        return self.run(x, lambda y: self.attention(y, **options))


@misconception(
    "TransformerBlock",
    "The mask is turned around: tokens see what they must not, and nothing else. True means may attend here; the masks of "
    "torch's layers mean the opposite.",
)
class TransformerBlock__mask_turned_around(_Block):
    def forward(self, x, mask=None, **options):
        return super().forward(x, None if mask is None else ~mask, **options)


@misconception(
    "TransformerBlock",
    "The attention is called with mask=None where there is no mask. An attention that has no masks, and makes its own causality, "
    "would not know the word: pass on what there is.",
)
class TransformerBlock__mask_always(_Block):
    def forward(self, x, mask=None, **options):
        return self.run(x, lambda y: self.attention(y, mask=mask, **options))


@misconception(
    "TransformerBlock",
    "Further keyword arguments are swallowed. A cache or positions that are meant for the attention never arrive.",
)
class TransformerBlock__options_lost(_Block):
    def forward(self, x, mask=None, **options):
        return super().forward(x, mask)


# from_torch_layer


@misconception(
    "from_torch_layer",
    "norm1 and norm2 have changed places on the way. While both are ones and zeros nobody sees it: compare trained layers.",
)
def from_torch_layer__norms_swapped(layer):
    block = right.from_torch_layer(layer)
    block.norm1, block.norm2 = block.norm2, block.norm1
    block.norm1.eps, block.norm2.eps = layer.norm1.eps, layer.norm2.eps
    return block


@misconception(
    "from_torch_layer",
    "The norms of the copy have the default eps. It is not in the state dict, so nothing complains: an attribute has to be "
    "taken over by hand.",
)
def from_torch_layer__eps_forgotten(layer):
    block = right.from_torch_layer(layer)
    block.norm1.eps = block.norm2.eps = 1e-5
    return block


@misconception(
    "from_torch_layer",
    "Every layer becomes a pre-norm block. The same parameters serve both orders, so they load without a word.",
)
def from_torch_layer__always_pre_norm(layer):
    block = right.from_torch_layer(layer)
    block.norm_first = True
    return block


@misconception(
    "from_torch_layer",
    "The copy always has relu. What the layer applies stands in its attribute, which is a function and not a word.",
)
def from_torch_layer__always_relu(layer):
    block = right.from_torch_layer(layer)
    block.feed_forward.activation = "relu"
    return block


@misconception(
    "from_torch_layer",
    "Queries and keys have changed places. The fused weight holds q, k and v from top to bottom. Without masks and biases the "
    "scores would come out transposed.",
)
def from_torch_layer__keys_first(layer):
    block = right.from_torch_layer(layer)
    inner = block.attention
    inner.q_proj, inner.k_proj = inner.k_proj, inner.q_proj
    return block


@misconception(
    "from_torch_layer",
    "Your block uses the very tensors of the layer. Train one and the other changes; copy the numbers.",
)
def from_torch_layer__shared_memory(layer):
    block = right.from_torch_layer(layer)
    block.norm1.weight = layer.norm1.weight
    block.feed_forward.up_proj.weight = layer.linear1.weight
    block.feed_forward.down_proj.weight = layer.linear2.weight
    return block


@misconception(
    "from_torch_layer",
    "A layer in eval mode became a block in training mode: modules are born that way.",
)
def from_torch_layer__mode_forgotten(layer):
    return right.from_torch_layer(layer).train()


@misconception(
    "from_torch_layer",
    "Making the block drew random numbers, only to overwrite them. Whoever counts on the global random state after this call "
    "gets other numbers: make it where there is nothing to draw, or put the state back.",
)
def from_torch_layer__draws_numbers(layer):
    torch.rand(1)
    return right.from_torch_layer(layer)


# RotaryAttention


class _Rotary(right.RotaryAttention):
    """`attend` is what they get wrong."""

    def forward(self, x, mask=None, *, positions=None):
        B, T, _ = x.shape
        if positions is None:
            positions = torch.arange(T, device=x.device)
        if positions.shape not in ((T,), (B, T)):
            raise ValueError(f"positions {tuple(positions.shape)}, {(T,)}, {(B, T)}")
        q, k, v = (split_heads(layer(x), self.n_heads) for layer in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(merge_heads(self.attend(q, k, v, mask, positions)))

    def turn(self, x, positions):
        return apply_rope(x, *rope_tables(positions, x.shape[-1], self.base))

    def attend(self, q, k, v, mask, positions):
        return attention(self.turn(q, positions), self.turn(k, positions), v, mask)[0]


@misconception(
    "RotaryAttention",
    "Values were rotated, too. Positions are for deciding who listens to whom; what is said must not turn with the place where "
    "it is said, or a shift of all positions changes the result.",
)
class RotaryAttention__turns_values(_Rotary):
    def attend(self, q, k, v, mask, positions):
        return super().attend(q, k, self.turn(v, positions), mask, positions)


@misconception(
    "RotaryAttention",
    "Only the queries turn. Then a score depends on where the query stands, and not on the distance to the key.",
)
class RotaryAttention__turns_queries_only(_Rotary):
    def attend(self, q, k, v, mask, positions):
        return attention(self.turn(q, positions), k, v, mask)[0]


@misconception(
    "RotaryAttention",
    "Pairs are made of the first and the second half of a head. That layout exists, but weights for one of them speak "
    "gibberish in the other. Ours are neighbors.",
)
class RotaryAttention__half_split(_Rotary):
    def turn(self, x, positions):
        return apply_rope_half(x, *rope_tables(positions, x.shape[-1], self.base))


@misconception(
    "RotaryAttention",
    "Queries and keys are rotated before the heads are split, over the whole width. So each head gets a piece of the "
    "frequencies, the last one only slow ones. Every head should have all of them.",
)
class RotaryAttention__before_the_split(_Rotary):
    def turn(self, x, positions):
        whole = merge_heads(x)
        return split_heads(apply_rope(whole, *rope_tables(positions, whole.shape[-1], self.base)), self.n_heads)


@misconception(
    "RotaryAttention",
    "The positions that the caller gives are ignored, and you count from 0. A token from the middle of a text, or after some "
    "padding, is then in the wrong place.",
)
class RotaryAttention__counts_for_itself(_Rotary):
    def attend(self, q, k, v, mask, positions):
        return super().attend(q, k, v, mask, torch.arange(q.shape[-2], device=q.device))


@misconception(
    "RotaryAttention",
    "All rows get the positions of the first.",
)
class RotaryAttention__positions_of_the_first_row(_Rotary):
    def attend(self, q, k, v, mask, positions):
        return super().attend(q, k, v, mask, positions.reshape(-1, q.shape[-2])[0])


@misconception(
    "RotaryAttention",
    "Positions were converted to the dtype of x. bfloat16 has 8 bits: 257 becomes 256, and 259 becomes 260, so neighbors fall "
    "onto each other.",
)
class RotaryAttention__half_positions(_Rotary):
    def turn(self, x, positions):
        return super().turn(x, positions.to(x.dtype))


@misconception(
    "RotaryAttention",
    "The scores are scaled by the width of the model. The scale belongs to one head: with more heads than one your attention is "
    "too flat.",
)
class RotaryAttention__scale_of_the_model(_Rotary):
    def attend(self, q, k, v, mask, positions):
        scale = (q.shape[-1] * self.n_heads) ** -0.5
        return attention(self.turn(q, positions), self.turn(k, positions), v, mask, scale)[0]


@misconception(
    "RotaryAttention",
    "Positions of a wrong shape get through, stretched by broadcasting. One position for all tokens is as good as none.",
)
class RotaryAttention__positions_not_checked(_Rotary):
    def forward(self, x, mask=None, *, positions=None):
        B, T, _ = x.shape
        if positions is None:
            positions = torch.arange(T, device=x.device)
        return super().forward(x, mask, positions=positions.expand(B, T))


# DecoderLM


class _Model(right.DecoderLM):
    """The model with its steps as methods. Each of them is what somebody gets wrong."""

    def forward(self, tokens, *, positions=None, mask=None):
        B, T = tokens.shape
        self.check(T)
        if positions is None:
            positions = torch.arange(T, device=tokens.device)
        if positions.shape not in ((T,), (B, T)):
            raise ValueError(f"positions {tuple(positions.shape)}, {(T,)}, {(B, T)}")
        x, options = self.start(tokens, positions)
        x = self.stream(x, self.mask(T, mask, tokens.device), options)
        return self.end(x)

    def check(self, T):
        if T > self.max_len:
            raise ValueError(f"{T} tokens, max_len {self.max_len}")

    def start(self, tokens, positions):
        x = self.embedding(tokens)
        if self.position_embedding is None:
            return x, {"positions": positions}
        return x + self.position_embedding(positions), {}

    def mask(self, T, mask, device):
        return combine_masks(causal_mask(T, T, device=device), mask)

    def stream(self, x, mask, options):
        for block in self.blocks:
            x = block(x, mask, **options)
        return x

    def end(self, x):
        return self.head(self.norm(x))


@misconception(
    "DecoderLM",
    "There is no norm before the head. In pre-norm nobody else normalizes the stream: it has grown with every block, and so do "
    "the logits.",
)
class DecoderLM__no_last_norm(_Model):
    def end(self, x):
        return self.head(x)


@misconception(
    "DecoderLM",
    "Tokens see what comes after them. In training this model would read the answer, and in use there is no answer to read.",
)
class DecoderLM__not_causal(_Model):
    def mask(self, T, mask, device):
        return torch.ones(T, T, dtype=torch.bool, device=device) if mask is None else mask


@misconception(
    "DecoderLM",
    "A token sees only what is before it, and not itself; the first sees nothing at all. The logits at t may use token t, they "
    "predict the one after it.",
)
class DecoderLM__not_itself(_Model):
    def mask(self, T, mask, device):
        return combine_masks(causal_mask(T, T, offset=-1, device=device), mask)


@misconception(
    "DecoderLM",
    "All blocks are one block: a list times n repeats a reference, as on day 5. The model has the parameters of a single layer.",
)
class DecoderLM__one_block_many_times(_Model):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.blocks = nn.ModuleList([self.blocks[0]] * len(self.blocks) if len(self.blocks) else [])


@misconception(
    "DecoderLM",
    "The tables start with numbers of size 1. Tied to the head they make logits of size sqrt(D), so a new model is sure of "
    "nonsense and its first loss is far above log(vocab).",
)
class DecoderLM__tables_of_size_one(_Model):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        for table in (self.embedding, self.position_embedding, self.head):
            if table is not None:
                nn.init.normal_(table.weight)


@misconception(
    "DecoderLM",
    "The head holds a copy of the embedding. After one step of training the two differ; tied means one tensor under two names.",
)
class DecoderLM__tied_by_copy(_Model):
    def __init__(self, *args, tie=True, **options):
        super().__init__(*args, tie=tie, **options)
        if tie:
            self.head.weight = nn.Parameter(self.embedding.weight.detach().clone())


@misconception(
    "DecoderLM",
    "Given positions are ignored: you always count from 0.",
)
class DecoderLM__counts_for_itself(_Model):
    def start(self, tokens, positions):
        return super().start(tokens, torch.arange(tokens.shape[1], device=tokens.device))


@misconception(
    "DecoderLM",
    "The rotary model was built with the attention of day 18, which does not rotate. It does not know the order of its tokens.",
)
class DecoderLM__rope_only_by_name(_Model):
    def __init__(self, vocab, d_model, n_layers, n_heads, d_ff, max_len, *, bias=True, **options):
        super().__init__(vocab, d_model, n_layers, n_heads, d_ff, max_len, bias=bias, **options)
        for block in self.blocks:
            block.attention = right.MultiHeadAttention(d_model, n_heads, bias=bias)

    def start(self, tokens, positions):
        return super().start(tokens, positions)[0], {}


@misconception(
    "DecoderLM",
    "Your blocks are post-norm. Here the stream runs through untouched, and each branch has its norm in front.",
)
class DecoderLM__post_norm(_Model):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        for block in self.blocks:
            block.norm_first = False


@misconception(
    "DecoderLM",
    "More tokens than max_len are accepted, or fail somewhere inside. A model with rotary positions would not even notice that "
    "it was never trained for this length.",
)
class DecoderLM__length_not_checked(_Model):
    def check(self, T):
        pass


# residual_norms


def _measured(model, tokens, size):
    """size() of the stream before the first block and after each, with everything else as it should be."""
    found = []
    handles = [block.register_forward_hook(lambda block, args, out: found.append(size(out))) for block in model.blocks]
    handles.append(model.blocks[0].register_forward_pre_hook(lambda block, args: found.append(size(args[0]))))
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad():
            model.eval()(tokens)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    return torch.stack(found)


def _rms(x):
    return _wide(x).square().mean().sqrt()


@misconception(
    "residual_norms",
    "You average the sizes of the tokens. Asked for is one mean over all squares, and then its root: large tokens count more "
    "in it.",
)
def residual_norms__mean_of_token_sizes(model, tokens):
    return _measured(model, tokens, lambda x: _wide(x).square().mean(-1).sqrt().mean())


@misconception(
    "residual_norms",
    "That is the length of the whole stream, the root of the *sum* of squares. It grows with the batch; the root of the mean "
    "does not.",
)
def residual_norms__length(model, tokens):
    return _measured(model, tokens, lambda x: _wide(x).square().sum().sqrt())


@misconception(
    "residual_norms",
    "You measured the standard deviation: the mean was taken off. A stream that drifts to one side grows, too.",
)
def residual_norms__deviation(model, tokens):
    return _measured(model, tokens, lambda x: _wide(x).std(correction=0))


@misconception(
    "residual_norms",
    "What goes into the first block is missing: there is one number for each block, and one more is asked for.",
)
def residual_norms__without_the_start(model, tokens):
    return _measured(model, tokens, _rms)[1:]


@misconception(
    "residual_norms",
    "You measure what goes into each block and then what the model returns. That are the logits, not the stream after the last "
    "block.",
)
def residual_norms__logits_at_the_end(model, tokens):
    found = _measured(model, tokens, _rms)
    with torch.no_grad():
        found[-1] = _rms(model(tokens))
    return found


@misconception(
    "residual_norms",
    "The model was measured as it was found, in training mode. Dropout was part of what you saw: another number at each call, "
    "and larger ones.",
)
def residual_norms__in_training(model, tokens):
    found = []
    handles = [block.register_forward_hook(lambda block, args, out: found.append(_rms(out))) for block in model.blocks]
    handles.append(model.blocks[0].register_forward_pre_hook(lambda block, args: found.append(_rms(args[0]))))
    try:
        with torch.no_grad():
            model(tokens)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(found)


@misconception(
    "residual_norms",
    "Afterwards the whole model is in training mode. A part that had been put into eval mode on purpose has lost it: note the "
    "mode of every module.",
)
def residual_norms__all_in_training_afterwards(model, tokens):
    try:
        return _measured(model, tokens, _rms)
    finally:
        model.train()


@misconception(
    "residual_norms",
    "Your hooks stay on the blocks. Each further call of the model feeds lists that nobody reads, and they pile up.",
)
def residual_norms__hooks_stay(model, tokens):
    try:
        return _measured(model, tokens, _rms)
    finally:
        for block in model.blocks:
            block.register_forward_hook(lambda block, args, out: None)


@misconception(
    "residual_norms",
    "When the model raises, nobody cleans up: hooks stay on, and modules in eval mode. What must happen in any case belongs "
    "into a `finally`.",
)
def residual_norms__no_finally(model, tokens):
    found = []
    modes = [(module, module.training) for module in model.modules()]
    handles = [block.register_forward_hook(lambda block, args, out: found.append(_rms(out))) for block in model.blocks]
    handles.append(model.blocks[0].register_forward_pre_hook(lambda block, args: found.append(_rms(args[0]))))
    with torch.no_grad():
        model.eval()(tokens)
    for handle in handles:
        handle.remove()
    for module, training in modes:
        module.training = training
    return torch.stack(found)


@misconception(
    "residual_norms",
    "Squares were taken in half precision. 300 squared is more than float16 can hold, and bfloat16 adds up with three digits.",
)
def residual_norms__in_half(model, tokens):
    return _measured(model, tokens, lambda x: x.square().mean().sqrt().to(torch.promote_types(x.dtype, torch.float32)))


# train_tiny_lm


def _training(
    model, tokens, optimizer, steps, batch, context, generator, *, inputs=slice(None, -1), targets=slice(1, None),
    last=None, extra=0, clear=True, clip=True, mode=True, reduction="mean", after=False, once=False, local=True,
):  # fmt: skip
    """One loop for all of them, with one switch for each mistake."""
    if len(tokens) <= context:
        raise ValueError(f"{len(tokens)} tokens, context {context}")
    losses, starts = [], None
    optimizer.zero_grad()
    for _ in range(steps):
        model.train(mode)
        if starts is None or not once:
            top = len(tokens) - context - extra
            starts = torch.randint(top, (batch,), generator=generator if local else None)
        windows = tokens[starts[:, None] + torch.arange(context + 1)]
        x, y = windows[:, inputs], windows[:, targets]
        if clear:
            optimizer.zero_grad()
        loss = cross_entropy(model(x)[:, last:] if last else model(x), y[:, last:] if last else y, reduction=reduction)
        loss.backward()
        if clip:
            clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if after:
            with torch.no_grad():
                loss = cross_entropy(model(x), y)
        losses.append(loss.item())
    return losses


@misconception(
    "train_tiny_lm",
    "The targets are the inputs: each token has to predict itself, which it sees. The loss goes to 0 and the model has learned "
    "to copy.",
)
def train_tiny_lm__targets_are_inputs(model, tokens, optimizer, *, steps, batch=16, context=32, generator):
    return _training(model, tokens, optimizer, steps, batch, context, generator, targets=slice(None, -1))


@misconception(
    "train_tiny_lm",
    "The targets are the tokens *before* the inputs. The model learns to tell what came last, and would write backwards.",
)
def train_tiny_lm__backwards(model, tokens, optimizer, *, steps, batch=16, context=32, generator):
    shifted = {"inputs": slice(1, None), "targets": slice(None, -1)}
    return _training(model, tokens, optimizer, steps, batch, context, generator, **shifted)


@misconception(
    "train_tiny_lm",
    "Only the last token of each window is learned from. Every place of a causal model is a question of its own: you throw away "
    "all answers but one.",
)
def train_tiny_lm__last_place_only(model, tokens, optimizer, *, steps, batch=16, context=32, generator):
    return _training(model, tokens, optimizer, steps, batch, context, generator, last=-1)


@misconception(
    "train_tiny_lm",
    "Gradients are never cleared: each step follows the sum of all gradients so far.",
)
def train_tiny_lm__gradients_pile_up(model, tokens, optimizer, *, steps, batch=16, context=32, generator):
    return _training(model, tokens, optimizer, steps, batch, context, generator, clear=False)


@misconception(
    "train_tiny_lm",
    "The gradient is not clipped. As long as it is short nothing shows; the first long one throws the weights far away.",
)
def train_tiny_lm__not_clipped(model, tokens, optimizer, *, steps, batch=16, context=32, generator):
    return _training(model, tokens, optimizer, steps, batch, context, generator, clip=False)


@misconception(
    "train_tiny_lm",
    "The last window is never drawn, and a text that is just long enough has none: starts run up to N - context - 1, and the "
    "upper end of randint is not among them.",
)
def train_tiny_lm__last_window_missing(model, tokens, optimizer, *, steps, batch=16, context=32, generator):
    return _training(model, tokens, optimizer, steps, batch, context, generator, extra=1)


@misconception(
    "train_tiny_lm",
    "The windows are drawn once and used in all steps. The model learns these few by heart.",
)
def train_tiny_lm__same_windows(model, tokens, optimizer, *, steps, batch=16, context=32, generator):
    return _training(model, tokens, optimizer, steps, batch, context, generator, once=True)


# ReversibleStack


@misconception(
    "ReversibleStack",
    "Numbers and gradients are right, but this is the plain loop: autograd keeps every layer, and memory grows with depth. What "
    "is asked for is a backward pass that makes the inputs again.",
)
class ReversibleStack__plain_loop(right.ReversibleStack):
    def forward(self, x1, x2):
        if x1.shape != x2.shape:
            raise ValueError(f"{tuple(x1.shape)}, {tuple(x2.shape)}")
        for f, g in zip(self.f, self.g, strict=True):
            x1 = x1 + f(x2)
            x2 = x2 + g(x1)
        return x1, x2


@misconception(
    "ReversibleStack",
    "Your inverse undoes the layers in the order in which they were done. The last one has to be undone first.",
)
class ReversibleStack__inverse_in_order(right.ReversibleStack):
    @torch.no_grad()
    def inverse(self, y1, y2):
        for f, g in zip(self.f, self.g, strict=True):
            y2 = y2 - g(y1)
            y1 = y1 - f(y2)
        return y1, y2


class _Checkpointed(torch.autograd.Function):
    """One layer that keeps its inputs."""

    @staticmethod
    def forward(ctx, f, g, x1, x2, *parameters):
        ctx.f, ctx.g, ctx.parameters = f, g, parameters
        ctx.save_for_backward(x1, x2)
        y1 = x1 + f(x2)
        return y1, x2 + g(y1)

    @staticmethod
    def backward(ctx, d1, d2):
        with torch.enable_grad():
            x1, x2 = (x.detach().requires_grad_() for x in ctx.saved_tensors)
            y1 = x1 + ctx.f(x2)
            y2 = x2 + ctx.g(y1)
        found = torch.autograd.grad((y1, y2), [x1, x2, *ctx.parameters], (d1, d2))
        return None, None, *found


@misconception(
    "ReversibleStack",
    "Each layer keeps its two inputs and runs again in backward. That is checkpointing: less than everything, but memory still "
    "grows with depth. The inputs can be had from the outputs.",
)
class ReversibleStack__keeps_inputs(right.ReversibleStack):
    def forward(self, x1, x2):
        if x1.shape != x2.shape:
            raise ValueError(f"{tuple(x1.shape)}, {tuple(x2.shape)}")
        for f, g in zip(self.f, self.g, strict=True):
            trained = list({id(p): p for b in (f, g) for p in b.parameters() if p.requires_grad}.values())
            x1, x2 = _Checkpointed.apply(f, g, x1, x2, *trained)
        return x1, x2


class _Overwriting(right._Reversible):
    """As it should be, but a parameter of a shared module keeps the last of its gradients only."""

    @staticmethod
    def backward(ctx, d1, d2):
        y1, y2 = ctx.saved_tensors
        grads = {id(p): torch.zeros_like(p) for p in ctx.parameters}
        for f, g in reversed(list(zip(ctx.stack.f, ctx.stack.g, strict=True))):
            for branch in (g, f):
                for parameter in branch.parameters():
                    if parameter.requires_grad:
                        grads[id(parameter)].zero_()
                if branch is g:
                    y2, d1 = right._undo(g, y1, y2, d1, d2, grads)
                else:
                    y1, d2 = right._undo(f, y2, y1, d2, d1, grads)
        return None, d1, d2, *grads.values()


@misconception(
    "ReversibleStack",
    "A module that stands in several layers keeps the gradient of one of them: the later one overwrote the earlier. They have "
    "to be added.",
)
class ReversibleStack__gradients_overwritten(right.ReversibleStack):
    def forward(self, x1, x2):
        if x1.shape != x2.shape:
            raise ValueError(f"{tuple(x1.shape)}, {tuple(x2.shape)}")
        return _Overwriting.apply(self, x1, x2, *(p for p in self.parameters() if p.requires_grad))
