"""What the scripts of the examples share."""
