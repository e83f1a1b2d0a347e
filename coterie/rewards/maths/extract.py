"""Find the answer in a text: what stands in the last box, after "answer:", or at the end. Nothing here imports torch."""

from __future__ import annotations

import re

from coterie.rewards.maths.numbers import in_one_alphabet, number, spelled
from coterie.rewards.maths.tidy import MATHS, inside
from coterie.rewards.maths.units import CURRENCIES, ENDS, units_of

_MAX_TEXT, _MAX_LINE, _MAX_BOXES = 10_000, 1_000, 50  # what is looked at, so that no text makes the search long
_BOX = re.compile(r"\\(?:f?boxed|fbox)\s*\{")
_BARE_BOX = re.compile(r"\\boxed(?:\s+|(?=\d))([\w.,/+-]+)")  # `\boxed 5`
_ANSWER_TAG, _THOUGHT_END = "<answer>", "</think>"
_BETWEEN = re.compile(r"[\s$]*(?:,|;|，|、|and|or|和|或)?[\s$]*")  # two boxes so close are one answer
_MARK = re.compile(
    r"(?:\banswer\b(?:\W{0,4}|\s(?:to|of|for|in)\s[^.,;:!?\n=]{1,60}?|\s(?:\w+\s){0,2}?)(?:\b(?:is|are)\b|[:：=])|答案(?!\s*(?:不|并非|并不))\s*(?:应该|应)?[是为]?"
    r"|(?P<weak>\b(?:answers|option|choice)\b\W{0,4}(?:\b(?:is|are)\b|[:：=])|(?:所以|因此|综上|结果[是为]?|最终)))[\s*:：,，]*",
    re.IGNORECASE,
)
_NOTE = re.compile(r"<<[^<>\n]*>>")  # of a calculator
_CLOSER = re.compile(r"\W*(?:i hope|hope th|let me know|thank|done\b|q\.?e\.?d|good luck|feel free)", re.IGNORECASE)
_THEREFORE = re.compile(
    r"^(?:(?:(?:therefore|thus|hence|so|then|now|also|simply|exactly|altogether|finally|lastly|certainly|definitely|clearly|surely|obviously|overall|in total|in all|and|but)\b|∴)[\s,:]*)+",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"[。；！？]|(?<!\b[A-Za-z])[.;](?:\s|$)|(?<=[^\d)}])!(?:\s|$)|(?<=\?)\s")
_REASON = re.compile(
    r"^(?:because|since|as)\s[^,=]*,\s+(?=[^,=]*\d)|(?:[\s,]+(?:because|since|given that|seeing that)|,\s+as|(?:,|\bbut|\band|,\s*and)\s+not)\s(?:[^,]|,\d)*$|,?\s+(?:rather than|instead of)\s[^,=]*$"
    r"|,\s+(?:which|who|where)\s(?!means|rounds)[^,=]*$|[,，]不.*|[,，]?因为.*",
    re.IGNORECASE,
)
_NOT_BUT = re.compile(  # denies another, or all others: `not 3 but 4`, `nothing but 4`
    r"\bnot\s+[\w$.,]+,?\s+but\s+(?:rather\s+)?|\b(?:(?:cannot|can['’]t|could(?: not|n['’]t))\s+be\s+any\w+\s+|no(?:ne|thing)?\s+)(?:else\s+)?"
    r"(?:but|other than|except)\s+(?=[\w$\\])",
    re.IGNORECASE,
)
_EQUALS = re.compile(r"(?<=[\d)])\s+(?:equals|is equal to)\s+(?=[\d$])", re.IGNORECASE)
_CHOICE = re.compile(r"\(?[A-J][.):]\s")
_PROSE = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{2,}(?:\s+[A-Za-z]{2,})+|[\u4e00-\u9fff]{2,}")

