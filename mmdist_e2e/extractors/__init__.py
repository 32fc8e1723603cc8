"""MP4 to features."""
