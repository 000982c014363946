"""The packed engine against the reference on one GPU: tokens per second, utilisation, memory, and where the time goes.

    python benchmarks/packed_on_gpu.py [--shapes 1B 7B] [--repeats 3]        under ten minutes on one GPU of 80 GB or more

LLaMA-2-7B's and Llama-3.2-1B's shapes in bfloat16 with random weights, examples of Alpaca-like lengths, rank 16 on the query
and value projections, batches of 4. Prints and writes, per shape: tokens per second of `hf` and of `packed` at K = 1, 2, 4, 8,
16, the median ratio of paired rounds, model FLOPs utilisation against this GPU's measured matrix peak and against the
datasheet's, memory (one model and what training took beside it), and the kernels that take most time at the best K. Without
a GPU it says so and writes nothing; `--shapes tiny --device cpu` tries the script itself. Writes benchmarks/results/packed_on_gpu/.
"""

import argparse
import gc
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from loratune.data.prepared import Manifest, PreparedTokens, SetCounts, pack_tokens, write_prepared
from loratune.data.sources import DataRecipe
from loratune.finetune import memory
from loratune.finetune import model as base_model
from loratune.finetune.engines import run_segments
from loratune.finetune.hf import HfEngine
from loratune.finetune.model import BaseModel
from loratune.finetune.packed.engine import PackedEngine
from loratune.system.machine import environment
from loratune.work import Hyperparameters, ModelRecipe, Recipe, Segment, State, TrainingRecipe

RESULTS = Path(__file__).resolve().parent / "results" / "packed_on_gpu"
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 500},
    "1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000},
}
DATASHEET = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "B200": 2250e12}  # dense bf16 FLOP/s, NVIDIA's datasheets
PACKS, BATCH, STEPS, RANK = (1, 2, 4, 8, 16), 4, 8, 16


class NoTokenizer:
    """All that the engines ask of a tokenizer here."""

    pad_token_id = eos_token_id = 0


def random_model(shape: str, device: torch.device) -> BaseModel:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = transformers.LlamaConfig(max_position_embeddings=1024, **SHAPES[shape])
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with device:
        model = transformers.LlamaForCausalLM(config).requires_grad_(False).eval()
    torch.set_default_dtype(before)
    return BaseModel(model=model, tokenizer=NoTokenizer(), device=device, dtype=dtype)  # type: ignore[arg-type]


