"""What of a text is prose, and in which script each of its words is written.

The unit of an amount of text is the word. Where a script writes no spaces, so many characters count as a word as a
translation takes for one (`_PER_WORD`): a Chinese half and an English half of a text then weigh about the same, which
they would not if letters were counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import regex

_PER_WORD = {"Han": 1.5, "Kana": 2.5, "Thai": 5.0, "Lao": 5.0, "Khmer": 5.0, "Myanmar": 5.0}
_ALPHABETS = (
    "Latin", "Cyrillic", "Greek", "Arabic", "Hebrew", "Devanagari", "Hangul", "Thai", "Lao", "Khmer", "Myanmar", "Bengali",
    "Tamil", "Telugu", "Kannada", "Malayalam", "Gujarati", "Gurmukhi", "Oriya", "Sinhala", "Armenian", "Georgian", "Ethiopic",
    "Tibetan",
)  # fmt: skip
OTHER = "Other"


@dataclass(frozen=True)
class Word:
    """A run of letters of one script."""

    script: str
    text: str

    @property
    def units(self) -> float:
        per_word = _PER_WORD.get(self.script)
        return len(self.text) / per_word if per_word else 1.0

    @property
    def is_name(self) -> bool:
        """Whether it looks like a name or an acronym, where the script has capitals."""
        return self.text[0].isupper()


_WORD = regex.compile(
    r"(?P<End>[!?。！？；\n\u2028\u2029]|\.(?=\s|$))"
    r"|(?P<Han>[\p{Han}々〇]+)|(?P<Kana>[\p{Hiragana}\p{Katakana}ー]+)"
    + "".join(rf"|(?P<{name}>\p{{{name}}}[\p{{{name}}}\p{{M}}'’]*)" for name in _ALPHABETS)
    + rf"|(?P<{OTHER}>[\p{{L}}--\p{{Common}}]+)",
    regex.V1,
)


def sentences(text: str) -> list[list[Word]]:
    """The words of each sentence of the prose; sentences without any are left out.

    Single letters of an alphabet are symbols, no words.
    """
    found: list[list[Word]] = [[]]
    for match in _WORD.finditer(prose(text)):
        script = str(match.lastgroup)
        if script == "End":
            found.append([])
        elif script in _PER_WORD or len(match.group()) > 1:
            found[-1].append(Word(script, match.group()))
    return [sentence for sentence in found if sentence]


# No alternative may look further than the next opening of its own kind: a text of openings alone then costs one pass.
_LEFT_OUT = regex.compile(
    r"""
      ```.*?(?:```|\Z) | ~~~.*?(?:~~~|\Z)                                # fenced code, to the end where it is not closed
    | `[^`\n]*`                                                          # inline code
    | \$\$[^$]*\$\$ | \$(?=\S)[^$\n]*\$                                  # formulas
    | \\\((?:[^\\]|\\(?![()]))*+\\\) | \\\[(?:[^\\]|\\(?![\[\]]))*+\\\]
    | \\begin\{(?:[^\\]|\\(?!begin\b|end\b))*+\\end\{\w*+\*?\}
    | \\(?:boxed|text|mathrm|mathbf|operatorname)\{(?:[^{}\n]|\{[^{}\n]*\})*+\} | \\[A-Za-z]++
    | (?:https?://|www\.)[^\s<>"')\]，。；）】》」]++ | (?<![\w.+-])[\w.+-]++@[\w-]++(?:\.\w++)++   # addresses
    | </?[A-Za-z][^<>\n]*>                                               # tags
    """,
    regex.VERBOSE | regex.DOTALL,
)
_SYMBOLS = regex.compile(
    r"""
      \d++(?:[.,:/]\d++)*+(?:\s?(?:km/h|m/s|[KMG]B|Hz|kWh?|[kcmμnd]?[mgsLl]|[°℃%][CF]?)(?![\w/]))?   # numbers, their units
    | \b[A-Za-z]++[\d_]\w*+ | \b\p{Ll}++\p{Lu}\w*+                 # identifiers: x1, my_name, camelCase
    | \b(?:sin|cos|tan|log|ln|exp|max|min|mod|gcd|lcm|sqrt|lim|det)(?=\()  # functions
    | (?:\b[A-Za-z]\w*+\s*+)?[=≈≠≤≥]\s*+(?:[A-Za-z]\w*+)? | [+*×÷^]\s*+[A-Za-z]\w*+   # both sides of an equation
    """,
    regex.VERBOSE,
)


def prose(text: str) -> str:
    """The text without what is in no language: code, formulas, equations, addresses, tags, numbers with their units.

    What stands in a fence, in backticks or in a formula and reads as sentences is prose all the same: else a text would hide there.
    """
    return _SYMBOLS.sub(_of_symbol, _LEFT_OUT.sub(lambda found: f" {_sentences_in(found.group())} ", text))


def _of_symbol(found: regex.Match[str]) -> str:
    """Nothing, but of a name that is as long as a sentence its words."""
    return found.group() if found.group().count("_") >= _LONG_NAME else " "


_LONG_NAME = 8  # underscores
_LETTERS = regex.compile(r"\p{Han}{1,2}|\p{L}[\p{L}\p{M}'’]+")
_IN_FORMULA = regex.compile(r"\\(?:text\w*|mathrm|operatorname|boxed)\{([^{}]*)\}")
_COMMENT = regex.compile(r"^\s*(?:#+|//+|--|/?\*+|%+|;+)\s*")
_CODE = regex.compile(
    r"[=(){}\[\]<>_\\|@$^&*+~/#;]|[\p{L}\d]\.\p{L}|:\s*$|^\s*(?:import|from|return|raise|yield|del|assert|pip|cd|git|sudo|npm|echo)\b",
)
_LEAST_WORDS = 4  # of a line that may be a sentence
_MANY_WORDS = 12  # in lines of any length, none of which looks like code
_MARKS = regex.compile(r"\\(?:begin|end)\{\w*\*?\}|\\[\[\]()]|\\\\|[$&]")  # around and between formulas
_QUOTED = regex.compile(r"\"([^\"]*)\"|'([^']*)'")
_TEXT = 2 / 3  # the share of a block's words in lines of text, from which on it is text


def _sentences_in(left_out: str) -> str:
    """Of what is left out the lines that read as sentences, where most of it does: comments beside code stay code."""
    if left_out[0] == "<":  # a tag, with its attributes
        parts = [left_out.strip("</>"), *("".join(pair) for pair in _QUOTED.findall(left_out))]
        return "\n".join(part for part in parts if _reads_as_sentence(part))
    if left_out[0] in "$\\":
        parts = [*_MARKS.sub("\n", left_out).split("\n"), *_IN_FORMULA.findall(left_out)]
        return "\n".join(part for part in parts if _reads_as_sentence(part))
    if left_out[0] not in "`~":  # an address
        return ""
    lines = left_out.strip("`~").split("\n")
    total = sum(_num_words(line) for line in lines)
    bare = [_COMMENT.sub("", line) for line in lines]
    if total >= _MANY_WORDS and not any(map(_CODE.search, bare)):
        return "\n".join(bare)
    text = [line for line in bare if _reads_as_sentence(line)]
    return "\n".join(text) if sum(map(_num_words, text)) >= _TEXT * total else ""


def _reads_as_sentence(line: str) -> bool:
    return _num_words(line) >= _LEAST_WORDS and _CODE.search(line) is None


def _num_words(line: str) -> int:
    return len(_LETTERS.findall(line))
