"""Check that an adapter is on before anything is scored with it, through whatever will answer: our hooks, or a server.

1. On fixed texts its logits differ from the bare model's.
2. Its validation loss is the recorded one. A validation set of few tokens is gone through whole; then the two numbers must
   agree. Of a large one a sample is taken, the same for all; then
       |L_sample - L_recorded|          <= 4 standard errors + tolerance
       |gain_sample - gain_recorded|    <= 4 standard errors of the paired gain + tolerance,  gain = L_base - L_adapter
   A sample cannot prove equality; the paired gain, whose error is far smaller than that of a loss, is what tells an
   adapter that is off (gain 0) from one that is on. Where the gain is too small to be told from 0, so is the harm.

An adapter that learnt nothing (dropout 1, a learning rate near 0) may equal the base: its recorded loss then does, too.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from loratune.data.batches import Tokens, collate
from loratune.downstream.answering.adapter_stack import Adapters
from loratune.errors import EvaluationError
from loratune.finetune.model import BaseModel, autocast, output_head
from loratune.finetune.rope import sides_of
from loratune.finetune.validation import token_nll
from loratune.work import Json

PROBE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nName three animals and say where each of them lives.\n\n### Response:",
    "The following are multiple choice questions (with answers).\n\nWhich one is a colour?\nA. green\nB. table\nAnswer:",
    "def add(a, b):\n    return",
)
_WHOLE = {"cpu": 200_000, "cuda": 3_000_000}  # validation tokens gone through per model
_ERRORS = 4.0  # standard errors
_BATCH = 4096  # tokens per pass


@dataclass(frozen=True, kw_only=True)
class AdapterCheck(Json):
    """The result for one adapter."""

    logits_differ: bool
    largest_difference: float  # of logits on the probe
    loss: float  # over the examples gone through
    recorded: float | None
    base_loss: float  # of the bare model over the same
    examples: int
    of: int  # examples of the validation set
    text: str  # for people


@dataclass(frozen=True)
class ExampleLosses:
    """Per example: summed NLL of response tokens, and their number. [m] each."""

    nll: np.ndarray
    count: np.ndarray

    @property
    def mean(self) -> float:
        return float(self.nll.sum() / self.count.sum())


class LossChecker(ABC):
    """Checks adapters one by one; the bare model, at place `base_place`, is measured once."""

    def __init__(self, validation: Tokens, examples: np.ndarray, *, base_place: Any, recorded_base: float | None, exact: bool) -> None:
        """examples: those gone through. recorded_base: the study's own figure for the bare model. exact: in 32 bits or more."""
        self.validation, self.chosen, self.base_place, self.recorded_base = validation, examples, base_place, recorded_base
        self.tolerance = 1e-3 if exact else 1e-2  # other kernels and batches; half precision rounds at 3 digits
        self._base_losses: ExampleLosses | None = None
        self._base_probe: np.ndarray | None = None

    @abstractmethod
    def probe(self, place: Any) -> np.ndarray:
        """Logits, or log-probabilities, on the fixed texts."""

    @abstractmethod
    def losses(self, place: Any) -> ExampleLosses:
        """Losses of the chosen examples, longest first."""

    def check(self, place: Any, name: str, recorded: float | None) -> AdapterCheck:
        """Raises EvaluationError, in one line, when the adapter at `place` cannot be the recorded trial's."""
        if self._base_losses is None or self._base_probe is None:
            self._base_losses, self._base_probe = self.losses(self.base_place), self.probe(self.base_place)
        bare = self._base_losses
        difference = float(np.abs(self.probe(place) - self._base_probe).max())
        own = self.losses(place)
        whole = len(self.chosen) == len(self.validation)
        facts = {
            "logits_differ": difference > 0,
            "largest_difference": difference,
            "loss": own.mean,
            "recorded": recorded,
            "base_loss": bare.mean,
            "examples": len(self.chosen),
            "of": len(self.validation),
        }
        where = "over the whole validation set" if whole else f"over {len(self.chosen):,} of {len(self.validation):,} validation examples"
        if recorded is None:
            if not difference:
                raise EvaluationError(f"{name}: its logits equal the bare model's: the adapter is off, or learned nothing. Not scored.")
            return AdapterCheck(**facts, text=f"its logits differ from the bare model's; no loss was recorded; {own.mean:.4f} {where}")  # type: ignore[arg-type]
        slack = self.tolerance if whole else self.tolerance + _ERRORS * _error(own.nll, own.count, len(self.validation))
        if not abs(own.mean - recorded) <= slack:
            off = ": the adapter is not on" if not difference else ""
            raise EvaluationError(
                f"{name}: validation loss {own.mean:.4f} {where}, but {recorded:.4f} was recorded (allowed difference {slack:.4f}){off}. "
                "Its scores would not be this trial's; it is not scored. Did the adapter, the base model or the data change?"
            )
        recorded_base = bare.mean if self.recorded_base is None else self.recorded_base
        gain, recorded_gain = bare.mean - own.mean, recorded_base - recorded
        slack = 2 * self.tolerance if whole else 2 * self.tolerance + _ERRORS * _error(bare.nll - own.nll, own.count, len(self.validation))
        if abs(gain - recorded_gain) > slack:
            raise EvaluationError(
                f"{name}: {gain:.4f} below the bare model's validation loss {where}, but {recorded_gain:.4f} was recorded "
                f"(allowed difference {slack:.4f}). Its scores would not be this trial's; it is not scored."
            )
        silent = difference == 0
        if silent and abs(recorded_gain) > 2 * self.tolerance:
            raise EvaluationError(
                f"{name}: its logits equal the bare model's, but its recorded loss {recorded:.4f} is not the bare model's "
                f"{recorded_base:.4f}: the adapter is not on. It is not scored."
            )
        effect = "no effect on the logits, as its recorded loss says" if silent else "its logits differ from the bare model's"
        return AdapterCheck(**facts, text=f"{effect}; validation loss {own.mean:.4f} {where}, recorded {recorded:.4f}")  # type: ignore[arg-type]


