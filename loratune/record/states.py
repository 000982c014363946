"""The states of a trial: one vocabulary for the record, the views and Optuna's storage."""

from enum import StrEnum


class TrialState(StrEnum):
    """What became of a trial so far. In the order of tables. Segments have states of their own: `work.State`."""

    COMPLETE = "complete"  # trained to the end of the full run, within every constraint
    RUNNING = "running"
    PAUSED = "paused"  # by its schedule, which may go on with it
    PRUNED = "pruned"  # paused when the budget was spent
    FAILED = "failed"  # crashed, and no retry helped
    DIVERGED = "diverged"  # loss or weights became inf or NaN
    INFEASIBLE = "infeasible"  # broke a constraint, or did not fit in memory

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen to the trial within this budget."""
        return self not in (RUNNING, PAUSED)

    @property
    def optuna(self) -> str:
        """The name of the `optuna.trial.TrialState` under which the storage has it; one that is told a worst value is COMPLETE there."""
        return {RUNNING: "RUNNING", PAUSED: "RUNNING", PRUNED: "PRUNED", FAILED: "FAIL"}.get(self, "COMPLETE")


# As `signal.SIGINT`: the members by themselves.
RUNNING, PAUSED, COMPLETE, PRUNED = TrialState.RUNNING, TrialState.PAUSED, TrialState.COMPLETE, TrialState.PRUNED
FAILED, DIVERGED, INFEASIBLE = TrialState.FAILED, TrialState.DIVERGED, TrialState.INFEASIBLE
