"""The share of a completion in its prompt's language, held to texts labelled by hand."""

import time

import pytest
from language_texts import EN, TEXTS, ZH

from coterie.errors import UserError
from coterie.rewards.texts.identify import identify
from coterie.rewards.texts.language import Language, language_of
from coterie.rewards.texts.scripts import prose, sentences


def share(text, language):
    return Language()([""], [text], language=[language])[0]


def is_off(text, language, wanted, by=0.1):
    got = share(text, language)
    return (got is None) != (wanted is None) or (got is not None and abs(got - wanted) > by)


KINDS = sorted({kind for kind, *_ in TEXTS})


@pytest.mark.parametrize("kind", KINDS)
def test_error_rates_on_labelled_texts(kind):
    """At most one text in twenty of a kind is off by more than a tenth; where scripts decide, none is."""
    rows = [row for row in TEXTS if row[0] == kind]
    wrong = [row for row in rows if is_off(*row[2:0:-1], row[3])]
    assert len(wrong) <= (0 if kind in ("script", "eastern", "formula", "code") else 0.05 * len(rows)), wrong


def test_the_labelled_set_is_large_and_of_many_kinds():
    assert len({text for _, _, text, _ in TEXTS}) >= 120
    assert len(KINDS) >= 8
    assert {language for _, language, _, _ in TEXTS} >= {"en", "zh", "ja", "es", "fr", "de"}


def test_a_chinese_half_weighs_as_much_as_an_english_half():
    """The parallel sentences of the set: an English word and one and a half Han characters, within a sixth."""
    english, chinese = ("\n".join(texts) for texts in (EN, ZH))
    units = [sum(word.units for sentence in sentences(text) for word in sentence) for text in (english, chinese)]
    assert units[1] / units[0] == pytest.approx(1, abs=1 / 6)
    assert share(f"{english}\n{chinese}", "zh") == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    ("prompt", "completion", "wanted"),
    [
        ("Solve 3x - 5 = 10", "Add 5: 3x = 10 + 5", 1.0),
        ("Solve 3x - 5 = 10", "加 5：3x = 10 + 5", 0.0),
        ("解方程 3x - 5 = 10", "加 5：3x = 10 + 5", 1.0),
        ("解方程 3x - 5 = 10", "Add 5: 3x = 10 + 5", 0.0),
        ("¿Qué es la lluvia?", "Rain is water that falls from the clouds.", 0.0),
        ("3 + 4", "The answer is 7.", None),
        ("解方程 3x - 5 = 10", "x = 5", None),
        ("", "", None),
        ("What does 你好 mean?", "你好 means hello.", 1.0),
    ],
)
def test_the_prompt_s_own_language_is_expected(prompt, completion, wanted):
    assert Language()([prompt], [completion]) == [wanted]


def test_of_chats_the_last_question_and_the_message_are_read():
    prompt = [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": "天空是什么颜色的？"}]
    assert Language()(
        [prompt, prompt], [[{"role": "assistant", "content": text}] for text in ("蓝色。", "It is blue.")]
    ) == [1, 0]


def test_a_prompt_in_kanji_and_kana_is_japanese():
    for prompt in ("漢字とかな", "日本の首都はどこですか。", "猫はなぜ鳴くのですか。", "これは本ですか。"):
        assert language_of(prompt).language == "ja", prompt
    assert Language()(["漢字とかな"], ["東京は日本の首都です。"]) == [1]


def test_the_option_precedes_the_column_and_that_the_prompt():
    text = "这是中文。"
    assert Language()(["Hello, how are you?"], [text], language=["zh-CN"]) == [1]
    assert Language(language="en")(["你好"], [text], language=["zh"]) == [0]
    assert Language()(["你好吗？"], [text], language=[None]) == [1]
    assert Language(nothing=1.0)(["你好吗？"], ["x = 5"]) == [1]


def test_names_do_not_hide_a_text():
    """Capitals are names among enough words only."""
    assert share("WE ADD THREE AND FOUR AND GET SEVEN 好", "zh") < 0.2
    assert share("我们把 Three 和 Four 加起来。", "zh") == 1


@pytest.mark.parametrize("name", ["Chinese", "zh_Hans", "ZH-cn", "中文", "zh"])
def test_a_language_has_many_names(name):
    assert Language(language=name)([""], ["你好"]) == [1]


def test_an_unknown_language_in_the_data_is_named():
    with pytest.raises(UserError, match="tlh"):
        share("abc", "tlh")


def test_too_few_words_are_in_no_certain_language():
    """Then any language of the script is accepted."""
    assert identify("Latin", ["Paris"]) == ""
    assert language_of("Paris?").language == ""
    assert Language()(["Paris?"], ["La tour est dans la ville."]) == [1]


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("a `b c` d", "a d"),
        ("one ```two\nthree``` four", "one four"),
        ("one ```two three", "one"),
        ("one $two$ three $$four$$ \\(five\\) \\[six\\] end", "one three end"),
        ("costs 5$ and 6$ too", "costs and too"),
        ("see https://a.example/one/two, and me@a.example now", "see and now"),
        ("\\boxed{one {two}} three", "three"),
        ("5 km/h, 3kg and 20 °C", ", and"),
    ],
)
def test_what_is_no_prose_is_left_out(text, left):
    assert " ".join(prose(text).replace("$", " ").split()) == left


