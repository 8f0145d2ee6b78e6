"""Basic types. Problems import without torch, because verifiers and data checks need no tensors."""
