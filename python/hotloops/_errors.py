"""The exceptions and warnings that are hotloops' own."""


class BackendUnavailableError(RuntimeError):
    """A backend was asked for that cannot run here; the text says why."""


class PerformanceWarning(UserWarning):
    """The call is right but slower than it could be; the text says how to mend it."""
