import torch

from checker.testing import misconception


def _scalar(value):
    if value.shape != ():
        raise ValueError(f"not a scalar: {tuple(value.shape)}")
    return value


def _fits(X, y):
    if X.dim() != 2 or y.shape != X.shape[:1]:
        raise ValueError(f"{tuple(y.shape)} does not fit {tuple(X.shape)}")


def _rows_fit(w, X, y):
    if w.shape != X.shape[1:]:
        raise ValueError(f"{tuple(w.shape)} does not fit {tuple(X.shape)}")
    _fits(X, y)


def _shapes_fit(x, v):
    if v.shape != x.shape:
        raise ValueError(f"{tuple(v.shape)} does not fit {tuple(x.shape)}")


def _leaf(x):
    return x.detach().requires_grad_()


def _grad(value, leaf, **more):
    if not value.requires_grad:
        return torch.zeros_like(leaf)
    return torch.autograd.grad(value, leaf, materialize_grads=True, **more)[0]


def _at(f, x):
    leaf = _leaf(x)
    with torch.enable_grad():
        return _scalar(f(leaf)), leaf


# grad_of


@misconception(
    "grad_of",
    "You asked x itself for gradients. It was lent to you: it goes back with requires_grad switched on and something in "
    ".grad, and if it was in the middle of a graph it could not hold a .grad at all. Give f a leaf of your own.",
)
def grad_of__asks_x_itself(f, x):
    with torch.enable_grad():
        if x.is_leaf:
            x.grad = None
        x.requires_grad_()
        value = _scalar(f(x))
        if value.requires_grad:
            value.backward(inputs=[x])
    return torch.zeros_like(x) if x.grad is None else x.grad


@misconception(
    "grad_of",
    "backward adds. x.grad held something before you came, so what you read afterwards is the old content plus your "
    "gradient, and now the caller's .grad is wrong as well.",
)
def grad_of__adds_to_what_was_there(f, x):
    leaf = x if x.requires_grad and x.is_leaf else _leaf(x)
    with torch.enable_grad():
        value = _scalar(f(leaf))
    if value.requires_grad:
        value.backward(inputs=[leaf])
    return torch.zeros_like(x) if leaf.grad is None else leaf.grad.clone()


@misconception(
    "grad_of",
    "You read .grad of a tensor that was computed from another one. Backward went through it and left nothing behind: "
    "only leaves keep their .grad. Look at the leaf, or ask for the gradient of that tensor by name.",
)
def grad_of__grad_of_an_intermediate(f, x):
    with torch.enable_grad():
        middle = _leaf(x).clone()
        value = _scalar(f(middle))
    if not value.requires_grad:
        return torch.zeros_like(x)
    value.backward(inputs=[middle])
    return None


@misconception(
    "grad_of",
    "f ran while recording was switched off, so there was no graph to walk, and every gradient came out as zero. "
    "no_grad silences a whole region; what you want to differentiate has to be computed outside of it.",
)
def grad_of__records_nothing(f, x):
    leaf = _leaf(x)
    with torch.no_grad():
        value = _scalar(f(leaf))
    return _grad(value, leaf)


@misconception(
    "grad_of",
    "It works until somebody calls it inside torch.no_grad(): then nothing is recorded, your case for an f that ignores x "
    "takes over, and zeros come back without a word. Recording can be switched on again for a region.",
)
def grad_of__silent_zeros_inside_no_grad(f, x):
    leaf = _leaf(x)
    return _grad(_scalar(f(leaf)), leaf)


@misconception(
    "grad_of",
    "backward visits every leaf of the graph, not only yours: the parameters that f uses got a .grad from a call that was "
    "supposed to look only at x. Say which leaf you mean.",
)
def grad_of__fills_every_leaf(f, x):
    value, leaf = _at(f, x)
    if value.requires_grad:
        value.backward()
    return torch.zeros_like(x) if leaf.grad is None else leaf.grad


@misconception(
    "grad_of",
    "An f that does not use x ends in an error here: it either returns something without a graph, or a graph that x is no "
    "part of. The slope of a constant is zero, and autograd has to be told that this may happen.",
)
def grad_of__an_unused_x_is_an_error(f, x):
    value, leaf = _at(f, x)
    return torch.autograd.grad(value, leaf)[0]


@misconception(
    "grad_of",
    "An f that does not use x gives None here: nothing flowed to x, and autograd says so. The promise is a tensor of zeros.",
)
def grad_of__an_unused_x_gives_none(f, x):
    value, leaf = _at(f, x)
    return torch.autograd.grad(value, leaf, allow_unused=True)[0] if value.requires_grad else None


@misconception(
    "grad_of",
    "A tensor of shape (1,) has one element, but it is a vector. You let it pass; f(x) has to have the shape ().",
)
def grad_of__one_element_is_enough(f, x):
    leaf = _leaf(x)
    with torch.enable_grad():
        value = f(leaf)
    if value.numel() != 1:
        raise ValueError(f"not a scalar: {tuple(value.shape)}")
    return _grad(value, leaf)


@misconception(
    "grad_of",
    "You summed the vector that f returned. The result is a gradient of another function than the one you were given, and "
    "the caller never learns that f was no scalar.",
)
def grad_of__sums_a_vector(f, x):
    leaf = _leaf(x)
    with torch.enable_grad():
        value = f(leaf).sum()
    return _grad(value, leaf)


