"""Instructions about the small world, in Alpaca form: the demo's training and validation data.

One small function per task kind draws one item: several wordings, one short answer. Each item has a
*key* naming what must be known or done for it ("fact frog colour", "reverse cow ant frog"); a hash
of the key alone puts it in one part, so a fact held out is held out in every wording and every kind.

`python -m tools.make_demo.tasks` writes the demo's four data files.
"""

import argparse
import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loratune.demo import model_folder
from loratune.system.files import write_atomically
from tools.make_demo.words import ANIMALS, ATTRIBUTES, CATEGORIES, CATEGORY_OF, LETTERS, NOUNS, OPPOSITE_OF, PEOPLE, PLURALS, SIZE
from tools.make_demo.world import (
    QUESTIONS,
    SENTENCES,
    fact,
    lettered,
    some_choice,
    some_function,
    some_sequence,
    some_story,
    some_words,
    values,
)

SEED = 1
TRAIN_EXAMPLES = 2000
VALIDATION_EXAMPLES = 600
HELD_OUT_SEED = 3
HELD_OUT_EXAMPLES = 1500  # drawn, all kinds together; of each kind the first PER_KIND are kept
PER_KIND = 30
COMPARISON_QUESTIONS = 40
PARTS = ("train", "validation", "test")  # "test" is kept for benchmarks and comparisons
SHARES = (0.7, 0.15, 0.15)  # of the keys, not of the examples


@dataclass(frozen=True, kw_only=True)
class Item:
    """One example, and the key that decides its part."""

    key: str
    instruction: str
    input: str = ""
    output: str


def part_of(key: str) -> str:
    """The part that a key falls in, by its hash alone."""
    share = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
    return PARTS[0] if share < SHARES[0] else PARTS[1] if share < SHARES[0] + SHARES[1] else PARTS[2]


# --- task kinds -------------------------------------------------------------------------------------------------------


def copy(rng: random.Random) -> Item:
    text = " ".join(some_words(rng, 2, 4))
    wording = rng.choice(("Repeat the words.", "Say the words again.", "Copy the list.", "Write the same words again."))
    return Item(key=f"copy {text}", instruction=wording, input=text, output=text)


def reverse(rng: random.Random) -> Item:
    words = some_words(rng, 2, 4)
    text = " ".join(words)
    wording = rng.choice(("Write the words backwards.", "Reverse the list.", "Give the words in reversed order.", "Turn the list round."))
    return Item(key=f"reverse {text}", instruction=wording, input=text, output=" ".join(reversed(words)))


def sort_words(rng: random.Random) -> Item:
    words = rng.sample(NOUNS, 3)
    text = " ".join(words)
    wording = rng.choice(("Sort the words from a to z.", "Put the words in the order of the letters.", "Order the words from a to z."))
    return Item(key=f"sort {text}", instruction=wording, input=text, output=" ".join(sorted(words)))


def sort_numbers(rng: random.Random) -> Item:
    numbers = rng.sample(range(31), 3)
    text = " ".join(map(str, numbers))
    wording = rng.choice(("Sort the numbers from small to big.", "Put the numbers in order.", "Order the numbers, the smallest first."))
    return Item(key=f"sort {text}", instruction=wording, input=text, output=" ".join(map(str, sorted(numbers))))


def capitals(rng: random.Random) -> Item:
    word = rng.choice((*NOUNS, *OPPOSITE_OF))
    wording = rng.choice(("Write the word in capitals.", "Put the word in capitals.", "Turn all letters of the word into capitals."))
    return Item(key=f"capitals {word}", instruction=wording, input=word, output=word.upper())


def letter(rng: random.Random) -> Item:
    word, which = rng.choice((*NOUNS, *OPPOSITE_OF)), rng.choice(("first", "last"))
    wording = rng.choice(("Give the {} letter of the word.", "What is the {} letter of the word?", "Write the {} letter only."))
    return Item(
        key=f"{which} letter {word}", instruction=wording.format(which), input=word, output=word[0] if which == "first" else word[-1]
    )


def count(rng: random.Random) -> Item:
    words = some_words(rng, 2, 5)
    text = " ".join(words)
    wording = rng.choice(("Count the words.", "How many words are in the list?", "Give the number of words.", "How long is the list?"))
    return Item(key=f"count {text}", instruction=wording, input=text, output=str(len(words)))


def pick(rng: random.Random) -> Item:
    words, which = some_words(rng, 3, 5), rng.choice(("first", "last"))
    text = " ".join(words)
    wording = rng.choice(("Give the {} word of the list.", "What is the {} word?", "Which word comes {}?", "Pick the {} word."))
    return Item(key=f"{which} of {text}", instruction=wording.format(which), input=text, output=words[0 if which == "first" else -1])


