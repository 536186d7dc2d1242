"""The parts of a scaling sweep: points, runs, report."""
