"""Where memory runs out, wherever that is: passes become smaller, lanes fewer, and no result changes. What a trial is told to have used.

A GPU's branches run on the CPU here: what torch.cuda would say is made up, what is computed is not.
"""

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_engine import adapter, recipe, segment

from loratune.data.batches import Tokens
from loratune.errors import DeviceLostError, ModelError
from loratune.finetune import checkpoint, memory, model
from loratune.finetune.engines import load_engine, run_segments
from loratune.finetune.packed import capacity, validation_pass
from loratune.finetune.packed.adapter import Adapter
from loratune.finetune.packed.engine import PackedEngine
from loratune.finetune.packed.slot import Slot
from loratune.work import Outcome, Segment, State

TRIALS = [{"lora_r": 4}, {"lora_r": 6, "lora_dropout": 0.1, "batch_size": 3}, {"lora_r": 3, "target_modules": "all-linear"}]
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def segments(run: str) -> list[Segment]:
    return [replace(segment(8, trial=k, validate_at=(4,), **h), run=run) for k, h in enumerate(TRIALS)]  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("study")


@pytest.fixture(scope="module")
def engine(root: Path) -> Iterator[PackedEngine]:
    made = PackedEngine(replace(recipe(root, checkpoint_steps=3), engine="packed", slots=3), root)
    yield made
    made.close()


@pytest.fixture(scope="module")
def expected(engine: PackedEngine) -> list[Outcome]:
    return run_segments(engine, segments("expected"))


@pytest.fixture(autouse=True)
def as_it_was(engine: PackedEngine) -> Iterator[None]:
    rooms = engine.room, engine.validation_room
    yield
    engine.room, engine.validation_room = rooms
    engine._limit, engine.device = engine.slots, torch.device("cpu")
    engine._base_loss = None
    assert not engine._occupied
    assert not engine._returned


def when_crowded(engine: PackedEngine, action: Callable[..., object], *, most: int = 1) -> Callable[..., object]:
    """The action, for which there is no memory while more than `most` lanes are there."""

    def limited(*given: object, **options: object) -> object:
        if len(engine._occupied) > most:
            raise FULL
        return action(*given, **options)

    return limited


# Where memory is wanted, and the place in the code that wants it.
PLACES = {
    "an adapter's weights": (Adapter, "__init__"),
    "the first step's moments": (torch.optim.AdamW, "step"),
    "a gradient's norm": (torch.nn.utils, "get_total_norm"),
    "a validation": (validation_pass, "validate_together"),
    "a checkpoint": (checkpoint, "capture"),
    "saving the adapter": (Adapter, "save"),
    "a pass": (capacity.PackedBase, "nll"),
    "anything else": (Slot, "offer"),
}


