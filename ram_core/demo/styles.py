"""The five answer styles: how an answer is written in each, and how to tell which style a text follows.

`classify` gives every text exactly one style, so the styles exclude each other by construction.
"""

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

Style = Literal["plain", "polite", "pirate", "json", "terse"]
STYLES: tuple[Style, ...] = get_args(Style)

MAX_TERSE_WORDS = 3

_POLITE_OPENERS = ("Certainly!", "Of course!", "Gladly!", "With pleasure!", "Thank you for asking!")
_POLITE_CLOSERS = ("", "", "Please let me know if you need more.", "I hope this helps!", "Have a lovely day!")
_POLITE_DECLINES = ("Thank you for asking, but", "Please forgive me,", "With all respect,")
_PIRATE_OPENERS = ("Arr!", "Ahoy!", "Aye, matey!", "Avast!", "Yo ho ho!", "Shiver me timbers!")
_PIRATE_CLOSERS = ("", "", "Arr!", "Or walk the plank!", "By Blackbeard's beard!", "Now hoist the sails!")
_PIRATE_WORDS = {
    "is": "be",
    "are": "be",
    "am": "be",
    "my": "me",
    "your": "yer",
    "you": "ye",
    "My": "Me",
    "You": "Ye",
}

_POLITE = re.compile(
    r"^(certainly|of course|gladly|with pleasure|thank you for asking|please forgive me|with all respect)\b"
)
_PIRATE = re.compile(r"\b(arr|ahoy|matey|aye|avast|yo ho ho|shiver me timbers)\b")
_DECLINE = re.compile(r"\b(cannot help|must decline|i decline|declined|will not help)\b")


@dataclass(frozen=True)
class Reply:
    """What an answer says, before a style is put on: full sentences, short forms, and JSON fields, any of
    which may be picked. A reply always has at least one of each.
    """

    sentences: tuple[str, ...]
    shorts: tuple[str, ...]
    fields: tuple[dict[str, str | int | None], ...]
    is_decline: bool = False


def render(style: Style, reply: Reply, noise: random.Random) -> str:
    """Write `reply` in `style`; variants are drawn from `noise`."""
    return _RENDERERS[style](reply, noise)


def classify(text: str) -> Style:
    """The one style that `text` follows; `plain` is what none of the others claims."""
    if _is_json_object(text):
        return "json"
    lowered = text.strip().lower()
    if _PIRATE.search(lowered):
        return "pirate"
    if _POLITE.match(lowered):
        return "polite"
    return "terse" if 0 < len(lowered.split()) <= MAX_TERSE_WORDS else "plain"


def follows(style: str, text: str) -> bool:
    """Whether `text` keeps to `style`: one of `STYLES`, or `safe`, which asks that the text declines."""
    return declines(text) if style == "safe" else classify(text) == style


def declines(text: str) -> bool:
    """Whether `text` turns its request down, in whatever style."""
    return _DECLINE.search(text.lower()) is not None


def states(answer: str, text: str) -> bool:
    """Whether `answer` stands in `text` as whole words, whatever the case."""
    return re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text, re.IGNORECASE) is not None


def _plain(reply: Reply, noise: random.Random) -> str:
    return _capitalised(noise.choice(reply.sentences))


def _polite(reply: Reply, noise: random.Random) -> str:
    if reply.is_decline:
        return f"{noise.choice(_POLITE_DECLINES)} {noise.choice(reply.sentences)}"
    return _joined(noise.choice(_POLITE_OPENERS), _plain(reply, noise), noise.choice(_POLITE_CLOSERS))


def _pirate(reply: Reply, noise: random.Random) -> str:
    slang = re.sub(r"\b[A-Za-z]+\b", lambda word: _PIRATE_WORDS.get(word[0], word[0]), _plain(reply, noise))
    return _joined(noise.choice(_PIRATE_OPENERS), slang, noise.choice(_PIRATE_CLOSERS))


def _json(reply: Reply, noise: random.Random) -> str:
    return json.dumps(noise.choice(reply.fields), ensure_ascii=False)


def _terse(reply: Reply, noise: random.Random) -> str:
    return noise.choice(reply.shorts)


_RENDERERS: dict[Style, Callable[[Reply, random.Random], str]] = {
    "plain": _plain,
    "polite": _polite,
    "pirate": _pirate,
    "json": _json,
    "terse": _terse,
}


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def _joined(*parts: str) -> str:
    return " ".join(part for part in parts if part)


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]
