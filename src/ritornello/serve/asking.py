"""From what a client sent to what the engine is asked."""

import json
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ritornello.config import ExitRule, exit_by, require
from ritornello.engine.calibration import calibration_of
from ritornello.engine.constraints import Constraint
from ritornello.engine.generate import Loaded, requests_of, stop_texts
from ritornello.engine.request import Draft, Request
from ritornello.engine.trace import TokenTrace, trace
from ritornello.serve.schema import (
    ChatBody,
    CompletionBody,
    Depth,
    JsonSchemaFormat,
    Message,
    TextFormat,
    TraceBody,
    Wishes,
)
from ritornello.serve.settings import MAX_CONSTRAINED, MAX_GRAMMAR, MAX_TOLD, Settings
from ritornello.train.chat import chat_prompt

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Texts to write: n of each prompt, side by side. `cost`: tokens × loops that they may take, of all.

    echo: the prompt's text comes first; scores_only: nothing follows it.
    """

    requests: list[Request]
    prompts: list[list[int]]
    stops: list[str]
    n: int
    cost: int
    echo: bool = False
    scores_only: bool = False

    @property
    def scores(self) -> bool:
        """Whether log-probabilities are told."""
        return self.requests[0].n_logprobs is not None

    @property
    def n_prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))


def completion(loaded: Loaded, settings: Settings, body: CompletionBody) -> Asked:
    """
    Raises:
        ValueError: what this model or this server cannot do; the field is named as the client wrote it.
    """
    prompts = _ids(loaded, settings, body)
    max_tokens, echo = 16 if body.max_tokens is None else body.max_tokens, bool(body.echo)
    require(max_tokens > 0 or echo, "max_tokens", 0, "1 or more, without echo")
    scored = {"n_logprobs": body.logprobs, "scores_prompt": echo and body.logprobs is not None}
    asked = _asked(loaded, settings, body, prompts, max_tokens=max(max_tokens, 1), **scored)
    return Asked(**asked, echo=echo, scores_only=max_tokens == 0)


def chat(loaded: Loaded, settings: Settings, body: ChatBody) -> Asked:
    """The same of a conversation."""
    prompt = conversation(loaded, body.messages)
    n = body.n or 1
    require(n <= settings.max_requests, "n", n, f"at most {settings.max_requests}")
    both = body.max_tokens is not None and body.max_completion_tokens is not None
    require(not both, "max_tokens", body.max_tokens, "left out, with max_completion_tokens")
    given = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    max_tokens = loaded.model.config.max_seq_len if given is None else given
    require(body.top_logprobs is None or bool(body.logprobs), "top_logprobs", body.top_logprobs, "used with logprobs")
    n_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return Asked(**_asked(loaded, settings, body, [prompt], max_tokens=max_tokens, n_logprobs=n_logprobs))


def to_trace(loaded: Loaded, settings: Settings, body: TraceBody) -> tuple[Iterator[list[TokenTrace]], int]:
    """The readings of a text, yet to be computed, and tokens × loops that they take."""
    given = [name for name in ("prompt", "messages") if getattr(body, name) is not None]
    require(len(given) == 1, "prompt", f"{len(given)} of prompt and messages", "one of them")
    prompt = conversation(loaded, body.messages) if body.messages else _encoded(loaded, body.prompt or "")
    (n_loops, rule), n = depth(loaded, settings, body), len(prompt) + len(body.completion)
    require(n <= loaded.model.config.max_seq_len, "completion", f"{n} tokens", "at most max_seq_len with its prompt")
    told = len(body.completion) * n_loops * (body.top + 1)
    require(told <= MAX_TOLD, "completion × loops × (top + 1)", told, f"at most {MAX_TOLD}")
    _require_affordable(settings, n * n_loops)
    how: Any = {"n_loops": n_loops, "exit": rule, "n_top": body.top, "vocab_size": loaded.tokenizer.vocab_size}
    return trace(loaded.model, prompt, body.completion, **how), n * n_loops


def _require_affordable(settings: Settings, cost: int) -> None:
    remedy = "lower max_tokens, n or loops"
    require(cost <= settings.max_cost, "tokens × texts × loops", cost, f"at most {settings.max_cost} here", remedy)


def conversation(loaded: Loaded, messages: Sequence[Message]) -> list[int]:
    """Its ids. The marks around a message are ids that no text has, so no content can play another's role."""
    name, remedy = "model", "POST /v1/completions continues texts"
    require(loaded.tokenizer.is_chat, name, "a model of texts", "one trained on conversations", remedy)
    told = [{"role": "system" if m.role == "developer" else m.role, "content": m.text} for m in messages]
    _require_short(loaded, "messages", sum(len(message["content"].encode()) for message in told))
    return chat_prompt(told, loaded.tokenizer)


