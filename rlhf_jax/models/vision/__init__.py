"""Vision: patch encoders, projectors, and image features among the embeddings of tokens."""