@misconception(
    "grad_of",
    "The gradient still hangs on a graph: it was computed in a way that can be differentiated again, and keeps all that "
    "alive. Whoever only wants numbers should get numbers.",
)
def grad_of__keeps_the_graph(f, x):
    value, leaf = _at(f, x)
    return _grad(value, leaf, create_graph=True)


@misconception(
    "grad_of",
    "Recording was off when you were called and is on since then. A switch that you turn has to be turned back; a with "
    "block does that for you, also when f raises.",
)
def grad_of__leaves_recording_on(f, x):
    torch.set_grad_enabled(True)
    leaf = _leaf(x)
    return _grad(_scalar(f(leaf)), leaf)


# frozen_product


@misconception(
    "frozen_product", "Nothing is frozen: this is the plain product, and its gradient flows to both factors."
)
def frozen_product__plain(x, y):
    return x * y


@misconception("frozen_product", "You cut the edge to x. It is y that must not receive a gradient.")
def frozen_product__wrong_factor(x, y):
    return x.detach() * y


@misconception(
    "frozen_product",
    "x gets no gradient, either. no_grad stops the recording of everything in its region, and detaching the finished product "
    "cuts off both factors. What you want is smaller: cut the one edge that leads to y.",
)
def frozen_product__no_grad(x, y):
    with torch.no_grad():
        return x * y


@misconception(
    "frozen_product",
    "y.data hides y from autograd altogether: when y was changed before backward, nobody noticed, and x got a gradient made "
    "of the new values. detach shares the version counter, so the same accident raises an error.",
)
def frozen_product__data(x, y):
    return x * y.data


@misconception(
    "frozen_product",
    "You switched requires_grad of y off. That is the caller's tensor: from here on it is not trained anywhere, and if it "
    "was computed from something, the switch cannot even be turned.",
)
def frozen_product__switches_y_off(x, y):
    if y.is_leaf:
        y.requires_grad_(False)
    return x * y


# straight_through_round


@misconception(
    "straight_through_round",
    "The values are right, and the gradient is zero everywhere: a staircase is flat between its steps, so rounding passes "
    "nothing on. Adding and taking away x in the open does not help, the two cancel in backward as well. Something has to be "
    "a constant for backward that is none for forward.",
)
def straight_through_round__plain(x):
    return x.round()


@misconception(
    "straight_through_round",
    "The values are right, and the result has no graph at all: you cut the only path that led back to x. Something that "
    "depends on x has to stay.",
)
def straight_through_round__cut_off(x):
    return x.detach().round()


@misconception(
    "straight_through_round",
    "You froze the wrong part: forward returns x itself, not rounded, and backward sees only the staircase, which is flat.",
)
def straight_through_round__froze_the_wrong_part(x):
    return x.round() + (x - x.round()).detach()


@misconception(
    "straight_through_round",
    "floor(x + 0.5) sends every half upward. torch.round sends it to the even neighbor, so that halves do not all drift in "
    "one direction.",
)
def straight_through_round__halves_up(x):
    return x + ((x + 0.5).floor() - x).detach()


@misconception(
    "straight_through_round",
    "The parts are right and their order is not: round(x) + x is rounded to the nearest float before x is taken away, and "
    "what remains is not a whole number. First make a difference that is exact, then add it.",
)
def straight_through_round__order_of_the_sum(x):
    return x.round().detach() + x - x.detach()


@misconception(
    "straight_through_round",
    "The gradient is right but the result is the same as the input: backward saw the identity because forward was one.",
)
def straight_through_round__identity(x):
    return x + 0.0


# finite_difference


@misconception(
    "finite_difference",
    "You look ahead only: f(x + eps) - f(x). The error of that shrinks with eps, not with eps**2; on a cubic with eps = 0.01 "
    "it is off by 3 x eps.",
)
def finite_difference__one_sided(f, x, eps=1e-6):
    flat = x.detach().double().reshape(-1)
    slopes = torch.zeros_like(flat)
    for i in range(flat.numel()):
        step = torch.zeros_like(flat)
        step[i] = eps
        here, ahead = _scalar(f(flat.reshape(x.shape))), _scalar(f((flat + step).reshape(x.shape)))
        slopes[i] = (ahead - here).item() / eps
    return slopes.reshape(x.shape).to(x.dtype)


@misconception(
    "finite_difference", "Every slope is twice what it should be: between the two points lie two steps of eps, not one."
)
def finite_difference__one_step_too_few(f, x, eps=1e-6):
    return _central(f, x, eps, eps)


@misconception(
    "finite_difference",
    "You work in the dtype of x. A float32 has seven digits: a step of 1e-6 is rounded, the difference of two nearly equal "
    "values has few digits left, and the quotient is noise. Go to float64 before you take the step.",
)
def finite_difference__in_the_dtype_of_x(f, x, eps=1e-6):
    return _central(f, x, eps, 2 * eps, dtype=x.dtype)


@misconception(
    "finite_difference",
    "You moved all elements at once. The difference is then the sum of all slopes, and the same number stands everywhere: "
    "one element moves, the others wait.",
)
def finite_difference__moves_everything(f, x, eps=1e-6):
    point = x.detach().double()
    above, below = _scalar(f(point + eps)), _scalar(f(point - eps))
    return torch.full_like(point, ((above - below) / (2 * eps)).item()).to(x.dtype)


