"""Attention: the modules, and the backends that compute them."""
