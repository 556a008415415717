"""What a script is asked for: its options, methods and optimizers, and their checks."""
