"""The user's own prompts: JSONL and Parquet, text and chat, and what is wrong with a file said by line."""

import json
import random
import re
import time

import pytest
import torch

from coterie.errors import UserError
from coterie.models.codec import Codec
from coterie.models.load import make_byte_tokenizer
from coterie.recipe.settings import DatasetTask
from coterie.tasks import dataset as module
from coterie.tasks import rows
from coterie.tasks.dataset import Dataset
from coterie.tasks.draw import draw
from coterie.tasks.rows import read_rows
from coterie.types import Completion, Group, Scored

CODEC = Codec.of(make_byte_tokenizer())


def chat_codec() -> Codec:
    tokenizer = make_byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant>{% endif %}"
    )
    return Codec.of(tokenizer)


@pytest.fixture
def jsonl(tmp_path):
    """A JSONL file of rows, lines or bytes."""

    def write(*lines, name="rows.jsonl") -> str:
        path = tmp_path / name
        texts = [
            line if isinstance(line, bytes) else line if isinstance(line, str) else json.dumps(line) for line in lines
        ]
        path.write_bytes(b"".join(t if isinstance(t, bytes) else t.encode() + b"\n" for t in texts))
        return str(path)

    return write


def dataset(path, codec=CODEC, **options) -> Dataset:
    return Dataset(DatasetTask(data=path, **{"heldout": 0.0, **options}), codec)


def refused(path, codec=CODEC, **options) -> str:
    with pytest.raises(UserError) as error:
        dataset(path, codec, **options)
    return str(error.value)


def test_jsonl_rows_become_prompts_with_their_other_columns(jsonl):
    path = jsonl({"prompt": "Say é", "answer": 3}, {"prompt": "解", "answer": None, "tags": ["a"]})
    first, second = dataset(path).train
    assert (first.content, first.text, dict(first.columns), first.origin) == (
        "Say é",
        "Say é",
        {"answer": 3},
        f"{path}:1",
    )
    assert (second.content, dict(second.columns)) == ("解", {"answer": None, "tags": ["a"]})
    assert CODEC.decode(first.tokens) == "Say é"
    assert len(first.tokens) == len("Say é".encode())
    assert first.key != second.key


def test_reading_that_takes_long_says_how_far_it_is(jsonl, monkeypatch, capsys):
    path = jsonl(*({"prompt": f"Say {n}"} for n in range(40)))
    dataset(path)
    assert capsys.readouterr().err == ""
    clock = iter(range(1000))  # each row takes a second
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(clock)))
    assert len(dataset(path).train) == 40
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(f"reading {path}: ")
    assert 2 <= len(lines) <= 8


def test_the_prompt_column_can_have_any_name(jsonl):
    (prompt,) = dataset(jsonl({"question": "q", "prompt": "other"}), prompt="question").train
    assert (prompt.content, dict(prompt.columns)) == ("q", {"prompt": "other"})


def test_chat_messages_go_through_the_template(jsonl):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "你好"}]
    (prompt,) = dataset(jsonl({"prompt": messages}), chat_codec()).train
    assert prompt.content == messages
    assert prompt.text == "你好"
    assert CODEC.decode(prompt.tokens) == "system>Be brief.\nuser>你好\nassistant>"


def test_chat_messages_without_a_template_are_refused(jsonl):
    assert "template" in refused(jsonl({"prompt": [{"role": "user", "content": "hi"}]}))


def test_parquet_text_and_messages(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = str(tmp_path / "rows.parquet")
    messages = [{"role": "user", "content": "one"}]
    pq.write_table(pa.table({"prompt": ["one", "two"], "chat": [messages, messages], "n": [1, 2]}), path)
    first, second = dataset(path).train
    assert (first.content, first.columns["n"], first.origin) == ("one", 1, f"{path}:1")
    assert (second.content, second.columns["n"], second.origin) == ("two", 2, f"{path}:2")
    assert dataset(path, chat_codec(), prompt="chat").train[0].content == messages


def test_parquet_and_jsonl_of_the_same_rows_give_the_same_task(tmp_path, jsonl):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"prompt": f"prompt {number}", "n": number} for number in range(30)]
    path = str(tmp_path / "rows.parquet")
    pq.write_table(pa.Table.from_pylist(rows), path)
    one, other = dataset(path, heldout=0.3), dataset(jsonl(*rows), heldout=0.3)
    assert [(p.content, p.columns) for p in one.train] == [(p.content, p.columns) for p in other.train]
    assert [(p.content, p.columns) for p in one.heldout] == [(p.content, p.columns) for p in other.heldout]


