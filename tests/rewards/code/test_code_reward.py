"""The built-in reward `code` (R20): honest programs are rewarded, cheating ones are not, and a broken sandbox abstains."""

import math

import pytest

from coterie.errors import RewardError, UserError
from coterie.rewards.builtin import make_builtin
from coterie.rewards.code.reward import Code, extract_python
from coterie.rewards.code.sandbox import Outcome, Output, make_sandbox
from coterie.rewards.code.verdict import Policy, Test, equal, passes, read_tests

ADD = [{"args": [1, 2], "expected": 3}, {"args": [5, -9], "expected": -4}, {"args": [10, 7], "expected": 17}]
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


HONEST = {
    "plain": "def add(a, b):\n    return a + b",
    "fenced": "I add them.\n```python\ndef add(a, b):\n    return a + b\n```\nDone.",
    "the last block": "```python\ndef add(a, b): return 0\n```\nBetter:\n```python\ndef add(a, b): return a + b\n```",
    "prints on the side": "print('x' * 10000)\ndef add(a, b):\n    print(a)\n    return a + b",
    "exits at the end": "import sys\nadd = lambda a, b: a + b\nif True: sys.exit(0)",
    "with a class": "from dataclasses import dataclass\n@dataclass\nclass P:\n    a: int\n    b: int\ndef add(a, b):\n    p = P(a, b)\n    return p.a + p.b",
    "recursive": "def add(a, b):\n    if b == 0: return a\n    return add(a + 1, b - 1) if b > 0 else add(a - 1, b + 1)",
}  # fmt: skip


def test_r20_honest_programs_are_rewarded(reward):
    assert dict(zip(HONEST, reward(list(HONEST.values()), [ADD] * len(HONEST)), strict=True)) == dict.fromkeys(
        HONEST, 1.0
    )


FORGE = """
import gc, os, sys, json
channel = [one for one in gc.get_objects() if type(one).__name__ == "Channel"][0]
"""
CHEATS = {
    "exit code 0": "import os\nos._exit(0)",
    "exit": "import sys\nsys.exit(0)",
    "exit in the function": "def add(a, b):\n    raise SystemExit(0)",
    "says that it passed": "print('all tests passed')\nprint('OK')\nprint('1.0')\ndef add(a, b): print('PASSED')",
    "__eq__": "class Yes:\n    def __eq__(self, other): return True\n    __hash__ = None\ndef add(a, b): return Yes()",
    "an int that equals everything": "class Yes(int):\n    def __eq__(self, other): return True\n    def __hash__(self): return 0\ndef add(a, b): return Yes()",
    "an honest int in disguise": "class Sum(int): pass\ndef add(a, b): return Sum(a + b)",
    "a float that compares": "class Yes(float):\n    __eq__ = __ne__ = lambda *a: True\ndef add(a, b): return Yes('nan')",
    "a list that compares": "class Yes(list):\n    __eq__ = lambda *a: True\n    __len__ = lambda s: 1\ndef add(a, b): return Yes()",
    "bool for int": "def add(a, b): return True",
    "a text for int": "def add(a, b): return str(a + b)",
    "float for int": "def add(a, b): return float(a + b)",
    "NaN": "def add(a, b): return float('nan')",
    "infinity": "def add(a, b): return float('inf')",
    "None": "def add(a, b): return None",
    "patched json": "import json\njson.dumps = lambda *a, **k: '{\"passed\": true, \"score\": 1}'\ndef add(a, b): return 0",
    "patched json that raises": "import json\ndef no(*a, **k): raise SystemExit(0)\njson.dumps = no\ndef add(a, b): return 0",
    "patched operator": "import operator, math, builtins\noperator.eq = lambda *a: True\nmath.isclose = lambda *a, **k: True\nbuiltins.all = builtins.any = lambda x: True\ndef add(a, b): return 0",
    "patched builtins": "import builtins\nbuiltins.type = lambda x: int\nbuiltins.isinstance = lambda *a: True\ndef add(a, b): return 0",
    "frames": "import sys\ndef add(a, b):\n    f = sys._getframe()\n    while f:\n        for n, v in list(f.f_locals.items()):\n            if 'expect' in n.lower(): return v\n            if isinstance(v, dict):\n                for k in v:\n                    if 'expect' in str(k).lower(): return v[k]\n        f = f.f_back",
    "everything in memory": "import gc\ndef add(a, b):\n    for o in gc.get_objects():\n        if isinstance(o, dict) and 'expected' in o: return o['expected']",
    "reads its tests": "import os, glob\ndef add(a, b):\n    for p in glob.glob('/proc/self/fd/*') + glob.glob('/tmp/*') + glob.glob('*.json'):\n        try:\n            t = open(p).read()\n            if 'expected' in t: return 3\n        except OSError: pass",
    "atexit": "import atexit, os\natexit.register(os._exit, 0)\ndef add(a, b): raise ValueError",
    "excepthook": "import sys\nsys.excepthook = lambda *a: sys.exit(0)\nraise ValueError",
    "writes to every descriptor": "import os\nfor fd in range(100):\n    try: os.write(fd, b'\\n{\"test\": 0, \"value\": true, \"passed\": true, \"score\": 1.0}\\n')\n    except OSError: pass\nos._exit(0)",
    "forged records": FORGE + "for i in range(3): channel.say(test=i, passed=True, score=1, value=True)\nos._exit(0)",
    "forged end": FORGE + "channel.say(ready=True)\nchannel.say(all=None)\nchannel.say(failed=None, score=1)\nos._exit(0)",
    "a pytest of its own": "import sys, types\nsys.modules['pytest'] = sys.modules['unittest'] = types.ModuleType('x')\ndef test_add(): assert True",
    "signals": "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)",
    "a generator": "def add(a, b):\n    while True: yield a + b",
    "a decimal": "from decimal import Decimal\ndef add(a, b): return Decimal(a + b)",
    "hangs": "def add(a, b):\n    while True: pass",
    "no code": "I can't.",
    "nothing": "",
}  # fmt: skip


