"""One prompt and one date from a study's first day to the hand-over: training, evaluation, comparison, export."""

import argparse
import datetime
import json
import shutil
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from loratune.cli import compare
from loratune.data import prepare as preparing
from loratune.data.prepared import Prepared
from loratune.data.prompts import choose_prompt
from loratune.delivery.exporting import export
from loratune.downstream.answering.adapter_stack import Adapters
from loratune.downstream.answering.answerer import Answerer
from loratune.downstream.tasks.base import Benchmark, Item, Verdict
from loratune.errors import StorageError
from loratune.finetune.model import load
from loratune.preference.answers import Generation, read_answers, write_answers
from loratune.preference.comparison import Comparison, settle
from loratune.preference.contestants import Contestant
from loratune.preference.questions import Question
from loratune.record import read
from loratune.selection.rerun import study_data
from loratune.spec import StudySpec
from loratune.study.driver import deliver, tune
from loratune.work import Message, ModelRecipe

DATED = (
    "<|im_start|>system\nToday is {{ strftime_now('%d %b %Y') }}.<|im_end|>\n"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer_files(folder: Path, template: str | None) -> None:
    """A byte-level tokenizer whose EOS is not what its chat template ends a turn with."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: place for place, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    wrapped.chat_template = template
    wrapped.save_pretrained(folder)


def build_model(folder: Path, template: str | None) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=259, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=512
    )
    config.eos_token_id, config.bos_token_id = 256, None
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer_files(folder, template)
    return folder


def on(monkeypatch: pytest.MonkeyPatch, day: str) -> None:
    """Today is `day`."""
    clock = types.SimpleNamespace(today=lambda: datetime.date.fromisoformat(day))
    monkeypatch.setattr(preparing, "datetime", types.SimpleNamespace(date=clock))
    monkeypatch.setattr(compare, "datetime", types.SimpleNamespace(date=clock))


def described(home: Path, template: str | None, trials: int = 1, **data: Any) -> StudySpec:
    if not (home / "model").exists():
        build_model(home / "model", template)
        rows = [{"instruction": f"Say {i}", "input": "", "output": f"It is {i}."} for i in range(12)]
        (home / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return StudySpec.load(
        base={
            "name": "prompted",
            "model": str(home / "model"),
            "data": {"train": [str(home / "data.jsonl")], "validation_fraction": 0.34, **data},
            "training": {"epochs": 1, "batch_size": 4, "target_modules": "all-linear", "validations": 1},
            "search_space": {"lora_r": [2, 4]},
            "sampler": "random",
            "executor": "inline",
            "budget": {"trials": trials},
            "output": {"folder": str(home / "study")},
        }
    )


def notes(spec: StudySpec) -> str:
    return "\n".join(event.text for event in tune(spec) if isinstance(event, Message))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORATUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.slow
def test_a_study_keeps_its_prompt_and_its_date(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, "2026-03-01")
    said = notes(described(home, DATED))
    assert "prompt: chat, the tokenizer's own template; answers end with <|im_end|>; its date is 2026-03-01" in said
    first = read(home / "study")
    assert {**first.prompt, "note": ""} == {"kind": "chat", "note": "", "date": "2026-03-01", "thinking": False, "end": "<|im_end|>"}
    assert first.spec["data"]["prompt"] == "auto"
    ids = Prepared.load(Path(json.loads((home / "study" / "recipe.json").read_text())["data"])).validation.ids.tolist()
    tokenizer = transformers.AutoTokenizer.from_pretrained(home / "model")
    assert tokenizer.decode(ids).startswith("<|im_start|>system\nToday is 01 Mar 2026.<|im_end|>\n<|im_start|>user\nSay ")

    on(monkeypatch, "2026-03-02")  # the study goes on, on another day and with an empty cache
    shutil.rmtree(home / "cache")
    assert "its date is 2026-03-01" in notes(described(home, DATED, trials=2))
    shutil.rmtree(home / "cache")
    record = read(home / "study")
    assert study_data(record).validation.ids.tolist() == ids

    delivery = deliver(home / "study")
    best = yaml.safe_load((home / "study" / "best.yaml").read_text())
    assert (best["prompt"], best["prompt_date"]) == ("chat", "2026-03-01")
    told = "chat, the tokenizer's own template; answers end with"
    assert delivery.adapter is not None
    assert told in (delivery.adapter / "README.md").read_text()

    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    (home / "questions.txt").write_text("Say 1\n")
    args = parser.parse_args(["tuned", "base", "--study", str(home / "study"), "--questions", str(home / "questions.txt")])
    comparison = compare._comparison(args, record)
    assert (comparison.prompt, comparison.date) == ("chat", "2026-03-01")

    merged = export(home / "study", home / "merged", merged=True)
    assert told in (merged / "README.md").read_text()
    assert transformers.AutoTokenizer.from_pretrained(merged).chat_template == DATED
    assert transformers.GenerationConfig.from_pretrained(merged).eos_token_id == [256, 258]  # generation stops where answers ended


def test_two_days_two_hashes(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {}
    for template in (DATED, DATED.replace("strftime_now('%d %b %Y')", "'fair'")):
        for day in ("2026-03-01", "2026-03-02"):
            on(monkeypatch, day)
            spec = described(home, template)
            tokenizer_files(home / "model", template)
            names[template, day] = preparing.prepare(
                preparing.DataRecipe.from_plain(spec.data_recipe_dict()), tokenizer=str(home / "model"), cache=home / "cache"
            ).folder.name
    assert len(set(names.values())) == 3  # the template without a date does not care


def test_after_alpaca_the_merged_model_chats_in_alpaca(home: Path) -> None:
    assert "prompt: alpaca, as asked: the tokenizer's own chat template is not what is trained" in notes(
        described(home, DATED, prompt="alpaca")
    )
    merged = export(home / "study", home / "merged", merged=True)
    assert "alpaca, as asked: the tokenizer's own chat template is not what is trained" in (merged / "README.md").read_text()
    tokenizer = transformers.AutoTokenizer.from_pretrained(merged)
    prompt = choose_prompt(transformers.AutoTokenizer.from_pretrained(home / "model"), "alpaca")
    turns = [{"role": "user", "content": "Say 3"}]
    ask = {"add_generation_prompt": True, "return_dict": False}
    assert tokenizer.apply_chat_template(turns, **ask) == prompt.question("Say 3")
    assert tokenizer.apply_chat_template([{"role": "system", "content": "Be brief."}, *turns], **ask) == prompt.question(
        "Say 3", system="Be brief."
    )
    more = [*turns, {"role": "assistant", "content": "It is 3."}, {"role": "user", "content": "And 4"}]
    text = tokenizer.decode(tokenizer.apply_chat_template(more, **ask))
    assert text == tokenizer.decode(prompt.question("Say 3")) + "It is 3.<|endoftext|>\n\n### Instruction:\nAnd 4\n\n### Response:"


def test_without_a_chat_template_none_is_exported(home: Path) -> None:
    assert "prompt: alpaca, because the tokenizer has no chat template" in notes(described(home, None))
    merged = export(home / "study", home / "merged", merged=True)
    assert transformers.AutoTokenizer.from_pretrained(merged).chat_template is None
    deliver(home / "study")
    assert yaml.safe_load((home / "study" / "best.yaml").read_text())["prompt"] == "alpaca"


def test_a_study_of_before_is_refused_clearly(home: Path) -> None:
    notes(described(home, DATED, prompt="alpaca"))
    with pytest.raises(StorageError, match=r"data.prompt: was 'alpaca', now 'auto'; to continue that study, write prompt: alpaca"):
        notes(described(home, DATED))
    (home / "study" / "prompt.json").unlink()  # which older versions did not write
    assert read(home / "study").prompt["kind"] == "alpaca"
    notes(described(home, DATED, trials=2, prompt="alpaca"))
    (home / "study" / "data.txt").write_text("0123456789abcdef")
    with pytest.raises(StorageError, match="this version of loratune prepares them otherwise"):
        notes(described(home, DATED, trials=3, prompt="alpaca"))


# ---- where generation stops ----


class Writing(Benchmark):
    name = title = version = "writing"
    chance = 0.0
    max_new_tokens = 6

    def items(self) -> list[Item]:
        return [Item(id="1", prompt="Say 1")]

    def score(self, items: Any, answers: Any) -> list[Verdict]:
        return [Verdict(score=0.0) for _ in items]


def test_generation_stops_at_the_end_of_the_turn(home: Path) -> None:
    """Of a model that writes <|im_end|> at once and would go on with Z, while its EOS is <|endoftext|>."""
    build_model(home / "model", DATED)
    model = transformers.LlamaForCausalLM.from_pretrained(home / "model")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.zero_()
        model.model.embed_tokens.weight[:, 0] = 1
        model.model.embed_tokens.weight[258] = torch.eye(16)[1]
        model.lm_head.weight[258, 0] = 1  # after anything: <|im_end|>
        model.lm_head.weight[ord("Z") - 33, 1] = 1  # after <|im_end|>: Z
    model.save_pretrained(home / "model")
    base = load(ModelRecipe(name_or_path=str(home / "model")), torch.device("cpu"))
    adapters = Adapters(base, [None])
    ((_, [[answer]]),) = Answerer(base, adapters).answers(Writing(), Writing().items(), [0])
    adapters.close()
    assert answer.text == ""
    contestant = Contestant(label="base model", name="base", adapter=None)
    asked = Comparison(
        first=contestant,
        second=contestant,
        model=ModelRecipe(name_or_path=str(home / "model")),
        prompt="chat",
        date="2026-03-01",
        questions=(Question(id="1", instruction="Say 1"),),
        generation=Generation(max_new_tokens=6),
    )
    asked = settle(asked, home / "comparison")
    write_answers(asked, home / "comparison", tell=lambda line: None)
    for told in read_answers(home / "comparison").values():
        assert (told.text, told.tokens, told.ended) == ("", 0, True)
