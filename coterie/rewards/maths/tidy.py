"""One spelling for what is written in many: plain digits, LaTeX for signs, no commands that only space or dress. Nothing here imports torch."""

from __future__ import annotations

import re

from coterie.rewards.maths.numbers import in_one_alphabet, spelled

OPEN, CLOSE = "⦃", "⦄"  # the braces of a set, which LaTeX writes \{ \}

# Mathematics between dollars, unless the dollars are money: an opening one touches what follows, a closing one what precedes and no digit.
MATHS = re.compile(
    r"\$\$(.+?)\$\$|(?<![\\\w$])\$(?=[^\s$])((?:[^$\\\n]|\\.)*?)(?<!\s)\$(?![\d$])|\\\((.+?)\\\)|\\\[(.+?)\\\]",
    re.DOTALL,
)
_SIGNS = {
    "−": "-", "–": "-", "—": "-", "×": r"\times ", "⋅": r"\cdot ", "·": r"\cdot ", "÷": "/", "≤": r"\le ", "≥": r"\ge ",
    "≠": r"\ne ", "π": r"\pi ", "∞": r"\infty ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "°": r"^\circ ",
    "±": r"\pm ", "⁄": "/", "、": ",", "和": ",", "或": ",", "。": ".", "⟨": "(", "⟩": ")", "√": r"\sqrt ", "根号": r"\sqrt ",
    "ℝ": r"\mathbb{R}", "∖": r"\setminus ", "∨": " or ", "∧": " and ", "．": ".",
}  # fmt: skip
_WRITTEN = re.compile(r"\\(?:text|mathrm|mbox|textbf|textit|mathbf|operatorname|textrm|rm|mathit)\s*\{([^{}]*)\}")
_COMMANDS = {
    r"\dfrac": r"\frac", r"\tfrac": r"\frac", r"\cfrac": r"\frac", r"\$": "$", r"\%": "%", r"\{": OPEN, r"\}": CLOSE, r"\lbrace": OPEN,
    r"\rbrace": CLOSE, r"\langle": "(", r"\rangle": ")", r"\pounds": "£", r"\euro": "€", r"\yen": "¥", r"\cent": "¢", r"\infinity": r"\infty",
    r"\le": r"\le ", r"\leq": r"\le ", r"\leqslant": r"\le ", r"\ge": r"\ge ", r"\geq": r"\ge ", r"\geqslant": r"\ge ", r"\leslant": r"\le ",
    r"\geslant": r"\ge ", r"\ne": r"\ne ", r"\neq": r"\ne ", "<=": r"\le ", ">=": r"\ge ", "!=": r"\ne ", r"\lt": "<", r"\gt": ">",
    r"\varnothing": r"\emptyset ", r"\emptyset": r"\emptyset ",
}  # fmt: skip
_FUNCTIONS = "arcsin|arccos|arctan|sqrt|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|exp|pi|infty|infinity"
# In this order: numbers and powers before the spaces between their digits go, then functions and commands, then what is written in them.
_RULES = [(re.compile(pattern), instead) for pattern, instead in (
    (r"(\d)(?:\{,\}|\\[,!;: ]|,\\!)(?=\d{3}(?!\d))", r"\1"),
    (r"(?<=[0-9a-z)])\*\*(-?\d+|[a-z](?![a-z]))", r"^{\1}"),
    (r"(?<=[0-9a-z)])\*\*(?=\()", "^"),
    (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits|quad|qquad)(?![A-Za-z])|(?<!\\)\\[!,;: ]|(?<=[^\s\\])~|\*\*", " "),
    (rf"(?<![\\A-Za-z])({_FUNCTIONS})(?![A-Za-z])", r"\\\1 "),
    (r"\\(?:[A-Za-z]+|[${}%])|[<>!]=", lambda found: _COMMANDS.get(found[0], found[0])),
    (r"(?i:\bper ?cent\b)", "%"),
    (r"^\(\s*([-+]?\d+(?:\.\d+)?)\s*\)(?=\s*/\s*\d)", r"\1"),
    (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"(?<![\d.])(\d+(?:\.\d+)?)[eE]([-+]?\d{1,4})(?![\d.])", r"\1\\times 10^{\2}"),
    (r"(?i:⦃\s*⦄|\b(?:there (?:is|are) )?no (?:real )?solutions?\b|\b(?:the )?empty set\b)", r"\\emptyset "),
    (r"\\pmod\s*\{?\w+\}?|\(mod \w+\)", " "),
    (r"(?<![\d.])(\d{1,3})((?: \d{3})+)(?![\d.,]\d|\d|/)", lambda found: found[0].replace(" ", "")),
    (r"(?<=\d)(\s*)(st|nd|rd|th)$", ""),
    (r"(?<=:\d\d) in the (morning|afternoon|evening)\b", lambda found: " am" if found[1] == "morning" else " pm"),
    (r"(\d+)\s*(?:out of|in every)\s+(\d+)", r"\1/\2"),
)]  # fmt: skip
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])", re.ASCII)
_CHINESE_AROUND = re.compile(
    r"^(?![一二两三四五六七八九十百千万亿零负]*分之)[\u4e00-\u9fff\s:,]*?(?=[-\d(\\]|[负一二两三四五六七八九十百千万亿零]+(?![\u4e00-\u9fff]{3}))"
)


