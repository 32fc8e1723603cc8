"""Engines beside the local one in batch.py."""