@misconception(
    "finite_difference",
    "You work on x itself and put it back by adding and subtracting. Rounding does not undo itself, and when f raises in "
    "between, nothing is put back at all: the caller's x is not the same afterwards.",
)
def finite_difference__moves_x_itself(f, x, eps=1e-6):
    point = x.detach() if x.dtype == torch.float64 and x.stride() != () and 0 not in x.stride() else x.detach().double()
    slopes = torch.zeros(x.shape, dtype=torch.float64)
    for index in torch.cartesian_prod(*map(torch.arange, x.shape)).reshape(x.numel(), x.dim()) if x.dim() else [()]:
        at = tuple(index)
        point[at] += eps
        above = _scalar(f(point)).item()
        point[at] -= 2 * eps
        below = _scalar(f(point)).item()
        point[at] += eps
        slopes[at] = (above - below) / (2 * eps)
    return slopes.to(x.dtype)


@misconception(
    "finite_difference",
    "An element that was moved did not come back before the next one went: f was evaluated beside the point you meant, "
    "farther away with every element. With a larger eps the errors grow along the tensor.",
)
def finite_difference__never_steps_back(f, x, eps=1e-6):
    flat = x.detach().double().clone().reshape(-1)
    slopes = torch.zeros_like(flat)
    for i in range(flat.numel()):
        flat[i] += eps
        above = _scalar(f(flat.reshape(x.shape))).item()
        flat[i] -= 2 * eps
        slopes[i] = (above - _scalar(f(flat.reshape(x.shape))).item()) / (2 * eps)
    return slopes.reshape(x.shape).to(x.dtype)


@misconception(
    "finite_difference",
    "Of a tensor whose elements do not lie in a row, reshape(-1) is a copy. You moved elements of that copy while f went on "
    "looking at the original, so nothing changed and the slopes are zero.",
)
def finite_difference__moves_a_copy(f, x, eps=1e-6):
    point = x.detach().double().clone()
    flat, slopes = point.reshape(-1), torch.zeros(x.numel(), dtype=torch.float64)
    for i in range(flat.numel()):
        kept = flat[i].clone()
        flat[i] = kept + eps
        above = _scalar(f(point)).item()
        flat[i] = kept - eps
        below = _scalar(f(point)).item()
        flat[i] = kept
        slopes[i] = (above - below) / (2 * eps)
    return slopes.reshape(x.shape).to(x.dtype)


@misconception(
    "finite_difference",
    "The computing is done in float64, and the result stayed there. A gradient has the dtype of the tensor it belongs to.",
)
def finite_difference__stays_in_float64(f, x, eps=1e-6):
    return _central(f, x, eps, 2 * eps).double()


@misconception("finite_difference", "The sign is turned around: you took f behind the point less f ahead of it.")
def finite_difference__backwards(f, x, eps=1e-6):
    return _central(f, x, -eps, 2 * eps)


@misconception(
    "finite_difference",
    "f uses a parameter that asks for gradients, and you kept the graph of its values: the slopes hang on it.",
)
def finite_difference__keeps_the_graph(f, x, eps=1e-6):
    flat = x.detach().double().reshape(-1)
    slopes = torch.zeros_like(flat)
    for i in range(flat.numel()):
        step = torch.zeros_like(flat)
        step[i] = eps
        above, below = _scalar(f((flat + step).reshape(x.shape))), _scalar(f((flat - step).reshape(x.shape)))
        slopes[i] = (above - below) / (2 * eps)
    return slopes.reshape(x.shape).to(x.dtype)


@misconception("finite_difference", "A vector of one element passes as a scalar here. f has to return the shape ().")
def finite_difference__one_element_is_enough(f, x, eps=1e-6):
    def scalar(t):
        value = f(t)
        if value.numel() != 1:
            raise ValueError(f"not a scalar: {tuple(value.shape)}")
        return value.reshape(())

    return _central(scalar, x, eps, 2 * eps)


def _central(f, x, eps, width, dtype=torch.float64):
    flat = x.detach().to(dtype).reshape(-1)
    slopes = torch.zeros_like(flat)
    for i in range(flat.numel()):
        step = torch.zeros_like(flat)
        step[i] = eps
        above, below = _scalar(f((flat + step).reshape(x.shape))), _scalar(f((flat - step).reshape(x.shape)))
        slopes[i] = (above - below).detach() / width
    return slopes.reshape(x.shape).to(x.dtype)


# per_example_grads


@misconception(
    "per_example_grads",
    "backward adds, and .grad was not cleared between two rows: row n of your result is the sum of the gradients up to n.",
)
def per_example_grads__never_cleared(w, X, y):
    _rows_fit(w, X, y)
    leaf, rows = _leaf(w), torch.zeros_like(X, requires_grad=False)
    for n in range(len(X)):
        (0.5 * (X[n].detach() @ leaf - y[n].detach()) ** 2).backward()
        rows[n] = leaf.grad
    return rows


@misconception(
    "per_example_grads",
    "You kept .grad itself, and then zeroed it in place: all rows of your list are one and the same tensor, so all of them "
    "show what it held last. Copy the numbers out, or let go of the tensor instead of overwriting it.",
)
def per_example_grads__the_same_tensor_again(w, X, y):
    _rows_fit(w, X, y)
    leaf, rows = _leaf(w), []
    for n in range(len(X)):
        (0.5 * (X[n].detach() @ leaf - y[n].detach()) ** 2).backward()
        rows.append(leaf.grad)
        leaf.grad.zero_()
    return torch.stack(rows) if rows else torch.zeros_like(X)


