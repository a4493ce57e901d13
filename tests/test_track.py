"""Tracks and their mistakes: each message names file, key and line."""

import shutil

import pytest

from checker.errors import TrackError, UserError
from checker.track import Track


@pytest.fixture
def copy(tmp_path, toy):
    shutil.copytree(toy.folder.parent, tmp_path / "toy")
    return tmp_path / "toy" / "katas"


def test_a_day_is_found_by_number_name_and_part(toy):
    for word in ("1", "01", "day1", "day01", "day01_scale", "scale", "day01_scale.py", "SCALE"):
        assert toy.find(word).slug == "day01_scale"
    assert toy.after("day01_scale") == "day02_chain" and toy.after("day02_chain") is None
    assert toy.phase_of("day02_chain").title == "Beginnings"


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("scael", "did you mean scale?"),
        ("7", "days 1 to 2"),
        ("day", "day01_scale, day02_chain"),
        ("", "Say which day"),
    ],
)
def test_an_unknown_day_gets_the_nearest_name(toy, word, says):
    with pytest.raises(UserError, match=r".") as error:
        toy.find(word)
    assert says in str(error.value) and error.value.exit_code == 2


def test_a_folder_without_a_track_says_so(tmp_path):
    with pytest.raises(TrackError, match="has no track.toml"):
        Track.load(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('minutes = 10\n', 'minutes = 10\nminuets = 3\n', "line 4: the key 'minuets' is unknown"),
        ('title = "Scaling"\n', "", "the key 'title' is missing"),
        ('level = "core"', 'level = "hard"', "'level' is 'hard'; use one of core, more, stretch"),
        ("minutes = 10", 'minutes = "ten"', "line 3: 'minutes' must be int"),
        ('devices = ["cpu", "cuda"]', 'devices = ["gpu"]', "'devices' has 'gpu'"),
        ('devices = ["cpu", "cuda"]', "devices = [", "not valid TOML"),
        ('summary = "multiply by a number"', 'summry = "x"', "in [[task]] scale, the key 'summary' is missing"),
        ('name = "halve"', 'name = "halve"\nnames = ["scale"]', "belongs to two tasks"),
    ],
)  # fmt: skip
def test_a_mistake_in_kata_toml_is_named_with_file_key_and_line(copy, old, new, says):
    file = copy / "day01_scale" / "kata.toml"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    with pytest.raises(TrackError) as error:
        Track.load(copy).find("1")
    assert says in str(error.value) and "kata.toml" in str(error.value)


def test_a_kata_that_is_listed_but_not_there(copy):
    shutil.rmtree(copy / "day02_chain")
    with pytest.raises(TrackError, match=r"day02_chain/kata.toml is missing"):
        Track.load(copy).find("2")


def test_a_kata_listed_twice_or_misnamed(copy):
    file = copy / "track.toml"
    text = file.read_text()
    file.write_text(text.replace('"day02_chain"', '"day01_scale"'))
    with pytest.raises(TrackError, match="lists day01_scale twice"):
        Track.load(copy)
    file.write_text(text.replace('"day02_chain"', '"chain"'))
    with pytest.raises(TrackError, match="named like day16"):
        Track.load(copy)


def test_an_id_is_known_without_parsing_the_kata(copy, toy):
    file = copy / "day02_chain" / "kata.toml"
    text = file.read_text()
    file.write_text(text + "\nthis is no TOML\n")
    assert Track.load(copy).id_of("day02_chain") == toy.kata("day02_chain").id
    first, _, rest = text.partition("\n")
    file.write_text(f"# a comment first\n{first}\n{rest}")
    assert Track.load(copy).id_of("day02_chain") == toy.kata("day02_chain").id
    file.write_text(rest)
    with pytest.raises(TrackError, match="the key 'id' is missing"):
        Track.load(copy).id_of("day02_chain")
