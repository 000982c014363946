"""`loratune run --dry-run`: what a study will cost. A first estimate at once, from sizes alone; then the measured one.

The libraries, the data and the model can take minutes to load, so each stage is announced, and reported while it is running.
"""

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratune.cli.recommend import first_guess, guess_lines
from loratune.cli.run import quiet
from loratune.cli.trial_lines import budget
from loratune.plugs import METRICS, SAMPLERS
from loratune.record.paths import StudyPaths
from loratune.system.formatting import count, duration

if TYPE_CHECKING:
    from loratune.spec import StudySpec
    from loratune.study.guess import Guess

_STILL = 10.0  # seconds between two lines of a stage that is running
_TRAINING, _VALIDATION = 4, 2  # floating-point operations per token and weight: forward and back to the adapters; forward
_GPU = 1e14  # operations per second that a data-centre GPU sustains in bfloat16


def dry_run(spec: "StudySpec", facts: dict[str, Any]) -> int:
    """Print what the study will cost, stage by stage, and put it into `facts`.

    Nothing is started, and nothing left behind but the prepared data in the cache.
    """
    begun = StudyPaths(spec.folder).begun
    what = f"Study {spec.name}, which {spec.folder} holds a part of" if begun else f"Study {spec.name}"
    print(f"{what}: {budget(spec)} by {spec.sampler.name}. Nothing is started.\n", flush=True)
    started = time.monotonic()
    if any(METRICS[limit.metric].known == "before" for limit in spec.limits):
        with _stage("Reading how large adapters of this model are, for the constraints"):
            from loratune.study.size_limits import check_size_limits

            check_size_limits(spec)  # loads torch, which a start does too
    loaded = time.monotonic() - started
    spec, guessed = first_guess(spec)
    guard = _guard(spec, guessed)
    print("\n".join(guess_lines(spec, guessed)), flush=True)
    quiet()
    if begun:
        from loratune.study.session import same_description

        same_description(spec)
    else:
        with _stage("First estimate, from the sizes of model and data"):
            lines = first_estimate(spec, guard)
        print("\n".join(f"  {line}" for line in lines), flush=True)
    began = time.monotonic()
    with _stage("Loading the libraries"):
        from loratune.data.cache import prepare_data
        from loratune.study.driver import check_functions, known_beforehand
        from loratune.study.plan import plan
    check_functions(spec)
    notes: list[str] = []
    with _stage("Reading and tokenising the data"):
        data = prepare_data(spec, notes)
        beforehand = known_beforehand(spec, data)
    print("\n".join([*notes, data.summary(), *beforehand]), flush=True)
    read = loaded + time.monotonic() - began
    with _stage("Measuring: the model is loaded and the largest adapter trained for some steps"):
        planned = plan(spec, data, guard)
    planned = replace(planned, seconds_to_start=read + planned.seconds_to_load)
    print(f"\n{planned}")
    facts["plan"] = asdict(planned) | {"totals": planned.totals()}
    return 0


def _guard(spec: "StudySpec", guessed: "Guess | None") -> bool:
    """Whether the search begins with short runs, since the first guess is an extrapolation."""
    if guessed is None or not SAMPLERS[spec.sampler.name].sets_length:
        return False
    from loratune.study.guess import prior_of

    return prior_of(spec, guessed.recommendation).outside


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


def first_estimate(spec: "StudySpec", guard: bool = False) -> list[str]:
    """Examples, tokens, weights and roughly the time, in lines; needs neither torch nor a tokenizer.

    time = (4 tokens trained + 2 tokens validated) x weights / operations per second, without embeddings, adapters and all overhead.
    Raises DataError.
    """
    from loratune.data.sources import DataRecipe
    from loratune.finetune.on_disk import data_size, weight_count
    from loratune.study.plan import expected
    from loratune.system import hub

    default = spec.hyperparameters(spec.search_space.default_values())
    runs, validations = expected(spec, guard)
    size = data_size(
        DataRecipe.from_plain(spec.data_recipe_dict()), hub.small_file(spec.model.name_or_path, "tokenizer.json", spec.model.revision)
    )
    if size is None:
        return ["data          counted when it is loaded: on the Hugging Face hub, or larger than 100 MiB"]
    train, validation, tokens = size
    steps = int(train * default.epochs) // default.batch_size
    trained, validated = runs * steps * default.batch_size * tokens, validations * validation * tokens
    lines = [
        f"data          {train:,} training and {validation:,} validation examples of about {tokens:,.0f} tokens",
        f"work          {runs:.4g} full runs of about {steps:,} steps; about {count(trained)} training tokens",
    ]
    weights = weight_count(spec.model.name_or_path, spec.model.revision)
    if weights is None:
        return [*lines, "model         not on this machine yet; its speed is measured once it is loaded"]
    work = _multiplied(spec, weights) * (_TRAINING * trained + _VALIDATION * validated)
    lines.append(f"model         {count(weights)} weights")
    rough = "the time is measured below"
    if spec.executor.device != "cpu" and any(Path("/dev").glob("nvidia[0-9]*")):
        return [*lines, f"roughly       {duration(work / _GPU)} of one GPU, at {_GPU / 1e12:.0f} TFLOP/s; {rough}"]
    speed = _speed()
    return [*lines, f"roughly       {duration(work / speed)} on these processors, at {speed / 1e9:.0f} GFLOP/s; {rough}"]


def _multiplied(spec: "StudySpec", weights: int) -> int:
    """The weights that every token is multiplied by: without the embeddings, which are looked up, and the head, for answers alone."""
    from loratune.study.guess import model_config, width_of

    config = model_config(spec.model.name_or_path, spec.model.revision)
    inner = config.get("text_config")
    text = inner if isinstance(inner, dict) else config
    vocabulary = text.get("vocab_size")
    tables = 1 if text.get("tie_word_embeddings", True) else 2
    looked_up = tables * vocabulary * (width_of(text) or 0) if isinstance(vocabulary, int) else 0
    return weights - looked_up if looked_up < weights else weights


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
