"""Reading instruction data: every format, and one clear message for everything that can be wrong."""

import csv
import gzip
import json

import pytest

from loratune.data.formats import Markers
from loratune.data.sources import DataRecipe, DataSource, Exchange, read_source
from loratune.errors import DataError

ALPACA = {"instruction": "Translate.", "input": "chat", "output": "cat"}
ROWS = {
    "alpaca": ALPACA,
    "dolly": {"instruction": "Translate.", "context": "chat", "response": "cat", "category": "closed_qa"},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    "messages": {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
    "prompt_completion": {"prompt": "Hi", "completion": "Hello"},
}
EXPECTED = {name: Exchange("Translate.", "chat", "cat") if name in ("alpaca", "dolly") else Exchange("Hi", "", "Hello") for name in ROWS}


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def only(path, **options):
    examples, bad = read_source(DataSource(path=str(path), **options))
    assert bad == []
    return examples


# ---- what is read ----


@pytest.mark.parametrize("given", ["auto", "named"])
@pytest.mark.parametrize("name", ROWS)
def test_formats(tmp_path, name, given):
    (tmp_path / "a.jsonl").write_text(lines(ROWS[name], ROWS[name]))
    examples = only(tmp_path / "a.jsonl", format="auto" if given == "auto" else name)
    assert [e.exchanges for e in examples] == [(EXPECTED[name],)] * 2
    assert [e.place for e in examples] == ["line 1", "line 2"]
    assert examples[0].source == str(tmp_path / "a.jsonl")
    assert examples[0].category == ("closed_qa" if name == "dolly" else "")


def write_csv(path, rows, delimiter=","):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path, rows):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)


WRITERS = {
    "a.json": lambda path, rows: path.write_text(json.dumps(rows)),
    "data.json": lambda path, rows: path.write_text(json.dumps({"version": "1", "data": rows}, indent=1)),
    "lines.json": lambda path, rows: path.write_text(lines(*rows)),
    "bom.json": lambda path, rows: path.write_text("\ufeff" + json.dumps(rows)),
    "a.jsonl": lambda path, rows: path.write_text("\n" + lines(*rows) + "\n\n"),
    "crlf.jsonl": lambda path, rows: path.write_bytes(lines(*rows).replace("\n", "\r\n").encode()),
    "a.jsonl.gz": lambda path, rows: path.write_bytes(gzip.compress(lines(*rows).encode())),
    "a.csv": write_csv,
    "a.tsv": lambda path, rows: write_csv(path, rows, "\t"),
    "a.csv.gz": lambda path, rows: (write_csv(path, rows), path.write_bytes(gzip.compress(path.read_bytes()))),
    "a.parquet": write_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_containers(tmp_path, name):
    # A line separator and a quoted line break are where careless readers cut a row in two.
    rows = [ALPACA | {"output": "one\u2028two, «é»"}, ALPACA | {"input": "", "output": 'three\n"four"'}]
    WRITERS[name](tmp_path / name, rows)
    examples = only(tmp_path / name)
    assert [e.exchanges[0] for e in examples] == [Exchange(r["instruction"], r["input"], r["output"]) for r in rows]


def test_folders_and_their_splits(tmp_path):
    for name in ("train-0", "train-1", "test"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{name}.jsonl").write_text(lines(ALPACA | {"output": name}))
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert [e.exchanges[0].response for e in only(tmp_path, split="train")] == ["train-0", "train-1"]
    with pytest.raises(DataError, match=r"several splits \(test, train\)"):
        only(tmp_path)
    with pytest.raises(DataError, match="no file name contains split dev"):
        only(tmp_path, split="dev")
    with pytest.raises(DataError, match="a single file has no splits"):
        only(tmp_path / "data" / "test.jsonl", split="test")


def test_folder_saved_by_datasets(tmp_path):
    import datasets

    data = datasets.Dataset.from_list([ALPACA])
    data.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(str(tmp_path / "two"))
    for folder in ("one", "two"):
        assert [(e.exchanges, e.place) for e in only(tmp_path / folder)] == [((EXPECTED["alpaca"],), "row 1")]
    with pytest.raises(DataError, match=r"no split dev\. Available: train, test"):
        only(tmp_path / "two", split="dev")


def test_conversations(tmp_path):
    said = [("system", "Be brief."), ("human", "Hi"), ("gpt", "Hello"), ("human", "Bye"), ("gpt", "See you")]
    (tmp_path / "a.json").write_text(json.dumps([{"conversations": [{"from": r, "value": t} for r, t in said]}]))
    (tmp_path / "b.json").write_text(json.dumps([{"conversations": [{"role": r, "content": t} for r, t in said]}]))
    for name in ("a.json", "b.json"):
        (example,) = only(tmp_path / name)
        assert example.system == "Be brief."
        assert example.exchanges == (Exchange("Hi", "", "Hello"), Exchange("Bye", "", "See you"))


def test_missing_and_null_input_are_empty(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"instruction": "a", "output": "b"}, {"instruction": "a", "input": None, "output": "b"}]))
    assert [e.exchanges[0].input for e in only(tmp_path / "a.json")] == ["", ""]