@misconception(
    "per_example_grads",
    "Your rows are the right ones divided by N: the losses were averaged, and each example then counts only its share. Here "
    "every row stands for itself.",
)
def per_example_grads__of_the_mean(w, X, y):
    return _by_row(w, X, y, lambda rest: 0.5 * rest**2 / len(X))


@misconception(
    "per_example_grads",
    "Your rows are twice the right ones: the half in front of the square is missing, and it is there to cancel the 2.",
)
def per_example_grads__without_the_half(w, X, y):
    return _by_row(w, X, y, lambda rest: rest**2)


@misconception(
    "per_example_grads",
    "You differentiated the total N times. The gradient of a sum is the sum of the gradients: every row shows all of them.",
)
def per_example_grads__of_the_total(w, X, y):
    _rows_fit(w, X, y)
    leaf, rows = _leaf(w), torch.zeros_like(X, requires_grad=False)
    for n in range(len(X)):
        rows[n] = _grad((0.5 * (X.detach() @ leaf - y.detach()) ** 2).sum(), leaf)
    return rows


@misconception(
    "per_example_grads",
    "One graph for all rows, kept alive by retain_graph and walked N times: each walk goes through all N rows, so the work "
    "grows with N squared. Build the graph of a row when you need it, and let it go.",
)
def per_example_grads__one_graph_for_all(w, X, y):
    _rows_fit(w, X, y)
    leaf, rows = _leaf(w), torch.zeros_like(X, requires_grad=False)
    losses = 0.5 * (X.detach() @ leaf - y.detach()) ** 2
    for n in range(len(X)):
        rows[n] = _grad(losses[n], leaf, retain_graph=True)
    return rows


@misconception(
    "per_example_grads",
    "All N graphs are built before the first is walked, so all of them are in memory at once. One at a time is enough.",
)
def per_example_grads__all_graphs_first(w, X, y):
    _rows_fit(w, X, y)
    leaf = _leaf(w)
    losses = [0.5 * (row @ leaf - target) ** 2 for row, target in zip(X.detach(), y.detach(), strict=True)]
    rows = torch.zeros_like(X, requires_grad=False)
    for n, loss in enumerate(losses):
        rows[n] = _grad(loss, leaf)
    return rows


@misconception(
    "per_example_grads",
    "The rows are right, but you used w itself: its .grad is cleared now, whatever the caller had collected in it, and a w "
    "that asked for nothing has requires_grad switched on.",
)
def per_example_grads__uses_the_grad_of_w(w, X, y):
    _rows_fit(w, X, y)
    leaf = w.requires_grad_() if w.is_leaf else _leaf(w)
    rows = torch.zeros_like(X, requires_grad=False)
    for n in range(len(X)):
        leaf.grad = None
        (0.5 * (X[n].detach() @ leaf - y[n].detach()) ** 2).backward()
        rows[n] = leaf.grad
    leaf.grad = None
    return rows


@misconception(
    "per_example_grads",
    "backward fills every leaf it can reach. X and y asked for gradients here, and got some that nobody wanted.",
)
def per_example_grads__fills_the_data(w, X, y):
    _rows_fit(w, X, y)
    leaf, rows = _leaf(w), torch.zeros_like(X, requires_grad=False)
    for n in range(len(X)):
        leaf.grad = None
        (0.5 * (X[n] @ leaf - y[n]) ** 2).backward()
        rows[n] = leaf.grad
    return rows


@misconception(
    "per_example_grads",
    "Nobody looked at the shapes. A y of shape (N, 1) slips through row by row, and with too few or too many targets rows "
    "are dropped or the error comes from somewhere deep inside.",
)
def per_example_grads__never_looks_at_shapes(w, X, y):
    leaf = _leaf(w)
    pairs = zip(X.detach(), y.detach(), strict=False)
    rows = [_grad(_half_square(row, leaf, target), leaf) for row, target in pairs]
    return torch.stack(rows) if rows else torch.zeros_like(X)


def _half_square(row, leaf, target):
    return (0.5 * ((row * leaf).sum() - target) ** 2).sum()


@misconception(
    "per_example_grads",
    "The rows are right, but they do not come from N backward passes: the formula was worked out by hand, or one pass was "
    "made to give all rows. The task is to see what N passes do.",
)
def per_example_grads__by_formula(w, X, y):
    _rows_fit(w, X, y)
    return ((X @ w - y)[:, None] * X).detach()


def _by_row(w, X, y, loss_of):
    _rows_fit(w, X, y)
    leaf, rows = _leaf(w), torch.zeros_like(X, requires_grad=False)
    for n in range(len(X)):
        rows[n] = _grad(loss_of(X[n].detach() @ leaf - y[n].detach()), leaf)
    return rows


# linreg_gd


def _fit(X, y, lr, steps, loss_of=lambda rest: (rest**2).mean(), trained=(True, True)):
    _fits(X, y)
    w, b = X.new_zeros(X.shape[1], requires_grad=True), X.new_zeros((), requires_grad=True)
    losses = []
    for _ in range(steps):
        loss = loss_of(X.detach() @ w + b - y.detach())
        gradients = torch.autograd.grad(loss, (w, b))
        with torch.no_grad():
            for tensor, gradient, wanted in zip((w, b), gradients, trained, strict=True):
                tensor -= lr * gradient * wanted
        losses.append(loss.item())
    return w, b, losses


