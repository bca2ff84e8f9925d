"""Prompt programs, one per file."""
