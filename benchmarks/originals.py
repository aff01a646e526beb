"""The published models' own code, where it is at hand: in $RITORNELLO_ORIGINALS or `originals/`, never in here.

    recpre/raven_modeling_minimal.py  raven_config_minimal.py    github.com/seal-rg/recurrent-pretraining, recpre/
    ouro/modeling_ouro.py  configuration_ouro.py                 github.com/LoopedLMs/ouro_rl, ouro_rl/modeling/
    parcae/parcae_lm/ (whole)                                    github.com/sandyresearch/parcae

It was written for transformers 4; what it misses in 5 is put in its place here, and its files stay as they are. Norms,
rotary angles and logits force float32: to compare at 1e-9 it runs with float32 read as float64.
"""

import importlib
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from ritornello.hub import huginn, ouro, parcae
from ritornello.model.carry import initial_state
from ritornello.model.rdt import RecurrentDepthTransformer

FOLDER = Path(os.environ.get("RITORNELLO_ORIGINALS", Path(__file__).parents[1] / "originals"))
FILES = {"huginn": "recpre/raven_modeling_minimal.py", "ouro": "ouro/modeling_ouro.py"}
FILES |= {"parcae": "parcae/parcae_lm/models/parcae/parcae.py"}
CONVERTERS = {"huginn": huginn, "ouro": ouro, "parcae": parcae}
Settings = dict[str, Any]


def _huginn(**changes: Any) -> Settings:
    shape = {"n_embd": 24, "n_heads": 4, "intermediate_size": 40, "vocab_size": 23, "block_size": 64}
    layers = {"n_layers_in_prelude": 1, "n_layers_in_recurrent_block": 2, "n_layers_in_coda": 1, "mean_recurrence": 3}
    return shape | layers | {"tie_embeddings": True} | changes


