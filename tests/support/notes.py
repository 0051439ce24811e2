"""What a command says to its user beside its results."""

from __future__ import annotations

from ghoststore.progress import Silent


class Notes(Silent):
    """What the user was told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, message: str) -> None:
        self.said.append(message)
