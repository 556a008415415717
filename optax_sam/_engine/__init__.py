"""The step: two passes, the ascent between them, and who ascends together."""