class AdapterChecker(LossChecker):
    """Checks the adapters of `adapters`, through their hooks in `base`."""

    def __init__(
        self,
        base: BaseModel,
        adapters: Adapters,
        validation: Tokens,
        *,
        base_place: int,
        recorded_base: float | None,
        limit: int | None = None,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        """limit: validation tokens gone through; None: by device."""
        examples = sample(validation, limit or _WHOLE.get(base.device.type, _WHOLE["cuda"]))
        exact = base.dtype in (torch.float32, torch.float64)
        super().__init__(validation, examples, base_place=base_place, recorded_base=recorded_base, exact=exact)
        self.base, self.adapters, self.interrupted = base, adapters, interrupted

    def probe(self, place: int) -> np.ndarray:
        found = []
        with self.adapters.use([place]), torch.inference_mode(), autocast(self.base):
            for text in PROBE:
                ids = self.base.tokenizer(text, return_tensors="pt")["input_ids"].to(self.base.device)
                found.append(self.base.model(input_ids=ids, use_cache=False).logits.float().cpu().flatten())
        return torch.cat(found).numpy()

    def losses(self, place: int) -> ExampleLosses:
        head = output_head(self.base.model)
        lengths = np.asarray(self.validation.lengths)
        order = self.chosen[np.argsort(-lengths[self.chosen], kind="stable")]
        nll, count, start = np.zeros(len(order)), np.zeros(len(order)), 0
        with self.adapters.use([place]), torch.inference_mode(), autocast(self.base):
            while start < len(order):
                if self.interrupted():
                    raise InterruptedError
                some = order[start : start + max(1, _BATCH // int(lengths[order[start]]))]
                sides = sides_of(self.base.model.config)(lengths[some])
                some = some[sides == sides[0]]  # longest first: those of one side stand together
                stop = start + len(some)
                batch = collate(self.validation, some, pad_id=self.base.pad_id)
                rows = (batch.predictors // batch.ids.shape[1]).numpy() + start
                np.add.at(nll, rows, token_nll(self.base.model, head, batch.to(self.base.device)).double().cpu().numpy())
                np.add.at(count, rows, 1)
                start = stop
        return ExampleLosses(nll, count)


def sample(tokens: Tokens, limit: int) -> np.ndarray:
    """All examples, or a sample (seed 0) of about `limit` tokens."""
    lengths = np.asarray(tokens.lengths)
    if lengths.sum() <= limit:
        return np.arange(len(tokens))
    drawn = np.random.default_rng(0).permutation(len(tokens))
    return np.sort(drawn[: max(30, int(np.searchsorted(lengths[drawn].cumsum(), limit)))])


def _error(sums: np.ndarray, count: np.ndarray, of: int) -> float:
    """Standard error of sum(sums) / sum(count), a ratio of sums, sampled without replacement from `of` examples."""
    m, residuals = len(sums), sums - sums.sum() / count.sum() * count
    return float(residuals.std(ddof=1) * math.sqrt(m * max(0.0, 1 - m / of)) / count.sum())


def check_summary(checks: Sequence[AdapterCheck]) -> str:
    """One line for several adapters that passed."""
    worst = max((abs(p.loss - p.recorded) for p in checks if p.recorded is not None), default=0.0)
    whole = all(p.examples == p.of for p in checks)
    over = "the whole validation set" if whole else f"{checks[0].examples:,} of {checks[0].of:,} validation examples"
    silent = sum(not p.logits_differ for p in checks)
    note = f"; {silent} of them without effect, as recorded" if silent else ""
    return f"{len(checks)} adapters are on{note}: their losses over {over} are the recorded ones, within {worst:.1g}"
