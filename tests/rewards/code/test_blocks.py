"""Which of a completion's code is run."""

import time

import pytest

from coterie.rewards.code.blocks import program_in
from coterie.rewards.code.reward import Code


def fenced(*blocks, language="python"):
    return "\n".join(f"Text.\n```{language}\n{block}\n```" for block in blocks) + "\nMore text."


SOLVE = "def solve(n):\n    return n + 1"


@pytest.mark.parametrize(
    ("text", "code"),
    [("x = 1", "x = 1"), ("a\n```\ny\n```", "y\n"), ("```python\nx\n```\n```bash\nls\n```", "x\n"), ("```py\nx\n  y", "x\n  y\n"),
     ("```\ny\n```\n```Python\nx\n```\n```\nz\n```", "x\n"), ("```json\n{}\n```", "```json\n{}\n```"), ("```python\n```", "\n"),
     ("~~~python\nx\n```\n~~~", "x\n```\n"), ("````python\ns = '''\n```\n'''\n````", "s = '''\n```\n'''\n")],
)  # fmt: skip
def test_the_program_is_the_last_block_of_python(text, code):
    assert program_in(text, None) == code


@pytest.mark.parametrize(
    "later", ["print(solve(3))", "assert solve(1) == 2", "# solve(3) is 4", "solve(3)\n# -> 4", "x = [solve]"]
)
def test_an_example_after_the_function_changes_nothing(later):
    assert program_in(fenced(SOLVE, later), "solve") == SOLVE + "\n"


def test_the_last_definition_counts_also_where_it_is_broken():
    better, broken = SOLVE.replace("1", "2"), "def solve(n)\n    return 1"
    assert program_in(fenced(SOLVE, better, "solve(3)"), "solve") == better + "\n"
    assert program_in(fenced(SOLVE, broken), "solve") == broken + "\n"
    assert program_in(fenced(SOLVE, "solve = lambda n: n"), "solve") == "solve = lambda n: n\n"
    assert program_in(fenced("class Solution:\n    def f(self): pass", "Solution().f()"), "Solution.f").startswith(
        "class"
    )
    assert program_in(fenced(SOLVE, "def solver(n):\n    pass"), "solve") == SOLVE + "\n"
    assert program_in(fenced("def other(n):\n    pass", "x"), "solve") == "x\n"


@pytest.mark.parametrize("indent", ["  ", "   ", "     ", "\t"])
def test_a_block_in_a_list_is_read_without_the_lists_indent(indent):
    steps = "1. Write it:\n" + fenced(SOLVE + "\n\n# end") + "\n2. Try it:\n" + fenced("print(solve(3))")
    listed = "\n".join(line if line[:2] in ("1.", "2.") else indent + line for line in steps.split("\n"))
    assert program_in(listed, "solve") == SOLVE + "\n\n# end\n"


def test_a_fence_inside_a_programs_text_does_not_end_it():
    code = 'def solve(n):\n    """\n    ```\n    solve(1)\n    ```\n    """\n    return n + 1'
    assert program_in(fenced(code), "solve") == code + "\n"


def test_a_lone_definition_below_an_if_or_a_try_is_found():
    below = "try:\n    from fast import solve\nexcept ImportError:\n    def solve(n):\n        return n + 1"
    assert program_in(fenced(below, "print(solve(3))"), "solve") == below + "\n"
    assert program_in(fenced(SOLVE, "class A:\n    def solve(self): pass"), "solve") == SOLVE + "\n"


def test_what_a_block_needs_stands_before_it():
    helper, imports, unused = (
        "def half(n):\n    return floor(n / 2)",
        "from math import floor, \\\n    sqrt",
        "def unused():\n    1 / 0",
    )
    main = "def solve(n):\n    return half(n) % MOD"
    program = program_in(fenced(imports, "MOD = 10**9 + 7", unused, helper, main, "print(solve(4))"), "solve")
    assert program == f"{imports}\nMOD = 10**9 + 7\n{helper}\n{main}\n"


def test_a_whole_program_is_the_last_one_that_reads_its_input():
    main = "n = int(input())\nprint(solve(n))"
    assert program_in(fenced(SOLVE, main, "print(solve(3))"), None, reads=True) == f"{SOLVE}\n{main}\n"
    assert program_in(fenced("print(1)", "print(2)"), None, reads=True) == "print(2)\n"
    assert program_in(fenced("print(input())", "print(2)"), None) == "print(2)\n"
    stdin = "import sys\nprint(sys.stdin.read())"
    assert program_in(fenced(stdin, "5", language=""), None, reads=True) == stdin + "\n"


def test_a_plain_block_s_function_is_found_beside_its_uses():
    text = f"{fenced(SOLVE, language='')}\n{fenced('print(solve(3))')}"
    assert program_in(text, "solve") == SOLVE + "\n"


def test_a_right_function_before_an_example_gets_its_reward():
    with_main = "if __name__ == '__main__':\n    print(solve(int(input())))"
    texts = [
        fenced(SOLVE, "print(solve(3))"),
        fenced("print(solve(3))"),
        fenced("from math import inf\n" + SOLVE, with_main),
    ]
    code = Code(function="solve", workers=1)
    try:
        assert code(texts, [[{"args": [1], "expected": 2}]] * 3) == [1.0, 0.0, 1.0]
        echo = "import sys\ndata = sys.stdin.read()\nprint(data.upper())"
        assert code([fenced(echo, "print('hello'.upper())")], [[{"stdin": "a", "stdout": "A\n"}]]) == [1.0]
    finally:
        code.close()


@pytest.mark.timed
@pytest.mark.parametrize(
    "piece", ["```python\n", "import ", "A:", "```\n~~~\n", "def f", "x=\n", "from a import b,\n  "]
)
def test_hostile_texts_take_no_time(piece):
    began = time.monotonic()
    program_in("```python\n" + piece * (200_000 // len(piece)), "f", reads=True)
    assert time.monotonic() - began < 3
