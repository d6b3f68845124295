import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spatial_forcing.errors import DataError
from spatial_forcing.students.tokenizer import PAD, encode, tokenize, word_id


def test_ids_are_the_same_on_every_machine():
    assert encode("Reach the red cube.", 4096) == (267, 3391, 3632, 1482)


def test_case_and_punctuation_do_not_count():
    assert encode("Push the PUCK!", 512) == encode("push, the puck", 512)
    assert encode("push the puck", 512) != encode("the puck push", 512)


@settings(max_examples=30, deadline=None)
@given(st.text(max_size=12), st.integers(2, 5000))
def test_word_ids_are_in_range_and_never_padding(word, vocab):
    assert 1 <= word_id(word, vocab) < vocab


def test_padding_is_on_the_right():
    ids = tokenize(["one two", ""], 100, 4)
    assert ids.shape == (2, 4)
    assert ids.dtype == torch.long
    assert (ids[0] != PAD).tolist() == [True, True, False, False]
    assert (ids[1] == PAD).all()


def test_too_long_and_untyped_texts_are_refused():
    with pytest.raises(DataError, match="3 words and the student takes 2"):
        tokenize(["one two three"], 100, 2)
    with pytest.raises(DataError, match="list of strings"):
        tokenize("one two", 100, 2)
    with pytest.raises(DataError, match="list of strings"):
        tokenize([3], 100, 2)
