import numpy as np
import pytest

from ritornello.config import TrainConfig
from ritornello.train.depth import Counts, mean_at, sample

KINDS = ("fixed", "uniform", "poisson", "lognormal_poisson")


def config(depth: str, **changes: object) -> TrainConfig:
    return TrainConfig(**{"depth": depth, "mean_loops": 6.0, "min_loops": 1, "max_loops": 16, **changes})


def many(train: TrainConfig, *, n_steps: int = 200, n: int = 64) -> Counts:
    return np.stack([sample(train, step=step, n_sequences=n) for step in range(n_steps)])


@pytest.mark.parametrize("depth", KINDS)
def test_a_function_of_seed_and_step_within_its_limits(depth):
    train = config(depth, min_loops=2, max_loops=9)
    counts = sample(train, step=7, n_sequences=48)
    assert counts.shape == (48,) and counts.dtype == np.int64
    assert counts.min() >= 2 and counts.max() <= 9
    np.testing.assert_array_equal(counts, sample(train, step=7, n_sequences=48))
    if depth != "fixed":
        assert (counts != sample(train, step=8, n_sequences=48)).any()
        assert (counts != sample(config(depth, min_loops=2, max_loops=9, seed=1), step=7, n_sequences=48)).any()


def reference(depth: str, n: int) -> Counts:
    """Draws of numpy's own distributions."""
    rng = np.random.default_rng(1)
    match depth:
        case "uniform":
            return rng.integers(1, 17, n)
        case "poisson":
            return np.clip(rng.poisson(6.0, n), 1, 16)
    rate = np.exp(rng.normal(np.log(5.0) - 0.5**2 / 2, 0.5, n))
    return np.clip(1 + rng.poisson(rate), 1, 16)


def distance(a: Counts, b: Counts) -> float:
    """The largest difference between the two distribution functions."""
    return max(abs(float((a <= k).mean() - (b <= k).mean())) for k in range(1, 17))


@pytest.mark.parametrize("depth", ("uniform", "poisson", "lognormal_poisson"))
def test_distribution_is_the_named_one(depth):
    counts = many(config(depth))
    assert distance(counts, reference(depth, 400_000)) < 0.005
    assert distance(counts + 1, reference(depth, 400_000)) > 0.05
    assert distance(counts[:, :1], reference(depth, 400_000)) < 0.15  # at each place of the batch, too


@pytest.mark.parametrize("n_ranks", (2, 3, 4, 8, 16))
@pytest.mark.parametrize("depth", ("uniform", "poisson", "lognormal_poisson"))
def test_ranks_carry_nearly_equal_sums(depth, n_ranks):
    def spread(counts: Counts) -> float:
        sums = counts.reshape(len(counts), n_ranks, -1).sum(-1)
        return float((sums.max(-1) - sums.min(-1)).mean() / sums.mean())

    counts = many(config(depth), n=96, n_steps=50)
    shuffled = np.random.default_rng(0).permuted(counts, axis=1)
    assert spread(counts) < 0.5 * spread(shuffled)
    if n_ranks == 2:
        assert spread(counts) < 0.01


def test_every_batch_holds_the_quantiles():
    means = many(config("poisson")).mean(axis=1)
    independent = reference("poisson", 64 * 200).reshape(200, 64).mean(axis=1)
    assert means.std() < 0.15 * independent.std()


def test_curriculum_raises_the_mean():
    train = config("poisson", depth_ramp_steps=100, min_loops=2)
    assert [mean_at(train, step=s) for s in (0, 50, 100, 500)] == [2.0, 4.0, 6.0, 6.0]
    early, late = (sample(train, step=s, n_sequences=256).mean() for s in (0, 200))
    assert early < 3 < 5.5 < late
    assert set(sample(config("uniform", depth_ramp_steps=10), step=0, n_sequences=32)) == {1}
    assert set(sample(config("fixed", depth_ramp_steps=10), step=5, n_sequences=32)) == {round(1 + 5 * 0.5)}


def test_a_mean_of_one_loop():
    assert set(sample(config("lognormal_poisson", mean_loops=1.0), step=0, n_sequences=32)) == {1}


def test_packed_documents_get_their_own_counts():
    documents = np.array([[0, 0, 0, 1, 1, 1], [2, 2, 3, 3, -1, -1], [4, 4, 4, 4, 4, 4]])
    train = config("uniform", min_loops=2)
    counts = sample(train, step=3, n_sequences=3, documents=documents)
    assert counts.shape == documents.shape
    for document in range(5):
        assert len(set(counts[documents == document])) == 1
    assert set(counts[documents < 0]) == {2}
    seen = [sample(train, step=s, n_sequences=3, documents=documents) for s in range(50)]
    assert any(c[0, 0] != c[0, 5] for c in seen)


def test_one_document_a_row_is_counted_by_row():
    documents = np.array([[0, 0, 0], [1, 1, -1]])
    train = config("poisson")
    counts = sample(train, step=3, n_sequences=2, documents=documents)
    np.testing.assert_array_equal(counts, sample(train, step=3, n_sequences=2))
