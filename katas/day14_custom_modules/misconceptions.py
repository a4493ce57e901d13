import re

import torch
import torch.nn.functional as F
from torch import nn

from checker.testing import misconception
from reference import day14_custom_modules as right
from reference.day08_linear_layers import Linear, LowRankLinear


def _wide(x):
    return x if x.dtype == torch.float64 else x.float()


# Embedding


class _Table(right.Embedding):
    def padding(self, ids):
        return (ids == self.padding_idx).unsqueeze(-1) if self.padding_idx is not None else None


@misconception(
    "Embedding",
    "The rows are picked by a one-hot matrix. The numbers are right, and for each of them a whole table of zeros was "
    "multiplied: with 100,000 words that is 100,000 times the work of reading one row.",
)
class Embedding__one_hot(_Table):
    def forward(self, ids):
        if ids.numel() and (ids.min() < 0 or ids.max() >= self.num):
            raise IndexError("not a row")
        hot = (ids.unsqueeze(-1) == torch.arange(self.num, device=ids.device)).to(self.weight.dtype)
        weight = self.weight
        if self.padding_idx is not None:
            row = torch.arange(self.num, device=ids.device).unsqueeze(-1) == self.padding_idx
            weight = torch.where(row, weight.detach(), weight)
        return hot @ weight


@misconception(
    "Embedding",
    "A negative id was taken: square brackets count from the end, so -1 silently reads the last row. In a batch that is "
    "padded with -1 or -100 nobody would ever notice.",
)
class Embedding__negative_ids(_Table):
    def forward(self, ids):
        rows, padding = self.weight[ids.long()], self.padding(ids)
        return rows if padding is None else torch.where(padding, rows.detach(), rows)


@misconception(
    "Embedding",
    "The padding row starts as zeros, and then it learns: its gradient is not zero. The first step of an optimizer "
    "gives a meaning to what should have none.",
)
class Embedding__padding_learns(_Table):
    def forward(self, ids):
        return self.weight.index_select(0, ids.flatten()).reshape(*ids.shape, self.dim)


@misconception(
    "Embedding",
    "Padding comes out as zeros whatever its row holds. The row is read like any other; a checkpoint may have numbers "
    "in it, and only its gradient is special.",
)
class Embedding__padding_zeroed(_Table):
    def forward(self, ids):
        rows = self.weight.index_select(0, ids.flatten()).reshape(*ids.shape, self.dim)
        padding = self.padding(ids)
        return rows if padding is None else rows.masked_fill(padding, 0.0)


@misconception(
    "Embedding",
    "The gradient of the padding row is wiped from the whole weight, by a hook on the parameter. What a tied output head "
    "sends to that row is wiped as well: stop what comes through this layer only.",
)
class Embedding__hook_on_the_weight(_Table):
    def __init__(self, num, dim, padding_idx=None):
        super().__init__(num, dim, padding_idx)
        if padding_idx is not None:
            self.weight.register_hook(self.wipe)

    def wipe(self, grad):
        rows = torch.arange(self.num, device=grad.device).unsqueeze(-1) == self.padding_idx
        return grad.masked_fill(rows, 0.0)

    def forward(self, ids):
        return self.weight.index_select(0, ids.flatten()).reshape(*ids.shape, self.dim)


@misconception(
    "Embedding",
    "The padding row starts with random numbers like all others. It is never trained, so this noise would stay in the "
    "model for good.",
)
class Embedding__padding_starts_random(_Table):
    def __init__(self, num, dim, padding_idx=None):
        super().__init__(num, dim, padding_idx)
        with torch.no_grad():
            self.weight.normal_()


@misconception(
    "Embedding",
    "A padding_idx of 0 is treated as if there were none: 0 is false where a truth value is asked for. Compare with None. "
    "Zero happens to be the most common padding id.",
)
class Embedding__padding_zero_is_false(_Table):
    def __init__(self, num, dim, padding_idx=None):
        super().__init__(num, dim, padding_idx)
        if not padding_idx:
            with torch.no_grad():
                self.weight.normal_()

    def forward(self, ids):
        rows = self.weight.index_select(0, ids.flatten()).reshape(*ids.shape, self.dim)
        return torch.where(self.padding(ids), rows.detach(), rows) if self.padding_idx else rows


@misconception(
    "Embedding",
    "The table starts uniform, on an interval around 0. The one asked for is a standard normal, as nn.Embedding has it: "
    "two thirds of the values within one spread, and some far out.",
)
class Embedding__uniform(_Table):
    def __init__(self, num, dim, padding_idx=None):
        super().__init__(num, dim, padding_idx)
        with torch.no_grad():
            self.weight.uniform_(-(3**0.5), 3**0.5)
            if padding_idx is not None:
                self.weight[padding_idx] = 0.0


@misconception(
    "Embedding",
    "The table starts with a spread of 1 / sqrt(dim). Many models do that on purpose; this layer, like nn.Embedding, "
    "starts with a spread of 1 and leaves scaling to whoever uses it.",
)
class Embedding__scaled_start(_Table):
    def __init__(self, num, dim, padding_idx=None):
        super().__init__(num, dim, padding_idx)
        with torch.no_grad():
            self.weight.mul_(dim**-0.5)


@misconception(
    "Embedding",
    "Ids beyond the table are pushed back into it. The text then says something else, and the tokenizer that does not "
    "belong to this model is never found: raise IndexError.",
)
class Embedding__clamps(_Table):
    def forward(self, ids):
        return super().forward(ids.clamp(0, self.num - 1))


# Dropout


class _Drop(right.Dropout):
    def draw(self, shape, device):
        home = device if self.generator is None else self.generator.device
        return torch.rand(shape, generator=self.generator, device=home).to(device)

    def mask(self, x):
        return self.draw(x.shape, x.device) >= self.p


