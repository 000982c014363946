"""Metrics of the user's own: described, found, tried, measured in a real study of the embedded model, and noticed when they change."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from loratune.cli import main
from loratune.data.prepared import Prepared
from loratune.data.reference_answers import file_questions, tokenizer_of, validation_questions
from loratune.downstream import search_scoring
from loratune.downstream.metric_functions import OwnMetrics, answer_set, fingerprint, functions_of
from loratune.downstream.tasks.generated import AnswerSet, GeneratedAnswers
from loratune.errors import EvaluationError, SpecError, StorageError
from loratune.plugs import METRICS
from loratune.record import COMPLETE, INFEASIBLE, read
from loratune.selection.candidates import allowed, candidates, rule_of
from loratune.selection.rule import choose
from loratune.spec import StudySpec
from loratune.spec.own_metrics import OwnMetric
from loratune.study.driver import tune

MODULE = '''
"""What a user writes."""

ALLOWED = 3


def exact_match(records):
    return sum(close(r["answer"], r["reference"]) for r in records) / len(records)


def close(a, b):
    return a.split()[:1] == b.split()[:1]


def words(records):
    assert all(set(r) == {"prompt", "reference", "answer"} for r in records)
    return sum(len(r["answer"].split()) for r in records) / len(records)


def broken(records):
    return 1 / sum(r["answer"] == r["reference"] for r in records)


def nothing(records):
    return None


def over(records):
    return float("nan")
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """The name of a module of a name of its own, in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # it is rewritten within a second
    name = f"mine_{abs(hash(request.node.name))}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    return name


def described(metrics: Any, **more: Any) -> StudySpec:
    return StudySpec.load(base={"model": "m", "data": {"train": ["d.json"], "validation_fraction": 0.1}, "metrics": metrics, **more})


def rate(records: list[dict[str, str]]) -> float:
    return float(len(records))


def test_how_a_metric_may_be_written() -> None:
    assert described("mine:rate").metrics == described(["mine:rate"]).metrics == described({"function": "mine:rate"}).metrics
    (metric,) = described("a/mine.py:rate").metrics
    assert (metric.name, metric.direction, metric.examples, metric.max_new_tokens, metric.data) == ("rate", "maximize", 200, 128, None)
    (metric,) = described(
        [{"function": rate, "direction": "minimize", "name": "r2", "tokens": 9}], objectives=["validation_loss", "r2"]
    ).metrics
    assert (metric.function, metric.max_new_tokens) == (f"{__name__}:rate", 9)
    flagged = StudySpec.load(overrides=[("metrics", "mine:rate"), ("model", "m"), ("data", "d.json"), ("data.validation_fraction", "0.1")])
    assert flagged.metrics == described("mine:rate").metrics
    spec = described(["mine:rate"], objectives=["validation_loss", "rate"], constraints="rate >= -3.5", sampler="tpe")
    assert [(o.name, o.direction) for o in spec.objectives] == [("validation_loss", "minimize"), ("rate", "maximize")]
    assert spec.scored == ("rate",)
    described("mine:other")
    assert [str(limit) for limit in spec.limits] == ["rate >= -3.5"], "another description was read meanwhile"


def test_one_may_stand_in_the_place_of_the_loss() -> None:
    spec = described("mine:rate", objectives="rate")
    assert (spec.own_objective, spec.sampler.name, spec.budget.most) == ("rate", "tpe", 100)
    assert described("mine:rate", objectives=["rate", "adapter_mb"], schedule="halving").sampler.name == "tpe"
    assert described("mine:rate", objectives=["rate"], sampler="nomad").sampler.name == "nomad"
    assert described("mine:rate").own_objective == ""
    with pytest.raises(SpecError, match=r"objectives: got rate, validation_loss; validation_loss must be the first of them"):
        described("mine:rate", objectives=["rate", "validation_loss"])
    with pytest.raises(
        SpecError, match=r"sampler.name: got 'bracket', which searches by a loss in nats, not by rate; these .*: nomad, .*tpe"
    ):
        described("mine:rate", objectives=["rate"], sampler="bracket")


