"""Adapt a model to other text by low-rank deltas alone: `python examples/peft_lora.py [RUN] [--data FILE.txt]`.

RUN is a run of `ritornello train`, by default the shipped model of Python source; the text, by default Python's help
pages, in English. Only the adapter is trained and saved; merged into the weights, it costs nothing. Its deltas are the
same at all loops; those that a model has of its own for each (`loop_A`, `loop_B`) stay as they are.
"""

import argparse
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments, default_data_collator, set_seed

from ritornello import load
from ritornello.config import TrainConfig
from ritornello.hub.collators import RandomDepth
from ritornello.hub.export import tokenizer_of, wrapped
from ritornello.recipes import find_model

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("run", nargs="?", default="python")
parser.add_argument("--data", type=Path)
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--out", default=tempfile.gettempdir() + "/lora")
args = parser.parse_args()

set_seed(0)
loaded = load(find_model(args.run), device="cpu")
tokenizer = tokenizer_of(loaded)
text = args.data.read_text() if args.data else "\n".join(topics.values())[:400_000]
ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
ids = ids[: len(ids) // 128 * 128].view(-1, 128).tolist()
rows = Dataset.from_dict({"input_ids": ids, "labels": ids})
rows = rows.shuffle(seed=0)
train, held_out = rows.skip(32), rows.take(32)
experts = ["experts.gate_up_proj", "experts.down_proj"] if loaded.model.config.ffn == "moe" else None
adapter = LoraConfig(r=8, target_modules="all-linear", target_parameters=experts, task_type="CAUSAL_LM")
model = get_peft_model(wrapped(loaded), adapter)
model.print_trainable_parameters()
options = {"per_device_train_batch_size": 8, "learning_rate": 5e-3, "logging_steps": 25}
config = TrainingArguments(args.out, max_steps=args.steps, report_to=[], use_cpu=True, **options)
depths = TrainConfig(depth="poisson", mean_loops=3, max_loops=6)
collate = RandomDepth(default_data_collator, depths)
trainer = Trainer(model, config, collate, train, held_out)
before = trainer.evaluate()["eval_loss"]
trainer.train()
print(f"held-out loss {before:.3f} -> {trainer.evaluate()['eval_loss']:.3f}")

model.save_pretrained(args.out)
again = PeftModel.from_pretrained(wrapped(load(find_model(args.run), device="cpu")), args.out).merge_and_unload()
x = torch.tensor(ids[:2])
print(f"saved, loaded and merged: logits differ by {(again.eval()(x).logits - model.eval()(x).logits).abs().max():.1e}")
