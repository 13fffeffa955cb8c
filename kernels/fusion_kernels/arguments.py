"""What the Triton kernels are called with: a program's device functions, head dims in parts, strides, descriptors, precision."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from . import codegen, configs, tiles
from .assembler import trouble
from .blanks import Blank
from .keys import allows_tf32
from .program import LEAVES, Program, postorder
from .source import INDEX_LIMIT

__all__ = [
    "Blocks", "Parts", "Scratch", "check", "describable", "parts", "precision", "split", "strides", "tiles_of",
    "traits",
]  # fmt: skip

_BUSY = 12  # operations on a score from which on the registers they need count


def split(dim: int, dtype: torch.dtype) -> tuple[int, int]:
    """A head dim as one or two powers of two of at least 16 that cover it: 72 -> (64, 16), 80 -> (64, 16), 100 -> (128, 0).

    fp32 over 64 goes in two parts: the tensor cores cut off what an fp32 sum of many terms rounds, and the
    parts are added by the ordinary adder (see `device.dot`; one product over D = 128 had four times eager's error).
    """
    whole = max(16, _power(dim))
    first = whole // 2
    if dtype == torch.float32 and dim > 64:
        return first, max(16, _power(dim - first))
    if dim <= 16 or dim - first <= 0:
        return whole, 0
    second = max(16, _power(dim - first))
    return (first, second) if first >= 16 and first + second < whole else (whole, 0)


def _power(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def tiles_of(length: int, block: int) -> int:
    return -(-length // block)


def strides(*tensors: torch.Tensor) -> tuple[int, list[tuple[int, ...]]]:
    """(ALIGN, strides): all outer strides divided by ALIGN = 8 where 8 divides them, so that the compiler knows it does."""
    outer = [t.stride()[:3] for t in tensors]
    align = 8 if all(s % 8 == 0 for group in outer for s in group) else 1
    return align, [(*(s // align for s in o), t.stride(3)) for o, t in zip(outer, tensors, strict=True)]


def describable(*tensors: torch.Tensor) -> bool:
    """Whether Hopper's copy engine can read the tensors as they lie: unit last stride, the others in units of 16 bytes."""
    return all(
        t.stride(3) == 1
        and t.data_ptr() % 16 == 0
        and all(s > 0 and s * t.element_size() % 16 == 0 for n, s in zip(t.shape[:3], t.stride()[:3], strict=True) if n > 1)
        for t in tensors
    )


class Blocks:
    """Descriptors of tensors that lie as one did: blocks of (1, 1, rows, width), and zeros past the ends.

    Triton's constructor checks what it is given, at 10 us each; here it does so once.
    """

    def __init__(self, tensor: torch.Tensor, rows: int, width: int) -> None:
        unit = 16 // tensor.element_size()  # the stride of a dim of one is of no account, but has to be a multiple of this
        outer = [s if n > 1 else unit for n, s in zip(tensor.shape[:3], tensor.stride()[:3], strict=True)]
        self.fields = dict(vars(TensorDescriptor(tensor, list(tensor.shape), [*outer, 1], [1, 1, rows, width])))
        del self.fields["base"]

    def of(self, tensor: torch.Tensor) -> TensorDescriptor:
        descriptor = object.__new__(TensorDescriptor)
        descriptor.__dict__.update(self.fields, base=tensor)
        return descriptor


class Scratch:
    """One allocation for what only the kernels of a call read and write.

    Args:
        parts: (dtype, size in units of 4 bytes) of each; no part where the size is 0.
    """

    def __init__(self, device: torch.device, *parts: tuple[torch.dtype, int]) -> None:
        ends = list(accumulate(-(-size // 32) * 32 for _, size in parts))  # in lines of memory, of 128 bytes
        starts = [0, *ends[:-1]]
        self.parts = [(start, size, dtype) if size else None for start, (dtype, size) in zip(starts, parts, strict=True)]
        self.bytes = [4 * start if size else None for start, (_, size) in zip(starts, parts, strict=True)]
        # the memory, to be kept until the last launch that is given a part of it
        self.new = Blank((ends[-1],), (1,), torch.int32, device).maker()

    def split(self, memory: torch.Tensor, of: Callable[[torch.Tensor], Any]) -> list[Any]:
        """The parts as tensors or, if `of` gives addresses, as these; None for no part."""
        first = of(memory)
        if isinstance(first, int):
            return [None if offset is None else first + offset for offset in self.bytes]
        return [None if part is None else memory[part[0] : part[0] + part[1]].view(part[2]) for part in self.parts]


def precision(dtype: torch.dtype) -> str:
    """How fp32 products are taken: as exactly as eager takes them."""
    if dtype != torch.float32:
        return "ieee"  # 16-bit operands: exact products, fp32 sums, whatever this says
    return "tf32" if allows_tf32() else configs.EXACT_FP32


@dataclass(frozen=True)
class Parts:
    """What the kernels need to know about a program, computed once."""

    masked: codegen.Phase
    full: codegen.Phase
    kv_bounds: Any
    q_bounds: Any
    key_mask: Any  # what `key_ranges` has to ask before the bounds can be called, or None
    pair_mask: codegen.PairMask | None  # the same of `pair_ranges`, which then asks all
    deep: bool  # `Phase.deep` of what is neither skipped nor worth `fill`
    fill: float  # of what the bounds skip
    sink: codegen.Sink | None
    weight: codegen.Weight | None

    @property
    def revisit(self) -> bool:
        return self.kv_bounds is not None and self.fill > -math.inf

    @property
    def floor(self) -> float:
        """A row whose maximum is at or below this has to visit every key: exp(fill - maximum) is not 0 in fp32."""
        return self.fill + 128 + abs(self.fill) * 1e-6 if self.fill > -math.inf else -math.inf


@lru_cache(maxsize=1024)
def parts(program: Program, wrt: tuple[int, ...], fast_bfloat16: bool, keys: bool = False, pairs: bool = False) -> Parts:
    """keys: whether to skip the keys that tensors hide from every query (padding); pairs: and what they hide from some."""
    masked, sink = codegen.phase(program, wrt, fast_bfloat16), codegen.sink(program, wrt, fast_bfloat16)
    weight = codegen.weight(program, wrt, fast_bfloat16)
    pair_mask = codegen.pair_mask(program, wrt, fast_bfloat16) if pairs else None
    pairs = pair_mask is not None
    kv_bounds, q_bounds = (codegen.bounds(program, over, keys, pairs) for over in "kq")
    if kv_bounds is None and q_bounds is None:
        return Parts(masked, masked, None, None, None, None, masked.deep, -math.inf, sink, weight)
    mask = tiles.pair_mask(program, wrt) if pairs else None
    graded = mask is not None and mask.graded  # scores between: any row may be as wide or deep as `masked`, in all of its tiles
    full = codegen.phase(tiles.full_program(program, keys, pairs, wrt), wrt, fast_bfloat16, graded and masked.wide)
    key_mask = codegen.key_mask(program) if keys and not pairs else None
    deep = full.deep or (graded and masked.deep)
    fill = tiles.fill(program, keys, pairs, wrt)
    return Parts(masked, full, kv_bounds, q_bounds, key_mask, pair_mask, deep, fill, sink, weight)


def check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """What these kernels ask of their operands, beyond what the op has checked, and of their assembler."""
    if found := trouble(q.device):
        raise RuntimeError(f"fusion_kernels: {found[0]}; needed: {found[1]}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise TypeError(f"fusion_kernels: {name} is {x.dtype}; the Triton kernels take float32, float16 or bfloat16: cast it")
        if x.shape[3] > 256:
            raise ValueError(f"fusion_kernels: {name} has head dim {x.shape[3]}; the Triton kernels take at most 256")
        if x.shape[2] > INDEX_LIMIT:
            raise ValueError(f"fusion_kernels: {name} has {x.shape[2]} positions; the Triton kernels take {INDEX_LIMIT}")


def traits(found: Parts, program: Program, dropout_p: float, two_parts: bool) -> configs.Traits:
    """What the choice of tiles depends on. (Padding counts as a mask: its two loops spill in the tiles of a full program.)"""
    loads = [(n.depends_on("q"), n.depends_on("k")) for n in program.loads]
    tables = [n for n in program.loads if n.depends_on("q") and n.depends_on("k")]
    work = sum(n.depends_on("score") and n.op not in LEAVES for n in postorder(program.root))
    return configs.Traits(
        masked=found.kv_bounds is not None,
        busy=any(map(any, loads)) or work > _BUSY,
        table=bool(tables),
        shared=any(not n.depends_on("b") for n in tables),
        learned=bool(found.masked.tables),
        dropout=dropout_p > 0,
        parts=two_parts,
    )
