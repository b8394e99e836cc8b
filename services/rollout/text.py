"""Token ids -> text, one token at a time, correct for characters that are split over tokens.

Only for looking at what was sampled (the box, the grader, people): text never becomes ids again.
"""

from collections.abc import Sequence
from typing import Any

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer decodes half a character to
MAX_PENDING = 4  # tokens: a UTF-8 character has at most four bytes


class TokenText:
    """Decodes with a memory: most tokens are whole characters and always decode alike."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._pieces: dict[int, str] = {}

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a run of tokens, special tokens left out."""
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def piece(self, token_id: int) -> str:
        """The text of a token on its own; holds REPLACEMENT when it is part of a character."""
        if token_id not in self._pieces:
            self._pieces[token_id] = self.decode([token_id])
        return self._pieces[token_id]


class PieceDecoder:
    """The pieces of one attempt, in order; a split character comes out with its last token."""

    def __init__(self, text: TokenText) -> None:
        self._text = text
        self._pending: list[int] = []
        self._given = 0  # characters of the pending tokens' text that came out already

    def feed(self, token_id: int) -> str:
        """Take the next token; returns the text that is complete now, often that token's, sometimes nothing."""
        if not self._pending and REPLACEMENT not in (piece := self._text.piece(token_id)):
            return piece
        self._pending.append(token_id)
        text, given = self._text.decode(self._pending), self._given
        if text.endswith(REPLACEMENT) and len(self._pending) < MAX_PENDING:
            whole = text.rstrip(REPLACEMENT)  # a token may end one character and begin another
            self._given = max(given, len(whole))
            return whole[given:]
        self._pending.clear()
        self._given = 0
        return text[given:]
