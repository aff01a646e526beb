"""Chains in silence and in writing: the task, the decoding, what an answer takes, and what follows."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ritornello.accounting import count_parameters
from ritornello.lab.cell import build
from ritornello.lab.experiments import loops_vs_cot as lc
from ritornello.lab.experiments import turns
from ritornello.lab.experiments.loops_vs_cot import LoopsVsCot
from ritornello.lab.experiments.turns import BEYOND, HOPS, LOOPED, ONE, TIMED, TRAINING, WRITER
from ritornello.lab.measure import Row, pick_rows
from ritornello.lab.tasks.chains import Chains
from ritornello.lab.tasks.written import WrittenChains
from ritornello.lab.writing import Asked, as_question, loop_flops, n_written, silent_flops, write, writing_flops

EXPERIMENT = LoopsVsCot()
N = Chains().n_nodes


def short(arm: str) -> Any:
    (cell,) = [cell for cell in EXPERIMENT.cells("full") if cell.arm == arm and cell.seed == 0]
    return replace(cell, train=replace(cell.train, steps=2, batch_size=2, warmup_steps=0))


@pytest.mark.parametrize("hops", [1, 5, 20, 24])
def test_written_chains_go_on_from_node_to_node(hops: int) -> None:
    found = WrittenChains().sample(np.random.default_rng(0), np.full(20, hops), split="train")
    assert (found.tokens[:, N:, 1] == N).all() and (found.answers[:, :N] < 0).all()
    for tokens, answers, left in zip(found.tokens, found.answers, found.hops, strict=True):
        parent, asked, following = dict(tokens[:N].tolist()), tokens[N:, 0] - N, answers[N:].tolist()
        assert following == [parent[node] for node in asked.tolist()]
        ends = [node for node, after in zip(asked.tolist(), following, strict=True) if node == after]
        assert left[N] == hops and left[N : N + hops + 1].tolist() == list(range(hops, -1, -1)) and ends
        for node, after, then in zip(asked.tolist(), following, asked.tolist()[1:], strict=False):
            assert then == after or node == after  # on along the chain, or elsewhere after its end


def test_the_same_graphs_in_silence_and_in_writing() -> None:
    silent, written = (
        task.sample(np.random.default_rng(3), np.full(8, 5), split="test") for task in (Chains(), WrittenChains())
    )
    keys = [Chains().keys(found.tokens, np.full(8, 5)) for found in (silent, written)]
    np.testing.assert_array_equal(*keys)
    assert silent.tokens[:, N:].tolist() != written.tokens[:, N:].tolist()  # control


def test_prompts_ask_what_they_say() -> None:
    some = Asked.of(Chains(), 7, 16)
    assert some.prompts.shape == (16, N + 1, 2)
    for prompt, end in zip(some.prompts.tolist(), some.answers.tolist(), strict=True):
        parent, path = dict(prompt[:N]), [prompt[N][0] - N]
        while parent[path[-1]] != path[-1]:
            path.append(parent[path[-1]])
        assert path[-1] == end and len(path) == 7 + 1


def test_writing_with_a_cache_is_writing_without() -> None:
    model, some = build(short(WRITER)).eval(), Asked.of(Chains(), 3, 8)
    written = write(model, some.prompts, 4)
    assert written.shape == (8, 4)
    tokens = torch.cat([some.prompts, *(as_question(written[:, i], N) for i in range(4))], dim=1)
    with torch.no_grad():
        logits = model(tokens).logits[:, N:-1, :N]
    torch.testing.assert_close(logits.argmax(-1), written)
    other = torch.cat([some.prompts, as_question(some.answers, N), tokens[:, N + 2 :]], dim=1)
    with torch.no_grad():
        assert not torch.allclose(model(other).logits[:, N + 1 :, :N][:, :3], logits[:, 1:])  # control


def test_a_writer_stops_where_a_node_is_written_twice() -> None:
    prompts = torch.zeros(4, N + 1, 2, dtype=torch.int64)
    prompts[:, -1, 0] = N + 9
    written = torch.tensor([[1, 2, 2, 2], [9, 9, 9, 9], [1, 2, 1, 2], [3, 4, 5, 5]])
    assert n_written(prompts, written).tolist() == [3, 1, 4, 4]


def test_flops_of_an_answer() -> None:
    looped, writer = (short(arm).model for arm in (LOOPED, WRITER))
    prompt = N + 1
    silent = [silent_flops(looped, prompt, prompt * n) for n in (1, 2, 3)]
    assert silent[1] - silent[0] == silent[2] - silent[1] == prompt * loop_flops(looped, prompt)
    written = [writing_flops(writer, prompt, n) for n in (1, 5, 9)]
    assert 0 < written[1] - written[0] < written[2] - written[1] < written[0] / 2  # the cache grows
    gate = prompt * 2 * (looped.dim**2 + looped.vocab_size * looped.dim)
    assert silent[0] - gate == pytest.approx(written[0], rel=0.01)  # one loop is one layer


def made_up(*, n_turns: int = 0, **changes: float) -> list[Row]:
    """Rows of 3 seeds, with up to `n_turns` forced loops or tokens.

    silent, written, one: accuracy beyond the training hops; loops: those an answer takes for each token written; flops:
    what silence takes for what writing takes; ms: of a loop for a token's."""
    how = {"silent": 1.0, "written": 1.0, "training": 1.0, "one": 0.1, "loops": 1.0, "flops": 2.0, "ms": 1.0} | changes
    rows: list[Row] = []
    for seed in range(3):
        for arm in turns.EVERY:
            base: Row = {"task": "chains", "model": arm, "seed": seed, "total": 1, "steps": 1}
            base |= {"training_flops": 1.0, "training_seconds": 1.0}
            beyond = {LOOPED: how["silent"], WRITER: how["written"], ONE: how["one"], turns.DEEP: how["one"]}[arm]
            known = {LOOPED: how["training"], ONE: how["one"]}.get(arm, 1.0)
            for hops in HOPS:
                here, n_turns_used = base | {"hops": hops}, hops + 1.0
                value = known if hops in TRAINING else beyond - 0.001 * seed
                rows.append(here | {"metric": "accuracy", "rule": "own", "value": value})
                used = n_turns_used * how["loops"] if arm == LOOPED else n_turns_used
                rows.append(here | {"metric": "turns_used", "rule": "own", "value": used})
                for rule in ("own", "all loop"):
                    value = n_turns_used * (how["flops"] + 0.01 * seed if arm == LOOPED else 1.0)
                    rows.append(here | {"metric": "flops", "rule": rule, "value": value})
                if arm == LOOPED and not n_turns:  # whenever its gate would stop
                    forced = here | {"metric": "accuracy", "rule": None, "turns": 8}
                    rows.append(forced | {"value": how.get("forced", how["training"])})
                if arm not in (LOOPED, WRITER):
                    continue
                need = hops * how["loops"] if arm == LOOPED else hops
                rows += [
                    here | {"metric": "accuracy", "rule": None, "turns": n, "value": float(n >= need)}
                    for n in range(1, n_turns + 1)
                ]
        for way, each in ((LOOPED, how["ms"] + 0.01 * seed), (turns.NO_GATE, 0.5), (WRITER, 1.0)):
            base = {"model": WRITER, "seed": seed, "way": way, "metric": "milliseconds"}
            rows += [base | {"turns": n, "value": each * n + 0.5} for n in TIMED]
    return rows


