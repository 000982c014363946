"""Where everything in a study's folder lies. No other file spells these names.

study/
  spec.yaml            the study as asked for, complete
  recipe.json          its part for the workers (work.Recipe)
  guess.json           the first guess, its prior and its reasons, where the sampler begins with one (study/guess.py)
  data.txt             the prepared data's name: others cannot continue the study
  notes.txt            lines on the model and the data, found before the first trial
  prompt.json          the prompt in use, never `auto`, and the date that its template shows
  slots.txt            trials that one process trains together, chosen when the study began
  workers.txt          processes on a CPU, likewise
  study.db             the Optuna study (unless another storage URL is given)
  sessions/0001.json   one per start of the driver: command, versions, git, machine, seconds
  workers/0.log        output of the worker processes
  progress.json        what runs right now, for `loratune status`
  lock                 held by the driver and its workers
  trials/0007/
    began              number of segments settled before this trial began; replay needs it
    trial.json         hyperparameters, state, value
    main/              a run: log.txt, checkpoint-*, adapter/, outcomes/0000240.json
  scoring/             scores that guide the search, item by item (downstream/search_scoring.py)
  evaluation/          scores of `loratune evaluate`, item by item
  finalists/           the runs of `loratune select`: recipe.json and trials/, as above
  selection.json       its choice
  preference/          comparisons by people and judges
  reloaded.json        adapters that passed the check before hand-over
  best.yaml, adapter/, report.html, figures/
"""

import re
from pathlib import Path

from loratune.system.files import AnyPath
from loratune.work import Segment

ADAPTER_CONFIG, ADAPTER_WEIGHTS = ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
"""Of a PEFT folder."""

MAIN = "main"
"""The run of a trial's full budget; its others are shorter ones, or repeats of a selection."""


class RunPaths:
    """One run of one trial."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.adapter = folder / "adapter"
        self.log = folder / "log.txt"
        self.outcomes = folder / "outcomes"

    def checkpoints(self) -> list[Path]:
        return list(self.folder.glob("checkpoint-*"))


class TrialPaths:
    """One trial."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.number = int(folder.name)
        self.record = folder / "trial.json"
        self.began = folder / "began"

    def runs(self) -> list[RunPaths]:
        """The runs that are there."""
        return [RunPaths(path) for path in self.folder.iterdir() if path.is_dir()]

    def outcomes(self) -> list[Path]:
        """The files of the outcomes of all runs."""
        return [path for path in self.folder.glob("*/outcomes/*.json") if path.stem.isdigit()]


class StudyPaths:
    """One study."""

    def __init__(self, folder: AnyPath) -> None:
        self.folder = folder = Path(folder)
        self.spec = folder / "spec.yaml"
        self.recipe = folder / "recipe.json"
        self.guess = folder / "guess.json"
        self.data = folder / "data.txt"
        self.notes = folder / "notes.txt"
        self.prompt = folder / "prompt.json"
        self.slots = folder / "slots.txt"
        self.workers = folder / "workers.txt"
        self.database = folder / "study.db"
        self.sessions = folder / "sessions"
        self.worker_logs = folder / "workers"
        self.progress = folder / "progress.json"
        self.lock = folder / "lock"
        self.trials = folder / "trials"
        self.scoring = folder / "scoring"
        self.evaluation = folder / "evaluation"
        self.selection = folder / "selection.json"
        self.preference = folder / "preference"
        self.reloaded = folder / "reloaded.json"
        self.best = folder / "best.yaml"
        self.adapter = folder / "adapter"
        self.report = folder / "report.html"

    @property
    def finalists(self) -> "StudyPaths":
        """The runs of a selection: a folder of the same kind."""
        return StudyPaths(self.folder / "finalists")

    @property
    def begun(self) -> bool:
        """Whether a first trial began."""
        return self.trials.is_dir()

    def session(self, number: int) -> Path:
        return self.sessions / f"{number:04d}.json"

    def trial(self, number: int) -> TrialPaths:
        return TrialPaths(self.trials / f"{number:04d}")

    def trials_there(self) -> list[TrialPaths]:
        """Every trial's, ascending; whatever else lies in `trials/` is not ours."""
        inside = self.trials.iterdir() if self.begun else ()
        found = [TrialPaths(path) for path in inside if re.fullmatch(r"\d{4,9}", path.name)]
        return sorted(found, key=lambda trial: trial.number)

    def run(self, trial: int, run: str = MAIN) -> RunPaths:
        return RunPaths(self.trial(trial).folder / run)

    def of(self, segment: Segment) -> RunPaths:
        """The run that the segment is a part of."""
        return self.run(segment.trial, segment.run)

    def outcome(self, key: str) -> Path:
        """The file of the outcome of the segment `key`, `<trial>/<run>/<stop_step>`."""
        trial, run, stop = key.split("/")
        return self.run(int(trial), run).outcomes / f"{stop}.json"
