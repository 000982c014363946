"""What is on disk after training, loaded by plain PEFT: the recorded loss, or a refusal. Mixtures of experts, and tampered folders."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import tiny_engine
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_validation import by_definition
from tiny_engine import VOCABULARY, recipe, segment

from loratune.delivery import reload
from loratune.delivery.merge import export_adapter, merge
from loratune.errors import ModelError
from loratune.finetune import lora
from loratune.finetune.engines import load_engine
from loratune.finetune.peft_layers import addressable
from loratune.finetune.targets import chosen_layers, linear_layers
from loratune.record.paths import ADAPTER_WEIGHTS, StudyPaths
from loratune.work import Hyperparameters, State

SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1}
QWEN = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "n_group": 1, "topk_group": 1}
# Those above `mixtral` have linear layers beside their experts whose names PEFT takes for the experts'.
FAMILIES = {
    "deepseek_v3": lambda: transformers.DeepseekV3Config(**SHAPE, **ROUTED, **LATENT),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**SHAPE, **QWEN, mlp_only_layers=[0], head_dim=8),
    "ernie4_5_moe": lambda: transformers.Ernie4_5_MoeConfig(
        **SHAPE, moe_num_experts=4, moe_k=2, moe_intermediate_size=16, moe_num_shared_experts=1
    ),
    "glm4_moe": lambda: transformers.Glm4MoeConfig(**SHAPE, **ROUTED, n_shared_experts=1, head_dim=8, n_group=1, topk_group=1),
    "mixtral": lambda: transformers.MixtralConfig(**SHAPE, num_local_experts=4),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(**SHAPE, **QWEN, shared_expert_intermediate_size=16, mlp_only_layers=[0]),
    "olmoe": lambda: transformers.OlmoeConfig(**SHAPE, num_experts=4, num_experts_per_tok=2),
    "gpt_oss": lambda: transformers.GptOssConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2, head_dim=8),
    "granitemoe": lambda: transformers.GraniteMoeConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2),
    "llama": lambda: transformers.LlamaConfig(**SHAPE),
}
REWRITTEN = ("deepseek_v3", "qwen3_moe", "ernie4_5_moe", "glm4_moe")
CORE = [("deepseek_v3", "packed", "all-linear"), ("deepseek_v3", "hf", "all-linear"), ("qwen3_moe", "packed", "all-linear")]
CORE += [("mixtral", "packed", "qv")]
# DeepSeek's attention has no query and value layers by those names, and gpt-oss is trained by `hf` alone.
REST = [
    (f, e, s) for f in FAMILIES for e in ("packed", "hf") for s in (("q_b_proj", "kv_b_proj") if f == "deepseek_v3" else "qv", "all-linear")
]
REST = [(f, e, s) for f, e, s in REST if (f, e, s) not in CORE and (f, e) != ("gpt_oss", "packed")]


class Plain:
    """Tokens as `by_definition` wants them."""

    def __init__(self, tokens) -> None:  # type: ignore[no-untyped-def]
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> object:
        return self.tokens[i]


def loss(model: torch.nn.Module, tokens) -> float:  # type: ignore[no-untyped-def]
    return by_definition(model.eval(), Plain(tokens), vocabulary=VOCABULARY)  # type: ignore[arg-type]


def base(root: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float32)


def train(root: Path, family: str, engine: str, layers: str | tuple[str, ...]):  # type: ignore[no-untyped-def]
    """(the study's recipe, the segment, its outcome, the validation tokens)"""
    tiny_engine.build_model(root / "model", FAMILIES[family]())
    study = replace(recipe(root, dtype="float32"), engine=engine)
    wanted = segment(6, learning_rate=0.03, lora_alpha=16, target_modules=layers)
    running = load_engine(study, root)
    assert not running.notice, running.notice
    return study, wanted, tiny_engine.run(running, wanted, state=None), running.validation


def is_what_was_measured(root: Path, family: str, engine: str, layers: str) -> None:
    study, wanted, outcome, tokens = train(root, family, engine, layers)
    assert outcome.state is State.COMPLETED, outcome.message
    folder = StudyPaths(root).of(wanted).adapter
    assert abs(outcome.validation_loss - loss(base(root), tokens)) > 1e-3, "training changed nothing"
    given = {"data": root / "data", "recorded": outcome.validation_loss}
    found = reload.check_adapter(folder, study.model, wanted.hyperparameters, **given)
    exported = export_adapter(folder, root / "exported", "card")
    for _ in range(2):
        model = peft.PeftModel.from_pretrained(base(root), str(exported))
        assert loss(model, tokens) == pytest.approx(outcome.validation_loss, abs=1e-4)
    assert found == pytest.approx(outcome.validation_loss, abs=1e-4)
    merged = merge(study.model, folder, root / "merged", "card", data=root / "data")
    model = transformers.AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    assert loss(model, tokens) == pytest.approx(outcome.validation_loss, abs=1e-4)
    lost = (StudyPaths(root).of(wanted).log).read_text().count("PEFT does not load")
    assert lost == (layers == "all-linear" and family in REWRITTEN), "what is left out is told, and nothing else is"


@pytest.mark.parametrize(("family", "engine", "layers"), CORE)
def test_a_mixture_of_experts_is_what_was_measured(tmp_path: Path, family: str, engine: str, layers: str) -> None:
    is_what_was_measured(tmp_path, family, engine, layers)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "engine", "layers"), REST)
