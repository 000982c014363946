"""What card, report and recipes say of a trial is what it was trained with; a gain names what it is over, unbiased where measured."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from report_evidence import selected
from report_studies import DEFAULT, Point, spec_of, spread, write_study
from tiny_tokenizer import build

from loratune import demo
from loratune.cli import main
from loratune.data.prompts import alpaca_chat_template, alpaca_prompt, choose_prompt
from loratune.data.sources import Example, Exchange
from loratune.data.tokenizers import load_tokenizer
from loratune.delivery.model_card import model_card
from loratune.delivery.recipes.writing import export_recipe
from loratune.record import PRUNED, StudyRecord, read
from loratune.report import tables
from loratune.report.evidence import gather
from loratune.report.html import compose

ANSWERS = "Below is a cat.", "It has two ears.", "Nothing at all."


def page_of(record: StudyRecord) -> str:
    """The report without its figures."""
    return compose([gather(record)], [{}], {})


def table_of(card: str, title: str) -> dict[str, str]:
    part = card.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("| ") and "---" not in line]
    return {row[0].strip("`"): row[1] for row in rows if len(row) > 1}


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of messages, run by relative paths, whose trials all differ from the description's batch size and layers."""
    home = tmp_path_factory.mktemp("real")
    (home / "model").symlink_to(demo.model_folder())
    talks = [
        [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"{ANSWERS[n % 3]} {n}"}] * (1 + n % 2)
        for n in range(12)
    ]
    (home / "talks.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    study = {
        "model": "./model",
        "data": {"train": ["talks.jsonl"], "validation_count": 4, "max_length": 128, "prompt": "alpaca"},
        "training": {"epochs": 1, "warmup_ratio": 0.5},
        "search_space": {
            "lora_r": [2, 4],
            "batch_size": [4, 8],
            "target_modules": {"choices": ["mlp", "all-linear"]},
            "warmup_ratio": 0.25,
        },
        "sampler": "random",
        "executor": "inline",
        "budget": {"trials": 2},
        "output": {"folder": "runs/study"},
    }
    (home / "study.yaml").write_text(yaml.safe_dump(study))
    with pytest.MonkeyPatch.context() as here:
        here.setenv("LORATUNE_CACHE", str(home / "cache"))
        here.chdir(home)
        assert main(["run", "study.yaml"]) == 0
    return home