# A number as it stands in prose: with its sign, currency and scale.
_FIGURE = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d{1,3}(?: \d{3})+(?![\d/])|\d+)(?:\.\d+)?(?:\s?/\s?\d+(?![\d/.]))?|\.\d+"
_NUMBER = re.compile(
    rf"(?<![\w.\\^√{{])(?:(?:[-−]|minus |negative )\s?)?(?:US)?[$€£¥₹]?\s?-?(?:\d+ \d+/\d+(?!\d)|{_FIGURE})"
    r"(?:\s?%|\s?(?:percent|per cent)\b|[:]\d\d(?:\s?[ap]\.?m\b\.?|\sin the (?:morning|afternoon|evening)\b)?|\s?[ap]\.?m\b\.?|[€¢]|(?:st|nd|rd|th)\b|\s?(?:π|\\pi\b)|\s?[百千]?[万亿])?(?!\.?\d)",
    re.ASCII | re.IGNORECASE,
)
_OPERATOR = re.compile(
    r"\s*(?:[*×÷+^=<>≈(]|/(?!\s*(?!sin|cos|tan|log|ln|exp|sqrt|pi)[A-Za-z]{2})|[-−–]\s*[\d$(]|x\s*[\d$(]|\\(?:times|cdot|div|le|ge)|(?:or|to|and)\s+\$?\d|times\s+\d|plus|minus|divided"
    r"|(?:[a-z]+\s+){0,3}?(?:or (?:more|less|fewer|so|higher|lower)\b|than\s+\$?\d)|(?:below|squared|cubed|percentage|factorial|tens|mod|modulo|\w*[jz]illions?)\b|and a half)",
    re.IGNORECASE,
)
_UNIT = re.compile(
    r"\s?(?:[°/]?\s?[A-Za-z][A-Za-z'’.]*|[\u4e00-\u9fff]+)(?:(?:\s|\s?/\s?)[A-Za-z][A-Za-z'’]*){0,4}(?:\s?\^?\s?\{?[23]\}?(?!\d))?"
)

_NOUN_END = re.compile(  # a verb or preposition behind what is counted
    rf"\b(?:{'|'.join(sorted(ENDS))}|is|are|was|were|has|have|had|do|did|can|could|will|would|must|may|should|remains?|stay|came|come|went|\w{{3,}}ed)\b"
)

# What makes a number that stands behind or before it no answer.
_DENIED = re.compile(
    r"(?:\b(?:not|cannot|never|nobody|neither|nor|hardly|differs?|different|except|unlikely|impossible|doubt|wrong|incorrect|false|refuse|other than|instead of"
    r"|rather than|far from|no way|no chance|rules? out|ruled out|excludes?|rejects?|(?:any|every|no)(?:thing|one|body)? but)\b|n['’]t\b|(?:不可能|不会|不应|不是|不为|不等于|并非|绝非|并不)\w{0,3}?)"
    r"[\s,:'\"]*(?:(?!only|just)\w+[\s,:'\"]+){0,6}?$",
    re.IGNORECASE,
)
_DENIED_NEAR = re.compile(
    r"(?:\bnot|\bcannot|\bnever|n['’]t)\s+(?:(?:be|is|are|was|to|equals?|the|an?|answer|it|that|of|as|just|result|value|total|true|case|x)\s+){0,4}$",
    re.IGNORECASE,
)
_DENIED_AFTER = re.compile(
    r"^[\s\"'’).,*$]*(?:\w+\s+){0,3}?(?:(?:is|was|are|would be|can|could|does|do|will|should|must|may)\s?(?:not|n['’]t)|isn['’]t|wasn['’]t|can['’]?t|cannot|doesn['’]t|won['’]t"
    r"|is never)\s+(?:be\b|the\b|it\b|an?\b|right|correct|possible|true|valid|work|hold|enough|what|our|my|accept|equal|match|seem|make sense|$|[.,;!])"
    r"|^[\s\"'’).,*$]*(?:\w+\s+){0,2}?(?:is|was|are|would be|seems|looks)\s+(?:clearly |definitely |obviously |certainly |just |simply )?(?:wrong|incorrect|false|impossible|mistaken|too|untrue|a mistake|an error|out of|off)"
    r"|^[\s\"'’).,*$]*(?:\w+\s+){0,2}?(?:fails|violates|contradicts|disagrees|differs)\b"
    r"|^[\s\"'’)*$]*(?:[?？]|，?(?:是)?(?:错|不对|不正确|不是))",
    re.IGNORECASE,
)
_BOUND = re.compile(
    r"(?:\b(?:(?:less|fewer|more|greater|larger|smaller|bigger|higher|lower|older|younger|longer|shorter|other) than|at (?:least|most)|up to|under|over|above|below|almost|nearly"
    r"|about|around|approximately|roughly|close to|between|(?:half|twice|double|triple|thrice)(?: of)?|exceeds?|maybe|perhaps|either)\s*|[≈~<>≤≥±]\s*"
    r"|零下|至少|至多|超过|不到|大于|小于|大约|约)$",
    re.IGNORECASE,
)
_CONTEXT = re.compile(
    r"\b(?:these|those|the|other|first|next|each|every|per|in|for|after|within|at|from|than|with|out of|week|day|year|month|step|part|problem|if|to|to [a-z]+|their|his|her|by|another|a)\s+$",
    re.IGNORECASE,
)
_COPULA = re.compile(
    r"^.{0,200}\b(?:is|are|was|were|be|equals?|becomes?|falls on|lands on|called|named)\s+(?:on\s+|an?\s+|the\s+)?(?=\S)|^\W*(?:it|we get|we have|we choose)['’]?s?\s+(?:be\s+)?",
    re.IGNORECASE,
)
_FORMULA = re.compile(  # behind a verb: `The solution is x > 3`, `The point is (1, 2)`
    r"\b(?:is|are|be|get|have|for|with|when)\s+(?=[^<>]*(?:[<>]|\\[lg]e)|[(\[{].*,|[a-z]\s*=.*\b[a-z]\s*=)"
    r"((?:[^A-Za-z\\]|\\[A-Za-z]+|\b[A-Za-z]\b|\b(?:or|and)\b)+)$"
)
_UNKNOWN = re.compile(r"\d[a-fi-kn-rt-z](?![A-Za-z])(?!\s*\d)|(?<![\w'’])(?<!\d )[b-z]\s*[-+*/^]\s*[\d(]")
_WORDY = re.compile(
    r"\W*\d\S*\s+[a-z]{2,}|.*=.*[A-Za-z]{3}|[A-Z][a-z]+ .*\d|.*[*/+-].*[$%€£].*=|[a-z]+['’]s\s", re.IGNORECASE
)
_LIST = re.compile(r"(?:\W|and|or|[A-Za-z]\w{0,2}\s*=\s*[^=\sA-Za-z]+)+")  # x = 1 and y = 2


