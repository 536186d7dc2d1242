"""What every launcher shares: its flags, how it starts and ends, and facts of TPU chips."""
