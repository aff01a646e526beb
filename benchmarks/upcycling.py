"""What a pretrained model loses when its layers become loops, before and after a little distillation.

python -m benchmarks.upcycling MODEL.gguf --english A.txt --unseen B.txt [--tokens 32768] [--minutes 40] [--table]

Bits per byte of text that no healing reads: `--unseen`, and every tenth file of Python's standard library. Healing
reads `--english` and the other files. Each cell is a line of results/upcycling.jsonl; one that is there is not measured
again.
"""

import argparse
import json
import math
import sys
import sysconfig
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from ritornello.accounting import count_parameters
from ritornello.config import TrainConfig
from ritornello.hub.converters import read_published
from ritornello.hub.moments import READ_BY, Moments, second_moments
from ritornello.hub.upcycle import folded, looped_shape, low_rank, share_kept, upcycle
from ritornello.model.rdt import RecurrentDepthTransformer
from ritornello.ops.loss import linear_cross_entropy
from ritornello.train.optim import build_optimizers, set_learning_rate
from ritornello.train.schedule import learning_rate_scale

RESULTS = Path(__file__).parent / "results" / "upcycling.jsonl"
KEPT = Path("runs/upcycling")
LENGTH, ROWS = 512, 1  # tokens of a window; windows in a step of healing
N_TEST, N_MOMENTS = 3, 8  # windows of each kind
N_LAYERS = 30  # of SmolLM2-135M
CHUNK = 512  # tokens whose logits exist at once


@dataclass(frozen=True)
class Cell:
    """One measurement. n_prelude, n_recurrent, n_loops = 0: the plain model itself."""

    n_prelude: int = 0
    n_recurrent: int = 0
    n_loops: int = 0
    rank: int = 0
    init: str = "mean"
    informed: bool = False  # by second moments
    run_loops: int = 0  # 0: n_loops; 1 with init "first": the other layers are dropped
    tokens: int = 0  # of healing
    loss: str = "kl"
    seed: int = 0


def cells(tokens: int) -> Iterator[Cell]:
    """In the order in which they are measured."""
    yield Cell()
    yield Cell(4, 11, 2, rank=576)
    for rank in (0, 8, 64, 256):
        yield Cell(4, 11, 2, rank=rank)
    for grouping in ((4, 11, 2), (6, 9, 2), (4, 7, 3)):
        for rank in (0, 8, 64, 256):
            yield Cell(*grouping, rank=rank, informed=True)
    yield Cell(4, 11, 2, rank=64, init="first")
    yield Cell(4, 11, 2, init="first", run_loops=1)
    for rank in (0, 64, 256):
        yield Cell(4, 11, 2, rank=rank, init="unshared", informed=True)
    for rank in (64, 0, 256):
        yield Cell(4, 11, 2, rank=rank, informed=True, tokens=tokens)
    yield Cell(4, 11, 2, rank=64, informed=True, tokens=tokens, seed=1)
    yield Cell(4, 11, 2, rank=64, tokens=tokens)
    yield Cell(4, 11, 2, rank=64, informed=True, tokens=tokens, loss="ce")
    yield Cell(4, 7, 3, rank=64, informed=True, tokens=tokens)
    yield Cell(4, 11, 2, rank=64, init="unshared", informed=True, tokens=tokens)