@misconception(
    "Dropout",
    "Your training does not scale, and eval multiplies by 1 - p to make up for it. Inverted dropout scales while it "
    "trains, so that in eval the layer is not there at all.",
)
class Dropout__scales_in_eval(_Drop):
    def forward(self, x):
        return torch.where(self.mask(x), x, 0.0) if self.training else x * (1 - self.p)


@misconception(
    "Dropout",
    "In eval numbers are still dropped: the layer never asks in which mode it is. Two evaluations of one model would "
    "give two answers.",
)
class Dropout__always_on(_Drop):
    def forward(self, x):
        kept = torch.where(self.mask(x), x, 0.0)
        return kept if self.p == 1 else kept / (1 - self.p)


@misconception(
    "Dropout",
    "The survivors keep their size, so the sum shrinks by p in training and not in eval. The next layer was trained on "
    "smaller numbers than it will see.",
)
class Dropout__does_not_scale(_Drop):
    def forward(self, x):
        return torch.where(self.mask(x), x, 0.0) if self.training else x


@misconception(
    "Dropout",
    "The survivors were multiplied by 1 - p. That makes the loss of size worse instead of making up for it: the mean "
    "falls to (1 - p)^2.",
)
class Dropout__multiplies(_Drop):
    def forward(self, x):
        return torch.where(self.mask(x), x, 0.0) * (1 - self.p) if self.training else x


@misconception(
    "Dropout",
    "p is used as the probability to keep. Here it is the share that goes: with p = 0.1 nine of ten numbers stay. At "
    "p = 0.5 both readings look the same.",
)
class Dropout__p_keeps(_Drop):
    def forward(self, x):
        if not self.training:
            return x
        kept = torch.where(self.draw(x.shape, x.device) < self.p, x, 0.0)
        return kept / self.p if self.p else kept


@misconception(
    "Dropout",
    "One pattern is drawn for the last dimension and used for every row: whole columns vanish. Each number should have "
    "its own luck.",
)
class Dropout__one_pattern_for_all_rows(_Drop):
    def forward(self, x):
        if not self.training:
            return x
        kept = torch.where(self.draw(x.shape[-1:], x.device) >= self.p, x, 0.0)
        return kept if self.p == 1 else kept / (1 - self.p)


@misconception(
    "Dropout",
    "The generator is kept and not used: the numbers come from the global state, so equal generators give different "
    "results and other people's random numbers change.",
)
class Dropout__ignores_the_generator(_Drop):
    def draw(self, shape, device):
        return torch.rand(shape, device=device)

    def forward(self, x):
        if not self.training:
            return x
        kept = torch.where(self.mask(x), x, 0.0)
        return kept if self.p == 1 else kept / (1 - self.p)


@misconception(
    "Dropout",
    "Every call drops the same places: the random numbers start from the beginning again and again. A network learns to "
    "live without exactly these numbers, and that was not the point.",
)
class Dropout__same_at_every_call(_Drop):
    def draw(self, shape, device):
        seed = torch.initial_seed() if self.generator is None else self.generator.initial_seed()
        return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).to(device)

    def forward(self, x):
        if not self.training:
            return x
        kept = torch.where(self.mask(x), x, 0.0)
        return kept if self.p == 1 else kept / (1 - self.p)


@misconception(
    "Dropout",
    "With p = 1 there is a division by 1 - p, which is zero: NaN where zeros should be, or a NaN in the gradient. When "
    "nothing survives there is nothing to scale.",
)
class Dropout__divides_by_zero(_Drop):
    def forward(self, x):
        return x * self.mask(x) / (1 - self.p) if self.training else x


@misconception(
    "Dropout",
    "In eval you hand back a copy. The values are right; the memory and the time are wasted in every layer of every "
    "call. Return what came in.",
)
class Dropout__copies_in_eval(_Drop):
    def forward(self, x):
        return super().forward(x) if self.training else x.clone()


@misconception(
    "Dropout",
    "The zeros were written into x itself. The skip connection beside this layer still needs x as it was.",
)
class Dropout__in_place(_Drop):
    def forward(self, x):
        if not self.training:
            return x
        if x.requires_grad:
            return super().forward(x)
        x.masked_fill_(~self.mask(x), 0.0)
        return x if self.p == 1 else x.div_(1 - self.p)


@misconception(
    "Dropout",
    "The survivors are scaled by the share that happened to survive, and not by 1 - p. Each number then depends on the "
    "luck of all others, and a batch is no longer a set of independent rows.",
)
class Dropout__scales_by_what_survived(_Drop):
    def forward(self, x):
        if not self.training:
            return x
        keep = self.mask(x)
        return torch.where(keep, x, 0.0) / keep.to(x.dtype).mean().clamp(min=1e-9) if self.p else x * 1


@misconception(
    "Dropout",
    "Exactly a share p is dropped at each call. Dropout is a coin per number: how many fall is luck as well, otherwise "
    "one number's fate tells about another's.",
)
class Dropout__exact_share(_Drop):
    def mask(self, x):
        order = self.draw((x.numel(),), x.device).argsort()
        keep = torch.ones(x.numel(), dtype=torch.bool, device=x.device)
        keep[order[: round(self.p * x.numel())]] = False
        return keep.reshape(x.shape)

    def forward(self, x):
        if not self.training:
            return x
        kept = torch.where(self.mask(x), x, 0.0)
        return kept if self.p == 1 else kept / (1 - self.p)


@misconception(
    "Dropout",
    "The gradient passes as if nothing had been dropped. What was set to zero had no part in the loss, so nothing may "
    "flow back to it.",
)
class Dropout__straight_through(_Drop):
    def forward(self, x):
        if not self.training:
            return x
        return x + (super().forward(x) - x).detach() if x.requires_grad else super().forward(x)


# RMSNorm


