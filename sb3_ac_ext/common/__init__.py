"""Stateful pieces that two or more algorithms share."""
