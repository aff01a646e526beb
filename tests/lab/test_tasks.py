from itertools import islice

import numpy as np
import pytest

from ritornello.config import pick
from ritornello.lab.tasks import TASKS, Problems, Split, Task
from ritornello.lab.tasks.addition import Addition
from ritornello.lab.tasks.base import Ids, draw_split, is_test
from ritornello.lab.tasks.chains import Chains
from ritornello.lab.tasks.cyclic import Cyclic
from ritornello.lab.tasks.facts import Facts
from ritornello.lab.tasks.formulas import Formulas
from ritornello.lab.tasks.graphs import ForestTask, GraphTask
from ritornello.lab.tasks.induction import Induction
from ritornello.lab.tasks.parity import Parity
from ritornello.lab.tasks.reachability import Reachability
from ritornello.lab.tasks.s5 import PERMUTATIONS, PRODUCTS, S5WordProblem
from ritornello.lab.tasks.trees import Trees
from ritornello.lab.tasks.walks import Walks
from ritornello.lab.tasks.words import WordTask
from ritornello.train.data import NO_LABEL

VARIANTS: dict[str, Task] = {f"walks-{kind}": Walks(kind=kind) for kind in ("mixed", "out")}  # their tests differ only
every_task = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
every_variant = pytest.mark.parametrize("task", [*TASKS.values(), *VARIANTS.values()], ids=[*TASKS, *VARIANTS])
every_split = pytest.mark.parametrize("split", ["train", "test"])


def draw(task: Task, hops: Ids | list[int], *, split: Split = "train", seed: int = 0) -> Problems:
    return task.sample(np.random.default_rng(seed), np.asarray(hops), split=split)


