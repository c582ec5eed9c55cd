"""Errors that a user can act on. Everything else that is raised is a bug."""

from __future__ import annotations


class ReconError(Exception):
    """A user's mistake or a fault of the input: what was found, the rule it breaks, and the remedy.

    The command line prints the message without a traceback and exits with 1.
    """

    def __init__(self, problem: str, remedy: str = "") -> None:
        self.problem = problem
        self.remedy = remedy
        super().__init__(f"{problem}\n  remedy: {remedy}" if remedy else problem)

    def __reduce__(self) -> tuple[type[ReconError], tuple[str, str]]:
        return type(self), (self.problem, self.remedy)  # joblib workers pickle what they raise


class Refused(ReconError):
    """A combination of options that cannot run, found before any work. In a sweep it is a row, not a failure."""


class Unwritable(ReconError):
    """A file that cannot be written: the disk is full or read-only, or the folder is not ours."""


class Damaged(ReconError):
    """A stored file that does not match its manifest. It is named and rebuilt, never used."""
