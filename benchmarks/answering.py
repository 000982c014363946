"""Ten adapters answer together, one at a time, and as PEFT and Transformers would have them.

    python benchmarks/answering.py DATA [--items 16] [--repeats 3] [--threads 2]

DATA holds models/tinystories656k, bbh/ and mmlu/. The adapters are random, of ranks 4 to 64, on all linear layers, and
strong enough that each answers differently. Tasks: the demo's own, on the demo's model; MMLU by log-likelihood, BBH, and
BBH's prompts with 48 tokens written to the end, on tinystories656k. Ways, which take turns in each repeat:

    together       what `loratune evaluate` does on a CPU: a process per core where memory allows, each with its share of the
                   adapters and of the threads; in each all its adapters in one pass, shared beginnings computed once,
                   answers ended when decided
    together, one process
                   all adapters in one pass of one process with all threads, as on a GPU
    one at a time  the same code with one adapter after the other, all threads
    peft           all threads; PeftModel with model.generate, or forward passes for log-likelihoods, one adapter after the other:
                   batches of at most 64 rows and 4,096 tokens sorted by length, padded on the left; no shared beginning; EOS or
                   max_new_tokens ends an answer
    peft, mixed    the same with rows of all adapters in a batch, by PEFT's `adapter_names`

Figures are medians over repeats of wall-clock seconds, on a machine with nothing else to do; tokenising and sending
the answers included, loading model, data and adapters not. Each way has processes of its own, lest one find memory that
another has left behind; they wait without computing while other ways are measured. Writes results.json and README.md to
benchmarks/results/answering, after each task. Answers that differ between the ways are counted: a near-tie may fall the
other way in another rounding.
"""

import argparse
import contextlib
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from answering_with_peft import Answers, with_peft

from loratune import demo
from loratune.downstream.answering.adapter_stack import Adapters, read_adapter
from loratune.downstream.answering.answerer import Answerer
from loratune.downstream.job import EvaluatedModel
from loratune.downstream.parallel import deal
from loratune.downstream.tasks.base import Benchmark, Item, stratified
from loratune.downstream.tasks.bbh import Bbh
from loratune.downstream.tasks.embedded import DemoChoice, DemoCode, DemoMatch
from loratune.downstream.tasks.mmlu import MmluLoglikelihood
from loratune.finetune import lora
from loratune.finetune.model import BaseModel, load
from loratune.finetune.peft_layers import ADAPTER, detach, lora_layers
from loratune.system.hub import weights_on_disk
from loratune.system.machine import cpu_processes, environment
from loratune.work import Hyperparameters, ModelRecipe

RESULTS = Path(__file__).resolve().parent / "results" / "answering"
RANKS = (4, 8, 8, 16, 16, 16, 32, 32, 64, 64)
GROUPS = 3
LONG = 48  # tokens


class Watch:
    """Adds up the seconds spent inside it."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._began


class Gate:
    """In a process of `Crew` where the others have their watch: all has been loaded; the clock starts, then the answering."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def __enter__(self) -> None:
        self._connection.send("loaded")
        self._connection.recv()

    def __exit__(self, *_: object) -> None: ...


class Undecided:
    """A benchmark whose answers are written to the end: what decoding alone costs."""

    def __init__(self, benchmark: Benchmark, tokens: int) -> None:
        self._benchmark, self.name, self.max_new_tokens = benchmark, f"{benchmark.name}, {tokens} tokens to the end", tokens

    def __reduce__(self) -> Any:
        return Undecided, (self._benchmark, self.max_new_tokens)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._benchmark, name)

    def decided(self, item: Item, text: str) -> bool:
        return False


def write_adapters(base: BaseModel, folder: Path) -> list[Path]:
    for number, rank in enumerate(RANKS):
        h = Hyperparameters(lora_r=rank, lora_alpha=2 * rank, lora_dropout=0, target_modules="all-linear")
        wrapped, _ = lora.attach(base.model, h, seed=number)
        generator = torch.Generator().manual_seed(number)
        for _, layer in lora_layers(wrapped):
            weight = layer.lora_B[ADAPTER].weight
            weight.data.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
        wrapped.save_pretrained(str(folder / str(number)))
        detach(base.model)
    return [folder / str(number) for number in range(len(RANKS))]


