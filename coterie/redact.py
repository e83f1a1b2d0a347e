"""Keys, tokens and passwords, kept out of what is written and printed; and text made fit to be shown in a terminal.

Keys belong in the environment, which no run records. They are known by their value, where a variable of the environment holds it; by their form; and by the name that stands before them.
What no rule knows, a word as a password in a sentence say, is not found.
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

MASK = "***"
_SHORTEST = 8  # characters; a shorter value of a variable that is not known to be a key could be any word
_SHORTEST_USED = 4  # of one whose value is sent as a key
_used: set[str] = set()  # variables whose values are sent, however they are called

_VARIABLE = re.compile(
    r"(^|_)(API|ACCESS|SECRET|PRIVATE|AUTH|MY)*(KEYS?|TOKENS?|SECRETS?|PASSWORDS?|PASSWD|PASSPHRASE|PASS|CREDENTIALS?|PAT|BEARER|DSN|AUTH|JWT|COOKIES?|WEBHOOK)"
    r"\d*(_(ID|BASE|OLD|NEW|PROD|DEV|TEST|STAGING|LIVE|RO|RW|HEADER|CONFIG|URL|\d+))*$|^(KEY|TOKEN)_|PASSWORD|APIKEY|AUTHORIZATION|^SSHPASS$|_PWD$"
    r"|(^|_)(SECRET|API_KEY|AUTH_TOKEN)(_|$)|(DATABASE|REDIS|MONGO\w*|POSTGRES\w*|BROKER|AMQP)_UR[IL]$|CONN\w*_STR(ING)?$",
    re.IGNORECASE,
)

# Names of what is secret whatever it looks like, in settings, headers, addresses and text
_NAME = (
    r"(?:(?:api|access|auth|secret|private|signing|encryption|subscription|account|master|session|service)[_.\s-]?key"
    r"|(?:access|auth|refresh|id|api|bearer|session|security|personal|private|client|bot|hf|github|gitlab|slack)[_.-]?token"
    r"|password|passwd|passphrase|pwd|secret|client[_-]?secret|bearer|authorization|credentials?|cookie)"
)
_HINT = re.compile(
    r"key|token|pass|pwd|ssws|-u |secret|bearer|basic|auth|cred|cookie|[?&;](?:sig|code|x-)", re.IGNORECASE
)  # of all below
_SETTING = re.compile(rf"{_NAME}$", re.IGNORECASE)
_LIKELY = re.compile(r"(?:^|[\W_])(?:token|key|auth)$", re.IGNORECASE)  # of a secret if the value looks random
_RANDOM = re.compile(r"(?=\S*\d)(?=\S*[A-Za-z])[\w.~+/=-]{20,}")

_PREFIX = r"[A-Za-z][A-Za-z0-9]{1,11}(?:[-_.][A-Za-z0-9]{1,20}){0,2}?[-_.]"
_MIXED = r"(?=[A-Za-z]*\d)(?=[a-z\d]*[A-Z])(?=[A-Z\d]*[a-z])[A-Za-z0-9]"
_HEX = r"(?=[a-f]{0,20}\d)(?=\d{0,20}[a-f])[0-9a-f]{32,}"

# Forms of keys that services give out
_FORM = re.compile(
    r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY[A-Z ]*-----.*?(?:-----END [A-Z0-9 ]*PRIVATE KEY[A-Z ]*-----|\Z)"
    r"|(?<![^\W_])(?:"
    r"sk-(?=[\w-]*\d)[\w-]{16,}|[srp]k_(?:live|test|prod)_[^\W_]{10,}|whsec_[^\W_]{16,}"  # OpenAI, Anthropic, OpenRouter, Stripe
    r"|hf_[^\W_]{16,}|api_org_[^\W_]{16,}|gh[pousr]_[^\W_]{16,}|github_pat_\w{16,}|gl(?:pat|dt|rt|ft|cbt|ptt|oas|soat|agent)-[\w-]{16,}"
    r"|xox[a-z]-[\w-]{10,}|xapp-[\w-]{10,}|(?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16}(?![A-Z0-9])"
    r"|AIza[\w-]{30,}|ya29\.[\w-]{16,}|GOCSPX-[\w-]{16,}|1//0[\w-]{24,}"  # Google
    r"|eyJ[\w-]{8,2000}\.[\w-]{8,4000}\.[\w-]{8,}"  # a signed token (JWT)
    r"|gsk_[^\W_]{16,}|r8_[^\W_]{16,}|xai-\w{16,}|pplx-\w{16,}|nvapi-[\w-]{16,}|fw_[^\W_]{20,}|tgp_v1_[\w-]{16,}|jina_[^\W_]{16,}|wandb_v1_[^\W_]{16,}"
    r"|pypi-[\w-]{16,}|npm_[^\W_]{16,}|dckr_pat_[\w-]{16,}|do[opr]_v1_[^\W_]{16,}|dapi[0-9a-f]{32}|shp(?:at|ca|pa|ss)_[^\W_]{16,}|lin_api_[^\W_]{16,}"
    r"|SG\.[\w-]{16,100}\.[\w-]{16,}|sq0\w{3}-[\w-]{16,}|hvs\.[\w-]{16,}|figd_[\w-]{16,}|NRAK-\w{16,}|PMAK-[\w-]{16,}|ATATT3[\w=-]{16,}"
    r"|AGE-SECRET-KEY-1\w{16,}|(?:bot)?\d{8,10}:AA[\w-]{30,}|LTAI[^\W_]{16,}|GR1348941[\w-]{16,}|EAA[^\W_]{40,}|SK[0-9a-f]{32}|pat[^\W_]{14}\.[0-9a-f]{64}|dt0[a-z]\d\d\.[A-Z0-9]{24}\.[A-Z0-9]{64}"
    r"|[0-9a-f]{32}(?:-us\d{1,2}|\.[^\W_]{16})|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}:fx|[\w-]{23,28}\.[\w-]{6}\.[\w-]{27,}"
    # any other: a few letters, and after a mark what is random, of 20 letters of both cases and digits, or of 32 hex digits
    rf"|(?<!/){_PREFIX}(?:{_MIXED}{{20,}}|{_HEX})[\w.=-]*(?!/)"
    r")|hooks\.slack\.com/services/[\w/-]+|discord(?:app)?\.com/api/webhooks/[\w/-]+|webhook\.office\.com/webhookb2/[\w/@-]+",
    re.DOTALL,
)
_USERINFO = re.compile(r"(?<=://)[^/\s\"'<>:]{0,300}(?::[^/\s\"'<>]{0,300})?@(?=[\w.\[-])")
_QUERY_NAME = (
    rf"(?:{_NAME}|key|token|auth|sig|signature|code|subscription-key|x-amz-(?:signature|credential|security-token)"
    r"|x-goog-(?:signature|credential)|apikey|access_key_id)"
)
_IN_QUERY = re.compile(rf"(?<=[?&;])({_QUERY_NAME})=[^&\s\"'<>#]+", re.IGNORECASE)
_HEADER = re.compile(
    r"(authorization|(?<![\w-])x-[\w-]{0,40}(?:key|token|auth|secret)[\w-]{0,40})([\"']?[ \t]{0,9}[:=][ \t]{0,9}[\"']?)"
    r"(?:(bearer|basic|token|digest|apikey)[ \t]{1,9})?[^\s\"',;<>{}]+",
    re.IGNORECASE,
)
_COOKIE = re.compile(r"(cookie[\"']?[ \t]{0,9}:[ \t]{0,9}[\"']?)(?=[^\n\"']{0,999}=)[^\n\"']+", re.IGNORECASE)
_BEARER = re.compile(r"\b(bearer|basic|ssws|api-key)\s+(?=\S{0,200}[\d=])[\w.~+/=-]{8,}", re.IGNORECASE)
# name=value; and with a colon where the value is quoted, ends its line, or has a digit: a sentence goes on after one, too
_NAMED = re.compile(
    rf"({_NAME})([\"']?[ \t]{{0,9}}=(?!=)>?[ \t]{{0,9}}|%3[dD]|[\"'][ \t]{{0,9}}:[ \t]{{0,9}}|[ \t]{{0,9}}:[ \t]{{0,9}}(?=[\"']|\S{{0,99}}\d|\S{{1,99}}[ \t]{{0,9}}$))"
    r"(\"(?:[^\"\\\n]|\\.)+\"|'(?:[^'\\\n]|\\.)+'|[^\s\"',;&<>(){}]{3,})",
    re.IGNORECASE | re.MULTILINE,
)
_LIKELY_NAMED = re.compile(
    r"(?<![A-Za-z0-9])(token|key|auth)([\"']?[ \t]{0,9}[:=][ \t]{0,9}[\"']?)((?=[^\s\"',;&]{0,99}\d)(?=[^\s\"',;&]{0,99}[A-Za-z])[\w.~+/=-]{20,})",
    re.IGNORECASE,
)
# name value: an option of a command, what stands between marks, a password with a digit, and curl's -u
_GIVEN = re.compile(
    rf"(--(?:[\w-]{{0,20}}-)?(?:{_NAME}|token|key)[ \t]{{1,9}}(?!-)|<{_NAME}>|\bpass(?:word|phrase)[ \t]{{1,9}}(?=\S{{0,99}}\d)(?=\S{{6}})"
    r"|(?<!\S)-u[ \t]{1,9}[\w.@-]{1,99}:)[^\s<\"']{3,}",
    re.IGNORECASE,
)


def conceal(variable: str) -> None:
    """From now on hide the value of this variable, however it is called: it is sent as a key."""
    _used.add(variable)


def hidden(text: str) -> str:
    """The text without the keys that the environment holds, without what has the form of one, and without what is named as one."""
    for value in _values():
        text = text.replace(value, MASK)
    text = _USERINFO.sub(_without_password, _FORM.sub(MASK, text))
    if not _HINT.search(text):
        return text
    text = _GIVEN.sub(rf"\1{MASK}", text)
    text = _IN_QUERY.sub(rf"\1={MASK}", text)
    text = _HEADER.sub(lambda found: f"{found[1]}{found[2]}{found[3] + ' ' if found[3] else ''}{MASK}", text)
    text = _COOKIE.sub(rf"\1{MASK}", text)
    text = _BEARER.sub(rf"\1 {MASK}", text)
    text = _NAMED.sub(_without_value, text)
    return _LIKELY_NAMED.sub(rf"\1\2{MASK}", text)


def printable(text: str) -> str:
    """Text that can't steer the terminal: what a model writes may hold control characters, which are shown escaped."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def shown(text: object) -> str:
    """What may be shown of a text from anywhere: without keys, and with nothing that steers the terminal."""
    return printable(hidden(str(text)))


