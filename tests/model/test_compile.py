"""torch.compile changes nothing but the time: without graph breaks, and once for all loop counts."""

from collections.abc import Callable, Iterator
from copy import deepcopy

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from ritornello.config import ExitRule, Recipe
from ritornello.engine.generate import Generation, Loaded, generate
from ritornello.model.cache import Cache
from ritornello.model.rdt import RecurrentDepthTransformer
from ritornello.model.state import Output
from ritornello.train.tokenizer import ByteTokenizer
from tests.model.builders import build, close, close_gradients, differ, gradients, tokens_for

pytestmark = [pytest.mark.compile, pytest.mark.filterwarnings("default")]  # the compiler's own warnings are not ours

KINDS = {
    "gqa-moe-act": {"attention": "gqa", "ffn": "moe", "halting": "act"},
    "mla-moe-gate": {"attention": "mla", "ffn": "moe", "halting": "gate", "read_out": "last"},
    "mla-dense-kl": {"attention": "mla", "ffn": "dense", "halting": "kl", "read_out": "last"},
    "gqa-dense-none": {"ffn": "dense", "halting": "none", "read_out": "last", "loop_scale": (1.0, 0.3)},
    "anchored": {"ffn": "dense", "anchored": True, "halting": "none", "read_out": "last"},
    "streams": {"ffn": "dense", "carry_streams": 3, "injection": "linear", "halting": "none", "read_out": "last"},
}

# With gradients: prelude, coda, logits, the loop while its state has none and after; more where it learned to halt.
N_GRAPHS = {"gqa-moe-act": 6, "mla-moe-gate": 7}


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def pair(kind: str) -> tuple[RecurrentDepthTransformer, RecurrentDepthTransformer]:
    """The same model as it is, and to be compiled."""
    model = build(KINDS[kind])
    return model, deepcopy(model)


def graphs(work: Callable[[], object]) -> int:
    """How many graphs are compiled while this runs."""
    before = counters["stats"]["unique_graphs"]
    work()
    return counters["stats"]["unique_graphs"] - before


def forward(model: RecurrentDepthTransformer, tokens: Tensor, *loops: int) -> list[Output]:
    return [model(tokens, n_loops=n, weigh=True) for n in loops]


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_gives_the_same_outputs_and_gradients(kind: str) -> None:
    """And one graph serves every loop count."""
    model, compiled = pair(kind)
    compiled.compile(backend="aot_eager")
    tokens, results = tokens_for(model.config, 2, 7), []
    assert graphs(lambda: results.extend(forward(compiled, tokens, 3))) == N_GRAPHS.get(kind, 5)
    results += forward(model, tokens, 3)
    close(results[0].logits, results[1].logits)
    grads = [gradients(m, out.logits.square().mean()) for m, out in zip((compiled, model), results, strict=True)]
    close_gradients(grads[0], grads[1])
    others: list[Output] = []
    assert graphs(lambda: others.extend(forward(compiled, tokens, 2, 4, 5, 9))) == 0
    differ(others[0].logits, results[1].logits)


def test_without_gradients_too_one_graph_serves_every_loop_count() -> None:
    """Where a loop halts by what it learned, the last one is a graph of its own."""
    _, compiled = pair("gqa-moe-act")
    compiled.compile(backend="aot_eager")
    tokens = tokens_for(compiled.config, 2, 7)
    with torch.no_grad():
        assert graphs(lambda: forward(compiled, tokens, 3)) == 5  # prelude, loop, last loop, coda, logits
        assert graphs(lambda: forward(compiled, tokens, 2, 4, 5, 9)) == 0
        assert graphs(lambda: compiled(tokens[:, :5], n_loops=3)) > 0, "another shape"


def decode(model: RecurrentDepthTransformer, tokens: Tensor, n_loops: int) -> Tensor:
    cache = Cache(model.config, batch_size=tokens.shape[0], max_len=tokens.shape[1], dtype=torch.float64)
    with torch.inference_mode():
        steps = [model(tokens[:, i : i + 1], n_loops=n_loops, cache=cache) for i in range(tokens.shape[1])]
    return torch.cat([step.logits for step in steps], 1)


@pytest.mark.parametrize("kind", ["gqa-moe-act", "mla-dense-kl"])
@pytest.mark.parametrize("batch", [1, 3])
def test_decoding_compiled_gives_the_same_and_compiles_for_one_token_only(kind: str, batch: int) -> None:
    """By the compiler that generates code, whose single rows and experts take another path."""
    model, compiled = pair(kind)
    compiled.compile()
    tokens = tokens_for(model.config, batch, 6)
    close(decode(compiled, tokens, 3), decode(model, tokens, 3))
    assert graphs(lambda: decode(compiled, tokens, 4)) == 0, "neither another length nor another loop count"
    differ(decode(compiled, tokens, 2), decode(model, tokens, 3))


