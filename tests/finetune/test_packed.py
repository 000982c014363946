"""The packed engine against the reference: every trial is its own, whatever its companions do."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from exact import exact_norms  # noqa: F401  # a fixture
from tiny_engine import adapter, recipe, segment

from loratune.errors import NotPackableError
from loratune.finetune.engines import run_segments
from loratune.finetune.hf import HfEngine
from loratune.finetune.packed.engine import PackedEngine
from loratune.work import Outcome, Progress, Segment, State

pytestmark = pytest.mark.usefixtures("exact_norms")
STEPS = 20
MIXED = [  # ranks, dropouts, learning rates, batch sizes, layers, each different
    {"lora_r": 4, "lora_dropout": 0.0, "learning_rate": 0.01, "batch_size": 7},
    {"lora_r": 8, "lora_dropout": 0.1, "learning_rate": 0.003, "batch_size": 3, "weight_decay": 0.1, "target_modules": "all-linear"},
    {"lora_r": 16, "lora_dropout": 0.3, "learning_rate": 0.02, "batch_size": 11, "target_modules": "mlp", "use_rslora": True},
    {"lora_r": 5, "lora_dropout": 1.0, "learning_rate": 0.01, "batch_size": 4, "target_modules": "qkvo", "weight_decay": 0.2},
    {"lora_r": 6, "lora_dropout": 0.1, "learning_rate": 0.005, "batch_size": 2, "loraplus_lr_ratio": 4.0},
]
Weights = dict[str, torch.Tensor]


def segments(run: str, **options: object) -> list[Segment]:
    return [replace(segment(STEPS, trial=k, **h, **options), run=run) for k, h in enumerate(MIXED)]  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("study")


@pytest.fixture(scope="module")
def packed(root: Path) -> Iterator[PackedEngine]:
    engine = PackedEngine(replace(recipe(root), engine="packed", slots=5), root)
    engine.enough = float("inf")  # all share passes, as on a GPU; by default batches as small as these do, too
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def reference(root: Path, packed: PackedEngine) -> list[tuple[Outcome, Weights]]:
    """What `hf` makes of the same configurations, one after the other."""
    engine = HfEngine(recipe(root), root)
    wanted = segments("hf")
    return [(outcome, adapter(root, s)) for outcome, s in zip(run_segments(engine, wanted), wanted, strict=True)]


def assert_same(outcomes: list[Outcome], weights: list[Weights], reference: list[tuple[Outcome, Weights]]) -> None:
    for outcome, got, (expected, weight) in zip(outcomes, weights, reference, strict=True):
        assert outcome.state is State.COMPLETED, outcome.message
        assert outcome.validation_loss == pytest.approx(expected.validation_loss, abs=1e-10)
        assert outcome.tokens == expected.tokens
        assert outcome.trainable_parameters == expected.trainable_parameters
        assert got.keys() == weight.keys()
        for name in weight:
            torch.testing.assert_close(got[name], weight[name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("backend", ["loop", "concatenated"])
@pytest.mark.parametrize("options", [{}, {"tokens_per_pass": 60}, {"gradient_checkpointing": True}], ids=str)
def test_packed_is_the_reference(tmp_path: Path, root: Path, reference, backend: str, options: dict[str, object]) -> None:  # type: ignore[no-untyped-def]
    becomes_the_reference(tmp_path, root, reference, backend, options)


@pytest.mark.parametrize("attention", ["rectangles", "blocks of 3"])
def test_each_attention_is_the_reference(tmp_path: Path, root: Path, reference, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """What longer sequences take, and other precisions; queries over several blocks."""
    if attention == "rectangles":
        monkeypatch.setattr("loratune.finetune.packed.attention.LONGEST", 0)
    else:
        monkeypatch.setattr("loratune.finetune.packed.causal._BLOCK", 3)
    becomes_the_reference(tmp_path, root, reference, "loop", {})


def becomes_the_reference(tmp_path: Path, root: Path, reference, backend: str, options: dict[str, object]) -> None:  # type: ignore[no-untyped-def]
    for name in ("model", "data"):
        (tmp_path / name).symlink_to(root / name)
    engine = PackedEngine(replace(recipe(tmp_path, **options), engine="packed", slots=5), tmp_path)
    engine.base.backend = lambda adapters: backend  # type: ignore[return-value, assignment]
    wanted = segments("packed")
    outcomes = run_segments(engine, wanted)
    assert_same(outcomes, [adapter(tmp_path, s) for s in wanted], reference)
    engine.close()


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_companions_change_nothing(packed: PackedEngine, root: Path, reference, slots: int) -> None:  # type: ignore[no-untyped-def]
    """Other neighbours, other order, slots that are refilled."""
    order = np.random.default_rng(slots).permutation(len(MIXED))
    wanted = segments(f"slots-{slots}")
    packed.slots = packed._limit = slots
    run_segments(packed, [wanted[k] for k in order])
    packed.slots = packed._limit = 5
    for k in range(len(MIXED)):
        got = adapter(root, wanted[k])
        for name, weight in reference[k][1].items():
            torch.testing.assert_close(got[name], weight, rtol=1e-9, atol=1e-11)


def test_alone_in_its_passes_a_trial_is_the_same_to_the_last_bit(packed: PackedEngine, root: Path) -> None:
    """What a CPU does: lanes take turns, and who else is there leaves no trace, not even in the rounding."""
    packed.enough = 0
    together, alone = segments("turns"), segments("alone")
    run_segments(packed, together)
    packed.slots = packed._limit = 1
    run_segments(packed, alone[::-1])
    packed.slots = packed._limit = 5
    packed.enough = float("inf")
    for one, two in zip(together, alone, strict=True):
        a, b = adapter(root, one), adapter(root, two)
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_pause_and_resume_bit_for_bit(packed: PackedEngine, root: Path) -> None:
    whole = segments("whole")
    run_segments(packed, whole)
    first = [replace(s, run="parts", stop_step=8) for s in whole]
    run_segments(packed, first)
    second = [replace(s, run="parts", start_step=8) for s in whole]
    run_segments(packed, second)
    for one, two in zip(whole, second, strict=True):
        a, b = adapter(root, one), adapter(root, two)
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_stop_leaves_a_checkpoint_and_goes_on(packed: PackedEngine, root: Path) -> None:
    whole, parts = segments("uninterrupted"), segments("interrupted")
    expected = run_segments(packed, whole)
    stop = threading.Event()
    stepped: list[object] = []
    update = packed._step

    def counted(told) -> None:  # type: ignore[no-untyped-def]
        stepped.extend(told)
        if len(stepped) >= 33:
            stop.set()
        update(told)

    packed._step = counted  # type: ignore[method-assign]
    broken = run_segments(packed, parts, stop=stop)
    packed._step = update  # type: ignore[method-assign]
    assert {o.state for o in broken} == {State.CANCELLED}
    got = run_segments(packed, parts)
    assert [o.validation_loss for o in got] == [pytest.approx(o.validation_loss, abs=1e-12) for o in expected]
    assert [o.tokens for o in got] == [o.tokens for o in expected]


@pytest.mark.parametrize("backend", ["loop", "concatenated"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["weights", "gradient"])
def test_a_diverging_neighbour_is_alone_in_it(packed: PackedEngine, root: Path, reference, backend: str, poison: float, side: str) -> None:  # type: ignore[no-untyped-def]
    """One adapter is driven to inf or NaN at a random step: it diverges, the others are what they would have been."""
    when = int(np.random.default_rng(len(backend) + len(side)).integers(2, STEPS - 2))
    name = f"{backend}-{poison}-{side}"
    wanted = segments(name)
    packed.base.backend = lambda adapters: backend  # type: ignore[return-value, assignment]
    train = packed._train

    def poisoned(lanes) -> None:  # type: ignore[no-untyped-def]
        victim = next((lane for lane in lanes if lane.segment.trial == 1), None)
        if victim is not None and victim.run.step == when:
            if side == "weights":
                victim.adapter.parameters["lora_B"].data.fill_(poison)
            else:
                victim.adapter.parameters["lora_A"].grad.fill_(poison)
        train(lanes)

    packed._train = poisoned  # type: ignore[method-assign]
    outcomes = run_segments(packed, wanted)
    packed._train = train  # type: ignore[method-assign]
    packed.base.backend = lambda adapters: "loop"
    assert outcomes[1].state is State.DIVERGED
    assert f"step {when + 1}" in outcomes[1].message
    keep = [0, 2, 3, 4]
    assert_same([outcomes[k] for k in keep], [adapter(root, wanted[k]) for k in keep], [reference[k] for k in keep])


def test_grouped_backend_in_float32(tmp_path: Path) -> None:
    engines = {}
    for backend in ("loop", "grouped"):
        folder = tmp_path / backend
        folder.mkdir()
        engine = PackedEngine(replace(recipe(folder, dtype="float32"), engine="packed", slots=3), folder)
        engine.base.backend = lambda adapters, backend=backend: backend  # type: ignore[misc]
        wanted = [replace(s, hyperparameters=replace(s.hyperparameters, learning_rate=1e-3)) for s in segments("main")[:3]]
        outcomes = run_segments(engine, wanted)
        assert [o.state for o in outcomes] == [State.COMPLETED] * 3, outcomes[0].message
        engines[backend] = [o.validation_loss for o in outcomes]
    assert engines["grouped"] == pytest.approx(engines["loop"], abs=1e-4)


class Exhausted(torch.OutOfMemoryError):
    """As CUDA's."""


