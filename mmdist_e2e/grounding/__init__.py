"""Features and text to moments."""
