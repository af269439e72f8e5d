"""Bundles of the Hugging Face Hub: fetched into the Hub's own cache, and checked there.

Knows which files of a repository belong to a bundle, and what to do about one that is missing or
damaged. Does not know how a repository is named on the command line (`api`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from doge_onnx.bundle import MANIFEST_NAME, Bundle, check_file, check_name, read_manifest
from doge_onnx.errors import BundleError, HubError
from doge_onnx.hub_errors import fetching


def fetch(repo: str, revision: str | None = None, *, weights: bool = True) -> Bundle:
    """Fetch a bundle, unless it is in the cache, and check its files against their checksums.

    Only the files that its manifest lists are fetched, all of one commit. A file of the cache that
    is damaged is fetched again. Where the Hub cannot be reached, the cache is enough.

    Args:
        repo: Id of the repository, such as "user/model".
        revision: Branch, tag or commit; None for the main branch.
        weights: Whether to fetch the graph and its weights; without them, it cannot be run.

    Raises:
        HubError: There is no such repository or revision, it is no bundle, a file of it is missing
            or damaged on the Hub, or the Hub cannot be reached or refuses.
        BundleError: The manifest is not valid, or of another format version.
    """
    with fetching(repo, revision, HubError):
        origin = _find_manifest(repo, revision)
        # The cache has a directory for each commit.
        directory, commit = origin.parent, origin.parent.name
        manifest = read_manifest(directory)
        for name in manifest.files:
            check_name(origin, name)
        for name, entry in manifest.files.items():
            # What is beside a graph begins with its name.
            if weights or not name.startswith(manifest.graph):
                _fetch_file(repo, commit, directory, name, entry)
    return Bundle(directory, manifest, repo, commit)


def holds_bundle(repo: str, revision: str | None = None) -> bool:
    """Whether a repository is a bundle; also False if the Hub does not say."""
    try:
        with fetching(repo, revision, HubError):
            _find_manifest(repo, revision)
    # Whoever then takes it for a checkpoint finds out what is wrong, and says so.
    except HubError:
        return False
    return True


def _find_manifest(repo: str, revision: str | None) -> Path:
    """Where a bundle's manifest is in the cache, which gets it if need be."""
    try:
        # Asked for one file, the Hub's client would try for half a minute until it gives up.
        HfApi(library_name="doge-onnx").model_info(repo, revision=revision)
    except (RevisionNotFoundError, HFValidationError):
        raise
    # The Hub refuses, is not to be asked or gives no answer: there are exceptions of all kinds.
    except Exception as error:
        try:
            path = hf_hub_download(repo, MANIFEST_NAME, revision=revision, local_files_only=True)
        except LocalEntryNotFoundError as not_cached:
            if isinstance(error, RepositoryNotFoundError):
                raise error from None
            raise not_cached from error
        return Path(path)
    missing = (
        f"{repo} on the Hub is no bundle: it has no {MANIFEST_NAME}; if it is a checkpoint, make a "
        f"bundle of it with `doge-onnx export {repo} bundle`"
    )
    return _download(repo, revision, MANIFEST_NAME, missing)


def _fetch_file(repo: str, commit: str, directory: Path, name: str, entry: Any) -> None:
    """Fetch one file and check it; a damaged one once more."""
    missing = (
        f"{repo} on the Hub, commit {commit}, lacks {name}, which its {MANIFEST_NAME} lists; "
        "whoever made it should push it again"
    )
    _download(repo, commit, name, missing)
    try:
        check_file(directory, name, entry)
        return
    except BundleError:
        if constants.is_offline_mode():
            raise HubError(
                f"{directory / name}, in the Hub's cache, is damaged, and offline mode "
                "(HF_HUB_OFFLINE) is on; fetch it again without"
            ) from None
    _download(repo, commit, name, missing, again=True)
    try:
        check_file(directory, name, entry)
    except BundleError:
        raise HubError(
            f"{name} of {repo} on the Hub, commit {commit}, is not the file that its "
            f"{MANIFEST_NAME} describes; whoever made it should push it again"
        ) from None


def _download(
    repo: str, revision: str | None, name: str, missing: str, again: bool = False
) -> Path:
    """Where a file is in the cache, which gets it if need be.

    Args:
        repo: See `fetch`.
        revision: See `fetch`.
        name: Of the file.
        missing: The message if the Hub has no such file.
        again: Whether to fetch it even if it is there.
    """
    try:
        return Path(hf_hub_download(repo, name, revision=revision, force_download=again))
    # It is not in the cache, and the Hub was not asked or gave no answer.
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError:
        raise HubError(missing) from None
