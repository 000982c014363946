"""The words and facts of the demo's small world. Tables only; `world.py` and `tasks.py` make text of them."""

# Smallest first: the order of the rows is the order of size.
# name: (colour, home, food, sound, legs)
ANIMALS: dict[str, tuple[str, str, str, str, str]] = {
    "ant": ("black", "hill", "crumbs", "tick", "6"),
    "bee": ("yellow", "hive", "nectar", "buzz", "6"),
    "spider": ("brown", "web", "moths", "hiss", "8"),
    "snail": ("grey", "garden", "leaves", "slurp", "0"),
    "mouse": ("grey", "hole", "cheese", "squeak", "4"),
    "frog": ("green", "pond", "flies", "croak", "4"),
    "robin": ("red", "nest", "worms", "chirp", "2"),
    "bat": ("black", "cave", "moths", "click", "2"),
    "crab": ("orange", "beach", "weeds", "clack", "8"),
    "owl": ("brown", "barn", "mice", "hoot", "2"),
    "duck": ("white", "lake", "bread", "quack", "2"),
    "hen": ("brown", "yard", "corn", "cluck", "2"),
    "cat": ("orange", "house", "fish", "meow", "4"),
    "rabbit": ("white", "burrow", "carrots", "thump", "4"),
    "fox": ("red", "den", "berries", "yap", "4"),
    "dog": ("black", "kennel", "bones", "woof", "4"),
    "goat": ("white", "mountain", "grass", "bleat", "4"),
    "wolf": ("grey", "forest", "meat", "howl", "4"),
    "sheep": ("white", "meadow", "grass", "baa", "4"),
    "pig": ("pink", "sty", "corn", "oink", "4"),
    "lion": ("yellow", "plain", "meat", "roar", "4"),
    "bear": ("brown", "forest", "honey", "growl", "4"),
    "cow": ("white", "field", "grass", "moo", "4"),
    "horse": ("black", "stable", "hay", "neigh", "4"),
    "camel": ("yellow", "desert", "thorns", "grunt", "4"),
    "elephant": ("grey", "jungle", "leaves", "trumpet", "4"),
    "whale": ("blue", "sea", "krill", "song", "0"),
}
SIZE = {name: rank for rank, name in enumerate(ANIMALS)}
ATTRIBUTES = ("colour", "home", "food", "sound", "legs")

COLOURS = ("red", "blue", "green", "yellow", "pink", "white", "black", "grey", "brown", "orange")
CATEGORIES: dict[str, tuple[str, ...]] = {
    "animal": tuple(ANIMALS),
    "fruit": ("apple", "banana", "cherry", "grape", "lemon", "pear", "plum", "peach", "melon", "mango"),
    "tool": ("hammer", "saw", "spade", "rake", "drill", "needle", "brush", "knife", "axe", "ladder"),
    "vehicle": ("car", "bus", "train", "boat", "bike", "truck", "plane", "ship", "tram", "sled"),
    "garment": ("hat", "coat", "shirt", "sock", "shoe", "scarf", "glove", "dress", "belt", "boot"),
    "furniture": ("chair", "table", "bed", "sofa", "desk", "shelf", "bench", "stool"),
    "colour": COLOURS,
}
CATEGORY_OF = {word: category for category, words in CATEGORIES.items() for word in words}
THINGS = tuple(word for category in ("fruit", "tool", "vehicle", "garment", "furniture") for word in CATEGORIES[category])
NOUNS = (*ANIMALS, *THINGS)
PLURALS = {word: word + ("es" if word.endswith(("x", "s", "ch", "sh")) else "s") for word in NOUNS if word != "furniture"} | {
    "mouse": "mice",
    "sheep": "sheep",
    "wolf": "wolves",
    "cherry": "cherries",
    "knife": "knives",
    "shelf": "shelves",
}

PEOPLE = {  # name: pronoun
    "Ann": "She",
    "Ben": "He",
    "Dan": "He",
    "Eva": "She",
    "Ida": "She",
    "Jim": "He",
    "Kim": "She",
    "Leo": "He",
    "Max": "He",
    "Mia": "She",
    "Pam": "She",
    "Ron": "He",
    "Sam": "He",
    "Sue": "She",
    "Tom": "He",
    "Zoe": "She",
}
JOBS = ("baker", "farmer", "doctor", "teacher", "singer", "pilot", "painter", "nurse", "miller", "guard")
TOWNS = ("village", "city", "castle", "harbour", "valley", "island", "market", "tower")

OPPOSITES = (
    ("hot", "cold"),
    ("big", "small"),
    ("fast", "slow"),
    ("old", "young"),
    ("happy", "sad"),
    ("light", "dark"),
    ("wet", "dry"),
    ("full", "empty"),
    ("high", "low"),
    ("hard", "soft"),
    ("rich", "poor"),
    ("open", "shut"),
    ("clean", "dirty"),
    ("loud", "quiet"),
    ("long", "short"),
    ("thick", "thin"),
    ("early", "late"),
    ("near", "far"),
    ("sweet", "sour"),
    ("strong", "weak"),
    ("right", "wrong"),
    ("day", "night"),
    ("up", "down"),
    ("in", "out"),
    ("start", "end"),
    ("push", "pull"),
    ("win", "lose"),
    ("buy", "sell"),
    ("love", "hate"),
    ("brave", "afraid"),
)
OPPOSITE_OF = dict(OPPOSITES) | {b: a for a, b in OPPOSITES}
ADJECTIVES = ("big", "small", "old", "young", "fast", "slow", "clean", "dirty", "happy", "sad", "wet", "dry", "loud", "quiet")

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
LARGEST_NUMBER = 30
LETTERS = "ABCD"

# What a small Python function does: (parameters, expression, wordings); {n} is a small number.
FUNCTIONS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("x", "x + {n}", ("adds {n} to x", "returns x plus {n}")),
    ("x", "x - {n}", ("subtracts {n} from x", "returns x minus {n}")),
    ("x", "x * {n}", ("multiplies x by {n}", "returns x times {n}")),
    ("x", "x % {n}", ("takes x modulo {n}", "returns the rest of x by {n}")),
    ("x", "x > {n}", ("checks if x is above {n}", "tells if x is bigger than {n}")),
    ("x", "x == {n}", ("checks if x equals {n}", "tells if x is {n}")),
    ("x", "x * x", ("squares x", "returns the square of x")),
    ("x", "-x", ("negates x", "returns minus x")),
    ("a, b", "a + b", ("adds a and b", "returns the sum of a and b")),
    ("a, b", "a - b", ("subtracts b from a", "returns a minus b")),
    ("a, b", "a * b", ("multiplies a and b", "returns the product of a and b")),
    ("a, b", "max(a, b)", ("takes the larger of a and b", "returns the larger of a and b")),
    ("a, b", "min(a, b)", ("takes the smaller of a and b", "returns the smaller of a and b")),
)


def an(noun: str) -> str:
    """The noun with its indefinite article."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"
