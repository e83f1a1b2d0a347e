"""A user's function found by its name, and what is said where it is not there."""

from contextlib import nullcontext

import pytest

from coterie import trust
from coterie.errors import UserError
from coterie.recipe import make_recipe
from coterie.rewards.load import load_rewards
from coterie.user_code import load_function


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "rewards.py").write_text("def right(completions):\n    return [1.0] * len(completions)\n")
    (tmp_path / "other.py").write_text("ONE = 1\nTWO = ONE +\n")
    (tmp_path / "late.py").write_text("def helper():\n    return missing\n\nhelper()\n")
    return tmp_path


def refusal(folder, name):
    recipe = make_recipe({"model": "m", "task": {"data": "d"}, "rewards": [name]}, folder=folder)
    with pytest.raises(UserError) as error:
        load_rewards(recipe.rewards)
    return str(error.value)


@pytest.mark.parametrize("restricted", [False, True])
def test_a_misspelt_file_is_not_there_and_the_nearest_is_named(folder, restricted, monkeypatch, tmp_path_factory):
    """Also in the command, from another folder: it is no matter of trust."""
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    with trust.restricted(folder) if restricted else nullcontext():
        said = refusal(folder, "rewrads.py:right")
        assert "trust" not in said
        assert f"the file {folder / 'rewrads.py'} does not exist; did you mean 'rewards.py'?" in said
        assert "there are: late.py, other.py, rewards.py" in refusal(folder, "zzz.py:right")
        assert "no .py file lies in that folder" in refusal(folder, "elsewhere/rewards.py:right")
        assert "names a file and no function of it; write rewards.py:function" in refusal(folder, "rewards.py")
        assert "there is no module 'rewardz_' here; a file beside the recipe is written rewardz_.py:" in refusal(
            folder, "rewardz_:right"
        )


def test_a_misspelt_function_is_named_with_the_nearest(folder):
    assert "did you mean 'right'" in refusal(folder, "rewards.py:rigth")


def test_a_file_that_fails_when_imported_is_told_by_its_line(folder):
    assert "other.py, line 2" in refusal(folder, "other.py:f")
    said = refusal(folder, "late.py:f")
    assert "NameError: name 'missing' is not defined" in said
    assert "late.py, line 2, in helper" in said
    assert callable(load_function(f"{folder / 'rewards.py'}:right", "rewards"))
