"""The benchmark: the registry's cases, ours beside what a user would pick instead. See bench/README.md."""