def _ouro(**changes: Any) -> Settings:
    shape = {"hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 40}
    rest = {"vocab_size": 23, "max_position_embeddings": 64, "num_hidden_layers": 2, "tie_word_embeddings": False}
    rest |= {"rope_theta": 10_000.0}
    return shape | rest | changes


def _parcae(**changes: Any) -> Settings:
    """Layers as in the published shapes: two, two, two, where tables and gates agree."""
    shape = {"n_embd": 40, "num_attention_heads": 4, "intermediate_size": 56, "vocab_size": 23, "padding_multiple": 1}
    shape |= {"block_size": 64, "n_layers_in_prelude": 2, "n_layers_in_recurrent_block": 2, "n_layers_in_coda": 2}
    kind = {"norm_class_name": "RMSNorm", "nonlin_name": "ReLU2", "init_strategy": "scaled-zero", "qk_norm": True}
    kind |= {"init_orthogonal": True}  # scaled-zero fails without
    kind |= {"tie_embeddings": True, "prelude_norm": True, "mean_recurrence": 3, "mean_backprop_depth": 2}
    settings = shape | kind | changes
    names = {"recurrent_embedding_dimension": "n_embd"}
    names |= {"recurrent_intermediation_embedding_dimension": "intermediate_size"}
    return settings | {name: settings[same] for name, same in names.items()}


SETTINGS: dict[str, dict[str, Settings]] = {
    "huginn": {
        "tied": _huginn(),
        "untied, without biases": _huginn(
            n_embd=30, n_heads=5, tie_embeddings=False, qk_bias=False, n_layers_in_prelude=2, n_layers_in_coda=1
        ),
        "one head, steep angles": _huginn(
            n_embd=16, n_heads=1, n_layers_in_recurrent_block=1, n_layers_in_coda=2, rope_base=100.0, norm_eps=1e-4
        ),
    },
    "ouro": {
        "head of its own": _ouro(),
        "tied, fewer keys": _ouro(tie_word_embeddings=True, num_attention_heads=6, num_key_value_heads=2),
        "wide heads, steep angles": _ouro(
            num_hidden_layers=1, num_key_value_heads=1, head_dim=10, rope_theta=100.0, rms_norm_eps=1e-4
        ),
    },
    "parcae": {
        "as published, small": _parcae(),
        "untied, linear, gates without tables": _parcae(
            n_embd=36,
            num_attention_heads=2,
            tie_embeddings=False,
            prelude_norm=False,
            qk_bias=True,
            n_layers_in_prelude=1,
            n_layers_in_recurrent_block=3,
            n_layers_in_coda=1,
            mean_recurrence=4,
            injection_type="linear",
            rope_settings={"rope_base": 100},
            norm_eps=1e-4,
        ),
        "added, scaled, from zero": _parcae(
            injection_type="add",
            qk_norm=False,
            init_strategy="takase",
            state_init="zero",
            n_layers_in_recurrent_block=1,
            mean_recurrence=2,
            mean_backprop_depth=3,
        ),
    },
}
CASES = [(name, kind) for name, kinds in SETTINGS.items() for kind in kinds]


def missing(name: str) -> str:
    """Why an original cannot run here; empty if it can."""
    path = FOLDER / FILES[name]
    return "" if path.is_file() else f"the original's own code is not at hand: {path}"


def fill(described: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights in [-1, 1) by a formula, integers modulo a prime, the same everywhere. None is left at 0 or 1."""
    found = {}
    for k, (name, like) in enumerate(sorted(described.items())):
        i = torch.arange(like.numel(), dtype=torch.int64)
        x = ((i * i * 7919 + i * 104_729 + 15_485_863 * (k + 1)) % 1_000_003 / 500_001.5 - 1).view(like.shape)
        norm, matrix = "norm" in name or "ln_" in name, like.ndim == 2 and like.shape[0] > 1
        found[name] = (1 + 0.4 * x if norm else x * (3 / like.shape[-1]) ** 0.5 if matrix else 0.7 * x).to(dtype)
    return found


def theirs(name: str, settings: Settings, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a published checkpoint of this shape."""
    converter = CONVERTERS[name]
    config = converter.config_from(settings)
    with torch.device("meta"):
        described = RecurrentDepthTransformer(config).state_dict()
    return fill(converter.to_theirs(described, config), dtype)


def ours(name: str, settings: Settings, dtype: torch.dtype) -> RecurrentDepthTransformer:
    """The model that these tensors are converted to."""
    config = CONVERTERS[name].config_from(settings)
    model = RecurrentDepthTransformer(config).to(dtype).eval()
    model.load_state_dict(CONVERTERS[name].from_theirs(theirs(name, settings, dtype), config))
    return model


def tokens(batch: int = 2, length: int = 9) -> Tensor:
    return torch.arange(batch * length).mul(7).add(3).remainder(23).view(batch, length)


class Float64Torch:
    """The torch module in which float32 means float64."""

    float32 = float = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextmanager
def _precisely(code: ModuleType, dtype: torch.dtype) -> Iterator[None]:
    """float64: what the code forces to float32 is float64 too; other types: nothing is changed."""
    if dtype != torch.float64:
        yield
        return
    with patch.object(code, "torch", Float64Torch()), patch.object(Tensor, "float", Tensor.double):
        yield


def _module(name: str) -> ModuleType:
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    return importlib.import_module(name)


class Huginn:
    """recpre/raven_modeling_minimal.py with the weights of `fill`."""

    model: nn.Module

    def __init__(self, settings: Settings, dtype: torch.dtype) -> None:
        self.code, self.dtype = _module("recpre.raven_modeling_minimal"), dtype
        tied = {"lm_head.weight": "transformer.wte.weight"}  # transformers 4 took a list
        self.code.RavenPreTrainedModel._tied_weights_keys = tied if settings["tie_embeddings"] else {}
        config = _module("recpre.raven_config_minimal").RavenConfig(**settings)
        with _precisely(self.code, dtype):
            self.model = self.code.RavenForCausalLM(config).to(dtype).eval()
        _give(self.model, theirs("huginn", settings, dtype), {huginn.ROPE_TABLE, *tied})

    @torch.no_grad()
    def logits(self, ids: Tensor, n_loops: int, **options: Any) -> Tensor:
        """(B, T, V) from the noise that our model starts from: theirs is of another generator."""
        model = ours("huginn", self.model.config.to_dict(), self.dtype)
        start = _start(model, ids).to(self.dtype)
        with _precisely(self.code, self.dtype):
            return self.model(ids, input_states=start, num_steps=n_loops, **options).logits


class Ouro:
    """ouro/modeling_ouro.py with the weights of `fill`."""

    model: nn.Module

    def __init__(self, settings: Settings, dtype: torch.dtype) -> None:
        self.code, self.dtype = _module("ouro.modeling_ouro"), dtype
        tied = {"lm_head.weight": "model.embed_tokens.weight"}
        self.code.OuroForCausalLM._tied_weights_keys = tied if settings["tie_word_embeddings"] else {}
        self.code.ROPE_INIT_FUNCTIONS = {"default": _angles}  # transformers 5 lists it no more
        self.code.OuroRotaryEmbedding.compute_default_rope_parameters = staticmethod(_angles)
        self.code.create_causal_mask = lambda **_: None  # its arguments' names are others now; sdpa's own is causal
        config = _module("ouro.configuration_ouro").OuroConfig(**settings, pad_token_id=None, use_cache=False)
        config._attn_implementation = "sdpa"
        with _precisely(self.code, dtype):
            self.model = self.code.OuroForCausalLM(config).to(dtype).eval()
        precise = torch.promote_types(dtype, torch.float32)
        self.model.model.rotary_emb.inv_freq, _ = _angles(config, dtype=precise)  # pyrefly: ignore
        _give(self.model, theirs("ouro", settings, dtype), set(tied))

    @torch.no_grad()
    def logits(self, ids: Tensor, n_loops: int, **options: Any) -> Tensor:
        """(B, T, V) of the last loop: the threshold of 1 that they exit by else may be reached by rounding."""
        self.model.model.total_ut_steps = n_loops  # pyrefly: ignore
        with _precisely(self.code, self.dtype):
            return self.model(ids, **{"exit_at_step": n_loops - 1, **options}).logits


class Parcae:
    """parcae/parcae_lm with the weights of `fill`, nothing of it replaced: on a CPU its attention is torch's own. What
    no layer reads, a gate without a table or the reverse, keeps what it was drawn as."""

    model: nn.Module

    def __init__(self, settings: Settings, dtype: torch.dtype) -> None:
        self.settings, self.dtype = settings, dtype
        if str(FOLDER / "parcae") not in sys.path:
            sys.path.append(str(FOLDER / "parcae"))
        self.code = _module("parcae_lm.modules.utils")  # angles, the one place that names float32
        config = _module("parcae_lm.models.parcae.config").ParcaeConfig(**settings)
        config.to_dict = lambda: asdict(config)
        with _precisely(self.code, dtype):
            self.model = config.construct_model().to(dtype).eval()
        weights = theirs("parcae", settings, dtype)
        unread = {name for name in self.model.state_dict() if parcae.UNREAD & {*name.split(".")}} - weights.keys()
        _give(self.model, weights, {"freqs_cis", *unread, *(["lm_head.weight"] if settings["tie_embeddings"] else [])})

    @torch.no_grad()
    def logits(self, ids: Tensor, n_loops: int, **options: Any) -> Tensor:
        """(B, T, V) from the noise that our model starts from: theirs is of another generator."""
        start = _start(ours("parcae", self.settings, self.dtype), ids).to(self.dtype)
        self.model.initialize_state = lambda _: start  # pyrefly: ignore
        with _precisely(self.code, self.dtype):
            found = self.model(ids, num_steps_pair=torch.tensor([n_loops, 0]), return_logits=True, **options)
        return found["logits"]


ORIGINALS: dict[str, type[Huginn | Ouro | Parcae]] = {"huginn": Huginn, "ouro": Ouro, "parcae": Parcae}


def _start(model: RecurrentDepthTransformer, ids: Tensor) -> Tensor:
    c, e = model.config, model.embed(ids)
    return initial_state(c.initial_state, e, model.context(e, tokens=ids), c.noise_std)


def _angles(config: Any, device: Any = None, *, dtype: torch.dtype = torch.float32) -> tuple[Tensor, float]:
    """Llama's frequencies, and no scale."""
    dim = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    return config.rope_theta ** -(torch.arange(0, dim, 2, dtype=dtype, device=device) / dim), 1.0


def _give(model: nn.Module, weights: dict[str, Tensor], own: set[str]) -> None:
    """Every tensor has its partner, but for what follows from others."""
    found = model.load_state_dict(weights, strict=False)
    assert not found.unexpected_keys and set(found.missing_keys) <= own, found
