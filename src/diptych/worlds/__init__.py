"""Worlds whose truth is known: they make prompts, pictures and exact verdicts, so that a method can be tested in minutes."""