class _Norm(right.RMSNorm):
    def check(self, x):
        if x.shape[-1:] != self.weight.shape:
            raise ValueError(f"x {tuple(x.shape)}, weight {tuple(self.weight.shape)}")

    def finish(self, normed, x):
        return normed.to(x.dtype) * self.weight.to(x.dtype)


@misconception(
    "RMSNorm",
    "The mean was taken away first. That is LayerNorm; this one leaves the mean alone and divides by the root of the "
    "mean square. On data with mean 0 the two are close, which hides it.",
)
class RMSNorm__takes_the_mean_away(_Norm):
    def forward(self, x):
        self.check(x)
        wide = _wide(x)
        wide = wide - wide.mean(-1, keepdim=True)
        return self.finish(wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps), x)


@misconception(
    "RMSNorm",
    "eps is added after the root. sqrt(mean + eps) and sqrt(mean) + eps differ by a factor of a thousand where a row is "
    "near zero, and the gradient of the root at zero is infinite: eps goes inside.",
)
class RMSNorm__eps_after_the_root(_Norm):
    def forward(self, x):
        self.check(x)
        wide = _wide(x)
        return self.finish(wide / (wide.square().mean(-1, keepdim=True).sqrt() + self.eps), x)


@misconception(
    "RMSNorm",
    "The root mean square is not allowed to be smaller than eps, but eps is not added. In small rows the numbers differ.",
)
class RMSNorm__eps_as_a_floor(_Norm):
    def forward(self, x):
        self.check(x)
        wide = _wide(x)
        return self.finish(wide * torch.rsqrt(wide.square().mean(-1, keepdim=True).clamp(min=self.eps)), x)


@misconception(
    "RMSNorm",
    "The mean square is computed in half precision. 300 squared is 90,000, more than float16 can hold, and bfloat16 "
    "keeps less than three digits: take the statistics in float32.",
)
class RMSNorm__half_statistics(_Norm):
    def forward(self, x):
        self.check(x)
        return self.finish(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps), x)


@misconception(
    "RMSNorm",
    "The weight is multiplied in float32, and only then comes the cast back. DeepSeek and Llama cast first: in half "
    "precision about a quarter of all numbers differ in their last bit.",
)
class RMSNorm__weight_before_the_cast(_Norm):
    def forward(self, x):
        self.check(x)
        wide = _wide(x)
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


@misconception(
    "RMSNorm",
    "Everything goes through float32, also what came in float64. Nine digits are thrown away, and finite differences no "
    "longer agree with the gradient: widen halves, do not narrow doubles.",
)
class RMSNorm__always_float32(_Norm):
    def forward(self, x):
        self.check(x)
        wide = x.float()
        return self.finish(wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps), x)


@misconception(
    "RMSNorm",
    "The squares are summed and not averaged. Rows come out with length one, so with 4096 numbers each of them is 64 times "
    "too small.",
)
class RMSNorm__sum_of_squares(_Norm):
    def forward(self, x):
        self.check(x)
        wide = _wide(x)
        return self.finish(wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + self.eps), x)


@misconception(
    "RMSNorm",
    "One mean square is taken over all rows together. Each row has its own: otherwise a token is scaled by what else is "
    "in the batch.",
)
class RMSNorm__over_everything(_Norm):
    def forward(self, x):
        self.check(x)
        wide = _wide(x)
        return self.finish(wide * torch.rsqrt(wide.square().mean() + self.eps), x)


@misconception(
    "RMSNorm",
    "The mean runs along the first dimension. It belongs to each row by itself, along the last one: tokens do not look "
    "at each other here.",
)
class RMSNorm__first_dimension(_Norm):
    def forward(self, x):
        self.check(x)
        wide = _wide(x)
        return self.finish(wide * torch.rsqrt(wide.square().mean(0, keepdim=True) + self.eps), x)


@misconception(
    "RMSNorm",
    "You multiply by 1 + weight. Some models store their weight as what is to be added to one; here it is the factor "
    "itself, and it starts as ones.",
)
class RMSNorm__one_plus_weight(_Norm):
    def forward(self, x):
        self.check(x)
        wide = _wide(x)
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * (1 + self.weight.to(x.dtype))


@misconception(
    "RMSNorm",
    "The weight is not used. At the start it is ones and nothing shows; after training, or with a loaded checkpoint, "
    "every number is wrong.",
)
class RMSNorm__no_weight(_Norm):
    def forward(self, x):
        self.check(x)
        wide = _wide(x)
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


@misconception(
    "RMSNorm",
    "Half goes in and float32 comes out. The layer behind it has weights in half precision and will refuse, or quietly "
    "run twice as slow.",
)
class RMSNorm__stays_wide(_Norm):
    def forward(self, x):
        self.check(x)
        wide = _wide(x)
        return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.weight


@misconception(
    "RMSNorm",
    "The width is not compared with that of the weight. A width of 1 broadcasts without a word, and others die in a "
    "multiplication that says nothing about this layer.",
)
class RMSNorm__width_not_checked(_Norm):
    def forward(self, x):
        wide = _wide(x)
        return self.finish(wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps), x)


@misconception(
    "RMSNorm",
    "More than needed is kept for backward. Every tensor of full size that a product or a quotient reads is kept; with "
    "another order, or by widening less, only x and the normalized x remain.",
)
class RMSNorm__saves_too_much(_Norm):
    def forward(self, x):
        self.check(x)
        wide = x.double()
        return self.finish(wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps), x)


# BatchNorm1d


