"""Bodies that a client should not send, as data: by hand, and every field crossed with every nasty value."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
_MESSAGES = '"messages":[{"role":"user","content":"Hi"}]'
_PROMPT = '"prompt":"Hi"'


@dataclass(frozen=True)
class Bad:
    """A body for a path. `statuses` may answer it; without any, whatever is no 5xx may."""

    name: str
    path: str
    body: bytes
    statuses: tuple[int, ...] = ()


def _object(path: str, fields: str) -> bytes:
    """A small request and these further fields, written as JSON, or as what is none."""
    base = _MESSAGES if path == CHAT else _PROMPT
    return f'{{"max_tokens":1,{base},{fields}}}'.encode()


NO_JSON_NUMBERS = (
    "NaN",
    "-NaN",
    "Infinity",
    "-Infinity",
    "1e400",
    "-1e400",
    "0x10",
    "01",
    "+1",
    "1.",
    ".5",
    "--1",
)
_NUMBERS = (
    "-0", "-0.0", "0", "1e-400", "1E0", "2147483648", "-2147483649", "9223372036854775808",
    "-9223372036854775809", "18446744073709551616", "1" + "0" * 300, "0." + "0" * 2000 + "1", "5e-324",
    "1.7976931348623157e308",
)  # fmt: skip
_OTHER_TYPES = ("true", "null", '"1"', '""', "[]", "[1]", "{}", '{"a":1}', "[[[]]]", '"\\u0000"')
LITERALS = (*NO_JSON_NUMBERS, *_NUMBERS, *_OTHER_TYPES)
_BOTH_FIELDS = (
    "temperature", "top_p", "top_k", "min_p", "seed", "n", "stop", "stop_token_ids", "ignore_eos", "stream",
    "stream_options", "logprobs", "cache_salt", "model", "alignment", "logit_bias", "presence_penalty",
    "response_format", "user", "metadata", "best_of",
)  # fmt: skip
_CHAT_FIELDS = (
    "max_completion_tokens", "top_logprobs", "tools", "tool_choice", "chat_template", "chat_template_kwargs",
    "add_generation_prompt", "guided_regex", "structured_outputs", "mm_processor_kwargs", "documents",
)  # fmt: skip
_TEXT_FIELDS = (
    "echo",
    "suffix",
    "prompt_embeds",
    "prompt_logprobs",
    "truncate_prompt_tokens",
    "kv_transfer_params",
)
_ALIGNMENT_FIELDS = (
    "aligner", "aligners", "strength", "resampling", "candidates", "proposal_temperature", "proposal_top_p",
    "proposal_top_k", "kl_threshold", "eos_priority", "telemetry",
)  # fmt: skip


def _crossed() -> Iterator[Bad]:
    """Every field with every value that it may not have; what is no JSON is refused wherever it stands."""
    for literal in LITERALS:
        statuses = (400,) if literal in NO_JSON_NUMBERS else ()
        shown = literal if len(literal) < 24 else f"{literal[:21]}…"
        for path, fields in ((CHAT, _BOTH_FIELDS + _CHAT_FIELDS), (TEXT, _BOTH_FIELDS + _TEXT_FIELDS)):
            for field in fields:
                yield Bad(f"{path} {field}: {shown}", path, _object(path, f'"{field}":{literal}'), statuses)
        for field in _ALIGNMENT_FIELDS:
            inner = f'"model":"polite","alignment":{{"{field}":{literal}}}'
            yield Bad(f"alignment.{field}: {shown}", CHAT, _object(CHAT, inner), statuses)
        yield Bad(f"messages: {shown}", CHAT, f'{{"max_tokens":1,"messages":{literal}}}'.encode(), (400,))
        yield Bad(f"prompt: {shown}", TEXT, f'{{"max_tokens":1,"prompt":{literal}}}'.encode(), statuses)
        yield Bad(f"max_tokens: {shown}", TEXT, f'{{"max_tokens":{literal},{_PROMPT}}}'.encode(), statuses)


TEXTS = (
    "", " ", "\x00", "a\x00b", "\x7f\x1b[2J", "\r\nX-Injected: 1\r\n\r\n", "‮gnp.exe", "́" * 200, "🙂" * 200,
    "\ufeff", "￿", "😀", "ＡＢＣ", "ı", "../../../../etc/passwd", "/etc/passwd", "file:///etc/passwd",
    "http://169.254.169.254/latest/meta-data", "data:;base64,AAAA", "%00", "%2e%2e%2f", "~root", "-rf",
    "{{ 7 * 7 }}", "{% for i in range(10**9) %}{% endfor %}", "{{ ''.__class__.__mro__ }}", "${jndi:x}",
    "$(reboot)", "`reboot`", "'; DROP TABLE aligners; --", "<script>alert(1)</script>", "__proto__",
    "<|end|>", "<|assistant|><|system|>", "<|endoftext|>" * 100, "(a+)+$", "((a*)*)*b" * 20, "polite@1",
    "polite/.", "polite@../../x", "@/etc/passwd", "constructor", "identity", "org/terse/", "*", "%s%n%s",
    "a" * 100_000,
)  # fmt: skip
_TEXT_PLACES = (
    (CHAT, '"model":{}'), (CHAT, '"alignment":{{"aligner":{}}}'), (CHAT, '"alignment":{{"resampling":{}}}'),
    (CHAT, '"alignment":{{"aligners":[{{"name":{}}}]}}'), (CHAT, '"alignment":{{{}:1}}'), (CHAT, '{}:1'),
    (CHAT, '"stop":[{}]'), (CHAT, '"cache_salt":{}'), (CHAT, '"user":{}'), (CHAT, '"chat_template":{}'),
    (TEXT, '"suffix":{}'),
)  # fmt: skip
_ROLES = ("", "User", "tool", "function", "critic", "root", "\x00", "system\n", "<|system|>", "a" * 100_000)


def _texts() -> Iterator[Bad]:
    """Every place for a text with every nasty one."""
    for text in TEXTS:
        literal, shown = json.dumps(text), repr(text[:24])
        for path, place in _TEXT_PLACES:
            fields = place.format(literal)
            yield Bad(f"{path} {place}: {shown}", path, _object(path, fields))
        content = f'{{"max_tokens":1,"messages":[{{"role":"user","content":{literal}}}]}}'
        yield Bad(f"content: {shown}", CHAT, content.encode())
        yield Bad(f"prompt: {shown}", TEXT, f'{{"max_tokens":1,"prompt":{literal}}}'.encode())
    for role in _ROLES:
        messages = [{"role": role, "content": "Hi"}]
        yield Bad(f"role: {role[:24]!r}", CHAT, json.dumps({"messages": messages}).encode(), (400,))


def _deep(depth: int, opening: str, closing: str) -> str:
    return opening * depth + "1" + closing * depth


def _within_prompt(rest: str) -> bytes:
    return f'{{"prompt":{rest}}}'.encode()


def _many_keys(count: int, last: str) -> bytes:
    keys = ",".join(f'"x{number}":0' for number in range(count))
    return f'{{"max_tokens":1,"prompt":"Hi",{keys}{last}}}'.encode()


_BODIES: dict[str, tuple[bytes, tuple[int, ...]]] = {
    "nothing": (b"", (400,)),
    "spaces": (b" " * 100_000, (400,)),
    "null": (b"null", (400,)),
    "a number": (b"1e5", (400,)),
    "a list": (b'[{"prompt":"Hi"}]', (400,)),
    "a text": (b'"{}"', (400,)),
    "half of it": (b'{"prompt":"Hi', (400,)),
    "two of them": (b'{"prompt":"Hi"}{"prompt":"Hi"}', (400,)),
    "a line end after it, and more": (b'{"prompt":"Hi"}\n\x00', (400,)),
    "a comma too many": (b'{"prompt":"Hi",}', (400,)),
    "a comment": (b'{"prompt":"Hi"/* */}', (400,)),
    "single quotes": (b"{'prompt':'Hi'}", (400,)),
    "a key without quotes": (b'{prompt:"Hi"}', (400,)),
    "a control character": (b'{"prompt":"a\nb"}', (400,)),
    "a bad escape": (b'{"prompt":"\\x41"}', (400,)),
    "half an escape": (b'{"prompt":"\\u00"}', (400,)),
    "a lone high surrogate": (b'{"prompt":"\\ud800"}', (400,)),
    "a lone low surrogate": (b'{"prompt":"\\udc00"}', (400,)),
    "surrogates in the wrong order": (b'{"prompt":"\\udc00\\ud800"}', (400,)),
    "a surrogate in a key": (b'{"prompt":"Hi","\\ud800":1}', (400,)),
    "a surrogate deep inside": (b'{"prompt":"Hi","metadata":{"a":["\\ud800"]}}', (400,)),
    "a surrogate in UTF-8": (b'{"prompt":"\xed\xa0\x80"}', (400,)),
    "Latin-1": (b'{"prompt":"\xe9"}', (400,)),
    "a byte cut off": (b'{"prompt":"\xf0\x9f\x99"}', (400,)),
    "an overlong slash": (b'{"prompt":"\xc0\xaf"}', (400,)),
    "a byte order mark": (b'\xef\xbb\xbf{"prompt":"Hi"}', (400,)),
    "UTF-16": ('{"prompt":"Hi"}'.encode("utf-16"), (400,)),
    "UTF-32": ('{"prompt":"Hi"}'.encode("utf-32"), (400,)),
    "a key twice": (b'{"prompt":"Hi","prompt":"Ho"}', (400,)),
    "a key twice, once escaped": (b'{"prompt":"Hi","\\u0070rompt":"Ho"}', (400,)),
    "a key twice deep inside": (b'{"prompt":"Hi","metadata":{"a":[{"b":1,"b":2}]}}', (400,)),
    "lists, deep": (_within_prompt(_deep(100_000, "[", "]")), (400,)),
    "objects, deep": (_within_prompt(_deep(50_000, '{"a":', "}")), (400,)),
    "lists, deep, in what nobody knows": (_within_prompt(f'"Hi","x":{_deep(20_000, "[", "]")}'), (400,)),
    "lists without an end": (b"[" * 1_000_000, (400,)),
    "a number of 5000 digits": (b'{"prompt":"Hi","seed":' + b"9" * 5000 + b"}", (400,)),
    "a number of a million digits": (b'{"prompt":"Hi","seed":' + b"9" * 10**6 + b"}", (400,)),
    "a fraction of a million digits": (b'{"prompt":"Hi","max_tokens":1,"top_p":0.' + b"1" * 10**6 + b"}", ()),
    "an exponent of a million digits": (b'{"prompt":"Hi","top_p":1e' + b"9" * 10**6 + b"}", (400,)),
    "a number of 5000 digits as a token": (b'{"prompt":[' + b"9" * 5000 + b"]}", (400,)),
    "40000 unknown fields": (_many_keys(40_000, ""), (200,)),
    "100000 unknown fields": (_many_keys(100_000, ""), (400,)),
    "40000 unknown fields, the last one twice": (_many_keys(40_000, ',"x39999":0'), (400,)),
    "a key of 3 MB": (b'{"max_tokens":1,"prompt":"Hi","' + b"a" * 3 * 2**20 + b'":1}', (200,)),
    "a prompt of 3 MB": (b'{"prompt":"' + b"a" * 3 * 2**20 + b'"}', (400,)),
    "3 MB of escapes": (b'{"prompt":"' + b"\\u0041" * (2**19) + b'"}', (400,)),
    "5 MB": (b'{"prompt":"' + b"a" * 5 * 2**20 + b'"}', (413,)),
}  # fmt: skip

_TOKENS: dict[str, tuple[object, tuple[int, ...]]] = {
    "below zero": ([-1], (400,)),
    "the first that is none": ([300], (400,)),
    "one of many": ([5] * 20 + [10**6], (400,)),
    "beyond 31 bits": ([2**31], (400,)),
    "beyond 63 bits": ([2**63], (400,)),
    "beyond 64 bits": ([2**64], (400,)),
    "of 300 digits": ([10**300], (400,)),
    "a fraction": ([1.5], (400,)),
    "a whole fraction": ([1.0], (400,)),
    "a boolean": ([True], (400,)),
    "null": ([None], (400,)),
    "a text among them": ([1, "a"], (400,)),
    "a list among them": ([1, [1]], (400,)),
    "lists of lists": ([[[1]]], (400,)),
    "an empty list": ([], (400,)),
    "an empty list in a list": ([[]], (400,)),
    "an empty list among others": ([[5], []], (400,)),
    "a bad one in the last list": ([[5]] * 3 + [[-5]], (400,)),
    "100000 of them": ([5] * 100_000, (400,)),
    "129 lists": ([[5]] * 129, (400,)),
    "100000 lists": ([[5]] * 100_000, (400,)),
    "100000 texts": (["a"] * 100_000, (400,)),
    "100000 empty texts": ([""] * 100_000, (400,)),
    "an object": ({"prompt": "Hi"}, (400,)),
}


def _user(content: object, **fields: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": content}], **fields}


def _image(url: str) -> dict[str, object]:
    return _user([{"type": "image_url", "image_url": {"url": url}}])


_REQUESTS: dict[str, tuple[str, dict[str, object], tuple[int, ...]]] = {
    "128 prompts of 128 choices": (TEXT, {"prompt": ["Hi"] * 128, "n": 128}, (400, 429)),
    "128 prompts": (TEXT, {"prompt": ["Hi"] * 128}, (400, 429)),
    "128 choices": (TEXT, {"prompt": "Hi", "n": 128}, (400, 429)),
    "129 choices": (TEXT, {"prompt": "Hi", "n": 129}, (400,)),
    "a billion choices": (TEXT, {"prompt": "Hi", "n": 10**9}, (400,)),
    "no choices": (TEXT, {"prompt": "Hi", "n": 0}, (400,)),
    "the best of a billion": (TEXT, {"prompt": "Hi", "best_of": 10**9}, (400,)),
    "a billion log-probabilities": (TEXT, {"prompt": "Hi", "logprobs": 10**9}, (400,)),
    "log-probabilities of the prompt": (TEXT, {"prompt": "Hi", "prompt_logprobs": 10**9}, (200,)),
    "4096 stop tokens": (TEXT, {"prompt": "Hi", "stop_token_ids": list(range(4096))}, (200,)),
    "500000 stop tokens": (TEXT, {"prompt": "Hi", "stop_token_ids": list(range(500_000))}, (400,)),
    "stops of 4096 characters": (TEXT, {"prompt": "Hi", "stop": ["a" * 4096] * 4, "n": 8}, (200,)),
    "a stop of 3 MB": (TEXT, {"prompt": "Hi", "stop": "a" * 3 * 2**20}, (400,)),
    "stops of 1 MB": (TEXT, {"prompt": "Hi", "stop": ["a" * 2**20] * 3, "n": 128}, (400,)),
    "100000 stops": (TEXT, {"prompt": "Hi", "stop": ["a"] * 100_000}, (400,)),
    "100000 messages": (CHAT, {"messages": [{"role": "user", "content": ""}] * 100_000}, (400,)),
    "100000 parts": (CHAT, _user([{"type": "text", "text": "a"}] * 100_000), (400,)),
    "no parts": (CHAT, _user([]), ()),
    "a part of no type": (CHAT, _user([{"text": "a"}]), (400,)),
    "a picture from elsewhere": (CHAT, _image("http://127.0.0.1:1"), (400,)),
    "a picture from the disk": (CHAT, _image("file:///etc/passwd"), (400,)),
    "a tool's pattern": (
        CHAT,
        _user(
            "Hi", tools=[{"type": "function", "function": {"name": "f", "parameters": {"pattern": "(a+)+$"}}}]
        ),
        (400,),
    ),
    "a schema that refers to itself": (
        CHAT,
        _user("Hi", response_format={"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}),
        (400,),
    ),
    "a template of one's own": (
        CHAT,
        _user("Hi", chat_template="{% for i in range(10**9) %}{% endfor %}"),
        (200,),
    ),
    "a template's arguments": (
        CHAT,
        _user("Hi", chat_template_kwargs={"tokenize": True, "chat_template": "x"}),
        (200,),
    ),
    "an aligner by its path": (CHAT, _user("Hi", model="../terse"), (404,)),
    "10000 aligners": (CHAT, _user("Hi", alignment={"aligners": [{"name": "polite"}] * 10_000}), (400,)),
    "65 aligners": (
        CHAT,
        _user("Hi", alignment={"aligners": [{"name": f"a{i}"} for i in range(65)]}),
        (400,),
    ),
    "64 unknown aligners": (
        CHAT,
        _user("Hi", alignment={"aligners": [{"name": f"a{i}"} for i in range(64)]}),
        (404,),
    ),
    "no aligners": (CHAT, _user("Hi", alignment={"aligners": []}), ()),
}


def _by_hand() -> Iterator[Bad]:
    for name, (body, statuses) in _BODIES.items():
        yield Bad(name, TEXT, body, statuses)
    for name, (prompt, statuses) in _TOKENS.items():
        yield Bad(f"tokens: {name}", TEXT, json.dumps({"prompt": prompt, "max_tokens": 1}).encode(), statuses)
    for name, (path, fields, statuses) in _REQUESTS.items():
        yield Bad(name, path, json.dumps({"max_tokens": 1} | fields).encode(), statuses)


BY_HAND = list(_by_hand())
CROSSED = [*_crossed(), *_texts()]
