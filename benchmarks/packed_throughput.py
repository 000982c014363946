"""Training tokens per second of the packed engine, the reference engine, Trainer + PEFT, TRL and a bare PEFT loop.

    python benchmarks/packed_throughput.py DATA [--sizes 0.65M 15M 125M] [--repeats 9] [--without WORD ...]
        [--examples N] [--output results.json]

DATA holds models/tinystories656k and alpaca/alpaca_random_9k.json. The 0.65M model is the real one; 15M and 125M are Llama
shapes with random weights. Every trial of every way sees the same examples once, and counts their tokens without padding.

`TRL` is its SFTTrainer as it comes, which takes logits and loss in chunks of response positions, padded or padding-free; its
rows are left out where `trl` is not installed. `stock` is Transformers' Trainer and PEFT as a person sets them up: a padding
collator, labels of -100, logits of all positions. Our engine `hf` is Trainer and PEFT too, but already takes logits at
response positions only.

Every way has processes of its own, as a study's workers are: what one leaves behind in its memory (pages that need not be
asked for again) neither helps nor hinders another. They wait without computing while others are measured. K trials are
trained as `loratune run` would train them on this machine's CPU: K = 1 in one process on all cores, more of them in one
process per core, K / cores slots in each, which take turns. "In one process" they share its passes and all cores, which is
what a GPU does. What processes do together is all their tokens over the seconds of the slowest.

Ways run in turn, `repeats` times, and before and after each of them `hf` at batch 4 runs; a way's ratio is that of its
speed to the two runs' together. What is told is the median over the rounds, beside all of them. The ratio to the stock is
that of the same round.
All of them stand in memory: at 125M eleven processes may want more than 24 GB; `--without "batch 16" loop` leaves some ways out (16 GB).
Writes --output to benchmarks/results/packed_throughput/.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers
from stock_trainers import KINDS, Person, trl

from loratune.data.prepare import prepare
from loratune.data.sources import DataRecipe, DataSource
from loratune.finetune.engines import run_segments
from loratune.finetune.hf import HfEngine
from loratune.finetune.packed.engine import PackedEngine
from loratune.system.machine import environment
from loratune.work import Hyperparameters, ModelRecipe, Recipe, Segment, State, TrainingRecipe

RESULTS = Path(__file__).resolve().parent / "results" / "packed_throughput"
SHAPES = {
    "15M": {"hidden_size": 288, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 6},
    "125M": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
}
EXAMPLES = {"0.65M": 96, "15M": 16, "125M": 16}  # that every trial is trained on in a round; a multiple of 16
PACKS = {"0.65M": (2, 4, 8, 16), "15M": (2, 4, 8, 16), "125M": (2, 4)}
HF, STOCK, STOCK_16 = "hf, batch 4", "stock Trainer + PEFT, batch 4", "stock Trainer + PEFT, batch 16"


@dataclass(frozen=True, kw_only=True)
class Way:
    """A row of the table: `trials` trained at once in `processes`, which share the cores."""

    kind: str  # hf, packed, shared (packed, and passes are shared), or one of stock_trainers.KINDS
    batch: int = 4
    trials: int = 1
    processes: int = 1

    @property
    def crew(self) -> tuple[str, int, int]:
        """Ways with the same crew are measured in the same processes."""
        return self.kind, self.batch, self.processes

    def segments(self, examples: int, name: str) -> list[Segment]:
        """Configurations of the published space's defaults, at different learning rates, for so many examples each."""
        steps = examples // self.batch
        return [
            Segment(
                trial=k,
                run=f"{name}-{self.trials}",
                hyperparameters=Hyperparameters(batch_size=self.batch, learning_rate=1e-5 * 2**k),
                seed=0,
                total_steps=steps,
                stop_step=steps,
            )
            for k in range(self.trials)
        ]


