"""From a recipe to a folder of tokens: counts, no leak, and a cache that survives everything."""

import dataclasses
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import tiny_tokenizer

from loratune import demo
from loratune.data import prepare as module
from loratune.data.prepare import prepare
from loratune.data.prepared import Prepared
from loratune.data.sources import DataRecipe, DataSource
from loratune.data.tokenizers import load_tokenizer
from loratune.errors import DataError, ModelError, StorageError
from loratune.system import files


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return str(tiny_tokenizer.build(tmp_path_factory.mktemp("tokenizer")))


def write(path, questions, answer="yes"):
    path.write_text("".join(json.dumps({"instruction": q, "input": "", "output": f"{answer} {q}"}) + "\n" for q in questions))
    return str(path)


def questions(letter, n):
    return [f"{letter}{i}" for i in range(n)]


def texts(tokens, tokenizer):
    """The question inside every example."""
    loaded = load_tokenizer(tokenizer)
    prompts = [loaded.decode(ids[~mask]) for ids, mask in (tokens[i] for i in range(len(tokens)))]
    return [text.split("### Instruction:\n")[1].split("\n")[0] for text in prompts]


def simple(tmp_path, **options):
    recipe = {"train": (DataSource(path=write(tmp_path / "a.jsonl", questions("a", 20))),), "validation_fraction": 0.25} | options
    return DataRecipe(**recipe)


# ---- rows that a prompt cannot show ----


def test_rows_that_a_chat_template_refuses(tmp_path):
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    chat = str(tiny_tokenizer.build(tmp_path / "chat", chat_template=refuses + tiny_tokenizer.CHATML))
    rows = [{"instruction": q, "output": "yes", "system": "S" if q in ("a3", "a7") else ""} for q in questions("a", 20)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = DataRecipe(train=(DataSource(path=str(tmp_path / "a.jsonl")),), validation_fraction=0.25)
    told = "a.jsonl, line 4: the chat template cannot show this conversation: System role not supported"
    with pytest.raises(DataError, match=rf"{told}\. Fix the row, or leave such rows out with data.on_bad_rows: skip"):
        prepare(dataclasses.replace(recipe, on_bad_rows="error"), tokenizer=chat, cache=tmp_path / "cache")
    with pytest.raises(DataError, match=rf"2 of 20 rows cannot be used, more than the 1% that are skipped:\n  .*{told}; also line 8\n"):
        prepare(recipe, tokenizer=chat, cache=tmp_path / "cache")
    prepared = prepare(dataclasses.replace(recipe, on_bad_rows="skip"), tokenizer=chat, cache=tmp_path / "cache")
    (counts,) = prepared.manifest.sources
    assert (counts.rows, counts.bad, counts.train + counts.validation) == (20, 2, 18)
    assert "2 bad rows skipped" in prepared.summary()
    assert told in prepared.summary()
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row | {"system": "S"}) for row in rows))
    with pytest.raises(DataError, match=r"a.jsonl: no usable row among 20\. The last: .*line 20: .*System role not supported"):
        prepare(dataclasses.replace(recipe, on_bad_rows="skip"), tokenizer=chat, cache=tmp_path / "cache")


# ---- what is made ----


def test_arrays_hold_what_encode_made(tmp_path, tokenizer):
    prepared = prepare(simple(tmp_path), tokenizer=tokenizer, cache=tmp_path / "cache")
    loaded = load_tokenizer(tokenizer)
    assert (len(prepared.train), len(prepared.validation)) == (15, 5)
    assert sorted(texts(prepared.train, tokenizer) + texts(prepared.validation, tokenizer)) == sorted(questions("a", 20))
    for tokens, counts in ((prepared.train, prepared.manifest.train), (prepared.validation, prepared.manifest.validation)):
        assert tokens.lengths.sum() == counts.tokens == len(tokens.ids)
        assert tokens.mask.sum() == counts.response_tokens
        for i in range(len(tokens)):
            ids, mask = tokens[i]
            assert (ids.dtype, mask.dtype, len(ids)) == (np.int32, np.bool_, tokens.lengths[i])
            assert loaded.decode(ids[mask]).startswith("yes a")
            assert ids[-1] == loaded.eos_token_id == prepared.manifest.eos_token_id
        assert tokens[-1][0].tolist() == tokens[len(tokens) - 1][0].tolist()
        with pytest.raises(IndexError):
            tokens[len(tokens)]
    assert prepared.manifest.pad_token_id == loaded.eos_token_id  # this tokenizer has no pad


