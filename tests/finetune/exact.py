"""Comparisons in float64 throughout.

Transformers' RMS norms round to float32, whatever the model's precision. So two sums of the same numbers in another order
agree to eight digits only; where tests want more, norms compute in the precision of their input.
"""

from collections.abc import Iterator

import pytest
import torch

from loratune.finetune import model


@pytest.fixture(scope="module")
def exact_norms() -> Iterator[None]:
    """Models that any engine loads meanwhile have exact norms."""
    load = model.load

    def loaded(*arguments: object, **options: object) -> model.BaseModel:
        base = load(*arguments, **options)  # type: ignore[arg-type]
        for layer in base.model.modules():
            if type(layer).__name__.endswith("RMSNorm"):
                layer.forward = exact(layer)  # type: ignore[method-assign]
        return base

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "load", loaded)
        yield


def exact(norm):  # type: ignore[no-untyped-def]
    name = type(norm).__name__
    eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    weight = getattr(norm, "weight", None)  # Gemma 3n has norms without one
    weight = weight + 1 if name.startswith("Gemma") and not name.startswith("Gemma3n") else weight
    return lambda x: torch.nn.functional.rms_norm(x, (x.shape[-1],), weight, eps)