class _Batch(right.BatchNorm1d):
    """The right layer in steps that the wrong ones replace."""

    def check(self, x):
        if x.dim() != 2 or x.shape[1:] != self.weight.shape:
            raise ValueError(f"x {tuple(x.shape)}, weight {tuple(self.weight.shape)}")
        if self.training and len(x) < 2:
            raise ValueError(f"x {tuple(x.shape)}")

    def measure(self, x):
        mean = x.mean(0)
        return mean, (x - mean).square().mean(0)

    def normalize(self, x, mean, var):
        return (x - mean) / torch.sqrt(var + self.eps)

    def statistics(self, x):
        if not self.training:
            return self.running_mean, self.running_var
        mean, var = self.measure(x)
        self.remember(mean, var, len(x))
        return mean, var

    @torch.no_grad()
    def remember(self, mean, var, rows):
        self._remember(mean, var * rows / (rows - 1))

    def forward(self, x):
        self.check(x)
        wide = _wide(x)
        mean, var = self.statistics(wide)
        return (self.normalize(wide, mean, var) * self.weight + self.bias).to(x.dtype)


@misconception(
    "BatchNorm1d",
    "The running variance is the one over N. PyTorch stores the unbiased one, over N - 1: after a single batch your state "
    "dict and that of nn.BatchNorm1d disagree.",
)
class BatchNorm1d__running_variance_biased(_Batch):
    @torch.no_grad()
    def remember(self, mean, var, rows):
        self._remember(mean, var)


@misconception(
    "BatchNorm1d",
    "The batch is normalized with the unbiased variance, which is torch's default. For normalizing it is the one over N; "
    "with two rows the difference is a factor of 1.41.",
)
class BatchNorm1d__normalizes_unbiased(_Batch):
    def measure(self, x):
        return x.mean(0), x.var(0)

    @torch.no_grad()
    def remember(self, mean, var, rows):
        self._remember(mean, var)


@misconception(
    "BatchNorm1d",
    "The statistics are plain attributes. They are lost when the model is saved, and stay behind when it moves to another "
    "device or dtype: state that is not trained is a buffer.",
)
class BatchNorm1d__plain_attributes(_Batch):
    def __init__(self, D, eps=1e-5, momentum=0.1):
        super().__init__(D, eps, momentum)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            value = getattr(self, name)
            delattr(self, name)
            setattr(self, name, value)


@misconception(
    "BatchNorm1d",
    "The statistics are Parameters, so an optimizer finds them and weight decay pulls them to zero. They are measured, "
    "not trained.",
)
class BatchNorm1d__statistics_are_parameters(_Batch):
    def __init__(self, D, eps=1e-5, momentum=0.1):
        super().__init__(D, eps, momentum)
        for name in ("running_mean", "running_var"):
            value = getattr(self, name)
            delattr(self, name)
            setattr(self, name, nn.Parameter(value, requires_grad=False))


@misconception(
    "BatchNorm1d",
    "momentum weighs the old value. In PyTorch it weighs the new one: 0.1 means that a batch moves the statistics by a "
    "tenth. An optimizer's momentum reads the other way round.",
)
class BatchNorm1d__momentum_of_the_old(_Batch):
    @torch.no_grad()
    def remember(self, mean, var, rows):
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), 1 - self.momentum)
        self.running_var.lerp_((var * rows / (rows - 1)).to(self.running_var.dtype), 1 - self.momentum)
        self.num_batches_tracked.add_(1)


@misconception(
    "BatchNorm1d",
    "In eval the batch is normalized by itself. A prediction then depends on what else is in the batch, and a single row "
    "becomes zero: use what was remembered.",
)
class BatchNorm1d__batch_statistics_in_eval(_Batch):
    def statistics(self, x):
        mean, var = self.measure(x)
        if self.training:
            self.remember(mean, var, len(x))
        return mean, var


@misconception(
    "BatchNorm1d",
    "In training the running statistics normalize. They lag behind and have no gradient; the batch is normalized by "
    "itself, and the running ones are for eval.",
)
class BatchNorm1d__running_statistics_in_training(_Batch):
    def statistics(self, x):
        super().statistics(x)
        return self.running_mean, self.running_var


@misconception(
    "BatchNorm1d",
    "Mean and variance are cut out of the graph. The values are right and the gradient of x is not: every row moves the "
    "statistics of all others, and this has to flow back.",
)
class BatchNorm1d__statistics_detached(_Batch):
    def measure(self, x):
        return super().measure(x.detach())


@misconception(
    "BatchNorm1d",
    "The variance is the mean of the squares minus the square of the mean. Where the mean is large, two huge numbers are "
    "subtracted and the variance is what rounding left over: subtract the mean first.",
)
class BatchNorm1d__difference_of_squares(_Batch):
    def measure(self, x):
        mean = x.mean(0)
        return mean, (x.square().mean(0) - mean.square()).clamp(min=0)


@misconception(
    "BatchNorm1d",
    "eps is added to the standard deviation. It belongs inside the root, beside the variance; with eps = 0.1 the numbers "
    "show it.",
)
class BatchNorm1d__eps_after_the_root(_Batch):
    def normalize(self, x, mean, var):
        return (x - mean) / (torch.sqrt(var) + self.eps)


@misconception(
    "BatchNorm1d",
    "Eval goes on updating the running statistics, so a model changes by being measured, and the test data end up in it.",
)
class BatchNorm1d__learns_in_eval(_Batch):
    def statistics(self, x):
        if self.training or len(x) < 2:
            return super().statistics(x)
        found = self.running_mean.clone(), self.running_var.clone()
        self.remember(*self.measure(x), len(x))
        return found


@misconception(
    "BatchNorm1d",
    "num_batches_tracked stands still. It is part of the state that others read: count one for each batch in training.",
)
class BatchNorm1d__does_not_count(_Batch):
    @torch.no_grad()
    def remember(self, mean, var, rows):
        super().remember(mean, var, rows)
        self.num_batches_tracked.sub_(1)


@misconception(
    "BatchNorm1d",
    "Each row is normalized by itself. That is what LayerNorm does; here a column is one feature, and its statistics run "
    "over the rows of the batch.",
)
class BatchNorm1d__rows(_Batch):
    def statistics(self, x):
        if self.training:
            self.remember(*self.measure(x), len(x))
        mean = x.mean(1, keepdim=True)
        return mean, (x - mean).square().mean(1, keepdim=True)


