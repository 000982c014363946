"""What ships is what is scored: a selection may hand over a run with another seed, which `evaluate` then scores as a model of its own."""

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from loratune.cli import main
from loratune.delivery import export
from loratune.demo import study as demo_study
from loratune.downstream.results.scores import adapter_fingerprint, model_name, read_results
from loratune.errors import StorageError
from loratune.record import open_record, read
from loratune.record.adapters import find_adapter
from loratune.record.paths import StudyPaths
from loratune.report.evidence import gather
from loratune.selection import SelectionRecord, select, selected
from loratune.selection.candidates import scores_of
from loratune.selection.rerun import Rerun
from loratune.spec import StudySpec
from loratune.study.driver import deliver, tune
from loratune.study.evaluation import Scored, evaluate
from loratune.system.formatting import loss
from loratune.work import Message

ITEMS = 16


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Its `study` is finished, scored, selected from, and scored again. Copy it; do not write."""
    folder = tmp_path_factory.mktemp("shipped")
    flags = [
        ("output.folder", str(folder / "study")),
        ("data.train_count", "24"),
        ("data.validation_count", "16"),
        ("search_space.lora_r", "[4, 8]"),
        ("training.validations", "1"),
        ("sampler", "random"),
        ("budget.trials", "3"),
        ("executor.name", "inline"),
        ("executor.workers", "1"),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORATUNE_CACHE", str(folder / "cache"))
        list(tune(StudySpec.load(None, flags, demo_study())))
        (folder / "before.txt").write_text(scored(folder / "study").text)
        list(select(folder / "study", most=2))
        scored(folder / "study")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def study(home: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(home / "study", tmp_path / "study", copy_function=shutil.copy2))


def scored(folder: Path, notes: list[str] | None = None) -> Scored:
    last: Any = None
    for event in evaluate(folder, benchmarks=["demo_choice"], subset=ITEMS):
        last = event
        if isinstance(event, Message) and notes is not None:
            notes.append(event.text)
    assert isinstance(last, Scored)
    return last


def made(folder: Path) -> SelectionRecord:
    found = selected.read_selection(folder)
    assert found is not None
    return found


def ship(folder: Path, run: str) -> float:
    """A later selection that hands over another run of the chosen trial; its loss."""
    record, choice = read(folder), made(folder)
    trial = choice.trial_of(record)
    value = trial.value
    if run != "main":
        with open_record(folder) as held, Rerun(record, held.lock, threading.Event()) as trainer:
            training = trainer.train([(trial, run)], adapters=True)
            while True:
                try:
                    next(training)
                except StopIteration as end:
                    value = end.value[0]
                    break
    text = json.loads((folder / "selection.json").read_text())
    text["shipped"] |= {"run": run, "validation_loss": value}
    (folder / "selection.json").write_text(json.dumps(text))
    return float(value or 0.0)


def test_the_adapter_handed_over_is_scored_as_a_model_of_its_own(home: Path, study: Path) -> None:
    choice = made(study)
    assert choice.shipped.run != "main"  # else this study shows nothing; take another seed
    name = model_name(choice.chosen, choice.shipped.run)
    assert name == f"{choice.chosen:04d}-{choice.shipped.run}"
    adapter = deliver(study).adapter
    assert adapter is not None
    by_model = {result.model: result for result in read_results(StudyPaths(study).evaluation)}
    assert set(by_model) == {"0000", "0001", "0002", name, "base"}
    weights = "adapter_model.safetensors"
    source = find_adapter(read(study), choice.trial_of(read(study)), choice.shipped.run)
    assert source is not None
    assert (adapter / weights).read_bytes() == (source / weights).read_bytes()
    assert by_model[name].facts["adapter"] == adapter_fingerprint(source)
    assert by_model[name].facts["validation_loss"] == choice.shipped.validation_loss
    proof = json.loads((StudyPaths(study).evaluation / name / "proof.json").read_text())
    assert proof["loss"] == pytest.approx(choice.shipped.validation_loss, abs=1e-4)
    # What chooses are the study's own runs, as before.
    assert scores_of(read(study))[choice.chosen]["demo_choice"].model == f"{choice.chosen:04d}"
    # Said again, nothing is scored again, and the text says whose scores they are.
    notes: list[str] = []
    again = scored(study, notes)
    assert "Nothing to do: everything is already scored." in notes
    assert f"among them the one handed over, trial {choice.chosen} ({choice.shipped.run})," in notes[0]
    lines = again.text.splitlines()
    assert lines[2].split("  ")[1] == f"handed over, trial {choice.chosen} ({choice.shipped.run})"
    assert lines[2].split()[5] == f"{choice.shipped.validation_loss:.4f}"
    assert (
        f"Handed over is trial {choice.chosen} ({choice.shipped.run}), trained with another seed, scored as a model of its own."
        in again.text
    )
    assert "handed over" not in (home / "before.txt").read_text()
    assert again.shipped == name


def test_another_seed_is_scored_anew_and_the_own_run_not_twice(study: Path) -> None:
    choice = made(study)
    first = model_name(choice.chosen, choice.shipped.run)
    before = {r.model: r for r in read_results(StudyPaths(study).evaluation)}
    value = ship(study, "race-07")
    notes: list[str] = []
    last = scored(study, notes)
    assert "Nothing to do: everything is already scored." not in notes
    assert last.shipped == model_name(choice.chosen, "race-07")
    assert {r.model for r in last.results} == {"0000", "0001", "0002", last.shipped, "base"}
    after = {r.model: r for r in read_results(StudyPaths(study).evaluation)}
    assert set(after) == {*before, last.shipped}
    assert after[first].scores == before[first].scores
    assert after[last.shipped].facts["adapter"] != after[first].facts["adapter"]
    assert after[last.shipped].facts["validation_loss"] == value
    ship(study, "main")
    notes.clear()
    own = scored(study, notes)
    assert "Nothing to do: everything is already scored." in notes
    assert own.shipped == f"{choice.chosen:04d}"
    assert f"Handed over is the study's own run of trial {choice.chosen}." in own.text
    assert own.text.count(f"trial {choice.chosen}\n") == 0
    assert sum(line.strip().startswith("handed over, ") for line in own.text.splitlines()) == 1


@pytest.mark.slow  # draws the report
def test_status_report_and_card_say_whose_scores_they_show(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    choice, record = made(study), read(study)
    who = f"trial {choice.chosen} ({choice.shipped.run})"
    assert main(["status", str(study), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["shipped"] == {"trial": choice.chosen, "run": choice.shipped.run}
    values = {r.model: r.value for r in read_results(StudyPaths(study).evaluation)}
    assert told["scores"][0]["shipped"] == values[model_name(choice.chosen, choice.shipped.run)]
    assert main(["status", str(study)]) == 0
    out = capsys.readouterr().out
    assert f"handed over, {who}: Demo: choice {100 * values[model_name(choice.chosen, choice.shipped.run)]:.1f}" in out
    assert f"Handed over is {who}, trained with another seed, scored as a model of its own." in out
    card = (deliver(study).adapter / "README.md").read_text()  # type: ignore[operator]
    row = next(line for line in card.splitlines() if line.startswith("| **this adapter** | ") and "(" in line)
    assert row.split("|")[2].strip().startswith(f"{100 * values[model_name(choice.chosen, choice.shipped.run)]:.1f}")
    assert f"This is trial {choice.chosen}, trained again with seed {choice.shipped.seed} (`{choice.shipped.run}`)." in card
    assert f"| trial {choice.chosen} as the study trained it, another seed | " in card
    found = gather(record).downstream
    assert found is not None
    assert found.gaining == found.shipped
    assert found.losses[found.shipped or ""] == choice.shipped.validation_loss
    assert all(name.isdigit() for name, _, _ in found.points("demo_choice"))  # loss and score: of trials
    page = " ".join((study / "report.html").read_text().split())
    assert f"Handed over is {who}, trained with another seed, scored as a model of its own." in page
    assert f'<tr class="best"><th scope="row">{who}</th><td class="n">{loss(choice.shipped.validation_loss)}</td>' in page


@pytest.mark.slow  # draws the report
def test_before_it_is_scored_all_say_so(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    choice = made(study)
    shutil.rmtree(StudyPaths(study).evaluation / model_name(choice.chosen, choice.shipped.run))
    who = f"trial {choice.chosen} ({choice.shipped.run})"
    assert main(["status", str(study)]) == 0
    assert f"Handed over is {who}, trained with another seed, and not scored yet." in capsys.readouterr().out
    card = (deliver(study).adapter / "README.md").read_text()  # type: ignore[operator]
    assert "This adapter has not been scored itself; `loratune evaluate` does." in card
    assert f"Downstream scores of the adapter that is handed over, {who}." in (study / "report.html").read_text()
    assert main(["evaluate", str(study), "--benchmarks", "demo_choice", "--subset", str(ITEMS)]) == 0
    assert "not been scored itself" not in (study / "adapter" / "README.md").read_text()  # the card is written anew
    capsys.readouterr()
    assert main(["select", str(study), "--finalists", "2", "--yes"]) == 0
    assert f"`loratune evaluate {study}` scores this adapter." in capsys.readouterr().out


def test_an_export_is_the_adapter_it_tells_of(study: Path, tmp_path: Path) -> None:
    choice, record = made(study), read(study)
    trial = choice.trial_of(record)
    source = find_adapter(record, trial, choice.shipped.run)
    assert source is not None
    weights = "adapter_model.safetensors"
    chosen = export(study, tmp_path / "chosen")
    assert (chosen / weights).read_bytes() == (source / weights).read_bytes()
    assert f"| this adapter | {loss(choice.shipped.validation_loss)} |" in (chosen / "README.md").read_text()
    own = export(study, tmp_path / "own", trial=trial.number)
    assert (own / weights).read_bytes() != (source / weights).read_bytes()
    assert f"| this adapter | {loss(trial.value)} |" in (own / "README.md").read_text()
    merged = export(study, tmp_path / "merged", merged=True)
    card = (merged / "README.md").read_text()
    assert f"| this adapter | {loss(choice.shipped.validation_loss)} |" in card
    assert "AutoModelForCausalLM.from_pretrained" in card
    assert "AutoPeft" not in card
    shutil.rmtree(source)
    with pytest.raises(StorageError, match=rf"trial {trial.number} \({choice.shipped.run}\), is not on disk.*select.*trains it again"):
        export(study, tmp_path / "gone")
    notes: list[str] = []
    scored(study, notes)
    assert notes[0].startswith(f"Not on disk, so not scored: the adapter that is handed over, trial {choice.chosen}")


def test_best_yaml_says_which_run(study: Path) -> None:
    best = deliver(study).best
    assert best is not None
    told = yaml.safe_load(best.read_text())
    assert told["chosen"]["run"] == made(study).shipped.run
    assert told["chosen"]["how_sure"] == made(study).confidence