def test_blank_lines_a_bom_and_windows_line_ends_are_no_matter(jsonl):
    path = jsonl(b'\xef\xbb\xbf{"prompt": "a"}\r\n', b"\r\n", b"   \n", b'{"prompt": "b"}')
    assert [(p.content, p.origin) for p in dataset(path).train] == [("a", f"{path}:1"), ("b", f"{path}:4")]


GOOD = {"prompt": "good"}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "a"', "not valid JSON"),
        ("prompt: a", "not valid JSON"),
        ('{"prompt": "a"} {"prompt": "b"}', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        (b'{"prompt": "\xff"}\n', "not UTF-8"),
        (b"\x00\x01\x02\n", "not valid JSON"),
        ('["a"]', "list"),
        ('"a"', "str"),
        ("3", "int"),
        ("null", "NoneType"),
        ({"promt": "a"}, "did you mean 'promt'"),
        ({}, "no column 'prompt'"),
        ({"prompt": ""}, "empty"),
        ({"prompt": " \n\t"}, "empty"),
        ({"prompt": 3}, "int"),
        ({"prompt": None}, "NoneType"),
        ({"prompt": {"role": "user", "content": "a"}}, "dict"),
        ({"prompt": []}, "no messages"),
        ({"prompt": ["a"]}, "'a'"),
        ({"prompt": [{"role": "user"}]}, "role and a content"),
        ({"prompt": [{"role": "user", "content": None}]}, "role and a content"),
        ({"prompt": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}, "role and a content"),
        ({"prompt": [{"role": 1, "content": "a"}]}, "role and a content"),
    ],
    ids=lambda value: None if isinstance(value, dict) else str(value)[:20],
)
def test_a_broken_row_is_named_by_file_and_line(line, said, jsonl):
    path = jsonl(GOOD, "", {"prompt": "good too"}, line, {"prompt": "as good"})
    message = refused(path, chat_codec())
    assert message.startswith(f"{path}:4: ")
    assert said in message


def test_a_missing_column_names_the_nearest(jsonl):
    message = refused(jsonl({"question": "a", "answer": "b"}), prompt="qestion")
    assert "did you mean 'question'" in message
    assert "answer" in message


def test_a_file_without_rows_is_refused(jsonl, tmp_path):
    for path in (jsonl(name="empty.jsonl"), jsonl("", "  ", name="blank.jsonl")):
        assert refused(path) == f"{path}: has no rows"


def test_a_file_that_is_not_there_is_named(tmp_path):
    for name in ("nothing.jsonl", "nothing.parquet"):
        assert str(tmp_path / name) in refused(str(tmp_path / name))


def test_a_file_of_another_kind_is_named(jsonl):
    assert ".jsonl" in refused(jsonl("prompt\na", name="rows.csv"))


def test_a_broken_parquet_file_is_named(jsonl):
    path = jsonl("this is no parquet", name="rows.parquet")
    assert path in refused(path)


def test_an_empty_parquet_file_is_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = str(tmp_path / "rows.parquet")
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), path)
    assert refused(path) == f"{path}: has no rows"


