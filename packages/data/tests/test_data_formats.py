"""Every format's rows become the conversations that they mean, from every kind of file; bad rows are named."""

import gzip
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron.bridge.data.instruction.formats import FORMATS, DatasetFormat, dataset_format
from megatron.bridge.data.instruction.messages import BadRow, Conversation, check
from megatron.bridge.data.instruction.rows import find_row_files, read_rows
from megatron.bridge.errors import BridgeError

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]


def turns(conversation: Conversation) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in conversation.messages]


def read(name: str, *rows: dict[str, Any]) -> list[Conversation]:
    found = list(dataset_format(name).conversations(rows))
    for conversation in found:
        check(conversation)
    return found


ASKED = [("user", "Add."), ("assistant", "3")]
# format, row -> turns
CASES: list[tuple[str, dict[str, Any], list[tuple[str, str]]]] = [
    ("alpaca", {"instruction": "Add.", "input": "", "output": "3"}, ASKED),
    ("alpaca", {"instruction": "Add.", "output": "3"}, ASKED),
    ("alpaca", {"instruction": "Add.", "input": "1 2", "output": "3"}, [("user", "Add.\n\n1 2"), ("assistant", "3")]),
    (
        "alpaca",
        {"instruction": "Add.", "input": None, "output": "3", "system": "Be brief.", "history": [["Hi", "Ho"]]},
        [("system", "Be brief."), ("user", "Hi"), ("assistant", "Ho"), *ASKED],
    ),
    ("dolly", {"instruction": "Add.", "context": "", "response": "3", "category": "math"}, ASKED),
    (
        "dolly",
        {"instruction": "Add.", "context": "1 2", "response": "3"},
        [("user", "Add.\n\n1 2"), ("assistant", "3")],
    ),
    (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "Add."}, {"from": "gpt", "value": "3"}], "system": "Brief."},
        [("system", "Brief."), *ASKED],
    ),
    (
        "chat",
        {
            "messages": [
                {"role": "developer", "content": "Brief."},
                {"role": "user", "content": [{"type": "text", "text": "Add"}, {"type": "text", "text": "."}]},
                {"role": "assistant", "content": "3"},
            ]
        },
        [("system", "Brief."), *ASKED],
    ),
    ("prompt_completion", {"prompt": "Add.", "completion": "3"}, ASKED),
    (
        "prompt_completion",
        {
            "prompt": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Ho"},
                {"role": "user", "content": "Add."},
            ],
            "completion": [{"role": "assistant", "content": "3"}],
        },
        [("user", "Hi"), ("assistant", "Ho"), *ASKED],
    ),
]