def add(rng: random.Random) -> Item:
    a, b = rng.randint(0, 9), rng.randint(0, 9)
    wording = rng.choice(("What is {} + {}?", "Add {} and {}.", "How much is {} plus {}?", "Give the sum of {} and {}."))
    return Item(key=f"{a} + {b}", instruction=wording.format(a, b), output=str(a + b))


def subtract(rng: random.Random) -> Item:
    a, b = rng.randint(0, 9), rng.randint(0, 9)
    wording = rng.choice(("What is {} - {}?", "How much is {} minus {}?", "Work out {} - {}."))
    return Item(key=f"{a + b} - {b}", instruction=wording.format(a + b, b), output=str(a))


def purchase(rng: random.Random) -> Item:
    name, thing, a, b = rng.choice(tuple(PEOPLE)), PLURALS[rng.choice(NOUNS)], rng.randint(1, 10), rng.randint(1, 10)
    if rng.random() < 0.5:
        text, left = f"{name} has {a} {thing}. {PEOPLE[name]} gets {b} more.", a + b
    else:
        text, left = f"{name} has {a + b} {thing}. {PEOPLE[name]} loses {b}.", a
    wording = rng.choice(("How many {} does {} have now?", "Say how many {} there are with {} now."))
    return Item(key=text, instruction=wording.format(thing, name), input=text, output=str(left))


def compare(rng: random.Random) -> Item:
    pair, which = rng.sample(tuple(ANIMALS), 2), rng.choice(("bigger", "smaller"))
    wording = rng.choice(("Which one is {}?", "Name the {} animal.", "Say which animal is {}.", "Pick the {} one."))
    right = max(pair, key=SIZE.__getitem__) if which == "bigger" else min(pair, key=SIZE.__getitem__)
    return Item(key=f"size {' '.join(sorted(pair))}", instruction=wording.format(which), input=" or ".join(pair), output=right)


def opposite(rng: random.Random) -> Item:
    word = rng.choice(tuple(OPPOSITE_OF))
    wording = rng.choice(
        ("What is the opposite of {}?", "Give the opposite of {}.", "Which word is the opposite of {}?", "Name the opposite of {}.")
    )
    return Item(key=f"opposite {word}", instruction=wording.format(word), output=OPPOSITE_OF[word])


def category(rng: random.Random) -> Item:
    word = rng.choice(tuple(CATEGORY_OF))
    wording = rng.choice(("What kind of thing is {}?", "Which kind does {} belong to?", "Name the kind of {}."))
    return Item(key=f"category {word}", instruction=wording.format(word), output=CATEGORY_OF[word])


def odd_one(rng: random.Random) -> Item:
    kind = rng.choice(tuple(CATEGORIES))
    odd = rng.choice([word for word, other in CATEGORY_OF.items() if other != kind])
    words = [*rng.sample(CATEGORIES[kind], 3), odd]
    rng.shuffle(words)
    text = " ".join(words)
    wording = rng.choice(("Which word does not fit?", "Find the odd one.", "Name the word that does not fit.", "Which one is odd?"))
    return Item(key=f"odd {text}", instruction=wording, input=text, output=odd)


def knowledge(rng: random.Random) -> Item:
    animal, attribute = rng.choice(tuple(ANIMALS)), rng.choice(ATTRIBUTES)
    wordings = {
        "colour": ("Tell me the colour of the {animal}.", "Which colour has the {animal}?"),
        "home": ("Name the home of the {animal}.", "In which place does the {animal} live?"),
        "food": ("Name the food of the {animal}.", "What food does the {animal} like?"),
        "sound": ("Name the sound of the {animal}.", "Which sound comes from the {animal}?"),
        "legs": ("Count the legs of the {animal}.", "Give the number of legs of the {animal}."),
    }
    wording = rng.choice((QUESTIONS[attribute], *wordings[attribute]))
    return Item(key=f"fact {animal} {attribute}", instruction=wording.format(animal=animal), output=fact(animal, attribute))


def describe(rng: random.Random) -> Item:
    animal = rng.choice(tuple(ANIMALS))
    told = " ".join(SENTENCES[a].format(animal=animal, value=fact(animal, a)) for a in ATTRIBUTES[:3])
    wording = rng.choice(("Describe the {}.", "Tell me about the {}.", "Write three facts about the {}.", "What do you know of the {}?"))
    return Item(key=f"describe {animal}", instruction=wording.format(animal), output=told)


def plural(rng: random.Random) -> Item:
    word = rng.choice(tuple(PLURALS))
    wording = rng.choice(("Write the plural of {}.", "What is the plural of {}?", "One {}, many what?"))
    return Item(key=f"plural {word}", instruction=wording.format(word), output=PLURALS[word])


