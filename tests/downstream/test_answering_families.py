"""Model families from their Transformers classes: what is written together is what `generate` writes alone."""

import pytest
import torch
import transformers

from loratune import demo
from loratune.downstream.answering.adapter_stack import Adapters
from loratune.downstream.answering.answerer import Answerer
from loratune.downstream.tasks.base import Benchmark, Item, Verdict
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


def longrope(border: int) -> transformers.Phi3Config:
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [2.0, 9.0, 5.0, 7.0]}
    return transformers.Phi3Config(
        **SHAPE, original_max_position_embeddings=border, rope_parameters={**rope, "original_max_position_embeddings": border}
    )


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


def made(config: transformers.PretrainedConfig) -> BaseModel:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().double()
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo.model_folder())
    return BaseModel(model=model, tokenizer=tokenizer, device=torch.device("cpu"), dtype=torch.float64)


@pytest.mark.parametrize("family", FAMILIES)
def test_as_generate(family: str) -> None:
    as_generate(made(FAMILIES[family]), Continue())


@pytest.mark.parametrize("border", [24, 28, 34, 40])
def test_as_generate_on_both_sides_of_longropes_border_and_across_it(border: int) -> None:
    base, benchmark = made(longrope(border)), Continue()
    lengths = [len(base.tokenizer(item.prompt)["input_ids"]) for item in benchmark.items()]
    assert min(lengths) - 8 < border < max(lengths) + 8, lengths
    as_generate(base, benchmark)


def as_generate(base: BaseModel, benchmark: Benchmark) -> None:
    model, tokenizer = base.model, base.tokenizer
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


class Choose(Benchmark):
    """Choices of several tokens, behind prompts of several lengths."""

    name = title = version = "choose"
    chance = 0.0
    choices = (" cat", " a dog and a tree", " one two three", "")

    def items(self) -> list[Item]:
        opening = "Below is an instruction that describes a task and it is the same for all of them. "
        return [
            Item(id=str(n), prompt=opening + "house river " * (n // 2) + "tree" * (n % 2), choices=self.choices, shared=len(opening))
            for n in range(12)
        ]

    def score(self, items: object, answers: object) -> list[Verdict]:
        return []


@pytest.mark.parametrize("border", [26, 33])
def test_choices_on_both_sides_of_longropes_border_as_one_by_one(border: int) -> None:
    base, benchmark = made(longrope(border)), Choose()
    seen = 0
    for batch, (first, second) in Answerer(base, Adapters(base, [None, None])).answers(benchmark, benchmark.items(), [0, 1]):
        for item, answer, same in zip(batch, first, second, strict=True):
            seen += 1
            context = base.tokenizer(item.prompt.rstrip(" "))["input_ids"]
            for choice, got in zip(item.choices, answer.log_likelihoods, strict=True):
                whole = base.tokenizer(item.prompt + choice)["input_ids"]
                with torch.no_grad():
                    scores = base.model(input_ids=torch.tensor([whole[:-1]])).logits[0].log_softmax(-1)
                places = range(len(context), len(whole))
                assert got == pytest.approx(sum(float(scores[at - 1, whole[at]]) for at in places), abs=1e-9)
            assert same.log_likelihoods == pytest.approx(answer.log_likelihoods, abs=1e-12)
    assert seen == len(benchmark.items())
