import ast
import sys
import textwrap
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checker import mutants
from checker.mutants import generate, reachable


def changes(body: str, operator: str | None = None, header: str = "def f(x, y, n):") -> set[str]:
    """Return `before -> after` of the mutants of a function with this body."""
    source = f"import torch\nfrom torch import nn\n\n{header}\n{textwrap.indent(body, '    ')}\n"
    found = generate(source)
    return {one.key.removeprefix("f: ") for one in found if operator in (None, one.operator)}


@pytest.mark.parametrize(
    ("operator", "body", "expected"),
    [
        ("arithmetic", "return x + y", {"x + y -> x - y"}),
        ("arithmetic", "return x - y", {"x - y -> x + y"}),
        ("arithmetic", "return x * y", {"x * y -> x / y"}),
        ("arithmetic", "return x / y", {"x / y -> x * y"}),
        ("arithmetic", "return x // y", {"x // y -> x / y"}),
        ("arithmetic", "return x ** y", {"x ** y -> x * y"}),
        ("arithmetic", "return x % y", {"x % y -> x * y"}),
        ("arithmetic", "return x @ y.T", {"x @ y.T -> y.T @ x"}),
        ("arithmetic", "return x @ x", set()),
        ("arithmetic", "return x & y", {"x & y -> x | y"}),
        ("arithmetic", "return x | y", {"x | y -> x & y"}),
        ("arithmetic", "return x ^ y", {"x ^ y -> x & y"}),
        ("arithmetic", "return x << y", {"x << y -> x >> y"}),
        ("arithmetic", "return x >> y", {"x >> y -> x << y"}),
        ("arithmetic", "x += y", {"x += y -> x -= y"}),
        ("arithmetic", "x @= y", set()),
        ("arithmetic", "return 'a %s' % x + f'{y}'", set()),
        ("unary", "return -x", {"-x -> x"}),
        ("unary", "return ~x", {"~x -> x"}),
        ("unary", "return not x", {"not x -> x"}),
        ("unary", "return +x", set()),
        ("comparison", "return x < y", {"x < y -> x <= y", "x < y -> x > y"}),
        ("comparison", "return x > y", {"x > y -> x >= y", "x > y -> x < y"}),
        ("comparison", "return x <= y", {"x <= y -> x < y"}),
        ("comparison", "return x >= y", {"x >= y -> x > y"}),
        ("comparison", "return x == y", {"x == y -> x != y"}),
        ("comparison", "return x != y", {"x != y -> x == y"}),
        ("comparison", "return x is y", {"x is y -> x is not y"}),
        ("comparison", "return x not in y", {"x not in y -> x in y"}),
        ("comparison", "return x <= y == n", {"x <= y == n -> x < y == n", "x <= y == n -> x <= y != n"}),
        ("boolean", "return x and y", {"x and y -> x or y"}),
        ("boolean", "return x or y", {"x or y -> x and y"}),
        ("constant", "return x[7]", {"x[7] -> x[8]"}),
        ("constant", "return x[0]", {"x[0] -> x[1]"}),
        ("constant", "return x[1]", {"x[1] -> x[2]", "x[1] -> x[0]"}),
        ("constant", "return x[-1]", {"x[-1] -> x[-2]", "x[-1] -> x[1]"}),
        ("constant", "return 2.5", {"return 2.5 -> return 5.0"}),
        ("constant", "return x * 0.0", {"x * 0.0 -> x * 1.0"}),
        ("constant", "return -0.5", {"return -0.5 -> return -1.0", "return -0.5 -> return 0.5"}),
        ("constant", "y = True", {"y = True -> y = False"}),
        ("constant", "return g(x, keepdim=False)", {"g(x, keepdim=False) -> g(x, keepdim=True)"}),
        ("constant", "return x, None, 'text', b'bytes', ..., 2j", set()),
        ("dim", "return x.sum(dim=-1)", {"x.sum(dim=-1) -> x.sum(dim=-2)"}),
        ("dim", "return x.sum(axis=-2)", {"x.sum(axis=-2) -> x.sum(axis=-1)"}),
        ("dim", "return x.sum(dim=0)", {"x.sum(dim=0) -> x.sum(dim=1)"}),
        ("dim", "return x.sum(dim=1)", {"x.sum(dim=1) -> x.sum(dim=0)"}),
        ("dim", "return x.sum(dim=(1, 3))", {"x.sum(dim=(1, 3)) -> x.sum(dim=(0, 3))"}),
        ("dim", "return x.sum(dim=(-2, -1))", {"x.sum(dim=(-2, -1)) -> x.sum(dim=(-3, -1))"}),
        ("dim", "return x.flip(dims=[0])", {"x.flip(dims=[0]) -> x.flip(dims=[1])"}),
        ("dim", "return x.sum(dim=n)", set()),
        ("slice", "return x[1:]", {"x[1:] -> x[:]"}),
        ("constant", "return x[1:]", {"x[1:] -> x[2:]"}),
        ("constant", "return x[:1]", {"x[:1] -> x[:2]", "x[:1] -> x[:0]"}),
        ("slice", "return x[0:n:1]", {"x[0:n:1] -> x[0::1]", "x[0:n:1] -> x[0:n + 1:1]"}),
        ("slice", "return x[:, n:]", {"x[:, n:] -> x[:, :]", "x[:, n:] -> x[:, n + 1:]"}),
        ("slice", "return x[::2]", {"x[::2] -> x[:]"}),
        ("slice", "return x[:n + 1]", {"x[:n + 1] -> x[:]"}),
        ("slice", "return x[..., None]", set()),
        ("condition", "if x:\n    return y", {"if x -> if not x"}),
        ("condition", "if not x:\n    return y", {"if not x -> if x"}),
        ("condition", "if x < y:\n    return y", {"if x < y -> if not x < y"}),
        ("condition", "return x if n else y", {"x if n else y -> y if n else x"}),
        ("condition", "while g(x):\n    y()", {"while g(x) -> while False"}),
        ("condition", "return [a for a in x if a]", {"for a in x if a -> for a in x"}),
        ("drop-statement", "x.zero_()", {"x.zero_() -> pass"}),
        ("drop-statement", "x += y", {"x += y -> pass"}),
        ("drop-statement", "x[n] = y", {"x[n] = y -> pass"}),
        ("drop-statement", "x.y = y", {"x.y = y -> pass"}),
        ("drop-statement", "x.y: int = y", {"x.y: int = y -> pass"}),
        ("drop-statement", "y = x\nn: int", set()),
        ("drop-statement", "if x:\n    raise ValueError('no')", {"if x: raise -> pass"}),
        ("drop-statement", "for _ in x:\n    break", {"break -> pass"}),
        ("drop-statement", "for _ in x:\n    continue", {"continue -> pass"}),
        (
            "drop-statement",
            "with torch.no_grad():\n    y = x",
            {"with torch.no_grad() -> its body alone"},
        ),
        ("drop-statement", "with open(x) as y:\n    n = y", set()),
        ("drop-call", "return x.detach()", {"x.detach() -> x"}),
        ("drop-call", "return x.clone().copy()", {"x.clone().copy() -> x.clone()", "x.clone() -> x"}),
        ("drop-call", "return x.item() + x.numel() + x.sum(1)", set()),
        ("drop-call", "y = torch.cuda.is_available(), nn.GELU(), super().g()\nx.float()", set()),
        ("drop-keyword", "return g(x, dtype=x.dtype)", {"g(x, dtype=x.dtype) -> g(x)"}),
        ("drop-keyword", "return g(x, scale=1)", {"g(x, scale=1) -> g(x)"}),
        ("drop-keyword", "return g(x, a=True, b=None, **y)", set()),
        ("drop-keyword", "return torch.stack(x, dim=0)", set()),
        ("swap-arguments", "return g(x, y, n)", {"g(x, y, n) -> g(y, x, n)"}),
        ("swap-arguments", "return einsum('i,j', x, y)", {"einsum('i,j', x, y) -> einsum('i,j', y, x)"}),
        ("swap-arguments", "return g(x, x), g(*x, y), g(x, *y), g('a', y)", set()),
        ("swap-arguments", "return isinstance(x, n), zip(x, y), torch.max(x, y)", set()),
        ("swap-arguments", "return KeyError(x, y)", set()),
    ],
)  # fmt: skip
def test_each_operator_makes_exactly_its_edits(operator, body, expected):
    assert changes(body, operator) == expected


