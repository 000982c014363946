"""Model families from their Transformers classes: what is written together is what `generate` writes alone."""

import pytest
import torch
import transformers

from loratune import demo
from loratune.downstream.adapters import Adapters
from loratune.downstream.answering import Answerer
from loratune.downstream.base import Benchmark, Item, Verdict
from loratune.finetune.model import BaseModel

SHAPE = {
    "vocab_size": 992,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "pad_token_id": 0,
    "initializer_range": 0.5,  # else all logits are near each other
}
GPT = {"vocab_size": 992, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96, "initializer_range": 0.5}
FAMILIES = {
    "mistral": transformers.MistralConfig(**SHAPE, sliding_window=64),
    "qwen2": transformers.Qwen2Config(**SHAPE),
    "qwen3": transformers.Qwen3Config(**SHAPE, head_dim=8),
    "gemma2": transformers.Gemma2Config(**SHAPE, head_dim=8, sliding_window=64),
    "phi3": transformers.Phi3Config(**SHAPE),
    "gpt2": transformers.GPT2Config(**GPT),  # learned positions
    "gpt_neox": transformers.GPTNeoXConfig(**{k: v for k, v in SHAPE.items() if k != "num_key_value_heads"}),
    "opt": transformers.OPTConfig(**{k: v for k, v in SHAPE.items() if "key_value" not in k and "intermediate" not in k}, ffn_dim=48),
}


class Continue(Benchmark):
    name = title = version = "continue"
    chance = 0.0
    max_new_tokens = 8

    def items(self) -> list[Item]:
        begins = ["cat", "a long list of words: dog cat tree house river", "one two", "sort: b a c", "x"]
        opening = "Below is an instruction that describes a task and it is the same for all of them. "
        return [Item(id=text, prompt=opening + text, shared=len(opening)) for text in begins]

    def score(self, items: object, answers: object) -> list[Verdict]:
        return []


@pytest.mark.parametrize("family", FAMILIES)
def test_as_generate(family: str) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family]).eval().double()
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo.model_folder())
    base = BaseModel(model=model, tokenizer=tokenizer, device=torch.device("cpu"), dtype=torch.float64)
    benchmark = Continue()
    found = {}
    for batch, answers in Answerer(base, Adapters(base, [None, None])).answers(benchmark, benchmark.items(), [0, 1]):
        for own in answers:
            found |= {item.id: answer.text for item, answer in zip(batch, own, strict=True)}
    assert len(found) == len(benchmark.items())
    for item in benchmark.items():
        ids = tokenizer(item.prompt, return_tensors="pt")["input_ids"]
        ends = sorted({model.generation_config.eos_token_id, tokenizer.eos_token_id} - {None})
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=ends
        )[0]
        whole, asked = (tokenizer.decode(i, skip_special_tokens=True) for i in (out, ids[0]))
        assert found[item.id] == whole[len(asked) :]
    assert len(set(found.values())) > 1
