"""What the algorithms of a family share: their arguments, loops, exploration and checkpoints."""
