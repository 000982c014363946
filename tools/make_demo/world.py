"""Plain text about the small world: what the demo's base model is pretrained on.

Each function below writes one paragraph of one kind: facts, comparisons, lists and what was done to
them, sums, stories, Python. Every fact and skill that `tasks.py` asks for stands here, in plain
prose; no text here holds an instruction *answered in the Alpaca form*, which is what tuning teaches.

Deterministic: the text is a function of the generator that is passed in.
"""

import random
from collections.abc import Callable, Iterator

from tools.make_demo.words import (
    ADJECTIVES,
    ANIMALS,
    ATTRIBUTES,
    CATEGORIES,
    CATEGORY_OF,
    COLOURS,
    DAYS,
    FUNCTIONS,
    JOBS,
    LARGEST_NUMBER,
    LETTERS,
    NOUNS,
    OPPOSITE_OF,
    PEOPLE,
    PLURALS,
    SIZE,
    THINGS,
    TOWNS,
    an,
)

QUESTIONS = {
    "colour": "What colour is the {animal}?",
    "home": "Where does the {animal} live?",
    "food": "What does the {animal} eat?",
    "sound": "What does the {animal} say?",
    "legs": "How many legs does the {animal} have?",
}
SENTENCES = {
    "colour": "The {animal} is {value}.",
    "home": "The {animal} lives in the {value}.",
    "food": "The {animal} eats {value}.",
    "sound": "The {animal} says {value}.",
    "legs": "The {animal} has {value} legs.",
}


def fact(animal: str, attribute: str) -> str:
    """The value of an animal's attribute: fact("frog", "colour") is "green"."""
    return ANIMALS[animal][ATTRIBUTES.index(attribute)]


def values(attribute: str) -> list[str]:
    """Every value that an attribute takes, sorted, once each."""
    return sorted({fact(animal, attribute) for animal in ANIMALS})


def some_words(rng: random.Random, least: int = 2, most: int = 5) -> list[str]:
    """Distinct words, of one pool or of all."""
    pool = rng.choice((NOUNS, NOUNS, COLOURS, ADJECTIVES, tuple(OPPOSITE_OF)))
    return rng.sample(pool, rng.randint(least, most))


def some_story(rng: random.Random) -> tuple[str, list[tuple[str, str]]]:
    """A story of two people, and (question, answer) pairs that it settles."""
    sentences, questions = [], []
    for name, job, town, thing, colour in zip(
        rng.sample(tuple(PEOPLE), 2), rng.sample(JOBS, 2), rng.sample(TOWNS, 2), rng.sample(THINGS, 2), rng.sample(COLOURS, 2), strict=True
    ):
        told = [
            (f"{name} is a {job}.", f"What is the job of {name}?", job),
            (f"{name} lives in the {town}.", f"Where does {name} live?", town),
            (f"{name} has {an(colour)} {thing}.", f"What colour is the {thing} of {name}?", colour),
            (f"{name} likes the {thing}.", f"What does {name} like?", thing),
        ]
        for sentence, question, answer in rng.sample(told, 2):
            sentences.append(sentence)
            questions.append((question, answer))
    return " ".join(sentences), questions


def some_sequence(rng: random.Random) -> tuple[list[str], str]:
    """The start of a regular list, and what comes next."""
    if rng.random() < 0.2:
        first, shown = rng.randrange(7), rng.randint(2, 4)
        days = [DAYS[(first + i) % 7] for i in range(shown + 1)]
        return days[:-1], days[-1]
    step, shown = rng.choice((1, 1, 2, 3, 5, -1, -2)), rng.randint(3, 4)
    span = abs(step) * shown
    first = rng.randint(0, LARGEST_NUMBER - span) + (span if step < 0 else 0)
    numbers = [str(first + step * i) for i in range(shown + 1)]
    return numbers[:-1], numbers[-1]


def some_function(rng: random.Random) -> tuple[str, str, str]:
    """A small Python function: what it does in words, its parameters, its expression."""
    parameters, expression, wordings = rng.choice(FUNCTIONS[:6] if rng.random() < 0.7 else FUNCTIONS[6:])
    number = rng.randint(1, 20)
    return rng.choice(wordings).format(n=number), parameters, expression.format(n=number)


