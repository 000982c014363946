"""A vLLM server as the engine: the job's adapters are its LoRA modules, prompts go to it as token ids, tokens come back.

Answers are read here, by the rule of our own engine (completions.py). They are asked for a piece at a time, twice as long each time,
so that little is written behind an answer that is decided; the server still has the keys and values of what came before.
Log-likelihoods are those of the choice's tokens in prompt and choice together (`prompt_logprobs`).

A server of ours has the models under their names. One whose address is given has an adapter as STUDY-NAME, if its owner loaded it;
else it is loaded for the time of the evaluation, under a name that the adapter's content is part of.
"""

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import transformers

from loratune.data.batches import Tokens
from loratune.data.prompts import answer_ends, end_ids
from loratune.data.tokenizers import load_tokenizer
from loratune.downstream.answering.adapter_check import PROBE, ExampleLosses, LossChecker, sample
from loratune.downstream.answering.answering_engine import Interrupted
from loratune.downstream.answering.completions import ItemAnswer, Reader, answer_of, likeliest
from loratune.downstream.answering.completions_client import CompletionsClient
from loratune.downstream.answering.forward import context_of
from loratune.downstream.answering.rows import PromptRow, RowMaker
from loratune.downstream.answering.vllm_server import BASE_NAME, VllmServer
from loratune.downstream.job import VLLM, EvaluationJob
from loratune.downstream.results.scores import adapter_fingerprint, describe_model
from loratune.downstream.tasks.base import Benchmark, Item
from loratune.downstream.tasks.harness import HarnessResult
from loratune.errors import EvaluationError, ModelError
from loratune.finetune.model import choose_device, choose_dtype, load_config
from loratune.finetune.rope import sides_of

IN_FLIGHT = 128  # requests at a time; vLLM computes up to 256 of them together
_PIECE = 32  # tokens asked for at first
_TOGETHER = 256  # items made into rows at a time
_SOON = 0.5  # seconds after which answers are given back
_CHECKED = 200_000  # validation tokens gone through per model
_PROBED = 1  # tokens that a server has to write, also where only the prompt's probabilities are asked for


