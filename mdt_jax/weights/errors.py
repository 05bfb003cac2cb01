"""Errors of weights that a user can mend."""


class WeightsError(ValueError):
    """A file of weights cannot be fetched, read, understood or written; one line says why."""


class NoSuchFile(WeightsError):
    """A repository of the hub, which was asked, has no such file."""
