"""What a study leaves on disk, and which error it ends with."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml

from loratune import demo
from loratune.errors import DataError, ModelError, NotPackableError, TrainingError, error_kind, error_of
from loratune.executors import devices
from loratune.executors.devices import seen_as
from loratune.record import COMPLETE, DIVERGED, INFEASIBLE, PRUNED, Trial, read
from loratune.report.spec_summary import spec_rows
from loratune.spec import StudySpec
from loratune.study.cleanup import remove_unneeded
from loratune.study.driver import tune
from loratune.work import Hyperparameters, Message

TRIALS = [  # state, loss, size
    (COMPLETE, 2.0, 5.0),
    (COMPLETE, 1.0, 9.0),  # the best
    (COMPLETE, 1.5, 9.5),  # beaten in both
    (COMPLETE, 3.0, 1.0),  # on the front: the smallest
    (INFEASIBLE, 0.5, 9.0),
    (PRUNED, 4.0, 2.0),
    (DIVERGED, 9.0, 9.0),
]


@pytest.mark.parametrize(
    ("objectives", "keep", "left"),
    [
        (["validation_loss", "adapter_mb"], 1, {0, 1, 3, 5}),
        (["validation_loss"], 1, {0, 1, 5}),
        (["validation_loss"], 2, {0, 1, 2, 5}),
        (["validation_loss"], None, {0, 1, 2, 3, 4, 5}),
    ],
)
def test_the_adapters_of_the_best_and_of_the_front_are_kept(
    objectives: list[str], keep: int | None, left: set[int], tmp_path: Path
) -> None:
    given: dict[str, Any] = {"model": "m", "data": {"train": ["d"], "validation_fraction": 0.1}, "objectives": objectives}
    spec = StudySpec.load(base={**given, "output": {"folder": str(tmp_path), "keep_adapters": keep}})
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(yaml.safe_load(spec.to_yaml())))
    for number, (state, *values) in enumerate(TRIALS):
        own = tmp_path / "trials" / f"{number:04d}"
        (own / "budget-1-3" / "adapter").mkdir(parents=True)
        if state != DIVERGED:
            (own / "main" / "adapter").mkdir(parents=True)
        (own / "budget-1-3" / "checkpoint-7").write_text("")
        told = Trial(
            number=number,
            hyperparameters=Hyperparameters(),
            params={},
            state=state,
            value=values[0],
            values=tuple(values[: len(objectives)]),
        )
        (own / "trial.json").write_text(told.to_json())
    remove_unneeded(spec, tmp_path)
    assert {int(path.parts[-3]) for path in tmp_path.glob("trials/*/main/adapter")} == left
    for what in ("checkpoint-7", "adapter"):
        kept = {int(path.parts[-3]) for path in tmp_path.glob(f"trials/*/budget-1-3/{what}")}
        assert kept == {5}, "what a schedule stopped may go on, with a larger budget"


def test_a_device_is_named_as_this_process_sees_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert seen_as(3) == "cuda:3"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, 3")
    assert seen_as(3) == "cuda:1"


def _study(folder: Path, config: transformers.PretrainedConfig, **training: Any) -> StudySpec:
    """A study of one trial on a random model of that config, with the demo's tokenizer and data."""
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    transformers.AutoTokenizer.from_pretrained(demo.model_folder()).save_pretrained(folder / "model")
    data = {"train": [str(demo.data_files()[0])], "train_count": 12, "validation_count": 4, "max_length": 96}
    return StudySpec.load(
        base={
            "model": str(folder / "model"),
            "data": data,
            "training": {"batch_size": 6, "epochs": 1, **training},
            "search_space": {"lora_r": [2, 4]},
            "sampler": "random",
            "executor": "inline",
            "budget": {"trials": 1},
            "output": {"folder": str(folder / "study")},
        }
    )


def test_what_no_trial_can_train_is_one_error_before_the_first(tmp_path: Path) -> None:
    vocabulary = len(transformers.AutoTokenizer.from_pretrained(demo.model_folder()))
    shape = {"hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "word_embed_proj_dim": 16}
    config = transformers.OPTConfig(vocab_size=vocabulary, max_position_embeddings=20, **shape)
    spec = _study(tmp_path, config, target_modules=["q_proj", "w2"])
    with pytest.raises(ModelError, match=r"(?s)no linear layers for 'w2'.*20 positions.*embed_positions.*max_length to 20"):
        list(tune(spec))
    assert not (tmp_path / "study" / "trials").exists()


def test_layers_without_an_adapter_are_told_once_in_a_study(tmp_path: Path) -> None:
    vocabulary = len(transformers.AutoTokenizer.from_pretrained(demo.model_folder()))
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.MixtralConfig(vocab_size=vocabulary, num_local_experts=2, **shape)
    spec = _study(tmp_path, config, target_modules="all-linear")
    told = [event.text for event in tune(spec) if isinstance(event, Message) and "the experts, " in event.text]
    assert len(told) == 1
    assert told[0] in dict(spec_rows(read(tmp_path / "study")))["Notes"]
    assert not [event for event in tune(spec) if isinstance(event, Message) and "the experts, " in event.text]


def test_training_on_the_cpu_beside_a_gpu_is_told_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_signs", lambda: ["/dev/nvidia0"])
    monkeypatch.setattr(devices, "_ask", lambda: devices._Seen(count=0, hip=False, why="the driver is too old"))
    monkeypatch.setenv("LORATUNE_CACHE", str(tmp_path / "cache"))
    given = demo.study()
    given["data"] |= {"train_count": 8, "validation_count": 4}
    events = tune(StudySpec.load(base=given | {"output": {"folder": str(tmp_path / "study")}}))
    first = next(events)
    events.close()
    assert isinstance(first, Message)
    assert first.text.startswith("warning: this machine has a GPU (/dev/nvidia0), but trials train on the CPU: the driver is too old.")


def test_bad_input_keeps_its_kind_across_a_border() -> None:
    for error in (ModelError("m"), DataError("d"), NotPackableError("n")):
        found = error_of(error_kind(error), str(error))
        assert (found.exit_code, str(found)) == (error.exit_code, str(error))
    assert error_kind(ValueError()) == ""
    assert type(error_of("", "x")) is TrainingError


@pytest.mark.parametrize("engine", ["packed", "hf"])
def test_absent_layers_are_a_mistake_of_the_model(engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORATUNE_CACHE", str(tmp_path / "cache"))
    given = demo.study()
    given["data"] |= {"train_count": 8, "validation_count": 4}
    given |= {"executor": "inline", "output": {"folder": str(tmp_path / "study")}, "search_space": {"lora_r": [1, 2]}}
    given["training"] |= {"target_modules": ["no_such_layer"], "engine": engine}
    with pytest.raises(ModelError, match="no_such_layer") as caught:
        list(tune(StudySpec.load(base=given)))
    assert caught.value.exit_code == 4


def test_a_model_with_an_adapter_is_refused_before_the_data_are_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORATUNE_CACHE", str(tmp_path / "cache"))
    shutil.copytree(demo.model_folder(), tmp_path / "mixed")
    (tmp_path / "mixed" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    given = demo.study()
    given |= {"model": {"name_or_path": str(tmp_path / "mixed")}, "output": {"folder": str(tmp_path / "study")}}
    with pytest.raises(ModelError, match="holds a model AND an adapter"):
        list(tune(StudySpec.load(base=given)))
    assert not (tmp_path / "cache").exists()
