"""A script for each trainer, and `python -m examples.trainers`, which compares them."""
