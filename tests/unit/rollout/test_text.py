"""Tokens come out as text as soon as their characters are whole."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.learner.arithmetic_model import build_tokenizer
from services.rollout.text import PieceDecoder, TokenText


class MergedBytes:
    """A tokenizer whose tokens are any runs of bytes, also such that end one character and begin another."""

    def __init__(self, *tokens: bytes) -> None:
        self.tokens = tokens

    def decode(self, token_ids, **_):
        return b"".join(self.tokens[i] for i in token_ids).decode(errors="replace")


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@given(st.text(max_size=20))
@settings(max_examples=100, deadline=None)
def test_pieces_join_to_the_whole_text(tokenizer, text):
    decoder = PieceDecoder(TokenText(tokenizer))
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert "".join(decoder.feed(i) for i in ids) == TokenText(tokenizer).decode(ids)


def test_a_split_character_comes_out_with_its_last_byte(tokenizer):
    decoder = PieceDecoder(TokenText(tokenizer))
    ids = tokenizer.encode("的", add_special_tokens=False)
    assert len(ids) == 3  # the demo's tokenizer has one token a byte
    assert [decoder.feed(i) for i in ids] == ["", "", "的"]


def test_a_brace_is_not_held_back_by_half_a_character_behind_it():
    decoder = PieceDecoder(TokenText(MergedBytes(b"}\xef", b"\xbc", b"\x8c.")))
    assert [decoder.feed(i) for i in (0, 1, 2)] == ["}", "", "，."]  # noqa: RUF001


def test_a_broken_character_does_not_hold_back_what_follows():
    decoder = PieceDecoder(TokenText(MergedBytes(b"\xe7", b"}")))
    assert "".join(decoder.feed(i) for i in (0, 0, 0, 1)).endswith("}")
    assert "}" in "".join(decoder.feed(i) for i in (0, 1))


def test_special_tokens_have_no_text(tokenizer):
    assert TokenText(tokenizer).piece(tokenizer.eos_token_id) == ""
