"""Reads an attempt while it is sampled: its text so far, and which token is its last."""

import time

from services.rollout.box import BoxScanner
from services.rollout.events import Listener, Said, nobody
from services.rollout.text import PieceDecoder, TokenText


class AttemptReader:
    """Of one attempt. It ends with the token that closes a non-empty box, or the model's end of turn."""

    def __init__(self, text: TokenText, *, stop_ids: frozenset[int], stop_at_box: bool, listen: Listener) -> None:
        self._text, self._stop_ids, self._stop_at_box, self._listen = text, stop_ids, stop_at_box, listen
        self._scanner, self._decoder = BoxScanner(), PieceDecoder(text)
        self._said = ""
        self.first_token_at: float | None = None
        """On the monotonic clock."""
        self.closed_turn = False
        """The last token is the model's end of turn."""
        self.closed_box = False
        """The last token closed a box, and that ends an attempt."""

    def take(self, token_id: int) -> bool:
        """Take the next token; True: it is the last."""
        if self.first_token_at is None:
            self.first_token_at = time.monotonic()
        if token_id in self._stop_ids:
            self.closed_turn = True
            return True
        piece = self._decoder.feed(token_id)
        self.closed_box = self._scanner.feed(piece) and self._stop_at_box
        if piece and self._listen is not nobody:
            self._said += piece
            self._listen(Said(piece))
        return self.closed_box

    def finish(self, token_ids: list[int]) -> str:
        """The text of the whole attempt; tells what has not been told because it ended inside a character."""
        text = self._text.decode(token_ids)
        if self._listen is not nobody and text.startswith(self._said) and text != self._said:
            self._listen(Said(text[len(self._said) :]))
        return text
