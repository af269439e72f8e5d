"""`push`: upload a bundle to the Hugging Face Hub.

Knows which files of a directory belong to the bundle, and what the Hub's answers mean to a user.
huggingface_hub transfers the files; beside it, this module needs only the standard library.
`hub_bundles` fetches bundles, and `export.checkpoint` checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined] # public all the same

from doge_onnx.bundle import MANIFEST_NAME, Bundle, Manifest
from doge_onnx.errors import DogeOnnxError, HubError


@dataclass(frozen=True)
class PushReport:
    """What was uploaded, or what would be.

    Attributes:
        repo: Id of the repository, with its owner where that is known.
        revision: The branch.
        message: The message of the commit.
        files: Bytes of each file, by its path in the repository.
        url: Page of the result, or None for a dry run.
        commit: The commit that holds the files, or None for a dry run.
    """

    repo: str
    revision: str
    message: str
    files: dict[str, int]
    url: str | None
    commit: str | None

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())


def push(
    bundle: str | Path | Bundle,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    dry_run: bool = False,
    progress: Callable[[str], None] | None = None,
) -> PushReport:
    """Upload a bundle in one commit; see `doge_onnx.push`."""
    report = progress or (lambda _: None)
    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise HubError(
            f"{repo!r} cannot be the name of a repository on the Hub; name it like user/model, of "
            "letters, digits, '-', '_' and '.'"
        ) from None
    report("checking the files")
    opened = Bundle.open(bundle)
    # Only these: other files in the directory were never checked, and may be private.
    files = {name: opened.path / name for name in (*sorted(opened.manifest.files), MANIFEST_NAME)}
    sizes = {name: path.stat().st_size for name, path in files.items()}
    branch = revision or constants.DEFAULT_REVISION
    words = message or _message(opened.manifest)
    if dry_run:
        return PushReport(repo, branch, words, sizes, None, None)
    with _errors(repo, branch):
        if get_token() is None:
            raise HubError("there is no token for the Hub: log in with `hf auth login`")
        api = HfApi(library_name="doge-onnx")
        report("creating the repository, if there is none")
        repo = api.create_repo(repo, private=private or None, exist_ok=True).repo_id
        _prepare(api, repo, branch, private)
        report(f"uploading {len(files)} files, {sum(sizes.values()) / 1e6:.1f} MB")
        commit = api.create_commit(
            repo,
            [CommitOperationAdd(name, path) for name, path in files.items()],
            commit_message=words,
            revision=branch,
        )
    url = f"{api.endpoint}/{repo}"
    if branch != constants.DEFAULT_REVISION:
        url += f"/tree/{quote(branch, safe='')}"
    return PushReport(repo, branch, words, sizes, url, commit.oid)


def _message(manifest: Manifest) -> str:
    model = " ".join((manifest.source.get("model") or "a Doge model").split())
    state = manifest.state
    kind = "" if state.kind == "growing" else f", {state.kind} state"
    dtype = "" if state.dtype == "float32" else f", state in {state.dtype}"
    return f"Upload {model} in ONNX, {manifest.precision}{kind}{dtype}"


def _prepare(api: HfApi, repo: str, branch: str, private: bool) -> None:
    """Create the branch if need be, and refuse a private upload to a public repository."""
    try:
        info = api.model_info(repo, revision=branch)
    except RevisionNotFoundError:
        api.create_branch(repo, branch=branch, exist_ok=True)
        info = api.model_info(repo, revision=branch)
    # `private` has no effect on a repository that exists.
    if private and not info.private:
        raise HubError(
            f"{repo} exists and is public: make it private on the Hub first, or choose another name"
        )


@contextmanager
def _errors(repo: str, branch: str) -> Iterator[None]:
    """Turn what the network or the Hub refuses into one-line errors."""
    try:
        yield
    except DogeOnnxError:
        raise
    except OfflineModeIsEnabled:
        raise HubError("offline mode (HF_HUB_OFFLINE) is on, so nothing can be uploaded") from None
    except Exception as error:
        chain: list[BaseException] = [error]
        while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
            chain.append(cause)
        # A file could not be read; the network is not to blame. The command line reports it.
        if isinstance(error, OSError) and not isinstance(error, ConnectionError | HfHubHTTPError):
            raise
        for link in chain:
            if isinstance(link, HfHubHTTPError):
                raise _refusal(repo, branch, link) from None
        # The HTTP library's errors are not OSErrors, but an OSError caused them.
        if isinstance(chain[-1], OSError):
            raise HubError(
                f"the Hub at {constants.ENDPOINT} cannot be reached ({chain[-1]}); check the "
                "connection"
            ) from None
        reason = " ".join(str(error).split())
        raise HubError(f"cannot upload to {repo}: {type(error).__name__}: {reason}") from None


def _refusal(repo: str, branch: str, error: HfHubHTTPError) -> HubError:
    """The error for an upload that the Hub refused."""
    status = error.response.status_code
    if status == 401 and not isinstance(error, RepositoryNotFoundError):
        return HubError(
            f"the Hub at {constants.ENDPOINT} does not accept the token: log in again with "
            "`hf auth login`"
        )
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = error.server_message or (lines[0] if lines else f"status {status}")
    reason = " ".join(reason.split())
    if status in (401, 403):
        return HubError(
            f"the token may not write to {repo} ({reason}): use one that has write access (`hf "
            "auth login`), or a repository of your own"
        )
    return HubError(
        f"the Hub at {constants.ENDPOINT} refused the upload to {repo}, branch {branch}: {reason}"
    )
