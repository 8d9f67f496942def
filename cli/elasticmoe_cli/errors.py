"""What ends a command with one line."""

from __future__ import annotations


class CommandFailed(Exception):
    """One line that says what to do. status: exit status, 2 for what the user has to change."""

    def __init__(self, line: str, status: int = 1) -> None:
        super().__init__(line)
        self.status = status