def test_equal_texts_get_equal_shares():
    rows = [(language, text) for _, language, text, _ in TEXTS]
    assert [share(text, language) for language, text in rows] == [share(text, language) for language, text in rows]


@pytest.mark.timed
def test_short_texts_are_judged_fast():
    """A floor far below what is measured, for machines under load."""
    texts = [(language, text) for _, language, text, _ in TEXTS]
    share(*reversed(texts[0]))
    begin = time.perf_counter()
    for language, text in texts:
        share(text, language)
    assert len(texts) / (time.perf_counter() - begin) > 200


HIDDEN = "The answer is five because we add two and three. So that is what it must be."


@pytest.mark.parametrize(
    "text",
    [f"好\n```\n{HIDDEN}\n```", f"好\n```text\n{HIDDEN}\n{HIDDEN}\n```", f"好\n~~~\n{HIDDEN}", f"好 `{HIDDEN}`", f"好\n```python\n# {HIDDEN}\n# {HIDDEN}\n```",
     f"好 \\[{HIDDEN}\\]", f"好 \\begin{{align}}{HIDDEN}\\end{{align}}", f"好 \\begin{{align*}}x &= 1 \\\\ {HIDDEN}\\end{{align*}}", f'好 <p title="{HIDDEN}">',
     f"好 <p {HIDDEN}>", "好\n```\n" + HIDDEN.replace(" ", "\n") + "\n```", "好 " + HIDDEN.replace(". ", " ").replace(" ", "_"),
     f"好 $\\text{{{HIDDEN}}}$", f"好 \\[\\text{{{HIDDEN}}}\\]", f"好 \\text{{{HIDDEN}}}", f"好 ${HIDDEN}$", f"好\n```python\nx = 1\n# {HIDDEN}\n# {HIDDEN}\n```"],
)  # fmt: skip
def test_sentences_do_not_hide_in_fences_or_formulas(text):
    assert share(text, "zh") < 0.15
    assert share(text, "en") > 0.85


def test_code_and_formulas_are_still_in_no_language():
    code = "```python\nimport os, sys, json, math\ndef total(numbers):\n    # add all of them up\n    return sum(numbers)\n```"
    assert share(f"这个函数求和。\n{code}", "zh") == 1
    assert share("所以 $\\text{speed} = \\frac{\\text{distance}}{\\text{time}}$ 成立。", "zh") == 1
    assert share("运行 `git commit --amend` 就可以了。", "zh") == 1
    assert share("设 max_new_tokens_per_step 为五。<div class='large box' id=\"first\">", "zh") == 1
    assert share("结果：\n```\nred\ngreen\nblue\n```\n\\begin{cases} x + y &= 3 \\\\ 2x &= 4 \\end{cases}", "zh") == 1


@pytest.mark.timed
@pytest.mark.parametrize("piece", ["```a b c d\n", "`a b c d` ", "$\\text{a", "# a\n", "\\text{ab cd ef gh}"])
def test_hostile_fences_cost_one_pass(piece):
    began = time.monotonic()
    prose("```\n" + piece * (100_000 // len(piece)))
    prose(piece * (100_000 // len(piece)))
    assert time.monotonic() - began < 5
