"""The words of every error a user can cause, in one form.

`op: argument must be EXPECTED, got GOT`, on one line. The command line turns an InputError into that line and exit
code 2; from Python it is an ordinary ValueError (or TypeError). Broken invariants of our own stay `assert`s.
"""

from __future__ import annotations


class InputError(ValueError):
    """Something the user gave is wrong; the message is one line that names it and says what to do."""


class InputTypeError(InputError, TypeError):
    """The same, where the type (a dtype, a tensor instead of a module) is what is wrong."""


def must_be(op: str, argument: str, expected: object, got: object) -> InputError:
    """`op: argument must be EXPECTED, got GOT` as a ValueError."""
    return InputError(f"{op}: {argument} must be {expected}, got {got}")


def must_have_type(op: str, argument: str, expected: object, got: object) -> InputTypeError:
    """`op: argument must be EXPECTED, got GOT` as a TypeError."""
    return InputTypeError(f"{op}: {argument} must be {expected}, got {got}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch or Python ran out of memory, on a GPU or a CPU (whose allocator raises a plain RuntimeError)."""
    words = ("out of memory", "not enough memory", "can't allocate memory")
    is_said = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    return isinstance(error, MemoryError) or is_said
