"""The track as plain records, read from track.toml and the kata.toml files.

Nothing here looks at what a command does not ask for: a kata.toml is read when its kata is first used.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from checker.errors import TrackError, UserError

if sys.version_info >= (3, 11):
    import tomllib
else:  # Python 3.10
    import tomli as tomllib

LEVELS = ("core", "more", "stretch")
DEVICES = ("cpu", "cuda", "mps")
DTYPES = ("float16", "bfloat16", "float32", "float64")
_ID = re.compile(r'id = "([\w-]+)"\s*$', re.MULTILINE)
KATA_FILES = ("kata.toml", "lesson.md", "stub.py", "spec.py", "hints.md", "misconceptions.py", "alternatives.py")


@dataclass(frozen=True)
class Task:
    """One task of a kata: the names that belong to it, and the rules that hold while its tests run.

    `time_limit` is in seconds per test, `minutes` is what a learner is expected to need.
    """

    name: str
    level: str
    minutes: int
    summary: str
    names: tuple[str, ...]
    forbidden: tuple[str, ...] = ()
    time_limit: float = 10.0

    def to_json(self) -> dict[str, Any]:
        """The record that the worker process receives."""
        return {
            "name": self.name,
            "level": self.level,
            "names": list(self.names),
            "forbidden": list(self.forbidden),
            "time_limit": self.time_limit,
        }


@dataclass(frozen=True)
class Kata:
    """One day of the track. `time_limit` is in seconds for the whole check."""

    slug: str
    folder: Path
    reference_file: Path
    id: str
    title: str
    minutes: int
    concepts: tuple[str, ...]
    builds_on: tuple[str, ...]
    devices: tuple[str, ...]
    dtypes: tuple[str, ...]
    time_limit: float
    tasks: tuple[Task, ...]
    equivalents: Mapping[str, str]

    @property
    def day(self) -> int:
        """The number in the folder's name."""
        return day_of(self.slug) or 0

    @property
    def file_name(self) -> str:
        """The learner's file in the workspace."""
        return f"{self.slug}.py"

    @property
    def core(self) -> tuple[Task, ...]:
        """The tasks that pass the day."""
        return tuple(task for task in self.tasks if task.level == "core")

    def text(self, name: str) -> str:
        """The text of one of the kata's files; raises TrackError if it is not there."""
        return _read(self.folder / name)

    def task(self, name: str) -> Task:
        """The task of that name, or UserError with the nearest one."""
        for task in self.tasks:
            if task.name == name or name in task.names:
                return task
        names = [task.name for task in self.tasks]
        raise UserError(f"{self.slug} has no task {name!r}{_nearest(name, names)}; its tasks are {', '.join(names)}.")


@dataclass(frozen=True)
class Phase:
    """A group of katas with a title, in order; `number` counts from 1."""

    number: int
    title: str
    slugs: tuple[str, ...]


