"""python -m bench.gemm_suite: `linear` on the layers of Llama 3 and Qwen3 against cuBLAS, from one token to 8192.

The recipe is bench.run's (bench/README.md), on the shapes below instead of the op's own cases; the record has a file of its
own, bench/results/<gpu>_gemm.json. Prints the geometric mean of the speed-ups for each number of tokens and for all.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from . import record, run

TOKENS = (1, 16, 64, 256, 2048, 8192)
# (N, K) of every layer: query, key and value in one; output; gate and up in one; down.
LAYERS = {
    "Llama-3-8B": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)),
    "Llama-3-70B": ((10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)),
    "Qwen3-8B": ((6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288)),
    "Qwen3-32B": ((10240, 5120), (5120, 8192), (51200, 5120), (5120, 25600)),
}


def shapes() -> list[tuple[int, int]]:
    """(N, K) of all models' layers, each once."""
    return list(dict.fromkeys(shape for layers in LAYERS.values() for shape in layers))


def cases() -> Iterator[Any]:
    """A benchmark case for each number of tokens and layer; its id is MxNxK."""
    from torch_triton_ops.cases import BenchCase

    def case(M: int, N: int, K: int) -> BenchCase:
        def make(device: torch.device | str, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
            x, weight = torch.randn(M, K, device=device, dtype=dtype), torch.randn(N, K, device=device, dtype=dtype)
            return (x, weight), {}

        return BenchCase(f"{M}x{N}x{K}", make, passes=("fwd",))

    for M in TOKENS:
        for N, K in shapes():
            yield case(M, N, K)


class Suite:
    """`linear`'s spec with the suite's cases in the place of its own."""

    def __init__(self, spec: Any) -> None:
        self._spec = spec

    def __getattr__(self, name: str) -> Any:
        return getattr(self._spec, name)

    def function(self, suffix: str) -> Any:
        """As OpSpec.function."""
        return cases if suffix == "bench_cases" else self._spec.function(suffix)


def geomeans(rows: Sequence[record.Row]) -> dict[str, tuple[float, float, int]]:
    """(geometric mean, least, count) of the valid speed-ups over cuBLAS, by number of tokens, and under "all"."""
    ratios: dict[str, list[float]] = {}
    for row in rows:
        if row["impl"] == "tt" and "ratio_to_best_peer" in row:
            for key in (row["case"].split("x")[0], "all"):
                ratios.setdefault(key, []).append(row["ratio_to_best_peer"])
    order = sorted(ratios, key=lambda key: math.inf if key == "all" else int(key))
    return {
        key: (math.exp(sum(map(math.log, ratios[key])) / len(ratios[key])), min(ratios[key]), len(ratios[key]))
        for key in order
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit status as bench.run's."""
    p = argparse.ArgumentParser(prog="python -m bench.gemm_suite", description="linear against cuBLAS on LLM layers.")
    p.add_argument("--case", metavar="REGEX", help="only cases whose id, MxNxK, matches")
    p.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default 5)")
    p.add_argument("--json", type=Path, metavar="PATH", help="record to write (default bench/results/<gpu>_gemm.json)")
    a = p.parse_args(argv)
    if a.rounds < 1:
        p.error(f"argument --rounds: {a.rounds}; allowed: 1 or more")
    if not torch.cuda.is_available():
        print("bench.gemm_suite: no CUDA GPU: torch.cuda.is_available() is False", file=sys.stderr)
        return 2
    import torch_triton_ops

    suite = Suite(run.select_ops(torch_triton_ops.specs(), ["linear"])[0])
    path = a.json or run.RESULTS / f"{record.slug(torch.cuda.get_device_name())}_gemm.json"
    try:
        result = run.run([suite], run.Options(a.case, ("eager",), a.rounds), path)
    except run.GpuLost as lost:
        print(f"bench.gemm_suite: the GPU failed and nothing more can be measured here: {lost}", file=sys.stderr)
        return 1
    except record.RecordError as error:
        print(f"bench.gemm_suite: {error}", file=sys.stderr)
        return 2
    for key, (mean, least, count) in geomeans(result["rows"]).items():
        label = "all" if key == "all" else f"{key} tokens"
        print(f"{label:>11}: geometric mean {mean:.3f}x cuBLAS, least {least:.3f}x ({count} layers)")
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