def hidden_in(value: Any) -> Any:
    """The same value, with `hidden` for every text in its lists and mappings, and for what stands under a key's name."""
    if isinstance(value, str):
        return hidden(value)
    if isinstance(value, Mapping):
        return {hidden(str(name)): MASK if _is_key(name, inner) else hidden_in(inner) for name, inner in value.items()}
    return [hidden_in(inner) for inner in value] if isinstance(value, list | tuple) else value


def keys_in(values: Mapping[Any, Any], before: str = "") -> Iterator[str]:
    """The dotted names of settings that hold a key or a password."""
    for name, value in values.items():
        place = f"{before}{name}"
        if isinstance(name, str) and hidden(name) != name:
            yield f"{before}{hidden(name)}"
        if isinstance(value, Mapping):
            yield from keys_in(value, f"{place}.")
        elif isinstance(value, list | tuple):
            yield from keys_in({str(number): entry for number, entry in enumerate(value)}, f"{place}.")
        elif _is_key(name, value) or (isinstance(value, str) and hidden(value) != value):
            yield place


def _is_key(name: Any, value: Any) -> bool:
    """Whether a plain value is secret by the name that it stands under."""
    if isinstance(value, bool) or not isinstance(value, str | int | bytes) or value in ("", b"") or value == MASK:
        return False
    return bool(_SETTING.search(str(name)) or (_LIKELY.search(str(name)) and _RANDOM.fullmatch(str(value))))


