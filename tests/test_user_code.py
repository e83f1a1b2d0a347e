"""A user's file is a module that other processes can import, and hides nothing else."""

import multiprocessing
import subprocess
import sys

import pytest

from coterie.user_code import load_function

FILE = """
import multiprocessing
import {helper}

def one(text):
    return {helper}.size(text)

def sizes(completions, **columns):
    with multiprocessing.get_context("{kind}").Pool(2) as pool:
        return pool.map(one, completions)
"""


@pytest.mark.parametrize("kind", [kind for kind in multiprocessing.get_all_start_methods() if kind != "fork"])
def test_the_processes_of_a_pool_import_it(tmp_path, kind):
    (tmp_path / "my_rewards.py").write_text(FILE.format(helper="my_helper", kind=kind))
    (tmp_path / "my_helper.py").write_text("def size(text):\n    return float(len(text))\n")
    code = f"""
from coterie.user_code import load_function
if __name__ == "__main__":
    print(load_function("{tmp_path}/my_rewards.py:sizes", "rewards")(completions=["a", "bcd"]))
"""
    (tmp_path / "main").write_text(code)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "main")], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "[1.0, 3.0]\n", done.stderr


def test_a_file_called_like_a_package_hides_nothing(tmp_path):
    import json

    (tmp_path / "json.py").write_text("def f(completions):\n    return [1.0]\n")
    assert load_function(f"{tmp_path}/json.py:f", "rewards")(["x"]) == [1.0]
    assert sys.modules["json"] is json
    (tmp_path / "wave.py").write_text("def g(completions):\n    return [2.0]\n")  # not imported yet
    assert load_function(f"{tmp_path}/wave.py:g", "rewards")(["x"]) == [2.0]
    import wave

    assert not hasattr(wave, "g")


def test_two_files_of_one_name_are_two(tmp_path):
    functions = []
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "of_one_name.py").write_text(f"def f(completions):\n    return [{number}.0]\n")
        functions.append(load_function(f"{tmp_path}/{number}/of_one_name.py:f", "rewards"))
    assert [function(["x"]) for function in functions] == [[1.0], [2.0]]


def test_a_file_that_has_changed_is_read_again(tmp_path):
    for value in (1.0, 2.0):
        (tmp_path / "changing.py").write_text(f"def f(completions):\n    return [{value}]  # {'x' * int(value)}\n")
        assert load_function(f"{tmp_path}/changing.py:f", "rewards")(["x"]) == [value]
