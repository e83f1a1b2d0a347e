"""Rewards over groups: the user's function, its failures, abstentions, weights and columns."""

import asyncio
import copy
import json
import math
import os
import re
import subprocess
import sys
import time
import traceback

import numpy as np
import pytest
import torch

from coterie.errors import RewardError, UserError
from coterie.rewards.base import Reward
from coterie.rewards.check import check_fits
from coterie.rewards.score import score
from coterie.rewards.text_of import completion_text
from coterie.types import Completion, Group, Prompt

NAN = math.nan


def completion(text, tokens=(1, 2)):
    zeros = torch.zeros(len(tokens))
    return Completion(list(tokens), zeros, zeros, "stop", text)


def group(content, *texts, **columns):
    return Group(Prompt(0, content, [1], columns), [completion(text, (1, *range(len(text)))) for text in texts])


GROUPS = [group("p", "a", "bb", letter="a"), group("q", "ccc", "", letter="c")]


def length(completions, **columns):
    return [float(len(text)) for text in completions]


def scored(function, groups=GROUPS, **options):
    return score(groups, [Reward("mine", function)], **options)


def same(got, wanted):
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=got.dtype), equal_nan=True, atol=0, rtol=0)


def reasons(result):
    return {(f.group, f.completion): f.reason for f in result.failures}


def test_every_completion_gets_its_own_reward_in_its_own_place():
    result = scored(length)
    same(result.rewards, [[1, 2], [3, 0]])
    same(result.parts["mine"], [[1, 2], [3, 0]])
    assert result.failures == []
    assert result.valid.all()


def test_several_rewards_are_weighed_and_summed_and_kept_apart():
    """2 * length - 1 * ends with b."""
    last_b = Reward("last_b", lambda completions: [text.endswith("b") for text in completions], -1.0)
    result = score(GROUPS, [Reward("length", length, 2.0), last_b])
    same(result.rewards, [[2, 3], [6, 0]])
    same(result.parts["length"], [[1, 2], [3, 0]])
    same(result.parts["last_b"], [[0, 1], [0, 0]])


def test_an_abstaining_part_is_left_out_of_the_sum():
    """None abstains: the other part alone counts. Where every part abstains the completion does."""
    some = Reward("some", lambda completions: [None if text in ("a", "") else 10.0 for text in completions])
    other = Reward("other", lambda completions: [None if text == "" else 1.0 for text in completions])
    result = score(GROUPS, [some, other])
    same(result.rewards, [[1, 11], [11, NAN]])
    same(result.parts["some"], [[NAN, 10], [10, NAN]])
    assert result.failures == []
    assert result.valid.tolist() == [[True, True], [True, False]]


def test_zero_is_a_reward_and_not_an_abstention():
    same(scored(lambda completions: [0, 0.0, -0.0, False]).rewards, [[0, 0], [0, 0]])


def raises_for_bb(completions):
    if "bb" in completions:
        raise ValueError("no bb please")
    return [1.0] * len(completions)


def test_a_reward_that_raises_for_one_completion_fails_for_one():
    result = scored(raises_for_bb)
    same(result.rewards, [[1, NAN], [1, 1]])
    (reason,) = reasons(result).values()
    assert re.fullmatch(r"raised ValueError: no bb please \(.*test_score\.py, line \d+, in raises_for_bb\)", reason)
    assert [(f.reward, f.group, f.completion) for f in result.failures] == [("mine", 0, 1)]


@pytest.mark.parametrize(
    ("answer", "word"),
    [
        (NAN, "nan"),
        (math.inf, "inf"),
        (-math.inf, "inf"),
        ("1.0", "text '1.0'"),
        (b"1", "text b'1'"),
        ([1.0, 2.0], "not a number"),
        ({}, "not a number"),
        (1j, "not a number"),
        (10**400, "not a number"),
        (np.float32("nan"), "nan"),
        (torch.tensor([1.0, 2.0]), "not a number"),
    ],
    ids=str,
)
def test_what_is_no_finite_number_is_a_failure_and_never_a_zero(answer, word):
    result = scored(lambda completions: [1.0, answer, 2.0, 3.0])
    same(result.rewards, [[1, NAN], [2, 3]])
    same(result.parts["mine"], [[1, NAN], [2, 3]])
    assert list(reasons(result)) == [(0, 1)]
    assert word in reasons(result)[0, 1]


