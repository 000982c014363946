"""Answers do not depend on what stands beside them: batch, shared beginning, other adapters. On real tiny models."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import peft
import pytest
import torch
from random_adapters import load_base, write_adapters

from loratune.downstream.answering.adapter_stack import Adapters, read_adapter
from loratune.downstream.answering.answerer import Answerer, ItemAnswer
from loratune.downstream.tasks.base import Benchmark, Item, Verdict, stratified
from loratune.downstream.tasks.bbh import Bbh
from loratune.downstream.tasks.mmlu import Mmlu, MmluLoglikelihood
from loratune.errors import ModelError
from loratune.finetune.model import BaseModel

RANKS = [4, 8, 8, 16]
PLACES = [0, 1, 2, 3, 4]  # the bare model, then the adapters


class Stories(Benchmark):
    """Short prompts to continue; nothing is decided before the end unless `letters` are enough."""

    name = title = version = "stories"
    chance = 0.0
    max_new_tokens = 12

    def __init__(self, *, temperature: float = 0.0, letters: int | None = None) -> None:
        self.temperature, self.letters = temperature, letters

    def items(self) -> list[Item]:
        begins = ["The cat", "Once upon a time there was a little girl", "Tom saw", "The sun is hot and", "A dog has a big red ball. He"]
        opening = "This is a story that everyone likes to hear, about animals and people and what they did one day: "
        return [Item(id=text, prompt=opening + text, shared=len(opening)) for text in begins]

    def score(self, items: Sequence[Item], answers: Sequence[str]) -> list[Verdict]:
        return [Verdict(score=0.0) for _ in items]

    def decided(self, item: Item, text: str) -> bool:
        return self.letters is not None and len(text) >= self.letters


@pytest.fixture(scope="module")
def base(tinystories: Path) -> BaseModel:
    return load_base(tinystories)


@pytest.fixture(scope="module")
def folders(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_adapters(base, tmp_path_factory.mktemp("adapters"), RANKS)


@pytest.fixture
def adapters(base: BaseModel, folders: list[Path]) -> Iterator[Adapters]:
    hooked = Adapters(base, [None, *(read_adapter(folder, base) for folder in folders)])
    yield hooked
    hooked.close()


def asked(answerer: Answerer, benchmark: Benchmark, items: Sequence[Item], places: Sequence[int]) -> dict[tuple[int, str], ItemAnswer]:
    found = {}
    for batch, answers in answerer.answers(benchmark, items, places, seed=7):
        for place, own in zip(places, answers, strict=True):
            found |= {(place, item.id): answer for item, answer in zip(batch, own, strict=True)}
    assert len(found) == len(items) * len(places)
    return found


def texts(found: dict[tuple[int, str], ItemAnswer]) -> dict[tuple[int, str], str]:
    return {key: answer.text for key, answer in found.items()}


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_together_as_one_by_one(base: BaseModel, adapters: Adapters, temperature: float) -> None:
    benchmark = Stories(temperature=temperature)
    items = benchmark.items()
    together = texts(asked(Answerer(base, adapters), benchmark, items, PLACES))
    alone: dict[tuple[int, str], str] = {}
    for place in PLACES:
        for item in items:
            alone |= texts(asked(Answerer(base, adapters, share=False), benchmark, [item], [place]))
    assert together == alone
    assert len({tuple(together[place, item.id] for item in items) for place in PLACES}) == len(PLACES)  # each model speaks for itself


def test_as_transformers_and_peft(base: BaseModel, adapters: Adapters, folders: list[Path]) -> None:
    benchmark = Stories()
    items = benchmark.items()
    ours = texts(asked(Answerer(base, adapters), benchmark, items, PLACES))
    adapters.close()
    reference = load_base(Path(base.model.config.name_or_path))
    for place in PLACES:
        model = peft.PeftModel.from_pretrained(reference.model, str(folders[place - 1])) if place else reference.model
        for item in items:
            ids = reference.tokenizer(item.prompt, return_tensors="pt")["input_ids"]
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0)[0]
            whole, asked_for = (reference.tokenizer.decode(i, skip_special_tokens=True) for i in (out, ids[0]))
            assert ours[place, item.id] == whole[len(asked_for) :]
        if place:
            model.unload()


def test_real_prompts(base: BaseModel, adapters: Adapters, shared_data: Path) -> None:
    """Few-shot prompts of two protocols, lengths and shared beginnings mixed; the small context makes them lose examples."""
    for benchmark, number in ((Mmlu(shared_data), 6), (Bbh(shared_data), 4)):
        items = stratified(benchmark.items(), number)
        together = asked(Answerer(base, adapters), benchmark, items, [4, 0])
        alone: dict[tuple[int, str], ItemAnswer] = {}
        for place in (4, 0):
            alone |= asked(Answerer(base, adapters, rows=1, share=False), benchmark, items, [place])
        assert together == alone
        assert any(answer.shots is not None and answer.shots < 3 for answer in together.values())


def test_log_likelihoods(base: BaseModel, adapters: Adapters, shared_data: Path) -> None:
    benchmark = MmluLoglikelihood(shared_data, shots=1)
    items = stratified(benchmark.items(), 4)
    long = [Item(id="long", prompt="The cat sat", choices=(" on the mat and slept", " on", " under the table"))]
    together = asked(Answerer(base, adapters), benchmark, items + long, PLACES)
    for place in PLACES:
        alone = asked(Answerer(base, adapters, rows=1, share=False), benchmark, items + long, [place])
        for key, answer in alone.items():
            assert together[key].log_likelihoods == pytest.approx(answer.log_likelihoods, abs=1e-4)
    assert len({together[place, "long"].log_likelihoods for place in PLACES}) == len(PLACES)


def test_log_likelihood_is_the_sum_of_token_log_probabilities(base: BaseModel, adapters: Adapters) -> None:
    item = Item(id="x", prompt="The cat sat", choices=(" on", " on the mat and slept", " happily"))
    ours = asked(Answerer(base, adapters), MmluLoglikelihood(), [item], [0])[0, "x"]
    for choice, value in zip(item.choices, ours.log_likelihoods, strict=True):
        asked_for, whole = (base.tokenizer(text)["input_ids"] for text in (item.prompt, item.prompt + choice))
        whole = asked_for + whole[len(asked_for) :]  # as the harness has it, where a token reaches over the border
        logits = base.model(torch.tensor([whole])).logits[0].log_softmax(-1)
        expected = sum(float(logits[place - 1, whole[place]]) for place in range(len(asked_for), len(whole)))
        assert value == pytest.approx(expected, abs=1e-4)


def test_log_likelihoods_beyond_the_context(base: BaseModel, adapters: Adapters) -> None:
    """As lm-evaluation-harness: each choice cuts as much of the prompt's beginning as it needs, and all of it counts."""
    item = Item(id="x", prompt="One day" + " a cat sat and a dog ran" * 90, choices=(" on", " on the mat and slept", " happily"))
    context = base.model.config.max_position_embeddings
    ours = asked(Answerer(base, adapters), MmluLoglikelihood(), [item], [0])[0, "x"]
    assert ours.cut
    for choice, value in zip(item.choices, ours.log_likelihoods, strict=True):
        asked_for, whole = (base.tokenizer(text)["input_ids"] for text in (item.prompt, item.prompt + choice))
        spoken = len(whole) - len(asked_for)
        run = (asked_for + whole[len(asked_for) :])[-(context + 1) :]
        logits = base.model(torch.tensor([run[:-1]])).logits[0].log_softmax(-1)
        expected = sum(float(logits[place - 1, run[place]]) for place in range(len(run) - spoken, len(run)))
        assert value == pytest.approx(expected, abs=1e-3)


