"""Weights by name: what ships in the wheel, and public files fetched and verified by digest."""
