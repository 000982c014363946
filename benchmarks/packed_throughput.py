"""Training tokens per second of the packed engine, of the reference engine and of a bare PEFT loop, on the same examples.

    python benchmarks/packed_throughput.py DATA [--sizes 0.65M 15M 125M] [--repeats 5]

DATA holds models/tinystories656k and alpaca/alpaca_random_9k.json. The 0.65M model is the real one; 15M and 125M are Llama
shapes with random weights. Variants run in turn, `repeats` times, so that each round is a pair for every two of them;
what is compared is the median of the rounds' ratios. Beyond K = 1 the adapters share passes here, which on CPU they
would otherwise do only with batches of a few tokens. Writes benchmarks/results/packed_throughput/.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers

from loratune.environment import environment
from loratune.finetune import model as base_model
from loratune.finetune.batches import collate
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
STEPS = {"0.65M": 40, "15M": 8, "125M": 2}  # of four examples, per adapter and round
PACKS = (1, 2, 4, 8, 16)
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


def engine_speed(engine: Any, wanted: list[Segment]) -> float:
    """Tokens per second of training, validation left out."""
    outcomes = run_all(engine, wanted)
    bad = [o.message for o in outcomes if o.state is not State.COMPLETED]
    if bad:
        raise SystemExit(bad[0])
    return sum(o.tokens for o in outcomes) / sum(o.train_seconds for o in outcomes)


class PeftLoop:
    """What a person writes by hand: padded batches, labels of -100, Transformers' loss, AdamW, clipping."""

    def __init__(self, recipe: Recipe, tokens: Any) -> None:
        self.base = base_model.load(recipe.model, torch.device("cpu"))
        self.tokens = tokens
        h = Hyperparameters()
        config = peft.LoraConfig(r=h.lora_r, lora_alpha=int(h.lora_alpha), lora_dropout=h.lora_dropout, target_modules=["q_proj", "v_proj"])
        self.model = peft.get_peft_model(self.base.model, config)

    def speed(self, steps: int, batch: int) -> float:
        optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-5)
        self.model.train()
        places = order(0, len(self.tokens), steps * batch).reshape(steps, batch)
        began = time.perf_counter()
        for examples in places:
            rows = collate(self.tokens, examples, range(batch), pad_id=self.base.pad_id)
            lengths = torch.tensor([len(self.tokens[int(i)][0]) for i in examples])
            mask = (torch.arange(rows.ids.shape[1]) < lengths[:, None]).long()
            labels = torch.full_like(rows.ids, -100).flatten()
            labels[rows.places + 1] = rows.labels
            loss = self.model(input_ids=rows.ids, attention_mask=mask, labels=labels.view_as(rows.ids), use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return float(np.asarray(self.tokens.lengths)[places].sum()) / (time.perf_counter() - began)


def variants(size: str, data: Path, scratch: Path) -> dict[str, Callable[[int], float]]:
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
    packed = PackedEngine(replace(recipe, engine="packed", slots=max(PACKS)), root)
    loop = PeftLoop(recipe, hf.train)
    found: dict[str, Callable[[int], float]] = {}
    for batch in (4, 16):

        def hf_speed(n: int, batch: int = batch) -> float:
            hf.recipe = replace(recipe, training=replace(recipe.training, micro_batch_size=batch))
            return engine_speed(hf, segments(1, max(2, steps * 4 // batch), batch, f"hf{batch}-{n}"))

        found[f"hf, batch {batch}"] = hf_speed
    found["bare PEFT loop, batch 4"] = lambda n: loop.speed(steps, BATCH)
    alone = packed.enough
    for count in PACKS:

        def packed_speed(n: int, k: int = count) -> float:
            packed.enough = alone if k == 1 else float("inf")  # beyond K = 1, passes are shared: what a GPU does
            return engine_speed(packed, segments(k, steps, BATCH, f"packed{k}-{n}"))

        found[f"packed, batch 4, K = {count}"] = packed_speed
    found["packed, batch 16, K = 1"] = lambda n: engine_speed(packed, segments(1, max(2, steps // 2), 16, f"packed16-{n}"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--sizes", nargs="+", default=["0.65M", "15M", "125M"])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    machine = environment()
    machine.pop("host", None)
    report: dict[str, Any] = {"environment": machine, "threads": torch.get_num_threads(), "repeats": args.repeats, "sizes": {}}
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as scratch:
            measured = variants(size, args.data.resolve(), Path(scratch))
            rounds: list[dict[str, float]] = []
            for n in range(-1, args.repeats):  # the first round warms up
                rounds.append({name: measure(n) for name, measure in measured.items()})
                print(size, n, {name: round(value) for name, value in rounds[-1].items()}, flush=True)
        table = {
            name: {
                "tokens_per_second": statistics.median(r[name] for r in rounds[1:]),
                "over_hf_batch_4": statistics.median(r[name] / r["hf, batch 4"] for r in rounds[1:]),
                "over_hf_batch_16": statistics.median(r[name] / r["hf, batch 16"] for r in rounds[1:]),
            }
            for name in measured
        }
        report["sizes"][size] = table
        for name, row in table.items():
            print(f"{size:>6}  {name:28} {row['tokens_per_second']:>9,.0f} tokens/s  x{row['over_hf_batch_4']:.2f}")
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "results.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