def test_stops_when_decided(base: BaseModel, adapters: Adapters) -> None:
    """A decided answer is a beginning of the undecided one, and costs fewer passes."""
    whole = texts(asked(Answerer(base, adapters), Stories(), Stories().items(), [0]))
    short = Stories(letters=3)
    passes = 0

    def count(*_: object) -> None:
        nonlocal passes
        passes += 1

    handle = base.model.register_forward_hook(count)
    begun = texts(asked(Answerer(base, adapters), short, short.items(), [0]))
    handle.remove()
    assert all(whole[key].startswith(text) and 3 <= len(text) < len(whole[key]) for key, text in begun.items())
    assert passes < Stories.max_new_tokens / 2


class UntilTwo(Stories):
    """Answers end at different lengths, each adapter's at its own."""

    max_new_tokens = 24

    def decided(self, item: Item, text: str) -> bool:
        return text.count("a") >= 2


def test_answers_of_different_lengths(base: BaseModel, adapters: Adapters) -> None:
    items = UntilTwo().items()
    together = texts(asked(Answerer(base, adapters), UntilTwo(), items, PLACES))
    alone: dict[tuple[int, str], str] = {}
    for place in PLACES:
        for item in items:
            alone |= texts(asked(Answerer(base, adapters, share=False), UntilTwo(), [item], [place]))
    assert together == alone
    assert len({len(text) for text in together.values()}) > 10
    assert sum(text.count("a") >= 2 for text in together.values()) > 5


