"""How far our OpenMythos is from its own code, and what each way to halt differs by: prints the tables of
docs/converters-openmythos.md, from what scripts/openmythos_fixtures.py froze.

`python -m scripts.openmythos_parity` from the repository. Differences are of logits, beside the largest logit.
"""

import torch
from torch import Tensor

from ritornello.config import ExitRule
from ritornello.hub.openmythos import OpenMythos
from ritornello.model.cache import KeyValues, Passing
from ritornello.model.context import Context, Loop
from ritornello.model.moe import Routed
from tests.hub.test_openmythos import NAMES, converted  # pyrefly: ignore


class BranchesAlone(OpenMythos):
    """What the loop would be as DESIGN has it: the block adds what its branches say, not what it has read too."""

    def loop_once(
        self, h: Tensor, e: Tensor, loop: Loop, context: Context, kv: KeyValues, running: Tensor | None = None
    ) -> tuple[Tensor, tuple[Routed, ...]]:
        new, routed = super().loop_once(h, e, loop, context, kv, running)
        return new - self.read_norm(h + e + self.index(loop, h)), routed


def apart(a: Tensor | None, b: Tensor) -> float:
    assert a is not None
    return float((a - b).abs().max() / b.abs().max())


def weights(model: OpenMythos, tokens: Tensor, n_loops: int | None) -> Tensor:
    """What the loops of each token weigh together, as published: (B, T)."""
    out = model(tokens, n_loops=n_loops, trajectory=True)
    assert out.trajectory is not None
    return torch.stack([state.halt.weight for state in out.trajectory if state.halt is not None]).sum(0)


def as_ours(model: OpenMythos, tokens: Tensor, n_loops: int | None, *, frozen: bool) -> Tensor | None:
    """Weights that sum to 1; frozen: and halted tokens that stop, or else compute on."""
    rule = ExitRule("cumulative", model.halting.published.threshold)
    if frozen:
        return model(tokens, n_loops=n_loops, exit=rule).logits
    out = model(tokens, n_loops=n_loops, trajectory=True)
    assert out.trajectory is not None
    state = out.trajectory[-1]
    assert state.halt is not None and state.halt.mixture is not None
    mixture = state.halt.mixture + state.halt.survival[..., None] * state.h
    context = model.context(model.embed(tokens))
    return model.logits(model.coda(mixture, context, Passing()))


@torch.inference_mode()
def row(name: str) -> list[str]:
    model, tokens, expected, n_loops = converted(name)
    single, _, rough, _ = converted(name, torch.float32)
    equal = apart(model(tokens, n_loops=n_loops).logits, expected), apart(single(tokens, n_loops=n_loops).logits, rough)
    least = float(weights(model, tokens, n_loops).min())
    whole, frozen = (as_ours(model, tokens, n_loops, frozen=frozen) for frozen in (False, True))
    assert whole is not None
    model.__class__ = BranchesAlone
    changed = apart(whole, expected), apart(frozen, whole), apart(model(tokens, n_loops=n_loops).logits, expected)
    return [*(f"{x:.0e}" for x in equal), f"{least:.2f}", *(f"{x:.1g}" for x in changed)]


def main() -> None:
    print("| setting | float64 | float32 | least weight | rest to the last loop | halted frozen | branches alone |")
    print("|---|---|---|---|---|---|---|")
    for name in NAMES:
        print("|", name, "|", " | ".join(row(name)), "|")


if __name__ == "__main__":
    main()
