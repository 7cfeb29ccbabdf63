"""What the on-policy family still computes with: layers, backward passes and recordings written by hand."""
