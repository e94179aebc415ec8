"""Every exception of Tandem's own."""

from __future__ import annotations


class CarrierError(ValueError):
    """The arrays of a carrier do not fit together."""


class ConfigError(ValueError):
    """Bad input by the user: shown on one screen, exit code 2, no traceback."""


class MethodError(ConfigError):
    """A method (usually the user's own) that hands over what cannot be trained on, or an
    objective that returns no loss per token: one screen, exit code 2, no traceback."""


class NotFinite(RuntimeError):
    """Too many steps in a row had a non-finite gradient."""


class RolloutsExhausted(RuntimeError):
    """A step could not be filled: the method filtered, or rewards failed on, too many groups."""


class CheckpointError(RuntimeError):
    """A checkpoint is incomplete, damaged, or of another format."""


class EngineDied(RuntimeError):
    """An engine cannot serve any more; its requests must be re-issued elsewhere."""


class SyncError(RuntimeError):
    """Weights did not arrive as sent, or log-probs of rollout engine and learner disagree.

    The run stops: nothing after it could be trusted.
    """


class RolloutPoolExhausted(RuntimeError):
    """Engines died more often than rollout.max_restarts allows."""
