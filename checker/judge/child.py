"""What the forked process of one check does: limits, clean surroundings, pytest with the plugin, and out."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import hashlib
import os
import random
import sys
from pathlib import Path
from typing import Any

from checker.judge import processes


def main(request: dict[str, Any], events: int, output: int, trace: int) -> None:
    """Run the check of `request`, writing events, what is printed and stack dumps to three descriptors; never returns."""
    status = 70
    try:
        _surround(request, output, trace)
        _check(request, events)
        status = 0
    except BaseException as error:
        with contextlib.suppress(BaseException):
            _report(request, events, error)
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def pytest_arguments(folder: str) -> list[str]:
    """The command line with which pytest runs the spec in `folder`: no settings, no conftest and no plugin but those that a check needs."""
    arguments = [str(Path(folder) / "spec.py"), "-c", os.devnull]
    arguments += ["--rootdir", folder, "--confcutdir", folder, "--noconftest"]
    arguments += ["--import-mode=importlib", "--strict-markers"]
    for plugin in ("terminal", "capture", "skipping", "warnings", "logging", "recwarn", "subtests", "legacypath", "tmpdir",
                   "cacheprovider", "stepwise", "faulthandler", "debugging", "doctest", "unittest", "junitxml", "pastebin", "setuponly", "setupplan",
                   "threadexception", "unraisableexception"):  # fmt: skip
        arguments += ["-p", f"no:{plugin}"]
    return arguments


def _surround(request: dict[str, Any], output: int, trace: int) -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(null)
    os.close(output)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", buffering=1, closefd=False, errors="replace")  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False, errors="replace")  # noqa: SIM115
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    sys.dont_write_bytecode = True
    os.chdir(request["scratch"])
    os.environ["TMPDIR"] = request["scratch"]
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    import tempfile

    tempfile.tempdir = None
    if "" in sys.path:
        sys.path.remove("")
    if request.get("helpers"):
        folder = Path(request["scratch"]) / "helpers"
        folder.mkdir()
        for name, source in request["helpers"].items():
            (folder / name).write_text(source, encoding="utf-8")
        sys.path.append(str(folder))
    faulthandler.enable(file=trace, all_threads=False)
    if processes.WHERE is not None:  # the worker asks with this signal before it ends a check that took too long
        faulthandler.register(processes.WHERE, file=trace, all_threads=True)
    _limit(request["limits"])


def _limit(limits: dict[str, Any]) -> None:
    try:
        import resource
    except ImportError:
        return

    def lower(what: int, value: int) -> None:
        with contextlib.suppress(ValueError, OSError):
            hard = resource.getrlimit(what)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(what, (value, value))

    lower(resource.RLIMIT_CORE, 0)
    lower(resource.RLIMIT_FSIZE, limits["file_bytes"])
    if limits.get("memory") and processes.LINUX:
        with open("/proc/self/statm") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
        lower(resource.RLIMIT_AS, now + limits["memory"])


def _check(request: dict[str, Any], events: int) -> None:
    import numpy as np
    import torch

    from checker.judge import compiled
    from checker.judge.events import Channel

    channel = Channel(events, request.pop("nonce"))
    channel.send("ready", pid=os.getpid(), python=sys.version.split()[0], torch=torch.__version__)
    device = request["device"]
    missing = _missing(device, torch)
    if missing:
        channel.send("not_run", reason=missing)
        channel.send("done")
        return
    torch.set_num_threads(1)
    random.seed(request["seed"])
    np.random.seed(request["seed"] % 2**32)
    # torch.manual_seed does the same and prepares every other device, which costs three milliseconds
    (torch.default_generator if device == "cpu" else torch).manual_seed(request["seed"])
    if device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
    sources = compiled.Sources(
        {slug: (file["path"], file["source"]) for slug, file in request["sources"].items()},
        Path(request["reference"]),
        request["days"],
        request.get("lent"),
    )
    sources.install()

    import pytest

    from checker.judge.plugin import Judge

    folder = request["kata"]["folder"]
    judge = Judge(request, channel, sources)
    _cache_rewritten_specs(Path(folder) / "spec.py")
    gc.disable()  # until the tests are collected: pytest makes many objects then, and no garbage
    try:
        code = pytest.main(pytest_arguments(folder), plugins=[judge, _Silence()])
    except Exception:
        if not judge.concluded:  # for instance because the learner's code removed the folder that pytest goes back to
            raise
    if judge.concluded:
        return
    if judge.faults and code:
        channel.send("fault", message="\n".join(judge.faults)[:4000])
    elif code in (3, 4):
        channel.send("fault", message=f"pytest ended with {code!r}")


class _Silence:
    """Stands for pytest's terminal reporter, which is not loaded, where pytest_timeout wants to write stacks to it."""

    def pytest_configure(self, config: Any) -> None:
        """Register a reporter that has nothing but a writer to nowhere."""
        from types import SimpleNamespace

        from _pytest._io import TerminalWriter

        null = open(os.devnull, "w")  # noqa: SIM115 - lives as long as the process
        config.pluginmanager.register(SimpleNamespace(_tw=TerminalWriter(null)), "terminalreporter")


def _cache_rewritten_specs(spec: Path) -> None:
    """Let pytest keep the spec with its rewritten asserts, under the hash of its text, in the user's cache folder.

    Rewriting takes a millisecond or two per test. The plugin forbids bytecode again before the learner's code is loaded.
    """
    from _pytest.assertion import rewrite

    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(home) / "torch-katas" / hashlib.sha256(spec.read_bytes()).hexdigest()[:24]
    rewrite.get_cache_dir = lambda file_path: folder
    sys.dont_write_bytecode = False


def _missing(device: str, torch: Any) -> str:
    if device == "cuda" and not torch.cuda.is_available():
        return "no CUDA device here"
    if device == "mps" and not (hasattr(torch.backends, "mps") and torch.backends.mps.is_available()):
        return "no MPS device here"
    return ""


def _report(request: dict[str, Any], events: int, error: BaseException) -> None:
    """Tell the parent about a fault of the program itself."""
    import traceback

    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    os.write(2, text.encode(errors="replace"))