@misconception(
    "BatchNorm1d",
    "A single row is accepted in training. Its variance is zero and the unbiased one is 0/0: from then on running_var is "
    "NaN, and every later evaluation too.",
)
class BatchNorm1d__one_row(_Batch):
    def check(self, x):
        if x.dim() != 2 or x.shape[1:] != self.weight.shape:
            raise ValueError(f"x {tuple(x.shape)}, weight {tuple(self.weight.shape)}")


@misconception(
    "BatchNorm1d",
    "The running statistics keep the graph of each batch. Memory grows with every step, and the second backward pass "
    "finds a graph that is already gone: remember values, not results.",
)
class BatchNorm1d__buffers_keep_the_graph(_Batch):
    def remember(self, mean, var, rows):
        m = self.momentum
        self.running_mean = ((1 - m) * self.running_mean + m * mean).to(self.running_mean.dtype)
        self.running_var = ((1 - m) * self.running_var + m * var * rows / (rows - 1)).to(self.running_var.dtype)
        self.num_batches_tracked.add_(1)


@misconception(
    "BatchNorm1d",
    "The running variance starts at zero. Before anything was measured a layer should change nothing, so it starts at "
    "one, as in nn.BatchNorm1d.",
)
class BatchNorm1d__variance_starts_at_zero(_Batch):
    def __init__(self, D, eps=1e-5, momentum=0.1):
        super().__init__(D, eps, momentum)
        self.running_var.zero_()


# load_renamed


def _renamed(name, rules):
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _load(
    module,
    tensors,
    rules,
    strict=True,
    *,
    rename=_renamed,
    targets=None,
    fits=lambda a, b: a.shape == b.shape,
    copy=None,
    collide=True,
    tied=True,
    conflict=True,
    early=False,
    shown=lambda source, name: source,
    judge=None,
):
    """The right function, in steps that the wrong ones replace."""
    targets = module.state_dict(keep_vars=True) if targets is None else targets
    sources, report = {}, right.Report([], [], [], [])

    @torch.no_grad()
    def put(name):
        if copy is None:
            targets[name].copy_(tensors[sources[name]])
        else:
            copy(module, name, targets[name], tensors[sources[name]])

    for source in tensors:
        name = rename(source, rules)
        if name in sources and collide:
            raise ValueError(f"{sources[name]} and {source}: {name}")
        sources[name] = source
        if name not in targets:
            report.unexpected.append(shown(source, name))
        elif not fits(tensors[source], targets[name]):
            report.mismatched.append(name)
        else:
            if name not in report.loaded:
                report.loaded.append(name)
            if early:
                put(name)
    given = {id(targets[name]) for name in sources if name in targets}
    found = (name for name, t in targets.items() if (id(t) not in given if tied else name not in sources))
    report.missing.extend(found)
    shapes = [
        f"{n} {tuple(targets[n].shape)} from {sources[n]} {tuple(tensors[sources[n]].shape)}" for n in report.mismatched
    ]
    faulty = report.missing or report.unexpected or report.mismatched
    if (strict and faulty) if judge is None else judge(strict, report):
        raise ValueError(f"{report.missing} {report.unexpected} {shapes}")
    if conflict:
        first = {}
        for name in report.loaded:
            other = first.setdefault(id(targets[name]), name)
            one, two = (tensors[sources[key]].to(targets[name]) for key in (other, name))
            if other != name and not torch.equal(one, two):
                raise ValueError(f"{other} and {name}")
    if not early:
        for name in report.loaded:
            put(name)
    return report


@misconception(
    "load_renamed",
    "Tensors are copied while the names are still being looked at. When the error comes, half of the model is new and "
    "half is old, and that is worse than none: check everything, then copy everything.",
)
def load_renamed__copies_while_checking(module, tensors, rules, *, strict=True):
    return _load(module, tensors, rules, strict, early=True)


@misconception(
    "load_renamed",
    "Only the first rule that matches is applied. Each name goes through all rules in order, and a later rule sees what "
    "the earlier ones made.",
)
def load_renamed__first_rule_only(module, tensors, rules, *, strict=True):
    def rename(name, rules):
        for pattern, replacement in rules:
            if re.search(pattern, name):
                return re.sub(pattern, replacement, name)
        return name

    return _load(module, tensors, rules, strict, rename=rename)


@misconception(
    "load_renamed",
    "A rule is applied only where the name begins with its pattern. A pattern may match anywhere in a name; whoever wants "
    "the beginning writes ^.",
)
def load_renamed__only_at_the_start(module, tensors, rules, *, strict=True):
    def rename(name, rules):
        for pattern, replacement in rules:
            if re.match(pattern, name):
                name = re.sub(pattern, replacement, name)
        return name

    return _load(module, tensors, rules, strict, rename=rename)


@misconception(
    "load_renamed",
    "A rule replaces its first match and no other. Every match in the name counts.",
)
def load_renamed__first_match_only(module, tensors, rules, *, strict=True):
    def rename(name, rules):
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name, count=1)
        return name

    return _load(module, tensors, rules, strict, rename=rename)


@misconception(
    "load_renamed",
    "The rules are taken as plain text. They are regular expressions, with anchors and groups: one rule renames the "
    "layers of a whole model, whatever their numbers.",
)
def load_renamed__plain_text(module, tensors, rules, *, strict=True):
    def rename(name, rules):
        for pattern, replacement in rules:
            name = name.replace(pattern, replacement)
        return name

    return _load(module, tensors, rules, strict, rename=rename)


