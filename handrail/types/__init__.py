"""The nouns that everything else works on. Problems load without torch: verifiers and checks of data need no tensors."""
