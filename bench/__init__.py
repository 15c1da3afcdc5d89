"""The benchmark: the registry's cases, ours beside what a user would pick instead, measured fairly. See bench/README.md."""
