"""The counts of a dry run, against the schedules and hand arithmetic."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from loratune import demo
from loratune.data.prepared import Prepared, pack_tokens
from loratune.errors import SpecError
from loratune.executors.devices import ClusterDevices
from loratune.finetune.sizes import adapter_sizes
from loratune.record import open_record
from loratune.selection.workflow import most_runs
from loratune.spec import StudySpec
from loratune.study.estimate import Plan, widened
from loratune.study.plan import (
    _expected_epochs,
    _largest,
    _not_counted,
    _threads,
    expected,
    few_steps,
    idle_of,
    slots_for,
    workers_for,
)
from loratune.work import Hyperparameters, ModelRecipe


def spec(**sections: object) -> StudySpec:
    return StudySpec.load(None, (), {"sampler": "nomad", "model": "m", "data": {"train": ["d"], "validation_fraction": 0.1}, **sections})


PLAN = Plan(
    trials=10,
    full_runs=10,
    steps=100,
    trial_tokens=360_000,
    validation_tokens=3_600,
    validations=11,
    training_tokens_per_second=100.0,
    validation_tokens_per_second=200.0,
    processes=2,
    slots=1,
    devices_per_trial=4,
    device="NVIDIA H200, 139 GiB",
    peak_memory_bytes=3 * 2**30,
    largest_rank=512,
    adapter_bytes=2**20,
    adapters_kept=2,
)


def test_hours_are_tokens_over_speed() -> None:
    assert PLAN.trial_seconds == 3600 + 18
    assert PLAN.device_hours == pytest.approx((10 * 3600 + 11 * 18) * 4 / 3600)
    assert PLAN.wall_hours == pytest.approx((10 * 3600 + 11 * 18) / 2 / 3600)


def test_the_text_tells_what_matters() -> None:
    text = str(PLAN)
    for said in (
        "60 min per trial; 5.0 h in all, 40.22 device-hours",
        "3.0 GiB at its peak, per device, at rank 512",
        "2.0 MiB for 2 adapters",
    ):
        assert said in text
    assert "budget" not in text
    assert "max_hours: 1 ends it earlier, after about 1 trial" in str(replace(PLAN, max_hours=1.0))
    assert "nodes  " not in text
    cluster = ClusterDevices(gpus=True, number=8, nodes=1, there=4, asked_for=True)
    told = "nodes         1 node with 4 GPUs now; planned for 8, executor.max_devices; the speed is this machine's"
    assert told in str(replace(PLAN, cluster=cluster))
    idle = "waiting       5 of 8 devices will wait: sampler bracket starts at most 3 trials together"
    assert idle in str(replace(PLAN, cluster=cluster, idle=idle.partition(" ")[2].strip()))
    assert "waiting" not in text
    assert text.count("busy") == 0
    assert "cost" not in text
    priced = replace(PLAN, price=2.0, currency="EUR", max_cost=40.0, spread=(0.5, 1.25))
    assert "cost          64.35 EUR to 160.88 EUR, at 2.00 EUR per device-hour\n" in str(priced)
    assert "max_cost: 40 ends it earlier, after about 4 trials" in str(priced)
    shaky = str(replace(PLAN, spread=(0.5, 1.25), load=3.0))
    assert "time          48 min to 2.0 h per trial; 4.0 h to 10.1 h in all, 40.22 device-hours\n" in shaky
    assert "busy          the machine is 3.0 times as busy as it has processors" in shaky
    assert "rank 512: out of memory: too big" in str(replace(PLAN, problem="out of memory: too big", training_tokens_per_second=0.0))


def test_a_full_schedule_spends_one_run_per_trial() -> None:
    assert expected(spec(budget={"trials": 10}, training={"validations": 4})) == (10, 41)


def test_the_totals_are_those_of_the_text_and_tell_what_comes_after() -> None:
    priced = replace(PLAN, price=2.0, currency="EUR", max_cost=40.0, spread=(0.5, 1.25), seconds_to_start=12.0, fresh_runs=15)
    totals = priced.totals()
    assert totals is not None
    seconds = (10 * 3600 + 11 * 18) / 2
    assert totals["seconds"] == pytest.approx([seconds / 1.25, seconds / 0.5])
    assert totals["device_hours"] == priced.device_hours
    assert (totals["tokens"], totals["full_runs"], totals["start_seconds"], totals["currency"]) == (3_600_000, 10, 12.0, "EUR")
    assert totals["cost"] == pytest.approx([64.35, 160.88], abs=0.01)
    assert totals["limits"] == ["budget max_cost: 40 ends it earlier, after about 4 trials"]
    after = totals["select"]
    assert (after["full_runs"], after["tokens"]) == (15, 15 * 360_000)
    assert after["seconds"] == pytest.approx([15 * 3618 / 2 / 1.25, 15 * 3618 / 2 / 0.5])
    assert after["cost"] == pytest.approx([15 * 3618 * 4 / 3600 * 2 / 1.25, 15 * 3618 * 4 / 3600 * 2 / 0.5])
    text = str(priced)
    assert "start         12 s more at each start, as measured here: libraries, data and model\n" in text
    told = "15 full runs with fresh seeds: 6.0 h to 15.1 h, 60.30 device-hours, 241.20 EUR more; with --no-rerun none"
    assert told in text
    whole = totals["all"]  # both, and 12 seconds at each of two starts, while 2 x 4 devices wait
    assert whole["seconds"] == pytest.approx([a + b + 24 for a, b in zip(totals["seconds"], after["seconds"], strict=True)])
    assert whole["device_hours"] == pytest.approx(priced.device_hours + priced.fresh_device_hours + 24 * 8 / 3600)
    assert whole["cost"] == pytest.approx([a + b + 2 * 24 * 8 / 3600 for a, b in zip(totals["cost"], after["cost"], strict=True)])
    assert (whole["tokens"], whole["full_runs"]) == (25 * 360_000, 25)
    assert "all together  10.1 h to 25.1 h, 100.57 device-hours, 160.94 EUR to 402.19 EUR: search, selection and 2 starts\n" in text
    assert "all together  4.0 h to 10.1 h, 40.25 device-hours, 64.41 EUR to 160.93 EUR: with the start\n" in str(
        replace(priced, fresh_runs=0)
    )
    assert "device-hours, a cost of 160.94 to 402.19: search" in str(replace(priced, currency=""))
    assert PLAN.totals() is not None
    assert PLAN.totals()["cost"] is None  # type: ignore[index]
    assert replace(PLAN, problem="out of memory", training_tokens_per_second=0.0).totals() is None


def test_what_a_selection_trains_at_most() -> None:
    """At its defaults: three runs of each of eight finalists at most, three each of the chosen one and the default, a lost adapter."""
    assert most_runs(3, keep=10) == 3 * 3 + 6
    assert most_runs(40, keep=10) == 3 * 8 + 6 + 1
    assert most_runs(40, keep=None) == 3 * 8 + 6
    assert most_runs(0, keep=10) == 0
    assert most_runs(4, keep=10, full_runs=3.0) == 2 * 2 + 6, "two finalists: no more than three times what a search of three runs cost"
    assert most_runs(12, keep=10, full_runs=8.5) == 2 * 9 + 1


@pytest.mark.parametrize("fidelity", ["steps", "budget"])
def test_halving_spends_less_than_full_and_more_than_its_bottom_rung(fidelity: str) -> None:
    runs, validations = expected(spec(budget={"trials": 27}, schedule={"name": "halving", "fidelity": fidelity}))
    # 27 at 1/9, about 9 at 1/3, about 3 at 1: 9 runs when restarted, less when resumed; asynchrony promotes a little more
    assert 27 / 9 < runs < 14
    assert 27 + 1 < validations < 27 + 9 + 3 + 12
    if fidelity == "steps":
        assert runs < expected(spec(budget={"trials": 27}, schedule={"name": "halving", "fidelity": "budget"}))[0]


def test_the_largest_adapter_of_the_space() -> None:
    searched = spec(search_space={"lora_r": [4, 64, 16], "target_modules": ["qv", "all-linear"]} | {"lora_r": [4, 16, 64]})
    largest = _largest(searched, searched.hyperparameters(searched.search_space.default_values()))
    assert (largest.lora_r, largest.target_modules) == (64, "all-linear")
    fixed = spec(search_space={"learning_rate": {"low": 1e-5, "high": 1e-3, "log": True}})
    assert _largest(fixed, fixed.hyperparameters({})).lora_r == 8


def test_what_is_probed_keeps_the_constraints_on_size() -> None:
    model = str(demo.model_folder())
    sizes = adapter_sizes(ModelRecipe(name_or_path=model))

    def largest(space: dict[str, object], *constraints: str) -> Hyperparameters:
        asked = spec(model=model, search_space=space, constraints=constraints)
        return _largest(asked, asked.hyperparameters(asked.search_space.default_values()))

    ordinal = {"lora_r": [4, 16, 64], "target_modules": ["qv", "all-linear"]}
    every = [Hyperparameters(lora_r=r, target_modules=layers) for r in (4, 16, 64) for layers in ("qv", "all-linear")]
    bound = sorted(map(sizes, every))[3]
    found = largest(ordinal, f"inference_cost <= {bound}")
    assert sizes(found) == bound
    whole = largest({"lora_r": {"low": 1, "high": 64}}, f"inference_cost < {sizes(Hyperparameters(lora_r=38))}")
    assert whole.lora_r == 37, "not only the ends of a range"
    assert largest(ordinal, "inference_cost < 1").lora_r == 16, "nothing keeps it: the default"


def test_what_is_not_counted_is_said() -> None:
    asked = spec(objectives=["validation_loss", "mmlu"], constraints="adapter_mb <= 4")
    text = str(replace(PLAN, notes=_not_counted(asked, 60, 10_000)))
    assert "not counted   trials that break adapter_mb <= 4 are not trained and cost nothing" in text
    assert "not counted   scoring mmlu, 200 items each, after every trial that reaches its end" in text


def test_answers_are_those_of_the_validation_set_where_it_has_fewer(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def words(rows):\n    return 0.0\n")
    metric = {"function": f"{tmp_path / 'mine.py'}:words", "max_new_tokens": 128}
    (note,) = _not_counted(spec(metrics=[metric]), 60, 76_800)
    assert note.startswith("generating 60 answers for words, after every trial that reaches its end: at most 7,680 tokens, 10 % of")
    (many,) = _not_counted(spec(metrics=[metric]), 5_000, 76_800)
    assert many.startswith("generating 200 answers for words")
    (own,) = _not_counted(spec(metrics=[{**metric, "data": str(tmp_path / "q.jsonl")}]), 60, 76_800)
    assert own.startswith("generating up to 200 answers for words")


def test_a_speed_of_shared_processors_has_a_wide_range() -> None:
    assert widened((0.95, 1.05), load=1.0) == (0.7, 1.3)
    assert widened((0.4, 1.6), load=1.0) == (0.4, 1.6)
    assert widened((0.95, 1.05), load=2.0) == (0.5, 2.0)
    text = str(replace(PLAN, spread=(0.7, 1.3), spread_is_assumed=True))
    assert "range         of the times: from 1.3 to 0.7 times the speed measured within a second or two; the processors are shared" in text
    assert "range  " not in str(PLAN)


def test_what_is_done_is_said_and_counts_towards_the_limits() -> None:
    going_on = replace(PLAN, done_trials=12, done_full_runs=3.2, max_hours=6.0, spent_hours=3.0)
    text = str(going_on)
    assert "trials        10 more, the work of 10 full runs at the defaults; 12 are in its folder already, the work of 3.2\n" in text
    assert "max_hours: 6 ends it earlier, after about 5 more trials" in text
    assert "max_hours: 2 ends it earlier, after about 0 more trials" in str(replace(going_on, max_hours=2.0))
    assert "budget" not in str(replace(going_on, max_hours=8.1))
    nothing = replace(going_on, trials=0, full_runs=0.0, validations=0.0, fresh_runs=0).totals()
    assert nothing is not None
    assert nothing["all"]["seconds"] == [0.0, 0.0]


def test_searched_epochs_count_with_their_mean() -> None:
    searched = spec(search_space={"preset": "published", "epochs": [1, 2, 6]})
    assert _expected_epochs(searched, searched.hyperparameters(searched.search_space.default_values())) == 3


def test_slots_share_a_process_and_its_speed() -> None:
    packed = replace(PLAN, slots=3)
    assert packed.wall_hours == PLAN.wall_hours
    assert "6 at a time" in str(packed)
    assert "36.0 MiB for checkpoints" in str(packed)


@pytest.mark.parametrize(
    ("training", "trials", "executor", "slots"),
    [
        ({"engine": "packed", "batch_size": 1}, 100, {}, 3),  # 64 / 25 tokens
        ({"engine": "packed", "batch_size": 2}, 100, {}, 2),
        ({"engine": "packed", "batch_size": 128}, 100, {}, 1),
        ({"engine": "packed", "batch_size": 1}, 9, {}, 3),
        ({"engine": "packed", "batch_size": 1}, 9, {"workers": 2}, 2),
        ({"engine": "packed", "batch_size": 1}, 9, {"workers": 2, "name": "inline"}, 3),
        ({"engine": "packed", "batch_size": 1, "devices_per_trial": 2}, 100, {}, 1),
        ({"engine": "packed", "batch_size": 128, "slots": 5}, 100, {}, 5),
        ({"engine": "hf", "batch_size": 1}, 100, {}, 1),
    ],
)
def test_as_few_slots_as_fill_the_device(training: dict[str, object], trials: int, executor: dict[str, object], slots: int) -> None:
    tokens = pack_tokens([(np.zeros(length, np.int32), np.ones(length, bool)) for length in (12, 38)])
    data = Prepared(folder=Path(), manifest=None, train=tokens, validation=tokens)  # type: ignore[arg-type]
    described = spec(training=training, budget={"trials": trials}, executor={"device": "cpu", **executor})
    assert slots_for(described, data) == slots


@pytest.mark.parametrize(
    ("executor", "trials", "cores", "workers"),
    [
        ({}, 100, 4, 4),
        ({}, 100, 64, 8),
        ({}, 25, 4, 2),
        ({}, 9, 4, 1),
        ({"workers": 3}, 9, 1, 3),
        ({"name": "inline"}, 100, 4, 1),
    ],
)
def test_a_process_per_core(
    executor: dict[str, object], trials: int, cores: int, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"0" * 1000)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("loratune.system.machine.available_memory", lambda: 2**40)
    described = spec(model=str(tmp_path), budget={"trials": trials}, executor={"device": "cpu", **executor})
    assert workers_for(described) == workers
    assert _threads(described) == (None if executor.get("name") == "inline" else max(1, cores // workers))


@pytest.mark.parametrize(
    ("sampler", "executor", "places", "idle"),
    [
        ("tpe", {"max_devices": 8}, 8, "executor.workers: 32 prevents that"),
        ("tpe", {"max_devices": 8, "workers": 32}, 32, ""),
        ("tpe", {"max_devices": 8, "workers": 2}, 2, "6 of 8 devices will wait: 2 runs in flight."),
        ("bracket", {"max_devices": 8}, 8, "5 of 8 devices will wait: sampler bracket starts at most 3 trials together."),
        ("bracket", {}, 3, "1 of 4 devices will wait: sampler bracket starts at most 3 trials together."),
        ("tpe", {}, 4, "executor.workers: 16 prevents that"),
    ],
)
def test_a_cluster_has_a_place_per_device_and_says_which_will_wait(
    sampler: str, executor: dict[str, object], places: int, idle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def counted(*, max_devices: int | None = None, **_: object) -> ClusterDevices:
        return ClusterDevices(gpus=False, number=max_devices or 4, nodes=4, there=4, asked_for=max_devices is not None)

    monkeypatch.setattr("loratune.executors.ray_cluster.cluster_devices", counted)
    asked = spec(sampler=sampler, budget={"trials": 100}, executor={"name": "ray", **executor})
    assert workers_for(asked) == places
    told = idle_of(asked, places)
    assert idle in told
    assert bool(told) == bool(idle)


def test_a_model_that_is_not_here_yet_is_trained_by_one_process() -> None:
    assert workers_for(spec(model="nobody/has-this-one", executor={"device": "cpu"})) == 1


def test_hf_has_no_slots() -> None:
    with pytest.raises(SpecError, match=r"training\.slots: got 4; engine hf trains one trial at a time; write engine: packed"):
        spec(training={"engine": "hf", "slots": 4})


def test_the_slots_of_a_study_stay(tmp_path: Path) -> None:
    with open_record(tmp_path) as record:
        assert record.pin("slots", 4) == 4
        assert record.pin("slots", 2) == 2, "nothing was trained yet"
        record.begin(0, 0)
    with open_record(tmp_path) as record:
        assert record.pin("slots", 7) == 2
        assert record.pin("workers", 3) == 3


def test_too_few_steps_are_told() -> None:
    class Data:
        train = range(160)

    training = {"batch_size": 8, "epochs": 2}
    assert few_steps(spec(training=training), Data) == [  # type: ignore[arg-type]
        "warning: a run at the defaults has 40 optimiser steps, fewer than 50: 160 examples, epochs 2, batch_size 8; "
        "write a smaller training.batch_size, or more epochs"
    ]
    assert few_steps(spec(training={**training, "batch_size": 4}), Data) == []  # type: ignore[arg-type]