def _values() -> list[str]:
    """What the environment holds of keys, as it may be written: plain, in an address, in JSON, and in base64. Longest first."""
    found: set[str] = set()
    for name, value in os.environ.items():
        value = value.strip()
        known = _VARIABLE.search(name) and len(value) >= _SHORTEST and not _is_path(value)
        if not (len(value) >= _SHORTEST_USED if name in _used else known):
            continue
        found |= {value, quote(value, safe=""), json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1]}
        found.add(base64.b64encode(value.encode("utf-8", "surrogateescape")).decode())
        user = value.partition("://")[2].rpartition("@")[
            0
        ]  # of an address, whose password may be written without the rest
        if len(password := user.partition(":")[2]) >= _SHORTEST_USED:
            found.add(password)
    return sorted(found, key=len, reverse=True)


def _is_path(value: str) -> bool:
    """Whether a variable names a file with a key in it, and is none itself."""
    return value.startswith(("/", "~", ".")) and os.path.exists(os.path.expanduser(value))


def _without_password(found: re.Match[str]) -> str:
    """A user's name alone may stay, unless it is as long as a token."""
    name, colon, _ = found[0].removesuffix("@").partition(":")
    return found[0] if not colon and len(name) < 16 else f"{MASK}@"


def _without_value(found: re.Match[str]) -> str:
    value = found[3]
    if value.strip("\"'").startswith(MASK) or value in ("None", "null", "True", "False", "true", "false"):
        return found[0]
    quoted = value[0] if value[0] in "\"'" else ""
    return f"{found[1]}{found[2]}{quoted}{MASK}{quoted}"
