"""GLM-Image's forward passes, each model in a file that reads from top to bottom."""
