"""The decode benchmark's parts: requests, which row each is in, the programs, the report."""
