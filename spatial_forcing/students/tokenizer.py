"""A tokenizer that needs no download: every word is hashed to an id.

Ids are the same on every machine and in every process. Two words share an id with probability
1 / (vocab - 1); nothing is learned or stored, so unknown words do not exist.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from spatial_forcing.errors import DataError

PAD = 0
_WORD = re.compile(r"[^\W_]+")


@lru_cache(maxsize=65536)
def word_id(word: str, vocab: int) -> int:
    """The id of a word, in [1, vocab); 0 is padding."""
    digest = hashlib.blake2b(word.encode(), digest_size=8).digest()
    return 1 + int.from_bytes(digest, "little") % (vocab - 1)


@lru_cache(maxsize=4096)
def encode(text: str, vocab: int) -> tuple[int, ...]:
    """Ids of the words of `text`; letter case and punctuation do not count."""
    return tuple(word_id(word, vocab) for word in _WORD.findall(text.casefold()))


def tokenize(texts: Sequence[str], vocab: int, length: int) -> Tensor:
    """Word ids, (B, length) long, padded on the right with `PAD`.

    Raises:
        DataError: `texts` holds something else than strings, or a text has more than `length` words.
    """
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise DataError(f"task is {texts!r}; expected a list of strings, one for each sample.")
    ids = torch.full((len(texts), length), PAD, dtype=torch.long)
    for row, text in enumerate(texts):
        words = encode(text, vocab)
        if len(words) > length:
            raise DataError(
                f"the instruction {text!r} has {len(words)} words and the student takes {length}; "
                "shorten it, or train with a larger max_text."
            )
        ids[row, : len(words)] = torch.tensor(words, dtype=torch.long)
    return ids
