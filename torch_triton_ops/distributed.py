"""DTensor sharding rules, by the name that an entry's `sharding:` gives."""

from __future__ import annotations

from torch_triton_ops.registry import OpSpec


def register(spec: OpSpec) -> None:
    """Register the rules of `spec`'s ops with DTensor."""
