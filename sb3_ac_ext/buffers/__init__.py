"""What updates read: batches from SB3's replay buffers, and rollouts."""
