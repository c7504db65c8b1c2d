"""The reply to a write of content that never changes under its id. Owns which refusals of the server count as success."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from streamline_pool.domain.errors import StoreUnavailableError, ValidationError

from . import server_codes
from .operations import Reply, error_text

__all__ = ["stored_or_there"]


def stored_or_there(what: str, *other_keys: Mapping[str, int]) -> Callable[[Reply], None]:
    """The parser of such a write. A document that exists is a success. `what` names the documents in errors.

    `other_keys`: unique indexes besides `_id` by which the same content is found. Any other unique index is one that users
    have put on the collection, and the document is not there.

    Raises ValidationError when the server refuses a document for good, else StoreUnavailableError.
    """
    same = (None, {"_id": 1}, *other_keys)  # None: not every server names the index

    def parse(reply: Reply) -> None:
        for error in reply.get("writeErrors", ()):
            if error.get("code") == server_codes.DUPLICATE_KEY and error.get("keyPattern") in same:
                continue
            text = f"{what} could not be stored: {error_text(error)}"
            if error.get("code") in server_codes.WILL_BE_REFUSED_AGAIN:
                raise ValidationError(text)
            raise StoreUnavailableError(text, transient=True)

    return parse
