"""The outputs of an active run that its document only refers to, as far as this process has them.

Owns their form in memory, and the record of which were asked for. They are kept encoded, as they are stored: most steps never
ask for an earlier output, and to decode one costs more than to keep it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from streamline_pool.domain.errors import DataCorruptionError
from streamline_pool.protocol.codec import decode_payload

__all__ = ["LoadedOutputs"]


class LoadedOutputs(Mapping[str, Any]):
    """Values by output id. Each look-up decodes anew, so the caller may change what it gets.

    A look-up of an output that was not added calls `load`, which blocks. `in` and iteration know only what is here.
    """

    __slots__ = ("_contents", "_load", "asked", "damaged")

    def __init__(self, load: Callable[[str], bytes]) -> None:
        self._contents: dict[str, bytes] = {}
        self._load = load
        self.asked: set[str] | None = None  # ids that were looked up; None: they are not recorded
        self.damaged: DataCorruptionError | None = None  # the error of the last look-up that found no whole output

    def add(self, output_id: str, content: bytes) -> None:
        """Keep the content of an output, as `split_output` made it."""
        self._contents[output_id] = content

    def __getitem__(self, output_id: str) -> Any:
        asked = self.asked  # a handler that goes on after its attempt may look up while the loop ends the record
        if asked is not None:
            asked.add(output_id)
        if output_id not in self._contents:
            try:
                self._contents[output_id] = self._load(output_id)
            except DataCorruptionError as exc:
                self.damaged = exc
                raise
        return decode_payload(self._contents[output_id])

    def __contains__(self, output_id: object) -> bool:
        return output_id in self._contents

    def __iter__(self) -> Iterator[str]:
        return iter(self._contents)

    def __len__(self) -> int:
        return len(self._contents)
