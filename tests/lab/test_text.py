"""Real text as something to train on. It has no oracle, so the contracts of tests/lab/test_tasks.py are not for it."""

from pathlib import Path

import numpy as np
import pytest

from ritornello.config import TrainConfig
from ritornello.lab import cell, reading, text_arms
from ritornello.lab.measure import pick_rows
from ritornello.lab.tasks import MATERIALS, TASKS, Split, build_task
from ritornello.lab.tasks.text import Text
from ritornello.train import ngram
from ritornello.train.data import NO_LABEL
from tests.lab.small_text import install, shrunk

ONES = np.ones(6, np.int64)


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Text:
    install(tmp_path, monkeypatch)
    return Text(seq_len=16, vocab_size=300)


def tiny(arm: str = "rdt") -> cell.Cell:
    return shrunk(text_arms.cell(arm, seed=0))


def test_windows_are_decided_by_the_seed(small: Text) -> None:
    def bits(seed: int, split: Split) -> bytes:
        return small.sample(np.random.default_rng(seed), ONES, split=split).tokens.tobytes()

    assert bits(0, "train") == bits(0, "train")
    assert bits(0, "train") != bits(1, "train")  # control


def test_every_position_asks_for_the_next_token(small: Text) -> None:
    found = small.sample(np.random.default_rng(0), ONES, split="train")
    assert found.tokens.shape == found.answers.shape == found.hops.shape == (6, 16)
    np.testing.assert_array_equal(found.tokens[:, 1:], found.answers[:, :-1])
    assert (found.tokens != found.answers).any()  # control
    assert not np.shares_memory(found.tokens, found.answers)
    text = small.dataset.train.tokens.astype(np.int64).tobytes()
    for tokens, answers in zip(found.tokens, found.answers, strict=True):
        assert np.append(tokens, answers[-1]).tobytes() in text
    assert (found.hops == 1).all() and 0 <= found.tokens.min() <= found.tokens.max() < small.vocab_size


def test_train_and_test_are_different_files(small: Text) -> None:
    names = {split: small.dataset.tokenizer.decode(part.tokens) for split, part in _parts(small).items()}
    held_out = small.dataset.held_out
    assert 0 < len(held_out) < 30
    for i in range(30):
        said, own = f"file {i}\n", f"part-{i}.txt" in held_out
        assert (said in names["test"]) == own and (said in names["train"]) != own
    found = small.sample(np.random.default_rng(0), ONES, split="test")
    there = {split: part.tokens.astype(np.int64).tobytes() for split, part in _parts(small).items()}
    assert all(row.tobytes() in there["test"] for row in found.tokens)
    assert not all(row.tobytes() in there["train"] for row in found.tokens)  # control


def _parts(text: Text) -> dict[str, object]:
    return {"train": text.dataset.train, "test": text.dataset.validation}


def test_text_is_material_but_no_task() -> None:
    assert "text" not in TASKS and MATERIALS["text"].name == "text"
    assert set(TASKS) < set(MATERIALS)
    made = build_task("text", {"seq_len": 32})
    assert isinstance(made, Text) and made.seq_len == 32
    with pytest.raises(ValueError, match="did you mean 'text'"):
        build_task("txt", {})
    with pytest.raises(ValueError, match="did you mean 'train'"):
        made.sample(np.random.default_rng(0), ONES, split="tain")  # pyrefly: ignore


def test_arms_read_the_same_windows(small: Text) -> None:
    looped, plain, later = (cell.batch(made, small, step) for made, step in _readers())
    assert (looped.tokens == plain.tokens).all() and (looped.labels == plain.labels).all()
    assert not (looped.tokens == later.tokens).all()  # control
    assert (looped.labels != NO_LABEL).all()


def _readers() -> list[tuple[cell.Cell, int]]:
    return [(tiny(), 1), (tiny("plain"), 1), (tiny(), 2)]


def test_bits_per_byte_are_those_of_the_logits(small: Text) -> None:
    import torch

    found = cell.train(tiny())
    rows = reading.reading_rows("x", found, loops=(1, 3), n=16)
    windows = small.windows(16)
    nats, n_bytes, n_tokens = 0.0, 0, 0
    for window in windows:
        with torch.no_grad():
            logits = found.model(torch.from_numpy(window.tokens), n_loops=3).logits
        labels = torch.from_numpy(window.labels)
        nats += torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
        n_tokens += int((labels != NO_LABEL).sum())
        n_bytes += len(small.dataset.tokenizer.decode_bytes(window.labels[window.labels != NO_LABEL]))
    (bpb,), (per_token,) = (pick_rows(rows, metric=metric, loops=3) for metric in ("bpb", "nats"))
    assert bpb["value"] == pytest.approx(nats / n_bytes / np.log(2), rel=1e-4)
    assert per_token["value"] == pytest.approx(nats / n_tokens, rel=1e-4)
    assert bpb["error"] > 0 and bpb["data"] == small.dataset.fingerprint
    (other,) = pick_rows(rows, metric="bpb", loops=1)
    assert other["value"] != bpb["value"]  # control
    assert {row["loops"] for row in reading.reading_rows("x", cell.train(tiny("plain")), loops=(1, 3), n=16)} == {0}


def test_trigrams_read_the_same_windows(small: Text) -> None:
    found = reading.trigram_row("x", cell.train(tiny("plain")), n=16)
    whole = ngram.window_bits(small.dataset, small.windows(16))
    assert found["value"] == pytest.approx(whole.sum() / sum(int(w.n_bytes.sum()) for w in small.windows(16)), rel=1e-5)
    assert 0 < found["value"] < 8


def test_sizes_are_what_the_names_say() -> None:
    total = {name: cell.sizes(text_arms.cell(name, seed=0))["total"] for name in text_arms.TEXT_ARMS}
    for name in ("rdt", "rdt-flops", "rdt-8", "plain-small"):
        assert total[name] / total["plain"] == pytest.approx(text_arms.RATIO, rel=2e-3)
    for name in ("stem", "stem-small"):
        assert total[name] == pytest.approx(total[name.replace("stem", "plain")], rel=2e-3)
    one, other = (text_arms.cell(name, seed=0).model for name in ("rdt", "unrolled"))
    assert other.n_layers == one.n_layers + text_arms.MEAN_LOOPS - 1 and other.ffn_dim == one.ffn_dim


def test_equal_flops_are_equal() -> None:
    def flops(name: str) -> float:
        made = text_arms.cell(name, seed=0)
        train: TrainConfig = made.train
        loops = 1.0 if made.model.is_plain else train.mean_loops
        return train.steps * cell.training_flops(made, seq_len=text_arms.TEXT.seq_len, loops=loops)

    assert flops("rdt-flops") == pytest.approx(flops("plain"), rel=2e-3)
    assert flops("rdt") > 1.05 * flops("plain")  # control
