"""Where checkpoints lie: a local directory, or one in object storage (`gs://BUCKET/PATH`; extra `gcs`).

There are no directories in object storage, only names of objects, so nothing can be moved or locked at once. What is
written to one object is there whole or not at all.
"""

import logging
import os

from etils import epath
from etils.epath import backend

# Of the codes of absl::Status, in tensorstore's messages, those that do not tell of what is stored.
NO_ANSWER = (
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "PERMISSION_DENIED",
    "UNAUTHENTICATED",
    "RESOURCE_EXHAUSTED",
    "ABORTED",
)


def place(where: str | os.PathLike[str]) -> epath.Path:
    """`where` as an absolute path. Raises what gcsfs does when it finds no credentials."""
    path = epath.Path(where)
    if not remote(path):
        return path.absolute()
    for name in ("gcsfs", "fsspec"):  # they show a trace of every error that they then raise
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # Arrays are written past gcsfs, and by other hosts: a listing it remembers may lack what is there.
    remembered = backend.fsspec_backend.fs(path).dircache
    remembered.use_listings_cache = False
    remembered.clear()
    return path


def remote(path: epath.Path) -> bool:
    """Whether hosts see the same there without sharing a disk."""
    return path.as_posix().startswith("gs://")


def check_bucket(path: epath.Path) -> None:
    """Raises FileNotFoundError when there is no such bucket, which gcsfs would otherwise try to make."""
    bucket = "/".join(path.as_posix().split("/")[:3])
    try:
        epath.Path(bucket).stat()
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no {bucket} that may be read") from None


def unreachable(error: BaseException) -> bool:
    """Whether object storage did not answer or refused, which says nothing about what lies there."""
    seen: BaseException | None = error
    while seen is not None:
        refused = isinstance(seen, OSError) and not isinstance(seen, FileNotFoundError)
        client = type(seen).__module__.partition(".")[0] in ("aiohttp", "gcsfs", "google", "requests")
        if refused or client or any(code in str(seen) for code in NO_ANSWER):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
