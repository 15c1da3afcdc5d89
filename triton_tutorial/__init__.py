"""The course: lessons, exercises and the `triton-tutorial` command. Importing this package imports no torch."""
