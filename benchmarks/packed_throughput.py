"""Training tokens per second of the packed engine, the reference engine, stock Trainer + PEFT and a bare PEFT loop.

    python benchmarks/packed_throughput.py DATA [--sizes 0.65M 15M 125M] [--repeats 5] [--output results.json]

DATA holds models/tinystories656k and alpaca/alpaca_random_9k.json. The 0.65M model is the real one; 15M and 125M are Llama
shapes with random weights. All see the same examples, and count their tokens without padding. Variants run in turn,
`repeats` times, so that each round is a pair for every two of them; what is compared is the median of the rounds' ratios.

`stock` is Transformers' Trainer and PEFT as a person sets them up: a padding collator, labels of -100, logits of all
positions. Our engine `hf` is Trainer and PEFT too, but already takes logits at response positions only.

K trials are trained as `loratune run` would train them on this machine's CPU: K = 1 in one process on all cores, more of
them in one process per core, K / cores in each. "In one process" they share its passes and all cores, which is what a
GPU does. What processes do together is all their tokens over the seconds of the slowest.
Writes --output to benchmarks/results/packed_throughput/.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers

from loratune.environment import environment
from loratune.finetune import model as base_model
from loratune.finetune.data import DataRecipe, Source
from loratune.finetune.engine import run_all
from loratune.finetune.hf import HfEngine
from loratune.finetune.order import order
from loratune.finetune.packed.engine import PackedEngine
from loratune.finetune.prepare import prepare
from loratune.work import Hyperparameters, ModelRecipe, Recipe, Segment, State, TrainingRecipe

RESULTS = Path(__file__).resolve().parent / "results" / "packed_throughput"
SHAPES = {
    "15M": {"hidden_size": 288, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 6},
    "125M": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
}
STEPS = {"0.65M": 24, "15M": 4, "125M": 2}  # of four examples, per adapter and round; fewer where many adapters train
PACKS = {"0.65M": (1, 2, 4, 8, 16), "15M": (1, 2, 4, 8, 16), "125M": (1, 2, 4)}
BATCH = 4


def model_folder(size: str, data: Path, scratch: Path) -> Path:
    real = data / "models" / "tinystories656k"
    if size not in SHAPES:
        return real
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=32000, max_position_embeddings=512, tie_word_embeddings=True, **SHAPES[size])
    transformers.LlamaForCausalLM(config).save_pretrained(scratch / size)
    transformers.AutoTokenizer.from_pretrained(real).save_pretrained(scratch / size)
    return scratch / size


def segments(count: int, steps: int, batch: int, name: str) -> list[Segment]:
    """`count` configurations of the published space's defaults, at different learning rates."""
    return [
        Segment(
            trial=k,
            run=name,
            hyperparameters=Hyperparameters(batch_size=batch, learning_rate=1e-5 * 2**k),
            seed=0,
            total_steps=steps,
            stop_step=steps,
        )
        for k in range(count)
    ]


