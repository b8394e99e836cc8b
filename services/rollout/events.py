"""What happens in a dialogue, told while it happens, for people who watch it. Training listens to nothing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from services.contracts.wire import Attempt


@dataclass(frozen=True, slots=True)
class Prompted:
    """The dialogue begins."""

    token_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class Said:
    """The model goes on with its attempt. Whole characters only, however they were split over tokens."""

    text: str


@dataclass(frozen=True, slots=True)
class Judged:
    """An attempt has ended and has its verdict."""

    attempt: Attempt
    text: str  # all of the attempt


@dataclass(frozen=True, slots=True)
class FedBack:
    """What the model is told before its next attempt."""

    token_ids: Sequence[int]


Event = Prompted | Said | Judged | FedBack
Listener = Callable[[Event], None]  # returns at once


def nobody(event: Event) -> None:
    """The listener of a dialogue that nobody watches."""
