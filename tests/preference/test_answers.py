"""Generation with the demo's real model and a real PEFT adapter, and the command around it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from loratune.cli import main
from loratune.demo import model_folder
from loratune.errors import DataError, ModelError, StorageError
from loratune.preference import answers as module
from loratune.preference.answers import Generation, read_answers, write_answers
from loratune.preference.comparison import Comparison, settle
from loratune.preference.contestants import Contestant, contestant_of
from loratune.preference.questions import Question, demo_questions
from loratune.work import ModelRecipe


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the demo's model whose weights are large enough to change what it says."""
    import peft
    import transformers

    folder = tmp_path_factory.mktemp("adapter") / "strong"
    transformers.set_seed(1)
    base = transformers.AutoModelForCausalLM.from_pretrained(model_folder())
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    peft.get_peft_model(base, config).save_pretrained(str(folder))
    config_file = folder / "adapter_config.json"
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {"base_model_name_or_path": str(model_folder())}))
    return folder


def comparison(adapter: Path, questions: tuple[Question, ...] = demo_questions()[:5], **options: object) -> Comparison:
    return Comparison(
        first=contestant_of(str(adapter), None),
        second=Contestant(label="base model", name="base", adapter=None),
        model=ModelRecipe(name_or_path=str(model_folder())),
        prompt="alpaca",
        questions=questions,
        generation=Generation(**({"max_new_tokens": 12, "batch_size": 2} | options)),  # type: ignore[arg-type]
    )


def generated(adapter: Path, folder: Path, **options: object) -> dict[tuple[str, str], str]:
    asked = comparison(adapter, **options)
    settle(asked, folder)
    write_answers(asked, folder, tell=lambda _: None)
    return {place: answer.text for place, answer in read_answers(folder).items()}


def test_each_model_says_what_transformers_and_peft_say(adapter: Path, tmp_path: Path) -> None:
    import peft
    import transformers

    from loratune.data.prompts import alpaca_prompt

    said = generated(adapter, tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder())
    base = transformers.AutoModelForCausalLM.from_pretrained(model_folder())
    networks = {"second": base, "first": peft.PeftModel.from_pretrained(base, str(adapter))}
    expected = {}
    for side in ("first", "second"):
        network = networks[side] if side == "first" else networks["first"].unload()
        for q in demo_questions()[:5]:
            inputs = tokenizer(alpaca_prompt(q.instruction, q.input), return_tensors="pt", return_token_type_ids=False)
            out = network.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=0)  # one at a time, no padding
            expected[side, q.id] = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert said == expected
    assert any(said["first", q.id] != said["second", q.id] for q in demo_questions()[:5])


def test_resumed_after_a_torn_line_with_the_same_answers(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = generated(adapter, tmp_path, temperature=1.0, seed=4)
    file = tmp_path / "answers.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:7]) + lines[7][:15])
    assert len(read_answers(tmp_path)) == 7
    told: list[str] = []
    write_answers(comparison(adapter, temperature=1.0, seed=4), tmp_path, tell=told.append)
    assert {place: answer.text for place, answer in read_answers(tmp_path).items()} == whole
    assert told[-1] == "  10 of 10 answers"
    monkeypatch.setattr(module, "_speaking", None)  # nothing is loaded when all is there
    write_answers(comparison(adapter, temperature=1.0, seed=4), tmp_path)
    with pytest.raises(StorageError, match=r"holds another comparison:\n  generation: .*now"):
        settle(comparison(adapter, temperature=0.5, seed=4), tmp_path)


def test_what_cannot_be_answered(adapter: Path, tmp_path: Path) -> None:
    long = (Question(id="long", instruction="word " * 3000),)
    with pytest.raises(DataError, match=r"question long is \d+ tokens long, and the model's context is \d+"):
        write_answers(comparison(adapter, long), tmp_path)
    broken = json.loads((adapter / "adapter_config.json").read_text()) | {"r": 9}
    other = tmp_path / "other"
    other.mkdir()
    (other / "adapter_config.json").write_text(json.dumps(broken))
    (other / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes())
    with pytest.raises(ModelError, match="does not fit the base model"):
        write_answers(comparison(other), tmp_path)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*argv: object) -> tuple[int, str, str]:
        code = main(["compare", *map(str, argv)])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def test_the_command_without_a_page(adapter: Path, tmp_path: Path, command: Callable[..., tuple[int, str, str]]) -> None:
    questions = tmp_path / "q.txt"
    questions.write_text("What is 1 + 1?\nName a colour.\n")
    code, out, err = command(adapter, "base", "--questions", questions, "--out", tmp_path / "o", "--no-page", "--max-new-tokens", 5)
    assert code == 0, err
    assert "strong against base model, 2 questions" in out.replace(str(adapter.parent) + "/", "")
    assert "No person has voted yet." in out


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["base", "base", "--model", "m"], 2, "the same model"),
        (["base", "ADAPTER", "--model", "some/model"], 3, "give --questions"),
        (["base", "ADAPTER", "--questions", "absent.txt"], 3, "cannot read the questions absent.txt"),
        (["base", "ADAPTER", "--host", "0.0.0.0"], 1, "Add --token"),
        (["base", "ADAPTER", "--questions", "q.txt", "--token", "short"], 2, "at least 8"),
        (["base", "ADAPTER", "--judge", "http://x/v1"], 2, "--judge-model"),
        (["base", "ADAPTER", "--max-new-tokens", "0"], 2, "needed: a whole number >= 1"),
        (["base", "ADAPTER", "--questons", "x"], 2, "did you mean --questions?"),
        (["tuned", "default"], 5, "name the study's folder with --study"),
        (["tuned", "default", "--study", "absent"], 5, "not a study's folder"),
    ],
)
def test_mistakes_on_the_command_line(
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: Callable[..., tuple[int, str, str]],
    arguments: list[str],
    code: int,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "q.txt").write_text("Why?")
    given, out, err = command(*[str(adapter) if word == "ADAPTER" else word for word in arguments])
    assert (given, said in err) == (code, True), err
    assert out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["q.txt"]  # nothing was begun
