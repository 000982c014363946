"""The benchmarks against their protocols' text, on real data; an oracle scores 1 and a guesser scores chance."""

import random
from pathlib import Path

import pytest

from loratune.downstream.tasks.base import Benchmark, Item, stratified
from loratune.downstream.tasks.bbh import Bbh
from loratune.downstream.tasks.benchmarks import build_benchmark
from loratune.downstream.tasks.drop import DropBenchmark
from loratune.downstream.tasks.embedded import DemoChoice, DemoCode, DemoMatch
from loratune.downstream.tasks.mmlu import Mmlu, MmluLoglikelihood
from loratune.errors import DataError, EvaluationError
from loratune.plugs import BENCHMARKS
from loratune.statistics import bootstrap_mean

REAL = ("mmlu", "mmlu_loglikelihood", "bbh", "drop")
ITEMS = {"mmlu": 14_042, "mmlu_loglikelihood": 14_042, "bbh": 6_430, "demo_choice": 116, "demo_match": 406, "demo_code": 30}


def by_id(benchmark: Benchmark) -> dict[str, Item]:
    return {item.id: item for item in benchmark.items()}


@pytest.fixture(scope="module", params=[*REAL, "demo_choice", "demo_match"])
def benchmark(request: pytest.FixtureRequest, shared_data: Path) -> Benchmark:
    return build_benchmark(request.param, shared_data)


# --- oracle and guesser -----------------------------------------------------------------------------------------------


def test_items(benchmark: Benchmark) -> None:
    items = benchmark.items()
    assert len({item.id for item in items}) == len(items) == ITEMS.get(benchmark.name, len(items))
    for item in items:
        assert item.targets
        assert not item.prompt.endswith((" ", "\n"))
        assert not item.choices or (item.targets[0] in item.choices and len(set(item.choices)) == len(item.choices))
        assert not item.shots or item.shots[-1] == item.shared
    assert items == build_benchmark(benchmark.name, getattr(benchmark, "data", None) or _folder(benchmark)).items()


def _folder(benchmark: Benchmark) -> Path | None:
    file = getattr(benchmark, "file", None)
    return file.parent.parent if file else None


def test_oracle(benchmark: Benchmark) -> None:
    items = benchmark.items()
    for answer in ("{}", "{}" if items[0].choices else " {}\n\nSo it is."):
        if benchmark.name == "demo_match" and answer != "{}":
            continue  # there the whole answer counts
        right = [answer.format(item.targets[0]) for item in items]
        assert all(verdict.score == 1 for verdict in benchmark.score(items, right))


def test_guesser(benchmark: Benchmark) -> None:
    items, rng = benchmark.items(), random.Random(5)
    guesses = [rng.choice(item.choices or item.facts.get("options") or ["?"]) for item in items]
    scores = [verdict.score for verdict in benchmark.score(items, guesses)]
    groups = [item.group for item in items] if benchmark.mean_over_groups else None
    interval = bootstrap_mean(scores, 0, groups, level=0.999)
    assert interval.low <= benchmark.chance <= interval.high
    assert benchmark.chance == 0 or interval.high - interval.low < 0.3


def test_nothing_is_right_by_being_empty(benchmark: Benchmark) -> None:
    items = benchmark.items()
    assert not any(verdict.score for verdict in benchmark.score(items, [""] * len(items)))


def test_decided_means_decided(benchmark: Benchmark) -> None:
    """Whatever is written after a decided answer, the verdict stays; letter by letter, until it is."""
    items, rng = stratified(benchmark.items(), 60), random.Random(1)
    for item in items:
        if item.choices:
            continue
        for whole in (item.targets[0] + " and more", "\n" + item.targets[0] + "x", "".join(rng.choices("ABCx (1", k=6)), "É"):
            for end in range(len(whole) + 1):
                if benchmark.decided(item, whole[:end]):
                    first, *others = (benchmark.score([item], [whole[:end] + more])[0] for more in ("", "x", " B\nA", whole[end:]))
                    assert all(other.score == first.score for other in others)
                    break
    if not items[0].choices:
        assert not benchmark.decided(items[0], "")
        assert not benchmark.decided(items[0], "\n \ufffd")


def test_embedded_programs() -> None:
    benchmark = DemoCode(weaker=True)
    items = benchmark.items()[:8]
    right = benchmark.score(items, [item.targets[0] for item in items])
    wrong = benchmark.score(items, [item.targets[0].partition("return")[0] + "return None" for item in items])
    assert [verdict.score for verdict in right] == [1] * len(items)
    assert [verdict.score for verdict in wrong] == [0] * len(items)
    assert len(benchmark.items()) == ITEMS["demo_code"]


