"""Text to batches: tokenizers, chat, packing, files and data sets, resumable order.

Import the module you need: nothing is imported here, so that none pays for the libraries of another.
"""
