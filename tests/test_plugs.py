"""One file outside the package adds a sampler, a schedule, an executor, a tracker, a metric and a benchmark, and a study runs with them.

The file and its entry points are a real distribution on `sys.path`. What is wrong with a plug is one error that names it.
"""

import json
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest

from loratune import demo, samplers
from loratune.errors import SpecError
from loratune.plugs import BENCHMARKS, METRICS, SAMPLERS, SCHEDULES, MetricPlug, SamplerPlug, SchedulePlug, register
from loratune.record import COMPLETE, PRUNED, read
from loratune.selection.candidates import allowed, candidates, rule_of
from loratune.selection.rule import choose
from loratune.spec import StudySpec
from loratune.study.driver import tune
from loratune.study.evaluation import Scored, evaluate

ONE_FILE = '''
import json
from fractions import Fraction

from optuna.samplers import BaseSampler, RandomSampler

from loratune.downstream.tasks.base import Benchmark, Item, Verdict
from loratune.executors.inline import InlineExecutor
from loratune.plugs import BenchmarkPlug, ExecutorPlug, MetricPlug, SamplerPlug, SchedulePlug, TrackerPlug
from loratune.schedules import Decision, Schedule, Slice
from loratune.trackers import Tracker


class HighRank(RandomSampler):
    """Random, but for the largest rank of the space less `below`."""

    def __init__(self, seed: int | None = None, below: int = 0) -> None:
        super().__init__(seed=seed)
        self.below = below

    def sample_independent(self, study, trial, param_name, param_distribution):
        if param_name == "lora_r":
            return param_distribution.choices[-1 - self.below]
        return super().sample_independent(study, trial, param_name, param_distribution)


class Peek(Schedule):
    """Half of each run, with a validation at a quarter; whoever is not above the patience so far is pruned."""

    def __init__(self, *, trials: int, patience: float = 100.0) -> None:
        self.trials, self.patience, self.started, self.told, self.second = trials, patience, 0, [], []

    def next(self, may_start):
        if self.second:
            return Slice(trial=self.second.pop(), start=Fraction(1, 2))
        if not may_start or self.started == self.trials:
            return None
        self.started += 1
        return Slice(trial=self.started - 1, stop=Fraction(1, 2), validate_at=(Fraction(1, 4),))

    def tell(self, slice, result):
        if result.loss is None or result.outcome.tokens == 0 or result.outcome.train_seconds <= 0:
            return Decision.DROPPED
        if slice.ends_full_run:
            return Decision.COMPLETE
        falling = [point.validation_loss for point in result.curve if point.step]
        assert len(falling) == 2 and falling[-1] == result.loss, "the curve has the point that was asked for"
        if slice.trial == 2:
            return Decision.DROPPED
        self.second.append(slice.trial)
        return Decision.PAUSED


class Here(InlineExecutor):
    """Trains in this process, `greeting` first."""

    def __init__(self, *, recipe, root, max_retries, greeting: str = "") -> None:
        super().__init__(recipe=recipe, root=root, max_retries=max_retries)
        (root / "greeting").write_text(greeting)


class Lines(Tracker):
    """A line of JSON per call."""

    def write(self, *what):
        with (self.folder / "lines.jsonl").open("a") as file:
            print(json.dumps(what), file=file)

    def begin(self, run, config):
        self.write("begin", run, config.get("lora_r"))

    def log(self, run, step, values):
        self.write("log", run, step, values)

    def finish(self, run, summary, *, failed):
        self.write("finish", run, summary["state"])


class Colours(Benchmark):
    """Two questions."""

    name, title, version, chance = "tiny_colours", "Colours", "1", 0.5

    def items(self):
        return [Item(id=str(n), prompt=f"{n}:", choices=(" red", " blue"), targets=(" red",)) for n in range(2)]

    def score(self, items, answers):
        return [Verdict(score=float(answer in item.targets)) for item, answer in zip(items, answers, strict=True)]


sampler = SamplerPlug(name="tiny_sampler", make=HighRank, options={"below": "places below the largest rank"}, conditional=False)
schedule = SchedulePlug(name="tiny_schedule", make="tiny_plugs:Peek", help="peeks")
executor = ExecutorPlug(name="tiny_executor", make="tiny_plugs:Here", in_process=True)
tracker = TrackerPlug(name="tiny_tracker", make="tiny_plugs:Lines")
benchmark = BenchmarkPlug(name="tiny_colours", make=Colours)
metric = MetricPlug(name="tiny_steps", make=lambda trial: sum(len(o.curve) for o in trial.run), unit="points", label="points seen")
'''
ENTRY_POINTS = """
[loratune.samplers]
tiny_sampler = tiny_plugs:sampler
[loratune.schedules]
tiny_schedule = tiny_plugs:schedule
[loratune.executors]
tiny_executor = tiny_plugs:executor
[loratune.trackers]
tiny_tracker = tiny_plugs:tracker
[loratune.benchmarks]
tiny_colours = tiny_plugs:benchmark
[loratune.metrics]
tiny_steps = tiny_plugs:metric
"""


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, code: str, points: str, name: str = "tiny_plugs") -> None:
    """A distribution of one module, as pip leaves it."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / f"{name}.py").write_text(code)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, name, raising=False)


def given(folder: Path) -> dict[str, Any]:
    study = demo.study()
    study["data"]["train"][0]["count"] = 64
    study["data"].pop("train_count")
    study["data"]["validation"][0]["count"] = 16
    return {
        **study,
        "training": {**study["training"], "validations": 1, "target_modules": "qv", "report_to": "tiny_tracker"},
        "search_space": {"lora_r": [2, 4, 8], "learning_rate": {"low": 1e-3, "high": 1e-2, "log": True}},
        "objectives": ["validation_loss", "tiny_steps"],
        "constraints": ["tiny_steps <= 9"],
        "sampler": {"name": "tiny_sampler", "defaults_first": False, "below": 1},
        "schedule": {"name": "tiny_schedule", "patience": 50.0},
        "executor": {"name": "tiny_executor", "greeting": "hello"},
        "budget": {"trials": 3},
        "output": {"folder": str(folder)},
    }


def test_one_file_adds_a_plug_of_each_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORATUNE_CACHE", str(tmp_path / "cache"))
    install(tmp_path / "site", monkeypatch, ONE_FILE, ENTRY_POINTS)
    spec = StudySpec.load(base=given(tmp_path / "study"))
    assert StudySpec.load(base=json.loads(json.dumps(spec.model_dump(mode="json")))) == spec
    events = list(tune(spec))
    record = read(spec.folder)
    assert [trial.state for trial in record.trials] == [COMPLETE, COMPLETE, PRUNED], events
    assert {trial.hyperparameters.lora_r for trial in record.trials} == {4}, "the sampler's own choice, with its option"
    assert (spec.folder / "greeting").read_text() == "hello"
    assert [[p.step for p in trial.curve] for trial in record.trials] == [[0, 2, 4, 8], [2, 4, 8], [2, 4]]
    assert [trial.values[1] for trial in record.trials] == [4, 3, 2], "the metric, as an objective"
    assert METRICS.label("tiny_steps") == "points seen"

    lines = [json.loads(line) for line in (spec.folder / "lines.jsonl").read_text().splitlines()]
    assert {tuple(line[1:]) for line in lines if line[0] == "finish"} == {
        ("trial-0000", "complete"),
        ("trial-0001", "complete"),
        ("trial-0002", "pruned"),
        ("study", "complete"),
    }
    losses = {
        (run, step): v["validation_loss"] for word, run, *rest in lines if word == "log" for step, v in [rest] if "validation_loss" in v
    }
    assert losses == {(f"trial-{t.number:04d}", p.step): pytest.approx(p.validation_loss) for t in record.trials for p in t.curve}, (
        "each point once, whatever engine trains"
    )
    list(tune(spec))
    assert (spec.folder / "lines.jsonl").read_text().splitlines() == [json.dumps(line) for line in lines], "a replay adds nothing"

    finished = record.finished
    rule = rule_of("tiny_steps", ["tiny_steps <= 3"], finished, {})
    assert [trial.number for trial in allowed(finished, rule, {})] == [1], "the metric, in a selection's rule and constraint"
    found = candidates(finished, {trial.number: [trial.value] for trial in finished}, {})
    assert choose(found, rule_of("tiny_steps", [], finished, {}), seed=0, noise_sd=0.01).winner == "trial 1"

    scored = [event for event in evaluate(spec.folder, benchmarks=["tiny_colours"], top=1, device="cpu") if isinstance(event, Scored)]
    assert {result.benchmark for result in scored[0].results} == {"tiny_colours"}


def test_names_options_and_errors_follow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "site", monkeypatch, ONE_FILE, ENTRY_POINTS)
    assert SAMPLERS.names[-1] == "tiny_sampler"
    assert "tiny_sampler" in StudySpec.json_schema()["$defs"]["Sampler"]["properties"]["name"]["enum"]
    base = given(tmp_path / "study")
    for change, message in (
        ({"sampler": "tiny_sample"}, "did you mean 'tiny_sampler'?"),
        ({"schedule": {"name": "tiny_schedule", "patients": 1}}, "schedule.patients: unknown field"),
        ({"objectives": ["validation_loss", "tiny_step"]}, "did you mean 'tiny_steps'?"),
        ({"objectives": ["validation_loss", "tiny_color"]}, "did you mean 'tiny_colours'?"),
        ({"schedule": "asha"}, "schedule.name: got 'asha'; allowed: full, halving, tiny_schedule"),
    ):
        with pytest.raises(SpecError) as caught:
            StudySpec.load(base={**base, **change})
        assert message in str(caught.value)
    spec = StudySpec.load(base={**base, "sampler": {"name": "tiny_sampler", "below": "two"}})
    with pytest.raises(SpecError, match=r"sampler tiny_sampler: option below = 'two' must be int \(places below the largest rank\)"):
        next(tune(spec))


BROKEN = {
    "import nothing_like_it": "ModuleNotFoundError: No module named 'nothing_like_it'",
    "sampler = 5": "broken_plugs:sampler is 5, needed: a loratune.plugs.SamplerPlug",
    "from loratune.plugs import SamplerPlug\nsampler = SamplerPlug(name='other', make=int)": "broken_plugs:sampler calls itself 'other'",
    "from loratune.plugs import SamplerPlug\nsampler = SamplerPlug(name='mine', make='nowhere:Sampler')": "No module named 'nowhere'",
    "from loratune.plugs import SamplerPlug\ndef make(budget): ...\nsampler = SamplerPlug(name='mine', make=make)": "it needs budget",
    "from loratune.plugs import SamplerPlug\nsampler = SamplerPlug(name='mine', make=lambda: 5)": "it makes 5, needed: a optuna.samplers",
}


@pytest.mark.parametrize("code", BROKEN)
def test_a_broken_plug_is_one_error_that_names_its_distribution(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "site", monkeypatch, code, "[loratune.samplers]\nmine = broken_plugs:sampler\n", "broken_plugs")
    base = given(tmp_path / "study") | {"objectives": "validation_loss", "constraints": [], "schedule": "full", "executor": "inline"}
    base["training"] = {**base["training"], "report_to": []}
    StudySpec.load(base={**base, "sampler": "random"})  # nobody else is harmed
    with pytest.raises(SpecError) as caught:
        next(tune(StudySpec.load(base={**base, "sampler": "mine"})))
    assert "sampler 'mine' of the distribution broken_plugs 1.0 cannot be used" in str(caught.value)
    assert BROKEN[code] in str(caught.value)
    assert "Repair or uninstall broken_plugs 1.0." in str(caught.value)


def test_a_name_that_two_declare_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "site", monkeypatch, "", "[loratune.schedules]\nfull = rival_plugs:schedule\n", "rival_plugs")
    with pytest.raises(SpecError, match=r"schedule 'full' is declared twice: by loratune and by rival_plugs 1\.0"):
        SCHEDULES["full"]
    assert SCHEDULES["halving"]


def test_a_script_registers_its_own() -> None:
    plug = MetricPlug(name="script_metric", make=lambda trial: 1.0, unit="ones")
    register(plug)
    try:
        assert METRICS["script_metric"] is plug
        register(plug)  # a cell of a notebook, run again
        with pytest.raises(SpecError, match="there is a schedule 'full' already"):
            register(SchedulePlug(name="full", make=int))
        with pytest.raises(SpecError, match="unknown sampler 'script_metric'"):
            SAMPLERS["script_metric"]
    finally:
        METRICS.unregister("script_metric")
    assert isinstance(SAMPLERS["tpe"], SamplerPlug)
    assert "mmlu" in BENCHMARKS


def test_the_script_of_the_page(tmp_path: Path) -> None:
    page = Path(__file__).resolve().parent.parent / "docs" / "plugs.md"
    code = page.read_text().split("```python\n")[1].split("```")[0]
    try:
        exec(code, {})
        base = {"model": "m", "data": {"train": "d.json", "validation_fraction": 0.1}}
        spec = StudySpec.load(
            base={**base, "sampler": {"name": "thrifty", "most": 4}, "objectives": ["validation_loss", "steps_per_second"]}
        )
        assert spec.objectives[1].direction == "maximize"
        space = spec.search_space.distributions("choice")
        sampler = samplers.build("thrifty", search_space=space, seed=0, options=spec.sampler.options)
        study = optuna.create_study(sampler=sampler)
        assert {spec.search_space.suggest(study.ask(), "choice")["lora_r"] for _ in range(5)} == {4}
    finally:
        SAMPLERS.unregister("thrifty")
        METRICS.unregister("steps_per_second")
