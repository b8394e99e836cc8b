"""Finds, while text streams in, where a non-empty `\\boxed{...}` closes. Pure.

Incremental: each piece is looked at once, whatever the box is split over. Braces nest; escaped ones (`\\{`) are text.
"""

from enum import Enum, auto

OPENING = "\\boxed{"


class _State(Enum):
    OUTSIDE = auto()
    INSIDE = auto()


class BoxScanner:
    """Feed it the attempt's text piece by piece; it says when the first non-empty box has closed."""

    def __init__(self) -> None:
        self._state = _State.OUTSIDE
        self._matched = 0  # characters of OPENING seen so far
        self._depth = 0
        self._escaped = False
        self._has_content = False

    def feed(self, piece: str) -> bool:
        """Take the next piece of text; True as soon as it closes a non-empty box (what follows is not looked at)."""
        if self._state is _State.OUTSIDE and not self._matched and "\\" not in piece:
            return False  # the common piece: no box can begin in it
        return any(self._take(character) for character in piece)

    def _take(self, character: str) -> bool:
        if self._state is _State.OUTSIDE:
            self._match(character)
            return False
        if self._escaped:
            self._escaped, self._has_content = False, True
        elif character == "\\":
            self._escaped = True
        elif character == "{":
            self._depth += 1
        elif character == "}":
            self._depth -= 1
            if self._depth == 0:
                self._state, self._matched = _State.OUTSIDE, 0
                return self._has_content
        elif not character.isspace():
            self._has_content = True
        return False

    def _match(self, character: str) -> None:
        if character == OPENING[self._matched]:
            self._matched += 1
        else:
            self._matched = 1 if character == OPENING[0] else 0
        if self._matched == len(OPENING):
            self._state, self._depth, self._escaped, self._has_content = _State.INSIDE, 1, False, False