def test_a_wrong_value_in_parquet_is_named_by_row(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = str(tmp_path / "rows.parquet")
    pq.write_table(pa.table({"prompt": ["a", None]}), path)
    assert refused(path).startswith(f"{path}:2: ")


# Rows that are the same, and rows that are left out


def test_a_row_that_is_there_already_is_refused_by_both_places(jsonl):
    path = jsonl(GOOD, {"prompt": "other"}, {"answer": 1, "prompt": "x"}, {"prompt": "x", "answer": 1})
    assert refused(path) == f"{path}:4: is the same as {path}:3"


def test_a_lenient_task_counts_the_rows_it_leaves_out_by_reason(jsonl):
    path = jsonl(*ROWS, "{", "[1]", {"prompt": ""}, {"prompt": ""}, ROWS[0], b'{"prompt": "\xff"}\n')
    task = dataset(path, lenient=True, max_left_out=0.2)
    assert contents(task.train) == contents(dataset(jsonl(*ROWS, name="good.jsonl")).train)
    assert [prompt.key for prompt in task.train] == [
        prompt.key for prompt in dataset(jsonl(*ROWS, name="good.jsonl")).train
    ]
    assert task.left_out == {"not valid JSON": 1, "not an object": 1, "empty": 2, "a duplicate": 1, "not UTF-8": 1}


def test_a_lenient_task_refuses_data_of_which_too_much_is_wrong(jsonl):
    path = jsonl(*ROWS, "{", "{", "[1]")
    message = refused(path, lenient=True)
    assert "3 of 53 rows" in message
    assert "2 not valid JSON, 1 not an object" in message
    assert "task.max_left_out=0.05" in message
    assert f"{path}:51" in message
    assert "1 of 1 rows" in refused(jsonl("{", name="none.jsonl"), lenient=True, max_left_out=1.0)


# Held out by content


def contents(prompts):
    return {json.dumps(prompt.content, sort_keys=True) for prompt in prompts}


ROWS = [{"prompt": f"prompt {number}", "n": number} for number in range(50)]


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (0.1, 5), (0.3, 15), (0.01, 1), (1.0, 49)])
def test_the_asked_share_is_held_out_and_some_rows_are_left(share, expected, jsonl):
    task = dataset(jsonl(*ROWS), heldout=share)
    assert (len(task.heldout), len(task.train)) == (expected, 50 - expected)
    assert not contents(task.train) & contents(task.heldout)
    assert task.examples


def test_the_order_of_the_rows_does_not_decide_what_is_held_out(jsonl):
    shuffled = random.Random(0).sample(ROWS, len(ROWS))
    one, other = dataset(jsonl(*ROWS), heldout=0.3), dataset(jsonl(*shuffled, name="shuffled.jsonl"), heldout=0.3)
    assert contents(one.heldout) == contents(other.heldout)
    first_fifteen = {json.dumps(row["prompt"]) for row in ROWS[:15]}
    assert contents(one.heldout) not in (first_fifteen, {json.dumps(row["prompt"]) for row in ROWS[-15:]})


def test_the_other_columns_do_not_decide_what_is_held_out(jsonl):
    changed = [{**row, "n": -row["n"]} for row in ROWS]
    one, other = dataset(jsonl(*ROWS), heldout=0.3), dataset(jsonl(*changed, name="changed.jsonl"), heldout=0.3)
    assert contents(one.heldout) == contents(other.heldout)


def test_equal_prompts_are_on_the_same_side(jsonl):
    again = [{**row, "n": row["n"] + 100} for row in ROWS]
    task = dataset(jsonl(*ROWS, *again, *({**row, "n": row["n"] + 200} for row in ROWS[:10])), heldout=0.3)
    assert not contents(task.train) & contents(task.heldout)
    assert len(task.train) + len(task.heldout) == 110
    assert len(contents(task.heldout)) == 15


def test_equal_chats_are_on_one_side_in_any_order_of_keys(jsonl):
    rows = [{"prompt": [{"role": "user", "content": f"prompt {number}"}]} for number in range(30)]
    turned = [{"prompt": [{"content": f"prompt {number}", "role": "user"}], "n": 1} for number in range(30)]
    task = dataset(jsonl(*rows, *turned), chat_codec(), heldout=0.3)
    assert not contents(task.train) & contents(task.heldout)


def test_one_prompt_is_for_training(jsonl):
    task = dataset(jsonl(GOOD, {**GOOD, "n": 1}), heldout=0.5)
    assert (len(task.train), len(task.heldout), len(task.examples)) == (2, 0, 2)


# As a task


def test_draws_take_every_row_once_an_epoch(jsonl):
    task = dataset(jsonl(*ROWS), heldout=0.2)
    drawn = [prompt for step in range(1, 11) for prompt in draw(task, 4, seed=0, step=step)]
    assert contents(drawn) == contents(task.train)
    assert len(drawn) == len(task.train) == 40
    assert drawn[12:16] == draw(dataset(jsonl(*ROWS), heldout=0.2), 4, seed=0, step=4)


def test_columns_of_a_typed_prompt_are_those_of_its_row(jsonl):
    task = dataset(jsonl(*ROWS), heldout=0.2)
    assert all(task.columns_of(row["prompt"]) == {"n": row["n"]} for row in ROWS)
    assert task.columns_of("prompt 50") is None


def test_correct_is_above_the_bound_and_an_abstention_is_not(jsonl):
    path = jsonl(GOOD)
    prompt = dataset(path).train[0]
    zero = torch.zeros(1)
    group = Group(prompt, [Completion([1], zero, zero, "stop", "a")] * 4)
    scored = Scored([group], torch.tensor([[0.5, 0.6, -1.0, torch.nan]]), {}, [])
    assert dataset(path, correct_above=0.5).judge(scored) == {"accuracy": [False, True, False, False]}
    assert dataset(path).judge(scored) == {}


