"""What is known before training: tokens without an embedding, positions that there are not, layers that get no adapter."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import families
import pytest
import tiny_tokenizer
import torch
import transformers
from families import FAMILIES, VOCABULARY, bare
from transformers import AutoTokenizer

from loratune.data.prepare import prepare
from loratune.data.prepared import Prepared
from loratune.data.sources import DataRecipe, DataSource
from loratune.errors import ModelError
from loratune.finetune.preflight import check_fit, position_limit
from loratune.finetune.targets import chosen_layers, linear_layers, target_endings
from loratune.work import ModelRecipe

TINY = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
Rows = Sequence[tuple[str, str]]


def prepared(folder: Path, train: Rows, validation: Rows = (("Who?", "Me"),), max_length: int = 512) -> tuple[Prepared, ModelRecipe]:
    """Data of (instruction, output) rows, by the tokenizer in `folder`, made there if there is none."""
    if not (folder / "tokenizer.json").exists():
        tiny_tokenizer.build(folder)
    sources = {}
    for name, rows in (("train", train), ("validation", validation)):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"instruction": asked, "output": answer}) + "\n" for asked, answer in rows))
        sources[name] = (DataSource(path=str(path)),)
    data = prepare(DataRecipe(**sources, max_length=max_length), tokenizer=str(folder), cache=folder / "cache")
    return data, ModelRecipe(name_or_path=str(folder))


def tokenizer_with(folder: Path, *added: str, eos: str | None = None) -> int:
    """A tokenizer with more tokens than the model has embeddings for; the first new one's id."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer.build(folder))
    first = len(tokenizer)
    tokenizer.add_tokens(list(added))
    if eos:
        tokenizer.add_special_tokens({"eos_token": eos})
    tokenizer.save_pretrained(folder)
    return first


def llama(rows: int, **more: int) -> transformers.PreTrainedModel:
    return bare(transformers.LlamaConfig(vocab_size=rows, intermediate_size=48, **TINY, **more))


@pytest.mark.parametrize("where", ["train", "validation"])
def test_a_token_without_embedding_is_named_with_its_place(tmp_path: Path, where: str) -> None:
    first = tokenizer_with(tmp_path, "<tool>", "<more>", "<unused>")
    rows = [("Say it", "yes"), ("Call", "a <tool> now"), ("Call 2", "<more> <tool>")]
    data, recipe = prepared(tmp_path, **{"train": [("Who?", "Me")], where: rows})  # type: ignore[arg-type]
    with pytest.raises(ModelError) as caught:
        check_fit(llama(first), recipe, data, ["qv"])
    told = str(caught.value)
    assert f"token id {first} ('<tool>', first in {tmp_path / where}.jsonl, line 2)" in told
    assert f"token id {first + 1} ('<more>', first in {tmp_path / where}.jsonl, line 3)" in told
    assert f"no embedding in a model of {first:,}" in told
    assert "unused" not in told
    assert check_fit(llama(first + 3), recipe, data, ["qv"]) == []


def test_an_eos_without_embedding_is_named(tmp_path: Path) -> None:
    first = tokenizer_with(tmp_path, eos="<|my_end|>")
    data, recipe = prepared(tmp_path, [("Say it", "yes")])
    with pytest.raises(ModelError, match=r"<\|my_end\|>', the EOS that ends every response"):
        check_fit(llama(first), recipe, data, ["qv"])


def test_tokens_that_the_data_do_not_use_need_no_embedding(tmp_path: Path) -> None:
    first = tokenizer_with(tmp_path, "<tool>")
    data, recipe = prepared(tmp_path, [("Say it", "yes")])
    assert check_fit(llama(first), recipe, data, ["qv"]) == []


def test_positions_beyond_a_table_are_refused_by_what_the_data_hold(tmp_path: Path) -> None:
    data, recipe = prepared(tmp_path, [("Say it", "yes"), ("Say it at length" * 3, "yes")])
    longest = int(data.train.lengths.max())
    heads = {"n_embd": 32, "n_layer": 2, "n_head": 4}
    learned: dict[str, Callable[[int], transformers.PretrainedConfig]] = {
        "wpe": lambda n: transformers.GPT2Config(vocab_size=VOCABULARY, n_positions=n, **heads),
        "transformer.wpe": lambda n: transformers.GPTNeoConfig(
            vocab_size=VOCABULARY, max_position_embeddings=n, hidden_size=32, num_layers=1, num_heads=4, attention_types=[[["global"], 1]]
        ),
        "embed_positions": lambda n: transformers.OPTConfig(
            vocab_size=VOCABULARY, max_position_embeddings=n, ffn_dim=48, word_embed_proj_dim=32, **TINY
        ),
        "attn.embed_positions": lambda n: transformers.GPTJConfig(vocab_size=VOCABULARY, n_positions=n, rotary_dim=4, **heads),
        "position_embeddings": lambda n: transformers.BertConfig(
            vocab_size=VOCABULARY, max_position_embeddings=n, intermediate_size=48, is_decoder=True, **TINY
        ),
        "config.json": lambda n: transformers.MptConfig(vocab_size=VOCABULARY, max_seq_len=n, d_model=32, n_heads=4, n_layers=1),
    }
    for table, config in learned.items():
        with pytest.raises(ModelError, match=rf"max_length: 512 lets 1 of 3 examples.*{longest - 1} positions.*{table}.*{longest} tokens"):
            check_fit(bare(config(longest - 1)), recipe, data, [])
        assert check_fit(bare(config(longest)), recipe, data, []) == [], table


