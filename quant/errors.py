"""Every error that bitwright raises on purpose.

    BitwrightError                 catch this one to catch them all
    ├── SettingsError              a flag, a recipe, a plan or a spec asks for what cannot be      exit code 2
    ├── ModelError                 the float model cannot be read, walked or quantized             exit code 3
    ├── CalibrationError           the text or the activations cannot calibrate                    exit code 4
    ├── SolverError                the numbers do not allow a solution (Hessian, non-finite)       exit code 5
    ├── CheckpointError            a packed checkpoint is damaged, altered or not ours             exit code 6
    ├── ResumeError                the folder belongs to another run, or one is running there      exit code 7
    └── ResourceError              disk full, out of memory                                        exit code 8

A spec built by hand that cannot exist is a `SpecError`, a ValueError of the kernels, which know nothing of this; so is
`SettingsError` a ValueError.

A message is a sentence to a tired person: where, what came, what was expected, what to do.
Ctrl-C ends with exit code 130, SIGTERM with 143; both leave a folder that `--resume` continues.
"""

from __future__ import annotations


class BitwrightError(Exception):
    exit_code = 1


class SettingsError(BitwrightError, ValueError):
    exit_code = 2


class ModelError(BitwrightError):
    exit_code = 3


class CalibrationError(BitwrightError):
    exit_code = 4


class SolverError(BitwrightError):
    exit_code = 5


class CheckpointError(BitwrightError):
    exit_code = 6


class ResumeError(BitwrightError):
    exit_code = 7


class ResourceError(BitwrightError):
    exit_code = 8


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out: Python, CUDA, torch on a CPU and the C library say it differently."""
    said = ("out of memory", "not enough memory", "allocate memory", "os error 12")
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in said)
