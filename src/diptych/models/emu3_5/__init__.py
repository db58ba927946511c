"""Emu3.5: one vocabulary for text and the codes of an IBQ tokenizer; answers are interleaved documents."""