def test_every_family_is_what_was_measured(tmp_path: Path, family: str, engine: str, layers: str) -> None:
    is_what_was_measured(tmp_path, family, engine, layers)


@pytest.mark.parametrize("engine", ["packed", "hf"])
@pytest.mark.parametrize("layers", ["mlp", ("q_proj", "down_proj"), ("gate_proj",)])
def test_layers_that_peft_would_not_load_are_refused_before_training(tmp_path: Path, engine: str, layers: str | tuple[str, ...]) -> None:
    _, wanted, outcome, _ = train(tmp_path, "qwen3_moe", engine, layers)
    assert outcome.state is State.BAD_INPUT
    assert "PEFT does not load adapters of" in outcome.message
    assert len(outcome.message.splitlines()) == 1
    assert not (StudyPaths(tmp_path).of(wanted).adapter).exists()


def test_what_peft_makes_of_layers_is_asked_without_a_trace() -> None:
    """Also of a model without memory; the answer is the same, and so is the model."""
    config = FAMILIES["deepseek_v3"]()
    loaded = transformers.AutoModelForCausalLM.from_config(config)
    with torch.device("meta"):
        bare = transformers.AutoModelForCausalLM.from_config(config)
    before = {name: (id(module), module.training) for name, module in loaded.eval().named_modules()}
    kept = [addressable(model, linear_layers(model)) for model in (loaded, bare)]
    assert kept[0] == kept[1]
    assert {name.rpartition(".")[2] for name in kept[0]} == {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
    assert {name: (id(module), module.training) for name, module in loaded.named_modules()} == before
    assert not hasattr(loaded, "peft_config")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    root = tmp_path_factory.mktemp("study")
    return (root, *train(root, "llama", "packed", "all-linear"))


def tensors_changed(folder: Path, change: str) -> None:
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    name = sorted(tensors)[-1]
    if change == "removed":
        del tensors[name]
    elif change == "renamed":
        tensors[name.replace("layers.1", "layers.0")] = tensors.pop(name)
    elif change == "values":
        tensors[name] = tensors[name] + 0.1
    elif change == "shape":
        tensors[name] = tensors[name][:, :2].contiguous()
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def config_changed(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


TAMPERED = {
    "removed": (lambda folder: tensors_changed(folder, "removed"), "not whole"),
    "renamed": (lambda folder: tensors_changed(folder, "renamed"), "not whole"),
    "values": (lambda folder: tensors_changed(folder, "values"), "its loss is .* by the record"),
    "shape": (lambda folder: tensors_changed(folder, "shape"), "PEFT cannot load it|not whole"),
    "alpha": (lambda folder: config_changed(folder, lora_alpha=99), "of another scale than the trial's"),
    "fewer layers": (lambda folder: config_changed(folder, target_modules=["q_proj"]), "in the file, and not loaded"),
    "no layers": (lambda folder: config_changed(folder, target_modules=["nothing"]), "PEFT cannot load it"),
    "truncated": (lambda folder: (folder / ADAPTER_WEIGHTS).write_bytes(b"half"), "cannot be read"),
}


@pytest.mark.parametrize("how", TAMPERED)
def test_a_folder_that_is_another_adapter_is_refused(trained, tmp_path: Path, how: str) -> None:  # type: ignore[no-untyped-def]
    root, study, wanted, outcome, _ = trained
    folder = tmp_path / "adapter"
    shutil.copytree(StudyPaths(root).of(wanted).adapter, folder)
    given = {"data": root / "data", "recorded": outcome.validation_loss}
    reload.check_adapter(folder, study.model, wanted.hyperparameters, **given)
    change, why = TAMPERED[how]
    change(folder)
    with pytest.raises(ModelError, match=why):
        reload.check_adapter(folder, study.model, wanted.hyperparameters, **given)


def test_other_values_are_known_by_their_digest(trained, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """However large the validation set is, and without it."""
    root, study, wanted, _, _ = trained
    for name in ("adapter", "adapter.sha256"):
        source = StudyPaths(root).of(wanted).folder / name
        shutil.copytree(source, tmp_path / name) if source.is_dir() else shutil.copy(source, tmp_path / name)
    reload.check_adapter(tmp_path / "adapter", study.model, wanted.hyperparameters)
    tensors_changed(tmp_path / "adapter", "values")
    with pytest.raises(ModelError, match="not the file that training wrote"):
        reload.check_adapter(tmp_path / "adapter", study.model, wanted.hyperparameters)


def test_more_layers_in_the_config_than_in_the_file(trained, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """What PEFT would begin anew in each loading adds nothing, for B is 0; it is refused all the same."""
    root, study, _, _, tokens = trained
    folder, h = tmp_path / "adapter", Hyperparameters(lora_r=4, lora_alpha=16, target_modules="qv")
    layers = chosen_layers(base(root), "qv")
    tensors = {f"base_model.model.{name}.lora_{s}.weight": torch.randn(shape) for name in layers for s, shape in _shapes(root, name)}
    lora.save_adapter(folder, lora.peft_config(base(root), h), tensors)
    reload.check_adapter(folder, study.model, h)
    before = loss(peft.PeftModel.from_pretrained(base(root), str(folder)), tokens)
    config_changed(folder, target_modules=["q_proj", "v_proj", "o_proj"])
    assert loss(peft.PeftModel.from_pretrained(base(root), str(folder)), tokens) == before
    with pytest.raises(ModelError, match=r"not in the file, so new in each loading: .*o_proj"):
        reload.check_adapter(folder, study.model, h)


def _shapes(root: Path, layer: str) -> list[tuple[str, tuple[int, int]]]:
    weight = base(root).get_submodule(layer).weight
    return [("A", (4, weight.shape[1])), ("B", (weight.shape[0], 4))]


@pytest.mark.parametrize("engine", ["packed", "hf"])
def test_the_written_config(tmp_path: Path, engine: str) -> None:
    """Nothing random, in a fixed order, and the base model by name and revision."""
    tiny_engine.build_model(tmp_path / "model", FAMILIES["llama"]())
    study = replace(recipe(tmp_path, dtype="float32"), engine=engine)
    study = replace(study, model=replace(study.model, revision="v2-chat"))
    wanted = segment(1, target_modules="all-linear")
    tiny_engine.run(load_engine(study, tmp_path), wanted)
    config = json.loads((StudyPaths(tmp_path).of(wanted).adapter / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    assert config["target_modules"] == sorted(config["target_modules"]) != []
    assert config["base_model_name_or_path"] == study.model.name_or_path
    assert config["revision"] == "v2-chat"
    assert config["inference_mode"] is True
    assert not config["target_parameters"]


def test_another_sum_is_no_merged_model(trained, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    root, study, wanted, _, _ = trained
    folder = tmp_path / "adapter"
    shutil.copytree(StudyPaths(root).of(wanted).adapter, folder)
    config_changed(folder, alpha_pattern={"q_proj": 99})
    with pytest.raises(ModelError, match=r"plain Transformers, merged.*by the adapter on its base model"):
        merge(study.model, folder, tmp_path / "merged", "card", data=root / "data")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_half_precision_is_compared_as_roughly_as_it_computes(tmp_path: Path) -> None:
    tiny_engine.build_model(tmp_path / "model", FAMILIES["llama"]())
    study = replace(recipe(tmp_path, dtype="bfloat16"), engine="packed")
    wanted = segment(6, learning_rate=0.03, target_modules="all-linear")
    outcome = tiny_engine.run(load_engine(study, tmp_path), wanted)
    given = {"data": tmp_path / "data", "recorded": outcome.validation_loss, "exact": False}
    reload.check_adapter(StudyPaths(tmp_path).of(wanted).adapter, study.model, wanted.hyperparameters, **given)
    with pytest.raises(ModelError, match="by the record"):
        reload.check_adapter(
            StudyPaths(tmp_path).of(wanted).adapter,
            study.model,
            wanted.hyperparameters,
            **{**given, "recorded": outcome.validation_loss + 0.5},
        )