@misconception(
    "load_renamed",
    "Only parameters are targets here. Running statistics and other buffers are in the checkpoint as well; without them "
    "the model in eval is not the one that was saved.",
)
def load_renamed__parameters_only(module, tensors, rules, *, strict=True):
    return _load(module, tensors, rules, strict, targets=dict(module.named_parameters(remove_duplicate=False)))


@misconception(
    "load_renamed",
    "Buffers that are not saved are treated as targets. The state dict leaves them out on purpose, since a module can make "
    "them anew: no checkpoint has them, so strict loading could never succeed.",
)
def load_renamed__unsaved_buffers(module, tensors, rules, *, strict=True):
    buffers = dict(module.named_buffers(remove_duplicate=False))
    targets = module.state_dict(keep_vars=True)
    return _load(module, tensors, rules, strict, targets=targets | buffers)


@misconception(
    "load_renamed",
    "Two tensors of the checkpoint end up under one name, and the later one wins. One of the two is lost without a word, "
    "and which one depends on the order of a dict: a rule is wrong, so say so.",
)
def load_renamed__last_one_wins(module, tensors, rules, *, strict=True):
    return _load(module, tensors, rules, strict, collide=False)


@misconception(
    "load_renamed",
    "A tensor of another shape was taken because it broadcasts. copy_ stretches one row over all rows, and calls that "
    "success: shapes must be equal.",
)
def load_renamed__broadcasts(module, tensors, rules, *, strict=True):
    def fits(source, target):
        try:
            return torch.broadcast_shapes(source.shape, target.shape) == target.shape
        except RuntimeError:
            return False

    return _load(module, tensors, rules, strict, fits=fits)


@misconception(
    "load_renamed",
    "It is enough for you that the number of elements is right. A transposed weight has as many; poured into the other "
    "shape, its numbers land in the wrong places.",
)
def load_renamed__counts_elements(module, tensors, rules, *, strict=True):
    def fits(source, target):
        return source.numel() == target.numel()

    def copy(module, name, target, source):
        target.copy_(source.reshape(target.shape))

    return _load(module, tensors, rules, strict, fits=fits, copy=copy)


@misconception(
    "load_renamed",
    "The parameter was given the tensor itself, through .data. Now it has the checkpoint's dtype, device and memory: "
    "whoever changes one changes the other. Copy the values.",
)
def load_renamed__takes_the_tensor(module, tensors, rules, *, strict=True):
    def copy(module, name, target, source):
        target.data = source.detach()

    return _load(module, tensors, rules, strict, copy=copy)


@misconception(
    "load_renamed",
    "Each parameter was replaced by a new one. An optimizer that was made before still holds the old ones, tied weights "
    "come apart, and what was frozen is trained again: copy into what is there.",
)
def load_renamed__new_parameters(module, tensors, rules, *, strict=True):
    def copy(module, name, target, source):
        owner, _, key = name.rpartition(".")
        values = source.detach().to(target).clone()
        new = nn.Parameter(values) if isinstance(target, nn.Parameter) else values
        setattr(module.get_submodule(owner), key, new)

    return _load(module, tensors, rules, strict, copy=copy)


@misconception(
    "load_renamed",
    "The second name of a tied parameter is reported missing though the parameter was loaded. It is one tensor: "
    "checkpoints of tied models usually have only one of its names.",
)
def load_renamed__tied_is_missing(module, tensors, rules, *, strict=True):
    return _load(module, tensors, rules, strict, tied=False)


@misconception(
    "load_renamed",
    "Two different tensors were loaded into one tied parameter, one over the other. The checkpoint comes from a model "
    "that was not tied, and half of it is lost in silence.",
)
def load_renamed__tied_overwrites(module, tensors, rules, *, strict=True):
    return _load(module, tensors, rules, strict, conflict=False)


@misconception(
    "load_renamed",
    "A shape that does not fit raises even though strict=False. In this mode such a tensor is left out and reported; "
    "load_state_dict is sterner here than this function.",
)
def load_renamed__mismatch_always_raises(module, tensors, rules, *, strict=True):
    return _load(module, tensors, rules, strict, judge=lambda s, r: r.mismatched or (s and (r.missing or r.unexpected)))


@misconception(
    "load_renamed",
    "strict looks at missing and unexpected names and lets a wrong shape pass. The tensor is left out without an error, "
    "and that parameter keeps its random start.",
)
def load_renamed__strict_ignores_shapes(module, tensors, rules, *, strict=True):
    return _load(module, tensors, rules, strict, judge=lambda s, r: s and (r.missing or r.unexpected))


@misconception(
    "load_renamed",
    "strict=True does not refuse what the module does not know. A misspelled rule leaves tensors lying around, and that is "
    "how one notices it.",
)
def load_renamed__strict_ignores_unexpected(module, tensors, rules, *, strict=True):
    return _load(module, tensors, rules, strict, judge=lambda s, r: s and (r.missing or r.mismatched))


@misconception(
    "load_renamed",
    "strict=True accepts a checkpoint that lacks something. What was missing keeps its random start, the model runs, and its "
    "answers are noise.",
)
def load_renamed__strict_ignores_missing(module, tensors, rules, *, strict=True):
    return _load(module, tensors, rules, strict, judge=lambda s, r: s and (r.unexpected or r.mismatched))


@misconception(
    "load_renamed",
    "Unexpected tensors are reported under the names that the rules made. Whoever reads this looks for them in the "
    "checkpoint, where they have their own names.",
)
def load_renamed__unexpected_by_new_name(module, tensors, rules, *, strict=True):
    return _load(module, tensors, rules, strict, shown=lambda source, name: name)


@misconception(
    "load_renamed",
    "The dict of the caller lost its entries: they were taken out while loading. The same checkpoint is often loaded into "
    "a second model.",
)
def load_renamed__empties_the_dict(module, tensors, rules, *, strict=True):
    report = _load(module, tensors, rules, strict)
    tensors.clear()
    return report


# LoRALinear


