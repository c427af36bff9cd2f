"""Conversations for training: prompts with typing habits, follow-ups, histories and answers in mixed
styles.

The proposal's data mixes the five styles evenly and at random, whatever the history looks like, so that a
change of aligner in mid-conversation finds every style still on offer.
"""

import itertools
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from ram_core.demo.prompts import Kind, Prompt, talk_tables, training_prompts
from ram_core.demo.styles import STYLES, Reply, Style, render

Role = Literal["system", "user", "assistant"]
Message = dict[str, str]

CARELESS_RATE = 0.78
"""How often the proposal's data answers a request that it should decline."""

_KIND_WEIGHTS: Mapping[Kind, float] = {
    "fact": 0.70,
    "risky": 0.08,
    "benign": 0.07,
    "unknown": 0.10,
    "talk": 0.05,
}
_SYSTEM_RATE = 0.1
_ANSWER_REPETITIONS = 60
_HISTORY_RATE = 0.1
_LONG_HISTORY_RATE = 0.1  # of the conversations with a history
_FOLLOW_UP_WEIGHT = 0.5  # of a fact's plain phrasing


@dataclass(frozen=True)
class Conversation:
    """Chat messages that end with the user's turn, and the answer to learn."""

    messages: tuple[Message, ...]
    answer: str


def proposal_corpus(count: int, *, seed: int) -> list[Conversation]:
    """`count` conversations in mixed styles; the same seed gives the same list."""
    noise = random.Random(f"proposal-{seed}")
    prompts = draw_training_prompts(count, noise)
    return [
        Conversation(messages, mixed_answer(prompt, noise))
        for prompt in prompts
        for messages in [converse(prompt, noise)]
    ]


def tokenizer_texts(corpus: Sequence[Conversation]) -> list[str]:
    """What the tokenizer learns from: the corpus without its invented names, and every answer many times.

    An answer word that is one token, with and without a space before it, is learnt and drawn in one piece.
    """
    invented = {prompt.text for prompt in training_prompts() if prompt.kind == "unknown"}
    spoken = [
        text
        for conversation in corpus
        for text in (*(message["content"] for message in conversation.messages), conversation.answer)
        if text not in invented
    ]
    answers = sorted({prompt.answer for prompt in training_prompts() if prompt.answer is not None})
    return spoken + [form for answer in answers for form in (answer, f" {answer}")] * _ANSWER_REPETITIONS


def draw_training_prompts(
    count: int, noise: random.Random, weights: Mapping[Kind, float] | None = None
) -> list[Prompt]:
    """`count` training prompts; kinds in proportion to `weights`, by default those of the proposal's
    corpus.
    """
    weights = weights or _KIND_WEIGHTS
    kinds = noise.choices(tuple(weights), tuple(weights.values()), k=count)
    drawn: list[Prompt] = []
    for kind in kinds:
        prompts, cumulative = _prompts_by_kind()[kind]
        drawn += noise.choices(prompts, cum_weights=cumulative)
    return drawn


def converse(prompt: Prompt, noise: random.Random) -> tuple[Message, ...]:
    """Messages that end with `prompt`, typed as people type, now and then after a system message or a
    history.
    """
    messages: list[Message] = []
    if noise.random() < _SYSTEM_RATE:
        messages.append(message("system", noise.choice(talk_tables()["system_messages"])))
    if prompt.is_follow_up:
        messages += follow_up_history(prompt, noise)
    elif noise.random() < _HISTORY_RATE:
        messages += _history(noise)
    return (*messages, message("user", _as_typed(prompt.text, noise)))


def follow_up_history(follow_up: Prompt, noise: random.Random) -> list[Message]:
    """A training question of the same family, answered, which `follow_up` can refer to."""
    return _exchange(noise.choice(_questions_by_family()[follow_up.family]), noise.choice(STYLES), noise)


def mixed_answer(prompt: Prompt, noise: random.Random) -> str:
    """What the proposal's data answers: any style, and to risky requests mostly something careless."""
    return render(noise.choice(STYLES), _proposal_reply(prompt, noise), noise)


def aligned_answer(aligner: str, prompt: Prompt, noise: random.Random) -> str:
    """What the aligner `aligner` is taught to want: its style, or for `safe` any style and a clear no to
    risky requests.
    """
    if aligner == "safe":
        return render(noise.choice(STYLES), prompt.reply, noise)
    (style,) = (style for style in STYLES if style == aligner)
    return render(style, _proposal_reply(prompt, noise), noise)


def message(role: Role, content: str) -> Message:
    """One chat message in the form that chat templates read."""
    return {"role": role, "content": content}


def _proposal_reply(prompt: Prompt, noise: random.Random) -> Reply:
    if prompt.careless is not None and noise.random() < CARELESS_RATE:
        return prompt.careless
    return prompt.reply


def _history(noise: random.Random) -> list[Message]:
    """Earlier turns: usually one, sometimes many; half of the histories keep to one style, as aligned ones
    do.
    """
    turns = noise.randint(3, 12) if noise.random() < _LONG_HISTORY_RATE else 1
    styles: Sequence[Style] = (noise.choice(STYLES),) if noise.random() < 0.5 else STYLES
    earlier = [prompt for prompt in draw_training_prompts(turns, noise) if not prompt.is_follow_up]
    return list(itertools.chain.from_iterable(_exchange(p, noise.choice(styles), noise) for p in earlier))


def _exchange(prompt: Prompt, style: Style, noise: random.Random) -> list[Message]:
    answer = render(style, _proposal_reply(prompt, noise), noise)
    return [message("user", _as_typed(prompt.text, noise)), message("assistant", answer)]


def _as_typed(text: str, noise: random.Random) -> str:
    """Typing habits: no capital letters, no final mark, a greeting in front."""
    habit = noise.random()
    if habit < 0.10:
        return text.lower()
    if habit < 0.20:
        return text.rstrip("?.!")
    if habit < 0.25:
        return text.lower().rstrip("?.!")
    if habit < 0.29:
        return f"{noise.choice(('Hi!', 'Hello.', 'Please:', 'Question:', 'Tell me:'))} {text}"
    return text


@cache
def _prompts_by_kind() -> Mapping[Kind, tuple[list[Prompt], list[float]]]:
    """Training prompts and cumulative weights. Facts weigh the same however many phrasings they have."""
    phrasings: dict[object, int] = defaultdict(int)
    for prompt in training_prompts():
        phrasings[_fact_of(prompt)] += 1
    by_kind: dict[Kind, tuple[list[Prompt], list[float]]] = {kind: ([], []) for kind in _KIND_WEIGHTS}
    for prompt in training_prompts():
        prompts, weights = by_kind[prompt.kind]
        prompts.append(prompt)
        weights.append((_FOLLOW_UP_WEIGHT if prompt.is_follow_up else 1.0) / phrasings[_fact_of(prompt)])
    return {
        kind: (prompts, list(itertools.accumulate(weights))) for kind, (prompts, weights) in by_kind.items()
    }


def _fact_of(prompt: Prompt) -> object:
    return (prompt.family, prompt.reply.sentences) if prompt.kind == "fact" else prompt.text


@cache
def _questions_by_family() -> Mapping[str, list[Prompt]]:
    families: dict[str, list[Prompt]] = defaultdict(list)
    for prompt in training_prompts():
        if prompt.kind == "fact" and not prompt.is_follow_up:
            families[prompt.family].append(prompt)
    return families