def some_choice(rng: random.Random) -> tuple[str, list[str], str, str]:
    """A question with four options: question, options, the right one, and a key naming the fact asked for."""
    form = rng.randrange(4)
    if form < 2:
        animal, attribute = rng.choice(tuple(ANIMALS)), rng.choice(ATTRIBUTES[:4])
        question, right, pool = QUESTIONS[attribute].format(animal=animal), fact(animal, attribute), values(attribute)
        key = f"fact {animal} {attribute}"
    elif form == 2:
        word = rng.choice(tuple(OPPOSITE_OF))
        question, right, pool = f"What is the opposite of {word}?", OPPOSITE_OF[word], [w for w in OPPOSITE_OF if w != word]
        key = f"opposite {word}"
    else:
        right = rng.choice(tuple(CATEGORY_OF))
        category = CATEGORY_OF[right]
        question, pool = f"Which one is {an(category)}?", [w for w, other in CATEGORY_OF.items() if other != category]
        key = f"category {right}"
    options = [right, *rng.sample([word for word in pool if word != right], 3)]
    rng.shuffle(options)
    return question, options, right, key


def lettered(options: list[str]) -> str:
    """The options, one per line: "A red"."""
    return "\n".join(f"{letter} {option}" for letter, option in zip(LETTERS, options, strict=False))


# --- paragraphs -------------------------------------------------------------------------------------------------------


def animal_facts(rng: random.Random) -> str:
    animal = rng.choice(tuple(ANIMALS))
    told = [SENTENCES[a].format(animal=animal, value=fact(animal, a)) for a in ATTRIBUTES]
    if rng.random() < 0.3:  # the short portrait, in the fixed order
        return " ".join(told[:3])
    return " ".join(rng.sample(told, rng.randint(1, 4)))


def asked(rng: random.Random) -> str:
    """A question and, on the next line or in someone's mouth, its short answer."""
    animal, attribute = rng.choice(tuple(ANIMALS)), rng.choice(ATTRIBUTES)
    question, answer = QUESTIONS[attribute].format(animal=animal), fact(animal, attribute)
    if rng.random() < 0.5:
        return f"{question}\n{answer}"
    one, other = rng.sample(tuple(PEOPLE), 2)
    return f'{one} asked: "{question}" {other} said: "{answer}"'


def categories(rng: random.Random) -> str:
    form = rng.randrange(4)
    word = rng.choice(tuple(CATEGORY_OF))
    category = CATEGORY_OF[word]
    if form == 0:
        words = rng.sample(CATEGORIES[category], 3)
        return f"{category}: " + " ".join(words)
    if form == 1:
        return f"{word} is {an(category)}."
    if form == 2:
        return f"What is {word}?\n{category}"
    odd = rng.choice([w for w, other in CATEGORY_OF.items() if other != category])
    words = [*rng.sample(CATEGORIES[category], 3), odd]
    rng.shuffle(words)
    return " ".join(words) + rng.choice((f"\n{odd} does not fit.", f"\nAll but one are of the kind {category}. The odd one is {odd}."))


def opposites(rng: random.Random) -> str:
    word = rng.choice(tuple(OPPOSITE_OF))
    other = OPPOSITE_OF[word]
    return rng.choice(
        (
            f"The opposite of {word} is {other}.",
            f"{word} and {other} are opposites.",
            f"If it is not {word}, it is {other}.",
            f"not {word}\n{other}",
        )
    )


def sizes(rng: random.Random) -> str:
    one, two = rng.sample(tuple(ANIMALS), 2)
    small, big = sorted((one, two), key=SIZE.__getitem__)
    return rng.choice(
        (
            f"The {big} is bigger than the {small}.",
            f"The {small} is smaller than the {big}.",
            f"{one} or {two}: the bigger one is the {big}.",
            f"{one} or {two}: the smaller one is the {small}.",
            f"{one} {two}\nbigger:\n{big}\nsmaller:\n{small}",
        )
    )


def spelling(rng: random.Random) -> str:
    word = rng.choice((*NOUNS, *OPPOSITE_OF))
    first, last, capitals = word[0], word[-1], word.upper()
    return rng.choice(
        (
            f"The word {word} starts with {first} and ends with {last}.",
            f"first letter of {word}:\n{first}",
            f"last letter of {word}:\n{last}",
            f"{word} in capitals is {capitals}.",
            f"{word}\n{capitals}",
        )
    )


def plurals(rng: random.Random) -> str:
    word = rng.choice(tuple(PLURALS))
    return rng.choice((f"One {word}, many {PLURALS[word]}.", f"plural of {word}:\n{PLURALS[word]}"))


