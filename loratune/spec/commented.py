"""The commented YAML that `loratune init` writes: every field with its default, meaning and unit."""

from collections.abc import Iterator
from typing import Any

import yaml
from pydantic import BaseModel

from loratune.spec.hyperparameters import NAMES
from loratune.spec.own_metrics import OwnMetric
from loratune.spec.sections import Source
from loratune.spec.space import PRESETS
from loratune.spec.study_spec import StudySpec

HEAD = """\
# A study for loratune: what to tune, on which data, within which budget.
# Run it, or continue it after an interruption:  loratune run study.yaml
# Every field is shown with its default; what you delete keeps it. On the command line
# a field is a flag with its dotted name:  --training.epochs 3
"""

SPACE = """\
# What is searched: a preset, recommended | published | ratio, or parameters with their ranges. Short forms:
#   lora_r: [4, 8, 16]                                 numbers, in order
#   use_rslora: [true, false]                          choices without an order
#   learning_rate: {low: 1e-6, high: 1e-3, log: true}  a range; also step, type: int | float
#   lora_dropout: 0.1                                  one value for all trials
# Each may have a default (the first trial's; in the preset recommended it is what `loratune recommend` says), and
# when: {use_rslora: [true]} to exist only then.
# Beside a preset a parameter changes or joins the preset; null takes it out.
"""


def template(model: str = "path/or/hub-id", data: str = "path/to/data.json") -> str:
    """The YAML of a study of this model on this data; it loads as it stands."""
    given = {"model": {"name_or_path": model}, "data": {"train": [data], "validation_fraction": 0.1}}
    return HEAD + "\n" + "\n".join(_lines(StudySpec, given, 0)) + "\n"


def _lines(model: type[BaseModel], given: dict[str, Any], depth: int) -> Iterator[str]:
    for name, field in model.model_fields.items():
        kind = field.annotation
        if name == "search_space":
            yield from ["", *SPACE.splitlines(), "search_space:", "  preset: recommended", *_preset("recommended")]
        elif isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from ["", f"{name}:  # {kind.__doc__}", *_lines(kind, given.get(name, {}), depth + 1)]
        else:
            value = given.get(name, field.get_default(call_default_factory=True))
            value = list(value) if isinstance(value, tuple) else value
            text = yaml.safe_dump([value], default_flow_style=True, width=1000, allow_unicode=True).strip()[1:-1]
            yield f"{'  ' * depth}{name}: {text}  # {field.description}"
            if name == "metrics":
                yield "# a metric that is a mapping has these fields:"
                yield from (f"#   {inner}: {own.description}" for inner, own in OwnMetric.model_fields.items())
            if name == "train":
                yield "  # a source that is a mapping has these fields:"
                yield from (f"  #   {inner}: {source.description}" for inner, source in Source.model_fields.items())


def _preset(name: str) -> Iterator[str]:
    """The preset's own definitions, as comments to begin from."""
    for parameter, definition in PRESETS[name].items():
        text = yaml.safe_dump({parameter: definition}, default_flow_style=True, width=1000, sort_keys=False).strip()[1:-1]
        yield f"  # {text}"
    yield f"  # also searchable: {', '.join(other for other in NAMES if other not in PRESETS[name])}"