class Ours:
    """The model with some of the adapters hooked in, by their numbers."""

    def __init__(self, base: BaseModel, folders: dict[int, Path]) -> None:
        self.numbers = list(folders)
        self._base, self._folders = base, list(folders.values())

    def answers(self, benchmark: Any, items: list[Item], watch: Watch | Gate, *, together: bool) -> Answers:
        found: Answers = {}
        with self._hooked() as adapters, watch:
            every = list(range(len(self.numbers)))
            for places in [every] if together else [[place] for place in every]:
                for batch, answers in Answerer(self._base, adapters).answers(benchmark, items, places):
                    for place, own in zip(places, answers, strict=True):
                        found |= {(self.numbers[place], item.id): answer.text for item, answer in zip(batch, own, strict=True)}
        return found

    @contextlib.contextmanager
    def _hooked(self) -> Iterator[Adapters]:
        """Only while open: PEFT uses the same model."""
        adapters = Adapters(self._base, [read_adapter(folder, self._base) for folder in self._folders])
        try:
            yield adapters
        finally:
            adapters.close()


def serve(connection: Connection, model: Path, folders: dict[int, Path], threads: int, together: bool) -> None:
    """A process of `Crew`: answers what it is sent, until the connection is closed."""
    torch.set_num_threads(threads)
    ours = Ours(load(ModelRecipe(name_or_path=str(model)), torch.device("cpu")), folders)
    connection.send("ready")
    with contextlib.suppress(EOFError):
        while True:
            benchmark, items = connection.recv()
            connection.send(ours.answers(benchmark, items, Gate(connection), together=together))