class Bench:
    def __init__(self, path: Path, english: Path, unseen: Path, tokens: int) -> None:
        self.path, self.tokens = path, tokens
        self._full: tuple[Cell, RecurrentDepthTransformer] | None = None
        self.plain = read_published(path)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        python = [file.read_text(encoding="utf-8") for file in files]
        self.test = {
            "english": self._windows(unseen.read_text(encoding="utf-8"), N_TEST),
            "python": self._windows("\n".join(python[::10]), N_TEST),
        }
        seen = english.read_text(encoding="utf-8"), "\n".join(text for i, text in enumerate(python) if i % 10)
        n_train = tokens // LENGTH // 2
        self.train = torch.cat([self._windows(text, n_train) for text in seen])
        self.weighed = torch.cat([self._windows(text, 4 * N_MOMENTS)[:N_MOMENTS] for text in seen])

    def _windows(self, text: str, n: int) -> Tensor:
        """(n, LENGTH) spread evenly over the text."""
        size = 16 * LENGTH  # characters, of which a window's tokens are the first
        places = torch.linspace(0, len(text) - size, n).long().tolist()
        return torch.tensor([self.tokenizer(text[i : i + size]).input_ids[:LENGTH] for i in places])

    @cached_property
    def moments(self) -> list[Moments]:
        return second_moments(self.plain, self.weighed.split(4))

    def made(self, cell: Cell) -> RecurrentDepthTransformer:
        """Cut from that of full rank, whose deltas begin with those of every smaller one."""
        if cell.init == "unshared":
            return unshared(self.plain, cell, self.moments)
        like = replace(cell, rank=self.plain.config.dim, run_loops=0, tokens=0, loss="kl", seed=0)
        if self._full is None or self._full[0] != like:
            shape = {"n_prelude": cell.n_prelude, "n_recurrent": cell.n_recurrent, "n_loops": cell.n_loops}
            init: Any = cell.init
            moments = self.moments if cell.informed else None
            self._full = like, upcycle(self.plain, **shape, rank=like.rank, init=init, moments=moments)
        return cut(self._full[1], cell.rank)

    @torch.no_grad()
    def bits(self, model: RecurrentDepthTransformer, n_loops: int | None) -> dict[str, float]:
        """Per byte, of all tokens of a window but the first."""
        found = {}
        for kind, windows in self.test.items():
            nats, n_bytes = 0.0, 0
            for row in windows:
                hidden = model(row[None, :-1], n_loops=n_loops, return_logits=False).hidden[0]
                nats += float(linear_cross_entropy(hidden, model.head_weight, row[1:], reduction="sum"))
                n_bytes += len(self.tokenizer.decode(row[1:]).encode())
            found[kind] = nats / n_bytes / math.log(2)
        return found

    @cached_property
    def taught(self) -> Tensor:
        """(n, LENGTH, D): what the plain model's head reads, of what healing reads. Kept on disk."""
        file = KEPT / f"{len(self.train)}.safetensors"
        if not file.exists():
            KEPT.mkdir(parents=True, exist_ok=True)
            with torch.no_grad():
                rows = [self.plain(row[None], return_logits=False).hidden[0].to(torch.bfloat16) for row in self.train]
            save_file({"hidden": torch.stack(rows)}, file)
        return load_file(file)["hidden"]

    def heal(self, model: RecurrentDepthTransformer, cell: Cell, lr: float) -> list[float]:
        """Train all but embeddings, head and prelude; the losses in nats per token, step by step."""
        before = model.prelude_layers[: cell.n_prelude]
        for part in (model.embed_tokens, before, *([] if model.head is None else [model.head])):
            part.requires_grad_(False)
        n_steps = len(self.train) // ROWS
        train = TrainConfig(steps=n_steps, warmup_steps=n_steps // 8, lr=lr, optimizer="adamw", schedule="cosine")
        optimizers = build_optimizers(model, train)
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(cell.seed))
        losses = []
        for step, rows in enumerate(order[: n_steps * ROWS].split(ROWS)):
            set_learning_rate(optimizers, learning_rate_scale(train, step))
            with torch.autocast("cpu", torch.bfloat16):
                hidden = model(self.train[rows], return_logits=False).hidden
            if cell.loss == "kl":
                loss, gradient = distance(hidden.detach(), self.taught[rows], model.head_weight.detach())
                hidden.backward(gradient)
            else:
                labels = F.pad(self.train[rows][:, 1:], (0, 1), value=-100)
                loss = linear_cross_entropy(hidden.flatten(0, 1), model.head_weight.detach(), labels.flatten())
                loss.backward()
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            losses.append(float(loss))
            print(f"  {step} {losses[-1]:.3f}", file=sys.stderr, flush=True)
        return losses

    def measure(self, cell: Cell, lr: float) -> dict[str, Any]:
        began = time.perf_counter()
        model = self.made(cell) if cell.n_loops else self.plain
        looped = cell.n_loops > 0 and cell.init != "unshared"
        row: dict[str, Any] = asdict(cell) | {"parameters": self.count(cell)}
        row["kept"] = share_kept(self.plain, model) if looped else None
        if cell.tokens:
            row["before"] = self.bits(model, None)
            healing = time.process_time()
            losses = self.heal(model, cell, lr)
            row |= {"lr": lr, "losses": [round(x, 4) for x in losses], "heal_s": time.process_time() - healing}
        if not cell.n_loops:
            row["apart"] = self.apart()
        return row | {"bits": self.bits(model, cell.run_loops or None), "seconds": time.perf_counter() - began}

    def count(self, cell: Cell) -> int:
        """Parameters, from the shape; "unshared" has as many as what it is the control of."""
        c, names = self.plain.config, ("n_prelude", "n_recurrent", "n_loops", "rank")
        shape = looped_shape(c, **{name: getattr(cell, name) for name in names}) if cell.n_loops else c
        return count_parameters(shape)["total"]

    @torch.no_grad()
    def apart(self) -> float:
        """The largest difference of a logit from transformers' on real text, float32."""
        theirs = AutoModelForCausalLM.from_pretrained(
            str(self.path.parent), gguf_file=self.path.name, dtype=torch.float32
        )
        rows = [windows[:1] for windows in self.test.values()]
        return max(float((theirs(row).logits - self.plain(row).logits).abs().max()) for row in rows)


