"""What can go wrong that a user can do something about.

The command line turns every `DogeOnnxError` into one line and exit code 1, so each
message says what was wrong, with which file or value, and what to do. Anything else
that escapes is a bug of this package and keeps its traceback.
"""

from __future__ import annotations


class DogeOnnxError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(DogeOnnxError):
    """A checkpoint's config.json that is unreadable, senseless or not supported."""


class CheckpointError(DogeOnnxError):
    """A checkpoint that cannot be found, fetched or read, or holds the wrong tensors."""


class BundleError(DogeOnnxError):
    """A bundle that cannot be written, or one that is incomplete, altered or too new."""


class DeviceError(DogeOnnxError):
    """A device that is not there, lacks a library, or cannot run a bundle."""


class CaptureError(DeviceError):
    """A graph with which CUDA cannot replay steps; it may run there without."""


class InputError(DogeOnnxError):
    """A prompt, token ids or a sampling option that the model cannot take."""


class ParityError(DogeOnnxError):
    """An exported graph whose results differ from the reference beyond the tolerance."""


class QualityError(DogeOnnxError):
    """A bundle that is further from its reference than it may be, or cannot be evaluated."""


class HubError(DogeOnnxError):
    """An upload that the Hugging Face Hub refuses, or that does not reach it."""


class MissingExtraError(DogeOnnxError):
    """A part of the package that needs an optional dependency which is not installed."""
