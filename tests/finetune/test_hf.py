"""The reference engine on a real (tiny, random) Llama: exact results, whatever happens on the way."""

import math
import random
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_engine
import torch
from tiny_engine import adapter, recipe, run, segment

from loratune.data.batches import collate, response_tokens
from loratune.data.order import order
from loratune.data.shared_prefix import dropout_owners
from loratune.finetune import optimisation
from loratune.finetune.engines import load_engine, run_segments
from loratune.finetune.hf import HfEngine
from loratune.finetune.lora import adapter_parameters, attach
from loratune.finetune.peft_layers import detach
from loratune.finetune.validation import token_nll
from loratune.record.paths import StudyPaths
from loratune.work import Outcome, State


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    root = tmp_path_factory.mktemp("study")
    return load_engine(recipe(root), root)


def losses(outcome: Outcome) -> list[tuple[int, float | None, float | None]]:
    return [(p.step, p.train_loss, p.validation_loss) for p in outcome.curve]


def test_agrees_with_a_bare_loop(engine) -> None:  # type: ignore[no-untyped-def]
    """Accumulation, normalisation, clipping, schedule and dropout, against the definitions written out."""
    wanted = segment(trial=1, weight_decay=0.1)
    outcome = run(engine, wanted)
    h, base = wanted.hyperparameters, engine.base.model
    wrapped, key = attach(base, h, 0)
    parameters = adapter_parameters(wrapped)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1.0, weight_decay=0.1)
    wrapped.train()
    for step, batch_examples in enumerate(order(0, len(engine.train), 6 * 7).reshape(6, 7)):
        optimizer.zero_grad()
        total, owners = 0.0, dropout_owners(engine.train, batch_examples)
        for index, example in enumerate(batch_examples):
            batch = collate(engine.train, [example], owners=[owners[index]], pad_id=0)
            key.set(step, batch.owners, torch.arange(batch.ids.shape[1]))
            total = total + token_nll(wrapped, None, batch).sum() / response_tokens(engine.train, batch_examples)
        total.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        warmup = 1
        factor = step / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * (step - warmup) / (6 - warmup)))
        optimizer.param_groups[0]["lr"] = h.learning_rate * factor
        optimizer.step()
    saved = adapter(engine.root, wanted)
    for name, p in parameters.items():
        torch.testing.assert_close(saved[name.replace(".default", "")], p.detach(), rtol=1e-9, atol=1e-12)
    detach(base)
    assert outcome.tokens == int(engine.train.lengths[order(0, len(engine.train), 42)].sum())
    assert outcome.trainable_parameters == sum(p.numel() for p in parameters.values())
    assert outcome.peak_memory_bytes > 0
    assert outcome.train_seconds > 0
    assert "CPU" in outcome.device