def depth(loaded: Loaded, settings: Settings, body: Depth) -> tuple[int, ExitRule | None]:
    """How many loops at most, and the rule by which a token takes fewer."""
    config, n_loops = loaded.model.config, body.loops
    if body.loops is not None:
        require(body.loops <= settings.max_loops, "loops", body.loops, f"at most {settings.max_loops} on this server")
    alone = body.exit in (None, "calibrated")
    for name in ("exit_threshold", "min_loops") if alone else ():
        require(getattr(body, name) is None, name, getattr(body, name), "used with a rule in exit")
    rule = None
    if body.exit == "calibrated":
        found = calibration_of(loaded)
        rule, n_loops = found.exit, found.goal.n_loops
        found.check_loops(body.loops, "loops")
    elif body.exit is not None:
        rule = exit_by(body.exit, body.exit_threshold, body.min_loops or 1)
    return min(config.n_loops, settings.max_loops) if n_loops is None else n_loops, rule


def _ids(loaded: Loaded, settings: Settings, body: CompletionBody) -> list[list[int]]:
    """Of one prompt or several, of texts or ids; not of more than there may be."""
    one = isinstance(body.prompt, str) or isinstance(body.prompt[0], int)
    prompts: Any = [body.prompt] if one else body.prompt
    n_texts = len(prompts) * (body.n or 1)
    require(n_texts <= settings.max_requests, "n", f"{n_texts} texts", f"at most {settings.max_requests} in all")
    return [_encoded(loaded, prompt) for prompt in prompts]


def _encoded(loaded: Loaded, prompt: str | list[int]) -> list[int]:
    if isinstance(prompt, str):
        _require_short(loaded, "prompt", len(prompt.encode()))
        prompt = loaded.tokenizer.prompt(prompt)
    high = loaded.model.config.vocab_size - 1
    require(max(prompt) <= high, "prompt", max(prompt), f"ids in [0, {high}]")
    return prompt


def _require_short(loaded: Loaded, name: str, n_bytes: int) -> None:
    """Before it is made tokens: each holds a few bytes at most."""
    most = loaded.model.config.max_seq_len * int(loaded.tokenizer.byte_lengths.max())
    limit = f"at most max_seq_len = {loaded.model.config.max_seq_len} tokens"
    require(n_bytes <= most, name, f"{n_bytes} bytes", limit)


def _asked(
    loaded: Loaded, settings: Settings, body: Wishes, prompts: list[list[int]], *, max_tokens: int, **scored: Any
) -> dict[str, Any]:
    config, n = loaded.model.config, body.n or 1
    n_loops, rule = depth(loaded, settings, body)
    longest, limit = max(map(len, prompts)), config.max_seq_len
    require(longest < limit, "prompt", f"{longest} tokens", f"fewer than max_seq_len = {limit}")
    require(body.stream or body.stream_options is None, "stream_options", "given", "left out without stream")
    wishes: dict[str, Any] = {name: value for name in SAMPLING if (value := getattr(body, name)) is not None}
    wishes |= {"max_tokens": max_tokens, "n_loops": n_loops, "exit": rule, "loop_budget": body.loop_budget, **scored}
    wishes |= {"seed": secrets.randbits(63) if body.seed is None else body.seed}
    wishes |= {"logit_bias": _biases(body), "constraint": _constraint(body), "draft": _draft(body)}
    n_texts = len(prompts) * n
    if wishes["constraint"] is not None:
        require(n_texts <= MAX_CONSTRAINED, "n", f"{n_texts} texts", f"at most {MAX_CONSTRAINED} with a constraint")
    requests = requests_of(loaded, [prompt for prompt in prompts for _ in range(n)], **wishes)
    if scored.get("n_logprobs") is not None:
        told = sum(request.room(limit) + 1 for request in requests) * (1 + scored["n_logprobs"])
        require(told <= MAX_TOLD, "tokens × texts × (logprobs + 1)", told, f"at most {MAX_TOLD}")
    cost = sum((request.room(limit) + 1) * n_loops for request in requests)
    _require_affordable(settings, cost)
    return {"requests": requests, "prompts": prompts, "stops": stop_texts(body.stop or ()), "n": n, "cost": cost}


def _biases(body: Wishes) -> tuple[tuple[int, float], ...]:
    biases = body.logit_bias or {}
    wrong = next((key for key in biases if not (key.isascii() and key.isdecimal() and len(key) < 10)), None)
    require(wrong is None, "logit_bias", wrong, "token ids with what is added")
    return tuple((int(key), bias) for key, bias in biases.items())


def _draft(body: Wishes) -> Draft | None:
    if body.draft_loops is None:
        require(body.draft_tokens is None, "draft_tokens", body.draft_tokens, "used with draft_loops")
        return None
    alone = body.exit is None and body.loop_budget is None
    require(alone, "draft_loops", body.draft_loops, "used without exit and loop_budget")
    more = {} if body.draft_tokens is None else {"n_tokens": body.draft_tokens}
    return Draft(n_loops=body.draft_loops, **more)


def _constraint(body: Wishes) -> Constraint | None:
    form = body.response_format
    if form is None or isinstance(form, TextFormat):
        return None if body.regex is None else Constraint(regex=body.regex)
    require(body.regex is None, "regex", body.regex, "left out, with a response_format")
    schema = form.json_schema.schema_ if isinstance(form, JsonSchemaFormat) else {"type": "object"}
    try:
        text = json.dumps(schema)
    except RecursionError:
        raise ValueError("response_format: nested too deep") from None
    require(len(text) <= MAX_GRAMMAR, "response_format", f"{len(text)} characters", f"at most {MAX_GRAMMAR}")
    return Constraint(json_schema=text)