class _Lora(right.LoRALinear):
    """The right layer, to be spoiled in one place."""


@misconception(
    "LoRALinear",
    "Both factors start with random numbers, so the layer is not its base at the start: a finished model is thrown off "
    "before the first step.",
)
class LoRALinear__both_random(_Lora):
    def __init__(self, base, rank, alpha):
        super().__init__(base, rank, alpha)
        nn.init.normal_(self.update.up.weight)


@misconception(
    "LoRALinear",
    "Both factors start at zero. Each one's gradient is multiplied by the other, so neither ever moves: one of them must "
    "be random.",
)
class LoRALinear__both_zero(_Lora):
    def __init__(self, base, rank, alpha):
        super().__init__(base, rank, alpha)
        nn.init.zeros_(self.update.down.weight)


@misconception(
    "LoRALinear",
    "The wrong factor starts at zero. Both choices begin as the base, and here it is the upper one, as in the paper and in "
    "the checkpoints that follow it.",
)
class LoRALinear__down_is_zero(_Lora):
    def __init__(self, base, rank, alpha):
        super().__init__(base, rank, alpha)
        nn.init.zeros_(self.update.down.weight)
        nn.init.normal_(self.update.up.weight)


@misconception(
    "LoRALinear",
    "The update is added without its factor. alpha / rank keeps the size of the update when the rank is changed; with "
    "alpha equal to rank it cannot be seen.",
)
class LoRALinear__no_scale(_Lora):
    def __init__(self, base, rank, alpha):
        super().__init__(base, rank, alpha)
        self.scale = 1.0


@misconception(
    "LoRALinear",
    "The update is multiplied by alpha alone. It is alpha / rank: with twice the rank there are twice as many terms in "
    "the sum.",
)
class LoRALinear__alpha_alone(_Lora):
    def __init__(self, base, rank, alpha):
        super().__init__(base, rank, alpha)
        self.scale = alpha


@misconception(
    "LoRALinear",
    "alpha and rank were divided as whole numbers, so a factor of 1/2 became 0 and 8/3 became 2.",
)
class LoRALinear__whole_division(_Lora):
    def __init__(self, base, rank, alpha):
        super().__init__(base, rank, alpha)
        self.scale = alpha // rank


@misconception(
    "LoRALinear",
    "The base is still trained. Then all of its gradients and optimizer states are back, which is what the thin update "
    "was to save.",
)
class LoRALinear__base_is_trained(_Lora):
    def __init__(self, base, rank, alpha):
        super().__init__(base, rank, alpha)
        base.requires_grad_(True)


@misconception(
    "LoRALinear",
    "The base was copied. A model whose other parts hold the layer that was given, for a tied weight say, would go on "
    "with another one: wrap it as it is.",
)
class LoRALinear__copies_the_base(_Lora):
    def __init__(self, base, rank, alpha):
        super().__init__(base, rank, alpha)
        twin = Linear(base.weight.shape[1], base.weight.shape[0], base.bias is not None,
                      device=base.weight.device, dtype=base.weight.dtype)  # fmt: skip
        if base.weight.device.type != "meta":
            twin.load_state_dict(base.state_dict())
        self.base = twin.requires_grad_(False)


@misconception(
    "LoRALinear",
    "merge() can be called twice, and the update is then in the weight twice. Calls like this come from a loop over "
    "layers that ran again: refuse.",
)
class LoRALinear__merges_twice(_Lora):
    def merge(self):
        self.merged = False
        super().merge()


@misconception(
    "LoRALinear",
    "unmerge() takes away what was never added. The base is damaged, and nobody is told.",
)
class LoRALinear__unmerges_anything(_Lora):
    @torch.no_grad()
    def unmerge(self):
        self.base.weight.sub_(self.update.up.weight @ self.update.down.weight, alpha=self.scale)
        self.merged = False


@misconception(
    "LoRALinear",
    "After merge() the update is still added in forward, so it counts twice. The weight has it by now: the base alone is "
    "the layer.",
)
class LoRALinear__adds_after_merging(_Lora):
    def forward(self, x):
        return self.base(x) + self.scale * self.update(x)


@misconception(
    "LoRALinear",
    "merge() adds the product of the factors without alpha / rank. What the layer computes changes the moment it is merged.",
)
class LoRALinear__merges_without_scale(_Lora):
    @torch.no_grad()
    def _shift(self, factor):
        self.base.weight.add_(self.update.up.weight @ self.update.down.weight, alpha=1 if factor > 0 else -1)
        self.merged = not self.merged


@misconception(
    "LoRALinear",
    "The two factors are multiplied to a full weight at every call. The numbers are right, and the price is that of a "
    "layer as thick as the base: send x through one factor and then the other.",
)
class LoRALinear__forms_the_product(_Lora):
    def forward(self, x):
        if self.merged:
            return self.base(x)
        weight = self.base.weight + self.scale * self.update.up.weight @ self.update.down.weight
        return F.linear(x, weight, self.base.bias)


@misconception(
    "LoRALinear",
    "merge() puts a new Parameter into the base. It asks for gradients again, and everybody who holds the old one is left "
    "behind: add in place.",
)
class LoRALinear__new_parameter(_Lora):
    @torch.no_grad()
    def _shift(self, factor):
        self.base.weight = nn.Parameter(self.base.weight + factor * self.update.up.weight @ self.update.down.weight)
        self.merged = not self.merged


@misconception(
    "LoRALinear",
    "The update was made in float32 on the CPU, whatever the base is. A base in bfloat16 or on a GPU cannot be added to "
    "it: take dtype and device from the weight.",
)
class LoRALinear__ignores_dtype(_Lora):
    def __init__(self, base, rank, alpha):
        super().__init__(base, rank, alpha)
        self.update = LowRankLinear(base.weight.shape[1], base.weight.shape[0], rank, bias=False)
        nn.init.zeros_(self.update.up.weight)