def test_what_is_written_is_read_back_and_fits_the_schema(tmp_path: Path) -> None:
    import jsonschema
    import yaml

    spec = described(["mine:rate", {"function": "mine:other", "direction": "minimize"}], objectives=["validation_loss", "other"])
    (tmp_path / "study.yaml").write_text(spec.to_yaml())
    assert StudySpec.load(tmp_path / "study.yaml") == spec
    jsonschema.validate(yaml.safe_load(spec.to_yaml()), StudySpec.json_schema())
    jsonschema.validate({"model": "m", "data": "d", "metrics": "mine:rate"}, StudySpec.json_schema())


@pytest.mark.parametrize(
    ("metrics", "more", "message"),
    [
        ("rate", {}, r"metrics.0.function: got 'rate'; needed: a module or file, a colon and a function, like my_module:exact_match"),
        (lambda records: 1.0, {}, r"metrics.0.function: got <function .*needed: a function at the top level of a module"),
        ("mine:tokens", {}, r"metrics.0.name: there is a metric 'tokens' already"),
        ({"function": "mine:rate", "name": "score"}, {}, r"metrics.0.name: there is a metric 'score' already"),
        ({"function": "mine:rate", "direction": "up"}, {}, r"metrics.0.direction: got 'up'; allowed: maximize, minimize"),
        ({"function": "mine:rate", "exmaples": 3}, {}, r"metrics.0.exmaples: unknown field; did you mean 'examples'"),
        (["mine:rate", "yours:rate"], {}, r"metrics: got rate, rate; each name may stand once"),
        ("mine:rate", {"objectives": ["validation_loss", "raet"]}, r"objectives.1: got 'raet'; allowed: .*rate"),
        ("mine:rate", {"objectives": ["validation_loss", {"name": "rate", "direction": "minimize"}]}, r"metrics says maximize of rate"),
        ("mine:other", {"constraints": ["rate > 1"]}, r"constraints.0: unknown metric 'rate'; allowed: .*other"),
    ],
)
def test_mistakes(metrics: Any, more: dict[str, Any], message: str) -> None:
    described("mine:rate", constraints="rate > 1")  # another description, whose metric is none of this one's
    with pytest.raises(SpecError, match=message):
        described(metrics, **more)


def test_where_a_module_is_looked_for(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert functions_of(described(f"{module}:words").metrics)["words"]([{"prompt": "", "reference": "", "answer": "a b"}]) == 2
    for address, message in (
        ("no_such:rate", r"there is no module 'no_such': neither no_such.py in the current folder"),
        ("no_such.py:rate", r"there is no file no_such.py"),
        (f"{module}:word", rf"{module} has no function 'word'; did you mean 'words'"),
        (f"{module}:ALLOWED", r"ALLOWED of .* is 3, needed: a function"),
        ("bad:rate", r"bad cannot be imported: ZeroDivisionError: division by zero"),
        ("needs:rate", r"needs cannot be imported: No module named 'absent_one'"),
    ):
        (tmp_path / "bad.py").write_text("1 / 0\n")
        (tmp_path / "needs.py").write_text("import absent_one\n")
        with pytest.raises(SpecError, match=f"metrics.0.function: {message}"):
            functions_of(described(address).metrics)
    with pytest.raises(SpecError, match=r"metrics.0.function: .*\nmetrics.1.data: there is no file nowhere.json"):
        functions_of(described([f"{module}:word", {"function": f"{module}:words", "data": "nowhere.json"}]).metrics)

    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "study.yaml").write_text(f"model: m\ndata: {{train: [d], validation_fraction: 0.1}}\nmetrics: [{module}:words]\n")
    monkeypatch.chdir(tmp_path / "elsewhere")
    (metric,) = StudySpec.load(Path("..") / "study.yaml").metrics
    assert metric.function == f"../{module}.py:words"
    assert set(functions_of([metric])) == {"words"}
    (tmp_path / "lock").write_text("")  # a study's folder, which may come from somebody else
    assert StudySpec.load(Path("..") / "study.yaml").metrics[0].function == f"{module}:words"


