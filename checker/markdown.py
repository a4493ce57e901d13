"""Lessons and hints as pages: headings bold, code set off, tables aligned, paragraphs wrapped; readable as plain text, too."""

from __future__ import annotations

import re
import textwrap

from checker.render import Console, Page

_ITEM = re.compile(r"\s*((?:[-*]|\d+[.)])\s+)?")
_SPAN = re.compile(r"(`[^`]+`|\*\*[^*]+\*\*|(?<![\w*])\*\w[^*]*\*(?![\w*]))")
_CELL = re.compile(r"(?<!\\)\|(?=(?:[^`]*`[^`]*`)*[^`]*$)")  # a bar that is in no code
_UNBROKEN = 40  # characters of a span that is kept on one line
_GLUE = "\x00"  # a space within a span, while lines are broken


def show(text: str, where: Console) -> None:
    """Print a lesson or hints."""
    page(text, where.width).show(where)


def page(text: str, width: int) -> Page:
    """The page of a lesson or of hints."""
    made, paragraph, rows, fence = Page(width), [], [], False

    def flush() -> None:
        if paragraph:
            joined = " ".join(line.strip() for line in paragraph)
            first = _ITEM.match(paragraph[0])[1] or ""
            indent = len(paragraph[0]) - len(paragraph[0].lstrip()) + 2
            for number, line in enumerate(_wrap(joined[len(first) :], made.width - indent - len(first))):
                made.add(first if not number else " " * len(first), *_styled(line), indent=indent)
            paragraph.clear()
        if rows:
            _table(made, rows)
            rows.clear()

    for line in text.splitlines():
        stripped = line.strip()
        if stripped.startswith("```"):
            flush()
            fence = not fence
            made.blank()
        elif fence:
            made.add((line, "cyan"), indent=6 if stripped else 0)
        elif line.startswith("#"):
            flush()
            made.blank()
            chapter = line.startswith("# ")
            made.add((line.lstrip("# "), "bold underline" if chapter else "bold"), indent=0 if chapter else 2)
            made.blank()
        elif not stripped:
            flush()
            made.blank()
        elif stripped.startswith("|"):
            if paragraph:
                flush()
            rows.append([cell.strip().replace("\\|", "|") for cell in _CELL.split(stripped.strip("|"))])
        else:
            if rows or _ITEM.match(line)[1]:
                flush()
            paragraph.append(line)
    flush()
    return made


def _table(made: Page, rows: list[list[str]]) -> None:
    """Aligned columns, the head dim; a cell that finds no room is wrapped."""
    ruled = len(rows) > 1 and all(re.fullmatch(r":?-+:?", cell) for cell in rows[1])
    count = max(map(len, rows))
    body = [row + [""] * (count - len(row)) for number, row in enumerate(rows) if not (ruled and number == 1)]
    widths = [max(len(_plain(row[i])) for row in body) for i in range(count)]
    while sum(widths) + 2 * count > made.width and max(widths) > 8:
        widths[widths.index(max(widths))] -= 1
    for number, row in enumerate(body):
        cells = [_wrap(cell, width) for cell, width in zip(row, widths, strict=True)]
        for height in range(max(map(len, cells))):
            parts: list[str | tuple[str, str]] = []
            for column, width in zip(cells, widths, strict=True):
                line = column[height] if height < len(column) else ""
                if line:
                    parts += [(_plain(line), "dim")] if ruled and not number else _styled(line)
                parts.append(" " * (width - len(_plain(line)) + 2))
            while parts and isinstance(parts[-1], str) and not parts[-1].strip():
                parts.pop()
            made.add(*parts, indent=2)


def _wrap(text: str, room: int) -> list[str]:
    """Lines of at most `room` characters; short spans stay whole, long ones are marked word by word."""
    if len(_plain(text)) <= room:
        return [text]

    def keep(match: re.Match[str]) -> str:
        span = match[0]
        if len(span) <= min(_UNBROKEN, room):
            return span.replace(" ", _GLUE)
        mark = "" if span.startswith("`") else "**" if span.startswith("**") else "*"
        return " ".join(f"{mark}{word}{mark}" for word in span.strip("*").split()) if mark else span

    glued = _SPAN.sub(keep, text)
    lines = textwrap.wrap(glued, max(room, 8), break_long_words=False, break_on_hyphens=False)
    return [line.replace(_GLUE, " ") for line in lines] or [""]


def _styled(line: str) -> list[str | tuple[str, str]]:
    """The parts of a line; code keeps its marks, for those who see no colour."""
    parts: list[str | tuple[str, str]] = []
    for piece in _SPAN.split(line):
        if piece.startswith("`") and len(piece) > 2:
            parts.append((piece, "cyan"))
        elif piece.startswith("**") and _SPAN.fullmatch(piece):
            parts.append((piece.strip("*"), "bold"))
        elif piece.startswith("*") and _SPAN.fullmatch(piece):
            parts.append((piece.strip("*"), "italic"))
        elif piece:
            parts.append(piece)
    return parts


def _plain(line: str) -> str:
    """What a reader sees of a line."""
    return "".join(part if isinstance(part, str) else part[0] for part in _styled(line))
