"""What a model knows on the way, and the verdicts on the parts of the article's model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ritornello.lab import arms, cell, judging, measure, stages, text_arms
from ritornello.lab.experiments import EXPERIMENTS, ablation
from ritornello.lab.experiments.ablation import BARE, EVERY, MODEL, N_AHEAD, PARTS, Ablation, farthest
from ritornello.lab.measure import Questions, Row, accuracy
from ritornello.lab.tasks import TASKS
from ritornello.recipes import find_model
from tests.lab.small_text import install, shrunk

TASK = TASKS["chains"]
YES = "holds"
ON = ("training hops", "hops beyond")
CARRIES = "article model: the {} carries the walk on, as a linear map reads it"


def as_if_trained(each: cell.Cell) -> cell.Trained:
    """Nothing here hangs on what was learnt."""
    facts: dict[str, Any] = {"steps": 0, "seconds": 0.0, "flops": 1.0, "peak_bytes": 1, "loss": None}
    return cell.Trained(cell=each, model=cell.build(each).eval(), **facts)


def tiny(arm: str) -> cell.Cell:
    return arms.cell(arm, TASK, seed=0, masked=True)


def test_stages_end_where_the_model_does() -> None:
    model = cell.build(tiny(MODEL)).eval()
    tokens = torch.from_numpy(measure.problems(TASK, 3, told=False, n=2).tokens)
    with torch.no_grad():
        found, out = stages.states(model, tokens, 2), model(tokens, n_loops=2)
    assert list(found) == ["embedding", "prelude", "loop 1", "loop 2", "coda"]
    assert torch.equal(found["coda"], out.hidden) and not torch.equal(model.norm(found["loop 2"]), out.hidden)


def test_a_model_without_a_coda_loses_nothing_by_skipping_it() -> None:
    model = cell.build(tiny("article-no-coda"))
    questions = Questions.of(model, TASK, (1, 3), n=8)
    found = stages.skipping(model, questions, 4)
    assert found["coda"] == accuracy(model, questions, (4,))[4] and found["loop"] == found["loop and coda"]


def test_what_the_shipped_model_knows_on_the_way() -> None:
    found = cell.load(find_model("chains-moe"))
    how: dict[str, Any] = {"hops": 20, "n_loops": 2, "n_ahead": 4, "n_problems": 64}
    by_stage = stages.reached(found.model, TASK, **how)
    assert by_stage["embedding"][0] > 0.9 > 0.2 > by_stage["embedding"][1]
    assert by_stage["prelude"][1] > 0.8 > 0.2 > by_stage["prelude"][2]
    assert by_stage["loop 2"][3] > 0.8 > 0.2 > by_stage["coda"][4]
    untrained = stages.reached(cell.build(found.cell), TASK, **how)
    assert untrained["prelude"][1] < 0.2 < untrained["prelude"][0]


def changed(one: cell.Cell, other: cell.Cell) -> set[str]:
    return {name for name, x in vars(one.model).items() if x != vars(other.model)[name]}


def test_each_arm_changes_what_its_name_says() -> None:
    names = {arm: changed(tiny(arm), tiny(MODEL)) for arm in PARTS}
    assert names["article-no-lora"] == {"lora_rank"} and names["article-no-halting"] == {"halting"}
    assert names["article-no-injection"] == {"injection", "initial_state"}
    assert names[BARE] == {"n_prelude_layers", "n_coda_layers"}
    assert names["article-dense-active"] == {"n_experts", "n_active_experts", "n_shared_experts", "expert_dim"}
    assert all(tiny(arm).train == tiny(MODEL).train for arm in EVERY)


def test_models_are_shared_with_the_other_experiments() -> None:
    shared = {
        name: {each.name for each in EXPERIMENTS[name].cells("full")}
        for name in ("depth-extrapolation", "routing", "ablation")
    }
    assert len(shared["routing"] & shared["ablation"]) == 12 and len(shared["ablation"]) == 9 * (3 + 5)
    assert len(shared["depth-extrapolation"] & shared["ablation"] & shared["routing"]) == 3


def test_rows_are_measured_judged_and_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "N_QUESTIONS", 2)
    monkeypatch.setattr(ablation, "HOPS", (1, 2, 3, 5, 8, 10, 15, 20))
    monkeypatch.setattr(ablation, "N_PROBLEMS", 2)
    experiment = Ablation()
    rows = [row for arm in (MODEL, BARE) for row in experiment.measure(as_if_trained(tiny(arm)))]
    assert [len(found) for found in experiment.show(rows)] == [4, 1]
    verdicts = experiment.judge(rows)
    assert len(verdicts) == 7 and {verdict.outcome for verdict in verdicts} == {"inconclusive"}
    assert len(experiment.judge([row for row in rows if row["model"] == BARE])) == 1


def test_on_text_each_arm_changes_what_its_name_says() -> None:
    of = {arm: ablation.TRIALS["text"].cell(arm, 0) for arm in EVERY}
    on_chains = {arm: changed(tiny(arm), tiny(MODEL)) for arm in EVERY}
    on_chains["article-no-injection"] -= {"initial_state"}  # every loop starts from e here
    assert {arm: changed(each, of[MODEL]) for arm, each in of.items()} == on_chains
    tuned = {arm: text_arms.OTHER_RATES.get(arm, text_arms.ARTICLE_LR) for arm in EVERY}
    assert all(each.train == replace(of[MODEL].train, lr=tuned[arm]) for arm, each in of.items())
    looped = text_arms.cell("rdt", seed=0)
    assert of[MODEL].train == replace(looped.train, steps=ablation.TEXT_STEPS, lr=text_arms.ARTICLE_LR)
    assert {"input_init", "initial_state", "dim", "n_heads"}.isdisjoint(changed(looped, of[MODEL]))


def test_text_is_measured_judged_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch)
    experiment, trial = Ablation(), ablation.TRIALS["text"]
    found = [as_if_trained(shrunk(trial.cell(arm, 0))) for arm in (MODEL, BARE)]
    rows = [row for each in found for row in experiment.measure(each)]
    verdicts = experiment.judge(rows)
    assert [verdict.claim for verdict in verdicts] == [
        f"prelude with coda: {claim} on the held-out text" for claim in ("earns its place", "is a burden")
    ]
    assert {verdict.outcome for verdict in verdicts} == {"inconclusive"}
    assert "depth mask" not in verdicts[0].scale
    tables, _ = experiment.show(rows)
    assert [table.title for table in tables][-2:] == ["Bits per byte of held-out text", "What the arms cost on text"]


def text_made_up(bits: dict[str, float], trigram: float = 2.6) -> list[Row]:
    rows: list[Row] = []
    for seed in range(5):
        for arm in EVERY:
            base = {"task": "text", "model": arm, "seed": seed, "total": 1, "loops": 4}
            rows.append(base | {"metric": "bpb", "value": bits.get(arm, 2.2) + 0.001 * seed})
        rows.append(base | {"model": MODEL, "metric": "trigram", "value": trigram})
    return rows


def test_fewer_bits_are_better() -> None:
    without = {"article-no-coda": 2.25, "article-no-lora": 2.15, "article-no-halting": 2.203, "article-no-prelude": 2.7}
    found = outcomes(text_made_up(without))
    said = {
        name: tuple(found[f"{name}: {claim} on the held-out text"] for claim in ("earns its place", "is a burden"))
        for name in ("coda", "LoRA", "halting", "prelude")
    }
    assert said["coda"] == (YES, "does not hold") and said["LoRA"] == ("does not hold", YES)
    assert said["halting"] == ("does not hold", "does not hold")
    assert said["prelude"] == (YES, "inconclusive")  # worse than trigrams without
    assert set(outcomes(text_made_up(without, trigram=2.1)).values()) == {"inconclusive"}


def test_an_arm_that_is_not_finite_is_shown_and_not_judged() -> None:
    rows = text_made_up({})
    for row in rows:
        row["value"] = None if row["model"] == "article-no-lora" else row["value"]
    found = [verdict for verdict in Ablation().judge(rows) if verdict.claim.startswith("LoRA")]
    assert {verdict.outcome for verdict in found} == {"inconclusive"} and "– ()" in found[0].evidence


def made_up(training: dict[str, float], beyond: dict[str, float], reached: dict[str, int]) -> list[Row]:
    """Three seeds; what is not said is as in the article model, .95 and .6. reached: by stage, on all seeds."""
    rows: list[Row] = []
    for seed in range(3):
        for arm in EVERY:
            base = {"task": "chains", "model": arm, "seed": seed, "total": 1}
            for hops in ablation.HOPS:
                value = training.get(arm, 0.95) if hops <= 5 else beyond.get(arm, 0.6)
                here = base | {"hops": hops, "metric": "accuracy", "value": value + 0.001 * seed}
                rows += [here | {"loops": loops} for loops in ablation.LOOPS]
            for stage, far in ({"embedding": 0, "prelude": 1, "loop 3": 4, "coda": 4} | reached).items():
                here = base | {"metric": "probe", "stage": stage, "of": "trained"}
                rows += [here | {"ahead": k, "value": 0.9 if k == far else 0.03} for k in range(N_AHEAD + 1)]
            rows.append(base | {"metric": "accuracy_skipped", "skipped": "coda", "hops": 5, "value": 1.0})
    return rows


def outcomes(rows: list[Row]) -> dict[str, str]:
    return {verdict.claim: verdict.outcome for verdict in Ablation().judge(rows)}


def test_parts_are_judged_by_their_rule() -> None:
    found = outcomes(
        made_up(
            training={"article-no-injection": 0.5, "article-no-coda": 0.8},
            beyond={"article-no-lora": 0.9, "article-no-prelude": 0.3, "article-no-coda": 0.9},
            reached={},
        )
    )
    earns, burdens = (
        {(part, on): found[f"{part}: {claim} on the {on}"] for part in PARTS.values() for on in ON}
        for claim in ("earns its place", "is a burden")
    )
    won = {("injection", ON[0]), ("coda", ON[0]), ("prelude", ON[1])}
    assert {what for what, outcome in earns.items() if outcome == YES} == won
    unknown = {("injection", ON[1]), ("coda", ON[1])}  # who does not know the training hops
    assert {what for what, outcome in earns.items() if outcome == "inconclusive"} == unknown
    assert {what for what, outcome in burdens.items() if outcome == YES} == {("LoRA", ON[1])}
    assert found["the article model works with neither prelude nor coda"] == "holds"
    assert found[CARRIES.format("prelude")] == "holds"
    assert found[CARRIES.format("coda")] == "does not hold"


def test_prelude_and_coda_can_be_judged_the_other_way() -> None:
    found = outcomes(made_up({BARE: 0.4}, {}, {"prelude": 0, "coda": 5}))
    assert found["the article model works with neither prelude nor coda"] == "does not hold"
    assert found[CARRIES.format("prelude")] == "does not hold"
    assert found[CARRIES.format("coda")] == "holds"
    assert farthest(made_up({}, {}, {"loop 3": 6}), MODEL, "loop 3") == [6, 6, 6]


def test_seeds_that_disagree_decide_nothing() -> None:
    rows = made_up({}, {}, {})
    for row in rows:
        if row.get("stage") == "prelude" and row["seed"] == 2:
            row["value"] = 0.03
        if row["model"] == BARE and row["metric"] == "accuracy":
            row["value"] = np.clip(row["value"] - 0.4 * (row["seed"] == 1), 0, 1)
    found = outcomes(rows)
    assert found[CARRIES.format("prelude")] == "inconclusive"
    assert found["the article model works with neither prelude nor coda"] == "inconclusive"
    assert found["prelude with coda: earns its place on the training hops"] == "inconclusive"


def test_another_task_brings_its_own_margin() -> None:
    lower, higher = [0.50, 0.51, 0.52], [0.55, 0.56, 0.57]
    assert judging.is_better(higher, lower)[0] == "does not hold"
    assert judging.is_better(higher, lower, margin=0.02)[0] == "holds"