class Crew:
    """`number` processes with the adapters and the threads dealt out among them, loaded."""

    def __init__(self, model: Path, folders: list[Path], threads: int, *, number: int = 1, together: bool = True) -> None:
        cards = [EvaluatedModel(name=str(n), adapter=folder, loss=None) for n, folder in enumerate(folders)]
        context = multiprocessing.get_context("spawn")
        self._connections, self._processes = [], []
        for names in deal(cards, number):
            ours, theirs = context.Pipe()
            own = {int(name): folders[int(name)] for name in names}
            process = context.Process(target=serve, args=(theirs, model, own, threads // number, together), daemon=True)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)
        for connection in self._connections:
            connection.recv()

    def answers(self, benchmark: Any, items: list[Item], watch: Watch) -> Answers:
        found: Answers = {}
        for connection in self._connections:
            connection.send((benchmark, items))
        for connection in self._connections:
            connection.recv()
        with watch:
            for connection in self._connections:
                connection.send("go")
            for connection in self._connections:
                found |= connection.recv()
        return found

    def close(self) -> None:
        for connection, process in zip(self._connections, self._processes, strict=True):
            connection.close()
            process.join()


def measure(
    base: BaseModel, folders: list[Path], crews: dict[str, Crew], benchmark: Any, items: list[Item], repeats: int
) -> dict[str, Any]:
    every = list(range(len(folders)))
    ways: dict[str, Callable[[Watch], Answers]] = {name: partial(crew.answers, benchmark, items) for name, crew in crews.items()}
    ways |= {
        name: partial(with_peft, base, folders, benchmark, items, mixed=mixed) for name, mixed in (("peft", False), ("peft, mixed", True))
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    differing = dict.fromkeys(ways, 0)
    for repeat in range(repeats):
        turn = list(ways.items())
        turn = turn[repeat % len(turn) :] + turn[: repeat % len(turn)]
        answers = {}
        for way, run in turn:
            watch = Watch()
            answers[way] = run(watch)
            seconds[way].append(watch.seconds)
        for way, own in answers.items():  # peft writes on where an answer was decided
            differing[way] += sum(not own[key].startswith(text) for key, text in answers["together"].items())
    kinds = statistics.mean(len({answers["together"][place, item.id] for place in every}) for item in items)
    found: dict[str, Any] = {"items": len(items), "different answers of an item, mean over items": kinds, "ways": {}}
    for way in ways:
        found["ways"][way] = {
            "seconds": statistics.median(seconds[way]),
            "all_seconds": [round(value, 3) for value in seconds[way]],
            "times_together": statistics.median(b / a for a, b in zip(seconds["together"], seconds[way], strict=True)),
            "answers_that_differ_per_repeat": differing[way] / repeats,
        }
    return found


def tasks(data: Path) -> Iterator[tuple[str, Path, Any]]:
    """(name, model, benchmark)"""
    tiny = data / "models" / "tinystories656k"
    for own in (DemoChoice(), DemoMatch(), DemoCode()):
        yield own.title, demo.model_folder(), own
    yield "MMLU, log-likelihood, 2 shots", tiny, MmluLoglikelihood(data, shots=2)  # 5 do not fit its 512 positions
    yield "BBH", tiny, Bbh(data)
    yield f"BBH's prompts, {LONG} tokens to the end", tiny, Undecided(Bbh(data), LONG)


def drawn(benchmark: Any, number: int) -> list[Item]:
    """Items of a few whole groups, as in a full run, where beginnings are shared."""
    groups = list({item.group: None for item in benchmark.items()})
    few = groups[:: -(-len(groups) // GROUPS)]
    return stratified([item for item in benchmark.items() if item.group in few], number)


def table(results: dict[str, Any]) -> str:
    machine, others = results["environment"], ("together, one process", "one at a time", "peft", "peft, mixed")
    lines = [
        "# Ten adapters answer",
        "",
        f"`python benchmarks/answering.py DATA --repeats {results['repeats']}`: medians of seconds, {results['threads']} threads, "
        f"for *together* in {results['processes']} processes; in brackets times those of *together*. What is compared is told at the "
        "top of the script.",
        "",
        "| task | items | together | together, one process | one at a time | peft, one at a time | peft, mixed | answers that differ |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, found in results["tasks"].items():
        ways = found["ways"]
        cells = [f"{way['seconds']:.2f} ({way['times_together']:.1f}x)" for way in map(ways.__getitem__, others)]
        differ = max(way["answers_that_differ_per_repeat"] for way in ways.values())
        of = found["items"] * len(results["ranks"])
        lines.append(f"| {name} | {found['items']} | {ways['together']['seconds']:.2f} | {' | '.join(cells)} | {differ:g} of {of} |")
    for name, some in (("The demo's three", list(results["tasks"])[:3]), ("All", list(results["tasks"]))):
        sums = {way: sum(results["tasks"][task]["ways"][way]["seconds"] for task in some) for way in ("together", *others)}
        cells = [f"{sums[way]:.2f} ({sums[way] / sums['together']:.1f}x)" for way in others]
        lines.append(f"| {name} | | {sums['together']:.2f} | {' | '.join(cells)} | |")
    packages = ", ".join(f"{name} {machine['packages'][name]}" for name in ("torch", "transformers", "peft"))
    return "\n".join([*lines, "", f"{packages}; {machine['processor']}"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--items", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    machine = environment()
    machine.pop("host")
    results: dict[str, Any] = {"environment": machine, "threads": args.threads, "repeats": args.repeats, "ranks": RANKS, "tasks": {}}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as crews:
        loaded: dict[Path, tuple[BaseModel, list[Path], dict[str, Crew]]] = {}
        for name, path, benchmark in tasks(args.data):
            if path not in loaded:
                crews.close()  # the model before has had its tasks
                base = load(ModelRecipe(name_or_path=str(path)), torch.device("cpu"))
                adapters = write_adapters(base, Path(folder) / path.name)
                number = min(args.threads, cpu_processes(weights_on_disk(str(path), None), most=len(adapters) // 2))
                start = partial(Crew, path, adapters, args.threads)
                own = {"together": start(number=number), "together, one process": start(), "one at a time": start(together=False)}
                for crew in own.values():
                    crews.callback(crew.close)
                loaded[path], results["processes"] = (base, adapters, own), number
            found = measure(*loaded[path], benchmark, drawn(benchmark, args.items), args.repeats)
            results["tasks"][name] = found
            args.output.mkdir(parents=True, exist_ok=True)
            (args.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
            (args.output / "README.md").write_text(table(results))
            print(name, {way: (round(f["seconds"], 2), round(f["times_together"], 2)) for way, f in found["ways"].items()}, flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
