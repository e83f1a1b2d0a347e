"""The built-in reward `code`: honest programs are rewarded, cheating ones are not, and a broken sandbox abstains."""

import json
import math
import sqlite3
from concurrent.futures import Future

import pytest
import yaml
from cheating import ADD, CHEATS, FORGE, HONEST

import coterie
from coterie.errors import RewardError, UserError
from coterie.rewards.builtin import make_builtin
from coterie.rewards.code.reward import Code
from coterie.rewards.code.tests import Equality, Test, equal, passes, read_tests
from coterie.sandbox.base import Outcome, Output
from coterie.sandbox.make import make_sandbox

WHOLE = [{"stdin": "1 2\n", "stdout": "3\n"}, {"stdin": "5 -9\n", "stdout": "-4\n"}]


@pytest.fixture(scope="module")
def reward():
    try:
        make_sandbox("auto", num_workers=1).close()
    except UserError as error:
        pytest.skip(str(error))
    made = make_builtin("code", {"function": "add", "seconds": 3, "wall_seconds": 2})
    yield made
    made.close()


def test_honest_programs_are_rewarded(reward):
    assert dict(zip(HONEST, reward(list(HONEST.values()), [ADD] * len(HONEST)), strict=True)) == dict.fromkeys(
        HONEST, 1.0
    )


def test_cheating_programs_are_not_rewarded(reward):
    found = dict(zip(CHEATS, reward(list(CHEATS.values()), [ADD] * len(CHEATS)), strict=True))
    assert found == dict.fromkeys(CHEATS, 0.0)


def test_cheating_whole_programs_are_not_rewarded(reward):
    honest = [
        "print(sum(map(int, input().split())))",
        "import sys\na, b = map(int, sys.stdin.read().split())\nprint(a + b, end='   \\n\\n')",
    ]
    cheats = [
        "print('OK')", "import os\nos._exit(0)", "import sys\nsys.exit(0)", "print(3, -4)", "print('3\\n-4')",
        FORGE + "for i in range(2): channel.say(test=i, error=None, value=3)",
        FORGE + "os.write(1, b'3\\n'); channel.say(test=0)\nos.write(1, b'0\\n'); channel.say(test=1)\n",
    ]  # fmt: skip
    assert reward(honest, [WHOLE] * 2) == [1.0, 1.0]
    scores = reward(cheats, [WHOLE] * len(cheats))
    assert scores[:-1] == [0.0] * (len(cheats) - 1)
    assert scores[-1] == 0.5  # it printed the right answer of one test, and has the points of one


def test_the_score_is_the_share_of_tests_or_all_of_them(reward):
    half = "def add(a, b):\n    return a + b if a < 6 else 0"
    assert reward([half], [ADD]) == [2 / 3]
    whole = Code(function="add", score="all")
    assert whole([half, HONEST["plain"]], [ADD] * 2) == [0.0, 1.0]
    assert "hostile programs held" in whole.sandbox_report
    whole.close()


def test_the_function_may_differ_from_row_to_row(reward):
    source = "def double(x): return 2 * x\nclass Solution:\n    def half(self, x): return x / 2"
    rows = [[{"args": [4], "expected": 8}], [{"args": [4], "expected": 2.0}], WHOLE]
    chat = [{"role": "assistant", "content": source}]
    assert reward([source, chat, "print(3)"], rows, ["double", "Solution.half", None]) == [1.0, 1.0, 0.5]
    assert reward([source], ['[{"args": [4], "expected": 8}]'], ["double"]) == [1.0]


def done(outcome):
    future = Future()
    future.set_result(outcome)
    return future


class Counting:
    """A sandbox in which every program returns 2."""

    report = ""

    def __init__(self):
        self.ran = []

    def submit(self, program):
        self.ran.append((program.source.strip(), program.inputs, program.function))
        return done(Outcome([Output(data="2")] * len(program.inputs)))