@dataclass(frozen=True)
class Track:
    """A folder with track.toml, its katas and the folder of the reference modules."""

    folder: Path
    title: str
    reference: Path
    phases: tuple[Phase, ...]

    @classmethod
    def load(cls, folder: Path) -> Track:
        """Read track.toml of `folder`; raises TrackError with file and line when it is wrong."""
        folder = folder.resolve()
        file = folder / "track.toml"
        if not file.is_file():
            raise TrackError(f"{folder} is no track: it has no track.toml; give a folder that has one with --track.")
        table = _Table(file)
        title, reference = table.take("title", str), table.take("reference", str, "reference")
        phases = []
        for number, entry in enumerate(table.take_tables("phase"), 1):
            phases.append(Phase(number, entry.take("title", str), entry.take_strings("katas")))
            entry.done()
        table.done()
        slugs = [slug for phase in phases for slug in phase.slugs]
        for slug in slugs:
            if slugs.count(slug) > 1:
                raise TrackError(f"{file} lists {slug} twice; keep one.")
            if day_of(slug) is None:
                raise TrackError(f"{file} lists {slug!r}; a kata's folder is named like day16_scaled_dot_product.")
        return cls(folder, title, (folder / reference).resolve(), tuple(phases))

    @property
    def slugs(self) -> list[str]:
        """The folders of all katas, in order."""
        return [slug for phase in self.phases for slug in phase.slugs]

    @cached_property
    def _cache(self) -> dict[str, Kata]:
        return {}

    @cached_property
    def _ids(self) -> dict[str, str]:
        return {}

    def kata(self, slug: str) -> Kata:
        """The kata of that folder name, read once."""
        if slug not in self._cache:
            self._cache[slug] = load_kata(self.folder / slug, self.reference)
        return self._cache[slug]

    def id_of(self, slug: str) -> str:
        """The id of a kata, by which progress is kept; where it stands in the first line, the file is not parsed."""
        if slug not in self._ids:
            first = None if slug in self._cache else _ID.match(_read(self.folder / slug / "kata.toml"))
            self._ids[slug] = first[1] if first else self.kata(slug).id
        return self._ids[slug]

    def ahead(self, passed: Collection[str]) -> Iterator[str]:
        """The folders of the katas whose ids are not among `passed`, in order; no file behind the last one asked for is read."""
        return (slug for slug in self.slugs if self.id_of(slug) not in passed)

    def __iter__(self) -> Iterator[Kata]:
        return (self.kata(slug) for slug in self.slugs)

    def find(self, word: str) -> Kata:
        """The kata that somebody means by '16', 'day16', its folder, or a part of its name that only one has."""
        slugs = self.slugs
        if not word.strip():
            raise UserError(f"Say which day of {self.title}; `kata status` lists them.")
        plain = word.strip().removesuffix(".py").lower().replace("-", "_")
        number = re.fullmatch(r"(?:day[_ ]?)?0*(\d+)", plain)
        if number:
            matches = [slug for slug in slugs if day_of(slug) == int(number[1])]
        else:
            matches = [slug for slug in slugs if slug.lower() == plain] or [
                slug for slug in slugs if plain in slug.lower()
            ]
        if len(matches) == 1:
            return self.kata(matches[0])
        if len(matches) > 1:
            raise UserError(f"{word!r} fits {', '.join(matches)}; say which one.")
        near = _nearest(plain, [*slugs, *(slug.partition("_")[2] for slug in slugs)])
        if not near and number and slugs:
            near = f"; the track has days {day_of(slugs[0])} to {day_of(slugs[-1])}"
        raise UserError(f"There is no day {word!r} in {self.title}{near}; `kata status` lists them.")

    def after(self, slug: str) -> str | None:
        """The folder of the kata that follows, or None at the end."""
        slugs = self.slugs
        position = slugs.index(slug) + 1
        return slugs[position] if position < len(slugs) else None

    def phase_of(self, slug: str) -> Phase:
        """The phase that lists this kata."""
        return next(phase for phase in self.phases if slug in phase.slugs)


def load_kata(folder: Path, reference: Path) -> Kata:
    """Read and check `folder`/kata.toml; raises TrackError with file, key and line."""
    file = folder / "kata.toml"
    table = _Table(file)
    tasks = []
    for entry in table.take_tables("task"):
        name = entry.take("name", str)
        names = entry.take_strings("names", (name,))
        tasks.append(
            Task(
                name=name,
                level=entry.choice("level", LEVELS),
                minutes=entry.take("minutes", int),
                summary=entry.take("summary", str),
                names=names,
                forbidden=entry.take_strings("forbidden", ()),
                time_limit=float(entry.take("time_limit", (int, float), 10)),
            )
        )
        entry.done()
    equivalents = {}
    for entry in table.take_tables("equivalent", required=False):
        equivalents[entry.take("mutant", str)] = entry.take("reason", str)
        entry.done()
    kata = Kata(
        slug=folder.name,
        folder=folder,
        reference_file=reference / f"{folder.name}.py",
        id=table.take("id", str),
        title=table.take("title", str),
        minutes=table.take("minutes", int),
        concepts=table.take_strings("concepts"),
        builds_on=table.take_strings("builds_on", ()),
        devices=table.choices("devices", DEVICES),
        dtypes=table.choices("dtypes", DTYPES, ("float32",)),
        time_limit=float(table.take("time_limit", (int, float))),
        tasks=tuple(tasks),
        equivalents=equivalents,
    )
    table.done()
    seen: dict[str, str] = {}
    for task in tasks:
        for name in {task.name, *task.names}:
            if seen.setdefault(name, task.name) != task.name:
                raise TrackError(f"{file}: {name!r} belongs to two tasks, {seen[name]!r} and {task.name!r}.")
    return kata


