"""Bits ↔ values: the block codecs and the maths of one layer. Knows no files and no tensor names."""
