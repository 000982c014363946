import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import tiny_engine
import tiny_tokenizer
import torch
import transformers

from loratune.errors import MissingExtraError, ModelError
from loratune.finetune import model
from loratune.finetune.sizes import adapter_sizes
from loratune.work import ModelRecipe

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_engine.build_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def load(path: Path | str, device: torch.device = CPU, **options: object) -> model.BaseModel:
    return model.load(ModelRecipe(name_or_path=str(path), **options), device)  # type: ignore[arg-type]


def test_loads_frozen_and_without_its_own_dropout(folder: Path) -> None:
    base = load(folder)
    assert base.dtype == torch.float32
    assert not any(p.requires_grad for p in base.model.parameters())
    assert base.model.config.attention_dropout == 0
    assert {m.attention_dropout for m in base.model.modules() if hasattr(m, "attention_dropout")} == {0.0}
    ids = torch.arange(12)[None]
    assert torch.equal(base.model.train()(input_ids=ids).logits, base.model.eval()(input_ids=ids).logits)
    assert len(base.tokenizer)
    assert base.pad_id == base.tokenizer.eos_token_id  # it has no pad token


@pytest.mark.parametrize("name", ["float64", "bfloat16", "float16"])
def test_dtypes(folder: Path, name: str) -> None:
    base = load(folder, dtype=name)
    assert base.model.dtype == base.dtype == getattr(torch, name)


def test_no_attention_mask_is_needed(folder: Path) -> None:
    """Padding on the right changes no real position, which is why batches carry no mask."""
    network = load(folder, dtype="float64").model
    ids = torch.arange(3, 15)[None]
    padded = torch.cat([ids, torch.full((1, 5), 9)], dim=1)
    mask = (torch.arange(17) < 12).long()[None]
    plain = network(input_ids=padded).logits[:, :12]
    torch.testing.assert_close(plain, network(input_ids=padded, attention_mask=mask).logits[:, :12], rtol=0, atol=1e-12)
    torch.testing.assert_close(plain, network(input_ids=ids).logits, rtol=0, atol=1e-12)


def test_missing_folder() -> None:
    with pytest.raises(ModelError, match=r"there is no folder \./nowhere"):
        load("./nowhere")


