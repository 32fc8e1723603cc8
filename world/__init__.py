"""A procedural world of short home videos with exact annotations; not part of the wheel."""
