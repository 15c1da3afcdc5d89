"""Exercise 2. Sectors.

A warp's 32 lanes load one element each: lane i the element `first + i * stride`, counted from an address that is a
multiple of 32 bytes. Memory is fetched in sectors of 32 bytes. How many sectors is that?

`sectors(stride, itemsize, first)` is right where nothing is wasted. Make it right for every stride (0 too: every lane
reads the same element), every itemsize and every first element. No kernel in this one.
"""

LANES = 32
SECTOR = 32  # bytes


def sectors(stride: int, itemsize: int, first: int = 0) -> int:
    """Sectors that the load of one warp touches."""
    # TODO(ex2): in which sector does each lane's element lie, and how many different ones are there?
    return LANES * itemsize // SECTOR