def test_rows_are_read_with_where_they_stand(jsonl):
    path = jsonl(GOOD, "", {"prompt": "b"})
    assert list(read_rows(DatasetTask(data=path))) == [(f"{path}:1", GOOD), (f"{path}:3", {"prompt": "b"})]


@pytest.mark.timed
def test_long_prompts_load_fast(jsonl):
    """10 ms for a row of a thousand characters: a hundred thousand of them take minutes, not an hour."""
    path = jsonl(*({"prompt": f"{number} " + "word " * 200} for number in range(20)))
    start = time.perf_counter()
    dataset(path, heldout=0.1)
    assert time.perf_counter() - start < 20 * 0.01


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt": "a", "good": NaN}', "NaN is no number"),
        ('{"prompt": "a", "good": -Infinity}', "-Infinity is no number"),
        ('{"prompt": "a", "prompt": "b"}', "the key 'prompt' stands twice"),
        ('{"prompt": "a", "more": {"x": 1, "x": 2}}', "the key 'x' stands twice"),
        ('{"prompt": "\\ud800"}', "half of a character"),
    ],
)
def test_json_that_python_alone_would_take_is_refused(tmp_path, line, reason):
    file = tmp_path / "data.jsonl"
    file.write_text('{"prompt": "first"}\n' + line + "\n")
    with pytest.raises(UserError, match=rf"{re.escape(str(file))}:2: .*{re.escape(reason)}"):
        Dataset(DatasetTask(data=str(file)), Codec.of(make_byte_tokenizer()))


LARGE = {
    "a prompt of ten million characters": ({"prompt": "word " * 2_000_000}, "'prompt' has 10,000,000 characters, and 1,000,000"),
    "a chat of ten million": ({"prompt": [{"role": "user", "content": "word " * 2_000_000}]}, "characters, and 1,000,000 are allowed"),
    "an answer of ten million": ({"prompt": "a", "answer": "word " * 2_000_000}, "'answer' has 10,000,000 characters"),
    "many columns": ({"prompt": "a", **{f"column_{n}": n for n in range(20_000)}}, "has 20,001 columns, and 1,000 are allowed"),
    "no such column among many": ({f"column_{n}": n for n in range(900)}, "has no column 'prompt'"),
    "nested": ('{"prompt": "a", "deep": ' + "[" * 300 + "]" * 300 + "}", "nested too deeply"),
    "nested very deeply": ('{"prompt": "a", "deep": ' + "[" * 200_000 + "]" * 200_000 + "}", "deep|recursion"),
    "a key twice among many": ('{"prompt": "a", "x": {' + ", ".join(f'"k{n}": 1' for n in range(20_000)) + ', "k19999": 1}}', "'k19999' stands twice"),
    "many digits": ('{"prompt": "a", "x": ' + "9" * 1_000_000 + "}", "digits"),
}  # fmt: skip


@pytest.mark.timed
@pytest.mark.parametrize("name", LARGE)
def test_a_row_of_any_size_is_refused_at_once_by_its_place(tmp_path, name):
    row, reason = LARGE[name]
    file = tmp_path / "data.jsonl"
    file.write_text('{"prompt": "first", "answer": "b"}\n' + (row if isinstance(row, str) else json.dumps(row)) + "\n")
    start = time.perf_counter()
    with pytest.raises(UserError, match=rf"{re.escape(str(file))}:2: .*({reason})") as error:
        Dataset(
            DatasetTask(data=str(file), answer="answer" if "answer" in name else None), Codec.of(make_byte_tokenizer())
        )
    assert len(str(error.value)) < 2500
    assert time.perf_counter() - start < 5


@pytest.mark.timed
def test_an_object_of_many_keys_in_a_column_is_read(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps({"prompt": "a", "tests": {f"key {n}": [n] for n in range(50_000)}}) + "\n")
    start = time.perf_counter()
    (prompt,) = Dataset(DatasetTask(data=str(file), heldout=0), Codec.of(make_byte_tokenizer())).train
    assert len(prompt.columns["tests"]) == 50_000
    assert time.perf_counter() - start < 5


