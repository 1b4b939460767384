import pytest
import torch

from fastbert.backends import native
from fastbert.ops import philox

# Known answers published with Random123 (kat_vectors, philox4x32 with 10 rounds): counter, key, words.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(counter, key, words):
    seed = key[0] | key[1] << 32
    assert tuple(int(w) for w in philox.philox(*(torch.tensor(c) for c in counter), seed)) == words
    signed = torch.tensor(seed - (1 << 64) if seed >> 63 else seed)
    assert tuple(int(w) for w in philox.philox(*(torch.tensor(c) for c in counter), signed)) == words


@pytest.mark.skipif(native.module is None, reason="the C++ module is not built")
@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers_of_the_kernels(counter, key, words):
    before = native.module.selected()
    for isa in native.module.instruction_sets():
        native.module.use(isa)
        assert tuple(native.module.philox(key[0] | key[1] << 32, counter)) == words, isa
    native.module.use(before)


def test_lanes_are_the_words_halves_low_first():
    words = [int(w) for w in philox.philox(torch.tensor(1), 7, 3, 1, 99)]
    lanes = philox.lanes(16, 7, 3, 1, torch.tensor([99]))
    assert lanes[8:].tolist() == [half for word in words for half in (word & 0xFFFF, word >> 16)]


@pytest.mark.parametrize(
    ("p", "t", "scale"), [(0.0, 0, 1.0), (0.5, 32768, 2.0), (0.1, 6554, 65536 / 58982), (1.0, 65536, 0.0)]
)
def test_threshold_and_scale(p, t, scale):
    assert philox.threshold(p) == t and philox.scale(t) == scale


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_probability_out_of_range(p):
    with pytest.raises(ValueError, match="0 <= dropout_p <= 1"):
        philox.threshold(p)


def test_seed_comes_from_torchs_generator():
    torch.manual_seed(3)
    first = philox.resolve_seed(None, 1, torch.device("cpu"))
    torch.manual_seed(3)
    assert torch.equal(first, philox.resolve_seed(None, 1, torch.device("cpu")))
    assert not torch.equal(first, philox.resolve_seed(None, 1, torch.device("cpu")))
    assert philox.resolve_seed(None, 0, torch.device("cpu")) is None


def test_seed_is_checked():
    with pytest.raises(ValueError, match=r"int64 tensor of shape \[1\]"):
        philox.resolve_seed(torch.tensor(5), 1, torch.device("cpu"))
