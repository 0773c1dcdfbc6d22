"""Retrieval for generation: chunks of documents, and the index over them."""
