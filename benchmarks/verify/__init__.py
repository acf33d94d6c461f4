"""Everything that only a GPU can show, in one command, with one summary."""