def test_equal_programs_run_once_and_each_has_its_own_tests():
    code = Code(function="f")
    code.__dict__["_started"] = box = Counting()
    two, other, three, real = (
        [{"args": [given], "expected": expected}] for given, expected in ((1, 2), (5, 2), (1, 3), (1.0, 2))
    )
    rows = [("a", two), ("b", two), ("a", two), ("a", three), ("a", other), ("a", real)]
    assert code([source for source, _ in rows], [tests for _, tests in rows]) == [1, 1, 1, 0, 1, 1]
    assert box.ran == [("a", [[1]], "f"), ("b", [[1]], "f"), ("a", [[5]], "f"), ("a", [[1.0]], "f")]
    assert [type(inputs[0][0]) for _, inputs, _ in box.ran] == [int, int, int, float]


def test_programs_that_were_begun_run_once_in_a_step():
    code = Code(function="f")
    code.__dict__["_started"] = box = Counting()
    tests = [{"args": [1], "expected": 2}]
    code.begin(["a", "b"], [tests] * 2)
    assert [source for source, *_ in box.ran] == ["a", "b"]
    assert code(["b", "c", "a"], [tests] * 3) == [1, 1, 1]
    assert [source for source, *_ in box.ran] == ["a", "b", "c"]
    assert code(["a"], [tests]) == [1]
    assert [source for source, *_ in box.ran] == ["a", "b", "c", "a"]


def test_a_real_sandbox_begins_and_is_waited_for(reward):
    sources = list(HONEST.values())[:4]
    reward.begin(sources[:2], [ADD] * 2)
    assert reward(sources, [ADD] * 4) == [1.0] * 4
    assert reward.uses_cores
    assert not Code(sandbox="http://127.0.0.1:1").uses_cores


def test_a_sandbox_that_fails_abstains(reward):
    class Broken:
        report = ""

        def submit(self, program):
            fine = Outcome((Output("3"), Output("-4"), Output("17")))
            return done(fine if program.source.strip() == "y" else Outcome(failed="no memory"))

    code = Code(function="add")
    code.__dict__["_started"] = Broken()
    failed, fine = code(["x", "y"], [ADD] * 2)
    assert isinstance(failed, RewardError)
    assert "no memory" in str(failed)
    assert fine == 1.0


