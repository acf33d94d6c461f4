"""A sequence-to-sequence model whose right alignment is known."""
