"""Known wrong solutions of day 05, each with what its numbers say."""

import re
from itertools import pairwise

import torch
from torch import nn

from checker.testing import misconception
from reference.day05_nn_module_basics import (
    MLP,
    Residual,
    Row,
    Standardizer,
    count_parameters,
    per_sample_grads,
)

# count_parameters


@misconception(
    "count_parameters",
    "You add up what each module owns by itself. A weight that two modules share is owned by both, so it "
    "was counted for each of them, although the optimizer and the memory know it only once.",
)
def count__sum_over_modules(module, trainable_only=False):
    return sum(
        p.numel()
        for m in module.modules()
        for p in m.parameters(recurse=False)
        if p.requires_grad or not trainable_only
    )


@misconception(
    "count_parameters",
    "`parameters()` already walks down to the leaves. You asked every module on the way as well, so a layer "
    "is counted again for each container around it.",
)
def count__each_level_again(module, trainable_only=False):
    return sum(p.numel() for m in module.modules() for p in m.parameters() if p.requires_grad or not trainable_only)


@misconception(
    "count_parameters",
    "The state_dict is the list of what gets saved: it has the buffers in it, and a tied weight stands "
    "there under every name. Neither belongs in a count of parameters.",
)
def count__state_dict(module, trainable_only=False):
    return sum(t.numel() for t in module.state_dict(keep_vars=True).values() if t.requires_grad or not trainable_only)


@misconception(
    "count_parameters",
    "Your total has the buffers in it. Running statistics are saved with the model, but nobody trains them.",
)
def count__with_buffers(module, trainable_only=False):
    total = sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable_only)
    return total + sum(b.numel() for b in module.buffers())


@misconception(
    "count_parameters",
    "That is how many tensors there are. Asked for is how many numbers are in them.",
)
def count__tensors(module, trainable_only=False):
    return len([p for p in module.parameters() if p.requires_grad or not trainable_only])


@misconception(
    "count_parameters",
    "The frozen parameters are missing from the plain count. They are left out only when trainable_only asks for it.",
)
def count__trainable_always(module, trainable_only=False):
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


@misconception(
    "count_parameters",
    "trainable_only makes no difference in your count: what is frozen was counted with the rest.",
)
def count__trainable_ignored(module, trainable_only=False):
    return sum(p.numel() for p in module.parameters())


@misconception(
    "count_parameters",
    "You look at the direct children only: parameters of the module itself and of grandchildren are missing.",
)
def count__children(module, trainable_only=False):
    return sum(
        p.numel()
        for child in module.children()
        for p in child.parameters(recurse=False)
        if p.requires_grad or not trainable_only
    )


@misconception(
    "count_parameters",
    "You tell shared weights by their address in memory. On the meta device no tensor has one, so they all "
    "looked like the same weight. What is shared is the Parameter object.",
)
def count__by_address(module, trainable_only=False):
    seen = {p.data_ptr(): p for p in module.parameters() if p.requires_grad or not trainable_only}
    return sum(p.numel() for p in seen.values())


# trainable_groups


@misconception(
    "trainable_groups",
    "A weight that two modules share is in your list twice. An optimizer would step it twice with the same gradient.",
)
def groups__per_module(module):
    return [p for m in module.modules() for p in m.parameters(recurse=False) if p.requires_grad]


@misconception(
    "trainable_groups",
    "The frozen parameters are in your list, too. Whoever freezes them does not expect to find them in an optimizer.",
)
def groups__all(module):
    return list(module.parameters())


@misconception(
    "trainable_groups",
    "These tensors have the right numbers but are not the module's own objects. An optimizer would train "
    "the copies and the module would stay as it is.",
)
def groups__detached(module):
    return [p.detach().clone() for p in module.parameters() if p.requires_grad]


@misconception(
    "trainable_groups",
    "You return an iterator. The first reader empties it: the optimizer would get all of it and the next "
    "caller nothing.",
)
def groups__generator(module):
    return (p for p in module.parameters() if p.requires_grad)


@misconception(
    "trainable_groups",
    "You compare parameters by their values. Two layers that happen to hold equal numbers are two layers; "
    "tied means one object under two names.",
)
def groups__by_value(module):
    kept = []
    for p in module.parameters():
        known = any(p.shape == q.shape and torch.equal(p, q) for q in kept)
        if p.requires_grad and not known:
            kept.append(p)
    return kept


# MLP


@misconception(
    "MLP",
    "The state_dict is empty: your layers sit in a Python list, and nn.Module does not look into lists. The "
    "outputs are right, but an optimizer gets nothing to train, and .to() and saving pass the layers by.",
)
class mlp__python_list(nn.Module):
    def __init__(self, sizes, activation=torch.relu):
        super().__init__()
        if len(sizes) < 2:
            raise ValueError(f"too few sizes: {sizes}")
        self.activation = activation
        self.layers = [nn.Linear(n_in, n_out) for n_in, n_out in pairwise(sizes)]

    forward = MLP.forward