@pytest.mark.parametrize(("name", "row", "expected"), CASES)
def test_a_row_means_its_conversation(name: str, row: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    (found,) = read(name, row)
    assert turns(found) == expected


def test_every_format_offered_is_tested() -> None:
    assert {name for name, _, _ in CASES} | {"oasst"} == set(FORMATS)


def test_answers_within_a_prompt_and_of_weight_0_are_not_trained() -> None:
    (given,) = read("prompt_completion", CASES[-1][1])
    assert [message.trained for message in given.messages if message.role == "assistant"] == [False, True]
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]
    messages += [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d", "weight": 1}]
    (weighted,) = read("chat", {"messages": messages})
    assert [message.trained for message in weighted.messages] == [True, False, True, True]


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
def test_tools_and_calls_reach_the_template(tools: Any) -> None:
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    messages = [
        {"role": "user", "content": "Add."},
        {"role": "assistant", "tool_calls": calls, "content": None},
        {"role": "tool", "content": "3", "name": "add"},
        {"role": "assistant", "content": "It is 3."},
    ]
    (found,) = read("chat", {"messages": messages, "tools": tools})
    assert found.tools == TOOLS
    assert found.messages[1].as_dict() == {"role": "assistant", "content": "", "tool_calls": calls}
    assert found.messages[2].as_dict() == {"role": "tool", "content": "3", "name": "add"}


def node(name: str, role: str, *replies: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"message_id": name, "text": name, "role": role, "replies": list(replies), **more}


def tree() -> dict[str, Any]:
    """A question; a worse and a better answer; two questions on, one never answered."""
    first = node("q2", "prompter", node("a3", "assistant"))
    second = node("q3", "prompter")
    third = node("q4", "prompter", node("a4", "assistant", deleted=True), node("a5", "assistant"))
    worse = node("a1", "assistant", node("q9", "prompter", node("a9", "assistant")), rank=1)
    return node("q1", "prompter", worse, node("a2", "assistant", first, second, third, rank=0))


def flattened(root: dict[str, Any], parent: str | None = None) -> list[dict[str, Any]]:
    own = {name: value for name, value in root.items() if name != "replies"} | {"parent_id": parent}
    own["message_tree_id"] = "q1"
    return [own, *(row for reply in root["replies"] for row in flattened(reply, root["message_id"]))]


@pytest.mark.parametrize("shape", ["tree", "messages", "messages in reverse"])
def test_oasst_follows_the_best_answers_and_trains_each_once(shape: str) -> None:
    rows: Sequence[dict[str, Any]] = [{"prompt": tree()}] if shape == "tree" else flattened(tree())
    ways = read("oasst", *(rows if shape != "messages in reverse" else rows[::-1]))
    names = sorted("".join(content for _, content in turns(way)) for way in ways)
    assert names == ["q1a2q2a3", "q1a2q4a5"]
    trained = [message.content for way in ways for message in way.messages if message.trained]
    assert sorted(name for name in trained if name.startswith("a")) == ["a2", "a3", "a5"]


def test_oasst_refuses_broken_trees() -> None:
    rows = flattened(tree())
    with pytest.raises(BadRow, match="replies to 'q1', which is not in its tree"):
        read("oasst", *rows[1:])
    with pytest.raises(BadRow, match="has 2 first messages"):
        read("oasst", *rows, rows[0] | {"message_id": "other"})
    with pytest.raises(BadRow, match="no message of the tree is an answer"):
        read("oasst", rows[0])


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("alpaca", {"instructions": "a", "output": "b"}, "no field 'instruction'; did you mean 'instructions'"),
    ("alpaca", {"instruction": "a", "output": 3}, "'output' is no text but int '3'"),
    ("alpaca", {"instruction": "a", "output": ""}, "a message of the assistant is empty"),
    ("alpaca", {"instruction": "a", "output": "b", "history": ["c"]}, "'history' must hold pairs"),
    ("dolly", {"instruction": "a", "response": None}, "'response' is no text but null"),
    ("sharegpt", {"conversations": [{"from": "gpt", "value": "b"}]}, "starts with the assistant"),
    ("sharegpt", {"conversations": [{"from": "me", "value": "b"}]}, "a turn is from 'me'"),
    ("sharegpt", {"conversations": "text"}, "'conversations' is no list of objects"),
    ("chat", {"messages": []}, "has no messages"),
    ("chat", {"messages": [{"role": "system", "content": "b"}]}, "a system prompt only"),
    ("chat", {"messages": [{"role": "assistant", "content": "b"}]}, "starts with the assistant"),
    ("chat", {"messages": [{"role": "user", "content": "b"}]}, "ends with a user message that nobody answers"),
    ("chat", {"messages": [{"role": "user", "content": "b"}] * 2}, "two user messages follow each other"),
    ("chat", {"messages": [{"role": "nobody", "content": "b"}]}, "the role 'nobody'"),
    ("chat", {"messages": [{"role": "user"}]}, "no field 'content'"),
    ("chat", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "something other than text"),
    ("chat", {"messages": [{"role": "user", "content": "b", "weight": 2}]}, "the weight 2"),
    ("chat", {"messages": [{"role": "user", "content": "b"}], "tools": "{"}, "'tools' is a text, but no JSON"),
    ("prompt_completion", {"prompt": "a", "response": "b"}, "no field 'completion'"),
    ("prompt_completion", {"text": "a"}, "no field 'prompt'"),
]


@pytest.mark.parametrize(("name", "row", "why"), BAD)
def test_a_row_that_means_nothing_is_refused(name: str, row: dict[str, Any], why: str) -> None:
    with pytest.raises(BadRow, match=why):
        read(name, row)


def swapped(row: dict[str, Any]) -> Any:
    """A format of one's own: a list of messages."""
    return [{"role": "user", "content": row["q"]}, {"role": "assistant", "content": row["a"]}]


