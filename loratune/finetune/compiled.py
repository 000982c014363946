"""Small pure functions that a GPU computes in one kernel each: compiled there, step by step elsewhere.

Each elementwise step reads and writes its tensors whole, and what bounds it is the memory. `torch.compile` makes one kernel
of a chain of them, with sizes that may change from pass to pass. Blocks and layers stay as Transformers has them: only
these leaves are compiled, so a model brings nothing that a compiler could stumble over.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch

from loratune.finetune.memory import is_out_of_memory

_broken: list[str] = []  # why nothing is compiled in this process


class Leaf:
    """A function of tensors, without gradient, that changes none of them. Use as a decorator.

    Where no compiler is at hand (Triton, or the C compiler that it needs), one warning is given, and steps are taken.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self._compiled: Callable[..., Any] | None = None
        functools.update_wrapper(self, function)

    def __call__(self, *given: Any) -> Any:
        if _broken or not compiles(given):
            return self.function(*given)
        try:
            return self.compiled(*[one.detach() if isinstance(one, torch.Tensor) else one for one in given])
        except RuntimeError as error:
            from torch._dynamo.exc import TorchDynamoException  # a second of importing, for those who compile

            if not isinstance(error, TorchDynamoException) or is_out_of_memory(error):
                raise
            why = str(error).strip().splitlines()[0]
            _broken.append(why)
            warnings.warn(f"torch.compile does not work here, so training takes more and slower steps ({why})", RuntimeWarning, 2)
            return self.function(*given)

    @property
    def compiled(self) -> Callable[..., Any]:
        if self._compiled is None:
            self._compiled = torch.compile(self.function, dynamic=True, fullgraph=True)
        return self._compiled


def compiles(given: tuple[Any, ...]) -> bool:
    """Whether a leaf that is given these is compiled."""
    return any(isinstance(one, torch.Tensor) and one.is_cuda for one in given)


def on_gpu(x: torch.Tensor) -> bool:
    """Whether launches cost more than arithmetic where x lies."""
    return x.device.type != "cpu"