def final_answer(text: str) -> str:
    """What a completion gives as its answer, or the empty text.

    Of a text with <think> or <answer>, only what follows the thoughts or stands in the last answer. In this order: the last box (boxes
    with only "and", "or" or a comma between them are one answer), what follows the last "####", what follows the last "answer is",
    "answer:", 答案, 所以 or 因此 on its line, the last line. What is denied there is no answer.
    """
    text = text[-_MAX_TEXT:].rpartition(_THOUGHT_END)[2].rpartition(_ANSWER_TAG)[2].partition("</answer>")[0]
    text = in_one_alphabet(_NOTE.sub("", text)).replace("根号", "√")
    boxed = boxed_answer(text)
    if boxed or _BOX.search(text):  # a box that never closes is no answer
        line, after = text[: text.rfind("boxed")].rpartition("\n")[2], text[text.rfind("}") + 1 :]
        return "" if _DENIED.search(_clause(line.rstrip("\\ $f"))) or _DENIED_AFTER.search(after) else boxed
    if "####" in text:
        return _first_line(text.rpartition("####")[2])
    marks = list(_MARK.finditer(text))
    if marks and not (marks[-1]["weak"] and text[marks[-1].end() :].strip().count("\n")):
        before = _clause(text[: marks[-1].start()].rpartition("\n")[2])
        stated = _stated(_first_line(text[marks[-1].end() :])[:_MAX_LINE], last=False)
        return "" if _DENIED.search(before + " ") else stated
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("```")]
    lines = [line for line in lines if not _CLOSER.match(line)] or lines
    return _stated(lines[-1][-_MAX_LINE:], last=True) if lines else ""


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


def _clause(text: str) -> str:
    """What stands before a place in its clause."""
    return re.split(
        r"[,;:.!?，。；：](?=\s|$|[\u4e00-\u9fff])|(?<!thing )(?<!number )\bbut\b|\b(?:so|hence|therefore|thus)\b", text
    )[-1]


def _takes_back(before: str, after: str) -> bool:
    """Whether what stands before and after a number bounds or denies it."""
    return bool(_BOUND.search(before) or _DENIED.search(_clause(before)) or _DENIED_AFTER.search(after))


