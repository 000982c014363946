"""Where a study's trials were trained, node by node, where that was a cluster."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from loratune.record.trials import Trial


@dataclass
class NodeShare:
    """What a node of the cluster did for the study."""

    node: str
    trials: list[int] = field(default_factory=list)  # of which it trained the whole or a part to its end
    device_seconds: float = 0.0  # of segments that ended here, what other nodes had done of them by a checkpoint included
    lost: int = 0  # attempts that it began and did not end, because it went away or was preempted


def by_node(trials: Iterable[Trial]) -> list[NodeShare]:
    """The nodes in order of their names; empty where no trial was trained on a cluster."""
    found: dict[str, NodeShare] = {}
    for trial in trials:
        for outcome in trial.outcomes:
            for lost in outcome.lost:
                found.setdefault(lost, NodeShare(lost)).lost += 1
            if outcome.node:
                share = found.setdefault(outcome.node, NodeShare(outcome.node))
                share.device_seconds += (outcome.train_seconds + outcome.validation_seconds) * outcome.devices
                if trial.number not in share.trials:
                    share.trials.append(trial.number)
    return [found[node] for node in sorted(found)]