def fewer(steps: int, adapters: int) -> int:
    """Lest a round take so long that the machine changes under it."""
    return max(1, min(steps, 4 * steps // adapters))


def trained(engine: Any, wanted: list[Segment]) -> tuple[int, float]:
    """(tokens, seconds) of training, validation left out."""
    outcomes = run_all(engine, wanted)
    bad = [o.message for o in outcomes if o.state is not State.COMPLETED]
    if bad:
        raise SystemExit(bad[0])
    return sum(o.tokens for o in outcomes), sum(o.train_seconds for o in outcomes)


def engine_speed(engine: Any, wanted: list[Segment]) -> float:
    tokens, seconds = trained(engine, wanted)
    return tokens / seconds


def serve(connection: Connection, threads: int, recipe: Recipe, root: Path, slots: int) -> None:
    """A worker of `Crew`: trains what it is sent, and answers with tokens and seconds."""
    torch.set_num_threads(threads)
    engines = {"hf": HfEngine(recipe, root), "packed": PackedEngine(replace(recipe, engine="packed", slots=slots), root)}
    connection.send("ready")
    while True:
        engine, wanted = connection.recv()
        connection.send(trained(engines[engine], wanted))


class Crew:
    """One process per core, as the study's executor has them; they wait without computing while others are measured."""

    def __init__(self, connections: list[Connection]) -> None:
        self._connections = connections

    @classmethod
    @contextmanager
    def of(cls, count: int, recipe: Recipe, root: Path, slots: int) -> "Iterator[Crew]":
        context = multiprocessing.get_context("spawn")
        pairs = [context.Pipe() for _ in range(count)]
        threads = max(1, torch.get_num_threads() // count)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        workers = [context.Process(target=serve, args=(far, threads, recipe, root, slots), daemon=True) for _, far in pairs]
        for worker in workers:
            worker.start()
        try:
            for near, _ in pairs:
                near.recv()
            yield cls([near for near, _ in pairs])
        finally:
            for worker in workers:
                worker.kill()

    def speed(self, engine: str, wanted: list[Segment]) -> float:
        """Tokens per second of all together; the segments are dealt out like cards."""
        busy = self._connections[: len(wanted)]
        for n, connection in enumerate(busy):
            connection.send((engine, wanted[n :: len(busy)]))
        done = [connection.recv() for connection in busy]
        return sum(tokens for tokens, _ in done) / max(seconds for _, seconds in done)


class Person:
    """What a person writes by hand: padded batches, labels of -100, Transformers' loss and PEFT's LoRA."""

    def __init__(self, recipe: Recipe, tokens: Any, scratch: Path) -> None:
        base = base_model.load(recipe.model, torch.device("cpu"))
        self.pad_id, self.scratch = base.pad_id, scratch
        self.rows = [(ids.tolist(), np.where(mask, ids, -100).tolist()) for ids, mask in (tokens[i] for i in range(len(tokens)))]
        h = Hyperparameters()
        config = peft.LoraConfig(r=h.lora_r, lora_alpha=int(h.lora_alpha), lora_dropout=h.lora_dropout, target_modules=["q_proj", "v_proj"])
        self.model = peft.get_peft_model(base.model, config)

    def batch(self, examples: list[Any]) -> dict[str, torch.Tensor]:
        longest = max(len(ids) for ids, _ in examples)
        kinds = {"input_ids": (0, self.pad_id), "labels": (1, -100)}
        padded = {k: torch.tensor([e[i] + [fill] * (longest - len(e[i])) for e in examples]) for k, (i, fill) in kinds.items()}
        lengths = torch.tensor([len(ids) for ids, _ in examples])
        return {**padded, "attention_mask": (torch.arange(longest) < lengths[:, None]).long()}

    def seen(self, steps: int, batch: int) -> tuple[list[Any], int]:
        examples = [self.rows[i] for i in order(0, len(self.rows), steps * batch)]
        return examples, sum(len(ids) for ids, _ in examples)

    def loop(self, steps: int, batch: int) -> float:
        """A bare loop's tokens per second."""
        optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-5)
        self.model.train()
        examples, tokens = self.seen(steps, batch)
        began = time.perf_counter()
        for start in range(0, len(examples), batch):
            self.model(**self.batch(examples[start : start + batch]), use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return tokens / (time.perf_counter() - began)

    def stock(self, steps: int, batch: int) -> float:
        """Trainer's tokens per second, by its own clock."""
        examples, tokens = self.seen(steps, batch)
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
        return tokens / float(trainer.train().metrics["train_runtime"])


@contextmanager
def variants(size: str, data: Path, scratch: Path) -> Iterator[dict[str, Callable[[int], float]]]:
    """Name -> a function of the round that measures once."""
    folder = model_folder(size, data, scratch)
    source = Source(path=str(data / "alpaca" / "alpaca_random_9k.json"), format="alpaca")
    recipe_of_data = DataRecipe(train=(source,), train_count=2000, validation_count=8, max_length=512, on_bad_rows="skip")
    prepared = prepare(recipe_of_data, tokenizer=str(folder), cache=scratch / "cache")
    recipe = Recipe(
        model=ModelRecipe(name_or_path=str(folder)),
        training=TrainingRecipe(micro_batch_size=BATCH),
        data=str(prepared.folder),
        device="cpu",
    )
    steps = STEPS[size]
    root = scratch / f"runs-{size}"
    hf = HfEngine(recipe, root)
    packed = PackedEngine(replace(recipe, engine="packed", slots=max(PACKS[size])), root)
    person = Person(recipe, hf.train, scratch)
    found: dict[str, Callable[[int], float]] = {}
    found["bare PEFT loop, batch 4"] = lambda _: person.loop(steps, BATCH)
    for batch in (16, 4):  # what others are compared with stands next to them

        def hf_speed(n: int, batch: int = batch) -> float:
            hf.recipe = replace(recipe, training=replace(recipe.training, micro_batch_size=batch))
            return engine_speed(hf, segments(1, max(2, steps * 4 // batch), batch, f"hf{batch}-{n}"))

        def stock_speed(_: int, batch: int) -> float:
            return person.stock(max(2, steps * 4 // batch), batch)

        found[f"stock Trainer + PEFT, batch {batch}"] = partial(stock_speed, batch=batch)
        found[f"hf, batch {batch}"] = hf_speed
    found["packed, batch 4, K = 1"] = lambda n: engine_speed(packed, segments(1, steps, BATCH, f"packed1-{n}"))
    most = max(PACKS[size])

    def in_one_process(n: int) -> float:
        usual, packed.enough = packed.enough, float("inf")
        speed = engine_speed(packed, segments(most, fewer(steps, most), BATCH, f"shared-{n}"))
        packed.enough = usual
        return speed

    cores = torch.get_num_threads()
    with Crew.of(cores, recipe, root, max(1, most // cores)) as crew:

        def together(n: int, engine: str, k: int) -> float:
            return crew.speed(engine, segments(k, fewer(steps, k), BATCH, f"{engine}-crew{k}-{n}"))

        if cores > 1:
            found[f"hf, batch 4, {cores} processes"] = partial(together, engine="hf", k=cores)
        for count in PACKS[size][1:]:
            found[f"packed, batch 4, K = {count}"] = partial(together, engine="packed", k=count)
        found[f"packed, batch 4, K = {most}, in one process"] = in_one_process
        found["packed, batch 16, K = 1"] = lambda n: engine_speed(packed, segments(1, max(2, steps // 2), 16, f"packed16-{n}"))
        yield found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--sizes", nargs="+", default=["0.65M", "15M", "125M"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", default="results.json")
    args = parser.parse_args()
    machine = environment()
    machine.pop("host", None)
    report: dict[str, Any] = {"environment": machine, "threads": torch.get_num_threads(), "repeats": args.repeats, "sizes": {}}
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as scratch:
            rounds: list[dict[str, float]] = []
            with variants(size, args.data.resolve(), Path(scratch)) as measured:
                for n in range(-1, args.repeats):  # the first round warms up
                    rounds.append({name: measure(n) for name, measure in measured.items()})
                    print(size, n, {name: round(value) for name, value in rounds[-1].items()}, flush=True)
        table = {
            name: {
                "tokens_per_second": statistics.median(r[name] for r in rounds[1:]),
                "over_hf_batch_4": statistics.median(r[name] / r["hf, batch 4"] for r in rounds[1:]),
                "over_stock_batch_4": statistics.median(r[name] / r["stock Trainer + PEFT, batch 4"] for r in rounds[1:]),
                "over_stock_batch_16": statistics.median(r[name] / r["stock Trainer + PEFT, batch 16"] for r in rounds[1:]),
            }
            for name in rounds[0]
        }
        report["sizes"][size] = table
        for name, row in table.items():
            print(
                f"{size:>6}  {name:42} {row['tokens_per_second']:>9,.0f} tokens/s"
                f"  x{row['over_hf_batch_4']:.2f} hf  x{row['over_stock_batch_4']:.2f} stock"
            )
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / args.output).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
