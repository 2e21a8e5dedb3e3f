"""Errors that a user can act on. Everything else that is raised is a bug.

The command line prints the message of a `CDASError` on one line and exits with its `exit_code`; `--debug` shows the
trace.
"""


class CDASError(Exception):
    """Base of every error with a remedy: what was expected, what was got, what to do."""

    exit_code = 1


class InvalidInputError(CDASError, ValueError):
    """An argument, a file or a table is not what it has to be."""

    exit_code = 2


class MissingDependencyError(CDASError, ImportError):
    """An optional package is absent; the message names the extra that brings it."""

    exit_code = 3


class UnsupportedError(CDASError, NotImplementedError):
    """Something that the library does not do; the message says what it does instead."""

    exit_code = 4


class IncompatibleModelError(InvalidInputError):
    """A steering vector, a checkpoint or a cache belongs to another model."""


class NonFiniteError(CDASError, ArithmeticError):
    """A NaN or an infinity turned up in activations, losses or gradients."""

    exit_code = 5


class StorageError(CDASError, OSError):
    """A file cannot be written or is not what it was written as."""

    exit_code = 6


class DoesNotFitError(CDASError, MemoryError):
    """A plan needs more memory than there is; the message says by how much, and what would do."""

    exit_code = 7


class ProcessGroupError(CDASError, RuntimeError):
    """Of several processes one has ended, does not answer, or is at something else; the message says which and when."""

    exit_code = 8


def expected_got(what: str, expected: object, got: object, remedy: str = "") -> str:
    """One line that names `what`, the expectation, the finding and the remedy.

    >>> expected_got("layer", "0 to 29", 30, "Choose another layer.")
    'layer: expected 0 to 29, got 30. Choose another layer.'
    """
    line = f"{what}: expected {expected}, got {got}"
    return f"{line}. {remedy}" if remedy else line
