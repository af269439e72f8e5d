"""Errors of the Hugging Face Hub's client as one-line errors of this package, for what is fetched.

Knows what the network and the Hub may answer to a download. Does not know what is fetched; `hub`
knows the answers to an upload.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from doge_onnx.errors import DogeOnnxError


@contextmanager
def fetching(model: str, revision: str | None, error_type: type[DogeOnnxError]) -> Iterator[None]:
    """A context in which files are fetched, and whose errors are of the type `error_type`.

    Args:
        model: Id of the repository.
        revision: As the user named it.
        error_type: Raised for whatever the network or the Hub refuses.
    """
    if revision == "":
        raise error_type(f"the revision of {model} is empty: name a branch, tag or commit, or none")
    at = f" at revision {revision}" if revision else ""
    try:
        yield
    except DogeOnnxError:
        raise
    except GatedRepoError:
        raise error_type(
            f"{model} is gated: accept its terms on the Hub, then log in with `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise error_type(
            f"{model} is neither a directory here nor a model on the Hub (a private one needs "
            "`hf auth login`)"
        ) from None
    except RevisionNotFoundError:
        raise error_type(f"{model} has no revision {revision} on the Hub") from None
    except LocalEntryNotFoundError as error:
        # The Hub's client falls back to its cache after every kind of refusal.
        if isinstance(error.__cause__, HfHubHTTPError):
            raise error_type(_refusal(model + at, error.__cause__)) from None
        if constants.is_offline_mode():
            why = "offline mode (HF_HUB_OFFLINE) is on"
        else:
            why = f"the Hub at {constants.ENDPOINT} cannot be reached"
        raise error_type(
            f"{model}{at} is neither a directory here nor in the Hub's cache, and {why}; check the "
            "connection or name a directory"
        ) from None
    except HFValidationError as error:
        raise error_type(f"{model} cannot be the id of a model: {error}") from None
    except HfHubHTTPError as error:
        raise error_type(_refusal(model + at, error)) from None
    # The Hub's client passes on the errors of its HTTP library, which are not OSErrors.
    except Exception as error:
        raise error_type(
            f"cannot fetch {model}{at} from the Hub: {type(error).__name__}: {error}"
        ) from None


def _refusal(what: str, error: HfHubHTTPError) -> str:
    reason = str(error).strip().splitlines()[0]
    return f"the Hub at {constants.ENDPOINT} refused {what}: {reason}"
