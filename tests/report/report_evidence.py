"""What is measured after a search, written to a study's folder by the rooms that own the files: no model is loaded."""

import random
from pathlib import Path

from loratune.downstream.results.scores import ResultWriter
from loratune.preference.analysis import Vote
from loratune.preference.answers import Generation
from loratune.preference.comparison import Comparison, settle
from loratune.preference.contestants import Contestant
from loratune.preference.questions import Question
from loratune.preference.votes import NAME, Votes
from loratune.record import StudyRecord
from loratune.selection.account import account, run_of
from loratune.selection.candidates import candidate_name, candidates, loss_of, ranked_trials, scores_of
from loratune.selection.finalists import Noise, finalists
from loratune.selection.race import Race
from loratune.selection.rerun import CHECK
from loratune.selection.rule import Rule, choose
from loratune.selection.selected import SelectionRecord, Shipped, UnbiasedLoss, write_selection
from loratune.statistics import student_mean
from loratune.system.jsonl import append_lines
from loratune.work import ModelRecipe

# The example worked by hand in tests/preference/test_preference_analysis.py: question -> verdict.
ANN = {"1": "first", "2": "first", "3": "first", "4": "second", "5": "tie", "6": "first"}
BOB = {"1": "first", "2": "first", "3": "second", "4": "second", "5": "neither", "6": "first"}
HOSTILE = '<script>alert("x")</script> & $\\alpha_$'


def evaluated(record: StudyRecord, benchmarks: dict[str, float], items: int = 40, top: int = 10) -> None:
    """Scores of the best, the default and the base model: the lower the loss the likelier an answer is right.

    benchmarks: name -> chance.
    """
    trials = ranked_trials(record)[:top]
    models = {f"{t.number:04d}": loss_of(t) for t in [*trials, *record.trials[:1]]} | {"base": 2.0}
    for benchmark, chance in benchmarks.items():
        rng = random.Random(benchmark)
        hard = [rng.random() for _ in range(items)]  # how easily an item is answered wrongly
        for model, loss in models.items():
            writer = ResultWriter(record.paths.evaluation, model, benchmark, {"version": 1, "seed": 0})
            writer.describe({"title": benchmark.upper(), "chance": chance, "items": items, "mean_over_groups": False})
            right = [h + rng.gauss(0, 0.15) < 1.3 - 0.6 * loss or rng.random() < chance for h in hard]
            writer.add([{"id": str(n), "group": "", "answer": "A", "score": float(r)} for n, r in enumerate(right)], seconds=1.0)


def selected(record: StudyRecord, noise: float = 0.004, seed: int = 0) -> SelectionRecord:
    """A selection whose repeats are the study's losses with Gaussian noise: a real race, choice and account."""
    rng = random.Random(seed)
    few = finalists([loss_of(t) for t in ranked_trials(record)], Noise(sd=noise, source="assumed until the first repeats tell"), most=6)
    trials = ranked_trials(record)[: max(3, len(few.chosen))]
    race = Race([candidate_name(t) for t in trials], tolerance=0.001, budget=3 * len(trials), first=2)
    by_name = {candidate_name(t): t for t in trials}
    luck: dict[int, float] = {}
    while asked := race.next():
        for name, repeat in asked:
            shared = luck.setdefault(repeat, rng.gauss(0, noise))
            race.tell(name, repeat, loss_of(by_name[name]) + shared + rng.gauss(noise / 2, noise))
    scores, rule = scores_of(record), Rule(priorities=("validation_loss", "adapter_mb"))
    losses = {t.number: race.losses[candidate_name(t)] for t in trials}
    choice = choose(candidates(trials, losses, scores), Rule(priorities=("validation_loss",)), seed=seed, resamples=200)
    chosen, default = by_name[choice.winner], record.trials[0]
    both = [(t, k, loss_of(t) + rng.gauss(noise / 2, noise)) for k in range(3) for t in (chosen, default)]
    runs = tuple(run_of(record, t, CHECK, k, loss) for t, k, loss in both)
    own, theirs = ([run.loss for run in runs if run.trial == t.number] for t in (chosen, default))
    made = account(
        record,
        trials,
        scores,
        rule=rule,
        choice=choice,
        chosen=chosen,
        excluded=0,
        race=race,
        field=str(few),
        assumed=few.noise,
        unbiased=UnbiasedLoss(
            runs=runs,
            chosen=student_mean(own),
            default=student_mean(theirs),
            gain=student_mean([d - o for d, o in zip(theirs, own, strict=True)]),
        ),
        shipped=Shipped(run="race-01", seed=7, validation_loss=min(own), lowest_of=4),
        outcomes=[],
        notes=("No downstream score took part: not every candidate has one.",),
    )
    write_selection(made, record.folder)
    return made


def compared(record: StudyRecord, votes: dict[str, dict[str, str]], second: str = "trial 0 (default)") -> Path:
    """A comparison of the tuned model with another, and what people said: rater -> question -> verdict."""
    folder = record.folder / "preference" / "trial-1-vs-trial-0"
    questions = tuple(Question(id=str(n), category=("writing", HOSTILE)[n % 2], instruction=f"Question {n}?") for n in range(1, 7))
    settle(
        Comparison(
            first=Contestant(label="trial 1 (tuned)", name="trial-1", adapter="/nowhere", weights="aa"),
            second=Contestant(label=second, name="trial-0", adapter="/nowhere", weights="bb"),
            model=ModelRecipe(name_or_path="some/model"),
            prompt="alpaca",
            questions=questions,
            generation=Generation(max_new_tokens=64),
        ),
        folder,
    )
    rows = [
        {"question": q.id, "side": side, "text": f"{side} says {q.id}", "tokens": 3, "ended": q.id != "4"}
        for side in ("first", "second")
        for q in questions
    ]
    append_lines(folder / "answers.jsonl", rows)
    with Votes(folder / NAME) as file:
        for rater, said in votes.items():
            for question, verdict in said.items():
                left = ("first", "second")[int(question) % 2]
                choice = {"tie": "tie", "neither": "neither", left: "left"}.get(verdict, "right")
                file.cast(Vote(rater=rater, question=question, left=left, choice=choice))
    return folder
