"""Dense ↔ quantized: which codec a tensor gets and how its values are chosen. Knows no files."""
