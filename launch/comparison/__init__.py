"""The parts of `compare`: rows of runs, rank statistics, the comparison as a record, and its text. None needs JAX."""
