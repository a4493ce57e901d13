"""The learner's folder: one Python file per day, and `.kata/` for the program. Nothing in it is ever overwritten without a snapshot."""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from checker.errors import NOT_PASSED, UserError
from checker.track import Kata, Track

MARK = ".kata"
MOST_BYTES = 1 << 20  # of one source file
_MOST_HELPERS = 50


@dataclass(frozen=True)
class Workspace:
    """The folder `root`, which holds `.kata/`."""

    root: Path

    @classmethod
    def find(cls, start: Path | None = None) -> Workspace | None:
        """The nearest folder upwards from `start` with `.kata/`, else KATA_WORKSPACE, else ./torch-katas; None if there is none.

        Raises UserError if KATA_WORKSPACE names another workspace than the one that `start` is in.
        """
        start = (start or Path.cwd()).absolute()
        inside = next((folder for folder in (start, *start.parents) if (folder / MARK).is_dir()), None)
        named = os.environ.get("KATA_WORKSPACE")
        if named:
            wanted = Path(named).expanduser().absolute()
            if inside is not None and inside.resolve() != wanted.resolve():
                raise UserError(
                    f"Two workspaces: you are in {inside}, but KATA_WORKSPACE says {wanted}; leave one or unset the other."
                )
            return cls(wanted) if (wanted / MARK).is_dir() else None
        if inside is not None:
            return cls(inside)
        default = start / "torch-katas"
        return cls(default) if (default / MARK).is_dir() else None

    @classmethod
    def default(cls) -> Path:
        """Where `kata next` makes a workspace when there is none."""
        named = os.environ.get("KATA_WORKSPACE")
        return Path(named).expanduser().absolute() if named else Path.cwd() / "torch-katas"

    @classmethod
    def create(cls, root: Path) -> Workspace:
        """Make the folder a workspace; raises UserError if it cannot be one."""
        root = root.expanduser().absolute()
        outer = next((folder for folder in root.parents if (folder / MARK).is_dir()), None)
        if outer is not None:
            raise UserError(f"{root} lies inside the workspace {outer}; choose a folder outside of it.")
        try:
            root.mkdir(parents=True, exist_ok=True)
            (root / MARK).mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{root} cannot be made a workspace: {error.strerror}; choose another folder with `kata init DIR`."
            ) from None
        return cls(root)

    @property
    def database(self) -> Path:
        """The progress store."""
        return self.root / MARK / "progress.db"

    def file(self, kata: Kata) -> Path:
        """The learner's file of a day."""
        return self.root / kata.file_name

    def fetched(self, kata: Kata) -> bool:
        """Whether the day's file is there."""
        return self.file(kata).exists()

    def read(self, kata: Kata) -> str:
        """The learner's source; raises UserError if it is not there or not UTF-8 text."""
        file = self.file(kata)
        if not file.exists() and not file.is_symlink():
            raise UserError(
                f"Day {kata.day} is not fetched: {file} is not there; fetch it with `kata start {kata.day}`."
            )
        return read_source(file)

    def write(self, kata: Kata, source: str) -> Path:
        """Put `source` into the day's file, whole or not at all; raises UserError if the folder cannot be written."""
        file = self.file(kata)
        write_whole(file, source)
        return file

    def last_edited(self, track: Track) -> str | None:
        """The folder name of the day whose file was saved last, or None."""
        newest: tuple[float, str] | None = None
        for slug in track.slugs:
            with contextlib.suppress(OSError):
                saved = (self.root / f"{slug}.py").stat().st_mtime
                if newest is None or saved >= newest[0]:
                    newest = saved, slug
        return newest[1] if newest else None

    def helpers(self, track: Track) -> dict[str, str]:
        """Other Python files at the top of the workspace, by name, that a day's file may import.

        Files that carry the name of a module of Python or torch are left out: they would hide it.
        """
        taken = (
            set(track.slugs)
            | set(sys.stdlib_module_names)
            | {"torch", "numpy", "pytest", "checker", "reference", "conftest", "setup"}
        )
        found: dict[str, str] = {}
        for file in sorted(self.root.glob("*.py")):
            if file.stem in taken or not file.stem.isidentifier() or not file.is_file() or len(found) >= _MOST_HELPERS:
                continue
            with contextlib.suppress(UserError):
                found[file.name] = read_source(file)
        return found


def read_source(file: Path) -> str:
    """The text of a Python file; raises UserError in one sentence for everything that is not one."""
    try:
        if not file.is_file():
            raise UserError(f"{file} is not a file; move it away and fetch the day again.", exit_code=NOT_PASSED)
        if file.stat().st_size > MOST_BYTES:
            raise UserError(
                f"{file} is larger than {MOST_BYTES >> 20} MB; a day's file holds code only.", exit_code=NOT_PASSED
            )
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.", exit_code=NOT_PASSED) from None
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{file} is saved as UTF-16; save it as UTF-8.", exit_code=NOT_PASSED)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(f"{file}, line {line} is not UTF-8; save the file as UTF-8.", exit_code=NOT_PASSED) from None
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise UserError(f"{file}, line {line} has a NUL character; remove it.", exit_code=NOT_PASSED)
    return text


def write_whole(file: Path, text: str) -> None:
    """Write through a temporary file in the same folder, so that a crash or a full disk leaves the old file as it was."""
    import tempfile

    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8", newline="") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            mode = file.stat().st_mode & 0o777 if file.exists() else 0o644
            os.chmod(name, mode)
            os.replace(name, file)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
    except OSError as error:
        raise UserError(
            f"{file} cannot be written: {error.strerror}; nothing was changed.", exit_code=NOT_PASSED
        ) from None
