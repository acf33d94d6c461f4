"""What a call costs before and around the kernel: the wall clock of each layer of Python that it goes through."""