def sums(rng: random.Random) -> str:
    a, b = rng.randint(0, 9), rng.randint(0, 9)
    if rng.random() < 0.5:
        return rng.choice((f"{a} + {b} = {a + b}", f"{a} plus {b} is {a + b}.", f"{a} + {b}\n{a + b}"))
    total = a + b
    return rng.choice((f"{total} - {b} = {a}", f"{total} minus {b} is {a}.", f"{total} - {b}\n{a}"))


def purchases(rng: random.Random) -> str:
    name, thing = rng.choice(tuple(PEOPLE)), PLURALS[rng.choice(NOUNS)]
    a, b = rng.randint(1, 10), rng.randint(1, 10)
    if rng.random() < 0.5:
        told, now = f"{name} has {a} {thing}. {PEOPLE[name]} gets {b} more.", a + b
    else:
        told, now = f"{name} has {a + b} {thing}. {PEOPLE[name]} loses {b}.", a
    return told + rng.choice((f" Now {name} has {now}.", f" How many {thing} does {name} have?\n{now}"))


def sequences(rng: random.Random) -> str:
    shown, following = some_sequence(rng)
    text = " ".join(shown)
    return rng.choice((f"{text} {following}", f"{text} and then {following}.", f"After {text} comes {following}.", f"{text}\n{following}"))


def lists(rng: random.Random) -> str:
    """A list and what can be said of it or done to it."""
    words = some_words(rng)
    text, back = " ".join(words), " ".join(reversed(words))
    return rng.choice(
        (
            f"{text}\nbackwards:\n{back}",
            f"{text}\nreversed:\n{back}",
            f"{text}\nbackwards:\n{back}\nagain:\n{text}",
            f"{text}\nagain:\n{text}",
            f"{text}\nthe same words:\n{text}",
            f"{text}\nThat is {len(words)} words. The first is {words[0]} and the last is {words[-1]}.",
            f"{text}\nnumber of words:\n{len(words)}",
            f"{text}\nfirst:\n{words[0]}\nlast:\n{words[-1]}",
            f"{text}\nlast:\n{words[-1]}\nfirst:\n{words[0]}",
        )
    )


def sorted_lists(rng: random.Random) -> str:
    if rng.random() < 0.5:
        numbers = rng.sample(range(LARGEST_NUMBER + 1), 3)
        up = " ".join(map(str, sorted(numbers)))
        return " ".join(map(str, numbers)) + rng.choice(("\nfrom small to big:\n", "\nsorted:\n")) + up
    words = rng.sample(NOUNS, 3)
    return " ".join(words) + rng.choice(("\nfrom a to z:\n", "\nsorted:\n")) + " ".join(sorted(words))


def choices(rng: random.Random) -> str:
    question, options, right, _ = some_choice(rng)
    letter = LETTERS[options.index(right)]
    shown = rng.randrange(len(options))
    return rng.choice(
        (
            f"{lettered(options)}\n{options[shown]} is {LETTERS[shown]}.",
            f"{lettered(options)}\n{options[shown]}:\n{LETTERS[shown]}",
            f"{question}\n{lettered(options)}\nIt is {right}, so {letter} is right.",
            f"{question}\n{lettered(options)}\nThe right one is {letter}, {right}.",
            f"{question}\n{lettered(options)}\n{letter}",
        )
    )


def stories(rng: random.Random) -> str:
    story, questions = some_story(rng)
    asked_for = rng.sample(questions, 2)
    if rng.random() < 0.5:
        return story + "".join(f"\n{question}\n{answer}" for question, answer in asked_for)
    return story + " " + " ".join(f"{question} It is {answer}." for question, answer in asked_for)


def code(rng: random.Random) -> str:
    words, parameters, expression = some_function(rng)
    name = rng.choice(NOUNS)
    body = f"def {name}({parameters}):\n    return {expression}"
    return rng.choice((f"# {words}\n{body}", f"The function {name} {words}.\n{body}", f"{body}\n# {name} {words}"))


PARAGRAPHS: tuple[tuple[int, Callable[[random.Random], str]], ...] = (  # (weight, kind)
    (3, animal_facts),
    (5, asked),
    (4, categories),
    (3, opposites),
    (4, sizes),
    (4, spelling),
    (2, plurals),
    (4, sums),
    (2, purchases),
    (2, sequences),
    (10, lists),
    (3, sorted_lists),
    (8, choices),
    (4, stories),
    (4, code),
)


def documents(rng: random.Random) -> Iterator[str]:
    """Endless documents of one to three paragraphs."""
    weights, kinds = zip(*PARAGRAPHS, strict=True)
    while True:
        yield "\n\n".join(kind(rng) for kind in rng.choices(kinds, weights, k=rng.randint(1, 3)))