def test_a_failed_part_makes_the_whole_completion_abstain():
    """Else a reward that fails on bad completions would pay less for good ones."""
    result = score(GROUPS, [Reward("length", length), Reward("fragile", raises_for_bb)])
    same(result.rewards, [[2, NAN], [4, 1]])
    same(result.parts["length"], [[1, 2], [3, 0]])
    same(result.parts["fragile"], [[1, NAN], [1, 1]])


def test_every_failure_is_listed():
    broken = Reward("broken", lambda completions: [NAN] * 4)
    result = score(GROUPS, [broken, Reward("text", lambda completions: ["1"] * 4), Reward("length", length)])
    assert [(f.reward, f.group, f.completion) for f in result.failures] == [
        (name, p, g) for name in ("broken", "text") for p in range(2) for g in range(2)
    ]
    assert result.rewards.isnan().all()


def test_a_reward_that_always_raises_makes_everything_abstain():
    def broken(completions):
        raise KeyError("answer")

    result = scored(broken)
    assert result.rewards.isnan().all()
    (reason,) = set(reasons(result).values())
    assert re.fullmatch(r"raised KeyError: 'answer' \(.*test_score\.py, line \d+, in broken\)", reason)


def test_where_a_library_raises_the_functions_own_line_is_named():
    def reads(completions):
        return [json.loads(text)["score"] for text in completions]

    line = reads.__code__.co_firstlineno + 1
    (reason,) = set(reasons(scored(reads)).values())
    assert f"test_score.py, line {line}, in " in reason
    assert "JSONDecodeError" in reason


def test_what_ends_the_run_holds_the_traceback_of_its_cause():
    with pytest.raises(UserError, match="no bb please") as error:
        scored(raises_for_bb, max_failed_share=0.1)
    shown = "".join(traceback.format_exception(error.value))
    assert 'raise ValueError("no bb please")' in shown


@pytest.mark.parametrize(
    ("answers", "given"),
    [
        ("1234", "'1234'"),
        (b"1234", "b'1234'"),
        (None, "None"),
        (1.0, "1.0"),
        ((value for value in (1.0, 2.0, 3.0, 4.0)), "generator"),
        ({"a": 1.0, "bb": 2.0, "ccc": 3.0, "": 4.0}, "{'a': 1.0"),
        ({0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0}, "{0: 1.0"),
        ({4.0, 1.0, 3.0, 2.0}, "{1.0"),
    ],
    ids=[
        "text",
        "bytes",
        "None",
        "number",
        "generator",
        "dict",
        "dict of numbers",
        "set",
    ],
)
def test_values_that_match_no_completions_stop_with_their_reward(answers, given):
    """A dict or a set has the right length and no order that could be meant."""
    with pytest.raises(UserError) as error:
        scored(lambda completions: answers)
    assert "reward mine" in str(error.value)
    assert given in str(error.value)


@pytest.mark.parametrize(("given", "values"), [([], 0), ([5.0, 5.0], 2)], ids=["too few", "too many"])
def test_a_wrong_number_of_values_for_one_of_64_costs_that_one(given, values):
    texts = [str(number) for number in range(64)]

    def leaves_out(completions):
        return [value for text in completions for value in (given if text == "17" else [float(text)])]

    result = scored(leaves_out, [group("p", *texts)], max_failed_share=1 / 64)
    same(result.rewards, [[NAN if text == "17" else float(text) for text in texts]])
    assert reasons(result) == {(0, 17): f"returned {values} values for 1 completion"}
    with pytest.raises(UserError, match=rf"1 of 64 completions.*the first: mine: returned {values} values"):
        scored(leaves_out, [group("p", *texts)], max_failed_share=0.01)


@pytest.mark.parametrize("answers", [[1.0, 2.0, 3.0], [1.0] * 5, []])
def test_a_function_that_never_gives_enough_values_fails_for_all(answers):
    result = scored(lambda completions: answers)
    assert not result.valid.any()
    assert set(reasons(result).values()) == {f"returned {len(answers)} values for 1 completion"}