class Factors(nn.Module):
    """y = B·A·x, in every loop."""

    def __init__(self, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(down.contiguous()), nn.Parameter(up.contiguous())

    def forward(self, x: Tensor, loop: int = 0) -> Tensor:
        return F.linear(F.linear(x, self.down), self.up)


@torch.no_grad()
def unshared(plain: RecurrentDepthTransformer, cell: Cell, moments: list[Moments]) -> RecurrentDepthTransformer:
    """The control without loops: each layer's matrices alone, of as low a rank as takes the same parameters."""
    model = deepcopy(plain)
    for i in range(cell.n_prelude, cell.n_prelude + cell.n_recurrent * cell.n_loops):
        layer: Any = model.prelude_layers[i]
        for name, x in folded(dict(layer.state_dict())).items():
            share = x.numel() // (cell.n_loops * sum(x.shape))  # of the matrix that would stand for several
            owner, _, own = name.rpartition(".")
            setattr(layer.get_submodule(owner), own, Factors(*low_rank(x, cell.rank + share, moments[i][name])))
        for name in READ_BY:
            layer.get_submodule(name).weight.fill_(1)
    return model


def cut(model: RecurrentDepthTransformer, rank: int) -> RecurrentDepthTransformer:
    """A copy whose deltas have the first `rank` directions."""
    with torch.device("meta"):
        made = RecurrentDepthTransformer(
            replace(model.config, lora_rank=rank, lora_targets=model.config.lora_targets if rank else ())
        )
    state = {name: x for name, x in model.state_dict().items() if rank or "loop_" not in name}
    state = {name: x[:, :rank] if name.endswith("loop_A") else x for name, x in state.items()}
    state = {name: x[:, :, :rank] if name.endswith("loop_B") else x for name, x in state.items()}
    made.load_state_dict({name: x.clone() for name, x in state.items()}, assign=True)
    return made.eval()


def distance(hidden: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The mean KL(target's prediction ‖ hidden's) in nats, and its gradient by hidden (B, T, D): in one pass, and no
    logits of more than CHUNK tokens."""
    total, gradients, n = hidden.new_zeros((), dtype=torch.float32), [], hidden[..., 0].numel()
    with torch.autocast("cpu", torch.bfloat16):
        for x, y in zip(hidden.flatten(0, 1).split(CHUNK), target.flatten(0, 1).split(CHUNK), strict=True):
            log_q, log_p = ((F.linear(z, weight)).float().log_softmax(-1) for z in (x, y))
            p = log_p.exp()
            total += (p * (log_p - log_q)).sum()
            gradients.append((log_q.exp() - p).div_(n) @ weight)
    return total / n, torch.cat(gradients).view(hidden.shape).to(hidden.dtype)


def table(rows: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    base, rows = rows[0], sorted(rows, key=lambda row: (row["tokens"] > 0, row["init"] == "unshared"))
    lines = [
        "| layers | rank | made by | healed | parameters | weights kept | English | Python |",
        "|---|" + "---|" * 7,
    ]
    for row in rows:
        cell = Cell(**{name: row[name] for name in asdict(Cell())})
        after = N_LAYERS - cell.n_prelude - cell.n_recurrent * cell.n_loops
        layers = f"{cell.n_prelude} + {cell.n_recurrent} × {cell.n_loops} + {after}"
        if cell.run_loops == 1:
            layers = f"{N_LAYERS - cell.n_recurrent * (cell.n_loops - 1)}, the others dropped"
        layers = layers if cell.n_loops else f"{N_LAYERS}, as it is"
        how = "" if not cell.n_loops else f"{cell.init}{', moments' if cell.informed else ''}"
        layers = f"{N_LAYERS}, matrices of low rank" if cell.init == "unshared" else layers
        kept = "" if row["kept"] is None or not cell.n_loops else f"{row['kept']:.2f}"
        healed = f"{cell.tokens:,} tokens, {cell.loss}, seed {cell.seed}" if cell.tokens else ""
        bits = " | ".join(
            f"{row['bits'][kind]:.3f} (+{row['bits'][kind] - base['bits'][kind]:.3f})" for kind in base["bits"]
        )
        share = row["parameters"] / base["parameters"]
        lines.append(f"| {layers} | {cell.rank} | {how} | {healed} | {share:.2f} | {kept} | {bits} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--english", type=Path, required=True)
    parser.add_argument("--unseen", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--minutes", type=float, default=600, help="begin no cell after these")
    parser.add_argument("--only", choices=("made", "healed"))
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    if options.table:
        print(table(rows))
        return 0
    done = [{name: row[name] for name in asdict(Cell())} for row in rows]
    bench, began = Bench(options.model, options.english, options.unseen, options.tokens), time.monotonic()
    for cell in cells(options.tokens):
        other = options.only == ("made" if cell.tokens else "healed")
        if other or asdict(cell) in done or time.monotonic() - began > 60 * options.minutes:
            continue
        row = bench.measure(cell, options.lr)
        print({name: x for name, x in row.items() if name != "losses"}, flush=True)
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
