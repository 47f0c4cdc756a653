"""Everything GIFt raises or warns about on purpose.

Each error is a `GiftError` and also the builtin error one would expect, so that ``except ValueError`` keeps working. A message
names the subject, its value, what is allowed and what to do next. Nothing here imports torch.
"""

from __future__ import annotations


class GiftError(Exception):
    """The family of every error that GIFt raises on purpose."""


class GiftWarning(UserWarning):
    """Something that works but is probably not what was meant."""


def printable(text: object) -> str:
    """A stranger's text for a message: what a terminal would obey, or could not show, is escaped as in Python."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in str(text))


class ModelError(GiftError, TypeError):
    """The model given is none, or one that cannot be adapted (scripted, lazy, on meta, of another type)."""


class PathError(GiftError, TypeError):
    """A path given is neither text nor a path."""


class StrategyError(GiftError, ValueError):
    """A strategy, cap, check or action is malformed, or has no form as plain data."""


class ParameterError(StrategyError):
    """A parameter of a strategy or method has a value that is not allowed."""


class PatternError(StrategyError):
    """A selection pattern cannot be read."""


class StrategyFileError(StrategyError):
    """A strategy file cannot be read, or says something that is not allowed; the message has the line."""


class StrategyFileNotFoundError(StrategyFileError, FileNotFoundError):
    """There is no strategy file at the path."""


class CheckError(GiftError, RuntimeError):
    """A check raised, or returned something that is neither true nor false."""


class ActionError(GiftError, RuntimeError):
    """An action raised while it was applied; the model was put back."""


class SiteError(GiftError, ValueError):
    """A place in the model cannot be adapted in the way asked for."""


class NoMatchError(GiftError, LookupError):
    """Nothing in the model matched, or something the user named matched nothing."""


class StateError(GiftError, RuntimeError):
    """The model is not in the state that the call needs (tuned, plain, merged)."""


class StateDictError(GiftError, RuntimeError):
    """A state dict does not fit the tuned model; nothing of the tuned part was loaded."""


class AdapterFileError(GiftError, ValueError):
    """An adapter file cannot be read: no adapter, truncated, corrupted or of an unknown format."""


class AdapterNotFoundError(AdapterFileError, FileNotFoundError):
    """There is no file at the path."""


class AdapterMismatchError(AdapterFileError):
    """A sound adapter file does not belong to this model; the message lists every difference."""


class AdapterFormatError(AdapterFileError):
    """An adapter cannot be written in another file format, or read from one, without changing what it computes; lists every reason."""


class AdapterNameError(GiftError, LookupError):
    """A set of adapters has none of that name, or cannot take one of that name."""


class AdapterWriteError(GiftError, OSError):
    """An adapter could not be written; what was at the path before is intact."""


class PluginError(GiftError):
    """A plugin could not be found, loaded or used.

    Args:
        message: what happened.
        name: the name asked for, as in the entry point.
        distribution: the package that provides it, if known.
        version: that package's version, if known.
        entry_point: the entry point's value, ``module:attribute``.
        hint: what to do next.
    """

    def __init__(
        self,
        message: str,
        *,
        name: str | None = None,
        distribution: str | None = None,
        version: str | None = None,
        entry_point: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(f"{message}\n{hint}" if hint else message)
        self.name = name
        self.distribution = distribution
        self.version = version
        self.entry_point = entry_point
        self.hint = hint


class UnknownStrategyError(PluginError, LookupError):
    """No installed package provides a strategy of that name."""


class UnknownDemoError(PluginError, LookupError):
    """No installed package provides a demo of that name."""


class UnknownFormatError(PluginError, LookupError):
    """No installed package converts adapters to or from a format of that name."""


class UnknownPluginError(PluginError, LookupError):
    """No check, action or plugin of that name is known."""


class PluginLoadError(PluginError, ImportError):
    """A plugin's module, or something it needs, could not be imported."""


class InvalidPluginError(PluginError, TypeError):
    """A plugin loaded, but what it provides is not what its entry point promises."""


class IncompatiblePluginError(PluginError, ImportError):
    """A plugin was written for another generation of the plugin API."""


class PluginConflictError(PluginError, LookupError):
    """Two packages provide the same name."""


class PluginBlockedError(PluginError, ImportError):
    """A plugin is installed, and a setting or an environment variable keeps it from being used."""


class PluginSettingError(PluginError, ValueError):
    """A setting or an environment variable about plugins has a value that is not allowed."""
