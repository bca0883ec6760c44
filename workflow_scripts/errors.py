"""Errors meant for people: they name the file or class and what to do, and are shown without a stack trace."""


class StillhouseError(Exception):
    """Base of every error whose message is all that a user needs to see."""


class ConfigError(StillhouseError):
    """The configuration has an unknown key, a wrong type or an impossible value."""


class DataError(StillhouseError):
    """The images of a run are missing, unreadable or too few."""


class BackboneError(StillhouseError):
    """A backbone directory is missing, incomplete or does not fit the run."""


class StoreError(StillhouseError):
    """A result could not be written, or is damaged."""
