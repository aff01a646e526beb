"""What OpenMythos 0.5.0 itself computes, frozen into tests/hub/openmythos.json. Where the package is installed:

    PYTHONPATH=. .bench/bin/python scripts/openmythos_fixtures.py

Its rotary code forces float32: for `float64` it runs as it is with float32 read as float64.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import open_mythos.variants as variants  # pyrefly: ignore
import torch
from open_mythos import main as theirs  # pyrefly: ignore

from tests.hub.mythos_weights import drawn, uniform  # pyrefly: ignore

TARGET = Path(__file__).parent.parent / "tests/hub/openmythos.json"
SMALL: dict[str, Any] = {
    "vocab_size": 19,
    "dim": 24,
    "n_heads": 4,
    "n_kv_heads": 2,
    "max_seq_len": 16,
    "max_loop_iters": 4,
}
SMALL |= {"prelude_layers": 1, "coda_layers": 1, "kv_lora_rank": 10, "q_lora_rank": 14, "qk_rope_head_dim": 4}
SMALL |= {"qk_nope_head_dim": 6, "v_head_dim": 5, "n_experts": 6, "n_shared_experts": 2, "n_experts_per_tok": 2}
SMALL |= {"expert_dim": 8, "rope_theta": 500.0, "lora_rank": 3, "attn_type": "gqa"}
SETTINGS: dict[str, dict[str, Any]] = {
    "GQA, some halt": {"bias": -0.5, "halt": 0.5},
    "MLA, some halt": {"attn_type": "mla", "bias": 0.0, "halt": 0.5},
    "MLA, more loops than trained": {"attn_type": "mla", "n_loops": 7, "bias": -1.5, "halt": 0.5},
    "GQA, none halts": {"bias": -6.0, "n_loops": 3},
    "MLA, all halt at once": {"attn_type": "mla", "bias": 9.0},
    "GQA, all halt in the third loop": {"bias": -0.4, "halt": 0.02, "n_loops": 3},
    "MLA, one shared expert, two layers around, another threshold": {
        "attn_type": "mla",
        "n_shared_experts": 1,
        "prelude_layers": 2,
        "coda_layers": 2,
        "act_threshold": 0.7,
        "bias": -0.3,
        "halt": 0.5,
    },
    "GQA, no layers around, A beyond its clamp": {
        "prelude_layers": 0,
        "coda_layers": 0,
        "n_kv_heads": 4,
        "decay": 25.0,
        "bias": 0.0,
        "halt": 0.5,
    },
}


class Float64Torch:
    """torch, in which float32 is float64."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def built(setting: dict[str, Any]) -> Any:
    shape = {name: value for name, value in setting.items() if name not in ("bias", "halt", "decay", "n_loops")}
    model = theirs.OpenMythos(theirs.MythosConfig(**(SMALL | shape))).eval()
    with torch.no_grad():
        for name, x in model.state_dict().items():
            if not x.is_complex() and name != "head.weight":
                x.copy_(drawn(name, x.shape, setting["bias"]))
        model.recurrent.act.halt.weight *= setting.get("halt", 1.0)
        model.recurrent.injection.log_A *= setting.get("decay", 1.0)
    return model


def row(name: str, setting: dict[str, Any]) -> dict[str, Any]:
    """Logits in both precisions, and what halting weighs in float64."""
    ids = (uniform("tokens", torch.Size((2, 7))).abs() * SMALL["vocab_size"]).long()
    found: dict[str, Any] = {"setting": setting, "tokens": ids.tolist()}
    for kind in ("float32", "float64"):
        exact = kind == "float64"
        torch.set_default_dtype(torch.float64 if exact else torch.float32)
        theirs.torch = Float64Torch() if exact else torch
        single = torch.Tensor.float
        torch.Tensor.float = torch.Tensor.double if exact else single
        try:
            model = built(setting)
            with torch.no_grad():
                logits = model(ids, n_loops=setting.get("n_loops"))
        finally:
            torch.Tensor.float, theirs.torch = single, torch
            torch.set_default_dtype(torch.float32)
        digits = 16 if exact else 9
        found["config"] = asdict(model.cfg)
        found[kind] = [float(f"{x:.{digits}g}") for x in logits.flatten().tolist()]
    return found


def variant(name: str) -> dict[str, Any]:
    """Counted without its weights."""
    config = getattr(variants, name)()
    config.max_seq_len, length = 8, config.max_seq_len  # its rotary tables would be computed
    with torch.device("meta"):
        n = sum(x.numel() for x in theirs.OpenMythos(config).parameters())
    return {"config": asdict(config) | {"max_seq_len": length}, "n_parameters": n}


def main() -> None:
    body = {"rows": {name: row(name, setting) for name, setting in SETTINGS.items()}}
    sizes = ("1b", "3b", "10b", "50b", "100b", "500b", "1t")
    body["variants"] = {f"mythos_{size}": variant(f"mythos_{size}") for size in sizes}
    TARGET.write_text(json.dumps(body, separators=(",", ":")) + "\n")
    print(f"{TARGET}: {TARGET.stat().st_size} bytes")


if __name__ == "__main__":
    main()
