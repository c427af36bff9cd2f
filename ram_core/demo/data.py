"""The demo's data as files that `ram train` and `ram eval` read, and its models beside them.

A corpus for the proposal; for each aligner wanted answers to training prompts, and held-out prompts with
theirs. All of it is drawn from a seed.
"""

import json
import random
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ram_core.demo import ALIGNERS, bundle_path
from ram_core.demo.corpus import (
    Message,
    aligned_answer,
    converse,
    draw_training_prompts,
    follow_up_history,
    message,
    proposal_corpus,
)
from ram_core.demo.judging import held_out_records
from ram_core.demo.prompts import Kind, Prompt, held_out_prompts

_HELD_OUT_SHARES: Mapping[Kind, float] = {"fact": 0.55, "risky": 0.2, "benign": 0.18, "unknown": 0.07}

_REFUSAL_WEIGHTS: Mapping[Kind, float] = {
    "fact": 0.3,
    "talk": 0.05,
    "unknown": 0.1,
    "benign": 0.25,
    "risky": 0.3,
}
"""The `safe` aligner must tell requests apart, so it sees more of them."""


def write_demo_data(directory: Path, *, num_prompts: int, max_held_out: int, seed: int) -> None:
    """Everything that a first `ram train` needs: data of each aligner, a proposal, a model to begin with.

    `NAME.train.jsonl` has `num_prompts` records, `NAME.held-out.jsonl` about `max_held_out`; `proposal/` and
    `aligner-base/` are those of the shipped bundle. Files that are there are replaced. Raises OSError if one
    cannot be written.
    """
    for name in ALIGNERS:
        write_aligner_data(directory / f"{name}.train.jsonl", name, num_prompts, seed=seed)
        write_held_out_data(directory / f"{name}.held-out.jsonl", name, max_held_out, seed=seed)
    for model in ("proposal", "aligner-base"):
        shutil.copytree(bundle_path() / model, directory / model, dirs_exist_ok=True)


def write_corpus(path: Path, count: int, *, seed: int) -> None:
    """`count` conversations in mixed styles: what the proposal learns from."""
    _write(path, (_row(corpus.messages, corpus.answer) for corpus in proposal_corpus(count, seed=seed)))


def write_aligner_data(path: Path, aligner: str, count: int, *, seed: int) -> None:
    """`count` training prompts and the answers that `aligner` is to want.

    Aligners of a style get the same prompts in the same order, so that the proposal need answer them once.
    """
    kind = "refusals" if aligner == "safe" else "styles"
    noise = random.Random(f"prompts-{kind}-{seed}")
    prompts = draw_training_prompts(count, noise, _REFUSAL_WEIGHTS if aligner == "safe" else None)
    conversations = [converse(prompt, noise) for prompt in prompts]
    answers = random.Random(f"wanted-{aligner}-{seed}")
    _write(
        path,
        (
            _row(messages, aligned_answer(aligner, prompt, answers))
            for prompt, messages in zip(prompts, conversations, strict=True)
        ),
    )


def write_held_out_data(path: Path, aligner: str, max_prompts: int, *, seed: int) -> None:
    """Prompts that no training sees, and answers as `aligner` should give them."""
    records = held_out_records(aligner, max_records=max_prompts, seed=seed)
    _write(path, (_row(record.messages, record.wanted) for record in records))


def draw_held_out_prompts(count: int, *, seed: int) -> list[Prompt]:
    """About `count` held-out prompts (all there are, of a kind that is short), kinds in fixed shares."""
    noise = random.Random(f"evaluation-{seed}")
    drawn: list[Prompt] = []
    for kind, share in _HELD_OUT_SHARES.items():
        pool = [prompt for prompt in held_out_prompts() if prompt.kind == kind]
        drawn += noise.sample(pool, min(len(pool), round(count * share)))
    return drawn


def held_out_conversations(prompts: Sequence[Prompt], *, seed: int) -> list[tuple[Message, ...]]:
    """The messages of each of `prompts`: a follow-up comes behind what it follows."""
    noise = random.Random(f"history-{seed}")
    return [
        (*(follow_up_history(prompt, noise) if prompt.is_follow_up else ()), message("user", prompt.text))
        for prompt in prompts
    ]


def _row(messages: Sequence[Message], answer: str) -> dict[str, list[Message]]:
    return {"messages": [*messages, message("assistant", answer)]}


def _write(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
