"""What everything rests on: trees, hyperparameters, devices, the batch."""