class Pairs(DatasetFormat):
    """A format of one's own: two rows make a conversation."""

    def group(self, row):
        return row["id"]

    def conversations(self, rows):
        yield from dataset_format("prompt_completion").conversations(
            [{"prompt": rows[0]["text"], "completion": rows[1]["text"]}]
        )


def test_formats_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    FORMATS.register("pairs", Pairs)
    try:
        assert turns(read("pairs", {"id": "1", "text": "Add."}, {"id": "1", "text": "3"})[0]) == ASKED
    finally:
        FORMATS.unregister("pairs")
    monkeypatch.setattr(math, "swapped", swapped, raising=False)
    assert turns(read("math:swapped", {"q": "Add.", "a": "3"})[0]) == ASKED


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("alpacca", "did you mean 'alpaca'"),
        ("nowhere:swapped", "cannot be imported"),
        ("math:nothing", "cannot be imported"),
        ("math:pi", "no function but float"),
    ],
)
def test_unknown_formats_are_refused(name: str, why: str) -> None:
    with pytest.raises(BridgeError, match=why):
        dataset_format(name)


ROWS = [
    {"messages": [{"role": "user", "content": f"é {at}"}, {"role": "assistant", "content": "x" * at}]}
    for at in range(9)
]


def _write(folder: Path, kind: str) -> Path:
    target = folder / f"rows.{kind}"
    lines = "\n".join(json.dumps(row, ensure_ascii=at % 2 == 0) for at, row in enumerate(ROWS))
    if kind.startswith("jsonl"):
        data = lines + "\n"
    elif kind.startswith("json"):
        data = json.dumps(ROWS, indent=1)
    else:
        from datasets import Dataset

        dataset = Dataset.from_list(ROWS)
        if kind == "parquet":
            dataset.to_parquet(target)
        else:
            dataset.save_to_disk(target, num_shards=3)
        return target
    target.write_bytes(gzip.compress(data.encode()) if kind.endswith("gz") else data.encode())
    return target


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "json.gz", "parquet", "saved"])
def test_rows_of_every_kind_of_file(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.bridge.data.instruction.rows._CHUNK_CHARACTERS", 50)
    target = _write(tmp_path, kind)
    found = list(read_rows(find_row_files([target])))
    assert [row.checked() for row in found] == ROWS
    if kind.startswith("jsonl"):
        assert [row.origin for row in found] == [f"{target}:{line}" for line in range(1, 10)]


def test_fields_that_a_row_never_had_do_not_come_back_as_nulls(tmp_path: Path) -> None:
    from datasets import Dataset

    rows = [ROWS[1], {"messages": [{"role": "user", "content": "a", "name": "Ann"}]}]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    assert [row.row for row in read_rows([tmp_path / "rows.parquet"])] == rows


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS)).save_to_disk(tmp_path / "dict")
    (tmp_path / "empty").mkdir()
    (tmp_path / "rows.csv").write_text("a")
    for path, why in (
        (tmp_path / "dict", "splits; name one of them: .*test, .*train"),
        (tmp_path / "empty", "holds no .jsonl"),
        (tmp_path / "row.csv", "does not exist; did you mean 'rows.csv'"),
        (tmp_path / "rows.csv", "rows are read from .jsonl"),
    ):
        with pytest.raises(BridgeError, match=why):
            find_row_files([path])
    (tmp_path / "dict" / "train" / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(BridgeError, match=r"data-00000-of-00001.arrow' of the dataset .* is missing"):
        find_row_files([tmp_path / "dict" / "train"])
    for name, text, why in (
        ("a.json", '{"messages": []}', "no JSON array"),
        ("b.json", '[{"a": 1}, {"a": ', "row 2 is not JSON"),
        ("c.json", '[{"a": 1} {"a": 1}]', "row 1 is not JSON"),
        ("d.parquet", "text", "cannot be read as Parquet"),
        ("e.arrow", "text", "cannot be read as Arrow"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(BridgeError, match=why):
            list(read_rows([tmp_path / name]))


def test_a_line_that_is_no_row_is_a_row_with_a_problem(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"a": \n[1]\n')
    good, broken, listed = read_rows([tmp_path / "rows.jsonl"])
    assert good.checked() == {"a": 1}
    with pytest.raises(BadRow, match="not JSON"):
        broken.checked()
    with pytest.raises(BadRow, match="no object but list"):
        listed.checked()
