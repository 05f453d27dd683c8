"""Secrets: no configuration and no command line holds one, for both are written down beside every run. Torch-free."""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

_SECRET = re.compile(
    r"(^|_)(api_?key|access_?key|secret|secret_?key|token|password|passwd|credentials?)(_id)?$", re.IGNORECASE
)
# Fields that only sound like it.
_HARMLESS = frozenset({"eod_token", "pad_token", "bos_token", "eos_token", "unk_token", "mask_token"})
_SHORTEST = 8  # characters of a secret that is looked for by its value: shorter ones are found everywhere


def is_secret_name(name: str) -> bool:
    """Whether a field or an environment variable of this name holds a secret: `api_key`, `HF_TOKEN`, ..."""
    return name.lower() not in _HARMLESS and _SECRET.search(name) is not None


def secrets_of(environment: Mapping[str, str] = os.environ) -> frozenset[str]:
    """The values of environment variables that hold secrets."""
    return frozenset(value for name, value in environment.items() if is_secret_name(name) and len(value) >= _SHORTEST)


def secret_problems(values: Iterator[tuple[str, Any]]) -> Iterator[str]:
    """What among `(dotted key, plain value)` is a secret; the message does not repeat it."""
    known = secrets_of()
    for key, value in values:
        for path, text in _texts(key, value):
            why = _why(path.rsplit(".", 1)[-1], text, known)
            if why is not None:
                yield (
                    f"{path} {why}, and the configuration is written down beside every checkpoint; leave it out and "
                    "put the secret into an environment variable that its user reads"
                )


def _why(name: str, text: str, known: frozenset[str]) -> str | None:
    if text and is_secret_name(name):
        return "is a secret by its name"
    if any(secret in text for secret in known):
        return "holds the value of a secret of the environment"
    if "://" in text and urlsplit(text).password:
        return "is an address with a password in it"
    return None


def _texts(key: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, held in value.items():
            yield from _texts(f"{key}.{name}", held)
    elif isinstance(value, list | tuple):
        for held in value:
            yield from _texts(key, held)