def test_a_mutant_is_the_module_with_one_edit_and_the_rest_as_it_was():
    source = "import math  # kept\n\n@g\ndef f(x):\n    return x + 1.5\n\n# kept\nONE = 1\n"
    first = generate(source)[0]
    assert first.source == "import math  # kept\n\n@g\ndef f(x):\n    return x - 1.5\n\n# kept\nONE = 1\n"
    assert (first.key, first.qualname, first.top) == ("f: x + 1.5 -> x - 1.5", "f", "f")
    assert (first.line, first.operator) == (5, "arithmetic")


@pytest.mark.parametrize(
    ("operator", "before", "after"),
    [
        ("drop-statement", "if x:\n    raise E\nelif y:\n    n()", "if y:\n    n()"),
        ("drop-statement", "with torch.no_grad():\n    a = x\n    b = y", "a = x\nb = y"),
        ("condition", "if x:\n    a = x\nelse:\n    a = y", "if not x:\n    a = x\nelse:\n    a = y"),
        ("condition", "while x():\n    y = x", "while False:\n    y = x"),
    ],
)
def test_blocks_are_edited_whole(operator, before, after):
    def function(body):
        return f"def f(x, y, n):\n{textwrap.indent(body, '    ')}"

    assert function(after) in [one.source for one in generate(function(before)) if one.operator == operator]


