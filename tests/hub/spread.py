"""What `test_plans` runs in two processes: models shared out by transformers, beside one that is whole."""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import logging
from transformers.distributed.configuration_utils import DistributedConfig

from ritornello.hub import RitornelloForCausalLM
from tests.hub.kinds import KINDS, tokens

WAYS: dict[str, dict[str, int]] = {
    "tensor": {"tp_size": 2},
    "fsdp": {"fsdp_size": 2},
    "expert": {"fsdp_size": 2, "ep_size": 2},
    "expert, tensor": {"tp_size": 2, "ep_size": 2},
}
CASES = [("moe", way) for way in WAYS] + [
    (kind, way) for kind in ("mla", "dense", "streams") for way in ("tensor", "fsdp")
]


def largest(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def gradients(model: RitornelloForCausalLM, x: Tensor) -> dict[str, Tensor]:
    model.train()
    torch.manual_seed(0)  # noise states
    model(x, labels=x).loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in found.items()}


def case(folder: Path, way: str) -> dict[str, Any]:
    whole = RitornelloForCausalLM.from_pretrained(folder)
    spread = RitornelloForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(**WAYS[way]))
    local = [getattr(p, "to_local", lambda p=p: p)().numel() for p in spread.parameters()]
    x, options = tokens(), {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        logits = largest(spread.eval()(x).logits, whole.eval()(x).logits)
    same = torch.equal(spread.generate(x, **options), whole.generate(x, **options))
    expected, found = gradients(whole, x), gradients(spread, x)
    whole.zero_grad()
    other = gradients(whole, tokens(seed=2))
    return {
        "share": sum(local) / sum(p.numel() for p in whole.parameters()),
        "logits": logits,
        "generated": same,
        "names": sorted(set(expected) ^ set(found)),
        "gradients": max(largest(found[name], expected[name]) for name in expected),
        "control": max(largest(found[name], other[name]) for name in other),
    }


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    logging.disable_progress_bar()
    dist.init_process_group("gloo")
    found = {f"{kind}/{way}": case(folder / kind, way) for kind, way in CASES}
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    assert {kind for kind, _ in CASES} <= set(KINDS)
    main(Path(sys.argv[1]))