class ServedEngine:
    """An `AnsweringEngine`. Raises ModelError for a model that vLLM computes otherwise than it was trained."""

    def __init__(self, job: EvaluationJob, *, longest: int, interrupted: Interrupted) -> None:
        """longest: an upper bound of a prompt's and its answer's tokens."""
        config = load_config(job.recipe)
        self.context = context_of(config)
        if len(np.unique(sides_of(config)(np.arange(1, self.context + 1)))) > 1:
            raise ModelError(
                f"model {job.recipe.name_or_path!r}: its rotary frequencies depend on a sequence's length, which vLLM decides once for a "
                f"whole server. Without --engine {VLLM} the engine loratune answers."
            )
        recipe = job.recipe
        self.tokenizer = load_tokenizer(recipe.name_or_path, recipe.revision, recipe.trust_remote_code)
        self.ends = answer_ends(self.tokenizer) | end_ids(_generation_config(job, config).eos_token_id)
        self._server: VllmServer | None = None
        self._loaded: list[str] = []
        self.exact = False
        if job.server is None:
            device = choose_device("auto")
            dtype = str(choose_dtype(recipe.dtype, device)).removeprefix("torch.")
            self.exact = dtype == "float32"
            self._server = VllmServer(job, dtype=dtype, length=min(self.context, longest + _PROBED), on_cpu=device.type == "cpu")
            self.client = CompletionsClient(self._server.url, alive=self._server.alive, note=self._server.note, own=True)
        else:
            self.client = CompletionsClient(job.server)
        self._pool = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="answering")
        try:
            if self._server is not None:
                self._server.wait(lambda: self.client.models(patient=False), interrupted)
            self._names = self._served_names(job)
        except BaseException:
            self.close()
            raise

    def checker(self, validation: Tokens, recorded_base: float | None, interrupted: Interrupted) -> "ServedChecker":
        return ServedChecker(self, validation, recorded_base, interrupted)

    def place(self, name: str) -> str:
        return self._names[name]

    def answers(
        self, benchmark: Benchmark, items: Sequence[Item], names: Sequence[str], *, seed: int, interrupted: Interrupted
    ) -> Iterator[tuple[list[Item], list[list[ItemAnswer]]]]:
        reader = Reader(self.tokenizer, benchmark, self.ends, self.context)
        tasks = (
            ((place, name), lambda rows=rows, name=name: self._answer(reader, rows, self._names[name], seed))
            for place, rows in self._rows(benchmark, items)
            for name in names
        )
        found: dict[int, dict[str, ItemAnswer]] = {}
        for some in self.together(tasks, interrupted):
            for (place, name), answer in some:
                found.setdefault(place, {})[name] = answer
            whole = [place for place, own in found.items() if len(own) == len(names)]
            answers = {place: found.pop(place) for place in whole}
            if whole:
                yield [items[place] for place in whole], [[answers[place][name] for place in whole] for name in names]

    def harness(self, task: str, name: str) -> HarnessResult:
        raise EvaluationError(f"lm_eval:{task} is answered by the engine loratune alone.")

    def close(self) -> None:
        """What is still being asked ends with its next piece, or with the server."""
        if not self.client.closed.is_set():
            for name in self._loaded:
                with contextlib.suppress(EvaluationError):  # it is their server, and the evaluation is over
                    self.client.unload(name)
        self.client.closed.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._server is not None:
            self._server.close()

    def together(self, tasks: Iterator[tuple[Any, Callable[[], Any]]], interrupted: Interrupted) -> Iterator[list[tuple[Any, Any]]]:
        """Some at a time, what the tasks give, each with its key. So many run at once; the first error is raised."""
        running: dict[Future[Any], Any] = {}
        found, mark = [], time.monotonic()
        try:
            while True:
                for key, task in islice(tasks, IN_FLIGHT - len(running)):
                    running[self._pool.submit(task)] = key
                done, _ = wait(running, timeout=_SOON, return_when=FIRST_COMPLETED)
                if interrupted():
                    raise InterruptedError
                found += [(running.pop(future), future.result()) for future in done]
                if found and (not running or time.monotonic() - mark > _SOON):
                    yield found
                    found, mark = [], time.monotonic()
                if not running:
                    return
        finally:
            for future in running:
                future.cancel()

    def _served_names(self, job: EvaluationJob) -> dict[str, str]:
        """The name under which the server has each model."""
        served = self.client.models()
        known, bare = {model["id"] for model in served}, [model["id"] for model in served if not model.get("parent")]
        if self._server is not None:
            names = {model.name: model.name if model.adapter is not None else BASE_NAME for model in job.models}
            if strange := {*names.values(), BASE_NAME} - known:
                raise EvaluationError(f"another server answers at {self.client.url}: it has no {', '.join(sorted(strange))}. Run again.")
            self.base_name = BASE_NAME
            return names
        if not bare:
            raise EvaluationError(f"{self.client.url} serves no base model.")
        self.base_name, found, study = str(bare[0]), {}, job.folder.parent.resolve().name
        for model in job.models:
            found[model.name] = self.base_name
            if model.adapter is not None:
                owners, ours = f"{study}-{model.name}", f"{study}-{model.name}-{(adapter_fingerprint(model.adapter) or '')[:12]}"
                found[model.name] = owners if owners in known else ours
                if not {owners, ours} & known:
                    self._load(model.name, ours, model.adapter)
        return found

    def _load(self, model: str, name: str, adapter: Path) -> None:
        try:
            self.client.load(name, adapter)
        except EvaluationError as error:
            raise EvaluationError(
                f"{describe_model(model)}: {error} A server takes adapters while it runs if it was started with --enable-lora, a "
                "--max-lora-rank as large as theirs and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, and if it sees the folder."
            ) from error
        self._loaded.append(name)

    def _rows(self, benchmark: Benchmark, items: Sequence[Item]) -> Iterator[tuple[int, list[PromptRow]]]:
        """Each item's place and rows. Scored choices leave room for the tokens that a server has to read and write besides."""
        writing, scoring = RowMaker(self.tokenizer, self.context), RowMaker(self.tokenizer, self.context - 1 - _PROBED)
        for start in range(0, len(items), _TOGETHER):
            members = list(enumerate(items[start : start + _TOGETHER], start))
            written, scored = ([one for one in members if bool(one[1].choices) is choices] for choices in (False, True))
            rows: dict[int, list[PromptRow]] = {}
            for row in [*(writing.to_write(benchmark, written) if written else ()), *(scoring.to_score(scored) if scored else ())]:
                rows.setdefault(row.place, []).append(row)
            yield from sorted(rows.items())

    def _answer(self, reader: Reader, rows: list[PromptRow], model: str, seed: int) -> ItemAnswer:
        return self._scored(rows, model) if rows[0].scored else self._written(reader, rows[0], model, seed)

    def _scored(self, rows: list[PromptRow], model: str) -> ItemAnswer:
        spoken = [(choice, tokens, row.ids + tokens) for row in rows for choice, tokens in row.scored]
        asked = [ids for _, tokens, ids in spoken if tokens]
        known = iter(self.client.log_probabilities(model, asked) if asked else ())
        likely = {choice: sum(next(known)[-len(tokens) :]) if tokens else 0.0 for choice, tokens, _ in spoken}
        return likeliest(rows[0], [likely[choice] for choice in range(len(rows[0].item.choices))])

    def _written(self, reader: Reader, row: PromptRow, model: str, seed: int) -> ItemAnswer:
        benchmark, piece = reader.benchmark, _PIECE
        (completion,) = reader.begin([row])
        while completion.open:
            before = [*row.ids, *completion.tokens]
            most = min(piece, benchmark.max_new_tokens - len(completion.tokens), self.context - len(before))
            drawn = _seed(f"{seed}/{row.item.id}/{len(completion.tokens)}")
            tokens, ended = self.client.write(
                model, before, most=most, ends=sorted(self.ends), temperature=benchmark.temperature, seed=drawn
            )
            for token in tokens:
                reader.take([completion], [token])
            if completion.open and (ended or not tokens):
                reader.take([completion], [next(iter(self.ends))])
            piece *= 2
        return answer_of(completion)