@pytest.mark.parametrize("name", ["opt", "gpt2", "roberta", "llama", "bloom"])
def test_a_table_is_as_long_as_what_it_takes(name: str) -> None:
    """One position more is the model's own error."""
    roberta = transformers.RobertaConfig(vocab_size=VOCABULARY, max_position_embeddings=66, intermediate_size=48, is_decoder=True, **TINY)
    config = roberta if name == "roberta" else FAMILIES[name]()
    model, limit = families.model(config), position_limit(bare(config))
    if name in ("llama", "bloom"):
        assert limit is None
        return
    assert limit is not None
    model(input_ids=torch.full((1, limit[0]), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, limit[0] + 1), 5))


def test_longer_than_a_rotary_model_was_made_for_is_a_note(tmp_path: Path) -> None:
    data, recipe = prepared(tmp_path, [("Say it", "yes")])
    longest = int(data.train.lengths.max())
    (note,) = check_fit(llama(VOCABULARY, max_position_embeddings=longest - 1), recipe, data, ["qv"])
    assert f"longer than the {longest - 1} positions that the model was made for" in note
    assert check_fit(llama(VOCABULARY, max_position_embeddings=longest), recipe, data, ["qv"]) == []


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    first = tokenizer_with(tmp_path, "<tool>")
    data, recipe = prepared(tmp_path, [("Call", "<tool>")])
    model = bare(transformers.GPT2Config(vocab_size=first, n_positions=16, n_embd=32, n_layer=2, n_head=4))
    with pytest.raises(ModelError) as caught:
        check_fit(model, recipe, data, ["qv", ("q_proj",), ("c_attn", "v_proj")])
    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    assert all(word in line for word, line in zip(("'q_proj'", "'v_proj'", "<tool>", "max_length"), lines, strict=True))


@pytest.mark.parametrize(
    ("family", "wanted", "told"),
    [
        ("mixtral", "all-linear", ["the experts, 58% of the parameters (model.layers.*.mlp.experts:"]),
        ("mixtral", "qv", []),
        ("llama", "all-linear", []),
        ("llama4", "all-linear", ["model.layers.*.feed_forward.router (2 linear layers: routers)", "the experts, "]),
        ("phimoe", "all-linear", ["model.layers.*.mlp.router (2 linear layers: routers)", "the experts, "]),
        ("gemma3", "all-linear", ["model.vision_tower (15 linear layers: text does not run)"]),
        ("gemma3", "qv", ["model.vision_tower (4 linear layers: text does not run)"]),
        ("gemma3", ("q_proj",), ["model.vision_tower (2 linear layers: text does not run)"]),
        ("mamba", "all-linear", ["mixer.x_proj, backbone.layers.*.mixer.dt_proj, backbone.layers.*.mixer.out_proj (6 linear layers: the"]),
        ("jamba", "all-linear", ["model.layers.*.mamba.dt_proj (1 linear layer: ", "the experts, "]),
    ],
)
def test_what_gets_no_adapter_is_told(tmp_path: Path, family: str, wanted: str | tuple[str, ...], told: list[str]) -> None:
    data, recipe = prepared(tmp_path, [("Say it", "yes")])
    lines = check_fit(bare(FAMILIES[family]()), recipe, data, [wanted])
    assert len(lines) <= 2
    assert bool(lines) == bool(told)
    assert all(phrase in lines[0] for phrase in told)


@pytest.mark.parametrize(
    ("family", "names", "told"),
    [
        ("llama4", ("q_proj", "router"), "feed_forward.router.*routers.*Its other linear layers.*gate_proj"),
        ("mamba", ("in_proj", "out_proj"), "mixer.out_proj.*without calling.*Its other linear layers: in_proj;"),
        ("gemma3", ("fc1",), "vision_tower.*text does not run.*q_proj"),
    ],
)
def test_names_of_layers_that_take_no_adapter_are_refused(family: str, names: tuple[str, ...], told: str) -> None:
    with pytest.raises(ModelError, match=told):
        chosen_layers(bare(FAMILIES[family]()), names)


def test_a_name_stands_for_the_layers_of_the_text() -> None:
    model = bare(FAMILIES["gemma3"]())
    chosen = chosen_layers(model, ("q_proj", "v_proj"))
    assert chosen == chosen_layers(model, "qv")
    assert len(chosen) == 4
    assert all(layer.startswith("model.language_model.layers.") for layer in chosen)
    modules = [name for name, _ in model.named_modules()]
    endings = target_endings(model, ("q_proj", "v_proj"))
    assert {name for name in modules if any(name.endswith("." + ending) for ending in endings)} == set(chosen)


def test_cross_attention_that_no_encoder_feeds_gets_no_adapter() -> None:
    config = transformers.BartConfig(
        vocab_size=VOCABULARY, d_model=32, decoder_layers=1, decoder_ffn_dim=48, decoder_attention_heads=4, is_decoder=True
    )
    layers = linear_layers(bare(config))
    assert {layer.split(".")[-2] for layer in layers if layer.endswith("q_proj")} == {"self_attn"}
