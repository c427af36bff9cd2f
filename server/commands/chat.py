"""`ram chat`: a conversation in the terminal, in which the aligner can be changed at any time."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, Any

import openai
from rich.console import Console

from ram_core.errors import RamError
from server.settings import IDENTITY

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletionMessageParam

HELP = """\
/aligner NAME  switch the aligner; without a name, the proposal alone
/aligners      list the aligners
/system TEXT   set the system message, and begin anew
/clear         begin anew
/quit          leave"""


class Conversation:
    """What was said, and who shall answer next."""

    def __init__(self, url: str, *, aligner: str = "", system: str = "") -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        self._client = openai.OpenAI(
            base_url=f"{self._url}/v1", api_key=os.environ.get("OPENAI_API_KEY") or "none", max_retries=0
        )
        self._console = Console(soft_wrap=True, highlight=False)
        self._messages: list[ChatCompletionMessageParam] = []
        self._system = system
        self._aligner = IDENTITY
        self._proposal = ""
        self._aligners: list[str] = []
        self._connect()
        if aligner:
            self._switch(aligner)
        self._clear()

    def take(self, line: str) -> bool:
        """Do what the line says, or answer it; return whether to go on."""
        command, _, rest = line.strip().partition(" ")
        match command:
            case "/quit" | "/exit":
                return False
            case "/help":
                self._say(HELP)
            case "/aligners":
                self._say(", ".join(self._aligners) or "There are none.")
            case "/aligner":
                self._switch(rest.strip() or IDENTITY)
            case "/system":
                self._system = rest.strip()
                self._clear()
            case "/clear":
                self._clear()
            case _ if command.startswith("/"):
                self._say(f"No such command: {command}\n{HELP}")
            case "":
                pass
            case _:
                self._answer(line)
        return True

    def greet(self) -> None:
        self._say(
            f"{self._proposal} at {self._url}; aligners: {', '.join(self._aligners) or 'none'}. /help helps."
        )

    def _connect(self) -> None:
        try:
            models = list(self._client.models.list())
        except openai.OpenAIError as error:
            raise RamError(f"Cannot reach {self._url}: {error} Is `ram serve` running there?") from None
        for model in models:
            if (model.model_extra or {}).get("parent"):
                self._aligners.append(model.id)
            else:
                self._proposal = model.id

    def _switch(self, name: str) -> None:
        if name != IDENTITY and name not in self._aligners:
            self._say(f"No such aligner: {name}. There are: {', '.join(self._aligners) or 'none'}")
            return
        self._aligner = name
        self._say("The proposal alone answers." if name == IDENTITY else f"{name} aligns the answers.")

    def _clear(self) -> None:
        self._messages = [{"role": "system", "content": self._system}] if self._system else []

    def _answer(self, text: str) -> None:
        self._messages.append({"role": "user", "content": text})
        try:
            answer = self._stream()
        except openai.OpenAIError as error:
            self._messages.pop()
            self._say(f"\n{error}", style="red")
            return
        self._messages.append({"role": "assistant", "content": answer})

    def _stream(self) -> str:
        began_s = time.perf_counter()
        pieces: list[str] = []
        num_tokens, summary = 0, None
        stream = self._client.chat.completions.create(
            model=self._proposal,
            messages=self._messages,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"alignment": {"aligner": self._aligner, "telemetry": True}},
        )
        with stream:
            try:
                for chunk in stream:
                    summary = (chunk.model_extra or {}).get("alignment") or summary
                    num_tokens = chunk.usage.completion_tokens if chunk.usage else num_tokens
                    for choice in chunk.choices:
                        pieces.append(choice.delta.content or "")
                        self._console.print(pieces[-1], end="", markup=False)
            except KeyboardInterrupt:
                pieces.append(" …")
        self._console.print()
        self._say(_telemetry_line(summary, num_tokens, time.perf_counter() - began_s), style="dim")
        return "".join(pieces)

    def _say(self, text: str, style: str = "") -> None:
        self._console.print(text, style=style, markup=False)


def _telemetry_line(summary: dict[str, Any] | None, num_tokens: int, elapsed_s: float) -> str:
    speed = f"{num_tokens} tokens, {num_tokens / max(elapsed_s, 1e-9):.0f}/s"
    if not summary or not summary["aligners"]:
        return f"proposal alone · {speed}"
    names = ", ".join(f"{term['name']} × {term['strength']:g}" for term in summary["aligners"])
    figures = [
        f"{label} {summary[key]:.2f}"
        for label, key in (("KL(p‖q)", "mean_kl_p_q"), ("KL(π‖p)", "mean_kl_pi_p"), ("ESS", "mean_ess"))
        if summary[key] is not None
    ]
    return " · ".join([names, summary["resampling"], speed, *figures, f"{summary['fallbacks']} fallbacks"])


def converse(conversation: Conversation) -> None:
    """Read lines until the end of input or /quit; prompts only a person."""
    is_person = sys.stdin.isatty()
    if is_person:
        conversation.greet()
    while True:
        try:
            line = input("› " if is_person else "")
        except (EOFError, KeyboardInterrupt):
            return
        if not conversation.take(line):
            return
