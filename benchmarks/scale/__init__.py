"""What a training step costs on up to 1,024 GPUs: formulas, and a simulation that checks them."""