class ServedChecker(LossChecker):
    """Checks the adapters of a server, by what it says of texts that it is given."""

    def __init__(self, engine: ServedEngine, validation: Tokens, recorded_base: float | None, interrupted: Interrupted) -> None:
        chosen = sample(validation, _CHECKED)
        chosen = chosen[np.asarray(validation.lengths)[chosen] <= engine.context - _PROBED]
        super().__init__(validation, chosen, base_place=engine.base_name, recorded_base=recorded_base, exact=engine.exact)
        self.engine, self.interrupted = engine, interrupted

    def probe(self, place: str) -> np.ndarray:
        texts = [self.engine.tokenizer(text)["input_ids"] for text in PROBE]
        return np.array([value for ids in texts for value in self.engine.client.log_probabilities(place, [ids])[0]])

    def losses(self, place: str) -> ExampleLosses:
        nll, count = np.zeros(len(self.chosen)), np.zeros(len(self.chosen))
        asked = ((at, lambda at=at: self._loss(place, int(self.chosen[at]))) for at in range(len(self.chosen)))
        for some in self.engine.together(asked, self.interrupted):
            for at, found in some:
                nll[at], count[at] = found
        return ExampleLosses(nll, count)

    def _loss(self, place: str, example: int) -> tuple[float, int]:
        ids, mask = self.validation[example]
        (values,) = self.engine.client.log_probabilities(place, [ids.tolist()])
        return -float(np.asarray(values)[mask[1:]].sum()), int(mask[1:].sum())


def _generation_config(job: EvaluationJob, config: Any) -> Any:
    """As Transformers has it of a loaded model."""
    try:
        return transformers.GenerationConfig.from_pretrained(job.recipe.name_or_path, revision=job.recipe.revision or "main")
    except OSError:
        return transformers.GenerationConfig.from_model_config(config)


def _seed(text: str) -> int:
    """A number of 63 bits that is a function of the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