@misconception(
    "LoRALinear",
    "The update has a bias of its own. It stands in the state dict and is trained, and merge() has no place to put it.",
)
class LoRALinear__update_with_bias(_Lora):
    def __init__(self, base, rank, alpha):
        super().__init__(base, rank, alpha)
        weight = base.weight
        self.update = LowRankLinear(weight.shape[1], weight.shape[0], rank, device=weight.device, dtype=weight.dtype)
        nn.init.zeros_(self.update.up.weight)
        nn.init.zeros_(self.update.up.bias)


# QKVProjection


class _Split(nn.Module):
    """The right layer, with the step that splits to be replaced."""

    _version = 2

    def __init__(self, D, bias=True):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = Linear(D, D, bias), Linear(D, D, bias), Linear(D, D, bias)

    def forward(self, x):
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def kinds(self):
        return [name for name, _ in self.q_proj.named_parameters()]

    def cut(self, fused):
        return fused.chunk(3)

    def split(self, state, prefix, errors, check=True, both=True):
        for kind in self.kinds():
            old = f"{prefix}qkv.{kind}"
            new = [f"{prefix}{name}_proj.{kind}" for name in "qkv"]
            if old not in state or (both and any(name in state for name in new)):
                continue
            fused, own = state.pop(old), getattr(self.q_proj, kind)
            wanted = (3 * own.shape[0], *own.shape[1:])
            if check and fused.shape != wanted:
                errors.append(f"{old}: {tuple(fused.shape)}, needed {wanted}")
                continue
            state.update(zip(new, self.cut(fused), strict=True))

    def prepare(self, state, prefix, errors):
        self.split(state, prefix, errors)

    def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors):
        self.prepare(state, prefix, errors)
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected, errors)


@misconception(
    "QKVProjection",
    "Old files are read only when this layer is loaded by itself. Inside of a model its names begin with a prefix that says "
    "where it stands, and load_state_dict of the outer module never calls that of its children.",
)
class QKVProjection__overrides_load_state_dict(_Split):
    def prepare(self, state, prefix, errors):
        pass

    def load_state_dict(self, state_dict, strict=True, assign=False):
        state, errors = dict(state_dict), []
        self.split(state, "", errors)
        if errors:
            raise RuntimeError(str(errors))
        return super().load_state_dict(state, strict, assign)


@misconception(
    "QKVProjection",
    "The rows are dealt out in turns, every third to q. In the fused weight all rows of q come first, then those of k, "
    "then those of v.",
)
class QKVProjection__every_third_row(_Split):
    def cut(self, fused):
        return [fused[i::3] for i in range(3)]


@misconception(
    "QKVProjection",
    "Queries and keys have changed places. Their shapes are the same, so only the numbers tell: the rows are those of q, k "
    "and v, in that order.",
)
class QKVProjection__keys_first(_Split):
    def cut(self, fused):
        q, k, v = fused.chunk(3)
        return k, q, v


@misconception(
    "QKVProjection",
    "A fused tensor of the wrong shape is cut in three all the same. The error then speaks of names that are not in the "
    "file, or does not come at all: check the fused shape and name it.",
)
class QKVProjection__cuts_anything(_Split):
    def prepare(self, state, prefix, errors):
        self.split(state, prefix, errors, check=False)


@misconception(
    "QKVProjection",
    "Where a file has both forms, the fused one replaces what was saved later. The names of today win, and the leftover "
    "is reported.",
)
class QKVProjection__old_form_wins(_Split):
    def prepare(self, state, prefix, errors):
        self.split(state, prefix, errors, both=False)


@misconception(
    "QKVProjection",
    "To accept the old name you made the layer tolerant: what is missing or unexpected beside it is no longer reported. "
    "Rename, and leave the judging to load_state_dict.",
)
class QKVProjection__tolerates_everything(_Split):
    def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors):
        self.prepare(state, prefix, errors)
        nn.Module._load_from_state_dict(self, state, prefix, metadata, False, [], [], errors)
        for name in ("q_proj", "k_proj", "v_proj"):
            for kind in self.kinds():
                state.setdefault(f"{prefix}{name}.{kind}", getattr(getattr(self, name), kind).detach().clone())
        known = {f"{prefix}{name}.{kind}" for name in ("q_proj", "k_proj", "v_proj") for kind in self.kinds()}
        for name in [name for name in state if name.startswith(prefix) and name not in known]:
            del state[name]


@misconception(
    "QKVProjection",
    "Weight and bias are split only when both are there. A file may have one of them in the old form alone, and what it "
    "does have should be read.",
)
class QKVProjection__all_or_none(_Split):
    def prepare(self, state, prefix, errors):
        if all(f"{prefix}qkv.{kind}" in state for kind in self.kinds()):
            self.split(state, prefix, errors)


@misconception(
    "QKVProjection",
    "A fused bias is thrown away where the layer has none. Whoever loads it believes that all of the file was used: an "
    "unused tensor is unexpected.",
)
class QKVProjection__drops_the_bias(_Split):
    def prepare(self, state, prefix, errors):
        self.split(state, prefix, errors)
        if self.q_proj.bias is None:
            state.pop(f"{prefix}qkv.bias", None)


@misconception(
    "QKVProjection",
    "The layer still holds one fused weight, so the old form is what it saves. Reading old files is asked for; what is "
    "written has the new names.",
)
class QKVProjection__still_fused(nn.Module):
    def __init__(self, D, bias=True):
        super().__init__()
        self.qkv = Linear(D, 3 * D, bias)

    def forward(self, x):
        return self.qkv(x).chunk(3, dim=-1)


@misconception(
    "QKVProjection",
    "The state dict says version 1, the number that every module starts with. Whoever must read this form next year has "
    "nothing to tell it by.",
)
class QKVProjection__version_one(_Split):
    _version = 1