@misconception(
    "linreg_gd",
    "The first step is right and the second is not: .grad was never cleared. backward adds, so from the second step on you "
    "follow the sum of all gradients so far, like a ball that rolls without friction and never comes to rest.",
)
def linreg_gd__never_cleared(X, y, lr, steps):
    _fits(X, y)
    w, b = X.new_zeros(X.shape[1], requires_grad=True), X.new_zeros((), requires_grad=True)
    losses = []
    for _ in range(steps):
        loss = ((X.detach() @ w + b - y.detach()) ** 2).mean()
        loss.backward()
        with torch.no_grad():
            w -= lr * w.grad
            b -= lr * b.grad
        losses.append(loss.item())
    return w, b, losses


@misconception(
    "linreg_gd",
    "w = w - lr * ... outside of no_grad makes a new tensor that was computed from the old one: no leaf, so its .grad stays "
    "None, and the graph of every step so far hangs behind it.",
)
def linreg_gd__new_tensors_in_the_graph(X, y, lr, steps):
    _fits(X, y)
    w, b = X.new_zeros(X.shape[1], requires_grad=True), X.new_zeros((), requires_grad=True)
    losses = []
    for _ in range(steps):
        loss = ((X.detach() @ w + b - y.detach()) ** 2).mean()
        grad_w, grad_b = torch.autograd.grad(loss, (w, b))
        w, b = w - lr * grad_w, b - lr * grad_b
        losses.append(loss.item())
    return w, b, losses


@misconception(
    "linreg_gd",
    "w -= ... on a leaf that asks for gradients is refused as long as autograd records: the record would no longer fit the "
    "values. An update is no part of the function that you differentiate; make it where nothing is recorded.",
)
def linreg_gd__in_place_while_recording(X, y, lr, steps):
    _fits(X, y)
    w, b = X.new_zeros(X.shape[1], requires_grad=True), X.new_zeros((), requires_grad=True)
    losses = []
    for _ in range(steps):
        loss = ((X @ w + b - y) ** 2).mean()
        grad_w, grad_b = torch.autograd.grad(loss, (w, b))
        w -= lr * grad_w
        b -= lr * grad_b
        losses.append(loss.item())
    return w, b, losses


@misconception(
    "linreg_gd",
    "The losses you return are tensors, and each holds the graph of its step: nothing of the whole run can be freed. Take "
    "the number out of the tensor.",
)
def linreg_gd__losses_with_graphs(X, y, lr, steps):
    _fits(X, y)
    w, b = X.new_zeros(X.shape[1], requires_grad=True), X.new_zeros((), requires_grad=True)
    losses = []
    for _ in range(steps):
        loss = ((X.detach() @ w + b - y.detach()) ** 2).mean()
        grad_w, grad_b = torch.autograd.grad(loss, (w, b), retain_graph=True)
        with torch.no_grad():
            w -= lr * grad_w
            b -= lr * grad_b
        losses.append(loss)
    return w, b, losses


@misconception(
    "linreg_gd",
    "The losses you return are tensors of one element. Detached they hold no graph, but the caller was promised plain "
    "Python floats.",
)
def linreg_gd__losses_as_tensors(X, y, lr, steps):
    w, b, losses = _fit(X, y, lr, steps)
    return w, b, [torch.tensor(loss, dtype=X.dtype, device=X.device) for loss in losses]


@misconception(
    "linreg_gd",
    "Somewhere a running sum of losses is kept as a tensor. Each summand brings the graph of its step along, so memory grows "
    "with the number of steps although no value shows it. Sum numbers, not tensors.",
)
def linreg_gd__a_running_total(X, y, lr, steps):
    _fits(X, y)
    w, b = X.new_zeros(X.shape[1], requires_grad=True), X.new_zeros((), requires_grad=True)
    losses, total = [], 0.0
    for _ in range(steps):
        loss = ((X.detach() @ w + b - y.detach()) ** 2).mean()
        grad_w, grad_b = torch.autograd.grad(loss, (w, b), retain_graph=True)
        total = total + loss
        with torch.no_grad():
            w -= lr * grad_w
            b -= lr * grad_b
        losses.append(loss.item())
    return w, b, losses


@misconception(
    "linreg_gd",
    "You walk the same graph twice, once per parameter, and keep its buffers for the second walk. One backward pass gives "
    "the gradients of all leaves together.",
)
def linreg_gd__one_pass_per_parameter(X, y, lr, steps):
    _fits(X, y)
    w, b = X.new_zeros(X.shape[1], requires_grad=True), X.new_zeros((), requires_grad=True)
    losses = []
    for _ in range(steps):
        loss = ((X.detach() @ w + b - y.detach()) ** 2).mean()
        (grad_w,) = torch.autograd.grad(loss, w, retain_graph=True)
        (grad_b,) = torch.autograd.grad(loss, b)
        with torch.no_grad():
            w -= lr * grad_w
            b -= lr * grad_b
        losses.append(loss.item())
    return w, b, losses