def test_embedded_items_stand_in_no_data_file() -> None:
    import json

    from loratune.data.prompts import alpaca_prompt
    from loratune.demo import data_files

    rows = [json.loads(line) for file in data_files() for line in file.read_text().splitlines()]
    seen = {alpaca_prompt(row["instruction"], row["input"]) for row in rows}
    for benchmark in (DemoChoice(), DemoMatch(), DemoCode()):
        assert not seen & {item.prompt for item in benchmark.items()}


# --- the protocols' text, written by hand -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("item", "begins", "ends", "target"),
    [
        (
            "abstract_algebra/0",
            "The following are multiple choice questions (with answers) about  abstract algebra.\n\n"
            "Find all c in Z_3 such that Z_3[x]/(x^2 + c) is a field.\nA. 0\nB. 1\nC. 2\nD. 3\nAnswer: B\n\nStatement 1 | If aH is",
            "\n\nFind the degree for the given field extension Q(sqrt(2), sqrt(3), sqrt(18)) over Q.\nA. 0\nB. 4\nC. 2\nD. 6\nAnswer:",
            "B",
        ),
        (
            "anatomy/1",
            "The following are multiple choice questions (with answers) about  anatomy.\n\n"
            "What is the embryological origin of the hyoid bone?\nA. The first pharyngeal arch\n",
            '\n\nA "dished face" profile is often associated with\n'
            "A. a protruding mandible due to reactivation of the condylar cartilage by acromegaly.\n"
            "B. a recessive maxilla due to failure of elongation of the cranial base.\n"
            "C. an enlarged frontal bone due to hydrocephaly.\nD. defective development of the maxillary air sinus.\nAnswer:",
            "B",
        ),
        (
            "world_religions/0",
            "The following are multiple choice questions (with answers) about  world religions.\n\n"
            " What is the sign of the covenant for Jewish males?\nA. The rainbow\nB. Circumcision\nC. A son\nD. Bar mitzvah\nAnswer: B\n\n",
            "\n\n What can murtis be translated as?\nA. Offerings\nB. Prayers\nC. Apparitions\nD. Idols\nAnswer:",
            "D",
        ),
    ],
)
def test_mmlu_prompts(shared_data: Path, item: str, begins: str, ends: str, target: str) -> None:
    found = by_id(Mmlu(shared_data))[item]
    assert found.prompt.startswith(begins)
    assert found.prompt.endswith(ends)
    assert found.prompt.count("\nAnswer:") == 6
    assert found.targets == (target,)
    other = by_id(MmluLoglikelihood(shared_data))[item]
    stripped = found.prompt.replace("about  ", "about ", 1).replace("\n\n ", "\n\n")  # questions lose leading spaces there
    assert other.prompt == stripped
    assert other.choices == (" A", " B", " C", " D")


def test_mmlu_with_fewer_examples(shared_data: Path) -> None:
    item: Item | None = by_id(Mmlu(shared_data))["abstract_algebra/0"]
    question = "Find the degree for the given field extension Q(sqrt(2), sqrt(3), sqrt(18)) over Q.\nA. 0\nB. 4\nC. 2\nD. 6\nAnswer:"
    for left in (4, 3, 2, 1, 0):
        assert item is not None
        item = item.without_last_shot()
        assert item is not None
        assert item.prompt.count("\nAnswer:") == left + 1
        assert item.prompt[item.shared :] == question
    assert item is not None
    assert item.prompt == f"The following are multiple choice questions (with answers) about  abstract algebra.\n\n{question}"
    assert item.without_last_shot() is None


BOOLEAN = (
    "not ( True ) and ( True ) is\nAnswer: False\n\nTrue and not not ( not False ) is\nAnswer: True\n\n"
    "not True or False or ( False ) is\nAnswer: False\n\n"
)


@pytest.mark.parametrize(
    ("item", "prompt", "target"),
    [
        ("boolean_expressions/3", BOOLEAN + "False or not ( True ) and False is\nAnswer:", "False"),
        ("boolean_expressions/4", BOOLEAN + "True or not False and True and False is\nAnswer:", "True"),
        (
            "multistep_arithmetic_two/3",
            "((-1 + 2 + 9 * 5) - (-2 + -4 + -4 * -7)) =\nAnswer: 24\n\n((-9 * -5 - 6 + -2) - (-8 - -6 * -3 * 1)) =\nAnswer: 63\n\n"
            "((3 * -3 * 6 + -5) - (-2 + -7 - 7 - -7)) =\nAnswer: -50\n\n((6 * -6 * 8 * 1) * (-1 * 7 * -6 + -2)) =\nAnswer:",
            "-11520",
        ),
    ],
)
def test_bbh_prompts(shared_data: Path, item: str, prompt: str, target: str) -> None:
    found = by_id(Bbh(shared_data))[item]
    assert found.prompt == prompt
    assert found.targets == (target,)


