"""Bring back some of what a model lost when its layers became loops: `python examples/heal.py FOLDER --teacher PLAIN`.

FOLDER is what `ritornello loopify` or `ritornello convert --loops` wrote, PLAIN the plain model that it was made of, in
a folder of `ritornello convert`. Low-rank deltas, the same at all loops, learn to predict what the teacher does (the
divergence of its next-token distribution), on any text (--data FILE.txt; by default Python's help pages). Merged, they
cost nothing: the folder --out is one that all else here takes.
"""

import argparse
import shutil
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

import ritornello.hub  # noqa: F401 - transformers then knows the folder's kind

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", type=Path)
parser.add_argument("--teacher", type=Path, required=True)
parser.add_argument("--data", type=Path)
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--length", type=int, default=128)
parser.add_argument("--rank", type=int, default=16)
parser.add_argument("--lr", type=float, default=1e-3)
parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir(), "healed"))
args = parser.parse_args()


class Distilled(Trainer):
    """The loss is how far the predictions are from the teacher's, in nats a token."""

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Tensor], return_outputs=False, **_):
        with torch.no_grad():
            wanted = teacher(inputs["input_ids"]).logits.float().log_softmax(-1).flatten(0, 1)
        out = model(inputs["input_ids"])
        loss = kl_div(out.logits.float().log_softmax(-1).flatten(0, 1), wanted, log_target=True, reduction="batchmean")
        return (loss, out) if return_outputs else loss


set_seed(0)
tokenizer = AutoTokenizer.from_pretrained(args.folder)
teacher = AutoModelForCausalLM.from_pretrained(args.teacher).eval()
student = AutoModelForCausalLM.from_pretrained(args.folder)
text = args.data.read_text() if args.data else "\n".join(topics.values())[:400_000]
ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
ids = ids[: len(ids) // args.length * args.length].view(-1, args.length).tolist()
rows = Dataset.from_dict({"input_ids": ids, "labels": ids}).shuffle(seed=0)
train, held_out = rows.skip(16), rows.take(16)

model = get_peft_model(student, LoraConfig(r=args.rank, target_modules="all-linear", task_type="CAUSAL_LM"))
model.print_trainable_parameters()
options = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "learning_rate": args.lr}
options |= {"report_to": [], "save_strategy": "no", "prediction_loss_only": True}
with tempfile.TemporaryDirectory() as aside:
    how = TrainingArguments(aside, max_steps=args.steps, use_cpu=True, **options)
    trainer = Distilled(model, how, train_dataset=train, eval_dataset=held_out)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
print(f"held-out divergence {before:.3f} -> {trainer.evaluate()['eval_loss']:.3f} nats a token")

shutil.copytree(args.folder, args.out)
model.merge_and_unload().save_pretrained(args.out)
again = AutoModelForCausalLM.from_pretrained(args.out).eval()
x = torch.tensor(ids[:2])
print(f"merged and read back: logits differ by {(again(x).logits - model.eval()(x).logits).abs().max():.1e}")
