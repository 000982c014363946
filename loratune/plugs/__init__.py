"""Plugs: what loratune can be extended by, each declared once, from which names, option checks, help texts and errors follow.

A plug is one declaration: `SamplerPlug(name="mine", make="my_package.mine:MySampler", ...)`. Ours stand in `builtin.py`; those of
other packages are entry points of the group `loratune.samplers`, `loratune.schedules`, `loratune.executors`, `loratune.trackers`,
`loratune.benchmarks` or `loratune.metrics` that name such a declaration; a script may call `register(plug)`. Nothing is imported
to know the names, and what a plug makes only when it is used. See docs/plugs.md.

registry.py  Registry, Plug: how plugs are found and called
kinds.py     the kinds of plug, and the facts that each declares
builtin.py   loratune's own, and the registries
"""

from loratune.plugs.builtin import BENCHMARKS, EXECUTORS, METRICS, SAMPLERS, SCHEDULES, TRACKERS, register
from loratune.plugs.kinds import BenchmarkPlug, ExecutorPlug, Measured, MetricPlug, SamplerPlug, SchedulePlug, TrackerPlug
from loratune.plugs.registry import Plug, Registry

__all__ = [
    "BENCHMARKS",
    "EXECUTORS",
    "METRICS",
    "SAMPLERS",
    "SCHEDULES",
    "TRACKERS",
    "BenchmarkPlug",
    "ExecutorPlug",
    "Measured",
    "MetricPlug",
    "Plug",
    "Registry",
    "SamplerPlug",
    "SchedulePlug",
    "TrackerPlug",
    "register",
]
