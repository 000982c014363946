"""The hyperparameters that can be searched: what any value of each must be, and their other names."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from loratune.spec.validation_errors import not_allowed, shown
from loratune.work import Hyperparameters

TARGET_MODULES = ("qv", "qkvo", "mlp", "all-linear")
"""The named sets of linear layers, resolved for each architecture by `finetune/targets.py`."""


HUGE = 1e15  # nothing searchable is larger; beyond it floats lose whole numbers


@dataclass(frozen=True, kw_only=True)
class Searchable:
    """What any value of a hyperparameter must be."""

    kind: Literal["int", "float", "bool", "text"]
    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False  # whether `low` itself is excluded
    often_whole: bool = False  # {low: 1, high: 64} then means whole numbers

    def refusal(self, value: Any) -> str:
        """Why `value` is none of this hyperparameter's, or ""."""
        if self.kind == "text":
            return "" if value in TARGET_MODULES else not_allowed(value, TARGET_MODULES)
        if self.kind == "bool":
            return "" if isinstance(value, bool) else f"got {shown(value)}; needed: true or false"
        if isinstance(value, bool) or not isinstance(value, int if self.kind == "int" else int | float):
            return f"got {shown(value)}; needed: {'a whole number' if self.kind == 'int' else 'a number'}"
        inside = (self.low < value if self.low_open else self.low <= value) and value <= self.high
        return "" if inside and value <= HUGE else f"got {shown(value)}; allowed: {self.allowed}"

    @property
    def allowed(self) -> str:
        """The allowed interval in words."""
        if math.isfinite(self.high):
            return f"{self.low:g} to {self.high:g}"
        return f"{'whole numbers' if self.kind == 'int' else 'numbers'} {'>' if self.low_open else '>='} {self.low:g}"


NAMES: dict[str, Searchable] = {
    "lora_r": Searchable(kind="int", low=1),
    "lora_alpha": Searchable(kind="float", low=0, low_open=True, often_whole=True),
    "alpha_ratio": Searchable(kind="float", low=0, low_open=True),
    "lora_dropout": Searchable(kind="float", low=0, high=1),
    "learning_rate": Searchable(kind="float", low=0, low_open=True),
    "use_rslora": Searchable(kind="bool"),
    "weight_decay": Searchable(kind="float", low=0),
    "warmup_ratio": Searchable(kind="float", low=0, high=1),
    "batch_size": Searchable(kind="int", low=1),
    "epochs": Searchable(kind="float", low=0, low_open=True, often_whole=True),
    "loraplus_lr_ratio": Searchable(kind="float", low=0, low_open=True, often_whole=True),
    "target_modules": Searchable(kind="text"),
}

ALIASES: dict[str, str] = {
    "r": "lora_r",
    "rank": "lora_r",
    "lora_rank": "lora_r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "lr": "learning_rate",
    "warmup": "warmup_ratio",
    "train_batch_size": "batch_size",
    "global_batch_size": "batch_size",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "lora_target_modules": "target_modules",
}
"""Names that people know from elsewhere."""


def published_default(name: str) -> Any:
    """The published default of a hyperparameter; of alpha_ratio, the published alpha over the published rank."""
    constants = Hyperparameters()
    return constants.lora_alpha / constants.lora_r if name == "alpha_ratio" else getattr(constants, name)
