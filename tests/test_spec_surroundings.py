"""What a spec may rely on in a check: the program's fixtures, its own, pytest's, and the order in which they come and go."""

import shutil

import pytest

from checker import request, verdict
from checker.run import Limits
from checker.track import Track

TWICE = "def twice(x, factor):\n    return x * factor\n"
HEAD = "import pytest\nimport torch\n\nfrom checker.testing import assert_equal, assert_that, task\n\n\n"


@pytest.fixture
def checked(toy, warm_worker, tmp_path):
    """check(spec, source, facts) -> the tests of a kata with that spec, by name; `facts` are further lines about its task."""

    def check(spec, source=TWICE, facts=""):
        shutil.copytree(toy.folder.parent, tmp_path / "toy", dirs_exist_ok=True)
        folder = tmp_path / "toy" / "katas" / "day02_chain"
        (folder / "spec.py").write_text(HEAD + spec, encoding="utf-8")
        with (folder / "kata.toml").open("a", encoding="utf-8") as file:
            file.write(facts)
        track = Track.load(tmp_path / "toy" / "katas")
        kata = track.find("2")
        asked = request.check(track, kata, {kata.slug: ("/w/day02_chain.py", source)}, seed=3)
        run = warm_worker.run(asked, Limits(total=20.0, import_=3.0))
        found = verdict.judge(kata, run, seed=3, device="cpu")
        assert found.tasks, found.message
        return {test.id: test for test in found.tasks[0].tests}

    return check


def states(tests):
    return {name: test.state for name, test in tests.items()}


def test_a_test_and_a_fixture_of_the_spec_draw_from_one_generator(checked):
    tests = checked(
        "@pytest.fixture\ndef other(randn, tmp_path):\n    return randn(4), tmp_path\n\n\n"
        '@task("twice")\ndef test_values(other, randn, seed, tmp_path):\n'
        "    both = torch.randn(8, generator=torch.Generator().manual_seed(seed))\n"
        "    assert_equal(other[0], both[:4])\n    assert_equal(randn(4), both[4:])\n"
        '    assert_that(other[1] == tmp_path and tmp_path.is_dir(), "one folder")\n\n\n'
        '@task("twice")\ndef test_generator(generator, seed):\n'
        "    assert_equal(torch.rand(3, generator=generator), torch.rand(3, generator=torch.Generator().manual_seed(seed + 1)))\n"
    )
    assert states(tests) == {"test_values": "passed", "test_generator": "passed"}


def test_each_test_has_a_seed_and_a_folder_of_its_own(checked):
    tests = checked(
        "seen = []\n\n\n"
        '@task("twice")\n@pytest.mark.parametrize("number", [1, 2, 3])\ndef test_it(number, seed, tmp_path):\n'
        "    assert_that(seed not in seen and tmp_path not in seen, 'it is new')\n    seen.extend([seed, tmp_path])\n"
    )
    assert states(tests) == {f"test_it[{number}]": "passed" for number in (1, 2, 3)}


def test_what_the_spec_defines_under_a_name_of_the_program_is_taken(checked):
    tests = checked(
        '@pytest.fixture\ndef data_dir():\n    return "mine"\n\n\n'
        '@task("twice")\ndef test_own(data_dir):\n    assert_equal(data_dir, "mine")\n\n\n'
        '@task("twice")\n@pytest.mark.parametrize("seed", [7])\ndef test_parameter(seed, request):\n'
        '    assert_equal(seed, 7)\n    assert_equal(request.getfixturevalue("data_dir"), "mine")\n\n\n'
        '@task("twice")\n@pytest.mark.parametrize("data_dir", [5], indirect=True)\ndef test_indirect(data_dir):\n'
        '    assert_equal(data_dir, "mine")\n'
    )
    assert states(tests) == {"test_own": "passed", "test_parameter[7]": "passed", "test_indirect[5]": "passed"}


