"""Which PEFT method to take for a model, a federation and a budget."""
