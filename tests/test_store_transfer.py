"""Moving progress between machines."""

import copy
import json
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from progress import Attempt, Store, StoreError, source_sha, transfer
from progress.transfer import ImportReport, export_json, import_json


def at(second, fraction=""):
    return f"2025-10-03T08:{second // 60:02}:{second % 60:02}{fraction}Z"


@contextmanager
def new_store():
    with tempfile.TemporaryDirectory() as folder, Store.open(Path(folder) / "progress.db") as store:
        yield store


def fill(store, start=0, word="x"):
    for number in range(start, start + 3):
        one = Attempt(
            id=f"{word}{number}",
            kata="day01",
            started=at(number),
            duration=0.5,
            outcome="failed",
            tasks={"split": "failed"},
            passed=number % 2 == 0,
            seed=2**63 + number,
            device="cpu",
            versions={"torch": "2.13.0"},
            provenance={"day00": "reference"},
        )
        store.record(one, f"{word} = {number}\r\n")
        store.take_hint("day01", "split", number + 1, taken=at(number))
        store.mark_started(f"day{number:02}", fetched=at(number))
    store.add_snapshot("day01", "\ufeffreset = 1\n", "reset", taken=at(start + 50))
    store.saw_solution("day01", True, seen=at(start + 51))


def everything(data):
    """An export without the order that two stores may differ in."""
    return {
        key: sorted(json.dumps(entry, sort_keys=True) for entry in value) if isinstance(value, list) else value
        for key, value in data.items()
    }


@pytest.fixture
def data():
    with new_store() as store:
        fill(store)
        return export_json(store)


def test_an_export_holds_everything_and_is_plain_json(data):
    assert json.loads(json.dumps(data)) == data
    assert {key: len(data[key]) for key in ("attempts", "snapshots", "sources", "hints", "solutions", "fetches")} == {
        "attempts": 3,
        "snapshots": 4,
        "sources": 4,
        "hints": 3,
        "solutions": 1,
        "fetches": 3,
    }
    assert data["sources"][source_sha("x = 1\r\n")] == "x = 1\r\n"
    assert [one["started"] for one in data["attempts"]] == [at(0), at(1), at(2)]


def test_an_import_into_an_empty_store_is_a_copy(data):
    with new_store() as store:
        report = import_json(store, json.loads(json.dumps(data)))
        assert report == ImportReport(attempts=3, snapshots=4, hints=3, skipped=0, solutions=1, fetches=3)
        assert export_json(store) == data
        assert store.last_passed_source("day01") == (source_sha("x = 2\r\n"), "x = 2\r\n")


def test_importing_the_own_export_changes_nothing(data):
    with new_store() as store:
        fill(store)
        assert import_json(store, data) == ImportReport(attempts=0, snapshots=0, hints=0, skipped=14)
        assert export_json(store) == data


def test_two_machines_have_the_union_whoever_imports_first():
    with new_store() as one, new_store() as two:
        fill(one)
        fill(two, start=2, word="y")
        first, second = export_json(one), export_json(two)
        report = import_json(one, second)
        # The second machine's hint of rung 3 and fetch of day02 are those of the first.
        assert report == ImportReport(attempts=3, snapshots=4, hints=2, skipped=2, solutions=1, fetches=2)
        import_json(two, first)
        assert everything(export_json(one)) == everything(export_json(two))
        assert len(one.attempts()) == 6 and len(one.snapshots()) == 8
        assert [attempt.started for attempt in one.attempts()] == [at(n) for n in (4, 3, 2, 2, 1, 0)]


def test_an_attempt_without_its_snapshot_travels_too(data):
    data["attempts"][0]["snapshot"] = "0" * 64
    with new_store() as store:
        assert import_json(store, data).attempts == 3
        assert {"0" * 64} == {one.snapshot for one in store.attempts()} - set(data["sources"])


def wrong_files():
    yield "a list", lambda data: [], "not an export"
    yield "nothing", lambda data: None, "not an export"
    yield "another file", lambda data: {"name": "x"}, "not an export"
    yield "another format", lambda data: {**data, "format": "other"}, "not an export"
    yield "newer", lambda data: {**data, "version": transfer.VERSION + 1}, "update it"
    yield "version text", lambda data: {**data, "version": "1"}, "version '1'"
    yield "version true", lambda data: {**data, "version": True}, "version True"
    yield "version zero", lambda data: {**data, "version": 0}, "version 0"
    for key in ("version", "sources", "attempts", "snapshots", "hints", "solutions", "fetches"):
        yield f"without {key}", lambda data, key=key: {k: v for k, v in data.items() if k != key}, f"'{key}'"
    for key in ("attempts", "snapshots", "hints", "solutions", "fetches"):
        yield (
            f"{key} a mapping",
            lambda data, key=key: {**data, key: {}},
            f"{key} of the export must be a list",
        )
        yield f"{key} of texts", lambda data, key=key: {**data, key: ["x"]}, rf"{key}\[0\]"
    yield "sources a list", lambda data: {**data, "sources": []}, "sources"
    yield "source a number", lambda data: {**data, "sources": {"0" * 64: 1}}, "must be a text"
    yield (
        "source changed",
        lambda data: {**data, "sources": dict.fromkeys(data["sources"], "y")},
        "not the one",
    )
    yield "source missing", lambda data: {**data, "sources": {}}, r"snapshots\[0\].*missing"


