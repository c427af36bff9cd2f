"""Ladders of targets further and further from a proposal: read, made of one aligner, or made of any data."""

from __future__ import annotations

import json
import tomllib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from ram_core.evaluation.judges import Judge, load_judge
from ram_core.evaluation.measures import words_of
from ram_core.models.source import one_line
from ram_core.training.errors import ConfigError, DataError
from ram_core.training.records import Message, Record, read_records

STRENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
LADDER_FILE = "ladder.toml"

_LATIN = "abcdefghijklmnopqrstuvwxyz"
_SHIFTED = _LATIN[13:] + _LATIN[:13]
_GREEK = "αβχδεφγηιξκλμνοπθρστυωψζξζ"
_LIKENESS = "ram_core.evaluation.ladders:likeness"


class Rung(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One target. `aligner` is a directory or hub id, "" to look only at what the proposal offers.

    `data` is read as training data is; `judge` is a "module:attribute", "" for the run's own. `strength` None
    is the manifest's.
    """

    name: str
    data: str
    aligner: str = ""
    strength: float | None = None
    judge: str = ""


@dataclass(frozen=True)
class Target:
    """A rung, ready to be run: its records, the name that its aligner has in the bench, and its judge."""

    rung: Rung
    records: tuple[Record, ...]
    aligner: str = ""
    judge: Judge | None = None


class _Ladder(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    rung: tuple[Rung, ...] = ()


def read_ladder(path: Path) -> list[Rung]:
    """The rungs of a TOML file, one `[[rung]]` after the other; paths in it may be relative to it.

    Raises:
        ConfigError: it cannot be read, or says what cannot be.
    """
    try:
        rungs = msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), _Ladder).rung
    except OSError as error:
        raise ConfigError(f"`{path}` cannot be read: {error.strerror}") from None
    except (ValueError, msgspec.ValidationError) as error:
        raise ConfigError(f"`{path}`: {one_line(error)}") from None
    if not rungs:
        raise ConfigError(f"`{path}` has no [[rung]]")
    if len({rung.name for rung in rungs}) != len(rungs):
        raise ConfigError(f"`{path}`: two rungs have one name")

    def below(source: str) -> str:
        return str(path.parent / source) if source and (path.parent / source).exists() else source

    return [
        msgspec.structs.replace(rung, data=below(rung.data), aligner=below(rung.aligner)) for rung in rungs
    ]


def strength_rungs(aligner: str, data: str, strengths: Sequence[float] = STRENGTHS) -> list[Rung]:
    """One aligner, pulled harder and harder."""
    return [
        Rung(name=f"strength {strength:g}", data=data, aligner=aligner, strength=strength)
        for strength in strengths
    ]


def load_targets(
    rungs: Sequence[Rung], *, judge: str = "", split: str = "test", max_records: int = 0
) -> tuple[list[Target], dict[str, str]]:
    """Read what rungs name, each source once; also the aligners by the names that the bench shall give them.

    Raises:
        DataError: data that cannot be read.
        JudgeError: there is no such judge.
    """
    records = {
        source: tuple(read_records(source, split=split, max_records=max_records))
        for source in dict.fromkeys(rung.data for rung in rungs)
    }
    judges = {name: load_judge(name) for name in {rung.judge or judge for rung in rungs} if name}
    sources = dict.fromkeys(rung.aligner for rung in rungs if rung.aligner)
    names = {source: f"aligner-{number}" for number, source in enumerate(sources, 1)}
    targets = [
        Target(rung, records[rung.data], names.get(rung.aligner, ""), judges.get(rung.judge or judge))
        for rung in rungs
    ]
    return targets, {name: source for source, name in names.items()}


def write_ladder(records: Sequence[Record], directory: Path) -> Path:
    """Make a ladder of the wanted answers of `records`: a JSONL file for each of `TARGETS`, and ladder.toml.

    Its rungs have no aligners: those are trained on such files, and then named.

    Raises:
        DataError: no record has a wanted answer.
        OSError: a file cannot be written.
    """
    wanted = [record for record in records if record.wanted]
    if not wanted:
        raise DataError("no record has a wanted answer to make targets of")
    directory.mkdir(parents=True, exist_ok=True)
    lines = ['# A rung with `aligner = "DIRECTORY"` is answered, too.', ""]
    for name, turn in TARGETS.items():
        rows = [_row(record, turn) for record in wanted]
        (directory / f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")
        lines += [
            "[[rung]]",
            f'name = "{name}"',
            f'data = "{name}.jsonl"',
            f'judge = "{_LIKENESS}"',
            "",
        ]
    path = directory / LADDER_FILE
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def likeness(messages: Sequence[Message], answer: str, wanted: str) -> float | None:
    """A judge for any target: F1 of the words that an answer has in common with the wanted one."""
    if not wanted:
        return None
    ours, theirs = Counter(words_of(answer)), Counter(words_of(wanted))
    num_shared = (ours & theirs).total()
    return 2 * num_shared / max(ours.total() + theirs.total(), 1)


def _row(record: Record, turn: Callable[[str], str]) -> str:
    answer = {"role": "assistant", "content": turn(record.wanted)}
    return json.dumps({"messages": [*record.messages, answer]}, ensure_ascii=False) + "\n"


def _alphabet(letters: str) -> Callable[[str], str]:
    table = str.maketrans(_LATIN + _LATIN.upper(), letters + letters.upper())
    return lambda text: text.translate(table)


def _turn_words(text: str) -> str:
    return " ".join(word[::-1] for word in text.split(" "))


TARGETS: Mapping[str, Callable[[str], str]] = {
    "as-it-is": str,
    "lower-case": str.lower,
    "upper-case": str.upper,
    "words-turned": _turn_words,
    "letters-shifted": _alphabet(_SHIFTED),
    "another-alphabet": _alphabet(_GREEK),
}
"""What `write_ladder` does to answers: the further down, the rarer such a text is in what models read."""
