"""Features: one file each, a check and a generator of edits. No feature imports another."""