def ways(size: str, cores: int) -> dict[str, Way]:
    most = PACKS[size][-1]
    found = {
        HF: Way(kind="hf"),
        STOCK: Way(kind="stock"),
        "hf, batch 16": Way(kind="hf", batch=16),
        STOCK_16: Way(kind="stock", batch=16),
        "bare PEFT loop, batch 4": Way(kind="loop"),
        "TRL SFTTrainer, batch 4": Way(kind="trl"),
        "TRL SFTTrainer, batch 16": Way(kind="trl", batch=16),
        "TRL SFTTrainer, padding-free, batch 4": Way(kind="trl padding-free"),
        "TRL SFTTrainer, padding-free, batch 16": Way(kind="trl padding-free", batch=16),
        "packed, batch 4, K = 1": Way(kind="packed"),
        "packed, batch 16, K = 1": Way(kind="packed", batch=16),
        f"packed, batch 4, K = {most}, in one process": Way(kind="shared", trials=most),
    }
    if cores > 1:
        found[f"hf, batch 4, {cores} processes"] = Way(kind="hf", trials=cores, processes=cores)
    return found | {f"packed, batch 4, K = {k}": Way(kind="packed", trials=k, processes=min(k, cores)) for k in PACKS[size]}


class Trains:
    """Measures one of our engines."""

    def __init__(self, way: Way, recipe: Recipe, root: Path) -> None:
        if way.kind == "hf":
            self._engine: Any = HfEngine(recipe, root)
            return
        self._engine = PackedEngine(replace(recipe, engine="packed", slots=16), root)
        if way.kind == "shared":
            self._engine.enough = float("inf")

    def __call__(self, wanted: list[Segment]) -> tuple[int, float]:
        """(tokens, seconds) of training, validation left out."""
        outcomes = run_segments(self._engine, wanted)
        bad = [o.message for o in outcomes if o.state is not State.COMPLETED]
        if bad:
            raise SystemExit(bad[0])
        return sum(o.tokens for o in outcomes), sum(o.train_seconds for o in outcomes)


def serve(connection: Connection, way: Way, threads: int, recipe: Recipe, root: Path) -> None:
    """A process of a `Crew`: trains what it is sent, and answers with tokens and seconds."""
    torch.set_num_threads(threads)
    recipe = replace(recipe, training=replace(recipe.training, micro_batch_size=way.batch))
    measured = Person(way.kind, recipe, root) if way.kind in KINDS else Trains(way, recipe, root)
    connection.send("ready")
    while True:
        connection.send(measured(connection.recv()))


class Crew:
    """The processes of a way."""

    def __init__(self, connections: list[Connection]) -> None:
        self._connections = connections

    @classmethod
    @contextmanager
    def of(cls, way: Way, recipe: Recipe, root: Path) -> "Iterator[Crew]":
        context = multiprocessing.get_context("spawn")
        pairs = [context.Pipe() for _ in range(way.processes)]
        threads = max(1, torch.get_num_threads() // way.processes)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        workers = [context.Process(target=serve, args=(far, way, threads, recipe, root), daemon=True) for _, far in pairs]
        for worker in workers:
            worker.start()
        try:
            for near, far in pairs:
                far.close()
                near.recv()
            yield cls([near for near, _ in pairs])
        finally:
            for worker in workers:
                worker.kill()

    def speed(self, wanted: list[Segment]) -> float:
        """Tokens per second of all together; the segments are dealt out like cards."""
        for n, connection in enumerate(self._connections):
            connection.send(wanted[n :: len(self._connections)])
        done = [connection.recv() for connection in self._connections]
        return sum(tokens for tokens, _ in done) / max(seconds for _, seconds in done)


@contextmanager
def measures(size: str, examples: int, without: list[str], data: Path, scratch: Path) -> Iterator[dict[str, Callable[[str], float]]]:
    """Name of a way -> a function that measures its tokens per second once, under a name of its own."""
    folder = model_folder(size, data, scratch)
    source = DataSource(path=str(data / "alpaca" / "alpaca_random_9k.json"), format="alpaca")
    recipe_of_data = DataRecipe(train=(source,), train_count=2000, validation_count=8, max_length=512, on_bad_rows="skip")
    prepared = prepare(recipe_of_data, tokenizer=str(folder), cache=scratch / "cache")
    recipe = Recipe(model=ModelRecipe(name_or_path=str(folder)), training=TrainingRecipe(), data=str(prepared.folder), device="cpu")
    crews: dict[tuple[str, int, int], Crew] = {}
    with ExitStack() as stack:

        def measure(way: Way, name: str) -> float:
            return crews[way.crew].speed(way.segments(examples, name))

        found = {
            n: way
            for n, way in ways(size, torch.get_num_threads()).items()
            if n in (HF, STOCK) or (not any(word in n for word in without) and (trl or not way.kind.startswith("trl")))
        }
        for way in found.values():
            if way.crew not in crews:
                root = scratch / "-".join(map(str, way.crew))
                crews[way.crew] = stack.enter_context(Crew.of(way, recipe, root))
        yield {name: lambda round_, way=way: measure(way, round_) for name, way in found.items()}  # type: ignore[misc]


def model_folder(size: str, data: Path, scratch: Path) -> Path:
    real = data / "models" / "tinystories656k"
    if size not in SHAPES:
        return real
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=32000, max_position_embeddings=512, tie_word_embeddings=True, **SHAPES[size])
    transformers.LlamaForCausalLM(config).save_pretrained(scratch / size)
    transformers.AutoTokenizer.from_pretrained(real).save_pretrained(scratch / size)
    return scratch / size


