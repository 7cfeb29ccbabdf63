"""How RL Zoo learns the algorithms: one table (`registry`), search spaces (`samplers`), the patch derived from both."""
