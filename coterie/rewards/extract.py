"""Find the answer in a text: what stands in the last box, after "answer:", or at the end. Nothing here imports torch."""

from __future__ import annotations

import re

_MAX_TEXT, _MAX_LINE, _MAX_BOXES = 10_000, 1_000, 50  # what is looked at, so that no text makes the search long
_BOX = re.compile(r"\\(?:f?boxed|fbox)\s*\{")
_BARE_BOX = re.compile(r"\\boxed(?:\s+|(?=\d))([\w.,/+-]+)")  # `\boxed 5`
_ANSWER_TAG, _THOUGHT_END = "<answer>", "</think>"
_BETWEEN = re.compile(r"[\s$]*(?:,|;|，|、|and|or|和|或)?[\s$]*")  # two boxes so close are one answer
_MARK = re.compile(
    r"(?:\b(?:answers?|option|choice)\b\W{0,4}(?:(?:is|are)\b|[:：=])|答案(?!\s*(?:不|并非|并不))\s*(?:应该|应)?[是为]?|(?:所以|因此|综上|结果[是为]?|最终))[\s*:：,，]*",
    re.IGNORECASE,
)
_MATHS = re.compile(r"\$\$(.+?)\$\$|\$(.+?)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_END = re.compile(r"[。；！？]|[.;!?](?:\s|$)|,\s*not\s|\s(?:because|since|as|but)\s")
_NUMBER = re.compile(r"(?<![\w.])[-+−－]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?\s*%?", re.ASCII)
_MEASURE = re.compile(
    r"[\d.,/\s%π+*^-]+(?!.*\b(?:is|are|was)\b)[A-Za-z]+(?:\s[A-Za-z]+){0,3}"
)  # `16π cubic inches`: its unit is judged with it
_NOT_IT = re.compile(  # what a number that stands behind it is not the answer of
    r"(?:(?:\bnot|n't)\W*(?:\w+\W+)?|\b(?:(?:less|fewer|more|greater|larger|smaller) than|at (?:least|most)|(?:half|twice|double) "
    r"(?:of )?)\s*|(?:不是|不为|不等于|并非|零下|至少|至多|超过|不到|大于|小于)\s*)$"
)
_THEREFORE = re.compile(r"^(?:(?:therefore|thus|hence|so|then|now|also|simply|exactly)\b|∴)[\s,:]*", re.IGNORECASE)
_CHOICE = re.compile(r"\(?[A-J][.):]\s")
_PROSE = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{2,}(?:\s+[A-Za-z]{2,})+|[\u4e00-\u9fff]{2,}")


def final_answer(text: str) -> str:
    """What a completion gives as its answer, or the empty text.

    Of a text with <think> or <answer>, only what follows the thoughts or stands in the last answer. In this order: the last box (boxes with only "and", "or" or a comma between them are one answer), what follows the last
    "####", what follows the last "answer is", "answer:", 答案, 所以 or 因此 on its line, the last line.
    """
    text = text[-_MAX_TEXT:].rpartition(_THOUGHT_END)[2].rpartition(_ANSWER_TAG)[2].partition("</answer>")[0]
    boxed = boxed_answer(text)
    if boxed or _BOX.search(text):  # a box that never closes is no answer
        return boxed
    if "####" in text:
        return _first_line(text.rpartition("####")[2])
    marks = list(_MARK.finditer(text))
    if marks:
        return _core(_first_line(text[marks[-1].end() :]), last=False)
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("```")]
    return _core(lines[-1], last=True) if lines else ""


def boxed_answer(text: str) -> str:
    r"""What stands in the last \boxed{}, or the empty text."""
    text = _BARE_BOX.sub(r"\\boxed{\1}", text[-_MAX_TEXT:])
    found = [
        box for match in list(_BOX.finditer(text))[-_MAX_BOXES:] if (box := _closed(text, match.start(), match.end()))
    ]
    if not found:
        return ""
    group = [found[-1]]
    for before in reversed(found[:-1]):
        if not (before[1] <= group[0][0] and _BETWEEN.fullmatch(text, before[1], group[0][0])):
            break
        group.insert(0, before)
    return ", ".join(content.strip() for _, _, content in group)


def known_answer(text: str) -> str:
    """What a row of the data gives as its answer: a whole solution's box or "####", or all of it."""
    if "####" in text:
        return _first_line(text.rpartition("####")[2])
    return boxed_answer(text) or text.strip()


def _closed(text: str, start: int, inside: int) -> tuple[int, int, str] | None:
    """Where a box starts and ends, and its content. None if it never closes."""
    depth = 1
    for found in re.finditer(r"\\.|[{}]", text[inside:], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(found[0], 0)
        if depth == 0:
            return start, inside + found.end(), text[inside : inside + found.start()]
    return None


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip(" *:：")), "")


def _core(line: str, *, last: bool) -> str:
    """The answer in a sentence: its mathematics between dollars, or what is left without the words around it."""
    line = line[-_MAX_LINE:] if last else line[:_MAX_LINE]
    line = re.sub(r"</?\w+>|(?<![\w)])\*\*|\*\*(?![\w(])|__", "", line).strip()
    line = _THEREFORE.sub("", line)
    if line.endswith(("?", "？")):  # asks, and answers nothing
        return line
    maths = list(_MATHS.finditer(line))
    if maths:
        return _neighbours(line, maths[::-1] if last else maths)
    line = re.sub(r"^[A-Z][a-z]+\s*[:：]\s*", "", line)
    if _CHOICE.match(line):
        return line
    if last:
        line = re.sub(r",\s*not\s[^.;!?]*", "", line)
    parts = [part for part in _END.split(line) if part.strip()]
    parts = [part for part in parts if re.search(r"\d", part)] or parts if last else parts  # `x = 3 as required`
    line = (parts[-1] if last else parts[0]).strip() if parts else ""
    line = _THEREFORE.sub("", line)
    _, *between, after = line.split("=") if "=" in line else (line, "")
    if after and _PROSE.search(line) and not any(re.search(r"\b(?:and|or)\b|[,;]", part) for part in between):
        line = after.strip()  # `She earns 9 * 2 = $18 a day`
    numbers = list(_NUMBER.finditer(line))
    if numbers and _NOT_IT.search(line[: numbers[-1].start()]):
        return line
    if numbers and _PROSE.search(line) and "=" not in line:
        rest = line[numbers[0].start() :].strip()
        return rest if not _PROSE.search(rest) or _MEASURE.fullmatch(rest) else numbers[-1][0].strip()
    return line


def _neighbours(line: str, maths: list[re.Match[str]]) -> str:
    """The first of these formulas, together with those next to it: `$x = 1$ and $x = 2$` is one answer."""
    group = [maths[0]]
    for other in maths[1:]:
        one, two = sorted((group[-1], other), key=lambda match: match.start())
        if not _BETWEEN.fullmatch(line, one.end(), two.start()):
            break
        group.append(other)
    group.sort(key=lambda match: match.start())
    return ", ".join(next(part for part in match.groups() if part is not None) for match in group)
