"""Lessons and hints as a reader sees them, wide and narrow."""

import pytest

from checker import markdown

TABLE = """\
| op | what it *does* | cost |
|---|:--|---:|
| `x | y` | joins **two** things of which more is said | 1 |
| view | \\| | |
"""


def lines(text, width=100):
    return [line.plain for line in markdown.page(text, width).lines]


def styles(text):
    return [
        (line.plain[span.start : span.end], str(span.style))
        for line in markdown.page(text, 100).lines
        for span in line.spans
    ]


def test_a_table_has_aligned_columns_and_no_rules():
    head, first, second = lines(TABLE)
    assert head.split("  ")[0] == "" and head.split() == ["op", "what", "it", "does", "cost"]
    assert first == "  `x | y`  joins two things of which more is said  1"
    assert second == "  view     |"
    assert head.index("what") == first.index("joins") == second.index("|")
    assert head.index("cost") == first.index("  1") + 2


@pytest.mark.parametrize("width", [30, 44, 60])
def test_a_table_keeps_to_the_width_and_loses_no_word(width):
    shown = lines(TABLE, width)
    assert all(len(line) <= width and line == line.rstrip() for line in shown)
    words = " ".join(shown).split()
    assert {"joins", "two", "things", "said", "`x", "|", "y`", "1", "cost"} <= set(words)


def test_a_table_ends_where_something_else_begins():
    shown = lines("before\n| a | b |\n|---|---|\n| 1 | 2 |\nafter\n")
    assert shown == ["  before", "  a  b", "  1  2", "  after"]


def test_a_bar_in_code_is_no_column():
    assert lines("| a | b |\n|---|---|\n| `p | q` | r |\n")[-1] == "  `p | q`  r"


def test_marks_become_styles_and_code_keeps_its_own():
    found = styles("**Bold** and *slanted* and `x * y * z` and 2 * 3 * 4 and f(*a, **b)")
    assert ("Bold", "bold") in found and ("slanted", "italic") in found and ("`x * y * z`", "cyan") in found
    text = lines("**Bold** and *slanted* and `x * y * z` and 2 * 3 * 4 and f(*a, **b)")[0]
    assert text == "  Bold and slanted and `x * y * z` and 2 * 3 * 4 and f(*a, **b)"


def test_a_span_is_not_broken_over_lines():
    shown = lines(
        "some words before `a short span` and *a much longer title that cannot stay on any one line here* end", 40
    )
    assert any("`a short span`" in line for line in shown)
    assert not any("*" in line for line in shown) and all(len(line) <= 40 for line in shown)


def test_lists_hang_and_code_is_left_alone():
    shown = lines("- one two three four five six seven eight\n- nine\n\n```python\nx = 1\n\n    y = *a\n```\n", 34)
    assert shown == [
        "  - one two three four five six",
        "    seven eight",
        "  - nine",
        "",
        "      x = 1",
        "",
        "          y = *a",
        "",
    ]
