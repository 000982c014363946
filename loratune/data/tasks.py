"""A task: what is learnt from an example. Supervised fine-tuning on responses is the only one so far.

`prepare` asks it for an example's tokens; both engines ask it for the loss and the validation metric of the tokens that it
marked. A new task is one file that adds itself to `TASKS`.

Notation: N marked tokens of a forward pass; their negative log-likelihoods `nll` and the tokens `labels` are tensors [N].
"""

from typing import Any

from loratune.data.prompts import Encoded, Prompt
from loratune.data.sources import Example
from loratune.errors import ModelError

Tensor = Any  # torch's, which is not imported here


class TrainingTask:
    """Supervised fine-tuning (SFT): the responses are learnt, and the metric is their mean NLL. Others override its methods."""

    name = "sft"

    def encode(self, prompt: Prompt, example: Example, max_length: int) -> Encoded | None:
        """The example's tokens, and which of them are marked; None where none is. Raises UnfitError."""
        return prompt.encode(example, max_length)

    def loss(self, nll: Tensor, labels: Tensor) -> Tensor:
        """Each token's loss, [N], differentiable in `nll`. A step's loss is their sum / their number in the global batch."""
        return nll

    def metric(self, nll: Tensor, labels: Tensor) -> Tensor:
        """What each token adds to the metric, [N]: it is their sum / their number, over the whole validation set."""
        return nll


SFT = TrainingTask()
TASKS = {SFT.name: SFT}


def task_named(name: str) -> TrainingTask:
    """Raises ModelError for a name that is not in `TASKS`."""
    if name not in TASKS:
        raise ModelError(f"task: {name!r} is not known; allowed: {', '.join(TASKS)}.")
    return TASKS[name]
