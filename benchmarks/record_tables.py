"""Record small fine-tuning problems once, so that searches can be compared without training: benchmarks/tables/*.json.

    nice -n 19 python benchmarks/record_tables.py DATA [--tables stories656k_dolly ...] [--runs runs/tables]

DATA holds models/, dolly/ and alpaca/; the embedded demo needs nothing. Each table has 150 configurations of learning rate
(four decades), alpha / rank, rank, dropout and target modules: 96 of a scrambled Sobol sequence over the whole space, then 54
whose learning rate lies near the valley that those show. A full run is 54 or 81 steps of four
or eight short examples. Each is trained in full and as complete short runs (own warmup and
decay) of 1/27, 1/9 and 1/3 of the steps; 30 of them, 20 of the best and ten spread over the rest, also with a second seed.
The packed engine trains them, in this process, with one thread. Each outcome is appended to a file in `--runs` as it comes,
so the same command goes on after a kill; the table is written once all are there, or, with --as-is, of those that are.
"""

import argparse
import json
import math
import shutil
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import qmc

from loratune import demo
from loratune.data.cache import prepare_data
from loratune.data.order import order, total_steps
from loratune.data.prepared import Prepared
from loratune.spec import StudySpec
from loratune.system.files import write_atomically
from loratune.system.machine import environment
from loratune.work import Hyperparameters, Outcome, Segment

TABLES = Path(__file__).resolve().parent / "tables"
LENGTHS = (Fraction(1, 27), Fraction(1, 9), Fraction(1, 3), Fraction(1))
RATES, RATIOS = (1e-4, 1.0), (0.125, 16.0)  # ends of a log scale
DROPOUTS, MODULES = (0.0, 0.01, 0.1), ("qv", "all-linear")
SPREAD, DENSE, AGAIN = 96, 54, 30  # configurations; the last of them with two seeds
SHORT = {"dolly": 240, "alpaca": 120}  # characters of a row at most, so that a run takes seconds
NEAR = 0.6  # decades to either side of the valley, for the dense part
CHAT = (  # a short one, for a vocabulary of 512: Alpaca's preamble alone would take 100 tokens
    "{% for m in messages %}{{ 'Q: ' if m.role == 'user' else 'A: ' }}{{ m.content }}"
    "{{ eos_token if m.role == 'assistant' else '\\n' }}{% endfor %}{% if add_generation_prompt %}A: {% endif %}"
)


@dataclass(frozen=True)
class Problem:
    """A model, its data, and how long a full run is."""

    name: str
    sections: dict[str, Any]  # of a study
    ranks: tuple[int, ...]
    training: str  # the data, in words
    batch: int
    steps: int  # of a full run
    slots: int = 1  # configurations that share passes, where a batch alone is too small to keep a core busy


def problems(data: Path, runs: Path) -> list[Problem]:
    held = {"validation_count": 128, "max_length": 128, "on_bad_rows": "skip"}
    dolly = {"train": [{"path": str(runs / "dolly_short.jsonl")}], "prompt": "alpaca", **held}
    alpaca = {"train": [{"path": str(runs / "alpaca_short.jsonl")}], "prompt": "chat", **held}
    train, validation = demo.data_files()
    own = {"train": [{"path": str(train)}], "validation": [{"path": str(validation)}], "prompt": "alpaca", **held}
    own |= {"validation_count": 256}
    stories656k = {"model": {"name_or_path": str(data / "models" / "tinystories656k")}, "data": dolly}
    own = {"model": {"name_or_path": str(demo.model_folder())}, "data": own}
    stories260k = {"model": {"name_or_path": str(runs / "stories260k")}, "data": alpaca}
    return [
        Problem("stories656k_dolly", stories656k, (4, 8, 16, 32, 64, 128), "Dolly, short rows", batch=4, steps=81),
        Problem("demo", own, (4, 8, 16, 32, 64), "the demo's own", batch=8, steps=54, slots=8),
        Problem("stories260k_alpaca", stories260k, (4, 8, 16, 32, 64), "Alpaca, short rows, a chat template", batch=4, steps=54, slots=8),
    ]


