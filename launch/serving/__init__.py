"""The decode benchmark, in the order of a run.

- Requests: `workload_flags` (flags), `workload` (drawn ones), `traces` (files).
- Set-up: `run_setup` (model, mesh, cache), `fits` (is there memory for it).
- The loop: `row_schedule` (which request is in which row), `programs` (what is jitted), `engine` (runs and times them).
- Data that can be recomputed: `synthetic` (queries, keys, values), `output_checks` (against the float64 oracle).
- The end: `results` (numbers), `report` (text).
"""
