"""Training as people set it up without loratune: Transformers' Trainer with PEFT, TRL's SFTTrainer, a bare PEFT loop."""

import time
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import peft
import torch
import transformers

from loratune.data.order import order
from loratune.data.prepared import Prepared
from loratune.finetune import model as base_model
from loratune.work import Hyperparameters, Recipe, Segment

try:
    import trl
except ImportError:  # `pip install trl`: its rows are left out without it
    trl = None

KINDS = ("stock", "loop", "trl", "trl padding-free")


class Person:
    """Measures what a person writes by hand: padded batches, labels of -100, Transformers' loss and PEFT's LoRA."""

    def __init__(self, kind: str, recipe: Recipe, root: Path) -> None:
        base, tokens = base_model.load(recipe.model, torch.device("cpu")), Prepared.load(Path(recipe.data)).train
        self.pad_id, self.scratch = base.pad_id, root / "person"
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(recipe.model.name_or_path)
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.rows = [(ids.tolist(), np.where(mask, ids, -100).tolist()) for ids, mask in (tokens[i] for i in range(len(tokens)))]
        h = Hyperparameters()
        config = peft.LoraConfig(r=h.lora_r, lora_alpha=int(h.lora_alpha), lora_dropout=h.lora_dropout, target_modules=["q_proj", "v_proj"])
        self.model = peft.get_peft_model(base.model, config)
        kinds = {"stock": self.stock, "loop": self.loop, "trl": self.sft_trainer}
        self.train = kinds.get(kind) or partial(self.sft_trainer, padding_free=True)

    def __call__(self, wanted: list[Segment]) -> tuple[int, float]:
        (one,) = wanted
        steps, batch = one.total_steps, one.hyperparameters.batch_size
        examples = [self.rows[i] for i in order(0, len(self.rows), steps * batch)]
        return sum(len(ids) for ids, _ in examples), self.train(examples, steps, batch)

    def batch(self, examples: list[Any]) -> dict[str, torch.Tensor]:
        longest = max(len(ids) for ids, _ in examples)
        kinds = {"input_ids": (0, self.pad_id), "labels": (1, -100)}
        padded = {k: torch.tensor([e[i] + [fill] * (longest - len(e[i])) for e in examples]) for k, (i, fill) in kinds.items()}
        lengths = torch.tensor([len(ids) for ids, _ in examples])
        return {**padded, "attention_mask": (torch.arange(longest) < lengths[:, None]).long()}

    def loop(self, examples: list[Any], _: int, batch: int) -> float:
        """A bare loop's seconds."""
        optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-5)
        self.model.train()
        began = time.perf_counter()
        for start in range(0, len(examples), batch):
            self.model(**self.batch(examples[start : start + batch]), use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return time.perf_counter() - began

    def stock(self, examples: list[Any], steps: int, batch: int) -> float:
        """Trainer's seconds, by its own clock."""
        trainer = transformers.Trainer(
            model=self.model,
            args=transformers.TrainingArguments(
                output_dir=str(self.scratch), max_steps=steps, per_device_train_batch_size=batch, learning_rate=1e-5, use_cpu=True,
                lr_scheduler_type="cosine", report_to="none", save_strategy="no", disable_tqdm=True, remove_unused_columns=False,
                dataloader_pin_memory=False, logging_steps=10,
            ),
            train_dataset=examples,
            data_collator=self.batch,
        )  # fmt: skip
        trainer.remove_callback(transformers.PrinterCallback)
        return float(trainer.train().metrics["train_runtime"])

    def sft_trainer(self, examples: list[Any], steps: int, batch: int, padding_free: bool = False) -> float:
        """SFTTrainer's seconds, by its own clock: logits and loss in chunks of response positions, as it has them by default.

        Gradient checkpointing and bfloat16 are off: both are slower on a CPU. Without padding a batch is one row, whose
        position_ids tell Transformers' SDPA attention where an example ends.
        """
        arguments = trl.SFTConfig(
            output_dir=str(self.scratch), max_steps=steps, per_device_train_batch_size=batch, learning_rate=1e-5, use_cpu=True,
            lr_scheduler_type="cosine", report_to="none", save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
            logging_steps=10, gradient_checkpointing=False, bf16=False, max_length=None, padding_free=padding_free,
            dataset_kwargs={"skip_prepare_dataset": True},
        )  # fmt: skip
        rows = [{"input_ids": ids, "labels": labels} for ids, labels in examples]
        trainer = trl.SFTTrainer(
            model=self.model, args=arguments, train_dataset=datasets.Dataset.from_list(rows), processing_class=self.tokenizer
        )
        trainer.remove_callback(transformers.PrinterCallback)
        return float(trainer.train().metrics["train_runtime"])
