"""Day 11: optimizers. Recurrences from SGD to AdamW, a schedule for the learning rate, and who is decayed at all.

The contract of the four optimizers of this file:

- They are subclasses of torch.optim.Optimizer. `params` is what that class takes: an iterable of tensors, or of
  dicts with "params" and settings of their own. The settings lie in `param_groups` under the names of the
  arguments and are read anew at each step, so that a schedule can change them in between.
- `step` updates each parameter that has a gradient in place: the parameter stays the same object in the same
  memory, a leaf that requires grad, and no graph is recorded. Shapes and strides are arbitrary.
- A parameter whose `.grad` is None is left alone: its value, and all that is remembered about it.
- A `.grad` is read and not changed, nor kept: whoever overwrites it after the step does not change the next one.
- What has to be remembered lies in `self.state`, per parameter. Tensors of the parameter's shape have its dtype and
  are on its device. Where updates are counted, the count is a whole number: an int, or a tensor of a dtype that
  counts exactly (in bfloat16, 256 + 1 is 256). So the `state_dict()` of one optimizer, loaded into a fresh one,
  continues the run bit by bit.
- `step(closure)` calls the closure once, before the update and with gradients switched on, and returns what it
  returned. `step()` returns None.
- Parameters in bfloat16 are updated in bfloat16.
- What is refused are arguments of the constructor. Settings that a group brings of its own need no check.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from day05_nn_module_basics import trainable_groups  # for param_groups: the trainable parameters, each once
from torch import Tensor, nn
from torch.optim import Optimizer

Params = Iterable[Tensor] | Iterable[dict[str, Any]]
Closure = Callable[[], Any]


def cosine_lr(step: int, *, lr_max: float, lr_min: float, warmup: int, total: int) -> float:
    """The learning rate of update number `step`, which counts from 0.

    In the first `warmup` steps it grows by the same amount each time: step 0 gets lr_max / (warmup + 1), so that
    already the first update learns something, and step `warmup` is the first to get lr_max. From there it falls
    along half a cosine, flat at both ends, and reaches lr_min at step `total`. Later steps get lr_min, too.

    Without warmup, and with total > 0, step 0 gets lr_max. With warmup == total there is the ramp alone, then lr_min;
    if both are 0, that is lr_min from step 0 on. Returns a float where lr_max and lr_min are floats. A warmup that is
    negative or larger than total raises ValueError with both numbers in the message.
    """
    raise NotImplementedError


def run(
    optimizer_factory: Callable[[list[Tensor]], Optimizer], f: Callable[[Tensor], Tensor], x0: Tensor, steps: int
) -> Tensor:
    """The path (steps + 1, D) that an optimizer takes on f, from x0 (D,): row k is where it is after k steps.

    `optimizer_factory` is called once, with a list of one tensor: a leaf that requires grad and starts at x0, in
    memory of its own. `f` takes that tensor and returns a scalar; it is evaluated once per step, and each step is
    made with the gradient at the current point alone.

    The path has the dtype and device of x0, and no graph. x0 does not change and gets no `.grad`, also where it
    requires grad. With 0 steps the path is x0 alone.
    """
    raise NotImplementedError


class SGD(Optimizer):
    """Gradient descent with momentum, as torch.optim.SGD computes it.

    At each step of a parameter p, with g its gradient plus weight_decay * p:

    - without momentum the direction is g;
    - with momentum there is a buffer b. Where p has none yet it becomes g itself, else momentum * b +
      (1 - dampening) * g. The direction is b, or with nesterov g + momentum * b, where b is the new one;
    - p becomes p - lr * direction.

    Without momentum nothing is remembered, with it one tensor of the size of p; 64 bytes more per parameter are
    fine. A step holds at most four new tensors of the size of the largest parameter (and 4 kB) at the same time, and
    takes at most 12 torch operations per parameter.

    A negative lr, momentum or weight_decay raises ValueError with the number in the message; 0 is allowed.
    So does nesterov without momentum, or with a dampening other than 0.
    """

    def __init__(
        self, params: Params, lr: float, momentum: float = 0.0, dampening: float = 0.0, weight_decay: float = 0.0,
        nesterov: bool = False,
    ):  # fmt: skip
        raise NotImplementedError

    def step(self, closure: Closure | None = None) -> Any:
        """Make one update of each parameter that has a gradient; return what the closure returned, or None."""
        raise NotImplementedError


class Adam(Optimizer):
    """Adam, with weight decay as an L2 penalty: weight_decay * p is a part of the gradient g.

    For each parameter there are two running means, both 0 at first, and t, the number of its own updates, this one
    included: m = beta1 * m + (1 - beta1) * g and v = beta2 * v + (1 - beta2) * g^2. Because they start at 0 they are
    corrected: M = m / (1 - beta1^t) and V = v / (1 - beta2^t). Then p becomes p - lr * M / (sqrt(V) + eps).

    A step in which a parameter has no gradient is none of its updates.

    Remembers at most two tensors of the size of p, and 64 bytes more per parameter. Once these exist, a step holds
    at most four new tensors of the size of the largest parameter (and 4 kB) at the same time, and takes at most 16
    torch operations per parameter.

    A negative lr, eps or weight_decay, and a beta that is negative or not below 1, raise ValueError with the number
    in the message; 0 is allowed for each.
    """

    def __init__(
        self, params: Params, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):  # fmt: skip
        raise NotImplementedError

    def step(self, closure: Closure | None = None) -> Any:
        """Make one update of each parameter that has a gradient; return what the closure returned, or None."""
        raise NotImplementedError


class AdamW(Optimizer):
    """Adam with decoupled weight decay: the gradient knows nothing of it.

    At each of its updates a parameter is first multiplied by 1 - lr * weight_decay, with the lr of this step. Then
    it moves as in Adam without decay, by lr * M / (sqrt(V) + eps). A parameter without gradient does not decay; one
    whose gradient is 0 everywhere does.

    Remembers and refuses what Adam does. A step holds no more than Adam's, and takes at most 14 torch operations per
    parameter.
    """

    def __init__(
        self, params: Params, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.01,
    ):  # fmt: skip
        raise NotImplementedError

    def step(self, closure: Closure | None = None) -> Any:
        """Make one update of each parameter that has a gradient; return what the closure returned, or None."""
        raise NotImplementedError


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters of a model in two groups, ready for an optimizer: first those that decay, then the others.

    The first dict has "weight_decay" as given, the second 0.0; "params" is a list in both, in the order of
    `model.parameters()`, and may be empty. Every trainable parameter is in one of the two, once, also where several
    modules share it. Frozen parameters are in neither. Nothing about the model changes.

    Not decayed are parameters with fewer than two dimensions, and those that belong directly to an embedding: a
    module whose class, or a class it inherits from, has a name with `Embedding` in it (nn.Embedding, nn.EmbeddingBag,
    one of your own). What lies in submodules of such a module is judged by itself. A matrix that an embedding shares
    with another layer is an embedding, wherever it comes first. Names of attributes have no say.
    """
    raise NotImplementedError


class ForeachAdamW(Optimizer):
    """The same updates as AdamW, in a number of torch operations that does not depend on the number of parameters.

    Once every parameter has been updated before, a step of a group with a hundred parameters takes as many torch
    operations as one of a group with three, and no more than 30. It may hold more memory than the loop: up to four
    new tensors of the size of each parameter. Every parameter still has its own number of updates, and what happens to it
    is the same bit for bit as if it were alone in an optimizer of this class.

    All else is as in AdamW, the defaults included; a group in which nobody has a gradient is left alone.
    """

    def __init__(
        self, params: Params, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.01,
    ):  # fmt: skip
        raise NotImplementedError

    def step(self, closure: Closure | None = None) -> Any:
        """Make one update of each parameter that has a gradient; return what the closure returned, or None."""
        raise NotImplementedError
