"""transformers' own tests for every model (`ModelTesterMixin`), run over these classes.

They come with transformers' source package, which `make install` fetches; parts of its tests that are not in there are
left empty below. What cannot pass is in `REFUSED`, with the reason.
"""

import importlib
import sys
import unittest
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from transformers.models.auto import modeling_auto

from ritornello.hub import RitornelloConfig, RitornelloForCausalLM, RitornelloForSequenceClassification, RitornelloModel
from tests.hub.kinds import KINDS, SHAPE, tokens

SOURCE = Path(sys.prefix) / "transformers-tests"
BY_LAYER = "recomputation is by loop, which transformers' per-layer switch cannot say: see test_modeling"
REFUSED = {
    "test_gradient_checkpointing_enable_disable": BY_LAYER,
    "test_training_gradient_checkpointing": BY_LAYER,
    "test_training_gradient_checkpointing_use_reentrant_false": BY_LAYER,
    "test_training_gradient_checkpointing_use_reentrant_true": BY_LAYER,
    "test_generation_tester_mixin_inheritance": "tests of generate() are in no package: see test_generate",
}
ELSEWHERE = ("test_get_", "test_flash_attn", "test_vision_", "test_multi_gpu", "test_eager_matches", "test_flex_")
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of transformers to its own tests
    pytest.mark.skipif(not SOURCE.is_dir(), reason="python scripts/transformers_tests.py fetches them"),
]


def _mixin() -> type:
    """Their class, from a package made here of their files."""
    package = ModuleType("transformers_tests")
    package.__path__ = [str(SOURCE)]
    absent = {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}
    sys.modules["transformers_tests"] = package
    for path, name in absent.items():
        parent = path.partition(".")[0]
        sys.modules[f"transformers_tests.{parent}"] = ModuleType(parent)
        module = ModuleType(path)
        setattr(module, name, type(name, (), {}))
        sys.modules[f"transformers_tests.{path}"] = module
    helpers = ModuleType("distributed_testing_utils")
    vars(helpers).update(run_distributed=None, free_port=None, init_distributed=None)
    sys.modules["transformers_tests.distributed_testing_utils"] = helpers
    return importlib.import_module("transformers_tests.test_modeling_common").ModelTesterMixin


if SOURCE.is_dir():
    modeling_auto.MODEL_MAPPING_NAMES["ritornello"] = "RitornelloModel"
    scored = modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    scored["ritornello"] = "RitornelloForSequenceClassification"
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["ritornello"] = "RitornelloForCausalLM"
    Mixin = _mixin()
else:
    Mixin = object


class Common(Mixin):  # type: ignore[misc, valid-type]
    """What their tests ask of a model's own test."""

    all_model_classes = (RitornelloModel, RitornelloForCausalLM, RitornelloForSequenceClassification)
    has_attentions = False  # an attention's weights are never kept
    shape: ClassVar[dict[str, Any]] = {}

    def setUp(self) -> None:
        names = {"hidden_size": 32, "num_hidden_layers": 2, "expected_num_hidden_layers": 2 + 3, "batch_size": 3}
        names |= {"seq_length": 7, "num_attention_heads": 4, "is_training": True}
        self.model_tester = SimpleNamespace(
            **names, base_model_class=RitornelloModel, prepare_config_and_inputs_for_common=self.inputs
        )
        self.model_tester.get_config = self.config

    def config(self) -> RitornelloConfig:
        small = {"n_recurrent_layers": 1, "n_loops": 2, "max_seq_len": 512}
        return RitornelloConfig(**SHAPE | small | self.shape, pad_token_id=0, bos_token_id=1, eos_token_id=2)

    def inputs(self) -> tuple[RitornelloConfig, dict[str, torch.Tensor]]:
        x = tokens(batch=3, length=7)
        return self.config(), {"input_ids": x, "attention_mask": torch.tril(torch.ones_like(x))}


for name, reason in REFUSED.items():
    setattr(Common, name, unittest.skip(reason)(lambda self: None))
for name in dir(Mixin):
    if name.startswith(ELSEWHERE):  # images, sound, kernels of a GPU, attention's own weights
        setattr(Common, name, None)


class TestExperts(Common, unittest.TestCase):
    pass


class TestLatent(Common, unittest.TestCase):
    shape: ClassVar[dict[str, Any]] = KINDS["mla"] | {"tie_embeddings": False}
