"""What --exit, --exit-threshold and --min-loops ask for."""

from typing import get_args

from ritornello.config import ExitName, ExitRule, exit_by, require, require_choice


def exit_rule(
    rule: str | None, threshold: float | None, min_loops: int, others: tuple[str, ...] = ()
) -> ExitRule | None:
    """None forces the depth. others: what else --exit may be there."""
    if rule is None:
        return no_exit(threshold, min_loops, "used with --exit RULE")
    require_choice("--exit", rule, (*get_args(ExitName), *others))
    name: ExitName = rule  # type: ignore[assignment]
    return exit_by(name, threshold, min_loops)


def no_exit(threshold: float | None, min_loops: int, allowed: str) -> None:
    """What belongs to a rule was not given either."""
    require(min_loops == 1, "--min-loops", min_loops, allowed)
    require(threshold is None, "--exit-threshold", threshold, allowed)