def test_too_few_values_that_nobody_can_miss_stop_with_the_name():
    """One mean for all of them: alone each gets its own, and nothing would be seen to be wrong."""
    with pytest.raises(UserError, match="reward mine: returned 1 values for 4 completions"):
        scored(lambda completions: [sum(map(len, completions)) / len(completions)])


@pytest.mark.parametrize("kind", [tuple, np.array, torch.tensor, lambda values: [np.float32(v) for v in values]])
def test_any_sequence_of_numbers_is_an_answer(kind):
    same(scored(lambda completions: kind([1.0, 2.0, 3.0, 0.5])).rewards, [[1, 2], [3, 0.5]])


def test_the_threshold_counts_completions_and_names_a_failure():
    """One failed of four: 25 %, however many of its parts failed."""
    rewards = [Reward("one", raises_for_bb), Reward("two", raises_for_bb)]
    assert score(GROUPS, rewards, max_failed_share=0.25).valid.sum() == 3
    with pytest.raises(UserError, match="1 of 4 completions") as error:
        score(GROUPS, rewards, max_failed_share=0.24)
    assert "one: raised ValueError: no bb please" in str(error.value)


def test_at_a_threshold_of_0_abstaining_is_no_failure():
    result = scored(lambda completions: [None] * 4, max_failed_share=0.0)
    assert result.rewards.isnan().all()


def test_columns_are_handed_over_by_name_one_entry_a_completion():
    def wanted(letter, completions):
        return [float(text.startswith(one)) for text, one in zip(completions, letter, strict=True)]

    same(scored(wanted).rewards, [[1, 0], [1, 0]])


def test_a_function_that_takes_everything_gets_what_trl_gives():
    seen = {}

    def everything(prompts, completions, **columns):
        seen.update(columns, prompts=prompts, completions=completions)
        return [0.0] * len(completions)

    scored(everything)
    assert seen == {
        "prompts": ["p", "p", "q", "q"],
        "completions": ["a", "bb", "ccc", ""],
        "completion_ids": [[1, 0], [1, 0, 1], [1, 0, 1, 2], [1]],
        "letter": ["a", "a", "c", "c"],
    }


def test_a_row_that_lacks_a_needed_column_fails_alone_by_name():
    groups = [group("p", "a", "b", answer=7), group("q", "c", "d")]
    seen = []

    def look(completions, answer):
        seen.extend(answer)
        return [1.0] * len(completions)

    result = scored(look, groups)
    assert seen == [7, 7]
    same(result.rewards, [[1, 1], [NAN, NAN]])
    assert set(reasons(result).values()) == {"the prompt 'q': has no column 'answer', which the function needs"}
    assert list(reasons(result)) == [(1, 0), (1, 1)]


@pytest.mark.parametrize("named", [True, False])
def test_an_optional_column_is_none_where_a_row_lacks_it(named):
    groups = [group("p", "a", "b", answer=7), group("q", "c", "d")]
    seen = []

    def with_default(completions, answer=None):
        seen.extend(answer)
        return [0.0] * 4

    def with_columns(completions, **columns):
        seen.extend(columns["answer"])
        return [0.0] * 4

    scored(with_default if named else with_columns, groups)
    assert seen == [7, 7, None, None]


ROWS = [Prompt(0, "p", [1], {"answer": 7}, "data.jsonl:1"), Prompt(1, "q", [1], {"kind": "x"}, "data.jsonl:2")]


def needs_answer(completions, answer, **columns):
    return [1.0] * len(completions)


def test_data_without_a_column_are_refused_by_row_before_scoring():
    with pytest.raises(UserError, match=r"data\.jsonl:2: has no column 'answer'.*reward mine.*1 of 2 rows"):
        check_fits([Reward("mine", needs_answer)], ROWS)
    check_fits([Reward("mine", needs_answer, where={"answer": 7})], ROWS)
    check_fits([Reward("mine", lambda completions, answer=None: [])], ROWS)
    check_fits([Reward("mine", needs_answer, options={"answer": 1})], ROWS[1:])


