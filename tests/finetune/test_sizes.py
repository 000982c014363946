"""The size of an adapter, told before training, is the size that training has."""

from pathlib import Path

import pytest
import transformers
from torch import nn

from loratune import demo
from loratune.errors import ModelError
from loratune.finetune.lora import adapter_parameters, attach
from loratune.finetune.sizes import adapter_sizes
from loratune.work import Hyperparameters, ModelRecipe


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose layers are Conv1D, with q, k and v in one."""
    folder = tmp_path_factory.mktemp("gpt2")
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=12, n_layer=2, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("wanted", ["qv", "qkvo", "mlp", "all-linear"])
def test_it_is_what_peft_trains(wanted: str, gpt2: Path) -> None:
    for folder in (demo.model_folder(), gpt2):
        told = adapter_sizes(ModelRecipe(name_or_path=str(folder)))
        h = Hyperparameters(lora_r=3, target_modules=wanted)
        model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(folder)
        wrapped, _ = attach(model, h, seed=0)  # type: ignore[arg-type]
        assert told(h) == sum(p.numel() for p in adapter_parameters(wrapped).values())


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no linear layers for 'q_prj'.*did you mean 'q_proj'"):
        adapter_sizes(ModelRecipe(name_or_path=str(demo.model_folder())))(Hyperparameters(target_modules=("q_prj",)))
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        adapter_sizes(ModelRecipe(name_or_path=str(tmp_path)))