def test_order_of_the_rows_does_not_matter(tmp_path, tokenizer):
    recipe = simple(tmp_path)
    first = prepare(recipe, tokenizer=tokenizer, cache=tmp_path / "cache")
    write(tmp_path / "a.jsonl", questions("a", 20)[::-1])
    second = prepare(recipe, tokenizer=tokenizer, cache=tmp_path / "cache")
    assert first.folder != second.folder
    assert np.array_equal(first.train.ids, second.train.ids)
    assert np.array_equal(first.validation.ids, second.validation.ids)
    other = prepare(dataclasses.replace(recipe, seed=1), tokenizer=tokenizer, cache=tmp_path / "cache")
    assert set(texts(other.validation, tokenizer)) != set(texts(first.validation, tokenizer))


def test_duplicates_stay_together_across_sources(tmp_path, tokenizer):
    one = DataSource(path=write(tmp_path / "a.jsonl", [*questions("a", 30), "A0.", "a1!"]))
    two = DataSource(path=write(tmp_path / "b.jsonl", [*questions("b", 30), "a2", "a3"], answer="no"))
    for seed in range(5):
        recipe = DataRecipe(train=(one, two), validation_fraction=0.5, seed=seed)
        prepared = prepare(recipe, tokenizer=tokenizer, cache=tmp_path / "cache")
        plain = [{t.casefold().strip(".!") for t in texts(s, tokenizer)} for s in (prepared.train, prepared.validation)]
        assert not plain[0] & plain[1]
        assert prepared.manifest.duplicates == 4
        assert [s.validation for s in prepared.manifest.sources] == [16, 16]
        assert [s.duplicates for s in prepared.manifest.sources] == [2, 2]  # they add up to what the summary says
        assert "4 rows that repeat an earlier row's question" in prepared.summary()


def test_validation_sources_take_their_questions_out_of_training(tmp_path, tokenizer):
    train = DataSource(path=write(tmp_path / "a.jsonl", questions("a", 10)))
    held_out = DataSource(path=write(tmp_path / "v.jsonl", ["A1", "a2?", "c1", "c2"]))
    prepared = prepare(DataRecipe(train=(train,), validation=(held_out,)), tokenizer=tokenizer, cache=tmp_path / "cache")
    assert sorted(texts(prepared.train, tokenizer)) == ["a0", *questions("a", 10)[3:]]
    assert sorted(texts(prepared.validation, tokenizer)) == ["A1", "a2?", "c1", "c2"]
    assert [(s.role, s.overlapping, s.train, s.validation) for s in prepared.manifest.sources] == [
        ("train", 2, 8, 0),
        ("validation", 0, 0, 4),
    ]
    assert "2 training rows left out because validation has the same question" in prepared.summary()


BOX = "What is the secret of box {}?"


def turns(*exchanges, **more):
    roles = ("user", "assistant")
    return {"messages": [{"role": r, "content": t} for exchange in exchanges for r, t in zip(roles, exchange, strict=True)], **more}


