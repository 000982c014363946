"""What a study will cost, in numbers and in the lines of a dry run. `plan.py` measures it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from loratune.executors.devices import ClusterDevices
from loratune.system.formatting import device_time, duration, money, plural, price

_BUSY = 1.5  # processes per processor, beyond which a measured speed is not the machine's
_SHARED, _SHARED_BUSY = (0.7, 1.3), (0.5, 2.0)  # speeds of processors that others use too, over the one measured a moment before


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a study is expected to cost from now on. One trial is one at the search space's defaults, trained to its end."""

    trials: int
    full_runs: float  # what all trials cost together, in runs at the defaults that are trained to their end
    done_trials: int = 0  # that the study's folder holds already; not in the numbers above, nor in those made of them
    done_full_runs: float = 0.0
    spent_hours: float = 0.0  # that count towards max_hours
    spent_device_hours: float = 0.0
    steps: int  # optimiser steps of one trial
    trial_tokens: int  # training tokens of one trial
    validation_tokens: int  # of one validation
    validations: float  # in all
    training_tokens_per_second: float  # per process, all its slots together
    validation_tokens_per_second: float
    processes: int  # that train at the same time, each on devices of its own
    slots: int  # trials that one process trains together, sharing its speed
    devices_per_trial: int
    device: str
    peak_memory_bytes: int  # per device, for the largest adapter of the space
    largest_rank: int
    adapter_bytes: int  # of that adapter
    adapters_kept: int
    problem: str = ""  # why the largest adapter cannot be trained here
    spread: tuple[float, float] = (1.0, 1.0)  # slowest and fastest speed to reckon with, over the one told
    spread_is_assumed: bool = False  # on processors, by `widened`
    load: float = 0.0  # processes that wanted a processor while that was measured, per processor
    max_hours: float | None = None
    max_device_hours: float | None = None
    max_cost: float | None = None
    price: float | None = None  # of a device-hour
    currency: str = ""
    notes: tuple[str, ...] = ()  # on what is not in these numbers
    seconds_to_load: float = 0.0  # model and data, in one process
    seconds_to_start: float = 0.0  # the libraries and the data too, as measured by whoever made the plan; not in the hours
    fresh_runs: int = 0  # of full length that `loratune select` trains afterwards, at most; not in the hours
    idle: str = ""  # a sentence on devices without work
    cluster: ClusterDevices | None = None  # that the trials train on; its devices are taken to be as fast as this machine's

    @property
    def tokens(self) -> float:
        """Training tokens of all trials."""
        return self.full_runs * self.trial_tokens

    @property
    def trial_seconds(self) -> float:
        """One trial's share of its device's time, its last validation included."""
        return self.trial_tokens / self.training_tokens_per_second + self.validation_tokens / self.validation_tokens_per_second

    @property
    def device_hours(self) -> float:
        validating = self.validations * self.validation_tokens / self.validation_tokens_per_second
        return (self.tokens / self.training_tokens_per_second + validating) * self.devices_per_trial / 3600

    @property
    def wall_hours(self) -> float:
        return self.device_hours / self.devices_per_trial / self.processes

    @property
    def cost(self) -> float | None:
        """Of all device-hours; None without a price."""
        return None if self.price is None else self.device_hours * self.price

    @property
    def fresh_device_hours(self) -> float:
        """Of what `loratune select` trains."""
        return self.fresh_runs * self.trial_seconds * self.devices_per_trial / 3600

    def totals(self) -> dict[str, Any] | None:
        """What all of it costs, in plain numbers; None where it cannot be trained.

        seconds and cost are (at the fastest speed measured, at the slowest), without the seconds to start. limits: of the budget, that
        end it earlier. select: what `loratune select` costs besides, at most. all: search, selection and a start of each, during which
        the devices are held too.
        """
        if self.problem:
            return None
        start = self.seconds_to_start or self.seconds_to_load
        return {
            **self._totals(self.full_runs, self.tokens, self.device_hours),
            "start_seconds": start,
            "limits": [" ".join(line.split()) for line in self._limits()],
            "select": self._totals(self.fresh_runs, self.fresh_runs * self.trial_tokens, self.fresh_device_hours),
            "all": self._all(),
        }

    @property
    def _starts(self) -> int:
        return (self.full_runs > 0) + (self.fresh_runs > 0)

    def _all(self) -> dict[str, Any]:
        """The totals of search, selection and their starts."""
        hours, runs = self.device_hours + self.fresh_device_hours, self.full_runs + self.fresh_runs
        found = self._totals(runs, self.tokens + self.fresh_runs * self.trial_tokens, hours)
        waiting = self._starts * (self.seconds_to_start or self.seconds_to_load)  # at any speed
        held = waiting * self.processes * self.devices_per_trial / 3600
        found |= {"seconds": [seconds + waiting for seconds in found["seconds"]], "device_hours": hours + held}
        if self.price is not None:
            found["cost"] = [cost + held * self.price for cost in found["cost"]]
        return found

    def _totals(self, runs: float, tokens: float, hours: float) -> dict[str, Any]:
        seconds = hours * 3600 / self.devices_per_trial / self.processes
        cost = None if self.price is None else [hours * self.price / speed for speed in reversed(self.spread)]
        spread = [seconds / speed for speed in reversed(self.spread)]
        currency = self.currency if cost is not None else None
        return {"seconds": spread, "device_hours": hours, "tokens": tokens, "full_runs": runs, "cost": cost, "currency": currency}

    def __str__(self) -> str:
        done = f"; {self.done_trials} are in its folder already, the work of {self.done_full_runs:.3g}" if self.done_trials else ""
        more = " more" if self.done_trials else ""
        lines = [f"trials        {self.trials}{more}, the work of {self.full_runs:.4g} full runs at the defaults{done}"]
        lines += [f"one trial     {self.steps:,} step{'s' if self.steps != 1 else ''}, {self.trial_tokens:,} training tokens"]
        lines += [
            f"in all        {self.tokens:,.0f} training tokens, {self.validations:.0f} validations of {self.validation_tokens:,} tokens"
        ]
        if self.problem:
            return "\n".join([*lines, f"device        {self.device}", f"problem       rank {self.largest_rank}: {self.problem}"])
        training, validating = self.training_tokens_per_second, self.validation_tokens_per_second
        kept, temporary = self.adapters_kept * self.adapter_bytes, self.processes * self.slots * 2 * 3 * self.adapter_bytes
        lines += [
            f"device        {self.device}; {self.processes * self.slots} at a time",
            *self._nodes(),
            *([f"waiting       {self.idle}"] if self.idle else []),
            f"speed         {training:,.0f} training tokens/s, {validating:,.0f} in validation",
            f"time          {self._range(self.trial_seconds / 3600)} per trial; {self._range(self.wall_hours)} in all, "
            f"{device_time(self.device_hours * 3600)}",
            *self._cost(),
            *self._start(),
            *self._select(),
            *self._together(),
            *self._busy(),
            *self._limits(),
            *(f"not counted   {note}" for note in self.notes),
            f"memory        {_size(self.peak_memory_bytes)} at its peak, per device, at rank {self.largest_rank}",
            f"disk          up to {_size(kept)} for {self.adapters_kept} adapters, {_size(temporary)} for checkpoints while trials run",
        ]
        return "\n".join(lines)

    def _range(self, hours: float) -> str:
        """The time at the fastest and at the slowest speed; one number where these are alike."""
        slowest, fastest = self.spread
        return _between(_hours(hours / fastest), _hours(hours / slowest))

    def _cost(self) -> Iterator[str]:
        if self.cost is not None:
            slowest, fastest = self.spread
            low, high = money(self.cost / fastest, self.currency), money(self.cost / slowest, self.currency)
            yield f"cost          {_between(low, high)}, at {money(self.price or 0.0, self.currency)} per device-hour"

    def _start(self) -> Iterator[str]:
        if seconds := self.seconds_to_start or self.seconds_to_load:
            what = "libraries, data and model" if self.seconds_to_start else "data and model"
            yield f"start         {duration(seconds)} more at each start, as measured here: {what}"

    def _select(self) -> Iterator[str]:
        if self.fresh_runs:
            slowest, _ = self.spread
            hours = self.fresh_device_hours
            cost = "" if self.price is None else f", {price(hours * self.price / slowest, self.currency)}"
            wall = self._range(hours / self.devices_per_trial / self.processes)
            yield (
                f"select        afterwards trains at most {plural(self.fresh_runs, 'full run')} with fresh seeds: {wall}, "
                f"{device_time(hours * 3600)}{cost} more; with --no-rerun none"
            )

    def _together(self) -> Iterator[str]:
        found = self._all()
        low, high = (_hours(seconds / 3600) for seconds in found["seconds"])
        cost = "" if self.price is None else f", {self._priced(*found['cost'])}"
        what = "search, selection and 2 starts" if self._starts == 2 else "with the start"
        yield f"all together  {_between(low, high)}, {device_time(found['device_hours'] * 3600)}{cost}: {what}"

    def _priced(self, low: float, high: float) -> str:
        """`12.50 EUR to 14.00 EUR`; `a cost of 12.50 to 14.00` without a unit."""
        return _between(price(low, self.currency), money(high, self.currency)) if low != high else price(low, self.currency)

    def _busy(self) -> Iterator[str]:
        if self.load > _BUSY:
            yield f"busy          the machine is {self.load:.1f} times as busy as it has processors; on a free one it takes less"
        if self.spread_is_assumed:
            slowest, fastest = self.spread
            yield (
                f"range         of the times: from {fastest:.2g} to {slowest:.2g} times the speed measured within a second or two; "
                "the processors are shared, so another moment tells another"
            )

    def _nodes(self) -> Iterator[str]:
        if (there := self.cluster) is not None:
            what = "GPU" if there.gpus else "processor"
            now = f"{plural(there.nodes, 'node')} with {plural(there.there, what)} now"
            planned = f"planned for {there.number}" + (", executor.max_devices" if there.asked_for else "")
            yield f"nodes         {now}; {planned}; the speed is this machine's"

    def _limits(self) -> Iterator[str]:
        """The spent hours count too: a budget is that of all starts."""
        more = " more" if self.done_trials else ""
        for name, limit, needed, spent in (
            ("max_hours", self.max_hours, self.wall_hours, self.spent_hours),
            ("max_device_hours", self.max_device_hours, self.device_hours, self.spent_device_hours),
            ("max_cost", self.max_cost, self.cost or 0.0, self.spent_device_hours * (self.price or 0.0)),
        ):
            if limit is not None and limit - spent < needed:
                trials = int(self.trials * max(0.0, limit - spent) / needed)
                yield f"budget        {name}: {limit:g} ends it earlier, after about {trials}{more} trial{'s' * (trials != 1)}"


def widened(spread: tuple[float, float], load: float) -> tuple[float, float]:
    """The spread of a speed that was measured for a second or two on shared processors: at least 30 % either way, more on a busy machine.

    load: processes per processor; beyond 1.5, from half the speed to twice it.
    """
    slowest, fastest = _SHARED_BUSY if load > _BUSY else _SHARED
    return min(slowest, spread[0]), max(fastest, spread[1])


def _between(low: str, high: str) -> str:
    return low if low == high else f"{low} to {high}"


def _hours(hours: float) -> str:
    seconds = hours * 3600
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if hours < 1.5 else f"{hours:.1f} h"


def _size(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