@pytest.mark.parametrize("name", ["landlock", "subprocess"])
@pytest.mark.filterwarnings("ignore:sandbox")
def test_a_run_says_and_records_which_sandbox_it_uses(name, tmp_path, capsys):
    try:
        make_sandbox(name, num_workers=1).close()
    except UserError as error:
        pytest.skip(str(error))
    (tmp_path / "data.jsonl").write_text(
        "".join(f'{{"prompt": "{number}", "tests": [{{"args": [], "expected": 1}}]}}\n' for number in range(20))
    )
    recipe = {
        "model": {"type": "qwen3", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16,
                  "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128},
        "task": {"data": str(tmp_path / "data.jsonl"), "prompt": "prompt"}, "steps": 1, "prompts_per_step": 2, "group_size": 2,
        "rewards": [{"function": "code", "options": {"function": "f", "sandbox": name}}], "sampling": {"max_new_tokens": 4},
        "tokenizer": "bytes",
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run = coterie.train(str(tmp_path / "recipe.yaml"), out=str(tmp_path / "run"))
    with sqlite3.connect(run.folder / "run.db") as db:
        ((message,),) = db.execute("SELECT message FROM events WHERE kind = 'sandbox'").fetchall()
    assert message.startswith(f"{name}: ")
    assert ("it holds nothing" if name == "subprocess" else "hostile programs held") in message
    assert f"sandbox {message}" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("options", "says"),
    [({"score": "best"}, "share or all"), ({"seconds": 0}, "seconds"), ({"tolerance": -1}, "tolerance"), ({"workers": -1}, "workers"),
     ({"memory_megabytes": True}, "memory_megabytes"), ({"sandbx": "auto"}, "did you mean 'sandbox'")],
)  # fmt: skip
def test_options_that_cannot_be_are_refused(options, says):
    with pytest.raises(UserError, match=says):
        make_builtin("code", options)


@pytest.mark.parametrize(
    "tests",
    [[], None, "x", [{"args": [1]}], [{"stdin": 1, "stdout": ""}], [*ADD, *WHOLE], [{"args": 1, "expected": 1}]],
)
def test_rows_without_proper_tests_are_refused(tests):
    with pytest.raises(UserError, match="code:"):
        read_tests(tests)


def test_a_row_that_names_no_function_is_refused():
    with pytest.raises(UserError, match="the name of a function"):
        Code()(["x"], [ADD])


@pytest.mark.parametrize(
    ("data", "expected", "right"),
    [
        (1, 1, True), (True, 1, False), (1, True, False), (True, True, True), (1.0, 1, False), (1, 1.0, False), ("1", 1, False),
        (0.1 + 0.2, 0.3, True), (0.31, 0.3, False), (math.nan, 1.0, False), (math.nan, math.nan, True), (math.inf, 1e308, False),
        (None, None, True), (0, None, False), (0, False, False), ("", None, False), ([], None, False),
        ([1, 2], [1, 2], True), ([1, 2], [1, 2, 3], False), ([True], [1], False), ({"tuple": [1]}, [1], True), ({"set": [1]}, [1], False),
        ({"set": [1, 2]}, {2, 1}, True), ({"set": [1, 1]}, {1, 2}, False), ({"set": [True]}, {1}, False),
        ({"dict": [["a", [1]]]}, {"a": [1]}, True), ({"dict": [["a", True]]}, {"a": 1}, False), ({"dict": [[1, 2]]}, {"1": 2}, False),
        ({"dict": [["a", 1], ["a", 1]]}, {"a": 1, "b": 1}, False), ({"dict": [["a"]]}, {"a": 1}, False), ({"dict": 1}, {}, False),
        ({"dict": []}, {}, True), ({"passed": True}, {"passed": True}, False), (10**400, 1.0, False), ({"tuple": [1]}, (1,), True),
        ({"set": [{"tuple": [1, 2]}]}, {(1, 2)}, True),
    ],
)  # fmt: skip
def test_equal_means_equal_in_value_and_type(data, expected, right):
    assert equal(data, expected, Equality()) is right


def test_what_counts_as_equal_can_be_said():
    assert equal(2, 2.0, Equality(ints_are_floats=True))
    assert equal(2.0, 2, Equality(ints_are_floats=True))
    assert not equal(True, 1.0, Equality(ints_are_floats=True))
    assert not equal(10**400, 1.0, Equality(ints_are_floats=True))
    assert equal(2.01, 2.0, Equality(tolerance=0.1))
    assert not equal({"tuple": [1]}, [1], Equality(tuples_are_lists=False))
    assert not equal([1], (1,), Equality(tuples_are_lists=False))
    test = Test("", "a \n\nb\n", whole=True)
    assert passes(Output(text="a\n\nb"), test, Equality())
    assert not passes(Output(text="a\nb"), test, Equality())
    assert not passes(Output(text="a\n\nb"), test, Equality(exact_text=True))
    assert not passes(Output(text="a \n\nb\n", error="exit status 1"), test, Equality())


@pytest.mark.parametrize(
    ("value", "expected", "given", "right"),
    [
        (0.0, 1e-12, [], False), (1e-12, 0.0, [], False), (1.1e-12, 1e-12, [], False), (1e-12 * (1 + 1e-10), 1e-12, [], True),
        (2e-300, 1e-300, [], False), (0.0, 1e-300, [1e6], False), (-0.0, 0.0, [], True), (5.6e-17, 0.0, [], True),
        (1.2e-16, 0.0, [3.14], True), (6e-9, 0.0, [5e4], False), (6e-9, 0.0, [5e4, 1e5], True), (1e12 + 1, 1e12, [], True),
        (math.inf, math.inf, [], True), (-math.inf, math.inf, [], False), (1.0, math.inf, [], False), (math.inf, 1.0, [], False),
    ],
)  # fmt: skip
def test_floats_are_compared_at_their_size_and_0_at_the_test_s(value, expected, given, right):
    output = Output(json.dumps([value]))
    test = Test([given], [expected], whole=False)
    assert passes(output, test, Equality()) is right