LEAKS = {
    "later turn": lambda n: turns((f"Hello number {n}", "Hi"), (BOX.format(n % 15), "x")),
    "third turn": lambda n: turns((f"Hello {n}", "Hi"), (f"Bye {n}", "Oh"), (BOX.format(n % 15), "x")),
    "first and later": lambda n: turns(*([] if n < 15 else [(f"Hello {n}", "Hi")]), (BOX.format(n % 15), "x")),
    "history": lambda n: {"instruction": f"And then {n}?", "output": "x", "history": [[f"Hello {n}", "Hi"], [BOX.format(n % 15), "x"]]},
    "zero width": lambda n: {"instruction": BOX.format(n % 15) + "\u200b" * (n // 15), "output": "x"},
    "zero width within": lambda n: {
        "instruction": BOX.format(n % 15).replace("secret", "sec\u2060ret" if n < 15 else "secret"),
        "output": "x",
    },
    "soft hyphen": lambda n: {"instruction": BOX.format(n % 15).replace("box", "b\u00adox" if n < 15 else "box"), "output": "x"},
    "byte order mark": lambda n: {"prompt": "\ufeff" * (n // 15) + BOX.format(n % 15), "completion": "x"},
}


@pytest.mark.parametrize("name", LEAKS)
def test_no_question_of_any_turn_stands_on_both_sides(tmp_path, name):
    tokenizer = str(demo.model_folder())
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(LEAKS[name](n)) + "\n" for n in range(30)))
    recipe = DataRecipe(train=(DataSource(path=str(tmp_path / "a.jsonl")),), validation_fraction=0.4)
    prepared = prepare(recipe, tokenizer=tokenizer, cache=tmp_path / "cache")
    loaded = load_tokenizer(tokenizer)
    sides = []
    for tokens in (prepared.train, prepared.validation):
        shown = [re.sub("[\u200b\u2060\u00ad\ufeff]", "", loaded.decode(tokens[i][0])) for i in range(len(tokens))]
        sides.append({box for text in shown for box in re.findall(r"of box (\d+)", text)})
    assert len(prepared.validation) == 12
    assert len(sides[0] | sides[1]) == 15
    assert not sides[0] & sides[1]
    assert prepared.manifest.shared == 0
    assert prepared.manifest.duplicates == 15


def test_a_later_question_of_a_validation_source_leaves_training(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(turns((f"a{n}", "x"), (f"b{n}", "y"))) + "\n" for n in range(10)))
    (tmp_path / "v.jsonl").write_text(json.dumps(turns(("c", "x"), ("B3!", "y"))) + "\n" + json.dumps(turns(("a7", "y"))) + "\n")
    recipe = DataRecipe(train=(DataSource(path=str(tmp_path / "a.jsonl")),), validation=(DataSource(path=str(tmp_path / "v.jsonl")),))
    prepared = prepare(recipe, tokenizer=tokenizer, cache=tmp_path / "cache")
    assert sorted(texts(prepared.train, tokenizer)) == [f"a{n}" for n in range(10) if n not in (3, 7)]


def test_a_follow_up_that_links_everything_is_told(tmp_path, tokenizer):
    rows = [turns((f"a{n}", "x"), ("Go on", "y")) for n in range(20)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = DataRecipe(train=(DataSource(path=str(tmp_path / "a.jsonl")),), validation_fraction=0.25)
    prepared = prepare(recipe, tokenizer=tokenizer, cache=tmp_path / "cache")
    assert (len(prepared.validation), prepared.manifest.shared) == (5, 5)
    assert "5 validation examples share a question with training" in prepared.summary()
    assert 'in validation and in training, because they link too many conversations to keep these together: "go on" (5 rows)' in (
        prepared.summary()
    )
    some = [turns((f"b{n}", "x")) for n in range(20)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, *some]))
    prepared = prepare(recipe, tokenizer=tokenizer, cache=tmp_path / "cache")
    assert (len(prepared.validation), prepared.manifest.shared) == (10, 0)
    assert "20 of 40 rows form one group on one side of the split" in prepared.summary()
    assert 'above all "go on" (20 rows)' in prepared.summary()


def test_fields_that_are_not_read_are_told_also_from_the_cache(tmp_path, tokenizer):
    rows = [{**turns((f"a{n}", "x"), (f"b{n}", "y")), "id": n, "source": "web"} for n in range(20)]
    for row in rows:
        row["messages"][1] |= {"weight": 0, "name": "Bob"}
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = DataRecipe(train=(DataSource(path=str(tmp_path / "a.jsonl")),), validation_fraction=0.25)
    for _ in range(2):
        summary = prepare(recipe, tokenizer=tokenizer, cache=tmp_path / "cache").summary()
        assert "20 answers are context only, not scored (weight: 0, train: false)" in summary
        assert "fields not read: id, source, messages[].name (20 rows each)" in summary


def test_near_duplicates_are_counted_and_quoted(tmp_path, tokenizer):
    long = "please write one short poem about the old house number {} that stands on the green hill beside the {} sea"
    rows = [long.format(n, sea) for n in range(12) for sea in ("blue", "grey")] + questions("a", 20)
    (tmp_path / "v.jsonl").write_text("".join(json.dumps({"instruction": long.format(n, "red"), "output": "x"}) + "\n" for n in range(3)))
    train, held_out = DataSource(path=write(tmp_path / "a.jsonl", rows)), DataSource(path=str(tmp_path / "v.jsonl"))
    prepared = prepare(DataRecipe(train=(train,), validation=(held_out,)), tokenizer=tokenizer, cache=tmp_path / "cache")
    assert (len(prepared.train), prepared.manifest.near_duplicates) == (44, 3)  # told, not moved
    assert "3 validation examples have a question nearly the same as one in training" in prepared.summary()
    assert 'nearly the same: "please write one short poem about the old house number 0 that' in prepared.summary()


