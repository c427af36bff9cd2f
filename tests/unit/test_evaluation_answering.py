"""Answering: the same prompts under many settings, each reproducibly and with its own noise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ram_core.aligners.manifest import Manifest, Term, write_manifest
from ram_core.errors import UnknownModel, VocabularyMismatch
from ram_core.evaluation.answering import Bench, Setting, alone
from ram_core.params import AlignerTerm, AlignmentParams, SamplingParams
from ram_core.training.errors import DataError
from ram_core.training.records import Record
from tests.models import make_tokenizer, save_model, save_pair

SAMPLING = SamplingParams(temperature=1.0, seed=7, max_tokens=6)
POLITE = AlignmentParams((AlignerTerm("polite"),))


def record(text: str) -> Record:
    return Record(({"role": "user", "content": text},))


RECORDS = [record(text) for text in ("the dog", "the fox", "the dog", "please")]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, str]]:
    proposal, aligners = save_pair(tmp_path_factory.mktemp("pair"))
    mixed = tmp_path_factory.mktemp("mixed")
    # Two models under one name, as a contrast of a tuned and an untuned one is.
    write_manifest(
        mixed, Manifest(name="mixed", version="1", terms=(Term("polite", 0.5), Term("terse", -0.25)))
    )
    return str(proposal), {name: str(path) for name, path in (aligners | {"mixed": mixed}).items()}


@pytest.fixture(scope="module")
def bench(pair: tuple[str, dict[str, str]]) -> Bench:
    return Bench(*pair, RECORDS, device="cpu")


def test_a_rerun_gets_the_same_answers_and_equal_prompts_get_different_ones(bench: Bench) -> None:
    once, again = (bench.answer(Setting("polite", POLITE, SAMPLING)) for _ in range(2))
    assert once.choices == again.choices
    assert once.choices[0].token_ids != once.choices[2].token_ids
    other = bench.answer(Setting("polite", POLITE, replace(SAMPLING, seed=1000)))
    assert other.texts != once.texts


def test_strength_zero_answers_as_the_proposal_alone_does_from_the_same_nucleus(bench: Bench) -> None:
    nothing = AlignmentParams((AlignerTerm("polite", 0.0),))
    ours, theirs = bench.answer(Setting("nothing", nothing, SAMPLING)), bench.answer(alone(SAMPLING))
    assert [choice.token_ids for choice in ours.choices] == [choice.token_ids for choice in theirs.choices]
    assert theirs.setting.sampling.top_p == nothing.proposal_top_p
    assert bench.answer(Setting("polite", POLITE, SAMPLING)).texts != ours.texts


def test_telemetry_has_a_step_for_each_token_and_none_for_the_proposal_alone(bench: Bench) -> None:
    aligned = bench.answer(Setting("polite", POLITE, SAMPLING))
    assert len(aligned.telemetry) == aligned.num_tokens == sum(aligned.lengths)
    assert aligned.seconds > 0
    assert bench.answer(alone(SAMPLING)).telemetry == ()


def test_an_aligner_of_several_models_is_what_its_manifest_says(bench: Bench) -> None:
    mixed = bench.resolved(AlignmentParams((AlignerTerm("mixed", 2.0),)))
    assert {term.aligner: term.strength for term in mixed.terms} == {"polite": 1.0, "terse": -0.5}


def test_answers_end_where_the_context_does(bench: Bench) -> None:
    answers = bench.answer(Setting("polite", POLITE, replace(SAMPLING, max_tokens=0, ignore_eos=True)))
    lengths = {len(prompt) + length for prompt, length in zip(bench.prompts, answers.lengths, strict=True)}
    assert lengths == {256}


def test_the_same_engine_answers_other_prompts(bench: Bench) -> None:
    other = bench.with_records(RECORDS[1:3])
    assert other.engine is bench.engine
    assert other.prompts == bench.prompts[1:3]
    assert len(bench.answer(Setting("polite", POLITE, SAMPLING)).texts) == len(RECORDS)
    with pytest.raises(DataError, match="no records"):
        bench.with_records([])


def test_unknown_aligners_are_refused(bench: Bench) -> None:
    with pytest.raises(UnknownModel, match="`rude`"):
        bench.answer(Setting("rude", AlignmentParams((AlignerTerm("rude"),)), SAMPLING))


def test_another_vocabulary_is_refused(pair: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    other = make_tokenizer(sentences=["Something else entirely, with other words."])
    stranger = save_model(tmp_path, "llama", hidden=16, layers=1, tokenizer=other)
    with pytest.raises(VocabularyMismatch, match="`stranger` cannot follow the proposal"):
        Bench(pair[0], {"stranger": str(stranger)}, RECORDS, device="cpu")


def test_nothing_to_answer_and_prompts_without_room_are_told(pair: tuple[str, dict[str, str]]) -> None:
    with pytest.raises(DataError, match="no records"):
        Bench(pair[0], {}, [], device="cpu")
    with pytest.raises(DataError, match=r"record 2: its prompt has .* and the context holds 256"):
        Bench(pair[0], {}, [RECORDS[0], record("x" * 400)], device="cpu")