@misconception(
    "linreg_gd",
    "w moves first, and the gradient of b is taken at the new w. In one step both gradients belong to the same point.",
)
def linreg_gd__one_after_the_other(X, y, lr, steps):
    _fits(X, y)
    w, b = X.new_zeros(X.shape[1], requires_grad=True), X.new_zeros((), requires_grad=True)
    losses = []
    for _ in range(steps):
        loss = ((X.detach() @ w + b - y.detach()) ** 2).mean()
        (grad_w,) = torch.autograd.grad(loss, w)
        with torch.no_grad():
            w -= lr * grad_w
        (grad_b,) = torch.autograd.grad(((X.detach() @ w + b - y.detach()) ** 2).mean(), b)
        with torch.no_grad():
            b -= lr * grad_b
        losses.append(loss.item())
    return w, b, losses


@misconception(
    "linreg_gd",
    "Your steps are half as long and your losses half as large as promised: there is a factor 0.5 before the mean square.",
)
def linreg_gd__half_the_loss(X, y, lr, steps):
    return _fit(X, y, lr, steps, lambda rest: 0.5 * (rest**2).mean())


@misconception(
    "linreg_gd",
    "Your losses and steps are N times too large: you summed the squares. The mean does not grow with the number of rows, so "
    "one lr fits data of any size.",
)
def linreg_gd__sums_the_squares(X, y, lr, steps):
    return _fit(X, y, lr, steps, lambda rest: (rest**2).sum())


@misconception("linreg_gd", "b never moves. A line that is nailed to the origin fits something else.")
def linreg_gd__b_stays(X, y, lr, steps):
    return _fit(X, y, lr, steps, trained=(True, False))


@misconception("linreg_gd", "You walk uphill: the gradient points to where the loss grows, and you add it.")
def linreg_gd__uphill(X, y, lr, steps):
    return _fit(X, y, -lr, steps)


@misconception(
    "linreg_gd", "Your first loss is the one after the first step. The list begins before anything has moved."
)
def linreg_gd__losses_after_the_steps(X, y, lr, steps):
    w, b, losses = _fit(X, y, lr, steps)
    last = ((X.detach() @ w.detach() + b.detach() - y.detach()) ** 2).mean().item()
    return w, b, [*losses, last][1:]


@misconception(
    "linreg_gd",
    "X w has the shape (N,) and y the shape (N, 1), or one element: the difference was broadcast to a table in which every "
    "prediction meets every target, and its mean looks like a loss. Refuse a y that is not (N,).",
)
def linreg_gd__never_looks_at_shapes(X, y, lr, steps):
    w, b = X.new_zeros(X.shape[-1], requires_grad=True), X.new_zeros((), requires_grad=True)
    losses = []
    for _ in range(steps):
        loss = ((X.detach() @ w + b - y.detach()) ** 2).mean()
        grad_w, grad_b = torch.autograd.grad(loss, (w, b))
        with torch.no_grad():
            w -= lr * grad_w
            b -= lr * grad_b
        losses.append(loss.item())
    return w, b, losses


@misconception(
    "linreg_gd",
    "backward filled X.grad and y.grad as well: the data asked for gradients, and you asked for those of every leaf.",
)
def linreg_gd__fills_the_data(X, y, lr, steps):
    _fits(X, y)
    w, b = X.new_zeros(X.shape[1], requires_grad=True), X.new_zeros((), requires_grad=True)
    losses = []
    for _ in range(steps):
        loss = ((X @ w + b - y) ** 2).mean()
        loss.backward()
        with torch.no_grad():
            w -= lr * w.grad
            b -= lr * b.grad
        w.grad = b.grad = None
        losses.append(loss.item())
    return w, b, losses


@misconception(
    "linreg_gd",
    "The start is random, and the seed that you set for it is the one the whole program uses: the caller's random numbers are "
    "not what they were. Begin at zero.",
)
def linreg_gd__random_start(X, y, lr, steps):
    _fits(X, y)
    torch.manual_seed(0)
    w = torch.randn(X.shape[1], dtype=X.dtype).to(X.device).requires_grad_()
    b = X.new_zeros((), requires_grad=True)
    losses = []
    for _ in range(steps):
        loss = ((X.detach() @ w + b - y.detach()) ** 2).mean()
        grad_w, grad_b = torch.autograd.grad(loss, (w, b))
        with torch.no_grad():
            w -= lr * grad_w
            b -= lr * grad_b
        losses.append(loss.item())
    return w, b, losses


@misconception(
    "linreg_gd",
    "The gradients were worked out by hand, and autograd was not used. Right numbers; but the task is to let backward find "
    "them, once per step.",
)
def linreg_gd__by_formula(X, y, lr, steps):
    _fits(X, y)
    data, targets = X.detach(), y.detach()
    w, b, losses = data.new_zeros(X.shape[1]), data.new_zeros(()), []
    for _ in range(steps):
        rest = data @ w + b - targets
        losses.append((rest**2).mean().item())
        w, b = w - lr * 2 * (data.T @ rest) / len(y), b - lr * 2 * rest.mean()
    return w, b, losses


# hvp


@misconception(
    "hvp",
    "The first gradient was computed without a graph of its own, so it was a plain number for the second pass, and the second "
    "derivative of a plain number is zero. A gradient can be recorded like anything else, if you ask.",
)
def hvp__first_gradient_not_recorded(f, x, v):
    _shapes_fit(x, v)
    value, leaf = _at(f, x)
    return _grad((_grad(value, leaf) * v.detach()).sum(), leaf)


