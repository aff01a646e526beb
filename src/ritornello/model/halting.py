"""When a token stops: learned halting, and exit rules for inference. Every test here is position-local, or a prefix
would be computed otherwise than the whole; so predictions are read through a probe that skips the coda.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ritornello.config import ExitRule, ModelConfig, require
from ritornello.model.context import Loop
from ritornello.model.lora import Linear
from ritornello.model.norm import RMSNorm
from ritornello.ops.precision import at_least_float32
from ritornello.ops.subset import Subset


class Probe(nn.Module):
    """What the state would predict now: norm(W h), to be read by the model's head (tuned lens, 2303.08112)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.translator = Linear(config.dim, config.dim)
        self.norm = RMSNorm(config.dim, config.norm_eps)

    def reset(self, generator: torch.Generator) -> None:
        """Start at the logit lens: W = I."""
        nn.init.eye_(self.translator.weight)

    def forward(self, h: Tensor) -> Tensor:
        return self.norm(self.translator(h))


@dataclass(frozen=True)
class Signals:
    """What a test may read of each token: the state h (m, T, D) after this loop and `before` it, and the probe's
    log-probabilities (m, T, V) of both where the model has a probe."""

    h: Tensor
    before: Tensor
    log_probs: Tensor | None
    log_probs_before: Tensor | None

    def kl(self) -> Tensor:
        """KL(now ‖ before) in nats."""
        assert self.log_probs is not None and self.log_probs_before is not None
        return (self.log_probs.exp() * (self.log_probs - self.log_probs_before)).sum(-1)

    def entropy(self) -> Tensor:
        """Of the prediction, in nats."""
        assert self.log_probs is not None
        return -(self.log_probs.exp() * self.log_probs).sum(-1)

    def delta(self) -> Tensor:
        """Relative change of the state."""
        return (self.h - self.before).norm(dim=-1) / self.h.norm(dim=-1).clamp(min=1e-12)

    def features(self) -> Tensor:
        """(m, T, 3), detached: log KL, entropy, 1 − cos(h, before)."""
        turn = 1 - (self.h * self.before).sum(-1) / (self.h.norm(dim=-1) * self.before.norm(dim=-1)).clamp(min=1e-12)
        return torch.stack((self.kl().clamp(min=1e-8).log(), self.entropy(), turn), -1).detach()


EXIT_TESTS = {"kl": Signals.kl, "entropy": Signals.entropy, "delta": Signals.delta}

LEARNED_RULES = ("hazard", "cumulative")
HALTING_BIAS = -3.0  # 0 or more traps most runs at one loop (2604.21999)


class ActHead(nn.Module):
    """Adaptive computation time (Graves 1603.08983): p = σ(w·h + b); probabilities add up until they reach 1."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.dim, 1)

    def reset(self, generator: torch.Generator) -> None:
        nn.init.zeros_(self.linear.weight)
        nn.init.constant_(self.linear.bias, HALTING_BIAS)

    def read(self, h: Tensor) -> Tensor:
        """σ(w·h + b): (m, T)."""
        weight, bias = at_least_float32(self.linear.weight), at_least_float32(self.linear.bias)
        with torch.autocast(h.device.type, enabled=False):
            return F.linear(h.to(weight.dtype), weight, bias).squeeze(-1).sigmoid()

    def stopping(self, signals: Signals, survival: Tensor) -> Tensor:
        """The probability (m, T) of stopping at this loop, at most what is left."""
        return torch.minimum(self.read(signals.h), survival)


class StateGateHead(ActHead):
    """A hazard λ = σ(w·h + b) that reads the state; p_t = λ_t · Π_{s<t} (1 − λ_s) (Ouro 2510.25741, §3.1)."""

    def stopping(self, signals: Signals, survival: Tensor) -> Tensor:
        return survival * self.read(signals.h)


class GateHead(nn.Module):
    """A hazard λ from three features of the change between loops, which transfer to unseen depths as the state does
    not; p_t = λ_t · Π_{s<t} (1 − λ_s) as in PonderNet (2107.05407)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(3, 32), nn.Linear(32, 1)

    def reset(self, generator: torch.Generator) -> None:
        for linear in (self.hidden, self.out):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5, generator=generator)
        nn.init.zeros_(self.hidden.bias)
        nn.init.constant_(self.out.bias, HALTING_BIAS)

    def logits(self, features: Tensor) -> Tensor:
        """features (..., 3) -> log-odds of stopping (...)."""
        with torch.autocast(features.device.type, enabled=False):
            return self.out(F.gelu(self.hidden(features.to(self.hidden.weight.dtype)))).squeeze(-1)

    def stopping(self, signals: Signals, survival: Tensor) -> Tensor:
        return survival * self.logits(signals.features()).sigmoid().to(survival.dtype)


