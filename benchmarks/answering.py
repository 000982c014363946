"""Ten adapters answer together, one at a time, and as PEFT and Transformers' generate would have them.

    python benchmarks/answering.py DATA [--items 60] [--repeats 3] [--threads 1]

DATA holds models/tinystories656k, bbh/, mmlu/ and drop/. The adapters are random, of the study's ranks 4 to 64, on all linear
layers, and strong enough that each answers differently. The ways take turns in each repeat; figures are medians over
repeats. Ways:

    together       all adapters in one pass, shared beginnings computed once, answers ended when decided
    one at a time  the same code with one adapter after the other
    peft           peft.PeftModel and model.generate, batches of 16 sorted by length, padded, no shared beginning, always
                   max_new_tokens

Writes benchmarks/results/answering/results.json with the machine and the versions. That the ways give the same answers is
checked in every repeat; differing ones are counted (a near-tie may fall the other way in another rounding).
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import torch

from loratune.downstream.adapters import Adapters, read_adapter
from loratune.downstream.answering import Answerer
from loratune.downstream.base import Benchmark, Item, stratified
from loratune.downstream.bbh import Bbh
from loratune.downstream.drop import Drop
from loratune.downstream.mmlu import Mmlu
from loratune.environment import environment
from loratune.finetune import lora
from loratune.finetune.model import BaseModel, load
from loratune.work import Hyperparameters, ModelRecipe

RESULTS = Path(__file__).resolve().parent / "results" / "answering"
RANKS = (4, 8, 8, 16, 16, 16, 32, 32, 64, 64)
BATCH = 16
GROUPS = 3

Answers = dict[tuple[int, str], str]  # (adapter, item) -> text


class Undecided:
    """A benchmark whose answers are written to the end: what decoding alone costs."""

    def __init__(self, benchmark: Benchmark, tokens: int) -> None:
        self._benchmark, self.name, self.max_new_tokens = benchmark, f"{benchmark.name}, {tokens} tokens to the end", tokens

    def __getattr__(self, name: str) -> Any:
        return getattr(self._benchmark, name)

    def decided(self, item: Item, text: str) -> bool:
        return False


def write_adapters(base: BaseModel, folder: Path) -> list[Path]:
    for number, rank in enumerate(RANKS):
        h = Hyperparameters(lora_r=rank, lora_alpha=2 * rank, lora_dropout=0, target_modules="all-linear")
        wrapped, _ = lora.attach(base.model, h, seed=number)
        generator = torch.Generator().manual_seed(number)
        for _, layer in lora.lora_layers(wrapped):
            weight = layer.lora_B[lora.ADAPTER].weight
            weight.data.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
        wrapped.save_pretrained(str(folder / str(number)))
        lora.detach(base.model)
    return [folder / str(number) for number in range(len(RANKS))]


def ours(base: BaseModel, folders: list[Path], benchmark: Any, items: list[Item], groups: list[list[int]]) -> Answers:
    adapters = Adapters(base, [read_adapter(folder, base) for folder in folders])
    found: Answers = {}
    for places in groups:
        for batch, answers in Answerer(base, adapters).answers(benchmark, items, places):
            for place, own in zip(places, answers, strict=True):
                found |= {(place, item.id): answer.text for item, answer in zip(batch, own, strict=True)}
    adapters.close()
    return found


def with_peft(base: BaseModel, folders: list[Path], benchmark: Any, items: list[Item]) -> Answers:
    found: Answers = {}
    limit = min(base.model.config.max_position_embeddings - benchmark.max_new_tokens, benchmark.max_prompt_tokens)
    prompts = []
    for item in items:
        while len(ids := base.tokenizer(item.prompt)["input_ids"]) > limit and (less := item.without_last_shot()) is not None:
            item = less
        prompts.append((item.id, ids[-limit:]))
    prompts.sort(key=lambda pair: -len(pair[1]))
    for place, folder in enumerate(folders):
        model = peft.PeftModel.from_pretrained(base.model, str(folder)).eval()
        for start in range(0, len(prompts), BATCH):
            batch = prompts[start : start + BATCH]
            longest = max(len(ids) for _, ids in batch)
            ids = torch.tensor([[base.pad_id] * (longest - len(ids)) + ids for _, ids in batch])
            mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for _, ids in batch])
            with torch.inference_mode():
                out = model.generate(
                    input_ids=ids, attention_mask=mask, max_new_tokens=benchmark.max_new_tokens, do_sample=False, pad_token_id=base.pad_id
                )
            for (name, own), row in zip(batch, out[:, longest:].tolist(), strict=True):
                tail = own[-4:]
                text, before = (base.tokenizer.decode(t, skip_special_tokens=True) for t in (tail + row, tail))
                found[place, name] = text[len(before) :]
        model.unload()
        lora.detach(base.model)
    return found


def measure(base: BaseModel, folders: list[Path], benchmark: Any, items: list[Item], repeats: int) -> Iterator[tuple[str, Any]]:
    every = list(range(len(folders)))
    ways: dict[str, Callable[[], Answers]] = {
        "together": lambda: ours(base, folders, benchmark, items, [every]),
        "one at a time": lambda: ours(base, folders, benchmark, items, [[place] for place in every]),
        "peft": lambda: with_peft(base, folders, benchmark, items),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    differing = dict.fromkeys(ways, 0)
    for repeat in range(repeats):
        turn = list(ways.items())
        turn = turn[repeat % len(turn) :] + turn[: repeat % len(turn)]
        answers = {}
        for way, run in turn:
            began = time.perf_counter()
            answers[way] = run()
            seconds[way].append(time.perf_counter() - began)
        for way, own in answers.items():
            differing[way] += sum(not own[key].startswith(text) for key, text in answers["together"].items())
    pairs = {way: [b / a for a, b in zip(seconds["together"], seconds[way], strict=True)] for way in ways}
    yield "items", len(items)
    yield (
        "different answers of an item, mean over items",
        statistics.mean(len({answers["together"][place, item.id] for place in every}) for item in items),
    )
    for way in ways:
        yield (
            way,
            {
                "seconds": statistics.median(seconds[way]),
                "all seconds": [round(value, 3) for value in seconds[way]],
                "times the seconds of together": statistics.median(pairs[way]),
                "answers that differ from together, per repeat": differing[way] / repeats,
            },
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--items", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    base = load(ModelRecipe(name_or_path=str(args.data / "models" / "tinystories656k")), torch.device("cpu"))
    machine = environment()
    machine.pop("host")
    results: dict[str, Any] = {
        "environment": machine,
        "threads": args.threads,
        "model": "tinystories656k",
        "ranks": RANKS,
        "benchmarks": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        folders = write_adapters(base, Path(folder))
        for benchmark in (Bbh(args.data), Mmlu(args.data), Drop(args.data), Undecided(Bbh(args.data), 128)):
            groups = {item.group: None for item in benchmark.items()}
            few = list(groups)[:: -(-len(groups) // GROUPS)]  # whole groups, as in a full run, where beginnings are shared
            items = stratified([item for item in benchmark.items() if item.group in few], args.items)
            found = dict(measure(base, folders, benchmark, items, args.repeats))
            results["benchmarks"][benchmark.name] = found
            RESULTS.mkdir(parents=True, exist_ok=True)
            (RESULTS / "results.json").write_text(json.dumps(results, indent=1) + "\n")
            figures = ", ".join(
                f"{way} {f['seconds']:.2f} s ({f['times the seconds of together']:.2f}x)" for way, f in list(found.items())[2:]
            )
            print(f"{benchmark.name}, {len(items)} items, {len(folders)} adapters: {figures}", flush=True)


if __name__ == "__main__":
    main()
