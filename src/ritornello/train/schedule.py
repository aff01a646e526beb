"""What changes with the step, on the host: the learning rate and the rate of the router's bias."""

import math

from ritornello.config import TrainConfig


def learning_rate_scale(train: TrainConfig, step: int) -> float:
    """The factor on every group's learning rate at `step` (from 0): warm-up, then the schedule, down to the last step.

    It falls to final_lr_fraction one step after the last, so no step is spent at a rate of 0.
    """
    warm = min(1.0, (step + 1) / (train.warmup_steps + 1))
    match train.schedule:
        case "constant":
            return warm
        case "cosine":
            left = min(1.0, (train.steps - step) / max(1, train.steps - train.warmup_steps))
            shape = (1 - math.cos(math.pi * left)) / 2
        case "trapezoid":
            shape = min(1.0, (train.steps - step) / max(1.0, train.cooldown_fraction * train.steps))
    return warm * (train.final_lr_fraction + (1 - train.final_lr_fraction) * shape)


def router_bias_rate(train: TrainConfig, step: int) -> float:
    """γ of the load-balancing bias: constant, then 0 in the last router_bias_cooldown of steps (2412.19437)."""
    return train.router_bias_rate if step < train.steps * (1 - train.router_bias_cooldown) else 0.0