def test_out_of_memory_halves_the_pass_and_goes_on(packed: PackedEngine, root: Path, reference, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """A device that holds 100 tokens: passes shrink until they fit, and no result changes."""
    passed: list[int] = []
    nll = packed.base.nll

    def limited(flat, adapters, step_of=None):  # type: ignore[no-untyped-def]
        result = nll(flat, adapters, step_of)
        passed.append(flat.tokens)
        if flat.tokens > 100:
            raise Exhausted("CUDA out of memory")
        return result

    monkeypatch.setattr(packed.base, "nll", limited)
    room, packed.room = packed.room, 2048
    wanted = segments("small")
    outcomes = run_segments(packed, wanted)
    learnt, packed.room = packed.room, room
    assert_same(outcomes, [adapter(root, s) for s in wanted], reference)
    assert learnt <= 100
    assert sum(tokens > 100 for tokens in passed) < 12  # it learns; it does not try again and again


def test_out_of_memory_with_one_example_frees_slots_then_gives_up(packed: PackedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(flat, adapters, step_of=None):  # type: ignore[no-untyped-def]
        raise Exhausted("CUDA out of memory")

    monkeypatch.setattr(packed.base, "nll", never)
    room = packed.room
    outcomes = run_segments(packed, segments("impossible"))
    packed.room = room
    assert {o.state for o in outcomes} == {State.OUT_OF_MEMORY}
    assert "lora_r" in outcomes[0].message


def test_curves_progress_and_base_loss(packed: PackedEngine, root: Path) -> None:
    heard: list[Progress] = []
    wanted = [replace(s, validate_at=(0, 5, 10)) for s in segments("curves")]
    outcomes = run_segments(packed, wanted, tell=heard.append)
    hf = HfEngine(recipe(root), root)
    expected = run_segments(hf, [replace(s, run="curves-hf") for s in wanted[:2]])
    for one, two in zip(outcomes[:2], expected, strict=True):
        assert [p.step for p in one.curve] == [0, 5, 10, 20]
        for mine, theirs in zip(one.curve, two.curve, strict=True):
            assert mine.validation_loss == pytest.approx(theirs.validation_loss, abs=1e-10)
            assert mine.train_loss == (None if theirs.train_loss is None else pytest.approx(theirs.train_loss, abs=1e-10))
            assert mine.tokens == theirs.tokens
    assert {p.step for p in heard} >= {5, 10, 20}


def test_bad_target_modules_are_bad_input_and_neighbours_go_on(packed: PackedEngine) -> None:
    good, bad = segments("mixed")[0], replace(segment(4, trial=9, target_modules=("q_porj",)), run="mixed")
    outcomes = run_segments(packed, [bad, good])
    assert [o.state for o in outcomes] == [State.BAD_INPUT, State.COMPLETED]
    assert "q_proj" in outcomes[0].message


def test_several_devices_are_not_for_it(root: Path) -> None:
    with pytest.raises(NotPackableError, match="devices"):
        PackedEngine(replace(recipe(root), engine="packed", devices_per_trial=2), root)