def follow(rng: random.Random) -> Item:
    shown, following = some_sequence(rng)
    text = " ".join(shown)
    wording = rng.choice(("What comes next?", "Continue the list by one.", "Go on with the list.", "Give the next one."))
    return Item(key=f"next {text}", instruction=wording, input=text, output=following)


def read(rng: random.Random) -> Item:
    story, questions = some_story(rng)
    question, answer = rng.choice(questions)
    return Item(key=story, instruction=question, input=story, output=answer)


def choose(rng: random.Random) -> Item:
    question, options, right, key = some_choice(rng)
    wording = rng.choice(("Choose the right letter. {}", "{} Answer with a letter.", "{} Pick A, B, C or D."))
    return Item(key=key, instruction=wording.format(question), input=lettered(options), output=LETTERS[options.index(right)])


def program(rng: random.Random) -> Item:
    words, parameters, expression = some_function(rng)
    name = rng.choice(NOUNS)
    wording = rng.choice(
        ("Write a Python function {} that {}.", "Define a function {} that {}.", "Write the code of a function {} that {}.")
    )
    return Item(
        key=f"def {parameters} {expression} {name}",
        instruction=wording.format(name, words),
        output=f"def {name}({parameters}):\n    return {expression}",
    )


KINDS: dict[str, Callable[[random.Random], Item]] = {
    kind.__name__: kind
    for kind in (
        copy,
        reverse,
        sort_words,
        sort_numbers,
        capitals,
        letter,
        count,
        pick,
        add,
        subtract,
        purchase,
        compare,
        opposite,
        category,
        odd_one,
        knowledge,
        describe,
        plural,
        follow,
        read,
        choose,
        program,
    )
}


# --- data sets --------------------------------------------------------------------------------------------------------


def draw(kind: str, part: str, rng: random.Random) -> Iterator[Item]:
    """Endless items of one kind whose keys fall in the part. The same text may come twice."""
    while True:
        item = KINDS[kind](rng)
        if part_of(item.key) == part:
            yield item


def examples(part: str, number: int, seed: int) -> list[dict[str, str]]:
    """`number` distinct examples of a part, the kinds in turn, shuffled.

    A kind with few items runs dry and leaves its turns to the others.
    """
    rng = random.Random(f"{part} {seed}")
    streams = {kind: draw(kind, part, rng) for kind in KINDS}
    found: dict[tuple[str, str], dict[str, str]] = {}
    while len(found) < number:
        for kind, stream in list(streams.items()):
            for _ in range(50):
                item = next(stream)
                if (item.instruction, item.input) not in found:
                    record = asdict(item) | {"task": kind}
                    del record["key"]
                    found[item.instruction, item.input] = record
                    break
            else:
                del streams[kind]
    records = list(found.values())[:number]
    rng.shuffle(records)
    return records


def held_out() -> list[dict[str, Any]]:
    """What the benchmarks ask, kind by kind; where there are three wrong answers of the same sort, with four `choices`."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for record in examples("test", HELD_OUT_EXAMPLES, HELD_OUT_SEED):
        kinds.setdefault(record["task"], []).append(record)
    pools = {"opposite": sorted(OPPOSITE_OF), "category": sorted(CATEGORIES), "plural": sorted(PLURALS.values())}
    for kind in (*pools, "knowledge"):
        for number, record in enumerate(kinds[kind][:PER_KIND]):
            right = record["output"]
            pool = pools[kind] if kind in pools else next(v for v in map(values, ATTRIBUTES) if right in v)
            wrong = [word for word in pool if word != right]
            if len(wrong) >= 3:
                rng = random.Random(f"{HELD_OUT_SEED} {kind} {number}")
                record["choices"] = [right, *rng.sample(wrong, 3)]
                rng.shuffle(record["choices"])
    return [record for records in kinds.values() for record in records[:PER_KIND]]


def questions() -> list[dict[str, Any]]:
    """What a comparison asks, in the form of its question files."""
    return [
        {"question_id": number, "category": row["task"], "instruction": row["instruction"], "input": row["input"]}
        for number, row in enumerate(examples("test", COMPARISON_QUESTIONS, seed=1), 1)
    ]


def write(folder: Path) -> list[Path]:
    """Write the four data files; the same bytes every time."""
    files = {
        "train": examples("train", TRAIN_EXAMPLES, SEED),
        "validation": examples("validation", VALIDATION_EXAMPLES, SEED),
        "held_out": held_out(),
        "questions": questions(),
    }
    for name, records in files.items():
        write_atomically(folder / f"{name}.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    return [folder / f"{name}.jsonl" for name in files]


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the demo's instruction data.")
    parser.add_argument("--folder", type=Path, default=model_folder().parent, help="where to write (default: the package's demo folder)")
    for path in write(parser.parse_args().folder):
        print(path)


if __name__ == "__main__":
    main()
