"""Annotations, features and words, joined to batches."""
