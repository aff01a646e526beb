"""A conversation: each answer is what the whole history gives, however much of it was computed before."""

from typing import Any

import pytest
import torch

from ritornello.config import ExitRule, Recipe
from ritornello.engine.chat import Answer, Conversation
from ritornello.engine.engine import Engine
from ritornello.engine.generate import Loaded, decode
from ritornello.engine.prefixes import Prefixes
from ritornello.engine.sampling import Sampling
from ritornello.train.chat import chat_prompt
from ritornello.train.tokenizer import ByteTokenizer
from tests.model.builders import build

CHAT = ByteTokenizer(chat=True)
QUESTIONS = ("hello, who is there?", "why?", "say it again, and louder")


def small(**changes: Any) -> Loaded:
    """A float64 model, untied so that it does not just repeat itself."""
    options = {"vocab_size": 264, "max_seq_len": 256, "ffn": "dense", "tie_embeddings": False, "n_loops": 3}
    return Loaded(build(options | changes), CHAT, Recipe())


def talk(loaded: Loaded, **wishes: Any) -> Conversation:
    return Conversation(loaded, **{"max_tokens": 12, "temperature": 0.0, **wishes})


def read(answer: Answer) -> str:
    return "".join(answer.pieces)


def alone(loaded: Loaded, messages: list[Any], *, seed: int = 0, temperature: float = 0.0, **how: Any) -> list[int]:
    """The answer to all of this, computed from nothing."""
    options = {"n_new": 12, "vocab_size": CHAT.vocab_size, "sampling": Sampling(temperature=temperature, seed=seed)}
    tokens = [int(t) for t, _ in decode(loaded.model, [chat_prompt(messages, CHAT)], **options, **how)]
    end = next((i for i, token in enumerate(tokens) if token >= CHAT.eos_id), len(tokens))
    return tokens[:end]


@pytest.mark.parametrize("how", [{}, {"n_loops": 5}, {"exit": ExitRule("delta", 0.3)}], ids=["", "deeper", "exit"])
def test_an_answer_is_what_its_history_gives(how: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = small()

    def told() -> list[tuple[list[int], list[int]]]:
        conversation, found = talk(loaded, system="be brief", seed=3, temperature=1.0, **how), []
        for i, question in enumerate(QUESTIONS):
            before = conversation.messages
            answer = conversation.ask(question)
            assert read(answer) == answer.generation.text == conversation.messages[-1]["content"]
            history = [*before, {"role": "user", "content": question}]
            assert conversation.messages[:-1] == history
            found.append((answer.generation.tokens, alone(loaded, history, seed=3 + i, temperature=1.0, **how)))
        return found

    assert all(one == other for one, other in told())
    keep = Prefixes.keep

    def spoilt(self: Prefixes, keys: Any, table: Any) -> None:
        keep(self, keys, table)
        self.pages.entries.mul_(-1)

    monkeypatch.setattr(Prefixes, "keep", spoilt)
    assert any(one != other for one, other in told())  # control


def test_what_was_computed_for_a_prompt_is_not_computed_again() -> None:
    loaded, costs = small(), []
    conversation = talk(loaded, max_tokens=1)
    for question in ("x" * 100, "y", "z"):
        before = 0 if conversation._engine is None else conversation._engine.n_token_loops
        read(conversation.ask(question))
        assert conversation._engine is not None
        costs.append(conversation._engine.n_token_loops - before)
    assert costs[0] > 100 * 3 and max(costs[1:]) < 32 * 3


def test_an_answer_nobody_reads_on_is_kept_as_far_as_it_went(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = small()
    conversation = talk(loaded, max_tokens=64, seed=1, temperature=1.0)
    answer = conversation.ask(QUESTIONS[0])
    first = [next(answer.pieces), next(answer.pieces)]
    answer.pieces.close()
    assert conversation.messages[-1] == {"role": "assistant", "content": "".join(first)}
    step, left = Engine.step, [4]

    def interrupted(self: Engine) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Engine, "step", interrupted)
    answer = conversation.ask(QUESTIONS[1])
    with pytest.raises(KeyboardInterrupt):
        read(answer)
    assert conversation.messages[-1]["content"] == answer.generation.text and len(conversation.messages) == 4
    history = [*conversation.messages, {"role": "user", "content": QUESTIONS[2]}]
    answer = conversation.ask(QUESTIONS[2])
    read(answer)
    expected = alone(loaded, history, seed=3, temperature=1.0)
    assert answer.generation.tokens[: len(expected)] == expected  # it is a conversation still
    assert conversation._engine is not None and not conversation._engine.busy


def test_the_oldest_turns_make_room() -> None:
    conversation = talk(small(max_seq_len=96), system="s", max_tokens=24)
    dropped = []
    for i in range(5):
        answer = conversation.ask(f"{i}" * 20)
        dropped.append(answer.n_dropped)
        read(answer)
        prompt = chat_prompt(conversation.messages[:-1], CHAT)
        assert conversation.messages[0]["role"] == "system" and conversation.messages[-2]["content"] == f"{i}" * 20
        assert len(prompt) <= 96 - 24
    assert dropped[0] == 0 and sum(dropped) >= 3
    before = list(conversation.messages)
    with pytest.raises(ValueError, match=r"message = '10. tokens': must be fewer than max_seq_len = 96"):
        conversation.ask("x" * 100)
    assert conversation.messages == before
    conversation.reset()
    assert conversation.messages == before[:1]


def test_depth_changes_on_the_way() -> None:
    loaded = small()
    conversation = talk(loaded)
    for n in (2, 7, 1):
        conversation.n_loops = n
        messages = [*conversation.messages, {"role": "user", "content": "a"}]
        answer = conversation.ask("a")
        read(answer)
        assert answer.generation.tokens == alone(loaded, messages, n_loops=n)
        assert set(answer.generation.loops) <= {n} and conversation.n_loops == n
    for n in (0, True, 5000):
        with pytest.raises(ValueError, match="loops = "):
            conversation.n_loops = n
    assert conversation.n_loops == 1


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"system": "\ud800"}, r"system\[0\] 'content': must be valid Unicode"),
        ({"max_tokens": 0}, "max_tokens = 0"),
        ({"temperature": -1.0}, "temperature = -1.0"),
        ({"stop": ""}, "stop = ''"),
        ({"exit": ExitRule("kl", 0.1)}, "exit"),
    ],
)
def test_a_mistake_is_refused_before_the_first_question(wishes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        talk(small(), **wishes)


def test_a_model_of_texts_is_refused() -> None:
    loaded = small()
    plain = Loaded(loaded.model, ByteTokenizer(), loaded.recipe)
    with pytest.raises(
        ValueError, match=r"must be a run trained on conversations; train one with data\.format = 'chat'"
    ):
        Conversation(plain)


def test_logits_that_are_no_numbers_leave_the_history_as_it_was() -> None:
    loaded = small()
    conversation = talk(loaded)
    read(conversation.ask("a"))
    before = list(conversation.messages)
    with torch.no_grad():
        weight = loaded.model.norm.weight.clone()
        loaded.model.norm.weight.fill_(torch.nan)
    with pytest.raises(ArithmeticError, match="logits that are not numbers"):
        read(conversation.ask("b"))
    assert conversation.messages == before
    with torch.no_grad():
        loaded.model.norm.weight.copy_(weight)
    read(conversation.ask("b"))
    assert len(conversation.messages) == 4
