"""Which of the code in a completion is the program. It is read with regular expressions alone: to parse what a model wrote, in
the trainer, is to trust the parser with it."""

from __future__ import annotations

import re
from dataclasses import dataclass

_PYTHON = ("python", "python3", "py")
_FENCE = re.compile(r"^([ \t]*)(`{3,}|~{3,})[ \t]*(\w*)[^`\n]*$")
_BOUND = re.compile(
    r"^(?:async[ \t]+)?(?:def|class)[ \t]+(\w+)|^([A-Z][A-Z0-9_]*)[ \t]*(?::[^=\n]*)?=(?!=)", re.MULTILINE
)
_IMPORTED = re.compile(r"^(?:from[ \t]+[\w.]+[ \t]+)?import[ \t]+(.+(?:\n[ \t]+.+)*)", re.MULTILINE)
_READS = re.compile(r"\binput[ \t]*\(|\bstdin\b|\bopen[ \t]*\([ \t]*0|\bfileinput\b|/dev/stdin")
_WORD = re.compile(r"(?<![\w.])[^\W\d]\w*")


@dataclass(frozen=True)
class _Block:
    language: str
    code: str

    @property
    def bound(self) -> set[str]:
        """What it makes for blocks after it: functions, classes, imports and constants."""
        names = {name for pair in _BOUND.findall(self.code) for name in pair if name}
        return names.union(*(_WORD.findall(names) for names in _IMPORTED.findall(self.code)))

    def defines(self, name: str, indent: str) -> bool:
        definition = rf"^{indent}(?:(?:async[ \t]+)?(?:def|class)[ \t]+{name}\b|{name}[ \t]*(?::[^=\n]*)?=(?!=))"
        return re.search(definition, self.code, re.MULTILINE) is not None


def program_in(text: str, function: str | None, *, reads: bool = False) -> str:
    """The program that a completion wrote.

    function: what is called, `name` or `Class.method`: then the last block fenced as Python that defines it, so that an example of
    its use after it changes nothing. None where the whole program is run: the last block that reads its input, where `reads`,
    or else the last one. Before it stand those earlier blocks that make what it uses and does not make itself. Where no block is fenced as
    Python those fenced as nothing in particular are taken, and where there are none the whole text. A block that is never closed goes to
    the end, as it does where a completion was cut off.
    """
    name = function.partition(".")[0] if function is not None else ""
    blocks = _blocks(text)
    python = [block for block in blocks if block.language in _PYTHON]
    plain = [block for block in blocks if not block.language]
    for some in (python, plain):
        chosen = _chosen(some, name, reads)
        if chosen is not None:
            return _with_what_it_uses(some, chosen, name)
    some = python or plain
    return _with_what_it_uses(some, len(some) - 1, name) if some else text


def _chosen(blocks: list[_Block], name: str, reads: bool) -> int | None:
    """The last block that defines what is called so; without a name the last one that reads its input, or the last one."""
    for indent in ("", "[ \\t]+") if name else ("",):  # below an `if` or a `try` where it is nowhere else
        for place in reversed(range(len(blocks))):
            block = blocks[place]
            if block.defines(re.escape(name), indent) if name else not reads or _READS.search(block.code):
                return place
    return None


def _with_what_it_uses(blocks: list[_Block], place: int, name: str) -> str:
    parts = [blocks[place].code]
    used, made = set(_WORD.findall(parts[0])), blocks[place].bound | {name}
    for block in reversed(blocks[:place]):
        if block.bound & (used - made):
            parts.insert(0, block.code)
            used |= set(_WORD.findall(block.code))
            made |= block.bound
    return "\n".join(part.rstrip("\n") for part in parts) + "\n"


def _blocks(text: str) -> list[_Block]:
    """The fenced blocks in order. A fence is closed by one of its own kind that is as long, and at most 3 columns further in.

    A block in a list is indented with it: of its lines as much is left out as stands before its fence.
    """
    found: list[tuple[str, list[str]]] = []
    indent, fence = "", ""
    for line in text.split("\n"):
        match = _FENCE.match(line)
        if fence:
            closes = match is not None and not match[3] and match[2].startswith(fence)
            if closes and match is not None and len(match[1]) <= len(indent) + 3:
                fence = ""
            else:
                found[-1][1].append(line[: len(indent)].lstrip() + line[len(indent) :])
        elif match is not None:
            indent, fence = match[1], match[2]
            found.append((match[3].lower(), []))
    return [_Block(language, "\n".join(lines)) for language, lines in found]