HALTING_HEADS: dict[str, type[ActHead | GateHead]] = {"act": ActHead, "gate": GateHead, "state_gate": StateGateHead}


@dataclass(frozen=True)
class HaltState:
    """By token (m, T): whether it has halted; the probability that it has not; the weight of the current loop; the
    weight of its last. `mixture` (m, T, D): Σ weight · h. `log_probs` (m, T, V): the probe's, after this loop."""

    halted: Tensor
    survival: Tensor
    weight: Tensor
    remainder: Tensor
    mixture: Tensor | None
    log_probs: Tensor | None

    def join(self, other: "HaltState") -> "HaltState":
        """Rows that start now, below those under way."""
        pairs = ((getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        joined: list[Any] = [None if mine is None else torch.cat((mine, new)) for mine, new in pairs]
        return HaltState(*joined)

    def take(self, some: Subset) -> "HaltState":
        return HaltState(*(some.take(getattr(self, f.name)) for f in fields(self)))

    def put(self, some: Subset, new: "HaltState") -> "HaltState":
        """What the others have stays, but that a loop they do not run weighs nothing."""
        old = replace(self, weight=torch.zeros_like(self.weight))
        return HaltState(*(some.put(getattr(old, f.name), getattr(new, f.name)) for f in fields(self)))


def check_exit(config: ModelConfig, rule: ExitRule | None) -> None:
    """Whether a model of this kind can follow this rule."""
    if rule is None:
        return
    require(isinstance(rule, ExitRule), "exit", rule, "an ExitRule or None")
    require(not config.is_plain, "exit", rule.rule, "absent for a plain model, which has no loops to leave")
    if learned := rule.rule in LEARNED_RULES:
        require(config.halting in HALTING_HEADS, "exit", rule.rule, f"training-free: halting is {config.halting!r}")
    elif rule.rule != "delta":
        remedy = "train with halting = 'kl', 'entropy' or 'gate'"
        require(config.needs_probe, "exit", rule.rule, f"'delta': halting {config.halting!r} trains no probe", remedy)
    require(learned or config.read_out == "last", "exit", rule.rule, "learned when the read-out is a mixture")


class Halting(nn.Module):
    """Follows one token's chances of stopping from loop to loop. Without a learned head it only applies exit rules."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.head = HALTING_HEADS[config.halting](config) if config.halting in HALTING_HEADS else None

    def consults(self, rule: ExitRule | None) -> bool:
        """Whether the learned head takes part: a training-free rule makes it idle."""
        return self.head is not None and (rule is None or rule.rule in LEARNED_RULES)

    def reads_predictions(self, rule: ExitRule | None) -> bool:
        """Whether the probe's predictions are needed: by the gate's features or by the rule."""
        gated = self.config.halting == "gate" and self.consults(rule)
        return gated or (rule is not None and rule.rule in ("kl", "entropy"))

    def start(self, h: Tensor, log_probs: Tensor | None, real: Tensor | None) -> HaltState:
        """h (m, T, D): the initial state. Those that are not `real` (m, T) have halted from the start."""
        zero = torch.zeros(h.shape[:2], device=h.device, dtype=h.dtype)
        mixture = torch.zeros_like(h) if self.config.read_out == "mixture" else None
        return HaltState(zero.bool() if real is None else ~real, zero + 1, zero, zero, mixture, log_probs)

    def step(
        self, state: HaltState, now: Signals, rule: ExitRule | None, loop: Loop, idle: Tensor, last: Tensor | bool
    ) -> HaltState:
        """After a loop that all but the `idle` (m, T) ran: who stops, and what this loop weighs. A last loop takes
        all that is left, whether it stops by itself or its budget ends, so that its weights sum to 1."""
        stopping = torch.zeros_like(state.survival)
        if self.head is not None and self.consults(rule):
            stopping = self.head.stopping(now, state.survival)
        if rule is not None:
            last = last | self._leaves(state, now, rule, stopping) & (loop + 1 >= rule.min_loops)
        ends = last & ~idle
        weight = torch.where(ends, state.survival, stopping).masked_fill(idle, 0)
        survival = torch.where(ends, 0, state.survival - weight)
        remainder = torch.where(ends, weight, state.remainder)
        mixture = None if state.mixture is None else state.mixture + weight[..., None] * now.h
        return HaltState(state.halted | ends, survival, weight, remainder, mixture, now.log_probs)

    def _leaves(self, state: HaltState, now: Signals, rule: ExitRule, stopping: Tensor) -> Tensor:
        if rule.rule == "cumulative":
            return 1 - (state.survival - stopping) >= rule.threshold
        if rule.rule == "hazard":
            return stopping >= rule.threshold * state.survival
        return EXIT_TESTS[rule.rule](now) < rule.threshold