def day_of(slug: str) -> int | None:
    """The day's number in a folder name such as day16_scaled_dot_product, or None."""
    match = re.match(r"day(\d+)_\w+$", slug)
    return int(match[1]) if match else None


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise TrackError(f"{file} is missing.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise TrackError(f"{file} cannot be read: {error}.") from None


def _nearest(word: str, words: list[str]) -> str:
    import difflib

    near = difflib.get_close_matches(word, words, n=1)
    return f"; did you mean {near[0]}?" if near else ""


class _Table:
    """A TOML table whose keys are taken one by one, so that what is left over is known to be unknown."""

    def __init__(
        self,
        file: Path,
        data: dict[str, Any] | None = None,
        where: str = "",
        position: tuple[str, int] | None = None,
        text: str = "",
    ) -> None:
        self.file, self.where, self.position, self.text = file, where, position, text
        if data is None:
            self.text = _read(file)
            try:
                data = tomllib.loads(self.text)
            except tomllib.TOMLDecodeError as error:
                raise TrackError(f"{file} is not valid TOML: {error}.") from None
        self.data = dict(data)

    def _line(self, key: str) -> str:
        """', line 7' for the place where this table says `key`; '' if it cannot be told."""
        lines = self.text.split("\n")
        hits = [number for number, line in enumerate(lines, 1) if re.match(rf"\s*\[*\s*{re.escape(key)}\b", line)]
        heads = [number for number, line in enumerate(lines, 1) if line.lstrip().startswith("[[")]
        first, last = self._span(heads, len(lines))
        inside = [number for number in hits if first <= number < last] or hits
        return f", line {inside[0]}" if inside else ""

    def _span(self, heads: list[int], count: int) -> tuple[int, int]:
        """The lines of this table: before the first [[head]], or from the head that `position` counts."""
        if self.position is None:
            return 1, heads[0] if heads else count + 1
        kind, number = self.position
        own = [head for head in heads if self.text.split("\n")[head - 1].strip().startswith(f"[[{kind}]]")]
        if number >= len(own):
            return 1, count + 1
        return own[number], min((head for head in heads if head > own[number]), default=count + 1)

    def take(self, key: str, kind: type | tuple[type, ...], default: Any = ...) -> Any:
        if key not in self.data:
            if default is ...:
                raise TrackError(f"{self.file}: {self.where}the key {key!r} is missing; add it.")
            return default
        value = self.data.pop(key)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            names = "/".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            raise TrackError(f"{self.file}{self._line(key)}: {self.where}{key!r} must be {names}, not {value!r}.")
        return value

    def take_strings(self, key: str, default: Any = ...) -> tuple[str, ...]:
        value = self.take(key, list, default if default is ... else list(default))
        if not all(isinstance(item, str) for item in value):
            raise TrackError(f"{self.file}{self._line(key)}: {self.where}{key!r} must be a list of strings.")
        return tuple(value)

    def choice(self, key: str, allowed: tuple[str, ...]) -> str:
        value = self.take(key, str)
        if value not in allowed:
            raise TrackError(
                f"{self.file}{self._line(key)}: {self.where}{key!r} is {value!r}; use one of {', '.join(allowed)}."
            )
        return value

    def choices(self, key: str, allowed: tuple[str, ...], default: Any = ...) -> tuple[str, ...]:
        values = self.take_strings(key, default)
        for value in values:
            if value not in allowed:
                raise TrackError(f"{self.file}{self._line(key)}: {key!r} has {value!r}; use {', '.join(allowed)}.")
        return values

    def take_tables(self, key: str, *, required: bool = True) -> list[_Table]:
        entries = self.take(key, list, ... if required else [])
        if not all(isinstance(entry, dict) for entry in entries):
            raise TrackError(f"{self.file}{self._line(key)}: write [[{key}]] for each {key}.")
        tables = []
        for number, entry in enumerate(entries, 1):
            label = entry.get("name") or entry.get("title") or number
            tables.append(_Table(self.file, entry, f"in [[{key}]] {label}, ", (key, number - 1), self.text))
        return tables

    def done(self) -> None:
        """Raise for what nobody took."""
        for key in self.data:
            raise TrackError(
                f"{self.file}{self._line(key)}: {self.where}the key {key!r} is unknown; remove it or mend its spelling."
            )