def test_a_misspelt_parameter_is_refused_beside_all_columns_too():
    def misspelt(completions, anwser, **columns):
        return [1.0] * len(completions)

    with pytest.raises(UserError, match=r"needs anwser.*did you mean 'answer'"):
        check_fits([Reward("mine", misspelt)], ROWS)
    with pytest.raises(UserError, match=r"needs anwser.*did you mean 'answer'"):
        scored(misspelt, [group("p", "a", answer=1)])


def test_a_where_that_no_row_meets_is_refused():
    with pytest.raises(UserError, match=r"where: \{'kind': 'y'\} is met by none of the 2 rows"):
        check_fits([Reward("mine", length, where={"kind": "y"})], ROWS)


def test_what_looks_like_a_mistake_is_said():
    def limited(completions, limit=40, **columns):
        return [1.0] * len(completions)

    with pytest.warns(UserWarning, match=r"'limti'; did you mean 'limit'"):
        check_fits([Reward("mine", limited, options={"limti": 3})], ROWS)
    empty = [Prompt(0, "p", [1], {"answer": None}, "data.jsonl:1")]
    with pytest.warns(UserWarning, match=r"'answer' is empty in 1 of 1 rows, the first data\.jsonl:1"):
        check_fits([Reward("mine", needs_answer)], empty)


def test_a_missing_column_is_said_where_all_columns_are_taken(recwarn):
    def looks_up(completions, **columns):
        return [float(text == right) for text, right in zip(completions, columns["answer"], strict=True)]

    def looks_nothing_up(completions, **columns):
        return [1.0] * len(completions)

    rows = [Prompt(n, "p", [1], {"answer": "x"} if n else {}, f"data.jsonl:{n + 1}") for n in range(3)]
    check_fits([Reward("other", looks_nothing_up), Reward("mine", looks_up)], rows)
    (said,) = [str(warning.message) for warning in recwarn]
    assert said.startswith("reward mine: 1 of 3 rows have no column 'answer', the first data.jsonl:1")


def test_a_function_that_is_not_written_in_python_is_called():
    class Counts:
        """Its signature can't be read."""

        __signature__ = "none"

        def __call__(self, completions, **columns):
            return length(completions)

    same(scored(Counts()).rewards, [[1, 2], [3, 0]])
    with pytest.raises(UserError, match="takes no name"):
        scored(lambda completions, /: [0.0])


def test_a_default_stands_in_for_a_column_that_the_data_lacks():
    same(scored(lambda completions, weight=(2.0,) * 4: list(weight)).rewards, [[2, 2], [2, 2]])


def test_a_column_that_is_missing_is_named_with_those_there_are():
    with pytest.raises(UserError, match=r"mine.*answer") as error:
        scored(lambda completions, answer: [0.0] * 4)
    assert "letter" in str(error.value)


def test_a_column_cannot_take_the_place_of_the_completions():
    groups = [group("p", "a", "bb", completions="ten letters", prompts="other")]
    same(scored(length, groups).rewards, [[1, 2]])


def test_a_chat_is_handed_over_as_message_lists():
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    seen = {}

    def look(prompts, completions):
        seen.update(prompts=prompts, completions=completions)
        return [float(len(completion_text(message))) for message in completions]

    same(scored(look, [group(chat, "yes", "no")]).rewards, [[3, 2]])
    assert seen["prompts"] == [chat, chat]
    assert seen["completions"] == [[{"role": "assistant", "content": "yes"}], [{"role": "assistant", "content": "no"}]]


def test_a_reward_may_be_an_object_that_can_be_called():
    class Counts:
        def __call__(self, completions, letter):
            return [text.count(one) for text, one in zip(completions, letter, strict=True)]

    same(scored(Counts()).rewards, [[1, 0], [3, 0]])


NESTED = {"tests": [{"args": [[1, 2]], "expected": {"a": [3]}}], "tags": {"x"}, "pair": ([1], 2), "array": np.zeros(2)}


def spoils(prompts, completions, completion_ids, tests, tags, pair, array, **columns):
    """Changes all that it can reach, and says how much of it was left by others."""
    seen = []
    for i in range(len(completions)):
        seen.append(
            len(tests[i]) + len(tags[i]) + len(pair[i][0]) + int(array[i].sum() == 0) + len(prompts[i][0]["content"])
        )
        tests[i][0]["args"][0].append(9)
        tests[i][0]["expected"]["a"].clear()
        tests[i].pop()
        tags[i].add(len(tags[i]))
        pair[i][0].pop()
        array[i] += 1
        prompts[i][0]["content"] += "!"
        prompts[i].append({"role": "user", "content": "more"})
        completions[i][0]["content"] = ""
        completion_ids[i].clear()
    for values in (prompts, completions, completion_ids, tests):
        values.reverse()
        values.pop()
    return seen


