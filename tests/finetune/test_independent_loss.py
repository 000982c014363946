"""The loss once more, by some thirty lines of plain Transformers and PEFT: rendering, mask and loop are their own."""

import json
import re
from dataclasses import replace

import peft
import pytest
import tiny_engine
import tiny_tokenizer
import torch
import transformers

from loratune.data.prepare import prepare
from loratune.data.sources import DataRecipe, DataSource
from loratune.finetune.engines import load_engine

ROWS = [
    [("user", f"Name the capital number {i}."), ("assistant", f"Paris {i * i}"), ("user", "And\nnow?"), ("assistant", f"See <b>{i}</b>")]
    for i in range(24)
]
GEMMA_LIKE = (  # the end of a turn is not the tokenizer's EOS
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TAGGED = GEMMA_LIKE.replace(
    "{{ m['content'] | trim }}",
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] | trim }}{% endgeneration %}"
    "{% else %}{{ m['content'] | trim }}{% endif %}",
)
PROMPTS = {"alpaca": None, "chat": GEMMA_LIKE, "chat with generation tags": TAGGED}


def by_hand(prompt, row, tokenizer):
    """(ids, labels) of a conversation; -100 is not scored."""
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    ids, labels = [], []
    for turn in range(0, len(row), 2):
        asked, answer = row[turn][1], row[turn + 1][1]
        if prompt == "alpaca":
            opening = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
            before = (opening if turn == 0 else "") + f"\n\n### Instruction:\n{asked}\n\n### Response:"
            scored = [*encode(answer), tokenizer.eos_token_id]
        else:
            before = ("\n" if turn else "") + f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"
            scored = encode(answer + "<|im_end|>")
        ids += encode(before) + scored
        labels += [-100] * len(encode(before)) + scored
    return torch.tensor([ids]), torch.tensor([labels])


def loss(model, prompt, rows, tokenizer):
    """Summed negative log-likelihood of the scored tokens / their number."""
    total = tokens = 0.0
    with torch.inference_mode():
        for row in rows:
            ids, labels = by_hand(prompt, row, tokenizer)
            logits = model(input_ids=ids).logits[:, :-1].double()
            total += torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
            ).item()
            tokens += (labels[:, 1:] != -100).sum().item()
    return total / tokens


@pytest.mark.parametrize("engine", ["packed", "hf"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_recorded_loss_is_that_of_plain_transformers(prompt, engine, tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=512
    )
    model = tiny_engine.build_model(tmp_path / "model", config)
    tiny_tokenizer.build(model, eos="<eos>", specials=["<eos>"], chat_template=PROMPTS[prompt])
    for name, rows in (("train", ROWS[:16]), ("validation", ROWS[16:])):
        lines = [{"messages": [{"role": role, "content": text} for role, text in row]} for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    sources = ((DataSource(path=str(tmp_path / f"{name}.jsonl")),) for name in ("train", "validation"))
    data = prepare(DataRecipe(train=next(sources), validation=next(sources)), tokenizer=str(model), cache=tmp_path / "cache")
    assert data.manifest.prompt.kind == re.match(r"\w+", prompt)[0]
    assert (len(data.train), len(data.validation)) == (16, 8)
    recipe = replace(tiny_engine.recipe(tmp_path, model=model, dtype="float32"), data=str(data.folder), engine=engine, slots=2)
    wanted = tiny_engine.segment(4, batch_size=4, learning_rate=0.05, validate_at=(0,))
    outcome = tiny_engine.run(load_engine(recipe, tmp_path), wanted)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    at_first = loss(base, prompt, ROWS[16:], tokenizer)
    assert outcome.curve[0].validation_loss == pytest.approx(at_first, abs=1e-5)
    tuned = peft.PeftModel.from_pretrained(base, str(tmp_path / wanted.folder / "adapter")).eval()
    assert outcome.validation_loss == pytest.approx(loss(tuned, prompt, ROWS[16:], tokenizer), abs=1e-5)
    assert abs(outcome.validation_loss - at_first) > 1e-3
