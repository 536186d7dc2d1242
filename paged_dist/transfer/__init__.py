"""Live pages to elsewhere: a pool of another size, another mesh, a folder of files."""