def some_hops(task: Task) -> Ids:
    """A few rows of each of several difficulties, the hardest among them."""
    return np.repeat([1, 2, task.train_hops, task.max_hops // 2, task.max_hops - 1, task.max_hops], 4)


def score(answers: Ids, guesses: Ids) -> float:
    asked = answers != NO_LABEL
    return float((answers == guesses)[asked].mean())


def sides(task: Task, tokens: Ids, hops: Ids) -> list[bool]:
    """On which sides of the split the problems in `tokens` lie."""
    return np.unique(is_test(task.keys(tokens, hops))).tolist()


@every_variant
@every_split
def test_the_seed_decides(task: Task, split: Split) -> None:
    def bits(seed: int) -> bytes:
        found = draw(task, some_hops(task), split=split, seed=seed)
        return found.tokens.tobytes() + found.answers.tobytes() + found.hops.tobytes()

    assert bits(0) == bits(0)
    assert bits(0) != bits(1)  # control


@every_variant
@every_split
def test_the_oracle_agrees(task: Task, split: Split) -> None:
    hops = some_hops(task)
    found = draw(task, hops, split=split)
    solved = task.solve(found.tokens, hops)
    np.testing.assert_array_equal(solved, found.answers)
    place = tuple(np.argwhere(found.answers != NO_LABEL)[-1])
    solved[place] = (solved[place] + 1) % task.vocab_size
    assert 0.99 < score(found.answers, solved) < 1  # control: one wrong answer is noticed


@every_variant
@every_split
def test_shapes_and_ranges(task: Task, split: Split) -> None:
    hops = some_hops(task)
    found = draw(task, hops, split=split)
    shape = (len(hops), found.tokens.shape[1])
    assert found.answers.shape == found.hops.shape == shape
    assert found.tokens.shape == (shape if task.n_token_tables == 1 else (*shape, task.n_token_tables))
    assert {found.tokens.dtype, found.answers.dtype, found.hops.dtype} == {np.dtype(np.int64)}
    asked = found.answers != NO_LABEL
    for ids in (found.tokens, task.tell(found), found.answers[asked]):
        assert 0 <= ids.min() <= ids.max() < task.vocab_size
    assert not found.hops[~asked].any()
    assert found.hops.max(axis=1).tolist() == hops.tolist()
    assert task.train_hops <= task.max_hops


@every_task
def test_train_and_test_are_apart(task: Task) -> None:
    hops = np.repeat(np.arange(task.shared_hops + 1, task.max_hops + 1), 10)
    train, test = (draw(task, hops, split=split) for split in ("train", "test"))
    assert sides(task, train.tokens, hops) == [False]
    assert sides(task, test.tokens, hops) == [True]
    rng = np.random.default_rng(0)
    undivided = np.concatenate([task.draw(rng, hops) for _ in range(10)])
    assert 1 / 16 < is_test(undivided).mean() < 1 / 4  # control: without the split, both sides occur


@pytest.mark.parametrize("task", [task for task in TASKS.values() if task.shared_hops], ids=lambda task: task.name)
def test_easy_problems_that_cannot_be_divided_are_in_both_splits(task: Task) -> None:
    hops = np.arange(1, task.shared_hops + 1).repeat(4)
    for split in ("train", "test"):
        found = draw(task, hops, split=split)
        assert task.keys(found.tokens, hops).size == 0
        np.testing.assert_array_equal(task.solve(found.tokens, hops), found.answers)


@every_task
def test_how_a_problem_is_presented_does_not_move_it(task: Task) -> None:
    """Edges in another order; a row beside longer ones, so with more padding; digits of the other number; questions in
    another order; or with the hops told."""
    hops = np.full(50, task.shared_hops + 4)
    found = draw(task, hops, split="test")
    if isinstance(task, GraphTask | Reachability):
        n_edges = task.n_edges if isinstance(task, Reachability) else task.n_nodes
        order = np.random.default_rng(1).permutation(n_edges)
        again = np.concatenate([found.tokens[:, order], found.tokens[:, n_edges:]], axis=1)
    elif isinstance(task, WordTask | Walks | Formulas):
        again = np.pad(found.tokens, ((0, 0), (0, 3)), constant_values=task.vocab_size - 1)
    elif isinstance(task, Addition):
        again = found.tokens[..., ::-1]
    else:
        again = task.tell(found) if isinstance(task, Induction) else found.tokens[:, ::-1]
    assert again.tobytes() != found.tokens.tobytes()
    assert sides(task, again, hops) == [True]
    size = task.n_symbols if isinstance(task, WordTask) else getattr(task, "n_nodes", task.vocab_size)
    renamed = np.where(again < size, (again + 1) % size, again)
    assert False in sides(task, renamed, hops)  # control: it is another problem


@every_task
def test_telling_writes_the_hops_in(task: Task) -> None:
    hops = np.arange(1, task.max_hops + 1)
    found = draw(task, hops)
    told, asked = task.tell(found), found.answers != NO_LABEL
    if not task.loops_say_hops:
        assert told is found.tokens
        return
    written = told[..., 1] - found.tokens[..., 1]
    np.testing.assert_array_equal(written, found.hops)
    assert [np.unique(row[here]).tolist() for row, here in zip(written, asked, strict=True)] == hops[:, None].tolist()
    assert not found.tokens[asked][:, 1].std()  # control: untold, nothing in the tokens differs
    np.testing.assert_array_equal(told[..., 0], found.tokens[..., 0])


@every_task
def test_chance_is_what_guessing_gets(task: Task) -> None:
    found = draw(task, np.full(600, task.train_hops))
    rng = np.random.default_rng(1)
    asked = found.answers != NO_LABEL
    if isinstance(task, ForestTask | Reachability):
        terminal = asked & (found.hops == 0)
        draws = np.where(terminal[:, None], rng.random((len(asked), asked.shape[1], asked.shape[1])), -1)
        guesses = np.take_along_axis(found.answers, draws.argmax(axis=2), axis=1)
    else:
        guesses = rng.choice(np.unique(found.answers[asked]), size=asked.shape)
    spread = (task.chance / asked.sum()) ** 0.5
    assert abs(score(found.answers, guesses) - task.chance) < 5 * spread
    assert abs(score(found.answers, found.answers) - task.chance) > 5 * spread  # control


def slow_questions(task: GraphTask, tokens: Ids, k: int) -> list[tuple[int, int]]:
    """(answer, hops) of each node's question, edge by edge."""
    parent = {int(source): int(target) for source, target in tokens[: task.n_nodes]}
    found = []
    for source, _ in tokens[task.n_nodes :]:
        path = [int(source) - task.n_nodes]
        while (len(path) <= k) if task.loops_say_hops else (parent[path[-1]] != path[-1]):
            path.append(parent[path[-1]])
        found.append((path[-1], len(path) - 1))
    return found


@pytest.mark.parametrize("name", ["cyclic", "chains", "trees"])
@every_split
def test_hops_of_every_question_in_a_graph(name: str, split: Split) -> None:
    task = TASKS[name]
    assert isinstance(task, GraphTask)
    hops = some_hops(task)
    found = draw(task, hops, split=split)
    slow = np.array([slow_questions(task, row, k) for row, k in zip(found.tokens, hops.tolist(), strict=True)])
    assert (found.answers[:, : task.n_nodes] == NO_LABEL).all()
    np.testing.assert_array_equal(found.answers[:, task.n_nodes :], slow[..., 0])
    np.testing.assert_array_equal(found.hops[:, task.n_nodes :], slow[..., 1])
    assert (found.hops[:, task.n_nodes :] != slow[::-1, :, 1]).any()  # control


def parents_of(task: GraphTask, hops: list[int]) -> Ids:
    return task.draw(np.random.default_rng(0), np.asarray(hops))


def test_a_cycle_passes_every_node() -> None:
    for row in parents_of(Cyclic(), [1] * 5):
        node, seen = 0, set()
        while node not in seen:
            seen.add(node)
            node = row[node]
        assert len(seen) == 24


@pytest.mark.parametrize(("hops", "n_chains"), [(1, 16), (2, 11), (3, 8), (5, 8), (20, 8), (24, 8)])
def test_chains_are_chains(hops: int, n_chains: int) -> None:
    for row in parents_of(Chains(), [hops] * 20):
        ends = row == np.arange(32)
        assert ends.sum() == n_chains
        assert np.bincount(row[~ends], minlength=32).max() == 1  # a terminal's pointer to itself aside
    mixed = parents_of(Chains(), [hops, 1, 24])  # rows with other numbers of chains beside it
    assert (mixed == np.arange(32)).sum(axis=1).tolist() == [n_chains, 16, 8]


def test_lengths_of_chains_vary_and_trees_branch() -> None:
    chains, trees = draw(Chains(), [5] * 50), draw(Trees(), [5] * 50)
    longest = (chains.hops == 5).sum(axis=1)
    assert longest.min() == 1 < longest.max()
    assert len(np.unique((chains.hops == 1).sum(axis=1))) > 1
    assert all(np.bincount(row).max() > 2 for row in parents_of(Trees(), [5] * 50))
    assert ((trees.hops[:, 32:] == 0).sum(axis=1) == 4).all()


def test_guessing_gets_easier_with_depth() -> None:
    task = Chains()
    found = draw(task, [20] * 400, seed=1)
    rng, right = np.random.default_rng(0), []
    for answers, hops in zip(found.answers, found.hops, strict=True):
        pointed = np.unique(answers[hops > 0])
        right.append(rng.choice(pointed) == answers[hops == 20][0])
    assert np.mean(right) == pytest.approx(task.guessing(20), abs=0.06)
    assert task.chance < task.guessing(5) < task.guessing(20)
    assert Cyclic().guessing(5) == Cyclic().chance


def test_names_of_nodes_tell_nothing() -> None:
    for name in ("cyclic", "chains", "trees"):
        task = TASKS[name]
        assert isinstance(task, GraphTask)
        n, found = task.n_nodes, draw(task, np.full(2000, 5))
        counts = np.bincount(found.answers[:, n:].ravel(), minlength=n)
        assert abs(counts / counts.mean() - 1).max() < 0.25
        queried = found.tokens[0, n:, 0] - n
        assert queried.tolist() == list(range(n))
        assert found.tokens[0, :n, 0].tolist() != found.tokens[1, :n, 0].tolist()  # edges are shuffled, row by row


def test_facts_never_change_and_depend_on_the_seed() -> None:
    once, twice, other = Facts(), Facts(), Facts(seed=1)
    assert once.successors.tolist() == twice.successors.tolist() != other.successors.tolist()
    found = draw(once, [1])
    assert found.answers[0].tolist() == [once.successors[node] for node in found.tokens[0, :, 0]]


def test_facts_have_test_questions_of_every_difficulty() -> None:
    nodes, k = np.divmod(np.arange(256 * 31), 31)
    kept = k[is_test(np.stack([nodes, k], axis=1))]
    assert np.bincount(kept, minlength=31)[2:].min() >= 20


def test_words_of_every_divided_length_are_on_both_sides() -> None:
    for task in (Parity(), S5WordProblem()):
        for length in range(task.shared_hops + 1, 12):
            side = is_test(task.draw(np.random.default_rng(0), np.full(500, length)))
            assert 1 / 32 < side.mean() < 1 / 3


def test_short_words_end_in_padding() -> None:
    found = draw(Parity(), [2, 4])
    assert found.tokens[0, 2:].tolist() == [2, 2]
    assert found.answers[0, 2:].tolist() == [NO_LABEL, NO_LABEL]
    assert found.hops.tolist() == [[1, 2, 0, 0], [1, 2, 3, 4]]


def test_s5_is_the_group_it_says() -> None:
    everything = np.arange(120)
    assert PRODUCTS[0].tolist() == PRODUCTS[:, 0].tolist() == everything.tolist()
    assert np.sort(PRODUCTS, axis=0).tolist() == np.sort(PRODUCTS, axis=1).T.tolist() == [[g] * 120 for g in everything]
    g, h, third = np.random.default_rng(0).integers(120, size=(3, 200))
    assert PRODUCTS[PRODUCTS[g, h], third].tolist() == PRODUCTS[g, PRODUCTS[h, third]].tolist()
    assert PRODUCTS[g, h].tolist() != PRODUCTS[h, g].tolist()  # control: it does not commute
    for first, second in islice(zip(g, h, strict=True), 20):
        applied = [PERMUTATIONS[second][PERMUTATIONS[first][i]] for i in range(5)]
        assert PERMUTATIONS[PRODUCTS[first, second]].tolist() == applied


@every_task
@pytest.mark.parametrize("wrong", [[0], [3, -1], [10**6], [], [[1]], [1.5]])
def test_bad_hops_are_named(task: Task, wrong: list) -> None:
    with pytest.raises(ValueError, match="hops = "):
        draw(task, wrong)
    draw(task, [task.max_hops])  # control
    with pytest.raises(ValueError, match=rf"hops = .*\[1, {task.max_hops}\]"):
        draw(task, [task.max_hops + 1])


def test_other_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"split = 'tset'.*did you mean 'test'"):
        draw(TASKS["cyclic"], [1], split="tset")  # pyrefly: ignore
    with pytest.raises(ValueError, match=r"task = 'cyclik'.*did you mean 'cyclic'"):
        pick(TASKS, "cyclik", "task")
    for name, make in {
        "n_nodes": lambda: Cyclic(n_nodes=3),
        "n_chains": lambda: Chains(n_chains=20),
        "n_roots": lambda: Trees(n_roots=1),
        "max_hops": lambda: Parity(max_hops=0),
        "seed": lambda: Facts(seed=-1),
        "n_relations": lambda: Walks(n_relations=4),
        "kind": lambda: Walks(kind="inside"),  # pyrefly: ignore
        "length": lambda: Induction(length=20),
        "n_digits": lambda: Addition(n_digits=7),
        "n_side": lambda: Reachability(n_side=5),
    }.items():
        with pytest.raises(ValueError, match=f"{name} = "):
            make()


def test_a_split_without_problems_is_refused() -> None:
    keys = np.arange(64)[:, None]
    here = keys[~is_test(keys)][:1]
    make = lambda rng, hops: np.repeat(here, len(hops), axis=0)  # noqa: E731
    rng, hops = np.random.default_rng(0), np.array([3, 4])
    with pytest.raises(ValueError, match=r"hops = 3.*'test'"):
        draw_split(make, rng, hops, "test")
    assert draw_split(make, rng, hops, "train").tolist() == [here[0].tolist()] * 2
    assert draw_split(make, rng, hops, "test", shared_hops=4).tolist() == [here[0].tolist()] * 2
