"""The training step, and what makes a training of steps."""
