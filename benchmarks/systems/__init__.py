"""What each system around LUFFY, SORT and SCOPE does in miniature, against GRPO."""
