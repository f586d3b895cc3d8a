"""The environment of a worker, the same wherever its times count."""

from __future__ import annotations

HUGE_PAGES = "glibc.malloc.hugetlb=1"
"""Linux: large blocks of memory in pages of 2 MB, as the system has them to give (glibc's manual, "Memory Allocation
Tunables"). For every contestant alike. Without it a process that repacks its weights gets pages of 4 kB, and where they
happen to lie makes it faster or slower for as long as it lives (a 1B shape in int4, two threads, fresh processes: 44 to
56 tok/s, with it 54 to 60): benches of the same files did not agree.
"""


def worker_settings(threads: int, code: str) -> dict[str, str]:
    """Thread pools, hashing and the size of pages fixed. code: where edgec's files are."""
    count = str(threads)
    pools = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"), count)
    parallel = "true" if threads > 1 else "false"
    fixed = {"TOKENIZERS_PARALLELISM": parallel, "PYTHONHASHSEED": "0", "GLIBC_TUNABLES": HUGE_PAGES}
    fixed["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # else only the first process of a bench compiles
    return {**pools, **fixed, "PYTHONPATH": code}
