"""`python -m nemo_run_bridge.spelled WORD`: the command line, its words spelled as one that no shell would quote."""

import base64
import json
import sys
from collections.abc import Sequence


def spelled(words: Sequence[str]) -> str:
    """Several words as one, of letters, digits, `-`, `_` and `=`."""
    return base64.urlsafe_b64encode(json.dumps(list(words)).encode()).decode()


def read(word: str) -> list[str]:
    """The words that `spelled` was given."""
    found: list[str] = json.loads(base64.urlsafe_b64decode(word))
    return found


if __name__ == "__main__":
    from megatron.bridge.cli.root import run

    sys.exit(run(read(sys.argv[1])))
