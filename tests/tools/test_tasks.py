"""The instruction data: right answers, held-out items truly held out, committed files as regenerated."""

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from loratune.demo import data_files, held_out_file, questions_file
from tools.make_demo import tasks
from tools.make_demo.words import OPPOSITE_OF, SIZE


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def normalised(record: dict[str, str]) -> str:
    return " ".join(f"{record['instruction']} {record['input']}".lower().split())


@pytest.fixture(scope="module")
def train() -> list[dict[str, str]]:
    return read(data_files()[0])


@pytest.fixture(scope="module")
def validation() -> list[dict[str, str]]:
    return read(data_files()[1])


def test_committed_data_is_what_the_generator_writes(tmp_path: Path) -> None:
    for written, committed in zip(tasks.write(tmp_path), (*data_files(), held_out_file(), questions_file()), strict=True):
        assert written.read_bytes() == committed.read_bytes()


def test_sizes_and_kinds(train: list[dict[str, str]], validation: list[dict[str, str]]) -> None:
    assert (len(train), len(validation)) == (tasks.TRAIN_EXAMPLES, tasks.VALIDATION_EXAMPLES)
    kinds, held_out = Counter(r["task"] for r in train), Counter(r["task"] for r in validation)
    assert len(kinds) >= 12
    assert set(kinds) == set(held_out) == set(tasks.KINDS)
    assert max(kinds.values()) < 2 * min(kinds.values())


def test_no_held_out_example_stands_in_train(train: list[dict[str, str]], validation: list[dict[str, str]]) -> None:
    test = tasks.examples("test", 300, seed=0)
    parts = [{normalised(record) for record in part} for part in (train, validation, test)]
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]


def test_a_fact_is_held_out_in_every_kind_that_asks_it() -> None:
    rng = random.Random(0)
    asked: dict[str, set[str]] = {}
    for kind in ("knowledge", "choose", "opposite", "category"):
        for _ in range(2000):
            asked.setdefault(tasks.KINDS[kind](rng).key, set()).add(kind)
    shared = [key for key, kinds in asked.items() if "choose" in kinds and len(kinds) == 2]
    assert len(shared) > 100  # the same key from two kinds: one hash, so one part
    assert {tasks.part_of(key) for key in shared} == set(tasks.PARTS)


@pytest.mark.parametrize("kind", tasks.KINDS)
def test_items_are_deterministic_and_in_all_parts(kind: str) -> None:
    items = [tasks.KINDS[kind](random.Random(seed)) for seed in range(300)]
    assert items == [tasks.KINDS[kind](random.Random(seed)) for seed in range(300)]
    assert {tasks.part_of(item.key) for item in items} == set(tasks.PARTS)
    assert len({item.instruction for item in items}) > 1, "one wording only"
    assert all(item.output and item.output == item.output.strip() for item in items)


def test_the_seed_changes_the_data() -> None:
    assert tasks.examples("train", 100, seed=1) != tasks.examples("train", 100, seed=2)


ORACLES: dict[str, Callable[[str, str], str]] = {  # (instruction, input) -> output, worked out from the text alone
    "copy": lambda _, given: given,
    "reverse": lambda _, given: " ".join(given.split()[::-1]),
    "sort_words": lambda _, given: " ".join(sorted(given.split())),
    "sort_numbers": lambda _, given: " ".join(sorted(given.split(), key=int)),
    "capitals": lambda _, given: given.upper(),
    "count": lambda _, given: str(len(given.split())),
    "compare": lambda asked, given: sorted(given.split(" or "), key=SIZE.__getitem__)[-1 if "bigger" in asked else 0],
    "opposite": lambda asked, _: OPPOSITE_OF[asked.rstrip(".?").split()[-1]],
}


@pytest.mark.parametrize("kind", ORACLES)
def test_answers_are_right(kind: str, train: list[dict[str, str]], validation: list[dict[str, str]]) -> None:
    records = [record for record in train + validation if record["task"] == kind]
    assert len(records) > 50
    for record in records:
        assert record["output"] == ORACLES[kind](record["instruction"], record["input"]), record


def test_programs_do_what_their_instruction_says(train: list[dict[str, str]]) -> None:
    programs = [record for record in train if record["task"] == "program"]
    added = 0
    for record in programs:
        space: dict[str, object] = {}
        exec(record["output"], space)  # our own committed text, not a model's
        instruction = record["instruction"].rstrip(".").split()
        function = next(space[word] for word in instruction if word in space)
        assert callable(function)
        if instruction[-4] == "adds" and instruction[-1] == "x":  # ... that adds 3 to x.
            assert function(5) == 5 + int(instruction[-3])
            added += 1
    assert len(programs) > 60
    assert added > 0


def test_the_right_option_is_among_four(train: list[dict[str, str]]) -> None:
    letters = Counter(record["output"] for record in train if record["task"] == "choose")
    assert set(letters) == set("ABCD")
    assert max(letters.values()) < 3 * min(letters.values())
