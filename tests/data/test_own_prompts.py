"""Prompts of the user's own: a template of a question, a chat template, plain text; what becomes of long rows."""

import json

import pytest
import tiny_tokenizer

from loratune.data.prepare import prepare
from loratune.data.prompts import choose_prompt
from loratune.data.sources import DataRecipe, DataSource, Example, Exchange
from loratune.data.tokenizers import load_tokenizer
from loratune.errors import DataError, ModelError

TEMPLATE = "{{ system + '\n' if system }}### Q: {{ instruction }}{{ ' (' + input + ')' if input }}\n### A: "


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny_tokenizer.build(tmp_path_factory.mktemp("tokenizer"), bos=True))


def text(loaded, encoded):
    prompt = loaded.decode([t for t, m in zip(encoded.input_ids, encoded.response_mask, strict=True) if not m])
    return prompt, loaded.decode([t for t, m in zip(encoded.input_ids, encoded.response_mask, strict=True) if m])


def test_a_template_of_a_question(folder):
    loaded = load_tokenizer(folder)
    prompt = choose_prompt(loaded, TEMPLATE)
    example = Example(exchanges=(Exchange("Where<|im_end|>?", "France", "Paris"),), system="Be brief.")
    made = prompt.encode(example, 1000)
    assert text(loaded, made) == ("<|begin|>Be brief.\n### Q: Where<|im_end|>? (France)\n### A: ", "Paris<|im_end|>")
    assert made.input_ids.count(loaded.eos_token_id) == 1  # the one spelt out in the question is text
    assert made.input_ids[: made.response_mask.index(True)] == prompt.question("Where<|im_end|>?", "France", "Be brief.")
    two = Example(exchanges=(Exchange("a", "", "b"), Exchange("c", "", "d")))
    assert text(loaded, prompt.encode(two, 1000)) == ("<|begin|>### Q: a\n### A: ### Q: c\n### A: ", "b<|im_end|>d<|im_end|>")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% if instruction %}x", "not a Jinja template: line 1"),
        ("{{ question }}: ", "the variable question; expected instruction"),
        ("{{ system }}", "no variable that shows the question"),
    ],
)
def test_templates_that_cannot_serve(folder, template, message):
    with pytest.raises(ModelError, match=f"data.prompt: .*{message}"):
        choose_prompt(load_tokenizer(folder), template)


def rows(path, number, **more):
    path.write_text("".join(json.dumps({"instruction": f"q{n}", "output": f"a{n}"} | more) + "\n" for n in range(number)))
    return DataSource(path=str(path))


def test_the_template_of_a_file_is_kept_with_the_data(tmp_path, folder):
    file = tmp_path / "mine.jinja"
    file.write_text(tiny_tokenizer.CHATML + "\n")
    recipe = DataRecipe(train=(rows(tmp_path / "a.jsonl", 20),), validation_fraction=0.2, prompt=str(file))
    first = prepare(recipe, tokenizer=folder, cache=tmp_path / "cache")
    assert (first.manifest.prompt.kind, first.manifest.prompt.template) == ("chat", tiny_tokenizer.CHATML)
    assert first.manifest.prompt.note.startswith("chat, the description's own template; answers end with <|im_end|>")
    file.write_text(TEMPLATE)
    assert prepare(recipe, tokenizer=folder, cache=tmp_path / "cache").folder != first.folder
    file.unlink()
    with pytest.raises(DataError, match=r"data\.prompt: .*mine\.jinja cannot be read: No such file"):
        prepare(recipe, tokenizer=folder, cache=tmp_path / "cache")


def test_plain_text_is_its_own_prompt(tmp_path, folder):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"<|begin|>Task {n} ### A: yes {n}<|im_end|>"}) + "\n" for n in range(20)))
    recipe = DataRecipe(train=(DataSource(path=str(path)),), validation_fraction=0.2, response_marker="### A:")
    made, loaded = prepare(recipe, tokenizer=folder, cache=tmp_path / "cache"), load_tokenizer(folder)
    ids, mask = made.train[0]
    number = loaded.decode(ids[mask]).split()[1].removesuffix("<|im_end|>")
    assert (loaded.decode(ids[~mask]), loaded.decode(ids[mask])) == (f"<|begin|>Task {number} ### A:", f" yes {number}<|im_end|>")
    assert (made.manifest.prompt.kind, made.manifest.near_duplicates) == ("text", 0)


def test_rows_that_are_cut_are_told_with_the_length_that_would_keep_them(tmp_path, folder):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"instruction": f"q{n}", "output": "a" * (n + 1)}) + "\n" for n in range(100)))
    recipe = DataRecipe(train=(DataSource(path=str(path)),), validation_fraction=0.2, prompt="Q: {{ instruction }} A:", max_length=2**20)
    whole = prepare(recipe, tokenizer=folder, cache=tmp_path)
    lengths = sorted(int(length) for part in (whole.train, whole.validation) for length in part.lengths)
    assert not whole.manifest.notes
    short = prepare(DataRecipe(**{**vars(recipe), "max_length": int(lengths[89])}), tokenizer=folder, cache=tmp_path)
    cut = sum(length > lengths[89] for length in lengths)
    assert short.manifest.notes == (
        f"warning: {cut}% of the examples are longer than max_length, {lengths[89]:,} tokens, and lose their end; "
        f"max_length: {lengths[94]:,} keeps 95 % of them whole, {lengths[98]:,} 99 %",
    )


def test_a_merged_model_chats_by_the_users_template(folder):
    from transformers import GenerationConfig, LlamaConfig

    from loratune.delivery.merge import _fit

    class Model:
        config, generation_config = LlamaConfig(), GenerationConfig(eos_token_id=5)

    loaded = load_tokenizer(folder)
    prompt = choose_prompt(load_tokenizer(folder), TEMPLATE)
    _fit(Model, loaded, TEMPLATE)
    asked = loaded.apply_chat_template([{"role": "user", "content": "Where?"}], add_generation_prompt=True, return_dict=True)
    assert asked["input_ids"] == prompt.question("Where?")
    assert Model.generation_config.eos_token_id == sorted({5, *prompt.ends})
