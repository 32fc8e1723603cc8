"""Video networks; each keeps the contract of `runner`."""