def test_micro_batch_size_and_checkpointing_change_nothing(engine, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    expected = run(engine, segment(trial=2)).validation_loss
    tiny_engine.build_model(tmp_path / "model")
    for options in ({"micro_batch_size": 7}, {"micro_batch_size": 2, "gradient_checkpointing": True, "validation_batch_size": 1}):
        other = load_engine(recipe(tmp_path, **options), tmp_path)
        assert run(other, segment(trial=len(options))).validation_loss == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_schedules_are_transformers(schedule: str) -> None:
    import transformers

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    theirs = transformers.get_scheduler(name, optimizer, num_warmup_steps=3, num_training_steps=20)
    for step in range(20):
        assert optimisation.learning_rate_factor(schedule, step, 3, 20) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_pause_and_resume_is_bit_exact(dtype: str, tmp_path: Path) -> None:
    engine = load_engine(recipe(tmp_path, dtype=dtype), tmp_path)
    whole = segment(trial=0, validate_at=(0, 2))
    outcome = run(engine, whole)
    first, second = segment(trial=1, stop=2, validate_at=(0,)), segment(trial=1, start=2, validate_at=(2,))
    early = run(engine, first)
    assert (StudyPaths(tmp_path).of(first).folder / "adapter").is_dir()
    engine = load_engine(recipe(tmp_path, dtype=dtype), tmp_path)  # a new process would know no more
    late = run(engine, second)
    assert same(adapter(tmp_path, whole), adapter(tmp_path, second))
    assert late.validation_loss == outcome.validation_loss
    assert [p.validation_loss for p in early.curve] == [p.validation_loss for p in outcome.curve[:2]]
    assert [p.step for p in late.curve] == [2, 6]
    assert early.tokens + late.tokens == outcome.tokens
    checkpoints = sorted(p.name for p in (StudyPaths(tmp_path).of(second).folder).glob("*checkpoint*"))
    assert checkpoints == ["checkpoint-0000006.safetensors"]
    again = run(engine, second)  # its outcome was lost after all was done: nothing is trained again
    assert again.validation_loss == late.validation_loss
    assert again.tokens == late.tokens


def test_stop_writes_a_checkpoint_and_the_rest_gives_the_same(engine) -> None:  # type: ignore[no-untyped-def]
    expected = run(engine, segment(trial=3, total=40, validate_at=(10,)))
    stop = threading.Event()
    wanted = segment(trial=4, total=40, validate_at=(10,))
    cancelled = run(engine, wanted, stop=stop, report=lambda p: stop.set() if p.step >= 10 else None, state=State.CANCELLED)
    assert 10 <= cancelled.curve[-1].step < 40
    assert cancelled.validation_loss is None
    later = run_segments(engine, [wanted, segment(trial=5)], stop=stop)  # still set
    assert [o.state for o in later] == [State.CANCELLED, State.CANCELLED]
    resumed = run(engine, wanted)
    assert losses(resumed) == losses(expected)
    assert same(adapter(engine.root, wanted), adapter(engine.root, segment(trial=3)))


def test_a_lost_checkpoint_costs_time_not_the_result(engine) -> None:  # type: ignore[no-untyped-def]
    expected = run(engine, segment(trial=6))
    assert run(engine, segment(trial=7, start=4)).validation_loss == expected.validation_loss
    assert "training again from step 0" in (StudyPaths(engine.root).of(segment(trial=7)).folder / "log.txt").read_text()


def test_trials_do_not_touch_each_other(engine) -> None:  # type: ignore[no-untyped-def]
    """Base logits, generators, hooks and results are what they were after other trials, failed ones among them."""
    ids = torch.arange(20).view(2, 10)
    base = engine.base.model
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    with torch.no_grad():
        before = base(input_ids=ids).logits
    first = run(engine, segment(trial=10, validate_at=(0,)))
    modules = [(name, type(m)) for name, m in base.named_modules()]
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in base.modules())
    run(engine, segment(trial=11, learning_rate=1e300), state=State.DIVERGED)  # B A is beyond float64, whatever the kernels do with 1e60
    run(engine, segment(trial=12, target_modules=("q_prj",)), state=State.BAD_INPUT)
    run(engine, segment(trial=13, target_modules="all-linear", lora_r=8, use_rslora=True, lora_dropout=1.0))
    with torch.no_grad():
        assert torch.equal(base(input_ids=ids).logits, before)
    assert modules == [(name, type(m)) for name, m in base.named_modules()]
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in base.modules())
    assert not any(p.requires_grad for p in base.parameters())
    assert losses(run(engine, segment(trial=14, validate_at=(0,)))) == losses(first)
    drawn = (torch.rand(1).item(), random.random(), np.random.rand())
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    assert drawn == (torch.rand(1).item(), random.random(), np.random.rand())


def test_dropout_one_trains_nothing(engine) -> None:  # type: ignore[no-untyped-def]
    outcome = run(engine, segment(trial=20, lora_dropout=1.0, validate_at=(0,)))
    assert outcome.curve[0].validation_loss == outcome.validation_loss


def test_the_step_that_diverges_is_named(engine) -> None:  # type: ignore[no-untyped-def]
    outcome = run(engine, segment(trial=21, learning_rate=1e200, validate_at=(0,)), state=State.DIVERGED)
    assert "step" in outcome.message
    assert outcome.validation_loss is None
    assert [p.step for p in outcome.curve] == [0]
    assert "diverged" in (StudyPaths(engine.root).of(segment(trial=21)).folder / "log.txt").read_text()


def test_bad_input_says_what_is_allowed(engine) -> None:  # type: ignore[no-untyped-def]
    outcome = run(engine, segment(trial=22, target_modules=("q_prj",)), state=State.BAD_INPUT)
    assert "did you mean 'q_proj'" in outcome.message
    assert "down_proj" in outcome.message


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (MemoryError(), State.OUT_OF_MEMORY),
        (torch.OutOfMemoryError("CUDA out of memory"), State.OUT_OF_MEMORY),
        (ValueError("odd"), State.CRASHED),
    ],
)
def test_failures_have_a_kind(engine, monkeypatch: pytest.MonkeyPatch, error: Exception, state: State) -> None:  # type: ignore[no-untyped-def]
    from loratune.finetune import trainer

    def fail(*args: object) -> None:
        raise error

    wanted = segment(trial=23 + len(str(error)))
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "token_nll", fail)
        outcome = run(engine, wanted, state=state)
    assert outcome.message
    assert "Traceback" in (StudyPaths(engine.root).of(wanted).log).read_text()
    assert run(engine, wanted).state is State.COMPLETED