def test_skip_counts_and_lists_bad_rows(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines(ALPACA, ALPACA | {"output": " "}, ALPACA | {"output": 3}) + '{"instruction": "cut o')
    examples, bad = read_source(DataSource(path=str(tmp_path / "a.jsonl")), "skip")
    assert len(examples) == 1
    assert [(row.place, row.problem.split(":")[0]) for row in bad] == [
        ("line 2", "field output"),
        ("line 3", "field output"),
        ("line 4", "not valid JSON"),
    ]


def test_few_bad_rows_are_skipped_and_all_are_named_where_there_are_more(tmp_path):
    path = tmp_path / "a.jsonl"
    recipe = DataRecipe(train=(DataSource(path=str(path)),))
    path.write_text(lines(*[ALPACA] * 199, ALPACA | {"output": ""}))
    examples, bad = recipe.read(recipe.train[0])
    assert (len(examples), len(bad)) == (199, 1)
    path.write_text(lines(*[ALPACA] * 197, *[ALPACA | {"output": ""}] * 3, ALPACA | {"output": 7}))
    with pytest.raises(DataError, match="4 of 201 rows cannot be used, more than the 1% that are skipped") as caught:
        recipe.read(recipe.train[0])
    assert "a.jsonl, line 198: field output: is empty; expected a response to learn from; also lines 199, 200\n" in str(caught.value)
    assert "line 201: field output: expected text, found the number 7" in str(caught.value)


QA = {"question": "Translate.", "input": "id-7", "text": "chat", "answer": "cat"}
COLUMNS = {"instruction": "question", "input": "text", "response": "answer"}


def test_columns_of_other_names(tmp_path):
    write_csv(tmp_path / "a.csv", [QA])
    source = DataSource(path=str(tmp_path / "a.csv"), columns={"response": "answer"})
    recipe = DataRecipe(train=(source,), columns=COLUMNS | {"response": "text"})  # a source's own stand over all
    ((example,), _) = recipe.read(source)
    assert example.exchanges == (Exchange("Translate.", "chat", "cat"),)
    assert example.unread == ("input (replaced by text)",)
    with pytest.raises(DataError, match=r"data\.columns names anser, which no row has; the fields there: .* did you mean 'answer'"):
        DataRecipe(train=(source,), columns=COLUMNS).read(DataSource(path=str(tmp_path / "a.csv"), columns={"response": "anser"}))


def test_the_preferred_answers_of_preference_data(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines({"prompt": "q", "chosen": "a", "rejected": "b"}))
    ((example,), _) = read_source(DataSource(path=str(tmp_path / "a.jsonl")), columns={"completion": "chosen"})
    assert (example.exchanges, example.unread) == ((Exchange("q", "", "a"),), ("rejected",))


