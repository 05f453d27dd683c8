"""The identity of a vocabulary: which string is which id."""

import hashlib
from collections.abc import Mapping


def vocabulary_fingerprint(vocabulary: Mapping[str, int]) -> str:
    """First 16 hex digits of SHA-256 over `(id, token)` in order of id.

    Data tokenized with one vocabulary mean nothing under another; the digest tells the two apart whatever the folder
    is called. Tokens may hold bytes that are no valid text, hence `surrogatepass`.
    """
    digest = hashlib.sha256()
    for token, index in sorted(vocabulary.items(), key=lambda item: (item[1], item[0])):
        digest.update(f"{index}\t{token}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]
