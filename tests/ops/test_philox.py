import pytest
import torch

from fastbert.backends import native
from fastbert.ops import philox

# Known answers published with Random123 (kat_vectors, philox4x32 with 7 rounds): counter, key, words.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
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


def test_lanes_are_the_words_parts_low_first():
    first, second = ([int(w) for w in philox.philox(torch.tensor(i), 7, 3, 1, 99)] for i in range(2))
    halves = [half for word in second for half in (word & 0xFFFF, word >> 16)]
    octets = [octet for word in (*first, *second) for octet in word.to_bytes(4, "little")]
    seed = torch.tensor([99])
    assert philox.lanes(15, 7, 3, 1, seed)[8:].tolist() == halves[:7]
    assert philox.lanes(31, 7, 3, 1, seed, bits=8).tolist() == octets[:31]


@pytest.mark.parametrize(
    ("p", "bits", "t", "scale"),
    [
        (0.0, 16, 0, 1.0), (0.5, 16, 32768, 2.0), (0.1, 16, 6554, 65536 / 58982), (1.0, 16, 65536, 0.0),
        (1e-9, 16, 1, 65536 / 65535), (1 - 1e-9, 16, 65535, 65536.0),
        (0.0, 8, 0, 1.0), (0.5, 8, 128, 2.0), (0.1, 8, 26, 256 / 230), (1.0, 8, 256, 0.0),
        (1e-9, 8, 1, 256 / 255), (0.999, 8, 255, 256.0),
    ],
)  # fmt: skip
def test_threshold_and_scale(p, bits, t, scale):
    assert philox.threshold(p, bits) == t and philox.scale(t, bits) == scale


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


def test_seeds_drawn_together_are_those_drawn_one_by_one():
    torch.manual_seed(5)
    together = philox.draw_seeds([0.1, 0.0, 0.5, 0.1], torch.device("cpu"))
    end = torch.get_rng_state()
    torch.manual_seed(5)
    alone = [philox.resolve_seed(None, t, torch.device("cpu")) for t in (1, 0, 1, 1)]
    assert together[1] is alone[1] is None and torch.equal(torch.get_rng_state(), end)
    assert all(torch.equal(together[i], alone[i]) for i in (0, 2, 3))
