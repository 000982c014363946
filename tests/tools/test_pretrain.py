"""The base model: loads with Transformers alone, small, encodes any text, made by the committed script."""

import itertools
import json
import math
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from loratune.demo import model_folder
from tools.make_demo import pretrain, tasks
from tools.make_demo.world import documents

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tokenizer():  # type: ignore[no-untyped-def]
    return AutoTokenizer.from_pretrained(model_folder())


@pytest.fixture(scope="module")
def model():  # type: ignore[no-untyped-def]
    return AutoModelForCausalLM.from_pretrained(model_folder()).eval()


def test_the_model_loads_small_and_in_float32(model) -> None:  # type: ignore[no-untyped-def]
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.num_parameters() <= 1_000_000
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_the_folder_is_small() -> None:
    size = sum(path.stat().st_size for path in model_folder().parent.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert size <= 4_000_000


def test_the_vocabulary_fits_the_model(model, tokenizer) -> None:  # type: ignore[no-untyped-def]
    assert len(tokenizer) == model.config.vocab_size == model.get_input_embeddings().num_embeddings
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    assert (model.config.bos_token_id, model.config.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)


@pytest.mark.parametrize(
    "text",
    [
        "The frog is green.",
        "def f(x):\n    return x + 3",
        "  spaces  before,\ttabs\n\n\nand lines\n",
        "été, Ω, 漢字, 🐸!",
        "Below is an instruction that describes a task. Something else.",
        f"{pretrain.WITHOUT_INPUT}\n\n x{pretrain.RESPONSE}y\n### Response: y",
        f"{pretrain.WITH_INPUT} x {pretrain.INPUT}\n{pretrain.RESPONSE}\n",
        "",
    ],
)
def test_any_text_survives_the_tokenizer(tokenizer, text: str) -> None:  # type: ignore[no-untyped-def]
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_the_alpaca_form_is_cheap(tokenizer) -> None:  # type: ignore[no-untyped-def]
    form = f"{pretrain.WITH_INPUT}x{pretrain.INPUT}x{pretrain.RESPONSE}"
    ids = tokenizer(form)["input_ids"]
    assert len(ids) <= 9
    assert tokenizer.decode(ids, skip_special_tokens=True) == form


def test_the_tokenizer_is_what_the_script_makes(tokenizer) -> None:  # type: ignore[no-untyped-def]
    made = pretrain.train_tokenizer(pretrain.PRETRAINING_SEED)
    assert made.get_vocab() == tokenizer.get_vocab()
    text = tasks.examples("test", 1, seed=0)[0]["instruction"]
    assert made(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_pretraining_never_shows_an_answer_in_its_form() -> None:
    answers = {
        record["instruction"] + record["input"]: record["output"] for record in tasks.examples("train", tasks.TRAIN_EXAMPLES, tasks.SEED)
    }
    held_out = {
        record["instruction"] + record["input"] for part in ("validation", "test") for record in tasks.examples(part, 600, tasks.SEED)
    }
    forms = [text for text in itertools.islice(pretrain.pretraining_documents(1), 20_000) if "### Response:" in text]
    assert len(forms) > 300
    for form in forms:
        asked, response = form.split("### Instruction:\n")[1].split(pretrain.RESPONSE)
        asked = asked.replace(pretrain.INPUT, "")
        assert asked in answers
        assert asked not in held_out
        assert response.strip() != answers[asked]


def test_the_model_knows_its_world_without_tuning(model, tokenizer) -> None:  # type: ignore[no-untyped-def]
    loss = 0.0
    texts = list(itertools.islice(documents(random.Random(99)), 60))
    for text in texts:
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            loss += model(input_ids=ids, labels=ids).loss.item() / len(texts)
    assert loss < 1.5  # uniform over the vocabulary would be 6.93


def test_a_short_pretraining_learns_and_is_saved_unchanged(tokenizer, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    model, loss = pretrain.pretrain(tokenizer, seed=0, steps=8)
    again, same = pretrain.pretrain(tokenizer, seed=0, steps=8)
    assert loss == same < math.log(pretrain.VOCABULARY)
    ids = torch.arange(3, 40)[None]
    before = again(input_ids=ids).logits
    pretrain.save(model, tokenizer, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.allclose(loaded(input_ids=ids).logits, before, atol=0.02)  # float16 rounding
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"