@pytest.mark.parametrize(
    ("item", "begins", "ends", "target"),
    [
        (
            "f16c0ee7-f131-4a8b-a6ac-4d275ea68066",
            "To start the season, the Lions traveled south to Tampa, Florida to take on the Tampa Bay Buccaneers.",
            "regular season opener for the first time since 2007 How many points did the buccaneers need to tie in the first?\nAnswer:",
            "3",
        ),
        (
            "c9582e03-b01b-42ed-83e0-b90a5334aefa",
            "To start the season, the Lions traveled south to Tampa, Florida to take on the Tampa Bay Buccaneers.",
            "won their regular season opener for the first time since 2007 How many field goals did the Lions score?\nAnswer:",
            "2",
        ),
        (
            "f478fcc5-6d7c-4bd3-9220-6abc0e6e5fbc",
            "As of the census of 2000, there were 218,590 people, 79,667 households,",
            "and 6.0% Polish ancestry. How many percentage points more do Irish people make up of the population than Italian?\nAnswer:",
            "3.3",
        ),
    ],
)
def test_drop_prompts(shared_data: Path, item: str, begins: str, ends: str, target: str) -> None:
    found = by_id(DropBenchmark(shared_data))[item]
    shown, asked = found.prompt[: found.shared], found.prompt[found.shared :]
    assert shown.startswith("In a game that was hyped by wide receiver Terrell Owens' return to Philadelphia as a Cowboy")
    assert "division rivals. Which team does Qwens play for?\nAnswer: Cowboys\n\nFollowing the conquest of the temple fort" in shown
    assert shown.endswith(" Who scored more points, Aaron Rodgers or Tony Romo\nAnswer: Aaron Rodgers\n\n")
    assert asked.startswith(begins)
    assert asked.endswith(ends)
    assert found.targets == (target,)


# --- subsets, names, bad data -----------------------------------------------------------------------------------------


def test_subset(shared_data: Path) -> None:
    items = Mmlu(shared_data).items()
    some, more = stratified(items, 200), stratified(items, 400)
    assert len(some) == 200
    assert {item.id for item in some} < {item.id for item in more}
    assert some == stratified(items, 200)
    assert some != stratified(items, 200, seed=1)
    share = {subject: sum(i.group == subject for i in more) / 400 for subject in {i.group for i in items}}
    whole = {subject: sum(i.group == subject for i in items) / len(items) for subject in share}
    assert max(abs(share[subject] - whole[subject]) for subject in share) < 1.01 / 400
    assert stratified(items, None) == stratified(items, 10**6) == items


def test_names() -> None:
    assert set(ITEMS) <= set(BENCHMARKS.names)
    with pytest.raises(EvaluationError, match="did you mean 'mmlu'"):
        build_benchmark("mmul")
    with pytest.raises(EvaluationError, match="lm_eval:TASK"):
        build_benchmark("zzz")


def test_bad_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no folder"):
        build_benchmark("mmlu", tmp_path / "none").items()
    with pytest.raises(DataError, match=r"neither .* holds"):
        build_benchmark("bbh", tmp_path).items()
    for split in ("dev", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / f"virology_{split}.csv").write_text("Which?,a,b,c,d,E\n")
    with pytest.raises(DataError, match=r"virology_dev.csv, row 1.*'E'"):
        build_benchmark("mmlu", tmp_path).items()
    (tmp_path / "drop_validation.jsonl").write_text('{"query_id": "a"}\n')
    with pytest.raises(DataError, match=r"line 1: expected query_id, passage"):
        build_benchmark("drop", tmp_path).items()


def test_drop_release(tmp_path: Path) -> None:
    """The official file: annotators that disagree leave a question out; numbers, dates and spans become texts."""
    import json

    def pair(name: str, *answers: dict[str, object]) -> dict[str, object]:
        return {"query_id": name, "question": f"What of {name}?", "answer": answers[0], "validated_answers": answers[1:]}

    empty = {"number": "", "date": {"day": "", "month": "", "year": ""}, "spans": []}
    passages = {
        f"p{n}": {
            "passage": f"Passage {n}.",
            "qa_pairs": [
                pair(f"number-{n}", empty | {"number": "7"}, empty | {"number": "7"}),
                pair(f"date-{n}", empty | {"date": {"day": "3", "month": "May", "year": "1900"}}),
                pair(f"two-{n}", empty | {"spans": ["Ann", "Bob"]}),
                pair(f"span-{n}", empty | {"spans": ["Ann"]}, empty | {"spans": ["Bob"]}),
            ],
        }
        for n in range(6)
    }
    (tmp_path / "drop_dataset_dev.json").write_text(json.dumps(passages))
    items = by_id(DropBenchmark(tmp_path))
    assert {name.split("-")[0] for name in items} == {"number", "date"}
    assert {item.targets for name, item in items.items() if name.startswith("date")} == {("3 May 1900",)}
    shown = next(iter(items.values())).prompt.count("Passage") - 1
    assert shown == 3
    assert len(items) >= 2 * (6 - shown)
