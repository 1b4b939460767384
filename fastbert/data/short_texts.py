"""A table from short texts to numbers, looked up by the million at a time.

A dictionary is asked for each text on its own, and waits for memory each time. Here a text of up to 15 bytes is two
integers, which hold the text itself and its length, so that equal integers are equal texts, and numpy compares all of
them at once with what stands at their slots. It is a hash table with open addressing, probed linearly (Knuth, The Art
of Computer Programming, volume 3, 6.4).
"""

from typing import NamedTuple

import numpy as np

LONGEST = 15  # bytes: two integers but for one byte, the length
_INTEGER = np.dtype("<u8")
_FIRST = np.array([(1 << 8 * length) - 1 for length in range(9)], _INTEGER)  # of an integer's bytes
_ODD = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)
_HALF, _LENGTH = np.uint64(29), np.uint64(56)


def is_short(text: str) -> bool:
    return len(text) <= LONGEST and len(text.encode("utf-8", "surrogatepass")) <= LONGEST


class Texts(NamedTuple):
    """What stands between the spaces of a text.

    Attributes:
        data: the text, and behind it what may be read past its end.
        starts, ends: bytes, int64 [texts].
        keys: of those of up to `LONGEST` bytes, two uint64 [texts]; of longer ones meaningless.
    """

    data: bytes
    starts: np.ndarray
    ends: np.ndarray
    keys: tuple[np.ndarray, np.ndarray]

    @classmethod
    def of(cls, text: str) -> "Texts":
        data = text.encode("utf-8", "surrogatepass")
        size = len(data)
        ends = np.append(np.flatnonzero(np.frombuffer(data, np.uint8) == ord(" ")), size)
        starts = np.concatenate(([0], ends[:-1] + 1))
        data += bytes(2 * _INTEGER.itemsize)
        from_each_byte = np.ndarray(size + _INTEGER.itemsize + 1, _INTEGER, data, strides=(1,))
        lengths = ends - starts
        first = from_each_byte[starts] & _FIRST[np.minimum(lengths, 8)]
        second = lengths.astype(_INTEGER) << _LENGTH
        longer = np.flatnonzero(lengths > 8)
        second[longer] |= from_each_byte[starts[longer] + 8] & _FIRST[np.minimum(lengths[longer], LONGEST) - 8]
        return cls(data, starts, ends, (first, second))

    def are_short(self) -> np.ndarray:
        return self.ends - self.starts <= LONGEST

    def are(self, character: str) -> np.ndarray:
        """Which are this one ASCII character, bool [texts]."""
        return (self.keys[0] == ord(character)) & (self.keys[1] == np.uint64(1) << _LENGTH)

    def at(self, places: np.ndarray) -> list[str]:
        bounds = zip(self.starts[places].tolist(), self.ends[places].tolist(), strict=True)
        return [self.data[start:end].decode("utf-8", "surrogatepass") for start, end in bounds]


class ShortTexts:
    """The table.

    Args:
        slots: a power of two, 20 bytes each.
    """

    def __init__(self, slots: int):
        self.shift = np.uint64(64 - (slots.bit_length() - 1))
        self.slots = slots
        self.forget()

    def forget(self) -> None:
        self.first, self.second = np.zeros(self.slots, _INTEGER), np.zeros(self.slots, _INTEGER)
        self.following = np.zeros(self.slots, np.int32)  # the number and 1; 0 of a free slot
        self.taken = 0

    def has_room(self, texts: int) -> bool:
        """For so many more, and half of the slots stay free, without which searching takes long."""
        return self.taken + texts <= self.slots // 2

    def find(self, keys: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """The numbers of texts, int32 [texts], -1 where there is none."""
        slot = self._slots(keys)
        following = self.following[slot]
        others = np.flatnonzero((following > 0) & ~self._is_at(slot, keys))
        while len(others):
            slot[others] = at = self._behind(slot[others])
            following[others] = self.following[at]
            others = others[(following[others] > 0) & ~self._is_at(at, tuple(key[others] for key in keys))]
        return following - 1

    def add(self, keys: tuple[np.ndarray, np.ndarray], numbers: np.ndarray) -> None:
        """Adds texts that it does not have; one may stand there more than once, with the same number."""
        self.taken += len(numbers)  # at most: those that stand there twice take one slot
        slot = self._slots(keys)
        while len(slot):
            free = self.following[slot] == 0
            at = slot[free]  # of several texts that would have the same slot the last one gets it, in all three
            self.first[at], self.second[at] = keys[0][free], keys[1][free]
            self.following[at] = numbers[free] + 1
            left = ~self._is_at(slot, keys)
            keys, numbers = tuple(key[left] for key in keys), numbers[left]
            slot = self._behind(slot[left])

    def _is_at(self, slot: np.ndarray, keys: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        return (self.first[slot] == keys[0]) & (self.second[slot] == keys[1])

    def _slots(self, keys: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        mixed = (keys[0] * _ODD[0]) ^ (keys[1] * _ODD[1])
        mixed ^= mixed >> _HALF
        return (mixed * _ODD[0] >> self.shift).astype(np.int64)

    def _behind(self, slot: np.ndarray) -> np.ndarray:
        return (slot + 1) & (self.slots - 1)