@pytest.mark.parametrize("place", PLACES)
def test_lanes_wait_for_a_slot_and_end_as_ever(
    engine: PackedEngine, root: Path, expected: list[Outcome], place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory for two trials: three are trained, none is infeasible, each is what it would have been."""
    owner, name = PLACES[place]
    monkeypatch.setattr(owner, name, when_crowded(engine, getattr(owner, name), most=1))
    wanted = segments(place.replace(" ", "-").replace("'", ""))
    outcomes = run_segments(engine, wanted)
    assert [o.state for o in outcomes] == [State.COMPLETED] * 3, [o.message for o in outcomes]
    for one, two, was, now in zip(expected, outcomes, segments("expected"), wanted, strict=True):
        assert [p.step for p in two.curve] == [4, 8]
        assert two.validation_loss == pytest.approx(one.validation_loss, abs=1e-9)
        before, after = adapter(root, was), adapter(root, now)
        for key in before:
            torch.testing.assert_close(after[key], before[key], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("place", ["the first step's moments", "a checkpoint", "saving the adapter"])
def test_only_what_does_not_fit_alone_is_infeasible(
    engine: PackedEngine, expected: list[Outcome], place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest of three trials never finds the memory it wants; its neighbours do."""
    owner, name = PLACES[place]
    action = getattr(owner, name)

    def limited(first, *given: object, **options: object) -> object:  # type: ignore[no-untyped-def]
        if place == "saving the adapter":
            layers = len(first.layers)
        elif place == "a checkpoint":
            layers = len([lane for lane in engine._occupied if lane.adapter.parameters is first and len(lane.adapter.layers) > 4])
            layers = 14 if layers else 4
        else:
            layers = 14 if any(lane.adapter.optimizer is first and len(lane.adapter.layers) > 4 for lane in engine._occupied) else 4
        if layers > 4:
            raise FULL
        return action(first, *given, **options)

    monkeypatch.setattr(owner, name, limited)
    outcomes = run_segments(engine, segments(f"large-{len(place)}"))
    assert [o.state for o in outcomes] == [State.COMPLETED, State.COMPLETED, State.OUT_OF_MEMORY], [o.message for o in outcomes]
    assert "lora_r 3" in outcomes[2].message
    for one, two in zip(expected[:2], outcomes[:2], strict=True):
        assert two.validation_loss == pytest.approx(one.validation_loss, abs=1e-9)


def test_a_validation_is_halved_before_anybody_leaves(
    engine: PackedEngine, expected: list[Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    together, rooms, most = validation_pass.validate_together, [], []

    def small(base, adapters, tokens, *, room: int, **options):  # type: ignore[no-untyped-def]
        rooms.append(room)
        most.append(len(engine._occupied))
        if room > 100:
            raise FULL
        return together(base, adapters, tokens, room=room, **options)

    monkeypatch.setattr(validation_pass, "validate_together", small)
    outcomes = run_segments(engine, segments("halved"))
    assert [o.validation_loss for o in outcomes] == pytest.approx([o.validation_loss for o in expected], abs=1e-9)
    assert max(most) == 3
    assert sum(room > 100 for room in rooms) <= 8, "it learns"


def test_stopping_in_a_validation_is_no_crash(engine: PackedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = threading.Event()

    def interrupted(*_: object, **__: object) -> None:
        stop.set()
        raise InterruptedError

    monkeypatch.setattr(validation_pass, "validate_together", interrupted)
    assert {o.state for o in run_segments(engine, segments("interrupted"), stop=stop)} == {State.CANCELLED}


def test_a_failed_pass_is_gone_before_memory_is_measured_again(engine: PackedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its graph holds activations: halving would find the device as full as before."""
    held: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    free, failed = memory.free, []

    def fails(module, arguments) -> None:  # type: ignore[no-untyped-def]
        if torch.is_grad_enabled() and not failed:
            failed.append(True)
            held.append(weakref.ref(arguments[0]))
            engine.base._pass.hidden = arguments[0]
            raise torch.OutOfMemoryError("CUDA out of memory")  # a new one: an error keeps the frames that it passed

    def measured(device: torch.device) -> None:
        free(device)
        alive.append(sum(one() is not None for one in held))

    handle = engine.base.head.register_forward_pre_hook(fails, prepend=True)
    monkeypatch.setattr(memory, "free", measured)
    outcomes = run_segments(engine, segments("gone")[:1])
    handle.remove()
    assert outcomes[0].state is State.COMPLETED
    assert failed
    assert alive
    assert not any(alive)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: uncorrectable ECC error encountered"),
        torch.AcceleratorError("CUDA error: device-side assert triggered"),
        RuntimeError("CUDA error: unspecified launch failure"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
        RuntimeError("HIP error: an illegal memory access was encountered"),
    ],
    ids=str,
)
def test_a_lost_device_ends_the_engine(engine: PackedEngine, error: RuntimeError, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the trials: none of them is told to have crashed."""

    def fails(*_: object, **__: object) -> None:
        raise error

    told: list[object] = []
    monkeypatch.setattr(engine.base, "nll", fails)
    waiting = iter(segments("lost"))
    with pytest.raises(DeviceLostError, match="Run the same command again"):
        engine.run(lambda wait: next(waiting, None), told.append, threading.Event())
    assert not told
    engine._occupied.clear()


def test_an_error_of_another_kind_asks_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def dead(device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    cuda, odd = torch.device("cuda"), ValueError("odd")
    monkeypatch.setattr(torch.cuda, "synchronize", dead)
    assert memory.is_device_lost(odd, cuda)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert not memory.is_device_lost(odd, cuda)
    assert not memory.is_device_lost(odd, torch.device("cpu"))
    for out_of_memory in (FULL, RuntimeError("CUDA error: out of memory"), torch.AcceleratorError("CUDA error: out of memory")):
        assert memory.is_out_of_memory(out_of_memory)
        assert not memory.is_device_lost(out_of_memory, cuda)


def test_loading_without_memory_is_bad_input(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise FULL

    for place in ((model, "load"), (capacity, "measure")):
        for name in ("packed", "hf") if place[0] is model else ("packed",):
            with monkeypatch.context() as patch:
                patch.setattr(*place, full)
                with pytest.raises(ModelError, match=r"out of memory while loading it on .* load_in_4bit or a smaller model"):
                    load_engine(replace(recipe(root), engine=name), root)


class Gpu:
    """What torch.cuda tells of a GPU on which a pass takes 10 bytes per token of its flat batch."""

    def __init__(self, engine: PackedEngine, patch: pytest.MonkeyPatch, *, free: int = 10**9) -> None:
        self.allocated, self.peak, self.passes = 5000, 5000, []  # type: ignore[var-annotated]
        nll = engine.base.nll

        def counted(flat, adapters, step_of=None):  # type: ignore[no-untyped-def]
            self.passes.append(flat.tokens)
            self.peak = max(self.peak, self.allocated + 10 * flat.tokens)
            if 10 * flat.tokens > free:
                raise FULL
            return nll(flat, adapters, step_of)

        patch.setattr(engine.base, "nll", counted)
        for name, value in {
            "memory_allocated": lambda device: self.allocated,
            "max_memory_allocated": lambda device: self.peak,
            "reset_peak_memory_stats": lambda device: setattr(self, "peak", self.allocated),
            "memory_reserved": lambda device: 6000,
            "mem_get_info": lambda device: (free, 10**12),
            "synchronize": lambda device: None,
            "empty_cache": lambda: None,
            "get_device_properties": lambda device: type("Properties", (), {"name": "a GPU", "total_memory": 10**12}),
        }.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(memory, "peak_bytes", torch.cuda.max_memory_allocated)  # also of a base model on the CPU
        patch.setattr(memory, "reset_peak", torch.cuda.reset_peak_memory_stats)


def test_the_peak_is_the_trials_own(engine: PackedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, or beside others of other sizes, before or after them: the model, its own state and its own tokens."""
    gpu = Gpu(engine, monkeypatch)
    engine.device = torch.device("cuda")
    monkeypatch.setattr(engine, "capacity", replace(engine.capacity, fixed=5000))
    wanted = [replace(s, hyperparameters=replace(s.hyperparameters, batch_size=30), validate_at=()) for s in segments("peak")]
    together = [o.peak_memory_bytes for o in run_segments(engine, wanted)]
    alone = []
    for one in (replace(s, run="peak-alone") for s in wanted):
        gpu.passes.clear()
        (outcome,) = run_segments(engine, [one])
        alone.append(outcome.peak_memory_bytes)
        assert outcome.peak_memory_bytes == 5000 + 16 * outcome.trainable_parameters + 10 * max(gpu.passes)
        assert outcome.device == "a GPU, 931 GiB"
    assert together == pytest.approx(alone, rel=0.15)  # a pass's beginnings are shared as its examples have it
    assert len(set(alone)) == 3


def test_seconds_are_synchronised(engine: PackedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU still computes when a pass returns: waiting for it is the pass's time, not the next one's."""
    monkeypatch.setattr(memory, "synchronize", lambda device: time.sleep(0.1) if device is engine.base.device else None)
    monkeypatch.setattr(memory, "fetched", lambda x: (time.sleep(0.1), x.tolist())[1])
    slow, quick = (replace(segment(2, trial=k, batch_size=n), run="seconds") for k, n in enumerate((20, 2)))
    outcomes = run_segments(engine, [slow, quick])
    assert sum(o.train_seconds for o in outcomes) >= 0.2
    assert outcomes[0].train_seconds > outcomes[1].train_seconds


class Long:
    """Examples of which the longest has 1,500 tokens."""

    lengths = np.asarray([1500, 1400, 30, 1200, 20])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int, /) -> tuple[np.ndarray, np.ndarray]:
        n = int(self.lengths[index])
        return ((np.arange(n) * (index + 2)) % 60 + index).astype(np.int32), np.arange(n) > 2


@pytest.mark.parametrize("tokens", [Long(), None], ids=["long", "short"])
def test_the_probe_finds_the_bytes_per_token(engine: PackedEngine, tokens: Tokens | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where one example has more tokens than both probing passes were to have."""
    gpu = Gpu(engine, monkeypatch)
    tokens = tokens or engine.train
    longest = np.argsort(-np.asarray(tokens.lengths), kind="stable")
    with torch.no_grad():
        monkeypatch.setattr(torch.Tensor, "backward", lambda self: None)
        assert capacity._per_token(engine.base, _any_adapter(engine), tokens, longest) == pytest.approx(10)
    assert len(gpu.passes) == 2
    if isinstance(tokens, Long):
        assert gpu.passes[1] >= 1.5 * gpu.passes[0] >= 1500


def test_a_probe_that_does_not_fit_says_what_it_knows(engine: PackedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "backward", lambda self: None)
    adapter, order = _any_adapter(engine), np.asarray([0, 1, 3, 2, 4])
    with torch.no_grad():
        with monkeypatch.context() as patch:
            Gpu(engine, patch, free=20_000)  # room for the small pass alone
            assert capacity._per_token(engine.base, adapter, Long(), order) == pytest.approx(10)
        with monkeypatch.context() as patch:
            Gpu(engine, patch, free=9_000)  # and for none
            assert capacity._per_token(engine.base, adapter, Long(), order) == pytest.approx((9_000 + 6000 - 5000) / 1500)


def test_the_limit_is_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2**30)
    assert memory.available(torch.device("cuda")) == 4 * 2**30


def _any_adapter(engine: PackedEngine) -> Adapter:
    h = segment().hyperparameters
    layers = {name: engine.base.features(name) for name in list(engine.base.linear)[:2]}
    return Adapter(layers, h, 0, engine.recipe.training, dtype=torch.float64, device=torch.device("cpu"))