def test_a_manifest_from_before_these_counts_is_read(tmp_path, tokenizer):
    prepared = prepare(simple(tmp_path), tokenizer=tokenizer, cache=tmp_path / "cache")
    path = prepared.folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for name in ("near_duplicates", "shared", "notes"):
        del manifest[name]
    for name in ("history", "unscored", "reasoning", "tools", "unread"):
        del manifest["sources"][0][name]
    path.write_text(json.dumps(manifest))
    assert Prepared.load(prepared.folder).manifest == prepared.manifest


def test_a_source_that_is_asked_for_more_repeats_it_and_says_so(tmp_path, tokenizer):
    one = DataSource(path=write(tmp_path / "a.jsonl", questions("a", 40)), weight=0.7)
    two = DataSource(path=write(tmp_path / "b.jsonl", questions("b", 10)), weight=0.3)
    prepared = prepare(DataRecipe(train=(one, two), train_count=50, validation_count=10), tokenizer=tokenizer, cache=tmp_path / "cache")
    first, second = prepared.manifest.sources
    assert (first.train, first.validation, first.repeats) == (35, 7, 2)
    assert (second.train, second.validation, second.repeats) == (15, 3, 8)
    times = Counter(t for t in texts(prepared.train, tokenizer) if t.startswith("b"))
    assert sorted(times.values()) == [2, 2, 2, 2, 2, 2, 3]  # two whole passes over seven, then one more
    assert not set(times) & set(texts(prepared.validation, tokenizer))
    assert "15 training examples drawn from 7: 8 are repeats" in prepared.summary()