def inside(maths: re.Match[str]) -> str:
    """What stands between the signs of a match of `MATHS`."""
    return next(group for group in maths.groups() if group is not None)


def tidy(text: str) -> str:
    """The text in one spelling, with spaces where there were any: `1 1/2` is no `11/2`."""
    text = in_one_alphabet(text)
    text = re.sub("|".join(_SIGNS), lambda found: _SIGNS[found[0]], text) if not text.isascii() else text
    if "matrix" not in text and "array" not in text:
        text = MATHS.sub(lambda found: f" {inside(found)} ", text)
    for _ in range(2):
        text = _WRITTEN.sub(r" \1 ", text)
    for pattern, instead in _RULES:
        text = pattern.sub(instead, text)
    if not re.search(rf"[\[({OPEN}]", text):
        text = _THOUSANDS.sub(lambda found: found[0].replace(",", ""), text)
    if re.search("[\u4e00-\u9fff]", text) and not re.match("[^\\d-]*(?:不|非|零下|减)", text):
        text = _CHINESE_AROUND.sub("", text, count=1)
    text = re.sub(r"\s+", " ", text).strip().rstrip(".,;:").lstrip("= ").strip()
    again = re.fullmatch(r"(.*\d\S*) \(([a-z -]+)\)", text)  # 8 (eight)
    return again[1] if again and (words := spelled(again[2])) and again[1] == str(words[0]) and not words[1] else text


def is_words(tidied: str) -> bool:
    """Whether it is text and no mathematics: `Yes`, `even`, 星期一."""
    if re.search(r"[\d\\=<>+*/^(|]", tidied) or spelled(
        tidied.casefold().removeprefix("minus ").removeprefix("negative ")
    ):
        return False
    return bool(
        re.search(r"[A-Za-z]{3,}|[\u0370-\U0010ffff]", re.sub(f"[{OPEN}{CLOSE}]", "", tidied))
    ) or tidied.casefold() in ("no", "on", "up")


def plain(text: str) -> str:
    """Without what is no part of a word or formula. Spaces count between digits alone."""
    text = in_one_alphabet(_WRITTEN.sub(r" \1 ", text)).strip()
    maths = MATHS.fullmatch(text)
    text = inside(maths) if maths else text
    text = re.sub(
        r"(?<![\d.])\s+|\s+(?![\d.])",
        "" if not re.search("[A-Za-z]{2}", text) else " ",
        re.sub(r"(?<=[a-z])!$", "", text.strip().rstrip(".。,;")),
    ).strip()
    text = re.sub(r"^(?:the|an?) (?=[a-z]{2})", "", text, flags=re.IGNORECASE)
    return text.casefold() if re.fullmatch(r"[A-Za-z][A-Za-z' -]+", text) else text


def words_only(text: str) -> str:
    return _WRITTEN.sub(r"\1", text).strip().strip("$*").strip().rstrip(".")
