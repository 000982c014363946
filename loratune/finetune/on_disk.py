"""How large a model and its data are, told from their files in about a second: without torch, a tokenizer or their libraries."""

import json
import math
from collections.abc import Callable
from pathlib import Path

from loratune.data.locations import local
from loratune.data.prompts.alpaca import alpaca_prompt
from loratune.data.sources import DataRecipe, DataSource, Example
from loratune.system.hub import weight_files

_CHARACTERS = 4  # per token, of English text in a usual vocabulary: where there is no tokenizer.json
_SAMPLE = 100  # examples of a source, about, whose tokens are counted
_LARGEST = 100 << 20  # bytes of a source that is read for it


def data_size(recipe: DataRecipe, tokenizer: Path | None = None) -> tuple[int, int, float] | None:
    """(training examples, validation examples, mean tokens of one), roughly; None where a source is a hub id, or larger than 100 MiB.

    tokenizer: the model's tokenizer.json, by which some of the examples are counted. A chat template is taken for Alpaca's prompt.
    Raises DataError for files that are not there, and for all that reading them refuses.
    """
    found: list[tuple[int, float]] = []  # examples, tokens
    unread = False
    count = _counter(tokenizer)
    for source in (*recipe.train, *recipe.validation):
        if (files := _files(source)) is None or sum(file.stat().st_size for file in files) > _LARGEST:
            unread = True  # the others are read all the same, for their mistakes
            continue
        examples, _ = recipe.read(source)
        some = examples[:: max(1, len(examples) // _SAMPLE)]
        tokens = sum(min(recipe.max_length, count(_text(example)) + len(example.exchanges)) for example in some)  # an end of each answer
        found.append((len(examples), len(examples) * tokens / max(1, len(some))))
    if unread:
        return None
    rows = [number for number, _ in found]
    sources = len(recipe.train)
    train, held = sum(rows[:sources]), sum(rows[sources:])
    if recipe.validation:
        held = _drawn(held, recipe.validation_count, [source.count for source in recipe.validation])
    else:
        asked = [source.validation_count for source in recipe.train]
        fraction = int(train * recipe.validation_fraction) if recipe.validation_fraction is not None else 0
        held = recipe.validation_count or sum(number or 0 for number in asked) or fraction
        train -= min(train, held)
    train = _drawn(train, recipe.train_count, [source.count for source in recipe.train])
    return train, held, sum(tokens for _, tokens in found) / max(1, sum(rows))


def _files(source: DataSource) -> list[Path] | None:
    """The files behind a source; None for a hub id. Raises DataError where nothing is there."""
    found = local(source.path, source.split)
    return [file for file in found.rglob("*") if file.is_file()] if isinstance(found, Path) else found


def _drawn(there: int, asked: int | None, each: list[int | None]) -> int:
    """Examples that a recipe draws of those that are there: so many in all, or so many of each source, or all."""
    if asked is None and each and all(number is not None for number in each):
        asked = sum(number or 0 for number in each)
    return there if asked is None else min(there, asked)


def _counter(tokenizer: Path | None) -> Callable[[str], float]:
    """Text -> its tokens: by the tokenizer, else by a usual number of characters."""
    if tokenizer is not None:
        from tokenizers import Tokenizer

        try:
            read = Tokenizer.from_file(str(tokenizer))
        except Exception:  # all it raises; that the file is damaged is told when the model is loaded
            return _counter(None)
        return lambda text: len(read.encode(text).ids)
    return lambda text: len(text) / _CHARACTERS


def _text(example: Example) -> str:
    """The example in Alpaca's prompt."""
    turns = [alpaca_prompt(turn.instruction, turn.input, example.system) + turn.response for turn in example.exchanges[:1]]
    turns += [f"\n\n{turn.instruction}\n{turn.input}\n{turn.response}" for turn in example.exchanges[1:]]
    return "".join(turns)


def weight_count(name: str, revision: str | None) -> int | None:
    """The model's weights: as its safetensors files list them, else by the size of its files and the type that its configuration
    names; None where there are no files."""
    files = weight_files(name, revision)
    if not files:
        return None
    if all(path.suffix == ".safetensors" for path in files):
        return sum(map(_listed, files))
    config = Path(name).expanduser() / "config.json"
    named = json.loads(config.read_text()) if config.is_file() else {}
    wide = str(named.get("dtype") or named.get("torch_dtype") or "bfloat16").endswith("32")
    return sum(path.stat().st_size for path in files) // (4 if wide else 2)


def _listed(path: Path) -> int:
    """The numbers in a safetensors file, by its header: 8 bytes that hold the header's length, then JSON."""
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(min(_LARGEST, int.from_bytes(file.read(8), "little"))))
        return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return path.stat().st_size // 2  # damaged, which loading it tells; 16 bits each are usual
