"""The one error tree of Esper.

    EsperError
    ├── UserError                 what a person can mend; the command line prints one line and exits 2
    │   ├── ConfigError           a key, type or value of the configuration
    │   ├── BlueprintError        a malformed IR, or a blueprint that does not fit a site
    │   ├── SiteError             a site that does not exist or cannot carry a seed
    │   ├── DataError             a data set that is missing or not in the expected schema
    │   └── StorageError          a storage address that cannot be read or written
    ├── TransientError            try again
    │   ├── UnavailableError      a system did not answer within its deadline
    │   └── LeaseLostError        the work was handed to another worker
    ├── PermanentError            trying again gives the same answer
    │   ├── IllegalTransitionError
    │   ├── NotFoundError
    │   ├── ConflictError         a state change that the stored state does not allow
    │   └── KernelRejectedError   a kernel that failed a check before it was used
    └── SafetyError               stop; continuing would harm
        ├── TamperedError         a hash or signature that does not match
        ├── NonFiniteError        a value that is NaN or infinite
        ├── KernelFaultError      a kernel that fails in use, after it passed every check
        └── FencedError           another writer has taken over

Every error pickles, so that it crosses actor boundaries unchanged.
"""

from __future__ import annotations

from typing import Any


class EsperError(Exception):
    """Root of the tree.

    Args:
        message: what went wrong, one line.
        field: the configuration key, node or argument at fault, where there is one.
        remedy: what a person can do about it, where something can be done.
    """

    def __init__(self, message: str, *, field: str | None = None, remedy: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.remedy = remedy

    def __str__(self) -> str:
        where = f"{self.field}: " if self.field else ""
        what_next = f" ({self.remedy})" if self.remedy else ""
        return f"{where}{self.message}{what_next}"

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.field, self.remedy)


def excerpt(value: object, limit: int = 60) -> str:
    """What a stranger sent, for an error's words: quoted, and never longer than `limit` characters."""
    words = repr(value)
    return words if len(words) <= limit else f"{words[: limit - 3]}..."


def _rebuild(cls: type[EsperError], message: str, field: str | None, remedy: str | None) -> EsperError:
    return cls(message, field=field, remedy=remedy)


class UserError(EsperError):
    """Something a person can mend: printed as one line, exit code 2."""


class ConfigError(UserError):
    """A key, type or value of the configuration is wrong."""


class BlueprintError(UserError):
    """A blueprint is malformed or does not fit the site."""


class SiteError(UserError):
    """A site does not exist or cannot carry a seed."""


class DataError(UserError):
    """A data set is missing or not in the expected schema."""


class StorageError(UserError):
    """A storage address cannot be read or written."""


class TransientError(EsperError):
    """The same request may succeed later."""


class UnavailableError(TransientError):
    """A system did not answer within its deadline."""


class LeaseLostError(TransientError):
    """The lease ran out and the work belongs to another worker."""


class PermanentError(EsperError):
    """The same request will fail again."""


class IllegalTransitionError(PermanentError):
    """A state machine was asked for a step its table does not hold."""


class NotFoundError(PermanentError):
    """No such blueprint, kernel, seed or run."""


class ConflictError(PermanentError):
    """The stored state does not allow this change."""


class KernelRejectedError(PermanentError):
    """A kernel failed a check before it was used."""


class SafetyError(EsperError):
    """Continuing would harm the run or its records."""


class TamperedError(SafetyError):
    """A content hash or signature does not match."""


class NonFiniteError(SafetyError):
    """A value is NaN or infinite."""


class KernelFaultError(SafetyError):
    """A kernel fails in use: it raises, or puts out what does not fit. `field` names its seed."""


class FencedError(SafetyError):
    """Another writer has taken over; this one must stop."""
