"""Worked solutions in words and arithmetic: every claim is checked, and every number has to come from somewhere."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.errors import RewardError, UserError
from coterie.rewards.maths.claims import claims_of
from coterie.rewards.maths.expressions import is_idle, number_of, one_step, read
from coterie.rewards.maths.linear import check
from coterie.rewards.maths.solutions import Steps, check_arithmetic, final_number, stated_numbers
from coterie.tasks.equations import EXERCISES


def points(prompt, answer, text, **options):
    (got,) = Steps(**options)([prompt], [text], answer=[answer])
    return round(got * 9, 9)


CHAIN = ("Work out 3 * (4 + 5).", 27)
APPLES = ("Tom has 3 apples and buys 4 bags of 6. He gives half of all away. How many are left?", "13.5")


@pytest.mark.parametrize(
    ("task", "text", "wanted"),
    [
        (CHAIN, "27", 6),
        (CHAIN, "The answer is 27.", 6),
        (CHAIN, "3 * (4 + 5) = 27", 8),
        (CHAIN, "3 * (4 + 5) = 3 * 9 = 27", 9),
        (CHAIN, "3(4 + 5) is 3 times the sum.\n4 + 5 = 9\n3 * 9 = 27", 9),
        (CHAIN, "3 * (4 + 5) = 3 * 4 + 3 * 5 = 12 + 15 = 27", 9),
        (CHAIN, "4 + 5 = 9\n27", 8),
        (CHAIN, "3 * (4 + 5) = 3 * 8 = 27", 6),
        (CHAIN, "3 * (4 + 5) = 3 * 9 = 28", 0),
        (CHAIN, "3 * (4 + 5) = 3 * 9 = 27\nSo 26.", 0),
        (CHAIN, "20 + 7 = 27", 6),
        (CHAIN, "27 = 27", 6),
        (CHAIN, "27 + 0 = 27", 6),
        (CHAIN, "27 * 1 = 27", 6),
        (CHAIN, "3 + 4 = 7\n20 + 7 = 27", 6),  # 20 comes from nowhere, and 7 leads nowhere
        (CHAIN, "4 * 4 = 16\n27", 6),  # true, and no way to 27
        (CHAIN, "3 + 5 = 8\n3 + 8 = 11\n27", 6),
        (CHAIN, "５ + ４ = ９\n３ × ９ = ２７\n27", 9),
        (CHAIN, "", 0),
        (("12 / 4 + 1", 4), "12 / 4 + 1 = 3 + 1 = 4", 9),
        (("12 / 4 + 1", 4), "12 ÷ 4 + 1 = 4", 8),
        (("1/2 + 1/3", "5/6"), "1/2 + 1/3 = 3/6 + 2/6 = 5/6", 9),
        (APPLES, "He buys 4 * 6 = 24 apples.\nHe has 3 + 24 = 27.\nHe keeps 27 / 2 = 13.5 apples.", 9),
        (APPLES, "He buys 4 x 6 = 24 apples. He has 3 + 24 = 27 apples. 27 / 2 = 13.5\n#### 13.5", 9),
        (APPLES, "(3 + 4 * 6) / 2 = 13.5", 8),
        (APPLES, "4 * 6 = 24\n3 + 24 = 28\n27 / 2 = 13.5", 6),
        (APPLES, "He keeps 13.5 apples.", 6),
        (("小明有3个苹果，又买了4个，一共有几个？", 7), "小明一共有3 + 4 = 7个苹果。", 9),
        (("每盒12支，三盒共多少支？", 36), "三盒共：12 × 3 = 36（支）\n答案：36", 9),
        (("What is 20% of 50?", 10), "20% of 50 = 10", 9),
        (("A pen costs $5. What do 3 pens cost?", "$15"), "3 × $5 = $15", 9),
        (("10 / 3, rounded to cents", "3.33"), "10 / 3 ≈ 3.33", 9),
        (("10 / 3, rounded to cents", "3.34"), "10 / 3 ≈ 3.34", 6),
    ],
)
def test_points_of_arithmetic(task, text, wanted):
    assert points(*task, text) == wanted


def test_complete_beats_terse_beats_lucky_beats_wrong():
    texts = ["3 * (4 + 5) = 3 * 9 = 27", "3 * (4 + 5) = 27", "27", "3 * (4 + 5) = 3 * 9 = 26"]
    got = [points(*CHAIN, text) for text in texts]
    assert got == [9, 8, 6, 0]
    assert [points(*CHAIN, text, guess=0, terse=3) for text in texts] == [9, 3, 0, 0]


def test_the_parts_are_visible():
    texts = ["3 * (4 + 5) = 3 * 9 = 27", "3 * (4 + 5) = 27", "27", "4 + 5 = 8\n27", "3 * (4 + 5) = 3 * 9 = 27\n28"]
    parts = {
        part: Steps(part=part)(["3 * (4 + 5)"] * 5, texts, answer=[27] * 5) for part in ("right", "follows", "complete")
    }
    assert parts == {"right": [1, 1, 1, 1, 0], "follows": [1, 1, None, 0, 1], "complete": [1, 0, 0, 0, 0]}


def test_linear_equations_keep_the_points_of_the_bundled_task():
    """All qualities of all its exercises, in both languages."""
    for exercise in EXERCISES[::7]:
        for language in ("en", "zh"):
            texts = [
                exercise.solution_text(language, quality, exercise.solution)
                for quality in ("guess", "terse", "complete")
            ]
            got = Steps()([""] * 3, texts, equation=[exercise.equation] * 3)
            assert [round(9 * value, 9) for value in got] == [6, 8, 9]
            wrong = exercise.solution_text(language, "guess", exercise.solution + 1)
            assert Steps()([""], [wrong], equation=[exercise.equation]) == [0]
            assert check(exercise.equation, texts[2]).complete


def test_rows_may_have_an_equation_or_an_answer():
    assert Steps()(["", "3 + 4"], ["x = 5", "3 + 4 = 7"], answer=[None, 7], equation=["3x - 5 = 10", None]) == [
        6 / 9,
        1,
    ]


def test_no_answer_is_refused_and_an_unreadable_one_is_a_failure():
    with pytest.raises(UserError, match="answer"):
        Steps()(["a"], ["b"])
    got = Steps()(["", "", ""], ["", "", ""], answer=["blue", None, True])
    assert all(isinstance(one, RewardError) for one in got)
    assert isinstance(Steps()([""], [""], equation=["2(x + 1) = 4"])[0], RewardError)


@pytest.mark.parametrize(
    ("line", "holds"),
    [
        ("Tom has 3 + 4 = 7 apples", [True]),
        ("3 * (4 + 5) = 3 * 9 = 27", [True, True]),
        ("3 * 9 = 27 = 28", [True, False]),
        ("3 + 4 = 8", [False]),
        ("- 3 + 4 = 7", [True]),
        ("1. 3 + 4 = 7", [True]),
        ("-3 + 4 = 1", [True]),
        ("3 apples + 4 apples = 7 apples", [True]),
        ("3 + 4 = 7, and 7 * 2 = 14", [True, True]),
        ("5*2=<<5*2=10>>10", [True]),
        ("\\frac{1}{2} + \\frac{1}{2} = 1", [True]),
        ("$3 \\times 4 = 12$", [True]),
        ("1,200 / 4 = 300", [True]),
        ("2^3 = 8", [True]),
        ("5 / 0 = 3", [False]),
        ("0^0 = 1", [True]),
        ("9^9^9^9 = 3", [False]),
        ("9^99999 = 3", [False]),
        ("10 / 3 = 3.33", [False]),
        ("10 / 3 ≈ 3.33", [True]),
        ("10 / 3 ≈ 3.3333", [True]),
        ("10 / 3 ≈ 3.4", [False]),
        ("2(3 + 4) = 14", [True]),
        ("(1 + 2)(3 + 4) = 21", [True]),
        ("**3 + 4 = 7**", [True]),
        ("2 ** 3 = 8", [True]),
        ("(a) 3 + 4 = 8", [False]),
        ("一共：15+20=35元，还剩：100-35=64元", [True, False]),
        ("12 / 60 = $<<12/60=0.2>>0.2 a minute", [True]),
        ("36 / 5 = 7 remainder 1", []),
        ("36 ÷ 5 = 7……1", []),
        ("√16 = 4", []),
        ("10 % 3 = 1", []),
        ("Step 2: 3 + 4 = 7", [True]),
        ("12:30 + 2 = 14:30", []),
        ("The ratio is 3:4 = 0.75", []),
        ("1 + 2 + ... + 10 = 55", []),
        ("x = 5", []),
        ("3x = 15", []),
        ("x + 3 = 7", []),
        ("12 = 3 * y", []),
        ("speed * 3 = 15", []),
        ("2 hours = 120 minutes", []),
        ("3 + 4 == 7", []),
        ("3 + 4 >= 8", []),
        ("3 + 4 is 8", []),
        ("(" * 30 + "3" + ")" * 30 + " = 3", [False]),
        ("1" * 20 + " = 3", [False]),
        ("3 + 4 = 7" + " " * 1000, [False]),
    ],
)
def test_what_a_line_claims(line, holds):
    assert [claim.holds for claim in claims_of(line)] == holds


@given(st.recursive(st.integers(0, 99).map(str), lambda inner: st.tuples(inner, st.sampled_from("+-*"), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})"), max_leaves=12))  # fmt: skip
def test_expressions_have_the_value_that_python_gives_them(text):
    node = read(text)
    assert node is not None
    assert node.value == eval(text)


@given(st.text("0123456789+-*/^()%., x", max_size=40))
def test_any_string_is_read_or_refused(text):
    node = read(text)
    assert node is None or isinstance(node.value, Fraction)


def test_what_one_operation_makes():
    assert one_step(read("3 * (4 + 5)")) == {9}
    assert one_step(read("1 + 2 + 4")) == {3, 6, 7}
    assert one_step(read("12 / 4 + 1")) == {3}
    assert one_step(read("3/4 + 3/4")) == {Fraction(3, 4), Fraction(3, 2)}
    assert is_idle(read("5 + 0"))
    assert is_idle(read("2 + 5 * 1"))
    assert not is_idle(read("1 + 5"))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("27", 27),
        ("x\n\\boxed{27}", 27),
        ("The answer is 27.", 27),
        ("答案：27。", 27),
        ("#### 1,200", 1200),
        ("So he has 27 apples.", 27),
        ("The answer is 27 after 3 days", 27),
        ("7 - 3 = 4", 4),
        ("It is -4", -4),
        ("a = 3/4", Fraction(3, 4)),
        ("$13.50", Fraction(27, 2)),
        ("27\nI am sure", None),
        ("", None),
    ],
)
def test_the_last_line_answers(text, wanted):
    assert final_number(text) == wanted


def test_numbers_of_a_problem_stand_in_digits_or_words():
    assert set(stated_numbers("Tom has 3 apples, twelve pears and 1,200 nuts; 小红有五个")) == {3, 12, 1200, 5}
    assert number_of("1,200") == 1200
    assert number_of("3 + 4") is None


def test_a_solution_that_is_too_long_keeps_its_answer_s_points():
    report = check_arithmetic("3 * 9", Fraction(27), "3 * 9 = 27\n" * 400)
    assert report.right
    assert not report.follows


COUNTED = "Tom has 5 apples and buys 3 bags with 4 apples each. How many has he?"  # 17


@pytest.mark.parametrize(
    "steps",
    [
        "\n".join(f"{n} + 1 = {n + 1}" for n in range(5, 17)),
        "5 * 5 = 25\n" + "\n".join(f"{n} - 1 = {n - 1}" for n in range(25, 17, -1)),
        "5 + 1 + 1 + 1 + 1 + 1 + 1 + 1 + 1 + 1 + 1 + 1 + 1 = 17",
        "5 / 5 = 1\n" + "\n".join(f"{n} + 1 = {n + 1}" for n in range(5, 17)),
        "5 + 2 = 7\n7 + 10 = 17",
        "5 * 2 = 10\n10 + 7 = 17",
        "5 + 12 = 17",
        "4 + 3 = 7\n7 + 10 = 17",
        "3 + 2 = 5\n5 + 12 = 17",
    ],
)
def test_counting_up_to_the_answer_is_a_guess(steps):
    assert Steps()([COUNTED], [f"{steps}\nThe answer is 17."], answer=[17]) == [6 / 9]
    assert Steps(part="complete")([COUNTED], [f"{steps}\nThe answer is 17."], answer=[17]) == [0.0]


@pytest.mark.parametrize(
    ("prompt", "steps", "answer"),
    [
        (COUNTED, "3 * 4 = 12\n5 + 12 = 17", 17),
        (COUNTED, "4 + 4 + 4 = 12\n12 + 5 = 17", 17),
        (COUNTED, "4 + 4 = 8\n8 + 4 = 12\n12 + 5 = 17", 17),
        ("A road of 40 m has a tree every 5 m, at both ends too. How many?", "40 / 5 = 8\n8 + 1 = 9", 9),
        ("20% of 50 children are ill. How many are not?", "100 - 20 = 80\n80 / 100 * 50 = 40", 40),
        ("A film takes 2 hours. How many seconds are that?", "2 * 60 = 120\n120 * 60 = 7200", 7200),
        ("Tom is 5, Ann 3 years older, Ben 2 years older than Tom. How old are they together?", "5 + 3 = 8\n5 + 2 = 7\n5 + 8 + 7 = 20", 20),
        ("3 bacteria double each hour for 5 hours.", "3 * 2 = 6\n6 * 2 = 12\n12 * 2 = 24\n24 * 2 = 48\n48 * 2 = 96", 96),
    ],
)  # fmt: skip
def test_what_uses_the_stated_quantities_is_no_counting(prompt, steps, answer):
    assert Steps()([prompt], [f"{steps}\nThe answer is {answer}."], answer=[answer]) == [1.0]


def test_a_number_after_a_word_is_named_and_claims_nothing():
    assert claims_of("the total 3 = 7") == claims_of("2 apples 3 = 7") == []
    assert len(claims_of("apples: 3 = 7")) == 1