@pytest.mark.slow
def test_every_place_shows_the_trials_own_training_settings(real: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(real)
    record = read("runs/study")
    assert record.best is not None
    h = record.best.hyperparameters
    assert record.spec["training"]["batch_size"] not in (4, 8)
    for told in ((real / "runs/study/adapter/README.md").read_text(), model_card(record, record.trials[1])):
        training, own = table_of(told, "Data")["Training"], table_of(told, "Hyperparameters")
        for name, word in (("batch_size", "batch size"), ("target_modules", "target modules"), ("warmup_ratio", "warmup ratio")):
            assert f"{word} {own[name]}," in training
    page = page_of(record)
    assert f"<dt>Training of trial {record.best.number}</dt><dd>epochs 1, batch size {h.batch_size}, " in page
    assert f"warmup ratio 0.25, weight decay 0, target modules {h.target_modules}, " in page
    assert "batch size 128" not in page


@pytest.mark.slow
def test_files_of_an_export_have_the_umasks_mode_and_only_its_lines_are_told(
    real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(real)
    before = os.umask(0o027)
    try:
        assert main(["export", "runs/study", str(tmp_path / "merged"), "--merged", "--json"]) == 0
    finally:
        os.umask(before)
    out, err = capfd.readouterr()
    told, files = json.loads(out), [path for path in (tmp_path / "merged").rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o640}
    best = read("runs/study").best
    assert best is not None
    assert (told["trial"], told["run"], told["bytes"]) == (best.number, "main", sum(path.stat().st_size for path in files))
    assert "%|" not in err
    assert "Writing" not in err


@pytest.mark.slow
def test_a_trl_file_shows_and_scores_messages_as_the_study_did(real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From another folder than the search's: absolute paths, and the text by the template beside."""
    monkeypatch.chdir(tmp_path)
    path, notes = export_recipe(real / "runs/study", Path("out/sft.yaml"), "trl")
    written = yaml.safe_load(path.read_text())
    assert written["model_name_or_path"] == str(real / "model")
    assert written["datasets"] == [{"path": "json", "data_files": str(real / "talks.jsonl")}]
    assert written["assistant_only_loss"] is True
    assert Path(written["chat_template_path"]) == tmp_path / "out/sft.jinja"
    assert notes[0].startswith("sft.jinja shows messages as the study did, by the prompt alpaca")
    tokenizer = load_tokenizer(str(demo.model_folder()))
    example = Example(exchanges=(Exchange("Say 1.", "", "It has two ears."), Exchange("Say 2.", "", "Two.")), system="Be brief.")
    tokenizer.chat_template = (tmp_path / "out/sft.jinja").read_text()
    shown = tokenizer.apply_chat_template(messages_of(example), tokenize=False)
    asked = [alpaca_prompt("Say 1.", "", "Be brief."), "\n\n### Instruction:\nSay 2.\n\n### Response:"]
    assert shown == f"{tokenizer.bos_token}{asked[0]}It has two ears.</s>{asked[1]}Two.</s>"


@pytest.mark.parametrize("bos", [True, False])
def test_the_tagged_template_masks_as_the_prompt_does(tmp_path: Path, bos: bool) -> None:
    """By Transformers' own rendering, on a tokenizer that joins no text across an answer's start."""
    tokenizer = load_tokenizer(str(build(tmp_path / "t", bos=bos)))
    prompt, template = choose_prompt(tokenizer, "alpaca"), alpaca_chat_template(tokenizer, tagged=True)
    assert template.replace("{% generation %}", "").replace("{% endgeneration %}", "") == alpaca_chat_template(tokenizer)
    tokenizer.chat_template = template
    for system in ("", "Be brief."):
        example = Example(exchanges=(Exchange("Say 1.", "", "It has two ears."), Exchange("Say 2.", "", "Two.")), system=system)
        ours = prompt.encode(example, max_length=512)
        assert ours is not None
        theirs = tokenizer.apply_chat_template(messages_of(example), return_dict=True, return_assistant_tokens_mask=True)
        assert theirs["input_ids"] == ours.input_ids
        assert [bool(one) for one in theirs["assistant_masks"]] == ours.response_mask


def messages_of(example: Example) -> list[dict[str, str]]:
    said = [{"role": "system", "content": example.system}] if example.system else []
    for one in example.exchanges:
        said += [{"role": "user", "content": one.instruction}, {"role": "assistant", "content": one.response}]
    return said


@pytest.mark.slow
@pytest.mark.parametrize("form", ["axolotl", "llamafactory", "peft"])
def test_other_recipes_have_absolute_paths_and_read_messages(
    real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path, _ = export_recipe(real / "runs/study", Path("a.yml"), form)
    written = yaml.safe_load(path.read_text())
    assert str(real / "model") in written.values()
    if form == "axolotl":
        assert written["datasets"][0]["path"] == str(real / "talks.jsonl")
        assert (written["datasets"][0]["type"], written["chat_template"]) == ("chat_template", "jinja")
        assert "### Response:" in written["chat_template_jinja"]
    if form == "llamafactory":
        assert written["dataset_dir"] == str(tmp_path)
        info = json.loads((tmp_path / "dataset_info.json").read_text())["talks"]
        assert (info["file_name"], info["formatting"], info["columns"]) == (str(real / "talks.jsonl"), "sharegpt", {"messages": "messages"})


def test_rows_that_trl_does_not_read_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "Say one.", "completion": "One."}) + "\n")
    (tmp_path / "old.jsonl").write_text(json.dumps({"instruction": "Say one.", "output": "One."}) + "\n")
    for name, wanted in (("pairs", 1), ("old", 2)):
        write_study(
            tmp_path / name, [Point(DEFAULT, 1.2)], spec_of(data={"train": [{"path": f"{name}.jsonl"}], "validation_fraction": 0.2})
        )
        path, notes = export_recipe(tmp_path / name, tmp_path / f"{name}.yml", "trl")
        assert yaml.safe_load(path.read_text())["completion_only_loss"] is True
        assert yaml.safe_load(path.read_text())["model_name_or_path"] == "meta-llama/Llama-2-7b-hf", "a hub id stays"
        assert len([note for note in notes if "as they stand" in note or "reads no rows of the format alpaca" in note]) == wanted


# ---- what a gain is over ----


def begun_short(record: StudyRecord, first: int) -> StudyRecord:
    """The study as after short runs: those before trial `first` are short."""
    return replace(record, trials=tuple(replace(t, length=0.04, state=PRUNED) if t.number < first else t for t in record.trials))


def test_the_unbiased_gain_comes_first_and_by_what_it_is_over(study: Callable[..., StudyRecord]) -> None:
    record = begun_short(study(spread(9)), 3)
    default = record.default
    assert default is not None
    made = selected(replace(record, trials=record.trials[3:]))  # which takes the first trial that it has for the default
    assert made.unbiased is not None
    assert made.unbiased.gain is not None
    card = model_card(record, made.trial_of(record), made)
    gain = made.unbiased.gain
    of = "the first full run of the search, trial 3"
    first, second = (
        card.index(f"| **gain over {of}** | **+{gain.value:.4f}** | +{gain.low:.4f} to +{gain.high:.4f} |"),
        card.index("| this adapter"),
    )
    assert first < second
    assert "found by loratune, chosen from 9 trials (6 trained to the end, 3 short)." in card
    assert "measured once" not in card
    assert "configurations" not in card
    assert "| default" not in card
    page = page_of(record)
    assert f"Gain over {of}" in page
    assert f"below that of {of}" in page
    assert "over the default" not in page
    assert f"gains are told over {of}" in page


def test_the_default_keeps_its_name_where_it_was_run(study: Callable[..., StudyRecord]) -> None:
    record = study(spread(4))
    assert tables.reference(record) == "default"
    again = study([*spread(3)[1:], Point(DEFAULT, 1.3)], name="later")
    assert tables.reference(begun_short(again, 2)) == "default"
    assert tables.reference(begun_short(again, 1)) == "first full run"
    assert record.best is not None
    assert "The loss of each adapter was measured once." in model_card(record, record.best)


def test_a_recipes_head_tells_the_unbiased_loss(study: Callable[..., StudyRecord], tmp_path: Path) -> None:
    record = study(spread(9))
    made = selected(record)
    assert made.unbiased is not None
    path, _ = export_recipe(record.folder, tmp_path / "a.yml", "axolotl")
    head = path.read_text().splitlines()[0]
    assert f"validation loss {made.unbiased.chosen:.4f} with 3 fresh seeds; gain {made.unbiased.gain:.4f} over the default" in head
