"""Whether this machine can train an adapter at all: for `loratune doctor`."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from loratune.finetune.lora import adapter_parameters, attach
from loratune.finetune.memory import device_name
from loratune.finetune.model import choose_device
from loratune.work import Hyperparameters


def gpus() -> list[str]:
    """The CUDA devices that torch can use, by name and memory."""
    return [device_name(torch.device("cuda", index)) for index in range(torch.cuda.device_count())]


def one_step() -> tuple[str, float, float]:
    """One LoRA step of a random tiny Llama: (device, loss before, loss after)."""
    device = choose_device("auto")
    config = LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
    wrapped, _ = attach(LlamaForCausalLM(config), Hyperparameters(lora_dropout=0.0), seed=0)
    wrapped.to(device)
    optimizer = torch.optim.AdamW(adapter_parameters(wrapped).values(), lr=0.01)
    ids = torch.arange(16, device=device)[None]
    before = wrapped(input_ids=ids, labels=ids).loss
    before.backward()
    optimizer.step()
    after = wrapped(input_ids=ids, labels=ids).loss
    return str(device), float(before), float(after)