@pytest.mark.parametrize("name", ["./lama", "~/nowhere/at/all", "models/lama", "models/", "/no/such"])
def test_a_folder_that_is_not_there_is_told_before_anything_is_loaded(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loratune.data.tokenizers import load_tokenizer
    from loratune.system import hub

    monkeypatch.chdir(tmp_path)
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text("{}")
    (tmp_path / "lamas").mkdir()  # no model's
    if name == "models/lama":  # may be a hub id, so it is asked for there first
        with pytest.raises(ModelError, match=r"the tokenizer cannot be loaded: .* Nor is there a folder models/lama here\."):
            load_tokenizer(name)
        return
    with pytest.raises(ModelError) as caught:
        hub.refuse_adapter(name, None)
    hint = {"./lama": " Did you mean llama?", "models/": " Did you mean llama?"}.get(name, " The folder")
    assert str(caught.value).startswith(f"model: there is no folder {name}.{hint}")


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        load(tmp_path)


@pytest.fixture
def mixed(copy: Path) -> Path:
    """A model's folder into which somebody copied an adapter."""
    config = {"peft_type": "LORA", "base_model_name_or_path": "someone/llama", "r": 4, "target_modules": ["q_proj"]}
    (copy / "adapter_config.json").write_text(json.dumps(config))
    return copy


def test_a_folder_with_a_model_and_an_adapter(mixed: Path) -> None:
    """Refused, wherever a model is loaded or its config read: Transformers would put the adapter on without a word."""
    both = r"holds a model AND an adapter \(adapter_config\.json, made for someone/llama\).*merge the adapter first"
    recipe = ModelRecipe(name_or_path=str(mixed))
    for refused in (lambda: load(mixed), lambda: adapter_sizes(recipe)):
        with pytest.raises(ModelError, match=both):
            refused()
    (mixed / "adapter_config.json").write_text("not JSON")
    with pytest.raises(ModelError, match=r"a model AND an adapter \(adapter_config\.json\)"):
        load(mixed)


def test_a_folder_with_an_adapter_alone(mixed: Path) -> None:
    (mixed / "config.json").unlink()
    with pytest.raises(ModelError, match=r"and no model\. Give the model that it was made for, someone/llama"):
        load(mixed)
    with pytest.raises(ModelError, match="no model"):
        adapter_sizes(ModelRecipe(name_or_path=str(mixed)))


@pytest.mark.parametrize("whole", [True, False])
def test_a_hub_repository_with_an_adapter(mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool) -> None:
    """As the hub's cache holds it, without the network."""
    if not whole:
        (mixed / "config.json").unlink()
    cache = tmp_path / "hub" / "models--someone--mixed"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("a" * 40)
    (cache / "refs" / "v2").write_text("a" * 40)
    shutil.copytree(mixed, cache / "snapshots" / ("a" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    expected = "a model AND an adapter" if whole else "no model.*someone/llama"
    for revision in (None, "v2"):
        with pytest.raises(ModelError, match=expected):
            load("someone/mixed", revision=revision)


def test_broken_config(copy: Path) -> None:
    (copy / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"cannot load its config\.json"):
        load(copy)


@pytest.mark.parametrize("change", ["truncate", "garbage", "remove"])
def test_broken_weights(copy: Path, change: str) -> None:
    weights = copy / "model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    if change != "remove":
        weights.write_bytes(content[: len(content) // 2] if change == "truncate" else b"<html>404</html>" * 99)
    with pytest.raises(ModelError, match="cannot load its weights"):
        load(copy)


def test_weights_of_another_shape_or_missing(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ModelError, match=r"9 weights are missing.*model\.layers\.2"):
        load(copy)
    (copy / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    with pytest.raises(ModelError, match="weights"):
        load(copy)


@pytest.mark.parametrize("kind", ["bert", "xlnet"])
def test_a_model_that_sees_what_comes_after_is_refused(tmp_path: Path, kind: str) -> None:
    """Transformers gives these as AutoModelForCausalLM too."""
    tiny_tokenizer.build(tmp_path)
    if kind == "bert":
        shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 320}
        transformers.BertLMHeadModel(transformers.BertConfig(**shape)).save_pretrained(tmp_path)
    else:
        transformers.XLNetLMHeadModel(
            transformers.XLNetConfig(vocab_size=320, d_model=16, n_layer=1, n_head=2, d_inner=16)
        ).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"LMHeadModel is not a causal language model in this configuration: a later token"):
        load(tmp_path)
    if kind == "bert":
        transformers.BertLMHeadModel(transformers.BertConfig(**shape, is_decoder=True)).save_pretrained(tmp_path)
        load(tmp_path)


def test_not_a_causal_model(tmp_path: Path) -> None:
    config = transformers.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=50)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"not a causal language model.*BertForMaskedLM"):
        load(tmp_path)


def test_no_tokenizer(copy: Path) -> None:
    for path in copy.glob("*token*"):
        path.unlink()
    with pytest.raises(ModelError, match="tokenizer"):
        load(copy)


def test_unreachable_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"nobody/no-such-model.*hub id, the network"):
        load("nobody/no-such-model")


def test_requests_that_cannot_be_met(folder: Path) -> None:
    with pytest.raises(ModelError, match="allowed: auto, float32"):
        load(folder, dtype="int8")
    if importlib.util.find_spec("bitsandbytes") is None:
        with pytest.raises(MissingExtraError, match=r"loratune\[4bit\]"):
            load(folder, load_in_4bit=True)
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="torch sees no CUDA device"):
            model.choose_device("cuda")


def test_weights_go_straight_onto_a_device(folder: Path) -> None:
    """None in main memory first: torch's meta device stands for a GPU."""
    base = load(folder, device=torch.device("meta"), dtype="float32")
    assert {parameter.device.type for parameter in base.model.parameters()} == {"meta"}


def test_a_device_is_named_to_transformers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    real = transformers.AutoModelForCausalLM.from_pretrained

    def noted(*arguments: object, **options: object) -> object:
        given.append(options.pop("device_map", None))
        return real(*arguments, **options)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", noted)
    for device in (torch.device("cuda", 1), torch.device("cpu")):
        load(folder, device=device, dtype="float32")
    assert given == [{"": torch.device("cuda", 1)}, None]