def test_plain_text_is_divided_at_its_markers(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(lines(*({"text": f"Below is a task.\n### Q: {q}\n### A: yes {q}"} for q in ("Is it?", "Was it?"))))
    first, _ = read_source(DataSource(path=str(path)), markers=Markers("### A:"))[0]
    assert (first.system, *first.exchanges[0][:3]) == ("Below is a task.\n### Q: ", "Is it?\n", "", " yes Is it?")
    path.write_text(lines({"text": "S Q:one A:1 Q:two A:2 Q:three"}))
    ((example,), _) = read_source(DataSource(path=str(path)), markers=Markers("A:", "Q:"))
    assert (example.system, [e[:3] for e in example.exchanges]) == ("S Q:", [("one ", "", "1 "), ("two ", "", "2 ")])
    path.write_text(lines({"text": "no marker"}))
    with pytest.raises(DataError, match="the response_marker 'A:' does not appear"):
        read_source(DataSource(path=str(path)), markers=Markers("A:"))


def test_the_real_sets(shared_data):
    examples, bad = read_source(DataSource(path=str(shared_data / "alpaca" / "alpaca_random_9k.json")), "skip")
    assert len(examples) + len(bad) == 9229
    assert all("field output: is empty" in str(row) for row in bad)
    source = DataSource(path=str(shared_data / "alpaca" / "alpaca_random_9k.json"))
    assert DataRecipe(train=(source,)).read(source) == (examples, bad)  # so few are skipped without being asked
    dolly = only(shared_data / "dolly")
    assert len(dolly) == 15011
    assert dolly[0].category


# ---- what is refused: (file name, content, the message's beginning after the path) ----

TURNS = ROWS["messages"]["messages"]
BAD = {
    "empty file": ("a.jsonl", "", ": the file is empty"),
    "blank file": ("a.csv", "\n \n", ": the file is empty"),
    "empty array": ("a.json", "[]", ": holds no records"),
    "header only": ("a.csv", "instruction,output\n", ": holds no records"),
    "unknown suffix": ("a.txt", "x", ": unknown kind of file. Known: .json"),
    "scalar": ("a.json", '"x"', ': expected an array of records, found text "x"'),
    "not json": ("a.json", "[{'a': 1}]", ", line 1, column 3: not valid JSON: Expecting property name"),
    "array cut off": ("a.json", '[{"instruction": "a", "output": "b"},\n{"instr', ", line 2, column 2: not valid JSON: .*seems cut off"),
    "line cut off": (
        "a.jsonl",
        lines(ALPACA) + '{"instruction": "x',
        r", line 2: not valid JSON: .*\(the last line; is the file cut off\?\)",
    ),
    "line not json": (
        "a.jsonl",
        lines(ALPACA) + "oops\n" + lines(ALPACA),
        ', line 2: not valid JSON: Expecting value at column 1: text "oops"',
    ),
    "too deep": ("a.json", "[" * 100_000, ": nested too deeply"),
    "latin-1": ("a.json", b'[\n{"instruction": "caf\xe9"}]', r", line 2: not UTF-8 \(byte 0xe9\)"),
    "utf-16": ("a.json", "[]".encode("utf-16"), ": the file is UTF-16; UTF-8 is expected"),
    "not gzip": ("a.json.gz", b"[]", ": not a gzip file"),
    "gzip cut off": ("a.json.gz", gzip.compress(b"[]" * 100)[:20], ": the gzip file is cut off or damaged"),
    "not parquet": ("a.parquet", b"PAR1 or not", ": not a readable Parquet file"),
    "csv too long": ("a.csv", "instruction,output\na,b,c\n", ", line 2: 3 fields, but the header has 2"),
    "csv open quote": ("a.csv", 'instruction,output\na,b\nc,"d\n\n', ", the row after line 2: not valid CSV: unexpected end of data"),
    "row not object": ("a.json", '["x"]', ', record 1: expected an object with fields, found text "x"'),
    "unknown fields": (
        "a.json",
        '[{"instruction": "a", "reponse": "b"}]',
        ", record 1: the fields instruction, reponse fit no .*reponse looks like response",
    ),
    "missing field": (
        "a.jsonl",
        lines(ALPACA, {"instruction": "a", "input": ""}),
        ", line 2: field output is missing: expected text, found only the fields",
    ),
    "wrong type": ("a.jsonl", lines(ALPACA | {"output": 42}), ", line 1: field output: expected text, found the number 42"),
    "null": ("a.jsonl", lines(ALPACA | {"output": None}), ", line 1: field output: expected text, found null"),
    "long value": ("a.jsonl", lines(ALPACA | {"output": ["x" * 99]}), r', line 1: field output: expected text, found a list \["x+\.\.\.\.'),
    "empty response": ("a.jsonl", lines(ALPACA | {"output": " \n"}), ", line 1: field output: is empty; expected a response"),
    "empty question": ("a.jsonl", lines(ALPACA | {"instruction": "", "input": ""}), ", line 1: field instruction: is empty"),
    "key twice": (
        "a.jsonl",
        lines(ALPACA) + '{"instruction": "a", "output": "b", "output": "c"}',
        ", line 2: the key output appears twice in an object; keep one",
    ),
    "key twice within": (
        "a.json",
        '[{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "content": "c"}]}]',
        ", record 1: the key content appears twice",
    ),
    "data twice": ("a.json", '{"data": [], "data": []}', ": the key data appears twice in the outermost object"),
    "csv column twice": ("a.csv", "instruction,output,output\na,b,c\n", ": the column output appears twice"),
    "surrogate": ("a.jsonl", lines(ALPACA | {"output": "\ud83d"}), ", line 1: field output: holds half of a surrogate pair"),
    "no messages": ("a.jsonl", lines({"messages": []}), r", line 1: field messages: expected a list of messages, found a list \[\]"),
    "unknown role": (
        "a.jsonl",
        lines({"messages": [{"role": "narrator", "content": "x"}]}),
        r", line 1: messages\[1\].role: expected one of .*found text \"narrator\"",
    ),
    "content parts": (
        "a.jsonl",
        lines({"messages": [{"role": "user", "content": [{}]}]}),
        r", line 1: messages\[1\].content\[1\]: expected a part of type text, found an object {}",
    ),
    "starts with answer": ("a.jsonl", lines({"messages": TURNS[1:]}), r", line 1: messages\[1\]: expected a message of the user"),
    "two answers": ("a.jsonl", lines({"messages": [*TURNS, TURNS[1]]}), r", line 1: messages\[3\]: expected a message of the user"),
    "preferences": ("a.jsonl", lines({"prompt": "q", "chosen": "a", "rejected": "b"}), ": the rows are preference data"),
    "plain text": ("a.jsonl", lines({"text": "### Response: x"}), r": plain text \(field text\) needs data\.response_marker"),
    "no last answer": (
        "a.jsonl",
        lines({"messages": [*TURNS, TURNS[0]]}),
        ", line 1: field messages: expected an assistant message at the end",
    ),
    "message not object": ("a.jsonl", lines({"messages": ["hi"]}), r", line 1: messages\[1\]: expected an object with role and content"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_has_one_message(tmp_path, name):
    file, content, message = BAD[name]
    path = tmp_path / file
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=f"^{path}{message}") as caught:
        read_source(DataSource(path=str(path)))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 500


def test_parquet_fills_no_field_of_one_row_with_the_names_of_another(tmp_path):
    rows = [
        {
            "messages": [{"role": "user", "content": f"Name {i}"}, {"role": "assistant", "content": "x"} | ({"weight": 1} if i else {})],
            "tools": [{"type": "function", "function": {"name": name, "parameters": {name: {"type": "string"}}}}],
        }
        for i, name in enumerate(("city", "town"))
    ]
    write_parquet(tmp_path / "a.parquet", rows)
    examples, _ = read_source(DataSource(path=str(tmp_path / "a.parquet")))
    assert [json.loads(example.tools) for example in examples] == [row["tools"] for row in rows]


def test_a_parquet_column_that_stands_twice(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table([["a"], ["b"], ["c"]], names=["instruction", "output", "output"]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"not a readable Parquet file: .*\(output\)"):  # Arrow refuses it
        read_source(DataSource(path=str(tmp_path / "a.parquet")))


def test_rows_with_a_key_twice_are_skipped_on_request(tmp_path):
    (tmp_path / "a.json").write_text(f'[{json.dumps(ALPACA)}, {{"instruction": "a", "output": "b", "output": "c"}}]')
    examples, bad = read_source(DataSource(path=str(tmp_path / "a.json")), "skip")
    assert (len(examples), [(row.place, row.problem) for row in bad]) == (
        1,
        [("record 2", "the key output appears twice in an object; keep one")],
    )


def test_an_empty_path():
    with pytest.raises(DataError, match="path is empty"):
        read_source(DataSource(path=" "))


def test_missing_files_name_their_neighbours(tmp_path):
    (tmp_path / "alpaca.json").write_text("[]")
    with pytest.raises(DataError, match=r"alpca\.json: no such file or folder\. Did you mean alpaca\.json\?"):
        read_source(DataSource(path=str(tmp_path / "alpca.json")))
    for name, text in (
        ("o.json", '{\n "trial": 3\n}'),
        ("dd.json", '{"output": "a"}\n{"output": "b"}'),
        ("d.yaml", "a: 1"),
        ("d2.json", '{"data": ['),
    ):
        (tmp_path / name).write_text(text)
    (tmp_path / "d.jso").mkdir()
    with pytest.raises(DataError, match=r"d\.json: no such file or folder\. Did you mean dd\.json or d2\.json or d\.jso\?"):
        read_source(DataSource(path=str(tmp_path / "d.json")))  # o.json is what a command wrote, no rows
    with pytest.raises(DataError, match=r"the folder .*nowhere does not exist either"):
        read_source(DataSource(path=str(tmp_path / "nowhere" / "a.json")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="the folder holds no data files"):
        read_source(DataSource(path=str(tmp_path / "empty")))


def test_a_hub_id_that_cannot_be_loaded(monkeypatch):
    import datasets

    def offline(path, split):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match="nobody/nothing: neither a local file or folder nor a hub data set that can be loaded: no network"):
        read_source(DataSource(path="nobody/nothing"))


def test_a_hub_data_set(monkeypatch):
    import datasets

    both = datasets.DatasetDict({"train": datasets.Dataset.from_list([ALPACA]), "test": datasets.Dataset.from_list([ALPACA] * 2)})
    monkeypatch.setattr(datasets, "load_dataset", lambda path, split: both[split] if split else both)
    assert len(only("some/set")) == 1
    assert [e.place for e in only("some/set", split="test")] == ["row 1", "row 2"]


def test_skip_refuses_a_file_without_any_good_row(tmp_path):
    (tmp_path / "a.jsonl").write_text("oops\nno\n")
    with pytest.raises(DataError, match=r"no usable row among 2\. The first: .*line 1: not valid JSON"):
        read_source(DataSource(path=str(tmp_path / "a.jsonl")), "skip")


def test_unknown_format():
    with pytest.raises(DataError, match=r"unknown format 'alpacca'; allowed: auto, alpaca, .*; did you mean 'alpaca'\?"):
        read_source(DataSource(path="a.json", format="alpacca"))


def test_recipe_survives_json():
    recipe = DataRecipe(train=(DataSource(path="a", weight=0.7), DataSource(path="b", count=3)), validation_fraction=0.2, seed=4)
    assert DataRecipe.from_json(recipe.to_json()) == recipe
