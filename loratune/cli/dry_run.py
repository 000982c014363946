"""`loratune run --dry-run`: what a study will cost. A first estimate at once, from sizes alone; then the measured one.

The libraries, the data and the model can take minutes to load, so each stage is announced, and reported while it is running.
"""

import json
import math
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratune.cli.run import quiet
from loratune.system.formatting import count, duration

if TYPE_CHECKING:
    from loratune.spec import StudySpec

_STILL = 10.0  # seconds between two lines of a stage that is running
_CHARACTERS = 4  # per token, of English text in a usual vocabulary
_TEMPLATE = 40  # tokens around an example, as in Alpaca's prompt
_LARGEST = 100 << 20  # bytes of a file that is read for the first estimate
_TRAINING, _VALIDATION = 4, 2  # floating-point operations per token and weight: forward and back to the adapters; forward
_GPU = 1e14  # operations per second that a data-centre GPU sustains in bfloat16


def dry_run(spec: "StudySpec") -> int:
    """Print what the study will cost, stage by stage. Nothing is started, nothing left behind but the prepared data in the cache."""
    print(f"Study {spec.name}: {spec.budget.trials} trials by {spec.sampler.name}. Nothing is started.\n", flush=True)
    with _stage("First estimate, from the sizes of model and data"):
        quiet()
        lines = first_estimate(spec)
    print("\n".join(f"  {line}" for line in lines), flush=True)
    with _stage("Loading the libraries"):
        from loratune.data.cache import prepare_data
        from loratune.study.driver import known_beforehand
        from loratune.study.plan import plan
    notes: list[str] = []
    with _stage("Reading and tokenising the data"):
        data = prepare_data(spec, notes)
        beforehand = known_beforehand(spec, data)
    print("\n".join([*notes, data.summary(), *beforehand]), flush=True)
    with _stage("Measuring: the model is loaded and the largest adapter trained for some steps"):
        planned = plan(spec, data)
    print(f"\n{planned}")
    return 0


@contextmanager
def _stage(what: str) -> Iterator[None]:
    """Announce a stage, and every ten seconds that it is still running."""
    print(f"{what} ...", flush=True)
    began, done = time.monotonic(), threading.Event()

    def tell() -> None:
        while not done.wait(_STILL):
            print(f"  still running, {duration(time.monotonic() - began)}", flush=True)

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        done.set()
        teller.join()


def first_estimate(spec: "StudySpec") -> list[str]:
    """Examples, tokens, weights and a rough lower bound of the time, in lines; needs neither torch nor a tokenizer.

    time >= (4 tokens trained + 2 tokens validated) x weights / operations per second, the LoRA layers and all overhead left out.
    Raises DataError.
    """
    from loratune.study.plan import expected

    default = spec.hyperparameters(spec.search_space.default_values())
    runs, validations = expected(spec)
    size = _data(spec)
    if size is None:
        return ["data          counted when it is loaded: no file on this machine, or a very large one"]
    train, validation, tokens = size
    steps = int(train * default.epochs) // default.batch_size
    trained, validated = runs * steps * default.batch_size * tokens, validations * validation * tokens
    lines = [
        f"data          {train:,} training and {validation:,} validation examples of about {tokens:,.0f} tokens",
        f"work          {runs:.4g} full runs of about {steps:,} steps; about {count(trained)} training tokens",
    ]
    weights = _weights(spec)
    if weights is None:
        return [*lines, "model         not on this machine yet; its speed is measured once it is loaded"]
    work = weights * (_TRAINING * trained + _VALIDATION * validated)
    lines.append(f"model         {count(weights)} weights")
    if spec.executor.device != "cpu" and any(Path("/dev").glob("nvidia[0-9]*")):
        return [*lines, f"at least      about {duration(work / _GPU)} of one GPU, at {_GPU / 1e12:.0f} TFLOP/s"]
    speed = _speed()
    return [
        *lines,
        f"at least      about {duration(work / speed)} on these processors, at {speed / 1e9:.0f} GFLOP/s; small models take far more",
    ]


def _data(spec: "StudySpec") -> tuple[int, int, float] | None:
    """(training examples, validation examples, mean tokens of one), roughly; None where the data are no files of usual size."""
    from loratune.data.sources import DataRecipe, read_source

    recipe = DataRecipe.from_plain(spec.data_recipe_dict())
    found: list[tuple[int, int]] = []  # examples, characters
    for source in (*recipe.train, *recipe.validation):
        path = Path(source.path).expanduser()
        if not path.is_file() or path.stat().st_size > _LARGEST:
            return None
        examples, _ = read_source(source, recipe.on_bad_rows)
        limit = recipe.max_length * _CHARACTERS
        found.append((len(examples), sum(min(limit, _length(example) + _TEMPLATE * _CHARACTERS) for example in examples)))
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
    return train, held, sum(characters for _, characters in found) / _CHARACTERS / max(1, sum(rows))


def _drawn(there: int, asked: int | None, each: list[int | None]) -> int:
    """Examples that a recipe draws of those that are there: so many in all, or so many of each source, or all."""
    if asked is None and each and all(number is not None for number in each):
        asked = sum(number or 0 for number in each)
    return there if asked is None else min(there, asked)


def _length(example: Any) -> int:
    """Characters of an example's texts."""
    return len(example.system) + sum(len(text) for exchange in example.exchanges for text in exchange if isinstance(text, str))


def _weights(spec: "StudySpec") -> int | None:
    """The model's weights: as its safetensors files list them, else by the size of its files and the type that its configuration
    names; None where there are no files."""
    from loratune.system.hub import weight_files

    files = weight_files(spec.model.name_or_path, spec.model.revision)
    if not files:
        return None
    if all(path.suffix == ".safetensors" for path in files):
        return sum(map(_listed, files))
    config = Path(spec.model.name_or_path).expanduser() / "config.json"
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
        return path.stat().st_size // 2  # damaged, as loading it reports; 16 bits each are usual


def _speed() -> float:
    """Floating-point operations per second of all cores together, in products of 512 x 512 matrices in float32."""
    import numpy as np

    cores, times, matrix = len(os.sched_getaffinity(0)), 8, np.ones((512, 512), dtype=np.float32)

    def multiply() -> None:
        for _ in range(times):
            matrix @ matrix

    multiply()
    with ThreadPoolExecutor(cores) as pool:
        began = time.perf_counter()
        for one in [pool.submit(multiply) for _ in range(cores)]:
            one.result()
        return cores * times * 2 * 512**3 / (time.perf_counter() - began)
