"""What the programs share: their flags, how they start and end, processes of a local pod, facts of TPU chips."""
