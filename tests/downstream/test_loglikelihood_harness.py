"""Log-likelihood scores equal lm-evaluation-harness's, item by item, and its tasks stand in our table. Its real code."""

import json
from pathlib import Path

import pytest
from random_adapters import load_base, write_adapters

from loratune.downstream.answering.adapter_stack import Adapters, read_adapter
from loratune.downstream.answering.answerer import Answerer
from loratune.downstream.tasks.base import stratified
from loratune.downstream.tasks.mmlu import LETTERS, MmluLoglikelihood, _questions
from loratune.errors import DataError, EvaluationError

lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'loratune[eval]'")

QUESTIONS = 200


def write_task(folder: Path, shared_data: Path, items: list[str], shots: int, subject: str | None = None) -> None:
    """The harness's own MMLU template, its data local: the given questions, and for examples the subject's."""
    home = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "default" / "_default_template_yaml"
    template = home.read_text().replace("dataset_path: cais/mmlu", "dataset_path: json")
    (folder / "_template").write_text(template)
    rows, dev = [], []
    for name, (question, options, letter), number, examples in _questions(shared_data, 5):
        if f"{name}/{number}" in items:
            rows.append({"question": question, "choices": list(options), "answer": LETTERS.index(letter), "subject": name})
        if name == subject and not dev:
            dev = [{"question": q, "choices": list(o), "answer": LETTERS.index(a), "subject": name} for q, o, a in examples]
    for split, some in (("test", rows), ("dev", dev or rows[:1])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    about = (subject or "{{subject}}").replace("_", " ")
    description = f"The following are multiple choice questions (with answers) about {about}.\\n\\n"
    if subject is None:
        description = "The following are multiple choice questions (with answers) about {{subject.replace('_', ' ')}}.\\n\\n"
    (folder / "local_mmlu.yaml").write_text(
        f'include: _template\ntask: local_mmlu\ndescription: "{description}"\nnum_fewshot: {shots}\n'
        f"dataset_kwargs:\n  data_files:\n    test: {folder}/test.jsonl\n    dev: {folder}/dev.jsonl\n"
    )


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("shots", [pytest.param(0, id="200 of all subjects"), pytest.param(5, id="five examples", marks=pytest.mark.slow)])
def test_mmlu_item_by_item(tinystories: Path, shared_data: Path, tmp_path: Path, shots: int) -> None:
    """200 questions of all subjects without examples; 100 of one subject with five, most cut at the 512 tokens of the context."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    subject = "college_computer_science" if shots else None
    benchmark = MmluLoglikelihood(shared_data, shots=shots)
    items = [item for item in benchmark.items() if item.group == subject] if subject else stratified(benchmark.items(), QUESTIONS)
    write_task(tmp_path, shared_data, [item.id for item in items], shots, subject)
    base = load_base(tinystories)
    folder = write_adapters(base, tmp_path, [8])[0]
    adapters = Adapters(base, [None, read_adapter(folder, base)])
    ours = {}
    for batch, (answers,) in Answerer(base, adapters).answers(benchmark, items, [1]):
        ours |= {item.id: (item, answer) for item, answer in zip(batch, answers, strict=True)}
    assert not shots or any(answer.cut for _, answer in ours.values())
    with adapters.use([1]):
        manager = TaskManager(include_path=str(tmp_path), include_defaults=False)  # its own thousands take half a minute
        model = HFLM(pretrained=base.model, tokenizer=base.tokenizer, batch_size=16, device="cpu")
        theirs = simple_evaluate(model, tasks=["local_mmlu"], task_manager=manager, bootstrap_iters=0)
    adapters.close()
    samples = theirs["samples"]["local_mmlu"]
    assert len(samples) == len(items)
    for item, sample in zip(items, samples, strict=True):
        assert sample["arguments"][0][0] == item.prompt
        values = [float(response[0][0]) for response in sample["resps"]]
        assert ours[item.id][1].log_likelihoods == pytest.approx(values, abs=2e-4)
        gaps = sorted(values, reverse=True)
        score = benchmark.score([item], [ours[item.id][1].text])[0].score
        assert score == sample["acc"] or gaps[0] - gaps[1] < 4e-4  # but for ties within rounding


def test_harness_task(tinystories: Path, shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task of the harness, local, in our results."""
    from loratune.downstream.tasks import harness

    listed = harness._listed
    items = [item.id for item in stratified(MmluLoglikelihood(shared_data, shots=0).items(), 12)]
    write_task(tmp_path, shared_data, items, 0)
    base = load_base(tinystories)
    adapters = Adapters(base, [None])
    harness.check_tasks(["local_mmlu"], tmp_path)
    judged = harness.run_task("local_mmlu", base, adapters, 0, folder=tmp_path, limit=10, allow_code=False, seed=0)
    adapters.close()
    assert [line["id"] for line in judged.lines] == [f"local_mmlu/{n}" for n in range(10)]
    assert {line["score"] for line in judged.lines} <= {0.0, 1.0}
    assert (judged.metric, judged.chance) == ("acc", 0.25)
    monkeypatch.setattr(harness, "_listed", lambda folder, *, defaults: listed(folder, defaults=False))
    with pytest.raises(EvaluationError, match="did you mean 'local_mmlu"):
        harness.check_tasks(["local_mmlo"], tmp_path)
    with pytest.raises(DataError, match="no folder"):
        harness.check_tasks(["local_mmlu"], tmp_path / "none")
