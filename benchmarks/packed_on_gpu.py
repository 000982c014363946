"""The packed engine on one GPU: tokens per second, utilisation, memory, waits, and where the time goes.

    python -m pytest -rA -m gpu                                        is all of it right? some minutes; needs torch,
                                                                       Transformers, PEFT, accelerate, pytest (with optuna: the demo)
    python benchmarks/packed_on_gpu.py [--shapes 7B 1B] [--seconds 400]     how fast is it? at most about that long

LLaMA-2-7B's and Llama-3.2-1B's shapes in bfloat16 with random weights, examples of Alpaca-like lengths, rank 16. Each line
is one way to train: K adapters packed, or `hf` at a batch and micro-batch. Told are tokens per second, model FLOPs
utilisation against this GPU's measured matrix peak (and the datasheet's), the sum of the trials' seconds against the clock,
memory reserved and allocated. For one pack: how long the CPU launches and the GPU computes, what waits for the device, which
kernels take most time. Packing's own share is that of K = 8, batch 16 over K = 1, batch 128: as many tokens per pass. What
no time is left for is left out, and said. Writes benchmarks/results/packed_on_gpu/<device>.json after every line. Without
a GPU it says so; `--shapes tiny --device cpu` tries the script itself, and writes nothing.
"""

import argparse
import gc
import json
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_shapes import RANK, SHAPES, ceilings, datasheet, flops_per_token, prepared, random_model

from loratune.finetune import memory
from loratune.finetune import model as base_model
from loratune.finetune.engines import run_segments
from loratune.finetune.hf import HfEngine
from loratune.finetune.packed.engine import PackedEngine
from loratune.system.machine import environment
from loratune.work import Hyperparameters, ModelRecipe, Recipe, Segment, State, TrainingRecipe

