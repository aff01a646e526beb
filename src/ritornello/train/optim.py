"""Which optimizer moves which parameter: one rule, and every parameter falls under it exactly once."""

from collections.abc import Iterable
from typing import Any, Literal

from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from ritornello.config import TrainConfig
from ritornello.train.parallel import is_spread

Group = Literal["muon", "decay", "no_decay"]  # Muon; AdamW with and without weight decay

# AdamW moves these parts without decay: it would pull a decay rate, a gate or a probe that starts at the identity to
# values that mean nothing, and shrink the rows of rare tokens, whose gradient then grows (OLMo 2, 2501.00656).
_NO_DECAY = {"embed_tokens", "value_table", "injection", "carry", "loop_embedding", "router", "read_matrix"}
_NO_DECAY |= {"halting", "probe"}
_ADAMW = {"head"}  # a matrix, but its rows are tokens: the orthogonal update assumes dense inputs and outputs


def group_of(name: str, parameter: nn.Parameter) -> Group:
    """The group of the parameter called `name` when Muon is on; under plain AdamW "muon" means "decay"."""
    path = name.split(".")
    if _NO_DECAY & set(path) or parameter.ndim < 2:
        return "no_decay"
    if _ADAMW & set(path) or path[-1] in ("loop_A", "loop_B"):
        return "decay"
    return "muon" if parameter.ndim == 2 else stacked_experts()


def stacked_experts() -> Group:
    """What a stack of expert matrices (E, out, in) gets; `torch.optim.Muon` takes matrices only.

    Orthogonalising each expert's update showed no gain over AdamW and made steps about 1.5 times as long; see
    experiments/LOG.md.
    """
    return "decay"


def groups(model: nn.Module, train: TrainConfig) -> dict[Group, dict[str, nn.Parameter]]:
    """Every trainable parameter by group and name, each in exactly one group; a tied one counts once."""
    table: dict[Group, dict[str, nn.Parameter]] = {"muon": {}, "decay": {}, "no_decay": {}}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = group_of(name, parameter)
            table["decay" if group == "muon" and train.optimizer == "adamw" else group][name] = parameter
    placed = [id(parameter) for members in table.values() for parameter in members.values()]
    assert sorted(placed) == sorted({id(p) for p in model.parameters() if p.requires_grad})
    return table


def build_optimizers(model: nn.Module, train: TrainConfig) -> list[Optimizer]:
    """AdamW, or Muon (2502.16982) for hidden matrices and AdamW for the rest.

    Muon's update is scaled by 0.2 √max(out, in): its root mean square is 0.2 muon_lr for every shape. The paper then
    shares one rate with AdamW; small models here did better with a muon_lr several times lr, so the two are apart.
    """
    table = groups(model, train)
    adamw = [
        _group(name, members, lr=train.lr, weight_decay=train.weight_decay if name == "decay" else 0.0)
        for name in ("decay", "no_decay")
        for members in _apart(table[name])
    ]
    optimizers: list[Optimizer] = []
    if adamw:
        optimizers.append(AdamW(adamw, lr=train.lr, betas=train.betas, eps=train.eps, fused=_can_fuse(model)))
    if table["muon"]:
        matrices = _group("muon", table["muon"], lr=train.muon_lr, weight_decay=train.weight_decay)
        optimizers.append(Muon([matrices], momentum=train.momentum, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def set_learning_rate(optimizers: Iterable[Optimizer], scale: float) -> None:
    """Set every group's rate to `scale` times its own peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * scale


def _group(name: Group, members: dict[str, nn.Parameter], *, lr: float, weight_decay: float) -> dict[str, Any]:
    parameters = list(members.items())  # with names, so that an optimizer's state can be told apart in a checkpoint
    return {"params": parameters, "name": name, "lr": lr, "peak_lr": lr, "weight_decay": weight_decay}


def _apart(members: dict[str, nn.Parameter]) -> list[dict[str, nn.Parameter]]:
    """By how they are spread over processes, if they are: no kernel takes two kinds at once."""
    parts: dict[Any, dict[str, nn.Parameter]] = {}
    for name, parameter in members.items():
        how = (parameter.device_mesh, parameter.placements) if is_spread(parameter) else None  # pyrefly: ignore
        parts.setdefault(how, {})[name] = parameter
    return list(parts.values())


def _can_fuse(model: nn.Module) -> bool:
    """Whether AdamW has one kernel for all: everywhere but on the meta device; the fallback is its own `foreach`."""
    return all(p.device.type in ("cpu", "cuda", "mps") and p.is_floating_point() for p in model.parameters())
