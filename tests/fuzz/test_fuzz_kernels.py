"""Written score programs straight to the Triton kernels: through Triton's interpreter, and on a GPU.

Triton decides at its import whether it interprets: that half runs in the worker process of conftest.py.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from fuzz.drive import each
from fuzz.inputs import Input
from fuzz.scores import Scored, scores

PARTS = 16  # of the 320 programs on a GPU: tests of their own, which processes share


def interpreted(program: Scored) -> list[str]:
    """Runs in the worker."""
    from fuzz.kernel_judge import judge

    return judge(program, "cpu")


@pytest.mark.parametrize("seed", range(2))
def test_interpreted(worker: ProcessPoolExecutor, seed: int) -> None:
    def check(program: Scored) -> None:
        wrong = worker.submit(interpreted, program).result()
        assert not wrong, "\n".join([*wrong, repr(program)])

    each(scores(interpreted=True), check, seed=seed, count=20)


def scored(text: str, shape: tuple[int, ...], *captures: Input, dropout: float = 0.0, dtype: str = "float32") -> Scored:
    return Scored(text, shape, captures, (), dtype, dropout, True, 5, None)


SCALED = "captures; params 0; %0 = score; %1 = const -0.3; %2 = mul %0 %1"


FOUND = {  # came out wrong once, made short
    # The log-sum-exp of a head that is hidden whole, -1e9 log2(e), has no digits left for the number of its keys.
    "a mask of whole heads": scored(
        "captures float[2]; params 0; %0 = score; %1 = index b; %2 = index h; %3 = load 0 %1 %2; %4 = add %0 %3",
        (2, 2, 2, 16, 3, 8, 8), Input("c0", (2, 2), "additive", fill=-1e9, dead=True),
    ),
    # 3.4e38 is a number in fp32, 3.4e38 log2(e) is not.
    "a mask of the wrong sign": scored(
        "captures float[2]; params 0; %0 = score; %1 = index q; %2 = index k; %3 = load 0 %1 %2; %4 = sub %0 %3",
        (1, 2, 2, 7, 17, 8, 8), Input("c0", (7, 17), "additive", fill=torch.finfo(torch.float32).min),
    ),
    # NaN times what dropout multiplies with is NaN, where it is 0 too: in dv of a row without a key.
    "dropout of NaN": scored(
        "captures bool[2]; params 0; %0 = index h; %1 = index q; %2 = load 0 %0 %1; %3 = score; %4 = const -inf; "
        "%5 = where %2 %3 %4",
        (1, 2, 2, 7, 40, 8, 8), Input("c0", (2, 7), "keep", dtype=torch.bool, dead=True), dropout=0.5,
    ),
    # ptxas 12.8 took the descriptors of the second part of the values from registers that nobody had written.
    "values in two parts, by single elements": scored(SCALED, (1, 2, 1, 128, 64, 1, 72), dtype="float16"),
    "narrow values": scored(SCALED, (2, 2, 2, 128, 129, 72, 1), dtype="float16"),
    # The masked loop is another instance of the loop than the full one, also where its loads need no masks.
    "causal, whole tiles": scored(
        "captures; params 0; %0 = index q; %1 = index k; %2 = ge %0 %1; %3 = score; %4 = const -inf; %5 = where %2 %3 %4",
        (1, 2, 2, 128, 128, 16, 16),
    ),
}  # fmt: skip


@pytest.mark.parametrize("program", FOUND.values(), ids=FOUND)
def test_found(worker: ProcessPoolExecutor, program: Scored) -> None:
    wrong = worker.submit(interpreted, program).result()
    assert not wrong, "\n".join(wrong)


@pytest.mark.gpu
@pytest.mark.parametrize("part", range(PARTS))
def test_on_a_gpu(part: int) -> None:
    from fuzz.kernel_judge import judge

    def check(program: Scored) -> None:
        wrong = judge(program, "cuda")
        assert not wrong, "\n".join([*wrong, repr(program)])

    each(scores(interpreted=False), check, seed=part, count=320 // PARTS)


@pytest.mark.gpu
@pytest.mark.parametrize("program", FOUND.values(), ids=FOUND)
def test_found_on_a_gpu(program: Scored) -> None:
    from fuzz.kernel_judge import judge

    wrong = judge(program, "cuda")
    assert not wrong, "\n".join(wrong)
