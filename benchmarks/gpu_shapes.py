"""Models of real shapes with random weights, data of real lengths, and what a device can do at best: for packed_on_gpu.py."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from loratune.data.prepared import Manifest, PreparedTokens, SetCounts, pack_tokens, write_prepared
from loratune.data.sources import DataRecipe
from loratune.finetune import memory
from loratune.finetune.model import BaseModel

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
RANK = 16


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


def flops_per_token(shape: str, length: float, targets: str = "qv") -> float:
    """Of training an adapter on a frozen base: forward and gradients of activations, no gradients of frozen weights.

    4 per weight of a layer; the head (on the half of the tokens that are scored) likewise; causal attention
    6 L d (two products of L / 2 positions on average, forward and twice backward); the adapter 6 per weight.
    """
    s = SHAPES[shape]
    d, kv = s["hidden_size"], s["hidden_size"] * s.get("num_key_value_heads", s["num_attention_heads"]) // s["num_attention_heads"]
    layer = 2 * d * d + 2 * d * kv + 3 * d * s["intermediate_size"]
    adapter = RANK * (2 * d + d + kv)
    if targets == "all-linear":
        adapter += RANK * (d + kv + 2 * d + 3 * (d + s["intermediate_size"]))
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


def datasheet(device: torch.device) -> float | None:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((value for key, value in DATASHEET.items() if key in name), None)


def ceilings(device: torch.device) -> dict[str, float]:
    """What this device can do at best: FLOP/s of a product, bytes/s of a copy, seconds of a launch."""
    x = torch.empty(2**30 if device.type == "cuda" else 2**22, device=device, dtype=torch.bfloat16)
    y = torch.empty_like(x)

    def seconds(action: Callable[[], object], times: int) -> float:
        action()
        memory.synchronize(device)
        began = time.perf_counter()
        for _ in range(times):
            action()
        memory.synchronize(device)
        return (time.perf_counter() - began) / times

    copy, launch = seconds(lambda: y.copy_(x), 10), seconds(lambda: y[:8].add_(1), 2000)
    return {"matrix_flops": matrix_peak(device), "copy_bytes": 2 * x.nbytes / copy, "launch_seconds": launch}
