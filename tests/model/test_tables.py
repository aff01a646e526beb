"""The combinations that the contract tests run over hold every entry of every table, and every pair of entries."""

from itertools import combinations
from typing import get_args

import pytest

from ritornello import config as settings
from ritornello.model.attention import ATTENTION
from ritornello.model.halting import EXIT_TESTS, HALTING_HEADS
from ritornello.model.injection import INJECTIONS
from tests.model.builders import FACTORS, build, covering, every_kind, rules_for, tiny, tokens_for


def test_choices_are_the_tables_entries() -> None:
    assert set(get_args(settings.Attention)) == set(ATTENTION)
    assert set(get_args(settings.Injection)) == set(INJECTIONS)
    assert set(get_args(settings.Halting)) == {"none", *HALTING_HEADS, *EXIT_TESTS}
    assert set(get_args(settings.ExitName)) == {"hazard", "cumulative", *EXIT_TESTS}


def test_every_pair_of_entries_occurs() -> None:
    rows, refused = covering()
    seen = {pair for row in rows for pair in combinations(row.items(), 2)}
    entries = [(name, value) for name, values in FACTORS.items() for value in values]
    missing = {(a, b) for a, b in combinations(entries, 2) if a[0] != b[0]} - seen - set(refused)
    assert not missing
    assert len(rows) < 60


@pytest.mark.parametrize(("pair", "reason"), covering()[1].items(), ids=str)
def test_pairs_left_out(pair: tuple[tuple[str, object], tuple[str, object]], reason: str) -> None:
    """Reported as skips, so that what is not tested is seen."""
    assert reason, "refused together though neither is refused alone"
    pytest.skip(f"{dict(pair)}: {reason}")


@every_kind
def test_runs_in_every_combination(row: dict) -> None:
    model = build(row)
    out = model(tokens_for(model.config, 2, 3), n_loops=2)
    assert out.logits.isfinite().all() and out.logits.shape == (2, 3, model.config.vocab_size)
    assert rules_for(model.config)


def test_a_refused_combination_says_so() -> None:
    with pytest.raises(ValueError, match="read_out = 'mixture': must be 'last' with halting 'kl'"):
        tiny(read_out="mixture", halting="kl")
