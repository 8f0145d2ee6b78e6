"""Language models: text and tokens, generating, scoring, training."""
