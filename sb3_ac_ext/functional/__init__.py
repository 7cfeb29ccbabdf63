"""Pure maths on tensors: no state, no random numbers, no device arguments; the callers pass noise in."""
