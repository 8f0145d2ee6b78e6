"""What is measured beside the tests; each file says how it is run."""
