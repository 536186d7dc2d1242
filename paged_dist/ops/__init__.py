"""The ops of a decode step, each sharded over the mesh: append, attention, copies of pages, checks of page tables."""