def test_a_drawn_part_of_a_validation_source_frees_the_rest(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", questions("a", 20))
    recipe = DataRecipe(train=(DataSource(path=path),), validation=(DataSource(path=path, count=5),), train_count=10)
    prepared = prepare(recipe, tokenizer=tokenizer, cache=tmp_path / "cache")
    assert (len(prepared.train), len(prepared.validation)) == (10, 5)
    assert [s.overlapping for s in prepared.manifest.sources] == [5, 0]
    assert not set(texts(prepared.train, tokenizer)) & set(texts(prepared.validation, tokenizer))
    with pytest.raises(DataError, match="no training example is left"):
        prepare(dataclasses.replace(recipe, validation=(DataSource(path=path),)), tokenizer=tokenizer, cache=tmp_path / "cache")


def test_own_counts(tmp_path, tokenizer):
    one = DataSource(path=write(tmp_path / "a.jsonl", questions("a", 20)), count=5, validation_count=4)
    two = DataSource(path=write(tmp_path / "b.jsonl", questions("b", 10)))
    prepared = prepare(DataRecipe(train=(one, two)), tokenizer=tokenizer, cache=tmp_path / "cache")
    assert [(s.train, s.validation) for s in prepared.manifest.sources] == [(5, 4), (10, 0)]


def test_cut_dropped_and_bad_rows_are_counted(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    write(path, [*questions("a", 8), "why " * 400])
    with open(path, "a") as file:
        file.write(json.dumps({"instruction": "b", "output": "long " * 400}) + "\n" + json.dumps({"instruction": "c", "output": ""}) + "\n")
    recipe = DataRecipe(train=(DataSource(path=str(path)),), validation_fraction=0.2, max_length=400, on_bad_rows="skip")
    prepared = prepare(recipe, tokenizer=tokenizer, cache=tmp_path / "cache")
    (counts,) = prepared.manifest.sources
    assert (counts.rows, counts.bad, counts.dropped, counts.cut, counts.train + counts.validation) == (11, 1, 1, 1, 9)
    assert max(prepared.train.lengths.max(), prepared.validation.lengths.max()) == 400
    summary = prepared.summary()
    assert "1 cut at 400 tokens; 1 dropped (the prompt alone fills 400 tokens); 1 bad row skipped" in summary
    assert f"skipped: {path}, line 11: field output: is empty" in summary
    with pytest.raises(DataError, match=r"line 11: field output: is empty.*on_bad_rows: skip"):
        prepare(dataclasses.replace(recipe, on_bad_rows="error"), tokenizer=tokenizer, cache=tmp_path / "cache")


def test_the_published_mix_scaled_down(shared_data, tinystories, tmp_path):
    """53,610 train and 13,401 validation, 70 % Alpaca and 30 % Dolly, at a fiftieth; Dolly repeats there as it must in the original."""
    alpaca = json.loads((shared_data / "alpaca" / "alpaca_random_9k.json").read_text())[:1040]
    (tmp_path / "alpaca.json").write_text(json.dumps(alpaca))
    with open(shared_data / "dolly" / "databricks-dolly-15k.jsonl") as file:
        (tmp_path / "dolly.jsonl").write_text("".join(line for _, line in zip(range(300), file, strict=False)))
    recipe = DataRecipe(
        train=(DataSource(path=str(tmp_path / "alpaca.json"), weight=0.7), DataSource(path=str(tmp_path / "dolly.jsonl"), weight=0.3)),
        train_count=1072,
        validation_count=268,
        on_bad_rows="skip",
    )
    prepared = prepare(recipe, tokenizer=str(tinystories), cache=tmp_path / "cache")
    first, second = prepared.manifest.sources
    assert (first.train, first.validation, first.repeats) == (750, 188, 0)
    assert (second.train, second.validation) == (322, 80)
    assert second.repeats == 322 - (300 - second.dropped - 80)
    held_out = {prepared.validation[i][0].tobytes() for i in range(268)}
    assert not held_out & {prepared.train[i][0].tobytes() for i in range(1072)}
    assert prepared.manifest.pad_token_id == 0


# ---- the cache ----


def test_second_call_only_reads(tmp_path, tokenizer, monkeypatch):
    recipe = simple(tmp_path)
    first = prepare(recipe, tokenizer=tokenizer, cache=tmp_path / "cache")

    def never(*args):
        raise RuntimeError("tokenised again")

    with monkeypatch.context() as patch:
        patch.setattr(module, "load_tokenizer", never)
        again = prepare(recipe, tokenizer=tokenizer, cache=tmp_path / "cache")
        assert again.folder == first.folder
        assert again.manifest == first.manifest
        # Any of these changes what is made, so none may be answered from the cache.
        for changed in ({"max_length": 300}, {"seed": 1}, {"validation_fraction": 0.3}):
            with pytest.raises(RuntimeError, match="tokenised again"):
                prepare(dataclasses.replace(recipe, **changed), tokenizer=tokenizer, cache=tmp_path / "cache")
    write(tmp_path / "a.jsonl", questions("a", 21))
    assert prepare(recipe, tokenizer=tokenizer, cache=tmp_path / "cache").folder != first.folder


def test_another_tokenizer_is_another_folder(tmp_path, tokenizer):
    recipe = simple(tmp_path)
    other = str(tiny_tokenizer.build(tmp_path / "other", bos=True))
    folders = {prepare(recipe, tokenizer=name, cache=tmp_path / "cache").folder for name in (tokenizer, other)}
    assert len(folders) == 2


@pytest.mark.parametrize("name", ["manifest.json", "train.ids.npy", "validation.mask.npy", "train.offsets.npy"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut"])
def test_a_damaged_folder_is_refused_and_made_anew(tmp_path, tokenizer, name, damage):
    recipe = simple(tmp_path)
    first = prepare(recipe, tokenizer=tokenizer, cache=tmp_path / "cache")
    file = first.folder / name
    content = file.read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes(b"" if damage == "empty" else content[:-3])
    with pytest.raises(StorageError, match="missing or damaged"):
        Prepared.load(first.folder)
    said = []
    again = prepare(recipe, tokenizer=tokenizer, cache=tmp_path / "cache", report=said.append)
    assert any("damaged; preparing the data again" in line for line in said)
    assert file.read_bytes() == content
    assert again.manifest == first.manifest
    assert os.listdir(tmp_path / "cache") == [first.folder.name]  # nothing left lying about


def test_arrays_of_another_run_are_refused(tmp_path, tokenizer):
    folder = prepare(simple(tmp_path), tokenizer=tokenizer, cache=tmp_path / "cache").folder
    np.save(folder / "train.ids.npy", np.zeros(3, dtype=np.int32))
    with pytest.raises(StorageError, match=r"train\.ids\.npy holds int32 \(3,\)"):
        Prepared.load(folder)


def test_processes_at_once(tmp_path, tokenizer):
    recipe = simple(tmp_path)
    fork = multiprocessing.get_context("fork")  # the parent has transformers loaded; a fresh process takes seconds to
    start, folders = fork.Barrier(3), fork.SimpleQueue()

    def work():
        start.wait()
        folders.put(prepare(recipe, tokenizer=tokenizer, cache=tmp_path / "cache").folder.name)

    workers = [fork.Process(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert {folders.get() for _ in workers} == set(os.listdir(tmp_path / "cache"))


@pytest.mark.parametrize("survived", [0, 1, 6])
def test_killed_while_writing(tmp_path, tokenizer, survived):
    """The process dies after `survived` of the folder's six arrays; after all of them, with the manifest written, at the first flush."""
    recipe = simple(tmp_path)
    fork = multiprocessing.get_context("fork")

    def work():
        written = itertools.count()

        def mortal(real):
            return lambda *given: os._exit(9) if next(written) == survived else real(*given)

        np.save, files._flush = mortal(np.save), mortal(files._flush)
        prepare(recipe, tokenizer=tokenizer, cache=tmp_path / "cache")

    worker = fork.Process(target=work)
    worker.start()
    worker.join()
    assert worker.exitcode == 9
    assert all(name.startswith(".") for name in os.listdir(tmp_path / "cache"))
    assert len(prepare(recipe, tokenizer=tokenizer, cache=tmp_path / "cache").train) == 15


def test_the_loser_of_a_race_leaves_the_winner_alone(tmp_path, tokenizer, monkeypatch):
    recipe = simple(tmp_path)
    real = module.pack_tokens

    def slow(examples):
        monkeypatch.setattr(module, "pack_tokens", real)
        prepare(recipe, tokenizer=tokenizer, cache=tmp_path / "cache")  # the other process finishes meanwhile
        return real(examples)

    monkeypatch.setattr(module, "pack_tokens", slow)
    prepared = prepare(recipe, tokenizer=tokenizer, cache=tmp_path / "cache")
    assert len(prepared.train) == 15
    assert os.listdir(tmp_path / "cache") == [prepared.folder.name]


def test_a_cache_that_cannot_be_written(tmp_path, tokenizer):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(StorageError, match="cannot write"):
        prepare(simple(tmp_path), tokenizer=tokenizer, cache=tmp_path / "cache")


def test_a_warm_start_imports_neither_torch_nor_transformers(tmp_path, tokenizer):
    recipe = simple(tmp_path)
    prepare(recipe, tokenizer=tokenizer, cache=tmp_path / "cache")
    program = (
        "import sys; from pathlib import Path\n"
        "from loratune.data.sources import DataRecipe; from loratune.data.prepare import prepare\n"
        "prepare(DataRecipe.from_json(sys.argv[1]), tokenizer=sys.argv[2], cache=Path(sys.argv[3]))\n"
        "print({'torch', 'transformers', 'datasets', 'pydantic', 'optuna'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", program, recipe.to_json(), tokenizer, str(tmp_path / "cache")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "set()\n"


# ---- what is refused ----


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (["a"] * 9, {"validation_fraction": 0.3}, "leaves no validation example: too few rows, or all ask the same"),
        (["a"], {"validation_fraction": 0.3}, "no training example is left beside validation"),
        (questions("a", 5), {"validation_count": 6}, "6 validation examples requested of 5 usable rows; validation never repeats"),
        (questions("a", 5), {"validation_count": 5}, "no training example is left beside validation"),
        (questions("a", 5), {"validation_fraction": 0.2, "max_length": 9}, "every prompt alone fills max_length = 9 tokens"),
    ],
)
def test_data_that_cannot_be_split(tmp_path, tokenizer, rows, options, message):
    source = DataSource(path=write(tmp_path / "a.jsonl", rows))
    with pytest.raises(DataError, match=message):
        prepare(DataRecipe(train=(source,), **options), tokenizer=tokenizer, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_tokenizers_that_cannot_be_had(tmp_path):
    recipe = simple(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    for name, message in (("nowhere", "there is no folder"), ("empty", "no tokenizer files"), ("broken", "cannot be loaded")):
        with pytest.raises(ModelError, match=message):
            prepare(recipe, tokenizer=str(tmp_path / name), cache=tmp_path / "cache")