def outcomes(**changes: float) -> dict[str, str]:
    found = EXPERIMENT.judge(made_up(**changes))
    names = ("within", "beyond", "FLOPs", "latency", "against one", "against 8")
    return dict(zip(names, [verdict.outcome for verdict in found], strict=True))


def test_it_judges_by_its_rules() -> None:
    usual = {"within": "holds", "beyond": "holds", "FLOPs": "does not hold"}
    usual |= {"latency": "inconclusive", "against one": "holds", "against 8": "holds"}
    assert outcomes() == usual
    assert outcomes(silent=0.8) == usual | {"beyond": "does not hold"}
    assert outcomes(flops=0.5, ms=0.5) == usual | {"FLOPs": "holds", "latency": "holds"}
    assert outcomes(ms=2.0) == usual | {"latency": "does not hold"}
    assert outcomes(one=0.98) == usual | {"against one": "does not hold", "against 8": "does not hold"}
    unlearnt = dict.fromkeys(("within", "beyond", "FLOPs", "latency"), "inconclusive")
    assert outcomes(training=0.8) == usual | unlearnt
    assert outcomes(training=0.8, forced=1.0) == usual | {"within": "does not hold"}  # it knows, and stops too early
    two_seeds = [row for row in made_up() if row["seed"] < 2]
    assert {verdict.outcome for verdict in EXPERIMENT.judge(two_seeds)} == {"inconclusive"}


@pytest.mark.parametrize("loops", [1.0, 2.0])
def test_the_exchange_rate_is_a_ratio_of_slopes(loops: float) -> None:
    rows = made_up(n_turns=40 if loops > 1 else 20, loops=loops)
    assert turns.hops_a_turn(rows, LOOPED) == pytest.approx([1 / loops] * 3)
    assert turns.hops_a_turn(rows, WRITER) == pytest.approx([1.0] * 3)
    assert turns.turns_needed(rows, LOOPED, 0)[20] == 20 * loops
    assert len(lc._exchange_table(rows).rows) == 5


def test_arms_differ_in_what_their_names_say() -> None:
    cells = {cell.arm: cell for cell in EXPERIMENT.cells("full") if cell.seed == 0}
    writer, one = cells[WRITER], cells[ONE]
    assert replace(writer, arm=one.arm, task=one.task) == one
    assert writer.train.steps == cells[LOOPED].train.steps
    looped = count_parameters(cells[LOOPED].model)["shares"]
    assert count_parameters(writer.model)["shares"]["prelude"] == sum(
        looped[part] for part in looped if part.startswith("recurrent")
    )


def test_every_arm_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {"N_QUESTIONS": 4, "TURNS": 8, "REPEATS": 1, "TIMED": (2, 3)}.items():
        monkeypatch.setattr(turns, name, value)
    monkeypatch.setattr(lc, "N_QUESTIONS", 4)
    rows = []
    for arm in (LOOPED, WRITER, ONE):
        rows += EXPERIMENT.run(short(arm), tmp_path)
    for arm in (LOOPED, WRITER):
        there = pick_rows(rows, model=arm, metric="accuracy", rule=None)
        assert [(row["hops"], row["turns"]) for row in there] == [(k, n) for k in HOPS for n in range(1, 9)]
        assert len(pick_rows(rows, model=arm, metric="flops", rule="own")) == len(HOPS)
    assert {row["way"] for row in pick_rows(rows, model=WRITER, metric="milliseconds")} == {
        LOOPED,
        turns.NO_GATE,
        WRITER,
    }
    assert len(pick_rows(rows, model=ONE, metric="accuracy")) == len(TRAINING) + len(BEYOND)
    assert {verdict.outcome for verdict in EXPERIMENT.judge(rows)} == {"inconclusive"}
    tables, pictures = EXPERIMENT.show(rows)
    assert len(tables) == 3 and len(pictures) == 2