def test_a_fixture_of_the_spec_is_torn_down_before_the_next_test(checked):
    tests = checked(
        "events = []\n\n\n@pytest.fixture\ndef thing():\n    events.append('up')\n    yield len(events)\n    events.append('down')\n\n\n"
        "@pytest.fixture(scope='module')\ndef kept():\n    events.append('kept')\n    return events\n\n\n"
        '@task("twice")\n@pytest.mark.parametrize("number", [1, 2])\ndef test_it(kept, thing, number):\n'
        "    assert_equal(events, ['kept', 'up'] if number == 1 else ['kept', 'up', 'down', 'up'])\n"
    )
    assert states(tests) == {"test_it[1]": "passed", "test_it[2]": "passed"}


def test_a_fixture_that_fails_on_the_way_down_fails_its_test_alone(checked):
    tests = checked(
        "@pytest.fixture\ndef checking(solution):\n    yield\n    assert_equal(solution.twice(1, 2), 4)\n\n\n"
        '@task("twice")\ndef test_first(checking):\n    pass\n\n\n'
        '@task("twice")\ndef test_second():\n    pass\n'
    )
    assert states(tests) == {"test_first": "mismatch", "test_second": "passed"}
    assert "twice" in dict(tests["test_first"].failure["lines"])["called"]


def test_a_plain_assert_is_explained(checked):
    tests = checked('@task("twice")\ndef test_it(solution):\n    assert solution.twice(3, 2) == 7\n')
    assert tests["test_it"].failure["message"].startswith("assert 6 == 7")


def test_the_limit_is_for_the_test_and_not_for_its_fixtures(checked):
    tests = checked(
        "import time\n\n\n@pytest.fixture\ndef slow():\n    time.sleep(1.2)\n\n\n"
        '@task("twice")\ndef test_slow_fixture(slow):\n    pass\n\n\n'
        '@task("twice")\ndef test_slow(solution):\n    solution.twice(1, 2)\n\n\n'
        '@task("twice")\ndef test_quick():\n    pass\n',
        "import time\n\n\ndef twice(x, factor):\n    time.sleep(60)\n",
        "time_limit = 1\n",
    )
    assert states(tests) == {"test_slow_fixture": "passed", "test_slow": "timeout", "test_quick": "passed"}


def test_nothing_that_was_caught_is_told_again_for_the_next_test(checked):
    """What a ban catches belongs to its test, also where the next one fails before its body."""
    spec = (
        "@pytest.fixture\ndef broken(solution):\n    assert_equal(1, 2)\n\n\n"
        '@task("twice")\ndef test_first(solution):\n    solution.twice(torch.ones(2), 2)\n\n\n'
        '@task("twice")\ndef test_second(broken):\n    pass\n'
    )
    source = "import torch\n\n\ndef twice(x, factor):\n    return torch.mul(x, factor)\n"
    tests = checked(spec, source, 'forbidden = ["torch.mul"]\n')
    assert states(tests) == {"test_first": "forbidden", "test_second": "mismatch"}


def test_plain_fixtures_of_the_spec_are_made_once_per_test_and_in_pytests_order(checked):
    tests = checked(
        "made = []\n\n\n@pytest.fixture(autouse=True)\ndef first():\n    made.append('first')\n\n\n"
        "@pytest.fixture\ndef base(randn):\n    made.append('base')\n    return randn(3)\n\n\n"
        "@pytest.fixture\ndef left(base, number):\n    return base, number\n\n\n@pytest.fixture\ndef right(base):\n    return base\n\n\n"
        '@task("twice")\n@pytest.mark.parametrize("number", [1, 2])\ndef test_it(right, left, number):\n'
        "    assert_that(left[0] is right, 'one value for a test')\n    assert_equal(left[1], number)\n"
        "    assert_equal(made, ['first', 'base'] * number)\n\n\n"
        '@task("twice")\ndef test_with_pytest(right, request):\n'
        "    assert_that(request.getfixturevalue('base') is right, 'pytest makes them all, or none')\n\n\n"
        "@pytest.fixture\ndef broken():\n    raise ValueError('no thing')\n\n\n"
        '@task("twice")\ndef test_broken(broken):\n    pass\n'
    )
    assert states(tests) == {
        "test_it[1]": "passed",
        "test_it[2]": "passed",
        "test_with_pytest": "passed",
        "test_broken": "error",
    }
    assert "no thing" in str(tests["test_broken"].failure)