def _stated(line: str, *, last: bool) -> str:
    """The answer in a line: its mathematics between dollars, the number that its last sentence (or first) gives, or all of it."""
    line = re.sub(r"</?\w+>|(?<![\w)])\*\*|\*\*(?![\w(])|__", "", line).strip()
    if _CHOICE.match(line):
        return line
    sentences = [part.strip() for part in _SENTENCE.split(line) if part and part.strip()]
    sentences = [part for part in sentences if not part.endswith("?") and not _CLOSER.match(part)] or [line]
    told = [part for part in sentences if re.search(r"\d|\$", part)] or sentences
    sentence = _THEREFORE.sub("", told[-1] if last else told[0])
    if sentence.endswith(("?", "？")):  # asks, and answers nothing
        return sentence
    maths = [found for found in MATHS.finditer(sentence) if not _PROSE.search(re.sub(r"\\\w+\{[^{}]*\}", "", found[0]))]
    if maths:
        return _neighbours(sentence, maths, last=last)
    label = re.match(r"[A-Z][a-z]+(?: \d+)?\s*[:：]\s*(?=\S)", sentence)
    sentence = _EQUALS.sub(" = ", _without_reason(_NOT_BUT.sub("", sentence[label.end() if label else 0 :])))
    bare = re.sub(r"\\[A-Za-z]+(?:\{[^{}]*\})?", " ", sentence)
    has_words = _PROSE.search(bare) or _WORDY.match(bare)
    if not (has_words or (label and "=" in bare)) or _LIST.fullmatch(sentence):
        return sentence
    formula = _FORMULA.search(sentence)
    if formula and not _DENIED.search(_clause(sentence[: formula.start(1)])):
        return formula[1]
    if re.search(r"(?<![<>!=])=\s*\S", bare):
        before, _, after = sentence.rpartition("=")
        rest = re.search(r",\s+((?:so|meaning|which means|therefore|thus|leaving|giving|making|and so)\s.*\d.*)", after)
        if rest:
            return _from_words(rest[1], line)
        if _UNKNOWN.search(before.rpartition("=")[2]) or _DENIED_NEAR.search(re.split(r"[\d$]", before)[0]):
            return sentence  # `Solve 3x - 5 = 10`
        return _leading(after.strip(), sentence, line)
    return _from_words(sentence, line)


def _without_reason(sentence: str) -> str:
    """Without a reason behind the answer, in brackets or a clause of its own."""
    found = re.fullmatch(r"(.*[\w%.$€}])\s+[(\[]([^()]*(?:\([^()]*\)[^()]*)*)[)\]](\W*)", sentence)
    told = r"[A-Za-z]{3,}|=|\d\s[A-Za-z]{2}" + (r"|\d\s*[-+*/×]\s*\$?\d" if _PROSE.search(sentence) else "")
    if found and re.search(told, found[2]) and not re.match(r"\W*(?:or|and|not|mod|maybe|perhaps|if)\b", found[2]):
        sentence = found[1]
    shorter = _REASON.sub("", sentence)
    return shorter if re.search(r"\d", shorter) or spelled_in(shorter) or not re.search(r"\d", sentence) else sentence


def _leading(text: str, sentence: str, line: str) -> str:
    """The number that a text begins with, and its unit; else the text, if it is a formula."""
    rounded = re.search(r"\bround(?:s|ed)?(?: up| down| off)? to (.*)", text)
    text = rounded[1] if rounded else text
    found = _NUMBER.match(text)
    if found and not _OPERATOR.match(text, found.end()):
        attached = re.match(r"-?[A-Za-z]+", text[found.end() :])
        if not attached or units_of(attached[0]):
            return _with_unit(found[0], text[found.end() :], line)
    if re.fullmatch(r"[A-Za-z]\W*", text) and "=" in sentence:  # `or 20 = A`
        return _from_words(re.split(r"[=,]|\bor\b", sentence)[-2].strip(), line)
    return _from_words(text, line) if re.search("[A-Za-z]{3}", re.sub(r"\\[A-Za-z]+", " ", text)) else text


def _with_unit(figure: str, after: str, line: str) -> str:
    """A number with the words behind it that say what it measures."""
    if figure.rstrip().endswith(("%", "percent", "per cent")):
        bare = re.sub(r"\s*(?:%|per ?cent)", "", figure, flags=re.IGNORECASE)
        told = re.search(r"\b100\b|per ?cent|%", line.replace(figure, " "))  # it is percents that are asked for
        return f"{bare} in percent" if told and re.fullmatch(r"-?[\d.]+", bare) else figure
    if figure.endswith(("st", "nd", "rd", "th")):
        return figure
    sign = re.match(rf"[-−]?\s?[{CURRENCIES}]?", figure)
    scaled = spelled((figure[sign.end() :] if sign else figure) + after)
    if scaled:  # `3 million`
        figure, after = (figure + after)[: len(figure + after) - len(scaled[1])], scaled[1]
        if _OPERATOR.match(after):
            return line
    unit = _UNIT.match(after)
    words = unit[0] if unit else ""
    end = _NOUN_END.search(words)
    words = words[: end.start()] if end else words
    while words.strip() and not units_of(words):
        words = re.sub(r"(?:\s?/\s?|\s|^)[^\s/]+\s*$", "", words)
    return f"{figure.strip()} {words.strip()}".strip().rstrip(".")