@misconception(
    "MLP",
    "You assigned a module before super().__init__() ran. That call makes the tables in which nn.Module "
    "files its members; before it there is nowhere to put them.",
)
class mlp__before_super(nn.Module):
    def __init__(self, sizes, activation=torch.relu):
        if len(sizes) < 2:
            raise ValueError(f"too few sizes: {sizes}")
        self.activation = activation
        self.layers = nn.ModuleList(nn.Linear(n_in, n_out) for n_in, n_out in pairwise(sizes))
        super().__init__()

    forward = MLP.forward


@misconception(
    "MLP",
    "The activation also ran after the last layer. Its outputs are the answer (scores, coordinates) and "
    "must be free to leave the range of the activation.",
)
class mlp__activation_at_the_end(MLP):
    def forward(self, x):
        return self.activation(super().forward(x))


@misconception(
    "MLP",
    "No activation ran. Layers without one between them collapse: the whole chain is a single linear map.",
)
class mlp__no_activation(MLP):
    def __init__(self, sizes, activation=torch.relu):
        super().__init__(sizes, lambda h: h)


@misconception(
    "MLP",
    "The activation that was given is ignored: these are the numbers of a relu network.",
)
class mlp__always_relu(MLP):
    def __init__(self, sizes, activation=torch.relu):
        super().__init__(sizes, torch.relu)


@misconception(
    "MLP",
    "`[layer] * n` is n references to one layer. Every position of your chain shares its weight, so there "
    "is one layer to train, and it only fits where all widths are equal.",
)
class mlp__one_layer_repeated(MLP):
    def __init__(self, sizes, activation=torch.relu):
        super().__init__(sizes, activation)
        self.layers = nn.ModuleList([nn.Linear(sizes[0], sizes[1])] * (len(sizes) - 1))


