"""The words of every error a user can cause, in one form.

`op: argument must be EXPECTED, got GOT`, on one line. The command line turns an InputError into that line and exit
code 2; from Python it is an ordinary ValueError (or TypeError). Broken invariants of our own stay `assert`s.
"""

from __future__ import annotations

import errno

EXIT_BAD_INPUT = 2
EXIT_TEMPORARY = 75  # EX_TEMPFAIL of sysexits.h

# torch says out of memory as a plain RuntimeError on a CPU, and where cuBLAS finds no room for its workspace.
_OUT_OF_MEMORY = ("DefaultCPUAllocator", "not enough memory", "CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


class InputError(ValueError):
    """Something the user gave is wrong; the message is one line that names it and says what to do."""


class TemporaryFailure(InputError):
    """Nothing that was given is wrong: the same command may go on later (a folder in use, a process that was killed).

    The command line ends with EXIT_TEMPORARY instead of 2, so that who started it can tell the two apart.
    """


class InputTypeError(InputError, TypeError):
    """The same, where the type (a dtype, a tensor instead of a module) is what is wrong."""


def must_be(op: str, argument: str, expected: object, got: object) -> InputError:
    """`op: argument must be EXPECTED, got GOT` as a ValueError."""
    return InputError(f"{op}: {argument} must be {expected}, got {got}")


def must_have_type(op: str, argument: str, expected: object, got: object) -> InputTypeError:
    """`op: argument must be EXPECTED, got GOT` as a TypeError."""
    return InputTypeError(f"{op}: {argument} must be {expected}, got {got}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out, on a GPU or a CPU; it is for the user to lower something then."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    is_torch = isinstance(error, RuntimeError)  # torch.OutOfMemoryError is one
    return isinstance(error, MemoryError) or (is_torch and any(words in str(error) for words in _OUT_OF_MEMORY))
