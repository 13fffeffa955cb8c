"""Prints the errors of the Triton kernels beside eager's, one line a case: python tests/gpu/error_table.py [SUBSTRING]

The cases are those of test_triton_gpu.py, in parallel processes; the lines of failing cases begin with FAIL.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
import test_triton_gpu as tests


def run(job: tuple[str, Any, Any, dict[str, Any]]) -> str:
    import triton_cases

    name, shape, dtype, options = job
    started = time.time()
    label = f"{name} {shape} {str(dtype)[6:]} {options or ''}".replace("Shape", "")
    try:
        results = triton_cases.compare(name, shape, dtype, "cuda", **options)
    except Exception as error:
        while error.__cause__ is not None:
            error = error.__cause__
        return f"FAIL {label}: {type(error).__name__} {str(error)[:300]}"
    good = all(o <= triton_cases.allowed(w, e, dtype) for w, (o, e) in zip(triton_cases.OUTPUTS, results, strict=False))
    cells = " ".join(f"{ours:.1e}/{eager:.1e}" for ours, eager in results)
    return f"{'ok  ' if good else 'FAIL'} {label}: {cells} {time.time() - started:.0f} s"


if __name__ == "__main__":
    jobs = [job for job in tests.jobs() if (sys.argv[1:] or [""])[0] in str(job)]
    bad = 0
    with multiprocessing.get_context("spawn").Pool(15) as pool:
        for line in pool.imap_unordered(run, jobs, chunksize=1):
            bad += line.startswith("FAIL")
            print(line, flush=True)
    print(f"{len(jobs)} cases, {bad} failed")
