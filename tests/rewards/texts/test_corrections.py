"""Completions that take back a step of their own are seen."""

import pytest

from coterie.rewards.texts.corrections import SelfCorrection, revises

REVISED = [
    "3 * 4 = 11\n3 * 4 = 12",
    "3 * 4 = 11. Wait, that is wrong. 3 * 4 = 12.",
    "3 * 4 = 11. Hmm, 3 * 4 = 12 of course.",
    "The answer is 7. Actually, it should be 8.",
    "So the total is 14. No, that's not right: I forgot the tip. 14 + 3 = 17.",
    "x = 4\nWait, 3 * 4 - 5 = 7, which is not 10.\nx = 5",
    "We get 3x = 16. I made a mistake, 10 + 5 = 15, so 3x = 15.",
    "2 + 2 = 5\nLet me recheck.\n2 + 2 = 4",
    "The answer is 9.\nHold on, 3 * 2 = 6.\nThe answer is 6.",
    "答案是 11。不对，应该是 12。",
    "3 × 4 = 11。等一下，3 × 4 = 12。",
    "3 × 4 = 11，算错了，重新算：3 × 4 = 12",
    "x = 4\n等等，3 * 4 - 5 = 7，不是 10。所以 x = 5",
    "答案是 8\n重新检查\n答案是 9",
    "所以 x = 6。更正：x = 5。",
]
KEPT = [
    "",
    "3 * 4 = 12",
    "Add 5: 3x = 10 + 5\n3x = 15\nDivide by 3: x = 15 / 3\nx = 5",
    "加 5：3x = 10 + 5\n3x = 15\n除以 3：x = 15 / 3\nx = 5",
    "3 * 4 = 12. Wait, let me check: 3 * 4 = 12. Yes.",
    "x = 5. Wait, let me check: 3 * 5 - 5 = 10. Correct.",
    "x = 5. Let me check: 3 * 5 - 5 = 10. Correct.",
    "x = 2 or x = 3",
    "Either x = 2\nor x = 3",
    "If n = 1, it is odd.\nIf n = 2, it is even.",
    "当 n = 1 时是奇数。\n当 n = 2 时是偶数。",
    "Wait, what is asked? 3 + 4 = 7.",
    "He has to wait 5 minutes, and then 5 + 3 = 8 minutes are gone.",
    "苹果、梨等等一共 5 个。再加 3 个是 8 个。",
    "3 + 4 = 7\n7 * 2 = 14\n14 - 5 = 9",
    "x = 5。检验：3 * 5 - 5 = 10，正确。",
    "f(1) = 2\nf(2) = 3",
    "a = 3\nb = 4\na + b = 7",
    "Wait. Actually, no. Hmm. Let me check.",
    "x = 0.5\nx = 1/2",
]


@pytest.mark.parametrize("text", REVISED)
def test_a_step_that_is_taken_back_is_seen(text):
    assert revises(text)


@pytest.mark.parametrize("text", KEPT)
def test_words_and_checks_alone_are_no_revision(text):
    assert not revises(text)


def test_the_metric_is_a_reward_of_zero_and_one():
    assert SelfCorrection()(["3 * 4 = 11\n3 * 4 = 12", [{"role": "assistant", "content": "7"}]]) == [1, 0]
