"""Which devices will wait, and what fills them."""

import pytest

from loratune.record.idle import busy_at_most, idle_devices


@pytest.mark.parametrize(
    ("sampler", "trials", "places", "devices", "per_trial", "cluster", "said"),
    [
        ("tpe", 100, 8, 8, 1, False, ""),
        ("bracket", 100, 3, 3, 1, True, ""),
        ("bracket", 100, 12, 3, 1, True, ""),  # a wave of three is all there is
        (
            "bracket",
            100,
            8,
            8,
            1,
            False,
            "5 of 8 devices will wait: sampler bracket starts at most 3 trials together. Another one, as sampler.name: tpe, fills them; "
            "executor.devices leaves them to others.",
        ),
        (
            "bracket",
            100,
            3,
            16,
            2,
            True,
            "10 of 16 devices will wait: sampler bracket starts at most 3 trials together. Another one, as sampler.name: tpe, fills them.",
        ),
        ("random", 6, 8, 8, 1, True, "2 of 8 devices will wait: budget.trials is 6. A larger one fills them."),
        (
            "tpe",
            100,
            2,
            8,
            2,
            True,
            "4 of 8 devices will wait: 2 runs in flight. executor.workers: 4 fills them, from a study's start on.",
        ),
        (
            "tpe",
            100,
            8,
            8,
            1,
            True,
            "results are applied in order, so a device may wait for a slower one. executor.workers: 32 prevents that, from a study's "
            "start on; the sampler then knows less when it proposes.",
        ),
        ("tpe", 100, 32, 8, 1, True, ""),
        ("tpe", 8, 8, 8, 1, True, ""),  # nothing is left to give a device that is done
        ("tpe", 100, 1, 1, 1, True, ""),
    ],
)
def test_what_is_told(sampler: str, trials: int, places: int, devices: int, per_trial: int, cluster: bool, said: str) -> None:
    assert idle_devices(sampler=sampler, trials=trials, places=places, devices=devices, per_trial=per_trial, cluster=cluster) == said


@pytest.mark.parametrize(("sampler", "trials", "places", "busy"), [("bracket", 100, 8, 3), ("tpe", 100, 8, 8), ("tpe", 5, 8, 5)])
def test_how_many_train_together(sampler: str, trials: int, places: int, busy: int) -> None:
    assert busy_at_most(sampler, trials, places) == busy
