"""OpenAssistant: trees of messages, one whole tree per row or one message per row.

At each point the answer of the best rank is followed, and every question. Each way from the root to a last answer is a
conversation; an answer that several of them share is trained in the first.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from megatron.bridge.data.instruction.fields import Row, list_of, optional_text, text_of
from megatron.bridge.data.instruction.formats.base import DatasetFormat
from megatron.bridge.data.instruction.messages import ASSISTANT, USER, BadRow, Conversation, Message

_ROLES = {"prompter": USER, "assistant": ASSISTANT}


class OpenAssistant(DatasetFormat):
    """Both exports of OpenAssistant (Köpf et al., arXiv:2304.07327): `*.trees.jsonl` and `*.messages.jsonl`."""

    def group(self, row: Row) -> str | None:
        return None if "prompt" in row else text_of(row, "message_tree_id")

    def conversations(self, rows: Sequence[Row]) -> Iterator[Conversation]:
        root = dict(list_of({"prompt": [rows[0]["prompt"]]}, "prompt")[0]) if "prompt" in rows[0] else _tree(rows)
        trained: set[int] = set()
        ways = list(_ways(root, ()))
        if not ways:
            raise BadRow("no message of the tree is an answer of the assistant; remove the tree")
        for way in ways:
            yield Conversation([_message(node, id(node) not in trained) for node in way])
            trained.update(map(id, way))


def _tree(rows: Sequence[Row]) -> dict[str, Any]:
    """The root of a tree that is given as single messages, in any order; replies get their place in `replies`."""
    nodes = {text_of(row, "message_id"): {**row, "replies": []} for row in rows}
    roots = []
    for node in nodes.values():
        parent = optional_text(node, "parent_id")
        if not parent:
            roots.append(node)
        elif parent in nodes:
            nodes[parent]["replies"].append(node)
        else:
            raise BadRow(f"message {node['message_id']!r} replies to {parent!r}, which is not in its tree")
    if len(roots) != 1:
        raise BadRow(f"the tree {rows[0]['message_tree_id']!r} has {len(roots)} first messages; there must be one")
    return roots[0]


def _ways(node: Row, before: tuple[Row, ...]) -> Iterator[tuple[Row, ...]]:
    """Every way from the root down to a last answer."""
    here = (*before, node)
    replies = [reply for reply in node.get("replies") or [] if not reply.get("deleted")]
    answers = sorted((reply for reply in replies if reply.get("role") == "assistant"), key=_rank)
    followed = answers[:1] if answers else replies
    longer = [way for reply in followed for way in _ways(reply, here)]
    if longer:
        yield from longer
    elif node.get("role") == "assistant":
        yield here


def _rank(answer: Row) -> float:
    rank = answer.get("rank")
    return float("inf") if rank is None else float(rank)


def _message(node: Row, trained: bool) -> Message:
    role = text_of(node, "role")
    if role not in _ROLES:
        raise BadRow(f"a message has the role {role!r}; known are {', '.join(_ROLES)}")
    return Message(_ROLES[role], text_of(node, "text"), trained=trained)
