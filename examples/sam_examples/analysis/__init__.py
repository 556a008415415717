"""What is read off a network in training: scores of layers, weights of examples."""
