"""How far converted DeepSeek-V3 layers are from transformers' own: prints the table of docs/converters-deepseek.md.

`python -m scripts.deepseek_parity` from the repository. float64 as in tests/hub/test_deepseek.py: their code with
`torch.float32` read as float64; float32 as it is.
"""

import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import modeling_rope_utils
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek
from transformers.utils import logging

from ritornello.hub.deepseek import recurrent_block
from tests.hub import test_deepseek as tests  # pyrefly: ignore
from tests.model.test_parity import Float64Torch, through  # pyrefly: ignore


def differences(setting: str, dtype: torch.dtype) -> tuple[float, float]:
    """Of a layer's output and of a whole model's logits."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        theirs = tests.published(Path(folder), dtype, **tests.SETTINGS[setting])
        one, whole = recurrent_block(folder, [2]), recurrent_block(folder, [1, 2], **tests.WHOLE)
    x, ids = tests.draw(tests.B, tests.LENGTH, tests.DIM).to(dtype), torch.randint(tests.VOCAB, (tests.B, 40))
    block, model = one.model().eval(), whole.model().eval()
    layer = through(block, block.recurrent[0], x)  # pyrefly: ignore
    expected = theirs.model.layers[2](
        x,
        tests.causal_mask().to(dtype),
        position_embeddings=theirs.model.rotary_emb(x, torch.arange(tests.LENGTH)[None]),
    )
    return apart(layer, expected), apart(model(ids).logits, theirs(ids, use_cache=False).logits)


def apart(a: Tensor | None, b: Tensor) -> float:
    assert a is not None
    return float((a - b).abs().max() / b.abs().max())


@torch.inference_mode()
def main() -> None:
    logging.disable_progress_bar()
    real = deepseek.torch
    print("| setting | dtype | a layer | a whole model |\n|---|---|---|---|")
    for setting in tests.SETTINGS:
        for dtype in (torch.float64, torch.float32):
            for module in (deepseek, modeling_rope_utils):
                module.torch = Float64Torch() if dtype == torch.float64 else real  # pyrefly: ignore
            layer, whole = differences(setting, dtype)
            print(f"| {setting} | {str(dtype).removeprefix('torch.')} | {layer:.0e} | {whole:.0e} |")


if __name__ == "__main__":
    main()