def test_finished_rows_leave(base: BaseModel, adapters: Adapters, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each adapter's own: a pass holds no more rows of any than the adapter that is furthest behind still writes."""
    answerer, widths = Answerer(base, adapters), []
    run = answerer.forward.run
    monkeypatch.setattr(answerer.forward, "run", lambda ids, *rest, **more: widths.append(len(ids)) or run(ids, *rest, **more))
    lengths: dict[int, list[int]] = {place: [] for place in PLACES}
    for (place, _), text in texts(asked(answerer, UntilTwo(), UntilTwo().items(), PLACES)).items():
        lengths[place].append(len(text))
    assert widths[-1] < widths[2] / 2
    assert all(width % len(PLACES) == 0 for width in widths)


def test_a_prompt_in_several_passes(base: BaseModel, adapters: Adapters, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters whose rows are too many for one pass over prompts take turns."""
    expected = texts(asked(Answerer(base, adapters), Stories(), Stories().items(), PLACES))
    answerer, widths = Answerer(base, adapters), []
    run = answerer.forward.run
    monkeypatch.setattr(answerer.forward, "run", lambda ids, *rest, **more: widths.append(len(ids)) or run(ids, *rest, **more))
    monkeypatch.setattr(answerer.forward, "tokens", 40)
    assert texts(asked(answerer, Stories(), Stories().items(), PLACES)) == expected
    assert {1, 2} <= set(widths)


def test_out_of_memory(base: BaseModel, adapters: Adapters, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts in smaller batches, then decoded in smaller ones: the same answers."""
    expected = texts(asked(Answerer(base, adapters), UntilTwo(), UntilTwo().items(), PLACES))
    answerer, refused = Answerer(base, adapters), [0, 0]
    run = answerer.forward.run

    def small(ids: torch.Tensor, *rest: object, **more: object) -> object:
        if len(ids) > 2 * len(PLACES):
            refused[ids.shape[1] == 1] += 1
            raise torch.OutOfMemoryError
        return run(ids, *rest, **more)

    monkeypatch.setattr(answerer.forward, "run", small)
    assert texts(asked(answerer, UntilTwo(), UntilTwo().items(), PLACES)) == expected
    assert all(refused)


def test_interrupted(base: BaseModel, adapters: Adapters) -> None:
    with pytest.raises(InterruptedError):
        list(Answerer(base, adapters).answers(Stories(), Stories().items(), [0], interrupted=lambda: True))


def test_prompt_beyond_the_context(base: BaseModel, adapters: Adapters) -> None:
    item = Item(id="x", prompt="word " * 2000)
    answer = asked(Answerer(base, adapters), Stories(), [item], [0])[0, "x"]
    assert answer.cut
    assert answer.text


def test_wrong_adapters(base: BaseModel, folders: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no readable adapter"):
        read_adapter(tmp_path, base)
    lora = read_adapter(folders[0], base)
    name, (a, b) = next(iter(lora.weights.items()))
    for weights in ({name: (a[:-1], b)}, {"model.elsewhere": (a, b)}):
        with pytest.raises(ModelError, match="do not fit the model"):
            Adapters(base, [type(lora)(folder=lora.folder, rank=lora.rank, weights=weights)])


def test_bare_model_is_untouched(base: BaseModel, folders: list[Path]) -> None:
    ids = torch.tensor([base.tokenizer("The cat sat on")["input_ids"]])
    before = base.model(ids).logits
    hooked = Adapters(base, [None, read_adapter(folders[0], base)])
    with hooked.use([0]):
        assert torch.equal(base.model(ids).logits, before)
    with hooked.use([1]):
        assert not torch.allclose(base.model(ids).logits, before)
    hooked.close()
    assert torch.equal(base.model(ids).logits, before)
