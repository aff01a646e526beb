"""Every outcome of the rules on made-up rows, and the whole experiment on a small text."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from ritornello.lab.experiments import parameter_efficiency
from ritornello.lab.experiments.parameter_efficiency import ParameterEfficiency
from ritornello.lab.measure import Row
from tests.lab.small_text import install, shrunk

EXPERIMENT = ParameterEfficiency()
READS = {"plain": 2.0, "plain-small": 2.2, "unrolled": 1.95} | {
    "rdt": 2.1,
    "rdt-flops": 2.1,
    "rdt-8": 2.0,
    "stem": 2.0,
    "stem-small": 2.2,
    "fixed": 2.1,
    "fixed-none": 2.1,
}


def rows(seeds: int = 3, trigram: float = 3.0, **bpb: float) -> list[Row]:
    """Made up: `bpb` at the loops that the rules name, seeds .002 apart."""
    made: list[Row] = []
    for seed in range(seeds):
        for model, value in (READS | {name.replace("_", "-"): x for name, x in bpb.items()}).items():
            at = parameter_efficiency.READ_AT.get(model, 0)
            base = {"task": "text", "model": model, "seed": seed, "loops": at, "total": 1}
            made.append(base | {"metric": "bpb", "value": value + 0.002 * seed * (model not in ("plain", "stem"))})
            made.append(
                base | {"metric": "nats", "value": 1.5 * (value + 0.002 * seed * (model not in ("plain", "stem")))}
            )
            made += [base | {"metric": "trigram", "value": trigram}] if model == "plain" else []
    return made


def outcome(claim: str, found: Sequence[Row]) -> str:
    (verdict,) = [verdict for verdict in EXPERIMENT.judge(found) if verdict.claim == claim]
    return verdict.outcome


REACHES = "looped, 0.59 of the parameters: as good as plain"
CLOSES = "looped, 0.59 of the parameters: better than plain, 0.59 of the parameters"
STEM = "looped, 0.59 of the parameters: better than plain with the looped model's stem, 0.59 of the parameters"
UNROLLED = "looped, always 4 loops: worse than as many layers as its loops unroll to"
CARRY = "At a fixed depth of 4 loops a model is better without injection"


@pytest.mark.parametrize(
    ("claim", "found", "expected"),
    [
        (REACHES, rows(rdt=2.0), "holds"),
        (REACHES, rows(), "does not hold"),
        (REACHES, rows(rdt=2.0, plain_small=2.001), "not tested at this scale"),  # size is worth nothing
        (REACHES, rows(rdt=2.0, plain_small=2.008), "inconclusive"),
        (REACHES, rows(rdt=2.007), "inconclusive"),
        (CLOSES, rows(), "holds"),
        (CLOSES, rows(rdt=2.3), "does not hold"),
        (CLOSES, rows(plain_small=2.0), "inconclusive"),  # two plain models level: a share of nothing
        (UNROLLED, rows(), "holds"),
        (UNROLLED, rows(fixed=1.96), "does not hold"),
        (STEM, rows(), "holds"),
        (STEM, rows(rdt=2.3), "does not hold"),
        (STEM, rows(stem=2.2), "inconclusive"),
        (CARRY, rows(fixed_none=2.0), "holds"),
        (CARRY, rows(), "does not hold"),
        *((claim, rows(2), "inconclusive") for claim in (REACHES, CLOSES, STEM, UNROLLED, CARRY)),
        *((claim, rows(trigram=1.5), "inconclusive") for claim in (REACHES, CLOSES, STEM, UNROLLED, CARRY)),
    ],
)
def test_judges_by_its_rule(claim: str, found: list[Row], expected: str) -> None:
    assert outcome(claim, found) == expected


def test_says_the_share_of_the_gap() -> None:
    (verdict,) = [verdict for verdict in EXPERIMENT.judge(rows()) if verdict.claim == CLOSES]
    assert "share of the gap +0.495 [+0.495, +0.495]" in verdict.evidence  # .1 of 2.202 - 2, the gap's mean


def test_any_part_of_a_run_can_be_judged_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch)
    monkeypatch.setattr(parameter_efficiency, "LOOPS", (1, 4, 8))
    cells = [shrunk(cell) for cell in EXPERIMENT.cells("full") if cell.seed < 2]
    assert [cell.arm for cell in cells[:10]] == list(parameter_efficiency.MODELS)
    parts = [EXPERIMENT.run(cell, tmp_path) for cell in cells[:12]]
    for n in range(1, len(parts) + 1):
        some = [row for part in parts[:n] for row in part]
        assert {verdict.outcome for verdict in EXPERIMENT.judge(some)} <= {"inconclusive"}
        if n in (1, 4, 12):
            assert all(EXPERIMENT.show(some))
    claims = [verdict.claim for verdict in EXPERIMENT.judge([row for part in parts for row in part])]
    assert len(claims) == len(set(claims)) == 14
    assert all("depth mask" not in verdict.scale for verdict in EXPERIMENT.judge(parts[0] + parts[3]))
