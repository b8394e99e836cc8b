"""Finds, while text streams in, where a non-empty `\\boxed{...}` closes. Pure.

Incremental: each character is looked at once, whatever the box is split over. Braces nest, so do boxes; escaped braces
(`\\{`) are text. A box closes here exactly where the grader would first find an answer: a box left open earlier hides
no later one, and what holds only space, braces, `$` and `~` is empty. What the answer is, is the grader's business.
"""

from enum import Enum, auto

NAMES = ("boxed", "fbox")
MAX_GAP = 8  # characters of space between the name and its brace
BLANK = "${}~"  # besides space: what does not fill a box
BLANK_ESCAPES = ",;:! "  # `\\,` and its like are space


class _State(Enum):
    TEXT = auto()
    COMMAND = auto()  # after a backslash: inside what may become a name
    GAP = auto()  # after a name: its brace may follow


class BoxScanner:
    """Feed it the attempt's text piece by piece; it says when the first non-empty box has closed."""

    def __init__(self) -> None:
        self._state = _State.TEXT
        self._name = ""
        self._gap = 0
        # Open braces, from the first open box on: is it a box, is it filled.
        self._open: list[list[bool]] = []

    def feed(self, piece: str) -> bool:
        """Take the next piece of text; True as soon as it closes a non-empty box (what follows is not looked at)."""
        if not self._open and self._state is _State.TEXT and "\\" not in piece:
            return False  # the common piece: no box can begin in it
        return any(self._take(character) for character in piece)

    def _take(self, character: str) -> bool:
        if self._state is _State.COMMAND:
            if self._goes_on_with_command(character):
                return False
        elif self._state is _State.GAP and self._goes_on_with_gap(character):
            return False
        return self._take_text(character)

    def _goes_on_with_command(self, character: str) -> bool:
        """Whether the character belongs to the command; if not, it is text after it."""
        name = self._name + character
        if any(known.startswith(name) for known in NAMES):
            self._name = name
            if name in NAMES:
                self._state, self._gap = _State.GAP, 0
            return True
        is_escape = not self._name  # a backslash takes one character with it, whichever
        self._leave_command(is_filling=not (is_escape and character in BLANK_ESCAPES))
        return is_escape

    def _goes_on_with_gap(self, character: str) -> bool:
        if character == "{":
            self._open.append([True, False])
        elif character.isspace() and self._gap < MAX_GAP:
            self._gap += 1
            return True
        elif self._gap == 0 and character.isascii() and character.isalpha():
            self._leave_command(is_filling=True)  # a longer name: boxedx
            return True
        self._state, self._name = _State.TEXT, ""
        return character == "{"

    def _leave_command(self, *, is_filling: bool) -> None:
        self._state, self._name = _State.TEXT, ""
        if is_filling and self._open:
            self._open[-1][1] = True

    def _take_text(self, character: str) -> bool:
        if character == "\\":
            self._state = _State.COMMAND
        elif not self._open:
            return False
        elif character == "{":
            self._open.append([False, False])
        elif character == "}":
            is_box, is_filled = self._open.pop()
            if self._open:
                self._open[-1][1] |= is_filled
            return is_box and is_filled
        elif character not in BLANK and not character.isspace():
            self._open[-1][1] = True
        return False