RESULTS = Path(__file__).resolve().parent / "results" / "packed_on_gpu"


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to train."""

    name: str
    adapters: int = 1
    batch: int
    micro: int | None = None  # of `hf`
    targets: str = "qv"
    dropout: float = 0.05

    @property
    def run(self) -> str:
        return "".join(c for c in self.name if c.isalnum())


WAYS = (  # most wanted first
    Way(name="warm", adapters=2, batch=4),
    Way(name="packed, K = 8, batch 16", adapters=8, batch=16),
    Way(name="packed, K = 8, batch 16, all-linear", adapters=8, batch=16, targets="all-linear"),
    Way(name="packed, K = 1, batch 128", batch=128),
    Way(name="packed, K = 16, batch 4", adapters=16, batch=4),
    Way(name="hf, batch 16", batch=16, micro=16),
    Way(name="hf, batch 4", batch=4, micro=4),
    Way(name="packed, K = 8, batch 16, no dropout", adapters=8, batch=16, dropout=0.0),
    Way(name="packed, K = 1, batch 4", batch=4),
)


class Bench:
    """One shape on one device: engines on the same weights, and what was found."""

    def __init__(self, shape: str, device: torch.device, scratch: Path, peak: float, steps: int) -> None:
        self.shape, self.device, self.peak, self.steps, self.scratch = shape, device, peak, steps, scratch
        self.base = random_model(shape, device)
        data = prepared(scratch / f"data-{shape}", SHAPES[shape]["vocab_size"])
        self.recipe = Recipe(model=ModelRecipe(name_or_path=shape), training=TrainingRecipe(), data=str(data), device=device.type)
        self.packed = self._engine(lambda: PackedEngine(replace(self.recipe, engine="packed", slots=16), scratch))

    def _engine(self, make: Callable[[], Any]) -> Any:
        load, base_model.load = base_model.load, lambda *_, **__: self.base  # type: ignore[assignment]
        try:
            return make()
        finally:
            base_model.load = load

    def hf(self, micro: int) -> HfEngine:
        """Also takes the packed engine's hooks out: both work on the same weights."""
        if self.packed is not None:
            self.packed.base.release()
            self.packed = None
        recipe = replace(self.recipe, training=replace(self.recipe.training, micro_batch_size=micro))
        return self._engine(lambda: HfEngine(recipe, self.scratch))

    def train(self, way: Way, steps: int, run: str) -> dict[str, Any]:
        """Train, and what that took."""
        engine = self.packed if way.micro is None else self.hf(way.micro)
        h = Hyperparameters(lora_r=RANK, lora_alpha=16, lora_dropout=way.dropout, target_modules=way.targets, batch_size=way.batch)
        segments = [
            Segment(trial=k, run=run, hyperparameters=replace(h, learning_rate=1e-5 * 1.2**k), seed=0, total_steps=steps, stop_step=steps)
            for k in range(way.adapters)
        ]
        gc.collect()
        memory.free(self.device)
        memory.reset_peak(self.device)
        memory.synchronize(self.device)
        began = time.perf_counter()
        outcomes = run_segments(engine, segments)
        memory.synchronize(self.device)
        wall = time.perf_counter() - began - sum(o.validation_seconds for o in outcomes)
        bad = [o.message for o in outcomes if o.state is not State.COMPLETED]
        if bad:
            raise RuntimeError(bad[0])
        speed = sum(o.tokens for o in outcomes) / wall
        work = speed * flops_per_token(self.shape, float(np.mean(engine.train.lengths)), way.targets)
        told = sum(o.train_seconds for o in outcomes)
        found = {"tokens_per_second": round(speed), "of_measured_peak": round(work / self.peak, 4), "seconds": round(wall, 3)}
        found |= {"of_datasheet": round(work / sheet, 4)} if (sheet := datasheet(self.device)) else {}
        found |= {"told_over_clock": round(told / wall, 3), "tokens_per_pass": getattr(engine, "room", None)}
        if self.device.type == "cuda":
            allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            found |= {"allocated_gib": round(allocated / 2**30, 2), "reserved_over_allocated": round(reserved / allocated, 3)}
        return found

    def lines(self) -> list[tuple[str, Callable[[], Any]]]:
        """All there is to find, most wanted first; `hf` last, which takes the packed engine's hooks out."""
        packed, others = [way for way in WAYS if way.micro is None], [way for way in WAYS if way.micro]
        told: list[tuple[str, Callable[[], Any]]] = [(way.name, partial(self.train, way, self.steps, way.run)) for way in packed]
        told[5:5] = [("rounds, K = 16, batch 4", self.rounds), ("kernels, K = 8, batch 16", self.profile)]
        return told + [(way.name, partial(self.train, way, 2 * self.steps, way.run)) for way in others]

    def rounds(self) -> dict[str, Any]:
        """Of each round of K = 16, batch 4: how long the CPU was busy launching, in ms, and the whole; calls that waited."""
        engine, real, seen = self.packed, self.packed._train, []
        waits: Counter[str] = Counter()

        def timed(slots: Any) -> None:
            began = time.perf_counter()
            fetch, launched = memory.fetched, []
            memory.fetched = lambda x: (launched.append(time.perf_counter()), fetch(x))[1]
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                if self.device.type == "cuda":
                    torch.cuda.set_sync_debug_mode("warn")
                try:
                    real(slots)
                finally:
                    memory.fetched = fetch
                    if self.device.type == "cuda":
                        torch.cuda.set_sync_debug_mode("default")
            waits.update(f"{Path(w.filename).name}:{w.lineno}" for w in said if "synchroniz" in str(w.message))
            ms = [round(1e3 * (at - began)) for at in ((launched or [time.perf_counter()])[0], time.perf_counter())]
            seen.append(ms)

        engine._train = timed
        try:
            self.train(WAYS[4], 3, "rounds")
        finally:
            engine._train = real
        return {"launching_and_all_ms": seen, "rounds": len(seen), "waits": dict(waits)}

    def profile(self) -> list[dict[str, Any]]:
        """The kernels that take most of the device's time, of a step of K = 8, batch 16."""
        activity = torch.profiler.ProfilerActivity.CUDA if self.device.type == "cuda" else torch.profiler.ProfilerActivity.CPU
        with torch.profiler.profile(activities=[activity]) as profile:
            self.train(WAYS[1], 1, "profile")
        key = "self_device_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        rows = sorted(profile.key_averages(), key=lambda row: -getattr(row, key))
        whole = sum(getattr(row, key) for row in rows)
        return [{"kernel": row.key[:120], "calls": row.count, "share": round(getattr(row, key) / whole, 4)} for row in rows[:25]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["7B", "1B"])
    parser.add_argument("--seconds", type=float, default=400)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("No CUDA device here, so there is nothing to measure. See --help for what this tells on one.")
        return
    began, device = time.monotonic(), torch.device(args.device)
    machine = environment()
    machine.pop("host", None)
    report: dict[str, Any] = {"environment": machine, "device": memory.device_name(device), "ceilings": ceilings(device), "shapes": {}}
    print(report["device"], {name: f"{value:.3g}" for name, value in report["ceilings"].items()}, flush=True)

    def noted(shape: str, name: str, action: Callable[[], Any]) -> None:
        try:
            found = action()
        except Exception as error:  # the next line may still tell something
            found = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        report["shapes"].setdefault(shape, {})[name] = found
        print(f"[{time.monotonic() - began:4.0f} s] {shape} {name}: {found}", flush=True)
        if device.type == "cuda":
            RESULTS.mkdir(parents=True, exist_ok=True)
            (RESULTS / f"{torch.cuda.get_device_name(device).replace(' ', '_')}.json").write_text(json.dumps(report, indent=1) + "\n")

    for number, shape in enumerate(args.shapes):
        until = began + args.seconds * (number + 1) / len(args.shapes)
        with tempfile.TemporaryDirectory() as scratch:
            bench = Bench(shape, device, Path(scratch), report["ceilings"]["matrix_flops"], args.steps)
            noted(shape, "capacity", lambda b=bench: vars(b.packed.capacity))  # type: ignore[misc]
            for name, action in bench.lines():
                if time.monotonic() < until - 15:
                    noted(shape, name, action)
                else:
                    print(f"no time left for {shape} {name}")
            del bench
        gc.collect()
        memory.free(device)


if __name__ == "__main__":
    main()