@pytest.mark.parametrize(
    "body",
    [
        '"""The 1 + 1 of docstrings."""',
        "raise ValueError(x + 1, -y, x < y)",
        "return f'{x + 1} {y:>{n + 2}}'",
        "assert x, g(y + 1)",
        "y: Literal[1, 2]",
        "y = Literal[1, 2]",
        "def inner(x: g(1)) -> g(2):\n    return x",
        "@g(1, True)\ndef inner(x):\n    return x",
        "global A",
        "match x:\n    case 1 | -2:\n        return y",
    ],
)
def test_messages_types_and_patterns_are_left_alone(body):
    assert changes(body) == set()


def test_module_level_statements_bases_and_decorators_are_left_alone():
    assert generate("A = 1\nif A > 2:\n    A += 3\n@g(1)\nclass C(B[0], key=1):\n    x: g(1)\n") == []


def test_default_values_of_parameters_are_mutated():
    header = "def f(x, m: int = 7, /, n=(1.5, -2), *, y, flag=True, g=x + y):"
    assert changes("return lambda z=3: z", header=header) == {
        "m=7 -> m=8",
        "n=(1.5, -2) -> n=(3.0, -2)",
        "n=(1.5, -2) -> n=(1.5, -3)",
        "n=(1.5, -2) -> n=(1.5, 2)",
        "flag=True -> flag=False",
        "x + y -> x - y",
        "z=3 -> z=4",
    }


def test_the_negation_of_a_guard_that_only_raises_is_not_offered_but_its_comparison_is():
    assert changes("if not x:\n    raise E") == {"if not x: raise -> pass"}
    assert changes("if x < y:\n    raise E") == {
        "if x < y: raise -> pass",
        "x < y -> x <= y",
        "x < y -> x > y",
    }


@pytest.mark.parametrize(
    "body",
    [
        "while n > y:\n    n -= 1",
        "while n > y:\n    n = n // 2",
        "while True:\n    break",
        "while 1:\n    break",
        "while x:\n    x.pop()",
        "while not x:\n    y = x",
        "while x != y:\n    n = x",
    ],
)
def test_loops_that_would_not_end_are_not_offered(body):
    header = body.splitlines()[0].rstrip(":")
    allowed = {f"{header} -> while False", "n > y -> n >= y"}
    assert changes(body) <= allowed
    assert f"{header} -> while False" in changes(body)


def test_a_dim_is_not_also_a_constant():
    assert changes("return x.sum(dim=-1)", "constant") == set()
    assert changes("return x.sum(dim=(1, 2))", "constant") == set()


def test_one_text_is_one_mutant():
    found = generate("def f(x):\n    if x is None:\n        x = 3.0\n    while True:\n        return x\n")
    assert len({one.source for one in found}) == len(found)
    assert [one.key for one in found] == [
        "f: if x is None -> if x is not None",
        "f: x = 3.0 -> x = 6.0",
        "f: while True -> while False",
    ]