def description(problem: Problem, **training: Any) -> StudySpec:
    """The problem as a study; training: further fields of that section."""
    training |= {
        "batch_size": problem.batch,
        "epochs": 1,
        "micro_batch_size": problem.batch,
        "validation_batch_size": 32,
        "engine": "packed",
    }
    sections = {**problem.sections, "data": {**problem.sections["data"], "train_count": problem.steps * problem.batch}}
    return StudySpec.model_validate({"name": problem.name, "training": training, "executor": {"device": "cpu"}, **sections})


def shortened(source: Path, target: Path, limit: int) -> None:
    """The rows of at most `limit` characters in all, one JSON object per line."""
    if target.exists():
        return
    text = source.read_text()
    rows = json.loads(text) if source.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
    kept = [row for row in rows if sum(len(str(value)) for value in row.values()) <= limit]
    write_atomically(target, "".join(json.dumps(row) + "\n" for row in kept))


def wrapped(source: Path, folder: Path) -> None:
    """The llama2.c model `source` with its tokenizer file as Transformers reads one: SentencePiece's BPE, merges by score."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    if (folder / "tokenizer.json").exists():
        return
    raw, pieces, scores = (source / "tok512.bin").read_bytes(), [], []
    place = 4  # after the longest piece's length
    while place < len(raw):
        score, length = struct.unpack_from("<fi", raw, place)
        place += 8
        pieces.append(raw[place : place + length].decode().strip("\n") if len(pieces) < 3 else raw[place : place + length].decode())
        scores.append(score)
        place += length
    pieces = [piece if n < 3 else piece.replace(" ", "▁") for n, piece in enumerate(pieces)]
    known = {piece: n for n, piece in enumerate(pieces)}
    merges = []
    for n, piece in enumerate(pieces[259:], start=259):
        parts = [(piece[:i], piece[i:]) for i in range(1, len(piece)) if piece[:i] in known and piece[i:] in known]
        merges += [(-scores[n], known[left], known[right], left, right) for left, right in parts]
    tokenizer = Tokenizer(models.BPE(known, [(a, b) for *_, a, b in sorted(merges)], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copyfile(source / name, folder / name)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = CHAT
    fast.save_pretrained(folder)


def prepare_sources(data: Path, runs: Path) -> None:
    """The data of short rows, and Stories-260K with a tokenizer that Transformers reads, in `runs` unless there."""
    runs.mkdir(parents=True, exist_ok=True)
    shortened(data / "dolly" / "databricks-dolly-15k.jsonl", runs / "dolly_short.jsonl", SHORT["dolly"])
    shortened(data / "alpaca" / "alpaca_random_9k.json", runs / "alpaca_short.jsonl", SHORT["alpaca"])
    wrapped(data / "models" / "stories260k", runs / "stories260k")


def drawn(points: np.ndarray, ranks: tuple[int, ...], valley: dict[str, float] | None = None) -> list[dict[str, Any]]:
    """Configurations from points of the unit cube; with a valley (modules -> log10 u) the rate lies within NEAR of it."""
    found = []
    for rate, ratio, rank, dropout, modules in points:
        row: dict[str, Any] = {"lora_r": pick(ranks, rank), "alpha_ratio": float(f"{between(RATIOS, ratio):.4g}")}
        row |= {"lora_dropout": pick(DROPOUTS, dropout), "target_modules": pick(MODULES, modules)}
        if valley is None:
            exact = between(RATES, rate)
        else:
            exact = 10 ** (valley[row["target_modules"]] + NEAR * (2 * rate - 1) - effective({**row, "learning_rate": 1.0}))
        found.append({"learning_rate": float(f"{min(max(exact, RATES[0]), RATES[1]):.4g}"), **row})
    return found


def between(ends: tuple[float, float], share: float) -> float:
    return float(ends[0] * (ends[1] / ends[0]) ** share)


def pick(values: tuple[Any, ...], share: float) -> Any:
    return values[min(int(share * len(values)), len(values) - 1)]


def effective(row: dict[str, Any]) -> float:
    """log10 u = log10 lr + log10(alpha / r) + 0.6 log10 r: the axis along which the loss has one valley."""
    return math.log10(row["learning_rate"]) + math.log10(row["alpha_ratio"]) + 0.6 * math.log10(row["lora_r"])


def hyperparameters(row: dict[str, Any], batch: int) -> Hyperparameters:
    given = {name: value for name, value in row.items() if name != "alpha_ratio"}
    return Hyperparameters(**given, lora_alpha=row["alpha_ratio"] * row["lora_r"], batch_size=batch, epochs=1.0)


class Recorder:
    """One problem's outcomes: what is on disk, and what is still to train."""

    def __init__(self, problem: Problem, runs: Path) -> None:
        self.problem, self.folder = problem, runs / problem.name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.spec = description(problem)
        self.data: Prepared = prepare_data(self.spec, [])
        self.steps = total_steps(len(self.data.train), problem.batch, 1.0)
        self.log = self.folder / "outcomes.jsonl"
        self.outcomes: dict[str, Outcome] = {}
        lines = self.log.read_text().split("\n") if self.log.exists() else [""]
        if lines[-1]:  # cut by a kill: trained again
            write_atomically(self.log, "".join(line + "\n" for line in lines[:-1]))
        for line in lines[:-1]:
            outcome = Outcome.from_json(line)
            self.outcomes[outcome.key] = outcome

    def segments(self, number: int, row: dict[str, Any], seed: int) -> list[Segment]:
        found = []
        for length in LENGTHS:
            steps = math.ceil(length * self.steps)
            run = f"seed-{seed}-{length.numerator}-{length.denominator}"
            first = (0,) if number == 0 and seed == 0 and length == 1 else ()
            shared = {
                "trial": number,
                "run": run,
                "hyperparameters": hyperparameters(row, self.problem.batch),
                "seed": seed,
                "validate_at": first,
            }
            found.append(Segment(total_steps=steps, stop_step=steps, **shared))
        return found

    def loss(self, segment: Segment) -> float | None:
        """None: it diverged."""
        return self.outcomes[segment.key].validation_loss

    def train(self, segments: list[Segment], engine: list[Any]) -> None:
        missing = [segment for segment in segments if segment.key not in self.outcomes]
        if not missing:
            return
        if not engine:
            from loratune.finetune.engines import limit_threads, load_engine

            limit_threads(1)
            engine.append(load_engine(replace(self.spec.recipe(str(self.data.folder)), slots=self.problem.slots), self.folder))
            if self.problem.slots > 1:
                engine[0].enough = math.inf
        waiting: Iterator[Segment] = iter(missing)
        with self.log.open("a") as log:

            def tell(item: Any) -> None:
                if isinstance(item, Outcome):
                    self.outcomes[item.key] = item
                    log.write(item.to_json() + "\n")
                    log.flush()
                    shutil.rmtree(self.folder / "trials" / Path(item.key).parent, ignore_errors=True)
                    seconds = item.train_seconds + item.validation_seconds
                    print(f"{self.problem.name} {item.key} {item.state} {item.validation_loss} {seconds:.1f} s", flush=True)

            engine[0].run(lambda wait: next(waiting, None), tell, threading.Event())

    def record(self, train: bool = True) -> dict[str, Any]:
        """The table, once what is missing has been trained; without `train` that of the configurations that are all there."""
        engine: list[Any] = []
        ranks = self.problem.ranks
        rows = drawn(qmc.Sobol(5, seed=0).random(SPREAD), ranks)
        if train:
            self.train([s for n, row in enumerate(rows) for s in self.segments(n, row, 0)], engine)
        if len(finals := self.finals(rows)) == len(rows):
            rows += drawn(qmc.Sobol(5, seed=1).random(DENSE), ranks, valley_of(rows, finals))
        if train:
            self.train([s for n, row in enumerate(rows) for s in self.segments(n, row, 0)], engine)
        rows = rows[: len(finals := self.finals(rows))]
        twice: list[int] = []
        if len(rows) == SPREAD + DENSE:
            by_loss = sorted(range(len(rows)), key=lambda n: (math.inf if finals[n] is None else finals[n], n))
            rest = by_loss[20:]
            twice = sorted(by_loss[:20] + [rest[round(i * (len(rest) - 1) / 9)] for i in range(AGAIN - 20)])
        if train:
            self.train([s for n in twice for s in self.segments(n, rows[n], 1)], engine)
        if engine:
            engine[0].close()
        twice = [n for n in twice if all(segment.key in self.outcomes for segment in self.segments(n, rows[n], 1))]
        complete = len(twice) == AGAIN
        return {"about": self.about() | {"complete": complete}, "configurations": [self.row(n, r, n in twice) for n, r in enumerate(rows)]}

    def finals(self, rows: list[dict[str, Any]]) -> list[float | None]:
        """Losses of the full runs, up to the first configuration that was not trained at every length; None: it diverged."""
        found: list[float | None] = []
        for number, row in enumerate(rows):
            segments = self.segments(number, row, 0)
            if any(segment.key not in self.outcomes for segment in segments):
                break
            found.append(self.loss(segments[-1]))
        return found

    def row(self, number: int, row: dict[str, Any], twice: bool) -> dict[str, Any]:
        """Losses at 1/27, 1/9, 1/3 and 1 of a run; null: diverged."""
        seeds = [0, 1] if twice else [0]
        losses = [[None if (v := self.loss(s)) is None else round(v, 5) for s in self.segments(number, row, seed)] for seed in seeds]
        return {**row, "losses": losses[0], **({"second_seed": losses[1]} if twice else {})}

    def about(self) -> dict[str, Any]:
        machine = environment()
        shown = order(0, len(self.data.train), self.problem.batch * self.steps)
        first = next(outcome for outcome in self.outcomes.values() if outcome.curve and outcome.curve[0].step == 0)
        lengths = [math.ceil(length * self.steps) for length in LENGTHS]
        tokens = [int(self.data.train.lengths[shown[: self.problem.batch * steps]].sum()) for steps in lengths]
        return {
            "name": self.problem.name,
            "model": Path(self.spec.model.name_or_path).name if self.problem.name != "demo" else "the embedded demo",
            "hidden_size": json.loads((Path(self.spec.model.name_or_path) / "config.json").read_text())["hidden_size"],
            "data": self.problem.training,
            "training_examples": len(self.data.train),
            "validation_examples": len(self.data.validation),
            "max_length": 128,
            "batch_size": self.problem.batch,
            "epochs": 1,
            "lengths": [str(length) for length in LENGTHS],
            "steps": lengths,
            "tokens": tokens,
            "untuned_loss": round(first.curve[0].validation_loss or math.nan, 5),
            "seeds": [0, 1],
            "search_space": {
                "learning_rate": {"low": RATES[0], "high": RATES[1], "log": True, "default": RATES[0]},  # published: 1e-5, below
                "alpha_ratio": {"low": RATIOS[0], "high": RATIOS[1], "log": True, "default": 4.0},
                "lora_r": {"values": self.problem.ranks, "default": 8},
                "lora_dropout": {"values": DROPOUTS, "default": 0.1},
                "target_modules": {"choices": MODULES, "default": "qv"},
            },
            "seconds": round(sum(o.train_seconds + o.validation_seconds for o in self.outcomes.values())),
            "environment": {key: machine[key] for key in ("python", "packages", "git", "processor", "cores")},
        }