def spelled_in(text: str) -> list[str]:
    """The numbers in words of a text without digits, each with what follows it."""
    found, at = [], 0
    for word in re.finditer(
        r"(?<![\w-])(?!one of|no one|a(?:n)? (?!half|hundred|thousand|million|billion|dozen))[A-Za-z]+",
        text[:_MAX_LINE],
    ):
        if word.start() >= at and (one := spelled(text[word.start() :])):
            found.append(text[word.start() :])
            at = len(text) - len(one[1])
    return found


def _from_words(sentence: str, line: str) -> str:
    """What a sentence without an equation gives: its only number, the others being told apart by the words before them."""
    if re.search(r"\b(?:probability|chances?|fraction|proportion|odds|ratio)\b", sentence):
        sentence = re.sub(r"(\d+) (?:out of|in|to) (\d+)", r"\1/\2", sentence)
    numbers = [found for found in _NUMBER.finditer(sentence) if not re.match(r"-[A-Za-z]", sentence[found.end() :])]
    if not numbers:
        return _without_digits(sentence, line)
    if len(numbers) > 1:
        *_, clause = re.split(r",\s+", sentence)
        if clause != sentence and re.match(r"[A-Za-z'’]+\s", clause) and len(_NUMBER.findall(clause)) == 1:
            return _from_words(clause, line)
        because = re.fullmatch(r".*(?:=|\bequals?|\bis)\s*(\S+?)\W*", line)
        elsewhere = because and because[1] not in sentence.split()[-1]
        value = number(re.sub("[$,]", "", because[1])) if because and elsewhere else None
        kept = [found for found in numbers if value is not None and number(re.sub("[$,]", "", found[0])) == value]
        kept = kept[:1] or _without_context(numbers, sentence)
        numbers = kept if len(kept) == 1 else numbers
    if len(numbers) > 1 or _OPERATOR.match(sentence, numbers[0].end()):
        return sentence
    (found,) = numbers
    before, after = sentence[: found.start()], sentence[found.end() :]
    if _takes_back(before, after):
        return sentence
    return _with_unit(found[0], after, line)


def _without_context(numbers: list[re.Match[str]], sentence: str) -> list[re.Match[str]]:
    """The numbers that no word before them tells to be given: `72 nails in these 4 tins`, `45 stamps for 2 parcels and 7 cards`."""
    kept, given = [], False
    for found in numbers:
        before = sentence[: found.start()]
        given = bool(_CONTEXT.search(before)) or (given and bool(re.search(r"\b(?:and|or)\s+$", before)))
        kept += [] if given else [found]
    return kept


def _without_digits(sentence: str, line: str) -> str:
    """A number in words, or the words behind the verb."""
    found = spelled_in(sentence)
    if len(found) == 1:
        value, rest = spelled(found[0]) or (None, "")
        before = sentence.removesuffix(found[0])
        if _takes_back(before, rest) or re.match(r"\s+(?:or|to)\b", rest):
            return sentence
        sign = "-" if re.search(r"\b(?:minus|negative)\s+$", before) else ""
        return _with_unit(f"{sign}{value}", rest, line)
    copula = _COPULA.match(sentence)
    if copula and not found and not _DENIED.search(copula[0]) and len(sentence[copula.end() :].split()) <= 4:
        return sentence[copula.end() :].rstrip(".! ")
    return sentence


def _neighbours(line: str, maths: list[re.Match[str]], *, last: bool) -> str:
    """The last of these formulas (or first), together with those next to it: `$x = 1$ and $x = 2$` is one answer."""
    maths = maths[::-1] if last else maths
    group = [maths[0]]
    for other in maths[1:]:
        one, two = sorted((group[-1], other), key=lambda match: match.start())
        if not _BETWEEN.fullmatch(line, one.end(), two.start()):
            break
        group.append(other)
    group.sort(key=lambda match: match.start())
    before, after = line[: group[0].start()], line[group[-1].end() :]
    if _takes_back(before, after):
        return line
    text = ", ".join(inside(match) for match in group)
    unit = _UNIT.match(after) if len(group) == 1 and re.search(r"[\d}]\s*$", text) else None
    measures = unit and any(name[:4] != "noun" for one in units_of(unit[0]) or () for name, _ in one.dimensions)
    return f"{text} {unit[0].strip()}" if unit and measures else text
