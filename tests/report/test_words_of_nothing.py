"""What was not measured is a dash, never "nan" or "nan %": every public function that makes words gets NaN, infinity, None and nothing."""

import inspect
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from report_evidence import compared
from report_studies import spread

from loratune import preference
from loratune.cli import trial_lines as cli_words
from loratune.downstream.results.findings import finding_lines
from loratune.downstream.results.scores import Result
from loratune.preference.analysis import PositionBias, Tally, summarise_judge, summarise_votes
from loratune.preference.summary_lines import rows_of, sentences, summary_text
from loratune.report.figures.post_search import votes
from loratune.selection.confidence import Gap
from loratune.selection.race import Race
from loratune.selection.rule import Candidate, choose
from loratune.statistics import Interval
from loratune.system import formatting

NAN = re.compile(r"\bnan\b|\binf\b", re.IGNORECASE)
NUMBERS = ["loss", "perplexity", "signed", "percent", "points", "measured", "duration", "count", "money", "price", "device_time", "show"]


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers(name: str) -> None:
    spell = getattr(formatting, name)
    for value in (math.nan, math.inf, -math.inf):
        assert not NAN.search(spell(value)), (name, value)
    assert spell(math.nan) == "–"
    if "None" in str(inspect.signature(spell)) or name == "show":
        assert spell(None) == "–"
    assert spell(0.5) != "–"


def test_every_function_of_numbers_is_tried() -> None:
    """A new one joins the list above."""
    numeric = [
        name
        for name, function in inspect.getmembers(formatting, inspect.isfunction)
        if not name.startswith("_") and any("float" in str(p.annotation) for p in inspect.signature(function).parameters.values())
    ]
    assert set(numeric) <= set(NUMBERS)


def test_lists_and_settings() -> None:
    assert formatting.show([math.nan, 1.0]) == "–, 1"
    assert formatting.show({"a": math.nan}) == "a –"
    assert not NAN.search(cli_words.params({"learning_rate": math.nan, "lora_r": 8}))


def test_intervals() -> None:
    unknown = Interval(math.nan, math.nan, math.nan, why="one value gives no estimate of noise")
    assert f"{unknown:.3f}" == "unknown (no interval: one value gives no estimate of noise)"
    assert f"{Interval(1.0, math.nan, math.nan):.1f}" == "1.0 (no interval)"
    assert not NAN.search(str(Gap(other="b", seeds=1, behind=Interval(0.1, math.nan, math.nan))))


def test_votes_of_nobody(study, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    found = preference.read_preferences(compared(study(spread(2)), {}))
    nothing = summarise_judge([], ["1", "2"])  # no reply of the judge could be read
    assert math.isnan(nothing.questions.win_rate)
    judged = replace(found, judges={"gpt": nothing})
    for text in (summary_text(judged), *sentences(judged), *sentences(found), summary_text(found)):
        assert not NAN.search(text), text
    assert [row.tally.total for row in rows_of(judged)] == [0]
    assert votes(judged) is None
    empty = summarise_votes([])
    assert (empty.votes, empty.alpha, empty.agreeing) == (Tally(), None, None)
    assert math.isnan(PositionBias(left=0, right=0).share)


@pytest.mark.parametrize("scores", [{}, {"1": 0.0}, {"1": 1.0, "2": 1.0}])
def test_scores_of_few_items(scores: dict[str, float]) -> None:
    facts = {"items": 2, "title": "T", "chance": None, "mean_over_groups": False}
    results = [
        Result(model=name, benchmark="t", facts=facts, scores=scores, groups=dict.fromkeys(scores, "")) for name in ("0001", "0000", "base")
    ]
    text = "\n".join(finding_lines([result for result in results if result.scores], {"0001": 1.0}, ["0001"], "0000", "0001"))
    assert not NAN.search(text), text


def test_races_and_choices_of_one() -> None:
    race = Race(["a", "b"], tolerance=0.0, budget=4, first=2)
    assert not NAN.search(race.explain())
    for name, repeat in race.next():
        race.tell(name, repeat, math.nan if name == "b" else 1.0)
    assert not NAN.search(race.explain())
    choice = choose([Candidate(name="a", losses=[1.0], measured={"adapter_mb": 1.0})], seed=0)
    assert not NAN.search("\n".join([*choice.why, *choice.what_would_change]))
