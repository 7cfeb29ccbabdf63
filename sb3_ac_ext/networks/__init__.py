"""Networks and policies that several algorithms share, beyond SB3's."""
