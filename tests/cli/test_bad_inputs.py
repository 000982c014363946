"""Everything that people get wrong, through the real command line: one clear text, the right exit code, nothing lost.

Each case changes one thing of a workplace that is sound (`spec.yaml`, `data.jsonl`, a model), runs a command
there, and sees that whatever stood there before still stands there, whole.
"""

import fcntl
import importlib.util
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from workplace import rows, tiny, write_rows

RUN = ("run", "spec.yaml")
COMMAND = [sys.executable, "-c", "import sys; from loratune.cli import main; sys.exit(main())"]


class Place:
    """The workplace: the current directory."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        write_rows(folder / "data.jsonl", rows())
        self.spec = tiny(model, Path("data.jsonl")) | {"output": "study"}
        self.save()

    def save(self) -> None:
        (self.folder / "spec.yaml").write_text(yaml.safe_dump(self.spec))

    def change(self, section: str, **fields: Any) -> None:
        there = self.spec.get(section, {})
        self.spec[section] = {**(there if isinstance(there, dict) else {}), **fields}
        self.save()

    def own_model(self) -> Path:
        """A copy of the model that may be spoilt."""
        copy = shutil.copytree(self.model, self.folder / "model")
        self.spec["model"] = "model"
        self.save()
        return copy

    def contents(self) -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in self.folder.rglob("*") if path.is_file()}


@dataclass
class Case:
    """What to spoil, what to run, and what must be said."""

    name: str
    code: int
    said: list[str]
    spoil: Callable[[Place], Any] = lambda place: None
    argv: tuple[str, ...] = RUN
    needs: str = ""  # "no gpu", "no 4bit"
    may_write: tuple[str, ...] = field(default=("study/",))


def lines(*content: str) -> Callable[[Place], Any]:
    return lambda place: (place.folder / "data.jsonl").write_text("".join(line + "\n" for line in content))


def with_row(number: int, **changes: Any) -> Callable[[Place], Any]:
    """The data with one row (from 1) changed; a value of None takes the field out."""

    def spoil(place: Place) -> None:
        content: list[dict[str, Any]] = list(rows())
        content[number - 1] = {name: value for name, value in {**content[number - 1], **changes}.items() if value is not None}
        write_rows(place.folder / "data.jsonl", content)

    return spoil


def text_of_spec(text: str) -> Callable[[Place], Any]:
    return lambda place: (place.folder / "spec.yaml").write_text(text)


def appended(text: str) -> Callable[[Place], Any]:
    return lambda place: (place.folder / "spec.yaml").write_text((place.folder / "spec.yaml").read_text() + text)


def truncated_weights(place: Place) -> None:
    weights = place.own_model() / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


def without_tokenizer(place: Place) -> None:
    for path in place.own_model().glob("*token*"):
        path.unlink()


def bert(place: Place) -> None:
    folder = place.own_model()
    config = {
        "architectures": ["BertForMaskedLM"],
        "model_type": "bert",
        "hidden_size": 8,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
    }
    (folder / "config.json").write_text(json.dumps(config))


def occupied(place: Place) -> None:
    (place.folder / "study").mkdir()
    (place.folder / "study" / "thesis.tex").write_text("years of work")


SPEC = [
    Case("no such file", 2, ["cannot read nope.yaml: No such file or directory"], argv=("run", "nope.yaml")),
    Case("broken YAML", 2, ["spec.yaml:2: not valid YAML"], text_of_spec("model: {\n]")),
    Case("a list", 2, ["spec.yaml: got ['model']; needed: a mapping of sections"], text_of_spec("- model\n")),
    Case(
        "duplicate key",
        2,
        ["model", "(spec.yaml:2): given twice, first on line 1"],
        text_of_spec("model: a\nmodel: b\ndata: {train: [d]}\n"),
    ),
    Case("unknown section", 2, ["trainig (spec.yaml:", "unknown field; did you mean 'training'?"], appended("trainig: {epochs: 1}\n")),
    Case("misspelt field", 2, ["training.epoch (spec.yaml:", "did you mean 'epochs'?"], lambda p: p.change("training", epoch=1)),
    Case("field of another section", 2, ["training.trials", "write it as budget.trials"], lambda p: p.change("training", trials=1)),
    Case("wrong type", 2, ["training.batch_size", "got '64'; needed: a whole number"], lambda p: p.change("training", batch_size="64")),
    Case("wrong flag", 2, ["training.batch_size (--training.batch_size): got 'many'"], argv=(*RUN, "--training.batch_size", "many")),
    Case("out of range", 2, ["budget.trials (--budget.trials): got 0; needed: a number >= 1"], argv=(*RUN, "--budget.trials", "0")),
    Case(
        "several at once",
        2,
        [
            "seed (--seed): got -1",
            "training.epochs (--training.epochs): got 0",
            "sampler.name (--sampler): got 'nomat'",
            "did you mean 'nomad'?",
        ],
        argv=(*RUN, "--seed", "-1", "--training.epochs", "0", "--sampler", "nomat"),
    ),
    Case("no model", 2, ["model", "missing"], argv=("run", "--data", "data.jsonl")),
    Case(
        "range upside down",
        2,
        ["search_space.learning_rate", "numbers >= low, which is 0.01"],
        argv=(*RUN, "--search_space.learning_rate", "{low: 0.01, high: 0.001}"),
    ),
    Case("unknown parameter", 2, ["search_space.lora_rr", "did you mean 'lora_r'?"], argv=(*RUN, "--search_space.lora_rr", "[1, 2]")),
    Case("nothing to search", 2, ["nothing to search"], argv=(*RUN, "--search_space", "{lora_r: 8}")),
    Case("nothing at all", 2, ["nothing to tune", "loratune init", "--demo"], argv=("run",)),
]

DATA = [
    Case("no such data", 3, ["data.jsonl", "no such file"], lambda p: (p.folder / "data.jsonl").unlink()),
    Case("empty data", 3, ["data.jsonl: the file is empty"], lines()),
    Case("broken JSON", 3, ["data.jsonl, line 2: not valid JSON"], lines(json.dumps(rows()[0]), '{"instruction": ')),
    Case("row without response", 3, ["data.jsonl, line 5", "output"], with_row(5, output=None)),
    Case("empty response", 3, ["data.jsonl, line 7: field output: is empty"], with_row(7, output=" ")),
    Case("response of the wrong type", 3, ["data.jsonl, line 3: field output", "3"], with_row(3, output=3)),
    Case("another format", 3, ["data.jsonl", "conversations"], argv=(*RUN, "--data.train.0.format", "sharegpt")),
    Case("unknown fields", 3, ["data.jsonl", "frage"], lines('{"frage": "a", "antwort": "b"}')),
    Case(
        "not UTF-8", 3, ["data.jsonl, line 1: not UTF-8 (byte 0xff)"], lambda p: (p.folder / "data.jsonl").write_bytes(b'{"a": "\xff"}\n')
    ),
    Case("all dropped", 3, ["data.jsonl", "8"], argv=(*RUN, "--data.max_length", "8")),
    Case(
        "validation larger than the data",
        3,
        ["no training example is left beside validation"],
        argv=(*RUN, "--data.validation_count", "24"),
    ),
]

MODEL = [
    Case("no such model", 4, ["./nope"], argv=(*RUN, "--model", "./nope")),
    Case("no config.json", 4, ["model", "config.json"], lambda p: (p.own_model() / "config.json").unlink()),
    Case("no tokenizer", 4, ["model", "tokenizer"], without_tokenizer),
    Case("not a causal model", 4, ["is not a causal language model", "BertForMaskedLM"], bert),
    Case("weights cut off", 4, ["cannot load its weights"], truncated_weights),
    Case("unknown layers", 2, ["training.target_modules", "qv, qkvo, mlp, all-linear"], argv=(*RUN, "--training.target_modules", "qvv")),
    Case("layers that the model lacks", 4, ["c_attn", "q_proj"], argv=(*RUN, "--training.target_modules", "[c_attn]")),
    Case("4 bit without its extra", 6, ["bitsandbytes", "loratune[4bit]"], argv=(*RUN, "--model.load_in_4bit", "true"), needs="no 4bit"),
    Case(
        "cuda without GPU", 7, ["no visible CUDA device", "executor.device: cpu"], argv=(*RUN, "--executor.device", "cuda"), needs="no gpu"
    ),
]

STORAGE = [
    Case("a folder with other files", 5, ["study is neither empty nor a study's folder", "--output.folder"], occupied),
    Case("the folder is a file", 5, ["study"], lambda p: (p.folder / "study").write_text("mine")),
    Case(
        "not a database",
        5,
        ["other.db"],
        lambda p: (p.folder / "other.db").write_text("letters\n" * 1000),
        argv=(*RUN, "--storage", "sqlite:///other.db"),
    ),
    Case("no such server", 5, ["storage"], argv=(*RUN, "--storage", "nosuchdb://host/x")),
    Case("a folder that is no study", 5, [". is not a study's folder", "Did you mean spec.yaml?"], argv=("run", ".")),
    Case(
        "status of no study",
        5,
        [". is not a study's folder: it has no spec.yaml"],
        lambda p: (p.folder / "spec.yaml").unlink(),
        ("status", "."),
    ),
    Case("status of nothing", 5, ["no study under runs/"], argv=("status",)),
    Case("report of no study", 5, ["nope is not a study's folder"], argv=("report", "nope")),
    Case("export of no study", 5, ["nope is not a study's folder"], argv=("export", "nope", "out")),
]


@pytest.fixture
def place(tinystories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path, tinystories)


@pytest.mark.parametrize("case", [*SPEC, *DATA, *MODEL, *STORAGE], ids=lambda case: case.name)
def test_bad_input(case: Case, place: Place, loratune) -> None:
    if case.needs == "no 4bit" and importlib.util.find_spec("bitsandbytes") is not None:
        pytest.skip("bitsandbytes is installed")
    if case.needs == "no gpu" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    case.spoil(place)
    before = place.contents()
    answer = loratune(*case.argv)
    assert answer.code == case.code, answer.err
    assert answer.err.startswith("loratune: ")
    assert "Traceback" not in answer.err
    for part in case.said:
        assert part in answer.err
    nothing_lost(place, before, case.may_write)


def test_a_description_that_cannot_be_read_is_the_only_mistake(place: Place, loratune) -> None:
    assert loratune("run", "nope.yaml").err == (
        "loratune: cannot read nope.yaml: No such file or directory. Did you mean spec.yaml? "
        "`loratune init nope.yaml` writes a description to start from.\n"
    )


def nothing_lost(place: Place, before: dict[str, bytes], may_write: tuple[str, ...] = ("study/",)) -> None:
    """What stood there is unchanged; what is new lies where it may; nothing is left half-written."""
    after = place.contents()
    assert {path: after.get(path) for path in before} == before
    new = [str(Path(path).relative_to(place.folder)) for path in after if path not in before]
    assert [path for path in new if not path.startswith(may_write)] == []
    assert [path for path in new if Path(path).name.startswith(".")] == []
    for path in new:
        if path.endswith(".json"):
            json.loads((place.folder / path).read_text())
        if path.endswith(".yaml"):
            yaml.safe_load((place.folder / path).read_text())


def test_a_missing_extra(place: Place, loratune, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name == "nni" or name.startswith("nni.") or name == "loratune.samplers.nni_tpe":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "nni", None)
    before = place.contents()
    answer = loratune(*RUN, "--sampler", "nni_tpe")
    assert answer.code == 6, answer.err
    assert "pip install 'loratune[nni]'" in answer.err
    nothing_lost(place, before)


def test_a_hub_model_without_network(place: Place) -> None:
    before = place.contents()
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [*COMMAND, *RUN, "--model", "loratune-tests/no-such-model"]
    done = subprocess.run(command, capture_output=True, text=True, env=offline, check=False)
    assert done.returncode == 4, done.stderr
    assert done.stderr.startswith("loratune: ")
    assert "loratune-tests/no-such-model" in done.stderr
    assert "Traceback" not in done.stderr
    nothing_lost(place, before)


@pytest.fixture
def study(place: Place, done: tuple[Path, str]) -> Path:
    """A copy of the finished study, with its description and its data, at the workplace."""
    home, _ = done
    shutil.copytree(home / "study", place.folder / "study")
    spec = yaml.safe_load((home / "spec.yaml").read_text())
    place.spec = spec | {"output": "study"}
    place.save()
    return place.folder / "study"


def test_another_description_for_the_same_folder(place: Place, study: Path, loratune) -> None:
    before = place.contents()
    answer = loratune(*RUN, "--training.epochs", "3", "--seed", "1", "--budget.trials", "2")
    assert answer.code == 5, answer.err
    assert "holds a study with another description" in answer.err
    for part in ("seed: was 0, now 1", "training.epochs: was 1", "now 3", "budget.trials: was 3, now 2; a budget can grow, not shrink"):
        assert part in answer.err
    nothing_lost(place, before, ())


def test_data_that_changed_since_the_study_began(place: Place, study: Path, loratune) -> None:
    data = Path(place.spec["data"]["train"][0])
    kept = data.read_text()
    try:
        write_rows(data, rows(30))
        before = place.contents()
        answer = loratune(*RUN)
    finally:
        data.write_text(kept)
    assert answer.code == 5, answer.err
    assert "the data or the tokenizer changed since study began" in answer.err
    after = place.contents()
    assert {p: c for p, c in after.items() if "/trials/" in p} == {p: c for p, c in before.items() if "/trials/" in p}


def test_a_folder_in_use(place: Place, study: Path, loratune) -> None:
    with open(study / "lock", "r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (study / "lock").write_text(json.dumps({"pid": os.getpid(), "host": os.uname().nodename}))
        before = place.contents()
        answer = loratune(*RUN)
    assert answer.code == 5
    assert f"study is being written by process {os.getpid()} on {os.uname().nodename}" in answer.err
    assert "loratune status study" in answer.err
    nothing_lost(place, before, ())


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (("export", "study", "out", "--trial", "9"), 5, "study has no trial 9; its trials are 0 to 2"),
        (("export", "study", "out", "--trial", "x"), 2, "invalid int value: 'x'"),
        (("export", "study", "data.jsonl"), 5, "data.jsonl exists and is not an empty folder"),
        (("export", "study", "study"), 5, "study exists and is not an empty folder"),
        (("report", "study", "--output", "data.jsonl/report.html"), 5, "data.jsonl"),
        (("init", "spec.yaml"), 5, "spec.yaml exists"),
        (("init", "study"), 5, "study is a folder"),
    ],
)
def test_commands_on_a_study(place: Place, study: Path, loratune, argv: tuple[str, ...], code: int, said: str) -> None:
    before = place.contents()
    answer = loratune(*argv)
    assert (answer.code, answer.err.startswith("loratune: ")) == (code, True), answer.err
    assert said in answer.err
    nothing_lost(place, before, ())


def test_an_adapter_that_was_not_kept(place: Place, study: Path, loratune) -> None:
    for trial in ("0000", "0001", "0002"):
        shutil.rmtree(study / "trials" / trial / "main" / "adapter", ignore_errors=True)
    shutil.rmtree(study / "adapter")
    answer = loratune("export", "study", "out", "--trial", "1")
    assert answer.code == 5
    assert "the adapter of trial 1 (complete) is not on disk; adapters there: none" in answer.err
    assert not (place.folder / "out").exists()


def test_a_damaged_database_of_a_study(place: Place, study: Path, loratune) -> None:
    (study / "study.db").write_bytes(b"not a database" * 999)
    before = place.contents()
    answer = loratune(*RUN, "--budget.trials", "4")
    assert answer.code == 5, answer.err
    assert "study.db" in answer.err
    after = place.contents()
    assert {p: c for p, c in after.items() if "/trials/" in p} == {p: c for p, c in before.items() if "/trials/" in p}


@pytest.mark.parametrize("limit", [1_000, 60_000], ids=["from the first file", "at the database"])
def test_a_full_disk(place: Place, limit: int) -> None:
    """A limit on the size of files gives write errors in the places where a full disk does."""

    def small() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    before = place.contents()
    whole = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}  # Python would keep a module's first bytes as its compiled file
    done = subprocess.run([*COMMAND, *RUN], capture_output=True, text=True, preexec_fn=small, env=whole, check=False)
    assert done.returncode == 5, done.stderr
    assert done.stderr.startswith("loratune: ")
    assert "Traceback" not in done.stderr
    assert "study" in done.stderr
    nothing_lost(place, before)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a read-only folder, whose bits root does not mind")
def test_a_read_only_folder(place: Place, study: Path, loratune) -> None:
    mount = ["mount", "--bind", "-o", "ro", str(study), str(study)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody mount")
    try:
        before = place.contents()
        answer = loratune(*RUN)
        assert answer.code == 5, answer.err
        assert "study" in answer.err
        assert "Read-only file system" in answer.err
        nothing_lost(place, before, ())
        assert loratune("status", "study").code == 0  # reading needs no writing
    finally:
        subprocess.run(["umount", str(study)], check=True)
