"""The errors of data that are not there (yet); data that are there, but damaged, are others."""


class MissingData(FileNotFoundError):
    """There are no data where the settings say."""


class NoDataPath(MissingData, ValueError):
    """The settings do not say where the data are."""
