"""What is measured after the search, in the report: the numbers are those of the files, and what is missing has its command."""

import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from report_evidence import ANN, HOSTILE, compared, evaluated, selected
from report_page import Page
from report_studies import Point, spread

from loratune import preference, selection
from loratune.downstream.results.scores import read_results
from loratune.errors import StorageError
from loratune.preference.analysis import Vote, summarise_judge
from loratune.preference.summary_lines import rows_of, sentences
from loratune.record import StudyRecord, read
from loratune.report import figures, tables
from loratune.report.evidence import gather
from loratune.report.figures.landscape import front
from loratune.report.figures.post_search import fresh_seeds, loss_and_score, race
from loratune.report.html import compose
from loratune.report.svg import inline, save_figure
from loratune.system.formatting import loss, percent, points, signed

Study = Callable[..., StudyRecord]
ORDER = [
    "Chosen against default",
    "The search",
    "Importance",
    "Downstream scores",
    "Finalists and noise",
    "The choice and its confidence",
    "Blind preference",
    "All trials",
    "Setup",
    "Cost",
    "Not measured",  # the scores of the adapter that is handed over, which another seed made
    "To reproduce it",
]


def page_of(*records: StudyRecord) -> Page:
    """The report without its figures, which take their time to draw."""
    return Page(compose([gather(record) for record in records], [{} for _ in records], {}))


def test_the_whole_story_in_its_order(story: Path) -> None:
    page = Page(story)
    assert [text for level, text in page.headings if level == 2] == ORDER
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [str(a["href"]).removeprefix("#") for a in page.named("a")]
    assert len(links) == len(ORDER)
    assert set(links) <= set(ids)
    names = {"history", "parallel-coordinates", "learning-curves", "importance", "slices", "fresh-seeds", "loss-and-score", "finalists"}
    names.add("preference-trial-1-vs-trial-0")
    assert {path.stem for path in (story.parent / "figures").iterdir()} == names
    texts = re.findall(r"<desc id=[^>]*>([^<]*)<", page.source)
    assert len(texts) == len(names)
    assert all(len(text) > 80 and re.search(r"\d", text) for text in texts), texts


def test_the_choice_is_the_selections(whole: StudyRecord, story: Path) -> None:
    page, made = Page(story), selection.read_selection(whole.folder)
    assert made is not None
    assert made.unbiased is not None
    assert made.unbiased.gain is not None
    assert made.race is not None
    gain = made.unbiased.gain
    assert f"Ship trial {made.chosen}. {made.confidence}" in page.text
    assert "% of resamples" not in page.text
    assert f"{loss(gain.value)} below the default’s (95 % interval {loss(gain.low)} to {loss(gain.high)})" in page.text
    assert page.row("Gain, paired by seed")[0] == f"{signed(gain.value)}{signed(gain.low)} to {signed(gain.high)}"
    runs = [loss(run.loss) for run in made.unbiased.runs if run.trial == made.chosen]
    assert page.row(f"Chosen, trial {made.chosen}")[1] == ", ".join(runs)
    for finalist in made.candidates:
        cells = next(row for row in page.rows if row[0] == f"trial {finalist.trial}" and len(row) == 8)
        assert " ".join(cells[1].split()) == f"{loss(finalist.loss)}{len(finalist.losses)} runs"
        gap = made.gap_to(finalist.trial)
        assert cells[2].strip().startswith(signed(gap.behind.value) if gap else "–")
        assert cells[3] == loss(finalist.study_loss)
    for line in (*made.why, *made.what_would_change, *made.race.explained):
        assert " ".join(line.split()) in page.text
    assert page.row("lora_r")[0] == str(made.trial_of(whole).params["lora_r"])


def test_the_ten_best_table(whole: StudyRecord, story: Path) -> None:
    page = Page(story)
    scores: dict[str, dict[str, float]] = {}
    for result in read_results(whole.paths.evaluation):
        scores.setdefault(result.benchmark, {})[result.model] = statistics.fmean(result.scores.values())
    ten = [f"{t.number:04d}" for t in sorted(whole.finished, key=lambda t: t.value or 0)[:10]]
    columns = [[own[name] for name in ten] for own in (scores["drop"], scores["mmlu"])]  # as read back: by name
    assert page.row("minimum")[1:] == [percent(min(c)) for c in columns]
    assert page.row("maximum")[1:] == [percent(max(c)) for c in columns]
    assert page.row("mean")[1:] == [percent(statistics.fmean(c)) for c in columns]
    assert page.row("standard deviation")[1:] == [percent(statistics.stdev(c)) for c in columns]
    assert page.row("base model")[1].startswith(percent(scores["drop"]["base"]))
    gap = scores["mmlu"][ten[0]] - scores["mmlu"]["0000"]
    assert page.row(f"trial {int(ten[0])} − default")[2].startswith(points(gap))
    assert "40 items,chance 25.0" in page.text
    assert "over 11 models" in page.text  # ten, and the default
    downstream = gather(whole).downstream
    assert downstream is not None
    for finding in downstream.findings:
        assert len(finding.sentences) > 2
        assert all(sentence in page.text for sentence in finding.sentences)