@pytest.mark.parametrize(("kind", "unroll"), [("gqa-moe-act", False), ("mla-dense-kl", True)])
def test_a_prompt_fills_a_cache_compiled(kind: str, unroll: bool) -> None:
    model, compiled = pair(kind)
    compiled.compile(backend="aot_eager", unroll=unroll)
    tokens = tokens_for(model.config, 2, 9)
    chunks = (tokens[:, :4], tokens[:, 4:8], tokens[:, 8:])  # the second attends to the first by a mask

    def filled(m: RecurrentDepthTransformer, n_loops: int) -> Tensor:
        cache = Cache(m.config, batch_size=2, max_len=9, dtype=torch.float64)
        with torch.inference_mode():
            return torch.cat([m(chunk, n_loops=n_loops, cache=cache).logits for chunk in chunks], 1)

    expected = filled(model, 3)
    close(filled(compiled, 3), expected)
    differ(filled(compiled, 2), expected)


def test_unrolled_gives_the_same() -> None:
    model, compiled = pair("gqa-moe-act")
    compiled.compile(unroll=True)
    tokens = tokens_for(model.config, 1, 5)
    close(decode(compiled, tokens, 3), decode(model, tokens, 3))
    assert graphs(lambda: decode(compiled, tokens, 3)) == 0
    close(decode(compiled, tokens, 2), decode(model, tokens, 2))
    differ(decode(compiled, tokens, 2), decode(model, tokens, 3))


def test_exit_rules_and_budgets_run_compiled() -> None:
    model, compiled = pair("mla-dense-kl")
    compiled.compile(backend="aot_eager")
    tokens = tokens_for(model.config, 3, 5)
    rule = ExitRule("kl", 1e-3)
    with torch.inference_mode():
        plain, fast = (m(tokens, n_loops=4, exit=rule) for m in (model, compiled))
        assert torch.equal(fast.loops_used, plain.loops_used) and plain.loops_used.unique().numel() > 1
        close(fast.logits, plain.logits)
        budgets = torch.tensor([1, 4, 2])
        close(compiled(tokens, n_loops=budgets).logits, model(tokens, n_loops=budgets).logits)
        differ(compiled(tokens, n_loops=budgets.flip(0)).logits, model(tokens, n_loops=budgets).logits)


@pytest.mark.parametrize(
    ("kind", "unroll", "rule"),
    [
        ("gqa-moe-act", False, None),
        ("mla-dense-kl", False, ExitRule("kl", 1e-3)),
        ("mla-dense-kl", True, None),
    ],
    ids=str,
)
def test_a_text_generated_compiled_is_the_same(kind: str, unroll: bool, rule: ExitRule | None) -> None:
    """Prompts of different lengths, whose padding the model is told of, and one alone; the likeliest, and drawn."""
    model = build(KINDS[kind] | {"vocab_size": 264, "tie_embeddings": False})  # untied: it does not repeat itself
    compiled = deepcopy(model)
    compiled.compile(backend="aot_eager", unroll=unroll)

    def texts(m: RecurrentDepthTransformer, n_loops: int = 3) -> list[Generation]:
        loaded = Loaded(m, ByteTokenizer(), Recipe())
        how = {"n_loops": n_loops, "exit": rule, "max_tokens": 6}
        together = generate(loaded, ["The quick", "RDT"], temperature=0, **how)
        return [*together, generate(loaded, "abc", seed=3, **how)]

    plain, fast = texts(model), []
    assert graphs(lambda: fast.extend(texts(compiled))) > 0
    assert fast == plain
    assert [text.tokens for text in texts(compiled, 2)] != [text.tokens for text in plain]


def test_two_compiled_models_and_a_copy_keep_to_their_own_weights() -> None:
    model, first = pair("gqa-dense-none")
    second = build(KINDS["gqa-dense-none"] | {"norm": "pre_post"}, seed=1)
    plain = deepcopy(second)
    first.compile(backend="aot_eager")
    second.compile(backend="aot_eager")
    copy = deepcopy(first)
    with torch.no_grad():
        copy.norm.weight.mul_(2)
        tokens = tokens_for(model.config, 2, 4)
        close(first(tokens).logits, model(tokens).logits)
        close(second(tokens).logits, plain(tokens).logits)
        close(copy(tokens).logits, 2 * model(tokens).logits)


def test_compiled_models_of_other_head_counts_follow_each_other() -> None:
    """From the second on, the width of a cache entry is symbolic, and so is how many queries share a key."""
    for heads in ({"n_heads": 4, "n_kv_heads": 2}, {"n_heads": 6, "n_kv_heads": 6}, {"n_heads": 2, "n_kv_heads": 2}):
        model = build(KINDS["gqa-dense-none"] | heads)
        compiled = deepcopy(model)
        compiled.compile(backend="aot_eager", unroll=True)
        tokens = tokens_for(model.config, 1, 2)
        found = []
        with torch.inference_mode():
            for m in (model, compiled):
                cache = Cache(m.config, batch_size=1, max_len=8, dtype=torch.float64)
                m(tokens[:, :1], cache=cache)
                found.append(m(tokens[:, 1:], cache=cache).logits)
        close(found[1], found[0])
