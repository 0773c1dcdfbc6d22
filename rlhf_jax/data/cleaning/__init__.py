"""Cleaning of rows: rules, near duplicates, decontamination, languages."""
