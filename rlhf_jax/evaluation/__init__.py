"""Floor 3: what a trained model is worth, and how sure of it we are."""
