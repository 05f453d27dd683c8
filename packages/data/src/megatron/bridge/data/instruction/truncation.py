"""What happens to a conversation that is longer than the context. Never are all of its labels lost unseen."""

from collections.abc import Callable

from megatron.bridge.data.instruction.encoding import Encoded
from megatron.bridge.data.instruction.messages import SYSTEM, USER, BadRow, Conversation
from megatron.bridge.errors import BridgeError, did_you_mean

REFUSE, RIGHT, TURNS, DROP = "refuse", "right", "turns", "drop"
TRUNCATIONS = (REFUSE, RIGHT, TURNS, DROP)


def check_truncation(truncation: str) -> None:
    """Refuse an unknown policy."""
    if truncation not in TRUNCATIONS:
        raise BridgeError(
            f"dataset.truncation={truncation!r} is unknown{did_you_mean(truncation, TRUNCATIONS)} "
            f"(known: {', '.join(TRUNCATIONS)})"
        )


def fit(
    conversation: Conversation,
    encoded: Encoded,
    longest: int,
    truncation: str,
    again: Callable[[Conversation], Encoded],
) -> Encoded | None:
    """The tokens of a conversation, at most `longest` of them; None where it is to be left out (`drop`).

    Args:
        conversation: its messages.
        encoded: its tokens.
        longest: tokens of a sample: one more than the context, for the last label.
        truncation: `refuse`; `right` cuts the end off; `turns` leaves out the oldest exchanges, never the system prompt
            or the last exchange; `drop` leaves the conversation out.
        again: encodes what is left of a conversation.

    Raises:
        BadRow: it is too long and may not be cut, or nothing that is trained would be left.
    """
    if len(encoded.ids) <= longest:
        return _with_labels(encoded, "nothing of it is trained")
    if truncation == DROP:
        return None
    if truncation == RIGHT:
        cut = Encoded(encoded.ids[:longest], encoded.trained[:longest])
        return _with_labels(cut, f"cut to {longest} tokens, it holds no answer any more; raise dataset.sequence_length")
    shorter: Conversation | None = conversation if truncation == TURNS else None
    while shorter is not None and (shorter := without_oldest_exchange(shorter)) is not None:
        rest = again(shorter)
        if len(rest.ids) <= longest:
            return _with_labels(rest, "nothing of what is left is trained")
    raise BadRow(
        f"it has {len(encoded.ids)} tokens, and dataset.sequence_length={longest - 1} leaves room for {longest}"
        + (", even for its last exchange alone" if truncation == TURNS else "")
        + "; raise it, or choose another dataset.truncation: "
        + ", ".join(policy for policy in TRUNCATIONS if policy != truncation)
    )


def without_oldest_exchange(conversation: Conversation) -> Conversation | None:
    """Without its first question and what follows up to the second; None where there is no second."""
    messages = conversation.messages
    questions = [place for place, message in enumerate(messages) if message.role == USER]
    if len(questions) < 2:
        return None
    kept = [message for message in messages[:1] if message.role == SYSTEM]
    return Conversation([*kept, *messages[questions[1] :]], conversation.tools)


def _with_labels(encoded: Encoded, why: str) -> Encoded:
    # The first token is no label of anything.
    if not encoded.trained[1:].any():
        raise BadRow(why)
    return encoded
