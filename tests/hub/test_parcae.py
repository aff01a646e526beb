"""What is Parcae's alone: which layers have value embeddings, its noise, its size, and tokens that stop."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.originals import SETTINGS, ours, tokens
from ritornello.accounting import count_parameters
from ritornello.commands.loading import open_model
from ritornello.config import ExitRule
from ritornello.engine.engine import Engine
from ritornello.engine.generate import decode
from ritornello.engine.request import Request
from ritornello.engine.sampling import Sampling
from ritornello.hub import parcae
from ritornello.hub.converters import read_published
from ritornello.model.carry import initial_state
from ritornello.model.rdt import RecurrentDepthTransformer
from tests.hub.at_hand import original
from tests.hub.test_converters import written

SMALL, APART, ADDED = SETTINGS["parcae"].values()
F64 = torch.float64
PUBLISHED = {  # dim, heads, layers of each stack; parameters of theirs, built on meta
    "140m": (768, 6, 2, 144_323_136),
    "370m": (1024, 8, 4, 388_003_328),
    "770m": (1280, 10, 6, 776_655_680),
    "1.3b": (1536, 12, 8, 1_338_591_744),
}


def published(name: str) -> dict[str, Any]:
    """Its settings in `parcae_lm.configs`."""
    dim, heads, n, _ = PUBLISHED[name]
    shape = {"n_embd": dim, "num_attention_heads": heads, "num_key_value_heads": heads, "intermediate_size": 4 * dim}
    shape |= {"recurrent_embedding_dimension": dim, "recurrent_intermediation_embedding_dimension": 4 * dim}
    layers = dict.fromkeys(("n_layers_in_prelude", "n_layers_in_recurrent_block", "n_layers_in_coda"), n)
    rest = {"vocab_size": 32768, "padding_multiple": 64, "block_size": 2048}
    return SMALL | shape | layers | rest | {"mean_recurrence": 8, "mean_backprop_depth": 4}


@pytest.mark.parametrize(
    ("settings", "layers"), [(SMALL, (1, 3, 5)), (APART, (4,)), (ADDED, (0, 2))], ids=["published", "apart", "added"]
)
def test_layers_with_a_table_and_a_gate(settings: dict[str, Any], layers: tuple[int, ...]) -> None:
    assert parcae.config_from(settings).value_embeddings == layers


def test_a_table_without_a_gate_is_read_by_no_layer_of_theirs() -> None:
    """And a gate without a table: whatever they hold changes nothing there; what is taken over does."""
    code = original("parcae", APART)
    state, before = code.model.state_dict(), code.logits(tokens(), 3)
    taken = parcae.to_theirs(ours("parcae", APART, F64).state_dict(), parcae.config_from(APART))
    names = {name for name in state if parcae.UNREAD & {*name.split(".")}}
    assert names - taken.keys() == {f"transformer.core_block.{i}.attn.ve_gate.weight" for i in (0, 2)} | {
        f"value_embeds.{i}.weight" for i in (0, 2)
    }
    for name in sorted(names):
        kept = state[name].clone()
        state[name] += 1
        assert torch.equal(code.logits(tokens(), 3), before) == (name not in taken)
        state[name].copy_(kept)


def test_a_published_folder_is_known_by_its_class(tmp_path: Path) -> None:
    """Its config.json names no model_type; `generate`, `chat` and `serve` open it all the same."""
    with pytest.raises(ValueError, match=r"tokenizer\.json: no such file"):  # read as far as that
        open_model(written(tmp_path, "parcae"), device="cpu")


def test_what_no_layer_reads_is_left_out_of_a_file(tmp_path: Path) -> None:
    folder = written(tmp_path, "parcae")
    file = folder / "model-00001-of-00002.safetensors"
    save_file(load_file(file) | {"transformer.prelude.0.attn.ve_gate.weight": torch.ones(4, 32)}, file)
    assert read_published(folder).config.value_embeddings == (1, 3, 5)
    save_file(load_file(file) | {"transformer.prelude.0.attn.gate.weight": torch.ones(4, 32)}, file)
    with pytest.raises(ValueError, match="not in this model"):
        read_published(folder)


def noise(model: RecurrentDepthTransformer, n: int) -> Tensor:
    e = torch.zeros(1, n, model.config.dim)
    context = model.context(e, tokens=torch.zeros(1, n, dtype=torch.int64))
    return initial_state("noise", e, context, model.config.noise_std)


def test_noise_is_of_the_size_of_theirs() -> None:
    """Variance 2 / (5 D), truncated at 3 standard deviations; times D where embeddings are scaled."""
    for strategy, std in (("scaled-zero", math.sqrt(2 / 5 / 40)), ("takase", math.sqrt(2 / 5))):
        settings = SMALL | {"block_size": 8192, "init_strategy": strategy}
        h = noise(ours("parcae", settings, torch.float32), 8192)
        assert abs(h.std() / std - 1) < 0.02 and h.abs().max() <= 3 * std * (1 + 1e-6)
        theirs = original("parcae", settings).model.initialize_state(torch.zeros(1, 8192, 40))
        assert abs(h.std() / theirs.std() - 1) < 0.02 and theirs.abs().max() <= 3 * std * (1 + 1e-6)


@pytest.mark.parametrize("name", PUBLISHED)
def test_as_many_parameters_as_theirs(name: str) -> None:
    config, n = parcae.config_from(published(name)), PUBLISHED[name][-1]
    assert count_parameters(config)["total"] == n
    assert config.value_embeddings == tuple(range(1, config.n_layers, 2))
    with torch.device("meta"):
        model = RecurrentDepthTransformer(config)
    assert sum(x.numel() for x in model.parameters()) == n


def test_every_tensor_of_the_smallest_has_its_partner() -> None:
    code = original("parcae", SMALL).model
    with torch.device("meta"):
        config = type(code.config)(**published("140m"), skip_initialization=True)
        whole = type(code)(config)
        model = RecurrentDepthTransformer(parcae.config_from(published("140m")))
    assert sum(x.numel() for x in whole.parameters()) == PUBLISHED["140m"][-1]
    theirs = {name: x.shape for name, x in whole.state_dict().items()}
    found = {name: x.shape for name, x in parcae.to_theirs(model.state_dict(), model.config).items()}
    assert theirs.keys() - found.keys() == {"freqs_cis", "lm_head.weight"}
    assert found == {name: shape for name, shape in theirs.items() if name in found}


def test_the_engine_writes_what_one_pass_would() -> None:
    """Tokens that stop by themselves, which theirs have not: each in the engine as in the model."""
    model, rule = ours("parcae", SMALL, F64), ExitRule("delta", 1.0)
    engine, prompts = Engine(model, n_loops=6, chunk=4, tick_tokens=16), [tokens(1, n)[0].tolist() for n in (3, 7, 5)]
    for prompt in prompts:
        wishes: Any = {"n_loops": 6, "exit": rule, "sampling": Sampling(temperature=0)}
        engine.submit(Request(prompt=prompt, max_tokens=8, **wishes))
    text: list[list[tuple[int, int]]] = [[] for _ in prompts]
    for event in engine.run():
        if event.token is not None:
            text[event.number].append((event.token, event.loops))
    for prompt, found in zip(prompts, text, strict=True):
        ids = torch.tensor([[*prompt, *(token for token, _ in found)]])
        with torch.no_grad():
            out = model(ids, n_loops=6, exit=rule)
        read = slice(len(prompt) - 1, -1)
        assert [*zip(out.logits[0, read].argmax(-1).tolist(), out.loops_used[0, read].tolist(), strict=True)] == found
        alone = decode(model, [prompt], n_new=8, n_loops=6, exit=rule, sampling=Sampling(temperature=0))
        assert [(int(token), int(n)) for token, n in alone] == found
    assert len({n for found in text for _, n in found}) > 1


def test_a_token_in_the_place_of_another_is_read_as_itself() -> None:
    """The next text of one token has the first one's slot, place and lane, and another value."""
    model = ours("parcae", SMALL, F64)
    engine, found = Engine(model, chunk=4, tick_tokens=16), []
    for token in range(23):
        number = engine.submit(Request(prompt=[token], max_tokens=1, n_logprobs=1, sampling=Sampling(temperature=0)))
        found += [event.logprob for event in engine.run() if event.number == number and event.token is not None]
    with torch.no_grad():
        logits = model(torch.arange(23)[:, None]).logits[:, 0]
    assert (torch.tensor(found, dtype=F64) - logits.log_softmax(-1).amax(-1)).abs().max() < 1e-6