def test_questions_are_those_of_training(demo_data: Path, tmp_path: Path) -> None:
    from loratune import demo

    prepared = Prepared.load(demo_data)
    questions, tokenizer = validation_questions(prepared), tokenizer_of(prepared, trust_remote_code=False)
    assert len(questions) == len(prepared.validation)
    for question, number in zip(questions, range(len(questions)), strict=True):
        ids, mask = prepared.validation[number]
        assert [*question.prompt, *question.reference] == ids.tolist()
        assert mask.tolist() == [False] * len(question.prompt) + [True] * len(question.reference)
    rows = [json.loads(line) for line in demo.data_files()[1].read_text().splitlines()[:5]]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    own = file_questions(str(tmp_path / "own.jsonl"), prepared, trust_remote_code=False)
    assert [tokenizer.decode(q.reference, skip_special_tokens=True).strip() for q in own] == [row["output"] for row in rows]
    assert tokenizer.decode(own[0].prompt).endswith("### Response:")
    drawn = [GeneratedAnswers(AnswerSet(examples=n), demo_data, seed=3, trust_remote_code=False).items() for n in (5, 9)]
    assert [len(items) for items in drawn] == [5, 9]
    assert {item.id for item in drawn[0]} <= {item.id for item in drawn[1]}


def test_answers_are_those_of_generate(demo_data: Path) -> None:
    import torch

    from loratune import demo
    from loratune.downstream.answering.adapter_stack import Adapters
    from loratune.downstream.answering.answerer import Answerer
    from loratune.finetune.model import load
    from loratune.work import ModelRecipe

    asked = GeneratedAnswers(AnswerSet(examples=4, max_new_tokens=6), demo_data, seed=0, trust_remote_code=False)
    base = load(ModelRecipe(name_or_path=str(demo.model_folder())), torch.device("cpu"))
    adapters = Adapters(base, [None])
    answered = list(Answerer(base, adapters).answers(asked, asked.items(), [0]))
    adapters.close()
    written = {item.id: answer.text.strip() for items, answers in answered for item, answer in zip(items, answers[0], strict=True)}
    for item in asked.items():
        with torch.inference_mode():
            tokens = base.model.generate(torch.tensor([item.ids]), max_new_tokens=6, do_sample=False)[0, len(item.ids) :]
        assert written[item.id] == base.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def metrics_on(demo_data: Path, folder: Path, *metrics: OwnMetric) -> OwnMetrics:
    items = {one.name: GeneratedAnswers(one, demo_data, seed=0, trust_remote_code=False).items() for one in map(answer_set, metrics)}
    return OwnMetrics(metrics, folder, items)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("nothing", r"returned None; needed: a finite number"),
        ("over", r"returned nan; needed: a finite number"),
        ("close", r"raised TypeError: close\(\) missing 1 required positional argument"),
    ],
)
def test_a_function_is_tried_before_the_first_trial(function: str, said: str, demo_data: Path, module: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=rf"metrics.0.function: {module}:{function} {said}.*with 4 reference answers as answers"):
        metrics_on(demo_data, tmp_path / "scoring", OwnMetric(function=f"{module}:{function}"))


