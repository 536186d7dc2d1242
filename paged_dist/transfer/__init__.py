"""Live pages brought elsewhere: to a pool of another size (`resize`), another mesh (`reshard`), a folder (`save`)."""