def test_smaller_batches_are_tried_before_a_configuration_is_infeasible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for one example in training, two in validation, the same result; the next trial begins with what was learnt."""
    from loratune.finetune import hf, trainer

    engine = HfEngine(recipe(tmp_path), tmp_path)
    expected = run(engine, segment(trial=1, validate_at=(3,)))
    sizes: list[tuple[str, int]] = []

    def limited(where: str, most: int, nll):  # type: ignore[no-untyped-def]
        def wanted(model, head, batch):  # type: ignore[no-untyped-def]
            sizes.append((where, len(batch.ids)))
            if len(batch.ids) > most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return nll(model, head, batch)

        return wanted

    monkeypatch.setattr(trainer, "token_nll", limited("training", 1, trainer.token_nll))
    validation = sys.modules[hf.validate.__module__]
    monkeypatch.setattr(validation, "token_nll", limited("validation", 2, validation.token_nll))
    outcome = run(engine, segment(trial=2, validate_at=(3,)))
    assert outcome.validation_loss == pytest.approx(expected.validation_loss, abs=1e-7)
    assert max(size for _, size in sizes) > 2
    sizes.clear()
    run(engine, segment(trial=3, validate_at=(3,)))
    assert max(sizes) == ("validation", 2)
    assert max(size for where, size in sizes if where == "training") == 1


def test_real_allocation_failure_is_out_of_memory(engine) -> None:  # type: ignore[no-untyped-def]
    outcome = run(engine, segment(trial=40, lora_r=2**42), state=State.OUT_OF_MEMORY)
    assert "micro_batch_size" in outcome.message
    run(engine, segment(trial=41))


def test_progress_and_log(engine) -> None:  # type: ignore[no-untyped-def]
    said = []
    run(engine, segment(trial=42, validate_at=(0, 3)), report=said.append)
    validated = [(p.step, p.validation_loss) for p in said if p.validation_loss is not None]
    assert [step for step, _ in validated] == [0, 3, 6]
    assert all(p.total_steps == 6 for p in said)
    assert [p.tokens for p in said] == sorted(p.tokens for p in said)
    log = (StudyPaths(engine.root).of(segment(trial=42)).folder / "log.txt").read_text()
    assert log.count("validation loss") == 3


def test_reports_at_most_once_a_second(engine) -> None:  # type: ignore[no-untyped-def]
    said: list[float] = []
    began = time.monotonic()
    run(engine, segment(total=60, trial=43), report=lambda p: said.append(time.monotonic()))
    assert len(said) <= time.monotonic() - began + 2


def test_learns_on_a_real_model(tinystories: Path, shared_data: Path, tmp_path: Path) -> None:
    """tinystories656k on Alpaca: the loss falls a lot, and a moderate learning rate beats a tiny one."""
    from loratune.data.prepare import prepare
    from loratune.data.sources import DataRecipe, DataSource

    data = DataRecipe(
        train=(DataSource(path=str(shared_data / "alpaca" / "alpaca_random_9k.json")),),
        validation_count=24,
        train_count=96,
        max_length=128,
        on_bad_rows="skip",
    )
    prepared = prepare(data, tokenizer=str(tinystories), cache=tmp_path / "cache")
    engine = load_engine(
        replace(recipe(tmp_path, model=tinystories, dtype="auto", micro_batch_size=4), data=str(prepared.folder)), tmp_path
    )
    outcomes = [
        run(engine, segment(total=12, trial=i, batch_size=8, learning_rate=lr, validate_at=(0,))) for i, lr in enumerate((5e-3, 1e-5))
    ]
    base, good = outcomes[0].curve[0].validation_loss, outcomes[0].validation_loss
    assert good is not None
    assert base is not None
    assert good < base - 0.3
    assert good < (outcomes[1].validation_loss or 0)


def test_what_the_packed_engine_cannot_train_hf_does(tmp_path: Path) -> None:
    """One trial over several devices is such a thing; the user is told, once."""
    engine = load_engine(replace(recipe(tmp_path), engine="packed", slots=4, devices_per_trial=2), tmp_path)
    assert isinstance(engine, HfEngine)
    assert engine.notice.startswith("the packed engine cannot train this model: ")
    assert engine.notice.endswith("; training one trial at a time with hf")
    outcomes = run_segments(engine, [segment(trial=trial, total=2) for trial in (3, 1)])
    assert [(o.key[:4], o.state) for o in outcomes] == [("0003", State.COMPLETED), ("0001", State.COMPLETED)]
