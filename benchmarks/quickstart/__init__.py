"""A small speaker recogniser on real utterances, trained with the public package as it is and after ``fuse``."""