def test_methods_have_qualnames_and_inner_functions_belong_to_theirs():
    source = """
    class MLP(Module):
        scale: float = 2.0

        def forward(self, x):
            def inner():
                return -x
            return inner

        class Inner:
            async def run(self):
                return ~self
    """
    found = generate(textwrap.dedent(source))
    assert [(one.key, one.top) for one in found] == [
        ("MLP: scale: float = 2.0 -> scale: float = 4.0", "MLP"),
        ("MLP.forward: -x -> x", "MLP"),
        ("MLP.Inner.run: ~self -> self", "MLP"),
    ]


def test_repeated_keys_are_numbered_in_source_order():
    source = "def f(x):\n    x = x + 2.5\n    y = x + 2.5\n    return x + 2.5\n"
    found = [(one.key, one.line) for one in generate(source) if one.operator == "arithmetic"]
    assert found == [
        ("f: x + 2.5 -> x - 2.5", 2),
        ("f: x + 2.5 -> x - 2.5 #2", 3),
        ("f: x + 2.5 -> x - 2.5 #3", 4),
    ]


def test_keys_do_not_depend_on_lines_or_layout():
    plain = generate(SAMPLE)
    spaced = SAMPLE.replace(" = ", "  =   ").replace("\n    ", "\n\n    # a comment\n    ")
    moved = generate("# a comment\n\n\n" + spaced)
    assert [one.key for one in moved] == [one.key for one in plain]
    assert all(after.line > before.line for before, after in zip(plain, moved, strict=True))


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("a, b = x, 2.5", "a, b = (x, 2.5) -> a, b = (x, 5.0)"),
        ("return [i for i, j in x if j]", "for i, j in x if j -> for i, j in x"),
        ("for i, j in -x: pass", "-x -> x"),
        ("return g(lambda: x, k=y)", "g(lambda: x, k=y) -> g(lambda: x)"),
        ("""g(f"{x['a']}")""", "g(f'{x['a']}') -> pass"),
        ("""g(f"it's {x!r}")""", "g(f'it's {x!r}') -> pass"),
    ],
)
def test_keys_are_alike_in_every_python_version(body, expected):
    assert changes(body) == {expected}


def test_the_same_source_gives_the_same_mutants_in_source_order():
    found = generate(SAMPLE)
    assert found == generate(SAMPLE)
    assert [one.line for one in found] == sorted(one.line for one in found)
    assert len({one.key for one in found}) == len(found)


def test_every_mutant_of_the_sample_compiles_and_differs():
    original = ast.dump(ast.parse(SAMPLE))
    for one in generate(SAMPLE):
        compile(one.source, one.key, "exec")
        assert ast.dump(ast.parse(one.source)) != original, one.key


def test_names_choose_the_definitions():
    assert {one.top for one in generate(SAMPLE)} == {"attention", "MLP"}
    assert {one.top for one in generate(SAMPLE, names={"MLP", "elsewhere"})} == {"MLP"}
    assert generate(SAMPLE, names=[]) == []


