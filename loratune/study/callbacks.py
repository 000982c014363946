"""A study with functions that are called as it goes on, for a script or a notebook."""

from collections.abc import Sequence

from loratune.record import StudyRecord, Trial, read
from loratune.spec import StudySpec
from loratune.study.driver import tune
from loratune.study.loop import SegmentFinished, TrialStarted
from loratune.work import Outcome


class Callback:
    """Override what is wanted. Trials that an earlier start finished are told again, from the disk, at once."""

    def on_trial_begin(self, trial: Trial) -> None:
        """A trial was asked for; its hyperparameters are known."""

    def on_validation(self, trial: Trial, outcome: Outcome) -> None:
        """A segment of the trial ended, with a validation as its last point."""

    def on_trial_end(self, trial: Trial) -> None:
        """The trial is over: complete, pruned, infeasible, diverged or failed."""

    def on_message(self, text: str) -> None:
        """What the study tells people."""


def search(spec: StudySpec, callbacks: Callback | Sequence[Callback] = ()) -> StudyRecord:
    """Run a study, or continue it, to its end; returns it as read back. Raises what `tune` raises, and what a callback does."""
    several = [callbacks] if isinstance(callbacks, Callback) else list(callbacks)
    for event in tune(spec):
        for callback in several:
            if isinstance(event, TrialStarted):
                callback.on_trial_begin(event.trial)
            elif isinstance(event, SegmentFinished):
                callback.on_validation(event.trial, event.outcome)
                if event.trial.state.ended:
                    callback.on_trial_end(event.trial)
            elif hasattr(event, "text"):
                callback.on_message(event.text)
    return read(spec.folder)