class _Activation(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@misconception(
    "MLP",
    "Your keys skip numbers because the activations sit in the same container as the layers and take an "
    "index each. A checkpoint of this module would not load where layers are numbered 0, 1, 2.",
)
class mlp__activations_numbered(nn.Module):
    def __init__(self, sizes, activation=torch.relu):
        super().__init__()
        if len(sizes) < 2:
            raise ValueError(f"too few sizes: {sizes}")
        parts = []
        for n_in, n_out in pairwise(sizes):
            parts += [nn.Linear(n_in, n_out), _Activation(activation)]
        self.layers = nn.Sequential(*parts[:-1])

    def forward(self, x):
        if x.shape[-1] != self.layers[0].in_features:
            raise ValueError(f"got {tuple(x.shape)}, expected (..., {self.layers[0].in_features})")
        return self.layers(x)


@misconception(
    "MLP",
    "Hooks on the layers did not run, because you call `layer.forward(x)`. The call `layer(x)` is what runs "
    "the hooks and then forward.",
)
class mlp__forward_of_layers(MLP):
    def forward(self, x):
        if x.shape[-1:] != (self.layers[0].in_features,):
            raise ValueError(f"got {tuple(x.shape)}, expected (..., {self.layers[0].in_features})")
        *hidden, last = self.layers
        for layer in hidden:
            x = self.activation(layer.forward(x))
        return last.forward(x)


@misconception(
    "MLP",
    "The leading axes came back as a single one. They are a batch of any shape and have to survive: only "
    "the last axis is mapped.",
)
class mlp__flattens(MLP):
    def forward(self, x):
        if x.shape[-1:] != (self.layers[0].in_features,):
            raise ValueError(f"got {tuple(x.shape)}, expected (..., {self.layers[0].in_features})")
        return super().forward(x.reshape(-1, x.shape[-1]))


@misconception(
    "MLP",
    "After copy.deepcopy your module still computes with the layers of the original: a function that was "
    "made in __init__ has caught them, and a copy of the module does not copy what a function has caught.",
)
class mlp__closure(MLP):
    def __init__(self, sizes, activation=torch.relu):
        super().__init__(sizes, activation)
        run = super().forward
        self.run = lambda x: run(x)

    def forward(self, x):
        return self.run(x)


@misconception(
    "MLP",
    "The biases are missing from the state_dict: each layer should have a weight and a bias.",
)
class mlp__no_bias(MLP):
    def __init__(self, sizes, activation=torch.relu):
        super().__init__(sizes, activation)
        self.layers = nn.ModuleList(nn.Linear(n_in, n_out, bias=False) for n_in, n_out in pairwise(sizes))


# Standardizer


def _spread(x, mean):
    return (x - mean).square().mean(dim=0).sqrt()


@misconception(
    "Standardizer",
    "The state_dict is empty: mean and std are ordinary attributes that hold tensors. Nothing saves them, "
    "and .to() leaves them where they are. Tensors that belong to a module but are not trained have a "
    "registry of their own.",
)
class standardizer__plain_tensors(Standardizer):
    def __init__(self, n_features):
        nn.Module.__init__(self)
        self.mean = torch.zeros(n_features)
        self.std = torch.ones(n_features)


@misconception(
    "Standardizer",
    "mean and std show up among the parameters, so an optimizer would train them away from what was measured.",
)
class standardizer__parameters(Standardizer):
    def __init__(self, n_features):
        nn.Module.__init__(self)
        self.mean = nn.Parameter(torch.zeros(n_features))
        self.std = nn.Parameter(torch.ones(n_features))


@misconception(
    "Standardizer",
    "A parameter that is frozen is a parameter all the same: it is counted, listed and handed to "
    "optimizers. State that is never trained should not be one.",
)
class standardizer__frozen_parameters(Standardizer):
    def __init__(self, n_features):
        nn.Module.__init__(self)
        self.mean = nn.Parameter(torch.zeros(n_features), requires_grad=False)
        self.std = nn.Parameter(torch.ones(n_features), requires_grad=False)


@misconception(
    "Standardizer",
    "The buffers move with the module but are not saved: with persistent=False they stay out of the "
    "state_dict, and a loaded model would have forgotten its statistics.",
)
class standardizer__not_saved(Standardizer):
    def __init__(self, n_features):
        nn.Module.__init__(self)
        self.register_buffer("mean", torch.zeros(n_features), persistent=False)
        self.register_buffer("std", torch.ones(n_features), persistent=False)


@misconception(
    "Standardizer",
    "fit puts new tensors in the place of the buffers. Whoever holds the old ones (an average of models, a "
    "second reference) keeps reading the numbers from before, and the dtype is now that of the data.",
)
class standardizer__reassigned(Standardizer):
    @torch.no_grad()
    def fit(self, x):
        if x.dim() != 2 or x.shape[1] != len(self.mean) or len(x) == 0:
            raise ValueError(f"got {tuple(x.shape)}, expected (N, {len(self.mean)})")
        x = x.to(torch.promote_types(x.dtype, self.mean.dtype))
        self.mean = x.mean(dim=0)
        self.std = _spread(x, self.mean).masked_fill((x == x[0]).all(dim=0), 1.0)
        return self


@misconception(
    "Standardizer",
    "Your std is a little too large: it was divided by N - 1, which is torch's default. A population "
    "standard deviation divides by N, and with one row N - 1 makes it NaN.",
)
class standardizer__sample_std(Standardizer):
    @torch.no_grad()
    def fit(self, x):
        super().fit(x)
        constant = (x == x[0]).all(dim=0) & (len(x) > 1)
        wide = x.to(torch.promote_types(x.dtype, self.mean.dtype))
        variance = (wide - wide.mean(dim=0)).square().sum(dim=0) / (len(x) - 1)
        self.std.copy_(variance.sqrt().masked_fill(constant, 1.0))
        return self


@misconception(
    "Standardizer",
    "One mean and one std for the whole table: every column got the same two numbers. A feature is measured "
    "down its own column.",
)
class standardizer__whole_table(Standardizer):
    @torch.no_grad()
    def fit(self, x):
        super().fit(x)
        wide = x.to(torch.promote_types(x.dtype, self.mean.dtype))
        std = wide.std(correction=0)
        self.mean.fill_(wide.mean())
        self.std.fill_(1.0 if std == 0 else std)
        return self


@misconception(
    "Standardizer",
    "A column without spread has std 0 in your module, and dividing by it gives NaN or infinity. Decide "
    "what such a column means: here it is only centered.",
)
class standardizer__zero_std(Standardizer):
    @torch.no_grad()
    def fit(self, x):
        super().fit(x)
        self.std.masked_fill_((x == x[0]).all(dim=0), 0.0)
        return self


@misconception(
    "Standardizer",
    "Some columns of equal numbers did not get std 1. You ask whether the computed std is 0, but the mean "
    "of seven equal floats can be off in the last digit, and then the std is tiny and not 0: the division "
    "blows rounding errors up to the size of data.",
)
class standardizer__asks_for_exact_zero(Standardizer):
    @torch.no_grad()
    def fit(self, x):
        super().fit(x)
        wide = x.to(torch.promote_types(x.dtype, self.mean.dtype))
        std = _spread(wide, wide.mean(dim=0))
        self.std.copy_(std.masked_fill(std == 0, 1.0))
        return self


@misconception(
    "Standardizer",
    "A small epsilon was added to every std, so none is what was measured, and a column without spread gets "
    "an std near 0 where 1 was promised.",
)
class standardizer__epsilon(Standardizer):
    @torch.no_grad()
    def fit(self, x):
        super().fit(x)
        wide = x.to(torch.promote_types(x.dtype, self.mean.dtype))
        self.std.copy_(_spread(wide, wide.mean(dim=0)) + 1e-5)
        return self


@misconception(
    "Standardizer",
    "You take the variance as the mean of squares minus the squared mean. With numbers around 10,000 that "
    "is the difference of two values near 100 million, and float32 has no digits left for the answer.",
)
class standardizer__one_pass(Standardizer):
    @torch.no_grad()
    def fit(self, x):
        super().fit(x)
        wide = x.to(torch.promote_types(x.dtype, self.mean.dtype))
        variance = (wide.square().mean(dim=0) - wide.mean(dim=0).square()).clamp(min=0)
        self.std.copy_(variance.sqrt().masked_fill((x == x[0]).all(dim=0), 1.0))
        return self


@misconception(
    "Standardizer",
    "std holds the variance: the root is missing.",
)
class standardizer__variance(Standardizer):
    @torch.no_grad()
    def fit(self, x):
        super().fit(x)
        self.std.square_()
        return self


@misconception(
    "Standardizer",
    "The statistics hang on the graph of the data, because fit ran with gradients recorded. They are "
    "measurements, and training must not reach through them.",
)
class standardizer__with_graph(Standardizer):
    def fit(self, x):
        if x.dim() != 2 or x.shape[1] != len(self.mean) or len(x) == 0:
            raise ValueError(f"got {tuple(x.shape)}, expected (N, {len(self.mean)})")
        wide = x.to(torch.promote_types(x.dtype, self.mean.dtype))
        self.mean.copy_(wide.mean(dim=0))
        self.std.copy_(_spread(wide, wide.mean(dim=0)).masked_fill((x == x[0]).all(dim=0), 1.0))
        return self


@misconception(
    "Standardizer",
    "bfloat16 data were averaged in bfloat16, which has about three digits. The buffers have seven: measure "
    "in the wider of the two dtypes.",
)
class standardizer__half_statistics(Standardizer):
    @torch.no_grad()
    def fit(self, x):
        if x.dim() != 2 or x.shape[1] != len(self.mean) or len(x) == 0:
            raise ValueError(f"got {tuple(x.shape)}, expected (N, {len(self.mean)})")
        self.mean.copy_(x.mean(dim=0))
        self.std.copy_(_spread(x, x.mean(dim=0)).masked_fill((x == x[0]).all(dim=0), 1.0))
        return self


@misconception(
    "Standardizer",
    "The output came back in the dtype of the buffers. What a layer returns has the dtype of what it was given.",
)
class standardizer__dtype_of_the_buffers(Standardizer):
    def forward(self, x):
        return super().forward(x.to(self.mean.dtype))


@misconception(
    "Standardizer",
    "forward measures every batch that it sees and overwrites what fit stored. New data must be judged by "
    "the old numbers, or a shift in them can never show.",
)
class standardizer__fits_in_forward(Standardizer):
    def forward(self, x):
        if x.dim() == 2 and len(x) > 1 and self.training and x.shape[-1] == len(self.mean):
            self.fit(x)
        return super().forward(x)


@misconception(
    "Standardizer",
    "The input itself was changed: an in-place subtraction writes into the caller's tensor.",
)
class standardizer__in_place(Standardizer):
    def forward(self, x):
        if x.shape[-1:] != self.mean.shape:
            raise ValueError(f"got {tuple(x.shape)}, expected (..., {len(self.mean)})")
        dtype, wide = x.dtype, torch.promote_types(x.dtype, self.mean.dtype)
        if x.requires_grad or x.dtype != wide:
            return ((x - self.mean) / self.std).to(dtype)
        x -= self.mean
        x /= self.std
        return x


# Residual


class _Wrong(nn.Module):
    """x + scale * inner(x) around whatever kind of scale the subclass makes."""

    def __init__(self, inner, scale=1.0):
        super().__init__()
        self.inner = inner
        self.scale = self.make(float(scale))

    def forward(self, x):
        update = self.inner(x)
        if update.shape != x.shape:
            raise ValueError(f"{tuple(x.shape)} became {tuple(update.shape)}")
        return x + self.scale * update


@misconception(
    "Residual",
    "scale is a plain Python number: it works, but there is nothing that an optimizer could move.",
)
class residual__number(_Wrong):
    def make(self, scale):
        return scale


@misconception(
    "Residual",
    "scale is a tensor with requires_grad, and it even gets a gradient. But it was assigned as an ordinary "
    "attribute: parameters(), state_dict() and .to() do not know it.",
)
class residual__plain_tensor(_Wrong):
    def make(self, scale):
        return torch.tensor(scale, requires_grad=True)


@misconception(
    "Residual",
    "You made a Parameter and then converted or moved it. That call returns a new tensor which is computed "
    "from the Parameter (is_leaf is False) and is no Parameter itself: the module registered nothing, and "
    "the thing that could learn was thrown away. Convert first and wrap last.",
)
class residual__converted_parameter(_Wrong):
    def make(self, scale):
        return nn.Parameter(torch.tensor(scale, dtype=torch.float64)).float()


@misconception(
    "Residual",
    "scale is a buffer: it is saved and moved, but it is not among the parameters and never learns.",
)
class residual__buffer(nn.Module):
    def __init__(self, inner, scale=1.0):
        super().__init__()
        self.inner = inner
        self.register_buffer("scale", torch.tensor(float(scale)))

    forward = Residual.forward


@misconception(
    "Residual",
    "The Parameter is made inside forward. Every call makes a new one with the starting value, and before "
    "the first call there is none for the optimizer to find.",
)
class residual__made_in_forward(nn.Module):
    def __init__(self, inner, scale=1.0):
        super().__init__()
        self.inner = inner
        self.start = float(scale)

    def forward(self, x):
        self.scale = nn.Parameter(torch.tensor(self.start, device=x.device))
        return Residual.forward(self, x)


@misconception(
    "Residual",
    "scale has the shape (1,) where () was asked for. One element on one axis takes part in type promotion, "
    "a scalar does not: half precision came back as float32.",
)
class residual__one_element(Residual):
    def __init__(self, inner, scale=1.0):
        super().__init__(inner, scale)
        self.scale = nn.Parameter(torch.tensor([float(scale)]))


@misconception(
    "Residual",
    "An int makes an integer tensor, and integers have no gradients, so it cannot become a Parameter: torch "
    "raised at the whole number.",
)
class residual__integer(Residual):
    def __init__(self, inner, scale=1.0):
        super().__init__(inner)
        self.scale = nn.Parameter(torch.tensor(scale))


@misconception(
    "Residual",
    "The starting value was ignored: scale begins at 1 whatever was asked for.",
)
class residual__starts_at_one(Residual):
    def __init__(self, inner, scale=1.0):
        super().__init__(inner)


@misconception(
    "Residual",
    "The skipped path was scaled along with the update. x itself is to pass unchanged; only what inner adds "
    "is weighed.",
)
class residual__scales_all(Residual):
    def forward(self, x):
        update = self.inner(x)
        if update.shape != x.shape:
            raise ValueError(f"{tuple(x.shape)} became {tuple(update.shape)}")
        return self.scale.to(x.dtype) * (x + update)


@misconception(
    "Residual",
    "x is missing from the sum: this is the scaled update alone.",
)
class residual__no_skip(Residual):
    def forward(self, x):
        update = self.inner(x)
        if update.shape != x.shape:
            raise ValueError(f"{tuple(x.shape)} became {tuple(update.shape)}")
        return self.scale * update


@misconception(
    "Residual",
    "The output does not hang on scale: .item() (or .data, or detach) took the number out of the graph, so "
    "its gradient stays None.",
)
class residual__item(Residual):
    def forward(self, x):
        update = self.inner(x)
        if update.shape != x.shape:
            raise ValueError(f"{tuple(x.shape)} became {tuple(update.shape)}")
        return x + self.scale.item() * update


@misconception(
    "Residual",
    "No gradient reaches inner: its output was cut off from the graph before it was added.",
)
class residual__inner_detached(Residual):
    def forward(self, x):
        with torch.no_grad():
            update = self.inner(x)
        if update.shape != x.shape:
            raise ValueError(f"{tuple(x.shape)} became {tuple(update.shape)}")
        return x + self.scale * update


@misconception(
    "Residual",
    "The hook on inner did not run, because you call `inner.forward(x)`. The module's own call runs the "
    "hooks around it.",
)
class residual__forward_of_inner(Residual):
    def forward(self, x):
        update = self.inner.forward(x)
        if update.shape != x.shape:
            raise ValueError(f"{tuple(x.shape)} became {tuple(update.shape)}")
        return x + self.scale * update


@misconception(
    "Residual",
    "Shapes are not compared: an inner that returns one column was broadcast over all columns of x without a word.",
)
class residual__broadcasts(Residual):
    def forward(self, x):
        return x + self.scale * self.inner(x)


@misconception(
    "Residual",
    "The caller's x was changed: `+=` adds into the tensor that was passed in.",
)
class residual__in_place(Residual):
    def forward(self, x):
        update = self.inner(x)
        if update.shape != x.shape:
            raise ValueError(f"{tuple(x.shape)} became {tuple(update.shape)}")
        if torch.is_grad_enabled():
            return x + self.scale * update
        x += self.scale * update
        return x


# freeze


def _freeze(named, matches):
    frozen = []
    for name, p in named:
        if p.requires_grad and matches(name):
            p.requires_grad_(False)
            p.grad = None
            frozen.append(name)
    return frozen


def _all_names(module):
    return module.named_parameters(remove_duplicate=False)


@misconception(
    "freeze",
    "The pattern was looked up as literal text. It is a regular expression: dots, anchors and alternatives "
    "have a meaning.",
)
def freeze__literal(module, pattern):
    return _freeze(_all_names(module), lambda name: pattern in name)


@misconception(
    "freeze",
    "Only the beginnings of the names were tried. A match may lie anywhere; whoever wants the beginning "
    "says so in the pattern.",
)
def freeze__at_the_start(module, pattern):
    return _freeze(_all_names(module), lambda name: re.match(pattern, name))


@misconception(
    "freeze",
    "The pattern had to cover the whole name. It is enough that the name contains a match.",
)
def freeze__whole_name(module, pattern):
    return _freeze(_all_names(module), lambda name: re.fullmatch(pattern, name))


@misconception(
    "freeze",
    "A tied weight was looked up by its first name only, because named_parameters leaves out further names "
    "of what it has shown. Its second name matches as well.",
)
def freeze__first_names_only(module, pattern):
    return _freeze(module.named_parameters(), lambda name: re.search(pattern, name))


@misconception(
    "freeze",
    "A tied weight is in your list under two names, although one call froze one parameter.",
)
def freeze__reports_twins(module, pattern):
    names = [name for name, p in _all_names(module) if p.requires_grad and re.search(pattern, name)]
    _freeze(_all_names(module), lambda name: re.search(pattern, name))
    return names


@misconception(
    "freeze",
    "Your list has names in it that were frozen before the call. It should say what this call changed.",
)
def freeze__reports_all_matches(module, pattern):
    names = [name for name, _ in module.named_parameters() if re.search(pattern, name)]
    return names if _freeze(_all_names(module), lambda name: re.search(pattern, name)) else names


@misconception(
    "freeze",
    "Nothing is frozen: `requires_grad = False` on a module only makes an attribute of that name, which "
    "nobody reads. The flag that counts is on each parameter.",
)
def freeze__flag_on_modules(module, pattern):
    frozen = []
    for prefix, child in module.named_modules():
        for key, p in child.named_parameters(prefix=prefix, recurse=False):
            if p.requires_grad and re.search(pattern, key):
                child.requires_grad = False
                frozen.append(key)
    return frozen


@misconception(
    "freeze",
    "eval() switches dropout and batch statistics and freezes nothing: the parameters still get gradients.",
)
def freeze__eval_mode(module, pattern):
    frozen = []
    for prefix, child in module.named_modules():
        for key, p in child.named_parameters(prefix=prefix, recurse=False):
            if p.requires_grad and re.search(pattern, key):
                child.eval()
                frozen.append(key)
    return frozen


@misconception(
    "freeze",
    "What did not match was thawed. Freezing twice with two patterns should freeze both parts.",
)
def freeze__thaws_the_rest(module, pattern):
    frozen = _freeze(_all_names(module), lambda name: re.search(pattern, name))
    for name, p in module.named_parameters():
        if not re.search(pattern, name) and name not in frozen:
            p.requires_grad_(True)
    return frozen


@misconception(
    "freeze",
    "The frozen parameters kept the gradient of the last backward. An optimizer looks at .grad, not at "
    "requires_grad, and would go on moving them by it.",
)
def freeze__keeps_gradients(module, pattern):
    frozen = []
    for name, p in _all_names(module):
        if p.requires_grad and re.search(pattern, name):
            p.requires_grad_(False)
            frozen.append(name)
    return frozen


@misconception(
    "freeze",
    "Everything lost its gradient, also what still trains. Only the frozen parameters give theirs up.",
)
def freeze__clears_all_gradients(module, pattern):
    module.zero_grad(set_to_none=True)
    return _freeze(_all_names(module), lambda name: re.search(pattern, name))


# summarize


def _shape(output):
    if isinstance(output, torch.Tensor):
        return tuple(output.shape)
    return tuple(map(_shape, output)) if isinstance(output, (tuple, list)) else None


def _row(name, child, output):
    return Row(name, type(child).__name__, _shape(output), count_parameters(child))


def _hooked(module, rows, named=None):
    """Handles of hooks that write rows."""
    named = module.named_modules() if named is None else named
    return [
        child.register_forward_hook(lambda child, args, output, name=name: rows.append(_row(name, child, output)))
        for name, child in named
    ]


@misconception(
    "summarize",
    "When the forward raises, your hooks stay on the module: the lines that take them off are never reached.",
)
def summarize__hooks_stay_after_an_exception(module, *inputs):
    rows = []
    handles = _hooked(module, rows)
    with torch.no_grad():
        module(*inputs)
    for handle in handles:
        handle.remove()
    return rows


@misconception(
    "summarize",
    "Your hooks are still on the module. Every later forward runs them, and a second summary adds its own to them.",
)
def summarize__hooks_stay(module, *inputs):
    rows = []
    _hooked(module, rows)
    with torch.no_grad():
        module(*inputs)
    return rows


@misconception(
    "summarize",
    "You emptied the tables of hooks, and with yours went those that somebody else had put there.",
)
def summarize__all_hooks_removed(module, *inputs):
    rows = []
    _hooked(module, rows)
    try:
        with torch.no_grad():
            module(*inputs)
    finally:
        for child in module.modules():
            child._forward_hooks.clear()
    return rows


@misconception(
    "summarize",
    "The module's own row is missing: `module.forward(...)` goes past the hooks of the module itself. Call the module.",
)
def summarize__forward_directly(module, *inputs):
    rows = []
    handles = _hooked(module, rows)
    try:
        with torch.no_grad():
            module.forward(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return rows


@misconception(
    "summarize",
    "All outputs are kept until the forward has ended and are measured then. A shape is a few bytes; an "
    "activation that is kept is memory that the forward needs.",
)
def summarize__keeps_outputs(module, *inputs):
    kept = []
    handles = [
        child.register_forward_hook(lambda child, args, output, name=name: kept.append((name, child, output)))
        for name, child in module.named_modules()
    ]
    try:
        with torch.no_grad():
            module(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return [_row(*item) for item in kept]


@misconception(
    "summarize",
    "A module that was called twice has one row: your rows are keyed by name, so the second call replaced the first.",
)
def summarize__one_row_per_name(module, *inputs):
    rows = []
    handles = _hooked(module, rows)
    try:
        with torch.no_grad():
            module(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return list({row.name: row for row in rows}.values())


@misconception(
    "summarize",
    "The rows come in the order of registration. What was asked for is the order in which the calls "
    "finished, which is decided by forward.",
)
def summarize__registration_order(module, *inputs):
    rows = summarize__one_row_per_name(module, *inputs)
    order = [name for name, _ in module.named_modules()]
    return sorted(rows, key=lambda row: order.index(row.name))


@misconception(
    "summarize",
    "Only modules without children have rows. Containers are modules, too, and so is the one that was given.",
)
def summarize__leaves_only(module, *inputs):
    rows = []
    leaves = [(name, child) for name, child in module.named_modules() if not list(child.children())]
    handles = _hooked(module, rows, leaves)
    try:
        with torch.no_grad():
            module(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return rows


@misconception(
    "summarize",
    "A module that is registered under two names got two hooks, so each of its calls has two rows.",
)
def summarize__hooked_twice(module, *inputs):
    rows = []
    handles = _hooked(module, rows, module.named_modules(remove_duplicate=False))
    try:
        with torch.no_grad():
            module(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return rows


@misconception(
    "summarize",
    "A parent comes before its children in your rows. Those are the moments at which calls begin; a call "
    "finishes only after those inside it.",
)
def summarize__calls_begin(module, *inputs):
    rows, slots = [], []

    def begin(name):
        def hook(child, args):
            slots.append(len(rows))
            rows.append(name)

        return hook

    def end(child, args, output):
        at = slots.pop()
        rows[at] = _row(rows[at], child, output)

    handles = []
    try:
        for name, child in module.named_modules():
            handles += [child.register_forward_pre_hook(begin(name)), child.register_forward_hook(end)]
        with torch.no_grad():
            module(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return rows


@misconception(
    "summarize",
    "params counts only what each module owns directly, so containers show 0. A row counts all that is inside.",
)
def summarize__own_parameters_only(module, *inputs):
    rows = []
    handles = _hooked(module, rows)
    own = {name: sum(p.numel() for p in m.parameters(recurse=False)) for name, m in module.named_modules()}
    try:
        with torch.no_grad():
            module(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return [row._replace(params=own[row.name]) for row in rows]


@misconception(
    "summarize",
    "The forward recorded a graph. A summary never calls backward, so everything that was kept for it was "
    "kept in vain.",
)
def summarize__with_graph(module, *inputs):
    rows = []
    handles = _hooked(module, rows)
    try:
        module(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return rows


@misconception(
    "summarize",
    "The module was switched to eval mode and its children with it. A summary looks at the module as it is "
    "and leaves it so.",
)
def summarize__eval_mode(module, *inputs):
    module.eval()
    rows = []
    handles = _hooked(module, rows)
    try:
        with torch.no_grad():
            module(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return rows


# functional_apply


def _owner(module, name):
    path, _, key = name.rpartition(".")
    return module.get_submodule(path), key


def _checked(module, tensors):
    """The promised errors, so that each wrong solution below is wrong in one way only."""
    members = dict(module.named_parameters(remove_duplicate=False))
    members.update(module.named_buffers(remove_duplicate=False))
    chosen = {}
    for name, tensor in tensors.items():
        if name not in members:
            raise KeyError(name)
        if members[name].shape != tensor.shape:
            raise ValueError(f"{name}: {tuple(members[name].shape)} and {tuple(tensor.shape)}")
        if chosen.setdefault(id(members[name]), tensor) is not tensor:
            raise ValueError(f"{name} is tied")
    return members, {name: chosen[id(own)] for name, own in members.items() if id(own) in chosen}


def _table(owner, key):
    return owner._parameters if key in owner._parameters else owner._buffers


def _swapped(module, tensors):
    places = []
    for name, tensor in tensors.items():
        owner, key = _owner(module, name)
        table = _table(owner, key)
        places.append((table, key, table[key]))
        table[key] = tensor
    return places


@misconception(
    "functional_apply",
    "The module still holds the stand-ins after an exception: what puts the originals back is not reached "
    "when the forward raises.",
)
def apply__not_restored_after_an_exception(module, tensors, *args):
    _, stand_ins = _checked(module, tensors)
    before = [(*_owner(module, name), _table(*_owner(module, name))) for name in stand_ins]
    originals = [(table, key, table[key]) for _, key, table in before]
    _swapped(module, stand_ins)
    result = module(*args)
    for table, key, own in originals:
        table[key] = own
    return result


@misconception(
    "functional_apply",
    "The module keeps the stand-ins: nothing puts its own parameters and buffers back.",
)
def apply__never_restored(module, tensors, *args):
    _, stand_ins = _checked(module, tensors)
    _swapped(module, stand_ins)
    return module(*args)


@misconception(
    "functional_apply",
    "The numbers were copied into the module's own parameters and back out again. The output then hangs on "
    "those and not on the tensors that were given: no gradient reaches them.",
)
def apply__copies_values(module, tensors, *args):
    members, stand_ins = _checked(module, tensors)
    originals = {name: (members[name], members[name].detach().clone()) for name in stand_ins}
    try:
        with torch.no_grad():
            for name, tensor in stand_ins.items():
                members[name].copy_(tensor)
        return module(*args)
    finally:
        with torch.no_grad():
            for own, values in originals.values():
                own.copy_(values)


@misconception(
    "functional_apply",
    "load_state_dict makes Parameters out of the values it is given. The copy computes the right numbers, "
    "but the way back to your tensors is cut, and every weight was copied for one call.",
)
def apply__loads_into_a_copy(module, tensors, *args):
    import copy

    _, stand_ins = _checked(module, tensors)
    twin = copy.deepcopy(module)
    for name, tensor in stand_ins.items():
        owner, key = _owner(twin, name)
        _table(owner, key)[key] = nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad)
    return twin(*args)


@misconception(
    "functional_apply",
    "The other name of a tied weight still leads to the old tensor: the module ran with two different "
    "weights where it has one.",
)
def apply__ties_broken(module, tensors, *args):
    _checked(module, tensors)
    places = _swapped(module, tensors)
    try:
        return module(*args)
    finally:
        for table, key, own in reversed(places):
            table[key] = own


@misconception(
    "functional_apply",
    "The members came back in another order: deleting an entry and making it anew puts it at the end, and "
    "the state_dict and the optimizer read them in the order of the table.",
)
def apply__order_lost(module, tensors, *args):
    _, stand_ins = _checked(module, tensors)
    originals = []
    for name, tensor in stand_ins.items():
        owner, key = _owner(module, name)
        table = _table(owner, key)
        originals.append((table, key, table.pop(key)))
        table[key] = tensor
    try:
        return module(*args)
    finally:
        for table, key, own in reversed(originals):
            table.pop(key)
            table[key] = own


@misconception(
    "functional_apply",
    "Buffers were left as they are: only stand-ins for parameters were put in place.",
)
def apply__parameters_only(module, tensors, *args):
    _, stand_ins = _checked(module, tensors)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    places = _swapped(module, {name: t for name, t in stand_ins.items() if name in parameters})
    try:
        return module(*args)
    finally:
        for table, key, own in reversed(places):
            table[key] = own


@misconception(
    "functional_apply",
    "The hook of the module did not run: you call its forward, not the module.",
)
def apply__forward_directly(module, tensors, *args):
    _, stand_ins = _checked(module, tensors)
    places = _swapped(module, stand_ins)
    try:
        return module.forward(*args)
    finally:
        for table, key, own in reversed(places):
            table[key] = own


@misconception(
    "functional_apply",
    "A name that the module does not have was passed over, and the call went on as if it had not been "
    "given. A misspelled weight would be ignored in silence.",
)
def apply__unknown_names_ignored(module, tensors, *args):
    members = dict(module.named_parameters(remove_duplicate=False))
    members.update(module.named_buffers(remove_duplicate=False))
    _, stand_ins = _checked(module, {name: t for name, t in tensors.items() if name in members})
    places = _swapped(module, stand_ins)
    try:
        return module(*args)
    finally:
        for table, key, own in reversed(places):
            table[key] = own


# per_sample_grads


@misconception(
    "per_sample_grads",
    "The gradients are right, but the module ran once per sample. One call can do the work of all of them.",
)
def per_sample__loop(module, loss_fn, x, y):
    if len(x) != len(y):
        raise ValueError(f"{tuple(x.shape)} and {tuple(y.shape)}")
    own = {name: p for name, p in module.named_parameters() if p.requires_grad}
    rows = [torch.autograd.grad(loss_fn(module(x[i : i + 1]), y[i : i + 1]), list(own.values())) for i in range(len(x))]
    return {name: torch.stack(column) for name, column in zip(own, zip(*rows, strict=True), strict=True)}


@misconception(
    "per_sample_grads",
    "These are the gradients of the summed loss, the same for each sample: summing has mixed what should stay apart.",
)
def per_sample__summed(module, loss_fn, x, y):
    grads = per_sample_grads(module, loss_fn, x, y)
    return {name: g.sum(0, keepdim=True).expand_as(g).clone() for name, g in grads.items()}


@misconception(
    "per_sample_grads",
    "Every gradient is N times too small: it was divided by the number of samples, as in the mean over a batch.",
)
def per_sample__divided(module, loss_fn, x, y):
    return {name: g / len(x) for name, g in per_sample_grads(module, loss_fn, x, y).items()}


@misconception(
    "per_sample_grads",
    "The backward passes went through .grad, which now holds their sum in the module. Asked for are the "
    "gradients, not a trace of them.",
)
def per_sample__leaves_grad(module, loss_fn, x, y):
    grads = per_sample_grads(module, loss_fn, x, y)
    for name, p in module.named_parameters():
        if name in grads:
            p.grad = grads[name].sum(0) if p.grad is None else p.grad + grads[name].sum(0)
    return grads
