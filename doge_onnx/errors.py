"""The errors that a user can cause or correct.

The command line turns every `DogeOnnxError` into one line and exit code 1. So each message says
what was wrong, with which file or value, and what to do. Any other exception that escapes is a bug
of this package and keeps its traceback.
"""

from __future__ import annotations


class DogeOnnxError(Exception):
    """Base class of all errors that this package raises on purpose."""


class ConfigError(DogeOnnxError):
    """A checkpoint's config.json that cannot be read, is invalid or is not supported."""


class CheckpointError(DogeOnnxError):
    """A checkpoint that cannot be found, fetched or read, or holds the wrong tensors."""


class BundleError(DogeOnnxError):
    """A bundle that cannot be written, or one that is incomplete, altered or too new."""


class DeviceError(DogeOnnxError):
    """A device that is missing, lacks a library, or cannot run a bundle."""


class NotEnoughMemoryError(DogeOnnxError, MemoryError):
    """A run that needs more memory than there is, on the host or on a device."""


class CaptureError(DeviceError):
    """A graph whose decode steps CUDA cannot capture; it may still run there without a capture."""


class InputError(DogeOnnxError):
    """A prompt, token ids or an option that is invalid or that the model cannot take."""


class ParityError(DogeOnnxError):
    """An exported graph whose results differ from the reference beyond the tolerance."""


class QualityError(DogeOnnxError):
    """A bundle that is further from its reference than it may be, or cannot be evaluated."""


class HubError(DogeOnnxError):
    """An upload, or a download of a bundle, that the Hugging Face Hub refuses or that fails."""


class MissingExtraError(DogeOnnxError):
    """A part of the package that needs an optional dependency which is not installed."""
