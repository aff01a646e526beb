"""ritornello train"""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, UseAppendAction, arg

from ritornello.commands import INTEGER, Command, option
from ritornello.config import require, require_int
from ritornello.progress import Progress, process_rank


@dataclass(frozen=True, kw_only=True)
class Train(Command):
    """Train a model as a recipe says. Metrics and checkpoints go to the run's directory.

    torchrun --nproc-per-node N -m ritornello.cli train RECIPE: N processes share the work, as [parallel] says.
    """

    recipe: Annotated[Positional[str], arg(metavar="RECIPE", help="The name of a shipped recipe, or a TOML file.")]
    out: Annotated[Path | None, option("The run's directory. Default: runs/NAME.", metavar="DIR")] = None
    set: Annotated[
        UseAppendAction[tuple[tuple[str, ...], ...]],
        arg(metavar="KEY=VALUE", help="Replace a setting, for example train.lr=1e-3."),
    ] = ()
    resume: Annotated[bool, option("Continue the run from its last checkpoint.")] = False
    other_data: Annotated[bool, option("Resume although the data or the tokenizer changed.")] = False
    device: Annotated[str, option("auto, cuda, mps or cpu.", metavar="NAME")] = "auto"
    profile: Annotated[int, INTEGER, option("Trace so many steps, for ui.perfetto.dev.")] = 0

    def run(self) -> None:
        from ritornello import recipes

        mapping = recipes.read_toml(recipes.find(self.recipe))
        recipe = recipes.from_mapping(recipes.apply_sets(mapping, [item for group in self.set for item in group]))
        out = self.out or _default_out(recipe.name)
        first = process_rank() == 0  # of those that torchrun started: it speaks, and makes the run's directory
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            label_lines(process_rank())
        if first:
            check_output(out, resume=self.resume)
        require_int("--profile", self.profile, 0)

        from ritornello.device import fallbacks, pick_device
        from ritornello.train.trainer import train

        with Progress(recipe.train.steps, quiet=self.common.quiet or not first) as progress:
            for said in fallbacks(pick_device(self.device)):
                progress.note(said)
            train(
                recipe,
                out=out,
                resume=self.resume,
                device=self.device,
                observer=progress,
                data_progress=progress.stage,
                offline=self.common.offline,
                other_data=self.other_data,
                profile=self.profile,
            )
            if first and not self.common.quiet:
                progress.note(_used(out))
        if first:
            print(out)


def label_lines(rank: int) -> None:
    """Log lines bear the process' number; what all would say is said by the first."""
    handler, logger = logging.StreamHandler(), logging.getLogger("ritornello")
    handler.setFormatter(logging.Formatter(f"[rank {rank}] %(message)s"))
    logger.addHandler(handler)
    logger.propagate = False
    if rank:
        logger.setLevel(logging.ERROR)


def _default_out(name: str) -> Path:
    plain = Path(name).name == name and name not in ("", "..")
    require(plain, "name", name, "a plain name, without folders", "--out chooses another place")
    return Path("runs", name)


def _used(out: Path) -> str:
    """What a run took, as far as can be told."""
    import shutil

    from ritornello.commands.runs import megabytes
    from ritornello.train import runs

    try:
        run, free = runs.read(out), shutil.disk_usage(out).free
    except (OSError, ValueError) as error:  # the run itself has ended well
        return f"{out}: {error}"
    peak = run.metrics.get("peak_mb")
    memory = f"peak memory {megabytes(peak * 1e6)}; " if peak else ""
    return f"{memory}{megabytes(run.n_bytes)} on disk, {free / 1e9:,.1f} GB free"


def check_output(out: Path, *, resume: bool) -> None:
    """Refuse to mix a new run with what is already in its directory."""
    require(not out.exists() or out.is_dir(), "--out", str(out), "a directory or a new name")
    used = out.is_dir() and any(path.name != ".lock" for path in out.iterdir())
    require(resume or not used, "--out", str(out), "empty or new", "--resume continues the run that is there")