def alpaca_like(vocabulary: int, count: int, seed: int) -> PreparedTokens:
    """Random tokens with Alpaca's spread of lengths: median about 125 tokens, 5 % over 300, half of them the response."""
    generator = np.random.default_rng(seed)
    lengths = np.clip(np.exp(generator.normal(4.85, 0.5, count)), 30, 512).astype(int)
    return pack_tokens([(generator.integers(1, vocabulary, n).astype(np.int32), np.arange(n) >= n // 2) for n in lengths])


def prepared(folder: Path, vocabulary: int) -> Path:
    sets = {"train": alpaca_like(vocabulary, 1024, 1), "validation": alpaca_like(vocabulary, 8, 2)}
    counts = {n: SetCounts(examples=len(t), tokens=len(t.ids), response_tokens=int(t.mask.sum())) for n, t in sets.items()}
    facts: dict[str, Any] = {"tokenizer": "", "revision": None, "pad_token_id": 0, "eos_token_id": 0, "duplicates": 0, "sources": ()}
    write_prepared(folder, Manifest(hash="random", recipe=DataRecipe(train=()), **facts, **counts), sets)
    return folder


def flops_per_token(shape: str, length: float) -> float:
    """Of training an adapter on a frozen base: forward and gradients of activations, no gradients of frozen weights.

    4 per weight of a layer; the head (on the half of the tokens that are scored) likewise; causal attention
    6 L d (two products of L / 2 positions on average, forward and twice backward); the adapter 6 per weight.
    """
    s = SHAPES[shape]
    d, kv = s["hidden_size"], s["hidden_size"] * s.get("num_key_value_heads", s["num_attention_heads"]) // s["num_attention_heads"]
    layer = 2 * d * d + 2 * d * kv + 3 * d * s["intermediate_size"]
    adapter = RANK * (2 * d + d + kv)
    return s["num_hidden_layers"] * (4 * layer + 6 * length * d + 6 * adapter) + 0.5 * 4 * d * s["vocab_size"]


def matrix_peak(device: torch.device) -> float:
    """FLOP/s of a large bf16 product, the best of ten."""
    n = 8192 if device.type == "cuda" else 512
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    best = 0.0
    for _ in range(10):
        memory.synchronize(device)
        began = time.perf_counter()
        for _ in range(5):
            a @ a
        memory.synchronize(device)
        best = max(best, 5 * 2 * n**3 / (time.perf_counter() - began))
    return best


def measure(engine: Any, count: int, name: str) -> tuple[float, int]:
    """(tokens per second, bytes of one model and of what training took beside it) of `count` configurations, STEPS steps each."""
    segments = [
        Segment(
            trial=k,
            run=name,
            hyperparameters=Hyperparameters(lora_r=RANK, lora_alpha=16, lora_dropout=0.05, batch_size=BATCH, learning_rate=1e-5 * 2**k),
            seed=0,
            total_steps=STEPS,
            stop_step=STEPS,
        )
        for k in range(count)
    ]
    memory.free(engine.device)
    before = memory.reserved(engine.device)
    outcomes = run_segments(engine, segments)
    taken = memory.reserved(engine.device) - before
    bad = [o.message for o in outcomes if o.state is not State.COMPLETED]
    if bad:
        raise SystemExit(bad[0])
    base: BaseModel = engine.base.base if isinstance(engine, PackedEngine) else engine.base
    weights = sum(p.nbytes for p in base.model.parameters())  # both engines hold a model here; a study has one
    used = weights + taken if engine.device.type == "cuda" else max(o.peak_memory_bytes for o in outcomes)
    return sum(o.tokens for o in outcomes) / sum(o.train_seconds for o in outcomes), used


def profiled(engine: Any, count: int) -> list[dict[str, Any]]:
    """The fifteen kernels that take most of the device's time."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if engine.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        measure(engine, count, "profile")
    key = "self_device_time_total" if engine.device.type == "cuda" else "self_cpu_time_total"
    rows = sorted(profile.key_averages(), key=lambda row: -getattr(row, key))
    whole = sum(getattr(row, key) for row in rows)
    return [{"kernel": row.key[:120], "calls": row.count, "share": round(getattr(row, key) / whole, 4)} for row in rows[:15]]


def benchmark(shape: str, device: torch.device, repeats: int, scratch: Path, peak: float) -> dict[str, Any]:
    recipe = Recipe(
        model=ModelRecipe(name_or_path=shape),
        training=TrainingRecipe(micro_batch_size=BATCH),
        data=str(prepared(scratch / f"data-{shape}", SHAPES[shape]["vocab_size"])),
        device=device.type,
    )
    load, base_model.load = base_model.load, lambda recipe, device: random_model(shape, device)  # type: ignore[assignment]
    hf, packed = HfEngine(recipe, scratch), PackedEngine(replace(recipe, engine="packed", slots=max(PACKS)), scratch)
    base_model.load = load
    variants = {"hf": (hf, 1), **{f"packed, K = {k}": (packed, k) for k in PACKS}}
    rounds: list[dict[str, tuple[float, int]]] = []
    for n in range(-1, repeats):  # the first round warms up
        rounds.append({name: measure(engine, count, f"{name[0]}{count}-{n}") for name, (engine, count) in variants.items()})
        print(shape, n, {name: round(speed) for name, (speed, _) in rounds[-1].items()}, flush=True)
    name_of = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    datasheet = next((value for key, value in DATASHEET.items() if key in name_of), None)
    work = flops_per_token(shape, float(np.mean(packed.train.lengths)))
    rows = {}
    for name in variants:
        speed = statistics.median(r[name][0] for r in rounds[1:])
        rows[name] = {
            "tokens_per_second": speed,
            "over_hf": statistics.median(r[name][0] / r["hf"][0] for r in rounds[1:]),
            "utilisation_of_measured_peak": speed * work / peak,
            "utilisation_of_datasheet_peak": speed * work / datasheet if datasheet else None,
            "memory_gib": max(r[name][1] for r in rounds[1:]) / 2**30,
        }
        of_datasheet = f"{rows[name]['utilisation_of_datasheet_peak']:.1%}" if datasheet else "unknown"
        row = rows[name]
        print(f"{shape:>5}  {name:16} {speed:>9,.0f} tokens/s  x{row['over_hf']:.2f}  {row['memory_gib']:.1f} GiB", end="  ")
        print(f"{row['utilisation_of_measured_peak']:.1%} of the measured peak, {of_datasheet} of the datasheet's")
    best = max(PACKS, key=lambda k: rows[f"packed, K = {k}"]["tokens_per_second"])
    found = {"rows": rows, "flops_per_token": work, "profile": {"K": best, "kernels": profiled(packed, best)}}
    hf.close(), packed.close()
    del hf, packed, variants
    gc.collect()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["1B", "7B"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("No CUDA device here, so there is nothing to measure. On one this prints, per shape, a table of tokens/s, ratio to hf,")
        print("utilisation of the measured and the datasheet's peak, and memory, for hf and for packed at K = 1, 2, 4, 8, 16.")
        return
    device = torch.device(args.device)
    peak = matrix_peak(device)
    print(f"matrix peak measured: {peak / 1e12:.1f} TFLOP/s")
    machine = environment()
    machine.pop("host", None)
    report: dict[str, Any] = {"environment": machine, "matrix_peak_flops": peak, "repeats": args.repeats, "shapes": {}}
    with tempfile.TemporaryDirectory() as scratch:
        for shape in args.shapes:
            report["shapes"][shape] = benchmark(shape, device, args.repeats, Path(scratch), peak)
    if device.type == "cuda":
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / "results.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