def valley_of(rows: list[dict[str, Any]], finals: list[float | None]) -> dict[str, float]:
    """Modules -> log10 u at the vertex of a parabola through the best third of their configurations."""
    found = {}
    for modules in MODULES:
        pairs = [(loss, effective(row)) for row, loss in zip(rows, finals, strict=True) if row["target_modules"] == modules and loss]
        best = sorted(pairs)[: len(pairs) // 3]
        losses, places = np.array(best).T
        curvature, slope, _ = np.polyfit(places, losses, 2)
        vertex = -slope / (2 * curvature) if curvature > 0 else places[0]
        found[modules] = float(np.clip(vertex, places.min(), places.max()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--tables", nargs="+", metavar="NAME", help="in this order; all")
    parser.add_argument("--runs", type=Path, default=Path("runs/tables"))
    parser.add_argument("--as-is", action="store_true", help="train nothing: write the table of what has been trained")
    args = parser.parse_args()
    runs = args.runs.resolve()
    prepare_sources(args.data, runs)
    known = {problem.name: problem for problem in problems(args.data.resolve(), runs)}
    for problem in (known[name] for name in args.tables or known):
        table = Recorder(problem, runs).record(train=not args.as_is)
        TABLES.mkdir(exist_ok=True)
        rows = ",\n  ".join(json.dumps(row) for row in table["configurations"])
        write_atomically(
            TABLES / f"{problem.name}.json", f'{{"about": {json.dumps(table["about"])},\n "configurations": [\n  {rows}\n ]}}\n'
        )


if __name__ == "__main__":
    main()
