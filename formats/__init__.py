"""Files ↔ named tensors: safetensors, GGUF, metal, digests, manifests. Knows no model."""
