"""The random bits of dropout, in torch integers: Philox 4x32 with 7 rounds for each row, and a word for each two keys of it.

Which elements are kept depends on (seed, b, h, q, k) alone, so forward, backward and recomputation agree whatever the tiles,
and so do this file and the Triton kernels, bit for bit.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

import torch

__all__ = ["ROUNDS", "keep_mask", "philox"]

ROUNDS = 7  # the fewest that pass BigCrush (table 2 of the paper)
WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
STEPS = (0x9E3779B9, 0x85EBCA6B)


def _multiply(a: int | torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of a * b; the 64-bit product wraps into the sign, which the masks drop."""
    product = b * a
    return (product >> 32) & WORD, product & WORD


def philox(
    counter: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    key: tuple[torch.Tensor, torch.Tensor],
    rounds: int = ROUNDS,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Four random 32-bit words (in int64) for each counter; counter and key hold 32-bit words in int64 and broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        high0, low0 = _multiply(MULTIPLIERS[0], c0)
        high1, low1 = _multiply(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return c0, c1, c2, c3


def keep_mask(
    seed: torch.Tensor,
    dropout_p: float,
    heads: torch.Tensor,
    queries: tuple[int, int],
    keys: tuple[int, int],
) -> torch.Tensor:
    """Which probabilities dropout keeps: two words a row by Philox, one of both for each two keys (see `dropout`).

    Args:
        seed: 0-d int64.
        dropout_p: the probability to drop, resolved to 1 / 2^32.
        heads: int64, b * H + h of each row of the result, any shape S.
        queries: half-open range of query positions.
        keys: half-open range of key positions.

    Returns:
        bool, (*S, queries, keys): True where kept (to be scaled by 1 / (1 - dropout_p)).
    """
    rows = torch.arange(*queries, device=heads.device).view(-1, 1)  # (queries, 1)
    zero = torch.zeros_like(rows)
    word0, word1, *_ = philox((rows, heads.view(*heads.shape, 1, 1), zero, zero), (seed & WORD, (seed >> 32) & WORD))
    k = torch.arange(*keys, device=heads.device)
    pair = k & ~8
    high, low = _multiply((word0 + pair * STEPS[0]) & WORD, word1 ^ (pair * STEPS[1] & WORD))
    x = high ^ low
    x = torch.where(k & 8 != 0, x, (x << 16 | x >> 16) & WORD)
    return x >= min(round(dropout_p * 2**32), WORD)
