"""Cheats and accidents: each is one small learner's file, and each must get its answer, in time, with nothing left behind."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import pytest

from checker import verdict
from checker.judge import processes

CASES = Path(__file__).parent / "cases"

# file -> (outcome, state of the task `scale` or None, words that the verdict has)
EXPECTED = {
    "exit_at_import": ("crash", None, "while the file was imported"),
    "exit_in_function": ("crash", None, "ended by itself before the tests finished"),
    "sys_exit": ("error", None, "exits while it is imported"),
    "atexit_hook": ("failed", "failed", ""),
    "exec_true": ("crash", None, "ended by itself"),
    "skip": ("failed", "failed", "skipped"),
    "pytest_exit": ("crash", None, ""),
    "spoofed_output": ("failed", "failed", "6 passed in 0.01s"),
    "forged_events": ("failed tampered crash", None, ""),
    "patched_comparison": ("tampered", None, "checker.testing.assert_close"),
    "patched_isclose": ("tampered", None, "torch.isclose"),
    "patched_builtins": ("tampered", None, "builtins.all"),
    "patched_oracle": ("tampered", None, "torch.softmax"),
    "patched_report": ("tampered", None, "CallInfo"),
    "patched_runtest": ("tampered", None, "Function.runtest"),
    "patched_plugin": ("tampered", None, "Judge.run"),
    "patched_values": ("tampered", None, "Values.randn"),
    "imported_reference": ("error", None, "imports reference.day01_scale"),
    "imported_checker": ("error", None, "imports checker.testing"),
    "tensor_subclass": ("failed", "failed", ""),
    "equal_object": ("failed", "failed", "Liar"),
    "mutated_input": ("failed", "failed", "changed one of its inputs in place"),
    "cached_result": ("failed", "failed", ""),
    "known_seed": ("failed", "failed", ""),
    "forbidden_fallback": ("failed", None, "torch.nn.functional.softmax"),
    "forbidden_operation": ("failed", None, "_softmax"),
    "forbidden_module": ("failed", None, "softmax"),
    "unwatched": ("failed tampered", None, "sys.setprofile"),
    "lower_precision": ("failed", "failed", "float16"),
    "killed_worker": ("crash", None, "ended the process that checks it"),
    "fork_bomb": ("limit", None, "more processes"),
    "left_behind": ("passed", "passed", ""),
    "escape_sequences": ("failed", "failed", ""),
    "endless_loop": ("failed", "timeout", "took longer than"),
    "endless_loop_swallowing": ("timeout", None, "did not come back"),
    "endless_import": ("timeout", None, "while the file was imported"),
    "endless_operation": ("timeout", None, "did not come back"),
    "endless_recursion": ("failed", "failed", "RecursionError"),
    "deep_recursion": ("crash timeout", None, ""),
    "huge_tensor": ("failed", "memory", "400.0 GB"),
    "growing_list": ("failed", None, ""),
    "segfault": ("crash", None, "SIGSEGV"),
    "abort": ("crash", None, "SIGABRT"),
    "gigabyte_of_output": ("limit", None, "printed more than"),
    "reads_input": ("failed", "failed", "EOFError"),
    "breakpoint_left": ("failed", "failed", "breakpoint"),
    "thread_left": ("passed", "passed", "sleeper"),
    "closed_descriptors": ("crash", None, ""),
    "removed_folder": ("passed", "passed", ""),
    "syntax_error": ("error", None, "line 6"),
    "tabs": ("error", None, "TabError"),
    "missing_name": ("failed", "failed", "has no scale"),
    "empty": ("failed", "failed", "has no scale"),
    "circular": ("error", None, "does not load"),
    "wrong_signature": ("failed", "failed", "put the arguments back"),
    "nan_result": ("failed", "failed", "NaN"),
    "wrong_dtype": ("failed", "failed", "float16"),
    "wrong_shape": ("failed", "failed", "shape (1,2,3)"),
    "numpy_result": ("failed", "failed", "a tensor"),
    "none_result": ("failed", "failed", "None"),
    "global_dtype": ("failed", "failed", "default dtype"),
    "grad_mode": ("failed", "failed", "grad mode"),
    "ignores_sigterm": ("timeout", None, "did not come back"),
}


def test_every_case_has_an_expectation():
    assert {file.stem for file in CASES.glob("*.py")} == set(EXPECTED)


def everything(found: verdict.Verdict) -> str:
    words = [found.message, found.output, *found.notes]
    for task in found.tasks:
        for test in task.tests:
            if test.failure:
                words += [
                    test.state,
                    test.failure["message"],
                    test.failure["error"],
                    *(text for _, text in test.failure["lines"]),
                ]
    return "\n".join(words)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_the_verdict_says_what_it_was(name, judged):
    outcome, state, words = EXPECTED[name]
    source = (CASES / f"{name}.py").read_text(encoding="utf-8")
    before = set(processes.descendants(os.getpid()))
    started = time.monotonic()
    found = judged(source)
    seconds = time.monotonic() - started
    assert found.outcome in outcome.split(), f"{found.outcome}: {everything(found)}"
    if state is not None:
        task = next(task for task in found.tasks if task.name == "scale")
        assert task.state == state, everything(found)
    assert words in everything(found)
    assert seconds < 20 + 2
    deadline = time.monotonic() + 2
    while extra := strangers(before):
        assert time.monotonic() < deadline, f"left behind: {extra}"
        time.sleep(0.05)


def strangers(before: set[int]) -> list[str]:
    found = []
    for pid in set(processes.descendants(os.getpid())) - before:
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if "checker.judge" not in command or "warm" not in command:
                found.append(command or Path(f"/proc/{pid}/stat").read_text())
    return found