def table(rounds: list[dict[str, tuple[float, float]]]) -> dict[str, dict[str, Any]]:
    """Rounds of name -> (its speed, that of `hf` around it)."""
    return {
        name: {
            "tokens_per_second": statistics.median(r[name][0] for r in rounds),
            "over_hf_batch_4": statistics.median(r[name][0] / r[name][1] for r in rounds),
            "over_hf_batch_4_by_round": [round(r[name][0] / r[name][1], 3) for r in rounds],
            "over_stock_batch_4": statistics.median(r[name][0] / r[STOCK][0] for r in rounds),
        }
        | ({"over_fastest_trl": statistics.median(r[name][0] / fastest_trl(r) for r in rounds)} if trl else {})
        | ({"over_stock_batch_16": statistics.median(r[name][0] / r[STOCK_16][0] for r in rounds)} if STOCK_16 in rounds[0] else {})
        for name in rounds[0]
    }


def fastest_trl(round_: dict[str, tuple[float, float]]) -> float:
    return max(speed for name, (speed, _) in round_.items() if name.startswith("TRL"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--sizes", nargs="+", default=["0.65M", "15M", "125M"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--without", nargs="+", default=[], metavar="WORD", help="leave out ways whose name has one of these words")
    parser.add_argument("--examples", type=int, help=f"that every trial is trained on in a round, a multiple of 16; else {EXAMPLES}")
    parser.add_argument("--output", default="results.json")
    args = parser.parse_args()
    if args.examples is not None and (args.examples < 1 or args.examples % 16):
        parser.error(f"--examples: got {args.examples}; a multiple of 16 from 16 up, so that batches of 4 and 16 see the same")
    machine = environment()
    machine.pop("host", None)
    report: dict[str, Any] = {"environment": machine, "threads": torch.get_num_threads(), "repeats": args.repeats}
    report |= {"examples": {}, "sizes": {}}
    for size in args.sizes:
        rounds: list[dict[str, tuple[float, float]]] = []
        examples = args.examples or EXAMPLES[size]
        with tempfile.TemporaryDirectory() as folder, measures(size, examples, args.without, args.data.resolve(), Path(folder)) as measured:
            for n in range(-1, args.repeats):  # the first round warms up
                rounds.append({})
                before = measured[HF](f"{n}-first")
                for number, (name, measure) in enumerate(measured.items()):
                    speed = measure(str(n))
                    after = measured[HF](f"{n}-after-{number}")
                    rounds[-1][name] = (speed, statistics.harmonic_mean([before, after]))
                    before = after
                print(size, n, {name: (round(speed), round(speed / before, 2)) for name, (speed, before) in rounds[-1].items()}, flush=True)
        report["sizes"][size], report["examples"][size] = table(rounds[1:]), examples
        for name, row in report["sizes"][size].items():
            print(
                f"{size:>6}  {name:42} {row['tokens_per_second']:>9,.0f} tokens/s"
                f"  x{row['over_hf_batch_4']:.2f} hf  x{row['over_stock_batch_4']:.2f} stock"
            )
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / args.output).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