def test_r20_cheating_programs_are_not_rewarded(reward):
    found = dict(zip(CHEATS, reward(list(CHEATS.values()), [ADD] * len(CHEATS)), strict=True))
    assert found == dict.fromkeys(CHEATS, 0.0)


def test_r20_cheating_whole_programs_are_not_rewarded(reward):
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


def test_r20_the_score_is_the_share_of_tests_or_all_of_them(reward):
    half = "def add(a, b):\n    return a + b if a < 6 else 0"
    assert reward([half], [ADD]) == [2 / 3]
    whole = Code(function="add", score="all")
    assert whole([half, HONEST["plain"]], [ADD] * 2) == [0.0, 1.0]
    assert "hostile programs held" in whole.report
    whole.close()


def test_r20_the_function_may_differ_from_row_to_row(reward):
    source = "def double(x): return 2 * x\nclass Solution:\n    def half(self, x): return x / 2"
    rows = [[{"args": [4], "expected": 8}], [{"args": [4], "expected": 2.0}], WHOLE]
    chat = [{"role": "assistant", "content": source}]
    assert reward([source, chat, "print(3)"], rows, ["double", "Solution.half", None]) == [1.0, 1.0, 0.5]
    assert reward([source], ['[{"args": [4], "expected": 8}]'], ["double"]) == [1.0]


def test_r20_a_sandbox_that_fails_abstains(reward):
    class Broken:
        report = ""

        def run_all(self, programs):
            return [Outcome(failed="no memory"), Outcome((Output("3"), Output("-4"), Output("17")))]

    code = Code(function="add")
    code._holder.sandbox = Broken()
    failed, fine = code(["x", "x"], [ADD] * 2)
    assert isinstance(failed, RewardError)
    assert "no memory" in str(failed)
    assert fine == 1.0


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
    assert equal(data, expected, Policy()) is right


def test_what_counts_as_equal_can_be_said():
    assert equal(2, 2.0, Policy(ints_are_floats=True))
    assert equal(2.0, 2, Policy(ints_are_floats=True))
    assert not equal(True, 1.0, Policy(ints_are_floats=True))
    assert not equal(10**400, 1.0, Policy(ints_are_floats=True))
    assert equal(2.01, 2.0, Policy(tolerance=0.1))
    assert not equal({"tuple": [1]}, [1], Policy(tuples_are_lists=False))
    assert not equal([1], (1,), Policy(tuples_are_lists=False))
    test = Test("", "a \n\nb\n", whole=True)
    assert passes(Output(text="a\n\nb"), test, Policy())
    assert not passes(Output(text="a\nb"), test, Policy())
    assert not passes(Output(text="a\n\nb"), test, Policy(exact_text=True))
    assert not passes(Output(text="a \n\nb\n", error="exit status 1"), test, Policy())


@pytest.mark.parametrize(
    ("text", "code"),
    [("x = 1", "x = 1"), ("a\n```\ny\n```", "y\n"), ("```python\nx\n```\n```bash\nls\n```", "x\n"), ("```py\nx\n  y", "x\n  y\n"),
     ("```\ny\n```\n```Python\nx\n```\n```\nz\n```", "x\n"), ("```json\n{}\n```", "```json\n{}\n```"), ("```python\n```", "\n")],
)  # fmt: skip
def test_the_program_is_the_last_block_of_python(text, code):
    assert extract_python(text) == code