FIELDS = [
    *(("attempts", field) for field in Attempt.__dataclass_fields__),
    *(("snapshots", field) for field in ("sha", "kata", "taken", "reason")),
    *(("hints", field) for field in ("kata", "task", "rung", "taken")),
    *(("solutions", field) for field in ("kata", "seen", "gave_up")),
    *(("fetches", field) for field in ("kata", "fetched")),
]


def refuses(data, match):
    with new_store() as store:
        fill(store, start=10, word="z")
        before = export_json(store)
        with pytest.raises(StoreError, match=match) as error:
            import_json(store, data)
        assert "\n" not in str(error.value) and str(error.value).endswith(".")
        assert export_json(store) == before


@pytest.mark.parametrize(("change", "match"), [pytest.param(c, m, id=name) for name, c, m in wrong_files()])
def test_a_wrong_file_is_one_sentence_and_changes_nothing(data, change, match):
    refuses(change(data), match)


@pytest.mark.parametrize(("section", "field"), FIELDS)
def test_a_missing_key_is_named(data, section, field):
    del data[section][-1][field]
    refuses(data, rf"'{field}' is missing in {section}\[{len(data[section]) - 1}\]")


@pytest.mark.parametrize(("section", "field"), FIELDS)
def test_a_wrong_type_is_named(data, section, field):
    data[section][-1][field] = 1.5 if field != "duration" else "1.5"
    refuses(data, rf"{section}\[{len(data[section]) - 1}\].*({field}|source 1.5)")


def test_an_import_that_fails_late_keeps_nothing(data, monkeypatch):
    with new_store() as store:
        calls = []

        def fails(*_, **__):
            calls.append(store.counts()["attempts"])
            raise StoreError("The disk is full.")

        monkeypatch.setattr(store, "mark_started", fails)
        with pytest.raises(StoreError):
            import_json(store, data)
        assert calls == [3]
        assert store.counts() == dict.fromkeys(store.counts(), 0)


# Any content

texts = st.text(max_size=8)
words = st.text(min_size=1, max_size=8)
katas = st.sampled_from(["day01", "day02", "größe \x00"])
times = st.builds(at, st.integers(0, 3599), st.sampled_from(["", ".5", ".25", ".250", ".000001"]))
mappings = st.dictionaries(texts, texts, max_size=3)
attempts = st.builds(
    Attempt,
    id=st.sampled_from("abcdefgh"),
    kata=katas,
    started=times,
    duration=st.floats(0, 1e9),
    outcome=words,
    tasks=mappings,
    passed=st.booleans(),
    seed=st.integers(-(2**63), 2**64 - 1),
    device=words,
    versions=mappings,
    snapshot=st.none(),
    provenance=mappings,
)
actions = st.lists(
    st.one_of(
        st.tuples(st.just("record"), attempts, st.text()),
        st.tuples(st.just("add_attempt"), attempts),
        st.tuples(st.just("add_snapshot"), katas, st.text(), st.sampled_from(["check", "reset"]), times),
        st.tuples(st.just("take_hint"), katas, words, st.integers(1, 3), times),
        st.tuples(st.just("saw_solution"), katas, st.booleans(), times),
        st.tuples(st.just("mark_started"), katas, times),
    ),
    max_size=12,
)


def do(store, steps):
    for method, *arguments in steps:
        getattr(store, method)(*arguments)


@settings(max_examples=60, deadline=None)
@given(actions)
def test_any_store_survives_the_journey_and_its_own_return(steps):
    with new_store() as store, new_store() as other:
        do(store, steps)
        data = json.loads(json.dumps(export_json(store)))
        import_json(other, data)
        assert everything(export_json(other)) == everything(data)
        for kata in store.progress():
            assert other.hints_taken(kata) == store.hints_taken(kata)
            assert other.is_passed(kata) == store.is_passed(kata)
        report = import_json(store, copy.deepcopy(data))
        total = sum(len(value) for value in data.values() if isinstance(value, list))
        assert report == ImportReport(0, 0, 0, skipped=total)
        assert export_json(store) == data


def renamed(argument):
    """An attempt of the second machine: an id is made once in the world."""
    return replace(argument, id=f"their {argument.id}") if isinstance(argument, Attempt) else argument


@settings(max_examples=40, deadline=None)
@given(actions, actions)
def test_any_two_stores_become_the_same(mine, theirs):
    theirs = [(method, *map(renamed, arguments)) for method, *arguments in theirs]
    with new_store() as one, new_store() as two:
        do(one, mine)
        do(two, theirs)
        first, second = export_json(one), export_json(two)
        import_json(one, second)
        import_json(two, first)
        assert everything(export_json(one)) == everything(export_json(two))
        assert {attempt.id for attempt in one.attempts()} == {
            entry["id"] for entry in first["attempts"] + second["attempts"]
        }
