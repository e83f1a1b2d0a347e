"""The README in English and in Chinese: one may be read for the other."""

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ENGLISH, CHINESE = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md"))


def blocks(text):
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(block):
    """What stands at the start of each line: a command, a setting or a folder, without what is said of it behind."""
    return [re.split(r" {2,}", line.strip())[0] for line in block.splitlines()]


def figures(text):
    return Counter(re.findall(r"\d[\d,]*(?:\.\d+)*", text))


def test_both_have_the_same_blocks_of_code_but_for_what_is_said_of_them():
    english, chinese = blocks(ENGLISH), blocks(CHINESE)
    assert [language for language, _ in english] == [language for language, _ in chinese]
    for (_, one), (_, other) in zip(english, chinese, strict=True):
        assert commands(one) == commands(other)
        assert figures(one) == figures(other)


def test_both_have_the_same_figures():
    assert figures(ENGLISH) == figures(CHINESE)
    tables = [[figures(line) for line in text.splitlines() if line.startswith("|")] for text in (ENGLISH, CHINESE)]
    assert tables[0] == tables[1]


def test_both_have_the_same_headings_links_and_names():
    levels = [
        re.findall(r"^#+", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.M) for text in (ENGLISH, CHINESE)
    ]
    assert levels[0] == levels[1]
    links = [re.findall(r"\]\(([^)]+)\)", text) for text in (ENGLISH, CHINESE)]
    assert (links[0].pop(0), links[1].pop(0)) == ("README.zh-CN.md", "README.md")
    assert sorted(links[0]) == sorted(links[1])
    names = [Counter(re.findall(r"`([^`\n]+)`", text)) for text in (ENGLISH, CHINESE)]
    assert names[0] == names[1]


@pytest.mark.parametrize("text", [ENGLISH, CHINESE], ids=["English", "Chinese"])
def test_nothing_is_left_to_be_filled_in(text):
    assert not re.search(r"@@|TODO", text)
