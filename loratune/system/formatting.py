"""Values in words: how the report and the model card spell numbers, durations and names."""

import math
from typing import Any

from loratune.plugs import METRICS

# Searched hyperparameters in the order people think of them; names that are not here follow, as they are.
LABELS = {
    "lora_r": "rank",
    "alpha_ratio": "alpha / rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "learning_rate": "learning rate",
    "use_rslora": "rsLoRA",
    "weight_decay": "weight decay",
    "warmup_ratio": "warmup ratio",
    "batch_size": "batch size",
    "epochs": "epochs",
    "target_modules": "target modules",
    "lr_scheduler_type": "learning rate schedule",
}


NOTHING = "–"  # what was not measured: None, or NaN


def _odd(value: float | None) -> str | None:
    """How a number that is none is spelt; None for one that is."""
    if value is None or math.isnan(value):
        return NOTHING
    return ("∞" if value > 0 else "−∞") if math.isinf(value) else None


def metric(name: str) -> str:
    """An objective or constraint with its unit, as a report calls it."""
    return METRICS.label(name)


def label(name: str) -> str:
    return LABELS.get(name, name.replace("_", " "))


def in_order(names: set[str]) -> list[str]:
    known = list(LABELS)
    return sorted(names, key=lambda name: (known.index(name) if name in known else len(known), name))


def show(value: Any) -> str:
    """A hyperparameter or a setting: four significant digits; small ones as 4.794e-4."""
    if value is None:
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if (odd := _odd(value)) is not None:
            return odd
        if value == round(value) and abs(value) < 1e5:
            return str(round(value))
        small = 0 < abs(value) < 1e-3
        mantissa, e, exponent = (f"{value:.3e}" if small else f"{value:.4g}").partition("e")
        if small:
            mantissa = mantissa.rstrip("0").rstrip(".")
        return f"{mantissa}e{int(exponent)}" if e else mantissa
    if isinstance(value, list | tuple):
        return ", ".join(show(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{str(key).replace('_', ' ')} {show(item)}" for key, item in value.items() if item is not None)
    return str(value)


def loss(value: float | None) -> str:
    """A validation loss in nats per response token."""
    odd = _odd(value)
    if value is None or odd is not None:
        return odd or NOTHING
    return f"{value:.4f}" if abs(value) < 1e4 else f"{value:.3g}"


def perplexity(loss: float | None) -> str:
    """exp(loss) in words; of a difference of losses, the ratio of the perplexities."""
    odd = _odd(loss)
    if loss is None or odd is not None:
        return odd or NOTHING
    if loss >= 20:
        return f"e^{loss:.1f}"
    return f"{math.exp(loss):.{3 if math.exp(loss) < 100 else 1}f}"


def signed(value: float | None) -> str:
    odd = _odd(value)
    if value is None or odd is not None:
        return odd or NOTHING
    return f"{value:+.4f}".replace("-", "−")


def percent(share: float) -> str:
    """A share without its sign, for a table in %: `45.2`."""
    return _odd(share) or f"{100 * share:.1f}"


def points(share: float) -> str:
    """A difference of shares in percentage points: `+1.2`."""
    return _odd(share) or f"{100 * share:+.1f}".replace("-", "−")


def measured(value: float) -> str:
    """Three significant digits; `–` for NaN, which was not measured."""
    return _odd(value) or f"{value:.3g}"


def duration(seconds: float) -> str:
    """Two units at most: `12 s`, `4 min`, `3 h 20 min`, `11 d 4 h`."""
    if (odd := _odd(seconds)) is not None:
        return odd
    if round(seconds) < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def count(number: float) -> str:
    """`950`, `12.3 k`, `4.56 M`, `1.20 G`."""
    if (odd := _odd(number)) is not None:
        return odd
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"


def money(amount: float, currency: str = "") -> str:
    """`12.50 EUR`; `12.50` without a unit."""
    return _odd(amount) or f"{amount:.2f} {currency}".rstrip()


def price(amount: float, currency: str = "") -> str:
    """`money` in a list of other numbers: `12.50 EUR`; `a cost of 12.50` without a unit."""
    return money(amount, currency) if currency or not math.isfinite(amount) else f"a cost of {money(amount)}"


def device_time(seconds: float) -> str:
    """Devices' time added up: `13 device-seconds`, from a minute on `0.25 device-hours`."""
    if not math.isfinite(seconds):
        return "–"
    return f"{seconds:.0f} device-seconds" if seconds < 60 else f"{seconds / 3600:.2f} device-hours"


def plural(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
