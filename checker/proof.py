"""The stored proof of a kata, and the hash of everything that it depends on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import checker
from checker.track import Kata, Track

# The modules that decide whether code passes. A change to one of them proves every kata again.
JUDGING = (
    "judge/plugin.py", "judge/given.py", "judge/timer.py", "judge/compare.py", "judge/failures.py", "judge/forbidden.py", "judge/families.py",
    "judge/signatures.py", "judge/meter.py", "judge/diagnose.py", "judge/mutation.py", "judge/modules.py", "judge/compiled.py",
    "judge/recorder.py", "judge/integrity.py", "testing.py", "mutants.py", "verify.py",
)  # fmt: skip


def fingerprint(track: Track, kata: Kata) -> str:
    """A SHA-256 over the kata's folder, its reference, the references that it builds on and the judging modules."""
    home = Path(checker.__file__).parent
    files = {f"kata/{file.relative_to(kata.folder).as_posix()}": file for file in _files(kata.folder)}
    for slug in (kata.slug, *kata.builds_on):
        files[f"reference/{slug}.py"] = track.reference / f"{slug}.py"
    files.update({f"checker/{name}": home / name for name in JUDGING})
    digest = hashlib.sha256()
    for name in sorted(files):
        data = files[name].read_bytes() if files[name].is_file() else b"missing"
        digest.update(f"{name}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()


def _files(folder: Path) -> list[Path]:
    return [
        file
        for file in folder.rglob("*")
        if file.is_file() and file.name != "proof.json" and "__pycache__" not in file.parts and file.suffix != ".pyc"
    ]


def stored(kata: Kata) -> dict[str, Any] | None:
    """The proof beside the kata, or None."""
    try:
        return json.loads((kata.folder / "proof.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def is_fresh(track: Track, kata: Kata) -> bool:
    """Whether the stored proof is about exactly what is there now."""
    proof = stored(kata)
    return proof is not None and proof.get("hash") == fingerprint(track, kata)


def save(track: Track, kata: Kata, facts: dict[str, Any]) -> None:
    """Write proof.json."""
    proof = {"hash": fingerprint(track, kata), **facts}
    (kata.folder / "proof.json").write_text(json.dumps(proof, indent=2, sort_keys=True) + "\n", encoding="utf-8")