def test_a_limit_spreads_over_each_definition_and_keeps_the_keys():
    every = [one for one in generate(SAMPLE) if one.top == "attention"]
    found = generate(SAMPLE, limit_per_name=3)
    assert [one.top for one in found] == ["attention"] * 3 + ["MLP"] * 3
    assert [one for one in found if one.top == "attention"] == [every[i * len(every) // 3] for i in range(3)]
    assert generate(SAMPLE, limit_per_name=0) == []
    assert generate(SAMPLE, limit_per_name=10_000) == generate(SAMPLE)
    with pytest.raises(ValueError, match=r"limit_per_name \(-1\) must not be negative"):
        generate(SAMPLE, limit_per_name=-1)


def test_a_long_module_is_quick():
    source = "\n".join(SAMPLE.replace("attention", f"attention{i}").replace("MLP", f"MLP{i}") for i in range(12))
    start = time.perf_counter()
    found = generate(source)
    assert len(found) > 500
    assert time.perf_counter() - start < 3


def test_windows_line_ends_and_a_missing_last_one():
    found = generate("A = 1\r\n\r\ndef f(x):\r\n    return -x")
    assert [ast.unparse(ast.parse(one.source)) for one in found] == ["A = 1\n\ndef f(x):\n    return x"]


def test_reachable_follows_helpers_classes_methods_and_module_variables():
    source = """
    def deep(x): return x
    def helper(x): return deep(x)
    def attention(x, by=helper): return by(x)
    class MLP(Base):
        def forward(self, x): return TABLE["deep"](x)
    class Block(MLP):
        def forward(self, x): return attention(x) if x else Block
    TABLE = {}
    TABLE["deep"] = deep
    def lonely(): return lonely()
    """
    names = ["attention", "MLP", "Block", "missing"]
    assert reachable(textwrap.dedent(source), names) == {
        "deep": {"attention", "MLP", "Block"},
        "helper": {"attention", "Block"},
        "attention": {"attention", "Block"},
        "MLP": {"MLP", "Block"},
        "Block": {"Block"},
        "lonely": set(),
    }


SAMPLE = '''
"""A sample: 1 + 1."""

import torch
from torch import nn


def attention(q, k, v, causal=True, scale: float | None = None):
    """Return the 1st attention."""
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"width {q.shape[-1] + 0}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    x = q @ k.transpose(-2, -1) * scale
    if causal and q.shape[-2] > 1:
        x = x.masked_fill(~torch.ones_like(x, dtype=torch.bool).tril(), float("-inf"))
    return torch.softmax(x, dim=-1).to(v.dtype) @ v


class MLP(nn.Module):
    def __init__(self, width, factor=4, *, bias=False):
        super().__init__()
        self.up = nn.Linear(width, factor * width, bias=bias)
        self.down = nn.Linear(factor * width, width, bias=bias)

    def forward(self, x):
        with torch.no_grad():
            x = x.contiguous()[..., 1:]
        return self.down(torch.relu(self.up(x)))
'''

ATOMS = st.sampled_from(["x", "y", "-1", "0", "1", "2.5", "True", "None", "'text'", "f'{x + 1}'"])


def _larger(inner):
    pair = st.tuples(inner, inner)
    binary = st.sampled_from("+ - * / // % ** @ & | ^ << >> < <= > >= == != is in and or".split())
    return st.one_of(
        st.tuples(inner, binary, inner).map("({0[0]} {0[1]} {0[2]})".format),
        st.tuples(st.sampled_from(["-", "~", "not "]), inner).map("({0[0]}{0[1]})".format),
        pair.map("({0[0]} if x else {0[1]})".format),
        pair.map("g({0[0]}, {0[1]}, dim=(-2, 1), k={0[0]})".format),
        pair.map("x[{0[0]}:{0[1]}, ...]".format),
        pair.map("[z for z in {0[0]} if {0[1]}]".format),
        inner.map("({0}).clone()".format),
        inner.map("(lambda z={0}: z)".format),
    )


EXPRESSIONS = st.recursive(ATOMS, _larger, max_leaves=6)
STATEMENTS = st.tuples(
    st.sampled_from(
        [
            "return {}",
            "x += {}",
            "x[{}] = 1",
            "g({})",
            "if {}: raise E",
            "if {}: y = 1\n    elif x: y = 2",
            "while {}: break",
            "with g({}): x.y = 3",
            "for x in {}: continue",
            "assert {}, x + 1",
            "y: int = {}",
        ]
    ),
    EXPRESSIONS,
).map(lambda pair: pair[0].format(pair[1]))


@settings(deadline=None)
@given(st.lists(STATEMENTS, min_size=1, max_size=4))
@pytest.mark.filterwarnings("ignore::SyntaxWarning")
def test_every_mutant_differs_and_compiles(statements):
    source = "def f(x, y=0):\n" + "".join(f"    {one}\n" for one in statements)
    seen = {ast.dump(ast.parse(source))}
    found = generate(source)
    for one in found:
        compile(one.source, one.key, "exec")
        dumped = ast.dump(ast.parse(one.source))
        assert dumped not in seen, one.key
        seen.add(dumped)
    assert len({one.key for one in found}) == len(found)


def test_the_module_needs_the_standard_library_alone():
    tree = ast.parse(Path(mutants.__file__).read_text(encoding="utf-8"))
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {one.name for node in ast.walk(tree) if isinstance(node, ast.Import) for one in node.names}
    assert modules <= {*sys.stdlib_module_names, "collections.abc"}
