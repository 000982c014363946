"""With which changes of its description a study may go on: those on which no result depends, and a larger budget."""

from collections.abc import Iterator
from typing import Any

from loratune.spec.study_spec import StudySpec


def allowed_change(path: str) -> bool:
    """Whether a study may go on although this field changed: it bears on how long, where or how visibly trials run, not on results."""
    if path.startswith(("budget.", "output.")) or path in ("training.report_to", "training.tokens_per_pass"):
        return True
    if path in ("scoring.allow_code_execution", "scoring.weaker_sandbox"):
        return True
    # Workers in flight decide what the sampler knows when it proposes; the kind of device decides the dtype.
    return path.startswith("executor.") and path not in ("executor.workers", "executor.device")


def differences(old: StudySpec, new: StudySpec) -> list[str]:
    """Why `new` cannot continue the study that `old` began, one line each; empty when it can."""
    found = []
    orders = [list(spec.search_space.parameters) for spec in (old, new)]
    if orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1]):
        found.append(f"search_space: was {', '.join(orders[0])}, now {', '.join(orders[1])}; the order counts")
    before, after = (dict(_leaves(spec.model_dump(mode="json"))) for spec in (old, new))
    for path in dict.fromkeys([*before, *after]):
        was, now = before.get(path), after.get(path)
        if was == now:
            continue
        if path in ("budget.price_per_device_hour", "budget.currency"):
            continue
        if path.startswith("budget."):
            if now is not None and (was is None or now < was):
                found.append(f"{path}: was {was!r}, now {now!r}; a budget can grow, not shrink")
        elif path == "executor.devices" and len(was or ()) != len(now or ()):
            found.append(f"{path}: was {was!r}, now {now!r}; you may use other devices, but the same number of them")
        elif path == "data.prompt" and now == "auto":  # which was not the default in older studies
            found.append(f"{path}: was {was!r}, now {now!r}; to continue that study, write prompt: {was}")
        elif path == "data.on_bad_rows" and now == "auto":
            found.append(f"{path}: was {was!r}, now {now!r}; to continue that study, write on_bad_rows: {was}")
        elif not allowed_change(path):
            found.append(f"{path}: was {was!r}, now {now!r}")
    return found


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else key)
    else:
        yield path, value
