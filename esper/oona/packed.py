"""Records as bytes one behind the other: what is handed on as it came is never taken apart.

Between two records lies a comma. So JSON records that follow each other are the inside of a JSON list, and who reads
them decodes all at once. The broker knows nothing of that: to it, a record is where it begins and ends.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, count
from operator import add

SEPARATOR = b","
END = "I"
"""Of an array of ends: 32 bits, in the byte order of the machine."""


class Packed:
    """Some records. Never changed; `part` shares the bytes.

    Attributes:
        data: bytes in which they lie.
        begin: where the first one begins there.
        ends: where each one ends; the next begins one byte further.
    """

    __slots__ = ("begin", "data", "ends")

    def __init__(self, data: bytes | memoryview, begin: int, ends: Sequence[int]) -> None:
        self.data = data
        self.begin = begin
        self.ends = ends

    @classmethod
    def of(cls, records: Sequence[bytes]) -> Packed:
        """Packs records; there is at least one."""
        return cls(SEPARATOR.join(records), 0, ends_of(map(len, records)))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> bytes:
        """One record."""
        return bytes(self.data[self._begin_of(index) : self.ends[index]])

    def __iter__(self) -> Iterator[bytes]:
        return (self[index] for index in range(len(self)))

    @property
    def num_bytes(self) -> int:
        """Of the records, without what lies between them."""
        return self.ends[-1] - self.begin - len(self) + 1 if self.ends else 0

    @property
    def view(self) -> memoryview:
        """The records' bytes, and what lies between them."""
        return memoryview(self.data)[self.begin : self.ends[-1] if self.ends else self.begin]

    @property
    def end_bytes(self) -> bytes:
        """The ends as they travel; they count from where `data` begins."""
        return bytes(self.ends) if isinstance(self.ends, memoryview) else array(END, self.ends).tobytes()

    def part(self, start: int, stop: int) -> Packed:
        """Records from `start` to before `stop`."""
        if start == 0 and stop == len(self.ends):
            return self
        return Packed(self.data, self._begin_of(start), self.ends[start:stop])

    def apart(self) -> Packed:
        """The same with bytes of its own: of a few records, that is less than to hold on to all in which they came."""
        return Packed(bytes(self.view), 0, tuple([end - self.begin for end in self.ends]))

    def _begin_of(self, index: int) -> int:
        return self.ends[index - 1] + 1 if index else self.begin


def ends_of(sizes: Iterable[int]) -> array[int]:
    """Where records of these sizes end, if the first begins at 0."""
    return array(END, map(add, accumulate(sizes), count()))


def read_ends(data: bytes, start: int, number: int) -> memoryview:
    """Ends that travelled.

    Raises:
        ValueError: if they do not lie there, or do not ascend.
    """
    ends = memoryview(data)[start : start + 4 * number].cast(END)
    known = ends.tolist()
    if len(known) != number or sorted(known) != known:
        raise ValueError("the ends of its records do not ascend")
    return ends


def joined(parts: Sequence[Packed]) -> Packed:
    """All of them as one; there is at least one."""
    if len(parts) == 1:
        return parts[0]
    ends = array(END)
    at = 0
    for part in parts:
        shift = at - part.begin
        ends.extend([end + shift for end in part.ends] if shift else part.ends)
        at += part.ends[-1] - part.begin + 1
    return Packed(SEPARATOR.join([part.view for part in parts]), 0, ends)
