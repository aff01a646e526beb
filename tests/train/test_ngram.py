import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from ritornello.config import DataConfig
from ritornello.train.data import NO_LABEL, Rows, prepare
from ritornello.train.ngram import N_SYMBOLS, baseline, fit, gram_codes

END = N_SYMBOLS - 1
TEXTS = [b"the cat sat on the mat", b"a cat", b"the hat", b"t", b"", b"that cat that sat"]


def stream(texts: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    documents = [[*text, END] for text in texts]
    return np.concatenate(documents), np.cumsum([0, *map(len, documents)])


def slow_bits(train: list[bytes], test: list[bytes], order: int) -> list[float]:
    """Witten-Bell by dictionaries, straight from the definition."""
    counts: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)

    def grams(text: bytes) -> list[tuple[int, ...]]:
        symbols = [END] * (order - 1) + [*text, END]
        return [tuple(symbols[i : i + order]) for i in range(1, len(text) + 1)]

    for text in train:
        for gram in grams(text):
            for k in range(order):
                counts[gram[k:-1]][gram[-1]] += 1

    def probability(history: tuple[int, ...], symbol: int) -> float:
        lower = probability(history[1:], symbol) if history else 1 / N_SYMBOLS
        seen = counts[history]
        kinds = len(seen)
        return (seen[symbol] + kinds * lower) / (seen.total() + kinds) if kinds else lower

    return [-np.log2(probability(gram[:-1], gram[-1])) for text in test for gram in grams(text)]


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_bits_are_those_of_the_definition(order: int) -> None:
    model = fit(*stream(TEXTS), order=order)
    test = [b"the dog sat", b"", b"\xff", b"at that"]
    found = -np.log2(model.probability(gram_codes(*stream(test), order=order)))
    np.testing.assert_allclose(found, slow_bits(TEXTS, test, order), rtol=1e-12)
    assert not np.allclose(found, slow_bits(TEXTS[:-1], test, order))  # control


@pytest.mark.parametrize("order", [1, 3, 7])
def test_probabilities_sum_to_one(order: int) -> None:
    model = fit(*stream(TEXTS), order=order)
    rng = np.random.default_rng(0)
    histories = [rng.integers(0, N_SYMBOLS, order - 1) for _ in range(20)]
    histories += [np.array([*b"at that"[: order - 1]]), np.full(order - 1, END)]
    for history in histories:
        code = sum(int(symbol) * N_SYMBOLS ** (i + 1) for i, symbol in enumerate(history[::-1]))
        p = model.probability(code + np.arange(N_SYMBOLS))
        assert p.min() > 0
        assert abs(p.sum() - 1) < 1e-12
        assert abs(p[:-1].sum() - 1) > 1e-6  # control: one symbol fewer is no distribution


def test_documents_do_not_see_each_other() -> None:
    def bits(texts: list[bytes]) -> np.ndarray:
        return np.sort(fit(*stream(TEXTS)).probability(gram_codes(*stream(texts), order=3)))

    assert bits(TEXTS).tolist() == bits(TEXTS[::-1]).tolist()
    assert bits([b"".join(TEXTS)]).tolist() != bits(TEXTS).tolist()  # control


def test_the_order_is_bounded() -> None:
    for order in (0, 8):
        with pytest.raises(ValueError, match=f"order = {order}"):
            fit(*stream(TEXTS), order=order)


def test_targets_are_those_of_a_byte_transformer(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    texts = [f"naïve {i} cat sat on the mat {i * i}" for i in range(300)]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    data = prepare(DataConfig(source=str(path)), tmp_path / "cache")
    score = baseline(data)
    batches = list(Rows(data.validation, seq_len=16).evaluation(8))
    assert len(score.bits) == sum(int((batch.labels != NO_LABEL).sum()) for batch in batches)
    assert score.n_bytes == sum(int(batch.n_bytes.sum()) for batch in batches)
    assert 0 < score.bits_per_byte < 4 < baseline(data, order=1).bits_per_byte
    coarse = prepare(DataConfig(source=str(path), tokenizer="bpe", bpe_vocab_size=300), tmp_path / "cache")
    assert baseline(coarse).bits.tolist() == score.bits.tolist()