def test_lines_and_rows_have_a_limit_that_is_told_with_the_place(tmp_path, monkeypatch):
    file = tmp_path / "data.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": "b"}\n\n{"prompt": "c"}\n')
    monkeypatch.setattr(rows, "MAX_ROWS", 2)
    with pytest.raises(UserError, match=rf"{re.escape(str(file))}:4: is row 3, and 2 are allowed"):
        list(read_rows(DatasetTask(data=str(file))))
    monkeypatch.setattr(rows, "MAX_LINE", 10)
    with pytest.raises(UserError, match=rf"{re.escape(str(file))}:1: has more than 10 bytes"):
        list(read_rows(DatasetTask(data=str(file))))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"good": " ", "bad": "b"}, "'good' is empty"),
        ({"good": "g", "bad": ""}, "'bad' is empty"),
        ({"good": "g", "bad": "g"}, "are the same"),
    ],
)
def test_answers_that_teach_nothing_are_refused(tmp_path, row, reason):
    file = tmp_path / "data.jsonl"
    file.write_text(
        "".join(json.dumps(r) + "\n" for r in ({"prompt": "p", "good": "g", "bad": "b"}, {"prompt": "q", **row}))
    )
    with pytest.raises(UserError, match=rf":2: .*{reason}"):
        Dataset(DatasetTask(data=str(file), chosen="good", rejected="bad"), Codec.of(make_byte_tokenizer()))


def test_parquet_that_is_damaged_is_refused_or_read(tmp_path):
    """In a hundred ways, and never with another error."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file, moments = tmp_path / "data.parquet", random.Random(1)
    parquet.write_table(pyarrow.table({"prompt": [f"q{n}" for n in range(300)]}), file, compression="none")
    whole = file.read_bytes()
    refused = 0
    for _ in range(100):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[moments.randrange(len(damaged))] ^= 1 << moments.randrange(8)
        file.write_bytes(bytes(damaged))
        try:
            Dataset(DatasetTask(data=str(file)), Codec.of(make_byte_tokenizer()))
        except UserError:
            refused += 1
    assert refused


def test_rows_of_their_own_to_evaluate_on(jsonl):
    path, own = jsonl({"prompt": "a"}, {"prompt": "b"}), jsonl({"prompt": "c"}, {"prompt": "d"}, name="test.jsonl")
    task = dataset(path, heldout=0.5, evaluation=own)
    assert [prompt.text for prompt in task.train] == ["a", "b"]
    assert [(prompt.text, prompt.origin) for prompt in task.heldout] == [("c", f"{own}:1"), ("d", f"{own}:2")]
    assert task.examples == task.heldout
    assert not task.notes
    assert task.columns_of("c") == {}
    overlapping = dataset(path, evaluation=jsonl({"prompt": "a", "n": 1}, {"prompt": "x"}, name="o.jsonl"))
    assert ["1 of its 2 prompts are also trained on" in note.text for note in overlapping.notes] == [True]
    assert "test.jsonl:2" in refused(path, evaluation=jsonl({"prompt": "c"}, {"prompt": 3}, name="test.jsonl"))
    assert refused(path, evaluation="nowhere.jsonl") == (
        "task.evaluation: the file nowhere.jsonl does not exist; name another: --set task.evaluation=FILE"
    )
    folder = path.rpartition("/")[0]
    assert refused(path, evaluation=folder) == f"task.evaluation: {folder} is a folder; name a file in it"
    broken = jsonl({"prompt": "c"}, *["{"] * 3, *({"prompt": f"p{n}"} for n in range(96)), name="broken.jsonl")
    assert dataset(path, evaluation=broken, lenient=True).left_out == {"not valid JSON": 3}


@pytest.mark.parametrize("prompt", ["Hi?", [{"role": "user", "content": "Hi?"}]])
def test_turns_of_an_answer_that_its_prompt_lacks_are_refused(jsonl, prompt):
    reply = {"role": "assistant", "content": "Yes"}
    kept = jsonl({"prompt": prompt, "answer": [{"role": "user", "content": "Hi?"}, reply]})
    assert len(dataset(kept, chat_codec(), answer="answer").train) == 1
    for before in (
        {"role": "user", "content": "Other?"},
        {"role": "system", "content": "Be brief."},
        {"role": "user"},
        "Hm",
    ):
        said = refused(jsonl({"prompt": prompt, "answer": [before, reply]}), chat_codec(), answer="answer")
        assert "none of the prompt's" in said
        assert "rows.jsonl:1" in said