@misconception(
    "hvp",
    "This is the sum of each row of the Hessian, times v element by element. It is right for a diagonal Hessian only: v has to "
    "be weighed in before the second pass, not after it.",
)
def hvp__weights_too_late(f, x, v):
    _shapes_fit(x, v)
    value, leaf = _at(f, x)
    return _grad(_grad(value, leaf, create_graph=True).sum(), leaf) * v.detach()


@misconception(
    "hvp", "This is the gradient times v. One derivative is missing: the Hessian is the derivative of the gradient."
)
def hvp__only_one_derivative(f, x, v):
    _shapes_fit(x, v)
    value, leaf = _at(f, x)
    return _grad(value, leaf) * v.detach()


@misconception("hvp", "This is the Hessian times ones; v was not used.")
def hvp__forgets_v(f, x, v):
    _shapes_fit(x, v)
    value, leaf = _at(f, x)
    return _grad(_grad(value, leaf, create_graph=True).sum(), leaf)


@misconception(
    "hvp",
    "You built the whole Hessian, one backward pass per row, and multiplied afterwards. For a million elements that is a "
    "million passes and a table of 10**12 numbers; the product needs two passes and no table.",
)
def hvp__builds_the_hessian(f, x, v):
    _shapes_fit(x, v)
    value, leaf = _at(f, x)
    slopes = _grad(value, leaf, create_graph=True).reshape(-1)
    rows = [_grad(slope, leaf, retain_graph=True).reshape(-1) for slope in slopes]
    table = torch.stack(rows) if rows else x.new_zeros(0, 0)
    return (table @ v.detach().reshape(-1)).reshape(x.shape)


@misconception(
    "hvp",
    "A linear f ends in an error: its gradient does not depend on x, so there is nothing to differentiate a second time. A "
    "plane has curvature zero, and zeros is the answer.",
)
def hvp__a_plane_is_an_error(f, x, v):
    _shapes_fit(x, v)
    value, leaf = _at(f, x)
    (gradient,) = torch.autograd.grad(value, leaf, create_graph=True)
    return torch.autograd.grad(gradient, leaf, grad_outputs=v.detach())[0]


@misconception(
    "hvp",
    "v has another shape than x, and broadcasting stretched it in silence. The result belongs to a direction that nobody asked "
    "for.",
)
def hvp__stretches_v(f, x, v):
    value, leaf = _at(f, x)
    with torch.enable_grad():
        slope = (_grad(value, leaf, create_graph=True) * v.detach()).sum()
    return _grad(slope, leaf)


@misconception(
    "hvp", "The result still hangs on a graph: the second pass was recorded as well. Only the first one has to be."
)
def hvp__keeps_the_graph(f, x, v):
    _shapes_fit(x, v)
    value, leaf = _at(f, x)
    gradient = _grad(value, leaf, create_graph=True)
    return _grad(gradient, leaf, grad_outputs=v.detach(), create_graph=True)


@misconception(
    "hvp",
    "The passes filled .grad on their way: of x, of v, or of the parameters in f. Ask for one gradient by name instead.",
)
def hvp__fills_every_leaf(f, x, v):
    _shapes_fit(x, v)
    value, leaf = _at(f, x)
    gradient = _grad(value, leaf, create_graph=True)
    if gradient.requires_grad:
        gradient.backward(v.detach())
    return torch.zeros_like(x) if leaf.grad is None else leaf.grad


# newton_step


def _slope_and_curvature(f, x):
    value, leaf = _at(f, x)
    gradient = _grad(value, leaf, create_graph=True)
    return gradient.detach(), _grad(gradient.sum(), leaf)


@misconception(
    "newton_step",
    "You step away from the stationary point, twice as far off as before: the quotient is to be taken away from x.",
)
def newton_step__wrong_direction(f, x):
    slope, curvature = _slope_and_curvature(f, x)
    return torch.where(curvature == 0, x.detach(), x.detach() + slope / curvature)


@misconception(
    "newton_step",
    "This is a gradient step with lr = 1. Newton divides by the curvature: a short step where the slope changes fast, a long "
    "one where it hardly changes.",
)
def newton_step__plain_gradient(f, x):
    slope, curvature = _slope_and_curvature(f, x)
    return torch.where(curvature == 0, x.detach(), x.detach() - slope)


@misconception(
    "newton_step", "You multiplied by the curvature. The more the slope changes, the less far its zero is: divide."
)
def newton_step__multiplies(f, x):
    slope, curvature = _slope_and_curvature(f, x)
    return x.detach() - slope * curvature


@misconception(
    "newton_step",
    "An element without curvature became NaN or infinite: you divided by zero. The contract says that such an element stays.",
)
def newton_step__divides_by_zero(f, x):
    slope, curvature = _slope_and_curvature(f, x)
    return x.detach() - slope / curvature


@misconception(
    "newton_step",
    "You took the size of the curvature and lost its sign. On a hill the step then goes downward, away from the top, which "
    "is the only stationary point.",
)
def newton_step__loses_the_sign(f, x):
    slope, curvature = _slope_and_curvature(f, x)
    return torch.where(curvature == 0, x.detach(), x.detach() - slope / curvature.abs())


@misconception(
    "newton_step",
    "A small number added to the curvature avoids the division by zero, and changes every other quotient a little. An "
    "element without curvature but with a slope flies off to wherever slope / eps is.",
)
def newton_step__a_pinch_of_eps(f, x):
    slope, curvature = _slope_and_curvature(f, x)
    return x.detach() - slope / (curvature + 1e-6)


