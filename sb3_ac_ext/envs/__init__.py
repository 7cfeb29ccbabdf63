"""Environments: several agents as one, and what a policy sees of a screen."""
