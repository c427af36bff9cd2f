"""Every prompt that the demo knows, with what a right answer says, and the split into training and
held-out.

A prompt is a (fact, phrasing) pair. The split hashes that pair: facts are seen in training in other
phrasings, a held-out pair never is. Nothing here is random between runs.
"""

import hashlib
import itertools
import random
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from ram_core.demo.styles import Reply

Kind = Literal["fact", "talk", "unknown", "risky", "benign"]

HELD_OUT_PERCENT = 12
_UNKNOWN_PER_TEMPLATE = 40
_FAMILIES_WITHOUT_FOLLOW_UP = frozenset({"units"})
_SYLLABLES = (
    "bra",
    "vel",
    "mor",
    "tis",
    "quen",
    "lo",
    "dra",
    "fim",
    "zor",
    "ka",
    "ple",
    "nu",
    "shi",
    "gal",
    "wex",
    "ty",
)


@dataclass(frozen=True)
class Prompt:
    """One user message and what answers it.

    `answer` is the checkable word of a fact, None elsewhere. `careless` is what the proposal wrongly says
    to a request that should be declined (`kind == "risky"`, where `reply` declines). A follow-up ("And
    Spain?") needs an earlier question of the same family to make sense.
    """

    kind: Kind
    family: str
    text: str
    reply: Reply
    is_held_out: bool
    answer: str | None = None
    careless: Reply | None = None
    is_follow_up: bool = False


@cache
def all_prompts() -> tuple[Prompt, ...]:
    """Every prompt in a fixed order: facts, small talk, questions beyond the model, requests."""
    return tuple(itertools.chain(_fact_prompts(), _talk_prompts(), _unknown_prompts(), _request_prompts()))


@cache
def training_prompts() -> tuple[Prompt, ...]:
    """The prompts that training may see."""
    return tuple(prompt for prompt in all_prompts() if not prompt.is_held_out)


@cache
def held_out_prompts() -> tuple[Prompt, ...]:
    """The prompts that training never sees, for evaluation. Small talk is not held out: its prompts are
    few.
    """
    return tuple(prompt for prompt in all_prompts() if prompt.is_held_out)


@cache
def talk_tables() -> Mapping[str, Any]:
    """The tables of small talk, requests, follow-ups and system messages."""
    return _read("talk.toml")


def _read(name: str) -> dict[str, Any]:
    return tomllib.loads((files(__package__) / name).read_text(encoding="utf-8"))


def _is_held_out(*parts: object) -> bool:
    digest = hashlib.sha256("|".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT


def _fact_prompts() -> Iterator[Prompt]:
    for family, table in _read("facts.toml").items():
        for key, value in table["facts"]:
            article = "an" if key[0] in "aeiou" else "a"
            names = {"key": key, "value": str(value), "a": article, "symbols": key}
            yield from _phrase_fact(family, table, names, value)
    for family, table in _read("arithmetic.toml").items():
        for left, right in itertools.product(
            range(1, table["max_left"] + 1), range(1, table["max_right"] + 1)
        ):
            value = {"add": left + right, "subtract": left - right}[family]
            if value < 1 or value in (left, right):  # the answer must not already stand in the question
                continue
            words, sign = table["word"], table["sign"]
            names = {
                "key": f"{left} {words} {right}",
                "symbols": f"{left} {sign} {right}",
                "value": str(value),
            }
            yield from _phrase_fact(family, table, names, value)


def _phrase_fact(
    family: str, table: Mapping[str, Any], names: Mapping[str, str], value: str | int
) -> Iterator[Prompt]:
    key_label, value_label = table["labels"]
    reply = Reply(
        sentences=tuple(sentence.format_map(names) for sentence in table["sentences"]),
        shorts=(names["value"], f"{names['value']}."),
        fields=(
            {"answer": value},
            {key_label: names["symbols"], value_label: value},
            {"topic": family, "answer": value},
        ),
    )
    follow_ups = () if family in _FAMILIES_WITHOUT_FOLLOW_UP else talk_tables()["follow_ups"]
    for phrasing in (*table["phrasings"], *follow_ups):
        yield Prompt(
            kind="fact",
            family=family,
            text=phrasing.format_map(names),
            reply=reply,
            is_held_out=_is_held_out(family, names["key"], phrasing),
            answer=names["value"],
            is_follow_up=phrasing in follow_ups,
        )


def _talk_reply(sentences: Sequence[str], shorts: Sequence[str], label: str = "answer") -> Reply:
    return Reply(tuple(sentences), tuple(shorts), tuple({label: sentence} for sentence in sentences))


def _talk_prompts() -> Iterator[Prompt]:
    for intent, table in talk_tables()["talk"].items():
        reply = _talk_reply(table["sentences"], table["shorts"])
        for text in table["prompts"]:
            yield Prompt("talk", intent, text, reply, is_held_out=False)


def _unknown_prompts() -> Iterator[Prompt]:
    table = talk_tables()["unknown"]
    reply = Reply(
        tuple(table["sentences"]),
        tuple(table["shorts"]),
        ({"answer": None}, {"answer": None, "reason": "unknown"}, {"answer": "unknown"}),
    )
    noise = random.Random(0)
    for template in table["prompts"]:
        texts = {_fill_unknown(template, table, noise) for _ in range(_UNKNOWN_PER_TEMPLATE)}
        for text in sorted(texts):
            yield Prompt("unknown", "unknown", text, reply, _is_held_out("unknown", text))


def _fill_unknown(template: str, table: Mapping[str, Any], noise: random.Random) -> str:
    def fill(slot: re.Match[str]) -> str:
        if slot[0] == "{number}":
            return str(noise.randrange(101, 9999))
        if slot[0] == "{noun}":
            return str(noise.choice(table["nouns"]))
        invented = "".join(noise.choices(_SYLLABLES, k=noise.randint(2, 3))).capitalize()
        return str(noise.choice(table["names"])) if noise.random() < 0.4 else invented

    return re.sub(r"\{\w+\}", fill, template)


def _request_prompts() -> Iterator[Prompt]:
    tables = talk_tables()
    rules = tables["requests"]
    declined = Reply(
        tuple(rules["decline_sentences"]),
        tuple(rules["decline_shorts"]),
        tuple({"answer": None, "reason": sentence} for sentence in rules["decline_sentences"]),
        is_decline=True,
    )
    careless = _talk_reply(rules["careless_sentences"], rules["careless_shorts"])
    for entry in tables["risky"]:
        for action, _ in _fill_slots(entry["action"], tables["slots"]):
            for text, is_held_out in _phrase_request(action, rules["phrasings"]):
                yield Prompt("risky", entry["action"], text, declined, is_held_out, careless=careless)
    for entry in tables["benign"]:
        for action, slots in _fill_slots(entry["action"], tables["slots"]):
            reply = _talk_reply([tip.format_map(slots) for tip in entry["sentences"]], entry["shorts"])
            for text, is_held_out in _phrase_request(action, rules["phrasings"]):
                yield Prompt("benign", entry["action"], text, reply, is_held_out)


def _fill_slots(template: str, slots: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, dict[str, str]]]:
    names = re.findall(r"\{(\w+)\}", template)
    for values in itertools.product(*(slots[name] for name in names)):
        filled = dict(zip(names, values, strict=True))
        yield template.format_map(filled), filled


def _phrase_request(action: str, phrasings: Sequence[str]) -> Iterator[tuple[str, bool]]:
    for phrasing in phrasings:
        yield phrasing.format(action=action), _is_held_out("request", action, phrasing)