def test_a_reward_that_changes_its_arguments_changes_no_other_s():
    """Not for later completions of the prompt, other rewards, a later step, or a call that is repeated one by one."""
    before = copy.deepcopy(NESTED)
    groups = [group([{"role": "user", "content": "ab"}], "x", "y", "z", **NESTED)]

    def raises_late(**columns):
        spoils(**columns)
        raise ValueError("after it all")

    for _ in range(2):
        result = score(groups, [Reward("one", spoils), Reward("late", raises_late), Reward("two", spoils)])
        for name in ("one", "two"):
            same(result.parts[name], [[6, 6, 6]])
    assert repr(NESTED) == repr(before)
    assert groups[0].prompt.content == [{"role": "user", "content": "ab"}]
    assert groups[0].completions[0].tokens == [1, 0]


def test_a_reward_that_changes_its_options_changes_nothing():
    class Pops:
        def begin(self, tests, words):
            tests[0].pop()
            words.pop()

        def __call__(self, tests, words):
            return [tests_of.pop() + len(words) + int(bool(words.pop())) for tests_of in tests]

    reward = Reward("pops", Pops(), options={"words": ["a", "b", "c"]})
    groups = [group("p", "x", "y", tests=[1, 2])]
    for _ in range(2):
        reward.begin(groups[0])
        same(score(groups, [reward]).rewards, [[6, 5]])


@pytest.mark.timed
def test_big_columns_are_copied_no_more_than_they_can_be_changed():
    """A text of 100 MB for each of 64 completions, and a list of a million numbers."""
    text, numbers = "x" * 100_000_000, list(range(1_000_000))
    big = [group("p", *map(str, range(64)), page={"text": text}, numbers=numbers)]

    def looks(page, numbers):
        assert len({id(one) for one in numbers}) == 64
        return [float(one["text"] is text) for one in page]

    began = time.monotonic()
    assert score(big, [Reward("looks", looks)]).rewards.min() == 1
    assert time.monotonic() - began < 20


def test_the_same_groups_are_scored_the_same_twice():
    first, second = scored(length), scored(length)
    assert torch.equal(first.rewards, second.rewards)
    assert first.groups == GROUPS


@pytest.mark.timed
def test_a_reward_that_sleeps_is_stopped_for_one_completion_only():
    def sleeps_for_bb(completions):
        for text in completions:
            try:
                time.sleep(30 if text == "bb" else 0)
            except Exception:
                time.sleep(30)
        return length(completions)

    began = time.monotonic()
    result = score(GROUPS, [Reward("sleepy", sleeps_for_bb, timeout=0.3)])
    assert time.monotonic() - began < 5
    same(result.rewards, [[1, NAN], [3, 0]])
    (reason,) = reasons(result).values()
    assert re.fullmatch(r"took longer than 0\.3 s \(.*test_score\.py, line \d+, in sleeps_for_bb\)", reason)


def test_when_too_many_take_too_long_the_others_are_not_tried():
    tried = []

    def sleeps(completions):
        tried.extend(completions)
        time.sleep(30)

    with pytest.raises(UserError, match=r"4 of 4 completions.*took longer than 0\.2 s"):
        score(GROUPS, [Reward("sleepy", sleeps, timeout=0.2)], max_failed_share=0.25)
    assert len(tried) == 4 + 2


@pytest.mark.parametrize("loops", ["for ever", "in an except"])
def test_python_code_that_never_ends_is_interrupted(loops):
    def spins(completions):
        while True:
            try:
                while True:
                    pass
            except Exception:
                pass

    result = score(GROUPS[:1], [Reward("spins", spins, timeout=0.2)])
    assert not result.valid.any()


