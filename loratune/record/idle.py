"""Devices that a study leaves without work, and the setting that changes that: told before it begins and while it runs."""

from loratune.plugs import SAMPLERS
from loratune.system.formatting import plural

_STRAGGLERS = 4  # runs in flight per device that keep all busy: benchmarks/scale.py --order


def busy_at_most(sampler: str, trials: int, places: int) -> int:
    """How many of a study's `places` can train at the same time, by what its sampler starts together and its number of trials."""
    return min(places, trials, SAMPLERS[sampler].wave or places)


def idle_devices(*, sampler: str, trials: int, places: int, devices: int, per_trial: int, cluster: bool) -> str:
    """One sentence on the devices that will wait; empty where all have work.

    trials: of the budget. places: runs in flight, as pinned when the study begins. devices: that trials may use together.
    cluster: whether places and devices are told apart there (`executor.workers`, `max_devices`).
    """
    there, wave = devices // per_trial, SAMPLERS[sampler].wave
    busy = busy_at_most(sampler, trials, places)
    if busy < there:
        fewer = "" if cluster else "; executor.devices leaves them to others"  # a cluster is asked for no more than can be used
        if busy == wave:
            why = f"sampler {sampler} starts at most {plural(busy, 'trial')} together. Another one, as sampler.name: tpe, fills them"
        elif busy == trials:
            why = f"budget.trials is {trials}. A larger one fills them"
        else:
            why = f"{plural(places, 'run')} in flight. executor.workers: {there} fills them, from a study's start on"
        return f"{(there - busy) * per_trial} of {plural(devices, 'device')} will wait: {why}{fewer}."
    if cluster and wave is None and there > 1 and places < min(2 * there, trials):
        more = min(_STRAGGLERS * there, trials)
        return (
            "results are applied in order, so a device may wait for a slower one. "
            f"executor.workers: {more} prevents that, from a study's start on; the sampler then knows less when it proposes."
        )
    return ""