def test_the_votes_as_worked_by_hand(story: Path) -> None:
    page = Page(story)
    assert page.row("all votes") == ["66.739.1 to 86.2", "7", "3", "1", "1"]
    assert page.row("questions, net")[1:] == ["3", "1", "2", "0"]
    assert page.row("rater Ann")[1:] == ["4", "1", "1", "0"]
    assert "sign test p = 0.62, so that they cannot be told apart" in page.text
    assert "alpha 0.48" in page.text
    assert "Answers cut at 64 tokens: trial 1 (tuned) 1, trial 0 (default) 1." in page.text
    assert HOSTILE in "".join(page.texts)  # a category, as text
    assert page.source.count("<script") == 1  # ours


def test_a_judge_is_told_apart_from_people(study: Study) -> None:
    record = study(spread(2))
    found = preference.read_preferences(compared(record, {}))
    assert rows_of(found) == []
    assert sentences(found)[0] == "No person has voted yet."
    rounds = [Vote(rater="gpt", question=q, left=left, choice="left") for q in "12" for left in ("first", "second")]
    rounds += [Vote(rater="gpt", question="3", left=left, choice=choice) for left, choice in (("first", "left"), ("second", "right"))]
    judged = replace(found, judges={"gpt": summarise_judge(rounds, ["4"])})
    (row,) = rows_of(judged)
    assert (row.name, row.judge, row.tally.first, row.tally.ties) == ("judge gpt", True, 1, 2)
    told = " ".join(sentences(judged))
    assert "Judge gpt, each question in both orders: 1 for trial 1 (tuned), 0 for trial 0 (default); sign test p = 1, so that" in told
    assert "contradict each other on 2 (counted as ties), and 1 was left out as unreadable. The answer shown as A won 5 of 6" in told
    drawn = figures.post_search.votes(judged)
    assert drawn is not None
    assert "judge gpt: 67%" in drawn.alt
    assert "Blue: judged by a language model" in drawn.caption


def test_the_first_screen_says_what_to_ship(story: Path, study: Study) -> None:
    """Adapter, settings, gain over the default, over common practice and over no tuning, cost, confidence: before the contents."""
    first = story.read_text().partition("<nav")[0]
    for term in ("Adapter", "Settings", "Gain over the default", "Gain over common practice", "Gain over no tuning", "Cost", "Confidence"):
        assert f"<dt>{term}</dt>" in first
    assert "95&nbsp;% interval" in first
    assert "<svg" in first
    record = study(spread(3))
    usual = replace(record.trials[1].hyperparameters, lora_r=16, lora_alpha=32.0, learning_rate=2e-4)
    record = replace(record, trials=(record.trials[0], replace(record.trials[1], hyperparameters=usual), *record.trials[2:]))
    plain = compose([gather(record)], [{}], {}).partition("<nav")[0]
    assert "loratune select" in plain
    gain = tables.value(record.trials[1]) - tables.value(tables.headline(record).best)
    assert f"<dt>Gain over common practice</dt><dd>{signed(gain)} nats, one run each" in plain


def test_what_is_missing_has_its_command(study: Study, tmp_path: Path) -> None:
    record = study(spread(3), folder="it's mine")
    page = page_of(record)
    titles = [text for level, text in page.headings if level == 2]
    assert titles == ["Best against default", "All trials", "Setup", "Cost", "Not measured", "To reproduce it"]
    folder = "'" + str(record.folder).replace("'", "'\"'\"'") + "'"
    for command in (f"loratune evaluate {folder}", f"loratune select {folder}", f"loratune compare tuned default --study {folder}"):
        assert command in page.text
    assert page.text.count("loratune evaluate") == 1


def test_a_selection_of_an_earlier_state_is_not_shown(study: Study, tmp_path: Path) -> None:
    record = study(spread(6))
    made = selected(record)
    trial = json.loads((record.folder / "trials" / "0005" / "trial.json").read_text())
    (record.folder / "trials" / "0006").mkdir()
    (record.folder / "trials" / "0006" / "trial.json").write_text(json.dumps(trial | {"number": 6, "segments": 0}))
    page = page_of(read(record.folder))
    assert f"Ship trial {made.chosen}" not in page.text
    assert "the selection is of an earlier state of the study" in page.text
    assert "Finalists and noise" not in page.text