def test_what_spins_in_c_ends_the_process_and_says_where():
    program = (
        "import coterie.rewards.time_limit as limits\n"
        "limits._GRACE = 0.5\n"
        "with limits.time_limit(0.5):\n"
        "    sum(range(10**12))\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    assert ended.returncode == 1
    assert "Timeout" in ended.stderr
    assert "line 4" in ended.stderr


def test_an_async_reward_is_awaited_and_held_to_its_time():
    async def slow_for_bb(completions):
        await asyncio.sleep(30 if "bb" in completions else 0)
        return length(completions)

    result = score(GROUPS, [Reward("async", slow_for_bb, timeout=0.3)])
    same(result.rewards, [[1, NAN], [3, 0]])


def test_options_are_keyword_arguments_and_may_not_be_columns():
    def scaled(completions, scale):
        return [scale * value for value in length(completions)]

    same(score(GROUPS, [Reward("scaled", scaled, options={"scale": 3})]).rewards, [[3, 6], [9, 0]])
    with pytest.raises(UserError, match="takes no size"):
        score(GROUPS, [Reward("length", lambda completions: [0.0] * 4, options={"size": 3})])
    with pytest.raises(UserError, match="letter is a column"):
        score(GROUPS, [Reward("length", length, options={"letter": 3})])


def test_a_reward_speaks_only_of_the_rows_it_is_for():
    seen = []

    def counted(completions, letter):
        seen.extend(completions)
        return length(completions)

    of_a = Reward("of_a", counted, where={"letter": "a"})
    of_c = Reward("of_c", length, weight=10, where={"letter": ["c", "d"]})
    result = score(GROUPS, [of_a, of_c])
    same(result.rewards, [[1, 2], [30, 0]])
    same(result.parts["of_a"], [[1, 2], [NAN, NAN]])
    assert seen == ["a", "bb"]
    nobody = score(GROUPS, [Reward("nobody", length, where={"missing": 1})])
    assert not nobody.valid.any()
    assert nobody.failures == []


def test_an_exception_in_the_list_is_that_completion_s_failure():
    def partly(completions):
        return [RewardError("the service is away") if text == "bb" else 1.0 for text in completions]

    result = scored(partly)
    same(result.rewards, [[1, NAN], [1, 1]])
    assert reasons(result) == {(0, 1): "the service is away"}


def test_a_reward_that_changes_the_folder_is_brought_back(tmp_path):
    def wanders(completions):
        os.chdir(tmp_path)
        return [1.0] * len(completions)

    before = os.getcwd()
    scored(wanders)
    assert os.getcwd() == before


def test_gradients_that_a_reward_turns_off_are_on_again_after_it():
    def turns_off(completions):
        torch.set_grad_enabled(False)
        return [1.0] * len(completions)

    scored(turns_off)
    assert torch.is_grad_enabled()


class Ahead:
    """A reward that can begin: the length of a text, times its column."""

    def __init__(self, **attributes):
        self.begun = []
        for name, value in attributes.items():
            setattr(self, name, value)

    def __call__(self, completions, factor):
        return [len(text) * by for text, by in zip(completions, factor, strict=True)]

    def begin(self, completions, factor):
        self.begun.append((completions, factor))


def test_a_function_begins_with_what_it_will_be_called_with():
    function = Ahead()
    reward = Reward("ahead", function, where={"kind": "a"})
    for one in (group("p", "x", "yy", factor=2, kind="a"), group("q", "zzz", factor=3, kind="b")):
        reward.begin(one)
    assert function.begun == [(["x", "yy"], [2, 2])]
    Reward("plain", length).begin(GROUPS[0])  # has nothing to begin with


def test_what_goes_wrong_at_the_beginning_goes_wrong_in_the_call():
    function = Ahead()
    reward = Reward("ahead", function)
    reward.begin(group("p", "x"))  # a column is missing
    assert function.begun == []
    with pytest.raises(UserError, match="factor"):
        score([group("p", "x")], [reward])


def test_without_spare_cores_only_what_needs_none_begins():
    assert not Reward("r", length).can_begin(True)
    assert Reward("r", Ahead()).can_begin(True)
    assert not Reward("r", Ahead()).can_begin(False)
    assert not Reward("r", Ahead(uses_cores=True)).can_begin(False)
    assert Reward("r", Ahead(uses_cores=False)).can_begin(False)