def test_a_function_that_changes_must_give_the_same_values(
    demo_data: Path, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metric, folder, file = OwnMetric(function=f"{module}:broken", examples=6), tmp_path / "scoring", tmp_path / f"{module}.py"
    own = metrics_on(demo_data, folder, metric)
    name = answer_set(metric).name
    items = own._items[name]

    def answer(model: str, right: int) -> None:
        lines = [{"id": i.id, "group": "", "answer": i.facts["reference"] if n < right else "?", "score": 0} for n, i in enumerate(items)]
        (folder / model).mkdir(parents=True)
        (folder / model / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / model / f"{name}.json").write_text(json.dumps({"items": 6}))

    answer("0000", 2)
    assert own.measure("0000") == {"broken": 0.5}
    answer("0001", 0)
    with pytest.raises(EvaluationError, match=rf"broken: {module}:broken raised ZeroDivisionError.*line 21.*6 answers of trial 1. Mend"):
        own.measure("0001")

    def again(old: str, new: str) -> OwnMetrics:
        file.write_text(file.read_text().replace(old, new))
        monkeypatch.delitem(sys.modules, module)
        return metrics_on(demo_data, folder, metric)

    again("ALLOWED = 3", "ALLOWED = 4")  # nothing that it names
    own = again(
        'return 1 / sum(r["answer"] == r["reference"] for r in records)',
        'return 1 / (sum(r["answer"] == r["reference"] for r in records) or 4)',
    )
    assert own.measure("0001") == {"broken": 0.25}
    with pytest.raises(StorageError, match=r"changed since the study .* began: broken of trial 0 was 0.5, and would be 1"):
        again("return 1 / (", "return 2 / (")
    again("return 2 / (", "return 1 / (")


def test_a_fingerprint_follows_what_a_function_names(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def prints(text: str) -> list[str]:
        (tmp_path / f"{module}.py").write_text(text)
        monkeypatch.delitem(sys.modules, module, raising=False)
        return [
            fingerprint(f)
            for f in functions_of([OwnMetric(function=f"{module}:exact_match"), OwnMetric(function=f"{module}:words")]).values()
        ]

    first = prints(MODULE)
    assert prints("# a line before\n" + MODULE) == first
    changed = prints(MODULE.replace("[:1]", "[:2]"))
    assert changed[0] != first[0], "a function that it calls"
    assert changed[1] == first[1]
    allowing = MODULE.replace("return a.split()[:1]", "return ALLOWED and a.split()[:1]")
    assert prints(allowing)[0] != prints(allowing.replace("ALLOWED = 3", "ALLOWED = 4"))[0], "a constant that it names"


def study_of(folder: Path, metrics: Any, **more: Any) -> StudySpec:
    from loratune import demo

    given = demo.study()
    given["data"] |= {"train_count": 24, "validation_count": 12}
    given |= {
        "metrics": metrics,
        "search_space": {"lora_r": [1, 4], "learning_rate": {"low": 1e-5, "high": 3e-3, "log": True}},
        "sampler": "random",
        "executor": "inline",
        "budget": {"trials": 3},
        "output": {"folder": str(folder)},
    }
    return StudySpec.load(base=given | more)


@pytest.mark.slow
def test_a_real_study(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Two metrics that share their answers: one an objective, one a constraint; killed while it answers, continued, shown, chosen by."""
    monkeypatch.setenv("LORATUNE_CACHE", str(tmp_path / "cache"))
    same = {"examples": 8, "max_new_tokens": 12}
    metrics = [{"function": f"{module}:exact_match", **same}, {"function": f"{module}:words", "direction": "minimize", **same}]
    wanted: dict[str, Any] = {"objectives": ["validation_loss", "exact_match"], "constraints": "words <= 1000"}
    spec = study_of(tmp_path / "study", metrics, **wanted)

    class Killed(BaseException):
        pass

    real = OwnMetrics.measure

    def killed(self: OwnMetrics, model: str) -> dict[str, float]:
        if model == "0001":
            raise Killed
        return real(self, model)

    monkeypatch.setattr(OwnMetrics, "measure", killed)
    with pytest.raises(Killed):
        list(tune(spec))
    monkeypatch.setattr(OwnMetrics, "measure", real)
    list(tune(spec))
    record = read(spec.folder)
    assert [trial.state for trial in record.trials] == [COMPLETE] * 3
    answers = spec.folder / "scoring" / "0001" / f"{answer_set(spec.metrics[0]).name}.jsonl"
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    assert len(lines) == 8, "answered once, for both metrics"
    facts = {
        i.id: i.facts
        for i in GeneratedAnswers(answer_set(spec.metrics[0]), _prepared(record), seed=spec.seed, trust_remote_code=False).items()
    }
    words = sum(len(line["answer"].split()) for line in lines) / 8
    same_first = [line["answer"].split()[:1] == facts[line["id"]]["reference"].split()[:1] for line in lines]
    assert record.trials[1].scores == {"exact_match": sum(same_first) / 8, "words": words}
    assert any(0 < trial.scores["words"] <= 12 for trial in record.trials)
    for trial in record.trials:
        assert trial.values == (trial.value, trial.scores["exact_match"])
    assert record.to_dataframe()["words"].tolist() == [trial.scores["words"] for trial in record.trials]

    monkeypatch.setattr(search_scoring.Scorer, "score", lambda *_: pytest.fail("measured again"))
    list(tune(spec))
    capsys.readouterr()
    assert main(["status", str(spec.folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["best"]["scores"] == (record.best and record.best.scores)
    assert main(["status", str(spec.folder)]) == 0
    assert "exact" in capsys.readouterr().out
    assert main(["report", str(spec.folder)]) == 0
    page = (spec.folder / "report.html").read_text()
    assert f"{record.trials[1].scores['words']:.3g}" in page
    assert '<th scope="col" class="n">words</th>' in page

    rule = rule_of("words", ["exact_match >= 0"], record.trials, {})
    found = candidates(record.trials, {t.number: [t.value or 0.0] for t in record.trials}, {})
    fewest = min(record.trials, key=lambda t: t.scores["words"])
    assert choose(found, rule, seed=0).winner == f"trial {fewest.number}"
    assert METRICS["words"].direction == "minimize"
    strict = rule_of("words", ["words > 1000"], record.trials, {})
    with pytest.raises(SpecError, match="none of 3 finished trials keeps the constraints"):
        allowed(list(record.trials), strict, {})


def test_a_folder_cannot_ask_for_code(tmp_path: Path, capsys: pytest.CaptureFixture[str], module: str) -> None:
    spec = study_of(tmp_path / "study", f"{module}:words")
    spec.folder.mkdir()
    (spec.folder / "spec.yaml").write_text(spec.to_yaml())
    (spec.folder / "lock").write_text("")
    assert main(["run", str(spec.folder)]) == 2
    said = capsys.readouterr().err
    assert "asks to run code: metrics" in said
    assert f"add --metrics {module}:words." in said, "the address alone, as it was written"
    assert main(["recommend", str(spec.folder), "--metrics", f"{module}:words"]) == 0, "that is consent"
    capsys.readouterr()
    (spec.folder / "spec.yaml").write_text(study_of(tmp_path / "study", {"function": f"{module}:words", "examples": 9}).to_yaml())
    assert main(["run", str(spec.folder)]) == 2
    assert f"""--metrics '[{{"function": "{module}:words", "examples": 9}}]'""" in capsys.readouterr().err


def _prepared(record: Any) -> Path:
    return Path(json.loads(record.paths.recipe.read_text())["data"])


@pytest.mark.slow
def test_a_constraint_rules_out(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORATUNE_CACHE", str(tmp_path / "cache"))
    metric = {"function": f"{module}:words", "direction": "minimize", "examples": 2, "max_new_tokens": 4}
    spec = study_of(tmp_path / "study", metric, constraints="words < 0.0", budget={"trials": 1}, sampler="tpe")
    list(tune(spec))
    (trial,) = read(spec.folder).trials
    assert trial.state == INFEASIBLE
    assert trial.message.startswith("it breaks words < 0: ")


@pytest.mark.slow
def test_one_alone_stops_trials_and_chooses(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The only objective, measured at each rung of a real study; then chosen by, handed over and shown."""
    import yaml

    monkeypatch.setenv("LORATUNE_CACHE", str(tmp_path / "cache"))
    metric = {"function": f"{module}:words", "direction": "minimize", "examples": 4, "max_new_tokens": 6}
    halving = {"name": "halving", "fidelity": "steps", "min_resource": "1/3"}
    spec = study_of(tmp_path / "study", metric, objectives=["words"], schedule=halving, budget={"trials": 3})
    list(tune(spec))
    record = read(spec.folder)
    assert record.own_objective == "words"
    assert all(outcome.scores for trial in record.trials for outcome in trial.outcomes), "at the rungs too"
    answered = {path.name for path in (spec.folder / "scoring").iterdir() if path.is_dir()}
    rungs = {f"{t.number:04d}-main-{t.outcomes[0].stop_step}" for t in record.trials}
    assert answered == rungs | {f"{t.number:04d}" for t in record.finished}
    assert 1 <= len(record.finished) < 3
    best = min(record.finished, key=lambda t: (t.scores["words"], t.value, t.number))
    assert record.best == best
    capsys.readouterr()
    assert main(["select", str(spec.folder), "--no-rerun"]) == 0
    said = capsys.readouterr().out
    assert f"Ship trial {best.number}. Its words is {best.scores['words']:.4g}" in said
    assert yaml.safe_load((spec.folder / "best.yaml").read_text())["scores"] == {"words": best.scores["words"]}
    page = (spec.folder / "report.html").read_text()
    assert "<dt>words</dt>" in page
    assert "searched for" in page