def test_a_selection_without_runs_and_without_default(study: Study, tmp_path: Path) -> None:
    record = study(spread(6))
    made = selected(record)
    bare = replace(made, race=None, unbiased=None, share=1.0, noise_source="assumed until the first repeats tell")
    selection.selected.write_selection(bare, record.folder)
    page = page_of(record)
    assert f"In the study its validation loss was {loss(made.finalist(made.chosen).study_loss)}" in page.text
    assert "Nothing was trained again for the choice" in page.text
    assert fresh_seeds(gather(record)) is None
    drawn = race(gather(record))
    assert drawn is not None
    assert drawn.title == "Candidates"


def test_a_gain_within_noise_is_called_that(study: Study, tmp_path: Path) -> None:
    record = study(spread(6))
    made = selected(record)
    assert made.unbiased is not None
    assert made.unbiased.gain is not None
    doubtful = replace(made.unbiased.gain, value=0.002, low=-0.001, high=0.005)
    selection.selected.write_selection(replace(made, unbiased=replace(made.unbiased, gain=doubtful)), record.folder)
    page = page_of(record)
    assert "which noise does not tell from the default’s (gain +0.0020, 95 % interval −0.0010 to +0.0050)" in page.text


def test_scores_of_few_models_and_an_unknown_chance(study: Study, tmp_path: Path) -> None:
    record = study(spread(4))
    evaluated(record, {"mine": 0.5}, items=8, top=1)
    for facts in record.paths.evaluation.glob("*/mine.json"):
        facts.write_text(json.dumps(json.loads(facts.read_text()) | {"chance": None, "items": 9}))
    page = page_of(record)
    assert "8 items,chance unknown" in page.text
    assert "of 8 so far" in page.text
    assert "The 2 best by validation loss" in page.text
    assert loss_and_score(gather(record)) is None
    assert "nan" not in re.sub(r"<svg.*?</svg>", "", page.source, flags=re.S)


def test_a_damaged_file_is_one_clear_error(study: Study, tmp_path: Path) -> None:
    record = study(spread(2))
    (record.folder / "selection.json").write_text("{")
    with pytest.raises(StorageError, match=r"selection\.json"):
        page_of(record)


@pytest.mark.parametrize("others", [("adapter_mb",), ("adapter_mb", "tokens")])
def test_the_front_of_several_objectives(study: Study, tmp_path: Path, others: tuple[str, ...]) -> None:
    made = [Point(params=p.params, value=1.0 + k / 100) for k, p in enumerate(spread(8))]
    record = study(made, objectives=["validation_loss", *others], constraints=["adapter_mb <= 400"])
    sizes = [64.0, 80.0, 32.0, 40.0, 32.0, 16.0, 90.0, 91.0]  # 0, 2 and 5 are on the front
    for trial, size in zip(record.trials, sizes, strict=True):
        path = record.folder / "trials" / f"{trial.number:04d}" / "trial.json"
        values = [trial.value, size, 1000.0][: 1 + len(others)]
        path.write_text(json.dumps(json.loads(path.read_text()) | {"values": values}))
    record = read(record.folder)
    plot = front(record)
    assert plot is not None
    drawn = inline(plot, save_figure(plot, tmp_path / "front"), "figure-front", [""])  # each trial in each panel
    assert sorted(re.findall(r' data-trial="(\d+)"', drawn.html)) == sorted(str(number) for number in range(8) for _ in others)
    page = Page(compose([gather(record)], [{"front": drawn}], {}))
    assert [row[:3] for row in page.rows if row[0].startswith("trial ")] == [
        ["trial 0", "1.0000", "64"],
        ["trial 2", "1.0200", "32"],
        ["trial 5", "1.0500", "16"],
    ]
    assert "3 of 8 trials are on the front" in plot.caption
    assert ("staircase" in plot.alt) == (len(others) == 1)
    assert "trial 5 with validation loss 1.05, adapter size in MB 16" in plot.alt
    assert "validation loss; adapter size in MB" in page.text
    assert "adapter_mb <= 400" in page.text


def test_several_studies_with_and_without_a_selection(whole: StudyRecord, study: Study, tmp_path: Path) -> None:
    plain = study(spread(3), name="plain")
    compared(plain, {"Ann": ANN}, second="base model")
    page = page_of(whole, plain)
    made = selection.read_selection(whole.folder)
    assert made is not None
    rows = [row for row in page.rows if row[0] in ("whole", "plain") and len(row) == 9]
    assert made.nearest is not None
    assert rows[0][4].strip() == f"trial {made.chosen}"
    assert rows[0][5].strip().startswith(signed(made.nearest.behind.value))
    assert [cell.strip() for cell in rows[1][4:]] == ["–"] * 5
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_the_report_needs_no_torch() -> None:
    code = "import sys, loratune.report.html; print({'torch', 'transformers', 'optuna'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
