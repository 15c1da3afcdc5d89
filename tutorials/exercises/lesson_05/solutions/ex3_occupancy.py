"""Exercise 3. How many programs fit on a multiprocessor.

`triton-tutorial explain tt::softmax` prints registers a thread, warps and shared memory of each kernel. Compute from
them how many programs an SM of an H200 can hold at a time. Its limits:

* 64 warps of 32 threads, and 32 programs;
* 65536 registers, given out to warps in lots of 256: a warp of 33 registers a thread takes 1280, not 1056;
* 233472 bytes of shared memory (228 KiB), of which each program takes 1024 besides what it asks for.

`limited_by` names what runs out first: "registers", "shared memory" or "warps and programs" (also where equal).
"""

WARPS, PROGRAMS, REGISTERS, SHARED = 64, 32, 65536, 233472


def limits(registers: int, num_warps: int, shared: int) -> dict[str, int]:
    """How many programs each limit allows."""
    lots = -(-registers * 32 // 256)
    return {
        "warps and programs": min(PROGRAMS, WARPS // num_warps),
        "registers": REGISTERS // (lots * 256 * num_warps),
        "shared memory": SHARED // (shared + 1024),
    }


def programs_per_sm(registers: int, num_warps: int, shared: int) -> int:
    return min(limits(registers, num_warps, shared).values())


def limited_by(registers: int, num_warps: int, shared: int) -> str:
    found = limits(registers, num_warps, shared)
    return min(found, key=lambda name: found[name])
