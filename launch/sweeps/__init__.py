"""The parts of a scaling sweep: its flags, points and rows, the three ways to run it, and its report."""
