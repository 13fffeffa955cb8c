"""The random bits of dropout: Random123's known answers, independence of the tiling, and the keep rate."""

from __future__ import annotations

import pytest
import torch
from fusion_kernels.philox import keep_mask, philox

PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)


def words(*values: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor(v) for v in values)


@pytest.mark.parametrize(
    ("rounds", "counter", "key", "expected"),
    [  # kat_vectors of Random123
        (7, (0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        (7, (0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
        (7, PI, (0xA4093822, 0x299F31D0), (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)),
        (10, (0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (10, (0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (10, PI, (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ],
)
def test_known_answers(rounds: int, counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]) -> None:
    got = philox(words(*counter), words(*key), rounds)  # type: ignore[arg-type]
    assert tuple(hex(int(w)) for w in got) == tuple(hex(w) for w in expected)


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1, 2**32, 2**62 + 12345, -1])
def test_any_box_is_a_part_of_the_whole(seed: int) -> None:
    s = torch.tensor(seed)
    heads = torch.arange(6).view(2, 3)
    whole = keep_mask(s, 0.3, heads, (0, 37), (0, 61))
    assert whole.shape == (2, 3, 37, 61)
    for queries, keys in (((0, 1), (0, 1)), ((5, 37), (3, 8)), ((36, 37), (60, 61)), ((7, 9), (4, 61)), ((0, 37), (17, 18))):
        part = keep_mask(s, 0.3, heads[1:], queries, keys)
        assert torch.equal(part, whole[1:, :, slice(*queries), slice(*keys)])


def test_seeds_and_positions_differ() -> None:
    heads = torch.arange(2)
    a, b = (keep_mask(torch.tensor(s), 0.5, heads, (0, 64), (0, 64)) for s in (1, 2))
    high = keep_mask(torch.tensor(1 + 2**32), 0.5, heads, (0, 64), (0, 64))
    for x, y in ((a, b), (a[0], a[1]), (a[:, 0], a[:, 1]), (a[..., 0], a[..., 1]), (a, high)):
        assert not torch.equal(x, y)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_keep_rate(p: float) -> None:
    kept = keep_mask(torch.tensor(1234), p, torch.arange(8), (0, 128), (0, 128)).double()
    n = kept.numel()
    assert abs(kept.mean().item() - (1 - p)) <= 5 * (p * (1 - p) / n) ** 0.5  # five standard deviations
    if 0 < p < 1:  # neighbours are independent: the correlation of n pairs is within five of its own deviations
        for x, y in ((kept[..., 1:], kept[..., :-1]), (kept[:, 1:], kept[:, :-1]), (kept[1:], kept[:-1])):
            correlation = torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1].item()
            assert abs(correlation) <= 5 / x.numel() ** 0.5


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("seed", [0, 7, 2**40 + 3])
def test_no_structure(p: float, seed: int) -> None:
    """What a word that is a sum of a row's and a key's would show, and a hash that mixes too little: 4 M elements, centred.

    Each statistic is a mean of products of independent elements of variance p (1 - p), so it has mean 0 and, over n of them,
    a deviation of (p (1 - p))^(factors / 2) / sqrt(n); about forty are looked at, and six deviations come once in 10^7.
    """
    x = keep_mask(torch.tensor(seed), p, torch.arange(4), (0, 1024), (0, 1024)).double() - (1 - p)
    deviation = (p * (1 - p)) ** 0.5
    for shift in (1, 2, 3, 4, 7, 8, 16, 32, 64, 255, 256, 512):  # along keys, along queries, along both
        for a, b in (
            (x[..., shift:], x[..., :-shift]),
            (x[:, shift:], x[:, :-shift]),
            (x[:, shift:, shift:], x[:, :-shift, :-shift]),
        ):
            assert abs((a * b).mean().item()) <= 6 * deviation**2 / a.numel() ** 0.5
    for dq, dk in ((1, 1), (1, 8), (8, 1), (16, 64), (511, 511)):  # the corners of rectangles
        corners = x[:, dq:, dk:] * x[:, dq:, :-dk] * x[:, :-dq, dk:] * x[:, :-dq, :-dk]
        assert abs(corners.mean().item()) <= 6 * deviation**4 / corners.numel() ** 0.5
    for sums in (x.sum(-1), x.sum(-2)):  # rows and columns keep what a binomial keeps
        assert abs(sums.var().item() / (1024 * deviation**2) - 1) <= 6 * (2 / sums.numel()) ** 0.5


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_no_structure_in_threes_and_fours(p: float) -> None:
    """Keys of a row at equal distances, and four that are sums of two: independent, over 2^17 rows; see above for the statistic.

    Both fail, by 13 and 20 deviations, where the second factor of the word is a sum and not a xor.
    """
    x = keep_mask(torch.tensor(99), p, torch.arange(1), (0, 1 << 17), (0, 136))[0].float() - (1 - p)
    deviation, n = (p * (1 - p)) ** 0.5, 1 << 17
    for d in range(1, 60):
        for s in (0, 5, 8):
            assert abs((x[:, s] * x[:, s + d] * x[:, s + 2 * d]).mean().item()) <= 6 * deviation**3 / n**0.5
        for e in (1, 2, 8, 16, 64):
            if d != e:
                assert abs((x[:, 0] * x[:, d] * x[:, e] * x[:, d + e]).mean().item()) <= 6 * deviation**4 / n**0.5