@misconception("newton_step", "You returned the step alone. The new point is x less that.")
def newton_step__the_step_alone(f, x):
    slope, curvature = _slope_and_curvature(f, x)
    return torch.where(curvature == 0, torch.zeros_like(slope), slope / curvature)


@misconception(
    "newton_step",
    "The result depends on x in a graph: you computed with x itself, which asks for gradients, not with its values.",
)
def newton_step__keeps_the_graph(f, x):
    slope, curvature = _slope_and_curvature(f, x)
    return torch.where(curvature == 0, x, x - slope / curvature)


# fixed_point_grad


def _settle(f, theta, z0, n_iter):
    z = z0.detach()
    with torch.no_grad():
        for _ in range(n_iter):
            z = f(z, theta)
    z_leaf, theta_leaf = _leaf(z), _leaf(theta)
    return z, z_leaf, theta_leaf, f(z_leaf, theta_leaf)


def _pull(value, leaf, weights):
    return torch.autograd.grad(value, leaf, weights, retain_graph=True, materialize_grads=True)[0]


@misconception(
    "fixed_point_grad",
    "The values are right, and you remembered every iteration to get them: what is kept grows with n_iter. At the fixed point "
    "one application of f knows all that is needed.",
)
def fixed_point_grad__unrolled(f, theta, z0, n_iter):
    leaf, z = _leaf(theta), z0.detach()
    for _ in range(n_iter):
        z = f(z, leaf)

    def pullback(u):
        _shapes_fit(z, u)
        return _pull(z, leaf, u) if z.requires_grad else torch.zeros_like(theta)

    return z.detach(), pullback


@misconception(
    "fixed_point_grad",
    "You differentiated the last application only. theta also acts through the z that went into it, and that through the one "
    "before; that part is missing.",
)
def fixed_point_grad__one_step_only(f, theta, z0, n_iter):
    z, _, theta_leaf, value = _settle(f, theta, z0, n_iter)

    def pullback(u):
        _shapes_fit(z, u)
        return _pull(value, theta_leaf, u)

    return z, pullback


@misconception(
    "fixed_point_grad",
    "The sum of the echoes alternates in sign: you solved with I + J where I - J belongs. z* = f(z*, theta) brings J to the "
    "other side with a minus.",
)
def fixed_point_grad__wrong_sign(f, theta, z0, n_iter):
    z, z_leaf, theta_leaf, value = _settle(f, theta, z0, n_iter)

    def pullback(u):
        _shapes_fit(z, u)
        adjoint = u
        for _ in range(n_iter):
            adjoint = u - _pull(value, z_leaf, adjoint)
        return _pull(value, theta_leaf, adjoint)

    return z, pullback


@misconception(
    "fixed_point_grad",
    "You add J^T to the last echo and forget those before: only the latest one is left, and it fades to nothing.",
)
def fixed_point_grad__echoes_are_not_summed(f, theta, z0, n_iter):
    z, z_leaf, theta_leaf, value = _settle(f, theta, z0, n_iter)

    def pullback(u):
        _shapes_fit(z, u)
        echo = u
        for _ in range(n_iter):
            echo = _pull(value, z_leaf, echo)
        return _pull(value, theta_leaf, echo)

    return z, pullback


@misconception(
    "fixed_point_grad",
    "You solved with J, and the weights u come from the other side: it is J transposed that carries them back.",
)
def fixed_point_grad__not_transposed(f, theta, z0, n_iter):
    z, z_leaf, theta_leaf, value = _settle(f, theta, z0, n_iter)
    columns = [_pull(value, z_leaf, row.reshape(z.shape)).reshape(-1) for row in torch.eye(z.numel(), dtype=z.dtype)]
    jacobian = torch.stack(columns)

    def pullback(u):
        _shapes_fit(z, u)
        adjoint = torch.linalg.solve(torch.eye(z.numel(), dtype=z.dtype) - jacobian, u.detach().reshape(-1))
        return _pull(value, theta_leaf, adjoint.reshape(z.shape))

    return z, pullback


@misconception(
    "fixed_point_grad",
    "pullback works once: its graph was freed by the first call. Here one graph is walked again and again with other weights, "
    "which is what keeping it is for.",
)
def fixed_point_grad__works_once(f, theta, z0, n_iter):
    z, z_leaf, theta_leaf, value = _settle(f, theta, z0, n_iter)

    def pullback(u):
        _shapes_fit(z, u)
        adjoint = u
        for _ in range(n_iter):
            adjoint = u + _pull(value, z_leaf, adjoint)
        return torch.autograd.grad(value, theta_leaf, adjoint, materialize_grads=True)[0]

    return z, pullback


@misconception(
    "fixed_point_grad",
    "One application too many or too few: f is to be applied n_iter times to z0, and it is that point which is returned.",
)
def fixed_point_grad__one_too_many(f, theta, z0, n_iter):
    z, z_leaf, theta_leaf, value = _settle(f, theta, z0, n_iter + 1)

    def pullback(u):
        _shapes_fit(z, u)
        adjoint = u
        for _ in range(n_iter):
            adjoint = u + _pull(value, z_leaf, adjoint)
        return _pull(value, theta_leaf, adjoint)

    return z, pullback
